"""The network that the benchmarks train."""

import jax
import jax.numpy as jnp
import optax


def make_params(key, widths):
    """Weights of a network without biases, one matrix for each layer."""
    keys = jax.random.split(key, len(widths) - 1)
    return [
        jax.random.normal(k, (fan_in, fan_out)) / jnp.sqrt(fan_in)
        for k, fan_in, fan_out in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def logits_of(params, hyper, batch):
    """The logits of a batch of rows and labels."""
    x, _ = batch
    for weight in params[:-1]:
        x = jnp.tanh(x @ weight)
    return x @ params[-1]


def cross_entropy(params, hyper, batch):
    """The mean loss of a batch of rows and labels."""
    logits, y = logits_of(params, hyper, batch), batch[1]
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, y))
