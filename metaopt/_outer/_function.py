"""Functions as callbacks."""

import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any

from ..callbacks import AbstractCallback, CSV, JSONLines


class EachCall(AbstractCallback):
    """A function of a run, called after each compiled call."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def see(self, run):
        return self.function(run)


def name_of(callback: AbstractCallback) -> str:
    """The name by which a solution says that a callback has ended the run."""
    if not isinstance(callback, EachCall):
        return f"`{type(callback).__name__}`"
    named = isinstance(callback.function, types.FunctionType | types.MethodType)
    return f"`{callback.function.__name__}`" if named else "a callback"


def as_callbacks(callbacks: Any) -> list[AbstractCallback]:
    """A list of callbacks; functions become one each.

    **Raises:**

    `ValueError` for anything else.
    """
    if isinstance(callbacks, AbstractCallback) or not isinstance(callbacks, Iterable):
        raise ValueError(
            "`callbacks` must be a list, such as `[metaopt.callbacks.Progress()]`; got "
            f"{type(callbacks).__name__}."
        )
    callbacks = list(callbacks)
    for one in callbacks:
        if isinstance(one, CSV | JSONLines):
            raise ValueError(
                f"`callbacks` holds a `{type(one).__name__}`, which is a writer of logs. "
                "Hand it to one: `metaopt.callbacks.Log(...)`."
            )
        if not isinstance(one, AbstractCallback) and not _takes_a_run(one):
            raise ValueError(
                "`callbacks` must hold callbacks, such as `metaopt.callbacks.Progress()` "
                "or one of a subclass of `metaopt.callbacks.AbstractCallback`, or "
                f"functions of one argument, the run; got {one!r}."
            )
    is_callback = lambda one: isinstance(one, AbstractCallback)
    return [one if is_callback(one) else EachCall(one) for one in callbacks]


def _takes_a_run(function: Any) -> bool:
    if isinstance(function, type) or not callable(function):
        return False
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:
        return True  # a function that is not written in Python may have no signature
    return True
