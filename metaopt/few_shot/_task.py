"""Tasks of few-shot learners, and the variables that they learn."""

from typing import Any

import equinox as eqx

from .._core._types import Batch, Params


class Task(eqx.Module):
    """One task, or with a leading axis on every array, a batch of tasks.

    **Attributes:**

    - `support`: what the model adapts to, any pytree of arrays with a leading axis of
        examples.
    - `query`: what the adapted model is judged by, likewise.
    """

    support: Batch
    query: Batch


class Learned(eqx.Module):
    """A model, and settings of its adaptation that are learned with it.

    **Attributes:**

    - `model`: the model before adaptation.
    - `settings`: any pytree of arrays, such as learning rates. The inner solver is built
        from them: `metaopt.Descent(lambda learned: optax.sgd(learned.settings), 5)`.
    """

    model: Params
    settings: Any


def model_of(meta: Any) -> Params:
    """The model inside `meta`, which may be all of it."""
    return meta.model if isinstance(meta, Learned) else meta
