"""The best-response versions of layers that are linear in their input."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from .._core._types import Key
from ._array_response import RowScaling, Shift
from ._layer import AbstractBestResponse
from ._perturbation import Perturbation


class BestResponseLinear(AbstractBestResponse):
    r"""A fully connected layer or a convolution whose weights respond,

    $$y = W x + b + (S \lambda) \odot (W' x) + T \lambda .$$

    With one $\lambda$ for each example of a batch this takes one more product with the
    batch (none where $W'$ is tied to $W$), and no weights for each example.

    **Attributes:**

    - `layer`: an `equinox.nn.Linear`, `Conv1d`, `Conv2d`, `Conv3d`, `ConvTranspose1d`, ...
    - `response`: that of `weight` ([`metaopt.nn.RowScaling`][]) and of `bias`
        ([`metaopt.nn.Shift`][]).
    - `perturbation`: what the layer is bound to, or `None`.
    """

    layer: Any
    response: dict[str, Any]
    perturbation: Perturbation | None = None

    def __call__(self, x: Array, *, key: Key | None = None) -> Array:
        """Call the layer.

        **Arguments:**

        - `x`: what the layer takes; a batch by `jax.vmap`.
        - `key`: ignored, as by the layer.

        **Returns:**

        Apply the layer at the bound perturbation.
        """
        y = self.layer(x)
        if self.perturbation is None:
            return y
        scaling: RowScaling = self.response["weight"]
        bias = self.layer.bias
        if scaling.weight is not None:
            own = eqx.tree_at(lambda m: m.weight, self.layer, scaling.weight)
            response = _without_bias(own)(x)
        else:
            response = y if bias is None else y - bias.reshape(_rows(y))
        y = self.perturbation.added(y, scaling.scale, response)
        if bias is not None:
            shift: Shift = self.response["bias"]
            y = self.perturbation.added(y, shift.shift.reshape(*_rows(y), shift.num_hyper))
        return y


def _rows(y: Array) -> tuple[int, ...]:
    """The shape of a bias, which is one of an output without axes as well."""
    return y.shape[:1] + (1,) * (y.ndim - 1)


def _without_bias(layer: Any) -> Any:
    """The layer with a bias of zero, because whether it adds one is static."""
    if layer.bias is None:
        return layer
    return eqx.tree_at(lambda m: m.bias, layer, jnp.zeros_like(layer.bias))
