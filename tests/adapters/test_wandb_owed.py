"""wandb_logger online: what the server has not confirmed is owed, with reason and fix, and is sent later, once."""

import asyncio
import json
import os
import subprocess
import sys
import time

import pytest

from evsys_adapters import WandbLoggerCallback
from evsys_bus import Eval, EventBus, LoopState, RunEnd, RunStart, StepEnd, TrainEnd, TrainingBatch, TrainStart
from evsys_bus.context import ArmResult, LogContext, LoopArtifacts, RunResult
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.tasks import run_in_new_loop
from support import TESTS
from support import wandb_server as wandb
from support.waiting import wait_until

server = wandb.server
pytestmark = [pytest.mark.servers, pytest.mark.long]

STEPS = 5


class Trained:
    """The events of one run."""

    def __init__(self, folder, key="red"):
        self.ctx = LogContext(folder, run_key=key, run_config={"lr": 0.5})
        self.state = LoopState(step=0, num_steps=None, output_dir=folder / key, ctx=self.ctx)

    def starts(self):
        return [RunStart(self.ctx), TrainStart(self.state)]

    def steps(self, first=0, last=STEPS, **metrics):
        return [StepEnd(self.state, n, TrainingBatch(), {"kl": n / 8, **metrics}) for n in range(first, last)]

    def ends(self):
        return [TrainEnd(self.state, LoopArtifacts()), RunEnd(self.ctx, RunResult(), ArmResult("red"))]

    def whole(self):
        return [*self.starts(), *self.steps(), *self.ends()]


def logged_in(monkeypatch, key=wandb.KEY):
    monkeypatch.setenv("WANDB_API_KEY", key)


def points(steps=STEPS):
    return [(n, n / 8) for n in range(steps)]


def sent(server, file):
    """The points of the run that the server has; that none came twice."""
    return wandb.metric_series(server.rows(wandb.run_id_of(file)), "train")["kl"]


def test_without_a_login_all_is_owed_with_the_fix_and_a_later_login_sends_it_once(tmp_path, server, monkeypatch):
    run = Trained(tmp_path)

    async def first_day():
        async with wandb.LoggerDelivery(WandbLoggerCallback("p")) as delivery:
            mark = await delivery.deliver(*run.whole())
            await delivery.wait_until(lambda: delivery.undelivered[0])
            assert delivery.undelivered == (9, "no login", "run: wandb login (or set WANDB_API_KEY)")
            assert await delivery.drain() < 1
            assert delivery.undelivered == (9, "no login", "run: wandb login (or set WANDB_API_KEY)")
        return mark

    async def second_day(mark):
        async with wandb.LoggerDelivery(WandbLoggerCallback("p"), seq=9) as delivery:
            delivery.receiver.rewind(mark)
            assert delivery.undelivered[0] == 9
            await delivery.drain()
            assert delivery.undelivered == (0, None, None)
            return delivery.receiver.mark(), [each.extras["wandb_url"] for each in delivery.published_events]

    mark = asyncio.run(first_day())
    assert not server.request_count
    logged_in(monkeypatch)
    mark, urls = asyncio.run(second_day(mark))
    [file] = wandb.wandb_files_of(tmp_path)
    assert sent(server, file) == points()
    assert server.exit_codes == {wandb.run_id_of(file): 0}
    assert urls == [f"{server.url}/team/p/runs/{wandb.run_id_of(file)}"]
    asked = server.request_count
    assert asyncio.run(second_day_again(mark)) == (0, None, None)
    assert server.request_count == asked


async def second_day_again(mark):
    async with wandb.LoggerDelivery(WandbLoggerCallback("p"), seq=9) as delivery:
        delivery.receiver.rewind(mark)
        await delivery.drain()
        return delivery.undelivered


