"""Data sets in checked files: right numbers, and a refusal of all other files."""

import gzip
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from metaopt.datasets import (
    DataError,
    load_a9a,
    load_cifar10_subset,
    load_covertype_subset,
    load_ijcnn1,
    load_newsgroups,
    load_sector,
    load_wikitext2_parts,
)


# Stand-ins of the same structure


def images(random: np.random.Generator) -> dict[str, np.ndarray]:
    pixels = lambda n: random.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    label = lambda n: random.integers(0, 10, n, dtype=np.uint8)
    train = {"x_train": pixels(6), "y_train": label(6)}
    return train | {"x_test": pixels(4), "y_test": label(4)}


def signs(random: np.random.Generator, n: int) -> np.ndarray:
    return random.choice(np.array([-1, 1], np.int8), n)


def binary(random: np.random.Generator) -> dict[str, np.ndarray]:
    bits = lambda n: random.integers(0, 2, (n, 123), dtype=np.uint8)
    train = {"x_train": bits(6), "y_train": signs(random, 6)}
    return train | {"x_test": bits(4), "y_test": signs(random, 4)}


def series(random: np.random.Generator) -> dict[str, np.ndarray]:
    return {"x": random.normal(size=(10, 22)).astype(np.float32), "y": signs(random, 10)}


def land(random: np.random.Generator) -> dict[str, np.ndarray]:
    x = random.integers(-200, 7000, (10, 54), dtype=np.int16)
    return {"x": x, "y": random.integers(0, 7, 10, dtype=np.uint8)}


def texts(dtype: type, num_columns: int, num_classes: int) -> Callable[..., dict]:
    def make(random: np.random.Generator) -> dict[str, np.ndarray]:
        out = {}
        for part, n in (("train", 6), ("test", 4)):
            lengths = random.integers(0, 5, n)
            chosen = [random.choice(num_columns, k, replace=False) for k in lengths]
            places = [np.sort(row) for row in chosen]
            stored = random.integers(1, 9, lengths.sum())
            out[f"{part}_data"] = stored.astype(dtype)
            out[f"{part}_indices"] = np.concatenate(places).astype(np.uint16)
            out[f"{part}_indptr"] = np.append(0, np.cumsum(lengths)).astype(np.int32)
            out[f"{part}_y"] = random.integers(0, num_classes, n, dtype=np.uint8)
        return out

    return make


class Kind(NamedTuple):
    """One of the data sets, and what tells it from the others."""

    load: Callable[..., Any]
    folder: str
    file: str
    make: Callable[..., dict[str, np.ndarray]]
    num_classes: int
    key: str  # one of its arrays


KINDS = [
    Kind(load_cifar10_subset, "cifar10_small", "cifar10_5k.npz", images, 10, "x_train"),
    Kind(load_a9a, "a9a", "a9a.npz", binary, 2, "x_train"),
    Kind(load_ijcnn1, "ijcnn1", "ijcnn1.npz", series, 2, "x"),
    Kind(load_covertype_subset, "covtype_15k", "covtype_15k.npz", land, 7, "x"),
    Kind(
        load_newsgroups,
        "newsgroups20",
        "newsgroups20_counts.npz",
        texts(np.uint16, 16_158, 20),
        20,
        "train_data",
    ),
    Kind(
        load_sector,
        "sector",
        "sector_scale.npz",
        texts(np.float32, 55_197, 105),
        105,
        "train_data",
    ),
]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.folder)


