"""Checkpoints as anyone can read them, without the problem of their run."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from .._core._checkpoint import described, read_array, UnsoundCheckpointError
from .._core._results import RESULTS
from .._report import History


class CheckpointFile:
    """The part of a checkpoint that needs no problem and no solver. `print` it.

    **Arguments:**

    - `path`: a file that [`metaopt.callbacks.Checkpoint`][] wrote.

    **Attributes:**

    - `num_steps`: the outer steps that were taken.
    - `columns`: the columns of the history by their names.
    - `settings`: the settings of problem and solver by their names, as texts.
    - `result`: how the run went so far, in words.
    - `command`: the folder and the command that started the run, or `None` where it was not
        started by a script.

    **Raises:**

    [`metaopt.CheckpointError`][] for a file that is damaged, or no checkpoint of a run.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        names = [name for name, _, _ in described(self.path)]
        self.num_steps = int(read_array(self.path, ".state.num_steps"))
        self.settings = _read_json(self.path, ".settings")
        found = [re.fullmatch(r"\.columns\['(\w+)'\]", name) for name in names]
        self.columns = {m[1]: read_array(self.path, m[0]) for m in found if m}
        code = jnp.asarray(read_array(self.path, ".result._value"), jnp.int32)
        success: Any = RESULTS.successful
        result: Any = eqx.tree_at(lambda item: item._value, success, code)
        self.result = "" if int(code) == int(success._value) else RESULTS[result]
        self.command: tuple[str, list[str]] | None = None
        if ".command" in names:
            command = _read_json(self.path, ".command")
            if command is not None:
                self.command = str(command["folder"]), list(command["arguments"])

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.num_steps} outer steps"]
        if self.columns and len(self.columns["outer_loss"]):
            lines.append(str(History(self.columns)))
        if self.result:
            lines.append(self.result)
        if self.command is not None:
            folder, arguments = self.command
            lines.append(f"Started in {folder} by: {' '.join(arguments)}")
        return "\n".join(lines)


def present_command() -> bytes:
    """The folder and the command of this process as JSON; `null` in a notebook."""
    if vars(sys.modules["__main__"]).get("__file__") in (None, "<stdin>"):
        return json.dumps(None).encode()
    arguments = [sys.executable, *sys.orig_argv[1:]]
    return json.dumps({"folder": os.getcwd(), "arguments": arguments}).encode()


def _read_json(path: Path, name: str) -> Any:
    try:
        return json.loads(read_array(path, name).tobytes())
    except (ValueError, RecursionError) as error:
        raise UnsoundCheckpointError(f"{path} is no sound checkpoint: {error!r}") from error
