"""Compares a schedule tuned by hypergradient with random search and with TPE.

A network is trained for few steps. Tuned are the schedule of its learning rate (peak,
warm-up, end), its momentum and its weight decay, and with these, for each array of the
params, a weight decay and a learning rate at five knots of the run. Searches draw only the
former (`few`), those and one learning rate for each array (`per array`), or all of them
(`all`). Each method has the same number of gradients; a product with second derivatives
counts as two. Models are then trained anew, and measured on test data. The figure by which
methods are judged is the mean test loss of eight models, trained from other starts on other
batches (`loss of 8`): that of one model has more chance in it than methods differ by.

    python benchmarks/tuned_schedules.py  # digits, which ship with scikit-learn
    METAOPT_DATA=... python benchmarks/tuned_schedules.py --setting fashion
    METAOPT_DATA=... python benchmarks/tuned_schedules.py --setting shakespeare

All settings were chosen on seeds 100 to 116. Started again with the same options it goes on
after the last run that it finished.
"""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from _models import ConvNet, Dense, Transformer

import metaopt as mo


KNOTS = 5  # of the schedule of each array
FACTOR = 10.0  # by which searches scale the rate and the decay of an array, at most
NUM_AGAIN = 8  # models that are trained at the settings that were found


def losses(logits, labels):
    one_hot = jax.nn.one_hot(labels, logits.shape[-1])
    return optax.losses.softmax_cross_entropy(logits, one_hot)


class Training(mo.extend.AbstractInnerProblem):
    model: Any

    def init(self, hyper, key):
        return self.model.init(key)

    def loss(self, params, hyper, batch):
        x, y = batch
        return jnp.mean(losses(self.model(params, x), y))


def outer_loss(model):
    def loss(params, hyper, batch):
        x, y = batch[0]
        return jnp.mean(losses(model(params, x), y))

    return loss


def num_hyper(hyper):
    return sum(leaf.size for leaf in jax.tree.leaves(hyper))


class Setting(NamedTuple):
    """What is trained, on what, and for how long.

    `split` is a function of a seed that returns the arrays of train, valid and test data.
    The budget is counted in trials, each of `num_steps` gradients.
    """

    model: Any
    split: Callable[[int], tuple[Any, Any, Any]]
    direction: Callable[[Any], optax.GradientTransformation]
    peak: float
    num_steps: int
    batch_size: int
    num_trials: int
    outer_rate: float
    outer_clip: float


def digits() -> Setting:
    data = mo.datasets.load_digits()
    model = Dense((64, 50, 50, 10))

    def split(seed):
        train, valid, test = mo.datasets.split(data, (900, 400, 497), seed)
        return pairs(train, valid, test)

    return Setting(model, split, momentum, 1.0, 30, 100, 200, 0.05, 0.2)


def fashion() -> Setting:
    data = mo.datasets.load_fashion_mnist()

    def split(seed):
        # The last rows are of the official test part.
        train, valid = mo.datasets.split(data[:20_000], (8000, 1000), seed)
        return pairs(train, valid, data[20_000:])

    return Setting(ConvNet((8, 16, 32)), split, momentum, 0.4, 30, 50, 400, 0.05, 0.2)


def shakespeare() -> Setting:
    data = mo.datasets.load_tiny_shakespeare()
    first, last = data.split((0.9, 0.1))
    length = 32
    size = len(data.alphabet)

    def split(seed):
        random = np.random.default_rng(seed)
        both = windows(first, length, 8_000 + 250, random)
        train, valid = ([a[:8_000] for a in both], [a[8_000:] for a in both])
        return tuple(train), tuple(valid), windows(last, length, 1_000, random)

    model = Transformer(size, 32, 1, length, 2)
    return Setting(model, split, adam, 0.06, 50, 8, 180, 0.12, 0.2)


SETTINGS = {"digits": digits, "fashion": fashion, "shakespeare": shakespeare}


