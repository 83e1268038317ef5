"""The benchmark command: what it counts, how it compares, what it writes."""

import dataclasses
import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import symplectic_adjoint as sa
from benchmarks import __main__ as command
from benchmarks import (
    figures,
    floor,
    floor_page,
    measure,
    memory,
    memory_page,
    methods,
    resident,
    scaling,
    scaling_page,
    suite,
    tables,
)
from benchmarks.long import Long
from benchmarks.measure import Record
from benchmarks.peers import BASELINE, PEERS, Bound, Peer, jax_base, zuko_peer
from benchmarks.peers.base import attached
from benchmarks.problems import PROBLEMS, Instance, Problem, TooManyEvaluationsError, quick
from benchmarks.targets import RIVALS, TARGETS, Outcome, outcomes

LONG = quick(PROBLEMS["long"])
SPIRAL = quick(PROBLEMS["spiral"])


class Stub(Peer):
    """Euler steps of plain autograd, or whatever ``forward`` does."""

    package = "torch"
    reference_note = "itself"

    def __init__(self, name: str, forward: Callable[[Instance], Tensor] | None = None) -> None:
        self.name = name
        self.body = forward or (lambda instance: self.euler(instance))

    @staticmethod
    def euler(instance: Instance) -> Tensor:
        y = instance.y0
        for _ in range(3):
            y = y + 0.1 * instance.field(torch.tensor(0.0), y)
        return y

    def bind(self, instance: Instance) -> Bound:
        return attached(instance, lambda: self.body(instance), steps=lambda: 3)

    def reference(self, instance: Instance, grid: Tensor | None) -> Bound:
        return self.bind(instance)


def record(
    peer: str, *, peak: int = 100, steps: int = 4, seconds: list[float | None] | None = None
) -> Record:
    return Record(peer, peak=peak, steps=steps, seconds=seconds or [1.0, 1.0, 1.0])


# Problems ------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=lambda p: p.name)
def test_every_instance_has_the_same_weights_and_states(problem: Problem) -> None:
    first, again, double = problem.instance(), problem.instance(), problem.instance(torch.float64)
    assert torch.equal(first.y0, again.y0)
    assert torch.equal(first.y0, double.y0.float())
    for p, q, d in zip(
        first.field.parameters(), again.field.parameters(), double.field.parameters(), strict=True
    ):
        assert torch.equal(p, q)
        assert torch.equal(p, d.float())
    for p, q in zip(first.field.buffers(), again.field.buffers(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=lambda p: p.name)
def test_solutions_stay_bounded(problem: Problem) -> None:
    instance = problem.instance()
    t = torch.tensor([0.0, problem.t1])
    with torch.no_grad():
        y = sa.odeint(instance.field, instance.y0, t, rtol=1e-3, atol=1e-5)[-1]
    assert y.abs().max() < 30


def test_the_field_counts_its_evaluations_and_products() -> None:
    instance = SPIRAL.instance(counting=True)
    t = torch.tensor(0.0)
    with torch.no_grad():
        instance.field(t, instance.y0)
    y = instance.field(t, instance.field(t, instance.y0))
    instance.field(t, y)  # on the tape, but the loss does not depend on it
    torch.autograd.backward(instance.loss(y))
    assert (instance.field.evaluations, instance.field.products) == (4, 2)


def test_a_solve_without_end_is_stopped() -> None:
    instance = SPIRAL.instance(counting=True)
    instance.field.limit = 10
    for _ in range(10):
        instance.field(torch.tensor(0.0), instance.y0)
    with pytest.raises(TooManyEvaluationsError, match="gave up after 10"):
        instance.field(torch.tensor(0.0), instance.y0)


# One peer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["symplectic-stages", "symplectic-steps", "aca", "mali"])
def test_what_the_network_counts_is_what_the_solution_reports(strategy: str) -> None:
    peer = PEERS[f"ours/{strategy}"]
    bound = peer.bind(SPIRAL.instance())
    found = measure.examine(peer, SPIRAL, bound, suite.ode_gradient(SPIRAL))
    gradient = {
        "symplectic-stages": sa.Symplectic(store="stages"),
        "symplectic-steps": sa.Symplectic(store="steps"),
        "aca": sa.ACA(),
        "mali": sa.MALI(),
    }[strategy]
    tolerances = (1e-3, 1e-5) if strategy == "mali" else (SPIRAL.rtol, SPIRAL.atol)
    instance = SPIRAL.instance()
    solution = sa.solve(
        instance.field,
        instance.y0,
        torch.tensor([0.0, SPIRAL.t1]),
        rtol=tolerances[0],
        atol=tolerances[1],
        gradient=gradient,
    )
    torch.autograd.backward(instance.loss(solution.y[-1]))
    stats = solution.stats
    assert found.steps == stats.accepted
    assert found.forward == stats.evaluations
    assert found.backward == stats.backward_evaluations
    assert found.products == stats.products
    assert found.error_float64 is not None
    assert found.error_float64 < 1e-12
    assert found.error is not None
    assert found.error < 1e-5


def test_the_installed_peers_in_torch_agree_on_the_gradient() -> None:
    truth = suite.ode_gradient(SPIRAL)
    for peer in PEERS.values():
        if not peer.compiled and peer.refuses(SPIRAL) is None and not peer.name.endswith("/mali"):
            value = measure.gradient(peer.bind(SPIRAL.instance()))
            assert measure.relative_error(value, truth) < 1e-4, peer.name


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=lambda p: p.name)
def test_the_fields_in_jax_are_those_in_torch(problem: Problem) -> None:
    jax = pytest.importorskip("jax")
    instance = quick(problem).instance(torch.float64)
    with jax.enable_x64(True):
        params, y0 = jax_base.arguments(instance)
        found = jax_base.function(instance.field)(params, y0)
        expected = instance.field(torch.tensor(0.0), instance.y0).detach()
        assert measure.relative_error(torch.from_numpy(np.array(found)), expected) < 1e-14


