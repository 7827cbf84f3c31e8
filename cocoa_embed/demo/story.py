"""The demo: draw scenes, train three stages, export, measure, index, search, and report, in one command."""

import json
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from sentence_transformers import SentenceTransformer
from transformers import Trainer

from cocoa_embed.demo.gallery import answer_queries
from cocoa_embed.demo.reconstructions import bridge_reconstructions, warmup_reconstructions
from cocoa_embed.demo.report import (
    BridgeMask,
    Curve,
    DemoReport,
    PatchReconstruction,
    QueryResult,
    RetrievalRow,
    TokenReconstruction,
    write_report,
)
from cocoa_embed.demo.scenes import write_image_folder
from cocoa_embed.demo.table import retrieval_table
from cocoa_embed.encoder import Encoder
from cocoa_embed.errors import UsageError
from cocoa_embed.evaluation import ranks, retrieval_metrics
from cocoa_embed.export import TRAINING_FILE, build_sentence_transformer, read_training, save_sentence_transformer
from cocoa_embed.folders import claim_folder, refuse_foreign_folder
from cocoa_embed.images import load_image
from cocoa_embed.integrations.qdrant import QdrantIndexer
from cocoa_embed.train import Recipe, StageResult, run
from cocoa_embed.train.data import Row, read_image_folder

MARKER = ".cocoa-demo"
TRAINING_SCENES = 8000
HELD_OUT_SCENES = 500
SHOWN_RECONSTRUCTIONS = 8

Metrics = dict[str, dict[str, float]]


@dataclass
class Meter:
    """Wall-clock seconds of each part, and the process's peak memory in bytes at the end of each."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str, console: Console) -> Iterator[None]:
        """Announce and measure a part."""
        console.print(f"[bold]{name}[/bold]")
        started = time.perf_counter()
        yield
        self.record(name, time.perf_counter() - started)

    def record(self, name: str, seconds: float) -> None:
        """Note the seconds of a part that has just ended."""
        self.seconds[name] = round(seconds, 2)
        self.peak_memory_bytes[name] = peak_memory_bytes()


def peak_memory_bytes() -> int:
    """Return the most resident memory this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Reconstructions:
    """What the report shows of stages 1 and 2; filled while they end."""

    rows: list[Row]
    patches: list[PatchReconstruction] = field(default_factory=list)
    tokens: list[TokenReconstruction] = field(default_factory=list)
    mask: BridgeMask | None = None

    def inspect(self, stage: str, trainer: Trainer) -> None:
        """Reconstruct held-out rows with a stage's model, before its decoder is thrown away."""
        if stage == "warmup":
            self.patches, tokens = warmup_reconstructions(trainer.model, trainer.data_collator, self.rows)
        elif stage == "bridge":
            tokens, self.mask = bridge_reconstructions(trainer.model, trainer.data_collator, self.rows)
        else:
            return
        self.tokens += tokens


