import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_model import FakeModel, colour_image, write_colours
from PIL import Image

pytest.importorskip("llama_index.core")
pytest.importorskip("qdrant_client")

from fake_llm import FakeLLM
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.llms import ImageBlock
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever, RouterRetriever
from llama_index.core.retrievers.fusion_retriever import FUSION_MODES
from llama_index.core.schema import (
    ImageNode,
    MetadataMode,
    NodeWithScore,
    QueryBundle,
    TextNode,
)
from llama_index.core.selectors import EmbeddingSingleSelector
from llama_index.core.tools import RetrieverTool
from llama_index.core.vector_stores import FilterOperator, MetadataFilter, MetadataFilters
from qdrant_client import QdrantClient, models

from cocoa_embed.errors import ImageError, UsageError
from cocoa_embed.integrations.llama_index import CocoaEmbedding, CocoaRetriever
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer

COLOURS = ("red", "green", "blue", "yellow")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return write_colours(tmp_path, *COLOURS)


@pytest.fixture
def indexed(files: list[str]) -> Iterator[tuple[QdrantIndexer, QdrantClient]]:
    client = QdrantClient(":memory:")
    with QdrantIndexer(FakeModel(), client=client) as index:
        index.index(files, progress=False)
        yield index, client
    client.close()


def check(nodes: list[NodeWithScore], path: str) -> None:
    assert isinstance(nodes[0].node, ImageNode)
    assert nodes[0].node.image_path == path
    assert nodes[0].node.image is None
    assert nodes[0].node.metadata["relative_path"] == Path(path).name
    assert nodes[0].score > nodes[1].score


def test_the_retriever_takes_text_images_and_both(indexed: tuple, files: list[str]) -> None:
    index, _ = indexed
    retriever = CocoaRetriever(index, similarity_top_k=2)
    queries = [
        ("green", files[1]),
        (QueryBundle("", image_path=files[2]), files[2]),
        (QueryBundle("yellow", image_path=files[3]), files[3]),
        (QueryBundle("a paraphrase", custom_embedding_strs=["red"]), files[0]),
    ]
    for query, path in queries:
        check(retriever.retrieve(query), path)
        assert retriever.retrieve(query) == asyncio.run(retriever.aretrieve(query))
    assert [sorted(item) for item in index.encoder.model.queries[::3]] == [
        ["text"],
        ["image"],
        ["image", "text"],
        ["text"],
    ]


def test_a_node_shows_the_caption_that_metadata_hold_now(indexed: tuple, files: list[str]) -> None:
    index, _ = indexed
    retriever = CocoaRetriever(index, similarity_top_k=1)
    assert retriever.retrieve("green")[0].node.text == ""
    row = {"file_name": "green.png", "text": "a lawn", "licence": "CC0"}
    (Path(files[1]).parent / "metadata.jsonl").write_text(json.dumps(row))
    embedded = len(index.encoder.model.documents)
    assert index.index(files, progress=False).updated == 1
    assert len(index.encoder.model.documents) == embedded
    (found,) = retriever.retrieve("green")
    assert isinstance(found.node, ImageNode)
    assert found.node.image_path == files[1]
    assert found.node.text == found.node.metadata["caption"] == "a lawn"
    shown = found.node.get_content(MetadataMode.LLM)
    assert "a lawn" in shown
    assert "CC0" in shown


def test_the_retriever_keeps_to_its_threshold(indexed: tuple) -> None:
    index, _ = indexed
    assert len(CocoaRetriever(index).retrieve("red")) == 4
    assert len(CocoaRetriever(index, score_threshold=0.999).retrieve("red")) == 1
    assert CocoaRetriever(index, score_threshold=1.5).retrieve("red") == []


def test_many_retrievals_at_once(indexed: tuple, files: list[str]) -> None:
    async def retrieve() -> list[list[NodeWithScore]]:
        return await asyncio.gather(*(CocoaRetriever(indexed[0]).aretrieve(colour) for colour in COLOURS * 4))

    found = asyncio.run(retrieve())
    assert [nodes[0].node.image_path for nodes in found] == files * 4


def test_the_retriever_passes_over_an_embedding_that_others_left_in_the_query(indexed: tuple, files: list[str]) -> None:
    query = QueryBundle("green", embedding=[1.0, 2.0])
    check(CocoaRetriever(indexed[0]).retrieve(query), files[1])
    assert query.embedding == [1.0, 2.0]


def test_a_query_for_nothing_or_with_a_broken_image_is_refused(indexed: tuple) -> None:
    retriever = CocoaRetriever(indexed[0])
    for nothing in ("", QueryBundle("red", custom_embedding_strs=[])):
        with pytest.raises(UsageError, match="neither a text nor an image"):
            retriever.retrieve(nothing)
    with pytest.raises(ImageError, match=r"gone\.png: does not exist"):
        asyncio.run(retriever.aretrieve(QueryBundle("", image_path="gone.png")))


def test_filters_choose_among_the_points(files: list[str]) -> None:
    rows = [{"file_name": f"{colour}.png", "text": colour, "n": n} for n, colour in enumerate(COLOURS)]
    folder = Path(files[0]).parent
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    late = MetadataFilters(filters=[MetadataFilter(key="n", value=2, operator=FilterOperator.GTE)])
    with QdrantIndexer(FakeModel(), client=QdrantClient(":memory:")) as index:
        index.index(folder, progress=False)
        retriever = CocoaRetriever(index, filters=late)
        assert {node.node.image_path for node in retriever.retrieve("red")} == set(files[2:])
        assert retriever.retrieve("red") == asyncio.run(retriever.aretrieve("red"))
        same = CocoaRetriever(index, filters=retriever.query_filter)
        assert same.retrieve("red") == retriever.retrieve("red")
        nothing = MetadataFilters(filters=[MetadataFilter(key="n", value=9)])
        assert CocoaRetriever(index, filters=nothing).retrieve("red") == []
        assert len(CocoaRetriever(index, filters=MetadataFilters(filters=[])).retrieve("red")) == 4
    with pytest.raises(UsageError, match="the operator in needs a list"):
        CocoaRetriever(index, filters=MetadataFilters(filters=[MetadataFilter(key="n", value=9, operator="in")]))


