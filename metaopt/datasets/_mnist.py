"""MNIST, from a folder or from its public mirror."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ._files import (
    check_sha256,
    data_folder,
    DataError,
    fetch,
    parse_idx,
    read_npz,
    write_atomically,
)
from ._image_data import ImageData


MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"

# The checksums that the files have carried since 1998, on every mirror.
MNIST_SHA256: Mapping[str, str] = MappingProxyType(
    {
        "train-images-idx3-ubyte.gz": (
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
        ),
        "train-labels-idx1-ubyte.gz": (
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
        ),
        "t10k-images-idx3-ubyte.gz": (
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
        ),
        "t10k-labels-idx1-ubyte.gz": (
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
        ),
    }
)

_IMAGES = ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz")
_LABELS = ("train-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")

# The largest file has 9.9 MB packed and 47 MB unpacked.
_MAX_PACKED = 16 * 1024**2
_MAX_UNPACKED = 64 * 1024**2


def _what_to_do(folder: Path) -> str:
    return (
        f"Put `mnist.npz` (uint8 arrays {', '.join(_NPZ_KEYS)}) or the four files "
        f"{', '.join(_IMAGES + _LABELS)} into {folder}, or name another folder that "
        "has them in its subfolder `mnist` as `root=` or in the environment variable "
        "METAOPT_DATA."
    )


def _as_data(images: list[np.ndarray], labels: list[np.ndarray], source: str) -> ImageData:
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
            name="MNIST",
        )
    except ValueError as error:
        raise DataError(f"{source} is not as expected: {error}") from error


def _from_npz(path: Path) -> ImageData:
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
    )


def _from_idx(packed: Mapping[str, bytes], source: str) -> ImageData:
    images = [parse_idx(packed[name], 3, _MAX_UNPACKED, name) for name in _IMAGES]
    labels = [parse_idx(packed[name], 1, _MAX_UNPACKED, name) for name in _LABELS]
    return _as_data(images, labels, source)


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
            check_sha256(packed[name], checksums[name], str(path))
        except DataError as error:
            raise DataError(f"{error} Delete it to download it anew.") from None
    return packed


def load_mnist(
    root: str | os.PathLike | None = None,
    *,
    base_url: str | None = MNIST_URL,
    checksums: Mapping[str, str] | None = None,
) -> ImageData:
    """The 70,000 handwritten digits of 28 x 28 pixels of MNIST (LeCun and Cortes).

    Looks for `mnist/mnist.npz`, then for the four canonical `.gz` files, in `root`;
    where neither is there, downloads the four files (12 MB) and keeps them there. What
    was downloaded is checked against the published checksums before it is unpacked.
    Where a few thousand images will do, [`metaopt.datasets.load_digits`][] needs no
    download.

    **Arguments:**

    - `root`: the folder that has, or gets, a subfolder `mnist`. By default the folder
        named by the environment variable `METAOPT_DATA`, else `metaopt` in the user's
        cache folder.
    - `base_url`: where to download from; `None` to never download.
    - `checksums`: the SHA-256 of each of the four files, by name; the published ones
        by default. Only to be given together with another `base_url`.

    **Returns:**

    `ImageData` with `x` of shape `(70000, 784)` and 10 classes, in the original order:
    the first 60,000 are the official training part, the last 10,000 the official test
    part (`data[:60_000]` and `data[60_000:]`).

    **Raises:**

    [`metaopt.datasets.DataError`][] naming the file and the reason. A download is
    written only once all of it has proved sound.
    """
    checksums = MNIST_SHA256 if checksums is None else checksums
    missing = sorted(set(MNIST_SHA256) - set(checksums))
    if missing:
        raise ValueError(f"`checksums` must have an entry for {', '.join(missing)}.")
    folder = data_folder(root) / "mnist"
    npz = folder / "mnist.npz"
    if npz.exists():
        return _from_npz(npz)
    if all((folder / name).exists() for name in _IMAGES + _LABELS):
        return _from_idx(_read_cached(folder, checksums), str(folder))
    if base_url is None:
        raise DataError(f"MNIST is not in {folder}. {_what_to_do(folder)}")
    try:
        packed = {
            name: fetch(f"{base_url.rstrip('/')}/{name}", checksums[name], _MAX_PACKED)
            for name in _IMAGES + _LABELS
        }
        data = _from_idx(packed, base_url)
    except DataError as error:
        raise DataError(
            f"MNIST is not in {folder}, and {error} {_what_to_do(folder)}"
        ) from error
    for name, content in packed.items():
        write_atomically(folder / name, content)
    return data
