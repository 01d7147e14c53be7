"""Single-loop solvers: SOBA of docs/extending.md, and the promises of its base."""

import dataclasses
import types
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from test_docs import python_blocks, REPOSITORY


PAGE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
CODE = python_blocks(PAGE[PAGE.index("<!-- soba -->") :])[0].code


def example() -> Any:
    """The class of the page, made from its block alone."""
    module = types.ModuleType("soba")
    exec(compile(CODE, "docs/extending.md", "exec"), vars(module))
    return vars(module)["SOBA"]


SOBA = example()
SOLVER = SOBA(optax.sgd(0.1), inner_rate=0.3, linear_rate=0.3)

# A strongly convex quadratic inner loss, whose solution is linear in `hyper`:
# p = H^-1 B h. With the outer loss |p - t|^2 / 2 + mu |h|^2 / 2 the best `hyper` solves
# (M^T M + mu) h = M^T t, where M = H^-1 B.
HESSIAN = jnp.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 1.5]])
MIXED = jnp.array([[1.0, 0.3], [-0.4, 1.2], [0.5, 0.5]])
TARGET, PENALTY = jnp.array([1.0, -0.5, 2.0]), 0.1
RESPONSE = np.linalg.solve(HESSIAN, MIXED)
BEST = np.linalg.solve(
    RESPONSE.T @ RESPONSE + PENALTY * np.eye(2), RESPONSE.T @ np.asarray(TARGET)
)


def inner_loss(params, hyper, batch):
    return 0.5 * params @ HESSIAN @ params - params @ MIXED @ hyper


def outer_loss(params, hyper, batch):
    return 0.5 * jnp.sum((params - TARGET) ** 2) + 0.5 * PENALTY * jnp.sum(hyper**2)


QUADRATIC = mo.BilevelProblem(inner_loss, outer_loss)

# The same on rows, each with a linear term and a target of its own, of these means.
ROWS = jax.random.normal(jax.random.key(3), (60, 3))
ROWS = 0.3 * (ROWS - ROWS.mean(0))
NOISY = mo.BilevelProblem(
    lambda params, hyper, batch: inner_loss(params, hyper, None) + batch.mean(0) @ params,
    lambda params, hyper, batch: outer_loss(params, hyper, None) - batch.mean(0) @ params,
)
SOURCES = mo.Minibatches(ROWS, 8), mo.Minibatches(ROWS, 10)


def solve(num_steps=12, problem=QUADRATIC, solver=SOLVER, data=(), **options: Any) -> Any:
    settings: dict[str, Any] = {"params": jnp.zeros(3)} | options
    hyper = settings.pop("hyper", jnp.array([0.5, -0.5]))
    return mo.solve_bilevel(
        problem, hyper, *data, solver=solver, num_steps=num_steps, **settings
    )


def noisy(num_steps=10, **options: Any):
    return solve(num_steps, NOISY, data=SOURCES, **options)


