"""The one chat template: ``[vision tokens][prompt][text]``, the same in training and at inference.

Whatever the order of a message's parts, images come first, then the prompt (a system message, as sentence-transformers
passes it), then the text. The ``<EOS>`` that ends every sequence, and whose last hidden state is the embedding, is
appended by the tokenizer after truncation (``prepare_processor``), so none can be cut off.
"""

VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"

RESERVED_TOKENS = (VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
"""What stands for an image or a video in a rendered sequence; a text that holds one would be taken for a picture."""

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
"""Messages to ``[vision][prompt][text]``, in Jinja."""


def render(*, text: str | None, has_image: bool, prompt: str = "") -> str:
    """Return what ``CHAT_TEMPLATE`` renders for one item, without the Jinja engine.

    :raises ValueError: If the item has neither text nor image.
    """
    if text is None and not has_image:
        raise ValueError("an item needs a text, an image, or both")
    vision = f"{VISION_START}{IMAGE_PAD}{VISION_END}" if has_image else ""
    return f"{vision}{prompt}{text or ''}"
