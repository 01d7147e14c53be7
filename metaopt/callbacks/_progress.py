"""A progress bar."""

import sys
from typing import Any

from tqdm import tqdm

from ._base import AbstractCallback


class Progress(AbstractCallback):
    """Shows a progress bar on standard error.

    It says how long the first call took, with the compilation if there was one; then the
    same of the evaluation of the last outer variables. If standard error is closed, or
    its reader has gone, the run goes on without the bar.
    """

    def __init__(self):
        self._stream = _Stream(None)
        self._bar: tqdm | None = None
        self._compiled = False
        self._evaluates: float | None = None  # seconds of the run

    def open(self, run):
        self._compiled, self._evaluates = False, None
        self._stream, self._bar = _Stream(sys.stderr), None
        if sys.stderr is not None:
            self._bar = self._begin(run)

    def see(self, run):
        if self._bar is None:
            return
        self._bar.update(run.num_steps - self._bar.n)
        if not self._compiled:
            self._compiled = True
            text = f"The first call took {run.seconds:.1f} s, with any compilation."
            self._bar.write(text, file=self._stream)
        self._bar.set_postfix(
            loss=f"{run.last['outer_loss'][-1]:.4g}",
            gradient=f"{run.last['hypergradient_norm'][-1]:.2g}",
            refresh=False,
        )

    def close(self, run):
        if self._bar is not None:
            self._bar.close()

    def evaluate(self, run):
        self._evaluates = run.seconds
        self._stream.write("Evaluating the last outer variables ...\n")

    def end(self, run, solution):
        if self._evaluates is not None:
            seconds = run.seconds - self._evaluates
            text = f"The evaluation took {seconds:.1f} s, with any compilation.\n"
            self._stream.write(text)

    def _begin(self, run: Any) -> tqdm:
        bar = tqdm(total=run.total, initial=run.num_steps, unit="step", file=self._stream)
        bar.set_postfix_str("compiling")
        return bar


class _Stream:
    """A stream that is silent once it has failed.

    An error within tqdm would leave its lock held, at which other threads wait for ever.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self._is_silent = stream is None

    def write(self, text: str) -> int:
        if not self._is_silent:
            try:
                self._stream.write(text)
            except (OSError, ValueError):  # no reader, or closed
                self._is_silent = True
        return len(text)

    def flush(self) -> None:
        if not self._is_silent:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._is_silent = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # such as its encoding
