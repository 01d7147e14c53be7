"""Times and weighs gradients over tasks beside the same written by hand in plain JAX.

Sine waves: 25 tasks, 5 inner steps, two layers of 40. Images: 32 tasks of five classes,
one image of each to adapt to and one or fifteen of each to be judged by, one inner step,
four strided convolutions of 64 channels with transductive batch normalisation. By hand is
what one would write: `jax.vmap` over tasks, and convolutions by strided slices and products
(those of XLA take five times as long on CPUs, and are not shown). TorchOpt and higher take
part where they are installed, one task after the other as their own examples do.

All are compiled, checked to agree, and run in turn. Printed are ratios to the one by hand,
of the least of the times, and the temporary memory that XLA plans for. "Alone" is without
looking for tasks that fail, as by hand.

    python benchmarks/few_shot.py [--repeats 10]
"""

import argparse
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _torch_tasks import contenders as torch_contenders

import metaopt as mo


NUM_CHANNELS = 64
CHUNK_SIZES = (2, 4)


def squared_error(model, batch):
    return jnp.mean((jax.vmap(model)(batch[0]) - batch[1]) ** 2)


def cross_entropy(model, batch):
    logits = jax.vmap(model, axis_name="batch")(batch[0])
    losses = optax.losses.softmax_cross_entropy_with_integer_labels
    return jnp.mean(losses(logits, batch[1]))


class ByHand(eqx.Module):
    """A convolution by strided slices: one product for each pixel of the kernel."""

    conv: eqx.nn.Conv2d

    def __call__(self, x, *, key=None):
        (rows, columns), (down, right) = self.conv.kernel_size, self.conv.stride
        padding: Any = self.conv.padding
        x = jnp.pad(x, ((0, 0), *padding))
        height = (x.shape[1] - rows) // down + 1
        width = (x.shape[2] - columns) // right + 1
        out: Any = self.conv.bias
        for i in range(rows):
            for j in range(columns):
                part = x[:, i : i + down * height : down, j : j + right * width : right]
                part = part[:, :height, :width]
                out = out + jnp.einsum("oi,ihw->ohw", self.conv.weight[:, :, i, j], part)
        return out


def network(by_hand, key):
    *keys, last = jax.random.split(key, 5)
    layers, before = [], 1
    for key in keys:
        conv = mo.nn.Conv2d(before, NUM_CHANNELS, 3, stride=2, padding=1, key=key)
        layers += [
            ByHand(conv.conv) if by_hand else conv,
            mo.nn.BatchNorm(NUM_CHANNELS),
            eqx.nn.Lambda(jax.nn.relu),
        ]
        before = NUM_CHANNELS
    layers.append(eqx.nn.Lambda(lambda x: jnp.mean(x, axis=(1, 2))))
    return eqx.nn.Sequential([*layers, eqx.nn.Linear(before, 5, key=last)])


def by_hand(loss, rate, num_steps):
    """What one would write."""

    def mean(arrays, static, tasks):
        def one(task):
            now = arrays
            for _ in range(num_steps):
                gradient = jax.grad(lambda a: loss(eqx.combine(a, static), task.support))
                now = jax.tree.map(lambda a, g: a - rate * g, now, gradient(now))
            return loss(eqx.combine(now, static), task.query)

        return jnp.mean(jax.vmap(one)(tasks))

    def gradient(model, tasks):
        arrays, static = eqx.partition(model, eqx.is_inexact_array)
        return jax.value_and_grad(mean)(arrays, static, tasks)

    return gradient


def ours(loss, rate, num_steps, chunk_size=None, guard=True, whole=False):
    inner = mo.Descent(optax.sgd(rate), num_steps)
    learner = mo.few_shot.MAML(loss, inner, chunk_size=chunk_size)

    def gradient(model, tasks):
        out: Any = learner.value_and_grad(model, tasks, throw=False, guard=guard)
        return out if whole else out[:2]

    return gradient


def wave_tasks():
    """A network of two layers, and sine waves to adapt it to."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.uniform(keys[0], (2, 25, 10), minval=-5.0, maxval=5.0)
    y = jnp.sin(x + jax.random.uniform(keys[1], (25, 1)))
    model = eqx.nn.MLP("scalar", "scalar", 40, 2, key=keys[2])
    return model, mo.few_shot.Task((x[0], y[0]), (x[1], y[1]))


def waves():
    model, tasks = wave_tasks()
    contenders = {
        "by hand": (by_hand(squared_error, 0.01, 5), model),
        "metaopt": (ours(squared_error, 0.01, 5), model),
        "metaopt, alone": (ours(squared_error, 0.01, 5, guard=False), model),
    }
    return contenders, tasks, torch_contenders("waves", model, tasks, 0.01, 5)


def images(num_queries):
    keys = jax.random.split(jax.random.key(0), 3)
    labels = jnp.tile(jnp.arange(5), (32, num_queries))
    tasks = mo.few_shot.Task(
        (jax.random.uniform(keys[0], (32, 5, 1, 28, 28)), labels[:, :5]),
        (jax.random.uniform(keys[1], (32, 5 * num_queries, 1, 28, 28)), labels),
    )
    model = network(True, keys[2])
    contenders = {"by hand": (by_hand(cross_entropy, 0.4, 1), model)}
    contenders["metaopt, all at once"] = (
        ours(cross_entropy, 0.4, 1),
        network(False, keys[2]),
    )
    for size in CHUNK_SIZES:
        contenders[f"metaopt, {size} tasks at a time"] = (
            ours(cross_entropy, 0.4, 1, size),
            network(False, keys[2]),
        )
        alone = ours(cross_entropy, 0.4, 1, size, guard=False)
        name = f"metaopt, {size} at a time, alone"
        contenders[name] = alone, network(False, keys[2])
    return contenders, tasks, torch_contenders("images", model, tasks, 0.4, 1)


def compare(title, contenders, tasks, in_torch, repeats):
    runs, notes = {}, {}
    for name, (fn, model) in contenders.items():
        begin = time.process_time()
        jitted: Any = eqx.filter_jit(fn)
        compiled = jitted.lower(model, tasks).compile()
        seconds = time.process_time() - begin
        analysis = compiled.compiled.memory_analysis()
        assert analysis is not None
        notes[name] = f"{analysis.temp_size_in_bytes / 2**20:8.0f}{seconds:16.1f}"
        runs[name] = lambda run=compiled, model=model: jax.block_until_ready(
            run(model, tasks)
        )
    runs |= in_torch
    expected, gradient = runs["by hand"]()
    expected_norm = norm(gradient)
    for name, run in runs.items():
        value, gradient = run()
        np.testing.assert_allclose(value, expected, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(norm(gradient), expected_norm, rtol=1e-3, err_msg=name)
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    print(f"\n{title}")
    print(f"  {'':28}{'time':>8}{'ms':>9}{'MiB':>8}{'compile, CPU s':>16}")
    least = min(times["by hand"])
    for name, row in times.items():
        note = notes.get(name, "")
        print(f"  {name:28}{min(row) / least:8.2f}{1e3 * min(row):9.1f}{note}")


def norm(gradient):
    leaves = [np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(gradient)]
    return np.linalg.norm(np.concatenate(leaves))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=10, help="of each")
    repeats = parser.parse_args().repeats
    compare("Sine waves, 5 steps", *waves(), 20 * repeats)
    compare("Images, 5 to be judged by", *images(1), repeats)
    compare("Images, 75 to be judged by", *images(15), repeats)


if __name__ == "__main__":
    main()
