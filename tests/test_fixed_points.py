"""Solvers of fixed points: how they converge, on what, and what they say if not."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jaxtyping import Array

import metaopt as mo
from cells import normal


WIDTH, BATCH = 40, 3
EXACT = mo.ImplicitAdjoint(mo.GMRES(rtol=1e-12), error=None)  # compared with the truth


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def symmetric(radius):
    matrix = normal((WIDTH, WIDTH))
    matrix = matrix + matrix.T
    return radius * matrix / jnp.linalg.norm(matrix, 2)


def non_normal(radius):
    """Eigenvalues below `radius`, singular values far above: the plain iteration grows
    before it converges."""
    upper = jnp.triu(normal((WIDTH, WIDTH), 1), 1) / WIDTH**0.5
    return radius * jnp.diag(jnp.linspace(-1, 1, WIDTH)) + upper


def random(radius):
    return radius * normal((WIDTH, WIDTH), 2) / WIDTH**0.5


CONTRACTING = {
    "easy": random(0.4),
    "harder": random(0.8),
    "symmetric .95": symmetric(0.95),
    "symmetric .99": symmetric(0.99),
    "non-normal": non_normal(0.8),
}
SOLVERS = {
    "picard": mo.Picard,
    "anderson": mo.Anderson,
    "broyden": mo.Broyden,
    "newton krylov": mo.NewtonKrylov,
}


def solve(weight, solver, x=None, hyper=0.0, start=None, map=jnp.tanh, throw=False):
    x = 0.1 * normal((BATCH, WIDTH), 7) if x is None else x
    problem = mo.FixedPointProblem(lambda z, hyper, _: map(z @ weight.T + x) + hyper)
    start = jnp.zeros_like(x) if start is None else start
    return mo.solve_inner(
        problem, jnp.asarray(hyper), params=start, solver=solver, adjoint=EXACT, throw=throw
    )


def left(weight, z, map=jnp.tanh):
    x = 0.1 * normal((BATCH, WIDTH), 7)
    return float(jnp.linalg.norm(map(z @ weight.T + x) - z) / jnp.linalg.norm(z))


@pytest.mark.one_of(6)
@pytest.mark.parametrize("map", [jnp.tanh, lambda a: a], ids=["tanh", "linear"])
@pytest.mark.parametrize("name", CONTRACTING)
def test_steps_on_contracting_cells(name, map):
    weight, counts = CONTRACTING[name], {}
    for row, kind in SOLVERS.items():
        found = solve(weight, kind(2000, rtol=1e-6), map=map)
        assert found.result == mo.RESULTS.successful, row
        # What was promised is true of what is returned.
        assert left(weight, found.value, map) <= 1e-6
        counts[row] = int(found.stats["num_steps"])
    plain = counts["picard"]
    assert counts["newton krylov"] <= 12
    for row in ("anderson", "broyden"):
        # Nowhere much slower than the plain iteration, and faster where that is slow.
        assert counts[row] <= 1.1 * plain + 2
        if plain > 100:
            assert counts[row] < 0.6 * plain


@pytest.mark.one_of(3)
@pytest.mark.parametrize("row", SOLVERS)
@pytest.mark.parametrize("scale", [1.6, 3.0, 100.0])
def test_cells_that_do_not_contract_get_a_code_and_a_finite_answer(row, scale):
    x = normal((BATCH, WIDTH), 7)
    found = solve(random(scale), SOLVERS[row](60, rtol=1e-8), x)
    assert np.all(np.isfinite(found.value))
    if found.result == mo.RESULTS.successful:  # there is a fixed point, and it was found
        after = jnp.tanh(found.value @ random(scale).T + x)
        np.testing.assert_allclose(after, found.value, atol=1e-7)
        assert row == "newton krylov" and scale < 2
        return
    with pytest.raises(mo.SolveError, match="residual of the fixed point|step limit"):
        solve(random(scale), SOLVERS[row](60, rtol=1e-8), x, throw=True)


@pytest.mark.parametrize("row", SOLVERS)
def test_expanding_linear_maps_are_solved_or_named(row):
    # Eigenvalues far outside of the unit disc: there is a fixed point all the same.
    weight = random(4.0)
    solver = SOLVERS[row](2000, rtol=1e-8)
    if row == "newton krylov":
        solver = mo.NewtonKrylov(rtol=1e-8, linear_solver=mo.GMRES(rtol=1e-3, restart=120))
    found = solve(weight, solver, map=lambda a: a)
    if row == "picard":
        assert found.result == mo.RESULTS.inner_diverged
    elif found.result == mo.RESULTS.successful:
        assert left(weight, found.value, lambda a: a) <= 1e-8
    else:
        assert np.all(np.isfinite(found.value))
    if row == "newton krylov":
        assert found.result == mo.RESULTS.successful


def test_broyden_by_its_definition():
    """Against dense matrices: the inverse satisfies the secant condition, and the steps are
    those of the textbook."""
    weight, x = random(0.7), normal((WIDTH,), 1)
    f = lambda z: np.tanh(np.asarray(weight) @ z + np.asarray(x))
    z, inverse = np.zeros(WIDTH), np.eye(WIDTH)
    residual = f(z) - z
    for _ in range(6):
        step = inverse @ residual
        new = f(z + step) - (z + step)
        change = residual - new  # (I - J) step for a linear map
        right = step @ inverse
        inverse = inverse + np.outer(step - inverse @ change, right) / (right @ change)
        np.testing.assert_allclose(inverse @ change, step, rtol=1e-9)
        z, residual = z + step, new
    problem = mo.FixedPointProblem(lambda z, hyper, _: jnp.tanh(hyper @ z + x))
    solver = mo.Broyden(7, rtol=1e-30)
    inner = mo.extend.InnerSolve(problem, solver, mo.FullBatch(None), jax.random.key(0))
    loop = inner.loop(jnp.zeros(WIDTH))
    state = loop.start(jnp.zeros(WIDTH), weight, None)
    state, _ = loop.run_primal(weight, state, 0, 7)
    np.testing.assert_allclose(state.params, z + inverse @ residual, rtol=1e-7)
    found = state.solver_state[-1].inverse
    some = normal((WIDTH,), 9)
    np.testing.assert_allclose(found.apply(some), inverse @ some, rtol=1e-7)
    np.testing.assert_allclose(found.transposed().apply(some), some @ inverse, rtol=1e-7)


def test_broyden_goes_back_by_half_of_a_step_that_is_too_long():
    # From 1 the plain iteration goes to -4, where the residual is four times as large. Half
    # of that step says all about a linear map in one dimension.
    problem = mo.FixedPointProblem(lambda z, hyper, _: hyper * z)
    inner = mo.extend.InnerSolve(
        problem, mo.Broyden(3, rtol=1e-30), mo.FullBatch(None), jax.random.key(0)
    )
    loop, hyper = inner.loop(jnp.ones(1)), jnp.asarray(-4.0)
    state, found = loop.start(jnp.ones(1), hyper, None), []
    for step in range(3):
        state, _ = loop.run_primal(hyper, state, step, step + 1)
        found.append(float(state.params[0]))
    np.testing.assert_allclose(found, [-4.0, -1.5, 0.0], atol=1e-14)


def test_a_small_memory_starts_anew():
    weight = CONTRACTING["symmetric .95"]
    few, many = (
        solve(weight, mo.Broyden(500, rtol=1e-10, history_size=size)) for size in (2, 40)
    )
    assert few.result == many.result == mo.RESULTS.successful
    assert int(many.stats["num_steps"]) <= int(few.stats["num_steps"])


def test_newton_krylov_goes_back_where_a_full_step_is_too_long():
    # Newton's method on arctan diverges from here.
    problem = mo.FixedPointProblem(lambda z, hyper, _: z - jnp.arctan(z) + hyper)
    found = mo.solve_inner(
        problem,
        jnp.asarray(0.0),
        params=jnp.full(2, 20.0),
        solver=mo.NewtonKrylov(60, rtol=1e-9, atol=1e-9),
        adjoint=EXACT,
    )
    np.testing.assert_allclose(found.value, 0.0, atol=1e-8)
    residuals = found.stats["losses"][: int(found.stats["num_steps"])]
    assert np.any(np.diff(residuals) > 0)  # a step that was not kept


@pytest.mark.one_of(3)
@pytest.mark.parametrize("kind", [mo.Picard, mo.Anderson, mo.Broyden])
def test_examples_of_a_batch_converge_each_for_itself(kind):
    weight = CONTRACTING["symmetric .95"]
    x = normal((BATCH, WIDTH), 7) * jnp.array([[0.01], [1.0], [5.0]])
    together = solve(weight, kind(300, rtol=1e-8, per_example=True), x)
    alone = [solve(weight, kind(300, rtol=1e-8), row[None]) for row in x]
    counts = [int(one.stats["num_steps"]) for one in alone]
    assert int(together.stats["num_steps"]) == max(counts) > min(counts)
    expected = jnp.concatenate([one.value for one in alone])
    # The plain iteration goes on, the others hold an example that has converged.
    rtol = 1e-6 if kind is mo.Picard else 1e-9
    np.testing.assert_allclose(together.value, expected, rtol=rtol, atol=1e-10)


@pytest.mark.one_of(2)
@pytest.mark.parametrize("kind", [mo.Anderson, mo.Broyden])
def test_an_example_that_has_converged_is_held(kind):
    # The tolerance is loose, so that a step more would be seen.
    weight, x = jnp.array([[0.5, 0.4], [-0.4, 0.5]]), jnp.array([[0.01, 0.0], [2.0, 1.0]])
    together = solve(weight, kind(50, rtol=1e-2, per_example=True), x)
    alone = [solve(weight, kind(50, rtol=1e-2), row[None]) for row in x]
    counts = [int(one.stats["num_steps"]) for one in alone]
    assert int(together.stats["num_steps"]) == max(counts) > min(counts)
    expected = jnp.concatenate([one.value for one in alone])
    np.testing.assert_allclose(together.value, expected, rtol=1e-12)


@pytest.mark.one_of(2)
@pytest.mark.parametrize("row", SOLVERS)
def test_a_budget_changes_without_compiling_again(row):
    weight, traces = CONTRACTING["symmetric .95"], []

    def step(z, hyper, _):
        traces.append(1)
        return jnp.tanh(z @ weight.T + hyper)

    problem = mo.FixedPointProblem(step)
    start, x = jnp.zeros((BATCH, WIDTH)), normal((BATCH, WIDTH))
    counts, compiled = [], 0
    for budget in (1, 2, 4, 10_000):
        solver = SOLVERS[row](100, rtol=1e-10, budget=budget)
        found = mo.solve_inner(
            problem, x, params=start, solver=solver, adjoint=EXACT, throw=False
        )
        counts.append(int(found.stats["num_steps"]))
        if budget == 1:
            compiled = len(traces)
        if budget < 5:
            assert found.result == mo.RESULTS.inner_max_steps
    assert len(traces) == compiled > 0
    assert counts[:3] == [1, 2, 4]
    unlimited = SOLVERS[row](100, rtol=1e-10)
    found = mo.solve_inner(
        problem, x, params=start, solver=unlimited, adjoint=EXACT, throw=False
    )
    assert counts[3] == int(found.stats["num_steps"])


def test_a_budget_without_tolerance():
    solver = mo.Picard(50, rtol=None, budget=3)
    found = solve(random(0.4), solver)
    assert int(found.stats["num_steps"]) == 3
    unrolled = lambda x, steps: solve_unrolled(x, mo.Picard(steps, rtol=None))
    limited = lambda x: solve_unrolled(x, solver)
    x = normal((BATCH, WIDTH), 3)
    np.testing.assert_allclose(
        jax.grad(limited)(x), jax.grad(lambda x: unrolled(x, 3))(x), rtol=1e-12
    )


def solve_unrolled(x, solver):
    problem = mo.FixedPointProblem(lambda z, x, _: jnp.tanh(z @ random(0.4).T + x))
    start = jnp.zeros_like(x)
    # A number of steps that was asked for is no failure.
    solution = mo.solve_inner(
        problem, x, params=start, solver=solver, adjoint=mo.UnrolledAdjoint()
    )
    return jnp.sum(solution.value**2)


@pytest.mark.one_of(2)
@pytest.mark.parametrize("row", SOLVERS)
def test_steps_after_convergence_do_no_harm_to_the_derivative(row):
    # Differences that are nothing but rounding made it garbage for Anderson, and the
    # linear solves of Newton's method could not be passed.
    x = normal((BATCH, WIDTH), 3)
    slope = lambda solver: jax.jit(jax.grad(lambda x: solve_unrolled(x, solver)))(x)
    kind = SOLVERS[row]
    exact = slope(mo.Picard(200, rtol=None))
    for num_steps in (30, 60):
        found = slope(kind(num_steps, rtol=None))
        np.testing.assert_allclose(found, exact, rtol=1e-8, atol=1e-8)


@pytest.mark.one_of(2)
@pytest.mark.parametrize("row", SOLVERS)
def test_a_map_without_a_fixed_point_is_no_success(row):
    # It drives the params to where any residual is small beside them.
    x = normal((WIDTH,), 3)
    for step in (lambda z: z + 2, lambda z: z + 1.1 + jnp.sin(z + x)):
        problem = mo.FixedPointProblem(lambda z, h, _, step=step: step(z) + h)
        solver = SOLVERS[row](300, rtol=1e-4)
        found = mo.solve_inner(
            problem,
            jnp.asarray(0.0),
            params=jnp.zeros(WIDTH),
            solver=solver,
            adjoint=EXACT,
            throw=False,
        )
        left = float(jnp.linalg.norm(step(found.value) - found.value))
        assert found.result != mo.RESULTS.successful or left < 1.0


def test_a_shared_inverse_for_each_example_of_a_batch():
    weight, x = (
        random(0.8)[:6, :6] * 2,
        normal((BATCH, 6), 3) * jnp.array([[0.1], [1], [3]]),
    )
    cotangent = normal((BATCH, 6), 5)
    cell = lambda z, x: jnp.tanh(z @ weight.T + x)

    def slope(solver, mapped):
        adjoint = mo.ImplicitAdjoint(mo.linear.SHINE())
        layer = mo.nn.Equilibrium(cell, solver=solver, adjoint=adjoint)
        call = lambda x: layer(x)[0]
        call = jax.vmap(call) if mapped else call
        return jax.jit(jax.grad(lambda x: jnp.vdot(cotangent, call(x))))(x)

    settings = {"rtol": 1e-9, "history_size": 30}
    together = slope(mo.Broyden(**settings, per_example=True), False)
    np.testing.assert_allclose(together, slope(mo.Broyden(**settings), True), rtol=1e-6)
    exact = layer_gradient(mo.Broyden(rtol=1e-12), EXACT, weight, x, cotangent)
    assert distance(together, exact) > 1e-9


# The linear system of the derivative


@pytest.mark.one_of(6)
@pytest.mark.parametrize("kind", [mo.Picard, mo.Anderson, mo.Broyden])
@pytest.mark.parametrize("structure", ["vector", "pytree"])
def test_linear_systems_as_fixed_points(kind, structure):
    matrix = jnp.eye(WIDTH) - random(0.6)
    b = normal((WIDTH,), 4)
    split = lambda x: {"a": x[:10], "b": x[10:].reshape(5, 6)}
    join = lambda t: jnp.concatenate([t["a"], t["b"].ravel()])
    if structure == "vector":
        split = join = lambda x: x
    struct = jax.eval_shape(split, b)
    operator = lx.FunctionLinearOperator(lambda x: split(matrix @ join(x)), struct)
    solver = mo.linear.LinearFixedPoint(kind(300, rtol=1e-9))
    exact = jnp.linalg.solve(matrix, b)
    for scale in (1.0, 1e-200, 1e150):
        found = solver.solve(operator, split(scale * b))
        assert found.result == mo.RESULTS.successful
        np.testing.assert_allclose(join(found.value), scale * exact, rtol=1e-6)
        remaining = jnp.linalg.norm(b - matrix @ (join(found.value) / scale))
        np.testing.assert_allclose(
            found.residual, remaining / jnp.linalg.norm(b), rtol=1e-3, atol=1e-12
        )
        assert found.residual <= 1e-9
    # A good start saves steps, a bad one is no harm, and a looser tolerance is heeded.
    near = solver.solve(operator, split(b), split(exact * (1 + 1e-6)))
    assert int(near.num_steps) < int(found.num_steps)
    bad = solver.solve(operator, split(b), split(jnp.full(WIDTH, 1e9)))
    np.testing.assert_allclose(join(bad.value), exact, rtol=1e-6)
    loose = solver.solve(operator, split(b), None, jnp.asarray(1e-2))
    assert 1e-9 < loose.residual <= 1e-2
    zero = solver.solve(operator, split(0 * b))
    assert zero.result == mo.RESULTS.successful and not np.any(join(zero.value))


def test_linear_systems_that_are_not_solved():
    b = normal((WIDTH,), 4)
    operator = lambda matrix: lx.MatrixLinearOperator(matrix)
    expanding = mo.linear.LinearFixedPoint(mo.Picard(5000, rtol=1e-6)).solve(
        operator(jnp.eye(WIDTH) - random(3.0)), b
    )
    assert expanding.result == mo.RESULTS.linear_diverged
    assert np.all(np.isfinite(expanding.value))
    short = mo.linear.LinearFixedPoint(mo.Anderson(3, rtol=1e-6)).solve(
        operator(jnp.eye(WIDTH) - random(0.9)), b
    )
    assert short.result == mo.RESULTS.linear_max_steps and short.residual > 1e-6
    fixed = mo.linear.LinearFixedPoint(mo.Anderson(3, rtol=None))
    asked = fixed.solve(operator(jnp.eye(WIDTH) - random(0.9)), b)
    assert asked.result == mo.RESULTS.successful
    assert fixed.left_out == ("what more than 3 steps of the linear solver would add",)
    (budgeted,) = mo.linear.LinearFixedPoint(mo.Anderson(3, rtol=None, budget=2)).left_out
    assert "more steps than its budget" in budgeted
    nan = mo.linear.LinearFixedPoint().solve(operator(jnp.full((WIDTH, WIDTH), jnp.nan)), b)
    assert nan.result == mo.RESULTS.linear_nonfinite
    assert np.all(np.isfinite(nan.value))


def layer_gradient(solver, adjoint, weight, x, cotangent):
    layer = mo.nn.Equilibrium(
        lambda z, x: jnp.tanh(z @ weight.T + x), solver=solver, adjoint=adjoint
    )
    return jax.jit(jax.grad(lambda x: jnp.sum(cotangent * layer(x)[0])))(x)


def distance(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def test_shared_inverse():
    # A single example in few dimensions, whose way to the fixed point shows them all.
    weight, x = random(0.8)[:6, :6] * 2, normal((6,), 3)
    cotangent = normal((6,), 5)
    exact = layer_gradient(mo.Broyden(rtol=1e-12), EXACT, weight, x, cotangent)
    solver = mo.Broyden(rtol=1e-9, history_size=12)
    of = lambda linear: layer_gradient(
        solver, mo.ImplicitAdjoint(linear), weight, x, cotangent
    )
    shared, one_step = of(mo.linear.SHINE()), of(mo.Neumann(0))
    assert 1e-12 < distance(shared, exact) < 0.8 * distance(one_step, exact)
    refined = of(mo.linear.SHINE(mo.linear.LinearFixedPoint(mo.Anderson(rtol=1e-10))))
    assert distance(refined, exact) < 1e-8
    # Forward mode uses the inverse, and reverse mode that of the transposed system.
    layer = mo.nn.Equilibrium(
        lambda z, x: jnp.tanh(z @ weight.T + x),
        solver=solver,
        adjoint=mo.ImplicitAdjoint(mo.linear.SHINE()),
    )
    fixed_point = lambda x: layer(x)[0]
    rows = jax.jit(jax.jacrev(fixed_point))(x)
    columns = jax.jit(jax.jacfwd(fixed_point))(x)
    z = jax.jit(fixed_point)(x)
    slope = (1 - z**2)[:, None]
    exact = jnp.linalg.solve(jnp.eye(6) - slope * weight, jnp.diag(slope[:, 0]))
    for found in (rows, columns):
        assert distance(found, exact) < 0.5 * distance(jnp.diag(slope[:, 0]), exact)


def test_a_shared_inverse_is_never_worse_than_one_step():
    # An inverse that knows nothing of the direction asked for.
    weight, x = CONTRACTING["symmetric .95"], normal((BATCH, WIDTH), 3)
    cotangent = normal((BATCH, WIDTH), 5)
    problem = mo.BilevelProblem(
        mo.FixedPointProblem(lambda z, hyper, _: jnp.tanh(z @ weight.T + x + hyper)),
        lambda z, hyper, _: jnp.sum(cotangent * z),
    )
    residuals = []
    for linear in (mo.linear.SHINE(), mo.Neumann(0)):
        _, report = mo.hypergradient(
            problem,
            jnp.zeros_like(x),
            params=jnp.zeros_like(x),
            inner=mo.Broyden(rtol=1e-9),
            adjoint=mo.ImplicitAdjoint(linear),
        )
        assert report.derivative.linear_residual is not None and report.left_out
        residuals.append(float(report.derivative.linear_residual))
    assert residuals[0] <= residuals[1]


class Multiple(mo.extend.AbstractInverse):
    """A number for each fixed point that a matrix of them holds, instead of the inverse."""

    factors: Array

    def apply(self, vector):
        return self.factors[:, None] * vector

    def transposed(self):
        return self

    def norm(self, vector):
        return jnp.linalg.norm(vector, axis=1)

    def choose(self, condition, x, y):
        return jnp.where(condition[:, None], x, y)


def test_the_better_of_a_shared_inverse_and_one_step_is_taken_for_each_example():
    # I - J is 1.5 I: of b, 1 leaves a half, 0.8 leaves a fifth, and 3 leaves 3.5.
    struct = jax.ShapeDtypeStruct((2, 4), float)
    operator = lx.FunctionLinearOperator(lambda x: 1.5 * x, struct)
    b = normal((2, 4), 5)
    solver = mo.linear.SHINE(inverse=Multiple(jnp.array([0.8, 3.0])))
    found = solver.solve(operator, b)
    assert found.result == mo.RESULTS.successful
    expected = jnp.array([[0.8], [1.0]]) * b
    np.testing.assert_allclose(found.value, expected, rtol=1e-12)
    left = jnp.array([[0.2], [0.5]]) * b
    expected = jnp.linalg.norm(left) / jnp.linalg.norm(b)
    np.testing.assert_allclose(found.residual, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: mo.Broyden(history_size=0), "`history_size` must be at least 1"),
        (lambda: mo.Broyden(rtol=-1.0), "`rtol` must be"),
        (lambda: mo.NewtonKrylov(linear_solver=3), "`linear_solver` must be"),  # pyright: ignore[reportArgumentType]
        (lambda: mo.Picard(budget=1.5), "`budget` must be an integer"),
        (lambda: mo.Anderson(budget=jnp.ones(2, int)), "`budget` must be an integer"),
        (lambda: mo.Picard(budget=0), "`budget` must be at least 1"),
        (lambda: mo.linear.LinearFixedPoint(mo.NewtonKrylov()), "`solver` must be"),
        (lambda: mo.linear.SHINE(mo.linear.SHINE()), "got another `SHINE`"),
        (lambda: mo.linear.LinearFixedPoint(mo.GMRES()), "`solver` must be"),  # pyright: ignore[reportArgumentType]
        (lambda: mo.linear.LinearFixedPoint(mo.Anderson(rtol=0.0)), "`rtol` of the solver"),
        (lambda: mo.linear.SHINE(mo.Broyden()), "`refine` must be"),  # pyright: ignore[reportArgumentType]
        (
            lambda: layer_gradient(
                mo.Anderson(),
                mo.ImplicitAdjoint(mo.linear.SHINE()),
                random(0.4),
                normal((WIDTH,)),
                1.0,
            ),
            "the inner solver leaves none",
        ),
        (
            lambda: solve(random(0.4), mo.NewtonKrylov(linear_solver=mo.CG())),
            "CG",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_budget_of_a_layer():
    weight = CONTRACTING["symmetric .95"]
    cell = lambda z, x: jnp.tanh(z @ weight.T + x)
    layer = mo.nn.Equilibrium(cell, throw=False)
    call = eqx.filter_jit(lambda x, budget: layer(x, budget=budget)[1])
    x = normal((WIDTH,))
    for budget in (3, 7):
        info = call(x, jnp.asarray(budget))
        assert int(info.num_steps) == budget
        assert info.result == mo.RESULTS.inner_max_steps
    whole = mo.nn.Equilibrium(
        cell, solver=mo.JaxoptSolver("AndersonAcceleration", {"tol": 1e-6})
    )
    with pytest.raises(ValueError, match="takes no `budget`"):
        whole(x, budget=3)
