"""Descriptions of objects that are the same in another process."""

import ast
import dataclasses
import fractions
import functools
import hashlib
import inspect
import linecache
import sysconfig
import textwrap
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np


_LIBRARIES = [
    Path(__file__).parents[1],
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")),
]
_MAX_ROWS = 20_000  # more tell nobody anything
_MAX_DEPTH = 300  # the names grow with the depth
_MAX_HASHED = 2**26  # bytes of an array; of a larger one a part is hashed


def description(x: Any, name: str) -> dict[str, str]:
    """The settings in an object, by their paths from `name`.

    A function is described by its name, a hash of its source where that is no library's
    and can be read, its defaults and the settings that it closes over, as the transforms of
    optax do; arrays by shape, dtype and a hash of their numbers (of some of them, from 64
    MiB on).

    **Arguments:**

    - `x`: an object, such as a solver.
    - `name`: the name of its own.
    """
    rows: dict[str, str] = {}
    _Describer(rows).describe(x, name)
    return rows


def first_change(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """The first setting in which two descriptions differ, in words; empty if none.

    **Arguments:**

    - `there`: the description that was kept.
    - `here`: the present one.
    """
    for name in [*here, *there]:
        was, now = there.get(name, "not there"), here.get(name, "not there")
        if was != now and not _is_same_number(was, now):
            return f"`{name}` was {was} and is {now}"
    return ""


def _is_same_number(a: str, b: str) -> bool:
    """Whether two texts are one number: a schedule of optax turns its 66 into 66.0."""
    try:
        return fractions.Fraction(a) == fractions.Fraction(b)  # exact for long seeds
    except ValueError:
        return False


@runtime_checkable
class _Wrapper(Protocol):
    @property
    def __wrapped__(self) -> Any: ...


_PLAIN = bool | int | float | complex | str | bytes | type(None) | np.dtype
_Parts = Iterator[tuple[Any, str]]  # objects with their names


class _Describer:
    def __init__(self, rows: dict[str, str]):
        self.rows = rows
        self.hashes: dict[int, str] = {}

    def describe(self, x: Any, name: str) -> None:
        # Not by recursion: a chain of objects can be longer than the stack of Python.
        pending: list[_Parts] = [iter([(x, name)])]
        within: list[Any] = []  # what is being described: objects refer to each other
        while pending:
            for part, part_name in pending[-1]:
                if len(self.rows) >= _MAX_ROWS:
                    return
                if self._describe_whole(part, part_name):
                    continue
                if any(part is other for other in within):
                    self.rows[part_name] = "itself"
                elif len(within) >= _MAX_DEPTH:
                    self.rows[part_name] = "too deep to be described"
                else:
                    self.rows[part_name] = _title(part)
                    within.append(part)
                    pending.append(_parts(part, part_name))
                    break
            else:
                pending.pop()
                if within:
                    within.pop()

    def _describe_whole(self, x: Any, name: str) -> bool:
        """Describe an object that has no parts; whether it has none."""
        if isinstance(x, _PLAIN):
            self.rows[name] = repr(x)
        elif isinstance(x, np.ndarray | np.generic | jax.Array):
            self.rows[name] = self._array(x)
        elif isinstance(x, type):
            self.rows[name] = f"{x.__module__}.{x.__qualname__}"
        else:
            return False
        return True

    def _array(self, x: Any) -> str:
        text = f"array of shape {x.shape}, {x.dtype}"
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return text  # parts of it are with other processes
        if id(x) not in self.hashes:
            is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            numbers = _some_of(jax.random.key_data(x) if is_key else x)
            self.hashes[id(x)] = _hash(np.asarray(numbers).tobytes())
        return f"{text}, with hash {self.hashes[id(x)]}"


def _some_of(x: Any) -> Any:
    """An array, or numbers at equal distances of a large one."""
    return x if x.nbytes <= _MAX_HASHED else x.reshape(-1)[:: x.nbytes // _MAX_HASHED + 1]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _title(x: Any) -> str:
    if isinstance(x, types.FunctionType):
        title = f"{x.__module__}.{x.__qualname__}"
        source = _source(x)
        return f"{title}, with source {_hash(source)}" if source else title
    if isinstance(x, tuple | list) and not dataclasses.is_dataclass(x):
        return f"{type(x).__qualname__} of length {len(x)}"
    return type(x).__qualname__


def _source(x: types.FunctionType) -> bytes:
    """The source of a function without its layout and comments; empty for one of a library,
    which other versions write otherwise, and where it cannot be read."""
    folders = Path(x.__code__.co_filename).parents
    if any(library in folders for library in _LIBRARIES):
        return b""
    try:
        if x.__name__ == "<lambda>":
            return _source_of_lambda(x.__code__)
        return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(x)))).encode()
    except (OSError, TypeError, SyntaxError):  # such as in a console
        return b""


