"""Memory of unrolled derivatives: plans, and the report that compares them."""

from .._adjoint import (
    Blocks as Blocks,
    OnlineCheckpoints as OnlineCheckpoints,
    RecomputeSteps as RecomputeSteps,
    StoreAll as StoreAll,
    StoreUpdates as StoreUpdates,
)
from ._memory_report import (
    memory_report as memory_report,
    MemoryReport as MemoryReport,
)
