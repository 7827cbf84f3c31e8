import math
import re

import numpy as np
import pytest

from cocoa_embed.report.charts import measures, plateau_panel, smoothed, stage_panels
from cocoa_embed.report.content import Curve
from cocoa_embed.report.words import MATCHING, NO_IMAGE, SHUFFLED, duration, token_text

pytest.importorskip("matplotlib")

RISE = [(step, 0.5 + step / 1000) for step in range(0, 500, 5)]


def curve(stage: str, *names: str, points: list[tuple[int, float]] = RISE) -> Curve:
    """Return a curve whose metrics differ by a factor."""
    series = {name: [(step, value / (place + 1)) for step, value in points] for place, name in enumerate(names)}
    return Curve(stage, series, 75, {})


def test_each_quantity_of_a_stage_has_a_panel_and_probes_have_their_own() -> None:
    warmup = curve("warmup", "loss", "mntp_loss", "mae_loss", "masked_token_accuracy")
    curves = [warmup, curve("bridge", "loss", MATCHING)]
    panels = stage_panels(curves)
    assert [(panel.title, panel.quantity, len(panel.lines)) for panel in panels] == [
        ("warmup", "loss", 3),
        ("warmup", "accuracy", 1),
        ("bridge", "loss", 1),
    ]
    assert panels[0].detail == "495 steps in 1 min 15 s"
    assert plateau_panel(curves) is None


def test_a_loss_of_one_part_is_drawn_once() -> None:
    same = curve("warmup", "loss")._replace(series={"loss": RISE, "mntp_loss": RISE})
    assert [line.label for line in stage_panels([same])[0].lines] == ["masked tokens: cross-entropy"]


def test_the_plateau_shows_what_was_probed() -> None:
    for names in ((MATCHING, SHUFFLED), (MATCHING, SHUFFLED, NO_IMAGE)):
        panel = plateau_panel([curve("bridge", "loss", *names)])
        assert panel is not None
        assert len(panel.lines) == len(names)


def test_measures_of_one_point_have_a_value_and_no_chart() -> None:
    (measure,) = measures([curve("bridge", "alignment"), curve("contrastive", "alignment", points=[(9, -1.5)])])
    assert measure.lasts == [("bridge", "0.995"), ("contrastive", "−1.5")]
    assert [panel.title for panel in measure.panels] == ["bridge"]


def test_values_that_are_not_finite_are_left_out() -> None:
    (panel,) = stage_panels([curve("bridge", "loss", points=[(1, 1.0), (2, math.nan), (3, math.inf), (4, 0.5)])])
    assert panel.lines[0].points == [(1, 1.0), (4, 0.5)]
    assert stage_panels([curve("bridge", "loss", points=[(1, math.nan)])]) == []


def test_a_single_point_has_one_tick_at_its_step() -> None:
    (panel,) = stage_panels([curve("bridge", "loss", points=[(7, 1.5)])])
    assert len(re.findall(r'id="stage-0-xtick_\d+"', panel.svg)) == 1
    assert ">7</text>" in panel.svg


def test_charts_take_the_colours_of_the_page() -> None:
    (panel,) = stage_panels([curve("bridge", "loss")])
    assert "var(--total)" in panel.svg
    assert "#0102" not in panel.svg


def test_many_points_are_smoothed_without_moving_a_line() -> None:
    assert smoothed(RISE[:59]) == RISE[:59]
    level = [(step, 2.0) for step in range(100)]
    assert smoothed(level) == level
    noise = [(step, float(value)) for step, value in enumerate(np.random.default_rng(0).normal(size=200))]
    assert np.std([value for _, value in smoothed(noise)]) < np.std([value for _, value in noise]) / 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (252, "4 min 12 s"), (3599.7, "1 h 0 min"), (3905, "1 h 5 min")],
)
def test_durations_are_rounded_once(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("token", "text"),
    [("Ġred", "red"), ("red", "red"), ("Ġ", "␣"), ("Ċ", "⏎"), ("", "∅"), ("Ã¤", "ä"), ("Ã", "�"), ("日", "日")],
)
def test_tokens_read_as_text(token: str, text: str) -> None:
    assert token_text(token) == text
