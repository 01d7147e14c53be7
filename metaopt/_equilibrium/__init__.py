from ._bound import bound_spectral_norm as bound_spectral_norm
from ._cell import (
    AbstractCell as AbstractCell,
    ContractiveCell as ContractiveCell,
    MonotoneCell as MonotoneCell,
)
from ._jacobian import (
    jacobian_penalty as jacobian_penalty,
    spectral_radius as spectral_radius,
)
from ._layer import Equilibrium as Equilibrium, EquilibriumInfo as EquilibriumInfo
