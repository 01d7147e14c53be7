"""Pictures. They need matplotlib (`pip install 'metaopt-jax[plot]'`)."""

from ._hyper_path import hyper_path as hyper_path
from ._response import response as response
