"""The cost of an outer step that does next to nothing.

64 unknowns and one inner step, differentiated by unrolling, beside the same steps written
by hand with optax: in one `jax.lax.scan`, and as a compiled step that Python calls. Prints
microseconds for each outer step, the best of several rounds that alternate, and the ratio
to the scan.

    python benchmarks/outer_loop.py
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metaopt as mo


SIZE, RATE = 64, 0.1
OUTER = optax.sgd(0.01)
SCAN = "lax.scan by hand"


def inner_loss(params, hyper, batch):
    return jnp.mean((params - hyper * batch) ** 2)


def outer_loss(params, hyper, batch):
    return jnp.mean((params - batch) ** 2)


def step_by_hand(carry: Any, train: Any, valid: Any) -> Any:
    """The same outer step, with the same columns."""
    hyper, state = carry

    def value(hyper):
        start = jnp.zeros(SIZE)
        params = start - RATE * jax.grad(inner_loss)(start, hyper, train)
        return outer_loss(params, hyper, valid), params

    (loss, params), slope = jax.value_and_grad(value, has_aux=True)(hyper)
    residual = jnp.linalg.norm(jax.grad(inner_loss)(params, hyper, train))
    updates, state = OUTER.update(slope, state)
    hyper = optax.apply_updates(hyper, updates)
    return (hyper, state), (loss, jnp.linalg.norm(slope), residual, hyper)


def by_hand(carry: Any, train: Any, valid: Any, num_steps: int) -> Any:
    step = lambda carry, _: step_by_hand(carry, train, valid)
    return jax.lax.scan(step, carry, None, num_steps)


def seconds_of_loops(num_steps: int, rounds: int) -> dict[str, float]:
    """Measure the seconds that each way takes for so many outer steps."""
    train, valid = jax.random.normal(jax.random.key(0), (2, SIZE))
    hyper = jnp.full(SIZE, 0.5)
    problem = mo.BilevelProblem(inner_loss, outer_loss)
    solver = mo.NestedSolver(
        mo.Descent(optax.sgd(RATE), num_steps=1),
        mo.UnrolledAdjoint(),
        OUTER,
    )

    def ours(steps_per_call):
        solution = mo.solve_bilevel(
            problem,
            hyper,
            train,
            valid,
            solver=solver,
            num_steps=num_steps,
            params=jnp.zeros(SIZE),
            steps_per_call=steps_per_call,
        )
        return solution.hyper, solution.history.outer_loss

    scan = jax.jit(by_hand, static_argnums=3)
    step = jax.jit(step_by_hand)
    start = hyper, OUTER.init(hyper)

    def scanned():
        last, columns = scan(start, train, valid, num_steps)
        return jax.device_get((last[0], columns[0]))

    def called():
        carry, losses = start, []
        for _ in range(num_steps):
            carry, columns = step(carry, train, valid)
            losses.append(columns[0])
        return jax.device_get((carry[0], losses))

    ways = {
        SCAN: scanned,
        "a compiled step by hand": called,
        "steps_per_call=100": lambda: ours(100),
        "steps_per_call=1": lambda: ours(1),
    }
    results = {name: way() for name, way in ways.items()}
    expected = results[SCAN]
    for result in results.values():
        for a, b in zip(result, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    seconds = {name: float("inf") for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            seconds[name] = min(seconds[name], time.perf_counter() - begin)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-steps", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    num_steps = arguments.num_steps
    seconds = seconds_of_loops(num_steps, arguments.rounds)
    unit = seconds[SCAN]
    print(f"{num_steps:,} outer steps, {SIZE} unknowns, one inner step")
    for name, taken in seconds.items():
        each = 1e6 * taken / num_steps
        print(f"  {name:24} {each:8.1f} us a step, {taken / unit:6.1f} times the scan")


if __name__ == "__main__":
    main()
