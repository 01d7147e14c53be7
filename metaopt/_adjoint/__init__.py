"""The axis of adjoints."""

from ._base import AbstractAdjoint as AbstractAdjoint
from ._base import AbstractPathAdjoint as AbstractPathAdjoint
from ._base import AdjointInfo as AdjointInfo
from ._base import HypergradientOutput as HypergradientOutput
from ._forward import ForwardAdjoint as ForwardAdjoint
from ._implicit import ImplicitAdjoint as ImplicitAdjoint
from ._memory import AbstractMemoryPlan as AbstractMemoryPlan
from ._memory import RecomputeSteps as RecomputeSteps
from ._memory import SqrtBlocks as SqrtBlocks
from ._memory import StoreAll as StoreAll
from ._one_step import OneStepAdjoint as OneStepAdjoint
from ._truncated import TruncatedAdjoint as TruncatedAdjoint
from ._unrolled import UnrolledAdjoint as UnrolledAdjoint
