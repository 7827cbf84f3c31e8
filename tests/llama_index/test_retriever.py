import asyncio
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel
from fake_qdrant import fake_server
from llama_index.core.base.base_multi_modal_retriever import MultiModalRetriever
from llama_index.core.constants import DEFAULT_SIMILARITY_TOP_K
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import ImageBlock, MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import (
    Document,
    ImageNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeWithScore,
    QueryBundle,
    TextNode,
)
from llama_index.core.vector_stores import FilterOperator, MetadataFilter, MetadataFilters
from llama_index.core.vector_stores.utils import node_to_metadata_dict
from llama_index.vector_stores.qdrant import QdrantVectorStore
from PIL import Image
from qdrant_client import QdrantClient, models
from source_files import pdf, tar

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError, ImageError, UsageError
from cocoa_embed.integrations.llama_index import CocoaEmbedding, CocoaRetriever
from cocoa_embed.integrations.llama_index.nodes import StoredImage
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer
from cocoa_embed.integrations.qdrant.points import plain_payload


def paths(nodes: list[NodeWithScore]) -> list[str]:
    return [node.node.image_path for node in nodes if isinstance(node.node, ImageNode)]


def where(operator: str = "==", **values: str | int) -> MetadataFilters:
    filters = [MetadataFilter(key=key, value=value, operator=FilterOperator(operator)) for key, value in values.items()]
    return MetadataFilters(filters=filters)


def test_a_query_is_a_text_an_image_or_both(indexer: QdrantIndexer, files: list[str]) -> None:
    retriever = CocoaRetriever(indexer, similarity_top_k=2)
    queries: list[tuple[str | QueryBundle, str]] = [
        ("green", files[1]),
        (QueryBundle("", image_path=files[2]), files[2]),
        (QueryBundle("yellow", image_path=files[3], embedding=[1.0, 2.0]), files[3]),
        (QueryBundle("a paraphrase", custom_embedding_strs=["red"]), files[0]),
    ]
    for query, path in queries:
        first, second = retriever.retrieve(query)
        assert (type(first.node), paths([first])) == (StoredImage, [path])
        assert first.score > second.score
        assert retriever.retrieve(query) == asyncio.run(retriever.aretrieve(query))
    kinds = [sorted(item) for item in indexer.encoder.model.queries[::3]]
    assert kinds == [["text"], ["image"], ["image", "text"], ["text"]]
    with pytest.raises(ImageError, match=r"gone\.png: does not exist"):
        asyncio.run(retriever.aretrieve(QueryBundle("", image_path="gone.png")))


def test_threshold_and_filters_narrow_the_nodes(indexer: QdrantIndexer, files: list[str]) -> None:
    def found(**options: Any) -> list[str]:
        return sorted(paths(CocoaRetriever(indexer, similarity_top_k=10, **options).retrieve("red")))

    assert found() == found(filters=MetadataFilters(filters=[])) == sorted(files)
    assert found(score_threshold=0.999) == files[:1]
    assert found(filters=where(n=9)) == found(score_threshold=1.5) == []
    late = CocoaRetriever(indexer, 10, filters=where(">=", n=2))
    assert found(filters=where(">=", n=2)) == found(filters=late.query_filter) == sorted(files[2:])


def test_query_engines_and_fusion_take_the_retriever(indexer: QdrantIndexer, files: list[str], llm: MockLLM) -> None:
    retriever = CocoaRetriever(indexer, similarity_top_k=1)
    llm.reply = "a red picture"
    engine = RetrieverQueryEngine.from_args(retriever, llm=llm, multimodal=True)
    for response in (engine.query("red"), asyncio.run(engine.aquery("red"))):
        assert str(response) == "a red picture"
        assert paths(response.source_nodes) == files[:1]
        before, image, _ = llm.prompts[-1][1].blocks
        assert "a red field" in before.text, "the caption is beside the image"
        assert Image.open(image.resolve_image()).getpixel((0, 0))[0] > 250
    fused = QueryFusionRetriever([retriever, retriever], llm=llm, num_queries=1, similarity_top_k=2, use_async=False)
    assert paths(fused.retrieve("blue"))[0] == paths(asyncio.run(fused.aretrieve("blue")))[0] == files[2]


