"""Conditions on two losses for a best-response network to be trained on them."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from .._best_response import best_responses, bind, ordinary, response_filter
from .._core._types import Hyper, Key, ModelState, Params
from .._jaxpr._rewrite import inner_jaxprs
from .._problem import BilevelProblem
from ._perturbed import Groups


_NUM_PROBES = 8  # groups that are looked at
_NUM_DRAWS = 16  # of what is random in a loss
_NUM_PAIRS = 4  # of rows, or groups of them
_RTOL = 1e-3  # far above what float32 leaves in full precision
_HALF_RTOL = 5e-2  # and bfloat16, whose numbers are 0.004 apart

_EACH_ITS_OWN = (
    "Each example sees `hyper` perturbed in its own way, so take `jnp.mean` over examples, "
    "and look for shapes that broadcast, such as (n, 1) and (n,). Where rows are coupled "
    "on purpose, as by batch normalisation, use `examples_per_perturbation=None`."
)


def check_losses(
    problem: BilevelProblem,
    params: Params,
    hyper: Hyper,
    train: Groups,
    valid: Groups,
    key: Key,
    state: ModelState,
) -> None:
    """Raise a `ValueError` where a loss does not see the response of the params, or is
    no mean over the rows of a batch.

    Both would train a response that is wrong without a word, and both can be seen from a
    few evaluations.
    """
    for outer, groups, name in (
        (False, train, "the inner loss"),
        (True, valid, "the outer loss"),
    ):
        # Accelerators round what enters a product otherwise.
        with jax.default_matmul_precision("highest"):
            values, in_half = _probe(
                problem, outer, params, hyper, groups.first(_NUM_PROBES), key, state
            )
        if any(isinstance(value, jax.core.Tracer) for value in values):
            continue  # inside somebody's own `jit`
        rtol = _HALF_RTOL if in_half else _RTOL
        with np.errstate(invalid="ignore"):
            _judge(name, rtol, *(np.asarray(value, float) for value in values))


def _judge(name: str, rtol: float, bounds, plains, wholes, means, pairs) -> None:
    def differ(a, b, atol=0.0):
        # Infinite and NaN losses are the run's to report.
        return abs(a - b) > rtol * max(abs(a), abs(b)) + 1e-6 + atol

    for bound, plain in zip(bounds, plains):
        if differ(bound, plain) or np.isfinite(bound) != np.isfinite(plain):
            raise ValueError(
                f"{name.capitalize()} does not see the response of the params: with "
                f"best-response layers it is {bound:.6g}, with ordinary layers of the "
                f"same weights {plain:.6g}. It reads arrays of the params directly, as "
                "`jax.tree.leaves(params)` does. Call the layers, write penalties with "
                "`metaopt.nn.squared_norm(params)`, and read a weight as `layer.weight`."
            )
    if not len(wholes):
        return
    # Two draws of dropout differ: by chance, where their mean does not.
    whole, mean = np.mean(wholes), np.mean(means)
    noise = np.std(wholes - means) / len(wholes) ** 0.5
    if differ(whole, mean, 6 * noise) or np.isfinite(whole) != np.isfinite(mean):
        raise ValueError(
            f"{name.capitalize()} is no mean over the rows of a batch: it is {whole:.6g} "
            f"on all of them at once and {mean:.6g} on the mean over single ones. "
            f"{_EACH_ITS_OWN}"
        )
    for mixed, alike in pairs:
        if differ(mixed, alike):
            raise ValueError(
                f"{name.capitalize()} is no mean over the rows of a batch, which are "
                f"coupled in it: it is {mixed:.6g} on two rows together and {alike:.6g} on "
                f"each of them twice. {_EACH_ITS_OWN}"
            )


@eqx.filter_jit
def _probe(
    problem: BilevelProblem,
    outer: bool,
    params: Params,
    hyper: Hyper,
    groups: Groups,
    key: Key,
    state: ModelState,
):
    """The numbers that `_judge` compares, and whether the loss uses half precision."""

    def loss(params, batch, key):
        if outer:
            return problem.evaluate_outer(params, hyper, batch, key, state)[0]
        return problem.inner.evaluate(params, hyper, batch, key, state).value

    batch = groups.whole()
    in_half = _computes_in_half(jax.make_jaxpr(lambda: loss(params, batch, key))())
    bounds, plains = _bound_and_plain(lambda model: loss(model, batch, key), params, key)
    if groups.num_groups == 1:
        none = jnp.zeros(0)
        return (bounds, plains, none, none, jnp.zeros((0, 2))), in_half

    def whole_and_mean(key):
        keys = jax.random.split(key, groups.num_groups)
        single = groups.map(lambda rows, key: loss(params, rows, key), keys)
        return loss(params, batch, key), jnp.mean(single)

    draws = jax.random.split(key, _NUM_DRAWS)
    wholes, means = jax.lax.map(whole_and_mean, draws)
    coupled = _coupled_pairs(lambda rows: loss(params, rows, key), groups)
    return (bounds, plains, wholes, means, coupled), in_half


def _bound_and_plain(loss: Callable[[Params], Any], params: Params, key: Key):
    """The loss of best-response layers and of ordinary ones of the same weights, for a
    response as large as the weights and for none."""
    response, general = eqx.partition(params, response_filter(params))
    leaves, structure = jax.tree.flatten(response)
    keys = jax.random.split(key, len(leaves))
    noise = [
        jax.random.normal(k, a.shape, a.dtype) if eqx.is_inexact_array(a) else None
        for a, k in zip(leaves, keys)
    ]
    # With these, the response of a weight is as large as the weight.
    num_hyper = best_responses(params)[0].num_hyper
    vector = jax.random.rademacher(key, (num_hyper,), float) / num_hyper**0.5

    def both(noise, vector):
        moved = [a if b is None else a + b for a, b in zip(leaves, noise)]
        model = eqx.combine(jax.tree.unflatten(structure, moved), general)
        return loss(bind(model, vector)), loss(ordinary(model, vector))

    # At zero any response is none: where it is large, even a small penalty that reads
    # it shows.
    vectors = jnp.stack([vector, jnp.zeros_like(vector)])
    noises = jax.tree.map(lambda a: jnp.stack([a, 100 * a]), noise)
    return jax.vmap(both)(noises, vectors)


def _coupled_pairs(loss: Callable[[Any], Any], groups: Groups):
    """The loss of two groups of rows together, and the mean of that of each of them twice.

    In a mean, whatever its draws, what a row contributes does not depend on the others:
    the loss at (a, b) and (b, a) is as large as at (a, a) and (b, b).
    """
    half = min(groups.num_groups // 2, _NUM_PAIRS)
    orders = np.array([[0, 1], [1, 0], [0, 0], [1, 1]])

    def pairs(leaf):
        rest = leaf.shape[2:]
        leaf = leaf[: 2 * half].reshape(half, 2, -1, *rest)[:, orders]
        return leaf.reshape(half, 4, -1, *rest)

    pair = lambda arrays: loss(eqx.combine(arrays, groups.rest))
    four = jax.vmap(jax.vmap(pair))(jax.tree.map(pairs, groups.arrays))
    return four.reshape(half, 2, 2).mean(axis=2)


def _computes_in_half(jaxpr) -> bool:
    is_half = lambda v: (
        jnp.issubdtype(v.aval.dtype, jnp.floating) and (jnp.finfo(v.aval.dtype).bits < 32)
    )
    return any(
        any(map(is_half, eqn.outvars)) or any(map(_computes_in_half, inner_jaxprs(eqn)))
        for eqn in jaxpr.eqns
    )
