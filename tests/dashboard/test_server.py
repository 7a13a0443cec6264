"""The dashboard's server over real sockets: receiving events, pages, charts, imports, the page's files, its end."""

import gzip
import json
import math
import random
import signal
import stat
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from evsys_adapters.dashboard.database import StoreError
from evsys_adapters.dashboard.server.columns import round_numbers
from evsys_adapters.dashboard.server.serve import DEFAULT_PORT, listen
from evsys_adapters.dashboard.state_file import find_dashboard, read_state
from evsys_bus.errors import DashboardError
from support.running_dashboard import TOKEN, Dashboard, Trainer, body_of, running_dashboard
from support.waiting import wait_until


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """For tests that only add experiments of their own."""
    with running_dashboard(tmp_path_factory.mktemp("dashboard")) as dashboard:
        yield dashboard


@pytest.fixture
def dashboard(tmp_path):
    with running_dashboard(tmp_path) as dashboard:
        yield dashboard


def experiment_id(dashboard, name):
    (row,) = [row for row in dashboard.get("/api/home")["experiments"] if row["name"] == name]
    return row["id"]


def values(numbers, reference):
    offset, length = reference
    return numbers[offset : offset + length].tolist()


def totals(answer):
    return answer["sequence"], answer["events"], answer["points"]


# Receiving events.


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_events_are_stored_once_however_often_they_are_sent(shared, encoding):
    trainer = Trainer(f"a-{encoding}", root=f"/runs/once-{encoding}")
    payloads = trainer.start() + trainer.steps(10)
    first = shared.ingest(trainer.stream, 0, payloads, encoding=encoding)
    assert (first.status, totals(first.json)) == (200, (12, 12, 10))
    assert first.json["store"] == shared.get("/health")["store"]
    again = shared.ingest(trainer.stream, 0, payloads, encoding=encoding)
    assert totals(again.json) == (12, 0, 0)
    overlapping = shared.ingest(trainer.stream, 10, payloads[10:] + trainer.steps(1), encoding=encoding)
    assert totals(overlapping.json) == (13, 1, 1)


def test_a_gap_is_refused_with_the_last_sequence_that_is_stored(shared):
    trainer = Trainer(root="/runs/gap")
    trainer.send(shared, trainer.start())
    answer = shared.ingest(trainer.stream, 7, trainer.steps(1))
    assert (answer.status, answer.code, answer.json["sequence"]) == (409, "behind", 2)
    assert "dash --import" in answer.json["error"]["fix"]


def test_a_body_of_many_events_is_applied_as_a_whole(shared):
    trainer = Trainer(root="/runs/many")
    assert totals(trainer.send(shared, trainer.start() + trainer.steps(7_000))) == (7_002, 7_002, 7_000)


def test_an_empty_body_answers_the_watermark(shared):
    trainer = Trainer(root="/runs/empty")
    trainer.send(shared, trainer.start())
    assert totals(shared.ingest(trainer.stream, 2, []).json) == (2, 0, 0)


def test_bodies_of_one_stream_at_once_leave_no_gap_and_no_duplicate(shared):
    trainer = Trainer(root="/runs/at-once")
    bodies = [(0, trainer.start() + trainer.steps(3_000)), (3_002, trainer.steps(3_000))]
    results = []
    threads = [
        threading.Thread(
            target=lambda after=after, body=body: results.append(shared.ingest(trainer.stream, after, body))
        )
        for after, body in [*bodies, *bodies]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for after, body in bodies:
        shared.ingest(trainer.stream, after, body)
    assert {answer.status for answer in results} <= {200, 409}
    header, _ = shared.charts(experiment_id(shared, "at-once"), {"metric": "train/loss"})
    assert header["charts"][0]["total"] == 6_000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x80",
        b"not msgpack at all",
        b"\xdd\xff\xff\xff\xff",
        b"\x92\xc0",
        b"\x91\xc0\xc0",
        b"\x91" * 1_000_000,
        b"\x91" + b"\x81" * 1_000_000,
    ],
    ids=lambda body: f"{body[:4].hex()}x{len(body)}",
)
def test_a_body_that_is_no_array_of_envelopes_is_a_400(shared, body):
    answer = shared.ingest("s", 0, [], body=body)
    assert (answer.status, answer.code) == (400, "msgpack")


