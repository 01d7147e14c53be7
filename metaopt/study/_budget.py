"""Budgets, which whole methods are compared under."""

import abc
from typing import ClassVar, TYPE_CHECKING

import equinox as eqx
import numpy as np

from .._core._validate import check_tolerance
from .._report import Work


if TYPE_CHECKING:
    # As Equinox advises: pyright knows `ClassVar` by this name only.
    from typing import ClassVar as AbstractClassVar
else:
    from equinox import AbstractClassVar


class AbstractBudget(eqx.Module):
    """An amount of work that each method may spend on each seed.

    **Attributes:**

    - `amount`: the amount.
    - `unit`: what it is counted in.
    """

    amount: eqx.AbstractVar[float]
    unit: AbstractClassVar[str]

    def __check_init__(self):
        check_tolerance(self.amount, "amount", optional=False)
        if self.amount == 0:
            raise ValueError("`amount` must be more than 0; got 0.")

    @abc.abstractmethod
    def cost(self, work: Work | None, seconds: np.ndarray) -> np.ndarray | None:
        """The cost of some steps.

        **Arguments:**

        - `work`: their [`metaopt.extend.Work`][], or `None` where it is not known.
        - `seconds`: their wall time, an array of shape `(num_steps,)`.

        **Returns:**

        An array of the same shape; `None` where it is not known.
        """


class GradientBudget(AbstractBudget):
    """A budget counted in gradients.

    **Arguments:**

    - `amount`: the number of gradients of inner and outer loss.
    - `product_cost`: how many gradients a product with second derivatives counts for. It
        takes about 1.9 times the multiplications of a gradient.
    """

    amount: float
    product_cost: float = 2.0
    unit: ClassVar[str] = "gradients"

    def __check_init__(self):
        check_tolerance(self.product_cost, "product_cost", optional=False)

    def cost(self, work, seconds):
        if work is None:
            return None
        return work.gradients + self.product_cost * work.products


class ProductBudget(AbstractBudget):
    """A budget counted in products with second derivatives, for methods that need them.

    **Arguments:**

    - `amount`: the number of products.
    """

    amount: float
    unit: ClassVar[str] = "products"

    def cost(self, work, seconds):
        return None if work is None else work.products


class TimeBudget(AbstractBudget):
    """A budget counted in seconds of wall time, compilation left out.

    Two studies are equal only as far as the clock is. Nothing else may run beside them.

    **Arguments:**

    - `amount`: the number of seconds.
    """

    amount: float
    unit: ClassVar[str] = "seconds"

    def cost(self, work, seconds):
        return seconds
