"""Searches by the samplers of Optuna."""

import dataclasses
import importlib
import inspect
import itertools
import os
import warnings
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._core._files import check_writable
from .._core._types import Hyper, PyTree
from .._core._validate import check_count
from .._report import Work
from ._method import least_steps, Task
from ._pieces import check_pieces, train_on
from ._results_file import digest
from ._search import AbstractSearch, AbstractSession, numpy_seed, Trial
from ._space import is_hyper, LogUniform, Shares, Slot, Space, Uniform, Whole
from ._trials import trial_losses


def _optuna() -> Any:
    """The library, which is not always installed."""
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise ImportError(
            "`metaopt.study.OptunaSearch` needs Optuna: `pip install "
            "'metaopt-jax[optuna]'`."
        ) from error


_NEEDS = {"CmaEsSampler": ("cmaes",), "GPSampler": ("torch",)}


def _seeded_samplers() -> dict[str, Any]:
    """The samplers that need nothing but a seed, by their names."""
    found = {}
    for name, sampler in vars(_optuna().samplers).items():
        if inspect.isclass(sampler) and not inspect.isabstract(sampler):
            given = inspect.signature(sampler).parameters.values()
            needed = [p.name for p in given if p.default is p.empty and p.name != "seed"]
            if "seed" in [p.name for p in given] and not needed:
                found[name] = sampler
    return found


class OptunaSearch(AbstractSearch):
    """Search by a sampler of Optuna: by default its tree-structured Parzen estimator.

    Samplers, pruners, storage and dashboard are those of Optuna. Each number that is drawn
    is a parameter of its own, such as `hyper['l2']` or `hyper['rates'][3]`. The first trial
    is `hyper` as it is given only where that lies in the ranges.

    Several processes that name the same `journal` share one study: each runs trials until
    those of all processes together have spent the budget. A process that was killed is
    started again and goes on. The trial that it was at is lost. Trials of another problem,
    data, space, sampler or seed in the file are left alone.

    **Arguments:**

    - `space`: the ranges, as for [`metaopt.study.RandomSearch`][].
    - `sampler`: the name of a sampler in `optuna.samplers`, such as `"TPESampler"`,
        `"RandomSampler"` or, with the package `cmaes` installed, `"CmaEsSampler"`. It is
        given a seed of its own for each seed of a study.
    - `journal`: the file that the trials are kept in; by default they are kept in memory.
    - `batch_size`: how many trials are tried together.
    - `pruner`: the name of a pruner in `optuna.pruners`, such as `"MedianPruner"` or
        `"HyperbandPruner"`, which sees the outer loss within each trial, and may stop it.
        The work of a stopped trial counts, its loss does not. The inner solver must be able
        to go on from its own state, and trials are tried one by one.
    - `num_reports`: the number of losses within a trial that the pruner sees.

    **Raises:**

    `ImportError` where Optuna is not installed; `ValueError` for a sampler or pruner
    that it does not have.
    """

    space: PyTree = None
    sampler: str = eqx.field(default="TPESampler", static=True)
    journal: str | None = eqx.field(default=None, static=True)
    batch_size: int = eqx.field(default=1, static=True)
    pruner: str | None = eqx.field(default=None, static=True)
    num_reports: int = eqx.field(default=5, static=True)

    def __init__(
        self,
        space: PyTree = None,
        *,
        sampler: str = "TPESampler",
        journal: str | os.PathLike | None = None,
        batch_size: int = 1,
        pruner: str | None = None,
        num_reports: int = 5,
    ):
        check_count(batch_size, "batch_size")
        check_count(num_reports, "num_reports", minimum=2)
        _check_pruner(pruner, batch_size)
        samplers = _seeded_samplers()
        if sampler not in samplers:
            names = ", ".join(sorted(samplers))
            raise ValueError(f"`sampler` must be one of {names}; got {sampler!r}.")
        try:
            samplers[sampler](seed=0)
            for package in _NEEDS.get(sampler, ()):
                importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"The sampler {sampler!r} of Optuna needs another package: {error}. "
                f"`pip install {' '.join(_NEEDS.get(sampler, ()))}`, or take "
                "`sampler='TPESampler'`."
            ) from error
        self.space = space
        self.sampler = sampler
        self.journal = None if journal is None else os.fspath(journal)
        self.batch_size = batch_size
        self.pruner = pruner
        self.num_reports = num_reports

    def session(self, task, trial=None):
        return _OptunaSession(self, task, trial)


