import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import PROMPTS
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
from stages import alone, contrastive_model, gradients, trainer_arguments
from torch import Tensor
from torch.nn.functional import normalize

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.evaluation.geometry import geometry
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.host_tensor import HostTensor
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.loop.batch_facts import FACTS
from cocoa_embed.train.loop.callbacks import LogLastStep
from cocoa_embed.train.loop.processes import meet
from cocoa_embed.train.loop.trainer import Probe, StageContext
from cocoa_embed.train.stages.contrastive import loss as loss_module
from cocoa_embed.train.stages.contrastive.inputs import keep_on_host, normalise_patches, preprocess_items
from cocoa_embed.train.stages.contrastive.loss import CachedRankingLoss, contrastive_loss
from cocoa_embed.train.stages.contrastive.mini_batches import TokenLimits
from cocoa_embed.train.stages.contrastive.model import embedding_probe
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
from cocoa_embed.train.stages.contrastive.stage import Contrastive
from cocoa_embed.train.stages.contrastive.trainer import ContrastiveTrainer

BATCH = 8


def section(**values: Any) -> ContrastiveSettings:
    return ContrastiveSettings(steps=2, batch_size=BATCH, **{"directions": "forward", **values})


def trainer_of(
    backbone: Backbone, rows: list[Row], folder: Path, settings: ContrastiveSettings | None = None, **values: Any
) -> ContrastiveTrainer:
    arguments = {"max_steps": 2, "seed": 0, **values}
    stage = alone(Contrastive, settings or section(), prompts=PROMPTS)
    return stage.trainer(backbone, RowTable.of(rows), StageContext(trainer_arguments(folder, **arguments)))


@pytest.fixture
def model(tiny_backbone: Backbone) -> SentenceTransformer:
    return contrastive_model(tiny_backbone, prompts=PROMPTS)


@pytest.fixture
def mixed_rows(scene_rows: list[Row]) -> list[Row]:
    """Eight pairs whose queries are an image, an image with a text, or a text."""
    rows = []
    for number, row in enumerate(scene_rows[:BATCH]):
        query = (row.query, Item(text="what is here?", images=(row.image,)), Item(text=f"scene {number}"))[number % 3]
        rows.append(replace(row, query=query))
    return rows


