"""The largest eigenvalues of an operator, from a randomised Nystrom approximation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..._core._tree import tree_dtype, tree_rooms, tree_size, tree_where, with_auto_axes
from ..._core._validate import check_count
from .._base import coarsest_eps
from ._base import AbstractPreconditioner, drawn, products, Refreshed


class LowRank(AbstractPreconditioner):
    r"""The largest eigenvalues of the operator brought down to the smallest of them.

    A randomised Nystrom approximation $U \Lambda U^T$ from `rank` products gives the
    preconditioner $U \lambda \Lambda^{-1} U^T + (I - U U^T)$ with $\lambda$ the smallest
    eigenvalue in $\Lambda$. That lies between the smallest eigenvalue of the operator and
    the largest one that was not found, which is all that it takes: no damping need be
    chosen. Use it where a few eigenvalues stand out, and over many outer steps, in which
    the operator hardly moves: it is used for `refresh_every` of them. For a single solve
    the products that it takes are better spent on steps. It keeps `rank` vectors.

    The products are made all at once, which is faster than one after the other, and takes
    the memory of `rank` of them.

    **Arguments:**

    - `rank`: the number of products, and of eigenvalues.
    - `refresh_every`: the number of outer steps that one approximation is used for.

    ??? cite "Source"

        Frangella, Tropp, Udell: *Randomized Nystrom preconditioning*, 2023. Differences:
        their $\mu$ is zero, because a Hessian has its regularisation in it; and
        eigenvalues come from Gram matrices, which are small and need no transposition of
        pytrees.
    """

    rank: int = eqx.field(static=True)
    refresh_every: int = eqx.field(default=10, static=True)

    def __check_init__(self):
        check_count(self.rank, "rank")
        check_count(self.refresh_every, "refresh_every")

    def init(self, vector):
        rank = min(self.rank, tree_size(vector))
        basis = _wide(tree_rooms(vector, rank))
        weights = jnp.zeros(rank, tree_dtype(vector))
        return Refreshed((basis, weights), jnp.zeros((), jnp.int32))

    def update(self, operator, state, key, solver_state):
        del solver_state
        structure = operator.in_structure()
        rank = min(self.rank, tree_size(structure))
        make = lambda: _basis_and_weights(operator, key, structure, rank)
        return state.updated(make, self.refresh_every, rank)

    def apply(self, state, vector):
        basis, weights = state.known

        def along(basis, vector):
            pairs = zip(jax.tree.leaves(basis), jax.tree.leaves(vector))
            terms = [jnp.tensordot(u, a.astype(u.dtype), a.ndim) for u, a in pairs]
            return sum(term.astype(weights.dtype) for term in terms)

        change = weights * with_auto_axes(along, basis, vector)

        def add(leaf, rows):
            out = leaf.astype(rows.dtype) + jnp.tensordot(
                change.astype(rows.dtype), rows, 1
            )
            return out.astype(leaf.dtype)

        return jax.tree.map(add, vector, basis)


def _basis_and_weights(operator, key, structure, rank):
    """Orthonormal eigenvectors $u_i$, stacked, and $\\lambda / \\lambda_i - 1$ for each;
    zeros for those that rounding hides."""
    probes = drawn(jax.random.normal, key, structure, rank)
    probes = _orthonormal(_orthonormal(_wide(probes)))
    probes = jax.tree.map(lambda a, s: a.astype(s.dtype), probes, structure)
    images, probes = _wide(products(operator, probes)), _wide(probes)
    dtype = tree_dtype(probes)
    eps = float(jnp.finfo(dtype).eps)

    # Shifted, so that rounding leaves the small matrix definite.
    rough = max(eps, coarsest_eps(structure))
    norm = jnp.sqrt(jnp.trace(_gram(images, images)))
    shift = 10 * rough * norm
    images = jax.tree.map(lambda y, p: y + shift.astype(y.dtype) * p, images, probes)
    square = _gram(probes, images)
    factor = jnp.linalg.cholesky((square + square.T) / 2)
    images = _combined(_inverse(factor), images)

    # Of B B^T for B = U S V^T, where U^T is what is sought and S^2 the eigenvalues.
    squares, vectors = jnp.linalg.eigh(_gram(images, images))
    eigenvalues = squares - shift
    kept = eigenvalues > 10 * rank * rough * jnp.max(jnp.abs(eigenvalues))
    scales = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, squares, 1)), 0)
    basis = _combined(scales[:, None] * vectors.T, images)
    basis = _orthonormal(basis, kept)
    least = jnp.min(jnp.where(kept, eigenvalues, jnp.inf))
    ratio = jnp.where(kept, least / jnp.where(kept, eigenvalues, 1), 1)
    # Without kept vectors it is the identity. A matrix that is not finite or not definite
    # leaves NaN, which whoever asked sees.
    basis = tree_where(jnp.any(kept), basis, jax.tree.map(jnp.zeros_like, basis))
    weights = jnp.where(jnp.any(kept), ratio - 1, 0)
    return basis, jnp.where(jnp.all(jnp.isfinite(eigenvalues)), weights, jnp.nan)


def _wide(vectors):
    return jax.tree.map(lambda a: a.astype(tree_dtype(a)), vectors)


def _gram(x, y):
    """The inner products of stacked vectors."""

    def leaf(a, b):
        axes = list(range(1, a.ndim))
        out = jnp.tensordot(a, b, (axes, axes), precision="highest")
        return out.astype(tree_dtype((x, y)))

    def gram(x, y):
        return sum(jax.tree.leaves(jax.tree.map(leaf, x, y)), np.float32(0))

    return with_auto_axes(gram, x, y)


def _combined(matrix, vectors):
    """Linear combinations of stacked vectors."""
    return jax.tree.map(
        lambda a: jnp.tensordot(matrix.astype(a.dtype), a, 1, precision="highest"), vectors
    )


def _inverse(factor):
    identity = jnp.eye(len(factor), dtype=factor.dtype)
    return jax.scipy.linalg.solve_triangular(factor, identity, lower=True)


def _orthonormal(vectors, kept=None):
    """Stacked vectors made orthonormal; rows of zeros, which are not `kept`, stay."""
    gram = _gram(vectors, vectors)
    if kept is not None:
        gram = gram + jnp.diag(jnp.where(kept, 0, 1).astype(gram.dtype))
    return _combined(_inverse(jnp.linalg.cholesky(gram)), vectors)