class _OptunaSession(AbstractSession):
    def __init__(self, search: OptunaSearch, task: Task, trial: Any):
        optuna = _optuna()
        self.pruner, self.num_reports = search.pruner, search.num_reports
        if self.pruner is not None and trial is not None:
            raise ValueError(
                "Trials that are more than an inner solve are not pruned. Leave `pruner` "
                "out under `metaopt.study.Hybrid`."
            )
        if self.pruner is not None:
            check_pieces(task, "A search with a pruner", "leave `pruner` out")
            if least_steps(task.inner) < self.num_reports:
                raise ValueError(
                    f"`num_reports` is {self.num_reports}, and the inner solver takes only "
                    f"{least_steps(task.inner)} steps. Give fewer reports."
                )
        self.space = Space(search.space, task.hyper)
        self.keeps_reached = trial is not None
        if self.keeps_reached and search.journal is not None:
            _check_reached(task.hyper)
        seed = numpy_seed(task)
        own = np.random.default_rng([*seed, os.getpid() if search.journal else 0])
        make = vars(optuna.samplers)[search.sampler]
        storage = name = None
        if search.journal is not None:
            check_writable(Path(search.journal), "journal")
            journal = optuna.storages.journal
            lock = journal.JournalFileOpenLock(search.journal)
            backend = journal.JournalFileBackend(search.journal, lock_obj=lock)
            storage = optuna.storages.JournalStorage(backend)
            # A loss of another problem or another kind of trial is no loss of this one.
            kind = (trial, "with what it has reached") if self.keeps_reached else None
            kind = kind if self.pruner is None else (self.pruner, self.num_reports)
            same = dataclasses.replace(task, key=None), search.space, search.sampler, kind
            name = "-".join([*map(str, seed), digest(same)])
        before = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(
            sampler=make(seed=int(own.integers(2**31))),
            pruner=vars(optuna.pruners)[self.pruner or "NopPruner"](),
            storage=storage,
            study_name=name,
            load_if_exists=True,
        )
        optuna.logging.set_verbosity(before)
        self.states = optuna.trial.TrialState
        self.known: set[int] = set()  # trials that this process has taken into account
        params: dict[str, float] = {}
        for slot, leaf in self.space.pairs:
            values = _given(slot, leaf)
            if values is None:
                break
            for index in np.ndindex(values.shape):
                params[_parameter(slot.name, index)] = float(values[index])
        else:
            self.study.enqueue_trial(params, skip_if_exists=True)

    def ask(self, count):
        pairs = []
        for _ in range(count):
            trial = self.study.ask()
            self.known.add(trial.number)
            draws = {slot.name: _drawn(trial, slot) for slot in self.space.drawn}
            pairs.append((trial, self.space.at(draws)))
        return pairs

    def news(self):
        states = self.states.COMPLETE, self.states.FAIL, self.states.PRUNED
        found = []
        for trial in self.study.get_trials(deepcopy=False, states=states):
            if trial.number in self.known or _GRADIENTS not in trial.user_attrs:
                continue
            self.known.add(trial.number)
            fixed = _optuna().trial.FixedTrial(trial.params)
            draws = {slot.name: _drawn(fixed, slot) for slot in self.space.drawn}
            counts = (trial.user_attrs[name] for name in (_GRADIENTS, _PRODUCTS))
            work = Work(*(np.asarray(float(count)) for count in counts))
            loss = np.inf if trial.state == self.states.FAIL else trial.value
            # That of a trial that was stopped is of an earlier step.
            loss = np.nan if trial.state == self.states.PRUNED else loss
            seconds = trial.duration.total_seconds() if trial.duration else 0.0
            hyper = self.space.at(draws)
            if self.keeps_reached:
                hyper = _replaced(hyper, trial.user_attrs[_REACHED])
            failure = trial.user_attrs.get(_FAILURE, "")
            found.append(Trial(hyper, loss, work, seconds, failure))
        return found

    def solve(self, task, tokens, hypers, numbers):
        if self.pruner is None:
            return trial_losses(task, hypers, numbers)
        [token], [number] = tokens, numbers
        key = jax.random.fold_in(task.key, number)
        ends = np.linspace(0, least_steps(task.inner), self.num_reports + 1).astype(int)
        loss, states = np.inf, None
        for piece, (begin, end) in enumerate(itertools.pairwise(ends.tolist())):
            piece_key = jax.random.fold_in(key, piece)
            losses, states = train_on(task, end - begin, hypers, states, key, piece_key)
            loss = losses[0]
            if token is not None and np.isfinite(loss):
                token.report(float(loss), end)
                if end != ends[-1] and token.should_prune():
                    return np.full(1, np.nan), np.full(1, float(end))
        return np.full(1, loss), np.full(1, float(ends[-1]))

    def tell(self, token, trial):
        work = trial.work or Work(np.zeros(()), np.zeros(()))
        token.set_user_attr(_FAILURE, trial.failure)
        if self.keeps_reached:
            leaves = jax.tree.leaves(eqx.filter(trial.hyper, eqx.is_inexact_array))
            values = [np.asarray(leaf, float).tolist() for leaf in leaves]
            token.set_user_attr(_REACHED, values)
        token.set_user_attr(_PRODUCTS, float(work.products))
        token.set_user_attr(_GRADIENTS, float(work.gradients))
        if np.isnan(trial.loss):
            self.study.tell(token, state=self.states.PRUNED)
        elif np.isfinite(trial.loss):
            self.study.tell(token, trial.loss)
        else:
            self.study.tell(token, state=self.states.FAIL)


