from ._array_response import (
    AbstractArrayResponse as AbstractArrayResponse,
    RowScaling as RowScaling,
    Shift as Shift,
)
from ._convert import (
    Conversion as Conversion,
    conversion as conversion,
    self_tuning as self_tuning,
)
from ._embedding import BestResponseEmbedding as BestResponseEmbedding
from ._layer import (
    AbstractBestResponse as AbstractBestResponse,
    best_responses as best_responses,
    bind as bind,
    bind_at_centre as bind_at_centre,
    moved as moved,
    ordinary as ordinary,
    response_filter as response_filter,
    squared_norm as squared_norm,
)
from ._linear import BestResponseLinear as BestResponseLinear
from ._norm import BestResponseNorm as BestResponseNorm
from ._perturbation import Perturbation as Perturbation
from ._recurrent import (
    BestResponseGRUCell as BestResponseGRUCell,
    BestResponseLSTMCell as BestResponseLSTMCell,
)
