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
        self._bar: tqdm | None = None
        self._compiled = False
        self._evaluates: float | None = None  # seconds of the run

    def open(self, run):
        self._compiled, self._evaluates = False, None
        self._bar = None
        if sys.stderr is not None:
            try:
                self._begin(run)
            except _GONE:
                self._give_up()

    def see(self, run):
        if self._bar is not None:
            try:
                self._update(self._bar, run)
            except _GONE:
                self._give_up()

    def close(self, run):
        if self._bar is not None:
            try:
                self._bar.close()
            except _GONE:
                self._give_up()

    def evaluate(self, run):
        self._evaluates = run.seconds
        self._say("Evaluating the last outer variables ...")

    def end(self, run, solution):
        if self._evaluates is not None:
            seconds = run.seconds - self._evaluates
            self._say(f"The evaluation took {seconds:.1f} s, with any compilation.")

    def _begin(self, run: Any) -> None:
        self._bar = tqdm(
            total=run.total, initial=run.num_steps, unit="step", file=sys.stderr
        )
        self._bar.set_postfix_str("compiling")

    def _update(self, bar: tqdm, run: Any) -> None:
        bar.update(run.num_steps - bar.n)
        if not self._compiled:
            self._compiled = True
            text = f"The first call took {run.seconds:.1f} s, with any compilation."
            bar.write(text, file=sys.stderr)
        bar.set_postfix(
            loss=f"{run.last['outer_loss'][-1]:.4g}",
            gradient=f"{run.last['hypergradient_norm'][-1]:.2g}",
            refresh=False,
        )

    def _say(self, text: str) -> None:
        if self._bar is not None:
            try:
                sys.stderr.write(text + "\n")
            except _GONE:
                self._give_up()

    def _give_up(self) -> None:
        if self._bar is not None:
            self._bar.disable = True  # else it writes once more when it is deleted
            self._bar = None


_GONE = OSError, ValueError  # of a pipe without reader, of a closed file
