"""Small bilevel problems whose solution and hypergradient are known in closed form.

Each comes with a slow, obvious twin in float64 NumPy that shares no code with metaopt or
JAX: derivatives written out by hand, dense matrices, and a dense solve. A new kind of
problem is one function here and one line in `CASES`.
"""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import metaopt as mo


LOSS, FIXED_POINT, ROOT, GAME = "loss", "fixed point", "root", "game"


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """What the twin says at one `hyper`; flat vectors in the order of `jax.tree`.

    The optimality is the gradient of a loss, `params - step(params)`, the residual or the
    gradients of the players.
    """

    params: np.ndarray
    jacobian: np.ndarray  # of the optimality in params, (params, params)
    cross: np.ndarray  # of the optimality in hyper, (params, hyper)
    in_params: np.ndarray  # gradient of the outer loss in params
    direct: np.ndarray  # gradient of the outer loss in hyper, at fixed params
    outer_loss: float

    def gradient(self, num_terms: int | None = None, scale: float = 1.0) -> np.ndarray:
        """The hypergradient; with `num_terms` that of a Neumann series cut there."""
        if num_terms is None:
            adjoint = np.linalg.solve(self.jacobian.T, self.in_params)
        else:
            term = scale * self.in_params
            adjoint = term.copy()
            for _ in range(num_terms):
                term = term - scale * self.jacobian.T @ term
                adjoint += term
        return self.direct - self.cross.T @ adjoint


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A bilevel problem in one dtype, with what it takes to solve it and its twin.

    `solvers` names rows of `members.SOLVERS` that reach the solution in float64, the
    first of them to 1e-12, and to rounding in float32.
    """

    name: str
    kind: str
    dtype: Any
    problem: mo.BilevelProblem
    hyper: Any
    moved: Any  # a second `hyper`, at some distance
    params: Any  # where the inner solve starts: not at the solution
    train: Any
    valid: Any
    twin: Callable[[np.ndarray], Reference]
    rate: float  # a step of gradient descent that converges well; 1 for Picard
    num_steps: int  # such steps from `params` to the solution
    solvers: tuple[str, ...]

    @property
    def rtol(self) -> float:
        """A tolerance that linear solvers can be asked for: 10 to 100 units of rounding
        (they warn about less than 10)."""
        return 1e-12 if self.dtype == jnp.float64 else 1e-5

    @property
    def data(self) -> tuple[Any, Any]:
        return self.train, self.valid

    def reference(self, hyper: Any = None) -> Reference:
        """The twin at `hyper` (by default at this case's own)."""
        return self.twin(flat(self.hyper if hyper is None else hyper))

    def like_hyper(self, vector: np.ndarray) -> Any:
        """A flat vector as a pytree like the trainable part of `hyper`."""
        return ravel_pytree(eqx.filter(self.hyper, eqx.is_inexact_array))[1](
            jnp.asarray(vector, self.dtype)
        )

    def like_params(self, vector: np.ndarray) -> Any:
        """A flat vector as a pytree like `params`."""
        return ravel_pytree(self.params)[1](jnp.asarray(vector, self.dtype))


def flat(tree: Any) -> np.ndarray:
    """The floating-point entries of a pytree as one vector in float64."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return np.concatenate([np.asarray(a, np.float64).ravel() for a in leaves])


def relative_error(got: Any, want: Any) -> float:
    """The norm of the difference over the norm of what is right."""
    got = got if isinstance(got, np.ndarray) else flat(got)
    want = want if isinstance(want, np.ndarray) else flat(want)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _numbers(seed: int, *shape: int) -> np.ndarray:
    """Normal numbers that float32 holds exactly, so that both dtypes see the same."""
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return numbers.astype(np.float32).astype(np.float64)


def _cast(tree: Any, dtype: Any) -> Any:
    """Every floating-point array of a pytree as a JAX array of `dtype`."""

    def cast(leaf):
        if isinstance(leaf, np.ndarray | np.generic):
            leaf = jnp.asarray(leaf)
        return leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf

    return jax.tree.map(cast, tree)


def _make(dtype: Any, **kwargs: Any) -> Case:
    names = ("hyper", "moved", "params", "train", "valid")
    arrays = {name: _cast(kwargs.pop(name), dtype) for name in names}
    return Case(dtype=dtype, **arrays, **kwargs)


#
# Ridge regression with one log penalty for each feature
#


def ridge(dtype: Any = jnp.float64) -> Case:
    x, noise = _numbers(1, 36, 4), _numbers(2, 36)
    y = x @ np.array([1.0, -2.0, 0.5, 0.0]) + noise
    (x, xv), (y, yv) = np.split(x, [24]), np.split(y, [24])

    def inner_loss(params, hyper, batch):
        x, y = batch
        penalty = jnp.sum(jnp.exp(hyper) * params**2)
        return 0.5 * jnp.mean((x @ params - y) ** 2) + 0.5 * penalty

    def outer_loss(params, hyper, batch):
        del hyper
        x, y = batch
        return 0.5 * jnp.mean((x @ params - y) ** 2)

    def twin(hyper):
        hessian = x.T @ x / len(x) + np.diag(np.exp(hyper))
        w = np.linalg.solve(hessian, x.T @ y / len(x))
        error = xv @ w - yv
        return Reference(
            params=w,
            jacobian=hessian,
            cross=np.diag(np.exp(hyper) * w),
            in_params=xv.T @ error / len(xv),
            direct=np.zeros(4),
            outer_loss=float(0.5 * np.mean(error**2)),
        )

    return _make(
        dtype,
        name="ridge",
        kind=LOSS,
        problem=mo.BilevelProblem(inner_loss, outer_loss),
        hyper=np.array([-1.0, -0.5, 0.25, -2.0]),
        moved=np.array([0.5, -1.5, 0.0, -1.0]),
        params=np.array([0.5, 0.5, -0.5, 1.0]),
        train=(x, y),
        valid=(xv, yv),
        twin=twin,
        rate=0.5,
        num_steps=80,
        solvers=("descent", "momentum", "minimiser", "root finder", "jaxopt lbfgs"),
    )


#
# A quadratic whose outer variables are a module and whose params are a dictionary
#


class Pull(eqx.Module):
    """Outer variables of several kinds: trained, integer, static and absent."""

    log_curvature: Any  # one for each group of params
    target: dict[str, Any]
    group: Any  # an integer for each of the params
    nothing: None = None
    factor: float = eqx.field(static=True, default=2.0)

    def curvatures(self):
        return self.factor * jnp.exp(self.log_curvature)[self.group]


def quadratic(dtype: Any = jnp.float64) -> Case:
    mix, wish = 0.4 * _numbers(3, 4, 5), _numbers(4, 5)
    group, spread = np.array([0, 2, 1, 1, 0]), np.array([0, 1, 1, 2, 2])
    factor = 2.0

    def inner_loss(params, hyper, batch):
        p = jnp.concatenate([params["b"].ravel(), params["w"]])
        target = jnp.append(hyper.target["low"], hyper.target["high"])[spread]
        pull = jnp.sum(hyper.curvatures() * (p - target) ** 2)
        return 0.5 * pull + 0.5 * jnp.sum((batch["mix"] @ p) ** 2)

    def outer_loss(params, hyper, batch):
        p = jnp.concatenate([params["b"].ravel(), params["w"]])
        size = jnp.sum(hyper.target["low"] ** 2) + jnp.sum(hyper.log_curvature)
        return 0.5 * jnp.sum((p - batch["wish"]) ** 2) + 0.1 * size

    def twin(hyper):
        # In the order of `jax.tree`: the curvatures, then `high` before `low`.
        log_curvature, high, low = np.split(hyper, [3, 4])
        curvature = factor * np.exp(log_curvature)[group]
        target = np.concatenate([low, high])[spread]
        hessian = np.diag(curvature) + mix.T @ mix
        p = np.linalg.solve(hessian, curvature * target)
        cross = np.zeros((5, 6))
        for i in range(5):
            cross[i, group[i]] += curvature[i] * (p[i] - target[i])
            cross[i, [4, 5, 3][spread[i]]] -= curvature[i]
        size = np.sum(low**2) + np.sum(log_curvature)
        return Reference(
            params=p,
            jacobian=hessian,
            cross=cross,
            in_params=p - wish,
            direct=np.concatenate([np.full(3, 0.1), np.zeros(1), 0.2 * low]),
            outer_loss=float(0.5 * np.sum((p - wish) ** 2) + 0.1 * size),
        )

    def hyper(shift):
        return Pull(
            log_curvature=np.array([-0.5, 0.25, 0.0]) + shift,
            target={"low": np.array([1.0, -0.5]) - shift, "high": np.array(0.75)},
            group=jnp.asarray(group),
            factor=factor,
        )

    return _make(
        dtype,
        name="quadratic",
        kind=LOSS,
        problem=mo.BilevelProblem(inner_loss, outer_loss),
        hyper=hyper(0.0),
        moved=hyper(0.5),
        params={"w": np.array([0.5, -0.5, 1.0]), "b": np.array([[1.0, 0.0]])},
        train={"mix": mix},
        valid={"wish": wish},
        twin=twin,
        rate=0.25,
        num_steps=90,
        solvers=("descent", "momentum", "minimiser", "root finder", "jaxopt lbfgs"),
    )


#
# Softmax regression with one log penalty for each weight
#


def softmax(dtype: Any = jnp.float64) -> Case:
    x, classes = _numbers(5, 44, 3), 3
    label = np.argmax(x @ _numbers(6, 3, classes) + 0.5 * _numbers(7, 44, 3), axis=1)
    x = np.concatenate([np.ones((44, 1)), x], axis=1)
    (x, xv), (label, label_v) = np.split(x, [30]), np.split(label, [30])

    def outer_loss(params, hyper, batch):
        del hyper
        x, indicator = batch
        logits = x @ params
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.sum(indicator * logits, 1))

    def inner_loss(params, hyper, batch):
        penalty = jnp.sum(jnp.exp(hyper) * params**2)
        return outer_loss(params, hyper, batch) + 0.5 * penalty

    def twin(hyper):
        return softmax_twin(hyper, (x, label), (xv, label_v), classes)

    tilt = np.linspace(-0.5, 0.5, 12).reshape(4, 3)
    return _make(
        dtype,
        name="softmax",
        kind=LOSS,
        problem=mo.BilevelProblem(inner_loss, outer_loss),
        hyper=tilt - 1.25,
        moved=-tilt - 0.75,
        params=np.zeros((4, 3)),
        train=(x, np.eye(classes)[label]),
        valid=(xv, np.eye(classes)[label_v]),
        twin=twin,
        rate=1.4,
        num_steps=110,
        solvers=("descent", "momentum", "minimiser", "root finder", "jaxopt lbfgs"),
    )


def softmax_twin(
    hyper: np.ndarray,
    train: tuple[np.ndarray, np.ndarray],
    valid: tuple[np.ndarray, np.ndarray],
    classes: int,
    start: np.ndarray | None = None,
) -> Reference:
    """Softmax regression by Newton's method, with a dense Hessian: params and `hyper`
    are the flattened (features, classes) matrix, data are rows and integer labels."""

    def loss_and_gradient(w, x, label):
        logits = x @ w.reshape(-1, classes)
        logits -= logits.max(axis=1, keepdims=True)
        p = np.exp(logits)
        p /= p.sum(axis=1, keepdims=True)
        rows = np.arange(len(x))
        loss = -np.mean(np.log(p[rows, label]))
        error = p.copy()
        error[rows, label] -= 1
        return loss, (x.T @ error / len(x)).ravel(), p

    (x, label), (xv, label_v) = train, valid
    size = x.shape[1] * classes
    w = np.zeros(size) if start is None else start.copy()
    penalty = np.exp(hyper)
    for _ in range(50):
        _, gradient, p = loss_and_gradient(w, x, label)
        hessian = np.zeros((x.shape[1], classes, x.shape[1], classes))
        for a in range(classes):
            for b in range(classes):
                weight = p[:, a] * ((a == b) - p[:, b])
                hessian[:, a, :, b] = (x * weight[:, None]).T @ x / len(x)
        hessian = hessian.reshape(size, size) + np.diag(penalty)
        change = np.linalg.solve(hessian, gradient + penalty * w)
        # The Hessian is that of the point before the last step, which is the same point
        # to rounding once the step is this small.
        w = w - change
        if np.linalg.norm(change) <= 1e-13 * np.linalg.norm(w):
            break
    else:
        raise AssertionError("Newton's method did not converge")
    outer_loss, in_params, _ = loss_and_gradient(w, xv, label_v)
    return Reference(
        params=w,
        jacobian=hessian,
        cross=np.diag(penalty * w),
        in_params=in_params,
        direct=np.zeros(size),
        outer_loss=float(outer_loss),
    )


#
# A fixed point whose Jacobian is neither symmetric nor normal
#


def fixed_point(dtype: Any = jnp.float64) -> Case:
    # Eigenvalues within 0.7, norm 1.9: the steps grow before they shrink.
    matrix = np.array([[0.5, 1.5, 0.0], [0.0, -0.25, 1.0], [0.0, 0.125, 0.5]])
    inputs, shift, wish = 0.5 * _numbers(8, 3, 2), 0.5 * _numbers(9, 3), _numbers(10, 3)

    def step(params, hyper, batch):
        return (
            hyper["gain"] * batch["matrix"] @ params
            + batch["inputs"] @ hyper["input"]
            + batch["shift"]
        )

    def outer_loss(params, hyper, batch):
        return 0.5 * jnp.sum((params - batch) ** 2) + 0.1 * hyper["gain"] ** 2

    def twin(hyper):
        gain, value = hyper[0], hyper[1:]
        jacobian = np.eye(3) - gain * matrix
        z = np.linalg.solve(jacobian, inputs @ value + shift)
        return Reference(
            params=z,
            jacobian=jacobian,
            cross=-np.concatenate([(matrix @ z)[:, None], inputs], axis=1),
            in_params=z - wish,
            direct=np.array([0.2 * gain, 0.0, 0.0]),
            outer_loss=float(0.5 * np.sum((z - wish) ** 2) + 0.1 * gain**2),
        )

    return _make(
        dtype,
        name="fixed point",
        kind=FIXED_POINT,
        problem=mo.BilevelProblem(mo.FixedPointProblem(step), outer_loss),
        hyper={"gain": np.array(0.75), "input": np.array([1.0, -0.5])},
        moved={"gain": np.array(-0.5), "input": np.array([0.25, 1.5])},
        params=np.array([1.0, 0.0, -1.0]),
        train={"matrix": matrix, "inputs": inputs, "shift": shift},
        valid=wish,
        twin=twin,
        rate=1.0,
        num_steps=60,
        solvers=("picard", "root finder", "fixed-point solver", "jaxopt anderson"),
    )


#
# A root, not linear and not symmetric
#


def root(dtype: Any = jnp.float64) -> Case:
    mix = np.eye(3) + 0.5 * np.array([[0.0, 1.0, -1.0], [0.0, 0.0, 1.0], [1.0, 0, 0]])
    powers, wish = 0.5 * _numbers(11, 3, 2), _numbers(12, 3)

    def residual(params, hyper, batch):
        return batch["mix"] @ (params**3 - jnp.exp(batch["powers"] @ hyper))

    def outer_loss(params, hyper, batch):
        return 0.5 * jnp.sum((params - batch) ** 2) + jnp.sum(hyper**2)

    def twin(hyper):
        z = np.exp(powers @ hyper / 3)
        return Reference(
            params=z,
            jacobian=mix * (3 * z**2),
            cross=-mix @ (powers * (z**3)[:, None]),
            in_params=z - wish,
            direct=2 * hyper,
            outer_loss=float(0.5 * np.sum((z - wish) ** 2) + np.sum(hyper**2)),
        )

    return _make(
        dtype,
        name="root",
        kind=ROOT,
        problem=mo.BilevelProblem(mo.RootProblem(residual), outer_loss),
        hyper=np.array([0.5, -1.0]),
        moved=np.array([-0.25, 0.75]),
        params=np.array([1.5, 0.75, 1.0]),
        train={"mix": mix, "powers": powers},
        valid=wish,
        twin=twin,
        rate=1.0,
        num_steps=60,
        solvers=("root finder", "jaxopt broyden"),
    )


#
# A game of two players: bilinear, and strongly convex for each player
#


def game(dtype: Any = jnp.float64) -> Case:
    first, second = np.array([[1.5, 0.25], [0.25, 1.0]]), np.diag([1.0, 2.0])
    mix, wish, shift = 0.5 * _numbers(13, 2, 2), _numbers(14, 4), _numbers(15, 2)

    def first_loss(params, hyper, batch):
        x, y = params[0]["x"], params[1]
        bilinear = hyper["coupling"] * (x @ batch["mix"] @ y)
        return 0.5 * (x @ batch["first"] @ x) + bilinear - hyper["target"] @ x

    def second_loss(params, hyper, batch):
        x, y = params[0]["x"], params[1]
        bilinear = hyper["coupling"] * (x @ batch["mix"] @ y)
        return 0.5 * (y @ batch["second"] @ y) - bilinear - batch["shift"] @ y

    def outer_loss(params, hyper, batch):
        p = jnp.concatenate([params[0]["x"], params[1]])
        return 0.5 * jnp.sum((p - batch) ** 2) + 0.1 * hyper["coupling"] ** 2

    def twin(hyper):
        coupling, target = hyper[0], hyper[1:]
        jacobian = np.block([[first, coupling * mix], [-coupling * mix.T, second]])
        p = np.linalg.solve(jacobian, np.concatenate([target, shift]))
        x, y = np.split(p, 2)
        in_coupling = np.concatenate([mix @ y, -mix.T @ x])
        in_target = np.concatenate([-np.eye(2), np.zeros((2, 2))])
        return Reference(
            params=p,
            jacobian=jacobian,
            cross=np.concatenate([in_coupling[:, None], in_target], axis=1),
            in_params=p - wish,
            direct=np.array([0.2 * coupling, 0.0, 0.0]),
            outer_loss=float(0.5 * np.sum((p - wish) ** 2) + 0.1 * coupling**2),
        )

    return _make(
        dtype,
        name="game",
        kind=GAME,
        problem=mo.BilevelProblem(mo.GameProblem((first_loss, second_loss)), outer_loss),
        hyper={"coupling": np.array(0.75), "target": np.array([1.0, -0.5])},
        moved={"coupling": np.array(-0.5), "target": np.array([0.25, 1.5])},
        params=({"x": np.array([1.0, 0.0])}, np.array([-1.0, 0.5])),
        train={"mix": mix, "first": first, "second": second, "shift": shift},
        valid=wish,
        twin=twin,
        rate=0.5,
        num_steps=90,
        solvers=("descent", "momentum", "root finder", "jaxopt broyden"),
    )


CASES: dict[str, Callable[[Any], Case]] = {
    "ridge": ft.cache(ridge),
    "quadratic": ft.cache(quadratic),
    "softmax": ft.cache(softmax),
    "fixed point": ft.cache(fixed_point),
    "root": ft.cache(root),
    "game": ft.cache(game),
}
"""Each case by name, as a function of the dtype. Made once: an equal call does not
compile a second time."""
