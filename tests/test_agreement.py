"""Every adjoint on every problem it serves, against closed forms; and everything that
`hyper`, params, losses and data may be, against closed forms and finite differences."""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import metaopt as mo
from members import ADJOINTS, inner_solver
from problems import Case, CASES, flat, LOSS, relative_error


def slow(*parameters: Any) -> Any:
    return pytest.param(*parameters, marks=pytest.mark.slow)


#
# The table
#

# Inner problems and linear systems are solved to 1e-12 (1e-5) relative, and condition
# numbers are below 10; what is left of three digits is for rounding.
RTOL = {jnp.float64: 1e-10, jnp.float32: 2e-4}

# A cell costs about a second to compile. In the quick run each adjoint meets each kind of
# problem in float64, and a part of the table is batched in float32; the rest is marked as
# slow.
_KINDS = ("ridge", "fixed point", "root", "game")  # the cheapest of each kind
_DIFFERENT = ("unrolled", "forward", "truncated", "one step", "implicit, CG")


def _is_quick(adjoint: str, case: str, dtype: Any, mode: str) -> bool:
    if dtype == jnp.float64 and mode == "jit":
        return adjoint in _DIFFERENT or case in _KINDS
    if dtype == jnp.float32 and mode == "vmap":
        return case == "fixed point" or (adjoint in _DIFFERENT and case == "ridge")
    return False


def _cells() -> Iterator[Any]:
    for adjoint, member in ADJOINTS.items():
        for case in CASES:
            if CASES[case](jnp.float64).kind not in member.serves:
                continue
            for dtype in RTOL:
                for mode in ("jit", "vmap"):
                    quick = _is_quick(adjoint, case, dtype, mode)
                    yield pytest.param(
                        adjoint,
                        case,
                        dtype,
                        mode,
                        id=f"{adjoint}-{case}-{dtype.__name__}-{mode}",
                        marks=() if quick else pytest.mark.slow,
                    )


@pytest.mark.one_of(12)
@pytest.mark.parametrize("adjoint, case, dtype, mode", list(_cells()))
def test_hypergradient_is_the_closed_form(adjoint, case, dtype, mode):
    member, case = ADJOINTS[adjoint], CASES[case](dtype)
    static = eqx.partition(case.hyper, eqx.is_inexact_array)[1]

    def gradient(trainable):
        out, report = mo.hypergradient(
            case.problem,
            eqx.combine(trainable, static),
            *case.data,
            params=case.params,
            inner=inner_solver(case),
            adjoint=member.make(case),
        )
        return out, report.outer.loss

    hypers = [case.hyper, case.moved]
    points = [eqx.filter(hyper, eqx.is_inexact_array) for hyper in hypers]
    if mode == "jit":
        hypers, compiled = hypers[:1], jax.jit(gradient)
        found = [compiled(points[0])]
    else:
        stacked = jax.vmap(gradient)(jax.tree.map(lambda *a: jnp.stack(a), *points))
        found = [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(2)]
    for hyper, (out, outer_loss) in zip(hypers, found, strict=True):
        twin = case.reference(hyper)
        want = twin.gradient(member.num_terms, case.rate)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves((out, outer_loss)))
        assert relative_error(out, want) < RTOL[dtype]
        assert abs(outer_loss / twin.outer_loss - 1) < RTOL[dtype]


#
# Derivatives by JAX through `solve_inner`
#


def value_by_solve_inner(adjoint: str, case: Case) -> Any:
    """The outer loss as a function of the trainable part of `hyper`."""
    static = eqx.partition(case.hyper, eqx.is_inexact_array)[1]

    def value(trainable):
        hyper = eqx.combine(trainable, static)
        solution = mo.solve_inner(
            case.problem.inner,
            hyper,
            case.train,
            params=case.params,
            solver=inner_solver(case),
            adjoint=ADJOINTS[adjoint].make(case),
        )
        params, key = solution.value, jax.random.key(0)
        return case.problem.evaluate_outer(params, hyper, case.valid, key, None)[0]

    return value


