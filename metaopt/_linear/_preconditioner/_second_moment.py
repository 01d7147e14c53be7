"""The second moment that an inner optimizer keeps."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from ..._core._tree import tree_dtype, tree_structs
from ..._core._validate import check_tolerance
from ._base import AbstractPreconditioner
from ._diagonal import divided_by_diagonal


class SecondMoment(AbstractPreconditioner):
    r"""One over $\sqrt{\nu} + \epsilon$, with $\nu$ the second moment of the gradient
    that an optimizer of the Adam type keeps for each of the params.

    It costs no product. The second moments of Adam resemble the diagonal of the Hessian
    where gradients are noise, as with minibatches near a solution. On all of the data it is
    the history of one descent, and can be far from it: compare
    `report.derivative.num_products` with and without. The optimizer must be in a
    [`metaopt.Descent`][].

    **Arguments:**

    - `eps`: $\epsilon$, as a share of the largest $\sqrt{\nu}$.

    ??? cite "Source"

        Kingma, Ba: *Adam: a method for stochastic optimization*, 2015, section 5, on the
        second moment as a diagonal of the Fisher information.
    """

    eps: float = eqx.field(default=1e-3, static=True)

    def __check_init__(self):
        check_tolerance(self.eps, "eps", optional=False)

    def init(self, vector):
        return jax.tree.map(lambda a: jnp.zeros(a.shape, tree_dtype(a)), vector)

    def update(self, operator, state, key, solver_state):
        del key
        found = [
            value
            for path, value in optax.tree_utils.tree_get_all_with_path(solver_state, "nu")
            if isinstance(path[-1], optax.tree_utils.NamedTupleKey)
        ]
        shapes = lambda tree: jax.tree.map(lambda a: a.shape, tree_structs(tree))
        if len(found) != 1 or shapes(found[0]) != shapes(state):
            kept = f"{len(found)} of them" if found else "none"
            raise ValueError(
                "`SecondMoment` needs the one second moment that an optimizer of the Adam "
                f"type keeps for all of the params, and the inner solver keeps {kept}. Use "
                "`metaopt.Descent(optax.adam(...), num_steps=...)`, or "
                "`metaopt.linear.DiagonalEstimate()`, which needs products only."
            )
        roots = jax.tree.map(
            lambda nu, a: jnp.sqrt(jnp.maximum(jax.lax.stop_gradient(nu), 0)).astype(a),
            found[0],
            jax.tree.map(lambda a: a.dtype, state),
        )
        dtype = tree_dtype(roots)
        sizes = [jnp.max(a).astype(dtype) for a in jax.tree.leaves(roots) if a.size > 0]
        eps = self.eps * jnp.max(jnp.stack(sizes))
        known = jax.tree.map(lambda a: a + eps.astype(a.dtype), roots)
        return known, jnp.zeros((), jnp.int32)

    def apply(self, state, vector):
        return divided_by_diagonal(state, vector)