def test_an_envelope_that_cannot_be_read_costs_no_other(shared):
    trainer = Trainer(root="/runs/unreadable")
    good = trainer.start() + trainer.steps(2)
    odd = [b"\xc0", b"\x93\x01\x02\x03", b"\x81\xa3seq\x05", b"\x91" * 400 + b"\xc0"]
    answer = shared.ingest(trainer.stream, 0, [*good, *odd])
    assert (answer.status, answer.json["events"]) == (200, 4)
    assert answer.json["unreadable"] >= 1
    assert answer.json["sequence"] >= 4


@pytest.mark.parametrize(
    "query",
    ["", "stream=", "stream=s&after=x", "stream=s&after=-1", f"stream={'x' * 1025}", f"stream=s&after={'9' * 30}"],
)
def test_a_query_that_names_no_stream_or_sequence_is_a_400(shared, query):
    answer = shared.request("POST", f"/api/ingest?{query}", body_of([]))
    assert answer.status == 400
    assert answer.json["error"]["fix"]


def test_compressed_bodies_are_checked(shared):
    packed = gzip.compress(body_of([]))
    send = {"Content_Encoding": "gzip"}
    assert shared.request("POST", "/api/ingest?stream=s", packed[:-5], **send).code == "encoding"
    assert shared.request("POST", "/api/ingest?stream=s", b"no gzip", **send).code == "encoding"
    answer = shared.request("POST", "/api/ingest?stream=s", packed, Content_Encoding="br")
    assert (answer.status, answer.code) == (415, "encoding")
    assert "gzip" in answer.json["error"]["fix"]


# Pages.


def test_home_and_experiment_show_what_was_sent(shared):
    trainer = Trainer("lr-1-s0", root="/runs/shown")
    trainer.send(shared, trainer.start() + trainer.steps(5))
    home = shared.get("/api/home")
    (row,) = [row for row in home["experiments"] if row["name"] == "shown"]
    page = shared.get(f"/api/experiments/{row['id']}")
    assert page["name"] == "shown"
    assert [run["step"] for run in page["runs"]] == [4]
    assert isinstance(page["frame"], int)
    assert page["frame"] >= home["frame"]


def test_what_does_not_exist_is_a_404(shared):
    for path in (
        "/api/experiments/none",
        "/api/none",
        "/api/import/none",
        "/api/dashboard/api/none/",
        "/assets/none.js",
    ):
        method = "POST" if "dashboard/api" in path else "GET"
        answer = shared.request(method, path, "{}" if method == "POST" else None)
        assert answer.status == 404, path
        assert "dashboard/api" in path or answer.json["error"]["message"]


# Charts.


def test_a_chart_has_the_points_of_a_run_as_they_were_logged(shared):
    trainer = Trainer(root="/runs/points")
    trainer.send(shared, trainer.start() + trainer.steps(100))
    header, numbers = shared.charts(experiment_id(shared, "points"), {"metric": "train/loss", "lines": "members"})
    (chart,) = header["charts"]
    assert (chart["metric"], chart["width"], chart["total"]) == ("train/loss", 1, 100)
    (line,) = chart["lines"]
    assert (line["kind"], line["points"], line["bad"], line["n"]) == ("member", 100, 0, 1)
    assert values(numbers, line["x"]) == list(range(100))
    assert values(numbers, line["mean"]) == [1000.0 - step for step in range(100)]


