import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from table_files import png, write_table

from cocoa_embed.data.rows import Item, ItemImage, Row
from cocoa_embed.errors import ImageError
from cocoa_embed.images.to_rgb import ORIENTATION_TAG
from cocoa_embed.train.data import image_check
from cocoa_embed.train.data.image_check import CheckedImages, ImageCheck, read_size
from cocoa_embed.train.data.row_table import RowTable, image_id
from cocoa_embed.train.data.rows import load_row_image
from cocoa_embed.train.data.sources import read_subset
from cocoa_embed.train.settings import SourceSettings


@pytest.fixture
def images(tmp_path: Path) -> dict[str, ItemImage]:
    """Good and bad images, as files and inside a table."""
    files = {"wide.png": png(size=(60, 40)), "broken.png": png()[:60], "text.png": b"no image",
             "long.png": png(1, (1, 201))}  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    turned = Image.Exif()
    turned[ORIENTATION_TAG] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=turned)
    cells = [png(size=(28, 56)), b"no image", png(size=(84, 28))]
    write_table(tmp_path / "rows.parquet", [{"query_image": cell, "positive_text": "p"} for cell in cells])
    rows = [row for _, row in read_subset("data", SourceSettings(file=str(tmp_path / "rows.parquet")))]
    inside = {f"cell {number}": row.images()[0] for number, row in enumerate(rows) if isinstance(row, Row)}
    return {name: tmp_path / name for name in (*files, "gone.png", "turned.jpg")} | inside


def check(images: list[ItemImage], **options: int) -> CheckedImages:
    return ImageCheck()(RowTable.of(Row(Item(images=(image,)), Item("x"), "") for image in images), **options)


def opened(monkeypatch: pytest.MonkeyPatch) -> list[ItemImage]:
    """The images that are opened from now on."""
    found: list[ItemImage] = []

    def read(image: ItemImage) -> tuple[int, int]:
        found.append(image)
        return read_size(image)

    monkeypatch.setattr(image_check, "read_size", read)
    return found


def test_each_image_has_its_upright_size_or_the_reason_why_it_cannot_be_used(images: dict[str, ItemImage]) -> None:
    found = check([*images.values(), images["wide.png"]])
    sizes = {"wide.png": (60, 40), "turned.jpg": (40, 60), "cell 0": (28, 56), "cell 2": (84, 28)}
    assert {name: found.sizes[images[name]] for name in sizes} == sizes
    assert (len(found.sizes), found.unchecked) == (9, 0)
    reasons = {"broken.png": "truncated", "text.png": "is not an image", "long.png": "more than 200 times",
               "gone.png": "does not exist", "cell 1": "is not an image"}  # fmt: skip
    assert found.faults.keys() == {image_id(images[name]) for name in reasons}
    for name, reason in reasons.items():
        assert reason in found.faults[image_id(images[name])]
        assert found.sizes[images[name]] == (1, 1), "a resumed run may have its row"
        with pytest.raises(ImageError, match=reason):
            read_size(images[name])


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp"])
def test_sizes_from_headers_are_those_of_the_pixels_and_a_missing_end_is_found(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **({"exif": Image.Exif()} if suffix == "jpg" else {}))
    assert path.stat().st_size > image_check.HEAD_BYTES
    assert read_size(path) == load_row_image(path).size == (400, 300)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ImageError):
        read_size(path)


def test_a_second_check_opens_only_what_has_changed(
    images: dict[str, ItemImage], cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [images[name] for name in ("wide.png", "turned.jpg", "cell 0")]
    read = opened(monkeypatch)
    before = check(good * 2)
    assert sorted(map(str, read)) == sorted(map(str, good))
    read.clear()
    again = check(good)
    assert (read, again.faults) == ([], {})
    assert np.array_equal(again.sizes.ids, before.sizes.ids)
    changed = Path(str(images["wide.png"]))
    changed.write_bytes(png(size=(30, 10)))
    os.utime(changed, (1, 1))
    assert check(good).sizes[changed] == (30, 10)
    assert read == [changed]
    capsys.readouterr()
    check([])
    assert capsys.readouterr() == ("", "")
    check(good)
    shown = capsys.readouterr()
    assert (shown.out, "checking images" in shown.err) == ("", True)


def test_an_interrupted_check_keeps_what_it_has_found(
    images: dict[str, ItemImage], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [images[name] for name in ("wide.png", "turned.jpg", "cell 0")]
    monkeypatch.setattr(image_check, "IMAGES_IN_MEMORY", 1)
    read: list[ItemImage] = []

    def interrupted(image: ItemImage) -> tuple[int, int]:
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(image)
        return read_size(image)

    monkeypatch.setattr(image_check, "read_size", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check(good)
    read.clear()
    check(good)
    assert len(read) == 1


def test_a_cache_that_cannot_be_used_is_no_obstacle(
    images: dict[str, ItemImage], cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.mkdir(parents=True)
    (cache / image_check.CACHE_FILE).write_bytes(b"no array")
    assert len(check([images["wide.png"]]).sizes) == 1
    monkeypatch.setenv("COCOA_CACHE", str(images["text.png"]))
    checking = ImageCheck()
    rows = RowTable.of([Row(Item(images=(images["wide.png"],)), Item("x"), "")])
    assert len(checking(rows).sizes) == 1
    (message,) = caplog.messages
    assert "text.png cannot be written" in message
    assert "COCOA_CACHE names another folder" in message
    monkeypatch.setattr(image_check, "_version", None)
    assert len(checking(rows).sizes) == 1, "one check remembers what it has found"


def test_a_sample_leaves_the_others_unchecked_and_reads_their_sizes_when_they_are_needed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: list[ItemImage] = [tmp_path / f"{number}.png" for number in range(8)]
    for number, path in enumerate(paths):
        Path(str(path)).write_bytes(png(size=(10 + number, 10)))
    monkeypatch.setattr(image_check, "SAMPLE", 3)
    samples = [check(paths, sample=seed) for seed in (0, 0, 1)]
    assert [len(found.sizes) for found in samples] == [3] * 3
    assert [found.unchecked for found in samples] == [5] * 3
    ids = [set(found.sizes.ids.tolist()) for found in samples]
    assert ids[0] == ids[1] != ids[2]
    assert [samples[0].sizes[path] for path in paths] == [(10 + number, 10) for number in range(8)]
