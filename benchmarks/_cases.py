"""What the benchmarks compute: each case in several ways that agree."""

import functools as ft
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optimistix as optx
from _network import cross_entropy, make_params
from _torch import installed as installed_torch

import metaopt as mo


Case = tuple[dict[str, Callable[..., Any]], tuple[Any, ...]]
"""The contenders, functions of the same arguments, and these arguments."""
Loss = Callable[..., jax.Array]

HAS_JAXOPT = importlib.util.find_spec("jaxopt") is not None
TORCH = installed_torch()
PLAIN = "plain JAX"
ALONE, REPORTED = "gradient alone", "with report"


def ours(
    problem: mo.BilevelProblem,
    inner: mo.extend.AbstractSolver,
    adjoint: mo.extend.AbstractAdjoint,
):
    """Hypergradients by metaopt, functions of `(hyper, params, train, valid)`: as it comes,
    NaN where a check refuses it; alone, which is what other libraries compute; and with
    the numbers of its report."""

    def run(hyper, params, train, valid, guard=True):
        return mo.hypergradient(
            problem,
            hyper,
            train,
            valid,
            params=params,
            inner=inner,
            adjoint=adjoint,
            throw=False,
            guard=guard,
        )

    def reported(*args):
        gradient, report = run(*args)
        return gradient, report.scalars()

    return {
        "metaopt": lambda *args: run(*args)[0],
        ALONE: lambda *args: run(*args, guard=False)[0],
        REPORTED: reported,
    }


def of_solution(outer_loss, solve):
    """The hypergradient by automatic differentiation through `solve(hyper, params,
    train)`."""

    def gradient(hyper, params, train, valid):
        outer = lambda hyper: outer_loss(solve(hyper, params, train), hyper, valid)
        return jax.grad(outer)(hyper)

    return gradient


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


OPTIMIZERS = {"momentum": sgd, "Adam": adam}


def unrolled(
    num_steps: int,
    optimizer: str,
    budget: str | None = None,
    inner_loss: Loss = decayed,
    outer_loss: Loss = cross_entropy,
) -> Case:
    """The learning rate and the decays of a network trained for a number of steps."""
    transform = OPTIMIZERS[optimizer]
    x_keys = jax.random.split(jax.random.key(0), 4)
    x = [jax.random.normal(k, (BATCH, WIDTHS[0])) for k in x_keys[:2]]
    y = [jax.random.randint(k, (BATCH,), 0, WIDTHS[-1]) for k in x_keys[2:]]
    params = make_params(jax.random.key(2), WIDTHS)
    hyper = {"rate": jnp.log(0.05), "decay": jnp.full(len(params), -6.0)}
    problem = mo.BilevelProblem(inner_loss, outer_loss)

    def by_hand(hyper, params, train):
        def step(carry, _):
            params, state = carry
            gradient = jax.grad(inner_loss)(params, hyper, train)
            updates, state = transform(hyper).update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        state = transform(hyper).init(params)
        return jax.lax.scan(step, (params, state), None, num_steps)[0][0]

    def by_jaxopt(hyper, params, train):
        import jaxopt

        solver = jaxopt.OptaxSolver(
            opt=transform(hyper),
            fun=inner_loss,
            maxiter=num_steps,
            tol=0.0,
            implicit_diff=False,
            unroll=True,
        )
        return solver.run(params, hyper=hyper, batch=train).params

    def by_optimistix(hyper, params, train):
        return optx.minimise(
            lambda params, hyper: inner_loss(params, hyper, train),
            optx.OptaxMinimiser(transform(hyper), rtol=0.0, atol=0.0),
            params,
            args=hyper,
            adjoint=optx.RecursiveCheckpointAdjoint(),
            max_steps=num_steps,
            throw=False,
        ).value

    adjoint = mo.UnrolledAdjoint() if budget is None else mo.UnrolledAdjoint(budget)
    contenders = {
        **ours(problem, mo.Descent(transform, num_steps), adjoint),
        PLAIN: of_solution(outer_loss, by_hand),
    }
    if HAS_JAXOPT and budget is None:
        contenders["jaxopt"] = of_solution(outer_loss, by_jaxopt)
    if budget is None:
        contenders["optimistix"] = of_solution(outer_loss, by_optimistix)
    if num_steps <= 100:
        made = {name: make(num_steps, optimizer) for name, make in TORCH.items()}
        contenders |= {name: run for name, run in made.items() if run is not None}
    return contenders, (hyper, params, (x[0], y[0]), (x[1], y[1]))


