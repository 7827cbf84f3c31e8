"""Turn out-of-memory errors into errors that name the settings to change."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from cocoa_embed.errors import CocoaError


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a device, or the machine, ran out of memory."""
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def explain_out_of_memory(stage: str, remedies: Sequence[str]) -> Iterator[None]:
    """Explain an out-of-memory error outside of a step: weights, gradients and optimiser states do not fit.

    :param remedies: Changes in the recipe, any one of which may be enough.
    :raises CocoaError: If memory runs out inside the block.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise CocoaError(
            f"Weights, gradients and optimiser states of stage {stage} leave no memory; {', or '.join(remedies)}."
        ) from error
