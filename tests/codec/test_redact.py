"""What is a credential, by its name and by its form, and where a bus may not leave one."""

import dataclasses
import logging
from typing import Any

import pytest

from evsys_bus import (
    BenchmarkEval,
    Callback,
    Event,
    EventBus,
    LogContext,
    LoopState,
    RunEnd,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainingBatch,
    TrainStart,
    build_callbacks,
)
from evsys_bus.codec.redact import ALWAYS_SECRET, NOT_SECRET, Redaction, key_strength, redact, redact_text
from evsys_bus.context import ArmResult, EvalResult, LoopArtifacts, RunResult
from support.journals import read_envelopes

SURE_NAMES = """
    apiKeys accessToken AWS_SECRET_ACCESS_KEY clientSecret private_key_pem passphrase Authorization Cookie Set-Cookie
    X-Api-Key dsn connection_string webhook_url password db_password userPassword PGPASSWORD secretKey secretAccessKey
    authToken hf_token HF_TOKEN WANDB_API_KEY api_key_v2 APIKEY accesskey secret credentials slack_webhook_url
    SENTRY_DSN ssh_key refreshToken session_token proxy-authorization x-auth-token smtp_pass db_pwd client_secret_prod
    password_postgres secret_id private_keys wandbApiKey signing_secret account_key sas_token wifi_psk passkey
    recoveryCodes
""".split()
NAMES_IN_CONFIGS = ["token", "auth", "tokens", "OPENAI_KEY", "bearer", "jwt", "id_token", "my_auth", "token_prod"]
HARMLESS_NAMES = """
    pad_token eos_token bos_token unk_token mask_token token_id token_ids tokens_per_second max_tokens num_tokens
    total_tokens special_tokens additional_special_tokens tokenizer sort_key prompt_key label_key key_dim
    num_key_value_heads primary_key key keys monkey keyboard keypoints secretary password_policy password_min_length
    author authority cookie_cutter token_type token_url pad_token_id max_new_tokens stop_tokens train_tokens pass_rate
    pass_at_1 forward_pass compass passage attn_key rng_key credential_path api_key_env private_key_path auth_method
    session_id loss_per_token first_token_latency trigger_token initializer_token
""".split()
FORMS = [
    "Bearer S3CRET4",
    "Authorization: Basic dXNlcjpTM0NSRVQ=",
    "postgres://me:S3CRET@db:5432/x",
    "redis://:S3CRET@host",
    "https://S3CRETabcdefghijklmnopqrst@github.com/x",
    "sk-S3CRETabcdefgh123",
    "sk-ant-api03-S3CRET-abc_1234567",
    "hf_S3CRETabcdefghijkl1",
    "ghp_S3CRETabcdefghijklmnop",
    "github_pat_S3CRET1234567890_ab",
    "glpat-S3CRETabcdefghi",
    "xoxb-123-S3CRETabc",
    "AKIAS3CRETABCDEFGHIJ",
    "AIzaS3CRETabcdefghijklmnopqrstuvwxyz1",
    "ya29.S3CRETabcdefg",
    "eyJhbGciOiJI.eyJS3CRETzdWIi.S3CRETsig",
    "-----BEGIN RSA PRIVATE KEY-----\nS3CRET\n-----END RSA PRIVATE KEY-----",
    "npm_S3CRETabcdefghijklmno1",
    "pypi-S3CRETabcdefghijk",
    "https://hooks.slack.com/services/T0/B0/S3CRET",
    "https://discord.com/api/webhooks/123/S3CRET",
    "https://b.s3.amazonaws.com/k?X-Amz-Credential=S3CRETid&X-Amz-Signature=S3CRETdeadbeef&x=1",
    "https://a.blob.core.windows.net/c?sv=1&sig=S3CRET%3D",
    "https://api.x/v1?api_key=S3CRETabc&x=1",
    "python t.py --api-key S3CRETabc --lr 0.1",
    "--wandb-token=S3CRETabc",
    "OPENAI_API_KEY=S3CRETabc python x",
    '{"password": "S3CRET"}',
    '{\\"api_keys\\": [\\"S3CRET\\"]}',
    "Config(api_key='S3CRET', lr=1)",
    "Cookie: session=S3CRET; b=S3CRET",
    "Server=h;User Id=u;Password=S3CRET;",
    "AccountName=x;AccountKey=S3CRETabc==;EndpointSuffix=y",
    "[('X-Api-Key', 'S3CRET')]",
    "http://me:S3CRET/with#signs?@proxy:8080",
    "os.environ['HF_TOKEN'] = 'S3CRET'",
    "Client(token='S3CRETabc12', lr=1)",
    "tml-S3CRETabcdefghijk",
    "fw_S3CRETabcdefghijk",
    "csk-S3CRETabcdefghijk",
]
HARMLESS_TEXTS = [
    "a basic understanding of things",
    "risk-averse-learning-2",
    "sk-learn",
    "hf_transfer_enabled",
    "http://host:8000/path?email=a@b",
    "https://user@host/x",
    "ssh://git@github.com/x",
    "http://host:8000/models/a@b and http://host:1/x",
    "https://h:443#a@b",
    "see http://host:${PORT} or mail a@b",
    "token='first' auth=oauth2",
    "https://x/y?key=prompt&page=2",
    "tokens=5000 pad_token='<pad>'",
    "--num-tokens 100 --tokenizer gpt2 --sort-key length",
    "the key: to success",
    "def f(token, key): return token",
    "author=smith",
    "api_key=${API_KEY}",
    "export WANDB_API_KEY=...   then go on",
    "git 3b18e512dba79e4c8300dd08aeb37f8e728b8dad",
    "loss per token = 0.3",
    "mask-rcnn-resnet50-fpn",
    "disk-usage-at-95-percent",
]


