"""Times and weighs hypergradients of metaopt beside the same written by hand in plain JAX,
and beside jaxopt, optimistix, TorchOpt and higher where they are installed.

All contenders for a case are compiled, checked to agree, and run in turn, so that a machine
whose speed drifts drifts for all. Printed is a table of ratios to plain JAX: of the medians
of the times and, in brackets, of the temporary memory that XLA plans for, without noise.
`metaopt` is a hypergradient that is NaN where a check refuses it; `gradient alone` is
without checks, as that of the others is; `with report` is every number of the report beside
it.
Compilation is not counted. After it stands, for the longest runs, the most memory that a
process held which computed one hypergradient and nothing else.

    python benchmarks/performance.py [--repeats 20] [--only TEXT]
"""

import argparse
import pathlib
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import optax
from _cases import ALONE, Case, CASES, PLAIN, REPORTED, TORCH


RESIDENT = [name for name in CASES if "1000 steps" in name]


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


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--resident", nargs=2, metavar=("CASE", "CONTENDER"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="jaxopt")
    if arguments.resident:
        print_resident(*arguments.resident)
        return
    device = jax.devices()[0].device_kind
    print(
        f"Time (and temporary memory) over plain JAX, on {device}, jax {jax.__version__}\n"
    )
    names = ["metaopt", ALONE, REPORTED, "jaxopt", "optimistix", *TORCH]
    print("| |", " | ".join(names), "|")
    print("|---|" + "--:|" * len(names))
    chosen = [name for name in CASES if arguments.only in name]
    for case in chosen:
        row = compare(CASES[case](), arguments.repeats)
        cells = [row.get(name, "") for name in names]
        print(f"| {case} |", " | ".join(cells), "|", flush=True)
    if not pathlib.Path("/proc").exists():
        print("\nHow much a process held is not known on this system.")
        return
    print("\nThe most memory that a process held, in MiB\n")
    print("| | metaopt | plain JAX |\n|---|--:|--:|")
    for case in [name for name in chosen if name in RESIDENT]:
        cells = [f"{resident_bytes(case, who) / 2**20:,.0f}" for who in ("metaopt", PLAIN)]
        print(f"| {case} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
