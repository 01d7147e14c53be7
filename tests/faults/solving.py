"""Wrong lines for the adjoints and the inner solvers."""

from ._fault import Fault


ERROR = "test_error.py::"
AGREEMENT = "test_agreement.py::"
FIXED = "test_fixed_points.py::"

FAULTS = [
    # Adjoints
    Fault(
        "truncation-that-truncates-nothing",
        "_adjoint/_truncated.py",
        "state, early = detached(head, params, hyper, model_state)",
        "state, early = head(params, hyper, model_state)",
        "test_exactness.py::test_truncation_is_the_neumann_series",
    ),
    Fault(
        "truncation-draws-the-first-batches",
        "_adjoint/_truncated.py",
        "lambda leaf: leaf[cut:], loop.draws",
        "lambda leaf: leaf[: self.num_steps], loop.draws",
        AGREEMENT + "test_the_steps_that_are_differentiated_see_their_own_batches",
    ),
    Fault(
        "truncation-bound-of-one-step",
        "_adjoint/_truncated.py",
        "bound = rho**num_steps / (1 - rho)",
        "bound = rho**num_steps",
        ERROR + "test_bias_of_truncation_is_bounded",
    ),
    Fault(
        "one-step-draws-another-batch",
        "_adjoint/_one_step.py",
        "draw = jax.tree.map(lambda leaf: leaf[index], loop.draws)",
        "draw = jax.tree.map(lambda leaf: leaf[0], loop.draws)",
        AGREEMENT + "test_the_steps_that_are_differentiated_see_their_own_batches",
    ),
    Fault(
        "forward-columns-mixed-up",
        "_adjoint/_forward.py",
        "j[end - t.size : end]",
        "j[: t.size]",
        AGREEMENT + "test_forward_mode_through_an_optimizer_built_from_hyper",
    ),
    Fault(
        "forward-in-reverse",
        "_adjoint/_forward.py",
        "differentiate = _by_columns if loops else in_reverse",
        "differentiate = in_reverse",
        "test_unknown_loops.py",
    ),
    Fault(
        "first-order-holds-nothing",
        "_adjoint/_first_order.py",
        "value, gradient = stop_gradient((out.value, gradient))",
        "value = stop_gradient(out.value)",
        "test_first_order.py",
    ),
    Fault(
        "recomputed-steps-are-stored",
        "_adjoint/_memory/_steps.py",
        "return jax.lax.scan(remade(body), state, draws, length)",
        "return jax.lax.scan(body, state, draws, length)",
        "test_memory.py::test_steps_made_again_keep_no_updates",
    ),
    Fault(
        "budget-of-any-size",
        "_adjoint/_memory/_budget.py",
        "if need <= self.num_bytes:",
        "if need >= 0:",
        "test_memory.py::test_budget_chooses_the_plan",
    ),
    Fault(
        "explosion-is-overlooked",
        "_adjoint/_explosion.py",
        "_EFFECT, _GROWTH = 1e-3, 1e2",
        "_EFFECT, _GROWTH = 1e-3, 1e30",
        "test_explosion.py::test_chaotic_map_is_named_and_its_exponent_found",
    ),
    Fault(
        "explosion-hidden-by-an-offset",
        "_adjoint/_explosion.py",
        "(rounding > _EFFECT * jnp.minimum(jnp.abs(value), change))",
        "(rounding > _EFFECT * jnp.abs(value))",
        "test_explosion.py::test_offset_of_the_outer_loss_hides_nothing",
    ),
    Fault(
        "reversible-start-without-model-state",
        "_adjoint/_reversible.py",
        "(into.params, tree_add(into_state, in_state), into.settings)",
        "(into.params, into_state, into.settings)",
        "test_reversible.py::test_model_state test_reversible_picard.py::test_model_state",
    ),
    Fault(
        "reversible-sign-of-the-rate",
        "_solver/_reversible/_momentum.py",
        "in_rate = -tree_dot(in_point, velocity)",
        "in_rate = tree_dot(in_point, velocity)",
        "test_reversible.py::test_derivatives_are_those_of_the_unrolled_steps",
    ),
    Fault(
        "reversible-aux-of-the-first-step",
        "_solver/_reversible/_momentum.py",
        "is_last = draw[0] == solver.num_steps - 1",
        "is_last = draw[0] == 0",
        "test_reversible.py::test_derivatives_are_those_of_the_unrolled_steps",
    ),
    Fault(
        "momentum-rounding-is-not-carried",
        "_solver/_exact_momentum.py",
        "return numerator.astype(jnp.uint32), asked - numerator, allowed",
        "return numerator.astype(jnp.uint32), jnp.zeros_like(asked), allowed",
        "test_reversible.py::test_hypergradient_is_that_of_sgd_with_momentum "
        "test_reversible.py::test_steps_are_undone_to_the_last_bit "
        "test_reversible.py::test_derivatives_are_those_of_the_unrolled_steps",
    ),
    Fault(
        "lossless-product-slot",
        "_solver/_lossless.py",
        "size = by.whole + (left + by.part >= k)",
        "size = by.whole + jnp.zeros_like(k)",
        "test_reversible.py::test_products_are_undone_and_rounded_to_one_unit",
    ),
    Fault(
        "coupled-drift-is-not-judged",
        "_solver/_reversible/_coupled.py",
        "succeeded = drift <= self.max_drift",
        "succeeded = drift <= jnp.inf",
        "test_reversible_picard.py::test_too_much_drift_is_no_hypergradient",
    ),
    Fault(
        "coupled-cotangent-of-the-old-state",
        "_solver/_reversible/_coupled.py",
        "in_old = [where((1 - beta) * a, a) for a in in_new]",
        "in_old = [where(a, a) for a in in_new]",
        "test_reversible_picard.py::test_derivative_is_that_of_the_steps_taken",
    ),
    Fault(
        "coupled-smaller-drift-counts",
        "_solver/_reversible/_coupling.py",
        "return jnp.maximum(*map(relative, ends, found))",
        "return jnp.minimum(*map(relative, ends, found))",
        "test_reversible_picard.py::test_a_small_example_is_not_hidden_by_a_large_one",
    ),
    # Inner solvers
    Fault(
        "anderson-relaxation",
        "_solver/_anderson.py",
        "short = 1 - self.relaxation",
        "short = self.relaxation",
        "test_equilibrium.py::test_anderson_by_least_squares",
    ),
    Fault(
        "anderson-keeps-the-first-difference",
        "_solver/_anderson.py",
        "jnp.where(step == 0, 0, new - old)",
        "(new - old)",
        "test_equilibrium.py::test_anderson_by_least_squares",
    ),
    Fault(
        "broyden-without-the-inverse",
        "_solver/_broyden.py",
        "right = inverse.transposed().apply_written(step)",
        "right = step",
        "test_fixed_points.py::test_broyden_by_its_definition",
    ),
    Fault(
        "broyden-never-halves",
        "_solver/_broyden.py",
        "new = examples.axpy(jnp.where(back, -length / 2, 1), direction, at.params)",
        "new = examples.axpy(jnp.where(back, -length, 1), direction, at.params)",
        FIXED + "test_broyden_goes_back_by_half_of_a_step_that_is_too_long",
    ),
    Fault(
        "newton-krylov-takes-any-step",
        "_solver/_newton_krylov.py",
        "falls = (progress.step == 0) | (at.norm <= enough)",
        "falls = (progress.step == 0) | (at.norm <= jnp.inf)",
        "test_fixed_points.py::test_newton_krylov_goes_back_where_a_full_step_is_too_long",
    ),
    Fault(
        "best-iterate-is-the-last",
        "_solver/_fixed_point.py",
        "lambda new, best: jnp.where(converged, new, best), params, progress.best",
        "lambda new, best: jnp.where(True, new, best), params, progress.best",
        "test_equilibrium.py::test_the_best_iterate_is_returned",
    ),
    Fault(
        "settled-examples-go-on",
        "_solver/_fixed_point.py",
        "new = at.examples.where(at.settled, at.params, new)",
        "new = at.examples.where(jnp.zeros_like(at.settled), at.params, new)",
        FIXED + "test_an_example_that_has_converged_is_held",
    ),
    Fault(
        "descent-stops-at-small-params",
        "_solver/_descent.py",
        "converged = tree_norm(gradient) <= jnp.asarray(self.atol)",
        "converged = tree_norm(updates) <= jnp.asarray(self.atol)",
        "test_faults.py::"
        "test_the_tolerance_of_descent_is_that_of_the_gradient_and_not_of_the_step",
    ),
    Fault(
        "last-step-has-another-key",
        "_solver/_loop.py",
        "return self.data.batch(draw), jax.random.fold_in(self.key, index)",
        "return self.data.batch(draw), self.key",
        AGREEMENT + "test_the_inner_residual_is_that_of_the_last_batch_and_key",
    ),
    Fault(
        "divergence-is-measured-from-the-last-step",
        "_solver/_loop.py",
        "first_monitor=jnp.where(index == 0, monitor, state.first_monitor)",
        "first_monitor=monitor",
        "test_faults.py::test_diverging_inner_solver",
    ),
    Fault(
        "history-is-no-reason-to-keep-a-slope",
        "_solver/_zero_gradients.py",
        "zero[owner] = zero[owner] & without",
        "zero[owner] = zero[owner]",
        "test_optimizers.py::"
        "test_slope_of_a_gradient_that_has_not_always_been_zero_is_kept",
    ),
    Fault(
        "numbers-out-of-range-pass",
        "_solver/_fixed_point_numbers.py",
        "return x.astype(dtype), jnp.all(inside)",
        "return x.astype(dtype), jnp.asarray(True)",
        "test_reversible.py::test_range_is_as_documented test_reversible.py::test_failures",
    ),
]
