"""Seeds side by side in one program, trials that are stopped, trials in a journal."""

import dataclasses
import json
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from metaopt.extend import Work
from test_study import (
    compare,
    INNER,
    inner_loss,
    nested,
    outer_loss,
    PROBLEM,
    SPACE,
    start,
    task,
)


METHODS = {
    "unrolled": nested(),
    "implicit": nested(mo.ImplicitAdjoint(rtol=0.1)),
    "one-step": mo.study.Tuned(nested(mo.OneStepAdjoint()), steps_per_call=2),
    "random": mo.study.RandomSearch(SPACE),
}
# The two seeds need different numbers of inner steps, and so spend different amounts.
EARLY = mo.Descent(optax.sgd(0.2), num_steps=40, atol=1e-3)


def shapes(seed: int):
    data = 1.0 + jax.random.uniform(jax.random.key(seed), (2,))
    return data, data, data


def fit(params, hyper, data):
    return 0.5 * jnp.sum((params - data) ** 2) + 0.5 * jnp.sum(
        hyper["l2"].value * params**2
    )


def batch_loss(params, hyper, batch):
    fit = 0.5 * jnp.mean(jnp.sum((params - batch) ** 2, axis=-1))
    return fit + 0.5 * jnp.sum(hyper["l2"].value * params**2)


def drawn(hyper, key):
    return jax.random.normal(key, (2,))


def minibatches(seed: int):
    rows = 2.0 + jax.random.normal(jax.random.key(seed), (24, 2))
    return mo.Minibatches(rows[:12], 4), rows[12:18], rows[18:]


def assert_same(first, second, names, rtol=2e-5):
    for name in names:
        for seed, record in first.records[name].items():
            other = second.records[name][seed]
            assert record.error == other.error == ""
            np.testing.assert_allclose(record.costs, other.costs)
            for metric, values in record.values.items():
                np.testing.assert_allclose(
                    values, other.values[metric], rtol=rtol, atol=1e-6
                )
            assert record.num_failed == other.num_failed
            assert (record.gradients, record.products) == (other.gradients, other.products)


@pytest.mark.ci
@pytest.mark.parametrize("split", [shapes, minibatches])
def test_seeds_at_once_are_those_one_after_the_other(split):
    problem = mo.BilevelProblem(
        mo.InnerProblem(batch_loss, drawn) if split is minibatches else fit, outer_loss
    )
    options = {"seeds": [0, 1, 2], "budget": mo.study.GradientBudget(700)}

    def run(seeds_per_call: int):
        return mo.study.compare(
            METHODS,
            problem,
            start(),
            inner=INNER,
            params=None if split is minibatches else jnp.zeros(2),
            split=split,
            seeds_per_call=seeds_per_call,
            progress=False,
            **options,
        )

    one, two = run(1), run(2)
    values = [row.values["loss"][-1] for row in one.records["unrolled"].values()]
    assert len({round(value, 5) for value in values}) == 3  # the seeds do differ
    assert_same(one, two, METHODS)


def linear_loss(model, hyper, batch):
    x, y = batch
    penalty = hyper["l2"].value * jnp.sum(model.weight**2)
    return jnp.mean((jax.vmap(model)(x)[:, 0] - y) ** 2) + penalty


def linear_error(model, hyper, batch):
    x, y = batch
    return jnp.mean((jax.vmap(model)(x)[:, 0] - y) ** 2)


def test_best_response_networks_of_several_seeds_at_once():
    solver = mo.SelfTuningSolver(
        optax.sgd(0.02), optax.adam(1e-2), train_steps=4, valid_steps=1, num_rounds=2
    )
    x = jax.random.normal(jax.random.key(1), (8, 2))
    problem = mo.BilevelProblem(
        mo.InnerProblem(linear_loss, lambda hyper, key: eqx.nn.Linear(2, 1, key=key)),
        linear_error,
    )
    one, two = (
        mo.study.compare(
            {"self-tuning": solver},
            problem,
            start(),
            (x, x[:, 0]),
            (x, x[:, 0]),
            inner=INNER,
            budget=mo.study.GradientBudget(100),
            seeds=[0, 1],
            seeds_per_call=count,
            progress=False,
        )
        for count in (1, 2)
    )
    assert_same(one, two, ["self-tuning"], rtol=1e-4)


