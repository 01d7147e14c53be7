"""The axis of bilevel solvers."""

from ._base import (
    AbstractBilevelSolver as AbstractBilevelSolver,
    BilevelEvaluation as BilevelEvaluation,
    BilevelStep as BilevelStep,
)
from ._best_response_method import (
    AbstractBestResponseMethod as AbstractBestResponseMethod,
    DeltaSTN as DeltaSTN,
    STN as STN,
)
from ._drawn import DrawnBatches as DrawnBatches
from ._nested import NestedSolver as NestedSolver, NestedState as NestedState
from ._perturbed import (
    Coordinates as Coordinates,
    cut as cut,
    PerturbedBatch as PerturbedBatch,
)
from ._self_tuning import (
    ResponseInfo as ResponseInfo,
    SelfTuningSolver as SelfTuningSolver,
)
from ._self_tuning_steps import SelfTuningState as SelfTuningState
from ._single_loop import AbstractSingleLoopSolver as AbstractSingleLoopSolver
from ._single_loop_parts import (
    SingleLoopInfo as SingleLoopInfo,
    SingleLoopState as SingleLoopState,
    SingleLoopUpdate as SingleLoopUpdate,
)
from ._start import (
    AbstractStart as AbstractStart,
    ColdStart as ColdStart,
    WarmStart as WarmStart,
)
from ._step_back import step_back as step_back
from ._tolerance import (
    AbstractTolerance as AbstractTolerance,
    GeometricTolerance as GeometricTolerance,
    PolynomialTolerance as PolynomialTolerance,
)
from ._windows import Windows as Windows
