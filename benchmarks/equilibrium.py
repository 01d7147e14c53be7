"""Times equilibrium layers, forward and backward, beside other ways to solve for them.

Three tanh cells of width 512 on a batch of 256, to a relative tolerance of 1e-4 forward
and backward: one as training begins, one that contracts slowly (symmetric, with a spectral
radius near 0.95), and one whose Jacobian is far from normal as well. The measure is a
textbook Anderson acceleration in plain JAX: a history of five for each example, the weights
from one system of six unknowns for each, on both passes. It is written for a batch, with
one loop and one residual for all; the same under `jax.vmap`, where each example stops by
itself, is another row. jaxopt and banax (Python 3.12 and later) take part where they are
installed.

All are compiled and checked against a solution to convergence, then run in turn. Printed
are ratios to the textbook, of the least of the times; the steps taken; and the error of the
gradient.

    python benchmarks/equilibrium.py [--repeats 10] [--width 512] [--batch 256]
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import metaopt as mo


RTOL, MAX_STEPS, HISTORY = 1e-4, 200, 5
TEXTBOOK = "textbook Anderson"


class Cell(eqx.Module):
    """One affine map of a batch and a tanh."""

    weight: jax.Array
    inputs: jax.Array

    def __call__(self, z, x):
        return jnp.tanh(z @ self.weight.T + x @ self.inputs.T)


def easy(width):
    """A cell as it is when training begins."""
    rng = np.random.default_rng(0)
    return Cell(
        jnp.asarray(0.7 * rng.standard_normal((width, width)) / width**0.5, jnp.float32),
        jnp.asarray(rng.standard_normal((width, width)) / width**0.5, jnp.float32),
    )


def slow(width, upper=0.0):
    """Eigenvalues up to 0.95, and small inputs, so that tanh does not take much of that
    away. With `upper`, eigenvectors that are not orthogonal."""
    rng = np.random.default_rng(0)
    above = upper * np.triu(rng.standard_normal((width, width)), 1) / width**0.5
    basis, _ = np.linalg.qr(rng.standard_normal((width, width)))
    weight = basis @ (np.diag(np.linspace(-0.95, 0.95, width)) + above) @ basis.T
    inputs = 0.05 * rng.standard_normal((width, width)) / width**0.5
    return Cell(jnp.asarray(weight, jnp.float32), jnp.asarray(inputs, jnp.float32))


# The textbook


def textbook_anderson(fn, start):
    """Anderson acceleration for each row of a matrix, as it is written by hand."""
    rows, width = start.shape

    def step(carry):
        points, values, k, _, z = carry
        gaps = values - points
        used = (jnp.arange(HISTORY) < jnp.minimum(k, HISTORY)).astype(start.dtype)
        gram = jnp.einsum("bmd,bnd->bmn", gaps, gaps) * used[:, None] * used
        gram = gram + jnp.diag(1e-4 * used + (1 - used))
        border = jnp.broadcast_to(used, (rows, HISTORY))
        top = jnp.concatenate([jnp.zeros((rows, 1)), border], 1)[:, None]
        system = jnp.concatenate([top, jnp.concatenate([border[..., None], gram], 2)], 1)
        right = jnp.zeros((rows, HISTORY + 1)).at[:, 0].set(1)
        weights = jnp.linalg.solve(system, right[..., None])[:, 1:, 0] * used
        z = jnp.einsum("bm,bmd->bd", weights, values)
        value = fn(z)
        slot = k % HISTORY
        left = jnp.linalg.norm(value - z) / (1e-5 + jnp.linalg.norm(value))
        points, values = points.at[:, slot].set(z), values.at[:, slot].set(value)
        return points, values, k + 1, left, value

    points = jnp.zeros((rows, HISTORY, width), start.dtype)
    first = fn(start)
    second = fn(first)
    points = points.at[:, 0].set(start).at[:, 1].set(first)
    values = jnp.zeros_like(points).at[:, 0].set(first).at[:, 1].set(second)
    carry = points, values, jnp.asarray(2), jnp.asarray(jnp.inf), second
    goes_on = lambda carry: (carry[2] < MAX_STEPS) & (carry[3] > RTOL)
    _, _, count, _, z = jax.lax.while_loop(goes_on, step, carry)
    return z, count


def textbook_picard(fn, start):
    """The plain iteration, for all rows at once."""

    def step(carry):
        z, k, _ = carry
        value = fn(z)
        left = jnp.linalg.norm(value - z) / (1e-5 + jnp.linalg.norm(value))
        return value, k + 1, left

    goes_on = lambda carry: (carry[1] < MAX_STEPS) & (carry[2] > RTOL)
    carry = start, jnp.asarray(0), jnp.asarray(jnp.inf, start.dtype)
    z, count, _ = jax.lax.while_loop(goes_on, step, carry)
    return z, count


def textbook(solve):
    """A layer with its adjoint equation, solved in the same way."""

    @jax.custom_vjp
    def layer(cell, x):
        return solve(lambda z: cell(z, x), jnp.zeros_like(x))[0]

    def forward(cell, x):
        z = layer(cell, x)
        return z, (cell, x, z)

    def backward(kept, cotangent):
        cell, x, z = kept
        _, pull = jax.vjp(lambda z: cell(z, x), z)
        into, _ = solve(lambda w: cotangent + pull(w)[0], cotangent)
        _, pull = jax.vjp(lambda cell, x: cell(z, x), cell, x)
        return pull(into)

    layer.defvjp(forward, backward)
    steps = lambda cell, x: solve(lambda z: cell(z, x), jnp.zeros_like(x))[1]
    return layer, steps


def by_example(pair):
    """A layer under `jax.vmap`, and the most steps that an example takes."""
    layer, steps = pair
    each = lambda cell, x: jax.vmap(lambda x: layer(cell, x[None])[0])(x)
    most = lambda cell, x: jnp.max(jax.vmap(lambda x: steps(cell, x[None]))(x))
    return each, most


# Others


def equilibrium_layer(cell, solver, linear, throw=True):
    adjoint = mo.ImplicitAdjoint(mo.linear.LinearFixedPoint(linear), inner_rtol=0.1)
    return mo.nn.Equilibrium(cell, solver=solver, adjoint=adjoint, throw=throw)


def ours(solver, linear):
    made = lambda cell: equilibrium_layer(cell, solver, linear)
    return lambda cell, x: made(cell)(x)[0], lambda cell, x: made(cell)(x)[1].num_steps


def in_jaxopt():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jaxopt

    def solver(fn):
        return jaxopt.AndersonAcceleration(
            fn, history_size=HISTORY, maxiter=MAX_STEPS, tol=1e-3, ridge=1e-5
        )

    def run(cell, x):
        # Its tolerance is an absolute one, on the norm of the residual.
        return solver(lambda z, cell, x: cell(z, x)).run(jnp.zeros_like(x), cell, x)

    return lambda cell, x: run(cell, x).params, lambda cell, x: run(cell, x).state.iter_num


def in_banax(kind):
    from banax import adjoint, solver  # pyright: ignore[reportMissingImports]

    kwargs: dict[str, Any] = {"rtol": RTOL, "max_steps": MAX_STEPS}
    made = getattr(solver, kind)(**kwargs)
    implicit = adjoint.Implicit(solver=made, b_solver=made)
    start = lambda x: jax.lax.stop_gradient(jnp.zeros_like(x))
    run = lambda cell, x: implicit((lambda z, cell, x: cell(z, x), (cell, x)), start(x))
    return lambda cell, x: run(cell, x).value, lambda cell, x: run(cell, x).stats.steps


def contenders() -> dict[str, Callable]:
    anderson = mo.Anderson(MAX_STEPS, rtol=RTOL, history_size=HISTORY)
    each = mo.Anderson(MAX_STEPS, rtol=RTOL, history_size=HISTORY, per_example=True)
    broyden = mo.Broyden(MAX_STEPS, rtol=RTOL)
    picard = mo.Picard(MAX_STEPS, rtol=RTOL)
    return {
        TEXTBOOK: lambda: textbook(textbook_anderson),
        "textbook Anderson, vmap": lambda: by_example(textbook(textbook_anderson)),
        "metaopt, Anderson": lambda: ours(anderson, anderson),
        "metaopt, Anderson per example": lambda: ours(each, each),
        "metaopt, Anderson, vmap": lambda: by_example(ours(anderson, anderson)),
        "metaopt, Broyden": lambda: ours(broyden, broyden),
        "metaopt, Picard": lambda: ours(picard, picard),
        "jaxopt, Anderson": in_jaxopt,
        "banax, Anderson": lambda: in_banax("Anderson"),
        "banax, Broyden": lambda: in_banax("Broyden"),
        "banax, Picard": lambda: in_banax("Picard"),
    }


def loss_gradient(layer, cotangent):
    return jax.jit(
        jax.grad(lambda cell, x: jnp.sum(cotangent * layer(cell, x)), argnums=(0, 1))
    )


def truth(cell, x, cotangent):
    """The gradient in double precision, by the plain iteration on both sides."""
    cell, x, cotangent = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float64), (cell, x, cotangent)
    )
    z = jax.lax.fori_loop(0, 2000, lambda _, z: cell(z, x), jnp.zeros_like(x))
    _, pull = jax.vjp(lambda z: cell(z, x), z)
    w = jax.lax.fori_loop(0, 2000, lambda _, w: cotangent + pull(w)[0], cotangent)
    return jax.vjp(lambda cell, x: cell(z, x), cell, x)[1](w)


def distance(a, b):
    flat = lambda tree: np.concatenate(
        [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    )
    a, b = flat(a), flat(b)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def compare(title, cell, width, batch, repeats):
    rng = np.random.default_rng(1)
    x, cotangent = (
        jnp.asarray(rng.standard_normal((batch, width)), jnp.float32) for _ in range(2)
    )
    with jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, jax.jit(truth)(cell, x, cotangent))
    runs, notes = {}, {}
    for name, make in contenders().items():
        try:
            layer, steps = make()
        except ImportError:
            continue
        try:
            gradient = loss_gradient(layer, cotangent)
            error = distance(gradient(cell, x), exact)
        except Exception as failure:
            print(f"{name}: {str(failure).splitlines()[0][:100]}")
            continue
        runs[name] = gradient
        notes[name] = int(jax.jit(steps)(cell, x)), error
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, gradient in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(gradient(cell, x))
            times[name].append(time.perf_counter() - begin)
    base = min(times[TEXTBOOK])
    print(f"\n{title}")
    print(f"{'':30}{'ms':>7}{'ratio':>7}{'steps':>7}{'error':>10}")
    for name, (count, error) in notes.items():
        least = min(times[name])
        row = f"{1e3 * least:7.0f}{least / base:7.2f}{count:7}{error:10.1e}"
        print(f"{name:30}{row}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    size = options.width, options.batch
    cells = {
        "as training begins": easy(options.width),
        "slow": slow(options.width),
        "slow and not normal": slow(options.width, 0.7),
    }
    for title, cell in cells.items():
        compare(title, cell, *size, options.repeats)


if __name__ == "__main__":
    main()
