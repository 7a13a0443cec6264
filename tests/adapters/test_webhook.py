"""webhook: what a receiver gets, in each form, and what its answers decide."""

import json
import threading
import time

import pytest

from evsys_adapters import WebhookCallback
from evsys_adapters.webhook import WebhookSink
from evsys_bus import (
    ArmResult,
    EventBus,
    LogContext,
    LoopState,
    RunEnd,
    RunResult,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainingBatch,
    TrainStart,
)
from evsys_bus.context import LoopArtifacts
from evsys_bus.errors import ConfigError, ParkedError
from evsys_bus.events import Alert, Summary
from evsys_bus.testing import conformance
from support.couriers import counted, deliver, read_dead_letters, read_status
from support.http_server import HttpServer
from support.journals import read_envelopes, record

PATH = "/services/T0/B0/nobody-may-see-this"


class Receiver(HttpServer):
    """A webhook's receiver.

    Attributes:
        bodies: Every accepted body, in order.
        answers: Status and headers of the next answers; "slow", "cut" or 200 after them.
    """

    def __init__(self):
        super().__init__()
        self.bodies, self.answers, self.times, self.ids = [], [], [], []
        self.released = threading.Event()

    @property
    def url(self):
        return super().url + PATH

    def respond(self, request):
        self.times.append(time.monotonic())
        self.ids.append(request.headers["X-Event-Id"])
        answer = self.answers.pop(0) if self.answers else (200, {})
        if answer == "cut":
            return None
        if answer == "slow":
            self.released.wait(10)
            answer = (200, {})
        status, headers = answer
        if status == 200:
            self.bodies.append(json.loads(request.body))
        return status, f"what {self.url} answers".encode(), headers

    def stop(self):
        self.released.set()
        super().stop()


@pytest.fixture
def receiver():
    with Receiver() as server:
        yield server


def failing_run(folder, *, error="CUDA out of memory at https://user:hunter2@host/x"):
    """The events of a run that fails in its second step."""
    ctx = LogContext(folder, config={"lr": 1}).for_run("ppo")
    state = LoopState(0, 10, ctx.run_dir, ctx=ctx)
    yield RunStart(ctx)
    yield TrainStart(state)
    yield StepEnd(state, 0, TrainingBatch(), {"loss": 1.5})
    yield StepEnd(state, 1, TrainingBatch(), {"loss": float("nan"), "lr": 0.25})
    yield TrainEnd(state, LoopArtifacts())
    yield RunEnd(ctx, RunResult(status="failed", error=error), ArmResult("ppo", status="failed", error=error))


def test_a_failed_run_is_posted_with_its_error_duration_and_last_metrics(receiver, tmp_path):
    with EventBus([WebhookCallback(receiver.url)], journal=tmp_path / "journal", couriers="thread") as bus:
        for event in failing_run(tmp_path):
            bus.publish(event)
    [body] = receiver.bodies
    assert (body["event"], body["run"], body["status"], body["step"]) == ("run_end", "ppo", "failed", 1)
    assert body["metrics"] == {"loss": "nan", "lr": 0.25}
    assert body["seconds"] >= 0
    assert body["error"].startswith("CUDA out of memory")
    assert "hunter2" not in json.dumps(body)
    assert receiver.ids == [body["id"]]


async def test_what_the_run_has_set_as_its_summary_is_posted_at_its_end(receiver, tmp_path, journal):
    events = [*failing_run(tmp_path)]
    summary = Summary(events[0].ctx, {"best": 0.25, "api_key": "secret-4"})
    record(journal, [*events[:-2], summary, *events[-2:]])
    await deliver(journal, WebhookSink(receiver.url))
    [body] = receiver.bodies
    assert body["metrics"]["summary/best"] == 0.25
    assert "secret-4" not in json.dumps(body)


async def test_a_loop_without_a_run_start_is_posted_at_its_train_end(receiver, tmp_path, journal):
    state = LoopState(0, 10, tmp_path / "loop")
    record(
        journal, [TrainStart(state), StepEnd(state, 4, TrainingBatch(), {"loss": 1}), TrainEnd(state, LoopArtifacts())]
    )
    await deliver(journal, WebhookSink(receiver.url))
    [body] = receiver.bodies
    assert (body["run"], body["status"], body["step"], body["metrics"]) == ("loop", "completed", 4, {"loss": 1})


async def test_run_starts_are_posted_on_request(receiver, tmp_path, journal):
    record(journal, failing_run(tmp_path))
    await deliver(journal, WebhookSink(receiver.url, events=["run_start"]))
    assert [(each["event"], each["run"]) for each in receiver.bodies] == [("run_start", "ppo")]


async def test_alerts_are_posted_from_their_minimum_level_on(receiver, tmp_path, journal):
    ctx = LogContext(tmp_path).for_run("ppo")
    record(journal, [Alert(ctx, "fine", level="info"), Alert(ctx, "KL is 12", "see step 9", "error")])
    await deliver(journal, WebhookSink(receiver.url, min_level="warning"))
    [body] = receiver.bodies
    assert (body["run"], body["level"], body["title"], body["text"]) == ("ppo", "error", "KL is 12", "see step 9")


