"""Turn a checkpoint into a plain SentenceTransformer folder with a model card."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from cocoa_embed.attention import assert_bidirectional
from cocoa_embed.errors import CocoaError, one_line
from cocoa_embed.folders import RUN_MARKER, claim_folder
from cocoa_embed.model_card import model_card

TRAINING_FILE = "cocoa_training.json"
"""In every checkpoint and export: the recipe, the stages run, the results measured. What makes a folder ours."""


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
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    return SentenceTransformer(
        modules=[transformer, pooling, Normalize()], prompts=prompts, similarity_fn_name="cosine"
    )


def read_training(checkpoint: Path, *, needs_weights: bool = True) -> dict[str, Any]:
    """Read what is known of a checkpoint's training.

    :param needs_weights: The weights are to be there too; without, they may have been removed to save disk.
    :raises CocoaError: If the folder is no checkpoint of this project.
    """
    path = checkpoint / TRAINING_FILE
    remedy = "Give the folder of a stage that `cocoa-embed train` has written."
    keys = {"backbone", "origin", "recipe", "stages"}
    if not path.is_file() or (needs_weights and not list(checkpoint.glob("*.safetensors"))):
        raise CocoaError(f"{checkpoint} is no checkpoint: it needs {TRAINING_FILE} and *.safetensors. {remedy}")
    try:
        training = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CocoaError(f"{path} is not JSON ({one_line(error)}): the checkpoint is incomplete. {remedy}") from error
    if not isinstance(training, dict) or not keys <= training.keys():
        raise CocoaError(f"{path} lacks one of {', '.join(sorted(keys))}: the checkpoint is incomplete. {remedy}")
    return training


def is_bidirectional(training: dict[str, Any]) -> bool:
    """Tell from a checkpoint's record (:func:`read_training`) whether it was made bidirectional."""
    # Recipes written before there was a choice say nothing of it.
    return bool(training["recipe"].get("bidirectional", True))


def refuse_checkpoint(out: Path) -> None:
    """Check that ``out`` is no stage's checkpoint, which looks much like an earlier export, and not inside of one.

    :raises CocoaError: If it is.
    """
    if any((parent / RUN_MARKER).is_file() for parent in out.resolve().parents):
        raise CocoaError(f"{out} is in the folder of a training run; give a folder outside of it.")


def save_sentence_transformer(model: SentenceTransformer, out: Path, training: dict[str, Any]) -> Path:
    """Write ``model`` to ``out`` with its model card.

    :param training: What :data:`TRAINING_FILE` is to hold; the model card is made from it.
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
