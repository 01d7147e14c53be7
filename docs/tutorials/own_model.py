# %% [markdown]
# # Your own model and arrays
#
# From nothing to a model that is tuned, saved, resumed and compared with random search.
# You need a model in Equinox, arrays in NumPy, and ten minutes.
#
# The task: predict the yield of a made-up chemical process from thirty measurements, most
# of which do not matter. With 60 examples a network overfits. A penalty for each
# measurement would help, and a learning rate is needed as well: 31 numbers, tuned by
# their derivatives.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import metaopt as mo


random = np.random.default_rng(0)
measurements = random.uniform(-1, 1, size=(1120, 30))
yields = np.sin(3 * measurements[:, 0]) + measurements[:, 1] * measurements[:, 2]
yields += 0.2 * random.standard_normal(len(yields))

x, y = measurements.astype(np.float32), yields.astype(np.float32)
train, valid, test = (x[:60], y[:60]), (x[60:120], y[60:120]), (x[120:], y[120:])

# %% [markdown]
# ## Two losses
#
# metaopt minimises an *outer loss* (here: the error on validation data) at the solution
# of an *inner problem* (here: training). Both are functions of the model, of `hyper`
# (what is tuned) and of a batch. `hyper` is any pytree; [`metaopt.hyper.Positive`][]
# keeps a number positive.


# %%
def error(model, hyper, batch):
    inputs, targets = batch
    return jnp.mean((jax.vmap(model)(inputs)[:, 0] - targets) ** 2)


def penalised_error(model, hyper, batch):
    by_measurement = jnp.sum(model.layers[0].weight ** 2, axis=0)
    return error(model, hyper, batch) + hyper["decay"].value @ by_measurement


hyper = {
    "rate": mo.hyper.Positive(0.01),
    "decay": mo.hyper.Positive(jnp.full(30, 1e-2)),
}


def new_model(hyper, key):
    return eqx.nn.MLP(30, 1, width_size=32, depth=1, activation=jnp.tanh, key=key)


problem = mo.BilevelProblem(mo.InnerProblem(penalised_error, new_model), error)

# %% [markdown]
# ## One outer step
#
# The inner solver is plain training by optax; it is built from `hyper`, because the
# learning rate is tuned. `UnrolledAdjoint` differentiates through all 100 of its steps.
# First a look at one hypergradient, the derivative of the validation error in `hyper`,
# with its report:

# %%
training = mo.Descent(lambda hyper: optax.adam(hyper["rate"].value), num_steps=100)
gradient, report = mo.hypergradient(
    problem,
    hyper,
    train,
    valid,
    inner=training,
    adjoint=mo.UnrolledAdjoint(),
    key=jax.random.key(0),
)
print(report)

# %% [markdown]
# The report says how the training went and how far the derivative can be trusted. Before
# a long run, check it once against finite differences. (The network has a smooth
# activation: Adam on units of relu that switch on and off is no continuous function of
# its learning rate, and there the check says that the two do not agree.)

# %%
check = mo.check_hypergradient(
    problem,
    hyper,
    train,
    valid,
    inner=training,
    adjoint=mo.UnrolledAdjoint(),
    key=jax.random.key(0),
)
print(check)

# %% [markdown]
# ## Tune
#
# `solve_bilevel` repeats the step with an optimizer for `hyper`. Each outer step trains a
# new network from scratch, so that the settings are judged by a whole training. The
# callbacks write a checkpoint and a log.

# %%
solver = mo.NestedSolver(
    inner=training,
    adjoint=mo.UnrolledAdjoint(),
    outer=optax.chain(
        # A network that happens to start badly should not move all of the settings.
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(0.2, 66)),
    ),
)


def tune(*more):
    return mo.solve_bilevel(
        problem,
        hyper,
        train,
        valid,
        solver=solver,
        num_steps=66,
        steps_per_call=6,
        key=jax.random.key(1),
        callbacks=[
            mo.callbacks.Checkpoint("runs/tuned", every=6),
            mo.callbacks.Log(mo.callbacks.CSV("runs/history.csv")),
            *more,
        ],
    )


