"""How collections are created: what is asked of a server and of Qdrant Edge, and what they refuse."""

import io
import json
import re
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_qdrant
import grpc
import numpy as np
import pytest
from command_line import Command
from fake_qdrant import DIMENSION, SIGNATURE, FakeServer, make_points, make_vector, name
from qdrant_client import QdrantClient
from qdrant_client import grpc as messages

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.integrations.qdrant import QdrantIndexer
from cocoa_embed.integrations.qdrant.stores import open_store
from cocoa_embed.integrations.qdrant.stores.base import Query, Signature
from cocoa_embed.integrations.qdrant.stores.client import creation
from cocoa_embed.integrations.qdrant.stores.options import StoreOptions, read_create
from cocoa_embed.integrations.qdrant.stores.store import Store

Opener = Callable[..., Store]


@pytest.fixture
def backend() -> str:
    return "url"


def test_creation_options_are_read_from_a_text_or_a_mapping() -> None:
    given = {"shards": 4, "vectors": "float16", "hnsw": "after", "tenant": "user"}
    assert read_create(" shards=4, vectors = float16,hnsw=after,tenant=user") == read_create(given) == given
    assert read_create(None) == read_create("") == {}


@pytest.mark.parametrize(
    ("create", "words"),
    [
        ("shards", "'shards' is not of the form KEY=VALUE"),
        ("shards=", "'shards=' is not of the form"),
        ("shards=4,,replicas=2", "'' is not of the form"),
        ("shrads=4", r"no creation option 'shrads' \(did you mean 'shards'\? known: "),
        ("shards=2,shards=3", "a key twice"),
        ("shards=four", "shards is 'four'; it must be a whole number of 1 or more"),
        ("replicas=0", "replicas is 0; it must be"),
        ("shards=-1", "shards is '-1'"),
        ("vectors=float64", "vectors is 'float64'; it can be float32, float16"),
        ("quantization=ternary", "quantization is 'ternary'; it can be scalar, binary, turbo"),
        ("memory=pinned", "memory is 'pinned'; it can be cached, cold"),
        ("hnsw=never", "hnsw is 'never'"),
        ({"api_key": "x"}, "no creation option 'api_key'"),
        ({"shards": True}, "shards is True"),
        ({"tenant": " "}, "tenant is empty"),
    ],
)
def test_a_malformed_option_is_reported_in_one_sentence(create: Any, words: str) -> None:  # noqa: ANN401
    with pytest.raises(UsageError, match=words):
        QdrantIndexer(None, url="http://localhost:6333", create=create)


