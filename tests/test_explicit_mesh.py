"""Arrays over a mesh with explicit axes, the default of `jax.make_mesh`."""

import os
import subprocess
import sys

import pytest


_BEGINS = """
import equinox as eqx, jax, jax.numpy as jnp, numpy as np, optax
import metaopt as mo
from jax.sharding import NamedSharding, PartitionSpec as P

jax.config.update("jax_enable_x64", True)
mesh = jax.make_mesh((2,), ("d",))

def put(tree, spec):
    return jax.device_put(tree, NamedSharding(mesh, spec))

x = jax.random.normal(jax.random.key(0), (12, 4))
y = x @ jnp.array([1.0, -2.0, 0.0, 0.5])
mse = lambda p, h, b: jnp.mean((b[0] @ p - b[1]) ** 2)
problem = mo.BilevelProblem(lambda p, h, b: mse(p, h, b) + jnp.sum(jnp.exp(h) * p**2), mse)
train, valid = (x[:6], y[:6]), (x[6:], y[6:])
params, hyper = jnp.zeros(4), jnp.full(4, -1.0)
sgd, adam = mo.Descent(optax.sgd(0.1), 400), mo.Descent(optax.adam(0.1), 3)

"""

_HYPERGRADIENTS = """
def slope(over, inner, adjoint):
    variables, data = (hyper, params), (train, valid)
    if over is not None:
        variables, data = put(variables, over), put(data, P("d"))
    at, start = variables
    return mo.hypergradient(
        problem, at, *data, params=start, inner=inner, adjoint=adjoint
    )[0]

exact = slope(None, sgd, mo.ImplicitAdjoint(mo.Dense()))
unrolled = slope(None, adam, mo.UnrolledAdjoint())
judged = mo.accuracy.DualWeighted()
FEW = (P(), mo.GMRES(), judged), (P("d"), mo.CG(), judged)
REST = (
    (P("d"), mo.Dense(), None),
    (P("d"), mo.Neumann(300), None),
    (P("d"), mo.CG(preconditioner=mo.linear.DiagonalEstimate(4)), None),
    (P("d"), mo.CG(preconditioner=mo.linear.LowRank(2)), None),
    (P("d"), mo.linear.LinearFixedPoint(mo.Anderson(rtol=1e-8)), None),
)
with jax.set_mesh(mesh):
    for over, solver, error in SOLVERS:
        got = slope(over, sgd, mo.ImplicitAdjoint(solver, error=error))
        np.testing.assert_allclose(got, exact, rtol=1e-3, err_msg=str((over, solver)))
    got = slope(P("d"), adam, mo.UnrolledAdjoint())
    np.testing.assert_allclose(got, unrolled, rtol=1e-9)
    for memory in "1GiB", mo.memory.OnlineCheckpoints():
        try:
            slope(P("d"), adam, mo.UnrolledAdjoint(memory))
        except ValueError as error:
            assert "Blocks()" in str(error) and "AxisType.Auto" in str(error)
        else:
            raise AssertionError(memory)

"""

_REST = """
sgd, adam = mo.Descent(optax.sgd(0.1), 400), mo.Descent(optax.adam(0.1), 3)

W = jax.random.normal(jax.random.key(2), (3, 3)) * 0.2
def layer_loss(W, x, solver):
    step = lambda z, x: jnp.tanh(z @ W + x)
    layer = mo.nn.Equilibrium(step, jnp.zeros_like, solver=solver)
    return jnp.mean(layer(x)[0] ** 2)

with jax.set_mesh(mesh):
    for solver in mo.Anderson(rtol=1e-9), mo.Broyden(rtol=1e-9):
        rows = jnp.sin(jnp.arange(12.0)).reshape(4, 3)
        a, b = (jax.grad(layer_loss)(W, x, solver) for x in (rows, put(rows, P("d"))))
        np.testing.assert_allclose(a, b, rtol=1e-6)

def tuned(train, valid, key):
    solver = mo.NestedSolver(adam, mo.UnrolledAdjoint(), outer=optax.sgd(0.1))
    train = mo.Minibatches(train, 4)
    return mo.solve_bilevel(
        problem, hyper, train, valid, params=params, solver=solver, num_steps=2
    ).hyper

want = tuned(train, valid, None)
with jax.set_mesh(mesh):
    np.testing.assert_allclose(tuned(*put((train, valid), P("d")), None), want, rtol=1e-9)
"""

_TASKS = """
loss = lambda model, batch: jnp.mean((jax.vmap(model)(batch[0]) - batch[1]) ** 2)
x = jax.random.normal(jax.random.key(0), (2, 4, 5))
tasks = mo.few_shot.Task((x[0], jnp.sin(x[0])), (x[1], jnp.sin(x[1])))
model = eqx.nn.MLP("scalar", "scalar", 6, 1, jnp.tanh, key=jax.random.key(1))
learner = mo.few_shot.MAML(loss, mo.Descent(optax.adam(0.1), 2), chunk_size=2)
metric = lambda model, batch: loss(model, batch)
learned = eqx.filter_jit(lambda tasks: learner.value_and_grad(model, tasks)[:2])
evaluated = lambda tasks: mo.few_shot.evaluate(learner, model, tasks, metric).values
for of in FUNCTIONS:
    for a, b in zip(*(jax.tree.leaves(of(t)) for t in (tasks, put(tasks, P("d"))))):
        np.testing.assert_allclose(a, b, rtol=1e-9)
"""


_PROGRAMS = {
    "two linear solvers": _HYPERGRADIENTS.replace("SOLVERS", "FEW"),
    "the other linear solvers": _HYPERGRADIENTS.replace("SOLVERS", "REST"),
    "layers and runs": _REST,
    "learning over tasks": _TASKS.replace("FUNCTIONS", "(learned,)"),
    "other functions of tasks": _TASKS.replace("FUNCTIONS", "(evaluated,)"),
}


@pytest.mark.ci
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if "other" in name else [])
        for name in _PROGRAMS
    ],
)
def test_values_over_an_explicit_mesh_are_right(name):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _BEGINS + _PROGRAMS[name]]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
