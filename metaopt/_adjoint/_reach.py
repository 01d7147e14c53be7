"""The reach of an adjoint, and errors about derivatives that lie beyond it."""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax

from .._core._tree import leaf_names, split_trainable
from .._core._types import Hyper, PyTree
from .._jaxpr._dependence import influences
from .._jaxpr._detach import forbid_derivative, stop_gradient, unknown_derivative
from .._promises import no_derivative_message
from .._solver import Outcome


class AbstractReach(eqx.Module):
    """The ways from `hyper` to an inner solution that an adjoint differentiates.

    Each reach decides which derivatives are zero by construction, and raises the errors
    about them. Adjoints are named by their class in these errors.
    """

    @property
    @abc.abstractmethod
    def earlier_path(self) -> tuple[str, ...]:
        """The bias of a solve that starts where an earlier one ended, in words."""

    @abc.abstractmethod
    def zero_message(self, names: Sequence[str], adjoint: str, root: str = "hyper") -> str:
        """The text of the error about leaves whose derivative is zero by construction.

        **Arguments:**

        - `names`: the leaves.
        - `adjoint`: the name of the adjoint.
        - `root`: the name of the outer variables; a layer has another one.
        """

    @abc.abstractmethod
    def check_solution(self, unreached: Callable[[], Sequence[str]], adjoint: str) -> None:
        """Check the derivative by way of the inner solution alone.

        The outer loss may read a leaf as well, and its direct derivative would hide that
        the other one is missing.

        **Arguments:**

        - `unreached`: returns the names of the leaves that influence the inner solution
            and whose derivative by way of it is zero by construction.
        - `adjoint`: the name of the adjoint.

        **Raises:**

        `ValueError` where such a derivative would be taken for right.
        """

    @abc.abstractmethod
    def check_path(self, message: str) -> None:
        """Check that the path from the start to the solution is differentiated.

        **Arguments:**

        - `message`: the text of the error.

        **Raises:**

        `ValueError` where it is not.
        """

    @abc.abstractmethod
    def held_start(self, start: PyTree) -> PyTree:
        """The start of a solve, held constant where its derivative is out of reach.

        **Arguments:**

        - `start`: a pytree.
        """

    @abc.abstractmethod
    def guarded_start(self, start: PyTree, adjoint: str) -> PyTree:
        """The start of a solve, with an error where its derivative is out of reach.

        **Arguments:**

        - `start`: a pytree.
        - `adjoint`: the name of the adjoint.
        """

    @abc.abstractmethod
    def guarded(
        self,
        solve: Callable[[Hyper], Outcome],
        hyper: Hyper,
        *,
        adjoint: str,
        root: str,
        throw: bool,
    ) -> Outcome:
        """`solve(hyper)`, with an error where a derivative is out of reach.

        For derivatives that JAX takes later on, when no report can be given.

        **Arguments:**

        - `solve`: a differentiable solve.
        - `hyper`: the outer variables.
        - `adjoint`: the name of the adjoint.
        - `root`: the name of the outer variables.
        - `throw`: whether a derivative that is not known raises; otherwise it is NaN.
        """


class AbstractPathReach(AbstractReach):
    """The reach of an adjoint that differentiates the path from the start."""

    @property
    def earlier_path(self):
        return ("the path in earlier outer steps",)

    def check_path(self, message):
        del message

    def held_start(self, start):
        return start

    def guarded_start(self, start, adjoint):
        return start

    def guarded(self, solve, hyper, *, adjoint, root, throw):
        return solve(hyper)


class AlongPath(AbstractPathReach):
    """Everything that acts on the steps: the inner loss, the settings of the solver, the
    initial params."""

    def zero_message(self, names, adjoint, root="hyper"):
        return no_derivative_message(names)

    def check_solution(self, unreached, adjoint):
        _raise_for(self, unreached(), adjoint)


class InnerGradientsHeld(AbstractPathReach):
    """The steps with the gradients of the inner loss held constant: the settings of the
    solver and the initial params.

    A leaf that acts through the inner loss alone is out of reach. One that the outer loss
    reads as well has the direct part of its derivative.
    """

    def zero_message(self, names, adjoint, root="hyper"):
        return (
            f"The derivative with respect to {', '.join(names)} is zero by construction "
            f"under `{adjoint}`: it acts through the gradients of the inner loss, which "
            "are held constant. Use `metaopt.UnrolledAdjoint()`."
        )

    def check_solution(self, unreached, adjoint):
        del unreached


