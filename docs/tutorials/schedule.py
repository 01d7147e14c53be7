# %% [markdown]
# # A schedule for a small language model
#
# A learning rate for each step of a training is more than a search can try. Its
# derivative has as many entries as there are steps, and costs a few trainings.
#
# The model predicts the next character of the help pages that ship with Python, from the
# eight before it. It is trained for 40 steps of SGD. Which learning rates are best?

# %%
import pydoc_data.topics

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import metaopt as mo


text = "\n".join(
    pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)
)
alphabet = sorted(set(text))
codes = np.array([alphabet.index(letter) for letter in text[:60_000]], np.int32)
LENGTH, WIDTH, NUM_STEPS = 8, 16, 40


def windows(part):
    starts = np.arange(0, len(part) - LENGTH - 1, 8)
    return part[starts[:, None] + np.arange(LENGTH)], part[starts + LENGTH]


parts = codes[:40_000], codes[40_000:50_000], codes[50_000:]
train, valid, test = (tuple(map(jnp.asarray, windows(part))) for part in parts)
print(len(train[0]), "windows,", len(alphabet), "characters")


# %%
class Model(eqx.Module):
    """The neural language model of Bengio et al. (2003): embeddings, one hidden layer."""

    embed: jax.Array
    hidden: eqx.nn.Linear
    readout: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embed = 0.3 * jax.random.normal(keys[0], (len(alphabet), WIDTH))
        self.hidden = eqx.nn.Linear(LENGTH * WIDTH, 64, key=keys[1])
        self.readout = eqx.nn.Linear(64, len(alphabet), key=keys[2])

    def __call__(self, letters):
        # A product: on a CPU its derivative is quicker than that of `self.embed[letters]`.
        states = jax.nn.one_hot(letters, len(alphabet)) @ self.embed
        return self.readout(jax.nn.tanh(self.hidden(jnp.ravel(states))))


def loss(model, hyper, batch):
    letters, following = batch
    losses = optax.softmax_cross_entropy_with_integer_labels
    return jnp.mean(losses(jax.vmap(model)(letters), following))


# %% [markdown]
# ## The schedule is the hyperparameter
#
# [`metaopt.hyper.PiecewiseLinear`][] is a schedule between knots, which are tuned: eight
# numbers here, from the first step to the last. Optax takes it like any other schedule.
# It starts at a constant rate that one would write down.

# %%
knots = mo.hyper.Positive(jnp.full(8, 0.1))
hyper = {"rate": mo.hyper.PiecewiseLinear(knots, NUM_STEPS)}
training = mo.Descent(
    lambda hyper: optax.sgd(hyper["rate"], momentum=0.9), num_steps=NUM_STEPS
)
problem = mo.BilevelProblem(mo.InnerProblem(loss, lambda hyper, key: Model(key)), loss)
batches = mo.Minibatches(train, 32)
outer = optax.chain(
    optax.clip_by_global_norm(1.0),  # one bad draw should not move the schedule far
    optax.adam(optax.cosine_decay_schedule(0.3, 30)),
)

solution = mo.solve_bilevel(
    problem,
    hyper,
    batches,
    mo.Minibatches(valid, 256),
    solver=mo.NestedSolver(training, mo.UnrolledAdjoint(), outer, num_seeds=2),
    num_steps=30,
    key=jax.random.key(0),
    steps_per_call=5,
)
print(solution)

# %% [markdown]
# Each outer step trained two new models, on minibatches of their own, and stepped along
# the mean of their hypergradients: a schedule that suits one draw only would not do.

# %%
_ = mo.plot.schedule({"constant": hyper["rate"], "tuned": solution.hyper["rate"]})
_ = mo.plot.history(solution.history)

# %% [markdown]
# ## On text that chose nothing

# %%
table = mo.study.compare(
    {
        "tuned schedule": mo.study.Tuned(
            mo.NestedSolver(training, mo.UnrolledAdjoint(), outer), 10
        ),
        "random search": mo.study.RandomSearch(
            mo.study.LogUniform(1e-2, 10.0), batch_size=4
        ),
        "constant rate": mo.study.Untuned(),
    },
    problem,
    hyper,
    batches,
    mo.Minibatches(valid, 256),
    test,
    inner=training,
    budget=mo.study.GradientBudget(4_000),
    seeds=range(3),
    num_points=4,
    progress=False,
)
print(table)

# %% [markdown]
# ## What failure looks like
#
# The more steps, the more sensitive the last of them are to the first. A rate at which
# training is unstable gives a derivative that is huge and useless. The report says so, by
# name:

# %%
wild = {"rate": mo.hyper.PiecewiseLinear(mo.hyper.Positive(jnp.full(8, 30.0)), NUM_STEPS)}
try:
    mo.hypergradient(
        problem,
        wild,
        batches,
        valid,
        inner=mo.Descent(lambda hyper: optax.sgd(hyper["rate"]), num_steps=NUM_STEPS),
        adjoint=mo.UnrolledAdjoint(),
        key=jax.random.key(0),
    )
except mo.SolveError as error:
    print(str(error).split("\n")[0])

# %% [markdown]
# Lower the rates that you start from, clip the step
# (`optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))`), or differentiate the
# last steps only: `mo.TruncatedAdjoint(20)`, whose bias the report names. Where the
# memory of a long training is too much, `mo.UnrolledAdjoint("1GiB")` keeps to a budget.
