"""No credential of a training reaches a server, a file or a screen, and what only resembles one reaches all of them."""

import base64
import json
import os
import re
import subprocess

import pytest

from support import evsys_server, wandb_server
from support.programs import run_evsys_bus

pytestmark = [pytest.mark.servers, pytest.mark.long, pytest.mark.timeout(120)]

CREDENTIALS = {
    # the configuration of a run
    "run.api_key": "S3CRETa01x",
    "run.optimizer.client.password": "S3CRETa02x",
    "run.services[].auth_token": "S3CRETa03x",
    "run.env[].value": "S3CRETa04x",
    "run.headers.Authorization": "Bearer S3CRETa05x9",
    "run.raw_headers[]": "S3CRETa06x",
    "run.dataset_url, user info": "https://me:S3CRETa07x@data.example/train",
    "run.endpoint, query": "https://data.example/v1?api_key=S3CRETa08x&page=2",
    "run.presigned": "https://b.s3.example/k?X-Amz-Credential=AK/x&X-Amz-Signature=S3CRETa09x&part=1",
    "run.argv[]": "S3CRETa10x",
    "run.command": "curl -u me:S3CRETa11x https://data.example",
    "run.environment.AWS_SECRET_ACCESS_KEY": "S3CRETa12x",
    "run.tls.pem": "-----BEGIN PRIVATE KEY-----\nS3CRETa13x\n-----END PRIVATE KEY-----",
    "run.database": "Server=db;User Id=me;Password=S3CRETa14x;Timeout=5",
    "an argument of the command line": "S3CRETa15x",
    # the experiment
    "metadata.notes": "logged in with hf_S3CRETa16xAbCd12 yesterday",
    "metadata.owner.webhook_url": "https://hooks.slack.com/services/T0/B0/S3CRETa17x",
    "metadata.hypothesis": "glpat-S3CRETa18xAbCd helps",
    # metrics, batches and results
    "key of a metric": "sk-proj-S3CRETa19xAbCd1",
    "text among the metrics": "ghp_S3CRETa20xAbCdEfGh",
    "batch.loss_fn_config": "S3CRETa21x",
    "batch.metrics": "redis://:S3CRETa22x@cache:6379/0",
    "metrics of an eval": "xoxb-123-S3CRETa23x",
    "breakdowns of a benchmark": "S3CRETa24x",
    "output of a prediction": "my key is AKIAS3CRETA25XABCD",
    "metadata of a prediction": "S3CRETa26x",
    "tag of a benchmark": "npm_S3CRETa27xAbCdEfGh1",
    # errors
    "exception of a hook": "401 for https://me:S3CRETa28x@host/v1",
    "exception of a hook in a courier": "403 for https://host/v1?token=S3CRETa29xAbCd",
    "exception of a run": "refused: Authorization: Bearer S3CRETa30x9",
    "warning of a hook": "retrying with --api-key S3CRETa31x --lr 1",
    # what the program hands on
    "ctx.extras": "postgres://me:S3CRETa32x@db/x",
    "ctx.ids": "eyJhbGciOiJI.eyJS3CRETa33xAb.S3CRETa33x",
    "field of an event of the program": "S3CRETa34x",
    "path of a checkpoint": "s3://me:S3CRETa35x@bucket/final",
    # around the program
    "OPENAI_API_KEY in the environment": "sk-S3CRETa36xAbCdEf12",
    "proxy in the environment": "http://me:S3CRETa37x@127.0.0.1:9",
    "remote of the git repository": "https://me:S3CRETa38x@git.example/me/x.git",
    "WANDB_API_KEY": "S3CRETa39x".ljust(40, "0"),
    "EVSYS_API_KEY": "S3CRETa40x",
}
HARMLESS_KEYS = """
    token_count max_tokens num_tokens tokens_per_second pad_token eos_token special_tokens tokenizer key_dim sort_key
    num_key_value_heads primary_key label_key rng_key attn_key password_policy_len password_min_length author authority
    auth_method cookie_cutter credential_path private_key_path api_key_env pass_rate forward_pass compass keypoints
    session_id secretary first_token_latency
""".split()
HARMLESS = {key: f"harmless-{index}-" for index, key in enumerate(HARMLESS_KEYS)}
HARMLESS_METRICS = {key: 1000.5 + index for index, key in enumerate(HARMLESS_KEYS)}

