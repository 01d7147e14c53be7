"""Data of other libraries, loaders, complex and empty arrays."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo


class Tensor:
    """What a tensor of another library shows of itself."""

    def __init__(self, values):
        self.values = np.asarray(values)

    def __array__(self, dtype=None, copy=None):
        return self.values


class Capsule:
    def __init__(self, values):
        self.values = np.asarray(values)

    def __dlpack__(self, **kwargs):
        return self.values.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


class OnDevice(Tensor):
    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert cuda tensor")


class Loader:
    """Iterable and no iterator; three batches in an epoch."""

    def __init__(self):
        self.num_started = 0

    def __iter__(self):
        self.num_started += 1
        for value in (1.0, 2.0, 3.0):
            yield Tensor(np.full((2,), value))

    def __len__(self):
        return 3


class Rows:
    def __getitem__(self, index):
        return np.ones(3)

    def __len__(self):
        return 4


PROBLEM = mo.BilevelProblem(
    lambda p, h, b: jnp.mean((p - b) ** 2) + jnp.exp(h) * p**2,
    lambda p, h, b: jnp.mean((p - b) ** 2),
)
INNER = mo.Descent(optax.sgd(0.25), num_steps=2)
SOLVER = mo.NestedSolver(INNER, mo.UnrolledAdjoint(), outer=optax.sgd(0.1))
BATCH = np.ones(2)


def tuned(train: Any, **kwargs):
    start = jnp.array(0.0)
    return mo.solve_bilevel(
        PROBLEM, -2.0, train, BATCH, params=start, solver=SOLVER, num_steps=4, **kwargs
    )


def slope(train: Any, problem=PROBLEM, params: Any = 0.0):
    start = jnp.asarray(params)
    return mo.hypergradient(
        problem, -2.0, train, BATCH, params=start, inner=INNER, adjoint=mo.UnrolledAdjoint()
    )[0]


@pytest.mark.parametrize("kind", [Tensor, Capsule])
def test_arrays_of_other_libraries_are_taken(kind):
    np.testing.assert_allclose(slope(kind(BATCH)), slope(BATCH), rtol=1e-7)


def test_loader_gives_a_batch_for_each_outer_step_and_starts_anew():
    loader = Loader()
    got = tuned(loader)
    want = tuned(iter([np.full(2, value) for value in (1.0, 2.0, 3.0, 1.0)]))
    np.testing.assert_allclose(got.history.outer_loss, want.history.outer_loss, rtol=1e-7)
    assert loader.num_started == 2


def test_inner_batches_give_a_batch_for_each_inner_step():
    got = tuned(mo.InnerBatches(Loader(), 2))
    values = [(1.0, 2.0), (3.0, 1.0), (2.0, 3.0), (1.0, 2.0)]
    stacked = [np.stack([np.full(2, v) for v in pair]) for pair in values]
    want = tuned(map(mo.BatchSequence, stacked))
    np.testing.assert_allclose(got.history.outer_loss, want.history.outer_loss, rtol=1e-7)
    with pytest.raises(ValueError, match="`num_steps` must be at least 1"):
        mo.InnerBatches(Loader(), 0)
    # An iterator cannot be started anew: what is left over is not used.
    assert len(list(mo.InnerBatches(iter(Loader()), 2))) == 1


def test_inner_batches_of_differing_shapes_are_named():
    batches = [{"x": np.ones((4, 2))}, {"x": np.ones((3, 2))}]
    with pytest.raises(ValueError, match=r"number 2 of the same outer step .*drop_last"):
        next(iter(mo.InnerBatches(batches, 2)))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (Loader(), "`train` is a `Loader`, an iterable of batches.*next"),
        ((BATCH, Loader()), r"`train\[1\]` is a `Loader`"),
        (Rows(), "`train` is a `Rows`, a data set of rows.*numpy.stack"),
        ([1.0, 2.0], "`train` is a list of numbers.*numpy.asarray"),
        ({"x": [[1, 2], [3, 4]]}, r"`train\['x'\]` is a list of numbers"),
        (np.array([BATCH, None], object), "`train` is an array of dtype object"),
        (OnDevice(BATCH), "`train`, of type `OnDevice`, cannot be read.*cuda.*CPU"),
    ],
)
def test_what_cannot_be_taken_says_what_to_write(data, text):
    with pytest.raises(TypeError, match=text):
        slope(data)


def test_entry_points_name_a_loader():
    problem, start = PROBLEM.inner, jnp.array(0.0)
    how: Any = {"adjoint": mo.UnrolledAdjoint()}
    calls = [
        lambda: mo.solve_inner(problem, -2.0, Loader(), params=start, solver=INNER, **how),
        lambda: mo.check_hypergradient(PROBLEM, -2.0, start, Loader(), inner=INNER, **how),
        lambda: (
            mo.few_shot.Task(Loader(), Loader())
            and mo.few_shot.MAML(lambda m, b: 0.0, INNER).value_and_grad(
                start, mo.few_shot.Task(Loader(), Loader())
            )
        ),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="is a `Loader`, an iterable of batches"):
            call()


def test_complex_data_are_data_like_others():
    inner = lambda p, h, b: jnp.mean(jnp.abs(b * p - 1) ** 2) + jnp.exp(h) * p**2
    problem = mo.BilevelProblem(inner, PROBLEM.outer_loss)
    data = np.array([1 + 1j, 2 - 1j], np.complex64)
    closed = mo.BilevelProblem(lambda p, h, b: inner(p, h, data), PROBLEM.outer_loss)
    np.testing.assert_allclose(slope(data, problem), slope(None, closed), rtol=1e-6)
    with pytest.raises(ValueError, match="`params` is complex"):
        slope(BATCH, params=1j)


def test_empty_arrays_beside_others():
    def inner(p, h, b):
        fit = jnp.mean((p[0] - b["y"]) ** 2)
        return fit + jnp.exp(h["a"]) * p[0] ** 2 + jnp.sum(p[1] ** 2)

    problem = mo.BilevelProblem(inner, lambda p, h, b: jnp.mean((p[0] - b) ** 2))
    none = jnp.zeros((0, 3))
    for adjoint in (mo.UnrolledAdjoint(), mo.ImplicitAdjoint(inner_rtol=jnp.inf)):
        gradient, _ = mo.hypergradient(
            problem,
            {"a": -2.0, "none": none},
            {"y": BATCH, "none": jnp.zeros((2, 0))},
            BATCH,
            params=(jnp.array(0.0), none),
            inner=INNER,
            adjoint=adjoint,
        )
        assert gradient["none"].shape == (0, 3) and jnp.isfinite(gradient["a"])
    with pytest.raises(ValueError, match="`train` is an empty array"):
        slope(np.zeros(0))


def test_static_parts_of_params_pass():
    params = (jnp.array(0.0), range(3), jnp.float32)
    inner = lambda p, h, b: jnp.mean((p[0] - b) ** 2) + jnp.exp(h) * p[0] ** 2
    problem = mo.InnerProblem(inner)
    adjoint = mo.UnrolledAdjoint()
    found = mo.solve_inner(
        problem, -2.0, BATCH, params=params, solver=INNER, adjoint=adjoint
    )
    assert found.value[1] == range(3) and eqx.is_array(found.value[0])
    assert jax.tree.structure(found.value) == jax.tree.structure(params)


def test_warning_about_float64_points_at_the_line_of_the_user():
    with jax.enable_x64(False):
        with pytest.warns(UserWarning, match="is float64") as caught:
            slope(BATCH)
    assert {warning.filename for warning in caught} == {__file__}


def test_run_refuses_what_it_cannot_do_before_compiling():
    for callback in (lambda step, state: None, 3, mo.callbacks.Progress):
        with pytest.raises(ValueError, match="or functions of one argument, the run; got"):
            tuned(BATCH, callbacks=[callback])
    with pytest.raises(ValueError, match=r"must be a list, such as .*; got function"):
        tuned(BATCH, callbacks=lambda run: None)
    with pytest.raises(ValueError, match="inside `jax.jit`"):
        jax.jit(
            lambda p: (
                mo.solve_bilevel(
                    PROBLEM, -2.0, BATCH, BATCH, params=p, solver=SOLVER, num_steps=1
                ).outer_loss
            )
        )(jnp.array(0.0))


@pytest.mark.parametrize("kind", [list, tuple])
def test_list_of_batches_is_named(kind):
    loss = lambda params, hyper, batch: jnp.mean((batch[0] @ params - batch[1]) ** 2)
    batches = kind((np.ones((3, 2)), np.ones(3)) for _ in range(4))
    problem, data = mo.BilevelProblem(loss, loss), (np.ones((3, 2)), np.ones(3))
    with pytest.raises(TypeError) as caught:
        mo.hypergradient(
            problem,
            jnp.ones(2),
            batches,
            data,
            params=jnp.ones(2),
            inner=mo.Descent(optax.sgd(0.1), 2),
            adjoint=mo.UnrolledAdjoint(),
        )
    notes = " ".join(caught.value.__notes__)
    assert f"a {kind.__name__} of length 4" in notes
    assert "`iter(batches)`" in notes and "`metaopt.BatchSequence`" in notes


def test_batches_of_differing_rows_and_none_are_named():
    loss = lambda params, hyper, batch: jnp.mean((batch[0] @ params - batch[1]) ** 2)
    problem = mo.InnerProblem(loss)
    options = {"solver": mo.Descent(optax.sgd(0.1), 2), "adjoint": mo.UnrolledAdjoint()}
    batches = [(np.ones((n, 2)), np.ones(n)) for n in (3, 2)]
    with pytest.raises(ValueError, match="3 rows.*2 rows.*list of batches.*iter"):
        mo.solve_inner(problem, 1.0, batches, params=jnp.ones(2), **options)
    with pytest.raises(TypeError, match="`train` is an empty list"):
        mo.solve_inner(problem, 1.0, [], params=jnp.ones(2), **options)
