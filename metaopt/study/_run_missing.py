"""The loop of a study over seeds and methods."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from tqdm import tqdm

from .._core._warn import warn
from ._comparison import Record
from ._evaluate import Measure
from ._method import AbstractMethod, RunsSeeds
from ._results_file import ResultsFile
from ._trace import Trace


def run_missing(
    methods: Mapping[str, AbstractMethod],
    seeds: Sequence[int],
    seeds_per_call: int,
    measure: Callable[[int], Measure],
    new_trace: Callable[[], Trace],
    file: ResultsFile,
    progress: bool,
) -> None:
    """Run the methods on the seeds that are not in the file, and put them there.

    **Arguments:**

    - `methods`, `seeds`, `seeds_per_call`, `progress`: as for `compare`.
    - `measure`: a function of a seed that returns its task and what is measured.
    - `new_trace`: a function that returns the trace of one run.
    - `file`: the results.
    """
    total = len(methods) * len(seeds)
    with tqdm(total=total, unit="run", disable=not progress) as bar:
        for begin in range(0, len(seeds), seeds_per_call):
            group = seeds[begin : begin + seeds_per_call]
            missing = {n: [s for s in group if file.get(n, s) is None] for n in methods}
            needed = {seed for found in missing.values() for seed in found}
            bar.update(len(methods) * len(group) - sum(map(len, missing.values())))
            measures = {seed: measure(seed) for seed in sorted(needed)}
            for name, left in missing.items():
                bar.set_description(f"{name}, seed {', '.join(map(str, left))}")
                with _told(file, total):
                    at_seeds = [measures[seed] for seed in left]
                    records = _records(name, methods[name], at_seeds, new_trace)
                    for seed, record in zip(left, records):
                        file.put(name, seed, record)
                        bar.update()


def _records(
    name: str,
    method: AbstractMethod,
    measures: Sequence[Measure],
    new_trace: Callable[[], Trace],
) -> Iterator[Record]:
    """The record of each seed, at once if the method can."""
    traces = [new_trace() for _ in measures]
    if len(measures) > 1 and isinstance(method, RunsSeeds):
        tasks = [measure.task for measure in measures]
        try:
            if method.run_seeds(tasks, traces):
                for measure, trace in zip(measures, traces):
                    yield measure.record(trace)
                return
        except Exception as error:  # such as one about memory
            warn(
                f"{name!r} is run on one seed after the other, since on {len(measures)} at "
                f"once it raises {type(error).__name__}: {error}"
            )
    for measure in measures:
        yield _record(method, measure, new_trace())


def _record(method: AbstractMethod, measure: Measure, trace: Trace) -> Record:
    error = ""
    try:
        method.run(measure.task, trace)
    except Exception as reason:  # the other methods go on
        error = f"{type(reason).__name__}: {reason}"
    return measure.record(trace, error)


@contextlib.contextmanager
def _told(file: ResultsFile, total: int) -> Iterator[None]:
    """Say what an interrupt leaves behind."""
    try:
        yield
    except KeyboardInterrupt as error:
        done = f"{file.num_finished} of {total} runs are finished"
        there = f", and in {file.path}. The same call goes on from there."
        error.add_note(done + ("." if file.path is None else there))
        raise
