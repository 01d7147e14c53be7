"""A subset of CIFAR-10, from a folder."""

import os
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from .._core._files import DataError
from ._checked_files import Expected, joined, NpzSet, read_npz_set
from ._image_data import ImageData


_IMAGES = Expected(np.uint8, (None, 32, 32, 3))
_LABELS = Expected(np.uint8, (None,), 0, 9)

_CIFAR10_SUBSET = NpzSet(
    name="CIFAR-10 (4,000-image JPEG subset)",
    folder="cifar10_small",
    file="cifar10_5k.npz",
    sha256="295374ad64cbd62051a67c650a37c2688a9d2a4cdc93137f2841729f72acb53b",
    arrays=MappingProxyType(
        {"x_train": _IMAGES, "y_train": _LABELS, "x_test": _IMAGES, "y_test": _LABELS}
    ),
)


def load_cifar10_subset(
    root: str | os.PathLike | None = None,
    *,
    checksums: Mapping[str, str] | None = None,
) -> ImageData:
    """5,000 colour images of 32 x 32 pixels from CIFAR-10 (Krizhevsky, 2009), which have
    been through JPEG.

    For images that are hard for a linear classifier, which is right for some 35 % of the
    test part. The pixels differ slightly from those of CIFAR-10: do not quote results as
    results of CIFAR-10. The classes are, from 0: airplane, automobile, bird, cat, deer,
    dog, frog, horse, ship, truck.

    Looks for `cifar10_small/cifar10_5k.npz` in `root`. Nothing is downloaded.

    **Arguments:**

    - `root`: the folder that has a subfolder `cifar10_small`. By default the folder named
        by the environment variable `METAOPT_DATA`, else `metaopt` in the user's cache
        folder.
    - `checksums`: the SHA-256 of the file, by its name, if it is another one.

    **Returns:**

    [`metaopt.datasets.ImageData`][] with `x` of shape `(5000, 3072)` and 10 classes.
    `x.reshape(-1, 32, 32, 3)` are the images: row, column, colour. The first 4,000 are
    from the official training part, 400 a class, the others from the test part, 100 a
    class.

    **Raises:**

    [`metaopt.datasets.DataError`][] naming the file and the reason.
    """
    path, arrays = read_npz_set(_CIFAR10_SUBSET, root, checksums)
    images, labels = joined(path, arrays, "x"), joined(path, arrays, "y")
    try:
        return ImageData(
            x=images.reshape(len(images), -1).astype(np.float32) / np.float32(255),
            y=labels.astype(np.int32),
            num_classes=10,
            name=_CIFAR10_SUBSET.name,
        )
    except ValueError as error:
        raise DataError(f"{path} is not as expected: {error}") from error
