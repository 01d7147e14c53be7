"""Interrupts that wait until a step is recorded."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


_SIGNALS = signal.SIGINT, signal.SIGTERM


class Interrupts:
    """The handlers of Ctrl-C and, where it is handled, of SIGTERM during a run.

    An error that a handler raises between two assignments would leave a state behind whose
    history lacks a step. The handlers are replaced once for a run, since it takes longer
    than a small step. Python calls them in the main thread alone.
    """

    def __init__(self):
        self._handlers: dict[int, Callable[[int, Any], Any]] = {}
        self._came: list[tuple[int, Any]] = []
        self._holds = False

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Catch interrupts within the block, to hold them back on request."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                # The default of SIGTERM is no function: it ends the process at once.
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Hold back interrupts until the end of the block."""
        self._holds = True
        try:
            yield
        finally:
            self._holds = False
        while self._came:
            number, frame = self._came.pop(0)
            self._handlers[number](number, frame)

    def _handle(self, number: int, frame: Any) -> None:
        if self._holds:
            self._came.append((number, frame))
        else:
            self._handlers[number](number, frame)
