"""Pytrees of arrays in files, to go on from later."""

import io
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._tree import leaf_names
from .datasets import DataError
from .datasets._files import read_npz, write_atomically


T = TypeVar("T")
_VERSION = 1
_HEADER = "metaopt"


class CheckpointError(ValueError):
    """A file that is no checkpoint of what it should be one of."""


def save(path: str | os.PathLike, tree: Any) -> None:
    """Writes the arrays of a pytree to a file, complete or not at all.

    **Arguments:**

    - `path`: the file, whose folder is made if need be. One that is there is replaced.
    - `tree`: any pytree, such as the `state` of a run. What is no array is not written.

    **Raises:**

    `OSError` where the file cannot be written.
    """
    entries, rows = {}, []
    for index, (name, leaf) in enumerate(_arrays(tree)):
        kind = _kind(leaf)
        data = np.asarray(jax.random.key_data(leaf) if kind == "key" else leaf)
        rows.append({"name": name, "kind": kind, "shape": list(data.shape)})
        # Bytes, since NumPy has no names for some dtypes of JAX.
        entries[str(index)] = np.frombuffer(data.tobytes(), np.uint8)
    header = json.dumps({"version": _VERSION, "leaves": rows}).encode()
    entries[_HEADER] = np.frombuffer(header, np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **entries)
    write_atomically(Path(path), buffer.getvalue())


def load(path: str | os.PathLike, like: T) -> T:
    """Reads a pytree that [`metaopt.save`][] wrote.

    Nothing in the file is executed.

    **Arguments:**

    - `path`: the file.
    - `like`: a pytree of the same structure, shapes and dtypes, such as the state at the
        start of the run. What is no array is taken from it.

    **Returns:**

    A pytree like `like`, with the arrays of the file.

    **Raises:**

    [`metaopt.CheckpointError`][] naming the file and the reason.
    """
    path = Path(path)
    wanted = _arrays(like)
    try:
        header = read_npz(path, [_HEADER], _MAX_HEADER)[_HEADER]
        described = json.loads(header.tobytes())
        version, rows = described["version"], described["leaves"]
    except (DataError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no sound checkpoint: {error}") from error
    if version != _VERSION:
        raise CheckpointError(
            f"{path} has version {version} of the format; this metaopt reads {_VERSION}."
        )
    _check_same(path, rows, wanted)
    sizes = [int(np.prod(row["shape"])) * 16 for row in rows]
    keys = [str(index) for index in range(len(rows))]
    try:
        entries = read_npz(path, keys, max(sizes, default=0) + 1024)
    except DataError as error:
        raise CheckpointError(f"{path} is no sound checkpoint: {error}") from error
    leaves = []
    for key, (name, leaf) in zip(keys, wanted):
        kind = _kind(leaf)
        template = np.asarray(jax.random.key_data(leaf) if kind == "key" else leaf)
        if entries[key].size != template.nbytes:
            raise CheckpointError(
                f"{path}: `{name}` has {entries[key].size} bytes, not {template.nbytes}."
            )
        data = np.frombuffer(entries[key].tobytes(), template.dtype)
        array = jnp.asarray(data.reshape(template.shape))
        if kind == "key":
            array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
        leaves.append(np.asarray(array) if isinstance(leaf, np.ndarray) else array)
    arrays, rest = eqx.partition(like, eqx.is_array)
    structure = jax.tree.structure(arrays)
    return eqx.combine(jax.tree.unflatten(structure, leaves), rest)


_MAX_HEADER = 64 * 1024**2


def _arrays(tree: Any) -> list[tuple[str, Any]]:
    arrays = eqx.filter(tree, eqx.is_array)
    return list(zip(leaf_names(arrays, ""), jax.tree.leaves(arrays)))


def _kind(leaf: Any) -> str:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return "key" if is_key else str(leaf.dtype)


def _check_same(path: Path, rows: Any, wanted: list[tuple[str, Any]]) -> None:
    found = {row["name"]: (row["kind"], tuple(row["shape"])) for row in rows}
    expected = {}
    for name, leaf in wanted:
        kind = _kind(leaf)
        shape = jax.random.key_data(leaf).shape if kind == "key" else leaf.shape
        expected[name] = (kind, tuple(shape))
    for name, (kind, shape) in expected.items():
        if name not in found:
            raise CheckpointError(f"{path} holds no `{name}`, which this run has.")
        if found[name] != (kind, shape):
            raise CheckpointError(
                f"{path}: `{name}` is {found[name][0]} of shape {found[name][1]} there and "
                f"{kind} of shape {shape} here."
            )
    for name in found:
        if name not in expected:
            raise CheckpointError(f"{path} holds `{name}`, which this run has not.")
    if [row["name"] for row in rows] != [name for name, _ in wanted]:
        raise CheckpointError(f"{path} holds its arrays in another order.")
