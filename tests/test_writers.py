"""Files of scalars."""

import csv
import json
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from metaopt.callbacks import Checkpoint, CSV, JSONLines, Log


PROBLEM = mo.BilevelProblem(
    lambda params, hyper, batch: jnp.sum((params - hyper) ** 2),
    lambda params, hyper, batch: jnp.sum((params - 2.0) ** 2),
)


def solve(num_steps: int, callbacks: Any, **options: Any):
    return mo.solve_bilevel(
        PROBLEM,
        jnp.zeros(2),
        params=jnp.zeros(2),
        solver=mo.NestedSolver(
            mo.Descent(optax.sgd(0.2), 3), mo.UnrolledAdjoint(), optax.sgd(0.1)
        ),
        num_steps=num_steps,
        callbacks=callbacks,
        **options,
    )


def rows_of(path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        number = lambda text: math.nan if text == "" else float(text)
        return [{name: number(text) for name, text in row.items()} for row in rows]
    return [json.loads(line) for line in path.read_text().splitlines()]


WRITERS = {"run.csv": CSV, "run.jsonl": JSONLines}
each_writer = pytest.mark.parametrize("name", list(WRITERS))


@each_writer
def test_files_have_the_history(tmp_path, name):
    path = tmp_path / "folder" / name
    solution = solve(5, [Log(WRITERS[name](path))], steps_per_call=2)
    rows = rows_of(path)
    assert [row["step"] for row in rows] == list(range(5))
    for column, values in solution.history.columns.items():
        found = np.array([row[column] for row in rows], values.dtype)
        np.testing.assert_array_equal(found, values)


@each_writer
def test_steps_that_are_taken_again_are_replaced(tmp_path, name):
    path = tmp_path / name

    def callbacks():
        checkpoint = Checkpoint(tmp_path / "checkpoint", every=4)
        return [checkpoint, Log(WRITERS[name](path)), fails]

    def fails(run):
        if run.num_steps == 6 and not (tmp_path / "failed").exists():
            (tmp_path / "failed").touch()
            (tmp_path / "kept").write_bytes((tmp_path / "checkpoint").read_bytes())
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        solve(8, callbacks())
    assert len(rows_of(path)) == 6
    # A crash leaves the checkpoint of step 4 behind, and half a line.
    (tmp_path / "checkpoint").write_bytes((tmp_path / "kept").read_bytes())
    path.write_bytes(path.read_bytes()[:-7])
    solution = solve(8, callbacks())
    rows = rows_of(path)
    assert [row["step"] for row in rows] == list(range(8))
    losses = [row["outer_loss"] for row in rows]
    np.testing.assert_array_equal(losses, solution.history.outer_loss)


@each_writer
def test_rows_that_an_error_of_another_callback_hides_are_written(tmp_path, name):
    path = tmp_path / name

    def fails(run):
        if run.num_steps == 4:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        solve(8, [fails, Log(WRITERS[name](path))], steps_per_call=2)
    assert [row["step"] for row in rows_of(path)] == [0, 1, 2, 3]


@each_writer
def test_a_row_that_was_cut_short_is_dropped(tmp_path, name):
    path = tmp_path / name
    writer = WRITERS[name](path)
    writer.begin(0)
    for step in range(3):
        writer.log({"a": 123.456}, step=step)
    path.write_bytes(path.read_bytes()[:-3])  # within the last number, or the last line
    WRITERS[name](path).begin(3)
    assert [row["step"] for row in rows_of(path)] == [0, 1]


@each_writer
def test_the_file_of_another_run_is_kept(tmp_path, name):
    path = tmp_path / name
    solve(3, [Log(WRITERS[name](path))])
    content = path.read_bytes()
    solve(2, [Log(WRITERS[name](path))])
    assert len(rows_of(path)) == 2
    assert path.with_name(f"{name}.previous").read_bytes() == content


@each_writer
def test_columns_that_come_later_and_numbers_that_are_not_finite(tmp_path, name):
    path = tmp_path / name
    writer = WRITERS[name](path)
    writer.begin(0)
    writer.log({"a": 1.0}, step=0)
    writer.log({"a": math.inf, "b": 2.0}, step=1)
    writer.log({"a": 3.0, "b": math.nan}, step=2)
    first, second, third = rows_of(path)
    assert first["a"] == 1.0 and second["b"] == 2.0 and third["a"] == 3.0
    if name == "run.csv":
        assert math.isnan(first["b"]) and second["a"] == math.inf and math.isnan(third["b"])
    else:
        assert "b" not in first and second["a"] is None and third["b"] is None


@each_writer
def test_files_that_cannot_be_written_are_named(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        WRITERS[name](tmp_path / "file" / name)
    with pytest.raises(ValueError, match="it is a folder"):
        WRITERS[name](tmp_path)


def test_event_files_of_tensorboard_have_the_history(tmp_path):
    tensorboard = pytest.importorskip("tensorboardX")
    events = pytest.importorskip("tensorboardX.proto.event_pb2")
    writer = tensorboard.SummaryWriter(str(tmp_path))
    solution = solve(4, [Log(writer)], steps_per_call=2)
    writer.close()
    (path,) = tmp_path.iterdir()
    content, begin, found = path.read_bytes(), 0, {}
    while begin < len(content):
        # Of each record: its length, a checksum of that, the record, its checksum.
        length = int.from_bytes(content[begin : begin + 8], "little")
        event = events.Event.FromString(content[begin + 12 : begin + 12 + length])
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
        begin += 16 + length
    for name, column in solution.history.columns.items():
        written = [found[name, step] for step in range(4)]
        np.testing.assert_allclose(written, column, rtol=1e-6)
