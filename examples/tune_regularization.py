"""Tunes one weight decay for each of the 650 parameters of a softmax regression.

The inner problem is strongly convex and solved to convergence, so the hypergradient is
implicit: one linear system, solved by conjugate gradients on Hessian-vector products,
whatever the number of outer variables. The result is compared with the best of a grid
of 21 values of one shared decay. With 650 outer variables and 750 validation images it
overfits the validation set: the table shows by how much, and `--steps 150` how the test
loss turns round.
"""

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


# The tuned decays spread over many powers of ten: float32 cannot solve such an inner
# problem to convergence.
jax.config.update("jax_enable_x64", True)

GRID = np.linspace(-14.0, 2.0, 21)  # of the logarithm of one shared decay
NUM_SPLITS = 3


class SoftmaxRegression(mo.extend.AbstractInnerProblem):
    """Softmax regression; `hyper` holds the logarithm of one decay per parameter."""

    num_features: int = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)

    def init(self, hyper, key):
        weight = jnp.zeros((self.num_features, self.num_classes))
        return {"weight": weight, "bias": jnp.zeros(self.num_classes)}

    def loss(self, params, hyper, batch):
        decay = jax.tree.map(
            lambda log_decay, leaf: jnp.sum(jnp.exp(log_decay) * leaf**2), hyper, params
        )
        return cross_entropy(params, hyper, batch) + 0.5 * sum(jax.tree.leaves(decay))


def predict(params, x):
    return x @ params["weight"] + params["bias"]


def cross_entropy(params, hyper, batch):
    x, y = batch
    losses = optax.losses.softmax_cross_entropy_with_integer_labels
    return jnp.mean(losses(predict(params, x), y))


def accuracy(params, batch):
    x, y = batch
    return jnp.mean(jnp.argmax(predict(params, x), axis=-1) == y)


def inner_solver() -> mo.Descent:
    return mo.Descent(optax.lbfgs(), num_steps=1000, atol=1e-6)


def shared_decay(problem: SoftmaxRegression, log_decay):
    """One decay for all parameters."""
    shape = problem.num_features, problem.num_classes
    return {
        "weight": jnp.full(shape, log_decay),
        "bias": jnp.full(problem.num_classes, log_decay),
    }


@eqx.filter_jit
def fit(problem, hyper, train):
    """The solution from scratch."""
    solution = mo.solve_inner(
        problem,
        hyper,
        train,
        solver=inner_solver(),
        adjoint=mo.ImplicitAdjoint(),
        throw=False,
    )
    return solution.value


@eqx.filter_jit
def grid_search(problem, train, valid):
    """The validation loss at each point of the grid."""

    def at(log_decay):
        hyper = shared_decay(problem, log_decay)
        return cross_entropy(fit(problem, hyper, train), hyper, valid)

    return jax.lax.map(at, jnp.asarray(GRID))


def tune(inner, hyper, train, valid, test, steps, key):
    """Tune `hyper` and follow the test loss, which nothing is chosen by."""
    test_losses = []
    measure = eqx.filter_jit(cross_entropy)

    def follow(run):
        test_losses.append(float(measure(run.params, None, test)))

    solution = mo.solve_bilevel(
        mo.BilevelProblem(inner, cross_entropy),
        hyper,
        train,
        valid,
        solver=mo.NestedSolver(
            inner=inner_solver(),
            adjoint=mo.ImplicitAdjoint(mo.CG(rtol=1e-3, max_steps=5000), newton_steps=1),
            outer=optax.adam(0.1),
            start=mo.WarmStart(),
        ),
        num_steps=steps,
        key=key,
        callbacks=[mo.callbacks.Progress(), follow],
    )
    print(solution)
    return solution, np.asarray(test_losses)


def measure(params, parts):
    row = {}
    for name, part in parts.items():
        row[f"{name}_loss"] = float(cross_entropy(params, None, part))
        row[f"{name}_accuracy"] = float(accuracy(params, part))
    row["gap"] = row["test_loss"] - row["valid_loss"]
    return row


