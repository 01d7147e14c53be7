"""Misuse that can be seen without numbers: each is an error that names the argument,
what was given and what to write, raised before anything is compiled."""

# The types are wrong on purpose.
# pyright: reportArgumentType=false

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import metaopt as mo
from metaopt._core._validate import canonical_hyper
from metaopt._outer._function import as_callbacks


def inner_loss(params, hyper, batch):
    return jnp.sum((params - hyper) ** 2)


def outer_loss(params, hyper, batch):
    return jnp.sum(params**2)


def regression(params, hyper, batch):
    x, y = batch
    return jnp.mean((x @ params - y) ** 2) + jnp.exp(hyper) * jnp.sum(params**2)


PROBLEM = mo.BilevelProblem(inner_loss, outer_loss)
REGRESSION = mo.BilevelProblem(regression, regression)
CONTRACTION = mo.BilevelProblem(
    mo.FixedPointProblem(lambda z, hyper, batch: 0.5 * z + hyper), outer_loss
)
DESCENT = mo.Descent(optax.sgd(0.1), num_steps=10)
X, Y = np.ones((20, 3)), np.ones(20)


def call(
    problem: Any = PROBLEM,
    hyper: Any = 1.0,
    params: Any = None,
    train: Any = None,
    valid: Any = None,
    **options: Any,
):
    params = jnp.zeros(3) if params is None else params
    settings: dict[str, Any] = {"inner": DESCENT, "adjoint": mo.UnrolledAdjoint()} | options
    return mo.hypergradient(problem, hyper, train, valid, params=params, **settings)


def data_call(train, valid=(X, Y), **options):
    return call(REGRESSION, 0.0, None, train, valid, **options)


def wrap(loss):
    return mo.BilevelProblem(loss, outer_loss)


NAN_X = np.where(np.arange(60).reshape(20, 3) == 7, np.nan, X)
LINEAR_HYPER = {"rate": 0.1, "target": 1.0}

