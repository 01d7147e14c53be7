"""Outer steps as windows of one long inner run."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp

from .._core._validate import check_count
from ._start import AbstractStart


class Windows(AbstractStart):
    """Let every outer step be a window of one long inner run.

    An outer step takes over params, model state, and the state of the inner optimizer:
    momenta, averages, and the count of steps, which schedules read. So the inner path is
    that of one run, during which `hyper` changes. Use it to tune while training; for what
    `hyper` is worth in a new run use [`metaopt.ColdStart`][], and where the path does not
    matter [`metaopt.WarmStart`][].

    The state at the start of a window is held constant: the derivative is that of its own
    window, and the report says so. Short windows prefer what pays off soon (Wu, Ren, Liao
    and Grosse, 2018). Each window draws its own minibatches.

    Solvers of fixed points remember nothing that the next map could use, and begin anew at
    the params reached. [`metaopt.ReversibleSGD`][] goes on with its velocities, and reads
    learning rates and momenta from the first on in each window; its steps are undone to
    a velocity of zero, so [`metaopt.ReversibleAdjoint`][] does not take it here.

    ```python
    import metaopt as mo
    import optax

    mo.NestedSolver(
        inner=mo.Descent(optax.adam(1e-3), num_steps=10),
        adjoint=mo.UnrolledAdjoint(),
        outer=optax.adam(1e-2),
        start=mo.Windows(restart_every=100),
    )
    ```

    **Arguments:**

    - `restart_every`: the number of outer steps after which a new run begins, at the
        params that were given or at new ones of the problem's `init`; `None` for never.

    **Raises:**

    `ValueError` unless `restart_every` is a positive int or `None`.
    """

    restart_every: int | None = eqx.field(default=None, static=True)
    goes_on: ClassVar[bool] = True

    def __check_init__(self):
        if self.restart_every is not None:
            check_count(self.restart_every, "restart_every")

    def begin(self, given, last, first, now):
        return given, first

    def goes_on_at(self, step):
        if self.restart_every is not None:
            step = step % self.restart_every
        return jnp.asarray(step) > 0

    @property
    def carried(self):
        text = "params and the inner optimizer, with its count of steps"
        if self.restart_every is None:
            return text
        return f"{text}; a new run every {self.restart_every} outer steps"
