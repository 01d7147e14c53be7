"""Bilevel and meta-optimisation with hypergradients that can be trusted."""

from . import (
    accuracy as accuracy,
    callbacks as callbacks,
    datasets as datasets,
    diagnostics as diagnostics,
    extend as extend,
    few_shot as few_shot,
    hyper as hyper,
    linear as linear,
    memory as memory,
    nn as nn,
    plot as plot,
    study as study,
)
from ._adjoint import (
    FirstOrderAdjoint as FirstOrderAdjoint,
    ForwardAdjoint as ForwardAdjoint,
    ImplicitAdjoint as ImplicitAdjoint,
    OneStepAdjoint as OneStepAdjoint,
    ReversibleAdjoint as ReversibleAdjoint,
    TruncatedAdjoint as TruncatedAdjoint,
    UnrolledAdjoint as UnrolledAdjoint,
)
from ._bilevel import (
    ColdStart as ColdStart,
    DeltaSTN as DeltaSTN,
    GeometricTolerance as GeometricTolerance,
    NestedSolver as NestedSolver,
    PolynomialTolerance as PolynomialTolerance,
    SelfTuningSolver as SelfTuningSolver,
    step_back as step_back,
    STN as STN,
    WarmStart as WarmStart,
    Windows as Windows,
)
from ._core._checkpoint import (
    CheckpointError as CheckpointError,
    load as load,
    save as save,
)
from ._core._results import (
    RESULTS as RESULTS,
    SolveError as SolveError,
)
from ._core._self_test import warn_if_known_bad as _warn_if_known_bad
from ._core._version import __version__ as __version__
from ._data import (
    BatchSequence as BatchSequence,
    Folds as Folds,
    FullBatch as FullBatch,
    InnerBatches as InnerBatches,
    Minibatches as Minibatches,
)
from ._hypergradient import (
    hypergradient as hypergradient,
)
from ._linear import (
    CG as CG,
    Dense as Dense,
    GMRES as GMRES,
    Neumann as Neumann,
)
from ._problem import (
    BilevelProblem as BilevelProblem,
    FixedPointProblem as FixedPointProblem,
    GameProblem as GameProblem,
    InChunks as InChunks,
    InnerProblem as InnerProblem,
    LeastSquaresProblem as LeastSquaresProblem,
    PredictionProblem as PredictionProblem,
    RootProblem as RootProblem,
)
from ._report import (
    BilevelSolution as BilevelSolution,
    History as History,
    Report as Report,
    Solution as Solution,
)
from ._solve_bilevel import (
    solve_bilevel as solve_bilevel,
)
from ._solve_inner import (
    solve_inner as solve_inner,
)
from ._solver import (
    Anderson as Anderson,
    Broyden as Broyden,
    Descent as Descent,
    JaxoptSolver as JaxoptSolver,
    NewtonKrylov as NewtonKrylov,
    OptimistixSolver as OptimistixSolver,
    Picard as Picard,
    ReversiblePicard as ReversiblePicard,
    ReversibleSGD as ReversibleSGD,
    Solved as Solved,
)
from .diagnostics._check import check_hypergradient as check_hypergradient
from .diagnostics._compare import compare_hypergradients as compare_hypergradients


_warn_if_known_bad()


def __dir__() -> list[str]:
    """The public names."""
    return sorted(name for name in globals() if not name.startswith("_"))
