"""What the tests of wandb_logger share: a W&B server as far as its client asks for one, and readers of its files.

W&B's own reader is its ``wandb-core``: `wandb sync` reads a file with it, and sends what it read to the server. The
Python reader that W&B had up to 0.24 is gone.
"""

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from evsys_adapters import WandbLoggerCallback
from evsys_adapters._wandb_records import Records
from evsys_bus import LoopState, TrainingBatch
from evsys_bus.codec import decode
from evsys_bus.context import ArmResult, EvalResult, LogContext, LoopArtifacts, RunResult
from evsys_bus.journal import JournalReader

KEY = "a" * 40
COURIER = """
    import sys
    from evsys_adapters import WandbLoggerCallback
    from evsys_bus.delivery.courier import Courier
    from evsys_bus.delivery.followed import Terms
    from evsys_bus.tasks import run_alone
    courier = Courier(
        sys.argv[1], "wandb", WandbLoggerCallback("p", mode=sys.argv[2]), Terms(), slice_seconds=float(sys.argv[3])
    )
    if len(sys.argv) < 5:
        courier.finish()
    run_alone(courier.run)
"""


class WandbServer(ThreadingHTTPServer):
    """As much of W&B as its own client asks for; answers with ``status`` as long as that is an error."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.status = 200
        self.asked = 0
        self.lines = {}
        self.runs = {}
        self.files = {}
        self.summary = {}
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def rows(self, run):
        """The history of a run, as it was sent."""
        found = self.lines.get(run, {})
        return [json.loads(found[number]) for number in sorted(found)]

    def answer(self, path, body):
        if path.endswith("/file_stream"):
            files = json.loads(body).get("files", {})
            part = files.get("wandb-history.jsonl", {"content": []})
            if "wandb-summary.json" in files:
                self.summary = json.loads(files["wandb-summary.json"]["content"][0])
            lines = self.lines.setdefault(path.split("/")[-2], {})
            lines.update({part["offset"] + index: line for index, line in enumerate(part["content"])})
            return {}
        if path != "/graphql":
            self.files[path.removeprefix("/up/")] = body
            return {}
        asked = json.loads(body)
        said = asked.get("variables") or {}
        if "upsertBucket" in asked["query"]:
            self.runs.setdefault(said["name"], []).append(said)
            project = {"id": "cA==", "name": said["project"], "entity": {"id": "ZQ==", "name": "team"}}
            named = {"name": said["name"], "displayName": said["displayName"], "config": "{}", "project": project}
            bucket = {"id": "aWQ=", "description": None, "sweepName": None, "historyLineCount": 0, **named}
            return {"data": {"upsertBucket": {"inserted": True, "bucket": bucket}}}
        if "createRunFiles" in asked["query"]:
            files = [{"name": name, "uploadUrl": f"{self.url}/up/{name}"} for name in said["files"]]
            return {"data": {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}}
        return {"data": {"serverInfo": {"features": []}, "viewer": {"id": "x", "entity": "team", "flags": "{}"}}}


class Answers(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        with self.server.lock:
            self.server.asked += 1
            status = self.server.status
            reply = self.server.answer(self.path, body) if status == 200 else {"error": "not today"}
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_PUT = do_GET = do_POST  # noqa: N815 # http.server's names


def served(folder, monkeypatch):
    """W&B, here; and no trace of an account of whoever runs the test."""
    for name in [each for each in os.environ if each.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    server = WandbServer()
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_DIR", str(folder))  # for its logs
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def files_of(folder):
    return sorted(folder.glob("**/wandb/offline-run-*/run-*.wandb"))


def sync(*files):
    """W&B's own reader at work."""
    folders = [str(file.parent) for file in files]
    done = subprocess.run([sys.executable, "-m", "wandb", "sync", *folders], capture_output=True, text=True, check=True)
    assert "ERROR" not in done.stderr, done.stderr
    return done


