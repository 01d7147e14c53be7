"""Pictures. They need matplotlib (`pip install 'metaopt-jax[plot]'`)."""

from ._comparison import comparison as comparison
from ._curves import curves as curves
from ._history import history as history
from ._hyper_path import hyper_path as hyper_path
from ._response import response as response
from ._schedule import schedule as schedule
from ._spectrum import spectrum as spectrum
