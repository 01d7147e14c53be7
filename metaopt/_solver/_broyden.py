"""Broyden's method with limited memory, for fixed points."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._core._tree import tree_add, tree_dtype, tree_sub
from .._core._types import IntScalar, Vector
from .._core._validate import check_count
from .._linear import AbstractInverse
from .._problem import AbstractStatePolicy
from ._examples import Examples
from ._fixed_point import (
    AbstractAcceleratedSolver,
    AbstractSingleMapSolver,
    Applied,
    as_budget,
    Progress,
)


_LEAST_CURVATURE = 0.1  # of an update, relative to the squared length of its step
_GROWTH = 2.0  # of a residual over the best one, from which there is a new beginning
_SHORTEST = 0.1


class Broyden(AbstractAcceleratedSolver, AbstractSingleMapSolver):
    r"""Solves a fixed-point problem by Broyden's method (Broyden, 1965, the first type),
    with a limited memory and safeguards.

    With the residual $g(z) = step(z) - z$, each step applies the map once and goes to
    $z + H g$, where $H$ approximates $(I - J)^{-1}$, $J$ being the Jacobian of the map.
    It is the identity at first, and each step adds to it a term of rank one. Its memory
    is that of `2 * history_size` params.

    The plain method diverges without a word. Here the denominator of an update is kept
    away from zero (Powell, 1970); a full memory starts anew (Kelley, 2003), because what
    it holds is no approximation once the oldest term is gone; and where the residual
    grows to more than twice the best one, the next step goes back by half of the last
    one.

    Use it where its inverse is wanted for the derivative, with [`metaopt.linear.SHINE`][].
    [`metaopt.Anderson`][] needs less memory and is the first choice otherwise. A solve
    that does not meet its tolerance returns the best iterate that it met, and says
    whether the residual was still falling.

    **Arguments:**

    - `num_steps`: the most steps that are taken.
    - `rtol`, `atol`: stop once the Euclidean norm of `step(params) - params` is at most
        `atol + rtol * norm(params)`. With `rtol=None` all the steps are taken.
    - `history_size`: how many terms are kept. If the inverse is shared with the derivative,
        use as many as a solve takes steps, because a restarted memory holds little.
    - `per_example`: whether the leading axis of every array of the params is one of
        examples, each a fixed point of its own, with its own inverse and its own residual,
        and held once it has converged. Under `jax.vmap` it is so without.
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
    history_size: int = eqx.field(default=10, kw_only=True, static=True)
    per_example: bool = eqx.field(default=False, kw_only=True, static=True)
    budget: IntScalar | None = eqx.field(default=None, converter=as_budget, kw_only=True)
    state_policy: AbstractStatePolicy | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        check_count(self.history_size, "history_size")

    def begin(self, params: Vector, examples: Examples) -> "_Memory":
        zeros = jax.tree.map(jnp.zeros_like, params)
        return _Memory(
            inverse=BroydenInverse.identity(params, examples, self.history_size),
            direction=zeros,
            residual=zeros,
            length=jnp.ones(examples.shape, tree_dtype(params)),
            held=jnp.zeros(examples.shape, bool),
        )

    def advance(
        self, at: Applied, memory: "_Memory", progress: Progress
    ) -> tuple[Vector, "_Memory"]:
        """A step of the secant method, or back by half of the last one."""
        examples, length = at.examples, memory.length
        first = progress.step == 0
        # A comparison with NaN is false: what is not finite is a failure of the loop.
        grew = ~first & (at.norm > _GROWTH * progress.best_norm)
        back = grew & (length > _SHORTEST)
        anew = first | (grew & ~back)

        inverse, direction = memory.updated(at)
        direction = examples.where(back, memory.direction, direction)
        direction = examples.where(anew, at.residual, direction)
        new = examples.axpy(jnp.where(back, -length / 2, 1), direction, at.params)
        # An example that was held has taken no step to learn from.
        held = memory.held
        return new, _Memory(
            inverse=inverse.where(back | held, memory.inverse).emptied(anew & ~held),
            direction=direction,
            residual=examples.where(back, memory.residual, at.residual),
            length=jnp.where(back, length / 2, 1),
            held=at.settled,
        )


