"""The linear system of an implicit derivative, as a value."""

import dataclasses
import functools as ft
from typing import Any

import equinox as eqx
import jax
import lineax as lx

from .._core._results import first_failure, RESULTS
from .._core._tree import (
    split_trainable,
    tree_entangled,
    tree_structs,
    tree_sub,
    tree_widened,
)
from .._core._types import (
    Batch,
    FloatScalar,
    Hyper,
    IntScalar,
    Key,
    ModelState,
    Params,
    Vector,
)
from .._core._validate import (
    canonical_arrays,
    canonical_hyper,
    canonical_key,
    canonical_params,
    check_kind,
)
from .._data import as_data
from .._jaxpr._detach import stop_gradient
from .._jaxpr._linearise import linear_solve
from .._linear import (
    AbstractLinearSolver,
    CG,
    LinearSolution,
    prepare,
    transposed as transposed_solver,
)
from .._problem import AbstractProblem
from .._solver import Optimality, problem_optimality
from ._checked_solve import checked_solve
from ._condition import widened_condition
from ._curvature import AbstractCurvature, ExactCurvature
from ._inner_error import InnerError, judge_inner
from ._operators import cross_pullback, newton_length
from ._second_derivative import without_second_derivative
from ._vectors import like


class ImplicitSystem(eqx.Module):
    r"""The linear system of the implicit function theorem at one inner solution.

    With the optimality $g(params, hyper) = 0$ of the inner problem, its Jacobian
    $A = \partial_{params}\, g$ and $C = \partial_{hyper}\, g$, the inner solution
    responds to a change $v$ of `hyper` by $-A^{-1} C v$, and a cotangent $b$ of the
    solution becomes the cotangent $-C^T A^{-T} b$ of `hyper`. Use it for derivatives of a
    solution that are no hypergradient: influence functions, several right-hand sides, a
    check. For a hypergradient with its error estimate use [`metaopt.ImplicitAdjoint`][].

    Build one with `at`, choose a linear solver with `prepare`, then `solve`. It is a
    pytree, so that `equinox.filter_jit` and `equinox.filter_vmap` accept and return it.
    Its vectors are pytrees with the floating-point arrays of `params` or of `hyper`, and
    `None` in the place of every other leaf. For params of half precision the system is in
    float32 if the problem allows that.

    **Attributes:**

    - `params`, `hyper`: the point, as vectors.
    - `residual`: $g$ at the point, a vector like `params`.
    - `operator`: the `lineax` operator that systems are solved with: $A$, or the
        approximation of it that `curvature` stands for. It holds no matrix.
    - `jacobian`: $A$ itself, for residuals.
    - `condition`: the optimality as a function, and the structure promised of $A$.
    - `curvature`: as for [`metaopt.ImplicitAdjoint`][].
    - `linear_solver`: ready for `operator`; `CG()` before `prepare`.
    - `preconditioner_state`: the state of its preconditioner, from which `prepare` goes on
        at a later point; `None` without one.
    - `num_products`: the products that `prepare` took.
    """

    condition: Optimality
    curvature: AbstractCurvature
    params: Vector
    hyper: Vector
    residual: Vector
    operator: lx.AbstractLinearOperator
    jacobian: lx.AbstractLinearOperator
    linear_solver: AbstractLinearSolver = CG()
    preconditioner_state: Any = None
    num_products: IntScalar | int = 0

    @classmethod
    def at(
        cls,
        problem: AbstractProblem,
        hyper: Hyper,
        params: Params,
        batch: Batch,
        *,
        key: Key | None = None,
        model_state: ModelState = None,
        curvature: AbstractCurvature = ExactCurvature(),
    ) -> "ImplicitSystem":
        """Linearise the optimality of an inner problem.

        **Arguments:**

        - `problem`: the inner problem, of any kind.
        - `hyper`, `params`: the point, which should be an inner solution: `judge` says
            whether it is.
        - `batch`: all of the data of the inner problem: arrays, or a source of batches.
        - `key`: for a loss that takes one: one draw of its randomness.
        - `model_state`: the model state at the solution, held constant.
        - `curvature`: [`metaopt.linear.ExactCurvature`][] or
            [`metaopt.linear.GaussNewton`][].

        **Returns:**

        An `ImplicitSystem`, to be solved with `CG()` until `prepare` chooses another.

        **Raises:**

        `ValueError` or `TypeError` for arguments that do not fit, by name.
        """
        check_kind(problem, AbstractProblem, "problem", "metaopt.InnerProblem(loss)")
        check_kind(
            curvature, AbstractCurvature, "curvature", "metaopt.linear.ExactCurvature()"
        )
        hyper, params = canonical_hyper(hyper), canonical_params(params)
        batch = as_data(canonical_arrays(batch, "batch"), "batch").full()
        key = canonical_key(key)
        model_state = stop_gradient(model_state)

        def optimality(widen: bool) -> Optimality:
            data = (batch, model_state)
            rows, state = tree_widened(data) if widen else data
            return problem_optimality(problem, params, hyper, rows, key, state)

        condition, point = widened_condition(optimality, params, hyper)
        return cls.linearised(condition, point, split_trainable(hyper)[0], curvature)

    @classmethod
    def linearised(
        cls,
        condition: Optimality,
        params: Vector,
        hyper: Vector,
        curvature: AbstractCurvature,
    ) -> "ImplicitSystem":
        """Linearise an optimality that is given as a function of two vectors, at these."""
        found = curvature.linearise(condition, params, hyper)
        return cls(condition, curvature, params, hyper, *found)

    def prepare(
        self,
        linear_solver: AbstractLinearSolver,
        state: Any = None,
        *,
        key: Key | None = None,
        solver_state: Any = None,
    ) -> "ImplicitSystem":
        """Choose the linear solver, and make its preconditioner for this system.

        **Arguments:**

        - `linear_solver`: any linear solver.
        - `state`: the `preconditioner_state` of a system nearby, to go on from.
        - `key`: for random probes of a preconditioner; by default key 0.
        - `solver_state`: the state of the inner solver at the solution, for
            [`metaopt.linear.SHINE`][] and [`metaopt.linear.SecondMoment`][].

        **Returns:**

        The same system with that solver.

        **Raises:**

        `ValueError` where the Jacobian does not promise the structure that the solver
        needs.
        """
        check_kind(linear_solver, AbstractLinearSolver, "linear_solver", "metaopt.CG()")
        linear_solver.check(self.operator)
        ready, state, num_products = prepare(
            linear_solver, self.operator, state, key, solver_state
        )
        return dataclasses.replace(
            self,
            linear_solver=ready,
            preconditioner_state=stop_gradient(state),
            num_products=num_products,
        )

    @property
    def left_out(self) -> tuple[str, ...]:
        """A description of the terms that a solution leaves out by request."""
        return (*self.curvature.left_out, *self.linear_solver.left_out)

    @property
    def is_symmetric(self) -> bool:
        """Whether the Jacobian promises to be symmetric."""
        return lx.symmetric_tag in self.condition.tags

    def solve(
        self,
        vector: Vector,
        *,
        transposed: bool = False,
        start: Vector | None = None,
        tolerance: FloatScalar | None = None,
    ) -> LinearSolution:
        """Solve $A x = b$ or $A^T x = b$.

        The solution can be differentiated, unless something is left out by request. A
        loss that promises a minimum fails by name where negative curvature acts on the
        solution, whatever the linear solver looks at.

        **Arguments:**

        - `vector`: the right-hand side $b$, a vector like `params`.
        - `transposed`: whether to solve with the transpose.
        - `start`: a first guess of the solution; zeros by default.
        - `tolerance`: a relative tolerance that suffices where it is more than the
            solver's own, as an array.

        **Returns:**

        A [`metaopt.linear.LinearSolution`][]. It never raises because of the numbers:
        `result` says how it went, and `judge` adds whether `params` is a solution.

        **Raises:**

        `ValueError` where `vector` or `start` has another structure than `params`.
        """
        vector = tree_entangled(self._like_params(vector, "vector"))
        if start is not None:
            start = self._like_params(start, "start")
        start, tolerance = stop_gradient((start, tolerance))

        def solve(solver, product, vector):
            operator = lx.FunctionLinearOperator(
                product, tree_structs(vector), self.condition.tags
            )
            solution = checked_solve(solver, operator, vector, start, tolerance)
            return solution.value, eqx.tree_at(lambda s: s.value, solution, None)

        solvers = self.linear_solver, transposed_solver(self.linear_solver)
        first, second = reversed(solvers) if transposed else solvers
        value, rest = linear_solve(
            self._oriented(self.operator, transposed).mv,
            vector,
            ft.partial(solve, first),
            transpose_solve=ft.partial(solve, second),
            symmetric=self.is_symmetric,
            has_aux=True,
        )
        value = without_second_derivative(self.left_out, value)
        return eqx.tree_at(lambda s: s.value, rest, value, is_leaf=lambda x: x is None)

    def solve_many(
        self, vectors: Vector, *, transposed: bool = False, batch_size: int | None = None
    ) -> LinearSolution:
        """Solve for many right-hand sides at once.

        **Arguments:**

        - `vectors`: the right-hand sides: a vector like `params` whose every leaf has one
            more axis in front, `(num_vectors, ...)`. One right-hand side goes to `solve`:
            the number of axes is never guessed.
        - `transposed`: whether to solve with the transpose.
        - `batch_size`: how many are solved together, which bounds the memory; by default
            all. Each batch takes as many steps as its slowest member.

        **Returns:**

        A [`metaopt.linear.LinearSolution`][], each of whose arrays has that axis in front.

        **Raises:**

        `ValueError` where a leaf does not have the shape of its counterpart with one axis
        in front.
        """
        solve = ft.partial(self.solve, transposed=transposed)
        vectors = self._like_params(vectors, "vectors", axes=1)
        if batch_size is None:
            return jax.vmap(solve)(vectors)
        return jax.lax.map(solve, vectors, batch_size=batch_size)

    def remaining(
        self, solution: Vector, vector: Vector, *, transposed: bool = False
    ) -> Vector:
        """Compute the residual $b - A x$ of a linear solution in the exact system.

        In a system that leaves curvature out the residual is small however much that was.

        **Arguments:**

        - `solution`, `vector`: $x$ and $b$, vectors like `params`.
        - `transposed`: whether the system is the transposed one.

        **Returns:**

        A vector like `params`.
        """
        solution = self._like_params(solution, "solution")
        vector = self._like_params(vector, "vector")
        return tree_sub(vector, self._oriented(self.jacobian, transposed).mv(solution))

    def cross(self, direction: Vector) -> Vector:
        """Differentiate the optimality along a direction in `hyper`: $C v$.

        **Arguments:**

        - `direction`: $v$, a vector like `hyper`.

        **Returns:**

        A vector like `params`.
        """
        direction = like(direction, self.hyper, "direction", "hyper")
        along = lambda hyper: self.condition(self.params, hyper)
        return jax.jvp(along, (self.hyper,), (direction,))[1]

    def cross_transposed(self, vector: Vector) -> Vector:
        """Multiply by the transposed derivative of the optimality in `hyper`: $C^T w$.

        **Arguments:**

        - `vector`: $w$, a vector like `params`.

        **Returns:**

        A vector like `hyper`.
        """
        along = lambda hyper: self.condition(self.params, hyper)
        return cross_pullback(along, self.hyper, self._like_params(vector, "vector"))

    def distance(self) -> FloatScalar:
        """Estimate the distance from `params` to the inner solution, from below.

        It is the length of the Newton step $A^{-1} g$, from one product: $|g|^2 / |A g|$.

        **Returns:**

        A scalar.
        """
        return newton_length(self.residual, self.jacobian)

    def judge(
        self,
        solution: LinearSolution,
        vector: Vector,
        *,
        inner_rtol: float,
        tolerance: FloatScalar | None = None,
        start: Params | None = None,
    ) -> tuple[RESULTS, FloatScalar]:
        """Judge a solution of the linear system together with the inner solution.

        **Arguments:**

        - `solution`: what `solve` returned.
        - `vector`: its right-hand side.
        - `inner_rtol`: the largest relative error of `params` that is accepted;
            `jax.numpy.inf` accepts any.
        - `tolerance`: a relative error that suffices where it is more, as an array.
        - `start`: where the inner solve began. A thousandth of the way from there counts
            as the size of params that are near zero.

        **Returns:**

        The first failure, that of the inner solution before that of the linear solve; and
        the relative error of `params`, estimated from below.
        """
        vector = self._like_params(vector, "vector")
        inner_error = InnerError.at(self.residual, self.distance(), self.params, start)
        error = inner_error.relative(solution.value, vector)
        inner = judge_inner(error, inner_rtol, tolerance)
        return first_failure(inner, solution.result), error

    def _oriented(
        self, operator: lx.AbstractLinearOperator, transposed: bool
    ) -> lx.AbstractLinearOperator:
        return operator.transpose() if transposed and not self.is_symmetric else operator

    def _like_params(self, vector: Vector, name: str, axes: int = 0) -> Vector:
        return like(vector, self.params, name, "params", axes)
