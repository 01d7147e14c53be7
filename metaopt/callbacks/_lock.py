"""A lock on a file that one run at a time may write."""

import os
from pathlib import Path
from typing import TextIO


try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # pyright: ignore[reportAssignmentType]


def locked(path: Path) -> TextIO | None:
    """Lock a file until `unlocked`, or until the process ends in whatever way.

    **Arguments:**

    - `path`: the file, which need not be there; its folder is.

    **Returns:**

    The lock; `None` on systems and disks that have none.

    **Raises:**

    `ValueError` where another run has locked the file.
    """
    if fcntl is None:
        return None
    place = path.with_name(f".{path.name}.lock")
    while True:
        lock = place.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), place.stat()):
                return lock
        except BlockingIOError as error:
            lock.close()
            raise ValueError(
                f"Another run writes the checkpoint {path}. Wait for its end, or name "
                "another file."
            ) from error
        except FileNotFoundError:
            pass
        except OSError:
            lock.close()
            return None
        # The run that had it removed its file in between.
        lock.close()


def unlocked(lock: TextIO) -> None:
    """Release a lock, and remove its file."""
    Path(lock.name).unlink(missing_ok=True)
    lock.close()
