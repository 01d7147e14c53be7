"""`metaopt check`: does this installation compute right numbers?"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _hypergradient
from .._adjoint import AbstractAdjoint, ForwardAdjoint, ImplicitAdjoint, UnrolledAdjoint
from .._core._results import SolveError
from .._core._self_test import known_answer, verdict
from .._linear import CG
from .._problem import BilevelProblem
from .._solver import Descent
from ._info import version, versions


_ROWS, _COLUMNS = 24, 4
_STEP = 1e-4  # of the differences
_ACCEPTED = {"float32": 1e-3, "float64": 1e-6}


_WRONG = (
    "WRONG: a hypergradient is not the one that differences say. Report this with the "
    "lines above; other versions of jax may compute it right."
)


def check() -> tuple[int, str]:
    """The exit code and the text of the command."""
    lines = versions()
    try:
        trusted, sentence = verdict(known_answer(), version("jaxlib") or "unknown")
        rows, good = _hypergradients() if trusted else ([], True)
    except Exception as error:  # such as of a backend that is not there
        cause = str(error).partition("\n")[0] or repr(error)
        platforms = os.environ.get("JAX_PLATFORMS", "not set")
        lines.append(
            f"FAILED: jax cannot compute here: {cause}. JAX_PLATFORMS is {platforms}; "
            "JAX_PLATFORMS=cpu tests the CPU alone."
        )
        return 1, "\n".join(lines) + "\n"
    lines += [*rows, sentence if good else _WRONG]
    return (0 if trusted and good else 1), "\n".join(lines) + "\n"


def _hypergradients() -> tuple[list[str], bool]:
    """A line for each way to differentiate and each dtype, and whether all are right."""
    random = np.random.default_rng(0)
    x = random.standard_normal((_ROWS, _COLUMNS))
    y = x @ np.array([1.0, -2.0, 0.5, 0.0]) + 0.3 * random.standard_normal(_ROWS)
    hyper = np.linspace(-2.0, -0.5, _COLUMNS)
    wanted = _differences(x, y, hyper)
    adjoints: dict[str, AbstractAdjoint] = {
        "unrolled": UnrolledAdjoint(),
        "forward": ForwardAdjoint(),
        "implicit": ImplicitAdjoint(CG(rtol=1e-5)),
    }
    lines, good = (
        [f"hypergradients on {jax.devices()[0].platform}, against differences"],
        True,
    )
    for dtype, accepted in _ACCEPTED.items():
        for name, adjoint in adjoints.items():
            try:
                found = _hypergradient_of(x, y, hyper, adjoint, dtype)
            except SolveError as refused:
                good = False
                cause = str(refused).partition("\n")[0]
                lines.append(f"  {name:<10}{dtype:<9}WRONG, refused: {cause}")
                continue
            error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
            right = error <= accepted  # false for NaN
            good = good and right
            shown = "ok" if right else f"WRONG (accepted: {accepted:.0e})"
            lines.append(f"  {name:<10}{dtype:<9}relative error {error:.1e}  {shown}")
    return lines, good


def _hypergradient_of(
    x: np.ndarray, y: np.ndarray, hyper: np.ndarray, adjoint: AbstractAdjoint, dtype: str
) -> np.ndarray:
    def fit(params: Any, hyper: Any, batch: Any) -> Any:
        return jnp.mean((batch[0] @ params - batch[1]) ** 2)

    def penalised(params: Any, hyper: Any, batch: Any) -> Any:
        return fit(params, hyper, batch) + jnp.sum(jnp.exp(hyper) * params**2)

    half = _ROWS // 2
    # Accelerators round products to ten bits or fewer by default.
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        cast = lambda a: jnp.asarray(a, dtype)
        gradient, _ = _hypergradient.hypergradient(
            BilevelProblem(penalised, fit),
            cast(hyper),
            (cast(x[:half]), cast(y[:half])),
            (cast(x[half:]), cast(y[half:])),
            params=cast(np.zeros(_COLUMNS)),
            inner=Descent(optax.sgd(0.1), num_steps=300),
            adjoint=adjoint,
        )
        return np.asarray(gradient, np.float64)


def _differences(x: np.ndarray, y: np.ndarray, hyper: np.ndarray) -> np.ndarray:
    """The hypergradient by central differences of the closed form, in NumPy alone."""
    half = _ROWS // 2

    def outer_loss(hyper: np.ndarray) -> float:
        gram = x[:half].T @ x[:half] / half + np.diag(np.exp(hyper))
        params = np.linalg.solve(gram, x[:half].T @ y[:half] / half)
        return float(np.mean((x[half:] @ params - y[half:]) ** 2))

    steps = _STEP * np.eye(_COLUMNS)
    return np.array([outer_loss(hyper + s) - outer_loss(hyper - s) for s in steps]) / (
        2 * _STEP
    )
