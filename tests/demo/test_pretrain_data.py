import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Qwen2Tokenizer

from cocoa_embed.demo.pretrain import data
from cocoa_embed.demo.pretrain.data import (
    CaptionCollator,
    CaptionedScenes,
    held_out_pairs,
    read_images,
    refuse_overlap,
    vary,
)
from cocoa_embed.demo.pretrain.settings import AugmentationSettings
from cocoa_embed.demo.pretrain.tokenizer import build_processor, build_tokenizer
from cocoa_embed.demo.scenes import captions, sample_scene, split_of
from cocoa_embed.errors import CocoaError
from cocoa_embed.model.template import special_tokens
from cocoa_embed.train.data.rows import Draw

PLAIN = AugmentationSettings(scale=1, jitter=0)
VARIED = AugmentationSettings()


def first_rows(seed: int, count: int) -> list[dict[str, Any]]:
    return list(islice(CaptionedScenes(seed), count))


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return build_tokenizer(0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images of different shapes; the first has three captions, the last one."""
    lines = []
    for number, (size, texts) in enumerate([((90, 60), "abc"), ((40, 200), "de"), ((30, 30), "f")]):
        pixels = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.byte().numpy()).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": texts[0], "captions": [*texts]}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_the_stream_holds_training_scenes_alone_the_same_in_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(data, "sample_scene", lambda *split: drawn.append(sample_scene(*split)) or drawn[-1])
    stream = CaptionedScenes(3)
    first, again, other = (
        [(row["text"], row["image"].tobytes()) for row in islice(each, 50)]
        for each in (stream, stream, CaptionedScenes(4))
    )
    assert first == again != other
    assert {split_of(scene) for scene in drawn} == {"train"}
    assert {captions(scene).index(text) for scene, (text, _) in zip(drawn, first, strict=False)} == {0, 1, 2, 3}


def test_the_labels_are_the_caption_and_eos_alone(tokenizer: Qwen2Tokenizer) -> None:
    rows = first_rows(0, 6)
    batch = CaptionCollator(build_processor(tokenizer))(rows)
    assert (batch["attention_mask"] == 0).any(), "the batch is padded"
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        expected = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
        where = (labels != -100).nonzero().flatten()
        assert labels[where].tolist() == expected
        assert torch.equal(ids[where], labels[where])


def test_a_caption_that_mentions_a_special_token_is_learned_as_its_characters(tokenizer: Qwen2Tokenizer) -> None:
    row = {**first_rows(0, 1)[0], "text": "an <|image_pad|> and an <|im_end|>"}
    labels = CaptionCollator(build_processor(tokenizer))([row])["labels"][0]
    *caption, end = labels[labels != -100].tolist()
    assert {*special_tokens(tokenizer)}.isdisjoint(tokenizer.convert_ids_to_tokens(caption))
    assert tokenizer.decode(caption) == "an < |image_pad|> and an < |im_end|>"
    assert end == tokenizer.eos_token_id


def test_every_epoch_takes_another_caption_until_all_have_been(photos: Path) -> None:
    images = read_images(photos, 28, VARIED, seed=0)
    texts = [{images[Draw(row, epoch)]["text"] for epoch in range(2, 5)} for row in range(3)]
    assert texts == [{"a", "b", "c"}, {"d", "e"}, {"f"}]


def test_an_image_is_a_square_that_depends_on_seed_image_and_epoch_alone(photos: Path) -> None:
    images, other = (read_images(photos, 28, VARIED, seed) for seed in (0, 1))
    state = torch.get_rng_state()
    for row in range(3):
        first = images[Draw(row, 0)]["image"]
        torch.manual_seed(row)
        assert (first.shape, first.dtype) == ((3, 28, 28), torch.uint8)
        assert torch.equal(first, images[Draw(row, 0)]["image"])
        assert not torch.equal(first, images[Draw(row, 1)]["image"])
        assert not torch.equal(first, other[Draw(row, 0)]["image"])
    torch.set_rng_state(state)


def test_the_images_in_memory_are_no_larger_than_crops_need(photos: Path) -> None:
    shapes = [tuple(image.shape) for image in read_images(photos, 28, VARIED, seed=0).images]
    assert shapes == [(3, 42, 63), (3, 200, 40), (3, 30, 30)]


def test_augmentation_off_is_the_whole_image_and_flip_mirrors_half() -> None:
    image = torch.arange(3 * 28 * 28).reshape(3, 28, 28).remainder(251).byte()
    assert torch.equal(vary(image, 28, PLAIN, FixedRatio(0)), image)
    mirrored = [
        torch.equal(vary(image, 28, PLAIN.model_copy(update={"flip": True}), FixedRatio(seed)), image.flip(2))
        for seed in range(40)
    ]
    assert 10 < sum(mirrored) < 30


class FixedRatio(random.Random):
    """Draws the middle of every range of real numbers."""

    def uniform(self, low: float, high: float) -> float:
        return (low + high) / 2


def test_a_wrong_image_is_the_next_one_beside_the_same_captions(photos: Path) -> None:
    pairs = held_out_pairs(read_images(photos, 28, VARIED, seed=0))
    right, wrong = pairs["right"], pairs["wrong"]
    assert [row["text"] for row in right] == [row["text"] for row in wrong] == ["a", "d", "f"]
    for place in range(3):
        assert torch.equal(wrong[place]["image"], right[(place + 1) % 3]["image"])


def test_a_held_out_image_that_is_trained_on_is_refused_under_any_name(photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Image.open(photos / "1.png").save(other / "renamed.png")
    (other / "renamed.txt").write_text("something else")
    training, held_out = (read_images(folder, 28, VARIED, seed=0) for folder in (photos, other))
    with pytest.raises(CocoaError, match=r"1 of the 1 images to hold out, in other, are also in"):
        refuse_overlap(training, held_out, ("photos", "other"))
