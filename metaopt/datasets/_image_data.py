"""Labelled images."""

import equinox as eqx
import numpy as np
from jaxtyping import Float32, Int32

from ._labelled import check_labels


class ImageData(eqx.Module):
    """Labelled images, flattened, held on the host as NumPy arrays.

    It is a pytree with two leaves, `x` and `y`, so it can be given to a jitted function
    as it is. `len(data)` is the number of images; `data[:1000]` and `data[indices]`
    select some of them.

    **Arguments:**

    - `x`: the images, float32 of shape `(n, d)`, brightness from 0 to 1.
    - `y`: their labels, int32 of shape `(n,)`, from 0 to `num_classes - 1`.
    - `num_classes`: how many classes there are.
    - `name`: what the data are called in tables and pictures.

    **Raises:**

    `ValueError` if the shapes, dtypes or ranges are not those.
    """

    x: Float32[np.ndarray, "n d"]
    y: Int32[np.ndarray, " n"]
    num_classes: int = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def __check_init__(self):
        if self.x.ndim != 2 or self.x.dtype != np.float32:
            raise ValueError(
                "`x` must be float32 of shape (n, d), got "
                f"{self.x.dtype} of shape {self.x.shape}."
            )
        check_labels(self.y, self.num_classes)
        if len(self.x) != len(self.y):
            raise ValueError(
                f"`x` has {len(self.x)} images but `y` has {len(self.y)} labels."
            )
        # Written so that NaN fails.
        if self.x.size and not (self.x.min() >= 0 and self.x.max() <= 1):
            raise ValueError(
                "`x` must lie between 0 and 1, got values from "
                f"{self.x.min()} to {self.x.max()}."
            )

    def __len__(self) -> int:
        """The number of images."""
        return len(self.y)

    def __getitem__(self, index: slice | np.ndarray) -> "ImageData":
        """The images that a slice, or an array of positions or booleans, selects."""
        return ImageData(self.x[index], self.y[index], self.num_classes, self.name)