def test_a_band_is_the_mean_of_the_seeds_and_their_spread(shared):
    for seed, level in enumerate((1.0, 2.0, 6.0)):
        trainer = Trainer(f"arm__s{seed}", root="/runs/band", config={"seed": seed, "name": "arm"})
        trainer.send(shared, trainer.start() + trainer.steps(300, loss=lambda step, level=level: level + step))
    header, numbers = shared.charts(experiment_id(shared, "band"), {"metric": "train/loss", "buckets": 100})
    (chart,) = header["charts"]
    (line,) = chart["lines"]
    assert (line["kind"], line["n"], line["points"]) == ("band", 3, 900)
    width = chart["width"]
    assert width in {4, 8, 16, 32}
    x = np.array(values(numbers, line["x"]))[:-1]  # the last bucket has fewer steps
    assert x.tolist() == list(range(0, 300 - width + 1, width))[: len(x)]
    assert values(numbers, line["mean"])[:-1] == pytest.approx((x + (width - 1) / 2 + 3.0).tolist())
    assert values(numbers, line["sd"]) == pytest.approx([np.std([1, 2, 6], ddof=1)] * (len(x) + 1))
    assert "min" not in line


def test_seeds_that_have_come_to_different_steps_are_joined_by_step(shared):
    for seed, count in enumerate((10, 20)):
        trainer = Trainer(f"arm__s{seed}", root="/runs/uneven", config={"seed": seed, "name": "arm"})
        trainer.send(shared, trainer.start() + trainer.steps(count, loss=float(seed)))
    header, numbers = shared.charts(experiment_id(shared, "uneven"), {"metric": "train/loss", "lines": "both"})
    lines = header["charts"][0]["lines"]
    assert [line["kind"] for line in lines] == ["band", "member", "member"]
    assert values(numbers, lines[0]["x"]) == list(range(20))
    assert values(numbers, lines[0]["mean"]) == [0.5] * 10 + [1.0] * 10
    sd = values(numbers, lines[0]["sd"])
    assert sd[:10] == pytest.approx([np.std([0, 1], ddof=1)] * 10)
    assert all(math.isnan(each) for each in sd[10:])


def test_values_that_are_not_finite_are_gaps_and_counted(shared):
    trainer = Trainer(root="/runs/bad")
    trainer.send(shared, trainer.start() + trainer.steps(9, loss=lambda step: [1.0, math.nan, math.inf][step % 3]))
    header, numbers = shared.charts(experiment_id(shared, "bad"), {"metric": "train/loss"})
    (line,) = header["charts"][0]["lines"]
    assert (line["points"], line["bad"]) == (3, 6)
    assert values(numbers, line["badAt"]) == [1, 2, 4, 5, 7, 8]
    assert [math.isnan(each) for each in values(numbers, line["mean"])] == [False, True, True] * 3


def test_a_zoomed_chart_has_finer_buckets(shared):
    trainer = Trainer(root="/runs/zoom")
    trainer.send(shared, trainer.start() + trainer.steps(4_000))
    queries = [
        {"metric": "train/loss", "buckets": 100},
        {"metric": "train/loss", "from": 1000, "to": 1050, "buckets": 100},
    ]
    header, numbers = shared.charts(experiment_id(shared, "zoom"), *queries)
    far, near = header["charts"]
    assert far["width"] >= 32
    assert near["width"] == 1
    assert values(numbers, near["lines"][0]["x"]) == list(range(1000, 1051))


