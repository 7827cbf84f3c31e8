import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tiny_backbones import TINY_MAX_LENGTH

from cocoa_embed.demo.pretrain.tokenizer import build_tokenizer
from cocoa_embed.errors import UsageError
from cocoa_embed.model.backbone import MASK_TOKEN, Backbone, load_processor, read_processor
from cocoa_embed.model.template import chat_template, eos_tokens, literal, render, special_tokens

VISION = "<|vision_start|><|image_pad|><|vision_end|>"
AWKWARD = ["  spaces \n\ttab\n", "{{ braces }} {% for %} {# comment #}", "\"'\\ <b>&amp;", "日本語 🟥"]

LONG_TEXT = "blue cross on white " * 200

MENTIONS = ["<|image_pad|>", "the <|endoftext|> token", "<|vision_start|><|im_start|>", "<|", "<|<|im_end|>im_end|>"]

texts = st.text(max_size=30) | st.sampled_from([*AWKWARD, *MENTIONS, "<|image_pad", "|>"])
image_part = {"type": "image"}


TOKENIZER = build_tokenizer(seed=0)
SPECIAL, EOS = special_tokens(TOKENIZER), TOKENIZER.eos_token

TEMPLATE = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(chat_template(TOKENIZER))
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
    parts = messages(prompt, item_parts(text, has_image, image_first))
    rendered = TEMPLATE.render(messages=parts, sep_token=EOS)
    content = (prompt or "") + (text or "")
    assert rendered == (VISION if has_image else "") + literal(content, SPECIAL)
    assert TEMPLATE.render(messages=parts) == rendered + EOS, "unless the tokenizer appends it"
    assert rendered == render(text=text, images=int(has_image), prompt=prompt or "", tokens=SPECIAL)
    if not any(token in content for token in SPECIAL):
        assert rendered.endswith(content)


def test_the_processor_renders_as_the_template_does(tiny_backbone: Backbone) -> None:
    def rendered(messages: list[Any]) -> object:
        return tiny_backbone.processor.apply_chat_template(messages, tokenize=False)

    for text in AWKWARD:
        item = item_parts(text, has_image=True, image_first=False)
        assert rendered(messages("find: ", item)) == render(text=text, images=1, prompt="find: ")
    batch = [messages(None, "one"), messages("find: ", [image_part]), messages(None, [image_part, image_part])]
    assert rendered(batch) == ["one", f"{VISION}find: ", VISION * 2]


@pytest.mark.parametrize("text", MENTIONS)
def test_a_special_token_in_a_text_is_read_as_its_characters(tiny_backbone: Backbone, text: str) -> None:
    tokenizer = tiny_backbone.processor.tokenizer
    special, eos = set(tokenizer.added_tokens_decoder), tokenizer.eos_token_id
    rendered = render(text=text, images=0, tokens=special_tokens(tokenizer))
    *ids, end = tokenizer(rendered)["input_ids"]
    assert special.isdisjoint(ids)
    assert end == eos
    assert tokenizer.decode(ids).replace("< |", "<|") == text
    if text != "<|":
        assert not special.isdisjoint(tokenizer(text, add_special_tokens=False)["input_ids"])


@given(text=st.text(max_size=40) | st.sampled_from([*AWKWARD, "a <| b |> c"]))
def test_the_tokens_of_other_texts_stay_as_they_are(text: str) -> None:
    if not any(token in text for token in SPECIAL):
        assert TOKENIZER(literal(text, SPECIAL))["input_ids"] == TOKENIZER(text)["input_ids"]


def test_a_mask_token_is_special_too(tiny_backbone: Backbone) -> None:
    assert MASK_TOKEN in special_tokens(tiny_backbone.processor.tokenizer)
    assert MASK_TOKEN in tiny_backbone.processor.chat_template


def test_several_eos_end_every_sequence_in_their_order_and_truncation_cuts_none(tiny_backbone_path: Path) -> None:
    processor = load_processor(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH, vectors=4)
    tokenizer = processor.tokenizer
    expected = ["<|eos_4|>", "<|eos_3|>", "<|eos_2|>", EOS]
    assert eos_tokens(tokenizer) == expected[::-1]
    for text in ("", "a red ring", LONG_TEXT, "".join(expected)):
        rendered = render(text=text, images=0, tokens=special_tokens(tokenizer))
        ids = tokenizer(rendered, truncation=True)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids[-4:]) == expected
        assert {*ids[-4:]}.isdisjoint(ids[:-4]), "a text that mentions one is read as its characters"
        assert (len(ids) == TINY_MAX_LENGTH) == (text == LONG_TEXT)
    message = messages(None, "a red ring")
    assert processor.apply_chat_template(message, tokenize=False) == "a red ring"
    tokenizer.sep_token = None
    assert processor.apply_chat_template(message, tokenize=False) == "a red ring" + "".join(expected)


def test_several_eos_survive_saving_and_their_number_can_only_grow(tiny_backbone_path: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_backbone_path / "config.json", tmp_path)
    load_processor(str(tiny_backbone_path), vectors=2).save_pretrained(tmp_path)
    kept, stock, more = (
        load_processor(str(tmp_path)),
        read_processor(str(tmp_path)),
        load_processor(str(tmp_path), vectors=4),
    )
    ids = kept.tokenizer("a")["input_ids"]
    assert kept.tokenizer.convert_ids_to_tokens(ids[1:]) == ["<|eos_2|>", EOS]
    assert stock.tokenizer("a")["input_ids"] == ids, "without code of ours, too"
    assert len(more.tokenizer("a")["input_ids"]) == len(ids) + 2
    with pytest.raises(UsageError, match="eos_tokens is 1, but the backbone has 2; give 2, or more to add some"):
        load_processor(str(tmp_path), vectors=1)