def test_it_has_the_methods_and_defaults_of_llama_indexs_retriever(
    indexer: QdrantIndexer, files: list[str], embedding: CocoaEmbedding, client: QdrantClient
) -> None:
    retriever = CocoaRetriever(indexer)
    assert isinstance(retriever, MultiModalRetriever)
    assert retriever.similarity_top_k == retriever.image_similarity_top_k == DEFAULT_SIMILARITY_TOP_K == 2
    assert paths(retriever.retrieve("red"))[0] == files[0]
    by_image = retriever.image_to_image_retrieve(files[2])
    assert (paths(by_image)[0], len(by_image)) == (files[2], 2)
    assert retriever.image_to_image_retrieve(QueryBundle("", image_path=Path(files[2]).as_uri())) == by_image
    assert asyncio.run(retriever.aimage_to_image_retrieve(files[2])) == by_image
    by_text = CocoaRetriever(indexer, image_similarity_top_k=1).text_to_image_retrieve("blue")
    assert paths(by_text) == files[2:3]
    assert asyncio.run(retriever.atext_to_image_retrieve("blue"))[:1] == by_text
    assert retriever.text_retrieve("red") == asyncio.run(retriever.atext_retrieve("red")) == []
    with pytest.raises(ImageError, match=r"not among the allowed hosts; .*allowed_hosts= in Python"):
        retriever.image_to_image_retrieve("http://127.0.0.1/a.png")
    store = QdrantVectorStore("mixed", client=client)
    nodes = [
        *(TextNode(text=text) for text in ("red", "red red")),
        *(ImageNode(image_path=each) for each in files[1:3]),
    ]
    IngestionPipeline(transformations=[embedding], vector_store=store, disable_cache=True).run(nodes=nodes)
    mixed = CocoaRetriever(QdrantIndexer(embedding.encoder, client=client, collection="mixed"))
    assert sorted(each.node.text for each in mixed.text_retrieve("green")) == ["red", "red red"]
    assert not paths(mixed.retrieve("red")), "an image is nearer than the texts"
    assert sorted(paths(mixed.text_to_image_retrieve("red"))) == sorted(files[1:3])
    assert sorted(paths(mixed.image_to_image_retrieve(files[0]))) == sorted(files[1:3])


