"""The command line: `python -m metaopt check` tests an installation."""

import difflib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence

from . import __version__
from ._self_test import known_answer, verdict


_PACKAGES = (
    "jax",
    "jaxlib",
    "equinox",
    "optax",
    "lineax",
    "optimistix",
    "jaxopt",
)

_HELP = """\
usage: python -m metaopt COMMAND

commands:
  check        test that the installed jaxlib computes right numbers, and print
               the versions of what metaopt stands on; exit code 0 if all is well,
               1 if the numbers cannot be trusted
  --version    print the version of metaopt
  --help, -h   print this text
"""

_COMMANDS = ("check", "--version", "--help")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check() -> tuple[int, str]:
    lines = [
        f"{'metaopt':<12}{__version__}",
        f"{'python':<12}{platform.python_version()}",
    ]
    for name in _PACKAGES:
        lines.append(f"{name:<12}{_version(name) or 'not installed'}")
    trusted, sentence = verdict(known_answer(), _version("jaxlib") or "unknown")
    lines.append(sentence)
    return (0 if trusted else 1), "\n".join(lines) + "\n"


def _unknown(argument: str) -> str:
    near = difflib.get_close_matches(argument, _COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_COMMANDS)}."
    return f"metaopt: unknown command {argument!r}; {hint}\n"


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head -1`) has gone. Python would report the failure once more
        # when it flushes at exit, so standard output is pointed elsewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: Sequence[str]) -> int:
    """Run one command.

    **Arguments:**

    - `arguments`: what follows `python -m metaopt` on the command line.

    **Returns:**

    The exit code: 0 if all is well, 1 if the installation computes wrong numbers, 2 if
    the arguments were not understood (then one line on standard error says why).
    """
    match list(arguments):
        case ["--help" | "-h"] | ["check", "--help" | "-h"]:
            _write(_HELP)
            return 0
        case ["--version"]:
            _write(f"metaopt {__version__}\n")
            return 0
        case ["check"]:
            code, text = _check()
            _write(text)
            return code
        case []:
            sys.stderr.write("metaopt: no command given; try 'check' or '--help'.\n")
            return 2
        case ["check" | "--version" | "--help" | "-h" as command, *rest]:
            sys.stderr.write(f"metaopt: {command!r} takes no argument {rest[0]!r}.\n")
            return 2
        case [argument, *_]:
            sys.stderr.write(_unknown(argument))
            return 2
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
