"""The axis of inner solvers."""

from ._anderson import Anderson as Anderson
from ._base import (
    AbstractBestIterateSolver as AbstractBestIterateSolver,
    AbstractDirectSolver as AbstractDirectSolver,
    AbstractIterativeSolver as AbstractIterativeSolver,
    AbstractMixingSolver as AbstractMixingSolver,
    AbstractSolver as AbstractSolver,
    Composition as Composition,
    Optimality as Optimality,
    Outcome as Outcome,
    StepOutput as StepOutput,
)
from ._broyden import Broyden as Broyden
from ._common import (
    check_state_policy as check_state_policy,
    problem_optimality as problem_optimality,
)
from ._descent import Descent as Descent
from ._earlier import can_go_on as can_go_on, Earlier as Earlier
from ._exact_momentum import AbstractExactMomentum as AbstractExactMomentum
from ._examples import Examples as Examples
from ._fixed_point import (
    AbstractFixedPointSolver as AbstractFixedPointSolver,
    AbstractSingleMapSolver as AbstractSingleMapSolver,
)
from ._gauge import new_gauge as new_gauge
from ._inner_solve import InnerSolve as InnerSolve
from ._jaxopt import JaxoptSolver as JaxoptSolver
from ._loop import Loop as Loop, LoopState as LoopState
from ._newton_krylov import NewtonKrylov as NewtonKrylov
from ._optimistix import OptimistixSolver as OptimistixSolver
from ._picard import Picard as Picard
from ._reversible import (
    AbstractReversibleSolver as AbstractReversibleSolver,
    Inputs as Inputs,
    once as once,
    outcome_of as outcome_of,
    Reached as Reached,
    Undone as Undone,
)
from ._reversible_picard import ReversiblePicard as ReversiblePicard
from ._reversible_sgd import ReversibleSGD as ReversibleSGD
from ._solved import Solved as Solved
