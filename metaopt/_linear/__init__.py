"""The axis of linear solvers."""

from ._base import (
    AbstractLinearSolver as AbstractLinearSolver,
    AbstractPreconditionedSolver as AbstractPreconditionedSolver,
    LinearSolution as LinearSolution,
)
from ._bicgstab import BiCGStab as BiCGStab
from ._cg import CG as CG
from ._dense import Dense as Dense
from ._gmres import GMRES as GMRES
from ._minres import MINRES as MINRES
from ._neumann import Neumann as Neumann
from ._normal_cg import NormalCG as NormalCG
from ._preconditioner import (
    AbstractPreconditioner as AbstractPreconditioner,
    DiagonalEstimate as DiagonalEstimate,
    LowRank as LowRank,
    SecondMoment as SecondMoment,
)
from ._prepare import initial_state as initial_state, prepare as prepare
