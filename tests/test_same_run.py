"""What makes a run another one, so that it does not go on from a checkpoint."""

import linecache

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from metaopt._core._description import description


SOURCE = "def loss(params, hyper, batch):\n    return ((params - hyper) ** 2).sum()\n"


def written(folder, text):
    """The function `loss` of a file with that text."""
    path = folder / "written.py"
    path.write_text(text)
    linecache.checkcache(str(path))
    names = {"__name__": "written"}
    exec(compile(text, str(path), "exec"), names)
    return names["loss"]


def solve(path, loss, data):
    return mo.solve_bilevel(
        mo.BilevelProblem(loss, lambda params, hyper, batch: jnp.sum(params * batch)),
        jnp.zeros(2),
        valid=data,
        params=jnp.zeros(2),
        solver=mo.NestedSolver(
            mo.Descent(optax.sgd(0.2), 3), mo.UnrolledAdjoint(), optax.adam(0.1)
        ),
        num_steps=2,
        callbacks=[mo.callbacks.Checkpoint(path)],
    )


def test_other_data_and_another_loss_are_refused_by_name(tmp_path):
    path, data = tmp_path / "run", np.ones((3, 2))
    first = solve(path, written(tmp_path, SOURCE), data)
    again = solve(path, written(tmp_path, SOURCE + "# A comment.\n"), data.copy())
    np.testing.assert_array_equal(again.hyper, first.hyper)
    with pytest.raises(mo.CheckpointError, match=r"`valid\S*` was array of shape \(3, 2\)"):
        solve(path, written(tmp_path, SOURCE), 2 * data)
    with pytest.raises(mo.CheckpointError, match="loss_fn` was written.loss, with source"):
        solve(path, written(tmp_path, SOURCE.replace("2).", "4).")), data)


def test_the_source_of_a_function_is_a_setting_but_not_its_layout(tmp_path):
    describe = lambda text: description(written(tmp_path, text), "loss")["loss"]
    assert "with source" in describe(SOURCE)
    spaced = SOURCE.replace("- hyper", "-  hyper").replace("return", "# Why.\n    return")
    assert describe(spaced) == describe(SOURCE)
    assert describe(SOURCE.replace("2", "3")) != describe(SOURCE)


CALL = """def call(first, second, steps=3): return first
loss = call(lambda p: (p +
      1.0) * 2, lambda p: p, steps=3)
"""


@pytest.mark.parametrize(
    ("there", "here", "is_same"),
    [
        ("steps=3)", "steps=4)", True),
        ("lambda p: p,", "lambda p: p + 5,", True),
        ("(p +", "( p+", True),
        ("1.0)", "1.5)", False),
        ("* 2", "* 3", False),
    ],
)
def test_the_source_of_a_lambda_is_that_of_its_expression(tmp_path, there, here, is_same):
    describe = lambda text: description(written(tmp_path, text), "loss")["loss"]
    assert "with source" in describe(CALL)
    assert (describe(CALL.replace(there, here)) == describe(CALL)) == is_same


def test_of_libraries_the_names_are_enough(tmp_path):
    # Their next version may write the same function otherwise.
    for function in (optax.sgd, mo.hypergradient, linecache.getline):
        assert "with source" not in description(function, "f")["f"]


def test_a_function_without_source_is_described_by_its_name():
    names = {"__name__": "console"}
    exec("loss = lambda params: params", names)
    assert description(names["loss"], "f")["f"] == "console.<lambda>"


def test_the_numbers_of_large_arrays_are_settings():
    large = np.zeros(2**24)
    assert description(large, "x") == description(large.copy(), "x")
    changed = large.copy()
    changed[len(large) // 2 :] = 1e-9
    assert description(large, "x") != description(changed, "x")
