"""Checkpoints of a run, to go on from."""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._core._checkpoint import CheckpointError, described, load, save
from .._core._results import RESULTS
from .._core._validate import check_count
from .._report import Best, is_float_array
from ._base import AbstractCallback


class Checkpoint(AbstractCallback):
    """Writes the state and the history of a run to a file, and goes on from it.

    If the file is there the run goes on from it, to the same numbers bit for bit, with its
    history, its best step and its first failure. Problem, solver and data are not in it:
    hand over the same, and of an iterator one that goes on where it was. A step that failed
    under `throw` is not in it either: a run that goes on takes it again.

    **Arguments:**

    - `path`: the file, whose folder is made if need be.
    - `every`: the number of outer steps after which it is written, at the next end of a
        compiled call; and at the end of the run.

    **Raises:**

    Before the first step `ValueError` for a file that cannot be written, and for one that
    is there beside a `state=` to go on from; [`metaopt.CheckpointError`][] for one of
    another run.
    """

    def __init__(self, path: str | os.PathLike, every: int = 20):
        check_count(every, "every")
        self.path = Path(path)
        self.every = every
        self._written = 0  # outer steps in the file
        # Of the steps to be written.
        self._kept: tuple[int, Any, Any] = 0, RESULTS.successful, RESULTS.successful

    def open(self, run):
        self._written = 0
        self._kept = run.num_skipped, run.result, run.reason
        # `Path.exists` raises where it may not look.
        if not os.path.exists(self.path):
            check_writable(self.path)
            return
        if run.num_steps:
            raise ValueError(
                f"Both `state` and the checkpoint {self.path} say where to go on from. "
                "Hand over one of them, or name a file that is not there yet."
            )
        self._take_up(run)
        if run.num_steps < run.total:
            check_writable(self.path)
        self._written = run.num_steps
        self._kept = run.num_skipped, run.result, run.reason

    def see(self, run):
        if not run.failed:
            self._kept = run.num_skipped, run.result, run.reason
        if run.num_steps - run.failed - self._written >= self.every:
            self._write(run)

    def close(self, run):
        if run.num_steps - run.failed > self._written:
            self._write(run)

    def _write(self, run: Any) -> None:
        history, state = run.history, run.state
        path = jax.tree.leaves(eqx.filter(history.hyper, is_float_array))
        count = len(history) - run.failed
        columns, path = jax.tree.map(lambda a: a[:count], (dict(history.columns), path))
        num_skipped, result, reason = self._kept
        notes = np.asarray(num_skipped), result, reason, _best_or(run)
        save(self.path, _Content(state, columns, path, *notes))
        self._written = run.num_steps - run.failed

    def _take_up(self, run: Any) -> None:
        columns: dict[str, np.ndarray] = {}
        path: list[np.ndarray] = []
        for name, kind, shape in described(self.path):
            if match := re.fullmatch(r"\.columns\['(\w+)'\]", name):
                columns[match[1]] = np.zeros(shape, kind)
            elif re.fullmatch(r"\.path\[\d+\]", name):
                path.append(np.zeros(shape, kind))
        success: Any = RESULTS.successful
        notes = np.asarray(0), success, success, _best_or(run)
        content = load(self.path, _Content(run.state, columns, path, *notes))
        state = content.state
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
        run.restore(state, content.columns, content.path)
        run.num_skipped = int(content.num_skipped)
        run.result, run.reason = content.result, content.reason
        best = content.best
        if best.step >= 0:
            loss, step = float(best.outer_loss), int(best.step)
            run.best = Best(best.hyper, best.params, loss, step)


class _Content(eqx.Module):
    """The content of a file, whose errors call its arrays by these names."""

    state: Any
    columns: dict[str, np.ndarray]  # of the history
    path: list[np.ndarray]  # of `hyper`
    num_skipped: np.ndarray
    result: RESULTS
    reason: RESULTS
    best: Best  # of step -1 where nobody keeps one


def _best_or(run: Any) -> Best:
    best = run.best
    if best is None:
        best = Best(run.hyper, run.params, float("nan"), -1)
    numbers = np.asarray(best.outer_loss, np.float64), np.asarray(best.step, np.int64)
    return Best(best.hyper, best.params, *numbers)  # pyright: ignore[reportArgumentType]


def check_writable(path: Path) -> None:
    """Raise a `ValueError` for a file that cannot be written, which would be seen after
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