@pytest.mark.one_of(2)
@pytest.mark.parametrize(
    "adjoint, case",
    [
        ("unrolled", "quadratic"),
        ("forward", "fixed point"),
        ("one step", "fixed point"),
        ("implicit, CG", "ridge"),
        ("implicit, Dense", "root"),
        ("implicit, Dense", "game"),
        slow("unrolled, blocks made again", "ridge"),
        slow("forward", "quadratic"),
        slow("truncated", "quadratic"),
        slow("implicit, CG", "quadratic"),
        slow("implicit, GMRES", "root"),
        slow("implicit, BiCGStab", "fixed point"),
        slow("implicit, Neumann", "fixed point"),
    ],
)
def test_derivatives_of_solve_inner(adjoint, case):
    case, member = CASES[case](jnp.float64), ADJOINTS[adjoint]
    value = value_by_solve_inner(adjoint, case)
    point = eqx.filter(case.hyper, eqx.is_inexact_array)
    want = case.reference().gradient(member.num_terms, case.rate)
    # `jit` for speed: `test_hypergradient_of_a_loss_that_closes_over_tracers` does without.
    gradient = jax.jit(jax.grad(value))(point)
    assert relative_error(gradient, want) < RTOL[jnp.float64]
    direction = np.linspace(-1.0, 1.0, len(want))
    push = jax.jit(lambda point, direction: jax.jvp(value, (point,), (direction,)))
    _, slope = push(point, case.like_hyper(direction))
    assert abs(slope / (direction @ want) - 1) < RTOL[jnp.float64]


@pytest.mark.parametrize(
    "adjoint, case",
    [
        ("unrolled", "fixed point"),
        ("implicit, Dense", "root"),
        slow("unrolled", "game"),
        slow("unrolled", "quadratic"),
        slow("forward", "ridge"),
        slow("implicit, CG", "ridge"),
        slow("implicit, Neumann", "fixed point"),
    ],
)
def test_second_derivatives(adjoint, case):
    case = CASES[case](jnp.float64)
    point = eqx.filter(case.hyper, eqx.is_inexact_array)
    hessian = jax.jit(jax.hessian(value_by_solve_inner(adjoint, case)))(point)
    # Both levels flattened: the rows are the leaves of the outer structure.
    rows = jax.tree.leaves(hessian, is_leaf=lambda x: _like(x, point))
    sizes = [leaf.size for leaf in jax.tree.leaves(point)]
    got = np.concatenate(
        [
            np.concatenate(
                [np.asarray(a).reshape(m, -1) for a in jax.tree.leaves(row)], axis=1
            )
            for row, m in zip(rows, sizes, strict=True)
        ]
    )
    h, step = flat(point), 1e-5
    want = [
        (case.twin(h + e).gradient() - case.twin(h - e).gradient()) / (2 * step)
        for e in step * np.eye(len(h))
    ]
    # The differences are good to about the square of their step.
    assert relative_error(got, np.stack(want, axis=1)) < 1e-7


def _like(x: Any, tree: Any) -> bool:
    return jax.tree.structure(x) == jax.tree.structure(tree)


#
# Arrays that a loss closes over
#