def test_the_minimal_adjoint_in_jax_is_exact_and_counts_its_work() -> None:
    pytest.importorskip("jax")
    peer = PEERS["jax/minimal"]
    bound = peer.bind(SPIRAL.instance(torch.float64, counting=True))
    bound.run()
    steps, counts = bound.steps(), bound.counts()
    assert counts is not None
    assert steps is not None
    assert counts.backward == counts.products == 6 * steps
    assert counts.forward >= 6 * steps + 2
    reference = peer.reference(SPIRAL.instance(torch.float64), bound.grid())
    assert reference is not None
    truth = measure.gradient(reference)
    assert measure.relative_error(bound.gradient(), truth) < 1e-12
    state = 8 * SPIRAL.batch * 2  # bytes
    assert bound.peak() > 64 * 6 * state  # the stages of 64 steps


def test_a_peer_that_is_not_installed_says_so() -> None:
    peer = Stub("stub")
    peer.package = "no-such-distribution"
    assert peer.refuses(LONG) == "no-such-distribution is not installed"


def test_a_peer_without_the_method_says_so() -> None:
    assert PEERS["zuko/adjoint"].lacks(LONG) == "zuko has no rk4"
    assert PEERS["zuko/adjoint"].lacks(SPIRAL) is None


def test_accepted_times_are_read_off_the_evaluations() -> None:
    def attempt(start: float, end: float) -> list[float]:
        return [start, *[(start + end) / 2] * 5, end]

    seen = attempt(0.0, 2.0) + attempt(0.0, 1.0) + attempt(1.0, 3.0) + attempt(1.0, 2.0)
    assert zuko_peer._accepted(seen) == [0.0, 1.0, 2.0]


def test_resident_memory_is_measured() -> None:
    assert resident.peak_resident() > 10_000_000


# All peers -----------------------------------------------------------------------------------


def test_a_defect_of_a_peer_is_a_finding() -> None:
    def broken(instance: Instance) -> Tensor:
        raise ValueError("no\nsuch  thing")

    records = suite.measure(
        LONG, [Stub("works"), Stub("broken", broken)], 2, True, lambda text: None
    )
    works, fails = records
    assert works.refused is None
    assert works.error == pytest.approx(0, abs=1e-5)
    assert works.error_float64 == 0
    assert len(works.seconds) == 2
    assert fails.refused == "fails: ValueError: no such thing"
    assert fails.seconds == []


