"""The command line: `python -m metaopt check` tests an installation."""

import difflib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from typing import TextIO

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

_MAX_SHOWN = 60  # characters of an argument in a message
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
    try:
        trusted, sentence = verdict(known_answer(), _version("jaxlib") or "unknown")
    except Exception as error:  # such as of a backend that is not there
        cause = str(error).partition("\n")[0] or repr(error)
        platforms = os.environ.get("JAX_PLATFORMS", "not set")
        trusted, sentence = (
            False,
            (
                f"FAILED: jax cannot compute here: {cause}. JAX_PLATFORMS is {platforms}; "
                "JAX_PLATFORMS=cpu tests the CPU alone."
            ),
        )
    lines.append(sentence)
    return (0 if trusted else 1), "\n".join(lines) + "\n"


def _unknown(argument: str) -> str:
    if len(argument) > _MAX_SHOWN:
        argument = argument[:_MAX_SHOWN] + "..."
    near = difflib.get_close_matches(argument, _COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_COMMANDS)}."
    return f"metaopt: unknown command {argument!r}; {hint}\n"


def _write(text: str, stream: TextIO | None) -> str:
    """Write to a standard stream.

    **Returns:**

    The reason why the text cannot be written; empty if it was, or if its reader has gone.
    """
    if stream is None:
        return "it is closed"
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        # Python would report the failure once more when it flushes at exit, so the stream
        # is pointed elsewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        is_gone = isinstance(error, BrokenPipeError)  # such as `| head -1`
        return "" if is_gone else str(error)
    return ""


def main(arguments: Sequence[str]) -> int:
    """Run one command.

    **Arguments:**

    - `arguments`: what follows `python -m metaopt` on the command line.

    **Returns:**

    The exit code: 0 if all is well, 1 if the installation computes wrong numbers or the
    answer could not be written, 2 if the arguments were not understood (then one line on
    standard error says why).
    """
    code, text = _answer(list(arguments))
    if code == 2:
        _write(text, sys.stderr)
    elif failure := _write(text, sys.stdout):
        _write(f"metaopt: cannot write to standard output: {failure}.\n", sys.stderr)
        return 1
    return code


def _answer(arguments: list[str]) -> tuple[int, str]:
    """The exit code, and the text on standard output, or error if the code is 2."""
    match arguments:
        case ["--help" | "-h"] | ["check", "--help" | "-h"]:
            return 0, _HELP
        case ["--version"]:
            return 0, f"metaopt {__version__}\n"
        case ["check"]:
            return _check()
        case []:
            return 2, "metaopt: no command given; try 'check' or '--help'.\n"
        case ["check" | "--version" | "--help" | "-h" as command, *rest]:
            return 2, f"metaopt: {command!r} takes no argument {rest[0]!r}.\n"
        case [argument, *_]:
            return 2, _unknown(argument)
    raise AssertionError(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
