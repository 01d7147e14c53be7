"""Fashion-MNIST, from a folder or from the repository of its authors."""

import os
from collections.abc import Mapping
from types import MappingProxyType

from ._idx_images import load_idx_images, Published
from ._image_data import ImageData


# Their other address, fashion-mnist.s3-website.eu-central-1.amazonaws.com, has no https,
# and was reported to lead to MNIST: https://github.com/zalandoresearch/fashion-mnist/issues/107
FASHION_MNIST_URL = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
)

# Of the files there; the MD5 of the same files are in its README.
FASHION_MNIST_SHA256: Mapping[str, str] = MappingProxyType(
    {
        "train-images-idx3-ubyte.gz": (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
        ),
        "train-labels-idx1-ubyte.gz": (
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
        ),
        "t10k-images-idx3-ubyte.gz": (
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
        ),
        "t10k-labels-idx1-ubyte.gz": (
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
        ),
    }
)

_FASHION_MNIST = Published(
    name="Fashion-MNIST",
    folder="fashion_mnist",
    npz_names=MappingProxyType(
        {
            "fashion_mnist.npz": "Fashion-MNIST",
            "fashion_mnist_20k.npz": "Fashion-MNIST (20k subset)",
        }
    ),
    sha256=FASHION_MNIST_SHA256,
)


def load_fashion_mnist(
    root: str | os.PathLike | None = None,
    *,
    base_url: str | None = FASHION_MNIST_URL,
    checksums: Mapping[str, str] | None = None,
) -> ImageData:
    """The 70,000 pictures of clothes, of 28 x 28 pixels, of Fashion-MNIST.

    For when MNIST is too easy: linear classifiers are right for some 84 % of the test
    part. By Xiao, Rasul and Vollgraf (2017). The classes are, from 0: T-shirt or top,
    trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot.

    Looks for `fashion_mnist/fashion_mnist.npz`, then for a subset of it,
    `fashion_mnist/fashion_mnist_20k.npz`, then for the four canonical `.gz` files, in
    `root`; where none of them is there, downloads the four files (31 MB) and keeps them
    there. A download is checked against the checksums of the published files before it is
    unpacked.

    **Arguments:**

    - `root`: the folder that has, or gets, a subfolder `fashion_mnist`. By default the
        folder named by the environment variable `METAOPT_DATA`, else `metaopt` in the
        user's cache folder.
    - `base_url`: where to download from; `None` to never download.
    - `checksums`: the SHA-256 of each of the four files, by name; those of the published
        files by default. Only to be given together with another `base_url`.

    **Returns:**

    `ImageData` with `x` of shape `(70000, 784)` and 10 classes, in the original order:
    the first 60,000 are the official training part, the last 10,000 the official test
    part (`data[:60_000]` and `data[60_000:]`). Of the subset, `x` has the shape
    `(25000, 784)` and the first 20,000 are from the training part; its `name` says that
    it is one.

    **Raises:**

    [`metaopt.datasets.DataError`][] naming the file and the reason. A download is
    written only once all of it has proved sound.
    """
    return load_idx_images(_FASHION_MNIST, root, base_url, checksums)
