"""Inner games: several players, each with a loss of its own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from problems import CASES, relative_error


GMRES = mo.ImplicitAdjoint(mo.GMRES(rtol=1e-12))


#
# Three players on a quadratic
#

# Each row belongs to one player: the matrix of the field is not symmetric, and has
# eigenvalues of positive real part.
MATRIX = np.array([[2.0, 1.0, -0.5], [-1.0, 1.5, 0.75], [0.5, -0.25, 1.0]])
TARGET, WISH = np.array([1.0, -2.0, 0.5]), np.array([0.5, 0.25, -1.0])
HYPER = jnp.array([0.25, -0.5])


def player(index):
    def loss(params, hyper, batch):
        p = jnp.stack(params)
        own, row = params[index], MATRIX[index]
        others = jnp.delete(row * p, index, assume_unique_indices=True)
        pull = jnp.exp(hyper[0]) if index == 0 else 1.0
        bonus = hyper[1] * own if index == 2 else 0.0
        linear = (jnp.sum(others) - TARGET[index]) * own + bonus
        return 0.5 * row[index] * pull * own**2 + linear

    return loss


def outer_loss(params, hyper, batch):
    return 0.5 * jnp.sum((jnp.stack(params) - WISH) ** 2) + 0.1 * hyper @ hyper


THREE = mo.BilevelProblem(mo.GameProblem(tuple(map(player, range(3)))), outer_loss)
START = (jnp.zeros(()),) * 3


def by_hand(hyper):
    """The solution and the hypergradient, by dense matrices."""
    jacobian = MATRIX.copy()
    jacobian[0, 0] *= np.exp(hyper[0])
    p = np.linalg.solve(jacobian, TARGET - np.array([0.0, 0.0, hyper[1]]))
    cross = np.zeros((3, 2))
    cross[0, 0], cross[2, 1] = jacobian[0, 0] * p[0], 1.0
    dual = np.linalg.solve(jacobian.T, p - WISH)
    return p, 0.2 * np.asarray(hyper) - cross.T @ dual


@pytest.mark.parametrize(
    "adjoint",
    [
        GMRES,
        mo.ImplicitAdjoint(mo.linear.BiCGStab(rtol=1e-12)),
        mo.UnrolledAdjoint(),
        mo.UnrolledAdjoint(mo.memory.Blocks()),
        mo.ForwardAdjoint(),
    ],
    ids=repr,
)
def test_three_players_have_the_closed_form(adjoint):
    gradient, report = mo.hypergradient(
        THREE, HYPER, params=START, inner=mo.Descent(optax.sgd(0.3), 150), adjoint=adjoint
    )
    assert relative_error(gradient, by_hand(HYPER)[1]) < 1e-10
    # No one loss is that of the game.
    assert report.inner.loss is None


def test_three_players_reach_the_solution():
    solution = mo.solve_inner(
        THREE.inner,
        HYPER,
        params=START,
        solver=mo.Descent(optax.sgd(0.3), 500, atol=1e-12),
        adjoint=GMRES,
    )
    assert relative_error(solution.value, by_hand(HYPER)[0]) < 1e-11
    assert solution.stats["num_steps"] < 500


@pytest.mark.parametrize("adjoint", [GMRES, mo.UnrolledAdjoint()], ids=repr)
def test_finite_differences_agree(adjoint):
    case = CASES["game"](jnp.float64)
    check = mo.check_hypergradient(
        case.problem,
        case.hyper,
        *case.data,
        params=case.params,
        inner=mo.Descent(optax.sgd(case.rate), case.num_steps),
        adjoint=adjoint,
    )
    assert check.passed


def test_all_players_move_at_the_same_time():
    # A player who saw the step of the one before would spiral otherwise.
    case = CASES["game"](jnp.float64)
    inner: Any = case.problem.inner
    losses = inner.losses
    params, rate = case.params, 0.25
    for _ in range(3):
        gradients = tuple(
            jax.grad(
                lambda own, i=i, params=params: losses[i](
                    (*params[:i], own, *params[i + 1 :]), case.hyper, case.train
                )
            )(params[i])
            for i in range(2)
        )
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradients)
    solution = mo.solve_inner(
        case.problem.inner,
        case.hyper,
        case.train,
        params=case.params,
        solver=mo.Descent(optax.sgd(rate), 3),
        adjoint=mo.UnrolledAdjoint(),
    )
    assert relative_error(solution.value, params) < 1e-14


def test_bilinear_steps_spiral_outwards():
    problem = mo.GameProblem(
        (lambda p, h, b: h * p[0] * p[1], lambda p, h, b: -h * p[0] * p[1])
    )
    with pytest.raises(mo.SolveError):
        mo.solve_inner(
            problem,
            jnp.array(10.0),
            params=(jnp.ones(()), jnp.ones(())),
            solver=mo.Descent(optax.sgd(1.0), 1000),
            adjoint=mo.UnrolledAdjoint(),
        )


#
# What the losses may take and return
#


class Players(NamedTuple):
    left: Any
    right: Any


def test_named_tuples_and_leaves_that_are_not_trained():
    params = Players({"w": jnp.ones(2), "order": jnp.array([1, 0])}, [jnp.array(0.5), None])

    def left(params, hyper, batch):
        away = params.left["w"][params.left["order"]] - hyper
        return jnp.sum(away**2) + jnp.sum(params.left["w"]) * params.right[0]

    def right(params, hyper, batch):
        return (params.right[0] - jnp.sum(params.left["w"])) ** 2

    problem = mo.GameProblem([left, right])
    vector, out = problem.field(params, jnp.array(3.0), None, jax.random.key(0), None)
    assert type(vector) is Players and out.value is None
    assert vector.left["order"] is None
    np.testing.assert_allclose(vector.left["w"], 2 * (1 - 3.0) + 0.5)
    np.testing.assert_allclose(vector.right[0], 2 * (0.5 - 2.0))
    solution = mo.solve_inner(
        problem,
        jnp.array(3.0),
        params=params,
        solver=mo.Descent(optax.sgd(0.2), 200),
        adjoint=mo.ImplicitAdjoint(mo.GMRES()),
    )
    # 2 (w - 3) + r = 0 and r = 2 w.
    np.testing.assert_allclose(solution.value.left["w"], 1.5, rtol=1e-10)
    np.testing.assert_array_equal(solution.value.left["order"], [1, 0])


def test_auxiliary_outputs_are_one_for_each_player():
    problem = mo.GameProblem(
        (
            lambda p, h, b: ((p[0] - h) ** 2, {"double": 2 * p[0]}),
            lambda p, h, b: ((p[1] - p[0]) ** 2, p[1]),
        ),
        lambda hyper, key: (hyper, jnp.zeros(())),
        has_aux=True,
    )
    solution = mo.solve_inner(
        problem,
        jnp.array(1.0),
        solver=mo.Descent(optax.sgd(0.5), 1),
        adjoint=mo.UnrolledAdjoint(),
    )
    first, second = solution.aux
    assert first == {"double": 2.0} and second == 0.0


def test_model_state_passes_from_player_to_player():
    def first(params, hyper, batch, *, state):
        return params[0] ** 2 + 0.0 * state, 2 * state + 1

    def second(params, hyper, batch, *, state):
        return (params[1] - state) ** 2, state + params[0]

    problem = mo.GameProblem(
        (first, second), lambda hyper, key: ((hyper, hyper), hyper), has_state=True
    )
    vector, out = problem.field(
        (jnp.array(3.0), jnp.array(0.0)), None, None, jax.random.key(0), jnp.array(5.0)
    )
    assert vector == (6.0, -22.0)
    assert out.state == 14.0
    solution = mo.solve_inner(
        problem,
        jnp.array(1.0),
        solver=mo.Descent(optax.sgd(0.0), 2, state_policy=mo.nn.CarriedState()),
        adjoint=mo.UnrolledAdjoint(),
    )
    assert solution.model_state == 2 * (2 * 1 + 1 + 1) + 1 + 1


def test_each_player_draws_for_itself():
    def noisy(index):
        def loss(params, hyper, batch, *, key):
            return params[index] * jax.random.normal(key)

        return loss

    problem = mo.GameProblem((noisy(0), noisy(1)))
    params = jnp.zeros(()), jnp.zeros(())
    draws = [
        problem.field(params, None, None, jax.random.key(seed), None)[0]
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1]
    assert len({float(a) for pair in draws[1:] for a in pair}) == 4


def test_each_loss_is_called_once_in_a_field():
    calls = []

    def counted(index):
        def loss(params, hyper, batch):
            calls.append(index)
            return jnp.sum((params[index] - hyper * params[1 - index]) ** 2)

        return loss

    problem = mo.GameProblem((counted(0), counted(1)))
    problem.field((jnp.ones(2), jnp.ones(2)), 0.5, None, jax.random.key(0), None)
    assert calls == [0, 1]
    values = problem.evaluate(
        (jnp.ones(2), jnp.ones(2)), 0.5, None, jax.random.key(0), None
    ).value
    assert calls == [0, 1, 0, 1]
    assert values == (0.5, 0.5)


def test_vmap_and_jit_trace_once():
    calls = []

    def first(params, hyper, batch):
        calls.append(None)
        return (params[0] - hyper) ** 2 + params[0] * params[1]

    problem = mo.BilevelProblem(
        mo.GameProblem((first, lambda p, h, b: (p[1] - p[0]) ** 2)),
        lambda p, h, b: (p[0] + p[1]) ** 2,
    )

    @jax.jit
    @jax.vmap
    def gradient(hyper):
        params = jnp.zeros(()), jnp.zeros(())
        inner = mo.Descent(optax.sgd(0.3), 100)
        return mo.hypergradient(problem, hyper, params=params, inner=inner, adjoint=GMRES)[
            0
        ]

    got = gradient(jnp.array([0.5, 3.0]))
    count = len(calls)
    # 2 (x - h) + y = 0 and y = x: both are 2 h / 3.
    np.testing.assert_allclose(got, 2 * (4 / 3) ** 2 * np.array([0.5, 3.0]), rtol=1e-10)
    gradient(jnp.array([1.5, 2.0]))
    assert 0 < count == len(calls)


#
# What is refused
#


def solve(losses, params=(jnp.ones(()), jnp.ones(())), adjoint: Any = GMRES):
    return mo.hypergradient(
        mo.BilevelProblem(mo.GameProblem(losses), lambda p, h, b: p[0] ** 2),
        jnp.array(1.0),
        params=params,
        inner=mo.Descent(optax.sgd(0.1), 10),
        adjoint=adjoint,
    )


def pull(params, hyper, batch):
    return (params[0] - hyper) ** 2


def follow(params, hyper, batch):
    return (params[1] - params[0]) ** 2


REFUSED = {
    "one function": (lambda: mo.GameProblem(pull), "`losses` must be a tuple of functions"),
    "no losses": (lambda: mo.GameProblem(()), "`losses` must be a tuple of functions"),
    "no function": (
        lambda: mo.GameProblem((pull, 3.0)),
        r"`losses\[1\]` must be a function .*; got 3.0",
    ),
    "too few params": (
        lambda: solve((pull, follow), (jnp.ones(()),)),
        "has 2 losses, so `params` must be a tuple of length 2, .*a tuple of length 1",
    ),
    "params in a dictionary": (
        lambda: solve((pull, follow), {"a": jnp.ones(()), "b": jnp.ones(())}),
        "`params` must be a tuple of length 2",
    ),
    "one array": (
        lambda: solve((pull, follow), jnp.ones(2)),
        r"`params` must be a tuple of length 2, .*an array of shape \(2,\)",
    ),
    "losses in another order": (
        lambda: solve((follow, lambda p, h, b: (p[0] - h) ** 2)),
        r"`losses\[1\]` does not depend on `params\[1\]`, the params of its own player",
    ),
    "a player without arrays": (
        lambda: solve((pull, follow), (jnp.ones(()), jnp.array(3))),
        r"`losses\[1\]` does not depend on `params\[1\]`",
    ),
    "no scalar": (
        lambda: solve((pull, lambda p, h, b: p[1] * jnp.ones(2))),
        r"`losses\[1\]` returned an array of shape \(2,\)",
    ),
    "a pair without has_aux": (
        lambda: solve((pull, lambda p, h, b: (p[1] ** 2, p[1]))),
        r"`losses\[1\]` returned a tuple of length 2",
    ),
    "wrong signature": (
        lambda: solve((pull, lambda p, h: p[1] ** 2)),
        r"`losses\[1\]` is called as `losses\[1\]\(params, hyper, batch\)`",
    ),
    "conjugate gradients": (
        lambda: solve((pull, follow), adjoint=mo.ImplicitAdjoint()),
        r"`CG` needs a symmetric positive .* `metaopt.GMRES\(\)`",
    ),
    "gradients held constant": (
        lambda: solve((pull, follow), adjoint=mo.FirstOrderAdjoint()),
        "a `GameProblem` has none.*OneStepAdjoint",
    ),
    "picard": (
        lambda: mo.Picard().check(mo.GameProblem((pull, follow)), mo.FullBatch(None)),
        "`Picard` solves fixed-point problems alone, not a `GameProblem`",
    ),
    "no init_fn": (
        lambda: mo.GameProblem((pull, follow)).init(None, None),
        "made without `init_fn`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_the_reference_of_a_comparison_is_not_for_symmetric_systems():
    comparison = mo.compare_hypergradients(
        THREE,
        HYPER,
        params=START,
        inner=mo.Descent(optax.sgd(0.3), 150),
        adjoints={"implicit": GMRES, "CG": mo.ImplicitAdjoint()},
        repeats=1,
    )
    assert comparison.rows["implicit"].relative_error < 1e-8
    assert "`CG` needs a symmetric" in str(comparison.rows["CG"].failure)
