"""Memory plans: the same hypergradient in less memory; mixed mode; budgets of bytes."""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from metaopt._adjoint import MemoryBudget
from metaopt._adjoint._memory._blocks import _split
from problems import relative_error


PLANS = {
    "updates": mo.memory.StoreUpdates(),
    "steps": mo.memory.RecomputeSteps(),
    "blocks": mo.memory.Blocks(),
    "blocks of stored steps": mo.memory.Blocks(steps=mo.memory.StoreAll()),
    "blocks of blocks": mo.memory.Blocks(2, mo.memory.RecomputeSteps()),
    "online": mo.memory.OnlineCheckpoints(),
}
OPTIMIZERS = {
    "sgd": lambda hyper: optax.sgd(jnp.exp(hyper["rate"])),
    "momentum": lambda hyper: optax.sgd(jnp.exp(hyper["rate"]), hyper["momentum"]),
    "adam": lambda hyper: optax.adam(jnp.exp(hyper["rate"]), b1=hyper["momentum"]),
}


class Net(mo.extend.AbstractInnerProblem):
    """A small network with a leaf that is not trained and data as fields."""

    shift: jax.Array
    has_aux = True

    def init(self, hyper, key):
        weights = [jax.random.normal(k, (4, 4)) / 2 for k in jax.random.split(key, 3)]
        return {"weights": weights, "order": jnp.arange(4)}

    def loss(self, params, hyper, batch):
        x, y = batch
        for weight in params["weights"]:
            x = jnp.tanh((x @ weight)[:, params["order"]] + self.shift)
        decay = sum(jnp.sum(weight**2) for weight in params["weights"])
        return jnp.mean((x - y) ** 2) + jnp.exp(hyper["decay"]) * decay, jnp.mean(x)


def outer_loss(params, hyper, batch):
    return sum(jnp.sum((w - 0.1) ** 2) for w in params["weights"])


HYPER = {"rate": jnp.log(0.1), "momentum": jnp.array(0.75), "decay": jnp.array(-3.0)}
SHIFT = jnp.array([0.1, -0.2, 0.0, 0.3])
ROWS = tuple(jax.random.normal(jax.random.key(i), (40, 4)) for i in (1, 2))


def value(hyper, shift, rows, *, plan, optimizer="momentum", num_steps=11):
    """The outer loss as a function of everything that can be differentiated."""
    solution = mo.solve_inner(
        Net(shift),
        hyper,
        mo.Minibatches(rows, batch_size=5),
        solver=mo.Descent(OPTIMIZERS[optimizer], num_steps),
        adjoint=mo.UnrolledAdjoint(plan),
    )
    # Losses and auxiliary outputs are differentiated along the path as well.
    extra = jnp.sum(solution.stats["losses"]) + solution.aux
    return outer_loss(solution.value, hyper, None) + extra


@ft.cache
def plain_gradient(optimizer, num_steps=11):
    fn = ft.partial(
        value, plan=mo.memory.StoreAll(), optimizer=optimizer, num_steps=num_steps
    )
    return jax.jit(jax.grad(fn, (0, 1, 2)))(HYPER, SHIFT, ROWS)


def _slow_unless(quick: bool, *parameters: Any) -> Any:
    return pytest.param(*parameters, marks=() if quick else pytest.mark.slow)


# Plans and optimizers know nothing of each other.
_QUICK_PAIRS = {
    ("updates", "adam"),
    ("steps", "momentum"),
    ("blocks", "adam"),
    ("blocks of blocks", "sgd"),
    ("online", "sgd"),
}


@pytest.mark.one_of(8)
@pytest.mark.parametrize(
    "plan, optimizer",
    [
        _slow_unless((plan, optimizer) in _QUICK_PAIRS, plan, optimizer)
        for plan in PLANS
        for optimizer in OPTIMIZERS
    ],
)
def test_plans_agree(plan, optimizer):
    # In `hyper`, in a field of the problem and in the data, which are float arrays.
    fn = ft.partial(value, plan=PLANS[plan], optimizer=optimizer)
    got = jax.jit(jax.grad(fn, (0, 1, 2)))(HYPER, SHIFT, ROWS)
    for ours, plain in zip(got, plain_gradient(optimizer), strict=True):
        # Two ways to add up the same numbers in float64.
        assert relative_error(ours, jax.tree.leaves(plain)) < 1e-12


