"""Counts the matrix products and the passes over arrays of a compiled program."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp


# The text that XLA writes: `%name (arguments) -> shape {` and, inside of the braces,
# `%name = shape operation(operands), attributes`.
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_NAMES = re.compile(r"%([\w.-]+)")
_SUMMED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_DIMENSIONS = re.compile(r"\w\[([\d,]*)\]")
# Operations that could hide products from the counter.
_UNKNOWN = ("convolution", "custom-call")
# Operations that compute nothing, and those whose work is that of what they call.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
_CALLING = ("while", "conditional", "call")
# An array with fewer entries is no array to pass over.
LEAST_ENTRIES = 64


@dataclasses.dataclass(frozen=True, order=True)
class Tally:
    """The counts of a part of a program.

    **Attributes:**

    - `multiplications`: those in matrix products.
    - `passes`: the instructions outside of fusions, and the fusions, that read or write
        an array of at least `LEAST_ENTRIES`.
    - `sums`: the reductions, such as inner products and norms.
    """

    multiplications: int = 0
    passes: int = 0
    sums: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.multiplications + other.multiplications,
            self.passes + other.passes,
            self.sums + other.sums,
        )

    def times(self, count: int) -> "Tally":
        return Tally(count * self.multiplications, count * self.passes, count * self.sums)


class Work:
    """The matrix products and the passes over arrays of a compiled function.

    The body of a loop counts as often as it runs. Where that is known only when it runs,
    as in conjugate gradients, it counts `open_steps` times, and `open_loops` has its
    multiplications, inner loops first. `tally` leaves out convolutions and custom calls,
    which `unknown` lists; `total`, its multiplications, raises an error for them.
    """

    def __init__(self, fn: Callable, *arguments: Any, open_steps: int = 1):
        jitted: Any = eqx.filter_jit(fn)
        self.compiled: jax.stages.Compiled = jitted.lower(*arguments).compile().compiled
        text = self.compiled.as_text()
        assert text is not None
        self.open_loops: list[int] = []
        self._open_steps = open_steps
        self.unknown: list[str] = []
        self._computations: dict[str, list[tuple[str, ...]]] = {}
        entry = name = ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                name = header[2]
                self._computations[name] = []
                entry = name if header[1] else entry
            elif found := _LINE.match(line):
                self._computations[name].append(found.groups())
        self.tally = self._count(entry)

    @property
    def total(self) -> int:
        if self.unknown:
            raise NotImplementedError(self.unknown[0])
        return self.tally.multiplications

    def _count(self, computation: str) -> Tally:
        lines = self._computations[computation]
        shapes = {name: shape for name, shape, _, _ in lines}
        total = Tally()
        for _, shape, operation, rest in lines:
            if operation in _UNKNOWN:
                self.unknown.append(f"{operation}({rest}")
            branches = _BRANCHES.search(rest)
            if branches:
                # The cheapest: the others look into failures.
                names = _NAMES.findall(branches[1])
                total += min(self._count(name) for name in names)
            if operation == "dot":
                total += Tally(_multiplications(shape, rest, shapes))
            called = [self._count(name) for name in _CALLED.findall(rest)]
            inside = sum(called, start=Tally())
            if operation == "while" and inside != Tally():
                trips = _TRIPS.search(rest)
                if trips is None and inside.multiplications:
                    self.open_loops.append(inside.multiplications)
                inside = inside.times(int(trips[1]) if trips else self._open_steps)
            if operation == "fusion":
                inside = dataclasses.replace(inside, passes=0)
            total += inside
            reads = [shapes.get(name, "") for name in _NAMES.findall(rest)]
            if operation not in _FREE + _CALLING and _entries(shape, *reads):
                total += Tally(passes=1)
            total += Tally(sums=int(operation == "reduce"))
        return total


def _entries(*shapes: str) -> bool:
    """Whether one of the arrays is large enough to be passed over."""
    found = [_integers(sizes) for shape in shapes for sizes in _DIMENSIONS.findall(shape)]
    return any(math.prod(sizes) >= LEAST_ENTRIES for sizes in found)


def _multiplications(shape: str, rest: str, shapes: dict[str, str]) -> int:
    """Those of `dot(rest`: the size of the result times that of what is summed over."""
    first, summed = _NAMES.search(rest), _SUMMED.search(rest)
    assert first is not None and summed is not None
    sizes = _sizes(shapes[first[1]])
    return math.prod(_sizes(shape)) * math.prod(sizes[i] for i in _integers(summed[1]))


def _sizes(shape: str) -> list[int]:
    return _integers(shape[shape.index("[") + 1 : shape.index("]")])


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def check_counter() -> None:
    """Raise an error unless the products of known programs are counted right."""
    x, weight = jnp.ones((5, 30)), jnp.ones((30, 30))
    one = 5 * 30 * 30

    def chain(x, weight):
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ weight), None), x, None, 7)[0]

    def nested(x, weight):
        return jax.lax.scan(lambda x, _: (chain(x, weight), None), x, None, 11)[0]

    def until_small(x, weight):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: chain(x, weight), x)

    def sometimes(x, weight):
        return jax.lax.cond(jnp.sum(x) > 1, nested, chain, x, weight)

    gradient = jax.grad(lambda x, weight: jnp.sum(chain(x, weight)), (0, 1))
    lanes = jax.vmap(nested, (0, None))
    known = [
        (Work(chain, x, weight).total, 7 * one),
        (Work(nested, x, weight).total, 77 * one),
        (Work(lanes, jnp.ones((3, 5, 30)), weight).total, 3 * 77 * one),
        (Work(gradient, x, weight).total, 3 * 7 * one),
        (Work(sometimes, x, weight).total, 7 * one),
        (sum(Work(until_small, x, weight).open_loops), 7 * one),
    ]
    for counted, expected in known:
        if counted != expected:
            raise AssertionError(f"counted {counted} multiplications for {expected}")
