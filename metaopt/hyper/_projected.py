"""Outer steps that end in a set."""

from collections.abc import Callable

import jax
import numpy as np
import optax

from .._core._types import Hyper
from .._core._validate import check_kind


def projected(
    outer: optax.GradientTransformation, projection: Callable[[Hyper], Hyper]
) -> optax.GradientTransformation:
    """Project `hyper` back into a set after each outer step.

    For plain arrays whose range has corners that should be reached: weights of exactly
    zero, for example. A [`metaopt.hyper.Simplex`][] or [`metaopt.hyper.Interval`][] reaches
    them in the limit only, and needs no projection.

    !!! example

        ```python
        import metaopt as mo
        import optax

        outer = mo.hyper.projected(
            optax.sgd(0.1),
            lambda hyper: {"mix": optax.projections.projection_simplex(hyper["mix"])},
        )
        ```

    **Arguments:**

    - `outer`: the optax transform of the outer step.
    - `projection`: a function of the stepped `hyper` that returns one of the same
        structure, shapes and dtypes; leaves that are not tuned are `None` in it.
        `optax.projections` has many.

    **Returns:**

    An optax transform, whose update leads to the projection. Adding it to `hyper` rounds
    once more, to within an ulp of the length of the step.

    **Raises:**

    `ValueError` for another kind of `outer`, and where the projection changes the
    structure or a shape.
    """
    check_kind(outer, optax.GradientTransformation, "outer", "optax.sgd(0.1)")
    inner = optax.with_extra_args_support(outer)

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("`metaopt.hyper.projected` needs the params of the step.")
        updates, state = inner.update(updates, state, params, **extra)
        stepped = optax.apply_updates(params, updates)
        ended = projection(stepped)
        if jax.tree.structure(ended) != jax.tree.structure(stepped):
            raise ValueError(
                "`projection` must return a pytree of the structure of `hyper`: "
                f"{jax.tree.structure(stepped)}; got {jax.tree.structure(ended)}."
            )
        shapes = lambda tree: [np.shape(leaf) for leaf in jax.tree.leaves(tree)]
        if shapes(ended) != shapes(stepped):
            raise ValueError(
                "`projection` must return arrays of the shapes of `hyper`: "
                f"{shapes(stepped)}; got {shapes(ended)}."
            )
        return jax.tree.map(lambda new, old: new - old, ended, params), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
