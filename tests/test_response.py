"""What comes after a self-tuning run: checking its response, training on its schedule, the
path of `hyper`, and pictures of both."""

import csv
import functools as ft
import io
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest

import metaopt as mo


STN: Any = mo.STN()
DELTA: Any = mo.DeltaSTN()


# Ridge regression with a penalty for each weight


class Separate(mo.extend.AbstractPredictionProblem):
    """A layer for each weight, so that each has a response of its own."""

    def init(self, hyper, key):
        keys = jax.random.split(key, 3)
        make = ft.partial(eqx.nn.Linear, "scalar", "scalar", use_bias=False)
        layers = [make(key=key) for key in keys]
        return mo.nn.self_tuning(layers, 3, tied=False, key=key)

    def predict(self, params, hyper, batch):
        return sum(jax.vmap(layer)(column) for layer, column in zip(params, batch["x"].T))

    def criterion(self, predictions, params, hyper, batch):
        penalties = [mo.nn.squared_norm(layer) for layer in params]
        loss = jnp.mean((predictions - batch["y"]) ** 2)
        return (loss + jnp.exp(hyper) @ jnp.stack(penalties)) / 2


def data(seed: int) -> Any:
    x, noise = np.split(np.random.default_rng(seed).normal(size=(20, 4)), [3], axis=1)
    return {"x": x, "y": x @ [1, -1, 0.5] + 0.3 * noise[:, 0]}


def outer_loss(params, hyper, batch):
    predictions = sum(jax.vmap(layer)(x) for layer, x in zip(params, batch["x"].T))
    return jnp.mean((predictions - batch["y"]) ** 2)


TRAIN, VALID = data(1), data(2)
PROBLEM = mo.BilevelProblem(Separate(), outer_loss)
HYPER = jnp.asarray([-1.0, -2.0, 0.5])


def best_response(hyper):
    x, y = TRAIN["x"], TRAIN["y"]
    return jnp.linalg.solve(x.T @ x / 20 + jnp.diag(jnp.exp(hyper)), x.T @ y / 20)


@ft.cache
def solver_for(method: Any) -> mo.SelfTuningSolver:
    optimizers = optax.adam(0.01), optax.adam(0.1)
    return mo.SelfTuningSolver(*optimizers, method=method, train_steps=2)


@ft.cache
def solved(method: Any = DELTA) -> Any:
    """A run of a few steps, of which little is learned."""
    solver = solver_for(method)
    return mo.solve_bilevel(PROBLEM, HYPER, TRAIN, VALID, solver=solver, num_steps=3)


@ft.cache
def started(method: Any) -> Any:
    """The state before the first step."""
    sources = (mo.FullBatch(jax.tree.map(jnp.asarray, rows)) for rows in (TRAIN, VALID))
    settings = {"params": None, "model_state": None, "key": jax.random.key(0)}
    return solver_for(method).init(PROBLEM, HYPER, *sources, **settings)


def with_response(response, method: Any = DELTA) -> mo.extend.SelfTuningState:
    """The state of a run that has learned the best response, and that Jacobian of it."""
    params = [
        eqx.tree_at(
            lambda p: (
                p.layer.weight,
                p.response["weight"].scale,
                p.response["weight"].weight,
            ),
            layer,
            (jnp.full((1, 1), weight), row[None], jnp.ones((1, 1))),
        )
        for layer, weight, row in zip(
            started(method).params, best_response(HYPER), response
        )
    ]
    return eqx.tree_at(lambda s: s.params, started(method), params)


CG = mo.CG(rtol=1e-12)


def check(state, **given: Any) -> mo.diagnostics.ResponseCheck:
    settings: Any = {"linear_solver": CG} | given
    return mo.diagnostics.check_response(PROBLEM, state, TRAIN, VALID, **settings)


JACOBIAN = jax.jacfwd(best_response)(HYPER)


# What a response is checked against


