"""Inner problems, and outer losses at their solutions."""

from ._base import AbstractProblem as AbstractProblem, Evaluation as Evaluation
from ._bilevel_problem import BilevelProblem as BilevelProblem
from ._call import (
    check_signature as check_signature,
    declared as declared,
    initialise as initialise,
    returned as returned,
)
from ._functions import (
    FixedPointProblem as FixedPointProblem,
    InnerProblem as InnerProblem,
    LeastSquaresProblem as LeastSquaresProblem,
    PredictionProblem as PredictionProblem,
    RootProblem as RootProblem,
)
from ._game import GameProblem as GameProblem
from ._kinds import (
    AbstractFixedPointProblem as AbstractFixedPointProblem,
    AbstractInnerProblem as AbstractInnerProblem,
    AbstractRootProblem as AbstractRootProblem,
)
from ._least_squares import AbstractLeastSquaresProblem as AbstractLeastSquaresProblem
from ._mixed_mode import in_mixed_mode as in_mixed_mode, InChunks as InChunks
from ._model_state import (
    AbstractStatePolicy as AbstractStatePolicy,
    CarriedState as CarriedState,
    FrozenState as FrozenState,
    PerStepState as PerStepState,
    StepStates as StepStates,
)
from ._prediction import AbstractPredictionProblem as AbstractPredictionProblem
from ._wrapped import AbstractWrappedProblem as AbstractWrappedProblem
