"""Searches by the samplers of Optuna."""

import dataclasses
import importlib
import inspect
import os
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np

from .._core._files import check_writable
from .._core._types import PyTree
from .._core._validate import check_count
from .._report import Work
from ._method import Task
from ._results_file import digest
from ._search import AbstractSearch, AbstractSession, numpy_seed
from ._space import is_hyper, LogUniform, Shares, Slot, Space, Uniform, Whole


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

    Samplers, storage and dashboard are those of Optuna. Each number that is drawn is a
    parameter of its own, such as `hyper['l2']` or `hyper['rates'][3]`. The first trial is
    `hyper` as it is given only where that lies in the ranges.

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

    **Raises:**

    `ImportError` where Optuna is not installed; `ValueError` for a sampler that it does
    not have.
    """

    space: PyTree = None
    sampler: str = eqx.field(default="TPESampler", static=True)
    journal: str | None = eqx.field(default=None, static=True)
    batch_size: int = eqx.field(default=1, static=True)

    def __init__(
        self,
        space: PyTree = None,
        *,
        sampler: str = "TPESampler",
        journal: str | os.PathLike | None = None,
        batch_size: int = 1,
    ):
        check_count(batch_size, "batch_size")
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

    def session(self, task, trial=None):
        return _OptunaSession(self, task, trial)


class _OptunaSession(AbstractSession):
    def __init__(self, search: OptunaSearch, task: Task, trial: Any):
        optuna = _optuna()
        self.space = Space(search.space, task.hyper)
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
            same = dataclasses.replace(task, key=None), search.space, search.sampler, trial
            name = "-".join([*map(str, seed), digest(same)])
        before = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(
            sampler=make(seed=int(own.integers(2**31))),
            storage=storage,
            study_name=name,
            load_if_exists=True,
        )
        optuna.logging.set_verbosity(before)
        self.failed = optuna.trial.TrialState.FAIL
        self.complete = optuna.trial.TrialState.COMPLETE
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
        states = self.complete, self.failed
        found = []
        for trial in self.study.get_trials(deepcopy=False, states=states):
            if trial.number in self.known or _GRADIENTS not in trial.user_attrs:
                continue
            self.known.add(trial.number)
            fixed = _optuna().trial.FixedTrial(trial.params)
            draws = {slot.name: _drawn(fixed, slot) for slot in self.space.drawn}
            counts = (trial.user_attrs[name] for name in (_GRADIENTS, _PRODUCTS))
            work = Work(*(np.asarray(float(count)) for count in counts))
            loss = np.inf if trial.value is None else trial.value
            seconds = trial.duration.total_seconds() if trial.duration else 0.0
            found.append((self.space.at(draws), loss, work, seconds))
        return found

    def tell(self, token, loss, work):
        token.set_user_attr(_GRADIENTS, float(work.gradients))
        token.set_user_attr(_PRODUCTS, float(work.products))
        if np.isfinite(loss):
            self.study.tell(token, loss)
        else:
            self.study.tell(token, state=self.failed)


_GRADIENTS, _PRODUCTS = "gradients", "products"


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
