"""Unrolled differentiation: reverse mode through every step."""

from typing import ClassVar

from ._base import AbstractPathAdjoint, check_iterative
from ._memory import AbstractMemoryPlan, MemoryBudget, StoreAll


class UnrolledAdjoint(AbstractPathAdjoint):
    """Reverse mode through every step of the inner solver.

    Exact for the params that were reached, converged or not, and the only exact choice
    for hyperparameters of the path itself: learning rates, momenta, schedules, initial
    params. Its memory grows with the number of steps, as `memory` says. Where the inner
    problem is solved to convergence, [`metaopt.ImplicitAdjoint`][] needs less.

    **Arguments:**

    - `memory`: what is kept for the reverse pass: [`metaopt.StoreAll`][],
        [`metaopt.StoreUpdates`][], [`metaopt.RecomputeSteps`][], [`metaopt.Blocks`][] or
        [`metaopt.OnlineCheckpoints`][]. Or a budget, as a number of bytes or a text such
        as `"2GiB"`: the plan of the fewest operations is taken whose hypergradient XLA
        plans to run within this much temporary memory, which takes some compilations.
        A budget is for one device, and under `jax.vmap` for one of the elements.
        [`metaopt.memory_report`][] shows what each plan takes.

    **Raises:**

    `ValueError` if `memory` is none of these and, where the hypergradient is asked for,
    if no plan keeps to the budget.

    The method is that of Maclaurin, Duvenaud and Adams (2015), and Franceschi, Donini,
    Frasconi and Pontil (2017).
    """

    memory: AbstractMemoryPlan | MemoryBudget
    sees_path: ClassVar[bool] = True
    sees_inner_loss: ClassVar[bool] = True
    heeds_tolerance: ClassVar[bool] = False
    meets_cotangents: ClassVar[bool] = True

    def __init__(self, memory: AbstractMemoryPlan | int | str = StoreAll()):
        if isinstance(memory, (int, str)):
            self.memory = MemoryBudget.of(memory)
        else:
            self.memory = memory

    def __check_init__(self):
        if not isinstance(self.memory, (AbstractMemoryPlan, MemoryBudget)):
            raise ValueError(
                "`memory` must be a memory plan such as `metaopt.Blocks()`, or a budget "
                f'such as `"2GiB"`; got {self.memory!r}.'
            )

    @property
    def left_out(self):
        return ()

    def error_bound(self, hyper, outer_slope):
        return None

    def check(self, solver, data):
        check_iterative(self, solver)

    def solve(self, inner, params, hyper, model_state, throw):
        # A budget becomes a plan before there is anything to solve.
        assert isinstance(self.memory, AbstractMemoryPlan)
        loop = self.memory.prepare(inner.loop(params))
        return loop.run(params, hyper, model_state, self.memory.scan)
