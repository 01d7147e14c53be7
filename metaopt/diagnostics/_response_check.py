"""The result of checking a learned best response."""

import equinox as eqx
import numpy as np

from .._report import table


class ResponseCheck(eqx.Module):
    """A learned best response beside the implicit one. `print` it.

    Each row is the derivative of the params along one direction in `hyper`.

    **Attributes:**

    - `names`: what each direction is called.
    - `learned_norm`, `implicit_norm`: how far the params move, `(num_directions,)`.
    - `cosine`: the cosine between the two ways, `(num_directions,)`.
    - `relative_error`: the length of their difference over that of the implicit one,
        `(num_directions,)`.
    - `jacobian_error`: the same for all directions together, in the Frobenius norm.
    - `jacobian_cosine`: the cosine between the two Jacobians.
    - `learned_slope`, `implicit_slope`: how the outer loss changes with the params along
        each direction, `(num_directions,)`: the hypergradient, without what `hyper` does
        to the outer loss directly.
    - `slope_cosine`: the cosine between these two.
    - `slope_error`: the uncertainty of `implicit_slope`: its standard error over the draws
        of what is random, and the difference between two ways to compute it, which is what
        the linear solver left; `(num_directions,)`.
    - `linear_residual`: the relative residuals of the linear systems behind the implicit
        response, `(num_directions,)`. It is no better than these.
    - `agree`: whether each hypergradient is a descent direction of the other by a margin
        (a cosine of 0.25), or the Jacobians differ by a fifth at most.
    - `certain`: whether that can be told: `slope_error` is at most a quarter as long as
        `implicit_slope`.
    """

    names: tuple[str, ...] = eqx.field(static=True)
    learned_norm: np.ndarray
    implicit_norm: np.ndarray
    cosine: np.ndarray
    relative_error: np.ndarray
    jacobian_error: float
    jacobian_cosine: float
    learned_slope: np.ndarray
    implicit_slope: np.ndarray
    slope_cosine: float
    slope_error: np.ndarray
    linear_residual: np.ndarray
    agree: bool
    certain: bool

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        head = (
            *("", "learned", "implicit", "error", "cosine"),
            *("slope", "implicit", "+-", "resid."),
        )
        columns = (
            self.learned_norm,
            self.implicit_norm,
            self.relative_error,
            self.cosine,
            self.learned_slope,
            self.implicit_slope,
            self.slope_error,
            self.linear_residual,
        )
        rows: list[tuple[str, ...]] = [head]
        for i, name in enumerate(self.names):
            rows.append((name, *(f"{float(column[i]):.2g}" for column in columns)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        aligned = [
            (
                row[0].ljust(widths[0]),
                "  ".join(a.rjust(b) for a, b in zip(row[1:], widths[1:])),
            )
            for row in rows
        ]
        aligned.append(("Jacobian error", f"{self.jacobian_error:.3g}"))
        aligned.append(("Jacobian cosine", f"{self.jacobian_cosine:.3g}"))
        aligned.append(("slopes' cosine", f"{self.slope_cosine:.3g}"))
        text = _UNCERTAIN
        if self.certain:
            text = "They lead the same way." if self.agree else _DISAGREE
        if not np.all(self.linear_residual <= 0.1):
            text += (
                " The implicit one leaves more than a tenth of some of its systems "
                "(`resid.`): flat directions, damping, or too few steps."
            )
        return table("Learned best response against the implicit one", aligned, text)


_UNCERTAIN = (
    "Whether they lead the same way is uncertain: the slopes of the implicit one are known "
    "to `+-` only. Average over more draws of what is random in the "
    "training loss (`num_draws`), or solve its systems further (`resid.`)."
)
_DISAGREE = (
    "They do NOT lead the same way. Train longer at the final `hyper` (more `train_steps`, "
    "a faster optimizer for the response), give the response weights of its own "
    "(`tied=False`), or use a smaller perturbation. The implicit response can be the one "
    "at fault: it takes the params to be a minimum of the training loss."
)
