"""Measure how long training takes to reach its first step on many rows, and how much memory the rows take.

    python benchmarks/rows.py --rows 130000 [--stage warmup] [--processes 2] [--json]
    python benchmarks/rows.py --photos 1024 [--json]

It writes rows in the layout of MMEB-train (20 subsets, a few thousand small images that all rows share), and starts a
stage of the smallest backbone on them: with an empty cache, with a warm one, and from a checkpoint at a late step. A
start ends when the first batch reaches the model. Memory is the private memory of a process, above that of the same
start with 2000 rows: the model, torch and the libraries are in both.

With ``--photos`` it collates one batch of the contrastive stage, each row with a photograph of 12 megapixels, as a
worker of the data loader does, and measures the time, and the peak memory above that at the start.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from PIL import Image

from cocoa_embed.data.mmeb import TRAIN_SUBSETS
from cocoa_embed.train.loop.checkpoints import mark_complete, read_complete
from cocoa_embed.train.loop.trainer import CocoaTrainer
from shared.measuring import machine
from shared.output import command_line, process_bytes, report

FEW_ROWS = 2000
DIFFERENT_PHOTOS = 4


def parse() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--rows", type=int, default=130_000)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--stage", choices=("warmup", "bridge", "contrastive"), default="warmup")
    parser.add_argument("--batch-size", type=int, help="rows of a step; by default the paper's")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--late-step", type=int, default=1500, help="the step of the checkpoint to resume from")
    parser.add_argument("--photos", type=int, help="measure a batch of this many photographs instead")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.batch_size = options.batch_size or {"warmup": 128, "bridge": 64, "contrastive": 1024}[options.stage]
    return options


def write_layout(folder: Path, rows: int, images: int) -> None:
    """Write the layout: an image with an instruction in every query, and texts that all differ."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range(images):
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(folder / "images" / f"{number}.jpg")
    for place, subset in enumerate(TRAIN_SUBSETS):
        numbers = np.arange(place * rows // len(TRAIN_SUBSETS), (place + 1) * rows // len(TRAIN_SUBSETS))
        paths = [f"images/{number % images}.jpg" for number in numbers]
        empty = [""] * len(numbers)
        table = pa.table({
            "qry": [f"<|image_1|>\nRepresent the given image with the following question: what is thing {number}?"
                    for number in numbers],
            "qry_image_path": paths,
            "pos_text": [f"It is number {number}, left of number {number // 2}." for number in numbers],
            "pos_image_path": empty,
            "neg_text": [f"It is number {number + 1}." for number in numbers],
            "neg_image_path": empty,
        })  # fmt: skip
        (folder / subset).mkdir()
        parquet.write_table(table, folder / subset / "original-00000-of-00001.parquet")


def private_bytes() -> int:
    """Return the private memory of this process, without the pages of files that it maps."""
    return process_bytes("smaps_rollup", "Private_Dirty", "SwapPss")


def start(out: Path, data: Path, began: float, saves: bool) -> None:
    """Run the stage to its first batch and print time and memory; with ``saves``, to its first checkpoint."""
    from cocoa_embed.train import Recipe, run

    train = CocoaTrainer.training_step

    def first_step(trainer: CocoaTrainer, *given: Any, **values: Any) -> torch.Tensor:
        if not saves:
            found = {"seconds": time.time() - began, "private_bytes": private_bytes()}
            found["step"] = trainer.state.global_step
            print(json.dumps(found), flush=True)
            os._exit(0)
        return train(trainer, *given, **values)

    def saved(trainer: CocoaTrainer, *_: Any, **__: Any) -> None:
        save(trainer, *_, **__)
        os._exit(0)

    CocoaTrainer.training_step = first_step  # type: ignore[method-assign]
    save, CocoaTrainer._save_checkpoint = CocoaTrainer._save_checkpoint, saved  # type: ignore[method-assign]
    settings = {"steps": 2000, "batch_size": OPTIONS.batch_size, "save_steps": 1}
    settings |= {} if OPTIONS.stage == "contrastive" else {"mini_batch_size": 8}
    values = {"name": "rows", "backbone": "scene-captioner", "max_length": 256, "data": {"mmeb": str(data)},
              OPTIONS.stage: settings}  # fmt: skip
    run(Recipe.parse(values), out, resume=True)


def started(out: Path, data: Path, *, saves: bool = False) -> dict[str, float]:
    """Start a run in separate processes; return the longest time and the largest memory."""
    several = ["-m", "torch.distributed.run", f"--nproc-per-node={OPTIONS.processes}"] if OPTIONS.processes > 1 else []
    options = ["--stage", OPTIONS.stage, "--batch-size", OPTIONS.batch_size, "--child", out, data, time.time(), saves]
    done = subprocess.run([sys.executable, *several, __file__, *map(str, options)], capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(found) != (0 if saves else OPTIONS.processes):
        raise SystemExit(f"the run failed:\n{done.stderr}")
    return {key: max(each[key] for each in found) for key in found[0]} if found else {}


def make_late(out: Path, step: int) -> None:
    """Turn the checkpoint of the first step into one at a late step."""
    folder = out / "checkpoints" / OPTIONS.stage
    late = (folder / "checkpoint-1").rename(folder / f"checkpoint-{step}")
    state = json.loads((late / "trainer_state.json").read_text())
    (late / "trainer_state.json").write_text(json.dumps({**state, "global_step": step}))
    facts = {key: value for key, value in read_complete(late).items() if key != "files"}
    mark_complete(late, **facts)


def measure(work: Path) -> dict[str, Any]:
    os.environ["COCOA_CACHE"] = str(work / "cache")
    os.environ["HF_DATASETS_CACHE"] = str(work / "datasets")
    for name, rows in (("few", FEW_ROWS), ("many", OPTIONS.rows)):
        write_layout(work / name, rows, OPTIONS.images)
    started(work / "runs" / "few", work / "few")
    few = started(work / "runs" / "few", work / "few")["private_bytes"]
    out, many = work / "runs" / "many", work / "many"
    found = {"cold": started(out, many), "warm": started(out, many)}
    started(out, many, saves=True)
    make_late(out, OPTIONS.late_step)
    found["resumed"] = started(out, many)
    assert found["resumed"]["step"] == OPTIONS.late_step
    cache = sum(path.stat().st_size for path in (work / "cache").rglob("*") if path.is_file())
    return {
        **{f"{name}_seconds": round(each["seconds"], 1) for name, each in found.items()},
        **{f"{name}_bytes_for_rows": int(each["private_bytes"] - few) for name, each in found.items()},
        "few_rows_private_bytes": int(few),
        "cache_bytes": cache,
    }


def measure_photos(work: Path) -> dict[str, Any]:
    """Collate photographs in a worker of a data loader, which passes the batch on."""
    from torch.utils.data import DataLoader

    from cocoa_embed.data.rows import Item, Row
    from cocoa_embed.model.backbone import load_backbone
    from cocoa_embed.train.data.row_table import RowTable
    from cocoa_embed.train.loop.trainer import StageContext
    from cocoa_embed.train.settings import RunSettings
    from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
    from cocoa_embed.train.stages.contrastive.stage import Contrastive

    torch.set_num_threads(1)  # as in a worker
    generator = np.random.default_rng(0)
    for number in range(DIFFERENT_PHOTOS):
        pixels = generator.integers(0, 256, (75, 100, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((4000, 3000), Image.Resampling.BICUBIC).save(work / f"{number}.jpg", quality=85)
    rows = [
        Row(Item(images=(work / f"{n % DIFFERENT_PHOTOS}.jpg",)), Item(text=f"photo {n}"), "")
        for n in range(OPTIONS.photos)
    ]
    settings = ContrastiveSettings(steps=1, batch_size=len(rows), directions="forward", probe_rows=0)
    run = RunSettings(name="photos", backbone="scene-captioner")
    backbone = load_backbone(run.backbone, max_length=512, max_pixels=448 * 448)
    context = StageContext({"output_dir": str(work), "max_steps": 1, "report_to": "none", "use_cpu": True})
    collator = Contrastive("contrastive", settings, run).trainer(backbone, RowTable.of(rows), context).data_collator
    collator([{"row": 0}])

    def collate(numbers: list[int]) -> tuple[dict[str, Any], int, int]:
        start = process_bytes("status", "VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # restarts the peak from here
        return collator([{"row": number} for number in numbers]), start, os.getpid()

    began = time.perf_counter()
    batches = iter(DataLoader(range(len(rows)), len(rows), collate_fn=collate, num_workers=1, persistent_workers=True))
    batch, start, worker = next(batches)
    return {
        "photos": len(rows),
        "seconds": round(time.perf_counter() - began, 1),
        "peak_bytes_above_start": process_bytes("status", "VmHWM", process=worker) - start,
        "batch_bytes": sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor)),
    }


def main() -> None:
    work = Path(tempfile.mkdtemp(prefix="cocoa-rows-"))
    try:
        measured = measure_photos(work) if OPTIONS.photos else measure(work)
    finally:
        shutil.rmtree(work)
    names = ("rows", "images", "stage", "batch_size", "processes", "late_step")
    settings = {} if OPTIONS.photos else {key: getattr(OPTIONS, key) for key in names}
    document = {**settings, **measured, "load_average": os.getloadavg()[1], "machine": machine(torch.device("cpu"))}
    report(document, show, as_json=OPTIONS.json)


def show(document: dict[str, Any]) -> None:
    if OPTIONS.photos:
        peak, batch = (document[name] / 2**20 for name in ("peak_bytes_above_start", "batch_bytes"))
        print(f"{document['seconds']:.1f} s   {peak:.0f} MiB above the start, the batch {batch:.0f} MiB")
        return
    for name in ("cold", "warm", "resumed"):
        memory = document[f"{name}_bytes_for_rows"] / 2**20
        print(f"{name:8} {document[f'{name}_seconds']:6.1f} s   {memory:6.0f} MiB for rows")


OPTIONS = parse()

if __name__ == "__main__":
    if OPTIONS.child:
        folder, rows, moment, saving = OPTIONS.child
        start(Path(folder), Path(rows), float(moment), saving == "True")
    else:
        main()
