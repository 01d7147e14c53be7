"""The axis of preconditioners."""

from ._base import AbstractPreconditioner as AbstractPreconditioner
from ._diagonal import DiagonalEstimate as DiagonalEstimate
from ._low_rank import LowRank as LowRank
from ._second_moment import SecondMoment as SecondMoment