async def test_slack_gets_a_text_and_blocks_that_mention_nobody(receiver, tmp_path, journal):
    record(journal, failing_run(tmp_path, error="<!channel> & " + "x" * 5000))
    await deliver(journal, WebhookSink(receiver.url, format="slack"))
    [body] = receiver.bodies
    assert body["text"] == "ppo failed"
    assert [each["type"] for each in body["blocks"]] == ["header", "section", "context"]
    shown = body["blocks"][1]["text"]["text"]
    assert shown.startswith("&lt;!channel&gt; &amp; x")
    assert len(shown) <= 3000


async def test_discord_gets_a_content_that_mentions_nobody(receiver, tmp_path, journal):
    record(journal, failing_run(tmp_path, error="@everyone"))
    await deliver(journal, WebhookSink(receiver.url, format="discord"))
    [body] = receiver.bodies
    assert body["content"].splitlines()[:2] == ["**ppo failed**", "@everyone"]
    assert body["allowed_mentions"] == {"parse": []}


@pytest.mark.parametrize("answers", [[(500, {})] * 2, ["cut"], [(429, {"Retry-After": "0.3"})], [(503, {})]])
async def test_a_receiver_that_is_away_for_a_while_gets_every_message_once(receiver, tmp_path, journal, answers):
    receiver.answers = list(answers)
    record(journal, failing_run(tmp_path))
    courier = await deliver(journal, WebhookSink(receiver.url))
    assert len(receiver.bodies) == 1
    assert len(receiver.times) == len(answers) + 1
    assert len(set(receiver.ids)) == 1
    assert counted(courier) == (6, 0, 0)
    if answers[0] == (429, {"Retry-After": "0.3"}):
        assert receiver.times[1] - receiver.times[0] >= 0.3


async def test_a_receiver_that_does_not_answer_costs_one_deadline_and_is_tried_again(receiver, tmp_path, journal):
    receiver.answers = ["slow"]
    record(journal, failing_run(tmp_path))
    await deliver(journal, WebhookSink(receiver.url, timeout_seconds=1.5))
    assert len(receiver.times) == 2
    assert len(receiver.bodies) == 1


async def test_what_the_receiver_refuses_is_a_dead_letter_with_the_fix_and_the_next_is_posted(
    receiver, tmp_path, journal
):
    receiver.answers = [(404, {})]
    record(journal, [*failing_run(tmp_path / "a"), *failing_run(tmp_path / "b")])
    courier = await deliver(journal, WebhookSink(receiver.url))
    assert counted(courier) == (11, 1, 0)
    assert len(receiver.bodies) == 1
    [letter] = read_dead_letters(journal)
    assert "127.0.0.1 answers 404" in str(letter)
    assert "EVSYS_WEBHOOK_URL" in str(letter)
    assert "nobody-may-see-this" not in str(letter)


async def test_a_redirect_is_not_followed(receiver, tmp_path, journal):
    receiver.answers = [(302, {"Location": "http://127.0.0.1:1/"})]
    record(journal, failing_run(tmp_path))
    sink = WebhookSink(receiver.url)
    await sink.open()
    with pytest.raises(ParkedError, match="answers 302"):
        await sink.write(read_envelopes(journal)[-1:])
    await sink.close()


async def test_without_a_url_the_adapter_is_parked_and_names_the_variable(monkeypatch):
    monkeypatch.delenv("EVSYS_WEBHOOK_URL", raising=False)
    with pytest.raises(ParkedError, match="EVSYS_WEBHOOK_URL is not set"):
        await WebhookSink().open()
    monkeypatch.setenv("EVSYS_WEBHOOK_URL", "ftp://host")
    with pytest.raises(ParkedError, match="not a URL") as caught:
        await WebhookSink().open()
    assert "ftp" not in str(caught.value)


async def test_the_url_comes_from_the_environment(receiver, tmp_path, journal, monkeypatch):
    monkeypatch.setenv("TEAM_URL", receiver.url)
    record(journal, failing_run(tmp_path))
    await deliver(journal, WebhookSink(url_env="TEAM_URL"))
    assert len(receiver.bodies) == 1


def test_the_url_is_in_no_file_no_log_and_no_repr(receiver, tmp_path, caplog):
    receiver.answers = [(500, {}), (404, {})]
    logger = WebhookCallback(receiver.url)
    with EventBus([logger], journal=tmp_path / "journal", couriers="thread") as bus:
        for event in failing_run(tmp_path):
            bus.publish(event)
    assert "nobody-may-see-this" not in caplog.text + repr(logger) + repr(logger.config)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"nobody-may-see-this" not in path.read_bytes(), path


async def test_a_courier_that_was_rebuilt_still_knows_when_a_run_started(receiver, tmp_path, journal):
    events = [*failing_run(tmp_path)]
    with EventBus([], journal=journal) as bus:
        for each in events[:4]:
            bus.publish(each)
        await deliver(journal, WebhookSink(receiver.url))
        for each in events[4:]:
            bus.publish(each)
    await deliver(journal, WebhookSink(receiver.url))
    [body] = receiver.bodies
    assert body["metrics"]["lr"] == 0.25
    assert "seconds" in body
    assert read_status(journal).delivered == 6


@pytest.mark.parametrize("params", [{"webhook_url": "hooks.slack.com/x"}, {"format": "teams"}, {"events": []}])
def test_wrong_params_are_refused(params):
    with pytest.raises(ConfigError) as caught:
        WebhookCallback(**params)
    assert "hooks.slack.com/x" not in str(caught.value)


@pytest.fixture
def url(receiver):
    return receiver.url


test_conforms = conformance(lambda _: WebhookCallback("http://127.0.0.1/x"), delivery=lambda _, url: WebhookSink(url))
