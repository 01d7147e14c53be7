"""The interface of preconditioners."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx

from ..._core._tree import (
    tree_all_finite,
    tree_rooms,
    tree_sharded_like,
    tree_structs,
    tree_where,
)
from ..._core._types import IntScalar, Key, Vector


class AbstractPreconditioner(eqx.Module):
    r"""An approximate inverse of a symmetric positive definite operator.

    It changes how many products a solve takes, and never what the answer is checked
    against. Its state is its knowledge of the operator, which an adjoint carries from one
    outer step to the next. Inside a plain `jax.grad` nothing is carried, and it is made
    anew.
    """

    @abc.abstractmethod
    def init(self, vector: Vector) -> Any:
        """The state before anything is known.

        **Arguments:**

        - `vector`: arrays with the structure that the operator applies to.

        **Returns:**

        A pytree of arrays, of the shapes and dtypes that `update` returns.
        """

    @abc.abstractmethod
    def update(
        self,
        operator: lx.AbstractLinearOperator,
        state: Any,
        key: Key,
        solver_state: Any,
    ) -> tuple[Any, IntScalar]:
        """The state for a new operator.

        **Arguments:**

        - `operator`: what will be solved with.
        - `state`: what `init` or the last `update` returned.
        - `key`: for everything random.
        - `solver_state`: the state of the inner solver at the solution, or `None`.

        **Returns:**

        The new state, without derivative, and the number of products that it took.
        """

    @abc.abstractmethod
    def apply(self, state: Any, vector: Vector) -> Vector:
        """The approximate inverse times a vector: linear in the vector, symmetric and
        positive definite.

        **Arguments:**

        - `state`: what `update` returned.
        - `vector`: the vector.

        **Returns:**

        A vector with the same structure, shapes and dtypes.
        """


class Refreshed(eqx.Module):
    """Knowledge of an operator, and the number of solves that it has served.

    **Attributes:**

    - `known`: a pytree of arrays.
    - `age`: the number of solves since it was made; 0 if it is to be made anew.
    """

    known: Any
    age: IntScalar

    def updated(
        self, make: Callable[[], Any], every: int, num_products: int
    ) -> tuple["Refreshed", IntScalar]:
        """The knowledge for this solve: `make()` if it is time, and the old one otherwise.

        Knowledge that is not finite is replaced by zeros, and made anew the next time.

        **Arguments:**

        - `make`: returns a pytree like `known`.
        - `every`: how many solves one is used for.
        - `num_products`: what it takes to make one.

        **Returns:**

        The new knowledge, and the number of products that it took.
        """
        if every == 1:
            fresh, known = jnp.asarray(True), make()
        else:
            fresh = self.age == 0
            known = jax.lax.cond(fresh, make, lambda: self.known)
        finite = tree_all_finite(known)
        nothing = jax.tree.map(jnp.zeros_like, known)
        age = jnp.where(finite, (self.age + 1) % every, 0)
        taken = jnp.where(fresh, num_products, 0).astype(jnp.int32)
        known = tree_where(finite, known, nothing)
        return Refreshed(known, age.astype(self.age.dtype)), taken


def products(operator: lx.AbstractLinearOperator, vectors: Vector) -> Vector:
    """The products with several vectors, stacked, at once; without derivative."""
    out = jax.vmap(operator.mv)(vectors)
    return jax.tree.map(lambda a, b: jax.lax.stop_gradient(a).astype(b.dtype), out, vectors)


def drawn(draw: Callable[..., jax.Array], key: Key, structure: Any, count: int) -> Vector:
    """`count` random vectors, stacked; `draw(key, shape, dtype)` draws one leaf."""
    leaves, tree = jax.tree.flatten(structure)
    keys = jax.random.split(key, max(len(leaves), 1))
    leaves = [draw(k, (count, *a.shape), a.dtype) for k, a in zip(keys, leaves)]
    vectors = jax.tree.unflatten(tree, leaves)
    return tree_sharded_like(vectors, tree_structs(tree_rooms(structure, count)))
