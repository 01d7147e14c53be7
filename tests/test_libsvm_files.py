"""Data sets in LIBSVM's own text files: the same numbers, and a refusal of all others."""

import bz2
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from sklearn.datasets import dump_svmlight_file, load_svmlight_file

from metaopt.datasets import DataError, load_a9a, load_ijcnn1, load_sector
from metaopt.datasets._libsvm import content_checksum
from metaopt.datasets._sparse_data import SparseData


class Kind(NamedTuple):
    """One of the data sets, and what tells it from the others."""

    load: Callable[..., Any]
    folder: str
    files: tuple[str, str]
    num_columns: int
    labels: list[int]
    text: str  # the description of the files in the library


KINDS = [
    Kind(load_a9a, "a9a", ("a9a", "a9a.t"), 123, [-1, 1], "_tables._A9A_TEXT"),
    Kind(
        load_ijcnn1,
        "ijcnn1",
        ("ijcnn1.tr", "ijcnn1.val"),
        22,
        [-1, 1],
        "_tables._IJCNN1_TEXT",
    ),
    Kind(
        load_sector,
        "sector",
        ("sector.scale", "sector.t.scale"),
        55_197,
        list(range(1, 106)),
        "_sparse_sets._SECTOR_TEXT",
    ),
]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.folder)


def texts(kind: Kind) -> list[bytes]:
    random = np.random.default_rng(0)
    out = []
    for n in (6, 4):
        x = np.zeros((n, kind.num_columns))
        places = random.integers(0, kind.num_columns, (n, 5))
        np.put_along_axis(x, places, random.integers(1, 99, (n, 5)) / 100, axis=1)
        x[2] = 0
        stream = io.BytesIO()
        y = random.choice(kind.labels, n)
        dump_svmlight_file(x, y, stream, zero_based=False)
        out.append(stream.getvalue())
    return out


def kept(root: Path, kind: Kind, contents: list[bytes], suffix: str = "") -> dict[str, str]:
    """Put files into a data folder; their checksums."""
    (root / kind.folder).mkdir(parents=True, exist_ok=True)
    checksums = {}
    for name, content in zip(kind.files, contents):
        (root / kind.folder / f"{name}{suffix}").write_bytes(content)
        checksums[f"{name}{suffix}"] = hashlib.sha256(content).hexdigest()
    return checksums


@each_kind
@pytest.mark.parametrize("packed", [False, True])
def test_same_as_by_scikit_learn(kind, packed, tmp_path):
    contents = [bz2.compress(text) if packed else text for text in texts(kind)]
    checksums = kept(tmp_path, kind, contents, ".bz2" if packed else "")
    data = kind.load(tmp_path, checksums=checksums)
    files = [io.BytesIO(text) for text in texts(kind)]
    parts: Any = [load_svmlight_file(f, n_features=kind.num_columns) for f in files]
    x = np.concatenate([x.toarray() for x, _ in parts]).astype(np.float32)
    y = np.concatenate([y for _, y in parts])
    np.testing.assert_array_equal((data.dense() if kind is KINDS[2] else data).x, x)
    np.testing.assert_array_equal(np.array(kind.labels)[data.y], y)
    assert data.y.dtype == np.int32 and data.num_classes == len(kind.labels)


def rows(kind: Kind, root: Path) -> SparseData:
    """What a loader of sparse rows would return."""
    data = kind.load(root, checksums=kept(root, kind, texts(kind)))
    if isinstance(data, SparseData):
        return data
    row, column = np.nonzero(data.x)
    starts = np.searchsorted(row, np.arange(len(data) + 1)).astype(np.int32)
    sizes: Any = (kind.num_columns, data.num_classes, data.name)
    return SparseData(data.x[row, column], column.astype(np.int32), starts, data.y, *sizes)


@each_kind
def test_the_numbers_are_checked_by_default(kind, tmp_path, monkeypatch):
    expected = rows(kind, tmp_path)
    with pytest.raises(DataError, match="other numbers than those published") as caught:
        kind.load(tmp_path)
    for file in kind.files:
        assert str(tmp_path / kind.folder / file) in str(caught.value)
    module, _, name = f"metaopt.datasets.{kind.text}".rpartition(".")
    text = kind.load.__globals__[name]._replace(content=content_checksum(expected))
    monkeypatch.setattr(f"{module}.{name}", text)
    np.testing.assert_array_equal(kind.load(tmp_path).y, expected.y)
    # Written in other words, they are the same numbers.
    changed = [text.replace(b" 1:", b"   1:0") for text in texts(kind)]
    other = [text.replace(b"\n", b" \r\n") for text in changed]
    kept(tmp_path, kind, other)
    np.testing.assert_array_equal(kind.load(tmp_path).y, expected.y)


