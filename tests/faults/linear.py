"""Wrong lines for the linear solvers and their preconditioners."""

from ._fault import Fault


LINEAR = "test_linear.py::"

FAULTS = [
    # Linear solvers
    Fault(
        "cg-forgets-directions",
        "_linear/_cg_method.py",
        "beta = gamma / s.gamma",
        "beta = jnp.zeros_like(gamma)",
        LINEAR + "test_cg_needs_as_many_steps_as_there_are_eigenvalues",
    ),
    Fault(
        "cg-takes-any-curvature",
        "_linear/_cg_method.py",
        "positive = curvature > self.system.eps * max_ratio * p_size",
        "positive = curvature != 0",
        LINEAR + "test_indefinite_operator_is_flagged",
    ),
    Fault(
        "cg-reports-the-damped-residual",
        "_linear/_cg_method.py",
        "residual = tree_norm(tree_sub(self.system.b, product))",
        "residual = size",
        LINEAR + "test_damping_is_solved_for_and_the_residual_is_without_it",
    ),
    Fault(
        "cg-believes-its-updated-residual",
        "_linear/_cg_method.py",
        "within = size <= self.system.tolerance",
        "within = jnp.sqrt(series.square) <= self.system.tolerance",
        LINEAR + "test_success_is_of_the_true_residual",
    ),
    Fault(
        "minres-recurrence",
        "_linear/_minres.py",
        "w = tree_axpy(-delta / c.gamma, c.w, w)",
        "w = tree_axpy(-delta, c.w, w)",
        LINEAR + "test_indefinite_system_agrees_with_a_dense_solve",
    ),
    Fault(
        "minres-sees-residuals-only",
        "_linear/_minres.py",
        "curvature=jnp.minimum(-c.cosine * gamma_bar, alpha)",
        "curvature=-c.cosine * gamma_bar",
        LINEAR + "test_minres_sees_more_curvature_than_along_residuals",
    ),
    Fault(
        "minres-sees-basis-vectors-only",
        "_linear/_minres.py",
        "curvature=jnp.minimum(-c.cosine * gamma_bar, alpha)",
        "curvature=alpha",
        LINEAR + "test_minres_minimises_the_residual_in_each_step",
    ),
    Fault(
        "minres-keeps-the-last-iterate",
        "_linear/_minimal_residual.py",
        "falls_back = stops & ~within & ~better",
        "falls_back = jnp.zeros_like(better)",
        LINEAR + "test_true_residual_never_grows test_linear.py::test_singular_system",
    ),
    Fault(
        "normal-cg-without-the-transpose",
        "_linear/_normal_cg.py",
        "gradient = system.transposed_product(c.r)",
        "gradient = system.product(c.r)",
        LINEAR + "test_nonsymmetric_system_agrees_with_a_dense_solve",
    ),
    Fault(
        "normal-cg-forgets-directions",
        "_linear/_normal_cg.py",
        "beta = gradient_size / c.gradient_size",
        "beta = jnp.zeros_like(gradient_size)",
        LINEAR + "test_normal_cg_minimises_the_residual_in_each_step",
    ),
    Fault(
        "gmres-never-stagnates",
        "_linear/_gmres.py",
        "stagnated = ~singular & ~converged & ~(residual < 0.99 * s.residual)",
        "stagnated = ~singular & ~converged & ~(residual < 2 * s.residual)",
        LINEAR + "test_gmres_that_does_not_progress_is_flagged",
    ),
    Fault(
        "gmres-miscounts-products",
        "_linear/_gmres.py",
        "num_products = s.num_cycles * (restart + 3)",
        "num_products = s.num_cycles * (restart + 2)",
        LINEAR + "test_gmres_counts_whole_cycles",
    ),
    Fault(
        "gmres-takes-a-useless-start",
        "_linear/_gmres.py",
        "useful = (remaining <= size) & (size > 0)",
        "useful = size > 0",
        LINEAR + "test_useless_start_is_not_used",
    ),
    Fault(
        "bicgstab-direction",
        "_linear/_bicgstab.py",
        "beta = (rho / c.rho) * (alpha / jnp.where(second, omega, 1))",
        "beta = rho / c.rho",
        LINEAR + "test_bicgstab_needs_as_many_steps_as_there_are_eigenvalues",
    ),
    Fault(
        "bicgstab-divides-by-rounding",
        "_linear/_bicgstab.py",
        "first = jnp.abs(shadow_v) > self.system.eps * shadow_size * v_size",
        "first = jnp.abs(shadow_v) >= 0",
        LINEAR + "test_bicgstab_that_breaks_down_is_flagged",
    ),
    Fault(
        "bicgstab-takes-any-restart",
        "_linear/_bicgstab.py",
        "again = failed & (num_failed >= _MOST_FAILED)",
        "again = jnp.zeros_like(restarts)",
        LINEAR + "test_bicgstab_that_breaks_down_is_flagged "
        "test_linear.py::test_singular_system "
        "test_linear.py::test_steps_that_gain_nothing_end_the_solve",
    ),
    Fault(
        "neumann-one-term-more",
        "_linear/_neumann.py",
        "lax.fori_loop(0, self.num_terms - 1, add_term, x)",
        "lax.fori_loop(0, self.num_terms, add_term, x)",
        LINEAR + "test_neumann_is_the_explicit_sum",
    ),
    Fault(
        "neumann-scale-too-large",
        "_linear/_neumann.py",
        "_POWER_SAFETY = 1.2",
        "_POWER_SAFETY = 0.4",
        LINEAR + "test_neumann_estimates_its_scale",
    ),
    Fault(
        "neumann-growth-seen-late",
        "_linear/_neumann.py",
        "before = last if lx.is_symmetric(operator) else first",
        "before = first",
        LINEAR + "test_neumann_growth_is_seen_before_it_dominates",
    ),
    Fault(
        "dense-takes-an-indefinite-operator",
        "_linear/_dense.py",
        "indefinite = smallest < -tree_size(vector) * rounding",
        "indefinite = jnp.asarray(False)",
        LINEAR + "test_a_dense_solve_refuses_an_indefinite_operator",
    ),
    Fault(
        "dense-takes-a-singular-operator",
        "_linear/_dense.py",
        "regular = finite & (residual <= coarsest_eps(vector) ** 0.5)",
        "regular = finite",
        LINEAR + "test_singular_system "
        "test_linear.py::test_singular_inconsistent_system_is_flagged",
    ),
    Fault(
        "shine-is-not-compared",
        "_linear/_shine.py",
        "better = self.inverse.norm(by_inverse) <= self.inverse.norm(by_one_step)",
        "better = self.inverse.norm(by_inverse) >= 0",
        "test_fixed_points.py::"
        "test_the_better_of_a_shared_inverse_and_one_step_is_taken_for_each_example",
    ),
    Fault(
        "shine-is-not-transposed",
        "_linear/_shine.py",
        "return dataclasses.replace(self, inverse=self.inverse.transposed())",
        "return self",
        "test_fixed_points.py::test_shared_inverse",
    ),
    Fault(
        "start-that-is-worse-than-zero",
        "_linear/_system.py",
        "useless = starts & ~(size <= self.size)",
        "useless = starts & (size < 0)",
        LINEAR + "test_useless_start_is_not_used",
    ),
    Fault(
        "diagonal-without-its-spread",
        "_linear/_preconditioner/_diagonal.py",
        "return jnp.maximum(size, jnp.std(samples, 0) / (self.num_samples - 1) ** 0.5)",
        "return size",
        "test_preconditioners.py::test_diagonal_estimate_is_positive_where_samples_are_not "
        "test_preconditioners.py::test_diagonal_entry_of_zero_does_not_take_over "
        "test_preconditioners.py::test_diagonal_estimate_tends_to_the_diagonal",
    ),
    Fault(
        "low-rank-weights",
        "_linear/_preconditioner/_low_rank.py",
        "jnp.where(jnp.any(kept), ratio - 1, 0)",
        "jnp.where(jnp.any(kept), ratio, 0)",
        "test_preconditioners.py::test_low_rank_brings_down_what_stands_out",
    ),
    Fault(
        "preconditioner-is-never-refreshed",
        "_linear/_preconditioner/_base.py",
        "(self.age + 1) % every",
        "(self.age + 1)",
        "test_preconditioners.py::test_an_approximation_serves_as_many_solves_as_asked_for",
    ),
    Fault(
        "second-moment-without-root",
        "_linear/_preconditioner/_second_moment.py",
        "jnp.sqrt(jnp.maximum(jax.lax.stop_gradient(nu), 0))",
        "jnp.maximum(jax.lax.stop_gradient(nu), 0)",
        "test_preconditioners.py::"
        "test_second_moment_is_found_by_its_place_and_not_its_name",
    ),
]
