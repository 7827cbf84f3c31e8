"""The HTTP API over an index, as a Starlette application."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import anyio
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from cocoa_embed.cpu_threads import available_cores
from cocoa_embed.encode.encoder import Encoder, ModelInput
from cocoa_embed.errors import CocoaError, ImageError, UsageError
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer
from cocoa_embed.integrations.qdrant.points import plain_payload
from cocoa_embed.integrations.qdrant.searching.searcher import NotIndexedError
from cocoa_embed.integrations.qdrant.stores.base import Hit
from cocoa_embed.serve.batching import BATCH_ITEMS, Batches, BatchingEncoder
from cocoa_embed.serve.facets import SAMPLE, make_facets
from cocoa_embed.serve.guard import Guard, error_response
from cocoa_embed.serve.limits import BusyError, Limits, PixelBudget
from cocoa_embed.serve.pictures import Pictures
from cocoa_embed.serve.requests import (
    EmbeddingRequest,
    Item,
    SearchRequest,
    check,
    count_pixels,
    decoded,
    in_batches,
    read_json,
    read_search,
)

PAGE = Path(__file__).with_name("page")
"""The folder of the page's files."""

FACET_SECONDS = 30.0
"""How long the facets of a collection are cached."""

SIZES = (16, 1024)
"""The least and the most pixels of a thumbnail's longer side."""

STATUS = {UsageError: 400, NotIndexedError: 404, ImageError: 422, BusyError: 503, CocoaError: 503}

Answer = TypeVar("Answer")
Embed: TypeAlias = Callable[[Sequence[ModelInput]], np.ndarray]


