"""Tables and sparse rows: right numbers, divided and selected like images."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from sklearn.feature_extraction.text import TfidfTransformer

from metaopt.datasets import k_fold, SparseData, split, TableData


def make_table(n: int = 20) -> TableData:
    x = np.random.default_rng(1).normal(3, 10, (n, 4)).astype(np.float32)
    x[:, 3] = 0.1  # whose mean is rounded
    return TableData(x, np.arange(n, dtype=np.int32) % 4, 4, "toy")


def matrix(n: int = 20, columns: int = 12) -> np.ndarray:
    """Counts, a third of which are not zero; one row is empty and one is full."""
    random = np.random.default_rng(2)
    x = random.integers(1, 9, (n, columns)) * (random.random((n, columns)) < 1 / 3)
    x[2], x[5] = 0, np.arange(1, columns + 1)
    return x.astype(np.float32)


def make_sparse(x: np.ndarray | None = None) -> SparseData:
    x = matrix() if x is None else x
    rows, columns = np.nonzero(x)
    starts = np.searchsorted(rows, np.arange(len(x) + 1))
    return SparseData(
        values=x[rows, columns],
        columns=columns.astype(np.int32),
        starts=starts.astype(np.int32),
        y=np.arange(len(x), dtype=np.int32) % 4,
        num_columns=x.shape[1],
        num_classes=4,
        name="counts",
    )


# Tables


def test_table_is_a_pytree_and_selects():
    data = make_table()
    assert len(jax.tree.leaves(data)) == 2 and len(data) == 20
    total = jax.jit(lambda data: data.x.sum() + data.num_classes)(data)
    np.testing.assert_allclose(total, data.x.sum() + 4, rtol=1e-5)
    np.testing.assert_array_equal(data[np.array([3, 1])].x, data.x[[3, 1]])
    np.testing.assert_array_equal(data[data.y == 2].y, 2)
    assert data[:3].name == "toy" and len(data[:3]) == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": np.zeros((20, 3))}, "`x` must be float32"),
        ({"x": np.zeros((20, 3, 1), np.float32)}, "`x` must be float32 of shape"),
        ({"x": np.zeros((19, 3), np.float32)}, "19 rows but `y` has 20 labels"),
        ({"x": np.full((20, 3), np.nan, np.float32)}, "`x` holds infinite or NaN"),
        ({"x": np.full((20, 3), -np.inf, np.float32)}, "`x` holds infinite or NaN"),
        ({"y": np.zeros(20)}, "`y` must be int32"),
        ({"y": np.full(20, 4, np.int32)}, "`y` must lie between 0 and 3"),
        ({"y": np.full(20, -1, np.int32)}, "`y` must lie between 0 and 3"),
    ],
)
def test_table_refuses(change, message):
    data = make_table()
    arguments = {"x": data.x, "y": data.y, "num_classes": 4, "name": "toy"} | change
    with pytest.raises(ValueError, match=message):
        TableData(**arguments)


def test_standardized_by_the_training_part():
    train, valid = split(make_table(200), (150, 50), seed=0)
    scaled, other = train.standardized(train), valid.standardized(train)
    assert scaled.x.dtype == np.float32
    np.testing.assert_allclose(scaled.x.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.x.std(axis=0), [1, 1, 1, 0], atol=1e-6)
    mean = train.x.mean(axis=0, dtype=np.float64)
    deviation = train.x[:, :3].std(axis=0, dtype=np.float64)
    expected = (valid.x - mean)[:, :3] / deviation
    np.testing.assert_allclose(other.x[:, :3], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(other.y, valid.y)


def test_standardized_refuses_other_columns():
    data = make_table()
    other = TableData(data.x[:, :2], data.y, 4, "other")
    with pytest.raises(ValueError, match=r"`reference` must have rows of 4 columns"):
        data.standardized(other)
    with pytest.raises(ValueError, match=r"`reference` .* shape \(0, 4\)"):
        data.standardized(data[:0])


# Sparse rows


def test_dense_and_back():
    data = make_sparse()
    table = data.dense()
    assert table.x.dtype == np.float32 and (table.name, table.num_classes) == ("counts", 4)
    np.testing.assert_array_equal(table.x, matrix())
    np.testing.assert_array_equal(table.y, data.y)
    # In the order that was asked for.
    np.testing.assert_array_equal(data.dense(np.array([7, 2])).x, matrix()[:, [7, 2]])
    assert data.dense(np.zeros(0, int)).x.shape == (20, 0)


@pytest.mark.parametrize(
    "index",
    [slice(3, 9), slice(None, None, -2), np.array([5, 2, 5]), np.arange(20) % 3 == 0, []],
    ids=["slice", "backwards", "positions", "booleans", "none"],
)
def test_sparse_selects_like_an_array(index):
    index = np.array(index, int) if isinstance(index, list) else index
    part = make_sparse()[index]
    np.testing.assert_array_equal(part.dense().x, matrix()[index])
    np.testing.assert_array_equal(part.y, make_sparse().y[index])
    assert part.starts.dtype == np.int32 and part.name == "counts"


def test_most_frequent_columns():
    x = np.zeros((4, 5), np.float32)
    x[:3, 4] = x[:2, 0] = x[:2, 2] = 1
    x[3, 3] = 100  # often, in one row
    data = make_sparse(x)
    frequent = [data.most_frequent(count).tolist() for count in (1, 2, 3, 9)]
    assert frequent == [[4], [0, 4], [0, 2, 4], [0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match="`count` must be at least 1"):
        data.most_frequent(0)


def test_padded_rows_give_the_same_products():
    data = make_sparse()
    weights = np.random.default_rng(3).normal(size=(12, 4)).astype(np.float32)
    indices, values = data.padded_rows()
    assert indices.shape == values.shape == (20, 12)
    assert (indices.dtype, values.dtype) == (np.int32, np.float32)
    product = jnp.sum(jnp.asarray(weights)[indices] * values[..., None], axis=-2)
    np.testing.assert_allclose(product, matrix() @ weights, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(values[2], 0)


def test_padded_rows_keep_the_largest():
    x = np.array([[0, -5, 1, 3], [2, 2, 2, 0], [0, 0, 7, 0]], np.float32)
    indices, values = make_sparse(x).padded_rows(2)
    assert indices.tolist() == [[1, 3], [0, 1], [2, 0]]
    assert values.tolist() == [[-5, 3], [2, 2], [7, 0]]
    indices, values = make_sparse(x).padded_rows(5)
    assert indices.shape == (3, 5) and values[0].tolist() == [-5, 1, 3, 0, 0]
    empty = make_sparse(np.zeros((2, 3), np.float32)).padded_rows()
    assert empty[0].tolist() == empty[1].tolist() == [[0], [0]]


@pytest.mark.parametrize("sublinear", [False, True])
def test_tf_idf_is_that_of_scikit_learn(sublinear):
    train, test = make_sparse(matrix()[:12]), make_sparse(matrix()[12:])
    theirs = TfidfTransformer(sublinear_tf=sublinear)
    theirs.fit(scipy.sparse.csr_matrix(matrix()[:12]))
    for part, x in ((train, matrix()[:12]), (test, matrix()[12:])):
        weighted = part.tf_idf(train, sublinear=sublinear)
        weights: Any = theirs.transform(scipy.sparse.csr_matrix(x))
        np.testing.assert_allclose(weighted.dense().x, weights.toarray(), rtol=1e-6)
        assert weighted.values.dtype == np.float32


def test_tf_idf_refuses():
    data = make_sparse()
    with pytest.raises(ValueError, match="`reference` must have 12 columns; got 8"):
        data.tf_idf(make_sparse(matrix(columns=8)))
    with pytest.raises(ValueError, match="`values` must be counts, 0 or more.*-1.0"):
        make_sparse(-np.ones((2, 12), np.float32)).tf_idf(data)


def test_large_arrays_are_refused_before_memory_is_taken():
    data = make_sparse()
    with pytest.raises(ValueError, match=r"20 rows and 12 columns would take 960 bytes"):
        data.dense(max_bytes=959)
    with pytest.raises(ValueError, match="20 rows of length 3 would take 480.*`width`"):
        data.padded_rows(3, max_bytes=479)
    huge = SparseData(
        np.zeros(0, np.float32),
        np.zeros(0, np.int32),
        np.zeros(101, np.int32),
        np.zeros(100, np.int32),
        *(10**12, 1, "huge"),
    )
    with pytest.raises(ValueError, match="400,000,000,000,000 bytes.*most_frequent"):
        huge.dense()


@pytest.mark.parametrize(
    "columns, message",
    [
        (5, "`columns` must be the numbers of columns"),
        (np.array([0.5]), "`columns` must be the numbers of columns"),
        (np.array([12]), "between 0 and 11, got numbers from 12"),
        (np.array([-1]), "between 0 and 11, got numbers from -1"),
        (np.array([3, 3]), "each column once"),
    ],
)
def test_dense_refuses_columns(columns, message):
    with pytest.raises(ValueError, match=message):
        make_sparse().dense(columns)


GOOD = {
    "values": np.ones(3, np.float32),
    "columns": np.array([0, 2, 1], np.int32),
    "starts": np.array([0, 2, 3], np.int32),
    "y": np.array([0, 1], np.int32),
    "num_columns": 3,
    "num_classes": 2,
    "name": "toy",
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"values": np.ones(3)}, "`values` must be float32 with one axis, got float64"),
        ({"columns": np.zeros((3, 1), np.int32)}, "`columns` must be int32 with one axis"),
        ({"starts": np.array([0, 2, 3])}, "`starts` must be int32 with one axis"),
        ({"y": np.array([0, 2], np.int32)}, "`y` must lie between 0 and 1"),
        ({"starts": np.array([0, 3], np.int32)}, "`starts` must have 3 entries"),
        ({"starts": np.array([1, 2, 3], np.int32)}, "`starts` must rise from 0 to 3"),
        ({"starts": np.array([0, 2, 4], np.int32)}, "`starts` must rise from 0 to 3"),
        ({"starts": np.array([0, 4, 3], np.int32)}, "`starts` must rise from 0 to 3"),
        ({"columns": np.zeros(2, np.int32)}, "`columns` has 2 entries but `values` has 3"),
        ({"columns": np.array([0, 3, 1], np.int32)}, "`columns` must lie between 0 and 2"),
        ({"columns": np.array([0, -1, 1], np.int32)}, "`columns` must lie between 0 and 2"),
        ({"columns": np.array([1, 1, 1], np.int32)}, "must increase within each row"),
        ({"columns": np.array([2, 0, 1], np.int32)}, "must increase within each row"),
        ({"values": np.array([1, np.nan, 1], np.float32)}, "`values` holds infinite or"),
    ],
)
def test_sparse_refuses(change, message):
    assert len(SparseData(**GOOD)) == 2
    with pytest.raises(ValueError, match=message):
        SparseData(**(GOOD | change))


# Divided like images


def labelled_table(counts: list[int]) -> TableData:
    y = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return TableData(np.arange(len(y), dtype=np.float32)[:, None], y, len(counts), "rows")


def labelled_sparse(counts: list[int]) -> SparseData:
    table = labelled_table(counts)
    n = len(table)
    return SparseData(
        table.x[:, 0],
        np.zeros(n, np.int32),
        np.arange(n + 1, dtype=np.int32),
        table.y,
        *(1, len(counts), "rows"),
    )


def numbers(data) -> np.ndarray:
    table = data if isinstance(data, TableData) else data.dense()
    return table.x[:, 0]


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("make", [labelled_table, labelled_sparse])
def test_tables_are_divided_like_images(make, stratified):
    data = make([30, 20, 3])
    parts = split(data, (20, 30), seed=1, stratified=stratified)
    assert [type(part) for part in parts] == [type(data)] * 2
    assert [len(part) for part in parts] == [20, 30]
    rows = np.concatenate([numbers(part) for part in parts])
    assert len(np.unique(rows)) == 50
    for part in parts:
        np.testing.assert_array_equal(part.y, data.y[numbers(part).astype(int)])
        if stratified:
            expected = np.array([30, 20, 3]) * len(part) / 53
            assert np.all(np.abs(np.bincount(part.y, minlength=3) - expected) < 2)
    folds = k_fold(data, 4, seed=0, stratified=stratified)
    assert [len(valid) for _, valid in folds] == [14, 13, 13, 13]
    held_out = np.concatenate([numbers(valid) for _, valid in folds])
    np.testing.assert_array_equal(np.sort(held_out), np.arange(53))
    for train, valid in folds:
        both = np.concatenate([numbers(train), numbers(valid)])
        np.testing.assert_array_equal(np.sort(both), np.arange(53))


def test_kinds_are_divided_alike():
    parts = functools.partial(split, sizes=(20, 30), seed=1, stratified=True)
    for table, sparse in zip(
        parts(labelled_table([30, 20, 3])), parts(labelled_sparse([30, 20, 3])), strict=True
    ):
        np.testing.assert_array_equal(numbers(table), numbers(sparse))
