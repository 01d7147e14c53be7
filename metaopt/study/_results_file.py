"""The file that a study keeps its results in, and goes on from."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .._core._description import description, first_change
from .._core._files import check_writable, write_atomically
from .._core._lock import locked
from ._comparison import Comparison, Record


_VERSION = 2
_NAME = "results.json"


def digest(x: Any) -> str:
    """A text that is the same for equal settings, in another process as well."""
    return _hashed(description(x, ""))


def described(x: Any, name: str) -> dict[str, str]:
    """The settings of `x` by their names, as texts; of very many of them a hash."""
    rows = description(x, name)
    return rows if len(rows) <= _MAX_ROWS else {name: _hashed(rows)}


_MAX_ROWS = 1000


def _hashed(rows: Mapping[str, str]) -> str:
    text = json.dumps(rows, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def results_file(
    folder: str | os.PathLike | None,
    settings: dict[str, dict[str, str]],
    methods: dict[str, dict[str, str]],
    about: Mapping[str, Any],
) -> Iterator["ResultsFile"]:
    """Open the file of a study, which no other process may write until the block ends.

    **Arguments:**

    - `folder`, `settings`, `methods`, `about`: as for `ResultsFile`.

    **Raises:**

    `ValueError` as there, and for a file that another study is writing.
    """
    with contextlib.ExitStack() as held:
        if folder is not None:
            path = Path(folder) / _NAME
            check_writable(path)
            held.enter_context(locked(path, "file"))
        yield ResultsFile(folder, settings, methods, about)


class ResultsFile:
    """`results.json` of a study: its settings, and the records of what is finished.

    **Arguments:**

    - `folder`: the folder of the study; `None` keeps nothing.
    - `settings`: the settings that all records share, by their names, each as rows of
        texts.
    - `methods`: the settings of each method, by its name.
    - `about`: all else that a table of the records needs.

    **Raises:**

    `ValueError` for a file that is damaged, or is of another study.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None,
        settings: dict[str, dict[str, str]],
        methods: dict[str, dict[str, str]],
        about: Mapping[str, Any],
    ):
        self.path = None if folder is None else Path(folder) / _NAME
        self.settings = dict(settings)
        self.methods = dict(methods)
        self.about = dict(about)
        self.records: dict[str, dict[int, Record]] = {}
        if self.path is None:
            return
        if self.path.exists():
            self._read(self.path)

    def get(self, method: str, seed: int) -> Record | None:
        """The record of a method and a seed, if it is finished without an error."""
        record = self.records.get(method, {}).get(seed)
        return None if record is None or record.error else record

    @property
    def num_finished(self) -> int:
        """The number of runs of these methods that are finished without an error."""
        rows = [rows for name, rows in self.records.items() if name in self.methods]
        return sum(not record.error for row in rows for record in row.values())

    def put(self, method: str, seed: int, record: Record) -> None:
        """Keep a record, and write the file."""
        self.records.setdefault(method, {})[seed] = record
        self.write({})

    def write(self, summary: Mapping[str, Any]) -> None:
        """Write all records, and what else there is to say.

        **Arguments:**

        - `summary`: more entries of the file.
        """
        if self.path is None:
            return
        records = {
            method: {str(s): dataclasses.asdict(record) for s, record in rows.items()}
            for method, rows in self.records.items()
        }
        content = {
            "version": _VERSION,
            "settings": self.settings,
            "methods": self.methods,
            **self.about,
            **summary,
            "records": records,
        }
        text = json.dumps(_finite(content), indent=1)
        write_atomically(self.path, (text + "\n").encode())

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["version"]
            settings, methods = content["settings"], content["methods"]
            found = {
                method: {int(s): _record(row) for s, row in rows.items()}
                for method, rows in content["records"].items()
                if version == _VERSION
            }
            if version == _VERSION:
                settings, methods = _rows_of(settings), _rows_of(methods)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no file of results of a study, or is damaged ({error!r}). Name "
                "another folder as `out`, or remove it."
            ) from error
        if version != _VERSION:
            raise ValueError(
                f"{path} is of version {version} of the format, and this metaopt reads "
                f"version {_VERSION}. Name another folder as `out`."
            )
        for name, value in self.settings.items():
            if change := first_change(settings.get(name, {}), value):
                raise ValueError(
                    f"{path} holds results of another study: {change}. Name another folder "
                    "as `out`, or remove the file."
                )
        for name, value in self.methods.items():
            if all(record.error for record in found.get(name, {}).values()):
                found.pop(name, None)  # another one may take its place
            elif change := first_change(methods.get(name, value), value):
                raise ValueError(
                    f"{path} holds results of another method under the name {name!r}: "
                    f"{change}. Name this one otherwise, or name another folder as `out`."
                )
        # Methods that are asked for no longer stay in the file.
        self.methods = methods | self.methods
        self.records = found


def _rows_of(settings: Any) -> dict[str, dict[str, str]]:
    return {name: dict(rows) for name, rows in settings.items()}


def _finite(x: Any) -> Any:
    """`x` with `None` for numbers that are not finite, which JSON does not have."""
    match x:
        case float():
            return x if math.isfinite(x) else None
        case Mapping():
            return {key: _finite(value) for key, value in x.items()}
        case list() | tuple():
            return [_finite(value) for value in x]
    return x


def _record(row: Mapping[str, Any]) -> Record:
    number = lambda x: math.nan if x is None else x
    values = {name: [number(x) for x in xs] for name, xs in row["values"].items()}
    amounts = {name: number(row[name]) for name in ("gradients", "products", "seconds")}
    return Record(**{**row, "values": values, **amounts})


def read_comparison(folder: str | os.PathLike) -> Comparison:
    """Read the results of a study, finished or not.

    Seeds that some method has not finished are left out.

    **Arguments:**

    - `folder`: the `out` of [`metaopt.study.compare`][].

    **Returns:**

    A [`metaopt.study.Comparison`][].

    **Raises:**

    `ValueError` for a folder without results, and for a file that is damaged.
    """
    path = Path(folder) / _NAME
    if not path.exists():
        raise ValueError(f"{path} is not there: the folder holds no study.")
    file = ResultsFile(folder, {}, {}, {})
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        budget, target = content["budget"], content["target"]
        names = content["asked"]
        rest = (
            dict(content["higher_is_better"]),
            float(budget["amount"]),
            str(budget["unit"]),
            None if target is None else (str(target[0]), float(target[1])),
            str(content["data"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of results of a study: {error!r}.") from error
    rows = {name: file.records[name] for name in names if file.records.get(name)}
    seeds = set.intersection(*map(set, rows.values())) if rows else set()
    if not seeds:
        raise ValueError(f"{path}: no seed is finished by all methods so far.")
    kept = {name: {s: row[s] for s in sorted(seeds)} for name, row in rows.items()}
    return Comparison(kept, *rest)
