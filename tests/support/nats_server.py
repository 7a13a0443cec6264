"""A real nats-server with JetStream, on a free port of the loopback interface, with its store in a folder."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import pytest

PROGRAM = shutil.which("nats-server", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")


class NatsServer:
    """A server that can be killed and started again, with the same port and store.

    Args:
        folder: Where its configuration, its log and its store are.
        settings: Further lines of the configuration.
    """

    def __init__(self, folder: Path, settings: str = "") -> None:
        self.folder = folder
        self.settings = settings
        self.process: subprocess.Popen | None = None
        folder.mkdir(parents=True, exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> Self:
        """Start it, and wait until it takes connections."""
        config = self.folder / "server.conf"
        config.write_text(
            f'listen: "127.0.0.1:{self.port}"\nlog_file: "{self.folder}/log"\n'
            f'jetstream {{ store_dir: "{self.folder}/store", max_file_store: 4GB }}\n{self.settings}\n',
            encoding="utf-8",
        )
        self.process = subprocess.Popen([PROGRAM, "-c", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                assert self.process.poll() is None, (self.folder / "log").read_text(encoding="utf-8")[-2000:]
                assert time.monotonic() < deadline, "nats-server does not answer"
                time.sleep(0.01)
            else:
                return self

    def kill(self) -> None:
        """End it at once."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def __enter__(self) -> Self:
        if PROGRAM is None:
            pytest.skip("nats-server is not installed")
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
