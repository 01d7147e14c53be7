"""Best-response layers against layers whose weights are formed for each example.

The slow twin is `dense`: it writes `W + diag(S e) W'` down for one perturbation and puts
that into an ordinary layer, of which there is then one for each example.
"""

import dataclasses
import functools as ft
import io
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaopt as mo
from jaxprs import operations
from metaopt._best_response import bind_at_centre, moved, response_filter
from problems import relative_error


NUM_HYPER = 3
NUM_EXAMPLES = 4
KEY = jax.random.key(0)


# The layers


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A layer or model, how it is called on one example, and the shape of one.

    `scaled` says whether there are matrices in it, for which `tied` makes a difference.
    `call` returns one array and the new model state.
    """

    make: Callable[[Any], Any]
    shape: tuple[int, ...]
    call: Callable[[Any, Any, Any], Any]
    scaled: bool = True
    num_indices: int | None = None  # what the example holds: indices below it, or numbers
    dtype: Any = jnp.float64

    @ft.cached_property
    def structs(self) -> tuple[Any, Any]:
        """The model and its state without numbers, which would have to be compiled."""
        make = eqx.nn.make_with_state(self.make)
        return eqx.filter_eval_shape(lambda key: cast(make(key), self.dtype), KEY)

    def model(self) -> Any:
        return filled(self.structs[0], 0)

    def state(self) -> Any:
        return filled(self.structs[1], 1, mean=1.0)  # some of it are variances

    def inputs(self, size: int = NUM_EXAMPLES) -> Any:
        if self.num_indices is not None:
            return jnp.arange(size) % self.num_indices
        return filled(jax.ShapeDtypeStruct((size, *self.shape), self.dtype), 2)

    def batch(self, model_at, vectors, inputs):
        """The outputs for a batch, each with the model at its own perturbation, and the
        new state."""

        def one(vector, x):
            return self.call(model_at(vector), x, self.state())

        return jax.vmap(one, axis_name="batch", out_axes=(0, None))(vectors, inputs)


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree)


def filled(structs, seed: int, mean=0.0):
    """Random numbers, of a size at which nothing saturates."""
    rng = np.random.default_rng(seed)

    def fill(x):
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.ones(x.shape, x.dtype)
        return jnp.asarray(rng.uniform(mean - 0.7, mean + 0.7, x.shape), x.dtype)

    return jax.tree.map(fill, structs)


def plain(layer, x, state):
    return layer(x), state


def stateful(layer, x, state):
    return layer(x, state)


def lstm(cell, xs, state):
    start = jnp.zeros(cell.hidden_size, xs.dtype)
    step = lambda hidden, x: (cell(x, hidden), None)
    return jnp.concatenate(jax.lax.scan(step, (start, start), xs)[0]), state


def gru(cell, xs, state):
    start = jnp.zeros(cell.hidden_size, xs.dtype)
    return jax.lax.scan(lambda hidden, x: (cell(x, hidden), None), start, xs)[0], state


def attention(layer, x, state):
    return layer(x[:2], x, x), state


def network(key):
    keys = jax.random.split(key)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 4, 3, key=keys[0]),
            eqx.nn.BatchNorm(4, "batch", mode="batch"),
            eqx.nn.Lambda(jnp.tanh),
            eqx.nn.AvgPool2d(2, 2),
            eqx.nn.Dropout(0.5, inference=True),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(16, 3, key=keys[1]),
        ]
    )


def layer_case(make, *args, shape, call=plain, **kwargs) -> Case:
    return Case(lambda key: make(*args, **kwargs, key=key), shape, call)


def norm_case(make, *args, shape, call=plain, **kwargs) -> Case:
    return Case(lambda key: make(*args, **kwargs), shape, call, scaled=False)


# Adding a layer is adding a row.
CASES = {
    "Linear": layer_case(eqx.nn.Linear, 4, 3, shape=(4,)),
    "Linear, no bias": layer_case(eqx.nn.Linear, 4, 3, use_bias=False, shape=(4,)),
    "Linear, scalar in": layer_case(eqx.nn.Linear, "scalar", 3, shape=()),
    "Linear, scalar out": layer_case(eqx.nn.Linear, 4, "scalar", shape=(4,)),
    "Conv1d": layer_case(eqx.nn.Conv1d, 2, 3, 3, stride=2, padding=2, shape=(2, 5)),
    "Conv1d, circular": layer_case(
        eqx.nn.Conv1d, 2, 3, 3, padding="SAME", padding_mode="circular", shape=(2, 5)
    ),
    "Conv2d": layer_case(
        eqx.nn.Conv2d, 4, 6, (2, 3), (1, 2), "SAME", groups=2, shape=(4, 3, 5)
    ),
    "Conv2d, reflect": layer_case(
        eqx.nn.Conv2d, 2, 3, 2, padding=1, padding_mode="reflect", shape=(2, 3, 3)
    ),
    "Conv3d, no bias": layer_case(
        eqx.nn.Conv3d, 2, 3, 2, dilation=2, use_bias=False, shape=(2, 3, 4, 3)
    ),
    "Conv": layer_case(eqx.nn.Conv, 2, 2, 3, 2, shape=(2, 3, 3)),
    "ConvTranspose2d": layer_case(
        eqx.nn.ConvTranspose2d, 4, 2, 3, 2, 1, 1, groups=2, shape=(4, 2, 3)
    ),
    "Embedding": dataclasses.replace(
        layer_case(eqx.nn.Embedding, 5, 3, shape=()), num_indices=5
    ),
    "LayerNorm": norm_case(eqx.nn.LayerNorm, (2, 3), shape=(2, 3)),
    "LayerNorm, no bias": norm_case(eqx.nn.LayerNorm, 3, use_bias=False, shape=(3,)),
    "LayerNorm, no weight": norm_case(eqx.nn.LayerNorm, 3, use_weight=False, shape=(3,)),
    "RMSNorm": norm_case(eqx.nn.RMSNorm, 3, shape=(3,)),
    "GroupNorm": norm_case(eqx.nn.GroupNorm, 2, 4, shape=(4, 3)),
    "BatchNorm, batch": norm_case(
        eqx.nn.BatchNorm, 3, "batch", mode="batch", shape=(3, 2), call=stateful
    ),
    "BatchNorm, ema": norm_case(
        eqx.nn.BatchNorm, 3, "batch", mode="ema", shape=(3,), call=stateful
    ),
    "LSTMCell": layer_case(eqx.nn.LSTMCell, 2, 3, shape=(3, 2), call=lstm),
    "LSTMCell, no bias": layer_case(
        eqx.nn.LSTMCell, 2, 3, use_bias=False, shape=(3, 2), call=lstm
    ),
    "GRUCell": layer_case(eqx.nn.GRUCell, 2, 3, shape=(3, 2), call=gru),
    "GRUCell, no bias": layer_case(
        eqx.nn.GRUCell, 2, 3, use_bias=False, shape=(3, 2), call=gru
    ),
    "MultiheadAttention": layer_case(
        eqx.nn.MultiheadAttention,
        *(2, 4),
        use_query_bias=True,
        use_key_bias=True,
        use_value_bias=True,
        use_output_bias=True,
        shape=(3, 4),
        call=attention,
    ),
    "MLP": layer_case(eqx.nn.MLP, 2, 3, 4, 2, jnp.tanh, shape=(2,)),
    "Sequential": Case(network, (2, 6, 6), stateful),
}
# Without these, all code of ours is run already.
SLOW = [
    *((name, True) for name in CASES if ", " in name),
    *((name, True) for name in ("MultiheadAttention", "MLP", "Sequential")),
    *((f"{name}, no bias", False) for name in ("LayerNorm", "LSTMCell", "GRUCell")),
    ("Linear, scalar in", False),
    ("Conv1d, circular", False),
    ("Conv2d, reflect", False),
    ("Conv", False),
    ("MLP", False),
]
ROWS = [
    pytest.param(
        name,
        tied,
        id=f"{name}, {'tied' if tied else 'free'}",
        marks=pytest.mark.slow if (name, tied) in SLOW else (),
    )
    for name, case in CASES.items()
    for tied in ((False, True) if case.scaled else (False,))
]


def is_best_response(x) -> bool:
    return isinstance(x, mo.nn.AbstractBestResponse)


@ft.cache
def trained(name: str, tied: bool) -> Any:
    """A best-response model as if after some training: nothing is zero."""
    convert = ft.partial(mo.nn.self_tuning, num_hyper=NUM_HYPER, tied=tied)
    model, key = CASES[name].structs[0], KEY
    return filled(eqx.filter_eval_shape(convert, model, key=key), 3)


def vectors(size: int = NUM_EXAMPLES) -> Any:
    return filled(jax.ShapeDtypeStruct((size, NUM_HYPER), jnp.float64), 4)


# The slow twin


def dense(model, vector):
    """An ordinary model whose arrays are those that belong to `vector`, written out."""
    return jax.tree.map(
        lambda x: dense_layer(x, vector) if is_best_response(x) else x,
        model,
        is_leaf=is_best_response,
    )


def dense_layer(layer, e):
    new, response = layer.layer, layer.response
    matrices = eqx.nn.Linear | eqx.nn.Conv | eqx.nn.ConvTranspose
    arrays = {}
    if isinstance(new, eqx.nn.Embedding):
        columns, matrix = response["weight"].scale @ e, response["weight"].weight
        matrix = new.weight if matrix is None else matrix
        arrays["weight"] = new.weight + matrix @ jnp.diag(columns)
    elif isinstance(new, matrices | eqx.nn.LSTMCell | eqx.nn.GRUCell):
        is_matrix = isinstance(new, matrices)
        for name in ("weight",) if is_matrix else ("weight_ih", "weight_hh"):
            general, matrix = getattr(new, name), response[name].weight
            matrix = general if matrix is None else matrix
            rows = matrix.reshape(matrix.shape[0], -1)
            moved = jnp.diag(response[name].scale @ e) @ rows
            arrays[name] = general + moved.reshape(general.shape)
        for name in ("bias", "bias_n"):
            if name in response:
                moved = jnp.einsum("...h,h->...", response[name].shift, e)
                arrays[name] = getattr(new, name) + moved
    else:
        for name in ("weight", "bias"):
            if name in response:
                moved = jnp.einsum("...h,h->...", response[name].shift, e)
                arrays[name] = getattr(new, name) + moved
    # Nothing is left out.
    assert arrays.keys() == response.keys()
    for name, array in arrays.items():
        new = eqx.tree_at(lambda x: getattr(x, name), new, array)
    return new


def dense_squared_norm(model):
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    return sum(jnp.sum(leaf**2) for leaf in leaves)


# Both, compiled once for each row


def along(x, phase: float):
    """A linear functional of an array in which all entries count differently."""
    return jnp.sum(x * np.cos(np.arange(x.size) + phase).reshape(x.shape))


def outcome(case: Case, at, at_zero, squared_norm, model, e, inputs):
    """All that the layers and their twin are to agree on.

    `at(model, vector)` is the model at a perturbation, `at_zero` one that may assume that
    the perturbation is zero.
    """

    def value(variables):
        model, e, inputs = variables
        out, state = case.batch(lambda vector: at(model, vector), e, inputs)
        norms = jax.vmap(lambda vector: squared_norm(at(model, vector)))(e)
        total = along(out, 0.0) + along(norms, 1.0)
        return total, {"output": (out, state), "squared norm": (norms,)}

    def linearised(variables):
        model, e, inputs = variables

        def outputs(vectors):
            return case.batch(lambda v: at_zero(model, v), vectors, inputs)[0]

        out, tangent = jax.jvp(outputs, (jnp.zeros_like(e),), (e,))
        total = along(out, 2.0) + along(tangent, 3.0)
        return total, {"at zero": (out, tangent)}

    results = {}
    for name, fn in {"gradient": value, "gradient at zero": linearised}.items():
        gradient = eqx.filter_value_and_grad(fn, has_aux=True)
        (_, aux), gradients = gradient((model, e, inputs))
        results |= aux | {name: gradients}
    return results


@ft.cache
def outcomes(name: str, tied: bool) -> tuple[Any, Any]:
    case = CASES[name]

    @eqx.filter_jit
    def both(model, e, inputs):
        zero = bind_at_centre

        return (
            outcome(case, mo.nn.bind, zero, mo.nn.squared_norm, model, e, inputs),
            outcome(case, dense, dense, dense_squared_norm, model, e, inputs),
        )

    return both(trained(name, tied), vectors(), case.inputs())


# Sums of a few hundred products in float64, in another order.
ROUNDING = 1e-12


@pytest.mark.one_of(8)
@pytest.mark.parametrize("name, tied", ROWS)
def test_equals_weights_of_its_own_for_each_example(name, tied):
    ours, twin = outcomes(name, tied)
    assert jax.tree.structure(ours) == jax.tree.structure(twin)
    errors = {
        f"{what}[{i}]": relative_error(ours[what][i], part)
        for what, parts in twin.items()
        for i, part in enumerate(parts)
        if jax.tree.leaves(part)
    }
    assert len(errors) >= 8
    assert {k: v for k, v in errors.items() if not v < ROUNDING} == {}


@pytest.mark.parametrize("jit", ["jit of vmap", "vmap of jit"])
def test_derivative_at_zero_under_jit(jit):
    """Once its shape was wrong, without notice or with an error of JAX, where only the
    perturbation has an axis for the batch."""
    model, e, x = trained("Linear", False), vectors(), jnp.arange(4.0)

    def outputs(at):
        one = lambda vector: at(model, vector)(x)
        return jax.jit(jax.vmap(one)) if jit == "jit of vmap" else jax.vmap(jax.jit(one))

    def derivative(at):
        return jax.jvp(outputs(at), (0 * e,), (e,))

    got = derivative(bind_at_centre)
    assert got[0].shape == got[1].shape == (NUM_EXAMPLES, 3)
    assert relative_error(got, derivative(dense)) < ROUNDING


def test_a_second_forward_pass_at_zero_costs_nothing():
    """The compiler is to see that it is the first one."""
    case, model = CASES["MLP"], trained("MLP", False)

    def num_products(centred):
        @jax.jit
        def both(e, inputs):
            chosen = bind_at_centre if centred else mo.nn.bind
            bind = lambda vector: chosen(model, vector)
            first = case.batch(bind, e, inputs)[0]
            return first, case.batch(lambda _: model, e, inputs)[0]

        compiled = both.lower(vectors(), case.inputs()).compile()
        return str(compiled.as_text()).count(" dot(")

    assert num_products(centred=True) == 3 < num_products(centred=False)


# The start of the response


# One of each class and of each way through it.
@pytest.mark.one_of(3)
@pytest.mark.parametrize(
    "name",
    [
        *("Linear", "Linear, scalar out", "Conv1d", "ConvTranspose2d", "Embedding"),
        *("LayerNorm", "BatchNorm, batch", "LSTMCell", "GRUCell"),
    ],
)
def test_response_of_zero_is_the_original_to_the_last_bit(name):
    case = CASES[name]
    original, e, inputs = case.model(), vectors(), case.inputs()
    # One operation at a time: which product and sum the compiler joins to one, with one
    # rounding, is not for us to say.
    with jax.disable_jit():
        want = case.batch(lambda _: original, e, inputs)
        for tied in (True, False) if case.scaled else (True,):
            new = mo.nn.self_tuning(original, NUM_HYPER, tied=tied, key=KEY)
            got = case.batch(lambda vector: mo.nn.bind(new, vector), e, inputs)
            assert eqx.tree_equal(got, want)
            assert eqx.tree_equal(case.batch(lambda _: new, e, inputs), want)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["Sequential", "GRUCell", "Embedding"])
def test_ordinary_models(name, tied):
    model, e = trained(name, tied), vectors()[0]
    structure = jax.tree.structure(CASES[name].model())
    bound = mo.nn.bind(model, e)
    for ordinary in (mo.nn.ordinary(model, e), mo.nn.ordinary(bound)):
        assert jax.tree.structure(ordinary) == structure
        assert relative_error(ordinary, dense(model, e)) < ROUNDING
    general = jax.tree.map(
        lambda x: x.layer if is_best_response(x) else x, model, is_leaf=is_best_response
    )
    assert eqx.tree_equal(mo.nn.ordinary(model), general)
    # The general arrays can follow the outer variables, and the response stays.
    followed = moved(model, e)
    assert relative_error(mo.nn.ordinary(followed), dense(model, e)) < ROUNDING
    is_response = response_filter(model)
    assert eqx.tree_equal(eqx.filter(followed, is_response), eqx.filter(model, is_response))
    # The last word counts, and an ordinary model stays one.
    assert eqx.tree_equal(mo.nn.ordinary(bound, 0 * e), general)
    assert eqx.tree_equal(mo.nn.ordinary(general), general)


# Memory


def largest(fn, *args) -> int:
    """The number of entries of the largest array on the way."""
    arrays: list[Any] = [v.aval for eqn in operations(fn, *args) for v in eqn.outvars]
    return max(array.size for array in arrays)


# Far more weights than inputs and outputs.
LARGE = {
    "Linear": layer_case(eqx.nn.Linear, 16, 24, shape=(16,)),
    "Conv2d": layer_case(eqx.nn.Conv2d, 8, 8, 3, padding=1, shape=(8, 3, 3)),
    "ConvTranspose1d": layer_case(eqx.nn.ConvTranspose1d, 16, 16, 3, shape=(16, 2)),
    "Embedding": dataclasses.replace(
        layer_case(eqx.nn.Embedding, 40, 8, shape=()), num_indices=40
    ),
    "LSTMCell": layer_case(eqx.nn.LSTMCell, 8, 8, shape=(2, 8), call=lstm),
    "GRUCell": layer_case(eqx.nn.GRUCell, 8, 8, shape=(2, 8), call=gru),
}


@pytest.mark.one_of(3)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", LARGE)
def test_no_weights_for_each_example(name, tied):
    case, size = LARGE[name], 32
    layer = case.model()
    model = mo.nn.self_tuning(layer, NUM_HYPER, tied=tied, key=KEY)
    weights = layer.weight_hh if "Cell" in name else layer.weight
    limit = size * weights.size

    def of(at, at_zero, squared_norm):
        everything = ft.partial(outcome, case, at, at_zero, squared_norm)
        return largest(everything, model, vectors(size), case.inputs(size))

    zero = bind_at_centre
    assert of(mo.nn.bind, zero, mo.nn.squared_norm) < limit
    # That the test would see them.
    assert of(dense, zero, mo.nn.squared_norm) >= limit
    assert of(mo.nn.bind, dense, mo.nn.squared_norm) >= limit
    forms_them = lambda model: dense_squared_norm(mo.nn.ordinary(model))
    assert of(mo.nn.bind, zero, forms_them) >= limit


# Penalties


def bound_and_unbound(model):
    return [model, mo.nn.bind(model, vectors()[0])]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["Sequential", "GRUCell", "Embedding"])
def test_squared_norm_is_that_of_the_ordinary_model(name, tied):
    biases = {".bias", ".bias_n"}
    for model in bound_and_unbound(trained(name, tied)):
        ordinary = mo.nn.ordinary(model)
        leaves = jax.tree_util.tree_leaves_with_path(
            eqx.filter(ordinary, eqx.is_inexact_array)
        )
        for with_biases in (True, False):
            want = sum(
                np.sum(np.square(leaf))
                for path, leaf in leaves
                if with_biases or str(path[-1]) not in biases
            )
            for x in (model, ordinary):
                got = mo.nn.squared_norm(x, biases=with_biases)
                assert got.dtype == jnp.float64 and got.shape == ()
                assert abs(got - want) < ROUNDING * want


def test_squared_norm_of_any_pytree():
    tree = {"a": np.array([3.0]), "bias": jnp.array(4.0), "n": jnp.arange(9), "f": jnp.tanh}
    assert mo.nn.squared_norm(tree) == 25
    assert mo.nn.squared_norm(tree, biases=False) == 9
    assert mo.nn.squared_norm(tree["a"]) == 9
    assert mo.nn.squared_norm({}) == 0
    assert mo.nn.squared_norm({"n": jnp.arange(9)}).dtype == jnp.float64


def test_squared_norm_leaves_out_states():
    """Once the running statistics of a model made without `make_with_state` counted, but
    only as long as it was an ordinary one."""
    norm = eqx.nn.BatchNorm(5, "batch", mode="batch")
    new = mo.nn.self_tuning(norm, NUM_HYPER, key=KEY)
    assert mo.nn.squared_norm(norm) == 5
    assert mo.nn.squared_norm(new) == 5
    assert mo.nn.conversion(new).converted[0][2:] == (10, 10 * NUM_HYPER)
    assert mo.nn.conversion(norm).left == (("model.weight", 5), ("model.bias", 5))


@pytest.mark.parametrize("tied", [True, False])
def test_squared_norm_in_half_precision(tied):
    """Once it was infinite in float16 as soon as it was more than 65,504."""
    layer = eqx.nn.Linear(20, 20, dtype=jnp.float16, key=KEY)
    layer = eqx.tree_at(lambda x: x.weight, layer, jnp.full((20, 20), 20.0, jnp.float16))
    model = mo.nn.self_tuning(layer, NUM_HYPER, tied=tied, key=KEY)
    for x in (layer, *bound_and_unbound(model)):
        squares = mo.nn.squared_norm(x, biases=False)
        assert squares == 160_000 and squares.dtype == jnp.float32


# Dtypes and transformations


@pytest.mark.one_of(4)
@pytest.mark.parametrize(
    "name, dtype",
    [
        *((name, jnp.bfloat16) for name in CASES if ", " not in name),
        *((name, jnp.float32) for name in ("Linear", "BatchNorm, ema", "LSTMCell")),
    ],
)
def test_keeps_dtypes(name, dtype):
    """Traced only, without promotion: two dtypes would not even be added."""
    case = dataclasses.replace(CASES[name], dtype=dtype)
    model, e = case.model(), vectors()
    run = lambda at: case.batch(at, e, case.inputs())

    new = mo.nn.self_tuning(model, NUM_HYPER, tied=False, key=KEY)

    def total(model, e):
        out, _ = run(lambda vector: mo.nn.bind(model, vector))
        norm = mo.nn.squared_norm(mo.nn.bind(model, e[0]))
        assert norm.dtype == jnp.float32
        return jnp.sum(out.astype(jnp.float32)) + norm

    with jax.numpy_dtype_promotion("strict"):
        got = jax.eval_shape(lambda: run(lambda vector: mo.nn.bind(new, vector)))
        want = jax.eval_shape(lambda: run(lambda vector: model))
        gradient = eqx.filter_eval_shape(eqx.filter_grad(total), new, e)
    assert jax.tree.leaves(got) == jax.tree.leaves(want)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(dtype)}


def linear(in_features=4, out_features=3, **kwargs) -> eqx.nn.Linear:
    return eqx.nn.Linear(in_features, out_features, **kwargs, key=KEY)


def test_a_new_perturbation_is_not_traced_again():
    model, traced = mo.nn.self_tuning(linear(), NUM_HYPER, key=KEY), []

    @eqx.filter_jit
    def run(model, e, x):
        traced.append(e)
        return jax.vmap(lambda e, x: mo.nn.bind(model, e)(x))(e, x)

    first, second = (run(model, i * vectors(), jnp.ones((4, 4))) for i in (1, 2))
    bound = [mo.nn.bind(model, e) for e in vectors()]
    assert first.shape == second.shape == (4, 3) and len(traced) == 1
    assert jax.tree.structure(bound[0]) == jax.tree.structure(bound[1])
    call = eqx.filter_jit(lambda model: traced.append(model))
    call(bound[0])
    call(bound[1])
    assert len(traced) == 2


def test_is_saved_and_loaded():
    model, file = trained("Sequential", False), io.BytesIO()
    eqx.tree_serialise_leaves(file, model)
    file.seek(0)
    like = jax.tree.map(lambda x: 0 * x if eqx.is_inexact_array(x) else x, model)
    assert eqx.tree_equal(eqx.tree_deserialise_leaves(file, like), model)


def test_inference_mode_reaches_batch_norm():
    case, model = CASES["Sequential"], trained("Sequential", True)
    model = eqx.nn.inference_mode(model)
    assert model[1].layer.inference is True
    _, state = case.batch(lambda e: mo.nn.bind(model, e), vectors(), case.inputs())
    assert eqx.tree_equal(state, case.state())
    assert eqx.nn.inference_mode(model, False)[1].layer.inference is False


def test_only_the_response_is_trained():
    model = mo.nn.self_tuning(eqx.nn.MLP(2, 1, 4, 1, key=KEY), NUM_HYPER, key=KEY)
    where = response_filter(model)
    assert jax.tree.structure(where) == jax.tree.structure(model)
    response, general = eqx.partition(model, where)

    def loss(response, e):
        return jnp.sum(mo.nn.bind(eqx.combine(response, general), e)(jnp.ones(2)) ** 2)

    gradient = eqx.filter_grad(loss)(response, vectors()[0])
    assert len(jax.tree.leaves(gradient)) == 4
    assert all(jnp.all(leaf != 0) for leaf in jax.tree.leaves(gradient.layers[1]))
    new = eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, gradient))
    assert loss(eqx.filter(new, where), vectors()[0]) < loss(response, vectors()[0])
    frozen = eqx.tree_at(lambda m: m.layers[0].response["weight"].scale, new, replace=0)
    assert frozen.layers[0].response["weight"].scale == 0


def test_is_made_under_vmap():
    make = lambda key: mo.nn.self_tuning(
        eqx.nn.Linear(4, 3, key=key), NUM_HYPER, tied=False, key=key
    )
    stack = eqx.filter_vmap(make)(jax.random.split(KEY, 5))
    stack = jax.tree.map(lambda x: x + 1 if eqx.is_inexact_array(x) else x, stack)
    e, x = vectors()[0], jnp.arange(4.0)
    out = eqx.filter_vmap(lambda model: mo.nn.bind(model, e)(x))(stack)
    one = jax.tree.map(lambda leaf: leaf[3] if eqx.is_array(leaf) else leaf, stack)
    assert relative_error(out[3], dense(one, e)(x)) < ROUNDING


# Attributes


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "Embedding", "LSTMCell", "LayerNorm"])
def test_has_the_attributes_of_the_layer(name):
    """Once a cell had no `hidden_size`, so that no model that makes its first hidden state
    from it could be converted."""
    layer, new = CASES[name].model(), trained(name, False)
    e = vectors()[0]
    for field in dataclasses.fields(layer):
        if field.metadata.get("static", False):
            assert getattr(new, field.name) == getattr(layer, field.name)
        else:
            bound, ordinary = mo.nn.bind(new, e), mo.nn.ordinary(new, e)
            array = getattr(bound, field.name)
            assert eqx.tree_equal(array, getattr(ordinary, field.name))
            assert eqx.tree_equal(getattr(new, field.name), getattr(new.layer, field.name))
    assert mo.nn.self_tuning(linear(use_bias=False), 1, key=KEY).bias is None
    with pytest.raises(AttributeError, match="object has no attribute 'color'"):
        new.color
    with pytest.raises(AttributeError):
        new._private


def test_a_table_is_used_twice():
    """A language model's last layer is often its embedding: the weight is read there, and
    must be the one at the perturbation."""
    model, e = trained("Embedding", False), vectors()[0]
    embedding = mo.nn.bind(model, e)
    logits = embedding.weight @ embedding(jnp.array(2))
    twin = dense(model, e)
    assert relative_error(logits, twin.weight @ twin(jnp.array(2))) < ROUNDING


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_sequential_hands_batch_norm_its_state(mode):
    """Once it did not: `Sequential` asks for the type of its layers."""
    make = lambda: eqx.nn.Sequential(
        [eqx.nn.LayerNorm(3), eqx.nn.BatchNorm(3, "batch", mode=mode)]
    )
    model, state = eqx.nn.make_with_state(make)()
    new = mo.nn.self_tuning(model, NUM_HYPER, key=KEY)
    assert [layer.is_stateful() for layer in new] == [False, True]
    assert new.is_stateful()
    run = jax.vmap(new, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    out, state = run(jnp.arange(6.0).reshape(2, 3) ** 2, state)
    assert out.shape == (2, 3)


# What is converted and what is left


class Positive(eqx.nn.Linear):
    def __init__(self):
        super().__init__(2, 2, use_bias=False, key=KEY)

    def __call__(self, x, *, key=None):
        return jnp.exp(self.weight) @ x


class Model(eqx.Module):
    first: eqx.nn.Linear
    others: dict[str, Any]
    scale: jax.Array

    def __call__(self, x):
        return self.others["linear"](self.scale * self.first(x))


def test_layers_inside_others_are_left():
    first = linear(4, 4, use_bias=False)
    stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(2, 2, use_bias=False, key=key))
    embedding = eqx.nn.Embedding(3, 3, key=KEY)
    get, where = (lambda pair, i=i: pair[i].weight for i in (0, 1))
    others, _ = eqx.nn.make_with_state(
        lambda: {
            "linear": linear(4, 2),
            "weight": eqx.nn.WeightNorm(linear(3, 3)),
            "spectral": eqx.nn.SpectralNorm(linear(3, 3), "weight", key=KEY),
            "shared": eqx.nn.Shared((embedding, linear(3, 3)), where, get),
            "stack": stack(jax.random.split(KEY, 2)),
            "subclass": Positive(),
            "no arrays": eqx.nn.LayerNorm(3, use_weight=False, use_bias=False),
            "complex": linear(2, 1, use_bias=False, dtype=jnp.complex64),
            "numpy": jax.tree.map(np.asarray, linear(2, 1)),
        }
    )()
    model = mo.nn.self_tuning(Model(first, others, jnp.ones(4)), 2, key=KEY)
    found = mo.nn.conversion(model)
    assert found.converted == (
        ("model.first", "Linear", 16, 8),
        ("model.others['linear']", "Linear", 10, 8),
        ("model.others['numpy']", "Linear", 3, 4),
    )
    assert dict(found.left) == {
        "model.others['complex'].weight": 2,
        "model.others['shared'].pytree[0].weight": 9,
        "model.others['shared'].pytree[1].bias": 3,
        "model.others['spectral'].layer.weight": 9,
        "model.others['spectral'].layer.bias": 3,
        "model.others['stack'].weight": 8,
        "model.others['subclass'].weight": 4,
        "model.others['weight'].layer.weight": 9,
        "model.others['weight'].layer.bias": 3,
        "model.others['weight'].g": 3,
        "model.scale": 4,
    }
    assert mo.nn.bind(model, jnp.ones(2))(jnp.ones(4)).shape == (2,)
    for name in others.keys() - {"linear", "numpy"}:
        assert eqx.tree_equal(model.others[name], others[name])


def test_a_conversion_is_readable():
    model = mo.nn.self_tuning(Model(linear(), {}, jnp.ones(1234)), 8, key=KEY)
    found = mo.nn.conversion(model)
    assert str(found) == repr(found)
    assert str(found).splitlines() == [
        "layer        type           general  response",
        "model.first  Linear              15        48",
        "model.scale  left as it is    1,234         -",
    ]
    free = mo.nn.self_tuning(linear(), 8, tied=False, key=KEY)
    assert str(mo.nn.conversion(free)).splitlines()[1:] == [
        "model  Linear       15        60"
    ]


def test_a_network_that_scans_over_its_layers_keeps_them():
    mlp = eqx.nn.MLP(2, 3, 4, 3, scan=True, key=KEY)
    model = mo.nn.self_tuning(mlp, NUM_HYPER, key=KEY)
    left = [name for name, _ in mo.nn.conversion(model).left]
    assert left == ["model.layers[1].weight", "model.layers[1].bias"]
    out = mo.nn.bind(model, vectors()[0])(jnp.ones(2))
    assert relative_error(out, mlp(jnp.ones(2))) < ROUNDING


# Errors


@pytest.mark.parametrize("num_hyper", [0, -1, True, 2.0, None, "3"])
def test_num_hyper_must_be_a_positive_int(num_hyper):
    with pytest.raises(ValueError, match=r"`num_hyper` must be a positive int.*got "):
        mo.nn.self_tuning(linear(), num_hyper, key=KEY)


@pytest.mark.parametrize(
    "model, text",
    [
        (jnp.ones(3), "this is one `array`"),
        ({"w": jnp.ones(3)}, "this is a `dict` of array"),
        ({}, "this is a `dict` without leaves"),
        (None, "this is a `NoneType` without leaves"),
        (eqx.nn.Dropout(0.5), "this is a `Dropout` of bool, float"),
        (eqx.nn.WeightNorm(linear()), "inside WeightNorm.* this is one `WeightNorm`"),
        (
            eqx.filter_vmap(lambda k: eqx.nn.Linear(2, 2, key=k))(jax.random.split(KEY)),
            "no stacks that `jax.vmap` makes.* this is one `Linear`",
        ),
        (Positive(), "no subclasses.* this is a `Positive` of array"),
    ],
)
def test_a_model_without_layers_is_refused(model, text):
    with pytest.raises(ValueError, match=f"no layer in the model.*GRUCell.*{text}"):
        mo.nn.self_tuning(model, 2, key=KEY)


def test_a_model_is_converted_once():
    model = mo.nn.self_tuning(linear(), 2, key=KEY)
    for x in (model, [linear(), model], mo.nn.bind(model, jnp.ones(2))):
        with pytest.raises(ValueError, match="has best-response layers already"):
            mo.nn.self_tuning(x, 2, key=KEY)
    # Its parts may differ in how they respond.
    free = mo.nn.self_tuning(linear(), 2, tied=False, key=KEY)
    assert len(mo.nn.conversion([model, free]).converted) == 2


@pytest.mark.parametrize("shape", [(), (2,), (4,), (1, 3), (0,)])
def test_a_vector_of_another_length_is_refused(shape):
    model = mo.nn.self_tuning([linear(), linear()], 3, key=KEY)
    wanted = rf"`vector` has shape {re.escape(str(shape))}.*responds to 3 .*shape \(3,\)"
    for fn in (mo.nn.bind, mo.nn.ordinary):
        with pytest.raises(ValueError, match=wanted):
            fn(model, jnp.ones(shape))
    with pytest.raises(ValueError, match=r"num_hyper=4\)"):
        mo.nn.bind(model, jnp.ones(4))


def test_nothing_to_bind_is_an_error():
    """Once the model came back as it was, and the loss did not depend on `hyper`."""
    for model in (linear(), {}, jnp.ones(3)):
        for fn in (mo.nn.bind, mo.nn.ordinary):
            with pytest.raises(ValueError, match="no best-response layer in `model`"):
                fn(model, jnp.ones(3))


@pytest.mark.parametrize(
    "name, shape, wanted",
    [
        (
            "weight",
            (2, 2),
            r"`scale` in response\['weight'\] of a `Linear`.*\(3, num_hyper",
        ),
        ("bias", (4, 2), r"`shift` in response\['bias'\] of a `Linear`.*\(3, num_hyper"),
    ],
)
def test_a_response_of_another_shape_is_refused(name, shape, wanted):
    layer = eqx.nn.Linear(4, 3, key=KEY)
    good: Any = mo.nn.self_tuning(layer, 2, key=KEY)
    response = dict(good.response)
    wrong = jax.tree.map(lambda _: jnp.ones(shape), response[name])
    with pytest.raises(ValueError, match=wanted + rf".*got {re.escape(str(shape))}"):
        type(good)(layer, response | {name: wrong}, None)
