import shutil
from pathlib import Path

import pytest
from table_files import png, write_table
from tiny_backbones import COCOA

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError
from cocoa_embed.train import Recipe, run
from cocoa_embed.train.data.broken_rows import ReplaceBroken
from cocoa_embed.train.data.image_check import read_size
from cocoa_embed.train.data.mixture import read_rows
from cocoa_embed.train.data.rows import Draw, Rows, load_row_image
from cocoa_embed.train.settings import SourceSettings

BROKEN = bytearray(png(2, (64, 64)))
BROKEN[60] ^= 255


def collate(examples: list[tuple[Draw, Row]]) -> dict[str, object]:
    return {"draws": [draw for draw, _ in examples], "sizes": [load_row_image(row.images()[0]).size
                                                                for _, row in examples]}  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    """Five rows; the pixels of two are broken, which their headers do not show."""
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(bytes(BROKEN) if number in (1, 2) else png(number))
    lines = [{"query_image": f"{number}.png", "positive_text": "x"} for number in range(5)]
    source = SourceSettings(file=str(write_table(tmp_path / "rows.jsonl", lines)))
    assert read_size(tmp_path / "1.png") == (64, 64)
    return Rows(read_rows({"data": source}, on_bad_row="stop", seed=0).rows)


def usable(rows: Rows, on_bad_row: str) -> ReplaceBroken:
    return ReplaceBroken(collate, rows.after, on_bad_row, len(rows))


def test_the_next_row_replaces_one_whose_image_proves_broken(rows: Rows, caplog: pytest.LogCaptureFixture) -> None:
    batch = usable(rows, "skip")([rows[Draw(number, 7)] for number in (0, 1, 4, 2)])
    assert batch["draws"] == [Draw(0, 7), Draw(3, 7), Draw(4, 7), Draw(3, 7)]
    assert len(caplog.messages) == 3
    assert "rows.jsonl:2: the image " in caplog.messages[0]
    assert "1.png: cannot be decoded" in caplog.messages[0]


def test_training_stops_at_a_broken_image_by_default_or_if_all_are(rows: Rows) -> None:
    with pytest.raises(CocoaError, match=r"1\.png: cannot be decoded .*data\.on_bad_row=skip"):
        usable(rows, "stop")([rows[Draw(0)], rows[Draw(1)]])
    only = Rows([row for row in rows.rows if str(row.image).endswith(("1.png", "2.png"))])
    with pytest.raises(CocoaError, match="images of all rows are broken"):
        usable(only, "skip")([only[Draw(0)]])


def test_a_collator_without_broken_images_is_called_once(rows: Rows) -> None:
    calls: list[int] = []
    counting = ReplaceBroken(lambda examples: {"calls": calls.append(len(examples))},
                             rows.after, "skip", len(rows))  # fmt: skip
    counting([(Draw(0), Row(Item("a"), Item("b"), ""))])
    assert calls == [1]


def test_each_stage_trains_on_without_a_row_that_proves_broken(
    small_recipe: Recipe, scene_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(scene_folder, tmp_path / "scenes")
    for path in sorted((tmp_path / "scenes").glob("**/*.png"))[::2]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(bytes(content))
    values, out = small_recipe.model_dump(exclude_unset=True), tmp_path / "out"
    stop, skip = (
        Recipe.parse({**values, "data": {"folder": str(tmp_path / "scenes"), "on_bad_row": on_bad_row}})
        for on_bad_row in ("stop", "skip")
    )
    with pytest.raises(CocoaError, match=r"\.png: .*leave such rows out with data\.on_bad_row=skip"):
        run(stop, out)
    replaced: dict[str, int] = {}

    def count(stage: str, _: object) -> None:
        replaced[stage] = sum("The next row replaces it" in message for message in caplog.messages)
        caplog.clear()

    results = run(skip, out, resume=True, inspect=count)  # the run that has just stopped
    assert [(result.stage, result.steps) for result in results] == [(stage, 2) for stage in COCOA]
    assert all(replaced[stage] for stage in COCOA)