def run_split(data, sizes, seed, steps):
    """The grid, one tuned decay and one tuned decay per parameter, on one split."""
    train, valid, test = (
        (jnp.asarray(part.x, float), jnp.asarray(part.y))
        for part in mo.datasets.split(data, sizes, seed)
    )
    parts = {"train": train, "valid": valid, "test": test}
    inner = SoftmaxRegression(data.x.shape[1], data.num_classes)
    losses = np.asarray(grid_search(inner, train, valid))
    best = shared_decay(inner, float(GRID[np.argmin(losses)]))
    solution, test_losses = tune(
        inner, best, train, valid, test, steps, jax.random.key(seed)
    )
    # Solved anew from scratch, so that nothing is owed to the warm starts.
    fitted = {
        "best of 21 shared decays": fit(inner, best, train),
        "one decay per parameter": fit(inner, solution.hyper, train),
    }
    rows = {name: measure(params, parts) for name, params in fitted.items()}
    weights = {name: np.asarray(params["weight"]) for name, params in fitted.items()}
    return rows, (losses, solution, test_losses, rows, weights)


def picture(out, data, grid_losses, solution, test_losses, rows, weights):
    figure = plt.figure(figsize=(13, 6.2), layout="constrained")
    upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=(1.2, 1)))
    axes = upper.subplots(1, 2)
    mo.plot.curves(
        {"validation loss": (np.exp(GRID), np.asarray(grid_losses))},
        title="One decay for all: the validation loss of a grid",
        xlabel="decay",
        axes=axes[0],
    )
    base = rows["best of 21 shared decays"]
    mo.plot.curves(
        {"validation": solution.history.outer_loss, "test": test_losses},
        levels={
            "best of the grid, validation": base["valid_loss"],
            "best of the grid, test": base["test_loss"],
        },
        title="One decay for each parameter, while tuned",
        xlabel="outer step",
        axes=axes[1],
    )
    side = int(np.sqrt(data.x.shape[1]))
    images = lower.subplots(len(weights), data.num_classes)
    for row, (name, weight) in zip(images, weights.items()):
        limit = np.quantile(np.abs(weight), 0.98)
        for label, axis in enumerate(row):
            shown = weight[:, label].reshape(side, side)
            axis.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for label, axis in enumerate(images[0]):
        axis.set_title(str(label))
    lower.suptitle("Weights of each class: red for it, blue against it, white none")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "tune_regularization.png", dpi=130)


def main():
    arguments = parse_arguments("tune_regularization", str(__doc__), steps=60)
    steps = 3 if arguments.quick else arguments.steps
    num_splits = 1 if arguments.quick else NUM_SPLITS
    data = load(arguments.data)
    sizes = (150, 750, 897) if arguments.data == "digits" else (500, 2500, 5000)
    table, metrics = [], {}
    first = None
    for split in range(arguments.seed, arguments.seed + num_splits):
        print(f"\nSplit {split}")
        rows, drawn = run_split(data, sizes, split, steps)
        first = first or drawn
        metrics[f"split {split}"] = rows
        for name, row in rows.items():
            table.append(
                (
                    f"{split}: {name}",
                    f"{row['train_loss']:.3f}",
                    f"{row['valid_loss']:.3f}",
                    f"{row['test_loss']:.3f}",
                    f"{row['gap']:+.3f}",
                    f"{100 * row['test_accuracy']:.1f} %",
                )
            )
    print_table(
        f"{data.name}: {sizes[0]} training, {sizes[1]} validation, {sizes[2]} test images",
        ("split: decay", "train", "valid", "test", "gap", "test accuracy"),
        table,
    )
    print(
        "\nThe gap is the test loss minus the validation loss. With one decay for each "
        "parameter\nthe validation set is overfitted: its loss is no estimate of the "
        "test loss any more."
    )
    assert first is not None
    picture(arguments.out, data, *first)
    write_metrics(arguments.out, {"data": data.name, "results": metrics})


if __name__ == "__main__":
    main()
