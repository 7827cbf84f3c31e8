import asyncio
from typing import Any

import pytest
from llama_index.core.llms import ImageBlock, MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle
from llama_index.core.vector_stores import FilterOperator, MetadataFilter, MetadataFilters
from PIL import Image

from cocoa_embed.errors import ImageError
from cocoa_embed.integrations.llama_index import CocoaRetriever
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer


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
        assert (type(first.node), paths([first])) == (ImageNode, [path])
        assert first.score > second.score
        assert retriever.retrieve(query) == asyncio.run(retriever.aretrieve(query))
    kinds = [sorted(item) for item in indexer.encoder.model.queries[::3]]
    assert kinds == [["text"], ["image"], ["image", "text"], ["text"]]
    with pytest.raises(ImageError, match=r"gone\.png: does not exist"):
        asyncio.run(retriever.aretrieve(QueryBundle("", image_path="gone.png")))


def test_threshold_and_filters_narrow_the_nodes(indexer: QdrantIndexer, files: list[str]) -> None:
    def found(**options: Any) -> list[str]:
        return sorted(paths(CocoaRetriever(indexer, **options).retrieve("red")))

    assert found() == found(filters=MetadataFilters(filters=[])) == sorted(files)
    assert found(score_threshold=0.999) == files[:1]
    assert found(filters=where(n=9)) == found(score_threshold=1.5) == []
    late = CocoaRetriever(indexer, filters=where(">=", n=2))
    assert found(filters=where(">=", n=2)) == found(filters=late.query_filter) == sorted(files[2:])


def test_query_engines_and_fusion_take_the_retriever(indexer: QdrantIndexer, files: list[str], llm: MockLLM) -> None:
    retriever = CocoaRetriever(indexer, similarity_top_k=1)
    llm.reply = "a red picture"
    engine = RetrieverQueryEngine.from_args(retriever, llm=llm, multimodal=True)
    for response in (engine.query("red"), asyncio.run(engine.aquery("red"))):
        assert str(response) == "a red picture"
        assert paths(response.source_nodes) == files[:1]
        (image,) = [block for message in llm.prompts[-1] for block in message.blocks if isinstance(block, ImageBlock)]
        assert Image.open(image.resolve_image()).getpixel((0, 0)) == (255, 0, 0)
    fused = QueryFusionRetriever([retriever, retriever], llm=llm, num_queries=1, similarity_top_k=2, use_async=False)
    assert paths(fused.retrieve("blue"))[0] == paths(asyncio.run(fused.aretrieve("blue")))[0] == files[2]
