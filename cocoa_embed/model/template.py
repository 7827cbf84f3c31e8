"""The chat template ``[vision tokens][prompt][text]<EOS>``, for training and inference alike.

Images come first in any message, then the prompt (a system message, as sentence-transformers passes it), then the text.
The last hidden state of ``<EOS>`` is the embedding. Either the tokenizer appends ``<EOS>`` (``append_eos``): after
truncation, so that it is never cut off, as training and sentence-transformers need it. Or the template ends in it, for
servers, which truncate nothing and may tokenize without special tokens. Never both: the template leaves ``<EOS>`` out
where the tokenizer has a ``sep_token``, one of the few properties of a tokenizer that a template sees.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"


class Markers(NamedTuple):
    """The tokens of an image.

    :param image: What the template writes.
    :param token: The visual token in it, for which the processor puts ``before``, as many as the image has, ``after``.
    :param around: How many other tokens an image has then.
    :param video: What the template writes for a video, if the family has any.
    """

    image: str
    token: str
    before: str = ""
    after: str = ""
    around: int = 2
    video: str = ""

    def expanded(self, text: str, counts: Iterable[int]) -> str:
        """Return a text of ``render`` with all visual tokens, whose number is that of each image in turn."""
        first, *others = text.split(self.token)
        pairs = zip(others, counts, strict=True)
        return first + "".join(f"{self.before}{self.token * count}{self.after}{other}" for other, count in pairs)


QWEN = Markers(f"{VISION_START}{IMAGE_PAD}{VISION_END}", IMAGE_PAD, video=f"{VISION_START}{VIDEO_PAD}{VISION_END}")

TEMPLATE = """\
{%- for message in messages if message.content is not string -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- IMAGE -}}
{%- elif part.type == 'video' -%}{{- VIDEO -}}
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- set all = namespace(text='') -%}
{%- for message in messages -%}
{%- if message.content is string -%}{%- set all.text = all.text ~ message.content -%}
{%- else -%}
{%- for part in message.content if part.type == 'text' -%}
{%- set all.text = all.text ~ part.text -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- for token in SPECIAL_TOKENS -%}
{%- set all.text = all.text | replace(token, token[:1] ~ ' ' ~ token[1:]) -%}
{%- endfor -%}
{{- all.text -}}
{%- if not sep_token -%}{{- EOS_TOKEN -}}{%- endif -%}
"""
"""Renders messages as ``[vision][prompt][text]<EOS>``, in Jinja, once names in capitals are filled in."""


def chat_template(tokenizer: PreTrainedTokenizerBase, markers: Markers = QWEN) -> str:
    """Return the template of a tokenizer: a special token in a text or a prompt becomes ordinary, as by ``literal``."""
    values = {"SPECIAL_TOKENS": special_tokens(tokenizer), "EOS_TOKEN": tokenizer.eos_token}
    template = TEMPLATE.replace("{{- IMAGE -}}", markers.image).replace("{{- VIDEO -}}", markers.video)
    for name, value in values.items():
        template = template.replace(name, json.dumps(value))
    return template


def append_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a tokenizer append ``<EOS>`` to every sequence after truncation, and the template leave it out, in place."""
    for name, value in eos_settings(tokenizer).items():
        setattr(tokenizer, name, value)


def eos_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what ``append_eos`` sets, as arguments for loading a tokenizer."""
    return {"add_eos_token": True, "sep_token": tokenizer.eos_token}


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens that stand for something else than their characters: images, masks, ``<EOS>``, padding."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def literal(text: str, tokens: Sequence[str]) -> str:
    """Return a text in which each special token has a space behind its first character: ``< |image_pad|>``.

    The tokenizer then finds its ordinary characters: a text that mentions a token is no image, and has no end.
    """
    for token in tokens:
        text = text.replace(token, f"{token[:1]} {token[1:]}")
    return text


def render(
    *, text: str | None, images: int, prompt: str = "", tokens: Sequence[str] = (), markers: Markers = QWEN
) -> str:
    """Render one input with any number of images as the chat template does after ``append_eos``, without Jinja.

    :param tokens: The tokenizer's ``special_tokens``.
    """
    return markers.image * images + literal(f"{prompt}{text or ''}", tokens)
