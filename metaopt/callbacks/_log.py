"""Scalars of a run for a writer of logs."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .._core._warn import warn
from ._base import AbstractCallback


@runtime_checkable
class _ScalarWriter(Protocol):
    def add_scalar(self, name: str, value: float, step: int, /) -> Any: ...


@runtime_checkable
class _DictWriter(Protocol):
    def log(self, row: dict[str, float], /, *, step: int) -> Any: ...


@runtime_checkable
class _File(Protocol):
    def begin(self, step: int) -> None: ...


class Log(AbstractCallback):
    """Hands the columns of the history to a writer, for each outer step.

    **Arguments:**

    - `writer`: a [`metaopt.callbacks.CSV`][] or [`metaopt.callbacks.JSONLines`][], or an
        object with `add_scalar(name, value, step)`, such as a `SummaryWriter` of
        tensorboardX, or with `log(dict, step=step)`, such as a run of Weights & Biases.
        A method `begin(step)`, if it has one, is called with the number of the first step
        to come. An error of the writer during the run, such as that of a full disk, is
        reported by one warning: the run goes on, and the rows are written later if the
        writer takes them again.

    **Raises:**

    `ValueError` for a writer that has neither.
    """

    def __init__(self, writer: _ScalarWriter | _DictWriter):
        if not isinstance(writer, _ScalarWriter | _DictWriter):
            raise ValueError(
                "`writer` must have a method `add_scalar(name, value, step)` or "
                "`log(dict, step=step)`, as `metaopt.callbacks.CSV(path)` has; got "
                f"{type(writer).__name__}."
            )
        self.writer = writer
        self._first = self._next = 0  # steps: the first of the history, the next to write
        self._warned = False

    def open(self, run):
        self._next = run.num_steps
        self._first = run.num_steps - run.num_taken
        self._warned = False
        if isinstance(self.writer, _File):
            self.writer.begin(run.num_steps)

    def see(self, run):
        if run.num_steps - len(run.last["seconds"]) < self._next:
            # The run went back, and takes these steps again.
            self._next = run.num_steps - len(run.last["seconds"])
            if isinstance(self.writer, _File):
                self.writer.begin(self._next)
        if run.num_steps - len(run.last["seconds"]) == self._next:
            self._write(run.last, run.num_steps)
        else:
            self._catch_up(run)

    def close(self, run):
        # The steps of a call that another callback has ended by an error.
        self._catch_up(run)

    def _catch_up(self, run: Any) -> None:
        end = self._first + run.num_taken
        if end > self._next:
            rows = {name: a[self._next - end :] for name, a in run.history.columns.items()}
            self._write(rows, end)

    def _write(self, rows: Mapping[str, np.ndarray], end: int) -> None:
        columns = {name: column.tolist() for name, column in rows.items()}
        count = len(columns["outer_loss"])
        for index, step in enumerate(range(end - count, end)):
            row = {name: column[index] for name, column in columns.items()}
            try:
                self._write_row(row, step)
            except Exception as error:  # a log is not worth a run
                self._warn_once(step, error)
                return
            self._next = step + 1

    def _write_row(self, row: dict[str, float], step: int) -> None:
        if isinstance(self.writer, _ScalarWriter):
            for name, value in row.items():
                self.writer.add_scalar(name, value, step)
        else:
            self.writer.log(row, step=step)

    def _warn_once(self, step: int, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warn(
                f"The log of step {step} could not be written by the `writer`, a "
                f"`{type(self.writer).__name__}`: {error!r}. The run goes on, and writes "
                "this and later rows once the writer takes them."
            )
