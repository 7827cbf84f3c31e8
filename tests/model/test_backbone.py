import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_backbones import TINY_MAX_LENGTH, qwen2_vl
from transformers import BertConfig, ProcessorMixin, Qwen2VLForConditionalGeneration

from cocoa_embed.data.rows import Item
from cocoa_embed.demo.pretrain.tokenizer import QWEN_SPECIAL_TOKENS, build_processor, build_tokenizer
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.model.attention import assert_bidirectional
from cocoa_embed.model.backbone import (
    MASK_TOKEN,
    Backbone,
    builtin_backbones,
    load_backbone,
    load_processor,
    prepare_processor,
    read_processor,
    resolve_backbone,
)
from cocoa_embed.model.families.registry import family_of, family_of_images
from cocoa_embed.model.template import eos_tokens
from cocoa_embed.train.stages.rendering import render_items

LONG_TEXT = "large red circle at top left and small blue ring at bottom right on white " * 40
PIXELS_PER_TOKEN = 28 * 28


@pytest.fixture
def make_image(tmp_path: Path) -> Callable[[int, int], Path]:
    def make(width: int, height: int) -> Path:
        path = tmp_path / f"{width}x{height}.png"
        Image.new("RGB", (width, height)).save(path)
        return path

    return make


def visual_tokens(backbone: Backbone, ids: torch.Tensor) -> int:
    return int((ids == backbone.model.config.image_token_id).sum())


def test_the_packaged_backbone_loads_by_name_in_float32_and_bidirectional_with_qwens_tokens() -> None:
    assert builtin_backbones() == ["scene-captioner"]
    model, tokenizer = (backbone := load_backbone("scene-captioner")).model, backbone.processor.tokenizer
    assert (type(model), model.dtype) == (Qwen2VLForConditionalGeneration, torch.float32)
    assert_bidirectional(model)
    assert set(QWEN_SPECIAL_TOKENS) <= set(tokenizer.all_special_tokens)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert model.config.get_text_config().eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["scene-captoner", "./nowhere"])
def test_an_unknown_name_and_a_missing_folder_are_refused_without_asking_the_hub(name: str) -> None:
    reason = rf"No backbone '{name}': it is neither a folder nor one of this package's \(scene-captioner\)"
    with pytest.raises(CocoaError, match=reason) as error:
        load_backbone(name)
    assert "\n" not in str(error.value)


def test_a_folder_precedes_a_built_in_name_and_a_hub_name_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_backbone("Qwen/Qwen2-VL-2B-Instruct") == "Qwen/Qwen2-VL-2B-Instruct"
    (tmp_path / "scene-captioner").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_backbone("scene-captioner") == "scene-captioner"


