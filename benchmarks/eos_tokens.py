"""What several ``<EOS>`` find that one does not, on scenes of two to six objects with captions about one of them.

    python benchmarks/eos_tokens.py                                  # K = 1, 2, 4, 8; three seeds; two hours of a core
    python benchmarks/eos_tokens.py --k 1 4 --seeds 1 --steps 2 4 2  # only to see that it works

All stages of CoCoA are trained from the package's captioner, with the settings of the recipe ``tiny``: a warm-up for
each seed, then a bridge and a contrastive stage with ``eos_tokens: K`` for each K. Texts of the first two stages name
all objects of a scene ("small red star, large blue ring in picture"). Those of the contrastive stage, and the queries,
are about one object ("a small red star in picture"): each object of a held-out scene is a query for its scene. Other
scenes with such an object are not candidates for that query, so that only one is right. Scores are the mean MaxSim of
the first n vectors.

The table gives the bytes of a point's n vectors in float32, and of what an index stores: vector 1 for the search, and
all n for rescoring. The held-out scenes are the same for all seeds.

Writes ``eos_tokens.json`` and ``eos_tokens.md`` to ``--out``. The same command resumes an interrupted run.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor

from arms.summary import estimate
from cocoa_embed.cli.output import silence_libraries
from cocoa_embed.data.rows import Item
from cocoa_embed.demo.scenes import BACKGROUNDS, COLOURS, IMAGE_SIZE, RADII, SHAPES, Scene, SceneObject, draw
from cocoa_embed.errors import CocoaError
from cocoa_embed.evaluation.result_cache import make_folder, write_result
from cocoa_embed.evaluation.significance import mean_intervals
from cocoa_embed.model.backbone import load_backbone, read_config
from cocoa_embed.report.tables import Score, Table, to_markdown
from cocoa_embed.train import Recipe, run
from cocoa_embed.train.stages.contrastive.inputs import preprocess_items
from cocoa_embed.train.stages.contrastive.loss import mean_max_sim, prefixes
from cocoa_embed.train.stages.contrastive.model import as_sentence_transformer
from cocoa_embed.train.stages.rendering import batched
from shared.measuring import best_device, machine
from shared.output import command_line, report

BACKBONE = "scene-captioner"
CELL, SIDE = IMAGE_SIZE // 2, 3
CAPTION = "a {} in picture"
WHOLE = ("{} in picture", ", "), ("picture; {}", "; ")
"""The ways to name all objects of a scene, each with the separator between two of them."""

OBJECTS = range(2, 7)
KINDS = [SceneObject(*each, "top left") for each in product(RADII, COLOURS, SHAPES)]
TRAINING, HELD_OUT = 4000, 300
RECALLS = (1, 5, 10)
AT_ONCE = 128
MAX_LENGTH = 96
FLOAT_BYTES = 4

SETTINGS = (
    f"backbone={BACKBONE}",
    f"max_pixels={(CELL * SIDE) ** 2}",
    f"max_length={MAX_LENGTH}",
    "bridge.data.paraphrases=1",
    "bridge.probe_rows=0",
    "contrastive.data.limit=null",
    "warmup.batch_size=32",
    "bridge.batch_size=32",
    "contrastive.batch_size=64",
    "contrastive.learning_rate=6.0e-4",
)


def scenes(generator: random.Random) -> Iterator[tuple[Image.Image, list[str]]]:
    """Yield scenes of different objects in the cells of a 3 x 3 grid, and the names of the objects."""
    while True:
        background, kinds = generator.choice(tuple(BACKGROUNDS)), generator.sample(KINDS, generator.choice(OBJECTS))
        picture = Image.new("RGB", (CELL * SIDE, CELL * SIDE), BACKGROUNDS[background])
        for kind, cell in zip(kinds, generator.sample(range(SIDE**2), len(kinds)), strict=True):
            alone = draw(Scene(background, (kind,)), generator).crop((0, 0, CELL, CELL))
            picture.paste(alone, (cell % SIDE * CELL, cell // SIDE * CELL))
        yield picture, [*map(str, kinds)]


def write_scenes(folder: Path, count: int, seed: str) -> list[list[str]]:
    """Write an image folder, if it is missing, and return each scene's captions about one object."""
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        make_folder(folder)
        rows = []
        for number, (picture, names) in enumerate(islice(scenes(random.Random(seed)), count)):
            picture.save(folder / f"{number:05d}.png")
            orders = names, random.Random(f"{seed}/{number}").sample(names, len(names))
            whole = [text.format(between.join(order)) for (text, between), order in zip(WHOLE, orders, strict=True)]
            row = {"file_name": f"{number:05d}.png", "text": whole[0], "captions": whole}
            rows.append({**row, "objects": [CAPTION.format(name) for name in names]})
        write_result(metadata, "".join(f"{json.dumps(row)}\n" for row in rows))
    return [json.loads(line)["objects"] for line in metadata.read_text(encoding="utf-8").splitlines()]


