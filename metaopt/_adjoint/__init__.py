"""The axis of adjoints."""

from ._base import (
    AbstractAdjoint as AbstractAdjoint,
    AbstractPathAdjoint as AbstractPathAdjoint,
    AdjointInfo as AdjointInfo,
    HypergradientOutput as HypergradientOutput,
)
from ._forward import ForwardAdjoint as ForwardAdjoint
from ._implicit import ImplicitAdjoint as ImplicitAdjoint
from ._memory import (
    AbstractMemoryPlan as AbstractMemoryPlan,
    RecomputeSteps as RecomputeSteps,
    SqrtBlocks as SqrtBlocks,
    StoreAll as StoreAll,
)
from ._one_step import OneStepAdjoint as OneStepAdjoint
from ._truncated import TruncatedAdjoint as TruncatedAdjoint
from ._unrolled import UnrolledAdjoint as UnrolledAdjoint
