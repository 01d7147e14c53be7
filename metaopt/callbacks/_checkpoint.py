"""Checkpoints of a run, to go on from."""

import contextlib
import json
import os
import re
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._core._checkpoint import (
    CheckpointError,
    described,
    load,
    read_entry,
    save,
    UnsoundCheckpointError,
)
from .._core._description import first_change
from .._core._files import check_writable
from .._core._lock import locked
from .._core._results import RESULTS
from .._core._validate import check_count, check_flag, check_tolerance
from .._core._warn import warn
from .._report import Best, is_float_array
from ._base import AbstractCallback
from ._checkpoint_file import present_command
from ._roll_back import Undo


class Checkpoint(AbstractCallback):
    """Writes the state and the history of a run to a file, and goes on from it.

    If the file is there the run goes on from it, to the same numbers bit for bit, with its
    history, its best step and its first failure. The file names the settings of problem
    and solver, and a run with others is refused. The data are not in it: hand over the
    same, and of an iterator one that goes on where it was. A loader is started anew, and
    the batches of the steps already taken are passed over. A step that failed under `throw`
    is not in it either: a run that goes on takes it again.

    A file is written whole or not at all, and the one before it is kept beside it as
    `path` with `.previous` added: a run goes on from that one, with a warning, where the
    newer is damaged. Ctrl-C writes the file. So does SIGTERM, which batch systems send
    before they end a process, and which then ends it.

    **Arguments:**

    - `path`: the file, whose folder is made if need be.
    - `every`: the number of outer steps after which it is written, at the next end of a
        compiled call; and at the end of the run.
    - `seconds`: also after so many seconds of wall time since it was written.
    - `allow_changes`: whether a run goes on although settings of problem or solver are
        others, with a warning that names the first of them.

    **Raises:**

    Before the first step `ValueError` for a file that cannot be written, for one that
    another run is writing, and for one that is there beside a `state=` to go on from;
    [`metaopt.CheckpointError`][] for one of another run, and where all that is there is
    damaged.
    """

    opens_first = True

    def __init__(
        self,
        path: str | os.PathLike,
        every: int = 20,
        *,
        seconds: float | None = None,
        allow_changes: bool = False,
    ):
        check_count(every, "every")
        check_tolerance(seconds, "seconds")
        check_flag(allow_changes, "allow_changes")
        self.path = Path(path)
        self.every = every
        self.seconds = seconds
        self.allow_changes = allow_changes
        self._written = 0  # outer steps in the file
        self._written_at = 0.0  # seconds of the run
        self._is_sound = False  # the file, which may then be kept as the previous one
        self._settings = self._command = b""
        self._held = contextlib.ExitStack()  # the lock and the handler of SIGTERM
        self._blocked: ValueError | None = None  # why the file cannot be written
        self._terminated = self._closing = False
        # Of the steps to be written.
        self._kept: tuple[int, Any, Any] = 0, RESULTS.successful, RESULTS.successful

    @property
    def previous(self) -> Path:
        """The file before the last one."""
        return self.path.with_name(self.path.name + ".previous")

    def open(self, run):
        self._written, self._written_at = 0, run.seconds
        self._terminated = self._closing = False
        self._kept = run.num_skipped, run.result, run.reason
        settings = run.settings
        self._settings = json.dumps(settings).encode()
        self._command = present_command()
        self._is_sound = False
        with contextlib.ExitStack() as held:
            self._begin(run, settings, held)
            self._held = held.pop_all()
        self._written = run.num_steps
        self._kept = run.num_skipped, run.result, run.reason

    def _begin(
        self, run: Any, settings: dict[str, str], held: contextlib.ExitStack
    ) -> None:
        """Lock the file, and go on from it if it is there."""
        self._blocked = None
        try:
            check_writable(self.path, "checkpoint")
            # Before the file is read: another run may be about to replace it.
            held.enter_context(locked(self.path, "checkpoint"))
        except ValueError as error:
            self._blocked = error
        # `Path.exists` raises where it may not look.
        there = [path for path in (self.path, self.previous) if os.path.exists(path)]
        if there and run.num_steps:
            raise ValueError(
                f"Both `state` and the checkpoint {self.path} say where to go on from. "
                "Hand over one of them, or name a file that is not there yet."
            )
        if there:
            self._take_up(run, there, settings)
        elif self._blocked is not None:
            raise self._blocked
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, self._on_sigterm)
            if before is not None:  # one of Python
                held.callback(signal.signal, signal.SIGTERM, before)

    def see(self, run):
        if not run.failed:
            self._kept = run.num_skipped, run.result, run.reason
        late = self.seconds is not None and run.seconds - self._written_at >= self.seconds
        new = run.num_steps - run.failed - self._written
        # A run that went back leaves the file behind at once.
        if new < 0 or new >= self.every or (late and new):
            self._write(run)

    def close(self, run):
        self._closing = True
        try:
            if run.num_steps - run.failed != self._written:
                self._write(run)
        finally:
            self._held.close()
            # The other callbacks are closed, and the handler is the one of before.
            if self._terminated:
                self._terminated = False
                signal.raise_signal(signal.SIGTERM)

    def _on_sigterm(self, number: int, frame: Any) -> None:
        first, self._terminated = not self._terminated, True
        if first and not self._closing:
            raise KeyboardInterrupt

    def _write(self, run: Any) -> None:
        history, state = run.history, run.state
        path = jax.tree.leaves(eqx.filter(history.hyper, is_float_array))
        count = len(history) - run.failed
        columns, path = jax.tree.map(lambda a: a[:count], (dict(history.columns), path))
        num_skipped, result, reason = self._kept
        notes = np.asarray(num_skipped), result, reason, _best_or(run)
        settings = np.frombuffer(self._settings, np.uint8)
        command = np.frombuffer(self._command, np.uint8)
        if self._is_sound:
            _keep(self.path, self.previous)
        content = _Content(settings, state, columns, path, *notes, run.undo, command)
        save(self.path, content)
        self._is_sound = True
        self._written = run.num_steps - run.failed
        self._written_at = run.seconds

    def _take_up(self, run: Any, there: list[Path], settings: dict[str, str]) -> None:
        """Go on from the first of these files that is sound."""
        damage: list[UnsoundCheckpointError] = []
        for path in there:
            try:
                content = self._content(run, path, settings)
            except UnsoundCheckpointError as error:
                damage.append(error)
                continue
            self._is_sound = path == self.path
            if not self._is_sound:
                cause = str(damage[0]) if damage else f"{self.path} is not there."
                warn(f"{cause} The run goes on from {path}, which was written before.")
            self._go_on(run, path, content)
            return
        damage[0].add_note(
            "There is no other checkpoint of this run that is sound. To begin anew, move "
            f"away {self.path} and {self.previous}."
        )
        raise damage[0]

    def _content(self, run: Any, file: Path, settings: dict[str, str]) -> "_Content":
        found = read_entry(file, ".settings")
        change = _changed(file, found, settings)
        if change and self.allow_changes:
            warn(f"{change}. The run goes on with that.")
        elif change:
            raise CheckpointError(
                f"{change}. Hand over the same problem and solver, or name another file; "
                "`metaopt.callbacks.Checkpoint(..., allow_changes=True)` goes on with the "
                "change."
            )
        columns: dict[str, np.ndarray] = {}
        undo: Undo | None = None
        path: list[np.ndarray] = []
        command: np.ndarray | None = None
        for name, kind, shape in described(file):
            if match := re.fullmatch(r"\.columns\['(\w+)'\]", name):
                columns[match[1]] = np.zeros(shape, kind)
            elif re.fullmatch(r"\.path\[\d+\]", name):
                path.append(np.zeros(shape, kind))
            elif name == ".command":
                command = np.zeros(shape, kind)
            elif name.startswith(".undo."):
                undo = Undo(run.state, run.state, np.asarray(0))
        success: Any = RESULTS.successful
        notes = np.asarray(0), success, success, _best_or(run)
        return load(file, _Content(found, run.state, columns, path, *notes, undo, command))

    def _go_on(self, run: Any, file: Path, content: "_Content") -> None:
        state = content.state
        if int(state.num_steps) > run.total:
            raise CheckpointError(
                f"{file} has {int(state.num_steps)} steps, and `num_steps` is "
                f"{run.total}. Ask for as many or more, or name another file."
            )
        there, given = (np.asarray(jax.random.key_data(s.key)) for s in (state, run.state))
        if not np.array_equal(there, given):
            raise CheckpointError(
                f"{file} is of a run with another `key`. Hand over the same, or name "
                "another file."
            )
        # A run that has ended is read from anywhere.
        if self._blocked is not None and int(state.num_steps) < run.total:
            raise self._blocked
        run.restore(state, content.columns, content.path)
        run.undo = content.undo
        run.num_skipped = int(content.num_skipped)
        run.result, run.reason = content.result, content.reason
        best = content.best
        if best.step >= 0:
            loss, step = float(best.outer_loss), int(best.step)
            run.best, run.keeps_best = Best(best.hyper, best.params, loss, step), True


