"""A PostgreSQL server for tests: in a new directory, with a socket there, as long as a process needs it."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import psycopg

_FLAGS = ["-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=50", "-c", "shared_buffers=32MB"]
"""Tests kill no machine."""


def programs() -> Path | None:
    """The directory of PostgreSQL's programs, None if this machine has none."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda each: int(each.parent.name), default=None)


class PostgresServer:
    """A server of its own. It refuses to run as root: then ``nobody`` runs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._user: dict[str, object] = {}
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        self._run("initdb", "--pgdata", "data", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-sync")

    def start(self) -> None:
        """Start it, and return when it answers."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program("postgres"), "-D", "data", "-k", str(self.folder), *_FLAGS],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                **self._user,
            )
        while self._process.poll() is None:
            try:
                self.connect().close()
            except psycopg.OperationalError:
                time.sleep(0.02)
                continue
            return
        raise RuntimeError((self.folder / "log").read_text()[-2000:])

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it, by default at once and in order; SIGQUIT is a crash."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(20)
            self._process = None

    def connect(self) -> "psycopg.Connection":
        """A session of the superuser."""
        return psycopg.connect(self.url(), autocommit=True, connect_timeout=5)

    def url(self, schema: str = "public", user: str = "postgres") -> str:
        """The URL of a schema."""
        return (
            f"postgresql://{user}@/postgres?host={quote(str(self.folder), safe='')}"
            f"&options={quote(f'-csearch_path={schema}', safe='')}"
        )

    def create_schema(self) -> str:
        """The URL of a new schema."""
        schema = f"test_{uuid.uuid4().hex}"
        with self.connect() as session:
            session.execute(f"CREATE SCHEMA {schema}")
        return self.url(schema)

    def _run(self, program: str, *args: str) -> None:
        subprocess.run(
            [self._program(program), *args], cwd=self.folder, check=True, stdout=subprocess.DEVNULL, **self._user
        )

    def _program(self, name: str) -> str:
        folder = programs()
        assert folder is not None
        return str(folder / name)


@contextmanager
def running_server() -> Iterator[PostgresServer]:
    """A server that runs within the block."""
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # the path of a socket has 107 bytes at most
    try:
        server = PostgresServer(folder)
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
