"""The chat template ``[vision tokens][prompt][text]``, for training and inference alike.

Images come first in any message, then the prompt (a system message, as sentence-transformers passes it), then the text.
The tokenizer appends ``<EOS>``, whose last hidden state is the embedding, after truncation (``prepare_processor``), so
that it is never truncated.
"""

VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"

RESERVED_TOKENS = (VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
"""Tokens of images and videos in a rendered sequence; a text must not contain them."""

CHAT_TEMPLATE = f"""\
{{%- for message in messages if message.content is not string -%}}
{{%- for part in message.content -%}}
{{%- if part.type == 'image' -%}}{VISION_START}{IMAGE_PAD}{VISION_END}
{{%- elif part.type == 'video' -%}}{VISION_START}{VIDEO_PAD}{VISION_END}
{{%- endif -%}}
{{%- endfor -%}}
{{%- endfor -%}}
{{%- for message in messages -%}}
{{%- if message.content is string -%}}{{{{- message.content -}}}}
{{%- else -%}}
{{%- for part in message.content if part.type == 'text' -%}}{{{{- part.text -}}}}{{%- endfor -%}}
{{%- endif -%}}
{{%- endfor -%}}
"""
"""Renders messages as ``[vision][prompt][text]``, in Jinja."""


def render(*, text: str | None, images: int, prompt: str = "") -> str:
    """Render one input with any number of images as ``CHAT_TEMPLATE`` does, without the Jinja engine."""
    return f"{f'{VISION_START}{IMAGE_PAD}{VISION_END}' * images}{prompt}{text or ''}"
