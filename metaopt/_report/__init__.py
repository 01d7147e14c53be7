"""Reports, histories and solutions, with their printed tables."""

from ._history import History as History, is_float_array as is_float_array
from ._parts import (
    AbstractDerivativeInfo as AbstractDerivativeInfo,
    AbstractInfo as AbstractInfo,
    InnerInfo as InnerInfo,
    OuterInfo as OuterInfo,
)
from ._raise import (
    attach_solution as attach_solution,
    ends_run as ends_run,
    raise_on_failure as raise_on_failure,
)
from ._report import Report as Report
from ._solution import (
    Best as Best,
    BilevelSolution as BilevelSolution,
    INTERRUPT as INTERRUPT,
    Solution as Solution,
)
from ._table import (
    error_text as error_text,
    flat_text as flat_text,
    is_infinite as is_infinite,
    is_positive as is_positive,
    number as number,
    table as table,
    verdict as verdict,
    yes_or_no as yes_or_no,
)
from ._work import (
    Columns as Columns,
    CountsWork as CountsWork,
    inner_steps as inner_steps,
    Work as Work,
)
