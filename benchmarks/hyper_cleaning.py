"""Compares methods of data hyper-cleaning under one budget of gradients.

Half of the training labels are redrawn at random. Each training example has a weight
between 0 and 1, tuned for the loss on validation data with true labels. Accuracy is that
of a softmax regression that is trained anew with the weights that each method found; F1 is
that of calling an example clean whose weight is above a half. The identity in place of the
inverse Hessian, random search and equal weights are the controls.

    python benchmarks/hyper_cleaning.py  # digits, which ship with scikit-learn
    METAOPT_DATA=... python benchmarks/hyper_cleaning.py --data mnist

Started again with the same options it goes on after the last run that it finished.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import optax

import metaopt as mo


# By data set: the sizes of the parts, the learning rates of the inner and of the outer
# loop, and the number of gradients. Outer rates were chosen on seed 100.
SETTINGS = {
    "digits": ((600, 600, 597), 1.0, 0.3, 20_000),
    "mnist": ((5_000, 5_000, 10_000), 0.5, 0.3, 8_000),
}
INNER_STEPS = 50
DECAY = 1e-3


def cross_entropies(params, x, y):
    logits = x @ params["weight"] + params["bias"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y)


def inner_loss(params, hyper, batch):
    losses = hyper.value * cross_entropies(params, *batch)
    return jnp.mean(losses) + DECAY * jnp.sum(params["weight"] ** 2)


def outer_loss(params, hyper, batch):
    return jnp.mean(cross_entropies(params, *batch[:2]))


def accuracy(params, hyper, batch):
    x, y, _ = batch
    return jnp.mean(jnp.argmax(x @ params["weight"] + params["bias"], axis=-1) == y)


def f1(params, hyper, batch):
    called, clean = hyper.value > 0.5, ~batch[2]
    right = jnp.sum(called & clean)
    return 2 * right / jnp.maximum(jnp.sum(called) + jnp.sum(clean), 1)


def main():
    parser = argparse.ArgumentParser(
        description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=tuple(SETTINGS), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--gradients", type=int, help="of each method and seed")
    parser.add_argument("--outer-rate", type=float)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/cleaning"))
    arguments = parser.parse_args()
    sizes, inner_rate, outer_rate, gradients = SETTINGS[arguments.data]
    outer_rate = arguments.outer_rate or outer_rate
    loaders = {"digits": mo.datasets.load_digits, "mnist": mo.datasets.load_mnist}
    data = loaders[arguments.data]()

    def split(seed):
        train, valid, test = mo.datasets.split(data, sizes, seed)
        key = jax.random.key(seed)
        noisy: mo.datasets.ImageData = mo.datasets.corrupt_labels(train, 0.5, key)[0]
        # A label that is drawn again by chance is right.
        wrong = noisy.y != train.y
        measured = mo.FullBatch((test.x, test.y, wrong))
        return (noisy.x, noisy.y), (valid.x, valid.y), measured

    shape = data.x.shape[1], data.num_classes
    params = {"weight": jnp.zeros(shape), "bias": jnp.zeros(data.num_classes)}
    descent = mo.Descent(optax.sgd(inner_rate), num_steps=INNER_STEPS)

    def nested(adjoint):
        return mo.NestedSolver(descent, adjoint, optax.adam(outer_rate))

    loose = {"rtol": jnp.inf, "inner_rtol": jnp.inf, "error": None}
    table = mo.study.compare(
        {
            "implicit": nested(mo.ImplicitAdjoint(mo.CG(rtol=1e-2, max_steps=20), **loose)),
            "unrolled": nested(mo.UnrolledAdjoint()),
            "one-step": nested(mo.OneStepAdjoint()),
            "identity (control)": nested(mo.ImplicitAdjoint(mo.Neumann(0), **loose)),
            "random search": mo.study.RandomSearch(batch_size=2),
            "equal weights (control)": mo.study.Untuned(),
        },
        mo.BilevelProblem(inner_loss, outer_loss),
        mo.hyper.Interval(jnp.full(sizes[0], 0.501), 0.0, 1.0),
        split=split,
        params=params,
        inner=descent,
        budget=mo.study.GradientBudget(arguments.gradients or gradients),
        seeds=arguments.seeds,
        metrics={"accuracy": accuracy, "F1": f1},
        out=arguments.out,
    )
    print(f"{data.name}: {sizes[0]:,} training examples, half of their labels redrawn")
    print(table)


if __name__ == "__main__":
    main()
