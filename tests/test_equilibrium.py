"""Equilibrium layers and their solvers: right answers, or a word that they are not."""

import functools as ft
import importlib.util

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import metaopt as mo
from cells import contraction, INPUTS, normal, Scales, Tanh, value_of, WIDTH


BATCH = 4


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


class Residual(eqx.Module):
    """Two layers around a connection that passes half of the state."""

    inner: Tanh

    def __init__(self):
        self.inner = Tanh(0.4)

    def __call__(self, z, x):
        return 0.5 * z + 0.5 * self.inner(jnp.sin(z), x)


class Attention(eqx.Module):
    """Tokens that look at each other, with the input added; states `(tokens, width)`."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    inputs: jax.Array

    def __init__(self):
        self.query, self.key = contraction(seed=3), contraction(seed=4)
        self.value, self.inputs = contraction(norm=0.4, seed=5), normal((WIDTH, INPUTS), 6)

    def __call__(self, z, x):
        scores = (z @ self.query) @ (z @ self.key).T / WIDTH**0.5
        mixed = jax.nn.softmax(scores, axis=-1) @ (z @ self.value)
        places = jnp.sin(jnp.arange(5.0))[:, None]  # or all tokens would be the same
        return jnp.tanh(mixed + self.inputs @ x + places)


CELLS = {
    "tanh": (Tanh, lambda x: jnp.zeros(WIDTH)),
    "residual": (Residual, lambda x: jnp.zeros(WIDTH)),
    "attention": (Attention, lambda x: jnp.zeros((5, WIDTH))),
    "two scales": (Scales, lambda x: {"fine": jnp.zeros(WIDTH), "coarse": jnp.zeros(2)}),
}
EXACT = mo.ImplicitAdjoint(mo.GMRES(rtol=1e-12), error=None)  # compared with the truth


def unrolled(cell, initial, x, num_steps=400):
    """The layer by plain JAX: the cell, again and again."""
    step = lambda _, z: cell(z, x)
    return jax.lax.fori_loop(0, num_steps, step, initial(x))


def assert_close(a, b, rtol=1e-8):
    leaves = (jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for tree in (a, b))
    for x, y in zip(*leaves, strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * float(np.max(np.abs(y))))


@pytest.mark.one_of(6)
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(
    "solver",
    [
        mo.Anderson(200, rtol=1e-13),
        mo.Broyden(200, rtol=1e-13),
        mo.NewtonKrylov(rtol=1e-13),
        mo.Picard(400, rtol=1e-13),
    ],
    ids=["anderson", "broyden", "newton krylov", "picard"],
)
def test_value_and_gradient_are_those_of_unrolling_to_convergence(name, solver):
    make, initial = CELLS[name]
    cell, x = make(), normal((INPUTS,), 9)
    layer = mo.nn.Equilibrium(cell, initial, solver=solver, adjoint=EXACT)

    def ours(cell, x):
        return value_of(eqx.tree_at(lambda m: m.cell, layer, cell)(x)[0])

    def plain(cell, x):
        return value_of(unrolled(cell, initial, x, 300))

    both = [
        eqx.filter_jit(eqx.filter_value_and_grad(lambda args, fn=fn: fn(*args)))((cell, x))
        for fn in (ours, plain)
    ]
    assert float(np.linalg.norm(both[1][1][1])) > 1e-3
    assert_close(both[0], both[1])


@pytest.mark.ci
def test_one_layer_under_vmap_is_one_for_each_example():
    cell, initial = Tanh(), CELLS["tanh"][1]
    layer = mo.nn.Equilibrium(cell, initial, solver=mo.Anderson(rtol=1e-12), adjoint=EXACT)
    x = normal((BATCH, INPUTS)) * jnp.asarray([[0.01], [1.0], [2.0], [5.0]])
    z, info = jax.vmap(layer)(x)
    assert info.num_steps.shape == info.residual.shape == (BATCH,)
    assert len(set(info.num_steps.tolist())) > 1
    assert np.all(np.asarray(info.residual) <= 1e-11)
    for row, one in zip(z, x):
        np.testing.assert_allclose(row, layer(one)[0], rtol=1e-12)

    total = lambda layer: jnp.sum(jax.vmap(layer)(x)[0] ** 2)
    by_hand = lambda cell: jnp.sum(jax.vmap(ft.partial(unrolled, cell, initial))(x) ** 2)
    assert_close(eqx.filter_grad(total)(layer).cell, jax.grad(by_hand)(cell))


def test_examples_of_one_state_converge_each_for_itself():
    weight, x = contraction(norm=0.95), normal((BATCH, WIDTH), 1)
    x = x * jnp.asarray([[0.01], [1.0], [2.0], [5.0]])
    problem = mo.FixedPointProblem(lambda z, hyper, _: jnp.tanh(z @ hyper.T + x))
    solver = mo.Anderson(100, rtol=1e-10, per_example=True)
    found = mo.solve_inner(
        problem, weight, params=jnp.zeros((BATCH, WIDTH)), solver=solver, adjoint=EXACT
    )
    expected = jax.vmap(
        lambda x: mo.solve_inner(
            mo.FixedPointProblem(lambda z, hyper, _: jnp.tanh(hyper @ z + x)),
            weight,
            params=jnp.zeros(WIDTH),
            solver=mo.Anderson(100, rtol=1e-10),
            adjoint=EXACT,
        ).stats["num_steps"]
    )(x)
    # As many steps as the slowest takes alone.
    assert int(found.stats["num_steps"]) == int(expected.max())
    assert len(set(expected.tolist())) > 1

    # A layer says how each of them was found; it once had one number for all.
    layer = mo.nn.Equilibrium(lambda z, x: jnp.tanh(z @ weight.T + x), solver=solver)
    z, info = layer(x)
    assert info.residual.shape == (BATCH,)
    by_hand = jnp.linalg.norm(jnp.tanh(z @ weight.T + x) - z, axis=1)
    np.testing.assert_allclose(info.residual, by_hand / jnp.linalg.norm(z, axis=1), 1e-3)


def test_an_error_inside_of_a_cell_says_what_the_cell_was_given():
    layer = mo.nn.Equilibrium(Tanh(), lambda x: jnp.zeros(WIDTH + 1))
    with pytest.raises(TypeError) as raised:
        layer(normal((INPUTS,)))
    assert f"({WIDTH + 1},), 'float64'" in "".join(raised.value.__notes__)


def test_a_second_call_does_not_compile_again():
    count = 0

    class Counting(Tanh):
        def __call__(self, z, x):
            nonlocal count
            count += 1
            return super().__call__(z, x)

    layer = mo.nn.Equilibrium(Counting(), CELLS["tanh"][1])  # pyright: ignore[reportCallIssue]
    gradient = eqx.filter_jit(eqx.filter_grad(lambda layer, x: value_of(layer(x)[0])))
    gradient(layer, normal((INPUTS,)))
    before = count
    other = jax.tree.map(lambda a: 0.9 * a if eqx.is_array(a) else a, layer)
    gradient(other, normal((INPUTS,), 1))
    assert count == before > 0


def test_second_derivatives():
    cell, initial = Tanh(), CELLS["tanh"][1]
    solver = mo.Anderson(200, rtol=1e-13)
    layer = mo.nn.Equilibrium(cell, initial, solver=solver, adjoint=EXACT)
    x = normal((INPUTS,), 9)
    hessians = [
        jax.jit(jax.hessian(fn))(x)
        for fn in (
            lambda x: value_of(layer(x)[0]),
            lambda x: value_of(unrolled(cell, initial, x, 200)),
        )
    ]
    assert np.linalg.norm(hessians[1]) > 1e-2
    assert_close(*hessians, rtol=1e-6)


@pytest.mark.parametrize(
    "adjoint, cosine",
    [
        (mo.OneStepAdjoint(), 0.75),
        (mo.ImplicitAdjoint(mo.Neumann(2)), 0.9),
        (mo.UnrolledAdjoint(), 1 - 1e-12),
    ],
    ids=["one step", "phantom", "unrolled"],
)
def test_other_adjoints(adjoint, cosine):
    cell, initial = Tanh(0.8), CELLS["tanh"][1]
    x = normal((INPUTS,), 9)
    solver = mo.Picard(200, rtol=None)
    layer = mo.nn.Equilibrium(cell, initial, solver=solver, adjoint=adjoint)
    ours = jax.jit(jax.grad(lambda x: value_of(layer(x)[0])))(x)
    exact = jax.grad(lambda x: value_of(unrolled(cell, initial, x)))(x)
    found = jnp.vdot(ours, exact) / jnp.linalg.norm(ours) / jnp.linalg.norm(exact)
    assert found >= cosine
    if cosine < 0.99:
        assert not np.allclose(ours, exact, rtol=1e-5)


@pytest.mark.ci
def test_errors_of_approximate_derivatives():
    """At a norm of 0.8: the last step alone keeps the direction, and terms of the series
    gain a digit for two or three of them."""
    cell, initial = Tanh(0.8, 64), lambda x: jnp.zeros(64)
    x, cotangent = normal((INPUTS,), 9), normal((64,), 10)
    solver = mo.Anderson(200, rtol=1e-12)

    @eqx.filter_jit
    def slope(cell, linear):
        adjoint = mo.ImplicitAdjoint(linear)
        layer = mo.nn.Equilibrium(cell, initial, solver=solver, adjoint=adjoint)
        return jnp.vdot(cotangent, layer(x)[0])

    exact, *series = (
        eqx.filter_grad(slope)(cell, linear).weight
        for linear in (mo.GMRES(rtol=1e-12), *map(mo.Neumann, (0, 3, 5, 10)))
    )
    errors = [jnp.linalg.norm(a - exact) / jnp.linalg.norm(exact) for a in series]
    assert np.all(np.asarray(errors) < [0.4, 2e-2, 2e-3, 1e-5])
    assert np.all(np.asarray(errors) > [0.1, 1e-3, 1e-5, 1e-9])
    cosine = jnp.vdot(series[0], exact) / jnp.linalg.norm(series[0])
    assert 0.9 < cosine / jnp.linalg.norm(exact) < 0.995


@pytest.mark.ci
def test_memory_does_not_grow_with_the_steps():
    def temporaries(adjoint, num_steps):
        solver = mo.Anderson(num_steps, rtol=None)
        layer = mo.nn.Equilibrium(
            Tanh(0.7, 64),
            lambda x: jnp.zeros(64),
            solver=solver,
            adjoint=adjoint,
            throw=False,
        )
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(jax.vmap(layer)(x)[0])))
        compiled = gradient.lower(normal((32, INPUTS))).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    implicit = mo.ImplicitAdjoint(mo.GMRES(rtol=1e-4))
    assert temporaries(implicit, 800) <= 1.2 * temporaries(implicit, 10)
    plain = mo.UnrolledAdjoint()
    assert temporaries(plain, 800) > 20 * temporaries(plain, 10)


def test_a_start_from_the_input_is_no_derivative():
    cell = Tanh()
    x = normal((INPUTS,), 9)
    solver = mo.Anderson(rtol=1e-12)
    gradients = [
        jax.grad(
            lambda x, start=start: value_of(
                mo.nn.Equilibrium(cell, start, solver=solver, adjoint=EXACT)(x)[0]
            )
        )(x)
        for start in (lambda x: jnp.zeros(WIDTH), lambda x: jnp.tile(x, 2))
    ]
    assert_close(*gradients)


def test_a_warm_start_takes_fewer_steps():
    layer = mo.nn.Equilibrium(Tanh(0.95), CELLS["tanh"][1])
    x = normal((INPUTS,), 9)
    z, cold = layer(x)
    _, warm = layer(1.001 * x, z)
    assert 0 < int(warm.num_steps) < int(cold.num_steps)
    assert cold.residuals is not None
    assert int(jnp.sum(jnp.isfinite(cold.residuals))) == int(cold.num_steps)


# Parts of the layer


@pytest.mark.ci
def test_solvers_of_other_libraries():
    cell, initial = Tanh(), CELLS["tanh"][1]
    x = normal((INPUTS,), 9)
    own = mo.nn.Equilibrium(cell, initial, solver=mo.Anderson(rtol=1e-10), adjoint=EXACT)
    solvers: list[mo.extend.AbstractSolver] = [
        mo.OptimistixSolver(optx.FixedPointIteration(rtol=1e-11, atol=1e-11)),
        mo.OptimistixSolver(optx.Newton(rtol=1e-10, atol=1e-10)),
    ]
    if importlib.util.find_spec("jaxopt"):
        solvers.append(mo.JaxoptSolver("AndersonAcceleration", {"tol": 1e-10}))
    for solver in solvers:
        layer = mo.nn.Equilibrium(cell, initial, solver=solver, adjoint=EXACT)
        z, info = layer(x)
        np.testing.assert_allclose(z, own(x)[0], rtol=1e-8)
        assert info.residuals is None and int(info.num_steps) > 0
        slopes = [jax.grad(lambda x, m=m: value_of(m(x)[0]))(x) for m in (layer, own)]
        assert_close(*slopes, rtol=1e-7)


def test_inference_mode_has_a_solver_of_its_own():
    cell, initial = Tanh(0.95), CELLS["tanh"][1]
    layer = mo.nn.Equilibrium(
        cell,
        initial,
        solver=mo.Anderson(rtol=1e-2),
        inference_solver=mo.Anderson(rtol=1e-9),
    )
    x = normal((INPUTS,), 9)
    _, training = layer(x)
    _, inference = eqx.nn.inference_mode(layer)(x)
    assert training.residual > 1e-6 > 1e-8 > inference.residual
    plain = mo.nn.Equilibrium(cell, initial)
    same = eqx.nn.inference_mode(plain)(x)[0]
    np.testing.assert_array_equal(same, plain(x)[0])


@pytest.mark.ci
def test_iterates_on_the_way():
    cell, initial = Tanh(0.95), CELLS["tanh"][1]
    solver = mo.Anderson(rtol=1e-9)
    layer = mo.nn.Equilibrium(cell, initial, solver=solver, adjoint=EXACT)
    x = normal((INPUTS,), 9)
    z, info = layer(x)
    reached = layer.iterates(x, (1, 3, 8))
    # The cell once more on where the solver was after so many steps.
    np.testing.assert_allclose(reached[0], cell(cell(initial(x), x), x), rtol=1e-12)
    errors = [float(jnp.linalg.norm(one - z)) for one in reached]
    assert errors[0] > errors[1] > errors[2] > 0
    # Each has the derivative of that one application.
    held = jax.lax.stop_gradient(reached[1])
    before = layer.iterates(x, (3,))[0]
    np.testing.assert_array_equal(before, held)
    slope = jax.grad(lambda x: jnp.sum(layer.iterates(x, (3,))[0]))(x)
    inside = (1 - held**2)[:, None] * cell.inputs
    np.testing.assert_allclose(slope, jnp.sum(inside, 0), rtol=1e-12)
    # The layer goes on from there.
    _, rest = layer(x, reached[-1])
    assert int(rest.num_steps) < int(info.num_steps)


def test_a_loss_on_iterates_trains_in_one_program():
    cell, initial = Tanh(), CELLS["tanh"][1]
    layer = mo.nn.Equilibrium(cell, initial)
    x = normal((BATCH, INPUTS), 9)

    @eqx.filter_jit
    @eqx.filter_grad
    def slope(layer):
        def one(x):
            *early, last = layer.iterates(x, (2, 5))
            z, _ = layer(x, last)
            return sum(jnp.sum(z**2) for z in (*early, last, z))

        return jnp.sum(jax.vmap(one)(x))

    found = slope(layer)
    assert float(jnp.linalg.norm(found.cell.weight)) > 0
    assert found.solver.budget is None


def test_inputs_without_derivative():
    table = normal((5, WIDTH))
    cell = lambda z, token: jnp.tanh(0.5 * z + table[token])
    layer = mo.nn.Equilibrium(cell, lambda token: jnp.zeros(WIDTH))
    z, _ = layer(jnp.array(3))
    np.testing.assert_allclose(z, cell(z, 3), rtol=1e-3)
    assert mo.nn.Equilibrium(lambda z, x: 0.5 * z + x)(0.3)[0].shape == ()


def test_normalisations_of_equinox_work_in_a_cell():
    class Normalised(eqx.Module):
        hidden: eqx.nn.WeightNorm

        def __call__(self, z, x):
            return jnp.tanh(0.3 * self.hidden(z) + x)

    linear = eqx.nn.Linear(WIDTH, WIDTH, key=jax.random.key(0))
    layer = mo.nn.Equilibrium(Normalised(eqx.nn.WeightNorm(linear)))
    x = normal((WIDTH,))
    slope = eqx.filter_grad(lambda layer: value_of(layer(x)[0]))(layer)
    assert float(jnp.linalg.norm(slope.cell.hidden.layer.weight)) > 0


@pytest.mark.ci
def test_the_hyperparameter_of_a_network_with_an_equilibrium():
    """The hypergradient of the decay and of the scale of a cell, through training."""
    x, y = normal((8, INPUTS)), normal((8,), 1)
    weight, inputs, readout = (
        contraction(norm=0.6),
        normal((WIDTH, INPUTS), 1),
        normal(6, 2),
    )

    def predict(params, hyper, layer_of):
        cell = lambda z, x: jnp.tanh(hyper["scale"] * params["weight"] @ z + inputs @ x)
        return jax.vmap(layer_of(cell))(x) @ params["readout"]

    def loss(layer_of):
        def mean(params, hyper, batch):
            decay = sum(jnp.sum(leaf**2) for leaf in params.values())
            errors = predict(params, hyper, layer_of) - y
            return jnp.mean(errors**2) + jnp.exp(hyper["decay"]) * decay

        return mean

    def by_layer(cell):
        solver = mo.Anderson(100, rtol=1e-12)
        layer = mo.nn.Equilibrium(
            cell, lambda x: jnp.zeros(WIDTH), solver=solver, adjoint=EXACT
        )
        return lambda x: layer(x)[0]

    def by_scan(cell):  # which reverse mode can pass
        step = lambda x: lambda z, _: (cell(z, x), None)
        return lambda x: jax.lax.scan(step(x), jnp.zeros(WIDTH), None, 60)[0]

    hyper = {"decay": jnp.asarray(-4.0), "scale": jnp.asarray(0.9)}
    params = {"weight": weight, "readout": readout}
    found = []
    for layer_of in (by_layer, by_scan):
        problem = mo.BilevelProblem(
            mo.InnerProblem(loss(layer_of)),
            lambda params, hyper, batch, layer_of=layer_of: jnp.sum(
                jnp.sin(predict(params, hyper, layer_of))
            ),
        )
        gradient, report = mo.hypergradient(
            problem,
            hyper,
            params=params,
            inner=mo.Descent(optax.sgd(0.02), 3),
            adjoint=mo.UnrolledAdjoint(),
        )
        found.append(gradient)
    assert abs(float(found[1]["decay"])) > 1e-6 and abs(float(found[1]["scale"])) > 1e-3
    assert_close(*found, rtol=1e-7)


# What does not converge


def expanding(scale):
    """A map without a stable fixed point near the start, bounded or not."""
    weight = scale * contraction(norm=1.0)
    return lambda z, x: weight @ z + x


def test_what_does_not_converge_says_so():
    x = normal((WIDTH,))
    solver = mo.Picard(50)
    layer = mo.nn.Equilibrium(expanding(3.0), solver=solver, throw=False)
    _, info = layer(x)
    assert info.result == mo.RESULTS.inner_max_steps
    with pytest.raises(mo.SolveError, match="reached its step limit"):
        mo.nn.Equilibrium(expanding(3.0), solver=solver)(x)
    layer = mo.nn.Equilibrium(
        lambda z, x: jnp.sign(z - 0.3) * -1.0, solver=mo.Anderson(60), throw=False
    )
    z, info = layer(x)
    assert info.result == mo.RESULTS.inner_stagnation
    assert np.all(np.isfinite(z))
    gradient = jax.grad(lambda x: jnp.sum(layer(x)[0]))(x)
    assert np.all(np.isnan(gradient) | (gradient == 0))


def test_anderson_solves_what_does_not_contract():
    # Linear, with eigenvalues to -3: the plain iteration diverges.
    matrix = -jnp.diag(jnp.linspace(0.5, 3.0, WIDTH))
    layer = mo.nn.Equilibrium(
        lambda z, x: matrix @ z + x, solver=mo.Anderson(60, rtol=1e-9, history_size=WIDTH)
    )
    x = normal((WIDTH,))
    z, info = layer(x)
    np.testing.assert_allclose(z, jnp.linalg.solve(jnp.eye(WIDTH) - matrix, x), rtol=1e-7)
    assert int(info.num_steps) < 20


def test_the_best_iterate_is_returned():
    x = normal((WIDTH,))
    layer = mo.nn.Equilibrium(
        # It comes nearest to a fixed point at zero.
        lambda z, x: z + 1 + 0.1 * z**2,
        lambda x: jnp.full(WIDTH, -3.0),
        solver=mo.Anderson(12, rtol=1e-12, history_size=1, relaxation=0.5),
        throw=False,
    )
    z, info = layer(x)
    assert info.result != mo.RESULTS.successful
    residuals = np.asarray(info.residuals)
    assert np.nanmin(residuals) < residuals[np.isfinite(residuals)][-1]
    best = np.nanmin(residuals) / WIDTH**0.5
    root = np.sqrt(10 * (best - 1))
    assert np.min(np.abs(np.asarray(z)[0] - [root, -root])) < 1e-6


def test_a_nan_is_found():
    layer = mo.nn.Equilibrium(lambda z, x: jnp.sqrt(z - 1.0) + x, throw=False)
    z, info = layer(normal((WIDTH,)))
    assert info.result == mo.RESULTS.inner_nonfinite


@pytest.mark.parametrize("history_size", [1, 3, 5])
@pytest.mark.parametrize("relaxation", [1.0, 0.7])
def test_anderson_by_least_squares(history_size, relaxation):
    """Against the definition, by dense least squares."""
    weight, x = contraction(norm=0.9), normal((WIDTH,), 1)
    f = lambda z: np.tanh(np.asarray(weight) @ z + np.asarray(x))
    z, applied, residuals = np.zeros(WIDTH), [], []
    for _ in range(8):
        applied, residuals = [*applied, f(z)], [*residuals, f(z) - z]
        new, rest = applied[-1], residuals[-1]
        if len(applied) > 1:
            back = min(history_size, len(applied) - 1)
            of_f = np.diff(np.array(applied), axis=0)[-back:].T
            of_g = np.diff(np.array(residuals, float), axis=0)[-back:].T
            weights = np.linalg.lstsq(of_g, residuals[-1], rcond=None)[0]
            new, rest = new - of_f @ weights, rest - of_g @ weights
        z = new - (1 - relaxation) * rest
    problem = mo.FixedPointProblem(lambda z, hyper, _: jnp.tanh(hyper @ z + x))
    solver = mo.Anderson(
        8, rtol=1e-30, history_size=history_size, relaxation=relaxation, regularization=0.0
    )
    inner = mo.extend.InnerSolve(problem, solver, mo.FullBatch(None), jax.random.key(0))
    loop = inner.loop(jnp.zeros(WIDTH))
    state = loop.start(jnp.zeros(WIDTH), weight, None)
    state, _ = loop.run_primal(weight, state, 0, 8)
    np.testing.assert_allclose(state.params, z, rtol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: mo.nn.Equilibrium(expanding(0.5), adjoint=mo.OneStepAdjoint())(
                normal((WIDTH,))
            ),
            "mixes the map with earlier steps",
        ),
        (
            lambda: mo.nn.Equilibrium(
                expanding(0.5),
                solver=mo.ReversiblePicard(),
                adjoint=mo.OneStepAdjoint(),
            )(normal((WIDTH,))),
            "mixes the map with earlier steps",
        ),
        (lambda: mo.Anderson(0), "`num_steps` must be at least 1"),
        (lambda: mo.Anderson(history_size=0), "`history_size` must be at least 1"),
        (lambda: mo.Anderson(relaxation=0.0), r"`relaxation` must lie in \(0, 1\]"),
        (lambda: mo.Anderson(regularization=-1.0), "`regularization` must be"),
        (lambda: mo.Anderson(rtol=float("nan")), "`rtol` must be"),
        (
            lambda: mo.nn.Equilibrium(expanding(0.5)).iterates(normal((WIDTH,)), (3, 2)),
            "`steps` must increase",
        ),
        (
            lambda: mo.nn.Equilibrium(expanding(0.5)).iterates(normal((WIDTH,)), (101,)),
            "at most, 100",
        ),
        (
            lambda: mo.nn.Equilibrium(
                expanding(0.5),
                solver=mo.OptimistixSolver(optx.FixedPointIteration(1e-6, 1e-6)),
            ).iterates(normal((WIDTH,)), (1,)),
            "runs as a whole",
        ),
        (
            lambda: mo.nn.Equilibrium(Tanh(), inference_solver=3),  # pyright: ignore[reportArgumentType]
            "`inference_solver` must be",
        ),
        (
            lambda: mo.nn.Equilibrium(Tanh(), jnp.zeros(WIDTH)),  # pyright: ignore[reportArgumentType]
            "`initial` must be a function",
        ),
        (
            lambda: mo.nn.Equilibrium(Tanh(), throw="no"),  # pyright: ignore[reportArgumentType]
            "`throw` must be `True` or `False`",
        ),
        (
            lambda: mo.Anderson(per_example="yes"),  # pyright: ignore[reportArgumentType]
            "`per_example` must be `True` or `False`",
        ),
        (
            lambda: mo.nn.Equilibrium(Tanh()).iterates(normal((INPUTS,)), 3),  # pyright: ignore[reportArgumentType]
            "`steps` must be a sequence",
        ),
        (
            lambda: mo.nn.Equilibrium(lambda z, x: z, lambda x: ())(jnp.ones(2)),
            "state of an equilibrium holds floating-point arrays",
        ),
        (lambda: mo.nn.MonotoneCell(2, 2, key=None), "`key` must come from"),  # pyright: ignore[reportArgumentType]
        (lambda: mo.nn.ContractiveCell(2, 2, key=0), "`key` must come from"),  # pyright: ignore[reportArgumentType]
        (lambda: mo.nn.Equilibrium(3), "`cell` must be a function"),  # pyright: ignore[reportArgumentType]
        (lambda: mo.nn.Equilibrium(Tanh(), solver=mo.Anderson), "`solver` is the class"),  # pyright: ignore[reportArgumentType]
        (
            lambda: mo.nn.Equilibrium(lambda z, x: z[:2])(normal((INPUTS,))),
            "must return a state like `z`",
        ),
        (
            lambda: mo.nn.Equilibrium(
                lambda z, x: (jnp.tanh(z[0]), z[1] + 1),
                lambda x: (jnp.zeros(2), jnp.array(0)),
            )(normal((WIDTH,))),
            "floating-point arrays only",
        ),
        (
            lambda: mo.nn.Equilibrium(
                lambda z, x: 0.5 * z + x, solver=mo.Anderson(per_example=True)
            )(jnp.zeros(())),
            "must share their leading",
        ),
        (
            lambda: mo.nn.Equilibrium(expanding(0.5))(jnp.full(WIDTH, jnp.nan)),
            "`x` holds infinite or NaN",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_errors_speak_of_the_layer():
    class Rounded(eqx.Module):
        weight: jax.Array

        def __call__(self, z, x):
            return jnp.tanh(0.5 * z + jnp.round(self.weight) + x)

    def total(cell):
        return jnp.sum(mo.nn.Equilibrium(cell, lambda x: jnp.zeros(3))(jnp.ones(3))[0])

    # Once about `hyper`, which nobody had.
    with pytest.raises(ValueError, match="respect to `layer.cell.weight`") as raised:
        eqx.filter_grad(total)(Rounded(jnp.ones(3)))
    assert "hyper" not in str(raised.value)
    lost = mo.nn.Equilibrium(lambda z, x: jnp.log(z - x), lambda x: jnp.zeros(3))
    with pytest.raises(mo.SolveError, match="in its input and its weights") as failed:
        lost(jnp.ones(3))
    assert "hyper" not in str(failed.value)
