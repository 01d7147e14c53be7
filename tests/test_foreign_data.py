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


# Batches of several arrays, at every entry point


X = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
Y = np.arange(12, dtype=np.int64) % 2
VALID = {"x": X[:4], "y": Y[:4]}


class Epochs:
    """Iterable and no iterator, like a loader."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class WithGradient(Tensor):
    """A tensor on the tape of its library."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")


def fit(params, hyper, batch):
    x, y = batch.values() if isinstance(batch, dict) else batch
    return jnp.mean((x @ params - y) ** 2)


def penalised(params, hyper, batch):
    return fit(params, hyper, batch) + jnp.exp(hyper) * jnp.sum(params**2)


FORMS = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "dict": lambda x, y: {"x": x, "y": y},
}
REGRESSION = mo.BilevelProblem(penalised, fit)
WEIGHTS = jnp.zeros(3, jnp.float32)


def batches(form: str, kind: Any = np.asarray, size: int = 4) -> list[Any]:
    starts = range(0, 12, size)
    parts = [(X[start : start + size], Y[start : start + size]) for start in starts]
    return [FORMS[form](kind(x), kind(y)) for x, y in parts]


def losses(train: Any, **kwargs) -> Any:
    """The outer losses of a run of more than an epoch."""
    problem, solver = REGRESSION, SOLVER
    options = {"params": WEIGHTS, "solver": solver, "num_steps": 5} | kwargs
    solution = mo.solve_bilevel(problem, -2.0, train, VALID, **options)
    return solution.history.outer_loss


def derivative(train: Any) -> Any:
    adjoint = mo.UnrolledAdjoint()
    options: Any = {"params": WEIGHTS, "inner": INNER, "adjoint": adjoint}
    return mo.hypergradient(REGRESSION, -2.0, train, VALID, **options)[0]


def solution(train: Any) -> Any:
    adjoint = mo.UnrolledAdjoint()
    options: Any = {"params": WEIGHTS, "solver": INNER, "adjoint": adjoint}
    return mo.solve_inner(REGRESSION.inner, -2.0, train, **options).value


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [Tensor, Capsule])
def test_one_batch_of_another_library(kind, form):
    theirs, ours = batches(form, kind)[0], batches("tuple")[0]
    np.testing.assert_allclose(solution(theirs), solution(ours), rtol=1e-6)
    np.testing.assert_allclose(derivative(theirs), derivative(ours), rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [np.asarray, Tensor, Capsule])
def test_loaders_of_other_libraries(kind, form):
    want = losses(Epochs(*batches("tuple")))
    np.testing.assert_allclose(losses(Epochs(*batches(form, kind))), want, rtol=1e-6)
    by_hand = iter(batches(form, kind) * 2)
    np.testing.assert_allclose(losses(by_hand), want, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [np.asarray, Tensor, Capsule])
def test_inner_batches_of_other_libraries(kind, form):
    want = losses(mo.InnerBatches(Epochs(*batches("tuple")), 2))
    got = losses(mo.InnerBatches(Epochs(*batches(form, kind)), 2))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_short_last_batch_of_a_loader():
    sizes = [len(batch[1]) for batch in batches("tuple", size=5)]
    assert sizes == [5, 5, 2]
    got = losses(Epochs(*batches("dict", Tensor, size=5)))
    want = losses(iter(batches("tuple", size=5) * 2))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_self_tuning_takes_loaders():
    class Linear(mo.extend.AbstractPredictionProblem):
        def init(self, hyper, key):
            model = eqx.nn.Linear(3, "scalar", key=key)
            return mo.nn.self_tuning(model, 1, tied=False, key=key)

        def predict(self, params, hyper, batch):
            return jax.vmap(params)(batch["x"])

        def criterion(self, predictions, params, hyper, batch):
            penalty = jnp.exp(hyper) * mo.nn.squared_norm(params)
            return jnp.mean((predictions - batch["y"]) ** 2) + penalty

    def error(params, hyper, batch):
        return jnp.mean((jax.vmap(params)(batch["x"]) - batch["y"]) ** 2)

    problem = mo.BilevelProblem(Linear(), error)
    solver = mo.SelfTuningSolver(params=optax.adam(0.01), hyper=optax.adam(0.05))
    run = lambda train, valid: mo.solve_bilevel(
        problem, -2.0, train, valid, solver=solver, num_steps=4
    )
    count = solver.train_steps * 4
    theirs = Epochs(*batches("dict", Tensor))
    got = run(mo.InnerBatches(theirs, solver.train_steps), theirs)
    ours = batches("dict") * count
    want = run(mo.InnerBatches(iter(ours), solver.train_steps), iter(ours))
    np.testing.assert_allclose(got.history.outer_loss, want.history.outer_loss, rtol=1e-6)


