"""Read and check requests, which are JSON or a form. No file of the machine is opened here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from cocoa_embed.encode.batches import CountTokens
from cocoa_embed.encode.encoder import ModelInput, make_input
from cocoa_embed.errors import ImageError, UsageError, one_line, printable
from cocoa_embed.images.load import decode_image, image_size, read_image_source
from cocoa_embed.serve.limits import PixelBudget

MAX_HITS = 10_000
"""The maximum number of hits of a search, including those that it skips."""
MAX_INPUTS = 2048
"""The maximum number of inputs in a request for embeddings, as in OpenAI's API."""
MAX_FIELDS = 100
"""The maximum number of fields of a form."""
FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")

Checked = TypeVar("Checked", bound=BaseModel)


class Picture(NamedTuple):
    """The file of an image, and its name in errors."""

    data: bytes
    name: str


Item: TypeAlias = tuple[str | None, Picture | None]
"""What the model is to embed: a text, a picture, or both."""


def _as_list(value: object) -> object:
    return [] if value is None else value if isinstance(value, list) else [value]


def _or_none(value: object) -> object:
    return None if isinstance(value, str) and not value.strip() else value


Texts = Annotated[list[str], BeforeValidator(_as_list), Field(max_length=MAX_FIELDS)]


class SearchRequest(BaseModel):
    """A search, as ``Searcher.search`` takes it; the image is the file of a form, or a ``data:`` URI."""

    model_config = ConfigDict(extra="forbid")

    text: Annotated[str | None, BeforeValidator(_or_none)] = None
    image: Annotated[Picture | None, BeforeValidator(lambda value: as_picture(_or_none(value)))] = None
    like: Texts = []
    unlike: Texts = []
    filters: Texts = []
    limit: int = Field(10, ge=1, le=MAX_HITS)
    offset: int = Field(0, ge=0, le=MAX_HITS)
    score_threshold: float | None = Field(None, allow_inf_nan=False)
    any_orientation: bool = False
    diversity: float | None = Field(None, ge=0, le=1)
    group_by: str | None = None
    vectors: int = Field(1, ge=1)


class EmbeddingRequest(BaseModel):
    """A request for embeddings as in OpenAI's API, plus images, and whether the inputs are queries or documents."""

    input: Any
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    input_type: Literal["query", "document"] = "query"

    def items(self) -> list[Item]:
        """Return the texts and the pictures to embed.

        :raises UsageError: If there are none, too many, or something else is among them.
        :raises ImageError: If the ``data:`` URI of an image is malformed.
        """
        given = self.input if isinstance(self.input, list) else [self.input]
        if not 1 <= len(given) <= MAX_INPUTS:
            raise UsageError(f"input has {len(given)} items; give 1 to {MAX_INPUTS}")
        return [_read_item(each, f"input {index}") for index, each in enumerate(given)]


def _read_item(given: object, name: str) -> Item:
    if isinstance(given, int | list):
        raise UsageError("input holds token ids; give texts (in LangChain: check_embedding_ctx_length=False)")
    item = {"text": given} if isinstance(given, str) else given
    if not isinstance(item, dict) or not item or item.keys() - {"text", "image"}:
        raise UsageError("an input is a text, or an object with text, image (a data: URI), or both")
    text, image = item.get("text"), item.get("image")
    if not isinstance(text, str | None) or not isinstance(image, str | None):
        raise UsageError("text and image of an input are strings")
    return text, as_picture(image, name)


def as_picture(value: object, name: str | None = None) -> Picture | None:
    """Return a picture that is given as the file of a form or as a ``data:`` URI.

    :param name: The name of a URI in errors [default: its length].
    :raises UsageError: If it is anything else: a path or an address would be read on the server's side.
    :raises ImageError: If the URI is malformed.
    """
    if value is None or isinstance(value, Picture):
        return value
    if not isinstance(value, str) or value[:5].lower() != "data:":
        raise UsageError("the image is neither an uploaded file nor a data: URI; give one of these")
    data, uri = read_image_source(value)
    return Picture(data, name or uri)


@contextmanager
def decoded(items: Sequence[Item], pixels: int, budget: PixelBudget) -> Iterator[list[ModelInput]]:
    """Decode pictures once there is room for ``pixels``, and hold the room until the end of the block.

    :raises ImageError: If one is not a picture.
    :raises UsageError: If an item has neither text nor picture.
    :raises BusyError: If there is no room in time.
    """
    with budget.hold(pixels):
        yield [
            make_input(text)
            if picture is None
            else {"image": decode_image(*picture)[0], **(make_input(text) if text else {})}
            for text, picture in items
        ]


def in_batches(
    items: Iterable[Item], most_items: int, most_pixels: int, count_tokens: CountTokens
) -> Iterator[tuple[list[Item], int]]:
    """Yield items in order, in batches, each with its number of pixels; a picture above the limit is its own batch.

    :param count_tokens: Refuses sizes that the model does not accept.
    :raises ImageError: As ``count_pixels`` does, when the picture's turn comes.
    """
    batch: list[Item] = []
    batch_pixels = 0
    for item in items:
        pixels = 0 if item[1] is None else count_pixels(item[1], count_tokens)
        if batch and (len(batch) == most_items or batch_pixels + pixels > most_pixels):
            yield batch, batch_pixels
            batch, batch_pixels = [], 0
        batch.append(item)
        batch_pixels += pixels
    if batch:
        yield batch, batch_pixels


def count_pixels(picture: Picture, count_tokens: CountTokens) -> int:
    """Return the pixels of a picture, from the header of its file.

    :raises ImageError: If it is not a picture, too large, or of a size that the model does not accept.
    """
    width, height = image_size(*picture)
    try:
        count_tokens(width, height)
    except ValueError as error:
        raise ImageError(picture.name, f"is not accepted by the model ({one_line(error)})") from error
    return width * height


async def read_search(request: Request) -> SearchRequest:
    """Return the search that a request asks for, in JSON or in a form.

    :raises UsageError: If it is malformed.
    :raises ImageError: If the ``data:`` URI of the image is malformed.
    :raises HTTPException: If it is of another media type.
    """
    if media_type(request) not in FORM_TYPES:
        return check(SearchRequest, await read_json(request))
    fields: dict[str, Any] = {}
    # The guard limits the size of the whole body.
    async with request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=sys.maxsize) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                given: str | Picture = Picture(await value.read(), printable(value.filename or "the image"))
                if given == Picture(b"", "the image"):  # what browsers send if no file is chosen
                    continue
            else:
                given = value
            is_list = name in ("like", "unlike", "filters")
            if name in fields and not is_list:
                raise UsageError(f"{name} is given twice; give it once")
            fields[name] = [*fields.get(name, []), given] if is_list else given
    return check(SearchRequest, fields)


def media_type(request: Request) -> str:
    """Return the media type of a request's body, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request) -> Mapping[str, Any]:
    """Return the JSON object of a request.

    :raises UsageError: If it holds anything else.
    :raises HTTPException: If it is of another media type.
    """
    if media_type(request) != "application/json":
        raise HTTPException(415, f"the body is {media_type(request) or 'of no type'}; send application/json")
    try:
        document = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the body is not JSON ({type(error).__name__})") from error
    if not isinstance(document, dict):
        raise UsageError(f"the body is a JSON {type(document).__name__}; send an object")
    return document


def check(model: type[Checked], fields: Mapping[str, Any]) -> Checked:
    """Return the fields of a request as a checked model.

    :raises UsageError: If one is unknown or invalid; the message names all of them.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_input=False)]
        raise UsageError("; ".join(faults)) from None
