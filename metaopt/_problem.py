"""What is solved: an inner problem, and the outer loss at its solution."""

import abc
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx

from ._tree import leaf_names, split_trainable
from ._types import (
    Aux,
    Batch,
    FloatScalar,
    Hyper,
    Key,
    LossFn,
    ModelState,
    Params,
    Vector,
)


class Evaluation(eqx.Module):
    """One evaluation of a loss, a step map or a residual.

    **Attributes:**

    - `value`: what the function returned first: a scalar for a loss, else a pytree.
    - `state`: the updated model state, or `None` for a problem without one.
    - `aux`: the auxiliary output, or `None`.
    """

    value: Any
    state: ModelState
    aux: Aux


class AbstractProblem(eqx.Module):
    """What all kinds of inner problem share; subclass one of the three kinds instead:
    [`metaopt.AbstractInnerProblem`][] (a loss to minimise),
    [`metaopt.AbstractFixedPointProblem`][] or [`metaopt.AbstractRootProblem`][].

    A kind differs from another only in its *optimality*, the residual that is zero at
    the inner solution, and in the structure which that residual's Jacobian promises.
    """

    has_aux: ClassVar[bool] = False
    has_state: ClassVar[bool] = False

    @abc.abstractmethod
    def init(self, hyper: Any, key: Any) -> Any:
        """Returns the initial params (a pytree), drawn with `key`.

        With `has_state = True`, a pair of initial params and initial model state.
        """

    @abc.abstractmethod
    def evaluate(
        self, params: Params, hyper: Hyper, batch: Batch, key: Key, state: ModelState
    ) -> Evaluation:
        """Calls the user's function and checks what it returned."""

    @abc.abstractmethod
    def optimality(
        self, params: Params, hyper: Hyper, batch: Batch, key: Key, state: ModelState
    ) -> Vector:
        """The residual that is zero at the inner solution.

        Has the structure of the trainable part of `params`.
        """

    @property
    @abc.abstractmethod
    def tags(self) -> frozenset[object]:
        """The `lineax` tags promised by the Jacobian of `optimality` in `params`."""


class AbstractInnerProblem(AbstractProblem):
    r"""An inner problem that minimises a loss: $\min_{params} loss(params, hyper)$.

    Subclass it and write two methods:

    ```python
    import jax.numpy as jnp
    import metaopt as mo


    class Ridge(mo.AbstractInnerProblem):
        def init(self, hyper, key):
            return jnp.zeros(8)

        def loss(self, params, hyper, batch):
            x, y = batch
            return jnp.mean((x @ params - y) ** 2) + jnp.exp(hyper) * params @ params
    ```

    - `init(hyper, key)` returns the initial params: any pytree, such as an
        `equinox.nn.MLP`. Its floating-point arrays are trained; all else is left alone.
    - `loss(params, hyper, batch)` returns a floating-point scalar. If it declares an
        argument named `key` it is given a fresh random key at each step.

    Two class attributes say what the loss takes and returns besides:

    - `has_aux = True`: it returns `(value, aux)`.
    - `has_state = True`: `init` returns `(params, state)`, the loss takes `state` as a
        keyword and returns `(value, state)`, or `(value, state, aux)` with both.

    Arrays may be fields of the problem or closed over; derivatives with respect to
    them are right in every adjoint.
    """

    @abc.abstractmethod
    def loss(self, *args: Any, **kwargs: Any) -> Any:
        """The inner loss, `loss(params, hyper, batch)`: a floating-point scalar."""

    def evaluate(self, params, hyper, batch, key, state):
        out = call(self.loss, "loss", self, params, hyper, batch, key, state)
        check_scalar(out.value, "the inner loss")
        return out

    def optimality(self, params, hyper, batch, key, state):
        trainable, rest = split_trainable(params)

        def loss(trainable):
            p = eqx.combine(trainable, rest)
            return self.evaluate(p, hyper, batch, key, state).value

        return jax.grad(loss)(trainable)

    @property
    def tags(self):
        # The Hessian of a loss is symmetric, and positive semidefinite at a minimum.
        # The second is a promise that a linear solver checks as it goes.
        return frozenset({lx.symmetric_tag, lx.positive_semidefinite_tag})


