"""The axis of bilevel solvers."""

from ._base import (
    AbstractBilevelSolver as AbstractBilevelSolver,
    BilevelStep as BilevelStep,
)
from ._nested import NestedSolver as NestedSolver, NestedState as NestedState
from ._start import (
    AbstractStart as AbstractStart,
    ColdStart as ColdStart,
    WarmStart as WarmStart,
)
from ._tolerance import (
    AbstractTolerance as AbstractTolerance,
    GeometricTolerance as GeometricTolerance,
    PolynomialTolerance as PolynomialTolerance,
)