@pytest.mark.one_of(2)
@pytest.mark.parametrize("method", [STN, DELTA], ids=["STN", "DeltaSTN"])
def test_the_exact_response_agrees(method):
    found = check(with_response(JACOBIAN, method))
    assert found.agree
    assert found.names == ("hyper[0]", "hyper[1]", "hyper[2]")
    assert np.all(found.relative_error < 1e-10) and found.jacobian_error < 1e-10
    np.testing.assert_allclose(found.cosine, 1, rtol=1e-10)
    np.testing.assert_allclose(found.jacobian_cosine, 1, rtol=1e-10)
    np.testing.assert_allclose(found.slope_cosine, 1, rtol=1e-10)
    norms = jnp.linalg.norm(JACOBIAN, axis=0)
    np.testing.assert_allclose(found.learned_norm, norms, rtol=1e-10)
    np.testing.assert_allclose(found.implicit_norm, norms, rtol=1e-10)
    # The outer loss reads `hyper` through the params alone, so the slopes are all of it.
    x, y = VALID["x"], VALID["y"]
    slopes = jax.grad(lambda h: jnp.mean((x @ best_response(h) - y) ** 2))(HYPER)
    np.testing.assert_allclose(found.learned_slope, slopes, rtol=1e-9)
    np.testing.assert_allclose(found.implicit_slope, slopes, rtol=1e-9)
    text = str(found)
    assert "They lead the same way." in text and "hyper[2]" in text
    assert "to a tenth" not in text


def test_a_wrong_response_does_not_agree():
    with pytest.warns(UserWarning, match=r"different directions \(cosine -1 "):
        found = check(with_response(-JACOBIAN))
    assert not found.agree
    np.testing.assert_allclose(found.slope_cosine, -1, rtol=1e-10)
    np.testing.assert_allclose(found.relative_error, 2, rtol=1e-10)
    assert "They do NOT lead the same way." in str(found)
    # None at all is wrong as well.
    with pytest.warns(UserWarning, match="nan"):
        assert not check(with_response(0 * JACOBIAN)).agree


def test_one_wrong_column_shows_in_its_row():
    wrong = JACOBIAN.at[:, 1].multiply(3.0)
    found = check(with_response(wrong))
    np.testing.assert_allclose(found.relative_error, [0, 2, 0], atol=1e-9)
    expected = 2 * jnp.linalg.norm(JACOBIAN[:, 1]) / jnp.linalg.norm(JACOBIAN)
    np.testing.assert_allclose(found.jacobian_error, expected, rtol=1e-9)


@pytest.mark.ci
def test_differences_come_to_the_derivative():
    state = with_response(JACOBIAN)
    found = check(state, step=1e-3)
    # An error of second order in the step.
    assert 1e-10 < found.jacobian_error < 1e-6
    np.testing.assert_allclose(check(state, step=0.1).jacobian_error, 2e-3, rtol=1)


@pytest.mark.ci
def test_random_directions_in_place_of_all_numbers():
    found = check(with_response(JACOBIAN), num_directions=5)
    assert found.names == tuple(f"direction {i}" for i in range(5))
    assert found.learned_norm.shape == (5,)
    assert found.agree and found.jacobian_error < 1e-10
    other = check(with_response(JACOBIAN), num_directions=5, key=jax.random.key(1))
    assert not np.allclose(other.learned_norm, found.learned_norm)


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:The learned best response")
def test_defaults_and_a_solution_in_place_of_its_state():
    a, b = (check(x, linear_solver=None) for x in (solved(STN), solved(STN).state))
    np.testing.assert_array_equal(a.learned_norm, b.learned_norm)
    # Three steps have not taught it much, and the default is a rough solution.
    assert a.jacobian_error > 0.1
    assert np.all(a.linear_residual < 1e-2) and np.any(a.linear_residual > 1e-12)
    exact = check(solved(STN), curvature=mo.linear.ExactCurvature())
    np.testing.assert_allclose(a.implicit_norm, exact.implicit_norm, rtol=0.05)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"problem": PROBLEM.inner}, "`problem` must be something like"),
        ({"solution": HYPER}, "`solution` must be something like"),
        ({"step": 0}, "`step` must be positive"),
        ({"step": -1.0}, "`step` must be a non-negative"),
        ({"num_directions": 2}, "`num_directions` must be at least 5"),
        ({"num_draws": 1}, "`num_draws` must be at least 2"),
        ({"linear_solver": "cg"}, "`linear_solver` must be something like"),
        ({"curvature": mo.linear.GaussNewton}, "`curvature` is the class"),
        ({"key": 3}, "`key` must come from"),
    ],
)
def test_arguments_of_the_check_that_are_refused(settings, message):
    arguments: Any = {"solution": started(DELTA)} | settings
    problem = arguments.pop("problem", PROBLEM)
    solution = arguments.pop("solution")
    with pytest.raises(ValueError, match=message):
        mo.diagnostics.check_response(problem, solution, TRAIN, VALID, **arguments)


