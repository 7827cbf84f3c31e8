"""The chat template ``[vision tokens][prompt][text]<EOS>``, for training and inference alike.

Images come first in any message, then the prompt (a system message, as sentence-transformers passes it), then the text.
The last hidden state of ``<EOS>`` is the embedding. Either the tokenizer appends ``<EOS>`` (``append_eos``): after
truncation, so that it is never cut off, as training and sentence-transformers need it. Or the template ends in it, for
servers, which truncate nothing and may tokenize without special tokens. Never both: the template leaves ``<EOS>`` out
where the tokenizer has a ``sep_token``, one of the few properties of a tokenizer that a template sees.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"

TEMPLATE = f"""\
{{%- for message in messages if message.content is not string -%}}
{{%- for part in message.content -%}}
{{%- if part.type == 'image' -%}}{VISION_START}{IMAGE_PAD}{VISION_END}
{{%- elif part.type == 'video' -%}}{VISION_START}{VIDEO_PAD}{VISION_END}
{{%- endif -%}}
{{%- endfor -%}}
{{%- endfor -%}}
{{%- set all = namespace(text='') -%}}
{{%- for message in messages -%}}
{{%- if message.content is string -%}}{{%- set all.text = all.text ~ message.content -%}}
{{%- else -%}}
{{%- for part in message.content if part.type == 'text' -%}}
{{%- set all.text = all.text ~ part.text -%}}
{{%- endfor -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- for token in SPECIAL_TOKENS -%}}
{{%- set all.text = all.text | replace(token, token[:1] ~ ' ' ~ token[1:]) -%}}
{{%- endfor -%}}
{{{{- all.text -}}}}
{{%- if not sep_token -%}}{{{{- EOS_TOKEN -}}}}{{%- endif -%}}
"""
"""Renders messages as ``[vision][prompt][text]<EOS>``, in Jinja, once SPECIAL_TOKENS and EOS_TOKEN are filled in."""


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template of a tokenizer: a special token in a text or a prompt becomes ordinary, as by ``literal``."""
    template = TEMPLATE.replace("SPECIAL_TOKENS", json.dumps(special_tokens(tokenizer)))
    return template.replace("EOS_TOKEN", json.dumps(tokenizer.eos_token))


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


def render(*, text: str | None, images: int, prompt: str = "", tokens: Sequence[str] = ()) -> str:
    """Render one input with any number of images as the chat template does after ``append_eos``, without Jinja.

    :param tokens: The tokenizer's ``special_tokens``.
    """
    return f"{VISION_START}{IMAGE_PAD}{VISION_END}" * images + literal(f"{prompt}{text or ''}", tokens)