class AbstractFixedPointProblem(AbstractProblem):
    """An inner problem that seeks a fixed point: `params = step(params, hyper, batch)`.

    Subclass it and write `init(hyper, key)` and `step(params, hyper, batch)`, which
    returns a pytree with the structure, shapes and dtypes of `params`. `key`, `has_aux`
    and `has_state` are as in [`metaopt.AbstractInnerProblem`][].
    """

    @abc.abstractmethod
    def step(self, *args: Any, **kwargs: Any) -> Any:
        """The map whose fixed point is sought, `step(params, hyper, batch)`."""

    def evaluate(self, params, hyper, batch, key, state):
        out = call(self.step, "step", self, params, hyper, batch, key, state)
        check_like(out.value, params, "the step of the fixed-point problem")
        return out

    def optimality(self, params, hyper, batch, key, state):
        new = self.evaluate(params, hyper, batch, key, state).value
        new, old = split_trainable(new)[0], split_trainable(params)[0]
        # In this order the Jacobian is the identity minus that of the step, so that the
        # Neumann series of a contraction converges.
        return jax.tree.map(jnp.subtract, old, new)

    @property
    def tags(self):
        return frozenset()


class AbstractRootProblem(AbstractProblem):
    """An inner problem that seeks a root: `residual(params, hyper, batch) = 0`.

    Subclass it and write `init(hyper, key)` and `residual(params, hyper, batch)`, which
    returns a pytree with the structure, shapes and dtypes of `params`. `key`, `has_aux`
    and `has_state` are as in [`metaopt.AbstractInnerProblem`][].
    """

    @abc.abstractmethod
    def residual(self, *args: Any, **kwargs: Any) -> Any:
        """The function whose root is sought, `residual(params, hyper, batch)`."""

    def evaluate(self, params, hyper, batch, key, state):
        out = call(self.residual, "residual", self, params, hyper, batch, key, state)
        check_like(out.value, params, "the residual of the root problem")
        return out

    def optimality(self, params, hyper, batch, key, state):
        return split_trainable(self.evaluate(params, hyper, batch, key, state).value)[0]

    @property
    def tags(self):
        return frozenset()


class InnerProblem(AbstractInnerProblem):
    """An inner minimisation problem made from plain functions.

    **Arguments:**

    - `loss_fn`: `loss_fn(params, hyper, batch)`, a floating-point scalar. May declare
        arguments named `key` and (with `has_state`) `state`.
    - `init_fn`: `init_fn(hyper, key)`, the initial params. May be left out where
        initial params are handed over at each call.
    - `has_aux`, `has_state`: as in [`metaopt.AbstractInnerProblem`][].

    **Example:**

    ```python
    import metaopt as mo

    problem = mo.InnerProblem(lambda params, hyper, batch: (params - hyper) ** 2)
    ```
    """

    loss_fn: LossFn
    init_fn: Callable[..., Any] | None = None
    has_aux: bool = eqx.field(  # pyright: ignore
        default=False, static=True, kw_only=True
    )
    has_state: bool = eqx.field(  # pyright: ignore
        default=False, static=True, kw_only=True
    )

    def init(self, hyper, key):
        return _init(self.init_fn, hyper, key)

    def loss(self, params, hyper, batch, **optional):
        return self.loss_fn(params, hyper, batch, **optional)


class FixedPointProblem(AbstractFixedPointProblem):
    """A fixed-point problem made from plain functions.

    **Arguments:**

    - `step_fn`: `step_fn(params, hyper, batch)`, a pytree like `params`.
    - `init_fn`: `init_fn(hyper, key)`, the initial params. May be left out where
        initial params are handed over at each call.
    - `has_aux`, `has_state`: as in [`metaopt.AbstractInnerProblem`][].
    """

    step_fn: LossFn
    init_fn: Callable[..., Any] | None = None
    has_aux: bool = eqx.field(  # pyright: ignore
        default=False, static=True, kw_only=True
    )
    has_state: bool = eqx.field(  # pyright: ignore
        default=False, static=True, kw_only=True
    )

    def init(self, hyper, key):
        return _init(self.init_fn, hyper, key)

    def step(self, params, hyper, batch, **optional):
        return self.step_fn(params, hyper, batch, **optional)


