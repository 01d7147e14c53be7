"""Reversible differentiation: steps are undone where others keep what they computed."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from .._detach import forbid_derivative
from .._model_state import FrozenState
from .._results import mask_result, RESULTS
from .._solver import InnerSolve, Loop, LoopState, ReversibleSGD
from .._tree import split_trainable, tree_add, tree_dot
from .._types import BoolScalar, Hyper, ModelState, Params, PyTree, Vector
from ._base import (
    AbstractAdjoint,
    AdjointInfo,
    HypergradientOutput,
    reverse_mode_explained,
)


class ReversibleAdjoint(AbstractAdjoint):
    r"""Reverse mode through every step of [`metaopt.ReversibleSGD`][], each of which is
    undone on the way back, to the last bit.

    As exact as [`metaopt.UnrolledAdjoint`][] for the steps taken. Memory is that of one
    step and $\log_2(1 / momentum)$ bits for each step and parameter. Use it for long
    runs whose learning rates, momenta, schedules or initial params are tuned. Where the
    steps fit in memory, the unrolled adjoint takes any optimizer, and less time.

    That the steps were undone is checked: the way back has to end at the initial params
    and at a velocity of zero, with every stored bit used up. The report says whether it
    did (`returned_to_start`) and how much was stored (`stored_bits`). Where it did not,
    the hypergradient is NaN and the result says why.

    Not for model state that changes: freeze it. Second derivatives of what is solved are
    an error, and so is forward mode.

    ??? cite "Source"

        Maclaurin, Duvenaud, Adams: *Gradient-based hyperparameter optimization through
        reversible learning*, 2015.
    """

    sees_path: ClassVar[bool] = True
    sees_inner_loss: ClassVar[bool] = True
    heeds_tolerance: ClassVar[bool] = False

    def check(self, solver, data):
        if not isinstance(solver, ReversibleSGD):
            raise ValueError(
                "`ReversibleAdjoint` undoes the steps of the inner solver, and those of "
                f"`{type(solver).__name__}` cannot be undone. Use `metaopt.ReversibleSGD`"
                ", or `metaopt.UnrolledAdjoint()`."
            )
        policy = solver.state_policy
        if policy is not None and not isinstance(policy, FrozenState):
            raise ValueError(
                "`ReversibleAdjoint` cannot undo what becomes of model state under "
                f"`{type(policy).__name__}`. Write `state_policy=metaopt.FrozenState()`, "
                "or use `metaopt.UnrolledAdjoint()`."
            )

    def init(self, params):
        return None

    def solve(self, inner, params, hyper, model_state, throw):
        solver = inner.solver
        assert isinstance(solver, ReversibleSGD)  # checked
        inputs = _Inputs(
            split_trainable(params)[0],
            (split_trainable(hyper)[0], split_trainable(model_state)[0]),
            *solver.schedules(hyper),
        )
        run = _Run(inner, params, hyper, model_state, inputs)
        reached, rest = _with_reverse_derivative(run, inputs, throw=throw)
        return _finish(inner.loop(params), reached, rest, model_state)

    def hypergradient(self, inner, outer, start, hyper, carry, scale):
        solver = inner.solver
        assert isinstance(solver, ReversibleSGD)  # checked
        trainable, static_hyper = split_trainable(hyper)
        static_start: Any = None

        def begin(trainable):
            nonlocal static_start
            full = eqx.combine(trainable, static_hyper)
            floats, rest = split_trainable(start(full))
            arrays, static_start = eqx.partition(rest, eqx.is_array)
            return (*floats, *solver.schedules(full)), arrays

        (params, state, rates, momenta), pull_to_hyper, rest = jax.vjp(
            begin, trainable, has_aux=True
        )
        static_params, static_state = eqx.combine(rest, static_start)
        inputs = _Inputs(params, (trainable, state), rates, momenta)
        full_params = eqx.combine(params, static_params)
        model_state = eqx.combine(state, static_state)
        run = _Run(inner, full_params, hyper, model_state, inputs)
        run, inputs = _once(run, inputs)
        record = run.forward(inputs)
        reached, rest = record.split()
        outcome = _finish(inner.loop(full_params), reached, rest, model_state)

        def outer_loss(params, state, trainable):
            return outer(
                eqx.combine(params, static_params),
                eqx.combine(trainable, static_hyper),
                eqx.combine(state, static_state),
            )

        value, pull, aux = jax.vjp(
            outer_loss, reached.params, state, trainable, has_aux=True
        )
        in_params, in_state, direct = pull(scale.astype(value.dtype))
        # Arrays that the problem holds are not differentiated here.
        fixed = jax.tree.map(lambda _: False, run.evaluate)
        with reverse_mode_explained():
            (_, into), returned = _undone(
                run, inputs, record, _Reached(in_params, None, None), (fixed, True)
            )
        into_hyper, into_state = into.others
        (through_start,) = pull_to_hyper(
            (into.params, tree_add(into_state, in_state), into.rates, into.momenta)
        )
        info = AdjointInfo(
            mask_result(jnp.logical_not(returned), RESULTS.inner_not_reversed),
            inner.last_residual(outcome, hyper),
            returned_to_start=returned,
            stored_bits=solver.factors(momenta)[2],
        )
        through_solution = tree_add(through_start, into_hyper)
        return HypergradientOutput(
            value, aux, direct, through_solution, outcome, info, None
        )


class _Inputs(eqx.Module):
    """What a run starts from: floating-point arrays only."""

    params: Vector
    others: tuple[Vector, Vector]  # hyper and model state
    rates: jax.Array
    momenta: jax.Array


class _Reached(eqx.Module):
    """What a run comes to that can be differentiated."""

    params: Vector
    losses: Any
    aux: Any


class _Record(eqx.Module):
    """The end of a run, from which it can be undone."""

    state: LoopState
    losses: jax.Array

    def split(self) -> tuple[_Reached, LoopState]:
        aux, rest = split_trainable(self.state.aux)
        state = eqx.tree_at(
            lambda s: (s.params, s.solver_state, s.model_state, s.aux),
            self.state,
            (None, None, None, rest),
            is_leaf=lambda x: x is None,
        )
        return _Reached(self.state.params, self.losses, aux), state


class _Run(eqx.Module):
    """The steps of one solve, as functions that hold nothing but arrays.

    **Attributes:**

    - `forward`: `forward(inputs)` is the record of all steps.
    - `evaluate`: `evaluate(params, others, draw)` are the loss, the auxiliary output and
        the gradient of one step.
    - `draws`: as in the loop.
    - `solver`: for its arithmetic; its schedules are in the inputs.
    """

    forward: Callable
    evaluate: Callable
    draws: Any
    solver: ReversibleSGD

    def __init__(
        self,
        inner: InnerSolve,
        params: Params,
        hyper: Hyper,
        model_state: ModelState,
        inputs: _Inputs,
    ):
        loop = inner.loop(params)
        solver = loop.solver
        assert isinstance(solver, ReversibleSGD)
        static_hyper = split_trainable(hyper)[1]
        static_state = split_trainable(model_state)[1]

        def forward(inputs):
            # The same numbers in both directions: schedules are not evaluated again.
            known = solver.resolved(inputs.rates, inputs.momenta)
            steps = eqx.tree_at(lambda loop: loop.solver, loop, known)
            floats, static = inputs.others, (static_hyper, static_state)
            full_hyper, full_state = eqx.combine(floats, static)
            start = eqx.combine(inputs.params, loop.static_params)
            state = steps.start(start, full_hyper, full_state)
            state = eqx.tree_at(
                lambda s: s.solver_state, state, known.recording(state.solver_state)
            )
            body = lambda state, draw: steps.step(full_hyper, state, draw)
            return _Record(*jax.lax.scan(body, state, steps.draws, steps.num_steps))

        def evaluate(params, others, draw):
            full_hyper, full_state = eqx.combine(others, (static_hyper, static_state))
            full = eqx.combine(params, loop.static_params)
            batch, key = loop.drawn(draw)
            out, gradient = solver.evaluate(
                loop.problem, full, full_hyper, batch, key, full_state
            )
            return out.value, split_trainable(out.aux)[0], gradient

        first = jax.tree.map(lambda leaf: leaf[0], loop.draws)
        self.forward = eqx.filter_closure_convert(forward, inputs)
        self.evaluate = eqx.filter_closure_convert(
            evaluate, inputs.params, inputs.others, first
        )
        self.draws = loop.draws
        self.solver = solver.resolved(None, None)


def _finish(loop: Loop, reached: _Reached, rest: LoopState, model_state: ModelState):
    """The outcome; model state that is frozen comes out as it went in."""
    state = eqx.tree_at(
        lambda s: (s.params, s.model_state, s.aux),
        rest,
        (reached.params, model_state, eqx.combine(reached.aux, rest.aux)),
        is_leaf=lambda x: x is None,
    )
    return loop.finish(state, reached.losses)


def _undone(
    run: _Run, inputs: _Inputs, record: _Record, cotangent: _Reached, moving: Any
) -> tuple[tuple[Any, _Inputs], BoolScalar]:
    r"""The derivative of a run, which is undone on the way.

    With $x$ the params, $v$ the velocity, $\alpha$ the rate, $\gamma$ the momentum, and
    bars for derivatives of what is differentiated, a step $v' = \gamma v + \nabla L(x)$,
    $x' = x - \alpha v'$ is passed backwards by

    $$
    \bar w = \bar v' - \alpha \bar x', \qquad
    \bar v = \gamma \bar w, \qquad
    \bar x = \bar x' + \nabla^2 L(x) \bar w, \qquad
    \bar \alpha = - \bar x' \cdot v', \qquad
    \bar \gamma = \bar w \cdot v ,
    $$

    and what else the gradient depends on is pulled back along $\bar w$ with it. The
    position is undone before the gradient is known, because its change depends on $v'$
    alone; the gradient then gives the velocity.

    The gradient is differentiated in reverse mode. A forward derivative along $\bar w$
    of the whole gradient of $L$ takes as many products, 2.9 gradients in all for a
    network of six layers either way, and is right only where second derivatives are
    symmetric: not for a loss that holds a part of itself constant or has a custom
    derivative. Losses and auxiliary outputs get theirs from the same pullback.

    **Arguments:**

    - `run`, `inputs`, `record`: a run and what it came to.
    - `cotangent`: of what it came to, with `None` for zero.
    - `moving`: which arrays of `(run.evaluate, inputs.others)` are differentiated.

    **Returns:**

    The cotangents of `(run.evaluate, inputs)`, and whether all ended as it had begun.
    """
    solver, like = run.solver, inputs.params
    final = record.state.solver_state
    held = run.evaluate, inputs.others
    wanted, fixed = eqx.partition(held, moving)
    wanted, rest = eqx.partition(wanted, eqx.is_inexact_array)
    fixed = eqx.combine(fixed, rest)

    def back(carry, x):
        exact, in_point, in_velocity, sums = carry
        draw, rate, momentum, numerator, bound, in_loss = x
        velocity = solver.velocity_at(exact, like)
        exact = solver.position_before(exact, rate)
        point = solver.params_at(exact, like)

        def evaluate(point, wanted):
            evaluate, others = eqx.combine(wanted, fixed)
            return evaluate(point, others, draw)

        (_, _, gradient), pull = jax.vjp(evaluate, point, wanted)
        exact = solver.velocity_before(exact, final.words, gradient, numerator, bound)
        in_rate = -tree_dot(in_point, velocity)
        in_velocity = _added(in_velocity, [-rate.astype(a.dtype) * a for a in in_point])
        in_momentum = tree_dot(in_velocity, solver.velocity_at(exact, like))
        is_last = draw[0] == solver.num_steps - 1
        in_aux = jax.tree.map(lambda a: jnp.where(is_last, a, 0), in_last_aux)
        more, into = pull((in_loss, in_aux, _in_dtypes(in_velocity, gradient)))
        fraction = solver.fraction(numerator, momentum)
        carry = (
            exact,
            _added(in_point, jax.tree.leaves(more)),
            [fraction.astype(a.dtype) * a for a in in_velocity],
            _added(sums, jax.tree.leaves(into)),
        )
        return carry, (in_rate, in_momentum)

    first = jax.tree.map(lambda leaf: leaf[0], run.draws)
    _, aux, _ = jax.eval_shape(run.evaluate, like, inputs.others, first)
    in_last_aux = _or_zeros(cotangent.aux, aux)
    in_losses = _or_zeros(cotangent.losses, record.losses)
    numerators, bounds, _ = solver.factors(inputs.momenta)
    carry = (
        final.exact,
        _added(_wide_zeros(like), jax.tree.leaves(_or_zeros(cotangent.params, like))),
        _wide_zeros(like),
        _wide_zeros(wanted),
    )
    xs = run.draws, inputs.rates, inputs.momenta, numerators, bounds, in_losses
    (exact, in_params, _, sums), (in_rates, in_momenta) = jax.lax.scan(
        back, carry, xs, reverse=True
    )
    begun, _ = solver.begin(like)
    same = jax.tree.map(lambda a, b: jnp.all(a == b), exact, begun)
    returned = jnp.all(jnp.stack(jax.tree.leaves(same)))
    of_evaluate, of_others = _in_dtypes(sums, wanted)
    of_inputs = _Inputs(
        _in_dtypes(in_params, like),
        of_others,
        in_rates.astype(inputs.rates.dtype),
        in_momenta.astype(inputs.momenta.dtype),
    )
    nothing = lambda leaf: jnp.where(returned, leaf, jnp.nan)
    return jax.tree.map(nothing, (of_evaluate, of_inputs)), returned


def _once(*arguments: Any) -> Any:
    """What a run is made of, of which no second derivative can be taken."""
    floats, rest = split_trainable(arguments)
    return eqx.combine(forbid_derivative(floats, _ONCE), rest)


@eqx.filter_custom_jvp
def _with_reverse_derivative(run, inputs, *, throw):
    return run.forward(inputs).split()


@_with_reverse_derivative.def_jvp
def _(primals, tangents, *, throw):
    run, inputs = _once(*primals)
    record = run.forward(inputs)
    reached, rest = record.split()
    of_run, of_inputs = tangents
    moving = of_run.evaluate, of_inputs
    mask = jax.tree.map(
        lambda t, _: t is not None,
        moving,
        (run.evaluate, inputs),
        is_leaf=lambda x: x is None,
    )

    def forward(_, tangent):
        # Traced in reverse mode as well, so this may raise only when it runs.
        first = jax.tree.leaves(tangent)[0]
        always = jnp.all(first == first) | jnp.any(first != first)
        return eqx.error_if(tangent, always, _REVERSE_ONLY)

    def backward(_, cotangent):
        _, of_reached = cotangent
        into, returned = _undone(run, inputs, record, of_reached, (mask[0], mask[1].others))
        into = eqx.filter(into, mask)
        if throw:
            failed = jnp.logical_not(returned)
            into = RESULTS.inner_not_reversed.error_if(into, failed)
        return into, jax.tree.map(jnp.zeros_like, of_reached)

    # A linear map of the inputs to what was reached, as one on both of them: JAX can
    # transpose and batch it. All of its argument must depend on the tangents.
    zero = 0 * sum(jnp.sum(t) for t in jax.tree.leaves(moving))
    nothing = jax.tree.map(
        lambda a: jnp.broadcast_to(zero, a.shape).astype(a.dtype), reached
    )
    _, tangent = jax.lax.custom_linear_solve(
        lambda x: x, (moving, nothing), forward, backward
    )
    return (reached, rest), (tangent, jax.tree.map(lambda _: None, rest))


def _added(sums: list[jax.Array], terms: list[jax.Array]) -> list[jax.Array]:
    return [a + b.astype(a.dtype) for a, b in zip(sums, terms, strict=True)]


def _wide_zeros(tree: PyTree) -> list[jax.Array]:
    """Zeros to sum in, in at least float32."""
    return [
        jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
        for leaf in jax.tree.leaves(tree)
    ]


def _in_dtypes(leaves: list[jax.Array], like: PyTree) -> PyTree:
    pairs = zip(leaves, jax.tree.leaves(like), strict=True)
    leaves = [leaf.astype(a.dtype) for leaf, a in pairs]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _or_zeros(tree: PyTree, like: PyTree) -> PyTree:
    if tree is None:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    return tree


_ONCE = (
    "`ReversibleAdjoint` gives first derivatives, and a derivative of one was asked for. "
    "Use `metaopt.UnrolledAdjoint()`."
)
_REVERSE_ONLY = (
    "`ReversibleAdjoint` gives derivatives in reverse mode (`jax.grad`, `jax.vjp`, "
    "`jax.jacrev`), and one in forward mode was asked for. Use `metaopt.ForwardAdjoint()`"
    ", or `metaopt.UnrolledAdjoint()`."
)
