from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.template import CHAT_TEMPLATE, render

VISION = "<|vision_start|><|image_pad|><|vision_end|>"
AWKWARD = ["  spaces \n\ttab\n", "{{ braces }} {% for %} {# comment #}", "\"'\\ <b>&amp;", "日本語 🟥"]

texts = st.text(max_size=30) | st.sampled_from(AWKWARD)
image_part = {"type": "image"}


TEMPLATE = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
"""Compiled with the settings of transformers."""


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
    assert rendered == render(text=text, images=int(has_image), prompt=prompt or "")


def test_the_processor_renders_as_the_template_does(tiny_backbone: Backbone) -> None:
    def rendered(messages: list[Any]) -> object:
        return tiny_backbone.processor.apply_chat_template(messages, tokenize=False)

    for text in AWKWARD:
        item = item_parts(text, has_image=True, image_first=False)
        assert rendered(messages("find: ", item)) == render(text=text, images=1, prompt="find: ")
    batch = [messages(None, "one"), messages("find: ", [image_part]), messages(None, [image_part, image_part])]
    assert rendered(batch) == ["one", f"{VISION}find: ", VISION * 2]
