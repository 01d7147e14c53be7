"""The outer loop."""

from ._driver import drive as drive, Run as Run
from ._feed import Feed as Feed
from ._static import Static as Static