@pytest.mark.parametrize("name", SURE_NAMES)
def test_a_name_of_a_credential_counts_everywhere(name):
    assert key_strength(name) == ALWAYS_SECRET


@pytest.mark.parametrize("name", NAMES_IN_CONFIGS)
def test_a_name_with_an_everyday_meaning_counts_in_configurations_only(name):
    assert redact(plain := {"metrics": {name: "S3CRET"}}) == {}
    assert plain == {"metrics": {name: "S3CRET"}}
    assert redact(plain := {"config": {name: "S3CRET"}})
    assert plain == {"config": {name: "<redacted>"}}


@pytest.mark.parametrize("name", HARMLESS_NAMES)
def test_names_of_tokenizers_columns_and_policies_are_harmless(name):
    assert key_strength(name) == NOT_SECRET
    plain = {"config": {name: "prompt"}}
    assert redact(plain) == {}


@pytest.mark.parametrize("text", FORMS)
def test_what_has_the_form_of_a_credential_is_cut_out_of_a_text(text):
    shown = redact_text(f"before {text} after")
    assert "S3CRET" not in shown
    assert shown.startswith("before ")
    assert "<redacted>" in shown
    assert redact_text(shown) == shown


@pytest.mark.parametrize("text", HARMLESS_TEXTS)
def test_a_text_that_only_resembles_one_stays(text):
    assert redact_text(text) == text


