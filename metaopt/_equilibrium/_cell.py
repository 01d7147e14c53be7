"""Cells of equilibrium layers, and some whose fixed point is certain to exist."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core._types import Key, PyTree
from .._core._validate import check_count, check_key, check_tolerance
from ._bound import bound_spectral_norm, spectral_norm


class AbstractCell(eqx.Module):
    """A cell that computes once the part that does not change from step to step.

    Any function `cell(z, x)` is a cell too; this is for those with something to prepare:
    the part of the input, or the norm of a matrix.
    """

    @abc.abstractmethod
    def initial(self, x: PyTree) -> PyTree:
        """The initial state of the solver.

        **Arguments:**

        - `x`: the input of the layer.
        """

    @abc.abstractmethod
    def prepare(self, x: PyTree) -> Callable[[Any], Any]:
        """The cell at an input.

        **Arguments:**

        - `x`: the input of the layer.

        **Returns:**

        A function of `z`: an `equinox.Module` whose fields are what was computed.
        """

    def __call__(self, z: PyTree, x: PyTree) -> PyTree:
        """The cell, applied once."""
        return self.prepare(x)(z)


class ContractiveCell(AbstractCell):
    r"""One affine map and an activation, $z \mapsto \sigma(W z + U x + b)$, whose matrix
    $W$ has a spectral norm of at most `bound`.

    With an activation that does not stretch it is a contraction by that factor, with one
    fixed point that even the plain iteration finds.

    **Arguments:**

    - `input_size`, `size`: the lengths of the vectors `x` and `z`.
    - `bound`: of the spectral norm of $W$; in (0, 1).
    - `activation`: a function by entries whose slope is between -1 and 1.
    - `key`: for the weights, normal with a variance of one over the number of inputs.

    **Raises:**

    `ValueError` for sizes and bounds out of range.

    ??? cite "Source"

        El Ghaoui, Gu, Travacca, Askari, Tsai: *Implicit deep learning*, 2021, with the
        spectral norm in place of the largest sum of a row.
    """

    weight: Float[Array, "size size"]
    inputs: Float[Array, "size input_size"]
    bias: Float[Array, " size"]
    bound: float = eqx.field(static=True)
    activation: Callable[[Array], Array]

    def __init__(
        self,
        input_size: int,
        size: int,
        *,
        bound: float = 0.9,
        activation: Callable[[Array], Array] = jnp.tanh,
        key: Key,
    ):
        check_count(input_size, "input_size")
        check_count(size, "size")
        check_tolerance(bound, "bound", optional=False)
        if not 0 < bound < 1:
            raise ValueError(f"`bound` must lie in (0, 1); got {bound!r}.")
        check_key(key)
        keys = jax.random.split(key)
        self.weight = jax.random.normal(keys[0], (size, size)) / size**0.5
        self.inputs = jax.random.normal(keys[1], (size, input_size)) / input_size**0.5
        self.bias = jnp.zeros(size)
        self.bound = bound
        self.activation = activation

    def initial(self, x):
        return jnp.zeros_like(self.bias)

    def prepare(self, x):
        weight = bound_spectral_norm(self.weight, self.bound)
        return _Affine(weight, self.inputs @ x + self.bias, self.activation)


class MonotoneCell(AbstractCell):
    r"""The fixed point of $relu(W z + U x + b)$ for matrices $W$ of any norm that are
    *monotone*: $W = (1 - m) I - A^T A + B - B^T$.

    There is one fixed point for each input, whatever $A$ and $B$ are, and the spectral norm
    of $W$ has no bound: such a layer can express more than a contraction. The iteration is
    a step of forward-backward splitting with the same fixed point,

    $$z \mapsto relu(z - \alpha ((I - W) z - U x - b)), \qquad \alpha = m / L^2,$$

    with $L$ the spectral norm of $I - W$, which contracts by $\sqrt{1 - m^2 / L^2}$.
    That is slow where $L$ is large, and [`metaopt.Anderson`][] helps.

    **Arguments:**

    - `input_size`, `size`: the lengths of the vectors `x` and `z`.
    - `margin`: the $m$ above; in (0, 1].
    - `key`: for the weights.

    **Raises:**

    `ValueError` for sizes and margins out of range.

    ??? cite "Source"

        Winston, Kolter: *Monotone operator equilibrium networks*, 2020.
    """

    symmetric: Float[Array, "size size"]
    skew: Float[Array, "size size"]
    inputs: Float[Array, "size input_size"]
    bias: Float[Array, " size"]
    margin: float = eqx.field(static=True)

    def __init__(self, input_size: int, size: int, *, margin: float = 0.1, key: Key):
        check_count(input_size, "input_size")
        check_count(size, "size")
        check_tolerance(margin, "margin", optional=False)
        if not 0 < margin <= 1:
            raise ValueError(f"`margin` must lie in (0, 1]; got {margin!r}.")
        check_key(key)
        keys = jax.random.split(key, 3)
        self.symmetric = jax.random.normal(keys[0], (size, size)) / (2 * size**0.5)
        self.skew = jax.random.normal(keys[1], (size, size)) / (2 * size**0.5)
        self.inputs = jax.random.normal(keys[2], (size, input_size)) / input_size**0.5
        self.bias = jnp.zeros(size)
        self.margin = margin

    @property
    def matrix(self) -> Float[Array, "size size"]:
        """The matrix $W$."""
        identity = jnp.eye(*self.skew.shape, dtype=self.skew.dtype)
        square = self.symmetric.T @ self.symmetric
        return (1 - self.margin) * identity - square + self.skew - self.skew.T

    def initial(self, x):
        return jnp.zeros_like(self.bias)

    def prepare(self, x):
        matrix = self.matrix
        identity = jnp.eye(*matrix.shape, dtype=matrix.dtype)
        # The length of the steps does not move the fixed point, so it has no derivative.
        norm = jax.lax.stop_gradient(spectral_norm(identity - matrix))
        length = self.margin / norm**2
        return _Affine(
            identity + length * (matrix - identity),
            length * (self.inputs @ x + self.bias),
            jax.nn.relu,
        )


class _Affine(eqx.Module):
    """An affine map and an activation."""

    weight: Array
    bias: Array
    activation: Callable[[Array], Array]

    def __call__(self, z: Array) -> Array:
        return self.activation(self.weight @ z + self.bias)
