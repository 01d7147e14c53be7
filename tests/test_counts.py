"""The work of a hypergradient, counted in the program that XLA makes of it.

Counted are matrix products, which do not depend on what XLA fuses, and traces of the losses
of the user. The bounds are what is needed: another gradient, product or trace exceeds them.
`benchmarks/count_program.py` prints more counts, of larger problems.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import metaopt as mo
from our_source import import_benchmark


Work, Counted = import_benchmark("_work").Work, import_benchmark("_counted").Counted

ROWS, COLUMNS, WIDTH, NUM_TASKS = 24, 5, 8, 3
NUM_STEPS = 4


def examples(shift: float, *axes: int) -> tuple[jax.Array, jax.Array]:
    x = jnp.sin(shift + jnp.arange(float(ROWS * COLUMNS))).reshape(*axes, COLUMNS)
    return x, jnp.cos(jnp.arange(float(ROWS))).reshape(axes)


# Each set of its own, so that XLA has no product to share.
TRAIN, VALID = examples(0.0, ROWS), examples(1.0, ROWS)
PARAMS = jnp.cos(jnp.arange(float(COLUMNS * WIDTH))).reshape(COLUMNS, WIDTH)


class Workload(NamedTuple):
    """Something to count.

    **Attributes:**

    - `gradient`: a function of `guard` and the arguments, which returns a pair of a
        gradient and a report.
    - `arguments`: arrays, so that nothing is computed when it is compiled.
    - `product`: the multiplications of one product of the data with the params.
    """

    gradient: Callable[..., tuple[Any, Any]]
    arguments: tuple[Any, ...]
    product: int


def hypergradient(problem, inner, adjoint):
    def gradient(guard, hyper, params, train, valid):
        return mo.hypergradient(
            *(problem, hyper, train, valid),
            params=params,
            inner=inner,
            adjoint=adjoint,
            throw=False,
            guard=guard,
        )

    return gradient


def squared_error(params, batch):
    """One hidden layer: its loss takes one product, and its gradient another."""
    x, y = batch
    return jnp.mean((jnp.sum(jnp.tanh(x @ params), -1) - y) ** 2)


def penalised(params, hyper, batch):
    return squared_error(params, batch) + jnp.sum(jnp.exp(hyper) * params**2)


def unpenalised(params, hyper, batch):
    return squared_error(params, batch)


def conjugate_gradients(inner, outer) -> Workload:
    """At params that are a solution, a fixed number of steps, whose body counts once."""
    linear = mo.CG(rtol=None, max_steps=5)
    adjoint = mo.ImplicitAdjoint(linear, inner_rtol=jnp.inf, error=None)
    gradient = hypergradient(mo.BilevelProblem(inner, outer), mo.Solved(), adjoint)
    arguments = jnp.zeros_like(PARAMS), PARAMS, TRAIN, VALID
    return Workload(gradient, arguments, ROWS * COLUMNS * WIDTH)


def momentum(inner, outer) -> Workload:
    descent = mo.Descent(optax.sgd(0.1, momentum=0.9), NUM_STEPS)
    problem = mo.BilevelProblem(inner, outer)
    gradient = hypergradient(problem, descent, mo.UnrolledAdjoint())
    arguments = jnp.zeros_like(PARAMS), PARAMS, TRAIN, VALID
    return Workload(gradient, arguments, ROWS * COLUMNS * WIDTH)


def maml(loss, _) -> Workload:
    learner = mo.few_shot.MAML(loss, mo.Descent(optax.sgd(0.1), NUM_STEPS))
    axes = NUM_TASKS, ROWS // NUM_TASKS

    def gradient(guard, params, tasks):
        out = learner.value_and_grad(params, tasks, throw=False, guard=guard)
        return out[1], out[2]

    tasks = mo.few_shot.Task(examples(0.0, *axes), examples(1.0, *axes))
    return Workload(gradient, (PARAMS, tasks), ROWS * COLUMNS * WIDTH)


class Cell(eqx.Module):
    fn: Any = eqx.field(static=True)
    weights: jax.Array

    def __call__(self, z, x):
        return self.fn(self.weights, z, x)


def tanh_cell(weights, z, x):
    return jnp.tanh(z @ weights + x)


def picard(cell, outer) -> Workload:
    """A layer, whose two loops count once; it has no gradient without its checks."""
    solver = mo.Picard(50, rtol=1e-4)
    adjoint = mo.ImplicitAdjoint(mo.linear.LinearFixedPoint(solver), inner_rtol=0.1)

    def gradient(guard, weights, x):
        def value(weights):
            layer = mo.nn.Equilibrium(
                Cell(cell, weights), solver=solver, adjoint=adjoint, throw=False
            )
            z, info = layer(x)
            return outer(z), info

        return jax.grad(value, has_aux=True)(weights)

    weights = 0.1 * PARAMS @ PARAMS.T
    return Workload(gradient, (weights, TRAIN[0]), ROWS * COLUMNS * COLUMNS)


MADE = {
    "CG": (conjugate_gradients, penalised, unpenalised),
    "momentum": (momentum, penalised, unpenalised),
    "MAML": (maml, squared_error, squared_error),
    "Picard": (picard, tanh_cell, lambda z: jnp.mean(z**2)),
}
WAYS: dict[str, Callable[[Workload], Callable[..., Any]]] = {
    "alone": lambda work: lambda *arguments: work.gradient(False, *arguments)[0],
    "verdict": lambda work: lambda *arguments: work.gradient(True, *arguments)[0],
    "report": lambda work: lambda *arguments: work.gradient(True, *arguments),
}


T = NUM_STEPS


def count(name: str, way: str) -> tuple[float, tuple[int, int]]:
    """Count the products with the data, and the traces of the two losses."""
    make, *losses = MADE[name]
    inner, outer = map(Counted, losses)
    workload = make(inner, outer)
    work = Work(WAYS[way](workload), *workload.arguments)
    return work.total / workload.product, (inner.count, outer.count)


# By conjugate gradients: the inner loss, and two products for each of the outer gradient
# and the step. Unrolled: two for each gradient of a step and its reverse, and two for the
# outer gradient; the verdict takes the loss at the end, and the report its gradient. The
# layer: a step of each loop, the residuals at the end of both, the gradient, and a product
# with the Jacobian that says how far a solution is.
@pytest.mark.parametrize(
    "name, way, most_products",
    [
        ("CG", "alone", 5),
        ("CG", "verdict", 5),
        ("CG", "report", 10),
        ("momentum", "alone", 4 * T + 2),
        ("momentum", "verdict", 4 * T + 3),
        ("momentum", "report", 4 * T + 4),
        ("MAML", "alone", 4 * T + 2),
        ("MAML", "verdict", 4 * T + 3),
        ("MAML", "report", 4 * T + 3),
        ("Picard", "verdict", 6),
        ("Picard", "report", 6),
    ],
)
def test_products_and_traces(name, way, most_products):
    products, traces = count(name, way)
    assert products <= most_products
    # The cell of a layer is traced three times, the loss of MAML alone is both losses.
    assert traces == {"MAML": (1, 0), "Picard": (3, 1)}.get(name, (1, 1))


def test_another_gradient_and_another_trace_are_counted():
    inner, outer = Counted(penalised), Counted(unpenalised)
    gradient, arguments, product = momentum(inner, outer)

    def twice(hyper, params, train, valid):
        through, _ = gradient(False, hyper, params, train, valid)
        return through + jax.grad(inner)(2 * params, hyper, train)

    assert Work(twice, *arguments).total == (4 * T + 4) * product
    assert (inner.count, outer.count) == (2, 1)