VALUE_ERRORS = {
    # what is handed over
    "problem": (lambda: call(inner_loss), "`problem` must be something like"),
    "inner solver": (lambda: call(inner=optax.sgd(0.1)), "`inner` must be something like"),
    "adjoint": (lambda: call(adjoint="implicit"), "`adjoint` must be .* got 'implicit'"),
    "inner of a problem": (
        lambda: mo.BilevelProblem(3, outer_loss),
        "`inner` must be an inn",
    ),
    "class for an instance": (
        lambda: mo.BilevelProblem(mo.extend.AbstractInnerProblem, outer_loss),
        "an instance of a subclass",
    ),
    "outer loss": (
        lambda: mo.BilevelProblem(inner_loss, 3.0),
        "`outer_loss` must be a func",
    ),
    "adjoint class": (
        lambda: call(adjoint=mo.ImplicitAdjoint),
        "`adjoint` is the class `ImplicitAdjoint` itself. Call it",
    ),
    "optax function": (
        lambda: mo.Descent(optax.sgd, num_steps=3),  # pyright: ignore
        r"`transform` is the function `optax.sgd` itself. Call it",
    ),
    "key": (lambda: call(key=0), r"`key` must come from `jax.random.key\(0\)`; got 0"),
    "data as params": (
        lambda: call(params=mo.Minibatches((X, Y), 4)),
        r"`params` is .* a source of data. Write .*hyper, train, valid, params=",
    ),
    "iterator": (lambda: data_call(iter([(X, Y)])), "`train` is an iterator, from which"),
    "sequence for the outer loss": (
        lambda: data_call((X, Y), mo.BatchSequence((X, Y))),
        "`valid` is a `BatchSequence`",
    ),
    "Picard and minibatches": (
        lambda: mo.hypergradient(
            CONTRACTION,
            1.0,
            mo.Minibatches((X, Y), 4),
            params=jnp.zeros(3),
            inner=mo.Picard(20),
            adjoint=mo.UnrolledAdjoint(),
        ),
        "which minibatches keep away from zero. Write `rtol=None`",
    ),
    "no rtol": (
        lambda: mo.ImplicitAdjoint(rtol=None),  # pyright: ignore
        "`rtol` must be a non-negative number; got None",
    ),
    "difference of length zero": (
        lambda: mo.check_hypergradient(
            PROBLEM,
            1.0,
            params=jnp.zeros(3),
            inner=DESCENT,
            adjoint=mo.UnrolledAdjoint(),
            step=0.0,
        ),
        "`step` must be positive",
    ),
    "jaxopt instance": (
        lambda: mo.JaxoptSolver(3),
        "`solver` must be the name of a class in jaxopt",
    ),
    "no init": (
        lambda: mo.hypergradient(PROBLEM, 1.0, inner=DESCENT, adjoint=mo.UnrolledAdjoint()),
        r"pass `params=\.\.\.`",
    ),
    # hyper and params
    "hyper NaN": (lambda: call(hyper=float("nan")), "`hyper` holds infinite or NaN"),
    "hyper leaf NaN": (
        lambda: call(hyper={"a": 1.0, "b": np.array([1.0, np.inf])}),
        r"`hyper\['b'\]` holds infinite or NaN",
    ),
    "hyper empty": (lambda: call(hyper=jnp.zeros(0)), r"`hyper` is an empty array"),
    "hyper complex": (lambda: call(hyper=jnp.zeros(2, complex)), "`hyper` is complex"),
    "params empty pytree": (lambda: call(params={}), "`params` holds no floating-point"),
    "params ints": (lambda: call(params=jnp.arange(3)), "`params` holds no floating-point"),
    "params zero size": (
        lambda: call(params=jnp.zeros((0, 3))),
        "`params` is an empty arr",
    ),
    "params complex": (lambda: call(params=jnp.zeros(3, complex)), "`params` is complex"),
    # data
    "data NaN": (lambda: data_call((NAN_X, Y)), r"`train\[0\]` holds infinite or NaN"),
    "valid NaN": (
        lambda: data_call((X, Y), (X, np.full(20, np.nan))),
        r"`valid\[1\]` holds infinite or NaN",
    ),
    "minibatches of minibatches": (
        lambda: data_call(mo.Minibatches(mo.Minibatches((X, Y), 8), 4)),
        "the data of `Minibatches` are a source of batches, of class `Minib.*its arrays",
    ),
    "minibatches of folds": (
        lambda: data_call(mo.Minibatches(mo.Folds([(X, Y), (X, Y)]), 4)),
        r"of class `Folds`. .*`metaopt.Folds\(\[metaopt.Minibatches\(fold, 32\)",
    ),
    "data empty": (lambda: data_call((X[:0], Y[:0])), r"`train\[0\]` is an empty array"),
    "rows differ": (
        lambda: data_call((X, Y[:5])),
        r"20 rows in `train\[0\]`, 5 rows in `tr",
    ),
    "rows broadcast": (
        lambda: data_call((X, Y[:1])),
        r"20 rows in `train\[0\]`, 1 rows in",
    ),
    "rows of minibatches": (
        lambda: data_call(mo.Minibatches((X, Y[:5]), 4)),
        r"20 rows in `arrays\[0\]`, 5 rows",
    ),
    "no arrays": (lambda: data_call(mo.Minibatches((), 4)), "needs at least one array"),
    "scalar in minibatches": (
        lambda: data_call(mo.Minibatches((X, np.float32(1.0)), 4)),
        "arrays with a leading axis",
    ),
    "batch size": (
        lambda: data_call(mo.Minibatches((X, Y), 40)),
        "between 1 and .* 20; got",
    ),
    "batch size float": (lambda: data_call(mo.Minibatches((X, Y), 4.0)), "must be an int"),
    "too few batches": (
        lambda: data_call(mo.BatchSequence((X[None], Y[None]))),
        "holds 1 batches but .* 10 steps",
    ),
    "no full batch": (
        lambda: data_call(
            mo.BatchSequence((X[None], Y[None])),
            inner=mo.Descent(optax.sgd(0.1), 1),
            adjoint=mo.ImplicitAdjoint(),
        ),
        "all of the data as one batch",
    ),
    # what losses return
    "loss vector": (
        lambda: call(wrap(lambda p, h, b: p - h)),
        "the inner loss returned an a",
    ),
    "loss tuple": (
        lambda: call(wrap(lambda p, h, b: (inner_loss(p, h, b), 1))),
        "the inner loss returned a tuple of length 2.*has_aux",
    ),
    "loss Python float": (
        lambda: call(wrap(lambda p, h, b: 1.0)),
        "returned 1.0 of type `flo",
    ),
    "loss int": (lambda: call(wrap(lambda p, h, b: jnp.sum(p) > 0)), "dtype bool"),
    "loss complex": (
        lambda: call(wrap(lambda p, h, b: jnp.sum(p) + 1j)),
        "a complex number",
    ),
    "outer vector": (
        lambda: call(mo.BilevelProblem(inner_loss, lambda p, h, b: p)),
        "the outer loss returned an array of shape",
    ),
    "aux missing": (
        lambda: call(
            mo.BilevelProblem(mo.InnerProblem(inner_loss, has_aux=True), outer_loss)
        ),
        r"must return the tuple \(value, aux\)",
    ),
    "outer aux missing": (
        lambda: call(mo.BilevelProblem(inner_loss, outer_loss, has_aux=True)),
        r"the outer loss must return the tuple \(value, aux\)",
    ),
    "step of another shape": (
        lambda: call(
            mo.BilevelProblem(mo.FixedPointProblem(lambda z, h, b: jnp.sum(z)), outer_loss),
            inner=mo.Picard(),
        ),
        "in the place of `params`, which is an array of shape",
    ),
    "step of another structure": (
        lambda: call(
            mo.BilevelProblem(mo.FixedPointProblem(lambda z, h, b: (z, z)), outer_loss),
            inner=mo.Picard(),
        ),
        "must return one like `params`",
    ),
    "residual of another dtype": (
        lambda: call(
            mo.BilevelProblem(
                mo.RootProblem(lambda z, h, b: z.astype(jnp.float32)), outer_loss
            ),
            inner=mo.OptimistixSolver(optx.Newton(1e-8, 1e-8)),
            adjoint=mo.ImplicitAdjoint(mo.GMRES()),
        ),
        "Shapes and dtypes must agree",
    ),
    # what losses depend on
    "loss without params": (
        lambda: call(wrap(lambda p, h, b: jnp.sum(h) ** 2 * 1.0)),
        "inner loss does not depend on `params`",
    ),
    "outer without params": (
        lambda: call(mo.BilevelProblem(inner_loss, lambda p, h, b: jnp.sum(h**2))),
        "outer loss does not depend on `params`",
    ),
    "no hyper at all": (
        lambda: call(wrap(lambda p, h, b: jnp.sum(p**2))),
        "Neither loss depends on `hyper`",
    ),
    "no hyper at all, implicit": (
        lambda: call(wrap(lambda p, h, b: jnp.sum(p**2)), adjoint=mo.ImplicitAdjoint()),
        "Neither loss depends on `hyper`",
    ),
    "rate under implicit": (
        lambda: call(
            wrap(lambda p, h, b: jnp.sum((p - h["target"]) ** 2)),
            LINEAR_HYPER,
            inner=mo.Descent(lambda h: optax.sgd(h["rate"]), 10),
            adjoint=mo.ImplicitAdjoint(),
        ),
        r"respect to `hyper\['rate'\]` is zero by construction.*UnrolledAdjoint",
    ),
    # settings
    "num_steps 0": (
        lambda: mo.Descent(optax.sgd(0.1), 0),
        "`num_steps` must be at least 1",
    ),
    "num_steps float": (
        lambda: mo.Descent(optax.sgd(0.1), 1.5),
        "`num_steps` must be an int",
    ),
    "num_steps bool": (lambda: mo.Picard(True), "`num_steps` must be an int"),
    "not a transform": (
        lambda: mo.Descent(0.1, 5),
        "`transform` must be an optax transform",
    ),
    "not a transform made": (
        lambda: call(inner=mo.Descent(lambda h: 0.1, 5)),
        "must return an optax transform",
    ),
    "descent atol": (
        lambda: mo.Descent(optax.sgd(0.1), 5, atol=-1.0),
        "`atol` must be a non",
    ),
    "picard rtol": (lambda: mo.Picard(rtol=float("nan")), "`rtol` must be a non-negative"),
    "relaxation": (lambda: mo.Picard(relaxation=1.5), r"`relaxation` must lie in \(0, 1\]"),
    "inner_rtol": (
        lambda: mo.ImplicitAdjoint(inner_rtol="a"),
        "`inner_rtol` must be a non-n",
    ),
    "linear solver": (
        lambda: mo.ImplicitAdjoint(optx.BFGS(1, 1)),
        "`linear_solver` must be",
    ),
    "memory": (lambda: mo.UnrolledAdjoint("2 gigs"), "`memory` must be a memory plan"),
    "truncated 0": (lambda: mo.TruncatedAdjoint(0), "at least 1; got 0"),
    "truncated negative": (lambda: mo.TruncatedAdjoint(-3), "at least 1; got -3"),
    "optimistix solver": (
        lambda: mo.OptimistixSolver("BFGS"),
        "must be an optimistix solver",
    ),
    "outer transform": (
        lambda: mo.NestedSolver(DESCENT, mo.UnrolledAdjoint(), 0.1),
        "`outer` must be something like `optax.adam",
    ),
    "start": (
        lambda: mo.NestedSolver(DESCENT, mo.UnrolledAdjoint(), optax.sgd(0.1), "warm"),
        "`start` must be something like",
    ),
    # what cannot be combined
    "truncated beyond": (
        lambda: call(adjoint=mo.TruncatedAdjoint(20)),
        r"`TruncatedAdjoint\(20\)` .* the solver takes, 10",
    ),
    "truncated and tolerance": (
        lambda: call(
            inner=mo.Descent(optax.sgd(0.1), 10, atol=1e-3), adjoint=mo.TruncatedAdjoint(3)
        ),
        "needs a fixed number of steps",
    ),
    "path of a whole": (
        lambda: call(inner=mo.OptimistixSolver(optx.BFGS(1e-8, 1e-8))),
        r"`OptimistixSolver` runs as a whole. Use `metaopt.ImplicitAdjoint\(\)`",
    ),
    "CG for a fixed point": (
        lambda: call(CONTRACTION, inner=mo.Picard(), adjoint=mo.ImplicitAdjoint()),
        r"`CG` needs a symmetric positive .* `metaopt.GMRES\(\)`",
    ),
    "line search for a fixed point": (
        lambda: call(CONTRACTION, inner=mo.Descent(optax.lbfgs(), 3)),
        "asks for a loss, and `FixedPointProblem` has none",
    ),
    "picard for a loss": (lambda: call(inner=mo.Picard()), "`Picard` solves fixed-point"),
    "fixed-point solver for a loss": (
        lambda: call(
            inner=mo.OptimistixSolver(optx.FixedPointIteration(1e-6, 1e-6)),
            adjoint=mo.ImplicitAdjoint(),
        ),
        "`FixedPointIteration` cannot solve",
    ),
    "tolerance and minibatches": (
        lambda: data_call(
            mo.Minibatches((X, Y), 4), inner=mo.Descent(optax.sgd(0.1), 10, atol=1e-3)
        ),
        "Write `atol=None`",
    ),
    "state without policy": (
        lambda: call(
            mo.BilevelProblem(mo.InnerProblem(inner_loss, has_state=True), outer_loss)
        ),
        r"state_policy=metaopt.nn.CarriedState\(\)",
    ),
    "policy without state": (
        lambda: call(
            inner=mo.Descent(optax.sgd(0.1), 5, state_policy=mo.nn.CarriedState()),
        ),
        "declares no model state",
    ),
    "outer steps": (
        lambda: mo.solve_bilevel(
            PROBLEM,
            1.0,
            params=jnp.zeros(3),
            solver=mo.NestedSolver(DESCENT, mo.UnrolledAdjoint(), optax.sgd(0.1)),
            num_steps=0,
        ),
        "`num_steps` must be at least 1",
    ),
    "bilevel solver": (
        lambda: mo.solve_bilevel(PROBLEM, 1.0, solver=DESCENT, num_steps=1),
        "`solver` must be something like `metaopt.NestedSolver",
    ),
    "inner problem": (
        lambda: mo.solve_inner(
            PROBLEM, 1.0, params=jnp.zeros(3), solver=DESCENT, adjoint=mo.UnrolledAdjoint()
        ),
        "`problem` must be something like `metaopt.InnerProblem",
    ),
}