_QUICK = {("blocks", 1), ("blocks of blocks", 13)}


@pytest.mark.ci
@pytest.mark.parametrize(
    "plan, num_steps",
    [
        _slow_unless((plan, num_steps) in _QUICK, plan, num_steps)
        for plan in ("blocks", "blocks of blocks", "online")
        for num_steps in (1, 2, 3, 5, 13, 31)
    ],
)
def test_any_number_of_steps(plan, num_steps):
    fn = ft.partial(value, plan=PLANS[plan], num_steps=num_steps)
    got = jax.jit(jax.grad(fn))(HYPER, SHIFT, ROWS)
    want = plain_gradient("momentum", num_steps)[0]
    assert relative_error(got, jax.tree.leaves(want)) < 1e-12


@pytest.mark.ci
@pytest.mark.one_of(6)
@pytest.mark.parametrize("plan", ["updates", "steps", "blocks"])
def test_plans_in_forward_mode_and_batched(plan):
    # Elsewhere: a custom reverse rule refuses forward mode, `linear_call` refuses `vmap`.
    fn = lambda hyper: value(hyper, SHIFT, ROWS, plan=PLANS[plan])
    direction = jax.tree.map(jnp.ones_like, HYPER)
    _, slope = jax.jit(lambda h: jax.jvp(fn, (h,), (direction,)))(HYPER)
    want = sum(jax.tree.leaves(plain_gradient("momentum")[0]))
    np.testing.assert_allclose(slope, want, rtol=1e-12)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, HYPER)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), HYPER, moved)
    batched = jax.jit(jax.vmap(jax.grad(fn)))(both)
    first = jax.tree.map(lambda leaf: leaf[0], batched)
    want = jax.tree.leaves(plain_gradient("momentum")[0])
    assert relative_error(first, want) < 1e-12


@pytest.mark.ci
@pytest.mark.one_of(2)
@pytest.mark.parametrize(
    "plan, second",
    [
        ("updates", jax.jacfwd),
        ("updates", jax.hessian),
        ("steps", jax.jacrev),
        ("blocks", jax.jacfwd),
        ("online", jax.jacrev),
    ],
)
def test_second_derivative_in_mixed_mode_is_refused(plan, second):
    # Elsewhere a custom rule that is differentiated twice gives a number, and not the
    # second derivative: the linear solve that carries it hides how its operator moves.
    def fn(rate):
        hyper = {**HYPER, "rate": rate}
        return value(hyper, SHIFT, ROWS, plan=PLANS[plan], num_steps=2)

    fn = fn if second is jax.hessian else jax.grad(fn)
    with pytest.raises(ValueError, match="second derivative.*StoreAll"):
        second(fn)(HYPER["rate"])


@jax.custom_vjp
def _doubled_backwards(x):
    return x


_doubled_backwards.defvjp(lambda x: (x, None), lambda _, g: (2 * g,))


def test_loss_with_a_custom_reverse_rule():
    # Its gradient field is [2 a b + ...], whose Jacobian is not symmetric: a product with
    # the Jacobian in the place of the transposed one would be wrong in silence, and
    # forward mode through the rule is an error.
    def loss(params, hyper, batch):
        a, b = params
        return hyper * jnp.sin(_doubled_backwards(a) * b) + a**2 + b**2

    def value(hyper, plan):
        solution = mo.solve_inner(
            mo.InnerProblem(loss),
            hyper,
            params=(jnp.array(0.5), jnp.array(-1.0)),
            solver=mo.Descent(optax.sgd(0.1), 5),
            adjoint=mo.UnrolledAdjoint(plan),
        )
        return solution.value[0] * solution.value[1]

    want = jax.grad(value)(jnp.array(1.5), mo.memory.StoreAll())
    for plan in (mo.memory.StoreUpdates(), mo.memory.RecomputeSteps(), mo.memory.Blocks()):
        np.testing.assert_allclose(jax.grad(value)(jnp.array(1.5), plan), want, rtol=1e-12)


#
# What the plans keep
#


WIDTH, DEPTH, NUM_STEPS = 16, 8, 64


def deep_problem():
    def predict(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0]

    def loss(params, hyper, batch):
        x, y = batch
        return jnp.mean((predict(params, x) - y) ** 2) + hyper * jnp.sum(params**2)

    return mo.BilevelProblem(loss, loss)


