"""Counts the work in the compiled programs of small hypergradients.

Each workload is written by hand in JAX, and computed by metaopt in three ways: the gradient
alone (`guard=False`), with its verdict (as it comes: NaN where a check refuses it), and
with every number of the report. Nothing is timed, so there is no noise. For each program:

- multiplications in matrix products, in thousands;
- passes: instructions outside of fusions, and fusions, that read or write an array of 64
  entries or more; and reductions. Both depend on what XLA fuses, and so on its version;
- operations and bytes by XLA's own analysis, in thousands;
- the temporary memory that XLA plans for, in KiB;
- traces of the inner and the outer loss, each a run by Python. In MAML one loss is both; in
  an equilibrium the cell takes the place of the inner loss.

In brackets stands the ratio to the program by hand. In the first three columns the body of
a loop counts as often as it runs, and as often as it may run in conjugate gradients. It
counts once in XLA's analysis, and in an equilibrium, which stops where it has converged.
Of the branches of a condition the cheapest counts. Convolutions and calls of other
libraries hide products: then the multiplications have a `+`.

    python benchmarks/count_program.py [--only TEXT]
"""

import argparse
import functools as ft
from collections.abc import Callable
from typing import Any

import few_shot
import jax
import jax.numpy as jnp
from _cases import (
    ALONE,
    Case,
    decayed,
    decays,
    distance,
    implicit,
    logistic,
    Loss,
    NUM_LINEAR_STEPS,
    penalised,
    PLAIN,
    quadratic,
    REPORTED,
    unrolled,
)
from _counted import Counted
from _network import cross_entropy
from _work import check_counter, Work
from compile_cost import Cell, tanh_cell
from equilibrium import (
    equilibrium_layer,
    HISTORY,
    MAX_STEPS,
    RTOL,
    textbook,
    textbook_anderson,
    textbook_picard,
)

import metaopt as mo


NAMES = {PLAIN: "by hand", ALONE: ALONE, "metaopt": "with verdict", REPORTED: REPORTED}
HEADER = (
    "thousand products", "passes", "reductions", "thousand operations, bodies once",
    "thousand bytes, bodies once", "temporary KiB", "traces",
)  # fmt: skip


def maml(inner_loss: Loss, outer_loss: Loss) -> Case:
    """Five steps on each of 25 sine waves; the loss of a model is inner and outer."""
    ours = ft.partial(few_shot.ours, inner_loss, 0.01, 5)
    contenders = {
        PLAIN: few_shot.by_hand(inner_loss, 0.01, 5),
        ALONE: ours(guard=False),
        "metaopt": ours(),
        REPORTED: ours(whole=True),
    }
    return contenders, few_shot.wave_tasks()


def equilibrium(
    method: str, cell: Callable[..., jax.Array], outer_loss: Callable[..., jax.Array]
) -> Case:
    """The derivative through a fixed point, both ways by the same method."""
    solver, by_hand = {
        "Picard": (mo.Picard(MAX_STEPS, rtol=RTOL), textbook_picard),
        "Anderson": (
            mo.Anderson(MAX_STEPS, rtol=RTOL, history_size=HISTORY),
            textbook_anderson,
        ),
    }[method]
    hand_written, _ = textbook(by_hand)

    def gradient(layer, whole=False):
        def value(weights, x):
            z, info = layer(Cell(cell, weights), x)
            return outer_loss(z), info

        with_info = jax.grad(value, has_aux=True)
        return with_info if whole else lambda *args: with_info(*args)[0]

    ours = lambda cell, x: equilibrium_layer(cell, solver, solver, throw=False)(x)
    weights = 0.1 * jax.random.normal(jax.random.key(0), (32, 32))
    x = jax.random.normal(jax.random.key(1), (8, 32))
    contenders = {
        PLAIN: gradient(lambda cell, x: (hand_written(cell, x), None)),
        "metaopt": gradient(ours),
        REPORTED: gradient(ours, whole=True),
    }
    return contenders, (weights, x)


def mean_square(z: jax.Array) -> jax.Array:
    return jnp.mean(z**2)


LOGISTIC, DECAYS = (penalised, logistic), (quadratic, distance)
NETWORK, WAVES = (decayed, cross_entropy), (few_shot.squared_error, few_shot.squared_error)
LAYER = tanh_cell, mean_square
# The function that makes each, its two losses, and the steps of loops that may stop early.
WORKLOADS: dict[str, tuple[Callable[..., Case], tuple[Loss, Loss], int]] = {
    "logistic, 20 steps of CG": (ft.partial(implicit, 0), LOGISTIC, NUM_LINEAR_STEPS),
    "100k decays, 10 steps of CG": (ft.partial(decays, 10**5, "CG"), DECAYS, 10),
    "100k decays, 10 terms of Neumann": (ft.partial(decays, 10**5, "Neumann"), DECAYS, 10),
    "network, 10 steps of momentum": (
        ft.partial(unrolled, 10, "momentum", None),
        NETWORK,
        10,
    ),
    "network, 10 steps of Adam": (ft.partial(unrolled, 10, "Adam", None), NETWORK, 10),
    "MAML": (maml, WAVES, 5),
    "equilibrium, Picard": (ft.partial(equilibrium, "Picard"), LAYER, 1),
    "equilibrium, Anderson": (ft.partial(equilibrium, "Anderson"), LAYER, 1),
}


def measure(
    fn: Callable[..., Any], arguments: tuple[Any, ...], open_steps: int
) -> tuple[Work, list[float]]:
    """Count the work of a program; also return its numbers in the order of the table."""
    # Else metaopt compiles nothing anew for a second program that shares a part.
    jax.clear_caches()
    work = Work(fn, *arguments, open_steps=open_steps)
    memory, analysis = work.compiled.memory_analysis(), work.compiled.cost_analysis()
    assert memory is not None and analysis is not None
    return work, [
        work.tally.multiplications / 1e3,
        work.tally.passes,
        work.tally.sums,
        analysis["flops"] / 1e3,
        analysis["bytes accessed"] / 1e3,
        memory.temp_size_in_bytes / 2**10,
    ]


def cell_of(number: float, by_hand: float, mark: str = "") -> str:
    """Format a number and, in brackets, its ratio to that of the program by hand."""
    digits = 1 if 0 < number < 100 and number != int(number) else 0
    ratio = f" ({number / by_hand:.2f})" if by_hand else ""
    return f"{number:,.{digits}f}{mark}{ratio}"


def print_workload(name: str) -> None:
    make, losses, open_steps = WORKLOADS[name]
    inner, outer = map(Counted, losses)
    contenders, arguments = make(inner, outer)
    by_hand: list[float] = []
    for contender, title in NAMES.items():
        if contender not in contenders:
            continue
        inner.count = outer.count = 0
        work, numbers = measure(contenders[contender], arguments, open_steps)
        by_hand = by_hand or numbers
        marks = ["+" if work.unknown else "", *[""] * (len(numbers) - 1)]
        cells = map(cell_of, numbers, by_hand, marks)
        traces = f"{inner.count}, {outer.count}"
        print(f"| {name}, {title} |", " | ".join([*cells, traces]), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", default="", help="workloads whose name holds this text")
    only = parser.parse_args().only
    check_counter()
    print(f"Counted, and over the same by hand, jax {jax.__version__}\n")
    print("| |", " | ".join(HEADER), "|")
    print("|---|" + "--:|" * len(HEADER))
    for name in WORKLOADS:
        if only in name:
            print_workload(name)


if __name__ == "__main__":
    main()
