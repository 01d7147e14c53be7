"""The best-response versions of normalisation layers."""

from typing import Any

import equinox as eqx
from jaxtyping import Array

from ._layer import AbstractBestResponse
from ._perturbation import Perturbation


class BestResponseNorm(AbstractBestResponse, eqx.nn.StatefulLayer):
    """A normalisation whose affine part responds, each entry for itself.

    **Attributes:**

    - `layer`: an `equinox.nn.LayerNorm`, `GroupNorm`, `RMSNorm` or `BatchNorm`.
    - `response`: that of `weight` and of `bias`, each a [`metaopt.nn.Shift`][].
    - `perturbation`: what the layer is bound to, or `None`.
    """

    layer: Any
    response: dict[str, Any]
    perturbation: Perturbation | None = None

    def is_stateful(self) -> bool:
        """Whether the layer is called with a state; read by `equinox.nn.Sequential`."""
        layer = self.layer
        return isinstance(layer, eqx.nn.StatefulLayer) and layer.is_stateful()

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Any:
        """Call the layer.

        **Arguments:**

        - `x`: what the layer takes; a batch by `jax.vmap`.
        - `args`, `kwargs`: handed on, such as the state of batch normalisation.

        **Returns:**

        Apply the layer at the bound perturbation.
        """
        # The affine part is as large as its input, so nothing is lost by forming it.
        return self.effective()(x, *args, **kwargs)
