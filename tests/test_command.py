"""The commands on examples, runs and studies; `test_self_test.py` has the rest."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from metaopt._command import _check, _examples, main


def test_info_names_versions_devices_and_dtype(capsys):
    assert main(["info"]) == 0
    out, _ = capsys.readouterr()
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["metaopt"] == mo.__version__
    assert rows["devices"].startswith("1 x cpu")
    assert rows["floats"] == "float64"  # of the tests
    assert {"python", "jax", "matplotlib", "optuna", "cores"} <= set(rows)


def test_check_compares_hypergradients_with_differences(capsys):
    assert main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if "relative error" in line]
    assert [row[:2] for row in rows] == [
        [name, dtype]
        for dtype in ("float32", "float64")
        for name in ("unrolled", "forward", "implicit")
    ]
    assert all(row[-1] == "ok" for row in rows)
    errors = [float(row[4]) for row in rows]
    assert max(errors[:3]) < 1e-4 and max(errors[3:]) < 1e-7


@pytest.mark.one_of(2)
@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_check_sees_a_wrong_hypergradient(factor, monkeypatch, capsys):
    right = _check._hypergradient_of
    wrong = lambda *args: right(*args) * (factor if args[-1] == "float64" else 1.0)
    monkeypatch.setattr(_check, "_hypergradient_of", wrong)
    assert main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("WRONG: a hypergradient")
    assert sum("WRONG (accepted: 1e-06)" in line for line in lines) == 3


def test_check_says_which_hypergradient_was_refused(monkeypatch, capsys):
    right = _check._hypergradient_of

    def refused(*args):
        if args[-1] == "float32":
            return right(*args)
        raise mo.SolveError("It diverged.\nMore.", None)

    monkeypatch.setattr(_check, "_hypergradient_of", refused)
    assert main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("WRONG, refused: It diverged." in line for line in lines) == 3
    assert sum(line.endswith("ok") for line in lines) == 3


# Examples


def test_examples_are_listed_with_what_they_do(capsys):
    assert main(["examples"]) == 0
    out, _ = capsys.readouterr()
    names = {path.stem for path in Path("examples").glob("[!_]*.py")}
    rows = {line.split()[0]: line for line in out.splitlines() if line[:1].isalpha()}
    assert names <= set(rows)
    assert "Tunes learning rates, momentum" in rows["tune_learning_rate"]


def test_an_example_is_run_with_its_options(tmp_path, monkeypatch, capfd):
    script = tmp_path / "small.py"
    script.write_text('"""A small one."""\nimport sys\nprint(sys.argv[1:])\nsys.exit(3)\n')
    monkeypatch.setattr(_examples, "_FOLDERS", (tmp_path / "none", tmp_path))
    assert main(["examples"]) == 0
    assert capfd.readouterr().out.startswith("small  A small one.\n")
    assert main(["examples", "run", "small", "--quick", "--data", "x"]) == 3
    assert capfd.readouterr().out == "['--quick', '--data', 'x']\n"


def test_examples_that_are_not_there_are_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_examples, "_FOLDERS", (tmp_path,))
    assert main(["examples"]) == 1
    assert "not installed" in capsys.readouterr().out


# Runs and studies


SCRIPT = """
import jax.numpy as jnp, optax, sys
import metaopt as mo

def cut(run):
    if run.num_steps == 2 and "whole" not in sys.argv:
        sys.argv.append("whole")
        raise KeyboardInterrupt

def loss(params, hyper, batch):
    return jnp.sum((params - 1.0) ** 2) + jnp.exp(hyper) * jnp.sum(params ** 2)

