"""The arithmetic of two coupled iterates, and its inverse."""

import equinox as eqx
import jax
import jax.numpy as jnp

from ..._core._tree import tree_sub
from ..._core._types import FloatScalar, Vector
from .._examples import Examples


class Coupling(eqx.Module):
    """The steps of two iterates, each of which moves towards the map of the other.

    **Attributes:**

    - `relaxation`, `per_example`: as in [`metaopt.ReversiblePicard`][].
    """

    relaxation: float = eqx.field(static=True)
    per_example: bool = eqx.field(static=True)

    def mixed(self, old: Vector, value: Vector) -> Vector:
        """Half of a step: one iterate moves towards the map of the other.

        **Arguments:**

        - `old`: the iterate.
        - `value`: the map at the other one.
        """
        beta = self.relaxation
        return jax.tree.map(
            lambda a, f: ((1 - beta) * a + beta * f).astype(a.dtype), old, value
        )

    def unmixed(self, new: Vector, value: Vector) -> Vector:
        """The inverse of `mixed`, with arguments alike."""
        beta = self.relaxation
        return jax.tree.map(
            lambda a, f: ((a - beta * f) / (1 - beta)).astype(a.dtype), new, value
        )

    def drift(
        self,
        start: Vector,
        ends: tuple[Vector, Vector],
        found: tuple[Vector, Vector],
    ) -> FloatScalar:
        """The distance from the start after undoing the steps.

        **Arguments:**

        - `start`: where both iterates began.
        - `ends`: the iterates after the last step.
        - `found`: the iterates once all steps are undone.

        **Returns:**

        The largest distance over the iterates and the examples, relative to the norm of
        the start or of the end, whichever is larger: the start may well be zero.
        """
        examples = Examples.of(start, self.per_example)

        def relative(end, found):
            distance = examples.norm(tree_sub(found, start))
            size = jnp.maximum(examples.norm(start), examples.norm(end))
            return jnp.max(jnp.where(distance == 0, 0, distance / size))

        return jnp.maximum(*map(relative, ends, found))
