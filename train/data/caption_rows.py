"""Training rows from an image folder: image-caption pairs, and paraphrase pairs of an image's captions."""

import random
from collections.abc import Iterator, Mapping
from itertools import islice, permutations
from pathlib import Path

from cocoa_embed.data.columns import SIDES, Side, separated
from cocoa_embed.data.image_folder import DescribedImage, find_metadata, read_metadata
from cocoa_embed.data.rows import Item, Row, check_unicode
from cocoa_embed.errors import CocoaError, RowError, printable
from cocoa_embed.train.settings import CaptionChoice


def read_image_folder(folder: Path, *, captions: CaptionChoice = "text", paraphrases: int = 0,
                      limit: int | None = None) -> list[Row]:  # fmt: skip
    """Return the rows of an image folder, as ``read_captions`` yields them.

    :raises CocoaError: As ``read_captions`` does.
    :raises RowError: If an image cannot be used.
    """
    rows = []
    for _, row in read_captions(folder, captions, paraphrases, limit):
        if isinstance(row, RowError):
            raise row
        rows.append(row)
    return rows


def read_captions(
    folder: Path,
    captions: CaptionChoice,
    paraphrases: int,
    limit: int | None = None,
    subset: str = "data",
    instructions: Mapping[Side, str] | None = None,
    must_exist: bool = True,
) -> Iterator[tuple[int, Row | RowError]]:
    """Yield the rows of an image folder (the image is the query, its caption the positive), or images' errors.

    Each comes with the number of its image in the file, from 0.

    :param captions: ``text``: a row for each image. ``captions``: a row for each entry of the list in the column
        ``captions`` (in a CSV file, a JSON list), or for the ``text`` of an image without captions.
    :param paraphrases: Text-only rows to add for each image with several ``captions``, from one of them to another;
        the image's number in the file seeds the draw.
    :param limit: Read the first ``limit`` images.
    :param instructions: The instructions of an image and its caption, by side.
    :param must_exist: Whether a missing image is an error.
    :raises CocoaError: If the folder or its metadata are missing or empty, or the metadata cannot be read.
    """
    metadata = find_metadata(folder)
    number = -1
    of_image, of_text = ((instructions or {}).get(side) for side in SIDES)
    for number, image in enumerate(islice(read_metadata(metadata, must_exist), limit)):
        try:
            if isinstance(image, RowError):
                raise image
            item = Item(images=(image.path,), instruction=separated(of_image, None))
            pairs = [(item, Item(text, (), separated(of_text, text))) for text in _captions(image, captions)]
            pairs += [(Item(one), Item(other)) for one, other in _paraphrases(image, paraphrases, seed=number)]
            yield from ((number, Row(query, positive, image.source, subset=subset)) for query, positive in pairs)
        except RowError as error:
            yield number, error
    if number < 0:
        raise CocoaError(f"{printable(metadata)} has no rows; expected a file_name and a text for each image.")


def _captions(image: DescribedImage, choice: CaptionChoice) -> list[str]:
    wordings = _wordings(image) if choice == "captions" else []
    return wordings or [image.text]


def _paraphrases(image: DescribedImage, count: int, seed: int) -> list[tuple[str, str]]:
    pairs = list(permutations(_wordings(image), 2))
    return random.Random(seed).sample(pairs, k=min(count, len(pairs)))


def _wordings(image: DescribedImage) -> list[str]:
    """Return the entries of the column ``captions``.

    :raises RowError: If it is not a list of non-empty texts.
    """
    captions = image.columns.get("captions")
    if captions is None:
        return []
    if not isinstance(captions, list):
        raise RowError(image.source, f"'captions' is {captions!r}; expected a list of texts")
    if not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise RowError(image.source, "an entry of 'captions' is empty or not a text")
    return [check_unicode(caption, image.source) for caption in captions]
