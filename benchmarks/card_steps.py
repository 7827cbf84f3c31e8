"""Run cases of ``train_step.py`` one after the other in one process, for ``gpu.sh``; each writes a JSON file.

    python benchmarks/card_steps.py PART FOLDER [--rehearse]

A case that runs out of memory says so in its file, and the next one runs. ``--rehearse`` uses the smallest model and
few rows, for a machine without a card.
"""

import argparse
import json
from pathlib import Path

import torch

from shared.measuring import best_device, machine
from steps.sides import forget_memory, measure, measure_growing
from train_step import parse

PAIRS = ["--stage", "contrastive", "--side", "ours", "--batch-size", "16", "--chunk", "8"]
ROWS = ["--stage", "bridge", "--side", "ours", "--batch-size", "16"]
GROWING = ["--side", "plain", "--batch-size", "8", "--grow"]
FROM_THE_RECIPE = ["--adapter", "dora", "--dropout", "0.1"]

PARTS: dict[str, dict[str, list[str]]] = {
    "bridge": {
        "sdpa": ROWS,
        "sdpa-checkpointing": [*ROWS, "--gradient-checkpointing"],
        "flex": [*ROWS, "--attention", "flex_attention"],
        "flex-checkpointing": [*ROWS, "--attention", "flex_attention", "--gradient-checkpointing"],
    },
    "contrastive": {
        "recipe": [*PAIRS, *FROM_THE_RECIPE],
        "peft-dora": [*PAIRS, *FROM_THE_RECIPE, "--peft"],
        "peft-lora": [*PAIRS, "--adapter", "lora", "--peft"],
        "full": PAIRS,
    },
    "plain": {stage: ["--stage", stage, *GROWING] for stage in ("warmup", "bridge", "contrastive")},
}

FULL_SIZE = ["--model", "qwen2-vl-2b", "--image-sides", "16", "16", "--steps", "1", "--passes", "2"]
REHEARSAL = ["--model", "small", "--image-sides", "2", "2", "--steps", "1", "--passes", "1"]
FEWER = {"--batch-size": "2", "--chunk": "1", "--attention": "sdpa"}
"""The values of a rehearsal; a CPU cannot train FlexAttention."""


def rehearsed(case: list[str]) -> list[str]:
    """Return a case at the size of a rehearsal."""
    return [FEWER.get(before, argument) for before, argument in zip(["", *case], case, strict=False)]


def run(case: list[str], *, rehearse: bool) -> dict[str, object]:
    """Measure a case."""
    options = parse([*(REHEARSAL if rehearse else FULL_SIZE), *(rehearsed(case) if rehearse else case)])
    options.most_rows = 4 if rehearse else None  # where a rehearsal stops growing
    try:
        return {"sizes": measure_growing(options)} if options.grow else measure(options)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    for name, case in PARTS[given.part].items():
        result = {"arguments": case, **run(case, rehearse=given.rehearse), **machine(best_device())}
        (given.folder / f"{given.part}-{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        forget_memory()


if __name__ == "__main__":
    main()
