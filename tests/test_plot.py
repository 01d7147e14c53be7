"""Pictures of runs, schedules, comparisons and eigenvalues."""

from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

import metaopt as mo
from metaopt.plot._history import running_mean
from metaopt.plot._lines import readable


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def run(losses: Any) -> mo.History:
    losses = np.asarray(losses, float)
    columns = {"outer_loss": losses, "hypergradient_norm": losses / 2}
    return mo.History(columns | {"seconds": np.ones(len(losses))})


def texts(legend: Any) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def draw(axes: Any) -> None:
    """Render, which is when matplotlib notices most mistakes."""
    axes.figure.canvas.draw()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("['l2']", "l2"),
        ("['net'].layers[0].weight", "net.layers.0.weight"),
        ("hyper['rates'][3]", "hyper.rates.3"),
        (".log_rate", "log_rate"),
        ("", ""),
    ],
)
def test_names_have_no_brackets(name, text):
    assert readable(name) == text


# Histories


def test_a_run_is_drawn_with_its_running_mean():
    losses = np.linspace(2.0, 1.0, 40)
    left, right = mo.plot.history(run(losses))
    assert [left.get_title(), right.get_title()] == ["outer loss", "hypergradient norm"]
    thin, bold = left.lines
    np.testing.assert_array_equal(thin.get_ydata(), losses)
    np.testing.assert_allclose(bold.get_ydata(), running_mean(losses))
    assert left.get_yscale() == "linear" and left.get_legend() is None
    (line,) = mo.plot.history(run(losses[:5]), columns=["outer_loss"])[0].lines
    np.testing.assert_array_equal(line.get_ydata(), losses[:5])
    draw(left)


def test_seeds_are_a_mean_and_a_band():
    runs = [run([100.0, 10.0, 1.0]), run([300.0, 30.0, 3.0, 0.3])]
    (axes,) = mo.plot.history({"tuned": runs, "other": run([1.0])}, columns=["outer_loss"])
    mean, other = axes.lines
    np.testing.assert_allclose(mean.get_ydata(), [200.0, 20.0, 2.0])
    (band,) = axes.collections
    edges = band.get_paths()[0].get_extents()
    assert edges.ymax == pytest.approx(300.0) and edges.ymin == pytest.approx(1.0)
    assert axes.get_yscale() == "log"
    # The legend is beside the curves.
    legend = axes.get_legend()
    assert texts(legend) == ["tuned", "other"]
    draw(axes)
    assert legend.get_window_extent().x0 >= axes.get_window_extent().x1
    assert len(other.get_ydata()) == 1


def test_running_means_pass_over_what_is_not_known():
    values = np.array([1.0, np.nan, 3.0, np.nan, np.nan])
    np.testing.assert_allclose(running_mean(values, 3), [1, 2, 3, 3, np.nan])
    np.testing.assert_allclose(running_mean(np.arange(5.0), 9), np.full(5, 2.0))


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        (3, {}, "`runs` must be something like `solution.history`"),
        ([], {}, "`runs` must be something like `solution.history`"),
        ({}, {}, "nothing to draw"),
        (run([1.0]), {"columns": []}, "nothing to draw"),
        (run([1.0]), {"columns": ["loss"]}, "'loss', and the history has outer_loss, hyp"),
        (run([]), {}, "has no steps"),
    ],
)
def test_histories_that_cannot_be_drawn_are_refused(runs, options, message):
    with pytest.raises(ValueError, match=message):
        mo.plot.history(runs, **options)


# Schedules


def test_a_schedule_is_a_curve_over_steps():
    tuned = mo.hyper.WarmupCosine(0.5, num_steps=20)
    (axes,) = mo.plot.schedule(tuned)
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_ydata(), np.asarray(tuned.value, float))
    assert axes.get_xlabel() == "inner step" and axes.get_ylim()[0] == 0
    draw(axes)


def test_schedules_share_their_axis_and_one_legend():
    rates = np.linspace(0.1, 0.4, 12).reshape(4, 3)
    begin = mo.hyper.Positive(jnp.full((4, 3), 0.2))
    names = ["first layer", "second layer", "third layer"]
    left, right = mo.plot.schedule({"begin": begin, "tuned": rates}, labels=names)
    assert [left.get_title(), right.get_title()] == ["begin", "tuned"]
    assert left.get_legend() is None and texts(right.get_legend()) == names
    np.testing.assert_array_equal(right.lines[2].get_ydata(), rates[:, 2])
    assert left.get_ylim() == right.get_ylim()
    draw(left)


