"""Descriptions of objects that are the same in another process."""

import dataclasses
import functools
import hashlib
import types
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np


_MAX_ROWS = 20_000  # more tell nobody anything


def description(x: Any, name: str, hashed: bool = True) -> dict[str, str]:
    """The settings in an object, by their paths from `name`.

    A function is described by its name, its defaults and the settings that it closes over,
    as the transforms of optax do; arrays by shape, dtype and, on request, a hash of their
    numbers.

    **Arguments:**

    - `x`: an object, such as a solver.
    - `name`: the name of its own.
    - `hashed`: whether arrays are hashed.
    """
    rows: dict[str, str] = {}
    _Describer(rows, hashed).describe(x, name)
    return rows


@runtime_checkable
class _Wrapper(Protocol):
    @property
    def __wrapped__(self) -> Any: ...


_PLAIN = bool | int | float | complex | str | bytes | type(None) | np.dtype


class _Describer:
    def __init__(self, rows: dict[str, str], hashed: bool):
        self.rows = rows
        self.hashed = hashed
        self.within: list[Any] = []  # what is being described: objects refer to each other
        self.hashes: dict[int, str] = {}

    def describe(self, x: Any, name: str) -> None:
        if len(self.rows) >= _MAX_ROWS:
            return
        if isinstance(x, _PLAIN):
            self.rows[name] = repr(x)
        elif isinstance(x, np.ndarray | np.generic | jax.Array):
            self.rows[name] = self._array(x)
        elif isinstance(x, type):
            self.rows[name] = f"{x.__module__}.{x.__qualname__}"
        elif any(x is other for other in self.within):
            self.rows[name] = "itself"
        else:
            self.within.append(x)
            self._describe_parts(x, name)
            self.within.pop()

    def _describe_parts(self, x: Any, name: str) -> None:
        self.rows[name] = type(x).__qualname__
        if dataclasses.is_dataclass(x):
            for field in dataclasses.fields(x):
                # Absent where a class assigns it late.
                if field.name in vars(x):
                    self.describe(vars(x)[field.name], f"{name}.{field.name}")
        elif isinstance(x, dict):
            for index, (key, part) in enumerate(x.items()):
                # Other keys may show their address.
                key = repr(key) if isinstance(key, _PLAIN) else f"key {index}"
                self.describe(part, f"{name}[{key}]")
        elif isinstance(x, tuple | list):
            self.rows[name] += f" of length {len(x)}"
            for index, part in enumerate(x):
                self.describe(part, f"{name}[{index}]")
        elif isinstance(x, functools.partial):
            for key, part in (("func", x.func), ("args", x.args), ("", x.keywords)):
                self.describe(part, f"{name}.{key}")
        elif isinstance(x, types.MethodType):
            self.describe(x.__func__, f"{name}.__func__")
            self.describe(x.__self__, f"{name}.__self__")
        elif isinstance(x, types.FunctionType):
            self._describe_function(x, name)
        elif isinstance(x, _Wrapper):  # such as a function under `jax.jit`
            self.describe(x.__wrapped__, f"{name}.__wrapped__")
        elif type(x).__module__ != "builtins":
            try:
                attributes = vars(x)
            except TypeError:  # has none
                return
            for key, part in attributes.items():
                self.describe(part, f"{name}.{key}")

    def _describe_function(self, x: types.FunctionType, name: str) -> None:
        self.rows[name] = f"{x.__module__}.{x.__qualname__}"
        for index, part in enumerate(x.__defaults__ or ()):
            self.describe(part, f"{name}.__defaults__[{index}]")
        for key, part in (x.__kwdefaults__ or {}).items():
            self.describe(part, f"{name}.{key}")
        for variable, cell in zip(x.__code__.co_freevars, x.__closure__ or ()):
            try:
                part = cell.cell_contents
            except ValueError:  # nothing yet
                continue
            self.describe(part, f"{name}.{variable}")

    def _array(self, x: Any) -> str:
        text = f"array of shape {x.shape}, {x.dtype}"
        if not self.hashed:
            return text
        if id(x) not in self.hashes:
            is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            content = np.asarray(jax.random.key_data(x) if is_key else x)
            self.hashes[id(x)] = hashlib.sha256(content.tobytes()).hexdigest()[:16]
        return f"{text}, with hash {self.hashes[id(x)]}"
