"""A follower that was taken out of the config: what it is owed stays for a day, and is then said to be gone."""

import json
import time
from pathlib import Path

import pytest

from evsys_bus import EventBus, LoopState, StepEnd, TrainingBatch, follow
from evsys_bus.delivery.accounts import Account, accounts
from evsys_bus.delivery.roster import roster
from evsys_bus.errors import RetryLaterError
from evsys_bus.journal import JournalWriter, OsDisk, Retain, layout
from evsys_bus.testing import FailingSink, ManualClock, RecordingSink

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
        retain=Retain(max_bytes=8000),
        clock=ManualClock(time.time() + later),
        flush_seconds=3600,
    )


def train(journal: str, later: float, **settings) -> None:
    """Publish 200 events so much later, where no more than two segments are to be kept."""
    writer = retaining(journal, later)
    with EventBus([], journal=writer, **settings) as bus:
        publish(bus, 200)
        writer.flush()


def board(journal: str) -> Account:
    [account] = [each for each in accounts(journal) if each.name == "board"]
    assert account.recorded == account.delivered + account.dead + account.pending
    return account


def bytes_kept(journal: str) -> int:
    return sum(path.stat().st_size for path in Path(journal).glob("r0-*/*.seg"))


def test_for_a_day_it_is_waited_for_and_the_log_says_how_it_gets_the_rest(journal, caplog):
    train(journal, DAY - 60)
    assert board(journal).pending == 299
    assert bytes_kept(journal) > 20_000
    assert caplog.text.count("courier.not_followed") == 1
    assert "is not followed any more" in board(journal).trouble
    with EventBus([], journal=journal) as bus:
        publish(bus, 1)
    assert caplog.text.count("courier.not_followed") == 1  # said once
    sink = RecordingSink()
    with EventBus(sinks=[follow(sink, "board")], journal=journal) as bus:
        publish(bus, 1)
    assert [each.seq for each in sink.envelopes] == [*range(2, 303)]  # followed again, it gets all of it
    assert [each.left_at for each in roster(journal)] == [None]


def test_after_that_what_goes_counts_as_dead_and_nothing_vanishes_without_a_word(journal, caplog):
    with EventBus([], journal=journal):
        pass
    train(journal, DAY + 60)
    assert bytes_kept(journal) < 16_000
    account = board(journal)
    assert (account.recorded, account.delivered) == (300, 1)
    assert 0 < account.pending < 299
    assert "journal.left_events_removed" in caplog.text
    letters = Path(layout.courier_file(journal, "board", "dead.jsonl")).read_text().splitlines()
    assert sum(int(json.loads(line)["why"].split()[0]) for line in letters) == account.dead
    assert "it was taken out of the config" in letters[0]


def test_one_that_is_delivered_to_by_another_process_is_waited_for(journal):
    with EventBus([], journal=journal):
        pass
    lock = OsDisk().lock(layout.courier_file(journal, "board", "lock"))
    train(journal, DAY + 60)
    OsDisk().close(lock)
    assert board(journal).pending == 299
    assert board(journal).dead == 0


def test_those_who_are_followed_are_waited_for_however_long_they_lag(journal):
    sink = FailingSink([RetryLaterError("away")] * 1000)
    train(journal, 30 * DAY, sinks=[follow(sink, "board")], drain_timeout=0.3)
    assert (board(journal).pending, board(journal).dead) == (299, 0)


def test_while_one_of_two_is_delivered_to_nothing_goes_and_nothing_is_dead_for_the_other(journal):
    away = FailingSink([RetryLaterError("away")] * 1000)
    with EventBus(sinks=[follow(away, "also")], journal=journal, drain_timeout=0.3):
        pass
    with EventBus([], journal=journal):
        pass
    lock = OsDisk().lock(layout.courier_file(journal, "board", "lock"))
    train(journal, DAY + 60)
    assert [(each.name, each.dead) for each in accounts(journal)] == [("also", 0), ("board", 0)]
    OsDisk().close(lock)
    train(journal, DAY + 120)
    assert all(each.dead for each in accounts(journal))