@pytest.mark.parametrize("name", VALUE_ERRORS)
def test_misuse_is_a_value_error_that_says_what_to_write(name):
    function, message = VALUE_ERRORS[name]
    with pytest.raises(ValueError, match=message):
        function()


@pytest.mark.parametrize(
    "hyper, message",
    [
        (3, "`hyper` is 3: an integer or bool cannot be tuned"),
        (True, "`hyper` is True: an integer or bool"),
        ({"depth": 3, "rate": 0.1}, r"`hyper\['depth'\]` is 3"),
        (np.int64(3), "an integer or bool cannot be tuned"),
        (jnp.arange(3), "`hyper` holds no floating-point array"),
        ({}, "`hyper` holds no floating-point array"),
        (None, "`hyper` holds no floating-point array"),
    ],
)
def test_hyper_that_cannot_be_tuned_is_a_type_error(hyper, message):
    with pytest.raises(TypeError, match=message):
        call(hyper=hyper)


class Settings(eqx.Module):
    rate: jax.Array
    count: jax.Array


def test_integers_beside_the_floats_of_hyper_are_named():
    # They were left alone without a word.
    rate, whole = jnp.asarray(0.1), jnp.arange(2)
    hyper = {"rate": rate, "more": (whole, np.array([True])), "held": Settings(rate, whole)}
    names = r"^`hyper\['more'\]\[0\]`, `hyper\['more'\]\[1\]` is not tuned: an array of"
    with pytest.warns(UserWarning, match=names) as seen:
        out = canonical_hyper(hyper)
    assert len(seen) == 1
    assert jnp.array_equal(out["more"][0], whole)
    canonical_hyper({"rate": rate, "held": Settings(rate, whole), "key": jax.random.key(0)})


