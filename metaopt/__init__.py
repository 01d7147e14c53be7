"""Bilevel and meta-optimisation with hypergradients that can be trusted."""

from . import (
    callbacks as callbacks,
    datasets as datasets,
    few_shot as few_shot,
    hyper as hyper,
    nn as nn,
    plot as plot,
)
from ._adjoint import (
    AbstractAdjoint as AbstractAdjoint,
    AbstractMemoryPlan as AbstractMemoryPlan,
    AbstractPathAdjoint as AbstractPathAdjoint,
    AbstractReach as AbstractReach,
    AbstractSystemAdjoint as AbstractSystemAdjoint,
    AlongPath as AlongPath,
    AtSolution as AtSolution,
    Bias as Bias,
    Blocks as Blocks,
    FirstOrderAdjoint as FirstOrderAdjoint,
    ForwardAdjoint as ForwardAdjoint,
    Growth as Growth,
    HypergradientOutput as HypergradientOutput,
    ImplicitAdjoint as ImplicitAdjoint,
    ImplicitInfo as ImplicitInfo,
    InnerGradientsHeld as InnerGradientsHeld,
    OneStepAdjoint as OneStepAdjoint,
    OnlineCheckpoints as OnlineCheckpoints,
    PathInfo as PathInfo,
    RecomputeSteps as RecomputeSteps,
    ReversibleAdjoint as ReversibleAdjoint,
    ReversibleInfo as ReversibleInfo,
    StoreAll as StoreAll,
    StoreUpdates as StoreUpdates,
    TruncatedAdjoint as TruncatedAdjoint,
    TruncationBound as TruncationBound,
    UnrolledAdjoint as UnrolledAdjoint,
)
from ._bilevel import (
    AbstractBestResponseMethod as AbstractBestResponseMethod,
    AbstractBilevelSolver as AbstractBilevelSolver,
    AbstractSingleLoopSolver as AbstractSingleLoopSolver,
    AbstractStart as AbstractStart,
    AbstractTolerance as AbstractTolerance,
    BilevelEvaluation as BilevelEvaluation,
    BilevelStep as BilevelStep,
    ColdStart as ColdStart,
    DeltaSTN as DeltaSTN,
    DrawnBatches as DrawnBatches,
    GeometricTolerance as GeometricTolerance,
    NestedSolver as NestedSolver,
    NestedState as NestedState,
    PolynomialTolerance as PolynomialTolerance,
    ResponseInfo as ResponseInfo,
    SelfTuningSolver as SelfTuningSolver,
    SelfTuningState as SelfTuningState,
    SingleLoopInfo as SingleLoopInfo,
    SingleLoopState as SingleLoopState,
    SingleLoopUpdate as SingleLoopUpdate,
    STN as STN,
    WarmStart as WarmStart,
    Windows as Windows,
)
from ._check import (
    check_hypergradient as check_hypergradient,
    HypergradientCheck as HypergradientCheck,
)
from ._check_response import (
    check_response as check_response,
    ResponseCheck as ResponseCheck,
)
from ._checkpoint import CheckpointError as CheckpointError, load as load, save as save
from ._compare import (
    compare_hypergradients as compare_hypergradients,
    ComparedAdjoint as ComparedAdjoint,
    Comparison as Comparison,
)
from ._data import (
    AbstractData as AbstractData,
    BatchSequence as BatchSequence,
    FullBatch as FullBatch,
    InnerBatches as InnerBatches,
    Minibatches as Minibatches,
)
from ._hypergradient import hypergradient as hypergradient
from ._implicit import (
    AbstractCurvature as AbstractCurvature,
    AbstractErrorEstimate as AbstractErrorEstimate,
    DualWeighted as DualWeighted,
    ExactCurvature as ExactCurvature,
    GaussNewton as GaussNewton,
    ImplicitSystem as ImplicitSystem,
    LinearFixedPoint as LinearFixedPoint,
    logistic_bound as logistic_bound,
    ridge_bound as ridge_bound,
    softmax_bound as softmax_bound,
    StrongConvexity as StrongConvexity,
)
from ._linear import (
    AbstractInverse as AbstractInverse,
    AbstractLinearSolver as AbstractLinearSolver,
    AbstractPreconditionedSolver as AbstractPreconditionedSolver,
    AbstractPreconditioner as AbstractPreconditioner,
    AbstractPreparedSolver as AbstractPreparedSolver,
    AbstractToleranceSolver as AbstractToleranceSolver,
    BiCGStab as BiCGStab,
    CG as CG,
    Dense as Dense,
    DiagonalEstimate as DiagonalEstimate,
    GMRES as GMRES,
    LinearSolution as LinearSolution,
    LowRank as LowRank,
    MINRES as MINRES,
    Neumann as Neumann,
    NormalCG as NormalCG,
    SecondMoment as SecondMoment,
    SHINE as SHINE,
)
from ._memory_report import (
    memory_report as memory_report,
    MemoryReport as MemoryReport,
)
from ._mixed_mode import InChunks as InChunks
from ._model_state import (
    AbstractStatePolicy as AbstractStatePolicy,
    CarriedState as CarriedState,
    FrozenState as FrozenState,
    PerStepState as PerStepState,
    StepStates as StepStates,
)
from ._outer import Run as Run
from ._problem import (
    AbstractFixedPointProblem as AbstractFixedPointProblem,
    AbstractInnerProblem as AbstractInnerProblem,
    AbstractLeastSquaresProblem as AbstractLeastSquaresProblem,
    AbstractPredictionProblem as AbstractPredictionProblem,
    AbstractProblem as AbstractProblem,
    AbstractRootProblem as AbstractRootProblem,
    BilevelProblem as BilevelProblem,
    Evaluation as Evaluation,
    FixedPointProblem as FixedPointProblem,
    GameProblem as GameProblem,
    InnerProblem as InnerProblem,
    LeastSquaresProblem as LeastSquaresProblem,
    PredictionProblem as PredictionProblem,
    RootProblem as RootProblem,
)
from ._report import (
    AbstractDerivativeInfo as AbstractDerivativeInfo,
    AbstractInfo as AbstractInfo,
    Best as Best,
    BilevelSolution as BilevelSolution,
    History as History,
    InnerInfo as InnerInfo,
    OuterInfo as OuterInfo,
    Report as Report,
    Solution as Solution,
)
from ._results import RESULTS as RESULTS, SolveError as SolveError
from ._retrain import retrain as retrain
from ._self_test import warn_if_known_bad as _warn_if_known_bad
from ._smoothness import (
    check_smoothness as check_smoothness,
    SmoothnessCheck as SmoothnessCheck,
)
from ._solve_bilevel import solve_bilevel as solve_bilevel
from ._solve_inner import solve_inner as solve_inner
from ._solver import (
    AbstractBestIterateSolver as AbstractBestIterateSolver,
    AbstractDirectSolver as AbstractDirectSolver,
    AbstractIterativeSolver as AbstractIterativeSolver,
    AbstractSolver as AbstractSolver,
    Anderson as Anderson,
    Broyden as Broyden,
    Composition as Composition,
    Descent as Descent,
    InnerSolve as InnerSolve,
    JaxoptSolver as JaxoptSolver,
    Loop as Loop,
    NewtonKrylov as NewtonKrylov,
    Optimality as Optimality,
    OptimistixSolver as OptimistixSolver,
    Outcome as Outcome,
    Picard as Picard,
    ReversiblePicard as ReversiblePicard,
    ReversibleSGD as ReversibleSGD,
    StepOutput as StepOutput,
)


__version__ = "0.1.0"

_warn_if_known_bad()
