"""The chat template ``[vision tokens][prompt][text]<EOS>``, for training and inference alike.

Images come first in any message, then the prompt (a system message, as sentence-transformers passes it), then the text.
The last hidden state of ``<EOS>`` is the embedding. A model of K vectors ends its sequences in
``<|eos_K|> ... <|eos_2|><EOS>``: the last n tokens are the first n vectors. Either the tokenizer appends them
(``append_eos``): after truncation, so that none is cut off, as training and sentence-transformers need it. Or the
template ends in them, for servers, which truncate nothing and may tokenize without special tokens. Never both: the
template leaves them out where the tokenizer has a ``sep_token``, one of the few properties of a tokenizer that it sees.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from cocoa_embed.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"


class Markers(NamedTuple):
    """The tokens of an image.

    :param image: What the template writes.
    :param token: The visual token in it. The processor replaces it by ``before``, all visual tokens of the image, and
        ``after``.
    :param around: How many other tokens an image then has.
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
    values = {"SPECIAL_TOKENS": special_tokens(tokenizer), "EOS_TOKEN": "".join(reversed(eos_tokens(tokenizer)))}
    template = TEMPLATE.replace("{{- IMAGE -}}", markers.image).replace("{{- VIDEO -}}", markers.video)
    for name, value in values.items():
        template = template.replace(name, json.dumps(value))
    return template


def eos_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens whose last hidden states are the vectors, vector 1 first; a sequence ends in their reverse."""
    known = special_tokens(tokenizer)
    others = (f"<|eos_{number}|>" for number in count(2))
    return [str(tokenizer.eos_token), *takewhile(known.__contains__, others)]


def add_eos_tokens(tokenizer: PreTrainedTokenizerBase, vectors: int) -> None:
    """Add ``eos_tokens`` to a tokenizer until it has ``vectors`` of them, in place.

    :raises UsageError: If it has more.
    """
    found = len(eos_tokens(tokenizer))
    if vectors < found:
        raise UsageError(f"eos_tokens is {vectors}, and the backbone has {found}; give {found}, or more to add some")
    tokenizer.add_tokens([f"<|eos_{number}|>" for number in range(found + 1, vectors + 1)], special_tokens=True)


def append_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a tokenizer append its ``eos_tokens`` after truncation, and the template leave them out, in place."""
    tokenizer.add_eos_token, tokenizer.sep_token = True, tokenizer.eos_token
    if len(tokens := eos_tokens(tokenizer)) > 1:  # add_eos_token knows of one
        from tokenizers.processors import TemplateProcessing

        begin = [str(tokenizer.bos_token)] if tokenizer.add_bos_token else []
        backend: Any = tokenizer.backend_tokenizer
        backend.post_processor = TemplateProcessing(
            single=[*begin, "$A", *reversed(tokens)],
            special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in begin + tokens],
        )


def eos_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what ``append_eos`` sets, as arguments for loading a tokenizer; the tokens of several are in its file."""
    one = {} if len(eos_tokens(tokenizer)) > 1 else {"add_eos_token": True}
    return {**one, "sep_token": tokenizer.eos_token}


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
