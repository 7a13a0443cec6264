"""Live views over real WebSockets: one frame for all viewers, resumed by number, absolute values, bounded."""

import base64
import contextlib
import json
import random
import socket
import time
from urllib.parse import quote

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from evsys_adapters.dashboard.server.columns import decode_columns
from evsys_adapters.dashboard.server.live import LiveLimits
from evsys_adapters.dashboard.server.protocol import ConnectionLimits
from support.running_dashboard import Trainer, running_dashboard
from support.waiting import wait_until

FAST = LiveLimits(chart_seconds=0.01, page_seconds=0.01, max_share=1.0)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with running_dashboard(tmp_path_factory.mktemp("live"), settings={"live": FAST}) as dashboard:
        yield dashboard


def started(dashboard, name, count=10, **metrics):
    """A run with some steps; returns its trainer, its experiment's id and the page's frame number."""
    trainer = Trainer("arm__s0", root=f"/runs/{name}", config={"seed": 0, "name": "arm"})
    trainer.send(dashboard, trainer.start() + trainer.steps(count, **metrics))
    home = dashboard.get("/api/home")
    (id_,) = [row["id"] for row in home["experiments"] if row["name"] == name]
    return trainer, id_, home["frame"]


def subscribe(live, *topics):
    live.send(json.dumps({"subscribe": [{"topic": topic, "frame": frame} for topic, frame in topics]}))


def receive(live, timeout=5.0):
    header, numbers = decode_columns(live.recv(timeout=timeout))
    return header, numbers


def receive_until(live, condition, timeout=5.0):
    end = time.monotonic() + timeout
    while True:
        header, numbers = receive(live, end - time.monotonic())
        if condition(header, numbers):
            return header, numbers


def values(numbers, reference):
    offset, length = reference
    return numbers[offset : offset + length].tolist()


def chart_topic(id_, width=1, lines="band", metric="train/loss"):
    return f"c/{id_}/{lines}/{width}/{metric}"


def test_a_chart_receives_the_changed_buckets_with_absolute_values(shared):
    trainer, id_, _ = started(shared, "changed")
    chart, _ = shared.charts(id_, {"metric": "train/loss"})
    with shared.live() as live:
        topic = chart_topic(id_, chart["charts"][0]["width"])
        subscribe(live, (topic, chart["frame"]))
        trainer.send(shared, trainer.steps(2))
        header, numbers = receive(live)
        assert (header["topic"], header["kind"]) == (topic, "data")
        assert header["frame"] > chart["frame"]
        (line,) = header["chart"]["lines"]
        x = values(numbers, line["x"])
        assert x[-2:] == [10, 11]
        assert values(numbers, line["mean"]) == [1000.0 - step for step in x]


def test_home_receives_the_rows_that_changed_and_an_experiment_its_page(shared):
    first, first_id, _ = started(shared, "rows-1")
    *_, frame = started(shared, "rows-2")
    with shared.live() as live:
        subscribe(live, ("home", frame))
        first.send(shared, first.steps(1))
        header, _ = receive_until(live, lambda header, _: header["topic"] == "home")
        assert [row["id"] for row in header["home"]["experiments"]] == [first_id]  # and not what was read before
        first.send(shared, first.steps(1))
        header, _ = receive(live)
        assert [row["id"] for row in header["home"]["experiments"]] == [first_id]
        subscribe(live, (f"e/{first_id}", None))
        header, _ = receive(live)
        assert header["experiment"]["runs"][0]["step"] == 11
        assert header["experiment"]["metrics"]
        first.send(shared, first.steps(1))
        header, _ = receive(live)
        assert header["experiment"]["runs"][0]["step"] == 12
        assert "metrics" not in header["experiment"]
        first.send(shared, first.steps(1, new=1.0))
        header, _ = receive(live)
        assert "train/new" in {each["name"] for each in header["experiment"]["metrics"]}


