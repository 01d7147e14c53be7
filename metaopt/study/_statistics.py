"""Means over seeds, and differences that are beyond chance."""

import dataclasses
import math

import numpy as np
import scipy.stats


LEVEL = 0.05  # of all tests against one winner together


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    **Attributes:**

    - `mean`: the mean of the values that are finite; NaN if none is.
    - `standard_error`: its standard error; NaN for a single value.
    - `num_values`: how many values are finite.
    """

    mean: float
    standard_error: float
    num_values: int

    @classmethod
    def of(cls, values: np.ndarray) -> "Mean":
        """The mean of an array of shape `(num_seeds,)`."""
        values = values[np.isfinite(values)]
        if not values.size:
            return cls(math.nan, math.nan, 0)
        error = math.nan
        if values.size > 1:
            error = float(np.std(values, ddof=1) / np.sqrt(values.size))
        return cls(float(np.mean(values)), error, values.size)

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        if math.isnan(self.standard_error):
            return f"{self.mean:.4g}"
        if self.standard_error == 0:
            return f"{self.mean:.4g} +- 0"
        # The mean to as many places as its error.
        digits = max(0, 1 - math.floor(math.log10(self.standard_error)))
        if digits > 6 or abs(self.mean) >= 1e6:
            return f"{self.mean:.4g} +- {self.standard_error:.1e}"
        return f"{self.mean:.{digits}f} +- {self.standard_error:.{digits}f}"


def paired_p_value(a: np.ndarray, b: np.ndarray) -> float:
    """The p-value of a two-sided paired t-test.

    **Arguments:**

    - `a`, `b`: values of two methods for the same seeds; pairs with a value that is not
        finite are left out.

    **Returns:**

    The p-value: 1 where all pairs are equal; NaN for fewer than two pairs, and where all
    differ by the same amount: seeds then play no part, or are too few to show one.
    """
    both = np.isfinite(a) & np.isfinite(b)
    differences = a[both] - b[both]
    if differences.size < 2:
        return math.nan
    spread, scale = np.ptp(differences), np.max(np.abs(a[both])) + np.max(np.abs(b[both]))
    if spread <= 1e-12 * scale:
        return 1.0 if np.max(np.abs(differences)) <= 1e-12 * scale else math.nan
    return float(np.asarray(scipy.stats.ttest_1samp(differences, 0.0))[1])


def adjusted(p_values: list[float]) -> list[float]:
    """Raise p-values for their number, by the method of Holm (1979).

    **Arguments:**

    - `p_values`: of several tests; NaN is left out and stays.

    **Returns:**

    The adjusted p-values, in the same order.
    """
    known = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    order = sorted(known, key=lambda i: p_values[i])
    out, largest = list(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        out[i] = largest
    return out
