"""Sources of batches."""

from ._base import (
    AbstractData as AbstractData,
    AbstractFoldedData as AbstractFoldedData,
    AbstractWrappedData as AbstractWrappedData,
    unwrapped as unwrapped,
)
from ._folds import Folds as Folds
from ._sources import (
    as_data as as_data,
    BatchSequence as BatchSequence,
    FullBatch as FullBatch,
    InnerBatches as InnerBatches,
    Minibatches as Minibatches,
    restarted as restarted,
)