@pytest.fixture
def subset_rows(scene_rows: list[Row]) -> list[Row]:
    """Twenty-four rows of two subsets by turns; the first has two hard negatives a row, or one, or none."""
    rows = []
    for number, row in enumerate(scene_rows):
        negatives = tuple(Item(text=f"{row.positive.text} {number} {place}") for place in range(number // 2 % 3))
        rows.append(replace(row, subset="many", negatives=negatives) if number % 2 else replace(row, subset="none"))
    return rows


# Preprocessing


def preprocessed(model: SentenceTransformer, items: list[Item], **values: Any) -> dict[str, Any]:
    batch = preprocess_items(model, items, **values)
    assert batch.get("pixel_values", torch.empty(0, dtype=torch.uint8)).dtype == torch.uint8
    return normalise_patches(model[0].processor, model[0], (batch,))[0]


@pytest.mark.parametrize("prompt", [None, PROMPTS["query"]])
def test_items_become_the_models_own_inputs_and_have_several_images(
    model: SentenceTransformer, mixed_rows: list[Row], prompt: str | None
) -> None:
    two = Item(text="two", images=(mixed_rows[0].query.images[0], mixed_rows[3].query.images[0]), instruction="of ")
    texts = [Item(text="a ring"), Item(text="a large red ring")]
    for items in ([*texts, *(row.query for row in mixed_rows[:3]), two], texts, [two]):
        found = preprocessed(model, items, prompt=prompt)
        found.pop("image_digests", None)
        expected = model.preprocess([item.load() for item in items], prompt=prompt)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value


def test_images_that_leave_no_room_for_a_text_are_named(model: SentenceTransformer, mixed_rows: list[Row]) -> None:
    many = Item(text="many", images=mixed_rows[0].query.images * 30)
    with pytest.raises(CocoaError, match=r"the text 'many' takes 181 tokens .* than max_length 128"):
        preprocessed(model, [many])


def test_a_broken_image_is_named_where_it_is_read(model: SentenceTransformer, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(CocoaError, match=r"broken\.png"):
        preprocessed(model, [Item(images=(tmp_path / "broken.png",))])


# The loss


def test_on_several_devices_gradients_are_cached_and_candidates_gathered(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = TokenLimits(10_000, 10_000)
    assert not contrastive_loss(model, section(), limits).gather_across_devices
    monkeypatch.setitem(meet()._shared_state, "num_processes", 2)
    loss = contrastive_loss(model, section(), limits)
    assert isinstance(loss, CachedRankingLoss)
    assert loss.gather_across_devices


def closed_form(columns: list[Tensor], content: Tensor, settings: ContrastiveSettings, dims: list[int]) -> Tensor:
    """Return the loss written out: a sum over lengths of the mean over directions, a row and a candidate at a time."""
    rows = range(len(content))
    losses = []
    for dim in dims:
        queries, positives, *negatives = (normalize(column[:, :dim], dim=1) for column in columns)
        for i in rows:
            answer, candidates, askers = content[i, 1], [positives[i]], [queries[i]]
            for j in rows:
                if (content[i, :2] != content[j, :2]).all():
                    candidates.append(positives[j])
                    askers.append(queries[j])
                candidates += [each[j] for n, each in enumerate(negatives, start=2) if content[j, n] != answer]
            sides = [(queries[i], candidates)]
            sides += [(positives[i], askers)] if settings.directions == "symmetric" else []
            for side, those in sides:
                scores = torch.stack(those) @ side / settings.temperature
                losses.append((scores.logsumexp(0) - scores[0]) / len(sides))
    return torch.stack(losses).sum() / len(rows)


@pytest.fixture
def features(model: SentenceTransformer, mixed_rows: list[Row], scene_rows: list[Row]) -> list[dict[str, Any]]:
    """Eight pairs, with two hard negatives each: a text, and an image."""
    columns = [[row.query for row in mixed_rows], [row.positive for row in mixed_rows]]
    columns += [[Item(text=f"scene {number} without it") for number in range(BATCH)]]
    columns += [[row.query for row in scene_rows[BATCH : 2 * BATCH]]]
    return [preprocessed(model.eval(), items) for items in columns]


NO_DUPLICATES = torch.arange(4 * BATCH).reshape(BATCH, 4)
DUPLICATES = torch.tensor(
    # Rows 0 and 1 have one positive, rows 2 and 3 one query; row 4 has the positive of row 0 as a negative; negatives
    # of rows 5 and 6 are equal, which no rule is about; row 7 equals row 3.
    [[1, 2, 3, 4], [5, 2, 6, 7], [8, 9, 10, 11], [8, 12, 13, 14],
     [15, 16, 2, 17], [18, 19, 20, 21], [22, 23, 24, 20], [8, 12, 25, 26]]
)  # fmt: skip


@pytest.mark.parametrize("content", [NO_DUPLICATES, DUPLICATES])
@pytest.mark.parametrize(("dims", "trained"), [(None, [32]), ([8, 32, 16, 8], [32, 16, 8])])
@pytest.mark.parametrize(("directions", "temperature"), [("forward", 0.05), ("symmetric", 0.5)])
def test_the_loss_and_its_gradients_are_the_closed_form(
    model: SentenceTransformer,
    features: list[dict[str, Any]],
    content: Tensor,
    dims: list[int] | None,
    trained: list[int],
    directions: str,
    temperature: float,
) -> None:
    """With any number of mini-batches, or one pass; a candidate that is another right answer is no negative."""
    settings = section(temperature=temperature, directions=directions, matryoshka_dims=dims)
    embeddings = [model(dict(batch))["sentence_embedding"] for batch in features]
    expected = closed_form(embeddings, content, settings, trained)
    slow = gradients(model, expected)
    assert slow.abs().max() > 1e-2
    for tokens in (1, 40, 10_000):
        value = contrastive_loss(model, settings, TokenLimits(tokens, tokens))(features, content)
        assert value.item() == pytest.approx(expected.item(), rel=1e-4), tokens
        assert (gradients(model, value) - slow).abs().max() < 1e-4 * slow.abs().max(), tokens


@pytest.mark.parametrize("tokens", [40, 10_000])
@pytest.mark.parametrize("side", [0, 1])
def test_equal_positives_leave_nothing_to_contrast_and_two_classes_the_other_class(
    model: SentenceTransformer, features: list[dict[str, Any]], tokens: int, side: int
) -> None:
    """And so do equal queries."""
    settings, limits = section(directions="symmetric"), TokenLimits(tokens, tokens)
    content = NO_DUPLICATES[:, :2].clone()
    content[:, side] = 99
    loss = contrastive_loss(model, settings, limits)(features[:2], content)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert gradients(model, loss).abs().max() < 1e-6
    content[-1, side] = 100  # of which there is one: a row of the others has two candidates
    queries, positives = (model(dict(batch))["sentence_embedding"] for batch in features[:2])
    scores = queries @ positives.T / settings.temperature
    rest = torch.full((BATCH - 1,), BATCH - 1)
    own, other = scores.diag(), [scores[[*range(BATCH - 1)], rest], scores[rest, [*range(BATCH - 1)]]]
    two = sum(torch.logaddexp(own[:-1], each).sum() - own[:-1].sum() for each in other)
    alone = scores[-1].logsumexp(0) + scores[:, -1].logsumexp(0) - 2 * own[-1]
    found = contrastive_loss(model, settings, limits)(features[:2], content)
    assert found.item() == pytest.approx(((two + alone) / 2 / BATCH).item(), rel=1e-4)


def test_the_draws_of_both_passes_are_those_of_the_device_of_the_weights(
    model: SentenceTransformer, features: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the inputs, which stay on the CPU: dropout would hide other values in the second pass."""
    watched: list[Tensor] = []
    monkeypatch.setattr(loss_module, "RandContext", lambda *tensors: watched.extend(tensors) or nullcontext())
    columns = [keep_on_host(column) for column in features[:2]]
    assert isinstance(columns[0]["input_ids"], HostTensor), "a premise"
    contrastive_loss(model, section(), TokenLimits(40, 40))(columns, torch.arange(2 * BATCH).view(BATCH, 2))
    assert len(watched) > 2
    assert all(each is next(model.parameters()) for each in watched)


def test_more_dimensions_than_the_model_has_are_refused(tiny_backbone: Backbone) -> None:
    with pytest.raises(UsageError, match="asks for 64 values, but this backbone's embeddings have 32; give lengths"):
        alone(Contrastive, section(matryoshka_dims=[16, 64])).check_backbone(tiny_backbone.model.config)


# The trainer


@pytest.mark.parametrize("most", [0, 1, 5])
def test_a_batch_has_one_subset_as_many_hard_negatives_a_row_and_the_prompts_of_inference(
    tiny_backbone: Backbone, subset_rows: list[Row], tmp_path: Path, most: int
) -> None:
    """A subset that does not fill a batch gives a smaller one; every row is seen from either side."""
    settings = section(hard_negatives=most, directions="both")
    trainer = trainer_of(tiny_backbone, subset_rows, tmp_path, settings, max_steps=20)
    seen: dict[str, list[int]] = {"query": [], "document": []}
    for batch in trainer.get_train_dataloader():
        rows = [subset_rows[number] for number in batch[FACTS].rows]
        assert len({row.subset for row in rows}) == 1
        side, kind = ("positive", "document") if "anchor_pixel_values" in batch else ("anchor", "query")
        columns = {side: [row.positive for row in rows]}
        for place in range(min({len(row.negatives[:most]) for row in rows}) if side == "positive" else 0):
            columns[f"negative_{place + 1}"] = [row.negatives[place] for row in rows]
        found = {key.removesuffix("_input_ids") for key in batch if "input_ids" in key}
        assert found == {"anchor", "positive", *columns}
        for place, (column, items) in enumerate(columns.items(), start=1):
            inference = trainer.model.preprocess([item.load() for item in items], prompt=PROMPTS[kind])
            assert torch.equal(batch[f"{column}_input_ids"], inference["input_ids"])
            ids = batch["label"][:, 0 if side == "anchor" else place]
            assert [[one == other for other in items] for one in items] == (ids[:, None] == ids).tolist()
        seen[kind] += batch[FACTS].rows
    assert {*seen["query"]} == {*seen["document"]} == {*range(len(subset_rows))}


def test_a_broken_row_that_no_other_can_replace_is_an_error(
    tiny_backbone: Backbone, scene_rows: list[Row], tmp_path: Path
) -> None:
    (tmp_path / "broken.png").touch()
    broken = replace(scene_rows[0], query=Item(images=(tmp_path / "broken.png",)), negatives=(Item("red"),))
    settings = section(hard_negatives=1, directions="forward", probe_rows=0)
    collator = trainer_of(tiny_backbone, [broken, *scene_rows[1:4]], tmp_path, settings, max_steps=1).data_collator
    batch = replace(collator, on_bad_row="skip")([{"row": 0}])
    assert "no other row can replace this one" in batch[FACTS].failure


def test_copies_of_an_image_are_one_content(tiny_backbone: Backbone, scene_rows: list[Row], tmp_path: Path) -> None:
    copy = tmp_path / "copy.png"
    shutil.copy(str(scene_rows[0].image), copy)
    rows = [*scene_rows[:2], replace(scene_rows[2], query=Item(images=(copy,)))]
    trainer = trainer_of(tiny_backbone, rows, tmp_path, section(directions="forward"), max_steps=1)
    (batch,) = trainer.get_train_dataloader()
    of_row = dict(zip(batch[FACTS].rows, batch["label"][:, 0].tolist(), strict=True))
    assert of_row[0] == of_row[2] != of_row[1]


@pytest.mark.parametrize("tokens", [60, 10_000])
def test_subsets_that_do_not_fill_a_batch_are_trained_on(
    tiny_backbone: Backbone, subset_rows: list[Row], tmp_path: Path, tokens: int
) -> None:
    rows = [*subset_rows[:6], *(replace(row, subset="small", negatives=()) for row in subset_rows[7:9])]
    settings = section(hard_negatives=2, matryoshka_dims=[8], directions="symmetric", mini_batch_tokens=tokens)
    trainer = trainer_of(tiny_backbone, rows, tmp_path, settings, max_steps=9, seed=1)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 9
    assert max(losses) > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_sorted_by_lengths_that_are_counted_for_it_alone(
    tiny_backbone: Backbone, scene_rows: list[Row], tmp_path: Path, workers: int
) -> None:
    def lengths_of(rows: Sequence[Row]) -> list[int]:
        assert len(rows) == BATCH
        return [-int(Path(row.source).stem[-1]) for row in rows]

    rows = [replace(row, source=f"{number % 5}.jpg") for number, row in enumerate(scene_rows)]
    arguments = trainer_arguments(tmp_path, max_steps=2, dataloader_num_workers=workers)
    stage = alone(Contrastive, section(directions="both"))
    for batch in stage.trainer(
        tiny_backbone, RowTable.of(rows), StageContext(arguments, lengths_of)
    ).get_train_dataloader():
        lengths = [-(number % 5) for number in batch[FACTS].rows]
        assert lengths == sorted(lengths)
        texts = batch["anchor_input_ids" if "positive_pixel_values" in batch else "positive_input_ids"]
        expected = [rows[number].positive.text for number in batch[FACTS].rows]
        assert tiny_backbone.processor.tokenizer.batch_decode(texts, skip_special_tokens=True) == expected


def test_no_examples_are_picked_for_a_card_that_is_not_written(
    tiny_backbone: Backbone, scene_rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picked: list[object] = []
    monkeypatch.setattr(
        SentenceTransformerModelCardData, "set_widget_examples", lambda self, dataset: picked.append(dataset)
    )
    trainer_of(tiny_backbone, scene_rows, tmp_path)
    assert not picked


# The probe


def test_the_probe_measures_the_models_own_embeddings(model: SentenceTransformer, mixed_rows: list[Row]) -> None:
    """Queries with their prompt, documents with theirs, as ``encode_query`` and ``encode_document``."""
    queries = [model.encode_query([row.query.load()])[0] for row in mixed_rows]
    documents = model.encode_document([{"text": row.positive.text} for row in mixed_rows])
    has_image = np.array([row.query.image is not None for row in mixed_rows])
    assert {*has_image} == {True, False}
    expected = geometry(np.stack(queries), documents, first_has_image=has_image, second_has_image=has_image & False)
    assert embedding_probe(model.train(), mixed_rows, batch_size=3)(model) == pytest.approx(expected, rel=1e-3)
    assert model.training
    model.prompts = {}
    assert embedding_probe(model, mixed_rows, batch_size=3)(model) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("pictured", "broken", "is_measured"), [(0, 0, False), (1, 0, False), (2, 0, True), (2, 1, True), (1, 1, False)]
)
def test_the_probe_takes_two_rows_with_usable_images(
    tiny_backbone: Backbone, scene_rows: list[Row], tmp_path: Path, pictured: int, broken: int, is_measured: bool
) -> None:
    texts = [Row(query=Item(text=f"scene {n}"), positive=row.positive, source="") for n, row in enumerate(scene_rows)]
    lost = [replace(row, query=Item(images=(tmp_path / "gone.png",))) for row in scene_rows[:broken]]
    rows = RowTable.of([*texts, *scene_rows[:pictured], *lost])
    context = StageContext(trainer_arguments(tmp_path, max_steps=2, seed=0), on_bad_row="skip")
    trainer = alone(Contrastive, section(), prompts=PROMPTS).trainer(tiny_backbone, rows, context)
    assert (trainer.probe is not None) is is_measured


@pytest.mark.parametrize(("steps", "probed"), [(4, [4]), (5, [4, 5]), (7, [4, 7])])
def test_the_probe_measures_when_due_and_at_the_end_while_the_stopwatch_is_paused(
    tiny_backbone: Backbone,
    scene_rows: list[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    probed: list[int],
) -> None:
    trainer = trainer_of(tiny_backbone, scene_rows, tmp_path, max_steps=steps, logging_steps=2)
    trainer.add_callback(LogLastStep())
    is_paused = [False]

    @contextmanager
    def paused() -> Iterator[None]:
        is_paused.append(True)
        yield
        is_paused.append(False)

    monkeypatch.setattr(trainer.throughput, "paused", paused)
    trainer.probe = Probe(lambda measured: {"alignment": float(is_paused[-1])}, 3, {"alignment"})
    trainer.train()
    found = {line["step"]: line["alignment"] for line in trainer.state.log_history if "alignment" in line}
    assert found == dict.fromkeys(probed, 1.0)
