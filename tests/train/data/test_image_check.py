from pathlib import Path

import pytest
import torch
from PIL import Image
from table_files import png, write_table

from cocoa_embed.data.rows import ItemImage, Row
from cocoa_embed.images.to_rgb import ORIENTATION_TAG
from cocoa_embed.train.data.image_check import check_images
from cocoa_embed.train.data.sources import read_subset
from cocoa_embed.train.settings import SourceSettings


@pytest.fixture
def images(tmp_path: Path) -> list[ItemImage]:
    """Good and bad images, as files and inside a table, one of them twice."""
    files = {"wide.png": png(size=(60, 40)), "broken.png": png()[:60], "text.png": b"no image",
             "long.png": png(1, (1, 201))}  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    turned = Image.Exif()
    turned[ORIENTATION_TAG] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=turned)
    cells = [png(size=(28, 56)), b"no image", png(size=(84, 28))]
    write_table(tmp_path / "rows.parquet", [{"query_image": cell, "positive_text": "p"} for cell in cells])
    rows = read_subset("data", SourceSettings(file=str(tmp_path / "rows.parquet")))
    inside = [row.images()[0] for row in rows if isinstance(row, Row)]
    return [*(tmp_path / name for name in files), tmp_path / "gone.png", tmp_path / "turned.jpg", *inside, inside[0]]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_has_its_upright_size_or_the_reason_why_it_cannot_be_used(
    images: list[ItemImage], workers: int
) -> None:
    found = check_images(images, workers)
    assert list(found) == images[:-1]
    sizes = {0: (60, 40), 5: (40, 60), 6: (28, 56), 8: (84, 28)}
    assert {number: found[images[number]] for number in sizes} == sizes
    no_image, too_long = "is not an image", "more than 200 times"
    for number, reason in {1: "truncated", 2: no_image, 3: too_long, 4: "does not exist", 7: no_image}.items():
        assert reason in str(found[images[number]])


def test_an_image_of_several_rows_is_decoded_once_and_without_the_runs_random_numbers(
    images: list[ItemImage], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decoded: list[ItemImage] = []
    monkeypatch.setattr("cocoa_embed.train.data.image_check.load_row_image",
                        lambda image: decoded.append(image) or Image.new("RGB", (1, 1)))  # fmt: skip
    before = torch.get_rng_state()
    assert check_images([]) == {}
    assert capsys.readouterr() == ("", "")
    check_images(images * 3)
    assert decoded == images[:-1]
    assert torch.equal(before, torch.get_rng_state())
    shown = capsys.readouterr()
    assert (shown.out, "checking images" in shown.err) == ("", True)
