"""Sequences divided by position."""

from collections.abc import Sequence

import numpy as np


def part_bounds(
    fractions: Sequence[float], length: int, units: str, name: str
) -> list[tuple[int, int]]:
    """Find where each part of a sequence begins and ends.

    **Arguments:**

    - `fractions`: how much of the sequence each part gets, in order.
    - `length`: that of the whole.
    - `units`: what the sequence consists of, for messages.
    - `name`: what it is called there.

    **Raises:**

    `ValueError` where the fractions are no such numbers, or leave a part empty.
    """
    if not isinstance(fractions, Sequence | np.ndarray) or len(fractions) == 0:
        raise ValueError(
            "`fractions` must be a sequence with one number for each part, for example "
            f"(0.9, 0.05, 0.05), got {fractions!r}."
        )
    sums = np.cumsum(np.asarray(fractions, np.float64))
    # Written so that NaN fails; decimal fractions do not add up to exactly 1.
    if not (np.all(np.asarray(fractions) > 0) and sums[-1] <= 1 + 1e-9):
        raise ValueError(
            f"`fractions` must be positive and sum to at most 1, got {fractions!r}."
        )
    ends = [0, *(int(end) for end in np.rint(sums * length))]
    bounds = list(zip(ends, ends[1:]))
    if any(begin >= end for begin, end in bounds):
        raise ValueError(
            f"`fractions` leave a part of the {length} {units} of {name} empty, got "
            f"{fractions!r}."
        )
    return bounds
