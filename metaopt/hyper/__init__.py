"""Hyperparameters with a name and a range, for the leaves of `hyper`."""

from ._base import AbstractHyper as AbstractHyper
from ._frozen import (
    freeze as freeze,
    Frozen as Frozen,
    thaw as thaw,
    values as values,
)
from ._integer import Integer as Integer
from ._interval import Interval as Interval
from ._ordered import Ordered as Ordered
from ._per_leaf import PerLeaf as PerLeaf, replaced as replaced
from ._positive import Positive as Positive
from ._projected import projected as projected
from ._schedules import PiecewiseLinear as PiecewiseLinear, WarmupCosine as WarmupCosine
from ._simplex import Simplex as Simplex