def test_rounds_are_interleaved_and_begin_one_peer_further() -> None:
    order: list[str] = []

    def peer(name: str) -> Bound:
        def forward(instance: Instance) -> Tensor:
            order.append(name)
            return Stub.euler(instance)

        return Stub(name, forward).bind(LONG.instance())

    times = measure.interleave({name: peer(name) for name in "abc"}, 3, lambda text: None)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert [len(times[name].seconds) for name in "abc"] == [3, 3, 3]
    assert all(0 < times[name].cores < 3 for name in "abc")


def test_slow_peers_sit_out_all_rounds_but_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SLOW", 0.0)
    bound = Stub("a").bind(LONG.instance())
    times = measure.interleave({"a": bound}, 3, lambda text: None)
    assert [s is None for s in times["a"].seconds] == [False, True, True]


def test_paired_ratios_ignore_a_slow_round() -> None:
    baseline = record("b", seconds=[1.0, 10.0, 1.0])
    mine = record("a", seconds=[0.5, 5.0, None])
    assert measure.time_ratio(mine, baseline) == 0.5


# Targets and tables --------------------------------------------------------------------------


def test_verdicts() -> None:
    target = TARGETS[0]
    assert Outcome(target, target.bound).verdict == "met"
    assert Outcome(target, 1.5 * target.bound).verdict == "missed by 50%"
    assert Outcome(target, None).verdict == "not measured"


def test_targets_compare_the_time_of_a_step_within_the_memory_allowed() -> None:
    records = {
        each.peer: each
        for each in (
            record(BASELINE, peak=1000),
            record("torchode/backprop", peak=2000, steps=5),  # the fastest a step: 0.2 s
            record("ours/backprop", peak=1000, steps=8),
            record("ours/symplectic-steps", peak=60, seconds=[1.2, 1.2, 1.2]),
            record("ours/continuous", peak=10, steps=100),  # not exact
        )
    }
    (outcome,) = outcomes("long", records)
    assert (outcome.ours, outcome.rival) == ("ours/symplectic-steps", "torchode/backprop")
    assert outcome.figure == pytest.approx(1.2 * 5 / 4)
    assert outcome.verdict == "missed by 50%"
    assert outcomes("long", {})[0].verdict == "not measured"


def test_every_target_is_about_a_problem_and_peers_that_exist() -> None:
    assert {target.problem for target in TARGETS} == {*PROBLEMS}
    for target in TARGETS:
        assert any(fnmatch(name, p) for p in RIVALS[target.rival] for name in PEERS), target


def test_what_is_written_about_a_missed_target_is_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MISSED", tmp_path)
    (tmp_path / "long.md").write_text("**long**: the reason.\n")
    slow = results(record("ours/aca", peak=1, seconds=[2.0]), record(BASELINE, seconds=[1.0]))
    assert "**long**: the reason." in tables.markdown(slow)
    fast = results(record("ours/aca", peak=1, seconds=[1.0]), record(BASELINE, seconds=[2.0]))
    assert "the reason" not in tables.markdown(fast)


HEAD = ("machine", "when", "rounds")


def results(*records: Record) -> dict[str, Any]:
    problem = {
        "name": "long",
        "title": "a",
        "rounds": 3,
        "when": "2024-01-01",
        "machine": {
            "processor": "chip",
            "cores": 2,
            "threads": 1,
            "python": "3.11",
            "packages": {"torch": "2", "absent": None},
        },
        "records": [record.as_json() for record in records],
    }
    return {"quick": False, "problems": [problem]}


def test_tables_show_gaps_as_dashes_and_name_who_did_not_run() -> None:
    full = results(record("ours/aca"))
    row = next(line for line in tables.plain(full).splitlines() if line.startswith("ours/aca"))
    assert " ".join(row.split()) == "ours/aca 1.00 s - 250 ms - - 100 B - - 4 - - - - - -"
    assert "| ours/aca | 1.00 s |" in tables.markdown(full)
    refused = results(Record("zuko/adjoint", refused="zuko is not installed"))
    for text in (tables.plain(refused), tables.markdown(refused)):
        assert "zuko/adjoint: not measured, zuko is not installed." in text


def test_problems_that_are_not_measured_again_keep_their_figures() -> None:
    old, new = results(record("ours/aca")), results(record("ours/mali"))
    old["problems"].append({**old["problems"][0], "name": "spiral"})
    found = suite.merged(old, new, ["spiral", "tabular", "long"])["problems"]
    assert [(p["name"], p["records"][0]["peer"]) for p in found] == [
        ("spiral", "ours/aca"),
        ("long", "ours/mali"),
    ]


def test_the_page_of_the_documentation_is_what_the_results_say() -> None:
    page = command.PAGE.read_text(encoding="utf-8")
    assert page == tables.markdown(suite.load(command.RESULTS))


# The command ---------------------------------------------------------------------------------


def test_the_command_measures_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "results.json"
    status = command.main(
        ["long", "--quick", "--peers", "ours/symplectic-steps", "--out", str(out)]
    )
    assert status == 0
    written = json.loads(out.read_text())
    assert written["quick"] is True
    (problem,) = written["problems"]
    by_name = {r["peer"]: r for r in problem["records"]}
    ours = by_name.pop("ours/symplectic-steps")
    assert list(by_name) == [BASELINE]
    baseline = by_name[BASELINE]
    assert (ours["steps"], ours["forward"], ours["products"]) == (64, 256, 256)
    assert ours["error_float64"] < 1e-12
    if baseline["refused"] is None:
        assert baseline["forward"] == 256
        assert ours["peak"] < 0.2 * baseline["peak"]
    printed = capsys.readouterr().out
    assert "ours/symplectic-steps" in printed
    assert command.main(["--load", str(out)]) == 0
    assert capsys.readouterr().out == printed


def test_our_own_failure_is_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for peer, status in (("zuko/adjoint", 0), ("ours/aca", 1)):
        path = tmp_path / "results.json"
        suite.save(results(Record(peer, refused="fails")), path)
        assert command.main(["--load", str(path)]) == status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lnog"], "no problem 'lnog'; there are spiral, mid, tabular"),
        (["--peers", "nobody"], "no peer matches 'nobody'"),
        (["--rounds", "0"], "'0' is no positive whole number"),
        (["--quick", "--write-docs"], "figures of a full run"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_peers_keep_the_order_of_the_tables() -> None:
    options = command._parser().parse_args(["--peers", "ours/aca", "ours/backprop"])
    assert [p.name for p in options.peers] == [BASELINE, "ours/backprop", "ours/aca"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    suite.write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        suite.write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# All methods -----------------------------------------------------------------------------------


def test_the_methods_compared_are_those_that_both_libraries_have() -> None:
    pytest.importorskip("torchdiffeq")
    found = methods.shared()
    assert {"euler", "rk4", "dopri5", "dopri8", "explicit_adams", "implicit_adams"} <= {*found}
    assert not {"fixed_adams", "scipy_solver", "tsit5"} & {*found}


def test_methods_are_measured_at_the_same_number_of_steps_and_written_to_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchdiffeq")
    monkeypatch.setattr(methods, "shared", lambda: ["explicit_adams", "bosh3"])
    out = tmp_path / "methods.json"
    assert command.main(["methods", "--quick", "--rounds", "1", "--out", str(out)]) == 0
    assert {"explicit_adams", "bosh3"} <= {*capsys.readouterr().out.split()}
    results = suite.load(out)
    fixed, _, adjoint, _ = results["methods"]["explicit_adams"]
    assert fixed["steps"] == adjoint["steps"] == methods.STEPS // 5
    # Two steps of rk4 first, and one evaluation a step from then on.
    assert fixed["forward"] == fixed["products"] == 20 + 2 * 3
    for records in results["methods"].values():
        ours, theirs, *_ = records
        assert ours["error_float64"] < 1e-12
        assert ours["error_solution"] < 3 * theirs["error_solution"]
    page = tables.markdown({**suite.load(command.RESULTS), "methods": results})
    assert "| explicit_adams | 20 | 20 |" in page


# The floor and the scaling curves ----------------------------------------------------------------


def test_the_floor_is_the_sum_of_the_work_measured_alone() -> None:
    units = {
        "eager evaluation": [2e-3, 2e-3, 8e-3],
        "eager evaluation and product": [5e-3, 5e-3, 11e-3],
        "compiled evaluation": [1e-3],
        "compiled evaluation and product": [3e-3],
    }
    assert floor.unit(units, "eager") == pytest.approx((2e-3, 3e-3))
    least = Record("ours/backprop", steps=10, forward=10, backward=0, products=10, seconds=[0.1])
    stages = Record(
        "ours/symplectic-stages", steps=10, forward=10, backward=10, products=10, seconds=[0.14]
    )
    row = floor_page.row(stages, least, units)
    # (10 + 10) x 2 ms + 10 x 3 ms, and without the second evaluations; 70 ms more in 10 steps.
    assert row[4:] == ("70.00 ms", "2.00", "50.00 ms", "2.80", "7000 us")
    compiled = dataclasses.replace(stages, peer="ours/symplectic-stages/loop")
    assert floor_page.row(compiled, least, units)[4] == "40.00 ms"


def test_series_of_the_floor_call_the_field_as_often_as_they_say() -> None:
    instance = SPIRAL.instance(counting=True)
    floor._evaluations(instance)(7)
    assert (instance.field.evaluations, instance.field.products) == (7, 0)
    floor._products(instance)(5)
    assert (instance.field.evaluations, instance.field.products) == (12, 5)


def test_the_sizes_that_grow_are_those_they_are_named_for() -> None:
    axes = {axis.name: axis for axis in scaling.AXES}
    for value in axes["parameters"].values:
        field = axes["parameters"].problem(value).instance().field
        assert sum(p.numel() for p in field.parameters()) == pytest.approx(value, rel=0.03)
    for name, attribute in (("batch", "batch"), ("outputs", "outputs"), ("steps", "t1")):
        assert [getattr(axes[name].problem(v), attribute) for v in axes[name].values] == [
            *axes[name].values
        ]


def axis(ratio: float | None) -> dict[str, Any]:
    point = {"x": 50_000, "seconds": 0.5, "peak": 1000, "backward_to_forward": ratio}
    point["steps"] = 3
    failed = {"x": 50_000, "seconds": None, "peak": None, "backward_to_forward": None}
    failed["fails"] = "no such thing"
    return {
        "name": "parameters",
        "label": "parameters",
        "title": "a",
        "points": {"ours/symplectic-stages": [point], "torchode/backprop": [failed]},
    }


def test_backward_passes_of_many_parameters_are_judged() -> None:
    assert "met, the most is 3.00" in scaling_page.verdict(axis(3.0))
    assert "missed by 50%, the most is 6.00" in scaling_page.verdict(axis(6.0))
    assert "not measured" in scaling_page.verdict(axis(None))


def test_the_page_of_scaling_has_a_figure_and_a_row_for_each_peer() -> None:
    found = {**results(), "axes": [axis(3.0)]} | {k: results()["problems"][0][k] for k in HEAD}
    page = scaling_page.markdown(found)
    assert "| ours/symplectic-stages | 500 ms (x3.0), 1 kB |" in page
    assert "| torchode/backprop | - |" in page
    assert "- torchode/backprop at 50000: fails: no such thing" in page
    assert "(assets/scaling/parameters.svg)" in page
    (image,) = scaling_page.images(found).values()
    assert image == scaling_page.images(found)["assets/scaling/parameters.svg"]
    assert b"ours/symplectic-stages" in image or b"<path" in image


def test_one_size_is_measured_for_every_peer_that_can() -> None:
    fails = Stub("fails", lambda instance: torch.ones(()).expand(0)[1])
    absent = Stub("absent")
    absent.package = "no-such-distribution"
    points = scaling._points(LONG, [Stub("stub"), fails, absent], 1)
    assert {*points} == {"stub", "fails"}
    assert points["stub"]["steps"] == 3
    assert points["stub"]["seconds"] > 0
    assert points["stub"]["backward_to_forward"] > 0
    assert points["fails"]["seconds"] is None
    assert "index 1 is out of bounds" in points["fails"]["fails"]


@pytest.mark.parametrize(
    ("data", "page", "markdown"),
    [
        (command.FLOOR, command.FLOOR_PAGE, floor_page.markdown),
        (command.SCALING, command.SCALING_PAGE, scaling_page.markdown),
        (command.BUDGETS, command.BUDGETS_PAGE, memory_page.markdown),
    ],
    ids=["floor", "scaling", "budgets"],
)
def test_the_other_pages_are_what_their_results_say(
    data: Path, page: Path, markdown: Callable[[dict[str, Any]], str]
) -> None:
    assert page.read_text(encoding="utf-8") == markdown(suite.load(data))


# Figures -----------------------------------------------------------------------------------------


def test_peers_of_a_figure_differ_in_colour_or_marker() -> None:
    looks = figures.styles(PEERS)
    seen = {(look["color"], look["marker"]) for look in looks.values()}
    assert len(seen) == len(PEERS)
    assert looks["ours/aca"]["markerfacecolor"] == "white"
    assert looks["jax/minimal"]["markerfacecolor"] != "white"


def test_the_same_figures_give_the_same_file() -> None:
    records = {r.peer: r for r in (record(BASELINE), record("ours/aca", peak=50))}
    assert figures.costs("a", records) == figures.costs("a", records)


# Budgets -----------------------------------------------------------------------------------------


def point(name: str, retaken: int, resident: int) -> dict[str, Any]:
    times = {"steps": 100, "forward": 2.0, "backward": 3.0 + retaken / 50, "interpreter": 10**8}
    kept = {"name": name, "slots": 10, "retaken": retaken, "optimum": 50, "memory": 9000}
    return {**times, **kept, "resident": resident}


def test_the_curve_of_budgets_says_what_steps_taken_again_should_take() -> None:
    found = {k: results()["problems"][0][k] for k in HEAD}
    points = [point("all states", 0, 10**6), point("few states", 150, 10**4)]
    assert memory_page.expected(points[1], points[0]) == pytest.approx(3.0 + 150 * 2 / 100)
    results_ = {**found, "quick": False, "steps": 100, "points": points}
    page = memory_page.markdown({"curve": results_})
    assert "| few states | 10 | 150 | 50 | 2.00 s | 6.00 s | 6.00 s | 10 kB |" in page
    (image,) = memory_page.images({"curve": results_}).values()
    assert b"<svg" in image
    assert memory_page.plain(results_).count("few states") == 1


def test_a_long_run_is_held_against_its_budget() -> None:
    found = {k: results()["problems"][0][k] for k in HEAD}
    prefix = {"steps": 7, "retaken": 3, "error": 1e-15, "budget": 4000, "peak": 5000}
    for evaluation, limit, verdict in ((100, 9100, "missed"), (1000, 9300, "met")):
        long = {**point("", 150, 9200), "limit": limit}
        each = {**found, "prefix": {**prefix, "evaluation": evaluation}, "long": long}
        page = memory_page.markdown({"million": each})
        assert f"| growth of the resident memory | 9 kB | {verdict} |" in page
        assert f"as many steps within 4 kB | 5 kB | {verdict} |" in page


def test_a_long_run_is_the_same_with_and_without_a_budget() -> None:
    took, everything = Long(40, double=True).run()
    assert took["retaken"] == 0
    thin = Long(40, double=True, memory="least")
    again, thinned = thin.run()
    assert again["retaken"] > 20
    assert torch.equal(thinned, everything)
    assert memory.theory(thin)["optimum"] <= again["retaken"]
    smallest = memory.smallest(Long(40))
    assert memory.within(Long(40), 3) > smallest
