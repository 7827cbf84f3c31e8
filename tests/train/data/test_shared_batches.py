import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler, ProportionalBatchSampler
from torch.utils.data import BatchSampler, ConcatDataset

from cocoa_embed.train.stages.contrastive.trainer import SharedBatchSampler

SIZES = {"a": 37, "b": 12, "c": 3}


def proportional(devices: int) -> BatchSampler:
    """Batches of up to four rows a device, each of one of three subsets; every value is twice in a subset."""
    parts = [Dataset.from_dict({"anchor": [f"{name}{n // 2}" for n in range(size)]}) for name, size in SIZES.items()]
    drawn = {"generator": torch.Generator(), "seed": 0}
    samplers = [NoDuplicatesBatchSampler(part, batch_size=4 * devices, drop_last=False, **drawn) for part in parts]
    return ProportionalBatchSampler(ConcatDataset(parts), batch_samplers=samplers, **drawn)


def described(index: int) -> tuple[str, int]:
    names = [(name, n // 2) for name, size in SIZES.items() for n in range(size)]
    return names[index]


def dealt(sampler: BatchSampler, devices: int, device: int) -> list[list[int]]:
    """The batches of a device, as accelerate distributes them in training."""
    return list(BatchSamplerShard(sampler, num_processes=devices, process_index=device, even_batches=False))


@pytest.mark.parametrize("devices", [2, 3])
def test_the_rows_of_a_step_are_different_of_one_subset_and_as_many_on_each_device(devices: int) -> None:
    shards = [dealt(SharedBatchSampler(proportional(devices), devices), devices, device) for device in range(devices)]
    found = list(zip(*shards, strict=True))
    assert len(found) > len(SIZES)
    names = set()
    for parts in found:
        assert len({len(part) for part in parts}) == 1
        values = [described(index) for part in parts for index in part]
        assert len({name for name, _ in values}) == 1
        assert len(set(values)) == len(values)
        names.add(values[0][0])
    assert {"a", "b"} <= names
    assert any(len(parts[0]) == 4 for parts in found)
    assert any(0 < len(parts[0]) < 4 for parts in found), "smaller batches are divided too"


def test_without_it_devices_get_rows_of_several_subsets() -> None:
    """The premise: accelerate gives whole batches to the devices in turn, which mixes subsets in a step."""
    pairs = zip(*(dealt(proportional(1), 2, device) for device in range(2)), strict=False)
    assert any(described(one[0])[0] != described(other[0])[0] for one, other in pairs)


def test_another_epoch_draws_other_batches() -> None:
    sampler = SharedBatchSampler(proportional(2), 2)
    first, again = list(sampler), list(sampler)
    assert first == again
    assert len(first) <= len(sampler) == 2 * (5 + 2 + 1)
    sampler.batches.set_epoch(1)
    assert list(sampler) != first
