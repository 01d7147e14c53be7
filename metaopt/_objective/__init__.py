"""The outer objective: from hyper by the start and the inner solve to the outer loss."""

from ._loop_error import loops_explained as loops_explained
from ._objective import (
    check_sources as check_sources,
    Continued as Continued,
    Objective as Objective,
)
