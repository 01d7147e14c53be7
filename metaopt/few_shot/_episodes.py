"""Few-shot tasks drawn from examples that are sorted by class."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._core._types import Key
from .._core._validate import canonical_arrays, check_count
from ..datasets import ClassData
from ._task import Task


def as_float(x: Array) -> Array:
    """Bytes as numbers from 0 to 1, and everything else as it is."""
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x


class Episodes(eqx.Module):
    """N-way K-shot tasks, drawn from arrays on the device inside the compiled loop.

    For each task some classes are drawn and numbered anew, and of each class some examples,
    none of them twice: support and query have no example in common. The draws depend on the
    key alone. `episodes(key)` is a batch of tasks, and `episodes.draw(key)` is one.

    A task is a [`metaopt.few_shot.Task`][] whose `support` and `query` are pairs `(x, y)`
    of examples and labels, `num_ways * num_shots` and `num_ways * num_queries` of them,
    class after class.

    **Arguments:**

    - `data`: a [`metaopt.datasets.ClassData`][].
    - `num_ways`: the number of classes in a task.
    - `num_shots`: the number of support examples of each.
    - `num_queries`: the number of query examples of each.
    - `num_tasks`: the number of tasks in a batch.
    - `prepare`: applied to examples once they are drawn, of shape `(n, ...)`; by default
        bytes become numbers from 0 to 1.

    **Raises:**

    `ValueError` where there are too few classes or examples.
    """

    x: Array
    counts: Array
    num_ways: int = eqx.field(static=True)
    num_shots: int = eqx.field(static=True)
    num_queries: int = eqx.field(static=True)
    num_tasks: int = eqx.field(static=True)
    prepare: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        data: ClassData,
        num_ways: int,
        num_shots: int,
        num_queries: int,
        *,
        num_tasks: int = 1,
        prepare: Callable[[Array], Array] = as_float,
    ):
        check_sizes(data, num_ways, num_shots, num_queries, num_tasks)
        self.x = canonical_arrays(data.x, "data.x")
        self.counts = jnp.asarray(data.counts)
        self.num_ways = num_ways
        self.num_shots = num_shots
        self.num_queries = num_queries
        self.num_tasks = num_tasks
        self.prepare = prepare

    def draw(self, key: Key) -> Task:
        """One task.

        **Arguments:**

        - `key`: from `jax.random.key`.

        **Returns:**

        A [`metaopt.few_shot.Task`][].
        """
        class_key, example_key = jax.random.split(key)
        classes = distinct(class_key, len(self.x), self.num_ways)
        keys = jax.random.split(example_key, self.num_ways)
        per_class = self.num_shots + self.num_queries

        def of_class(key, label):
            return distinct(key, self.x.shape[1], per_class, self.counts[label])

        chosen = jax.vmap(of_class)(keys, classes)
        x = self.x[classes[:, None], chosen]  # (num_ways, per_class, ...)
        labels = jnp.arange(self.num_ways, dtype=jnp.int32)

        def part(x):
            flat = x.reshape(-1, *x.shape[2:])
            return self.prepare(flat), jnp.repeat(labels, x.shape[1])

        return Task(part(x[:, : self.num_shots]), part(x[:, self.num_shots :]))

    def __call__(self, key: Key) -> Task:
        """A batch of tasks.

        **Arguments:**

        - `key`: from `jax.random.key`.

        **Returns:**

        A [`metaopt.few_shot.Task`][] whose arrays have a leading axis of `num_tasks`.
        """
        return jax.vmap(self.draw)(jax.random.split(key, self.num_tasks))


def distinct(key: Key, size: int, count: int, limit: Any = None) -> Array:
    """`count` different numbers below `size`, or below `limit`, at random."""
    # The places of the largest of as many random numbers. A permutation sorts them all.
    scores = jax.random.uniform(key, (size,))
    if limit is not None:
        scores = jnp.where(jnp.arange(size) < limit, scores, -1)
    return jax.lax.top_k(scores, count)[1]


def check_sizes(
    data: ClassData, num_ways: int, num_shots: int, num_queries: int, num_tasks: int
) -> None:
    """Raise a `ValueError` unless tasks of these sizes can be drawn."""
    if not isinstance(data, ClassData):
        raise ValueError(
            "`data` must be a `metaopt.datasets.ClassData`; got "
            f"{type(data).__name__}. `ClassData.from_labels(x, y)` makes one."
        )
    for name, count in (
        ("num_ways", num_ways),
        ("num_shots", num_shots),
        ("num_queries", num_queries),
        ("num_tasks", num_tasks),
    ):
        check_count(count, name)
    if num_ways > data.num_classes:
        raise ValueError(
            f"A task of `num_ways={num_ways}` classes cannot be drawn from "
            f"{data.num_classes} classes of {data.name}."
        )
    fewest, wanted = int(data.counts.min()), num_shots + num_queries
    if wanted > fewest:
        place = int(np.argmin(data.counts))
        raise ValueError(
            f"`num_shots` + `num_queries` is {wanted}, and class {place} of {data.name} "
            f"has {fewest} examples. Ask for fewer, or leave such classes out: "
            f"`data[data.counts >= {wanted}]`."
        )


class HostEpisodes:
    """N-way K-shot tasks drawn on the host, for data that do not fit on the device.

    Iterates over batches of tasks without end; `episodes.batch(index)` is any one of
    them, and depends on `seed` and `index` alone, whichever process asks for it. A run
    that is taken up again goes on with `episodes.starting_at(index)`.

    **Arguments:**

    - `data`: a [`metaopt.datasets.ClassData`][], whose `x` may be a memory map.
    - `num_ways`, `num_shots`, `num_queries`, `num_tasks`: as for
        [`metaopt.few_shot.Episodes`][].
    - `seed`: an int.
    - `prepare`: applied to the examples of a batch, a NumPy array.

    **Raises:**

    `ValueError` where there are too few classes or examples.
    """

    def __init__(
        self,
        data: ClassData,
        num_ways: int,
        num_shots: int,
        num_queries: int,
        *,
        num_tasks: int = 1,
        seed: int = 0,
        prepare: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        check_sizes(data, num_ways, num_shots, num_queries, num_tasks)
        check_count(seed, "seed", 0)
        self.data = data
        self.num_ways = num_ways
        self.num_shots = num_shots
        self.num_queries = num_queries
        self.num_tasks = num_tasks
        self.seed = seed
        self.prepare = prepare

    def batch(self, index: int) -> Task:
        """The batch of tasks with this number."""
        seed = np.random.SeedSequence(self.seed, spawn_key=(index,))
        random = np.random.default_rng(seed)
        tasks = [self._draw(random) for _ in range(self.num_tasks)]
        stack = lambda parts: tuple(np.stack(a) for a in zip(*parts))
        return Task(stack([t[0] for t in tasks]), stack([t[1] for t in tasks]))

    def starting_at(self, index: int) -> Iterator[Task]:
        """The batches from this number on."""
        while True:
            yield self.batch(index)
            index += 1

    def __iter__(self) -> Iterator[Task]:
        return self.starting_at(0)

    def _draw(self, random: np.random.Generator) -> Sequence[Any]:
        data, per_class = self.data, self.num_shots + self.num_queries
        classes = random.choice(data.num_classes, self.num_ways, replace=False)
        rows = [random.choice(data.counts[c], per_class, replace=False) for c in classes]
        x = np.stack([data.x[c][row] for c, row in zip(classes, rows)])
        prepare = self.prepare or _as_float

        def part(x):
            labels = np.repeat(np.arange(self.num_ways, dtype=np.int32), x.shape[1])
            return prepare(x.reshape(-1, *x.shape[2:])), labels

        return part(x[:, : self.num_shots]), part(x[:, self.num_shots :])


def _as_float(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32) / 255 if x.dtype == np.uint8 else x
