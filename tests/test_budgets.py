"""Budgets of bytes at the sizes that they are for: deep, wide and long runs.

Compiled and not run, so that what would take gigabytes takes none. Values are compared in
shorter runs of the same networks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import metaopt as mo
from problems import relative_error


MIB = 1024**2


class Case(NamedTuple):
    """A network with layers of tanh, and how it is trained."""

    widths: tuple[int, ...]
    batch_size: int
    num_steps: int
    momentum: float | None = None
    reversible: bool = False

    def inner(self, num_steps: int) -> mo.extend.AbstractSolver:
        if self.reversible:
            momentum = self.momentum or 0.0
            return mo.ReversibleSGD(lambda h: jnp.exp(h["rate"]), momentum, num_steps)
        return mo.Descent(self.transform, num_steps)

    def transform(self, hyper) -> optax.GradientTransformationExtraArgs:
        return optax.sgd(jnp.exp(hyper["rate"]), self.momentum)


LONG = Case((784, 300, 100, 10), 64, 1000, 0.9)  # 266,200 params
CASES = {
    "deep": Case((128,) * 33, 4096, 16),
    "wide": Case((512,) * 7, 64, 100),
    "long": LONG,
    "reversible": LONG._replace(reversible=True),
}


def outer_loss(params, hyper, batch):
    x, y = batch
    for weight in params:
        x = jnp.tanh(x @ weight)
    return jnp.mean((x - y) ** 2)


def inner_loss(params, hyper, batch):
    squares = sum(jnp.sum(weight**2) for weight in params)
    return outer_loss(params, hyper, batch) + jnp.exp(hyper["decay"]) * squares


PROBLEM = mo.BilevelProblem(inner_loss, outer_loss)


def structs(widths: tuple[int, ...], num_rows: int) -> tuple[Any, ...]:
    """The shapes of hyper, params, train and valid, in float32."""
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params = [struct(*shape) for shape in zip(widths, widths[1:])]
    rows = struct(num_rows, widths[0]), struct(num_rows, widths[-1])
    return {"rate": struct(), "decay": struct()}, params, rows, rows


def compiled(
    inner: mo.extend.AbstractSolver,
    adjoint: mo.extend.AbstractAdjoint,
    arguments: tuple[Any, ...],
) -> tuple[Any, int, str]:
    """The hypergradient, its temporary memory as XLA plans it, and what was chosen."""

    def gradient(hyper, params, train, valid):
        settings: Any = {"inner": inner, "adjoint": adjoint, "throw": False}
        return mo.hypergradient(PROBLEM, hyper, train, valid, params=params, **settings)

    lowered = jax.jit(gradient).lower(*arguments)
    out = lowered.compile()
    analysis: Any = out.memory_analysis()
    return out, analysis.temp_size_in_bytes, lowered.out_info[1].adjoint


# One product of this network's Hessian with a vector, in plain JAX, takes 132 MiB, and
# 64 MiB more under the XLA of later versions.
DEEP = "155MiB" if jax.__version_info__ < (0, 11) else "225MiB"


PLAIN = mo.UnrolledAdjoint(mo.memory.StoreAll())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name, budget, num_bytes, plain",
    [
        ("deep", DEEP, int(DEEP[:3]) * MIB, 4000 * MIB),
        ("wide", "140MiB", 140 * MIB, 1000 * MIB),
        ("long", "85MB", 85 * 10**6, 2000 * 10**6),
        ("reversible", "25MB", 25 * 10**6, 2000 * 10**6),
    ],
)
def test_budget_is_kept(name, budget, num_bytes, plain):
    case = CASES[name]
    inner, arguments = case.inner(case.num_steps), structs(case.widths, case.batch_size)
    _, size, _ = compiled(inner, PLAIN, arguments)
    assert size > plain
    _, size, chosen = compiled(inner, mo.UnrolledAdjoint(budget), arguments)
    assert size <= num_bytes
    # Steps that can be undone are, before any are taken a second time.
    assert ("ReversibleAdjoint" in chosen) == case.reversible


def by_hand(case: Case, num_steps: int, hyper, params, train, valid):
    """Plain JAX: the derivative of a scan of derivatives."""

    def outer(hyper):
        transform = case.transform(hyper)

        def step(carry, _):
            params, state = carry
            gradient = jax.grad(inner_loss)(params, hyper, train)
            updates, state = transform.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = params, transform.init(params)
        (last, _), _ = jax.lax.scan(step, carry, None, num_steps)
        return outer_loss(last, hyper, valid)

    return jax.grad(outer)(hyper)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CASES)
def test_value_under_a_budget_is_that_of_plain_jax(name):
    # Fewer rows and steps of the same networks, and budgets that are short for them.
    case, num_rows, num_steps, keys = CASES[name], 16, 16, jax.random.key(0)
    hyper = {"rate": jnp.log(jnp.float32(0.1)), "decay": jnp.float32(-5.0)}
    shapes = jax.tree.leaves(structs(case.widths, num_rows)[1:])
    leaves = [
        jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(jax.random.split(keys, len(shapes)), shapes)
    ]
    params = [weight / jnp.sqrt(jnp.float32(len(weight))) for weight in leaves[:-4]]
    arguments = hyper, params, tuple(leaves[-4:-2]), tuple(leaves[-2:])

    inner = case.inner(num_steps)
    unrolled, plain, _ = compiled(inner, PLAIN, arguments)
    budget = plain // 3 if case.reversible else plain * 2 // 3
    gradient, size, chosen = compiled(inner, mo.UnrolledAdjoint(budget), arguments)
    assert size <= budget and "StoreAll" not in chosen
    assert ("ReversibleAdjoint" in chosen) == case.reversible
    value, want = gradient(*arguments)[0], unrolled(*arguments)[0]
    # Sums in another order, in float32.
    assert relative_error(value, want) < 1e-5
    want = jax.jit(by_hand, static_argnums=(0, 1))(case, num_steps, *arguments)
    # Steps that can be undone are rounded to multiples of 2.4e-7.
    assert relative_error(value, want) < (1e-4 if case.reversible else 1e-5)


#
# Implicit differentiation
#


@pytest.mark.ci
def test_memory_of_implicit_differentiation_does_not_grow_with_the_steps():
    arguments = structs((32, 32), 128)

    def growth(adjoint):
        few, many = (
            compiled(mo.Descent(optax.sgd(0.1), num_steps), adjoint, arguments)[1]
            for num_steps in (10, 800)
        )
        return many / few

    implicit = growth(mo.ImplicitAdjoint(mo.CG()))
    unrolled = growth(mo.UnrolledAdjoint())
    # The losses of the steps are kept, 3 kB; nothing else is.
    assert implicit <= 1.2
    assert unrolled > 5
