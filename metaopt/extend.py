"""The parts that a class of your own is made from."""

from ._adjoint import (
    AbstractAdjoint as AbstractAdjoint,
    AbstractMemoryPlan as AbstractMemoryPlan,
    AbstractPathAdjoint as AbstractPathAdjoint,
    AbstractReach as AbstractReach,
    AbstractSystemAdjoint as AbstractSystemAdjoint,
    AlongPath as AlongPath,
    AtSolution as AtSolution,
    Bias as Bias,
    Growth as Growth,
    HypergradientOutput as HypergradientOutput,
    ImplicitInfo as ImplicitInfo,
    InnerGradientsHeld as InnerGradientsHeld,
    PathInfo as PathInfo,
    ReversibleInfo as ReversibleInfo,
)
from ._bilevel import (
    AbstractBestResponseMethod as AbstractBestResponseMethod,
    AbstractBilevelSolver as AbstractBilevelSolver,
    AbstractSingleLoopSolver as AbstractSingleLoopSolver,
    AbstractStart as AbstractStart,
    AbstractTolerance as AbstractTolerance,
    BilevelEvaluation as BilevelEvaluation,
    BilevelStep as BilevelStep,
    DrawnBatches as DrawnBatches,
    NestedState as NestedState,
    ResponseInfo as ResponseInfo,
    SelfTuningState as SelfTuningState,
    SingleLoopInfo as SingleLoopInfo,
    SingleLoopState as SingleLoopState,
    SingleLoopUpdate as SingleLoopUpdate,
)
from ._data import (
    AbstractData as AbstractData,
)
from ._implicit import (
    AbstractCurvature as AbstractCurvature,
    AbstractErrorEstimate as AbstractErrorEstimate,
)
from ._linear import (
    AbstractInverse as AbstractInverse,
    AbstractLinearSolver as AbstractLinearSolver,
    AbstractPreconditionedSolver as AbstractPreconditionedSolver,
    AbstractPreconditioner as AbstractPreconditioner,
    AbstractPreparedSolver as AbstractPreparedSolver,
    AbstractToleranceSolver as AbstractToleranceSolver,
)
from ._outer import (
    Run as Run,
)
from ._problem import (
    AbstractFixedPointProblem as AbstractFixedPointProblem,
    AbstractInnerProblem as AbstractInnerProblem,
    AbstractLeastSquaresProblem as AbstractLeastSquaresProblem,
    AbstractPredictionProblem as AbstractPredictionProblem,
    AbstractProblem as AbstractProblem,
    AbstractRootProblem as AbstractRootProblem,
    AbstractStatePolicy as AbstractStatePolicy,
    Evaluation as Evaluation,
    StepStates as StepStates,
)
from ._report import (
    AbstractDerivativeInfo as AbstractDerivativeInfo,
    AbstractInfo as AbstractInfo,
    Best as Best,
    CountsWork as CountsWork,
    InnerInfo as InnerInfo,
    OuterInfo as OuterInfo,
    Work as Work,
)
from ._solver import (
    AbstractBestIterateSolver as AbstractBestIterateSolver,
    AbstractDirectSolver as AbstractDirectSolver,
    AbstractIterativeSolver as AbstractIterativeSolver,
    AbstractSolver as AbstractSolver,
    Composition as Composition,
    InnerSolve as InnerSolve,
    Loop as Loop,
    Optimality as Optimality,
    Outcome as Outcome,
    StepOutput as StepOutput,
)
