"""What the report shows of a run of the demo."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from cocoa_embed.report.content import Curve, RetrievalRow
from cocoa_embed.train import StageResult
from cocoa_embed.train.run_report.content import stage_curve, stage_curves

_PACKAGES = ("torch", "transformers", "sentence-transformers", "qdrant-client", "llama-index-core")


def curves(stages: Sequence[StageResult], comparison: StageResult) -> list[Curve]:
    """Return the loss curves of each stage, and of contrastive learning alone."""
    return [*stage_curves(stages), stage_curve("contrastive only", comparison)]


def retrieval_rows(results: dict[str, Any], candidates: int) -> list[RetrievalRow]:
    """Return all three stages, contrastive learning alone, and chance among ``candidates``, in both directions."""
    chance = chance_metrics(candidates)
    return [
        RetrievalRow(name, direction, metrics["recall@1"], metrics["recall@5"], metrics["recall@10"], metrics["mrr"])
        for key, direction in (("text_to_image", "text → image"), ("image_to_text", "image → text"))
        for name, metrics in (
            ("all three stages", results[key]),
            ("contrastive only", results["contrastive_only"][key]),
            ("chance", chance),
        )
    ]


def chance_metrics(candidates: int) -> dict[str, float]:
    """Return what a random order of ``candidates`` scores, one of them being right."""
    recall = {f"recall@{k}": min(1.0, k / candidates) for k in (1, 5, 10)}
    return recall | {"mrr": sum(1 / rank for rank in range(1, candidates + 1)) / candidates}


def facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the machine, the versions, the seed, the seconds of each part and the peak memory."""
    return [
        ("machine", f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"),
        ("versions", ", ".join(f"{package} {version(package)}" for package in _PACKAGES)),
        ("seed", str(results["seed"])),
        *((f"seconds, {part}", f"{value:.0f}") for part, value in results["seconds"].items()),
        ("peak memory", f"{results['peak_memory_bytes']['total'] / 2**30:.2f} GiB"),
    ]
