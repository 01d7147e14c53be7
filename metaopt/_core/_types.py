"""Type aliases. Imports nothing of ours."""

from collections.abc import Callable
from typing import Any, TypeAlias

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree as PyTree


Params: TypeAlias = PyTree[Any]
"""The inner variables: any pytree whose floating-point arrays are trained."""

Hyper: TypeAlias = PyTree[Any]
"""The outer variables: any pytree whose floating-point arrays are tuned."""

Batch: TypeAlias = PyTree[Any]
"""The data that a loss is evaluated on: any pytree of arrays."""

Aux: TypeAlias = PyTree[Any]
"""Whatever a loss returns beside its value."""

ModelState: TypeAlias = PyTree[Any]
"""State that a model updates as it runs and that is not trained, such as the running
statistics of batch normalisation. `None` for a model without."""

Key: TypeAlias = PRNGKeyArray
BoolScalar: TypeAlias = Bool[Array, ""]
FloatScalar: TypeAlias = Float[Array, ""]
IntScalar: TypeAlias = Int[Array, ""]
LossFn: TypeAlias = Callable[..., Any]
Vector: TypeAlias = PyTree[Float[Array, "..."]]
"""A point of a vector space: a pytree of floating-point arrays (and `None`s)."""
