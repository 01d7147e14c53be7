"""Descriptions of objects that are the same in another process."""

import dataclasses
import functools
import hashlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


_MAX_DEPTH = 20  # of objects within objects, which may refer to each other


def description(x: Any, name: str, hashed: bool = True) -> dict[str, str]:
    """The settings in an object, by their paths from `name`.

    A function is described by its name and by the settings that it closes over, as the
    transforms of optax do; arrays by shape, dtype and, on request, a hash of their numbers.

    **Arguments:**

    - `x`: an object, such as a solver.
    - `name`: the name of its own.
    - `hashed`: whether arrays are hashed.
    """
    rows: dict[str, str] = {}
    _describe(x, name, hashed, rows, 0)
    return rows


def _describe(x: Any, name: str, hashed: bool, rows: dict[str, str], depth: int) -> None:
    each = lambda part, key: _describe(part, name + key, hashed, rows, depth + 1)
    if depth > _MAX_DEPTH:
        return
    if isinstance(x, np.ndarray | np.generic | jax.Array):
        rows[name] = f"array of shape {x.shape}, {x.dtype}"
        if hashed:
            rows[name] += f", with hash {_hash(x)}"
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        rows[name] = type(x).__qualname__
        for field in dataclasses.fields(x):
            # Absent where a class assigns it late.
            if field.name in vars(x):
                each(vars(x)[field.name], f".{field.name}")
    elif isinstance(x, dict):
        rows[name] = "dict"
        for key, part in x.items():
            each(part, f"[{key!r}]")
    elif isinstance(x, tuple | list):
        rows[name] = f"{type(x).__qualname__} of length {len(x)}"
        for index, part in enumerate(x):
            each(part, f"[{index}]")
    elif isinstance(x, functools.partial):
        rows[name] = "partial"
        each((x.func, x.args, x.keywords), "")
    elif isinstance(x, types.MethodType):
        rows[name] = x.__func__.__qualname__
        each(x.__self__, ".__self__")
    elif isinstance(x, types.FunctionType):
        rows[name] = f"{x.__module__}.{x.__qualname__}"
        for variable, cell in zip(x.__code__.co_freevars, x.__closure__ or ()):
            try:
                each(cell.cell_contents, f".{variable}")
            except ValueError:  # nothing yet
                continue
    elif isinstance(x, bool | int | float | complex | str | bytes | type(None) | np.dtype):
        rows[name] = repr(x)
    else:
        rows[name] = type(x).__qualname__


def _hash(x: Any) -> str:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return hashlib.sha256(np.asarray(x).tobytes()).hexdigest()[:16]
