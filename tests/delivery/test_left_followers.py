"""A follower that was taken out of the config: what it is owed stays until somebody says that it is to be forgotten."""

import subprocess
import time
from pathlib import Path

import pytest

from evsys_bus import EventBus, LoopState, StepEnd, TrainingBatch, follow
from evsys_bus.delivery.progress import read_progress
from evsys_bus.delivery.subscriptions import forget, load_subscriptions
from evsys_bus.errors import CourierBusyError, RetryLaterError
from evsys_bus.journal import JournalWriter, OsDisk, RetentionPolicy, layout
from evsys_bus.tasks import DeliveryStatus
from evsys_bus.testing import FailingSink, ManualClock, RecordingSink
from support.programs import EVSYS_BUS

DAY = 86_400.0


def publish(bus: EventBus, count: int) -> None:
    for step in range(count):
        state = LoopState(step=step, num_steps=count, output_dir="run")
        bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 0.5}))


@pytest.fixture
def journal(tmp_path: Path) -> str:
    """With 100 events, of which the follower `board` was away for all but the first batch."""
    directory = str(tmp_path / "journal")
    sink = FailingSink([None, *[RetryLaterError("away")] * 1000])
    with EventBus(sinks=[follow(sink, "board")], journal=directory, drain_timeout=0.3) as bus:
        publish(bus, 1)
        while bus.health().deliveries[0].pending:
            time.sleep(0.01)
        publish(bus, 99)
    assert bus.receipt.deliveries[0].pending == 99
    return directory


def retaining(journal: str, later: float) -> JournalWriter:
    return JournalWriter(
        journal,
        segment_bytes=4000,
        retain=RetentionPolicy(max_bytes=8000),
        clock=ManualClock(time.time() + later),
        flush_seconds=3600,
    )


def train(journal: str, later: float, **settings) -> None:
    """Publish 200 events so much later, where no more than two segments are to be kept."""
    writer = retaining(journal, later)
    with EventBus([], journal=writer, **settings) as bus:
        publish(bus, 200)
        writer.flush()


def board(journal: str) -> DeliveryStatus:
    [account] = [each for each in read_progress(journal) if each.name == "board"]
    assert account.recorded == account.delivered + account.dead + account.pending
    return account


def bytes_kept(journal: str) -> int:
    return sum(path.stat().st_size for path in Path(journal).glob("r0-*/*.seg"))


def evsys_bus(*arguments: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    command = [EVSYS_BUS, *arguments]
    return subprocess.run(command, check=False, input=answer, capture_output=True, text=True, timeout=60)


def test_it_is_waited_for_however_long_and_the_log_names_it_what_it_holds_back_and_the_fix(journal, caplog):
    train(journal, 0)
    train(journal, 400 * DAY)
    account = board(journal)
    assert (account.delivered, account.pending, account.dead) == (1, 499, 0)
    assert caplog.text.count("courier.not_followed") == 1
    assert "is not followed any more" in account.last_error
    held = [each for each in caplog.messages if "journal.kept_for_left_follower" in each]
    assert len(held) == 2  # one for each process, or writer
    assert "follower=board" in held[-1]
    assert f"evsys-bus forget board {journal}" in held[-1]
    said = int(held[-1].partition("bytes=")[2].split()[0])
    assert 20_000 < said < bytes_kept(journal)
    sink = RecordingSink()
    with EventBus(sinks=[follow(sink, "board")], journal=journal) as bus:
        publish(bus, 1)
    assert [each.seq for each in sink.envelopes] == [*range(2, 502)]  # followed again, it gets all of it
    assert [each.deregistered_at for each in load_subscriptions(journal)] == [None]


def test_one_that_is_forgotten_is_waited_for_no_longer_and_what_goes_is_told(journal, caplog):
    with EventBus([], journal=journal):
        pass
    done = evsys_bus("forget", "board", journal, answer="y\n")
    assert done.returncode == 0, done.stderr
    assert "Forget board" in done.stderr
    assert "99 events will not be delivered to it" in done.stderr
    assert read_progress(journal) == []
    caplog.set_level("INFO")
    writer = retaining(journal, 1)
    with EventBus([], journal=writer) as bus:
        publish(bus, 200)
        writer.flush()
        health = bus.health().journal
        assert health is not None
        assert health.removed_segments > 1
        assert health.removed_events > 100
        assert health.removed_bytes > 8000
    assert bytes_kept(journal) < 16_000
    said = [each for each in caplog.messages if "journal.segments_removed" in each]
    assert f"events={health.removed_events}" in " ".join(said)
    assert f"up_to={health.removed_events}" in " ".join(said)
    sink = RecordingSink()
    with EventBus(sinks=[follow(sink, "board")], journal=journal) as bus:
        publish(bus, 1)
    first = health.removed_events + 1
    assert [each.seq for each in sink.envelopes] == [*range(first, 302)]
    assert "courier.begins_behind_removed" in caplog.text
    assert board(journal).absent == health.removed_events
    assert f"board: {health.removed_events} events not delivered" in evsys_bus("status", journal).stdout
    verified = evsys_bus("journal", "verify", journal)
    assert verified.returncode == 0
    assert f"{health.removed_events} events before these removed" in verified.stdout


def test_without_a_yes_nothing_is_forgotten_and_a_name_that_is_not_known_is_said(journal):
    assert evsys_bus("forget", "board", journal, answer="n\n").returncode == 130
    wrong = evsys_bus("forget", "bord", journal, "--yes")
    assert wrong.returncode == 2
    assert 'did you mean "board"' in wrong.stderr
    assert board(journal).pending == 99
    assert evsys_bus("forget", "board", journal, "--yes").returncode == 0
    assert load_subscriptions(journal) == []


def test_one_that_is_delivered_to_is_not_forgotten(journal):
    lock = OsDisk().lock(layout.courier_path(journal, "board", "lock"))
    assert lock is not None
    with pytest.raises(CourierBusyError, match="delivers"):
        forget(journal, "board")
    refused = evsys_bus("forget", "board", journal, "--yes")
    assert refused.returncode == 3
    assert "EB905" in refused.stderr
    OsDisk().close(lock)
    assert board(journal).pending == 99
    forget(journal, "board")
    assert read_progress(journal) == []


def test_those_who_are_followed_are_waited_for_however_long_they_lag(journal, caplog):
    sink = FailingSink([RetryLaterError("away")] * 1000)
    train(journal, 30 * DAY, sinks=[follow(sink, "board")], drain_timeout=0.3)
    assert (board(journal).pending, board(journal).dead) == (299, 0)
    assert "journal.kept_for_left_follower" not in caplog.text
