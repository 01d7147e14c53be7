"""Predicts the next character of a text by an equilibrium layer, beside explicit networks.

The cell is causal: each position sees itself and the three before it, so that an explicit
layer sees four characters, and the fixed point all of the window. Its matrix keeps a norm
bound, with which there is one fixed point for every text. It is trained by the derivative
at the fixed point (implicit), along a path that is undone on the way back (reversible), and
along the path of the solver (unrolled); the others are explicit networks of as many
parameters, with one to four layers, and plain counts of characters.

The table has bits per character, on text that no training saw: lower is better. The
picture shows training, what the equilibrium networks make of fewer or more evaluations of
the cell than they were trained with, and the memory of a gradient.

The default text are the help pages that ship with Python; `--data tiny_shakespeare` is
the real run.
"""

import pydoc_data.topics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from _shared import make_parser, parsed, print_table, temporary_memory, write_metrics

import metaopt as mo


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


WIDTH, NUM_LAGS, BOUND = 128, 4, 0.9
LENGTH, BATCH_SIZE, RATE = 64, 16, 1e-2
EVALUATIONS = 12  # of the cell, where their number is chosen
NUM_CONTEXT = 5  # characters that are counted together, at most
NUM_TESTED = 1024  # windows
TRIED = (2, 4, 8, 12, 16, 24, 32)
DEPTHS = (8, 32, 128)
BITS = 1 / np.log(2)


def lagged(z):
    """The states of a position and of those before it, side by side: `(length,
    NUM_LAGS * width)`, with zeros before the text."""
    padded = jnp.pad(z, ((NUM_LAGS - 1, 0), (0, 0)))
    lags = range(NUM_LAGS - 1, -1, -1)
    return jnp.concatenate([padded[lag : lag + len(z)] for lag in lags], axis=1)


class Cell(eqx.Module):
    """A causal convolution and a tanh, for all positions of a window."""

    weight: jax.Array

    def __init__(self, width, key):
        shape = NUM_LAGS * width, width
        self.weight = jax.random.normal(key, shape) / shape[0] ** 0.5

    def __call__(self, z, x):
        return jnp.tanh(lagged(z) @ self.weight + x)


class Body(NamedTuple):
    """What is between the embedding and the readout."""

    width: int
    num_layers: int = 1
    solver: mo.extend.AbstractSolver | None = None
    adjoint: mo.extend.AbstractAdjoint = mo.UnrolledAdjoint()


class Model(eqx.Module):
    embedding: jax.Array
    cells: list[Cell]
    readout: eqx.nn.Linear
    body: Body

    def __init__(self, body, num_characters, key):
        embedding, cells, readout = jax.random.split(key, 3)
        width = body.width
        self.embedding = jax.random.normal(embedding, (num_characters, width)) / 2
        self.cells = [Cell(width, key) for key in jax.random.split(cells, body.num_layers)]
        self.readout = eqx.nn.Linear(width, num_characters, key=readout)
        self.body = body

    def __call__(self, characters):
        """Logits of the next character at each place of a window."""
        x = self.embedding[characters]
        z, info = self.explicit(x) if self.body.solver is None else self.implicit(x)
        return jax.vmap(self.readout)(z), info

    def explicit(self, x):
        z = jnp.tanh(x)
        for cell in self.cells:
            z = cell(z, x)
        return z, None

    def implicit(self, x):
        # The part of the matrix for the same position has a norm below one: given those
        # before it, each position is a contraction, whatever the other parts are.
        cell = mo.nn.bound_spectral_norm(self.cells[0], BOUND)
        solver, adjoint = self.body.solver, self.body.adjoint
        assert solver is not None
        return mo.nn.Equilibrium(cell, solver=solver, adjoint=adjoint, throw=False)(x)


