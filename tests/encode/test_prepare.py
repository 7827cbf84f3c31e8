from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from fake_model import colour_image
from PIL import Image

from cocoa_embed.encode.prepare import Passenger, StreamSource, draw_thumbnail, examine, prepare_batch
from cocoa_embed.images.load import ImageError


def encoded(image: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def sideways() -> bytes:
    """Return a JPEG that is 30 x 10 as stored, and 10 x 30 upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(colour_image("red", (30, 10)), "JPEG", exif=exif)


def examined(source: StreamSource, name: str = "a picture") -> Passenger:
    passenger = Passenger(name, name, source)
    examine(passenger)
    return passenger


def sizes(images: Sequence[Image.Image]) -> dict[str, Any]:
    """Stands for a preprocessor."""
    return {"sizes": [image.size for image in images]}


class Refusing:
    """A preprocessor that refuses batches with an image of one of these widths."""

    def __init__(self, *widths: int, at_most: int = 99) -> None:
        self.widths = widths
        self.at_most = at_most
        self.calls = 0

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        self.calls += 1
        if any(image.width in self.widths for image in images):
            raise ValueError("of this\nwidth")
        if len(images) > self.at_most:
            raise RuntimeError("too many")
        return sizes(images)


@pytest.mark.parametrize("kind", ["bytes", "str", "path", "pil"])
def test_every_source_is_measured_and_decoded(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    colour_image("red", (24, 16)).save(path)
    source = {"bytes": path.read_bytes(), "str": str(path), "path": path, "pil": Image.open(path)}[kind]
    passenger = examined(source)
    assert (passenger.width, passenger.height) == (24, 16)
    batch = prepare_batch([passenger], sizes, None)
    assert batch.pieces[0].features == {"sizes": [(24, 16)]}
    assert (passenger.mime, passenger.thumbnail) == ("image/png", None)
    assert batch.seconds > 0


def test_a_file_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    colour_image("red").save(path)
    passenger = examined(path)
    path.unlink()
    assert not prepare_batch([passenger], sizes, None).refused


def test_the_size_is_upright_before_and_after_decoding() -> None:
    passenger = examined(sideways())
    assert (passenger.width, passenger.height) == (10, 30)
    assert prepare_batch([passenger], sizes, None).pieces[0].features == {"sizes": [(10, 30)]}
    assert (passenger.width, passenger.height) == (10, 30)


def test_an_image_made_in_memory_has_no_known_media_type() -> None:
    passenger = examined(colour_image("red"))
    prepare_batch([passenger], sizes, None)
    assert passenger.mime == "application/octet-stream"


@pytest.mark.parametrize(
    "data", [b"", b"no image", b"\xff\xd8\xff\xe0 nothing more", encoded(colour_image("red"))[:20]]
)
def test_what_has_no_header_is_an_error_that_names_it(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        examined(data)
    assert caught.value.source == "a picture"


def test_what_breaks_later_is_refused_and_spoils_nothing_else() -> None:
    good, broken = examined(colour_image("red")), examined(encoded(colour_image("blue", (99, 99)), "JPEG")[:-40])
    batch = prepare_batch([good, broken], sizes, None)
    assert [piece.passengers for piece in batch.pieces] == [[good]]
    assert [passenger for passenger, _ in batch.refused] == [broken]
    assert "truncated" in batch.refused[0][1].reason


def test_a_batch_of_broken_images_is_not_preprocessed() -> None:
    prepare = Refusing()
    batch = prepare_batch([examined(encoded(colour_image("blue", (99, 99)), "JPEG")[:-40])], prepare, None)
    assert (prepare.calls, batch.pieces, len(batch.refused)) == (0, [], 1)


@pytest.mark.parametrize("bad", [(), (3,), (0, 7), (1, 2, 3), tuple(range(8))])
def test_the_images_that_the_processor_refuses_are_found_and_the_others_kept(bad: tuple[int, ...]) -> None:
    passengers = [examined(colour_image("red", (10 + width, 10)), str(width)) for width in range(8)]
    batch = prepare_batch(passengers, Refusing(*(10 + width for width in bad)), None)
    assert sorted(passenger.name for passenger, _ in batch.refused) == sorted(map(str, bad))
    assert all(error.reason == "cannot be embedded (of this width)" for _, error in batch.refused)
    kept = [passenger for piece in batch.pieces for passenger in piece.passengers]
    assert [passenger.name for passenger in kept] == [str(width) for width in range(8) if width not in bad]
    for piece in batch.pieces:
        assert piece.features == {"sizes": [(passenger.width, 10) for passenger in piece.passengers]}


def test_a_batch_refused_as_a_whole_is_prepared_in_parts() -> None:
    passengers = [examined(colour_image("red", (10 + width, 10))) for width in range(8)]
    batch = prepare_batch(passengers, Refusing(at_most=3), None)
    assert [len(piece.passengers) for piece in batch.pieces] == [2, 2, 2, 2]
    assert not batch.refused


def test_thumbnails_are_small_jpegs_of_the_upright_image() -> None:
    passenger = examined(sideways())
    prepare_batch([passenger], sizes, 15)
    thumbnail = Image.open(BytesIO(passenger.thumbnail or b""))
    assert (thumbnail.format, thumbnail.size) == ("JPEG", (5, 15))


def test_a_thumbnail_does_not_enlarge_nor_change_its_image() -> None:
    image = colour_image("red", (24, 16))
    assert Image.open(BytesIO(draw_thumbnail(image, 320))).size == (24, 16)
    draw_thumbnail(image, 8)
    assert image.size == (24, 16)


def test_the_tokens_of_a_piece_are_those_of_its_longest_image_for_each() -> None:
    passengers = [examined(colour_image("red")) for _ in range(3)]
    for passenger, tokens in zip(passengers, (4, 9, 1), strict=True):
        passenger.tokens = tokens
    assert prepare_batch(passengers, sizes, None).pieces[0].tokens == 27
