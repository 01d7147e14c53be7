"""Tunes learning rates, momentum, weight decay and a schedule by hypergradient.

A small network is trained for 50 steps of SGD. Unrolled differentiation through all of
them says how each setting should change for a lower validation loss: first one learning
rate and one weight decay per layer and a momentum, then a learning rate for every step
and layer. The result is compared with an untuned default and with random search on the
same number of gradient evaluations, by training anew from seeds that nobody tuned on.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from _shared import load, parse_arguments, print_table, write_metrics

import metaopt as mo


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


NUM_STEPS = 50  # of the inner solver
LAYERS = 3
BATCH_SIZE = 100
# A reverse pass costs about 2.5 gradients for each inner step besides the forward one:
# random search is granted as many runs as that pays for.
GRADIENTS_PER_STEP = 3.5


class Hyper(eqx.Module):
    """The outer variables, all unconstrained."""

    log_rate: jax.Array  # (LAYERS,), or (NUM_STEPS, LAYERS) for a schedule
    logit_momentum: jax.Array  # ()
    log_decay: jax.Array  # (LAYERS,)


class Classifier(mo.extend.AbstractInnerProblem):
    """A tanh network of three layers, trained with a weight decay for each layer."""

    sizes: tuple[int, ...] = eqx.field(static=True)

    def init(self, hyper, key):
        keys = jax.random.split(key, LAYERS)
        shapes = zip(self.sizes[:-1], self.sizes[1:], strict=True)
        return [
            eqx.nn.Linear(fan_in, fan_out, key=k)
            for (fan_in, fan_out), k in zip(shapes, keys, strict=True)
        ]

    def loss(self, params, hyper, batch):
        decay = sum(
            jnp.exp(log_decay) * jnp.sum(layer.weight**2)
            for log_decay, layer in zip(hyper.log_decay, params, strict=True)
        )
        return cross_entropy(params, hyper, batch) + decay


def predict(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer.weight.T + layer.bias)
    return x @ params[-1].weight.T + params[-1].bias


def cross_entropy(params, hyper, batch):
    x, y = batch
    losses = optax.losses.softmax_cross_entropy_with_integer_labels
    return jnp.mean(losses(predict(params, x), y))


def accuracy(params, batch):
    x, y = batch
    return jnp.mean(jnp.argmax(predict(params, x), axis=-1) == y)


def sgd(hyper: Hyper) -> optax.GradientTransformation:
    """SGD with momentum, whose learning rates are those of `hyper`."""

    def scale(updates, state, params=None):
        # One rate per layer, or one per step and layer.
        rate = jnp.exp(hyper.log_rate)
        rate = rate[state] if rate.ndim == 2 else rate
        updates = [
            jax.tree.map(lambda leaf, r=r: -r * leaf, layer)
            for r, layer in zip(rate, updates, strict=True)
        ]
        return updates, state + 1

    rates = optax.GradientTransformation(lambda params: jnp.zeros((), int), scale)
    momentum = jax.nn.sigmoid(hyper.logit_momentum)
    # With (1 - momentum) in front, the rate keeps its meaning as the momentum changes.
    return optax.chain(optax.ema(momentum, debias=False), rates)


def default_hyper() -> Hyper:
    """What one would write down untuned: rate 0.1 with momentum 0.9, decay 1e-4."""
    return Hyper(
        log_rate=jnp.full(LAYERS, jnp.log(0.1 / (1 - 0.9))),
        logit_momentum=jnp.log(0.9 / 0.1),
        log_decay=jnp.full(LAYERS, jnp.log(1e-4)),
    )


def as_schedule(hyper: Hyper) -> Hyper:
    """The same rates, one for every step."""
    rates = jnp.broadcast_to(hyper.log_rate, (NUM_STEPS, LAYERS))
    return eqx.tree_at(lambda h: h.log_rate, hyper, rates)


def tune(problem, hyper, train, valid, rate: float, steps: int, key):
    """Tune by unrolled hypergradient, from new params and minibatches at each step."""
    solver = mo.NestedSolver(
        inner=mo.Descent(sgd, num_steps=NUM_STEPS),
        adjoint=mo.UnrolledAdjoint(),
        # Near the largest stable rate a hypergradient can be huge for one draw of the
        # minibatches: clipping bounds what it does to the moments of Adam.
        outer=optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adam(optax.cosine_decay_schedule(rate, steps)),
        ),
    )
    solution = mo.solve_bilevel(
        problem,
        hyper,
        mo.Minibatches(train, BATCH_SIZE),
        valid,
        solver=solver,
        num_steps=steps,
        key=key,
        callbacks=[mo.callbacks.Progress()],
    )
    print(solution)
    return solution


@eqx.filter_jit
def train_once(problem, hyper, train, key):
    """Train from scratch with given settings; the loss curve comes along."""
    return mo.solve_inner(
        problem.inner,
        hyper,
        mo.Minibatches(train, BATCH_SIZE),
        solver=mo.Descent(sgd, num_steps=NUM_STEPS),
        adjoint=mo.UnrolledAdjoint(),
        key=key,
        throw=False,
    )


@eqx.filter_jit
def random_search(problem, train, valid, keys):
    """Validation losses of settings drawn at random, and the settings."""

    def trial(key):
        draw_key, run_key = jax.random.split(key)
        rate_key, momentum_key, decay_key = jax.random.split(draw_key, 3)
        uniform = jax.random.uniform
        hyper = Hyper(
            # Wide enough to hold the tuned values, and centred on the default.
            log_rate=uniform(rate_key, (LAYERS,), minval=-2.3, maxval=3.0),
            logit_momentum=uniform(momentum_key, (), minval=-1.0, maxval=4.0),
            log_decay=uniform(decay_key, (LAYERS,), minval=-14.0, maxval=-4.0),
        )
        params = train_once(problem, hyper, train, run_key).value
        return cross_entropy(params, hyper, valid), hyper

    return jax.lax.map(trial, keys, batch_size=8)


def evaluate(problem, hyper, train, parts, keys):
    """Losses and accuracies after training anew from each key."""
    rows, curves = [], []
    for key in keys:
        solution = train_once(problem, hyper, train, key)
        row = {}
        for name, part in parts.items():
            row[f"{name}_loss"] = float(cross_entropy(solution.value, hyper, part))
            row[f"{name}_accuracy"] = float(accuracy(solution.value, part))
        rows.append(row)
        curves.append(np.asarray(solution.stats["losses"]))
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    error = np.std([row["test_loss"] for row in rows], ddof=1) / np.sqrt(len(rows))
    mean["test_loss_standard_error"] = float(error)
    return mean, np.mean(curves, axis=0)


def smooth(values, width=9):
    """A centred running mean, over fewer values at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centres = np.arange(len(values))
    first = np.maximum(centres - width // 2, 0)
    end = np.minimum(centres + width // 2 + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def picture(out, schedule: Hyper, curves: dict[str, np.ndarray], valid_losses):
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    rates = np.exp(np.asarray(schedule.log_rate))
    for layer in range(LAYERS):
        axes[0].plot(rates[:, layer], label=f"layer {layer + 1}", linewidth=1.8)
    axes[0].set(title="Learned schedule", xlabel="inner step", ylabel="learning rate")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    for name, curve in curves.items():
        axes[1].plot(smooth(curve, 3), label=name, linewidth=1.8)
    axes[1].set(
        title="Training from unseen seeds", xlabel="inner step", ylabel="training loss"
    )
    axes[1].set_yscale("log")
    axes[1].legend(frameon=False)
    begin = 0
    for color, (name, losses) in zip(("C2", "C3"), valid_losses.items()):
        steps = np.arange(begin, begin + len(losses))
        axes[2].plot(steps, losses, color=color, alpha=0.25, linewidth=1)
        axes[2].plot(steps, smooth(losses), color=color, label=name, linewidth=2)
        begin += len(losses)
    axes[2].set(
        title="Validation loss while tuning",
        xlabel="outer step",
        ylabel="validation loss (bold: running mean)",
    )
    axes[2].set_yscale("log")
    axes[2].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "tune_learning_rate.png", dpi=130)


def compare(problem, contenders, data_name, train, parts, keys):
    """Train anew with each contender's settings and print the table."""
    rows, curves, metrics = [], {}, {}
    for name, (hyper, num_runs) in contenders.items():
        result, curves[name] = evaluate(problem, hyper, train, parts, keys)
        gradients = int(num_runs * NUM_STEPS)
        metrics[name] = result | {"gradient_evaluations": gradients}
        rows.append(
            (
                name,
                f"{gradients:,}",
                f"{result['train_loss']:.4f}",
                f"{result['valid_loss']:.4f}",
                f"{result['test_loss']:.4f} +- {result['test_loss_standard_error']:.4f}",
                f"{100 * result['test_accuracy']:.2f} %",
            )
        )
    print_table(
        f"{data_name}: mean over training anew from {len(keys)} unseen seeds",
        ("settings", "gradients", "train", "valid", "test loss", "test accuracy"),
        rows,
    )
    return metrics, curves


def print_settings(hyper: Hyper) -> dict[str, Any]:
    """The tuned settings, one column for each layer."""
    rates, decays = np.exp(hyper.log_rate), np.exp(hyper.log_decay)
    momentum = float(jax.nn.sigmoid(hyper.logit_momentum))
    print_table(
        "Tuned settings, per layer",
        ("setting", *(f"layer {i + 1}" for i in range(LAYERS))),
        [
            ("learning rate", *(f"{rate:.3g}" for rate in rates)),
            ("weight decay", *(f"{decay:.2g}" for decay in decays)),
            ("momentum", f"{momentum:.3f}", "", ""),
        ],
    )
    return {"rates": rates.tolist(), "decays": decays.tolist(), "momentum": momentum}


def main():
    arguments = parse_arguments("tune_learning_rate", str(__doc__), steps=60)
    steps = 2 if arguments.quick else arguments.steps
    num_seeds = 2 if arguments.quick else 10
    data = load(arguments.data)
    if arguments.data == "digits":
        sizes, network = (900, 400, 497), (64, 50, 50, 10)
    else:
        sizes, network = (5000, 2000, 5000), (784, 50, 50, 10)
    train, valid, test = (
        (jnp.asarray(part.x), jnp.asarray(part.y))
        for part in mo.datasets.split(data, sizes, arguments.seed)
    )
    problem = mo.BilevelProblem(Classifier(network), cross_entropy)
    keys = jax.random.split(jax.random.key(arguments.seed), 4)

    print("\nTuning one rate per layer")
    fixed = tune(problem, default_hyper(), train, valid, 0.08, steps, keys[0])
    print("\nTuning one rate per step and layer")
    begin = as_schedule(fixed.hyper)
    scheduled = tune(problem, begin, train, valid, 0.04, steps, keys[1])
    cost = GRADIENTS_PER_STEP * steps
    trial_keys = jax.random.split(keys[2], int(2 * cost))
    losses, trials = random_search(problem, train, valid, trial_keys)
    best = jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))

    metrics, curves = compare(
        problem,
        {
            "untuned default": (default_hyper(), 0),
            "random search": (jax.tree.map(lambda leaf: leaf[best], trials), 2 * cost),
            "tuned, per layer": (fixed.hyper, cost),
            "tuned, per step and layer": (scheduled.hyper, 2 * cost),
        },
        data.name,
        train,
        {"train": train, "valid": valid, "test": test},
        jax.random.split(keys[3], num_seeds),
    )
    settings = print_settings(fixed.hyper)
    valid_losses = {
        "per layer": fixed.history.outer_loss,
        "per step and layer": scheduled.history.outer_loss,
    }
    picture(arguments.out, scheduled.hyper, curves, valid_losses)
    results = {"data": data.name, "results": metrics, "settings": settings}
    write_metrics(arguments.out, results)


if __name__ == "__main__":
    main()
