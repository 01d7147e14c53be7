"""Few-shot learners against derivatives of loops written by hand."""

import dataclasses
import os
import re
import subprocess
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from metaopt.few_shot._stats import TaskGradient


Checkpoint = mo.callbacks.Checkpoint
few_shot: Any = mo.few_shot  # whose arguments are of the wrong type in some tests
NUM_TASKS, NUM_SHOTS = 4, 5


def squared_error(model, batch):
    x, y = batch
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def sinusoids(seed: int) -> Any:
    keys = jax.random.split(jax.random.key(seed), 3)
    amplitude = jax.random.uniform(keys[0], (NUM_TASKS, 1), minval=0.5, maxval=2.0)
    phase = jax.random.uniform(keys[1], (NUM_TASKS, 1), maxval=np.pi)
    x = jax.random.uniform(keys[2], (2, NUM_TASKS, NUM_SHOTS), minval=-2.0, maxval=2.0)
    y = amplitude * jnp.sin(x + phase)
    return few_shot.Task((x[0], y[0]), (x[1], y[1]))


TASKS = sinusoids(0)
MODEL = eqx.nn.MLP("scalar", "scalar", 6, 2, jnp.tanh, key=jax.random.key(0))
TRANSFORMS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.05, momentum=0.9),
    "adam": optax.adam(0.05),
}


def by_hand(
    model: Any,
    tasks: Any,
    transform: optax.GradientTransformation,
    num_steps: int,
    *,
    hold: Any = lambda g: g,
    weights: Any = None,
    adapts: Any = None,
) -> Any:
    """The mean query loss, by loops that nobody could mistake."""
    if adapts is None:
        adapting, rest = eqx.partition(model, eqx.is_inexact_array)
    else:
        nothing = jax.tree.map(lambda _: False, model)
        mark = lambda node: jax.tree.map(eqx.is_inexact_array, node)
        adapting, rest = eqx.partition(
            model, eqx.tree_at(adapts, nothing, mark(adapts(model)))
        )

    def loss(part, batch):
        return squared_error(eqx.combine(part, rest), batch)

    def one(task):
        part, state = adapting, transform.init(adapting)
        queries = []
        for _ in range(num_steps):
            gradient = hold(jax.grad(loss)(part, task.support))
            updates, state = transform.update(gradient, state, part)
            part = optax.apply_updates(part, updates)
            queries.append(loss(part, task.query))
        last = [0.0] * (num_steps - 1) + [1.0]
        return sum(w * q for w, q in zip(last if weights is None else weights, queries))

    return jnp.mean(jax.vmap(one)(tasks))


def assert_close(ours: Any, theirs: Any, rtol: float = 1e-10) -> None:
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.max(np.abs(b)) + 1e-15)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def cosine(a: Any, b: Any) -> float:
    a, b = flat(a), flat(b)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def maml(transform: Any = TRANSFORMS["sgd"], num_steps: int = 1, **settings: Any):
    inner = mo.Descent(transform, num_steps)
    return few_shot.MAML(squared_error, inner, **settings)


# The meta-gradient


_QUICK = {("sgd", 1), ("momentum", 3), ("adam", 5)}


@pytest.mark.one_of(3)
@pytest.mark.parametrize(
    "name, num_steps",
    [
        pytest.param(name, count, marks=[] if (name, count) in _QUICK else pytest.mark.slow)
        for name in TRANSFORMS
        for count in (1, 3, 5)
    ],
)
def test_gradients_are_those_of_the_loop(name, num_steps):
    transform = TRANSFORMS[name]
    expected = eqx.filter_jit(eqx.filter_value_and_grad(by_hand))(
        MODEL, TASKS, transform, num_steps
    )
    cuts = [None, 2, 1] if (name, num_steps) == ("momentum", 3) else [2]
    for chunk_size in cuts:
        learner = maml(transform, num_steps, chunk_size=chunk_size)
        value, gradient, stats = learner.value_and_grad(MODEL, TASKS)
        assert_close(value, expected[0])
        assert_close(gradient, expected[1])
        assert stats.losses.shape == (NUM_TASKS,) and stats.num_failed == 0
        np.testing.assert_allclose(jnp.mean(stats.losses), value, rtol=1e-12)
        assert stats.left_out == ()


@pytest.mark.parametrize("memory", [mo.memory.StoreAll(), mo.memory.RecomputeSteps()])
def test_every_memory_plan_gives_the_same(memory):
    expected = maml(num_steps=4).value_and_grad(MODEL, TASKS)[1]
    learner = maml(num_steps=4, adjoint=mo.UnrolledAdjoint(memory))
    assert_close(learner.value_and_grad(MODEL, TASKS)[1], expected)


def test_first_order_holds_the_inner_gradients_constant():
    expected = eqx.filter_jit(eqx.filter_grad(by_hand))(
        MODEL, TASKS, TRANSFORMS["sgd"], 3, hold=jax.lax.stop_gradient
    )
    learner = maml(num_steps=3, adjoint=mo.FirstOrderAdjoint())
    _, gradient, stats = learner.value_and_grad(MODEL, TASKS)
    assert_close(gradient, expected)
    assert stats.left_out == ("how the inner gradients change",)
    exact = maml(num_steps=3).value_and_grad(MODEL, TASKS)[1]
    # It leads the same way, roughly: .65 here.
    assert 0.5 < cosine(gradient, exact) < 0.9


@pytest.mark.parametrize("first_order", [False, True])
def test_a_part_of_the_model_adapts(first_order):
    adapts = lambda model: model.layers[-1]
    hold = jax.lax.stop_gradient if first_order else lambda g: g
    expected = eqx.filter_jit(eqx.filter_grad(by_hand))(
        MODEL, TASKS, TRANSFORMS["sgd"], 2, adapts=adapts, hold=hold
    )
    adjoint = mo.FirstOrderAdjoint() if first_order else mo.UnrolledAdjoint()
    learner = maml(num_steps=2, adapts=adapts, adjoint=adjoint)
    assert_close(learner.value_and_grad(MODEL, TASKS)[1], expected)
    task = jax.tree.map(lambda leaf: leaf[0], TASKS)
    adapted = learner.adapt(MODEL, task.support)
    assert_close(adapted.layers[0], MODEL.layers[0], 0.0)
    assert not np.allclose(adapted.layers[-1].weight, MODEL.layers[-1].weight)


