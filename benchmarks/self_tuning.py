"""Counts what a training step of a self-tuning network costs, in plain training steps.

Two networks, twelve outer variables (weight decays), a batch of 128 with a perturbation of
its own for each example. Counted are the multiplications in the matrix products of the
program that XLA makes for a step of Adam, and the memory that it takes; nothing is timed.
The last row is the control: weights of its own for each example, by `jax.vmap` over models.

    python benchmarks/self_tuning.py
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from _work import check_counter, Work

import metaopt as mo
from metaopt._bilevel import Coordinates, cut, PerturbedBatch


NETWORKS = {
    "784-300-100-10": (784, 300, 100, 10),
    "784-512 (5 times)-10": (784, *[512] * 5, 10),
}
NUM_HYPER = 12
BATCH = 128


class Chain(eqx.Module):
    layers: list

    def __init__(self, widths, key):
        keys = jax.random.split(key, len(widths) - 1)
        self.layers = [
            eqx.nn.Linear(a, b, key=k) for a, b, k in zip(widths[:-1], widths[1:], keys)
        ]

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class Decayed(mo.extend.AbstractPredictionProblem):
    widths: tuple[int, ...] = eqx.field(static=True)

    def init(self, hyper, key):
        return Chain(self.widths, key)

    def predict(self, params, hyper, batch):
        return jax.vmap(params)(batch[0])

    def criterion(self, predictions, params, hyper, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(predictions, batch[1])
        norms = jnp.stack([mo.nn.squared_norm(layer) for layer in params.layers])
        return jnp.mean(losses) + jnp.sum(jnp.exp(hyper[: len(norms)]) * norms)


class PerExample(mo.extend.AbstractInnerProblem):
    """The control: an ordinary model with weights of its own for each perturbation."""

    problem: Decayed

    def init(self, hyper, key):
        return self.problem.init(hyper, key)

    def loss(self, params, hyper, batch):
        return self.problem.loss(mo.nn.ordinary(params), hyper, batch)


ADAM = optax.adam(1e-3)


def measured(gradient, params, *arguments):
    """Multiplications of a step of Adam, and the bytes that it takes in all: params,
    moments, batch and what is temporary."""

    def step(params, moments, *arguments):
        updates, moments = ADAM.update(gradient(params, *arguments), moments)
        return optax.apply_updates(params, updates), moments

    everything = params, ADAM.init(params), *arguments
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*everything).compile()
    sizes = compiled.memory_analysis()
    assert sizes is not None
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    memory = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + outputs
    return Work(step, *everything).total, memory


def perturbed(groups, hyper, noise, arrays, keys):
    """A batch of these arrays with perturbations of scale 1."""
    groups = eqx.tree_at(lambda g: g.arrays, groups, arrays)
    no_logs = jnp.zeros_like(hyper)
    return PerturbedBatch(groups, Coordinates(hyper), hyper, no_logs, noise, keys)


def train_step(problem, method, params, hyper, batch, noise, keys):
    """One training step of a best-response network."""
    groups = cut(batch, 1, "train")
    trainable, static = eqx.partition(params, eqx.is_inexact_array)

    def gradient(trainable, hyper, noise, arrays):
        batch = perturbed(groups, hyper, noise, arrays, keys)

        def loss(trainable):
            full = eqx.combine(trainable, static)
            return method.train(problem, full, batch, None).total

        return jax.grad(loss)(trainable)

    return measured(gradient, trainable, hyper, noise, groups.arrays)


def plain_step(problem, params, hyper, batch):
    trainable, static = eqx.partition(params, eqx.is_inexact_array)

    def gradient(trainable, hyper, batch):
        return jax.grad(lambda p: problem.loss(eqx.combine(p, static), hyper, batch))(
            trainable
        )

    return measured(gradient, trainable, hyper, batch)


def valid_step(problem, method, params, hyper, batch, noise, keys):
    """The hypergradient of one validation step."""
    groups = cut(batch, 1, "valid")
    dynamic, static = eqx.partition(params, eqx.is_inexact_array)

    def step(dynamic, hyper, noise, arrays):
        batch = perturbed(groups, hyper, noise, arrays, keys)
        params = eqx.combine(dynamic, static)
        return method.differentiate(problem, params, batch, None, False).hyper

    return Work(step, dynamic, hyper, noise, groups.arrays).total


def main():
    check_counter()
    key = jax.random.key(0)
    hyper = jnp.full(NUM_HYPER, -8.0)
    noise = jax.random.normal(key, (BATCH, NUM_HYPER))
    keys = jax.random.split(key, BATCH)
    batch = jax.random.normal(key, (BATCH, 784)), jnp.arange(BATCH) % 10
    print(f"{'':<34}{'training step':>22}{'validation step':>18}")
    print(f"{'':<34}{'work':>12}{'memory':>10}{'work':>18}")
    for name, widths in NETWORKS.items():
        problem = Decayed(widths)
        bilevel = mo.BilevelProblem(
            problem, lambda p, h, b: jnp.mean(problem.predict(p, h, b)[:, 0])
        )
        plain = problem.init(hyper, key)
        work, memory = plain_step(problem, plain, hyper, batch)
        print(f"{name}: {work / 1e6:.0f}M multiplications, {memory / 1e6:.1f} MB")
        rows: list[Any] = [
            (
                f"{type(method).__name__}{'' if tied else ', free response'}",
                method,
                tied,
                problem,
            )
            for method in (mo.STN(), mo.DeltaSTN())
            for tied in (True, False)
        ]
        rows.append(("weights for each example", mo.STN(), True, PerExample(problem)))
        for label, method, tied, inner in rows:
            params = mo.nn.self_tuning(plain, NUM_HYPER, tied=tied, key=key)
            arguments = method, params, hyper, batch, noise, keys
            step = train_step(inner, *arguments)
            line = f"  {label:<32}{step[0] / work:>12.2f}{step[1] / memory:>10.2f}"
            if inner is problem:
                line += f"{valid_step(bilevel, *arguments) / work:>18.2f}"
            print(line)


if __name__ == "__main__":
    main()
