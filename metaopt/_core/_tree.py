"""Pytrees as vectors, beyond the functions of `optax.tree`."""

import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._types import BoolScalar, FloatScalar, IntScalar, PyTree, Vector


def tree_dot(x: Vector, y: Vector) -> FloatScalar:
    """The inner product of two vectors, accumulated in at least float32.

    Half-precision leaves are multiplied and summed in float32, so that the coefficients
    of a Krylov method keep their meaning whatever the precision of the parameters.
    """

    def leaf_dot(a, b):
        # Not `jnp.dot`, which adds one product after the other on CPUs: in float32 that
        # is a tenth off at ten million entries. And no `ravel`, which gathers sharded
        # arrays.
        dtype = tree_dtype((a, b))
        return jnp.sum(a.astype(dtype) * b.astype(dtype))

    products = jax.tree.leaves(jax.tree.map(leaf_dot, x, y))
    if not products:
        return jnp.zeros((), jnp.float32)
    if len(products) == 1:
        return products[0]
    dtype = tree_dtype(products)
    return jnp.sum(jnp.stack([p.astype(dtype) for p in products]))


def tree_norm(x: Vector) -> FloatScalar:
    """The Euclidean norm of a vector, accumulated in at least float32."""
    return jnp.sqrt(tree_dot(x, x))


def tree_sum_abs(x: Vector) -> FloatScalar:
    """The sum of all absolute values, in at least float32: a norm that squares nothing,
    and is finite if and only if all entries are, unless they are near the largest
    number."""
    dtype = tree_dtype(x)
    sums = [sum_of_sizes(jnp.abs(a).astype(dtype)) for a in jax.tree.leaves(x)]
    return jnp.sum(jnp.stack(sums)) if sums else jnp.zeros((), dtype)


def sum_of_sizes(x: jax.Array) -> FloatScalar:
    """The sum of an array without negative entries.

    That of `jnp.sum` but for rounding. XLA adds up a whole matrix one entry after the
    other on CPUs, and its columns side by side: a fifth of the time. In a small network
    the sums of each step that watch it are a tenth of the step otherwise.

    **Arguments:**

    - `x`: floating-point numbers of any shape, NaN and infinity among them.
    """
    return jnp.sum(_reduced_to_columns(jnp.sum, x))


def max_of_sizes(x: jax.Array) -> FloatScalar:
    """The largest entry of an array without negative entries, zero for an empty one, in
    columns like `sum_of_sizes`."""
    largest = lambda x, axis=None: jnp.max(x, axis=axis, initial=0)
    return largest(_reduced_to_columns(largest, x))


# Fewer columns than this gain nothing from being reduced side by side.
_COLUMNS = 8