PARTS = """
import logging
from typing import Any
from evsys_bus import Callback, EvalResult, Event, TrainingBatch, register_callback
from evsys_bus.training.plan import RunComponents
from evsys_bus.training.protocols import Benchmark

CREDENTIALS = {credentials!r}
METRICS = {metrics!r}


class Rollout(Event, frozen=True):
    note: str
    password: str
    client: dict[str, Any]


class Backend:
    def __init__(self, fails):
        self.fails, self.steps = fails, 0

    async def forward_backward(self, batch):
        if self.fails and self.steps == 2:
            raise ValueError(CREDENTIALS["exception of a run"])
        return {{
            "loss": 0.5,
            CREDENTIALS["key of a metric"]: 1.0,
            "note": CREDENTIALS["text among the metrics"],
            **METRICS,
        }}

    async def optim_step(self):
        self.steps += 1

    async def save_state(self, name):
        return CREDENTIALS["path of a checkpoint"]

    save_weights_for_sampler = save_state

    async def load_state(self, path):
        pass


class Batches:
    async def build_batch(self, step_idx):
        return TrainingBatch(
            data=[step_idx],
            loss_fn_config={{"password": CREDENTIALS["batch.loss_fn_config"]}},
            metrics={{"size": 1, "cache": CREDENTIALS["batch.metrics"]}},
        )


class Evaluator:
    name, every = "held_out", 1

    async def evaluate(self, state):
        return {{"accuracy": 0.5, "by": CREDENTIALS["metrics of an eval"]}}


class Tasks:
    name = "tasks"

    async def evaluate(self, state):
        result = EvalResult(
            "tasks",
            metrics={{"score": 0.5}},
            breakdowns={{"client": {{"api_key": CREDENTIALS["breakdowns of a benchmark"]}}}},
            tags=[CREDENTIALS["tag of a benchmark"]],
        )
        prediction = {{
            "task_id": "t",
            "output": CREDENTIALS["output of a prediction"],
            "metadata": {{"secret": CREDENTIALS["metadata of a prediction"]}},
        }}
        return Benchmark(result, [prediction])


def recipe(params, run):
    return RunComponents(
        backend=Backend(run.arm == "fails"),
        step_builder=Batches(),
        num_steps=3,
        evaluators=[Evaluator()],
        benchmarks=[Tasks()],
        save_every=1,
    )


@register_callback("hands_on", replace=True)
class HandsOn(Callback):
    def on_run_start(self, ctx):
        ctx.extras["database"] = CREDENTIALS["ctx.extras"]
        ctx.ids["session"] = CREDENTIALS["ctx.ids"]

    def on_step_end(self, state, step_idx, batch, metrics):
        text = CREDENTIALS["field of an event of the program"]
        self.publish(Rollout(CREDENTIALS["key of a metric"], text, {{"headers": {{"x-api-key": text}}}}))


@register_callback("raises", replace=True)
class Raises(Callback):
    def on_step_end(self, state, step_idx, batch, metrics):
        raise ValueError(CREDENTIALS["exception of a hook"])


@register_callback("raises_in_courier", replace=True)
class RaisesInCourier(Callback):
    placement = "follow"

    def on_step_end(self, state, step_idx, batch, metrics):
        logging.getLogger("evsys_bus.parts").warning(CREDENTIALS["warning of a hook"])
        raise ValueError(CREDENTIALS["exception of a hook in a courier"])
"""


def config():
    """Return the experiment; what stands under a credential's place is that credential."""
    return {
        "name": "planted",
        "recipe": "parts:recipe",
        "plugins": ["parts"],
        "runs": {"works": {}, "fails": {}},
        "success_metric": {"name": "tasks/score"},
        "metadata": {
            "notes": CREDENTIALS["metadata.notes"],
            "owner": {"webhook_url": CREDENTIALS["metadata.owner.webhook_url"]},
            "hypothesis": CREDENTIALS["metadata.hypothesis"],
        },
        "run": {
            **HARMLESS,
            "api_key": CREDENTIALS["run.api_key"],
            "hub": {},
            "optimizer": {"client": {"password": CREDENTIALS["run.optimizer.client.password"]}},
            "services": [{"auth_token": CREDENTIALS["run.services[].auth_token"]}],
            "env": [{"name": "HF_TOKEN", "value": CREDENTIALS["run.env[].value"]}],
            "headers": {"Authorization": CREDENTIALS["run.headers.Authorization"]},
            "raw_headers": [["X-Api-Key", CREDENTIALS["run.raw_headers[]"]]],
            "dataset_url": CREDENTIALS["run.dataset_url, user info"],
            "endpoint": CREDENTIALS["run.endpoint, query"],
            "presigned": CREDENTIALS["run.presigned"],
            "argv": ["train.py", "--api-key", CREDENTIALS["run.argv[]"], "--lr", "0.1"],
            "command": CREDENTIALS["run.command"],
            "environment": {"AWS_SECRET_ACCESS_KEY": CREDENTIALS["run.environment.AWS_SECRET_ACCESS_KEY"]},
            "tls": {"pem": CREDENTIALS["run.tls.pem"]},
            "database": CREDENTIALS["run.database"],
        },
        "callbacks": [
            *({"kind": kind} for kind in ("hands_on", "raises", "raises_in_courier", "debug_logger", "print_progress")),
            *({"kind": kind} for kind in ("local_logger", "tensorboard_logger", "evsys_logger")),
            {"kind": "csv_metrics", "params": {"out_path": "metrics.csv"}},
            {"kind": "wandb_logger", "params": {"project": "p"}},
        ],
    }


