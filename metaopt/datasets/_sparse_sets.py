"""Texts as counts of words, from a folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from .._core._files import DataError
from ._checked_files import Expected, NpzSet, read_npz_set
from ._libsvm import LIBSVM_URL, LibsvmText, read_libsvm
from ._sparse_data import SparseData


def _csr_arrays(
    dtype: type, num_columns: int, num_classes: int
) -> MappingProxyType[str, Expected]:
    """The arrays of both parts, each in the CSR format."""
    form = {
        "data": Expected(dtype, (None,)),
        "indices": Expected(np.uint16, (None,), 0, num_columns - 1),
        "indptr": Expected(np.int32, (None,), 0),
        "y": Expected(np.uint8, (None,), 0, num_classes - 1),
    }
    return MappingProxyType(
        {f"{part}_{key}": form[key] for part in ("train", "test") for key in form}
    )


_NEWSGROUPS_COLUMNS, _NEWSGROUPS_CLASSES = 16_158, 20
_SECTOR_COLUMNS, _SECTOR_CLASSES = 55_197, 105

_NEWSGROUPS = NpzSet(
    name="20 Newsgroups",
    folder="newsgroups20",
    file="newsgroups20_counts.npz",
    sha256="592cb8c75d58a5961490d98aa95f073e63b0c8f7ec38f7790c5ae4606b204958",
    arrays=_csr_arrays(np.uint16, _NEWSGROUPS_COLUMNS, _NEWSGROUPS_CLASSES),
)

_SECTOR = NpzSet(
    name="sector",
    folder="sector",
    file="sector_scale.npz",
    sha256="3a7e61b5069a4fe196f854329db295dc9b6ba6504b5edfbdb3780861b848737d",
    arrays=_csr_arrays(np.float32, _SECTOR_COLUMNS, _SECTOR_CLASSES),
    or_else=(
        f", or `sector.scale.bz2` and `sector.t.scale.bz2` of {LIBSVM_URL}"
        "multiclass/sector/,"
    ),
)
_SECTOR_TEXT = LibsvmText(
    ("sector.scale", "sector.t.scale"),
    range(1, 106),
    _SECTOR_COLUMNS,
    "71688c63c46efd0f299bc800faf4a942c58cf99be86fa1a47299db1785519079",
)


def load_newsgroups(
    root: str | os.PathLike | None = None,
    *,
    checksums: Mapping[str, str] | None = None,
) -> SparseData:
    """20 Newsgroups (Lang, 1995), by date: the counts of 16,158 words in 18,846 messages.

    Headers, footers and quotations are left out, and words that fewer than five training
    messages have. Few messages have huge counts, which `data.tf_idf(train,
    sublinear=True)` tames; a linear classifier is then right for some 68 % of the test
    part. Rows are sorted by class: [`metaopt.datasets.split`][] shuffles them.

    Looks for `newsgroups20/newsgroups20_counts.npz` in `root`. Nothing is downloaded.

    **Arguments:**

    - `root`: the folder that has a subfolder `newsgroups20`. By default the folder named by
        the environment variable `METAOPT_DATA`, else `metaopt` in the user's cache folder.
    - `checksums`: the SHA-256 of the file, by its name, if it is another one.

    **Returns:**

    [`metaopt.datasets.SparseData`][] of 18,846 rows, 16,158 columns and 20 classes. The
    first 11,314 rows are the official training part, the others the official test part;
    544 rows are empty.

    **Raises:**

    [`metaopt.datasets.DataError`][] naming the file and the reason.
    """
    path, arrays = read_npz_set(_NEWSGROUPS, root, checksums)
    sizes = _NEWSGROUPS_COLUMNS, _NEWSGROUPS_CLASSES
    return _as_sparse(path, arrays, *sizes, _NEWSGROUPS.name)


def load_sector(
    root: str | os.PathLike | None = None,
    *,
    checksums: Mapping[str, str] | None = None,
) -> SparseData:
    """sector: 9,619 pages of companies in 105 sectors of industry, by 55,197 words, as
    LIBSVM's authors have scaled them (McCallum and Nigam, 1998).

    For many classes with few examples each: at least 10 training and 3 test rows a class.
    Values are tf-idf weights, and every row has the Euclidean norm 1. All columns as a
    table would take 2.1 GB: `data.dense(data.most_frequent(5000))` takes 0.2, and
    `data.padded_rows(500)` keeps most of all rows in 40 MB.

    Looks in `root` for `sector/sector_scale.npz`, then for LIBSVM's own files,
    `sector/sector.scale` and `sector/sector.t.scale`, or the same with `.bz2`. Nothing is
    downloaded.

    **Arguments:**

    - `root`: the folder that has a subfolder `sector`. By default the folder named by the
        environment variable `METAOPT_DATA`, else `metaopt` in the user's cache folder.
    - `checksums`: the SHA-256 of each file, by its name, if they are others. By default
        the numbers in text files are checked, not the files.

    **Returns:**

    [`metaopt.datasets.SparseData`][] of 9,619 rows, 55,197 columns and 105 classes. The
    first 6,412 rows are the official training part, the others the official test part.

    **Raises:**

    [`metaopt.datasets.DataError`][] naming the file and the reason.
    """
    rows = read_libsvm(_SECTOR_TEXT, _SECTOR, root, checksums)
    if rows is not None:
        return rows
    path, arrays = read_npz_set(_SECTOR, root, checksums)
    return _as_sparse(path, arrays, _SECTOR_COLUMNS, _SECTOR_CLASSES, _SECTOR.name)


def _as_sparse(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    num_columns: int,
    num_classes: int,
    name: str,
) -> SparseData:
    """The rows of the training part, followed by those of the test part."""

    def part(which: str) -> SparseData:
        return SparseData(
            arrays[f"{which}_data"].astype(np.float32),
            arrays[f"{which}_indices"].astype(np.int32),
            arrays[f"{which}_indptr"],
            arrays[f"{which}_y"].astype(np.int32),
            num_columns,
            num_classes,
            name,
        )

    try:
        train, test = part("train"), part("test")
    except ValueError as error:
        raise DataError(f"{path} is not as expected: {error}") from error
    return SparseData(
        np.concatenate([train.values, test.values]),
        np.concatenate([train.columns, test.columns]),
        np.concatenate([train.starts, test.starts[1:] + train.starts[-1]]),
        np.concatenate([train.y, test.y]),
        num_columns,
        num_classes,
        name,
    )