@pytest.mark.one_of(2)
@pytest.mark.parametrize("first_order", [False, True])
def test_each_step_can_count(first_order):
    weights = np.array([0.2, 0.3, 0.5])
    hold = jax.lax.stop_gradient if first_order else lambda g: g
    expected = eqx.filter_jit(eqx.filter_value_and_grad(by_hand))(
        MODEL, TASKS, TRANSFORMS["momentum"], 3, weights=weights, hold=hold
    )
    adjoint = mo.FirstOrderAdjoint() if first_order else mo.UnrolledAdjoint()
    learner = maml(TRANSFORMS["momentum"], 3, step_weights=weights, adjoint=adjoint)
    value, gradient, _ = learner.value_and_grad(MODEL, TASKS)
    assert_close((value, gradient), expected)
    # All on the last step is as without.
    learner = maml(TRANSFORMS["momentum"], 3, step_weights=[0, 0, 1])
    plain = maml(TRANSFORMS["momentum"], 3)
    assert_close(*(a.value_and_grad(MODEL, TASKS)[:2] for a in (learner, plain)))


def test_learned_rates_and_their_derivative():
    meta = few_shot.with_learned_rates(MODEL, 0.1)
    inner = mo.Descent(few_shot.learned_rates, num_steps=2)
    learner = few_shot.MAML(squared_error, inner)
    value, gradient, _ = learner.value_and_grad(meta, TASKS)
    expected = maml(optax.sgd(0.1), 2).value_and_grad(MODEL, TASKS)
    assert_close((value, gradient.model), expected[:2])

    def moved(step):
        settings = jax.tree.map(lambda r, g: r + step * g, meta.settings, gradient.settings)
        return learner.value_and_grad(few_shot.Learned(MODEL, settings), TASKS)[0]

    slope = (moved(1e-4) - moved(-1e-4)) / 2e-4
    np.testing.assert_allclose(slope, np.sum(flat(gradient.settings) ** 2), rtol=1e-5)


def test_rates_for_each_step():
    meta = few_shot.with_learned_rates(MODEL, 0.1, num_steps=2, per_parameter=False)
    assert all(leaf.shape == (2,) for leaf in jax.tree.leaves(meta.settings))
    assert meta.settings.per_step
    later = jax.tree.map(lambda leaf: leaf.at[1].set(0.03), meta.settings)
    learner = few_shot.MAML(squared_error, mo.Descent(few_shot.learned_rates, 2))
    value = learner.value_and_grad(few_shot.Learned(MODEL, later), TASKS)[0]
    schedule = lambda count: jnp.where(count == 0, 0.1, 0.03)
    np.testing.assert_allclose(
        value, by_hand(MODEL, TASKS, optax.sgd(schedule), 2), rtol=1e-12
    )


def test_learned_curvature_begins_as_descent_and_is_learned():
    meta = few_shot.with_learned_curvature(MODEL, 0.1)
    inner = mo.Descent(few_shot.learned_curvature, num_steps=2)
    learner = few_shot.MAML(squared_error, inner)
    value, gradient, _ = learner.value_and_grad(meta, TASKS)
    expected = maml(optax.sgd(0.1), 2).value_and_grad(MODEL, TASKS)
    assert_close((value, gradient.model), expected[:2])
    # A matrix for each axis: of a gradient G of shape (6, 6), L G R.
    left, right = gradient.settings.arrays.layers[1].weight.matrices
    assert left.shape == right.shape == (6, 6) and np.all(np.isfinite(left))
    settings = jax.tree.map(lambda a: a, meta.settings)
    matrices = jax.random.normal(jax.random.key(3), (2, 6, 6))
    where = lambda s: s.arrays.layers[1].weight.matrices
    settings = eqx.tree_at(where, settings, tuple(matrices))
    transform = few_shot.learned_curvature(few_shot.Learned(MODEL, settings))
    params = eqx.filter(MODEL, eqx.is_inexact_array)
    updates, _ = transform.update(params, transform.init(params), params)
    weight = MODEL.layers[1].weight
    expected = -0.1 * matrices[0] @ weight @ matrices[1].T
    np.testing.assert_allclose(updates.layers[1].weight, expected, rtol=1e-12)


@pytest.mark.ci
def test_reptile_goes_where_adaptation_leads():
    learner = few_shot.Reptile(squared_error, mo.Descent(TRANSFORMS["adam"], 5))
    value, gradient, stats = learner.value_and_grad(MODEL, TASKS)
    adapted = [
        learner.adapt(MODEL, jax.tree.map(lambda leaf: leaf[i], TASKS.support))
        for i in range(NUM_TASKS)
    ]
    mean = jax.tree.map(lambda *a: sum(a) / NUM_TASKS, *map(arrays, adapted))
    assert_close(gradient, jax.tree.map(jnp.subtract, arrays(MODEL), mean))
    assert_close(value, by_hand(MODEL, TASKS, TRANSFORMS["adam"], 5))
    with pytest.raises(ValueError, match="`Reptile` has no derivative in settings"):
        learner.value_and_grad(few_shot.with_learned_rates(MODEL, 0.1), TASKS)


def arrays(model):
    return eqx.filter(model, eqx.is_inexact_array)


# Implicit MAML


def linear_task(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (2, NUM_TASKS, 8, 3))
    true = jax.random.normal(keys[1], (NUM_TASKS, 3))
    y = jnp.einsum("stni,ti->stn", x, true)
    return few_shot.Task((x[0], y[0]), (x[1], y[1]))


def test_implicit_maml_is_the_converged_one():
    model = eqx.nn.Linear(3, "scalar", key=jax.random.key(0))
    tasks, strength = linear_task(1), 2.0

    def solved(model):
        """The minimum of each task in closed form."""
        start = jnp.append(model.weight[0], model.bias)

        def one(support, query):
            (x, y), (xq, yq) = support, query
            x, xq = (jnp.c_[a, jnp.ones(len(a))] for a in (x, xq))
            matrix = 2 * x.T @ x / len(x) + strength * jnp.eye(4)
            found = jnp.linalg.solve(matrix, 2 * x.T @ y / len(x) + strength * start)
            return jnp.mean((xq @ found - yq) ** 2)

        return jnp.mean(jax.vmap(one)(tasks.support, tasks.query))

    expected = eqx.filter_value_and_grad(solved)(model)
    inner = mo.Descent(optax.sgd(0.2), num_steps=200)
    adjoint = mo.ImplicitAdjoint(mo.CG(rtol=1e-10))
    learner = few_shot.MAML(squared_error, inner, adjoint, proximal=strength)
    value, gradient, stats = learner.value_and_grad(model, tasks)
    assert_close((value, gradient), expected, 1e-8)
    assert stats.num_failed == 0
    # As exact as the linear solver: the control is wrong by per cents.
    rough = dataclasses.replace(adjoint, linear_solver=mo.CG(rtol=None, max_steps=1))
    learner = few_shot.MAML(squared_error, inner, rough, proximal=strength)
    off = flat(learner.value_and_grad(model, tasks)[1]) - flat(expected[1])
    assert np.linalg.norm(off) > 1e-3 * np.linalg.norm(flat(expected[1]))
    # Unrolled to the same minimum, in the same place.
    unrolled = few_shot.MAML(squared_error, inner, proximal=strength)
    assert_close(unrolled.value_and_grad(model, tasks)[1], expected[1], 1e-8)


