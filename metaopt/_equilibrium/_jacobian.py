"""The Jacobian of a cell at an equilibrium: penalties on it, and how large it is."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._tree import split_trainable, tree_dot, tree_norm, tree_scale, tree_size
from .._core._types import FloatScalar, Key, PyTree, Vector
from .._core._validate import canonical_key, check_count
from .._jaxpr._detach import stop_gradient


def jacobian_penalty(
    cell: Callable[[Any, Any], Any],
    z: PyTree,
    x: PyTree,
    key: Key | None = None,
    *,
    num_samples: int = 1,
) -> FloatScalar:
    r"""An estimate of $\|J\|_F^2 / n$, the mean squared norm of the rows of the Jacobian of
    a cell in `z`; $n$ is the number of entries of `z`.

    Added to a loss it keeps the fixed point stable where training would let the spectral
    radius grow past one: solvers need fewer steps, forward and backward. Each sample is
    one product with the transposed Jacobian (Hutchinson's estimate).

    Differentiable in the cell and in `x`; the point `z` is held constant.

    **Arguments:**

    - `cell`: `cell(z, x)`.
    - `z`: a pytree of arrays, usually the equilibrium.
    - `x`: the input of the cell.
    - `key`: for the random vectors; by default key 0. Another one for each step.
    - `num_samples`: how many of them.

    **Returns:**

    A scalar. Under `jax.vmap` one for each example.

    **Raises:**

    `ValueError` for a number of samples below 1, and for a key that is none.

    ??? cite "Source"

        Bai, Koltun, Kolter: *Stabilizing equilibrium models by Jacobian regularization*,
        2021.
    """
    check_count(num_samples, "num_samples")
    step, floats = _in_state(cell, stop_gradient(z), x)
    _, pull = jax.vjp(step, floats)

    def squared_norm(key):
        (product,) = pull(_noise_like(floats, key))
        return tree_dot(product, product)

    keys = jax.random.split(canonical_key(key), num_samples)
    return jnp.mean(jax.lax.map(squared_norm, keys)) / tree_size(floats)


def spectral_radius(
    cell: Callable[[Any, Any], Any],
    z: PyTree,
    x: PyTree,
    key: Key | None = None,
    *,
    num_steps: int = 40,
) -> FloatScalar:
    r"""An estimate of the spectral radius of the Jacobian of a cell in `z`: by how much
    the plain iteration shrinks an error in each step.

    Watch it in training. Below one the fixed point is stable; where it comes near,
    solvers take more and more steps, and above it the plain iteration diverges. From
    `num_steps` products, of which the first half settles: the mean growth over the rest,
    so that pairs of complex eigenvalues are estimated too. Without derivative.

    **Arguments:**

    - `cell`: `cell(z, x)`.
    - `z`: a pytree of arrays, usually the equilibrium.
    - `x`: the input of the cell.
    - `key`: for the first vector; by default key 0.
    - `num_steps`: the number of products; more of them are more accurate.

    **Returns:**

    A scalar. Under `jax.vmap` one for each example.

    **Raises:**

    `ValueError` for fewer than 2 steps, and for a key that is none.

    ??? cite "Source"

        The power method: von Mises, Pollaczek-Geiringer, 1929.
    """
    check_count(num_steps, "num_steps", 2)
    cell, z, x = stop_gradient((cell, z, x))
    fn, floats = _in_state(cell, z, x)
    _, push = jax.linearize(fn, floats)

    def step(vector: Vector, _: Any) -> tuple[Vector, FloatScalar]:
        product = push(vector)
        norm = tree_norm(product)
        return tree_scale(1 / jnp.where(norm > 0, norm, 1), product), norm

    start = _noise_like(floats, canonical_key(key))
    start = tree_scale(1 / tree_norm(start), start)
    _, growth = jax.lax.scan(step, start, None, num_steps)
    return jnp.exp(jnp.mean(jnp.log(growth[num_steps // 2 :])))


def _in_state(
    cell: Callable[[Any, Any], Any], z: PyTree, x: PyTree
) -> tuple[Callable[[Vector], Vector], Vector]:
    """The cell as a function of the floating-point arrays of its state, and these."""
    floats, rest = split_trainable(z)

    def step(floats):
        return split_trainable(cell(eqx.combine(floats, rest), x))[0]

    return step, floats


def _noise_like(vector: Vector, key: Key) -> Vector:
    """A vector of normal numbers."""
    leaves, structure = jax.tree.flatten(vector)
    keys = jax.random.split(key, len(leaves))
    noise = [
        jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves)
    ]
    return jax.tree.unflatten(structure, noise)
