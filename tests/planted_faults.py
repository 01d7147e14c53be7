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
_PRINT_PLACE = "import importlib.util as u; print(u.find_spec('metaopt').origin)"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The end of the tests of one fault: they have failed, as they must, or not."""

    fault: Fault
    status: int  # the exit status of pytest
    seconds: float
    says: str  # the last line of pytest

    def text(self, planted: bool) -> str:
        """The verdict in words."""
        if self.status not in (_PASSED, _FAILED):
            return "COULD NOT BE RUN"
        if planted:
            return "noticed" if self.status == _FAILED else "NOT noticed"
        return "FAILS WITHOUT A FAULT" if self.status == _FAILED else "passes"


def verdict(fault: Fault, planted: bool) -> Verdict:
    """Run the tests of a fault on a copy of the package, with or without the fault.

    **Raises:** `RuntimeError` where another copy of the package would be imported.
    """
    with tempfile.TemporaryDirectory(prefix="metaopt_fault_") as folder:
        copy = Path(folder) / PACKAGE.name
        shutil.copytree(PACKAGE, copy)  # with what is compiled, which stays valid
        if planted:
            fault.plant(copy)
        # The folder is the working directory, so that the copy is what is imported.
        environment = os.environ | {"PYTHONPATH": folder}
        place = _run([sys.executable, "-c", _PRINT_PLACE], folder, environment).stdout
        if Path(place.strip()).parent != copy:
            raise RuntimeError(f"metaopt is found at {place.strip()!r}, not in {copy}.")
        tests = [str(TESTS / test) for test in fault.tests.split()]
        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
        begin = time.perf_counter()
        command = [sys.executable, "-m", "pytest", *options, *tests]
        run = _run(command, folder, environment)
        seconds = time.perf_counter() - begin
    lines = run.stdout.strip().splitlines() or [run.stderr.strip()[-200:]]
    return Verdict(fault, run.returncode, seconds, lines[-1].strip("= "))


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
    planted = not options.control
    right = []
    for fault in chosen:
        found = verdict(fault, planted)
        right.append(found.status == (_FAILED if planted else _PASSED))
        row = f"{found.text(planted):21} {fault.name:48} {fault.file:42}"
        print(f"{row} {found.seconds:4.0f} s  {found.says}", flush=True)
    of = "noticed" if planted else "pass without a fault"
    share = 100 * sum(right) / len(right)
    print(f"{sum(right)} of {len(right)} {of}, {share:.0f} %")
    return 0 if all(right) else 1


if __name__ == "__main__":
    raise SystemExit(main())
