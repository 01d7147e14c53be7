"""A progress bar."""

import sys

from tqdm import tqdm

from ._base import AbstractCallback


class Progress(AbstractCallback):
    """Shows a progress bar on standard error.

    It says how long the first call took, with the compilation if there was one; then the
    same of the evaluation of the last outer variables.
    """

    def __init__(self):
        self._bar: tqdm | None = None
        self._compiled = False
        self._evaluates: float | None = None  # seconds of the run

    def open(self, run):
        self._compiled, self._evaluates = False, None
        self._bar = tqdm(
            total=run.total, initial=run.num_steps, unit="step", file=sys.stderr
        )
        self._bar.set_postfix_str("compiling")

    def see(self, run):
        assert self._bar is not None
        self._bar.update(run.num_steps - self._bar.n)
        if not self._compiled:
            self._compiled = True
            text = f"The first call took {run.seconds:.1f} s, with any compilation."
            self._bar.write(text, file=sys.stderr)
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
        sys.stderr.write("Evaluating the last outer variables ...\n")

    def end(self, run, solution):
        if self._evaluates is not None:
            seconds = run.seconds - self._evaluates
            text = f"The evaluation took {seconds:.1f} s, with any compilation.\n"
            sys.stderr.write(text)
