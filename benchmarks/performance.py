"""Times and weighs hypergradients of metaopt beside the same written by hand in plain JAX,
and beside jaxopt and optimistix where they are installed.

All contenders for a case are compiled, checked to agree, and run in turn, so that a machine
whose speed drifts drifts for all. Printed are ratios to plain JAX: of the medians of the
times, and of the temporary memory that XLA plans for (which has no noise). Compilation is
not counted.

    python benchmarks/performance.py [--repeats 20] [--only TEXT]
"""

import argparse
import functools as ft
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optimistix as optx
from _network import cross_entropy, make_params

import metaopt as mo


Contenders = dict[str, Callable[..., Any]]
Case = tuple[Contenders, tuple[Any, ...]]
HAS_JAXOPT = importlib.util.find_spec("jaxopt") is not None


#
# A network, unrolled
#

WIDTHS, BATCH = (784, 256, 256, 10), 64


def decayed(params, hyper, batch):
    decay = sum(jnp.exp(h) * jnp.sum(w**2) for h, w in zip(hyper["decay"], params))
    return cross_entropy(params, hyper, batch) + decay


def sgd(hyper):
    return optax.sgd(jnp.exp(hyper["rate"]), momentum=0.9)


def adam(hyper):
    # By hand, the root needs the small number: metaopt does without.
    return optax.adam(jnp.exp(hyper["rate"] - 3.0), eps_root=1e-12)


def unrolled(num_steps: int, transform: Callable[[Any], Any]) -> Case:
    """The learning rate and the decays of a network trained for a number of steps."""
    x_keys = jax.random.split(jax.random.key(0), 4)
    x = [jax.random.normal(k, (BATCH, WIDTHS[0])) for k in x_keys[:2]]
    y = [jax.random.randint(k, (BATCH,), 0, WIDTHS[-1]) for k in x_keys[2:]]
    train, valid = (x[0], y[0]), (x[1], y[1])
    params = make_params(jax.random.key(2), WIDTHS)
    hyper = {"rate": jnp.log(0.05), "decay": jnp.full(len(params), -6.0)}
    problem = mo.BilevelProblem(decayed, cross_entropy)

    def ours(hyper, params, train, valid):
        return mo.hypergradient(
            problem,
            hyper,
            params,
            train,
            valid,
            inner=mo.Descent(transform, num_steps),
            adjoint=mo.UnrolledAdjoint(),
            throw=False,
        )[0]

    def of_solution(solve):
        def gradient(hyper, params, train, valid):
            outer = lambda h: cross_entropy(solve(h, params, train), h, valid)
            return jax.grad(outer)(hyper)

        return gradient

    def by_hand(hyper, params, train):
        def step(carry, _):
            params, state = carry
            gradient = jax.grad(decayed)(params, hyper, train)
            updates, state = transform(hyper).update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        state = transform(hyper).init(params)
        return jax.lax.scan(step, (params, state), None, num_steps)[0][0]

    def by_jaxopt(hyper, params, train):
        import jaxopt

        solver = jaxopt.OptaxSolver(
            opt=transform(hyper),
            fun=decayed,
            maxiter=num_steps,
            tol=0.0,
            implicit_diff=False,
            unroll=True,
        )
        return solver.run(params, hyper=hyper, batch=train).params

    contenders = {"metaopt": ours, "plain JAX": of_solution(by_hand)}
    if HAS_JAXOPT:
        contenders["jaxopt"] = of_solution(by_jaxopt)
    return contenders, (hyper, params, train, valid)


#
# Logistic regression, implicit
#

NUM_PENALTIES, NUM_LINEAR_STEPS = 200, 20


def logistic(params, hyper, batch):
    x, y = batch
    return jnp.mean(optax.losses.sigmoid_binary_cross_entropy(x @ params, y))


def penalised(params, hyper, batch):
    return logistic(params, hyper, batch) + jnp.sum(jnp.exp(hyper) * params**2)


def implicit(num_steps: int) -> Case:
    """One penalty for each feature, by conjugate gradients, after a number of steps."""
    x = jax.random.normal(jax.random.key(0), (2000, NUM_PENALTIES))
    y = (x @ jax.random.normal(jax.random.key(1), (NUM_PENALTIES,)) > 0).astype(x.dtype)
    train, valid = (x[:1000], y[:1000]), (x[1000:], y[1000:])
    hyper, start = jnp.full(NUM_PENALTIES, -4.0), jnp.zeros(NUM_PENALTIES)
    problem = mo.BilevelProblem(penalised, logistic)
    transform = optax.sgd(1.0, momentum=0.9, nesterov=True)
    if num_steps == 1:
        # The derivative alone: from the solution, and one step that leads nowhere.
        descent = mo.Descent(transform, 2000)
        start = mo.solve_inner(
            problem.inner, hyper, start, train, solver=descent, adjoint=mo.ImplicitAdjoint()
        ).value
    adjoint = mo.ImplicitAdjoint(
        mo.CG(rtol=None, max_steps=NUM_LINEAR_STEPS), inner_rtol=jnp.inf
    )

    def ours(hyper, params, train, valid):
        return mo.hypergradient(
            problem,
            hyper,
            params,
            train,
            valid,
            inner=mo.Descent(transform, num_steps),
            adjoint=adjoint,
            throw=False,
        )[0]

    def solve(hyper, params, train):
        def step(carry, _):
            params, state = carry
            gradient = jax.grad(penalised)(params, hyper, train)
            updates, state = transform.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, transform.init(params)), None, num_steps)[0][0]

    def by_hand(hyper, params, train, valid):
        params = solve(hyper, params, train)
        gradient = lambda params, hyper: jax.grad(penalised)(params, hyper, train)
        _, product = jax.linearize(lambda params: gradient(params, hyper), params)
        right = jax.grad(logistic)(params, hyper, valid)
        solution = textbook_cg(product, right, NUM_LINEAR_STEPS)
        _, pullback = jax.vjp(lambda hyper: gradient(params, hyper), hyper)
        return -pullback(solution)[0]

    def by_jaxopt(hyper, params, train, valid):
        found = jaxopt_solution(solve, penalised, NUM_LINEAR_STEPS)
        return jax.grad(lambda h: logistic(found(h, params, train), h, valid))(hyper)

    def by_optimistix(hyper, params, train, valid):
        minimiser = optx.OptaxMinimiser(transform, rtol=0.0, atol=0.0)

        def outer(hyper):
            solution = optx.minimise(
                lambda params, hyper: penalised(params, hyper, train),
                minimiser,
                params,
                args=hyper,
                adjoint=optx.ImplicitAdjoint(),
                max_steps=num_steps,
                throw=False,
            )
            return logistic(solution.value, hyper, valid)

        return jax.grad(outer)(hyper)

    contenders = {"metaopt": ours, "plain JAX": by_hand}
    if HAS_JAXOPT:
        contenders["jaxopt"] = by_jaxopt
    contenders["optimistix"] = by_optimistix
    return contenders, (hyper, start, train, valid)


def jaxopt_solution(solve, loss, num_linear_steps):
    """What `solve(hyper, params, batch)` finds, with the implicit derivative of jaxopt."""
    from jaxopt import implicit_diff, linear_solve

    def linear(product, vector):
        return linear_solve.solve_cg(product, vector, tol=0.0, maxiter=num_linear_steps)

    rule = implicit_diff.custom_root(jax.grad(loss), solve=linear)
    found = rule(lambda params, hyper, batch: solve(hyper, params, batch))
    return lambda hyper, params, batch: found(params, hyper, batch)


def textbook_cg(product, right, num_steps):
    """Conjugate gradients as in Hestenes and Stiefel, for any pytree."""
    dot = lambda a, b: optax.tree.vdot(a, b)
    combine = lambda a, x, y: jax.tree.map(lambda x, y: a * x + y, x, y)

    def step(carry, _):
        x, r, p, square = carry
        image = product(p)
        alpha = square / dot(p, image)
        x, r = combine(alpha, p, x), combine(-alpha, image, r)
        new = dot(r, r)
        return (x, r, combine(new / square, p, r), new), None

    zeros = jax.tree.map(jnp.zeros_like, right)
    carry = zeros, right, right, dot(right, right)
    return jax.lax.scan(step, carry, None, num_steps)[0][0]


#
# One decay for each parameter
#