def pairs(train, valid, test):
    train, valid, test = [
        (jnp.asarray(d.x), jnp.asarray(d.y)) for d in (train, valid, test)
    ]
    return train, valid, test


def windows(text, length, count, random):
    """Pieces of a text that do not overlap, and the characters that follow in each."""
    starts = random.permutation((len(text) - 1) // length)[:count] * length
    found = text.characters[starts[:, None] + np.arange(length + 1)]
    return jnp.asarray(found[:, :-1]), jnp.asarray(found[:, 1:])


def default_hyper(setting: Setting) -> dict[str, Any]:
    """The settings that each method starts at."""
    params = setting.model.init(jax.random.key(0))
    per_array = lambda value: mo.hyper.PerLeaf(mo.hyper.Positive(value), params, "*")
    return {
        "curve": mo.hyper.WarmupCosine(setting.peak, setting.num_steps),
        "friction": mo.hyper.Interval(0.1, 0.0, 1.0),
        "decay": mo.hyper.Positive(1e-4),
        "rates": per_array(jnp.ones(KNOTS)),
        "decays": per_array(1.0),
    }


def spaces(hyper) -> dict[str, Any]:
    """The ranges of searches, from few numbers to all."""
    curve = hyper["curve"]
    peak = float(curve.peak.value)
    ranges = (
        mo.study.LogUniform(peak / 10, peak * 10),
        mo.study.Uniform(0.0, 0.6),
        mo.study.Uniform(0.0, 1.0),
    )
    few = {
        "curve": eqx.tree_at(lambda c: (c.peak, c.warmup, c.end), curve, ranges),
        "friction": mo.study.LogUniform(0.02, 0.8),
        "decay": mo.study.LogUniform(1e-5, 1e-1),
    }
    low, high = 1 / FACTOR, FACTOR
    return {
        "few": few,
        "per array": few | {"rates": mo.study.LogUniform(low, high, shared=True)},
        "all": few
        | {
            "rates": mo.study.LogUniform(low, high),
            "decays": mo.study.LogUniform(low, high),
        },
    }


def optimizer(setting: Setting):
    """The inner optimizer, whose numbers are those of `hyper`."""

    def build(hyper):
        # A run that leaves the stable rates has no useful derivative; clipping keeps it in.
        clip = optax.clip_by_global_norm(1.0)
        direction = optax.flatten(optax.chain(clip, setting.direction(hyper)))
        return optax.chain(direction, descend(hyper, setting.num_steps))

    return build


def momentum(hyper):
    return optax.ema(1 - hyper["friction"].value, debias=False)


def adam(hyper):
    return optax.scale_by_adam(
        b1=1 - hyper["friction"].value, b2=0.99, eps=0.0, eps_root=1e-4
    )


def descend(hyper, num_steps):
    """Steps with a rate and a decoupled weight decay for each array of the params."""
    # All rates are computed here, where their derivatives are cheap to compile.
    logs = jnp.log(jnp.stack(list(hyper["rates"].value.values())))
    places = jnp.linspace(0, KNOTS - 1, num_steps)
    hats = jnp.maximum(1 - jnp.abs(places[:, None] - jnp.arange(KNOTS)), 0)
    rates = hyper["curve"].value[:, None] * jnp.exp(hats @ logs.T)
    decays = hyper["decay"].value * jnp.stack(list(hyper["decays"].value.values()))

    def update(updates, state, params=None):
        leaves, structure = jax.tree.flatten(updates)
        arrays = zip(leaves, jax.tree.leaves(params), rates[state], decays)
        scaled = [-rate * (u + decay * w) for u, w, rate, decay in arrays]
        return jax.tree.unflatten(structure, scaled), state + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), int), update)


