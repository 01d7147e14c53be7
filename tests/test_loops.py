"""What our loops wait for: integers and booleans only, and never for ever.

The condition of a `lax.while_loop` is evaluated twice under `jax.vmap`. If it computes
with floating-point numbers a compiler can round the two copies differently, and the loop
then waits for an element that it has frozen (see `carry_conditions`). A loop without a
bound waits for a tolerance that rounding keeps out of reach.
"""

import functools as ft
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
import optimistix as optx
import pytest

import metaopt as mo
from jaxprs import equations, with_floats
from members import ADJOINTS, inner_solver, LINEAR_SOLVERS, SOLVERS
from problems import Case, CASES


#
# The walker
#

_COMPARISONS = ("lt", "le", "gt", "ge")
# The same booleans in another shape. Any of many that all end ends.
_SAME = (
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "nonbatchable",
    "reduce_and",
    "reduce_or",
    "reshape",
    "squeeze",
    "unvmap_all",
    "unvmap_any",
)


def loops(fn: Callable, *args: Any) -> list[Any]:
    """Every `while_loop` that `fn` runs, those in functions that it calls included."""
    jaxpr, _, _ = eqx.filter_make_jaxpr(fn)(*args)
    return [eqn for eqn in _all_equations(jaxpr.jaxpr) if eqn.primitive.name == "while"]


def _all_equations(jaxpr: Any) -> Iterator[Any]:
    """As `jaxprs.equations`, and those inside the primitives of lineax: the solve, alone
    and batched, whose function is in no jaxpr before it is compiled."""
    for eqn in equations(jaxpr):
        yield eqn
        if eqn.primitive.name in ("linear_solve", "vprim"):
            solve = ft.partial(eqn.primitive.impl, **eqn.params)
            inner = jax.make_jaxpr(solve)(*(v.aval for v in eqn.invars))
            yield from _all_equations(inner.jaxpr)


def computes_floats(loop: Any) -> list[str]:
    return with_floats(list(equations(loop.params["cond_jaxpr"].jaxpr)))


def has_bound(loop: Any) -> bool:
    """Whether the loop must end once a carried integer has passed some other number.

    The condition does the comparison itself, or it is a carried boolean for which the
    body does.
    """
    condition, body = (loop.params[name].jaxpr for name in ("cond_jaxpr", "body_jaxpr"))
    num_condition, num_body = (loop.params[f"{name}_nconsts"] for name in ("cond", "body"))
    counters = _counters(body, num_body)

    def carried_by_body(var):
        return body.invars.index(var) - num_body in counters

    def of_body(var):
        return False

    def of_condition(var):
        index = condition.invars.index(var) - num_condition
        if index < 0:
            return False
        return _must_end(body, body.outvars[index], True, of_body, carried_by_body)

    def carried_by_condition(var):
        return condition.invars.index(var) - num_condition in counters

    return _must_end(
        condition, condition.outvars[0], True, of_condition, carried_by_condition
    )


def _counters(body: Any, num_consts: int) -> set[int]:
    """The places of carried integers that the body changes."""
    carried = zip(body.invars[num_consts:], body.outvars, strict=True)
    return {
        index
        for index, (before, after) in enumerate(carried)
        if jnp.issubdtype(before.aval.dtype, jnp.integer) and after is not before
    }


def _must_end(
    jaxpr: Any,
    atom: Any,
    goes_on: bool,
    of_input: Callable[[Any], bool],
    is_counter: Callable[[Any], bool],
) -> bool:
    """Whether the boolean `atom` stops being `goes_on` because of a counter."""

    def again(atom, goes_on=goes_on):
        return _must_end(jaxpr, atom, goes_on, of_input, is_counter)

    if not hasattr(atom, "count") and hasattr(atom, "val"):  # a literal
        return bool(atom.val) is not goes_on
    if atom in jaxpr.invars:
        return of_input(atom)
    eqn = next((e for e in jaxpr.eqns if atom in e.outvars), None)
    if eqn is None:
        return False
    name = eqn.primitive.name
    # A counter that moves leaves the number that it was equal to.
    if name in _COMPARISONS or (name == "eq" and goes_on):
        return any(_comes_from(jaxpr, a, is_counter) for a in eqn.invars)
    if name in ("and", "or"):
        return (any if (name == "and") is goes_on else all)(map(again, eqn.invars))
    if name == "not":
        return again(eqn.invars[0], not goes_on)
    if name in _SAME:
        return again(eqn.invars[0])
    if name == "select_n":
        return all(map(again, eqn.invars[1:]))
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if name in ("jit", "pjit", "closed_call") and inner is not None:
        inner = inner.jaxpr
        outer = dict(zip(inner.invars, eqn.invars, strict=True))
        return _must_end(
            inner,
            inner.outvars[eqn.outvars.index(atom)],
            goes_on,
            lambda var: again(outer[var]),
            lambda var: _comes_from(jaxpr, outer[var], is_counter),
        )
    return False


