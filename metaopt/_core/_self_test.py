"""Known-answer self-test: does the installed jaxlib compute right numbers?"""

import functools
import warnings

import jax
import jax.numpy as jnp
import jaxlib.version


# The release whose CPU code generator reads the wrong rows of a batched product with a
# small matrix, without any message. The numbers look plausible, so every gradient
# computed with it is suspect.
_BAD_JAXLIB = "0.10.2"

_CURE = (
    "install another release, for example "
    "`pip install --upgrade 'jax!=0.10.2' 'jaxlib!=0.10.2'`."
)


@jax.jit
def _batched_square_norm(rows: jax.Array) -> jax.Array:
    return jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(rows)


def known_answer() -> bool:
    """Run a small compiled computation whose answer is known, and compare.

    The computation, `sum((eye(3) @ row)**2)` mapped over 40,000 rows `(i, 0, 0)`, must
    give `i**2`. The CPU backend of jaxlib 0.10.2 gives the square of another row's `i`
    (up to 0.8 % off, never NaN). The check takes well under a second.

    **Returns:**

    `True` if the answer is right. `False` if not: then no result of this installation
    should be trusted.
    """
    index = jnp.arange(40_000.0)
    zero = jnp.zeros_like(index)
    rows = jnp.stack([index, zero, zero], axis=1)
    # "highest" keeps accelerators from rounding the product to 10 bits or fewer, which
    # would be as large as the fault looked for. The tolerance is then 100 roundings of
    # float32; the fault is 500 times larger.
    with jax.default_matmul_precision("highest"):
        answer = _batched_square_norm(rows)
    expected = index**2
    # Written so that NaN fails.
    return bool(jnp.all(jnp.abs(answer - expected) <= 1e-5 * expected))


def is_known_bad(version: str) -> bool:
    """Whether a jaxlib release is known to compute wrong numbers.

    **Arguments:**

    - `version`: a release number as in `jaxlib.version.__version__`.

    **Returns:**

    `True` for the release that metaopt's dependencies exclude, else `False`.
    """
    return version == _BAD_JAXLIB


@functools.cache
def warn_if_known_bad() -> None:
    """Warns, once per process, if the installed jaxlib is known to be wrong.

    Only compares version numbers, so that importing metaopt stays cheap. Run
    `python -m metaopt check` for the test that computes something.
    """
    version = jaxlib.version.__version__
    if is_known_bad(version):
        warnings.warn(
            f"jaxlib {version} computes wrong numbers on CPU without any message "
            "(batched products with small matrices read the wrong rows), so no "
            f"hypergradient can be trusted. To cure it, {_CURE} "
            "`python -m metaopt check` tests an installation.",
            RuntimeWarning,
            stacklevel=3,
        )


def verdict(answer_is_right: bool, version: str) -> tuple[bool, str]:
    """The outcome of the self-test in one sentence.

    **Arguments:**

    - `answer_is_right`: what `known_answer` returned.
    - `version`: the release of jaxlib it ran on.

    **Returns:**

    A pair: whether the installation can be trusted, and the sentence.
    """
    if not answer_is_right:
        return False, (
            f"WRONG: jaxlib {version} fails the known-answer test, so no number "
            f"computed here can be trusted; {_CURE}"
        )
    if is_known_bad(version):
        return False, (
            f"DOUBTFUL: jaxlib {version} passes the known-answer test here, but this "
            f"release is known to compute wrong numbers on CPU; {_CURE}"
        )
    return True, f"OK: jaxlib {version} passes the known-answer test."