def assert_same_run(one, other):
    numbers = lambda solution: jax.tree.leaves(
        eqx.filter(
            (solution.hyper, solution.params, solution.outer_loss, solution.history.hyper),
            eqx.is_array,
        )
    )
    for a, b in zip(numbers(one), numbers(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.history.columns.keys() == other.history.columns.keys()
    for name in one.history.columns.keys() - {"seconds"}:
        np.testing.assert_array_equal(
            one.history.columns[name], other.history.columns[name]
        )


# The example


def test_example_is_short_and_writes_no_default():
    assert len(CODE.splitlines()) <= 80
    assert "None" not in CODE
    # From public names alone.
    assert "mo._" not in CODE and "metaopt._" not in CODE


@pytest.mark.parametrize("num_steps", [1, 4])
def test_reaches_the_closed_form(num_steps):
    solver = dataclasses.replace(SOLVER, num_steps=num_steps)
    solution = solve(1500, solver=solver, steps_per_call=500)
    np.testing.assert_allclose(solution.hyper, BEST, rtol=1e-5)
    np.testing.assert_allclose(solution.params, RESPONSE @ BEST, rtol=1e-5)
    assert solution.warm_started


def test_more_inner_steps_follow_the_best_response():
    # The residual of the inner problem falls by the number of steps on the way.
    few, many = (
        solve(30, solver=dataclasses.replace(SOLVER, num_steps=n), steps_per_call=30)
        for n in (1, 10)
    )
    largest = lambda solution: solution.history.inner_residual[5:].max()
    assert largest(many) < 0.3 * largest(few)
    assert few.report.inner.num_steps == 1 and many.report.inner.num_steps == 10


def test_comes_near_the_optimum_on_minibatches():
    decay = optax.sgd(optax.exponential_decay(0.1, 1000, 0.2))
    solver = SOBA(decay, inner_rate=0.1, linear_rate=0.1)
    solution = solve(4000, NOISY, solver, SOURCES, steps_per_call=1000)
    np.testing.assert_allclose(solution.hyper, BEST, atol=0.05)
    # Noise was there: a full batch would come to rest.
    assert np.std(solution.history.inner_residual[-100:]) > 1e-3


def test_pytrees_and_leaves_that_are_no_arrays():
    hyper = {"a": jnp.array([0.5]), "b": (jnp.array([-0.5]), 3, "name")}
    vector = lambda h: jnp.concatenate([h["a"], h["b"][0]])
    tree = lambda p: jnp.concatenate([p["x"], p["y"]])
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: inner_loss(tree(params), vector(hyper), batch),
        lambda params, hyper, batch: outer_loss(tree(params), vector(hyper), batch),
    )
    params = {"x": jnp.zeros(1), "y": jnp.zeros(2), "f": jnp.tanh}
    with pytest.raises(TypeError, match=r"`hyper\['b'\]\[1\]` is 3: an integer"):
        solve(20, problem, params=params, hyper=hyper)
    hyper["b"] = (hyper["b"][0], jnp.array(3), jnp.tanh)
    with pytest.warns(UserWarning, match=r"`hyper\['b'\]\[1\]` is not tuned"):
        solution = solve(20, problem, params=params, hyper=hyper)
    flat = solve(20)
    np.testing.assert_allclose(vector(solution.hyper), flat.hyper, rtol=1e-6)
    np.testing.assert_allclose(tree(solution.params), flat.params, rtol=1e-6)
    assert solution.params["f"] is jnp.tanh


# What a run of any solver has


def test_contract_is_short():
    asked = {"init", "step", "evaluate", "hyper", "solution"}
    assert mo.extend.AbstractBilevelSolver.__abstractmethods__ == asked
    assert mo.extend.AbstractSingleLoopSolver.__abstractmethods__ == {"first", "update"}


def test_history_has_its_columns():
    solution = solve(5)
    assert list(solution.history.columns) == [
        *("outer_loss", "hypergradient_norm", "inner_residual", "num_inner_steps"),
        *("change", "seconds"),
    ]
    assert solution.history.hyper.shape == (5, 2)
    assert "SOBA (biased)" in str(solution.report)
    assert "the steps that params have yet to take" in str(solution)


@pytest.mark.parametrize("steps_per_call", [4, 10])
def test_cuts_of_a_run_change_no_bit(steps_per_call):
    assert_same_run(noisy(), noisy(steps_per_call=steps_per_call))


@pytest.mark.parametrize("cut", [3, 8])
def test_run_goes_on_from_its_checkpoint(tmp_path, cut):
    whole = noisy()
    checkpoint = lambda: [mo.callbacks.Checkpoint(tmp_path / "run", every=2)]
    noisy(cut, callbacks=checkpoint())
    assert_same_run(whole, noisy(callbacks=checkpoint()))


def test_run_goes_on_from_a_state():
    whole, first = noisy(10), noisy(6)
    rest = noisy(10, state=first.state)
    np.testing.assert_array_equal(whole.hyper, rest.hyper)
    np.testing.assert_array_equal(whole.params, rest.params)


def test_best_params_are_those_of_the_best_loss():
    # `hyper` and params move in the same step: those after it have another loss.
    solution = solve(40, callbacks=[mo.callbacks.KeepBest()], solver=SOBA(
        optax.sgd(0.1), inner_rate=0.3, linear_rate=0.3, num_steps=3
    ))  # fmt: skip
    best = solution.best
    assert best.outer_loss == solution.history.outer_loss.min()
    value = outer_loss(best.params, best.hyper, None)
    np.testing.assert_allclose(value, best.outer_loss, rtol=1e-6)


def test_stops_early():
    solution = solve(2000, callbacks=[mo.callbacks.StopEarly(patience=3)])
    assert len(solution.history) < 1000


@pytest.mark.parametrize("by_callback", [False, True])
def test_direction_of_zero_at_the_start_is_no_convergence(by_callback):
    # The outer loss does not read `hyper`, and the linear solution begins at zero.
    problem = mo.BilevelProblem(
        inner_loss, lambda params, hyper, batch: 0.5 * jnp.sum((params - 1.0) ** 2)
    )
    stop = mo.callbacks.StopEarly(atol=1e-3)
    options: dict[str, Any] = {"callbacks": [stop]} if by_callback else {"atol": 1e-3}
    solution = solve(2000, problem, **options)
    history = solution.history
    assert history.hypergradient_norm[0] == 0
    assert 50 < len(history) < 2000
    assert history.hypergradient_norm[-1] <= 1e-3 and history.inner_residual[-1] < 4e-3


def test_iterators_feed_every_outer_step():
    batches = [ROWS[i : i + 5] for i in range(12)]
    solver = dataclasses.replace(SOLVER, num_steps=2)

    def run(**options):
        train = mo.InnerBatches(iter(batches), 2)
        return solve(6, NOISY, solver, (iter(train), iter(batches)), **options)

    assert_same_run(run(), run(steps_per_call=3))


# Draws


class Recorder(mo.extend.AbstractSingleLoopSolver):
    """Moves nothing much, and keeps the batches of the last step."""

    outer: optax.GradientTransformation
    num_train_batches: int
    num_valid_batches: int

    def first(self, problem, hyper, params):
        key = jnp.zeros((2, 4), jnp.uint32)
        counts = self.num_train_batches, self.num_valid_batches
        return *(jnp.zeros((count, 4)) for count in counts), key

    def update(self, problem, state, train, valid, key):
        at = lambda hyper: problem.evaluate_outer(
            state.params, hyper, valid[0], key, state.model_state
        )[0]
        value, direction = jax.value_and_grad(at)(state.hyper)
        rows = [
            jnp.stack([drawn[index] for index in range(len(drawn))])
            for drawn in (train, valid)
        ]
        kept = jnp.zeros((2, 4), jnp.uint32).at[0, :2].set(jax.random.key_data(key))
        scalars = {"largest": rows[0].max()}
        extra = (*rows, kept)
        return mo.extend.SingleLoopUpdate(
            state.params, extra, direction, value, scalars=scalars
        )


def recorded(num_steps=4, seed=0):
    """The rows that each step drew for both losses, and its key."""
    seen = []
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: jnp.sum((params - hyper) ** 2) + 0 * batch.sum(),
        lambda params, hyper, batch: jnp.sum(params * hyper) + batch.mean(),
    )
    data = mo.Minibatches(jnp.arange(40.0), 4)
    solution = mo.solve_bilevel(
        problem,
        jnp.ones(2),
        data,
        data,
        params=jnp.ones(2),
        solver=Recorder(optax.sgd(0.0), 3, 3),
        num_steps=num_steps,
        key=jax.random.key(seed),
        callbacks=[lambda run: seen.append(run.state.extra)],
    )
    return seen, solution


