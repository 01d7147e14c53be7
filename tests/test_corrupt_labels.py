"""Labels drawn anew: how many, which, and the same on every machine."""

import jax
import numpy as np
import pytest

from metaopt.datasets import (
    ClassData,
    corrupt_labels,
    ImageData,
    load_digits,
    SparseData,
    TableData,
)


KEY = jax.random.key(0)


def labels(n: int = 10_000, num_classes: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, num_classes, n)


@pytest.mark.parametrize(
    "fraction, count", [(0, 0), (0.5, 5000), (0.33333, 3333), (1, 10_000)]
)
def test_number_of_labels_that_are_redrawn(fraction, count):
    y, redrawn = corrupt_labels(labels(), fraction, KEY, num_classes=5)
    assert redrawn.dtype == bool and redrawn.sum() == count
    np.testing.assert_array_equal(y[~redrawn], labels()[~redrawn])
    assert y.dtype == labels().dtype and y.min() >= 0 and y.max() < 5


def test_new_labels_are_uniform_over_all_classes():
    y, redrawn = corrupt_labels(labels(), 0.5, KEY, num_classes=5)
    shares = np.bincount(y[redrawn], minlength=5) / 5000
    # Four standard deviations of a share of 5,000 draws.
    bound = 4 * np.sqrt(0.2 * 0.8 / 5000)
    np.testing.assert_allclose(shares, 0.2, atol=bound)
    assert abs((y == labels())[redrawn].mean() - 0.2) < bound
    # Nor does the place matter.
    assert abs(redrawn[:5000].mean() - 0.5) < 4 * np.sqrt(0.25 / 5000)


def test_other_labels_always_differ():
    y, redrawn = corrupt_labels(labels(), 0.5, KEY, num_classes=5, other=True)
    np.testing.assert_array_equal(y != labels(), redrawn)
    moves = np.bincount((y - labels())[redrawn] % 5, minlength=5) / 5000
    bound = 4 * np.sqrt(0.25 * 0.75 / 5000)
    np.testing.assert_allclose(moves, [0, 0.25, 0.25, 0.25, 0.25], atol=bound)
    two, _ = corrupt_labels(np.array([0, 1, 1]), 1.0, KEY, num_classes=2, other=True)
    assert two.tolist() == [1, 0, 0]


def test_smaller_fractions_are_parts_of_larger_ones():
    masks = [corrupt_labels(labels(), f, KEY, num_classes=5)[1] for f in (0.1, 0.4, 0.41)]
    assert not np.any(masks[0] & ~masks[1]) and not np.any(masks[1] & ~masks[2])


ROWS, NEW, OTHER = [2, 3, 5, 7, 9, 10], [2, 1, 2, 1, 2, 1], [0, 2, 1, 2, 1, 2]


@pytest.mark.parametrize("x64", [False, True])
def test_same_key_same_labels_everywhere(x64):
    # Written down once: another version of JAX or another machine must agree.
    y = np.arange(12) % 3
    with jax.enable_x64(x64):
        got, redrawn = corrupt_labels(y, 0.5, jax.random.key(7), num_classes=3)
        other, again = corrupt_labels(y, 0.5, jax.random.key(7), num_classes=3, other=True)
    assert np.flatnonzero(redrawn).tolist() == ROWS
    assert got[redrawn].tolist() == NEW and other[redrawn].tolist() == OTHER
    np.testing.assert_array_equal(again, redrawn)
    fresh, _ = corrupt_labels(y, 0.5, jax.random.key(8), num_classes=3)
    assert fresh.tolist() != got.tolist()


def test_data_of_each_kind():
    digits = load_digits()
    y, mask = corrupt_labels(digits.y, 0.3, KEY, num_classes=10)
    sparse = SparseData(
        np.zeros(0, np.float32),
        np.zeros(0, np.int32),
        np.zeros(len(digits) + 1, np.int32),
        digits.y,
        *(1, 10, "none"),
    )
    for data in (digits, TableData(digits.x, digits.y, 10, "table"), sparse):
        noisy, redrawn = corrupt_labels(data, 0.3, KEY)
        assert type(noisy) is type(data) and noisy.name == data.name
        assert noisy.y.dtype == np.int32
        np.testing.assert_array_equal(noisy.y, y)
        np.testing.assert_array_equal(redrawn, mask)
        assert data.y is digits.y
    noisy, _ = corrupt_labels(digits, 0.3, KEY)
    assert isinstance(noisy, ImageData) and noisy.x is digits.x


def test_labels_of_jax_and_none_at_all():
    y, _ = corrupt_labels(jax.numpy.arange(4) % 2, 1.0, KEY, num_classes=2, other=True)
    assert y.tolist() == [1, 0, 1, 0]
    y, redrawn = corrupt_labels(np.zeros(0, int), 0.5, KEY, num_classes=2)
    assert y.shape == redrawn.shape == (0,)


@pytest.mark.parametrize(
    "data, options, message",
    [
        (labels(5), {}, "`num_classes` is missing"),
        (labels(5), {"num_classes": 0}, "`num_classes` must be at least 1"),
        (labels(500), {"num_classes": 4}, "between 0 and 3 .* got 0 to 4"),
        (np.array([-1, 1]), {"num_classes": 2}, "between 0 and 1 .* got -1 to 1"),
        (np.zeros(5), {"num_classes": 4}, r"whole numbers of shape \(n,\); got float64"),
        (np.zeros((5, 1), int), {"num_classes": 4}, r"got int64 of shape \(5, 1\)"),
        (np.zeros(5, int), {"num_classes": 1, "other": True}, "needs two classes"),
        (labels(5), {"num_classes": 5, "fraction": 1.01}, "`fraction` must lie between"),
        (labels(5), {"num_classes": 5, "fraction": -0.1}, "`fraction` must lie between"),
        (labels(5), {"num_classes": 5, "fraction": float("nan")}, "`fraction` must lie"),
        (labels(5), {"num_classes": 5, "fraction": "half"}, "must be a number from 0 to 1"),
        (labels(5), {"num_classes": 5, "fraction": True}, "must be a number from 0 to 1"),
        (labels(5), {"num_classes": 5, "key": 0}, "`key` must come from"),
        (labels(5), {"num_classes": 5, "other": 1}, "`other` must be `True` or `False`"),
        (load_digits(), {"num_classes": 10}, "`num_classes` is part of `data`"),
        (ClassData(np.zeros((2, 3, 1))), {}, "one label for each row.*got ClassData"),
    ],
)
def test_refuses(data, options, message):
    with pytest.raises(ValueError, match=message):
        corrupt_labels(data, **({"fraction": 0.5, "key": KEY} | options))
