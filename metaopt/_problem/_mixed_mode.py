"""Losses whose gradient is differentiated forward over reverse."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.extend.core.primitives as prims
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir

from .._core._tree import split_trainable, tree_dot, tree_zeros_like
from .._core._types import FloatScalar, Vector
from .._core._validate import check_count
from .._data import AbstractData, AbstractWrappedData
from .._jaxpr._rewrite import inner_jaxprs
from ._base import AbstractProblem, Evaluation
from ._call import returned
from ._wrapped import AbstractWrappedProblem


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
    if not problem.has_loss or isinstance(problem, InChunks):
        return problem, data
    return _MixedMode(problem, data), _Draws(data)


class InChunks(AbstractWrappedProblem):
    """An inner problem whose loss is the mean over the rows of a batch, evaluated on a
    few rows at a time: for data that do not fit in memory with all their activations.

    Gradients, products with the Hessian and mixed derivatives are added up over the
    chunks, so that memory is that of one chunk, under every adjoint. Each product
    computes the loss again, which costs about a third more than one at a point that is
    kept. The loss must be a mean over rows, to which terms may be added that do not
    depend on them (penalties); it is evaluated on each chunk, and the mean is taken.

    **Arguments:**

    - `problem`: the inner problem, without auxiliary output and model state.
    - `chunk_size`: the number of rows in a chunk; a divisor of the number of rows.

    **Raises:**

    `ValueError` for other problems, and where the rows cannot be cut like that.
    """

    problem: AbstractProblem
    chunk_size: int = eqx.field(static=True)

    def __check_init__(self):
        check_count(self.chunk_size, "chunk_size")
        if not isinstance(self.problem, AbstractProblem) or not self.problem.has_loss:
            raise ValueError(
                "`InChunks` needs a problem with a loss, such as `metaopt.InnerProblem("
                f"loss)`; got {self.problem!r}."
            )
        if self.problem.has_aux or self.problem.has_state:
            raise ValueError(
                "`InChunks` takes the mean over chunks, which auxiliary outputs and model "
                "state do not have. Leave them out of the inner problem."
            )

    def init(self, hyper, key):
        return self.problem.init(hyper, key)

    def loss(self, params, hyper, batch, *, key):
        trainable, static = split_trainable(params)
        count = self._count(batch)

        def evaluate(trainable, index):
            # Every chunk takes rows from everywhere, so that each spans all devices where
            # rows are spread over several.
            rows = jax.tree.map(
                lambda a: a.reshape(self.chunk_size, count, *a.shape[1:])[:, index], batch
            )
            full = eqx.combine(trainable, static)
            chunk_key = jax.random.fold_in(key, index)
            return self.problem.evaluate(full, hyper, rows, chunk_key, None).value, ()

        return mixed_mode_value(evaluate, trainable, count)[0]

    def _count(self, batch) -> int:
        sizes = {a.shape[0] if a.ndim else 0 for a in jax.tree.leaves(batch)}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(
                "`InChunks` cuts batches along their leading axis, which all arrays must "
                f"share; their lengths are {sorted(sizes)}."
            )
        (rows,) = sizes
        if rows % self.chunk_size:
            raise ValueError(
                f"`InChunks` cannot cut {rows} rows into chunks of {self.chunk_size}. "
                "Choose a divisor, or drop some rows."
            )
        return rows // self.chunk_size


class _Draw(eqx.Module):
    """A draw that stands for its batch, so that the batch is not stored."""

    draw: Any


class _Draws(AbstractWrappedData):
    """A source of draws, of which the problem makes batches."""

    source: AbstractData

    @property
    def varies(self):
        return self.source.varies

    def init(self, key):
        return self.source.init(key)

    def take(self, cursor, num_steps):
        return self.source.take(cursor, num_steps)

    def batch(self, draw):
        return _Draw(draw)

    def full(self):
        return self.source.full()


class _MixedMode(AbstractWrappedProblem):
    problem: AbstractProblem
    data: AbstractData

    def init(self, hyper, key):
        return self.problem.init(hyper, key)

    def loss(self, params, hyper, batch, *, key, state=None):
        trainable, static = split_trainable(params)
        static_extras: Any = None

        def evaluate(trainable, _):
            nonlocal static_extras
            full = eqx.combine(trainable, static)
            rows = self.data.batch(batch.draw)
            out = self.problem.evaluate(full, hyper, rows, key, state)
            extras, static_extras = eqx.partition((out.state, out.aux), eqx.is_array)
            return out.value, extras

        value, extras = mixed_mode_value(evaluate, trainable)
        new_state, aux = eqx.combine(extras, static_extras)
        return returned(self, Evaluation(value, new_state, aux))


_FIRST = np.zeros((), np.int32)


class _Mean(eqx.Module):
    """The mean of some functions of params, each of them given by an index."""

    fn: Callable[[Vector, Any], tuple[FloatScalar, Any]]
    count: int = eqx.field(static=True)

    def __call__(self, params: Vector) -> tuple[FloatScalar, Any]:
        return self.over_all(lambda index: self.fn(params, index))

    def over_all(self, fn: Callable[[Any], Any]) -> Any:
        """The mean of `fn(index)`, one at a time."""
        if self.count == 1:
            return fn(_FIRST)

        def add(total, index):
            return jax.tree.map(jnp.add, total, fn(index)), None

        indices = jnp.arange(self.count, dtype=_FIRST.dtype)
        zeros = tree_zeros_like(jax.eval_shape(fn, _FIRST))
        total, _ = jax.lax.scan(add, zeros, indices)
        return jax.tree.map(lambda leaf: leaf / self.count, total)


def mixed_mode_value(
    fn: Callable[[Vector, Any], tuple[FloatScalar, Any]], params: Vector, count: int = 1
) -> tuple[FloatScalar, Any]:
    """The mean of `fn(params, index)` for `count` indices, a value and extras, with a
    gradient in `params` that is differentiated in mixed mode, one index at a time.

    **Arguments:**

    - `fn`: a loss and arrays that come with it; with more than one index, no arrays.
    - `params`: the point.
    - `count`: the number of indices.
    """
    # `hyper`, data and what the loss closes over become arrays of this function.
    mean = _Mean(eqx.filter_closure_convert(fn, params, _FIRST), count)
    if _has_custom_reverse_rule(mean, params):
        remade = jax.checkpoint(mean.fn.__call__, prevent_cse=False)
        return mean.over_all(lambda index: remade(params, index))
    return _evaluate(mean, params)


def _has_custom_reverse_rule(fn, params) -> bool:
    def within(jaxpr) -> bool:
        return any(
            eqn.primitive is prims.custom_vjp_call_p or any(map(within, inner_jaxprs(eqn)))
            for eqn in jaxpr.eqns
        )

    return within(jax.make_jaxpr(fn)(params))


@eqx.filter_custom_jvp
def _evaluate(mean, params):
    return mean(params)


@_evaluate.def_jvp
def _(primals, tangents):
    (mean, params), (moving_mean, moving_params) = primals, tangents
    if jax.tree.leaves(moving_mean):
        return eqx.filter_jvp(lambda mean, params: mean(params), primals, tangents)
    direction = _with_zeros(moving_params, params, moving_params)
    (value, extras), gradient = _gradient(mean, params)
    extra_tangents = eqx.filter_jvp(lambda p: mean(p)[1], (params,), (direction,))[1]
    tangent = tree_dot(gradient, direction).astype(value.dtype)
    return (value, extras), (tangent, extra_tangents)


@eqx.filter_custom_jvp
def _gradient(mean, params):
    differentiate = jax.value_and_grad(mean.fn, has_aux=True)
    return mean.over_all(lambda index: differentiate(params, index))


@_gradient.def_jvp
def _(primals, tangents):
    out = _gradient(*primals)
    mean, params = primals
    moving_mean, moving_params = tangents
    direction = moving_mean, _with_zeros(moving_params, params, tangents)
    moving, fixed = eqx.partition(mean, _like(moving_mean, mean))

    def gradients(moving, params):
        def value(moving, params, index):
            return eqx.combine(moving, fixed).fn(params, index)[0]

        differentiate = jax.grad(value, (0, 1))
        return mean.over_all(lambda index: differentiate(moving, params, index))

    def along_direction(_, direction):
        return jax.jvp(gradients, (moving, params), direction)[1]

    def along_cotangent(_, cotangent):
        # The part of the cotangent that belongs to `moving` is zero: only that of the
        # gradient in `params` is used below.
        of_params = lambda params: gradients(moving, params)
        return jax.jvp(of_params, (params,), (cotangent[1],))[1]

    # Loop invariants, such as the data, are passed on as they are: newer versions of JAX
    # keep anything else for each step. So a number is guarded that is 1, and depends on all
    # that must not be differentiated again.
    empty = [jnp.sum(jnp.ravel(a)[:0]) for a in jax.tree.leaves(_inexact(primals))]
    nothing = sum(jnp.real(a).astype(jnp.float32) for a in empty)
    once = _once_p.bind(1.0 + nothing)

    # The identity, solved by a product with the Hessian: JAX can transpose and batch it.
    _, tangent = jax.lax.custom_linear_solve(
        lambda x: x, direction, along_direction, along_cotangent
    )
    remade = jax.checkpoint(
        lambda moving, params: eqx.combine(moving, fixed)(params), prevent_cse=False
    )
    of_outputs = eqx.filter_jvp(remade, (moving, params), direction)[1]
    guarded = lambda leaf: leaf * once.astype(leaf.dtype)
    return out, jax.tree.map(guarded, (of_outputs, tangent))


def _inexact(tree):
    return eqx.filter(tree, eqx.is_inexact_array)


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


def _refuse(primals, tangents):
    raise ValueError(_ONCE)


# A number that must not be differentiated. A primitive of its own, because a custom rule is
# forgotten in the part of a program that reverse mode runs first.
_once_p = jex.Primitive("metaopt_once")
_once_p.def_impl(lambda x: x)
_once_p.def_abstract_eval(lambda x: x)
ad.primitive_jvps[_once_p] = _refuse
batching.primitive_batchers[_once_p] = lambda xs, axes: (_once_p.bind(*xs), *axes)
mlir.register_lowering(_once_p, lambda ctx, x: [x])


_ONCE = (
    "A second derivative was asked of a hypergradient whose steps are differentiated in "
    "mixed mode, which allows for one. Use "
    "`metaopt.UnrolledAdjoint(metaopt.memory.StoreAll())`, "
    "whose steps are differentiated plainly."
)