@each_kind
def test_the_archive_comes_first_and_both_files_are_needed(kind, tmp_path):
    kept(tmp_path, kind, texts(kind)[:1])
    with pytest.raises(
        DataError, match=f"Put .*, or `{kind.files[0]}.* and .*csie.ntu.edu"
    ):
        kind.load(tmp_path)
    kept(tmp_path, kind, texts(kind))
    archive = f"{kind.folder}_scale.npz" if kind is KINDS[2] else f"{kind.folder}.npz"
    (tmp_path / kind.folder / archive).write_bytes(b"damaged")
    with pytest.raises(DataError, match=rf"{archive} is damaged"):
        kind.load(tmp_path)


def test_checksums_of_files(tmp_path):
    kind = KINDS[0]
    checksums = kept(tmp_path, kind, texts(kind))
    with pytest.raises(ValueError, match="`checksums` must have an entry for a9a.t"):
        kind.load(tmp_path, checksums={"a9a": checksums["a9a"]})
    with pytest.raises(DataError, match="a9a.t is damaged or another file.*SHA-256"):
        kind.load(tmp_path, checksums=checksums | {"a9a.t": "0" * 64})


GOOD = b"+1 3:1 11:1 \n-1 5:1\n"
BAD = {
    "web page": (b"<html></html>", "is a web page"),
    "no colon": (b"1 3\n", "line 1 is no label with pairs"),
    "two colons": (b"1 3:1:1\n", "line 1 is no label with pairs"),
    "empty line": (b"1 3:1\n\n1 3:1\n", "line 2 is no label with pairs"),
    "value missing": (b"1 3: 4:1\n", "a value is missing"),
    "no number": (b"1 3:one\n", "could not convert"),
    "label in words": (b"one 3:1\n", "could not convert"),
    "column 0": (b"1 0:1\n", "whole numbers from 1 to 123"),
    "column 124": (b"1 124:1\n", "whole numbers from 1 to 123"),
    "half a column": (b"1 1.5:1\n", "whole numbers from 1 to 123"),
    "columns out of order": (b"1 4:1 3:1\n", "`columns` must increase"),
    "column twice": (b"1 4:1 4:1\n", "`columns` must increase"),
    "infinite": (b"1 4:inf\n", "`values` holds infinite"),
    "not a number": (b"1 4:nan\n", "`values` holds infinite or NaN"),
    "another label": (b"0 4:1\n", "labels should be one of 2 numbers from -1 to 1"),
    "label not a number": (b"nan 4:1\n", "labels should be one of 2"),
    "not ASCII": (b"1 4:1\xff\n", "codec can't decode"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_texts_are_refused(case, tmp_path):
    content, message = BAD[case]
    checksums = kept(tmp_path, KINDS[0], [GOOD, content])
    with pytest.raises(DataError, match=message) as caught:
        load_a9a(tmp_path, checksums=checksums)
    assert str(tmp_path / "a9a" / "a9a.t") in str(caught.value)


BAD_PACKED = {
    "not packed": (GOOD, "cannot be read"),
    "cut short": (bz2.compress(GOOD)[:-5], "cut short"),
    "damaged": (bz2.compress(GOOD)[:20] + bytes(20), "cannot be read"),
    "bomb": (bz2.compress(bytes(2**26 + 1)), "unpacks to more than"),
}


@pytest.mark.parametrize("case", BAD_PACKED)
def test_bad_packed_texts_are_refused(case, tmp_path):
    content, message = BAD_PACKED[case]
    checksums = kept(tmp_path, KINDS[0], [bz2.compress(GOOD), content], ".bz2")
    with pytest.raises(DataError, match=message) as caught:
        load_a9a(tmp_path, checksums=checksums)
    assert str(tmp_path / "a9a" / "a9a.t.bz2") in str(caught.value)
