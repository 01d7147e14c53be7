"""The outer loop."""

from ._body import AbstractBody as AbstractBody, StepRecord as StepRecord
from ._driver import drive as drive, Run as Run
from ._feed import data_feed as data_feed, Fixed as Fixed, Pulled as Pulled
from ._function import as_callbacks as as_callbacks