def _source_of_lambda(code: types.CodeType) -> bytes:
    """The expression of a lambda alone: the lines around it are of a call, say, whose other
    arguments are no part of the function."""
    first: list[tuple[int, int]] = []
    last: list[tuple[int, int]] = []
    for start, end, column, end_column in code.co_positions():
        if start and end and column is not None and end_column:
            first.append((start, column))
            last.append((end, end_column))
    lines = [line.encode() for line in linecache.getlines(code.co_filename)]
    if not first or not lines:
        return b""
    (row, column), (end, end_column) = min(first), max(last)
    lines = lines[row - 1 : end]
    lines[-1] = lines[-1][:end_column]
    lines[0] = lines[0][column:]
    return b"".join(b"".join(lines).split())


def _parts(x: Any, name: str) -> _Parts:
    if dataclasses.is_dataclass(x):
        attributes = _attributes(x)
        for field in dataclasses.fields(x):
            # Absent where a class assigns it late.
            if field.name in attributes:
                yield attributes[field.name], f"{name}.{field.name}"
    elif isinstance(x, dict):
        for index, (key, part) in enumerate(x.items()):
            # Other keys may show their address.
            key = repr(key) if isinstance(key, _PLAIN) else f"key {index}"
            yield part, f"{name}[{key}]"
    elif isinstance(x, tuple | list):
        for index, part in enumerate(x):
            yield part, f"{name}[{index}]"
    elif isinstance(x, functools.partial):
        for key, part in (("func", x.func), ("args", x.args), ("", x.keywords)):
            yield part, f"{name}.{key}"
    elif isinstance(x, types.MethodType):
        yield x.__func__, f"{name}.__func__"
        yield x.__self__, f"{name}.__self__"
    elif isinstance(x, types.FunctionType):
        yield from _parts_of_function(x, name)
    elif isinstance(x, _Wrapper):  # such as a function under `jax.jit`
        yield x.__wrapped__, f"{name}.__wrapped__"
    elif type(x).__module__ != "builtins":
        for key, part in _attributes(x).items():
            yield part, f"{name}.{key}"


def _parts_of_function(x: types.FunctionType, name: str) -> _Parts:
    for index, part in enumerate(x.__defaults__ or ()):
        yield part, f"{name}.__defaults__[{index}]"
    for key, part in (x.__kwdefaults__ or {}).items():
        yield part, f"{name}.{key}"
    for variable, cell in zip(x.__code__.co_freevars, x.__closure__ or ()):
        try:
            part = cell.cell_contents
        except ValueError:  # nothing yet
            continue
        yield part, f"{name}.{variable}"


def _attributes(x: Any) -> dict[str, Any]:
    """The content of the slots and of the dictionary of an object, by name."""
    found: dict[str, Any] = {}
    for cls in reversed(type(x).__mro__):
        for name, member in vars(cls).items():
            if isinstance(member, types.MemberDescriptorType):
                try:
                    found[name] = member.__get__(x)
                except AttributeError:  # nothing yet
                    continue
    try:
        return found | vars(x)
    except TypeError:  # has no dictionary
        return found