class RootProblem(AbstractRootProblem):
    """A root-finding problem made from plain functions.

    **Arguments:**

    - `residual_fn`: `residual_fn(params, hyper, batch)`, a pytree like `params`.
    - `init_fn`: `init_fn(hyper, key)`, the initial params. May be left out where
        initial params are handed over at each call.
    - `has_aux`, `has_state`: as in [`metaopt.AbstractInnerProblem`][].
    """

    residual_fn: LossFn
    init_fn: Callable[..., Any] | None = None
    has_aux: bool = eqx.field(  # pyright: ignore
        default=False, static=True, kw_only=True
    )
    has_state: bool = eqx.field(  # pyright: ignore
        default=False, static=True, kw_only=True
    )

    def init(self, hyper, key):
        return _init(self.init_fn, hyper, key)

    def residual(self, params, hyper, batch, **optional):
        return self.residual_fn(params, hyper, batch, **optional)


class BilevelProblem(eqx.Module):
    r"""An outer loss evaluated at the solution of an inner problem,

    $$\min_{hyper} \; outer\_loss(params^*(hyper), hyper) \quad \text{where }
    params^*(hyper) \text{ solves the inner problem.}$$

    **Arguments:**

    - `inner`: the inner problem, or a plain function `loss(params, hyper, batch)`.
    - `outer_loss`: `outer_loss(params, hyper, batch)`, a floating-point scalar. May
        declare arguments named `key` (a fresh random key for each outer step) and
        `state` (the model state at the inner solution).
    - `has_aux`: whether `outer_loss` returns `(value, aux)`.

    **Raises:**

    `ValueError` if `inner` is neither a problem nor a function, or `outer_loss` is not
    a function.
    """

    inner: AbstractProblem
    outer_loss: LossFn
    has_aux: bool = eqx.field(static=True)

    def __init__(
        self,
        inner: AbstractProblem | LossFn,
        outer_loss: LossFn,
        *,
        has_aux: bool = False,
    ):
        if not isinstance(inner, AbstractProblem):
            if not callable(inner) or isinstance(inner, type):
                raise ValueError(
                    "`inner` must be an inner problem such as an instance of a "
                    "subclass of `metaopt.AbstractInnerProblem`, or a function "
                    f"`loss(params, hyper, batch)`; got {_describe(inner)}."
                )
            inner = InnerProblem(inner)
        if not callable(outer_loss):
            raise ValueError(
                "`outer_loss` must be a function `outer_loss(params, hyper, batch)`; "
                f"got {_describe(outer_loss)}."
            )
        self.inner = inner
        self.outer_loss = outer_loss
        self.has_aux = has_aux

    def evaluate_outer(
        self, params: Params, hyper: Hyper, batch: Batch, key: Key, state: ModelState
    ) -> tuple[FloatScalar, Aux]:
        """The outer loss and its auxiliary output (`None` without `has_aux`).

        **Arguments:**

        - `params`, `hyper`: the inner and the outer variables.
        - `batch`: what `outer_loss` is evaluated on.
        - `key`, `state`: passed on if `outer_loss` declares them.

        **Returns:**

        A pair of a floating-point scalar and the auxiliary output.
        """
        optional = _declared(self.outer_loss, {"key": key, "state": state})
        out = self.outer_loss(params, hyper, batch, **optional)
        if self.has_aux:
            out = _unpack(out, "the outer loss", ("value", "aux"))
            value, aux = out
        else:
            value, aux = out, None
        check_scalar(value, "the outer loss")
        return value, aux


def initialise(problem: AbstractProblem, hyper: Hyper, key: Key) -> tuple[Any, Any]:
    """The initial params and model state (`None` for a problem without one)."""
    out = problem.init(hyper, key)
    if problem.has_state:
        params, state = _unpack(out, "`init`", ("params", "state"))
        return params, state
    return out, None