def outer_optimizer(setting: Setting, rate: float | None):
    """Adam with a cosine decay over the outer steps that the budget pays for.

    Rates grow until training is at the edge of what is stable; beyond it the hypergradient
    has no direction, and Adam alone does not always come back.
    """
    num_steps = setting.num_steps
    num_outer = num_steps * setting.num_trials // (3 * num_steps + 1)
    schedule = optax.cosine_decay_schedule(rate or setting.outer_rate, num_outer)
    clip = optax.clip_by_global_norm(setting.outer_clip)
    return mo.step_back(optax.chain(clip, optax.adam(schedule, b2=0.99)), max_norm=1.0)


def measures(model, problem, inner, batch_size):
    """Metrics of a trained model, and of more that are trained like it."""

    def accuracy(params, hyper, batch):
        x, y = batch[0]
        return jnp.mean(jnp.argmax(model(params, x), axis=-1) == y)

    @eqx.filter_jit
    def mean_loss(params, hyper, batch):
        test, train = batch

        def one(key):
            data = mo.Minibatches(train, batch_size)
            options = {"adjoint": mo.UnrolledAdjoint(), "key": key, "throw": False}
            again = mo.solve_inner(problem.inner, hyper, data, solver=inner, **options)
            return problem.outer_loss(again.value, hyper, (test,))

        return jnp.mean(jax.lax.map(one, jax.random.split(jax.random.key(0), NUM_AGAIN)))

    return {
        "accuracy": accuracy,
        f"loss of {NUM_AGAIN}": mo.study.Metric(mean_loss, higher_is_better=False),
    }


def differences(table: mo.study.Comparison, metric: str) -> str:
    """The paired differences of all methods to the tuned one."""
    mine = table.values("tuned", metric)
    lines = [f"{metric}, difference to `tuned`: mean, standard error, p of a paired t-test"]
    for name in table.records:
        if name != "tuned":
            found = table.values(name, metric) - mine
            error = np.std(found, ddof=1) / len(found) ** 0.5
            p = 2 * scipy.stats.t.sf(abs(np.mean(found)) / error, len(found) - 1)
            lines.append(f"  {name:<18}{np.mean(found):+.4f} +- {error:.4f}   p = {p:.2g}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=tuple(SETTINGS), default="digits")
    parser.add_argument("--quick", action="store_true", help="three seeds, a few minutes")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--methods", nargs="+", help="names, such as tuned 'TPE, few'")
    parser.add_argument("--outer-rate", type=float)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    setting = SETTINGS[arguments.setting]()
    model, num_steps = setting.model, setting.num_steps
    hyper = default_hyper(setting)
    problem = mo.BilevelProblem(Training(model), outer_loss(model))
    inner = mo.Descent(optimizer(setting), num_steps)
    budget = num_steps * setting.num_trials
    outer = outer_optimizer(setting, arguments.outer_rate)
    methods: dict[str, Any] = {
        "tuned": mo.NestedSolver(inner, mo.UnrolledAdjoint(), outer),
        "untuned": mo.study.Untuned(),
    }
    for name, space in spaces(hyper).items():
        methods[f"random, {name}"] = mo.study.RandomSearch(space)
        methods[f"TPE, {name}"] = mo.study.OptunaSearch(space)

    def split(seed):
        train, valid, test = setting.split(seed)
        data = mo.Minibatches(train, setting.batch_size), mo.FullBatch((valid,))
        return *data, mo.FullBatch((test, train))

    names = arguments.methods or methods
    table = mo.study.compare(
        {name: methods[name] for name in names},
        problem,
        hyper,
        split=split,
        inner=inner,
        budget=mo.study.GradientBudget(budget),
        seeds=arguments.seeds or range(3 if arguments.quick else 5),
        metrics=measures(model, problem, inner, setting.batch_size),
        num_points=5,
        out=arguments.out or pathlib.Path("runs/schedules") / arguments.setting,
    )
    print(f"{arguments.setting}: {num_hyper(hyper)} numbers, {num_steps} inner steps")
    print(table)
    for metric in table.metrics:
        print(differences(table, metric))


if __name__ == "__main__":
    main()
