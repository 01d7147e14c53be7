"""Steps that are undone: the runs of solvers that need not keep what they computed."""

from ._coupled import CoupledRun as CoupledRun
from ._coupling import Coupling as Coupling
from ._derivative import once as once
from ._momentum import MomentumRun as MomentumRun
from ._run import (
    AbstractReversibleSolver as AbstractReversibleSolver,
    AbstractRun as AbstractRun,
    Inputs as Inputs,
    outcome_of as outcome_of,
    Reached as Reached,
    Undone as Undone,
)
