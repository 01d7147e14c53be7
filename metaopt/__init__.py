"""Bilevel and meta-optimisation with hypergradients that can be trusted."""

from . import datasets as datasets
from ._adjoint import AbstractAdjoint as AbstractAdjoint
from ._adjoint import AbstractMemoryPlan as AbstractMemoryPlan
from ._adjoint import AbstractPathAdjoint as AbstractPathAdjoint
from ._adjoint import AdjointInfo as AdjointInfo
from ._adjoint import ForwardAdjoint as ForwardAdjoint
from ._adjoint import HypergradientOutput as HypergradientOutput
from ._adjoint import ImplicitAdjoint as ImplicitAdjoint
from ._adjoint import OneStepAdjoint as OneStepAdjoint
from ._adjoint import RecomputeSteps as RecomputeSteps
from ._adjoint import SqrtBlocks as SqrtBlocks
from ._adjoint import StoreAll as StoreAll
from ._adjoint import TruncatedAdjoint as TruncatedAdjoint
from ._adjoint import UnrolledAdjoint as UnrolledAdjoint
from ._bilevel import AbstractBilevelSolver as AbstractBilevelSolver
from ._bilevel import AbstractStart as AbstractStart
from ._bilevel import BilevelStep as BilevelStep
from ._bilevel import ColdStart as ColdStart
from ._bilevel import NestedSolver as NestedSolver
from ._bilevel import NestedState as NestedState
from ._bilevel import WarmStart as WarmStart
from ._check import HypergradientCheck as HypergradientCheck
from ._check import check_hypergradient as check_hypergradient
from ._data import AbstractData as AbstractData
from ._data import BatchSequence as BatchSequence
from ._data import FullBatch as FullBatch
from ._data import Minibatches as Minibatches
from ._hypergradient import hypergradient as hypergradient
from ._linear import CG as CG
from ._linear import AbstractLinearSolver as AbstractLinearSolver
from ._linear import BiCGStab as BiCGStab
from ._linear import Dense as Dense
from ._linear import GMRES as GMRES
from ._linear import LinearSolution as LinearSolution
from ._linear import Neumann as Neumann
from ._model_state import AbstractStatePolicy as AbstractStatePolicy
from ._model_state import CarriedState as CarriedState
from ._model_state import FrozenState as FrozenState
from ._model_state import PerStepState as PerStepState
from ._problem import AbstractFixedPointProblem as AbstractFixedPointProblem
from ._problem import AbstractInnerProblem as AbstractInnerProblem
from ._problem import AbstractProblem as AbstractProblem
from ._problem import AbstractRootProblem as AbstractRootProblem
from ._problem import BilevelProblem as BilevelProblem
from ._problem import Evaluation as Evaluation
from ._problem import FixedPointProblem as FixedPointProblem
from ._problem import InnerProblem as InnerProblem
from ._problem import RootProblem as RootProblem
from ._report import BilevelSolution as BilevelSolution
from ._report import History as History
from ._report import Report as Report
from ._report import Solution as Solution
from ._results import RESULTS as RESULTS
from ._results import SolveError as SolveError
from ._run import solve_bilevel as solve_bilevel
from ._self_test import warn_if_known_bad
from ._solve_inner import solve_inner as solve_inner
from ._solver import AbstractDirectSolver as AbstractDirectSolver
from ._solver import AbstractIterativeSolver as AbstractIterativeSolver
from ._solver import AbstractSolver as AbstractSolver
from ._solver import Descent as Descent
from ._solver import InnerSolve as InnerSolve
from ._solver import JaxoptSolver as JaxoptSolver
from ._solver import Loop as Loop
from ._solver import OptimistixSolver as OptimistixSolver
from ._solver import Optimality as Optimality
from ._solver import Outcome as Outcome
from ._solver import Picard as Picard
from ._solver import StepOutput as StepOutput

__version__ = "0.1.0"

warn_if_known_bad()