def test_the_first_frames_have_only_what_differs_from_the_pages_that_were_read(shared):
    trainer, id_, _ = started(shared, "read-before")
    home, page = shared.get("/api/home"), shared.get(f"/api/experiments/{id_}")
    with shared.live() as live:
        subscribe(live, ("home", home["frame"]), (f"e/{id_}", page["frame"]))
        with pytest.raises(TimeoutError):
            live.recv(timeout=0.3)
        trainer.send(shared, trainer.steps(1))
        frames = {header["topic"]: header for header, _ in (receive(live), receive(live))}
        assert [row["id"] for row in frames["home"]["home"]["experiments"]] == [id_]
        assert "metrics" not in frames[f"e/{id_}"]["experiment"]


def test_what_changed_between_reading_a_page_and_subscribing_is_sent(shared):
    trainer, id_, _ = started(shared, "read-and-changed")
    page = shared.get(f"/api/experiments/{id_}")
    trainer.send(shared, trainer.steps(5))
    with shared.live() as live:
        subscribe(live, (f"e/{id_}", page["frame"]))
        header, _ = receive_until(live, lambda header, _: header["topic"] == f"e/{id_}")
        assert [run["step"] for run in header["experiment"]["runs"]] == [14]
        assert "metrics" not in header["experiment"]


def test_what_changed_between_reading_a_chart_and_subscribing_is_sent(shared):
    trainer, id_, _ = started(shared, "between")
    chart, _ = shared.charts(id_, {"metric": "train/loss"})
    trainer.send(shared, trainer.steps(3))
    with shared.live() as live:
        subscribe(live, (chart_topic(id_), chart["frame"]))
        header, numbers = receive(live)
        assert header["kind"] == "data"
        assert values(numbers, header["chart"]["lines"][0]["x"])[-3:] == [10, 11, 12]


def test_a_client_that_was_away_gets_the_frames_that_it_lacks(shared):
    trainer, id_, _ = started(shared, "away")
    chart, _ = shared.charts(id_, {"metric": "train/loss"})
    topic = chart_topic(id_)
    with shared.live() as other:
        subscribe(other, (topic, chart["frame"]))
        with shared.live() as live:
            subscribe(live, (topic, chart["frame"]))
            trainer.send(shared, trainer.steps(1))
            last, _ = receive(live)
        for _ in range(3):
            trainer.send(shared, trainer.steps(1))
            receive(other)
        with shared.live() as live:
            subscribe(live, (topic, last["frame"]))
            seen = set()
            receive_until(
                live,
                lambda header, numbers: seen.update(values(numbers, header["chart"]["lines"][0]["x"])) or 13 in seen,
            )
            assert {11, 12, 13} <= seen


@pytest.mark.parametrize("frame", [0, 1, 2**53 - 1])
def test_a_frame_number_of_another_time_is_answered_by_a_reset(shared, frame):
    _, id_, _ = started(shared, f"reset-{frame}")
    with shared.live() as live:
        subscribe(live, (chart_topic(id_), frame))
        header, _ = receive(live)
        assert (header["kind"], header["topic"]) == ("reset", chart_topic(id_))
        assert header["frame"] > 1


def test_more_frames_than_the_ring_has_are_answered_by_a_reset(tmp_path):
    limits = LiveLimits(chart_seconds=0.001, page_seconds=0.001, max_share=1.0, ring=2, max_history=4)
    with running_dashboard(tmp_path, settings={"live": limits}) as dashboard:
        trainer, id_, _ = started(dashboard, "ring")
        chart, _ = dashboard.charts(id_, {"metric": "train/loss"})
        with dashboard.live() as other:
            subscribe(other, (chart_topic(id_), chart["frame"]))
            for _ in range(8):
                trainer.send(dashboard, trainer.steps(1))
                receive(other)
            with dashboard.live() as live:
                subscribe(live, (chart_topic(id_), chart["frame"]))
                assert receive(live)[0]["kind"] == "reset"


def test_large_frames_leave_the_ring_sooner(tmp_path):
    limits = LiveLimits(chart_seconds=0.001, page_seconds=0.001, max_share=1.0, ring_bytes=1, max_history=4)
    with running_dashboard(tmp_path, settings={"live": limits}) as dashboard:
        trainer, id_, _ = started(dashboard, "bytes")
        chart, _ = dashboard.charts(id_, {"metric": "train/loss"})
        with dashboard.live() as other:
            subscribe(other, (chart_topic(id_), chart["frame"]))
            numbers = []
            for _ in range(6):
                trainer.send(dashboard, trainer.steps(1))
                numbers.append(receive(other)[0]["frame"])
            with dashboard.live() as live:
                subscribe(live, (chart_topic(id_), numbers[0]))
                assert receive(live)[0]["kind"] == "reset"
            with dashboard.live() as live:
                subscribe(live, (chart_topic(id_), numbers[-2]))
                assert receive(live)[0]["frame"] == numbers[-1]


