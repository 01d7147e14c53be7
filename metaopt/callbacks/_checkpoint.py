"""Checkpoints of a run, to go on from."""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._checkpoint import CheckpointError, described, load, save
from .._validate import check_count
from ._base import AbstractCallback


class Checkpoint(AbstractCallback):
    """Writes the state and the history of a run to a file, and goes on from it.

    If the file is there the run goes on from it, to the same numbers bit for bit, with its
    history. Problem, solver and data are not in it: hand over the same, and of an
    iterator one that goes on where it was.

    **Arguments:**

    - `path`: the file, whose folder is made if need be.
    - `every`: the number of outer steps after which it is written, at the next end of a
        compiled call; and at the end of the run.

    **Raises:**

    Before the first step `ValueError` for a file that cannot be written, and
    [`metaopt.CheckpointError`][] for one of another run.
    """

    def __init__(self, path: str | os.PathLike, every: int = 20):
        check_count(every, "every")
        self.path = Path(path)
        self.every = every
        self._written = 0  # outer steps in the file

    def open(self, run):
        check_writable(self.path)
        begun = run.num_steps
        # `Path.exists` raises where it may not look.
        if os.path.exists(self.path):
            self._take_up(run)
        self._written = run.num_steps if run.num_steps > begun else 0

    def see(self, run):
        if run.num_steps - self._written >= self.every:
            self._write(run)

    def close(self, run):
        if run.num_steps > self._written:
            self._write(run)

    def _write(self, run: Any) -> None:
        history = run.history
        path = jax.tree.leaves(eqx.filter(history.hyper, eqx.is_inexact_array_like))
        save(self.path, (run.state, dict(history.columns), path))
        self._written = run.num_steps

    def _take_up(self, run: Any) -> None:
        columns: dict[str, np.ndarray] = {}
        path: list[np.ndarray] = []
        for name, kind, shape in described(self.path):
            if match := re.fullmatch(r"\[1\]\['(\w+)'\]", name):
                columns[match[1]] = np.zeros(shape, kind)
            elif re.fullmatch(r"\[2\]\[\d+\]", name):
                path.append(np.zeros(shape, kind))
        like = run.state, columns, path
        state, columns, path = load(self.path, like)
        if int(state.num_steps) > run.total:
            raise CheckpointError(
                f"{self.path} has {int(state.num_steps)} steps, and `num_steps` is "
                f"{run.total}. Ask for as many or more, or name another file."
            )
        there, given = (np.asarray(jax.random.key_data(s.key)) for s in (state, run.state))
        if not np.array_equal(there, given):
            raise CheckpointError(
                f"{self.path} is of a run with another `key`. Hand over the same, or name "
                "another file."
            )
        run.restore(state, columns, path)


def check_writable(path: Path) -> None:
    """Raises a `ValueError` for a file that cannot be written, which would be seen after
    hours otherwise."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Permission bits say little of what the superuser and network disks may do.
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"The checkpoint {path} cannot be written: {error}. Name a file in a folder "
            "that you may write to."
        ) from error
