"""A local server that answers an indexing run as Qdrant does, and keeps payloads but no vectors."""

import json
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

from qdrant_client import QdrantClient, models

DONE = {"operation_id": 0, "status": "completed"}


class Points:
    """One collection: payloads by id, and the id of each path."""

    def __init__(self) -> None:
        self.client = QdrantClient(":memory:")
        self.indexes: dict[str, Any] = {}
        self.payloads: dict[str, bytes] = {}
        self.ids: dict[str, str] = {}

    def put(self, id_: str, payload: dict[str, Any]) -> None:
        self.payloads[id_] = json.dumps(payload).encode()
        self.ids.update(dict.fromkeys(payload["paths"], id_))

    def records(self, ids: list[str]) -> list[dict[str, Any]]:
        return [{"id": id_, "payload": json.loads(self.payloads[id_])} for id_ in ids if id_ in self.payloads]

    def answer(self, method: str, path: str, body: dict[str, Any]) -> object:
        name, _, action = path.removeprefix("/collections/").partition("/")
        match method, action:
            case "GET", "exists":
                return {"exists": self.client.collection_exists(name)}
            case "GET", "":
                return {**self.client.get_collection(name).model_dump(mode="json"), "payload_schema": self.indexes}
            case "PUT", "":
                vectors = models.CreateCollection.model_validate(body).vectors
                return self.client.create_collection(name, vectors, metadata=body["metadata"])
            case "PUT", "index":
                self.indexes[body["field_name"]] = {"data_type": "keyword", "points": 0}
            case "PUT", "points":
                for point in body["points"]:
                    if point["id"] not in self.payloads:
                        self.put(point["id"], point["payload"])
            case "POST", "points":
                return self.records(body["ids"])
            case "POST", "points/scroll":
                (condition,) = body["filter"]["must"]
                found = {self.ids[value]: None for value in condition["match"]["any"] if value in self.ids}
                return {"points": self.records([*found]), "next_page_offset": None}
            case _:
                raise LookupError(f"{method} {path}")
        return DONE


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    points: Points

    def handle_one(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        result = self.points.answer(self.command, urlsplit(self.path).path, json.loads(content) if content else {})
        answer = json.dumps({"result": result, "status": "ok", "time": 0}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST = handle_one

    def log_message(self, *_: object) -> None:
        pass


def serve(ours: Connection) -> None:
    Handler.points = Points()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ours.send(server.server_port)
    server.serve_forever()


@contextmanager
def points_server() -> Iterator[str]:
    """Run the server in a separate process; yield its address."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()
