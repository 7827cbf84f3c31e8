import math

import numpy as np
import pytest
from numpy.typing import NDArray

from cocoa_embed.evaluation.geometry import alignment, effective_rank, geometry, modality_gap, uniformity

Floats = NDArray[np.float64]
BASIS = np.eye(6)


def on_the_sphere(count: int, width: int = 8, seed: int = 0) -> Floats:
    points = np.random.default_rng(seed).normal(size=(count, width))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def test_alignment_of_known_pairs() -> None:
    assert alignment(BASIS, BASIS) == 0
    assert alignment(BASIS, -BASIS) == pytest.approx(4)
    assert alignment(BASIS, np.roll(BASIS, 1, axis=0)) == pytest.approx(2)
    assert alignment(BASIS[:2], np.stack([BASIS[0], -BASIS[1]])) == pytest.approx(2), "a mean over the pairs"


def test_uniformity_of_known_sets() -> None:
    assert uniformity(np.repeat(BASIS[:1], 5, axis=0)) == 0
    assert uniformity(BASIS) == pytest.approx(-4)
    assert uniformity(np.stack([BASIS[0], -BASIS[0]])) == pytest.approx(-8)
    # One pair of equals among three pairs, the others orthogonal: a mean over each pair once.
    assert uniformity(BASIS[[0, 0, 1]]) == pytest.approx(math.log((1 + 2 * math.exp(-4)) / 3))


def test_uniformity_stays_finite_where_every_kernel_underflows() -> None:
    far = 100 * BASIS
    assert math.exp(-2 * 2 * 100**2) == 0
    assert uniformity(far) == pytest.approx(-2 * 2 * 100**2)


def test_uniformity_is_exact_for_half_precision_inputs() -> None:
    points = on_the_sphere(16).astype(np.float16)
    assert uniformity(points) == pytest.approx(uniformity(points.astype(np.float64)), abs=1e-12)


def test_the_gap_is_the_distance_of_the_centroids() -> None:
    assert modality_gap(BASIS, BASIS[::-1]) == pytest.approx(0)
    assert modality_gap(BASIS[:1], -BASIS[:1]) == pytest.approx(2)
    assert modality_gap(BASIS[:2], BASIS[2:3]) == pytest.approx(math.sqrt(0.25 + 0.25 + 1))


@pytest.mark.parametrize("count", [1, 2, 6])
def test_the_effective_rank_of_known_sets(count: int) -> None:
    assert effective_rank(BASIS[:count]) == pytest.approx(count)
    assert effective_rank(np.repeat(on_the_sphere(1), count, axis=0)) == pytest.approx(1)
    # Three rows on one axis and one on another: singular values sqrt(3) and 1.
    ratio = math.sqrt(3) / (math.sqrt(3) + 1)
    entropy = -ratio * math.log(ratio) - (1 - ratio) * math.log(1 - ratio)
    assert effective_rank(BASIS[[0, 0, 0, 1]]) == pytest.approx(math.exp(entropy))


def test_a_rotation_changes_no_measure() -> None:
    first, second = on_the_sphere(12, seed=1), on_the_sphere(12, seed=2)
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(8, 8)))[0]
    has_image = np.ones(12, dtype=bool)
    before, after = (
        geometry(one, other, first_has_image=has_image, second_has_image=~has_image)
        for one, other in ((first, second), (first @ turn, second @ turn))
    )
    assert not np.allclose(first, first @ turn)
    assert after == pytest.approx(before)


def test_geometry_has_all_four_measures() -> None:
    first, second = on_the_sphere(9, seed=1), on_the_sphere(9, seed=2)
    pictures = np.arange(9) < 6  # the last three queries are texts
    none = np.zeros(9, dtype=bool)
    found = geometry(first, second, first_has_image=pictures, second_has_image=none)
    assert list(found) == ["alignment", "uniformity", "modality_gap", "effective_rank"]
    assert found == {
        "alignment": alignment(first, second),
        "uniformity": (uniformity(first) + uniformity(second)) / 2,
        "modality_gap": modality_gap(first[:6], np.concatenate([first[6:], second])),
        "effective_rank": effective_rank(np.concatenate([first, second])),
    }
    assert all(isinstance(value, float) for value in found.values())


def test_items_of_one_kind_have_no_gap() -> None:
    same = np.full(6, True)
    found = geometry(BASIS, BASIS, first_has_image=same, second_has_image=same)
    assert list(found) == ["alignment", "uniformity", "effective_rank"]


def test_embeddings_without_a_measure_are_refused() -> None:
    broken = BASIS.copy()
    broken[2, 3] = np.nan
    for function in (uniformity, effective_rank):
        with pytest.raises(ValueError, match="not finite"):
            function(broken)
    with pytest.raises(ValueError, match=r"n of 2 or more, got \(1, 6\)"):
        uniformity(BASIS[:1])
    with pytest.raises(ValueError, match="n of 1 or more"):
        modality_gap(BASIS, BASIS[:0])
    with pytest.raises(ValueError, match=r"\(6,6\) \(5,6\)"):
        alignment(BASIS, BASIS[:5])
    with pytest.raises(ValueError, match="all zero"):
        effective_rank(np.zeros((3, 3)))
