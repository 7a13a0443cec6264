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

    def __init__(self, scenario, plan):
        self.plan = plan
        self.acks, self.entered, self.finished = [], threading.Event(), threading.Event()
        self.stream = self.unrecorded_at_end = self.exit_requested_at = self.raised_report = None
        self.stopped_seconds = 0.0
        number = plan["life"]
        file = scenario.notes / f"plan-{number}.json"
        file.write_text(json.dumps(plan))
        self.log = scenario.notes / f"stderr-{number}.txt"
        read, write = os.pipe()
        line = [*scenario.prefix, sys.executable, str(TRAINER), str(file), str(write)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                line, env=scenario.environment(), stdout=log, stderr=log, pass_fds=[write], start_new_session=True
            )
        os.close(write)
        self._thread = threading.Thread(target=self._listen, args=(read,), daemon=True)
        self._thread.start()

    def _listen(self, read):
        with os.fdopen(read, "rb") as pipe:
            for line in pipe:
                try:
                    message = json.loads(line)
                except ValueError:
                    continue  # cut short by a kill
                if message["what"] == "entered":
                    self.stream = message["stream"]
                    self.entered.set()
                elif message["what"] == "leaving":
                    self.exit_requested_at = self.exit_requested_at or time.monotonic()
                elif message["what"] == "left":
                    self.unrecorded_at_end = message.get("unrecorded")
                elif message["what"] == "raised":
                    self.raised_report = message
                else:
                    self.acks.append(message)
        self.finished.set()

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

    def run_for(self, seconds):
        """Wait for this time, or until the process ends."""
        deadline = time.monotonic() + seconds
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.01)

    def wait_exit(self, seconds):
        """Wait until the process ends; on timeout kill it and raise `NotEndedError`."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            stacks = self._stacks()
            self.send(signal.SIGKILL)
            self.process.wait()
            message = f"life {self.plan['life']} had not ended {seconds:.0f} s after it should have: {stacks}"
            raise NotEndedError(message) from None
        finally:
            self._thread.join(10)

    def _stacks(self):
        stacks = []
        for task in Path(f"/proc/{self.process.pid}/task").glob("*"):
            with contextlib.suppress(OSError):
                stacks.append((task / "wchan").read_text() + " " + (task / "comm").read_text().strip())
        return stacks