@pytest.mark.parametrize(
    "name, message",
    [
        ("LevenbergMarquardt", "without `residual_fun`.*`options`"),
        ("ProjectedGradient", "without `projection`.*`options`"),
        ("ProximalGradient", "without `hyperparams_prox`.*`arguments`"),
        ("LBFGSB", "without `bounds`.*`arguments`"),
        ("ScipyMinimize", "cannot be compiled"),
        ("GaussNewton", "no optimality condition"),
        ("Newton", "no solver named 'Newton'"),
    ],
)
def test_what_solvers_of_jaxopt_lack(name, message):
    pytest.importorskip("jaxopt", exc_type=ImportError)
    with pytest.raises(ValueError, match=message):
        call(inner=mo.JaxoptSolver(name), adjoint=mo.ImplicitAdjoint(mo.GMRES()))


def test_missing_data_is_named_beside_the_exception():
    problem = mo.BilevelProblem(lambda p, h, b: jnp.sum((p - h) ** 2) + b[0], outer_loss)
    with pytest.raises(TypeError, match="not subscriptable") as info:
        call(problem)
    assert "called `loss` with `None` as its batch" in info.value.__notes__[0]


def test_float_is_params_and_a_setting_inside_of_a_model():
    def solve(loss, params):
        return mo.solve_inner(
            mo.InnerProblem(loss),
            1.0,
            params=params,
            solver=mo.Descent(optax.sgd(0.1), num_steps=100),
            adjoint=mo.UnrolledAdjoint(),
        ).value

    np.testing.assert_allclose(solve(lambda p, h, b: (p - h) ** 2, 0.0), 1.0, rtol=1e-6)
    # Once the temperature was trained along with the rest.
    model = {"a": jnp.array(0.0), "temperature": 2.0}
    with pytest.warns(UserWarning, match=r"`params\['temperature'\]` = 2.0 is not trained"):
        value = solve(lambda p, h, b: (p["a"] / p["temperature"] - h) ** 2, model)
    assert value["temperature"] == 2.0
    np.testing.assert_allclose(value["a"], 2.0, rtol=1e-2)