@pytest.mark.one_of(2)
@pytest.mark.parametrize(
    "adjoint",
    [
        name if name in _DIFFERENT else slow(name)
        for name, member in ADJOINTS.items()
        if LOSS in member.serves
    ],
)
def test_closed_over_arrays_are_differentiated(adjoint):
    # Elsewhere an error about escaped tracers, or their derivative is lost.
    member, case = ADJOINTS[adjoint], CASES["ridge"](jnp.float64)
    curvature = jnp.array([0.75, 1.5])

    def value(hyper, target, wish):
        def inner_loss(params, hyper, batch):
            pull = curvature * (params - target) ** 2
            return 0.5 * jnp.sum(pull + hyper * params**2)

        problem = mo.BilevelProblem(
            inner_loss, lambda params, *_: 0.5 * jnp.sum((params - wish) ** 2)
        )
        solution = mo.solve_inner(
            problem.inner,
            hyper,
            params=jnp.zeros(2),
            solver=inner_solver(case),
            adjoint=member.make(case),
        )
        key = jax.random.key(0)
        return problem.evaluate_outer(solution.value, hyper, None, key, None)[0]

    target, wish = jnp.array([[1.0, -2.0], [0.5, 3.0]]), jnp.array([0.25, -0.5])
    hyper = jnp.array([0.25, 0.5])
    by_all = jax.jit(jax.vmap(jax.grad(value, argnums=(0, 1, 2)), (None, 0, None)))
    got = by_all(hyper, target, wish)

    total = curvature + hyper
    params = curvature * target / total
    inverse = 1 / total
    if member.num_terms is not None:
        powers = jnp.arange(member.num_terms + 1)[:, None]
        inverse = jnp.sum(case.rate * (1 - case.rate * total) ** powers, axis=0)
    error = params - wish
    for a, b in zip(got, (-error * params * inverse, error * curvature * inverse, -error)):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_hypergradient_of_a_loss_that_closes_over_tracers():
    # As a user would who compiles a function of the data by hand.
    def gradient(target, hyper):
        problem = mo.BilevelProblem(
            lambda params, hyper, batch: jnp.sum((params - hyper * target) ** 2),
            lambda params, hyper, batch: jnp.sum((params - target) ** 2),
        )
        inner = mo.Descent(optax.sgd(0.5), num_steps=1)
        return mo.hypergradient(
            problem, hyper, params=jnp.zeros(2), inner=inner, adjoint=mo.UnrolledAdjoint()
        )[0]

    target = jnp.array([1.0, 2.0])
    for transformed in (gradient, jax.jit(gradient)):
        got = transformed(target, jnp.array(3.0))
        np.testing.assert_allclose(got, 2 * 2 * jnp.sum(target**2), rtol=1e-12)


def test_params_that_are_pulled_to_where_they_start():
    # As in meta-learning by implicit differentiation: with the Hessian H of a task, its
    # hypergradient solves I + H / pull. Elsewhere the system that is solved is another
    # one, so that no number of steps makes it right.
    rng = np.random.default_rng(0)
    root, slope = rng.normal(size=(6, 6)), rng.normal(size=6)
    hessian, pull, hyper = root @ root.T / 6, 0.5, rng.normal(size=6)

    def task(params, hyper, batch):
        fit = 0.5 * params @ (hessian @ params) - slope @ params
        return fit + 0.5 * pull * jnp.sum((params - hyper) ** 2)

    gradient, _ = mo.hypergradient(
        mo.BilevelProblem(
            mo.InnerProblem(task, init_fn=lambda hyper, key: hyper),
            lambda params, hyper, batch: 0.5 * jnp.sum((params - 1) ** 2),
        ),
        hyper,
        inner=mo.Descent(optax.sgd(0.25), num_steps=400),
        adjoint=mo.ImplicitAdjoint(mo.CG(rtol=1e-12)),
    )
    params = np.linalg.solve(hessian + pull * np.eye(6), slope + pull * hyper)
    expected = np.linalg.solve(np.eye(6) + hessian / pull, params - 1)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9)


#
# Pytrees of any kind
#


class Net(eqx.Module):
    """Params with leaves of two precisions, and leaves that are not trained."""

    wide: jax.Array
    narrow: jax.Array
    order: jax.Array
    activation: Any
    bias: None = None
    power: int = eqx.field(static=True, default=1)


