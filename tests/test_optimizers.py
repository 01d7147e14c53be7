"""Every optimizer of optax as an inner solver, at gradients that are exactly zero: its
hypergradient is finite and right, or is refused because it says nothing."""

import functools as ft
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from metaopt._jaxpr._rewrite import finite_derivatives
from metaopt._solver._zero_gradients import with_usable_slopes


# Plain optax gives NaN for adam, adamw, nadam, radam, amsgrad, lamb and muon where a
# gradient entry is zero, and for a clipped norm where all are.
SMOOTH: dict[str, Any] = {
    "adabelief": optax.adabelief(0.1),
    "adadelta": optax.adadelta(0.5),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "adagrad": optax.adagrad(0.1),
    "adam": optax.adam(0.1),
    "adam, nesterov": optax.adam(0.1, nesterov=True),
    "adamax": optax.adamax(0.1),
    "adamaxw": optax.adamaxw(0.1, weight_decay=0.01),
    "adamw": optax.adamw(0.1, weight_decay=0.01),
    "adan": optax.adan(0.1),
    "adaptive_grad_clip": optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    "amsgrad": optax.amsgrad(0.1),
    "centralize": optax.chain(optax.centralize(), optax.sgd(0.1)),
    "clip": optax.chain(optax.clip(0.3), optax.sgd(0.1)),
    "clip_by_block_rms": optax.chain(optax.clip_by_block_rms(0.1), optax.sgd(0.1)),
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(0.3), optax.sgd(0.1)),
    "fromage": optax.fromage(0.1),
    "lamb": optax.lamb(0.1),
    "lars": optax.lars(0.1),
    "muon": optax.contrib.muon(0.1),
    "nadam": optax.nadam(0.1),
    "nadamw": optax.nadamw(0.1, weight_decay=0.01),
    "novograd": optax.novograd(0.1),
    "optimistic_gradient_descent": optax.optimistic_gradient_descent(0.1),
    "radam": optax.radam(0.1),
    "rmsprop": optax.rmsprop(0.1, centered=True, momentum=0.5),
    "schedule": optax.adam(optax.schedules.cosine_decay_schedule(0.1, 10)),
    "sgd": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "sm3": optax.sm3(0.1),
    "yogi": optax.yogi(0.1),
}
# Younger than the oldest version that is supported.
if "optimistic_adam_v2" in vars(optax):
    SMOOTH["optimistic_adam_v2"] = optax.optimistic_adam_v2(0.1)
BY_SIGN: dict[str, Any] = {
    "lion": optax.lion(0.1),
    "rprop": optax.rprop(0.1),
    "sign_sgd": optax.sign_sgd(0.1),
}
if "signum" in vars(optax):
    BY_SIGN["signum"] = optax.signum(0.1)
# Which entries of the gradient are not zero. A dead unit, a dead feature, or all of them.
ALIVE = {
    "entries": jnp.array([[1.0, 0.0, 0.5], [0.0, 0.0, 0.25], [0.75, 0.0, 1.0]]),
    "all": jnp.zeros((3, 3)),
}
START = jnp.array([[0.9, -0.4, 0.3], [0.5, 1.2, -0.7], [-0.3, 0.8, 0.6]])
QUICK = {"adam", "lamb", "muon", "clip_by_global_norm", "adafactor", "nadam", "schedule"}


def inner_loss(params, hyper, batch):
    # Not quadratic, so that second derivatives differ along the path.
    return jnp.sum(batch * jnp.log(jnp.cosh(params - hyper)))


def solution(hyper, alive, *, optimizer, adjoint):
    # The start depends on `hyper` as well, so that there is something to see where no
    # gradient is.
    return mo.solve_inner(
        mo.InnerProblem(inner_loss),
        hyper,
        alive,
        params=START * (1 + hyper),
        solver=mo.Descent(optimizer, 5),
        adjoint=adjoint,
    ).value


def value(hyper, alive, **kwargs):
    return jnp.sum(jnp.sin(solution(hyper, alive, **kwargs) + START))


@pytest.mark.one_of(2)
@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SMOOTH],
)
def test_hypergradient_is_finite_and_right(name):
    fn = ft.partial(value, optimizer=SMOOTH[name], adjoint=mo.UnrolledAdjoint())

    @jax.jit
    def both(hyper, alive):
        step = 1e-5
        ends = jax.vmap(lambda h: fn(h, alive))(hyper + jnp.array([-step, step]))
        return jax.grad(fn)(hyper, alive), (ends[1] - ends[0]) / (2 * step)

    for alive in ALIVE.values():
        gradient, difference = both(jnp.array(0.2), alive)
        # The truncation and the rounding of central differences.
        np.testing.assert_allclose(gradient, difference, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "name",
    [
        n if n in {"adam", "muon"} else pytest.param(n, marks=pytest.mark.slow)
        for n in SMOOTH
    ],
)
def test_steps_are_those_of_optax(name):
    optimizer, alive = SMOOTH[name], ALIVE["entries"]

    def step(carry, _):
        params, state = carry
        gradient = jax.grad(inner_loss)(params, jnp.array(0.2), alive)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = START * 1.2
    carry = start, optimizer.init(start)
    (want, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, 5))(carry)
    adjoint = mo.UnrolledAdjoint()
    got = solution(jnp.array(0.2), alive, optimizer=optimizer, adjoint=adjoint)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