IMPLICIT = mo.ImplicitAdjoint(
    mo.linear.LinearFixedPoint(mo.Picard(64, rtol=1e-2)), inner_rtol=0.1
)
# News travel by a few positions in each step, whatever the solver: there are cells of this
# kind, early in training, on which Anderson's method stalls.
PLAIN = mo.Picard(64, rtol=1e-3)
PAIRS = mo.ReversiblePicard(EVALUATIONS // 2)
PATH = mo.Picard(EVALUATIONS, rtol=None)
BODIES = {
    "explicit, 1 layer": Body(WIDTH),
    "explicit, 2 layers": Body(90, 2),
    "explicit, 4 layers": Body(63, 4),
    "equilibrium, implicit": Body(WIDTH, 1, PLAIN, IMPLICIT),
    "equilibrium, reversible": Body(WIDTH, 1, PAIRS, mo.ReversibleAdjoint()),
    "equilibrium, unrolled": Body(WIDTH, 1, PATH, mo.UnrolledAdjoint()),
}


def losses(model, windows):
    """Bits for each character of windows but the first ones, and how the solves went."""
    logits, info = jax.vmap(model)(windows[:, :-1])
    loss = optax.losses.softmax_cross_entropy_with_integer_labels
    return BITS * loss(logits, windows[:, 1:]), info


def mean_loss(model, windows):
    each, info = losses(model, windows)
    return jnp.mean(each), info


def draw(text, key):
    begins = jax.random.randint(key, (BATCH_SIZE, 1), 0, len(text) - LENGTH)
    return text[begins + jnp.arange(LENGTH + 1)]


def train(body, text, num_characters, num_steps, key) -> tuple[Model, dict]:
    """Train a model, and say how it went."""
    model_key, batch_key = jax.random.split(key)
    model = Model(body, num_characters, model_key)
    schedule = optax.cosine_decay_schedule(RATE, num_steps, alpha=0.05)
    optimizer = optax.apply_if_finite(optax.adam(schedule), max_consecutive_errors=10**6)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, text, key):
        loss_and_gradient = eqx.filter_value_and_grad(mean_loss, has_aux=True)
        (loss, info), gradient = loss_and_gradient(model, draw(text, key))
        updates, state = optimizer.update(gradient, state)
        steps = jnp.zeros(()) if info is None else jnp.mean(info.num_steps)
        not_taken = ~optax.tree.get(state, "last_finite")
        return eqx.apply_updates(model, updates), state, (loss, steps, not_taken)

    # Compiled beforehand, so that the seconds are those of training.
    step(model, state, text, batch_key)
    rows, begin = [], time.process_time()
    for i in range(num_steps):
        model, state, numbers = step(model, state, text, jax.random.fold_in(batch_key, i))
        rows.append([float(number) for number in numbers])
    seconds = time.process_time() - begin
    loss, solver_steps, not_taken = np.asarray(rows).T
    return model, {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.cells)),
        "loss": loss.tolist(),
        "solver_steps": solver_steps.tolist(),
        "steps_not_taken": int(not_taken.sum()),
        "seconds": seconds,
    }