def test_exceptions_of_losses_surface_unchanged():
    class OwnError(Exception):
        pass

    def broken(params, hyper, batch):
        raise OwnError("from the loss")

    with pytest.raises(OwnError, match="from the loss"):
        call(wrap(broken))


def test_rows_may_differ_where_that_is_said():
    def loss(params, hyper, batch):
        x, target = batch
        return jnp.sum((jnp.mean(x, axis=0) * params - target - hyper) ** 2)

    data = mo.FullBatch((jnp.ones((20, 3)), jnp.zeros(3)))
    gradient, _ = call(mo.BilevelProblem(loss, loss), 1.0, None, data, data)
    assert jnp.isfinite(gradient)


def test_float64_data_in_32_bits_warns_and_names_the_array():
    x, y = X.astype(np.float32), Y.astype(np.float32)
    with jax.enable_x64(False):
        with pytest.warns(UserWarning, match=r"`train\[0\]` is float64 and is used as flo"):
            data_call((X, y), (x, y))


_PARAMS, _HYPER = {"w": jnp.zeros(2)}, {"l": jnp.ones(2)}
_STEPS: Any = dict(
    inner=mo.Descent(optax.sgd(0.1), 2),
    adjoint=mo.UnrolledAdjoint(),
)


def _fits(params, hyper, batch, weight=1.0):
    return weight * jnp.sum((params["w"] - hyper["l"]) ** 2)


