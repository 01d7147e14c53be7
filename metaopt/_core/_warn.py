"""Warnings that point at the line of the user."""

import inspect
import pathlib
import warnings


_PACKAGE = str(pathlib.Path(__file__).parents[1])
_LIBRARIES = ("equinox", "jax", "jaxtyping", "beartype", "contextlib")


def warn(message: str) -> None:
    """Warn at the innermost frame outside of metaopt and the libraries that call it."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and _is_ours(frame):
        frame, level = frame.f_back, level + 1
    # Counted from this function, whose frame is the first.
    warnings.warn(message, stacklevel=level)


def _is_ours(frame) -> bool:
    module = frame.f_globals.get("__name__", "").split(".")[0]
    return frame.f_code.co_filename.startswith(_PACKAGE) or module in _LIBRARIES
