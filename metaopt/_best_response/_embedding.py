"""The best-response version of an embedding."""

from typing import Any

import equinox as eqx
from jaxtyping import Array

from .._core._types import Key
from ._array_response import RowScaling
from ._layer import AbstractBestResponse
from ._perturbation import Perturbation


class BestResponseEmbedding(AbstractBestResponse):
    r"""An embedding whose table responds: each entry of the embedding is scaled,
    $y = W_i + (S \lambda) \odot W'_i$ for the index $i$.

    **Attributes:**

    - `layer`: an `equinox.nn.Embedding`.
    - `response`: that of `weight`, a [`metaopt.nn.RowScaling`][] along axis 1.
    - `perturbation`: what the layer is bound to, or `None`.
    """

    layer: eqx.nn.Embedding
    response: dict[str, Any]
    perturbation: Perturbation | None = None

    def __call__(self, x: Array, *, key: Key | None = None) -> Array:
        """Look an index up.

        **Arguments:**

        - `x`: a scalar index; several by `jax.vmap`.
        - `key`: ignored, as by the layer.

        **Returns:**

        The embedding at the bound perturbation, of shape `(embedding_size,)`.
        """
        general = self.layer(x)
        if self.perturbation is None:
            return general
        scaling: RowScaling = self.response["weight"]
        response = general
        if scaling.weight is not None:
            response = eqx.tree_at(lambda m: m.weight, self.layer, scaling.weight)(x)
        return self.perturbation.added(general, scaling.scale, response)