@pytest.mark.one_of(2)
@pytest.mark.parametrize(
    "adjoint, forgotten, rtol",
    [
        (mo.UnrolledAdjoint(), 0, 1e-5),
        (mo.ForwardAdjoint(), 0, 1e-5),
        (mo.TruncatedAdjoint(5), 1, 1e-5),
        # A leaf in bfloat16 cannot be more accurate.
        (mo.ImplicitAdjoint(mo.CG(), rtol=0.02), 0, 1e-5),
        (mo.ImplicitAdjoint(mo.Dense(), rtol=0.02), 0, 1e-5),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, mo.extend.AbstractAdjoint) else "",
)
def test_mixed_leaves(adjoint, forgotten, rtol):
    net = Net(
        wide=jnp.zeros(2, jnp.float32),
        narrow=jnp.zeros((), jnp.bfloat16),
        order=jnp.array([1, 0]),
        activation=jnp.asarray,
    )
    hyper = {
        "target": jnp.array([1.0, -2.0], jnp.float32),
        "narrow": jnp.array(0.5, jnp.bfloat16),
        "integer": jnp.ones((), int),
        "none": None,
        "function": jnp.tanh,
    }

    def inner_loss(params, hyper, batch):
        wide = params.activation(params.wide)[params.order] - hyper["target"]
        narrow = params.narrow - hyper["narrow"]
        return 2 * jnp.sum(wide**2) + jnp.sum(narrow.astype(jnp.float32) ** 2)

    def outer_loss(params, hyper, batch):
        return jnp.sum(params.wide**2) * params.power + 3 * params.narrow**2

    with pytest.warns(UserWarning, match=r"`hyper\['integer'\]` is not tuned"):
        gradient, report = mo.hypergradient(
            mo.BilevelProblem(inner_loss, outer_loss),
            hyper,
            params=net,
            inner=mo.Descent(optax.sgd(0.2), num_steps=40),
            adjoint=adjoint,
        )
    assert report.outer.unreached == ()
    assert gradient["integer"] is gradient["none"] is gradient["function"] is None
    assert gradient["target"].dtype == jnp.float32
    assert gradient["narrow"].dtype == jnp.bfloat16
    # Each step of a rate of 0.2 leaves 0.2 and 0.6 of the way to go.
    wide, narrow = 1 - forgotten * 0.2**5, 1 - forgotten * 0.6**5
    np.testing.assert_allclose(gradient["target"], 2 * wide * hyper["target"], rtol=rtol)
    # A few units of rounding of bfloat16, 0.008.
    np.testing.assert_allclose(float(gradient["narrow"]), 3 * narrow, rtol=0.03)


def test_half_precision_where_the_loss_insists_on_it():
    # A loop whose carry has a dtype of its own: the system is solved in that, which its
    # tolerance shows. The curvature is 2 and the derivative that of p = h.
    def loss(params, hyper, batch):
        def add(total, x):
            return total + (x - hyper.astype(x.dtype)) ** 2, None

        return jax.lax.scan(add, jnp.zeros((), jnp.bfloat16), params)[0]

    problem = mo.BilevelProblem(loss, lambda p, h, batch: jnp.sum(p))
    with (
        pytest.warns(UserWarning, match="cannot be evaluated in float32"),
        pytest.warns(UserWarning, match="bfloat16 can reach"),
    ):
        gradient, report = mo.hypergradient(
            problem,
            jnp.asarray(0.5, jnp.float32),
            params=jnp.zeros(3, jnp.bfloat16),
            inner=mo.Descent(optax.sgd(0.25), 40),
            adjoint=mo.ImplicitAdjoint(inner_rtol=0.02, error=mo.accuracy.DualWeighted()),
        )
    np.testing.assert_allclose(gradient, 3.0, rtol=0.02)
    assert not report.derivative.error_is_bound


@pytest.mark.one_of(4)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_solved_with_in_float32(dtype):
    # The derivative at params and data of half precision, which are exact in float32.
    x = jax.random.normal(jax.random.key(0), (40, 4), jnp.float32).astype(dtype)
    data = x, jnp.sin(x[:, 0])

    def mse(params, hyper, batch):
        return jnp.mean((batch[0] @ params - batch[1]) ** 2)

    def penalised(params, hyper, batch):
        return mse(params, hyper, batch) + jnp.sum(jnp.exp(hyper) * params**2)

    problem = mo.BilevelProblem(penalised, mse)
    hyper = jnp.full(4, -2.0, jnp.float32)
    descent = mo.Descent(optax.sgd(0.2), num_steps=200)
    # The inner solution is off by a few units of rounding, which has to be accepted.
    adjoint = mo.ImplicitAdjoint(inner_rtol=0.05)
    with pytest.raises(mo.SolveError, match="not solved accurately enough"):
        mo.hypergradient(
            problem, hyper, data, data, params=jnp.zeros(4, dtype), inner=descent,
            adjoint=mo.ImplicitAdjoint(inner_rtol=1e-6),
        )  # fmt: skip
    half, report = mo.hypergradient(
        problem,
        hyper,
        data,
        data,
        params=jnp.zeros(4, dtype),
        inner=descent,
        adjoint=adjoint,
    )
    assert report.derivative.linear_residual is not None
    assert (
        report.derivative.linear_residual < 1e-5
    )  # which half precision could not tell from 0.01
    solution = mo.solve_inner(
        problem.inner,
        hyper,
        data,
        params=jnp.zeros(4, dtype),
        solver=descent,
        adjoint=adjoint,
    )
    assert solution.value.dtype == dtype

    def plain(hyper):
        found = mo.solve_inner(
            problem.inner,
            hyper,
            data,
            params=jnp.zeros(4, dtype),
            solver=descent,
            adjoint=adjoint,
        )
        return mse(found.value, hyper, data)

    np.testing.assert_allclose(jax.grad(plain)(hyper), half, rtol=2e-2, atol=1e-4)

    def wide(array):
        return array.astype(jnp.float64)

    def of_solution(hyper):
        return mo.solve_inner(
            problem.inner,
            hyper,
            jax.tree.map(wide, data),
            params=wide(solution.value),
            solver=mo.Descent(optax.sgd(0.0), num_steps=1),
            adjoint=mo.ImplicitAdjoint(inner_rtol=0.05),
        ).value

    outer_slope = jax.grad(mse)(solution.value, hyper, data)
    _, pullback = jax.vjp(of_solution, wide(hyper))
    # What is left is rounding in the slope of the outer loss, which users compute.
    np.testing.assert_allclose(half, pullback(wide(outer_slope))[0], rtol=1e-3, atol=1e-5)


