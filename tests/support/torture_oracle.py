"""Checks of `torture.py` after a directory has been drained: the journal, and what reached the adapters."""

import csv
import hashlib
import json
import logging
import subprocess
import time
from collections import Counter
from itertools import pairwise

from evsys_bus import Checkpoint, StepEnd, TrainEnd, TrainStart
from evsys_bus.codec import decode
from evsys_bus.journal import JournalReader
from support.files import read_json_lines
from support.programs import EVSYS_BUS, processes_of
from support.violations import Violation, require

NUM_STEPS_BASE = 1_000_000
COMMAND_SECONDS = 60.0
TRACEBACK_EXIT_CODE = 1
"""Exit code of `evsys-bus` after an unexpected exception."""


def oldest_sequence(journal, stream):
    """Return the first sequence of the oldest segment of a stream; 0 if it has no segment."""
    names = sorted(path.stem for path in journal.glob(f"{stream}/*.seg"))
    return int(names[0].partition("-")[2]) if names else 0


class Expected:
    """The events that must have arrived, and those that may have, by life, kind and step."""

    def __init__(self):
        self.positions = {}
        """(life, kind, step) -> (stream, sequence), of all events seen in the journal or acknowledged as recorded."""
        self.first_steps = {}
        """Life -> its first step."""
        self.names = {}
        """(life, "checkpoint", step) -> the name of the checkpoint."""
        self.uncertain = set()
        """Events that the disk refused, still in memory when a life ended and counted by it as unrecorded."""
        self.acknowledged = 0

    def read(self, journal):
        """Return the events in the journal: (life, kind, step) -> (stream, sequence)."""
        recorded, reader = {}, JournalReader(journal)
        for stream in reader.streams():
            oldest = oldest_sequence(journal, stream)
            for record in reader.read(stream):
                if record.sequence < oldest:
                    continue  # a start that was carried over from a removed segment
                envelope = decode(record.payload)
                event = envelope.event
                if isinstance(event, TrainStart):
                    life = event.state.num_steps - NUM_STEPS_BASE
                    key = (life, "start", event.state.step)
                    self.first_steps[life] = event.state.step
                elif isinstance(event, StepEnd):
                    key = (int(event.metrics["life"]), "step", event.step_idx)
                elif isinstance(event, Checkpoint):
                    key = (int(event.row.name[4:7]), "checkpoint", event.row.batch)
                    self.names[key] = event.row.name
                elif isinstance(event, TrainEnd):
                    key = (event.state.num_steps - NUM_STEPS_BASE, "end", event.state.step)
                else:
                    continue
                require(
                    key not in recorded, f"{key} is recorded twice: {recorded.get(key)} and {(stream, record.sequence)}"
                )
                recorded[key] = (stream, record.sequence)
        return recorded

    def add_life(self, number, life, journal):
        """Add a finished life; each acknowledged event must be recorded, pruned by retention, or counted."""
        recorded = self.read(journal)
        lost = []
        for ack in life.acks:
            kind = ack["what"]
            key = (number, kind, ack["step"])
            if kind == "start":
                self.first_steps.setdefault(number, ack["step"])
            if kind == "checkpoint":
                self.names.setdefault(key, ack["name"])
            position = (ack["stream"], ack["seq"])
            self.acknowledged += 1
            if key in recorded:
                continue
            pruned = life.plan["retain_bytes"] is not None and position[1] < oldest_sequence(journal, position[0])
            counted = bool(ack["unrecorded"] or ack["lost"])
            if pruned:
                self.positions[key] = position
                if counted:
                    self.uncertain.add(key)
            elif not counted or life.unrecorded_at_end == 0:
                lost.append((key, position))
        self.positions |= recorded
        require(not lost, f"{len(lost)} acknowledged events are not recorded: {lost[:3]}")

    def rows(self):
        """Return step -> (value, place, whether it is required), each step as the last life that ran it has it."""
        rows = {}
        by_life = {}
        for (life, kind, step), position in self.positions.items():
            if kind == "step":
                by_life.setdefault(life, []).append((step, position, (life, kind, step) not in self.uncertain))
        lives = {life for life, *_ in self.positions}
        for life in sorted(lives):
            first = self.first_steps[life]
            for step in [each for each in rows if each >= first]:
                del rows[step]
            for step, position, required in sorted(by_life.get(life, [])):
                rows[step] = (float(life * 1000 + step % 1000), position, required)
        return rows


# -- what reached the adapters ----------------------------------------------------------------------------------------


def read_dead_letters(journal, name):
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