def test_seeds_that_spend_the_budget_sooner_end_sooner():
    solver = mo.NestedSolver(EARLY, mo.UnrolledAdjoint(), optax.sgd(0.5))
    split = lambda seed: (jnp.full(2, 1.0 + 5 * seed),) * 3
    tasks = [
        dataclasses.replace(task(start(), inner=EARLY), train=mo.FullBatch(split(seed)[0]))
        for seed in (0, 1)
    ]
    new_traces = lambda: [
        mo.study.Trace(mo.study.GradientBudget(700), 100, start()) for _ in tasks
    ]
    together, alone = new_traces(), new_traces()
    method = mo.study.Tuned(solver)
    # The one that spends more in each step ends first.
    assert list(method.run_seeds(tasks, together)) == [1, 0]
    for one, trace in zip(tasks, alone):
        method.run(one, trace)
    assert len(alone[0].points) != len(alone[1].points)
    for mine, other in zip(together, alone):
        assert [p.cost for p in mine.points] == [p.cost for p in other.points]
        assert mine.last.hyper["l2"].value == pytest.approx(
            float(other.last.hyper["l2"].value), rel=1e-5
        )


def test_each_seed_has_its_own_failures():
    # The outer loss of the second seed is not finite.
    tasks = [
        dataclasses.replace(task(start()), valid=mo.FullBatch(jnp.full(2, value)))
        for value in (1.0, jnp.nan)
    ]
    problem = mo.BilevelProblem(PROBLEM.inner, lambda p, h, data: jnp.sum((p - data) ** 2))
    tasks = [dataclasses.replace(each, problem=problem) for each in tasks]
    traces = [mo.study.Trace(mo.study.GradientBudget(400), 9, start()) for _ in tasks]
    assert sorted(mo.study.Tuned(nested()).run_seeds(tasks, traces)) == [0, 1]
    assert traces[0].num_failed == 0 and traces[0].failure == ""
    assert traces[1].num_failed == len(traces[1].points) - 1 > 0
    assert "finite" in traces[1].failure
    assert traces[1].last.hyper["l2"].value == pytest.approx(0.5)


def test_seeds_of_different_shapes_run_one_after_the_other():
    method, budget = mo.study.Tuned(nested()), mo.study.GradientBudget(400)
    traces = lambda budget: [mo.study.Trace(budget, 9, start()) for _ in range(2)]
    given = task(start())
    other = dataclasses.replace(given, train=mo.FullBatch(jnp.zeros((1, 2))))
    batches = dataclasses.replace(given, train=mo.Minibatches(jnp.zeros((4, 2)), 2))
    run = lambda tasks, budget: list(method.run_seeds(tasks, traces(budget)))
    assert run([given, other], budget) == run([given, batches], budget) == []
    assert run([given, given], mo.study.TimeBudget(1.0)) == []
    assert run([given, given], budget) == [0, 1]


class InParts(mo.study.AbstractMethod):
    """A method that fails after the first of several seeds."""

    error: Exception = eqx.field(static=True)
    calls: list[str] = eqx.field(static=True)

    def check(self, task, trace):
        pass

    def run(self, task, trace):
        self.calls.append("one")
        one = Work(np.asarray(10.0), np.asarray(0.0))
        trace.add(one, 0.1, 0.5, start(0.25))

    def run_seeds(self, tasks, traces):
        one = Work(np.asarray(20.0), np.asarray(0.0))
        traces[1].add(one, 0.1, 0.5, start(1.0))
        self.calls.append("several")
        yield 1
        raise self.error


def test_seeds_that_do_not_fit_into_memory_run_one_after_the_other():
    method = InParts(MemoryError("RESOURCE_EXHAUSTED"), [])
    with pytest.warns(UserWarning, match="'big' goes on with one seed.*RESOURCE_EXHAUSTED"):
        table = compare({"big": method}, seeds=[0, 1, 2], seeds_per_call=3)
    rows = table.records["big"]
    assert [row.error for row in rows.values()] == ["", "", ""]
    # Each record is of its own seed, and the one that was there is kept.
    assert {s: row.gradients for s, row in rows.items()} == {0: 10, 1: 20, 2: 10}
    assert method.calls == ["several", "one", "one"]


def test_errors_of_a_method_are_told_once():
    method = InParts(ValueError("of this method"), [])
    table = compare({"big": method}, seeds_per_call=2)  # a warning would be an error
    assert [row.gradients for row in table.records["big"].values()] == [10, 20]


def test_a_seed_that_has_ended_is_kept(tmp_path):
    method = InParts(KeyboardInterrupt(), [])  # pyright: ignore[reportArgumentType]
    with pytest.raises(KeyboardInterrupt) as error:
        compare({"big": method}, seeds_per_call=2, out=tmp_path)
    assert "1 of 2 runs are finished" in error.value.__notes__[0]
    found = json.loads((tmp_path / "results.json").read_text())["records"]
    assert list(found["big"]) == ["1"]


