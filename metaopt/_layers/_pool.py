"""The largest value in each square of an image."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core._types import Key
from .._core._validate import check_count


class MaxPool2d(eqx.Module):
    """The largest value in each square of an image, by reshaping.

    For squares that do not overlap, `equinox.nn.MaxPool2d(size, size)` without the
    windows of XLA, whose derivatives are slow on CPUs. Rows and columns left over at
    the end are not used.

    **Arguments:**

    - `size`: how many pixels wide a square is.

    !!! example

        ```python
        import jax.numpy as jnp
        import metaopt as mo

        mo.nn.MaxPool2d(2)(jnp.ones((8, 5, 5))).shape  # (8, 2, 2)
        ```
    """

    size: int = eqx.field(static=True)

    def __check_init__(self):
        check_count(self.size, "size")

    def __call__(
        self, x: Float[Array, "channels height width"], *, key: Key | None = None
    ) -> Float[Array, "channels new_height new_width"]:
        """The pooled image.

        **Arguments:**

        - `x`: one image, channels first, or any array whose last two axes are pixels.
        - `key`: ignored; for compatibility with the layers of Equinox.

        **Returns:**

        An array whose last two axes are shorter by a factor of `size`.
        """
        *rest, height, width = x.shape
        height, width = height // self.size, width // self.size
        if not height or not width:
            raise ValueError(
                f"An image of {x.shape[-2]} x {x.shape[-1]} pixels is smaller than a "
                f"square of {self.size} x {self.size}."
            )
        x = x[..., : height * self.size, : width * self.size]
        squares = x.reshape(*rest, height, self.size, width, self.size)
        return jnp.max(squares, axis=(-3, -1))
