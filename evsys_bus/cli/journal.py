"""``evsys-bus journal``: verifies, repairs and exports a journal.

Reading does not need a repair, because readers skip damage. A repair makes later reads faster and free of warnings: it
quarantines damaged segments and rewrites them with their intact records only.
"""

import csv
import errno
import glob
import io
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import click
import msgspec

from evsys_bus.cli.events import EventFilter, EventReader, metrics_of, step_of, type_of
from evsys_bus.cli.options import event_options, no_match_message, run_argument
from evsys_bus.cli.output.formatting import (
    count_in_ranges,
    format_columns,
    format_range,
    format_ranges,
    format_size,
    format_time,
    pluralize,
)
from evsys_bus.cli.output.screen import Screen, color_option, is_terminal, json_option, printable, terminal_width, wrap
from evsys_bus.cli.records import find_journal, find_run_key
from evsys_bus.codec import to_json
from evsys_bus.errors import JournalInUseError
from evsys_bus.events import Envelope, Eval, StepEnd
from evsys_bus.files import write_into_place
from evsys_bus.journal import Disk, JournalReport, OsDisk, TailReader, frame, layout, verify
from evsys_bus.journal.frame import Frame
from evsys_bus.journal.reader import CorruptSegmentRange, SegmentScan, StreamReport
from evsys_bus.journal.stream_lock import read_stream_owner
from evsys_bus.location import encode_json

_EXIT_DAMAGED: Final = 3
_QUARANTINE_SUFFIX: Final = ".damaged"
_COMMON_COLUMNS: Final = ("time", "stream", "seq", "run", "rank")
_TYPE_COLUMNS: Final = {"step_end": ("step",), "eval": ("step", "eval")}
_FORMULA_PREFIXES: Final = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""Prefixes that spreadsheets treat as a formula; the last four are full-width forms."""
_MIN_BYTES_FOR_BAR: Final = 32 << 20
"""Smaller journals are read in a moment."""


@click.group("journal")
def command() -> None:
    """Check, repair or export the journal of a run or experiment."""


@command.command("verify", short_help="check every record and sequence")
@run_argument
@json_option
@color_option
@click.pass_obj
def verify_command(screen: Screen, folder: Path, as_json: bool) -> int:
    """Check the checksum of every record of RUN, and that no sequence is missing.

    Exits with 3 if recorded events are lost, and with 0 again once a repair has quarantined the damage. A write that
    was cut short by a kill is no loss: it was never acknowledged. Nothing is changed.
    """
    directory = find_journal(folder).directory
    report = verify_with_progress(directory, screen)
    if as_json:
        for each in report.streams:
            repaired = find_repaired_ranges(directory, each)
            row = {"type": "stream", **msgspec.to_builtins(each), "whole": each.is_intact, "repaired": repaired}
            click.echo(encode_json(row))
        return _exit_code(report)
    width = terminal_width(sys.stdout)
    lines = [printable(line) for each in report.streams for line in stream_lines(directory, each)]
    lines = [part for line in lines for part in wrap(line.lstrip(), width, indent=line[: -len(line.lstrip())])]
    head = f"{directory}   {pluralize(len(report.streams), 'stream')}"
    word, colon, rest = summary(report).partition(":")
    click.echo("\n".join([printable(head), "", *lines, "", f"{screen.style_state(word, sys.stdout)}{colon}{rest}"]))
    return _exit_code(report)


@command.command("repair", short_help="quarantine damaged segments, and rewrite them without the damage")
@run_argument
@click.option("--dry-run", is_flag=True, help="Only show what would be done.")
@color_option
@click.pass_obj
def repair_command(screen: Screen, folder: Path, dry_run: bool) -> int:
    """Quarantine the damaged segments of RUN, and rewrite them with their intact records only.

    Reading does not need a repair: damage is skipped. Lost events stay lost. Each damaged segment remains next to the
    new one, with the suffix ".damaged". Do not follow or sync the run at the same time. Exits with 3 if a segment
    cannot be read at all.
    """
    directory = find_journal(folder).directory
    report = verify_with_progress(directory, screen)
    done = repair(directory, [each for each in report.streams if each.corrupt_ranges], dry_run=dry_run)
    rows = [
        [
            f"{each.segment.parent.name}/{each.segment.name}",
            f"{pluralize(each.events, 'event')} retained",
            f"{format_size(each.dropped_bytes)} dropped",
            f"original: {each.quarantined.name}",
        ]
        for each in done
    ]
    action = "would be repaired; nothing was changed" if dry_run else "repaired"
    last = f"{pluralize(len(rows), 'segment')} {action}" if rows else "nothing to repair: no segment is damaged"
    click.echo("\n".join([*format_columns(rows), *([""] if rows else []), last]))
    unreadable = [
        f"{each.stream}/{' '.join(why.split())}" for each in report.streams for why in each.unreadable_segments
    ]
    for each in unreadable:
        screen.note(printable(f"not repaired: {each}"))
    return _EXIT_DAMAGED if unreadable else 0


@command.command("export", short_help="the events as csv or jsonl")
@run_argument
@click.option(
    "--format", "kind", type=click.Choice(["csv", "jsonl"]), required=True, help="How the events are written."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Output file; default: stdout. A folder for several tables."
)
@event_options
@color_option
@click.pass_obj
def export_command(
    screen: Screen, folder: Path, kind: str, out: Path | None, types: tuple[str, ...], run_key: str | None
) -> None:
    """Export the events of RUN, merged by time.

    jsonl: one object per event, as in `tail --json`. csv: one table per type of event, step_end if no type is given,
    with a column for each metric or field; the tables of several types are written into the folder --out.

    \b
    Examples:
      evsys-bus journal export runs/sweep --format csv --out metrics.csv
      evsys-bus journal export runs/sweep --format jsonl --type eval,checkpoint
    """  # noqa: D301 # click reads the backspace as: do not wrap
    journal = find_journal(folder)
    named = types or (("step_end",) if kind == "csv" else ())
    outputs = _output_paths(named, out) if kind == "csv" else {}
    event_filter = EventFilter(types=frozenset(named), run=run_key or find_run_key(journal))
    readers: list[EventReader] = []
    with disk_with_progress(journal.directory, "exporting", screen, times=1 + len(outputs)) as disk:

        def new_reader() -> EventReader:
            readers.append(EventReader(journal.directory, event_filter, disk))
            return readers[-1]

        counts = export_csv(new_reader, outputs) if outputs else {"event": export_jsonl(new_reader(), out)}
    if not any(counts.values()):
        screen.note(no_match_message(named))
    elif out is not None:
        parts = [f"{pluralize(count, 'event' if name == 'event' else f'{name} row')}" for name, count in counts.items()]
        screen.note(f"{', '.join(parts)} in {out}")
    readers[0].report_problems(screen)


def _output_paths(types: tuple[str, ...], out: Path | None) -> dict[str, Path | None]:
    """Return the output file of each type's table."""
    if len(types) == 1:
        return {types[0]: out}
    if out is None:
        raise click.UsageError("several tables do not fit on stdout; give a folder with --out, or one --type")
    if any(each != Path(each).name for each in types):
        raise click.UsageError("a type of event is one word: step_end")
    out.mkdir(parents=True, exist_ok=True)
    return {each: out / f"{each}.csv" for each in types}


