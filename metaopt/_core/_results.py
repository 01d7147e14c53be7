"""Result codes with their texts. Data only."""

from typing import Any

import jax.numpy as jnp
import optimistix as optx


class _Void(str):
    """The text of a result that leaves no hypergradient, not even a rough one."""


class RESULTS(optx.RESULTS):  # pyright: ignore[reportGeneralTypeIssues]
    """The result codes of solves.

    Extends `optimistix.RESULTS`, so that the codes of every solver underneath pass
    through unchanged. `RESULTS[result]` is the text of a code, which names the cause
    and the remedy, and that of `successful` says so.
    """

    # -- the inner problem
    inner_max_steps = (
        "The inner solver reached its step limit before its tolerance was met. Raise "
        "its number of steps, loosen its tolerance (for a fixed point near zero give an "
        "`atol`), or start it closer to the solution."
    )
    inner_nonfinite = _Void(
        "The inner loss or its gradient (for a fixed point or an equilibrium layer, the "
        "step or the cell) became infinite or NaN (`stats` and the report say at which "
        "step). At step 0 look for NaN in the data, the params or the outer variables, "
        "for a layer in its input and its weights (a step of an optimizer that is too long "
        "can overflow them), and for integer labels beyond the number of outputs, which "
        "give NaN; later, look for the same in the batch of that step, lower the learning "
        "rate, or look for an operation whose gradient is infinite there (`sqrt` at 0, "
        "`log` at 0): guard its argument with `jnp.where` on the inside as well."
    )
    inner_diverged = _Void(
        "The inner solver diverged: its iterates grew until they were no longer finite. "
        "Lower its learning rate, clip its gradients, or use a solver with a line search. "
        "The map of a fixed point may be no contraction: bound its norm, or use "
        "`metaopt.Anderson`, which can converge all the same."
    )
    inner_stagnation = (
        "The residual of the fixed point stopped falling before the tolerance was met; the "
        "best iterate is returned. Either the map has no fixed point that this solver can "
        "reach (its Jacobian has grown: bound its norm, add a penalty on it, or lower "
        "`relaxation`), or the tolerance is finer than rounding allows: loosen `rtol`, or "
        "use float64."
    )
    inner_not_converged = (
        "The inner problem was not solved accurately enough for implicit differentiation, "
        "which is only right at a solution: the estimated error of the hypergradient (or, "
        "without that estimate, of the inner solution) is larger than the adjoint's "
        "`rtol` allows. Give the inner solver more steps or a better rate (with "
        "minibatches or dropout, one that decays to zero), use `UnrolledAdjoint` (or "
        "`ReversibleAdjoint`, for a solver whose steps it can undo), which is right at "
        "any point, or accept a larger error by name with `ImplicitAdjoint(rtol=...)`, or "
        "of the inner solution with `inner_rtol=...`: of about 0.02 for params in "
        "bfloat16, which cannot be more accurate. Near an outer optimum the hypergradient "
        "is small, and its error is not: `solve_bilevel` compares it with the largest "
        "hypergradient of its run."
    )
    inner_out_of_range = _Void(
        "A parameter, a velocity or a gradient of `ReversibleSGD` left the range of its "
        "fixed-point numbers (256 in float32, by default; the report says at which "
        "step). Most often the run diverges: lower `learning_rate` or `momentum`. If the "
        "numbers are meant to be that large, scale the loss or the params down, or give "
        "`fraction_bits` below 22, each of which doubles the range."
    )
    inner_momentum = _Void(
        "A momentum of `ReversibleSGD` left `[min_momentum, 1)`, for which memory was set "
        "aside. Lower `min_momentum`, or keep the momentum in its range, for instance as "
        "`0.5 + 0.49 * jax.nn.sigmoid(hyper)`."
    )
    inner_not_reversed = _Void(
        "The steps of `ReversibleSGD` were undone and did not end where they began, so "
        "the hypergradient is wrong. The gradient of the inner loss was not the same to "
        "the last bit in both directions: remove what is random outside of `key` or "
        "depends on the order of operations, such as sums by atomic operations on a GPU "
        "(`XLA_FLAGS=--xla_gpu_deterministic_ops=true`), or use `UnrolledAdjoint`."
    )
    inner_drifted = _Void(
        "The steps of `ReversiblePicard` were undone and ended too far from where they "
        "began, so the derivative is not that of the steps taken. Each step that is undone "
        "magnifies rounding by `1 / (1 - relaxation)` or more. Use float64, fewer steps or "
        "a lower `relaxation`, or `UnrolledAdjoint`, which undoes nothing; or accept a "
        "larger drift by name with `ReversibleAdjoint(max_drift=...)`."
    )
    curvature_contradicted = (
        "The `curvature` that `StrongConvexity` was given is not positive, or the linear "
        "solver met a smaller one, so its bound does not hold. Give a smaller `curvature` "
        "above zero (to `metaopt.accuracy.logistic_bound` and its like the penalty itself, "
        "and not "
        "its logarithm), or use `metaopt.accuracy.DualWeighted()`, which needs none."
    )
    # -- the linear system of implicit differentiation
    linear_max_steps = (
        "The linear solver reached its step limit before its tolerance was met, so the "
        "hypergradient is not accurate. Raise `max_steps`, loosen `rtol`, or set "
        "`rtol=None` to ask for a fixed number of steps by name."
    )
    linear_inaccurate = (
        "The linear system was solved to a small residual, and the estimated error of the "
        "hypergradient is still larger than the adjoint's `rtol` allows: the system is "
        "ill-conditioned, or, for a bound in float32, what rounding can do at worst is "
        "larger. Lower the `rtol` of the linear solver, give it a `preconditioner` or more "
        "steps, use float64, estimate the error with `metaopt.accuracy.DualWeighted()` in "
        "place of "
        "a bound, add regularisation to the inner problem, or accept a larger error by "
        "name with `ImplicitAdjoint(rtol=...)`."
    )
    linear_indefinite = _Void(
        "The linear solver met a direction of zero or negative curvature: the inner "
        "Hessian is not positive definite where the inner solver stopped (a saddle, a "
        "flat direction, or a point short of the minimum). Solve the inner problem "
        "further, add regularisation or `damping`, or use `UnrolledAdjoint`. For the "
        "derivative of a stationary point that is no minimum, ask by name: "
        "`ImplicitAdjoint(MINRES())`."
    )
    linear_preconditioner = _Void(
        "The `preconditioner` of the linear solver is not positive definite. Make it an "
        "approximation of the inverse Hessian with positive eigenvalues only (estimated "
        "diagonals can have negative entries: take absolute values), or leave it out."
    )
    linear_stagnation = (
        "The linear solver stopped improving before its tolerance was met: the accuracy "
        "asked for is finer than the precision of the numbers allows, or the system is "
        "singular (the report's linear residual is then large). Loosen `rtol`, use "
        "float64, or add regularisation to the inner problem."
    )
    linear_diverged = _Void(
        "The linear solver's residual grew instead of shrinking. For `Neumann` lower "
        "`scale` below 2 over the largest eigenvalue, or use `CG` or `GMRES`."
    )
    linear_nonfinite = _Void(
        "The linear system of the implicit hypergradient is singular or holds infinite "
        "or NaN values. Add regularisation or `damping`, or use `UnrolledAdjoint`."
    )
    extra_nonfinite = _Void(
        "The variables that a single-loop method keeps beside the params (`extra`, such as "
        "the solution of a linear system) became infinite or NaN although the params are "
        "finite. Lower the step size of the method for them, or add regularisation to the "
        "inner problem."
    )
    # -- the outer problem
    outer_nonfinite = _Void(
        "The outer loss is infinite or NaN although the inner solution is finite. Look "
        "for NaN in the outer data, for integer labels beyond the number of outputs, which "
        "give NaN, or for an overflow in the outer loss."
    )
    hypergradient_nonfinite = _Void(
        "The hypergradient is infinite or NaN although the losses are finite. Long "
        "unrolled runs can explode (lower the inner learning rate, use fewer steps, or "
        "`TruncatedAdjoint`); otherwise look for an operation whose derivative is "
        "infinite at the values met."
    )
    outer_step_nonfinite = (
        "The outer optimizer overflowed: the hypergradient is finite, and so large that "
        "the step or the state of the optimizer is not. Adam keeps squares, which are "
        "infinite in float32 from 1.8e19 on, and would not move `hyper` any more. The step "
        "is not taken. Start where the inner solver is stable, lower its learning rate, or "
        "clip: `optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01))`."
    )
    outer_max_steps = (
        "The outer loop reached `num_steps` before the tolerance on the norm of the "
        "hypergradient was met. Raise `num_steps` or loosen the tolerance."
    )
    outer_data_exhausted = (
        "An iterator over batches (`train` or `valid`; `tasks` in few-shot learning) ended "
        "before `num_steps` steps were taken. Give one that goes on, such as "
        "`itertools.cycle(batches)`, or lower `num_steps`. What had been reached is "
        "returned."
    )
    all_tasks_failed = (
        "Every task of the batch failed, so that there is nothing to learn from. "
        "`stats.results` has the reason of each (under `train`, `history.reason`). Where "
        "they diverged or are not finite: lower the inner learning rate, and look for NaN "
        "in the tasks and for labels beyond what the model names. Where the inner problem "
        "was not solved: take more inner steps."
    )
    interrupted = (
        "The run was interrupted from the keyboard. What had been reached is returned."
    )
    path_exploded = (
        "The derivative explodes along the path of the inner solver: rounding the params "
        "once, at one of its steps, changes the outer loss by more than a thousandth of it "
        "or of its change over the path (the report's `rounding_effect` and `growth`). The "
        "hypergradient is exact for the numbers computed and predicts no change of `hyper` "
        "that is larger than rounding. "
        "Take fewer inner steps, lower the inner learning rate or momentum, truncate the "
        "path with `metaopt.TruncatedAdjoint`, or smooth the inner loss (other "
        "activations than `relu`, normalisation)."
    )


