"""Callbacks, which are called between the compiled calls of a run."""

from ._base import AbstractCallback as AbstractCallback
from ._checkpoint import Checkpoint as Checkpoint
from ._checkpoint_file import CheckpointFile as CheckpointFile
from ._keep_best import KeepBest as KeepBest
from ._log import Log as Log
from ._progress import Progress as Progress
from ._roll_back import RollBack as RollBack
from ._stop_early import StopEarly as StopEarly
from ._writers import CSV as CSV, JSONLines as JSONLines
