"""The cost of the first call: how much is traced, lowered and compiled.

Four problems, each with metaopt and as the same derivative written by hand in JAX. Prints
the number of times that each loss is traced, the equations of the program, the lines of its
HLO before and after XLA's optimisation, and the CPU seconds of the first call (the least of
several rounds that alternate, all caches cleared before each).

    python benchmarks/compile_cost.py
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.extend.core
import jax.numpy as jnp
import optax
from _counted import Counted
from equilibrium import equilibrium_layer, MAX_STEPS, RTOL, textbook, textbook_picard

import metaopt as mo


NUM_STEPS = 100
X = jax.random.normal(jax.random.key(0), (200, 10))
Y = (X @ jnp.linspace(-1, 1, 10) > 0).astype(jnp.float32)
TRAIN, VALID = (X[:100], Y[:100]), (X[100:], Y[100:])


def cross_entropy(params: Any, hyper: Any, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean(optax.sigmoid_binary_cross_entropy(x @ params, y))


def penalised(params: Any, hyper: Any, batch: Any) -> jax.Array:
    return cross_entropy(params, hyper, batch) + jnp.exp(hyper) * params @ params


def logistic(inner: Any, outer: Any) -> tuple[Callable, Callable, Any]:
    """Implicit hypergradient of a penalty by conjugate gradients."""
    start, solver = jnp.zeros(10), mo.Descent(optax.sgd(0.5), NUM_STEPS)
    problem = mo.BilevelProblem(inner, outer)

    def ours(hyper):
        return mo.hypergradient(
            problem, hyper, TRAIN, VALID, params=start,
            inner=solver, adjoint=mo.ImplicitAdjoint(mo.CG()), throw=False,
        )  # fmt: skip

    def by_hand(hyper):
        gradient = jax.grad(inner)
        step = lambda _, params: params - 0.5 * gradient(params, hyper, TRAIN)
        params = jax.lax.fori_loop(0, NUM_STEPS, step, start)
        seed, direct = jax.grad(outer, (0, 1))(params, hyper, VALID)
        hvp = lambda v: jax.jvp(lambda p: gradient(p, hyper, TRAIN), (params,), (v,))[1]
        dual, _ = jax.scipy.sparse.linalg.cg(hvp, seed, tol=1e-6, maxiter=100)
        _, pullback = jax.vjp(lambda h: gradient(params, h, TRAIN), hyper)
        return direct - pullback(dual)[0]

    return ours, by_hand, jnp.asarray(-3.0)


def classified(model: Any, hyper: Any, batch: Any) -> jax.Array:
    x, y = batch
    logits = jax.vmap(model)(x)[:, 0]
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, y))


def adam(inner: Any, outer: Any) -> tuple[Callable, Callable, Any]:
    """The derivative of a validation loss by the learning rate of Adam, unrolled."""
    model = eqx.nn.MLP(10, 1, 16, 2, key=jax.random.key(1))
    solver = mo.Descent(lambda hyper: optax.adam(jnp.exp(hyper)), NUM_STEPS)
    problem = mo.BilevelProblem(inner, outer)

    def ours(hyper):
        return mo.hypergradient(
            problem, hyper, TRAIN, VALID, params=model,
            inner=solver, adjoint=mo.UnrolledAdjoint(), throw=False,
        )  # fmt: skip

    def by_hand(hyper):
        params, static = eqx.partition(model, eqx.is_inexact_array)
        full = lambda params: eqx.combine(params, static)

        def value(hyper):
            transform = optax.adam(jnp.exp(hyper))

            def step(carry, _):
                params, state = carry
                slope = jax.grad(lambda p: inner(full(p), hyper, TRAIN))(params)
                updates, state = transform.update(slope, state)
                return (optax.apply_updates(params, updates), state), None

            start = params, transform.init(params)
            (last, _), _ = jax.lax.scan(step, start, None, NUM_STEPS)
            return outer(full(last), hyper, VALID)

        return jax.grad(value)(hyper)

    return ours, by_hand, jnp.asarray(-4.0)


def squared_error(model: Any, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def maml(inner: Any, outer: Any) -> tuple[Callable, Callable, Any]:
    """The meta-gradient of MAML: five steps on each of eight tasks."""
    model = eqx.nn.MLP("scalar", "scalar", 16, 2, key=jax.random.key(2))
    x = jnp.linspace(-3, 3, 10)
    y = jnp.sin(x + jnp.arange(8.0)[:, None])
    sets = jnp.broadcast_to(x, y.shape), y
    tasks = mo.few_shot.Task(support=sets, query=sets)
    learner = mo.few_shot.MAML(inner, mo.Descent(optax.sgd(0.01), 5))

    def ours(params):
        return learner.value_and_grad(params, tasks, throw=False)

    def by_hand(params):
        arrays, static = eqx.partition(params, eqx.is_inexact_array)

        def one(arrays, support, query):
            def step(arrays, _):
                slope = jax.grad(lambda a: inner(eqx.combine(a, static), support))(arrays)
                return jax.tree.map(lambda p, g: p - 0.01 * g, arrays, slope), None

            last, _ = jax.lax.scan(step, arrays, None, 5)
            return inner(eqx.combine(last, static), query)

        mean = lambda a: jnp.mean(jax.vmap(one, (None, 0, 0))(a, sets, sets))
        return jax.grad(mean)(arrays)

    return ours, by_hand, model


def tanh_cell(weights: Any, z: jax.Array, x: jax.Array) -> jax.Array:
    """One example, or a batch of them."""
    return jnp.tanh(z @ weights.T + x)


class Cell(eqx.Module):
    """A cell of Equinox around a function."""

    function: Any = eqx.field(static=True)
    weights: jax.Array

    def __call__(self, z: jax.Array, x: jax.Array) -> jax.Array:
        return self.function(self.weights, z, x)


def equilibrium(inner: Any, outer: Any) -> tuple[Callable, Callable, Any]:
    """The derivative through an equilibrium layer, by Picard's method both ways."""
    weights = 0.1 * jax.random.normal(jax.random.key(3), (32, 32))
    x = jax.random.normal(jax.random.key(4), (8, 32))
    solver = mo.Picard(MAX_STEPS, rtol=RTOL)
    hand_written, _ = textbook(textbook_picard)

    def value(weights, each):
        return outer(jax.vmap(each, (None, 0))(Cell(inner, weights), x))

    def ours(weights):
        layer = lambda cell, x: equilibrium_layer(cell, solver, solver, throw=False)(x)[0]
        return jax.grad(value)(weights, layer)

    def by_hand(weights):
        return jax.grad(value)(weights, hand_written)

    return ours, by_hand, weights


