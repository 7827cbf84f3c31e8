import json
from base64 import b64encode, urlsafe_b64encode
from pathlib import Path
from typing import Any

import pytest
from fake_model import colour_image
from llama_index.core import schema
from llama_index.core.schema import Document, ImageDocument, ImageNode, IndexNode, MediaResource, Node, TextNode
from llama_index.core.vector_stores.utils import node_to_metadata_dict
from PIL import ExifTags, Image

from cocoa_embed.errors import ImageError
from cocoa_embed.integrations.llama_index.nodes import CHAT_PIXELS, StoredImage, image_of, to_node
from cocoa_embed.integrations.qdrant.indexer import Hit
from cocoa_embed.integrations.qdrant.points import FileLocation, make_payload, point_id
from cocoa_embed.integrations.qdrant.stores.base import image_path

ENCODED = b64encode(b"an image").decode()


def hit(payload: dict[str, Any]) -> Hit:
    return Hit(id="7", score=0.5, path=str(payload.get("path", "")), payload=payload)


@pytest.fixture
def file(tmp_path: Path) -> str:
    colour_image("red").save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


def test_the_image_of_every_kind_of_node_is_found(file: str) -> None:
    for node in (ImageNode, ImageDocument):
        assert image_of(node(image_path=file)) == file
        assert image_of(node(image=ENCODED, image_path="/gone.png")).read() == b"an image"
    assert image_of(ImageNode(image_url="https://example.com/a.png")) == "https://example.com/a.png"
    assert image_of(Node(image_resource=MediaResource(path=Path(file)))) == file
    assert image_of(Node(image_resource=MediaResource(data=b"an image"))).read() == b"an image"
    for node in (TextNode(text="red"), Document(text="red"), ImageNode(text="red"), Node(), IndexNode(index_id="i")):
        assert image_of(node) is None
    data = bytes(range(248, 256))  # with characters of its own in URL-safe base64
    assert "-" in urlsafe_b64encode(data).decode()
    for encoded in (urlsafe_b64encode(data).decode(), urlsafe_b64encode(data).decode().rstrip("="), "+Pn6-_z9_v8 \n"):
        assert image_of(ImageNode(image=encoded)).read() == data
    uri = "data:image/png;base64,"
    assert image_of(ImageNode(image=uri + urlsafe_b64encode(data).decode())) == uri + b64encode(data).decode()
    assert image_of(ImageNode(image="data:image/svg+xml,a-b")) == "data:image/svg+xml,a-b"
    with pytest.raises(ImageError, match="node n7: holds an image that is not in base64"):
        image_of(ImageNode(id_="n7", image="a"))


def test_stored_nodes_are_restored_and_those_with_an_image_are_image_nodes(file: str) -> None:
    source = schema.RelatedNodeInfo(node_id="source")
    common = {"metadata": {"author": "Ann"}, "excluded_llm_metadata_keys": ["author"]}
    common["relationships"] = {schema.NodeRelationship.SOURCE: source}
    resources = {"image_resource": MediaResource(path=Path(file)), "text_resource": MediaResource(text="a red thing")}
    image = ImageNode(id_="one", image_path=file, text="a red thing", **common)
    for node in (image, TextNode(text="a text", metadata={"page": 3}), IndexNode(index_id="i", text="a summary")):
        found = to_node(hit(node_to_metadata_dict(node)))
        assert type(found.node) is (StoredImage if node is image else type(node))
        assert (found.node.to_dict(), found.score) == (node.to_dict(), 0.5)
    for node in (
        ImageDocument(id_="one", image_path=file, text="a red thing", **common),
        Node(id_="one", **resources, **common),
    ):
        found = to_node(hit(node_to_metadata_dict(node))).node
        assert (type(found), found.image_path, found.image_mimetype) == (StoredImage, file, "image/png")
        assert (found.text, found.metadata, found.node_id) == ("a red thing", {"author": "Ann"}, "one")
        assert found.source_node == source
        assert found.get_content(schema.MetadataMode.LLM).strip() == "a red thing"
    without_image = to_node(hit(node_to_metadata_dict(ImageDocument(image=ENCODED, text="a red thing")))).node
    assert (type(without_image), without_image.get_content()) == (TextNode, "a red thing")


def test_a_stored_node_without_text_keeps_its_image_and_its_id(file: str) -> None:
    picture = MediaResource(path=Path(file))
    for node in (
        ImageDocument(id_="one", image_path=file),
        Document(id_="one", image_resource=picture),
        Node(id_="one", image_resource=picture, text_resource=MediaResource()),
    ):
        found = to_node(hit(node_to_metadata_dict(node))).node
        assert (type(found), found.node_id, found.image_path, found.text) == (StoredImage, "one", file, "")
    sound = Document(id_="one", audio_resource=MediaResource(path=Path("a.wav")))
    assert to_node(hit(node_to_metadata_dict(sound))).node.node_id == "one"