def verify_with_progress(directory: Path, screen: Screen) -> JournalReport:
    """Verify the whole journal, with a progress bar."""
    with disk_with_progress(directory, "verifying", screen) as disk:
        return verify(directory, disk)


def stream_lines(directory: Path, stream: StreamReport) -> list[str]:
    """Return a line for the stream, and one for each problem."""
    repaired = find_repaired_ranges(directory, stream)
    lost = [each for each in stream.missing_ranges if each not in repaired]
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
        "whole" if stream.is_intact else "repaired" if _is_repaired(stream, repaired) else "damaged",
    ]
    lines = ["   ".join(head)]
    lines += [f"  ! {_describe_damage(stream, each)}" for each in stream.corrupt_ranges]
    for ranges, what in ((lost, "! lost"), (repaired, "lost before a repair, which retained the damaged segment")):
        if ranges:
            noun = "event" if count_in_ranges(ranges) == 1 else "events"
            lines.append(f"  {what}: {noun} {format_ranges(ranges)}")
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
    if _exit_code(report) == 0:
        return f"repaired: {pluralize(lost, 'event')} lost before that; all others are whole"
    quarantined = sum(damage.length for each in report.streams for damage in each.corrupt_ranges)
    unread = sum(len(each.unreadable_segments) for each in report.streams)
    facts = [
        *([f"{pluralize(lost, 'event')} lost"] if lost else []),
        *([f"{pluralize(quarantined, 'byte')} damaged"] if quarantined else []),
        *([f"{pluralize(unread, 'segment')} not readable"] if unread else []),
    ]
    readable = sum(each.records for each in report.streams)
    return f"damaged: {', '.join(facts)}; {pluralize(readable, 'event')} can be read"


def find_repaired_ranges(directory: Path, stream: StreamReport) -> list[tuple[int, int]]:
    """Return the missing ranges in segments that a repair has rewritten, and whose originals are in quarantine."""
    folder = directory / stream.stream
    names = layout.list_segments(OsDisk(), str(folder))
    ends = [*(name.first_sequence for name in names[1:]), sys.maxsize]
    spans = [
        (name.first_sequence, end)
        for name, end in zip(names, ends, strict=True)
        if any(folder.glob(f"{glob.escape(str(name))}{_QUARANTINE_SUFFIX}*"))
    ]
    return [
        (first, last) for first, last in stream.missing_ranges if any(low <= first and last < end for low, end in spans)
    ]