def test_an_implicit_adjoint_without_proximal_term_is_refused():
    # Its gradient is zero by construction: the minimum does not know where it began.
    for adjoint in (mo.ImplicitAdjoint(), mo.OneStepAdjoint()):
        for none in (None, 0, 0.0):
            with pytest.raises(ValueError, match="zero by construction.*`proximal=2.0`"):
                maml(num_steps=5, adjoint=adjoint, proximal=none)


@pytest.mark.ci
def test_tasks_that_are_not_solved_are_counted():
    adjoint = mo.ImplicitAdjoint(mo.CG(rtol=1e-10))
    learner = maml(num_steps=1, adjoint=adjoint, proximal=2.0)
    with pytest.raises(mo.SolveError, match="Every task") as error:
        learner.value_and_grad(MODEL, TASKS)
    assert error.value.value[2].num_failed == NUM_TASKS


# Tasks that fail


@pytest.mark.one_of(2)
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("part", ["support", "query"])
def test_the_others_survive_a_task_that_diverges(part, chunk_size):
    # The square of these overflows, and they are finite themselves.
    x, y = getattr(TASKS, part)
    tasks = dataclasses.replace(TASKS, **{part: (x, y.at[2].set(1e200))})
    learner = maml(num_steps=2, chunk_size=chunk_size)
    value, gradient, stats = learner.value_and_grad(MODEL, tasks)
    assert stats.failed.tolist() == [False, False, True, False]
    assert stats.num_failed == 1
    keep = jnp.array([0, 1, 3])
    rest = jax.tree.map(lambda leaf: leaf[keep], TASKS)
    expected = maml(num_steps=2).value_and_grad(MODEL, rest)
    assert_close((value, gradient), expected[:2])


def test_without_guard_a_task_that_diverges_counts():
    x, y = TASKS.query
    tasks = dataclasses.replace(TASKS, query=(x, y.at[2].set(1e200)))
    value, gradient, stats = maml(num_steps=2).value_and_grad(MODEL, tasks, guard=False)
    assert np.isinf(value) and np.max(np.abs(flat(gradient))) > 1e190
    assert stats.failed.tolist() == [False, False, True, False]
    guarded, plain = (
        maml(num_steps=2).value_and_grad(MODEL, TASKS, guard=guard)
        for guard in (True, False)
    )
    assert_close(plain[:2], guarded[:2])
    with pytest.raises(ValueError, match="`guard` must be `True` or `False`"):
        maml(num_steps=2).value_and_grad(MODEL, TASKS, guard=1)  # pyright: ignore


def test_nothing_is_left_when_all_diverge():
    learner = maml(optax.sgd(1e200), 3)
    with pytest.raises(mo.SolveError, match="lower the inner learning rate"):
        learner.value_and_grad(MODEL, TASKS)
    value, gradient, stats = learner.value_and_grad(MODEL, TASKS, throw=False)
    assert np.isnan(value) and np.all(np.isnan(flat(gradient)))
    assert stats.num_failed == NUM_TASKS


# What a loss can declare


class Normalised(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear

    def __call__(self, x, state):
        x, state = self.norm(self.first(x[None]), state)
        return self.last(jnp.tanh(x))[0], state


def with_state(model, batch, *, state):
    x, y = batch
    mapped = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    predictions, state = mapped(x, state)
    return jnp.mean((predictions - y) ** 2), state


def normalised():
    keys = jax.random.split(jax.random.key(0))
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="ema")
    first, last = eqx.nn.Linear(1, 3, key=keys[0]), eqx.nn.Linear(3, 1, key=keys[1])
    return Normalised(first, norm, last), state


