"""Small networks whose params are dictionaries of arrays."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp


def dense(key, fan_in, fan_out, gain=1.0):
    weight = jax.random.normal(key, (fan_in, fan_out)) * gain / fan_in**0.5
    return {"weight": weight, "bias": jnp.zeros(fan_out)}


def apply(layer, x):
    return x @ layer["weight"] + layer["bias"]


class Dense(eqx.Module):
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
        # A product: second derivatives of a look-up are slow.
        h = jax.nn.one_hot(x, self.num_characters) @ params["embedding"]["weight"]
        h = h + params["position"]["weight"][: x.shape[1]]
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
