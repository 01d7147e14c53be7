"""Losses evaluated on a few rows at a time: the same hypergradient in less memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from problems import relative_error


ROWS, WIDTH = 24, 4


def loss(params, hyper, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["in"])
    fit = jnp.mean((hidden @ params["out"] - y) ** 2)
    return fit + jnp.sum(jnp.exp(hyper) * jnp.sum(params["in"] ** 2, axis=1))


KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "in": jax.random.normal(KEYS[0], (WIDTH, 3)),
    "out": jax.random.normal(KEYS[1], (3,)),
}
DATA = (
    jax.random.normal(KEYS[2], (ROWS, WIDTH)),
    jax.random.normal(KEYS[3], (ROWS,)),
)
HYPER = jnp.linspace(-1.5, -0.5, WIDTH)
WHOLE = mo.InnerProblem(loss, lambda hyper, key: PARAMS)


def hypergradient(problem, adjoint, num_steps=40):
    return mo.hypergradient(
        mo.BilevelProblem(problem, loss),
        HYPER,
        DATA,
        DATA,
        inner=mo.Descent(optax.sgd(0.05, momentum=0.9), num_steps),
        adjoint=adjoint,
        throw=False,
    )[0]


@pytest.mark.one_of(3)
@pytest.mark.parametrize(
    "adjoint, num_steps",
    [
        (mo.UnrolledAdjoint(), 10),
        (mo.UnrolledAdjoint(mo.memory.Blocks()), 10),
        (mo.ForwardAdjoint(), 10),
        (mo.TruncatedAdjoint(5), 10),
        (mo.ImplicitAdjoint(mo.CG(rtol=1e-12)), 2000),
        (mo.ImplicitAdjoint(mo.CG(rtol=1e-12), newton_steps=1), 1000),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, mo.extend.AbstractAdjoint) else str(x),
)
def test_chunks_add_up(adjoint, num_steps):
    want = hypergradient(WHOLE, adjoint, num_steps)
    got = hypergradient(mo.InChunks(WHOLE, 6), adjoint, num_steps)
    assert np.all(np.isfinite(want)) and np.any(want != 0)
    # Rounding in two inner solves, seen through the condition of the linear system.
    assert relative_error(got, [want]) < 1e-7


@pytest.mark.ci
def test_derivatives_of_data_and_closed_over_arrays():
    def value(shift, x, cut):
        problem = mo.InnerProblem(
            lambda params, hyper, batch: loss(params, hyper + shift, batch)
        )
        if cut:
            problem = mo.InChunks(problem, 8)
        solution = mo.solve_inner(
            problem,
            HYPER,
            (x, DATA[1]),
            params=PARAMS,
            solver=mo.Descent(optax.sgd(0.05), 6),
            adjoint=mo.UnrolledAdjoint(),
        )
        return loss(solution.value, HYPER, DATA)

    whole, cut = (
        jax.jit(jax.grad(value, (0, 1)), static_argnums=2)(0.1, DATA[0], cut)
        for cut in (False, True)
    )
    for ours, plain in zip(cut, whole, strict=True):
        assert relative_error(ours, [plain]) < 1e-12
    batched = jax.vmap(lambda s: jax.grad(value)(s, DATA[0], True))(jnp.array([0.1, 0.3]))
    np.testing.assert_allclose(batched[0], whole[0], rtol=1e-12)


@pytest.mark.ci
def test_memory_is_that_of_a_chunk():
    depth, width, rows = 8, 16, 2048

    def deep(params, hyper, batch):
        x, y = batch
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0]
        return jnp.mean((x - y) ** 2) + hyper * jnp.sum(params**2)

    def size(problem):
        def gradient(hyper, params, train, valid):
            return mo.hypergradient(
                mo.BilevelProblem(problem, deep),
                hyper,
                train,
                valid,
                params=params,
                inner=mo.Descent(optax.sgd(0.1), 10),
                adjoint=mo.ImplicitAdjoint(),
                throw=False,
            )[0]

        params = jax.ShapeDtypeStruct((depth, width, width), jnp.float32)
        train = (jax.ShapeDtypeStruct((rows, width), jnp.float32),) * 2
        valid = (jax.ShapeDtypeStruct((16, width), jnp.float32),) * 2
        hyper = jax.ShapeDtypeStruct((), jnp.float32)
        compiled = jax.jit(gradient).lower(hyper, params, train, valid).compile()
        analysis: Any = compiled.memory_analysis()
        return analysis.temp_size_in_bytes

    whole = mo.InnerProblem(deep)
    # 32 chunks. Some copies of the data and vectors like the params are left.
    assert size(mo.InChunks(whole, 64)) < size(whole) / 5


def test_each_chunk_has_a_key_of_its_own():
    def noisy(params, hyper, batch, key):
        noise = jax.random.normal(key, batch.shape)
        return jnp.mean((params - hyper * (batch + noise)) ** 2)

    problem = mo.InChunks(mo.InnerProblem(noisy), 2)
    key = jax.random.key(3)
    batch = jnp.arange(8.0)
    got = problem.evaluate(jnp.array(0.5), jnp.array(2.0), batch, key, None).value
    parts = [
        noisy(0.5, 2.0, batch.reshape(2, 4)[:, i], jax.random.fold_in(key, i))
        for i in range(4)
    ]
    np.testing.assert_allclose(got, np.mean(parts), rtol=1e-12)


def _any(x: Any) -> Any:
    return x


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: mo.InChunks(WHOLE, 0), "`chunk_size` must be at least 1"),
        (lambda: mo.InChunks(_any(loss), 4), "needs a problem with a loss"),
        (
            lambda: mo.InChunks(mo.InnerProblem(loss, has_aux=True), 4),
            "auxiliary outputs and model",
        ),
        (
            lambda: hypergradient(mo.InChunks(WHOLE, 7), mo.UnrolledAdjoint()),
            "cannot cut 24 rows into chunks of 7",
        ),
        (
            lambda: mo.InChunks(WHOLE, 2).evaluate(
                PARAMS, HYPER, (jnp.ones((4, 4)), 1.0 * jnp.ones(())), KEYS[0], None
            ),
            "along their leading axis",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
