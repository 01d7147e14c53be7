"""The kinds of inner problem. Each states its field."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx

from .._core._tree import split_trainable
from ._base import AbstractProblem, Evaluation
from ._call import call, check_like, check_scalar


class AbstractInnerProblem(AbstractProblem):
    r"""An inner problem that minimises a loss: $\min_{params} loss(params, hyper)$.

    Subclass it and write two methods:

    ```python
    import jax.numpy as jnp
    import metaopt as mo


    class Ridge(mo.extend.AbstractInnerProblem):
        def init(self, hyper, key):
            return jnp.zeros(8)

        def loss(self, params, hyper, batch):
            x, y = batch
            return jnp.mean((x @ params - y) ** 2) + jnp.exp(hyper) * params @ params
    ```

    - `init(hyper, key)` returns the initial params: any pytree, such as an
        `equinox.nn.MLP`. Its floating-point arrays are trained; all else is left alone.
    - `loss(params, hyper, batch)` returns a floating-point scalar. If it declares an
        argument named `key` it is given a fresh random key at each step.

    Two class attributes say what the loss takes and returns besides:

    - `has_aux = True`: it returns `(value, aux)`.
    - `has_state = True`: `init` returns `(params, state)`, the loss takes `state` as a
        keyword and returns `(value, state)`, or `(value, state, aux)` with both.

    Arrays may be fields of the problem or closed over; derivatives with respect to
    them are right in every adjoint.
    """

    has_loss = True
    field_name = "the gradient of the inner loss"

    @abc.abstractmethod
    def loss(self, *args: Any, **kwargs: Any) -> Any:
        """The inner loss, `loss(params, hyper, batch)`: a floating-point scalar."""

    def evaluate(self, params, hyper, batch, key, state):
        out = call(self, self.loss, "loss", params, hyper, batch, key, state)
        check_scalar(out.value, "the inner loss")
        return out

    def field(self, params, hyper, batch, key, state):
        trainable, rest = split_trainable(params)

        def loss(trainable):
            full = eqx.combine(trainable, rest)
            out = self.evaluate(full, hyper, batch, key, state)
            return out.value, out

        (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(trainable)
        return gradient, out

    @property
    def tags(self):
        # The Hessian of a loss is symmetric, and positive semidefinite at a minimum.
        # The second is a promise that a linear solver checks as it goes.
        return frozenset({lx.symmetric_tag, lx.positive_semidefinite_tag})


class AbstractFixedPointProblem(AbstractProblem):
    """An inner problem that seeks a fixed point: `params = step(params, hyper, batch)`.

    Subclass it and write `init(hyper, key)` and `step(params, hyper, batch)`, which
    returns a pytree with the structure, shapes and dtypes of `params`. `key`, `has_aux`
    and `has_state` are as in [`metaopt.extend.AbstractInnerProblem`][].
    """

    field_name = "the step of the fixed-point problem"

    @abc.abstractmethod
    def step(self, *args: Any, **kwargs: Any) -> Any:
        """The map whose fixed point is sought, `step(params, hyper, batch)`."""

    def evaluate(self, params, hyper, batch, key, state):
        out = call(self, self.step, "step", params, hyper, batch, key, state)
        check_like(out.value, params, "the step of the fixed-point problem")
        return out

    def field(self, params, hyper, batch, key, state):
        out = self.evaluate(params, hyper, batch, key, state)
        new, old = split_trainable(out.value)[0], split_trainable(params)[0]
        # In this order the Jacobian is the identity minus that of the step, so that the
        # Neumann series of a contraction converges.
        vector = jax.tree.map(jnp.subtract, old, new)
        return vector, Evaluation(None, out.state, out.aux)

    @property
    def tags(self):
        return frozenset()


class AbstractRootProblem(AbstractProblem):
    """An inner problem that seeks a root: `residual(params, hyper, batch) = 0`.

    Subclass it and write `init(hyper, key)` and `residual(params, hyper, batch)`, which
    returns a pytree with the structure, shapes and dtypes of `params`. `key`, `has_aux`
    and `has_state` are as in [`metaopt.extend.AbstractInnerProblem`][].
    """

    field_name = "the residual"

    @abc.abstractmethod
    def residual(self, *args: Any, **kwargs: Any) -> Any:
        """The function whose root is sought, `residual(params, hyper, batch)`."""

    def evaluate(self, params, hyper, batch, key, state):
        out = call(self, self.residual, "residual", params, hyper, batch, key, state)
        check_like(out.value, params, "the residual of the root problem")
        return out

    def field(self, params, hyper, batch, key, state):
        out = self.evaluate(params, hyper, batch, key, state)
        return split_trainable(out.value)[0], Evaluation(None, out.state, out.aux)

    @property
    def tags(self):
        return frozenset()
