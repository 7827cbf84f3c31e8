"""The chat template ``[vision tokens][prompt][text]<EOS>``, for training and inference alike.

Images come first, whatever their place in the messages, then the prompt (a system message, as sentence-transformers
passes it), then the text. The last hidden state of ``<EOS>`` is the embedding. A model of K vectors ends its sequences
in ``<|eos_K|> ... <|eos_2|><EOS>``: the last n tokens are the first n vectors. For training and sentence-transformers,
the tokenizer appends these tokens after truncation, so that none is cut off (``append_eos``). For servers, which do not
truncate and may tokenize without special tokens, the template ends in them. It is never both: the template leaves them
out if the tokenizer has a ``sep_token``, one of the few properties of a tokenizer that a template sees.
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

    :param image: What the template writes for an image.
    :param token: The visual token in ``image``. The processor replaces it with ``before``, all visual tokens of the
        image, and ``after``.
    :param around: How many tokens an image then has in addition to its visual tokens.
    :param video: What the template writes for a video, if the family has any.
    """

    image: str
    token: str
    before: str = ""
    after: str = ""
    around: int = 2
    video: str = ""

    def expanded(self, text: str, counts: Iterable[int]) -> str:
        """Return a text of ``render`` with all visual tokens: ``counts`` of them for each image in turn."""
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
"""A Jinja template that renders messages as ``[vision][prompt][text]<EOS>``, once names in capitals are filled in."""


def chat_template(tokenizer: PreTrainedTokenizerBase, markers: Markers = QWEN) -> str:
    """Return the template of a tokenizer; it treats special tokens in texts and prompts as ``literal`` does."""
    values = {"SPECIAL_TOKENS": special_tokens(tokenizer), "EOS_TOKEN": "".join(reversed(eos_tokens(tokenizer)))}
    template = TEMPLATE.replace("{{- IMAGE -}}", markers.image).replace("{{- VIDEO -}}", markers.video)
    for name, value in values.items():
        template = template.replace(name, json.dumps(value))
    return template


def eos_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens whose last hidden states are the vectors, vector 1 first; sequences have them in reverse."""
    known = special_tokens(tokenizer)
    others = (f"<|eos_{number}|>" for number in count(2))
    return [str(tokenizer.eos_token), *takewhile(known.__contains__, others)]


def add_eos_tokens(tokenizer: PreTrainedTokenizerBase, vectors: int) -> None:
    """Add ``eos_tokens`` to a tokenizer until it has ``vectors`` of them, in place.

    :raises UsageError: If it already has more.
    """
    found = len(eos_tokens(tokenizer))
    if vectors < found:
        raise UsageError(f"eos_tokens is {vectors}, but the backbone has {found}; give {found}, or more to add some")
    tokenizer.add_tokens([f"<|eos_{number}|>" for number in range(found + 1, vectors + 1)], special_tokens=True)


def append_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a tokenizer append its ``eos_tokens`` after truncation, and the template leave them out, in place."""
    tokenizer.add_eos_token, tokenizer.sep_token = True, tokenizer.eos_token
    if len(tokens := eos_tokens(tokenizer)) > 1:  # add_eos_token appends only one
        from tokenizers.processors import TemplateProcessing

        begin = [str(tokenizer.bos_token)] if tokenizer.add_bos_token else []
        backend: Any = tokenizer.backend_tokenizer
        backend.post_processor = TemplateProcessing(
            single=[*begin, "$A", *reversed(tokens)],
            special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in begin + tokens],
        )


def eos_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what ``append_eos`` sets, as arguments for loading a tokenizer; several tokens are in its file instead."""
    one = {} if len(eos_tokens(tokenizer)) > 1 else {"add_eos_token": True}
    return {**one, "sep_token": tokenizer.eos_token}


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens that stand for something other than their characters: images, masks, ``<EOS>``, padding."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def literal(text: str, tokens: Sequence[str]) -> str:
    """Return a text in which each special token has a space after its first character: ``< |image_pad|>``.

    The tokenizer then reads it as ordinary characters: a text that mentions such a token gets no image and no end.
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
