"""Interrupts that wait until a step is recorded."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


_SIGNALS = signal.SIGINT, signal.SIGTERM


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold back Ctrl-C, and SIGTERM where it is handled, until the end of the block.

    An error that a handler raises between two assignments would leave a state behind whose
    history lacks a step. Python calls handlers in the main thread alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, Any]] = []
    wait = lambda number, frame: came.append((number, frame))
    handlers: dict[int, Any] = {}
    try:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            # The default of SIGTERM is no function: it ends the process at once.
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, wait)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number, frame in came:
        handlers[number](number, frame)