class AtSolution(AbstractReach):
    """The inner loss alone, which acts on the solution itself or on the last steps.

    The initial params are out of reach, and so is all else that an outcome holds: model
    state, auxiliary outputs, losses and the state of the solver satisfy no condition.
    """

    @property
    def earlier_path(self):
        return ()

    def zero_message(self, names, adjoint, root="hyper"):
        listed = ", ".join(names)
        if root != "hyper":
            return (
                f"The derivative with respect to {listed} is zero by construction under "
                f"`{adjoint}`: it acts on the fixed point only through operations that "
                "have no derivative (rounding, comparisons, `argmax`), or that this "
                "adjoint does not see. Use a smooth operation in their place, or hold it "
                "constant in the cell with `jax.lax.stop_gradient`."
            )
        return (
            f"The derivative with respect to {listed} is zero by construction under "
            f"`{adjoint}`: it acts on the inner solution only through what this adjoint "
            "does not see (the inner solver's settings, the initial params, an operation "
            "with no derivative). Use `metaopt.UnrolledAdjoint()` or "
            "`metaopt.ForwardAdjoint()`, let it enter the inner loss, or hold it constant "
            "there with `jax.lax.stop_gradient`."
        )

    def check_solution(self, unreached, adjoint):
        _raise_for(self, unreached(), adjoint)

    def check_path(self, message):
        raise ValueError(message)

    def held_start(self, start):
        return stop_gradient(start)

    def guarded_start(self, start, adjoint):
        return forbid_derivative(start, _START_MESSAGE.format(adjoint=adjoint))

    def guarded(self, solve, hyper, *, adjoint, root, throw):
        """Raise at leaves of `hyper` and at arrays that `solve` closes over that act on
        the solution out of reach; and for the rest of an outcome where its derivative is
        asked for."""
        solve = eqx.filter_closure_convert(solve, hyper)
        trainable, static = split_trainable((solve, hyper))

        def outputs(trainable):
            solve, hyper = eqx.combine(trainable, static)
            outcome = solve(hyper)
            return eqx.filter((outcome.params, _unsolved(outcome)), eqx.is_inexact_array)

        seen = influences(lambda t: jax.jvp(outputs, (trainable,), (t,))[1], trainable)
        matters = influences(outputs, trainable)
        # The params are the first of the outputs.
        count = len(jax.tree.leaves(jax.eval_shape(outputs, trainable)[0]))
        leaves, structure = jax.tree.flatten(trainable)
        leaves = [
            forbid_derivative(leaf, self.zero_message([name], adjoint, root))
            if any(some[:count]) and not any(known[:count])
            else leaf
            for leaf, name, some, known in zip(
                leaves, _names(leaves, hyper, root), matters, seen, strict=True
            )
        ]
        solve, hyper = eqx.combine(jax.tree.unflatten(structure, leaves), static)
        outcome = solve(hyper)
        hidden = [
            [some and not known for some, known in zip(*rows, strict=True)]
            for rows in zip(matters, seen, strict=True)
        ]
        hides = [
            [leaf for leaf, row in zip(leaves, hidden, strict=True) if row[index]]
            for index in range(count, len(hidden[0]))
        ]
        return _with_unknown_derivatives(adjoint, outcome, hides, throw)


def _raise_for(reach: AbstractReach, names: Sequence[str], adjoint: str) -> None:
    if names:
        raise ValueError(reach.zero_message(names, adjoint))


def _with_unknown_derivatives(
    adjoint: str, outcome: Outcome, hides: list[list[Any]], throw: bool
) -> Outcome:
    """The outcome, whose outputs beside the params have no known derivative in the leaves
    `hides`, a list for each output."""
    dynamic, static = eqx.partition(_unsolved(outcome), eqx.is_inexact_array)
    values, structure = jax.tree.flatten(dynamic)
    message = _UNKNOWN_MESSAGE.format(adjoint=adjoint)
    values = [
        unknown_derivative(value, leaves, message=message, throw=throw)
        for value, leaves in zip(values, hides, strict=True)
    ]
    unsolved = eqx.combine(jax.tree.unflatten(structure, values), static)
    return eqx.tree_at(_unsolved, outcome, unsolved, is_leaf=lambda x: x is None)


def _unsolved(outcome: Outcome) -> tuple[Any, Any, Any, Any]:
    """The parts of an outcome that satisfy no condition."""
    return outcome.model_state, outcome.aux, outcome.losses, outcome.solver_state


def _names(leaves: Sequence[Any], hyper: Hyper, root: str) -> list[str]:
    """Names for the leaves of a function and of `hyper`, the arguments of a solve."""
    names = [f"`{name}`" for name in leaf_names(split_trainable(hyper)[0], root)]
    closed_over = leaves[: len(leaves) - len(names)]
    return [f"a closed-over array of shape {a.shape}" for a in closed_over] + names


_UNKNOWN_MESSAGE = (
    "The model state, auxiliary outputs, losses and solver state of an inner solution have "
    "no derivative under `{adjoint}`, which sees the solution alone. Compute what you need "
    "from `solution.value`, or use `metaopt.UnrolledAdjoint()`."
)
_START_MESSAGE = (
    "The derivative with respect to the initial params is zero by construction under "
    "`{adjoint}`, which does not see where the inner solver started. Use "
    "`metaopt.UnrolledAdjoint()`, or tie the solution to the initial params by a proximal "
    "term in the inner loss and pass `jax.lax.stop_gradient(params)` as the start."
)
