"""Two processes over gloo train the same weights as one process with the same global batch."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import interrupted
import numpy as np
import pytest
import torch
from run_records import ACCURACIES, GEOMETRY
from safetensors.torch import load_file
from table_files import write_table
from tiny_backbones import COCOA, SCENES, MakeRecipe

from cocoa_embed.model.training_record import read_run
from cocoa_embed.train import Recipe, run
from cocoa_embed.train.settings import AdapterSettings
from cocoa_embed.train.stages.moca.settings import MocaSettings

STAGE: dict[str, Any] = {
    "steps": 4,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_steps": 2,
}

METRICS = {
    "warmup": ("mntp_loss", "mae_loss", "masked_token_accuracy"),
    "moca": ("mlm_loss", "mae_loss", "masked_token_accuracy"),
    "bridge": ("masked_token_accuracy", *ACCURACIES, *GEOMETRY),
    "contrastive": GEOMETRY,
}

RUN = """
# accelerate shards on accelerators alone: present CPUs as GPUs. All code after that check is the same for both.
import gc, os, signal, sys
from accelerate.state import PartialState
from accelerate.utils import DistributedType

meet = PartialState.__init__
def meet_as_accelerators(self, *args, **kwargs):
    meet(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU
if os.environ.get("SHARD_ON_CPU"):
    PartialState.__init__ = meet_as_accelerators

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cocoa_embed.cli.main import main
from cocoa_embed.train.stages.contrastive.loss import CachedRankingLoss
from interrupted import acting_at

forward_cached = CachedRankingLoss.forward_cached
def counting(self, batches, *args, **kwargs):
    with open(f"mini-batches-{os.environ['RANK']}", "a") as file:
        print(len(batches), file=file)
    return forward_cached(self, batches, *args, **kwargs)
CachedRankingLoss.forward_cached = counting

def train():
    with acting_at(3, lambda: os.kill(os.getpid(), signal.SIGKILL), os.environ.get("KILL_IN", "none")):
        main(["train", *sys.argv[1:]])

# What torchrun does, but the processes are forks of this one, which has imported everything.
gc.freeze()
meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "max_restarts": 0}
elastic_launch(LaunchConfig(1, 1, nproc_per_node=2, start_method="fork", **meeting), train)()
"""


@pytest.fixture(scope="module")
def recipe(tiny_recipe: MakeRecipe, scene_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Rows of which one process has images at some steps and the other has none, and a subset of two classes of texts.

    In the contrastive stage each subset has two batches, and four steps make an epoch.
    """
    table = tmp_path_factory.mktemp("texts") / "texts.csv"
    texts = [{"query_text": f"ring number {n}", "positive_text": ("red", "blue")[n % 3 > 0]} for n in range(16)]
    pictures = {"folder": str(scene_folder), "paraphrases": 1}
    subsets = {"pictures": pictures, "texts": {"file": str(write_table(table, texts))}}
    contrastive = {"data": {"subsets": {**subsets, "pictures": {**pictures, "limit": 8}}}, "directions": "symmetric"}
    return tiny_recipe(
        data={"subsets": subsets},
        warmup={**STAGE, "mini_batch_size": 2},
        bridge={**STAGE, "probe_rows": 4, "probe_steps": 2},
        contrastive={**STAGE, **contrastive, "mini_batch_tokens": 60, "probe_rows": 6, "probe_steps": 2},
    )