#
# Randomness, auxiliary output, model state, batches
#


@pytest.mark.one_of(2)
@pytest.mark.parametrize("optimistix", [False, True])
def test_losses_that_take_a_key(optimistix):
    def inner_loss(params, hyper, batch, key):
        mask = jax.random.bernoulli(key, 0.5, params.shape)
        return 0.5 * jnp.sum((params - hyper) ** 2 + mask * params**2)

    def outer_loss(params, hyper, batch, key):
        return jnp.sum(params * jax.random.normal(key, params.shape))

    arguments: dict[str, Any] = dict(
        problem=mo.BilevelProblem(inner_loss, outer_loss),
        hyper=jnp.linspace(0.5, 1.5, 8),
        params=jnp.zeros(8),
        inner=mo.Descent(optax.sgd(0.5), num_steps=10),
        adjoint=mo.UnrolledAdjoint(),
    )
    if optimistix:
        # The mask is drawn once and held: what is differentiated is what was solved.
        newton = optx.Newton(rtol=1e-10, atol=1e-10)
        arguments["inner"] = mo.OptimistixSolver(newton)
        arguments["adjoint"] = mo.ImplicitAdjoint(mo.CG(rtol=1e-10))
    first, again, other = (
        mo.hypergradient(**arguments, key=jax.random.key(seed))[0] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.all(first != other)
    mo.check_hypergradient(**arguments, key=jax.random.key(1))


def test_the_inner_residual_is_that_of_the_last_batch_and_key():
    # Steps of the whole way: each ends where its own gradient is zero, and no other's.
    def inner_loss(params, hyper, batch, key):
        noise = jax.random.normal(key, params.shape)
        return 0.5 * jnp.sum((params - hyper * batch - noise) ** 2)

    _, report = mo.hypergradient(
        mo.BilevelProblem(inner_loss, lambda params, hyper, batch: jnp.sum(params**2)),
        1.0,
        mo.BatchSequence(jnp.arange(3.0)),
        params=jnp.zeros(2),
        inner=mo.Descent(optax.sgd(1.0), num_steps=3),
        adjoint=mo.UnrolledAdjoint(),
    )
    assert report.inner.residual is not None and report.inner.residual < 1e-14


@pytest.mark.parametrize("optimistix", [False, True])
def test_auxiliary_output(optimistix):
    def inner_loss(params, hyper, batch):
        value = 0.5 * (params - hyper) ** 2
        return value, {"twice": 2 * params, "count": 7}

    def outer_loss(params, hyper, batch):
        return params**2, ("seen", params + 1)

    inner = mo.InnerProblem(inner_loss, has_aux=True)
    problem = mo.BilevelProblem(inner, outer_loss, has_aux=True)
    solver, adjoint = mo.Descent(optax.sgd(1.0), num_steps=2), mo.UnrolledAdjoint()
    if optimistix:
        solver = mo.OptimistixSolver(optx.Newton(rtol=1e-10, atol=1e-10))
        adjoint = mo.ImplicitAdjoint()
    hyper, params = jnp.array(3.0), jnp.array(0.0)
    gradient, report = mo.hypergradient(
        problem, hyper, params=params, inner=solver, adjoint=adjoint
    )
    np.testing.assert_allclose(gradient, 6.0, rtol=1e-12)
    assert report.outer.aux[0] == "seen"
    np.testing.assert_allclose(report.outer.aux[1], 4.0, rtol=1e-12)
    solution = mo.solve_inner(inner, hyper, params=params, solver=solver, adjoint=adjoint)
    # The last evaluation of `Descent` is at the start of its last step, the solution.
    np.testing.assert_allclose(solution.aux["twice"], 6.0, rtol=1e-12)
    assert solution.aux["count"] == 7


STATE, RATE, NUM_STEPS = 0.5, 0.3, 6


def _loop_with_state(policy: str, hyper: float, rows: np.ndarray, num_steps: int):
    """The twin of the problem below: a loop in plain Python."""
    p, carried = 1.0, STATE
    final = STATE
    for row in rows[:num_steps]:
        seen = carried if policy == "carried" else STATE
        updated = 0.75 * seen + 0.25 * np.mean(row) * p
        carried = updated
        final = STATE if policy == "frozen" else updated
        p -= RATE * ((p - 1 + seen) + np.exp(hyper) * p)
    return p, final


@pytest.mark.one_of(2)
@pytest.mark.parametrize(
    "name, policy, adjoint",
    [
        ("carried", mo.nn.CarriedState(), mo.UnrolledAdjoint()),
        ("carried", mo.nn.CarriedState(), mo.ForwardAdjoint()),
        ("frozen", mo.nn.FrozenState(), mo.UnrolledAdjoint()),
        ("frozen", mo.nn.FrozenState(), mo.ImplicitAdjoint(mo.CG(rtol=1e-12))),
        ("each step", mo.nn.PerStepState(), mo.UnrolledAdjoint(mo.memory.Blocks())),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_model_state(name, policy, adjoint):
    # Elsewhere running statistics are lost in the inner loop, as those of batch norm.
    def inner_loss(params, hyper, batch, state):
        value = 0.5 * (params - 1 + state) ** 2 + 0.5 * jnp.exp(hyper) * params**2
        return value, 0.75 * state + 0.25 * jnp.mean(batch) * params

    def outer_loss(params, hyper, batch, state):
        return 0.5 * (params - 0.25) ** 2 + state * params

    def value(hyper):
        p, state = _loop_with_state(name, hyper, rows, num_steps)
        return 0.5 * (p - 0.25) ** 2 + state * p

    rows = np.linspace(0.0, 2.0, 60).reshape(20, 3) ** 2
    train, num_steps = mo.BatchSequence(rows), NUM_STEPS
    if isinstance(adjoint, mo.ImplicitAdjoint):
        rows, num_steps = np.tile(rows[:1], (80, 1)), 80
        train = rows[0]
    problem = mo.BilevelProblem(mo.InnerProblem(inner_loss, has_state=True), outer_loss)
    solver = mo.Descent(optax.sgd(RATE), num_steps=num_steps, state_policy=policy)
    hyper, params, state = jnp.array(-0.5), jnp.array(1.0), jnp.array(STATE)
    gradient, report = mo.hypergradient(
        problem,
        hyper,
        train,
        params=params,
        inner=solver,
        adjoint=adjoint,
        model_state=state,
    )
    difference = (value(-0.5 + 1e-5) - value(-0.5 - 1e-5)) / 2e-5
    np.testing.assert_allclose(report.outer.loss, value(-0.5), rtol=1e-12)
    np.testing.assert_allclose(gradient, difference, rtol=1e-8)
    solution = mo.solve_inner(
        problem.inner,
        hyper,
        train,
        params=params,
        solver=solver,
        adjoint=adjoint,
        model_state=state,
    )
    p, final = _loop_with_state(name, -0.5, rows, num_steps)
    np.testing.assert_allclose(solution.value, p, rtol=1e-12)
    np.testing.assert_allclose(solution.model_state, final, rtol=1e-12)


def _squares(params, hyper, batch):
    x, y = batch
    return 0.5 * jnp.mean((x @ params - y) ** 2) + 0.5 * jnp.exp(hyper) * params @ params


def test_batches_made_beforehand():
    case = CASES["ridge"](jnp.float64)
    x, y = jax.tree.map(lambda a: np.asarray(a).reshape(6, 4, *a.shape[1:]), case.train)

    def value(hyper):
        w = np.zeros(4)
        for a, b in zip(x, y):
            w = w - 0.2 * (a.T @ (a @ w - b) / len(a) + np.exp(hyper) * w)
        xv, yv = (np.asarray(a) for a in case.valid)
        return 0.5 * np.mean((xv @ w - yv) ** 2)

    problem = mo.BilevelProblem(_squares, case.problem.outer_loss)
    for adjoint in (mo.UnrolledAdjoint(), mo.TruncatedAdjoint(6)):
        gradient, report = mo.hypergradient(
            problem,
            -1.0,
            mo.BatchSequence((x, y)),
            case.valid,
            params=jnp.zeros(4),
            inner=mo.Descent(optax.sgd(0.2), num_steps=6),
            adjoint=adjoint,
        )
        np.testing.assert_allclose(report.outer.loss, value(-1.0), rtol=1e-12)
        difference = (value(-1.0 + 1e-5) - value(-1.0 - 1e-5)) / 2e-5
        np.testing.assert_allclose(gradient, difference, rtol=1e-8)


@pytest.mark.parametrize(
    "adjoint, num_steps",
    [(mo.UnrolledAdjoint(), 4), (mo.TruncatedAdjoint(2), 2), (mo.OneStepAdjoint(), 1)],
    ids=["unrolled", "truncated", "one step"],
)
def test_the_steps_that_are_differentiated_see_their_own_batches(adjoint, num_steps):
    # Each step halves the way to `hyper` times its batch.
    batches = np.array([1.0, -2.0, 4.0, 8.0])
    shares = batches * 0.5 ** np.arange(4, 0, -1)
    gradient, report = mo.hypergradient(
        mo.BilevelProblem(
            lambda params, hyper, batch: 0.5 * (params - hyper * batch) ** 2,
            lambda params, hyper, batch: params,
        ),
        3.0,
        mo.BatchSequence(batches),
        params=jnp.array(0.0),
        inner=mo.Descent(optax.sgd(0.5), num_steps=4),
        adjoint=adjoint,
    )
    np.testing.assert_allclose(report.outer.loss, 3 * np.sum(shares), rtol=1e-12)
    np.testing.assert_allclose(gradient, np.sum(shares[-num_steps:]), rtol=1e-12)


def test_minibatches():
    case = CASES["ridge"](jnp.float64)
    batches = mo.Minibatches(case.train, batch_size=5)
    plan = np.asarray(batches.plan(jax.random.key(0), 10))
    assert plan.shape == (10, 5)
    # An epoch uses each of the 24 rows once; the next has another order.
    one, other = plan.ravel()[:24], plan.ravel()[24:48]
    for epoch in (one, other):
        assert sorted(epoch.tolist()) == list(range(24))
    assert not np.array_equal(one, other)
    x, y = batches.batch(plan[3])
    np.testing.assert_array_equal(x, case.train[0][plan[3]])
    np.testing.assert_array_equal(y, case.train[1][plan[3]])
    mo.check_hypergradient(
        mo.BilevelProblem(_squares, case.problem.outer_loss),
        -1.0,
        batches,
        mo.Minibatches(case.valid, batch_size=6),
        params=jnp.zeros(4),
        inner=mo.Descent(optax.sgd(0.2), num_steps=10),
        adjoint=mo.UnrolledAdjoint(),
    )


#
# Optimizers built from `hyper`
#

# The first feature is zero in every row, so the first row of the weights of the first
# layer always has a gradient of exactly zero.
ROWS = jnp.concatenate([jnp.zeros((12, 1)), jnp.sin(jnp.arange(24.0)).reshape(12, 2)], 1)


def _network(params, hyper, batch):
    del hyper
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["first"]) @ params["last"] - y) ** 2)


