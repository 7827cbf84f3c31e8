import math

import numpy as np
import pytest
from numpy.typing import NDArray

from cocoa_embed.evaluation.geometry import alignment, effective_rank, geometry, modality_gap, pair_recall, uniformity

Floats = NDArray[np.float64]
BASIS = np.eye(6)
# Three rows on one axis and one on another: singular values sqrt(3) and 1.
LARGER = math.sqrt(3) / (math.sqrt(3) + 1)


def on_the_sphere(count: int, width: int = 8, seed: int = 0) -> Floats:
    points = np.random.default_rng(seed).normal(size=(count, width))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


HALF = on_the_sphere(16).astype(np.float16)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (alignment(BASIS, BASIS), 0),
        (alignment(BASIS, -BASIS), 4),
        (alignment(BASIS[:2], np.stack([BASIS[0], -BASIS[1]])), 2),
        (uniformity(BASIS), -4),
        (uniformity(np.stack([BASIS[0], -BASIS[0]])), -8),
        # One pair of equals among three pairs, the others orthogonal: a mean over each pair once.
        (uniformity(BASIS[[0, 0, 1]]), math.log((1 + 2 * math.exp(-4)) / 3)),
        # In half precision, too.
        (uniformity(HALF), uniformity(HALF.astype(np.float64))),
        # Finite where every kernel underflows.
        (uniformity(100 * BASIS), -2 * 2 * 100**2),
        (modality_gap(BASIS[:1], -BASIS[:1]), 2),
        (modality_gap(BASIS[:2], BASIS[2:3]), math.sqrt(0.25 + 0.25 + 1)),
        (pair_recall(BASIS, BASIS), 1),
        (pair_recall(BASIS, BASIS[::-1]), 0),
        # The second sides of two of six pairs are swapped; then they are equal, and a tie is a miss.
        (pair_recall(BASIS, BASIS[[1, 0, 2, 3, 4, 5]]), 4 / 6),
        (pair_recall(BASIS, BASIS[[0, 0, 2, 3, 4, 5]]), (4 / 6 + 5 / 6) / 2),
        # Equal rows whose products are rounded differently.
        *(
            (pair_recall(each, each), 0)
            for each in (np.repeat(on_the_sphere(1, width), 33, axis=0) for width in (8, 96))
        ),
        *((effective_rank(BASIS[:count]), count) for count in (1, 2, 6)),
        *((effective_rank(np.repeat(on_the_sphere(1), count, axis=0)), 1) for count in (1, 2, 6)),
        (effective_rank(BASIS[[0, 0, 0, 1]]), LARGER**-LARGER * (1 - LARGER) ** (LARGER - 1)),
    ],
)
def test_measures_of_known_sets(found: float, expected: float) -> None:
    assert found == pytest.approx(expected, abs=1e-9)


def test_geometry_has_all_measures_which_a_rotation_does_not_change() -> None:
    first, second = on_the_sphere(9, seed=1), on_the_sphere(9, seed=2)
    kinds = {"first_has_image": np.arange(9) < 6, "second_has_image": np.zeros(9, dtype=bool)}
    found = geometry(first, second, **kinds)
    assert list(found) == ["alignment", "uniformity", "modality_gap", "effective_rank", "pair_recall"]
    assert found == {
        "alignment": alignment(first, second),
        "uniformity": (uniformity(first) + uniformity(second)) / 2,
        "modality_gap": modality_gap(first[:6], np.concatenate([first[6:], second])),
        "effective_rank": effective_rank(np.concatenate([first, second])),
        "pair_recall": pair_recall(first, second),
    }
    assert all(isinstance(value, float) for value in found.values())
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(8, 8)))[0]
    assert geometry(first @ turn, second @ turn, **kinds) == pytest.approx(found)
    no_image = geometry(first, second, first_has_image=np.full(9, False), second_has_image=np.full(9, False))
    assert list(no_image) == ["alignment", "uniformity", "effective_rank", "pair_recall"], (
        "items of one kind have no gap"
    )


@pytest.mark.parametrize(
    ("function", "embeddings", "message"),
    [
        (uniformity, [BASIS * np.nan], "not finite"),
        (uniformity, [BASIS[:1]], r"n of 2 or more, got \(1, 6\)"),
        (pair_recall, [BASIS[:1], BASIS[:1]], r"n of 2 or more, got \(1, 6\)"),
        (pair_recall, [BASIS, BASIS[:3]], r"one shape, got \(6, 6\) and \(3, 6\)"),
        (effective_rank, [np.zeros((3, 3))], "all zero"),
    ],
)
def test_embeddings_without_a_measure_are_refused(function: object, embeddings: list[Floats], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*embeddings)
