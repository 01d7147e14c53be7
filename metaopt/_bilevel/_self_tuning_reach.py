"""The leaves of `hyper` that a self-tuning run can see."""

from .._best_response import conversion
from .._jaxpr._dependence import leaves_with_influence
from .._promises import BothLosses, check_start_seen, check_tunable


def unreached_leaves(
    at: BothLosses, drawn: bool
) -> tuple[tuple[str, ...], tuple[str, ...], list[bool]]:
    """The leaves of `hyper` that influence nothing; the parts that a learned response
    leaves out, in
    words; and for each leaf whether the inner solution depends on it. `drawn` says
    whether the problem's `init` drew the initial params.

    **Raises:**

    `ValueError` for a leaf whose derivative is zero by construction.
    """
    at.check_losses()
    names, trainable = at.names, at.trainable
    # The response learns from samples: what has no derivative acts as well. (The rate of
    # `equinox.nn.Dropout` is behind a `stop_gradient`.)
    in_inner = leaves_with_influence(at.field, trainable, despite_stop_gradient=True)
    in_outer = leaves_with_influence(at.outer, trainable)
    in_start = [False] * len(names)
    if drawn:
        in_start = leaves_with_influence(at.start, trainable)
    reason = "and a best-response network answers to what enters the inner loss"
    of_start = check_start_seen(names, in_start, in_inner, "SelfTuningSolver", reason)
    rows = zip(names, in_inner, in_outer, in_start, strict=True)
    idle = tuple(name for name, a, b, c in rows if not (a or b or c))
    check_tunable(
        names,
        idle,
        remark=" (A best-response network cannot tune learning rates and other settings of "
        "optimizers.)",
    )
    left_out = ["what the response has not learned or cannot represent"]
    left = conversion(at.params).left
    if left:
        listed = ", ".join(name for name, _ in left[:4]) + (", ..." if left[4:] else "")
        left_out.append(f"the response of {listed}")
    return idle, (*left_out, *of_start), in_inner
