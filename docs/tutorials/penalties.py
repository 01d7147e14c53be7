# %% [markdown]
# # One penalty for each parameter
#
# A softmax regression on 64 pixels and ten digits has 650 parameters. With 150 examples
# it overfits. One weight decay for all of them is tuned by a grid; one for *each* of them
# needs a derivative. The inner problem is solved to convergence, so the implicit adjoint
# differentiates its solution, without the path, whatever the number of steps.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import metaopt as mo


digits = mo.datasets.load_digits()
train, valid, test = (
    (jnp.asarray(part.x), jnp.asarray(part.y))
    for part in mo.datasets.split(digits, (150, 750, 897), seed=0)
)
params = {"weight": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}


def cross_entropy(params, hyper, batch):
    logits = batch[0] @ params["weight"] + params["bias"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
    return jnp.mean(losses)


def penalised(params, hyper, batch):
    weight = jnp.sum(hyper["weight"].value * params["weight"] ** 2)
    bias = jnp.sum(hyper["bias"].value * params["bias"] ** 2)
    return cross_entropy(params, hyper, batch) + weight + bias


def accuracy(params, hyper, batch):
    logits = batch[0] @ params["weight"] + params["bias"]
    return jnp.mean(jnp.argmax(logits, axis=1) == batch[1])


# %% [markdown]
# ## Tune 650 numbers
#
# `hyper` has the shapes of the params: one positive number for each. (For a network,
# `mo.hyper.PerLeaf(mo.hyper.Positive(1e-3), model, "*.weight")` makes one for each weight
# matrix.) The linear systems are solved by conjugate gradients, each of which is one
# product with the Hessian; no matrix is formed.

# %%
hyper = {
    "weight": mo.hyper.Positive(jnp.full((64, 10), 1e-3)),
    "bias": mo.hyper.Positive(jnp.full(10, 1e-3)),
}
descent = mo.Descent(optax.sgd(0.5, momentum=0.9), num_steps=400)
solver = mo.NestedSolver(
    descent,
    mo.ImplicitAdjoint(mo.CG(rtol=1e-2), rtol=0.3),
    optax.adam(0.1),
    start=mo.WarmStart(),
)
problem = mo.BilevelProblem(penalised, cross_entropy)
solution = mo.solve_bilevel(
    problem,
    hyper,
    train,
    valid,
    params=params,
    solver=solver,
    num_steps=40,
    steps_per_call=10,
    callbacks=[mo.callbacks.KeepBest()],
)
print(solution)
print(solution.report)

# %% [markdown]
# The warm start lets each inner solve begin where the last one ended. The report of the
# last hypergradient has the residual of the inner problem, that of the linear system, and
# an estimate of the error that both leave.

# %%
_ = mo.plot.history(solution.history)
_ = mo.plot.hyper_path(solution.history)

# %% [markdown]
# ## Where the penalties went
#
# Averaged over the classes, as an image. Pixels without ink in any example, such as some
# at the border, have no influence and keep the penalty that they began with, 1e-3.

# %%
decays = np.log10(np.asarray(solution.hyper["weight"].value)).mean(axis=1)
figure, axes = plt.subplots(figsize=(3.6, 3.0), layout="constrained")
image = axes.imshow(decays.reshape(8, 8), cmap="cividis")
axes.set(title="Mean penalty, powers of ten", xticks=[], yticks=[])
_ = figure.colorbar(image)

# %% [markdown]
# ## Beside one shared penalty
#
# A study gives both the same number of gradients, and measures on digits that chose
# nothing. A space for all leaves in common is the grid that one would try.

# %%
shared = mo.study.LogUniform(1e-5, 1.0, shared=True)
table = mo.study.compare(
    {
        "one for each": solver,
        "one for all, searched": mo.study.RandomSearch(
            {"weight": shared, "bias": None}, batch_size=4
        ),
        "untuned": mo.study.Untuned(),
    },
    problem,
    hyper,
    params=params,
    inner=descent,
    split=lambda seed: tuple(
        (jnp.asarray(part.x), jnp.asarray(part.y))
        for part in mo.datasets.split(digits, (150, 750, 897), seed)
    ),
    budget=mo.study.GradientBudget(20_000),
    seeds=range(3),
    metrics={"accuracy": accuracy},
    num_points=4,
    progress=False,
)
print(table)

# %% [markdown]
# With 650 outer variables the validation set is overfitted in its turn: report the loss
# on a third set, as here, and stop early (`mo.callbacks.StopEarly`).
#
# ## What failure looks like
#
# The implicit adjoint needs a solution. After ten steps there is none yet, and it says by
# how much:

# %%
try:
    mo.hypergradient(
        problem,
        hyper,
        train,
        valid,
        params=params,
        inner=mo.Descent(optax.sgd(0.5), num_steps=10),
        adjoint=mo.ImplicitAdjoint(mo.CG(rtol=1e-2)),
    )
except mo.SolveError as error:
    print(str(error).split("\n")[0])

# %% [markdown]
# Take more steps, or an adjoint that follows the path and needs no solution:
# `mo.UnrolledAdjoint()`.
