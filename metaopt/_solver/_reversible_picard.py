"""Picard iteration of two coupled iterates, whose steps can be undone."""

import equinox as eqx

from .._core._tree import split_trainable
from .._core._types import IntScalar, Vector
from .._core._validate import check_tolerance
from .._problem import AbstractStatePolicy
from ._base import AbstractMixingSolver
from ._examples import Examples
from ._fixed_point import AbstractFixedPointSolver, as_budget, Begun
from ._reversible import AbstractReversibleSolver, CoupledRun, Coupling


class ReversiblePicard(
    AbstractFixedPointSolver, AbstractMixingSolver, AbstractReversibleSolver
):
    r"""Solves a fixed-point problem by relaxed Picard iteration of two iterates, each of
    which moves towards the map of the other, so that every step can be undone.

    With $\beta$ the `relaxation` and $y_0 = z_0$ the initial params,

    $$
    y' = (1 - \beta)\, y + \beta\, step(z), \qquad
    z' = (1 - \beta)\, z + \beta\, step(y') ,
    $$

    and $z$ is the answer. With [`metaopt.ReversibleAdjoint`][] it gives the derivative of
    the steps taken, with the memory of one of them: exact whether they have converged or
    not. Other adjoints differentiate it like any solver. Each step applies the map
    **twice**: `num_steps` steps are `2 * num_steps` evaluations (the 12 evaluations of the
    source are 6 steps). Use it for equilibrium layers whose steps do not fit in memory and
    that are not solved accurately enough for [`metaopt.ImplicitAdjoint`][]. If the answer
    alone is wanted, [`metaopt.Picard`][] and [`metaopt.Anderson`][] need fewer evaluations.

    Undoing a step divides by $1 - \beta$, and rounding with it: of $n$ steps at most by
    $(1 - \beta)^{2 n}$, where the map is a contraction. With the default settings that
    leaves float32 three digits, at worst; at a `relaxation` of 0.8 it would leave none
    after six steps. Faster steps, or more of them, need float64, and params of half
    precision cannot be undone. The adjoint measures what was lost (`drift` in the report).

    **Arguments:**

    - `num_steps`: the number of steps, and the most that are taken.
    - `rtol`, `atol`: stop once the Euclidean norm of `step(params) - params` is at most
        `atol + rtol * norm(params)`. With `rtol=None` all the steps are taken.
    - `relaxation`: $\beta$, in (0, 1), where a contraction is certain to converge. More
        is faster, and harder to undo.
    - `per_example`: whether the leading axis of every array of the params is one of
        examples, each of which has to meet the tolerance, and to be undone. Under
        `jax.vmap` it is so without.
    - `budget`: the most steps that are taken in this call, at most `num_steps`: an integer
        array, which can change without compiling again.
    - `state_policy`: what becomes of model state, if the problem has any. The new model
        state is that of the first evaluation in a step.

    **Raises:**

    `ValueError` for arguments out of range, and where the inner problem is not a fixed
    point.

    ??? cite "Source"

        McCallum, Arora, Foster: *Reversible deep equilibrium models*, 2025. Different
        here: a relaxation from 1 to 2, which not every contraction survives, is refused;
        initial params need not be zero.
    """

    num_steps: int = eqx.field(default=6, static=True)
    rtol: float | None = eqx.field(default=None, kw_only=True, static=True)
    atol: float = eqx.field(default=0.0, kw_only=True, static=True)
    relaxation: float = eqx.field(default=0.5, kw_only=True, static=True)
    per_example: bool = eqx.field(default=False, kw_only=True, static=True)
    budget: IntScalar | None = eqx.field(default=None, converter=as_budget, kw_only=True)
    state_policy: AbstractStatePolicy | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        check_tolerance(self.relaxation, "relaxation", optional=False)
        if not 0 < self.relaxation < 1:
            raise ValueError(
                f"`relaxation` must lie in (0, 1), or a step cannot be undone; got "
                f"{self.relaxation!r}. `metaopt.Picard` takes 1 as well."
            )

    def init(self, problem, params, hyper):
        examples = Examples.of(params, self.per_example)
        return CoupledState(params, Begun.at_start(params, examples))

    def step(self, problem, params, solver_state, hyper, batch, key, model_state):
        state: CoupledState = solver_state
        at, output, begun = self.applied(
            problem, params, hyper, batch, key, model_state, state.begun
        )
        companion = self._coupling.mixed(state.companion, at.value)
        new = self._coupling.mixed(at.params, at.apply(companion))
        static = split_trainable(params)[1]
        return eqx.combine(new, static), CoupledState(companion, begun), output

    def settings(self, hyper):
        return ()

    def reversible_run(self, loop, hyper, model_state, inputs, max_drift):
        return CoupledRun.of(loop, self._coupling, hyper, model_state, inputs, max_drift)

    @property
    def _coupling(self) -> Coupling:
        return Coupling(self.relaxation, self.per_example)


class CoupledState(eqx.Module):
    """The iterate beside the params, and where the steps began."""

    companion: Vector
    begun: Begun