def _comes_from(jaxpr: Any, atom: Any, is_counter: Callable[[Any], bool]) -> bool:
    """Whether an integer is a counter, or is computed from one."""
    if hasattr(atom, "val") or not jnp.issubdtype(atom.aval.dtype, jnp.integer):
        return False
    if atom in jaxpr.invars:
        return is_counter(atom)
    eqn = next((e for e in jaxpr.eqns if atom in e.outvars), None)
    return eqn is not None and any(_comes_from(jaxpr, a, is_counter) for a in eqn.invars)


def assert_safe(fn: Callable, *args: Any, at_least: int = 0) -> None:
    found = loops(fn, *args)
    assert len(found) >= at_least
    for loop in found:
        condition = str(loop.params["cond_jaxpr"])
        assert not computes_floats(loop), condition
        assert has_bound(loop), condition


#
# The walker itself
#


def _while(condition, body, *init):
    return lambda: jax.lax.while_loop(lambda c: condition(*c), lambda c: body(*c), init)


X, ZERO, YES = jnp.array(8.0), jnp.array(0), jnp.array(True)
SAFE = {
    "counter": _while(lambda i, x: i < 9, lambda i, x: (i + 1, x / 2), ZERO, X),
    "bool and counter": _while(
        lambda on, i, x: on & (i < 9), lambda on, i, x: (x > 1, i + 1, x / 2), YES, ZERO, X
    ),
    "carried bool": _while(
        lambda on, i, x: on,
        lambda on, i, x: ((x > 1) & (i < 9), i + 1, x / 2),
        YES,
        ZERO,
        X,
    ),
    "negated": _while(
        lambda i, x: ~((i >= 9) | (i > 12)), lambda i, x: (i + 1, x / 2), ZERO, X
    ),
    "in a function": _while(
        lambda i, x: jax.jit(lambda i: (i < 9) & (i != 3))(i),
        lambda i, x: (i + 1, x / 2),
        ZERO,
        X,
    ),
}
NO_BOUND = {
    "tolerance alone": _while(lambda on, x: on, lambda on, x: (x > 1, x / 2), YES, X),
    "or": _while(
        lambda on, i, x: on | (i < 9), lambda on, i, x: (x > 1, i + 1, x / 2), YES, ZERO, X
    ),
    "counter that stands still": _while(
        lambda on, i, x: on & (i < 9), lambda on, i, x: (x > 1, i, x / 2), YES, ZERO, X
    ),
    "an integer to be hit": _while(lambda i, x: i != 9, lambda i, x: (i + 2, x), ZERO, X),
    "bool that nobody changes": _while(lambda on, x: on, lambda on, x: (on, x), YES, X),
}


@pytest.mark.parametrize("name", SAFE)
def test_walker_passes_a_safe_loop(name):
    assert_safe(SAFE[name], at_least=1)


@pytest.mark.parametrize("name", NO_BOUND)
def test_walker_catches_a_loop_without_bound(name):
    (loop,) = loops(NO_BOUND[name])
    assert not has_bound(loop)


def _halve(x):
    body = lambda c: (c[0] / 2, c[1] + 1)
    return jax.lax.while_loop(lambda c: (c[0] > 1) & (c[1] < 9), body, (x, 0))[0]


def _lineax_cg(x):
    tag = lx.positive_semidefinite_tag
    operator = lx.MatrixLinearOperator(jnp.diag(jnp.array([1.0, 2.0])), tag)
    return lx.linear_solve(operator, jnp.stack([x, x]), lx.CG(1e-6, 1e-6)).value


