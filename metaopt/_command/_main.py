"""The arguments of the command line, and its output."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any, Never, TextIO

from .._core._version import __version__
from ._check import check
from ._examples import list_examples, run_example
from ._info import info
from ._runs import resume, show


_MAX_SHOWN = 60  # characters of an argument in a message
_MAX_MESSAGE = 150


class _Help(Exception):
    """The text that was asked for."""


class _Misuse(Exception):
    """Arguments that are not understood."""


class _Parser(argparse.ArgumentParser):
    """A parser that leaves it to others to write and to exit."""

    def print_help(self, file: Any = None) -> Never:
        """Hand the text on."""
        raise _Help(self.format_help())

    def error(self, message: str) -> Never:
        """Hand the message on."""
        raise _Misuse(message)


def _parser() -> tuple[_Parser, list[str]]:
    """The parser, and the names of the commands."""
    parser = _Parser(prog="python -m metaopt", description="metaopt on the command line")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    add = lambda name, text: commands.add_parser(name, help=text, description=text)
    add("info", "print versions, devices and the default dtype")
    add(
        "check",
        "test that this installation computes right numbers, hypergradients among them; "
        "exit code 1 if they cannot be trusted",
    )
    examples = add("examples", "list the examples, or run one").add_subparsers(
        dest="what", metavar="run"
    )
    runs = examples.add_parser("run", help="run an example, with its own options")
    runs.add_argument("name", metavar="NAME", help="such as tune_learning_rate")
    runs.add_argument("options", nargs=argparse.REMAINDER, help="those of the example")
    shows = add("show", "print the history of a checkpoint, or the table of a study")
    shows.add_argument("run", metavar="RUN", help="a checkpoint, or the folder of a study")
    shows.add_argument("--picture", metavar="FILE", help="draw it as well: curves.png")
    resumes = add("resume", "start the program of a checkpoint again, which goes on")
    resumes.add_argument("run", metavar="RUN", help="a checkpoint")
    resumes.add_argument(
        "--yes", action="store_true", help="do not ask before the command is run"
    )
    return parser, list(commands.choices)


def main(arguments: Sequence[str]) -> int:
    """Run one command.

    **Arguments:**

    - `arguments`: the words after `python -m metaopt` on the command line.

    **Returns:**

    The exit code: 0 if all is well, 1 if the command failed or its answer could not be
    written, 2 if the arguments were not understood (then one line on standard error says
    why). That of an example or a run that was started is its own.
    """
    try:
        code, text = _answer(list(arguments))
    except _Help as text_of_help:
        code, text = 0, str(text_of_help)
    except _Misuse as misuse:
        message = ascii(str(misuse)[:_MAX_MESSAGE])[1:-1]
        code, text = 2, f"metaopt: {message}; try '--help'.\n"
    except (ValueError, ImportError) as error:  # such as of a file that is damaged
        code, text = 1, f"metaopt: {error}\n"
        _write(text, sys.stderr)
        return code
    if code == 2:
        _write(text, sys.stderr)
    elif failure := _write(text, sys.stdout):
        _write(f"metaopt: cannot write to standard output: {failure}.\n", sys.stderr)
        return 1
    return code


def _answer(arguments: list[str]) -> tuple[int, str]:
    """The exit code, and the text on standard output, or error if the code is 2."""
    parser, names = _parser()
    if not arguments:
        return 2, f"metaopt: no command given; known: {', '.join(names)}; try '--help'.\n"
    first = arguments[0]
    if first not in [*names, "--version", "--help", "-h"]:
        return 2, _unknown(first, [*names, "--version", "--help"])
    given = parser.parse_args(arguments)
    match given.command:
        case "info":
            return info()
        case "check":
            return check()
        case "examples" if given.what == "run":
            return run_example(given.name, given.options)
        case "examples":
            return list_examples()
        case "show":
            return show(given.run, given.picture)
        case "resume":
            return resume(given.run, lambda shown: given.yes or _is_agreed(shown))
    return 0, f"metaopt {__version__}\n"


def _is_agreed(command: str) -> bool:
    question = f"The file says that its run was started by:\n  {command}\nRun that? [y/N] "
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:  # nobody is there to ask
        return False


def _unknown(argument: str, names: list[str]) -> str:
    if len(argument) > _MAX_SHOWN:
        argument = argument[:_MAX_SHOWN] + "..."
    near = difflib.get_close_matches(argument, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}."
    return f"metaopt: unknown command {ascii(argument)}; {hint}\n"


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
