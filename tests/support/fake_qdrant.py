"""A loopback server with Qdrant's REST API that fails on request; and points to store."""

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from qdrant_client import QdrantClient, models

from cocoa_embed.integrations.qdrant.stores.base import Point, Signature
from cocoa_embed.integrations.qdrant.stores.store import Store


@dataclass
class Request:
    method: str
    path: str
    size: int
    body: Any
    headers: dict[str, str]


@dataclass
class FakeServer:
    """The part of Qdrant's REST API that a store uses, with strict checks, in memory."""

    url: str = ""
    keeps_metadata: bool = True
    requests: list[Request] = field(default_factory=list)
    faults: list[tuple[str, Callable[["Handler"], bool]]] = field(default_factory=list)
    """For the next request whose "METHOD path" ends in the text: a function that answers it, or lets it pass."""
    client: QdrantClient = field(default_factory=lambda: QdrantClient(":memory:"))
    indexes: dict[str, dict[str, Any]] = field(default_factory=dict)
    graphs: dict[str, int] = field(default_factory=dict)
    """Edges a point in the search index of each collection where they were named."""
    shards: int = 1
    lock: threading.Lock = field(default_factory=threading.Lock)

    is_strict: bool = False
    """Whether filters on fields without an index are refused, as hosted clusters do."""

    def check_strictly(self, name: str, condition: models.Filter | None) -> None:
        """Refuse a filter as a server in strict mode does."""
        for key, kinds in required_indexes(condition) if self.is_strict and condition else ():
            if self.indexes.get(name, {}).get(key, {}).get("data_type") not in kinds:
                raise ValueError(
                    f'Bad request: Index required but not found for "{key}" of one of the following types: '
                    f"[{', '.join(kinds)}]. Help: Create an index for this key or use a different filter."
                )

    def bodies(self, method: str, end: str) -> list[Any]:
        return [request.body for request in self.requests if request.method == method and request.path.endswith(end)]

    def fail(self, end: str, *faults: Callable[["Handler"], bool]) -> None:
        self.faults += [(end, fault) for fault in faults]

    def next_fault(self, request: str) -> Callable[["Handler"], bool] | None:
        with self.lock:
            index = next((index for index, (end, _) in enumerate(self.faults) if request.endswith(end)), None)
            return None if index is None else self.faults.pop(index)[1]


Fault = Callable[["Handler"], bool]
"""Answers a request, or returns False to let it pass."""


def answer_status(code: int, **headers: str) -> Fault:
    def fault(handler: "Handler") -> bool:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        handler.answer(code, {"status": {"error": f"status {code}"}}, names)
        return True

    return fault


def answer_bytes(content: bytes) -> Fault:
    def fault(handler: "Handler") -> bool:
        handler.send(200, content, {})
        return True

    return fault


def drop(handler: "Handler") -> bool:
    """Close the connection without an answer."""
    handler.close_connection = True
    handler.connection.close()
    return True


def drop_after(handler: "Handler") -> bool:
    """Do the work, and lose the answer."""
    handler.work()
    return drop(handler)


