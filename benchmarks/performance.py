"""Times and weighs hypergradients of metaopt beside the same written by hand in plain JAX,
and beside jaxopt, optimistix, TorchOpt and higher where they are installed.

All contenders for a case are compiled, checked to agree, and run in turn, so that a machine
whose speed drifts drifts for all. Printed is a table of ratios to plain JAX: of the medians
of the times and, in brackets, of the temporary memory that XLA plans for, without noise.
`metaopt` is a hypergradient that is NaN where a check refuses it; `gradient alone` is
without checks, as that of the others is; `with report` is every number of the report beside
it.
Compilation is not counted there. After it stand, in sections of their own:

- `first_call`: the CPU seconds to trace, lower and compile, over those of plain JAX; the
  least of some rounds, with empty caches;
- `eager`: the microseconds of a call on a tiny problem, as Python runs it and compiled
  (without raising: `throw=False`);
- `outer`: the microseconds of an outer step beside one written by hand with optax;
- `memory`: for the longest runs, the most memory that a process held which computed one
  hypergradient and nothing else.

    python benchmarks/performance.py [--repeats 20] [--only TEXT]
        [--sections times first_call eager outer memory]
"""

import argparse
import pathlib
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax
from _calls import first_calls, small_calls
from _cases import ALONE, Case, CASES, PLAIN, REPORTED, TORCH
from outer_loop import SCAN, seconds_of_loops


OURS = ["metaopt", ALONE, REPORTED]
RESIDENT = [name for name in CASES if "1000 steps" in name]
# More steps, and longer vectors, are not more to compile.
SHORTEST = [
    name
    for name in CASES
    if not any(more in name for more in ("100 steps", "1000 steps", "10M"))
]
SECTIONS = ["times", "first_call", "eager", "outer", "memory"]


def compiled(contenders: dict[str, Callable], arguments: tuple) -> dict[str, Callable]:
    """The contenders ready to run; those in torch are."""
    return {
        name: f if name in TORCH else jax.jit(f).lower(*arguments).compile()
        for name, f in contenders.items()
    }


