"""Scenes captioned by the captioner that ships with the package, interrupted and wrong runs."""

import json
import math
import random
import re
import resource
import signal
import subprocess
import sys
from datetime import date
from itertools import islice
from pathlib import Path

import pytest
import torch
from command_line import Command
from PIL import Image
from table_files import write_table
from tiny_backbones import TINY_MAX_LENGTH, every_family

from cocoa_embed.captioning.backbone import BackboneWriter
from cocoa_embed.captioning.prompts import Answer, Prompts, Request
from cocoa_embed.captioning.run import JOURNAL, CaptionRun
from cocoa_embed.data.image_folder import DescribedImage, read_metadata
from cocoa_embed.demo.scenes import Scene, captions, distinct_scenes, draw
from cocoa_embed.errors import CocoaError
from cocoa_embed.folders import LOCK_FILE
from cocoa_embed.model.backbone import load_backbone
from cocoa_embed.train.data.caption_rows import read_image_folder
from cocoa_embed.train.stages.bridge.collator import split_blocks

COUNT = 20


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Scene]]:
    """A folder of held-out scenes without texts."""
    folder, generator = tmp_path_factory.mktemp("captioning") / "scenes", random.Random(5)
    folder.mkdir()
    drawn = list(islice(distinct_scenes(generator, "held-out"), COUNT))
    for number, scene in enumerate(drawn):
        draw(scene, generator).save(folder / f"{number:02d}.png")
    return folder, drawn


class Namer:
    """Names the width of an image."""

    name, follows_prompts, images_at_once, threads = "namer", True, 2, 1

    def __init__(self) -> None:
        self.images = 0

    def tokens(self, width: int, height: int, prompt: str) -> int:
        if width > 100 * height:
            raise ValueError("too wide")
        return 1

    def write(self, images: list[Image.Image], requests: list[list[Request]]) -> list[list[Answer]]:
        self.images += len(images)
        return [[Answer(f"{request.name}, {image.width} wide") for request in asked]
                for image, asked in zip(images, requests, strict=True)]  # fmt: skip


def caption_run(folder: Path, writer: Namer, wordings: int = 2, replace_below: int = 4) -> CaptionRun:
    return CaptionRun(folder, folder.parent / "out", writer, Prompts.load(), wordings, 0, replace_below)


@pytest.fixture
def blank(tmp_path: Path) -> Path:
    """Seven blank images of different widths."""
    (tmp_path / "blank" / "deeper").mkdir(parents=True)
    for width in range(1, 8):
        Image.new("RGB", (width, 5)).save(tmp_path / "blank" / ("deeper" if width == 7 else "") / f"{width}.png")
    return tmp_path / "blank"


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def test_the_captioner_of_scenes_describes_them_in_several_wordings_that_stage_2_reconstructs(
    command: Command, scenes: tuple[Path, list[Scene]], tmp_path: Path
) -> None:
    folder, drawn = scenes
    result = command("caption", folder, "--out", tmp_path / "out", "--with", "scene-captioner", "--wordings", 4,
                     "--yes", "--json")  # fmt: skip
    document = result.document()
    assert (document["captioned"], document["failed"], document["unusable"]) == (COUNT, [], [])
    assert 2 * COUNT <= document["captions"] < 4 * COUNT  # more than one wording, and equal ones once
    rows = read_image_folder(tmp_path / "out", captions="captions")
    assert len(rows) == document["captions"]
    right = total = 0
    for row in rows:
        block_a, block_b = split_blocks(row)
        assert block_a.images == row.query.images
        true = max(captions(drawn[int(row.query.image.stem)]), key=lambda text: len({*words(text)} & {*words(block_b)}))
        right += sum(map(str.__eq__, words(true), words(block_b)))
        total += max(len(words(true)), len(words(block_b)))
    assert right / total >= 0.95, f"{right} of {total} words are right"


def test_answers_in_a_batch_are_those_of_each_image_alone(tiny_backbone_path: Path) -> None:
    """Prompts of different lengths and images of different sizes are padded on the left."""
    writer = BackboneWriter(
        str(tiny_backbone_path), Prompts.load().model_copy(update={"max_tokens": 6}), 10**6, 8, "cpu"
    )
    writer._processor.chat_template = (
        "<|vision_start|><|image_pad|><|vision_end|>{{ messages[0].content[1].text }}{{ add_generation_prompt }}"
    )
    writer.follows_prompts = True
    generator = random.Random(0)
    images = [draw(scene, generator).resize((56 + 28 * i, 56)) for i, scene in
              enumerate(islice(distinct_scenes(generator, "train"), 3))]  # fmt: skip
    asked = [[Request("a", "red " * (1 + 5 * i)), Request("b", "blue")] for i in range(3)]
    together = writer.write(images, asked)
    assert together == [writer.write([image], [each])[0] for image, each in zip(images, asked, strict=True)]
    assert len({row[0].text for row in together}) > 1
    assert together[0][0] != together[0][1], "the prompt changes nothing"


