"""The axis of linear solvers."""

from ._base import (
    AbstractLinearSolver as AbstractLinearSolver,
    AbstractPreparedSolver as AbstractPreparedSolver,
    AbstractToleranceSolver as AbstractToleranceSolver,
    check_square as check_square,
    check_structures as check_structures,
    coarsest_eps as coarsest_eps,
    floored_rtol as floored_rtol,
    how_it_ended as how_it_ended,
    LinearSolution as LinearSolution,
    relative as relative,
    reported as reported,
    steps_left_out as steps_left_out,
    Subspace as Subspace,
)
from ._bicgstab import BiCGStab as BiCGStab
from ._cg import CG as CG
from ._dense import Dense as Dense
from ._gmres import GMRES as GMRES
from ._inverse import AbstractInverse as AbstractInverse
from ._minres import MINRES as MINRES
from ._neumann import Neumann as Neumann
from ._normal_cg import NormalCG as NormalCG
from ._preconditioned import (
    AbstractPreconditionedSolver as AbstractPreconditionedSolver,
)
from ._preconditioner import (
    AbstractPreconditioner as AbstractPreconditioner,
    DiagonalEstimate as DiagonalEstimate,
    LowRank as LowRank,
    SecondMoment as SecondMoment,
)
from ._prepare import (
    initial_state as initial_state,
    prepare as prepare,
    transposed as transposed,
)
from ._shine import SHINE as SHINE
