"""Counts the multiplications in the matrix products of a compiled program."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


# The text that XLA writes: `%name (arguments) -> shape {` and, inside of the braces,
# `%name = shape operation(operands), attributes`.
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_FIRST_OPERAND = re.compile(r"%([\w.-]+)")
_SUMMED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# Operations that could hide products from the counter.
_UNKNOWN = ("convolution", "custom-call")


class Work:
    """The multiplications in the matrix products of a compiled function.

    The body of a loop counts as often as it runs. Where that is known only when it runs,
    as in conjugate gradients, it counts once, and `open_loops` has its multiplications,
    inner loops first.
    """

    def __init__(self, fn: Callable, *arguments: Any):
        text = jax.jit(fn).lower(*arguments).compile().as_text()
        assert text is not None
        self.open_loops: list[int] = []
        self._computations: dict[str, list[tuple[str, ...]]] = {}
        entry = name = ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                name = header[2]
                self._computations[name] = []
                entry = name if header[1] else entry
            elif found := _LINE.match(line):
                self._computations[name].append(found.groups())
        self.total = self._count(entry)

    def _count(self, computation: str) -> int:
        lines = self._computations[computation]
        shapes = {name: shape for name, shape, _, _ in lines}
        total = 0
        for _, shape, operation, rest in lines:
            if operation in _UNKNOWN:
                raise NotImplementedError(f"{operation}({rest}")
            branches = _BRANCHES.search(rest)
            if branches:
                # The cheapest: the others look into failures.
                names = _FIRST_OPERAND.findall(branches[1])
                total += min(self._count(name) for name in names)
            if operation == "dot":
                total += _multiplications(shape, rest, shapes)
            inside = sum(self._count(called) for called in _CALLED.findall(rest))
            if operation == "while" and inside:
                trips = _TRIPS.search(rest)
                if trips is None:
                    self.open_loops.append(inside)
                else:
                    inside *= int(trips[1])
            total += inside
        return total


def _multiplications(shape: str, rest: str, shapes: dict[str, str]) -> int:
    """Those of `dot(rest`: the size of the result times that of what is summed over."""
    first, summed = _FIRST_OPERAND.search(rest), _SUMMED.search(rest)
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
