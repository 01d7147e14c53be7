"""Promises that every bilevel solver keeps.

A loss that depends on nothing and a derivative that is zero by construction are properties
of the traced program, and raise while it is traced. A number that is not finite is a result
code, and a step that is not taken.
"""

from ._both_losses import (
    BothLosses as BothLosses,
    check_inner_loss as check_inner_loss,
    check_outer_loss as check_outer_loss,
    check_tunable as check_tunable,
    trainable_names as trainable_names,
)
from ._direction import check_direction as check_direction
from ._finite import (
    all_finite as all_finite,
    judged as judged,
    keep_where as keep_where,
    overflowed as overflowed,
)
from ._zero import (
    check_losses_of_hyper as check_losses_of_hyper,
    check_seen as check_seen,
    check_start_seen as check_start_seen,
    no_derivative_message as no_derivative_message,
    split_unreached as split_unreached,
)
