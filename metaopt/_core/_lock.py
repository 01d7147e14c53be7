"""A lock on a file that one run at a time may write."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ._files import remove_parts


try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # pyright: ignore[reportAssignmentType]


@contextlib.contextmanager
def locked(path: Path, kind: str) -> Iterator[None]:
    """Lock a file within a block, or until the process ends in whatever way.

    Remains of earlier processes that wrote the file are removed. Some systems and disks
    have no locks: the block is then entered without.

    **Arguments:**

    - `path`: the file, which need not be there; its folder is.
    - `kind`: the kind of the file, for errors.

    **Raises:**

    `ValueError` where another run has locked the file, and where the lock cannot be made.
    """
    lock = _lock(path, kind)
    try:
        if lock is not None:
            remove_parts(path)
        yield
    finally:
        if lock is not None:
            with lock, contextlib.suppress(OSError):  # such as of a folder that has gone
                Path(lock.name).unlink()


def _lock(path: Path, kind: str) -> TextIO | None:
    """The lock; `None` where there are none."""
    if fcntl is None:
        return None
    place = path.with_name(f".{path.name}.lock")
    while True:
        try:
            lock = place.open("w")
        except OSError as error:
            raise ValueError(
                f"The {kind} {path} cannot be locked: {error}. Remove that file if no "
                f"other run writes the {kind}, or name another file."
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), place.stat()):
                return lock
        except BlockingIOError as error:
            lock.close()
            raise ValueError(
                f"Another run writes the {kind} {path}. Wait for its end, or name "
                "another file."
            ) from error
        except FileNotFoundError:
            pass
        except OSError:
            lock.close()
            return None
        # The run that had it removed its file in between.
        lock.close()
