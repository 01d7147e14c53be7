"""Plant wrong lines in copies of metaopt, and say whether the tests notice.

    python tests/planted_faults.py [--only NAME ...] [--control]

Each row of `faults/` is one wrong line and the tests that must fail because of it. The
script exits with 1 where a fault is not noticed. `--control` runs the same tests without
any fault: they must pass, or a row proves nothing.

mutmut and cosmic-ray are maintained and make such lines by themselves, from the syntax:
some ten thousand of them here. Each needs tests that compile for seconds to minutes, and
many change nothing that a test should see (a safety factor, a limit of steps). Nor do
they make the faults that matter most: a key that is not folded in, a bound of half the
size. Hence a table, written by hand.
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults import Fault, FAULTS


TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "metaopt"

_PASSED, _FAILED = 0, 1  # exit codes of pytest
_PRINT_PLACE = "import metaopt; print(metaopt.__file__)"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The tests of one fault have failed, as they must, or not."""

    fault: Fault
    failed: bool
    seconds: float
    says: str  # the last line of pytest


def verdict(fault: Fault, planted: bool) -> Verdict:
    """Run the tests of a fault on a copy of the package, with or without the fault.

    **Raises:** `RuntimeError` where pytest could not run them.
    """
    with tempfile.TemporaryDirectory(prefix="metaopt_fault_") as folder:
        copy = Path(folder) / PACKAGE.name
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if planted:
            fault.plant(copy)
        # The folder is the working directory, so that the copy is what is imported.
        environment = os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        place = _run([sys.executable, "-c", _PRINT_PLACE], folder, environment).stdout
        if Path(place.strip()).parent != copy:
            raise RuntimeError(f"metaopt was imported from {place.strip()!r}, not {copy}.")
        tests = [str(TESTS / test) for test in fault.tests.split()]
        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
        begin = time.perf_counter()
        command = [sys.executable, "-m", "pytest", *options, *tests]
        run = _run(command, folder, environment)
        seconds = time.perf_counter() - begin
    lines = run.stdout.strip().splitlines() or [run.stderr.strip()[-200:]]
    if run.returncode not in (_PASSED, _FAILED):
        raise RuntimeError(
            f"Fault {fault.name!r}: pytest ended with {run.returncode}, and not because a "
            f"test failed.\n{run.stdout}\n{run.stderr}"
        )
    return Verdict(fault, run.returncode == _FAILED, seconds, lines[-1].strip("= "))


def _run(
    command: list[str], folder: str, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description="Plant faults and run the tests.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults alone")
    parser.add_argument("--control", action="store_true", help="plant nothing")
    options = parser.parse_args(arguments)
    names = [fault.name for fault in FAULTS]
    unknown = sorted(set(options.only or []) - set(names))
    if unknown:
        parser.error(f"there is no fault {', '.join(unknown)}; there are {names}")
    chosen = [f for f in FAULTS if not options.only or f.name in options.only]
    right = []
    for fault in chosen:
        found = verdict(fault, planted=not options.control)
        says = "noticed" if found.failed else "NOT noticed"
        if options.control:
            says = "FAILS WITHOUT A FAULT" if found.failed else "passes"
        right.append(found.failed != options.control)
        row = f"{says:21} {fault.name:50} {fault.file:42} {found.seconds:4.0f} s"
        print(f"{row}  {found.says}", flush=True)
    of = "pass without a fault" if options.control else "noticed"
    share = 100 * sum(right) / len(right)
    print(f"{sum(right)} of {len(right)} {of}, {share:.0f} %")
    return 0 if all(right) else 1


if __name__ == "__main__":
    raise SystemExit(main())
