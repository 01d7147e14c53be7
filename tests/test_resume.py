"""Runs that are cut off by kills, signals and damaged files, and go on."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kill_runs
import metaopt as mo
from metaopt._core._description import description, first_change
from metaopt._core._lock import locked
from metaopt._outer._interrupts import Interrupts
from metaopt.callbacks import Checkpoint


PROBLEM = mo.BilevelProblem(
    lambda params, hyper, batch: jnp.sum((params - hyper) ** 2),
    lambda params, hyper, batch: jnp.sum((params - 2.0) ** 2),
)


def solve(
    num_steps: int,
    path: Path,
    every: int = 2,
    rate: Any = 0.1,
    more: Any = (),
    hyper: Any = None,
    state: Any = None,
    **options: Any,
) -> Any:
    solver = mo.NestedSolver(
        mo.Descent(optax.sgd(0.2), 3), mo.UnrolledAdjoint(), optax.adam(rate)
    )
    checkpoint = mo.callbacks.Checkpoint(path, every=every, **options)
    return mo.solve_bilevel(
        PROBLEM,
        jnp.zeros(2) if hyper is None else hyper,
        params=jnp.zeros(2),
        solver=solver,
        num_steps=num_steps,
        callbacks=[checkpoint, *more],
        state=state,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return solve(6, tmp_path_factory.mktemp("whole") / "run")


def assert_whole(solution, whole):
    np.testing.assert_array_equal(solution.hyper, whole.hyper)
    np.testing.assert_array_equal(solution.history.outer_loss, whole.history.outer_loss)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"solver.outer")] ^= 1  # within an array
    path.write_bytes(bytes(content))


# -- files


def test_the_file_before_the_last_one_is_kept(tmp_path):
    path, previous = tmp_path / "run", tmp_path / "run.previous"
    solve(2, path)
    assert path.exists() and not previous.exists()
    first = path.read_bytes()
    solve(4, path)
    assert previous.read_bytes() == first != path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.previous"]


@pytest.mark.parametrize("kind", ["flipped bit", "cut short", "empty", "gone"])
def test_a_damaged_file_is_passed_over(tmp_path, whole, kind):
    path, previous = tmp_path / "run", tmp_path / "run.previous"
    solve(4, path)
    before = previous.read_bytes()
    if kind == "flipped bit":
        damage(path)
    elif kind == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.warns(UserWarning, match="goes on from .*run.previous, which"):
        again = solve(6, path, every=100)
    # The sound file has not given its place to the damaged one.
    assert previous.read_bytes() == before
    assert_whole(again, whole)


def test_damage_of_all_files_is_named(tmp_path):
    path, previous = tmp_path / "run", tmp_path / "run.previous"
    solve(4, path)
    damage(path)
    damage(previous)
    contents = path.read_bytes(), previous.read_bytes()
    with pytest.raises(mo.CheckpointError, match="run is no sound checkpoint") as caught:
        solve(6, path)
    assert f"move away {path} and {previous}" in caught.value.__notes__[0]
    assert contents == (path.read_bytes(), previous.read_bytes())


def test_other_settings_are_named(tmp_path, whole):
    path = tmp_path / "run"
    solve(4, path)
    with pytest.raises(mo.CheckpointError, match=r"`solver.outer.* was -0.1 and is -0.2"):
        solve(6, path, rate=0.2)
    with pytest.warns(UserWarning, match=r"was -0.1 and is -0.2. The run goes on"):
        changed = solve(6, path, rate=0.2, allow_changes=True)
    np.testing.assert_array_equal(
        changed.history.outer_loss[:4], whole.history.outer_loss[:4]
    )
    assert changed.history.outer_loss[5] != whole.history.outer_loss[5]


def test_a_schedule_whose_settings_change_their_type_goes_on(tmp_path):
    # The first call of it makes the 10 that it closes over 10.0.
    rate = optax.cosine_decay_schedule(0.1, 10)
    solve(2, tmp_path / "run", rate=rate)
    assert_whole(
        solve(4, tmp_path / "run", rate=rate), solve(4, tmp_path / "other", rate=rate)
    )
    with pytest.raises(mo.CheckpointError, match=r"decay_steps` was 10(\.0)? and is 11"):
        solve(6, tmp_path / "run", rate=optax.cosine_decay_schedule(0.1, 11))
    # Floats cannot tell these apart.
    assert first_change({"seed": str(2**53 + 1)}, {"seed": str(2**53)}) != ""


def test_a_full_disk_leaves_the_old_file(tmp_path, whole, monkeypatch):
    path = tmp_path / "run"
    solve(2, path)
    content = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        solve(6, path)
    error: Any = caught.value
    assert path.read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.previous"]
    monkeypatch.undo()
    assert len(error.solution.history) == 4  # and what was reached is there
    assert_whole(solve(6, path), whole)


def test_two_runs_do_not_write_one_file(tmp_path):
    path = tmp_path / "run"

    class Second(mo.callbacks.AbstractCallback):
        def see(self, run):
            if run.num_steps == 2:
                with pytest.raises(ValueError, match="Another run writes the checkpoint"):
                    solve(6, path)

    solve(3, path, more=[Second()])
    solve(4, path)  # after its end


def test_the_file_is_locked_before_it_is_read(tmp_path, whole, monkeypatch):
    # Another run could replace it in between, and was then overwritten.
    path, tries = tmp_path / "run", []
    solve(2, path)
    content = Checkpoint._content

    def looks(self, run, file, settings):
        with pytest.raises(ValueError, match="Another run writes the checkpoint"):
            with locked(path, "checkpoint"):
                tries.append("locked twice")
        tries.append("locked")
        return content(self, run, file, settings)

    monkeypatch.setattr(Checkpoint, "_content", looks)
    assert_whole(solve(6, path), whole)
    assert tries == ["locked"]


def test_the_lock_is_released_where_a_run_does_not_begin(tmp_path, whole):
    # It was held until the end of the process.
    path = tmp_path / "run"
    solve(2, path)
    content = path.read_bytes()
    handler = signal.getsignal(signal.SIGTERM)
    state = solve(2, tmp_path / "other").state
    with pytest.raises(mo.CheckpointError, match="of another run"):
        solve(6, path, rate=0.2)
    with pytest.raises(ValueError, match="Both `state` and the checkpoint"):
        solve(6, path, state=state)
    with pytest.raises(ZeroDivisionError):
        solve(6, path, more=[FailsToOpen()])
    path.write_bytes(b"")
    with pytest.raises(mo.CheckpointError, match="no sound checkpoint"):
        solve(6, path)
    path.write_bytes(content)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not (tmp_path / ".run.lock").exists()
    with locked(path, "checkpoint"):
        pass
    assert_whole(solve(6, path), whole)


class FailsToOpen(mo.callbacks.AbstractCallback):
    def open(self, run):
        raise ZeroDivisionError


def test_a_run_that_has_ended_is_read_beside_one_that_writes(tmp_path):
    path = tmp_path / "run"
    ended = solve(2, path)
    with locked(path, "checkpoint"):
        assert_whole(solve(2, path), ended)
        with pytest.raises(ValueError, match="Another run writes the checkpoint"):
            solve(4, path)
    assert len(solve(4, path).history) == 4


def test_a_lock_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / ".run.lock").mkdir()
    with pytest.raises(ValueError, match=r"cannot be locked: .*\.run\.lock.*Remove that"):
        solve(2, tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == [".run.lock"]


def test_remains_of_a_process_that_was_killed_are_removed(tmp_path):
    path = tmp_path / "run"
    others = [".run.b.lock", ".run.b.abcd_123.part", ".run.yaml", ".runs.abcd_123.part"]
    for name in (".run.abcd_123.part", *others):
        (tmp_path / name).write_text("text")
    (tmp_path / ".run.d").mkdir()
    solve(2, path)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == sorted([*others, ".run.d", "run"])


def test_another_start_is_named(tmp_path):
    path = tmp_path / "run"
    solve(2, path)
    with pytest.raises(mo.CheckpointError, match="`hyper` was array .* and is array"):
        solve(4, path, hyper=jnp.ones(2))


def test_written_after_a_time(tmp_path):
    steps = []

    class Look(mo.callbacks.AbstractCallback):
        def see(self, run):
            steps.append(path.exists())

    solver = mo.NestedSolver(
        mo.Descent(optax.sgd(0.2), 3), mo.UnrolledAdjoint(), optax.adam(0.1)
    )
    for name, seconds in (("first", 0.0), ("second", 1e6)):
        path = tmp_path / name
        mo.solve_bilevel(
            PROBLEM,
            jnp.zeros(2),
            params=jnp.zeros(2),
            solver=solver,
            num_steps=2,
            callbacks=[mo.callbacks.Checkpoint(path, 100, seconds=seconds), Look()],
        )
    assert steps == [False, True, False, False]  # before the checkpoint sees a step


class Loader:
    """Batches in the same order whenever it is started, five of them."""

    def __iter__(self):
        return (jnp.full(2, 0.1 * index) for index in range(5))


def test_a_loader_goes_on_where_it_was(tmp_path):
    problem = mo.BilevelProblem(
        PROBLEM.inner, lambda params, hyper, batch: jnp.sum((params - batch) ** 2)
    )

    def run(num_steps, data, callbacks=(), **options):
        solver = mo.NestedSolver(
            mo.Descent(optax.sgd(0.2), 3), mo.UnrolledAdjoint(), optax.adam(0.1)
        )
        return mo.solve_bilevel(
            problem,
            jnp.zeros(2),
            None,
            data,
            params=jnp.zeros(2),
            solver=solver,
            num_steps=num_steps,
            callbacks=callbacks,
            **options,
        )

    whole = run(13, Loader())
    assert len(np.unique(whole.history.outer_loss)) == 13
    checkpoint = lambda: [mo.callbacks.Checkpoint(tmp_path / "run")]
    first = run(7, Loader(), checkpoint())
    assert_whole(run(13, Loader(), checkpoint(), steps_per_call=4), whole)
    np.testing.assert_array_equal(run(13, Loader(), state=first.state).hyper, whole.hyper)
    # With nothing left to do, the evaluation at the end sees the same batch.
    again = run(13, Loader(), checkpoint())
    assert again.outer_loss == whole.outer_loss
    # An iterator is where its owner has left it.
    batches = lambda: (batch for _ in range(3) for batch in Loader())
    begun = batches()
    first = run(7, itertools.islice(begun, 7))
    np.testing.assert_array_equal(run(13, begun, state=first.state).hyper, whole.hyper)


# -- descriptions


def test_settings_are_described_as_in_another_process():
    rate = jnp.array([1.0, 2.0])
    loss = lambda params: rate * params
    rows = description({"transform": optax.sgd(0.1), "loss": loss, "text": "a"}, "x")
    assert rows["x['text']"] == "'a'"
    assert rows["x['loss']"].startswith("test_resume.test_settings_are_described")
    assert "array of shape (2,)" in rows["x['loss'].rate"]
    assert "-0.1" in rows.values()
    assert not any("0x" in value for value in rows.values())  # an address
    defaults = lambda params, weight=2.0, *, shift=3.0: params
    rows_of_defaults = description(jax.jit(defaults), "f")
    assert rows_of_defaults["f.__wrapped__.__defaults__[0]"] == "2.0"
    assert rows_of_defaults["f.__wrapped__.shift"] == "3.0"
    other = description({"transform": optax.sgd(0.2), "loss": loss, "text": "a"}, "x")
    assert {name for name in rows if rows[name] != other[name]} != set()


def test_functions_that_call_each_other_are_described_once():
    def first(x):
        return second(x) + first(x)

    def second(x):
        return first(x) + second(x) + third(x)

    def third(x):
        return first(x) + second(x)

    rows = description([first, second, third], "functions")
    assert len(rows) < 60 and "itself" in rows.values()


@dataclasses.dataclass(frozen=True, slots=True)
class SlottedLoss:
    weight: float

    def __call__(self, params, hyper, batch):
        return self.weight * jnp.sum((params - 2.0) ** 2)


class Slots:
    __slots__ = "__hidden", "late", "value"

    def __init__(self, value: float):
        self.__hidden, self.value = 2 * value, value


class MoreSlots(Slots):
    __slots__ = ("more", "__dict__")


def test_objects_with_slots_are_described(tmp_path):
    # They have no dictionary of attributes, which was a `TypeError`.
    x = MoreSlots(1.5)
    x.more, vars(x)["other"] = [3.5], "text"
    rows = description(x, "x")
    assert rows == {
        "x": "MoreSlots",
        "x._Slots__hidden": "3.0",
        "x.value": "1.5",
        "x.more": "list of length 1",
        "x.more[0]": "3.5",
        "x.other": "'text'",
    }
    assert description(SlottedLoss(0.5), "x") == {"x": "SlottedLoss", "x.weight": "0.5"}

    def run(weight: float, num_steps: int) -> Any:
        return mo.solve_bilevel(
            mo.BilevelProblem(PROBLEM.inner, SlottedLoss(weight)),
            jnp.zeros(2),
            params=jnp.zeros(2),
            solver=mo.NestedSolver(
                mo.Descent(optax.sgd(0.2), 3), mo.UnrolledAdjoint(), optax.adam(0.1)
            ),
            num_steps=num_steps,
            callbacks=[Checkpoint(tmp_path / "run")],
        )

    run(1.0, 1)
    assert len(run(1.0, 2).history) == 2
    with pytest.raises(mo.CheckpointError, match="weight` was 1.0 and is 2.0"):
        run(2.0, 2)


def test_long_chains_of_objects_are_described_to_some_depth():
    # Deeper than the stack of Python, which was a `RecursionError`.
    def chain(last: str, length: int) -> Any:
        node = Slots(0.0)
        node.late = last
        for _ in range(length):
            outer = Slots(0.0)
            outer.late = node
            node = outer
        return lambda params: node

    deep, others = description(chain("a", 5000), "f"), description(chain("b", 5000), "f")
    assert deep == others and "too deep to be described" in deep.values()
    # Shorter ones are told from each other.
    assert description(chain("a", 200), "f") != description(chain("b", 200), "f")
    nested: Any = []
    for _ in range(5000):
        nested = [nested]
    assert "too deep to be described" in description(nested, "x").values()


# -- signals


def test_an_interrupt_waits_until_a_step_is_recorded():
    done = []
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            with (interrupts := Interrupts()).caught():
                with interrupts.held_back():
                    signal.raise_signal(signal.SIGINT)
                    done.append("recorded")
                done.append("not reached")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt):
            with Interrupts().caught():
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, old)
    assert done == ["recorded"]


def test_runs_in_other_threads_handle_no_signal(tmp_path, whole):
    out = []
    thread = threading.Thread(target=lambda: out.append(solve(6, tmp_path / "run")))
    thread.start()
    thread.join()
    assert_whole(out[0], whole)


_RUN = textwrap.dedent(
    """
    import sys, time
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp, optax
    import metaopt as mo
    problem = mo.BilevelProblem(
        lambda p, h, b: jnp.sum((p - h) ** 2), lambda p, h, b: jnp.sum((p - 2.0) ** 2)
    )
    solver = mo.NestedSolver(
        mo.Descent(optax.sgd(0.2), 3), mo.UnrolledAdjoint(), optax.adam(0.1)
    )

    def tell(run):
        print("step", run.num_steps, flush=True)
        time.sleep(0.01)

    class Closed(mo.callbacks.AbstractCallback):
        def close(self, run):
            print("closed", flush=True)

    mo.solve_bilevel(
        problem, jnp.zeros(2), params=jnp.zeros(2), solver=solver, num_steps=10**6,
        callbacks=[Closed(), mo.callbacks.Checkpoint(sys.argv[1], every=10**6), tell],
    )
    print("returned", flush=True)
    """
)


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_sigterm_during_the_last_write_is_passed_on(tmp_path, whole, monkeypatch):
    received = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    fsync = os.fsync

    def interrupted(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        signal.raise_signal(signal.SIGTERM)
        fsync(descriptor)

    try:
        monkeypatch.setattr(os, "fsync", interrupted)
        solution = solve(6, tmp_path / "run", every=100)
    finally:
        signal.signal(signal.SIGTERM, old)
    assert received == [signal.SIGTERM]
    assert_whole(solution, whole)
    assert_whole(solve(6, tmp_path / "run"), whole)


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_sigterm_saves_and_ends_the_process(tmp_path, whole):
    path = tmp_path / "run"
    run = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    while run.stdout.readline() != "step 3\n":
        assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    output, error = run.communicate(timeout=60)
    assert run.returncode == -signal.SIGTERM, error
    assert output.endswith("closed\n")  # the other callbacks too, and nothing after them
    with pytest.warns(UserWarning, match="`problem.inner.loss_fn` was __main__"):
        reached = solve(10**6, path, allow_changes=True, more=[lambda run: True])
    assert len(reached.history) >= 4
    np.testing.assert_array_equal(
        reached.history.outer_loss[:3], whole.history.outer_loss[:3]
    )


# -- kills


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills processes")
@pytest.mark.parametrize("kind", list(kill_runs.KINDS))
def test_a_run_that_is_killed_ends_as_one_that_is_not(kind):
    assert kill_runs.compare(kind, num_kills=2, seed=1)