def _rate_of_each_layer(hyper):
    layers = {
        name: optax.sgd(jnp.exp(hyper["log_rate"][name])) for name in hyper["log_rate"]
    }
    return optax.partition(layers, {"first": "first", "last": "last"})


def _momentum_and_decay(hyper):
    return optax.chain(
        optax.add_decayed_weights(jnp.exp(hyper["log_decay"])),
        optax.sgd(0.2, momentum=jax.nn.sigmoid(hyper["momentum"]), nesterov=True),
    )


def _rate_of_each_step(hyper):
    return optax.sgd(lambda step: jnp.exp(hyper["log_rate"])[step])


def _adam(hyper):
    return optax.adam(jnp.exp(hyper["log_rate"]), b1=jax.nn.sigmoid(hyper["b1"]))


def _clipped(hyper):
    return optax.chain(
        optax.clip_by_global_norm(jnp.exp(hyper["log_norm"])), optax.sgd(0.1)
    )


@pytest.mark.one_of(2)
@pytest.mark.parametrize(
    "build, hyper",
    [
        (_rate_of_each_layer, {"log_rate": {"first": -1.0, "last": -2.0}}),
        (_momentum_and_decay, {"log_decay": -2.0, "momentum": 1.0}),
        (_rate_of_each_step, {"log_rate": np.linspace(-1.0, -2.0, 12)}),
        (_adam, {"log_rate": -3.0, "b1": 2.0}),
        (_clipped, {"log_norm": -2.0}),
    ],
    ids=lambda x: x.__name__.strip("_") if callable(x) else "",
)
def test_optimizers_built_from_hyper(build, hyper):
    # Adam once gave NaN here, and so do most of its family when differentiated as they
    # are: the slope of a square root at zero.
    key = jax.random.key(3)
    params = {
        "first": jax.random.normal(key, (3, 2)),
        "last": jnp.array([1.0, -0.5]),
    }
    y = jnp.cos(jnp.arange(12.0))
    result = mo.check_hypergradient(
        mo.BilevelProblem(_network, _network),
        hyper,
        (ROWS, y),
        (ROWS[:6], -y[:6]),
        params=params,
        inner=mo.Descent(build, num_steps=12),
        adjoint=mo.UnrolledAdjoint(),
    )
    assert np.all(np.isfinite(result.hypergradient))
    assert np.linalg.norm(result.finite_difference) > 1e-4