def run_demo(out: Path, work: Path, seed: int = 0, recipe: str = "tiny") -> dict[str, Any]:
    """Run the whole story; write ``work`` (data, runs, index, ``results.json``, ``report.html``) and the model ``out``.

    :param recipe: A recipe's name or file; its data folders are replaced by the drawn scenes.
    :returns: What ``results.json`` holds: ``text_to_image`` and ``image_to_text`` (recall@1/5/10 and mrr on held-out
        scenes), ``contrastive_only`` with the same keys, ``seconds`` and ``peak_memory_bytes`` by part and ``total``.
    :raises CocoaError: If ``out`` or ``work`` holds something else.
    """
    started = time.perf_counter()
    console, meter = Console(stderr=True), Meter()
    if work.resolve().is_relative_to(out.resolve()) or out.resolve().is_relative_to(work.resolve()):
        raise UsageError(f"{out} and {work} lie inside each other; give --out and --work folders apart.")
    refuse_foreign_folder(out, marker=TRAINING_FILE)
    claim_folder(work, marker=MARKER)
    with meter.part("data", console):
        write_image_folder(work / "data" / "train", "train", TRAINING_SCENES, seed)
        write_image_folder(work / "data" / "held-out", "held-out", HELD_OUT_SCENES, seed)
    held_out = read_image_folder(work / "data" / "held-out")

    whole = demo_recipe(recipe, work / "data" / "train", seed)
    alone = whole.model_copy(update={"name": "contrastive only", "warmup": None, "bridge": None})
    shown = Reconstructions(held_out[:SHOWN_RECONSTRUCTIONS])

    def inspect(stage: str, trainer: Trainer) -> None:
        meter.peak_memory_bytes[stage] = peak_memory_bytes()
        shown.inspect(stage, trainer)

    stages = run(whole, work / "runs" / "three-stages", inspect=inspect)
    meter.seconds |= {stage.stage: round(stage.seconds, 2) for stage in stages}
    (comparison,) = run(alone, work / "runs" / "contrastive-only")
    meter.record("contrastive_only", comparison.seconds)

    with meter.part("evaluation", console):
        model, metrics = evaluate(stages[-1].folder, held_out, whole)
        _, alone_metrics = evaluate(comparison.folder, held_out, alone)
    training = read_training(stages[-1].folder) | {
        "data": f"{TRAINING_SCENES} drawn scenes, of which the contrastive stage saw the first "
        f"{whole.data_of('contrastive').limit or TRAINING_SCENES} as pairs",
        "results": {f"{HELD_OUT_SCENES} held-out scenes, {name.replace('_', ' ')}": m for name, m in metrics.items()},
    }
    save_sentence_transformer(model, out, training)

    with meter.part("index and search", console):
        # From here on only what a user has: the exported folder.
        exported = SentenceTransformer(str(out), local_files_only=True)
        with QdrantIndexer(exported, path=work / "index", collection="held-out") as indexer:
            summary = indexer.index(work / "data" / "held-out")
            queries = answer_queries(indexer, held_out)
    meter.record("total", time.perf_counter() - started)
    results = {
        **metrics,
        "contrastive_only": alone_metrics,
        "seconds": meter.seconds,
        "peak_memory_bytes": meter.peak_memory_bytes,
        "indexed": summary.indexed,
        "seed": seed,
    }
    (work / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_report(build_report(results, [*stages, comparison], shown, queries), work / "report.html")
    console.print(retrieval_table(metrics, alone_metrics, HELD_OUT_SCENES))
    for label, written in (
        ("model", out),
        ("report", work / "report.html"),
        ("results", work / "results.json"),
    ):
        console.print(f"{label:8} {written}", soft_wrap=True)
    minutes, memory = meter.seconds["total"] / 60, meter.peak_memory_bytes["total"] / 2**30
    console.print(f"{minutes:.1f} minutes, at most {memory:.1f} GiB of memory")
    return results


def demo_recipe(name: str, folder: Path, seed: int) -> Recipe:
    """Return a recipe with every stage's data taken from ``folder``."""
    return Recipe.load(name, [f"data.folder={json.dumps(str(folder))}", f"seed={seed}"])


def evaluate(checkpoint: Path, rows: list[Row], recipe: Recipe) -> tuple[SentenceTransformer, Metrics]:
    """Measure retrieval among ``rows``, each text's own image being the right answer, and the other way round."""
    model = build_sentence_transformer(checkpoint, prompts=recipe.prompts.model_dump())
    encoder = Encoder(model)
    texts = [{"text": row.positive.text or ""} for row in rows]
    images = [{"image": load_image(row.image)} for row in rows if row.image is not None]
    own = np.arange(len(rows))
    metrics = {}
    for name, queries, candidates in (("text_to_image", texts, images), ("image_to_text", images, texts)):
        similarities = encoder.embed_queries(queries) @ encoder.embed_documents(candidates).T
        metrics[name] = retrieval_metrics(ranks(similarities, own))
    return model, metrics


def build_report(
    results: dict[str, Any], stages: list[StageResult], shown: Reconstructions, queries: list[QueryResult]
) -> DemoReport:
    """Gather what the page shows."""
    return DemoReport(
        title="CoCoA on drawn scenes",
        subtitle="A small vision-language model made bidirectional, taught to reconstruct through <EOS>, and trained "
        f"to retrieve. Measured on {HELD_OUT_SCENES} scenes that no stage has seen.",
        facts=_facts(results),
        table=report_table(results),
        curves=[_curve(stage, name) for stage, name in zip(stages, CURVE_NAMES[-len(stages) :], strict=True)],
        patches=shown.patches,
        tokens=shown.tokens,
        bridge_mask=shown.mask,
        queries=queries,
        notes=[
            "Contrastive only: the same backbone, the same pairs, the same number of contrastive steps, without the "
            "two reconstruction stages. It spent less compute; see docs/experiments.md for what more steps buy it.",
            "The model has 3 million parameters and has seen drawn scenes only. It finds a photograph's copies, not "
            "its meaning.",
        ],
    )


CURVE_NAMES = ("warm-up", "bridge", "contrastive", "contrastive only")
_LOGGED = ("loss", "mntp_loss", "mae_loss", "hidden_token_accuracy", "accuracy_right_image", "accuracy_shuffled_image")


def _curve(stage: StageResult, name: str) -> Curve:
    series = {key: [(int(line["step"]), line[key]) for line in stage.log if key in line] for key in _LOGGED}
    return Curve(name, {key: points for key, points in series.items() if points}, stage.seconds)


def report_table(results: dict[str, Any]) -> list[RetrievalRow]:
    """Return the rows of the results table: ours, contrastive learning alone, and chance, in both directions."""
    harmonic = sum(1 / rank for rank in range(1, HELD_OUT_SCENES + 1)) / HELD_OUT_SCENES
    chance = {f"recall@{k}": k / HELD_OUT_SCENES for k in (1, 5, 10)} | {"mrr": harmonic}
    rows = []
    for key, direction in (("text_to_image", "text → image"), ("image_to_text", "image → text")):
        for name, metrics in (
            ("all three stages", results[key]),
            ("contrastive only", results["contrastive_only"][key]),
            ("chance", chance),
        ):
            rows.append(
                RetrievalRow(
                    name, direction, metrics["recall@1"], metrics["recall@5"], metrics["recall@10"], metrics["mrr"]
                )
            )
    return rows


def _facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    packages = ("torch", "transformers", "sentence-transformers", "qdrant-client", "llama-index-core")
    seconds, memory = results["seconds"], results["peak_memory_bytes"]
    return [
        ("machine", f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"),
        ("versions", ", ".join(f"{package} {version(package)}" for package in packages)),
        ("seed", str(results["seed"])),
        *((f"seconds, {part}", f"{value:.0f}") for part, value in seconds.items()),
        ("peak memory", f"{memory['total'] / 2**30:.2f} GiB"),
    ]
