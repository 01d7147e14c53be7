"""Estimates and bounds of the error of a hypergradient."""

from ._adjoint import (
    TruncationBound as TruncationBound,
)
from ._implicit import (
    DualWeighted as DualWeighted,
    logistic_bound as logistic_bound,
    ridge_bound as ridge_bound,
    softmax_bound as softmax_bound,
    StrongConvexity as StrongConvexity,
)
