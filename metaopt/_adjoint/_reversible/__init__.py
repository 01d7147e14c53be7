"""Reversible differentiation: steps are undone where others keep what they computed."""

from ._adjoint import ReversibleAdjoint as ReversibleAdjoint
