"""Anderson acceleration of a fixed-point iteration."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._core._tree import tree_dtype, tree_sub
from .._core._types import IntScalar, Vector
from .._core._validate import check_count, check_tolerance
from .._problem import AbstractStatePolicy
from ._examples import Examples
from ._fixed_point import (
    AbstractAcceleratedSolver,
    AbstractSingleMapSolver,
    Applied,
    as_budget,
    check_relaxation,
    Progress,
)


class Anderson(AbstractAcceleratedSolver, AbstractSingleMapSolver):
    r"""Solves a fixed-point problem by Anderson acceleration (Anderson, 1965; the second
    type, in the form of Walker and Ni, 2011).

    Each step applies the map once and combines what it and the steps before it gave so
    that the residual, were the map linear, would be as small as it can be: with
    $f_k = step(z_k)$ and $g_k = f_k - z_k$,

    $$\gamma = \mathrm{arg}\min_\gamma \|g_k - \Delta G \gamma\|^2, \qquad
    z_{k+1} = f_k - \Delta F \gamma$$

    over differences of the last `history_size` steps. It needs far fewer steps than
    [`metaopt.Picard`][] where contraction is slow, and converges for some maps that are
    no contraction. Memory is that of `2 * history_size` params.

    A solve that does not meet its tolerance returns the best iterate that it met, and
    says whether the residual was still falling.

    **Arguments:**

    - `num_steps`: the most steps that are taken.
    - `rtol`, `atol`: stop once the Euclidean norm of `step(params) - params` is at most
        `atol + rtol * norm(params)`. With `rtol=None` all the steps are taken.
    - `history_size`: how many differences are combined.
    - `relaxation`: how much of the step is taken in the directions that the differences
        say nothing of; in (0, 1], below 1 tames maps that overshoot.
    - `regularization`: what is added to the squared norms of the differences, relative
        to them.
    - `per_example`: whether the leading axis of every array of the params is one of
        examples, each a fixed point of its own, with its own combination and
        residual, and held once it has converged. Under `jax.vmap` it is so without.
    - `budget`: the most steps that are taken in this call, at most `num_steps`: an integer
        array, which can change without compiling again.
    - `state_policy`: what becomes of model state, if the problem has any.

    **Raises:**

    `ValueError` for arguments out of range, and where the inner problem is not a fixed
    point.
    """

    num_steps: int = eqx.field(default=100, static=True)
    rtol: float | None = eqx.field(default=1e-4, kw_only=True, static=True)
    atol: float = eqx.field(default=0.0, kw_only=True, static=True)
    history_size: int = eqx.field(default=5, kw_only=True, static=True)
    relaxation: float = eqx.field(default=1.0, kw_only=True, static=True)
    regularization: float = eqx.field(default=1e-8, kw_only=True, static=True)
    per_example: bool = eqx.field(default=False, kw_only=True, static=True)
    budget: IntScalar | None = eqx.field(default=None, converter=as_budget, kw_only=True)
    state_policy: AbstractStatePolicy | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        check_count(self.history_size, "history_size")
        check_tolerance(self.regularization, "regularization", optional=False)
        check_relaxation(self.relaxation)

    def begin(self, params: Vector, examples: Examples) -> "_History":
        # One place more than differences, for the last of the values between them.
        size = self.history_size + 1
        empty = examples.rooms(params, size)
        return _History(
            values=empty,
            residuals=examples.rooms(params, 2),
            of_residuals=empty,
            products=jnp.zeros((*examples.shape, size, size), tree_dtype(params)),
            right=jnp.zeros((*examples.shape, size), tree_dtype(params)),
        )

    def advance(
        self, at: Applied, memory: "_History", progress: Progress
    ) -> tuple[Vector, "_History"]:
        memory = memory.pushed(at, progress.step)
        weights = memory.weights(self.regularization)
        # The map's value, less what the differences account for.
        of_values = at.examples.combined_differences(weights, memory.values)
        new = tree_sub(at.value, of_values)
        if self.relaxation != 1:
            of_residuals = at.examples.combined(weights, memory.of_residuals)
            short = 1 - self.relaxation
            new = jax.tree.map(
                lambda z, g, d: (z - short * (g - d)).astype(z.dtype),
                *(new, at.residual, of_residuals),
            )
        return new, memory


class _History(eqx.Module):
    """The last steps, which are written in turn into `history_size + 1` places.

    Compiled loops write an array in place where it is read after that alone. So the last
    residual lies in one of two places, and the other is written before it is read.

    **Attributes:**

    - `values`: of the map. Its differences are made when they are combined.
    - `residuals`: those of the last two steps.
    - `of_residuals`: at the place of each step, the difference of the next residual and
        that of the step. The place of the last step holds nothing of use.
    - `products`: of the differences of residuals with each other; zero for the last step.
    - `right`: their products with the residual.
    """

    values: Vector
    residuals: Vector
    of_residuals: Vector
    products: Array
    right: Array

    def pushed(self, at: Applied, step: IntScalar) -> "_History":
        """The history with the difference to the last step in the place of the oldest."""
        examples, size = at.examples, self.right.shape[-1]
        slot, last = step % size, (step + size - 1) % size
        residuals = examples.put(self.residuals, step % 2, at.residual)
        before = examples.entry(residuals, (step + 1) % 2)
        difference = jax.tree.map(
            lambda new, old: jnp.where(step == 0, 0, new - old).astype(old.dtype),
            *(at.residual, before),
        )
        history = examples.put(self.of_residuals, last, difference)
        places = jnp.arange(size)
        here, before_here = places == slot, places == last
        right = jnp.where(here, 0, examples.products(history, at.residual))
        # The histories are the largest arrays here, and each is read once: the products
        # of a difference with the others are differences of their products.
        square = examples.dot(difference, difference)[..., None]
        row = jnp.where(here, 0, jnp.where(before_here, square, right - self.right))
        across, down = row[..., None, :], row[..., :, None]
        products = jnp.where(before_here, down, self.products)
        products = jnp.where(before_here[:, None], across, products)
        products = jnp.where(here | here[:, None], 0, products)
        return _History(
            values=examples.put(self.values, slot, at.value),
            residuals=residuals,
            of_residuals=history,
            products=products,
            right=right,
        )

    def weights(self, regularization: float) -> Array:
        """The weight of each difference: the least squares solution."""
        size = self.right.shape[-1]
        unit = jnp.eye(size, dtype=self.products.dtype)
        squares = jnp.sum(self.products * unit, axis=-1)
        # Differences of length one, so that old and new ones are regularised alike. Missing
        # differences are zero, and get the weight zero.
        used = squares > 0
        scale = jnp.where(used, jax.lax.rsqrt(jnp.where(used, squares, 1)), 0)
        scaled = self.products * scale[..., :, None] * scale[..., None, :]
        least = max(regularization, 10 * float(jnp.finfo(squares.dtype).eps))
        ridge = jnp.where(used, least, 1).astype(squares.dtype)[..., None] * unit
        solved = _eliminated(scaled + ridge, scale * self.right, least)
        return scale * solved


def _eliminated(matrix: Array, right: Array, least: float) -> Array:
    """Solve small positive definite systems by Gauss-Jordan elimination.

    Needs no pivoting there (Higham, 2002, section 14.4). Rounding can make a pivot smaller
    than the ridge that was added, which bounds it from below.
    """
    size = right.shape[-1]
    rows = jnp.concatenate([matrix, right[..., None]], axis=-1)

    def eliminate(k, rows):
        row = jax.lax.dynamic_index_in_dim(rows, k, -2)
        column = jax.lax.dynamic_index_in_dim(rows, k, -1)
        pivot = jax.lax.dynamic_index_in_dim(row, k, -1)
        row = row / jnp.maximum(pivot, least)
        is_pivot = jnp.arange(size)[:, None] == k
        return jnp.where(is_pivot, row, rows - column * row)

    return jax.lax.fori_loop(0, size, eliminate, rows)[..., -1]
