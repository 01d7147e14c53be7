"""The report on one hypergradient."""

from typing import Any

import equinox as eqx

from .._core._results import RESULTS
from ._parts import InnerInfo, OuterInfo
from ._table import held_text, table, verdict


class Report(eqx.Module):
    """A report on how far one hypergradient can be trusted. `print` it.

    **Attributes:**

    - `result`: how it went; `metaopt.RESULTS[result]` names the cause and the remedy.
    - `outer`: a [`metaopt.extend.OuterInfo`][], the outer loss and the size of the
        hypergradient.
    - `inner`: a [`metaopt.extend.InnerInfo`][], the inner solve.
    - `derivative`: the adjoint's own part, such as a [`metaopt.extend.ImplicitInfo`][] or a
        [`metaopt.extend.PathInfo`][]: an
        [`metaopt.extend.AbstractDerivativeInfo`][].
    - `adjoint`: the name of the adjoint.
    """

    result: RESULTS
    outer: OuterInfo
    inner: InnerInfo
    derivative: Any  # of the type that the adjoint chooses
    adjoint: str = eqx.field(static=True)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The parts that the derivative leaves out by construction, in words: it is biased
        unless this is empty."""
        return (*self.derivative.left_out, *self.inner.left_out)

    def scalars(self) -> dict:
        """The scalars of all parts, by the names of their columns in the history."""
        parts = self.outer, self.inner, self.derivative
        return {name: value for part in parts for name, value in part.scalars().items()}

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rows = [("adjoint", self.adjoint + (" (biased)" if self.left_out else ""))]
        rows += [*self.outer.rows(), *self.inner.rows()]
        rows += [*self.derivative.accuracy(), *self.derivative.rows()]
        rows += notes(self)
        return table("Hypergradient", rows, verdict(self.result))


def notes(report: Report) -> list[tuple[str, str]]:
    """The rows on the parts that a hypergradient leaves out and on those it cannot see."""
    rows = []
    if report.left_out:
        rows.append(("left out", "; ".join(report.left_out)))
    if report.outer.unreached:
        rows.append(("without influence", ", ".join(report.outer.unreached)))
    if report.outer.held_constant:
        rows.append(("without derivative", held_text(report.outer.held_constant)))
    if report.inner.carried:
        rows.append(("carried over", report.inner.carried))
    return rows