def id_of(file):
    return file.stem.removeprefix("run-")


def series(rows, head):
    """Every value of one stream of rows, by metric: (step, value), in order of steps."""
    found = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(f"{head}/") and key != f"{head}/step" and f"{head}/step" in row:
                found.setdefault(key.removeprefix(f"{head}/"), []).append((row[f"{head}/step"], value))
    return {key: sorted(points, key=lambda point: point[0]) for key, points in found.items()}


def same(one, other):
    """Whether two series are the same; NaN is NaN, and W&B has no negative zero."""
    return len(one) == len(other) and all(
        step == at and (value == found or (value != value and found != found))  # noqa: PLR0124 # NaN
        for (step, value), (at, found) in zip(one, other, strict=True)
    )


def records_in(file):
    """Its records, by our own reader: what that is worth, the tests with W&B's show."""
    records = Records()
    with file.open("rb") as opened:
        return [records._messages.Record.FromString(payload) for payload, _ in records.scan(opened)]


def rows_in(file):
    """The history, read as above."""
    rows = [each.history for each in records_in(file) if each.HasField("history")]
    return [{item.nested_key[0]: json.loads(item.value_json) for item in row.item} for row in rows]


def recorded(journal):
    """What the journal's steps and evals hold, by run, stream and metric."""
    reader, found = JournalReader(journal), {}
    for stream in reader.streams():
        for record in reader.read(stream):
            envelope = decode(record.payload)
            event = envelope.event
            head = {"StepEnd": "train", "Eval": f"eval/{getattr(event, 'eval_name', '')}"}.get(type(event).__name__)
            for key, value in event.metrics.items() if head else ():
                found.setdefault((envelope.run, head), {}).setdefault(key, []).append((event.step_idx, value))
    return found


class Run:
    """One run, as a loop calls it."""

    def __init__(self, folder, key="run", logger=None, **params):
        self.ctx = LogContext(
            folder,
            config={"metadata": {"hypothesis": "It learns."}, "api_key": "secret-1"},
            run_key=key,
            run_config={"lr": 0.1, "token": "secret-2"},
            group_name="arms",
        )
        self.logger = logger or WandbLoggerCallback("p", **{"mode": "offline", **params})
        self.state = LoopState(step=0, num_steps=100, output_dir=folder / key, ctx=self.ctx)

    @property
    def file(self):
        [file] = files_of(self.ctx.run_dir)
        return file

    def start(self, step=0):
        self.state.step = step
        self.logger.on_run_start(self.ctx)
        self.logger.on_train_start(self.state)

    def step(self, step, **metrics):
        self.logger.on_step_end(self.state, step, TrainingBatch(), metrics)

    def eval(self, step, name="held out", **metrics):
        self.logger.on_eval(self.state, step, name, metrics)

    def benchmark(self, step, name="tasks", predictions=(), **metrics):
        result = EvalResult(name, metrics=metrics)
        self.logger.on_benchmark_eval(self.ctx, result, list(predictions), step=step)

    def end(self):
        self.logger.on_train_end(self.state, LoopArtifacts())
        self.logger.on_run_end(self.ctx, RunResult(), ArmResult("run"))


def publish(bus, *events):
    for some in events:
        for event in some:
            bus.publish(event)


def until(condition, seconds=12.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def processes(folder):
    """What is left of W&B's processes that work on files below the folder, or were started for one."""
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,stat=,args="], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if "wandb" in line and str(folder) in line and " Z" not in line]


def cores():
    """The services of W&B that run, by pid; of this worker of the test run, by what they inherited from it."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,stat=,comm="], capture_output=True, text=True, check=True).stdout
    found = {line.split()[0] for line in listed.splitlines() if "wandb-core" in line and " Z" not in line}
    return {pid for pid in found if _is_ours(pid)}


def _is_ours(pid):
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return worker is None or f"PYTEST_XDIST_WORKER={worker}".encode() in environment