def stop_early(run):
    return run.num_steps >= 30  # as if the machine had been switched off


solution = tune(stop_early)
print(solution)

# %% [markdown]
# ## Resume
#
# The run ended after 30 of its 66 steps. The same call goes on from the file, to the same
# numbers bit for bit as a run that was never cut. `python -m metaopt show runs/tuned`
# prints what a file holds, and `python -m metaopt resume runs/tuned` starts its script
# again.

# %%
solution = tune()
print(solution)
print(solution.hyper["rate"])

# %% [markdown]
# Pictures are lists of axes of matplotlib.

# %%
axes = mo.plot.history(solution.history)
axes[0].figure.savefig("runs/history.png")
_ = mo.plot.hyper_path(solution.history)

# %% [markdown]
# Three measurements matter: 0, 1 and 2. Their penalties, beside those of the others:

# %%
penalties = np.asarray(solution.hyper["decay"].value)
for index in range(3):
    print(f"measurement {index}: penalty {penalties[index]:.1e}")
print(
    f"the others: {np.min(penalties[3:]):.1e} to {np.max(penalties[3:]):.1e}, "
    f"half of them below {np.median(penalties[3:]):.1e}"
)

# %% [markdown]
# ## What failure looks like
#
# A learning rate that is too large makes the training diverge. The error names the cause
# and the remedy, and its `value` holds what was reached:

# %%
wild = {"rate": mo.hyper.Positive(0.1), "decay": mo.hyper.Positive(jnp.full(30, 50.0))}
try:
    mo.hypergradient(
        problem,
        wild,
        train,
        valid,
        inner=mo.Descent(lambda hyper: optax.sgd(hyper["rate"].value), num_steps=100),
        adjoint=mo.UnrolledAdjoint(),
        key=jax.random.key(0),
    )
except mo.SolveError as error_:
    print(str(error_).split("\n")[0])

# %% [markdown]
# An adjoint that cannot see a setting says so, instead of returning zero: the implicit
# adjoint differentiates the *solution* of the inner problem, which does not depend on the
# learning rate.

# %%
try:
    mo.hypergradient(
        problem,
        hyper,
        train,
        valid,
        inner=training,
        adjoint=mo.ImplicitAdjoint(),
        key=jax.random.key(0),
    )
except ValueError as error_:
    print(error_)

# %% [markdown]
# ## Was it worth it?
#
# Compare with random search and with the settings as they were, at the same number of
# gradients, on data that chose nothing. Each method runs on three seeds, with other parts
# of the data for each. One search draws 30 penalties, and one draws a single penalty for
# all measurements.


# %%
def split(seed):
    order = np.random.default_rng(seed).permutation(len(x))
    parts = np.split(order, [60, 120])
    return tuple((x[rows], y[rows]) for rows in parts)


table = mo.study.compare(
    {
        "hypergradient": solver,
        "random search": mo.study.RandomSearch(
            {
                "rate": mo.study.LogUniform(1e-3, 0.3),
                "decay": mo.study.LogUniform(1e-5, 1.0),
            }
        ),
        "random, one penalty": mo.study.RandomSearch(
            {
                "rate": mo.study.LogUniform(1e-3, 0.3),
                "decay": mo.study.LogUniform(1e-5, 1.0, shared=True),
            }
        ),
        "untuned": mo.study.Untuned(),
    },
    problem,
    hyper,
    split=split,
    inner=training,
    budget=mo.study.GradientBudget(20_000),
    seeds=range(3),
    num_points=6,
    progress=False,
)
print(table)
_ = table.figure()

# %% [markdown]
# With two settings random search is hard to beat, and the table would say so. The
# hypergradient pays off where there are more settings than a search can try: go on with
# [one penalty for each parameter](penalties.md) or [a schedule](schedule.md).
