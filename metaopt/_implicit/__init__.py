"""The linear system at an inner solution, and the error of derivatives made from it."""

from ._accuracy import Accuracy as Accuracy
from ._condition import widened_condition as widened_condition
from ._curvature import (
    AbstractCurvature as AbstractCurvature,
    ExactCurvature as ExactCurvature,
    GaussNewton as GaussNewton,
)
from ._defaults import (
    cheapest_curvature as cheapest_curvature,
)
from ._derivative import with_implicit_derivative as with_implicit_derivative
from ._dual_weighted import DualWeighted as DualWeighted
from ._error import (
    AbstractErrorEstimate as AbstractErrorEstimate,
    Linearisation as Linearisation,
)
from ._inner_error import InnerError as InnerError
from ._linear_fixed_point import LinearFixedPoint as LinearFixedPoint
from ._linear_model_bounds import (
    logistic_bound as logistic_bound,
    ridge_bound as ridge_bound,
    softmax_bound as softmax_bound,
)
from ._strong_convexity import (
    Constant as Constant,
    constant as constant,
    StrongConvexity as StrongConvexity,
)
from ._system import ImplicitSystem as ImplicitSystem
