"""Seeds side by side in one program, trials that are stopped, trials in a journal."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from test_study import compare, INNER, nested, outer_loss, PROBLEM, SPACE, start, task


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
    assert method.run_seeds(tasks, together)
    for one, trace in zip(tasks, alone):
        method.run(one, trace)
    assert len(alone[0].points) != len(alone[1].points)
    for mine, other in zip(together, alone):
        assert [p.cost for p in mine.points] == [p.cost for p in other.points]
        assert mine.last.hyper["l2"].value == pytest.approx(
            float(other.last.hyper["l2"].value), rel=1e-5
        )


def test_failures_of_a_seed_are_its_own():
    # The outer loss of the second seed is not finite.
    tasks = [
        dataclasses.replace(task(start()), valid=mo.FullBatch(jnp.full(2, value)))
        for value in (1.0, jnp.nan)
    ]
    problem = mo.BilevelProblem(PROBLEM.inner, lambda p, h, data: jnp.sum((p - data) ** 2))
    tasks = [dataclasses.replace(each, problem=problem) for each in tasks]
    traces = [mo.study.Trace(mo.study.GradientBudget(400), 9, start()) for _ in tasks]
    assert mo.study.Tuned(nested()).run_seeds(tasks, traces)
    assert traces[0].num_failed == 0 and traces[0].failure == ""
    assert traces[1].num_failed == len(traces[1].points) - 1 > 0
    assert "finite" in traces[1].failure
    assert traces[1].last.hyper["l2"].value == pytest.approx(0.5)


def test_what_cannot_run_at_once_runs_one_after_the_other():
    method, budget = mo.study.Tuned(nested()), mo.study.GradientBudget(400)
    traces = lambda budget: [mo.study.Trace(budget, 9, start()) for _ in range(2)]
    given = task(start())
    other = dataclasses.replace(given, train=mo.FullBatch(jnp.zeros((1, 2))))
    batches = dataclasses.replace(given, train=mo.Minibatches(jnp.zeros((4, 2)), 2))
    assert not method.run_seeds([given, other], traces(budget))
    assert not method.run_seeds([given, batches], traces(budget))
    assert not method.run_seeds([given, given], traces(mo.study.TimeBudget(1.0)))
    assert method.run_seeds([given, given], traces(budget))


class OnlyOne(mo.study.AbstractMethod):
    """A method that has no memory for several seeds."""

    def check(self, task, trace):
        pass

    def run(self, task, trace):
        mo.study.Untuned().run(task, trace)

    def run_seeds(self, tasks, traces):
        raise MemoryError("RESOURCE_EXHAUSTED")


def test_seeds_that_do_not_fit_into_memory_run_one_after_the_other():
    with pytest.warns(UserWarning, match="'big' is run on one seed.*RESOURCE_EXHAUSTED"):
        table = compare({"big": OnlyOne()}, seeds_per_call=2)
    assert [row.error for row in table.records["big"].values()] == ["", ""]


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


def test_a_pruner_stops_trials_whose_work_counts(tmp_path):
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


def test_hybrid_goes_on_from_its_journal(tmp_path):
    # The trials of before a kill were neither paid for nor known.
    journal = tmp_path / "journal"
    search = mo.study.OptunaSearch(SPACE, sampler="RandomSampler", journal=journal)
    method = mo.study.Hybrid(search, nested(), 4)
    first, second = trial_trace(2_000), trial_trace(4_000)
    method.run(task(start()), first)
    assert first.spent > 1_000
    method.run(task(start()), second)
    costs = [point.cost for point in second.points]
    assert costs[: len(first.points)] == [point.cost for point in first.points]
    assert second.last.loss <= first.last.loss
    known = second.points[len(first.points) - 1]
    np.testing.assert_array_equal(known.hyper["l2"].value, first.last.hyper["l2"].value)
