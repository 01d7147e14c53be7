"""Few-shot learning: MAML and its family."""

from ._episodes import Episodes as Episodes, HostEpisodes as HostEpisodes
from ._evaluate import evaluate as evaluate, Scores as Scores
from ._learner import AbstractLearner as AbstractLearner
from ._maml import MAML as MAML
from ._reptile import Reptile as Reptile
from ._settings import (
    learned_curvature as learned_curvature,
    learned_rates as learned_rates,
    with_learned_curvature as with_learned_curvature,
    with_learned_rates as with_learned_rates,
)
from ._solution import (
    TrainSolution as TrainSolution,
    TrainState as TrainState,
)
from ._stats import TaskStats as TaskStats
from ._task import Learned as Learned, Task as Task
from ._train import train as train
