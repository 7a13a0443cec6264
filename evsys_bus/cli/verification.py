"""The report of `evsys_bus.journal.verify` as text."""

from pathlib import Path

from evsys_bus.cli.output.formatting import count_in_ranges, format_range, format_ranges, format_size, pluralize
from evsys_bus.cli.output.screen import Screen
from evsys_bus.cli.reading_progress import disk_with_progress
from evsys_bus.journal import JournalReport, OsDisk, TailReader, verify
from evsys_bus.journal.verify import CorruptSegmentRange, StreamReport


def verify_with_progress(directory: Path, screen: Screen) -> JournalReport:
    """Verify the whole journal, with a progress bar."""
    with disk_with_progress(directory, "verifying", screen) as disk:
        return verify(directory, disk)


def stream_lines(stream: StreamReport) -> list[str]:
    """Return a line for the stream, and one for each problem."""
    state = "live" if stream.is_live else "closed" if stream.is_closed else "not closed"
    numbers = (
        ""
        if stream.first_sequence is None or stream.last_sequence is None
        else f" ({format_range(stream.first_sequence, stream.last_sequence)})"
    )
    head = [
        stream.stream,
        state,
        f"{pluralize(stream.records, 'event')}{numbers}",
        pluralize(stream.segments, "segment"),
        format_size(stream.bytes),
        "whole" if stream.is_intact else "damaged",
    ]
    lines = ["   ".join(head)]
    lines += [f"  ! {_describe_damage(stream, each)}" for each in stream.corrupt_ranges]
    if stream.missing_ranges:
        lines.append(f"  ! lost: {_event_noun(stream.missing_ranges)} {format_ranges(stream.missing_ranges)}")
    lines += [f"  ! could not be read: {' '.join(each.split())}" for each in stream.unreadable_segments]
    if stream.removed_events:
        lines.append(f"  {pluralize(stream.removed_events, 'event')} before these removed, as by retain")
    if stream.torn_bytes:
        lines.append(
            f"  {pluralize(stream.torn_bytes, 'byte')} of incomplete writes, as after a kill; no event is lost"
        )
    return lines


def summary(report: JournalReport) -> str:
    """Return the result for the whole journal in one line."""
    removed = sum(each.removed_events for each in report.streams)
    if report.is_intact and removed:
        return f"whole, except for {pluralize(removed, 'event')} removed from the front, as by retain"
    if report.is_intact:
        return "whole: no recorded event is missing"
    lost = sum(count_in_ranges(each.missing_ranges) for each in report.streams)
    quarantined = sum(damage.length for each in report.streams for damage in each.corrupt_ranges)
    unread = sum(len(each.unreadable_segments) for each in report.streams)
    facts = [
        *([f"{pluralize(lost, 'event')} lost"] if lost else []),
        *([f"{pluralize(quarantined, 'byte')} damaged"] if quarantined else []),
        *([f"{pluralize(unread, 'segment')} not readable"] if unread else []),
    ]
    readable = sum(each.records for each in report.streams)
    return f"damaged: {', '.join(facts)}; {pluralize(readable, 'event')} can be read"


def _describe_damage(stream: StreamReport, damage: CorruptSegmentRange) -> str:
    location = f"{Path(damage.segment).name} at byte {damage.offset:,}"
    return f"{pluralize(damage.length, 'byte')} damaged in {location}; {_count_before(stream, damage)} before that"


def _count_before(stream: StreamReport, damage: CorruptSegmentRange) -> str:
    """Return the number of intact events of the stream before the damage."""
    segment = Path(damage.segment)
    first = int(segment.stem.partition("-")[2])
    tail = TailReader(OsDisk(), str(segment.parent), first - 1, count_only=True)
    next_sequence = first
    for run in tail.poll_runs():
        if tail.corrupt_ranges and tail.corrupt_ranges[-1].offset >= damage.offset:
            break
        next_sequence = run.first_sequence + run.length
    first_sequence = next_sequence if stream.first_sequence is None else stream.first_sequence
    gone = [(start, min(end, next_sequence - 1)) for start, end in stream.missing_ranges if start < next_sequence]
    count = max(
        0, next_sequence - first_sequence - count_in_ranges([each for each in gone if each[0] >= first_sequence])
    )
    return f"{pluralize(count, 'whole event')}"


def _event_noun(missing: list[tuple[int, int]]) -> str:
    return "event" if count_in_ranges(missing) == 1 else "events"