@pytest.mark.one_of(4)
@pytest.mark.parametrize("chunk_size", [pytest.param(None, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    "policy", [mo.nn.CarriedState(), mo.nn.FrozenState(), mo.nn.PerStepState()]
)
def test_model_state_is_a_choice(policy, chunk_size):
    model, state = normalised()
    inner = mo.Descent(optax.sgd(0.05), 2, state_policy=policy)
    learner = few_shot.MAML(with_state, inner, has_state=True, chunk_size=chunk_size)
    value, gradient, stats = learner.value_and_grad(model, TASKS, model_state=state)
    parts, rest = eqx.partition(model, eqx.is_inexact_array)

    def one(parts, task):
        now, start = parts, jax.tree.map(lambda a: a, state)
        carried, last = start, start
        for _ in range(2):
            seen = carried if isinstance(policy, mo.nn.CarriedState) else start
            seen = jax.tree.map(lambda a: a, seen)

            def loss(now):
                return with_state(eqx.combine(now, rest), task.support, state=seen)

            gradient, new = jax.grad(loss, has_aux=True)(now)
            carried = last = jax.tree.map(lambda a: a, new)
            now = jax.tree.map(lambda a, b: a - 0.05 * b, now, gradient)
        at_query = start if isinstance(policy, mo.nn.FrozenState) else last
        at_query = jax.tree.map(lambda a: a, at_query)
        return with_state(eqx.combine(now, rest), task.query, state=at_query)

    def mean(parts):
        values, states = jax.vmap(lambda task: one(parts, task))(TASKS)
        return jnp.mean(values), states

    (expected, states), slope = jax.jit(jax.value_and_grad(mean, has_aux=True))(parts)
    assert_close((value, gradient), (expected, slope), 1e-9)
    floats = eqx.filter(states, eqx.is_inexact_array)
    average = jax.tree.map(lambda a: jnp.mean(a, axis=0), floats)
    assert_close(eqx.filter(stats.model_state, eqx.is_inexact_array), average, 1e-9)


@pytest.mark.ci
@pytest.mark.one_of(3)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_states_of_each_step_outlast_the_tasks(chunk_size):
    # The running statistics here do not reach the results, but for what is kept of them.
    class Counted(eqx.Module):
        seen: jax.Array
        uses: jax.Array

    def loss(model, batch, *, state):
        new = Counted(0.5 * state.seen + jnp.mean(batch[1]), state.uses + 1)
        return squared_error(model, batch) + jnp.sum(0 * state.seen), new

    inner = mo.Descent(optax.sgd(0.05), 3, state_policy=mo.nn.PerStepState())
    settings = {"has_state": True, "chunk_size": chunk_size}
    means = [jnp.mean(part[1], axis=1) for part in (TASKS.support, TASKS.query)]
    slots = mo.extend.StepStates(Counted(jnp.zeros(()), jnp.zeros((), int)), num_steps=3)
    for learner in (
        few_shot.MAML(loss, inner, **settings),
        few_shot.Reptile(loss, inner, **settings),
    ):
        state = slots
        for uses in (1, 2):
            before = state.states
            state = learner.value_and_grad(MODEL, TASKS, model_state=state)[2].model_state
            after = 0.5 * before.seen + jnp.mean(means[0])
            # The query examples are seen after the last step, and with its state.
            after = after.at[-1].set(0.5 * after[-1] + jnp.mean(means[1]))
            np.testing.assert_allclose(state.states.seen, after, rtol=1e-12)
            # Counts are of one task, as those of `equinox.nn.BatchNorm` are.
            np.testing.assert_array_equal(state.states.uses, [uses, uses, 2 * uses])
        scores = few_shot.evaluate(
            learner,
            MODEL,
            TASKS,
            lambda model, batch, *, state: state.uses,
            num_steps=5,  # two more share the last slot
            model_state=state,
        )
        np.testing.assert_array_equal(scores.values, 4 + 3)


class Steps(eqx.Module):
    """A model state that counts, beside a mark of the slot that it lies in."""

    mark: jax.Array
    uses: jax.Array


def marked_loss(model, batch, *, state):
    value = squared_error(model, batch)
    return value * (1 + state.mark), Steps(state.mark, state.uses + 1)


def marked(num_slots):
    states = mo.extend.StepStates(Steps(jnp.zeros(()), jnp.zeros((), int)), num_slots)
    marks = jnp.arange(float(num_slots))
    return eqx.tree_at(lambda s: s.states.mark, states, marks)


def by_hand_with_marks(num_steps, weights):
    """Query losses after each step, with the mark of that step."""

    def one(support, query):
        now, total = arrays(MODEL), 0.0
        whole = lambda now: eqx.combine(now, eqx.partition(MODEL, eqx.is_array)[1])
        for step in range(num_steps):
            loss = lambda now: squared_error(whole(now), support) * (1 + step)
            now = jax.tree.map(lambda a, g: a - 0.05 * g, now, jax.grad(loss)(now))
            total += weights[step] * squared_error(whole(now), query) * (1 + step)
        return total

    return jnp.mean(jax.vmap(one)(TASKS.support, TASKS.query))


@pytest.mark.ci
@pytest.mark.one_of(6)
@pytest.mark.parametrize("num_slots", [3, 5])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_the_answer_is_judged_with_the_state_of_its_last_step(num_slots, weights):
    # Once it was that of the last slot, or of the step after.
    inner = mo.Descent(optax.sgd(0.05), 3, state_policy=mo.nn.PerStepState())
    learner = few_shot.MAML(marked_loss, inner, has_state=True, step_weights=weights)
    value, _, stats = learner.value_and_grad(MODEL, TASKS, model_state=marked(num_slots))
    expected = by_hand_with_marks(3, weights or [0.0, 0.0, 1.0])
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    uses = [1, 1, 2] + [0] * (num_slots - 3)
    np.testing.assert_array_equal(stats.model_state.states.uses, uses)
    for num_steps, mark in ((1, 0), (2, 1), (5, min(5, num_slots) - 1)):
        metric = lambda model, batch, *, state: state.mark
        scores = few_shot.evaluate(
            learner,
            MODEL,
            TASKS,
            metric,
            num_steps=num_steps,
            model_state=marked(num_slots),
        )
        np.testing.assert_array_equal(scores.values, mark)
        adapted, state = learner.adapt(
            MODEL,
            jax.tree.map(lambda a: a[0], TASKS.support),
            num_steps=num_steps,
            model_state=marked(num_slots),
        )
        assert state.mark == mark


def test_training_with_running_statistics():
    # Of a statistic that was a constant of the trace nothing was left once.
    model, state = normalised()
    inner = mo.Descent(optax.sgd(0.05), 1, state_policy=mo.nn.CarriedState())
    learner = few_shot.MAML(with_state, inner, has_state=True)
    solution = few_shot.train(
        learner,
        model,
        lambda key: TASKS,
        outer=optax.adam(1e-2),
        num_steps=3,
        model_state=state,
    )
    same = jax.tree.structure(solution.model_state) == jax.tree.structure(state)
    assert same and len(jax.tree.leaves(state)) > 0
    before, after = (
        flat(eqx.filter(s, eqx.is_inexact_array)) for s in (state, solution.model_state)
    )
    assert np.all(np.isfinite(after)) and not np.allclose(before, after)


def test_what_is_constant_is_handed_back():
    def loss(model, batch, *, state):
        aux = {"number": jnp.asarray(3), "flag": jnp.asarray(True)}
        return squared_error(model, batch), {"seen": jnp.asarray(2.0)}, aux

    inner = mo.Descent(optax.sgd(0.05), 1, state_policy=mo.nn.CarriedState())
    learner = few_shot.MAML(loss, inner, has_state=True, has_aux=True)
    start = {"seen": jnp.asarray(1.0)}
    stats = learner.value_and_grad(MODEL, TASKS, model_state=start)[2]
    assert stats.aux["number"].tolist() == [3] * NUM_TASKS
    assert stats.aux["flag"].tolist() == [True] * NUM_TASKS
    assert float(stats.model_state["seen"]) == 2


@pytest.mark.parametrize("chunk_size", [1, 16, None])
def test_half_precision_sums_over_many_tasks(chunk_size):
    x = jnp.full((512, 3), 0.8, jnp.bfloat16)
    loss = lambda model, batch: jnp.mean((model * batch) ** 2)
    inner = mo.Descent(optax.sgd(0.0), 1)
    learner = few_shot.MAML(loss, inner, chunk_size=chunk_size)
    one = jnp.ones((), jnp.bfloat16)
    value, gradient, stats = learner.value_and_grad(one, few_shot.Task(x, x))
    assert stats.num_failed == 0 and gradient.dtype == jnp.bfloat16
    # 0.64 and 1.28, to the three digits that each of the tasks has.
    np.testing.assert_allclose(float(value), 0.64, rtol=5e-3)
    np.testing.assert_allclose(float(gradient), 1.28, rtol=5e-3)


def test_training_and_testing_agree_on_what_failed():
    for learner in (
        few_shot.MAML(squared_error, mo.Descent(optax.sgd(0.01), 2, atol=1e-9)),
        few_shot.Reptile(squared_error, mo.Descent(optax.sgd(0.01), 2, atol=1e-9)),
    ):
        stats = learner.value_and_grad(MODEL, TASKS, throw=False)[2]
        scores = few_shot.evaluate(learner, MODEL, TASKS, squared_error)
        assert stats.num_failed == scores.num_failed == NUM_TASKS
        assert "4 of 4 did not succeed. The inner solver reached its step limit" in str(
            stats
        )
        with pytest.raises(mo.SolveError, match="reached its step limit"):
            learner.value_and_grad(MODEL, TASKS)


def test_tasks_that_a_function_draws_are_evaluated():
    draw = lambda key: EPISODES(key)
    settings = {"num_tasks": 6, "key": jax.random.key(1)}
    scores = few_shot.evaluate(LEARNER, CLASSIFIER, draw, cross_entropy, **settings)
    assert scores.values.shape == (6,) and len(set(scores.values.tolist())) == 6
    again = few_shot.evaluate(LEARNER, CLASSIFIER, draw, cross_entropy, **settings)
    np.testing.assert_array_equal(scores.values, again.values)


def test_states_of_each_step_under_another_policy():
    model, state = normalised()
    inner = mo.Descent(optax.sgd(0.05), 2, state_policy=mo.nn.CarriedState())
    learner = few_shot.MAML(with_state, inner, has_state=True)
    with pytest.raises(ValueError, match="PerStepState"):
        learner.value_and_grad(model, TASKS, model_state=mo.extend.StepStates(state, 2))


def test_model_state_without_a_choice_is_refused():
    model, state = normalised()
    inner = mo.Descent(optax.sgd(0.1), 2)
    for learner in (few_shot.MAML, few_shot.Reptile):
        for settings in ({}, {"step_weights": [1.0, 1.0]}):
            if learner is few_shot.MAML or not settings:
                with pytest.raises(ValueError, match="state_policy"):
                    learner(with_state, inner, has_state=True, **settings)
    kept = mo.Descent(optax.sgd(0.1), 2, state_policy=mo.nn.CarriedState())
    with pytest.raises(ValueError, match="declares no model state"):
        few_shot.MAML(squared_error, kept, step_weights=[1.0, 1.0])
    with pytest.raises(ValueError, match="hand over where it begins"):
        few_shot.MAML(with_state, kept, has_state=True).value_and_grad(model, TASKS)
    del state


@pytest.mark.ci
def test_model_state_and_each_step_counting():
    model, state = normalised()
    inner = mo.Descent(optax.sgd(0.05), 2, state_policy=mo.nn.CarriedState())
    settings = {"has_state": True, "step_weights": [0.0, 1.0]}
    learner = few_shot.MAML(with_state, inner, **settings)
    plain = few_shot.MAML(with_state, inner, has_state=True)
    a, b = (m.value_and_grad(model, TASKS, model_state=state) for m in (learner, plain))
    assert_close(a[:2], b[:2])
    assert_close(*(eqx.filter(s[2].model_state, eqx.is_inexact_array) for s in (a, b)))


def test_auxiliary_output_is_stacked_by_task():
    def loss(model, batch):
        predictions = jax.vmap(model)(batch[0])
        return jnp.mean((predictions - batch[1]) ** 2), {"largest": jnp.max(predictions)}

    learner = few_shot.MAML(loss, mo.Descent(optax.sgd(0.1), 1), has_aux=True)
    stats = learner.value_and_grad(MODEL, TASKS)[2]
    assert stats.aux["largest"].shape == (NUM_TASKS,)


def test_tasks_have_keys_of_their_own():
    def loss(model, batch, *, key):
        return squared_error(model, batch) + jax.random.normal(key)

    learner = few_shot.MAML(loss, mo.Descent(optax.sgd(0.1), 1))
    same = jax.tree.map(lambda leaf: jnp.stack(NUM_TASKS * [leaf[0]]), TASKS)
    losses = learner.value_and_grad(MODEL, same)[2].losses
    assert len(set(losses.tolist())) == NUM_TASKS
    again = learner.value_and_grad(MODEL, same, key=jax.random.key(0))[2].losses
    np.testing.assert_array_equal(losses, again)
    other = learner.value_and_grad(MODEL, same, key=jax.random.key(1))[2].losses
    assert not np.any(losses == other)


def test_tasks_are_drawn_with_other_keys_than_they_are_scored_with():
    # A task is drawn with the second half of the key that it is given, and so is a score.
    half = lambda key: jax.random.uniform(jax.random.split(key)[1])

    def draw(key):
        one = jax.tree.map(lambda leaf: leaf[:1], TASKS)
        return few_shot.Task(one.support, (jnp.full((1, NUM_SHOTS), half(key)),))

    def metric(model, batch, *, key):
        return jnp.abs(batch[0][0] - jax.random.uniform(key))

    scores = few_shot.evaluate(
        few_shot.MAML(squared_error, mo.Descent(optax.sgd(0.1), 1)),
        *(MODEL, draw, metric),
        num_tasks=6,
    )
    assert np.all(scores.values > 0)


class _KeyDistance(few_shot.AbstractLearner):
    """Its loss is the distance of the key of a task from what the task holds."""

    model_loss: Any
    inner: Any
    chunk_size: int | None = None

    def adaptation(self, model_state):
        raise NotImplementedError

    def task_gradient(self, meta, task, key, model_state):
        drawn = jax.random.uniform(key)
        return TaskGradient(
            loss=jnp.abs(drawn - task.query[0][0]),
            gradient=jax.tree.map(jnp.zeros_like, eqx.filter(meta, eqx.is_inexact_array)),
            aux=None,
            state=None,
            result=mo.RESULTS.successful,  # pyright: ignore[reportArgumentType]
            left_out=(),
        )


def test_tasks_are_drawn_with_other_keys_than_they_are_adapted_with():
    def draw(key):
        # As the learner and `Episodes` make keys of one.
        held = jax.vmap(jax.random.uniform)(jax.random.split(key, NUM_TASKS))
        query = jnp.broadcast_to(held[:, None], (NUM_TASKS, NUM_SHOTS))
        return few_shot.Task(TASKS.support, (query,))

    learner = few_shot.MAML(squared_error, mo.Descent(optax.sgd(0.1), 1))
    distance = _KeyDistance(learner.model_loss, learner.inner)
    solution = few_shot.train(distance, MODEL, draw, outer=optax.sgd(0.1), num_steps=3)
    assert np.all(solution.history.outer_loss > 0)


# Compilation, devices


def test_it_compiles_once():
    learner, count = maml(chunk_size=2), 0

    def loss(model, batch):
        nonlocal count
        count += 1
        return squared_error(model, batch)

    learner = few_shot.MAML(loss, learner.inner)
    learner.value_and_grad(MODEL, TASKS)
    traced = count
    learner.value_and_grad(jax.tree.map(lambda a: a, MODEL), sinusoids(1))
    assert count == traced


def test_inside_jit_and_grad_free_of_surprises():
    learner = maml(num_steps=2)
    outside = learner.value_and_grad(MODEL, TASKS)[:2]
    inside = eqx.filter_jit(lambda m, t: learner.value_and_grad(m, t)[:2])(MODEL, TASKS)
    assert_close(inside, outside, 1e-12)


# Adapting, measuring, training


def test_adapting_takes_the_steps_it_is_told():
    learner = maml(num_steps=1)
    task = jax.tree.map(lambda leaf: leaf[0], TASKS)
    now = MODEL
    for count in range(4):
        adapted = learner.adapt(MODEL, task.support, num_steps=count)
        assert_close(arrays(adapted), arrays(now), 1e-12)
        gradient = eqx.filter_grad(squared_error)(now, task.support)
        now = eqx.apply_updates(now, jax.tree.map(lambda g: -0.1 * g, gradient))
    assert_close(
        arrays(learner.adapt(MODEL, task.support)),
        arrays(learner.adapt(MODEL, task.support, num_steps=1)),
        0.0,
    )


def test_scores_and_their_interval():
    learner = maml(num_steps=2)
    scores = few_shot.evaluate(learner, MODEL, TASKS, squared_error, chunk_size=3)
    losses = learner.value_and_grad(MODEL, TASKS)[2].losses
    np.testing.assert_allclose(scores.values, losses, rtol=1e-10)
    np.testing.assert_allclose(scores.mean, np.mean(losses), rtol=1e-10)
    error = np.std(losses, ddof=1) / NUM_TASKS**0.5
    np.testing.assert_allclose(scores.interval, 1.96 * error, rtol=1e-10)
    assert str(scores).endswith(f"on {NUM_TASKS} tasks")
    x, y = TASKS.support
    tasks = dataclasses.replace(TASKS, support=(x, y.at[0].set(1e200)))
    scores = few_shot.evaluate(learner, MODEL, tasks, squared_error)
    assert scores.num_failed == 1 and "1 failed and are left out" in str(scores)
    np.testing.assert_allclose(scores.mean, np.mean(losses[1:]), rtol=1e-10)


def digits_by_class():
    data = mo.datasets.load_digits()
    return mo.datasets.ClassData.from_labels(data.x, data.y, "digits")


def cross_entropy(model, batch):
    logits = jax.vmap(model)(batch[0])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))