def test_a_node_whose_metadata_have_the_keys_of_an_indexed_image_stays_itself(file: str) -> None:
    for node in (
        TextNode(id_="one", text="about dogs", metadata={"path": "a.md", "sha256": "ab", "mime": "text/markdown"}),
        ImageNode(id_="one", text="a dog", image_path=file, metadata={"path": file, "sha256": "ab", "mime": "x"}),
    ):
        assert to_node(hit(node_to_metadata_dict(node))).node.to_dict() == node.to_dict()


def test_a_stored_image_in_any_form_of_base64_is_decoded(file: str) -> None:
    data = Path(file).read_bytes()
    uri = f"data:image/png;base64,{b64encode(data).decode()}"
    for encoded in (b64encode(data).decode(), urlsafe_b64encode(data).decode().rstrip("="), uri):
        node = to_node(hit(node_to_metadata_dict(ImageNode(image=encoded)))).node
        assert node.resolve_image().read() == data
        assert [block.block_type for block in node.get_content_blocks()] == ["image"]


def test_a_node_has_the_path_of_the_file_that_exists(file: str) -> None:
    gone = FileLocation("/gone.png", "gone.png", 1.0)
    content = {"sha256": "0" * 64, "bytes": 5, "width": 6, "height": 7, "mime": "image/png"}
    none = {"caption": None, "metadata": {}, "caption_source": None}
    for llama_index in (False, True):
        locations = [gone, FileLocation(file, "red.png", 2.0)]
        payload = make_payload(content, locations, none, llama_index=llama_index)
        assert ("_node_content" in payload) == llama_index
        assert image_path(payload) == file != payload["path"]
        node = to_node(Hit(point_id(content["sha256"]), 0.5, image_path(payload), payload)).node
        assert (type(node), node.image_path, node.metadata["path"]) == (StoredImage, file, file)
    assert image_path(make_payload(content, [gone], none)) == "/gone.png"


def test_a_chat_model_is_shown_text_and_an_upright_jpeg_of_every_kind_of_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    colour_image("red", (2000, 1000)).save(tmp_path / "large.tif", exif=exif)
    large = to_node(hit({"path": str(tmp_path / "large.tif"), "caption": "a lawn"})).node
    encoded = b64encode((tmp_path / "large.tif").read_bytes()).decode()
    stored = hit(node_to_metadata_dict(ImageNode(image=encoded, text="a lawn", image_path="x.tif")))
    for node in (large, to_node(stored).node):
        text, image = node.get_content_blocks()
        assert isinstance(node, StoredImage)
        assert text.text == "a lawn"
        shown = Image.open(image.resolve_image())
        assert (shown.format, shown.size, image.image_mimetype) == (
            "JPEG",
            (CHAT_PIXELS // 2, CHAT_PIXELS),
            "image/jpeg",
        )
    assert large.resolve_image() == str(tmp_path / "large.tif")
    large.text = ""
    assert [each.block_type for each in large.get_content_blocks()] == ["image"]
    assert not caplog.messages
    Path(large.resolve_image()).unlink()
    for broken in (large, StoredImage(image="no base64", text="a lawn")):
        assert [each.block_type for each in broken.get_content_blocks()] == ["text"][: len(broken.text)]
        assert caplog.messages.pop().endswith("; a chat model is not shown the image")
        caplog.clear()


@pytest.mark.parametrize(
    ("payload", "path", "text"),
    [
        ({"path": "/x.png", "caption": "a lawn"}, "/x.png", "a lawn"),
        ({"path": "/X.JPG", "caption": None, "text": "words"}, "/X.JPG", "words"),
        ({"image_path": "x.webp", "page_content": "words"}, "x.webp", "words"),
        ({"path": "/x.bin", "mime": "image/tiff"}, "/x.bin", ""),
        ({"path": "/x.pdf", "text": "page one"}, None, "page one"),
        ({"path": 3, "text": ["words"]}, None, ""),
        ({}, None, ""),
        *[
            ({"path": "/x.png", "caption": "a lawn", "_node_content": content}, "/x.png", "a lawn")
            for content in (None, "{", "[]", '{"text": []}', json.dumps({"image_resource": "x"}))
        ],
    ],
)
def test_foreign_points_become_nodes_by_their_payload(payload: dict, path: str | None, text: str) -> None:
    found = to_node(hit({**payload, "author": "Ann"}))
    assert type(found.node) is (TextNode if path is None else StoredImage)
    assert getattr(found.node, "image_path", None) == path
    assert (found.node.text, found.node.node_id, found.score) == (text, "7", 0.5)
    assert found.node.metadata["author"] == "Ann"
    assert text not in found.node.metadata.values() or not text
    assert "_node_content" not in found.node.metadata
