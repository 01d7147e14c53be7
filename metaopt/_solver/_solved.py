"""Params that are a solution already."""

import jax.numpy as jnp

from .._core._results import mask_result, RESULTS
from .._core._tree import split_trainable, tree_all_finite
from ._base import AbstractDirectSolver, Outcome
from ._common import problem_optimality


class Solved(AbstractDirectSolver):
    """Takes the params that it is given for the solution, and no step.

    Use it where the inner problem was solved elsewhere, by any program: hand the solution
    over as `params`, and the hypergradient costs its linear system alone. Or where a
    formula gives the solution: as the `init` of the inner problem. Whether the params are
    a solution is judged as for every solver, by [`metaopt.ImplicitAdjoint`][]: its report
    estimates their error.

    ```python
    import jax.numpy as jnp
    import metaopt as mo

    problem = mo.BilevelProblem(
        lambda params, hyper, batch: (params - hyper) ** 2,
        lambda params, hyper, batch: params**2,
    )
    gradient, report = mo.hypergradient(
        problem, 3.0, params=jnp.array(3.0),
        inner=mo.Solved(), adjoint=mo.ImplicitAdjoint(),
    )
    print(gradient.round(3))  # 6.0
    ```

    It makes no random draw, and sees all of the data. Model state is taken as it is given.
    """

    def check(self, problem, data):
        data.check(1)

    def optimality(self, problem, params, hyper, batch, key, state):
        return problem_optimality(problem, params, hyper, batch, key, state)

    def solve(self, problem, params, hyper, batch, key, model_state):
        aux = None
        if problem.has_aux:
            aux = problem.evaluate(params, hyper, batch, key, model_state).aux
        lost = jnp.logical_not(tree_all_finite(split_trainable(params)[0]))
        return Outcome(
            params=params,
            model_state=model_state,
            aux=aux,
            result=mask_result(lost, RESULTS.inner_nonfinite),
            num_steps=jnp.zeros((), int),
            losses=None,
            failed_step=jnp.where(lost, 0, -1),
        )
