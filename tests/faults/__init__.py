"""The tables of planted faults."""

from ._fault import Fault as Fault
from .implicit import FAULTS as _IMPLICIT
from .learning import FAULTS as _LEARNING
from .linear import FAULTS as _LINEAR
from .solving import FAULTS as _SOLVING


FAULTS = [*_LINEAR, *_SOLVING, *_IMPLICIT, *_LEARNING]
