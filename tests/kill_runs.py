"""Kill runs at random moments, take them up again, and compare them bit for bit.

    python tests/kill_runs.py [--kills 50] [--kind NAME ...] [--seed 0]

Each run is a process of its own, which writes a checkpoint after each compiled call and is
killed (`kill -9`) after a random time. Once it has been killed often enough it runs to its
end. Its last state and its history must then be those of a run that nobody has killed. The
exit status is 1 where one differs.
"""

import argparse
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import metaopt as mo


NUM_STEPS = 60
ROWS = np.random.default_rng(0).standard_normal((40, 3))


def _inner_loss(params, hyper, batch):
    return jnp.mean((batch @ params - 1.0) ** 2) + jnp.sum(jnp.exp(hyper) * params**2)


def _outer_loss(params, hyper, batch):
    return jnp.mean((batch @ params - 1.0) ** 2)


def _bilevel(callbacks: list[Any], train: Any, valid: Any, solver: Any) -> Any:
    return mo.solve_bilevel(
        mo.BilevelProblem(_inner_loss, _outer_loss),
        jnp.zeros(3),
        train,
        valid,
        params=jnp.zeros(3),
        solver=solver,
        num_steps=NUM_STEPS,
        steps_per_call=2,
        callbacks=callbacks,
    )


def _nested() -> mo.NestedSolver:
    return mo.NestedSolver(
        mo.Descent(optax.adam(0.1), 3),
        mo.UnrolledAdjoint(),
        optax.adam(0.05),
        mo.WarmStart(),
    )


class _Loader:
    """Batches in the same order whenever it is started."""

    def __iter__(self):
        return (jnp.asarray(ROWS[i : i + 8]) for i in range(0, 40, 8))


class _Fit(mo.extend.AbstractPredictionProblem):
    """A network with a weight decay."""

    def init(self, hyper, key):
        return eqx.nn.MLP(3, 1, 4, 1, key=key)

    def predict(self, params, hyper, batch):
        return jax.vmap(params)(batch)[:, 0]

    def criterion(self, predictions, params, hyper, batch):
        decay = jnp.exp(hyper) * mo.nn.squared_norm(params)
        return jnp.mean((predictions - 1.0) ** 2) + decay


def _self_tuning(callbacks: list[Any]) -> Any:
    def valid_loss(params, hyper, batch):
        return jnp.mean((jax.vmap(params)(batch)[:, 0] - 1.0) ** 2)

    rows = jnp.asarray(ROWS)
    return mo.solve_bilevel(
        mo.BilevelProblem(_Fit(), valid_loss),
        jnp.asarray(-2.0),
        mo.Minibatches(rows, 8),
        mo.Minibatches(rows, 8),
        solver=mo.SelfTuningSolver(params=optax.adam(0.01), hyper=optax.adam(0.05)),
        num_steps=NUM_STEPS,
        steps_per_call=2,
        callbacks=callbacks,
    )


def _few_shot(callbacks: list[Any]) -> Any:
    def tasks(key):
        shift = jax.random.normal(key, (4, 1))
        x = jnp.tile(jnp.linspace(-1.0, 1.0, 5), (4, 1))
        return mo.few_shot.Task((x, x + shift), (x, x + shift))

    def loss(model, batch):
        return jnp.mean((model["a"] * batch[0] + model["b"] - batch[1]) ** 2)

    return mo.few_shot.train(
        mo.few_shot.MAML(loss, mo.Descent(optax.sgd(0.1), 2)),
        {"a": jnp.zeros(()), "b": jnp.zeros(())},
        tasks,
        outer=optax.adam(0.05),
        num_steps=NUM_STEPS,
        steps_per_call=2,
        callbacks=callbacks,
    )


KINDS: dict[str, Any] = {
    "all rows": lambda callbacks: _bilevel(callbacks, ROWS, ROWS, _nested()),
    "minibatches": lambda callbacks: _bilevel(
        callbacks, mo.Minibatches(ROWS, 7), mo.Minibatches(ROWS, 9), _nested()
    ),
    "loader": lambda callbacks: _bilevel(callbacks, _Loader(), ROWS, _nested()),
    "self-tuning": _self_tuning,
    "few-shot": _few_shot,
}


class _Slow(mo.callbacks.AbstractCallback):
    """Say which steps are done, and leave time to be killed in."""

    def see(self, run):
        print(run.num_steps, flush=True)
        time.sleep(0.01)


def child(kind: str, path: str) -> None:
    """Run one kind to its end, and print a hash of all of its numbers."""
    jax.config.update("jax_enable_x64", True)
    solution = KINDS[kind]([mo.callbacks.Checkpoint(path, every=1), _Slow()])
    digest = hashlib.sha256()
    columns = dict(solution.history.columns)
    columns.pop("seconds")
    for leaf in jax.tree.leaves((solution.state, columns, solution.history.hyper)):
        if eqx.is_array(leaf):
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            digest.update(
                np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()
            )
    print("end", digest.hexdigest(), flush=True)


class Runs:
    """Processes of one kind, which share compiled programs."""

    def __init__(self, kind: str, folder: Path, generator: random.Random):
        self.kind, self.folder, self.random = kind, folder, generator
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            # Of programs from the cache, jaxlib logs which instructions they do not use.
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }

    def start(self, name: str) -> subprocess.Popen:
        """Start a run whose checkpoint has that name."""
        command = [sys.executable, __file__, "--child", self.kind, str(self.folder / name)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=self.environment
        )

    def finished(self, name: str) -> str:
        """Run to the end.

        **Returns:**

        The hash of all numbers.
        """
        output, _ = self.start(name).communicate(timeout=600)
        last = (output.splitlines() or [""])[-1]
        if not last.startswith("end "):
            raise RuntimeError(f"A run of {self.kind!r} did not end: {output[-200:]}")
        return last.removeprefix("end ")

    def kill(self, name: str) -> int:
        """Start a run, and kill it at some moment from its first step on.

        **Returns:**

        The step that it had reached.
        """
        run = self.start(name)
        assert run.stdout is not None
        line = run.stdout.readline()
        time.sleep(self.random.uniform(0.0, 0.12))
        run.kill()
        rest, _ = run.communicate()
        steps = [int(word) for word in (line + rest).split() if word.isdigit()]
        return max(steps, default=0)


def compare(kind: str, num_kills: int, seed: int) -> bool:
    """Whether a run that is killed so often ends as one that is not."""
    with tempfile.TemporaryDirectory(prefix="metaopt_kills_") as folder:
        runs = Runs(kind, Path(folder), random.Random(f"{seed} {kind}"))
        whole = runs.finished("whole")
        reached, num_runs = [], 0
        for _ in range(num_kills):
            if reached and reached[-1] >= NUM_STEPS - 4:
                # Few steps are left to be killed in.
                same = runs.finished(f"killed {num_runs}") == whole
                if not same:
                    return False
                num_runs += 1
            reached.append(runs.kill(f"killed {num_runs}"))
        same = runs.finished(f"killed {num_runs}") == whole
    print(f"{kind:14} killed at steps {reached}: {'the same' if same else 'DIFFERS'}")
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return 0
    kinds = arguments.kind or list(KINDS)
    each = -(-arguments.kills // len(kinds))
    return int(not all([compare(kind, each, arguments.seed) for kind in kinds]))


if __name__ == "__main__":
    sys.exit(main())