def call(
    fn: LossFn,
    name: str,
    problem: AbstractProblem,
    params: Params,
    hyper: Hyper,
    batch: Batch,
    key: Key,
    state: ModelState,
) -> Evaluation:
    """Calls a user's function with what it declares and takes apart what it returns."""
    optional = _declared(_innermost(problem, fn), {"key": key})
    if problem.has_state:
        # A copy: `equinox.nn.State` refuses to be read again once it was updated.
        optional["state"] = jax.tree.map(lambda leaf: leaf, state)
    out = fn(params, hyper, batch, **optional)
    parts = ["value"]
    if problem.has_state:
        parts.append("state")
    if problem.has_aux:
        parts.append("aux")
    if len(parts) == 1:
        return Evaluation(out, None, None)
    named = dict(zip(parts, _unpack(out, f"`{name}`", tuple(parts)), strict=True))
    return Evaluation(named["value"], named.get("state"), named.get("aux"))


def check_scalar(value: Any, whose: str) -> None:
    """Raises a `ValueError` unless `value` is a floating-point scalar array."""
    if isinstance(value, (tuple, list)):
        raise ValueError(
            f"{whose} returned {_describe(value)}. It must return one floating-point "
            "scalar; to return more beside it, declare `has_aux=True` (or `has_state`)."
        )
    shape = getattr(value, "shape", None)
    if shape is None or not jnp.issubdtype(value.dtype, jnp.inexact):
        raise ValueError(
            f"{whose} returned {_describe(value)}. It must return a floating-point "
            "scalar that is computed from its arguments with `jax.numpy`."
        )
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise ValueError(f"{whose} returned a complex number; return its real part.")
    if shape != ():
        raise ValueError(
            f"{whose} returned {_describe(value)}. It must return a scalar: take "
            "`jnp.mean` or `jnp.sum` of it."
        )


def check_like(value: Any, params: Params, whose: str) -> None:
    """Raises a `ValueError` unless `value` has structure, shapes, dtypes of `params`."""
    got, want = split_trainable(value)[0], split_trainable(params)[0]
    if jax.tree.structure(got) != jax.tree.structure(want):
        raise ValueError(
            f"{whose} returned a pytree of structure {jax.tree.structure(got)}; it must "
            f"return one like `params`, {jax.tree.structure(want)}."
        )
    names = leaf_names(want, "params")
    for name, a, b in zip(names, jax.tree.leaves(got), jax.tree.leaves(want)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ValueError(
                f"{whose} returned {_describe(a)} in the place of `{name}`, which is "
                f"{_describe(b)}. Shapes and dtypes must agree."
            )


def _innermost(problem: AbstractProblem, fn: LossFn) -> LossFn:
    match problem:
        case InnerProblem():
            return problem.loss_fn
        case FixedPointProblem():
            return problem.step_fn
        case RootProblem():
            return problem.residual_fn
    return fn


def _declared(fn: LossFn, offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered keyword arguments that `fn` names in its signature."""
    try:
        names = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # some callables have no signature
        return {}
    return {name: value for name, value in offered.items() if name in names}


def _init(init_fn: Callable[..., Any] | None, hyper: Hyper, key: Key) -> Any:
    if init_fn is None:
        raise ValueError(
            "This problem was made without `init_fn`, so initial params must be given: "
            "pass `params=...`, or `init_fn=lambda hyper, key: ...` to the problem."
        )
    return init_fn(hyper, key)


def _unpack(out: Any, whose: str, parts: tuple[str, ...]) -> tuple[Any, ...]:
    if not isinstance(out, tuple) or len(out) != len(parts):
        raise ValueError(
            f"{whose} must return the tuple ({', '.join(parts)}), because of `has_aux` "
            f"or `has_state`; it returned {_describe(out)}."
        )
    return out


def _describe(x: Any) -> str:
    if isinstance(x, (tuple, list)):
        return f"a {type(x).__name__} of length {len(x)}"
    if eqx.is_array(x):
        return f"an array of shape {x.shape} and dtype {x.dtype}"
    return f"{x!r} of type `{type(x).__name__}`"