def test_every_outer_step_draws_its_own_batches():
    seen, solution = recorded()
    inner = np.stack([train for train, _, _ in seen])
    outer = np.stack([valid for _, valid, _ in seen])
    # Epochs continue from step to step: no row of 40 is drawn twice before the others.
    for rows in (inner.ravel(), outer.ravel()):
        np.testing.assert_array_equal(np.sort(rows[:40]), np.arange(40))
        assert len(np.unique(rows[40:])) == 8
    as_sets = lambda draws: {tuple(sorted(batch)) for batch in draws.reshape(-1, 4)}
    assert len(as_sets(inner)) == len(as_sets(outer)) == 12
    # Of the same source: the keys of the two losses differ.
    assert not as_sets(inner) & as_sets(outer)
    assert len(np.unique(np.stack([key[0] for *_, key in seen]), axis=0)) == 4
    np.testing.assert_array_equal(solution.history.largest, inner.max((1, 2)))
    assert "largest" in str(solution.report)


def test_draws_follow_the_key():
    (one, _), (again, _), (other, _) = recorded(1), recorded(1), recorded(1, seed=1)
    np.testing.assert_array_equal(one[0][0], again[0][0])
    assert not np.array_equal(one[0][0], other[0][0])


# Derivatives that are zero by construction