@pytest.mark.parametrize(
    ("removed", "written", "reason"),
    [
        (
            "",
            BertConfig().to_json_string(),
            r"is a 'bert' model; supported types are idefics3, internvl, qwen2_5_vl, qwen2_vl, qwen3_vl, smolvlm\.",
        ),
        ("config.json", None, "Cannot read a model config from {}"),
        ("*.safetensors", None, "Cannot load weights from {}"),
        ("*token* *processor* *.jinja", None, "Cannot load the processor of {}"),
    ],
)
def test_a_folder_of_another_model_or_an_incomplete_one_is_refused(
    tiny_backbone_path: Path, tmp_path: Path, removed: str, written: str | None, reason: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_backbone_path, folder, ignore=shutil.ignore_patterns(*removed.split()))
    if written is not None:
        (folder / "config.json").write_text(written)
    with pytest.raises(CocoaError, match=reason.replace("{}", re.escape(str(folder)))) as error:
        load_backbone(str(folder))
    assert error.type is (UsageError if "supported" in reason else CocoaError)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, r"\(missing: \S*layers\.1\.mlp\.up_proj\.weight\)"),
        ("model.layers.7.extra.weight", torch.zeros(2), r"\(unexpected: \S*layers\.7\.extra\.weight\)"),
        ("model.norm.weight", torch.ones(33), r"\(mismatched: \S*norm\.weight', \S*\(\[33\]\), \S*\(\[32\]\)"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_an_error_that_lists_them(
    tiny_backbone_path: Path, tmp_path: Path, name: str, value: torch.Tensor | None, fault: str
) -> None:
    folder = Path(shutil.copytree(tiny_backbone_path, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights.pop(name, None)
    added = {} if value is None else {name: value}
    save_file({**weights, **added}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CocoaError, match=fault):
        load_backbone(str(folder))


@pytest.mark.parametrize("spare_rows", [0, 10])
def test_a_mask_token_is_added_and_the_matrix_grows_only_if_it_is_full(tmp_path: Path, spare_rows: int) -> None:
    tokens = len(build_tokenizer(0))
    config = qwen2_vl(build_tokenizer(0))[0].config
    config.text_config.vocab_size = tokens + spare_rows
    model = Qwen2VLForConditionalGeneration(config)
    Backbone(model, build_processor(build_tokenizer(0))).save(tmp_path)
    backbone = load_backbone(str(tmp_path), max_length=TINY_MAX_LENGTH)
    matrix = backbone.model.get_input_embeddings().weight
    assert backbone.processor.tokenizer.convert_tokens_to_ids(MASK_TOKEN) == tokens
    assert torch.equal(matrix[:tokens], model.get_input_embeddings().weight[:tokens])
    assert len(matrix) == backbone.model.config.get_text_config().vocab_size == tokens + (spare_rows or 1)
    backbone.save(tmp_path / "again")
    again = load_backbone(str(tmp_path / "again"), max_length=TINY_MAX_LENGTH)
    assert torch.equal(again.model.get_input_embeddings().weight, matrix)
    assert again.processor.tokenizer.mask_token_id == tokens


def test_max_pixels_and_max_length_are_applied_and_saved(
    tiny_backbone_path: Path, tmp_path: Path, make_image: Callable[[int, int], Path]
) -> None:
    backbone = load_backbone(str(tiny_backbone_path), max_length=80, max_pixels=4 * PIXELS_PER_TOKEN)
    backbone.save(tmp_path)
    for loaded in (backbone, load_backbone(str(tmp_path))):
        batch = render_items(loaded.processor, [Item(text=LONG_TEXT, images=(make_image(112, 112),))])
        assert batch["input_ids"].shape == (1, 80)
        assert visual_tokens(loaded, batch["input_ids"]) == 4


def test_a_small_image_is_not_enlarged_beyond_the_limit(tiny_backbone_path: Path) -> None:
    processor = read_processor(str(tiny_backbone_path))
    processor.image_processor.size["shortest_edge"] = 16 * PIXELS_PER_TOKEN  # as Qwen3-VL's: 256 x 256 pixels
    prepare_processor(processor, max_pixels=4 * PIXELS_PER_TOKEN)
    family = family_of_images(processor)
    assert [family.visual_tokens(processor, side, side) for side in (28, 56, 112)] == [4, 4, 4]


def test_a_limit_below_a_visual_token_is_refused() -> None:
    with pytest.raises(UsageError, match=r"max_pixels is 783, but a visual token has 28 x 28; raise it\."):
        load_processor("scene-captioner", max_pixels=PIXELS_PER_TOKEN - 1)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (
            128,
            "100352 pixels takes 160 visual tokens, more than the 120 that a sequence of 128 has room for",
        ),
        (96, "takes 138 visual tokens, more than the 120"),  # a panorama
    ],
)
def test_an_image_limit_too_large_for_the_sequence_is_refused_with_both_numbers(tokens: int, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        load_processor("scene-captioner", max_length=128, max_pixels=tokens * PIXELS_PER_TOKEN)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *((text, size) for text in ("", LONG_TEXT) for size in (None, (112, 112))),
        *((None, size) for size in ((112, 84), (28 * 150, 28), (12, 2000))),
    ],
)
def test_every_sequence_ends_in_eos_and_keeps_its_visual_tokens(
    tiny_backbone: Backbone, make_image: Callable[[int, int], Path], text: str | None, size: tuple[int, int] | None
) -> None:
    """The image processor rounds the short side up to one token, so that a long image exceeds its pixel limit."""
    processor = tiny_backbone.processor
    item = Item(text=text, images=() if size is None else (make_image(*size),))
    batch = render_items(processor, [item, Item(text="small blue ring " * 10)])
    length = int(batch["attention_mask"][0].sum())
    ids = batch["input_ids"][0, :length]
    assert (ids == processor.tokenizer.eos_token_id).nonzero().tolist() == [[length - 1]]
    if size is not None:
        geometry = family_of(tiny_backbone.model.config).geometry
        patches = visual_tokens(tiny_backbone, ids) * geometry.patches_per_token
        assert int(batch["image_grid_thw"].prod()) == patches
        assert batch["pixel_values"].shape == (patches, geometry.patch_width) == (patches, 1176)
    assert (length == TINY_MAX_LENGTH) == (text == LONG_TEXT), "the long text, and no other, is truncated"
    assert batch["attention_mask"][0, :length].all(), "padding is on the right"


