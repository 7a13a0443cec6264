"""Helpers of the tests of wandb_logger: the part of a W&B server that its client needs, and readers of its files.

W&B's own reader is ``wandb-core``: `wandb sync` reads a file with it and sends the content to the server. The Python
reader that W&B had up to 0.24 was removed.
"""

import asyncio
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from evsys_adapters import WandbLoggerCallback
from evsys_adapters.wandb_files.records import Records
from evsys_bus.codec import decode
from evsys_bus.delivery.callback_receiver import CallbackReceiver
from evsys_bus.diagnostics import FaultLog
from evsys_bus.events import Envelope, StepEnd
from evsys_bus.journal import JournalReader
from support import loggers
from support.http_server import HttpServer
from support.programs import running_processes

KEY = "a" * 40


class WandbServer(HttpServer):
    """The part of W&B that its own client needs; responds with ``status`` while that is an error.

    While ``listens`` is not set it accepts connections and does not respond.
    """

    def __init__(self):
        super().__init__()
        self.status = 200
        self.refusal = None
        """The error message with which it refuses every run; None accepts them."""
        self.request_count = 0
        self.lines = {}
        self.runs = {}
        self.files = {}
        self.summary = {}
        self.exit_codes = {}
        """The exit codes of the runs that have ended."""
        self.line_counts = {}
        """Lines received per run, including repeated ones."""
        self.listens = threading.Event()
        self.listens.set()
        self.lock = threading.Lock()

    def rows(self, run):
        """Return the history of a run as it was sent."""
        found = self.lines.get(run, {})
        return [json.loads(found[number]) for number in sorted(found)]

    def respond(self, request):
        self.listens.wait()
        with self.lock:
            self.request_count += 1
            reply = self._result_of(request.path, request.body) if self.status == 200 else {"error": "not today"}
            return self.status, json.dumps(reply).encode(), {"Content-Type": "application/json"}

    def stop(self):
        self.listens.set()
        super().stop()

    def _result_of(self, path, body):
        if path.endswith("/file_stream"):
            files = json.loads(body).get("files", {})
            part = files.get("wandb-history.jsonl", {"content": []})
            if "wandb-summary.json" in files:
                self.summary = json.loads(files["wandb-summary.json"]["content"][0])
            run, variables = path.split("/")[-2], json.loads(body)
            if variables.get("complete"):
                self.exit_codes[run] = variables["exitcode"]
            self.line_counts[run] = self.line_counts.get(run, 0) + len(part["content"])
            lines = self.lines.setdefault(run, {})
            lines.update({part["offset"] + index: line for index, line in enumerate(part["content"])})
            return {}
        if path != "/graphql":
            self.files[path.removeprefix("/up/")] = body
            return {}
        query = json.loads(body)
        variables = query.get("variables") or {}
        if "upsertBucket" in query["query"] and self.refusal is not None:
            return {"errors": [{"message": self.refusal, "path": ["upsertBucket"]}], "data": {"upsertBucket": None}}
        if "upsertBucket" in query["query"]:
            self.runs.setdefault(variables["name"], []).append(variables)
            project = {"id": "cA==", "name": variables["project"], "entity": {"id": "ZQ==", "name": "team"}}
            description = {
                "name": variables["name"],
                "displayName": variables["displayName"],
                "config": "{}",
                "project": project,
            }
            bucket = {"id": "aWQ=", "description": None, "sweepName": None, "historyLineCount": 0, **description}
            return {"data": {"upsertBucket": {"inserted": True, "bucket": bucket}}}
        if "createRunFiles" in query["query"]:
            files = [{"name": name, "uploadUrl": f"{self.url}/up/{name}"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}}
        return {"data": {"serverInfo": {"features": []}, "viewer": {"id": "x", "entity": "team", "flags": "{}"}}}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Run a W&B server, and remove the W&B settings of the user who runs the test."""
    for name in [each for each in os.environ if each.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    server = WandbServer()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))  # for its logs
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    with server:
        yield server


@pytest.fixture
def login(server, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def wandb_files_of(folder):
    return sorted(folder.glob("**/wandb/offline-run-*/run-*.wandb"))


def sync_files(*files):
    """Run `wandb sync` in this process, so that wandb, which takes longest, is imported only once."""
    import wandb
    from wandb.cli import beta_sync

    empty_options = dict.fromkeys(("entity", "project", "run_id", "job_type", "replace_tags"), "")
    false_options = dict.fromkeys(("live", "dry_run", "skip_synced", "skip_online", "verbose"), False)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            beta_sync.sync(
                list(files), **empty_options, **false_options, skip_confirmation=True, parallelism=len(files)
            )
    finally:
        wandb.teardown()  # ends its service, because the next test has another server
    assert all(file.with_suffix(".wandb.synced").exists() for file in files), stderr.getvalue()
    assert "ERROR" not in stderr.getvalue(), stderr.getvalue()


def sync_by_command(*files):
    """Run the command that the fix of a warning recommends."""
    folders = [str(file.parent) for file in files]
    done = subprocess.run([sys.executable, "-m", "wandb", "sync", *folders], capture_output=True, text=True, check=True)
    assert "ERROR" not in done.stderr, done.stderr


def run_id_of(file):
    return file.stem.removeprefix("run-")


def metric_series(rows, section):
    """Return the points (step, value) of one section, by metric, sorted by step."""
    found = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(f"{section}/") and key != f"{section}/step" and f"{section}/step" in row:
                found.setdefault(key.removeprefix(f"{section}/"), []).append((row[f"{section}/step"], value))
    return {key: sorted(points, key=lambda point: point[0]) for key, points in found.items()}


def step_times(journal):
    """Return when each step of the journal was published, by run."""
    reader, found = JournalReader(journal), {}
    for stream in reader.streams():
        for record in reader.read(stream):
            envelope = decode(record.payload)
            if isinstance(envelope.event, StepEnd):
                run = envelope.run or Path(envelope.event.state.output_dir).name
                found.setdefault(run, {})[envelope.event.step_idx] = envelope.time
    return found


def is_same_series(one, other):
    """Return whether two series are the same; NaN equals NaN, and W&B has no negative zero."""
    return len(one) == len(other) and all(
        step == other_step and (value == other_value or (value != value and other_value != other_value))  # noqa: PLR0124 # NaN
        for (step, value), (other_step, other_value) in zip(one, other, strict=True)
    )


def records_in(file):
    """Return the records of a file with our own reader, which other tests compare with W&B's."""
    from wandb.proto.wandb_internal_pb2 import Record

    with file.open("rb") as opened:
        return [Record.FromString(payload) for payload, _ in Records().scan(opened)]


