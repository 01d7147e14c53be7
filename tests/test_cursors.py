"""The cursors of both losses in a run: epochs across outer steps, resumed bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo
from metaopt._bilevel._drawn import draw
from test_callbacks import NOISY, noisy, ROWS, solve, STOCHASTIC


@pytest.mark.parametrize("num_steps", [1, 4])
def test_epochs_of_both_losses_continue_across_outer_steps(num_steps):
    # Each outer step once began an epoch, so that few inner steps hardly saw most rows.
    # Rows are one-hot: inner steps count in `params` the rows that they see.
    rows, batch_sizes, seen = 10, (4, 3), []
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: -jnp.sum(batch @ params),
        lambda params, hyper, batch: (jnp.sum(params * hyper), jnp.sum(batch, axis=0)),
        has_aux=True,
    )
    solver = mo.NestedSolver(
        mo.Descent(optax.sgd(1.0), num_steps), mo.UnrolledAdjoint(), optax.sgd(0.0)
    )
    mo.solve_bilevel(
        problem,
        jnp.ones(rows),
        *(mo.Minibatches(jnp.eye(rows), size) for size in batch_sizes),
        params=jnp.zeros(rows),
        solver=solver,
        num_steps=20,
        callbacks=[lambda run: seen.append((run.params, run.info.report.outer.aux))],
    )
    inner, outer = (np.stack(counts) for counts in zip(*seen))
    for counts, each in ((inner, num_steps * batch_sizes[0]), (outer, batch_sizes[1])):
        assert len(np.unique(counts, axis=0)) > 5
        for step, total in enumerate(np.cumsum(counts, axis=0), 1):
            # Whole epochs have each row once, and the present one has it once at most.
            epochs, left = divmod(step * each, rows)
            np.testing.assert_array_equal(np.sort(total)[: rows - left], epochs)
            np.testing.assert_array_equal(np.sort(total)[rows - left :], epochs + 1)


def test_a_solution_goes_on_with_the_batches_that_come_next():
    first, whole = noisy(5), noisy(11)
    rest = noisy(11, state=first.state)
    np.testing.assert_array_equal(rest.hyper, whole.hyper)
    np.testing.assert_array_equal(rest.params, whole.params)
    np.testing.assert_array_equal(rest.history.outer_loss, whole.history.outer_loss[5:])
    # The last evaluation of a run is on the draws of the step that follows, and moves none.
    np.testing.assert_array_equal(first.outer_loss, whole.history.outer_loss[5])


def test_both_losses_draw_by_keys_of_their_own():
    state = noisy(3).state
    train, valid = (jax.random.key_data(cursor.key) for cursor in state.cursors)
    assert (train != valid).any()
    other = noisy(3, key=jax.random.key(1)).state
    for one, another in zip(state.cursors, other.cursors):
        assert (jax.random.key_data(one.key) != jax.random.key_data(another.key)).any()


def test_sources_of_an_iterator_begin_epochs_of_their_own():
    # Of other lengths each, so that one cursor could not go through them all. Inner steps
    # count in `params` the rows that they see.
    seen = []
    solver = mo.NestedSolver(
        mo.Descent(optax.sgd(1.0), 2), mo.UnrolledAdjoint(), optax.sgd(0.0)
    )
    problem = mo.BilevelProblem(
        lambda params, hyper, batch: -jnp.sum(batch @ params),
        lambda params, hyper, batch: jnp.sum(params * hyper),
    )
    lengths = [8, 8, 6, 8]
    mo.solve_bilevel(
        problem,
        jnp.ones(8),
        (mo.Minibatches(jnp.eye(8)[:rows], rows // 2) for rows in lengths),
        params=jnp.zeros(8),
        solver=solver,
        num_steps=4,
        steps_per_call=4,
        callbacks=[lambda run: seen.append((run.num_steps, run.params))],
    )
    assert [step for step, _ in seen] == [2, 3, 4]
    for step, counts in seen:
        np.testing.assert_array_equal(counts, np.arange(8) < lengths[step - 1])


class Restless(mo.extend.AbstractData):
    """A source whose cursor changes its dtype."""

    @property
    def varies(self):
        return True

    @property
    def num_batches(self):
        return None

    def check(self, num_steps):
        pass

    def init(self, key):
        return 0

    def take(self, cursor, num_steps):
        return jnp.arange(num_steps), cursor + 0.5

    def batch(self, draw):
        return ROWS[draw]

    def full(self):
        return ROWS


def test_cursor_that_changes_its_kind_is_named():
    with pytest.raises(ValueError, match="`Restless.take` must return a cursor"):
        solve(2, NOISY, STOCHASTIC, (Restless(), ROWS))
    with pytest.raises(ValueError, match="`Restless.take` must return a cursor"):
        solve(2, NOISY, STOCHASTIC, (ROWS, Restless()))


def test_drawn_batches_are_a_source_of_the_same_draws():
    data = mo.Minibatches(jnp.arange(10.0), 3)
    batches, cursor = draw(data, data.init(jax.random.key(0)), 4)
    assert isinstance(batches, mo.extend.DrawnBatches) and len(batches) == 4
    plan = batches.plan(jax.random.key(9), 4)  # of no influence
    found = np.stack([batches[index] for index in range(4)])
    np.testing.assert_array_equal(found, [batches.batch(row) for row in plan])
    # The first ten are one epoch, and the other two begin the next.
    assert sorted(found.ravel()[:10]) == list(range(10))
    np.testing.assert_array_equal(batches.full(), np.arange(10.0))
    following, _ = draw(data, cursor, 1)
    both = {*found.ravel()[10:].tolist(), *following[0].tolist()}
    assert len(both) == 5