ON_HOST = few_shot.HostEpisodes(digits_by_class(), 3, 1, 2, num_tasks=4)
EPISODES = few_shot.Episodes(digits_by_class(), 3, 1, 2, num_tasks=4)
LEARNER = few_shot.MAML(cross_entropy, mo.Descent(optax.sgd(0.5), 1))
CLASSIFIER = eqx.nn.MLP(64, 3, 8, 1, key=jax.random.key(0))


def trained(**settings: Any):
    settings = {
        "outer": optax.adam(1e-2),
        "num_steps": 6,
        "steps_per_call": 3,
    } | settings
    tasks = settings.pop("tasks", EPISODES)
    return few_shot.train(LEARNER, CLASSIFIER, tasks, **settings)


def test_training_is_the_same_however_it_is_cut(tmp_path):
    whole = trained()
    assert whole.history.outer_loss.shape == whole.history.num_failed.shape == (6,)
    assert int(whole.state.num_steps) == 6
    # In calls of another length: the same numbers but for rounding.
    assert_close(arrays(trained(steps_per_call=2).meta), arrays(whole.meta), 1e-9)
    # Stopped and taken up again, by state and by file: bit for bit.
    half = trained(num_steps=3)
    assert_same(trained(state=half.state).state, whole.state)
    path = tmp_path / "folder" / "run.npz"
    trained(num_steps=3, callbacks=[Checkpoint(path)])
    again = trained(callbacks=[Checkpoint(path)])
    assert_same(again.state, whole.state)
    np.testing.assert_array_equal(again.history.outer_loss, whole.history.outer_loss)
    # Nothing is left to do.
    done = trained(callbacks=[Checkpoint(path)])
    assert_same(done.state, whole.state)
    assert len(done.history) == 6