@pytest.fixture(scope="module")
def alone(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    run(recipe, out)
    return out


def launch(recipe: Recipe, folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "recipe.yaml").write_text(recipe.model_dump_json(exclude_unset=True))
    (folder / "run.py").write_text(RUN)
    paths = os.pathsep.join([str(Path(interrupted.__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "run.py", "recipe.yaml", "--out", "out", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def run_both(recipe: Recipe, folder: Path, *options: str) -> tuple[Path, Path]:
    """Return the folders of a run of two processes, which has more options, and of a run of one."""
    (folder / "two").mkdir()
    launched = launch(recipe, folder / "two", *options)
    assert launched.returncode == 0, launched.stderr[-3000:]
    run(recipe, folder / "one")
    return folder / "two" / "out", folder / "one"


def assert_same(found: Path, expected: Path, stages: tuple[str, ...]) -> None:
    for stage in stages:
        log, log_alone = (read_run(out)["stages"][stage]["log"] for out in (found, expected))
        for name in ("loss", "grad_norm", *METRICS[stage]):
            values, values_alone = ([line[name] for line in lines if name in line] for lines in (log, log_alone))
            assert values, (stage, name)
            assert values == pytest.approx(values_alone, rel=2e-3, abs=1e-5), (stage, name)
        weights, weights_alone = (load_file(out / stage / "model.safetensors") for out in (found, expected))
        assert weights.keys() == weights_alone.keys()
        moved = STAGE["steps"] * STAGE["learning_rate"]
        # Where a gradient is nearly zero, Adam amplifies the order of a sum.
        differences = {name: (value - weights_alone[name]).abs() for name, value in weights.items()}
        assert max(each.max() for each in differences.values()) < moved / 4, stage
        assert torch.cat([each.flatten() for each in differences.values()]).mean() < moved / 400, stage


def assert_same_samples(found: Path, expected: Path) -> None:
    for stage in ("warmup", "bridge"):
        ours, theirs = (read_run(out)["stages"][stage]["samples"] for out in (found, expected))
        assert ours["held_out"] == theirs["held_out"] == (stage == "bridge")
        assert len(ours.get("patches", [])) == len(theirs.get("patches", []))
        assert [shown["tokens"] for shown in ours["tokens"]] == [shown["tokens"] for shown in theirs["tokens"]] != []
        # Weights differ by rounding, so a prediction that is nearly a tie may differ.
        same = [
            our["predicted"][place] == their["predicted"][place]
            for our, their in zip(ours["tokens"], theirs["tokens"], strict=True)
            for place in np.flatnonzero(our["masked"])
        ]
        assert sum(same) > 0.8 * len(same)


def test_two_processes_train_the_weights_of_one(recipe: Recipe, alone: Path, tmp_path: Path) -> None:
    """The contrastive loss too: it would be lower without the other process's negatives."""
    launched = launch(recipe, tmp_path)
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert_same(tmp_path / "out", alone, COCOA)
    assert_same_samples(tmp_path / "out", alone)
    assert launched.stderr.count("contrastive: 4 steps") == 1, "one process reports"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in alone.iterdir())


@pytest.mark.slow
def test_processes_with_different_numbers_of_mini_batches_share_the_features_of_a_frozen_vision_encoder(
    recipe: Recipe, tmp_path: Path
) -> None:
    """They train the weights of one process without a cache, and write all images once."""
    assert recipe.bridge is not None
    assert recipe.contrastive is not None
    bridge = recipe.bridge.model_copy(update={"freeze_vision": True, "probe_rows": 0})
    contrastive = recipe.contrastive.model_copy(update={"freeze_vision": True, "mini_batch_tokens": 25})
    given = recipe.model_copy(update={"warmup": None, "bridge": bridge, "contrastive": contrastive})
    two, one = run_both(given, tmp_path, "vision_cache=vision")
    numbers = [(two.parent / f"mini-batches-{rank}").read_text().split() for rank in (0, 1)]
    assert len(numbers[0]) == len(numbers[1]) == STAGE["steps"]
    assert numbers[0] != numbers[1]
    for stage in ("bridge", "contrastive"):
        logs = [read_run(out)["stages"][stage]["log"] for out in (one, two)]
        losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
        assert losses[0] == pytest.approx(losses[1], rel=2e-3, abs=1e-5), stage
    assert 0 < len([path for path in (two.parent / "vision").rglob("*-torch.float32")]) <= SCENES


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_two_processes_train_pairs_in_both_directions_like_one(recipe: Recipe, tmp_path: Path, weight: float) -> None:
    """The last pass of a step has images on one process and none on the other; gradients are exchanged in it."""
    assert recipe.contrastive is not None
    both = recipe.contrastive.model_copy(update={"directions": "both", "steps": 8, "reconstruction_weight": weight})
    given = recipe.model_copy(update={"warmup": None, "bridge": None, "contrastive": both})
    assert_same(*run_both(given, tmp_path), ("contrastive",))


@pytest.mark.slow
def test_two_processes_train_several_vectors_like_one(recipe: Recipe, tmp_path: Path) -> None:
    two, one = run_both(recipe.model_copy(update={"warmup": None, "eos_tokens": 3}), tmp_path)
    assert_same(two, one, ("bridge", "contrastive"))
    logs = [read_run(out)["stages"]["bridge"]["log"] for out in (one, two)]
    penalties = [[line["eos_similarity_loss"] for line in log if "loss" in line] for log in logs]
    assert penalties[0] == pytest.approx(penalties[1], rel=2e-3)


@pytest.mark.slow
def test_two_processes_train_moca_and_mean_embeddings_like_one(recipe: Recipe, tmp_path: Path) -> None:
    moca = MocaSettings(**STAGE, mini_batch_size=2)
    given = recipe.model_copy(update={"warmup": None, "bridge": None, "moca": moca, "pooling": "mean"})
    assert_same(*run_both(given, tmp_path), ("moca", "contrastive"))


@pytest.mark.slow
def test_an_adapter_of_two_processes_is_that_of_one(recipe: Recipe, tmp_path: Path) -> None:
    """The first process alone keeps float32 weights and merges; the others wait for it."""
    adapter = AdapterSettings(r=2, alpha=4, dropout=0)
    stages = {name: getattr(recipe, name).model_copy(update={"adapter": adapter}) for name in ("warmup", "contrastive")}
    given = recipe.model_copy(update={"bridge": None, **stages})
    run(given, tmp_path / "one")
    for folder, options in (("two", ()), ("half", ("mixed_precision=bf16",))):
        (tmp_path / folder).mkdir()
        launched = launch(given, tmp_path / folder, *options)
        assert launched.returncode == 0, launched.stderr[-3000:]
    assert_same(tmp_path / "two" / "out", tmp_path / "one", ("warmup", "contrastive"))
    merged = load_file(tmp_path / "half" / "out" / "contrastive" / "model.safetensors")
    assert {value.dtype for value in merged.values()} == {torch.float32}
    assert any((value.bfloat16() != value).any() for value in merged.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("data.subsets.pictures.folder=nowhere",), "data.folder nowhere does not exist"),
        (("bridge=null", "contrastive=null", "warmup.learning_rate=1e30"), "The loss of step"),
        (("contrastive=null", "sharding=fsdp2"), "sharding=fsdp2 needs several accelerators"),
    ],
)
def test_an_error_is_reported_once(recipe: Recipe, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    launched = launch(recipe, tmp_path, *options)
    assert launched.returncode != 0
    assert launched.stderr.count("cocoa-embed: ") == 1
    assert message in launched.stderr
    assert not (tmp_path / "out" / "warmup").exists()


@pytest.mark.slow
def test_weights_sharded_by_fsdp2_are_those_of_one_process(recipe: Recipe, alone: Path, tmp_path: Path) -> None:
    launched = launch(recipe, tmp_path, "contrastive=null", "sharding=fsdp2", SHARD_ON_CPU="1")
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert_same(tmp_path / "out", alone, ("warmup", "bridge"))
    assert_same_samples(tmp_path / "out", alone)


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "stage"), [("none", "contrastive"), ("fsdp2", "bridge")])
def test_two_killed_processes_resume(recipe: Recipe, alone: Path, tmp_path: Path, sharding: str, stage: str) -> None:
    stages = COCOA if stage == "contrastive" else ("warmup", "bridge")
    options = () if stage == "contrastive" else ("contrastive=null", f"sharding={sharding}")
    shard = {"SHARD_ON_CPU": "1"} if sharding == "fsdp2" else {}
    killed = launch(recipe, tmp_path, *options, KILL_IN=stage, **shard)
    assert killed.returncode != 0
    assert str(signal.SIGKILL.value) in killed.stderr
    assert (tmp_path / "out" / "checkpoints" / stage / "checkpoint-2" / "complete.json").is_file()
    launched = launch(recipe, tmp_path, *options, "--resume", **shard)
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert_same(tmp_path / "out", alone, stages)