def packed(arrays: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def arrays_of(kind: Kind) -> dict[str, np.ndarray]:
    return kind.make(np.random.default_rng(0))


def checksums_of(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def kept(root: Path, kind: Kind, content: bytes) -> dict[str, str]:
    """Put a file into a data folder; its checksum."""
    (root / kind.folder).mkdir(parents=True, exist_ok=True)
    (root / kind.folder / kind.file).write_bytes(content)
    return checksums_of({kind.file: content})


# Numbers


def both(arrays: dict[str, np.ndarray], kind: str) -> np.ndarray:
    return np.concatenate([arrays[f"{kind}_train"], arrays[f"{kind}_test"]])


@each_kind
def test_labels_classes_and_name(kind, tmp_path, monkeypatch):
    arrays = arrays_of(kind)
    checksums = kept(tmp_path, kind, packed(arrays))
    data = kind.load(tmp_path, checksums=checksums)
    keys = [key for key in arrays if key.startswith("y") or key.endswith("_y")]
    expected = np.concatenate([arrays[key] for key in keys]).astype(int)
    expected = expected > 0 if kind.num_classes == 2 else expected
    np.testing.assert_array_equal(data.y, expected)
    assert data.y.dtype == np.int32 and len(data) == 10
    assert data.num_classes == kind.num_classes and data.name
    # Folders can be named in three ways.
    monkeypatch.setenv("METAOPT_DATA", str(tmp_path))
    for root in (str(tmp_path), None):
        again = kind.load(root, checksums=checksums)
        np.testing.assert_array_equal(again.y, data.y)


def loaded(kind: Kind, root: Path) -> tuple[Any, dict[str, np.ndarray]]:
    arrays = arrays_of(kind)
    return kind.load(root, checksums=kept(root, kind, packed(arrays))), arrays


def test_images(tmp_path):
    data, arrays = loaded(KINDS[0], tmp_path)
    assert data.x.dtype == np.float32 and data.x.shape == (10, 3072)
    expected = both(arrays, "x").astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(data.x.reshape(-1, 32, 32, 3), expected)
    assert "subset" in data.name


def test_tables(tmp_path):
    data, arrays = loaded(KINDS[1], tmp_path)
    assert data.x.dtype == np.float32
    np.testing.assert_array_equal(data.x, both(arrays, "x"))
    for kind in KINDS[2:4]:
        data, arrays = loaded(kind, tmp_path)
        assert data.x.dtype == np.float32
        np.testing.assert_array_equal(data.x, arrays["x"])


@pytest.mark.parametrize("kind", KINDS[4:], ids=lambda kind: kind.folder)
def test_sparse_rows(kind, tmp_path):
    data, arrays = loaded(kind, tmp_path)
    expected = np.zeros((10, data.num_columns))
    for part, first in (("train", 0), ("test", 6)):
        starts = arrays[f"{part}_indptr"]
        for row, (begin, end) in enumerate(zip(starts, starts[1:])):
            places = arrays[f"{part}_indices"][begin:end]
            expected[first + row, places] = arrays[f"{part}_data"][begin:end]
    assert (data.values.dtype, data.columns.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(data.dense().x, expected)


# Refusals


@each_kind
def test_absent_says_what_to_do(kind, tmp_path, monkeypatch):
    message = f"Put `{kind.file}` .arrays .*{kind.key}.*`{kind.folder}`.*METAOPT_DATA"
    with pytest.raises(DataError, match=message):
        kind.load(tmp_path)
    monkeypatch.delenv("METAOPT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=rf"cache.metaopt.{kind.folder}"):
        kind.load()
    assert list(tmp_path.iterdir()) == []


@each_kind
@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "damaged or another file.*SHA-256"),
        (b"<html></html>", "a web page.*SHA-256"),
        (packed({"x": np.zeros(3)}), "damaged or another file.*SHA-256"),
    ],
    ids=["empty", "web page", "another"],
)
def test_published_checksum_is_the_default(kind, content, message, tmp_path):
    kept(tmp_path, kind, content)
    with pytest.raises(DataError, match=message) as caught:
        kind.load(tmp_path)
    assert str(tmp_path / kind.folder / kind.file) in str(caught.value)
    # The file is the user's: it is left alone.
    assert (tmp_path / kind.folder / kind.file).read_bytes() == content


@each_kind
def test_checksums_must_be_complete(kind, tmp_path):
    with pytest.raises(ValueError, match=f"`checksums` must have an entry for {kind.file}"):
        kind.load(tmp_path, checksums={"other.npz": "0"})


def unlike(kind: Kind, change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    arrays = arrays_of(kind)
    return packed(arrays | {kind.key: change(arrays[kind.key])})


# The checksum agrees, so that what is tested is the next line of defence.
BAD: dict[str, tuple[Callable[[Kind], bytes], str]] = {
    "no archive": (lambda kind: b"text", "cannot be read.*not a zip file"),
    "cut short": (lambda kind: packed(arrays_of(kind))[:-30], "not a zip file"),
    "array missing": (
        lambda kind: packed({k: a for k, a in arrays_of(kind).items() if k != kind.key}),
        r"\.npy",
    ),
    "dtype": (
        lambda kind: unlike(kind, lambda a: a.astype(np.float64)),
        "should be .* of shape .*n.*, but is float64",
    ),
    "axes": (lambda kind: unlike(kind, lambda a: a[None]), "should be .* of shape"),
    "pickled": (
        lambda kind: unlike(kind, lambda a: np.array([None] * 3, object)),
        "pickled Python objects",
    ),
    "too large": (
        lambda kind: unlike(kind, lambda a: np.zeros(2**26 + 1, np.uint8)),
        "takes more than",
    ),
    "fewer rows": (
        lambda kind: unlike(kind, lambda a: a[:-1]),
        "is not as expected: .*(5 rows|9 rows|must rise from|`columns` has)",
    ),
}


@each_kind
@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused(case, kind, tmp_path):
    make, message = BAD[case]
    checksums = kept(tmp_path, kind, make(kind))
    with pytest.raises(DataError, match=message) as caught:
        kind.load(tmp_path, checksums=checksums)
    assert str(tmp_path / kind.folder / kind.file) in str(caught.value)


BAD_VALUES: list[tuple[int, dict[str, np.ndarray], str]] = [
    (0, {"y_test": np.full(4, 10, np.uint8)}, "`y_test` should lie between 0 and 9"),
    (0, {"y_test": np.zeros(3, np.uint8)}, "4 rows in `x_test` but 3 labels in `y_test`"),
    (0, {"x_test": np.zeros((4, 32, 31, 3), np.uint8)}, r"shape \(n, 32, 32, 3\), but"),
    (1, {"x_test": np.full((4, 123), 2, np.uint8)}, "`x_test` should lie between 0 and 1"),
    (1, {"y_test": np.full(4, 2, np.int8)}, "`y_test` should lie between -1 and 1"),
    (1, {"y_test": np.zeros(4, np.int8)}, "labels should be -1 or 1, but one is 0"),
    (2, {"x": np.full((10, 22), np.nan, np.float32)}, "`x` should lie between .*nan"),
    (2, {"x": np.full((10, 22), np.inf, np.float32)}, "`x` holds infinite"),
    (3, {"y": np.full(10, 7, np.uint8)}, "`y` should lie between 0 and 6"),
    (4, {"train_indptr": np.arange(7, dtype=np.int32)[::-1]}, "`starts` must rise"),
    (4, {"test_indptr": np.zeros(5, np.int32)}, "`starts` must rise"),
    (4, {"train_y": np.zeros(5, np.uint8)}, "`starts` must have 6 entries"),
    (4, {"train_indptr": np.zeros(0, np.int32)}, "`starts` must have 7 entries"),
    (5, {"test_indices": np.full(2, 55_197, np.uint16)}, "should lie between 0 and 55196"),
    (5, {"test_indices": np.zeros(1, np.uint16)}, "`columns` has 1 entries"),
    (5, {"train_y": np.full(6, 105, np.uint8)}, "`train_y` should lie between 0 and 104"),
]


@pytest.mark.parametrize("number, change, message", BAD_VALUES)
def test_bad_values_are_refused(number, change, message, tmp_path):
    kind = KINDS[number]
    checksums = kept(tmp_path, kind, packed(arrays_of(kind) | change))
    with pytest.raises(DataError, match=message):
        kind.load(tmp_path, checksums=checksums)


def test_large_files_are_refused(tmp_path, monkeypatch):
    kind = KINDS[2]
    checksums = kept(tmp_path, kind, packed(arrays_of(kind)))
    monkeypatch.setattr(
        "metaopt.datasets._tables._IJCNN1",
        load_ijcnn1.__globals__["_IJCNN1"]._replace(max_packed=10),
    )
    with pytest.raises(DataError, match="larger than the allowed 10 bytes"):
        load_ijcnn1(tmp_path, checksums=checksums)


# Text


VALID, TEST = "wikitext2.valid.tokens.gz", "wikitext2.test.tokens.gz"
TEXTS = {
    VALID: " \n = A lobster = \n \n the lobster is the <unk> \n",
    TEST: " \n the whale is a lobster \n",
}


def kept_texts(root: Path, change: dict[str, bytes] | None = None) -> dict[str, str]:
    files = {name: gzip.compress(text.encode()) for name, text in TEXTS.items()}
    files |= change or {}
    (root / "text").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / "text" / name).write_bytes(content)
    return checksums_of(files)


def test_words(tmp_path):
    valid, test = load_wikitext2_parts(tmp_path, checksums=kept_texts(tmp_path))
    # The most frequent first; of equals, in the order of the alphabet.
    words = ("<eos>", "=", "lobster", "the", "<unk>", "A", "is")
    assert valid.vocabulary == test.vocabulary == words
    assert valid.text() == "\n= A lobster =\n\nthe lobster is the <unk>\n"
    assert test.text() == "\nthe <unk> is <unk> lobster\n"
    # Words and line ends.
    assert (len(valid), len(test)) == (4 + 5 + 4, 5 + 2)
    small, _ = load_wikitext2_parts(
        tmp_path, max_vocabulary=4, checksums=kept_texts(tmp_path)
    )
    assert small.vocabulary == ("<eos>", "=", "lobster", "<unk>")
    assert small.text() == "\n= <unk> lobster =\n\n<unk> lobster <unk> <unk> <unk>\n"


def test_absent_words_say_what_to_do(tmp_path):
    checksums = kept_texts(tmp_path)
    (tmp_path / "text" / TEST).unlink()
    with pytest.raises(DataError, match=f"Put `{TEST}` .*packed by gzip.*METAOPT_DATA"):
        load_wikitext2_parts(tmp_path, checksums=checksums)
    with pytest.raises(ValueError, match=f"`checksums` must have an entry for {TEST}"):
        load_wikitext2_parts(tmp_path, checksums={VALID: checksums[VALID]})


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no words"),
        (b"text", "cannot be read"),
        (gzip.compress(b"some words")[:-9], "cannot be read"),
        (gzip.compress(b"\xff\xfe"), "is not as expected"),
        (gzip.compress(bytes(2**24 + 1)), "unpacks to more than"),
    ],
    ids=["empty", "not packed", "cut short", "not UTF-8", "bomb"],
)
def test_bad_words_are_refused(content, message, tmp_path):
    checksums = kept_texts(tmp_path, {TEST: content})
    with pytest.raises(DataError, match=message) as caught:
        load_wikitext2_parts(tmp_path, checksums=checksums)
    assert str(tmp_path / "text" / TEST) in str(caught.value)
    with pytest.raises(DataError, match="another file.*SHA-256"):
        load_wikitext2_parts(tmp_path)


