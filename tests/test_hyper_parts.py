"""Frozen hyperparameters, one for each leaf, projections, and how all print."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from metaopt.hyper import (
    Frozen,
    Integer,
    Interval,
    Ordered,
    PerLeaf,
    PiecewiseLinear,
    Positive,
    projected,
    replaced,
    Simplex,
    WarmupCosine,
)


KINDS: dict[str, Any] = {
    "positive": (Positive(0.3), 0.7),
    "positive array": (Positive(jnp.array([0.3, 4.0])), jnp.array([0.1, 2.0])),
    "interval": (Interval(0.3, low=-1, high=2), 1.5),
    "integer": (Integer(3, low=-2, high=4), 4),
    "simplex": (Simplex(jnp.array([0.2, 0.3, 0.5])), jnp.array([0.6, 0.3, 0.1])),
    "ordered": (Ordered(jnp.array([-1.0, 0.0, 3.0])), jnp.array([0.0, 0.5, 0.6])),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_another_value_of_the_same_kind(kind):
    hyper, value = KINDS[kind]
    other = hyper.with_value(value)
    assert jax.tree.structure(other) == jax.tree.structure(hyper)
    np.testing.assert_allclose(other.value, value, rtol=1e-6)
    np.testing.assert_allclose(hyper.with_value(hyper.value).raw, hyper.raw, atol=1e-6)


# Printing


@pytest.mark.parametrize(
    ("hyper", "text"),
    [
        (Positive(1e-3), "Positive(0.001)"),
        (Interval(0.25, 0, 1), "Interval(0.25, low=0.0, high=1.0)"),
        (Integer(3, 0, 8), "Integer(3, low=0, high=8)"),
        (Simplex(jnp.array([0.25, 0.75])), "Simplex([0.25, 0.75])"),
        (Ordered(jnp.array([1.0, 2.0])), "Ordered([1., 2.])"),
        (Positive(jnp.linspace(0.5, 2, 40)), "Positive(0.5 to 2, shape (40,))"),
        (Frozen(Positive(2.0)), "Frozen(Positive(2))"),
        (WarmupCosine(0.5, 9).peak, "Positive(0.5)"),
        (
            PiecewiseLinear(Positive(jnp.ones(2)), 9),
            "PiecewiseLinear(Positive([1., 1.]), num_steps=9)",
        ),
        (
            WarmupCosine(0.5, 9),
            "WarmupCosine(peak=Positive(0.5), warmup=Interval(0.1, low=0.0, high=1.0), "
            "end=Interval(0.1, low=0.0, high=1.0), num_steps=9)",
        ),
    ],
)
def test_values_are_printed(hyper, text):
    assert repr(hyper) == str(hyper) == text


def test_what_has_no_value_is_printed():
    seen = []
    jax.jit(lambda x: seen.append(repr(Positive(x))))(jnp.ones(()))
    assert seen[0].startswith("Positive(")
    shape = eqx.filter_eval_shape(lambda: Positive(1.0))
    assert "ShapeDtypeStruct" in repr(shape)


# Frozen


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_frozen_keeps_every_bit(dtype):
    numbers = jnp.asarray(np.random.default_rng(0).standard_normal(9), dtype)
    given = {"a": Positive(jnp.exp(numbers)), "b": [numbers, 1e-300]}
    frozen = Frozen(given)
    assert not jax.tree.leaves(eqx.filter(frozen, eqx.is_inexact_array))
    back = frozen.thawed
    assert jax.tree.structure(back) == jax.tree.structure(mo.hyper.thaw([frozen])[0])
    np.testing.assert_array_equal(back["a"].raw, given["a"].raw)
    np.testing.assert_array_equal(back["b"][0], numbers)
    assert back["b"][0].dtype == dtype and back["b"][1] == 1e-300
    np.testing.assert_array_equal(frozen.value["a"], given["a"].value)


def test_only_one_kind_is_frozen():
    hyper = {"n": Integer(1, 0, 3), "l2": Positive(1.0), "old": Frozen(Positive(2.0))}
    frozen = mo.hyper.freeze(hyper, Integer)
    assert isinstance(frozen["n"], Frozen) and isinstance(frozen["l2"], Positive)
    thawed = mo.hyper.thaw(frozen)
    assert isinstance(thawed["n"], Integer) and isinstance(thawed["old"], Positive)


def test_nothing_is_frozen_that_could_not_be_tuned():
    with pytest.raises(TypeError, match="integer or bool"):
        Frozen(3)
    with pytest.raises(ValueError, match="`kind` must be a class.*'rate'"):
        mo.hyper.freeze({"rate": Positive(1.0)}, "rate")  # pyright: ignore
    with pytest.raises(ValueError, match="NaN"):
        Frozen(jnp.array([jnp.nan]))


def inner_loss(params, hyper, batch):
    return 0.5 * (params - hyper["a"].value * hyper["b"].value) ** 2


QUADRATIC = mo.BilevelProblem(inner_loss, lambda params, hyper, batch: params**2)
ADJOINTS = {
    "unrolled": mo.UnrolledAdjoint(),
    "forward": mo.ForwardAdjoint(),
    "implicit": mo.ImplicitAdjoint(),
}


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_hypergradient_beside_a_frozen_part(adjoint):
    traces = 0

    def counting(params, hyper, batch):
        nonlocal traces
        traces += 1
        return inner_loss(params, hyper, batch)

    problem = mo.BilevelProblem(counting, lambda params, hyper, batch: params**2)
    seen = []
    for value in (3.0, 4.0):
        gradient, report = mo.hypergradient(
            problem,
            {"a": Positive(0.5), "b": Frozen(Positive(value))},
            params=jnp.asarray(0.0),
            inner=mo.Descent(optax.sgd(0.5), num_steps=60),
            adjoint=ADJOINTS[adjoint],
        )
        # F = (a b)^2, by the logarithm of a.
        np.testing.assert_allclose(gradient["a"].raw, 2 * (0.5 * value) ** 2, rtol=1e-6)
        assert report.outer.unreached == ()
        assert not jax.tree.leaves(eqx.filter(gradient["b"], eqx.is_inexact_array))
        seen.append(traces)
    assert seen[0] == seen[1]  # another value of it is no other program


def test_a_frozen_part_stays_in_a_run():
    hyper = {"a": Positive(2.0), "b": Frozen(Positive(3.0))}
    solution = mo.solve_bilevel(
        QUADRATIC,
        hyper,
        params=jnp.asarray(0.0),
        solver=mo.NestedSolver(
            mo.Descent(optax.sgd(0.5), num_steps=40),
            mo.ImplicitAdjoint(),
            optax.chain(optax.add_decayed_weights(0.5), optax.adam(0.1)),
        ),
        num_steps=5,
    )
    np.testing.assert_array_equal(solution.hyper["b"].value, hyper["b"].value)
    assert float(solution.hyper["a"].value) < 1.5


# Every kind under a learned response


def test_every_kind_is_tuned_by_self_tuning():
    """The model learns to return all values, and the outer loss is least at the goals."""
    hyper: dict[str, Any] = {
        "positive": Positive(1.0),
        "interval": Interval(0.3, -1.0, 2.0),
        "simplex": Simplex(jnp.full(3, 1 / 3)),
        "ordered": Ordered(jnp.array([-1.0, 0.0, 1.0])),
        "per leaf": PerLeaf(Positive(1.0), {"u": jnp.ones(1), "v": jnp.ones(1)}, "*"),
        "frozen": Frozen(Positive(0.5)),
    }
    goals = jnp.array([1.6, 0.9, 0.5, 0.3, 0.2, -0.6, 0.1, 1.4, 0.7, 1.4, 0.5])

    def flat(hyper):
        values = mo.hyper.values(hyper)
        values["per leaf"] = list(hyper["per leaf"].value.values())
        order = ["positive", "interval", "simplex", "ordered", "per leaf", "frozen"]
        return jnp.concatenate([jnp.ravel(x) for n in order for x in _list(values[n])])

    def _list(x):
        return x if isinstance(x, list) else [x]

    def predict(params, hyper, batch):
        return jax.vmap(params)(batch)

    def criterion(out, params, hyper, batch):
        return jnp.mean(jnp.sum((out - flat(hyper)) ** 2, axis=-1))

    def outer(params, hyper, batch):
        return jnp.mean(jnp.sum((predict(params, hyper, batch) - goals) ** 2, axis=-1))

    size = goals.size
    solution = mo.solve_bilevel(
        mo.BilevelProblem(mo.PredictionProblem(predict, criterion), outer),
        hyper,
        jnp.ones((16, 1)),
        jnp.ones((16, 1)),
        params=eqx.nn.Linear(1, size, key=jax.random.key(0)),
        solver=mo.SelfTuningSolver(
            optax.adam(0.03), optax.adam(0.02), initial_scale=0.2, warmup=20, num_rounds=4
        ),
        num_steps=220,
        steps_per_call=20,
        key=jax.random.key(1),
    )
    found = flat(solution.hyper)
    assert np.max(np.abs(flat(hyper) - goals)) > 0.5
    np.testing.assert_allclose(found, goals, atol=0.15)
    np.testing.assert_array_equal(solution.hyper["frozen"].value, 0.5)


# One for each leaf


MODEL = eqx.nn.MLP(2, 1, 3, 2, key=jax.random.key(0))


def test_a_pattern_names_the_weights():
    decay = PerLeaf(Positive(1e-3), MODEL, "*.weight")
    assert decay.names == ("layers.0.weight", "layers.1.weight", "layers.2.weight")
    assert len(jax.tree.leaves(decay)) == 3
    shared = PerLeaf(Positive(1e-3), MODEL, lambda name, x: x.ndim == 2, shared=True)
    assert shared.names == decay.names and len(jax.tree.leaves(shared)) == 1
    assert "layers.1.weight: Positive(0.001)" in repr(decay)
    assert "for all of layers.0.weight, layers.1.weight" in repr(shared)
    nested = {"a": [jnp.ones(2), {"b": jnp.ones(3)}], "c": 1.0}
    assert PerLeaf(jnp.ones(()), nested, "a.*").names == ("a.0", "a.1.b")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_hypergradient_of_one_decay_for_each_leaf(adjoint, shared):
    # Each leaf solves (1 + d) w = t, so that F = sum of (t / (1 + d))^2.
    targets = {"u": jnp.array([1.0, 2.0]), "v": jnp.array([3.0]), "bias": jnp.array([1.0])}

    def inner(params, hyper, batch):
        fit = sum(jnp.sum((params[n] - targets[n]) ** 2) for n in targets)
        return 0.5 * (fit + hyper.sum(lambda d, w: d * jnp.sum(w**2), params))

    def outer(params, hyper, batch):
        return sum(jnp.sum(w**2) for w in jax.tree.leaves(params))

    hyper = PerLeaf(Positive(0.5), targets, lambda name, x: name != "bias", shared=shared)
    gradient, _ = mo.hypergradient(
        mo.BilevelProblem(inner, outer),
        hyper,
        params=jax.tree.map(jnp.zeros_like, targets),
        inner=mo.Descent(optax.sgd(0.5), num_steps=60),
        adjoint=ADJOINTS[adjoint],
    )
    each = {n: -2 * jnp.sum(targets[n] ** 2) / 1.5**3 * 0.5 for n in ("u", "v")}
    found = [float(x.raw) for x in gradient.each]
    slopes = [float(slope) for slope in each.values()]
    expected = [sum(slopes)] if shared else slopes
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_updates_are_scaled_leaf_by_leaf():
    rates = PerLeaf(Positive(0.5), MODEL, "layers.1.*")
    ones = jax.tree.map(lambda x: jnp.ones_like(x) if eqx.is_array(x) else x, MODEL)
    scaled = rates.map(lambda rate, x: -rate * x, ones)
    np.testing.assert_allclose(scaled.layers[1].bias, -0.5, rtol=1e-6)
    np.testing.assert_array_equal(scaled.layers[0].bias, 1.0)


def test_a_rate_of_dropout_in_one_line():
    keys = jax.random.split(jax.random.key(0))
    model = eqx.nn.Sequential([eqx.nn.Linear(2, 2, key=keys[0]), eqx.nn.Dropout(0.1)])
    rate = Interval(0.25, 0.0, 0.9).value
    changed = replaced(model, "layers.*.p", rate)
    assert changed.layers[1].p is rate
    np.testing.assert_array_equal(changed.layers[0].weight, model.layers[0].weight)
    out = changed(jnp.ones(2), key=keys[1])
    assert out.shape == (2,)


WEIGHT = jnp.ones(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: PerLeaf(Positive(1.0), MODEL, "*.kernel"),
            "picks no leaf.*layers.0.w",
        ),
        (lambda: PerLeaf(Positive(1.0), MODEL, 3), "pattern such as"),  # pyright: ignore
        (lambda: replaced(MODEL, "nothing", 0.0), "picks no leaf"),
        (  # one value was for both, and the other for none
            lambda: PerLeaf(Positive(1.0), {"a.b": WEIGHT, "a": {"b": WEIGHT}}, "*"),
            "Two leaves of `model` have the name `a.b`",
        ),
        (
            lambda: PerLeaf(Positive(1.0), MODEL, "*.weight").sum(
                lambda d, w: d, {"other": jnp.ones(2)}
            ),
            "no leaf `layers.0.weight`",
        ),
    ],
)
def test_patterns_that_fit_nothing_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Projection


def test_projection_keeps_a_simplex():
    # Two of the three shares are zero at the optimum, which a softmax never reaches.
    costs = jnp.array([1.0, 0.2, 2.0], jnp.float32)
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: 0.5 * jnp.sum((params - hyper["mix"]) ** 2),
        lambda params, hyper, batch: jnp.sum(costs * params),
    )
    outer = projected(
        optax.sgd(0.1),
        lambda h: {"mix": optax.projections.projection_simplex(h["mix"]), "name": None},
    )
    seen = []
    solution = mo.solve_bilevel(
        problem,
        {"mix": jnp.full(3, 1 / 3, jnp.float32), "name": "mix"},
        params=jnp.zeros(3, jnp.float32),
        solver=mo.NestedSolver(
            mo.Descent(optax.sgd(0.5), num_steps=40), mo.ImplicitAdjoint(), outer
        ),
        num_steps=60,
        callbacks=[lambda run: seen.append(np.asarray(run.hyper["mix"]))],
    )
    assert len(seen) == 60
    np.testing.assert_allclose(np.sum(seen, axis=-1), 1.0, atol=1e-6)
    assert np.min(seen) > -1e-6
    np.testing.assert_allclose(solution.hyper["mix"], [0.0, 1.0, 0.0], atol=1e-6)


def test_projections_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="`outer`"):
        projected("adam", lambda h: h)  # pyright: ignore
    outer = projected(optax.sgd(0.1), lambda h: h["mix"])
    params = {"mix": jnp.ones(2)}
    with pytest.raises(ValueError, match="`projection` must return"):
        outer.update(params, outer.init(params), params)
    # A scalar was broadcast.
    outer = projected(optax.sgd(0.1), lambda h: {"mix": jnp.sum(h["mix"])})
    with pytest.raises(ValueError, match=r"of the shapes of `hyper`: \[\(2,\)\]; got"):
        outer.update(params, outer.init(params), params)
