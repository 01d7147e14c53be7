"""Compares schedules tuned by hypergradient with random search and TPE, at equal budget.

(docstring later)
"""

import argparse
import pathlib
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import metaopt as mo


KNOTS = 5


def dense(key, fan_in, fan_out, gain=1.0):
    weight = jax.random.normal(key, (fan_in, fan_out)) * gain / fan_in**0.5
    return {"weight": weight, "bias": jnp.zeros(fan_out)}


def apply(layer, x):
    return x @ layer["weight"] + layer["bias"]


def losses(logits, labels):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


class Network(eqx.Module):
    """A network of dense layers."""

    widths: tuple[int, ...] = eqx.field(static=True)

    def init(self, key):
        keys = jax.random.split(key, len(self.widths) - 1)
        pairs = zip(self.widths[:-1], self.widths[1:])
        return {f"layer{i}": dense(k, *p) for i, (k, p) in enumerate(zip(keys, pairs))}

    def __call__(self, params, x):
        *hidden, last = params.values()
        for layer in hidden:
            x = jnp.tanh(apply(layer, x))
        return apply(last, x)


class ConvNet(eqx.Module):
    """Strided convolutions, and a dense layer on their flattened output."""

    channels: tuple[int, ...] = eqx.field(static=True)

    def init(self, key):
        *keys, last = jax.random.split(key, len(self.channels) + 1)
        params, before, side = {}, 1, 28
        for i, (k, after) in enumerate(zip(keys, self.channels)):
            params[f"conv{i}"] = dense(k, 9 * before, after, 2**0.5)
            before, side = after, (side + 1) // 2
        return params | {"readout": dense(last, side * side * before, 10)}

    def __call__(self, params, x):
        *convs, readout = params.values()
        x = x.reshape(-1, 28, 28, 1)
        for layer in convs:
            x = jax.nn.relu(apply(layer, patches(x)))
        return apply(readout, x.reshape(x.shape[0], -1))


def patches(x):
    """The 3 x 3 neighbourhoods of every second pixel, as one row each."""
    side = (x.shape[1] + 1) // 2
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [
        x[:, i : i + 2 * side - 1 : 2, j : j + 2 * side - 1 : 2]
        for i in range(3)
        for j in range(3)
    ]
    return jnp.concatenate(parts, axis=-1)


class Transformer(eqx.Module):
    """A causal transformer of pre-normalised blocks."""

    num_characters: int = eqx.field(static=True)
    width: int = eqx.field(static=True)
    num_blocks: int = eqx.field(static=True)
    length: int = eqx.field(static=True)
    num_heads: int = eqx.field(static=True)

    def init(self, key):
        keys = iter(jax.random.split(key, 3 + 4 * self.num_blocks))
        d = self.width
        table = lambda rows: 0.1 * jax.random.normal(next(keys), (rows, d))
        params: dict[str, Any] = {
            "embedding": {"weight": table(self.num_characters)},
            "position": {"weight": table(self.length)},
        }
        for i in range(self.num_blocks):
            params[f"block{i}"] = {
                "scale": jnp.ones((2, d)),
                "qkv": dense(next(keys), d, 3 * d),
                "mix": dense(next(keys), d, d),
                "up": dense(next(keys), d, 4 * d),
                "down": dense(next(keys), 4 * d, d),
            }
        return params | {"readout": dense(next(keys), d, self.num_characters)}

    def __call__(self, params, x):
        h = params["embedding"]["weight"][x] + params["position"]["weight"][: x.shape[1]]
        for i in range(self.num_blocks):
            block = params[f"block{i}"]
            h = h + self.attend(block, normalised(h) * block["scale"][0])
            up = jax.nn.gelu(apply(block["up"], normalised(h) * block["scale"][1]))
            h = h + apply(block["down"], up)
        return apply(params["readout"], normalised(h))

    def attend(self, block, x):
        shape = *x.shape[:2], 3, self.num_heads, -1
        q, k, v = jnp.moveaxis(apply(block["qkv"], x).reshape(shape), 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return apply(block["mix"], mixed.reshape(x.shape))


def normalised(x):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)


class Training(mo.extend.AbstractInnerProblem):
    model: Any

    def init(self, hyper, key):
        return self.model.init(key)

    def loss(self, params, hyper, batch):
        x, y = batch
        return jnp.mean(losses(self.model(params, x), y))


def accuracy(model):
    def fraction(params, hyper, batch):
        x, y = batch
        return jnp.mean(jnp.argmax(model(params, x), axis=-1) == y)

    return fraction


def default_hyper(params, num_steps, peak, friction, decay, knots=KNOTS):
    return {
        "curve": mo.hyper.WarmupCosine(peak, num_steps),
        "friction": mo.hyper.Interval(friction, 0.0, 1.0),
        "decay": mo.hyper.Positive(decay),
        "rates": mo.hyper.PerLeaf(mo.hyper.Positive(jnp.ones(knots)), params, "*"),
        "decays": mo.hyper.PerLeaf(mo.hyper.Positive(1.0), params, "*"),
    }


def optimizer(direction, num_steps):
    def build(hyper):
        return optax.chain(direction(hyper), scale_each(hyper, num_steps))

    return build


def scale_each(hyper, num_steps):
    """Weight decay and learning rate of each array of the params."""
    # Computed once here, and not in the update, which is compiled with usable slopes.
    logs = jnp.log(jnp.stack(list(hyper["rates"].value.values())))
    knots = logs.shape[1]
    hats = jax.vmap(
        lambda row: jnp.interp(jnp.linspace(0, knots - 1, num_steps), jnp.arange(knots), row)
    )(jnp.eye(knots))
    rates = hyper["curve"].value[:, None] * jnp.exp((logs @ hats).T)
    decays = hyper["decay"].value * jnp.stack(list(hyper["decays"].value.values()))

    def update(updates, step, params):
        leaves, structure = jax.tree.flatten(updates)
        now = rates[step]
        scaled = [
            -now[i] * (u + decays[i] * w)
            for i, (u, w) in enumerate(zip(leaves, jax.tree.leaves(params)))
        ]
        return jax.tree.unflatten(structure, scaled), step + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), int), update)


def momentum(hyper):
    return optax.ema(1 - hyper["friction"].value, debias=False)


def adam(hyper):
    return optax.scale_by_adam(b1=1 - hyper["friction"].value, b2=0.99, eps=1e-6)
