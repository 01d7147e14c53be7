"""Leaves of `hyper` whose derivative is zero by construction."""

from collections.abc import Callable, Sequence

import equinox as eqx

from ._dependence import leaves_with_influence
from ._tree import leaf_names, split_trainable
from ._types import Hyper, PyTree


def split_unreached(
    reached: Sequence[bool], primal: Callable[[Hyper], PyTree], hyper: Hyper
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Names of leaves that are zero by construction, of those without influence, and of
    those whose only influence is held constant by a `stop_gradient` of the user.

    **Arguments:**

    - `reached`: for each trainable leaf, whether the derivative can see it.
    - `primal`: what is differentiated; arrays out.
    - `hyper`: the outer variables.
    """
    names = leaf_names(split_trainable(hyper)[0], "hyper")
    if all(reached):
        return (), (), ()
    trainable, static = split_trainable(hyper)
    of_trainable = lambda trainable: primal(eqx.combine(trainable, static))
    matters = leaves_with_influence(of_trainable, trainable)
    acts = leaves_with_influence(of_trainable, trainable, despite_stop_gradient=True)
    rows = list(zip(names, reached, matters, acts, strict=True))
    zero = tuple(f"`{n}`" for n, seen, matters, _ in rows if matters and not seen)
    idle = tuple(n for n, seen, matters, acts in rows if not (acts or matters or seen))
    held = tuple(n for n, seen, matters, acts in rows if acts and not (matters or seen))
    return zero, idle, held


def held_message(names: Sequence[str]) -> str:
    """The text of the error where every leaf of `hyper` is held constant."""
    return (
        f"`{'`, `'.join(names)}` acts on the losses only behind `jax.lax.stop_gradient`, "
        "as the rate of `equinox.nn.Dropout` does: it has influence and no derivative, "
        "so there is nothing that a hypergradient could tune. Use "
        "`metaopt.SelfTuningSolver`, which tunes such leaves from samples, or take the "
        "`stop_gradient` away."
    )