def message(problem, solver, hyper=None, **options):
    hyper = jnp.ones(2) if hyper is None else hyper
    with pytest.raises(ValueError) as info:
        solve(3, problem, solver, hyper=hyper, **options)
    return str(info.value)


NESTED = mo.NestedSolver(
    mo.Descent(optax.sgd(0.1), num_steps=3), mo.UnrolledAdjoint(), optax.sgd(0.1)
)
LEAVES = {"a": jnp.array([0.5, -0.5]), "b": jnp.array(0.3)}


@pytest.mark.parametrize(
    "inner, outer, says",
    [
        (inner_loss, lambda p, h, b: jnp.asarray(1.0), "outer loss does not depend on `p"),
        (inner_loss, lambda p, h, b: jnp.sum(h), "outer loss does not depend on `params`"),
        (lambda p, h, b: jnp.sum(h), outer_loss, "inner loss does not depend on `params`"),
        (
            lambda p, h, b: jnp.sum(p**2),
            lambda p, h, b: jnp.sum(p * jax.lax.stop_gradient(h[0])),
            "acts on the losses only behind `jax.lax.stop_gradient`",
        ),
        (
            lambda p, h, b: jnp.sum((p - jnp.round(h[0])) ** 2),
            lambda p, h, b: jnp.sum(p),
            "acts on the result only through operations that have no derivative",
        ),
        (
            # Through the outer loss it can be seen, and through the inner one it cannot.
            lambda p, h, b: jnp.sum((p - jnp.round(h[0])) ** 2),
            lambda p, h, b: jnp.sum(p) + jnp.sum(h),
            "acts on the result only through operations that have no derivative",
        ),
    ],
)
def test_refuses_with_the_text_of_the_nested_solver(inner, outer, says):
    problem = mo.BilevelProblem(inner, outer)
    text = message(problem, SOLVER)
    assert says in text
    assert text == message(problem, NESTED)


def test_losses_without_hyper_are_refused():
    problem = mo.BilevelProblem(lambda p, h, b: jnp.sum(p**2), lambda p, h, b: jnp.sum(p))
    remedy = "there is nothing to tune. Compute the inner or the outer loss from `hyper`."
    for solver in (SOLVER, NESTED):
        text = message(problem, solver)
        assert text.startswith("Neither loss depends on `hyper`") and text.endswith(remedy)


def test_leaves_without_influence_are_listed():
    problem = mo.BilevelProblem(
        lambda p, h, b: inner_loss(p, h["a"], b), lambda p, h, b: outer_loss(p, h["a"], b)
    )
    report = solve(2, problem, hyper=LEAVES).report
    assert report.outer.unreached == ("hyper['b']",)
    held = mo.BilevelProblem(
        problem.inner,
        lambda p, h, b: outer_loss(p, h["a"], b) * jax.lax.stop_gradient(h["b"]),
    )
    report = solve(2, held, hyper=LEAVES).report
    assert report.outer.held_constant == ("hyper['b']",)


