"""What the examples share: their command line, their data and what they write."""

import argparse
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

import metaopt as mo


_LOADERS = {
    "digits": mo.datasets.load_digits,
    "mnist": mo.datasets.load_mnist,
    "fashion_mnist": mo.datasets.load_fashion_mnist,
}


def make_parser(
    name: str, description: str, steps: int, data: Sequence[str] = tuple(_LOADERS)
) -> argparse.ArgumentParser:
    """The options that every example takes; `data` are the data sets it can run on."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    if data:
        parser.add_argument(
            "--data",
            choices=tuple(data),
            default=data[0],
            help="digits ship with scikit-learn; the others are read from $METAOPT_DATA",
        )
    parser.add_argument("--seed", type=int, default=0, help="fixes everything random")
    parser.add_argument("--steps", type=int, default=steps, help="outer steps")
    parser.add_argument("--quick", action="store_true", help="a few steps, as a test")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("runs") / name,
        help="folder for metrics.json and the picture",
    )
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options as they were given."""
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    if arguments.seed < 0:
        parser.error(f"--seed must not be negative, got {arguments.seed}")
    return arguments


def parse_arguments(
    name: str, description: str, steps: int, data: Sequence[str] = tuple(_LOADERS)
) -> argparse.Namespace:
    """The options that every example takes, as they were given."""
    return parsed(make_parser(name, description, steps, data))


def load(name: str) -> mo.datasets.ImageData:
    """The data set of that name."""
    return _LOADERS[name]()


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]):
    """An aligned table: the first column to the left, numbers to the right."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    print(f"\n{title}")
    for row in table:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        print("  " + "  ".join(cells))


def temporary_memory(fn: Callable[..., Any], *arguments: Any) -> float:
    """MiB of temporary memory that XLA plans for a function of arrays."""
    analysis = jax.jit(fn).lower(*arguments).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes / 2**20


def write_metrics(out: pathlib.Path, metrics: dict[str, Any]) -> None:
    """Every figure that was printed, as JSON."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(metrics, indent=2, sort_keys=True)
    (out / "metrics.json").write_text(text + "\n", encoding="utf-8")
    print(f"\nWrote {out}/")
