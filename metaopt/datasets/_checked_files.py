"""Files of data sets that are looked for in a folder, and checked."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .._core._files import check_checksum, data_folder, DataError, read_npz


class Expected(NamedTuple):
    """The form of one array in a file.

    **Attributes:**

    - `dtype`: its dtype.
    - `shape`: its shape; `None` for a length that is not fixed.
    - `low`, `high`: the range of its values.
    """

    dtype: type
    shape: tuple[int | None, ...]
    low: float = -math.inf
    high: float = math.inf


class NpzSet(NamedTuple):
    """A data set in one file.

    **Attributes:**

    - `name`: what it is called in messages, tables and pictures.
    - `folder`: its subfolder of the data folder.
    - `file`: the name of the file there.
    - `sha256`: the checksum of the file.
    - `arrays`: the form of each array that is read from it.
    - `or_else`: what may be there in its place, in words.
    - `max_packed`: the largest size that the file may have, in bytes.
    - `max_unpacked`: the largest size that one array may have, in bytes.
    """

    name: str
    folder: str
    file: str
    sha256: str
    arrays: Mapping[str, Expected]
    or_else: str = ""
    max_packed: int = 32 * 1024**2
    max_unpacked: int = 64 * 1024**2


def find_file(
    root: str | os.PathLike | None,
    folder: str,
    file: str,
    name: str,
    content: str,
    or_else: str = "",
) -> Path:
    """The path of a file of a data set.

    **Arguments:**

    - `root`: the folder that the user named, or `None`.
    - `folder`, `file`: the subfolder and the name of the file.
    - `name`: what the data set is called in messages.
    - `content`: what must be in the file, in words.
    - `or_else`: what may be there in its place, in words.

    **Raises:**

    `DataError` that says what to put where, if it is not there.
    """
    place = data_folder(root) / folder
    if not (place / file).is_file():
        raise DataError(
            f"{name} is not in {place}. Put `{file}` ({content}){or_else} into {place}, or "
            f"name another folder that has it in its subfolder `{folder}` as `root=` or in "
            "the environment variable METAOPT_DATA. It is not downloaded."
        )
    return place / file


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The content of a file.

    **Raises:**

    `DataError` naming the file and the reason.
    """
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error!r}.") from error
    if len(content) > max_bytes:
        raise DataError(f"{path} is larger than the allowed {max_bytes:,} bytes.")
    return content


def read_checked(path: Path, checksum: str, max_bytes: int) -> bytes:
    """The content of a file, which has this checksum.

    **Raises:**

    `DataError` naming the file and the reason.
    """
    content = read_bounded(path, max_bytes)
    try:
        check_checksum(content, checksum, str(path))
    except DataError as error:
        raise DataError(f"{error} Put the right file in its place.") from None
    return content


def checksum_of(checksums: Mapping[str, str] | None, file: str, published: str) -> str:
    """The checksum of a file that the user gave, or else the published one.

    **Raises:**

    `ValueError` if `checksums` has no entry for it.
    """
    if checksums is None:
        return published
    if file not in checksums:
        raise ValueError(f"`checksums` must have an entry for {file}.")
    return checksums[file]


def read_npz_set(
    published: NpzSet,
    root: str | os.PathLike | None,
    checksums: Mapping[str, str] | None,
) -> tuple[Path, dict[str, np.ndarray]]:
    """The file of a data set, and the arrays in it.

    **Arguments:**

    - `published`: which data set.
    - `root`: the folder that the user named, or `None`.
    - `checksums`: the checksum of the file by its name, in place of the published one.

    **Raises:**

    `DataError` naming the file and the reason, if it is missing, damaged, or another.
    """
    checksum = checksum_of(checksums, published.file, published.sha256)
    content = f"arrays {', '.join(published.arrays)}"
    path = find_file(
        root, published.folder, published.file, published.name, content, published.or_else
    )
    read_checked(path, checksum, published.max_packed)
    arrays = read_npz(path, list(published.arrays), published.max_unpacked)
    for key, expected in published.arrays.items():
        _check_array(path, key, arrays[key], expected)
    return path, arrays


def _check_array(path: Path, key: str, array: np.ndarray, expected: Expected) -> None:
    fits = array.ndim == len(expected.shape) and all(
        wanted is None or wanted == size
        for wanted, size in zip(expected.shape, array.shape)
    )
    if array.dtype != expected.dtype or not fits:
        shape = ", ".join("n" if size is None else str(size) for size in expected.shape)
        raise DataError(
            f"{path} is not as expected: array `{key}` should be "
            f"{np.dtype(expected.dtype)} of shape ({shape}), but is {array.dtype} of shape "
            f"{array.shape}."
        )
    # Written so that NaN fails.
    if array.size and not (array.min() >= expected.low and array.max() <= expected.high):
        raise DataError(
            f"{path} is not as expected: array `{key}` should lie between {expected.low} "
            f"and {expected.high}, but has values from {array.min()} to {array.max()}."
        )


def joined(path: Path, arrays: Mapping[str, np.ndarray], kind: str) -> np.ndarray:
    """The training part of an array, followed by its test part.

    **Arguments:**

    - `path`: the file, for messages.
    - `arrays`: has `x_train`, `y_train`, `x_test` and `y_test`.
    - `kind`: `"x"` or `"y"`.

    **Raises:**

    `DataError` where a part has more examples than labels, or fewer.
    """
    for part in ("train", "test"):
        rows, labels = len(arrays[f"x_{part}"]), len(arrays[f"y_{part}"])
        if rows != labels:
            raise DataError(
                f"{path} is not as expected: {rows} rows in `x_{part}` but {labels} labels "
                f"in `y_{part}`."
            )
    return np.concatenate([arrays[f"{kind}_train"], arrays[f"{kind}_test"]])
