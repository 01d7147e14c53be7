"""Learns to fit a sine wave from ten points and one gradient step.

Every task is a sine wave of its own amplitude and phase. MAML learns weights from which
one step on ten points gets near any of them, and more steps nearer. Beside it: its family,
first-order MAML, ANIL (only the last layer adapts), Meta-SGD (a learned rate for each
weight) and Reptile; and what they must beat, a network trained on all tasks together. All
are measured on the same 600 new waves.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from _shared import parse_arguments, print_table, write_metrics

import metaopt as mo


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


NUM_TASKS = 25  # in a batch
NUM_POINTS = 10
RATE = 0.01
NUM_TEST_TASKS = 600
STEPS = (0, 1, 5, 10)
DIVERGED = 100.0  # several times the square of the largest amplitude


def sinusoids(key, num_tasks=NUM_TASKS, num_query=NUM_POINTS):
    """A batch of sine waves."""
    amplitude_key, phase_key, support_key, query_key = jax.random.split(key, 4)
    shape = num_tasks, 1
    amplitude = jax.random.uniform(amplitude_key, shape, minval=0.1, maxval=5.0)
    phase = jax.random.uniform(phase_key, shape, maxval=jnp.pi)

    def points(key, count):
        x = jax.random.uniform(key, (num_tasks, count), minval=-5.0, maxval=5.0)
        return x, amplitude * jnp.sin(x - phase)

    return mo.few_shot.Task(points(support_key, NUM_POINTS), points(query_key, num_query))


def squared_error(model, batch):
    x, y = batch
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def measure(model, batch):
    """The same, but for waves on which adaptation diverged: they are counted instead."""
    loss = squared_error(model, batch)
    return jnp.where(loss < DIVERGED, loss, jnp.nan)


def network(key):
    return eqx.nn.MLP("scalar", "scalar", 40, 2, key=key)


def learners(model):
    """Each method: how it learns, how what it learned is measured, and where it starts."""
    descent = mo.Descent(optax.sgd(RATE), num_steps=1)
    maml = mo.few_shot.MAML(squared_error, descent)
    first_order = mo.few_shot.MAML(squared_error, descent, mo.FirstOrderAdjoint())
    anil = mo.few_shot.MAML(squared_error, descent, adapts=lambda model: model.layers[-1])
    meta_sgd = mo.few_shot.MAML(
        squared_error, mo.Descent(mo.few_shot.learned_rates, num_steps=1)
    )
    reptile = mo.few_shot.Reptile(squared_error, mo.Descent(optax.sgd(0.02), num_steps=5))
    # At rate zero nobody adapts, and the query loss is a loss over all tasks.
    still = mo.Descent(optax.sgd(0.0), num_steps=1)
    together = mo.few_shot.MAML(squared_error, still, mo.FirstOrderAdjoint())
    return {
        "MAML": (maml, maml, model),
        "Meta-SGD": (meta_sgd, meta_sgd, mo.few_shot.with_learned_rates(model, RATE)),
        "first-order MAML": (first_order, maml, model),
        "Reptile": (reptile, reptile, model),
        "ANIL": (anil, anil, model),
        "trained on all tasks": (together, maml, model),
    }


def picture(out, histories, learned, tasks):
    figure, axes = plt.subplots(2, 3, figsize=(15, 7), layout="constrained")
    axes = axes.ravel()
    lines = {}
    for name, history in histories.items():
        window = max(1, len(history.outer_loss) // 100)
        count = len(history.outer_loss) // window
        means = history.outer_loss[: count * window].reshape(count, window).mean(axis=1)
        lines[name] = window * np.arange(1, count + 1), means
    title = "query loss while it learns"
    mo.plot.curves(lines, title=title, xlabel="meta-step", axes=axes[0])
    axes[0].set(xscale="linear", yscale="log")
    shown = [*(("MAML", index) for index in range(4)), ("trained on all tasks", 1)]
    for axis, (name, index) in zip(axes[1:], shown):
        learner, meta = learned[name]
        task = jax.tree.map(lambda leaf: leaf[index], tasks)
        support, (x, y) = task.support, task.query
        order = jnp.argsort(x)
        axis.plot(x[order], y[order], color="0.7", linewidth=3, label="the wave")
        for count, style in ((0, ":"), (1, "--"), (10, "-")):
            model = learner.adapt(meta, support, num_steps=count)
            line = jax.vmap(model)(x[order])
            axis.plot(x[order], line, style, color="C0", label=f"after {count} steps")
        axis.plot(*support, "o", color="C3", markersize=5, label="what it saw")
        axis.set(title=f"{name}: wave {index + 1}", ylim=(-6, 6))
    axes[2].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "maml_sinusoid.png", dpi=120)


def main():
    arguments = parse_arguments("maml_sinusoid", str(__doc__), steps=15_000, data=())
    steps = 100 if arguments.quick else arguments.steps
    key, model_key = jax.random.split(jax.random.key(arguments.seed))
    train_key, test_key = jax.random.split(key)
    test = sinusoids(test_key, 60 if arguments.quick else NUM_TEST_TASKS, 100)
    rows, metrics, histories, learned = [], {}, {}, {}
    for name, (learner, measured, start) in learners(network(model_key)).items():
        solution = mo.few_shot.train(
            learner,
            start,
            sinusoids,
            outer=optax.adam(1e-3),
            num_steps=steps,
            steps_per_call=100,
            key=train_key,
            callbacks=[mo.callbacks.Progress()],
        )
        scores = [
            mo.few_shot.evaluate(measured, solution.meta, test, measure, num_steps=n)
            for n in STEPS
        ]
        cells = [f"{score.mean:.3f} +- {score.interval:.3f}" for score in scores]
        failed = "/".join(str(score.num_failed) for score in scores)
        rows.append((name, *cells, failed, f"{solution.seconds:.0f}"))
        metrics[name] = {
            f"{n} steps": [score.mean, score.interval, score.num_failed]
            for n, score in zip(STEPS, scores)
        }
        histories[name], learned[name] = solution.history, (measured, solution.meta)
    print_table(
        f"Mean squared error on {test.query[0].shape[0]} new waves after some steps, "
        f"{steps:,} meta-steps",
        ("", *(f"after {n}" for n in STEPS), "diverged", "seconds"),
        rows,
    )
    picture(arguments.out, histories, learned, test)
    write_metrics(arguments.out, metrics)


if __name__ == "__main__":
    main()
