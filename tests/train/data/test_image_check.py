from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from table_files import png, write_table

from cocoa_embed.data.rows import ItemImage
from cocoa_embed.images.to_rgb import ORIENTATION_TAG
from cocoa_embed.train.data.image_check import check_images, known_sizes
from cocoa_embed.train.data.sources import read_subset
from cocoa_embed.train.settings import SourceSettings


@pytest.fixture
def images(tmp_path: Path) -> list[ItemImage]:
    """Good and bad images, as files and inside a table, one of them twice."""
    files = {
        "wide.png": png(size=(60, 40)),
        "broken.png": png()[:60],
        "text.png": b"no image",
        "long.png": png(1, (1, 201)),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    turned = Image.Exif()
    turned[ORIENTATION_TAG] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=turned)
    cells = [png(size=(28, 56)), b"no image", png(size=(84, 28))]
    write_table(tmp_path / "rows.parquet", [{"query_image": cell, "positive_text": "p"} for cell in cells])
    inside = [row.images()[0] for row in read_subset("data", SourceSettings(file=str(tmp_path / "rows.parquet")), [])]
    return [*(tmp_path / name for name in files), tmp_path / "gone.png", tmp_path / "turned.jpg", *inside, inside[0]]


def test_each_image_has_its_upright_size_or_the_reason_why_it_cannot_be_used(images: list[ItemImage]) -> None:
    found = check_images(images)
    assert list(found) == images[:-1]
    sizes = {0: (60, 40), 5: (40, 60), 6: (28, 56), 8: (84, 28)}
    assert known_sizes(found) == {images[number]: size for number, size in sizes.items()}
    reasons = {
        1: "truncated",
        2: "is not an image",
        3: "more than 200 times",
        4: "does not exist",
        7: "is not an image",
    }
    for number, reason in reasons.items():
        assert reason in str(found[images[number]])


def test_workers_find_what_this_process_finds(images: list[ItemImage]) -> None:
    alone, together = check_images(images), check_images(images, 2)
    assert alone == together
    assert list(alone) == list(together)


def test_an_image_of_several_rows_is_decoded_once(images: list[ItemImage], monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[ItemImage] = []

    def load(image: ItemImage) -> Image.Image:
        decoded.append(image)
        return Image.open(BytesIO(png()))

    monkeypatch.setattr("cocoa_embed.train.data.image_check.load_row_image", load)
    check_images(images * 3)
    assert decoded == images[:-1]


def test_the_check_draws_no_random_number_of_the_run(images: list[ItemImage]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    check_images(images)
    assert torch.equal(before, torch.get_rng_state())


def test_the_progress_bar_is_on_standard_error_and_only_where_it_is_asked_for(
    images: list[ItemImage], capsys: pytest.CaptureFixture[str]
) -> None:
    check_images(images)
    assert capsys.readouterr() == ("", "")
    check_images(images, progress=True)
    shown = capsys.readouterr()
    assert (shown.out, "checking images" in shown.err) == ("", True)


def test_no_image_is_no_work() -> None:
    assert check_images([]) == {}
