"""Matrices whose spectral norm is bounded."""

import equinox as eqx
import jax
import jax.numpy as jnp

from .._core._tree import leaf_names, wide_dtype
from .._core._types import FloatScalar, PyTree
from .._core._validate import check_tolerance


_NUM_SQUARINGS = 8


def bound_spectral_norm(tree: PyTree, bound: float = 0.9) -> PyTree:
    """A cell whose matrices have a spectral norm of at most `bound`.

    Each matrix whose norm is larger is divided by what it has too much, as an estimate
    says that is never too small and at most 2 % too large. A cell of one matrix and an
    activation that does not stretch (tanh, ReLU) is then a contraction for `bound < 1`:
    it has one fixed point, and every solver finds it. Use it on the cell in the loss, where
    its derivative is taken, or after each step of the optimizer:

    ```python
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import metaopt as mo

    matrix = jnp.array([[3.0, 1.0], [0.0, 0.5]])
    bounded = mo.nn.bound_spectral_norm(matrix, 0.9)
    jnp.linalg.norm(bounded, 2)  # 0.9, or a little less
    ```

    It takes eight products of matrices of the smaller size. `equinox.nn.SpectralNorm` and
    `equinox.nn.WeightNorm` work in a cell as well; the former follows the norm by steps of
    the power method, the latter does not bound it.

    **Arguments:**

    - `tree`: an array of shape `(n, m)`, or a pytree of arrays, such as a cell. Vectors
        and scalars pass unchanged.
    - `bound`: what no spectral norm will be above; positive.

    **Returns:**

    A pytree like `tree`.

    **Raises:**

    `ValueError` for arrays of more than two axes, whose norm as a map (a convolution,
    say) is not that of a matrix; and for a bound that is not positive.

    ??? cite "Source"

        Miyato, Kataoka, Koyama, Yoshida: *Spectral normalization for generative
        adversarial networks*, 2018; with a bound as in Gouk et al., 2021, and the norm as
        in Delattre et al., 2023.
    """
    check_tolerance(bound, "bound", optional=False)
    if bound == 0:
        raise ValueError("`bound` must be positive; got 0.")
    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(arrays)
    for name, leaf in zip(leaf_names(arrays, "tree"), leaves, strict=True):
        if leaf.ndim > 2:
            raise ValueError(
                f"`{name}` has shape {leaf.shape}. The norm of arrays with more than two "
                "axes as maps is not that of a matrix: bound them in the cell itself."
            )
    bounded = [_bounded(leaf, bound) if leaf.ndim == 2 else leaf for leaf in leaves]
    return eqx.combine(jax.tree.unflatten(structure, bounded), rest)


def _bounded(matrix: jax.Array, bound: float) -> jax.Array:
    if matrix.size == 0:
        return matrix
    wide = matrix.astype(wide_dtype(matrix.dtype))
    norm = spectral_norm(wide)
    if wide.dtype != matrix.dtype:
        # Rounding to the dtype of the matrix may stretch it again.
        norm = norm * (1 + float(jnp.finfo(matrix.dtype).eps) * max(matrix.shape) ** 0.5)
    over = ~(norm <= bound)  # or not a number
    return (wide * jnp.where(over, bound / jnp.where(over, norm, 1), 1)).astype(
        matrix.dtype
    )


def spectral_norm(matrix: jax.Array) -> FloatScalar:
    r"""The spectral norm of a matrix, from above.

    Squaring a matrix squares its singular values, so that after $k$ squarings the largest
    one is all that is left in the Frobenius norm: $\|W\|_2 \le \|G_k\|_F^{1 / 2^k}$ with
    $G_{k + 1} = G_k^T G_k$, which for $n$ columns is at most $n^{1 / 2^{k + 1}}$ times too
    much. Unlike the power method it never is too small, and it has a derivative where
    singular values are equal; unlike a decomposition it is made of products alone.
    """
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(matrix)))
    is_zero = largest == 0
    scale = jnp.where(is_zero, 1, largest)
    power = jnp.where(is_zero, 1, matrix / scale)
    power = power if power.shape[0] >= power.shape[1] else power.T
    log_scale = jnp.zeros((), matrix.dtype)
    for _ in range(_NUM_SQUARINGS):
        size = jnp.linalg.norm(power)
        power = power / size
        power = jnp.matmul(power.T, power, precision=jax.lax.Precision.HIGHEST)
        log_scale = 2 * (log_scale + jnp.log(size))
    last = log_scale + jnp.log(jnp.linalg.norm(power))
    return jnp.where(is_zero, 0, scale * jnp.exp(last / 2**_NUM_SQUARINGS))
