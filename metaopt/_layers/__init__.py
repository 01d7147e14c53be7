"""Layers for models that adapt."""

from ._batch_norm import BatchNorm as BatchNorm
from ._conv import Conv2d as Conv2d
from ._pool import MaxPool2d as MaxPool2d
