"""Running couriers in tests, and reading what they left on disk."""

import asyncio
import subprocess
from pathlib import Path
from typing import Any

from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.progress import read_progress
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.tasks import DeliveryStatus
from support.files import read_json_lines


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


def courier_processes(journal: str | Path) -> list[int]:
    """Return the pids of a journal's courier processes, found by their command line; zombies do not count."""
    listing = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,stat=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(maxsplit=2) for line in listing.stdout.splitlines()]
    return [int(pid) for pid, stat, line in rows if "courier_main" in line and str(journal) in line and "Z" not in stat]