#
# Logistic regression, implicit
#

NUM_PENALTIES, NUM_LINEAR_STEPS = 200, 20


def logistic(params, hyper, batch):
    x, y = batch
    return jnp.mean(optax.losses.sigmoid_binary_cross_entropy(x @ params, y))


def penalised(params, hyper, batch):
    return logistic(params, hyper, batch) + jnp.sum(jnp.exp(hyper) * params**2)


def implicit(
    num_steps: int, inner_loss: Loss = penalised, outer_loss: Loss = logistic
) -> Case:
    """One penalty for each feature, by conjugate gradients, after a number of steps."""
    x = jax.random.normal(jax.random.key(0), (2000, NUM_PENALTIES))
    y = (x @ jax.random.normal(jax.random.key(1), (NUM_PENALTIES,)) > 0).astype(x.dtype)
    train, valid = (x[:1000], y[:1000]), (x[1000:], y[1000:])
    hyper, start = jnp.full(NUM_PENALTIES, -4.0), jnp.zeros(NUM_PENALTIES)
    problem = mo.BilevelProblem(inner_loss, outer_loss)
    transform = optax.sgd(1.0, momentum=0.9, nesterov=True)
    inner = mo.Descent(transform, num_steps) if num_steps else mo.Solved()
    if num_steps == 0:
        # The derivative alone, at a solution that is found beforehand.
        descent = mo.Descent(transform, 2000)
        start = mo.solve_inner(
            problem.inner,
            hyper,
            train,
            params=start,
            solver=descent,
            adjoint=mo.ImplicitAdjoint(),
        ).value
    adjoint = mo.ImplicitAdjoint(
        mo.CG(rtol=None, max_steps=NUM_LINEAR_STEPS), inner_rtol=jnp.inf, error=None
    )

    def solve(hyper, params, train):
        def step(carry, _):
            params, state = carry
            gradient = jax.grad(inner_loss)(params, hyper, train)
            updates, state = transform.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, transform.init(params)), None, num_steps)[0][0]

    def by_hand(hyper, params, train, valid):
        params = solve(hyper, params, train)
        gradient = lambda params, hyper: jax.grad(inner_loss)(params, hyper, train)
        _, product = jax.linearize(lambda params: gradient(params, hyper), params)
        right = jax.grad(outer_loss)(params, hyper, valid)
        solution = textbook_cg(product, right, NUM_LINEAR_STEPS)
        _, pullback = jax.vjp(lambda hyper: gradient(params, hyper), hyper)
        return -pullback(solution)[0]

    def by_optimistix(hyper, params, train, valid):
        minimiser = optx.OptaxMinimiser(transform, rtol=0.0, atol=0.0)

        def outer(hyper):
            solution = optx.minimise(
                lambda params, hyper: inner_loss(params, hyper, train),
                minimiser,
                params,
                args=hyper,
                # Its default, which factorises: `lineax.CG` gives NaN here in float32.
                adjoint=optx.ImplicitAdjoint(),
                max_steps=num_steps,
                throw=False,
            )
            return outer_loss(solution.value, hyper, valid)

        return jax.grad(outer)(hyper)

    contenders = {
        **ours(problem, inner, adjoint),
        PLAIN: by_hand,
    }
    if num_steps:
        contenders["optimistix"] = by_optimistix
    if HAS_JAXOPT:
        found = jaxopt_solution(solve, inner_loss, NUM_LINEAR_STEPS)
        contenders["jaxopt"] = of_solution(outer_loss, found)
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
    # On CPUs twice as fast as `jnp.vdot`, and right at ten million entries.
    dot = lambda a, b: optax.tree.sum(jax.tree.map(lambda a, b: jnp.sum(a * b), a, b))
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


