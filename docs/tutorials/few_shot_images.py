# %% [markdown]
# # Few-shot learning on your own images
#
# Learn an initialisation from which a few steps on a few examples are enough for classes
# that nobody has seen (MAML). You need images sorted by class: arrays, or a folder with
# one folder for each class. Here they are written to such a folder first, as yours may
# be: the letters of the alphabet, in sixteen fonts that come with Matplotlib.

# %%
import pathlib
import string

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
from PIL import Image, ImageDraw, ImageFont

import metaopt as mo


fonts = sorted(pathlib.Path(matplotlib.get_data_path(), "fonts/ttf").glob("*.ttf"))
kinds = "DejaVuSans", "DejaVuSerif", "STIXGeneral"
fonts = [
    font for font in fonts if font.name.startswith(kinds) and "Display" not in font.name
]
folder = pathlib.Path("images")
for letter in string.ascii_letters:
    case = "small" if letter.islower() else "large"
    name = folder / f"{letter.upper()}, {case}"
    name.mkdir(parents=True, exist_ok=True)
    for number, font in enumerate(fonts):
        image = Image.new("L", (28, 28))
        drawn = ImageFont.truetype(str(font), 22)
        ImageDraw.Draw(image).text((14, 14), letter, 255, drawn, anchor="mm")
        image.save(name / f"{number}.png")

classes = mo.datasets.load_image_folder(folder, size=14).with_rotations()
print(classes.x.shape, classes.x.dtype)

# %% [markdown]
# Each letter that is turned by a quarter is a class of its own: 208 classes. Some are kept
# for the end. `Episodes` draws tasks: five classes, one example of each to adapt to, five
# of each to be judged by.

# %%
order = np.random.default_rng(0).permutation(208)
learn, new = classes[order[:160]], classes[order[160:]]
episodes = mo.few_shot.Episodes(learn, num_ways=5, num_shots=1, num_queries=5, num_tasks=16)
tasks = episodes(jax.random.key(0))

figure, panels = plt.subplots(1, 5, figsize=(6.4, 1.6), layout="constrained")
for panel, image in zip(panels, tasks.support[0][0]):
    panel.imshow(image.reshape(14, 14), cmap="gray_r")
    panel.set(xticks=[], yticks=[])
_ = figure.suptitle("One task: adapt to these five")


# %% [markdown]
# ## A model and a learner


# %%
class Classifier(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(196, 64, key=keys[0])
        self.second = eqx.nn.Linear(64, 5, key=keys[1])

    def __call__(self, image):
        return self.second(jax.nn.relu(self.first(jnp.ravel(image))))


def loss(model, batch):
    x, y = batch
    logits = jax.vmap(model)(x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def accuracy(model, batch):
    x, y = batch
    return jnp.mean(jnp.argmax(jax.vmap(model)(x), axis=1) == y)


start = Classifier(jax.random.key(1))
maml = mo.few_shot.MAML(loss, inner=mo.Descent(optax.sgd(0.4), num_steps=2))
value, gradient, stats = maml.value_and_grad(start, tasks)
print(stats)

# %% [markdown]
# ## Learn over tasks

# %%
solution = mo.few_shot.train(
    maml,
    start,
    episodes,
    outer=optax.adam(3e-3),
    num_steps=400,
    steps_per_call=100,
    key=jax.random.key(2),
    callbacks=[mo.callbacks.Checkpoint("runs/maml", every=100)],
)
print(solution)
_ = mo.plot.history(solution.history)

# %% [markdown]
# ## On classes that nobody has seen
#
# Beside the same model without learning, and beside one that was trained without second
# derivatives (first-order MAML, a change of one argument).

# %%
first_order = mo.few_shot.MAML(
    loss, mo.Descent(optax.sgd(0.4), num_steps=2), adjoint=mo.FirstOrderAdjoint()
)
other = mo.few_shot.train(
    first_order,
    start,
    episodes,
    outer=optax.adam(3e-3),
    num_steps=400,
    steps_per_call=100,
    key=jax.random.key(2),
)
unseen = mo.few_shot.Episodes(new, 5, 1, 5)
for name, meta in {
    "not learned": start,
    "MAML": solution.meta,
    "first order": other.meta,
}.items():
    print(f"{name:<12}", mo.few_shot.evaluate(maml, meta, unseen, accuracy, num_tasks=400))

# %% [markdown]
# Use it: `maml.adapt(solution.meta, support, num_steps=3)` is the model for one new task.
#
# ## What failure looks like
#
# With an inner rate that is far too large the tasks diverge. Those that overflow are left
# out and counted. Where the numbers stay finite, only the query loss shows it:

# %%
wild = mo.few_shot.MAML(loss, inner=mo.Descent(optax.sgd(1e10), num_steps=20))
print(mo.few_shot.train(wild, start, episodes, outer=optax.adam(3e-3), num_steps=1))