_GRADIENTS, _PRODUCTS, _REACHED = "gradients", "products", "reached"
_FAILURE = "failure"
_MAX_REACHED = 100_000  # numbers


def _check_reached(hyper: Hyper) -> None:
    leaves = jax.tree.leaves(eqx.filter(hyper, eqx.is_inexact_array))
    count = sum(leaf.size for leaf in leaves)
    if count > _MAX_REACHED:
        raise ValueError(
            f"`hyper` has {count:,} numbers, and a `journal` of tuned trials keeps up to "
            f"{_MAX_REACHED:,} of each. Leave `journal` out."
        )


def _replaced(hyper: Hyper, values: list[Any]) -> Hyper:
    """Outer variables with other numbers in their arrays of floats."""
    floats, rest = eqx.partition(hyper, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(floats)
    new = [jnp.asarray(value, leaf.dtype) for value, leaf in zip(values, leaves)]
    return eqx.combine(jax.tree.unflatten(structure, new), rest)


def _check_pruner(pruner: str | None, batch_size: int) -> None:
    if pruner is None:
        return
    found = []
    for name, member in vars(_optuna().pruners).items():
        if inspect.isclass(member) and not inspect.isabstract(member):
            try:
                with warnings.catch_warnings(action="ignore"):
                    member()
            except (TypeError, ValueError):  # needs settings
                continue
            found.append(name)
    if pruner not in found:
        names = ", ".join(sorted(found))
        raise ValueError(f"`pruner` must be one of {names}; got {pruner!r}.")
    if batch_size != 1:
        raise ValueError(
            f"`batch_size` is {batch_size}, and a pruner stops trials one by one. Leave "
            "`batch_size` out."
        )


def _parameter(name: str, index: tuple[int, ...]) -> str:
    return f"{name}{list(index)}" if index else name


def _given(slot: Slot, leaf: Any) -> np.ndarray | None:
    """The numbers that Optuna would have to draw for the value that a leaf has; `None` if
    it cannot."""
    value = np.asarray(leaf.value if is_hyper(leaf) else leaf, float)
    if slot.range.shared:
        if np.ptp(value):
            return None
        value = value.ravel()[:1].reshape(())
    match slot.range:
        case Shares():
            return np.exp(-value)
        case Uniform(low=low, high=high) | LogUniform(low=low, high=high):
            inside = np.all((value >= low) & (value <= high))
        case Whole(low=low, high=high):
            inside = np.all((value >= low) & (value <= high))
        case _:
            inside = False
    return value if inside else None


def _drawn(trial: Any, slot: Slot) -> np.ndarray:
    """The values of one leaf, each a parameter of the trial."""
    values = np.empty(slot.shape)
    for index in np.ndindex(slot.shape):
        name = _parameter(slot.name, index)
        match slot.range:
            case Whole(low=low, high=high):
                values[index] = trial.suggest_int(name, low, high)
            case LogUniform(low=low, high=high):
                values[index] = trial.suggest_float(name, low, high, log=True)
            case Uniform(low=low, high=high):
                values[index] = trial.suggest_float(name, low, high)
            case Shares():
                values[index] = trial.suggest_float(name, 0.0, 1.0)
            case _:
                values[index] = slot.range.at(trial.suggest_float(name, 0.0, 1.0))
    return slot.range.at(values) if isinstance(slot.range, Shares) else values
