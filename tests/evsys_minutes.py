"""Faults of EvSys' API for a minute each: killed, hanging, refusing, cutting connections, losing responses.

usage: uv run python tests/evsys_minutes.py [--seconds 60]

All faults run at once, each with its own server and program, which trains during the fault and then ends; then
`evsys-bus sync` delivers what is pending, and everything must have arrived once. The long form of
tests/adapters/test_evsys_troubles.py.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from adapters import test_evsys_troubles as troubles
from support import evsys_server as evsys
from support.programs import EVSYS_BUS

RESPONSES = {
    "answers 429, Retry-After 1": lambda: evsys.error_response(429, Retry_After="1"),
    "answers 500": lambda: evsys.error_response(500),
    "answers HTML": lambda: evsys.html_response(200),
    "hangs": lambda: "hang",
    "cuts connections": lambda: "cut",
}
FAULTS = [*RESPONSES, "answers 401", "is killed", "loses replies", "none"]


def train(folder, url):
    """Publish an experiment and print the median microseconds of a publish."""
    from evsys_bus import EventBus, build_callbacks

    os.environ |= {"EVSYS_API_URL": url, "EVSYS_API_KEY": evsys.KEY}
    durations = []
    callbacks = build_callbacks([{"kind": "evsys_logger", "params": {"timeout_seconds": 5}}])
    with EventBus(callbacks, journal=folder / "journal", drain_timeout=1, linger_seconds=0.5) as bus:

        class TimedBus:
            @staticmethod
            def publish(event):
                started = time.perf_counter()
                bus.publish(event)
                durations.append(time.perf_counter() - started)
                time.sleep(0.02)

        troubles.publish_experiment(TimedBus, folder)
    print(json.dumps(statistics.median(durations) * 1e6))


def run_fault(name, seconds, folder, results):
    """Run one fault, starting before the program; then end the fault and sync until nothing is pending."""
    with evsys.EvsysServer() as server:
        url, deadline = server.url, time.monotonic() + seconds
        if name in RESPONSES:
            server.fault = lambda op, args: RESPONSES[name]() if time.monotonic() < deadline else None
        elif name == "loses replies":
            lost = set()

            def should_drop_reply(op, args):
                key = json.dumps([op, args], sort_keys=True)
                first = key not in lost
                lost.add(key)
                return first and time.monotonic() < deadline

            server.should_drop_reply = should_drop_reply
        elif name == "answers 401":
            server.keys = set()
        elif name == "is killed":
            server.stop()
        command = [sys.executable, __file__, "--train", str(folder), url]
        publish_microseconds = json.loads(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        )
        time.sleep(max(0.0, deadline - time.monotonic()))
        if name == "is killed":
            server.start()
        server.keys = {evsys.KEY}
        environment = os.environ | {"EVSYS_API_URL": url, "EVSYS_API_KEY": evsys.KEY}
        sync = [EVSYS_BUS, "sync", folder / "journal", "--timeout", "90"]
        for _ in range(5):
            done = subprocess.run(sync, env=environment, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
        try:
            troubles.all_there(server)
            results[name] = f"all there, once; publish {publish_microseconds:.0f} us; {server.request_count} requests"
        except AssertionError as error:
            results[name] = f"WRONG: {error} {done.stdout} {done.stderr}"


def main():
    """Print the result of each fault; the exit code is the number of failures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--train", nargs=2)
    arguments = parser.parse_args()
    if arguments.train:
        train(Path(arguments.train[0]), arguments.train[1])
        return 0
    results = {}
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        threads = []
        for name in FAULTS:
            folder = Path(root, name.replace(" ", "-"), "experiment")
            folder.mkdir(parents=True)
            thread = threading.Thread(target=run_fault, args=(name, arguments.seconds, folder, results))
            thread.start()
            threads.append(thread)
            stack.callback(thread.join)
        for thread in threads:
            thread.join()
    for name in FAULTS:
        print(f"the server {name}: {results.get(name, 'WRONG: it ended early')}")
    failure_count = sum(not results.get(name, "").startswith("all there") for name in FAULTS)
    print(
        f"{len(FAULTS) - failure_count} of {len(FAULTS)} as they should be, "
        f"after {arguments.seconds:g} s of faults each"
    )
    return failure_count


if __name__ == "__main__":
    sys.exit(main())
