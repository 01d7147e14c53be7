"""Self-tuning networks: against closed forms, against slow twins, and what they refuse.

The slow twins go through a batch group by group and put an ordinary model, whose weights
are formed by `mo.nn.ordinary`, in the place of the best-response network.
"""

import functools as ft
import itertools
from statistics import NormalDist
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import metaopt as mo
from metaopt._best_response import ordinary
from metaopt._bilevel._perturbed import (
    Coordinates,
    cut,
    mean_state,
    PerturbedBatch,
)


STN: Any = mo.STN()
DELTA: Any = mo.DeltaSTN()
each_method = pytest.mark.parametrize("method", [STN, DELTA], ids=["STN", "DeltaSTN"])


# Ridge regression, whose best response has a closed form


class Ridge(mo.extend.AbstractPredictionProblem):
    """With a response of its own for each weight, which can represent any Jacobian."""

    num_features: int = eqx.field(static=True)

    def init(self, hyper, key):
        model = eqx.nn.Linear(self.num_features, "scalar", use_bias=False, key=key)
        return mo.nn.self_tuning(model, 1, tied=False, key=key)

    def predict(self, params, hyper, batch):
        return jax.vmap(params)(batch[0])

    def criterion(self, predictions, params, hyper, batch):
        loss = jnp.mean((predictions - batch[1]) ** 2) / 2
        return loss + jnp.exp(hyper) * mo.nn.squared_norm(params) / 2


def mean_squared_error(params, hyper, batch):
    return jnp.mean((jax.vmap(params)(batch[0]) - batch[1]) ** 2)


