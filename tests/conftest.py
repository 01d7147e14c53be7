"""Set-up shared by all tests: CPU, float64 allowed, fixed seeds."""

import collections
import gc
import os
import pathlib

import quick_compilation


# Read by jax when it is first imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Programs without the lines that they come from are made faster.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# METAOPT_TEST_OPTIMIZED=1 compiles as jax does by default; of the three environments
# that are tested on every change, the oldest and the newest have it.
_OPTIMIZED = os.environ.get("METAOPT_TEST_OPTIMIZED") == "1"
if not _OPTIMIZED:
    os.environ["XLA_FLAGS"] = quick_compilation.xla_flags()
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402


# Closed forms and finite differences are compared in float64. Tests of float32
# behaviour ask for float32 arrays.
jax.config.update("jax_enable_x64", True)

# The same examples on every run, and no limit on the time of one (compilation).
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")


# Tests that compile something for each of many variants. By default one of so many
# variants is run; the others are marked slow.
_ONE_OF = {
    "test_agreement": {
        "test_closed_over_arrays_are_differentiated": 2,
        "test_derivatives_of_solve_inner": 2,
        "test_half_precision_is_solved_with_in_float32": 4,
        "test_hypergradient_is_the_closed_form": 12,
        "test_mixed_leaves": 2,
        "test_model_state": 2,
        "test_optimizers_built_from_hyper": 2,
    },
    "test_best_response": {
        "test_equals_weights_of_its_own_for_each_example": 8,
        "test_keeps_dtypes": 4,
        "test_no_weights_for_each_example": 3,
        "test_response_of_zero_is_the_original_to_the_last_bit": 3,
    },
    "test_cells": {
        "test_a_norm_is_bounded_in_any_precision": 3,
        "test_a_norm_is_never_too_small": 6,
    },
    "test_chunks": {
        "test_chunks_add_up": 3,
    },
    "test_compiled_once": {
        "test_more_steps_are_not_more_to_compile": 2,
    },
    "test_debugging_modes": {
        "test_hypergradients_that_are_finite": 3,
    },
    "test_equilibrium": {
        "test_value_and_gradient_are_those_of_unrolling_to_convergence": 6,
    },
    "test_error": {
        "test_bound_is_never_below_the_error": 3,
        "test_error_is_quadratic_in_the_residual_after_a_newton_step": 5,
        "test_estimate_is_within_a_factor_of_two": 5,
        "test_report_says_how_wrong": 2,
    },
    "test_exactness": {
        "test_digits_truncation_is_the_neumann_series": 2,
        "test_forward_against_reverse": 3,
        "test_truncation_is_the_neumann_series": 3,
        "test_unrolled_against_implicit": 3,
    },
    "test_explosion": {
        "test_every_plan_measures_the_same": 2,
    },
    "test_faults": {
        "test_maximum_is_not_taken_for_a_minimum": 2,
        "test_scale_of_the_loss_does_not_matter": 2,
        "test_under_settings_of_jax": 6,
    },
    "test_few_shot": {
        "test_each_step_can_count": 2,
        "test_gradients_are_those_of_the_loop": 3,
        "test_model_state_is_a_choice": 4,
        "test_states_of_each_step_outlast_the_tasks": 3,
        "test_the_answer_is_judged_with_the_state_of_its_last_step": 6,
        "test_the_others_survive_a_task_that_diverges": 2,
    },
    "test_fixed_points": {
        "test_a_budget_changes_without_compiling_again": 2,
        "test_a_map_without_a_fixed_point_is_no_success": 2,
        "test_cells_that_do_not_contract_get_a_code_and_a_finite_answer": 3,
        "test_examples_of_a_batch_converge_each_for_itself": 3,
        "test_linear_systems_as_fixed_points": 6,
        "test_steps_after_convergence_do_no_harm_to_the_derivative": 2,
        "test_steps_on_contracting_cells": 6,
    },
    "test_layers": {
        "test_conv_and_derivatives_are_those_of_equinox": 4,
    },
    "test_linear": {
        "test_a_million_unknowns_in_float32": 2,
        "test_absolute_tolerance": 3,
        "test_definite_system_agrees_with_a_dense_solve": 4,
        "test_half_precision": 3,
        "test_indefinite_system_in_every_precision": 3,
        "test_minres_minimises_the_residual_in_each_step": 2,
        "test_mixed_dtypes_in_a_pytree": 3,
        "test_multiples_of_the_identity": 4,
        "test_nonsymmetric_system_agrees_with_a_dense_solve": 2,
        "test_number_of_steps_asked_for_by_name_is_no_failure": 2,
        "test_one_bad_lane_of_64_leaves_the_others_alone": 6,
        "test_others_are_refused_at_a_saddle": 2,
        "test_right_hand_side_that_is_not_finite": 3,
        "test_right_hand_side_that_the_operator_does_not_reach": 4,
        "test_scale_of_the_operator_does_not_matter": 4,
        "test_singular_system": 3,
        "test_start_near_the_solution_saves_steps": 3,
        "test_true_residual_never_grows": 2,
        "test_zero_right_hand_side": 3,
    },
    "test_loops": {
        "test_adjoints": 8,
        "test_linear_solvers": 3,
        "test_solvers": 6,
        "test_solvers_of_jaxopt": 4,
        "test_solvers_that_stop_early": 3,
    },
    "test_memory": {
        "test_any_number_of_steps": 6,
        "test_batches_are_not_kept_for_each_step": 3,
        "test_plans_agree": 8,
        "test_plans_in_forward_mode_and_batched": 6,
        "test_second_derivative_in_mixed_mode_is_refused": 2,
    },
    "test_optimizers": {
        "test_hypergradient_is_finite_and_right": 2,
        "test_useless_slope_at_zero_gradient_is_left_out_and_counted": 2,
    },
    "test_oracles": {
        "test_sixteen_lanes_return": 2,
        "test_solvers_reach_the_solution": 8,
    },
    "test_preconditioners": {
        "test_outer_steps_trace_once": 3,
        "test_params_of_low_precision": 4,
        "test_plain_gradients_agree": 8,
        "test_steps_saved_and_nothing_else_changed": 8,
    },
    "test_reach": {
        "test_what_comes_with_a_solution_has_no_implicit_derivative": 3,
    },
    "test_response": {
        "test_the_exact_response_agrees": 2,
    },
    "test_reversible": {
        "test_a_way_back_that_misses_the_start_is_no_hypergradient": 3,
        "test_derivatives_are_those_of_the_unrolled_steps": 4,
        "test_hypergradient_at_the_solution_is_the_closed_form": 3,
        "test_hypergradient_is_that_of_sgd_with_momentum": 3,
        "test_other_adjoints_take_the_solver": 2,
        "test_products_are_undone_and_rounded_to_one_unit": 4,
        "test_steps_are_undone_to_the_last_bit": 2,
    },
    "test_reversible_picard": {
        "test_derivative_is_that_of_the_steps_taken": 4,
        "test_derivatives_in_what_examples_share": 3,
    },
    "test_rewrite": {
        "test_derivatives_are_finite_and_right": 4,
        "test_loops_carry_their_condition_under_vmap": 4,
        "test_loops_everywhere_carry_their_condition": 4,
        "test_optimizers_have_finite_hypergradients_at_zero_gradients": 6,
        "test_optimizers_take_the_same_steps": 3,
        "test_second_derivatives_are_finite": 4,
    },
    "test_self_tuning": {
        "test_an_outer_loss_without_value_leaves_hyper_alone": 2,
        "test_general_weights_follow_hyper": 2,
        "test_methods_equal_their_slow_twins": 8,
        "test_one_problem_for_every_solver": 3,
    },
    "test_tolerance": {
        "test_every_linear_solver_with_a_tolerance_loosens_it": 2,
        "test_fewer_products_at_equal_outer_loss": 2,
    },
    "test_trust": {
        "test_a_large_bias_excuses_nothing": 3,
        "test_a_saddle_is_refused": 2,
        "test_accepted_hypergradients_are_right": 3,
        "test_bounds_from_data_hold_and_are_close": 3,
        "test_params_that_do_not_meet_hyper": 2,
        "test_second_derivatives_of_a_biased_one_are_refused": 4,
    },
}


