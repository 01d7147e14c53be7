"""Anderson acceleration of a fixed-point iteration."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._model_state import AbstractStatePolicy
from .._problem import AbstractFixedPointProblem
from .._results import mask_result, RESULTS
from .._tree import split_trainable, tree_dtype
from .._types import BoolScalar, FloatScalar, IntScalar, Vector
from .._validate import check_count, check_tolerance
from ._base import AbstractBestIterateSolver, StepOutput
from ._common import check_state_policy, check_stopping, problem_optimality


_FEW_STEPS = 10  # of which none says that a solve stalls


class Anderson(AbstractBestIterateSolver):
    r"""Solves a fixed-point problem by Anderson acceleration (Anderson, 1965; the second
    type, in the form of Walker and Ni, 2011).

    Each step applies the map once and combines what it and the steps before it gave so
    that the residual, were the map linear, would be as small as it can be: with
    $f_k = step(z_k)$ and $g_k = f_k - z_k$,

    $$\gamma = \arg\min_\gamma \|g_k - \Delta G \gamma\|^2, \qquad
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
        examples, each a fixed point of its own: each has its own combination, its own
        residual and is held once it has converged. Under `jax.vmap` it is so without.
    - `state_policy`: what becomes of model state, if the problem has any.

    **Raises:**

    `ValueError` for arguments out of range, and where the inner problem is not a fixed
    point.
    """

    num_steps: int = eqx.field(static=True)
    rtol: float | None = eqx.field(static=True)
    atol: float = eqx.field(static=True)
    history_size: int = eqx.field(static=True)
    relaxation: float = eqx.field(static=True)
    regularization: float = eqx.field(static=True)
    per_example: bool = eqx.field(static=True)
    state_policy: AbstractStatePolicy | None

    def __init__(
        self,
        num_steps: int = 100,
        *,
        rtol: float | None = 1e-4,
        atol: float = 0.0,
        history_size: int = 5,
        relaxation: float = 1.0,
        regularization: float = 1e-8,
        per_example: bool = False,
        state_policy: AbstractStatePolicy | None = None,
    ):
        self.num_steps = num_steps
        self.rtol = rtol
        self.atol = atol
        self.history_size = history_size
        self.relaxation = relaxation
        self.regularization = regularization
        self.per_example = per_example
        self.state_policy = state_policy

    def __check_init__(self):
        check_count(self.num_steps, "num_steps")
        check_count(self.history_size, "history_size")
        check_tolerance(self.rtol, "rtol")
        check_tolerance(self.atol, "atol", optional=False)
        check_tolerance(self.regularization, "regularization", optional=False)
        check_tolerance(self.relaxation, "relaxation", optional=False)
        if not 0 < self.relaxation <= 1:
            raise ValueError(f"`relaxation` must lie in (0, 1]; got {self.relaxation!r}.")

    @property
    def stops_early(self):
        return self.rtol is not None

    def check(self, problem, data):
        if not isinstance(problem, AbstractFixedPointProblem):
            raise ValueError(
                f"`Anderson` solves fixed-point problems, and `{type(problem).__name__}` "
                "is none. Use `metaopt.Descent` or `metaopt.OptimistixSolver`."
            )
        check_state_policy(self, problem)
        data.check(self.num_steps)
        check_stopping(self, data, "rtol")

    def optimality(self, problem, params, hyper, batch, key, state):
        return problem_optimality(problem, params, hyper, batch, key, state)

    def init(self, problem, params, hyper):
        examples = Examples.of(params, self.per_example)
        empty = lambda a: jnp.zeros((self.history_size, *a.shape), a.dtype)
        zeros = jax.tree.map(jnp.zeros_like, params)
        size = self.history_size
        return _State(
            applied=zeros,
            residual=zeros,
            applied_history=jax.tree.map(empty, params),
            residual_history=jax.tree.map(empty, params),
            products=jnp.zeros((*examples.shape, size, size), tree_dtype(params)),
            best=params,
            best_norm=jnp.full(examples.shape, jnp.inf, tree_dtype(params)),
            mark=jnp.full((), jnp.inf, tree_dtype(params)),
            mark_step=jnp.zeros((), int),
            step=jnp.zeros((), int),
        )

    def step(self, problem, params, solver_state, hyper, batch, key, model_state):
        out = problem.evaluate(params, hyper, batch, key, model_state)
        old, static = split_trainable(params)
        applied = split_trainable(out.value)[0]
        residual = jax.tree.map(jnp.subtract, applied, old)
        examples = Examples.of(old, self.per_example)
        norm, size = jax.lax.stop_gradient((examples.norm(residual), examples.norm(old)))

        state = solver_state.pushed(applied, residual, examples)
        weights = state.weights(residual, examples, self.regularization)
        new = jax.tree.map(
            lambda a, g, of_a, of_g: self._combined(a, g, of_a, of_g, weights, examples),
            applied,
            residual,
            state.applied_history,
            state.residual_history,
        )
        met = None
        if self.rtol is not None:
            met = norm <= self.atol + self.rtol * size
            # Those that have converged take a plain step, which they are found by.
            new = examples.where(met, applied, new)
        better = norm < state.best_norm
        state = state.passed(
            examples.where(better, applied, state.best),
            jnp.where(better, norm, state.best_norm),
        )
        output = StepOutput(
            monitor=jnp.max(norm),
            converged=None if met is None else jnp.all(met),
            model_state=out.state,
            aux=out.aux,
        )
        return eqx.combine(new, static), state, output

    def conclude(self, params, solver_state, converged):
        best = jax.tree.map(
            lambda new, best: jnp.where(converged, new, best), params, solver_state.best
        )
        return best, mask_result(solver_state.stalls, RESULTS.inner_stagnation)

    def _combined(self, applied, residual, of_applied, of_residual, weights, examples):
        """`z + relaxation * g` less what the differences account for."""
        new = applied - examples.combined(weights, of_applied)
        if self.relaxation != 1:
            rest = residual - examples.combined(weights, of_residual)
            new = new - (1 - self.relaxation) * rest
        return new.astype(applied.dtype)


class Examples(eqx.Module):
    """Whether there is one fixed point or one for each entry of the leading axis.

    **Attributes:**

    - `shape`: that of what there is one of for each fixed point: `()` or `(n,)`.
    """

    shape: tuple[int, ...] = eqx.field(static=True)

    @classmethod
    def of(cls, params: Vector, per_example: bool) -> "Examples":
        """Those of some params.

        **Raises:**

        `ValueError` where a leaf has no such axis.
        """
        if not per_example:
            return cls(())
        leaves = jax.tree.leaves(params)
        sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
        if len(sizes) != 1 or None in sizes:
            shapes = ", ".join(str(leaf.shape) for leaf in leaves)
            raise ValueError(
                "With `per_example=True` the arrays of the params must share their leading "
                f"axis, the one of examples; got shapes {shapes}."
            )
        return cls((leaves[0].shape[0],))

    def norm(self, x: Vector) -> Array:
        """The Euclidean norm of each."""
        dtype = tree_dtype(x)
        axes = lambda a: tuple(range(len(self.shape), a.ndim))
        squares = [jnp.sum(a.astype(dtype) ** 2, axes(a)) for a in jax.tree.leaves(x)]
        return jnp.sqrt(sum(squares))

    def where(self, condition: Array, x: Vector, y: Vector) -> Vector:
        """`x` where the condition of an example holds, else `y`."""

        def leaf(a, b):
            ones = (1,) * (a.ndim - len(self.shape))
            return jnp.where(condition.reshape(*self.shape, *ones), a, b)

        return jax.tree.map(leaf, x, y)

    def products(self, history: Vector, x: Vector) -> Array:
        """The inner products of each entry of a history, `(m, *leaf.shape)`, with a
        vector: an array of shape `(*self.shape, m)`."""
        dtype, batched = tree_dtype(history), len(self.shape)

        def leaf(h, a):
            kept, summed = tuple(range(batched)), tuple(range(batched, a.ndim))
            after = lambda axes: tuple(axis + 1 for axis in axes)
            dims = (after(summed), summed), (after(kept), kept)
            return jax.lax.dot_general(h, a, dims, preferred_element_type=dtype)

        return ft.reduce(jnp.add, jax.tree.leaves(jax.tree.map(leaf, history, x)))

    def combined(self, weights: Array, history: Array) -> Array:
        """The sum over a history, `(m, *shape)`, by weights of shape `(*self.shape, m)`."""
        weights = weights.astype(history.dtype)
        if not self.shape:
            return jnp.tensordot(weights, history, 1)
        return jnp.einsum("bm,mb...->b...", weights, history)


class _State(eqx.Module):
    """What one step leaves for the next; the histories are written in turn."""

    applied: Vector  # the map, applied at the last step
    residual: Vector
    applied_history: Vector  # differences of these, (history_size, ...)
    residual_history: Vector
    products: Array  # of the differences of residuals with each other
    best: Vector
    best_norm: Array
    mark: FloatScalar  # the largest of these when it was last halved, and at which step
    mark_step: IntScalar
    step: IntScalar

    @property
    def stalls(self) -> BoolScalar:
        """Whether the last half of the steps has not halved the residual."""
        return (2 * self.mark_step < self.step) & (self.step > _FEW_STEPS)

    def passed(self, best: Vector, best_norm: Array) -> "_State":
        """With the best iterate after one more step."""
        largest = jnp.max(best_norm)
        halved = 2 * largest <= self.mark
        return eqx.tree_at(
            lambda s: (s.best, s.best_norm, s.mark, s.mark_step, s.step),
            self,
            (
                *(best, best_norm, jnp.where(halved, largest, self.mark)),
                *(jnp.where(halved, self.step, self.mark_step), self.step + 1),
            ),
        )

    def pushed(self, applied: Vector, residual: Vector, examples: Examples) -> "_State":
        """With the differences to the last step in the place of the oldest ones."""
        slot = (self.step - 1) % self.products.shape[-1]
        first = self.step == 0
        difference = lambda new, old: jnp.where(first, 0, new - old).astype(old.dtype)
        of_applied = jax.tree.map(difference, applied, self.applied)
        of_residual = jax.tree.map(difference, residual, self.residual)
        put = lambda history, new: history.at[slot].set(new)
        residual_history = jax.tree.map(put, self.residual_history, of_residual)
        row = examples.products(residual_history, of_residual)
        products = self.products.at[..., slot, :].set(row).at[..., :, slot].set(row)
        return eqx.tree_at(
            lambda s: (
                *(s.applied, s.residual, s.applied_history),
                *(s.residual_history, s.products),
            ),
            self,
            (
                *(applied, residual),
                jax.tree.map(put, self.applied_history, of_applied),
                *(residual_history, products),
            ),
        )

    def weights(self, residual: Vector, examples: Examples, regularization: float) -> Array:
        """What each difference counts for: the least squares solution."""
        right = examples.products(self.residual_history, residual)
        squares = jnp.diagonal(self.products, axis1=-2, axis2=-1)
        # Differences of length one, so that old and new ones are regularised alike. What
        # is not there yet is zero, and gets the weight zero.
        used = squares > 0
        scale = jnp.where(used, jax.lax.rsqrt(jnp.where(used, squares, 1)), 0)
        scaled = self.products * scale[..., :, None] * scale[..., None, :]
        least = jnp.maximum(regularization, 10 * jnp.finfo(squares.dtype).eps)
        ridge = jnp.where(used, least, 1)[..., None] * jnp.eye(squares.shape[-1])
        solved = jnp.linalg.solve(scaled + ridge, (scale * right)[..., None])
        return scale * solved[..., 0]