def digits() -> tuple[Any, Any]:
    """200 rows to train on and 800 to validate on: pixels, and the digit as a number."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[:1000]
    x, y = x[order] / 16, (y[order] - 4.5) / 4.5
    x = x - np.mean(x[:200], axis=0)
    return (x[:200], y[:200]), (x[200:], y[200:])


def condensed(x, y) -> tuple[Any, Any]:
    """As many rows as there are columns, of which each mean of squares is the same."""
    rows = np.linalg.qr(np.column_stack([x, y]), mode="r")
    rows *= np.sqrt(len(rows) / len(x))
    return rows[:, :-1], rows[:, -1]


TRAIN, VALID = digits()
SMALL_TRAIN, SMALL_VALID = condensed(*TRAIN), condensed(*VALID)
DIGITS = mo.BilevelProblem(Ridge(64), mean_squared_error)
LOG_L2 = np.log(1e-2)


def solution_at(log_l2):
    x, y = TRAIN
    return jnp.linalg.solve(x.T @ x / 200 + jnp.exp(log_l2) * jnp.eye(64), x.T @ y / 200)


def jacobian():
    return jax.jacfwd(solution_at)(LOG_L2)


def normal_quantiles(num: int) -> np.ndarray:
    nodes = np.array([NormalDist().inv_cdf((i + 0.5) / num) for i in range(num)])
    return nodes / np.sqrt(np.mean(nodes**2))


def error(actual, expected) -> float:
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


@ft.cache
def at_convergence(method: Any) -> Any:
    """The errors of general weights and of the Jacobian, where a network is trained to
    the end, as a function of the scale of the perturbation.

    With the rows of the response scaled by one the objective is quadratic in the general
    weights and those of the response, and one step of Newton minimises it. (The response
    of `DeltaSTN` holds the general weights constant, so it is solved for after them.)
    """
    nodes = normal_quantiles(64)
    x, y = SMALL_TRAIN
    groups = cut((jnp.tile(x, (len(nodes), 1)), jnp.tile(y, len(nodes))), len(x), "batch")
    keys = jax.random.split(jax.random.key(0), len(nodes))
    hyper = jnp.asarray(LOG_L2)
    start = DIGITS.inner.init(hyper, jax.random.key(0))
    ones = jnp.ones((1, 1))
    start = eqx.tree_at(lambda p: p.response["weight"].scale, start, ones)
    parts = lambda p: (p.layer.weight, p.response["weight"].weight)
    flat, unravel = jax.flatten_util.ravel_pytree(parts(start))

    @jax.jit
    def solve(scale):
        def loss(flat):
            batch = PerturbedBatch(
                groups=groups,
                coordinates=Coordinates(hyper),
                hyper=hyper[None],
                log_scale=jnp.log(scale)[None],
                noise=jnp.asarray(nodes)[:, None],
                keys=keys,
            )
            params = eqx.tree_at(parts, start, unravel(flat))
            return method.train(DIGITS.inner, params, batch, None).total

        found = flat
        for _ in range(2 if isinstance(method, mo.DeltaSTN) else 1):
            step = jnp.linalg.solve(jax.hessian(loss)(found), jax.grad(loss)(found))
            found -= step
        params = eqx.tree_at(parts, start, unravel(found))
        at = lambda change: ordinary(params, change).weight[0]
        zero = jnp.zeros(1)
        return at(zero), jax.jacfwd(at)(zero)[:, 0]

    def errors(scale):
        weights, learned = solve(scale)
        return error(weights, solution_at(LOG_L2)), error(learned, jacobian())

    return errors


def test_stn_errs_with_the_square_of_the_scale():
    errors = at_convergence(STN)
    # Measured by a program of its own, with nodes of Gauss and Hermite.
    for scale, expected in ((0.05, 0.0008), (0.3, 0.031), (1.0, 0.266)):
        np.testing.assert_allclose(errors(scale)[1], expected, rtol=0.25)
    # Of fourth order is what is left of the ratio 36.
    np.testing.assert_allclose(errors(0.3)[1] / errors(0.05)[1], 36, rtol=0.2)
    assert errors(0.3)[0] > 1e-3  # the weights themselves are biased as well


@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0])
def test_delta_is_exact_at_every_scale(scale):
    # Rounding, times the condition number of the Hessian.
    assert max(at_convergence(DELTA)(scale)) < 1e-10


def test_trained_response_is_the_implicit_one():
    num_steps = 80
    solver = mo.SelfTuningSolver(
        optax.adam(optax.cosine_decay_schedule(0.05, 50 * num_steps)),
        optax.set_to_zero(),
        method=DELTA,
        train_steps=50,
    )
    solution = mo.solve_bilevel(
        DIGITS, LOG_L2, SMALL_TRAIN, SMALL_VALID, solver=solver, num_steps=num_steps
    )
    assert solution.hyper == LOG_L2
    # The general weights see no noise, so that they converge as in ordinary training.
    assert error(solution.params.weight[0], solution_at(LOG_L2)) < 1e-6
    at = lambda change: mo.nn.ordinary(solution.state.params, change).weight[0]
    assert error(jax.jacfwd(at)(jnp.zeros(1))[:, 0], jacobian()) < 0.05


@pytest.mark.ci
def test_tunes_from_both_sides():
    x, y = VALID
    grid = np.linspace(-12, 2, 57)
    losses = [np.mean((x @ solution_at(log_l2) - y) ** 2) for log_l2 in grid]
    best = grid[np.argmin(losses)]
    assert -9 < best < -3  # far from both starts
    solver = mo.SelfTuningSolver(
        optax.adam(0.03), optax.adam(0.03), method=DELTA, train_steps=4, num_rounds=10
    )
    data = mo.Minibatches(TRAIN, 50), mo.Minibatches(VALID, 50)
    for start in (-12.0, 0.0):
        found = mo.solve_bilevel(DIGITS, start, *data, solver=solver, num_steps=60).hyper
        assert abs(found - best) < 0.5


# Slow twins


class Net(eqx.Module):
    layers: list[eqx.nn.Linear]

    def __init__(self, key):
        keys = jax.random.split(key)
        self.layers = [
            eqx.nn.Linear(2, 3, key=keys[0]),
            eqx.nn.Linear(3, 2, key=keys[1]),
        ]

    def __call__(self, x, keep=1.0, mask=None):
        x = jnp.tanh(self.layers[0](x))
        return self.layers[1](x if mask is None else jnp.where(mask < keep, x / keep, 0))


class Fit(mo.extend.AbstractPredictionProblem):
    """Classification with two outer variables: weight decay, and one that acts within the
    model if `drops` (dropout) and otherwise in the criterion (label smoothing)."""

    drops: bool = eqx.field(static=True)
    tied: bool = eqx.field(static=True)

    def init(self, hyper, key):
        return mo.nn.self_tuning(Net(key), 2, tied=self.tied, key=key)

    def predict(self, params, hyper, batch, *, key):
        if not self.drops:
            return jax.vmap(params)(batch["x"])
        masks = jax.random.uniform(key, (len(batch["x"]), 3))
        keep = jax.nn.sigmoid(hyper["other"])
        return jax.vmap(params, in_axes=(0, None, 0))(batch["x"], keep, masks)

    def criterion(self, predictions, params, hyper, batch):
        share = 0 if self.drops else jax.nn.sigmoid(hyper["other"]) / 2
        labels = optax.smooth_labels(jax.nn.one_hot(batch["y"], 2), share)
        loss = jnp.mean(optax.softmax_cross_entropy(predictions, labels))
        return loss + jnp.exp(hyper["decay"]) * mo.nn.squared_norm(params)


def classified(params, hyper, batch):
    logits = jax.vmap(params)(batch["x"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return jnp.mean(loss) + hyper["decay"] ** 2


HYPER = {"decay": jnp.asarray(-1.0), "other": jnp.asarray(0.5)}
ROWS = {
    "x": jnp.asarray(np.random.default_rng(0).normal(size=(4, 2))),
    "y": jnp.asarray([0, 1, 1, 0]),
}


def as_hyper(vector):
    return {"decay": vector[0], "other": vector[1]}


def train_stn(problem, params, hyper, rows, e, key):
    model = mo.nn.ordinary(params, e)
    return problem.inner.loss(model, as_hyper(hyper + e), rows, key=key)


def train_delta(problem, params, hyper, rows, e, key):
    inner, zero = problem.inner, jnp.zeros_like(e)
    general = lambda p: [layer.layer for layer in p.layers]
    held = eqx.tree_at(general, params, jax.lax.stop_gradient(general(params)))
    first_key = jax.random.split(key)[0]  # of two, for model and criterion

    def predict(params, change, at):
        model = mo.nn.ordinary(params, change)
        return inner.predict(model, as_hyper(at), rows, key=first_key)

    def criterion(out, params, change, hyper):
        model = mo.nn.ordinary(params, change)
        return inner.criterion(out, model, as_hyper(hyper), rows)

    loss = criterion(predict(params, zero, hyper), params, zero, hyper)
    out, tangent = jax.jvp(lambda c: predict(held, c, hyper + e), (zero,), (e,))
    out = jax.lax.stop_gradient(out)
    value, slope = jax.jvp(lambda h: criterion(out + tangent, held, e, h), (hyper,), (e,))
    response = value + slope
    if not inner.drops:
        line = lambda out, change: criterion(out, held, change, hyper)
        response -= jax.jvp(line, (out, zero), (tangent, e))[1]
    return loss + response


def differentiate_stn(problem, params, hyper, log_scale, rows, noise):
    def outer(centre, log_scale):
        change = centre + jnp.exp(log_scale) * noise
        model = mo.nn.ordinary(params, change)
        return problem.outer_loss(model, as_hyper(hyper + change), rows)

    zero = jnp.zeros_like(hyper)
    value, gradients = jax.value_and_grad(outer, (0, 1))(zero, log_scale)
    return value, *gradients


def differentiate_delta(problem, params, hyper, log_scale, rows, noise):
    def outer(change, rows):
        model = mo.nn.ordinary(params, change)
        return problem.outer_loss(model, as_hyper(hyper + change), rows)

    value, gradient = jax.value_and_grad(outer)(jnp.zeros_like(hyper), rows)
    perturbed = lambda log_scale: outer(jnp.exp(log_scale) * noise, rows)
    return value, gradient, jax.grad(perturbed)(log_scale)


TWINS = {STN: (train_stn, differentiate_stn), DELTA: (train_delta, differentiate_delta)}


def combinations():
    # Each value, and each of the last two with the other; the rest is slow only in sum.
    quick = [(1, False, True), (1, True, False), (2, False, False), (None, True, True)]
    for combination in itertools.product([1, 2, None], [False, True], [False, True]):
        marks = [] if combination in quick else pytest.mark.slow
        yield pytest.param(*combination, marks=marks)


@pytest.mark.one_of(7)  # an odd number, so that both methods are among the quick ones
@each_method
@pytest.mark.parametrize("size, drops, tied", list(combinations()))
def test_methods_equal_their_slow_twins(method, size, drops, tied):
    problem = mo.BilevelProblem(Fit(drops, tied), classified)
    coordinates, hyper = Coordinates(HYPER), Coordinates.vector(HYPER)
    params = problem.inner.init(HYPER, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    # Nothing is zero, as after some training.
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), params
    )
    groups = cut(ROWS, size, "rows")
    noise = jax.random.normal(next(keys), (groups.num_groups, 2))
    log_scale = jnp.log(jnp.asarray([0.2, 0.7]))
    draws = jax.random.split(next(keys), groups.num_groups)

    @jax.jit
    def fast(params, hyper, log_scale):
        batch = PerturbedBatch(groups, coordinates, hyper, log_scale, noise, draws)
        out = method.differentiate(problem, params, batch, None, True)

        def train(params):
            return method.train(problem.inner, params, batch, None).total

        return jax.value_and_grad(train)(params), (out.value, out.hyper, out.log_scale)

    @jax.jit
    def slow(params, hyper, log_scale, rows, noise, draw):
        train, differentiate = TWINS[method]

        def loss(params):
            return train(problem, params, hyper, rows, jnp.exp(log_scale) * noise, draw)

        out = differentiate(problem, params, hyper, log_scale, rows, noise)
        return jax.value_and_grad(loss)(params), out

    pieces = []
    for i, rows in enumerate(jnp.split(jnp.arange(4), groups.num_groups)):
        rows = jax.tree.map(lambda leaf: leaf[rows], ROWS)
        pieces.append(slow(params, hyper, log_scale, rows, noise[i], draws[i]))
    theirs = jax.tree.map(lambda *parts: sum(parts) / len(parts), *pieces)
    ours = fast(params, hyper, log_scale)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        # Sums of a few numbers near one, in another order.
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-13)


# Whole runs on a small problem


def predict(params, hyper, batch):
    return jax.vmap(params)(batch[0])


def penalised(predictions, params, hyper, batch):
    loss = jnp.mean((predictions - batch[1]) ** 2) / 2
    return loss + jnp.exp(hyper) * mo.nn.squared_norm(params) / 2


def linear(hyper, key):
    return eqx.nn.Linear(3, "scalar", key=key)


def small_data(seed: int, dtype=jnp.float64) -> Any:
    """Of little noise, so that a penalty is best small."""
    x, noise = np.split(np.random.default_rng(seed).normal(size=(12, 4)), [3], axis=1)
    return jnp.asarray(x, dtype), jnp.asarray(x @ [1, -1, 0.5] + 0.1 * noise[:, 0], dtype)


SMALL = mo.BilevelProblem(
    mo.PredictionProblem(predict, penalised, linear), mean_squared_error
)
DATA = small_data(1), small_data(2)
BATCHES = tuple(mo.Minibatches(data, 4) for data in DATA)


def made(method: Any = STN, **settings: Any) -> mo.SelfTuningSolver:
    optimizers = {"params": optax.adam(0.03), "hyper": optax.adam(0.1)}
    settings = {"method": method, "train_steps": 10} | optimizers | settings
    return mo.SelfTuningSolver(**settings)


SOLVERS = {STN: made(STN), DELTA: made(DELTA)}


def solve(problem=SMALL, hyper: Any = -1.0, data: Any = BATCHES, **settings: Any) -> Any:
    settings = {"solver": SOLVERS[STN], "num_steps": 1} | settings
    return mo.solve_bilevel(problem, hyper, *data, **settings)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        if eqx.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


@pytest.mark.one_of(3)
@pytest.mark.parametrize(
    "solver",
    [
        *SOLVERS.values(),
        mo.NestedSolver(
            mo.Descent(optax.sgd(0.3), 30), mo.UnrolledAdjoint(), optax.adam(0.1)
        ),
    ],
    ids=["STN", "DeltaSTN", "nested"],
)
def test_one_problem_for_every_solver(solver):
    solution = solve(solver=solver, num_steps=100)
    expected = linear(0.0, jax.random.key(0))
    assert jax.tree.structure(solution.params) == jax.tree.structure(expected)
    assert solution.hyper < -2  # from -1
    assert solution.outer_loss < 0.1 * solution.history.outer_loss[0]
    for text in (str(solution), str(solution.report)):
        assert "Successful" in text
    assert "outer loss, final" in str(solution)
    if isinstance(solver, mo.SelfTuningSolver):
        method = type(solver.steps.method).__name__
        assert f"learned response ({method})" in str(solution.report)
        assert "what the response has not learned or cannot represent" in str(solution)
        assert "from warm starts, not from `hyper` alone" in str(solution)
        ours = solver.params_at(solution.state)
        np.testing.assert_array_equal(solution.params.weight, ours.weight)
        ordinary = mo.nn.ordinary(solution.state.params, jnp.zeros(1))
        np.testing.assert_array_equal(solution.params.weight, ordinary.weight)


def test_plain_losses_are_enough_for_stn():
    def loss(params, hyper, batch):
        return penalised(predict(params, hyper, batch), params, hyper, batch)

    in_one_part = mo.BilevelProblem(mo.InnerProblem(loss, linear), mean_squared_error)
    a, b = (solve(problem, num_steps=3) for problem in (in_one_part, SMALL))
    # The same numbers, in the same order.
    np.testing.assert_allclose(a.hyper, b.hyper, rtol=1e-12)
    np.testing.assert_allclose(a.params.weight, b.params.weight, rtol=1e-12)


@pytest.mark.ci
@each_method
def test_hyper_stays_where_nothing_responds(method):
    solver = made(method, response=optax.set_to_zero())
    solution = solve(solver=solver, num_steps=5)
    assert solution.hyper == -1.0
    assert np.all(solution.history.hypergradient_norm == 0)
    assert solution.report.outer.num_zeros == 1
    # ... and moves where it does, in the same run but for that.
    assert solve(solver=SOLVERS[method], num_steps=5).hyper != -1.0


@each_method
def test_runs_are_reproducible_and_can_be_continued(method):
    solver = SOLVERS[method]
    whole, again = (solve(solver=solver, num_steps=4) for _ in range(2))
    assert_same(whole.state, again.state)
    other = solve(solver=solver, num_steps=4, key=jax.random.key(1))
    assert other.hyper != whole.hyper
    state = solve(solver=solver, num_steps=2).state
    step = eqx.filter_jit(lambda state: solver.step(SMALL, state, *BATCHES))
    state, _ = step(state)
    state, info = step(state)
    assert_same(whole.state, state)
    assert info.updated
    assert info.report.outer.loss == whole.history.outer_loss[-1]


RESPONSIVE = mo.BilevelProblem(mo.PredictionProblem(predict, penalised), mean_squared_error)


def responsive(shift: float) -> Any:
    """A model whose bias responds, and so would its weights if they learned to."""
    key = jax.random.key(0)
    model = mo.nn.self_tuning(linear(None, key), 1, key=key)
    return eqx.tree_at(lambda p: p.response["bias"].shift, model, jnp.full((1, 1), shift))


@pytest.mark.one_of(2)
@each_method
def test_general_weights_follow_hyper(method):
    solver = made(method, params=optax.set_to_zero(), hyper=optax.sgd(1.0))
    start = responsive(2.0)
    solution = solve(RESPONSIVE, params=start, solver=solver, num_steps=3)
    assert abs(solution.hyper + 1) > 0.01
    moved = start.bias + 2 * (solution.hyper + 1)
    np.testing.assert_allclose(solution.params.bias, moved, rtol=1e-12)
    np.testing.assert_array_equal(solution.params.weight, start.weight)


def test_each_step_draws_anew():
    frozen = {"params": optax.set_to_zero(), "hyper": optax.set_to_zero()}
    solver = made(STN, **frozen, valid_steps=2)
    history = solve(
        RESPONSIVE, params=responsive(2.0), data=DATA, solver=solver, num_steps=3
    ).history
    # Nothing but the perturbations can differ.
    assert len(set(history.outer_loss)) == len(set(history.inner_residual)) == 3


def test_new_values_are_not_traced_again():
    traces, counts = [], []

    def counted(params, hyper, batch):
        traces.append(hyper)
        return mean_squared_error(params, hyper, batch)

    problem = mo.BilevelProblem(SMALL.inner, counted)
    for hyper, seed in ((-1.0, 0), (-0.5, 1), (np.float64(0.3), 2)):
        solve(problem, hyper, num_steps=2, key=jax.random.key(seed))
        counts.append(len(traces))
    assert counts == 3 * counts[:1]


def test_warmup_and_rounds():
    states, settings = [], {"num_rounds": 3, "train_steps": 4, "valid_steps": 2}
    # The entropy is all that counts for the scale: it gains a tenth in six steps.
    scale = {"scale": optax.sgd(0.1 / 6e3), "entropy_weight": 1e3}
    solver = made(warmup=2, **settings, **scale)

    def callback(run):
        states.append(run.state)
        info = run.info
        assert info.updated == run.updated == (run.num_steps >= 3)
        assert info.report.outer.hypergradient_norm > 0
        assert info.report.inner.num_steps == 12

    solution = solve(solver=solver, num_steps=4, callbacks=[callback])
    assert [state.hyper for state in states[:2]] == [-1.0, -1.0]
    assert len({float(state.hyper) for state in states[1:]}) == 3
    widened = np.log(0.3) + np.array([0, 0, 0.1, 0.2])
    np.testing.assert_allclose([s.log_scale[0] for s in states], widened, rtol=1e-3)
    assert solution.num_skipped == 0
    # The optimizer of `hyper` has not seen the first steps either.
    last = solution.state
    assert last.hyper_state[0].count == 2 * 6
    assert last.general_state[0].count == last.response_state[0].count == 4 * 12
    assert np.all(solution.history.num_inner_steps == 12)


# Of four leaves, two are for the inner loss, one for neither, and one for the outer.


def four_leaves(params, hyper, batch):
    shifted = jax.vmap(params)(batch[0]) - 0.1 * hyper["other"]
    penalty = jnp.sum(jnp.exp(hyper["decay"])) * mo.nn.squared_norm(params)
    return jnp.mean((shifted - batch[1]) ** 2) + penalty


def with_target(params, hyper, batch):
    return mean_squared_error(params, hyper, batch) + (hyper["target"] - 1) ** 2


FOUR = mo.BilevelProblem(mo.InnerProblem(four_leaves, linear), with_target)
LEAVES = {
    "decay": jnp.full(2, -1.0),
    "other": jnp.asarray(0.0),
    "rate": jnp.asarray(0.1),
    "target": jnp.asarray(2.0),
}


@ft.cache
def four_steps():
    pushed = optax.stateless(lambda updates, params: jnp.array([1, -1, -1, 1, 1]) * 1e300)
    solver = made(scale=pushed, scale_bounds=(0.1, 2.0))
    return solve(FOUR, LEAVES, solver=solver, num_steps=4)


@pytest.mark.ci
def test_a_leaf_without_influence_is_listed_and_left_alone():
    solution = four_steps()
    assert solution.report.outer.unreached == ("hyper['rate']",)
    assert "without influence" in str(solution.report)
    # A response to it is noise, which an optimizer such as Adam once followed.
    assert solution.hyper["rate"] == 0.1
    assert jnp.all(solution.hyper["decay"] != -1.0) and solution.hyper["other"] != 0.0


def test_a_leaf_of_the_outer_loss_alone_moves_by_its_own_derivative():
    target: Any = jnp.asarray(2.0)
    optimizer = optax.adam(0.1)
    state, path = optimizer.init(target), []
    for _ in range(4):
        update, state = optimizer.update(2 * (target - 1), state)
        target = optax.apply_updates(target, update)
        path.append(target)
    np.testing.assert_allclose(four_steps().history.hyper["target"], path, rtol=1e-12)


def test_scales_stay_within_bounds():
    scales = jnp.exp(four_steps().state.log_scale)
    np.testing.assert_allclose(scales, [2, 0.1, 0.1, 2, 2], rtol=1e-12)


@pytest.mark.ci
def test_entropy_is_paid_for_by_the_scale():
    def log_scale(weight):
        return solve(
            solver=made(scale=optax.sgd(1.0), entropy_weight=weight)
        ).state.log_scale

    # The derivative of the entropy in `log_scale` is one.
    np.testing.assert_allclose(log_scale(0.25) - log_scale(0.0), 0.25, rtol=1e-9)


def test_state_is_the_mean_over_the_groups():
    states = {"mean": jnp.array([[1.0, 2.0], [3.0, 6.0]]), "count": jnp.array([4, 4])}
    state = mean_state(states)
    np.testing.assert_array_equal(state["mean"], [2.0, 4.0])
    assert state["count"] == 4


# Never silently wrong


@pytest.mark.one_of(2)
@pytest.mark.parametrize(
    "method, dtype, rate", [(STN, jnp.float64, 1e30), (DELTA, jnp.float32, 3e38)]
)
def test_diverging_training_is_reported(method, dtype, rate):
    # In float32 the update itself overflows: it once reached the params.
    solver = made(method, params=optax.sgd(rate))
    data = jax.tree.map(lambda a: 10 * a, (small_data(1, dtype), small_data(2, dtype)))
    settings: Any = {"solver": solver, "num_steps": 3, "hyper": jnp.asarray(-1.0, dtype)}
    init = lambda hyper, key: eqx.nn.Linear(3, "scalar", key=key, dtype=dtype)
    problem = mo.BilevelProblem(
        mo.PredictionProblem(predict, penalised, init), mean_squared_error
    )
    solution = solve(problem, data=data, throw=False, **settings)
    assert solution.result == mo.RESULTS.inner_nonfinite
    assert 0 <= solution.report.inner.failed_step < 10
    assert "failed at step" in str(solution.report)
    for leaf in jax.tree.leaves(eqx.filter(solution.state, eqx.is_inexact_array)):
        assert leaf.dtype == dtype and jnp.all(jnp.isfinite(leaf))
    with pytest.raises(mo.SolveError, match="its gradient .* became infinite"):
        solve(problem, data=data, **settings)


@pytest.mark.one_of(2)
@pytest.mark.parametrize(
    "outer, result",
    [
        (lambda hyper: jnp.log(-1 - hyper**2), mo.RESULTS.outer_nonfinite),
        (lambda hyper: jnp.sqrt(0 * hyper), mo.RESULTS.hypergradient_nonfinite),
    ],
    ids=["value", "derivative"],
)
def test_an_outer_loss_without_value_leaves_hyper_alone(outer, result):
    problem = mo.BilevelProblem(
        SMALL.inner,
        lambda params, hyper, batch: (
            mean_squared_error(params, hyper, batch) + outer(hyper)
        ),
    )
    solution = solve(problem, num_steps=2, throw=False, solver=SOLVERS[DELTA])
    assert solution.hyper == -1.0 and solution.num_skipped == 2
    assert solution.result == result
    assert solution.report.inner.failed_step == -1  # training went on
    assert jnp.all(jnp.isfinite(solution.params.weight))
    assert solution.state.hyper_state[0].count == 0


def test_params_that_cannot_follow_stay():
    # `hyper` itself is finite after such a step, and what the response makes of it is not.
    solver = made(DELTA, hyper=optax.sgd(1e290))
    solution = solve(RESPONSIVE, params=responsive(1e10), solver=solver, throw=False)
    assert solution.result == mo.RESULTS.hypergradient_nonfinite
    assert solution.hyper == -1.0
    assert jnp.all(jnp.isfinite(solution.params.bias))


@pytest.mark.parametrize("start", [0, 5])
def test_stn_tunes_a_whole_number(start):
    # Where it is not two, the training loss wants predictions that are off by as much.
    hyper = mo.hyper.Integer(start, low=0, high=5)
    solution = solve(COUNTING, hyper, solver=COUNTS, num_steps=60)
    assert solution.hyper.value == 2


def off_by(params, hyper, batch):
    return predict(params, hyper, batch) + jnp.abs(hyper.value - 2)


def fit(predictions, params, hyper, batch):
    return jnp.mean((predictions - batch[1]) ** 2) / 2


COUNTING = mo.BilevelProblem(mo.PredictionProblem(off_by, fit, linear), mean_squared_error)
COUNTS = made(
    params=optax.adam(0.1), hyper=optax.adam(0.03), initial_scale=1.0, num_rounds=10
)


# Models with state


class Normalised(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(3, 4, key=keys[0])
        self.norm = eqx.nn.BatchNorm(4, "batch", mode="batch")
        self.last = eqx.nn.Linear(4, 2, key=keys[1])

    def __call__(self, x, state, keep=1.0, key=None):
        x, state = self.norm(self.first(x), state)
        x = jax.nn.relu(x)
        if key is not None:
            x = jnp.where(jax.random.uniform(key, x.shape) < keep, x / keep, 0)
        return self.last(x), state


class WithState(mo.extend.AbstractPredictionProblem):
    """With dropout, whose noise must not hide that batch normalisation couples rows."""

    has_state = True

    def init(self, hyper, key):
        return eqx.nn.make_with_state(Normalised)(key)

    def predict(self, params, hyper, batch, *, key, state):
        keys = jax.random.split(key, len(batch[0]))
        batched = jax.vmap(
            params, axis_name="batch", in_axes=(0, None, None, 0), out_axes=(0, None)
        )
        return batched(batch[0], state, jax.nn.sigmoid(hyper), keys)

    def criterion(self, predictions, params, hyper, batch):
        return negative_log_likelihood(predictions, batch)


def negative_log_likelihood(logits, batch):
    labels = (batch[1] > 0).astype(int)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def evaluated(params, hyper, batch, *, state):
    model = eqx.nn.inference_mode(params)
    batched = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    return negative_log_likelihood(batched(batch[0], state)[0], batch)


COUPLED = mo.BilevelProblem(WithState(), evaluated)


@pytest.mark.slow
@each_method
def test_coupled_rows_can_share_a_perturbation(method):
    solver = made(method, examples_per_perturbation=None)
    solution = solve(COUPLED, 1.0, DATA, solver=solver, num_steps=2)
    assert solution.hyper != 1.0
    params, before = COUPLED.inner.init(1.0, jax.random.key(0))
    assert jax.tree.structure(solution.params) == jax.tree.structure(params)
    assert jax.tree.structure(solution.model_state) == jax.tree.structure(before)
    norm, state = solution.params.norm, solution.model_state
    assert state.get(norm.batch_counter) == 2 * 10  # once in each training step
    mean, variance = state.get(norm.batch_state_index)
    assert jnp.all(jnp.isfinite(mean)) and jnp.all(variance > 0)
    assert jnp.any(mean != before.get(params.norm.batch_state_index)[0])


# What is refused


def in_one(loss=None, init=linear, outer=mean_squared_error) -> mo.BilevelProblem:
    def fitted(params, hyper, batch):
        return mean_squared_error(params, hyper, batch) + jnp.exp(hyper) * (
            mo.nn.squared_norm(params)
        )

    return mo.BilevelProblem(mo.InnerProblem(loss or fitted, init), outer)


def leaves_squared(params):
    leaves = jax.tree.leaves(eqx.filter(params, eqx.is_inexact_array))
    return sum(jnp.sum(leaf**2) for leaf in leaves)


def weights_of(params):
    is_linear = lambda x: isinstance(x, eqx.nn.Linear)
    layers = jax.tree.leaves(params, is_leaf=is_linear)
    return [layer.weight for layer in layers if is_linear(layer)]


def summed(params, hyper, batch):
    return jnp.sum((jax.vmap(params)(batch[0]) - batch[1]) ** 2)


def noisy_sum(params, hyper, batch, *, key):
    noise = 1 + jax.random.normal(key, batch[1].shape)
    return jnp.sum(noise * (jax.vmap(params)(batch[0]) - batch[1]) ** 2)


def initially(hyper, key):
    return jax.tree.map(
        lambda leaf: leaf * hyper if eqx.is_inexact_array(leaf) else leaf,
        linear(hyper, key),
    )


REFUSED_PROBLEMS = {
    "fixed point": (
        mo.BilevelProblem(
            mo.FixedPointProblem(lambda params, hyper, batch: params, linear),
            mean_squared_error,
        ),
        "`FixedPointProblem` has none: .*AbstractInnerProblem",
    ),
    "no layers": (
        in_one(init=lambda hyper, key: {"w": jnp.ones(3)}),
        "no layer in the model that could respond",
    ),
    "converted for another number": (
        in_one(init=lambda hyper, key: mo.nn.self_tuning(linear(hyper, key), 2, key=key)),
        "responds to 2 outer variables, and `hyper` holds 1",
    ),
    # However small: it once took a hundredth of the loss to be seen.
    "inner loss reads leaves": (
        in_one(
            lambda params, hyper, batch: (
                mean_squared_error(params, hyper, batch)
                + 1e-5 * jnp.exp(hyper) * leaves_squared(params)
            )
        ),
        "The inner loss does not see the response.*squared_norm",
    ),
    "outer loss reads leaves": (
        in_one(
            outer=lambda params, hyper, batch: (
                mean_squared_error(params, hyper, batch) + 1e-5 * leaves_squared(params)
            )
        ),
        "The outer loss does not see the response",
    ),
    # Dropout once hid it: the mean of two draws of it differs by more.
    "batch normalisation": (COUPLED, "which are coupled.*examples_per_perturbation=None"),
    # Finds the layers inside of best-response layers, whose weights are the general ones.
    "inner loss looks for layers": (
        in_one(
            lambda params, hyper, batch: (
                mean_squared_error(params, hyper, batch)
                + jnp.exp(hyper) * sum(jnp.sum(w**2) for w in weights_of(params))
            )
        ),
        "The inner loss does not see the response",
    ),
    # Some seven thousandths of the loss; it once took a hundredth to be seen.
    "inner loss looks for layers, for little": (
        in_one(
            lambda params, hyper, batch: (
                mean_squared_error(params, hyper, batch)
                + 0.03 * jnp.exp(hyper) * sum(jnp.sum(w**2) for w in weights_of(params))
            )
        ),
        "The inner loss does not see the response",
    ),
    "inner sum": (in_one(summed), "The inner loss is no mean over the rows.*`jnp.mean`"),
    "inner sum with noise": (in_one(noisy_sum), "The inner loss is no mean over the rows"),
    "outer sum": (in_one(outer=summed), "The outer loss is no mean over the rows"),
    "initial params": (
        in_one(mean_squared_error, initially),
        "`hyper` is zero by construction.*initial params.*UnrolledAdjoint",
    ),
    # The outer loss reads it as well, which once hid that the other way is unseen.
    "initial params and outer loss": (
        in_one(
            mean_squared_error,
            initially,
            lambda params, hyper, batch: (
                mean_squared_error(params, hyper, batch) + 0.1 * hyper**2
            ),
        ),
        "`hyper` is zero by construction.*initial params.*UnrolledAdjoint",
    ),
    "nothing": (in_one(mean_squared_error), "Neither loss depends on `hyper`"),
}


@pytest.mark.parametrize("name", REFUSED_PROBLEMS)
def test_problems_that_are_refused(name):
    problem, message = REFUSED_PROBLEMS[name]
    with pytest.raises(ValueError, match=message):
        # A small fault and a noisy one do not show in every batch of four rows.
        solve(problem, key=jax.random.key(4))


def test_dropout_alone_is_not_refused():
    # Two draws of it differ by tens of per cent.
    problem = mo.BilevelProblem(Fit(True, True), classified)
    data = mo.FullBatch(ROWS), mo.FullBatch(ROWS)
    for seed in range(10):
        key = jax.random.key(seed)
        state = SOLVERS[DELTA].init(
            problem, HYPER, *data, params=None, model_state=None, key=key
        )
        assert int(state.num_steps) == 0  # it began, and no `ValueError` was raised


def test_a_loss_in_half_precision_is_not_refused():
    # Response and weights are rounded apart, by more than float32 ever is.
    def halved(params, hyper, batch):
        params, batch = jax.tree.map(
            lambda leaf: leaf.astype(jnp.bfloat16) if eqx.is_inexact_array(leaf) else leaf,
            (params, batch),
        )
        loss = mean_squared_error(params, hyper, batch).astype(float)
        return loss + jnp.exp(hyper) * mo.nn.squared_norm(params)

    for seed in range(10):
        state = SOLVERS[STN].init(
            in_one(halved),
            jnp.asarray(LOG_L2),
            *BATCHES,
            params=None,
            model_state=None,
            key=jax.random.key(seed),
        )
        assert int(state.num_steps) == 0  # it began, and no `ValueError` was raised


@each_method
def test_an_outer_loss_that_ignores_the_params_is_refused(method):
    # Its hypergradient was once zero for all that acts in the inner loss, and no word.
    for outer in (
        lambda params, hyper, batch: jnp.mean(batch[1] ** 2),
        lambda params, hyper, batch: mean_squared_error(
            jax.lax.stop_gradient(eqx.filter(params, eqx.is_array)), hyper, batch
        ),
    ):
        problem = mo.BilevelProblem(SMALL.inner, outer)
        with pytest.raises(ValueError, match="outer loss does not depend on `params`"):
            solve(problem, solver=SOLVERS[method])


def test_an_inner_loss_that_ignores_the_params_is_refused():
    with pytest.raises(ValueError, match="inner loss does not depend on `params`"):
        solve(in_one(lambda params, hyper, batch: jnp.exp(hyper) * jnp.mean(batch[1] ** 2)))


@pytest.mark.ci
@each_method
def test_the_rate_of_a_dropout_layer_is_tuned(method):
    # Equinox has it behind a `stop_gradient`, which once passed for "no influence".
    def dropped(params, hyper, batch, *, key):
        rate: Any = jax.nn.sigmoid(hyper)
        layer = eqx.nn.Dropout(rate)
        keys = jax.random.split(key, len(batch[0]))
        return jax.vmap(lambda x, key: params(layer(x, key=key)))(batch[0], keys)

    def criterion(predictions, params, hyper, batch):
        return jnp.mean((predictions - batch[1]) ** 2)

    problem = mo.BilevelProblem(
        mo.PredictionProblem(dropped, criterion, linear), mean_squared_error
    )
    solution = solve(problem, -1.0, solver=SOLVERS[method], num_steps=3)
    assert solution.hyper != -1.0
    assert solution.report is not None and solution.report.outer.unreached == ()


def test_delta_refuses_a_loss_in_one_part():
    with pytest.raises(ValueError, match="two parts.*PredictionProblem.*STN"):
        solve(in_one(), solver=SOLVERS[DELTA])


def test_whole_numbers_are_for_the_inner_loss():
    problem = mo.BilevelProblem(
        COUNTING.inner,
        lambda params, hyper, batch: hyper.value * mean_squared_error(params, hyper, batch),
    )
    with pytest.raises(ValueError, match="has no derivative"):
        solve(problem, mo.hyper.Integer(1, 0, 5), solver=COUNTS)


@pytest.mark.parametrize(
    "hyper, rounded, message",
    [
        (
            mo.hyper.Integer(1, 0, 5),
            lambda hyper: hyper.value,
            r"by `STN\(\)`, if a criter",
        ),
        # No error by itself, and zero whatever the problem.
        (1.2, jnp.round, "zero by construction for `hyper` .*STN"),
    ],
    ids=["Integer", "round"],
)
def test_delta_refuses_a_criterion_without_derivative(hyper, rounded, message):
    def biased(predictions, params, hyper, batch):
        return fit(predictions + jnp.abs(rounded(hyper) - 2), params, hyper, batch)

    inner = mo.PredictionProblem(predict, biased, linear)
    problem = mo.BilevelProblem(inner, mean_squared_error)
    with pytest.raises(ValueError, match=message):
        solve(problem, hyper, solver=SOLVERS[DELTA])


def sequence(num_batches: int) -> mo.BatchSequence:
    return mo.BatchSequence(
        jax.tree.map(lambda leaf: jnp.stack(num_batches * [leaf[:4]]), DATA[0])
    )


@pytest.mark.parametrize(
    "data, message",
    [
        (
            (mo.Minibatches(DATA[0], 6), BATCHES[1]),
            "`train` has 6 rows.*=4` does not divide",
        ),
        ((BATCHES[0], mo.Minibatches(DATA[1], 2)), "`valid` has 2 rows"),
        ((mo.Minibatches(DATA[0], 13), BATCHES[1]), "`batch_size` must lie"),
        ((sequence(2), BATCHES[1]), "holds 2 batches.* 3 steps"),
        # The other 4 were once never used, in a run of any length.
        ((sequence(7), BATCHES[1]), "of 7 batches.* the same first 3 of them"),
        ((iter([]), BATCHES[1]), "`train` is an iterator or loader that yields nothing"),
        # Of the second, the last batch was once used again and again.
        ((iter([sequence(3), sequence(2)]), BATCHES[1]), "holds 2 batches.* 3 steps"),
        (
            (mo.FullBatch({"x": DATA[0], "weights": jnp.ones(5)}), BATCHES[1]),
            r"`train` differ in their number of rows \(5, 12\).*=None",
        ),
    ],
)
def test_data_that_is_refused(data, message):
    solver = made(examples_per_perturbation=4, train_steps=3)
    with pytest.raises(ValueError, match=message):
        solve(data=data, num_steps=2, solver=solver)


def test_an_iterator_that_ends_early_is_reported():
    data = iter([BATCHES[0], BATCHES[0]]), BATCHES[1]
    solution = solve(data=data, num_steps=5, throw=False)
    assert solution.result == mo.RESULTS.outer_data_exhausted
    assert len(solution.history) == 2
    # Up to there it is the run on what it yielded.
    endless = itertools.repeat(BATCHES[0]), BATCHES[1]
    assert_same(solution.state, solve(data=endless, num_steps=2).state)


def test_arrays_that_differ_in_rows_share_one_perturbation():
    def loss(params, hyper, batch):
        share = jnp.mean(batch["weights"])
        return share * mean_squared_error(params, hyper, batch["data"]) + jnp.exp(hyper) * (
            mo.nn.squared_norm(params)
        )

    data = mo.FullBatch({"data": DATA[0], "weights": jnp.ones(5)}), BATCHES[1]
    solver, problem = made(examples_per_perturbation=None), in_one(loss)
    start = {"params": None, "model_state": None, "key": jax.random.key(0)}
    state = solver.init(problem, jnp.asarray(-1.0), *data, **start)
    new, _ = eqx.filter_eval_shape(solver.step, problem, state, *data)
    assert jax.tree.structure(new) == jax.tree.structure(state)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: made(params=0.1), "`params` must be something like"),
        (lambda: made(hyper=optax.adam), "`hyper` must be something like"),
        (lambda: made(scale=0.1), "`scale` must be something like"),
        (lambda: made(response=0.1), "`response` must be something like"),
        (lambda: made(mo.STN), "`method` is the class `STN` itself"),
        (lambda: made("stn"), "`method` must be something like `metaopt.DeltaSTN"),
        (lambda: made(entropy_weight=-1.0), "`entropy_weight`"),
        (lambda: made(entropy_weight=None), "`entropy_weight`"),
        (lambda: made(train_steps=0), "`train_steps` must be at least 1"),
        (lambda: made(valid_steps=1.5), "`valid_steps` must be an int"),
        (lambda: made(num_rounds=0), "`num_rounds` must be at least 1"),
        (lambda: made(warmup=-1), "`warmup` must be at least 0"),
        (lambda: made(examples_per_perturbation=0), "`examples_per_perturbation`"),
        (lambda: made(scale_bounds=(2.0, 1.0)), "`scale_bounds` must be a pair"),
        (lambda: made(scale_bounds=(0.0, 1.0)), "`scale_bounds` must be a pair"),
        (lambda: made(scale_bounds=1.0), "`scale_bounds` must be a pair"),
        (lambda: made(scale_bounds=("a", 1.0)), "`scale_bounds` must be a non-negative"),
        (lambda: made(initial_scale=True), "`initial_scale` must be a number"),
        (lambda: made(initial_scale=5.0), "`initial_scale` must lie within"),
        (lambda: made(initial_scale={"a": np.nan}), "`initial_scale` must lie within"),
        (lambda: made(initial_scale=0.0), "`initial_scale` must lie within"),
    ],
)
def test_settings_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_initial_scales_are_like_hyper():
    def scales(initial):
        start = {"params": None, "model_state": None, "key": jax.random.key(0)}
        state = made(initial_scale=initial).init(FOUR, LEAVES, *BATCHES, **start)
        return jnp.exp(state.log_scale)

    np.testing.assert_allclose(scales(0.2), 5 * [0.2])
    given = {"decay": 0.1, "other": 0.5, "rate": 1.0, "target": 2}
    np.testing.assert_allclose(scales(given), [0.1, 0.1, 0.5, 1, 2])
    given["decay"] = np.array([0.1, 0.2])
    np.testing.assert_allclose(scales(given), [0.1, 0.2, 0.5, 1, 2])
    for wrong in ({"decay": 0.1}, (0.1, 0.2), None):
        with pytest.raises(ValueError, match="number or a pytree like `hyper`"):
            scales(wrong)