CASES: dict[str, tuple[Callable, Callable, Callable]] = {
    "logistic regression, CG": (logistic, penalised, cross_entropy),
    "MLP, Adam unrolled": (adam, classified, classified),
    "MAML": (maml, squared_error, squared_error),
    "equilibrium layer": (equilibrium, tanh_cell, lambda z: jnp.mean(z**2)),
}


def num_equations(jaxpr: jax.extend.core.Jaxpr) -> int:
    """The equations of a program, those of its loops and branches included."""
    return sum(1 + sum(map(num_equations, inside(eqn))) for eqn in jaxpr.eqns)


def inside(eqn: Any) -> Iterator[jax.extend.core.Jaxpr]:
    for value in jax.tree.leaves(
        eqn.params, is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr)
    ):
        if isinstance(value, jax.extend.core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, jax.extend.core.Jaxpr):
            yield value


def counts(case: str, way: int) -> tuple[int, ...]:
    """Traces of the two losses, equations, and lines of HLO before and after."""
    make, inner, outer = CASES[case]
    inner, outer = Counted(inner), Counted(outer)
    *functions, argument = make(inner, outer)
    arrays, static = eqx.partition(argument, eqx.is_array)
    call = lambda arrays: functions[way](eqx.combine(arrays, static))
    function = lambda arrays: eqx.filter(call(arrays), eqx.is_array)
    traced = jax.jit(function).trace(arrays)
    lowered = traced.lower()
    lines = lambda stage: len(stage.as_text().splitlines())
    return (
        inner.count,
        outer.count,
        num_equations(traced.jaxpr.jaxpr),
        lines(lowered),
        lines(lowered.compile()),
    )


def first_call(case: str, way: int) -> float:
    """CPU seconds of the first call in a process whose imports are done."""
    make, inner, outer = CASES[case]
    *functions, argument = make(inner, outer)
    jax.clear_caches()
    begin = time.process_time()
    out = eqx.filter_jit(functions[way])(argument)
    jax.block_until_ready(eqx.filter(out, eqx.is_array))
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{'':36} {'traces':>7} {'equations':>10} {'HLO':>13} {'CPU s':>7}")
    for case in CASES:
        seconds = {0: float("inf"), 1: float("inf")}
        for _ in range(arguments.rounds):
            for way in seconds:
                seconds[way] = min(seconds[way], first_call(case, way))
        for way, name in enumerate(("metaopt", "by hand")):
            inner, outer, equations, before, after = counts(case, way)
            print(
                f"{case + ', ' + name:36} {f'{inner}, {outer}':>7} {equations:10,}"
                f" {f'{before:,} {after:,}':>13} {seconds[way]:7.2f}"
            )
        print(f"{'':36} {seconds[0] / seconds[1]:.1f} times by hand")


if __name__ == "__main__":
    main()
