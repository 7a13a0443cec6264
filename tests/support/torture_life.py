"""A process of `torture_trainer.py`, controlled by `torture.py`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

TRAINER = Path(__file__).with_name("torture_trainer.py")


class NotEndedError(Exception):
    """Raised when a process did not end in time and was killed."""


class Life:
    """One process of the trainer, called a life; later lives continue its run."""

    def __init__(self, scene, plan):
        self.plan = plan
        self.acks, self.entered, self.over = [], threading.Event(), threading.Event()
        self.stream = self.unrecorded_at_end = self.asked_at = self.raised = None
        self.stopped_seconds = 0.0
        number = plan["life"]
        file = scene.notes / f"plan-{number}.json"
        file.write_text(json.dumps(plan))
        self.log = scene.notes / f"stderr-{number}.txt"
        read, write = os.pipe()
        line = [*scene.prefix, sys.executable, str(TRAINER), str(file), str(write)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                line, env=scene.environment(), stdout=log, stderr=log, pass_fds=[write], start_new_session=True
            )
        os.close(write)
        self._thread = threading.Thread(target=self._listen, args=(read,), daemon=True)
        self._thread.start()

    def _listen(self, read):
        with os.fdopen(read, "rb") as pipe:
            for line in pipe:
                try:
                    said = json.loads(line)
                except ValueError:
                    continue  # cut short by a kill
                if said["what"] == "entered":
                    self.stream = said["stream"]
                    self.entered.set()
                elif said["what"] == "leaving":
                    self.asked_at = self.asked_at or time.monotonic()
                elif said["what"] == "left":
                    self.unrecorded_at_end = said.get("unrecorded")
                elif said["what"] == "raised":
                    self.raised = said
                else:
                    self.acks.append(said)
        self.over.set()

    @property
    def alive(self):
        return self.process.poll() is None

    def wait_entered(self, seconds):
        deadline = time.monotonic() + seconds
        while self.alive and time.monotonic() < deadline and not self.entered.wait(0.05):
            pass
        return self.entered.is_set()

    def send(self, number):
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def pause(self, seconds):
        """Wait for this time, or until the process ends."""
        deadline = time.monotonic() + seconds
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.01)

    def wait_end(self, seconds):
        """Wait until the process ends; on timeout kill it and raise `NotEndedError`."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            stacks = self._stacks()
            self.send(signal.SIGKILL)
            self.process.wait()
            late = f"life {self.plan['life']} had not ended {seconds:.0f} s after it should have: {stacks}"
            raise NotEndedError(late) from None
        finally:
            self._thread.join(10)

    def _stacks(self):
        found = []
        for task in Path(f"/proc/{self.process.pid}/task").glob("*"):
            with contextlib.suppress(OSError):
                found.append((task / "wchan").read_text() + " " + (task / "comm").read_text().strip())
        return found
