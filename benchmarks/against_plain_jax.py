"""Times hypergradients of metaopt against the same written by hand in plain JAX.

Both are compiled, checked to agree, and run in turn, so that a machine whose speed drifts
drifts for both. Prints the ratio of the medians, and of the temporary memory that XLA
plans for (which has no noise). Compilation is not counted.

    python benchmarks/against_plain_jax.py [--repeats 20]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _network import cross_entropy, make_params

import metaopt as mo


WIDTHS = (256, 256, 256, 10)
BATCH = 64


def make_data(key, rows: int):
    x_key, y_key = jax.random.split(key)
    x = jax.random.normal(x_key, (rows, WIDTHS[0]))
    return x, jax.random.randint(y_key, (rows,), 0, WIDTHS[-1])


def decayed(params, hyper, batch):
    decay = sum(jnp.exp(h) * jnp.sum(w**2) for h, w in zip(hyper["decay"], params))
    return cross_entropy(params, hyper, batch) + decay


def hypergradient_of(problem, inner, adjoint):
    """The gradient as metaopt computes it, a function of arrays alone."""

    def ours(hyper, params, train, valid):
        return mo.hypergradient(
            problem,
            hyper,
            params,
            train,
            valid,
            inner=inner,
            adjoint=adjoint,
            throw=False,
        )[0]

    return ours


def unrolled(num_steps: int, transform: Callable[[Any], Any], memory):
    """The rates and decays of a network trained for a number of steps."""
    train, valid = make_data(jax.random.key(0), BATCH), make_data(jax.random.key(1), BATCH)
    params = make_params(jax.random.key(2), WIDTHS)
    hyper = {"rate": jnp.log(0.05), "decay": jnp.full(len(params), -6.0)}
    problem = mo.BilevelProblem(decayed, cross_entropy)

    ours = hypergradient_of(
        problem, mo.Descent(transform, num_steps), mo.UnrolledAdjoint(memory)
    )

    def plain(hyper, params, train, valid):
        def outer(hyper):
            def step(carry, _):
                params, state = carry
                gradient = jax.grad(decayed)(params, hyper, train)
                updates, state = transform(hyper).update(gradient, state, params)
                return (optax.apply_updates(params, updates), state), None

            state = transform(hyper).init(params)
            body = step if isinstance(memory, mo.StoreAll) else jax.checkpoint(step)
            (final, _), _ = jax.lax.scan(body, (params, state), None, num_steps)
            return cross_entropy(final, hyper, valid)

        return jax.grad(outer)(hyper)

    return ours, plain, (hyper, params, train, valid)


def implicit(num_linear_steps: int):
    """One penalty per feature of a logistic regression, by conjugate gradients."""
    x = jax.random.normal(jax.random.key(0), (2000, 200))
    y = (x @ jax.random.normal(jax.random.key(1), (200,)) > 0).astype(x.dtype)
    train, valid = (x[:1000], y[:1000]), (x[1000:], y[1000:])

    def logistic(params, hyper, batch):
        x, y = batch
        return jnp.mean(optax.losses.sigmoid_binary_cross_entropy(x @ params, y))

    def penalised(params, hyper, batch):
        return logistic(params, hyper, batch) + jnp.sum(jnp.exp(hyper) * params**2)

    hyper = jnp.full(200, -4.0)
    problem = mo.BilevelProblem(penalised, logistic)
    transform, num_steps = optax.sgd(1.0, momentum=0.9, nesterov=True), 300
    linear_solver = mo.CG(rtol=None, max_steps=num_linear_steps)

    ours = hypergradient_of(
        problem, mo.Descent(transform, num_steps), mo.ImplicitAdjoint(linear_solver)
    )

    def plain(hyper, params, train, valid):
        def step(carry, _):
            params, state = carry
            updates, state = transform.update(
                jax.grad(penalised)(params, hyper, train), state, params
            )
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(
            step, (params, transform.init(params)), None, num_steps
        )
        gradient = lambda params, hyper: jax.grad(penalised)(params, hyper, train)
        _, product = jax.linearize(lambda params: gradient(params, hyper), params)
        right = jax.grad(logistic)(params, hyper, valid)
        # tol=0: exactly this many steps, as above.
        solution, _ = jax.scipy.sparse.linalg.cg(
            product, right, tol=0.0, maxiter=num_linear_steps
        )
        _, pullback = jax.vjp(lambda hyper: gradient(params, hyper), hyper)
        return -pullback(solution)[0]

    return ours, plain, (hyper, jnp.zeros(200), train, valid)


def sgd(hyper):
    return optax.sgd(jnp.exp(hyper["rate"]), momentum=0.9)


def adam(hyper):
    return optax.adam(jnp.exp(hyper["rate"] - 3.0), eps_root=1e-12)


CASES = {
    "unrolled, SGD with momentum, 10 steps": lambda: unrolled(10, sgd, mo.StoreAll()),
    "unrolled, SGD with momentum, 100 steps": lambda: unrolled(100, sgd, mo.StoreAll()),
    "unrolled, Adam, 100 steps": lambda: unrolled(100, adam, mo.StoreAll()),
    "the same, steps recomputed": lambda: unrolled(100, adam, mo.RecomputeSteps()),
    "implicit, 300 steps, CG with 20": lambda: implicit(20),
}


def temporary_bytes(compiled) -> int:
    """The temporary memory that XLA plans for."""
    return compiled.memory_analysis().temp_size_in_bytes


def compare(case, repeats: int) -> tuple[float, float, float]:
    """The ratios of time and of memory, and how far the two disagree."""
    ours, plain, arguments = case()
    compiled = [jax.jit(f).lower(*arguments).compile() for f in (ours, plain)]
    first, second = (jax.block_until_ready(f(*arguments)) for f in compiled)
    difference = optax.tree.norm(optax.tree.sub(first, second)) / optax.tree.norm(second)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for f, record in zip(compiled, times):
            begin = time.perf_counter()
            jax.block_until_ready(f(*arguments))
            record.append(time.perf_counter() - begin)
    ratio = statistics.median(times[0]) / statistics.median(times[1])
    memory = [temporary_bytes(f) for f in compiled]
    return ratio, memory[0] / memory[1], float(difference)


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    device = jax.devices()[0].device_kind
    print(f"metaopt / plain JAX, {device}, jax {jax.__version__}, medians of {repeats}\n")
    print(f"{'':40}{'time':>8}{'memory':>8}{'difference':>12}")
    for name, case in CASES.items():
        ratio, memory, difference = compare(case, repeats)
        print(f"{name:40}{ratio:8.2f}{memory:8.2f}{difference:12.1e}", flush=True)


if __name__ == "__main__":
    main()