class Api:
    """The handlers of the API over one collection and one model."""

    def __init__(self, indexer: QdrantIndexer, batches: Batches, limits: Limits) -> None:
        """Name the collection and the model.

        :param indexer: Its model is a ``BatchingEncoder``.
        """
        self.indexer = indexer
        self.encoder = BatchingEncoder(batches)
        self.batches = batches
        self.pictures = Pictures(indexer.store)
        self._limits = limits
        self._budget = PixelBudget(limits.pixels, limits.seconds)
        self._facets: tuple[float, list[dict[str, Any]]] = (0.0, [])
        self._model_threads = anyio.CapacityLimiter(limits.threads)
        self._other_threads = anyio.CapacityLimiter(2 * available_cores())

    async def health(self, request: Request) -> Response:
        """Report that the server is running."""
        return JSONResponse({"status": "ok"})

    async def info(self, request: Request) -> Response:
        """Describe the collection, with the facets to filter by."""
        return JSONResponse(await self._in_thread(self._other_threads, self._describe))

    async def search(self, request: Request) -> Response:
        """Search by text, image, examples, or all of them."""
        started = time.perf_counter()
        asked = await read_search(request)
        hits = await self._in_thread(self._model_threads, partial(self._search, asked))
        return JSONResponse({"hits": list(map(hit_fields, hits)), "seconds": time.perf_counter() - started})

    async def thumbnail(self, request: Request) -> Response:
        """Send a small picture of a point."""
        id_, size = request.path_params["id"], request.query_params.get("size", "320")
        least, most = SIZES
        if not (size.isdecimal() and len(size) <= len(str(most)) and least <= int(size) <= most):
            raise UsageError(f"size is not a number of pixels from {least} to {most}")
        return await self._picture(request, f"{id_}-{size}", partial(self.pictures.thumbnail, id_, int(size)))

    async def image(self, request: Request) -> Response:
        """Send the full picture of a point."""
        id_ = request.path_params["id"]
        return await self._picture(request, id_, partial(self.pictures.full, id_))

    async def embeddings(self, request: Request) -> Response:
        """Embed texts and images, as OpenAI's API does."""
        asked = check(EmbeddingRequest, await read_json(request))
        if asked.model not in (None, self.encoder.name):
            raise HTTPException(404, f"there is no model {asked.model!a} here; the only one is {self.encoder.name!a}")
        vectors, tokens = await self._in_thread(self._model_threads, partial(self._embed, asked))
        as_base64 = asked.encoding_format == "base64"
        written = [base64.b64encode(each.astype("<f4")).decode() if as_base64 else each.tolist() for each in vectors]
        data = [{"object": "embedding", "index": index, "embedding": each} for index, each in enumerate(written)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": self.encoder.name, "usage": usage})

    async def models(self, request: Request) -> Response:
        """List the one model."""
        model = {"id": self.encoder.name, "object": "model", "created": 0, "owned_by": "cocoa-embed"}
        return JSONResponse({"object": "list", "data": [model]})

    def _describe(self) -> dict[str, Any]:
        store = self.indexer.store
        signature = store.require_signature()
        read_at, facets = self._facets
        if not read_at or time.monotonic() - read_at > FACET_SECONDS:
            facets = make_facets(point.payload for point in store.points(limit=SAMPLE))
            self._facets = time.monotonic(), facets
        return {"collection": store.collection, "model": signature.model, "points": store.count(), "facets": facets}

    def _search(self, asked: SearchRequest) -> list[Hit]:
        options = asked.model_dump(exclude={"text", "image", "filters"})
        query = [] if asked.text is None and asked.image is None else [(asked.text, asked.image)]
        pixels = 0 if asked.image is None else count_pixels(asked.image, self.batches.visual_tokens)
        copies = 9 if asked.any_orientation else 2  # the picture, and those that the indexer makes of it
        with decoded(query, copies * pixels, self._budget) as inputs:
            given = inputs[0] if inputs else {}
            return self.indexer.search(**given, **options, query_filter=asked.filters)  # type: ignore[arg-type]

    def _embed(self, asked: EmbeddingRequest) -> tuple[np.ndarray, int]:
        encoder: Encoder = self.encoder if asked.dimensions is None else self.encoder.truncate(asked.dimensions)
        embed = encoder.embed_queries if asked.input_type == "query" else encoder.embed_documents
        items, vectors, tokens = asked.items(), [], 0
        deadline = time.monotonic() + self._limits.seconds
        for batch, pixels in in_batches(items, BATCH_ITEMS, self._limits.pixels, self.batches.visual_tokens):
            if time.monotonic() > deadline:
                raise BusyError(
                    f"the model could not embed {len(items)} inputs within {self._limits.seconds:g} seconds"
                )
            embeddings, count = self._embed_batch(embed, batch, pixels)
            vectors.append(embeddings)
            tokens += count
        return np.concatenate(vectors), tokens

    def _embed_batch(self, embed: Embed, batch: Sequence[Item], pixels: int) -> tuple[np.ndarray, int]:
        """Return embeddings and the number of tokens; no picture stays in memory after it."""
        with decoded(batch, pixels, self._budget) as inputs:
            return embed(inputs), self.batches.count_tokens(inputs)

    async def _picture(self, request: Request, tag: str, draw: Callable[[], tuple[bytes, str]]) -> Response:
        """Send a picture of a point, or status 304 if the browser has it: a point's content never changes."""
        headers = {"ETag": f'"{tag}"', "Cache-Control": "private, max-age=3600"}
        await self._in_thread(self._other_threads, partial(self.pictures.payload, request.path_params["id"]))
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        data, media_type = await self._in_thread(self._other_threads, draw)
        return Response(data, headers=headers, media_type=media_type)

    async def _in_thread(self, limiter: anyio.CapacityLimiter, work: Callable[[], Answer]) -> Answer:
        """Run a function in a thread and return its result; it runs to its end even if the client no longer waits.

        :raises BusyError: If there is no answer in time.
        """
        try:
            with anyio.fail_after(self._limits.seconds):
                return await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
        except TimeoutError:
            raise BusyError(f"there was no answer within {self._limits.seconds:g} seconds; try again") from None


def make_app(indexer: QdrantIndexer, batches: Batches, limits: Limits, api_key: str | None) -> Starlette:
    """Return the application over a collection; when it stops, it closes the collection and the queue.

    :param indexer: Its model is a ``BatchingEncoder``.
    :param batches: The queue in front of the model.
    :param limits: The limits of requests.
    :param api_key: The key that every request must send; without one, only requests to this machine are answered.
    """
    api = Api(indexer, batches, limits)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        batches.close()
        indexer.close()

    routes: list[BaseRoute] = [
        Route("/health", api.health),
        Route("/info", api.info),
        Route("/search", api.search, methods=["POST"]),
        Route("/thumbnail/{id}", api.thumbnail),
        Route("/image/{id}", api.image),
        Route("/v1/embeddings", api.embeddings, methods=["POST"]),
        Route("/v1/models", api.models),
        Mount("/", StaticFiles(directory=PAGE, html=True)),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, limits=limits, api_key=api_key)],
        exception_handlers=dict.fromkeys((CocoaError, HTTPException, Exception), refused),
        lifespan=lifespan,
    )


def hit_fields(hit: Hit) -> dict[str, Any]:
    """Return the fields of a hit in the API."""
    fields = {name: getattr(hit, name) for name in ("id", "score", "path", "caption")}
    size = {name: hit.payload.get(name) for name in ("width", "height")}
    return {**fields, **size, "payload": plain_payload(hit.payload)}


async def refused(request: Request, error: Exception) -> Response:
    """Return the response to an error; if the server itself failed, the traceback is on standard error."""
    if isinstance(error, HTTPException):
        return error_response(error.status_code, error.detail)
    if isinstance(error, CocoaError):
        return error_response(next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), str(error))
    return error_response(500, "the server has failed; its standard error says why")
