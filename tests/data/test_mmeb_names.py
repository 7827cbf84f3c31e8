from collections import Counter

import pytest

from cocoa_embed.data.mmeb import AVERAGES, META_TASKS, PUBLISHED, SUBSETS, TRAIN_SUBSETS


def test_the_benchmark_has_36_subsets_in_four_meta_tasks() -> None:
    assert len(SUBSETS) == 36
    assert Counter(subset.meta_task for subset in SUBSETS.values()) == {
        "classification": 10, "VQA": 10, "retrieval": 12, "grounding": 4
    }  # fmt: skip
    assert Counter(subset.in_domain for subset in SUBSETS.values()) == {True: 20, False: 16}


def test_the_in_domain_subsets_are_those_of_mmeb_train() -> None:
    assert len(TRAIN_SUBSETS) == 20
    assert (TRAIN_SUBSETS[0], TRAIN_SUBSETS[-1]) == ("ImageNet_1K", "MSCOCO")
    assert [name for name in TRAIN_SUBSETS if name not in SUBSETS] == ["ImageNet_1K"]


def test_published_averages_agree_with_each_other() -> None:
    """The overall score is the mean over subsets, so it follows from the meta-tasks, and from IND and OOD."""
    differing = set()
    for published in PUBLISHED:
        scores = dict(zip(AVERAGES, published.scores, strict=True))
        by_task = sum(scores[task] * count for task, count in zip(META_TASKS, (10, 10, 12, 4), strict=True)) / 36
        expected = pytest.approx(scores["overall"], abs=0.2)
        by_domain = scores["overall"] if scores["IND"] is None else (20 * scores["IND"] + 16 * scores["OOD"]) / 36
        if by_task != expected or by_domain != expected:
            differing.add(published.model)
    # As published: 59.3, where both ways give 60.1.
    assert differing == {"VLM2Vec (Qwen2-VL-2B)"}
