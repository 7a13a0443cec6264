"""The adapters of `simulation.py`: how each is built in a process, what its files contain, and what they should."""

import asyncio
import csv
import functools
import json
import re
from random import Random

from simulated_machine import JOURNAL, NUMBER_FRACTION, ROOT

from evsys_adapters.csv_metrics import CsvMetricsCallback
from evsys_adapters.local_logger import LocalLoggerCallback
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.disk import use_disk
from evsys_bus.errors import RetryLaterError
from evsys_bus.testing import MachineStopped
from support.violations import Violation

RESTART_SECONDS = 5.0
"""Delay before a courier restarts after its hook raised `RetryLaterError`; the same as in `CourierPool`."""


def place_in_process(kind, process, *args, **params):
    """Make an adapter of this class that does all its work in this process."""

    class ProcessAdapter(kind):
        def __getattribute__(self, name):
            attribute = super().__getattribute__(name)
            if not (name.startswith("on_") or name in {"mark", "rewind", "close"}) or not callable(attribute):
                return attribute

            @functools.wraps(attribute)
            def call(*args, **kwargs):
                with use_disk(process):
                    return attribute(*args, **kwargs)

            return call

    ProcessAdapter.__name__ = ProcessAdapter.__qualname__ = kind.__name__
    with use_disk(process):
        return ProcessAdapter(*args, **params)


def read_row_numbers(disk, path, number_in):
    """Return the event number of each row of a file; None for a line torn by a power cut.

    Args:
        disk: The disk of the file.
        path: The file.
        number_in: Returns the number in a complete line; raises ValueError or LookupError if there is none.
    """
    rows = []
    for line in bytes(disk.contents(path)).splitlines(keepends=True):
        try:
            value = float(number_in(line.decode()))
            if not line.endswith(b"\n") or int(value) + NUMBER_FRACTION != value:
                raise ValueError(line)
        except (ValueError, LookupError):
            rows.append(None)
        else:
            rows.append(int(value))
    return rows


class CsvKind:
    """`csv_metrics`."""

    rows = ("step",)

    def __init__(self, number):
        self._label = f"csv{number}"

    def __call__(self, process):
        return place_in_process(CsvMetricsCallback, process, "{run_dir}/" + self._label + ".csv")

    def read_files(self, disk, run, rank):
        """Return the event numbers in each file of the run, by kind of row, then by path."""
        prefix = f"{ROOT}/{run}/{self._label}"
        paths = [path for path in disk.paths() if path.startswith(prefix) and path.endswith(".csv")]
        return {"step": {path: self._rows(disk, path) for path in paths}}

    def _rows(self, disk, path):
        columns = bytes(disk.contents(path)).partition(b"\n")[0].decode().split(",")
        return read_row_numbers(disk, path, lambda line: next(csv.reader([line]))[columns.index("number")])[1:]


class JsonlKind:
    """`local_logger`."""

    rows = ("step", "eval")

    def __init__(self, number):
        del number

    def __call__(self, process):
        return place_in_process(LocalLoggerCallback, process, print_every=0)

    def read_files(self, disk, run, rank):
        """Return the event numbers in each file of the run, by kind of row, then by path."""
        folder = f"{ROOT}/{run}/rank{rank}" if rank else f"{ROOT}/{run}"
        found = {}
        for row_kind, folder_name in (("step", "training"), ("eval", "validation")):
            pattern = re.compile(f"{folder}/logs(-[0-9]+)?/{folder_name}/[^.]+[.]jsonl")
            paths = [path for path in disk.paths() if pattern.fullmatch(path)]
            found[row_kind] = {
                path: read_row_numbers(disk, path, lambda line: json.loads(line)["number"]) for path in paths
            }
        return found


KINDS = {"csv": CsvKind, "jsonl": JsonlKind}