def _reduced_to_columns(reduce: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    if x.ndim < 2 or x.shape[-1] < _COLUMNS:
        return x
    columns = reduce(x, axis=tuple(range(x.ndim - 1)))
    # Changes nothing, and keeps XLA from making one reduction of the two.
    return jnp.abs(columns)


def summed(a: jax.Array, kept: int = 0) -> jax.Array:
    """The sum over all axes but the first `kept` ones.

    On CPUs XLA adds the entries of a sum one after another, where a product with ones is
    eight times as fast. Rows that are longer than a few thousand stay with the sum, which
    adds in groups and loses less to rounding.
    """
    rows = a.ndim > kept and 16 <= a.shape[-1] <= 4096
    if rows and explicit_mesh(a) is None:
        ones = jnp.ones(a.shape[-1], a.dtype)
        a = jnp.matmul(a, ones, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(a, tuple(range(kept, a.ndim)))


def tree_inner(x: Vector, y: Vector) -> FloatScalar:
    """`tree_dot`, faster on CPUs, for the loops of small systems."""
    dtype = tree_dtype((x, y))
    product = lambda a, b: summed(a.astype(dtype) * b.astype(dtype))
    products = jax.tree.leaves(jax.tree.map(product, x, y))
    return ft.reduce(jnp.add, products, jnp.zeros((), dtype))


def tree_length(x: Vector) -> FloatScalar:
    """`tree_scaled_norm`, by `tree_inner`."""
    _, scale = _power_beside(jnp.sqrt(tree_inner(x, x)))
    return scale * jnp.sqrt(tree_inner(*(divided(x, scale),) * 2))


def tree_scale(scalar: FloatScalar, x: Vector) -> Vector:
    """`scalar * x`, each leaf in its own dtype."""
    return jax.tree.map(lambda a: scalar.astype(a.dtype) * a, x)


def tree_axpy(scalar: FloatScalar, x: Vector, y: Vector) -> Vector:
    """`scalar * x + y`, each leaf in the dtype of `y`."""
    return jax.tree.map(lambda a, b: scalar.astype(b.dtype) * a + b, x, y)


def tree_add(x: Vector, y: Vector) -> Vector:
    """`x + y`."""
    return optax.tree.add(x, y)


def tree_sub(x: Vector, y: Vector) -> Vector:
    """`x - y`."""
    return optax.tree.sub(x, y)


def tree_zeros_like(x: PyTree) -> PyTree:
    """Zeros like `x` (arrays or `jax.ShapeDtypeStruct`s), sharded over the axes of an
    explicit mesh as they are."""

    def zeros(a):
        made = jnp.zeros(a.shape, a.dtype)
        return made if a.sharding is None else jax.sharding.reshard(made, a.sharding)

    return jax.tree.map(zeros, tree_structs(x))


def tree_rooms(x: PyTree, count: int) -> PyTree:
    """Room for `count` of `x`: zeros stacked on a leading axis, sharded as `x` is."""
    room = lambda a: jnp.broadcast_to(a, (count, *a.shape))
    return jax.tree.map(room, tree_zeros_like(x))


def tree_put(rooms: PyTree, slot: IntScalar, x: PyTree) -> PyTree:
    """`rooms` with one entry replaced by `x`."""
    put = lambda room, a: jax.lax.dynamic_update_index_in_dim(room, a, slot, 0)
    return jax.tree.map(put, rooms, x)


def tree_where(condition: BoolScalar, x: PyTree, y: PyTree) -> PyTree:
    """`x` where `condition` holds, else `y`; leaf by leaf, for one scalar condition."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def scale_and_norm(vector: Vector) -> tuple[FloatScalar, FloatScalar]:
    """A power of two to divide `vector` by, and its Euclidean norm once it is divided.

    The power is 1 unless the square of the vector would not be a number. The squares of
    a very small vector are all zero, and a zero right-hand side has the solution zero: an
    error that nothing would report.
    """
    _, scale = _power_beside(tree_norm(vector))
    return scale, tree_norm(divided(vector, scale))


def _power_beside(norm: FloatScalar) -> tuple[BoolScalar, FloatScalar]:
    """Whether a norm is far from the ends of what its dtype holds, and a power of two to
    divide the vector by: 1 where it is."""
    info = jnp.finfo(norm.dtype)
    # Residuals are smaller than the vector by a factor of eps, at most, and this is
    # squared; in the other direction, sums of squares must not overflow.
    low = float(info.tiny) ** 0.5 / float(info.eps)
    power = 2.0 ** (2 * info.maxexp // 3)
    # One power for all that is too large brings it into range, and one for the small.
    scale = jnp.where(norm < low, 1 / power, jnp.where(norm > 1 / low, power, 1.0))
    return (norm >= low) & (norm <= 1 / low), scale.astype(norm.dtype)


def divided(vector: Vector, scale: FloatScalar) -> Vector:
    """`vector / scale`, each leaf in its own dtype, which need not hold the scale."""

    def quotient(a):
        dtype = tree_dtype((a, scale))
        return (a.astype(dtype) / scale.astype(dtype)).astype(a.dtype)

    return jax.tree.map(quotient, vector)


def tree_where_arrays(condition: BoolScalar, new: PyTree, old: PyTree) -> PyTree:
    """`new` where `condition` holds, else `old`; leaves that are not arrays are those of
    `new`."""
    arrays, static = eqx.partition(new, eqx.is_array)
    condition = computed_once(condition)
    return eqx.combine(tree_where(condition, arrays, eqx.filter(old, eqx.is_array)), static)


def computed_once(condition: BoolScalar) -> BoolScalar:
    """The same condition, for many readers.

    On CPUs XLA computes a scalar anew in each kernel that reads it, and all that it is
    made of with it. A step of Adam on forty numbers, each of which is masked by a check of
    all of them, then holds thousands of checks and takes twenty seconds to compile in
    place of one. A sort is part of no other kernel, and works in a batch too.
    """
    return jax.lax.sort(jnp.stack([condition, condition]))[0]


def tree_nan_where(condition: BoolScalar, x: Vector) -> Vector:
    """`nan_where` for each leaf, the condition being computed once."""
    condition = computed_once(condition)
    return jax.tree.map(lambda leaf: nan_where(condition, leaf), x)


def nan_where(condition: BoolScalar, x: jax.Array) -> jax.Array:
    """NaN where `condition` holds, else `x` to the last bit.

    No NaN is made unless it holds, which `jax_debug_nans` would stop at.
    """
    return x * jnp.sqrt(jnp.where(condition, -1, 1).astype(x.dtype))


def padding() -> float:
    """The number that stands for the losses of steps that were not taken: NaN, but
    infinity under `jax_debug_nans`, which would stop at the NaN."""
    return jnp.inf if jax.config.jax_debug_nans else jnp.nan  # pyright: ignore


def tree_scaled_norm(x: Vector) -> FloatScalar:
    """The Euclidean norm of a vector whose square may overflow or vanish.

    The vector is read a second time where that happens, and only there.
    """
    norm = tree_norm(x)
    usual, scale = _power_beside(norm)
    again = lambda: scale * tree_norm(divided(x, scale))
    return jax.lax.cond(usual, lambda: norm, again)


def tree_all_finite(x: PyTree) -> BoolScalar:
    """Whether no floating-point entry of `x` is infinite or NaN."""
    leaves = jax.tree.leaves(eqx.filter(x, eqx.is_inexact_array))
    checks = [jnp.all(jnp.isfinite(a)) for a in leaves]
    return jnp.all(jnp.stack(checks)) if checks else jnp.asarray(True)


def tree_size(x: PyTree) -> int:
    """The number of floating-point entries of `x`."""
    leaves = jax.tree.leaves(eqx.filter(x, _is_inexact))
    return sum(int(np.prod(a.shape)) for a in leaves)


def tree_num_bytes(x: PyTree) -> int:
    """The size in memory of the floating-point entries of `x`."""
    leaves = jax.tree.leaves(eqx.filter(x, _is_inexact))
    return sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in leaves)


def tree_structs(x: PyTree) -> PyTree:
    """`x` with every array replaced by its `jax.ShapeDtypeStruct`, which names the axes of
    an explicit mesh that the array is sharded over."""

    def struct(a):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)

    return jax.tree.map(struct, jax.eval_shape(lambda x: x, x))


def same_structs(x: PyTree, y: PyTree) -> bool:
    """Whether two pytrees of arrays (or their structures) have the same structure, shapes
    and dtypes, however they are sharded."""

    def shapes(tree):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)

    return shapes(x) == shapes(y)


def tree_sharded_like(x: PyTree, structs: PyTree) -> PyTree:
    """`x`, sharded over the axes of an explicit mesh as `structs` say; as it is where they
    say nothing."""

    def sharded(a, struct):
        if struct.sharding is None or jax.typeof(a).sharding == struct.sharding:
            return a
        return jax.sharding.reshard(a, struct.sharding)

    return jax.tree.map(sharded, x, structs)


def with_auto_axes(fn: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """`fn(*args)`, within which the axes of an explicit mesh are automatic. If any array
    is sharded over explicit axes, the results are replicated."""
    dynamic, static = eqx.partition(args, eqx.is_array)
    mesh = explicit_mesh(dynamic)
    if mesh is None:
        return fn(*args)
    static_out: PyTree = None

    def run(dynamic):
        nonlocal static_out
        arrays, static_out = eqx.partition(fn(*eqx.combine(dynamic, static)), eqx.is_array)
        return arrays

    replicated = jax.sharding.PartitionSpec()
    # Without a mesh in the context `auto_axes` does nothing.
    with jax.sharding.use_abstract_mesh(mesh):
        arrays = jax.sharding.auto_axes(run, out_sharding=replicated)(dynamic)
    return eqx.combine(arrays, static_out)


def explicit_mesh(arrays: PyTree) -> jax.sharding.AbstractMesh | None:
    """The mesh with explicit axes over which arrays are sharded, if there is one."""
    meshes = (jax.typeof(a).sharding.mesh for a in jax.tree.leaves(arrays))
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def tree_dtype(x: PyTree) -> np.dtype:
    """The dtype in which a scalar made from the vector `x` is held: at least float32."""
    leaves = jax.tree.leaves(eqx.filter(x, _is_inexact))
    return wide_dtype(*(a.dtype for a in leaves))


def wide_dtype(*dtypes) -> np.dtype:
    """The dtype to which these promote, at least float32, under strict promotion too."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *dtypes)


def tree_widened(x: PyTree) -> PyTree:
    """`x` with arrays of half precision in float32, and everything else as it is."""

    def widened(a):
        return a.astype(jnp.float32) if _is_inexact(a) and a.dtype.itemsize == 2 else a

    return jax.tree.map(widened, x)


def tree_cast_like(x: Vector, like: Vector) -> Vector:
    """`x`, each leaf in the dtype of its counterpart."""
    return jax.tree.map(lambda a, b: a.astype(b.dtype), x, like)


def tree_strong(x: PyTree) -> PyTree:
    """`x` without weak types, which would make an equal call trace a second time."""

    def strong(a):
        if not eqx.is_inexact_array(a) or not jax.typeof(a).weak_type:
            return a
        return jax.lax.convert_element_type(a, a.dtype)

    return jax.tree.map(strong, x)


def tree_entangled(x: Vector) -> Vector:
    """`x`, each leaf of which depends on all others for JAX and not in its value.

    The transpose of a linear solve takes a right-hand side for linear only where each of
    its leaves depends on what is transposed.
    """
    leaves, structure = jax.tree.flatten(x)
    if len(leaves) < 2:
        return x
    dtype = tree_dtype(x)
    total = sum(jnp.sum(leaf).astype(dtype) for leaf in leaves)
    # Selected, because zero times infinity is not a number.
    nothing = jnp.where(False, total, jnp.zeros_like(total))
    return jax.tree.unflatten(
        structure, [leaf + nothing.astype(leaf.dtype) for leaf in leaves]
    )


def leaf_names(x: PyTree, root: str) -> list[str]:
    """Name each leaf of `x` as a user writes it: `hyper.log_lr` or `hyper['l2']`."""
    paths = jax.tree_util.tree_flatten_with_path(x)[0]
    return [root + jax.tree_util.keystr(path) for path, _ in paths]


def split_trainable(x: PyTree) -> tuple[Vector, PyTree]:
    """`x` as a vector of its floating-point arrays, and all the rest.

    The inverse is `equinox.combine`.
    """
    return eqx.partition(x, eqx.is_inexact_array)


def _is_inexact(a) -> bool:
    arrays = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    return isinstance(a, arrays) and jnp.issubdtype(a.dtype, jnp.inexact)