def test_initial_params_are_not_differentiated():
    quadratic = lambda p, h, b: jnp.sum((p - h[0]) ** 2)
    problem = lambda init: mo.BilevelProblem(
        mo.InnerProblem(quadratic, init_fn=init), lambda p, h, b: jnp.sum(p)
    )
    only = problem(lambda hyper, key: hyper["b"] * jnp.ones(2))
    both = problem(lambda hyper, key: hyper["a"] * jnp.ones(2))
    with_leaves = lambda p: mo.BilevelProblem(
        mo.InnerProblem(lambda p, h, b: quadratic(p, h["a"], b), init_fn=p.inner.init_fn),
        p.outer_loss,
    )
    text = message(with_leaves(only), SOLVER, LEAVES, params=None)
    assert "`hyper['b']` is zero by construction under `SOBA` where it acts on the" in text
    report = solve(2, with_leaves(both), hyper=LEAVES, params=None).report
    assert "the initial params" in report.left_out


class Forgetful(mo.extend.AbstractSingleLoopSolver):
    """The direct part of the hypergradient alone."""

    outer: optax.GradientTransformation
    num_train_batches: int = 1
    num_valid_batches: int = 1

    def first(self, problem, hyper, params):
        return ()

    def update(self, problem, state, train, valid, key):
        def outer(hyper):
            return problem.evaluate_outer(state.params, hyper, valid[0], key, ())[0]

        value, direction = jax.value_and_grad(outer)(state.hyper)
        return mo.extend.SingleLoopUpdate(state.params, (), direction, value)


def test_direction_that_forgets_a_leaf_is_refused():
    problem = mo.BilevelProblem(
        lambda p, h, b: inner_loss(p, h["a"], b),
        lambda p, h, b: jnp.sum(p) + 2 * h["b"],
    )
    text = message(problem, Forgetful(optax.sgd(0.1)), LEAVES)
    assert "`hyper['a']` is zero by construction under `Forgetful`" in text
    # The other is a constant, and right: the outer loss is linear in it.
    assert "`hyper['b']`" not in text


# Numbers that are not finite


def assert_finite(tree):
    for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)):
        assert np.all(np.isfinite(leaf))


def blows_up(at):
    """The outer loss, which is NaN once the first number in `hyper` passes `at`."""
    return lambda p, h, b: outer_loss(p, h, b) * jnp.where(h[0] > at, jnp.nan, 1.0)


def test_loss_that_becomes_nan_leaves_the_state_finite():
    problem = mo.BilevelProblem(inner_loss, blows_up(0.8))
    solution = solve(40, problem, throw=False)
    assert solution.result == mo.RESULTS.outer_nonfinite
    assert 0 < solution.num_skipped < 40
    assert_finite((solution.hyper, solution.params, solution.state))
    assert_finite(solution.history.hyper)
    # The number of the steps is the only thing that moved since.
    skipped = ~np.isfinite(solution.history.hypergradient_norm)
    assert skipped.sum() == solution.num_skipped
    path = solution.history.hyper[skipped]
    assert np.all(path == path[0])


def test_loss_that_becomes_nan_raises():
    problem = mo.BilevelProblem(inner_loss, blows_up(0.8))
    with pytest.raises(mo.SolveError, match="outer loss is infinite or NaN") as info:
        solve(40, problem, steps_per_call=8)
    assert_finite((info.value.value.hyper, info.value.value.params))


def test_loss_that_is_nan_for_some_steps_is_survived():
    batches = [jnp.ones(3)] * 9
    batches[4] = jnp.full(3, 1e200)  # whose square overflows
    problem = mo.BilevelProblem(
        inner_loss, lambda p, h, b: outer_loss(p, h, b) + 1e-3 * jnp.sum((p - b) ** 2)
    )
    data = None, iter(batches)
    solution = solve(9, problem, data=data, throw=False)
    assert solution.num_skipped == 1
    assert len(np.unique(solution.history.hyper[:, 0])) == 8
    assert_finite(solution.state)


@pytest.mark.parametrize(
    "rates, result",
    [
        ((50.0, 0.3), mo.RESULTS.inner_nonfinite),
        ((0.3, 50.0), mo.RESULTS.extra_nonfinite),
    ],
)
def test_loop_that_explodes_is_named(rates, result):
    # `hyper` rests, which would carry the explosion from the one to the other.
    solver = SOBA(optax.sgd(0.0), *rates, num_steps=40)
    solution = solve(20, solver=solver, throw=False)
    assert solution.result == result
    assert_finite((solution.hyper, solution.params, solution.state))
    with pytest.raises(mo.SolveError, match="infinite or NaN"):
        solve(20, solver=solver)


