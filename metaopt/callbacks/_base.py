"""The interface of callbacks, which are called between the compiled calls of a run."""

from typing import Any, ClassVar


class AbstractCallback:
    """An object that a run calls before its first step, after each call, and at its end.

    Override what you need: `open`, `see`, `close`, `evaluate`, `end`, which are called in
    this order. Each receives the run, with its `num_steps`, `total`, `state`, `hyper`,
    `info`, `history`, `result` and `seconds`. A run of `steps_per_call` steps in one
    compiled call is seen after each call.

    `open` and `see` end the run by returning `True` or raising `StopIteration`; the order
    of callbacks in the list does not matter to those of metaopt. Any other error
    that a callback raises ends the run as well, and has what was reached as its attribute
    `solution`. `close` is called however the run ends; `evaluate` and `end` only if no
    error ended it.
    """

    opens_first: ClassVar[bool] = False
    """Whether it opens before the others, and sees and closes after them. A checkpoint
    does, because it keeps their part of the run as well."""

    goes_back: ClassVar[bool] = False
    """Whether it may set `run.going_back`, and sees a call before the others: steps that
    are taken again do not count for them."""

    def open(self, run: Any) -> bool | None:
        """Called once before the first step. May set `run.state`, to go on from it.

        **Arguments:**

        - `run`: the [`metaopt.extend.Run`][].

        **Returns:**

        `True` to take no step, where a run that goes on has been ended before.
        """

    def see(self, run: Any) -> bool | None:
        """Called after each compiled call.

        **Arguments:**

        - `run`: the [`metaopt.extend.Run`][].

        **Returns:**

        `True` to end the run.
        """

    def close(self, run: Any) -> None:
        """Called once after the last step, after an error or an interrupt as well.

        **Arguments:**

        - `run`: the [`metaopt.extend.Run`][].
        """

    def evaluate(self, run: Any) -> None:
        """Called once before the outer loss is evaluated at the last `hyper`, which
        compiles a program of its own. [`metaopt.few_shot.train`][] has no such evaluation.

        **Arguments:**

        - `run`: the [`metaopt.extend.Run`][].
        """

    def end(self, run: Any, solution: Any) -> None:
        """Called last.

        **Arguments:**

        - `run`: the [`metaopt.extend.Run`][].
        - `solution`: the [`metaopt.BilevelSolution`][] or
            [`metaopt.few_shot.TrainSolution`][] of the run.
        """
