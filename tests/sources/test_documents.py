"""The pages of a document are images of a bounded size, from any number of threads."""

from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pypdfium2
import pytest
from PIL import Image
from source_files import pdf, read

from cocoa_embed.errors import MissingExtraError
from cocoa_embed.sources import documents


def picture(content: bytes) -> Image.Image:
    return Image.open(BytesIO(content))


def test_pages_are_numbered_from_1_and_look_like_the_document(tmp_path: Path) -> None:
    (tmp_path / "report.pdf").write_bytes(pdf("red", "lime", "blue"))
    found = read(tmp_path / "report.pdf")
    assert [*found.contents] == [f"report.pdf#page={number}" for number in (1, 2, 3)]
    assert found.metadata["report.pdf#page=2"] == {"page": 2, "pages": 3}
    pictures = [picture(content) for content in found.contents.values()]
    assert [image.size for image in pictures] == [(120, 80)] * 3
    colours = [image.getpixel((60, 40)) for image in pictures]
    np.testing.assert_allclose(colours, [(255, 0, 0), (0, 255, 0), (0, 0, 255)], atol=4)


def test_a_page_of_any_size_has_bounded_pixels(tmp_path: Path) -> None:
    document = pypdfium2.PdfDocument.new()
    for width, height in ((20_000, 10_000), (1, 14_000), (595, 842)):
        document.new_page(width, height)
    document.save(str(tmp_path / "large.pdf"))
    sizes = [picture(content).size for content in read(tmp_path / "large.pdf").contents.values()]
    assert len(sizes) == 3
    for width, height in sizes:
        assert width * height <= documents.MAX_PAGE_PIXELS * 1.01
    assert sizes[2] == (1190, 1684)


def test_a_document_that_is_encrypted_or_broken_says_so(tmp_path: Path) -> None:
    (tmp_path / "broken.pdf").write_bytes(pdf("red")[:300])
    (tmp_path / "none.pdf").write_bytes(b"")
    (tmp_path / "locked.pdf").write_bytes(ENCRYPTED)
    assert "broken.pdf: cannot be read" in read(tmp_path / "broken.pdf").faults[0]
    assert "none.pdf: is empty" in read(tmp_path / "none.pdf").faults[0]
    assert "it is encrypted; save it without a password" in read(tmp_path / "locked.pdf").faults[0]


def test_several_documents_are_read_by_several_threads(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.pdf").write_bytes(pdf(*["red", "lime"] * 10))
    with ThreadPoolExecutor(6) as pool:
        founds = list(pool.map(lambda number: read(tmp_path / f"{number}.pdf"), range(6)))
    contents = [[*found.contents.values()] for found in founds]
    assert all(each == contents[0] and len(each) == 20 for each in contents)


def test_without_pdfium_the_pip_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.pdf").write_bytes(pdf("red"))
    monkeypatch.setitem(__import__("sys").modules, "pypdfium2", None)
    with pytest.raises(MissingExtraError, match=r"pypdfium2 is not installed; run: pip install .*\[pdf\]"):
        read(tmp_path / "report.pdf")


ENCRYPTED = b"""%%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>endobj
4 0 obj<</Filter/Standard/V 1/R 2/P -4/O<%b>/U<%b>>>endobj
trailer<</Root 1 0 R/Encrypt 4 0 R/ID[<00><00>]>>
%%%%EOF""" % (b"11" * 32, b"22" * 32)
"""A document whose owner and user passwords are not empty."""
