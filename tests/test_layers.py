"""Layers for models that adapt: the same numbers as those of Equinox, and derivatives."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaopt as mo
from jaxprs import names


# Sums of some thirty products of numbers of size one, in another order: a few roundings.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}

# Kernel, stride, padding, and an image that most strides do not divide.
SHAPES = {
    "plain": (3, 1, 0, (7, 6)),
    "one pixel": (1, 1, 0, (3, 4)),
    "as large as the image": (4, 1, 0, (4, 4)),
    "even kernel": (2, 1, 1, (5, 5)),
    "pair": ((3, 2), (2, 1), (1, 0), (8, 7)),
    "remainder": (3, 2, 1, (6, 9)),
    "stride skips pixels": (2, 3, 0, (9, 7)),
    "stride past the end": (3, 5, 1, (4, 7)),
    "pairs of pairs": ((2, 3), 2, ((0, 1), (2, 1)), (5, 6)),
    "same": (3, 1, "SAME", (5, 4)),
    "same with stride": ((4, 3), (2, 3), "SAME", (7, 8)),
    "same, the odd one first": (2, 2, "SAME_LOWER", (5, 7)),
    "valid": ((2, 3), 2, "VALID", (6, 6)),
}

each_shape = pytest.mark.parametrize("shape", SHAPES)


def normal(shape: tuple[int, ...], seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def convolutions(shape: str, use_bias: bool = True) -> tuple[Any, Any, tuple[int, int]]:
    """One of ours, and that of Equinox with the same key."""
    kernel, stride, padding, size = SHAPES[shape]
    arguments = (2, 3, kernel, stride, padding)
    key = jax.random.key(1)
    ours = mo.nn.Conv2d(*arguments, use_bias=use_bias, key=key)
    return ours, eqx.nn.Conv2d(*arguments, use_bias=use_bias, key=key), size


def cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda a: a.astype(dtype) if eqx.is_array(a) else a, tree)


def assert_equal_trees(ours: Any, theirs: Any, tolerance: float) -> None:
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# Convolution


def computed(conv: Any, x: Any) -> Any:
    """Values, gradients and derivatives in forward mode, in one compiled program."""
    arrays, static = eqx.partition(conv, eqx.is_array)
    apply = lambda arrays, x: eqx.combine(arrays, static)(x)

    @jax.jit
    def run(arrays, x):
        gradient = jax.grad(lambda *args: jnp.sum(jnp.sin(apply(*args))), (0, 1))
        tangents = jax.tree.map(jnp.cos, (arrays, x))
        forward = jax.jvp(apply, (arrays, x), tangents)
        return forward, jax.tree.leaves(gradient(arrays, x))

    return run(arrays, x)


@pytest.mark.one_of(4)
@each_shape
def test_conv_and_derivatives_are_those_of_equinox(shape):
    ours, theirs, size = convolutions(shape)
    x = normal((2, *size))
    found, expected = computed(ours, x), computed(theirs, x)
    assert found[0][0].shape[0] == 3
    assert_equal_trees(found, expected, 1e-12)


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_conv_with_and_without_bias(use_bias, dtype):
    ours, theirs, size = convolutions("pairs of pairs", use_bias)
    ours, theirs = cast(ours, dtype), cast(theirs, dtype)
    assert (ours.bias is not None) == use_bias
    x = normal((2, *size)).astype(dtype)
    assert_equal_trees(computed(ours, x), computed(theirs, x), TOLERANCE[dtype])


def test_conv_is_that_of_xla():
    conv = mo.nn.Conv2d(2, 3, (3, 2), (2, 1), ((1, 0), (0, 2)), key=jax.random.key(0))
    x = normal((2, 6, 5))
    expected = jax.lax.conv_general_dilated(x[None], conv.weight, (2, 1), [(1, 0), (0, 2)])
    assert conv.bias is not None
    assert_equal_trees(conv(x), expected[0] + conv.bias, 1e-12)


def test_conv_starts_from_the_weights_of_equinox():
    ours, theirs, _ = convolutions("pair")
    np.testing.assert_array_equal(ours.weight, theirs.weight)
    np.testing.assert_array_equal(ours.bias, theirs.bias)
    assert ours.weight.shape == (3, 2, 3, 2) and ours.bias.shape == (3, 1, 1)
    other = mo.nn.Conv2d(2, 3, (3, 2), key=jax.random.key(2))
    assert not np.array_equal(ours.weight, other.weight)


def loss(conv: Any, x: Any) -> Any:
    # A nonlinear one, so that the second derivative in the weights is not zero.
    return jnp.sum(jnp.sin(conv(x)))


def arrays_of(conv: Any) -> list[Any]:
    return jax.tree.leaves(eqx.filter(conv, eqx.is_array))


def adapted_loss(conv: Any, x: Any) -> Any:
    """The loss after a step of gradient descent, as in MAML."""
    gradient = eqx.filter_grad(loss)(conv, x)
    return loss(eqx.apply_updates(conv, jax.tree.map(lambda g: -0.3 * g, gradient)), x)


@pytest.mark.parametrize("shape", ["remainder", "same with stride"])
def test_conv_second_derivatives_are_those_of_equinox(shape):
    ours, theirs, size = convolutions(shape)
    x = normal((2, *size))

    @eqx.filter_jit
    def gradients(conv, x):
        in_conv, in_x = eqx.filter_grad(lambda pair: adapted_loss(*pair))((conv, x))
        return arrays_of(in_conv), in_x

    found = gradients(ours, x)
    assert_equal_trees(found, gradients(theirs, x), 1e-12)

    @eqx.filter_jit
    def first_order(conv, x):
        gradient = eqx.filter_grad(loss)(conv, x)
        moved = eqx.apply_updates(conv, jax.tree.map(lambda g: -0.3 * g, gradient))
        return eqx.filter_grad(loss)(moved, x).weight

    # Which is what a derivative that is lost would give.
    assert not np.allclose(first_order(ours, x), found[0][0], rtol=0.01)


def test_conv_with_weights_of_each_task():
    kernel, stride, padding, size = SHAPES["remainder"]
    keys = jax.random.split(jax.random.key(0), 3)
    ours, theirs = (
        eqx.filter_vmap(lambda key: layer(2, 3, kernel, stride, padding, key=key))(keys)
        for layer in (mo.nn.Conv2d, eqx.nn.Conv2d)
    )
    x = normal((3, 4, 2, *size))

    # Over tasks, and over the images of each.
    @eqx.filter_jit
    @eqx.filter_vmap
    def mapped(conv, x):
        out = jax.vmap(conv)(x)
        gradient = eqx.filter_grad(lambda conv: jnp.mean(jax.vmap(conv)(x) ** 2))(conv)
        return out, arrays_of(gradient)

    # One after the other.
    @eqx.filter_jit
    def looped(convs, x):
        outs = []
        for task in range(3):
            pick = lambda a: a[task] if eqx.is_array(a) else a
            conv = jax.tree.map(pick, convs)
            mean = lambda conv: sum(jnp.sum(conv(one) ** 2) for one in x[task])
            out = jnp.stack([conv(one) for one in x[task]])
            gradient = jax.tree.map(lambda g: g / out.size, eqx.filter_grad(mean)(conv))
            outs.append((out, arrays_of(gradient)))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)

    assert_equal_trees(mapped(ours, x), looped(theirs, x), 1e-12)


def test_conv_jits():
    ours, theirs, size = convolutions("remainder")
    count = 0

    @eqx.filter_jit
    def apply(conv, x):
        nonlocal count
        count += 1
        return conv(x)

    for _ in range(2):
        x = normal((2, *size))
        assert_equal_trees(apply(ours, x), theirs(x), 1e-12)
    assert count == 1


def test_conv_is_a_product_on_cpus_and_a_convolution_elsewhere(monkeypatch):
    ours, theirs, size = convolutions("same with stride")
    x = normal((2, *size))
    convolves = lambda: "conv_general_dilated" in names(ours, x)
    assert not convolves()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert convolves()
    np.testing.assert_array_equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    "shape, message",
    [
        (
            (3, 7, 7),
            r"takes one image of shape \(2, height, width\); got shape \(3, 7, 7\)",
        ),
        ((5, 2, 7, 7), r"got shape \(5, 2, 7, 7\)\. Use `jax.vmap`"),
        ((7, 7), r"got shape \(7, 7\)"),
    ],
)
def test_conv_refuses(shape, message):
    conv = mo.nn.Conv2d(2, 3, 3, key=jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        conv(jnp.ones(shape))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_conv_refuses_images_smaller_than_its_kernel(backend, monkeypatch):
    # It once was a `TypeError` about the limits of a slice, and elsewhere than on CPUs an
    # empty image.
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    conv = mo.nn.Conv2d(1, 1, (5, 2), padding=1, key=jax.random.key(0))
    assert conv(jnp.ones((1, 3, 1))).shape == (1, 1, 2)
    message = "image of 4 x 9 pixels, padding included, is smaller than a kernel of 5 x 2"
    with pytest.raises(ValueError, match=message):
        conv(jnp.ones((1, 2, 7)))
    wide = mo.nn.Conv2d(1, 1, (1, 4), padding="VALID", key=jax.random.key(0))
    with pytest.raises(ValueError, match="3 x 3 pixels.*kernel of 1 x 4"):
        wide(jnp.ones((1, 3, 3)))


# Pooling


@pytest.mark.parametrize("size", [1, 2, 3])
def test_pool_is_that_of_equinox(size):
    ours, theirs = mo.nn.MaxPool2d(size), eqx.nn.MaxPool2d(size, size)
    # Negative numbers too, so that a padding with zeros would be seen.
    x = normal((3, 7, 8)) - 2
    np.testing.assert_array_equal(ours(x), theirs(x))
    weights = normal(ours(x).shape, seed=1)
    gradient = lambda pool: jax.grad(lambda x: jnp.sum(weights * pool(x)))(x)
    np.testing.assert_array_equal(gradient(ours), gradient(theirs))
    np.testing.assert_array_equal(jax.jit(ours)(x), ours(x))


def test_pool_by_hand():
    x = jnp.asarray([[1, 5, 2, 9], [3, 4, 8, 9], [7, 0, 1, 9]])
    np.testing.assert_array_equal(mo.nn.MaxPool2d(2)(x), [[5, 9]])


def test_pool_takes_any_leading_axes():
    pool = mo.nn.MaxPool2d(2)
    x = normal((2, 3, 5, 4))
    assert pool(x).shape == (2, 3, 2, 2)
    np.testing.assert_array_equal(pool(x), jax.vmap(pool)(x))


@pytest.mark.parametrize("shape", [(1, 2, 9), (1, 9, 2), (1, 0, 3)])
def test_pool_refuses_images_smaller_than_a_square(shape):
    message = f"{shape[1]} x {shape[2]} pixels is smaller than a square of 3 x 3"
    with pytest.raises(ValueError, match=message):
        mo.nn.MaxPool2d(3)(jnp.ones(shape))


@pytest.mark.parametrize("size", [0, -2, 2.0, True, (2, 2)])
def test_pool_refuses(size):
    with pytest.raises(ValueError, match="`size` must be"):
        mo.nn.MaxPool2d(size)


# Batch normalisation


def make_norm() -> mo.nn.BatchNorm:
    norm = mo.nn.BatchNorm(3, eps=0.01)
    weight, bias = normal((2, 3))
    return eqx.tree_at(lambda n: (n.weight, n.bias), norm, (weight, bias))


def normalised(norm: Any, x: Any) -> np.ndarray:
    """The same, channel by channel."""
    x, out = np.asarray(x), np.zeros(x.shape)
    for channel in range(x.shape[1]):
        values = x[:, channel]
        scaled = (values - values.mean()) / np.sqrt(values.var() + norm.eps)
        out[:, channel] = scaled * norm.weight[channel] + norm.bias[channel]
    return out


@pytest.mark.parametrize("pixels", [(), (4,), (4, 5)], ids=str)
def test_norm_by_hand(pixels):
    norm = make_norm()
    x = 2 + 3 * normal((6, 3, *pixels))
    out = jax.vmap(norm, axis_name="batch")(x)
    assert out.shape == x.shape
    np.testing.assert_allclose(out, normalised(norm, x), rtol=1e-12, atol=1e-12)
    again = jax.jit(jax.vmap(norm, axis_name="batch"))(x)
    np.testing.assert_allclose(again, out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pixels", [(), (4, 5)], ids=str)
def test_norm_has_mean_zero_and_variance_one(pixels):
    x = 2 + 3 * normal((8, 3, *pixels))
    out = jax.vmap(mo.nn.BatchNorm(3), axis_name="batch")(x)
    axes = (0, *range(2, x.ndim))
    np.testing.assert_allclose(out.mean(axes), 0, atol=1e-12)
    # `eps`, 1e-5, beside a variance of about nine; one of eight numbers may be a third.
    np.testing.assert_allclose(out.var(axes), 1, rtol=1e-5)


def test_norm_by_another_axis_within_tasks():
    norm = mo.nn.BatchNorm(3, axis_name="examples")
    x = normal((2, 6, 3, 4))
    x = x.at[1].add(5)
    out = jax.vmap(jax.vmap(norm, axis_name="examples"), axis_name="tasks")(x)
    # By the examples of one task, not of all of them.
    for task in range(2):
        expected = normalised(norm, x[task])
        np.testing.assert_allclose(out[task], expected, rtol=1e-12, atol=1e-12)


def test_norm_gradient():
    norm = make_norm()
    x = normal((4, 3, 2))

    def total(pair):
        norm, x = pair
        return jnp.sum(jnp.sin(jax.vmap(norm, axis_name="batch")(x)))

    gradient = eqx.filter_grad(total)((norm, x))
    assert np.linalg.norm(gradient[1]) > 0.1
    # Central differences: an error of about 1e-6 ** 2, and 1e-16 / 1e-6 by rounding.
    for leaf, _ in enumerate(jax.tree.leaves(gradient)):
        change = jax.tree.map(jnp.zeros_like, (norm, x))
        leaves, structure = jax.tree.flatten(change)
        leaves[leaf] = normal(leaves[leaf].shape, seed=1)
        change = jax.tree.unflatten(structure, leaves)
        at = lambda step: total(jax.tree.map(lambda a, d: a + step * d, (norm, x), change))
        difference = (at(1e-6) - at(-1e-6)) / 2e-6
        along = jnp.vdot(jax.tree.leaves(gradient)[leaf], leaves[leaf])
        np.testing.assert_allclose(along, difference, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_norm_of_constant_channels_is_finite(dtype):
    norm = cast(make_norm(), dtype)
    # All alike: the variance is zero, where a root has no derivative.
    for x in (jnp.full((4, 3, 2), 7, dtype), jnp.ones((2, 3), dtype)):
        total = lambda pair: jnp.sum(jax.vmap(pair[0], axis_name="batch")(pair[1]))
        out = jax.vmap(norm, axis_name="batch")(x)
        assert out.dtype == dtype
        bias = norm.bias.reshape(3, *(1 for _ in x.shape[2:]))
        np.testing.assert_array_equal(out, jnp.broadcast_to(bias, x.shape))
        for leaf in jax.tree.leaves(eqx.filter_grad(total)((norm, x))):
            assert np.all(np.isfinite(leaf))


def test_norm_has_nothing_but_weights_to_write(tmp_path):
    norm = make_norm()
    eqx.tree_serialise_leaves(tmp_path / "norm.eqx", norm)
    fresh = mo.nn.BatchNorm(3, eps=0.01)
    back = eqx.tree_deserialise_leaves(tmp_path / "norm.eqx", fresh)
    assert eqx.tree_equal(back, norm) and not eqx.tree_equal(fresh, norm)
    assert len(jax.tree.leaves(norm)) == 2


@pytest.mark.parametrize("shape", [(), (2,), (4, 3)], ids=str)
def test_norm_refuses(shape):
    norm = jax.vmap(mo.nn.BatchNorm(3), axis_name="batch")
    message = rf"takes 3 channels.*got shape \({', '.join(map(str, shape))}"
    with pytest.raises(ValueError, match=message):
        norm(jnp.ones((5, *shape)))


@pytest.mark.parametrize("num_channels", [0, -1, 3.0, True])
def test_norm_refuses_a_number_of_channels(num_channels):
    with pytest.raises(ValueError, match="`num_channels` must be"):
        mo.nn.BatchNorm(num_channels)


def test_norm_without_its_axis():
    with pytest.raises(ValueError, match=r"jax\.vmap\(model, axis_name='batch'\)"):
        mo.nn.BatchNorm(3)(jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="axis_name='examples'"):
        norm = mo.nn.BatchNorm(3, axis_name="examples")
        jax.vmap(norm, axis_name="batch")(jnp.ones((2, 3)))


def test_norm_of_one_number_a_channel():
    norm = jax.vmap(mo.nn.BatchNorm(3), axis_name="batch")
    for shape in ((1, 3), (1, 3, 1, 1)):
        with pytest.raises(ValueError, match="makes zero of a batch of one example"):
            norm(jnp.ones(shape))
    assert norm(jnp.ones((1, 3, 2))).shape == (1, 3, 2)


def test_norm_of_large_numbers_in_half_precision():
    # Their squares overflow; it once returned zeros.
    x = jnp.asarray([300.0, -300.0, 100.0], jnp.float16)[:, None]
    out = jax.vmap(mo.nn.BatchNorm(1), axis_name="batch")(x)
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(out[:, 0], [1.069, -1.336, 0.267], atol=2e-3)


@pytest.mark.parametrize("eps", [-1e-5, float("nan"), float("inf"), None, "1e-5"])
def test_norm_refuses_an_eps(eps):
    with pytest.raises(ValueError, match="`eps` must be"):
        mo.nn.BatchNorm(3, eps=eps)
