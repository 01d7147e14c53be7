"""Data sets: right numbers from sound files, a clear refusal of all others."""

import gzip
import hashlib
import io
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest

from local_server import serving
from metaopt._core._files import fetch, parse_idx, write_atomically
from metaopt.datasets import (
    DataError,
    ImageData,
    k_fold,
    load_digits,
    load_fashion_mnist,
    load_mnist,
    split,
)


TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
TRAIN_LABELS = "train-labels-idx1-ubyte.gz"
TEST_IMAGES = "t10k-images-idx3-ubyte.gz"
TEST_LABELS = "t10k-labels-idx1-ubyte.gz"


class Kind(NamedTuple):
    """One of the data sets that come as four files, and what tells it from the others."""

    load: Callable[..., ImageData]
    folder: str
    npz: str
    name: str


MNIST = Kind(load_mnist, "mnist", "mnist.npz", "MNIST")
FASHION = Kind(load_fashion_mnist, "fashion_mnist", "fashion_mnist.npz", "Fashion-MNIST")

each_kind = pytest.mark.parametrize("kind", [MNIST, FASHION], ids=lambda kind: kind.name)


def idx(array):
    header = bytes((0, 0, 8, array.ndim))
    header += b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (6, 3, 2), dtype=np.uint8),
        "y_train": rng.integers(0, 10, 6, dtype=np.uint8),
        "x_test": rng.integers(0, 256, (4, 3, 2), dtype=np.uint8),
        "y_test": rng.integers(0, 10, 4, dtype=np.uint8),
    }


@pytest.fixture
def files(arrays):
    return {
        TRAIN_IMAGES: idx(arrays["x_train"]),
        TRAIN_LABELS: idx(arrays["y_train"]),
        TEST_IMAGES: idx(arrays["x_test"]),
        TEST_LABELS: idx(arrays["y_test"]),
    }


def checksums_of(files):
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