def test_what_a_client_of_the_hosted_service_logs_is_live_too(shared):
    def call(op, **args):
        answer = shared.post("/api/dashboard/api/sdk/data/", {"op": op, "args": args})
        assert answer.status == 200, answer.body
        return answer.json["result"]

    experiment = call("create_experiment", experiment_name="hosted")["id"]
    run = call("create_run", experiment_id=experiment, run_config={"name": "arm0"}, status="running")["id"]
    call("log_metrics", run_id=run, step=0, metrics={"loss": 0.5}, split="train")
    (id_,) = [row["id"] for row in shared.get("/api/home")["experiments"] if row["name"] == "hosted"]
    (metric,) = [each["name"] for each in shared.get(f"/api/experiments/{id_}")["metrics"]]
    chart, _ = shared.charts(id_, {"metric": metric})
    with shared.live() as live:
        subscribe(live, (chart_topic(id_, metric=metric), chart["frame"]))
        call("log_metrics", run_id=run, step=1, metrics={"loss": 0.25}, split="train")
        header, numbers = receive(live)
        (line,) = header["chart"]["lines"]
        assert values(numbers, line["mean"])[-1] == 0.25


def test_a_jump_over_many_buckets_has_the_chart_read_again(shared):
    trainer, id_, _ = started(shared, "jump")
    chart, _ = shared.charts(id_, {"metric": "train/loss"})
    with shared.live() as live:
        subscribe(live, (chart_topic(id_), chart["frame"]))
        trainer.send(shared, trainer.steps(500))
        assert receive(live)[0]["kind"] == "refetch"


def test_steps_that_a_resumed_run_removes_have_the_chart_read_again(shared):
    trainer, id_, _ = started(shared, "resumed", 40)
    chart, _ = shared.charts(id_, {"metric": "train/loss"})
    with shared.live() as live:
        subscribe(live, (chart_topic(id_), chart["frame"]))
        trainer.send(shared, trainer.steps(1))
        assert receive(live)[0]["kind"] == "data"
        trainer.send(shared, trainer.resume(20) + trainer.steps(1))
        assert receive(live)[0]["kind"] == "refetch"


def test_a_frame_is_computed_once_for_all_viewers(shared):
    trainer, id_, _ = started(shared, "viewers")
    chart, _ = shared.charts(id_, {"metric": "train/loss"})
    with contextlib.ExitStack() as stack:
        viewers = [stack.enter_context(shared.live()) for _ in range(10)]
        for live in viewers:
            subscribe(live, (chart_topic(id_), chart["frame"]))
        trainer.send(shared, trainer.steps(1))
        assert len({live.recv(timeout=5) for live in viewers}) == 1


def test_a_subscription_replaces_the_former_one(shared):
    first, first_id, _ = started(shared, "replaced-1")
    second, second_id, _ = started(shared, "replaced-2")
    with shared.live() as live:
        subscribe(live, (chart_topic(first_id), None))
        subscribe(live, (chart_topic(second_id), None))
        wait_until(lambda: True)
        first.send(shared, first.steps(1))
        second.send(shared, second.steps(1))
        assert receive(live)[0]["topic"] == chart_topic(second_id)


def test_nothing_is_sent_while_nothing_changes(tmp_path):
    limits = LiveLimits(chart_seconds=0.01, page_seconds=0.01, refresh_seconds=0.1)
    with running_dashboard(tmp_path, settings={"live": limits}) as dashboard:
        _, id_, frame = started(dashboard, "quiet")
        with dashboard.live() as live:
            subscribe(live, ("home", frame), (f"e/{id_}", frame), (chart_topic(id_), frame))
            received = 0
            end = time.monotonic() + 1.0
            while (left := end - time.monotonic()) > 0:
                try:
                    received += len(live.recv(timeout=left))
                except TimeoutError:
                    break
            # The pages once: when they are refreshed for the first time.
            assert received < 8_000
            with pytest.raises(TimeoutError):
                live.recv(timeout=0.5)


