from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from exported import PROMPTS
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
from stages import alone
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.evaluation.geometry import geometry
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.loop.callbacks import LogLastStep
from cocoa_embed.train.loop.trainer import Probe, StageContext
from cocoa_embed.train.stages.contrastive import pairs as pairs_module
from cocoa_embed.train.stages.contrastive import trainer as trainer_module
from cocoa_embed.train.stages.contrastive.model import as_sentence_transformer, embedding_probe
from cocoa_embed.train.stages.contrastive.pairs import as_record, distinct_enough, pair_datasets, preprocess_records
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
from cocoa_embed.train.stages.contrastive.stage import Contrastive
from cocoa_embed.train.stages.contrastive.trainer import ContrastiveTrainer, contrastive_loss

BATCH = 8


def section(**values: Any) -> ContrastiveSettings:
    return ContrastiveSettings(steps=2, batch_size=BATCH, **{"directions": "forward", **values})


def trainer_of(
    backbone: Backbone, rows: list[Row], folder: Path, settings: ContrastiveSettings | None = None, **values: Any
) -> ContrastiveTrainer:
    arguments = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **values,
    }
    stage = alone(Contrastive, settings or section(), prompts=PROMPTS)
    return stage.trainer(backbone, RowTable.of(rows), StageContext(arguments))


@pytest.fixture
def model(tiny_backbone: Backbone) -> SentenceTransformer:
    run = alone(Contrastive, section(), prompts=PROMPTS).run
    return as_sentence_transformer(tiny_backbone, run).to("cpu")


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


# Pairs


def test_pairs_are_the_rows_and_their_exchange(scene_rows: list[Row]) -> None:
    pairs = pair_datasets(scene_rows, section(directions="both"))
    assert list(pairs) == ["data (hard negatives: 0)", "data (reversed)"]
    forward, backward = pairs.values()
    assert len(forward) == len(backward) == len(scene_rows)
    assert forward.column_names == backward.column_names == ["anchor", "positive", "label"]
    for number, (row, there, back) in enumerate(zip(scene_rows, forward, backward, strict=True)):
        assert there["anchor"] == {"text": None, "image": str(row.image)}
        assert there["positive"] == {"text": row.positive.text, "image": None}
        assert (back["anchor"], back["positive"]) == (there["positive"], there["anchor"])
        assert there["label"] == back["label"] == number


@pytest.mark.parametrize("most", [0, 1, 5])
def test_rows_of_a_data_set_have_as_many_hard_negatives_and_no_more_than_the_settings(
    subset_rows: list[Row], most: int
) -> None:
    pairs = pair_datasets(subset_rows, section(hard_negatives=most))
    counts = {min(most, count) for count in (0, 1, 2)}
    many = {f"many (hard negatives: {count})" for count in counts}
    assert set(pairs) == {"none (hard negatives: 0)", *many}
    assert sorted(number for data in pairs.values() for number in data["label"]) == list(range(len(subset_rows)))
    for name, data in pairs.items():
        for record in data:
            row = subset_rows[record["label"]]
            assert row.subset == name.split()[0]
            found = [record[column]["text"] for column in data.column_names if column.startswith("negative")]
            assert found == [item.text for item in row.negatives[:most]]


