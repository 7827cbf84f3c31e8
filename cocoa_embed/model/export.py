"""Turn a checkpoint into a plain SentenceTransformer folder with a model card."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from cocoa_embed.errors import CocoaError, one_line
from cocoa_embed.folders import RUN_MARKER, claim_folder
from cocoa_embed.model.attention import assert_bidirectional
from cocoa_embed.model.card import model_card
from cocoa_embed.model.training_record import TRAINING_FILE, is_bidirectional, read_training


def build_sentence_transformer(
    checkpoint: Path, *, prompts: dict[str, str], attn_implementation: str = "sdpa", bidirectional: bool = True
) -> SentenceTransformer:
    """Return ``normalize(hidden[<EOS>])`` over the backbone in ``checkpoint`` as a SentenceTransformer.

    :param prompts: Instructions for ``query`` and ``document``, stored with the model.
    :param bidirectional: False for a checkpoint that was trained causal, to be compared with.
    :raises CocoaError: If it cannot be loaded, or its attention is not bidirectional though it should be.
    """
    try:
        transformer = Transformer(str(checkpoint), model_kwargs={"attn_implementation": attn_implementation})
    except (OSError, SafetensorError) as error:
        raise CocoaError(f"{checkpoint} cannot be loaded ({one_line(error)}): the checkpoint is incomplete.") from error
    if bidirectional:
        assert_bidirectional(transformer.auto_model)
    return embedding_model(transformer, prompts)


def embedding_model(transformer: Transformer, prompts: dict[str, str]) -> SentenceTransformer:
    """Return the model whose embedding is the normalised last hidden state of a sequence's last token, ``<EOS>``."""
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    return SentenceTransformer(
        modules=[transformer, pooling, Normalize()], prompts=prompts, similarity_fn_name="cosine"
    )


def refuse_checkpoint(out: Path) -> None:
    """Check that ``out`` is no stage's checkpoint, which looks much like an earlier export, and not inside of one.

    :raises CocoaError: If it is.
    """
    if any((parent / RUN_MARKER).is_file() for parent in out.resolve().parents):
        raise CocoaError(f"{out} is in the folder of a training run; give a folder outside of it.")


def save_sentence_transformer(model: SentenceTransformer, out: Path, training: dict[str, Any]) -> Path:
    """Write ``model`` to ``out`` with its model card.

    :param training: What ``TRAINING_FILE`` is to hold; the model card is made from it.
    :raises CocoaError: If ``out`` holds something else, or is a checkpoint of a run.
    """
    refuse_checkpoint(out)
    claim_folder(out, marker=TRAINING_FILE)
    model.save(str(out), create_model_card=False)
    (out / TRAINING_FILE).write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(model_card(out.name, model, training), encoding="utf-8")
    return out


def export_model(checkpoint: Path, out: Path) -> Path:
    """Export the checkpoint of any stage to ``out``, a folder that plain sentence-transformers loads.

    :raises CocoaError: If ``checkpoint`` is none, or ``out`` holds something else.
    """
    training = read_training(checkpoint)
    if checkpoint.resolve().is_relative_to(out.resolve()):
        raise CocoaError(f"{out} is or holds the checkpoint itself; give another folder to export to.")
    model = build_sentence_transformer(
        checkpoint, prompts=training["recipe"]["prompts"], bidirectional=is_bidirectional(training)
    )
    return save_sentence_transformer(model, out, training)
