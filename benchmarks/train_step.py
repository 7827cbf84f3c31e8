"""Compare a training step of each stage with the plain implementation: time, peak memory, device utilisation.

    python benchmarks/train_step.py --model small --stage warmup [--json]
    python benchmarks/train_step.py --model qwen2-vl-2b --stage contrastive --batch-size 1024
    python benchmarks/train_step.py --model small --stage bridge --lengths
    python benchmarks/train_step.py --model small --stage warmup --side plain --grow

Plain: ``labels=`` on the stock class, and so logits ``[B, L, V]``; a dense 4-D mask; batches of rows in the given
order, padded to the longest; in the contrastive stage, the whole batch in one forward pass. Ours: the head at masked
positions only; batches of rows of similar length; in the contrastive stage, gradient-cached chunks of pairs sorted by
length. Both have the same rows and the same random weights, and the losses of a common batch are compared first.

With ``--adapter`` both sides train an adapter of PEFT, which is never merged. ``--side`` measures only one side; with
``--grow``, the rows are doubled again and again until they no longer fit into memory.

Each side runs in its own process, so that peak memory is measured separately. There are several passes over the rows,
on CUDA one more that is not measured; times are medians over the measured passes.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from typing import Any

import torch

from shared.measuring import best_device, machine
from shared.models import MODELS
from shared.output import command_line, report
from steps.sides import measure, measure_growing

MIB = 2**20


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--stage", choices=("warmup", "bridge", "contrastive"), default="warmup")
    parser.add_argument("--batch-size", type=int, help="rows of a step (8), or pairs (64)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a pass over the rows")
    parser.add_argument("--passes", type=int, default=2, help="measured passes")
    parser.add_argument("--chunk", type=int, default=8, help="items at once under the gradient cache")
    parser.add_argument("--image-sides", type=int, nargs=2, help="minimum and maximum visual tokens per side")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--adapter", choices=("lora", "dora"), help="train an adapter, not the weights")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout of the adapter")
    parser.add_argument("--peft", action="store_true", help="use PEFT's own adapter on both sides")
    parser.add_argument("--attention", default="sdpa", help="the attention of ours: sdpa or flex_attention")
    parser.add_argument("--lengths", action="store_true", help="ours at 1, 2 and 4 times the rows, of one length")
    parser.add_argument("--side", choices=("ours", "plain"), help="measure one side, and print JSON")
    parser.add_argument("--grow", action="store_true", help="with --side: double the rows while they fit into memory")
    parser.add_argument("--most-rows", type=int, help="with --grow: the maximum number of rows to try")
    parser.add_argument("--same-length", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.batch_size = options.batch_size or (64 if options.stage == "contrastive" else 8)
    options.image_sides = tuple(options.image_sides or ((2, 4) if options.model == "small" else (8, 16)))
    return options


def run_side(side: str, *arguments: str) -> dict[str, Any]:
    """Measure a side in its own process; running out of memory is also a result."""
    command = [sys.executable, __file__, *sys.argv[1:], *arguments, "--side", side]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout)
    if "out of memory" in done.stderr.lower() or "can't allocate memory" in done.stderr or done.returncode == -9:
        return {"failed": "out of memory"}
    raise SystemExit(f"the {side} side failed:\n{done.stderr}")


def compare() -> dict[str, Any]:
    ours, plain = run_side("ours"), run_side("plain")
    ratio = None
    if "failed" not in ours and "failed" not in plain:
        tolerance = 2e-2 if torch.cuda.is_available() else 1e-3
        if abs(ours["loss"] - plain["loss"]) > tolerance * abs(plain["loss"]):
            raise SystemExit(f"the two sides compute different losses: {ours['loss']} and {plain['loss']}")
        ratio = {
            "steps_per_second": plain["seconds_per_step"] / ours["seconds_per_step"],
            "peak_memory_bytes": ours["peak_memory_bytes"] / plain["peak_memory_bytes"],
            "peak_above_model_bytes": ours["peak_above_model_bytes"] / max(plain["peak_above_model_bytes"], 1),
        }
    return {"ours": ours, "plain": plain, "ratio": ratio}


def sweep(batch_size: int) -> dict[str, Any]:
    """Time ours at growing numbers of rows of one length; the exponent is the slope of log time over log tokens."""
    points = []
    for factor in (1, 2, 4):
        side = run_side("ours", "--batch-size", str(factor * batch_size), "--same-length", "96")
        if "failed" in side:
            raise SystemExit(f"{factor} times {batch_size} rows: {side['failed']}; lower --batch-size")
        points.append({key: side[key] for key in ("tokens_per_step", "seconds_per_step")})
    logarithms = ([math.log(point[key]) for point in points] for key in ("tokens_per_step", "seconds_per_step"))
    return {"points": points, "exponent": statistics.linear_regression(*logarithms).slope}


def show(result: dict[str, Any]) -> None:
    print(f"{result['model']}, {result['stage']}, on {result['device']}")
    if "points" in result:
        for point in result["points"]:
            print(f"{point['tokens_per_step']:9.0f} tokens  {point['seconds_per_step'] * 1000:9.0f} ms a step")
        print(f"time grows with tokens to the power of {result['exponent']:.2f}")
        return
    for name in ("ours", "plain"):
        side = result[name]
        if "failed" in side:
            print(f"{name:6} {side['failed']}")
            continue
        print(
            f"{name:6} {side['seconds_per_step'] * 1000:8.0f} ms a step  {side['tokens_per_second']:9.0f} tokens/s  "
            f"{side['peak_memory_bytes'] / MIB:8.0f} MiB, {side['peak_above_model_bytes'] / MIB:.0f} above the model  "
            f"{side['mfu']:.1%} MFU"
        )
    if ratio := result["ratio"]:
        print(
            f"ours over plain: {ratio['steps_per_second']:.2f} times the steps a second, "
            f"{ratio['peak_memory_bytes']:.2f} of the memory, {ratio['peak_above_model_bytes']:.2f} above the model"
        )


def main() -> None:
    options = parse()
    if options.side:
        print(json.dumps({"sizes": measure_growing(options)} | machine(best_device()) if options.grow
                         else measure(options)))  # fmt: skip
        return
    settings = {"model": options.model, "stage": options.stage, "batch_size_rows": options.batch_size}
    settings |= {"steps": options.steps, "gradient_checkpointing": options.gradient_checkpointing}
    result = {**settings, **(sweep(options.batch_size) if options.lengths else compare()), **machine(best_device())}
    report(result, show, as_json=options.json)


if __name__ == "__main__":
    main()
