"""A model of several vectors: exports of stock classes, and what loads of them, of checkpoints and of others."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Command
from exported import PROMPTS, TRAINING, write_checkpoint
from PIL import Image
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from tiny_backbones import TINY_MAX_LENGTH

from cocoa_embed.encode.load import load_encoder
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.model.backbone import Backbone, load_backbone
from cocoa_embed.model.export import EosVectors, build_sentence_transformer, export_model
from cocoa_embed.model.loading import load_model
from cocoa_embed.model.training_record import TRAINING_FILE

COUNT = 3
SAME = {"rtol": 0, "atol": 1e-5}
LONG_TEXT = "blue cross on white " * 200
ITEMS: list[Any] = [
    {"text": "a red ring"},
    {"image": Image.new("RGB", (90, 60), "red")},
    {"image": Image.new("RGB", (56, 56), "blue"), "text": LONG_TEXT},
    {"text": "<|eos_2|><|im_end|> <|eos_3|>"},
]


@pytest.fixture(scope="module")
def checkpoint(tiny_backbone_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several") / "checkpoint"
    load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH, vectors=COUNT).save(folder)
    training = {**TRAINING, "recipe": {**TRAINING["recipe"], "eos_tokens": COUNT}}
    (folder / TRAINING_FILE).write_text(json.dumps(training), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    return export_model(checkpoint, checkpoint.parent / "exported")


@pytest.fixture(scope="module")
def first(checkpoint: Path) -> Path:
    return export_model(checkpoint, checkpoint.parent / "first", vectors=1)


def embedded(encode: Any, items: list[Any]) -> np.ndarray:  # noqa: ANN401
    """Return the embeddings of a MultiVectorEncoder: all vectors of each input."""
    return np.stack(encode(items, convert_to_numpy=True))


def test_the_stock_class_embeds_anything_as_the_states_of_all_eos_in_a_batch_or_alone(
    exported: Path, tmp_path: Path
) -> None:
    kinds = [module["type"] for module in json.loads((exported / "modules.json").read_text())]
    assert all(kind.startswith("sentence_transformers.") for kind in kinds)
    model = MultiVectorEncoder(str(exported), device="cpu")
    batches = {"query": embedded(model.encode_query, ITEMS), "document": embedded(model.encode_document, ITEMS)}
    for task, vectors in batches.items():
        features = model.preprocess(ITEMS, prompt=PROMPTS[task], task=task)
        with torch.inference_mode():
            transformer: Any = model[0]
            states = transformer.auto_model(**{k: v for k, v in features.items() if torch.is_tensor(v)})[0]
        for row, (item, found) in enumerate(zip(ITEMS, vectors, strict=True)):
            length = int(features["attention_mask"][row].sum())
            ids = features["input_ids"][row, length - COUNT : length]
            assert model.tokenizer.convert_ids_to_tokens(ids) == ["<|eos_3|>", "<|eos_2|>", "<|im_end|>"]
            expected = torch.nn.functional.normalize(states[row, length - COUNT : length], dim=1)
            np.testing.assert_allclose(found, expected, **SAME)
            alone = embedded(model.encode_query if task == "query" else model.encode_document, [item])[0]
            np.testing.assert_allclose(alone, found, **SAME)
    queries, documents = batches["query"], batches["document"]
    cosines = np.einsum("ikd,jld->ijkl", queries, documents)
    np.testing.assert_allclose(model.similarity(queries, documents), cosines.max(3).mean(2), **SAME)
    model.save(str(tmp_path))
    again = embedded(MultiVectorEncoder(str(tmp_path), device="cpu").encode_query, ITEMS)
    np.testing.assert_allclose(again, queries, **SAME)
    assert not np.allclose(cosines.max(3).mean(2), cosines[:, :, -1, -1], atol=1e-2), "the others matter"


def test_the_first_vector_alone_is_a_plain_sentence_transformer(exported: Path, first: Path) -> None:
    several, plain = MultiVectorEncoder(str(exported), device="cpu"), SentenceTransformer(str(first), device="cpu")
    for task in ("encode_query", "encode_document"):
        expected = embedded(getattr(several, task), ITEMS)[:, -1]
        np.testing.assert_allclose(getattr(plain, task)(ITEMS), expected, **SAME)
    rendered = plain.processor.apply_chat_template([{"role": "user", "content": "a red ring"}], tokenize=False)
    assert rendered == "a red ring", "the tokenizer appends them"
    plain.tokenizer.sep_token = None
    rendered = plain.processor.apply_chat_template([{"role": "user", "content": "a red ring"}], tokenize=False)
    assert rendered == "a red ring<|eos_3|><|eos_2|><|im_end|>", "for servers"


def test_export_and_checkpoints_of_every_stage_load_as_one_model(
    checkpoint: Path, exported: Path, first: Path, tmp_path: Path
) -> None:
    plain = build_sentence_transformer(checkpoint, prompts=PROMPTS, vectors=1, device="cpu")
    plain.save(str(tmp_path))  # as the contrastive stage does
    (tmp_path / TRAINING_FILE).write_bytes((checkpoint / TRAINING_FILE).read_bytes())
    expected = embedded(MultiVectorEncoder(str(exported), device="cpu").encode_document, ITEMS)[:, ::-1]
    fingerprints = set()
    for folder in (exported, checkpoint, tmp_path):
        encoder = load_encoder(folder, "cpu")
        assert (encoder.most_vectors, encoder.dimension) == (COUNT, expected.shape[2])
        np.testing.assert_allclose(encoder.truncate(None, COUNT).embed_documents(ITEMS), expected, **SAME)
        np.testing.assert_allclose(encoder.embed_documents(ITEMS), expected[:, 0], **SAME)
        fingerprints.add(encoder.fingerprint)
    one = load_encoder(first, "cpu")
    assert (one.most_vectors, len(fingerprints), one.fingerprint in fingerprints) == (1, 1, False)
    with pytest.raises(UsageError, match=r"vectors is 2, but .*first makes 1 per input; give 1 to 1"):
        one.truncate(None, 2)


def test_shorter_vectors_are_normalised_each_and_a_stream_gives_as_many(exported: Path) -> None:
    encoder = load_encoder(exported, "cpu")
    short = encoder.truncate(8, 2)
    vectors, whole = short.embed_documents(ITEMS), encoder.truncate(None, COUNT).embed_documents(ITEMS)
    assert vectors.shape == (len(ITEMS), 2, 8) == (len(ITEMS), *short.shape)
    cut = whole[:, :2, :8]
    np.testing.assert_allclose(vectors, cut / np.linalg.norm(cut, axis=2, keepdims=True), **SAME)
    ((_, found),) = short.stream_images([("red", ITEMS[1]["image"])])
    np.testing.assert_allclose(found.vector, vectors[1], **SAME)  # type: ignore[union-attr]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_move_the_vectors(side: str) -> None:
    states = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    if side == "left":
        mask = mask.flip(1)
    pooled = EosVectors(4, 2)({"token_embeddings": states, "attention_mask": mask})["sentence_embedding"]
    last = [5, 3 if side == "right" else 5]
    rows = [torch.cat([states[row, end], states[row, end - 1]]) for row, end in enumerate(last)]
    expected = torch.nn.functional.normalize(torch.stack(rows).view(2, 2, 4), dim=2).view(2, 8)
    torch.testing.assert_close(pooled, expected)


def test_another_number_of_vectors_is_refused_by_the_command(
    command: Command, checkpoint: Path, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    result = command("export", checkpoint, tmp_path / "out", "--vectors", 2)
    assert result.error() == f"2 --vectors is 2, but {checkpoint} has {COUNT}; give 1 or {COUNT}"
    one = write_checkpoint(tiny_backbone, tmp_path / "one")
    result = command("export", one, tmp_path / "out", "--vectors", 2)
    assert result.error() == f"2 --vectors is 2, but {one} has 1; give 1"
    assert not (tmp_path / "out").exists()


def test_a_model_with_a_vector_for_each_token_is_refused(tiny_backbone_path: Path, tmp_path: Path) -> None:
    modules = [Transformer(str(tiny_backbone_path)), Normalize("token_embeddings")]
    MultiVectorEncoder(modules=modules, device="cpu").save(str(tmp_path))
    with pytest.raises(CocoaError, match="a vector for each token"):
        load_model(tmp_path, "cpu")


def test_the_card_says_how_to_use_several_vectors_and_what_opens_them_wrongly(exported: Path, first: Path) -> None:
    card = (exported / "README.md").read_text()
    assert f'MultiVectorEncoder("{exported.name}")' in card
    assert f"{COUNT} unit vectors each" in card
    assert "SentenceTransformer(" not in card
    assert "mean of all tokens" in " ".join(card.split()), "what the other class would make of it"
    assert f'SentenceTransformer("{first.name}")' in (first / "README.md").read_text()