class Dropped(mo.extend.AbstractPredictionProblem):
    """A penalty, and a dropout rate that acts through the masks alone."""

    def init(self, hyper, key):
        layers = [eqx.nn.Linear("scalar", "scalar", use_bias=False, key=key)] * 3
        return mo.nn.self_tuning(layers, 4, tied=False, key=key)

    def predict(self, params, hyper, batch, *, key):
        keep = jax.random.bernoulli(key, 1 - hyper["rate"], batch["x"].shape)
        return Separate().predict(params, hyper, batch | {"x": batch["x"] * keep})

    def criterion(self, predictions, params, hyper, batch):
        return Separate().criterion(predictions, params, hyper["decay"], batch)


@pytest.mark.ci
def test_a_leaf_without_a_derivative_is_refused_beside_one_that_has_it():
    # It once passed, with an implicit norm of 0: the leaves were checked as one vector.
    problem, hyper = mo.BilevelProblem(Dropped(), outer_loss), {"decay": HYPER, "rate": 0.3}
    sources = (mo.FullBatch(jax.tree.map(jnp.asarray, rows)) for rows in (TRAIN, VALID))
    settings = {"params": None, "model_state": None, "key": jax.random.key(0)}
    hyper = jax.tree.map(jnp.asarray, hyper)
    state = solver_for(STN).init(problem, hyper, *sources, **settings)
    given: Any = {"solution": state, "train": TRAIN, "valid": VALID, "linear_solver": CG}
    with pytest.raises(ValueError, match=r"depends on `hyper\['rate'\]` only .*step=0.3"):
        mo.diagnostics.check_response(problem, **given)
    with pytest.warns(UserWarning, match="response"):
        found = mo.diagnostics.check_response(problem, **given, step=0.1)
    assert found.names[-1] == "hyper['rate']" and np.all(found.implicit_norm > 0)


def test_many_numbers_are_refused_by_count():
    state = eqx.tree_at(lambda s: s.hyper, started(DELTA), jnp.zeros(101))
    with pytest.raises(ValueError, match="holds 101 numbers.*num_directions=10"):
        check(state)


# Training on a schedule


class Noisy(mo.extend.AbstractInnerProblem):
    """Everything that is drawn: the start, the rows of a batch, and noise on them."""

    has_aux = True

    def init(self, hyper, key):
        return hyper * jax.random.normal(key, (3,))

    def loss(self, params, hyper, batch, *, key):
        noise = 0.1 * jax.random.normal(key, batch["y"].shape)
        loss = jnp.mean((batch["x"] @ params + noise - batch["y"]) ** 2)
        return loss + jnp.exp(hyper) * params @ params, loss


def test_a_constant_schedule_is_training_at_that_hyper():
    source = mo.Minibatches(TRAIN, 5)
    settings: Any = {
        "solver": mo.Descent(optax.adam(0.1), num_steps=20),
        "key": jax.random.key(3),
    }
    a = mo.diagnostics.retrain(Noisy(), jnp.full(4, -1.0), source, **settings)
    b = mo.solve_inner(Noisy(), -1.0, source, adjoint=mo.UnrolledAdjoint(), **settings)
    np.testing.assert_array_equal(a.value, b.value)
    np.testing.assert_array_equal(a.stats["losses"], b.stats["losses"])
    np.testing.assert_array_equal(a.aux, b.aux)
    assert a.value.shape == (3,) and a.stats["num_steps"] == 20


def visits(params, hyper, batch):
    # Each step of gradient descent adds the row of its stage, which marks it.
    return -params @ hyper["mark"]