class Stopping(mo.study.AbstractMethod):
    """A method that is interrupted."""

    def check(self, task, trace):
        pass

    def run(self, task, trace):
        raise KeyboardInterrupt


def test_an_interrupt_before_the_first_result_names_no_file(tmp_path):
    method = Stopping()
    with pytest.raises(KeyboardInterrupt) as error:
        compare({"big": method}, out=tmp_path)
    assert error.value.__notes__ == ["0 of 2 runs are finished."]


DATA = jnp.full(2, 3.0)


def one_class(params, hyper, batch):
    """A metric that raises on the data of seed 2."""
    if batch[0] == 2.0:
        raise ValueError("only one class in the test data")
    return batch[0]


@pytest.mark.parametrize("seeds_per_call", [1, 3])
def test_a_metric_that_raises_is_told_of_its_seed(seeds_per_call, tmp_path):
    # The record of the first seed was once kept as that of the third.
    with pytest.raises(ValueError, match="only one class"):
        mo.study.compare(
            {"a": nested()},
            PROBLEM,
            start(),
            split=lambda seed: (DATA, DATA, jnp.full(2, 1.0 * seed)),
            params=jnp.zeros(2),
            inner=INNER,
            budget=mo.study.GradientBudget(200),
            seeds=[0, 1, 2],
            seeds_per_call=seeds_per_call,
            metrics={"m": one_class},
            out=tmp_path,
            progress=False,
        )
    found = json.loads((tmp_path / "results.json").read_text())["records"]["a"]
    assert {seed: row["values"]["m"][-1] for seed, row in found.items()} == {
        "0": 0.0,
        "1": 1.0,
    }


@pytest.mark.parametrize("seeds_per_call", [1, 2])
def test_seeds_before_a_split_that_raises_are_kept(seeds_per_call, tmp_path):
    def split(seed: int):
        if seed:
            raise OSError("no such file")
        return shapes(seed)

    with pytest.raises(OSError, match="no such file"):
        mo.study.compare(
            {"untuned": mo.study.Untuned()},
            PROBLEM,
            start(),
            split=split,
            params=jnp.zeros(2),
            inner=INNER,
            budget=mo.study.GradientBudget(200),
            seeds=[0, 1],
            seeds_per_call=seeds_per_call,
            out=tmp_path,
            progress=False,
        )
    found = json.loads((tmp_path / "results.json").read_text())["records"]
    assert list(found["untuned"]) == ["0"]


def test_a_study_goes_on_with_the_seeds_that_are_missing(tmp_path):
    methods = {"unrolled": nested(), "untuned": mo.study.Untuned()}
    options = {"budget": mo.study.GradientBudget(400), "out": tmp_path}
    first = compare(methods, seeds=[1], **options)
    table = compare(methods, seeds=[0, 1, 2], seeds_per_call=3, **options)
    assert table.records["unrolled"][1] == first.records["unrolled"][1]
    whole = compare(methods, seeds=[0, 1, 2], budget=options["budget"])
    assert_same(whole, table, methods)


# Trials that are stopped


def trial_trace(budget: float) -> mo.study.Trace:
    return mo.study.Trace(mo.study.GradientBudget(budget), 1000, start())


@pytest.fixture
def same_draws(monkeypatch):
    """The draws of a search with a journal, which are of a process, the same in each."""
    monkeypatch.setattr(os, "getpid", lambda: 300)


def test_a_pruner_stops_trials_whose_work_counts(tmp_path, same_draws):
    optuna = pytest.importorskip("optuna")
    journal = str(tmp_path / "journal")
    search = mo.study.OptunaSearch(
        {"l2": mo.study.LogUniform(1e-2, 1e3)},
        sampler="RandomSampler",
        pruner="MedianPruner",
        num_reports=4,
        journal=journal,
    )
    trace = trial_trace(40 * 20)
    search.run(task(start()), trace)
    backend = optuna.storages.journal.JournalFileBackend(journal)
    storage = optuna.storages.JournalStorage(backend)
    (name,) = optuna.get_all_study_names(storage)
    trials = optuna.load_study(study_name=name, storage=storage).trials
    states = optuna.trial.TrialState
    pruned = [trial for trial in trials if trial.state == states.PRUNED]
    whole = [trial for trial in trials if trial.state == states.COMPLETE]
    assert len(pruned) > 5 and len(whole) > 5
    assert {len(trial.intermediate_values) for trial in whole} == {4}
    for trial in pruned:
        steps = max(trial.intermediate_values)
        assert steps < 40 and trial.user_attrs["gradients"] == steps
    # More trials than 20 whole ones, for the same work.
    assert len(trials) > 25 and trace.spent <= 40 * 20
    assert trace.num_failed == 0
    assert trace.last.loss == pytest.approx(min(trial.value for trial in whole))
    # A process that goes on pays for what is there, and finds it again.
    again = trial_trace(trace.spent)
    search.run(task(start()), again)
    assert again.spent == trace.spent and again.last.loss == trace.last.loss


