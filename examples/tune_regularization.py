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
import matplotlib.colors
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
    rows = {
        "best of 21 shared decays": measure(fit(inner, best, train), parts),
        "one decay per parameter": measure(fit(inner, solution.hyper, train), parts),
    }
    return rows, solution, test_losses, losses


def picture(out, data, grid_losses, solution, test_losses, rows):
    figure = plt.figure(figsize=(13, 6.4), layout="constrained")
    upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=(1.45, 1)))
    axes = upper.subplots(1, 2)
    axes[0].plot(GRID / np.log(10), grid_losses, "o-", color="C0")
    axes[0].set(
        title="One shared decay: the grid",
        xlabel="decay, powers of ten",
        ylabel="validation loss",
    )
    base = rows["best of 21 shared decays"]
    axes[1].plot(solution.history.outer_loss, color="C0", label="validation")
    axes[1].plot(test_losses, color="C3", label="test")
    axes[1].axhline(base["valid_loss"], color="C0", linestyle=":", linewidth=1.2)
    axes[1].axhline(base["test_loss"], color="C3", linestyle=":", linewidth=1.2)
    axes[1].set(
        title="One decay per parameter (dotted: the best of the grid)",
        xlabel="outer step",
        ylabel="loss",
    )
    axes[1].set_ylim(bottom=0)
    axes[1].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    side = int(np.sqrt(data.x.shape[1]))
    decays = np.asarray(solution.hyper["weight"]) / np.log(10)
    images = lower.subplots(1, data.num_classes)
    colors = matplotlib.colors.Normalize(*np.quantile(decays, (0.02, 0.98)))
    for label, axis in enumerate(images):
        axis.imshow(decays[:, label].reshape(side, side), cmap="viridis", norm=colors)
        axis.set(title=str(label), xticks=[], yticks=[])
    lower.suptitle("Learned decay of each weight, by class (powers of ten)")
    lower.colorbar(plt.cm.ScalarMappable(colors, "viridis"), ax=images, shrink=0.8)
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
        rows, solution, test_losses, grid_losses = run_split(data, sizes, split, steps)
        first = first or (grid_losses, solution, test_losses, rows)
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
