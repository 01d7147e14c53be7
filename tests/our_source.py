"""Where the source of metaopt lies, for the tests of the house rules."""

import ast
import importlib
import sys
import types
from pathlib import Path


REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "metaopt"

# What the package's root and the command line are called in messages; they stand on top
# of all floors.
ROOT, COMMAND_LINE = "__init__", "__main__"


def module_name(path: Path, package: Path = PACKAGE) -> str:
    parts = list(path.relative_to(package).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def import_module(name: str) -> types.ModuleType:
    return importlib.import_module("metaopt" if name == ROOT else f"metaopt.{name}")


def import_benchmark(name: str) -> types.ModuleType:
    """Import a file of `benchmarks`, which are on the path of their own scripts alone."""
    folder = str(REPOSITORY / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)
