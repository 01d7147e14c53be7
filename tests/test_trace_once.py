"""Functions that are traced once within one call of the user."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from metaopt._core._trace_once import call_once, tracing_once


class Scaled(eqx.Module):
    scale: jax.Array
    traces: list = eqx.field(static=True)

    def loss(self, x, *, power=2):
        self.traces.append(power)
        return self.scale * jnp.sum(x**power), {"kept": 1.0, "name": "loss"}


def value(module, x, **options):
    return call_once(module.loss, x, **options)[0]


class Counter(list):
    """A list that can be hashed: static fields are."""

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]


def test_a_method_is_traced_once_whatever_its_arrays():
    traces = Counter()

    @jax.jit
    def both(scale, x):
        with tracing_once():
            slope = jax.grad(lambda x: value(Scaled(scale, traces), x))(x)
            curved = jax.vmap(lambda x: value(Scaled(2 * scale, traces), x))
            again, cube = curved(x[None]), value(Scaled(scale, traces), x, power=3)
        return slope, again, cube

    slope, again, cube = both(jnp.asarray(3.0), jnp.arange(3.0))
    assert traces == [2, 3]
    np.testing.assert_allclose(slope, 6 * np.arange(3.0))
    np.testing.assert_allclose(again, [30.0])
    np.testing.assert_allclose(cube, 27.0)


def test_constants_are_arrays():
    with tracing_once():
        for _ in range(2):
            one, truth, text = call_once(
                lambda x: (jnp.asarray(1.0), jnp.asarray(True), "text"), jnp.zeros(2)
            )
            assert isinstance(one, jax.Array) and isinstance(truth, jax.Array)
            assert one == 1 and truth and text == "text"


def test_nothing_is_kept_beyond_the_call():
    seen, limit = [], {"value": 1.0}

    def fn(x):
        seen.append(1)
        return limit["value"] * x

    def twice():
        with tracing_once():
            with tracing_once():
                first = call_once(fn, jnp.asarray(2.0))
            return first, call_once(fn, jnp.asarray(3.0))

    assert twice() == (2.0, 3.0) and len(seen) == 1
    limit["value"] = 10.0
    assert twice() == (20.0, 30.0) and len(seen) == 2
    # Outside of such a call a function is called as usual.
    assert call_once(fn, jnp.asarray(1.0)) == 10.0 and len(seen) == 3


def test_errors_are_those_of_the_function():
    def fn(x):
        raise KeyError("mine")

    with tracing_once():
        for _ in range(2):
            try:
                call_once(fn, jnp.zeros(()))
            except KeyError as error:
                assert error.args == ("mine",)
            else:
                raise AssertionError


def test_other_shapes_and_dtypes_are_other_programs():
    seen = []

    def fn(x):
        seen.append((x.shape, x.dtype))
        return 2 * x

    arguments = jnp.ones(2), jnp.ones(3), jnp.ones(3, jnp.float32), jnp.ones(2)
    with tracing_once():
        for x in arguments:
            out = call_once(fn, x)
            assert out.shape == x.shape and out.dtype == x.dtype
    assert seen == [(x.shape, x.dtype) for x in arguments[:3]]
