"""The axis of linear solvers."""

from ._base import AbstractLinearSolver as AbstractLinearSolver
from ._base import LinearSolution as LinearSolution
from ._bicgstab import BiCGStab as BiCGStab
from ._cg import CG as CG
from ._lineax import Dense as Dense
from ._lineax import GMRES as GMRES
from ._neumann import Neumann as Neumann
