"""The way of one method under a budget: what it would return if it stopped earlier."""

import dataclasses
import math
from typing import Any

import numpy as np

from .._core._types import Hyper
from .._report import Work
from ._budget import AbstractBudget


@dataclasses.dataclass(frozen=True)
class Point:
    """The state of a method after some of its budget.

    **Attributes:**

    - `cost`: the part of the budget that is spent, in its unit.
    - `gradients`, `products`: the work so far; NaN where it is not counted.
    - `seconds`: the wall time so far, compilation left out where seconds are the budget.
    - `loss`: the outer loss that the method itself goes by.
    - `hyper`: the outer variables that it would return.
    """

    cost: float
    gradients: float
    products: float
    seconds: float
    loss: float
    hyper: Hyper


class Trace:
    """The points of a run of one method, at most `num_points` of them, evenly spaced.

    **Arguments:**

    - `budget`: the budget of the run.
    - `num_points`: how many points are kept.
    - `hyper`: where the run starts, which is the first point, at a cost of 0.

    **Attributes:**

    - `num_failed`: the steps or trials that failed.
    - `failure`: how the first of them failed, in words.
    """

    def __init__(self, budget: AbstractBudget, num_points: int, hyper: Hyper):
        self.budget = budget
        self.num_points = num_points
        self.num_failed = 0
        self.failure = ""
        start = Point(0.0, 0.0, 0.0, 0.0, math.nan, hyper)
        self._points: dict[int, Point] = {0: start}
        self._last = start

    @property
    def points(self) -> list[Point]:
        """The points, those of a smaller cost first."""
        return [self._points[place] for place in sorted(self._points)]

    @property
    def spent(self) -> float:
        """The part of the budget that is spent."""
        return self._last.cost

    @property
    def last(self) -> Point:
        """The last point."""
        return self._last

    def fits(self, cost: float) -> bool:
        """Whether so much of the budget is left."""
        # Sums of floats are rounded.
        return self._last.cost + cost <= self.budget.amount * (1 + 1e-12)

    def fail(self, text: str, count: int = 1) -> None:
        """Note that steps or trials failed.

        **Arguments:**

        - `text`: how the first of them failed.
        - `count`: their number.
        """
        self.failure = self.failure or text
        self.num_failed += count

    def add(self, work: Work | None, seconds: float, loss: float, hyper: Hyper) -> bool:
        """Add the point after some more steps, unless they exceed the budget.

        **Arguments:**

        - `work`, `seconds`: of these steps together.
        - `loss`, `hyper`: as in a point.

        **Returns:**

        Whether the point was added.
        """
        cost = self.budget.cost(work, np.asarray(seconds))
        assert cost is not None
        if not self.fits(float(cost)):
            return False
        known = work is not None
        last = self._last
        self._last = Point(
            last.cost + float(cost),
            last.gradients + (float(work.gradients) if known else math.nan),
            last.products + (float(work.products) if known else math.nan),
            last.seconds + seconds,
            loss,
            hyper,
        )
        share = self._last.cost / self.budget.amount
        # The last point at or before each of the evenly spaced amounts.
        self._points[max(1, math.ceil(share * self.num_points - 1e-9))] = self._last
        return True


def endless(name: str, budget: AbstractBudget) -> ValueError:
    """The error of a method that takes nothing of a budget.

    **Arguments:**

    - `name`: the class of the method.
    - `budget`: the budget.
    """
    return ValueError(
        f"`{name}` takes no {budget.unit}, and would never end. Give "
        "`budget=metaopt.study.GradientBudget(...)`."
    )


def too_small(budget: AbstractBudget, cost: Any, step: str) -> ValueError:
    """The error of a budget that does not pay for one step.

    **Arguments:**

    - `budget`: the budget.
    - `cost`: the cost of the step.
    - `step`: the step, in words.
    """
    return ValueError(
        f"`budget` is {budget.amount:,g} {budget.unit}, and {step} costs {cost:,.6g}. Give "
        "a larger budget, or fewer inner steps."
    )
