"""The start of the inner solve of each outer step."""

import abc
from typing import ClassVar, TYPE_CHECKING

import equinox as eqx

from .._core._types import BoolScalar, IntScalar, ModelState, Params


if TYPE_CHECKING:
    # As Equinox advises: pyright knows `ClassVar` by this name only.
    from typing import ClassVar as AbstractClassVar
else:
    from equinox import AbstractClassVar


class AbstractStart(eqx.Module):
    """The start of the inner solve of each outer step."""

    goes_on: AbstractClassVar[bool]
    """Whether the path to the inner solution began in outer steps before this one."""

    @abc.abstractmethod
    def begin(
        self, given: Params | None, last: Params, first: ModelState, now: ModelState
    ) -> tuple[Params | None, ModelState]:
        """The params and model state to start from; `None` means the problem's `init`.

        **Arguments:**

        - `given`: the params handed over by the user, or `None`.
        - `last`: the inner solution of the outer step before.
        - `first`, `now`: the model state at the very start, and at `last`.
        """

    @abc.abstractmethod
    def goes_on_at(self, step: IntScalar) -> BoolScalar | None:
        """Whether an outer step goes on with the run of the one before, with the state of
        the inner optimizer, and ignores `begin`.

        **Arguments:**

        - `step`: the number of outer steps before it.

        **Returns:**

        A boolean, which is false for the first step; `None` for a start that never
        carries the inner optimizer.
        """

    @property
    @abc.abstractmethod
    def carried(self) -> str:
        """A description of the values that an outer step takes over from the one before."""


class ColdStart(AbstractStart):
    """Every outer step solves the inner problem from scratch.

    The tuned `hyper` is then judged by a new run, as learning rates and schedules should
    be. Random initial params and minibatches are drawn anew at every outer step.
    """

    goes_on: ClassVar[bool] = False

    def begin(self, given, last, first, now):
        return given, first

    def goes_on_at(self, step):
        return None

    @property
    def carried(self):
        return ""


class WarmStart(AbstractStart):
    """Every outer step goes on from the last inner solution.

    Cheaper where the inner problem has one solution. If it has many, the params found can
    owe more to the history of the run than to the `hyper` found (Vicol et al., 2022): solve
    again from scratch before you report. An adjoint that follows the path sees the part of
    it within the outer step, and the report says so.

    Params and model state are carried over. The inner optimizer begins anew at every
    outer step, with its momenta, averages, schedule and count of steps:
    [`metaopt.Windows`][] carries these as well.
    """

    goes_on: ClassVar[bool] = True

    def begin(self, given, last, first, now):
        return last, now

    def goes_on_at(self, step):
        return None

    @property
    def carried(self):
        return (
            "params; the inner optimizer begins anew (`metaopt.Windows()` carries it over)"
        )
