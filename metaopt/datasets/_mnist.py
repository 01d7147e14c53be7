"""MNIST, from a folder or from its public mirror."""

import os
from collections.abc import Mapping
from types import MappingProxyType

from ._idx_images import load_idx_images, Published
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

_MNIST = Published(
    name="MNIST",
    folder="mnist",
    npz_names=MappingProxyType({"mnist.npz": "MNIST"}),
    sha256=MNIST_SHA256,
)


def load_mnist(
    root: str | os.PathLike | None = None,
    *,
    base_url: str | None = MNIST_URL,
    checksums: Mapping[str, str] | None = None,
) -> ImageData:
    """The 70,000 handwritten digits of 28 x 28 pixels of MNIST (LeCun and Cortes).

    Looks for `mnist/mnist.npz`, then for the four canonical `.gz` files, in `root`; where
    neither is there, downloads the four files (12 MB) and keeps them there. A download is
    checked against the published checksums before it is unpacked. If a few thousand images
    suffice, [`metaopt.datasets.load_digits`][] needs no download.

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
    return load_idx_images(_MNIST, root, base_url, checksums)
