"""Set-up shared by all tests: CPU, float64 allowed, fixed seeds."""

import collections
import gc
import itertools
import os
import pathlib

import quick_compilation


# Read by jax when it is first imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Programs without the lines that they come from are made faster.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# METAOPT_TEST_OPTIMIZED=1 compiles as jax does by default; of the three environments
# that are tested on every change, the oldest and the newest have it.
_OPTIMIZED = os.environ.get("METAOPT_TEST_OPTIMIZED") == "1"
if not _OPTIMIZED:
    os.environ["XLA_FLAGS"] = quick_compilation.xla_flags()
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402


# Closed forms and finite differences are compared in float64. Tests of float32
# behaviour ask for float32 arrays.
jax.config.update("jax_enable_x64", True)

# The same examples on every run, and no limit on the time of one (compilation).
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")


def pytest_collection_finish():
    """What was imported stays: the garbage collector need not look at it again for each
    of the many objects that tracing makes."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


def pytest_collection_modifyitems(items):
    """Mark slow what is left to `.ci/run`, and all but every n-th variant of a test with
    `@pytest.mark.one_of(n)`. What is marked slow as well is not left to `.ci/run`."""
    seen = collections.Counter()
    for item in items:
        thinned = item.get_closest_marker("one_of")
        if thinned and not item.get_closest_marker("slow"):
            (count,) = thinned.args
            test = item.module.__name__, item.originalname
            if seen[test] % count:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1
        if not item.get_closest_marker("ci"):
            continue
        if item.get_closest_marker("slow"):
            item.own_markers = [m for m in item.own_markers if m.name != "ci"]
        else:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _compile_quickly(request):
    optimized = _OPTIMIZED or request.node.get_closest_marker("optimized")
    jax.config.update("jax_disable_most_optimizations", not optimized)


@pytest.fixture(autouse=True)
def _fixed_numpy_seed():
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _forget_compiled_programs():
    """Every compiled program takes hundreds of memory mappings on CPUs, and Linux allows a
    process 65,530 of them: beyond, the compiler crashes."""
    yield
    # To count them takes milliseconds, and no test makes thousands.
    if next(_TESTS) % 8 or not _MAPPINGS.exists():
        return
    if _MAPPINGS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


_MAPPINGS = pathlib.Path("/proc/self/maps")
_TESTS = itertools.count(1)


@pytest.fixture
def get_key():
    """A function that returns a new random key at each call, the same on each run."""
    key = jax.random.key(20_24)

    def new_key():
        nonlocal key
        key, out = jax.random.split(key)
        return out

    return new_key