def test_few_different_values_are_warned_of_and_too_few_for_the_devices_refused(
    scene_rows: list[Row], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Yes-or-no answers, say: a batch that holds nothing twice then has two rows."""
    distinct_enough(pair_datasets(scene_rows, section()), BATCH)
    assert not caplog.text
    answers = [replace(row, positive=Item(text="yes" if n % 2 else "no")) for n, row in enumerate(scene_rows)]
    pairs = pair_datasets(answers, section())
    assert distinct_enough(pairs, BATCH) is pairs
    assert f"2 different positive in {len(scene_rows)} rows" in caplog.text
    monkeypatch.setattr(pairs_module, "PartialState", lambda: SimpleNamespace(num_processes=8))
    with pytest.raises(UsageError, match=r"2 different positive in 24 rows.*each of the 8 devices"):
        distinct_enough(pairs, BATCH)


# Preprocessing


def preprocessed(model: SentenceTransformer, items: list[Item], **values: Any) -> dict[str, Any]:
    return preprocess_records(model, {}, [as_record(item) for item in items], **values)


@pytest.mark.parametrize("prompt", [None, PROMPTS["query"]])
def test_records_become_the_models_own_inputs(
    model: SentenceTransformer, mixed_rows: list[Row], prompt: str | None
) -> None:
    items = [row.query for row in mixed_rows[:3]]
    found = preprocessed(model, items, prompt=prompt)
    expected = model.preprocess([item.load() for item in items], prompt=prompt)
    assert found["pixel_values"].shape == (2 * 16, 1176)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value


def test_a_broken_image_is_named_where_it_is_read(model: SentenceTransformer, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(CocoaError, match=r"broken\.png"):
        preprocessed(model, [Item(images=(tmp_path / "broken.png",))])


# The loss


def test_on_several_devices_gradients_are_cached_and_candidates_gathered(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not contrastive_loss(model, section(mini_batch_size=BATCH)).gather_across_devices
    monkeypatch.setattr(trainer_module, "PartialState", lambda: SimpleNamespace(num_processes=2))
    loss = contrastive_loss(model, section(mini_batch_size=BATCH))
    assert isinstance(loss, CachedMultipleNegativesRankingLoss)
    assert loss.gather_across_devices


def closed_form(columns: list[Tensor], settings: ContrastiveSettings, dims: list[int]) -> Tensor:
    """Return the loss written out: a sum over lengths of the mean over directions."""
    targets = torch.arange(len(columns[0]))
    total = torch.zeros(())
    for dim in dims:
        queries, positives, *negatives = (normalize(column[:, :dim], dim=1) for column in columns)
        scores = queries @ torch.cat([positives, *negatives]).T
        losses = [cross_entropy(scores / settings.temperature, targets)]
        if settings.directions == "symmetric":
            losses.append(cross_entropy(positives @ queries.T / settings.temperature, targets))
        total = total + torch.stack(losses).mean()
    return total


@pytest.mark.parametrize("mini_batch_size", [3, BATCH])
@pytest.mark.parametrize(("dims", "trained"), [(None, [32]), ([8, 32, 16, 8], [32, 16, 8])])
@pytest.mark.parametrize(("directions", "temperature"), [("forward", 0.05), ("symmetric", 0.5)])
def test_the_loss_and_its_gradients_are_the_closed_form(
    model: SentenceTransformer,
    mixed_rows: list[Row],
    scene_rows: list[Row],
    mini_batch_size: int,
    dims: list[int] | None,
    trained: list[int],
    directions: str,
    temperature: float,
) -> None:
    """With cached gradients and without, for pairs with two hard negatives each: a text, and an image."""
    settings = section(temperature=temperature, directions=directions, mini_batch_size=mini_batch_size,
                       matryoshka_dims=dims)  # fmt: skip
    columns = [[row.query for row in mixed_rows], [row.positive for row in mixed_rows]]
    columns += [[Item(text=f"scene {number} without it") for number in range(BATCH)]]
    columns += [[row.query for row in scene_rows[BATCH : 2 * BATCH]]]
    features = [preprocessed(model.eval(), items) for items in columns]

    def gradients(loss: Tensor) -> Tensor:
        model.zero_grad()
        loss.backward()
        return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])

    expected = closed_form([model(dict(batch))["sentence_embedding"] for batch in features], settings, trained)
    slow = gradients(expected)
    assert slow.abs().max() > 1e-2
    value = contrastive_loss(model, settings)(features, torch.arange(BATCH) * 3)  # it ignores the rows' numbers
    fast = gradients(value)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert (fast - slow).abs().max() < 1e-4 * slow.abs().max()


def test_more_dimensions_than_the_model_has_are_refused(tiny_backbone: Backbone) -> None:
    with pytest.raises(UsageError, match="asks for 64 values, but this backbone's embeddings have 32; give lengths"):
        alone(Contrastive, section(matryoshka_dims=[16, 64])).check_backbone(tiny_backbone.model.config)


# The trainer


def test_no_batch_holds_a_duplicate_or_a_negative_twice(
    tiny_backbone: Backbone, scene_rows: list[Row], tmp_path: Path
) -> None:
    """Two rows with one caption would be each other's negatives."""
    shared = Item(text="an empty scene")
    rows = [replace(row, negatives=(shared,)) if number < 3 else row for number, row in enumerate(scene_rows[:12])]
    rows += scene_rows[:12]
    settings = section(hard_negatives=1)
    trainer = trainer_of(tiny_backbone, rows, tmp_path, settings, per_device_train_batch_size=4)
    seen: list[int] = []
    for batch in trainer.get_train_dataloader():
        texts = [tuple(ids) for ids in batch["positive_input_ids"].tolist()]
        assert len(set(texts)) == len(texts)
        numbers = batch["label"].tolist()
        assert len(set(numbers) & {0, 1, 2}) <= 1
        seen += numbers
    assert {*range(3, 24)} <= {*seen}
    assert {*seen} & {0, 1, 2}


@pytest.mark.parametrize("hard_negatives", [0, 2])
def test_every_batch_has_one_subset_its_rows_numbers_and_the_prompts_of_inference(
    tiny_backbone: Backbone, subset_rows: list[Row], tmp_path: Path, hard_negatives: int
) -> None:
    """A subset that does not fill a batch gives a smaller one; every row is seen from either side."""
    settings = section(hard_negatives=hard_negatives, directions="both")
    trainer = trainer_of(tiny_backbone, subset_rows, tmp_path, settings)
    tokenizer = tiny_backbone.processor.tokenizer
    seen: list[int] = []
    for batch in trainer.get_train_dataloader():
        numbers = batch["label"].tolist()
        rows = [subset_rows[number] for number in numbers]
        assert len({row.subset for row in rows}) == 1
        side, kind = ("positive", "document") if "anchor_pixel_values" in batch else ("anchor", "query")
        inference = trainer.model.preprocess([{"text": row.positive.text} for row in rows], prompt=PROMPTS[kind])
        assert torch.equal(batch[f"{side}_input_ids"], inference["input_ids"])
        negatives = [key for key in batch if key.startswith("negative") and key.endswith("_input_ids")]
        counts = {len(row.negatives[:hard_negatives]) for row in rows} if side == "positive" else {0}
        assert counts == {len(negatives)}
        for key in negatives:
            texts = tokenizer.batch_decode(batch[key], skip_special_tokens=True)
            assert all(text.startswith(PROMPTS["document"]) for text in texts)
        seen += numbers
    assert sorted(seen) == sorted([*range(len(subset_rows))] * 2)


@pytest.mark.parametrize("mini_batch_size", [4, BATCH])
def test_subsets_that_do_not_fill_a_batch_are_trained_on(
    tiny_backbone: Backbone, subset_rows: list[Row], tmp_path: Path, mini_batch_size: int
) -> None:
    rows = [*subset_rows[:3], replace(subset_rows[3], subset="alone")]
    settings = section(hard_negatives=2, matryoshka_dims=[8], directions="symmetric", mini_batch_size=mini_batch_size)
    trainer = trainer_of(tiny_backbone, rows, tmp_path, settings, max_steps=9, seed=1)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 9
    assert max(losses) > 0


def test_each_epoch_has_its_own_order(
    tiny_backbone: Backbone, scene_rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    trainer = trainer_of(tiny_backbone, scene_rows, tmp_path, max_steps=9)
    monkeypatch.setattr(trainer.throughput, "count", lambda facts: seen.extend(fact.rows for fact in facts))
    trainer.train()
    epochs = [seen[start : start + 3] for start in (0, 3, 6)]
    assert all(sorted(row for batch in epoch for row in batch) == list(range(len(scene_rows))) for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 3


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


@pytest.mark.parametrize(("pictured", "is_measured"), [(0, False), (1, False), (2, True)])
def test_the_probe_takes_two_rows_with_images(
    tiny_backbone: Backbone, scene_rows: list[Row], tmp_path: Path, pictured: int, is_measured: bool
) -> None:
    texts = [Row(query=Item(text=f"scene {n}"), positive=row.positive, source="") for n, row in enumerate(scene_rows)]
    trainer = trainer_of(tiny_backbone, [*texts, *scene_rows[:pictured]], tmp_path)
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