def test_step_of_hyper_that_overflows_is_not_taken():
    solver = SOBA(optax.sgd(float("inf")), inner_rate=0.3, linear_rate=0.3)
    solution = solve(3, solver=solver, throw=False)
    assert solution.result == mo.RESULTS.hypergradient_nonfinite
    np.testing.assert_array_equal(solution.hyper, [0.5, -0.5])


# Misuse


class Broken(mo.extend.AbstractSingleLoopSolver):
    """Changes a part of an update."""

    inside: Any
    change: Any = eqx.field(static=True)
    outer: optax.GradientTransformation = optax.sgd(0.1)
    num_train_batches: int = 1
    num_valid_batches: int = 1

    def first(self, problem, hyper, params):
        return self.inside.first(problem, hyper, params)

    def update(self, problem, state, train, valid, key):
        return self.change(self.inside.update(problem, state, train, valid, key))


def replaced(**parts):
    return lambda update: dataclasses.replace(update, **parts)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda update: (update.params,), "the return value of Broken.update` must be"),
        (replaced(params=jnp.zeros(2)), "`params` of the update of `Broken` must have the"),
        (replaced(evaluated=jnp.zeros(4)), "dtypes of `params` in the state"),
        (replaced(extra=(jnp.zeros(3),)), "`extra` of the update of `Broken` must have"),
        (replaced(direction=jnp.zeros(3)), "`direction` of the update of `Broken` must"),
        (replaced(model_state=jnp.zeros(3)), "`model_state` of the update of `Broken`"),
        (replaced(scalars={"size": jnp.zeros(3)}), r"`scalars\['size'\]` of the update"),
    ],
)
def test_updates_of_another_structure_are_named(change, says):
    with pytest.raises(ValueError, match=says):
        solve(2, solver=Broken(inside=SOLVER, change=change))


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: SOBA(0.1, 0.1, 0.1), "`outer` must be something like `optax.adam"),
        (lambda: SOBA(optax.sgd(0.1), 0.1, 0.1, 0), "`num_train_batches` must be at least"),
        (
            lambda: SOBA(optax.sgd(0.1), 0.1, 0.1, num_valid_batches=1.5),
            "`num_valid_batches` must be an int",
        ),
    ],
)
def test_settings_are_checked(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_batches_that_no_step_would_see_are_refused():
    data = mo.BatchSequence(ROWS[:, None]), mo.Minibatches(ROWS, 4)
    with pytest.raises(ValueError, match="each outer step would use the same first 1 of"):
        solve(2, NOISY, data=data)
    data = mo.BatchSequence(ROWS[:1, None]), mo.Minibatches(ROWS, 4)
    solver = dataclasses.replace(SOLVER, num_steps=2)
    with pytest.raises(ValueError, match="holds 1 batches but"):
        solve(2, NOISY, solver, data=data)


# Model state


def test_model_state_and_auxiliary_output_come_along():
    def loss(params, hyper, batch, state):
        mean = 0.5 * state + 0.5 * jnp.mean(params)
        return inner_loss(params, hyper, batch), mean

    problem = mo.BilevelProblem(
        mo.InnerProblem(loss, has_state=True),
        lambda p, h, b: (outer_loss(p, h, b), jnp.max(p)),
        has_aux=True,
    )
    options: dict[str, Any] = {"model_state": jnp.zeros(())}
    solution = solve(1500, problem, **options, steps_per_call=500)
    np.testing.assert_allclose(solution.hyper, BEST, rtol=1e-5)
    np.testing.assert_allclose(solution.model_state, np.mean(RESPONSE @ BEST), rtol=1e-5)
    np.testing.assert_allclose(
        solution.report.outer.aux, np.max(RESPONSE @ BEST), rtol=1e-5
    )
