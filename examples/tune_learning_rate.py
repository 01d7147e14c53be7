"""Tunes learning rates, momentum and weight decay by hypergradient, and compares.

A small network is trained for 30 steps. Unrolled differentiation through all of them says
how each setting should change for a lower validation loss: the schedule of the learning
rate, its shape for each array of the params, a momentum, and a weight decay for each array.
Random search and TPE, the sampler of Optuna, spend the same number of gradients. Then
models are trained anew at what each of them found, and measured on test data.

Inner steps, budget and outer rate were chosen on splits of the seeds 100 to 104.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from _shared import load, parse_arguments, write_metrics

import metaopt as mo


matplotlib.use("Agg")

NUM_STEPS = 30  # of the inner solver
BATCH_SIZE = 100
KNOTS = 5  # of the schedule of each array
NUM_SEEDS = 5
NUM_AGAIN = 8  # models that are trained at the settings that were found
STEP_COST = 3 * NUM_STEPS + 1  # gradients of an outer step; a second derivative is two
TUNED = "hypergradient"


class Classifier(mo.extend.AbstractInnerProblem):
    """A tanh network of dense layers."""

    widths: tuple[int, ...] = eqx.field(static=True)

    def init(self, hyper, key):
        keys = jax.random.split(key, len(self.widths) - 1)
        shapes = zip(self.widths[:-1], self.widths[1:])
        return {
            f"layer {i}": {
                "weight": jax.random.normal(k, shape) / shape[0] ** 0.5,
                "bias": jnp.zeros(shape[1]),
            }
            for i, (k, shape) in enumerate(zip(keys, shapes), start=1)
        }

    def loss(self, params, hyper, batch):
        return cross_entropy(params, hyper, batch)


def predict(params, x):
    *hidden, last = params.values()
    for layer in hidden:
        x = jnp.tanh(x @ layer["weight"] + layer["bias"])
    return x @ last["weight"] + last["bias"]


def cross_entropy(params, hyper, batch):
    x, y = batch
    losses = optax.losses.softmax_cross_entropy_with_integer_labels
    return jnp.mean(losses(predict(params, x), y))


def outer_loss(params, hyper, batch):
    return cross_entropy(params, hyper, batch[0])


def accuracy(params, hyper, batch):
    x, y = batch[0]
    return jnp.mean(jnp.argmax(predict(params, x), axis=-1) == y)


def default_hyper(params) -> dict[str, Any]:
    """The settings that each method starts at."""
    for_each = lambda x: mo.hyper.PerLeaf(mo.hyper.Positive(x), params, "*")
    return {
        "curve": mo.hyper.WarmupCosine(1.0, NUM_STEPS),
        "friction": mo.hyper.Interval(0.1, 0.0, 1.0),  # one minus the momentum
        "decay": mo.hyper.Positive(1e-4),
        "shapes": for_each(jnp.ones(KNOTS)),
        "decays": for_each(1.0),  # times `decay`
    }


def rates_of(hyper):
    """The learning rates of each step (rows) and array (columns)."""
    places = jnp.linspace(0, KNOTS - 1, NUM_STEPS)
    hats = jnp.maximum(1 - jnp.abs(places[:, None] - jnp.arange(KNOTS)), 0)
    shapes = jnp.stack(list(hyper["shapes"].value.values()))
    return hyper["curve"].value[:, None] * jnp.exp(hats @ jnp.log(shapes).T)


def optimizer(hyper):
    """SGD with momentum, decoupled weight decay and the rates of `hyper`."""
    rates = rates_of(hyper)
    decays = hyper["decay"].value * jnp.stack(list(hyper["decays"].value.values()))

    def update(updates, state, params=None):
        leaves, structure = jax.tree.flatten(updates)
        arrays = zip(leaves, jax.tree.leaves(params), rates[state], decays)
        scaled = [-rate * (u + decay * w) for u, w, rate, decay in arrays]
        return jax.tree.unflatten(structure, scaled), state + 1

    # A run that leaves the stable rates has no useful derivative; clipping keeps it in.
    clip = optax.clip_by_global_norm(1.0)
    momentum = optax.ema(1 - hyper["friction"].value, debias=False)
    descent = optax.GradientTransformation(lambda params: jnp.zeros((), int), update)
    return optax.chain(clip, momentum, descent)


def spaces(hyper) -> dict[str, Any]:
    """The ranges of searches: those of five numbers, and one more for each array."""
    ranges = (
        mo.study.LogUniform(0.1, 10.0),
        mo.study.Uniform(0.0, 0.6),
        mo.study.Uniform(0.0, 1.0),
    )
    curve = eqx.tree_at(lambda c: (c.peak, c.warmup, c.end), hyper["curve"], ranges)
    few = {
        "curve": curve,
        "friction": mo.study.LogUniform(0.02, 0.8),
        "decay": mo.study.LogUniform(1e-5, 1e-1),
    }
    shapes = mo.study.LogUniform(0.1, 10.0, shared=True)
    return {"few": few, "per array": few | {"shapes": shapes}}


def methods_of(inner, hyper, num_outer: int) -> dict[str, Any]:
    """What is compared, by names."""
    schedule = optax.cosine_decay_schedule(0.05, num_outer)
    outer = optax.chain(optax.clip_by_global_norm(0.2), optax.adam(schedule, b2=0.99))
    # Rates grow until training is at the edge of what is stable, and some steps beyond it.
    outer = mo.step_back(outer, max_norm=1.0)
    space = spaces(hyper)
    return {
        TUNED: mo.NestedSolver(inner, mo.UnrolledAdjoint(), outer),
        "random search": mo.study.RandomSearch(space["few"]),
        "TPE": mo.study.OptunaSearch(space["few"]),
        "TPE, per array": mo.study.OptunaSearch(space["per array"]),
        "untuned": mo.study.Untuned(),
    }


def mean_loss(problem, inner):
    """The mean test loss of several models that are trained alike."""

    @eqx.filter_jit
    def metric(params, hyper, batch):
        test, train = batch

        def one(key):
            data = mo.Minibatches(train, BATCH_SIZE)
            options = {"adjoint": mo.UnrolledAdjoint(), "key": key, "throw": False}
            again = mo.solve_inner(problem.inner, hyper, data, solver=inner, **options)
            return outer_loss(again.value, hyper, (test,))

        return jnp.mean(jax.lax.map(one, jax.random.split(jax.random.key(0), NUM_AGAIN)))

    return mo.study.Metric(metric, higher_is_better=False)


def found_by(table, seed: int, hyper):
    """The settings that the hypergradient has found for a seed."""
    is_hyper = lambda node: isinstance(node, mo.hyper.AbstractHyper)
    leaves, structure = jax.tree.flatten(hyper, is_leaf=is_hyper)
    values = table.records[TUNED][seed].found.values()
    new = [leaf.with_value(jnp.asarray(v)) for leaf, v in zip(leaves, values)]
    return jax.tree.unflatten(structure, new)


def results_of(table, metric: str) -> dict[str, Any]:
    """Means over seeds, and the paired differences to the tuned settings, printed."""
    mine, results = table.values(TUNED, metric), {}
    print(f"\n{metric}: mean, and difference to `{TUNED}` with its standard error")
    for name in table.order(metric):
        values = table.values(name, metric)
        away = values - mine
        error = float(np.std(away, ddof=1) / len(away) ** 0.5) if len(away) > 1 else 0.0
        print(f"  {name:<16}{values.mean():.4f}  {away.mean():+.4f} +- {error:.4f}")
        results[name] = {
            "test_loss": float(values.mean()),
            "test_accuracy": float(table.values(name, "accuracy").mean()),
            "difference": float(away.mean()),
            "difference_standard_error": error,
            "spent": float(np.mean([r.costs[-1] for r in table.records[name].values()])),
        }
    return results


def pictures(out, table, metric: str, before, after):
    """The schedules before and after, and the loss over what was spent."""
    tables = {"Before": rates_of(before), "Tuned": rates_of(after)}
    axes = mo.plot.schedule(tables, labels=list(before["shapes"].value))
    axes[0].set_ylabel("learning rate")
    axes[0].figure.savefig(out / "tune_learning_rate.png", dpi=130)
    # Beside the untuned loss the others look alike.
    shown = [name for name in table.records if name != "untuned"]
    figure = mo.plot.comparison(table, metrics=[metric], methods=shown)
    figure.axes[0].set_yscale("log")
    figure.savefig(out / "comparison.png", dpi=130)


def main():
    arguments = parse_arguments("tune_learning_rate", str(__doc__), steps=65)
    num_outer = 2 if arguments.quick else arguments.steps
    data = load(arguments.data)
    digits = arguments.data == "digits"
    sizes = (900, 400, 497) if digits else (5000, 1000, 5000)
    problem = mo.BilevelProblem(Classifier((data.x.shape[1], 50, 50, 10)), outer_loss)
    hyper = default_hyper(problem.inner.init(None, jax.random.key(0)))
    inner = mo.Descent(optimizer, NUM_STEPS)

    def split(seed):
        parts = mo.datasets.split(data, sizes, seed)
        train, valid, test = [(jnp.asarray(p.x), jnp.asarray(p.y)) for p in parts]
        batches = mo.Minibatches(train, BATCH_SIZE)
        return batches, mo.FullBatch((valid,)), mo.FullBatch((test, train))

    metric = f"loss of {NUM_AGAIN} models"
    count = 1 if arguments.quick else NUM_SEEDS
    table = mo.study.compare(
        methods_of(inner, hyper, num_outer),
        problem,
        hyper,
        split=split,
        inner=inner,
        budget=mo.study.GradientBudget(num_outer * STEP_COST),
        seeds=range(arguments.seed, arguments.seed + count),
        metrics={"accuracy": accuracy, metric: mean_loss(problem, inner)},
        num_points=5,
    )
    print(table)
    results = results_of(table, metric)
    after = found_by(table, arguments.seed, hyper)
    arguments.out.mkdir(parents=True, exist_ok=True)
    pictures(arguments.out, table, metric, hyper, after)
    write_metrics(arguments.out, {"data": data.name, "results": results})


if __name__ == "__main__":
    main()
