from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import ProcessorMixin

from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.template import CHAT_TEMPLATE, render

VISION = "<|vision_start|><|image_pad|><|vision_end|>"
AWKWARD = [
    "two\nlines",
    "  spaces around  ",
    "\n\ttab and newline\n",
    "{{ braces }} {% for %} {# comment #}",
    "\"double\" and 'single' quotes \\ backslash",
    "<b>&amp; &</b>",
    "日本語 – ñ – 🟥",
]

texts = st.text(max_size=30) | st.sampled_from(AWKWARD)
image_part = {"type": "image"}


def compiled() -> Template:
    """Compile the template with the settings of transformers."""
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)


TEMPLATE = compiled()


@pytest.fixture
def processor(tiny_backbone: Backbone) -> ProcessorMixin:
    return tiny_backbone.processor


def messages(prompt: str | None, parts: list[dict[str, str]] | str) -> list[dict[str, Any]]:
    """Return the messages that sentence-transformers makes of an input and its prompt."""
    system = [] if prompt is None else [{"role": "system", "content": prompt}]
    return [*system, {"role": "user", "content": parts}]


def item_parts(text: str | None, has_image: bool, image_first: bool) -> list[dict[str, str]]:
    text_parts = [] if text is None else [{"type": "text", "text": text}]
    image_parts = [image_part] if has_image else []
    return image_parts + text_parts if image_first else text_parts + image_parts


@given(prompt=st.none() | texts, text=st.none() | texts, has_image=st.booleans(), image_first=st.booleans())
def test_an_item_renders_as_vision_prompt_text_in_any_order_of_its_parts(
    prompt: str | None, text: str | None, has_image: bool, image_first: bool
) -> None:
    rendered = TEMPLATE.render(messages=messages(prompt, item_parts(text, has_image, image_first)))
    assert rendered == (VISION if has_image else "") + (prompt or "") + (text or "")
    if text is not None or has_image:
        assert rendered == render(text=text, images=int(has_image), prompt=prompt or "")


@pytest.mark.parametrize("text", AWKWARD)
def test_the_processor_renders_a_text_verbatim(processor: ProcessorMixin, text: str) -> None:
    for has_image, image_first in ((False, False), (True, False), (True, True)):
        given_messages = messages("find: ", item_parts(text, has_image, image_first))
        rendered = processor.apply_chat_template(given_messages, tokenize=False)
        assert rendered == render(text=text, images=int(has_image), prompt="find: ")
        assert rendered == TEMPLATE.render(messages=given_messages)


def test_the_processor_renders_a_batch_of_conversations(processor: ProcessorMixin) -> None:
    batch = [messages(None, "one"), messages("find: ", [image_part]), messages(None, [image_part, image_part])]
    assert processor.apply_chat_template(batch, tokenize=False) == ["one", f"{VISION}find: ", VISION * 2]
    system = {"role": "system", "content": [{"type": "text", "text": "find: "}]}
    user = {"role": "user", "content": item_parts("a ring", has_image=True, image_first=False)}
    assert TEMPLATE.render(messages=[system, user]) == f"{VISION}find: a ring"


def test_an_item_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a text, an image, or both"):
        render(text=None, images=0)
    assert render(text="", images=0) == "", "an empty text is a text"
