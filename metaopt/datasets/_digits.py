"""The digits that ship with scikit-learn."""

import numpy as np

from ._image_data import ImageData


def load_digits() -> ImageData:
    """The 1,797 handwritten digits of 8 x 8 pixels that ship with scikit-learn.

    Nothing is downloaded, so this is the data to start with: small enough that a
    bilevel problem on it is solved in seconds, and real enough to overfit. They are the
    test part of the "Optical Recognition of Handwritten Digits" set of the UCI
    repository (Alpaydin and Kaynak, 1998), in the original order.

    **Returns:**

    `ImageData` with `x` of shape `(1797, 64)` (17 grey levels) and 10 classes.

    **Raises:**

    `ImportError` if scikit-learn is not installed.
    """
    try:
        import sklearn.datasets
    except ImportError as error:
        raise ImportError(
            "load_digits reads the copy that ships with scikit-learn, which is not "
            "installed; install it with `pip install 'metaopt-jax[examples]'`."
        ) from error
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    return ImageData(
        x=(images / 16).astype(np.float32),
        y=labels.astype(np.int32),
        num_classes=10,
        name="digits",
    )
