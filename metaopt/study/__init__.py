"""Whole methods side by side, fairly: budgets, searches, controls, tables."""

from ._budget import (
    AbstractBudget as AbstractBudget,
    GradientBudget as GradientBudget,
    ProductBudget as ProductBudget,
    TimeBudget as TimeBudget,
)
from ._compare import compare as compare
from ._comparison import Comparison as Comparison, Record as Record
from ._evaluate import Metric as Metric
from ._hybrid import Hybrid as Hybrid
from ._method import (
    AbstractMethod as AbstractMethod,
    RunsSeeds as RunsSeeds,
    Task as Task,
)
from ._multi_start import MultiStart as MultiStart
from ._optuna import OptunaSearch as OptunaSearch
from ._results_file import read_comparison as read_comparison
from ._search import (
    AbstractSearch as AbstractSearch,
    AbstractSession as AbstractSession,
    GridSearch as GridSearch,
    RandomSearch as RandomSearch,
    Trial as Trial,
)
from ._space import (
    AbstractRange as AbstractRange,
    LogUniform as LogUniform,
    Shares as Shares,
    Uniform as Uniform,
    Whole as Whole,
)
from ._statistics import Mean as Mean
from ._successive_halving import SuccessiveHalving as SuccessiveHalving
from ._trace import Point as Point, Trace as Trace
from ._tuned import Tuned as Tuned
from ._untuned import Untuned as Untuned
