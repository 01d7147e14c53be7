"""The axis of linear solvers."""

from ._base import (
    AbstractLinearSolver as AbstractLinearSolver,
    LinearSolution as LinearSolution,
)
from ._bicgstab import BiCGStab as BiCGStab
from ._cg import CG as CG
from ._dense import Dense as Dense
from ._gmres import GMRES as GMRES
from ._minres import MINRES as MINRES
from ._neumann import Neumann as Neumann
from ._normal_cg import NormalCG as NormalCG
