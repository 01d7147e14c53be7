"""Norms of vectors whose squares are not numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt._core._tree import divided, scale_and_norm, tree_scaled_norm


@pytest.mark.parametrize(
    "dtype, size",
    [("float64", size) for size in (0.0, 1e-300, 1e-150, 1.0, 1e150, 1e300)]
    + [("float32", size) for size in (0.0, 1e-37, 1e-20, 1.0, 1e20, 1e37)],
)
def test_norm_of_a_vector_of_any_scale(dtype, size):
    # Half precision holds neither of the scales that the other leaves are divided by.
    vector = {
        "a": jnp.asarray([3 * size / 5, 0], dtype),
        "b": jnp.asarray([4 * size / 5], dtype),
        "c": jnp.zeros(2, "float16"),
    }
    np.testing.assert_allclose(tree_scaled_norm(vector), size, rtol=1e-6)
    scale, norm = scale_and_norm(vector)
    unit = divided(vector, scale)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(unit))
    # The square of a residual that is smaller by rounding is a number.
    assert size == 0 or 0 < (norm * jnp.finfo(dtype).eps) ** 2 < jnp.inf
    assert (scale == 1) == (size == 1)