_SUCCESS: Any = RESULTS.successful
# Its text is empty in optimistix, and `print(solution.result)` would show no word.
RESULTS._index_to_message[int(_SUCCESS._value)] = "Successful."


class SolveError(RuntimeError):
    """A numerical failure, raised once at the outermost call.

    **Attributes:**

    - `value`: everything that had been computed: the same object that the call returns
        under `throw=False`.
    """

    def __init__(self, message: str, value: Any):
        RuntimeError.__init__(self, message)
        self.value = value


def voids_hypergradient(result: Any) -> Any:
    """Whether a result leaves no hypergradient, not even a rough one."""
    void = [isinstance(text, _Void) for text in RESULTS._index_to_message]  # pyright: ignore
    return jnp.asarray(void)[result._value]


def where_result(condition: Any, x: Any, y: Any) -> Any:
    """`x` where `condition` holds, else `y`, for two results.

    `RESULTS.where`, whose types no type checker follows through the subclassing.
    """
    return RESULTS.where(condition, x, y)


def first_failure(*results: Any) -> Any:
    """The first of several results that is not `successful`."""
    out: Any = RESULTS.successful
    for result in reversed(results):
        out = where_result(result == RESULTS.successful, out, result)
    return out


def mask_result(condition: Any, result: Any) -> Any:
    """`result` where `condition` holds, else `successful`."""
    return where_result(condition, result, RESULTS.successful)
