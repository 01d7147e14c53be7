"""Rewriting functions through their jaxprs."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from jax import lax

from jaxprs import loop_conditions, names, with_floats
from metaopt._jaxpr._rewrite import carry_conditions, finite_derivatives


def import_jaxopt():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import jaxopt
    return jaxopt


def float_conditions(fn, *args) -> list[list[str]]:
    return [with_floats(condition) for condition in loop_conditions(fn, *args)]


def halve_until(x, limit=1.0):
    """A loop whose condition computes with floats, and whose length depends on `x`."""
    return lax.while_loop(lambda x: jnp.sum(x**2) > limit, lambda x: 0.5 * x, x)


def bits(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(bits(a), bits(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# Loops, wherever they are

X = jnp.array([3.0, -4.0, 7.0])


def in_jit(x):
    return jax.jit(halve_until)(x)


def in_scan(x):
    def body(carry, row):
        return carry + jnp.sum(halve_until(row)), halve_until(row)

    return lax.scan(body, 0.0, jnp.stack([x, 2 * x, -x]), reverse=True, unroll=2)


def in_cond(x):
    return lax.cond(x[0] > 0, halve_until, lambda x: x, x)


def in_switch(x):
    branches = [lambda x: x, halve_until, lambda x: -x]
    return lax.switch(jnp.argmax(x) - 1, branches, x)


def in_while(x):
    def body(carry):
        n, x = carry
        return n + 1, halve_until(x, 0.5 / (n + 1)) + 1

    return lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))


def in_while_condition(x):
    return lax.while_loop(
        lambda x: jnp.max(halve_until(x, 100.0)) < 3, lambda x: 1.5 * x, 0.01 * x
    )


def in_checkpoint(x):
    return jax.checkpoint(halve_until)(x)


def in_checkpoint_with_constant(x):
    table = jnp.arange(3.0)
    inner = jax.checkpoint(lambda x: jax.jit(lambda x: halve_until(x + table))(x))
    return inner(x)


def in_custom_jvp(x):
    @jax.custom_jvp
    def f(x):
        return halve_until(x)

    f.defjvp(lambda primals, tangents: (halve_until(*primals), 7 * tangents[0]))
    return f(x)


def in_custom_vjp(x):
    @jax.custom_vjp
    def f(x):
        return halve_until(x)

    f.defvjp(lambda x: (halve_until(x), None), lambda _, ct: (7 * ct,))
    return f(x)


def in_custom_linear_solve(x):
    return lax.custom_linear_solve(
        lambda x: 2 * x,
        x,
        lambda _, b: b / 2 + 0 * halve_until(b),
        transpose_solve=lambda _, b: b / 2,
    )


PLACES = [
    halve_until,
    in_jit,
    in_scan,
    in_cond,
    in_switch,
    in_while,
    in_while_condition,
    in_checkpoint,
    in_checkpoint_with_constant,
    in_custom_jvp,
    in_custom_vjp,
    in_custom_linear_solve,
]


@pytest.mark.one_of(4)
@pytest.mark.parametrize("fn", PLACES)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_loops_everywhere_carry_their_condition(fn, transform):
    carried = carry_conditions(fn)
    assert any(float_conditions(fn, X))
    assert not any(float_conditions(carried, X))
    assert_same_bits(transform(carried)(X), transform(fn)(X))


@pytest.mark.one_of(4)
@pytest.mark.parametrize("fn", PLACES)
def test_loops_carry_their_condition_under_vmap(fn):
    rows = jnp.stack([X, 0.1 * X, 100 * X, -X])
    batched = jax.vmap(carry_conditions(fn))
    assert not any(float_conditions(batched, rows))
    # Row by row, because the plain loop may hang in `jax.vmap`.
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(fn, rows))
    for got, row in zip(bits(batched(rows)), bits(expected), strict=True):
        np.testing.assert_allclose(got, row, rtol=1e-12)


@pytest.mark.parametrize("fn", [in_custom_jvp, in_custom_vjp])
def test_custom_rules_are_kept(fn):
    # The derivatives are wrong on purpose: these rules and no others must be used.
    carried = carry_conditions(fn)

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(carried(x)))(x)

    np.testing.assert_array_equal(gradient(X), 7 * np.ones(3))
    # ... and what the rule runs forward carries its condition as well.
    assert not any(float_conditions(gradient, X))
    assert_same_bits(jax.vmap(gradient)(jnp.stack([X, 9 * X])), 7 * jnp.ones((2, 3)))


def test_custom_jvp_rule_in_forward_mode():
    carried = carry_conditions(in_custom_jvp)
    _, tangent = jax.jvp(carried, (X,), (jnp.ones(3),))
    np.testing.assert_array_equal(tangent, 7 * np.ones(3))


def test_loops_without_floats_are_left_alone():
    def fn(x):
        return lax.fori_loop(0, 3, lambda _, x: x + 1, x)

    def count(x):
        return lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, 2 * c[1]), (0, x))

    for f in (fn, count):
        assert names(carry_conditions(f), X) == names(f, X)


def test_derivatives_go_through_a_carried_loop():
    # Forward mode goes through `while_loop`s, reverse mode through what is around them.
    def fn(x, scale):
        return jnp.sum(scale * halve_until(x))

    carried = carry_conditions(fn)
    direction = jnp.array([1.0, 2.0, 3.0])
    expected = jax.jvp(fn, (X, 2.0), (direction, 1.0))
    assert_same_bits(jax.jvp(carried, (X, 2.0), (direction, 1.0)), expected)
    around = jax.grad(lambda scale: carried(X, scale))(2.0)
    np.testing.assert_allclose(around, jnp.sum(halve_until(X)))


def test_closed_over_tracers_keep_their_derivatives():
    def outer(scale, x):
        return jnp.sum(carry_conditions(lambda x: scale * jnp.sin(x))(x))

    got = jax.jit(jax.grad(outer, argnums=(0, 1)))(2.0, X)
    np.testing.assert_allclose(got[0], jnp.sum(jnp.sin(X)))
    np.testing.assert_allclose(got[1], 2 * jnp.cos(X))

    def masked(scale, x):
        return jnp.sum(finite_derivatives(lambda x: scale * jnp.sqrt(x))(x))

    x = jnp.array([0.0, 4.0])
    got = jax.vmap(jax.grad(masked, argnums=(0, 1)), (0, None))(jnp.array([1.0, 2.0]), x)
    np.testing.assert_allclose(got[0], [2.0, 2.0])
    np.testing.assert_allclose(got[1], [[0.0, 0.25], [0.0, 0.5]])


@pytest.mark.parametrize("rewrite", [carry_conditions, finite_derivatives])
def test_what_is_not_an_array_passes_through(rewrite):
    class Point(eqx.Module):
        x: jax.Array
        name: str = eqx.field(static=True)
        note: object = None

    def fn(point, power, *, flag, table):
        assert flag == "yes" and isinstance(power, int)
        out = point.x**power + table
        return Point(out, point.name + "!", note=fn), {"n": power, "none": None}, 1.5

    point = Point(jnp.arange(3.0), "a")
    got = rewrite(fn)(point, 2, flag="yes", table=np.ones(3))
    expected = fn(point, 2, flag="yes", table=np.ones(3))
    assert got[0].name == "a!" and got[0].note is fn
    assert got[1] == {"n": 2, "none": None} and got[2] == 1.5
    np.testing.assert_array_equal(got[0].x, expected[0].x)


@pytest.mark.parametrize("rewrite", [carry_conditions, finite_derivatives])
def test_dtypes_and_weak_types_pass_through(rewrite):
    def fn(weak, half, integer, key):
        out = weak * 2, half / 3, integer + 1, jax.random.split(key)[0]
        return *out, jnp.zeros(()), 3 * jnp.asarray(1)

    args = (jnp.asarray(2.0), jnp.ones(2, jnp.bfloat16), jnp.arange(3), jax.random.key(0))
    got, expected = rewrite(fn)(*args), fn(*args)
    assert [a.dtype for a in got] == [a.dtype for a in expected]
    # A number that became strongly typed would trace its users a second time.
    assert [a.aval.weak_type for a in got[:3]] == [a.aval.weak_type for a in expected[:3]]
    assert got[0].aval.weak_type


# Loops of other libraries


@pytest.mark.one_of(2)
@pytest.mark.parametrize("solver", [lx.GMRES(1e-8, 1e-8, restart=5), lx.CG(1e-8, 1e-8)])
def test_values_of_lineax_are_kept(solver):
    matrix = jnp.diag(jnp.linspace(1.0, 5.0, 12)) + 0.1
    vector = jnp.sin(jnp.arange(12.0))

    def solve(matrix, vector):
        tag = lx.positive_semidefinite_tag
        operator = lx.MatrixLinearOperator(matrix, tag)
        return solver.compute(solver.init(operator, {}), vector, {})[0]

    carried = carry_conditions(solve)
    assert any(float_conditions(solve, matrix, vector))
    assert not any(float_conditions(carried, matrix, vector))
    for transform in (lambda f: f, jax.jit):
        got = transform(carried)(matrix, vector)
        # The compiler may round a rewritten program differently.
        np.testing.assert_allclose(got, transform(solve)(matrix, vector), rtol=1e-10)
    np.testing.assert_allclose(matrix @ carried(matrix, vector), vector, atol=1e-7)
    vectors = jnp.stack([vector, 1e-3 * vector, vector[::-1]])
    batched = jax.jit(jax.vmap(carried, (None, 0)))(matrix, vectors)
    np.testing.assert_allclose(jnp.linalg.solve(matrix, vectors.T).T, batched, atol=1e-6)


@pytest.mark.one_of(2)
@pytest.mark.timeout(120)
@pytest.mark.parametrize("implicit", [False, True])
def test_batched_jaxopt_returns(implicit):
    # Without the rewriting this hangs for ever on some versions of JAX, on CPU: see
    # https://github.com/jax-ml/jax/issues/20628.
    jaxopt = import_jaxopt()
    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.normal(size=(16, 20, 5)), jnp.float32)
    targets = jnp.asarray(rng.normal(size=(16, 20)), jnp.float32)

    def loss(w, x, y):
        return jnp.mean((x @ w - y) ** 2)

    def run(x, y):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            solver = jaxopt.ProjectedGradient(
                loss,
                jaxopt.projection.projection_non_negative,
                maxiter=200,
                tol=1e-6,
                implicit_diff=implicit,
                unroll=False,
            )
            return solver.run(jnp.ones(5, jnp.float32), x=x, y=y).params

    carried = carry_conditions(run)
    assert any(float_conditions(run, data[0], targets[0]))
    assert not any(float_conditions(carried, data[0], targets[0]))
    got = jax.jit(jax.vmap(carried))(data, targets)
    for i in (0, 7, 15):
        alone = jax.jit(run)(data[i], targets[i])
        np.testing.assert_allclose(got[i], alone, atol=1e-3)  # its own tolerance
    if implicit:
        derivative = jax.jit(jax.vmap(jax.grad(lambda y, x: jnp.sum(carried(x, y)))))
        assert jnp.all(jnp.isfinite(derivative(targets, data)))


# Operations with finite derivatives

POINTS = jnp.array([0.0, 0.3, 2.0, 1e-3])
OPERATIONS = {
    "sqrt": (jnp.sqrt, lambda x: 0.5 / np.sqrt(x)),
    "rsqrt": (lax.rsqrt, lambda x: -0.5 * x**-1.5),
    "cbrt": (jnp.cbrt, lambda x: x ** (-2 / 3) / 3),
    "log": (jnp.log, lambda x: 1 / x),
    "log1p": (lambda x: jnp.log1p(x - 1), lambda x: 1 / x),
    "integer power": (lambda x: x**-2, lambda x: -2 * x**-3.0),
    "power": (lambda x: x**0.5, lambda x: 0.5 / np.sqrt(x)),
    "power, of x": (lambda x: 0.9**x, lambda x: np.log(0.9) * 0.9**x),
    "power, both": (lambda x: x**x, lambda x: x**x * (1 + np.log(x))),
    "inverse": (lambda x: 3 / x, lambda x: -3 / x**2),
    "quotient": (lambda x: x / (x * x), lambda x: -1 / x**2),
    "sign": (lambda x: x / jnp.sqrt(x * x), lambda x: 0 * x),
    "times infinity": (lambda x: jnp.where(x > 0, x, x * (1 / x)), lambda x: x**0),
}


@pytest.mark.one_of(4)
@pytest.mark.parametrize("name", OPERATIONS)
def test_derivatives_are_finite_and_right(name):
    fn, derivative = OPERATIONS[name]
    masked = finite_derivatives(fn)
    with np.errstate(all="ignore"):
        expected = derivative(np.asarray(POINTS))
    expected = np.where(np.isfinite(expected), expected, 0)
    if name == "times infinity":
        expected[0] = 0  # x * inf has no derivative at 0
    assert_same_bits(masked(POINTS), fn(POINTS))
    assert_same_bits(jax.jit(masked)(POINTS), jax.jit(fn)(POINTS))

    def total(x):
        return jnp.sum(masked(x))

    ones = jnp.ones_like(POINTS)
    got = {
        "reverse": jax.grad(total)(POINTS),
        "reverse, jit": jax.jit(jax.grad(total))(POINTS),
        "forward": jax.jvp(masked, (POINTS,), (ones,))[1],
        "reverse, vmap": jax.vmap(jax.grad(masked))(POINTS),
        "forward, vmap": jax.vmap(jax.jacfwd(masked))(POINTS),
        "scan": jax.grad(lambda x: lax.scan(lambda c, x: (c + masked(x), None), 0.0, x)[0])(
            POINTS
        ),
    }
    for value in got.values():
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.one_of(4)
@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives_are_finite(name):
    fn, _ = OPERATIONS[name]
    masked = finite_derivatives(fn)

    def total(x):
        return jnp.sum(masked(x))

    def scanned(x):
        # JAX 0.10 forgets the rules of `jax.custom_jvp` in here.
        def body(scale, _):
            out = masked(scale * x)
            return 1.1 * scale, jnp.where(jnp.isfinite(out), out, 0)

        return jnp.sum(lax.scan(body, 1.0, None, 2)[1])

    for f in (total, scanned):
        modes = {
            "reverse, reverse": jax.jacrev(jax.grad(f))(POINTS),
            "forward, reverse": jax.jacfwd(jax.grad(f))(POINTS),
            "reverse, forward": jax.jacrev(jax.jacfwd(f))(POINTS),
        }
        for value in modes.values():
            assert jnp.all(jnp.isfinite(value))
    # Away from the singular point they are the usual ones.
    away = POINTS[1:]
    expected = jax.hessian(lambda x: jnp.sum(fn(x)))(away)
    np.testing.assert_allclose(jax.hessian(total)(away), expected, rtol=1e-9, atol=1e-8)


def test_plain_derivatives_are_not_finite():
    # What the rewriting is for; if this fails it has become superfluous.
    gradient = jax.grad(lambda x: jnp.sum(x / (jnp.sqrt(x * x) + 1e-8)))
    assert jnp.isnan(gradient(jnp.zeros(2))).all()


def test_infinite_tangents_are_masked_too():
    # The other factor of the product must not be infinite either.
    masked = finite_derivatives(jnp.sqrt)
    _, tangent = jax.jvp(masked, (jnp.array([0.0, 1.0]),), (jnp.array([jnp.inf, 1.0]),))
    np.testing.assert_array_equal(tangent, [0.0, 0.5])
    _, pullback = jax.vjp(masked, jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(pullback(jnp.array([jnp.inf, 1.0]))[0], [0.0, 0.5])


def test_operands_of_different_shapes():
    # A scalar meets an array in one operation.
    masked = finite_derivatives(lambda x, s: lax.div(x, s) + lax.pow(x, s))
    x = jnp.array([0.0, 1.0, 2.0])
    got = jax.grad(lambda x, s: jnp.sum(masked(x, s)), argnums=(0, 1))(x, 2.0)
    np.testing.assert_allclose(got[0], 0.5 + 2 * x)
    np.testing.assert_allclose(got[1], -3 / 4 + 4 * np.log(2.0))


def test_integers_and_complex_numbers_are_left_alone():
    def fn(n, z):
        return n // 3, lax.div(n, 2 * n + 1), jnp.sqrt(z) / z

    args = jnp.arange(4), jnp.array([1.0 + 2.0j])
    assert names(finite_derivatives(fn), *args) == names(fn, *args)


def test_custom_derivatives_are_kept_as_they_are():
    @jax.custom_jvp
    def f(x):
        return jnp.sqrt(x)

    f.defjvp(lambda primals, tangents: (f(*primals), 7 * tangents[0]))
    got = jax.grad(finite_derivatives(f))(0.0)
    np.testing.assert_array_equal(got, 7.0)


def test_checkpoints_and_loops_stay_what_they_are():
    def fn(x):
        inner = jax.checkpoint(lambda x: jnp.sqrt(x * x))
        body = lambda c, x: (c + inner(x), inner(c + x))
        carry, ys = lax.scan(body, 0.0, x, reverse=True)
        return carry + jnp.sum(ys)

    masked = finite_derivatives(fn)
    assert_same_bits(masked(POINTS), fn(POINTS))
    assert jnp.all(jnp.isfinite(jax.grad(masked)(POINTS)))
    for primitive in ("scan", "checkpoint", "remat2"):
        assert (primitive in names(masked, POINTS)) == (primitive in names(fn, POINTS))


# Optimisers

OPTIMIZERS = {
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.01),
    "nadam": optax.nadam(0.1),
    "radam": optax.radam(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "lamb": optax.lamb(0.1),
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
}
PARAMS = {"w": jnp.array([1.0, -2.0, 3.0])}
SLOPES = {
    # Exactly zero for one entry, as for a dead unit, or for all, as at a minimum.
    "entry": {"w": jnp.array([0.7, 0.0, -0.4])},
    "whole": {"w": jnp.zeros(3)},
}


def final_loss(update, init, slopes, num_steps=6):
    """The loss after some steps on `hyper * slopes * params**2 / 2`, as a function of
    `hyper`: the zeros of the gradient stay where they are."""

    def loss(hyper):
        def step(carry, _):
            params, state = carry
            gradient = jax.tree.map(lambda s, p: hyper * s * p, slopes, params)
            updates, state = update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = PARAMS, init(PARAMS)
        (params, _), _ = lax.scan(step, carry, None, num_steps)
        return optax.tree.norm(params, squared=True)

    return loss


@pytest.mark.one_of(6)
@pytest.mark.parametrize("zeros", SLOPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_have_finite_hypergradients_at_zero_gradients(name, zeros):
    optimizer = OPTIMIZERS[name]
    plain = final_loss(optimizer.update, optimizer.init, SLOPES[zeros])
    masked = final_loss(finite_derivatives(optimizer.update), optimizer.init, SLOPES[zeros])
    if not (name == "clip_by_global_norm" and zeros == "entry"):
        assert jnp.isnan(jax.jit(jax.grad(plain))(1.3))
    step = 1e-5
    central = (plain(1.3 + step) - plain(1.3 - step)) / (2 * step)

    @jax.jit
    def derivatives(hyper):
        first = {
            "reverse": jax.grad(masked)(hyper),
            "forward": jax.jacfwd(masked)(hyper),
            "vmap": jax.vmap(jax.grad(masked))(hyper[None])[0],
        }
        second = {
            "reverse, reverse": jax.grad(jax.grad(masked))(hyper),
            "forward, reverse": jax.jacfwd(jax.grad(masked))(hyper),
        }
        return first, second

    first, second = derivatives(jnp.asarray(1.3))
    for value in first.values():
        # The truncation and rounding of central differences.
        np.testing.assert_allclose(value, central, rtol=1e-6, atol=1e-8)
    for value in second.values():
        assert jnp.isfinite(value)


@pytest.mark.one_of(3)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_take_the_same_steps(name, dtype):
    optimizer = OPTIMIZERS[name]
    params = {**PARAMS, "b": jnp.array(0.5)}
    params = jax.tree.map(lambda a: a.astype(dtype), params)

    def run(update):
        def step(carry, _):
            params, state = carry
            gradient = jax.tree.map(lambda p: jnp.sin(p) * (p > 0), params)
            updates, state = update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), updates

        return lax.scan(step, (params, optimizer.init(params)), None, 9)

    masked = finite_derivatives(optimizer.update)
    assert_same_bits(run(masked), run(optimizer.update))
    state = optimizer.init(params)
    assert_same_bits(
        jax.jit(masked)(params, state, params),
        jax.jit(optimizer.update)(params, state, params),
    )


def test_hypergradients_agree_with_the_plain_ones_where_these_are_finite():
    # Also in the learning rate and the decay rates of the optimizer.
    slopes = {"w": jnp.array([0.7, 0.2, -0.4])}

    def loss(rewrite, hyper):
        optimizer = optax.adamw(hyper["rate"], b1=hyper["b1"], weight_decay=hyper["wd"])
        update = rewrite(optimizer.update)
        return final_loss(update, optimizer.init, slopes)(hyper["scale"])

    hyper = {"rate": 0.1, "b1": 0.8, "wd": 0.03, "scale": 1.3}
    got = jax.grad(lambda h: loss(finite_derivatives, h))(hyper)
    expected = jax.grad(lambda h: loss(lambda f: f, h))(hyper)
    for name in hyper:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-9, atol=1e-12)
