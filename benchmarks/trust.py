"""Compares what reports of implicit hypergradients say with the true errors.

Each family has random problems whose exact hypergradient is computed by Newton's method and
a dense solve in float64. The inner solver starts anywhere from the solution itself to far
away, so that its solutions are of all degrees of accuracy. Printed is, for each family and
dtype, how many hypergradients were accepted, how many of those are off by more than ten
times the tolerance that was asked for, how often the estimated error is within a factor 2
of the true one, and the products with the Hessian over those of the linear solve alone. A
second table has bounds on the error for linear models. Errors that are as small as the
effect of rounding, of the hypergradient or of the params, are not compared.

    python benchmarks/trust.py [--count 64] [--rtol 1e-3] [--only TEXT]
"""

import argparse
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _trust_problems import FAMILIES, Family, Instance
from jax.flatten_util import ravel_pytree

import metaopt as mo


jax.config.update("jax_enable_x64", True)

NUM_STEPS = 60
# Errors are not compared below so many roundings of the hypergradient and of the params.
ROUNDINGS, PARAM_ROUNDINGS = 100, 10

BOUNDS = {
    "ridge": mo.accuracy.ridge_bound,
    "logistic": mo.accuracy.logistic_bound,
    "logistic, per feature": mo.accuracy.logistic_bound,
    "softmax": mo.accuracy.softmax_bound,
}


class Judged(NamedTuple):
    """What a report says of a hypergradient, and what is true."""

    accepted: Any
    known: Any
    norm: Any
    rounding: Any
    true: Any
    said: Any
    products: Any
    plain_products: Any


def exact(family: Family, params, instance):
    """By dense algebra, for the solution nearest to `params`: itself, the hypergradient,
    whether it was found, and how far the hypergradient moves for a relative change of the
    params, each with a sign of its own."""
    flat, unravel = ravel_pytree(params)
    flat_hyper, unravel_hyper = ravel_pytree(instance.hyper)

    def optimality(p, h):
        params, hyper = unravel(p), unravel_hyper(h)
        if family.minimise:
            return ravel_pytree(jax.grad(family.inner)(params, hyper, instance.train))[0]
        return ravel_pytree(
            jax.tree.map(jnp.subtract, params, family.inner(params, hyper, instance.train))
        )[0]

    def newton(p, _):
        residual = optimality(p, flat_hyper)
        step = jnp.linalg.solve(jax.jacfwd(optimality)(p, flat_hyper), residual)
        tries = jnp.stack([p - step * 0.5**k for k in range(8)])
        sizes = jax.vmap(lambda p: jnp.linalg.norm(optimality(p, flat_hyper)))(tries)
        best = tries[jnp.nanargmin(sizes)]
        better = jnp.nanmin(sizes) < jnp.linalg.norm(residual)
        return jnp.where(better, best, p), None

    def gradient_at(p):
        jacobian = jax.jacfwd(optimality)(p, flat_hyper)
        cross = jax.jacfwd(optimality, 1)(p, flat_hyper)
        outer = lambda p, h: family.outer(unravel(p), unravel_hyper(h), instance.valid)
        in_params, direct = jax.grad(outer, (0, 1))(p, flat_hyper)
        gradient = direct - cross.T @ jnp.linalg.solve(jacobian.T, in_params)
        return gradient, jacobian

    solution, _ = jax.lax.scan(newton, flat, length=40)
    gradient, jacobian = gradient_at(solution)
    signs = 1 - 2.0 * (jnp.arange(flat.size) % 3 == 0)
    moved = gradient_at(solution * (1 + 1e-7 * signs))[0] - gradient
    step = jnp.linalg.solve(jacobian, optimality(solution, flat_hyper))
    solved = jnp.linalg.norm(step) <= 1e-9 * jnp.linalg.norm(solution)
    if family.minimise:
        curvatures = jnp.linalg.eigvalsh(jacobian)
        solved &= curvatures[0] > 1e-12 * curvatures[-1]
    return solution, gradient, solved, jnp.linalg.norm(moved) / 1e-7


def rate(family: Family, params, instance):
    """A rate at which gradient descent does not diverge near `params`."""
    flat, unravel = ravel_pytree(params)
    loss = lambda p: family.inner(unravel(p), instance.hyper, instance.train)
    return 0.9 / jnp.max(jnp.abs(jnp.linalg.eigvalsh(jax.hessian(loss)(flat))))


