"""Tasks and models as people have them: containers, shapes, and parts that are frozen."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo


few_shot: Any = mo.few_shot  # whose arguments are of the wrong type in some tests
X = jnp.sin(jnp.arange(24.0)).reshape(2, 4, 3)
TASKS = few_shot.Task((X, X.sum(2)), (X[:, :2], X[:, :2].sum(2)))
MODEL = eqx.nn.Linear(3, 1, key=jax.random.key(0))
STEP = mo.Descent(optax.sgd(0.1), num_steps=1)


def loss(model, batch):
    return jnp.mean((jax.vmap(model)(batch[0])[:, 0] - batch[1]) ** 2)


MAML = few_shot.MAML(loss, STEP)


def one(index):
    return jax.tree.map(lambda leaf: leaf[index], TASKS)


def test_lists_of_tasks_are_stacked():
    wanted = MAML.value_and_grad(MODEL, TASKS)[0]
    tasks = [one(0), one(1)]
    assert MAML.value_and_grad(MODEL, tasks)[0] == wanted
    pairs = [(task.support, task.query) for task in tasks]
    assert MAML.value_and_grad(MODEL, pairs)[0] == wanted
    assert MAML.value_and_grad(MODEL, [TASKS.support, TASKS.query])[0] == wanted


@pytest.mark.parametrize(
    "tasks, match",
    [
        (one(0), r"`support\[1\]` in `tasks` has shape \(4,\). Each array needs"),
        ([one(0), jax.tree.map(lambda a: a[:1], one(1))], "differ in shape or dtype"),
        (
            few_shot.Task(mo.Minibatches(TASKS.support, 1), TASKS.query),
            "The `support` of a task is a `Minibatches`. It must be arrays",
        ),
        (
            few_shot.Task(TASKS.support, mo.BatchSequence(TASKS.query)),
            "The `query` of a task is a `BatchSequence`",
        ),
    ],
    ids=["one task", "shapes", "minibatches", "sequence"],
)
def test_tasks_in_a_wrong_container(tasks, match):
    # Once errors of `jax.vmap`, or `'Task' object is not subscriptable`.
    with pytest.raises(ValueError, match=match):
        MAML.value_and_grad(MODEL, tasks)


def test_batches_of_different_shapes():
    def cut(num_shots):
        support = jax.tree.map(lambda leaf: np.asarray(leaf[:, :num_shots]), TASKS.support)
        return few_shot.Task(support, TASKS.query)

    batches = [cut(4), cut(4), cut(3), cut(4)]
    train = lambda **options: few_shot.train(
        MAML, MODEL, iter(batches), outer=optax.adam(0.1), num_steps=4, **options
    )
    solution = train()
    assert len(solution.history.outer_loss) == 4
    wanted = train(steps_per_call=1)
    np.testing.assert_allclose(
        solution.history.outer_loss, wanted.history.outer_loss, rtol=1e-6
    )


BODY = {
    "body": eqx.nn.Linear(3, 4, key=jax.random.key(1)),
    "head": eqx.nn.Linear(4, 1, key=jax.random.key(2)),
}


def body_loss(model, batch, hold=lambda body: body):
    body = hold(model["body"])
    return loss(lambda x: model["head"](jnp.tanh(body(x))), batch)


def test_part_held_constant_by_stop_gradient():
    # Once said to be zero by construction, as if somebody had asked for it.
    held = lambda model, batch: body_loss(
        model, batch, lambda body: jax.tree.map(jax.lax.stop_gradient, body)
    )
    value, gradient, _ = few_shot.MAML(held, STEP).value_and_grad(BODY, TASKS)
    assert not jnp.any(gradient["body"].weight) and jnp.any(gradient["head"].weight)
    frozen = few_shot.MAML(body_loss, STEP, frozen=lambda model: model["body"])
    again, other, _ = frozen.value_and_grad(BODY, TASKS)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    np.testing.assert_allclose(other["head"].weight, gradient["head"].weight, rtol=1e-5)
    assert not jnp.any(other["body"].weight)


@pytest.mark.one_of(2)
@pytest.mark.parametrize("learner", [few_shot.MAML, few_shot.Reptile])
def test_frozen_part_stays_despite_weight_decay(learner):
    decaying = mo.Descent(optax.adamw(0.1, weight_decay=0.5), num_steps=1)
    learner = learner(body_loss, decaying, frozen=lambda model: model["body"])
    solution = few_shot.train(
        learner,
        BODY,
        lambda key: TASKS,
        outer=optax.adamw(0.1, weight_decay=0.5),
        num_steps=2,
    )
    assert eqx.tree_equal(solution.meta["body"], BODY["body"])
    assert not eqx.tree_equal(solution.meta["head"], BODY["head"])
    adapted = learner.adapt(BODY, one(0).support)
    assert eqx.tree_equal(adapted["body"], BODY["body"])


def test_frozen_parts_that_are_none_or_all():
    match = "`frozen` chooses no floating-point array"
    with pytest.raises(ValueError, match=match):
        few_shot.MAML(body_loss, STEP, frozen=lambda model: ()).value_and_grad(BODY, TASKS)
    with pytest.raises(ValueError, match="`frozen` is all of the model"):
        few_shot.MAML(body_loss, STEP, frozen=lambda m: m).value_and_grad(BODY, TASKS)


def test_labels_beyond_the_outputs():
    def named(model, batch):
        logits = jax.vmap(model)(batch[0])
        labels = batch[1]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    labels = jnp.full((2, 4), 7)
    tasks = few_shot.Task((X, labels), (X, labels))
    with pytest.raises(mo.SolveError, match="labels beyond"):
        few_shot.MAML(named, STEP).value_and_grad(MODEL, tasks)
