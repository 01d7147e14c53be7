"""What a training step of a self-tuning network costs, in plain training steps.

Compiled and not run. The programs hold no loops, so that XLA's own count of operations is
right. `benchmarks/self_tuning.py` prints the same for larger networks.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import metaopt as mo
from metaopt._bilevel import Coordinates, cut, PerturbedBatch


WIDTH, DEPTH, BATCH, NUM_HYPER = 384, 4, 128, 10


class Decayed(mo.extend.AbstractPredictionProblem):
    def init(self, hyper, key):
        return eqx.nn.MLP(WIDTH, 10, WIDTH, DEPTH, key=key, dtype=jnp.float32)

    def predict(self, params, hyper, batch):
        return jax.vmap(params)(batch[0])

    def criterion(self, predictions, params, hyper, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(predictions, batch[1])
        return jnp.mean(losses) + jnp.exp(hyper[0]) * mo.nn.squared_norm(params)


class PerExample(mo.extend.AbstractInnerProblem):
    """The control: weights of its own for each example."""

    def init(self, hyper, key):
        return Decayed().init(hyper, key)

    def loss(self, params, hyper, batch):
        return Decayed().loss(mo.nn.ordinary(params), hyper, batch)


HYPER = jnp.zeros(NUM_HYPER, jnp.float32)
DATA = jnp.ones((BATCH, WIDTH), jnp.float32), jnp.zeros(BATCH, int)
MODEL = Decayed().init(HYPER, jax.random.key(0))


def cost(loss, params):
    """Floating-point operations and temporary bytes of the gradient in all params."""
    moving, fixed = eqx.partition(params, eqx.is_inexact_array)
    step = jax.jit(jax.grad(lambda moving: loss(eqx.combine(moving, fixed))))
    compiled = step.lower(moving).compile()
    memory = compiled.memory_analysis()
    analysis = compiled.cost_analysis()
    assert memory is not None and analysis is not None
    return analysis["flops"], memory.temp_size_in_bytes


@pytest.fixture(scope="module")
def plain():
    return cost(lambda params: Decayed().loss(params, HYPER, DATA), MODEL)


def best_response(problem, method, tied):
    params = mo.nn.self_tuning(MODEL, NUM_HYPER, tied=tied, key=jax.random.key(1))
    noise = jnp.ones((BATCH, NUM_HYPER), jnp.float32)
    keys = jax.random.split(jax.random.key(2), BATCH)
    groups, no_logs = cut(DATA, 1, "train"), jnp.zeros_like(HYPER)
    batch = PerturbedBatch(groups, Coordinates(HYPER), HYPER, no_logs, noise, keys)

    def loss(params):
        return method.train(problem, params, batch, None).total

    return cost(loss, params)


@pytest.mark.parametrize(
    "method, tied, most",
    [
        (mo.STN(), True, 1.1),
        (mo.DeltaSTN(), True, 1.7),
        (mo.STN(), False, 2.1),
        (mo.DeltaSTN(), False, 2.4),
    ],
)
def test_a_training_step_costs_little_more_than_a_plain_one(plain, method, tied, most):
    flops, memory = best_response(Decayed(), method, tied)
    assert flops <= most * plain[0]
    # Some more activations and, with a response of its own, another gradient.
    assert memory <= plain[1] + 4 * BATCH * WIDTH * (6 * DEPTH + 4) + 2 * 4 * MODEL_SIZE


def test_weights_for_each_example_would_take_a_hundred_times_the_memory(plain):
    # The control: what is measured above can fail.
    _, memory = best_response(PerExample(), mo.STN(), True)
    assert memory > 100 * plain[1]
    _, ours = best_response(Decayed(), mo.STN(), True)
    assert memory > 50 * ours


MODEL_SIZE = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(MODEL, eqx.is_array)))
