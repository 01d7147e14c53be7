"""Set-up shared by all tests: CPU, float64 allowed, fixed seeds."""

import gc
import os
import pathlib


# Read by jax when it is first imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

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


# Tests whose subject is what the compiler makes: memory, and arithmetic bit for bit.
_OPTIMIZED = ("test_budgets", "test_memory", "test_reversible", "test_self_tuning_costs")


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly(request):
    """Most of the time of a test is the compiler's, and a third of that is spent on fast
    machine code. METAOPT_TEST_OPTIMIZED=1 does that as well; one of the three
    environments that are tested on every change have it."""
    name = request.module.__name__.rsplit(".", 1)[-1]
    optimized = name in _OPTIMIZED or os.environ.get("METAOPT_TEST_OPTIMIZED") == "1"
    jax.config.update("jax_disable_most_optimizations", not optimized)


@pytest.fixture(autouse=True)
def _fixed_numpy_seed():
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _forget_compiled_programs():
    """Every compiled program takes hundreds of memory mappings on CPUs, and Linux allows a
    process 65,530 of them: beyond, the compiler crashes."""
    yield
    if _MAPPINGS.exists() and len(_MAPPINGS.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()
        gc.collect()


_MAPPINGS = pathlib.Path("/proc/self/maps")


@pytest.fixture
def get_key():
    """A function that returns a new random key at each call, the same on each run."""
    key = jax.random.key(20_24)

    def new_key():
        nonlocal key
        key, out = jax.random.split(key)
        return out

    return new_key
