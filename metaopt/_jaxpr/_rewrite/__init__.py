"""Rewriting a function through its jaxpr: some of its operations become others."""

from ._derivatives import (
    finite_derivatives as finite_derivatives,
    has_unbounded_derivatives as has_unbounded_derivatives,
    remade_entrywise as remade_entrywise,
)
from ._interpreter import inner_jaxprs as inner_jaxprs
from ._loops import carry_conditions as carry_conditions
from ._marks import propagate as propagate
