"""Export a checkpoint as a plain SentenceTransformer folder with a model card."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from cocoa_embed.errors import CocoaError, one_line
from cocoa_embed.folders import claim_folder, refuse_checkpoint
from cocoa_embed.model.attention import assert_bidirectional
from cocoa_embed.model.card import model_card
from cocoa_embed.model.training_record import TRAINING_FILE, read_training, write_training


def build_sentence_transformer(
    checkpoint: Path,
    *,
    prompts: dict[str, str],
    bidirectional: bool = True,
    device: str | None = None,
    model_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> SentenceTransformer:
    """Return a SentenceTransformer over the backbone in ``checkpoint``: the normalised last hidden state of ``<EOS>``.

    :param prompts: The prompts for ``query`` and ``document``, stored with the model.
    :param bidirectional: False for a checkpoint that was trained causal, as a baseline.
    :param device: The torch device; None takes the fastest.
    :param model_kwargs: More keyword arguments for transformers, such as ``dtype``.
    :raises CocoaError: If it cannot be loaded, or is causal although it should be bidirectional.
    """
    try:
        transformer = Transformer(str(checkpoint), model_kwargs={"attn_implementation": "sdpa", **model_kwargs})
    except (OSError, SafetensorError) as error:
        raise CocoaError(f"{checkpoint} cannot be loaded ({one_line(error)}): the checkpoint is incomplete.") from error
    if bidirectional:
        assert_bidirectional(transformer.auto_model)
    return embedding_model(transformer, prompts, device)


def embedding_model(
    transformer: Transformer, prompts: dict[str, str], device: str | None = None
) -> SentenceTransformer:
    """Return the model whose embedding is the normalised last hidden state of a sequence's last token, ``<EOS>``."""
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    return SentenceTransformer(
        modules=[transformer, pooling, Normalize()], prompts=prompts, similarity_fn_name="cosine", device=device
    )


def save_sentence_transformer(model: SentenceTransformer, out: Path, training: dict[str, Any]) -> Path:
    """Write ``model`` to ``out`` with its model card.

    :param training: The training record, written to ``TRAINING_FILE`` and shown in the model card.
    :raises CocoaError: If ``out`` holds something else, or is a checkpoint of a run.
    """
    refuse_checkpoint(out)
    claim_folder(out, marker=TRAINING_FILE)
    model.save(str(out), create_model_card=False)
    write_training(out, training)
    (out / "README.md").write_text(model_card(out.name, model, training), encoding="utf-8")
    return out


def export_model(checkpoint: Path, out: Path) -> Path:
    """Export the checkpoint of any stage to ``out``, a folder that plain sentence-transformers loads.

    :raises CocoaError: If ``checkpoint`` is not a checkpoint, or ``out`` holds something else.
    """
    training = read_training(checkpoint)
    if checkpoint.resolve().is_relative_to(out.resolve()):
        raise CocoaError(f"{out} is or holds the checkpoint itself; give another folder to export to.")
    model = build_sentence_transformer(
        checkpoint, prompts=training["recipe"]["prompts"], bidirectional=training["recipe"]["bidirectional"]
    )
    return save_sentence_transformer(model, out, training)
