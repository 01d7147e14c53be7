"""Checks and comparisons of hypergradients, responses, and training."""

from ._check import HypergradientCheck as HypergradientCheck
from ._check_response import (
    check_response as check_response,
    ResponseCheck as ResponseCheck,
)
from ._compare import (
    ComparedAdjoint as ComparedAdjoint,
    Comparison as Comparison,
)
from ._retrain import (
    retrain as retrain,
)
from ._smoothness import (
    check_smoothness as check_smoothness,
    SmoothnessCheck as SmoothnessCheck,
)
