from pathlib import Path

import numpy as np
import pytest

from cocoa_embed.demo.report_content import chance_metrics, curves, retrieval_rows
from cocoa_embed.evaluation.metrics import retrieval_metrics
from cocoa_embed.train import StageResult


@pytest.mark.parametrize("candidates", [1, 4, 10, 500])
def test_chance_is_the_mean_over_every_rank(candidates: int) -> None:
    every_rank = np.arange(1, candidates + 1)
    assert chance_metrics(candidates) == pytest.approx(retrieval_metrics(every_rank))


def test_the_rows_are_ours_the_comparisons_and_chance_in_both_directions() -> None:
    ours = {key: {"recall@1": one, "recall@5": 0.5, "recall@10": 0.75, "mrr": 0.6} for key, one in
            (("text_to_image", 0.4), ("image_to_text", 0.3))}  # fmt: skip
    alone = {key: {name: value / 2 for name, value in metrics.items()} for key, metrics in ours.items()}
    rows = retrieval_rows({**ours, "contrastive_only": alone}, candidates=100)
    assert [(row.direction, row.name, row.recall_at_1) for row in rows] == [
        ("text → image", "all three stages", 0.4),
        ("text → image", "contrastive only", 0.2),
        ("text → image", "chance", 0.01),
        ("image → text", "all three stages", 0.3),
        ("image → text", "contrastive only", 0.15),
        ("image → text", "chance", 0.01),
    ]


def test_a_curve_holds_what_its_stage_logged(tmp_path: Path) -> None:
    log = [{"step": 1, "loss": 3.0, "grad_norm": 9.0}, {"step": 2, "loss": 2.0, "accuracy_matching_image": 0.5}]
    stages = [StageResult(stage, tmp_path, 2, 24, 1.5, log) for stage in ("bridge", "contrastive")]
    drawn = curves(stages, StageResult("contrastive", tmp_path, 2, 24, 2.5, log[:1]))
    assert [curve.stage for curve in drawn] == ["bridge", "contrastive", "contrastive only"]
    assert drawn[0].series == {"loss": [(1, 3.0), (2, 2.0)], "accuracy_matching_image": [(2, 0.5)]}
    assert drawn[-1].seconds == 2.5
