"""Linear solvers, preconditioners, curvatures, and the system that they solve."""

from ._implicit import (
    ExactCurvature as ExactCurvature,
    GaussNewton as GaussNewton,
    ImplicitSystem as ImplicitSystem,
    LinearFixedPoint as LinearFixedPoint,
)
from ._linear import (
    BiCGStab as BiCGStab,
    DiagonalEstimate as DiagonalEstimate,
    LinearSolution as LinearSolution,
    LowRank as LowRank,
    MINRES as MINRES,
    NormalCG as NormalCG,
    SecondMoment as SecondMoment,
    SHINE as SHINE,
)