def pytest_collection_finish():
    """What was imported stays: the garbage collector need not look at it again for each
    of the many objects that tracing makes."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


def pytest_collection_modifyitems(items):
    seen = collections.Counter()
    for item in items:
        name = getattr(item, "originalname", None)
        of_module = _ONE_OF.get(item.module.__name__.rsplit(".", 1)[-1], {})
        if name in of_module and not item.get_closest_marker("slow"):
            if seen[item.module.__name__, name] % of_module[name]:
                item.add_marker(pytest.mark.slow)
            seen[item.module.__name__, name] += 1


@pytest.fixture(autouse=True)
def _compile_quickly(request):
    optimized = _OPTIMIZED or request.node.get_closest_marker("optimized")
    jax.config.update("jax_disable_most_optimizations", not optimized)


@pytest.fixture(autouse=True)
def _fixed_numpy_seed():
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _forget_compiled_programs():
    """Every compiled program takes hundreds of memory mappings on CPUs, and Linux allows a
    process 65,530 of them: beyond, the compiler crashes."""
    yield
    if _MAPPINGS.exists() and len(_MAPPINGS.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()
        gc.collect()


_MAPPINGS = pathlib.Path("/proc/self/maps")


@pytest.fixture
def get_key():
    """A function that returns a new random key at each call, the same on each run."""
    key = jax.random.key(20_24)

    def new_key():
        nonlocal key
        key, out = jax.random.split(key)
        return out

    return new_key
