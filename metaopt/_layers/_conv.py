"""A convolution that stays fast where each task has weights of its own."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core._types import Key


class Conv2d(eqx.Module):
    """A 2D convolution for models that adapt, task by task, under `jax.vmap`.

    Computes the same as `equinox.nn.Conv2d`, with the same weights. If the weights are
    mapped over as well, as in the inner loop of [`metaopt.few_shot.MAML`][], XLA makes a
    grouped convolution of that one, which on CPUs is slow, and its derivatives slower. This
    one is a product of two matrices there, the shifted images side by side and the weights.
    On other backends it is the convolution of XLA.

    **Arguments:**

    - `in_channels`, `out_channels`: the channels of what comes in and goes out.
    - `kernel_size`, `stride`, `padding`: as in `equinox.nn.Conv2d`: an int, or one for each
        axis; `padding` can be `"SAME"` or `"VALID"`.
    - `use_bias`: whether a bias is added.
    - `key`: for the initial weights, which are those of `equinox.nn.Conv2d`.

    **Raises:**

    `ValueError` for an image whose number of channels is another, or that is smaller
    than the kernel.

    !!! example

        ```python
        import jax
        import jax.numpy as jnp
        import metaopt as mo

        conv = mo.nn.Conv2d(1, 8, kernel_size=3, stride=2, padding=1, key=jax.random.key(0))
        conv(jnp.ones((1, 28, 28))).shape  # (8, 14, 14)
        ```
    """

    conv: eqx.nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        use_bias: bool = True,
        *,
        key: Key,
    ):
        self.conv = eqx.nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            use_bias=use_bias,
            key=key,
        )

    @property
    def weight(self) -> Float[Array, "out_channels in_channels height width"]:
        """The weights."""
        return self.conv.weight

    @property
    def bias(self) -> Float[Array, "out_channels 1 1"] | None:
        """The bias, or `None`."""
        return self.conv.bias

    def __call__(
        self, x: Float[Array, "in_channels height width"], *, key: Key | None = None
    ) -> Float[Array, "out_channels new_height new_width"]:
        """The convolution of one image.

        **Arguments:**

        - `x`: the image, channels first.
        - `key`: ignored; for compatibility with the layers of Equinox.

        **Returns:**

        An image with `out_channels` channels.
        """
        if x.ndim != 3 or x.shape[0] != self.conv.in_channels:
            raise ValueError(
                f"`Conv2d` takes one image of shape ({self.conv.in_channels}, height, "
                f"width); got shape {x.shape}. Use `jax.vmap` for a batch of them."
            )
        conv = self.conv
        padding = _pairs(conv.padding, x.shape[1:], conv.kernel_size, conv.stride)
        padded = [size + sum(pads) for size, pads in zip(x.shape[1:], padding)]
        if any(size < k for size, k in zip(padded, conv.kernel_size)):
            raise ValueError(
                f"An image of {padded[0]} x {padded[1]} pixels, padding included, is "
                f"smaller than a kernel of {conv.kernel_size[0]} x {conv.kernel_size[1]}."
            )
        if jax.default_backend() != "cpu":
            return conv(x)
        return convolved_by_products(conv, x, padding)


def convolved_by_products(
    conv: eqx.nn.Conv2d, x: Float[Array, "in_channels height width"], padding: Any
) -> Float[Array, "out_channels new_height new_width"]:
    """The convolution as one product of matrices: a row for each pixel that comes out."""
    kernel, strides = conv.kernel_size, conv.stride
    x = jnp.pad(jnp.moveaxis(x, 0, -1), (*padding, (0, 0)))
    height, width = ((size - k) // s + 1 for size, k, s in zip(x.shape, kernel, strides))

    def shifted(i, j):
        ends = i + strides[0] * (height - 1) + 1, j + strides[1] * (width - 1) + 1
        return jax.lax.slice(x, (i, j, 0), (*ends, x.shape[-1]), (*strides, 1))

    patches = [shifted(i, j) for i in range(kernel[0]) for j in range(kernel[1])]
    rows = jnp.concatenate(patches, axis=-1).reshape(height * width, -1)
    columns = jnp.moveaxis(conv.weight, 0, -1)  # in, height, width, out
    columns = jnp.moveaxis(columns, 0, -2).reshape(rows.shape[-1], -1)
    out = (rows @ columns).reshape(height, width, -1)
    out = jnp.moveaxis(out, -1, 0)
    return out if conv.bias is None else out + conv.bias


def _pairs(padding: Any, sizes: Any, kernel: Any, strides: Any) -> Any:
    if isinstance(padding, str):
        return jax.lax.padtype_to_pads(sizes, kernel, strides, padding)
    return padding