def test_steps_with_settings_from_hyper_are_those_of_optax():
    # Elsewhere an optimizer whose settings are made variables drifts from the plain one.
    hyper = {"target": jnp.array(0.2), "rate": jnp.array(0.1), "b1": jnp.array(0.8)}
    value = lambda build: (
        mo.solve_inner(
            mo.InnerProblem(lambda p, h, batch: inner_loss(p, h["target"], batch)),
            hyper,
            ALIVE["entries"],
            params=START,
            solver=mo.Descent(build, 50),
            adjoint=mo.UnrolledAdjoint(),
        ).value
    )
    built = value(lambda h: optax.adam(h["rate"], b1=h["b1"]))
    plain = value(optax.adam(0.1, b1=0.8))
    np.testing.assert_allclose(built, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", BY_SIGN)
def test_updates_by_sign_are_refused(name):
    # Elsewhere: a hypergradient of exactly 0.
    problem = mo.BilevelProblem(inner_loss, lambda params, *_: jnp.sum(params**2))
    with pytest.raises(ValueError, match="zero by construction.*updates by sign"):
        mo.hypergradient(
            problem,
            0.2,
            ALIVE["entries"],
            params=START,
            inner=mo.Descent(BY_SIGN[name], 5),
            adjoint=mo.UnrolledAdjoint(),
        )


def test_every_optimizer_of_optax_is_in_a_table():
    skipped = {
        "dpsgd",  # needs gradients for each example
        "lbfgs",  # searches along a line, in a loop that reverse mode cannot pass
        "noisy_sgd",  # adds noise: sgd otherwise
        "polyak_sgd",  # takes the value of the loss: tested with others of its kind
        "optimistic_adam",  # deprecated
    }
    alias = importlib.import_module("optax._src.alias")
    known = {name.split(",")[0] for name in (*SMOOTH, *BY_SIGN)} | skipped
    optimizers = {
        name for name in vars(optax) if name in vars(alias) and not name.startswith("_")
    }
    optimizers = {n for n in optimizers if callable(vars(optax)[n]) and n.islower()}
    assert optimizers - known == set()


# -- slopes that are finite and say nothing: `1 / eps`, at a gradient that is zero
STEEP: dict[str, Any] = {
    "adam": optax.adam(0.01),
    "adamw": optax.adamw(0.01),
    "momentum": optax.rmsprop(0.01, momentum=0.9),
    "novograd": optax.novograd(0.01),
}


BRANCH = {"a": jnp.array([[0.5, -0.2], [0.3, 0.4], [-0.6, 0.1]]), "b": jnp.zeros(2)}


def branch_loss(params, hyper, batch):
    # A branch that is multiplied by a matrix of zeros at the start, as in LoRA.
    x = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
    out = jnp.tanh(x @ params["a"]) @ (params["b"] + hyper["start"])
    return jnp.mean((out - hyper["target"] * x.sum(1)) ** 2)


def branch(optimizer, **kwargs):
    hyper = {"start": jnp.zeros(2), "target": jnp.array(2.0)}
    return mo.hypergradient(
        mo.BilevelProblem(branch_loss, branch_loss),
        hyper | kwargs,
        params=BRANCH,
        inner=mo.Descent(optimizer, num_steps=3),
        adjoint=mo.UnrolledAdjoint(),
    )


@pytest.mark.one_of(2)
@pytest.mark.parametrize("name", STEEP)
def test_useless_slope_at_zero_gradient_is_left_out_and_counted(name):
    # The derivative of `start` was once 1e4 to 1e6 times the change of the loss.
    gradient, report = branch(STEEP[name])
    moved = jnp.array([0.03, 0.0])
    ends = [branch(STEEP[name], start=s)[1].outer.loss for s in (moved, -moved)]
    difference = float(ends[0] - ends[1]) / 0.06
    assert abs(gradient["start"][0] - difference) < abs(difference)
    # All six entries of `a`, at the first step.
    assert report.derivative.num_flat == 6
    assert "slope of the update at 6 entries" in str(report)


def test_slope_that_says_something_is_kept():
    # Steep, and right as far as a gradient reaches. Its own slope has a kink at zero.
    optimizer = optax.adam(0.01, eps=0.1)
    gradient, report = branch(optimizer)
    step = 1e-5 * jnp.array([1.0, 0.0])
    ends = [branch(optimizer, start=s)[1].outer.loss for s in (step, -step)]
    np.testing.assert_allclose(gradient["start"][0], (ends[0] - ends[1]) / 2e-5, rtol=1e-3)
    assert report.derivative.num_flat == 0 and "slope" not in str(report)
    assert branch(optax.sgd(0.1))[1].derivative.num_flat is None


def test_slope_of_a_gradient_that_has_not_always_been_zero_is_kept():
    # The second entry is zero in the second step, after a small one. Its slope is steep,
    # and right as far as that reaches.
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: params @ batch + hyper * params[1],
        lambda params, hyper, batch: params[1],
    )

    def run(hyper):
        return mo.hypergradient(
            problem,
            hyper,
            mo.BatchSequence(np.array([[1.0, 3e-3], [1.0, 0.0]])),
            params=jnp.zeros(2),
            inner=mo.Descent(optax.adam(0.1), num_steps=2),
            adjoint=mo.UnrolledAdjoint(),
        )

    gradient, report = run(0.0)
    ends = [run(hyper)[1].outer.loss for hyper in (1e-7, -1e-7)]
    np.testing.assert_allclose(gradient, (ends[0] - ends[1]) / 2e-7, rtol=1e-6)
    assert report.derivative.num_flat == 0


