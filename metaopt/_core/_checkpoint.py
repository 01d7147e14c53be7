"""Pytrees of arrays in files, to go on from later."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._files import DataError, read_npz, write_npz, written_atomically
from ._tree import leaf_names


T = TypeVar("T")
_VERSION = 1
_HEADER = "metaopt"


class CheckpointError(ValueError):
    """A file that is not a checkpoint of the pytree that it is read into."""


class UnsoundCheckpointError(CheckpointError):
    """A file that is damaged, or no checkpoint at all."""


def save(path: str | os.PathLike, tree: Any) -> None:
    """Write the arrays of a pytree to a file, complete or not at all.

    **Arguments:**

    - `path`: the file, whose folder is made if need be. One that is there is replaced.
    - `tree`: any pytree, such as the `state` of a run. Leaves that are no arrays are not
        written.

    **Raises:**

    `OSError` where the file cannot be written; `ValueError` for an array of Python objects.
    """
    rows, leaves = [], []
    for name, leaf in _arrays(tree):
        data = _data(leaf)
        if data.dtype.hasobject:
            raise ValueError(f"`{name}` holds Python objects, which are not written.")
        rows.append({"name": name, "kind": _kind(leaf), "shape": list(data.shape)})
        leaves.append(data)
    header = json.dumps({"version": _VERSION, "leaves": rows}).encode()
    with written_atomically(Path(path)) as file:
        write_npz(file, _entries(leaves, header))


def _entries(leaves: list[np.ndarray], header: bytes) -> Iterator[tuple[str, np.ndarray]]:
    for index, data in enumerate(leaves):
        # Bytes, since NumPy has no names for some dtypes of JAX.
        yield str(index), np.frombuffer(data.tobytes(), np.uint8)
    yield _HEADER, np.frombuffer(header, np.uint8)


def load(path: str | os.PathLike, like: T) -> T:
    """Read a pytree that [`metaopt.save`][] wrote.

    Nothing in the file is executed.

    **Arguments:**

    - `path`: the file.
    - `like`: a pytree of the same structure, shapes and dtypes, such as the state at the
        start of the run. Leaves that are no arrays are taken from it.

    **Returns:**

    A pytree like `like`, with the arrays of the file.

    **Raises:**

    [`metaopt.CheckpointError`][] naming the file and the reason.
    """
    path = Path(path)
    wanted = _arrays(like)
    _check_same(path, described(path), wanted)
    templates = [_data(leaf) for _, leaf in wanted]
    keys = [str(index) for index in range(len(wanted))]
    entries = _read(path, keys, max((t.nbytes for t in templates), default=0) + 1024)
    leaves = []
    for key, (name, leaf), template in zip(keys, wanted, templates):
        content = entries[key].tobytes()
        if len(content) != template.nbytes:
            raise UnsoundCheckpointError(
                f"{path}: `{name}` has {len(content)} bytes, not {template.nbytes}."
            )
        data = np.frombuffer(content, template.dtype).reshape(template.shape)
        if _is_key(leaf):
            kind = jax.random.key_impl(leaf)
            leaves.append(jax.random.wrap_key_data(jnp.asarray(data), impl=kind))
        elif isinstance(leaf, jax.Array):
            leaves.append(jnp.asarray(data))
        else:
            # JAX has not all dtypes of NumPy, and without 64 bits not even float64.
            leaves.append(data[()] if isinstance(leaf, np.generic) else data.copy())
    arrays, rest = eqx.partition(like, eqx.is_array)
    structure = jax.tree.structure(arrays)
    return eqx.combine(jax.tree.unflatten(structure, leaves), rest)


_MAX_HEADER = 64 * 1024**2


def _arrays(tree: Any) -> list[tuple[str, Any]]:
    arrays = eqx.filter(tree, eqx.is_array)
    return list(zip(leaf_names(arrays, ""), jax.tree.leaves(arrays)))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _kind(leaf: Any) -> str:
    # Keys of two kinds can have data of the same shape.
    return f"{jax.random.key_impl(leaf)} key" if _is_key(leaf) else str(leaf.dtype)


def _read(path: Path, keys: list[str], max_bytes: int) -> dict[str, np.ndarray]:
    try:
        return read_npz(path, keys, max_bytes)
    except DataError as error:
        raise UnsoundCheckpointError(f"{path} is no sound checkpoint: {error}") from error


def described(path: Path) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, kind and shape of the arrays in the file, in their order."""
    header = _read(path, [_HEADER], _MAX_HEADER)[_HEADER]
    try:
        described = json.loads(header.tobytes())
        version = described["version"]
        if version == _VERSION:
            return [
                (str(row["name"]), str(row["kind"]), tuple(row["shape"]))
                for row in described["leaves"]
            ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UnsoundCheckpointError(f"{path} is no sound checkpoint: {error!r}") from error
    raise CheckpointError(
        f"{path} has version {version} of the format; this metaopt reads {_VERSION}."
    )


def read_entry(path: Path, name: str) -> np.ndarray:
    """The bytes of one array in the file, by its name.

    **Raises:**

    [`metaopt.CheckpointError`][] where there is none.
    """
    rows = described(path)
    for index, (other, _, shape) in enumerate(rows):
        if other == name:
            key = str(index)
            return _read(path, [key], math.prod(shape) * 16 + 1024)[key]
    raise CheckpointError(f"{path} holds no `{name}`, which this run has.")


def read_array(path: Path, name: str) -> np.ndarray:
    """One array in the file, by its name.

    **Raises:**

    [`metaopt.CheckpointError`][] where there is none, or where it is a key.
    """
    kinds = {row: (kind, shape) for row, kind, shape in described(path)}
    content = read_entry(path, name)
    kind, shape = kinds[name]
    try:
        return np.frombuffer(content.tobytes(), jnp.dtype(kind)).reshape(shape)
    except (TypeError, ValueError) as error:
        raise UnsoundCheckpointError(f"{path}: `{name}` is damaged: {error}") from error


def _check_same(
    path: Path,
    rows: list[tuple[str, str, tuple[int, ...]]],
    wanted: list[tuple[str, Any]],
) -> None:
    found = {name: (kind, shape) for name, kind, shape in rows}
    expected = {name: (_kind(leaf), _data(leaf).shape) for name, leaf in wanted}
    for name, (kind, shape) in expected.items():
        if name not in found:
            raise CheckpointError(f"{path} holds no `{name}`, which this run has.")
        if found[name] != (kind, shape):
            raise CheckpointError(
                f"{path}: `{name}` is {found[name][0]} of shape {found[name][1]} there and "
                f"{kind} of shape {shape} here. Hand over what the file was written with, "
                "such as the same model, or name another file."
            )
    for name in found:
        if name not in expected:
            raise CheckpointError(f"{path} holds `{name}`, which this run has not.")
    if len(rows) != len(wanted):
        raise CheckpointError(
            f"{path} holds {len(rows)} arrays; this run has {len(wanted)}."
        )
    for (name, _, _), (other, _) in zip(rows, wanted):
        if name != other:
            raise CheckpointError(
                f"{path} holds its arrays in another order: `{name}` is there where "
                f"`{other}` is here."
            )