class SimulatedSubscription:
    """One subscription by its name, and its couriers through all their lives."""

    def __init__(self, simulation, name, group):
        self.simulation, self.name, self.group = simulation, name, group
        self.rng = Random(f"{simulation.seed} {name}")
        self.policy = DeliveryPolicy(group.ranks)
        self.is_removed = False
        self.is_ending = False
        """Whether the courier is to end."""
        self.task = self.courier = self.process = None

    def start_courier(self, process):
        self.process, self.is_ending = process, False
        self.courier = self._new_courier()
        self.task = asyncio.get_running_loop().create_task(self._deliver())

    def finish_courier(self):
        """End the courier when everything is delivered, without another restart."""
        self.is_ending = True
        self.courier.finish()

    def stop_courier(self):
        """End the courier now."""
        self.is_ending = True
        self.courier.stop()

    async def _deliver(self):
        """Run couriers one after the other, each from the position of the previous one, as `CourierPool` does.

        Raises:
            RetryLaterError: A hook raised it while the courier was ending.
        """
        while True:
            try:
                return await self.courier.run()
            except RetryLaterError as error:
                self.simulation.machine.count_fault("courier restarted", self.name, error)
                self._check_failures()
                if self.is_ending:
                    raise
            await asyncio.sleep(RESTART_SECONDS)
            if self.is_ending:
                return None
            self.courier = self._new_courier()

    def _new_courier(self):
        self.simulation.machine.note("courier starts", self.name)
        return self.make_courier(self.process, self.rng.choice((0.2, 1.0)))

    def make_courier(self, process, poll_seconds=1.0):
        """Make a courier in this process, as `CourierPool` does."""
        adapter = self.group.kind(process)
        adapter.spec_name = self.name
        clock = self.simulation.machine.clock
        return Courier(JOURNAL, self.name, adapter, self.policy, disk=process, clock=clock, poll_seconds=poll_seconds)

    def kill_courier(self):
        if self.task is not None:
            self.process.kill()
            self.task.cancel()

    async def wait_for_courier(self):
        """Wait for the courier, and check that it ended without an unexpected error."""
        if self.task is None:
            return
        await asyncio.wait([self.task])
        task, self.task = self.task, None
        error = None if task.cancelled() else task.exception()
        self.simulation.machine.note("courier ended", self.name, repr(error))
        if error is not None and not isinstance(error, (MachineStopped, OSError, RetryLaterError)):
            raise Violation(f"the courier of {self.name} ended with {error!r}") from error
        self._check_failures()

    def _check_failures(self):
        counts = self.courier.failure_counts
        if self.process.alive and (counts.failures or counts.task_failures):
            raise Violation(f"{self.name} failed: {counts.last_failure}")


class SubscriptionGroup:
    """The subscriptions that share an output: one, or several after a rename or a duplication."""

    def __init__(self, kind, number, ranks):
        self.kind = KINDS[kind](number)
        self.label = f"{kind}{number}"
        self.ranks = ranks
        self.excused = set()
        """Numbers of events that may be missing: pruned before the registration, or in a file that was removed."""
        self.is_registered = False
        """Whether one of its subscriptions was registered, so that retention waits for it."""
        self.may_split_files = False
        """Whether rows may be in several files, after a rename, a duplication or the loss of a cursor."""

    def serves(self, record):
        """Return whether the event is for these subscriptions."""
        return self.ranks is None or record.rank in self.ranks


class ExpectedRows:
    """The expected rows of one output of one run and rank, by the rules of the README.

    Rows are in the order of publication. A start of training at a step removes the rows of that step and of later ones;
    a repeated eval replaces the earlier one.
    """

    def __init__(self, row_kind):
        self._row_kind = row_kind
        self.rows = {}
        """Event number -> whether its row is required."""
        self._keys = {}

    def add(self, record, required):
        if record.kind == "start":
            for number in [each for each, (_, step, _) in self._keys.items() if step >= record.step]:
                if required:
                    self._drop(number)
                else:
                    self.rows[number] = False
        elif record.kind == self._row_kind:
            key = (record.kind, record.step, record.name)
            if record.kind == "eval":
                for number in [each for each, other_key in self._keys.items() if other_key == key]:
                    if required:
                        self._drop(number)
                    else:
                        self.rows[number] = False
            self.rows[record.number] = required
            self._keys[record.number] = key

    def _drop(self, number):
        del self.rows[number], self._keys[number]
