"""Choosing an adjoint that keeps to a budget of memory."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from .._model_state import FrozenState
from .._solver import AbstractIterativeSolver, AbstractSolver, LoopState, ReversibleSGD
from .._tree import explicit_mesh, tree_num_bytes
from ._base import AbstractAdjoint
from ._memory import (
    Blocks,
    format_bytes,
    MemoryBudget,
    OnlineCheckpoints,
    RecomputeSteps,
    StoreAll,
    StoreUpdates,
)
from ._reversible import ReversibleAdjoint
from ._unrolled import UnrolledAdjoint


_PLANS = (
    Blocks(1),
    Blocks(1, RecomputeSteps()),
    Blocks(2),
    Blocks(2, RecomputeSteps()),
    Blocks(3),
    Blocks(3, RecomputeSteps()),
    Blocks(5, RecomputeSteps()),
)


def exact_adjoints(solver: AbstractSolver) -> list[AbstractAdjoint]:
    """The adjoints that give the same hypergradient in reverse mode and differ in what
    they keep, from the fewest operations to the least memory."""
    adjoints: list[AbstractAdjoint] = [
        UnrolledAdjoint(plan) for plan in (StoreAll(), StoreUpdates(), RecomputeSteps())
    ]
    if isinstance(solver, ReversibleSGD) and isinstance(
        solver.state_policy, FrozenState | None
    ):
        adjoints.append(ReversibleAdjoint())
    if isinstance(solver, AbstractIterativeSolver) and solver.stops_early:
        adjoints.append(UnrolledAdjoint(OnlineCheckpoints()))
    return adjoints + [UnrolledAdjoint(plan) for plan in _PLANS]


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
            "cannot be kept to. Choose a plan by hand: `UnrolledAdjoint(metaopt.Blocks())`."
        )
    return analysis.temp_size_in_bytes


def chosen(
    adjoint: AbstractAdjoint,
    solver: AbstractSolver,
    start: Callable[[], LoopState],
    program: Callable[[AbstractAdjoint], Callable[..., Any]],
    *args: Any,
) -> AbstractAdjoint:
    """The adjoint itself or, where it has a budget of memory, the fastest that keeps to
    it.

    **Arguments:**

    - `adjoint`: any adjoint.
    - `solver`: the inner solver.
    - `start`: makes the state that the loop of the solver starts from.
    - `program`: what will be run, given an adjoint: a function of `args`.

    **Raises:**

    `ValueError` if none keeps to the budget.
    """
    if not isinstance(adjoint, UnrolledAdjoint):
        return adjoint
    if not isinstance(adjoint.memory, MemoryBudget):
        return adjoint
    assert isinstance(solver, AbstractIterativeSolver)  # checked by the adjoint
    if explicit_mesh(eqx.filter(args, eqx.is_array)) is not None:
        raise ValueError(
            "A budget of memory is kept to by compiling each plan beforehand, which cannot "
            "be done for arrays that are sharded over explicit axes of a mesh. Choose a "
            "plan by hand: `UnrolledAdjoint(metaopt.Blocks())`; or make the mesh with "
            "`axis_types=(AxisType.Auto,)`."
        )
    budget = adjoint.memory.num_bytes
    state = tree_num_bytes(jax.eval_shape(start).params)
    needs: dict[str, int] = {}
    for candidate in exact_adjoints(solver):
        if isinstance(candidate, UnrolledAdjoint):
            # What need not be compiled to see that it is too much.
            assert not isinstance(candidate.memory, MemoryBudget)
            if candidate.memory.num_stored(solver.num_steps) * state > budget:
                continue
        need = temporary_bytes(program(candidate), *args)
        if need <= budget:
            return candidate
        needs[repr(candidate)] = need
    if not needs:
        least = "even the params at the points where it would begin again take more"
    else:
        best = min(needs, key=lambda name: needs[name])
        least = f"the least is {format_bytes(needs[best])}, with `{best}`"
    raise ValueError(
        f"No memory plan keeps to {format_bytes(budget)}: {least}. Allow for more, take "
        "smaller batches, or use an adjoint whose memory does not grow with the number of "
        "steps: `metaopt.ReversibleAdjoint()` with `metaopt.ReversibleSGD`, "
        "`metaopt.ForwardAdjoint()` or `metaopt.ImplicitAdjoint()`."
    )
