"""Losses whose gradient is differentiated forward over reverse."""

from typing import Any

import equinox as eqx
import jax
import jax.extend.core.primitives as prims
import jax.numpy as jnp

from ._data import AbstractData
from ._detach import forbid_derivative
from ._problem import AbstractInnerProblem, AbstractProblem
from ._rewrite import inner_jaxprs
from ._tree import split_trainable, tree_dot


def in_mixed_mode(
    problem: AbstractProblem, data: AbstractData
) -> tuple[AbstractProblem, AbstractData]:
    r"""The same problem, the gradient of whose loss is differentiated in mixed mode.

    The derivative of a step of gradient descent holds the second derivatives of the
    loss, in `params` and mixed. Differentiated in reverse mode twice, it keeps what each
    layer computed, in the forward pass and in the backward pass. In mixed mode it keeps
    `params` alone: the second derivatives of $L(params, hyper)$ are symmetric, so one
    derivative of its whole gradient in the direction of the cotangent, a forward
    derivative, is what the transposed derivative of the gradient would be. Nor are
    batches kept, which are a part of the data: the problem gathers them itself.

    Derivatives of the gradient may be taken in reverse or in forward mode and batched,
    and once only: a second one is an error. Problems that do not minimise a loss stay as
    they are. A loss that holds a function with a custom reverse rule need not have
    symmetric second derivatives, nor forward ones: its gradient is made again in the
    reverse pass instead. Custom forward rules are taken to be derivatives.

    **Arguments:**

    - `problem`, `data`: an inner problem and where its batches come from.

    **Returns:**

    A problem and a source, for a loop that computes the same.

    ??? cite "Source"

        Kemaev, Calian, Zintgraf, Farquhar, van Hasselt: *Scalable meta-learning via
        mixed-mode differentiation*, 2025.
    """
    if not isinstance(problem, AbstractInnerProblem):
        return problem, data
    return _MixedMode(problem, data), _Draws(data)


class _Draw(eqx.Module):
    """A draw in the place of the batch that it stands for."""

    draw: Any


class _Draws(AbstractData):
    """A source of draws, of which the problem makes batches."""

    data: AbstractData

    @property
    def varies(self):
        return self.data.varies

    def check(self, num_steps):
        self.data.check(num_steps)

    def plan(self, key, num_steps):
        return self.data.plan(key, num_steps)

    def batch(self, draw):
        return _Draw(draw)

    def full(self):
        return self.data.full()


class _MixedMode(AbstractInnerProblem):
    problem: AbstractInnerProblem
    data: AbstractData
    has_aux: bool = eqx.field(static=True)
    has_state: bool = eqx.field(static=True)

    def __init__(self, problem: AbstractInnerProblem, data: AbstractData):
        self.problem = problem
        self.data = data
        self.has_aux = problem.has_aux
        self.has_state = problem.has_state

    def init(self, hyper, key):
        return self.problem.init(hyper, key)

    def loss(self, params, hyper, batch, *, key, state=None):
        trainable, static = split_trainable(params)
        static_extras: Any = None

        def evaluate(trainable):
            nonlocal static_extras
            full = eqx.combine(trainable, static)
            rows = self.data.batch(batch.draw)
            out = self.problem.evaluate(full, hyper, rows, key, state)
            extras, static_extras = eqx.partition((out.state, out.aux), eqx.is_array)
            return out.value, extras

        # `hyper`, data and what the loss closes over become arrays of this function.
        evaluate = eqx.filter_closure_convert(evaluate, trainable)
        if _has_custom_reverse_rule(evaluate, trainable):
            remade = jax.checkpoint(lambda p: evaluate(p), prevent_cse=False)
            value, extras = remade(trainable)
        else:
            value, extras = _evaluate(evaluate, trainable)
        new_state, aux = eqx.combine(extras, static_extras)
        parts = [value]
        if self.has_state:
            parts.append(new_state)
        if self.has_aux:
            parts.append(aux)
        return tuple(parts) if len(parts) > 1 else value


def _has_custom_reverse_rule(fn, params) -> bool:
    def within(jaxpr) -> bool:
        return any(
            eqn.primitive is prims.custom_vjp_call_p or any(map(within, inner_jaxprs(eqn)))
            for eqn in jaxpr.eqns
        )

    return within(jax.make_jaxpr(fn)(params))


@eqx.filter_custom_jvp
def _evaluate(fn, params):
    return fn(params)


@_evaluate.def_jvp
def _(primals, tangents):
    (fn, params), (moving_fn, moving_params) = primals, tangents
    if jax.tree.leaves(moving_fn):
        return eqx.filter_jvp(lambda fn, params: fn(params), primals, tangents)
    direction = _with_zeros(moving_params, params, moving_params)
    (value, extras), gradient = _gradient(fn, params)
    extra_tangents = eqx.filter_jvp(lambda p: fn(p)[1], (params,), (direction,))[1]
    tangent = tree_dot(gradient, direction).astype(value.dtype)
    return (value, extras), (tangent, extra_tangents)


@eqx.filter_custom_jvp
def _gradient(fn, params):
    return jax.value_and_grad(fn, has_aux=True)(params)


@_gradient.def_jvp
def _(primals, tangents):
    out = _gradient(*primals)
    arrays, static = eqx.partition(primals, eqx.is_inexact_array)
    fn, params = eqx.combine(forbid_derivative(arrays, _ONCE), static)
    moving_fn, moving_params = tangents
    direction = moving_fn, _with_zeros(moving_params, params, tangents)
    moving, fixed = eqx.partition(fn, _like(moving_fn, fn))

    def evaluate(moving, params):
        return eqx.combine(moving, fixed)(params)

    gradients = jax.grad(lambda *args: evaluate(*args)[0], (0, 1))

    def along_direction(_, direction):
        return jax.jvp(gradients, (moving, params), direction)[1]

    def along_cotangent(_, cotangent):
        # The part of the cotangent that belongs to `moving` is zero: only that of the
        # gradient in `params` is used below.
        of_params = lambda params: gradients(moving, params)
        return jax.jvp(of_params, (params,), (cotangent[1],))[1]

    # The identity, solved by a product with the Hessian: JAX can transpose and batch it.
    _, tangent = jax.lax.custom_linear_solve(
        lambda x: x, direction, along_direction, along_cotangent
    )
    remade = jax.checkpoint(evaluate, prevent_cse=False)
    of_outputs = eqx.filter_jvp(remade, (moving, params), direction)[1]
    return out, (of_outputs, tangent)


def _with_zeros(tangents, primals, moving):
    """`None` stands for a tangent that is zero. It becomes a linear function of what
    moves, because JAX transposes a linear solve only if all of its right-hand side is
    linear."""
    empty = jnp.ravel(jax.tree.leaves(moving)[0])[:0]
    return jax.tree.map(
        lambda p, t: jnp.full_like(p, jnp.sum(empty)) if t is None else t,
        primals,
        tangents,
    )


def _like(tangents, primals):
    return jax.tree.map(
        lambda t, p: t is not None, tangents, primals, is_leaf=lambda x: x is None
    )


_ONCE = (
    "A second derivative was asked of a hypergradient whose steps are differentiated in "
    "mixed mode, which allows for one. Use `metaopt.UnrolledAdjoint(metaopt.StoreAll())`, "
    "whose steps are differentiated plainly."
)
