"""Vectors of length 1."""

import numpy as np


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors of length 1 in the same direction; zero stays zero.

    :param vectors: Floating point, ``[..., dimension]``; the result has the same shape and dtype.
    """
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths == 0, 1, lengths)
