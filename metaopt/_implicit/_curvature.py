"""Operators for the Jacobian of the optimality in a linear solve."""

import abc
from typing import ClassVar, TYPE_CHECKING

import equinox as eqx
import lineax as lx

from .._core._tree import tree_structs
from .._core._types import Vector
from .._linear import AbstractLinearSolver, CG, MINRES
from .._solver import Optimality
from ._operators import gauss_newton_operator, jacobian_operator, jacobian_product


if TYPE_CHECKING:
    # As Equinox advises: pyright knows `ClassVar` by this name only.
    from typing import ClassVar as AbstractClassVar
else:
    from equinox import AbstractClassVar


class AbstractCurvature(eqx.Module):
    """An operator for the Jacobian of the optimality in a linear solve."""

    is_exact: AbstractClassVar[bool]
    """Whether it is that Jacobian."""

    @property
    @abc.abstractmethod
    def left_out(self) -> tuple[str, ...]:
        """A description of the terms that the operator leaves out."""

    @abc.abstractmethod
    def stationary_solver(self, rtol: float) -> AbstractLinearSolver:
        """A linear solver for the symmetric system at a stationary point, which may be a
        saddle.

        **Arguments:**

        - `rtol`: the relative residual to solve to.
        """

    @abc.abstractmethod
    def linearise(
        self, condition: Optimality, params: Vector, hyper: Vector
    ) -> tuple[Vector, lx.AbstractLinearOperator, lx.AbstractLinearOperator]:
        """The optimality at one point, and its Jacobian in `params`.

        **Arguments:**

        - `condition`: the optimality.
        - `params`, `hyper`: the point, trainable parts.

        **Returns:**

        The exact residual; the operator to solve with; and the exact Jacobian, for the
        few products by which an answer is judged.

        **Raises:**

        `ValueError` where the optimality does not have what it takes.
        """


class ExactCurvature(AbstractCurvature):
    """The Jacobian of the optimality itself: for a loss to minimise, its Hessian.

    It is linearised once, so that a product costs 1.9 gradients.
    """

    is_exact: ClassVar[bool] = True

    @property
    def left_out(self):
        return ()

    def stationary_solver(self, rtol):
        # The Hessian can be indefinite there.
        return MINRES(rtol=rtol)

    def linearise(self, condition, params, hyper):
        of_params = lambda params: condition(params, hyper)
        residual, operator = jacobian_operator(of_params, params, condition.tags)
        return residual, operator, operator


class GaussNewton(AbstractCurvature):
    r"""The Hessian that a loss would have if its model were linear in the params.

    For a loss $c(f(params), params)$, the criterion $c$ of what the model $f$ predicts,
    it is the Hessian of $c(f(p_0) + J (p - p_0), p)$ with $J = f'(p_0)$. It leaves out
    how the model curves. A product costs 1.3 gradients instead of 1.9 for a deep
    network, and takes less memory. It is positive semidefinite wherever the criterion is
    convex, so that [`metaopt.CG`][] does not fail where a network's Hessian has negative
    eigenvalues.

    It is exact for models that are linear in their params, and almost so where the
    criterion's slope in the predictions is small: where the model fits its data. Do not
    use it where a criterion is not convex, or where the fit is poor and the
    hypergradient has to be exact. The report names what it leaves out, and
    `ImplicitAdjoint(curvature=GaussNewton(), error=DualWeighted())` estimates what that
    costs. The residual, the mixed derivative and everything by which an answer is judged
    are exact. Newton steps become Gauss-Newton steps.

    The inner problem must be an [`metaopt.extend.AbstractPredictionProblem`][], and the
    solver one whose answer satisfies the optimality of the problem.

    ??? cite "Source"

        Schraudolph: *Fast curvature matrix-vector products for second-order gradient
        descent*, 2002.
    """

    is_exact: ClassVar[bool] = False

    @property
    def left_out(self):
        return ("the curvature of the model",)

    def stationary_solver(self, rtol):
        return CG(rtol=rtol)

    def linearise(self, condition, params, hyper):
        composition = condition.composition
        if composition is None:
            raise ValueError(
                "`GaussNewton` needs a loss that is a criterion of a model's output. Make "
                "the inner problem a `metaopt.PredictionProblem(predict_fn, criterion_fn)`"
                " or a subclass of `metaopt.extend.AbstractPredictionProblem`, with a "
                "solver that states no optimality of its own, such as `metaopt.Descent` or "
                "`metaopt.OptimistixSolver`; or use "
                "`curvature=metaopt.linear.ExactCurvature()`."
            )
        of_params = lambda params: condition(params, hyper)
        operator = gauss_newton_operator(
            lambda params: composition.predict(params, hyper),
            lambda predictions, params: composition.criterion(predictions, params, hyper),
            params,
            condition.tags,
        )
        # Not linearised: that would keep the activations for no more than a few products.
        jacobian = lx.FunctionLinearOperator(
            lambda vector: jacobian_product(of_params, params, vector),
            tree_structs(params),
            condition.tags,
        )
        return of_params(params), operator, jacobian
