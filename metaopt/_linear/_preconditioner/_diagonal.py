"""The diagonal of an operator, estimated from products."""

import equinox as eqx
import jax
import jax.numpy as jnp

from ..._core._tree import tree_dtype, tree_size, tree_zeros_like
from ..._core._validate import check_count
from ._base import AbstractPreconditioner, drawn, products, Refreshed


class DiagonalEstimate(AbstractPreconditioner):
    r"""One over the diagonal of the operator, estimated from products with random signs.

    For signs $v$ the mean of $v \odot A v$ is the diagonal of $A$. Use it where the
    params have scales of their own: features of different units, one penalty for each of
    the params. It knows nothing of what couples them, and an estimate from few samples is
    noisy, so that it can cost more products than it saves.

    An entry of a definite operator's diagonal is positive, and that of an estimate need
    not be. The size of each is taken, and at least its own standard error: what cannot
    be told from zero is not taken for small. (With one sample there is none.) In any case
    it is at least the root of one unit of rounding times the largest entry.

    **Arguments:**

    - `num_samples`: the number of products, made all at once.
    - `refresh_every`: the number of outer steps that one estimate is used for.

    ??? cite "Source"

        Bekas, Kokiopoulou, Saad: *An estimator for the diagonal of a matrix*, 2007.
    """

    num_samples: int = eqx.field(default=10, static=True)
    refresh_every: int = eqx.field(default=1, static=True)

    def __check_init__(self):
        check_count(self.num_samples, "num_samples")
        check_count(self.refresh_every, "refresh_every")

    def init(self, vector):
        wide = lambda a: a.astype(tree_dtype(a))
        zeros = jax.tree.map(wide, tree_zeros_like(vector))
        return Refreshed(zeros, jnp.zeros((), jnp.int32))

    def update(self, operator, state, key, solver_state):
        del solver_state
        count = self.num_samples
        structure = operator.in_structure()

        def make():
            signs = drawn(jax.random.rademacher, key, structure, count)
            images = products(operator, signs)
            return jax.tree.map(self._diagonal, signs, images)

        return state.updated(make, self.refresh_every, count)

    def _diagonal(self, signs, images):
        dtype = tree_dtype(signs)
        samples = signs.astype(dtype) * images.astype(dtype)
        size = jnp.abs(jnp.mean(samples, 0))
        if self.num_samples == 1:
            return size
        return jnp.maximum(size, jnp.std(samples, 0) / (self.num_samples - 1) ** 0.5)

    def apply(self, state, vector):
        return divided_by_diagonal(state.known, vector)


def divided_by_diagonal(diagonal, vector):
    """`vector / diagonal`, entry by entry, the diagonal relative to its largest entry.

    Entries below the root of one unit of rounding, relative to the largest, are raised to
    it, so that an entry which came out as zero by chance, or underflowed, cannot take over.
    A diagonal of zeros is none.
    """
    if tree_size(diagonal) == 0:
        return vector
    leaves = [jnp.max(a) for a in jax.tree.leaves(diagonal) if a.size > 0]
    dtype = tree_dtype(diagonal)
    largest = jnp.max(jnp.stack([a.astype(dtype) for a in leaves]))
    known = largest > 0
    unit = jnp.where(known, largest, 1)
    floor = float(jnp.finfo(dtype).eps) ** 0.5

    def divide(entry, weight):
        relative = weight.astype(dtype) / unit
        relative = jnp.where(known, jnp.maximum(relative, floor), 1)
        return (entry.astype(dtype) / relative).astype(entry.dtype)

    return jax.tree.map(divide, vector, diagonal)