@pytest.mark.parametrize("num_stages, num_steps", [(3, 7), (26, 46), (6, 12), (5, 5)])
def test_each_stage_has_an_equal_share_of_the_steps(num_stages, num_steps):
    # By a product of floating-point numbers, boundaries were once off by a step.
    schedule = {"mark": np.eye(num_stages), "fixed": "not an array"}
    solver = mo.Descent(optax.sgd(1.0), num_steps)
    problem = mo.BilevelProblem(visits, outer_loss)
    start = jnp.zeros(num_stages)
    solution = mo.diagnostics.retrain(problem, schedule, solver=solver, params=start)
    stages = [step * num_stages // num_steps for step in range(num_steps)]
    expected = np.bincount(stages, minlength=num_stages)
    np.testing.assert_array_equal(solution.value, expected)


@pytest.mark.ci
def test_retraining_equals_a_loop():
    schedule: Any = solved().history.hyper
    optimizer = optax.sgd(0.1, momentum=0.9)
    solver = mo.Descent(optimizer, num_steps=6)
    start = PROBLEM.inner.init(HYPER, jax.random.key(0))
    solution = mo.diagnostics.retrain(PROBLEM, schedule, TRAIN, solver=solver, params=start)

    def loss(weights, hyper):
        errors = TRAIN["x"] @ weights - TRAIN["y"]
        return (jnp.mean(errors**2) + jnp.exp(hyper) @ weights**2) / 2

    weights: Any = jnp.stack([layer.weight[0, 0] for layer in start])
    state = optimizer.init(weights)
    assert len(schedule) == 3
    for row in np.repeat(schedule, 2, axis=0):
        updates, state = optimizer.update(jax.grad(loss)(weights, row), state)
        weights = optax.apply_updates(weights, updates)
    # An ordinary model, whatever the problem makes of it for self-tuning.
    assert [type(layer) for layer in solution.value] == 3 * [eqx.nn.Linear]
    found = [layer.weight[0, 0] for layer in solution.value]
    np.testing.assert_allclose(found, weights, rtol=1e-12)


DESCENT = mo.Descent(optax.sgd(0.1), num_steps=4)
FIXED_POINT = mo.FixedPointProblem(lambda params, hyper, batch: params)


@pytest.mark.parametrize(
    "problem, schedule, solver, message",
    [
        (FIXED_POINT, jnp.ones(2), DESCENT, "`problem` must minimise a loss.*has none"),
        (
            Noisy(),
            mo.History({"outer_loss": np.zeros(3)}),
            DESCENT,
            "got a `History`, which has it as `history.hyper`",
        ),
        (Noisy(), 0.1, DESCENT, "`schedule` must share a leading axis"),
        (Noisy(), jnp.asarray(0.1), DESCENT, r"leading axis.*got shapes \[\(\)\]"),
        (Noisy(), {"a": jnp.ones(2), "b": jnp.ones(3)}, DESCENT, "must share a leading"),
        (Noisy(), jnp.ones((0,)), DESCENT, "empty array"),
        (Noisy(), jnp.ones(5), DESCENT, "has 5 stages and `solver` takes 4 steps"),
        (Noisy(), jnp.asarray([0.0, np.nan]), DESCENT, "infinite or NaN"),
        (Noisy(), jnp.ones(2), optax.sgd(0.1), "`solver` must be something like"),
        # A transform would be made from all stages at once.
        (
            Noisy(),
            jnp.ones(2),
            mo.Descent(lambda hyper: optax.sgd(hyper), num_steps=4),
            "makes its transform from `hyper`",
        ),
    ],
)
def test_schedules_that_are_refused(problem, schedule, solver, message):
    with pytest.raises(ValueError, match=message):
        mo.diagnostics.retrain(problem, schedule, TRAIN, solver=solver)


def test_diverging_on_a_schedule_raises():
    solver = mo.Descent(optax.sgd(1e3), num_steps=200)
    settings: Any = {"solver": solver, "train": TRAIN, "schedule": jnp.ones(2)}
    with pytest.raises(mo.SolveError, match="The inner solver diverged"):
        mo.diagnostics.retrain(Noisy(), **settings)
    solution = mo.diagnostics.retrain(Noisy(), **settings, throw=False)
    assert solution.result == mo.RESULTS.inner_diverged


# The path of `hyper`


class Hyper(eqx.Module):
    rate: mo.hyper.Interval
    target: jax.Array
    scale: jax.Array
    name: str = eqx.field(static=True, default="static")


def test_the_history_records_the_path_of_hyper(tmp_path):
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: jnp.sum((params - hyper.target) ** 2),
        lambda params, hyper, batch: jnp.sum(
            (hyper.rate.value * hyper.scale * params - 1) ** 2
        ),
    )
    solver = mo.NestedSolver(
        mo.Descent(optax.sgd(0.2), 5), mo.UnrolledAdjoint(), optax.sgd(0.1)
    )
    hyper = Hyper(mo.hyper.Interval(0.5, 0, 1), jnp.arange(2.0), jnp.ones(2, jnp.float32))
    states = []
    solution = mo.solve_bilevel(
        problem,
        hyper,
        solver=solver,
        num_steps=3,
        params=jnp.zeros(2),
        callbacks=[lambda run: states.append(run.hyper)],
    )
    history: Any = solution.history
    path = history.hyper
    assert jax.tree.structure(path) == jax.tree.structure(hyper)
    for i, leaf in enumerate(jax.tree.leaves(path)):
        assert isinstance(leaf, np.ndarray)
        seen = [jax.tree.leaves(state)[i] for state in states]
        assert leaf.dtype == seen[0].dtype
        np.testing.assert_array_equal(leaf, np.stack(seen))
    assert path.target.shape == (3, 2) and path.rate.raw.shape == (3,)
    np.testing.assert_array_equal(path.target[-1], solution.hyper.target)
    assert len({float(x) for x in path.rate.raw}) == 3
    # Hyperparameters know their values along the path, too.
    np.testing.assert_allclose(path.rate.value[-1], solution.hyper.rate.value, rtol=1e-12)

    columns = history.to_dict()
    names = ["rate.raw", "target[0]", "target[1]", "scale[0]", "scale[1]"]
    assert [n for n in columns if n.startswith("hyper.")] == [f"hyper.{n}" for n in names]
    assert columns["hyper.target[1]"] == path.target[:, 1].tolist()
    assert columns["outer_loss"] == history.outer_loss.tolist()
    history.to_csv(tmp_path / "history.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "history.csv").read_text())))
    assert len(rows) == 3 and list(rows[0]) == ["step", *columns]
    assert [float(row["hyper.target[1]"]) for row in rows] == columns["hyper.target[1]"]


@pytest.mark.ci
def test_a_step_that_is_undone_leaves_no_trace_in_the_path():
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: (params - hyper) ** 2,
        lambda params, hyper, batch: params**2 + hyper**2,
    )
    # Too few steps for an implicit derivative, which is then not to be trusted.
    inner, outer = mo.Descent(optax.sgd(0.2), 2), optax.sgd(0.1)
    solver = mo.NestedSolver(inner, mo.ImplicitAdjoint(), outer)
    settings: Any = {"solver": solver, "num_steps": 2, "params": jnp.zeros(())}
    with pytest.raises(mo.SolveError, match="not solved accurately") as info:
        mo.solve_bilevel(problem, 1.0, **settings)
    solution = info.value.value
    assert solution.hyper == 1.0
    np.testing.assert_array_equal(solution.history.hyper, [1.0])
    # Without `throw` it is taken all the same.
    solution = mo.solve_bilevel(problem, 1.0, **settings, throw=False)
    path: Any = solution.history.hyper
    assert solution.hyper == path[-1] != 1.0


