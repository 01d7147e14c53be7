"""Random bilevel problems whose exact hypergradients can be computed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Instance(NamedTuple):
    """One random problem: everything that varies within a family."""

    hyper: Any
    start: Any
    train: Any
    valid: Any


class Family(NamedTuple):
    """Random problems of one kind.

    `minimise` is false where the inner loss is the map of a fixed point.
    """

    inner: Callable
    outer: Callable
    draw: Callable[[jax.Array], Instance]
    minimise: bool = True


ROWS = 30


def _conditioned(key, rows, size):
    """Random rows whose Hessian has a condition number of 1e0 to 1e4."""
    spread_key, rows_key = jax.random.split(key)
    spread = jax.random.uniform(spread_key, maxval=2.0)
    scales = 10.0 ** (-spread * jnp.linspace(0, 1, size))
    return jax.random.normal(rows_key, (2, rows, size)) * scales


def _hyper(key, shape=(), low=-6.0, high=0.0):
    return jax.random.uniform(key, shape, minval=low, maxval=high)


def _mse(params, hyper, batch):
    return 0.5 * jnp.mean((batch[0] @ params - batch[1]) ** 2)


def _penalty(params, hyper):
    return 0.5 * jnp.sum(jnp.exp(hyper) * params**2)


def _ridge():
    def draw(key):
        keys = jax.random.split(key, 4)
        x = _conditioned(keys[0], ROWS, 10)
        y = x @ jax.random.normal(keys[1], (10,)) + jax.random.normal(keys[2], (2, ROWS))
        hyper = _hyper(keys[3], (10,))
        return Instance(hyper, jnp.zeros(10), (x[0], y[0]), (x[1], y[1]))

    inner = lambda p, h, b: _mse(p, h, b) + _penalty(p, h)
    return Family(inner, _mse, draw)


def _biased_ridge():
    """Targets with a mean of 1 to 1e5, which a bias takes up."""

    def fit(p, h, b):
        return 0.5 * jnp.mean((b[0] @ p["w"] + p["b"] - b[1]) ** 2)

    def draw(key):
        keys = jax.random.split(key, 5)
        x = _conditioned(keys[0], ROWS, 6)
        y = x @ jax.random.normal(keys[1], (6,)) + jax.random.normal(keys[2], (2, ROWS))
        mean = 10 ** jax.random.uniform(keys[3], maxval=5.0)
        start = {"w": jnp.zeros(6), "b": jnp.zeros(())}
        y = y + mean
        return Instance(_hyper(keys[4]), start, (x[0], y[0]), (x[1], y[1]))

    inner = lambda p, h, b: fit(p, h, b) + _penalty(p["w"], h)
    return Family(inner, fit, draw)


def _logistic(per_feature):
    def fit(p, h, b):
        losses = optax.losses.sigmoid_binary_cross_entropy(b[0] @ p, b[1])
        return jnp.mean(losses)

    def draw(key):
        keys = jax.random.split(key, 4)
        x = _conditioned(keys[0], ROWS, 8)
        scores = 3 * x @ jax.random.normal(keys[1], (8,))
        noise = jax.random.normal(keys[2], (2, ROWS))
        y = (scores + noise > 0).astype(x.dtype)
        hyper = _hyper(keys[3], (8,) if per_feature else (), -7.0, -1.0)
        return Instance(hyper, jnp.zeros(8), (x[0], y[0]), (x[1], y[1]))

    inner = lambda p, h, b: fit(p, h, b) + _penalty(p, h)
    return Family(inner, fit, draw)


def _softmax():
    def fit(p, h, b):
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(b[0] @ p, b[1])
        return jnp.mean(losses)

    def draw(key):
        keys = jax.random.split(key, 4)
        x = _conditioned(keys[0], ROWS, 5)
        scores = x @ jax.random.normal(keys[1], (5, 3))
        noise = jax.random.normal(keys[2], scores.shape)
        y = jnp.argmax(scores + noise, -1)
        return Instance(_hyper(keys[3]), jnp.zeros((5, 3)), (x[0], y[0]), (x[1], y[1]))

    inner = lambda p, h, b: fit(p, h, b) + _penalty(p, h)
    return Family(inner, fit, draw)


def _network():
    def fit(p, h, b):
        hidden = jnp.tanh(b[0] @ p["in"])
        return 0.5 * jnp.mean((hidden @ p["out"] - b[1]) ** 2)

    def draw(key):
        keys = jax.random.split(key, 6)
        x = jax.random.normal(keys[0], (2, ROWS, 3))
        y = jnp.sin(x @ jax.random.normal(keys[1], (3,)))
        y = y + 0.3 * jax.random.normal(keys[2], (2, ROWS))
        start = {
            "in": jax.random.normal(keys[3], (3, 4)),
            "out": jax.random.normal(keys[4], (4,)),
        }
        return Instance(
            _hyper(keys[5], (2,), -5.0, -1.0), start, (x[0], y[0]), (x[1], y[1])
        )

    inner = lambda p, h, b: (
        fit(p, h, b) + _penalty(p["in"], h[0]) + _penalty(p["out"], h[1])
    )
    return Family(inner, fit, draw)


def _huber():
    def draw(key):
        keys = jax.random.split(key, 4)
        x = _conditioned(keys[0], ROWS, 6)
        noise = jax.random.cauchy(keys[2], (2, ROWS))
        y = x @ jax.random.normal(keys[1], (6,)) + 0.3 * noise
        return Instance(_hyper(keys[3]), jnp.zeros(6), (x[0], y[0]), (x[1], y[1]))

    def inner(p, h, b):
        error = b[0] @ p - b[1]
        return jnp.mean(jnp.sqrt(1 + error**2) - 1) + _penalty(p, h)

    def outer(p, h, b):
        size = jnp.abs(b[0] @ p - b[1]) / 3
        return jnp.mean(size + jnp.log1p(jnp.exp(-2 * size)))  # log(2 cosh)

    return Family(inner, outer, draw)


def _factorisation():
    def fit(p, h, b):
        return 0.5 * jnp.mean(b[1] * (p["u"] @ p["v"].T - b[0]) ** 2)

    def draw(key):
        keys = jax.random.split(key, 6)
        full = jax.random.normal(keys[0], (8, 2)) @ jax.random.normal(keys[1], (2, 6))
        full = full + 0.1 * jax.random.normal(keys[2], full.shape)
        seen = jax.random.bernoulli(keys[3], 0.7, full.shape).astype(full.dtype)
        start = {
            "u": jax.random.normal(keys[4], (8, 2)),
            "v": jax.random.normal(keys[5], (6, 2)),
        }
        hyper = _hyper(keys[5], (), -6.0, -2.0)
        return Instance(hyper, start, (full, seen), (full, 1 - seen))

    # Weighted so that rotations of the factors are no flat direction.
    weights = jnp.array([1.0, 2.0])

    def inner(p, h, b):
        return fit(p, h, b) + _penalty(p["u"] * weights, h) + _penalty(p["v"], h)

    return Family(inner, fit, draw)


def _reweighting():
    """A weight for each training example, some of whose labels are wrong."""

    def draw(key):
        keys = jax.random.split(key, 5)
        x = _conditioned(keys[0], ROWS, 6)
        y = (x @ jax.random.normal(keys[1], (6,)) > 0).astype(x.dtype)
        wrong = jax.random.bernoulli(keys[2], 0.3, (ROWS,))
        labels = jnp.where(wrong, 1 - y[0], y[0])
        hyper = jax.random.normal(keys[3], (ROWS,))
        return Instance(hyper, jnp.zeros(6), (x[0], labels), (x[1], y[1]))

    def losses(p, b):
        return optax.losses.sigmoid_binary_cross_entropy(b[0] @ p, b[1])

    def inner(p, h, b):
        return jnp.mean(jax.nn.sigmoid(h) * losses(p, b)) + 5e-4 * jnp.sum(p**2)

    return Family(inner, lambda p, h, b: jnp.mean(losses(p, b)), draw)


def _scaled():
    """Ridge regression whose params, data and losses are scaled by 1e-6 to 1e6."""
    plain = _ridge()

    def draw(key):
        base = plain.draw(key)
        keys = jax.random.split(jax.random.fold_in(key, 1), 3)
        scale = [10 ** jax.random.uniform(k, minval=-6.0, maxval=6.0) for k in keys]
        data = lambda batch: (batch[0], batch[1] * scale[0], scale[1], scale[2])
        return Instance(base.hyper, base.start, data(base.train), data(base.valid))

    def inner(p, h, b):
        return b[2] * plain.inner(p, h, b[:2])

    return Family(inner, lambda p, h, b: b[3] * _mse(p, h, b[:2]), draw)


def _poisson():
    def fit(p, h, b):
        rate = b[0] @ p
        return jnp.mean(jnp.exp(rate) - b[1] * rate)

    def draw(key):
        keys = jax.random.split(key, 4)
        x = _conditioned(keys[0], ROWS, 5)
        rate = jnp.exp(jnp.clip(x @ jax.random.normal(keys[1], (5,)), -3, 2))
        y = jax.random.poisson(keys[2], rate).astype(x.dtype)
        return Instance(_hyper(keys[3], (5,)), jnp.zeros(5), (x[0], y[0]), (x[1], y[1]))

    inner = lambda p, h, b: fit(p, h, b) + _penalty(p, h)
    return Family(inner, fit, draw)


def _cell():
    """The fixed point of a layer whose Jacobian is not symmetric."""

    def draw(key):
        keys = jax.random.split(key, 5)
        matrix = jax.random.normal(keys[0], (8, 8)) / 8**0.5
        norm = jax.random.uniform(keys[1], minval=0.3, maxval=1.2)
        x = jax.random.normal(keys[2], (8,))
        target = jax.random.normal(keys[3], (8,))
        hyper = jax.random.normal(keys[4], (8,))
        return Instance(hyper, jnp.zeros(8), (norm * matrix, x), (target,))

    def apply(z, h, b):
        return jnp.tanh(b[0] @ z + h * b[1])

    outer = lambda z, h, b: jnp.sum((z - b[0]) ** 2)
    return Family(apply, outer, draw, minimise=False)


FAMILIES: dict[str, Family] = {
    "ridge": _ridge(),
    "ridge with a large bias": _biased_ridge(),
    "scaled ridge": _scaled(),
    "logistic": _logistic(False),
    "logistic, per feature": _logistic(True),
    "softmax": _softmax(),
    "Poisson": _poisson(),
    "Huber": _huber(),
    "re-weighting": _reweighting(),
    "network": _network(),
    "factorisation": _factorisation(),
    "fixed point": _cell(),
}