# The data themselves


def real(kind: str) -> Any:
    folder = Path(os.environ.get("METAOPT_DATA", "")) / kind
    missing = "METAOPT_DATA" not in os.environ or not folder.is_dir()
    return pytest.mark.skipif(missing, reason=f"METAOPT_DATA has no folder {kind}")


@real("cifar10_small")
def test_real_cifar10_subset():
    data = load_cifar10_subset()
    assert data.x.shape == (5000, 3072)
    assert np.bincount(data.y[:4000]).tolist() == [400] * 10
    assert np.bincount(data.y[4000:]).tolist() == [100] * 10
    # The mean of the whole of CIFAR-10, and what a part of it may be off.
    colours = data.x.reshape(-1, 3).mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(colours, [0.4914, 0.4822, 0.4465], atol=0.01)


@real("a9a")
def test_real_a9a():
    data = load_a9a()
    assert data.x.shape == (48_842, 123)
    assert data.y[:32_561].sum() == 7841 and data.y[32_561:].sum() == 3846
    assert data.x[:32_561].sum(dtype=np.float64) == 451_592


@real("ijcnn1")
def test_real_ijcnn1():
    data = load_ijcnn1()
    assert data.x.shape == (49_990, 22)
    assert abs(data.y.mean() - 0.097) < 5e-4
    # One of the first ten columns is 1: the time modulo 10.
    np.testing.assert_array_equal(data.x[:, :10].sum(axis=1), 1)