def test_callbacks_receive_the_solution():
    class End(mo.callbacks.AbstractCallback):
        def evaluate(self, run):
            raise AssertionError("nothing is evaluated after learning over tasks")

        def end(self, run, solution):
            self.solution = solution

    end = End()
    solution = trained(num_steps=3, callbacks=[end])
    assert end.solution is solution and len(solution.history) == 3


def assert_same(a, b):
    as_numpy = lambda x: (
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    )
    a, b = (jax.tree.leaves(eqx.filter(x, eqx.is_array)) for x in (a, b))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(as_numpy(x), as_numpy(y))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "run.npz"
    trained(num_steps=3, callbacks=[Checkpoint(path)])
    other = eqx.nn.MLP(64, 3, 9, 1, key=jax.random.key(0))
    with pytest.raises(mo.CheckpointError, match=r"`hyper.layers\[0\]\.\w+` was"):
        few_shot.train(
            LEARNER,
            other,
            EPISODES,
            outer=optax.adam(1e-2),
            num_steps=6,
            callbacks=[Checkpoint(path)],
        )


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.npz"
    whole = trained(callbacks=[Checkpoint(path)], key=jax.random.key(3))
    with pytest.raises(mo.CheckpointError, match="another `key`"):
        trained(callbacks=[Checkpoint(path)])
    with pytest.raises(mo.CheckpointError, match="has 6 steps, and `num_steps` is 5"):
        trained(callbacks=[Checkpoint(path)], key=jax.random.key(3), num_steps=5)
    with pytest.raises(ValueError, match="Both `state` and the checkpoint"):
        trained(callbacks=[Checkpoint(path)], state=whole.state)


def test_a_checkpoint_that_cannot_be_written_is_seen_before_the_first_step(tmp_path):
    # It once was at the first save, after hundreds of steps.
    def tasks(key):
        raise RuntimeError("The first step was begun.")

    (tmp_path / "file").write_bytes(b"content")
    message = r"The checkpoint .*run.npz cannot be written: .*file.* Name a file in"
    for path in (tmp_path / "file" / "run.npz", tmp_path / "file" / "deep" / "run.npz"):
        with pytest.raises(ValueError, match=message):
            trained(tasks=tasks, callbacks=[Checkpoint(path)])
        with pytest.raises(ValueError, match=message):
            trained(
                tasks=tasks,
                callbacks=[Checkpoint(str(path))],
                state=trained(num_steps=1).state,
            )
    # A folder that is not there is no mistake, and nothing is left in it.
    with pytest.raises(RuntimeError, match="was begun"):
        trained(
            tasks=tasks,
            callbacks=[Checkpoint(tmp_path / "a" / "b" / "run.npz")],
        )
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_checkpoint_in_a_folder_that_is_read_only(tmp_path):
    path = tmp_path / "folder" / "run.npz"
    whole = trained(num_steps=3, callbacks=[Checkpoint(path)])
    try:
        path.parent.chmod(0o555)
        for other in (path, path.parent / "other.npz", path.parent / "deep" / "run.npz"):
            with pytest.raises(ValueError, match="cannot be written: .*Permission denied"):
                trained(callbacks=[Checkpoint(other)])
        # Of a run that has ended nothing needs to be written.
        assert_same(
            trained(num_steps=3, callbacks=[Checkpoint(path)]).state,
            whole.state,
        )
        path.parent.chmod(0o000)
        with pytest.raises(ValueError, match="cannot be written: .*Permission denied"):
            trained(callbacks=[Checkpoint(path)])
    finally:
        path.parent.chmod(0o755)
    assert [p.name for p in path.parent.iterdir()] == ["run.npz"]


