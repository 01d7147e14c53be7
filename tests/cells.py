"""Contracting cells of equilibrium layers, whose fixed points several modules compute."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


WIDTH, INPUTS = 6, 3


def normal(shape, seed=0, dtype=jnp.float64):
    """Normal numbers that are the same in every run."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def contraction(size=WIDTH, norm=0.7, seed=0):
    """A random matrix of that spectral norm."""
    matrix = normal((size, size), seed)
    return norm * matrix / jnp.linalg.norm(matrix, 2)


class Tanh(eqx.Module):
    """One affine map and a tanh."""

    weight: jax.Array
    inputs: jax.Array
    bias: jax.Array

    def __init__(self, norm=0.7, width=WIDTH):
        self.weight = contraction(width, norm)
        self.inputs = normal((width, INPUTS), 1)
        self.bias = normal((width,), 2)

    def __call__(self, z, x):
        return jnp.tanh(self.weight @ z + self.inputs @ x + self.bias)


class Scales(eqx.Module):
    """A state of two scales, in a dictionary, that act on each other."""

    fine: Tanh
    coarse: Tanh

    def __init__(self):
        self.fine, self.coarse = Tanh(0.4), Tanh(0.3, width=2)

    def __call__(self, z, x):
        fine = self.fine(z["fine"], x + 0.1 * jnp.sum(z["coarse"]))
        return {"fine": fine, "coarse": self.coarse(z["coarse"], x + 0.1 * fine[:INPUTS])}


def value_of(z):
    """Some number that all of the state enters."""
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(z)])
    return jnp.sum(jnp.sin(flat) * jnp.cos(jnp.arange(flat.size)))