class Prepared(NamedTuple):
    """A problem to be judged, in the dtype of the run, and a rate that is stable."""

    instance: Instance
    rate: Any
    found: Any


def prepare(family: Family, key, dtype) -> Prepared:
    """Draw a problem, whose inner solver starts anywhere near its solution."""
    instance = family.draw(key)
    nearest, step_size = instance.start, jnp.ones(())
    if family.minimise:
        step_size = rate(family, instance.start, instance)

        def descend(p, _):
            g = jax.grad(family.inner)(p, instance.hyper, instance.train)
            return jax.tree.map(lambda p, g: p - 0.3 * step_size * g, p, g), None

        nearest, _ = jax.lax.scan(descend, nearest, length=2000)
    solution, _, found, _ = exact(family, nearest, instance)
    flat, unravel = ravel_pytree(instance.start)
    far = 10 ** jax.random.uniform(jax.random.fold_in(key, 9), minval=-7.0, maxval=0.0)
    start = unravel(solution + far * (flat - solution))
    if family.minimise:
        step_size = rate(family, unravel(solution), instance)
    return Prepared(cast(instance._replace(start=start), dtype), step_size, found)


def cast(tree, dtype):
    """Floating-point arrays in another dtype."""

    def to(a):
        return a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

    return jax.tree.map(to, tree)


def judge(family: Family, prepared: Prepared, adjoint, num_steps=NUM_STEPS):
    """The hypergradient, its report, the inner solution, and the plain products."""
    hyper, start, train, valid = prepared.instance
    if family.minimise:
        problem = mo.InnerProblem(family.inner)
        dtype = jax.tree.leaves(start)[0].dtype
        inner: Any = mo.Descent(optax.sgd(prepared.rate.astype(dtype)), num_steps)
    else:
        problem = mo.FixedPointProblem(family.inner)
        inner = mo.Picard(num_steps, rtol=None)
    bilevel = mo.BilevelProblem(problem, family.outer)
    gradient, report = mo.hypergradient(
        bilevel,
        hyper,
        train,
        valid,
        params=start,
        inner=inner,
        adjoint=adjoint,
        throw=False,
    )
    plain = mo.ImplicitAdjoint(adjoint.linear_solver, inner_rtol=jnp.inf, error=None)
    _, plain_report = mo.hypergradient(
        bilevel, hyper, train, valid, params=start, inner=inner, adjoint=plain, throw=False
    )
    solution = mo.solve_inner(
        problem,
        hyper,
        train,
        params=start,
        solver=inner,
        adjoint=mo.UnrolledAdjoint(),
        throw=False,
    )
    return gradient, report, plain_report.derivative.num_products, solution.value


@eqx.filter_jit
def prepared(family, keys, dtype):
    # One after the other: batches of dense solves can wait for each other for ever.
    return jax.lax.map(lambda key: prepare(family, key, dtype), keys)


@eqx.filter_jit
def judged(family, problems, adjoint):
    return jax.vmap(lambda problem: judge(family, problem, adjoint))(problems)


@eqx.filter_jit
def truths(family, problems, params):
    """Exact hypergradients for the numbers that were differentiated, after rounding."""

    def one(args):
        problem, params = cast(args, jnp.float64)
        _, truth, solved, slope = exact(family, params, problem.instance)
        return truth, solved & problem.found & jnp.all(jnp.isfinite(truth)), slope

    return jax.lax.map(one, (problems, params))


def measure(name, dtype, count, seed, adjoint) -> Judged:
    """What the reports on random problems of a family say, and what is true."""
    family = FAMILIES[name]
    number = list(FAMILIES).index(name)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), count)
    problems = prepared(family, keys, dtype)
    return judged_against_truth(family, problems, judged(family, problems, adjoint))


def judged_against_truth(family, problems, outputs) -> Judged:
    """Bring outputs of `judge` and the exact hypergradients together."""
    gradient, report, plain_products, params = outputs
    truth, known, slope = truths(family, problems, params)
    got = jax.vmap(lambda g: ravel_pytree(g)[0].astype(jnp.float64))(gradient)
    said, norm = report.derivative.error, jnp.linalg.norm(truth, axis=-1)
    eps = float(jnp.finfo(jax.tree.leaves(gradient)[0].dtype).eps)
    out = Judged(
        accepted=report.result == mo.RESULTS.successful,
        known=known,
        norm=norm,
        rounding=eps * jnp.maximum(ROUNDINGS * norm, PARAM_ROUNDINGS * slope),
        true=jnp.linalg.norm(got - truth, axis=-1),
        said=jnp.full(known.shape, jnp.nan) if said is None else said,
        products=report.derivative.num_products + report.derivative.num_error_products,
        plain_products=plain_products,
    )
    return jax.tree.map(np.asarray, out)