@pytest.mark.parametrize(
    ("key", "status", "why", "fix"),
    [
        (wandb.KEY, "entity crimson not found during upsertBucket", "entity crimson not found", "entity and project"),
        ("short", 200, "WANDB_API_KEY is invalid", "wandb login"),
        (wandb.KEY, 401, "refuses the API key", "wandb login --relogin"),
        (wandb.KEY, 403, "refuses access", "entity and project"),
        (wandb.KEY, 404, "entity or the project", "entity and project"),
    ],
)
def test_what_a_person_has_to_mend_is_said_and_settling_does_not_wait_for_it(
    tmp_path, server, monkeypatch, key, status, why, fix
):
    logged_in(monkeypatch, key)
    if isinstance(status, int):
        server.status = status
    else:
        server.refusal = status

    async def day():
        async with wandb.LoggerDelivery(WandbLoggerCallback("p")) as delivery:
            await delivery.deliver(*Trained(tmp_path).whole())
            await delivery.wait_until(lambda: delivery.undelivered[1])
            assert delivery.undelivered[0] == 9
            assert why in delivery.undelivered[1]
            assert fix in delivery.undelivered[2]
            assert await delivery.drain(60) < 20
            assert delivery.undelivered[0] == 9
            logged_in(monkeypatch)
            server.status, server.refusal = 200, None
            await delivery.drain()
            assert delivery.undelivered == (0, None, None)

    asyncio.run(day())
    [file] = wandb.wandb_files_of(tmp_path)
    assert sent(server, file) == points()


def test_an_outage_in_the_middle_is_owed_without_a_fix_and_passes_by_itself(tmp_path, server, monkeypatch):
    logged_in(monkeypatch)
    run = Trained(tmp_path)

    async def day():
        async with wandb.LoggerDelivery(WandbLoggerCallback("p")) as delivery:
            await delivery.deliver(*run.starts(), *run.steps(0, 2))
            await delivery.wait_until(lambda: len(server.rows(wandb.run_id_of(wandb.wandb_files_of(tmp_path)[0]))) == 2)
            await delivery.wait_until(lambda: delivery.undelivered == (0, None, None))
            server.status = 500
            await delivery.deliver(*run.steps(2))
            await delivery.wait_until(lambda: delivery.undelivered[1])
            assert delivery.undelivered[0] == 3
            assert "HTTP 500" in delivery.undelivered[1]
            assert delivery.undelivered[2] is None
            server.status = 200
            await delivery.wait_until(lambda: delivery.undelivered == (0, None, None))
            await delivery.deliver(*run.ends())
            await delivery.drain()
            assert delivery.undelivered == (0, None, None)

    asyncio.run(day())
    [file] = wandb.wandb_files_of(tmp_path)
    assert sent(server, file) == points()
    assert server.line_counts[wandb.run_id_of(file)] == STEPS


@pytest.mark.parametrize("silent", [True, False], ids=["no answer", "refused"])
def test_without_a_network_settling_ends_at_its_deadline_and_says_why(tmp_path, server, monkeypatch, silent):
    logged_in(monkeypatch)
    if silent:
        server.listens.clear()
    else:
        monkeypatch.setenv("WANDB_BASE_URL", wandb.unused_url())

    async def day():
        logger = WandbLoggerCallback("p", patience_seconds=0.5)
        async with wandb.LoggerDelivery(logger) as delivery:
            await delivery.deliver(*Trained(tmp_path).whole())
            await delivery.wait_until(lambda: delivery.undelivered[1])
            assert await delivery.drain(4) < 8
            assert delivery.undelivered[0] == 9
            assert "the server does not answer" in delivery.undelivered[1]
            assert delivery.undelivered[2] is None

    asyncio.run(day())


def test_wandbs_marker_is_not_believed_after_a_fatal_error_in_the_middle(tmp_path, server, monkeypatch):
    logged_in(monkeypatch)
    run = Trained(tmp_path)

    async def day():
        async with wandb.LoggerDelivery(WandbLoggerCallback("p")) as delivery:
            await delivery.deliver(*run.starts(), *run.steps(0, 1))
            await delivery.wait_until(lambda: server.lines)
            server.status = 403
            await delivery.deliver(*run.steps(1), *run.ends())
            await delivery.wait_until(lambda: delivery.undelivered[2])
            assert delivery.undelivered[0] >= 6
            server.status = 200
            await delivery.drain()
            assert delivery.undelivered == (0, None, None)

    asyncio.run(day())
    [file] = wandb.wandb_files_of(tmp_path)
    assert sent(server, file) == points()
    assert server.exit_codes == {wandb.run_id_of(file): 0}


def test_many_runs_are_settled_by_few_processes(tmp_path, server, monkeypatch):
    runs = [Trained(tmp_path, f"seed-{n}") for n in range(24)]

    async def first_day():
        async with wandb.LoggerDelivery(WandbLoggerCallback("p")) as delivery:
            mark = await delivery.deliver(*(event for run in runs for event in run.whole()))
            await delivery.drain()
            assert delivery.undelivered[0] == 24 * 9
        return mark

    async def second_day(mark):
        async with wandb.LoggerDelivery(WandbLoggerCallback("p"), seq=24 * 9) as delivery:
            delivery.receiver.rewind(mark)
            assert await delivery.drain(60) < 30
            assert delivery.undelivered == (0, None, None)

    mark = asyncio.run(first_day())
    logged_in(monkeypatch)
    asyncio.run(second_day(mark))
    files = wandb.wandb_files_of(tmp_path)
    assert len(files) == len(server.exit_codes) == 24
    assert all(sent(server, file) == points() for file in files)


def test_a_mark_of_an_earlier_version_names_the_files_that_are_owed(tmp_path, server, monkeypatch):
    async def first_day():
        async with wandb.LoggerDelivery(WandbLoggerCallback("p")) as delivery:
            return await delivery.deliver(*Trained(tmp_path).whole())

    mark = asyncio.run(first_day())
    old = {key: value for key, value in mark.items() if key not in {"uploads", "counted"}}
    logged_in(monkeypatch)

    async def second_day():
        async with wandb.LoggerDelivery(WandbLoggerCallback("p"), seq=9) as delivery:
            delivery.receiver.rewind(old)
            assert delivery.undelivered[0] == STEPS
            await delivery.drain()
            assert delivery.undelivered == (0, None, None)

    asyncio.run(second_day())
    [file] = wandb.wandb_files_of(tmp_path)
    assert sent(server, file) == points()


def test_a_login_while_the_run_goes_on_starts_the_upload(tmp_path, server, monkeypatch):
    run = Trained(tmp_path)

    async def day():
        async with wandb.LoggerDelivery(WandbLoggerCallback("p")) as delivery:
            await delivery.deliver(*run.starts(), *run.steps(0, 3))
            await delivery.wait_until(lambda: delivery.undelivered[1] == "no login")
            netrc = tmp_path / "home" / ".netrc"  # what `wandb login` writes
            netrc.parent.mkdir(exist_ok=True)
            netrc.write_text(f"machine {server.url.removeprefix('http://')}\n  login user\n  password {wandb.KEY}\n")
            await delivery.wait_until(lambda: server.lines)
            await delivery.deliver(*run.steps(3), *run.ends())
            await delivery.drain()
            assert delivery.undelivered == (0, None, None)

    asyncio.run(day())
    assert sent(server, *wandb.wandb_files_of(tmp_path)) == points()


def test_offline_owes_nothing(tmp_path, server):
    async def day():
        async with wandb.LoggerDelivery(WandbLoggerCallback("p", mode="offline")) as delivery:
            await delivery.deliver(*Trained(tmp_path).whole())
            assert await delivery.drain() < 1
            assert delivery.undelivered == (0, None, None)

    asyncio.run(day())
    assert not server.request_count