def test_many_parts_are_bands_and_no_threads():
    values = np.random.default_rng(0).uniform(size=(6, 100))
    (axes,) = mo.plot.schedule(values)
    (line,) = axes.lines
    np.testing.assert_allclose(line.get_ydata(), np.median(values, axis=1))
    assert texts(axes.get_legend()) == ["90 %", "half", "median of 100"]


@pytest.mark.parametrize(
    ("schedules", "options", "message"),
    [
        (0.1, {}, "`schedules` must hold one number for each step"),
        ({"a": np.zeros((2, 2, 2))}, {}, r"`schedules\['a'\]` .*of shape \(2, 2, 2\)"),
        ({}, {}, "`schedules` is empty"),
        ("rate", {}, "got str"),
        (np.zeros((4, 2)), {"labels": ["a"]}, "has 1 names, and the schedule has 2 parts"),
    ],
)
def test_schedules_of_another_shape_are_refused(schedules, options, message):
    with pytest.raises(ValueError, match=message):
        mo.plot.schedule(schedules, **options)


# Paths


def test_entries_of_a_leaf_have_the_names_that_are_given():
    path = {"rate": np.ones((3, 2)), "momentum": np.ones(3)}
    history = mo.History({"outer_loss": np.zeros(3)}, path)
    axes = mo.plot.hyper_path(history, labels={"rate": ["input", "output"]})
    legends = {a.get_title(): a.get_legend() for a in axes}
    assert texts(legends["rate"]) == ["input", "output"] and legends["momentum"] is None
    with pytest.raises(
        ValueError, match="names 'rates', and the panels are momentum, rate"
    ):
        mo.plot.hyper_path(history, labels={"rates": ["a", "b"]})
    with pytest.raises(ValueError, match=r"`labels\['rate'\]` has 1 names.* has 2 numbers"):
        mo.plot.hyper_path(history, labels={"rate": ["a"]})


# Comparisons


def table() -> mo.study.Comparison:
    def record(last: float) -> mo.study.Record:
        values = {"loss": [1.0, last], "accuracy": [0.5, 1 - last]}
        return mo.study.Record([0.0, 50.0], values, 50.0, 0.0, 1.0)

    records = {"a": {0: record(0.2), 1: record(0.4)}, "b": {0: record(0.5), 1: record(0.5)}}
    return mo.study.Comparison(
        records, {"loss": False, "accuracy": True}, 100.0, "gradients"
    )


def test_a_comparison_is_means_and_bands_over_the_budget():
    figure = mo.plot.comparison(table())
    left, right = figure.axes
    assert [left.get_title(), right.get_title()] == ["loss (test)", "accuracy (test)"]
    means = left.lines[0].get_ydata()
    assert means[0] == 1.0 and means[-1] == pytest.approx(0.3)
    assert left.lines[0].get_xdata()[-1] == 100.0
    assert texts(figure.legends[0]) == ["a", "b"]
    (only,) = mo.plot.comparison(table(), metrics=["accuracy"]).axes
    assert only.get_title() == "accuracy (test)"
    draw(left)


def test_comparisons_of_something_else_are_refused():
    with pytest.raises(ValueError, match="`table` must be something like `metaopt.study"):
        mo.plot.comparison(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="has 'F1', and the comparison has loss, accuracy"):
        mo.plot.comparison(table(), metrics=["F1"])


def test_a_method_far_from_the_rest_can_be_left_out():
    figure = mo.plot.comparison(table(), methods=["b"])
    assert texts(figure.legends[0]) == ["b"]
    with pytest.raises(ValueError, match="`methods` has 'c', and the comparison has a, b"):
        mo.plot.comparison(table(), methods=["c"])


# Curves


