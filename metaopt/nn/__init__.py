from .._best_response import (
    AbstractArrayResponse as AbstractArrayResponse,
    AbstractBestResponse as AbstractBestResponse,
    BestResponseEmbedding as BestResponseEmbedding,
    BestResponseGRUCell as BestResponseGRUCell,
    BestResponseLinear as BestResponseLinear,
    BestResponseLSTMCell as BestResponseLSTMCell,
    BestResponseNorm as BestResponseNorm,
    bind as bind,
    Conversion as Conversion,
    conversion as conversion,
    ordinary as ordinary,
    Perturbation as Perturbation,
    RowScaling as RowScaling,
    self_tuning as self_tuning,
    Shift as Shift,
    squared_norm as squared_norm,
)
from .._equilibrium import (
    AbstractCell as AbstractCell,
    bound_spectral_norm as bound_spectral_norm,
    ContractiveCell as ContractiveCell,
    Equilibrium as Equilibrium,
    EquilibriumInfo as EquilibriumInfo,
    jacobian_penalty as jacobian_penalty,
    MonotoneCell as MonotoneCell,
    spectral_radius as spectral_radius,
)
from .._layers import (
    BatchNorm as BatchNorm,
    Conv2d as Conv2d,
    MaxPool2d as MaxPool2d,
)
from .._problem import (
    CarriedState as CarriedState,
    FrozenState as FrozenState,
    PerStepState as PerStepState,
)
