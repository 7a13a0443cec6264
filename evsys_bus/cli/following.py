"""One adapter beside a run, until the run is over: what ``evsys-bus follow`` does.

A run is over when nobody writes a stream of its journal any more.
"""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from evsys_bus.cli.adapter_choice import built
from evsys_bus.cli.deliveries import LOOK_SECONDS, Outcome, Watch, busy
from evsys_bus.cli.delivery_progress import Tell
from evsys_bus.cli.interrupts import Interrupts
from evsys_bus.delivery.crew import Crew
from evsys_bus.delivery.followed import Followed
from evsys_bus.delivery.roster import enlist, roster
from evsys_bus.errors import BadSpecError
from evsys_bus.journal import Cursor, Cursors, JournalReader, OsDisk, layout

STOP_SECONDS: Final = 5.0
"""How long it may take to end at its cursor."""


class Followup:
    """One adapter, delivered to in this process.

    Args:
        directory: The journal.
        followed: The adapter.
        from_start: Begin anew, whatever its cursor says.

    Raises:
        CourierBusyError: Another process delivers to it.
    """

    def __init__(self, directory: Path, followed: Followed, *, from_start: bool) -> None:
        self._directory = directory.absolute()
        self._reader = JournalReader(self._directory)
        if OsDisk().is_locked(layout.courier_file(str(self._directory), followed.name, "lock")):
            raise busy(self._directory, followed.name)
        enlist(str(self._directory), [followed])
        if from_start:
            self._begin_anew(followed.name)
        self._watch = Watch(self._directory, {followed.name})
        self._crew = Crew(str(self._directory), [followed], lambda _: built(followed))

    def run(self, timeout_seconds: float, tell: Tell) -> tuple[Outcome, bool]:
        """Deliver until the run is over; what came of it, and whether it was interrupted."""
        interrupted = False
        with Interrupts(lambda _: None):
            self._crew.start()
            try:
                self._go(timeout_seconds, tell)
            except KeyboardInterrupt:
                interrupted = True
            with suppress(KeyboardInterrupt):  # the second one: the cursor stays where it is
                self._crew.stop()
                self._crew.join(STOP_SECONDS)
        self._watch.look(os.getpid())
        [outcome] = self._watch.outcomes()
        return outcome, interrupted

    def _go(self, timeout_seconds: float, tell: Tell) -> None:
        over = False
        while self._crew.running:
            if not over and not any(map(self._reader.is_live, self._reader.streams())):
                over = True
                self._crew.finish()
                self._watch.count_from_now()
            tell(self._watch.look(os.getpid()))
            if over and self._watch.is_over(timeout_seconds):
                break
            time.sleep(LOOK_SECONDS)
        tell(self._watch.look(os.getpid()))

    def _begin_anew(self, name: str) -> None:
        disk = OsDisk()
        lock = disk.lock(layout.courier_file(str(self._directory), name, "lock"))
        if lock is None:
            raise busy(self._directory, name)
        try:
            Cursors(str(self._directory), disk).save(name, Cursor())
        finally:
            disk.close(lock)


def refuse_other(directory: Path, followed: Followed) -> None:
    """One name, one adapter.

    Raises:
        BadSpecError: Another adapter is followed under this name.
    """
    for each in roster(str(directory)):
        if each.name == followed.name and each.recipe != followed.recipe:
            raise BadSpecError(
                f'"{each.name}" is followed already, with other params',
                why="the name keys its cursor; what it has delivered went elsewhere",
                fix="give this one a name of its own: --name",
            )
