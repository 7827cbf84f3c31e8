"""Several ``<EOS>``: prefixes in stage 2, mean MaxSim in stage 3."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import killed_at, same_weights
from sentence_transformers import SentenceTransformer
from sentence_transformers.multi_vector_encoder.losses import CachedMultiVectorMultipleNegativesRankingLoss
from sentence_transformers.multi_vector_encoder.scoring import mean_colbert_scores
from sentence_transformers.util import cos_sim
from stages import alone, bridge_collator, bridge_model, contrastive_model, gradients
from tiny_backbones import STAGE, TINY_MAX_LENGTH, MakeRecipe
from torch import Tensor, nn

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.model.attention import Block
from cocoa_embed.model.backbone import Backbone, load_backbone
from cocoa_embed.model.template import eos_tokens
from cocoa_embed.model.training_record import read_run, read_training
from cocoa_embed.train.data.lengths import row_lengths
from cocoa_embed.train.data.rows import Draw, numbered
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.pipeline import run
from cocoa_embed.train.plan.checks import examine
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.contrastive.inputs import normalise_patches, preprocess_items
from cocoa_embed.train.stages.contrastive.loss import contrastive_loss, mean_max_sim
from cocoa_embed.train.stages.contrastive.mini_batches import TokenLimits
from cocoa_embed.train.stages.contrastive.model import embedding_probe
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
from cocoa_embed.train.stages.contrastive.stage import Contrastive
from cocoa_embed.train.stages.losses import eos_similarity
from cocoa_embed.train.stages.masking import draw_prefixes, row_generators
from cocoa_embed.train.stages.rendering import render_items

COUNT, WIDTH = 3, 32


@pytest.fixture
def several(tiny_backbone_path: Path) -> Backbone:
    return load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH, vectors=COUNT)


def is_eos(batch: Batch) -> Tensor:
    found: Tensor = (batch["blocks"] == Block.EOS) | (batch["blocks"] == Block.UNSEEN)
    return found


# Stage 2


def test_every_row_has_all_eos_tokens_and_block_b_sees_its_own_prefix(
    several: Backbone, tiny_backbone: Backbone, scene_rows: list[Row]
) -> None:
    batch, one = (bridge_collator(each)(numbered(scene_rows)) for each in (several, tiny_backbone))
    own = several.processor.tokenizer.convert_tokens_to_ids(eos_tokens(several.processor.tokenizer))
    for row, length in enumerate(batch["target_prefixes"].tolist()):
        positions = is_eos(batch)[row].nonzero().flatten()
        assert batch["input_ids"][row, positions].tolist() == own[::-1], "the last token is the first vector"
        assert batch["blocks"][row, positions].tolist() == [Block.UNSEEN] * (COUNT - length) + [Block.EOS] * length
        (alone,) = bridge_collator(several)(numbered(scene_rows)[row : row + 1])["target_prefixes"].tolist()
        assert alone == length, "it does not depend on the batch"
    assert torch.equal(batch["target_ids"], one["target_ids"]), "the same tokens are masked"
    assert not {"target_prefixes"} & one.keys()
    assert set(one["blocks"].unique().tolist()) <= {Block.PAD, Block.A, Block.EOS, Block.B}
    drawn = [draw_prefixes(batch["blocks"][:1].masked_fill(is_eos(batch)[:1], Block.EOS), COUNT, [each])[1].item()
             for each in row_generators(0, [Draw(0, epoch) for epoch in range(600)])]  # fmt: skip
    assert all(150 < count < 250 for count in Counter(drawn).values()), "each as likely"
    assert len(Counter(drawn)) == COUNT


@pytest.mark.parametrize("max_length", [20, 24])
def test_truncation_keeps_all_eos_tokens(several: Backbone, max_length: int) -> None:
    several.processor.tokenizer.model_max_length = max_length
    long = Row(query=Item(text="large red circle " * 30), positive=Item(text="small blue ring " * 30), source="")
    batch = BridgeCollator(several.processor, 0)(numbered([long]))
    assert batch["input_ids"].shape == (1, max_length)
    assert is_eos(batch).sum() == COUNT
    assert (batch["blocks"] == Block.B).sum() >= max_length // 4


@torch.no_grad()
def test_nothing_but_its_prefix_reaches_block_b(several: Backbone, scene_rows: list[Row]) -> None:
    """With the states of the prefix fixed, neither block A nor an unseen <EOS> changes a prediction of block B."""
    model, layers = bridge_model(several), several.model.get_decoder()
    batch = bridge_collator(several)(numbered(scene_rows[:6]))
    assert {1, 2} <= set(batch["target_prefixes"].tolist()), "a premise"
    others = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    others["input_ids"] = batch["input_ids"].masked_fill(batch["blocks"] == Block.UNSEEN, 100)
    held = list[Tensor]()
    prefix, fixed = batch["blocks"] == Block.EOS, False

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_states, *rest = inputs
        if fixed:
            hidden_states = hidden_states.clone()
            hidden_states[prefix] = held.pop(0)
        else:
            held.append(hidden_states[prefix].clone())
        return (hidden_states, *rest)

    handles = [module.register_forward_pre_hook(before) for module in [*layers.layers, layers.norm]]
    original = model.predict(batch)
    states, fixed = [*held], True
    assert torch.equal(model.predict(others), original)
    unseen, held[:] = (batch["blocks"] == Block.UNSEEN), states
    visible = {**others, "blocks": batch["blocks"].masked_fill(unseen, Block.EOS)}
    assert not torch.allclose(model.predict(visible), original, atol=1e-3), "once it is seen, it does"
    for handle in handles:
        handle.remove()
    assert not torch.allclose(model.predict(others), original, atol=1e-3), "through the prefix, block A does"


@pytest.mark.parametrize(("degrees", "expected"), [(0, 1.0), (60, 0.25), (90, 0.0), (180, 1.0)])
def test_the_penalty_is_the_mean_squared_cosine_of_pairs(degrees: float, expected: float) -> None:
    angle = math.radians(degrees)
    pair = torch.tensor([[3.0, 0, 0], [math.cos(angle), math.sin(angle), 0]])
    assert eos_similarity(pair[None]).item() == pytest.approx(expected, abs=1e-6)
    three = torch.cat([pair, torch.tensor([[0, 0, 0.5]])])  # at right angles to both
    assert eos_similarity(three[None]).item() == pytest.approx(expected / 3, abs=1e-6)
    rows = torch.stack([three, torch.eye(3)])
    assert eos_similarity(rows).item() == pytest.approx(expected / 6, abs=1e-6)
    parts = sum(eos_similarity(row[None], total=2) for row in rows)
    assert parts == pytest.approx(eos_similarity(rows).item(), abs=1e-6), "in micro-batches, too"


def test_the_loss_has_the_penalty_of_all_states_and_micro_batches_add_up(
    several: Backbone, scene_rows: list[Row]
) -> None:
    model, collate, rows = bridge_model(several), bridge_collator(several), numbered(scene_rows[:6])
    batch = collate(rows)
    outputs, states = model(**batch), model.hidden_states(batch)[is_eos(batch)].view(len(rows), COUNT, -1)
    assert outputs["eos_similarity_loss"].item() == pytest.approx(eos_similarity(states).item(), rel=1e-5)
    model.eos_similarity_weight = 0.0
    without = model(**batch)["loss"].item()
    model.eos_similarity_weight = 0.1
    assert outputs["loss"].item() == pytest.approx(without + 0.1 * outputs["eos_similarity_loss"].item(), rel=1e-6)
    totals = {name: len(batch[name]) for name in ("target_ids", "target_prefixes")}
    parts = sum(model(**collate(part), totals=totals)["loss"] for part in (rows[:2], rows[2:]))
    assert parts.item() == pytest.approx(outputs["loss"].item(), rel=1e-5)


# Stage 3


@pytest.fixture
def model(several: Backbone) -> SentenceTransformer:
    return contrastive_model(several, eos_tokens=COUNT).eval()


@pytest.fixture
def features(model: SentenceTransformer, scene_rows: list[Row]) -> list[dict[str, Any]]:
    """Six pairs of an image and a caption, with a hard negative."""
    others = [Item(text=f"scene {number}") for number in range(6)]
    columns = [row.query for row in scene_rows[:6]], [row.positive for row in scene_rows[:6]], others
    batches = [preprocess_items(model, items) for items in columns]
    return [normalise_patches(model[0].processor, model[0], (batch,))[0] for batch in batches]


@torch.no_grad()
def test_vectors_are_normalised_states_the_last_first(
    model: SentenceTransformer, features: list[dict[str, Any]]
) -> None:
    for batch in features:
        outputs, lengths = model(dict(batch)), batch["attention_mask"].sum(dim=1)
        vectors = outputs["sentence_embedding"].unflatten(1, (COUNT, WIDTH))
        for row, length in enumerate(lengths.tolist()):
            states = outputs["token_embeddings"][row, length - COUNT : length].flip(0)
            torch.testing.assert_close(vectors[row], nn.functional.normalize(states, dim=1))
        stock = model[1](model[0](dict(batch)))["sentence_embedding"]
        torch.testing.assert_close(vectors[:, 0], nn.functional.normalize(stock, dim=1))


def test_one_vector_is_compared_as_before(tiny_backbone: Backbone) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(count, WIDTH, generator=generator) for count in (4, 5))
    assert torch.equal(mean_max_sim(queries, documents, WIDTH), cos_sim(queries, documents))
    assert torch.equal(mean_max_sim(queries[:, :8], documents[:, :8], WIDTH), cos_sim(queries[:, :8], documents[:, :8]))
    one = contrastive_model(tiny_backbone)
    assert not one[-1]._forward_hooks
    loss = contrastive_loss(one, ContrastiveSettings(steps=1, batch_size=2), TokenLimits(9, 9))
    assert loss.calculate_loss.__name__ == "calculate_loss", "nothing is nested"


@pytest.mark.parametrize("tokens", [40, 10_000])
def test_the_loss_is_that_of_sentence_transformers_multi_vector_encoder_over_prefixes(
    model: SentenceTransformer, features: list[dict[str, Any]], tokens: int
) -> None:
    settings = ContrastiveSettings(steps=1, batch_size=6, directions="forward", temperature=0.1)
    theirs = CachedMultiVectorMultipleNegativesRankingLoss(
        model, scale=1 / settings.temperature, similarity_fct=mean_colbert_scores
    )
    vectors = [model(dict(batch))["sentence_embedding"].unflatten(1, (COUNT, WIDTH)) for batch in features]
    expected = torch.stack([
        theirs.calculate_loss([[each[:, :n]] for each in vectors], [[torch.ones(6, n).bool()] for _ in vectors])
        for n in (1, 2, 3)
    ]).sum()  # fmt: skip
    slow = gradients(model, expected)
    assert slow.abs().max() > 1e-2
    ours = contrastive_loss(model, settings, TokenLimits(tokens, tokens), eos_tokens=COUNT)
    found = ours(features, torch.arange(18).view(6, 3))
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert (gradients(model, found) - slow).abs().max() < 1e-4 * slow.abs().max()


@pytest.mark.parametrize(("count", "dims", "widths"), [(1, [8], [32, 8]), (6, None, [192, 128, 64, 32]),
                                                       (8, [16], [256, 128, 64, 32, 16])])  # fmt: skip
def test_prefixes_double_and_dimensions_cut_the_first(
    model: SentenceTransformer, count: int, dims: list[int] | None, widths: list[int]
) -> None:
    settings = ContrastiveSettings(steps=1, batch_size=2, matryoshka_dims=dims)
    loss: Any = contrastive_loss(model, settings, TokenLimits(9, 9), eos_tokens=count)
    assert loss.calculate_loss.matryoshka_dims == widths


def test_the_probe_measures_the_first_vector(model: SentenceTransformer, scene_rows: list[Row]) -> None:
    found = embedding_probe(model, scene_rows[:6], 4)(model)
    assert len(model[-1]._forward_hooks) == 1
    model[-1]._forward_hooks.clear()
    assert found == pytest.approx(embedding_probe(model, scene_rows[:6], 4)(model), rel=1e-5)


# Runs


@pytest.fixture(scope="module")
def recipe(tiny_recipe: MakeRecipe) -> Recipe:
    bridge, contrastive = {**STAGE, "probe_rows": 4, "save_steps": 1}, {**STAGE, "save_steps": 1}
    del contrastive["mini_batch_size"]
    return tiny_recipe(bridge=bridge, contrastive=contrastive, eos_tokens=COUNT)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("several") / "out"
    run(recipe, out)
    return out


def test_a_run_logs_shows_and_saves_eos_tokens(finished: Path, scene_rows: list[Row], tmp_path: Path) -> None:
    stages = read_run(finished)["stages"]
    assert all(0 < line["eos_similarity_loss"] <= 1 for line in stages["bridge"]["log"] if "loss" in line)
    blocks = stages["bridge"]["samples"]["mask"]["blocks"]
    assert [block for block, after in zip(blocks, [*blocks[1:], None], strict=True) if block != after] == [
        "A", "EOS", "B",
    ]  # fmt: skip
    assert blocks.count("EOS") == COUNT
    assert read_training(finished / "contrastive")["recipe"]["eos_tokens"] == COUNT
    stock = SentenceTransformer(str(finished / "contrastive"), device="cpu")
    embedding = stock.encode({"text": "a red ring"}, convert_to_tensor=True)
    backbone = load_backbone(str(finished / "contrastive"))
    batch = render_items(backbone.processor, [Item(text="a red ring")])
    torch.testing.assert_close(embedding, bridge_model(backbone).embed(batch)[0], atol=1e-5, rtol=0)
    assert batch["input_ids"][0, -COUNT:].tolist() == backbone.processor.tokenizer.convert_tokens_to_ids(
        eos_tokens(backbone.processor.tokenizer)[::-1]
    )


def test_a_run_from_a_checkpoint_inherits_eos_tokens_and_may_add_but_not_remove_some(
    finished: Path, recipe: Recipe, tmp_path: Path
) -> None:
    given = recipe.model_dump(exclude_unset=True) | {"backbone": str(finished / "bridge"), "bridge": None}
    del given["eos_tokens"]
    assert examine(Recipe.parse(given), tmp_path).recipe.eos_tokens == COUNT
    with pytest.raises(UsageError, match="eos_tokens is 2, but the backbone has 3"):
        examine(Recipe.parse(given | {"eos_tokens": 2}), tmp_path)
    assert examine(Recipe.parse(given | {"eos_tokens": 4}), tmp_path).recipe.eos_tokens == 4


@pytest.mark.slow
@pytest.mark.parametrize("other", ["bridge", "contrastive"])
def test_a_killed_run_resumes_to_the_same_weights(recipe: Recipe, tmp_path: Path, other: str) -> None:
    given = recipe.model_copy(update={other: None})
    (whole,) = run(given, tmp_path / "whole")
    with killed_at(2):
        run(given, tmp_path / "out")
    (resumed,) = run(given, tmp_path / "out", resume=True)
    assert same_weights(resumed.folder, whole.folder)


def test_eos_tokens_are_counted(several: Backbone, tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    stage = alone(Contrastive, ContrastiveSettings(steps=1, batch_size=2))
    tokens, lengths = [], []
    for backbone in (tiny_backbone, several):
        (example,) = numbered(scene_rows[:1])
        sequences = stage.sequences(example, backbone.processor)
        sequences.append(bridge_collator(backbone)([example]))
        tokens.append([int(batch["attention_mask"].sum()) for batch in sequences])
        lengths += row_lengths([example[1]], backbone.processor, {image: (56, 56) for image in example[1].query.images})
    assert [more - less for less, more in zip(*tokens, strict=True)] == [COUNT - 1] * 3
    assert lengths == [tokens[0][2], tokens[1][2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_tokens": 17}, "eos_tokens"),
        ({"eos_tokens": 0}, "eos_tokens"),
        ({"pooling": "mean"}, "eos_tokens: 3 vectors need pooling eos, not mean"),
        ({"max_length": 11}, "max_length is 11, too short for an image with .* in addition to 3 <EOS>; raise it"),
    ],
)
def test_impossible_numbers_of_eos_tokens_are_refused(
    recipe: Recipe, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CocoaError, match=message):
        run(Recipe.parse(recipe.model_dump(exclude_unset=True) | changes), tmp_path / "out")
