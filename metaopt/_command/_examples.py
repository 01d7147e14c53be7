"""`metaopt examples`: the examples, listed and run."""

import ast
import difflib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


_PACKAGE = Path(__file__).parents[1]
# In an installed package, and in a copy of the repository.
_FOLDERS = (_PACKAGE / "_examples", _PACKAGE.parent / "examples")


def examples() -> dict[str, Path]:
    """The examples by their names."""
    for folder in _FOLDERS:
        found = sorted(folder.glob("[!_]*.py"))
        if found:
            return {path.stem: path for path in found}
    return {}


def list_examples() -> tuple[int, str]:
    """The exit code and the text of the command without arguments."""
    found = examples()
    if not found:
        return 1, "The examples are not installed. They are in the repository.\n"
    width = max(map(len, found)) + 2
    lines = [f"{name:<{width}}{_first_sentence(path)}" for name, path in found.items()]
    lines.append(
        "\nRun one with `python -m metaopt examples run NAME`; its options: --help."
    )
    return 0, "\n".join(lines) + "\n"


def run_example(name: str, arguments: Sequence[str]) -> tuple[int, str]:
    """Run an example in a process of its own, with these options.

    **Returns:**

    Its exit code, and nothing to print; 2 and a message for a name that is not there.
    """
    found = examples()
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(found)}."
        return 2, f"metaopt: no example {name!r}; {hint}\n"
    # Its folder comes first on the path, where the module is that they share.
    return subprocess.call([sys.executable, str(found[name]), *arguments]), ""


def _first_sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())
