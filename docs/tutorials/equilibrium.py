# %% [markdown]
# # An equilibrium layer that trains
#
# A layer that is applied until nothing changes any more is as deep as it takes, and its
# derivative needs the fixed point alone: memory does not grow with the depth. Here it
# classifies digits.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import metaopt as mo


digits = mo.datasets.load_digits()
train, test = mo.datasets.split(digits, (900, 897), seed=0)

# %% [markdown]
# ## The layer
#
# [`metaopt.nn.ContractiveCell`][] is $z \mapsto \tanh(W z + U x + b)$ with a spectral
# norm of $W$ of at most 0.9. With that bound there is one fixed point for every input,
# and it stays so while the weights are trained.


# %%
class Model(eqx.Module):
    layer: mo.nn.Equilibrium
    readout: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        cell = mo.nn.ContractiveCell(64, 32, bound=0.9, key=keys[0])
        self.layer = mo.nn.Equilibrium(cell, solver=mo.Anderson(rtol=1e-4), throw=False)
        self.readout = eqx.nn.Linear(32, 10, key=keys[1])

    def __call__(self, x):
        state, info = self.layer(x)
        return self.readout(state), info


def cross_entropy(model, x, y):
    logits, info = jax.vmap(model)(x)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.mean(losses), info


model = Model(jax.random.key(0))
value, info = cross_entropy(model, jnp.asarray(train.x[:5]), jnp.asarray(train.y[:5]))
print("steps to the fixed point:", info.num_steps)
print("residuals:", info.residual)

# %% [markdown]
# ## Training
#
# The layer is differentiable like any other. `throw=False` keeps one example without a
# fixed point from ending the run: `info.result` says so, its derivative is NaN, and the
# step is not taken.

# %%
optimizer = optax.adam(3e-3)


@eqx.filter_jit
def step(model, state, x, y):
    differentiate = eqx.filter_value_and_grad(cross_entropy, has_aux=True)
    (value, info), gradient = differentiate(model, x, y)
    taken = jnp.isfinite(optax.tree_utils.tree_norm(gradient))
    updates, new_state = optimizer.update(gradient, state)
    new = eqx.apply_updates(model, updates), new_state
    keep = lambda new, old: jnp.where(taken, new, old) if eqx.is_array(new) else new
    model, state = jax.tree.map(keep, new, (model, state))
    return model, state, value, jnp.max(info.num_steps), taken


random = np.random.default_rng(0)
state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
values, steps, skipped = [], [], 0
for _ in range(300):
    rows = random.choice(900, 64, replace=False)
    out = step(model, state, jnp.asarray(train.x[rows]), jnp.asarray(train.y[rows]))
    model, state, value, most, taken = out
    values.append(float(value))
    steps.append(int(most))
    skipped += int(not taken)
first, last = np.mean(values[:20]), np.mean(values[-20:])
print(f"loss {first:.3f} -> {last:.3f}; {skipped} steps skipped")

# %%
logits, info = jax.vmap(model)(jnp.asarray(test.x))
accuracy = np.mean(np.argmax(np.asarray(logits), axis=1) == test.y)
print(f"test accuracy {accuracy:.3f}")

# %% [markdown]
# ## Is it a contraction?
#
# The eigenvalues of the Jacobian at the fixed point of one image. All lie within the
# circle, so that the map contracts there; the closer to it, the more steps a solve takes.

# %%
x = jnp.asarray(test.x[0])
z, _ = model.layer(x)
jacobian = jax.jacfwd(lambda z: model.layer.cell(z, x))(z)
_ = mo.plot.spectrum(np.linalg.eigvals(np.asarray(jacobian)))

# %%
figure, axes = plt.subplots(figsize=(5.4, 2.8), layout="constrained")
axes.plot(steps, lw=0.9)
axes.set(title="Evaluations until convergence", xlabel="training step", ylabel="at most")
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## What failure looks like
#
# Without a bound, a cell with large weights has no fixed point that the solver finds. The
# layer says so instead of training on:


# %%
class Unbounded(eqx.Module):
    weight: jax.Array
    inputs: jax.Array

    def __call__(self, z, x):
        return jnp.tanh(self.weight @ z + self.inputs @ x)


keys = jax.random.split(jax.random.key(1))
cell = Unbounded(
    3.0 * jax.random.normal(keys[0], (32, 32)), jax.random.normal(keys[1], (32, 64))
)
layer = mo.nn.Equilibrium(cell, lambda x: jnp.zeros(32), throw=False)
z, info = layer(x)
print(mo.RESULTS[info.result])

# %% [markdown]
# Bound its matrices: `mo.nn.bound_spectral_norm(cell, 0.9)`. [Equilibrium
# layers](../equilibrium.md) has the solvers, the other ways to differentiate, and more
# remedies.
