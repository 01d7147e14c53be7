"""Scalars of a run for a writer of logs."""

from typing import Any, Protocol, runtime_checkable

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
        to come.

    **Raises:**

    `ValueError` for a writer that has neither.
    """

    def __init__(self, writer: _ScalarWriter | _DictWriter):
        if not isinstance(writer, _ScalarWriter | _DictWriter):
            raise ValueError(
                "`writer` must have a method `add_scalar(name, value, step)` or "
                f"`log(dict, step=step)`; got {type(writer).__name__}."
            )
        self.writer = writer

    def open(self, run):
        if isinstance(self.writer, _File):
            self.writer.begin(run.num_steps)

    def see(self, run):
        columns = {name: column.tolist() for name, column in run.last.items()}
        count = len(columns["outer_loss"])
        for index, step in enumerate(range(run.num_steps - count, run.num_steps)):
            row = {name: column[index] for name, column in columns.items()}
            if isinstance(self.writer, _ScalarWriter):
                for name, value in row.items():
                    self.writer.add_scalar(name, value, step)
            else:
                self.writer.log(row, step=step)
