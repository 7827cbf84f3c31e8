"""Memory that does not suffice, told with the settings to change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cocoa_embed.errors import CocoaError
from cocoa_embed.train.settings import ContrastiveSection, ReconstructionSection, StageSection


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether a device, or the machine, had no memory left."""
    # Where the CPU has none left, torch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def memory_remedy(stage: str, section: StageSection) -> str:
    """Return what to change in a recipe when a step of a stage does not fit into memory."""
    if isinstance(section, ContrastiveSection):
        chunk = f"contrastive.cache_chunk ({section.cache_chunk})"
    else:
        assert isinstance(section, ReconstructionSection)
        chunk = f"{stage}.micro_batch_size ({section.micro_batch_size or section.batch_size})"
    return f"lower {chunk} or max_pixels, or set gradient_checkpointing=true"


@contextmanager
def explained_shortage(stage: str, section: StageSection) -> Iterator[None]:
    """Turn memory that does not suffice for what a stage keeps all the time into an error that says what to change.

    :raises CocoaError: If memory does not suffice inside the block.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise CocoaError(
            f"Weights, gradients and optimiser states of stage {stage} leave no memory; train adapters "
            f"({stage}.adapter.kind=dora), spread them over several devices (sharding=fsdp2), or "
            f"{memory_remedy(stage, section)}."
        ) from error