class BroydenInverse(AbstractInverse):
    r"""The identity and terms of rank one, $I + \sum_i u_i v_i^T$.

    The last term is not among the others yet. It is put there before they are read, and not
    when it is known, which is after that: compiled loops can then write in place, where
    they would copy everything.

    **Attributes:**

    - `left`, `right`: the vectors $u_i$ and $v_i$, histories of `examples`.
    - `last_left`, `last_right`: those of the last term.
    - `count`: how many terms there are, for each fixed point.
    - `examples`: how many fixed points there are.
    - `size`: how many terms there is room for.
    """

    left: Vector
    right: Vector
    last_left: Vector
    last_right: Vector
    count: Array
    examples: Examples
    size: int = eqx.field(static=True)

    @classmethod
    def identity(cls, params: Vector, examples: Examples, size: int) -> "BroydenInverse":
        """The identity, with room for terms."""
        zero = jax.tree.map(jnp.zeros_like, params)
        zeros = examples.rooms(params, size)
        count = jnp.zeros(examples.shape, jnp.int32)
        return cls(zeros, zeros, zero, zero, count, examples, size)

    def apply(self, vector):
        return self.written().apply_written(vector)

    def apply_written(self, vector: Vector) -> Vector:
        """The same, where the last term is among the others."""
        weights = self.examples.products(self.right, vector)
        counts = jnp.arange(weights.shape[-1]) < self.count[..., None]
        weights = jnp.where(counts, weights, 0)
        return tree_add(vector, self.examples.combined(weights, self.left))

    def norm(self, vector):
        return self.examples.norm(vector)

    def choose(self, condition, x, y):
        return self.examples.where(condition, x, y)

    def transposed(self):
        return dataclasses.replace(
            self,
            left=self.right,
            right=self.left,
            last_left=self.last_right,
            last_right=self.last_left,
        )

    def written(self) -> "BroydenInverse":
        """With the last term among the others."""
        slot = jnp.maximum(self.count - 1, 0)
        put = self.examples.put
        return dataclasses.replace(
            self,
            left=put(self.left, slot, self.last_left),
            right=put(self.right, slot, self.last_right),
        )

    def with_term(self, left: Vector, right: Vector) -> "BroydenInverse":
        """With one more term, there being room for it and the last one being written."""
        return dataclasses.replace(
            self, last_left=left, last_right=right, count=self.count + 1
        )

    def where(self, condition: Array, old: "BroydenInverse") -> "BroydenInverse":
        """The inverse without its last term where the condition of an example holds."""
        where = self.examples.where
        return dataclasses.replace(
            self,
            last_left=where(condition, old.last_left, self.last_left),
            last_right=where(condition, old.last_right, self.last_right),
            count=jnp.where(condition, old.count, self.count),
        )

    def emptied(self, condition: Array) -> "BroydenInverse":
        """The identity where the condition of an example holds."""
        return dataclasses.replace(self, count=jnp.where(condition, 0, self.count))


class _Memory(eqx.Module):
    """The state that one step leaves for the next.

    **Attributes:**

    - `inverse`: $H$.
    - `residual`, `direction`: $g$ and $d = H g$ where the last step began.
    - `length`: how much of the direction was taken, for each fixed point.
    - `held`: whether none of it was, because the point was the answer.
    """

    inverse: BroydenInverse
    residual: Vector
    direction: Vector
    length: Array
    held: Array

    def updated(self, at: Applied) -> tuple[BroydenInverse, Vector]:
        r"""The inverse after the update for the last step, and the next direction.

        With the step $s = t d$ and the change $y = g - g'$ of the residual, that is $y = (I
        - J) s$ for a linear map, $H' = H + (s - H y) (H^T s)^T / s^T H y$. If $s^T H y$ is
        too small, $y$ is replaced by a mean of itself and of $H^{-1} s$.
        """
        examples = at.examples
        full = self.inverse.count >= self.inverse.size
        inverse = self.inverse.written().emptied(full)
        step = examples.scale(self.length, self.direction)
        ahead = inverse.apply_written(at.residual)
        before = examples.where(full, self.residual, self.direction)
        change = tree_sub(before, ahead)  # H y
        squared = examples.dot(step, step)
        moves = squared > 0
        curvature = examples.dot(step, change) / jnp.where(moves, squared, 1)
        least = jnp.where(curvature < 0, -_LEAST_CURVATURE, _LEAST_CURVATURE)
        small = jnp.abs(curvature) < _LEAST_CURVATURE
        share = jnp.where(small, (1 - least) / jnp.where(small, 1 - curvature, 1), 1)
        curvature = jnp.where(small, least, curvature)
        factor = jnp.where(moves, share / jnp.where(moves, curvature * squared, 1), 0)
        left = examples.scale(factor, tree_sub(step, change))
        right = inverse.transposed().apply_written(step)
        along = examples.dot(right, at.residual)
        return inverse.with_term(left, right), examples.axpy(along, left, ahead)
