"""Load a SentenceTransformer from an export, a checkpoint or the hub, with errors that name the fault."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from cocoa_embed.errors import CocoaError, UsageError, one_line, printable
from cocoa_embed.model.training_record import TRAINING_FILE, read_training, refuse_unfinished, vectors_of

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer

MODULES_FILE = "modules.json"
"""A file in every folder of a SentenceTransformer: exports, and checkpoints of the contrastive stage."""

CONFIG_FILE = "config_sentence_transformers.json"
"""A file that names the class that saved a model."""

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
"""The types that weights can be loaded as."""


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector while large libraries are imported: it visits their objects often and frees none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def load_model(
    model: str | Path,
    device: str | None = None,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache_folder: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> SentenceTransformer:
    """Load an exported model, a checkpoint of any stage, or a model of the Hugging Face hub (``owner/name``).

    A checkpoint keeps the prompts and the pooling of its recipe, and stays causal if it was trained causal.

    :param model: A folder or, if there is no folder of this name, a name on the hub.
    :param device: The torch device; None takes the fastest.
    :param dtype: A ``Dtype``; None takes the one in which the weights are stored.
    :param revision: The branch, tag or commit of a model on the hub.
    :param trust_remote_code: Whether to run Python code that comes with the model.
    :param cache_folder: Where models of the hub are stored [default: the hub's cache].
    :param model_kwargs: Further options of the Transformers model, such as ``attn_implementation``.
    :raises CocoaError: If the folder is missing, holds no model, has no weights, or cannot be loaded.
    :raises UsageError: If a revision is given with a folder, or the dtype is unknown.
    """
    check_model(model)
    if dtype not in (None, *get_args(Dtype)):
        raise UsageError(f"dtype is {dtype!r}; it can be {', '.join(get_args(Dtype))}")
    with collector_paused():
        device = None if device is None else find_device(device)
        from sentence_transformers import MultiVectorEncoder, SentenceTransformer
        from sentence_transformers.util import load_file_path
    folder = Path(model).expanduser()
    is_local = folder.exists()
    name = str(folder if is_local else model)
    if is_local and revision is not None:
        raise UsageError(f"--revision {revision} needs a model on the hub, but {printable(model)} is a folder")
    model_kwargs = {**(model_kwargs or {}), **({} if dtype is None else {"dtype": dtype})}
    if is_local and is_checkpoint(folder):
        from cocoa_embed.model.export import build_sentence_transformer

        recipe = read_training(folder)["recipe"]
        return build_sentence_transformer(
            folder,
            prompts=recipe["prompts"],
            bidirectional=recipe["bidirectional"],
            pooling=recipe["pooling"],
            device=device,
            model_kwargs=model_kwargs,
        )
    where: dict[str, Any] = {"revision": revision, "cache_folder": cache_folder, "local_files_only": is_local}
    options: dict[str, Any] = {
        **where,
        "device": device,
        "trust_remote_code": trust_remote_code,
        "model_kwargs": model_kwargs,
    }
    try:
        config = load_file_path(name, CONFIG_FILE, **where)
        if config is None or json.loads(Path(config).read_text("utf-8")).get("model_type") != "MultiVectorEncoder":
            return SentenceTransformer(name, **options)
        return side_by_side(MultiVectorEncoder(name, **options))
    except Exception as error:  # loading runs code of four libraries with different errors
        raise CocoaError(
            f"{printable(model)} cannot be loaded as a SentenceTransformer ({type(error).__name__}: {one_line(error)})"
        ) from error


def is_checkpoint(folder: Path) -> bool:
    """Return whether a model's folder is a checkpoint of a stage, whose training record says how it embeds.

    A checkpoint of several vectors also has the modules of a SentenceTransformer, but they give only the first vector.
    """
    if not (folder / MODULES_FILE).is_file():
        return True
    if not (folder / TRAINING_FILE).is_file():
        return False
    training = read_training(folder)
    return "vectors" not in training and vectors_of(training) > 1


def side_by_side(model: MultiVectorEncoder) -> SentenceTransformer:
    """Return a model of several vectors as one whose embeddings concatenate them, vector 1 first.

    :raises ValueError: If the model is not an export of this package.
    """
    from cocoa_embed.model.export import embedding_model
    from cocoa_embed.model.template import eos_tokens

    count = len(eos_tokens(model.tokenizer))
    if count == 1:
        raise ValueError("it has a vector for each token; use a model with one vector, or one for each <EOS>")
    transformer: Any = model[0]
    prompts = {name: prompt or "" for name, prompt in model.prompts.items()}
    return embedding_model(transformer, prompts, "eos", str(model.device), count)


def find_device(device: str | None) -> str:
    """Return the name of a torch device, by default the fastest.

    :raises UsageError: If it cannot be used.
    """
    import torch

    if device is None:
        from sentence_transformers.util import get_device_name

        device = get_device_name()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch is built without the device
        raise UsageError(f"--device {device} cannot be used ({one_line(error).split('. ')[0]}).") from error
    return device


def check_model(model: str | Path) -> None:
    """Check that a model can be loaded, without loading it.

    :raises CocoaError: If it is neither a folder that holds a model with weights nor a possible name on the hub.
    """
    folder = Path(model).expanduser()
    refuse_unfinished(folder)
    name = printable(model)
    if not folder.is_dir():
        if folder.exists() or not is_hub_name(str(model)):
            raise CocoaError(
                f"{name}: there is no such model folder; name a folder that cocoa-embed export wrote, or a model on the"
                " Hugging Face hub as owner/name"
            )
    elif not (folder / MODULES_FILE).is_file():
        read_training(folder)
    elif not any(any(folder.rglob(pattern)) for pattern in WEIGHT_FILES):
        raise CocoaError(
            f"{name} has no weights (no *.safetensors in it); copy them there or run cocoa-embed export again"
        )


def is_hub_name(name: str) -> bool:
    """Return whether a name can only be a model on the hub: ``owner/name``, where ``owner`` is not a folder here."""
    owner, slash, rest = name.partition("/")
    is_path = name.startswith((".", "~", os.sep)) or "/" in rest or "\\" in name
    return bool(owner and slash and rest) and not is_path and not Path(owner).exists()
