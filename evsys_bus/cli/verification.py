"""The report of `evsys_bus.journal.verify` as text."""

from pathlib import Path

from evsys_bus.cli.amounts import size, span, spans, within
from evsys_bus.cli.reading_progress import disk_with_progress
from evsys_bus.cli.screen import Screen
from evsys_bus.cli.tables import counted
from evsys_bus.journal import OsDisk, Report, verify
from evsys_bus.journal.frame import Damage, Frame
from evsys_bus.journal.scanning import SegmentScan
from evsys_bus.journal.verify import DamagedRange, StreamReport


def verified(directory: Path, screen: Screen) -> Report:
    """Verify the whole journal, with a progress bar."""
    with disk_with_progress(directory, "verifying", screen) as disk:
        return verify(directory, disk)


def stream_lines(stream: StreamReport) -> list[str]:
    """Return a line for the stream, and one for each problem."""
    state = "live" if stream.live else "closed" if stream.closed else "not closed"
    numbers = "" if stream.first is None or stream.last is None else f" ({span(stream.first, stream.last)})"
    head = [
        stream.stream,
        state,
        f"{counted(stream.records, 'event')}{numbers}",
        counted(stream.segments, "segment"),
        size(stream.bytes),
        "whole" if stream.whole else "damaged",
    ]
    lines = ["   ".join(head)]
    lines += [f"  ! {_damage_told(stream, each)}" for each in stream.damaged]
    if stream.missing:
        lines.append(f"  ! lost: {_events(stream.missing)} {spans(stream.missing)}")
    lines += [f"  ! could not be read: {' '.join(each.split())}" for each in stream.unreadable]
    if stream.removed:
        lines.append(f"  {counted(stream.removed, 'event')} before these removed, as by retain")
    if stream.torn_bytes:
        lines.append(f"  {counted(stream.torn_bytes, 'byte')} of incomplete writes, as after a kill; no event is lost")
    return lines


def summary(report: Report) -> str:
    """Return the result for the whole journal in one line."""
    removed = sum(each.removed for each in report.streams)
    if report.whole and removed:
        return f"whole, except for {counted(removed, 'event')} removed from the front, as by retain"
    if report.whole:
        return "whole: no recorded event is missing"
    lost = sum(within(each.missing) for each in report.streams)
    aside = sum(damage.length for each in report.streams for damage in each.damaged)
    unread = sum(len(each.unreadable) for each in report.streams)
    facts = [
        *([f"{counted(lost, 'event')} lost"] if lost else []),
        *([f"{counted(aside, 'byte')} damaged"] if aside else []),
        *([f"{counted(unread, 'segment')} not readable"] if unread else []),
    ]
    kept = sum(each.records for each in report.streams)
    return f"damaged: {', '.join(facts)}; {counted(kept, 'event')} can be read"


def _damage_told(stream: StreamReport, damage: DamagedRange) -> str:
    place = f"{Path(damage.segment).name} at byte {damage.offset:,}"
    return f"{counted(damage.length, 'byte')} damaged in {place}; {_before(stream, damage)} before that"


def _before(stream: StreamReport, damage: DamagedRange) -> str:
    """Return the number of intact events of the stream before the damage."""
    first = int(Path(damage.segment).stem.partition("-")[2])
    following = first
    scan = SegmentScan(OsDisk(), damage.segment)
    for piece in scan.count(first):
        if isinstance(piece, Damage) and scan.offset >= damage.offset + damage.length:
            break
        if isinstance(piece, int):
            following = max(following, piece)
        elif isinstance(piece, Frame) and not piece.kind:
            following = max(following, piece.sequence + 1)
    begin = following if stream.first is None else stream.first
    gone = [(start, min(end, following - 1)) for start, end in stream.missing if start < following]
    count = max(0, following - begin - within([each for each in gone if each[0] >= begin]))
    return f"{counted(count, 'whole event')}"


def _events(missing: list[tuple[int, int]]) -> str:
    return "event" if within(missing) == 1 else "events"