def test_numbers_without_a_name_are_columns_as_well():
    assert history_of(np.arange(3.0)).to_dict()["hyper"] == [0, 1, 2]
    columns = solved().history.to_dict()
    names = [f"hyper[{i}]" for i in range(3)]
    assert [n for n in columns if "hyper" in n] == ["hypergradient_norm", *names]
    np.testing.assert_array_equal(solved().history.hyper[-1], solved().hyper)


@pytest.mark.parametrize("size, recorded", [(1000, True), (1001, False)])
def test_long_paths_are_not_kept(size, recorded):
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: jnp.sum((params - hyper) ** 2),
        lambda params, hyper, batch: jnp.sum(params**2),
    )
    solver = mo.NestedSolver(
        mo.Descent(optax.sgd(0.2), 1), mo.UnrolledAdjoint(), optax.sgd(0.1)
    )
    hyper = jnp.ones(size)
    solution = mo.solve_bilevel(problem, hyper, solver=solver, num_steps=1, params=hyper)
    history: Any = solution.history
    if recorded:
        assert history.hyper.shape == (1, size)
    else:
        assert history.hyper is None
        assert not any(n.startswith("hyper.") or "[" in n for n in history.to_dict())
        with pytest.raises(ValueError, match="holds no path.*callback"):
            mo.plot.hyper_path(history)


