"""The axis of inner solvers."""

from ._base import AbstractDirectSolver as AbstractDirectSolver
from ._base import AbstractIterativeSolver as AbstractIterativeSolver
from ._base import AbstractSolver as AbstractSolver
from ._base import Optimality as Optimality
from ._base import Outcome as Outcome
from ._base import StepOutput as StepOutput
from ._descent import Descent as Descent
from ._inner_solve import InnerSolve as InnerSolve
from ._jaxopt import JaxoptSolver as JaxoptSolver
from ._loop import Loop as Loop
from ._optimistix import OptimistixSolver as OptimistixSolver
from ._picard import Picard as Picard
