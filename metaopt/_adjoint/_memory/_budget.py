"""A budget of memory, and the choice of an adjoint that keeps to it."""

import re
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax

from ..._core._tree import explicit_mesh


_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("kmgt", 1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?|)b?\s*", re.IGNORECASE)

_TOO_HIGH = 2  # an estimate can be, by this factor at most

_Adjoint = TypeVar("_Adjoint")


class Candidate(eqx.Module, Generic[_Adjoint]):
    """An adjoint that may keep to a budget.

    **Attributes:**

    - `adjoint`: the adjoint.
    - `num_bytes`: the least memory that it takes, as far as that is known without
        compiling it.
    - `estimate`: what it takes as far as shapes tell: no less than `num_bytes`.
    """

    adjoint: _Adjoint
    num_bytes: int = eqx.field(static=True)
    estimate: int = eqx.field(static=True)


class MemoryBudget(eqx.Module):
    """The most temporary memory that a hypergradient may take."""

    num_bytes: int = eqx.field(static=True)

    @classmethod
    def of(cls, size: int | float | str) -> "MemoryBudget":
        """A budget from a number of bytes, or a text such as `"2GiB"` or `"500 MB"`.

        **Raises:**

        `ValueError` for anything else, and for less than one byte.
        """
        match = _SIZE.fullmatch(size) if isinstance(size, str) else None
        if isinstance(size, bool) or (isinstance(size, str) and match is None):
            raise ValueError(
                "`memory` must be a memory plan, a number of bytes, or a text such as "
                f'`"2GiB"` or `"500MB"`; got {size!r}.'
            )
        if match is None:
            num_bytes = float(size)
        else:
            num_bytes = float(match[1]) * _UNITS[match[2].lower()]
        if not 1 <= num_bytes < float("inf"):
            raise ValueError(f"`memory` must be at least one byte; got {size!r}.")
        return cls(int(num_bytes))

    def choose(
        self,
        candidates: Sequence[Candidate[_Adjoint]],
        program: Callable[[_Adjoint], Callable[..., Any]],
        *args: Any,
    ) -> _Adjoint:
        """The first adjoint that keeps to the budget.

        Those that take far more by their estimate are compiled only if no other keeps to
        it.

        **Arguments:**

        - `candidates`: the adjoints, the fastest first.
        - `program`: the function of `args` that will run, given an adjoint.
        - `args`: pytrees.

        **Raises:**

        `ValueError` if none keeps to the budget.
        """
        if explicit_mesh(eqx.filter(args, eqx.is_array)) is not None:
            raise ValueError(
                "A budget of memory is kept to by compiling each plan beforehand, which "
                "cannot be done for arrays that are sharded over explicit axes of a mesh. "
                "Choose a plan by hand, `metaopt.UnrolledAdjoint("
                "metaopt.memory.Blocks())`, or make the mesh with "
                "`axis_types=(AxisType.Auto,)`."
            )
        needs: dict[str, int] = {}
        possible = [c for c in candidates if c.num_bytes <= self.num_bytes]
        far_more = lambda c: c.estimate > _TOO_HIGH * self.num_bytes
        for candidate in sorted(possible, key=far_more):
            need = temporary_bytes(program(candidate.adjoint), *args)
            if need <= self.num_bytes:
                return candidate.adjoint
            needs[repr(candidate.adjoint)] = need
        if not needs:
            least = "even the params at the points where it would begin again take more"
        else:
            best = min(needs, key=lambda name: needs[name])
            least = f"the least is {format_bytes(needs[best])}, with `{best}`"
        raise ValueError(
            f"No memory plan keeps to {format_bytes(self.num_bytes)}: {least}. Allow for "
            "more, take smaller batches, or use an adjoint whose memory does not grow with "
            "the number of steps: `metaopt.ReversibleAdjoint()` with "
            "`metaopt.ReversibleSGD`, `metaopt.ForwardAdjoint()` or "
            "`metaopt.ImplicitAdjoint()`."
        )


def temporary_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """The memory that XLA plans, beside arguments and results, to run `fn(*args)`.

    The function is compiled, for one device, and not run.

    **Arguments:**

    - `fn`: any function; the arrays that it closes over count as arguments.
    - `args`: pytrees. Of arrays only the shapes and dtypes matter.

    **Raises:**

    `ValueError` where the backend does not tell.
    """
    fn = eqx.filter_closure_convert(fn, *args)
    arrays, static = eqx.partition((fn, args), eqx.is_array)
    structs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)

    def run(arrays):
        fn, args = eqx.combine(arrays, static)
        return eqx.filter(fn(*args), eqx.is_array)

    analysis = jax.jit(run).lower(structs).compile().memory_analysis()
    if analysis is None:
        raise ValueError(
            "This backend of JAX does not say how much memory it plans for, so a budget "
            "cannot be kept to. Choose a plan by hand: "
            "`metaopt.UnrolledAdjoint(metaopt.memory.Blocks())`."
        )
    return analysis.temp_size_in_bytes


def format_bytes(size: float) -> str:
    """A number of bytes as people write it, such as `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
