"""Ray's actors embed what one process embeds, and an actor that is killed loses and doubles nothing."""

import os
import signal
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import write_checkpoint
from fake_model import FakeModel
from source_files import tar
from table_files import png, write_images
from tiny_backbones import TINY_MAX_LENGTH

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.encode.load import load_encoder
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.integrations.qdrant.shards.embed import EmbedSummary, embed, plan
from cocoa_embed.integrations.qdrant.shards.files import EmbeddingFolder
from cocoa_embed.integrations.ray import Embedder, embed_on_ray
from cocoa_embed.model.backbone import load_backbone
from cocoa_embed.model.export import export_model
from cocoa_embed.sources.open import all_sources

ray = pytest.importorskip("ray")


class Mortal(Embedder):
    """An actor whose process is killed at its second part, the first time that one of them comes to that."""

    parts = 0

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[bytes]]:
        self.parts += 1
        died = Path(self.folder.place).parent / "died"
        if self.parts == 2 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


@pytest.fixture(scope="module")
def model(tiny_backbone_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    backbone = load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH)
    return export_model(write_checkpoint(backbone, folder / "run"), folder / "model")


def points(folder: EmbeddingFolder) -> dict[str, np.ndarray]:
    found = [point for name in folder.names() for point in folder.read(name)]
    assert len({point.id for point in found}) == len(found)
    return {point.id: point.vector for point in found}


def test_devices_are_left_to_ray(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--devices and --ray were given together"):
        list(embed_on_ray([], EmbeddingFolder(str(tmp_path)), "model", {"devices": "all"}))


@pytest.mark.slow
def test_a_killed_actor_neither_loses_nor_duplicates_a_part(model: Path, tmp_path: Path) -> None:
    places: list[str | Path] = [tmp_path / "photos"]
    write_images(tmp_path / "photos", ["a", "b", "c"])
    for number in range(6):
        places.append(tmp_path / f"{number}.tar")
        (tmp_path / f"{number}.tar").write_bytes(
            tar([(f"{each}.png", png(100 + 10 * number + each)) for each in range(3)])
        )
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    out = EmbeddingFolder(str(tmp_path / "out"))
    summaries = list(
        embed_on_ray(plan(all_sources(places), out), out, model, {"dtype": None}, actors=2, embedder=Mortal)
    )
    assert (tmp_path / "died").exists()
    assert not ray.is_initialized()
    assert sorted(summary.embedded for summary in summaries) == [3] * 7
    assert not any(summary.failed for summary in summaries)
    alone = EmbeddingFolder(str(tmp_path / "alone"))
    list(embed(plan(all_sources(places), alone), alone, load_encoder(model, "cpu")))
    assert sorted(out.names()) == sorted(alone.names())
    expected, found = points(alone), points(out)
    assert found.keys() == expected.keys()
    for id_, vector in found.items():
        np.testing.assert_allclose(vector, expected[id_], atol=2e-3)
    again = list(embed_on_ray(plan(all_sources(places), out), out, model, {}))
    assert again == [EmbedSummary(out.place, skipped=1)] * 7


def test_another_model_is_refused_even_if_everything_is_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "photos", ["a"])
    out = EmbeddingFolder(str(tmp_path / "out"))
    planned = lambda: plan(all_sources([tmp_path / "photos"]), out)  # noqa: E731
    assert [each.parts for each in embed(planned(), out, Encoder(FakeModel()))] == [1]
    refused: AbstractContextManager[Any] = pytest.raises(CocoaError, match="was made with the model")
    for seed, refusal in ((0, nullcontext()), (1, refused)):
        encoder = Encoder(FakeModel(seed=seed))
        monkeypatch.setattr("cocoa_embed.integrations.ray.open_encoder", lambda *_, encoder=encoder: encoder)
        with refusal:
            assert [each.skipped for each in embed_on_ray(planned(), out, "model", {})] == [1]


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_its_own_error(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", ["a"])
    out = EmbeddingFolder(str(tmp_path / "out"))
    with pytest.raises(CocoaError, match="there is no such model folder"):
        list(embed_on_ray(plan(all_sources([tmp_path / "photos"]), out), out, tmp_path / "nowhere", {}, actors=1))
    assert not ray.is_initialized()


def test_a_cluster_that_is_not_there_is_reported_in_one_sentence(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", ["a"])
    out = EmbeddingFolder(str(tmp_path / "out"))
    with pytest.raises(CocoaError, match="there is no Ray cluster at auto"):
        list(embed_on_ray(plan(all_sources([tmp_path / "photos"]), out), out, "model", {}, address="auto"))