@pytest.fixture
def served(tmp_path, files):
    """A folder that a web server on this machine serves, and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with serving(folder) as address:
        yield folder, address


def assert_nothing_kept(root):
    assert [path for path in root.rglob("*") if path.is_file()] == []


def assert_right(data, arrays, name):
    x = np.concatenate([arrays["x_train"], arrays["x_test"]]).reshape(10, 6)
    y = np.concatenate([arrays["y_train"], arrays["y_test"]])
    assert data.x.dtype == np.float32 and data.y.dtype == np.int32
    np.testing.assert_array_equal(data.x, x.astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(data.y, y)
    assert (data.num_classes, data.name, len(data)) == (10, name, 10)


# The data type


def make_data(n=20):
    rng = np.random.default_rng(1)
    x = rng.uniform(size=(n, 3)).astype(np.float32)
    return ImageData(x, np.arange(n, dtype=np.int32) % 4, 4, "toy")


def test_image_data_is_a_pytree():
    data = make_data()
    assert len(jax.tree.leaves(data)) == 2
    total = jax.jit(lambda data: data.x.sum() + data.num_classes)(data)
    np.testing.assert_allclose(total, data.x.sum() + 4, rtol=1e-6)


def test_image_data_selects():
    data = make_data()
    np.testing.assert_array_equal(data[5:7].x, data.x[5:7])
    np.testing.assert_array_equal(data[np.array([3, 1])].y, data.y[[3, 1]])
    np.testing.assert_array_equal(data[data.y == 2].y, 2)
    assert data[:3].name == "toy" and data[:3].num_classes == 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": np.zeros((20, 3))}, "`x` must be float32"),
        ({"x": np.zeros((20, 3, 1), np.float32)}, "`x` must be float32 of shape"),
        ({"x": np.zeros((19, 3), np.float32)}, "19 images but `y` has 20 labels"),
        ({"x": np.full((20, 3), 2, np.float32)}, "`x` must lie between 0 and 1"),
        ({"x": np.full((20, 3), np.nan, np.float32)}, "`x` must lie between 0 and 1"),
        ({"y": np.zeros(20)}, "`y` must be int32"),
        ({"y": np.full(20, 4, np.int32)}, "`y` must lie between 0 and 3"),
        ({"y": np.full(20, -1, np.int32)}, "`y` must lie between 0 and 3"),
    ],
)
def test_image_data_refuses(change, message):
    data = make_data()
    arguments = {"x": data.x, "y": data.y, "num_classes": 4, "name": "toy"} | change
    with pytest.raises(ValueError, match=message):
        ImageData(**arguments)


# Splits


def test_split_parts_are_disjoint_and_right():
    data = make_data(20)
    parts = split(data, (7, 5, 6), seed=3)
    assert [len(part) for part in parts] == [7, 5, 6]
    rows = np.concatenate([part.x for part in parts])
    assert len(np.unique(rows, axis=0)) == 18
    label_of = {row.tobytes(): label for row, label in zip(data.x, data.y, strict=True)}
    for part in parts:
        for row, label in zip(part.x, part.y, strict=True):
            assert label_of[row.tobytes()] == label


def test_split_follows_the_seed():
    data = make_data(20)
    first, again, other = (split(data, [20], seed)[0].x for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, data.x)


@pytest.mark.parametrize(
    "sizes, seed, message",
    [
        ((), 0, "`sizes` must be a sequence"),
        (5, 0, "`sizes` must be a sequence"),
        ((5, 0), 0, r"`sizes\[1\]` must be at least 1, got 0"),
        ((-1,), 0, r"`sizes\[0\]` must be at least 1, got -1"),
        ((0.5, 0.5), 0, r"`sizes\[0\]` must be an integer, got 0.5"),
        ((True,), 0, r"`sizes\[0\]` must be an integer, got True"),
        ((11, 10), 0, "`sizes` sum to 21, but toy has only 20"),
        ((5,), -1, "`seed` must be at least 0, got -1"),
        ((5,), 1.5, "`seed` must be an integer, got 1.5"),
    ],
)
def test_split_refuses(sizes, seed, message):
    with pytest.raises(ValueError, match=message):
        split(make_data(20), sizes, seed)


# Digits


def test_digits():
    data = load_digits()
    assert data.x.shape == (1797, 64) and data.name == "digits"
    assert data.x.min() == 0 and data.x.max() == 1
    # Grey levels are sixteenths, so no rounding happened.
    np.testing.assert_array_equal(data.x * 16, np.round(data.x * 16))
    assert np.bincount(data.y).min() >= 170 and data.num_classes == 10


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'metaopt-jax\[examples\]'"):
        load_digits()


# Four files: from a folder


@each_kind
def test_loader_from_npz(kind, tmp_path, arrays, monkeypatch):
    (tmp_path / kind.folder).mkdir()
    np.savez_compressed(tmp_path / kind.folder / kind.npz, **arrays)
    assert_right(kind.load(tmp_path, base_url=None), arrays, kind.name)
    assert_right(kind.load(str(tmp_path), base_url=None), arrays, kind.name)
    monkeypatch.setenv("METAOPT_DATA", str(tmp_path))
    assert_right(kind.load(base_url=None), arrays, kind.name)


@each_kind
def test_loader_absent_says_what_to_do(kind, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=f"Put `{kind.npz}` .*x_train.*METAOPT_DATA"):
        kind.load(tmp_path, base_url=None)
    monkeypatch.delenv("METAOPT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=rf"cache.metaopt.{kind.folder}"):
        kind.load(base_url=None)
    assert_nothing_kept(tmp_path)


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def _huge_header():
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "|u1", "fortran_order": False, "shape": (10**15, 1, 1)}
    )
    return stream.getvalue()


def _npz(arrays, **change):
    stream = io.BytesIO()
    np.savez_compressed(stream, **(arrays | change))
    return stream.getvalue()


def _npz_with_member(arrays, key, content):
    stream = io.BytesIO(_npz({k: v for k, v in arrays.items() if k != key}))
    with zipfile.ZipFile(stream, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{key}.npy", content)
    return stream.getvalue()


BAD_NPZ = {
    "empty": (lambda a: b"", "not a zip file"),
    "cut short": (lambda a: _npz(a)[:-30], "not a zip file"),
    "damaged": (
        lambda a: _npz(a)[:60] + bytes(b ^ 255 for b in _npz(a)[60:90]) + _npz(a)[90:],
        "cannot be read",
    ),
    "web page": (lambda a: b"<!DOCTYPE html><html></html>", "a web page"),
    "pickle": (lambda a: pickle.dumps(_Bomb()), "not a zip file"),
    "pickled array": (
        lambda a: _npz(a, y_test=np.array([_Bomb()] * 4, dtype=object)),
        "`y_test` holds pickled Python objects",
    ),
    "pickle as member": (
        lambda a: _npz_with_member(a, "x_test", pickle.dumps(_Bomb())),
        "cannot be read",
    ),
    "huge claim": (
        lambda a: _npz_with_member(a, "x_test", _huge_header()),
        "`x_test` claims shape",
    ),
    "bomb": (
        lambda a: _npz(a, x_train=np.zeros((90_000, 28, 28), np.uint8)),
        "`x_train` takes more than",
    ),
    "missing array": (
        lambda a: _npz({k: v for k, v in a.items() if k != "y_test"}),
        r"y_test\.npy",
    ),
    "wrong dtype": (
        lambda a: _npz(a, x_train=a["x_train"] / 255),
        "`x_train` should be uint8 with 3 axes, but is float64",
    ),
    "wrong axes": (
        lambda a: _npz(a, x_train=a["x_train"].reshape(6, 6)),
        "`x_train` should be uint8 with 3 axes",
    ),
    "counts": (
        lambda a: _npz(a, y_train=a["y_train"][:5]),
        "6 images but 5 labels in the training part",
    ),
    "sizes": (
        lambda a: _npz(a, x_test=a["x_test"].reshape(4, 6, 1)),
        r"training images of shape \(3, 2\) but test images of shape \(6, 1\)",
    ),
    "labels": (
        lambda a: _npz(a, y_test=np.full(4, 10, np.uint8)),
        "`y` must lie between 0 and 9",
    ),
}


@pytest.mark.parametrize("case", BAD_NPZ)
@each_kind
def test_loader_refuses_bad_npz(kind, case, tmp_path, arrays, monkeypatch):
    make, message = BAD_NPZ[case]
    (tmp_path / kind.folder).mkdir()
    path = tmp_path / kind.folder / kind.npz
    path.write_bytes(make(arrays))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        kind.load(tmp_path, base_url=None)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "exploded").exists()


# Four files: from the network


@each_kind
def test_loader_downloads_once(kind, tmp_path, served, files, arrays):
    folder, url = served
    root = tmp_path / "data"
    data = kind.load(root, base_url=url, checksums=checksums_of(files))
    assert_right(data, arrays, kind.name)
    kept = {path.name: path.read_bytes() for path in (root / kind.folder).iterdir()}
    assert kept == files
    for name in files:
        (folder / name).unlink()
    again = kind.load(root, base_url=url, checksums=checksums_of(files))
    assert_right(again, arrays, kind.name)


@each_kind
def test_loader_address_without_slash(kind, tmp_path, served, files, arrays):
    url = served[1].rstrip("/")
    assert_right(
        kind.load(tmp_path, base_url=url, checksums=checksums_of(files)), arrays, kind.name
    )


BAD_DOWNLOADS = {
    "not gzip": (TEST_IMAGES, lambda c: b"\0" * 50, "not a sound gzip file"),
    "gzip cut short": (TEST_LABELS, lambda c: c[:-9], "not a sound gzip file.*cut"),
    "gzip damaged": (
        TRAIN_IMAGES,
        lambda c: c[:-8] + bytes(b ^ 255 for b in c[-8:]),
        "not a sound gzip file",
    ),
    "wrong magic": (
        TRAIN_LABELS,
        lambda c: gzip.compress(b"\0\0\x0d\x01" + bytes(10)),
        "wrong magic number 00000d01, expected 00000801",
    ),
    "images as labels": (
        TRAIN_LABELS,
        lambda c: idx(np.zeros((6, 1, 1))),
        "wrong magic number 00000803, expected 00000801",
    ),
    "claims too much": (
        TEST_IMAGES,
        lambda c: gzip.compress(b"\0\0\x08\x03" + b"\x7f" * 12),
        "says it holds an array of shape",
    ),
    "trailing bytes": (
        TEST_LABELS,
        lambda c: gzip.compress(gzip.decompress(c) + b"\0"),
        "says it holds an array of shape",
    ),
    "empty": (TEST_LABELS, lambda c: gzip.compress(b""), "wrong magic number"),
    "bomb": (
        TRAIN_IMAGES,
        lambda c: gzip.compress(bytes(65 * 1024**2)),
        "unpacks to more than",
    ),
    "counts": (
        TEST_LABELS,
        lambda c: idx(np.zeros(5)),
        "4 images but 5 labels in the test part",
    ),
}


@pytest.mark.parametrize("case", BAD_DOWNLOADS)
@each_kind
def test_loader_refuses_bad_download(kind, case, tmp_path, served, files):
    name, change, message = BAD_DOWNLOADS[case]
    folder, url = served
    # The checksum agrees, so that what is tested is the next line of defence.
    bad = files | {name: change(files[name])}
    (folder / name).write_bytes(bad[name])
    root = tmp_path / "data"
    with pytest.raises(DataError, match=message):
        kind.load(root, base_url=url, checksums=checksums_of(bad))
    assert not root.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"something else", "damaged or another file.*SHA-256"),
        (b"\n<html><body>Sign in</body></html>", "web page, not the data.*SHA-256"),
    ],
)
@each_kind
def test_loader_checks_the_checksum(kind, content, message, tmp_path, served, files):
    folder, url = served
    (folder / TEST_LABELS).write_bytes(content)
    root = tmp_path / "data"
    with pytest.raises(DataError, match=message) as caught:
        kind.load(root, base_url=url, checksums=checksums_of(files))
    assert TEST_LABELS in str(caught.value) and "METAOPT_DATA" in str(caught.value)
    assert not root.exists()


@each_kind
def test_loader_missing_on_the_server(kind, tmp_path, served, files):
    folder, url = served
    (folder / TRAIN_LABELS).unlink()
    with pytest.raises(DataError, match=f"{TRAIN_LABELS} could not be downloaded.*404"):
        kind.load(tmp_path / "data", base_url=url, checksums=checksums_of(files))
    assert not (tmp_path / "data").exists()


@each_kind
def test_loader_no_server(kind, tmp_path):
    # Port 9 of this machine (discard) answers nobody.
    with pytest.raises(DataError, match=f"could not be downloaded.*Put `{kind.npz}`"):
        kind.load(tmp_path / "data", base_url="http://127.0.0.1:9/")
    assert not (tmp_path / "data").exists()


@each_kind
def test_loader_damaged_in_the_folder(kind, tmp_path, served, files):
    url = served[1]
    kind.load(tmp_path, base_url=url, checksums=checksums_of(files))
    path = tmp_path / kind.folder / TEST_IMAGES
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="SHA-256.*Delete it") as caught:
        kind.load(tmp_path, base_url=url, checksums=checksums_of(files))
    assert str(path) in str(caught.value)


@each_kind
def test_loader_checksums_must_be_complete(kind, tmp_path):
    with pytest.raises(ValueError, match=f"`checksums`.*{TRAIN_LABELS}"):
        kind.load(tmp_path, checksums={TRAIN_IMAGES: "0"})


def test_fetch_refuses_other_addresses(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    with pytest.raises(DataError, match="not an http or https address"):
        fetch((tmp_path / "file").as_uri(), "0", 100)


def test_fetch_has_a_size_cap(served):
    with pytest.raises(DataError, match="larger than the allowed 10 bytes"):
        fetch(served[1] + TRAIN_IMAGES, "0", 10)


def test_parse_idx_names_a_web_page():
    with pytest.raises(DataError, match="labels.gz is a web page"):
        parse_idx(b" <html>", 1, 100, "labels.gz")


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "sub" / "file", b"content")
    assert_nothing_kept(tmp_path)


def test_fashion_mnist_subset_says_that_it_is_one(tmp_path, arrays):
    folder = tmp_path / "fashion_mnist"
    folder.mkdir()
    np.savez_compressed(folder / "fashion_mnist_20k.npz", **arrays)
    data = load_fashion_mnist(tmp_path, base_url=None)
    assert_right(data, arrays, "Fashion-MNIST (20k subset)")
    # What is whole comes first.
    np.savez_compressed(folder / "fashion_mnist.npz", **arrays)
    data = load_fashion_mnist(tmp_path, base_url=None)
    assert_right(data, arrays, "Fashion-MNIST")


has_data = pytest.mark.skipif(
    "METAOPT_DATA" not in os.environ, reason="METAOPT_DATA names no folder with data"
)


@has_data
def test_real_mnist():
    data = load_mnist(base_url=None)
    assert data.x.shape == (70_000, 784)
    # The published counts of the official training and test parts.
    assert np.bincount(data[:60_000].y).tolist() == [
        *(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
    ]
    assert np.bincount(data[60_000:].y).tolist() == [
        *(980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)
    ]
    # The usual mean and deviation of the training part.
    assert abs(data[:60_000].x.mean(dtype=np.float64) - 0.1307) < 1e-4
    assert abs(data[:60_000].x.std(dtype=np.float64) - 0.3081) < 1e-4


@has_data
def test_real_fashion_mnist():
    data = load_fashion_mnist(base_url=None)
    subset = data.name == "Fashion-MNIST (20k subset)"
    train, test = (20_000, 5_000) if subset else (60_000, 10_000)
    assert data.x.shape == (train + test, 784)
    assert np.bincount(data[:train].y).tolist() == [train // 10] * 10
    assert np.bincount(data[train:].y).tolist() == [test // 10] * 10
    # The usual mean and deviation of the training part, and what a third of it may be off.
    bound = 2e-3 if subset else 1e-4
    assert abs(data[:train].x.mean(dtype=np.float64) - 0.2860) < bound
    assert abs(data[:train].x.std(dtype=np.float64) - 0.3530) < bound


# Proportions of classes


def labelled(counts: list[int]) -> ImageData:
    y = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    x = np.arange(len(y), dtype=np.float32)[:, None] / 1000  # tells the images apart
    return ImageData(x, y, len(counts), "labelled")


@pytest.mark.parametrize("seed", range(5))
def test_stratified_parts_have_the_proportions_of_the_whole(seed):
    counts = [300, 50, 7, 1]
    data = labelled(counts)
    parts = split(data, (100, 58, 200), seed, stratified=True)
    for part in parts:
        found = np.bincount(part.y, minlength=4)
        expected = len(part) * np.array(counts) / len(data)
        assert np.all(np.abs(found - expected) < 2)
    images = np.concatenate([part.x.ravel() for part in parts])
    assert len(np.unique(images)) == len(data)
    again = split(data, (100, 58, 200), seed, stratified=True)
    np.testing.assert_array_equal(again[1].x, parts[1].x)


@pytest.mark.parametrize("stratified", [False, True])
def test_folds_validate_each_image_once(stratified):
    data = labelled([30, 20, 3])
    folds = k_fold(data, 4, seed=0, stratified=stratified)
    assert [len(valid) for _, valid in folds] == [14, 13, 13, 13]
    for train, valid in folds:
        both = np.concatenate([train.x.ravel(), valid.x.ravel()])
        np.testing.assert_array_equal(np.sort(both), data.x.ravel())
        if stratified:
            assert np.all(np.abs(np.bincount(valid.y, minlength=2)[:2] - [7.5, 5]) < 2)
    valid = np.concatenate([valid.x.ravel() for _, valid in folds])
    np.testing.assert_array_equal(np.sort(valid), data.x.ravel())


@pytest.mark.parametrize("num_folds", [1, 54, 2.0, True])
def test_numbers_of_folds_that_do_not_fit_are_refused(num_folds):
    with pytest.raises(ValueError, match="`num_folds`"):
        k_fold(labelled([30, 20, 3]), num_folds, seed=0)
