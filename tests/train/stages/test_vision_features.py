"""A frozen vision encoder runs once for an image, with the losses of one that always runs."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from stages import alone, contrastive_model, gradients, trainer_arguments
from tiny_backbones import LoadTiny, every_family
from torch import Tensor, nn

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.forward_inputs import REMEMBERED
from cocoa_embed.train.data.image_patches import normalised
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.loop.trainer import StageContext
from cocoa_embed.train.settings import RunSettings
from cocoa_embed.train.stages.bridge.settings import BridgeSettings
from cocoa_embed.train.stages.bridge.stage import Bridge
from cocoa_embed.train.stages.contrastive.inputs import preprocess_items
from cocoa_embed.train.stages.contrastive.loss import contrastive_loss
from cocoa_embed.train.stages.contrastive.mini_batches import TokenLimits
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
from cocoa_embed.train.stages.contrastive.stage import Contrastive
from cocoa_embed.train.stages.vision_features import FeatureStore, FrozenVision, share_frozen_vision

SETTINGS = ContrastiveSettings(steps=2, batch_size=5, directions="symmetric", probe_rows=0, freeze_vision=True)


class Runs:
    """The patches that a vision encoder is run for, by their number at each run."""

    def __init__(self, backbone: Backbone) -> None:
        self.patches: list[int] = []
        family_of(backbone.model.config).vision_layers(backbone.model)[0].register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.patches.append(args[0][..., 0].numel())


def base_of(backbone: Backbone) -> Any:  # noqa: ANN401
    return backbone.model.base_model


def features(model: SentenceTransformer, rows: list[Row]) -> list[dict[str, Any]]:
    queries = [*(row.query for row in rows[:4]), Item(text="no image")]
    return [preprocess_items(model, items) for items in (queries, [row.positive for row in rows[:5]])]


def step(backbone: Backbone, rows: list[Row], limit: int, vision: FrozenVision | None) -> tuple[Tensor, Tensor]:
    """Return the loss of a step on images of four sizes, and its gradients."""
    model = contrastive_model(backbone).train()
    family_of(backbone.model.config).vision(backbone.model).requires_grad_(False)
    loss = contrastive_loss(model, SETTINGS, TokenLimits(limit, limit), vision)
    value = loss(features(model, rows), torch.arange(10).view(5, 2))
    return value.detach(), gradients(model, value)


@every_family
@pytest.mark.parametrize("limit", [20, 45])
def test_both_passes_of_a_step_share_features_and_change_no_bit(
    load_tiny: LoadTiny, sized_rows: list[Row], limit: int
) -> None:
    slow, fast = load_tiny("sdpa"), load_tiny("sdpa")
    twice = Runs(slow)
    expected, gradients = step(slow, sized_rows, limit, None)
    vision = share_frozen_vision(base_of(fast), RunSettings(name="a", backbone="b"), remembers=True)
    once = Runs(fast)
    found, own = step(fast, sized_rows, limit, vision)
    assert len(twice.patches) == 2 * len(once.patches) > 2
    assert twice.patches == once.patches * 2
    assert torch.equal(found, expected)
    assert torch.equal(own, gradients)
    assert gradients.abs().max() > 1e-3
    step(fast, sized_rows, limit, vision)
    assert len(once.patches) == len(twice.patches), "the next step runs it again"


@every_family
def test_a_folder_keeps_features_for_other_epochs_and_processes(
    load_tiny: LoadTiny, sized_rows: list[Row], tmp_path: Path
) -> None:
    run, results = RunSettings(name="a", backbone="b", vision_cache=tmp_path / "vision"), []
    for seen in (0, 1, 2):
        backbone = load_tiny("sdpa")
        vision = share_frozen_vision(base_of(backbone), run, remembers=True)
        runs = Runs(backbone)
        results += [step(backbone, sized_rows, 20, vision), step(backbone, sized_rows, 20, vision)]
        assert bool(runs.patches) is (seen == 0)
    assert all(torch.equal(loss, results[0][0]) and torch.equal(own, results[0][1]) for loss, own in results)


def image_inputs(backbone: Backbone, rows: list[Row]) -> dict[str, Tensor]:
    model = contrastive_model(backbone)
    batch = preprocess_items(model, [row.query for row in rows])
    pixels = normalised(batch["pixel_values"], backbone.processor)
    made = family_of(backbone.model.config).image_inputs(batch["image_grid_thw"])
    return {**made, "pixel_values": pixels, "image_digests": batch["image_digests"]}


def see(backbone: Backbone, inputs: dict[str, Tensor]) -> Tensor:
    """Return the features as a forward pass gets them, those for inner layers of the language model too."""
    features, of_layers = vars(base_of(backbone))[REMEMBERED](inputs)
    return torch.cat([features, *of_layers])


def run_stock(backbone: Backbone, inputs: dict[str, Tensor]) -> Tensor:
    """Return the features that the vision encoder computes."""
    features, of_layers = family_of(backbone.model.config).run_vision(backbone.model, inputs)
    return torch.cat([features, *of_layers])


Spoil = Callable[[Path], object]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
        lambda path: path.write_text("not ours"),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
)
def test_an_entry_that_is_broken_or_foreign_is_computed_again(
    load_tiny: LoadTiny, sized_rows: list[Row], tmp_path: Path, spoil: Spoil
) -> None:
    backbone = load_tiny("sdpa")
    visual, inputs = base_of(backbone).visual.eval(), image_inputs(backbone, sized_rows)
    expected = run_stock(backbone, inputs)
    FrozenVision(base_of(backbone), remembers=False, store=FeatureStore(tmp_path / "vision", 1e9, visual))
    assert torch.equal(see(backbone, inputs), expected)
    entries = sorted(path for path in (tmp_path / "vision").rglob("*") if path.is_file())
    assert len(entries) == len(sized_rows)
    spoil(entries[0])
    runs = Runs(backbone)
    for ran in (1, 1):
        found = see(backbone, inputs)
        assert torch.allclose(found, expected, atol=1e-5)
        assert len(runs.patches) == ran, "one image, and none the next time"
    assert runs.patches[0] < len(inputs["pixel_values"])


def test_other_weights_another_dtype_and_another_image_have_entries_of_their_own(
    load_tiny: LoadTiny, sized_rows: list[Row], tmp_path: Path
) -> None:
    backbone = load_tiny("sdpa")
    visual, inputs = base_of(backbone).visual, image_inputs(backbone, sized_rows)
    FrozenVision(base_of(backbone), remembers=False, store=FeatureStore(tmp_path, 1e9, visual))
    full = see(backbone, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = see(backbone, inputs)
    assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(see(backbone, inputs), full)
    other = load_tiny("sdpa")
    changed = base_of(other).visual
    list(changed.merger.parameters())[-1].data[0] += 1
    FrozenVision(base_of(other), remembers=False, store=FeatureStore(tmp_path, 1e9, changed))
    runs = Runs(other)
    assert not torch.equal(see(other, inputs), full)
    assert len(runs.patches) == 1
    see(other, {**inputs, "image_digests": inputs["image_digests"] + 1})
    assert len(runs.patches) == 2


def test_the_folder_is_bounded_and_entries_of_other_weights_make_room(
    load_tiny: LoadTiny, sized_rows: list[Row], tmp_path: Path
) -> None:
    def kept(of: Path) -> int:
        return sum(path.stat().st_size for path in of.rglob("*") if path.is_file())

    folder = tmp_path / "vision"
    backbone = load_tiny("sdpa")
    visual, inputs = base_of(backbone).visual, image_inputs(backbone, sized_rows)
    first = FeatureStore(folder, 1e9, visual)
    FrozenVision(base_of(backbone), remembers=False, store=first)
    see(backbone, inputs)
    whole = kept(folder)
    other = load_tiny("sdpa")
    changed = base_of(other).visual
    next(changed.parameters()).data.add_(1)
    FeatureStore(folder, whole * 4, changed)
    assert kept(folder) == whole, "less than half full"
    store = FeatureStore(folder, whole * 1.5, changed)
    assert kept(first.folder) <= whole * 0.75 < whole
    store.room = whole / 4
    FrozenVision(base_of(other), remembers=False, store=store)
    see(other, inputs)
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert 0 < kept(store.folder) <= whole / 4 + largest < whole


def test_other_files_in_the_folder_neither_count_nor_are_removed(tmp_path: Path) -> None:
    others = [tmp_path / "notes.txt", tmp_path / "thesis" / "photo.jpg", tmp_path / ("0" * 32) / "ab" / "notes.txt"]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1000))
    left = FeatureStore(tmp_path, 1e9, nn.Linear(2, 2))
    left.write("ab12", [torch.zeros(2)])
    assert FeatureStore(tmp_path, 100, nn.Linear(3, 3)).room == 100
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(others)


def test_a_folder_that_cannot_be_written_is_a_warning(
    load_tiny: LoadTiny, sized_rows: list[Row], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    backbone = load_tiny("sdpa")
    visual, inputs = base_of(backbone).visual, image_inputs(backbone, sized_rows)
    expected = run_stock(backbone, inputs)
    FrozenVision(base_of(backbone), remembers=False, store=FeatureStore(tmp_path / "file" / "vision", 1e9, visual))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(see(backbone, inputs), expected)
        see(backbone, inputs)
    assert caplog.text.count("vision_cache takes no more") == 1


@pytest.mark.parametrize("kind", [Bridge, Contrastive])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_stage_keeps_the_features_of_an_encoder_that_it_does_not_train(
    load_tiny: LoadTiny, scene_rows: list[Row], tmp_path: Path, kind: type[Any], is_frozen: bool
) -> None:
    """With the losses of a stage without the folder."""
    logs = []
    for cache in (tmp_path / "vision", None):
        backbone = load_tiny("sdpa")
        settings = BridgeSettings if kind is Bridge else ContrastiveSettings
        own = settings(epochs=2, batch_size=4, freeze_vision=is_frozen, probe_rows=0, warmup_steps=0)
        stage = alone(kind, own, vision_cache=cache)
        arguments = trainer_arguments(tmp_path, max_steps=6, per_device_train_batch_size=4, seed=0)
        trainer = stage.trainer(backbone, RowTable.of(scene_rows[:8]), StageContext(arguments))
        runs = Runs(backbone)
        trainer.train()
        logs.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        assert len(logs[-1]) == 6
        assert (len(runs.patches) < 6) is (is_frozen and cache is not None)
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    assert (tmp_path / "vision").exists() is is_frozen