@pytest.fixture
def servers(tmp_path, monkeypatch):
    """Run W&B's server and EvSys', and remove the settings of the user who runs the test."""
    for name in [
        each for each in os.environ if each.startswith(("WANDB_", "EVSYS_")) or each.lower().endswith("proxy")
    ]:
        monkeypatch.delenv(name)
    with wandb_server.WandbServer() as wandb, evsys_server.EvsysServer() as evsys:
        evsys.keys = {CREDENTIALS["EVSYS_API_KEY"]}
        for name, value in {
            "HOME": str(tmp_path / "home"),
            "WANDB_BASE_URL": wandb.url,
            "WANDB_DIR": str(tmp_path),
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_API_KEY": CREDENTIALS["WANDB_API_KEY"],
            "EVSYS_API_URL": evsys.url,
            "EVSYS_API_KEY": CREDENTIALS["EVSYS_API_KEY"],
            "OPENAI_API_KEY": CREDENTIALS["OPENAI_API_KEY in the environment"],
            "HTTPS_PROXY": CREDENTIALS["proxy in the environment"],
        }.items():
            monkeypatch.setenv(name, value)
        yield wandb, evsys


def marks_of(text):
    return set(re.findall(r"S3CRET\w\d\dX", text, re.IGNORECASE))


def base64_forms(mark):
    """Return what is certain of a mark in base64, at each of the three offsets that it may have in a longer text."""
    encoded = [base64.b64encode(b"x" * offset + mark.encode()).rstrip(b"=") for offset in range(3)]
    return [each[start:-1] for each, start in zip(encoded, (0, 2, 3), strict=True)]


def leaks_in(content):
    """Return the places of the credentials that are in these bytes, as they are or in base64."""
    found = set()
    for place, credential in CREDENTIALS.items():
        for mark in marks_of(credential):
            if mark.encode() in content or any(each in content for each in base64_forms(mark)):
                found.add(place)
    return found


def without_own_login(requests, key):
    """Return the requests as one text, without the header with which the client shows the server's own key."""
    basic = base64.b64encode(f"api:{key}".encode())
    return b"\n".join(each.replace(b"Basic " + basic, b"").replace(b"Bearer " + key.encode(), b"") for each in requests)


def test_the_marks_of_all_places_differ():
    marks = [mark for credential in CREDENTIALS.values() for mark in marks_of(credential)]
    assert len(marks) == len(CREDENTIALS) >= 30
    assert len(HARMLESS) >= 30


def test_no_credential_of_a_training_reaches_a_server_a_file_or_a_screen(tmp_path, servers):
    wandb, evsys = servers
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "parts.py").write_text(PARTS.format(credentials=CREDENTIALS, metrics=HARMLESS_METRICS))
    (folder / "planted.yaml").write_text(json.dumps(config()))
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    remote = CREDENTIALS["remote of the git repository"]
    subprocess.run(["git", "remote", "add", "origin", remote], cwd=folder, check=True)
    given = {folder / "parts.py", folder / "planted.yaml", folder / ".git" / "config"}

    argument = f"run.hub.token={CREDENTIALS['an argument of the command line']}"
    run = run_evsys_bus("run", "planted.yaml", "--verbose", "--set", argument, cwd=folder)
    misplaced = ("check", "planted.yaml", "--set", argument.replace("hub", "nowhere"))
    shown = [run_evsys_bus(*command, cwd=folder) for command in [*COMMANDS, misplaced]]
    output = "\n".join(each.stdout + each.stderr for each in (run, *shown))
    to_wandb = without_own_login(wandb.received, CREDENTIALS["WANDB_API_KEY"])
    to_evsys = without_own_login(evsys.received, CREDENTIALS["EVSYS_API_KEY"])

    assert leaks_in(to_wandb) == set()
    assert leaks_in(to_evsys) == set()
    assert "ValueError: 401 for https://me:<redacted>@host" in output
    assert leaks_in(output.encode()) == set()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path not in given and path.suffix != ".pyc"]
    leaks = {str(path.relative_to(tmp_path)): leaks_in(path.read_bytes()) for path in files}
    leaking = {path: found for path, found in leaks.items() if found}
    # A resumed run loads a checkpoint from where the backend said that it is.
    resumable = {f"program/runs/planted/{run}-s0/checkpoints.jsonl" for run in ("works", "fails")}
    assert leaking == {path: {"path of a checkpoint"} for path in resumable}, leaking

    # Both servers have everything else: the two runs, the harmless keys with their values.
    assert len(wandb.runs) == len(evsys.tables["runs"]) == 2
    texts = [each.decode(errors="replace") for each in (to_wandb, to_evsys)]
    for received in (*texts, output):
        assert [key for key, value in HARMLESS.items() if key not in received or value not in received] == []
    for received in texts:
        assert [key for key, value in HARMLESS_METRICS.items() if str(value) not in received] == []


COMMANDS = [
    ("show", "runs/planted", "--json"),
    ("show", "runs/planted/works"),
    ("show", "runs/planted/fails"),
    ("status", "runs/planted"),
    ("status", "runs/planted", "--json"),
    ("tail", "runs/planted"),
    ("tail", "runs/planted", "--json"),
    ("logs", "runs/planted"),
    ("check", "planted.yaml"),
]
