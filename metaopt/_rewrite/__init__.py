"""Rewriting a function through its jaxpr: some of its operations become others."""

from ._derivatives import finite_derivatives as finite_derivatives
from ._interpreter import inner_jaxprs as inner_jaxprs
from ._loops import carry_conditions as carry_conditions
from ._marks import propagate as propagate