solution = mo.solve_bilevel(
    mo.BilevelProblem(loss, lambda params, hyper, batch: jnp.sum((params - 0.8) ** 2)),
    jnp.zeros(()),
    params=jnp.zeros(2),
    solver=mo.NestedSolver(
        mo.Descent(optax.sgd(0.1), 5), mo.UnrolledAdjoint(), optax.sgd(0.1)
    ),
    num_steps=4,
    callbacks=[mo.callbacks.Checkpoint(sys.argv[1], every=1)] + CALLBACKS,
)
print("steps", len(solution.history), "of them now", solution.ended_by)
"""


def start(folder: Path, callbacks: str) -> subprocess.CompletedProcess:
    (folder / "run.py").write_text(SCRIPT.replace("CALLBACKS", callbacks))
    return subprocess.run(
        [sys.executable, "run.py", "kept"],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        timeout=120,
    )


@pytest.mark.ci
def test_a_run_is_shown_and_started_again(tmp_path, capfd, monkeypatch):
    started = start(tmp_path, "[cut]")
    assert "steps 2 of them now an interrupt" in started.stdout, started.stderr
    kept = tmp_path / "kept"
    assert main(["show", str(kept), "--picture", str(tmp_path / "run.png")]) == 0
    out, _ = capfd.readouterr()
    assert "kept: 2 outer steps" in out and "History of 2 outer steps" in out
    assert f"Started in {tmp_path} by: {sys.executable} run.py kept" in out
    assert (tmp_path / "run.png").stat().st_size > 5_000

    # Nobody agrees, and nothing is run.
    answers = iter(["n", EOFError()])

    def answer(question):
        found = next(answers)
        if isinstance(found, EOFError):
            raise found
        return found

    monkeypatch.setattr("builtins.input", answer)
    before = kept.read_bytes()
    for _ in range(2):
        assert main(["resume", str(kept)]) == 1
        assert "Nothing was run." in capfd.readouterr().out
    assert kept.read_bytes() == before

    (tmp_path / "run.py").write_text(SCRIPT.replace("CALLBACKS", "[]"))
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    assert main(["resume", str(kept), "--yes"]) == 0
    assert "steps 4 of them now `num_steps`" in capfd.readouterr().out
    assert mo.callbacks.CheckpointFile(kept).num_steps == 4


def small_run(path: Path, **options) -> mo.BilevelSolution:
    def loss(params, hyper, batch):
        return jnp.sum((params - 1.0) ** 2) + jnp.exp(hyper) * jnp.sum(params**2)

    return mo.solve_bilevel(
        mo.BilevelProblem(loss, lambda p, h, batch: jnp.sum((p - 0.8) ** 2)),
        jnp.zeros(()),
        params=jnp.zeros(2),
        solver=mo.NestedSolver(
            mo.Descent(optax.sgd(0.1), 5), mo.UnrolledAdjoint(), optax.sgd(0.1)
        ),
        num_steps=3,
        callbacks=[mo.callbacks.Checkpoint(path)],
        **options,
    )


def test_a_file_is_read_without_its_problem(tmp_path, monkeypatch):
    # In a notebook `__main__` is no file.
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    solution = small_run(tmp_path / "kept")
    file = mo.callbacks.CheckpointFile(tmp_path / "kept")
    assert file.num_steps == 3 and file.result == "" and file.command is None
    assert set(file.columns) == set(solution.history.columns)
    for name, column in file.columns.items():
        np.testing.assert_array_equal(column, solution.history.columns[name])
    assert file.settings["solver.inner.num_steps"] == "5"
    assert "3 outer steps" in str(file) and "Started" not in str(file)
    assert main(["resume", str(tmp_path / "kept"), "--yes"]) == 1


def test_files_without_a_command_are_read(tmp_path, monkeypatch):
    # As those that were written before commands were kept.
    path = tmp_path / "kept"
    save = mo.callbacks._checkpoint.save

    def without(path, content):
        save(path, eqx.tree_at(lambda c: c.command, content, None))

    monkeypatch.setattr("metaopt.callbacks._checkpoint.save", without)
    small_run(path)
    assert mo.callbacks.CheckpointFile(path).command is None
    assert int(small_run(path).state.num_steps) == 3  # goes on, to no step


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"loss: 1"])
def test_files_that_are_damaged_are_one_line(content, tmp_path, capsys):
    path = tmp_path / "kept"
    path.write_bytes(content)
    for command in (["show", str(path)], ["resume", str(path), "--yes"]):
        assert main(command) == 1
        out, err = capsys.readouterr()
        assert out == "" and "no sound checkpoint" in err and err.count("\n") == 1


def test_arrays_alone_are_no_run(tmp_path, capsys):
    mo.save(tmp_path / "arrays", {"a": jnp.ones(3)})
    assert main(["show", str(tmp_path / "arrays")]) == 1
    assert "holds no `.state.num_steps`" in capsys.readouterr().err


def test_a_study_is_shown(tmp_path, capsys):
    def study(seeds, out):
        return mo.study.compare(
            {"untuned": mo.study.Untuned(), "again": mo.study.Untuned()},
            mo.BilevelProblem(
                lambda p, h, batch: jnp.sum((p - 1.0) ** 2) + h["l2"].value * jnp.sum(p**2),
                lambda p, h, batch: jnp.sum((p - 0.8) ** 2),
            ),
            {"l2": mo.hyper.Positive(0.5)},
            params=jnp.zeros(2),
            inner=mo.Descent(optax.sgd(0.1), 5),
            budget=mo.study.GradientBudget(10),
            seeds=seeds,
            target=("loss", 0.1),
            out=out,
            progress=False,
        )

    table = study([0, 1], tmp_path / "study")
    for name in ("study", "study/results.json"):
        assert main(["show", str(tmp_path / name)]) == 0
        assert capsys.readouterr().out == f"{table}\n"
    picture = str(tmp_path / "curves.png")
    assert main(["show", str(tmp_path / "study"), "--picture", picture]) == 0
    assert f"Wrote {picture}" in capsys.readouterr().out
    # Of a study that is under way, the seeds that all methods have.
    path = tmp_path / "study" / "results.json"
    text = path.read_text()
    part = text.replace('"1": {', '"7": {', 1)
    path.write_text(part)
    assert mo.study.read_comparison(path.parent).seeds == [0]
    path.write_text(text.replace('"asked"', '"told"'))
    assert main(["show", str(path)]) == 1
    assert "no file of results of a study: KeyError('asked')" in capsys.readouterr().err
    assert main(["show", str(tmp_path)]) == 1
    assert "the folder holds no study" in capsys.readouterr().err


def test_the_package_starts_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "metaopt", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for word in ("info", "check", "examples", "show", "resume"):
        assert f"\n    {word}" in textwrap.dedent(done.stdout)
