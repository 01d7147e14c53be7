# %% [markdown]
# # A network that tunes itself
#
# A self-tuning network is trained once, and finds a *schedule* for its hyperparameters on
# the way: its layers learn how their weights would respond to other settings, and a
# validation step differentiates through that response. It also tunes what has no
# derivative, such as the rate of dropout.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import metaopt as mo


digits = mo.datasets.load_digits()
parts = mo.datasets.split(digits, (300, 600, 897), seed=0)
train, valid, test = ((jnp.asarray(p.x), jnp.asarray(p.y)) for p in parts)


class Hyper(eqx.Module):
    dropout: mo.hyper.Interval
    decay: mo.hyper.Positive


# %% [markdown]
# ## The problem in two parts
#
# `predict` and `criterion` make the training loss; what `hyper` does to the prediction
# (dropout) is kept apart from what it does to the loss (weight decay). The model is plain
# Equinox.


# %%
class Classifier(mo.extend.AbstractPredictionProblem):
    def init(self, hyper, key):
        return eqx.nn.MLP(64, 10, 64, 1, key=key)

    def predict(self, params, hyper, batch, key):
        rate = hyper.dropout.value
        dropped = jax.random.uniform(key, batch[0].shape) < rate
        return jax.vmap(params)(jnp.where(dropped, 0.0, batch[0] / (1 - rate)))

    def criterion(self, predictions, params, hyper, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(predictions, batch[1])
        return jnp.mean(losses) + hyper.decay.value * mo.nn.squared_norm(params)


def valid_loss(params, hyper, batch):
    logits = jax.vmap(params)(batch[0])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))


problem = mo.BilevelProblem(Classifier(), valid_loss)
begin = Hyper(mo.hyper.Interval(0.05, low=0.0, high=0.9), mo.hyper.Positive(1e-4))

# %% [markdown]
# ## One run

# %%
batches = mo.Minibatches(train, 50), mo.Minibatches(valid, 100)
solution = mo.solve_bilevel(
    problem,
    begin,
    *batches,
    solver=mo.SelfTuningSolver(
        params=optax.adam(2e-3), hyper=optax.adam(3e-2), method=mo.DeltaSTN(), num_rounds=5
    ),
    num_steps=60,
    steps_per_call=10,
    key=jax.random.key(0),
)
print(solution)
print(jax.tree.map(float, mo.hyper.values(solution.hyper)))
_ = mo.plot.hyper_path(solution.history)

# %% [markdown]
# `solution.params` is an ordinary `eqx.nn.MLP`, trained, and ready to use.

# %%
plain = mo.SelfTuningSolver(
    params=optax.adam(2e-3), hyper=optax.set_to_zero(), method=mo.DeltaSTN(), num_rounds=5
)
held = mo.solve_bilevel(
    problem,
    begin,
    *batches,
    solver=plain,
    num_steps=60,
    steps_per_call=10,
    key=jax.random.key(0),
)
for name, one in {"self-tuning": solution, "settings held still": held}.items():
    print(f"{name:<20} test loss {float(valid_loss(one.params, None, test)):.3f}")

# %% [markdown]
# ## Can it be trusted?
#
# The hypergradient is as good as the response that the network has learned.
# `check_response` compares it with the one of the implicit function theorem:

# %%
check = mo.diagnostics.check_response(
    problem,
    solution,
    *batches,
    linear_solver=mo.CG(rtol=1e-2, max_steps=50, damping=1e-2),
    step=0.3,  # dropout has no derivative: differences,
    num_draws=100,  # averaged over masks
)
print(check)
_ = mo.plot.response(check)

# %% [markdown]
# ## What failure looks like
#
# A learning rate acts outside of the training loss. A network cannot learn a response to
# it, and says so instead of leaving it alone in silence:


# %%
class WithRate(eqx.Module):
    rate: mo.hyper.Positive
    decay: mo.hyper.Positive
    dropout: mo.hyper.Interval


more = WithRate(mo.hyper.Positive(1e-3), begin.decay, begin.dropout)
one = mo.solve_bilevel(
    problem,
    more,
    *batches,
    solver=mo.SelfTuningSolver(optax.adam(2e-3), optax.adam(3e-2)),
    num_steps=1,
    key=jax.random.key(0),
)
print(one.report)
