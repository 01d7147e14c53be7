"""Counts the work of each adjoint's hypergradient, in gradients of the inner loss.

The inner problem is a network of six layers, trained for 100 steps of gradient descent on
one batch; `hyper` is its learning rate and its weight decay (the latter alone where the
adjoint is implicit). Counted are the multiplications in the matrix products of the program
that XLA makes. Nothing is timed, so there is no noise; what is done entry by entry is left
out. The counter is first tried on programs whose products are known.

    python benchmarks/count_work.py
"""

import jax
import jax.numpy as jnp
import optax
from _network import cross_entropy, logits_of, make_params
from _work import check_counter, Work

import metaopt as mo


WIDTHS = (128, 128, 128, 128, 128, 128, 10)
BATCH = 64
NUM_STEPS = 100


def criterion(logits, params, hyper, batch):
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1])
    return jnp.mean(losses) + jnp.exp(hyper["decay"]) * sum(
        jnp.sum(weight**2) for weight in params
    )


DECAYED = mo.PredictionProblem(logits_of, criterion)


def sgd(hyper):
    return optax.sgd(jnp.exp(hyper["rate"]))


ADJOINTS = {
    "UnrolledAdjoint()": mo.UnrolledAdjoint(),
    "UnrolledAdjoint(StoreUpdates())": mo.UnrolledAdjoint(mo.memory.StoreUpdates()),
    "UnrolledAdjoint(RecomputeSteps())": mo.UnrolledAdjoint(mo.memory.RecomputeSteps()),
    "UnrolledAdjoint(Blocks())": mo.UnrolledAdjoint(mo.memory.Blocks()),
    "UnrolledAdjoint(Blocks(2))": mo.UnrolledAdjoint(mo.memory.Blocks(2)),
    "ReversibleAdjoint(), momentum 0.9": mo.ReversibleAdjoint(),
    "ForwardAdjoint(), 2 numbers": mo.ForwardAdjoint(),
    "TruncatedAdjoint(10)": mo.TruncatedAdjoint(10),
    "TruncatedAdjoint(20)": mo.TruncatedAdjoint(20),
    "OneStepAdjoint()": mo.OneStepAdjoint(),
}
REVERSIBLE = mo.ReversibleSGD(
    lambda hyper: jnp.exp(hyper["rate"]), 0.9, num_steps=NUM_STEPS
)
IMPLICIT = {
    "ImplicitAdjoint(CG())": mo.ImplicitAdjoint(mo.CG()),
    "    with GaussNewton()": mo.ImplicitAdjoint(
        mo.CG(), curvature=mo.linear.GaussNewton()
    ),
}


def main():
    check_counter()
    x = jax.random.normal(jax.random.key(0), (BATCH, WIDTHS[0]))
    y = jax.random.randint(jax.random.key(1), (BATCH,), 0, WIDTHS[-1])
    params, batch = make_params(jax.random.key(2), WIDTHS), (x, y)
    decay, rate = jnp.asarray(-6.0), jnp.log(0.05)
    problem = mo.BilevelProblem(DECAYED, cross_entropy)

    def work(adjoint, inner, hyper) -> Work:
        def gradient(hyper, params, batch):
            return mo.hypergradient(
                problem,
                hyper,
                batch,
                batch,
                params=params,
                inner=inner,
                adjoint=adjoint,
                throw=False,
            )

        return Work(gradient, hyper, params, batch)

    unit = Work(jax.grad(DECAYED.loss), params, {"decay": decay}, batch).total
    print(f"T = {NUM_STEPS} inner steps, jax {jax.__version__}; in gradients:\n")
    print(f"{'':42}{'in all':>8}")
    for name, adjoint in ADJOINTS.items():
        inner = REVERSIBLE if "Reversible" in name else mo.Descent(sgd, NUM_STEPS)
        total = work(adjoint, inner, {"rate": rate, "decay": decay}).total
        print(f"{name:42}{total / unit:8.1f}", flush=True)
    for name, adjoint in IMPLICIT.items():
        descent = mo.Descent(optax.sgd(0.05), NUM_STEPS)
        implicit = work(adjoint, descent, {"decay": decay})
        step = implicit.open_loops[0]
        rest = implicit.total - step
        print(f"{name + ', linear steps apart':42}{rest / unit:8.1f}")
        print(f"{'        and for each linear step':42}{step / unit:8.1f}")


if __name__ == "__main__":
    main()
