"""Leaving a bus whose adapters have nothing left to deliver is quick, whatever state they are in."""

import asyncio
import gc
import socket
import time
import weakref

import pytest

from evsys_bus import Envelope, EventBus, ExperimentStart, LogContext, ParkedError, Sink, build_callbacks
from evsys_bus.codec import encode
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.errors import RejectedError
from evsys_bus.journal import JournalWriter
from support.waiting import wait_until

KEYS = ("EVSYS_API_KEY", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE")
KEY = "evk_" + "a" * 40
LOGIN = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "eu-west-1"}
UPLOAD = {"kind": "checkpoint_upload", "params": {"url": "s3://bucket/prefix", "endpoint": "CLOSED"}}
SINKS = {}


def sink(kind):
    SINKS[kind.__name__] = kind
    return kind


class _Sink(Sink):
    async def write(self, batch):
        del batch


@sink
class HangsInOpen(_Sink):
    async def open(self):
        await asyncio.Event().wait()


@sink
class IgnoresCancellation(_Sink):
    async def open(self):
        for _ in range(1000):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                continue


@sink
class HasNoLogin(_Sink):
    async def open(self):
        raise ParkedError("401: no login", fix="log in")


@sink
class IsBroken(_Sink):
    async def open(self):
        raise ValueError("it cannot be opened")


@sink
class IsAway(_Sink):
    async def open(self):
        raise ConnectionRefusedError("nobody listens")


@pytest.fixture
def black_hole():
    """The URL of a server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed_port():
    """A URL at which nobody listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def seconds_to_leave(bus, states, *, pending=0):
    """Leave the bus once its adapter is in one of the states."""
    with bus:
        if pending:
            bus.publish(ExperimentStart(LogContext("out")))
        wait_until(lambda: bus.health().deliveries[0].state in states)
        if states == DELIVERING:
            time.sleep(1.0)  # it is inside `open`
        began = time.monotonic()
    seconds = time.monotonic() - began
    assert [each.pending for each in bus.receipt.deliveries] == [pending]
    assert (bus.receipt.resume_command is not None) == bool(pending)
    return seconds


STUCK, DELIVERING, IDLE = ("parked", "retrying"), ("delivering",), ("idle",)
CASES = {
    "evsys without a dashboard": ({"kind": "evsys_logger"}, {}, ("waiting",)),
    "evsys at a black hole": ({"kind": "evsys_logger"}, {"EVSYS_API_KEY": KEY, "EVSYS_API_URL": "HOLE"}, IDLE),
    "evsys at a black hole, without a key": ({"kind": "evsys_logger"}, {"EVSYS_API_URL": "HOLE"}, DELIVERING),
    "wandb without a login": ({"kind": "wandb_logger", "params": {"project": "p"}}, {}, IDLE),
    "an upload to a closed port": (UPLOAD, LOGIN, STUCK),
    "a webhook at a black hole": ({"kind": "webhook"}, {"EVSYS_WEBHOOK_URL": "HOLE"}, IDLE),
    "mlflow at a closed port": ({"kind": "mlflow_logger", "params": {"tracking_uri": "CLOSED"}}, {}, IDLE),
}


@pytest.mark.parametrize("couriers", [pytest.param("process", marks=pytest.mark.long), "thread"])
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_that_has_nothing_to_deliver_keeps_no_program_from_ending(
    tmp_path, monkeypatch, black_hole, closed_port, case, couriers
):
    spec, variables, states = CASES[case]
    places = {"HOLE": black_hole, "CLOSED": closed_port}
    for each in KEYS:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, places.get(value, value))
    params = {name: places.get(value, value) for name, value in spec.get("params", {}).items()}
    bus = EventBus(build_callbacks([{**spec, "params": params}]), journal=tmp_path / "journal", couriers=couriers)
    assert seconds_to_leave(bus, states) < 5


@pytest.mark.parametrize("name", SINKS)
def test_a_sink_that_cannot_be_opened_and_has_nothing_to_deliver_keeps_no_program_from_ending(tmp_path, name):
    states = {"HasNoLogin": STUCK, "IsAway": STUCK, "IsBroken": ("failed",)}.get(name, DELIVERING)
    bus = EventBus(sinks=[SINKS[name]()], journal=tmp_path / "journal")
    assert seconds_to_leave(bus, states) < 5
    problem = bus.receipt.deliveries[0].problem
    assert (problem is not None) == (states != DELIVERING)


def test_idle_work_that_hangs_keeps_no_program_from_ending(tmp_path, monkeypatch):
    class HangsWhileIdle(_Sink):
        idle_seconds = 0.0
        began = False

        async def on_idle(self):
            HangsWhileIdle.began = True
            await asyncio.Event().wait()

    monkeypatch.setattr("evsys_bus.delivery.sink_receiver.IDLE_WORK_SECONDS", 60.0)
    bus = EventBus(sinks=[HangsWhileIdle()], journal=tmp_path / "journal")
    with bus:
        wait_until(lambda: HangsWhileIdle.began)
        began = time.monotonic()
    assert time.monotonic() - began < 5


async def test_a_courier_whose_adapter_could_not_be_opened_leaves_nothing_on_the_loop(tmp_path):
    writer = JournalWriter(tmp_path / "journal").open()
    event = ExperimentStart(LogContext("out"))
    writer.append(encode(Envelope(writer.stream, writer.next_sequence, 0.0, event)), essential=True)
    writer.close()

    class HasNoRow(_Sink):
        async def open(self):
            raise RejectedError({0: "no such table"})

    async def run() -> "weakref.ref[Courier]":
        courier = Courier(tmp_path / "journal", "it", HasNoRow(), DeliveryPolicy())
        courier.finish()
        with pytest.raises(RejectedError):
            await courier.run()
        return weakref.ref(courier)

    left = await run()
    gc.collect()
    assert left() is None


async def test_a_courier_that_is_stopped_during_idle_work_may_be_asked_to_finish(tmp_path):
    began = asyncio.Event()

    class WaitsWhileIdle(_Sink):
        idle_seconds = 0.0

        async def on_idle(self):
            began.set()
            await asyncio.Event().wait()

    problems = []
    asyncio.get_running_loop().set_exception_handler(lambda _, problem: problems.append(problem))
    JournalWriter(tmp_path / "journal").open().close()
    courier = Courier(tmp_path / "journal", "it", WaitsWhileIdle(), DeliveryPolicy())

    async def stop() -> None:
        await began.wait()
        courier.stop()

    await asyncio.gather(courier.run(), stop())
    courier.finish()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert problems == []


def test_what_is_pending_for_a_parked_adapter_is_counted_and_not_waited_for(tmp_path):
    bus = EventBus(sinks=[HasNoLogin()], journal=tmp_path / "journal")
    assert seconds_to_leave(bus, STUCK, pending=1) < 5


def test_a_parked_adapter_does_not_cut_short_another_that_is_closing(tmp_path):
    class Flushes(_Sink):
        closed = False

        async def close(self):
            await asyncio.sleep(0.6)
            Flushes.closed = True

    bus = EventBus(sinks=[HasNoLogin(), Flushes()], journal=tmp_path / "journal")
    with bus:
        bus.publish(ExperimentStart(LogContext("out")))
        wait_until(lambda: {each.state for each in bus.health().deliveries} == {"parked", "idle"})
    assert Flushes.closed
    assert {each.name: each.pending for each in bus.receipt.deliveries} == {"HasNoLogin": 1, "Flushes": 0}