def test_clipping_at_a_gradient_of_exactly_zero():
    # The slope of a norm at zero, which is where this inner problem starts.
    result = mo.check_hypergradient(
        mo.BilevelProblem(
            lambda params, hyper, batch: jnp.sum((params - hyper) ** 2),
            lambda params, hyper, batch: jnp.sum((params - 1.0) ** 2),
        ),
        jnp.zeros(2),
        params=jnp.zeros(2),
        inner=mo.Descent(
            optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), num_steps=3
        ),
        adjoint=mo.UnrolledAdjoint(),
    )
    assert np.all(result.hypergradient != 0)


def test_forward_mode_through_an_optimizer_built_from_hyper():
    params = {"first": jnp.ones((3, 2)), "last": jnp.array([1.0, -0.5])}
    gradients = [
        mo.hypergradient(
            mo.BilevelProblem(_network, _network),
            {"log_rate": {"first": -1.0, "last": -2.0}},
            (ROWS, jnp.cos(jnp.arange(12.0))),
            (ROWS, jnp.sin(jnp.arange(12.0))),
            params=params,
            inner=mo.Descent(_rate_of_each_layer, num_steps=12),
            adjoint=adjoint,
        )[0]
        for adjoint in (mo.UnrolledAdjoint(), mo.ForwardAdjoint())
    ]
    assert relative_error(*gradients) < 1e-10


def test_plain_adam_has_no_derivative_at_zero_gradients():
    # What the tests above would see if the updates were differentiated as they are.
    def params_after(rate):
        params: Any = jnp.zeros(2)
        transform = optax.adam(rate)
        state = transform.init(params)
        for _ in range(2):
            gradient = jnp.array([0.0, 1.0]) * (params - 1)
            updates, state = transform.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum(params)

    assert jnp.isnan(jax.grad(params_after)(0.1))
