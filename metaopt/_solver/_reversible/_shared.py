"""The derivative of a run of many examples, with one sum for their shared inputs.

`jax.vmap` of a function with a derivative of its own batches that derivative, example by
example, whoever asked for it. A primitive is told of `jax.vmap` before it is of a
derivative that is taken outside of it, and can answer with the run of all examples. A
derivative that is taken inside, for each example, comes first, and is batched as usual.
"""

import functools as ft
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from ._derivative import Outputs, pushed_forward
from ._run import AbstractSharedRun, Inputs


def with_shared_derivative(run: AbstractSharedRun, inputs: Inputs, throw: bool) -> Outputs:
    """The result of a run, differentiable once, in reverse mode.

    **Arguments:**

    - `throw`: whether a way back that fails raises; otherwise the derivative is NaN.
    """
    return eqxi.filter_primitive_bind(_run_p, run, inputs, throw)


def _outputs(run: AbstractSharedRun, inputs: Inputs, throw: bool) -> Outputs:
    return run.record(inputs).split()


def _shapes(run, inputs, throw):
    out = eqx.filter_eval_shape(_outputs, *_structs((run, inputs, throw)))
    is_struct = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    return jax.tree.map(
        lambda x: jax.core.ShapedArray(x.shape, x.dtype) if is_struct(x) else x, out
    )


def _structs(tree: Any) -> Any:
    is_shape = lambda x: isinstance(x, jax.core.ShapedArray)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_shape(x) else x, tree
    )


def _pushed_forward(primals, tangents):
    run, inputs, throw = primals
    floats = lambda p, t: t if eqx.is_inexact_array(p) else None
    is_none = lambda x: x is None
    tangents = jax.tree.map(floats, primals, tangents, is_leaf=is_none)
    return pushed_forward(run, inputs, tangents[:2], throw)


def _for_examples(axis_name, args, axes):
    args = jax.tree.map(
        lambda axis, a: a if axis is None else jnp.moveaxis(a, axis, 0),
        axes,
        args,
        is_leaf=lambda x: x is None,
    )
    run, inputs, throw = args
    in_front = jax.tree.map(lambda _: 0, axes)
    run = run.for_examples(inputs, in_front[:2], axis_name)
    out = with_shared_derivative(run, inputs, throw)
    return out, jax.tree.map(lambda a: 0 if eqx.is_array(a) else None, out)


def _batched(axis_size, axis_name, trace_type, arrays, axes, **params):
    if all(axis is None for axis in axes):
        out = _run_p.bind(*arrays, **params)
        return out, [None] * len(out)
    rule = eqxi.filter_primitive_batching(ft.partial(_for_examples, axis_name))
    return rule(arrays, axes, **params)


_run_p = jex.Primitive("metaopt_undone_run")
_run_p.multiple_results = True
_implementation = eqxi.filter_primitive_def(_outputs)
_run_p.def_impl(_implementation)
_run_p.def_abstract_eval(eqxi.filter_primitive_def(_shapes))
ad.primitive_jvps[_run_p] = eqxi.filter_primitive_jvp(_pushed_forward)
batching.axis_primitive_batchers[_run_p] = _batched
mlir.register_lowering(_run_p, mlir.lower_fun(_implementation, multiple_results=True))
