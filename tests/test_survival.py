"""Faults of machines, files and processes, and what runs make of them.

`docs/faults.md` lists them, with the tests here and elsewhere that show the answers.
"""

import ast
import contextlib
import errno
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from metaopt.callbacks import Checkpoint, CSV, JSONLines, Log, Progress
from our_source import MODULES, parse


PROBLEM = mo.BilevelProblem(
    lambda params, hyper, batch: jnp.sum((params - hyper) ** 2),
    lambda params, hyper, batch: jnp.sum((params - 2.0) ** 2),
)
SOLVER = mo.NestedSolver(
    mo.Descent(optax.sgd(0.2), 3), mo.UnrolledAdjoint(), optax.adam(0.1)
)


def solve(num_steps: int, callbacks: Any = (), start: float = 0.0, **options: Any) -> Any:
    return mo.solve_bilevel(
        PROBLEM,
        jnp.full(2, start),
        params=jnp.zeros(2),
        solver=SOLVER,
        num_steps=num_steps,
        callbacks=callbacks,
        **options,
    )


def assert_same(one: Any, other: Any) -> None:
    np.testing.assert_array_equal(one.hyper, other.hyper)
    np.testing.assert_array_equal(one.history.outer_loss, other.history.outer_loss)


# -- checkpoint files that are damaged, or something else


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """The checkpoint of a run of two steps."""
    path = tmp_path_factory.mktemp("sound") / "run"
    solve(2, [Checkpoint(path)])
    return path