def test_a_long_text_is_searched_in_time_that_grows_with_its_length():
    for piece in ("a", "key=", "--token ", "://", "Bearer ", "eyJ", "password: ", "-----BEGIN ", "{'key': ["):
        redact_text(piece * (256 * 1024 // len(piece)))


def test_a_container_under_the_name_of_a_credential_is_redacted_whole_and_numbers_of_tokens_are_not():
    plain = {
        "config": {
            "tokens": {"hf": "S3CRET"},
            "api_keys": ["S3CRET"],
            "password": {"value": "S3CRET"},
            "auth": {"user": "S3CRET", "how": ["S3CRET"]},
            "env": [
                {"name": "HF_TOKEN", "value": "S3CRET"},
                {"Name": "API_KEY", "Value": "S3CRET"},
                {"key": "DB_PASSWORD", "val": "S3CRET"},
            ],
            "argv": ["train.py", "--api-key", "S3CRET", "--lr", "0.1"],
            "raw_headers": [["X-Api-Key", "S3CRET"], ["Accept", "text/html"]],
            "wandb": {"key": "S3CRET"},
            "pin": {"passcode": 12345678},
            "login": {"user": "u", "pass": "S3CRET"},
            "command": "curl -u me:S3CRET https://x",
            "environment": {"PWD": "/home/me"},
            "budget": {"tokens": 1000, "train_tokens": "1B", "auth": None, "token": ""},
        }
    }
    redact(plain)
    assert "S3CRET" not in str(plain)
    assert "12345678" not in str(plain)
    assert plain["config"]["argv"] == ["train.py", "--api-key", "<redacted>", "--lr", "0.1"]
    assert plain["config"]["raw_headers"][1] == ["Accept", "text/html"]
    assert plain["config"]["environment"] == {"PWD": "/home/me"}
    assert plain["config"]["budget"] == {"tokens": 1000, "train_tokens": "1B", "auth": None, "token": ""}


def test_what_a_text_is_under_one_name_does_not_depend_on_an_earlier_one():
    random = "S3CRET8f3Kq92LmZx71Ab"
    redact({"config": {"commit": random, "tls_key": "a"}})
    redact(plain := {"config": {"tls_key": random, "commit": random}})
    assert plain == {"config": {"tls_key": "<redacted>", "commit": random}}


def test_placeholders_and_signatures_of_programs_stay():
    plain = {"config": {"api_key": "EMPTY", "signature": "question, context -> answer"}}
    assert redact(plain) == {}


def test_a_program_may_redact_more_keys_and_reveal_others():
    plain = {"config": {"My-Word": "S3CRET", "token": "a", "auth": {"kind": "x", "password": "S3CRET"}, "dsn": ["b"]}}
    redact(plain, Redaction.of(redact=["my_word"], reveal=["token", "auth", "DSN"]))
    assert plain == {
        "config": {
            "My-Word": "<redacted>",
            "token": "a",
            "auth": {"kind": "x", "password": "<redacted>"},
            "dsn": ["b"],
        }
    }


class ProgramNote(Event, frozen=True):
    """An event of a program."""

    note: str
    client: dict[str, Any]
    password: str


class Failing(Callback):
    def on_step_end(self, state, step_idx, batch, metrics):
        raise ValueError("401 for https://me:S3CRET@host/v1?api_key=S3CRET")


@dataclasses.dataclass
class HostState(LoopState):
    api_token: str = "S3CRET"
    note: str = "Bearer S3CRET99"


def test_no_credential_reaches_any_file_or_log_line(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    harmless = dict.fromkeys(HARMLESS_NAMES, "prompt")
    config = {
        **dict.fromkeys([*SURE_NAMES, *NAMES_IN_CONFIGS], "S3CRET"),
        "texts": FORMS,
        "headers": {"Authorization": "Bearer S3CRET4", "Cookie": "session=S3CRET"},
        "harmless": harmless,
    }
    ctx = LogContext(tmp_path, config={"run_config": config}, ids={"experiment_id": "hf_S3CRETabcdefghijkl1"})
    ctx.extras["url"] = FORMS[2]
    ctx = ctx.for_run("a", run_config=config)
    state = HostState(0, 40, tmp_path / "a", ctx=ctx)
    callbacks = build_callbacks(
        [
            {"kind": "csv_metrics", "params": {"out_path": str(tmp_path / "metrics.csv")}},
            *({"kind": kind} for kind in ("local_logger", "tensorboard_logger", "debug_logger")),
        ]
    )
    with EventBus([*callbacks, Failing()], journal=tmp_path / "journal", linger_seconds=0.3) as bus:
        bus.publish(RunStart(ctx))
        bus.publish(TrainStart(state))
        for step, text in enumerate(FORMS):
            state.step = step
            batch = TrainingBatch(loss_fn_config={"note": text, "password": "S3CRET"}, metrics={"text": text, "n": 1})
            bus.publish(StepEnd(state, step, batch, {"loss": 0.5, "text": text, text: 1.0, "nested": [{"t": text}]}))
            bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 0.5, "api_key": "S3CRET"}))
            bus.publish(ProgramNote(text, {"headers": {"x-api-key": "S3CRET"}, "text": text}, "S3CRET"))
            bus.publish(
                BenchmarkEval(
                    ctx,
                    EvalResult(name="bench", breakdowns={"text": text}, tags=[text]),
                    [{"output": text, "secret": "S3CRET"}],
                    step=step,
                )
            )
        state.stop_reason, state.error = FORMS[0], ValueError(FORMS[3])
        bus.publish(TrainEnd(state, LoopArtifacts()))
        arm = ArmResult("a", run_config=config, status="failed", error=FORMS[4])
        bus.publish(RunEnd(ctx, RunResult(), arm))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".seg", ".csv", ".jsonl"}
    assert [str(path) for path in files if b"S3CRET" in path.read_bytes()] == []
    assert "S3CRET" not in caplog.text
    assert [record for record in caplog.records if "S3CRET" in str(vars(record))] == []
    [start] = [each.event for each in read_envelopes(tmp_path / "journal") if isinstance(each.event, RunStart)]
    assert start.ctx.run_config["harmless"] == harmless


def test_reveal_reaches_the_journal_and_the_loggers(tmp_path):
    ctx = LogContext(tmp_path).for_run("a", run_config={"token": "hello", "password": "S3CRET"})
    callbacks = build_callbacks([{"kind": "tensorboard_logger"}])
    with EventBus(callbacks, journal=tmp_path / "journal", reveal=["token"], linger_seconds=0.3) as bus:
        bus.publish(RunStart(ctx))
        state = LoopState(0, 1, tmp_path / "a", ctx=ctx)
        bus.publish(TrainStart(state))
        bus.publish(StepEnd(state, 0, TrainingBatch(), {"loss": 0.5}))
    [start, *_] = read_envelopes(tmp_path / "journal")
    assert start.event.ctx.run_config == {"token": "hello", "password": "<redacted>"}
    written = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard" / "a").iterdir())
    assert b"hello" in written
    assert b"S3CRET" not in written


class FailingFollower(Callback):
    """Fails at every step, with a credential in the message."""

    placement = "follow"

    def on_step_end(self, state, step_idx, batch, metrics):
        raise ValueError("401 for https://me:S3CRET@host/v1?api_key=S3CRET")


def test_errors_of_deliveries_are_stored_and_logged_without_credentials(tmp_path, caplog):
    state = LoopState(0, 1, tmp_path / "a", ctx=LogContext(tmp_path).for_run("a"))
    bus = EventBus([FailingFollower()], journal=tmp_path / "journal", couriers="threads")
    with bus:
        bus.publish(TrainStart(state))
        bus.publish(StepEnd(state, 0, TrainingBatch(), {"loss": 0.5}))
    assert "<redacted>" in str(bus.receipt.deliveries[0].last_failure or bus.receipt.deliveries[0].last_error)
    assert "S3CRET" not in repr(bus.receipt)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and b"S3CRET" in path.read_bytes()] == []
    assert "S3CRET" not in caplog.text
