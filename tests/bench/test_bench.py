"""The benchmark's own arithmetic, texts and pictures. Nothing here judges how fast anything is."""

import gc
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from xml.etree import ElementTree as ET

import msgspec
import pytest
from click.testing import CliRunner

from evsys_bus.bench.report import Machine, Report, as_svg, as_text, format_value
from evsys_bus.bench.suite import (
    Budget,
    Candidate,
    Case,
    Result,
    Row,
    Samples,
    Spread,
    Table,
    Target,
    TargetResult,
    TimedLoop,
    TimedSuite,
    calibrate,
    interleave,
    measure,
    run_suite,
)
from evsys_bus.cli.bench import bench_command, command
from support import ROOT

SVG = "{http://www.w3.org/2000/svg}"
EFFORT = Budget(rounds=4, process_rounds=2, sample_ns=1_000)


def steady(ns: int) -> TimedLoop:
    return lambda operations: operations * ns


def contender(run: TimedLoop, *, package: str | None = None, ours: bool = False) -> Candidate:
    @contextmanager
    def opened() -> Generator[TimedLoop, None, None]:
        yield run

    return Candidate(opened, package, ours)


def absent(package: str | None) -> Candidate:
    @contextmanager
    def opened() -> Generator[TimedLoop, None, None]:
        raise ImportError("no such module")
        yield steady(1)

    return Candidate(opened, package)


def fake_question(*, at_most: float = 3.0) -> TimedSuite:
    contenders = {
        "floor": contender(steady(100)),
        "bus & co": contender(steady(250), ours=True),
        "gone": absent("gone-package"),
    }
    targets = (
        Target(candidate="bus & co", reference="floor", at_most=at_most),
        Target(candidate="gone", reference="bus & co", at_least=8),
    )
    case = Case(title="K < 8", candidates=contenders, baseline="floor", targets=targets)
    return TimedSuite(name="fake", promise="a promise", cases=(case,))


def fake_report() -> Report:
    machine = Machine("3.11.7", 2, "Linux x86_64", {"evsys-bus": "0.1.0", "pluggy": "1.7.0"})
    counts = Table(
        title="uploads finished",
        unit="of 200",
        rows=[Row("bare", Spread(0, 0, 0)), Row("bus", Spread(200, 200, 200), ours=True)],
        target_results=[TargetResult("bus finishes every upload", 200, met=True, unit="of 200")],
    )
    survival = Result("survival", "all are finished", [counts])
    return Report(machine, [run_suite(fake_question(at_most=2.0), EFFORT, lambda _: None), survival])


def test_a_contender_is_calibrated_to_samples_of_the_asked_length():
    assert calibrate(steady(100), sample_ns=10_000) == 100


def test_a_contender_that_takes_longer_than_a_sample_runs_once():
    assert calibrate(steady(10**9), sample_ns=10_000) == 1


def test_a_contender_that_takes_no_time_at_all_is_not_run_for_ever():
    assert calibrate(steady(0), sample_ns=4_000_000) == 1_000_000


def test_every_round_samples_every_contender_once_and_begins_with_another_one():
    order: list[str] = []

    def noting(name: str) -> TimedLoop:
        def run(operations: int) -> int:
            order.append(name)
            return 1_000 * operations

        return run

    interleave({name: noting(name) for name in "abc"}, rounds=3, sample_ns=1_000)
    calibration, rounds = order[:3], order[3:]
    assert calibration == ["a", "b", "c"]
    assert "".join(rounds) == "abcbcacab"


@pytest.mark.parametrize("host_collects", [True, False])
def test_the_collector_is_off_inside_a_sample_and_afterwards_as_before(host_collects: bool):
    seen: list[bool] = []

    def run(operations: int) -> int:
        seen.append(gc.isenabled())
        return 10_000 * operations

    was = gc.isenabled()
    try:
        (gc.enable if host_collects else gc.disable)()
        interleave({"only": run}, rounds=2, sample_ns=1_000)
        assert gc.isenabled() is host_collects
        assert seen[-2:] == [False, False]
    finally:
        (gc.enable if was else gc.disable)()


def test_a_ratio_is_taken_within_rounds_so_a_slow_spell_does_not_move_it():
    samples = Samples({"floor": [100, 100, 300, 300], "ours": [200, 200, 600, 600]})
    assert samples.ratio("ours", "floor") == Spread(2.0, 2.0, 2.0)
    assert samples.time("ours") == Spread(400, 200, 600)


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        (Target(candidate="ours", reference="floor", at_most=2.0), True),
        (Target(candidate="ours", reference="floor", at_most=1.9), False),
        (Target(candidate="ours", reference="floor", at_least=2.0), True),
        (Target(candidate="ours", reference="floor", at_least=2.1), False),
        (Target(candidate="ours", reference="floor", at_least=1.0, at_most=1.9), False),
        (Target(candidate="ours", reference="somebody", at_most=1.0), None),
    ],
)
def test_a_target_is_judged_by_its_bounds_and_not_without_its_contenders(target: Target, kept: bool | None):
    samples = Samples({"floor": [100.0, 100.0], "ours": [200.0, 200.0]})
    assert target.evaluate(samples).met is kept


def test_a_contender_whose_package_is_missing_is_named_and_the_rest_is_measured():
    table = measure(fake_question().cases[0], EFFORT)
    assert [row.candidate for row in table.rows] == ["floor", "bus & co"]
    assert table.absent == {"gone": "needs gone-package: no such module"}
    assert [verdict.met for verdict in table.target_results] == [True, None]


def test_a_contender_of_our_own_that_cannot_be_imported_is_no_mere_absence():
    case = Case(title="broken", candidates={"floor": contender(steady(1)), "ours": absent(None)}, baseline="floor")
    with pytest.raises(ImportError, match="no such module"):
        measure(case, EFFORT)


def test_contenders_are_taken_down_when_one_of_them_raises_while_it_is_timed():
    closed: list[str] = []

    @contextmanager
    def opened() -> Generator[TimedLoop, None, None]:
        try:
            yield steady(1)
        finally:
            closed.append("floor")

    def broken(_: int) -> int:
        raise ValueError("cannot be timed")

    case = Case(title="t", candidates={"floor": Candidate(opened), "broken": contender(broken)}, baseline="floor")
    with pytest.raises(ValueError, match="cannot be timed"):
        measure(case, EFFORT)
    assert closed == ["floor"]


def test_a_case_that_starts_processes_gets_fewer_rounds():
    calls: dict[str, int] = {"n": 0}

    def counted(operations: int) -> int:
        calls["n"] += 1
        return 10_000 * operations

    case = Case(title="t", candidates={"floor": contender(counted)}, baseline="floor", starts_processes=True)
    measure(case, Budget(rounds=100, process_rounds=3, sample_ns=1_000))
    assert calls["n"] == 1 + 3  # calibration, rounds


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.4, "ns", "0.4 ns"),
        (412.34, "ns", "412 ns"),
        (1_500, "ns", "1.5 µs"),
        (999.7, "ns", "1 µs"),
        (2_346_000, "ns", "2.35 ms"),
        (1.5e9, "ns", "1.5 s"),
        (200, "of 200", "200 of 200"),
    ],
)
def test_an_amount_is_told_in_a_unit_that_suits_its_size(value: float, unit: str, text: str):
    assert format_value(value, unit) == text


def test_the_report_reads_as_promised():
    assert as_text(fake_report()) == (
        "Python 3.11.7, Linux x86_64, 2 cores\n"
        "evsys-bus 0.1.0, pluggy 1.7.0\n"
        "Times are medians; ratios are medians of the ratios within each round, with the quartiles.\n"
        "\n"
        "fake   a promise\n"
        "\n"
        "  K < 8, in multiples of floor\n"
        "    floor     100 ns  1.00 x  1.00 to 1.00\n"
        "    bus & co  250 ns  2.50 x  2.50 to 2.50\n"
        "    gone: not measured, needs gone-package: no such module\n"
        "    MISS  bus & co takes at most 2 x as long as floor: 2.5 x\n"
        "    ----  gone takes at least 8 x as long as bus & co: not measured\n"
        "\n"
        "survival   all are finished\n"
        "\n"
        "  uploads finished\n"
        "    bare    0 of 200\n"
        "    bus   200 of 200\n"
        "    PASS  bus finishes every upload: 200 of 200\n"
    )


def test_the_plot_is_well_formed_and_shows_every_contender_within_the_picture():
    report = fake_report()
    root = ET.fromstring(as_svg(report))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    rows = [row for answer in report.results for table in answer.tables for row in table.rows]
    bars = [bar for bar in root.iter(f"{SVG}rect") if "bar" in bar.get("class", "")]
    assert {row.candidate for row in rows} <= set(texts)
    assert "K < 8" in texts
    assert len(bars) == len(rows)
    assert all(0 <= float(bar.get("x", "")) + float(bar.get("width", "")) <= 800 for bar in bars)
    assert [bar.get("class") for bar in bars] == ["bar ours" if row.ours else "bar" for row in rows]


def test_a_bar_ten_times_as_long_on_the_log_axis_is_one_decade_longer():
    rows = [Row(name, Spread(ns, ns, ns)) for name, ns in (("a", 50), ("b", 500), ("c", 5_000))]
    machine = Machine("3.11.7", 2, "Linux", {})
    root = ET.fromstring(as_svg(Report(machine, [Result("q", "p", [Table("t", "ns", rows)])])))
    widths = [float(bar.get("width", "")) for bar in root.iter(f"{SVG}rect") if bar.get("class") == "bar"]
    assert widths[2] - widths[1] == pytest.approx(widths[1] - widths[0], abs=0.2)


def test_a_missed_target_ends_well_unless_strict_is_asked_for(tmp_path):
    missing = bench_command(lambda: {"fake": fake_question(at_most=2.0)}, doc="Fake.")
    options = ["--rounds", "2", "--svg", str(tmp_path / "plot.svg")]
    assert CliRunner().invoke(missing, options).exit_code == 0
    assert CliRunner().invoke(missing, [*options, "--strict"]).exit_code == 1


def test_a_target_that_is_reached_satisfies_strict(tmp_path):
    reached = bench_command(lambda: {"fake": fake_question()}, doc="Fake.")
    options = ["--rounds", "2", "--strict", "--svg", str(tmp_path / "plot.svg")]
    assert CliRunner().invoke(reached, options).exit_code == 0


def test_the_table_goes_to_stdout_the_progress_to_stderr_and_json_tells_everything(tmp_path):
    asked = bench_command(lambda: {"fake": fake_question()}, doc="Fake.")
    svg, everything = tmp_path / "plot.svg", tmp_path / "bench.json"
    done = CliRunner().invoke(asked, ["--rounds", "2", "--svg", str(svg), "--json", str(everything)])
    assert done.exit_code == 0
    assert done.stderr == "fake ...\nfake: K < 8\n"
    assert "PASS  bus & co takes at most 3 x as long as floor: 2.5 x" in done.stdout
    assert f"plot: {svg.resolve()}" in done.stdout
    report = msgspec.json.decode(everything.read_bytes(), type=Report)
    assert report.results[0].tables[0].target_results[0].measured == 2.5
    assert as_svg(report) == svg.read_text(encoding="utf-8")


def refusing() -> dict[str, TimedSuite]:
    raise AssertionError("nothing is asked")


@pytest.mark.parametrize(
    ("questions", "arguments", "said"),
    [
        (lambda: {"dispatch": fake_question()}, ["dispach"], 'did you mean "dispatch"?'),
        (refusing, ["--svg", "no/such/folder/plot.svg"], "there is no folder"),
        (refusing, ["--rounds", "1"], "--rounds"),
    ],
)
def test_a_mistake_on_the_command_line_is_said_before_anything_is_measured(
    questions: Callable[[], dict[str, TimedSuite]], arguments: list[str], said: str
):
    done = CliRunner().invoke(bench_command(questions, doc="Fake."), arguments)
    assert done.exit_code == 2
    assert said in done.stderr


def test_the_help_of_bench_names_the_questions_that_ship():
    done = CliRunner().invoke(command, ["--help"])
    assert done.exit_code == 0
    assert "dispatch, imports, costs, journal, shapes, kills, growth" in " ".join(done.stdout.split())


def test_P1_bench_quick_dispatch_prints_a_verdict_for_every_k(tmp_path):
    program = "from evsys_bus.cli.bench import command; command()"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, "--quick", "dispatch"],
        check=False,
        capture_output=True,
        text=True,
        timeout=15,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for k in (1, 4, 8, 32):
        assert f"K = {k}, in multiples of bare loop" in done.stdout
    assert done.stdout.count("EventBus.publish takes at most") == 5
    assert not list(tmp_path.iterdir())


def test_the_suites_that_compare_with_heavier_peers_load():
    command = [sys.executable, "-m", "benchmarks", "upload-step"]  # a typing error, so nothing is measured
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert '"upload-steps"' in done.stderr