def temporary_bytes(run: Any) -> int:
    """The temporary memory that XLA plans for; 0 where XLA is not at work."""
    if not isinstance(run, jax.stages.Compiled):
        return 0
    analysis = run.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def timed(runs: dict[str, Callable], arguments: tuple, repeats: int):
    """The times of all, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for index in range(repeats):
        # Beginning with another one each time, for a minute or five rounds.
        names = list(runs)
        shift = index % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            jax.block_until_ready(runs[name](*arguments))
            times[name].append(time.perf_counter() - start)
        if time.perf_counter() - begin > 60 and index >= 4:
            break
    return times


def compare(case: Case, repeats: int) -> dict[str, str]:
    """For each contender the time and the memory over those of plain JAX."""
    contenders, arguments = case
    runs = compiled(contenders, arguments)
    outputs = {name: jax.block_until_ready(f(*arguments)) for name, f in runs.items()}
    outputs[REPORTED], _ = outputs[REPORTED]
    plain = outputs[PLAIN]
    for name, output in outputs.items():
        difference = optax.tree.norm(optax.tree.sub(output, plain))
        if not difference < 1e-3 * optax.tree.norm(plain):
            raise AssertionError(f"{name} and plain JAX do not agree")
    times = timed(
        {name: f for name, f in runs.items() if name not in TORCH}, arguments, repeats
    )
    # Afterwards, because their threads wait by spinning.
    times |= timed(
        {name: f for name, f in runs.items() if name in TORCH}, arguments, repeats
    )
    median = {name: statistics.median(record) for name, record in times.items()}
    memory = {name: temporary_bytes(run) for name, run in runs.items()}
    row = {}
    for name in runs:
        row[name] = f"{median[name] / median[PLAIN]:.2f}"
        if memory[name]:
            row[name] += f" ({memory[name] / max(memory[PLAIN], 1):.2f})"
    return row


def resident_bytes(case: str, contender: str) -> int:
    """The most memory that a process of its own holds while it computes one."""
    command = [sys.executable, __file__, "--resident", case, contender]
    return int(subprocess.run(command, check=True, capture_output=True).stdout)


def print_resident(case: str, contender: str) -> None:
    """What this process has held after one hypergradient, in bytes."""
    contenders, arguments = CASES[case]()
    runs = compiled({contender: contenders[contender]}, arguments)
    jax.block_until_ready(runs[contender](*arguments))
    # Not `ru_maxrss`, which on Linux begins with what the parent process held.
    status = pathlib.Path("/proc/self/status").read_text()
    print(1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]))


def print_header(title: str, columns: Iterable[str]) -> None:
    columns = list(columns)
    print(f"\n{title}\n")
    print("| |", " | ".join(columns), "|")
    print("|---|" + "--:|" * len(columns))


def print_row(name: str, cells: Iterable[str]) -> None:
    print(f"| {name} |", " | ".join(cells), "|", flush=True)


def print_times(chosen: list[str], repeats: int) -> None:
    names = [*OURS, "jaxopt", "optimistix", *TORCH]
    print_header("Time (and temporary memory) over plain JAX", names)
    for case in chosen:
        row = compare(CASES[case](), repeats)
        print_row(case, [row.get(name, "") for name in names])


def print_first_calls(chosen: list[str], rounds: int) -> None:
    names = [*OURS, "jaxopt", "optimistix"]
    title = "CPU seconds of compilation in plain JAX, and of others over that"
    print_header(title, [PLAIN, *names])
    for case in [name for name in chosen if name in SHORTEST]:
        contenders, arguments = CASES[case]()
        by_xla = {name: f for name, f in contenders.items() if name not in TORCH}
        seconds = first_calls((by_xla, arguments), rounds)
        plain = seconds[PLAIN]
        ratios = [
            f"{seconds[name] / plain:.1f}" if name in seconds else "" for name in names
        ]
        print_row(case, [f"{plain:.2f}", *ratios])


def print_small_calls(rounds: int) -> None:
    print_header("Microseconds of a call on a tiny problem", ["eager", "compiled"])
    for name, ways in small_calls(rounds).items():
        print_row(name, [f"{ways[way]:,.0f}" for way in ("eager", "compiled")])


def print_outer_steps(num_steps: int, rounds: int) -> None:
    title = "Microseconds of an outer step, and over `lax.scan` by hand"
    print_header(title, ["microseconds", "ratio"])
    seconds = seconds_of_loops(num_steps, rounds)
    for name, taken in seconds.items():
        ratio = f"{taken / seconds[SCAN]:.1f}"
        print_row(name, [f"{1e6 * taken / num_steps:,.1f}", ratio])


def print_memory(chosen: list[str]) -> None:
    if not pathlib.Path("/proc").exists():
        print("\nHow much a process held is not known on this system.")
        return
    print_header("The most memory that a process held, in MiB", ["metaopt", PLAIN])
    for case in [name for name in chosen if name in RESIDENT]:
        held = [resident_bytes(case, who) / 2**20 for who in ("metaopt", PLAIN)]
        print_row(case, [f"{size:,.0f}" for size in held])


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--resident", nargs=2, metavar=("CASE", "CONTENDER"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="jaxopt")
    if arguments.resident:
        print_resident(*arguments.resident)
        return
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    chosen = [name for name in CASES if arguments.only in name]
    sections: dict[str, Callable[[], None]] = {
        "times": lambda: print_times(chosen, arguments.repeats),
        "first_call": lambda: print_first_calls(chosen, rounds=2),
        "eager": lambda: print_small_calls(arguments.repeats),
        "outer": lambda: print_outer_steps(num_steps=2000, rounds=3),
        "memory": lambda: print_memory(chosen),
    }
    for name in SECTIONS:
        if name in arguments.sections:
            sections[name]()


if __name__ == "__main__":
    main()
