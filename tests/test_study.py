"""Whole methods side by side: budgets, searches, statistics, results that are kept."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import metaopt as mo
from metaopt.extend import Work
from metaopt.hyper import Integer, Interval, Ordered, Positive, Simplex
from metaopt.study._space import Space
from metaopt.study._statistics import adjusted, Mean, paired_p_value
from metaopt.study._trials import trial_losses


# params solve (1 + l2) params = data, and the outer loss is least where they are 1: with
# data 3 at l2 = 2.
DATA, BEST = 3.0, 2.0
BUDGET = 4_000
INNER = mo.Descent(optax.sgd(0.2), num_steps=40)
SPACE = {"l2": mo.study.LogUniform(1e-2, 3.0)}


def inner_loss(params, hyper, data):
    fit = 0.5 * jnp.sum((params - data) ** 2)
    return fit + 0.5 * jnp.sum(hyper["l2"].value * params**2)


def outer_loss(params, hyper, data):
    return jnp.mean((params - 1.0) ** 2)


PROBLEM = mo.BilevelProblem(inner_loss, outer_loss)


def start(l2: float = 0.5) -> dict[str, Any]:
    return {"l2": Positive(l2)}


def nested(adjoint: Any = mo.UnrolledAdjoint(), rate: float = 0.5) -> mo.NestedSolver:
    return mo.NestedSolver(INNER, adjoint, optax.sgd(rate))


def compare(methods, **changes) -> mo.study.Comparison:
    options: dict[str, Any] = {
        "inner": INNER,
        "budget": mo.study.GradientBudget(BUDGET),
        "seeds": [0, 1],
        "params": jnp.zeros(2),
        "progress": False,
    }
    data = jnp.full(2, DATA)
    return mo.study.compare(methods, PROBLEM, start(), data, data, **(options | changes))


def task(hyper: Any, inner: Any = INNER, problem: Any = PROBLEM) -> mo.study.Task:
    data = mo.FullBatch(jnp.full(2, DATA))
    key = jax.random.key(0)
    return mo.study.Task(problem, hyper, data, data, jnp.zeros(2), None, inner, key)


# Work


STEPS = {"num_inner_steps": np.array([40, 30])}
IMPLICIT = STEPS | {"num_products": np.array([5, 6]), "num_error_products": np.ones(2)}


@pytest.mark.parametrize(
    ("adjoint", "columns", "gradients", "products"),
    [
        (mo.UnrolledAdjoint(), STEPS, [41, 31], [40, 30]),
        (mo.UnrolledAdjoint(mo.memory.RecomputeSteps()), STEPS, [81, 61], [40, 30]),
        (mo.UnrolledAdjoint(mo.memory.Blocks(2)), STEPS, [121, 91], [40, 30]),
        (mo.TruncatedAdjoint(35), STEPS, [41, 31], [35, 30]),
        (mo.OneStepAdjoint(), STEPS, [41, 31], [1, 1]),
        (mo.FirstOrderAdjoint(), STEPS, [41, 31], [0, 0]),
        (mo.ForwardAdjoint(), STEPS, [41, 31], [120, 90]),
        (mo.ReversibleAdjoint(), STEPS, [81, 61], [40, 30]),
        (mo.ImplicitAdjoint(), IMPLICIT, [42, 32], [7, 8]),
        (mo.ImplicitAdjoint(newton_steps=1), IMPLICIT, [43, 33], [12, 14]),
    ],
)
def test_adjoints_count_their_work(adjoint, columns, gradients, products):
    work = mo.NestedSolver(INNER, adjoint, optax.sgd(0.1)).work(columns, 3)
    assert isinstance(work, Work)
    np.testing.assert_array_equal(work.gradients, gradients)
    np.testing.assert_array_equal(work.products, products)


def test_self_tuning_counts_the_steps_of_both_losses():
    solver = mo.SelfTuningSolver(
        optax.adam(1e-3), optax.adam(1e-2), train_steps=5, valid_steps=2, num_rounds=3
    )
    work = solver.work({"num_inner_steps": np.array([15])}, 1)
    assert work.gradients.tolist() == [21] and work.products.tolist() == [0]


# Budgets


METHODS: dict[str, Any] = {
    "unrolled": nested(),
    "implicit": nested(mo.ImplicitAdjoint(rtol=0.1)),
    "calls": mo.study.Tuned(nested(), steps_per_call=3),
    "starts": mo.study.MultiStart(nested(), SPACE, num_starts=3),
    "random": mo.study.RandomSearch(SPACE, batch_size=3),
    "grid": mo.study.GridSearch(SPACE, num_values=30),
    "halving": mo.study.SuccessiveHalving(SPACE),
    "optuna": mo.study.OptunaSearch(SPACE),
    "hybrid": mo.study.Hybrid(mo.study.RandomSearch(SPACE), nested(), 4),
    "untuned": mo.study.Untuned(),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> tuple[mo.study.Comparison, Path]:
    folder = tmp_path_factory.mktemp("study")
    metrics = {
        "distance": mo.study.Metric(
            lambda params, hyper, batch: abs(float(params[0]) - 1), higher_is_better=False
        )
    }
    target = ("distance", 0.02)
    return compare(METHODS, metrics=metrics, target=target, out=folder), folder


# The most that a step of each costs; the rest of the budget may stay unspent.
STEP = {"calls": 3 * 121, "starts": 3 * 121, "halving": 360, "hybrid": 4 * 121 + 40}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_keeps_the_budget(table, name):
    for record in table[0].records[name].values():
        assert record.error == "" and record.num_failed == 0
        assert record.costs == sorted(record.costs)
        assert record.costs[-1] == record.gradients + 2 * record.products
        assert record.costs[-1] <= BUDGET
        if name != "untuned":
            # The grid ends after its 30 points and the settings that were given.
            end = 31 * 40 if name == "grid" else BUDGET - STEP.get(name, 135)
            assert record.costs[-1] >= end


@pytest.mark.parametrize("name", [name for name in METHODS if name != "untuned"])
def test_each_method_finds_the_optimum(table, name):
    comparison = table[0]
    # Grid and trials are as fine as their number.
    assert np.all(comparison.values(name, "distance") < 0.1)
    assert np.all(comparison.values(name, "loss") < 0.1**2)
    untuned = comparison.values("untuned", "distance")
    np.testing.assert_allclose(untuned, DATA / 1.5 - 1, rtol=1e-5)


def test_the_table_names_all(table):
    text = str(table[0])
    for name in METHODS:
        assert f"\n  {name}" in text
    assert "By loss (validation, lower is better)" in text
    assert "gradients to distance <= 0.02" in text and "never" in text


def test_results_are_in_the_folder(table):
    comparison, folder = table
    content = json.loads((folder / "results.json").read_text())
    assert content["means"]["random"]["distance"]["mean"] == pytest.approx(
        comparison.mean("random", "distance").mean
    )
    assert (folder / "table.txt").read_text() == f"{comparison}\n"
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(folder.glob(".*"))


def test_cost_to_the_target_is_that_of_the_first_point(table):
    comparison = table[0]
    costs = comparison.cost_to_target("unrolled")
    record = comparison.records["unrolled"][0]
    index = record.costs.index(costs[0])
    assert record.values["distance"][index] <= 0.02
    assert all(x > 0.02 for x in record.values["distance"][:index])
    assert np.all(np.isinf(comparison.cost_to_target("untuned")))


def test_products_and_seconds_are_budgets_too():
    rows = compare({"unrolled": nested()}, budget=mo.study.ProductBudget(200), seeds=[0])
    assert rows.records["unrolled"][0].products == 200
    methods = {"unrolled": nested(), "random": METHODS["random"]}
    begin = time.perf_counter()
    rows = compare(methods, budget=mo.study.TimeBudget(0.05), seeds=[0])
    for record in rows.records.values():
        assert record[0].error == "" and 0 < record[0].seconds <= 0.05
        assert record[0].gradients > 0
    assert time.perf_counter() - begin > 0.1  # both have had their time


# Searches


def test_starts_tune_as_each_by_itself():
    solver = nested(mo.UnrolledAdjoint(), rate=0.1)
    trace = mo.study.Trace(mo.study.GradientBudget(3 * 4 * 121), 100, start())
    given = task(start())
    mo.study.MultiStart(solver, SPACE, num_starts=3).run(given, trace)
    assert len(trace.points) == 5
    found = []
    for hyper in [start(), *_starts(given, 2)]:
        alone = mo.solve_bilevel(
            PROBLEM,
            hyper,
            jnp.full(2, DATA),
            jnp.full(2, DATA),
            solver=solver,
            num_steps=4,
            params=jnp.zeros(2),
        )
        found.append((alone.history.outer_loss[-1], float(alone.hyper["l2"].value)))
    loss, value = min(found)
    assert trace.last.loss == pytest.approx(loss, rel=1e-5)
    assert float(trace.last.hyper["l2"].value) == pytest.approx(value, rel=1e-5)


def _starts(given: mo.study.Task, count: int) -> list[Any]:
    random = np.random.default_rng(np.asarray(jax.random.key_data(given.key)).tolist())
    space = Space(SPACE, given.hyper)
    return [
        space.at_uniforms({"hyper['l2']": random.uniform(size=())}) for _ in range(count)
    ]


def test_halving_ends_at_a_full_run():
    # Momentum is carried from rung to rung, so the last setting is trained as a whole.
    inner = mo.Descent(optax.sgd(0.05, momentum=0.9), num_steps=45)
    given = task(start(), inner)
    method = mo.study.SuccessiveHalving(SPACE, num_settings=9, factor=3)
    trace = mo.study.Trace(mo.study.GradientBudget(9 * 5 + 3 * 10 + 30), 10, start())
    method.check(given, trace)
    method.run(given, trace)
    assert trace.spent == 9 * 5 + 3 * 10 + 30
    losses, steps = trial_losses(given, [trace.last.hyper], [0])
    assert steps[0] == 45
    assert trace.last.loss == pytest.approx(float(losses[0]), rel=1e-5)


def test_halving_refuses_batches_in_a_sequence():
    # Each piece of the training once began at the first of them.
    one = task(start())
    train = mo.BatchSequence(jnp.full((40, 2), DATA))
    trace = mo.study.Trace(mo.study.GradientBudget(BUDGET), 10, start())
    method = mo.study.SuccessiveHalving(SPACE, num_settings=3)
    with pytest.raises(ValueError, match="first batch of a `BatchSequence`"):
        method.check(dataclasses.replace(one, train=train), trace)


def test_a_search_reports_its_best_trial():
    trace = mo.study.Trace(mo.study.GradientBudget(40 * 12), 1_000, start())
    mo.study.RandomSearch(SPACE, batch_size=5).run(task(start()), trace)
    losses = [point.loss for point in trace.points[1:]]
    assert len(losses) == 12 and losses == sorted(losses, reverse=True)
    # The first trial is the one that was given.
    assert losses[0] == pytest.approx((DATA / 1.5 - 1) ** 2, rel=1e-4)


def test_trials_that_fail_are_counted():
    space = {"l2": mo.study.LogUniform(100.0, 1000.0)}  # diverges
    table = compare(
        {"random": mo.study.RandomSearch(space)},
        inner=mo.Descent(optax.sgd(0.2), num_steps=400),
        budget=mo.study.GradientBudget(2_000),
        seeds=[0],
    )
    record = table.records["random"][0]
    assert record.num_failed == 4 and "not finite" in record.failure
    assert "4 steps or trials failed" in str(table)
    # The settings that were given were the only good ones.
    assert table.values("random", "loss")[0] == pytest.approx(1.0, rel=1e-4)


def discrete_inner(params, hyper, data):
    gap = hyper["offset"].value - 3.0
    return inner_loss(params, hyper, data) + 0.5 * jnp.sum((params - gap) ** 2)


def discrete_outer(params, hyper, data):
    miss = (jax.lax.stop_gradient(hyper["offset"].value) - 3.0) ** 2
    return outer_loss(params, hyper, data) + 0.1 * miss


@pytest.mark.slow
def test_hybrid_beats_search_and_gradients_alone():
    # Least at offset = 3 and, with it, params = data / (2 + l2) = 1.
    problem = mo.BilevelProblem(discrete_inner, discrete_outer)
    hyper = {"l2": Positive(jnp.full(6, 0.5)), "offset": Integer(0, 0, 7)}
    space = {"l2": None, "offset": mo.study.Whole(0, 7)}
    both = {"l2": mo.study.LogUniform(1e-3, 1e2), "offset": mo.study.Whole(0, 7)}
    data = jnp.linspace(2.5, 5.0, 6)

    def losses(methods, hyper):
        return mo.study.compare(
            methods,
            problem,
            hyper,
            data,
            data,
            params=jnp.zeros(6),
            inner=INNER,
            budget=mo.study.GradientBudget(9 * (15 * 121 + 40)),
            seeds=[0, 1, 2],
            progress=False,
        )

    grid = mo.study.GridSearch(space, num_values=8)
    methods = {
        "hybrid": mo.study.Hybrid(grid, nested(rate=2.0), 15),
        "random": mo.study.RandomSearch(both),
    }
    result = losses(methods, hyper)
    # A whole number has no derivative: gradients alone leave it as it is.
    frozen = losses({"gradients": nested(rate=2.0)}, mo.hyper.freeze(hyper, Integer))
    best = result.mean("hybrid", "loss").mean
    assert best < 5e-3
    assert best < result.mean("random", "loss").mean
    assert best < frozen.mean("gradients", "loss").mean


# Spaces


HYPER = {
    "rate": Positive(jnp.full(3, 0.1)),
    "share": Interval(0.2, 0.0, 0.5),
    "count": Integer(2, 0, 5),
    "mix": Simplex(jnp.full((2, 4), 0.25)),
    "raw": jnp.zeros(2),
    "fixed": jnp.ones(2),
}
RANGES = {
    "rate": mo.study.LogUniform(1e-3, 1.0),
    "share": mo.study.Uniform(0.0, 0.5),
    "count": mo.study.Whole(0, 5),
    "mix": mo.study.Shares(),
    "raw": mo.study.Uniform(-1.0, 1.0, shared=True),
    "fixed": None,
}


@pytest.mark.parametrize("u", [0.0, 0.3, 0.999999])
def test_draws_are_in_their_ranges(u):
    space = Space(RANGES, HYPER)
    uniforms = {slot.name: np.full(slot.shape, u) for slot in space.drawn}
    drawn = mo.hyper.values(space.at_uniforms(uniforms))
    np.testing.assert_allclose(drawn["rate"], 10 ** (-3 + 3 * u), rtol=1e-5)
    np.testing.assert_allclose(drawn["share"], 0.5 * u, atol=1e-6)
    assert drawn["count"] == min(int(6 * u), 5)
    np.testing.assert_allclose(np.sum(drawn["mix"], axis=-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(drawn["raw"], -1 + 2 * u, atol=1e-6)
    np.testing.assert_array_equal(drawn["fixed"], jnp.ones(2))
    assert jax.tree.structure(space.at_uniforms(uniforms)) == jax.tree.structure(HYPER)


def test_draws_are_uniform():
    space, random = Space(RANGES, HYPER), np.random.default_rng(0)
    draw = lambda: {s.name: random.uniform(size=s.shape) for s in space.drawn}
    drawn = [mo.hyper.values(space.at_uniforms(draw())) for _ in range(150)]
    counts = np.array([int(d["count"]) for d in drawn])
    assert np.all(np.bincount(counts, minlength=6) > 12)
    logs = np.log10([d["rate"] for d in drawn]).ravel()
    assert scipy.stats.kstest((logs + 3) / 3, "uniform").pvalue > 1e-3
    shares = np.array([d["mix"] for d in drawn]).reshape(-1, 4)
    # Each share of a uniform point of the simplex has the distribution Beta(1, 3).
    assert scipy.stats.kstest(shares[:, 0], scipy.stats.beta(1, 3).cdf).pvalue > 1e-3


def test_natural_ranges_follow_from_the_kinds():
    space = Space(None, {"a": Interval(0.2, 0.0, 0.5), "b": [Integer(1, 0, 3)]})
    assert [slot.name for slot in space.drawn] == ["hyper['a']", "hyper['b'][0]"]
    assert isinstance(space.drawn[1].range, mo.study.Whole)
    with pytest.raises(ValueError, match=r"hyper\['l2'\].*no bounds.*LogUniform"):
        Space(None, start())


def test_a_range_at_the_top_is_one_for_all_leaves():
    space = Space(mo.study.LogUniform(0.1, 1.0), [start(), start()])
    assert len(space.drawn) == 2


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"other": mo.study.Uniform(0, 1)}, "`hyper` has no 'other'"),
        ([mo.study.Uniform(0, 1)], "structure of `hyper`"),
        ({"l2": None}, "nothing to search"),
        ({"l2": mo.study.Shares()}, "Simplex"),
    ],
)
def test_spaces_that_do_not_fit_are_refused(space, message):
    with pytest.raises(ValueError, match=message):
        Space(space, start())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mo.study.Uniform(1.0, 0.0), "less than"),
        (lambda: mo.study.LogUniform(0.0, 1.0), "`low`.*positive"),
        (lambda: mo.study.Whole(0.5, 2), "`low` must be an int"),  # type: ignore
        (lambda: mo.study.Uniform(0.0, math.inf), "`high` must be finite"),
        (lambda: mo.study.SuccessiveHalving(SPACE, num_settings=10), "power of `factor`"),
        (lambda: mo.study.OptunaSearch(SPACE, sampler="Magic"), "TPESampler.*'Magic'"),
        (lambda: mo.study.GradientBudget(0), "more than 0"),
        (lambda: mo.study.GradientBudget(float("nan")), "`amount`"),
        (lambda: mo.study.GradientBudget(9, -1.0), "`product_cost` must be a non-negative"),
        (lambda: mo.study.MultiStart(nested(), SPACE, 1), "at least 2"),
        (lambda: mo.study.RandomSearch(SPACE, batch_size=0), "batch_size"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Statistics


def test_p_values_are_those_of_scipy():
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 7))
    expected = np.asarray(scipy.stats.ttest_rel(a, b))[1]
    assert paired_p_value(a, b) == pytest.approx(float(expected), rel=1e-12)
    b[3] = np.nan  # a run that failed
    keep = np.arange(7) != 3
    expected = np.asarray(scipy.stats.ttest_rel(a[keep], b[keep]))[1]
    assert paired_p_value(a, b) == pytest.approx(float(expected), rel=1e-12)


def test_p_values_without_chance():
    same = np.array([1.0, 2.0, 3.0])
    assert paired_p_value(same, same) == 1.0
    # Two seeds of one accuracy, or seeds that change nothing, once counted as p = 0.
    assert math.isnan(paired_p_value(same, same + 0.5))
    assert math.isnan(paired_p_value(same[:1], same[:1]))


def test_holm():
    # By hand: 0.01 * 4, 0.02 * 3, 0.03 * 2, 0.04, each at least the one before.
    raised = adjusted([0.04, 0.01, math.nan, 0.03, 0.02])
    np.testing.assert_allclose(raised, [0.06, 0.04, math.nan, 0.06, 0.06])


def test_a_mean_of_failures_is_none():
    assert str(Mean.of(np.array([math.nan]))) == "-"
    assert Mean.of(np.array([1.0, 3.0, math.nan])).standard_error == pytest.approx(1.0)
    assert str(Mean.of(np.array([0.91, 0.92, 0.915]))) == "0.9150 +- 0.0029"
    # Without spread, four places once showed it as 0.
    assert str(Mean.of(np.array([3e-6, 3e-6]))) == "3e-06 +- 0"


def record(values, costs=(0.0, 50.0, 100.0)) -> mo.study.Record:
    return mo.study.Record(list(costs), {"loss": list(values)}, 100.0, 0.0, 1.0)


def test_verdicts_say_what_is_beyond_chance():
    records = {
        "a": {s: record([9, 5, 1 + 0.1 * s]) for s in range(5)},
        "b": {s: record([9, 3, 1 + 0.11 * s + 0.05 * (-1) ** s]) for s in range(5)},
        "c": {s: record([9, 8, 7 + 0.1 * s + 0.01 * s * s]) for s in range(5)},
    }
    table = mo.study.Comparison(records, {"loss": False}, 100.0, "gradients")
    verdict = table.verdict("loss")
    assert "a is best: 1.200 +- 0.071" in verdict
    assert "Beyond chance it is better than c (p < 0.001)" in verdict
    assert "within chance of b (p = " in verdict
    assert table.changes() == [
        "By loss, b is best at half of the budget, and a at its end."
    ]


def test_a_method_that_fails_on_a_seed_is_not_best():
    # Its mean leaves out the seed on which all are worse. It once led the table.
    records = {
        "fails": {s: record([9, 9, 1 + s / 10 if s < 4 else math.nan]) for s in range(5)},
        "whole": {s: record([9, 9, 2 + s**2 / 8 + (s == 4)]) for s in range(5)},
    }
    table = mo.study.Comparison(records, {"loss": False}, 100.0, "gradients")
    assert table.order("loss") == ["whole", "fails"]
    assert "(4 of 5)" in str(table)
    verdict = table.verdict("loss")
    assert "whole is best" in verdict and "better than" not in verdict
    assert "it is behind fails (p = " in verdict


def test_ties_are_no_change_of_the_order():
    # All begin at the same settings, and the first in the table once was ahead there.
    rows = {name: {0: record([9, 9, end])} for name, end in (("a", 2), ("b", 1))}
    table = mo.study.Comparison(rows, {"loss": False}, 100.0, "gradients")
    assert table.changes() == []
    for rows in table.records.values():
        rows[0].values.update(F1=[0, 0, 0], AUC=[math.nan] * 3)
    metrics = {"loss": False, "F1": True, "AUC": True}
    table = mo.study.Comparison(table.records, metrics, 100.0, "gradients")
    assert table.changes() == []


def test_metrics_that_disagree_are_said():
    def both(loss, f1):
        return mo.study.Record([0.0], {"loss": [loss], "F1": [f1]}, 0.0, 0.0, 0.0)

    table = mo.study.Comparison(
        {"a": {0: both(1.0, 0.5)}, "b": {0: both(2.0, 0.9)}},
        {"loss": False, "F1": True},
        1.0,
        "gradients",
    )
    assert table.order("loss") == ["a", "b"] and table.order("F1") == ["b", "a"]
    assert "depends on the metric: a by loss, b by F1" in str(table)
    assert "One seed says nothing about chance" in str(table)


# Results that are kept


class Interrupted(mo.study.AbstractMethod):
    """A method that is interrupted at its second run."""

    counter: list[int] = eqx.field(static=True)

    def check(self, task, trace):
        pass

    def run(self, task, trace):
        self.counter[0] += 1
        if self.counter[0] == 2:
            raise KeyboardInterrupt


def test_a_study_goes_on_after_an_interrupt(tmp_path):
    methods = {"unrolled": nested(), "random": METHODS["random"]}
    whole = compare(methods, budget=mo.study.GradientBudget(600))
    options = {"budget": mo.study.GradientBudget(600), "out": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        compare(methods | {"stop": Interrupted([0])}, **options)
    found = json.loads((tmp_path / "results.json").read_text())["records"]
    assert {name: sorted(rows) for name, rows in found.items()} == {
        "unrolled": ["0", "1"],
        "random": ["0", "1"],
        "stop": ["0"],
    }
    again = compare(methods, **options)
    for name in methods:
        for seed in (0, 1):
            mine, other = whole.records[name][seed], again.records[name][seed]
            assert mine.costs == other.costs and mine.values == other.values
    # A finished run is not run again.
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["records"]["random"]["0"] == found["random"]["0"]


@pytest.mark.parametrize("name", ["tuned", "hybrid"])
def test_an_interrupt_within_a_run_is_no_result(tmp_path, monkeypatch, name):
    # `solve_bilevel` returns what it has reached, which once was kept as a whole run.
    def interrupted(run):
        if run.num_steps >= 2:
            raise KeyboardInterrupt

    def solve(*args, callbacks=(), **options):
        callbacks = [*callbacks, interrupted]
        return mo.solve_bilevel(*args, callbacks=callbacks, **options)

    search = mo.study.RandomSearch(SPACE)
    methods = {"tuned": nested(), "hybrid": mo.study.Hybrid(search, nested(), 3)}
    methods = {"untuned": mo.study.Untuned(), name: methods[name]}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("metaopt.study._tuned.solve_bilevel", solve)
        compare(methods, out=tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())["records"]
    assert list(found) == ["untuned"]


class Failing(mo.study.AbstractMethod):
    """A method that fails after one point."""

    def check(self, task, trace):
        pass

    def run(self, task, trace):
        one = Work(np.asarray(10.0), np.asarray(0.0))
        trace.add(one, 0.1, 0.5, {"l2": Positive(BEST)})
        raise RuntimeError("the disk of the cluster is gone")


def test_a_method_that_fails_ends_alone(tmp_path):
    methods = {"failing": Failing(), "untuned": mo.study.Untuned()}
    table = compare(methods, out=tmp_path)
    assert "failing, seed 0, ended with: RuntimeError: the disk" in str(table)
    assert "Not tested against failing" in table.verdict("loss")
    assert table.order("loss") == ["untuned", "failing"]
    record = table.records["failing"][1]
    assert record.gradients == 10 and len(record.costs) == 2


def test_another_study_in_the_folder_is_refused(tmp_path):
    compare({"untuned": mo.study.Untuned()}, out=tmp_path, seeds=[0])
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(
        ValueError, match="another study: `budget.amount` was 4000 and is 999"
    ):
        budget = mo.study.GradientBudget(999)
        compare({"untuned": mo.study.Untuned()}, out=tmp_path, seeds=[0], budget=budget)
    with pytest.raises(ValueError, match="the name 'untuned': .*was Untuned and is Random"):
        compare({"untuned": METHODS["random"]}, out=tmp_path, seeds=[0])
    assert (tmp_path / "results.json").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"<html>", b'{"version": 1}', b"[1, 2]"])
def test_a_damaged_file_of_results_is_refused(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="results.json is no file of results"):
        compare({"untuned": mo.study.Untuned()}, out=tmp_path, seeds=[0])
    assert path.read_bytes() == content


class Nested(mo.study.AbstractMethod):
    """A method that begins the same study once more."""

    out: Path = eqx.field(static=True)

    def check(self, task, trace):
        pass

    def run(self, task, trace):
        compare({"untuned": mo.study.Untuned()}, out=self.out)


def test_two_studies_do_not_write_one_folder(tmp_path):
    # Each once wrote its own results over those of the other.
    table = compare({"second": Nested(tmp_path)}, out=tmp_path, seeds=[0])
    assert "Another run writes the file" in table.records["second"][0].error
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curves.png",
        "results.json",
        "table.txt",
    ]


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        compare({"x": Failing()}, out=tmp_path / "file" / "folder", seeds=[0])


def no_number(params, hyper, batch):
    return params


def raising(params, hyper, batch):
    raise KeyError("accuracy of what?")


SEEDS = mo.NestedSolver(INNER, mo.UnrolledAdjoint(), optax.sgd(0.5), num_seeds=4)
FOLDS = mo.Folds([jnp.zeros(2), jnp.ones(2)])


@pytest.mark.parametrize(
    ("methods", "changes", "message"),
    [
        ({}, {}, "`methods` must be a dictionary"),
        ({"a": INNER}, {}, "must be a bilevel solver"),
        ({"a": nested()}, {"budget": mo.study.GradientBudget(100)}, "'a'.*one outer step"),
        ({"a": METHODS["calls"]}, {"budget": mo.study.GradientBudget(200)}, "one compiled"),
        ({"a": METHODS["random"]}, {"budget": mo.study.GradientBudget(30)}, "one trial"),
        ({"a": METHODS["starts"]}, {"budget": mo.study.GradientBudget(200)}, "3 starts"),
        ({"a": METHODS["hybrid"]}, {"budget": mo.study.GradientBudget(200)}, "a trial of"),
        ({"a": METHODS["halving"]}, {"budget": mo.study.GradientBudget(80)}, "one bracket"),
        ({"a": METHODS["random"]}, {"budget": mo.study.ProductBudget(10)}, "no products"),
        ({"a": METHODS["halving"]}, {"budget": mo.study.ProductBudget(10)}, "no products"),
        (
            {"a": SEEDS},
            {"budget": mo.study.GradientBudget(300)},
            "outer step costs 484",
        ),
        ({"a": nested()}, {"budget": 1_000}, "`budget`.*GradientBudget"),
        ({"a": nested()}, {"seeds": [0, 1, 0]}, "`seeds` has 0 more than once"),
        ({"a": nested()}, {"seeds": []}, "`seeds` is empty"),
        ({"a": nested()}, {"seeds": 3}, "range"),
        (
            {"a": nested()},
            {"metrics": {"m": raising}},
            "'m', called as .* KeyError.*of what",
        ),
        ({"a": nested()}, {"metrics": {"m": no_number}}, "'m' must return one number"),
        ({"a": nested()}, {"metrics": {"loss": raising}}, "taken by the outer loss"),
        ({"a": nested()}, {"target": ("F1", 0.5)}, "`target` must be the name of a metric"),
        ({"a": nested()}, {"target": ("loss", "low")}, "and a value; got .*'low'"),
        ({"a": nested()}, {"test": FOLDS}, "`test` is a `metaopt.Folds`.*split="),
        ({"a": nested()}, {"num_points": 0}, "num_points"),
        ({"a": nested()}, {"split": lambda seed: (None, None, None)}, "leave `train`"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_step(methods, changes, message):
    with pytest.raises(ValueError, match=message):
        compare(methods, **changes)


class Free(mo.study.AbstractBudget):
    """A budget that nothing is taken of."""

    amount: float = 10.0
    unit: ClassVar[str] = "coins"

    def cost(self, work, seconds):
        return None if work is None else 0 * work.products


def test_a_method_that_takes_nothing_of_the_budget_ends():
    # Its run never ended.
    methods = {
        "tuned": nested(),
        "starts": mo.study.MultiStart(nested(), SPACE, 2),
        "hybrid": mo.study.Hybrid(mo.study.RandomSearch(SPACE), nested(), 1),
    }
    table = compare(methods, seeds=[0], budget=Free())
    for name in methods:
        assert "takes no coins, and would never end" in table.records[name][0].error


class SilentSolver(mo.extend.AbstractSingleLoopSolver):
    """A single-loop solver that does not count its work."""

    outer: Any
    num_train_batches: int = eqx.field(default=1, static=True)
    num_valid_batches: int = eqx.field(default=1, static=True)

    def first(self, problem, hyper, params):
        return None

    def update(self, problem, state, train, valid, key):
        value, (slope, direct) = jax.value_and_grad(
            lambda p, h: problem.outer_loss(p, h, valid[0]), (0, 1)
        )(state.params, state.hyper)
        inner = jax.grad(lambda p, h: inner_loss(p, h, train[0]))
        params = state.params - 0.2 * inner(state.params, state.hyper)
        cross = jax.vjp(lambda h: inner(state.params, h), state.hyper)[1](slope)[0]
        direction = jax.tree.map(lambda a, b: a - b, direct, cross)
        return mo.extend.SingleLoopUpdate(params, None, direction, value)


def test_a_solver_that_counts_nothing_needs_a_clock():
    methods = {"silent": SilentSolver(optax.sgd(0.1))}
    table = compare(methods, seeds=[0])
    assert "does not say how many gradients" in table.records["silent"][0].error
    assert "TimeBudget" in str(table)
    table = compare(methods, seeds=[0], budget=mo.study.TimeBudget(0.02))
    assert table.records["silent"][0].error == ""


# Parts of `hyper` that are not tuned


def test_parts_that_are_not_tuned_stay_as_they_are():
    # `None` once had a range too many, and a hybrid returned what was frozen as arrays.
    def pulled(params, hyper, data):
        return inner_loss(params, hyper, data + hyper["held"].value["by"])

    hyper = start() | {"held": mo.hyper.Frozen({"by": jnp.ones(2)}), "none": None}
    space = SPACE | {"held": None, "none": None}
    methods = {
        "random": mo.study.RandomSearch(space),
        "starts": mo.study.MultiStart(nested(), space, 2),
        "hybrid": mo.study.Hybrid(mo.study.RandomSearch(space), nested(), 2),
        "halving": mo.study.SuccessiveHalving(space, num_settings=3),
    }
    problem = mo.BilevelProblem(pulled, outer_loss)
    for name, method in methods.items():
        trace = mo.study.Trace(mo.study.GradientBudget(1_000), 10, hyper)
        method.run(task(hyper, problem=problem), trace)
        assert len(trace.points) > 1, name
        for point in trace.points:
            assert jax.tree.structure(point.hyper) == jax.tree.structure(hyper), name
            np.testing.assert_array_equal(point.hyper["held"].value["by"], 1.0)


# Optuna


def test_trials_of_another_kind_in_the_journal_are_left_alone(tmp_path):
    # They once were taken for those of any method and problem of the same seed.
    pytest.importorskip("optuna")

    def losses(name: str, method: str, target: float) -> list[float]:
        journal = tmp_path / name
        search = mo.study.OptunaSearch(SPACE, sampler="RandomSampler", journal=journal)
        methods = {"search": search, "hybrid": mo.study.Hybrid(search, nested(), 1)}
        outer = lambda params, hyper, data: jnp.mean((params - target) ** 2)
        trace = mo.study.Trace(mo.study.GradientBudget(800), 1000, start())
        problem = mo.BilevelProblem(inner_loss, outer)
        methods[method].run(task(start(), problem=problem), trace)
        return [point.loss for point in trace.points[1:]]

    kinds = [("hybrid", 1.0), ("search", 1.0), ("search", 0.5)]
    shared = [losses("shared", *kind) for kind in kinds]
    assert shared == [losses(f"{kind}", *kind) for kind in kinds]


def test_optuna_begins_at_the_settings_that_were_given():
    trace = mo.study.Trace(mo.study.GradientBudget(40 * 3), 100, start())
    mo.study.OptunaSearch(SPACE).run(task(start()), trace)
    assert len(trace.points) == 4
    assert trace.points[1].loss == pytest.approx((DATA / 1.5 - 1) ** 2, rel=1e-4)


def test_optuna_draws_every_kind():
    optuna = pytest.importorskip("optuna")
    assert optuna is not None
    problem = mo.BilevelProblem(
        inner_loss, lambda params, hyper, data: jnp.sum(hyper["mix"].value[0])
    )
    hyper = HYPER | {"l2": Positive(0.5), "order": Ordered(jnp.arange(3.0))}
    space = RANGES | {"l2": mo.study.LogUniform(0.1, 1.0), "order": None}
    trace = mo.study.Trace(mo.study.GradientBudget(40 * 4), 100, hyper)
    mo.study.OptunaSearch(space, sampler="RandomSampler").run(
        task(hyper, problem=problem), trace
    )
    assert len(trace.points) == 5 and trace.num_failed == 0


WORKER = """
import sys
import jax, jax.numpy as jnp, optax
import metaopt as mo
sys.path.insert(0, {tests!r})
from test_study import INNER, PROBLEM, SPACE, start, task
budget = mo.study.GradientBudget(40 * 24)
trace = mo.study.Trace(budget, 1000, start())
search = mo.study.OptunaSearch(SPACE, journal={journal!r})
print("begins", flush=True)
search.run(task(start()), trace)
print(trace.spent / 40, trace.last.loss)
"""


@pytest.mark.slow
def test_two_workers_share_one_journal_and_one_is_killed(tmp_path):
    optuna = pytest.importorskip("optuna")
    journal = str(tmp_path / "trials.journal")
    code = textwrap.dedent(WORKER).format(tests=str(Path(__file__).parent), journal=journal)
    spawn = lambda: subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    first, second = spawn(), spawn()
    assert first.stdout is not None and first.stdout.readline() == "begins\n"
    while not (os.path.exists(journal) and os.path.getsize(journal) > 3_000):
        assert first.poll() is None or second.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    third = spawn()
    for worker in (second, third):
        output, _ = worker.communicate(timeout=200)
        assert worker.returncode == 0
        trials, loss = map(float, output.splitlines()[-1].split())
        assert trials == 24
        assert loss < 0.1
    backend = optuna.storages.journal.JournalFileBackend(journal)
    storage = optuna.storages.JournalStorage(backend)
    (name,) = optuna.get_all_study_names(storage)
    trials = optuna.load_study(study_name=name, storage=storage).trials
    finished = [t for t in trials if t.state == optuna.trial.TrialState.COMPLETE]
    # Those that were under way when the budget was spent are there as well.
    assert 24 <= len(finished) <= 26
    assert len({t.params["hyper['l2']"] for t in finished}) > 20


# Mistakes that a user makes


def test_seeds_that_play_no_part_are_said():
    table = compare({"unrolled": nested(), "untuned": mo.study.Untuned()})
    assert "All seeds gave the same numbers" in str(table)
    assert "p < 0.001" not in str(table)


def test_settings_that_were_found_are_kept(tmp_path):
    methods = {"unrolled": nested(), "untuned": mo.study.Untuned()}
    table = compare(methods, out=tmp_path, seeds=[0])
    assert table.records["untuned"][0].found["hyper['l2']"] == pytest.approx(0.5)
    assert table.records["unrolled"][0].found["hyper['l2']"] > 1.5
    content = json.loads((tmp_path / "results.json").read_text())
    found = content["records"]["unrolled"]["0"]["found"]
    assert found == table.records["unrolled"][0].found


class Once(mo.study.AbstractMethod):
    """A method that fails once."""

    failed: list[bool] = eqx.field(static=True)

    def check(self, task, trace):
        pass

    def run(self, task, trace):
        if not self.failed[0]:
            self.failed[0] = True
            raise OSError("the disk is full")


def test_runs_that_failed_are_run_again(tmp_path):
    methods = {"once": Once([False])}
    assert (
        "disk is full" in compare(methods, out=tmp_path, seeds=[0]).records["once"][0].error
    )
    # The list is part of the description of the method, which may take its place.
    assert compare(methods, out=tmp_path, seeds=[0]).records["once"][0].error == ""


class Scripted(mo.study.AbstractMethod):
    """A method whose runs fail as the list says, which is no part of its description."""

    def check(self, task, trace):
        pass

    def run(self, task, trace):
        SCRIPT.append(None)
        if len(SCRIPT) == 2:
            raise OSError("the disk is full")


SCRIPT: list[None] = []  # one entry for each run


def test_a_seed_that_failed_is_run_again_beside_those_that_did_not(tmp_path):
    SCRIPT.clear()
    rows = compare({"a": Scripted()}, out=tmp_path).records["a"]
    assert rows[0].error == "" and "disk is full" in rows[1].error
    rows = compare({"a": Scripted()}, out=tmp_path).records["a"]
    assert rows[0].error == rows[1].error == ""
    assert len(SCRIPT) == 3  # the first seed was not run again


def test_a_folder_is_for_one_process(tmp_path):
    class Nested(mo.study.AbstractMethod):
        def check(self, task, trace):
            pass

        def run(self, task, trace):
            with pytest.raises(ValueError, match="Another run writes the file"):
                compare({"untuned": mo.study.Untuned()}, out=tmp_path, seeds=[0])

    table = compare({"nested": Nested()}, out=tmp_path, seeds=[0])
    assert table.records["nested"][0].error == ""
    assert not list(tmp_path.glob(".*"))


def test_an_interrupt_says_what_is_there(tmp_path):
    with pytest.raises(KeyboardInterrupt) as error:
        methods = {"untuned": mo.study.Untuned(), "stop": Interrupted([1])}
        compare(methods, out=tmp_path, seeds=[0])
    assert "1 of 2 runs are finished, and in " in error.value.__notes__[0]


WRONG_SPACES: list[tuple[Any, str]] = [
    ({"count": mo.study.Whole(0, 9)}, r"`hyper\['count'\]`.*leaves that of Integer"),
    ({"count": mo.study.LogUniform(1.0, 5.0)}, r"`hyper\['count'\]` is a whole number"),
    ({"rate": mo.study.Uniform(-1.0, 1.0)}, r"`hyper\['rate'\]`.*leaves that of Positive"),
    ({"share": mo.study.Uniform(0.0, 0.9)}, r"`hyper\['share'\]`.*from 0.0 to 0.5"),
    ({"lr": mo.study.Uniform(0.0, 0.9)}, r"`space\['lr'\]`: `hyper` has no 'lr'"),
    ({"rate": (0.001, 1.0)}, r"`space\['rate'\]\[0\]` is 0.001. Write a range"),
]


@pytest.mark.parametrize(("space", "message"), WRONG_SPACES)
def test_spaces_beyond_their_leaves_are_refused(space, message):
    with pytest.raises(ValueError, match=message):
        Space(space, HYPER)


def test_parts_that_a_space_does_not_name_stay():
    space = Space({"share": mo.study.Uniform(0.0, 0.5)}, HYPER)
    assert [slot.name for slot in space.drawn] == ["hyper['share']"]


@pytest.mark.parametrize(
    ("methods", "changes", "message"),
    [
        ({"a": mo.study.Untuned}, {}, r"class `Untuned` itself. Call it"),
        ({"a": mo.UnrolledAdjoint()}, {}, r"is a part of one: `metaopt.NestedSolver"),
        ({"a": nested()}, {"out": 3}, "`out` must be the path of a folder"),
        ({"a": nested()}, {"out": __file__}, "`out` is a file"),
        (
            {"a": nested()},
            {"metrics": {"m": lambda p: 1.0}},
            r"called as `fn\(params, hyper",
        ),
    ],
)
def test_more_bad_arguments(methods, changes, message):
    with pytest.raises(ValueError, match=message):
        compare(methods, **changes)


def test_a_split_of_two_is_refused():
    with pytest.raises(ValueError, match="tuple of three, .*; got tuple of 2"):
        mo.study.compare(
            {"a": nested()},
            PROBLEM,
            start(),
            split=lambda seed: (None, None),  # pyright: ignore
            inner=INNER,
            budget=mo.study.GradientBudget(500),
            seeds=[0],
            params=jnp.zeros(2),
        )


def test_samplers_that_need_more_than_a_seed_are_refused():
    with pytest.raises(ValueError, match="`sampler` must be one of .*TPESampler") as error:
        mo.study.OptunaSearch(SPACE, sampler="GridSampler")
    assert "BaseSampler" not in str(error.value)
