"""The kind of inner problem whose loss is half a sum of squares."""

import abc
from typing import Any

import jax
import jax.numpy as jnp

from .._core._tree import split_trainable
from .._core._types import Batch, FloatScalar, Hyper, Params, PyTree
from ._call import declared
from ._prediction import AbstractPredictionProblem


class AbstractLeastSquaresProblem(AbstractPredictionProblem):
    r"""An inner problem of nonlinear least squares,
    $loss = \tfrac{1}{2} \| residual(params, hyper) \|^2$.

    It is an [`metaopt.extend.AbstractInnerProblem`][] and can stand wherever one can. With
    [`metaopt.OptimistixSolver`][] it takes the solvers of least squares of optimistix,
    such as `GaussNewton` and `LevenbergMarquardt`. The optimality is the gradient of the
    loss, with its exact Hessian unless [`metaopt.linear.GaussNewton`][] is asked for.

    ```python
    import jax.numpy as jnp
    import metaopt as mo


    class Decay(mo.extend.AbstractLeastSquaresProblem):
        def init(self, hyper, key):
            return jnp.ones(2)

        def residual(self, params, hyper, batch):
            time, value = batch
            prior = jnp.exp(hyper) * (params - 1.0)
            return params[0] * jnp.exp(-params[1] * time) - value, prior
    ```

    - `init(hyper, key)` returns the initial params.
    - `residual(params, hyper, batch)` returns any pytree with a floating-point array in
        it, of any shapes. It may declare an argument named `key`.

    With `has_state = True` it takes the model `state` as a keyword and returns
    `(residual, state)`. There is no auxiliary output.
    """

    @abc.abstractmethod
    def residual(self, *args: Any, **kwargs: Any) -> Any:
        """The residual, `residual(params, hyper, batch)`: a pytree."""

    def predict(
        self, params: Params, hyper: Hyper, batch: Batch, *, key: Any = None, **state: Any
    ) -> Any:
        """The residual; see [`metaopt.extend.AbstractPredictionProblem`][].

        **Arguments:**

        - `params`, `hyper`, `batch`, `key`, `state`: as for any model.
        """
        optional = {} if key is None else declared(self.residual, {"key": key})
        return self.residual(params, hyper, batch, **optional, **state)

    def criterion(
        self, predictions: PyTree, params: Params, hyper: Hyper, batch: Batch
    ) -> FloatScalar:
        """Half the sum of squares; see [`metaopt.extend.AbstractPredictionProblem`][].

        **Arguments:**

        - `predictions`: the residual.
        - `params`, `hyper`, `batch`: as for any criterion.
        """
        leaves = jax.tree.leaves(split_trainable(predictions)[0])
        return jnp.asarray(sum(jnp.sum(jnp.square(leaf)) for leaf in leaves)) / 2
