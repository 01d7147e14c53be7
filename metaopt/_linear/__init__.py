"""The axis of linear solvers."""

from ._base import (
    AbstractLinearSolver as AbstractLinearSolver,
    LinearSolution as LinearSolution,
)
from ._bicgstab import BiCGStab as BiCGStab
from ._cg import CG as CG
from ._dense import Dense as Dense
from ._gmres import GMRES as GMRES
from ._neumann import Neumann as Neumann