def test_a_node_or_a_document_is_a_text_or_an_image_by_its_content(
    embedding: CocoaEmbedding, client: QdrantClient, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [
        *[Node(text_resource=MediaResource(text="red")) for _ in range(200)],
        *[Document(image_resource=MediaResource(path=Path(file))) for file in files[:2]],
        *[ImageNode(image_path=file) for file in files[2:]],
    ]
    store = QdrantVectorStore("mixed", client=client)
    IngestionPipeline(transformations=[embedding], vector_store=store, disable_cache=True).run(nodes=nodes)
    indexer = QdrantIndexer(embedding.encoder, client=client, collection="mixed")
    requests: list[int] = []
    search = indexer.store.search_batch
    monkeypatch.setattr(indexer.store, "search_batch", lambda queries: requests.append(1) or search(queries))
    for limit in (3, 4, 5):
        requests.clear()
        retriever = CocoaRetriever(indexer, limit)
        images = paths(retriever.text_to_image_retrieve("red"))
        assert (images[0], len(images)) == (files[0], min(limit, 4))
        assert len(requests) == 3, "as many as for any number of texts"
        assert [each.node.get_content() for each in retriever.text_retrieve("blue")] == ["red"] * limit
    embedded = len(embedding.encoder.model.queries)
    assert len(retriever.text_to_image_retrieve("red")) == 4
    assert len(embedding.encoder.model.queries) == embedded + 1, "once, even if it is searched for again"
    diverse = CocoaRetriever(indexer, 4, diversity=0.5).text_to_image_retrieve("red")
    assert sorted(paths(diverse)) == sorted(files)


def test_several_texts_are_one_query_with_the_mean_of_their_embeddings(
    indexer: QdrantIndexer, files: list[str]
) -> None:
    texts = ["red", "blue", ""]
    red, blue, image = (
        indexer.encoder.embed_queries([item])[0]
        for item in ({"text": "red"}, {"text": "blue"}, {"image": Image.open(files[1]).convert("RGB")})
    )
    (found,) = CocoaRetriever(indexer, 1).retrieve(QueryBundle("a question", custom_embedding_strs=texts))
    mean = (red + blue) / np.linalg.norm(red + blue)
    assert found.score == pytest.approx(max(mean @ red, mean @ blue), abs=1e-5)
    assert mean @ image < found.score
    (both, *_) = CocoaRetriever(indexer).retrieve(QueryBundle("", image_path=files[1], custom_embedding_strs=texts))
    assert [sorted(item) for item in indexer.encoder.model.queries[-2:]] == [["image", "text"]] * 2
    picture = Image.open(files[1]).convert("RGB")
    mean = indexer.encoder.embed_queries([{"text": text, "image": picture} for text in ("red", "blue")]).mean(axis=0)
    document = indexer.encoder.embed_documents([{"image": Image.open(both.node.image_path).convert("RGB")}])[0]
    assert both.score == pytest.approx(mean @ document / np.linalg.norm(mean), abs=1e-5)


def test_what_is_no_indexer_and_hosts_that_are_no_list_are_refused(
    indexer: QdrantIndexer, embedding: CocoaEmbedding
) -> None:
    with pytest.raises(UsageError, match=r"indexer is a CocoaEmbedding; give QdrantIndexer\(embedding.encoder"):
        CocoaRetriever(embedding)
    with pytest.raises(UsageError, match=r"'a.example'; give a list, as in \['a.example'\]"):
        CocoaRetriever(indexer, allowed_hosts="a.example")


def test_images_are_retrieved_from_a_server_that_takes_filters_on_indexed_fields_only(
    embedding: CocoaEmbedding, folder: Path, files: list[str]
) -> None:
    with fake_server() as server, QdrantIndexer(embedding.encoder, url=server.url) as indexer:
        server.is_strict = True
        indexer.index(folder, progress=False)
        retriever = CocoaRetriever(indexer, 1)
        assert paths(retriever.text_to_image_retrieve("red")) == files[:1]
        with pytest.raises(UsageError, match="_node_type"):
            retriever.text_retrieve("red")
        indexer.create_payload_index("_node_type")
        assert paths(retriever.text_to_image_retrieve("red")) == files[:1]
        assert retriever.text_retrieve("red") == []


def test_diverse_nodes_are_retrieved_on_request(indexer: QdrantIndexer, files: list[str]) -> None:
    near = paths(CocoaRetriever(indexer, 4).image_to_image_retrieve(files[0]))
    assert paths(CocoaRetriever(indexer, 2, diversity=0.0).image_to_image_retrieve(files[0])) == near[:2]
    apart = paths(CocoaRetriever(indexer, 4, diversity=0.95).image_to_image_retrieve(files[0]))
    assert (apart[0], sorted(apart)) == (near[0], sorted(near))
    assert apart != near


def test_a_pickled_retriever_and_indexer_open_again_where_they_are_used(
    tmp_path: Path, folder: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fake").mkdir()
    monkeypatch.setattr("cocoa_embed.integrations.qdrant.indexer.open_encoder", lambda *_, **__: Encoder(FakeModel()))
    encoder = Encoder(FakeModel(), str(tmp_path / "fake"))
    for model in (encoder, str(tmp_path / "fake")):
        with QdrantIndexer(model, path=tmp_path / "index", collection="mine", batch_size=7) as indexer:
            indexer.index(folder, progress=False)
            retriever = CocoaRetriever(indexer, 3, filters=where(">=", n=1), score_threshold=0.1)
            expected = retriever.retrieve("blue")
            pickled = pickle.dumps(retriever)
        assert len(pickled) < 3000
        again = pickle.loads(pickled)
        assert [each.node for each in again.retrieve("blue")] == [each.node for each in expected]
        assert (again._indexer.batch_size, again._indexer.store.collection) == (7, "mine")
        again._indexer.close()
    for lost, words in (
        (QdrantIndexer(encoder, client=QdrantClient(":memory:")), "cannot share its client; give path, url or edge"),
        (QdrantIndexer(encoder, path=":memory:"), "cannot share its client"),
        (QdrantIndexer(FakeModel(), path=tmp_path / "index"), "would find no model 'the model'"),
    ):
        with pytest.raises(CocoaError, match=words):
            pickle.dumps(lost)


def test_a_payload_without_a_node_becomes_the_node_that_llama_index_would_read(
    indexer: QdrantIndexer, files: list[str]
) -> None:
    retriever = CocoaRetriever(indexer, 4)
    expected = {each.node.node_id: each.node for each in retriever.retrieve("red")}
    for id_, payload in indexer.store.retrieve([*expected]).items():
        indexer.store.replace_payloads([(id_, payload, plain_payload(payload))])
    for each in retriever.retrieve("red"):
        assert each.node == expected[each.node.node_id]
        assert each.node.get_content(MetadataMode.LLM).count("\n") < 6, "a model sees no hashes"
        assert "sha256" not in each.node.get_content(MetadataMode.EMBED)


def test_a_node_has_the_first_path_that_exists_or_the_thumbnail(
    indexer: QdrantIndexer, folder: Path, files: list[str], tmp_path: Path
) -> None:
    shutil.copy(files[0], folder / "copy.png")
    indexer.index(folder, thumbnails=tmp_path / "small", progress=False)
    (thumbnail,) = {hit.payload["thumbnail"] for hit in indexer.search("red", limit=1)}
    for gone, expected in ((files[0], str(folder / "copy.png")), (str(folder / "copy.png"), thumbnail)):
        Path(gone).unlink()
        (found,) = CocoaRetriever(indexer, 1).retrieve("red")
        assert found.node.image_path == expected


def test_images_inside_of_other_files_are_read_when_a_chat_model_is_shown_them(
    client: QdrantClient, embedding: CocoaEmbedding, folder: Path, files: list[str], tmp_path: Path, llm: MockLLM
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "a.tar").write_bytes(tar([("red.png", Path(files[0]).read_bytes())]))
    (shards / "report.pdf").write_bytes(pdf("blue", "white"))
    indexer = QdrantIndexer(embedding.encoder, client=client, collection="shards")
    indexer.index(shards, thumbnails=tmp_path / "small", progress=False)
    retriever = CocoaRetriever(indexer, similarity_top_k=1)
    for query, key, colour in (("red", "a.tar#red.png", (255, 0, 0)), ("blue", "report.pdf#page=1", (0, 0, 255))):
        (found,) = retriever.retrieve(query)
        assert (found.node.image_path, found.node.image) == (str(shards / key), None), "nothing is read yet"
        assert paths(retriever.image_to_image_retrieve(found.node.image_path)) == [found.node.image_path]
        again = pickle.loads(pickle.dumps(found.node))
        (read,) = Image.open(again.resolve_image()).convert("RGB").getcolors()
        assert np.abs(np.subtract(read[1], colour)).max() <= 1
        engine = RetrieverQueryEngine.from_args(retriever, llm=llm, multimodal=True)
        engine.query(query)
        (image,) = [block for message in llm.prompts[-1] for block in message.blocks if isinstance(block, ImageBlock)]
        shown = Image.open(image.resolve_image())
        assert shown.size == ((24, 16) if query == "red" else (120, 80)), "the image, not its thumbnail"
    (shards / "a.tar").write_bytes(tar([("other.png", b"")]))
    (small,) = retriever.retrieve("red")
    assert Image.open(small.node.resolve_image()).format == "JPEG", "the thumbnail of an image that is gone"


def test_an_image_that_is_gone_does_not_end_a_query(
    indexer: QdrantIndexer,
    files: list[str],
    llm: MockLLM,
    caplog: pytest.LogCaptureFixture,
    client: QdrantClient,
) -> None:
    Path(files[0]).unlink()
    payload = {"image_path": None, **node_to_metadata_dict(ImageNode(image_url="http://127.0.0.1/a.png", text="u"))}
    vector = indexer.encoder.embed_queries([{"text": "red"}])[0].tolist()
    client.upsert("images", points=[models.PointStruct(id=1, vector=vector, payload=payload)])
    engine = RetrieverQueryEngine.from_args(CocoaRetriever(indexer, 3), llm=llm, multimodal=True)
    response = engine.query("red")
    assert len(response.source_nodes) == 3
    blocks = [block for message in llm.prompts[-1] for block in message.blocks]
    assert sum(isinstance(block, ImageBlock) for block in blocks) == 1
    assert any("a red field" in str(getattr(block, "text", "")) for block in blocks)
    assert "red.png: does not exist; a chat model is not shown the image" in caplog.text
    assert "not among the allowed hosts" in caplog.text, "LlamaIndex itself fetches any address"