def test_points_of_others_do_not_spoil_a_query(indexed: tuple, files: list[str]) -> None:
    index, client = indexed
    vector = index.encoder.embed_documents([{"image": colour_image("red")}])[0].tolist()
    others = [{"path": "/theirs.png", "caption": "theirs"}, {"text": "a text of theirs"}, {"_node_content": "{"}]
    points = [models.PointStruct(id=n, vector=vector, payload=payload) for n, payload in enumerate(others)]
    client.upsert("images", points=points)
    nodes = {node.node_id: node.node for node in CocoaRetriever(index).retrieve("red")}
    assert len(nodes) == 7
    assert (nodes["0"].image_path, nodes["0"].text) == ("/theirs.png", "theirs")
    assert (type(nodes["1"]), nodes["1"].text) == (TextNode, "a text of theirs")
    assert {node.image_path for node in nodes.values() if isinstance(node, ImageNode)} == {"/theirs.png", *files}


def test_callbacks_are_told_of_retrievals(indexed: tuple, files: list[str]) -> None:
    handler = LlamaDebugHandler(print_trace_on_end=False)
    retriever = CocoaRetriever(indexed[0], similarity_top_k=1, callback_manager=CallbackManager([handler]))
    nodes = [retriever.retrieve("blue"), asyncio.run(retriever.aretrieve("blue"))]
    pairs = handler.get_event_pairs(CBEventType.RETRIEVE)
    assert [start.payload[EventPayload.QUERY_STR] for start, _ in pairs] == ["blue"] * 2
    assert [end.payload[EventPayload.NODES] for _, end in pairs] == nodes


def test_retrievers_are_fused(indexed: tuple, files: list[str]) -> None:
    index, _ = indexed
    first, second = CocoaRetriever(index, similarity_top_k=1), CocoaRetriever(index, similarity_top_k=3)
    for mode in FUSION_MODES:
        fused = QueryFusionRetriever(
            [first, second], llm=FakeLLM(), mode=mode, num_queries=1, similarity_top_k=2, use_async=False
        )
        check(fused.retrieve("blue"), files[2])
        check(asyncio.run(fused.aretrieve("blue")), files[2])


def test_a_router_chooses_a_retriever(indexed: tuple, files: list[str]) -> None:
    index, _ = indexed
    embedding = CocoaEmbedding(model=index.encoder)
    tools = [
        RetrieverTool.from_defaults(CocoaRetriever(index, similarity_top_k=top_k), description=colour)
        for top_k, colour in ((1, "red"), (2, "blue"))
    ]
    selector = EmbeddingSingleSelector.from_defaults(embed_model=embedding)
    router = RouterRetriever(selector, tools, llm=FakeLLM())
    assert [node.node.image_path for node in router.retrieve("red")] == files[:1]
    check(router.retrieve("blue"), files[2])
    check(asyncio.run(router.aretrieve("blue")), files[2])


def test_a_query_engine_shows_the_images_to_a_language_model(indexed: tuple, files: list[str]) -> None:
    llm = FakeLLM("a red picture")
    engine = RetrieverQueryEngine.from_args(
        CocoaRetriever(indexed[0]),
        llm=llm,
        node_postprocessors=[SimilarityPostprocessor(similarity_cutoff=0.999)],
        multimodal=True,
    )
    response = engine.query("red")
    assert str(response) == "a red picture"
    assert [node.node.image_path for node in response.source_nodes] == files[:1]
    blocks = [block for message in llm.asked[-1] for block in message.blocks]
    (image,) = [block for block in blocks if isinstance(block, ImageBlock)]
    assert Image.open(image.resolve_image()).getpixel((0, 0)) == (255, 0, 0)
    assert str(asyncio.run(engine.aquery("red"))) == "a red picture"


@pytest.mark.parametrize("home", ["path", "edge"])
def test_every_home_is_retrieved_from(home: str, files: list[str], tmp_path: Path) -> None:
    if home == "edge":
        pytest.importorskip("qdrant_edge")
        pytest.importorskip("cocoa_embed.integrations.qdrant.stores.edge")
    wide = MetadataFilters(filters=[MetadataFilter(key="width", value=24), MetadataFilter(key="author", value="Ann")])
    narrow = MetadataFilters(filters=[MetadataFilter(key="width", value=24, operator=FilterOperator.LT), wide])
    rows = [{"file_name": Path(file).name, "author": "Ann"} for file in files[:3]]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with QdrantIndexer(FakeModel(), **{home: tmp_path / "store"}) as index:
        index.index(files, progress=False)
        retriever = CocoaRetriever(index, similarity_top_k=2, filters=wide)
        check(retriever.retrieve("green"), files[1])
        check(retriever.retrieve(QueryBundle("", image_path=files[2])), files[2])
        assert asyncio.run(retriever.aretrieve("green")) == retriever.retrieve("green")
        assert CocoaRetriever(index, filters=narrow).retrieve("green") == []
        assert len(CocoaRetriever(index, filters=wide).retrieve("green")) == 3
