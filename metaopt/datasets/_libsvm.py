"""Data sets in the text format of LIBSVM, as its authors publish them."""

import bz2
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .._core._files import data_folder, DataError
from ._checked_files import checksum_of, NpzSet, read_bounded, read_checked
from ._sparse_data import SparseData


LIBSVM_URL = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/"

# The largest one, of sector, has 16 MB.
_MAX_TEXT = 64 * 1024**2


class LibsvmText(NamedTuple):
    """The text files of a data set.

    **Attributes:**

    - `files`: their names, the training part first; each may end with `.bz2` besides.
    - `labels`: the label of each class in them, class 0 first.
    - `num_columns`: the number of features.
    - `content`: the SHA-256 of the numbers in them, see `content_checksum`: the checksums
        of the files themselves are not published.
    """

    files: tuple[str, ...]
    labels: range
    num_columns: int
    content: str


def content_checksum(data: SparseData) -> str:
    """The SHA-256 of the numbers of a data set, however they are stored."""
    digest = hashlib.sha256()
    for array in (data.values, data.columns, data.starts, data.y):
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def read_libsvm(
    text: LibsvmText,
    npz: NpzSet,
    root: str | os.PathLike | None,
    checksums: Mapping[str, str] | None,
) -> SparseData | None:
    """The rows of the text files one after the other, where the `.npz` file is not there.

    **Arguments:**

    - `text`, `npz`: the two forms of the data set.
    - `root`: the folder that the user named, or `None`.
    - `checksums`: those of the files, in place of a check of the numbers in them.

    **Returns:**

    The rows, or `None` where the `.npz` file is there, or one of the text files is not.

    **Raises:**

    `DataError` naming the file and the reason.
    """
    folder = data_folder(root) / npz.folder
    found = [
        next((path for path in (folder / f, folder / f"{f}.bz2") if path.is_file()), None)
        for f in text.files
    ]
    paths = [path for path in found if path is not None]
    if (folder / npz.file).is_file() or len(paths) < len(text.files):
        return None
    parts = [_read_part(path, text, npz.name, checksums) for path in paths]
    ends = np.cumsum([0, *(len(part.values) for part in parts)])
    starts = [part.starts[1:] + end for part, end in zip(parts, ends)]
    data = SparseData(
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.columns for part in parts]),
        np.concatenate([[0], *starts]).astype(np.int32),
        np.concatenate([part.y for part in parts]),
        *(text.num_columns, len(text.labels), npz.name),
    )
    content = content_checksum(data)
    if checksums is None and content != text.content:
        listed = " and ".join(str(path) for path in paths)
        raise DataError(
            f"{listed} hold other numbers than those published: their SHA-256 is "
            f"{content}, expected {text.content}. Put the right files in their place."
        )
    return data


def _read_part(
    path: Path, text: LibsvmText, name: str, checksums: Mapping[str, str] | None
) -> SparseData:
    if checksums is None:
        content = read_bounded(path, _MAX_TEXT)
    else:
        content = read_checked(path, checksum_of(checksums, path.name, ""), _MAX_TEXT)
    if path.suffix == ".bz2":
        try:
            # Read up to a bound: a file of a few bytes can unpack to many gigabytes.
            unpacker = bz2.BZ2Decompressor()
            content = unpacker.decompress(content, _MAX_TEXT + 1)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} cannot be read: {error!r}.") from error
        if len(content) > _MAX_TEXT:
            raise DataError(f"{path} unpacks to more than the allowed {_MAX_TEXT:,} bytes.")
        if not unpacker.eof:
            raise DataError(f"{path} cannot be read: it is cut short.")
    if content.lstrip()[:1] == b"<":
        raise DataError(f"{path} is a web page, not the data.")
    try:
        return _parse(content, text, name)
    except ValueError as error:
        raise DataError(f"{path} is not as expected: {error}") from error


def _parse(content: bytes, text: LibsvmText, name: str) -> SparseData:
    """The rows in a text: a label and pairs `column:value`, columns counted from 1."""
    labels, starts, entries = [], [0], []
    for number, line in enumerate(content.decode("ascii").splitlines(), 1):
        words = line.split()
        if not words or any(word.count(":") != 1 for word in words[1:]):
            raise ValueError(f"line {number} is no label with pairs `column:value`.")
        labels.append(words[0])
        entries += words[1:]
        starts.append(len(entries))
    numbers = np.array(" ".join(entries).replace(":", " ").split(), np.float64)
    if len(numbers) != 2 * len(entries):
        raise ValueError("a column or a value is missing beside a colon.")
    columns, values = numbers[0::2] - 1, numbers[1::2]
    # Written so that NaN fails.
    if not np.all((columns >= 0) & (columns < text.num_columns) & (columns % 1 == 0)):
        raise ValueError(f"columns should be whole numbers from 1 to {text.num_columns}.")
    y = (np.array(labels, np.float64) - text.labels.start) / text.labels.step
    if not np.all((y >= 0) & (y < len(text.labels)) & (y % 1 == 0)):
        first, last = text.labels[0], text.labels[-1]
        raise ValueError(
            f"labels should be one of {len(text.labels)} numbers from {first} to {last}."
        )
    kept = values != 0
    rows = np.repeat(np.arange(len(labels)), np.diff(starts))[kept]
    return SparseData(
        values[kept].astype(np.float32),
        columns[kept].astype(np.int32),
        np.searchsorted(rows, np.arange(len(labels) + 1)).astype(np.int32),
        y.astype(np.int32),
        *(text.num_columns, len(text.labels), name),
    )