@eqx.filter_jit
def _score(model, windows):
    each, info = losses(model, windows)
    steps = jnp.zeros(()) if info is None else jnp.mean(info.num_steps)
    return jnp.mean(each[:, LENGTH // 2 :]), steps


def score(model, windows):
    """Bits per character over the second halves of windows, and the solver's steps."""
    batches = np.split(windows, range(BATCH_SIZE, len(windows), BATCH_SIZE))
    full = [batch for batch in batches if len(batch) == BATCH_SIZE]
    scores = [[float(number) for number in _score(model, batch)] for batch in full]
    return [float(number) for number in np.mean(scores, axis=0)]


def test_windows(text):
    """Windows whose second halves are one after the other in the text."""
    begins = np.arange(0, len(text) - LENGTH - 1, LENGTH // 2)[:NUM_TESTED]
    return np.asarray(text)[begins[:, None] + np.arange(LENGTH + 1)]


def at_budgets(model, windows, tried) -> list[float]:
    """Bits per character after each number of evaluations of the cell."""
    reversible = isinstance(model.body.solver, mo.ReversiblePicard)
    found = []
    for count in tried:
        solver = mo.Picard(count, rtol=None)
        if reversible:
            solver = mo.ReversiblePicard(count // 2)
        budgeted = eqx.tree_at(
            lambda model: model.body, model, model.body._replace(solver=solver)
        )
        found.append(score(budgeted, windows)[0])
    return found


def counted(text, tested, num_characters) -> float:
    """Bits per character of a mixture of counts, from none to `NUM_CONTEXT` characters
    (Witten and Bell, 1991)."""
    text, tested = np.asarray(text, np.int64), np.asarray(tested, np.int64)
    probability = np.full(len(tested) - NUM_CONTEXT, 1 / num_characters)
    for order in range(NUM_CONTEXT + 1):
        # Each context, and each with what follows it, as one whole number.
        powers = num_characters ** np.arange(order, -1, -1)
        view = np.lib.stride_tricks.sliding_window_view
        known = view(text, order + 1) @ powers
        asked = view(tested[NUM_CONTEXT - order :], order + 1) @ powers
        pairs, counts = np.unique(known, return_counts=True)
        contexts, where, kinds = np.unique(
            pairs // num_characters, return_inverse=True, return_counts=True
        )
        totals = np.bincount(where, counts)
        count = _looked_up(pairs, counts, asked)
        total = _looked_up(contexts, totals, asked // num_characters)
        kind = _looked_up(contexts, kinds, asked // num_characters)
        mixed = (count + kind * probability) / np.maximum(total + kind, 1)
        probability = np.where(total > 0, mixed, probability)
    return float(-np.mean(np.log2(probability)))


def _looked_up(keys, values, asked):
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[place] == asked, values[place], 0)


def memory(num_characters, key, depths) -> dict[str, list[float]]:
    """MiB of a gradient, for each depth."""
    makers: dict[str, Callable] = {
        "implicit": lambda k: (mo.Picard(k, rtol=None), IMPLICIT),
        "reversible": lambda k: (mo.ReversiblePicard(k // 2), mo.ReversibleAdjoint()),
        "unrolled": lambda k: (mo.Picard(k, rtol=None), mo.UnrolledAdjoint()),
    }
    windows = jnp.zeros((BATCH_SIZE, LENGTH + 1), int)
    table = {}
    for name, make in makers.items():
        table[name] = []
        for depth in depths:
            model = Model(Body(WIDTH, 1, *make(depth)), num_characters, key)
            arrays, static = eqx.partition(model, eqx.is_inexact_array)

            def loss(arrays, windows, static=static):
                return mean_loss(eqx.combine(arrays, static), windows)[0]

            table[name].append(temporary_memory(jax.grad(loss), arrays, windows))
    return table


def picture(out, runs, tried, sizes, depths):
    figure, axes = plt.subplots(1, 3, figsize=(18, 4.2), layout="constrained")
    width = min(100, len(next(iter(runs.values()))["loss"]))
    smooth = {
        name: np.convolve(run["loss"], np.ones(width) / width, "valid")
        for name, run in runs.items()
    }
    mo.plot.curves(
        smooth,
        title="bits per character in training",
        xlabel="training step",
        axes=axes[0],
    )
    mo.plot.curves(
        {n: (tried, run["at_budgets"]) for n, run in runs.items() if "at_budgets" in run},
        levels={n: run["test"] for n, run in runs.items() if "at_budgets" not in run},
        title="bits per character on the test",
        xlabel="evaluations of the cell",
        axes=axes[1],
    )
    mo.plot.curves(
        {name: (depths, row) for name, row in sizes.items()},
        title="memory of a gradient (MiB)",
        xlabel="evaluations of the cell",
        axes=axes[2],
    )
    best = min(run["test"] for run in runs.values())
    for axis in axes[:2]:
        axis.set_ylim(best - 0.25, best + 1.25)
    for axis, counts in zip(axes[1:], (tried, depths)):
        axis.set_xscale("log")
        axis.set_xticks(counts, counts)
        axis.minorticks_off()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "deq_text.png", dpi=130)


def load_text(name) -> mo.datasets.TextData:
    if name == "tiny_shakespeare":
        return mo.datasets.load_tiny_shakespeare()
    pages: dict[str, str] = pydoc_data.topics.topics
    return mo.datasets.TextData.from_text("".join(pages.values()), "Python's help")


def main():
    parser = make_parser("deq_text", str(__doc__), steps=3000, data=())
    parser.add_argument(
        "--data",
        choices=("python_help", "tiny_shakespeare"),
        default="python_help",
        help="help pages ship with Python; the other is read from $METAOPT_DATA",
    )
    arguments = parsed(parser)
    num_steps = 5 if arguments.quick else arguments.steps
    data = load_text(arguments.data)
    text, _, tested = (jnp.asarray(part.characters) for part in data.split())
    windows = test_windows(tested)[: BATCH_SIZE if arguments.quick else None]
    tried = TRIED[:1] if arguments.quick else TRIED
    num_characters = len(data.alphabet)
    key = jax.random.key(arguments.seed)
    runs: dict[str, dict[str, Any]] = {}
    table = []
    for name, body in BODIES.items():
        model, run = train(body, text, num_characters, num_steps, key)
        run["test"], run["test_solver_steps"] = score(model, windows)
        if body.solver is not None:
            run["at_budgets"] = at_budgets(model, windows, tried)
        runs[name] = run
        per_step = 2 if isinstance(body.solver, mo.ReversiblePicard) else 1
        evaluations = per_step * np.mean(run["solver_steps"]) or body.num_layers
        table.append(
            [
                name,
                f"{run['test']:.3f}",
                f"{run['parameters']}",
                f"{evaluations:.1f}",
                f"{run['steps_not_taken']}",
                f"{run['seconds']:.0f}",
            ]
        )
    counts = counted(text, tested, num_characters)
    table.append([f"counts of {NUM_CONTEXT + 1} characters", f"{counts:.3f}", *"----"])
    header = ["", "bits", "parameters", "evaluations", "not taken", "CPU s"]
    title = f"{num_steps} training steps on {len(text)} characters of {data.name}"
    print_table(title, header, table)
    depths = DEPTHS[:2] if arguments.quick else DEPTHS
    sizes = memory(num_characters, key, depths)
    print_table(
        "MiB of a gradient by evaluations of the cell",
        ["", *(f"{depth}" for depth in depths)],
        [[name, *(f"{size:.2f}" for size in row)] for name, row in sizes.items()],
    )
    picture(arguments.out, runs, tried, sizes, depths)
    metrics = {"runs": runs, "memory": sizes, "depths": depths, "counts": counts}
    write_metrics(arguments.out, metrics | {"tried": tried})


if __name__ == "__main__":
    main()