def _is_repaired(stream: StreamReport, repaired: list[tuple[int, int]]) -> bool:
    return not stream.corrupt_ranges and not stream.unreadable_segments and repaired == stream.missing_ranges


def _exit_code(report: JournalReport) -> int:
    directory = Path(report.directory)
    repaired = all(_is_repaired(each, find_repaired_ranges(directory, each)) for each in report.streams)
    return 0 if repaired else _EXIT_DAMAGED


def _describe_damage(stream: StreamReport, damage: CorruptSegmentRange) -> str:
    """Return the place of the damage, with the number of intact events of the stream before it."""
    segment = Path(damage.segment)
    first = int(segment.stem.partition("-")[2])
    next_sequence = first
    tail = TailReader(OsDisk(), str(segment.parent), first - 1, count_only=True)
    for run in tail.poll_runs():
        if tail.corrupt_ranges and tail.corrupt_ranges[-1].offset >= damage.offset:
            break
        next_sequence = run.first_sequence + run.length
    first_sequence = next_sequence if stream.first_sequence is None else stream.first_sequence
    gone = [(start, min(end, next_sequence - 1)) for start, end in stream.missing_ranges if start < next_sequence]
    count = max(
        0, next_sequence - first_sequence - count_in_ranges([each for each in gone if each[0] >= first_sequence])
    )
    location = f"{segment.name} at byte {damage.offset:,}"
    before = pluralize(count, "whole event")
    return f"{pluralize(damage.length, 'byte')} damaged in {location}; {before} before that"


class RepairedSegment(msgspec.Struct):
    """A repaired segment."""

    segment: Path
    events: int
    """Number of events in the rewritten segment."""
    dropped_bytes: int
    quarantined: Path
    """The original segment in quarantine."""


def repair(directory: Path, streams: Iterable[StreamReport], *, dry_run: bool) -> list[RepairedSegment]:
    """Repair the damaged segments of these streams; with ``dry_run`` only return what would be done.

    No other process should read them at the same time: a reader inside a segment would lose its position.

    Raises:
        JournalInUseError: A process writes one of the streams; nothing was changed.
        OSError: The disk failed. Every segment is either unchanged or repaired.
    """
    disk = OsDisk()
    locks: list[int] = []
    try:
        for stream in streams:
            lock = disk.lock(f"{directory}/{stream.stream}/{layout.LOCK}")
            if lock is None:
                writer = read_stream_owner(OsDisk(), str(directory), stream.stream)
                by = (
                    "a process"
                    if writer is None
                    else f"process {writer.pid} on {writer.host}, since {format_time(writer.since)},"
                )
                raise JournalInUseError(
                    f"{by} writes {directory}/{stream.stream}; nothing was repaired",
                    why="a segment that is being written cannot be replaced",
                    fix="repair it when that process has ended; until then it can be read as it is",
                ) from BlockingIOError(errno.EWOULDBLOCK, "it is locked")
            locks.append(lock)
        segments = dict.fromkeys(Path(damage.segment) for stream in streams for damage in stream.corrupt_ranges)
        return [_repair_segment(disk, each, dry_run=dry_run) for each in segments]
    finally:
        for lock in locks:
            disk.close(lock)


def _repair_segment(disk: OsDisk, segment: Path, *, dry_run: bool) -> RepairedSegment:
    scan = SegmentScan(disk, str(segment))
    frames = [piece for piece in scan.frames() if isinstance(piece, Frame)]
    content = frame.pack_segment_header() + b"".join(
        frame.pack(each.sequence, bytes(each.payload), each.kind) for each in frames
    )
    before = segment.stat()
    events = sum(each.kind == frame.EVENT for each in frames)
    done = RepairedSegment(segment, events, before.st_size - len(content), _free_name(segment))
    if not dry_run:
        # A hard link takes no space; not every file system has them.
        try:
            done.quarantined.hardlink_to(segment)
        except FileExistsError:
            raise
        except OSError:
            shutil.copy2(segment, done.quarantined)
        disk.replace(str(segment), content)
        os.utime(segment, ns=(before.st_atime_ns, before.st_mtime_ns))  # `retain` uses the file's age
    return done


def _free_name(segment: Path) -> Path:
    number = 1
    while (
        candidate := segment.with_name(f"{segment.name}{_QUARANTINE_SUFFIX}{'' if number == 1 else f'-{number}'}")
    ).exists():
        number += 1
    return candidate


@contextmanager
def open_output(path: Path | None) -> Generator[BinaryIO]:
    """Open stdout, or a file that appears under its name only when it is complete."""
    if path is None:
        yield sys.stdout.buffer
        return
    with write_into_place(path, make_folder=False) as file:
        yield file