@pytest.mark.parametrize(
    "inner, outer, match",
    [
        (lambda p, h: 0.0, _fits, r"`loss_fn` is called as `loss_fn\(params, hyper, b"),
        (lambda p, h, b, *, foo: 0.0, _fits, r"missing a required .*argument: 'foo'"),
        (_fits, lambda p: 0.0, r"`outer_loss` is called as .* takes `\(p\)`"),
    ],
    ids=["two arguments", "keyword", "outer"],
)
def test_functions_of_the_wrong_signature(inner, outer, match):
    # Once a `TypeError` of Python about a lambda.
    with pytest.raises(ValueError, match=match):
        mo.hypergradient(mo.BilevelProblem(inner, outer), _HYPER, params=_PARAMS, **_STEPS)


def test_params_and_hyper_in_each_others_place():
    problem = mo.BilevelProblem(_fits, _fits)
    with pytest.raises(ValueError, match="`hyper` in each other's place"):
        mo.hypergradient(problem, _PARAMS, params=_HYPER, **_STEPS)
    mistaken = mo.BilevelProblem(lambda p, h, b: p["typo"], _fits)
    with pytest.raises(KeyError, match="typo"):
        mo.hypergradient(mistaken, _HYPER, params=_PARAMS, **_STEPS)


def test_model_state_without_params_is_named():
    # It was replaced by that of `init` without a word.
    class Counted(mo.extend.AbstractInnerProblem):
        has_state = True

        def init(self, hyper, key):
            return jnp.zeros(()), jnp.zeros(())

        def loss(self, params, hyper, batch, state):
            return params**2, state

    problem = Counted()
    inner = mo.Descent(optax.sgd(0.1), 2, state_policy=mo.nn.FrozenState())
    adjoint = mo.UnrolledAdjoint()
    outer = lambda params, hyper, batch, state: params**2
    state = jnp.ones(())
    for call in (
        lambda: mo.solve_inner(
            problem, 1.0, solver=inner, adjoint=adjoint, model_state=state
        ),
        lambda: mo.diagnostics.check_smoothness(
            problem, 1.0, solver=inner, model_state=state
        ),
        lambda: mo.hypergradient(
            mo.BilevelProblem(problem, outer),
            1.0,
            inner=inner,
            adjoint=adjoint,
            model_state=state,
        ),
        lambda: mo.solve_bilevel(
            mo.BilevelProblem(problem, outer),
            1.0,
            solver=mo.NestedSolver(inner, adjoint, optax.sgd(0.1)),
            num_steps=1,
            model_state=state,
        ),
    ):
        with pytest.raises(ValueError, match="`model_state` was given without `params`"):
            call()


