from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_files import EXAMPLES

from cocoa_embed.data.mmeb import (
    AVERAGES,
    META_TASKS,
    PUBLISHED,
    SUBSETS,
    TRAIN_SUBSETS,
    split_instruction,
    without_image_token,
)
from cocoa_embed.errors import RowError


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
    for model, published in PUBLISHED.items():
        scores = dict(zip(AVERAGES, published, strict=True))
        by_task = sum(scores[task] * count for task, count in zip(META_TASKS, (10, 10, 12, 4), strict=True)) / 36
        expected = pytest.approx(scores["overall"], abs=0.2)
        by_domain = scores["overall"] if scores["IND"] is None else (20 * scores["IND"] + 16 * scores["OOD"]) / 36
        if by_task != expected or by_domain != expected:
            differing.add(model)
    # As published: 59.3, where both ways give 60.1.
    assert differing == {"VLM2Vec (Qwen2-VL-2B)"}


@pytest.mark.parametrize("subset", TRAIN_SUBSETS)
def test_instruction_and_content_of_every_subset_are_separated(subset: str) -> None:
    for side, example in zip(("query", "target"), EXAMPLES[subset], strict=True):
        instruction, content = (part or None for part in example.split("|"))
        assert split_instruction(subset, side, example.replace("|", "")) == (instruction, content)
        unknown = f"Zoom in. {example.replace('|', '')}"
        assert split_instruction(subset, side, unknown) == (None, unknown)


@pytest.mark.parametrize(
    ("subset", "text", "expected"),
    [
        ("ImageNet-1K", "Represent the given image for classification.", 0),
        ("MSCOCO", 'Crop the image to to isolate the object labeled as "dog"', 1),
        ("OK-VQA", "Represent the given image with the following questions: what?", None),
        ("NIGHTS", "Find a day-to-day image that looks similar to the provided image. Now!", None),
        ("Place365", "Identify the scene shown in the image", None),
    ],
)
def test_variants_of_an_instruction_are_known_and_texts_that_resemble_it_are_content(
    subset: str, text: str, expected: int | None
) -> None:
    parts = split_instruction(subset, "query", text)
    assert parts == ((None, text) if expected is None else (text, None) if not expected else (text[:-5], '"dog"'))


@given(
    subset=st.sampled_from([*TRAIN_SUBSETS, "ImageNet-1K", "mine"]),
    side=st.sampled_from(["query", "target"]),
    start=st.sampled_from([example.replace("|", "") for pair in EXAMPLES.values() for example in pair]),
    cut=st.integers(0, 130),
    rest=st.text(max_size=9),
)
def test_instruction_and_content_joined_are_the_text(subset: str, side: str, start: str, cut: int, rest: str) -> None:
    text = start[:cut] + rest
    parts = split_instruction(subset, side, text)  # type: ignore[arg-type]
    assert "".join(part for part in parts if part is not None) == text
    assert "" not in parts


def test_an_image_token_without_an_image_is_refused_but_in_the_queries_that_are_published_like_this() -> None:
    webqa = "Find a Wikipedia image that answers this question: who?"
    assert without_image_token(f"<|image_1|>\n{webqa}\n", has_image=False, source="row 1") == webqa
    with pytest.raises(RowError, match=r"row 1: .* holds <\|image_1\|>, but the row has no image path"):
        without_image_token("<|image_1|>\nIdentify the object", has_image=False, source="row 1")
