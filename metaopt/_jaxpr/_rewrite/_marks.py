"""Marks propagated through a traced program: dependences, and values that may be
infinite."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


Transfer = Callable[[Any, list[bool]], list[bool]]
"""`transfer(equation, marks)`: which outputs of one operation are marked."""

_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def propagate(jaxpr: Jaxpr, inputs: Sequence[bool], transfer: Transfer) -> list[bool]:
    """For each output of `jaxpr`, whether it is marked.

    Loops, branches and calls are followed, and every operation in them is handed to
    `transfer`, in loops until nothing changes any more. So is a `while` as a whole, for
    what it counts and not for what it returns. An operation of an unknown kind that holds
    programs of its own is handed over as it is.

    **Arguments:**

    - `jaxpr`: the program.
    - `inputs`: which of its inputs are marked.
    - `transfer`: the rule for one operation. More marks in must not be fewer out.
    """
    marked = {var for var, mark in zip(jaxpr.invars, inputs, strict=True) if mark}

    def is_marked(atom) -> bool:
        return not isinstance(atom, Literal) and atom in marked

    for eqn in jaxpr.eqns:
        outs = _equation(eqn, [is_marked(atom) for atom in eqn.invars], transfer)
        marked.update(var for var, out in zip(eqn.outvars, outs) if out)
    return [is_marked(atom) for atom in jaxpr.outvars]


def _equation(eqn, marks: list[bool], transfer: Transfer) -> list[bool]:
    params, name = eqn.params, eqn.primitive.name
    if name == "scan":
        body = params["jaxpr"].jaxpr
        consts, carry = _scan_counts(eqn, body)
        state = marks[consts : consts + carry]
        while True:
            inside = marks[:consts] + state + marks[consts + carry :]
            outs = propagate(body, inside, transfer)
            grown = [a or b for a, b in zip(state, outs[:carry])]
            if grown == state:
                return state + outs[carry:]
            state = grown
    if name == "while":
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        cond, body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr
        state = marks[n_cond + n_body :]
        while True:
            outs = propagate(body, marks[n_cond : n_cond + n_body] + state, transfer)
            # A marked condition decides how often the body runs.
            stops = propagate(cond, marks[:n_cond] + state, transfer)[0]
            grown = [a or b or stops for a, b in zip(state, outs)]
            if grown == state:
                transfer(eqn, marks[: n_cond + n_body] + state)
                return state
            state = grown
    if name == "cond":
        branches = [propagate(b.jaxpr, marks[1:], transfer) for b in params["branches"]]
        return [marks[0] or any(outs) for outs in zip(*branches)]
    for key in _CALLS:
        inner = params.get(key)
        inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        if isinstance(inner, Jaxpr) and len(inner.invars) == len(marks):
            outs = propagate(inner, marks, transfer)
            if len(outs) == len(eqn.outvars):
                return outs
    return transfer(eqn, marks)


def _scan_counts(eqn, body: Jaxpr) -> tuple[int, int]:
    """The numbers of constants and carries of a `scan`.

    Told by shapes, because the names of its parameters differ between versions of JAX:
    what is scanned over has one axis more outside than inside.
    """

    def count_scanned(outer, inner) -> int:
        return sum(a.aval.ndim > b.aval.ndim for a, b in zip(outer, inner, strict=True))

    carry = len(eqn.outvars) - count_scanned(eqn.outvars, body.outvars)
    scanned = count_scanned(eqn.invars, body.invars)
    return len(eqn.invars) - carry - scanned, carry
