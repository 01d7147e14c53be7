"""Wrong lines for implicit systems, error estimates, layers and transforms."""

from ._fault import Fault


ERROR = "test_error.py::"
TRUST = "test_trust.py::"

FAULTS = [
    # Implicit systems
    Fault(
        "system-is-not-transposed",
        "_implicit/_system.py",
        "return operator.transpose() if transposed and not self.is_symmetric else operator",
        "return operator",
        "test_implicit_system.py::test_root_solutions_by_the_unsymmetric_jacobian",
    ),
    Fault(
        "solver-is-not-transposed",
        "_implicit/_system.py",
        "first, second = reversed(solvers) if transposed else solvers",
        "first, second = solvers",
        "test_implicit_system.py::test_a_shared_inverse_is_transposed_with_the_system",
    ),
    Fault(
        "residual-of-another-system",
        "_implicit/_system.py",
        "self._oriented(self.jacobian, transposed).mv(solution)",
        "self._oriented(self.operator, transposed).mv(solution)",
        "test_implicit_system.py::"
        "test_gauss_newton_is_solved_with_and_the_exact_jacobian_judges",
    ),
    Fault(
        "gauss-newton-is-judged-by-itself",
        "_implicit/_curvature.py",
        "return of_params(params), operator, jacobian",
        "return of_params(params), operator, operator",
        "test_gauss_newton.py::test_estimate_knows_what_was_left_out",
    ),
    Fault(
        "inner-rtol-ignored-under-a-schedule",
        "_implicit/_inner_error.py",
        "allowed = jnp.maximum(allowed, tolerance)",
        "allowed = tolerance",
        "test_tolerance.py::test_the_inner_solution_may_be_as_far_off",
    ),
    Fault(
        "inner-error-by-distance-alone",
        "_implicit/_inner_error.py",
        "jnp.where(size > 0, self._compared(along, weighed), 0.0)",
        "0.0",
        "test_faults.py::test_slow_direction_is_not_taken_for_solved",
    ),
    Fault(
        "inner-error-of-the-whole-way",
        "_implicit/_inner_error.py",
        "_OF_THE_WAY = 1e-3",
        "_OF_THE_WAY = 1e3",
        "test_faults.py::test_unconverged_inner_problem",
    ),
    Fault(
        "linear-solver-is-not-tightened",
        "_implicit/_accuracy.py",
        "_OF_RTOL * asked, 10",
        "100 * asked, 10",
        TRUST + "test_a_loose_linear_solver_is_tightened",
    ),
    Fault(
        "plain-derivative-is-not-judged",
        "_implicit/_derivative.py",
        "if reverse and accuracy.judges_error:",
        "if not reverse and accuracy.judges_error:",
        TRUST + "test_plain_derivative_judges_its_error_too",
    ),
    Fault(
        "linear-fixed-point-stops-early",
        "_implicit/_linear_fixed_point.py",
        "_MARGIN = 0.8",
        "_MARGIN = 8.0",
        "test_fixed_points.py::test_linear_systems_as_fixed_points",
    ),
    # Error estimates
    Fault(
        "estimate-solves-the-transpose-for-the-transpose",
        "_implicit/_correction.py",
        "change, size, of_change = correct(left, True, allowed[1])",
        "change, size, of_change = correct(left, False, allowed[1])",
        ERROR + "test_estimate_for_a_fixed_point",
    ),
    Fault(
        "estimate-looks-where-it-stands",
        "_implicit/_correction.py",
        "there = at(tree_sub(base.system.params, tree_add(step, rounding)))",
        "there = at(base.system.params)",
        ERROR + "test_estimate_is_within_a_factor_of_two",
    ),
    Fault(
        "estimate-of-the-inner-part-alone",
        "_implicit/_dual_weighted.py",
        "error = length(tree_sub(new, gradient))",
        "error = length(tree_sub(old, gradient))",
        ERROR + "test_estimate_is_within_a_factor_of_two "
        "test_trust.py::test_an_inaccurate_linear_system_is_named",
    ),
    Fault(
        "estimate-never-blames-the-linear-system",
        "_implicit/_dual_weighted.py",
        "share = unsolved / jnp.where(better.left > 0, better.left, 1)",
        "share = jnp.zeros_like(unsolved)",
        TRUST + "test_an_error_is_blamed_on_the_system_that_was_solved_badly",
    ),
    Fault(
        "bound-without-the-linear-system",
        "_implicit/_strong_convexity.py",
        "return (slope + of_linear * system) / curvature, of_linear",
        "return slope / curvature, of_linear",
        ERROR + "test_bound_covers_the_steps_that_its_corrections_stop_short_of",
    ),
    Fault(
        "bound-that-is-contradicted-stays",
        "_implicit/_strong_convexity.py",
        "bound = jnp.where(contradicted, jnp.inf, bound + 10 * eps * size)",
        "bound = bound + 10 * eps * size",
        ERROR + "test_wrong_curvature_is_contradicted",
    ),
    Fault(
        "bound-of-softmax-rows",
        "_implicit/_linear_model_bounds.py",
        "_stretch(valid_rows) / 2, penalty",
        "_stretch(valid_rows) / 8, penalty",
        TRUST + "test_constants_from_one_row_are_hardly_larger_than_they_must_be",
    ),
    Fault(
        "bound-of-logistic-rows",
        "_implicit/_linear_model_bounds.py",
        "/ (6 * 3**0.5)",
        "/ (60 * 3**0.5)",
        TRUST + "test_constants_from_one_row_are_hardly_larger_than_they_must_be",
    ),
    # Equilibrium layers
    Fault(
        "power-iteration-without-settling",
        "_equilibrium/_jacobian.py",
        "growth[num_steps // 2 :]",
        "growth",
        "test_cells.py::test_first_half_of_a_power_iteration_does_not_count",
    ),
    Fault(
        "jacobian-penalty-of-all-numbers",
        "_equilibrium/_jacobian.py",
        "/ tree_size(floats)",
        "/ 1",
        "test_cells.py::test_jacobian_penalty",
    ),
    Fault(
        "norm-of-few-squarings",
        "_equilibrium/_bound.py",
        "_NUM_SQUARINGS = 8",
        "_NUM_SQUARINGS = 2",
        "test_cells.py::test_a_norm_is_at_most_two_per_cent_too_large",
    ),
    Fault(
        "norm-rounded-down",
        "_equilibrium/_bound.py",
        "norm * (1 + float(jnp.finfo(matrix.dtype).eps) * max(matrix.shape) ** 0.5)",
        "norm * 1.0",
        "test_cells.py::test_a_norm_is_bounded_in_any_precision",
    ),
    Fault(
        "monotone-cell-without-skew",
        "_equilibrium/_cell.py",
        "- square + self.skew - self.skew.T",
        "- square + self.skew + self.skew.T",
        "test_cells.py::test_a_monotone_cell_is_monotone_whatever_its_weights",
    ),
    Fault(
        "residual-of-the-whole-batch",
        "_equilibrium/_cell_problem.py",
        "jax.vmap(tree_scaled_norm) if per_example else tree_scaled_norm",
        "tree_scaled_norm",
        "test_equilibrium.py::test_examples_of_one_state_converge_each_for_itself",
    ),
    # Hyper transforms
    Fault(
        "interval-rounds-at-its-upper-end",
        "hyper/_squash.py",
        "high - width * jax.nn.sigmoid(-raw)",
        "low + width * jax.nn.sigmoid(raw)",
        "test_hyper.py",
    ),
    Fault(
        "integer-beyond-its-range",
        "hyper/_integer.py",
        "self.low + jnp.minimum(level, num_levels - 1)",
        "self.low + level",
        "test_hyper.py::test_no_raw_leaves_the_range",
    ),
    Fault(
        "integer-with-a-derivative",
        "hyper/_rounding.py",
        "return rounded_down(x, message), _refused_p.bind(tangent, message=message)",
        "return rounded_down(x, message), tangent",
        "test_hyper.py::test_integer_refuses_its_derivative",
    ),
    # Promises
    Fault(
        "leaves-without-influence-pass",
        "_promises/_both_losses.py",
        "if len(idle) + len(held) < len(names):",
        "if len(idle) + len(held) <= len(names):",
        "test_bad_input.py test_reach.py",
    ),
    Fault(
        "influence-of-both-losses-asked-for",
        "_promises/_zero.py",
        "bool.__or__",
        "bool.__and__",
        "test_single_loop.py::test_initial_params_are_not_differentiated",
    ),
    Fault(
        "direction-that-forgets-a-leaf-passes",
        "_promises/_direction.py",
        "if not varies and name not in exempt",
        "if not varies and name in exempt",
        "test_single_loop.py::test_direction_that_forgets_a_leaf_is_refused",
    ),
    Fault(
        "outer-loss-without-value-passes",
        "_promises/_finite.py",
        "mask_result(jnp.logical_not(outer_is_finite), RESULTS.outer_nonfinite)",
        "mask_result(outer_is_finite & False, RESULTS.outer_nonfinite)",
        "test_faults.py::test_outer_loss_nan",
    ),
    # Smoothness
    Fault(
        "smoothness-of-overlapping-movements",
        "diagnostics/_smoothness.py",
        "solutions[2] - solutions[1]",
        "solutions[2] - solutions[0]",
        "test_check.py",
    ),
    Fault(
        "smoothness-without-weights",
        "diagnostics/_smoothness.py",
        "jnp.sum(weights * jnp.sign(first) * jnp.sign(second))",
        "jnp.mean(jnp.sign(first) * jnp.sign(second))",
        "test_check.py::test_params_that_move_far_count_for_more",
    ),
    Fault(
        "smoothness-of-a-direction-of-any-length",
        "diagnostics/_smoothness.py",
        "return vector / length",
        "return vector",
        "test_check.py",
    ),
]