# Pictures


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def history_of(hyper: Any) -> mo.History:
    zeros = np.zeros(3)
    return mo.History({"outer_loss": zeros}, hyper)


def test_pictures_of_something_else_are_refused():
    with pytest.raises(ValueError, match="`history` must be something like `solution.hist"):
        mo.plot.hyper_path(jnp.zeros(3))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="`check` must be something like `metaopt.diag"):
        mo.plot.response(jnp.zeros(3))  # pyright: ignore[reportArgumentType]


def test_hyper_path_draws_a_panel_for_each_leaf():
    raw = mo.hyper.Positive(jnp.asarray([0.001, 0.1, 1.0]))
    hyper = {
        "decay": raw,
        "few": np.arange(6.0).reshape(3, 2) - 1,
        "function": jnp.tanh,
        "many": np.ones((3, 5, 4), np.float32),
        "number": np.asarray([1.0, 2.0, 3.0]),
        "zero": np.zeros(3),
    }
    axes = mo.plot.hyper_path(history_of(hyper))
    titles = [a.get_title() for a in axes]
    assert titles == ["decay", "few", "many", "number", "zero"]
    # Twenty numbers are drawn as their median and two bands.
    assert [len(a.lines) for a in axes] == [1, 2, 1, 1, 1]
    assert [len(a.collections) for a in axes] == [0, 0, 2, 0, 0]
    # Values, over steps that are counted from one.
    np.testing.assert_allclose(axes[0].lines[0].get_ydata(), [0.001, 0.1, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(axes[0].lines[0].get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(axes[1].lines[1].get_ydata(), [0, 2, 4])
    assert [a.get_yscale() for a in axes] == ["log"] + 4 * ["linear"]
    legends = [a.get_legend() for a in axes]
    assert [legend is None for legend in legends] == [True, False, False, True, True]
    assert [text.get_text() for text in legends[1].get_texts()] == ["1", "2"]
    # Five panels, three in a row: those without another below them name the axis.
    assert [a.get_xlabel() for a in axes] == 2 * [""] + 3 * ["outer step"]
    axes[0].figure.canvas.draw()


def test_hyper_path_of_one_array_goes_into_a_given_figure():
    figure = plt.figure()
    (axes,) = mo.plot.hyper_path(solved().history, figure=figure)
    assert axes.figure is figure
    assert axes.get_title() == "hyper" and len(axes.lines) == 3
    assert axes.get_xlabel() == "outer step"


def test_response_draws_bars_for_each_direction():
    check_ = check(with_response(JACOBIAN))
    left, right = mo.plot.response(check_)
    assert len(left.patches) == 3 and len(right.patches) == 6
    widths = [bar.get_width() for bar in right.patches]
    np.testing.assert_allclose(widths[:3], check_.learned_slope)
    np.testing.assert_allclose(widths[3:], check_.implicit_slope)
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels == ["0", "1", "2"]
    assert "cosine 1.00" in right.get_title()
    texts = [text.get_text() for text in right.get_legend().get_texts()]
    assert texts == ["learned", "implicit"]
    figure = plt.figure()
    assert mo.plot.response(check_, figure=figure)[0].figure is figure
    figure.canvas.draw()


def test_pictures_say_how_to_install_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    message = r"needs matplotlib: `pip install 'metaopt-jax\[plot\]'`"
    with pytest.raises(ImportError, match=message):
        mo.plot.hyper_path(solved().history)