def test_an_experiment_that_does_not_exist_has_no_frames_but_keeps_the_connection(shared):
    trainer, id_, frame = started(shared, "exists")
    with shared.live() as live:
        subscribe(live, ("e/none", None), (chart_topic("none"), None), (chart_topic(id_), frame))
        assert receive(live)[0]["kind"] == "refetch"
        trainer.send(shared, trainer.steps(1))
        assert receive(live)[0]["topic"] == chart_topic(id_)


@pytest.mark.parametrize(
    "message",
    [
        "",
        "{",
        "[]",
        "[" * 50_000,
        '{"subscribe": 1}',
        '{"subscribe": [{"topic": 1}]}',
        '{"subscribe": [{"topic": "other"}]}',
        '{"subscribe": [{"topic": "e/"}]}',
        '{"subscribe": [{"topic": "c/id/band/0/m"}]}',
        '{"subscribe": [{"topic": "c/id/band/x/m"}]}',
        '{"subscribe": [{"topic": "c/id/none/1/m"}]}',
        '{"subscribe": [{"topic": "c/id/band/1/"}]}',
        json.dumps({"subscribe": [{"topic": f"e/{n}"} for n in range(300)]}),
        json.dumps({"subscribe": [{"topic": "c/id/band/1/" + "m" * 9000}]}),
        b"\x00\x01",
    ],
    ids=lambda message: str(message[:40]),
)
def test_a_message_that_is_no_subscription_closes_the_connection_with_a_reason(shared, message):
    with shared.live() as live:
        live.send(message)
        with pytest.raises(ConnectionClosed) as closed:
            live.recv(timeout=5)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008
        assert closed.value.rcvd.reason
    assert shared.get("/health")


def test_a_client_more_than_allowed_is_refused_and_a_leaving_one_makes_room(tmp_path):
    with running_dashboard(tmp_path, settings={"live": LiveLimits(max_clients=2)}) as dashboard:
        with dashboard.live(), dashboard.live():
            with pytest.raises(InvalidStatus) as refused, dashboard.live():
                pass
            assert refused.value.response.status_code == 503
            assert json.loads(refused.value.response.body)["error"]["code"] == "clients"

        def connects():
            try:
                with dashboard.live():
                    pass
            except InvalidStatus:
                return False
            return True

        wait_until(connects)


def test_a_client_that_does_not_read_is_cut_and_holds_up_no_other(tmp_path):
    limits = ConnectionLimits(write_seconds=0.3, close_seconds=0.3)
    with running_dashboard(tmp_path, settings={"live": FAST}, limits=limits) as dashboard:
        trainer, id_, _ = started(dashboard, "stuck", 40)
        names = {f"metric-{n}-{'x' * 200}": float for n in range(2_000)}
        trainer.send(dashboard, trainer.steps(1, **dict.fromkeys(names, 1.0)))
        with dashboard.live(max_size=None) as reader, socket.socket() as stuck:
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stuck.connect(("127.0.0.1", dashboard.port))
            stuck.sendall(handshake(dashboard, "token." + dashboard.state.token))
            assert stuck.recv(12).startswith(b"HTTP/1.1 101")
            stuck.sendall(text_frame({"subscribe": [{"topic": f"e/{id_}"}]}))
            subscribe(reader, (chart_topic(id_), None))
            for n in range(30):
                trainer.send(dashboard, trainer.steps(1, **{f"new-{n}": 1.0}))
                assert receive(reader)[0]["topic"] == chart_topic(id_)
            wait_until(lambda: dashboard.server.open_connections == 1)
            trainer.send(dashboard, trainer.steps(1))
            assert receive(reader)[0]["topic"] == chart_topic(id_)


