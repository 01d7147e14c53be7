"""Pictures. They need matplotlib (`pip install 'metaopt-jax[plot]'`)."""

from ._curves import curves_figure as curves_figure
from ._hyper_path import hyper_path as hyper_path
from ._response import response as response
