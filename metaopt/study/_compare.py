"""`compare`, which runs whole methods side by side under one budget."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .._bilevel import AbstractBilevelSolver
from .._core._types import Hyper, ModelState, Params
from .._core._validate import (
    canonical_arrays,
    canonical_hyper,
    canonical_params,
    check_count,
    check_kind,
    check_not_compiled,
    DESCENT_EXAMPLE,
)
from .._core._warn import warn
from .._data import AbstractData, AbstractFoldedData, as_data
from .._problem import BilevelProblem
from .._solver import AbstractSolver
from ._budget import AbstractBudget
from ._comparison import Comparison
from ._evaluate import LOSS, Measure, Metric
from ._method import AbstractMethod, Task
from ._results_file import described, results_file, ResultsFile
from ._run_missing import run_missing
from ._trace import Trace
from ._tuned import Tuned


def compare(
    methods: Mapping[str, AbstractBilevelSolver | AbstractMethod],
    problem: BilevelProblem,
    hyper: Hyper,
    train: Any = None,
    valid: Any = None,
    test: Any = None,
    *,
    inner: AbstractSolver,
    budget: AbstractBudget,
    seeds: Iterable[int],
    metrics: Mapping[str, Callable[..., Any] | Metric] | None = None,
    split: Callable[[int], tuple[Any, Any, Any]] | None = None,
    params: Params | None = None,
    model_state: ModelState = None,
    target: tuple[str, float] | None = None,
    num_points: int = 12,
    seeds_per_call: int = 1,
    out: str | os.PathLike | None = None,
    progress: bool = True,
) -> Comparison:
    """Run whole methods side by side: the same start, data, seeds and budget for each.

    Each method tunes `hyper` on `train` and `valid` until it has spent the budget. Then a
    model is trained anew by `inner`, at the settings that the method would return after
    each part of the budget, and is measured on `test`. It starts at `params` if these are
    given, and at an initialisation that no method has seen otherwise. That costs nothing of
    the budget. The inner solver, randomness and data of it are the same for all methods,
    so that differences are paired by seeds.

    With `out` each result is written as soon as it is there, to `results.json`. A study
    that was interrupted is started again by the same call, and goes on after the last
    method and seed that it finished.

    !!! example

        ```python
        import jax.numpy as jnp
        import metaopt as mo
        import optax

        def ridge(params, hyper, batch):
            x, y = batch
            penalty = hyper["l2"].value * jnp.sum(params**2)
            return jnp.mean((x @ params - y) ** 2) + penalty

        def error(params, hyper, batch):
            x, y = batch
            return jnp.mean((x @ params - y) ** 2)

        x = jnp.eye(4)
        data = (x, jnp.arange(4.0)), (x, jnp.arange(4.0) - 0.5)
        descent = mo.Descent(optax.sgd(0.5), num_steps=20)
        table = mo.study.compare(
            {
                "implicit": mo.NestedSolver(
                    descent, mo.ImplicitAdjoint(rtol=0.5), optax.adam(0.3)
                ),
                "random search": mo.study.RandomSearch(
                    {"l2": mo.study.LogUniform(1e-4, 1e2)}
                ),
                "untuned": mo.study.Untuned(),
            },
            mo.BilevelProblem(ridge, error),
            {"l2": mo.hyper.Positive(1.0)},
            *data,
            params=jnp.zeros(4),
            inner=descent,
            budget=mo.study.GradientBudget(500),
            seeds=[0],
            progress=False,
        )
        print(table)
        ```

    **Arguments:**

    - `methods`: bilevel solvers and the methods of `metaopt.study`, by their names.
    - `problem`, `hyper`, `train`, `valid`, `params`, `model_state`: as in
        [`metaopt.solve_bilevel`][].
    - `test`: the data that is measured on, like `valid`; by default `valid` itself, which
        the methods were tuned on, and the table says so.
    - `inner`: the inner solver that searches and all measurements train with.
    - `budget`: [`metaopt.study.GradientBudget`][], [`metaopt.study.ProductBudget`][] or
        [`metaopt.study.TimeBudget`][], for each method and seed.
    - `seeds`: ints, each once.
    - `metrics`: functions of a trained model or [`metaopt.study.Metric`][]s, by their
        names. The outer loss is always measured, as `"loss"`.
    - `split`: a function of a seed that returns train, valid and test data, in place of
        these three.
    - `target`: the name of a metric and a value: the table says what each method spends
        until it is reached.
    - `num_points`: the number of parts of the budget after which is measured.
    - `seeds_per_call`: the number of seeds that a bilevel solver runs on at once, as one
        compiled program whose memory grows with them. The numbers are the same to rounding;
        an inner solver with a tolerance may stop a step sooner or later. Searches and
        other methods run on one seed after the other; so do all methods where seconds are
        the budget, or where the data of the seeds differ in their shapes.
    - `out`: a folder for `results.json`, `table.txt` and `curves.png`.
    - `progress`: whether a progress bar is shown.

    **Returns:**

    A [`metaopt.study.Comparison`][].

    **Raises:**

    `ValueError` before the first step, for arguments that do not fit: a budget below one
    step, seeds that repeat, a metric that raises, a folder that cannot be written or holds
    another study. A method that fails later on ends alone; the table says how.
    """
    named, numbers = _checked_methods(methods), _checked_seeds(seeds)
    check_kind(problem, BilevelProblem, "problem", "metaopt.BilevelProblem(...)")
    check_kind(inner, AbstractSolver, "inner", DESCENT_EXAMPLE)
    example = "metaopt.study.GradientBudget(10_000)"
    check_kind(budget, AbstractBudget, "budget", example)
    check_count(num_points, "num_points")
    check_count(seeds_per_call, "seeds_per_call")
    check_not_compiled(hyper, params)
    hyper = canonical_hyper(hyper)
    params = None if params is None else canonical_params(params)
    measured = _checked_metrics(metrics)
    if out is not None:
        _check_folder(out)
    if target is not None:
        _check_target(target, measured)
    parts = _Parts((train, valid, test), split)

    def measure(seed: int) -> Measure:
        data = parts.at(seed)
        run_key, measure_key = jax.random.split(jax.random.key(seed))
        start = params, model_state
        task = Task(problem, hyper, data[0], data[1], *start, inner, run_key)
        return Measure(task, data[2], measured, measure_key)

    first = measure(numbers[0])
    first.check()
    new_trace = lambda: Trace(budget, num_points, hyper)
    for name, method in named.items():
        _check_method(name, method, first.task, new_trace())
    shared = {
        "problem": problem,
        "hyper": hyper,
        "inner": inner,
        "budget": budget,
        "data": (first.task.train, first.task.valid, first.test),
        "params": (params, model_state),
        "metrics": measured,
        "num_points": num_points,
    }
    settings = {name: described(x, name) for name, x in shared.items()}
    of_methods = {name: described(x, f"methods[{name!r}]") for name, x in named.items()}
    higher = {LOSS: False} | {n: m.higher_is_better for n, m in measured.items()}
    rest = higher, budget.amount, budget.unit, target, parts.measured_on
    about = {
        "budget": {"amount": budget.amount, "unit": budget.unit},
        "higher_is_better": higher,
        "target": target,
        "data": parts.measured_on,
        "asked": list(named),
    }
    with results_file(out, settings, of_methods, about) as file:
        run_missing(named, numbers, seeds_per_call, measure, new_trace, file, progress)
        records = {name: {s: file.records[name][s] for s in numbers} for name in named}
        table = Comparison(records, *rest)
        if out is not None:
            _write_summary(Path(out), table, file)
    return table


class _Parts:
    """The data of each seed."""

    def __init__(self, parts: tuple[Any, Any, Any], split: Callable[[int], Any] | None):
        if split is not None and not callable(split):
            raise ValueError(f"`split` must be a function of a seed; got {split!r}.")
        if split is not None and any(part is not None for part in parts):
            raise ValueError(
                "`split` returns the data of each seed: leave `train`, `valid` and `test` "
                "out."
            )
        self.split = split
        self.is_tested = split is not None or parts[2] is not None
        # One set of arrays for all seeds.
        self.parts = [] if split is not None else self._checked(parts)

    @property
    def measured_on(self) -> str:
        """The data that metrics are of, in words."""
        return "test" if self.is_tested else "validation"

    def at(self, seed: int) -> list[AbstractData]:
        """The training, validation and test data of a seed."""
        if self.split is None:
            return self.parts
        return self._checked(_checked_split(self.split, seed))

    def _checked(self, parts: tuple[Any, Any, Any]) -> list[AbstractData]:
        parts = (*parts[:2], parts[1] if parts[2] is None else parts[2])
        named = list(zip(("train", "valid", "test"), parts))
        for name, part in named:
            if isinstance(part, AbstractFoldedData):
                raise ValueError(
                    f"`{name}` is a `metaopt.Folds`, and a study trains and measures one "
                    "model for each seed. Return another split of the data for each seed: "
                    "`compare(..., split=...)`."
                )
        return [as_data(canonical_arrays(part, name), name) for name, part in named]


def _write_summary(folder: Path, table: Comparison, file: ResultsFile) -> None:
    means = {
        method: {
            metric: vars(table.mean(method, metric)) | {"p": None}
            for metric in table.metrics
        }
        for method in table.records
    }
    for metric in table.metrics:
        for method, p in table.p_values(metric).items():
            means[method][metric]["p"] = p
    summary = {
        "means": means,
        "verdicts": [table.verdict(metric) for metric in table.metrics],
    }
    file.write(summary)
    (folder / "table.txt").write_text(f"{table}\n", encoding="utf-8")
    try:
        table.plot(folder / "curves.png")
    except ImportError as error:
        warn(f"{folder / 'curves.png'} was not written: {error}")


def _checked_methods(methods: Any) -> dict[str, AbstractMethod]:
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError(
            "`methods` must be a dictionary of methods by their names, such as "
            f'{{"implicit": metaopt.NestedSolver(...)}}; got {methods!r}.'
        )
    checked = {}
    for name, method in methods.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"The name of a method must be a text; got {name!r}.")
        if isinstance(method, type):
            raise ValueError(
                f"`methods[{name!r}]` is the class `{method.__name__}` itself. Call it: "
                f"write `{method.__name__}(...)`."
            )
        if isinstance(method, AbstractBilevelSolver):
            method = Tuned(method)
        if not isinstance(method, AbstractMethod):
            raise ValueError(
                f"`methods[{name!r}]` must be a bilevel solver or a method of "
                f"`metaopt.study`; got {method!r}. An inner solver or an adjoint is a part "
                "of one: `metaopt.NestedSolver(inner, adjoint, outer)`."
            )
        checked[name] = method
    return checked


def _checked_seeds(seeds: Any) -> list[int]:
    if isinstance(seeds, int | str) or not isinstance(seeds, Iterable):
        raise ValueError(f"`seeds` must be several ints, such as range(5); got {seeds!r}.")
    numbers = list(seeds)
    for seed in numbers:
        check_count(seed, "seeds", minimum=0)
    if not numbers:
        raise ValueError("`seeds` is empty. Give at least one, such as range(5).")
    repeated = sorted({seed for seed in numbers if numbers.count(seed) > 1})
    if repeated:
        raise ValueError(
            f"`seeds` has {repeated[0]} more than once: the same run counts once."
        )
    return [int(seed) for seed in numbers]


def _checked_metrics(metrics: Any) -> dict[str, Metric]:
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise ValueError(
            f"`metrics` must be a dictionary of functions by their names; got {metrics!r}."
        )
    checked = {}
    for name, metric in metrics.items():
        if name == LOSS:
            raise ValueError(
                f"The name {LOSS!r} is taken by the outer loss, which is always measured."
            )
        metric = metric if isinstance(metric, Metric) else Metric(metric)
        if not callable(metric.fn):
            raise ValueError(f"`metrics[{name!r}]` must be a function; got {metric.fn!r}.")
        checked[name] = metric
    return checked


def _check_folder(out: Any) -> None:
    if not isinstance(out, str | os.PathLike):
        raise ValueError(f"`out` must be the path of a folder; got {out!r}.")
    if os.path.isfile(out):
        raise ValueError(f"`out` is a file, {os.fspath(out)!r}. Name a folder.")


def _check_target(target: Any, metrics: Mapping[str, Metric]) -> None:
    names = [LOSS, *metrics]
    is_pair = isinstance(target, tuple) and len(target) == 2 and target[0] in names
    is_number = is_pair and isinstance(target[1], int | float | np.number)
    if not is_number or not np.isfinite(target[1]):
        raise ValueError(
            f"`target` must be the name of a metric ({', '.join(names)}) and a value; got "
            f"{target!r}."
        )


def _checked_split(split: Callable[[int], Any], seed: int) -> tuple[Any, Any, Any]:
    parts = split(seed)
    if not isinstance(parts, tuple) or len(parts) != 3:
        count = f" of {len(parts)}" if isinstance(parts, tuple) else ""
        raise ValueError(
            "`split(seed)` must return a tuple of three, train, valid and test data; got "
            f"{type(parts).__name__}{count}."
        )
    return parts


def _check_method(name: str, method: AbstractMethod, task: Task, trace: Trace) -> None:
    try:
        method.check(task, trace)
    except ValueError as error:
        raise ValueError(f"`methods[{name!r}]`: {error}") from error
