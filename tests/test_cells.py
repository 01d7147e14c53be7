"""Cells whose fixed point exists, bounded norms, and Jacobians that are watched."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaopt as mo
from cells import normal


SIZE, INPUTS = 6, 3


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def blown_up(cell, factor=30.0):
    """The same cell after training has let its weights grow."""
    return jax.tree.map(lambda a: factor * a if eqx.is_array(a) else a, cell)


def tight(cell, **kwargs):
    exact = mo.ImplicitAdjoint(mo.GMRES(rtol=1e-12))
    solver = mo.Anderson(2000, rtol=1e-12, history_size=10)
    return mo.nn.Equilibrium(cell, solver=solver, adjoint=exact, **kwargs)


@pytest.mark.parametrize("factor", [0.1, 1.0, 30.0])
def test_a_contractive_cell_contracts_whatever_its_weights(factor):
    cell = blown_up(
        mo.nn.ContractiveCell(INPUTS, SIZE, bound=0.8, key=jax.random.key(0)), factor
    )
    x = normal((INPUTS,))
    step = cell.prepare(x)
    pairs = normal((20, 2, SIZE), 1)
    before = jnp.linalg.norm(pairs[:, 0] - pairs[:, 1], axis=-1)
    moved = jax.vmap(jax.vmap(step))(pairs)
    after = jnp.linalg.norm(moved[:, 0] - moved[:, 1], axis=-1)
    assert np.all(after <= 0.8 * before * (1 + 1e-12))
    z, info = mo.nn.Equilibrium(cell, solver=mo.Picard(200, rtol=1e-10))(x)
    assert z.shape == (SIZE,) and info.result == mo.RESULTS.successful


def test_the_derivative_of_a_bounded_norm():
    # Below the bound it is the identity; above, by finite differences.
    matrix = normal((4, 3))
    small = 0.5 * matrix / jnp.linalg.norm(matrix, 2)
    np.testing.assert_array_equal(mo.nn.bound_spectral_norm(small, 0.9), small)
    weights = normal((4, 3), 1)
    value = lambda m: jnp.sum(weights * mo.nn.bound_spectral_norm(m, 0.9))
    for m in (small, matrix):
        slope = jax.grad(value)(m)
        direction = normal((4, 3), 2)
        ends = [value(m + t * direction) for t in (1e-6, -1e-6)]
        np.testing.assert_allclose(
            jnp.sum(slope * direction), (ends[0] - ends[1]) / 2e-6, rtol=1e-7
        )


@pytest.mark.one_of(6)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 5), (40, 40)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_norm_is_never_too_small(shape, scale):
    matrix = scale * normal(shape)
    exact = jnp.linalg.norm(matrix, 2)
    bounded = mo.nn.bound_spectral_norm(matrix, float(exact) / 2)
    reached = float(jnp.linalg.norm(bounded, 2) / exact)
    assert 0.49 <= reached <= 0.5 * (1 + 1e-12)
    identity = jnp.eye(*shape)  # all of its singular values are the same
    slope = jax.grad(lambda m: jnp.sum(mo.nn.bound_spectral_norm(m, 0.5)))(identity)
    assert np.all(np.isfinite(slope))
    zero = jax.grad(lambda m: jnp.sum(mo.nn.bound_spectral_norm(m, 0.5)))(0 * matrix)
    np.testing.assert_array_equal(zero, 1)


@pytest.mark.one_of(3)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_norm_is_bounded_in_any_precision(dtype):
    largest = {"float16": 300.0, "bfloat16": 1e30, "float32": 1e30}[dtype]
    for scale in (largest, 1.0, 1e-3):
        matrix = (scale * normal((16, 16))).astype(dtype)
        bounded = mo.nn.bound_spectral_norm(matrix, 0.9)
        assert bounded.dtype == matrix.dtype
        assert float(jnp.linalg.norm(bounded.astype(float), 2)) <= 0.9 * (1 + 1e-6)
        slope = jax.grad(lambda m: jnp.sum(mo.nn.bound_spectral_norm(m, 0.9)))(matrix)
        assert np.all(np.isfinite(slope.astype(float)))
    tiny = 1e-25 * normal((4, 4)).astype(jnp.float32)
    slope = jax.grad(lambda m: jnp.sum(mo.nn.bound_spectral_norm(m, 0.9)))(tiny)
    np.testing.assert_array_equal(slope, 1)
    nan = mo.nn.bound_spectral_norm(normal((4, 4)).at[0, 0].set(jnp.nan), 0.9)
    assert np.all(np.isnan(nan))


def test_a_norm_is_at_most_two_per_cent_too_large():
    # Furthest from it where all singular values are the same.
    bounded = mo.nn.bound_spectral_norm(3 * jnp.eye(40), 1.0)
    found = np.diag(bounded)
    np.testing.assert_array_equal(bounded, np.diag(found))
    assert np.all((0.98 < found) & (found <= 1))


def test_norms_are_bounded_in_a_pytree():
    layer = eqx.nn.MLP(3, 4, 16, 2, key=jax.random.key(0))
    bounded = mo.nn.bound_spectral_norm(blown_up(layer), 0.7)
    for linear, old in zip(bounded.layers, layer.layers):
        assert float(jnp.linalg.norm(linear.weight, 2)) <= 0.7 + 1e-12
        np.testing.assert_array_equal(linear.bias, 30 * jnp.asarray(old.bias))


def test_a_monotone_cell_has_the_fixed_point_of_relu():
    for factor in (1.0, 5.0):
        cell = blown_up(
            mo.nn.MonotoneCell(INPUTS, SIZE, margin=0.5, key=jax.random.key(0)), factor
        )
        x = normal((INPUTS,))
        z, _ = tight(cell)(x)
        outside = jax.nn.relu(cell.matrix @ z + cell.inputs @ x + cell.bias)
        np.testing.assert_allclose(z, outside, atol=1e-8 * float(jnp.max(z)))
        assert 0 < int(jnp.sum(z > 0)) < SIZE
    # The norm of this matrix is no obstacle.
    assert float(jnp.linalg.norm(cell.matrix, 2)) > 3


@pytest.mark.parametrize("factor", [0.1, 1.0, 30.0])
def test_a_monotone_cell_is_monotone_whatever_its_weights(factor):
    cell = mo.nn.MonotoneCell(INPUTS, SIZE, margin=0.5, key=jax.random.key(0))
    cell = blown_up(cell, factor)
    outside = jnp.eye(SIZE) - cell.matrix
    values = jnp.linalg.eigvalsh((outside + outside.T) / 2)
    assert values[0] >= 0.5 - 1e-12 * values[-1]
    turned = (cell.matrix - cell.matrix.T) / 2
    np.testing.assert_allclose(turned, cell.skew - cell.skew.T, atol=1e-12 * factor**2)


def test_derivatives_of_a_monotone_cell():
    cell = mo.nn.MonotoneCell(INPUTS, SIZE, margin=0.5, key=jax.random.key(0))
    x = normal((INPUTS,))
    value = lambda cell: jnp.sum(jnp.sin(tight(cell)(x)[0]))
    slope = jax.grad(value)(cell)
    direction = jax.tree.map(lambda a: normal(a.shape, 5), cell)
    along = sum(jnp.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (slope, direction))))
    moved = lambda t: value(jax.tree.map(lambda a, d: a + t * d, cell, direction))
    np.testing.assert_allclose(along, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [mo.nn.ContractiveCell, mo.nn.MonotoneCell])
def test_a_cell_prepares_only_once(kind):
    cell = kind(INPUTS, SIZE, key=jax.random.key(0))
    x, z = normal((INPUTS,)), normal((SIZE,), 1)
    np.testing.assert_array_equal(cell(z, x), cell.prepare(x)(z))
    layer = mo.nn.Equilibrium(cell)
    # The logarithms are those of the norm.
    program, once = (
        str(jax.make_jaxpr(fn)(x)) for fn in (lambda x: layer(x)[0], lambda x: cell(z, x))
    )
    assert program.count("= log ") == once.count("= log ") > 0


def spectrum(cell, z, x):
    return np.abs(np.linalg.eigvals(np.asarray(jax.jacfwd(cell)(z, x))))


@pytest.mark.parametrize("turned", [False, True], ids=["real", "complex"])
def test_spectral_radius(turned):
    matrix = jnp.diag(jnp.linspace(0.1, 0.8, SIZE))
    if turned:  # the largest eigenvalues are a pair
        matrix = matrix.at[4:, 4:].set(jnp.array([[0.5, -0.9], [0.6, 0.5]]))
    basis = normal((SIZE, SIZE), 3)
    matrix = basis @ matrix @ jnp.linalg.inv(basis)
    cell = lambda z, x: {"a": jnp.sin(matrix @ z["a"]) + x, "n": z["n"]}
    z = {"a": jnp.zeros(SIZE), "n": jnp.array(3)}
    found = mo.nn.spectral_radius(cell, z, jnp.zeros(SIZE), num_steps=400)
    flat = spectrum(lambda a, x: jnp.sin(matrix @ a) + x, z["a"], jnp.zeros(SIZE))
    np.testing.assert_allclose(found, flat.max(), rtol=0.01)
    assert mo.nn.spectral_radius(lambda z, x: x, z["a"], z["a"]) == 0


def test_first_half_of_a_power_iteration_does_not_count():
    # The first steps grow by 0.3 and not by 0.8: in the mean they would cost 2 per cent.
    weights = jnp.full(SIZE, 0.1).at[0].set(0.8)
    cell, z = lambda z, x: weights * z + x, jnp.zeros(SIZE)
    found = mo.nn.spectral_radius(cell, z, z, num_steps=40)
    # (0.1 / 0.8)^20 is left of the other eigenvectors.
    np.testing.assert_allclose(found, 0.8, rtol=1e-12)


def test_jacobian_penalty():
    weight, x, z = 0.5 * normal((SIZE, SIZE)), normal((SIZE,), 1), normal((SIZE,), 2)
    cell = lambda w: lambda z, x: jnp.tanh(w @ z + x)
    exact = lambda w: jnp.sum(jax.jacfwd(cell(w))(z, x) ** 2) / SIZE
    found = lambda w: mo.nn.jacobian_penalty(cell(w), z, x, num_samples=4000)
    np.testing.assert_allclose(found(weight), exact(weight), rtol=0.05)
    slope, expected = jax.grad(found)(weight), jax.grad(exact)(weight)
    error = jnp.linalg.norm(slope - expected) / jnp.linalg.norm(expected)
    assert error < 0.1
    # The point is held constant, and another key is another estimate.
    in_point = jax.grad(lambda z: mo.nn.jacobian_penalty(cell(weight), z, x))(z)
    np.testing.assert_array_equal(in_point, 0)
    one, other = (
        mo.nn.jacobian_penalty(cell(weight), z, x, jax.random.key(i)) for i in (0, 1)
    )
    assert one != other


def test_a_penalty_lowers_the_spectral_radius():
    weight, x = 0.9 * normal((SIZE, SIZE)) / SIZE**0.5, normal((SIZE,), 1)
    cell = lambda w: lambda z, x: jnp.tanh(w @ z + x)

    @jax.jit
    def penalised(w):
        z, _ = mo.nn.Equilibrium(cell(w))(x)
        return mo.nn.jacobian_penalty(cell(w), z, x, num_samples=8)

    def radius(w):
        z, _ = mo.nn.Equilibrium(cell(w))(x)
        return float(mo.nn.spectral_radius(cell(w), z, x, num_steps=100))

    lower = weight
    for _ in range(20):
        lower = lower - 1.0 * jax.grad(penalised)(lower)
    assert radius(lower) < 0.9 * radius(weight)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: mo.nn.bound_spectral_norm(jnp.ones((2, 2, 2))), "more than two axes"),
        (lambda: mo.nn.bound_spectral_norm(jnp.ones((2, 2)), 0.0), "must be positive"),
        (
            lambda: mo.nn.ContractiveCell(2, 3, bound=1.0, key=jax.random.key(0)),
            r"`bound` must lie in \(0, 1\)",
        ),
        (
            lambda: mo.nn.MonotoneCell(2, 3, margin=0.0, key=jax.random.key(0)),
            r"`margin` must lie in \(0, 1\]",
        ),
        (lambda: mo.nn.MonotoneCell(0, 3, key=jax.random.key(0)), "`input_size` must"),
        (
            lambda: mo.nn.spectral_radius(
                lambda z, x: z, jnp.ones(2), jnp.ones(2), num_steps=1
            ),
            "`num_steps` must be at least 2",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
