"""Points to store: each has a number, from which its id and its vector follow."""

import uuid
from typing import Any

import numpy as np

from cocoa_embed.integrations.qdrant.stores.base import Point, Signature

DIMENSION = 8
SIGNATURE = Signature(model="m", fingerprint="0f", dimension=DIMENSION)
OTHER = Signature(model="another žluť", fingerprint="ab", dimension=DIMENSION)


def name(number: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, str(number)))


def make_vector(number: int, dimension: int = DIMENSION) -> np.ndarray:
    return np.random.default_rng(number).normal(size=dimension).astype(np.float32)


def make_points(start: int, stop: int, dimension: int = DIMENSION, **payload: Any) -> list[Point]:
    return [
        Point(name(number), make_vector(number, dimension), {"number": number, **payload})
        for number in range(start, stop)
    ]


def turned(number: int, degrees: float, **payload: Any) -> Point:
    """A point whose vector is at an angle to that of ``turned(number, 0)``."""
    angle = np.radians(degrees)
    vector = np.array([np.cos(angle), np.sin(angle), *[0] * (DIMENSION - 2)], dtype=np.float32)
    return Point(name(number), vector, {"path": f"/a/{number}.png", "number": number, **payload})
