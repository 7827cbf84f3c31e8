"""Read and write what training records: ``run.json`` of a run, ``cocoa_training.json`` of each checkpoint."""

import json
from pathlib import Path
from typing import Any

from cocoa_embed.errors import CocoaError, UsageError, one_line, printable
from cocoa_embed.folders import RUN_MARKER, write_atomically

TRAINING_FILE = "cocoa_training.json"
"""A file in every checkpoint and export: the recipe and the stages of the weights. It is written last of all files."""

RUN_FILE = "run.json"
"""A file in the folder of a run: its recipe, data, machine, logs and samples; updated while its stages run."""

RUN_VERSION = 1


def read_training(checkpoint: Path) -> dict[str, Any]:
    """Read the training record of a checkpoint or an exported model.

    :raises CocoaError: If the folder is not a checkpoint, or its stage is not finished.
    """
    path = checkpoint / TRAINING_FILE
    remedy = "Give a folder that `cocoa-embed train` or `cocoa-embed export` has written."
    if not path.is_file() or not any(checkpoint.glob("*.safetensors")):
        refuse_unfinished(checkpoint)
        raise CocoaError(
            f"{printable(checkpoint)} is not a checkpoint: it needs {TRAINING_FILE} and *.safetensors. {remedy}"
        )
    training = _read_object(path, remedy)
    keys = {"backbone", "origin", "recipe", "stages", "data"}
    if not keys <= training.keys():
        raise CocoaError(f"{printable(path)} lacks one of {', '.join(sorted(keys))}. {remedy}")
    return training


def vectors_of(training: dict[str, Any]) -> int:
    """Return the number of vectors of a checkpoint or an exported model, by its training record."""
    count: int = training.get("vectors", training["recipe"].get("eos_tokens", 1))
    return count


def write_training(checkpoint: Path, training: dict[str, Any]) -> None:
    """Write the training record of a checkpoint, atomically."""
    write_atomically(checkpoint / TRAINING_FILE, json.dumps(training, indent=2) + "\n")


def read_run(folder: Path) -> dict[str, Any]:
    """Read ``run.json`` of a run.

    :raises UsageError: If the folder is not a run; the error names the run that it is part of.
    :raises CocoaError: If the file is broken, or of another version.
    """
    path, name = folder / RUN_FILE, printable(folder)
    if not path.is_file():
        run = run_of(folder)
        hint = f"it is part of the run {printable(run)}" if run else "name the --out of cocoa-embed train"
        fault = f"is not a training run: it has no {RUN_FILE}" if folder.exists() else "does not exist"
        raise UsageError(f"{name} {fault}; {hint}")
    run_record = _read_object(path, "Restore it.")
    if run_record.get("version") != RUN_VERSION:
        raise CocoaError(
            f"{printable(path)} has version {run_record.get('version')}, but this cocoa-embed reads {RUN_VERSION}; use "
            "the cocoa-embed that trained the run"
        )
    return run_record


def write_run(folder: Path, run_record: dict[str, Any]) -> None:
    """Write ``run.json`` of a run, atomically."""
    write_atomically(folder / RUN_FILE, json.dumps({"version": RUN_VERSION, **run_record}, indent=1) + "\n")


def run_of(path: Path) -> Path | None:
    """Return the run that a folder inside it (a stage, a checkpoint) is part of; None if there is none."""
    files = (RUN_MARKER, RUN_FILE)  # other programs also write a run.json
    parents = path.resolve().parents[:3]
    return next((parent for parent in parents if all((parent / name).is_file() for name in files)), None)


def refuse_unfinished(path: Path) -> None:
    """Check that ``path`` is not the folder of a run's unfinished stage, which need not exist yet.

    :raises CocoaError: If it is; the error says how to continue the stage.
    """
    run = run_of(path)
    if run is None or (path / TRAINING_FILE).is_file():
        return
    stages = read_run(run)["stages"]
    stage = next((part for part in path.resolve().relative_to(run).parts if part in stages), None)
    if stage is not None and not stages[stage]["finished"]:
        raise CocoaError(
            f"{printable(path)} is not finished: stage {stage} of that run stopped at step {stages[stage]['step']} of "
            f"{stages[stage]['steps']}; `cocoa-embed train RECIPE --out {printable(run)} --resume` continues it."
        )


def _read_object(path: Path, remedy: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CocoaError(f"{printable(path)} cannot be read ({one_line(error)}): it is broken. {remedy}") from error
    if not isinstance(document, dict):
        raise CocoaError(f"{printable(path)} is not a JSON object: it is broken. {remedy}")
    return document
