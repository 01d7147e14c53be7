"""The axis of bilevel solvers."""

from ._base import AbstractBilevelSolver as AbstractBilevelSolver
from ._base import BilevelStep as BilevelStep
from ._nested import NestedSolver as NestedSolver
from ._nested import NestedState as NestedState
from ._start import AbstractStart as AbstractStart
from ._start import ColdStart as ColdStart
from ._start import WarmStart as WarmStart
