"""Learns to name images of classes that it has seen one image of.

A task is five classes (`--ways`), one image of each to adapt to (`--shots`) and others to
name; the classes of the test were never seen in training. `--data omniglot` is the real
run: 1,623 handwritten characters of 50 alphabets, in the usual split. The default are the
digits that ship with scikit-learn, turned to make more classes of them; with so few
classes to learn from it shows how things work, and little else.

`--net mlp` is the fully connected network of the MAML paper, `--net conv` its four
convolutions, both with transductive batch normalisation. What has been learned is kept in
`--out`: a run that was stopped goes on where it was. Beside the accuracy after adaptation:
the nearest neighbour by pixels, and the same network without learning over tasks.

The curve is on classes for validation, which neither training nor the test has; choose
options by it.
"""

import json
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from _shared import make_parser, parsed, print_table, write_metrics

import metaopt as mo


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


RATE = 0.4
NUM_QUERIES = 15  # in tests
TEST_STEPS = 3
WIDTHS = (256, 128, 64, 64)
NUM_CHANNELS = 64
TEST_SEED = 2**20  # of the tasks that all runs are measured on
NEAREST = "nearest neighbour by pixels"
NOT_LEARNED = "no learning over tasks"


def layer(linear, size):
    return [linear, mo.nn.BatchNorm(size), eqx.nn.Lambda(jax.nn.relu)]


def multilayer_perceptron(num_pixels, num_ways, key):
    sizes = num_pixels, *WIDTHS
    *keys, last = jax.random.split(key, len(sizes))
    layers = [eqx.nn.Lambda(jnp.ravel)]
    for before, after, key in zip(sizes, sizes[1:], keys):
        layers += layer(eqx.nn.Linear(before, after, key=key), after)
    return eqx.nn.Sequential([*layers, eqx.nn.Linear(sizes[-1], num_ways, key=last)])


def convolutions(num_ways, key):
    *keys, last = jax.random.split(key, 5)
    layers, before = [eqx.nn.Lambda(lambda x: x[None])], 1
    for key in keys:
        conv = mo.nn.Conv2d(before, NUM_CHANNELS, 3, stride=2, padding=1, key=key)
        layers += layer(conv, NUM_CHANNELS)
        before = NUM_CHANNELS
    layers.append(eqx.nn.Lambda(lambda x: jnp.mean(x, axis=(1, 2))))
    return eqx.nn.Sequential([*layers, eqx.nn.Linear(before, num_ways, key=last)])


def logits(model, x):
    return jax.vmap(model, axis_name="batch")(x)


def cross_entropy(model, batch):
    losses = optax.losses.softmax_cross_entropy_with_integer_labels
    return jnp.mean(losses(logits(model, batch[0]), batch[1]))


def accuracy(model, batch):
    return jnp.mean(jnp.argmax(logits(model, batch[0]), axis=-1) == batch[1])


def nearest_neighbour(task):
    """The accuracy of naming each image like the support image that it is nearest to."""
    (x, y), (queries, labels) = task.support, task.query
    distances = jnp.sum((queries[:, None] - x[None]) ** 2, axis=(2, 3))
    return jnp.mean(y[jnp.argmin(distances, axis=1)] == labels)


def load(name):
    """Classes to learn from, classes for validation, and classes to be tested on."""
    if name == "omniglot":
        learn = mo.datasets.load_omniglot(part="train").with_rotations()
        valid = mo.datasets.load_omniglot(part="valid").with_rotations()
        return learn, valid, mo.datasets.load_omniglot(part="test")
    digits = mo.datasets.load_digits()
    images = digits.x.reshape(-1, 8, 8)
    classes = mo.datasets.ClassData.from_labels(images, digits.y, digits.name)
    return tuple(part.with_rotations() for part in (classes[:6], classes[6:8], classes[8:]))


def learner(arguments):
    adjoint = mo.FirstOrderAdjoint() if arguments.first_order else mo.UnrolledAdjoint()
    chunk_size = 2 if arguments.net == "conv" else None
    return mo.few_shot.MAML(
        cross_entropy,
        mo.Descent(optax.sgd(RATE), num_steps=1),
        adjoint,
        chunk_size=chunk_size,
    )