def test_a_run_that_nobody_ended_is_uploaded_whole_and_neither_finished_nor_failed(tmp_path, server, monkeypatch):
    logged_in(monkeypatch)
    run = Trained(tmp_path)

    async def day():
        async with wandb.LoggerDelivery(WandbLoggerCallback("p")) as delivery:
            mark = await delivery.deliver(*run.steps())
            await delivery.drain()
            assert delivery.undelivered == (0, None, None)
            assert server.exit_codes == {}
            asked = server.request_count
            assert await delivery.drain() < 1
            assert server.request_count == asked
        return mark

    asyncio.run(day())
    [file] = wandb.wandb_files_of(tmp_path)
    assert sent(server, file) == points()
    assert not any(each.HasField("exit") for each in wandb.records_in(file))


@pytest.mark.parametrize("error", [None, "out of memory"])
def test_a_run_without_a_run_end_has_ended_as_its_training_did(tmp_path, server, monkeypatch, error):
    logged_in(monkeypatch)
    run = Trained(tmp_path)

    async def day():
        async with wandb.LoggerDelivery(WandbLoggerCallback("p")) as delivery:
            run.state.error = error
            await delivery.deliver(*run.starts(), *run.steps(), run.ends()[0])
            assert not any(each.HasField("exit") for each in wandb.records_in(wandb.wandb_files_of(tmp_path)[0]))
            await delivery.drain()
            assert delivery.undelivered == (0, None, None)

    asyncio.run(day())
    assert list(server.exit_codes.values()) == [0 if error is None else 1]


def test_what_comes_after_the_end_of_a_run_is_uploaded_too(tmp_path, server, monkeypatch):
    logged_in(monkeypatch)
    run = Trained(tmp_path)

    async def day():
        async with wandb.LoggerDelivery(WandbLoggerCallback("p")) as delivery:
            await delivery.deliver(*run.whole())
            await delivery.wait_until(lambda: delivery.undelivered == (0, None, None) and server.exit_codes)
            await delivery.deliver(Eval(run.state, 4, "late", {"accuracy": 0.5}))
            await delivery.drain()
            assert delivery.undelivered == (0, None, None)

    asyncio.run(day())
    [file] = wandb.wandb_files_of(tmp_path)
    assert wandb.metric_series(server.rows(wandb.run_id_of(file)), "eval/late")["accuracy"] == [(4, 0.5)]
    assert sum(each.HasField("exit") for each in wandb.records_in(file)) == 1
    assert sent(server, file) == points()


def test_the_page_is_told_once_where_people_look(tmp_path, server, monkeypatch, capsys):
    logged_in(monkeypatch)
    run = Trained(tmp_path)

    async def day():
        async with wandb.LoggerDelivery(WandbLoggerCallback("p")) as delivery:
            await delivery.deliver(*run.starts())
            await delivery.wait_until(lambda: delivery.published_events)
            await delivery.deliver(*run.steps(), *run.ends())
            await delivery.drain()
            return delivery.published_events

    [learnt] = asyncio.run(day())
    url = f"{server.url}/team/p/runs/{wandb.run_id_of(wandb.wandb_files_of(tmp_path)[0])}"
    assert learnt.extras == run.ctx.extras == {"wandb_url": url}
    assert capsys.readouterr().out == f"View run at {url}\n"


def test_rows_that_come_a_minute_late_have_the_time_of_their_events(tmp_path, server, monkeypatch):
    run, begun = Trained(tmp_path), time.time() - 3600
    logged_in(monkeypatch)

    async def day():
        async with wandb.LoggerDelivery(WandbLoggerCallback("p")) as delivery:
            await delivery.deliver(*run.whole(), at=begun)
            await delivery.drain()

    asyncio.run(day())
    [file] = wandb.wandb_files_of(tmp_path)
    rows = server.rows(wandb.run_id_of(file))
    assert [row["_timestamp"] for row in rows] == [begun + 2 + n for n in range(STEPS)]
    assert [row["_runtime"] for row in rows] == pytest.approx([2 + n for n in range(STEPS)], abs=1e-5)