def test_few_shot_tasks_of_another_library():
    maml = mo.few_shot.MAML(lambda w, batch: fit(w, 0.0, batch), INNER)

    def learned(kind):
        x, y = kind(X.reshape(2, 6, 3)), kind(Y.reshape(2, 6))
        tasks = [{"x": x, "y": y}, {"x": x, "y": y}]
        return mo.few_shot.train(
            maml, WEIGHTS, iter([tuple(tasks)] * 3), outer=optax.sgd(0.1), num_steps=3
        ).history.outer_loss

    for kind in (Tensor, Capsule):
        np.testing.assert_allclose(learned(kind), learned(np.asarray), rtol=1e-6)


@pytest.mark.parametrize("take", [derivative, solution, losses])
@pytest.mark.parametrize("form", FORMS)
def test_tensors_that_require_a_gradient_are_named(take, form):
    place = {"tuple": r"\[0\]", "list": r"\[0\]", "dict": r"\['x'\]"}[form]
    data = FORMS[form](WithGradient(X), Y)
    data = Epochs(data) if take is losses else data
    with pytest.raises(TypeError, match=rf"`train{place}`.*requires grad.*detach"):
        take(data)


@pytest.mark.parametrize("take", [derivative, solution, losses])
def test_integers_that_do_not_fit_are_named(take):
    data: Any = {"x": Tensor(X), "y": Tensor(Y + 2**40)}
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match=r"`train\['y'\]` is int64 .* int32 cannot"):
            take(Epochs(data) if take is losses else data)


@pytest.mark.parametrize("take", [derivative, solution, losses])
def test_ragged_batches_are_named(take):
    whole = lambda data: Epochs(data) if take is losses else data
    with pytest.raises(ValueError, match=r"12 rows in `train\['x'\]`, 11 rows"):
        take(whole({"x": Tensor(X), "y": Tensor(Y[:-1])}))
    # Of a loader, lists are taken that are no ragged ones.
    error, text = (ValueError, "is a list of lists of differing lengths. Pad them")
    if take is not losses:
        error, text = TypeError, "is a list of numbers"
    with pytest.raises(error, match=rf"`train\['x'\]` {text}"):
        take(whole({"x": [[1.0, 2.0, 3.0], [1.0, 2.0]], "y": Y[:2]}))
    objects = np.empty(2, object)
    objects[:] = [np.ones(3), np.ones(2)]
    with pytest.raises(TypeError, match=r"`train\['x'\]` is an array of dtype object"):
        take(whole({"x": objects, "y": Y[:2]}))


def test_lists_of_numbers_are_taken_from_loaders():
    as_lists = [{"x": x.tolist(), "y": y.tolist()} for x, y in batches("tuple")]
    want = losses(Epochs(*batches("tuple")))
    np.testing.assert_allclose(losses(Epochs(*as_lists)), want, rtol=1e-6)
    want = losses(mo.InnerBatches(Epochs(*batches("tuple")), 2))
    got = losses(mo.InnerBatches(Epochs(*as_lists), 2))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    # Without a warning about float64, which the numbers of Python are not meant as.
    with jax.enable_x64(False):
        assert losses(Epochs(*as_lists)).dtype == np.float32


def test_inner_batches_name_what_they_cannot_read():
    inner = lambda data: next(iter(mo.InnerBatches([data, data], 2)))
    with pytest.raises(TypeError, match=r"`batches\[0\]`.*requires grad\. Move it"):
        inner((WithGradient(X), Y))
    with pytest.raises(ValueError, match=r"`batches\['x'\]` is a list of lists of diff"):
        inner({"x": [[1.0, 2.0], [1.0]]})