def run_name(arguments, steps):
    """What a run is kept under: it is taken up again with the same options alone."""
    order = "first-order" if arguments.first_order else "exact"
    options = (
        *(arguments.data, arguments.net, arguments.ways, arguments.shots, order),
        *(arguments.queries, arguments.tasks, arguments.rate, arguments.seed, steps),
    )
    return "-".join(map(str, options))


def network(name, image_shape, num_ways, key):
    if name == "conv":
        return convolutions(num_ways, key)
    height, width = image_shape
    return multilayer_perceptron(height * width, num_ways, key)


class Setting:
    """What is learned from, what learns, and what it is measured on."""

    def __init__(self, arguments):
        self.out, self.net, self.rate = arguments.out, arguments.net, arguments.rate
        self.steps = 20 if arguments.quick else arguments.steps
        self.num_test = 40 if arguments.quick else 600
        self.num_valid = self.num_test // 3
        classes, valid, test = load(arguments.data)
        sizes = arguments.ways, arguments.shots
        self.episodes = mo.few_shot.Episodes(
            classes, *sizes, arguments.queries, num_tasks=arguments.tasks
        )
        self.valid = mo.few_shot.Episodes(valid, *sizes, NUM_QUERIES)
        self.test = mo.few_shot.Episodes(test, *sizes, NUM_QUERIES)
        model_key, self.train_key = jax.random.split(jax.random.key(arguments.seed))
        self.test_key = jax.random.key(TEST_SEED)
        self.model = network(self.net, classes.x.shape[2:], arguments.ways, model_key)
        self.maml = learner(arguments)
        self.method = "first-order MAML" if arguments.first_order else "MAML"
        self.run = run_name(arguments, self.steps)
        self.title = f"{classes.name.split(' (')[0]}, {sizes[0]}-way {sizes[1]}-shot"

    def adapted(self, num_steps):
        """What the row of the method after so many steps is called."""
        return f"{self.method}, {num_steps} step{'' if num_steps == 1 else 's'}"

    def measure(self, meta, episodes, num_tasks, num_steps):
        return mo.few_shot.evaluate(
            self.maml,
            meta,
            episodes,
            accuracy,
            num_tasks=num_tasks,
            num_steps=num_steps,
            key=self.test_key,
        )