@real("covtype_15k")
def test_real_covertype_subset():
    data = load_covertype_subset()
    assert data.x.shape == (15_120, 54)
    assert np.bincount(data.y[:11_340]).tolist() == [1620] * 7
    assert np.bincount(data.y[11_340:]).tolist() == [540] * 7
    # Of four kinds of wilderness and of 40 kinds of soil, each row has one.
    np.testing.assert_array_equal(data.x[:, 10:14].sum(axis=1), 1)
    np.testing.assert_array_equal(data.x[:, 14:].sum(axis=1), 1)


@real("newsgroups20")
def test_real_newsgroups():
    data = load_newsgroups()
    assert (len(data), data.num_columns, data.num_classes) == (18_846, 16_158, 20)
    assert (np.diff(data.starts) == 0).sum() == 544
    assert np.bincount(data.y[:11_314]).min() == 377


@real("sector")
def test_real_sector():
    data = load_sector()
    assert (len(data), data.num_columns, data.num_classes) == (9619, 55_197, 105)
    assert np.bincount(data.y[:6412]).min() == 10 and np.bincount(data.y[6412:]).min() == 3
    indices, values = data.padded_rows(500)
    norms = np.linalg.norm(values, axis=1)
    # Five decimals are in LIBSVM's files.
    np.testing.assert_allclose(norms[np.diff(data.starts) <= 500], 1, atol=1e-4)


@real("text")
def test_real_wikitext2_parts():
    valid, test = load_wikitext2_parts()
    assert (len(valid), len(test)) == (217_646, 245_569)
    assert len(valid.vocabulary) == 13_777
    assert load_wikitext2_parts(max_vocabulary=2000)[1].tokens.max() == 1999