def rows_in(file):
    """Return the history of a file with our own reader."""
    rows = [each.history for each in records_in(file) if each.HasField("history")]
    return [{item.nested_key[0]: json.loads(item.value_json) for item in row.item} for row in rows]


class Run(loggers.Run):
    """A run logged by wandb_logger."""

    def __init__(self, folder, key="run", **params):
        super().__init__(WandbLoggerCallback("p", **{"mode": "offline", **params}), folder, key)

    @property
    def file(self):
        [file] = wandb_files_of(self.ctx.run_dir)
        return file


class LoggerDelivery:
    """Delivers to a logger like its courier, on the loop of the test; stores what it publishes and reports as owed."""

    def __init__(self, logger, stream="s", seq=0):
        self.logger, self.stream, self.seq = logger, stream, seq
        self.published_events, self.undelivered = [], (0, None, None)
        self.receiver = CallbackReceiver(logger, faults=FaultLog(), courier=self)

    def publish(self, event):
        self.published_events.append(event)

    def report_owed(self, adapter, events, why, fix):
        assert 0 <= events <= self.seq
        self.undelivered = (events, why, fix)

    async def __aenter__(self):
        await self.receiver.open(lambda problem: None)
        return self

    async def __aexit__(self, *exc):
        await self.receiver.close()
        await asyncio.sleep(0.2)

    async def deliver(self, *events, at=None):
        """Deliver these events, published one second apart from the time ``other_step``."""
        first_time = time.time() if at is None else at
        batch = []
        for offset, event in enumerate(events):
            self.seq += 1
            run = getattr(getattr(event, "ctx", None) or getattr(event, "state", None), "run_key", None)
            batch.append(Envelope(self.stream, self.seq, first_time + offset, event, run))
        await self.receiver.deliver(batch, [1] * len(batch))
        assert self.receiver.failures == 0
        return self.receiver.mark()

    async def wait_until(self, condition, seconds=20.0):
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.02)

    async def drain(self, seconds=30.0):
        """Close the logger as at the end of a courier; returns how long that took."""
        started = time.monotonic()
        self.logger.close()
        await self.logger.settle_owed(started + seconds)
        return time.monotonic() - started


def unused_url():
    """Return the URL of a server that is gone: connections are refused."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        return f"http://127.0.0.1:{gone.getsockname()[1]}"


def drain_logger(logger, seconds=30.0):
    """Close the logger as at the end of a bus."""
    logger.close()
    asyncio.run(logger.settle_owed(time.monotonic() + seconds))


def publish_all(bus, *events):
    for group in events:
        for event in group:
            bus.publish(event)


def find_wandb_processes(folder):
    """Return the command lines of the W&B processes that work on files in the folder or were started for one."""
    return [command for _, command in running_processes() if "wandb" in command and str(folder) in command]


def find_wandb_services():
    """Return the pids of running W&B services that were started by this worker of the test run."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,stat=,comm="], capture_output=True, text=True, check=True).stdout
    found = {line.split()[0] for line in listing.splitlines() if "wandb-core" in line and " Z" not in line}
    return {pid for pid in found if _is_from_this_worker(pid)}


def _is_from_this_worker(pid):
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return worker is None or f"PYTEST_XDIST_WORKER={worker}".encode() in environment
