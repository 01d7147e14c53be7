"""Files that the scalars of a run are written to."""

import csv
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from .._core._files import check_writable, write_atomically


class JSONLines:
    """A file with one JSON object for each outer step, for [`metaopt.callbacks.Log`][].

    Each has the number of the step as `step`, the first of which is 0, and the columns of
    the history; a number that is not finite is `null`. Each line is written at once, and a
    file that ends within a line, after a crash, is mended. A run that goes on from a
    checkpoint replaces the steps that it takes again, and a new run the file, which is then
    kept as `path` with `.previous` added.

    **Arguments:**

    - `path`: the file, whose folder is made if need be.

    **Raises:**

    `ValueError` for a file that cannot be written.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        check_writable(self.path)

    def begin(self, step: int) -> None:
        """Drop the rows of this step and of later ones.

        **Arguments:**

        - `step`: the number of the next step.
        """
        lines = [line for line, number in _numbered(self.path) if number < step]
        _replace(self.path, "".join(lines))

    def log(self, row: dict[str, float], *, step: int) -> None:
        """Write one row.

        **Arguments:**

        - `row`: the columns of one outer step.
        - `step`: its number.
        """
        finite = {name: x if math.isfinite(x) else None for name, x in row.items()}
        _append(self.path, json.dumps({"step": step, **finite}) + "\n")


def _numbered(path: Path) -> list[tuple[str, int]]:
    """The sound lines of a file, and the steps that they are of."""
    if not path.exists():
        return []
    out = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(True):
        try:
            out.append((line.rstrip("\n") + "\n", int(json.loads(line)["step"])))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return out


class CSV:
    """A file of comma-separated values with one row for each outer step, for
    [`metaopt.callbacks.Log`][].

    The first column is the number of the step, the first of which is 0; the others are
    those of the history. A column that comes later is added to all rows. A run that goes on
    from a checkpoint replaces the steps that it takes again, and a new run the file, which
    is then kept as `path` with `.previous` added.

    **Arguments:**

    - `path`: the file, whose folder is made if need be.

    **Raises:**

    `ValueError` for a file that cannot be written.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._names: list[str] = []
        check_writable(self.path)

    def begin(self, step: int) -> None:
        """Drop the rows of this step and of later ones.

        **Arguments:**

        - `step`: the number of the next step.
        """
        rows = [row for row in self._rows() if _step_of(row) < step]
        self._names = list(dict.fromkeys(name for row in rows for name in row))
        self._write(rows, self._names)

    def log(self, row: dict[str, float], *, step: int) -> None:
        """Write one row.

        **Arguments:**

        - `row`: the columns of one outer step.
        - `step`: its number.
        """
        full: dict[str, Any] = {"step": step, **row}
        new = [name for name in full if name not in self._names]
        if new:
            names = [*self._names, *new]
            self._write([*self._rows(), full], names)
            self._names = names
            return
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._names, restval="").writerow(full)
        _append(self.path, text.getvalue())

    def _rows(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        text = self.path.read_bytes().decode("utf-8", errors="replace")
        # A crash may have cut the last row short.
        whole = text[: text.rfind("\n") + 1]
        rows = csv.DictReader(io.StringIO(whole, newline=""))
        return [row for row in rows if None not in row.values()]

    def _write(self, rows: list[dict[str, Any]], names: list[str]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names, restval="")
        if names:
            writer.writeheader()
        writer.writerows(rows)
        _replace(self.path, text.getvalue())


def _append(path: Path, text: str) -> None:
    """Add a row to a file, whole or not at all."""
    content = text.encode()
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while content:
                content = content[file.write(content) :]
        except BaseException:
            file.truncate(end)
            raise


def _replace(path: Path, text: str) -> None:
    """Write a file. One that had more in it is kept beside it as `path.previous`."""
    if path.exists() and path.stat().st_size > len(text.encode()):
        os.replace(path, path.with_name(path.name + ".previous"))
    write_atomically(path, text.encode())


def _step_of(row: dict[str, Any]) -> float:
    """The number of the step of a row; infinite for a row of another kind of file."""
    try:
        return int(row["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
