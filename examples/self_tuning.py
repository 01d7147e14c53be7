"""Tunes dropout, augmentation and weight decay while it trains: a self-tuning network.

Twelve hyperparameters of a classifier of images: dropout for each layer, noise,
brightness, rotation and shift of the images, the number of holes cut into them, weight
decay for each layer and label smoothing. The weights of the network are a function of
them that is learned along the way, so that one run of training finds a schedule for all
of them. It is compared with training at the initial values, with random search, and with
an implicit hypergradient where there is one; and the schedule is tried on networks that
are trained from scratch.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from _shared import load, parse_arguments, print_table, write_metrics

import metaopt as mo


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


NUM_TRIALS = 10  # of random search
TRAIN_STEPS, VALID_STEPS = 5, 1  # in a round
MAX_HOLES = 4
WIDTH = {"digits": 128}  # else 256
SIZES = {"digits": (400, 600, 797)}  # training, validation and test images, else below
SIZES_LARGE = (5000, 5000, 10000)
BATCH_SIZE = {"digits": 64}  # else 128
NUM_ROUNDS = {"digits": 10}  # in an outer step, else 20
# In gradients of the network, as `python benchmarks/self_tuning.py` counts them.
COST_TRAIN, COST_VALID = 1.1, 0.9


class Hyper(eqx.Module):
    """What is tuned. Each holds its range."""

    dropout: mo.hyper.Interval  # (3,): of the image and of two hidden layers
    noise: mo.hyper.Positive  # standard deviations, pixels being in [0, 1]
    brightness: mo.hyper.Positive
    rotation: mo.hyper.Positive  # in radians
    shift: mo.hyper.Positive  # in parts of the image
    holes: mo.hyper.Integer
    decay: mo.hyper.Positive  # (3,)
    smoothing: mo.hyper.Interval


def initial_hyper() -> Hyper:
    return Hyper(
        dropout=mo.hyper.Interval(jnp.full(3, 0.1), 0.0, 0.9),
        noise=mo.hyper.Positive(0.05),
        brightness=mo.hyper.Positive(0.05),
        rotation=mo.hyper.Positive(0.03),
        shift=mo.hyper.Positive(0.01),
        holes=mo.hyper.Integer(1, 0, MAX_HOLES),
        decay=mo.hyper.Positive(jnp.full(3, 1e-4)),
        smoothing=mo.hyper.Interval(0.02, 0.0, 0.5),
    )


def random_hyper(key) -> Hyper:
    """A trial of random search: around the initial values, in the same units in which
    self-tuning perturbs them (a standard deviation is a factor of 2.7 for most)."""
    leaves, structure = jax.tree.flatten(initial_hyper())
    keys = jax.random.split(key, len(leaves))
    moved = [a + jax.random.normal(k, a.shape) for a, k in zip(leaves, keys)]
    return jax.tree.unflatten(structure, moved)


def augmented(image, hyper: Hyper, key):
    """A square image, moved, dimmed, with holes and with noise."""
    side = image.shape[0]
    keys = jax.random.split(key, 5)
    angle = hyper.rotation.value * jax.random.normal(keys[0])
    shift = side * hyper.shift.value * jax.random.normal(keys[1], (2, 1, 1))
    centre = (side - 1) / 2
    y, x = jnp.mgrid[:side, :side] - centre
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    at = jnp.stack([cos * y - sin * x, sin * y + cos * x]) + centre + shift
    image = jax.scipy.ndimage.map_coordinates(image, list(at), order=1)
    image = image * (1 + hyper.brightness.value * jax.random.normal(keys[2]))
    length = max(side // 5, 1)
    corner = jax.random.randint(keys[3], (MAX_HOLES, 2, 1), 0, side - length + 1)
    inside = (jnp.arange(side) >= corner) & (jnp.arange(side) < corner + length)
    hole = inside[:, 0, :, None] & inside[:, 1, None, :]
    there = jnp.arange(MAX_HOLES) < hyper.holes.value
    image = jnp.where(jnp.any(hole & there[:, None, None], axis=0), 0.0, image)
    return image + hyper.noise.value * jax.random.normal(keys[4], image.shape)


def forward(params, x, dropout=None, key=None):
    """The logits of one image; with dropout where rates are given."""
    for index, layer in enumerate(params.layers):
        if dropout is not None and key is not None:
            kept = jax.random.uniform(jax.random.fold_in(key, index), x.shape)
            x = jnp.where(kept < dropout[index], 0.0, x / (1 - dropout[index]))
        x = layer(x)
        x = jax.nn.relu(x) if index < len(params.layers) - 1 else x
    return x


class Classifier(mo.extend.AbstractPredictionProblem):
    """A multilayer perceptron. `rest` holds what is not tuned, if anything."""

    num_pixels: int
    width: int
    rest: Hyper | None = None

    def init(self, hyper, key):
        return eqx.nn.MLP(self.num_pixels, 10, self.width, 2, key=key)

    def complete(self, hyper):
        return hyper if self.rest is None else eqx.combine(hyper, self.rest)

    def predict(self, params, hyper, batch, key):
        hyper = self.complete(hyper)
        side = int(np.sqrt(self.num_pixels))

        def one(x, key):
            augment_key, dropout_key = jax.random.split(key)
            image = augmented(x.reshape(side, side), hyper, augment_key)
            return forward(params, image.ravel(), hyper.dropout.value, dropout_key)

        x, _ = batch
        return jax.vmap(one)(x, jax.random.split(key, len(x)))

    def criterion(self, predictions, params, hyper, batch):
        hyper = self.complete(hyper)
        labels = optax.losses.smooth_labels(
            jax.nn.one_hot(batch[1], 10), hyper.smoothing.value
        )
        norms = [mo.nn.squared_norm(layer, biases=False) for layer in params.layers]
        penalty = jnp.sum(hyper.decay.value * jnp.stack(norms))
        cross_entropy = optax.losses.softmax_cross_entropy(predictions, labels)
        return jnp.mean(cross_entropy) + 0.5 * penalty


def cross_entropy(params, hyper, batch):
    """The outer loss: no dropout, nothing added to the images."""
    x, y = batch
    logits = jax.vmap(lambda x: forward(params, x))(x)
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, y))


def accuracy(params, batch):
    logits = jax.vmap(lambda x: forward(params, x))(batch[0])
    return jnp.mean(jnp.argmax(logits, axis=-1) == batch[1])


class Setting:
    """One data set, cut into parts, and how a network is trained on it."""

    def __init__(self, arguments):
        name, seed = arguments.data, arguments.seed
        self.data = load(name)
        self.sizes = (100, 100, 100) if arguments.quick else SIZES.get(name, SIZES_LARGE)
        self.train, self.valid, self.test = (
            (jnp.asarray(part.x), jnp.asarray(part.y))
            for part in mo.datasets.split(self.data, self.sizes, seed)
        )
        self.num_rounds = 1 if arguments.quick else NUM_ROUNDS.get(name, 20)
        self.outer_steps = 2 if arguments.quick else arguments.steps
        self.num_steps = self.outer_steps * self.num_rounds * TRAIN_STEPS
        self.batch_size = BATCH_SIZE.get(name, 128) // (4 if arguments.quick else 1)
        self.inner = Classifier(self.data.x.shape[1], WIDTH.get(name, 256))
        self.batches = mo.Minibatches(self.train, self.batch_size)
        self.valid_batches = mo.Minibatches(self.valid, self.batch_size)
        self.optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, self.num_steps))
        self.descent = mo.Descent(self.optimizer, num_steps=self.num_steps)
        self.num_trials = 2 if arguments.quick else NUM_TRIALS
        self.key = jax.random.key(seed)

    def measure(self, params, gradients):
        row = {"gradients": float(gradients)}
        for name in ("valid", "test"):
            part = getattr(self, name)
            row[f"{name}_loss"] = float(_cross_entropy(params, None, part))
            row[f"{name}_accuracy"] = float(_accuracy(params, part))
        return row


_cross_entropy = eqx.filter_jit(cross_entropy)
_accuracy = eqx.filter_jit(accuracy)


@eqx.filter_jit
def train_from_scratch(setting_parts, hyper, key):
    inner, batches, descent = setting_parts
    return mo.solve_inner(
        inner,
        hyper,
        batches,
        solver=descent,
        adjoint=mo.UnrolledAdjoint(),
        key=key,
        throw=False,
    ).value


def self_tuning_solver(setting: Setting, hyper: optax.GradientTransformation):
    return mo.SelfTuningSolver(
        params=setting.optimizer,
        hyper=hyper,
        scale=optax.adam(0.01),
        train_steps=TRAIN_STEPS,
        valid_steps=VALID_STEPS,
        num_rounds=setting.num_rounds,
        warmup=2,
    )


def self_tune(setting: Setting):
    """One run that trains and tunes; and the validation loss on the way."""
    solver = self_tuning_solver(setting, optax.adam(0.02))
    problem = mo.BilevelProblem(setting.inner, cross_entropy)
    curve = []

    def follow(run):
        params = solver.params_at(run.state)
        curve.append(float(_cross_entropy(params, None, setting.valid)))

    solution = mo.solve_bilevel(
        problem,
        initial_hyper(),
        setting.batches,
        setting.valid_batches,
        solver=solver,
        num_steps=setting.outer_steps,
        key=setting.key,
        callbacks=[mo.callbacks.Progress(), follow],
    )
    print(solution)
    few = [jax.tree.map(lambda a: a[:500], part) for part in (setting.train, setting.valid)]
    check = mo.diagnostics.check_response(
        problem,
        solution,
        *few,
        # The network is no minimum and has flat directions, which damping leaves alone.
        linear_solver=mo.CG(rtol=1e-2, max_steps=200, damping=1e-2),
        step=0.3,
        num_draws=8,
    )
    print(check)
    return solution, curve, check


def perturb_only(setting: Setting):
    """The same run, but `hyper` stays where it is: what perturbation does by itself."""
    return mo.solve_bilevel(
        mo.BilevelProblem(setting.inner, cross_entropy),
        initial_hyper(),
        setting.batches,
        setting.valid_batches,
        solver=self_tuning_solver(setting, optax.set_to_zero()),
        num_steps=setting.outer_steps,
        key=setting.key,
        callbacks=[mo.callbacks.Progress()],
    )


def implicit(setting: Setting):
    """The hyperparameters that have a derivative, by implicit hypergradient on about as
    many gradients: short pieces of training, each followed by one hypergradient."""
    smooth = initial_hyper()
    mask = jax.tree.map(lambda leaf: True, smooth)
    mask = eqx.tree_at(lambda h: (h.dropout.raw, h.holes.raw), mask, (False, False))
    hyper, rest = eqx.partition(smooth, mask)
    num_products = 10
    # A Gauss-Newton product is 1.3 gradients, and there are as many steps as products.
    outer_steps = max(setting.num_steps // (10 * num_products), 1)
    steps = setting.num_steps // outer_steps
    inner = eqx.tree_at(lambda p: p.rest, setting.inner, rest, is_leaf=lambda x: x is None)
    solution = mo.solve_bilevel(
        mo.BilevelProblem(inner, cross_entropy),
        hyper,
        mo.Minibatches(setting.train, setting.batch_size),
        setting.valid_batches,
        solver=mo.NestedSolver(
            inner=mo.Descent(optax.adam(5e-4), num_steps=steps),
            adjoint=mo.ImplicitAdjoint(
                mo.CG(rtol=None, max_steps=num_products),
                curvature=mo.linear.GaussNewton(),
                inner_rtol=jnp.inf,
                error=None,
            ),
            outer=optax.adam(0.1),
            start=mo.WarmStart(),
        ),
        num_steps=outer_steps,
        key=setting.key,
        callbacks=[mo.callbacks.Progress()],
        throw=False,
    )
    rows = setting.sizes[0] / setting.batch_size  # the linear system is of all rows
    cost = setting.num_steps + outer_steps * rows * (1.3 * num_products + 4)
    return solution, cost


def picture(out, setting: Setting, solution, curve, check, rows):
    figure = plt.figure(figsize=(13, 10.5), layout="constrained")
    upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=(1.6, 1)))
    layers = ["of the image", "of hidden 1", "of hidden 2"]
    labels = {"dropout": layers, "decay": ["layer 1", "layer 2", "layer 3"]}
    mo.plot.hyper_path(solution.history, labels=labels, figure=upper)
    upper.suptitle("What the run did with each hyperparameter")
    left, right = np.asarray(lower.subfigures(1, 2, width_ratios=(1, 1.5)))
    axes = mo.plot.curves(
        {"self-tuning": (np.arange(1, len(curve) + 1), np.asarray(curve))},
        levels={
            name: rows[name]["valid_loss"]
            for name in ("initial values", _random_name(setting.num_trials))
        },
        title="validation loss",
        xlabel="outer step",
        axes=left.subplots(),
    )
    axes.set_yscale("log")
    mo.plot.response(check, figure=right)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "self_tuning.png", dpi=120)


def _random_name(count: int) -> str:
    return f"random search, {count} runs"


def main():
    arguments = parse_arguments("self_tuning", str(__doc__), steps=40)
    setting = Setting(arguments)
    parts = setting.inner, setting.batches, setting.descent
    num_steps, rows = setting.num_steps, {}
    default = train_from_scratch(parts, initial_hyper(), setting.key)
    rows["initial values"] = setting.measure(default, num_steps)

    solution, curve, check = self_tune(setting)
    num_rounds = num_steps // TRAIN_STEPS
    cost = num_rounds * (COST_TRAIN * TRAIN_STEPS + COST_VALID * VALID_STEPS)
    rows["self-tuning"] = setting.measure(solution.params, cost)
    perturbed = perturb_only(setting)
    rows["  hyperparameters held still"] = setting.measure(perturbed.params, cost)
    again = jax.random.fold_in(setting.key, 1)
    schedule = mo.diagnostics.retrain(
        setting.inner,
        solution.history.hyper,
        setting.batches,
        solver=setting.descent,
        key=again,
        throw=False,
    )
    rows["  re-trained on its schedule"] = setting.measure(schedule.value, num_steps)
    final = train_from_scratch(parts, solution.hyper, again)
    rows["  re-trained at its final values"] = setting.measure(final, num_steps)

    trials = [rows["initial values"]]  # the first trial is nobody's loss
    for trial_key in jax.random.split(again, setting.num_trials - 1):
        params = train_from_scratch(parts, random_hyper(trial_key), setting.key)
        trials.append(setting.measure(params, num_steps))
    for count in (2, setting.num_trials):
        best = min(trials[:count], key=lambda row: row["valid_loss"])
        rows[_random_name(count)] = {**best, "gradients": float(num_steps * count)}

    nested, cost = implicit(setting)
    rows["implicit, 8 of the 12"] = setting.measure(nested.params, cost)

    table = [
        (
            name,
            f"{row['gradients']:,.0f}",
            f"{row['valid_loss']:.4f}",
            f"{row['test_loss']:.4f}",
            f"{100 * row['test_accuracy']:.2f} %",
        )
        for name, row in rows.items()
    ]
    print_table(
        f"{setting.data.name}: {setting.sizes[0]:,} training, {setting.sizes[1]:,} "
        f"validation, {setting.sizes[2]:,} test images",
        ("", "gradients", "validation", "test loss", "test accuracy"),
        table,
    )
    values = jax.tree.map(lambda a: np.asarray(a).tolist(), mo.hyper.values(solution.hyper))
    picture(arguments.out, setting, solution, curve, check, rows)
    metrics = {
        "data": setting.data.name,
        "results": rows,
        "final": vars(values),
        "slope_cosine": check.slope_cosine,
        "jacobian_cosine": check.jacobian_cosine,
    }
    write_metrics(arguments.out, metrics)


if __name__ == "__main__":
    main()