def test_a_run_that_failed_fails_again(tmp_path):
    # The step that failed was once in the file, as one that was taken.
    def tasks(key):
        bad = jax.random.bernoulli(key, 0.1)
        task = EPISODES(key)
        return eqx.tree_at(lambda t: t.query[0], task, task.query[0] / (1 - bad))

    opened, reached = [], []

    class Peek(mo.callbacks.AbstractCallback):
        def open(self, run):
            opened.append(run.num_steps)

    settings = {"tasks": tasks, "num_steps": 40, "steps_per_call": 1}
    for _ in range(2):
        watching = Checkpoint(tmp_path / "run.npz"), Peek()
        with pytest.raises(mo.SolveError, match="Every task") as caught:
            trained(callbacks=watching, **settings)
        assert "not finite" in str(caught.value) or "NaN" in str(caught.value)
        reached.append(int(caught.value.value.state.num_steps))
    assert opened == [0, reached[0]]
    assert 0 < reached[0] == reached[1] < 40


def test_a_run_that_is_interrupted_keeps_what_it_reached(tmp_path):
    def stop(run):
        raise KeyboardInterrupt

    path = tmp_path / "run.npz"
    solution = trained(callbacks=[stop, Checkpoint(path)])
    assert solution.result == mo.RESULTS.interrupted
    assert int(solution.state.num_steps) == len(solution.history.outer_loss) == 3
    assert_same(trained(callbacks=[Checkpoint(path)]).state, trained().state)
    text = str(solution)
    assert re.search(r"meta-steps +3\n", text) and "ended by  " in text
    assert "an interrupt\n" in text and "interrupted" in text
    assert "6, 3 of them now" in str(trained(state=solution.state))


def test_callback_ends_the_run_or_loses_nothing(tmp_path):
    solution = trained(callbacks=[lambda run: True])
    assert solution.result == mo.RESULTS.successful and len(solution.history) == 3

    def stop(run):
        raise StopIteration

    assert len(trained(callbacks=[stop]).history.outer_loss) == 3

    def fail(run):
        raise KeyError("mine")

    path = tmp_path / "run.npz"
    with pytest.raises(KeyError, match="mine") as info:
        trained(callbacks=[fail, Checkpoint(path)])
    error: Any = info.value
    assert len(error.solution.history.outer_loss) == 3
    assert_same(trained(callbacks=[Checkpoint(path)]).state, trained().state)


def test_training_on_what_the_host_draws():
    whole = trained(tasks=iter(ON_HOST))
    half = trained(tasks=ON_HOST, num_steps=3)
    for tasks in (ON_HOST, ON_HOST.starting_at(3)):
        assert_same(trained(tasks=tasks, state=half.state).state, whole.state)
    # What was pulled is not lost when nothing more comes.
    few = iter([ON_HOST.batch(index) for index in range(5)])
    with pytest.raises(mo.SolveError, match="iterator.*`tasks`.*ended") as caught:
        trained(tasks=few)
    assert int(caught.value.value.state.num_steps) == 5
    np.testing.assert_allclose(
        caught.value.value.history.outer_loss, whole.history.outer_loss[:5], rtol=1e-9
    )


@pytest.mark.slow
def test_training_on_what_a_function_draws():
    task, weights = EPISODES(jax.random.key(3)), []

    def drawn(key):
        weights.append(key)
        return task

    one = trained(tasks=drawn, steps_per_call=6)
    assert len(weights) <= 2  # inside the compiled loop
    other = trained(tasks=iter([task] * 6))
    # The learner takes no randomness here, so that nothing else differs.
    assert_close(arrays(one.meta), arrays(other.meta), 1e-9)


@pytest.mark.slow
def test_first_order_steps_can_come_first():
    # Derivative-order annealing: one run, taken up again by another learner.
    first = few_shot.MAML(
        cross_entropy, mo.Descent(optax.sgd(0.5), 1), mo.FirstOrderAdjoint()
    )
    settings = {"outer": optax.adam(1e-2), "steps_per_call": 3}
    begun = few_shot.train(first, CLASSIFIER, EPISODES, num_steps=3, **settings)
    annealed = trained(state=begun.state)
    assert int(annealed.state.num_steps) == 6
    assert_same(annealed.state.outer_state[0].count, jnp.asarray(6))
    whole = few_shot.train(first, CLASSIFIER, EPISODES, num_steps=6, **settings)
    for other in (whole, trained()):
        assert not np.allclose(flat(arrays(other.meta)), flat(arrays(annealed.meta)))


def test_a_step_without_any_task_is_not_taken():
    learner = few_shot.MAML(cross_entropy, mo.Descent(optax.sgd(1e200), 3))
    settings = {"outer": optax.adam(1e-2), "num_steps": 2}
    with pytest.raises(mo.SolveError, match="Every task"):
        few_shot.train(learner, CLASSIFIER, EPISODES, **settings)
    solution = few_shot.train(learner, CLASSIFIER, EPISODES, throw=False, **settings)
    assert_same(solution.meta, CLASSIFIER)
    assert solution.result == mo.RESULTS.all_tasks_failed
    assert solution.history.num_failed.tolist() == [4, 4]


def test_learning_lowers_the_loss_on_new_tasks():
    solution = trained(num_steps=150, steps_per_call=50)
    before, after = (
        few_shot.evaluate(
            LEARNER, meta, EPISODES, cross_entropy, num_tasks=40, key=jax.random.key(5)
        ).mean
        for meta in (CLASSIFIER, solution.meta)
    )
    assert after < before - 0.1


def test_a_model_that_diverged_is_not_handed_over():
    # It was once, full of NaN, without a word.
    learner, (x, y) = maml(optax.sgd(1e200), 3), TASKS.support
    with pytest.raises(mo.SolveError, match="infinite or NaN.*lower the learning rate"):
        learner.adapt(MODEL, (x[0], y[0]))
    adapted = learner.adapt(MODEL, (x[0], y[0]), throw=False)
    assert not np.all(np.isfinite(flat(arrays(adapted))))


@pytest.mark.slow
def test_rates_cannot_be_read_in_another_way():
    # Six steps and a width of six once broadcast to rates for each parameter.
    meta = few_shot.with_learned_rates(MODEL, 0.1, num_steps=6, per_parameter=False)
    schedule = jnp.linspace(0.0, 0.1, 6)
    settings = jax.tree.map(lambda leaf: schedule, meta.settings)
    learner = few_shot.MAML(squared_error, mo.Descent(few_shot.learned_rates, 6))
    value = learner.value_and_grad(few_shot.Learned(MODEL, settings), TASKS)[0]
    transform = optax.sgd(lambda count: schedule[count])
    np.testing.assert_allclose(value, by_hand(MODEL, TASKS, transform, 6), rtol=1e-12)


