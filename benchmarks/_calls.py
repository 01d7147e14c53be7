"""The cost of a call apart from its numbers: compilation and Python."""

import time
from collections.abc import Callable
from typing import Any

import jax
from _cases import ALONE, Case, decays, PLAIN


# A problem whose numbers take no time, and how often in a row it is called.
NUM_DECAYS, NUM_CALLS = 8, 5


def first_calls(case: Case, rounds: int) -> dict[str, float]:
    """Measure the CPU seconds that each contender takes to be traced, lowered and compiled:
    the least of some rounds that alternate, all caches cleared before each."""
    contenders, arguments = case
    seconds = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, fn in contenders.items():
            jax.clear_caches()
            begin = time.process_time()
            jax.jit(fn).lower(*arguments).compile()
            seconds[name] = min(seconds[name], time.process_time() - begin)
    return seconds


def small_calls(rounds: int) -> dict[str, dict[str, float]]:
    """Measure the microseconds of one call of each contender on a tiny problem, eager and
    compiled: the least of some rounds that alternate."""
    contenders, arguments = decays(NUM_DECAYS, "CG")
    names = [name for name in ("metaopt", ALONE, PLAIN, "jaxopt") if name in contenders]
    calls: dict[tuple[str, str], Callable[..., Any]] = {}
    for name in names:
        calls[name, "eager"] = contenders[name]
        calls[name, "compiled"] = jax.jit(contenders[name])
    for call in calls.values():
        jax.block_until_ready(call(*arguments))
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        # Several in a row: a call that follows a long one finds cold caches.
        for key in [key for key in calls for _ in range(NUM_CALLS)]:
            begin = time.perf_counter()
            jax.block_until_ready(calls[key](*arguments))
            least[key] = min(least[key], time.perf_counter() - begin)
    return {
        name: {way: 1e6 * least[name, way] for way in ("eager", "compiled")}
        for name in names
    }
