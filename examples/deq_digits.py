"""Classifies digits by an equilibrium layer: what training takes, and how it fails.

The network is one layer of 64 units that is as deep as it takes to converge, and a linear
readout. It is trained in several ways: with its derivative at the fixed point (implicit),
by the last step alone, along the path of the solver (unrolled), and along a path that is
undone on the way back (reversible), each with the spectral norm of its weights bounded.
Then without that bound, where training lets the spectral radius of the Jacobian grow until
there is no fixed point that a solver can reach; with all checks switched off, as is common;
and with a penalty on the Jacobian in place of the bound.

A training step whose solve failed, or whose derivative did not pass its checks, is not
taken; the table counts these. The picture shows the spectral radius in training, the steps
of the solver, and for layers of a fixed number of evaluations of the cell the accuracy and
the memory of a gradient.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from _shared import load, parse_arguments, print_table, temporary_memory, write_metrics

import metaopt as mo


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


WIDTH, BATCH_SIZE, RATE = 64, 128, 3e-3
RTOL, MAX_STEPS, UNROLLED_STEPS = 1e-5, 60, 30
BOUND, PENALTY = 0.9, 0.2
EVALUATIONS, DEPTHS = (2, 4, 8, 16), (10, 50, 200, 800)


class Cell(eqx.Module):
    """One affine map and a tanh, whose weights are free to grow."""

    hidden: eqx.nn.Linear
    inputs: eqx.nn.Linear

    def __init__(self, num_inputs, key):
        keys = jax.random.split(key)
        hidden = eqx.nn.Linear(WIDTH, WIDTH, use_bias=False, key=keys[0])
        self.hidden = mo.nn.bound_spectral_norm(hidden, BOUND)
        self.inputs = eqx.nn.Linear(num_inputs, WIDTH, key=keys[1])

    def __call__(self, z, x):
        return jnp.tanh(self.hidden(z) + self.inputs(x))


class Classifier(eqx.Module):
    layer: mo.nn.Equilibrium
    readout: eqx.nn.Linear

    def __call__(self, x):
        z, info = self.layer(x)
        return self.readout(z), z, info


class Way(NamedTuple):
    """One way to train."""

    bounded: bool
    solver: mo.extend.AbstractSolver
    adjoint: mo.extend.AbstractAdjoint
    penalty: float = 0.0


IMPLICIT = mo.ImplicitAdjoint(
    mo.linear.LinearFixedPoint(mo.Anderson(rtol=1e-4)), inner_rtol=1e-2
)
ANDERSON = mo.Anderson(MAX_STEPS, rtol=RTOL)
PLAIN = mo.Picard(UNROLLED_STEPS, rtol=None)
# A number of steps asked for by name is no failure, and any solution is accepted.
FIXED = mo.Anderson(UNROLLED_STEPS, rtol=None)
UNCHECKED = mo.ImplicitAdjoint(mo.linear.LinearFixedPoint(FIXED), inner_rtol=jnp.inf)
WAYS = {
    "implicit": Way(True, ANDERSON, IMPLICIT),
    "last step alone": Way(True, ANDERSON, mo.ImplicitAdjoint(mo.Neumann(0))),
    f"unrolled, {UNROLLED_STEPS} steps": Way(True, PLAIN, mo.UnrolledAdjoint()),
    "reversible, 6 steps": Way(True, mo.ReversiblePicard(6), mo.ReversibleAdjoint()),
    "implicit, no bound": Way(False, ANDERSON, IMPLICIT),
    "implicit, no bound, no checks": Way(False, FIXED, UNCHECKED),
    "implicit, penalty": Way(False, ANDERSON, IMPLICIT, PENALTY),
    f"unrolled, {UNROLLED_STEPS} steps, no bound": Way(False, PLAIN, mo.UnrolledAdjoint()),
}
# Layers that are trained with a number of evaluations of the cell, and derive what that
# comes to.
ROUGH = mo.ImplicitAdjoint(
    mo.linear.LinearFixedPoint(mo.Anderson(rtol=1e-4)), inner_rtol=jnp.inf
)
OF_LENGTH: dict[str, Callable[[int], Way]] = {
    "implicit": lambda n: Way(True, mo.Anderson(n, rtol=None), ROUGH),
    # Each of its steps is two evaluations.
    "reversible": lambda n: Way(True, mo.ReversiblePicard(n // 2), mo.ReversibleAdjoint()),
    "unrolled": lambda n: Way(True, mo.Picard(n, rtol=None), mo.UnrolledAdjoint()),
}


def classifier(way, data, key):
    keys = jax.random.split(key)
    num_inputs = data.x.shape[1]
    if way.bounded:
        cell = mo.nn.ContractiveCell(num_inputs, WIDTH, bound=BOUND, key=keys[0])
    else:
        cell = Cell(num_inputs, keys[0])
    layer = mo.nn.Equilibrium(
        cell,
        lambda x: jnp.zeros(WIDTH),
        solver=way.solver,
        adjoint=way.adjoint,
        throw=False,
    )
    return Classifier(layer, eqx.nn.Linear(WIDTH, data.num_classes, key=keys[1]))


def cross_entropy(model, batch, penalty, key):
    """The loss, and how the solves went."""
    x, y = batch
    logits, z, info = jax.vmap(model)(x)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y)
    loss = jnp.mean(losses)
    if penalty:
        keys = jax.random.split(key, len(x))
        rows = jax.vmap(lambda *args: mo.nn.jacobian_penalty(model.layer.cell, *args))
        # The sum of all squares is this times the width.
        loss = loss + penalty * WIDTH * jnp.mean(rows(z, x, keys))
    return loss, info


@eqx.filter_jit
def radius(model, x):
    """The largest spectral radius over some inputs, at their fixed points."""
    _, z, _ = jax.vmap(model)(x)
    measure = lambda z, x: mo.nn.spectral_radius(model.layer.cell, z, x, num_steps=60)
    return jnp.max(jax.vmap(measure)(z, x))


@eqx.filter_jit
def evaluate(model, batch):
    """The accuracy, and the mean number of steps of the solver."""
    logits, _, info = jax.vmap(model)(batch[0])
    right = jnp.argmax(logits, axis=-1) == batch[1]
    return jnp.mean(right), jnp.mean(info.num_steps)


def train(way, data, num_steps, key, watched) -> tuple[Classifier, dict]:
    """Train a classifier, and say how it went."""
    model_key, batch_key = jax.random.split(key)
    model = classifier(way, data, model_key)
    optimizer = optax.apply_if_finite(optax.adam(RATE), max_consecutive_errors=10**6)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    x, y = jnp.asarray(data.x), jnp.asarray(data.y)

    @eqx.filter_jit
    def step(model, state, key):
        rows = jax.random.choice(key, len(x), (BATCH_SIZE,), replace=False)
        loss_and_gradient = eqx.filter_value_and_grad(cross_entropy, has_aux=True)
        (loss, info), gradient = loss_and_gradient(
            model, (x[rows], y[rows]), way.penalty, key
        )
        updates, state = optimizer.update(gradient, state)
        failed = jnp.mean(info.result != mo.RESULTS.successful)
        not_taken = ~optax.tree.get(state, "last_finite")
        numbers = loss, jnp.mean(info.num_steps), failed, not_taken
        return eqx.apply_updates(model, updates), state, numbers

    # Compiled beforehand, so that the seconds are those of training.
    step(*step(model, state, batch_key)[:2], batch_key)
    radius(model, watched)
    rows, radii, begin = [], [], time.process_time()
    every = max(1, num_steps // 20)
    for i in range(num_steps):
        if i % every == 0:
            paused = time.process_time()
            radii.append((i, float(radius(model, watched))))
            begin += time.process_time() - paused
        model, state, numbers = step(model, state, jax.random.fold_in(batch_key, i))
        rows.append([float(number) for number in numbers])
    seconds = time.process_time() - begin
    radii.append((num_steps, float(radius(model, watched))))
    losses, solver_steps, failed, skipped = np.asarray(rows).T
    return model, {
        "loss": losses.tolist(),
        "solver_steps": solver_steps.tolist(),
        "unsolved": failed.tolist(),
        "steps_not_taken": int(skipped.sum()),
        "spectral_radius": radii,
        "seconds": seconds,
    }


def memory(way, data, key) -> float:
    """MiB of a gradient."""
    batch = jnp.asarray(data.x[:BATCH_SIZE]), jnp.asarray(data.y[:BATCH_SIZE])
    arrays, static = eqx.partition(classifier(way, data, key), eqx.is_inexact_array)

    def loss(arrays, batch):
        return cross_entropy(eqx.combine(arrays, static), batch, 0.0, key)[0]

    return temporary_memory(jax.grad(loss), arrays, batch)


def picture(out, runs, accuracies, sizes):
    figure, grid = plt.subplots(2, 2, figsize=(13, 7.6), layout="constrained")
    shown = {name: runs[name] for name in runs if name.startswith("implicit")}
    radii = {
        name: tuple(np.asarray(run["spectral_radius"]).T) for name, run in shown.items()
    }
    smooth = {
        name: np.convolve(run["solver_steps"], np.ones(10) / 10, "valid")
        for name, run in shown.items()
    }
    over_training = {
        "largest spectral radius of the Jacobian": (radii, {"no contraction": 1}),
        "steps of the solver": (smooth, {"the most it takes": MAX_STEPS}),
    }
    for axes, (title, (lines, levels)) in zip(grid[0], over_training.items()):
        options = {"title": title, "xlabel": "training step", "axes": axes}
        mo.plot.curves(lines, levels=levels, **options)
    by_evaluations = {
        "test accuracy (%), trained with so many": accuracies,
        "memory of a gradient (MiB)": sizes,
    }
    for axes, (title, table) in zip(grid[1], by_evaluations.items()):
        lines = {name: (list(row), list(row.values())) for name, row in table.items()}
        options = {"title": title, "xlabel": "evaluations of the cell", "axes": axes}
        mo.plot.curves(lines, **options)
        counts = list(next(iter(table.values())))
        axes.set_xscale("log")
        axes.set_xticks(counts, counts)
        axes.minorticks_off()
    grid[1, 0].set_ylim(90, 100)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "deq_digits.png", dpi=130)


def print_rows(title, table, digits):
    header = ["", *(f"{count}" for count in next(iter(table.values())))]
    rows = [
        [name, *(f"{value:.{digits}f}" for value in row.values())]
        for name, row in table.items()
    ]
    print_table(title, header, rows)


def main():
    arguments = parse_arguments("deq_digits", str(__doc__), steps=400, data=("digits",))
    num_steps = 5 if arguments.quick else arguments.steps
    train_data, test_data = mo.datasets.split(
        load(arguments.data), (1200, 597), arguments.seed
    )
    test = jnp.asarray(test_data.x), jnp.asarray(test_data.y)
    key = jax.random.key(arguments.seed)
    runs, table = {}, []
    # Each takes seconds to compile.
    names = list(WAYS)[::2] if arguments.quick else list(WAYS)
    for name, way in ((name, WAYS[name]) for name in names):
        model, run = train(way, train_data, num_steps, key, test[0][:32])
        accuracy, solver_steps = evaluate(model, test)
        run |= {"accuracy": float(accuracy), "test_solver_steps": float(solver_steps)}
        runs[name] = run
        table.append(
            [
                name,
                f"{100 * run['accuracy']:.1f} %",
                f"{run['test_solver_steps']:.1f}",
                f"{run['spectral_radius'][-1][1]:.2f}",
                f"{run['steps_not_taken']}",
                f"{run['seconds']:.1f}",
            ]
        )
    header = ["trained", "test accuracy", "solver steps", "radius", "not taken", "CPU s"]
    print_table(f"{num_steps} training steps on 1200 digits", header, table)
    few = 1 if arguments.quick else None
    accuracies: dict[str, dict[int, float]] = {name: {} for name in OF_LENGTH}
    sizes: dict[str, dict[int, float]] = {name: {} for name in OF_LENGTH}
    for name, of_length in OF_LENGTH.items():
        for count in EVALUATIONS[:few]:
            model, _ = train(of_length(count), train_data, num_steps, key, test[0][:32])
            accuracies[name][count] = 100 * float(evaluate(model, test)[0])
        for count in DEPTHS[: few and 2]:
            sizes[name][count] = memory(of_length(count), train_data, key)
    print_rows(
        "Test accuracy (%), trained with so many evaluations of the cell", accuracies, 1
    )
    print_rows("MiB of a gradient by evaluations of the cell", sizes, 2)
    picture(arguments.out, runs, accuracies, sizes)
    metrics = {"runs": runs, "accuracy_by_evaluations": accuracies, "memory": sizes}
    write_metrics(arguments.out, metrics)


if __name__ == "__main__":
    main()