# What is refused


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: maml(chunk_size=3).value_and_grad(MODEL, TASKS), "`chunk_size`, 3, does"),
        (lambda: maml(chunk_size=0), "`chunk_size` must be at least 1"),
        (lambda: few_shot.MAML(1, mo.Descent(optax.sgd(0.1), 1)), "`loss` must be a"),
        (lambda: few_shot.MAML(squared_error, optax.sgd(0.1)), "`inner` must be some"),
        (lambda: maml(adjoint=mo.UnrolledAdjoint), "`adjoint` is the class"),
        (lambda: maml(num_steps=2, step_weights=[1.0]), "one entry for each of the 2"),
        # Its gradient was once three hundred times too small.
        (
            lambda: maml(step_weights=[1.0], adjoint=mo.ImplicitAdjoint(), proximal=2.0),
            "`ImplicitAdjoint` does not see what the query loss was",
        ),
        # Weights of steps that were not taken were once left out.
        (
            lambda: few_shot.MAML(
                squared_error,
                mo.Descent(optax.sgd(0.1), 2, atol=0.1),
                step_weights=[0.5, 0.5],
            ),
            "`step_weights` need a fixed number of steps",
        ),
        (lambda: maml(proximal=-1.0), "`proximal` must be a non-negative"),
        (
            lambda: maml(few_shot.learned_rates).value_and_grad(MODEL, TASKS),
            "Start from `metaopt.few_shot.with_learned_rates",
        ),
        (
            lambda: maml(few_shot.learned_curvature).value_and_grad(
                few_shot.with_learned_rates(MODEL, 0.1), TASKS
            ),
            "Start from `metaopt.few_shot.with_learned_curvature",
        ),
        (lambda: few_shot.Reptile(1, mo.Descent(optax.sgd(0.1), 1)), "`loss` must be a"),
        (lambda: maml().value_and_grad(MODEL, 3), "`tasks` must be a `metaopt.few_shot.T"),
        (
            lambda: maml().value_and_grad(
                MODEL, (TASKS.support, jax.tree.map(lambda a: a[:2], TASKS.query))
            ),
            "number of tasks; got 4 in `tasks.support",
        ),
        (
            lambda: maml(adapts=lambda m: m.activation).value_and_grad(MODEL, TASKS),
            "nothing adapts",
        ),
        (lambda: maml().value_and_grad(jnp.arange(3), TASKS), "no floating-point array"),
        (lambda: trained(tasks=TASKS), "`tasks` must be `metaopt.few_shot.Episodes`"),
        (
            lambda: few_shot.evaluate(maml(), MODEL, TASKS, lambda m, b: b[0]),
            "`metric` must return a scalar",
        ),
        (
            lambda: few_shot.evaluate(maml(), MODEL, TASKS, squared_error, num_tasks=2),
            "`num_tasks` is for tasks that are drawn",
        ),
        (
            lambda: few_shot.evaluate(LEARNER, CLASSIFIER, EPISODES, cross_entropy),
            "say how many, by `num_tasks",
        ),
        (
            lambda: few_shot.evaluate(LEARNER, CLASSIFIER, ON_HOST, cross_entropy),
            r"`episodes\.batch\(0\)`",
        ),
        # Never to be learned, since the inner solver is not built from it.
        (
            lambda: maml().value_and_grad(few_shot.with_learned_rates(MODEL, 0.1), TASKS),
            "Nothing depends on `settings.rates",
        ),
        (
            lambda: maml(lambda m: optax.sgd(m.settings)).value_and_grad(
                few_shot.Learned(MODEL, 1), TASKS
            ),
            "`settings` is 1: an integer",
        ),
        (
            lambda: maml(
                few_shot.learned_rates, adapts=lambda m: m.layers[-1]
            ).value_and_grad(few_shot.with_learned_rates(MODEL, 0.1), TASKS),
            "Give both the same `adapts`",
        ),
        (
            lambda: maml().value_and_grad(MODEL, TASKS, model_state=jnp.zeros(2)),
            "`model_state` was handed over",
        ),
        (
            lambda: few_shot.evaluate(
                maml(), MODEL, TASKS, squared_error, model_state=jnp.zeros(2)
            ),
            "`model_state` was handed over",
        ),
        # Once they were broadcast against each other.
        (
            lambda: maml().value_and_grad(
                MODEL, ((TASKS.support[0], TASKS.support[1][:, :1]), TASKS.query)
            ),
            "length of axis 1, the number of examples; got 5 in `support.0.`, 1 in",
        ),
        (
            lambda: maml().adapt(MODEL, (jnp.ones(3), jnp.ones(1))),
            "number of examples; got 3 in `support",
        ),
        (
            lambda: trained(state={}),
            "`state` must be the `state` of .*; got dict. Leave it",
        ),
        (
            lambda: trained(state=trained(num_steps=1), key=jax.random.key(0)),
            "as in `state=solution.state`; got TrainSolution",
        ),
        # It was once called, after the first steps.
        (lambda: trained(callbacks=[3]), "or functions of one argument, the run; got 3"),
        (
            lambda: trained(state=trained(num_steps=1).state, key=jax.random.key(0)),
            "`state` has the key",
        ),
        (
            lambda: few_shot.train(
                LEARNER,
                eqx.nn.MLP(64, 3, 9, 1, key=jax.random.key(0)),
                EPISODES,
                outer=optax.adam(1e-2),
                num_steps=2,
                state=trained(num_steps=1).state,
            ),
            "`state` is of another model",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


_ON_EIGHT_DEVICES = """
import equinox as eqx, jax, jax.numpy as jnp, numpy as np, optax
import metaopt as mo
from jax.sharding import AxisType, NamedSharding, PartitionSpec

jax.config.update("jax_enable_x64", True)

def loss(model, batch):
    return jnp.mean((jax.vmap(model)(batch[0]) - batch[1]) ** 2)

x = jax.random.normal(jax.random.key(0), (2, 32, 5))
tasks = mo.few_shot.Task((x[0], jnp.sin(x[0])), (x[1], jnp.sin(x[1])))
model = eqx.nn.MLP("scalar", "scalar", 6, 1, jnp.tanh, key=jax.random.key(1))
mesh = jax.make_mesh((8,), ("tasks",), axis_types=(AxisType.Auto,))
spread = jax.device_put(tasks, NamedSharding(mesh, PartitionSpec("tasks")))
for chunk_size in (None, 16):
    learner = mo.few_shot.MAML(loss, mo.Descent(optax.sgd(0.1), 2), chunk_size=chunk_size)
    alone, together = (learner.value_and_grad(model, t) for t in (tasks, spread))
    for a, b in zip(*(jax.tree.leaves(out[:2]) for out in (alone, together))):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)
    gradient = eqx.filter_jit(lambda m, t: learner.value_and_grad(m, t, throw=False))
    text = gradient.lower(model, spread).compile().compiled.as_text()
    # Sums over devices, and no task goes from one to another.
    assert " all-reduce(" in text
    for moves in ("all-gather", "all-to-all", "collective-permute"):
        assert f" {moves}(" not in text, moves
"""


@pytest.mark.ci
def test_tasks_on_eight_devices():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _ON_EIGHT_DEVICES]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