@pytest.mark.parametrize(
    "fn",
    [
        _halve,
        jax.jit(_halve),
        jax.checkpoint(_halve),  # pyright: ignore[reportPrivateImportUsage]
        lambda x: jax.vmap(_halve)(jnp.stack([x, x])),
        lambda x: jax.lax.map(_halve, jnp.stack([x, x])),
        lambda x: jax.lax.cond(x > 2, _halve, lambda x: x, x),
        lambda x: jax.lax.fori_loop(0, x.astype(int), lambda _, y: _halve(y), x),
        lambda x: jax.jvp(_halve, (x,), (x,)),
        lambda x: jax.lax.custom_linear_solve(
            lambda y: y, x, lambda _, y: _halve(y), symmetric=True
        ),
        _lineax_cg,
        lambda x: jax.vmap(_lineax_cg)(jnp.stack([x, x])),
    ],
    ids=(
        "plain jit remat vmap scan cond while jvp custom_linear_solve lineax".split()
        + ["batched lineax"]
    ),
)
def test_walker_catches_floats_wherever_they_are(fn):
    found = [loop for loop in loops(fn, X) if computes_floats(loop)]
    assert found
    assert all(has_bound(loop) for loop in found)


#
# Ours
#


def batched(fn: Callable) -> Callable:
    def twice(x):
        return jax.vmap(fn)(jax.tree.map(lambda a: jnp.stack([a, a]), x))

    return twice


def trainable(case: Case) -> Any:
    return eqx.filter(case.hyper, eqx.is_inexact_array)


def as_hyper(case: Case, trainable: Any) -> Any:
    return eqx.combine(trainable, case.hyper)


def solve(
    case: Case, solver: mo.extend.AbstractSolver, adjoint: mo.extend.AbstractAdjoint
) -> Any:
    """The squared length of the inner solution as a function of `hyper`."""

    def fn(trainable):
        solution = mo.solve_inner(
            case.problem.inner,
            as_hyper(case, trainable),
            case.train,
            params=case.params,
            solver=solver,
            adjoint=adjoint,
        )
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(solution.value))

    return fn


def first_case(serves: frozenset[str]) -> Case:
    cases = (CASES[name](jnp.float64) for name in ("ridge", "fixed point", "root"))
    return next(case for case in cases if case.kind in serves)


@pytest.mark.one_of(8)
@pytest.mark.parametrize("name", ADJOINTS)
def test_adjoints(name):
    member = ADJOINTS[name]
    case = first_case(member.serves)
    inner, adjoint = inner_solver(case), member.make(case)

    def hypergradient(trainable):
        hyper = as_hyper(case, trainable)
        return mo.hypergradient(
            case.problem,
            hyper,
            *case.data,
            params=case.params,
            inner=inner,
            adjoint=adjoint,
        )[0]

    assert_safe(batched(hypergradient), trainable(case))
    assert_safe(jax.value_and_grad(solve(case, inner, adjoint)), trainable(case))


@pytest.mark.one_of(6)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=row.marks) for name, row in SOLVERS.items()]
)
def test_solvers(name):
    member = SOLVERS[name]
    case = first_case(member.serves)
    fn = solve(case, member.make(case), mo.ImplicitAdjoint(mo.Dense()))
    assert_safe(fn, trainable(case))
    assert_safe(batched(fn), trainable(case))


TOL: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}


@pytest.mark.one_of(3)
@pytest.mark.parametrize(
    "case, solver",
    [
        ("ridge", mo.Descent(optax.adam(0.1), num_steps=9, atol=1e-6)),
        ("fixed point", mo.Picard(num_steps=9, rtol=1e-6)),
        (
            "ridge",
            mo.Descent(
                optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
                num_steps=4,
            ),
        ),
        ("ridge", mo.OptimistixSolver(optx.LBFGS(**TOL))),
        ("ridge", mo.OptimistixSolver(optx.NonlinearCG(**TOL))),
        ("ridge", mo.OptimistixSolver(optx.GradientDescent(learning_rate=0.1, **TOL))),
        ("ridge", mo.OptimistixSolver(optx.NelderMead(**TOL))),
        ("ridge", mo.OptimistixSolver(optx.OptaxMinimiser(optax.adam(0.1), **TOL))),
        ("root", mo.OptimistixSolver(optx.Chord(**TOL))),
        ("root", mo.OptimistixSolver(optx.Dogleg(**TOL))),
        ("root", mo.OptimistixSolver(optx.LevenbergMarquardt(**TOL))),
    ],
    ids=lambda x: (
        type(x.solver if isinstance(x, mo.OptimistixSolver) else x).__name__
        if isinstance(x, mo.extend.AbstractSolver)
        else x
    ),
)
def test_solvers_that_stop_early(case, solver):
    case = CASES[case](jnp.float64)
    fn = solve(case, solver, mo.ImplicitAdjoint(mo.Dense()))
    assert_safe(batched(fn), trainable(case), at_least=1)


