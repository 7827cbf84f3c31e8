"""An exported model in mteb 2, and mteb's scores against our own. Skipped where mteb is not installed."""

from pathlib import Path

import pytest

pytest.importorskip("mteb", minversion="2")

from exported import write_checkpoint

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.evaluation.pairs import evaluate_pairs
from cocoa_embed.evaluation.pairs_reader import read_pairs
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.export import export_model
from cocoa_embed.model.loading import load_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "mteb_evaluation.py"
SAME = {"recall_at_1": "recall@1", "recall_at_5": "recall@5", "recall_at_10": "recall@10", "ndcg_at_10": "ndcg@10"}


@pytest.fixture
def exported(tiny_backbone: Backbone, tmp_path: Path) -> Path:
    """With prompts for queries and documents, so that scores differ where they are left out."""
    return export_model(write_checkpoint(tiny_backbone, tmp_path / "checkpoint"), tmp_path / "exported")


def test_mteb_gives_the_scores_that_eval_pairs_gives(
    exported: Path, scene_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    from mteb_evaluation import evaluate

    theirs = evaluate(str(exported), scene_folder)
    encoder, pairs = Encoder(load_model(exported)), read_pairs(scene_folder)
    ours = evaluate_pairs([encoder], pairs, resamples=10)["subsets"]
    for task, direction in (("LocalTextToImage", "text_to_image"), ("LocalImageToText", "image_to_text")):
        for name, metric in SAME.items():
            assert theirs[task][name] == pytest.approx(ours[direction][metric], abs=1e-4), (task, name)
    assert 0 < ours["text_to_image"]["recall@10"] < 1

    encoder.model.prompts = dict.fromkeys(encoder.model.prompts, "")
    # The prompts make a difference, so mteb has used them.
    assert evaluate_pairs([encoder], pairs, resamples=10)["subsets"] != ours
