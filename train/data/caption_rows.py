"""Training rows from an image folder: image-caption pairs, and paraphrase pairs of an image's captions."""

import random
from collections.abc import Iterator, Mapping
from itertools import islice, permutations
from pathlib import Path

from cocoa_embed.data.columns import SIDES, Side, separated
from cocoa_embed.data.image_folder import DescribedImage, RowChoice, find_metadata, read_metadata
from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError, RowError, printable


def read_image_folder(folder: Path, *, captions: RowChoice = "text", paraphrases: int = 0,
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
    captions: RowChoice,
    paraphrases: int,
    limit: int | None = None,
    subset: str = "data",
    instructions: Mapping[Side, str] | None = None,
    must_exist: bool = True,
) -> Iterator[tuple[int, Row | RowError]]:
    """Yield the rows of an image folder (the image is the query, its caption the positive), or errors of bad images.

    Each comes with the number of its image in the file, from 0.

    :param captions: ``text``: a row for each image. ``captions``: a row for each entry of the list in the column
        ``captions`` (in a CSV file, a JSON list), or for the ``text`` of an image without captions.
        ``questions``: a row for each entry of that column, if there is one: the image with a question, and the answer.
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
            found: list[tuple[str | None, str]] = (
                [*image.questions] if captions == "questions" else [(None, text) for text in image.texts(captions)]
            )
            pairs = [
                (Item(asked, (image.path,), separated(of_image, asked)), Item(text, (), separated(of_text, text)))
                for asked, text in found
            ]
            pairs += [(Item(one), Item(other)) for one, other in _paraphrases(image, paraphrases, seed=number)]
            yield from ((number, Row(query, positive, image.source, subset=subset)) for query, positive in pairs)
        except RowError as error:
            yield number, error
    if number < 0:
        raise CocoaError(f"{printable(metadata)} has no rows; expected a file_name and a text for each image.")


def _paraphrases(image: DescribedImage, count: int, seed: int) -> list[tuple[str, str]]:
    pairs = list(permutations(image.captions, 2))
    return random.Random(seed).sample(pairs, k=min(count, len(pairs)))
