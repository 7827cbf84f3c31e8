"""Handmade run records and evaluation documents, for tests of the report."""

from typing import Any

PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42m"
    "P8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
GEOMETRY = ("alignment", "uniformity", "modality_gap", "effective_rank", "pair_recall")
ACCURACIES = ("accuracy_matching_image", "accuracy_shuffled_image", "accuracy_no_image")


def log(*names: str, steps: int = 100) -> list[dict[str, float]]:
    """Return a log line for every fifth step; the first metric is the highest."""
    return [
        {"step": step, **{name: (0.5 + step / 1000) / place for place, name in enumerate(names, 1)}}
        for step in range(0, 5 * steps, 5)
    ]


def stage(*names: str, **changes: Any) -> dict[str, Any]:
    """Return a finished stage that logged metrics of these names."""
    return {
        "sources": {"data": {"folder": "scenes"}},
        "places": ["/scenes"],
        "rows": {"data": 1200},
        "fingerprint": "0123456789abcdef",
        "bad_rows": {"count": 0, "first": []},
        "batch_size": 4,
        "steps": 500,
        "step": 500,
        "seconds": 75.0,
        "finished": True,
        "trained_parameters": 1000,
        "held_out": {"rows": [], "seen_by": []},
        "log": log(*names),
        "samples": None,
        **changes,
    }


def tokens(**changes: Any) -> dict[str, Any]:
    """Return three tokens of a row, two of them masked, one predicted correctly."""
    sample = {"tokens": ["one", "two", "six"], "masked": [False, True, True], "predicted": ["one", "two", "ten"]}
    return {**sample, "image": PICTURE, **changes}


MASK = {
    "allowed": ["11100", "11100", "11111", "00111", "00111"],
    "labels": ["a", "picture", "<|im_end|>", "of", "red"],
    "blocks": ["A", "A", "EOS", "B", "B"],
}


def run_record(**changes: Any) -> dict[str, Any]:
    """Return ``run.json`` of a finished run of three stages."""
    section = {"steps": 500, "batch_size": 4, "learning_rate": 2e-5, "mask_ratio": 0.7}
    patches = [{"caption": "a red picture", "original": PICTURE, "masked": PICTURE, "reconstructed": PICTURE}]
    warmup = {"held_out": False, "patches": patches, "tokens": [tokens()]}
    bridge = {"held_out": True, "tokens": [tokens()], "mask": MASK}
    return {
        "version": 1,
        "id": "abc",
        "cocoa_embed": "0.1.0",
        "libraries": {"torch": "2.9"},
        "machine": {"platform": "Linux x86_64", "python": "3.12", "cpu_count": 2, "device": "cpu", "processes": 1},
        "backbone": "a-backbone",
        "origin": "folder",
        "inherited": {"stages": [], "data": []},
        "recipe": {
            "name": "small",
            "seed": 17,
            "bidirectional": True,
            "data": {"folder": "scenes"},
            "prompts": {"query": "find: ", "document": ""},
            **{name: {**section, "probe_rows": 0} for name in ("warmup", "bridge", "contrastive")},
        },
        "given": {"name": "small", **{name: section for name in ("warmup", "bridge", "contrastive")}},
        "stages": {
            "warmup": stage("loss", "mntp_loss", "mae_loss", "masked_token_accuracy", samples=warmup),
            "bridge": stage(
                "loss", *ACCURACIES, *GEOMETRY, samples=bridge, held_out={"rows": [0, 3], "seen_by": ["warmup"]}
            ),
            "contrastive": stage("loss", "alignment", places=["/pairs"]),
        },
        **changes,
    }


def pairs_document(model: str = "small/contrastive", **changes: Any) -> dict[str, Any]:
    """Return the document of ``cocoa-embed eval pairs`` for one direction."""
    names = ("recall@1", "recall@5", "recall@10", "hit@1", "hit@5", "hit@10", "mrr", "ndcg@10")
    scores = {"model": model, "subsets": {"text_to_image": {**dict.fromkeys(names, 0.5), "hit@1": 0.75}}}
    return {
        "benchmark": "pairs",
        **scores,
        "pairs": 3,
        "intervals": {"text_to_image": {name: [0.4, 0.8] for name in names}},
        "counts": {"text_to_image": {"queries": 3, "documents": 4, "groups": 3}},
        "chance": {"text_to_image": dict.fromkeys(names, 0.25)},
        "level": 0.95,
        "resamples": 10,
        "seed": 0,
        "data": {"path": "/held-out", "images": None, "columns": {}},
        **changes,
    }