def test_the_times_at_wandb_are_those_of_the_journal_point_by_point(tmp_path, server, monkeypatch):
    logged_in(monkeypatch)
    run, journal = Trained(tmp_path), tmp_path / "journal"
    with EventBus([], journal=journal) as bus:
        for event in run.whole():
            bus.publish(event)
            time.sleep(0.01)  # so that the times differ
    courier = Courier(journal, "late", WandbLoggerCallback("p", mode="offline"), DeliveryPolicy())
    courier.finish()
    run_in_new_loop(courier.run)
    [file] = wandb.wandb_files_of(tmp_path)
    wandb.sync_files(file)
    found = {row["train/step"]: row["_timestamp"] for row in server.rows(wandb.run_id_of(file))}
    assert found == wandb.step_times(journal)["red"]


KILLED = """
import asyncio, importlib.util, sys, time
from pathlib import Path

spec = importlib.util.spec_from_file_location("test_wandb_owed", sys.argv[1])
owed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(owed)


async def day():
    run = owed.Trained(Path(sys.argv[2]))
    async with owed.wandb.LoggerDelivery(owed.WandbLoggerCallback("p")) as delivery:
        mark = await delivery.deliver(*run.starts(), *run.steps(0, 3))
        Path(sys.argv[2], "mark.json").write_text(owed.json.dumps(mark))
        await delivery.deliver(*run.steps(3))
        print("taken", flush=True)
        await asyncio.sleep(600)


asyncio.run(day())
"""


def test_after_a_kill_in_the_middle_every_row_is_at_the_server_once(tmp_path, server, monkeypatch):
    logged_in(monkeypatch)
    command = [sys.executable, "-c", KILLED, __file__, str(tmp_path)]
    path = os.environ | {"PYTHONPATH": str(TESTS)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=path) as killed:
        while "taken" not in (line := killed.stdout.readline()):
            assert line
        wait_until(lambda: server.lines)
        killed.kill()
    run, mark = Trained(tmp_path), json.loads((tmp_path / "mark.json").read_text())

    async def day():
        async with wandb.LoggerDelivery(WandbLoggerCallback("p"), seq=5) as delivery:
            delivery.receiver.rewind(mark)
            assert delivery.undelivered[0] == 5
            await delivery.deliver(*run.steps(3), *run.ends())
            await delivery.drain()
            assert delivery.undelivered == (0, None, None)

    asyncio.run(day())
    [file] = wandb.wandb_files_of(tmp_path)
    assert sent(server, file) == points()
    assert server.exit_codes == {wandb.run_id_of(file): 0}
    assert not list(file.parent.glob(".upload-*"))


def test_a_run_that_goes_on_another_day_has_not_ended_before(tmp_path, server, monkeypatch):
    logged_in(monkeypatch)
    run = Trained(tmp_path)

    async def day(logger, first, last):
        async with wandb.LoggerDelivery(logger) as delivery:
            run.state.step = first
            await delivery.deliver(*run.starts(), *run.steps(first, last), *run.ends())
            await delivery.drain()
            assert delivery.undelivered == (0, None, None)

    asyncio.run(day(WandbLoggerCallback("p"), 0, 4))
    [file] = wandb.wandb_files_of(tmp_path)
    assert sent(server, file) == points(4)
    asyncio.run(day(WandbLoggerCallback("p"), 2, STEPS))
    assert [file] == wandb.wandb_files_of(tmp_path)
    assert sent(server, file) == points()
    rows = server.rows(wandb.run_id_of(file))
    assert rows[0]["_timestamp"] < rows[-1]["_timestamp"]
    assert rows[-1]["_runtime"] == pytest.approx(rows[-1]["_timestamp"] - rows[0]["_timestamp"] + 2, abs=0.1)