@every_family
def test_the_estimate_of_a_backbone_counts_the_tokens_that_it_gets(
    scenes: tuple[Path, list[Scene]], tiny_backbone_path: Path
) -> None:
    image = Image.open(scenes[0] / "00.png").convert("RGB").resize((140, 84))
    writer = BackboneWriter(str(tiny_backbone_path), Prompts.load(), 10**6, 8, "cpu")
    inputs = writer._processor(images=[image], text=[writer._render("")], return_tensors="pt")
    assert writer.tokens(*image.size, "") == inputs["input_ids"].shape[1]
    small = BackboneWriter(str(tiny_backbone_path), Prompts.load(), 4 * 784, 8, "cpu")
    assert small.tokens(*image.size, "") < writer.tokens(*image.size, "")


def test_a_stopped_run_keeps_what_it_has_and_the_next_asks_for_the_rest_alone(blank: Path) -> None:
    first = Namer()
    batches = caption_run(blank, first).caption()
    assert [next(batches), next(batches)] == [2, 2]
    batches.close()
    out = blank.parent / "out"
    assert len(read_image_folder(out)) == 4
    with (out / JOURNAL).open("ab") as journal:
        journal.write(b'{"file_name": "../blank/5.png", "state"')  # a kill in the middle of a line
    second = Namer()
    run = caption_run(blank, second)
    plan = run.plan()
    assert (plan["done"], plan["to_caption"], plan["requests"]) == (4, 3, 6)
    assert sum(run.caption()) == second.images == 3
    rows = read_image_folder(out, captions="captions")
    assert sorted({row.positive.text for row in rows}) == sorted(
        f"{name}, {width} wide" for name in ("detailed", "brief") for width in range(1, 8)
    )
    assert all(json.loads(line) for line in (out / JOURNAL).read_text().splitlines())
    assert list(caption_run(blank, third := Namer()).caption()) == []
    assert third.images == 0


KILLED = """
import os, signal, sys
from pathlib import Path
from cocoa_embed.captioning.prompts import Answer, Prompts
from cocoa_embed.captioning.run import CaptionRun

class Writer:
    name, follows_prompts, images_at_once, threads = "namer", True, 1, 1
    calls = 0
    def tokens(self, *arguments):
        return 1
    def write(self, images, requests):
        self.calls += 1
        if self.calls == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return [[Answer(f"{image.width} wide") for image in images]]

folder = Path(sys.argv[1])
list(CaptionRun(folder, folder.parent / "out", Writer(), Prompts.load(), 1, 0, 4).caption())
"""


def test_a_killed_process_loses_at_most_the_images_at_work(blank: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(blank)], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    names = {path.name for path in blank.parent.glob("out/*")}
    assert names == {JOURNAL, LOCK_FILE}, "it was not killed in the middle"
    plan = caption_run(blank, Namer(), wordings=1).plan()
    assert plan["done"] + plan["to_caption"] == 7
    assert plan["done"] in (3, 4)  # of the four with an answer, the last may not be written yet
    assert sum(caption_run(blank, Namer(), wordings=1).caption()) == plan["to_caption"]
    assert len(read_image_folder(blank.parent / "out")) == 7


def test_a_run_asks_for_nothing_that_another_has_written_since_it_was_planned(blank: Path) -> None:
    planned = caption_run(blank, writer := Namer())
    assert planned.plan()["to_caption"] == 7
    assert sum(caption_run(blank, Namer()).caption()) == 7
    assert sum(planned.caption()) == 0
    assert (writer.images, planned.summary["captioned"]) == (0, 7)


def test_changed_images_and_other_settings_are_captioned_again(blank: Path) -> None:
    list(caption_run(blank, Namer()).caption())
    Image.new("RGB", (90, 5)).save(blank / "1.png")
    assert caption_run(blank, Namer()).plan()["to_caption"] == 1
    assert caption_run(blank, Namer(), wordings=3).plan()["to_caption"] == 7


def test_broken_and_refused_images_are_reported_beside_the_others_of_their_batch(blank: Path) -> None:
    (blank / "1.png").write_bytes(b"no image")
    Image.new("RGB", (2000, 1)).save(blank / "2.png")
    (blank / "0.png").symlink_to("nowhere.png")
    run = caption_run(blank, Namer())
    assert sum(run.caption()) == 7
    assert run.summary["captioned"] == 5
    assert {Path(each["path"]).stem: each["reason"].split(" (")[0] for each in run.summary["failed"]} == {
        "1": "is not an image that can be read",
        "2": "too wide",
        "0": "cannot be read",
    }


def test_several_rows_of_an_image_are_kept_if_one_of_them_says_enough(blank: Path) -> None:
    rows = [{"filename": "1.png", "caption": text} for text in ("blank", "a blank image, one wide", " ")]
    write_table(blank / "metadata.jsonl", [*rows, {"filename": "2.png"}])
    run = caption_run(blank, Namer())
    list(run.caption())
    assert (run.summary["kept"], run.summary["captioned"], run.summary["failed"]) == (1, 6, [])
    texts = [row.positive.text for row in read_image_folder(blank.parent / "out") if row.query.image.stem == "1"]
    assert texts == ["blank", "a blank image, one wide"]


