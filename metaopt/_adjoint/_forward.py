"""Forward differentiation: tangents carried along with the steps."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from .._core._tree import split_trainable
from .._core._types import Vector
from .._jaxpr._dependence import influences, passes_loop
from .._report import inner_steps, Work
from ._base import AbstractAdjoint
from ._bias import Bias
from ._path import (
    check_iterative,
    Derivatives,
    in_reverse,
    path_hypergradient,
    PathObjective,
)
from ._reach import AbstractReach, AlongPath


class ForwardAdjoint(AbstractAdjoint):
    """Forward mode through every step of the inner solver.

    As exact as [`metaopt.UnrolledAdjoint`][], with memory that does not grow with the
    number of steps; time and memory grow with the number of outer variables instead.
    Use it for a handful of them (Franceschi, Donini, Frasconi and Pontil, 2017).
    Everything that is differentiated counts: inside `jax.grad`, arrays that the loss
    closes over as well.
    """

    reach: ClassVar[AbstractReach] = AlongPath()

    @property
    def bias(self):
        return Bias()

    def check(self, solver, data):
        check_iterative(self, solver)

    def work(self, columns, num_hyper):
        """Count the work of outer steps, as a [`metaopt.extend.CountsWork`][]."""
        steps = inner_steps(columns)
        return Work(gradients=steps + 1, products=num_hyper * steps)

    def solve(self, inner, params, hyper, model_state, throw):
        loop = inner.loop(params)
        trainable, static = split_trainable(hyper)

        def run(params, trainable, model_state):
            full_hyper = eqx.combine(trainable, static)
            full_params = eqx.combine(params, loop.static_params)
            state = loop.start(full_params, full_hyper, model_state)
            body = lambda state, draw: loop.step(full_hyper, state, draw)
            return jax.lax.scan(body, state, loop.draws, loop.num_steps)

        inputs = split_trainable(params)[0], trainable, model_state
        run = eqx.filter_closure_convert(run, *inputs)
        return loop.finish(*_with_forward_derivative(run, inputs))

    def hypergradient(self, inner, outer, start, hyper, carry):
        trainable, static = split_trainable(hyper)

        def outer_loss(variables):
            params, trainable = variables
            full = eqx.combine(params, static_params)
            return outer(full, eqx.combine(trainable, static), model_state)[0]

        params, model_state = start(hyper)
        params, static_params = split_trainable(params)
        loops = passes_loop(outer_loss, (params, trainable))
        differentiate = _by_columns if loops else in_reverse
        return path_hypergradient(self, differentiate, inner, outer, start, hyper)


def _by_columns(objective: PathObjective, hyper: Vector) -> Derivatives:
    """Differentiate an objective at `hyper` in forward mode: for an outer loss that
    reverse mode cannot pass. It is evaluated once for each outer variable, and
    for each of the two arguments."""
    both = hyper, hyper

    def derivative(direction):
        value = lambda both: objective(*both)[0]
        return jax.jvp(value, (both,), (direction,))[1]

    # A leaf that no derivative reaches must not seem reached.
    table = influences(derivative, both)
    used = jax.tree.unflatten(jax.tree.structure(both), [any(row) for row in table])
    flat, unravel = ravel_pytree(both)
    rows = jax.vmap(lambda direction: derivative(unravel(direction)))(
        jnp.eye(flat.size, dtype=flat.dtype)
    )
    value, arrays = objective(*both)
    slopes = unravel(rows.astype(flat.dtype))
    zeros = jax.tree.map(jnp.zeros_like, both)
    through, direct = jax.tree.map(lambda use, a, b: a if use else b, used, slopes, zeros)
    return value, arrays, through, direct


@eqx.filter_custom_jvp
def _with_forward_derivative(run, inputs):
    return run(*inputs)


@_with_forward_derivative.def_jvp
def _(primals, tangents):
    # The Jacobian J comes from forward mode and the tangent of the output is J times
    # the tangent of the input, which JAX can transpose: reverse mode outside, forward
    # mode inside. `None` marks what is not differentiated at all.
    moving = jax.tree.map(
        lambda t, p: p if t is not None else None,
        tangents,
        primals,
        is_leaf=lambda x: x is None,
    )
    fixed = jax.tree.map(
        lambda t, p: None if t is not None else p,
        tangents,
        primals,
        is_leaf=lambda x: x is None,
    )

    def outputs(moving, fixed):
        run, inputs = eqx.combine(moving, fixed)
        return eqx.partition(run(*inputs), eqx.is_inexact_array)

    def derivatives(moving, direction):
        out = lambda moving: outputs(moving, fixed)[0]
        return jax.jvp(out, (moving,), (direction,))[1]

    # A leaf that no derivative reaches needs no columns, and must not seem reached.
    table = influences(lambda direction: derivatives(moving, direction), moving)
    used = jax.tree.unflatten(jax.tree.structure(moving), [any(row) for row in table])
    table = [row for row in table if any(row)]
    moving, idle = eqx.partition(moving, used)
    fixed = eqx.combine(fixed, idle)
    tangents = jax.tree.leaves(eqx.filter(tangents, used))
    flat, unravel = ravel_pytree(moving)

    def column(direction):
        fn = lambda flat: outputs(unravel(flat), fixed)
        return jax.jvp(fn, (flat,), (direction,), has_aux=True)

    basis = jnp.eye(flat.size, dtype=flat.dtype)
    inexact, jacobian, rest = jax.vmap(column, out_axes=(None, 0, None))(basis)
    ends = np.cumsum([tangent.size for tangent in tangents])
    columns, structure = jax.tree.flatten(jacobian)
    columns = [
        sum(
            jnp.tensordot(t.ravel().astype(j.dtype), j[end - t.size : end], 1)
            for t, end, row in zip(tangents, ends, table, strict=True)
            if row[index]
        )
        for index, j in enumerate(columns)
    ]
    out = eqx.combine(inexact, rest)
    tangent = jax.tree.unflatten(
        structure, [column if eqx.is_array(column) else None for column in columns]
    )
    return out, eqx.combine(tangent, jax.tree.map(lambda _: None, out))
