"""The axis of adjoints."""

from ._base import (
    AbstractAdjoint as AbstractAdjoint,
    AbstractSystemAdjoint as AbstractSystemAdjoint,
    first_carry as first_carry,
    HypergradientOutput as HypergradientOutput,
)
from ._bias import Bias as Bias
from ._explosion import Growth as Growth
from ._first_order import FirstOrderAdjoint as FirstOrderAdjoint
from ._forward import ForwardAdjoint as ForwardAdjoint
from ._implicit import ImplicitAdjoint as ImplicitAdjoint
from ._info import (
    ImplicitInfo as ImplicitInfo,
    PathInfo as PathInfo,
    ReversibleInfo as ReversibleInfo,
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
    temporary_bytes as temporary_bytes,
)
from ._one_step import OneStepAdjoint as OneStepAdjoint
from ._path import AbstractPathAdjoint as AbstractPathAdjoint
from ._reach import (
    AbstractReach as AbstractReach,
    AlongPath as AlongPath,
    AtSolution as AtSolution,
    InnerGradientsHeld as InnerGradientsHeld,
)
from ._reversible import ReversibleAdjoint as ReversibleAdjoint
from ._truncated import (
    TruncatedAdjoint as TruncatedAdjoint,
    TruncationBound as TruncationBound,
)
from ._unrolled import (
    exact_adjoints as exact_adjoints,
    unrolled_by_default as unrolled_by_default,
    UnrolledAdjoint as UnrolledAdjoint,
)
