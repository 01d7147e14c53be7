"""The data of the outer loop: fixed, or pulled for every outer step."""

import abc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._core._foreign import batch_on_host, is_loader
from .._core._tree import same_structs
from .._core._types import IntScalar, Key
from .._core._validate import canonical_arrays
from .._data import AbstractData, AbstractWrappedData, as_data, restarted


class AbstractFeed(abc.ABC):
    """One source of data of the outer loop.

    **Attributes:**

    - `is_pulled`: whether each outer step has data of its own.
    - `now`: the data of the last outer step.
    - `interrupted`: whether Ctrl-C came while it waited for data.
    """

    is_pulled = False
    interrupted = False
    now: Any = None

    @abc.abstractmethod
    def begin(self, num_steps: int) -> None:
        """Called before the first outer step of a run, with those taken before it."""

    @abc.abstractmethod
    def rewind(self, num_steps: int) -> None:
        """Go back to the data after so many outer steps, where it can be had again."""

    @abc.abstractmethod
    def pull(self, count: int) -> int:
        """Pull data for as many outer steps as one call can take, up to `count`."""

    @abc.abstractmethod
    def take(self, count: int, size: int) -> Any:
        """The data of the next `count` outer steps, which stays until it is used.

        **Returns:**

        Data that is fixed as it is; data that is pulled stacked along a new first axis of
        length `size`, whose entries past `count` are never read.
        """

    @abc.abstractmethod
    def use(self, count: int) -> None:
        """Go on to the data after that of `count` outer steps."""


class Fixed(AbstractFeed):
    """The same data at every outer step.

    **Attributes:**

    - `now`: the data.
    """

    def __init__(self, data: Any):
        self.now = data

    def begin(self, num_steps):
        pass

    def rewind(self, num_steps):
        pass

    def pull(self, count):
        return count

    def take(self, count, size):
        return self.now

    def use(self, count):
        pass


class Pulled(AbstractFeed):
    """Data that an iterator yields for every outer step.

    Steps that are taken in one call have data of the same shapes: a call ends where they
    change, and each shape is compiled once.

    **Arguments:**

    - `start`: `start(num_steps)`, an iterator that goes on after so many outer steps.
    - `check`: a function of an item that returns it as arrays.
    - `restarts`: whether `start` may be called again.

    **Attributes:**

    - `now`: the data of the last outer step, or `None` before it.
    """

    is_pulled = True

    def __init__(
        self,
        start: Callable[[int], Iterator[Any]],
        check: Callable[[Any], Any],
        restarts: bool = False,
    ):
        self.start = start
        self.check = check
        self.restarts = restarts
        self.source: Iterator[Any] | None = None
        self.now: Any = None
        self.waiting: list[Any] = []  # pulled, and not used yet

    def begin(self, num_steps):
        if self.source is None:
            self.source = self.start(num_steps)
        elif num_steps and self.restarts:
            # The batch of the last step that was taken, and those after it.
            self.source, self.waiting = self.start(num_steps - 1), []
            if self.pull(1):
                self.use(1)

    def rewind(self, num_steps):
        if self.restarts:
            self.source, self.waiting = None, []
            self.begin(0)
            self.begin(num_steps)

    def peek(self) -> bool:
        """Pull the data of the first outer step before the run, into `now`.

        **Returns:**

        Whether there is any.
        """
        self.begin(0)
        there = self.pull(1) > 0
        self.now = self.waiting[0] if there else None
        return there

    def pull(self, count):
        assert self.source is not None
        try:
            while len(self.waiting) < count and not self.interrupted:
                self.waiting.append(self.check(next(self.source)))
        except StopIteration:
            pass
        except KeyboardInterrupt:
            # The steps on what has been pulled are taken first.
            self.interrupted = True
        arrays = [eqx.filter(data, eqx.is_array) for data in self.waiting[:count]]
        alike = lambda other: same_structs(arrays[0], other)
        return len(arrays[:1]) + sum(1 for _ in itertools.takewhile(alike, arrays[1:]))

    def take(self, count, size):
        parts = [eqx.partition(data, eqx.is_array) for data in self.waiting[:count]]
        arrays = [part[0] for part in parts]
        arrays += [arrays[-1]] * (size - count)
        return eqx.combine(jax.tree.map(_stacked, *arrays), parts[0][1])

    def use(self, count):
        if count:
            self.now = self.waiting[count - 1]
            self.waiting = self.waiting[count:]


class _Draw(eqx.Module):
    """The cursor of a source that begins anew: the number of the next draw."""

    key: Key
    count: IntScalar


class _Anew(AbstractWrappedData):
    """The data of one outer step alone, whose draws begin anew.

    Its cursor is the same whatever the source, which can be of other shapes in the next.
    """

    source: AbstractData

    @property
    def varies(self):
        return self.source.varies

    def init(self, key):
        return _Draw(key, jnp.zeros((), int))

    def take(self, cursor, num_steps):
        key = jax.random.fold_in(cursor.key, cursor.count)
        return self.source.plan(key, num_steps), _Draw(cursor.key, cursor.count + 1)

    def batch(self, draw):
        return self.source.batch(draw)

    def full(self):
        return self.source.full()


def data_feed(data: Any, name: str) -> Fixed | Pulled:
    """The data of one of the two losses as a feed.

    **Raises:**

    `ValueError` for an iterator or loader that yields nothing.
    """

    def check(data: Any) -> AbstractData:
        return as_data(canonical_arrays(data, name), name)

    if not isinstance(data, Iterator) and not is_loader(data):
        return Fixed(check(data))
    anew = lambda data: _Anew(check(batch_on_host(data, name)))
    once = isinstance(data, Iterator)  # goes on by itself where it was
    start = lambda num_steps: itertools.islice(
        restarted(data), 0 if once else num_steps, None
    )
    feed = Pulled(start, anew, restarts=not once)
    if not feed.peek():
        if feed.interrupted:
            raise KeyboardInterrupt
        raise ValueError(f"`{name}` is an iterator or loader that yields nothing.")
    return feed


def _stacked(*leaves: Any) -> Any:
    on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
    return np.stack(leaves) if on_host else jnp.stack(leaves)
