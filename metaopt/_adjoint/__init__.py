"""The axis of adjoints."""

from ._base import (
    AbstractAdjoint as AbstractAdjoint,
    AbstractPathAdjoint as AbstractPathAdjoint,
    HypergradientOutput as HypergradientOutput,
)
from ._choose import (
    chosen as chosen,
    exact_adjoints as exact_adjoints,
    temporary_bytes as temporary_bytes,
)
from ._curvature import (
    AbstractCurvature as AbstractCurvature,
    ExactCurvature as ExactCurvature,
    GaussNewton as GaussNewton,
)
from ._dual_weighted import DualWeighted as DualWeighted
from ._error import AbstractErrorEstimate as AbstractErrorEstimate
from ._explosion import Growth as Growth
from ._first_order import FirstOrderAdjoint as FirstOrderAdjoint
from ._forward import ForwardAdjoint as ForwardAdjoint
from ._implicit import ImplicitAdjoint as ImplicitAdjoint
from ._info import (
    ImplicitInfo as ImplicitInfo,
    PathInfo as PathInfo,
    ReversibleInfo as ReversibleInfo,
)
from ._linear_model_bounds import (
    logistic_bound as logistic_bound,
    ridge_bound as ridge_bound,
    softmax_bound as softmax_bound,
)
from ._memory import (
    AbstractMemoryPlan as AbstractMemoryPlan,
    Blocks as Blocks,
    format_bytes as format_bytes,
    MemoryBudget as MemoryBudget,
    OnlineCheckpoints as OnlineCheckpoints,
    RecomputeSteps as RecomputeSteps,
    StoreAll as StoreAll,
    StoreUpdates as StoreUpdates,
)
from ._one_step import OneStepAdjoint as OneStepAdjoint
from ._reversible import ReversibleAdjoint as ReversibleAdjoint
from ._strong_convexity import StrongConvexity as StrongConvexity
from ._truncated import (
    TruncatedAdjoint as TruncatedAdjoint,
    TruncationBound as TruncationBound,
)
from ._unrolled import UnrolledAdjoint as UnrolledAdjoint
