"""Which rows meet in a batch of stage 3, and what is known of it before the first step."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from stages import alone

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import UsageError
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.loop.processes import meet
from cocoa_embed.train.stages.contrastive.batches import PairBatches, StepContent, pair_groups, step_contents
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
from cocoa_embed.train.stages.contrastive.stage import Contrastive

SIZES = {"a": 37, "b": 12, "c": 5}


def settings_of(**values: Any) -> ContrastiveSettings:
    return ContrastiveSettings(steps=2, **{"batch_size": 8, "directions": "forward", **values})


def rows_of(
    count: int, subset: str = "data", *, queries: int = 10**6, positives: int = 10**6, hard: int = 0
) -> list[Row]:
    """Rows with so many different queries and positives, and as many hard negatives each."""
    negatives = tuple(Item(text=f"no {place}") for place in range(hard))
    return [
        Row(Item(images=(Path(f"{n % queries}.jpg"),)), Item(text=f"{subset} {n % positives}"), "", negatives, subset)
        for n in range(count)
    ]


TABLE = RowTable.of(chain.from_iterable(rows_of(size, name, positives=2) for name, size in SIZES.items()))


def batches(devices: int, steps: int, seed: int = 0, **values: Any) -> PairBatches:
    settings = settings_of(**values)
    return PairBatches(pair_groups(TABLE, settings), settings.batch_size, steps, seed, devices)


def parts(sampler: PairBatches) -> list[tuple[list[int], ...]]:
    """The steps of all devices, as accelerate deals them in training."""
    count = sampler.devices
    shards = [
        BatchSamplerShard(sampler, num_processes=count, process_index=n, even_batches=False) for n in range(count)
    ]
    assert {len(shard) for shard in shards} == {sampler.steps}
    return list(zip(*shards, strict=True))


@pytest.mark.parametrize(("devices", "steps", "missing"), [(1, 8, 0), (2, 8, 2), (4, 8, 2), (8, 5, 14)])
def test_an_epoch_has_every_row_once_in_batches_of_one_subset_and_equal_parts(
    devices: int, steps: int, missing: int
) -> None:
    """Duplicates meet. Left out are rows that do not make equal parts: of batches of 8, 8, 8, 8, 5; 8, 4; 5."""
    epochs = parts(batches(devices, 2 * steps))
    first, second = epochs[:steps], epochs[steps:]
    for epoch in (first, second):
        assert len(set(chain.from_iterable(chain.from_iterable(epoch)))) == len(TABLE) - missing
        assert sum(map(len, chain.from_iterable(epoch))) == len(TABLE) - missing
        for step in epoch:
            assert len({len(part) for part in step}) == 1
            assert len({TABLE[row].subset for part in step for row in part}) == 1
    assert first != second
    assert parts(batches(devices, steps)) == first, "so a resumed run skips its steps"
    assert parts(batches(devices, steps, seed=1)) == second
    assert parts(batches(devices, steps, seed=5)) != first


def test_several_devices_train_the_batches_of_one() -> None:
    one = [row for (row,) in parts(batches(1, 8))]
    two = [list(chain.from_iterable(step)) for step in parts(batches(2, 8))]
    assert [len(batch) for batch in two] == [len(batch) // 2 * 2 for batch in one]
    assert all(batch == whole[: len(batch)] for batch, whole in zip(two, one, strict=True))


def test_each_side_and_each_number_of_hard_negatives_has_batches_of_its_own() -> None:
    rows = RowTable.of([*rows_of(4, hard=2), *rows_of(3), *rows_of(2, hard=1), *rows_of(2, "other")])
    groups = pair_groups(rows, settings_of(hard_negatives=5, directions="both"))
    assert [(group.subset, group.hard_negatives, group.rows.tolist()) for group in groups] == [
        ("data", 0, [4, 5, 6]),
        ("data", 1, [7, 8]),
        ("data", 2, [0, 1, 2, 3]),
        ("data", 0, [*range(11, 20)]),
        ("other", 0, [9, 10]),
        ("other", 0, [20, 21]),
    ]
    assert [len(group.rows) for group in pair_groups(rows, settings_of(hard_negatives=1))] == [3, 6, 2]
    assert [len(group.rows) for group in pair_groups(rows, settings_of())] == [9, 2]


def test_a_batch_of_a_single_pair_is_left_out_unless_it_has_hard_negatives() -> None:
    for hard, count in ((0, 2), (1, 3)):
        groups = pair_groups(RowTable.of(rows_of(17, hard=hard)), settings_of(hard_negatives=1))
        assert groups[0].batches(8, 1) == count


def test_what_a_step_holds_is_counted_by_subset() -> None:
    rows = RowTable.of([*rows_of(100, "memes", positives=2), *rows_of(20, "few", queries=15)])
    assert step_contents(rows, settings_of(batch_size=64, directions="both"), devices=8) == [
        StepContent("memes", 0, rows=100, queries=100, positives=2, rows_a_step=64, batches=2),
        StepContent("few", 0, rows=20, queries=15, positives=20, rows_a_step=16, batches=1),
    ]


CHECKS: dict[str, tuple[list[Row], str | None, str | None]] = {
    "many": (rows_of(64), None, None),
    "two classes": (rows_of(64, positives=2), None, "has 2 different positives: few negatives"),
    "few queries": (rows_of(64, queries=7), None, "has 7 different queries: few negatives"),
    "few rows": (rows_of(21), None, "has 21 rows: its batches have 16, not 64"),
    "one caption": (
        rows_of(64, positives=1),
        r"has nothing to contrast in a batch \(rows 64, of a step 64, different queries 64, different positives 1\)",
        None,
    ),
    "one query": (rows_of(64, queries=1), r"has nothing .* queries 1, different positives 64\)", None),
    "one caption, hard negatives": (rows_of(64, positives=1, hard=1), None, None),
    "fewer rows than devices": (rows_of(7), r"has too few rows for 8 devices \(rows 7, of a step 0", None),
}


@pytest.mark.parametrize(("rows", "fault", "warning"), CHECKS.values(), ids=CHECKS)
def test_subsets_without_a_batch_to_contrast_are_refused_and_small_ones_warned_of_before_training(
    monkeypatch: pytest.MonkeyPatch,
    rows: list[Row],
    fault: str | None,
    warning: str | None,
) -> None:
    """On eight devices, of which each takes as many rows."""
    monkeypatch.setitem(meet()._shared_state, "num_processes", 8)
    stage = alone(Contrastive, settings_of(batch_size=64, hard_negatives=1))
    table = RowTable.of([*rows_of(64, "plenty"), *rows])
    if fault is not None:
        with pytest.raises(UsageError, match=f"Subset 'data' of stage contrastive .*{fault}.* leave it out"):
            stage.check_rows(table)
        return
    stage.check_rows(table)
    starts = [f"Subset 'data' of stage contrastive {warning}; give it more"] if warning is not None else []
    assert [sentence[: len(starts[0])] for sentence in stage.row_warnings(table)] == starts


def test_rows_that_make_no_batch_are_counted_in_a_warning_if_others_of_their_subset_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row without hard negatives is in no batch with those that have some."""
    stage, table = alone(Contrastive, settings_of(hard_negatives=1)), RowTable.of([*rows_of(64, hard=1), *rows_of(1)])
    stage.check_rows(table)
    (warning,) = stage.row_warnings(table)
    assert "'data' of stage contrastive: its 1 row with 0 hard negatives makes no batch; give all" in warning
    few = RowTable.of([*rows_of(2, hard=1), *rows_of(998, positives=1)])
    with pytest.raises(UsageError, match=r"'data' of .* has nothing to contrast in a batch \(rows 998, "):
        stage.check_rows(few)
    monkeypatch.setitem(meet()._shared_state, "num_processes", 8)
    table = RowTable.of([*rows_of(64, hard=1), *rows_of(7)])
    stage.check_rows(table)
    assert "its 7 rows with 0 hard negatives make no batch; give all" in stage.row_warnings(table)[0]