class _Content(eqx.Module):
    """The content of a file, whose errors call its arrays by these names."""

    settings: np.ndarray  # of problem and solver, as the bytes of JSON
    state: Any
    columns: dict[str, np.ndarray]  # of the history
    path: list[np.ndarray]  # of `hyper`
    num_skipped: np.ndarray
    result: RESULTS
    reason: RESULTS
    best: Best  # of step -1 where nobody keeps one
    undo: Undo | None  # of `RollBack`
    command: np.ndarray | None  # that started the run, as the bytes of JSON


def _best_or(run: Any) -> Best:
    best = run.best
    if best is None:
        best = Best(run.hyper, run.params, float("nan"), -1)
    numbers = np.asarray(best.outer_loss, np.float64), np.asarray(best.step, np.int64)
    return Best(best.hyper, best.params, *numbers)  # pyright: ignore[reportArgumentType]


def _keep(path: Path, previous: Path) -> None:
    """Give the content of a file another name as well, at once."""
    if previous.exists() and os.path.samefile(path, previous):
        return  # after a write that failed; to rename one onto the other does nothing
    new = previous.with_name(f".{previous.name}.part")
    new.unlink(missing_ok=True)
    try:
        os.link(path, new)
    except OSError:  # not on this disk
        shutil.copyfile(path, new)
    os.replace(new, previous)


def _changed(file: Path, content: np.ndarray, here: dict[str, str]) -> str:
    """The first setting in which a run differs from that in a file, in words."""
    try:
        there = json.loads(content.tobytes())
        found = {str(name): str(value) for name, value in there.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise UnsoundCheckpointError(f"{file} is no sound checkpoint: {error!r}") from error
    change = first_change(found, here)
    return f"{file} is of another run: {change}" if change else ""
