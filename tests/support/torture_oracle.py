"""Checks of `torture.py` after a directory has been drained: the journal, and what reached the adapters."""

import csv
import hashlib
import json
import logging
import os
import subprocess
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

from evsys_bus import Checkpoint, StepEnd, TrainEnd, TrainStart
from evsys_bus.codec import decode
from evsys_bus.journal import JournalReader
from support.files import read_json_lines
from support.programs import EVSYS_BUS

HORIZON = 1_000_000
COMMAND_SECONDS = 60.0
RAISED = 1
"""Exit code of `evsys-bus` after an unexpected exception."""


class Fault(Exception):  # noqa: N818 - names what was found, not an error of this program
    """Raised when a promise was not kept."""


def insist(fine, why):
    if not fine:
        raise Fault(why)


def first_of(journal, stream):
    """Return the first sequence of the oldest segment of a stream; 0 if it has no segment."""
    names = sorted(path.stem for path in journal.glob(f"{stream}/*.seg"))
    return int(names[0].partition("-")[2]) if names else 0


class Expected:
    """The events that must have arrived, and those that may have, by life, kind and step."""

    def __init__(self):
        self.places = {}
        """(life, kind, step) -> (stream, sequence), of all events seen in the journal or acknowledged as recorded."""
        self.firsts = {}
        """Life -> its first step."""
        self.names = {}
        """(life, "checkpoint", step) -> the name of the checkpoint."""
        self.doubtful = set()
        """Events that the disk refused, still in memory when a life ended and counted by it as unrecorded."""
        self.acknowledged = 0

    def read(self, journal):
        """Return the events in the journal: (life, kind, step) -> (stream, sequence)."""
        there, reader = {}, JournalReader(journal)
        for stream in reader.streams():
            oldest = first_of(journal, stream)
            for record in reader.read(stream):
                if record.sequence < oldest:
                    continue  # a start that was carried over from a removed segment
                envelope = decode(record.payload)
                event = envelope.event
                if isinstance(event, TrainStart):
                    life = event.state.num_steps - HORIZON
                    key = (life, "start", event.state.step)
                    self.firsts[life] = event.state.step
                elif isinstance(event, StepEnd):
                    key = (int(event.metrics["life"]), "step", event.step_idx)
                elif isinstance(event, Checkpoint):
                    key = (int(event.row.name[4:7]), "checkpoint", event.row.batch)
                    self.names[key] = event.row.name
                elif isinstance(event, TrainEnd):
                    key = (event.state.num_steps - HORIZON, "end", event.state.step)
                else:
                    continue
                insist(key not in there, f"{key} is recorded twice: {there.get(key)} and {(stream, record.sequence)}")
                there[key] = (stream, record.sequence)
        return there

    def take(self, number, life, journal):
        """Add a finished life; each acknowledged event must be recorded, pruned by retention, or counted."""
        there = self.read(journal)
        lost = []
        for ack in life.acks:
            kind = ack["what"]
            key = (number, kind, ack["step"])
            if kind == "start":
                self.firsts.setdefault(number, ack["step"])
            if kind == "checkpoint":
                self.names.setdefault(key, ack["name"])
            place = (ack["stream"], ack["seq"])
            self.acknowledged += 1
            if key in there:
                continue
            pruned = life.plan["retain_bytes"] is not None and place[1] < first_of(journal, place[0])
            counted = bool(ack["unrecorded"] or ack["lost"])
            if pruned:
                self.places[key] = place
                if counted:
                    self.doubtful.add(key)
            elif not counted or life.unrecorded_at_end == 0:
                lost.append((key, place))
        self.places |= there
        insist(not lost, f"{len(lost)} acknowledged events are not recorded: {lost[:3]}")

    def rows(self):
        """Return step -> (value, place, whether it is required), each step as the last life that ran it has it."""
        rows = {}
        by_life = {}
        for (life, kind, step), place in self.places.items():
            if kind == "step":
                by_life.setdefault(life, []).append((step, place, (life, kind, step) not in self.doubtful))
        alive = {life for life, *_ in self.places}
        for life in sorted(alive):
            first = self.firsts[life]
            for step in [each for each in rows if each >= first]:
                del rows[step]
            for step, place, must in sorted(by_life.get(life, [])):
                rows[step] = (float(life * 1000 + step % 1000), place, must)
        return rows


# -- what reached the adapters ----------------------------------------------------------------------------------------


def letters(journal, name):
    """Return stream -> the last sequence of the adapter's dead letters."""
    found = {}
    path = journal / "couriers" / f"{name}.dead.jsonl"
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            try:
                letter = json.loads(line)
            except ValueError:
                continue
            found[letter["stream"]] = max(letter["seq"], found.get(letter["stream"], 0))
    return found


