"""What a card holds by the meter is what the trial of its memory would choose."""

from typing import Any

import pytest
from stages import alone

from cocoa_embed.data.rows import Row
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.loop.memory_trial import RESERVE
from cocoa_embed.train.plan.cards import CARDS
from cocoa_embed.train.plan.cost import BatchShape, batch_shape
from cocoa_embed.train.plan.fit import fit_to_card, memory_of
from cocoa_embed.train.plan.meter import StageMeter
from cocoa_embed.train.stages.bridge.settings import BridgeSettings
from cocoa_embed.train.stages.bridge.stage import Bridge
from cocoa_embed.train.stages.contrastive import stage as contrastive_stage
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
from cocoa_embed.train.stages.contrastive.stage import Contrastive
from cocoa_embed.train.stages.stage import Stage

IMAGES, TEXTS = "tokens of images", "tokens of texts"


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_stage, "TRIED_TOKENS", (400, 200, 100))
    monkeypatch.setattr(Contrastive, "enough_at_once", 200)


def contrastive(**run: Any) -> Contrastive:
    return alone(Contrastive, ContrastiveSettings(steps=1, batch_size=64), **run)


def bridge(**run: Any) -> Bridge:
    return alone(Bridge, BridgeSettings(steps=1, batch_size=8, mini_batch_size="auto"), **run)


def measured(stage: Stage[Any], backbone: Backbone, row: Row) -> tuple[StageMeter, list[BatchShape]]:
    config, processor = backbone.model.config, backbone.processor
    meter = StageMeter(stage, config, processor, stage.alike(row), CARDS["h100"])
    return meter, [batch_shape(each) for each in stage.sequences(numbered([row])[0], processor)]


def memory_for(meter: StageMeter, place: int, sequences: int, *, recomputes: bool = False) -> float:
    """Return the bytes that a mini-batch takes, with all that training takes beside it."""
    meter.recompute_activations(on=recomputes)
    return RESERVE + sum(meter.state_bytes().values()) + meter.mini_batch(place, sequences).peak_bytes


def test_the_largest_size_whose_pass_and_states_fit_is_chosen(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    stage = bridge()
    meter, shapes = measured(stage, tiny_backbone, scene_rows[0])
    sizes = sorted(stage.sizes_at_once(1))
    assert sizes == [1, 2, 4, 8]
    for size, smaller in ((1, 1), (4, 2)):
        memory = memory_for(meter, 0, size)
        assert fit_to_card(stage, meter, shapes, 1, memory).sizes == {"rows": size}
        less = fit_to_card(stage, meter, shapes, 1, memory - 1)
        assert less.sizes == {"rows": smaller}, "the smallest, if none fits"
        assert less.sequences(stage, 1, shapes[0]) == smaller


def test_texts_may_be_more_at_once_than_images(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    stage = contrastive()
    meter, shapes = measured(stage, tiny_backbone, scene_rows[0])
    memory = memory_for(meter, 0, stage.sequences_at_once(1, shapes[0].tokens, 200))
    sizes = fit_to_card(stage, meter, shapes, 1, memory).sizes
    assert sizes[IMAGES] == 200 < sizes[TEXTS]


@pytest.mark.slow
def test_activations_are_recomputed_only_where_enough_do_not_fit(
    tiny_backbone: Backbone, scene_rows: list[Row]
) -> None:
    stage = contrastive(gradient_checkpointing="auto")
    meter, shapes = measured(stage, tiny_backbone, scene_rows[0])
    enough = stage.sequences_at_once(1, shapes[0].tokens, 200)
    memory = memory_for(meter, 0, enough)
    assert memory > memory_for(meter, 0, enough, recomputes=True), "a premise"
    assert not fit_to_card(stage, meter, shapes, 1, memory).recomputes
    chosen = fit_to_card(stage, meter, shapes, 1, memory - 1)
    assert chosen.recomputes
    assert chosen.sizes[IMAGES] >= 200


def test_nothing_is_chosen_on_a_cpu_or_of_sharded_weights(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    assert memory_of(None) is None
    assert memory_of("h100") == 80e9
    stage = bridge(gradient_checkpointing="auto")
    meter, shapes = measured(stage, tiny_backbone, scene_rows[0])
    chosen = fit_to_card(stage, meter, shapes, 1, None)
    assert (chosen.sizes, chosen.recomputes, chosen.sequences(stage, 1, shapes[0])) == ({}, False, 8)
    sharded = bridge(gradient_checkpointing="auto", sharding="fsdp2")
    assert fit_to_card(sharded, meter, shapes, 1, 80e9).recomputes
