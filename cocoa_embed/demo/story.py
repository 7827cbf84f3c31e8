"""The demo: take photographs or draw scenes, train three stages, export, evaluate, index, search and report."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from sentence_transformers import SentenceTransformer

from cocoa_embed.data import CaptionChoice
from cocoa_embed.data.rows import Row
from cocoa_embed.demo import MARKER, check_folders
from cocoa_embed.demo.gallery import answer_queries
from cocoa_embed.demo.meter import Meter, peak_memory_bytes
from cocoa_embed.demo.photographs import findings, split_photographs
from cocoa_embed.demo.scenes import write_image_folder
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.evaluation.pairs import evaluate_pairs
from cocoa_embed.evaluation.pairs_reader import read_pairs
from cocoa_embed.evaluation.pairs_tables import SHOWN_METRICS, pairs_tables, shown_metrics
from cocoa_embed.folders import claim_folder, only_writer
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer
from cocoa_embed.model.export import save_sentence_transformer
from cocoa_embed.model.loading import load_model
from cocoa_embed.model.training_record import read_run, read_training
from cocoa_embed.report.content import EvalResult, Search
from cocoa_embed.report.page import render_page
from cocoa_embed.report.tables import to_terminal
from cocoa_embed.train import Recipe, StageResult, run
from cocoa_embed.train.data.caption_rows import read_image_folder

Metrics = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Demo:
    """The folders and sizes of one run.

    :param out: The folder of the exported model.
    :param work: The folder of everything else: ``data``, ``runs``, ``index``, ``results.json`` and ``report.html``.
    :param recipe: A recipe's name or file; its data are the images of the demo.
    :param training_images: The number of scenes to train on; with ``photos``, of photographs, set by the split.
    :param held_out_images: The number of held-out images to evaluate retrieval on; with ``photos``, set by the split.
    :param photos: A folder of captioned photographs to take instead of drawn scenes.
    :param captions: Which texts of a photograph to use.
    :param backbone: A folder or name to start from instead of the recipe's.
    """

    out: Path
    work: Path
    seed: int = 0
    recipe: str = "tiny"
    training_images: int = 8000
    held_out_images: int = 500
    photos: Path | None = None
    captions: CaptionChoice = "text"
    backbone: str | None = None

    def run(self) -> dict[str, Any]:
        """Run the demo.

        :returns: What ``results.json`` holds: ``text_to_image`` and ``image_to_text`` (recall@1/5/10 and mrr on
            held-out scenes), ``contrastive_only`` with the same keys, ``seconds`` and ``peak_memory_bytes`` by part
            and ``total``, ``indexed`` and ``seed``.
        :raises CocoaError: If ``out`` or ``work`` holds something else, or another run writes to ``work``.
        :raises UsageError: If they are the same folder, or one lies inside the other.
        """
        started = time.perf_counter()
        console, meter = Console(stderr=True), Meter()
        check_folders(self.out, self.work, self.photos, self.backbone)
        with only_writer(self.work, marker=MARKER):
            claim_folder(self.work, marker=MARKER)
            with meter.part("data", console):
                whole = self._with_images(console)
            return whole._run(console, meter, started)

    def _run(self, console: Console, meter: Meter, started: float) -> dict[str, Any]:
        held_out = read_image_folder(self.work / "data" / "held-out")
        stages, comparison = self._train(meter)
        with meter.part("evaluation", console):
            model, scores = self._evaluate(stages[-1].folder, comparison.folder)
        shown = tuple(dict.fromkeys(SHOWN_METRICS + shown_metrics(scores)))
        ours, alone = ({way: {name: metrics[name] for name in shown} for way, metrics in each["subsets"].items()}
                       for each in (scores, scores["other"]))  # fmt: skip
        notes = self._notes(scores, model)
        self._export(model, stages[-1].folder, ours)
        with meter.part("index and search", console):
            queries, indexed = self._index_and_search(held_out)
        meter.record("total", time.perf_counter() - started)
        results = {
            **ours,
            "contrastive_only": alone,
            "seconds": meter.seconds,
            "peak_memory_bytes": meter.peak_memory_bytes,
            "indexed": indexed,
            "seed": self.seed,
        }
        (self.work / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        self._write_report(scores, queries, notes)
        console.print(
            f"Retrieval among {self.held_out_images} held-out {self._kind}, with 95% intervals; bold: best of a column"
        )
        for table in pairs_tables(scores, shown_metrics(scores))[: len(scores["subsets"])]:
            console.print(to_terminal(table))
        for note in notes if self.photos else ():
            console.print(note, markup=False, highlight=False)
        for label, written in {"model": self.out, "report": self.work / "report.html"}.items():
            console.out(f"{label:8} {written}", highlight=False)
        minutes, memory = meter.seconds["total"] / 60, meter.peak_memory_bytes["total"] / 2**30
        console.print(f"{minutes:.1f} minutes, at most {memory:.1f} GiB of memory")
        return results

    def _with_images(self, console: Console) -> "Demo":
        """Write the image folders, and return the demo with their sizes."""
        data = self.work / "data"
        if self.photos is not None:
            counts, faults = split_photographs(self.photos, self.captions, data)
            for fault in faults:
                console.out(f"left out: {fault}", highlight=False)
            return replace(self, training_images=counts["train"], held_out_images=counts["held-out"])
        write_image_folder(data / "train", "train", self.training_images, self.seed)
        write_image_folder(data / "held-out", "held-out", self.held_out_images, self.seed)
        return self

    @property
    def _kind(self) -> str:
        return "scenes" if self.photos is None else "photographs"

    def _train(self, meter: Meter) -> tuple[list[StageResult], StageResult]:
        folder = json.dumps(str(self.work / "data" / "train"))
        start = [] if self.backbone is None else [f"backbone={json.dumps(self.backbone)}"]
        whole = Recipe.load(self.recipe, [f"data.folder={folder}", f"seed={self.seed}", *start], check_paths=True)
        alone = whole.model_copy(update={"name": "contrastive only", "warmup": None, "bridge": None})
        stages = run(
            whole,
            self.work / "runs" / "three-stages",
            inspect=lambda stage, _: meter.peak_memory_bytes.update({stage: peak_memory_bytes()}),
        )
        meter.seconds |= {stage.stage: round(stage.seconds, 2) for stage in stages}
        (comparison,) = run(alone, self.work / "runs" / "contrastive-only")
        meter.record("contrastive_only", comparison.seconds)
        return stages, comparison

    def _evaluate(self, ours: Path, alone: Path) -> tuple[SentenceTransformer, dict[str, Any]]:
        named = {"all three stages": ours, "contrastive only": alone}
        encoders = [Encoder(load_model(folder), name) for name, folder in named.items()]
        pairs = read_pairs(self.work / "data" / "held-out", captions=self.captions)
        return encoders[0].model, evaluate_pairs(encoders, pairs, seed=self.seed)

    def _export(self, model: SentenceTransformer, checkpoint: Path, metrics: Metrics) -> None:
        training = read_training(checkpoint)
        kind = "drawn scenes" if self.photos is None else "captioned photographs"
        pairs = training["stages"][-1]["rows"]
        training["data"] = f"{self.training_images} {kind}; the contrastive stage saw {pairs} pairs of them"
        training["results"] = {
            f"{self.held_out_images} held-out {self._kind}, {direction.replace('_', ' ')}": measured
            for direction, measured in metrics.items()
        }
        save_sentence_transformer(model, self.out, training)

    def _index_and_search(self, held_out: list[Row]) -> tuple[list[Search], int]:
        # From here on, use only what a user has: the exported folder.
        exported = SentenceTransformer(str(self.out), local_files_only=True)
        named = Encoder(exported, str(self.out.absolute()))  # `cocoa-embed serve` finds the model by this name
        with QdrantIndexer(named, path=self.work / "index", collection="held-out") as indexer:
            summary = indexer.index(self.work / "data" / "held-out")
            return answer_queries(indexer, held_out), summary.indexed

    def _notes(self, scores: dict[str, Any], model: SentenceTransformer) -> list[str]:
        notes = [
            "Contrastive only: the same backbone, pairs, contrastive steps and learning rate, without the two "
            "reconstruction stages. It had less compute: this page does not show its scores at equal compute, nor at "
            "the learning rate that is best for it.",
        ]
        if self.photos is None:
            notes.append(
                "The model has 3 million parameters and has seen drawn scenes only. It finds copies of a photograph, "
                "but knows nothing of its meaning."
            )
            return notes
        parameters = sum(each.numel() for each in model.parameters())
        return [*findings(scores, parameters, self.training_images), *notes]

    def _write_report(self, scores: dict[str, Any], searches: list[Search], notes: list[str]) -> None:
        runs, data = self.work / "runs", self.work / "data" / "held-out"
        page = render_page(
            read_run(runs / "three-stages"),
            str(runs / "three-stages"),
            [EvalResult(scores, pairs_tables(scores), str(self.work / "results.json"), is_own=True, data=str(data))],
            title=f"CoCoA on {'drawn scenes' if self.photos is None else self.photos.name}",
            subtitle="A small vision-language model made bidirectional, trained to reconstruct through <EOS>, and "
            f"trained to retrieve. Measured on {self.held_out_images} {self._kind} that no stage has seen.",
            searches=searches,
            notes=notes,
        )
        (self.work / "report.html").write_text(page, encoding="utf-8")
