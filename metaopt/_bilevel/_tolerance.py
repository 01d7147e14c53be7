"""The relative accuracy that suffices at each outer step."""

import abc

import equinox as eqx
import jax.numpy as jnp

from .._core._types import FloatScalar, IntScalar
from .._core._validate import check_tolerance


class AbstractTolerance(eqx.Module):
    """The relative accuracy that suffices at each outer step.

    An early one need not be exact: `hyper` is far from where it will end, and a rough one
    leads there as well. The linear system of an implicit derivative is solved to the
    tolerance where that is more than the linear solver's own, and a relative error of the
    inner solution up to it is accepted where it is more than the adjoint's `inner_rtol`.
    The inner solver decides by itself when to stop, because a small residual does not bound
    the distance to the solution.

    It is the residual of the linear system that is held to the tolerance; the error of
    the hypergradient can be as many times more as the system is ill-conditioned. A
    linear solver that stops early has met less of the Hessian as well: a saddle, or an
    inner solution that is off in a slow direction, can go unnoticed until later steps.
    The report names the tolerance of its step. An outer loop that is to stop on `atol`
    takes a step without tolerance before it does.

    With tolerances of a finite sum the outer loop converges to where the exact one does,
    to within what the solvers themselves leave; with a fixed tolerance, or with one that
    goes down as slowly as 1/k, the errors can add up to any distance.
    """

    @abc.abstractmethod
    def at(self, step: IntScalar) -> FloatScalar:
        """The tolerance of one outer step.

        **Arguments:**

        - `step`: the number of outer steps taken before.

        **Returns:**

        A positive scalar.
        """


class PolynomialTolerance(AbstractTolerance):
    r"""$\epsilon_k = first \cdot k^{-power}$ at the outer steps $k = 1, 2, \dots$

    Goes down quickly at first and slowly afterwards: by 30 in the first ten steps with
    the default power, and by 1000 in a hundred. The one to begin with.

    **Arguments:**

    - `first`: the relative tolerance of the first outer step.
    - `power`: how fast it goes down: more than 1.

    **Raises:**

    `ValueError` where the sum of the tolerances is infinite, which it is up to a power of
    1, the harmonic series.

    ??? cite "Source"

        Pedregosa: *Hyperparameter optimization with approximate gradient*, ICML 2016,
        theorem 2 and section 5.
    """

    first: float = eqx.field(default=0.1, static=True)
    power: float = eqx.field(default=1.5, static=True)

    def __check_init__(self):
        _check_first(self.first)
        check_tolerance(self.power, "power", optional=False)
        if self.power <= 1:
            raise ValueError(
                f"`power` must be more than 1; got {self.power!r}. The sum of "
                "`k ** -power` over all outer steps is infinite up to the harmonic "
                "series, 1, and then the errors of the hypergradients can add up to any "
                "distance from the solution."
            )

    def at(self, step):
        return jnp.asarray(self.first) * (1.0 + step) ** -self.power


class GeometricTolerance(AbstractTolerance):
    r"""$\epsilon_k = first \cdot factor^{k-1}$ at the outer steps $k = 1, 2, \dots$

    Goes down evenly, and soon below anything that a slower outer loop can use.

    **Arguments:**

    - `first`: the relative tolerance of the first outer step.
    - `factor`: of each tolerance over the one before: between 0 and 1.

    **Raises:**

    `ValueError` where the sum of the tolerances is infinite, which it is at a factor of 1.

    ??? cite "Source"

        Pedregosa: *Hyperparameter optimization with approximate gradient*, ICML 2016,
        theorem 2 and section 5.
    """

    first: float = eqx.field(default=0.1, static=True)
    factor: float = eqx.field(default=0.9, static=True)

    def __check_init__(self):
        _check_first(self.first)
        check_tolerance(self.factor, "factor", optional=False)
        if not 0 < self.factor < 1:
            raise ValueError(
                f"`factor` must lie between 0 and 1; got {self.factor!r}. With a tolerance "
                "that does not go down their sum is infinite, and the errors of the "
                "hypergradients can add up to any distance from the solution."
            )

    def at(self, step):
        return jnp.asarray(self.first) * self.factor**step


def _check_first(first: float) -> None:
    check_tolerance(first, "first", optional=False)
    if not 0 < first < 1:
        raise ValueError(
            f"`first` must lie between 0 and 1, being relative; got {first!r}."
        )
