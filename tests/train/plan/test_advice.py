"""What does not fit a stage's rows is said in one sentence, with the setting to change."""

from pathlib import Path
from typing import Any

import pytest
from stages import alone

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.plan.advice import advise, different_rows
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.stages.bridge.settings import BridgeSettings
from cocoa_embed.train.stages.bridge.stage import Bridge
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
from cocoa_embed.train.stages.contrastive.stage import Contrastive
from cocoa_embed.train.stages.stage import Stage


def rows(images: int, *, each: int = 1, captions: int | None = None, question: str | None = "What?") -> RowTable:
    """Rows of ``images`` images, ``each`` times, with so many different captions."""
    return RowTable.of(
        Row(Item(question, (Path(f"{n % images}.png"),)), Item(f"caption {n % (captions or images)}"), f"row {n}")
        for n in range(images * each)
    )


PARAPHRASE = RowTable.of([Row(Item("one caption"), Item("another caption"), "paraphrase")])


def bridge(**values: Any) -> Stage[Any]:
    return alone(Bridge, BridgeSettings.model_validate({"batch_size": 8, "steps": 500, "probe_rows": 4, **values}))


def contrastive(**values: Any) -> Stage[Any]:
    return alone(Contrastive, ContrastiveSettings.model_validate({"batch_size": 8, "steps": 200, **values}))


@pytest.mark.parametrize(
    ("stage", "table", "expected"),
    [
        (bridge(), rows(200), []),
        (bridge(steps=499), rows(200), ["Stage bridge ends at step 499, before * raise bridge.steps to 500 "]),
        (bridge(steps=None, epochs=19), rows(200), ["raise bridge.epochs or bridge.min_steps to 500 "]),
        (bridge(), rows(199), ["199 rows, too few for the 500 steps * 20 times; * bridge=null"]),
        (bridge(steps=1100), rows(400), ["400 rows 22 times; * set bridge.steps=1000, "]),
        (bridge(), rows(200, captions=1), ["Block B of stage bridge is 'caption 0' in all rows of data"]),
        (bridge(steps=800), rows(160, each=2), []),
        (bridge(warmup_steps=500), rows(200), ["for 500 steps, but the stage has 500; lower bridge."]),
        (bridge(batch_size=65), rows(64, each=50), ["65 rows, but the stage has only 64 different rows; lower"]),
        (bridge(probe_rows=101), rows(200), ["too few images to hold 101 * takes 202), * lower bridge."]),
        (bridge(probe_rows=0), rows(200, each=5), []),
        (bridge(), rows(200, question=None), ["No row of stage bridge is text only, * bridge.data.paraphrases=2."]),
        (bridge(), RowTable.of([*rows(200, question=None), *PARAPHRASE]), []),
        (contrastive(), rows(100), []),
        (bridge(probe_rows=1), rows(200), ["bridge.probe_rows is 1, and one image cannot be shuffled"]),
        (contrastive(directions="forward"), rows(2, each=45), ["few negatives; give it more"]),
        (
            contrastive(directions="forward", steps=180, batch_size=100),
            rows(9),
            ["9 rows 180 times", "9, not 100; * lower contrastive."],
        ),
    ],
)
def test_each_warning_names_the_setting_to_change(stage: Stage[Any], table: RowTable, expected: list[str]) -> None:
    steps = stage.step_count(table)
    found = list(advise(stage, table, steps))
    assert len(found) == len(expected), found
    for sentence, parts in zip(found, expected, strict=True):
        assert all(part in sentence for part in parts.split(" * ")), sentence
        assert sentence.endswith(".")


def test_a_thousand_photographs_are_too_few_for_the_papers_recipe_and_not_for_that_of_an_own_folder() -> None:
    def warnings(recipe: str) -> list[str]:
        stages, table = Recipe.load(recipe).stages.values(), rows(1000)
        return [warning for stage in stages for warning in advise(stage, table, stage.step_count(table))]

    assert warnings("own-folder") == []
    parts = (
        "warmup draws each of its 1,000 rows 384 times",
        "bridge has 1,000 rows, too few for the 500 steps",
        "but the stage has 32",
        "contrastive draws each of its 1,000 rows 2,000 times",
        "its batches have 1000, not 1024",
    )
    assert [part in warning for part, warning in zip(parts, warnings("qwen2-vl-2b"), strict=True)] == [True] * 5


def test_rows_that_differ_on_either_side_are_different() -> None:
    assert different_rows(rows(6, each=3)) == 6
    assert different_rows(rows(6, each=2, captions=4)) == 12
