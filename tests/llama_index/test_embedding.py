import asyncio
import copy
import pickle
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, write_colours
from PIL import Image

pytest.importorskip("llama_index.core")
pytest.importorskip("qdrant_client")

from exported import write_checkpoint
from llama_index.core import Document, Settings, VectorStoreIndex
from llama_index.core.bridge.pydantic import Field
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent, EmbeddingStartEvent
from llama_index.core.schema import (
    BaseNode,
    ImageDocument,
    ImageNode,
    TextNode,
)
from llama_index.core.storage.kvstore import SimpleKVStore

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError, ImageError, UsageError
from cocoa_embed.integrations.llama_index.embedding import CocoaEmbedding
from cocoa_embed.model.backbone import load_backbone
from cocoa_embed.model.export import export_model
from cocoa_embed.model.loading import load_model

COLOURS = ("red", "green", "blue", "yellow")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return write_colours(tmp_path, *COLOURS)


@pytest.fixture
def embedding() -> CocoaEmbedding:
    return CocoaEmbedding("fake", model=FakeModel(), embed_batch_size=3)


@pytest.fixture(scope="module")
def model_folder(tiny_backbone_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model as a SentenceTransformer's folder."""
    folder = tmp_path_factory.mktemp("model")
    checkpoint = write_checkpoint(load_backbone(str(tiny_backbone_path), max_length=128), folder / "checkpoint")
    return export_model(checkpoint, folder / "tiny")


def model_of(embedding: CocoaEmbedding) -> FakeModel:
    return embedding._encoder.model


def test_a_text_and_an_image_of_it_are_near(embedding: CocoaEmbedding, files: list[str]) -> None:
    query = embedding.get_query_embedding("red")
    images = np.array(embedding.get_image_embedding_batch(files))
    assert isinstance(query, list)
    assert isinstance(query[0], float)
    assert int(np.argmax(images @ query)) == COLOURS.index("red")


def test_queries_and_documents_get_the_prompts_of_their_kind(embedding: CocoaEmbedding, files: list[str]) -> None:
    embedding.get_query_embedding("red")
    embedding.get_text_embedding("blue")
    embedding.get_image_embedding(files[0])
    model = model_of(embedding)
    assert model.queries == [{"text": "red"}]
    assert [sorted(item) for item in model.documents] == [["text"], ["image"]]


def test_a_query_that_is_the_path_of_an_image_stays_text(embedding: CocoaEmbedding, files: list[str]) -> None:
    embedding.get_query_embedding(files[0])
    embedding.get_text_embedding(files[0])
    assert model_of(embedding).queries == model_of(embedding).documents == [{"text": files[0]}]


def test_batches_reach_the_model_as_batches(embedding: CocoaEmbedding, files: list[str]) -> None:
    embedding.get_text_embedding_batch(list(COLOURS))
    embedding.get_image_embedding_batch(files)
    assert model_of(embedding).batches == [3, 1, 3, 1]


def test_async_equals_sync_batch_by_batch_and_never_two_at_once(embedding: CocoaEmbedding, files: list[str]) -> None:
    async def embed() -> tuple[list, ...]:
        return await asyncio.gather(
            embedding.aget_query_embedding("red"),
            embedding.aget_text_embedding("blue"),
            embedding.aget_image_embedding(files[0]),
            embedding.aget_text_embedding_batch(list(COLOURS)),
            embedding.aget_image_embedding_batch(files * 5),
        )

    assert asyncio.run(embed()) == [
        embedding.get_query_embedding("red"),
        embedding.get_text_embedding("blue"),
        embedding.get_image_embedding(files[0]),
        embedding.get_text_embedding_batch(list(COLOURS)),
        embedding.get_image_embedding_batch(files * 5),
    ]
    assert len(model_of(embedding).threads) > 1


def test_a_broken_image_is_named(embedding: CocoaEmbedding, tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>")
    with pytest.raises(CocoaError, match=r"page\.jpg: is not an image"):
        embedding.get_image_embedding(str(tmp_path / "page.jpg"))


def test_it_is_a_multimodal_embedding_of_llama_index(embedding: CocoaEmbedding) -> None:
    assert isinstance(embedding, MultiModalEmbedding)
    assert CocoaEmbedding.class_name() == "CocoaEmbedding"
    assert CocoaEmbedding(model=FakeModel()).embed_batch_size == 10
    for size in (0, 2049):
        with pytest.raises(ValueError, match="embed_batch_size"):
            CocoaEmbedding(model=FakeModel(), embed_batch_size=size)


@pytest.mark.parametrize(
    "text", ["", " \n", "https://example.com/red.png", "data:image/png;base64,iVBORw0KGgo=", "red.png"]
)
def test_a_text_stays_a_text_whatever_it_looks_like(
    embedding: CocoaEmbedding, files: list[str], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(Path(files[0]).parent)
    embedding.get_query_embedding(text)
    embedding.get_text_embedding(text)
    assert embedding.get_text_embedding_batch([text, text])
    model = model_of(embedding)
    assert model.queries == [{"text": text}]
    assert model.documents == [{"text": text}] * 3


def test_an_image_may_be_a_path_bytes_or_a_picture(embedding: CocoaEmbedding, files: list[str]) -> None:
    data = Path(files[2]).read_bytes()
    one = embedding.get_image_embedding(files[2])
    for image in (Path(files[2]), data, BytesIO(data), Image.open(files[2])):
        assert embedding.get_image_embedding(image) == one
    with BytesIO(data) as stream:
        stream.seek(0, 2)
        assert embedding.get_image_embedding(stream) == one


def test_a_real_model_embeds_whatever_a_text_is(model_folder: Path) -> None:
    embedding = CocoaEmbedding(model_folder, device="cpu")
    for text in ("", " \n", str(model_folder), "https://example.com/red.png", "data:image/png;base64,iVBORw0KGgo="):
        vectors = np.array([embedding.get_query_embedding(text), embedding.get_text_embedding(text)])
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)


def test_nothing_to_embed_is_nothing(embedding: CocoaEmbedding) -> None:
    assert embedding.get_text_embedding_batch([]) == embedding.get_image_embedding_batch([]) == []
    assert asyncio.run(embedding.aget_image_embedding_batch([])) == []
    assert embedding([]) == []


def test_what_the_model_refuses_is_named(embedding: CocoaEmbedding, files: list[str], tmp_path: Path) -> None:
    thin = tmp_path / "thin.png"
    Image.new("RGB", (201, 1)).save(thin)
    with pytest.raises(ImageError, match=r"thin\.png: cannot be embedded \(absolute aspect ratio must"):
        embedding.get_image_embedding_batch([files[0], str(thin), files[1]])
    with pytest.raises(CocoaError, match=r"the text 'a <.image_pad.>' cannot be embedded \(image features and"):
        embedding.get_text_embedding_batch(["red", "a <|image_pad|>"])
    with pytest.raises(CocoaError, match="does not take the query"):
        embedding.get_query_embedding("a <|image_pad|>")
    with pytest.raises(UsageError, match="not valid Unicode"):
        embedding.get_text_embedding("\udcff")


def test_settings_come_back_and_hold_no_secret(model_folder: Path) -> None:
    settings = {"device": "cpu", "dimension": 16, "embed_batch_size": 3, "num_workers": 2}
    cache = SimpleKVStore()
    embedding = CocoaEmbedding(model_folder, embeddings_cache=cache, **settings)
    stored = embedding.to_dict()
    assert stored == {"class_name": "CocoaEmbedding", "model_name": str(model_folder), **settings}
    assert embedding.to_payload().keys() == {"class_name", "model_name", "embed_batch_size"}
    for loaded in (CocoaEmbedding.from_dict(stored), CocoaEmbedding.from_json(embedding.to_json())):
        assert loaded.to_dict() == stored
        assert loaded.get_query_embedding("a red ring") == embedding.get_query_embedding("a red ring")
        assert len(loaded.get_text_embedding("a red ring")) == 16


def test_a_copy_shares_the_model(embedding: CocoaEmbedding) -> None:
    for copied in (copy.copy(embedding), copy.deepcopy(embedding), embedding.model_copy(deep=True)):
        assert copied is not embedding
        assert copied.encoder is embedding.encoder
        assert copied.to_dict() == embedding.to_dict()
        copied.embed_batch_size = 7
        assert embedding.embed_batch_size == 3
        assert asyncio.run(copied.aget_text_embedding("red")) == embedding.get_text_embedding("red")


def test_a_pickled_embedding_loads_its_model_when_it_is_needed(model_folder: Path) -> None:
    embedding = CocoaEmbedding(model_folder, dimension=16, embed_batch_size=3)
    pickled = pickle.dumps(embedding)
    assert len(pickled) < 2000
    other = pickle.loads(pickled)
    assert other.to_dict() == embedding.to_dict()
    assert other._encoder is None
    assert other.get_text_embedding("a red ring") == embedding.get_text_embedding("a red ring")
    model_folder.rename(model_folder.with_name("elsewhere"))
    try:
        lost = pickle.loads(pickled)
        with pytest.raises(CocoaError, match="there is no such model folder"):
            lost.get_text_embedding("a red ring")
    finally:
        model_folder.with_name("elsewhere").rename(model_folder)


def test_an_embedding_of_a_loaded_model_without_a_name_stays_in_its_process(model_folder: Path) -> None:
    for embedding in (CocoaEmbedding(model=FakeModel()), CocoaEmbedding("fake", model=Encoder(FakeModel()))):
        with pytest.raises(
            CocoaError, match=r"cannot go to another process, which would find no model '(the model|fake)'"
        ):
            pickle.dumps(embedding)
    model = load_model(model_folder, "cpu")
    embedding = CocoaEmbedding(model_folder, model=model)
    assert pickle.loads(pickle.dumps(embedding)).get_query_embedding("red") == embedding.get_query_embedding("red")


def test_an_error_crosses_processes() -> None:
    """A pool of processes waits for ever for an error that cannot be unpickled."""
    for error in (ImageError("red.png", "does not exist"), UsageError("no"), CocoaError("no")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_the_dimension_cuts_the_embeddings() -> None:
    whole, cut = CocoaEmbedding(model=FakeModel()), CocoaEmbedding(model=FakeModel(), dimension=12)
    assert (whole.dimension, cut.dimension) == (48, 12)
    first = np.array(whole.get_query_embedding("red"))[:12]
    assert cut.get_query_embedding("red") == pytest.approx(first / np.linalg.norm(first))
    assert CocoaEmbedding(model=Encoder(FakeModel(), dimension=12)).dimension == 12
    with pytest.raises(UsageError, match="12 dimensions, not of 24; give the dimension to the Encoder"):
        CocoaEmbedding(model=Encoder(FakeModel(), dimension=12), dimension=24)
    with pytest.raises(UsageError):
        CocoaEmbedding(model=FakeModel(), dimension=49)
    with pytest.raises(ValueError, match="dimension"):
        CocoaEmbedding(model=FakeModel(), dimension=0)


async def call_every_way(embedding: CocoaEmbedding, files: list[str]) -> None:
    embedding.get_query_embedding("red")
    embedding.get_text_embedding("red")
    embedding.get_text_embedding_batch(["red", "blue"])
    embedding.get_image_embedding(files[0])
    embedding.get_image_embedding_batch(files[:2])
    await embedding.aget_query_embedding("red")
    await embedding.aget_text_embedding("red")
    await embedding.aget_text_embedding_batch(["red", "blue"])
    await embedding.aget_image_embedding(files[0])
    await embedding.aget_image_embedding_batch(files[:2])


def test_callbacks_are_told_of_queries_texts_and_images(files: list[str]) -> None:
    handler = LlamaDebugHandler(print_trace_on_end=False)
    embedding = CocoaEmbedding("fake", model=FakeModel(), callback_manager=CallbackManager([handler]))
    asyncio.run(call_every_way(embedding, files))
    ends = [end.payload for _, end in handler.get_event_pairs(CBEventType.EMBEDDING)]
    chunks = [["red"], ["red"], ["red", "blue"], files[:1], files[:2]]
    assert [payload[EventPayload.CHUNKS] for payload in ends] == chunks * 2
    assert [len(payload[EventPayload.EMBEDDINGS]) for payload in ends] == [1, 1, 2, 1, 2] * 2
    starts = [start.payload for start, _ in handler.get_event_pairs(CBEventType.EMBEDDING)]
    assert all(payload[EventPayload.SERIALIZED] == embedding.to_payload() for payload in starts)


class Listener(BaseEventHandler):
    events: list[Any] = Field(default_factory=list)

    def handle(self, event: BaseEvent, **_: object) -> None:
        self.events.append(event)


def test_the_dispatcher_is_told_of_queries_and_texts(embedding: CocoaEmbedding, files: list[str]) -> None:
    """LlamaIndex itself sends no events of images to it."""
    listener, root = Listener(), get_dispatcher("root")
    root.add_event_handler(listener)
    try:
        asyncio.run(call_every_way(embedding, files))
    finally:
        root.event_handlers.remove(listener)
    starts = [event for event in listener.events if isinstance(event, EmbeddingStartEvent)]
    ends = [event for event in listener.events if isinstance(event, EmbeddingEndEvent)]
    assert [event.chunks for event in ends] == [["red"], ["red"], ["red", "blue"]] * 2
    assert [event.model_dict for event in starts] == [embedding.to_payload()] * 6


def test_progress_is_drawn_if_asked_for(
    embedding: CocoaEmbedding, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    async def embed(progress: bool) -> None:
        embedding.get_text_embedding_batch(list(COLOURS), show_progress=progress)
        embedding.get_image_embedding_batch(files, show_progress=progress)
        await embedding.aget_text_embedding_batch(list(COLOURS), show_progress=progress)
        await embedding.aget_image_embedding_batch(files, show_progress=progress)

    asyncio.run(embed(False))
    assert capsys.readouterr().err == ""
    asyncio.run(embed(True))
    drawn = capsys.readouterr().err
    assert "Generating embeddings" in drawn
    assert "Generating image embeddings" in drawn


def test_many_batches_at_once_keep_to_their_threads(embedding: CocoaEmbedding, files: list[str]) -> None:
    embedding.num_workers = 4

    async def embed() -> tuple[list, ...]:
        return await asyncio.gather(
            *(embedding.aget_image_embedding_batch(files * 5) for _ in range(10)),
            embedding.aget_text_embedding_batch(list(COLOURS) * 10),
        )

    *images, texts = asyncio.run(embed())
    assert len(model_of(embedding).threads) <= 2
    assert all(found == images[0] for found in images)
    assert images[0] == embedding.get_image_embedding_batch(files) * 5
    assert texts == embedding.get_text_embedding_batch(list(COLOURS)) * 10
    assert max(model_of(embedding).batches) == embedding.embed_batch_size


def test_a_query_does_not_wait_for_all_that_is_to_be_stored(files: list[str]) -> None:
    class SlowModel(FakeModel):
        def encode_document(self, inputs: list[Any], batch_size: int, show_progress_bar: bool) -> np.ndarray:
            time.sleep(0.01)
            return super().encode_document(inputs, batch_size, show_progress_bar)

    embedding = CocoaEmbedding(model=SlowModel(), embed_batch_size=1)

    async def embed() -> None:
        images = asyncio.create_task(embedding.aget_image_embedding_batch(files * 25))
        await asyncio.sleep(0.05)
        await embedding.aget_query_embedding("red")
        assert len(model_of(embedding).documents) < 50
        assert len(await images) == 100

    asyncio.run(embed())


def test_threads_may_share_an_embedding(embedding: CocoaEmbedding, files: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(embedding.get_image_embedding, files * 8))
        queries = list(pool.map(embedding.get_query_embedding, COLOURS * 8))
    assert images == [embedding.get_image_embedding(file) for file in files] * 8
    assert queries == [embedding.get_query_embedding(colour) for colour in COLOURS] * 8


def test_a_cache_keeps_texts_and_knows_no_query_from_a_document() -> None:
    """LlamaIndex's cache goes by the text alone; the class's docstring warns of it."""
    embedding = CocoaEmbedding(model=FakeModel(), embeddings_cache=SimpleKVStore())
    texts = embedding.get_text_embedding_batch(["red", "blue"])
    assert embedding.get_text_embedding_batch(["blue", "red", "green"])[:2] == texts[::-1]
    assert [item["text"] for item in model_of(embedding).documents] == ["red", "blue", "green"]
    assert embedding.get_query_embedding("red") == texts[0]
    assert asyncio.run(embedding.aget_query_embedding("red")) == texts[0]
    assert model_of(embedding).queries == []


def test_queries_are_put_together_and_compared(embedding: CocoaEmbedding) -> None:
    red, blue = embedding.get_query_embedding("red"), embedding.get_query_embedding("blue")
    mean = embedding.get_agg_embedding_from_queries(["red", "blue"])
    assert mean == pytest.approx(np.mean([red, blue], axis=0))
    assert asyncio.run(embedding.aget_agg_embedding_from_queries(["red", "blue"])) == mean
    assert embedding.similarity(red, red) == pytest.approx(1)
    assert embedding.similarity(red, blue) == pytest.approx(np.dot(red, blue))


def mixed_nodes(files: list[str]) -> list[BaseNode]:
    return [
        TextNode(text="red"),
        ImageNode(image_path=files[1]),
        ImageNode(text="blue", image_path=files[2]),
        ImageDocument(image=b64encode(Path(files[3]).read_bytes()).decode()),
        Document(text="yellow"),
    ]


def test_as_a_step_it_embeds_images_by_themselves_and_texts_by_their_text(
    embedding: CocoaEmbedding, files: list[str]
) -> None:
    expected = [
        embedding.get_text_embedding("red"),
        *embedding.get_image_embedding_batch(files[1:]),
        embedding.get_text_embedding("yellow"),
    ]
    nodes = mixed_nodes(files)
    assert embedding(nodes) is nodes
    assert [node.embedding for node in nodes] == expected
    nodes = mixed_nodes(files)
    assert asyncio.run(embedding.acall(nodes)) is nodes
    assert [node.embedding for node in nodes] == expected
    run = IngestionPipeline(transformations=[embedding]).run(nodes=mixed_nodes(files), show_progress=True)
    assert [node.embedding for node in run] == expected
    for place in ({"image_path": "gone.png"}, {"image_url": "http://127.0.0.1:9/gone.png"}):
        with pytest.raises(ImageError, match=r"gone\.png"):
            embedding([ImageNode(**place)])


@pytest.mark.slow
def test_a_pipeline_of_several_processes_embeds_the_same(model_folder: Path, files: list[str]) -> None:
    embedding = CocoaEmbedding(model_folder, device="cpu")
    nodes = [ImageNode(image_path=file) for file in files] + [TextNode(text="a red ring")]
    expected = np.array([node.embedding for node in embedding(nodes)])
    pipeline = IngestionPipeline(transformations=[embedding], disable_cache=True)
    for run in (
        lambda nodes: pipeline.run(nodes=nodes, num_workers=2),
        lambda nodes: asyncio.run(pipeline.arun(nodes=nodes, num_workers=2)),
    ):
        fresh = [node.model_copy(update={"embedding": None}) for node in nodes]
        assert np.array([node.embedding for node in run(fresh)]) == pytest.approx(expected, abs=1e-5)


def test_the_pipelines_cache_takes_images_without_words_for_each_other(
    embedding: CocoaEmbedding, files: list[str]
) -> None:
    """LlamaIndex's cache of steps goes by texts and metadata: give image nodes metadata, or disable it."""
    pipeline = IngestionPipeline(transformations=[embedding])
    pipeline.run(nodes=[ImageNode(image_path=files[0])])
    (wrong,) = pipeline.run(nodes=[ImageNode(image_path=files[1])])
    assert wrong.image_path == files[0]
    (right,) = pipeline.run(nodes=[ImageNode(image_path=files[1], metadata={"path": files[1]})])
    assert right.embedding == embedding.get_image_embedding(files[1])


def test_it_is_the_model_of_llama_indexs_settings_and_of_a_text_index(embedding: CocoaEmbedding) -> None:
    before = Settings._embed_model
    Settings.embed_model = embedding
    try:
        index = VectorStoreIndex.from_documents([Document(text=colour) for colour in COLOURS])
        found = index.as_retriever(similarity_top_k=1).retrieve("green")
        again = asyncio.run(index.as_retriever(similarity_top_k=1).aretrieve("green"))
    finally:
        Settings._embed_model = before
    assert [node.text for node in found] == [node.text for node in again] == ["green"]
    assert {"text": "green"} in model_of(embedding).queries


def test_embeddings_may_share_a_model() -> None:
    encoder = Encoder(FakeModel())
    one, other = CocoaEmbedding(model=encoder), CocoaEmbedding(model=encoder)
    assert one.get_text_embedding("red") == other.get_text_embedding("red")
    assert len(encoder.model.documents) == 2


def test_a_model_without_images_or_without_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CocoaError, match="words does not embed images"):
        CocoaEmbedding("words", model=FakeModel(modalities=["text"]))
    with pytest.raises(CocoaError, match="there is no such model folder"):
        CocoaEmbedding(tmp_path / "none")