def compare_rows(what, expected, actual, is_excused):
    """Check that ``actual``, [(step, value)], are the rows wanted; ``excused(step)``: it may be missing."""
    duplicates = [step for step, count in Counter(step for step, _ in actual).items() if count > 1]
    require(not duplicates, f"{what}: {len(duplicates)} steps occur twice, such as {duplicates[:5]}")
    misordered = next((each for each in pairwise(actual) if each[0][0] > each[1][0]), None)
    require(misordered is None, f"{what}: out of order at {misordered}")
    values = dict(actual)
    unexpected = {step: value for step, value in values.items() if step not in expected or expected[step][0] != value}
    examples = [(step, value, expected.get(step)) for step, value in unexpected.items()][:3]
    require(not unexpected, f"{what}: {len(unexpected)} rows that no life published last, such as {examples}")
    missing = [
        step for step, (_, _, required) in expected.items() if required and step not in values and not is_excused(step)
    ]
    require(
        not missing, f"{what}: {len(missing)} of {len(expected)} rows are missing, from {missing[:3]} to {missing[-1:]}"
    )


def read_csv_rows(path):
    with path.open(newline="") as file:
        return [(int(row["step"]), float(row["value"])) for row in csv.DictReader(file)]


def read_jsonl_rows(path):
    rows = read_json_lines(path)
    return [(row["step"], row["value"]) for row in rows]


def read_tensorboard_rows(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.CRITICAL)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    if "train/value" not in events.Tags()["scalars"]:
        return []
    return [(each.step, each.value) for each in events.Scalars("train/value")]


def read_sink(path):
    """Return (stream, sequence) in the order of arrival, without lines truncated by a kill or a full disk."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    parts = [line.split() for line in lines if line.endswith(" .")]
    return [(part[0], int(part[1])) for part in parts if len(part) == 3 and part[1].isdigit()]


def check_sink(name, expected, path, is_excused):
    delivered = list(dict.fromkeys(read_sink(path)))
    lives = {position: key[0] for key, position in expected.positions.items()}
    order = [(lives[position], position[1]) for position in delivered if position in lives]
    misordered = next((each for each in pairwise(order) if each[0] > each[1]), None)
    require(misordered is None, f"sink {name}: out of order, (life, sequence) {misordered}")
    missing = (
        [
            key
            for key, position in expected.positions.items()
            if position not in set(delivered) and key not in expected.uncertain and not is_excused(key[0], position)
        ]
        if len(set(delivered)) < len(expected.positions)
        else []
    )
    require(not missing, f"sink {name} lacks {len(missing)} of {len(expected.positions)} events: {sorted(missing)[:3]}")


def check_checkpoints(expected, store, run_dir, dead_letters, *, latest_since):
    """Check the uploaded checkpoints, and ``latest.json`` if the newest one is of life ``latest_since`` or later."""
    manifests = {}
    for path in store.glob("run/*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifests[manifest["row"]["name"]] = path.parent.name
        for file in manifest["files"]:
            content = (path.parent / file["name"]).read_bytes()
            is_intact = (len(content), hashlib.sha256(content).hexdigest()) == (file["size"], file["sha256"])
            require(is_intact, f"{path.parent / file['name']} does not match its manifest")
    certain = expected.positions.keys() - expected.uncertain
    required = {key: name for key, name in expected.names.items() if key in certain}
    excused = {key for key in required if expected.positions[key][1] <= dead_letters.get(expected.positions[key][0], 0)}
    missing = [name for key, name in required.items() if name not in manifests and key not in excused]
    require(not missing, f"{len(missing)} of {len(required)} checkpoints are not in the store: {sorted(missing)[:3]}")
    newest = max(required.keys() - excused, default=None)
    if newest is not None and newest[0] >= latest_since:
        latest = json.loads((store / "run" / "latest.json").read_text())["checkpoint"]
        later = {manifests[name] for key, name in expected.names.items() if key >= newest and name in manifests}
        require(latest in later, f"latest names {latest}, and the newest is {manifests[required[newest]]}")
    for name, folder in manifests.items():
        source = run_dir / "checkpoints" / name / "state.bin"
        stored = next((store / "run" / folder).glob("state/**/state.bin"), None)
        require(
            stored is not None and stored.read_bytes() == source.read_bytes(), f"{name} differs from what was saved"
        )


def run_command(arguments, environment, *, seconds=COMMAND_SECONDS):
    """Run `evsys-bus`; returns exit code, stdout and stderr. It must end in time and without a traceback."""
    command = [EVSYS_BUS, *map(str, arguments)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise Violation(
                f"{' '.join(map(str, arguments))} has not ended after {seconds:g} s:\n{err[-1500:]}"
            ) from None
    require(
        process.returncode != TRACEBACK_EXIT_CODE,
        f"{' '.join(map(str, arguments))} ended with a traceback:\n{err[-3000:]}",
    )
    return process.returncode, out, err


def wait_until_no_processes(directory, seconds):
    """Wait until no process works in the directory; raises `Violation` on timeout."""
    deadline = time.monotonic() + seconds
    while (remaining := processes_of(directory)) and time.monotonic() < deadline:
        time.sleep(0.05)
    require(not remaining, f"left behind: {remaining}")