BOX = -jnp.ones(4), jnp.ones(4)


@pytest.mark.parametrize(
    "linear_solver", [lx.CG(**TOL), lx.GMRES(**TOL), lx.BiCGStab(**TOL)]
)
def test_iterative_linear_solvers_inside_those_of_optimistix(linear_solver):
    case = CASES["ridge"](jnp.float64)
    solver = mo.OptimistixSolver(optx.Newton(**TOL, linear_solver=linear_solver))
    fn = solve(case, solver, mo.ImplicitAdjoint(mo.Dense()))
    assert_safe(batched(fn), trainable(case), at_least=1)


@pytest.mark.one_of(4)
@pytest.mark.parametrize(
    "name, options, arguments",
    [
        ("GradientDescent", {}, {}),
        ("BFGS", {}, {}),
        ("LBFGS", {"linesearch": "zoom"}, {}),
        ("LBFGS", {"linesearch": "backtracking"}, {}),
        ("LBFGSB", {}, {"bounds": BOX}),
        ("NonlinearCG", {}, {}),
        ("ProximalGradient", {}, {"hyperparams_prox": None}),
        (
            "ProjectedGradient",
            {"projection": lambda x, box: jnp.clip(x, *box)},
            {"hyperparams_proj": BOX},
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_solvers_of_jaxopt(name, options, arguments):
    pytest.importorskip("jaxopt", exc_type=ImportError)
    case = CASES["ridge"](jnp.float64)
    solver = mo.JaxoptSolver(name, {"maxiter": 20, **options}, lambda *_: arguments)
    fn = solve(case, solver, mo.ImplicitAdjoint(mo.Dense()))
    assert_safe(batched(fn), trainable(case), at_least=1)


@pytest.mark.one_of(3)
@pytest.mark.parametrize(
    "linear_solver",
    [member.make(CASES["ridge"](jnp.float64)) for member in LINEAR_SOLVERS.values()]
    + [
        mo.CG(rtol=None, max_steps=5),
        mo.CG(damping=0.1, preconditioner=lambda x: jax.tree.map(lambda a: 2 * a, x)),
        mo.GMRES(rtol=None, restart=2),
        mo.linear.BiCGStab(rtol=None, max_steps=5),
        mo.Neumann(num_terms=5),
    ],
    ids=lambda x: type(x).__name__,
)
def test_linear_solvers(linear_solver):
    matrix = jnp.diag(jnp.array([1.0, 2.0, 3.0]))
    tags = frozenset({lx.symmetric_tag, lx.positive_semidefinite_tag})

    def fn(vector):
        operator = lx.MatrixLinearOperator(matrix, tags)
        return linear_solver.solve(operator, vector, vector).value

    krylov = isinstance(linear_solver, mo.CG | mo.GMRES | mo.linear.BiCGStab)
    assert_safe(fn, jnp.ones(3), at_least=int(krylov))
    assert_safe(batched(fn), jnp.ones(3), at_least=int(krylov))


@pytest.mark.parametrize("start", [mo.ColdStart(), mo.WarmStart()])
def test_outer_step(start):
    case = CASES["ridge"](jnp.float64)
    inner = mo.Descent(optax.adam(0.1), num_steps=9)
    solver = mo.NestedSolver(inner, mo.ImplicitAdjoint(), optax.adam(0.1), start)
    train, valid = mo.Minibatches(case.train, batch_size=4), mo.FullBatch(case.valid)
    state = solver.init(
        case.problem,
        case.hyper,
        train,
        valid,
        params=case.params,
        model_state=None,
        key=jax.random.key(0),
    )
    step = lambda state: solver.step(case.problem, state, train, valid)
    assert_safe(step, state, at_least=1)