def test_texts_beside_images_are_kept_or_replaced_like_those_of_metadata(blank: Path) -> None:
    (blank / "3.txt").write_text("a blank image, three wide")
    (blank / "4.txt").write_text("blank")
    run = caption_run(blank, Namer())
    list(run.caption())
    assert (run.summary["kept"], run.summary["captioned"]) == (1, 6)
    texts = {row.query.image.stem: row.positive.text for row in read_image_folder(blank.parent / "out")}
    assert (texts["3"], texts["4"]) == ("a blank image, three wide", "detailed, 4 wide")


def test_a_text_that_cannot_be_read_is_reported_and_not_replaced(blank: Path) -> None:
    (blank / "3.txt").write_bytes("ein schöner Hund im Park".encode("latin-1"))
    (blank / "4.txt").write_text("1 2 3")  # no caption, but the boxes of a detector
    run = caption_run(blank, Namer())
    assert run.plan()["to_caption"] == sum(run.caption()) == 6
    assert run.summary["failed"] == [{"path": str(blank / "3.txt"), "reason": "is not UTF-8; save it as UTF-8"}]
    assert "3" not in {row.query.image.stem for row in read_image_folder(blank.parent / "out")}


def test_values_that_json_does_not_have_are_written_so_that_they_are_read_again(blank: Path) -> None:
    write_table(blank / "metadata.parquet", [
        {"file_name": "1.png", "text": "a blank image, one wide", "price": math.nan, "day": date(2026, 1, 31)},
        {"file_name": "2.png", "text": "blank", "price": math.inf, "day": None},
    ])  # fmt: skip
    list(caption_run(blank, Namer()).caption())
    written = read_metadata(blank.parent / "out" / "metadata.jsonl")
    rows = {row.path.stem: row.columns for row in written if isinstance(row, DescribedImage)}
    assert (rows["1"]["price"], rows["1"]["day"], rows["2"]["price"]) == (None, "2026-01-31", None)
    assert len(rows) == 7


def test_a_full_disk_is_reported_in_one_sentence_and_the_next_run_continues(blank: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        with pytest.raises(CocoaError, match=r"out cannot be written \(File too large\); give another --out, or fix"):
            list(caption_run(blank, Namer(), wordings=1).caption())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    plan = caption_run(blank, Namer(), wordings=1).plan()
    assert 0 < plan["done"] < 7
    assert sum(caption_run(blank, Namer(), wordings=1).caption()) == plan["to_caption"] == 7 - plan["done"]
    assert len(read_image_folder(blank.parent / "out")) == 7


def test_wrong_usage_is_reported_in_one_sentence_with_the_way_out(
    command: Command, blank: Path, tiny_backbone_path: Path, tmp_path: Path
) -> None:
    bidirectional = tmp_path / "bidirectional"
    load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH).save(bidirectional)
    (tmp_path / "empty").mkdir()
    ours = ["--with", "scene-captioner"]
    for message, folder, out, options in (
        ("2 Give either --with BACKBONE or --endpoint", blank, "out", []),
        ("2 Give either --with BACKBONE or --endpoint", blank, "out", [*ours, "--endpoint", "http://a"]),
        ("2 --endpoint and --model belong together", blank, "out", ["--endpoint", "http://a"]),
        (f"2 {bidirectional} is bidirectional", blank, "out", ["--with", bidirectional]),
        ("1 No backbone 'nowhere'", blank, "out", ["--with", "nowhere"]),
        ("2 scene-captioner follows no prompts", blank, "out", [*ours, "--questions", 2]),
        (f"1 {tmp_path / 'empty'} holds no images", tmp_path / "empty", "out", ours),
        (f"1 {tmp_path / 'gone'} is not a folder", tmp_path / "gone", "out", ours),
        (f"1 {blank} holds something else", blank, blank, ours),
    ):
        error = command("caption", folder, "--out", tmp_path / out, *options, "--yes").error()
        assert error.startswith(message), error
        assert re.search(r"\b([Gg]ive|leave out|writes|belong)\b", error), error
    assert not (tmp_path / "out").exists()


def test_drawn_wordings_are_the_same_in_every_run_and_leave_the_random_state_alone(
    scenes: tuple[Path, list[Scene]],
) -> None:
    prompts = Prompts.load()
    images = [Image.open(scenes[0] / f"{number:02d}.png").convert("RGB") for number in range(3)]
    requests = [prompts.requests(3, 0, None, are_followed=False)] * 3
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, again = (BackboneWriter("scene-captioner", prompts, 10**6, 8, "cpu").write(images, requests) for _ in "ab")
    assert torch.equal(torch.rand(1), expected)
    assert first == again
    assert len({answer.text for row in first for answer in row}) > 3
