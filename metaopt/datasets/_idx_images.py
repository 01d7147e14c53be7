"""Ten classes of grey images in the four files of MNIST, from a folder or from a mirror."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .._core._files import (
    check_checksum,
    data_folder,
    DataError,
    fetch,
    parse_idx,
    read_npz,
    write_atomically,
)
from ._image_data import ImageData


_IMAGES = ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz")
_LABELS = ("train-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")

# The largest file, of Fashion-MNIST, has 26.4 MB packed and 47 MB unpacked.
_MAX_PACKED = 32 * 1024**2
_MAX_UNPACKED = 64 * 1024**2


class Published(NamedTuple):
    """The address of a data set, and its checksums.

    **Attributes:**

    - `name`: what it is called in messages, tables and pictures.
    - `folder`: its subfolder of the data folder.
    - `npz_names`: for each `.npz` file that is looked for there, in this order, what the
        data in it are called.
    - `sha256`: the checksum of each of the four files, by name.
    """

    name: str
    folder: str
    npz_names: Mapping[str, str]
    sha256: Mapping[str, str]


def _what_to_do(published: Published, folder: Path) -> str:
    npz = " or ".join(f"`{name}`" for name in published.npz_names)
    return (
        f"Put {npz} (uint8 arrays {', '.join(_NPZ_KEYS)}) or the four files "
        f"{', '.join(_IMAGES + _LABELS)} into {folder}, or name another folder that "
        f"has them in its subfolder `{published.folder}` as `root=` or in the environment "
        "variable METAOPT_DATA."
    )


def _as_data(
    images: list[np.ndarray], labels: list[np.ndarray], source: str, name: str
) -> ImageData:
    for part, x, y in zip(("training", "test"), images, labels, strict=True):
        if len(x) != len(y):
            raise DataError(
                f"{source} is not as expected: {len(x)} images but {len(y)} labels in "
                f"the {part} part."
            )
    if images[0].shape[1:] != images[1].shape[1:]:
        raise DataError(
            f"{source} is not as expected: training images of shape "
            f"{images[0].shape[1:]} but test images of shape {images[1].shape[1:]}."
        )
    x, y = np.concatenate(images), np.concatenate(labels)
    try:
        return ImageData(
            x=x.reshape(len(x), -1).astype(np.float32) / np.float32(255),
            y=y.astype(np.int32),
            num_classes=10,
            name=name,
        )
    except ValueError as error:
        raise DataError(f"{source} is not as expected: {error}") from error


def _from_npz(path: Path, name: str) -> ImageData:
    arrays = read_npz(path, _NPZ_KEYS, _MAX_UNPACKED)
    for key, array in arrays.items():
        num_axes = 3 if key.startswith("x") else 1
        if array.dtype != np.uint8 or array.ndim != num_axes:
            raise DataError(
                f"{path} is not as expected: array `{key}` should be uint8 with "
                f"{num_axes} axes, but is {array.dtype} of shape {array.shape}."
            )
    return _as_data(
        [arrays["x_train"], arrays["x_test"]],
        [arrays["y_train"], arrays["y_test"]],
        str(path),
        name,
    )


def _from_idx(packed: Mapping[str, bytes], source: str, name: str) -> ImageData:
    images = [parse_idx(packed[file], 3, _MAX_UNPACKED, file) for file in _IMAGES]
    labels = [parse_idx(packed[file], 1, _MAX_UNPACKED, file) for file in _LABELS]
    return _as_data(images, labels, source, name)


def _read_cached(folder: Path, checksums: Mapping[str, str]) -> dict[str, bytes]:
    packed = {}
    for name in _IMAGES + _LABELS:
        path = folder / name
        try:
            with path.open("rb") as file:
                packed[name] = file.read(_MAX_PACKED)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error!r}.") from error
        try:
            check_checksum(packed[name], checksums[name], str(path))
        except DataError as error:
            raise DataError(f"{error} Delete it to download it anew.") from None
    return packed


def load_idx_images(
    published: Published,
    root: str | os.PathLike | None,
    base_url: str | None,
    checksums: Mapping[str, str] | None,
) -> ImageData:
    """The training images, followed by the test images.

    **Arguments:**

    - `published`: which data set.
    - `root`, `base_url`, `checksums`: as in [`metaopt.datasets.load_mnist`][].

    **Returns:**

    The first that exists: one of the `.npz` files, the four files, the download.
    """
    checksums = published.sha256 if checksums is None else checksums
    missing = sorted(set(published.sha256) - set(checksums))
    if missing:
        raise ValueError(f"`checksums` must have an entry for {', '.join(missing)}.")
    folder = data_folder(root) / published.folder
    for file, name in published.npz_names.items():
        if (folder / file).exists():
            return _from_npz(folder / file, name)
    if all((folder / file).exists() for file in _IMAGES + _LABELS):
        packed = _read_cached(folder, checksums)
        return _from_idx(packed, str(folder), published.name)
    what_to_do = _what_to_do(published, folder)
    if base_url is None:
        raise DataError(f"{published.name} is not in {folder}. {what_to_do}")
    try:
        packed = {
            file: fetch(f"{base_url.rstrip('/')}/{file}", checksums[file], _MAX_PACKED)
            for file in _IMAGES + _LABELS
        }
        data = _from_idx(packed, base_url, published.name)
    except DataError as error:
        raise DataError(
            f"{published.name} is not in {folder}, and {error} {what_to_do}"
        ) from error
    for file, content in packed.items():
        write_atomically(folder / file, content)
    return data