def test_a_processor_is_prepared_the_same_from_any_earlier_settings() -> None:
    def rendered(processor: ProcessorMixin) -> list[int]:
        prepare_processor(processor, max_length=TINY_MAX_LENGTH)
        return list(processor.tokenizer("a red ring")["input_ids"])

    plain, other = (build_processor(build_tokenizer(0)) for _ in range(2))
    other.tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    other.tokenizer.padding_side = "left"
    other.chat_template = other.tokenizer.chat_template = "{{ 'something else' }}"
    assert rendered(plain) == rendered(other) == rendered(other), "preparing it again changes nothing"
    assert (other.tokenizer.mask_token, other.tokenizer.padding_side) == ("[MASK]", "right")
    expected = plain.chat_template.replace(MASK_TOKEN, "[MASK]")
    assert (other.chat_template, other.tokenizer.chat_template) == (expected, None)


def test_new_eos_begin_around_the_first_and_those_of_a_checkpoint_stay(tmp_path: Path) -> None:
    config = qwen2_vl(build_tokenizer(0))[0].config
    config.text_config.vocab_size = len(build_tokenizer(0)) + 2  # for the mask token and one of the two
    Backbone(Qwen2VLForConditionalGeneration(config), build_processor(build_tokenizer(0))).save(tmp_path)

    def rows(backbone: Backbone) -> torch.Tensor:
        tokenizer = backbone.processor.tokenizer
        matrix = backbone.model.get_input_embeddings().weight.detach()
        return matrix[tokenizer.convert_tokens_to_ids(eos_tokens(tokenizer))]

    backbone = load_backbone(str(tmp_path), vectors=3)
    first, *others = rows(backbone)
    for other in others:
        assert 0.5 < (other - first).std() / first.std() < 2
    assert not torch.equal(others[0], others[1])
    backbone.model.get_input_embeddings().weight.data[:] += 1  # training
    backbone.save(tmp_path / "trained")
    assert torch.equal(rows(load_backbone(str(tmp_path / "trained"))), rows(backbone))
    more = rows(load_backbone(str(tmp_path / "trained"), vectors=4))
    assert torch.equal(more[:3], rows(backbone))
    assert torch.equal(more[3], rows(load_backbone(str(tmp_path / "trained"), vectors=4))[3]), "the same at each call"


def test_several_eos_take_their_room_from_images() -> None:
    message = r"160 visual tokens, more than the 0 .* of 16 has room for in addition to 16 <EOS>"
    with pytest.raises(UsageError, match=message):
        load_processor("scene-captioner", max_length=16, max_pixels=128 * PIXELS_PER_TOKEN, vectors=16)
