"""Every adjoint on every problem it serves, against closed forms; and everything that
`hyper`, params, losses and data may be, against closed forms and finite differences."""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import metaopt as mo
from members import ADJOINTS, inner_solver
from problems import Case, CASES, flat, relative_error


#
# The table
#

# Inner problems and linear systems are solved to 1e-12 (1e-5) relative, and condition
# numbers are below 10; what is left of three digits is for rounding.
RTOL = {jnp.float64: 1e-10, jnp.float32: 2e-4}

# What the quick run leaves out: a cell of the table costs about a second to compile. Each
# adjoint meets each problem there, each in one dtype, and one of each kind in the other.
_IN_FULL = ("unrolled", "forward", "truncated", "one step", "implicit, CG")


def _is_quick(adjoint: str, case: str, dtype: Any, mode: str) -> bool:
    if (dtype, mode) == (jnp.float64, "jit"):
        return True
    if (dtype, mode) == (jnp.float32, "vmap"):
        return adjoint in _IN_FULL or case in ("fixed point", "root")
    return False


def _cells() -> Iterator[Any]:
    for adjoint, member in ADJOINTS.items():
        for case in CASES:
            if CASES[case](jnp.float64).kind not in member.serves:
                continue
            for dtype in RTOL:
                for mode in ("jit", "vmap"):
                    quick = _is_quick(adjoint, case, dtype, mode)
                    yield pytest.param(
                        adjoint,
                        case,
                        dtype,
                        mode,
                        id=f"{adjoint}-{case}-{dtype.__name__}-{mode}",
                        marks=() if quick else pytest.mark.slow,
                    )


@pytest.mark.parametrize("adjoint, case, dtype, mode", list(_cells()))
def test_hypergradient_is_the_closed_form(adjoint, case, dtype, mode):
    member, case = ADJOINTS[adjoint], CASES[case](dtype)
    static = eqx.partition(case.hyper, eqx.is_inexact_array)[1]

    def gradient(trainable):
        out, report = mo.hypergradient(
            case.problem,
            eqx.combine(trainable, static),
            case.params,
            *case.data,
            inner=inner_solver(case),
            adjoint=member.make(case),
        )
        return out, report.outer_loss

    hypers = [case.hyper, case.moved]
    points = [eqx.filter(hyper, eqx.is_inexact_array) for hyper in hypers]
    if mode == "jit":
        hypers, compiled = hypers[:1], jax.jit(gradient)
        found = [compiled(points[0])]
    else:
        stacked = jax.vmap(gradient)(jax.tree.map(lambda *a: jnp.stack(a), *points))
        found = [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(2)]
    for hyper, (out, outer_loss) in zip(hypers, found, strict=True):
        twin = case.reference(hyper)
        want = twin.gradient(member.num_terms, case.rate)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves((out, outer_loss)))
        assert relative_error(out, want) < RTOL[dtype]
        assert abs(outer_loss / twin.outer_loss - 1) < RTOL[dtype]