def store_half(handler: "Handler") -> bool:
    """Store half of the points, and close the connection."""
    handler.body["points"] = handler.body["points"][::2]
    return drop_after(handler)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def handle_one(self) -> None:
        fake = self.server.fake
        size = int(self.headers.get("Content-Length", 0))
        content = self.rfile.read(size)
        self.path_only = unquote(urlsplit(self.path).path)
        self.body = json.loads(content, parse_constant=refuse_constant) if content else None
        fake.requests.append(Request(self.command, self.path_only, size, self.body, dict(self.headers)))
        fault = fake.next_fault(f"{self.command} {self.path_only}")
        if fault is not None and fault(self):
            return
        self.answer(*self.work(), {})

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = handle_one

    def work(self) -> tuple[int, object]:
        fake = self.server.fake
        with fake.lock:
            try:
                result = respond(fake, self.command, self.path_only, self.body)
                return 200, {"result": result, "status": "ok", "time": 0}
            except (KeyError, LookupError) as error:
                return 404, {"status": {"error": f"Not found: {error}"}}
            except ValueError as error:
                code = 404 if "not found" in str(error) else 409 if "already exists" in str(error) else 400
                return code, {"status": {"error": str(error)}}

    def answer(self, code: int, value: object, headers: dict[str, str]) -> None:
        self.send(code, json.dumps(value, allow_nan=False).encode(), {"Content-Type": "application/json", **headers})

    def send(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def respond(fake: FakeServer, method: str, path: str, body: dict[str, Any]) -> object:  # noqa: C901 - a table
    """Return the result of one request."""
    client, done = fake.client, {"operation_id": 0, "status": "completed"}
    name, _, action = path.removeprefix("/collections/").partition("/")
    aliases = {each.alias_name: each.collection_name for each in client.get_aliases().aliases}
    name, body = aliases.get(name, name), body or {}
    if "m" in body.get("hnsw_config", {}):
        fake.graphs[name] = body["hnsw_config"]["m"]
    metadata = body.get("metadata") if fake.keeps_metadata else None
    condition = models.Filter.model_validate(body["filter"]) if body.get("filter") else None
    match method, action:
        case "GET", "aliases" if not name:
            return client.get_aliases().model_dump(mode="json")
        case "POST", "" if path == "/collections/aliases":
            return client.update_collection_aliases(models.ChangeAliasesOperation.model_validate(body).actions)
        case "GET", "collections" if not name:
            return client.get_collections().model_dump(mode="json")
        case "GET", "exists":
            return {"exists": client.collection_exists(name)}
        case "GET", "":
            info = client.get_collection(name).model_dump(mode="json")
            info["config"]["hnsw_config"]["m"] = fake.graphs.get(name, 16)
            info["config"]["params"]["shard_number"] = fake.shards
            if fake.is_strict:
                info["config"]["strict_mode_config"] = {"enabled": True, "unindexed_filtering_retrieve": False}
            return {**info, "payload_schema": fake.indexes.get(name, {})}
        case "PUT", "":
            request = models.CreateCollection.model_validate(body)
            return client.create_collection(name, vectors_config=request.vectors, metadata=metadata)
        case "PATCH", "":
            return client.update_collection(name, metadata=metadata)
        case "PUT", "index":
            kind = models.CreateFieldIndex.model_validate(body).model_dump(mode="json")["field_schema"]
            client.get_collection(name)
            kind = kind if isinstance(kind, str) else kind["type"]
            fake.indexes.setdefault(name, {})[body["field_name"]] = {"data_type": kind, "points": 0}
        case "PUT", "points":
            points = [models.PointStruct.model_validate(point) for point in body["points"]]
            client.upsert(name, points=points, update_mode=models.UpdateMode(body.get("update_mode") or "upsert"))
        case "POST", "points/batch":
            operations = models.UpdateOperations.model_validate(body).operations
            client.batch_update_points(name, operations)
            return [done] * len(operations)
        case "POST", "points":
            records = client.retrieve(name, body["ids"], with_payload=body["with_payload"])
            return [record.model_dump(mode="json") for record in records]
        case "POST", "points/count":
            return {"count": client.count(name, count_filter=condition, exact=True).count}
        case "POST", "points/scroll":
            fake.check_strictly(name, condition)
            page = {key: body.get(key) for key in ("limit", "offset", "with_payload")}
            vectors = body.get("with_vector") or False
            records, offset = client.scroll(name, scroll_filter=condition, with_vectors=vectors, **page)
            return {"points": [record.model_dump(mode="json") for record in records], "next_page_offset": offset}
        case "POST", "points/query/batch":
            searches = [{**search, "params": None} for search in body["searches"]]  # the local mode warns of them
            requests = list(map(models.QueryRequest.model_validate, searches))
            for request in requests:
                fake.check_strictly(name, request.filter)
            answers = client.query_batch_points(name, requests)
            return [answer.model_dump(mode="json") for answer in answers]
        case _:
            raise LookupError(f"{method} {path}")
    return done


ANY_INDEX = ["keyword", "integer", "float", "text", "bool", "datetime"]


def required_indexes(part: Any) -> Iterator[tuple[str, list[str]]]:  # noqa: ANN401, C901 - a table
    """Yield the fields in a filter, each with the types of index that serve its condition."""
    match part:
        case None | models.HasIdCondition():
            return
        case list():
            for each in part:
                yield from required_indexes(each)
        case models.Filter():
            yield from required_indexes([*map(as_list, (part.must, part.should, part.must_not))])
        case models.IsEmptyCondition(is_empty=field):
            yield field.key, ANY_INDEX
        case models.FieldCondition(range=models.Range()):
            yield part.key, ["integer", "float"]
        case models.FieldCondition(range=models.DatetimeRange()):
            yield part.key, ["datetime"]
        case models.FieldCondition(match=models.MatchText()):
            yield part.key, ["text"]
        case models.FieldCondition(match=models.MatchAny(any=[str(), *_])):
            yield part.key, ["keyword"]
        case models.FieldCondition(match=models.MatchValue(value=value)):
            yield part.key, [{bool: "bool", int: "integer"}.get(type(value), "keyword")]
        case _:
            raise LookupError(f"the fake does not know {part!r}")


def as_list(clause: Any) -> list[Any]:  # noqa: ANN401
    return clause if isinstance(clause, list) else [] if clause is None else [clause]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, fake: FakeServer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fake = fake


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    fake = FakeServer()
    server = Server(fake)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        fake.client.close()


def delete(store: Store, *ids: str) -> None:
    """Delete the points with these ids that exist."""
    store.replace_payloads([(id_, payload, None) for id_, payload in store.retrieve(ids).items()])


DIMENSION = 8
SIGNATURE = Signature(model="m", fingerprint="0f", dimension=DIMENSION)
OTHER = Signature(model="another žluť", fingerprint="ab", dimension=DIMENSION)


def name(number: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, str(number)))


def make_vector(number: int, dimension: int = DIMENSION) -> np.ndarray:
    return np.random.default_rng(number).normal(size=dimension).astype(np.float32)


def make_points(start: int, stop: int, dimension: int = DIMENSION, **payload: Any) -> list[Point]:
    return [
        Point(name(number), make_vector(number, dimension), {"number": number, **payload})
        for number in range(start, stop)
    ]


def turned(number: int, degrees: float, **payload: Any) -> Point:
    """A point whose vector is at an angle to that of ``turned(number, 0)``."""
    angle = np.radians(degrees)
    vector = np.array([np.cos(angle), np.sin(angle), *[0] * (DIMENSION - 2)], dtype=np.float32)
    return Point(name(number), vector, {"path": f"/a/{number}.png", "number": number, **payload})
