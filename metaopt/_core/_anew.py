"""A log message about functions of the user that are made anew and compile again."""

import collections
import logging
import os
import types
import weakref
from typing import Any

from ._static import Static


_LOGGER = logging.getLogger("metaopt")
_COUNT = 3  # programs that differ in such functions alone, before a word is said

_known: weakref.WeakSet[types.FunctionType] = weakref.WeakSet()
_told: set[str] = set()


class Programs:
    """The programs of one compiled function, of which no more than hashes are kept."""

    def __init__(self):
        self._hashes: set[int] = set()
        self._alike: collections.Counter[int] = collections.Counter()

    def see(self, static: Any) -> None:
        """Log a warning, once for each function, at the third program that differs from
        earlier ones in functions made anew alone.

        **Arguments:**

        - `static`: the static part of the program: a [`metaopt._core.Static`], or a tuple
            with some in it.
        """
        if hash(static) in self._hashes:
            return
        self._hashes.add(hash(static))
        parts = static if isinstance(static, tuple) else (static,)
        functions: list[types.FunctionType] = []

        def code(function):
            functions.append(function)
            return function.__code__

        alike = hash(tuple(p.identity(code) if isinstance(p, Static) else p for p in parts))
        self._alike[alike] += 1
        new = {_place(function) for function in functions if function not in _known}
        _known.update(functions)
        new -= _told
        if self._alike[alike] >= _COUNT and new:
            _told.update(new)
            _LOGGER.warning(
                "metaopt compiles the same program again, because %s is a new function "
                "object at every call. Define it once, outside of the loop. (Logged once "
                "for each function.)",
                " and ".join(sorted(new)),
            )


def _place(function: types.FunctionType) -> str:
    code = function.__code__
    name = os.path.basename(code.co_filename)
    return f"`{function.__name__}` ({name}, line {code.co_firstlineno})"