def test_curves_have_their_names_beside_the_panel():
    lines = {"one": [3.0, 2.0, 1.0], "two": ([0, 10, 20], [1.0, 2.0, 2.5])}
    axes = mo.plot.curves(lines, levels={"best": 0.5}, title="loss", xlabel="step")
    one, two, best = axes.lines
    np.testing.assert_array_equal(one.get_xdata(), [0, 1, 2])
    np.testing.assert_array_equal(two.get_data(), [[0, 10, 20], [1.0, 2.0, 2.5]])
    assert best.get_ydata()[0] == 0.5 and best.get_linestyle() == ":"
    assert texts(axes.get_legend()) == ["one", "two", "best"]
    draw(axes)
    # To the right of the panel, where no curve is.
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1 - 1
    assert [axes.get_xscale(), axes.get_yscale()] == ["linear", "linear"]


def test_a_curve_on_another_is_dashed():
    x = np.linspace(1.0, 2.0, 50)
    axes = mo.plot.curves({"a": x, "b": x + 1e-4, "c": x + 0.5}, legend=False)
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--", "-"]
    assert axes.get_legend() is None


def test_curves_may_have_gaps():
    nothing = np.full(3, np.nan)
    draw(mo.plot.curves({"a": nothing}))
    axes = mo.plot.curves({"a": [1.0, np.nan, 3.0], "b": nothing})
    assert [line.get_linestyle() for line in axes.lines] == ["-", "-"]
    draw(axes)


def test_axes_of_curves_are_logarithmic_where_values_are_wide():
    axes = mo.plot.curves({"a": ([1, 10, 100], [1.0, 30.0, 900.0])})
    assert [axes.get_xscale(), axes.get_yscale()] == ["log", "log"]
    draw(axes)
    for few in ([1.0], [1.0, 100.0]):
        mo.plot.curves({"a": (few, few)})
    # Steps from 1 to 40 are at equal distances.
    axes = mo.plot.curves({"a": (np.arange(1, 41), np.ones(40))})
    assert [axes.get_xscale(), axes.get_yscale()] == ["linear", "linear"]


def test_curves_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="`lines` is empty"):
        mo.plot.curves({})
    for given in (1.0, np.ones((2, 2)), ([1, 2], [1.0, 2.0, 3.0]), []):
        with pytest.raises(ValueError, match=r"`lines\['a'\]` must be values of shape"):
            mo.plot.curves({"a": given})


# Eigenvalues


def test_real_eigenvalues_are_drawn_by_their_size():
    axes = mo.plot.spectrum(np.array([-0.5, 100.0, 1.0, 0.01]))
    positive, negative = axes.lines
    np.testing.assert_array_equal(positive.get_ydata(), [100.0, 1.0, 0.01])
    np.testing.assert_array_equal(negative.get_ydata(), [0.5])
    assert negative.get_color() == "C3" and axes.get_yscale() == "log"
    assert texts(axes.get_legend()) == ["positive", "negative"]
    draw(axes)


def test_eigenvalues_of_zero_are_counted():
    axes = mo.plot.spectrum(np.array([3.0, 0.0, 1.0, 0.0]))
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [3.0, 1.0])
    assert axes.get_title() == "Eigenvalues; 2 of 4 are zero"
    draw(mo.plot.spectrum(np.zeros(3)))


def test_complex_eigenvalues_are_drawn_in_the_plane():
    found = jnp.array([0.5 + 0.5j, -0.9j])
    axes = mo.plot.spectrum({"layer": found, "bound": jnp.array([0.3, -0.3])})
    assert axes.get_title() == "Eigenvalues; spectral radius 0.9"
    assert texts(axes.get_legend()) == ["layer", "bound"]
    np.testing.assert_allclose(axes.collections[0].get_offsets()[0], [0.5, 0.5])
    np.testing.assert_allclose(np.hypot(*axes.lines[0].get_data()), 1.0)
    draw(axes)


@pytest.mark.parametrize(
    ("eigenvalues", "message"),
    [
        (np.eye(2), r"must have shape \(n,\); got shape \(2, 2\)"),
        (np.zeros(0), r"must have shape \(n,\)"),
        (np.array([1.0, np.nan]), "infinite or NaN"),
        ({}, "`eigenvalues` is empty"),
        ("large", "dtype"),
    ],
)
def test_eigenvalues_of_another_kind_are_refused(eigenvalues, message):
    with pytest.raises(ValueError, match=message):
        mo.plot.spectrum(eigenvalues)
