import json
import shutil
from pathlib import Path

import pytest
import yaml
from browser import HtmlElements
from command_line import Command
from scored_model import write_captioned
from test_story import RECIPE

from cocoa_embed.data.image_folder import find_metadata, read_metadata
from cocoa_embed.demo import MARKER
from cocoa_embed.demo.photographs import FEWEST, findings, split_photographs
from cocoa_embed.demo.story import Demo
from cocoa_embed.train.data.caption_rows import read_image_folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Sixty pictures with two captions each."""
    folder = write_captioned(tmp_path / "photos", [[f"picture {number}"] for number in range(60)])
    rows = [
        {"file_name": f"{n}.png", "text": f"picture {n}", "captions": [f"picture {n}", f"number {n}"]}
        for n in range(60)
    ]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def contents(folder: Path) -> dict[bytes, list[str]]:
    """Return the texts of each image of a folder by its bytes."""
    images = [image for image in read_metadata(find_metadata(folder)) if not isinstance(image, Exception)]
    return {image.path.read_bytes(): image.texts("captions") for image in images}


def test_the_split_depends_on_the_files_contents_alone(photos: Path, tmp_path: Path) -> None:
    counts, faults = split_photographs(photos, "captions", tmp_path / "once")
    train, held_out = (contents(tmp_path / "once" / name) for name in ("train", "held-out"))
    assert (faults, len(train), len(held_out)) == ([], counts["train"], counts["held-out"])
    assert not train.keys() & held_out.keys()
    assert train | held_out == contents(photos)
    assert 5 <= len(held_out) <= 20, "about a fifth of sixty"
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
    for place, row in enumerate(reversed(rows)):
        shutil.copy(photos / row["file_name"], renamed / f"other-{place}.png")
        row["file_name"] = f"other-{place}.png"
    (renamed / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in reversed(rows)))
    split_photographs(renamed, "text", tmp_path / "again")
    assert contents(tmp_path / "again" / "held-out").keys() == held_out.keys()
    assert {len(texts) for texts in contents(tmp_path / "again" / "train").values()} == {1}


def test_photographs_that_are_relative_links_are_split_as_files(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    shutil.copy(photos / "metadata.jsonl", tmp_path / "links")
    for path in photos.glob("*.png"):
        (tmp_path / "links" / path.name).symlink_to(Path("..") / "photos" / path.name)
    counts, _ = split_photographs(tmp_path / "links", "captions", tmp_path / "deep" / "split")
    files = [*(tmp_path / "deep").rglob("*.png")]
    assert len(files) == sum(counts.values()) == 60
    assert not any(path.is_symlink() for path in files)


def test_broken_photographs_are_left_out_and_named(photos: Path, tmp_path: Path) -> None:
    (photos / "7.png").write_bytes(b"no picture")
    counts, faults = split_photographs(photos, "captions", tmp_path / "split")
    assert sum(counts.values()) == 59
    assert [fault for fault in faults if "7.png" in fault] == faults
    assert len(faults) == 1


def test_each_wrong_folder_is_reported_in_one_sentence(
    photos: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    monkeypatch.setenv("HOME", str(photos.parent))
    (photos.parent / "bare").mkdir()
    (photos.parent / "work" / "mine").mkdir(parents=True)
    (photos.parent / "work" / MARKER).touch()
    few = photos.parent / "few"
    shutil.copytree(photos, few)
    (few / "metadata.jsonl").write_text("".join((photos / "metadata.jsonl").read_text().splitlines(keepends=True)[:12]))
    for arguments, message in (
        (["--photos", "gone"], "1 gone does not exist; give a folder of images with metadata.jsonl."),
        (["--photos", "bare"], "1 bare has no metadata.jsonl"),
        (["--photos", "few"], f"1 few has 12 captioned images; the demo needs at least {FEWEST}"),
        (["--photos", "photos", "--backbone", "./nothing"], "1 recipe photos: backbone ./nothing does not exist"),
        (["--photos", "photos", "--work", "photos"], "2 photos holds photos, which the run reads"),
        (["--backbone", "work/mine", "--work", "work"], "2 work holds work/mine, which the run reads"),
        (["--backbone=~/work/mine", "--work", "work"], "work/mine, which the run reads"),
    ):
        assert message in command("demo", "--out", "model", *arguments).error().replace("\n", " ")
    assert not (photos.parent / "model").exists()


@pytest.mark.parametrize(("low", "verdict"), [(0.03, "above chance"), (0.005, "not distinguishable from chance")])
def test_the_report_says_what_a_model_can_do_against_chance(low: float, verdict: str) -> None:
    compared = {"hit@10": {"difference": -0.011, "low": -0.03, "high": 0.008}}
    way = "text_to_image"
    scores = {
        "subsets": {way: {"hit@10": 0.05}},
        "intervals": {way: {"hit@10": (low, 0.07)}},
        "chance": {way: {"hit@10": 0.01}},
        "counts": {way: {"queries": 1000, "documents": 200}},
        "comparison": {way: compared},
    }
    text = " ".join(findings(scores, 3_000_000, 800))
    assert f"5.0% ({low:.1%} to 7.0%) of 1000 texts" in text
    assert f"a random order, 1.0%: {verdict}." in text
    assert "-1.1% (-3.0% to +0.8%)" in text
    assert "3.0 million parameters and was trained on 800 photographs" in text


@pytest.mark.slow
def test_the_whole_demo_on_photographs(photos: Path, tiny_backbone_path: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "two-steps.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "backbone": "none", "data": {"captions": "captions"}}))
    demo = Demo(tmp_path / "model", tmp_path / "work", 0, str(recipe), photos=photos, captions="captions",
                backbone=str(tiny_backbone_path))  # fmt: skip
    results = demo.run()
    held_out = read_image_folder(demo.work / "data" / "held-out")
    assert results["indexed"] == len(held_out)
    assert results["text_to_image"].keys() >= {"recall@1", "recall@10", "hit@10", "mrr"}
    (body,) = HtmlElements((demo.work / "report.html").read_text()).find("body")
    assert "chance" in body.text
    assert f"{len(held_out)} photographs that no stage has seen" in body.text
    assert "captioned photographs" in (demo.out / "README.md").read_text()