def compare(what, wanted, found, excused):
    """Check that ``found``, [(step, value)], are the rows wanted; ``excused(step)``: it may be missing."""
    doubled = [step for step, count in Counter(step for step, _ in found).items() if count > 1]
    insist(not doubled, f"{what}: {len(doubled)} steps occur twice, such as {doubled[:5]}")
    wrong = next((each for each in pairwise(found) if each[0][0] > each[1][0]), None)
    insist(wrong is None, f"{what}: out of order at {wrong}")
    there = dict(found)
    alien = {step: value for step, value in there.items() if step not in wanted or wanted[step][0] != value}
    some = [(step, value, wanted.get(step)) for step, value in alien.items()][:3]
    insist(not alien, f"{what}: {len(alien)} rows that no life published last, such as {some}")
    missing = [step for step, (_, _, must) in wanted.items() if must and step not in there and not excused(step)]
    insist(
        not missing, f"{what}: {len(missing)} of {len(wanted)} rows are missing, from {missing[:3]} to {missing[-1:]}"
    )


def csv_rows(path):
    with path.open(newline="") as file:
        return [(int(row["step"]), float(row["value"])) for row in csv.DictReader(file)]


def jsonl_rows(path):
    rows = read_json_lines(path)
    return [(row["step"], row["value"]) for row in rows]


def tensorboard_rows(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.CRITICAL)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    if "train/value" not in events.Tags()["scalars"]:
        return []
    return [(each.step, each.value) for each in events.Scalars("train/value")]


def sink_lines(path):
    """Return (stream, sequence) in the order of arrival, without lines truncated by a kill or a full disk."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    parts = [line.split() for line in lines if line.endswith(" .")]
    return [(part[0], int(part[1])) for part in parts if len(part) == 3 and part[1].isdigit()]


def inspect_sink(name, expected, path, excused):
    got = list(dict.fromkeys(sink_lines(path)))
    lives = {place: key[0] for key, place in expected.places.items()}
    order = [(lives[place], place[1]) for place in got if place in lives]
    wrong = next((each for each in pairwise(order) if each[0] > each[1]), None)
    insist(wrong is None, f"sink {name}: out of order, (life, sequence) {wrong}")
    missing = (
        [
            key
            for key, place in expected.places.items()
            if place not in set(got) and key not in expected.doubtful and not excused(key[0], place)
        ]
        if len(set(got)) < len(expected.places)
        else []
    )
    insist(not missing, f"sink {name} lacks {len(missing)} of {len(expected.places)} events: {sorted(missing)[:3]}")


def inspect_checkpoints(expected, store, run_dir, dead, *, latest_of):
    """Check the uploaded checkpoints, and ``latest.json`` if the newest one is of life ``latest_of`` or later."""
    manifests = {}
    for path in store.glob("run/*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifests[manifest["row"]["name"]] = path.parent.name
        for file in manifest["files"]:
            content = (path.parent / file["name"]).read_bytes()
            whole = (len(content), hashlib.sha256(content).hexdigest()) == (file["size"], file["sha256"])
            insist(whole, f"{path.parent / file['name']} does not match its manifest")
    sure = expected.places.keys() - expected.doubtful
    must = {key: name for key, name in expected.names.items() if key in sure}
    excused = {key for key in must if expected.places[key][1] <= dead.get(expected.places[key][0], 0)}
    missing = [name for key, name in must.items() if name not in manifests and key not in excused]
    insist(not missing, f"{len(missing)} of {len(must)} checkpoints are not in the store: {sorted(missing)[:3]}")
    newest = max(must.keys() - excused, default=None)
    if newest is not None and newest[0] >= latest_of:
        latest = json.loads((store / "run" / "latest.json").read_text())["checkpoint"]
        later = {manifests[name] for key, name in expected.names.items() if key >= newest and name in manifests}
        insist(latest in later, f"latest names {latest}, and the newest is {manifests[must[newest]]}")
    for name, folder in manifests.items():
        source = run_dir / "checkpoints" / name / "state.bin"
        stored = next((store / "run" / folder).glob("state/**/state.bin"), None)
        insist(stored is not None and stored.read_bytes() == source.read_bytes(), f"{name} differs from what was saved")


def command(arguments, environment, *, seconds=COMMAND_SECONDS):
    """Run `evsys-bus`; returns exit code, stdout and stderr. It must end in time and without a traceback."""
    line = [EVSYS_BUS, *map(str, arguments)]
    with subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise Fault(f"{' '.join(map(str, arguments))} has not ended after {seconds:g} s:\n{err[-1500:]}") from None
    insist(process.returncode != RAISED, f"{' '.join(map(str, arguments))} ended with a traceback:\n{err[-3000:]}")
    return process.returncode, out, err


def processes(directory):
    """Return pid -> command line of all other processes with this directory on their command line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes()
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if os.fsencode(directory) in line and state != "Z" and int(path.name) != os.getpid():
            found[int(path.name)] = line.replace(b"\0", b" ").decode(errors="replace")
    return found


def wait_until_alone(directory, seconds):
    """Wait until no process works in the directory; raises `Fault` on timeout."""
    deadline = time.monotonic() + seconds
    while (left := processes(directory)) and time.monotonic() < deadline:
        time.sleep(0.05)
    insist(not left, f"left behind: {left}")
