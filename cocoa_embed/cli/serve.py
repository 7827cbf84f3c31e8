"""The command ``serve``, and ``search --server``. Heavy imports are inside functions, so that both start quickly."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import typer

from cocoa_embed.cli.options import DeviceOption, MaxPixelsOption
from cocoa_embed.cli.output import check_all, say, silence_libraries, working
from cocoa_embed.cli.storage import ApiKeyOption, CollectionOption, Location, check_storage
from cocoa_embed.errors import require
from cocoa_embed.folders import DEFAULT_INDEX

ServerKeyOption = Annotated[str | None, typer.Option(envvar="COCOA_API_KEY", help="The API key of cocoa-embed serve.")]


def serve(
    *,
    model: Annotated[str | None, typer.Argument(help="The model [default: the one that made the collection].")] = None,
    collection: CollectionOption = "images",
    location: Location,
    qdrant_api_key: ApiKeyOption = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; any but a loopback address needs --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="COCOA_API_KEY", help="The key that every request must send.")
    ] = None,
    device: DeviceOption = None,
    max_pixels: MaxPixelsOption = None,
) -> None:
    """Serve an index over HTTP: a search page, an API, and OpenAI-compatible embeddings. Ctrl-C stops it."""
    from cocoa_embed.model.loading import check_model
    from cocoa_embed.serve.address import bind, check_address

    check_all(
        lambda: check_storage(collection, location, exists=True),
        *([] if model is None else [partial(check_model, model)]),
        partial(check_address, host, api_key),
    )
    for module in ("qdrant_client", "starlette", "uvicorn", "python_multipart"):
        require(module, "serve")
    with working():
        silence_libraries()
        from cocoa_embed.serve import run
        from cocoa_embed.serve.limits import Limits

        bound = bind(host, port)
        place = {**vars(location), "collection": collection, "api_key": qdrant_api_key}
        indexer, app = run.open_app(model, device, place, Limits(), api_key, max_pixels)
        name = f"[{host}]" if ":" in host else host
        say(f"{indexer.store.name}: {indexer.store.count()} images, {indexer.encoder.name}")
        if location.url is None:
            folder = location.path or location.edge or DEFAULT_INDEX
            say(f"no other process can open {folder} meanwhile; to index while serving, use a Qdrant server")
        ready = f"serving at http://{name}:{bound.getsockname()[1]}/ (press Ctrl-C to stop)"
        run.answer_requests(app, bound, partial(say, ready))


def search_server(
    server: str, api_key: str | None, image: str | None, allowed_hosts: Sequence[str], asked: dict[str, Any]
) -> dict[str, Any]:
    """Send a search to a server, with the content of its image, and return the answer.

    :param image: A value of ``--image``.
    :param asked: The other fields of the search; examples that are files here are named by their absolute paths.
    :raises CocoaError: If the image cannot be read, the key cannot be sent, or the server does not answer.
    """
    from cocoa_embed.serve.client import post_search

    if image and image[:5].lower() != "data:":
        from cocoa_embed.sources.keys import read_key

        data = base64.b64encode(read_key(image, allowed_hosts)).decode("ascii")
        image = f"data:application/octet-stream;base64,{data}"
    for side in ("like", "unlike"):
        asked[side] = [os.path.abspath(each) if os.path.lexists(each) else each for each in asked[side]]
    return post_search(server, {**asked, "image": image}, api_key)