class Curve:
    """The accuracy on classes for validation along the way, kept in a file as well: a run
    that goes on where it was has all of it."""

    def __init__(self, setting):
        self.setting = setting
        self.path = setting.out / f"{setting.run}.json"
        self.every = max(setting.steps // 20, 1)
        self.points = json.loads(self.path.read_text()) if self.path.exists() else []
        # Of all that this process does, and of those that the run was begun with.
        seconds = self.points[-1][2] if self.points else 0
        self.seconds_before = seconds - time.process_time()

    def follow(self, run):
        step = run.num_steps
        last = self.points[-1][0] if self.points else 0
        if step // self.every > last // self.every:
            valid, num_valid = self.setting.valid, self.setting.num_valid
            score = self.setting.measure(run.hyper, valid, num_valid, TEST_STEPS)
            seconds = self.seconds_before + time.process_time()
            self.points.append([step, score.mean, seconds])
            self.path.write_text(json.dumps(self.points))


def learn(setting):
    """The solution, and the points of the curve that led to it."""
    setting.out.mkdir(parents=True, exist_ok=True)
    curve, rate = Curve(setting), setting.rate
    solution = mo.few_shot.train(
        setting.maml,
        setting.model,
        setting.episodes,
        outer=optax.adam(optax.cosine_decay_schedule(rate, setting.steps)),
        num_steps=setting.steps,
        key=setting.train_key,
        callbacks=[
            mo.callbacks.Progress(),
            mo.callbacks.Checkpoint(setting.out / f"{setting.run}.npz", every=500),
            curve.follow,
        ],
    )
    return solution, curve.points


def compare(setting, meta):
    """The accuracy on the same tasks of new classes: of what was learned, of the network
    that it was learned from, and of the nearest neighbour."""
    test, num_test = setting.test, setting.num_test
    keys = jax.random.split(setting.test_key, num_test)
    nearest = jax.lax.map(
        lambda key: nearest_neighbour(test.draw(key)), keys, batch_size=16
    )
    rows = {
        NEAREST: mo.few_shot.Scores(np.asarray(nearest)),
        NOT_LEARNED: setting.measure(setting.model, test, num_test, TEST_STEPS),
    }
    for count in (1, TEST_STEPS):
        rows[setting.adapted(count)] = setting.measure(meta, test, num_test, count)
    return rows


def report(setting, rows, curve, num_failed):
    print_table(
        f"{setting.title}, {setting.net}: {setting.num_test} tasks of new classes, "
        f"{setting.steps:,} meta-steps",
        ("", "accuracy", "95 %"),
        [
            (text, f"{100 * score.mean:.2f} %", f"+- {100 * score.interval:.2f}")
            for text, score in rows.items()
        ],
    )
    print_table(
        f"On {setting.num_valid} tasks of classes for validation, {TEST_STEPS} steps",
        ("meta-steps", "accuracy", "CPU seconds"),
        [
            (f"{step:,}", f"{100 * value:.2f} %", f"{seconds:,.0f}")
            for step, value, seconds in curve
        ],
    )
    if num_failed:
        print(f"{num_failed} tasks failed in training and were left out.")


def picture(setting, curve, rows, meta):
    task = setting.test.draw(jax.random.fold_in(setting.test_key, 1))
    (x, _), (queries, labels) = task.support, task.query
    model = setting.maml.adapt(meta, task.support, num_steps=TEST_STEPS)
    named = np.asarray(jnp.argmax(logits(model, queries), axis=-1))
    num_ways = min(int(labels.max()) + 1, 6)  # as many as there is room for
    figure = plt.figure(figsize=(13, 5), layout="constrained")
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=(1, 1.3)))
    axis = left.subplots()
    points = [point[:2] for point in curve]
    axis.plot(*zip(*points), color="C0", label="while learning, on validation classes")
    names = NEAREST, NOT_LEARNED, setting.adapted(TEST_STEPS)
    for color, name in zip(("0.4", "C1", "C0"), names):
        label = f"{name}, on test classes"
        axis.axhline(rows[name].mean, linestyle=":", color=color, label=label)
    axis.set(title=setting.title, xlabel="meta-step", ylabel="accuracy")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    shown = [np.flatnonzero(labels == label)[:6] for label in range(num_ways)]
    grid = right.subplots(num_ways, 7, squeeze=False)
    for label, places in enumerate(shown):
        images = [x[label], *queries[places]]
        for column, (axis, image) in enumerate(zip(grid[label], images)):
            axis.imshow(image, cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            right_one = column == 0 or named[places[column - 1]] == label
            color = "0.7" if column == 0 else ("C2" if right_one else "C3")
            axis.spines[:].set(color=color, linewidth=2.5)
            if not right_one:
                axis.set_xlabel(f"as {named[places[column - 1]]}", color="C3", fontsize=8)
        grid[label][0].set_ylabel(str(label), rotation=0, labelpad=8)
    grid[0][0].set_title("seen", fontsize=9)
    grid[0][1].set_title("to be named: green if it was", fontsize=9, loc="left")
    figure.savefig(setting.out / "maml_images.png", dpi=120)


def read_arguments():
    parser = make_parser(
        "maml_images", str(__doc__), steps=4000, data=("digits", "omniglot")
    )
    parser.add_argument("--net", choices=("mlp", "conv"), default="mlp", help="the network")
    parser.add_argument("--ways", type=int, default=5, help="classes in a task")
    parser.add_argument("--shots", type=int, default=1, help="images of each to adapt to")
    parser.add_argument("--queries", type=int, default=5, help="and to learn from")
    parser.add_argument("--tasks", type=int, default=16, help="tasks in a meta-step")
    parser.add_argument("--rate", type=float, default=3e-3, help="the first, of Adam")
    parser.add_argument("--first-order", action="store_true", help="first-order MAML")
    return parsed(parser)


def main():
    setting = Setting(read_arguments())
    solution, curve = learn(setting)
    rows = compare(setting, solution.meta)
    report(setting, rows, curve, int(solution.history.num_failed.sum()))
    picture(setting, curve, rows, solution.meta)
    metrics = {text: [score.mean, score.interval] for text, score in rows.items()}
    write_metrics(setting.out, {"curve": curve, "results": metrics})


if __name__ == "__main__":
    main()