def temporary_bytes(
    adjoint, batch_size=128, transform: Any = optax.sgd(0.1)
) -> tuple[int, str]:
    def gradient(hyper, params, train, valid):
        return mo.hypergradient(
            deep_problem(),
            hyper,
            train,
            valid,
            params=params,
            inner=mo.Descent(transform, NUM_STEPS),
            adjoint=adjoint,
            throw=False,
        )

    params = jax.ShapeDtypeStruct((DEPTH, WIDTH, WIDTH), jnp.float32)
    rows = jax.ShapeDtypeStruct((batch_size, WIDTH), jnp.float32)
    hyper = jax.ShapeDtypeStruct((), jnp.float32)
    lowered = jax.jit(gradient).lower(hyper, params, (rows, rows), (rows, rows))
    analysis: Any = lowered.compile().memory_analysis()
    return analysis.temp_size_in_bytes, lowered.out_info[1].adjoint


@pytest.mark.ci
def test_each_plan_keeps_what_it_says():
    params = 4 * DEPTH * WIDTH * WIDTH
    activations = 4 * DEPTH * WIDTH * 128
    size = {
        name: temporary_bytes(mo.UnrolledAdjoint(plan))[0]
        for name, plan in {"all": mo.memory.StoreAll(), **PLANS}.items()
    }
    assert size["all"] > NUM_STEPS * 2 * activations
    # Params before each step, and the update.
    one_step = 12 * activations
    assert NUM_STEPS * params < size["updates"] < 2.6 * NUM_STEPS * params + one_step
    assert NUM_STEPS * params < size["steps"] < 1.2 * NUM_STEPS * params + one_step
    # Eight blocks of eight steps, in which params and updates are kept.
    assert size["blocks"] < 25 * params + one_step
    assert size["blocks of blocks"] < 14 * params + one_step
    assert size["online"] < 20 * params + one_step


def test_steps_made_again_keep_no_updates():
    # Few rows, so that params and updates take most of the memory; and the derivative in
    # the rate is made from the updates.
    kept, again = (
        temporary_bytes(mo.UnrolledAdjoint(plan), 4, lambda hyper: optax.sgd(hyper))[0]
        for plan in (mo.memory.StoreUpdates(), mo.memory.RecomputeSteps())
    )
    assert again < 0.7 * kept


@pytest.mark.one_of(3)
@pytest.mark.parametrize("plan", ["updates", "steps", "blocks"])
def test_batches_are_not_kept_for_each_step(plan):
    # As they are elsewhere, and in the derivative of a plain loop: each product with the
    # Hessian needs one. Newer versions of JAX kept all of the data, and that for each
    # step, where it did not pass into the step untouched.
    rows, num_steps, batch_size = (4096, 256), 64, 64

    def loss(params, hyper, batch):
        return jnp.mean((jnp.tanh(batch @ params)) ** 2) + hyper * jnp.sum(params**2)

    def size(plan):
        def gradient(hyper, params, train, valid):
            return mo.hypergradient(
                mo.BilevelProblem(loss, loss),
                hyper,
                mo.Minibatches(train, batch_size),
                valid,
                params=params,
                inner=mo.Descent(optax.sgd(0.1), num_steps),
                adjoint=mo.UnrolledAdjoint(plan),
                throw=False,
            )[0]

        struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        arguments = struct(), struct(rows[1]), struct(*rows), struct(batch_size, rows[1])
        analysis: Any = jax.jit(gradient).lower(*arguments).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    # Params are as large as one row, and batches as 64.
    batch = 4 * batch_size * rows[1]
    assert size(mo.memory.StoreAll()) > num_steps * batch
    assert size(PLANS[plan]) < 5 * batch


