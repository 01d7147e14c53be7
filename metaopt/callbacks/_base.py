"""The interface of callbacks, which are called between the compiled calls of a run."""

from typing import Any


class AbstractCallback:
    """An object that a run calls before its first step, after each call, and at its end.

    Override what you need: `open`, `see`, `close`. Each receives the run, with its
    `num_steps`, `total`, `state`, `hyper`, `info`, `history`, `result` and `seconds`. A
    run of `steps_per_call` steps in one compiled call is seen after each call.

    `see` ends the run by returning `True` or raising `StopIteration`. Any other error
    that a callback raises ends the run as well, and has what was reached as its attribute
    `solution`. `close` is called however the run ends.
    """

    def open(self, run: Any) -> None:
        """Called once before the first step. May set `run.state`, to go on from it.

        **Arguments:**

        - `run`: the [`metaopt.extend.Run`][].
        """

    def see(self, run: Any) -> bool | None:
        """Called after each compiled call.

        **Arguments:**

        - `run`: the [`metaopt.extend.Run`][].

        **Returns:**

        `True` to end the run.
        """

    def close(self, run: Any) -> None:
        """Called once at the end, after an error or an interrupt as well.

        **Arguments:**

        - `run`: the [`metaopt.extend.Run`][].
        """
