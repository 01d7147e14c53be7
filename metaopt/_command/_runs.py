"""`metaopt show` and `metaopt resume`: runs and studies in files."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from .._core._checkpoint import CheckpointError
from .._report import History
from ..callbacks import CheckpointFile
from ..plot import comparison, history
from ..study import read_comparison


def show(run: str, picture: str | None) -> tuple[int, str]:
    """The exit code and the text of a run or a study.

    **Arguments:**

    - `run`: a checkpoint, or the folder or `results.json` of a study.
    - `picture`: a file to write a picture to, or `None`.
    """
    path = Path(run)
    if not path.exists():
        return 2, f"metaopt: {run} is not there. Name a checkpoint or a study's folder.\n"
    if path.is_dir() or path.name == "results.json":
        table = read_comparison(path if path.is_dir() else path.parent)
        text = f"{table}\n"
        if picture is not None:
            comparison(table).savefig(picture, dpi=130)
    else:
        file = CheckpointFile(path)
        text = f"{file}\n"
        if picture is not None:
            history(History(file.columns))[0].figure.savefig(picture, dpi=130)
    return 0, text + (f"Wrote {picture}\n" if picture is not None else "")


def resume(run: str, is_agreed: Callable[[str], bool]) -> tuple[int, str]:
    """Start the program of a checkpoint once more, which goes on from it.

    **Arguments:**

    - `run`: the checkpoint.
    - `is_agreed`: is called with the command, and returns whether to run it.
    """
    path = Path(run)
    if not path.is_file():
        state = "a folder" if path.is_dir() else "not there"
        return 2, f"metaopt: {run} is {state}. Name the file of a checkpoint.\n"
    file = CheckpointFile(path)
    if file.command is None:
        return 1, (
            "metaopt: the run was not started by a script, so that there is no command to "
            "repeat. Run its cells again: the same `Checkpoint` goes on from the file.\n"
        )
    folder, command = file.command
    shown = f"cd {folder} && {' '.join(command)}"
    if not is_agreed(shown):
        return 1, "Nothing was run.\n"
    try:
        return subprocess.call(command, cwd=folder), ""
    except OSError as error:
        raise CheckpointError(f"{shown} cannot be run: {error}.") from error
