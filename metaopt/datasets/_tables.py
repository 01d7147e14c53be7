"""Tables of numbers, from a folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from .._core._files import DataError
from ._checked_files import Expected, joined, NpzSet, read_npz_set
from ._libsvm import LIBSVM_URL, LibsvmText, read_libsvm
from ._table_data import TableData


_SIGNS = Expected(np.int8, (None,), -1, 1)

_A9A = NpzSet(
    name="a9a",
    folder="a9a",
    file="a9a.npz",
    sha256="cc8995937bdd0ab90acdb33934a5845f7c5645afd37ad5f747418399987afe02",
    arrays=MappingProxyType(
        {
            "x_train": Expected(np.uint8, (None, 123), 0, 1),
            "y_train": _SIGNS,
            "x_test": Expected(np.uint8, (None, 123), 0, 1),
            "y_test": _SIGNS,
        }
    ),
    or_else=f", or `a9a` and `a9a.t` of {LIBSVM_URL}binary/,",
)
_A9A_TEXT = LibsvmText(
    ("a9a", "a9a.t"),
    range(-1, 3, 2),
    123,
    "4c155d8acc76b06eb37393d917590db59db3e58e52dc455577ec0d9d6f2756d0",
)

_IJCNN1 = NpzSet(
    name="ijcnn1",
    folder="ijcnn1",
    file="ijcnn1.npz",
    sha256="591ddc3bc78c5173ebdf649678ecb8d3d7a31ae6d28088483dcb3842fc6bd56c",
    arrays=MappingProxyType({"x": Expected(np.float32, (None, 22)), "y": _SIGNS}),
    or_else=(f", or `ijcnn1.tr.bz2` and `ijcnn1.val.bz2` of {LIBSVM_URL}binary/,"),
)
_IJCNN1_TEXT = LibsvmText(
    ("ijcnn1.tr", "ijcnn1.val"),
    range(-1, 3, 2),
    22,
    "8744a4907b970423f8bb65939a21cdd0ae17f24c20d50815eda30c98eac7ed5b",
)

_COVERTYPE_SUBSET = NpzSet(
    name="Covertype (first 15,120 rows)",
    folder="covtype_15k",
    file="covtype_15k.npz",
    sha256="7a62ac83f638751b3cd455995aa7f7bedea7d450799bbe362bb73042374ca9ff",
    arrays=MappingProxyType(
        {"x": Expected(np.int16, (None, 54)), "y": Expected(np.uint8, (None,), 0, 6)}
    ),
)


def load_a9a(
    root: str | os.PathLike | None = None,
    *,
    checksums: Mapping[str, str] | None = None,
) -> TableData:
    """a9a: 48,842 people of the Adult census data by 123 binary features, as LIBSVM's
    authors have made them.

    Whether a person earns more than 50,000 dollars a year, which is true of some 24 % and
    which a linear classifier gets right for 85 % of the test part.

    Looks in `root` for `a9a/a9a.npz`, then for LIBSVM's own files, `a9a/a9a` and
    `a9a/a9a.t`. Nothing is downloaded.

    **Arguments:**

    - `root`: the folder that has a subfolder `a9a`. By default the folder named by the
        environment variable `METAOPT_DATA`, else `metaopt` in the user's cache folder.
    - `checksums`: the SHA-256 of each file, by its name, if they are others. By default
        the numbers in text files are checked, not the files.

    **Returns:**

    [`metaopt.datasets.TableData`][] with `x` of shape `(48842, 123)`, zeros and ones, in
    the original order: the first 32,561 rows are the official training part, the others
    the official test part. Class 1 is +1 in LIBSVM's files, class 0 is -1.

    **Raises:**

    [`metaopt.datasets.DataError`][] naming the file and the reason.
    """
    rows = read_libsvm(_A9A_TEXT, _A9A, root, checksums)
    if rows is not None:
        return rows.dense()
    path, arrays = read_npz_set(_A9A, root, checksums)
    x, y = joined(path, arrays, "x"), joined(path, arrays, "y")
    return _as_table(path, x, _from_signs(path, y), 2, _A9A.name)


def load_ijcnn1(
    root: str | os.PathLike | None = None,
    *,
    checksums: Mapping[str, str] | None = None,
) -> TableData:
    """ijcnn1: 49,990 steps of a time series by 22 features, whose rare class is 9.7 % of
    them (Prokhorov, 2001; features by Chang and Lin).

    For problems with classes of unequal size. A linear classifier is right for 93 %; to
    say class 0 always is right for 90 %.

    Looks in `root` for `ijcnn1/ijcnn1.npz`, then for LIBSVM's own files,
    `ijcnn1/ijcnn1.tr` and `ijcnn1/ijcnn1.val`, or the same with `.bz2`. Nothing is
    downloaded.

    **Arguments:**

    - `root`: the folder that has a subfolder `ijcnn1`. By default the folder named by the
        environment variable `METAOPT_DATA`, else `metaopt` in the user's cache folder.
    - `checksums`: the SHA-256 of each file, by its name, if they are others. By default
        the numbers in text files are checked, not the files.

    **Returns:**

    [`metaopt.datasets.TableData`][] with `x` of shape `(49990, 22)`. The first 35,000 rows
    are LIBSVM's `ijcnn1.tr`, the others its `ijcnn1.val`; its test file of 91,701 rows is
    not among them. Class 1 is +1 in LIBSVM's files, class 0 is -1.

    **Raises:**

    [`metaopt.datasets.DataError`][] naming the file and the reason.
    """
    rows = read_libsvm(_IJCNN1_TEXT, _IJCNN1, root, checksums)
    if rows is not None:
        return rows.dense()
    path, arrays = read_npz_set(_IJCNN1, root, checksums)
    y = _from_signs(path, arrays["y"])
    return _as_table(path, arrays["x"], y, 2, _IJCNN1.name)


def load_covertype_subset(
    root: str | os.PathLike | None = None,
    *,
    checksums: Mapping[str, str] | None = None,
) -> TableData:
    """The first 15,120 of the 581,012 rows of Covertype: seven kinds of forest by 54
    features of the land (Blackard, 1998).

    Ten features are measured, in units from degrees to metres: bring them to one scale by
    `data.standardized(train)`. The others are zeros and ones. After that a linear
    classifier is right for some 71 % of the validation part.

    Looks for `covtype_15k/covtype_15k.npz` in `root`. Nothing is downloaded.

    **Arguments:**

    - `root`: the folder that has a subfolder `covtype_15k`. By default the folder named by
        the environment variable `METAOPT_DATA`, else `metaopt` in the user's cache folder.
    - `checksums`: the SHA-256 of the file, by its name, if it is another one.

    **Returns:**

    [`metaopt.datasets.TableData`][] with `x` of shape `(15120, 54)` and 7 classes, in the
    original order: the first 11,340 rows are the training records, 1,620 a class, the
    others the validation records, 540 a class. The test records are not among them.

    **Raises:**

    [`metaopt.datasets.DataError`][] naming the file and the reason.
    """
    path, arrays = read_npz_set(_COVERTYPE_SUBSET, root, checksums)
    return _as_table(path, arrays["x"], arrays["y"], 7, _COVERTYPE_SUBSET.name)


def _from_signs(path: Path, y: np.ndarray) -> np.ndarray:
    """Classes 0 and 1 for -1 and +1."""
    if np.any(y == 0):
        raise DataError(
            f"{path} is not as expected: labels should be -1 or 1, but one is 0."
        )
    return y > 0


def _as_table(
    path: Path, x: np.ndarray, y: np.ndarray, num_classes: int, name: str
) -> TableData:
    try:
        return TableData(x.astype(np.float32), y.astype(np.int32), num_classes, name)
    except ValueError as error:
        raise DataError(f"{path} is not as expected: {error}") from error