def test_polling_gives_the_same_frames(shared):
    trainer, id_, _ = started(shared, "polled")
    chart, _ = shared.charts(id_, {"metric": "train/loss"})
    topic, frame = chart_topic(id_), chart["frame"]

    def poll(*subscriptions):
        topics = json.dumps([{"topic": topic, "frame": frame} for topic, frame in subscriptions])
        answer = shared.request("GET", f"/api/live?topics={quote(topics)}")
        return answer.status, [decode_columns(base64.b64decode(each)) for each in answer.json] if answer.body else []

    assert poll((topic, frame)) == (204, [])
    trainer.send(shared, trainer.steps(2))
    status, frames = poll((topic, frame))
    assert status == 200
    header, numbers = frames[-1]
    assert values(numbers, header["chart"]["lines"][0]["x"])[-2:] == [10, 11]
    assert poll((topic, header["frame"])) == (204, [])
    trainer.send(shared, trainer.steps(1))
    wait_until(lambda: poll((topic, header["frame"]))[0] == 200)
    assert poll((topic, 0))[1][0][0]["kind"] == "reset"
    status, frames = poll(("home", None), (f"e/{id_}", None))
    assert [header["topic"] for header, _ in frames] == ["home", f"e/{id_}"]


@pytest.mark.parametrize("topics", ["", "{", "1", '[{"topic": 1}]', '[{"topic": "other"}]'])
def test_polling_of_what_is_no_topic_is_a_400(shared, topics):
    assert shared.request("GET", f"/api/live?topics={quote(topics)}").status == 400


def handshake(dashboard, token):
    return (
        f"GET /api/live HTTP/1.1\r\nHost: 127.0.0.1:{dashboard.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Protocol: evsys, {token}\r\n\r\n"
    ).encode()


def text_frame(message):
    payload = json.dumps(message).encode()
    assert len(payload) < 126
    return bytes([0x81, 0x80 | len(payload), 0, 0, 0, 0]) + payload


class DrawnChart:
    """A page that draws one chart: it reads it, applies frames, and reads it anew when a frame says so."""

    def __init__(self, dashboard, id_):
        self.dashboard, self.id, self.topic = dashboard, id_, chart_topic(id_, lines="members")
        self.frame, self.points = self.read()

    def read(self):
        query = {"metric": "train/loss", "buckets": 5000, "lines": "members"}
        header, numbers = self.dashboard.charts(self.id, query)
        assert header["charts"][0]["width"] == 1
        return header["frame"], self.points_of(header["charts"][0], numbers)

    def points_of(self, chart, numbers):
        return {
            (line["run"], x): value
            for line in chart["lines"]
            for x, value in zip(values(numbers, line["x"]), values(numbers, line["mean"]), strict=True)
        }

    def receive(self, live, timeout):
        try:
            header, numbers = receive(live, timeout)
        except TimeoutError:
            return
        if header["kind"] == "data":
            self.frame = header["frame"]
            self.points.update(self.points_of(header["chart"], numbers))
        else:
            self.frame, self.points = self.read()


def send_something(dashboard, choose, trainer):
    if choose.random() < 0.2:
        trainer.send(dashboard, trainer.resume(choose.randrange(max(1, trainer.step))))
    else:
        count = choose.choice([1, 1, 2, 5, 100])
        trainer.send(dashboard, trainer.steps(count, loss=lambda _: choose.random()))


@pytest.mark.parametrize("seed", range(3))
def test_a_page_that_applies_all_frames_shows_what_is_read_anew(shared, seed):
    choose = random.Random(seed)
    trainers = [Trainer(f"arm__s{n}", root=f"/runs/model-{seed}", config={"seed": n, "name": "arm"}) for n in range(2)]
    for trainer in trainers:
        trainer.send(shared, trainer.start() + trainer.steps(5))
    (id_,) = [row["id"] for row in shared.get("/api/home")["experiments"] if row["name"] == f"model-{seed}"]
    chart = DrawnChart(shared, id_)
    for _ in range(6):
        with shared.live() as live:
            subscribe(live, (chart.topic, chart.frame))
            for _ in range(choose.randrange(12)):
                send_something(shared, choose, choose.choice(trainers))
                chart.receive(live, choose.choice([0.0, 0.0, 0.05]))
        send_something(shared, choose, choose.choice(trainers))  # while nobody views it
    with shared.live() as live:
        subscribe(live, (chart.topic, chart.frame))
        deadline = time.monotonic() + 10
        while chart.points != chart.read()[1]:
            assert time.monotonic() < deadline
            chart.receive(live, 0.2)
