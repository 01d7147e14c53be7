"""The axis of memory plans."""

from ._automatic import AutomaticPlan as AutomaticPlan, step_bytes as step_bytes
from ._base import AbstractMemoryPlan as AbstractMemoryPlan
from ._blocks import Blocks as Blocks
from ._budget import (
    Candidate as Candidate,
    format_bytes as format_bytes,
    MemoryBudget as MemoryBudget,
    temporary_bytes as temporary_bytes,
)
from ._online import OnlineCheckpoints as OnlineCheckpoints
from ._steps import (
    RecomputeSteps as RecomputeSteps,
    StoreAll as StoreAll,
    StoreUpdates as StoreUpdates,
)