def test_gradient_that_is_zero_but_for_rounding():
    def loss(params, hyper, batch):
        # A bias before a normalisation, and a scale that needs the network.
        x = jnp.linspace(-1.0, 1.0, 8, dtype=jnp.float32)[:, None] * jnp.ones(3) * 0.7
        z = x * params["scale"] + params["bias"]
        z = (z - z.mean(0)) / jnp.sqrt(jnp.mean((z - z.mean(0)) ** 2, 0) + 0.5)
        return jnp.sum(jnp.mean((z * hyper - jnp.sin(3 * x)) ** 2, 0))

    params = {"bias": jnp.full(3, 0.3, jnp.float32), "scale": jnp.ones(3, jnp.float32)}
    gradients = jax.grad(loss)(params, jnp.float32(1), None)
    assert 0 < jnp.max(jnp.abs(gradients["bias"])) < 1e-6
    _, report = mo.hypergradient(
        mo.BilevelProblem(loss, loss),
        jnp.float32(1.0),
        params=params,
        inner=mo.Descent(optax.adam(0.01), num_steps=1),
        adjoint=mo.UnrolledAdjoint(),
    )
    assert report.derivative.num_flat is not None and report.derivative.num_flat > 0


def test_weight_decay_keeps_its_derivative_where_a_slope_is_left_out():
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: jnp.sum(params * jnp.array([1.0, 0.0])) + 0 * hyper,
        lambda params, hyper, batch: params[1],
    )
    inner = mo.Descent(lambda hyper: optax.adamw(0.1, weight_decay=hyper), num_steps=3)
    gradient, report = mo.hypergradient(
        problem, 0.5, params=jnp.full(2, 2.0), inner=inner, adjoint=mo.UnrolledAdjoint()
    )
    # The second entry is 2 (1 - 0.1 h)^3.
    np.testing.assert_allclose(gradient, -0.6 * 0.95**2, rtol=1e-12)
    assert report.derivative.num_flat == 3


def test_other_derivatives_are_the_same_to_the_last_bit():
    optimizer = optax.adam(0.1)
    gradient, start = jnp.array([0.3, -2.0, 1e-5]), jnp.ones(3)

    def after(update):
        def loss(gradient, steps=3):
            params, state = start, optimizer.init(start)
            for _ in range(steps):
                updates, state = update(jnp.sin(params) * gradient, state, params, None)[:2]
                params += updates
            return jnp.sum(jnp.sin(params))

        return jax.grad(loss)(gradient)

    plain = lambda g, state, params, value: optimizer.update(g, state, params)
    expected, got = after(finite_derivatives(plain)), after(with_usable_slopes(plain))
    np.testing.assert_array_equal(got, expected)


def test_few_shot_statistics_count_what_is_left_out():
    def loss(model, batch):
        return branch_loss(model, {"start": 0.0, "target": jnp.mean(batch)}, None)

    maml = mo.few_shot.MAML(loss, mo.Descent(optax.adam(0.01), num_steps=3))
    tasks = mo.few_shot.Task(jnp.array([[1.0], [2.0]]), jnp.array([[1.5], [0.5]]))
    _, _, stats = maml.value_and_grad(BRANCH, tasks)
    np.testing.assert_array_equal(stats.num_flat, [6, 6])
    assert "slope of the update at 12 entries" in str(stats)
    solution = mo.few_shot.train(
        maml, BRANCH, lambda key: tasks, outer=optax.sgd(0.1), num_steps=2
    )
    flat = solution.history.num_flat
    assert flat is not None and flat[0] == 12 and "left out" in str(solution)


def test_a_function_of_no_module_builds_an_optimizer():
    # What `exec` defines without a `__name__`, as some notebooks do.
    names: dict[str, Any] = {"optax": optax}
    exec("build = lambda hyper: optax.sgd(hyper)", names)
    solver = mo.Descent(names["build"], num_steps=3)
    assert solver.num_steps == 3
