import asyncio
import copy
import multiprocessing
import os
import pickle
import time
from base64 import b64encode, urlsafe_b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import write_checkpoint
from fake_model import COLOURS, FakeModel
from llama_index.core import SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.readers.base import BaseReader
from llama_index.core.schema import Document, ImageDocument, ImageNode, MediaResource, Node, TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from PIL import Image

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError, ImageError, UsageError
from cocoa_embed.images.http import Fetcher, Refused
from cocoa_embed.integrations.llama_index import CocoaEmbedding
from cocoa_embed.model.backbone import load_backbone
from cocoa_embed.model.export import export_model


@pytest.fixture(scope="module")
def model_folder(tiny_backbone_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model as a SentenceTransformer's folder."""
    folder = tmp_path_factory.mktemp("model")
    checkpoint = write_checkpoint(load_backbone(str(tiny_backbone_path), max_length=128), folder / "checkpoint")
    return export_model(checkpoint, folder / "tiny")


@pytest.fixture(scope="module")
def real(model_folder: Path) -> CocoaEmbedding:
    return CocoaEmbedding(model_folder, device="cpu", dimension=16, embed_batch_size=3)


def model_of(embedding: CocoaEmbedding) -> FakeModel:
    return embedding._encoder.model


@pytest.mark.parametrize("text", ["", "https://example.com/red.png", "red.png"])
def test_text_is_never_a_path_or_an_address(
    embedding: CocoaEmbedding, folder: Path, real: CocoaEmbedding, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(folder)
    embedding.get_query_embedding(text)
    embedding.get_text_embedding_batch([text, text])
    assert model_of(embedding).queries + model_of(embedding).documents == [{"text": text}] * 3
    assert np.linalg.norm([real.get_query_embedding(text), real.get_text_embedding(text)]) == pytest.approx(2**0.5)


def test_an_image_may_be_a_path_bytes_or_a_picture(embedding: CocoaEmbedding, files: list[str]) -> None:
    data = Path(files[2]).read_bytes()
    for image in (Path(files[2]), data, BytesIO(data), Image.open(files[2])):
        assert embedding.get_image_embedding(image) == embedding.get_image_embedding(files[2])
    assert {tuple(item) for item in model_of(embedding).documents} == {("image",)}


def test_async_equals_sync_and_many_batches_at_once_share_two_threads(
    embedding: CocoaEmbedding, files: list[str]
) -> None:
    calls: list[tuple[str, Any]] = [
        ("text_embedding", "blue"),
        ("image_embedding", files[0]),
        ("text_embedding_batch", list(COLOURS)),
        *[("image_embedding_batch", files * 5)] * 5,
    ]
    expected = [getattr(embedding, f"get_{name}")(argument) for name, argument in calls]
    assert model_of(embedding).batches == [1, 1, 3, 1, *[3, 3, 3, 3, 3, 3, 2] * 5]
    model_of(embedding).threads.clear()

    async def embed() -> list:
        return await asyncio.gather(*(getattr(embedding, f"aget_{name}")(argument) for name, argument in calls))

    assert asyncio.run(embed()) == expected
    assert len(model_of(embedding).threads) == 2
    assert asyncio.run(embedding.aget_query_embedding("red")) == embedding.get_query_embedding("red")


def test_errors_name_the_input(embedding: CocoaEmbedding, files: list[str], tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>")
    with pytest.raises(ImageError, match=r"page\.jpg: is not an image"):
        embedding.get_image_embedding(str(tmp_path / "page.jpg"))
    thin = tmp_path / "thin.png"
    Image.new("RGB", (201, 1)).save(thin)
    with pytest.raises(ImageError, match=r"thin\.png: cannot be embedded \(absolute aspect ratio must"):
        embedding.get_image_embedding_batch([files[0], str(thin), files[1]])
    encoded = b64encode(bytes(9000)).decode()
    with pytest.raises(ImageError, match=r"^A{40}\.\.\.: has 12000 characters and is no path; give base64 as"):
        embedding.get_image_embedding(encoded)
    uri = f"data:image/png;base64,{b64encode(thin.read_bytes()).decode()}"
    with pytest.raises(ImageError, match=r"^data: URI of \d+ characters: cannot be embedded \(absolute aspect"):
        embedding.get_image_embedding(uri)
    with pytest.raises(CocoaError, match=r"the text 'a <.image_pad.>' cannot be embedded \(image features and"):
        embedding.get_text_embedding_batch(["red", "a <|image_pad|>"])
    with pytest.raises(UsageError, match="the image is a ndarray; give one image: a path, an address, bytes"):
        embedding.get_image_embedding(np.zeros((9, 9, 3), dtype=np.uint8))
    with pytest.raises(CocoaError, match="words does not embed images"):
        CocoaEmbedding("words", model=FakeModel(modalities=["text"]))
    with pytest.raises(CocoaError, match="there is no such model folder"):
        CocoaEmbedding(tmp_path / "none")


def test_settings_are_serialised(model_folder: Path) -> None:
    settings = {"device": "cpu", "dimension": 16, "embed_batch_size": 3, "num_workers": 2}
    settings |= {"allowed_hosts": ["a.example"], "trust_remote_code": False, "cache_folder": "hub"}
    settings["model_kwargs"] = {"attn_implementation": "eager"}
    embedding = CocoaEmbedding(model_folder, embeddings_cache=SimpleKVStore(), **settings)
    stored = embedding.to_dict()
    names = {"class_name": "CocoaEmbedding", "model_name": str(model_folder)}
    assert stored == {**names, **settings, "fingerprint": embedding.encoder.fingerprint}
    for loaded in (CocoaEmbedding.from_dict(stored), CocoaEmbedding.from_json(embedding.to_json())):
        assert loaded.to_dict() == stored
        assert loaded.get_query_embedding("a red ring") == embedding.get_query_embedding("a red ring")


def test_the_fingerprint_is_computed_only_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[Encoder] = []
    monkeypatch.setattr(Encoder, "fingerprint", property(lambda encoder: computed.append(encoder) or "f" * 64))
    embedding = CocoaEmbedding(model=FakeModel())
    assert embedding.get_text_embedding("red")
    assert embedding.model_dump(include={"model_name"}).keys() == {"model_name", "class_name"}
    assert "fingerprint" not in embedding.model_dump(exclude={"fingerprint"})
    assert not computed
    assert embedding.model_dump()["fingerprint"] == "f" * 64


def test_a_copy_shares_the_model(embedding: CocoaEmbedding) -> None:
    for copied in (copy.copy(embedding), copy.deepcopy(embedding), embedding.model_copy(deep=True)):
        assert copied.encoder is embedding.encoder
        copied.embed_batch_size = 7
        assert embedding.embed_batch_size == 3
        assert asyncio.run(copied.aget_text_embedding("red")) == embedding.get_text_embedding("red")
    assert CocoaEmbedding(model=embedding.encoder).encoder is embedding.encoder


def test_a_pickled_embedding_loads_its_model_when_it_is_needed(real: CocoaEmbedding, model_folder: Path) -> None:
    pickled = pickle.dumps(real)
    assert len(pickled) < 2000
    (entry,) = (each for each in os.scandir(model_folder.parent) if each.name == model_folder.name)
    assert CocoaEmbedding(entry, device="cpu").model_name == str(model_folder), "any path-like object is a name"
    other = pickle.loads(pickled)
    assert (other.to_dict(), other._encoder) == (real.to_dict(), None)
    assert other.get_text_embedding("a red ring") == real.get_text_embedding("a red ring")
    lost = pickle.loads(pickled.replace(str(model_folder).encode(), str(model_folder)[:-1].encode() + b"?"))
    with pytest.raises(CocoaError, match="there is no such model folder"):
        lost.get_text_embedding("a red ring")
    with pytest.raises(CocoaError, match=r"would find no model 'the model'"):
        pickle.dumps(CocoaEmbedding(model=FakeModel()))


def test_a_model_that_embeds_differently_is_refused_and_has_its_own_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cocoa_embed.integrations.llama_index.embedding.load_encoder", lambda name, *_, **__: Encoder(FakeModel(), name)
    )
    same, other = (CocoaEmbedding(tmp_path, model=FakeModel(seed=seed)) for seed in (0, 1))
    again = pickle.loads(pickle.dumps(other))
    assert again.to_dict() == other.to_dict(), "before its model is loaded, too"
    for load in (lambda: again.get_text_embedding("red"), lambda: CocoaEmbedding.from_dict(other.to_dict())):
        with pytest.raises(CocoaError, match=r"another model \(fingerprint \w{12}\) than .* same max_pixels and dtype"):
            load()
    assert CocoaEmbedding.from_dict(other.to_dict(), model=FakeModel(seed=1)).get_text_embedding("red")
    for loaded in (
        pickle.loads(pickle.dumps(same)),
        CocoaEmbedding.model_validate(same.model_dump()),
        CocoaEmbedding.model_validate_json(same.model_dump_json()),
    ):
        assert loaded.get_text_embedding("red") == same.get_text_embedding("red")
        assert loaded.to_dict() == same.to_dict()
    assert len({get_transformation_hash([TextNode(text="red")], each) for each in (same, other)}) == 2


def test_the_dimension_truncates_the_embeddings(files: list[str]) -> None:
    assert CocoaEmbedding(model=FakeModel()).dimension == 48
    encoder = Encoder(FakeModel(), dimension=12)
    assert CocoaEmbedding(model=encoder).dimension == 12
    for model in (FakeModel(), encoder):
        embedding = CocoaEmbedding(model=model, dimension=24)
        assert embedding.dimension == len(embedding.get_query_embedding("red")) == 24
    for dimension in (0, 49):
        with pytest.raises((UsageError, ValueError), match="dimension"):
            CocoaEmbedding(model=FakeModel(), dimension=dimension)
    embedding.dimension = 12
    for changed in (embedding, embedding.model_copy(update={"dimension": 6})):
        image = changed.get_image_embedding(files[0])
        assert len(changed.get_text_embedding("red")) == len(image) == changed.dimension
    embedding.dimension = 49
    with pytest.raises(UsageError, match="embeddings of 48 dimensions, not of 49"):
        embedding.get_text_embedding("red")
    with pytest.raises(ValueError, match="frozen"):
        embedding.device = "cpu"


def test_an_option_that_it_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match=r"devic, max_pixels: not an option of CocoaEmbedding; .* give its result"):
        CocoaEmbedding(model=FakeModel(), max_pixels=784, devic="cpu")


def test_a_name_is_no_loaded_model_and_a_loaded_model_no_name() -> None:
    with pytest.raises(UsageError, match="model_name is a FakeModel; give a loaded model as model="):
        CocoaEmbedding(FakeModel())
    with pytest.raises(UsageError, match="model is the name 'folder'; give a name as model_name"):
        CocoaEmbedding(model="folder")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking a process with threads
def test_a_forked_process_embeds_asynchronously(embedding: CocoaEmbedding) -> None:
    asyncio.run(embedding.aget_text_embedding_batch(["red"] * 60))
    assert len(model_of(embedding).threads) == 2, "the pool has all of its threads"
    child = multiprocessing.get_context("fork").Process(
        target=lambda: asyncio.run(embedding.aget_text_embedding("red")), daemon=True
    )
    child.start()
    child.join(20)
    exit_code = child.exitcode
    child.kill()
    assert exit_code == 0, "it waits for threads that were not forked"


def test_a_large_batch_of_images_is_decoded_in_parts(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = CocoaEmbedding(model=FakeModel(), embed_batch_size=100)
    expected = embedding.get_image_embedding_batch(files * 3)
    monkeypatch.setattr("cocoa_embed.encode.stream.MAX_BATCH_BYTES", 2 * 24 * 16 * 3)
    assert embedding.get_image_embedding_batch(files * 3) == expected
    embedding([ImageNode(text="red", image_path=file) for file in files * 3])
    assert model_of(embedding).batches == [12, *[2] * 12]


def test_a_query_does_not_wait_behind_all_documents(
    embedding: CocoaEmbedding, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = FakeModel.encode_document
    monkeypatch.setattr(FakeModel, "encode_document", lambda *all_, **named: time.sleep(0.01) or encode(*all_, **named))

    async def embed() -> None:
        images = asyncio.create_task(embedding.aget_image_embedding_batch(files * 75))
        while not model_of(embedding).documents:
            await asyncio.sleep(0.001)
        await embedding.aget_query_embedding("red")
        assert len(model_of(embedding).documents) < 300 == len(await images)

    asyncio.run(embed())


def test_a_pipeline_embeds_images_as_images_and_texts_as_texts(embedding: CocoaEmbedding, files: list[str]) -> None:
    encoded = b64encode(Path(files[3]).read_bytes()).decode()
    images = [ImageNode(text="blue", image_path=files[2]), ImageDocument(image=encoded)]
    nodes = [TextNode(text="red"), *images]
    expected = [embedding.get_text_embedding("red"), *embedding.get_image_embedding_batch(files[2:])]
    for embed in (
        embedding,
        lambda copies: asyncio.run(embedding.acall(copies)),
        lambda copies: IngestionPipeline(transformations=[embedding]).run(nodes=copies),
    ):
        assert [node.embedding for node in embed([node.model_copy() for node in nodes])] == expected
    with pytest.raises(ImageError, match=r"gone\.png: .* not among the allowed hosts; .*allowed_hosts= in Python"):
        embedding([ImageNode(image_url="http://127.0.0.1:9/gone.png")])


def test_options_of_other_steps_are_ignored(embedding: CocoaEmbedding, files: list[str]) -> None:
    nodes = [Document(text="red"), ImageNode(image_path=files[1])]
    embedded = IngestionPipeline(transformations=[embedding]).run(nodes=nodes, language="en", show_progress=True)
    assert asyncio.run(embedding.acall([node.model_copy() for node in nodes], language="en")) == embedded
    index = VectorStoreIndex.from_documents(nodes[:1], embed_model=embedding, transformations=[embedding])
    assert index.as_retriever().retrieve("red")


def test_a_node_without_text_and_image_is_refused_unless_it_is_a_text(embedding: CocoaEmbedding) -> None:
    sound = MediaResource(path=Path("a.wav"))
    for node in (ImageNode(id_="n7"), ImageNode(id_="n7", metadata={"a": 1}), Node(id_="n7", audio_resource=sound)):
        with pytest.raises(CocoaError, match=rf"node n7 \({node.class_name()}\) holds neither an image nor a text"):
            embedding([node])
    for node in (TextNode(), Document(text=""), Node(text_resource=MediaResource(text="red"), audio_resource=sound)):
        assert embedding([node])[0].embedding


def test_a_node_with_text_and_image_is_embedded_by_both_if_the_model_takes_them(
    embedding: CocoaEmbedding, files: list[str], real: CocoaEmbedding
) -> None:
    def nodes() -> list[ImageNode]:
        illustrated = [ImageNode(text=f"{colour} thing", image_path=files[2]) for colour in COLOURS]
        return [*illustrated, ImageNode(image_path=files[2], metadata={"author": "Ann"}), TextNode(text="red")]

    both = [node.embedding for node in embedding(nodes())]
    assert len({tuple(vector) for vector in both}) == 5, "of the colours, blue with a blue image is that image"
    assert both[4:] == [embedding.get_image_embedding(files[2]), embedding.get_text_embedding("red")]
    for node, vector in zip(nodes()[:4], both, strict=False):
        item = {"text": node.text, "image": Image.open(files[2]).convert("RGB")}
        assert vector == embedding.encoder.embed_documents([item])[0].tolist()
    assert [node.embedding for node in asyncio.run(embedding.acall(nodes()))] == both
    assert max(model_of(embedding).batches) == 3, "images are read a batch at a time"
    assert np.ptp(np.array([node.embedding for node in real(nodes())[:4]]), axis=0).max() > 1e-4
    alone = CocoaEmbedding(model=FakeModel(modalities=["text", "image"]))
    alone.encoder.model.supports = lambda modality: isinstance(modality, str)
    assert {tuple(node.embedding) for node in alone(nodes()[:4])} == {tuple(alone.get_image_embedding(files[2]))}


def test_images_come_from_files_data_and_allowed_hosts(
    embedding: CocoaEmbedding, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, data = embedding.get_image_embedding(files[2]), Path(files[2]).read_bytes()
    fetched: list[str] = []

    def fetch(fetcher: Fetcher, address: str) -> bytes:
        fetcher._check(address)
        fetched.append(address)
        return data

    monkeypatch.setattr(Fetcher, "fetch", fetch)
    online = CocoaEmbedding(model=embedding.encoder, allowed_hosts=["a.example"])
    for node in (
        ImageNode(image_url=Path(files[2]).as_uri()),
        ImageNode(image_url="https://a.example/blue.png"),
        ImageNode(image=f"data:image/png;base64,{b64encode(data).decode()}"),
        ImageNode(image=urlsafe_b64encode(data).decode().rstrip("=")),
    ):
        assert online([node])[0].embedding == expected
    assert online.get_image_embedding("https://a.example/blue.png") == expected
    assert fetched == ["https://a.example/blue.png"] * 2
    with pytest.raises(Refused, match=r"b\.example"):
        online.get_image_embedding("https://b.example/blue.png")


def test_the_bytes_of_a_file_are_not_a_text(embedding: CocoaEmbedding, folder: Path, files: list[str]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.jpg")
    for file in (folder / "noise.jpg", Path(files[0])):
        text = file.read_bytes().decode("utf-8", "ignore")  # as SimpleDirectoryReader does
        for embed in (embedding.get_text_embedding, lambda text: embedding([TextNode(text=text)])):
            with pytest.raises(CocoaError, match=r"is the content of a binary file.* install it, or index"):
                embed(text)
    with pytest.raises(CocoaError, match="binary file"):
        IngestionPipeline(transformations=[embedding]).run(
            documents=SimpleDirectoryReader(
                input_files=[str(folder / "noise.jpg")], file_extractor={".jpg": Plain()}
            ).load_data()
        )
    for text in ("", "a\x00", "page one\x0cpage two\r\n\tcolumn", "žluť 猫 \u200b", "\x1b[1mbold\x1b[0m text"):
        assert embedding.get_text_embedding(text)


class Plain(BaseReader):
    """Reads a file as SimpleDirectoryReader does if no reader knows its suffix."""

    def load_data(self, file: Path, **_: Any) -> list[Document]:
        return [Document(text=file.read_bytes().decode("utf-8", "ignore"))]


def test_the_options_of_a_model_reach_sentence_transformers(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        "sentence_transformers.SentenceTransformer", lambda *_, **all_: given.update(all_) or FakeModel()
    )
    options = {"trust_remote_code": True, "cache_folder": "hub", "model_kwargs": {"attn_implementation": "eager"}}
    CocoaEmbedding(model_folder, **options)
    assert given.items() >= options.items()