@pytest.mark.parametrize(
    ("options", "place", "words"),
    [
        *[({option: value}, "path", f"a local store .* has no {option}; give the url of a server, or edge")
          for option, value in (("vectors", "float16"), ("tenant", "a"), ("prefer_grpc", True), ("graph", "cold"))],
        ({"shards": 2, "replicas": 2}, "edge", "Qdrant Edge has no shards and no replicas; give the url of a server"),
        ({"prefer_grpc": True}, "edge", "Qdrant Edge has no prefer_grpc"),
    ],
)  # fmt: skip
def test_a_backend_refuses_what_it_lacks(options: dict[str, Any], place: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        open_store(**{place: tmp_path}, collection="images", options=StoreOptions(**options))


def test_a_given_client_keeps_its_own_protocol_and_a_local_one_has_no_options(server: FakeServer) -> None:
    for client, options in (
        (server.client, {"shards": 2}),
        (QdrantClient(server.url, check_compatibility=False), {"prefer_grpc": True}),
    ):
        with pytest.raises(UsageError, match="client has no"):
            open_store(client=client, collection="images", options=StoreOptions(**options))


COLD = {"memory": "cold", "on_disk": True}
PINNED = {"memory": "pinned", "always_ram": True}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"vectors": "float16", "memory": "cold"}, {"vectors": {"datatype": "float16", **COLD}}),
        ({"memory": "cached"}, {"vectors": {"memory": "cached", "on_disk": False}}),
        ({"graph": "cold"}, {"hnsw_config": COLD}),
        ({"graph": "pinned", "hnsw": "after"}, {"hnsw_config": {"m": 0, "memory": "pinned", "on_disk": False}}),
        ({"hnsw": "during"}, {}),
        ({"shards": 12, "replicas": 2}, {"shard_number": 12, "replication_factor": 2}),
        (
            {"quantization": "scalar"},
            {"quantization_config": {"scalar": {"type": "int8", "quantile": 0.99, **PINNED}}},
        ),
        ({"quantization": "binary"}, {"quantization_config": {"binary": PINNED}}),
        ({"quantization": "turbo"}, {"quantization_config": {"turbo": {"bits": "bits4", **PINNED}}}),
        ({"quantization": "turbo1"}, {"quantization_config": {"turbo": {"bits": "bits1", **PINNED}}}),
    ],
)
def test_a_server_is_asked_for_what_was_chosen(
    server: FakeServer, opener: Opener, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    opener(**options).create(SIGNATURE)
    (created,) = server.bodies("PUT", "/collections/images")
    created.pop("metadata")
    vectors = {"size": DIMENSION, "distance": "Cosine", **expected.get("vectors", {})}
    assert created == {**expected, "vectors": vectors}


def test_grpc_carries_the_same_options() -> None:
    asked: list[messages.CreateCollection] = []

    class Collections(grpc.GenericRpcHandler):
        def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(self.create)

        def create(self, request: bytes, _: grpc.ServicerContext) -> bytes:
            asked.append(messages.CreateCollection.FromString(request))
            return messages.CollectionOperationResponse(result=True).SerializeToString()

    listener = grpc.server(ThreadPoolExecutor(1), handlers=[Collections()])
    port = listener.add_insecure_port("127.0.0.1:0")
    listener.start()
    options = StoreOptions(vectors="float16", memory="cold", quantization="turbo2", shards=3, hnsw="after")
    client = QdrantClient(host="127.0.0.1", grpc_port=port, prefer_grpc=True, check_compatibility=False)
    client.create_collection("images", metadata={"cocoa_embed_hnsw": "to be built"}, **creation(SIGNATURE, options))
    client.close()
    listener.stop(None).wait()
    (request,) = asked
    vectors = request.vectors_config.params
    assert (request.shard_number, request.hnsw_config.m, request.hnsw_config.HasField("m")) == (3, 0, True)
    assert (vectors.datatype, vectors.memory) == (messages.Datatype.Float16, messages.Memory.Cold)
    assert request.quantization_config.turboquant.bits == messages.TurboQuantBitSize.Bits2


def test_the_url_of_a_server_is_reached_by_grpc_if_asked(server: FakeServer) -> None:
    for prefer_grpc in (False, True):
        store: Any = open_store(url=server.url, collection="c", options=StoreOptions(prefer_grpc=prefer_grpc))
        assert store._connected()._client._prefer_grpc is prefer_grpc
        store.close()


@pytest.mark.usefixtures("few_payload_indexes")
class TestTheSearchIndexAfterLoading:
    def test_a_run_that_completes_builds_it_once(self, server: FakeServer, opener: Opener) -> None:
        store = opener(hnsw="after")
        store.create(SIGNATURE)
        store.insert(make_points(0, 5))
        assert server.graphs == {"images": 0}
        store.finish()
        assert (server.graphs, store.signature()) == ({"images": 16}, SIGNATURE)
        sent = len(server.bodies("PATCH", "/images"))
        store.create(SIGNATURE)
        store.finish()
        assert (sent, len(server.bodies("PATCH", "/images"))) == (1, 1)

    def test_after_a_kill_the_next_run_builds_it_without_being_asked(self, server: FakeServer, opener: Opener) -> None:
        opener(hnsw="after").create(SIGNATURE)
        store = opener()
        store.create(SIGNATURE)
        assert server.graphs == {"images": 0}, "the next run goes on without it until its end"
        server.fail("PATCH /collections/images", fake_qdrant.drop_after)
        store.finish()
        assert server.graphs == {"images": 16}

    def test_a_graph_that_somebody_else_has_set_or_removed_stays(self, server: FakeServer, opener: Opener) -> None:
        opener(hnsw="after").create(SIGNATURE)
        server.graphs["images"] = 32
        opener().finish()
        assert server.graphs == {"images": 32}
        server.graphs["images"] = 0
        opener().finish()
        assert server.graphs == {"images": 0}


@pytest.mark.usefixtures("few_payload_indexes")
def test_points_of_a_tenant_are_kept_together(server: FakeServer, opener: Opener, tmp_path: Path) -> None:
    for tenant, field in (("user", "metadata.user"), ("metadata.group", "metadata.group"), ("mime", "mime")):
        opener(field.replace(".", "-"), tenant=tenant).create(SIGNATURE)
        schemas = {body["field_name"]: body["field_schema"] for body in server.bodies("PUT", "/index")}
        assert schemas[field] == {"type": "keyword", "is_tenant": True}
    store = open_store(edge=tmp_path / "index", collection="images", options=StoreOptions(tenant="user"))
    store.create(SIGNATURE)
    assert "metadata.user" in store._call(lambda shard: shard.info()).payload_schema
    store.close()


@pytest.mark.usefixtures("few_payload_indexes")
@pytest.mark.parametrize("kind", ["scalar", "binary", "turbo", "turbo2", "turbo1"])
def test_edge_keeps_vectors_as_chosen_and_finds_the_nearest(tmp_path: Path, kind: Any) -> None:  # noqa: ANN401
    options = StoreOptions(quantization=kind, vectors="float16", memory="cold", graph="cold", hnsw="after")
    store = open_store(edge=tmp_path / "index", collection="images", options=options)
    store.create(SIGNATURE)
    config = json.loads((tmp_path / "index/images/edge_config.json").read_text())["vectors"][""]
    assert (config["datatype"], config["memory"], config["hnsw_config"]["memory"]) == ("float16", "cold", "cold")
    assert list(config["quantization_config"]) == [kind.rstrip("12")]
    store.insert(make_points(0, 50))
    store.finish()
    vectors = np.stack([make_vector(number) for number in range(50)])
    cosines = vectors @ vectors[7] / np.linalg.norm(vectors, axis=1) / np.linalg.norm(vectors[7])
    expected = [name(number) for number in np.argsort(-cosines)[:5]]
    for how in ({}, {"exact": True}, {"hnsw_ef": 300}):
        hits = store.search(Query(vectors[7], 5, **how))
        assert [hit.id for hit in hits] == expected, how
        assert [hit.score for hit in hits] == pytest.approx(np.sort(cosines)[::-1][:5], abs=2e-3)
    store.close()


def test_a_local_store_is_exact_and_has_no_hnsw_ef(tmp_path: Path) -> None:
    store = open_store(path=tmp_path / "index", collection="images")
    store.create(SIGNATURE)
    store.insert(make_points(0, 3))
    assert store.search(Query(make_vector(1), 1, exact=True))[0].id == name(1)
    with pytest.raises(UsageError, match="compares all vectors and has no hnsw_ef"):
        store.search(Query(make_vector(1), 1, hnsw_ef=9))
    store.close()
    for wrong in ({"hnsw_ef": 0}, {"hnsw_ef": 2**40}, {"hnsw_ef": 9, "exact": True}):
        with pytest.raises(UsageError, match="give a number from 1 to"):
            QdrantIndexer(None, path=tmp_path / "index").search(like=name(1), **wrong)


@pytest.mark.usefixtures("few_payload_indexes")
class TestAlias:
    @pytest.fixture(params=["url", "path"])
    def place(self, request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
        if request.param == "path":
            return {"path": tmp_path / "index"}
        return {"url": request.getfixturevalue("server").url}

    def test_a_switch_changes_what_is_found_and_written_and_which_model_it_is(self, place: dict[str, Any]) -> None:
        def use(collection: str) -> Any:  # noqa: ANN401
            return open_store(**place, collection=collection)

        for number, collection in enumerate(("first", "second")):
            store = use(collection)
            store.create(Signature(collection, str(number), DIMENSION))
            store.insert(make_points(10 * number, 10 * number + 2 + number))
            store.close()
        for number, collection in enumerate(("first", "second", "second")):
            store = use(collection)
            assert store.set_alias("images") == (None, "first", "second")[number]
            assert store.aliases() == {"images": collection}
            store.close()
            behind = use("images")
            assert behind.require_signature().model == collection
            assert behind.count() == len(behind.search(Query(make_vector(1), 9))) == (2 if number == 0 else 3)
            behind.close()
        store = use("images")
        store.create(Signature("second", "1", DIMENSION))
        store.insert(make_points(20, 21))
        with pytest.raises(CocoaError, match="was made with second"):
            store.create(Signature("first", "0", DIMENSION))
        assert store.set_alias("again") is None
        assert store.aliases()["again"] == "second", "an alias names a collection, not another alias"
        store.close()
        store = use("second")
        assert store.count() == 4
        store.close()

    def test_what_cannot_be_an_alias_is_reported_in_one_sentence(self, place: dict[str, Any], tmp_path: Path) -> None:
        store = open_store(**place, collection="first")
        with pytest.raises(CocoaError, match="there is no collection 'first'"):
            store.set_alias("images")
        store.create(SIGNATURE)
        for alias, words in (
            ("first", "'first' is a collection in .*, not an alias"),
            ("a/b", "is not a valid collection name"),
        ):
            with pytest.raises(UsageError, match=words):
                store.set_alias(alias)
        store.close()
        store = open_store(edge=tmp_path / "edge", collection="first")
        with pytest.raises(UsageError, match="edge has no aliases"):
            store.set_alias("images")


@pytest.mark.usefixtures("few_payload_indexes")
class TestSeed:
    """A snapshot of a server's shard becomes a collection in Qdrant Edge."""

    @pytest.fixture
    def snapshot(self, tmp_path: Path) -> bytes:
        """Five points in a snapshot as a server packs it: a tar file of each segment in a tar file."""
        store = open_store(edge=tmp_path / "origin", collection="images")
        store.create(SIGNATURE)
        store.insert(make_points(0, 5))
        store.close()
        origin, packed = tmp_path / "origin" / "images", io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as snapshot:
            for segment in (origin / "segments").iterdir():
                with tarfile.open(tmp_path / "segment.tar", "w") as inner:
                    inner.add(segment, "snapshot/files")
                snapshot.add(tmp_path / "segment.tar", f"segments/{segment.name}.tar")
            snapshot.add(origin / "wal", "wal")
        return packed.getvalue()

    def test_it_is_the_collection_with_its_signature(
        self, server: FakeServer, opener: Opener, snapshot: bytes, tmp_path: Path, command: Command
    ) -> None:
        opener().create(SIGNATURE)
        opener().set_alias("live")
        words = ("seed", "--url", server.url, "--edge", tmp_path / "index", "--api-key", "hush")
        server.fail("GET /collections/images/shards/0/snapshot", *[fake_qdrant.answer_bytes(snapshot)] * 3)
        assert command(*words).status == command(*words, "--collection", "live").status == 0
        assert server.requests[-1].headers["api-key"] == "hush"
        for collection in ("images", "live"):
            store = open_store(edge=tmp_path / "index", collection=collection)
            assert (store.signature(), store.count()) == (SIGNATURE, 5)
            assert store.search(Query(make_vector(3), 1))[0].id == name(3)
            store.insert(make_points(5, 6))
            store.close()
        assert "collection 'images' in" in command(*words).error()
        store = open_store(edge=tmp_path / "index", collection="images")
        assert store.count() == 6, "what is there already stays"
        store.close()

    @pytest.mark.parametrize(
        ("answer", "words"),
        [
            (fake_qdrant.answer_status(403), "403 Forbidden"),
            (fake_qdrant.answer_bytes(b"no tar file"), "Qdrant Edge at .* failed"),
            (fake_qdrant.drop, "Server disconnected"),
        ],
    )
    def test_what_fails_leaves_no_collection(
        self, server: FakeServer, opener: Opener, tmp_path: Path, command: Command, answer: Any, words: str  # noqa: ANN401
    ) -> None:  # fmt: skip
        opener().create(SIGNATURE)
        server.fail("/snapshot", answer)
        error = command("seed", "--url", server.url, "--edge", tmp_path / "index").error()
        assert re.search(words, error)
        assert open_store(edge=tmp_path / "index", collection="images").signature() is None

    def test_a_collection_of_several_shards_is_refused_with_the_way_out(
        self, server: FakeServer, opener: Opener, tmp_path: Path, command: Command
    ) -> None:
        opener().create(SIGNATURE)
        server.shards = 4
        error = command("seed", "--url", server.url, "--edge", tmp_path / "index").error()
        assert "has 4 shards, but Qdrant Edge takes one; load the embeddings with --edge instead" in error
