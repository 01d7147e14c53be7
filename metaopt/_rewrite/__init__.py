"""Rewriting a function through its jaxpr: some of its operations become others."""

from ._derivatives import finite_derivatives as finite_derivatives
from ._loops import carry_conditions as carry_conditions
