"""The base of inner problems that hold another one."""

import equinox as eqx

from ._base import AbstractProblem
from ._kinds import AbstractInnerProblem


class AbstractWrappedProblem(AbstractInnerProblem):
    """A minimisation problem around another one, with the same params and another loss.

    Subclass it and write `init` and `loss`, which returns what `has_aux` and `has_state` of
    the problem inside ask for: `returned(self, evaluation)`.
    """

    # One that has a loss.
    problem: eqx.AbstractVar[AbstractProblem]

    @property
    def has_aux(self):
        return self.problem.has_aux

    @property
    def has_state(self):
        return self.problem.has_state