def train(options: argparse.Namespace, seed: int, count: int) -> tuple[Path, dict[str, float]]:
    """Train a model of ``count`` vectors, or resume it; return its folder, and the seconds of its stages."""
    training = options.out / "data" / f"seed-{seed}"
    captions = write_scenes(training, TRAINING, f"training {seed}")
    pairs = [
        {"query_image": f"{number:05d}.png", "positive_text": text}
        for number, texts in enumerate(captions)
        for text in texts
    ]
    write_result(training / "pairs.jsonl", "".join(f"{json.dumps(pair)}\n" for pair in pairs))
    lengths = dict(zip(("warmup", "bridge", "contrastive"), options.steps, strict=True))
    common = [*SETTINGS, f"data.folder={json.dumps(str(training))}", f"seed={seed}"]
    common += [f"contrastive.data.file={json.dumps(str(training / 'pairs.jsonl'))}"]
    common += [f"{stage}.steps={steps}" for stage, steps in lengths.items()]
    common += [f"{stage}.warmup_steps={steps // 20}" for stage, steps in lengths.items()]
    folder = options.out / f"seed-{seed}"
    first = Recipe.load("tiny", [*common, "bridge=null", "contrastive=null"])
    done = run(first, folder / "warmup", resume=True)
    start = [f"backbone={json.dumps(str(done[-1].folder))}", f"eos_tokens={count}", "warmup=null"]
    done += run(Recipe.load("tiny", [*common, *start]), folder / f"k-{count}", resume=True)
    return done[-1].folder, {result.stage: result.seconds for result in done}


@torch.inference_mode()
def embed(checkpoint: Path, count: int, items: Sequence[Item]) -> Tensor:
    """Embed items with all vectors of a model: ``[items, count * width]``."""
    settings = [f"backbone={json.dumps(str(checkpoint))}", f"eos_tokens={count}", f"max_length={MAX_LENGTH}"]
    recipe = Recipe.load("tiny", settings)
    backbone = load_backbone(str(checkpoint), vectors=count)
    model = as_sentence_transformer(backbone, recipe).to(best_device()).eval()
    batches = (send_to_device(preprocess_items(model, part), model.device) for part in batched(items, AT_ONCE))
    return torch.cat([model(batch)["sentence_embedding"].float().cpu() for batch in batches])


def score(checkpoint: Path, count: int, folder: Path, captions: list[list[str]]) -> dict[str, list[list[float]]]:
    """Return, for each number of vectors and each query, whether its scene is among the first 1, 5 and 10."""
    queries = sorted({text for of_scene in captions for text in of_scene})
    images = embed(checkpoint, count, [Item(images=(folder / f"{number:05d}.png",)) for number in range(len(captions))])
    texts, width = embed(checkpoint, count, [Item(text=text) for text in queries]), images.shape[1] // count
    found = {}
    for vectors in prefixes(count):
        similarities = mean_max_sim(texts[:, : vectors * width], images[:, : vectors * width], width).numpy()
        of_vectors = found[str(vectors)] = list[list[float]]()
        for scene, of_scene in enumerate(captions):
            for text in of_scene:
                row = similarities[queries.index(text)]
                wrong = [text not in others for others in captions]
                rank = int((row[wrong] >= row[scene]).sum())
                of_vectors.append([float(rank < k) for k in RECALLS])
    return found


