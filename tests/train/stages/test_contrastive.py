from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from exported import PROMPTS, write_checkpoint
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from stages import alone
from torch import Tensor
from transformers import set_seed

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.evaluation.geometry import geometry
from cocoa_embed.images.load import load_image
from cocoa_embed.model.backbone import load_backbone
from cocoa_embed.model.export import build_sentence_transformer
from cocoa_embed.train.loop.callbacks import LogLastStep
from cocoa_embed.train.loop.trainer import Probe, StageContext
from cocoa_embed.train.settings import AdapterSettings
from cocoa_embed.train.stages.contrastive import pairs as pairs_module
from cocoa_embed.train.stages.contrastive import trainer as trainer_module
from cocoa_embed.train.stages.contrastive.pairs import ItemPreprocessor, as_record, distinct_enough, pair_datasets
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
from cocoa_embed.train.stages.contrastive.stage import Contrastive
from cocoa_embed.train.stages.contrastive.trainer import contrastive_loss, embedding_probe
from conftest import TINY_MAX_LENGTH

Features = dict[str, Any]
BATCH = 8


def section(**values: Any) -> ContrastiveSettings:
    return ContrastiveSettings(steps=2, batch_size=BATCH, **values)


def arguments(folder: Path, **values: Any) -> dict[str, Any]:
    return {
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


def trainer_of(
    model: SentenceTransformer, rows: list[Row], settings: ContrastiveSettings, given: dict[str, Any]
) -> trainer_module.ContrastiveTrainer:
    return alone(Contrastive, settings).trainer_of(model, rows, StageContext(given))


@pytest.fixture(scope="module")
def checkpoint(tiny_backbone_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH)
    return write_checkpoint(backbone, tmp_path_factory.mktemp("run") / "bridge")


@pytest.fixture
def model(checkpoint: Path) -> SentenceTransformer:
    return build_sentence_transformer(checkpoint, prompts=PROMPTS).to("cpu")


@pytest.fixture
def mixed_rows(scene_rows: list[Row]) -> list[Row]:
    """Eight pairs whose queries are an image, an image with a text, or a text."""
    rows = []
    for number, row in enumerate(scene_rows[:BATCH]):
        query = (row.query, Item(text="what is here?", image=row.image), Item(text=f"scene {number}"))[number % 3]
        rows.append(Row(query=query, positive=row.positive, source=row.source))
    return rows


def features(model: SentenceTransformer, rows: list[Row]) -> list[Features]:
    preprocess = ItemPreprocessor(model)
    return [
        preprocess([as_record(row.query) for row in rows]),
        preprocess([as_record(row.positive) for row in rows]),
    ]


def gradients(model: SentenceTransformer) -> Tensor:
    found = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat(found)


# Pairs


def test_pairs_are_the_rows_and_their_exchange(scene_rows: list[Row]) -> None:
    pairs = pair_datasets(scene_rows, section())
    assert list(pairs) == ["data", "data, reversed"]
    forward, backward = pairs.values()
    assert len(forward) == len(backward) == len(scene_rows)
    assert forward.column_names == backward.column_names == ["anchor", "positive", "label"]
    for number, (row, there, back) in enumerate(zip(scene_rows, forward, backward, strict=True)):
        assert there["anchor"] == {"text": None, "image": str(row.image)}
        assert there["positive"] == {"text": row.positive.text, "image": None}
        assert (back["anchor"], back["positive"]) == (there["positive"], there["anchor"])
        assert there["label"] == back["label"] == number


@pytest.fixture
def subset_rows(scene_rows: list[Row]) -> list[Row]:
    """Twenty-four rows of two subsets by turns; the first has two hard negatives a row, or one, or none."""
    rows = []
    for number, row in enumerate(scene_rows):
        negatives = tuple(Item(text=f"{row.positive.text} {number} {place}") for place in range(number // 2 % 3))
        rows.append(replace(row, subset="many", negatives=negatives) if number % 2 else replace(row, subset="none"))
    return rows


def test_rows_with_fewer_negatives_than_their_subset_are_apart(subset_rows: list[Row]) -> None:
    pairs = pair_datasets(subset_rows, section(hard_negatives=2))
    expected = {"none": 0, "many": 2, "many, 1 negative": 1, "many, no negatives": 0}
    expected |= {"none, reversed": 0, "many, reversed": 0}
    assert {name: len(data.column_names) - 3 for name, data in pairs.items()} == expected
    numbers = [number for name, data in pairs.items() if "reversed" not in name for number in data["label"]]
    assert sorted(numbers) == list(range(len(subset_rows))), "no row is lost or doubled"
    for name, data in pairs.items():
        for record in data:
            row = subset_rows[record["label"]]
            assert row.subset == name.split(",")[0]
            if "reversed" not in name:
                found = [record[f"negative_{place + 1}"]["text"] for place in range(expected[name])]
                assert found == [item.text for item in row.negatives]


@pytest.mark.parametrize(
    ("hard_negatives", "names"), [(0, {"many": 2}), (1, {"many": 3, "many, no negatives": 2}), (5, {"many": 4})]
)
def test_at_most_so_many_negatives_are_used_as_asked_for(
    subset_rows: list[Row], hard_negatives: int, names: dict[str, int]
) -> None:
    pairs = pair_datasets(subset_rows, section(hard_negatives=hard_negatives, directions="forward"))
    for name, columns in names.items():
        assert pairs[name].column_names[:-1] == ["anchor", "positive", "negative_1", "negative_2"][:columns]
    assert sum(map(len, pairs.values())) == len(subset_rows)


def test_a_subset_named_as_a_part_of_another_is_refused(subset_rows: list[Row]) -> None:
    rows = [*subset_rows, replace(subset_rows[0], subset="many, 1 negative")]
    for given in (rows, rows[::-1]):
        with pytest.raises(UsageError, match="name 'many, 1 negative', as has a part of 'many'; rename"):
            pair_datasets(given, section(hard_negatives=2))


# Preprocessing


def test_the_preprocessor_reads_images_and_gives_the_models_own_inputs(
    model: SentenceTransformer, mixed_rows: list[Row]
) -> None:
    items = [row.query for row in mixed_rows[:3]]
    as_inputs: list[dict[str, Any]] = [
        {"image": load_image(items[0].image)},  # type: ignore[arg-type]
        {"image": load_image(items[1].image), "text": items[1].text},  # type: ignore[arg-type]
        {"text": items[2].text},
    ]
    for prompt in (None, PROMPTS["query"]):
        found = ItemPreprocessor(model)([as_record(item) for item in items], prompt=prompt)
        expected = model.preprocess(as_inputs, prompt=prompt)
        assert found["pixel_values"].shape == (2 * 16, 1176)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value


def test_a_broken_image_is_named_where_it_is_read(model: SentenceTransformer, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(CocoaError, match=r"broken\.png"):
        ItemPreprocessor(model)([as_record(Item(image=tmp_path / "broken.png"))])


# The loss


def test_on_several_devices_gradients_are_cached_and_candidates_gathered(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not contrastive_loss(model, section(mini_batch_size=BATCH)).gather_across_devices
    monkeypatch.setattr(trainer_module, "PartialState", lambda: SimpleNamespace(num_processes=2))
    loss = contrastive_loss(model, section(mini_batch_size=BATCH))
    assert isinstance(loss, CachedMultipleNegativesRankingLoss)
    assert loss.gather_across_devices


# Hard negatives and Matryoshka dimensions

CHUNKS = pytest.mark.parametrize("chunk", [3, BATCH])
"""With cached gradients, and without."""


@pytest.fixture
def negative_rows(mixed_rows: list[Row], scene_rows: list[Row]) -> list[Row]:
    """Eight pairs with two hard negatives each: a text, and an image."""
    return [
        replace(row, negatives=(Item(text=f"scene {number} without it"), scene_rows[BATCH + number].query))
        for number, row in enumerate(mixed_rows)
    ]


def with_negatives(model: SentenceTransformer, rows: list[Row]) -> list[Features]:
    columns = zip(*(row.negatives for row in rows), strict=True)
    return features(model, rows) + [ItemPreprocessor(model)([as_record(item) for item in column]) for column in columns]


def slow_loss(model: SentenceTransformer, rows: list[Row], asked: ContrastiveSettings, dims: list[int]) -> Tensor:
    """The closed form, written out: a sum over lengths of the mean over directions."""
    embeddings = [model(batch)["sentence_embedding"] for batch in with_negatives(model, rows)]
    rights = torch.arange(len(rows))
    total = torch.zeros(())
    for dim in dims:
        cut = [torch.nn.functional.normalize(column[:, :dim], dim=1) for column in embeddings]
        losses = [torch.nn.functional.cross_entropy(cut[0] @ torch.cat(cut[1:]).T / asked.temperature, rights)]
        if asked.directions == "symmetric":
            losses.append(torch.nn.functional.cross_entropy(cut[1] @ cut[0].T / asked.temperature, rights))
        total = total + torch.stack(losses).mean()
    return total


@CHUNKS
@pytest.mark.parametrize("dims", [None, [8, 16]])
@pytest.mark.parametrize("directions", ["forward", "symmetric"])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_the_losses_of_every_option_and_their_gradients_are_the_closed_form(
    model: SentenceTransformer,
    negative_rows: list[Row],
    chunk: int,
    dims: list[int] | None,
    directions: str,
    temperature: float,
) -> None:
    model.eval()
    asked = section(temperature=temperature, directions=directions, mini_batch_size=chunk)
    expected = slow_loss(model, negative_rows, asked, [32, *sorted(dims or [], reverse=True)])
    expected.backward()
    slow = gradients(model)
    assert slow.abs().max() > 1e-2
    model.zero_grad()
    # Whatever a row's number is, the loss does not look at it.
    value = contrastive_loss(model, asked, [32, *sorted(dims or [], reverse=True)])(
        with_negatives(model, negative_rows), torch.arange(BATCH) * 3
    )
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert (gradients(model) - slow).abs().max() < 1e-4 * slow.abs().max()


@pytest.mark.parametrize(("asked", "dims"), [([8, 16], [32, 16, 8]), ([8, 32, 8], [32, 8]), (None, [32])])
def test_the_whole_length_is_always_trained_and_comes_first(asked: list[int] | None, dims: list[int]) -> None:
    assert alone(Contrastive, section(matryoshka_dims=asked)).dims(32) == dims


def test_more_dimensions_than_the_model_has_are_refused() -> None:
    with pytest.raises(UsageError, match="asks for 64 values, but this backbone's embeddings have 32; give lengths"):
        alone(Contrastive, section(matryoshka_dims=[16, 64])).dims(32)


# The trainer


def batches(
    model: SentenceTransformer, rows: list[Row], folder: Path, *, asked: ContrastiveSettings, **values: Any
) -> Iterator[Features]:
    trainer = trainer_of(model, rows, asked, arguments(folder, **values))
    return iter(trainer.get_train_dataloader())


def test_training_sees_the_token_ids_of_encode_query(
    model: SentenceTransformer, scene_rows: list[Row], tmp_path: Path
) -> None:
    captions = [{"text": row.positive.text} for row in scene_rows]
    inference = model.preprocess(captions, prompt=PROMPTS["query"])
    expected = {
        tuple(ids[mask.bool()].tolist())
        for ids, mask in zip(inference["input_ids"], inference["attention_mask"], strict=True)
    }
    assert len(expected) == len(scene_rows)
    found = set()
    for batch in batches(model, scene_rows, tmp_path, asked=section()):
        if "anchor_pixel_values" not in batch:
            for ids, mask in zip(batch["anchor_input_ids"], batch["anchor_attention_mask"], strict=True):
                found.add(tuple(ids[mask.bool()].tolist()))
    assert found == expected


def test_no_batch_holds_a_duplicate(model: SentenceTransformer, scene_rows: list[Row], tmp_path: Path) -> None:
    """Two rows with one caption would be each other's negatives."""
    rows = [*scene_rows[:12], *scene_rows[:12]]
    found = [
        [tuple(ids) for ids in batch["positive_input_ids"].tolist()]
        for batch in batches(model, rows, tmp_path, asked=section(directions="forward"), per_device_train_batch_size=4)
    ]
    assert sum(map(len, found)) == 24
    assert all(len(set(batch)) == len(batch) for batch in found)


@pytest.mark.parametrize("hard_negatives", [0, 2])
def test_every_batch_is_of_one_subset_and_its_labels_name_its_rows(
    model: SentenceTransformer, subset_rows: list[Row], tmp_path: Path, hard_negatives: int
) -> None:
    """A subset that does not fill a batch gives a smaller one; every row is seen from either side."""
    asked = section(hard_negatives=hard_negatives)
    seen: list[int] = []
    for batch in batches(model, subset_rows, tmp_path, asked=asked):
        rows = [subset_rows[number] for number in batch["label"].tolist()]
        assert len({row.subset for row in rows}) == 1
        side = "positive" if "anchor_pixel_values" in batch else "anchor"
        captions = model.tokenizer.batch_decode(batch[f"{side}_input_ids"], skip_special_tokens=True)
        prompt = PROMPTS["document" if side == "positive" else "query"]
        assert captions == [f"{prompt}{row.positive.text}" for row in rows]
        negatives = [key for key in batch if key.startswith("negative") and key.endswith("_input_ids")]
        counts = {len(row.negatives[:hard_negatives]) for row in rows} if side == "positive" else {0}
        assert counts == {len(negatives)}
        for key in negatives:
            texts = model.tokenizer.batch_decode(batch[key], skip_special_tokens=True)
            assert all(text.startswith(PROMPTS["document"]) for text in texts)
        seen += batch["label"].tolist()
    assert sorted(seen) == sorted([*range(len(subset_rows))] * 2)


def test_rows_that_share_a_negative_do_not_meet(
    model: SentenceTransformer, scene_rows: list[Row], tmp_path: Path
) -> None:
    shared = Item(text="an empty scene")
    rows = [replace(row, negatives=(shared,)) if number < 3 else row for number, row in enumerate(scene_rows)]
    asked = section(hard_negatives=1, directions="forward")
    found = [batch["label"].tolist() for batch in batches(model, rows, tmp_path, asked=asked)]
    assert sum(bool(set(batch) & {0, 1, 2}) for batch in found) >= 1
    assert all(len(set(batch) & {0, 1, 2}) <= 1 for batch in found)


@pytest.mark.parametrize("mini_batch_size", [4, BATCH])
def test_training_goes_on_with_subsets_that_do_not_fill_a_batch(
    model: SentenceTransformer, subset_rows: list[Row], tmp_path: Path, mini_batch_size: int
) -> None:
    rows = [*subset_rows[:3], replace(subset_rows[3], subset="alone")]
    asked = section(hard_negatives=2, matryoshka_dims=[8], directions="symmetric", mini_batch_size=mini_batch_size)
    trainer = trainer_of(model, rows, asked, arguments(tmp_path, max_steps=9, seed=1))
    trainer.train()
    assert trainer.state.global_step == 9
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 9
    assert max(losses) > 0


# What is measured beside the training

METRICS = {"alignment", "uniformity", "modality_gap", "effective_rank"}


def draw_at_random(model: torch.nn.Module) -> dict[str, float]:
    """Do what no probe may."""
    return {"alignment": torch.rand(1).item()}


@pytest.mark.parametrize("mini_batch_size", [4])
def test_the_probe_changes_neither_weights_nor_draws(
    checkpoint: Path, scene_rows: list[Row], tmp_path: Path, mini_batch_size: int
) -> None:
    """The adapter's dropout draws at every step, so that a draw between two steps would show in the weights."""
    adapter = AdapterSettings(kind="lora", r=2, alpha=4, dropout=0.3)

    def trained(probe_rows: int, probe: Probe | None = None) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        asked = section(mini_batch_size=mini_batch_size, adapter=adapter, probe_rows=probe_rows, probe_steps=1)
        model = build_sentence_transformer(checkpoint, prompts=PROMPTS).to("cpu")
        set_seed(0)
        trainer = trainer_of(model, scene_rows, asked, arguments(tmp_path, max_steps=4, learning_rate=1e-2))
        trainer.probe = probe or trainer.probe
        trainer.train()
        return model.state_dict(), [line for line in trainer.state.log_history if "loss" in line]

    with_probe, logged = trained(probe_rows=6)
    without, unprobed = trained(probe_rows=0)
    drawn, _ = trained(probe_rows=0, probe=Probe(draw_at_random, 1, METRICS))
    assert [METRICS <= line.keys() for line in logged] == [True] * 4
    assert not any(METRICS & line.keys() for line in unprobed)
    assert [line["loss"] for line in logged] == [line["loss"] for line in unprobed]
    assert with_probe.keys() == without.keys()
    assert all(torch.equal(value, without[name]) for name, value in with_probe.items())
    assert not all(torch.equal(value, without[name]) for name, value in drawn.items()), "a draw does show"


def test_the_geometry_is_that_of_the_models_own_embeddings(model: SentenceTransformer, mixed_rows: list[Row]) -> None:
    """Queries with their prompt, documents with theirs, as ``encode_query`` and ``encode_document``."""
    inputs = [
        {"image": load_image(row.query.image)} if row.query.text is None  # type: ignore[arg-type]
        else {"text": row.query.text} if row.query.image is None
        else {"image": load_image(row.query.image), "text": row.query.text}  # type: ignore[arg-type]
        for row in mixed_rows
    ]  # fmt: skip
    queries = [model.encode_query([each])[0] for each in inputs]
    documents = model.encode_document([{"text": row.positive.text} for row in mixed_rows])
    has_image = np.array([row.query.image is not None for row in mixed_rows])
    assert {*has_image} == {True, False}
    expected = geometry(np.stack(queries), documents, first_has_image=has_image, second_has_image=has_image & False)
    found = embedding_probe(model.train(), mixed_rows, batch_size=3)(model)
    assert found == pytest.approx(expected, rel=1e-3)
    assert model.training
    model.prompts = {}
    assert embedding_probe(model, mixed_rows, batch_size=3)(model) != pytest.approx(expected, rel=1e-3)


def test_texts_alone_are_trained_without_a_probe(
    model: SentenceTransformer, scene_rows: list[Row], tmp_path: Path
) -> None:
    texts = [Row(query=Item(text=f"scene {n}"), positive=row.positive, source="") for n, row in enumerate(scene_rows)]
    for rows, is_measured in ((texts, False), ([*texts, scene_rows[0]], False), ([*texts, *scene_rows[:2]], True)):
        trainer = trainer_of(model, rows, section(), arguments(tmp_path))
        assert (trainer.probe is not None) is is_measured


def test_the_probe_is_asked_when_it_is_due_while_the_stopwatch_is_paused(
    model: SentenceTransformer, scene_rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(model, scene_rows, section(), arguments(tmp_path, max_steps=7, logging_steps=2))
    trainer.add_callback(LogLastStep())
    stands: list[bool] = [False]

    @contextmanager
    def paused() -> Iterator[None]:
        stands.append(True)
        yield
        stands.append(False)

    def probe(measured: torch.nn.Module) -> dict[str, float]:
        assert measured is model
        return {"alignment": float(stands[-1])}

    monkeypatch.setattr(trainer.throughput, "paused", paused)
    trainer.probe = Probe(probe, 3, METRICS)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    assert {line["step"]: line["alignment"] for line in lines if "alignment" in line} == {4: 1.0, 7: 1.0}
    assert stands[-1] is False


def test_no_examples_are_picked_for_a_card_that_is_not_written(
    model: SentenceTransformer, scene_rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picked = []
    monkeypatch.setattr(
        type(model.model_card_data), "set_widget_examples", lambda self, dataset: picked.append(dataset), raising=True
    )
    trainer_of(model, scene_rows, section(), arguments(tmp_path))
    assert not picked


def test_few_different_values_are_told(scene_rows: list[Row], caplog: pytest.LogCaptureFixture) -> None:
    """Yes-or-no answers, say: a batch that holds nothing twice is of two rows then."""
    answers = [replace(row, positive=Item(text="yes" if n % 2 else "no")) for n, row in enumerate(scene_rows)]
    pairs = pair_datasets(answers, section(directions="forward"))
    assert distinct_enough(pairs, BATCH) is pairs
    assert f"2 different positive in {len(scene_rows)} rows" in caplog.text
    caplog.clear()
    distinct_enough(pair_datasets(scene_rows, section(directions="forward")), BATCH)
    assert not caplog.text


def test_a_subset_that_leaves_a_device_without_a_row_is_refused(
    scene_rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs_module, "PartialState", lambda: SimpleNamespace(num_processes=8))
    answers = [replace(row, positive=Item(text="yes")) for row in scene_rows]
    with pytest.raises(UsageError, match=r"1 different positive in 24 rows.*each of the 8 devices"):
        distinct_enough(pair_datasets(answers, section(directions="forward")), BATCH)


def test_every_epoch_has_an_order_of_its_own(
    model: SentenceTransformer, scene_rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    asked = section(directions="forward")
    trainer = trainer_of(model, scene_rows, asked, arguments(tmp_path, max_steps=9))
    monkeypatch.setattr(trainer.throughput, "saw", lambda facts: seen.extend(fact.rows for fact in facts))
    trainer.train()
    assert len(trainer.drawn) == 3
    epochs = [seen[start : start + 3] for start in (0, 3, 6)]
    assert all(sorted(row for batch in epoch for row in batch) == list(range(len(scene_rows))) for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 3