def test_a_trial_in_pieces_is_a_whole_one():
    whole, pieces = trial_trace(40), trial_trace(40)
    mo.study.OptunaSearch(SPACE).run(task(start()), whole)
    mo.study.OptunaSearch(SPACE, pruner="NopPruner").run(task(start()), pieces)
    assert pieces.last.loss == pytest.approx(whole.last.loss, rel=1e-6)
    assert pieces.spent == whole.spent == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruner": "Median"}, "`pruner` must be one of .*MedianPruner"),
        ({"pruner": "PercentilePruner"}, "`pruner` must be one of"),
        ({"pruner": "ThresholdPruner"}, "`pruner` must be one of"),
        ({"pruner": "MedianPruner", "batch_size": 2}, "one by one"),
        ({"num_reports": 1}, "`num_reports` must be at least 2"),
    ],
)
def test_pruners_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mo.study.OptunaSearch(SPACE, **options)


@pytest.mark.parametrize(
    ("inner", "reports", "message"),
    [
        (EARLY, 5, "A search with a pruner compares"),
        (INNER, 41, "`num_reports` is 41.*only 40 steps"),
        (mo.JaxoptSolver("LBFGS"), 5, "cannot go on from its own state"),
    ],
)
def test_inner_solvers_that_cannot_be_pruned_are_refused(inner, reports, message):
    search = mo.study.OptunaSearch(SPACE, pruner="MedianPruner", num_reports=reports)
    with pytest.raises(ValueError, match=message):
        search.check(task(start(), inner=inner), trial_trace(4_000))


def test_hybrid_trials_are_not_pruned():
    search = mo.study.OptunaSearch(SPACE, pruner="MedianPruner")
    with pytest.raises(ValueError, match="Leave `pruner` out under"):
        mo.study.Hybrid(search, nested(), 2).check(task(start()), trial_trace(4_000))


# A journal of tuned trials


@pytest.mark.parametrize("size", [1, 1200])
def test_hybrid_goes_on_from_its_journal(tmp_path, size, same_draws):
    # The trials of before a kill were neither paid for nor known.
    hyper = start() | {"bias": jnp.zeros(size)}
    problem = mo.BilevelProblem(
        lambda params, hyper, data: inner_loss(params, hyper, data + hyper["bias"][0]),
        outer_loss,
    )
    given = task(hyper, problem=problem)
    journal = tmp_path / "journal"
    search = mo.study.OptunaSearch(SPACE, sampler="RandomSampler", journal=journal)
    method = mo.study.Hybrid(search, nested(), 4)
    first, second = trial_trace(2_000), trial_trace(4_000)
    method.run(given, first)
    assert first.spent > 1_000
    method.run(given, second)
    costs = [point.cost for point in second.points]
    assert costs[: len(first.points)] == [point.cost for point in first.points]
    assert second.last.loss <= first.last.loss
    known = second.points[len(first.points) - 1]
    for mine, other in zip(jax.tree.leaves(known.hyper), jax.tree.leaves(first.last.hyper)):
        np.testing.assert_array_equal(mine, other)


def test_a_journal_holds_no_larger_hyper(tmp_path):
    search = mo.study.OptunaSearch(SPACE, journal=tmp_path / "journal")
    method = mo.study.Hybrid(search, nested(), 1)
    given = task(start() | {"weights": jnp.zeros(200_000)})
    with pytest.raises(ValueError, match="200,001 numbers.* Leave `journal` out"):
        method.check(given, trial_trace(4_000))


@pytest.mark.parametrize("kind", ["search", "hybrid"])
def test_failures_are_in_the_journal(tmp_path, kind, same_draws):
    problem = mo.BilevelProblem(
        inner_loss,
        lambda params, hyper, data: jnp.log(hyper["l2"].value - 10) + params[0],
    )
    search = mo.study.OptunaSearch(
        SPACE, sampler="RandomSampler", journal=tmp_path / "journal"
    )
    method = search if kind == "search" else mo.study.Hybrid(search, nested(rate=0.0), 1)
    given = task(start(), problem=problem)
    first = trial_trace(1_000)
    method.run(given, first)
    again = trial_trace(first.spent)
    method.run(given, again)
    assert again.num_failed == first.num_failed > 1
    assert again.failure == first.failure != ""