def test_dtypes_that_numpy_has_not():
    class Half(Capsule):
        def __init__(self, values):
            self.values = jnp.asarray(values, jnp.bfloat16)

        def __array__(self, dtype=None, copy=None):
            raise TypeError("Got unsupported ScalarType BFloat16")

    want = solution((jnp.asarray(X, jnp.bfloat16), Y))
    np.testing.assert_allclose(solution((Half(X), Y)), want, rtol=1e-6)


def test_few_shot_takes_loaders():
    maml = mo.few_shot.MAML(lambda w, batch: fit(w, 0.0, batch), INNER)
    tasks = [
        tuple({"x": c * X.reshape(2, 6, 3), "y": Y.reshape(2, 6)} for _ in range(2))
        for c in (1, 2, 3)
    ]
    run = lambda tasks, num_steps=5, **kwargs: mo.few_shot.train(
        maml,
        WEIGHTS,
        tasks,
        outer=optax.sgd(0.1),
        num_steps=num_steps,
        steps_per_call=2,
        **kwargs,
    )
    want = run(iter(tasks * 2))
    got = run(Epochs(*tasks))
    got_loss, want_loss = got.history.outer_loss, want.history.outer_loss
    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-6)
    # A run that goes on passes over the batches of the steps that were taken.
    first = run(Epochs(*tasks), num_steps=2)
    rest = run(Epochs(*tasks), state=first.state)
    np.testing.assert_allclose(rest.meta, want.meta, rtol=1e-6)
    with pytest.raises(ValueError, match="iterator or loader of batches; got list"):
        run(tasks)


# The libraries themselves, where they are installed


def test_real_torch_loaders():
    torch = pytest.importorskip("torch")
    data = pytest.importorskip("torch.utils.data")
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    loader = data.DataLoader(data.TensorDataset(x, y), batch_size=4)
    named = [{"x": row, "y": label} for row, label in zip(x, y)]
    for source in (loader, data.DataLoader(named, batch_size=4)):
        want = losses(Epochs(*batches("tuple")))
        np.testing.assert_allclose(losses(source), want, rtol=1e-6)
        got = losses(mo.InnerBatches(source, 2))
        want = losses(mo.InnerBatches(Epochs(*batches("tuple")), 2))
        np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(solution((x, y)), solution((X, Y)), rtol=1e-6)
    half = solution((jnp.asarray(X, jnp.bfloat16), Y))
    np.testing.assert_allclose(solution((x.bfloat16(), y)), half, rtol=1e-6)
    maml = mo.few_shot.MAML(lambda w, batch: fit(w, 0.0, batch), INNER)
    pair = (x.reshape(2, 6, 3), y.reshape(2, 6))
    tasks = data.DataLoader([(pair, pair)] * 2, batch_size=None)
    found = mo.few_shot.train(maml, WEIGHTS, tasks, outer=optax.sgd(0.1), num_steps=3)
    assert found.history.outer_loss.shape == (3,)
    with pytest.raises(TypeError, match=r"`train\[0\]`, of type `Tensor`.*requires grad"):
        solution((x.clone().requires_grad_(), y))
    with pytest.raises(TypeError, match="`train` is a `DataLoader`, an iterable"):
        solution(loader)
    with pytest.raises(TypeError, match="`train` is a `TensorDataset`, a data set of rows"):
        solution(data.TensorDataset(x, y))


def test_real_hugging_face_datasets():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"x": X.tolist(), "y": Y.tolist()})
    rows = rows.cast_column("x", datasets.Sequence(datasets.Value("float32")))
    arrays = rows.with_format("numpy")
    want = losses(Epochs(*batches("tuple")))
    by_batch = lambda: arrays.iter(batch_size=4)
    again = arrays.to_iterable_dataset().batch(4)  # which can be started anew
    np.testing.assert_allclose(losses(again), want, rtol=1e-6)
    got = losses(by_batch(), num_steps=3)
    np.testing.assert_allclose(got, want[:3], rtol=1e-6)
    np.testing.assert_allclose(solution(arrays[:]), solution((X, Y)), rtol=1e-6)
    got = losses(rows.iter(batch_size=4), num_steps=3)
    np.testing.assert_allclose(got, want[:3], rtol=1e-6)
    with pytest.raises(TypeError, match=r"is a list of numbers.*with_format\("):
        solution(rows[:])
