"""A function that counts how often it is traced."""

from collections.abc import Callable
from typing import Any


class Counted:
    """A loss or a cell that counts how often Python runs it."""

    def __init__(self, fn: Callable[..., Any]):
        self.fn = fn
        self.count = 0

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        return self.fn(*args)