def decays(size: int, method: str) -> Case:
    """As many decays as parameters, and ten steps of a linear solver."""
    curvature = jnp.linspace(0.1, 1.0, size)
    target = jnp.sin(jnp.arange(size, dtype=jnp.float32))

    def inner_loss(params, hyper, batch):
        curvature, target = batch
        fit = 0.5 * jnp.sum(curvature * (params - target) ** 2)
        return fit + 0.5 * jnp.sum(jnp.exp(hyper) * params**2)

    def outer_loss(params, hyper, batch):
        return 0.5 * jnp.sum((params - batch[1]) ** 2)

    hyper, batch = jnp.full(size, -2.0), (curvature, target)
    start = curvature * target / (curvature + jnp.exp(hyper))
    problem = mo.BilevelProblem(inner_loss, outer_loss)
    linear = {
        "CG": mo.CG(rtol=None, max_steps=10),
        "Neumann": mo.Neumann(num_terms=10, scale=0.8),
    }[method]
    descent = mo.Descent(optax.sgd(1e-3), 1)

    def ours(hyper, params, batch):
        return mo.hypergradient(
            problem,
            hyper,
            params,
            batch,
            batch,
            inner=descent,
            adjoint=mo.ImplicitAdjoint(linear, inner_rtol=jnp.inf),
            throw=False,
        )[0]

    def step(hyper, params, batch):
        return params - 1e-3 * jax.grad(inner_loss)(params, hyper, batch)

    def neumann(product, right):
        def step(carry, _):
            total, term = carry
            term = term - 0.8 * product(term)
            return (total + term, term), None

        return 0.8 * jax.lax.scan(step, (right, right), None, 10)[0][0]

    def by_hand(hyper, params, batch):
        gradient = lambda params, hyper: jax.grad(inner_loss)(params, hyper, batch)
        params = step(hyper, params, batch)
        _, product = jax.linearize(lambda params: gradient(params, hyper), params)
        right = jax.grad(outer_loss)(params, hyper, batch)
        solve = neumann if method == "Neumann" else ft.partial(textbook_cg, num_steps=10)
        _, pullback = jax.vjp(lambda hyper: gradient(params, hyper), hyper)
        return -pullback(solve(product, right))[0]

    def by_jaxopt(hyper, params, batch):
        found = jaxopt_solution(step, inner_loss, 10)
        return jax.grad(lambda h: outer_loss(found(h, params, batch), h, batch))(hyper)

    contenders = {"metaopt": ours, "plain JAX": by_hand}
    if HAS_JAXOPT and method == "CG":
        contenders["jaxopt"] = by_jaxopt
    return contenders, (hyper, start, batch)


CASES: dict[str, Callable[[], Case]] = {
    "logistic, 300 steps and 20 of CG": lambda: implicit(300),
    "logistic, 20 steps of CG alone": lambda: implicit(1),
    "network, 10 steps of momentum": lambda: unrolled(10, sgd),
    "network, 100 steps of momentum": lambda: unrolled(100, sgd),
    "network, 1000 steps of momentum": lambda: unrolled(1000, sgd),
    "network, 10 steps of Adam": lambda: unrolled(10, adam),
    "network, 100 steps of Adam": lambda: unrolled(100, adam),
    "1M decays, 10 steps of CG": lambda: decays(10**6, "CG"),
    "1M decays, 10 terms of Neumann": lambda: decays(10**6, "Neumann"),
    "10M decays, 10 steps of CG": lambda: decays(10**7, "CG"),
    "10M decays, 10 terms of Neumann": lambda: decays(10**7, "Neumann"),
}


def temporary_bytes(compiled) -> int:
    """The temporary memory that XLA plans for."""
    return compiled.memory_analysis().temp_size_in_bytes


def compare(case: Case, repeats: int) -> dict[str, tuple[float, float, float]]:
    """For each contender: time and memory over those of plain JAX, and how far the
    hypergradients disagree."""
    contenders, arguments = case
    compiled = {
        name: jax.jit(f).lower(*arguments).compile() for name, f in contenders.items()
    }
    outputs = {name: jax.block_until_ready(f(*arguments)) for name, f in compiled.items()}
    plain = outputs["plain JAX"]
    size = optax.tree.norm(plain)
    times: dict[str, list[float]] = {name: [] for name in compiled}
    begin = time.perf_counter()
    for index in range(repeats):
        # In turn, beginning with another one each time, for a minute at most.
        names = list(compiled)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            start = time.perf_counter()
            jax.block_until_ready(compiled[name](*arguments))
            times[name].append(time.perf_counter() - start)
        if time.perf_counter() - begin > 60 and index >= 4:
            break
    median = {name: statistics.median(record) for name, record in times.items()}
    memory = {name: temporary_bytes(f) for name, f in compiled.items()}
    return {
        name: (
            median[name] / median["plain JAX"],
            memory[name] / max(memory["plain JAX"], 1),
            float(optax.tree.norm(optax.tree.sub(outputs[name], plain)) / size),
        )
        for name in compiled
    }


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="jaxopt")
    device = jax.devices()[0].device_kind
    print(f"Over plain JAX, on {device}, jax {jax.__version__}: time, memory, difference\n")
    for name, case in CASES.items():
        if arguments.only not in name:
            continue
        print(name, flush=True)
        for contender, row in compare(case(), arguments.repeats).items():
            ratio, memory, difference = row
            print(f"    {contender:14}{ratio:8.2f}{memory:8.2f}{difference:12.1e}")


if __name__ == "__main__":
    main()