def export_jsonl(reader: EventReader, out: Path | None) -> int:
    """Write one JSON object per event, and return the number of events."""
    count = 0
    with open_output(out) as file:
        for envelope in reader.poll():
            file.write(to_json(envelope) + b"\n")
            count += 1
    return count


def export_csv(new_reader: Callable[[], EventReader], outputs: dict[str, Path | None]) -> dict[str, int]:
    """Write a table per event type, with a column for each metric or field, and return the number of rows of each.

    The journal is read twice: for the columns, and for the rows. Events appended in between are left out.

    Args:
        new_reader: Returns a reader at the beginning.
        outputs: The output file of each type; types that do not occur get a table without rows.
    """
    reader = new_reader()
    tables: dict[str, dict[str, None]] = {
        kind: dict.fromkeys((*_COMMON_COLUMNS, *_TYPE_COLUMNS.get(kind, ()))) for kind in outputs
    }
    for envelope in reader.poll():
        columns = tables.get(type_of(envelope.event))
        if columns is not None:
            columns.update(dict.fromkeys(_cells(envelope)))
    last_sequences = reader.last_sequences()
    counts = dict.fromkeys(outputs, 0)
    for kind, out in outputs.items():
        rows = (
            _cells(envelope)
            for envelope in new_reader().poll()
            if type_of(envelope.event) == kind and envelope.seq <= last_sequences.get(envelope.stream, 0)
        )
        with open_output(out) as file:
            counts[kind] = _write_table(file, list(tables[kind]), rows)
    return counts


def _write_table(file: BinaryIO, columns: list[str], rows: Iterable[dict[str, Any]]) -> int:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=False)
    try:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(map(_escape_text, columns))
        count = 0
        for row in rows:
            writer.writerow([_cell(row.get(column)) for column in columns])
            count += 1
        text.flush()
        return count
    finally:
        text.detach()  # the caller closes the file


def _cells(envelope: Envelope) -> dict[str, Any]:
    """Return a row as a dict by column."""
    event = envelope.event
    row: dict[str, Any] = {
        "time": envelope.time,
        "stream": envelope.stream,
        "seq": envelope.seq,
        "run": envelope.run,
        "rank": envelope.rank,
    }
    if isinstance(event, StepEnd):
        row["step"] = step_of(event)
        fields = metrics_of(event)
    elif isinstance(event, Eval):
        row["step"] = step_of(event)
        row["eval"] = event.eval_name
        fields = _entries(event.metrics)
    else:  # nested fields get dotted names
        fields: dict[str, Any] = {}
        decoded = msgspec.json.decode(to_json(envelope))
        _collect_leaves(decoded["event"], "", fields)
        fields.pop("type", None)
        fields |= decoded.get("nonfinite", {})
    for name, value in fields.items():
        row[f"metrics.{name}" if name in row else name] = value
    return row


def _collect_leaves(value: object, path: str, leaves: dict[str, Any]) -> None:
    entries = _entries(value)
    if not isinstance(value, dict):
        leaves[path] = value
    for name, each in entries.items():
        _collect_leaves(each, f"{path}.{name}" if path else name, leaves)


def _entries(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _cell(value: object) -> object:
    """Return numbers unchanged, and anything else as text, lists as JSON."""
    if value is None or type(value) in {int, float}:
        return value
    return _escape_text(value if isinstance(value, str) else msgspec.json.encode(value).decode())


def _escape_text(text: str) -> str:
    """Escape formulas and line breaks."""
    text = text.replace("\r", "\\r").replace("\n", "\\n").replace("\x00", "\\x00")
    return f"'{text}" if text.startswith(_FORMULA_PREFIXES) else text


class _ProgressDisk(OsDisk):
    """The real disk; reports how many bytes were read."""

    def __init__(self, on_read: Callable[[int], object]) -> None:
        self._on_read = on_read

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Read, and report the number of bytes."""
        data = super().read(path, offset, size)
        self._on_read(len(data))
        return data


@contextmanager
def disk_with_progress(directory: Path, what: str, screen: Screen, *, times: int = 1) -> Generator[Disk]:
    """Yield a disk whose reads advance a progress bar.

    Args:
        directory: The journal.
        what: The label of the bar.
        screen: The terminal.
        times: How often the whole journal will be read.
    """
    total = sum(each.stat().st_size for each in directory.glob("*/*.seg")) * times
    if total < _MIN_BYTES_FOR_BAR or not is_terminal(sys.stderr):
        yield OsDisk()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, no_color=not screen.uses_color(sys.stderr))
    parts = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*parts, console=console, transient=True, refresh_per_second=8) as progress:
        task = progress.add_task(what, total=total)
        yield _ProgressDisk(lambda count: progress.advance(task, count))
