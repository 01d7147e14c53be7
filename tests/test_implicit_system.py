"""The linear system at an inner solution, against dense matrices."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import metaopt as mo


RTOL = {jnp.float32: 1e-4, jnp.float64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["f32", "f64"])
NUM_VECTORS = 3


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def like(tree: Any, seed: int, *axes: int) -> Any:
    """Random numbers in the place of the floating-point arrays of a pytree."""
    leaves, structure = jax.tree.flatten(eqx.filter(tree, eqx.is_inexact_array))
    made = [
        jnp.asarray(random(seed + i, *axes, *a.shape), a.dtype)
        for i, a in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, made)


def flat(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def rows(tree: Any) -> np.ndarray:
    """A pytree with one more axis in front as a matrix, one row for each vector."""
    return np.stack(
        [flat(jax.tree.map(lambda a, i=i: a[i], tree)) for i in range(NUM_VECTORS)]
    )


def assert_near(got: Any, want: Any, dtype: Any) -> None:
    scale = float(np.linalg.norm(want))
    np.testing.assert_allclose(got, want, rtol=0, atol=RTOL[dtype] * max(scale, 1e-3))


# The problems: a quadratic loss over pytrees of mixed shapes, and an unsymmetric root


FACTOR = random(0, 5, 5)
MATRIX = FACTOR @ FACTOR.T + np.eye(5)
MIXED = random(1, 5, 4)


def quadratic(params, hyper, batch):
    p, h = ravel_pytree(params)[0], ravel_pytree(hyper)[0]
    return p @ batch["matrix"] @ p / 2 + p @ batch["mixed"] @ h


def at_quadratic(dtype, matrix=MATRIX, shift: Any = 0.0, **given) -> Any:
    """The system at the minimum, or at a distance from it. $A$ is `matrix`, $C$ `MIXED`."""
    hyper = {"a": jnp.asarray([0.5, -1.0], dtype), "b": [jnp.asarray(2.0, dtype)] * 2}
    solution = -np.linalg.lstsq(matrix, MIXED @ flat(hyper), rcond=None)[0] + shift
    params = {
        "bias": jnp.asarray(solution[0], dtype),
        "weight": jnp.asarray(solution[1:].reshape(2, 2), dtype),
    }
    batch = {"matrix": jnp.asarray(matrix, dtype), "mixed": jnp.asarray(MIXED, dtype)}
    problem = mo.InnerProblem(quadratic)
    return mo.linear.ImplicitSystem.at(problem, hyper, params, batch, **given)


WEIGHTS = random(2, 4, 4) / 4


def residual(params, hyper, batch):
    z = params["z"]
    return {
        "z": z + 0.5 * z**3 + jnp.tanh(batch @ z) - hyper["x"] * jnp.exp(hyper["scale"])
    }


def at_root(dtype, batch=WEIGHTS) -> tuple[Any, np.ndarray, np.ndarray]:
    """The system, and the dense $A$ and $C$ by `jax.jacobian`."""
    hyper = {"scale": jnp.asarray(0.3, dtype), "x": jnp.asarray(random(3, 4), dtype)}
    params, batch = {"z": jnp.asarray(random(4, 4), dtype)}, jnp.asarray(batch, dtype)
    system = mo.linear.ImplicitSystem.at(mo.RootProblem(residual), hyper, params, batch)
    p, unravel = ravel_pytree(params)
    h, unravel_hyper = ravel_pytree(hyper)
    along = lambda p, h: ravel_pytree(residual(unravel(p), unravel_hyper(h), batch))[0]
    dense, mixed = jax.jacobian(along, (0, 1))(p, h)
    return system, np.asarray(dense, np.float64), np.asarray(mixed, np.float64)


def solver_for(dtype, kind: Any) -> Any:
    return kind(rtol=2e-6 if dtype == jnp.float32 else 1e-12)


# Solutions


@DTYPES
@pytest.mark.parametrize("kind", [mo.CG, mo.linear.MINRES, mo.GMRES])
def test_quadratic_solutions(dtype, kind):
    system = at_quadratic(dtype).prepare(solver_for(dtype, kind))
    b = like(system.params, 10)
    for transposed in (False, True):
        solution = system.solve(b, transposed=transposed)
        assert solution.result == mo.RESULTS.successful
        assert jax.tree.map(jnp.shape, solution.value) == jax.tree.map(jnp.shape, b)
        assert_near(flat(solution.value), np.linalg.solve(MATRIX, flat(b)), dtype)
    assert solution.value["weight"].dtype == dtype


@DTYPES
@pytest.mark.parametrize("transposed", [False, True])
def test_root_solutions_by_the_unsymmetric_jacobian(dtype, transposed):
    system, dense, _ = at_root(dtype)
    assert np.linalg.norm(dense - dense.T) > 0.1
    system = system.prepare(solver_for(dtype, mo.GMRES))
    b = like(system.params, 10)
    solution = system.solve(b, transposed=transposed)
    matrix = dense.T if transposed else dense
    assert_near(flat(solution.value), np.linalg.solve(matrix, flat(b)), dtype)
    left = system.remaining(solution.value, b, transposed=transposed)
    assert np.linalg.norm(flat(left)) <= RTOL[dtype] * np.linalg.norm(flat(b))


class Inverse(mo.extend.AbstractInverse):
    """The exact inverse, as a matrix."""

    matrix: jax.Array

    def apply(self, vector):
        return {"z": self.matrix @ vector["z"]}

    def transposed(self):
        return Inverse(self.matrix.T)

    def norm(self, vector):
        return jnp.linalg.norm(vector["z"])

    def choose(self, condition, x, y):
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_shared_inverse_is_transposed_with_the_system(transposed):
    system, dense, _ = at_root(jnp.float64)
    shared = mo.linear.SHINE(inverse=Inverse(jnp.asarray(np.linalg.inv(dense))))
    b = like(system.params, 10)
    solution = system.prepare(shared).solve(b, transposed=transposed)
    matrix = dense.T if transposed else dense
    assert_near(flat(solution.value), np.linalg.solve(matrix, flat(b)), jnp.float64)
    assert solution.residual < 1e-12


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_many_right_hand_sides(transposed, batch_size):
    system, dense, _ = at_root(jnp.float64)
    system = system.prepare(solver_for(jnp.float64, mo.GMRES))
    many = like(system.params, 10, NUM_VECTORS)
    solution = system.solve_many(many, transposed=transposed, batch_size=batch_size)
    matrix = dense.T if transposed else dense
    want = np.linalg.solve(matrix, rows(many).T).T
    assert_near(rows(solution.value), want, jnp.float64)
    assert solution.residual.shape == solution.num_steps.shape == (NUM_VECTORS,)
    assert np.all(solution.residual <= 1e-12)


def test_many_right_hand_sides_of_mixed_shapes():
    system = at_quadratic(jnp.float64).prepare(mo.CG(rtol=1e-12))
    many = like(system.params, 10, NUM_VECTORS)
    got = rows(system.solve_many(many).value)
    assert_near(got, np.linalg.solve(MATRIX, rows(many).T).T, jnp.float64)


def test_a_start_and_a_tolerance_save_steps():
    system = at_quadratic(jnp.float64).prepare(mo.CG(rtol=1e-12))
    b = like(system.params, 10)
    whole = system.solve(b)
    assert system.solve(b, start=whole.value).num_steps == 0
    rough = system.solve(b, tolerance=jnp.asarray(0.3))
    assert rough.num_steps < whole.num_steps and 1e-12 < rough.residual <= 0.3


def test_preconditioner_is_prepared_and_goes_on():
    solver = mo.CG(rtol=1e-12, preconditioner=mo.linear.DiagonalEstimate())
    first = at_quadratic(jnp.float64).prepare(solver)
    assert first.num_products > 0
    second = at_quadratic(jnp.float64).prepare(
        solver, first.preconditioner_state, key=jax.random.key(1)
    )
    before, after = (flat(s.preconditioner_state) for s in (first, second))
    assert before.shape == after.shape and not np.array_equal(before, after)
    b = like(first.params, 10)
    assert_near(flat(second.solve(b).value), np.linalg.solve(MATRIX, flat(b)), jnp.float64)


# Products


@DTYPES
def test_products_of_a_root(dtype):
    system, dense, mixed = at_root(dtype)
    v, w = like(system.hyper, 10), like(system.params, 20)
    assert_near(flat(system.operator.mv(w)), dense @ flat(w), dtype)
    assert_near(flat(system.cross(v)), mixed @ flat(v), dtype)
    assert_near(flat(system.cross_transposed(w)), mixed.T @ flat(w), dtype)


@DTYPES
def test_products_of_a_quadratic(dtype):
    system = at_quadratic(dtype, shift=0.1)
    v, w = like(system.hyper, 10), like(system.params, 20)
    assert_near(flat(system.operator.mv(w)), MATRIX @ flat(w), dtype)
    assert_near(flat(system.cross(v)), MIXED @ flat(v), dtype)
    assert_near(flat(system.cross_transposed(w)), MIXED.T @ flat(w), dtype)
    assert_near(flat(system.residual), 0.1 * MATRIX.sum(axis=1), dtype)


def test_vectors_of_numpy_and_python_numbers():
    system = at_quadratic(jnp.float64).prepare(mo.CG(rtol=1e-12))
    b = {"bias": 1.0, "weight": np.ones((2, 2))}
    want = np.linalg.solve(MATRIX, np.ones(5))
    assert_near(flat(system.solve(b).value), want, jnp.float64)
    v = {"a": np.ones(2), "b": [1.0, 1.0]}
    assert_near(flat(system.cross(v)), MIXED.sum(axis=1), jnp.float64)


def test_params_of_half_precision_have_a_system_in_float32():
    system = at_quadratic(jnp.bfloat16)
    assert system.residual["weight"].dtype == jnp.float32
    b = like(system.params, 10)
    matrix = np.asarray(jnp.asarray(MATRIX, jnp.bfloat16), np.float64)
    got = flat(system.prepare(mo.CG(rtol=2e-6)).solve(b).value)
    assert_near(got, np.linalg.solve((matrix + matrix.T) / 2, flat(b)), jnp.float32)


def test_leaves_that_are_no_floats_are_none():
    loss = lambda params, hyper, batch: (params["w"] * params["n"] - hyper["h"]) ** 2
    problem = mo.InnerProblem(loss)
    hyper, params = (
        {"h": 3.0, "m": np.arange(2)},
        {"w": jnp.ones(()), "n": np.asarray(2)},
    )
    with pytest.warns(UserWarning, match=r"`hyper\['m'\]` is not tuned"):
        system = mo.linear.ImplicitSystem.at(problem, hyper, params, None)
    assert system.params["n"] is None and system.hyper["m"] is None
    solution = system.solve({"w": 1.0, "n": None}).value
    np.testing.assert_allclose(solution["w"], 1 / 8)
    np.testing.assert_allclose(system.cross_transposed(params)["h"], -4)


# The distance to the solution, and verdicts


@DTYPES
def test_distance_is_the_newton_step_along_an_eigenvector(dtype):
    vectors = np.linalg.eigh(MATRIX)[1]
    # The residual at the params of float32 is rounded to the largest eigenvalue.
    rtol = 1e-10 if dtype == jnp.float64 else 1e-3
    for vector in vectors.T:
        system = at_quadratic(dtype, shift=0.1 * vector)
        np.testing.assert_allclose(system.distance(), 0.1, rtol=rtol)
    # From below elsewhere.
    shift = vectors @ np.ones(5)
    system = at_quadratic(jnp.float64, shift=shift)
    assert 0 < system.distance() <= np.linalg.norm(shift)


def test_a_solution_is_judged_successful():
    system = at_quadratic(jnp.float64).prepare(mo.CG(rtol=1e-10))
    solution = system.solve(like(system.params, 10))
    result, error = system.judge(solution, like(system.params, 10), inner_rtol=1e-3)
    assert result == mo.RESULTS.successful and error < 1e-12


def test_params_that_are_no_solution_are_judged():
    system = at_quadratic(jnp.float64, shift=0.1).prepare(mo.CG(rtol=1e-10))
    b = like(system.params, 10)
    solution = system.solve(b)
    judge = lambda **given: system.judge(solution, b, **given)
    result, error = judge(inner_rtol=1e-3)
    assert result == mo.RESULTS.inner_not_converged
    # No less than the distance, and the step to come as the right-hand side weighs it.
    size = np.linalg.norm(flat(system.params))
    step = 0.1 * np.abs(np.sum(flat(b))) / np.linalg.norm(flat(b) * flat(system.params))
    np.testing.assert_allclose(error, max(system.distance() / size, step), rtol=1e-8)
    assert judge(inner_rtol=np.inf)[0] == mo.RESULTS.successful
    accepted = judge(inner_rtol=1e-3, tolerance=2 * error)[0]
    assert accepted == mo.RESULTS.successful
    far = jax.tree.map(lambda a: a + 1e8, system.params)
    assert judge(inner_rtol=1e-3, start=far)[0] == mo.RESULTS.successful


@pytest.mark.parametrize(
    "solver",
    [mo.CG(rtol=1e-8), mo.GMRES(rtol=1e-8), mo.linear.BiCGStab(rtol=1e-8), mo.Dense()],
)
def test_an_indefinite_system_is_judged(solver):
    values, vectors = np.linalg.eigh(MATRIX)
    values[0] = -1.0
    saddle = (vectors * values) @ vectors.T
    system = at_quadratic(jnp.float64, matrix=saddle).prepare(solver)
    b = like(system.params, 10)
    solution = system.solve(b)
    assert system.judge(solution, b, inner_rtol=1e-3)[0] == mo.RESULTS.linear_indefinite
    assert solution.min_curvature < 0
    accepted = system.prepare(mo.linear.MINRES(rtol=1e-10))
    solution = accepted.solve(b)
    result, _ = accepted.judge(solution, b, inner_rtol=1e-3)
    assert result == mo.RESULTS.successful
    assert_near(flat(solution.value), np.linalg.solve(saddle, flat(b)), jnp.float32)


def test_a_singular_system_is_judged():
    values, vectors = np.linalg.eigh(MATRIX)
    values[0] = 0.0
    singular = (vectors * values) @ vectors.T
    system = at_quadratic(jnp.float64, matrix=singular)
    out_of_range = {"bias": vectors[0, 0], "weight": vectors[1:, 0].reshape(2, 2)}
    for solver in (mo.linear.MINRES(rtol=1e-8), mo.GMRES(rtol=1e-8)):
        ready = system.prepare(solver)
        solution = ready.solve(out_of_range)
        result, _ = ready.judge(solution, out_of_range, inner_rtol=jnp.inf)
        assert result in (mo.RESULTS.linear_stagnation, mo.RESULTS.linear_max_steps)
        assert solution.residual > 0.9


# Under transformations, and derived once more


def test_a_system_passes_through_jit():
    batch = {"matrix": jnp.asarray(MATRIX), "mixed": jnp.asarray(MIXED)}
    traces = []

    @eqx.filter_jit
    def make(hyper, params):
        traces.append(hyper)
        problem = mo.InnerProblem(quadratic)
        system = mo.linear.ImplicitSystem.at(problem, hyper, params, batch)
        return system.prepare(mo.CG(rtol=1e-12))

    solve = eqx.filter_jit(lambda system, b: system.solve(b).value)
    b = jnp.asarray(random(10, 5))
    for seed in range(2):
        system = make(jnp.asarray(random(seed, 4)), jnp.asarray(random(seed, 5)))
        assert_near(solve(system, b), np.linalg.solve(MATRIX, b), jnp.float64)
        assert_near(
            system.residual, MATRIX @ random(seed, 5) + MIXED @ random(seed, 4), jnp.float64
        )
    assert len(traces) == 1


def test_solutions_of_many_systems_under_vmap():
    b = like(at_root(jnp.float64)[0].params, 10)
    batches = random(5, NUM_VECTORS, 4, 4) / 4

    def solution(batch):
        hyper = {"scale": jnp.asarray(0.3), "x": jnp.asarray(random(3, 4))}
        params = {"z": jnp.asarray(random(4, 4))}
        system = mo.linear.ImplicitSystem.at(mo.RootProblem(residual), hyper, params, batch)
        return system.prepare(mo.GMRES(rtol=1e-12)).solve(b, transposed=True).value

    got = jax.vmap(solution)(jnp.asarray(batches))
    for i, batch in enumerate(batches):
        _, dense, _ = at_root(jnp.float64, batch)
        assert_near(rows(got)[i], np.linalg.solve(dense.T, flat(b)), jnp.float64)


@pytest.mark.parametrize("transposed", [False, True])
def test_derivative_of_a_solution_in_its_right_hand_side(transposed):
    system, dense, _ = at_root(jnp.float64)
    system = system.prepare(mo.GMRES(rtol=1e-12))
    b, w = like(system.params, 10), like(system.params, 20)
    along = lambda b: system.solve(b, transposed=transposed).value["z"] @ w["z"]
    matrix = dense if transposed else dense.T
    assert_near(flat(jax.grad(along)(b)), np.linalg.solve(matrix, flat(w)), jnp.float64)


def test_derivative_of_a_rough_solution_is_refused():
    system = at_quadratic(jnp.float64).prepare(mo.CG(rtol=None, max_steps=2))
    assert len(system.left_out) == 1
    along = lambda b: system.solve(b).value["bias"]
    with pytest.raises(ValueError, match="leaves something out by request"):
        jax.grad(along)(like(system.params, 10))


def test_gauss_newton_is_solved_with_and_the_exact_jacobian_judges():
    predict = lambda params, hyper, batch: jnp.tanh(batch @ params)
    criterion = lambda z, params, hyper, batch: (
        jnp.sum((z - 1) ** 2) / 2 + hyper * params @ params / 2
    )
    problem = mo.PredictionProblem(predict, criterion)
    x, p = jnp.asarray(random(6, 7, 3)), jnp.asarray(random(7, 3))
    system = mo.linear.ImplicitSystem.at(
        problem, 0.5, p, x, curvature=mo.linear.GaussNewton()
    ).prepare(mo.CG(rtol=1e-12))  # fmt: skip
    slopes = (1 - np.tanh(x @ p) ** 2)[:, None] * np.asarray(x)
    gauss_newton = slopes.T @ slopes + 0.5 * np.eye(3)
    exact = jax.hessian(lambda p: criterion(predict(p, 0.5, x), p, 0.5, x))(p)
    b = jnp.ones(3)
    got = system.solve(b).value
    assert_near(np.asarray(got), np.linalg.solve(gauss_newton, b), jnp.float64)
    assert_near(system.remaining(got, b), b - exact @ got, jnp.float64)
    assert system.left_out == ("the curvature of the model",)


def test_hypergradient_from_its_parts():
    system = at_quadratic(jnp.float64).prepare(mo.CG(rtol=1e-12))
    b = like(system.params, 10)
    w = system.solve(b, transposed=True).value
    got = -flat(system.cross_transposed(w))
    assert_near(got, -MIXED.T @ np.linalg.solve(MATRIX, flat(b)), jnp.float64)


# Errors


def at_point(problem: Any, **given: Any) -> mo.linear.ImplicitSystem:
    return mo.linear.ImplicitSystem.at(problem, 1.0, 1.0, None, **given)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda s: s.prepare(None), "`linear_solver` must be"),
        (lambda s: s.solve(jnp.ones(5)), "`vector` must have the structure"),
        (lambda s: s.solve({"bias": 1.0, "weight": np.ones(4)}), "`vector` must have"),
        (lambda s: s.solve(s.params, start=jnp.ones(5)), "`start` must have"),
        (lambda s: s.solve_many(s.params), "`vectors` must have .* one more axis in front"),
        (lambda s: s.cross_transposed(jnp.ones(5)), "`vector` must have the structure"),
        (lambda s: at_point(quadratic), "`problem` must be"),
        (
            lambda s: at_point(mo.InnerProblem(quadratic), curvature=mo.CG()),
            "`curvature` must be",
        ),
    ],
)
def test_arguments_that_do_not_fit(call, match):
    with pytest.raises(ValueError, match=match):
        call(at_quadratic(jnp.float64))


def test_a_solver_that_needs_symmetry_is_refused():
    with pytest.raises(ValueError, match="`CG` needs a symmetric"):
        at_root(jnp.float64)[0].prepare(mo.CG())


# Wrong input


def test_vectors_of_other_shapes_are_named():
    system = at_quadratic(jnp.float64)
    one, short = {"bias": 1.0, "weight": np.ones(2)}, {"a": 1.0, "b": [1.0, 1.0]}
    solution = system.solve(like(system.params, 10))
    for call, name in [
        (lambda: system.solve(one), "vector"),
        (lambda: system.cross_transposed(one), "vector"),
        (lambda: system.remaining(one, like(system.params, 10)), "solution"),
        (lambda: system.remaining(solution.value, one), "vector"),
        (lambda: system.judge(solution, one, inner_rtol=1e-3), "vector"),
        (lambda: system.cross(short), "direction"),
    ]:
        with pytest.raises(ValueError, match=f"`{name}` must have the structure"):
            call()


def test_a_source_of_batches_is_all_of_its_data():
    loss = lambda params, hyper, rows: jnp.mean((rows @ params) ** 2) / 2
    data = jnp.asarray(random(1, 12, 3))
    at = lambda batch: mo.linear.ImplicitSystem.at(
        mo.InnerProblem(loss), 1.0, jnp.ones(3), batch
    )
    assert_near(
        at(mo.Minibatches(data, 4)).residual, np.asarray(at(data).residual), jnp.float64
    )