def members_of(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def array_file(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def flipped(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 4
    return bytes(changed)


def with_header(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    members = members_of(content)
    with np.load(io.BytesIO(content)) as arrays:
        header = json.loads(arrays["metaopt"].tobytes())
    change(header)
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    return archive_of(members | {"metaopt.npy": array_file(text)})


def swapped(header: dict[str, Any]) -> None:
    rows = header["leaves"]
    names = [row["name"] for row in rows]
    one, other = names.index(".state.hyper"), names.index(".state.params")
    assert rows[one]["shape"] == rows[other]["shape"] == [2]
    rows[one], rows[other] = rows[other], rows[one]


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def claim() -> bytes:
    stream = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**15,)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def checksum_at(content: bytes) -> int:
    """The place of the first checksum in the list at the end of an archive."""
    return content.index(b"PK\1\2") + 16


BOMBS = np.array([_Bomb()] * 40, dtype=object)
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda c: b"", "not a zip file"),
    "cut in the first header": (lambda c: c[:20], "not a zip file"),
    "cut in an array": (lambda c: c[: len(c) // 2], "not a zip file"),
    "cut by one byte": (lambda c: c[:-1], "not a zip file"),
    "tail of zeros": (lambda c: c[:-900] + bytes(900), "not a zip file"),
    "flipped bit in a header": (
        lambda c: flipped(c, c.index(b"\x93NUMPY") + 8),
        "no sound checkpoint",
    ),
    "flipped bit in an array": (lambda c: flipped(c, c.index(b"solver.outer")), "Bad CRC"),
    "flipped bit in a checksum": (lambda c: flipped(c, checksum_at(c)), "Bad CRC"),
    "random bytes": (lambda c: np.random.default_rng(0).bytes(len(c)), "not a zip file"),
    "wrong magic": (lambda c: b"MZ" + c[2:], "no sound checkpoint"),
    "web page": (lambda c: b"<!DOCTYPE html><html></html>", "a web page"),
    "pickle that runs code": (lambda c: pickle.dumps(_Bomb()), "not a zip file"),
    "array of objects": (
        lambda c: archive_of(members_of(c) | {"0.npy": array_file(BOMBS)}),
        "holds pickled Python objects",
    ),
    "header that claims 1e15 items": (
        lambda c: archive_of(members_of(c) | {"0.npy": claim()}),
        r"claims shape \(1000000000000000,\)",
    ),
    "newer version": (
        lambda c: with_header(c, lambda header: header.update(version=99)),
        "has version 99 of the format; this metaopt reads 1",
    ),
    "swapped leaves of one shape": (
        lambda c: with_header(c, swapped),
        "holds its arrays in another order",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_run_refuses_a_file_that_is_damaged(kind, sound, tmp_path, monkeypatch):
    change, reason = DAMAGE[kind]
    path = tmp_path / "run"
    content = change(sound.read_bytes())
    assert content != sound.read_bytes()
    path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(mo.CheckpointError, match=reason) as caught:
            solve(4, [Checkpoint(path)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    # A file is no reason to take memory, to run code, or to write anything.
    assert peak < 20 * 1024**2
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_damage_of_these_files_is_all_that_is_wrong_with_them(sound, tmp_path):
    content = sound.read_bytes()
    (tmp_path / "run").write_bytes(archive_of(members_of(content)))
    assert_same(solve(4, [Checkpoint(tmp_path / "run")]), solve(4))
    (tmp_path / "again").write_bytes(with_header(content, lambda header: None))
    assert_same(solve(4, [Checkpoint(tmp_path / "again")]), solve(4))


def test_a_folder_in_place_of_the_file_is_named(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    with pytest.raises(mo.CheckpointError, match=f"{path}.*Is a directory"):
        solve(2, [Checkpoint(path)])
    assert list(tmp_path.iterdir()) == [path]
    assert list(path.iterdir()) == []


# -- disks and folders


@contextlib.contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """Limit the size of the files that this process writes: a disk that is full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_error_of_a_full_disk_is_not_hidden(tmp_path):
    # That of closing the archive came after it, and was the one that was raised.
    path = tmp_path / "file"
    before, after = [np.zeros(10)] * 3, [np.zeros(10**5)] * 3
    mo.save(path, before)
    with pytest.raises(OSError, match="File too large"), files_up_to(10**6):
        mo.save(path, after)
    np.testing.assert_array_equal(mo.load(path, before), before)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_error_of_too_little_memory_is_not_hidden(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise MemoryError("mine")

    monkeypatch.setattr(np.lib.format, "write_array", fails)
    with pytest.raises(MemoryError, match="mine"):
        mo.save(tmp_path / "file", np.zeros(3))
    assert list(tmp_path.iterdir()) == []


def test_arrays_are_copied_one_at_a_time(tmp_path):
    # All of them were, twice: near the limit, the checkpoint ended the run.
    tree = [np.zeros(10**6) for _ in range(5)]
    tracemalloc.start()
    try:
        mo.save(tmp_path / "file", tree)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3.5 * tree[0].nbytes


def test_a_full_disk_ends_a_run_with_what_it_has_reached(tmp_path):
    path = tmp_path / "run"
    solve(2, [Checkpoint(path, every=1)])
    content = path.read_bytes()
    limit = files_up_to(len(content) // 2)

    class Full(mo.callbacks.AbstractCallback):
        def see(self, run):
            if run.num_steps == 3:
                limit.__enter__()

    try:
        with pytest.raises(OSError, match="File too large") as caught:
            solve(6, [Full(), Checkpoint(path, every=1)])
    finally:
        limit.__exit__(None, None, None)
    reached: Any = caught.value
    assert len(reached.solution.history) == 3
    assert path.read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.previous"]
    assert_same(solve(6, [Checkpoint(path)]), solve(6))


@pytest.fixture
def read_only(monkeypatch) -> Callable[[Path], None]:
    """A function that makes a folder one on a read-only disk, for the superuser too."""

    def make(folder: Path) -> None:
        opens = os.open

        def refuses(path, flags, *args, **kwargs):
            if flags & os.O_CREAT and Path(path).is_relative_to(folder):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return opens(path, flags, *args, **kwargs)

        monkeypatch.setattr(os, "open", refuses)

    return make


@pytest.mark.parametrize("where", ["below a file", "/proc", "read-only disk"])
def test_places_that_cannot_be_written_are_named_before_the_first_step(
    where, tmp_path, read_only
):
    (tmp_path / "file").write_text("text")
    folder = {"below a file": tmp_path / "file", "/proc": Path("/proc/metaopt")}
    path = folder.get(where, tmp_path / "folder") / "run"
    if where == "/proc" and not Path("/proc").is_dir():
        pytest.skip("there is no /proc")
    if where == "read-only disk":
        read_only(tmp_path)
    steps = []
    with pytest.raises(ValueError, match=f"checkpoint {path} cannot be written"):
        solve(2, [Checkpoint(path), lambda run: steps.append(run.num_steps)])
    assert steps == []
    with pytest.raises(ValueError, match="cannot be written"):
        CSV(path)


@pytest.mark.skipif(os.name != "posix", reason="makes a pipe with a name")
def test_devices_are_not_replaced(tmp_path):
    # A checkpoint to `/dev/null` would have put a file in its place, for everybody.
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(OSError, match="it is a device or a pipe"):
        mo.save(path, np.zeros(3))
    with pytest.raises(ValueError, match="it is a device or a pipe"):
        CSV(path)
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_that_has_ended_is_read_from_a_read_only_disk(sound, tmp_path, read_only):
    path = tmp_path / "run"
    shutil.copyfile(sound, path)
    read_only(tmp_path)
    assert_same(solve(2, [Checkpoint(path)]), solve(2))
    with pytest.raises(ValueError, match="cannot be written: .*Read-only file system"):
        solve(4, [Checkpoint(path)])


# -- logs


class Failing:
    """A writer that fails at some steps, after half of a row or before."""

    def __init__(self, steps: set[int]):
        self.steps, self.rows = steps, []

    def log(self, row: dict[str, float], *, step: int) -> None:
        if step in self.steps:
            self.steps.discard(step)
            raise ConnectionError("the server is away")
        self.rows.append(step)


@pytest.mark.parametrize("steps_per_call", [1, 3])
def test_a_log_that_fails_ends_no_run(steps_per_call):
    # The error of the writer once ended a run of hours.
    writer = Failing({2, 5, 6})
    with pytest.warns(
        UserWarning, match="log of step 2 .*`Failing`.*server is away"
    ) as seen:
        solution = solve(7, [Log(writer)], steps_per_call=steps_per_call)
    assert len(seen) == 1
    assert_same(solution, solve(7))
    if steps_per_call == 1:
        assert writer.rows == list(range(7))  # those that failed, once they can be written


def test_a_log_that_fails_to_the_end_ends_no_run():
    class Broken:
        def add_scalar(self, name, value, step):
            raise RuntimeError("mine")

    with pytest.warns(UserWarning, match="mine") as seen:
        solution = solve(3, [Log(Broken())])
    assert len(seen) == 1 and len(solution.history) == 3


@pytest.mark.parametrize("kind", [CSV, JSONLines])
def test_a_log_on_a_full_disk_holds_whole_rows(kind, tmp_path):
    path = tmp_path / "log"
    writer = kind(path)
    writer.begin(0)
    writer.log({"a": 0.125, "b": 1.5}, step=0)
    content = path.read_bytes()
    with files_up_to(len(content) + 5), pytest.raises(OSError, match="File too large"):
        writer.log({"a": 0.25, "b": 2.5}, step=1)
    with files_up_to(len(content) + 5), pytest.raises(OSError, match="File too large"):
        writer.log({"a": 0.25, "c": 2.5}, step=1)
    assert path.read_bytes() == content
    writer.log({"a": 0.25, "b": 2.5}, step=1)
    lines = path.read_text().splitlines()
    assert lines[-1].replace(" ", "") in ("1,0.25,2.5", '{"step":1,"a":0.25,"b":2.5}')


def test_numbers_that_are_not_finite_are_null_in_the_log_of_a_run(tmp_path):
    problem = mo.BilevelProblem(PROBLEM.inner, lambda p, h, b: jnp.sum(p) * jnp.inf)
    path = tmp_path / "log"
    solution = mo.solve_bilevel(
        problem,
        jnp.ones(2),
        params=jnp.ones(2),
        solver=SOLVER,
        num_steps=2,
        callbacks=[Log(JSONLines(path))],
        throw=False,
    )
    assert not np.isfinite(solution.history.outer_loss).any()

    def refuses(constant):
        raise AssertionError(constant)

    lines = path.read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuses) for line in lines]
    assert [row["outer_loss"] for row in rows] == [None, None]


# -- terminals and interrupts


class Gone(io.StringIO):
    """A terminal that is closed after some characters."""

    def __init__(self, room: int, error: Exception):
        io.StringIO.__init__(self)
        self.room, self.error = room, error

    def write(self, text: str) -> int:
        self.room -= len(text)
        if self.room < 0:
            raise self.error
        return io.StringIO.write(self, text)


@pytest.mark.parametrize("room", [0, 150, 10**6])
@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(), OSError(errno.ENOSPC, "full"), ValueError("closed file")],
    ids=lambda error: type(error).__name__,
)
def test_a_progress_bar_without_a_terminal_ends_no_run(room, error, monkeypatch):
    stream = Gone(room, error)
    monkeypatch.setattr(sys, "stderr", stream)
    solution = solve(4, [Progress()])
    monkeypatch.undo()
    assert_same(solution, solve(4))
    assert ("The evaluation took" in stream.getvalue()) == (room == 10**6)


def test_a_progress_bar_without_standard_error_ends_no_run(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    solution = solve(4, [Progress()])
    monkeypatch.undo()
    assert_same(solution, solve(4))


def test_an_interrupt_within_a_compiled_call_ends_the_run_after_it(tmp_path, capsys):
    path, size = tmp_path / "run", 2000
    timers = []

    def interrupt_later(run):
        if run.num_steps == size:  # the program is compiled: the next call only computes
            timers.append(threading.Timer(0.01, signal.raise_signal, [signal.SIGINT]))
            timers[0].start()

    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        solution = solve(
            10**9,
            [Checkpoint(path, every=10**9), Progress(), interrupt_later],
            steps_per_call=size,
        )
    finally:
        signal.signal(signal.SIGINT, old)
        timers[0].join()
    assert solution.ended_by == "an interrupt"
    steps = len(solution.history)
    assert steps >= size and steps % size == 0
    assert capsys.readouterr().err.count("\n") >= 2  # the bar is closed
    # The file has the last step, and the run goes on from it.
    assert_same(solve(steps, [Checkpoint(path)]), solution)
    more = solve(steps + size, [Checkpoint(path)], steps_per_call=size)
    assert_same(more, solve(steps + size, steps_per_call=size))


# -- threads


@pytest.mark.ci
def test_threads_that_share_a_solver_give_the_numbers_of_one():
    def both(start: float) -> tuple[np.ndarray, ...]:
        solution = solve(4, [mo.callbacks.KeepBest()], start=start)
        found, _ = mo.hypergradient(
            PROBLEM,
            jnp.full(2, start),
            params=jnp.zeros(2),
            inner=SOLVER.inner,
            adjoint=SOLVER.adjoint,
        )
        return solution.hyper, solution.history.outer_loss, found

    starts = [0.5 * i for i in range(8)]
    jax.clear_caches()  # threads compile, too
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(both, starts))
    for start, found in zip(starts, together):
        for one, other in zip(found, both(start)):
            np.testing.assert_array_equal(one, other)
    assert len({found[1].tobytes() for found in together}) == len(starts)


def test_a_run_with_every_callback_in_another_thread(tmp_path):
    # Python sets the handlers of signals in its main thread alone.
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def run(num_steps: int) -> Any:
        callbacks = [
            Progress(),
            Checkpoint(tmp_path / "run", every=1),
            mo.callbacks.KeepBest(),
            mo.callbacks.StopEarly(patience=100),
            Log(CSV(tmp_path / "log")),
        ]
        return solve(num_steps, callbacks)

    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(run, 3).result()
        second = thread.submit(run, 6).result()
    assert_same(second, solve(6))
    assert first.ended_by == second.ended_by == "`num_steps`"
    assert len((tmp_path / "log").read_text().splitlines()) == 7
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]


def test_threads_draw_the_tasks_of_one(get_key):
    data = mo.datasets.ClassData(jax.random.normal(get_key(), (6, 8, 2)))
    episodes = mo.few_shot.HostEpisodes(data, 3, 2, 2, num_tasks=2, seed=5)
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(episodes.batch, range(12)))
    for index, found in enumerate(together):
        leaves = jax.tree.leaves((found, episodes.batch(index)))
        half = len(leaves) // 2
        for one, other in zip(leaves[:half], leaves[half:]):
            np.testing.assert_array_equal(one, other)


# -- versions, absent packages and memory, in a process of its own


_PROCESS = textwrap.dedent(
    """
    import sys
    import jax
    jax.config.update("jax_platforms", "cpu")
    import jaxlib.version

    # A release that computes wrong numbers.
    version = jaxlib.version.__version__
    jaxlib.version.__version__ = "0.10.2"
    try:
        import metaopt
    except RuntimeWarning as warning:  # an error under `-W error`
        print("warned:", warning)
    for name in [name for name in sys.modules if name.split(".")[0] == "metaopt"]:
        del sys.modules[name]
    jaxlib.version.__version__ = version

    # No jaxopt.
    sys.modules["jaxopt"] = None
    import jax.numpy as jnp, optax
    import metaopt as mo
    from metaopt.__main__ import main

    problem = mo.BilevelProblem(
        lambda p, h, b: jnp.sum((p - h) ** 2) + 0.0 * jnp.sum(b),
        lambda p, h, b: jnp.sum((p - 2.0) ** 2),
    )
    solver = mo.NestedSolver(
        mo.Descent(optax.sgd(0.2), 3), mo.ImplicitAdjoint(inner_rtol=jnp.inf),
        optax.adam(0.1),
    )

    def solve(rows, callbacks=()):
        return mo.solve_bilevel(
            problem, jnp.zeros(2), rows, params=jnp.zeros(2), solver=solver, num_steps=2,
            callbacks=callbacks,
        )

    print("solved:", len(solve(jnp.zeros(2)).history))
    try:
        mo.JaxoptSolver("GradientDescent")
    except ImportError as error:
        print("absent:", error)
    print("check:", main(["check"]))

    # Too little memory.
    try:
        import resource
    except ImportError:
        sys.exit()
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limit = used + 512 * 1024**2
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for make in (lambda: jnp.zeros(10**9), None):
        try:
            if make is None:
                rows = jnp.zeros(50_000_000)
                grow = mo.BilevelProblem(
                    lambda p, h, b: jnp.sum((p - h) ** 2),
                    lambda p, h, b: jnp.sum(jnp.sort(b * p[0])[::2]),
                )
                mo.solve_bilevel(
                    grow, jnp.zeros(2), None, rows, params=jnp.ones(2), solver=solver,
                    num_steps=2,
                )
            else:
                solve(make())
        except (MemoryError, RuntimeError) as error:
            print("memory:", type(error).__name__, error, *getattr(error, "__notes__", []))
    print("goes on:", len(solve(jnp.zeros(2)).history))
    """
)


@pytest.mark.ci
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_process_with_a_bad_jaxlib_no_jaxopt_strict_warnings_and_little_memory():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _PROCESS],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert "jaxlib 0.10.2 computes wrong numbers" in lines["warned"]
    assert "pip install" in lines["warned"]
    assert lines["solved"] == lines["goes on"] == "2"
    assert lines["absent"] == "`metaopt.JaxoptSolver` needs jaxopt: `pip install jaxopt`."
    assert lines["check"] == "0"
    assert "Out of memory" in lines["memory"]
    assert "metaopt.memory.memory_report" in lines["memory"]


# -- nothing that runs code


def dangers(tree: ast.AST) -> Iterator[str]:
    """Where a module may run the content of a file, or unpack an archive to disk."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                imported = [alias.name for alias in names]
            case ast.ImportFrom(module=str(name)):
                imported = [name]
            case _:
                imported = []
        yield from {"pickle", "tarfile", "marshal", "shelve"}.intersection(imported)
        match node:
            case (
                ast.Name(id="eval" | "exec" as name)
                | ast.Attribute(attr="extractall" | "extract" as name)
            ):
                yield name
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                yield "allow_pickle"


@pytest.mark.parametrize("name", MODULES)
def test_modules_run_no_content_of_files(name):
    assert list(dangers(parse(MODULES[name]))) == []


def test_dangers_are_seen():
    text = "import os, pickle\neval(x)\nz.extractall()\nnp.load(x, allow_pickle=True)"
    assert sorted(dangers(ast.parse(text))) == [
        *("allow_pickle", "eval", "extractall", "pickle"),
    ]