def test_the_last_bucket_of_a_run_under_way_waits_for_a_part_of_its_points(shared):
    trainer = Trainer(root="/runs/edge")
    query = {"metric": "train/loss", "buckets": 40}
    trainer.send(shared, trainer.start() + trainer.steps(1_025))
    id_ = experiment_id(shared, "edge")
    header, numbers = shared.charts(id_, query)
    width = header["charts"][0]["width"]
    assert 32 <= width <= 256
    assert values(numbers, header["charts"][0]["lines"][0]["x"])[-1] == 1024 - width
    trainer.send(shared, trainer.steps(width // 4))
    header, numbers = shared.charts(id_, query)
    assert values(numbers, header["charts"][0]["lines"][0]["x"])[-1] == 1024


def test_the_last_bucket_of_a_finished_run_is_shown(shared):
    trainer = Trainer(root="/runs/finished")
    trainer.send(shared, trainer.start() + trainer.steps(1_025) + trainer.end())
    header, numbers = shared.charts(experiment_id(shared, "finished"), {"metric": "train/loss", "buckets": 40})
    assert values(numbers, header["charts"][0]["lines"][0]["x"])[-1] == 1024


@pytest.mark.parametrize("axis", ["relative", "wall"])
def test_a_chart_over_time_has_the_steps_too(shared, axis):
    trainer = Trainer(root=f"/runs/time-{axis}")
    trainer.send(shared, trainer.start() + trainer.steps(10))
    query = {"metric": "train/loss", "x": axis, "lines": "members"}
    header, numbers = shared.charts(experiment_id(shared, f"time-{axis}"), query)
    (line,) = header["charts"][0]["lines"]
    assert values(numbers, line["steps"]) == list(range(10))
    seconds = values(numbers, line["x"])
    assert np.diff(seconds).tolist() == [1.0] * 9
    assert seconds[0] == (0.0 if axis == "relative" else trainer.started + 3.0)


def test_chosen_runs_are_drawn_and_a_metric_that_none_has_is_empty(shared):
    for name in ("a-s0", "b-s0"):
        trainer = Trainer(name, root="/runs/chosen")
        trainer.send(shared, trainer.start() + trainer.steps(2))
    id_ = experiment_id(shared, "chosen")
    runs = [run["id"] for run in shared.get(f"/api/experiments/{id_}")["runs"]]
    queries = [
        {"metric": "train/loss", "lines": "members"},
        {"metric": "train/loss", "lines": "members", "runs": runs[:1]},
        {"metric": "none"},
    ]
    header, _ = shared.charts(id_, *queries)
    assert [len(chart["lines"]) for chart in header["charts"]] == [2, 1, 0]


@pytest.mark.parametrize(
    "query",
    [
        {},
        [],
        {"experiment": 1, "charts": []},
        {"experiment": "x", "charts": [{"metric": "m", "buckets": 0}]},
        "{",
        "[" * 9999,
    ],
    ids=str,
)
def test_a_query_that_is_none_is_a_400(shared, query):
    body = query if isinstance(query, str) else json.dumps(query)
    assert shared.request("POST", "/api/charts", body).status == 400


def test_charts_and_pages_are_compressed_for_clients_that_take_it(shared):
    trainer = Trainer(root="/runs/compressed")
    trainer.send(shared, trainer.start() + trainer.steps(4_000, loss=lambda _: random.random()))
    id_ = experiment_id(shared, "compressed")
    query = json.dumps({"experiment": id_, "charts": [{"metric": "train/loss"}]})
    plain = shared.request("POST", "/api/charts", query)
    packed = shared.request("POST", "/api/charts", query, Accept_Encoding="gzip, br")
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == plain.body
    assert len(packed.body) < 0.7 * len(plain.body)
    page = shared.request("GET", f"/api/experiments/{id_}", Accept_Encoding="gzip")
    assert json.loads(gzip.decompress(page.body))["id"] == id_


def test_means_are_rounded_to_what_a_chart_can_show_and_no_further():
    numbers = np.array([1 / 3, -1e-300, 1e300, 0.0, math.nan, math.inf, -math.inf, 5e-324, 123456789.123])
    rounded = round_numbers(numbers)
    assert np.array_equal(np.isnan(rounded), np.isnan(numbers))
    finite = np.isfinite(numbers) & (np.abs(numbers) > 1e-307)
    assert np.all(np.abs(rounded[finite] / numbers[finite] - 1) < 1e-7)
    assert rounded[5:7].tolist() == [math.inf, -math.inf]
    assert rounded[3] == 0.0


# The page's files.


def test_the_page_is_served_for_its_own_urls_and_assets_are_kept_by_browsers(tmp_path):
    assets = tmp_path / "_web" / "assets"
    assets.mkdir(parents=True)
    (tmp_path / "_web" / "index.html").write_text("<!doctype html>" + "x" * 2000)
    (assets / "app-1a2b.js").write_text("1;" * 2000)
    (tmp_path / "secret").write_text("secret")
    with running_dashboard(tmp_path) as dashboard:
        for path in ("/", "/e/some-id", "/e/some-id/metrics", "/c?r=1"):
            answer = dashboard.request("GET", path, token=None)
            assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
            assert answer.headers["cache-control"] == "no-cache"
        assert dashboard.request("GET", "/health", token=None, Accept="text/html,*/*").body.startswith(b"<!doctype")
        assert dashboard.request("GET", "/health", token=None, Accept="*/*").json["protocol"] == 1
        script = dashboard.request("GET", "/assets/app-1a2b.js", token=None, Accept_Encoding="gzip, br")
        assert gzip.decompress(script.body) == b"1;" * 2000
        assert script.headers["content-type"] == "text/javascript; charset=utf-8"
        assert "immutable" in script.headers["cache-control"]
        for path in ("..%2f..%2fsecret", "%2e%2e/secret", "../../secret", "..", ".hidden", "a/b", "%00"):
            answer = dashboard.request("GET", f"/assets/{path}", token=None)
            assert b"secret" not in answer.body, path
            assert answer.status == 404 or answer.body.startswith(b"<!doctype"), path


def test_a_page_that_was_not_built_says_how_to_build_it(tmp_path):
    with running_dashboard(tmp_path) as dashboard:
        answer = dashboard.request("GET", "/", token=None)
        assert (answer.status, answer.headers["content-type"]) == (503, "text/plain; charset=utf-8")
        assert b"uv sync --reinstall-package evsys-bus" in answer.body
        (tmp_path / "_web").mkdir()
        (tmp_path / "_web" / "not-built.txt").write_text("npm is not reachable")
        assert b"npm is not reachable" in dashboard.request("GET", "/", token=None).body


# Life.


def test_the_state_file_leads_to_it_and_goes_with_it(tmp_path):
    path = tmp_path / "state" / "dashboard.json"
    with running_dashboard(tmp_path) as dashboard:
        assert read_state(path) == dashboard.state
        assert find_dashboard(path) == (dashboard.state.url, TOKEN)
        assert dashboard.state.store == str(tmp_path / "dashboard.sqlite")
    assert not path.exists()


def test_what_was_acknowledged_is_there_after_a_restart(tmp_path):
    trainer = Trainer(root="/runs/restart")
    with running_dashboard(tmp_path) as dashboard:
        trainer.send(dashboard, trainer.start() + trainer.steps(50))
        store = dashboard.get("/health")["store"]
    with running_dashboard(tmp_path) as dashboard:
        assert dashboard.get("/health")["store"] == store
        assert totals(trainer.send(dashboard, trainer.steps(1))) == (53, 1, 1)


def test_it_ends_at_a_signal_also_with_open_views_and_what_it_acknowledged_survives_a_kill(tmp_path):
    program = f"""
import sys
from pathlib import Path
from evsys_adapters.dashboard.server import DashboardServer
from evsys_adapters.dashboard.server.app import DashboardSettings

folder = Path(sys.argv[1])
DashboardServer(folder / "dashboard.sqlite", host="127.0.0.1", port=0, settings=DashboardSettings(token={TOKEN!r}),
    state=folder / "dashboard.json", on_ready=lambda state: print("ready", flush=True)).run()
"""
    path = tmp_path / "dashboard.json"
    trainer = Trainer(root="/runs/killed")
    stored = 0
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        with process:
            assert process.stdout.readline() == "ready\n"
            dashboard = Dashboard(read_state(path), None)
            with dashboard.live():
                stored += trainer.send(dashboard, trainer.steps(200))["points"]
                start = time.monotonic()
                process.send_signal(number)
                code = process.wait(10)
            assert time.monotonic() - start < 5.0
            assert code == (-number if number == signal.SIGKILL else 0)
            assert path.exists() == (number == signal.SIGKILL)
    with running_dashboard(tmp_path) as dashboard:
        header, _ = dashboard.charts(experiment_id(dashboard, "killed"), {"metric": "train/loss"})
        assert header["charts"][0]["total"] == stored == 400


def test_nobody_else_can_read_the_database(tmp_path):
    folder = tmp_path / "data"
    path = folder / "dashboard.sqlite"
    for _ in range(2):
        folder.mkdir(exist_ok=True)
        with running_dashboard(folder) as dashboard:
            trainer = Trainer(root="/runs/private")
            trainer.send(dashboard, trainer.start() + trainer.steps(3))
            modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in folder.glob("dashboard.sqlite*")}
            assert len(modes) == 4  # with the lock, the WAL and its index
            assert all(mode & 0o077 == 0 for name, mode in modes.items() if not name.endswith(".lock")), modes
        path.chmod(0o644)  # as an earlier version made it


def test_what_is_old_goes_to_the_trash_and_what_is_new_stays(tmp_path):
    with running_dashboard(tmp_path) as dashboard:
        for name, age in [("old", 90 * 86_400), ("new", 0)]:
            trainer = Trainer(root=f"/runs/{name}")
            trainer.started -= age
            trainer.send(dashboard, trainer.start() + trainer.steps(3) + trainer.end())
    with running_dashboard(tmp_path, settings={"keep_days": 60.0, "retention_seconds": 0.0}) as dashboard:
        wait_until(lambda: [row["name"] for row in dashboard.get("/api/home")["experiments"]] == ["new"])


def test_a_second_dashboard_of_one_database_is_refused(tmp_path):
    with running_dashboard(tmp_path), pytest.raises(StoreError, match="open in another"), running_dashboard(tmp_path):
        pass


def test_without_viewers_and_events_it_ends(tmp_path):
    with running_dashboard(tmp_path, idle_seconds=0.6) as dashboard:
        with dashboard.live():
            trainer = Trainer()
            wait_until(lambda: not trainer.send(dashboard, trainer.steps(1)) or trainer.step == 20)
            assert dashboard.get("/health")
        path = tmp_path / "state" / "dashboard.json"
        wait_until(lambda: not path.exists())


def test_a_taken_port_is_refused_if_it_was_given_and_passed_over_if_not():
    with listen("127.0.0.1", 0) as taken:
        with pytest.raises(DashboardError, match="in use"):
            listen("127.0.0.1", taken.getsockname()[1])
        with listen("127.0.0.1", None) as first, listen("127.0.0.1", None) as second:
            ports = [each.getsockname()[1] for each in (first, second)]
            assert ports[0] >= DEFAULT_PORT
            assert ports[1] > ports[0]


def test_a_journal_of_this_machine_is_imported(dashboard, tmp_path):
    from evsys_bus import EventBus, LogContext, LoopState, StepEnd

    root = tmp_path / "run"
    ctx = LogContext(root, run_key="a-s0")
    with EventBus([], journal=root / "journal") as bus:
        for step in range(30):
            bus.publish(StepEnd(LoopState(step, 30, ctx.run_dir, ctx=ctx), step, metrics={"loss": 1.0}))
    answer = dashboard.post("/api/import", {"journal": str(root / "journal")})
    assert answer.status == 202
    progress = f"/api/import/{answer.json['import']}"
    wait_until(lambda: dashboard.get(progress)["state"] not in {"waiting", "running"})
    done = dashboard.get(progress)
    assert (done["state"], done["error"]) == ("completed", None)
    assert done["events"] == done["of"] >= 30
    assert len(dashboard.get("/api/home")["experiments"]) == 1
    again = dashboard.post("/api/import", {"journal": str(root / "journal")}).json["import"]
    wait_until(lambda: dashboard.get(f"/api/import/{again}")["state"] == "completed")
    assert dashboard.get(f"/api/import/{again}")["events"] == 0


@pytest.mark.parametrize("journal", [None, 1, "", "relative", "/no/such/place", "/etc/passwd", "\0"])
def test_an_import_of_no_directory_is_a_400(shared, journal):
    assert shared.post("/api/import", {"journal": journal}).status == 400


def test_an_import_of_a_directory_without_journal_fails_with_the_reason(shared, tmp_path):
    id_ = shared.post("/api/import", {"journal": str(tmp_path)}).json["import"]
    wait_until(lambda: shared.get(f"/api/import/{id_}")["state"] == "failed")
    assert "no journal" in shared.get(f"/api/import/{id_}")["error"]


def test_the_description_has_every_route_of_the_api(shared):
    described = shared.get("/api/openapi.json")
    assert described["openapi"].startswith("3.1")
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            name = path.replace("{id}", "none")
            answer = shared.request(method.upper(), name, "{}" if method == "post" else None)
            assert answer.status == 200 or answer.code != "route", path
            assert str(answer.status) in operation["responses"], (path, answer.status)


# The trash.


def names(dashboard):
    return [row["name"] for row in dashboard.get("/api/home")["experiments"]]


def test_an_experiment_goes_to_the_trash_comes_back_and_is_removed_only_from_there(dashboard):
    trainer = Trainer(root="/runs/old")
    trainer.send(dashboard, [*trainer.start(), *trainer.steps(3)])
    [row] = dashboard.get("/api/home")["experiments"]
    route = f"/api/experiments/{row['id']}"
    assert dashboard.post(f"{route}/purge", {}).status == 409
    assert dashboard.post(f"{route}/trash", {}).json["id"] == row["id"]
    assert names(dashboard) == []
    assert dashboard.request("GET", route).status == 404
    trash = dashboard.get("/api/trash")
    assert [(each["name"], each["runs"]) for each in trash["experiments"]] == [(row["name"], 1)]
    assert trash["days"] == 30
    hidden = trash["experiments"][0]["hidden"]
    assert dashboard.post(f"{route}/trash", {}).json["hidden"] == hidden  # a second time changes nothing
    assert dashboard.post(f"{route}/restore", {}).json["hidden"] is None
    assert names(dashboard) == [row["name"]]
    dashboard.post(f"{route}/trash", {})
    assert dashboard.post(f"{route}/purge", {}).json == {"experiments": 1, "runs": 1}
    assert dashboard.post(f"{route}/restore", {}).status == 404
    assert dashboard.get("/api/trash")["experiments"] == []


def test_a_run_goes_to_the_trash_alone(dashboard):
    for name in ("a-s0", "b-s0"):
        trainer = Trainer(name, root="/runs/lr")
        trainer.send(dashboard, [*trainer.start(), *trainer.steps(3)])
    [row] = dashboard.get("/api/home")["experiments"]
    page = dashboard.get(f"/api/experiments/{row['id']}")
    run = page["runs"][0]["id"]
    assert dashboard.post(f"/api/runs/{run}/trash", {}).status == 200
    assert [each["id"] for each in dashboard.get(f"/api/experiments/{row['id']}")["runs"]] == [page["runs"][1]["id"]]
    assert [each["id"] for each in dashboard.get("/api/trash")["runs"]] == [run]
    assert dashboard.post(f"/api/experiments/{run}/trash", {}).status == 404
    assert dashboard.post(f"/api/runs/{run}/purge", {}).json == {"experiments": 0, "runs": 1}


def test_the_trash_needs_the_token_and_the_own_origin(dashboard):
    assert dashboard.request("POST", "/api/experiments/x/trash", "{}", token=None).status == 401
    assert dashboard.request("POST", "/api/experiments/x/trash", "{}", Origin="http://elsewhere").status == 403
    assert dashboard.request("GET", "/api/experiments/x/trash").status in {404, 405}