@pytest.mark.parametrize(("count", "devices", "steps"), [(9, 1, 5), (17, 8, 10), (16, 1, 10), (10, 1, 10), (7, 4, 5)])
def test_an_epoch_has_the_steps_that_its_batches_make(
    monkeypatch: pytest.MonkeyPatch, count: int, devices: int, steps: int
) -> None:
    """Five epochs; a last batch that is left out makes none, and each direction has its own."""
    monkeypatch.setitem(meet()._shared_state, "num_processes", devices)
    table = RowTable.of(rows_of(count))
    for directions, times in (("forward", 1), ("both", 2)):
        settings = ContrastiveSettings(epochs=5, batch_size=8, directions=directions)
        assert alone(Contrastive, settings).step_count(table) == times * steps


def test_a_million_rows_are_checked_and_drawn_from_without_reading_one(monkeypatch: pytest.MonkeyPatch) -> None:
    table = TABLE.select(np.arange(10**6) % len(TABLE))
    monkeypatch.setattr(RowTable, "__getitem__", lambda *_: pytest.fail("a row was read"))
    settings = settings_of(directions="both", batch_size=1024)
    assert sum(content.rows for content in step_contents(table, settings, 1)) == 10**6
    sampler = PairBatches(pair_groups(table, settings), 1024, 3, 0, 1)
    assert [len(batch) for batch in sampler] == [1024] * 3