def quadratic(params, hyper, batch):
    curvature, target = batch
    fit = 0.5 * jnp.sum(curvature * (params - target) ** 2)
    return fit + 0.5 * jnp.sum(jnp.exp(hyper) * params**2)


def distance(params, hyper, batch):
    return 0.5 * jnp.sum((params - batch[1]) ** 2)


def decays(
    size: int, method: str, inner_loss: Loss = quadratic, outer_loss: Loss = distance
) -> Case:
    """As many decays as parameters, and ten steps of a linear solver."""
    curvature = jnp.linspace(0.1, 1.0, size)
    target = jnp.sin(jnp.arange(size, dtype=jnp.float32))
    hyper, batch = jnp.full(size, -2.0), (curvature, target)
    start = curvature * target / (curvature + jnp.exp(hyper))
    problem = mo.BilevelProblem(inner_loss, outer_loss)
    linear = {
        "CG": mo.CG(rtol=None, max_steps=10),
        "Neumann": mo.Neumann(num_terms=10, scale=0.8),
    }[method]

    def neumann(product, right):
        def step(carry, _):
            total, term = carry
            term = term - 0.8 * product(term)
            return (total + term, term), None

        return 0.8 * jax.lax.scan(step, (right, right), None, 10)[0][0]

    def by_hand(hyper, params, train, valid):
        gradient = lambda params, hyper: jax.grad(inner_loss)(params, hyper, train)
        _, product = jax.linearize(lambda params: gradient(params, hyper), params)
        right = jax.grad(outer_loss)(params, hyper, valid)
        solve = neumann if method == "Neumann" else ft.partial(textbook_cg, num_steps=10)
        _, pullback = jax.vjp(lambda hyper: gradient(params, hyper), hyper)
        return -pullback(solve(product, right))[0]

    adjoint = mo.ImplicitAdjoint(linear, inner_rtol=jnp.inf, error=None)
    contenders = {
        **ours(problem, mo.Solved(), adjoint),
        PLAIN: by_hand,
    }
    if HAS_JAXOPT and method == "CG":
        found = jaxopt_solution(lambda hyper, params, batch: params, inner_loss, 10)
        contenders["jaxopt"] = of_solution(outer_loss, found)
    return contenders, (hyper, start, batch, batch)


CASES: dict[str, Callable[[], Case]] = {
    "logistic, 300 steps and 20 of CG": lambda: implicit(300),
    "logistic, 20 steps of CG alone": lambda: implicit(0),
    "network, 10 steps of momentum": lambda: unrolled(10, "momentum"),
    "network, 100 steps of momentum": lambda: unrolled(100, "momentum"),
    "network, 1000 steps of momentum": lambda: unrolled(1000, "momentum"),
    "network, 1000 steps of momentum within 256 MiB": lambda: unrolled(
        1000, "momentum", "256MiB"
    ),
    "network, 10 steps of Adam": lambda: unrolled(10, "Adam"),
    "network, 100 steps of Adam": lambda: unrolled(100, "Adam"),
    "network, 1000 steps of Adam": lambda: unrolled(1000, "Adam"),
    "network, 1000 steps of Adam within 256 MiB": lambda: unrolled(1000, "Adam", "256MiB"),
    "1M decays, 10 steps of CG": lambda: decays(10**6, "CG"),
    "1M decays, 10 terms of Neumann": lambda: decays(10**6, "Neumann"),
    "10M decays, 10 steps of CG": lambda: decays(10**7, "CG"),
    "10M decays, 10 terms of Neumann": lambda: decays(10**7, "Neumann"),
}
