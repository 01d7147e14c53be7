"""The command line: `python -m metaopt`."""

from ._main import main as main