def test_budget_chooses_the_plan():
    # From generous to tight: each choice keeps to its budget and none is wasteful.
    generous, name = temporary_bytes(mo.UnrolledAdjoint("1 GB"))
    assert name == "UnrolledAdjoint(memory=StoreAll())"
    sizes = [generous]
    for budget in (generous // 2, generous // 8, generous // 12):
        size, name = temporary_bytes(mo.UnrolledAdjoint(budget))
        assert size <= budget, name
        sizes.append(size)
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.slow
def test_budget_that_nothing_keeps_to():
    with pytest.raises(ValueError, match="No memory plan keeps to 97.66 KiB: the least is"):
        temporary_bytes(mo.UnrolledAdjoint(100_000))
    with pytest.raises(ValueError, match="even the params .*ReversibleSGD"):
        temporary_bytes(mo.UnrolledAdjoint(1000))


@pytest.mark.slow
def test_budget_in_solve_inner_and_in_a_run():
    def outer(hyper, adjoint):
        solution = mo.solve_inner(
            mo.InnerProblem(lambda params, hyper, batch: jnp.sum((params - hyper) ** 2)),
            hyper,
            params=jnp.zeros(100),
            solver=mo.Descent(optax.sgd(0.1), 50),
            adjoint=adjoint,
        )
        return jnp.sum(solution.value**2)

    point = jnp.array(3.0)
    want = jax.grad(outer)(point, mo.UnrolledAdjoint())
    for transformed in (jax.grad(outer), jax.jit(jax.grad(outer), static_argnums=1)):
        got = transformed(point, mo.UnrolledAdjoint("20 kB"))
        np.testing.assert_allclose(got, want, rtol=1e-12)
    batched = jax.vmap(lambda h: jax.grad(outer)(h, mo.UnrolledAdjoint("20 kB")))
    np.testing.assert_allclose(batched(jnp.full(2, 3.0)), want, rtol=1e-12)

    problem = mo.BilevelProblem(
        lambda params, hyper, batch: jnp.sum((params - hyper) ** 2),
        lambda params, hyper, batch: jnp.sum(params**2),
    )
    solution = mo.solve_bilevel(
        problem,
        3.0,
        params=jnp.zeros(100),
        solver=mo.NestedSolver(
            inner=mo.Descent(optax.sgd(0.1), 50),
            adjoint=mo.UnrolledAdjoint("20 kB"),
            outer=optax.sgd(1e-3),
        ),
        num_steps=2,
    )
    assert solution.report is not None
    assert "memory=Blocks(" in solution.report.adjoint


def test_report_predicts_what_is_compiled():
    report = mo.memory.memory_report(
        deep_problem(),
        jnp.array(0.1, jnp.float32),
        (jnp.ones((128, WIDTH), jnp.float32),) * 2,
        (jnp.ones((128, WIDTH), jnp.float32),) * 2,
        params=jnp.ones((DEPTH, WIDTH, WIDTH), jnp.float32),
        inner=mo.Descent(optax.sgd(0.1), NUM_STEPS),
        adjoints={
            "all": mo.UnrolledAdjoint(mo.memory.StoreAll()),
            "blocks": mo.UnrolledAdjoint(mo.memory.Blocks()),
            "forward": mo.ForwardAdjoint(),
        },
    )
    assert report.params_bytes == 4 * DEPTH * WIDTH * WIDTH
    compiled = {
        "all": temporary_bytes(mo.UnrolledAdjoint(mo.memory.StoreAll()))[0],
        "blocks": temporary_bytes(mo.UnrolledAdjoint(mo.memory.Blocks()))[0],
        "forward": temporary_bytes(mo.ForwardAdjoint())[0],
    }
    for name, size in compiled.items():
        assert abs(report.temporary_bytes[name] / size - 1) < 0.2
    assert report.automatic == "UnrolledAdjoint(memory=StoreAll())"
    assert "blocks" in str(report) and "KiB" in str(report)


def test_ten_thousand_steps_in_bounded_memory():
    # What each plan takes is known before anything runs. Blocks keep the states before
    # about 100 blocks and of the 100 steps of one, where all the steps are 10,000.
    width, num_steps = 100, 10_000
    report = mo.memory.memory_report(
        mo.BilevelProblem(
            lambda params, hyper, batch: jnp.sum(jnp.cosh(params - hyper)),
            lambda params, hyper, batch: jnp.sum(params**2),
        ),
        0.3,
        params=jnp.zeros(width),
        inner=mo.Descent(optax.sgd(0.01, momentum=0.9), num_steps),
        adjoints={
            "all": mo.UnrolledAdjoint(mo.memory.StoreAll()),
            "blocks": mo.UnrolledAdjoint(mo.memory.Blocks()),
        },
    )
    state = 2 * report.params_bytes  # with its velocity
    assert report.temporary_bytes["all"] > num_steps * report.params_bytes
    # The losses and the draws of all the steps are a few numbers each.
    few = 8 * 8 * num_steps
    assert report.temporary_bytes["blocks"] < 2 * 2 * 100 * state + few
    assert "MiB" in str(report)
    # All of the steps are estimated at less than 384 MiB.
    assert report.automatic == "UnrolledAdjoint(memory=StoreAll())"


@pytest.mark.slow
def test_report_lists_every_plan_by_default():
    report = mo.memory.memory_report(
        mo.BilevelProblem(
            lambda params, hyper, batch: (params - hyper) ** 2,
            lambda params, hyper, batch: params**2,
        ),
        3.0,
        params=0.0,
        inner=mo.Descent(optax.sgd(0.1), 4, atol=1e-3),
    )
    names = " ".join(report.temporary_bytes)
    for plan in (
        "StoreAll",
        "StoreUpdates",
        "RecomputeSteps",
        "Blocks",
        "OnlineCheckpoints",
    ):
        assert plan in names


#
# Solvers that stop early
#


def test_online_checkpoints_end_with_the_loop():
    # Elsewhere the reverse pass runs over all the steps that might have been taken.
    calls = []

    def loss(params, hyper, batch):
        jax.debug.callback(lambda: calls.append(1))
        return (params - hyper) ** 2

    def gradient(plan):
        calls.clear()
        out, report = mo.hypergradient(
            mo.BilevelProblem(loss, lambda params, hyper, batch: params**2),
            3.0,
            params=0.0,
            inner=mo.Descent(optax.sgd(0.25), 10_000, atol=1e-6),
            adjoint=mo.UnrolledAdjoint(plan),
        )
        jax.effects_barrier()
        return float(out), int(report.inner.num_steps), len(calls)

    online, num_steps, count = gradient(mo.memory.OnlineCheckpoints(4))
    assert num_steps < 40 and count < 20 * num_steps
    blocks, _, _ = gradient(mo.memory.Blocks())
    np.testing.assert_allclose(online, blocks, rtol=1e-12)
    # params = (1 - 0.5^n) hyper after n steps.
    np.testing.assert_allclose(online, 6 * (1 - 0.5**num_steps) ** 2, rtol=1e-12)


#
# Settings
#


@pytest.mark.parametrize("length", [*range(1, 60), 97, 100, 997, 1000, 1024])
@pytest.mark.parametrize("num_levels", [1, 2, 3])
def test_blocks_cover_all_steps(length, num_levels):
    num_blocks, size = _split(length, num_levels)
    assert 1 <= num_blocks <= length and num_blocks * size <= length
    assert length - num_blocks * size < num_blocks
    # Neither blocks nor steps are many more than the root.
    assert num_blocks <= 2 * length ** (1 / (num_levels + 1)) + 1


@pytest.mark.parametrize(
    "size, expected",
    [
        (4096, 4096),
        ("2GiB", 2 * 1024**3),
        ("500 MB", 500_000_000),
        ("1.5 kib", 1536),
        ("100", 100),
        (" .5 TB ", 500_000_000_000),
    ],
)
def test_sizes(size, expected):
    assert MemoryBudget.of(size).num_bytes == expected
    memory: Any = mo.UnrolledAdjoint(memory=size).memory
    assert memory.num_bytes == expected


def _any(x: Any) -> Any:
    return x


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: mo.UnrolledAdjoint("2 gigs"), 'such as `"2GiB"`'),
        (lambda: mo.UnrolledAdjoint("-3MB"), "such as"),
        (lambda: mo.UnrolledAdjoint(0), "at least one byte"),
        (lambda: mo.UnrolledAdjoint(True), "a memory plan, a number of bytes"),
        (lambda: mo.UnrolledAdjoint(_any(mo.memory.StoreAll)), "must be a memory plan"),
        (lambda: mo.memory.Blocks(0), "`num_levels` must be at least 1"),
        (lambda: mo.memory.Blocks(1, _any("steps")), "`steps` must be a memory plan"),
        (lambda: mo.memory.OnlineCheckpoints(0), "`num_checkpoints` must be at least 1"),
    ],
)
def test_settings_are_checked(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_plans_are_modules_without_arrays():
    # A plan is compared by `==` when a compiled function is looked up.
    for plan in PLANS.values():
        assert not jax.tree.leaves(eqx.filter(plan, eqx.is_array))
        assert plan == eqx.combine(*eqx.partition(plan, eqx.is_array))
