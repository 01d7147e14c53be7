"""The known-answer self-test and the command that runs it."""

import os
import subprocess
import sys
import warnings
from typing import Any

import jaxlib.version
import pytest

from metaopt import _command as command_line
from metaopt._command import _check
from metaopt._core import _self_test


@pytest.fixture
def fresh_warning():
    _self_test.warn_if_known_bad.cache_clear()
    yield
    _self_test.warn_if_known_bad.cache_clear()


def test_known_answer():
    # jaxlib 0.10.2 once passed every other test here while its products were wrong.
    assert _self_test.known_answer()


def test_known_answer_fails_on_wrong_rows(monkeypatch):
    # What the bad release does, in miniature: rows shifted by 128.
    right = _self_test._batched_square_norm
    monkeypatch.setattr(
        _self_test, "_batched_square_norm", lambda rows: right(rows).at[128:].set(0.0)
    )
    assert not _self_test.known_answer()
    monkeypatch.setattr(
        _self_test, "_batched_square_norm", lambda rows: right(rows) * float("nan")
    )
    assert not _self_test.known_answer()


def test_warns_once_about_the_bad_release(monkeypatch, fresh_warning):
    monkeypatch.setattr(jaxlib.version, "__version__", "0.10.2")
    with pytest.warns(RuntimeWarning, match=r"0\.10\.2 computes wrong numbers.*pip"):
        _self_test.warn_if_known_bad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _self_test.warn_if_known_bad()


@pytest.mark.parametrize("version", ["0.10.0", "0.10.1", "0.11.0", "0.10.20"])
def test_other_releases_do_not_warn(monkeypatch, fresh_warning, version):
    monkeypatch.setattr(jaxlib.version, "__version__", version)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _self_test.warn_if_known_bad()
    assert seen == []


@pytest.mark.parametrize(
    "right, version, trusted, word",
    [
        (True, "0.10.1", True, "OK"),
        (False, "0.10.1", False, "WRONG"),
        (False, "0.10.2", False, "WRONG"),
        (True, "0.10.2", False, "DOUBTFUL"),
    ],
)
def test_verdict(right, version, trusted, word):
    ok, sentence = _self_test.verdict(right, version)
    assert ok is trusted
    assert sentence.startswith(word)
    assert version in sentence
    assert trusted or "pip install" in sentence


def test_check_passes(capsys):
    assert command_line.main(["check"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for name in ("python", "jax", "jaxlib", "equinox", "optax", "lineax", "jaxopt"):
        assert f"\n{name} " in out
    assert out.splitlines()[-1].startswith("OK")
    assert out.isascii()


def test_check_fails_aloud(monkeypatch, capsys):
    monkeypatch.setattr(_check, "known_answer", lambda: False)
    assert command_line.main(["check"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("WRONG")


def test_check_without_a_device_is_one_sentence(monkeypatch, capsys):
    # `JAX_PLATFORMS=cuda` on a machine without a GPU was a traceback.
    def fails():
        raise RuntimeError("Unable to initialize backend 'cuda'\nand more")

    monkeypatch.setattr(_check, "known_answer", fails)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert command_line.main(["check"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("FAILED: jax cannot compute here: Unable to initialize backend")
    assert "JAX_PLATFORMS is cuda; JAX_PLATFORMS=cpu" in last


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["check", "--help"]])
def test_help(arguments, capsys):
    assert command_line.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "usage: python -m metaopt" in out
    assert err == ""


def test_version(capsys):
    assert command_line.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("metaopt ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no command given"),
        (["chek"], "did you mean 'check'"),
        (["--versoin"], "did you mean '--version'"),
        (["zzzzzz"], "known: info, check, examples, show, resume, --version"),
        (["check", "now"], "unrecognized arguments: now"),
        (["show"], "the following arguments are required: RUN"),
        (["resume", "--maybe"], "required: RUN"),
        (["examples", "walk"], "invalid choice: 'walk'"),
        (["examples", "run", "tune_learning_rte"], "did you mean 'tune_learning_rate'"),
        (["examples", "run", "zzz"], "no example 'zzz'; there are deq_digits"),
        (["show", "nowhere"], "nowhere is not there. Name a checkpoint or a study"),
        (["resume", "nowhere"], "nowhere is not there. Name the file of a checkpoint"),
        ([""], "unknown command ''"),
        (["a\nb\udcff"], r"unknown command 'a\nb\udcff'"),
        (["check" * 10_000], "...'; known: info, check"),
        (["check", "now" * 10_000], "unrecognized arguments: nownow"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert command_line.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1 and err.endswith("\n")
    assert len(err) < 200 and err.isascii()


def run(arguments: list[str], stdout: Any, **environment: str) -> tuple[int, str]:
    """Run the command in a process.

    **Returns:**

    The exit code, and the content of standard error.
    """
    done = subprocess.run(
        [sys.executable, "-m", "metaopt", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=120,
        env=os.environ | environment,
    )
    return done.returncode, done.stderr.decode()


def test_reader_gone():
    # A pipe whose reader has closed once ended in a BrokenPipeError traceback.
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as pipe:
        # In a locale that has nothing but ASCII.
        found = run(
            ["--version"], pipe, LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="ascii"
        )
    assert found == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="writes to /dev/full")
def test_output_that_cannot_be_written():
    # It was a traceback, and another one at the exit of Python.
    with open("/dev/full", "w") as full:
        code, error = run(["--version"], full)
    assert code == 1
    assert error.startswith("metaopt: cannot write to standard output: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments, code", [(["--version"], 1), (["chek"], 2)])
def test_streams_that_are_closed(arguments, code, monkeypatch):
    # Python has `None` in their place, which was an `AttributeError`.
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert command_line.main(arguments) == code
