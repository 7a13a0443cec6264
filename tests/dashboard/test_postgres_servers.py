"""Servers of one database of PostgreSQL: one writes, another takes over, and a lost connection comes back."""

import os
import re
import signal
import subprocess
import time
from contextlib import ExitStack

import psycopg
import pytest

from support.database_places import put_in_postgres
from support.postgres import running_server
from support.programs import EVSYS_BUS
from support.running_dashboard import Trainer, running_dashboard

pytestmark = [pytest.mark.servers, pytest.mark.long, pytest.mark.timeout(60)]


def folders(tmp_path, url, count):
    """Folders of servers that share a database."""
    found = [tmp_path / f"server-{number}" for number in range(count)]
    for folder in found:
        folder.mkdir()
        put_in_postgres(folder, url)
    return found


def sent(dashboard, trainer, events, seconds=30.0):
    """Send a body as a client does, until it is acknowledged; return how often it was refused."""
    until, refused = time.monotonic() + seconds, 0
    after = trainer.sequence - len(events)
    while (answer := dashboard.ingest(trainer.stream, after, events)).status != 200:
        assert answer.status == 503, answer.body
        assert "retry-after" in answer.headers
        refused += 1
        assert time.monotonic() < until
        time.sleep(0.1)
    return refused


def points(dashboard, experiment="lr"):
    """Number of points of train/loss of an experiment's only run."""
    (row,) = [each for each in dashboard.get("/api/home")["experiments"] if each["name"] == experiment]
    header, _ = dashboard.charts(row["id"], {"metric": "train/loss"})
    return header["charts"][0]["total"]


def end_sessions(url):
    """End the sessions of all dashboards."""
    with psycopg.connect(url, autocommit=True) as session:
        session.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE application_name = 'evsys-bus dashboard'"
        )


def test_a_lost_connection_is_opened_again_and_nothing_acknowledged_is_lost(tmp_path, postgres):
    url = postgres.create_schema()
    (folder,) = folders(tmp_path, url, 1)
    trainer = Trainer()
    with running_dashboard(folder) as dashboard:
        sent(dashboard, trainer, trainer.start() + trainer.steps(100))
        for _ in range(2):
            end_sessions(url)
            sent(dashboard, trainer, trainer.steps(100))
        assert points(dashboard) == 300


def test_a_server_of_postgres_that_crashes_and_starts_again_is_waited_for(tmp_path):
    with running_server() as postgres:
        (folder,) = folders(tmp_path, postgres.url(), 1)
        trainer = Trainer()
        with running_dashboard(folder) as dashboard:
            sent(dashboard, trainer, trainer.start() + trainer.steps(100))
            postgres.stop(signal.SIGQUIT)
            answer = dashboard.ingest(trainer.stream, trainer.sequence, [])
            assert (answer.status, "cannot be reached" in answer.body.decode()) == (503, True)
            postgres.start()
            sent(dashboard, trainer, trainer.steps(100))
            assert points(dashboard) == 200


def test_a_second_server_reads_and_takes_over_when_the_first_one_ends(tmp_path, postgres):
    first, second = folders(tmp_path, postgres.create_schema(), 2)
    trainer = Trainer()
    with ExitStack() as servers:
        with running_dashboard(first) as writer:
            sent(writer, trainer, trainer.start() + trainer.steps(100))
            standby = servers.enter_context(running_dashboard(second))
            answer = standby.ingest(trainer.stream, trainer.sequence, [])
            assert (answer.status, "only reads" in answer.body.decode()) == (503, True)
            sent(writer, trainer, trainer.steps(100))
            assert points(standby) == 200
        sent(standby, trainer, trainer.steps(100))
        assert points(standby) == 300


def test_a_second_server_shows_what_the_first_one_stores(tmp_path, postgres):
    first, second = folders(tmp_path, postgres.create_schema(), 2)
    trainer = Trainer()
    with running_dashboard(first) as writer:
        sent(writer, trainer, trainer.start() + trainer.steps(3000))
        with running_dashboard(second) as reader:
            assert reader.get("/health")["store"] == writer.get("/health")["store"]
            assert points(reader) == 3000
            other = Trainer("b-s0", root="/runs/other")
            with reader.live() as view:
                view.send('{"subscribe": [{"topic": "home", "frame": null}]}')
                sent(writer, other, other.start() + other.steps(10))
                while b"other" not in (frame := view.recv(20)):
                    assert frame
            sent(writer, trainer, trainer.steps(50) + trainer.end())
            names = [row["name"] for row in writer.get("/api/home")["experiments"]]
            assert [row["name"] for row in reader.get("/api/home")["experiments"]] == names
            assert points(reader, "lr") == points(writer, "lr") == 3050


def test_a_user_who_may_only_read_has_a_server_that_only_reads(tmp_path, postgres):
    url = postgres.create_schema()
    schema = re.search("test_[0-9a-f]+", url)[0]
    reader_url = url.replace("postgres@", f"{schema}@", 1)
    first, second = folders(tmp_path, url, 2)
    put_in_postgres(second, reader_url)
    trainer = Trainer()
    with running_dashboard(first) as writer:
        sent(writer, trainer, trainer.start() + trainer.steps(100))
        with psycopg.connect(url, autocommit=True) as session:
            session.execute(f"CREATE ROLE {schema} LOGIN")
            session.execute(f"GRANT USAGE ON SCHEMA {schema} TO {schema}")
            session.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {schema}")
    with running_dashboard(second) as reader:
        assert points(reader) == 100
        time.sleep(1.5)  # it does not take over
        answer = reader.ingest(trainer.stream, trainer.sequence, [])
        assert (answer.status, "only reads" in answer.body.decode()) == (503, True)
        assert points(reader) == 100


def test_the_command_opens_a_database_by_its_url(tmp_path, postgres):
    url = postgres.create_schema()
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "PGPASSWORD": "s3cret"}
    command = [EVSYS_BUS, "dash", "--no-browser", "--port", "0", "--db"]
    with subprocess.Popen(
        [*command, url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        assert "http://127.0.0.1:" in process.stdout.readline()
        status = subprocess.run([EVSYS_BUS, "dash", "--status"], capture_output=True, text=True, env=env, check=False)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert url in status.stdout + status.stderr
    assert "s3cret" not in out + err + status.stdout + status.stderr
    refused = subprocess.run(
        [*command, "postgresql://u:s3cret@127.0.0.1/x"], capture_output=True, text=True, env=env, check=False
    )
    assert refused.returncode != 0
    assert "PGPASSWORD" in re.sub(r"\s+", " ", refused.stderr)
    assert "s3cret" not in refused.stdout + refused.stderr