@pytest.mark.parametrize(
    ("loss", "note"),
    [
        (
            lambda p, h, b: jnp.sum(2 * h["rate"] * p),
            "`hyper` holds a `metaopt.hyper.Positive`, whose number is its `value`",
        ),
        (
            lambda p, h, b: jnp.mean((p @ b[0] - b[1]) ** 2),
            r"with a batch of shape \(10, 3\), \(10,\): all of its rows at once",
        ),
        (
            lambda p, h, b: jnp.sum(eqx.nn.Dropout(0.5)(p)),
            "is handed a key to draw random numbers with",
        ),
    ],
)
def test_errors_of_a_loss_have_a_note(loss, note):
    with pytest.raises((TypeError, RuntimeError)) as caught:
        mo.solve_inner(
            mo.InnerProblem(loss),
            {"rate": mo.hyper.Positive(0.1)},
            (jnp.ones((10, 3)), jnp.ones(10)),
            params=jnp.ones(3),
            solver=mo.Descent(optax.sgd(0.1), 3),
            adjoint=mo.UnrolledAdjoint(),
        )
    assert any(re.search(note, one) for one in caught.value.__notes__)


def test_a_writer_is_no_callback(tmp_path):
    writer: Any = mo.callbacks.CSV(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="a `CSV`, which is a writer of logs"):
        as_callbacks([writer])
    path: Any = "a.csv"
    with pytest.raises(ValueError, match=r"as `metaopt.callbacks.CSV\(path\)` has; got s"):
        mo.callbacks.Log(path)
    adam: Any = optax.adam
    with pytest.raises(ValueError, match="`outer` is the function `optax.adam` itself."):
        mo.NestedSolver(DESCENT, mo.UnrolledAdjoint(), adam)


def test_a_hypergradient_of_zero_says_what_that_means():
    dead = lambda params, hyper, batch: jnp.sum(jax.nn.relu(params * hyper - 9.0))
    solution = mo.solve_bilevel(
        mo.BilevelProblem(lambda p, h, b: jnp.sum((p - h) ** 2), dead),
        1.0,
        params=jnp.zeros(3),
        solver=mo.NestedSolver(DESCENT, mo.UnrolledAdjoint(), optax.adam(0.1)),
        num_steps=2,
    )
    sentence = "0 exactly: it leaves `hyper` where it is"
    assert sentence in str(solution) and sentence in str(solution.report)
