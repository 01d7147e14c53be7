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
            measures, error = _measures(measure, sorted(needed))
            for name, left in missing.items():
                at_seeds = {seed: measures[seed] for seed in left if seed in measures}
                if not at_seeds:
                    continue
                bar.set_description(f"{name}, seed {', '.join(map(str, at_seeds))}")
                with _told(file, total):
                    for seed, record in _records(name, methods[name], at_seeds, new_trace):
                        file.put(name, seed, record)
                        bar.update()
            if error is not None:
                raise error


def _measures(
    measure: Callable[[int], Measure], seeds: Sequence[int]
) -> tuple[dict[int, Measure], Exception | None]:
    """The task of each seed up to the first error, and that error."""
    found: dict[int, Measure] = {}
    for seed in seeds:
        try:
            found[seed] = measure(seed)
        except Exception as error:  # the seeds before it are run
            return found, error
    return found, None


def _records(
    name: str,
    method: AbstractMethod,
    measures: Mapping[int, Measure],
    new_trace: Callable[[], Trace],
) -> Iterator[tuple[int, Record]]:
    """Each seed with its record, as soon as it is there."""
    left = dict(measures)
    if len(left) > 1 and isinstance(method, RunsSeeds):
        for seed, trace in _finished(name, method, measures, new_trace):
            yield seed, left.pop(seed).record(trace)
    for seed, measure in left.items():
        yield seed, _record(method, measure, new_trace())


def _finished(
    name: str,
    method: RunsSeeds,
    measures: Mapping[int, Measure],
    new_trace: Callable[[], Trace],
) -> Iterator[tuple[int, Trace]]:
    """The seeds that spend their budget side by side, each with its trace."""
    seeds, tasks = list(measures), [measure.task for measure in measures.values()]
    traces = [new_trace() for _ in seeds]
    running = method.run_seeds(tasks, traces)
    while True:
        try:
            index = next(running, None)
        except ValueError:  # about the method, whose seeds say it one by one
            return
        except Exception as error:  # such as one about memory
            warn(
                f"{name!r} goes on with one seed after the other, since with {len(seeds)} "
                f"at once it raises {type(error).__name__}: {error}"
            )
            return
        if index is None:
            return
        yield seeds[index], traces[index]


def _record(method: AbstractMethod, measure: Measure, trace: Trace) -> Record:
    error = ""
    try:
        method.run(measure.task, trace)
    except Exception as reason:  # the other methods go on
        error = f"{type(reason).__name__}: {reason}"
    return measure.record(trace, error)


@contextlib.contextmanager
def _told(file: ResultsFile, total: int) -> Iterator[None]:
    """Add the number of finished runs to an interrupt."""
    try:
        yield
    except KeyboardInterrupt as error:
        done = f"{file.num_finished} of {total} runs are finished"
        there = f", and in {file.path}. The same call goes on from there."
        is_there = file.path is not None and file.path.exists()
        error.add_note(done + (there if is_there else "."))
        raise
