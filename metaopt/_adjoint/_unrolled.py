"""Unrolled differentiation: reverse mode through every step."""

from typing import ClassVar

from ._base import AbstractPathAdjoint, check_iterative
from ._memory import AbstractMemoryPlan, StoreAll


class UnrolledAdjoint(AbstractPathAdjoint):
    """Reverse mode through every step of the inner solver.

    Exact for the params that were reached, converged or not, and the only exact choice
    for hyperparameters of the path itself: learning rates, momenta, schedules, initial
    params. Its memory grows with the number of steps, as `memory` says. Where the inner
    problem is solved to convergence, [`metaopt.ImplicitAdjoint`][] needs less.

    **Arguments:**

    - `memory`: what is kept for the reverse pass: [`metaopt.StoreAll`][],
        [`metaopt.RecomputeSteps`][] or [`metaopt.SqrtBlocks`][].

    The method is that of Maclaurin, Duvenaud and Adams (2015), and Franceschi, Donini,
    Frasconi and Pontil (2017).
    """

    memory: AbstractMemoryPlan = StoreAll()
    sees_path: ClassVar[bool] = True

    def __check_init__(self):
        if not isinstance(self.memory, AbstractMemoryPlan):
            raise ValueError(
                "`memory` must be a memory plan such as `metaopt.SqrtBlocks()`; got "
                f"{self.memory!r}."
            )

    @property
    def left_out(self):
        return ()

    def check(self, solver, data):
        check_iterative(self, solver)

    def solve(self, inner, params, hyper, model_state, throw):
        loop = inner.loop(params)
        return loop.run(params, hyper, model_state, self.memory.scan)