def outcome(options: argparse.Namespace, seed: int, count: int) -> dict[str, Any]:
    """Return the hits of a model's queries, and the seconds of its stages; it is trained and scored only once."""
    file = options.out / f"seed-{seed}" / f"scores-k-{count}-{'-'.join(map(str, options.steps))}.json"
    if not file.is_file():
        folder = options.out / "data" / "held-out"
        captions = write_scenes(folder, HELD_OUT, "held-out")
        checkpoint, seconds = train(options, seed, count)
        write_result(file, json.dumps({"seconds": seconds, "hits": score(checkpoint, count, folder, captions)}))
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def results(options: argparse.Namespace, outcomes: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the means over seeds, with intervals over queries (grouped by scene) and over seeds."""
    captions = write_scenes(options.out / "data" / "held-out", HELD_OUT, "held-out")
    width = read_config(BACKBONE).get_text_config().hidden_size
    groups, points = np.repeat(np.arange(len(captions)), list(map(len, captions))), []
    for count, of_seeds in outcomes.items():
        for vectors in prefixes(count):
            hits = np.array([found["hits"][str(vectors)] for found in of_seeds])
            ends = mean_intervals(hits.mean(axis=0), groups, np.random.default_rng(0)).tolist()
            point: dict[str, Any] = {"k": count, "vectors": vectors, "bytes_float32": vectors * width * FLOAT_BYTES}
            point["bytes_stored"] = (vectors + (vectors > 1)) * width * FLOAT_BYTES
            for column, k in enumerate(RECALLS):
                of_seed = hits[:, :, column].mean(axis=1).tolist()
                over_seeds = estimate(of_seed).half_width
                mean = {"mean": fmean(of_seed), "interval": ends[column], "seeds": of_seed, "over_seeds": over_seeds}
                point[f"recall@{k}"] = mean
            points.append(point)
    seconds = {count: [found["seconds"] for found in of_seeds] for count, of_seeds in outcomes.items()}
    sizes = {"steps": options.steps, "scenes": TRAINING, "candidates": len(captions), "queries": len(groups)}
    return {**machine(best_device()), **sizes, "seconds": seconds, "points": points}


def table(document: dict[str, Any]) -> Table:
    """Return the results for readers."""
    rows = []
    for point in document["points"]:
        cells = [point[f"recall@{k}"] for k in RECALLS]
        shown = [Score(f"{c['mean']:.3f}", c["mean"], "{:.3f}-{:.3f}".format(*c["interval"])) for c in cells]
        spread = [f"± {half:.3f}" if (half := cell["over_seeds"]) is not None else "" for cell in cells[:1]]
        sizes = (point[name] for name in ("k", "vectors", "bytes_float32", "bytes_stored"))
        rows.append([*map(str, sizes), *shown, *spread])
    header = ["K", "vectors used", "bytes", "bytes stored", *(f"recall@{k}" for k in RECALLS), "recall@1 over seeds"]
    note = (
        f"{document['queries']} queries for {document['candidates']} scenes; other scenes with the object of a query"
        " are left out. Intervals: 95 % bootstrap over scenes with their queries; over seeds, Student's t."
    )
    return Table("Finding a scene by one of its objects", header, rows, [note])


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of vectors [1 2 4 8]")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on [3]")
    parser.add_argument("--steps", type=int, nargs=3, default=[300, 400, 800], help="steps of the stages [300 400 800]")
    parser.add_argument("--out", type=Path, default=Path("cocoa-eos-tokens"), help="folder for data, weights, results")
    options = parser.parse_args()
    silence_libraries()
    outcomes: dict[int, list[dict[str, Any]]] = {count: [] for count in options.k}
    try:
        for seed, count in product(range(options.seeds), options.k):
            started = time.process_time()
            outcomes[count].append(outcome(options, seed, count))
            print(f"seed {seed}, K {count}: {time.process_time() - started:.0f} CPU seconds", file=sys.stderr)
    except CocoaError as error:
        sys.exit(f"eos_tokens: {error}")
    document = results(options, outcomes)
    write_result(options.out / "eos_tokens.json", json.dumps(document, indent=1) + "\n")
    text = to_markdown("Several EOS tokens", [table(document)])
    write_result(options.out / "eos_tokens.md", text)
    report(document, lambda _: print(text), as_json=options.json)


if __name__ == "__main__":
    main()
