"""The short form of `kills.py`, and whether it would notice what it looks for; the long form is its command."""

import random
import shutil
import signal
from pathlib import Path

import kills
import pytest

from evsys_bus.journal import JournalReader


@pytest.mark.long
def test_no_receipt_of_a_training_is_lost_to_six_kills(tmp_path):
    """One of them at 5 steps a second, one at 1,000, one while it starts."""
    tally = kills.kill_repeatedly(6, 3_000, seed=random.randrange(1_000_000), folder=tmp_path)
    assert (tally.kills, tally.lost) == (6, 0)
    assert tally.records >= tally.receipts >= 3_000


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A directory with one life in it, killed after 500 receipts, that nobody has looked at."""
    directory = tmp_path_factory.mktemp("killed")
    life = kills.Life(directory, 0, 1 << 16)
    life.wait_for_receipts(500)
    life.end_process(signal.SIGKILL)
    return directory, life


@pytest.fixture
def journal(killed, tmp_path):
    return Path(shutil.copytree(killed[0] / "journal", tmp_path / "journal"))


def look(journal, killed):
    return kills.JournalChecker(journal).check_new_records(killed[1], by=signal.SIGKILL)


def test_the_inspection_finds_a_record_for_every_receipt(journal, killed):
    records, lost = look(journal, killed)
    assert lost == 0
    assert records - killed[1].receipts in {0, 1}


def test_the_inspection_counts_the_receipts_that_a_buffer_would_have_lost(journal, killed):
    last = max(journal.rglob("*.seg"))
    with last.open("r+b") as file:
        file.truncate(last.stat().st_size * 2 // 3)
    _, lost = look(journal, killed)
    [stream] = JournalReader(journal).streams()
    *_, record = JournalReader(journal).read(stream)
    assert lost == killed[1].shared[kills.LAST_INDEX] - record.sequence > 0


def test_the_inspection_does_not_pass_a_journal_with_a_flipped_bit(journal, killed):
    first = min(journal.rglob("*.seg"))
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    with pytest.raises(kills.Violation, match="follows|missing"):
        look(journal, killed)