def bounds(name, dtype, count, seed) -> tuple[np.ndarray, float]:
    """The bound over the true error, and the products over those of the plain solve."""
    family, make = FAMILIES[name], BOUNDS[name]
    number = list(FAMILIES).index(name)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), count)
    problems = prepared(family, keys, dtype)

    def one(problem):
        train, valid = problem.instance.train, problem.instance.valid
        bound = make(train[0], valid[0], jnp.exp)
        return judge(family, problem, mo.ImplicitAdjoint(mo.CG(), error=bound))

    # One after the other, as in `prepared`.
    outputs = eqx.filter_jit(lambda problems: jax.lax.map(one, problems))(problems)
    out = judged_against_truth(family, problems, outputs)
    keep = out.known & (out.true > out.rounding)
    products = out.products[keep].sum() / out.plain_products[keep].sum()
    return (out.said / out.true)[keep], products


def summary(judged: Judged, rtol: float) -> dict[str, float]:
    """The columns of the table for one family."""
    keep = judged.known
    # Of a hypergradient of zero no error is small.
    zero = np.where(judged.true > 0, np.inf, 0.0)
    relative = np.where(
        judged.norm > 0, judged.true / np.maximum(judged.norm, 1e-300), zero
    )
    accepted = judged.accepted & keep
    above = keep & (judged.true > judged.rounding)
    ratio = (judged.said / np.where(above, judged.true, 1))[above]
    return {
        "known": int(keep.sum()),
        "accepted": int(accepted.sum()),
        "wrong": int((accepted & ~(relative <= 10 * rtol)).sum()),
        "refused": int((keep & (relative <= rtol / 2) & ~judged.accepted).sum()),
        "unknown": int((keep & ~np.isfinite(judged.said)).sum()),
        "above": int(above.sum()),
        "within": int(((ratio >= 0.5) & (ratio <= 2)).sum()),
        "low": int((ratio < 0.1).sum()),
        "products": float(judged.products[keep].sum()),
        "plain": float(judged.plain_products[keep].sum()),
    }


def line(name: str, row: dict[str, float]) -> str:
    """One line of the table."""
    within = row["within"] / max(row["above"], 1)
    return (
        f"{name:24}{row['known']:6.0f}{row['accepted']:10.0f}{row['wrong']:7.0f}"
        f"{row['refused']:14.0f}{row['unknown']:13.0f}{within:12.0%}{row['low']:12.0f}"
        f"{row['products'] / row['plain']:10.2f}"
    )


HEADER = (
    f"{'':24}{'known':>6}{'accepted':>10}{'wrong':>7}{'refused good':>14}"
    f"{'no estimate':>13}{'within 2x':>12}{'10x too low':>12}{'products':>10}"
)

BOUNDS_HEADER = (
    f"{'bound over error':24}{'broken':>8}{'median':>8}{'90 %':>8}{'products':>10}"
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rtol", type=float, default=1e-3)
    parser.add_argument("--linear-rtol", type=float, default=1e-5)
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    names = [name for name in FAMILIES if given.only in name]
    for dtype in (jnp.float64, jnp.float32):
        print(f"{np.dtype(dtype).name}, rtol={given.rtol:g}\n{HEADER}")
        rows = []
        for name in names:
            kind = mo.CG if FAMILIES[name].minimise else mo.GMRES
            adjoint = mo.ImplicitAdjoint(kind(rtol=given.linear_rtol), rtol=given.rtol)
            out = measure(name, dtype, given.count, given.seed, adjoint)
            rows.append(summary(out, given.rtol))
            print(line(name, rows[-1]), flush=True)
        total = {key: float(sum(row[key] for row in rows)) for key in rows[0]}
        print(line("all", total), flush=True)
        print(f"\n{BOUNDS_HEADER}")
        for name in BOUNDS:
            if name not in names:
                continue
            ratio, products = bounds(name, dtype, given.count, given.seed)
            broken, median, most = (
                (ratio < 1).sum(),
                np.median(ratio),
                np.quantile(ratio, 0.9),
            )
            print(
                f"{name:24}{broken:8}{median:8.2f}{most:8.2f}{products:10.2f}", flush=True
            )
        print()


if __name__ == "__main__":
    main()
