"""Running couriers in tests, and reading what they left on disk."""

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.progress import read_progress
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.tasks import DeliveryStatus
from support.files import read_json_lines
from support.programs import processes_of


async def deliver(journal: str | Path, adapter: Any, policy: DeliveryPolicy | None = None, **options: Any) -> Courier:
    """Deliver everything pending, of all ranks, to an adapter named "it" unless ``name`` is given."""
    courier = Courier(journal, options.pop("name", "it"), adapter, policy or DeliveryPolicy(ranks=None), **options)
    courier.finish()
    await asyncio.wait_for(courier.run(), 10)
    return courier


def counted(courier: Courier) -> tuple[int, int, int]:
    """Return how many events a courier has delivered, rejected and left pending."""
    counts = courier.counts
    assert counts.recorded == counts.delivered + counts.dead + counts.pending
    return counts.delivered, counts.dead, counts.pending


def read_status(journal: str | Path, name: str = "it") -> DeliveryStatus:
    """Return the delivery status of the adapter with this name."""
    [status] = [each for each in read_progress(journal) if each.name == name]
    return status


def read_dead_letters(journal: str | Path, name: str = "it") -> list[Any]:
    """Return the dead letters of the adapter with this name."""
    return read_json_lines(Path(journal, "couriers", f"{name}.dead.jsonl"))


def courier_processes(folder: str | Path) -> list[int]:
    """Return the pids of the courier processes of the journals in a folder, which is on their command line."""
    return [pid for pid, command in processes_of(folder).items() if "courier_main" in command]


def kill_couriers(folder: str | Path) -> int:
    """Kill the courier processes of the journals in a folder; return how many there were."""
    killed = 0
    for pid in courier_processes(folder):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed
