"""What a relay and a mirror do where a person has to act: credentials, permissions, settings, a second mirror."""

import base64
import json
import os
import shutil
import socket
import subprocess
import time

import nats
import nkeys
import pytest

from evsys_adapters import NatsRelay
from evsys_adapters.jetstream.connection import ConnectionConfig
from evsys_adapters.jetstream.mirror import Mirror
from evsys_bus import Eval, EventBus
from evsys_bus.errors import JournalOpenError, ParkedError, RetryLaterError, WrongParamError
from evsys_bus.journal import JournalReader, JournalWriter
from support.couriers import counted, deliver
from support.nats_server import NatsServer

pytestmark = [pytest.mark.long_on_uvloop, pytest.mark.servers]

ROLES = """
authorization {
  users: [
    { user: "admin", password: "a" }
    { user: "relay", password: "r", permissions: {
        publish: ["evsys.>", "$JS.API.STREAM.INFO.EVSYS"], subscribe: ["_INBOX_relay.>"] } }
    { user: "mirror", password: "m", permissions: {
        publish: ["$JS.API.CONSUMER.INFO.EVSYS.mirror", "$JS.API.CONSUMER.MSG.NEXT.EVSYS.mirror",
                  "$JS.ACK.EVSYS.mirror.>"], subscribe: ["_INBOX_mirror.>"] } }
    { user: "reader", password: "x", permissions: { publish: [">"], subscribe: ["_INBOX.>"] } }
    { user: "guest", password: "g", permissions: { publish: ["$JS.API.STREAM.INFO.EVSYS"], subscribe: [">"] } }
  ]
}
"""
STREAM = {"name": "EVSYS", "subjects": ["evsys.>"], "retention": "workqueue", "discard": "new"}


def record(journal, count=10):
    writer = JournalWriter(journal).open()
    for _ in range(count):
        writer.append(b"event")
    writer.close()


def relay_to(server, **params):
    return NatsRelay(servers=[server.url], timeout_seconds=3, **params)


def mirror_of(server, directory, *, consumer=None, **config):
    config = ConnectionConfig(servers=(server.url,), timeout_seconds=3, **config)
    return Mirror(config, directory, stream="EVSYS", subject="evsys.>", consumer=consumer)


async def add_stream(server, **settings):
    client = await nats.connect(server.url)
    await client.jetstream().add_stream(**STREAM | settings)
    await client.close()


async def test_a_token_from_the_environment_is_needed_and_a_wrong_one_parks(tmp_path, monkeypatch):
    with NatsServer(tmp_path / "nats", 'authorization { token: "right" }') as server:
        for token in (None, "wrong-token"):
            if token is not None:
                monkeypatch.setenv("NATS_TOKEN", token)
            with pytest.raises(ParkedError) as caught:
                await relay_to(server).open()
            assert "refuses the credentials" in caught.value.what
            assert "NATS_TOKEN" in caught.value.fix
            assert "wrong-token" not in str(caught.value)
        monkeypatch.setenv("NATS_TOKEN", "right")
        record(tmp_path / "journal")
        assert counted(await deliver(tmp_path / "journal", relay_to(server))) == (10, 0, 0)


async def test_an_nkey_is_read_from_its_file(tmp_path):
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    public_key = nkeys.from_seed(bytearray(seed)).public_key.decode()
    (tmp_path / "user.nk").write_bytes(seed)
    with NatsServer(tmp_path / "nats", f'authorization {{ users: [{{ nkey: "{public_key}" }}] }}') as server:
        with pytest.raises(ParkedError, match="cannot be read"):
            await relay_to(server, nkey_file=str(tmp_path / "other.nk")).open()
        relay = relay_to(server, nkey_file=str(tmp_path / "user.nk"))
        await relay.open()
        await relay.close()


def signed_jwt(account, subject, name, kind, claims):
    """Return a JWT as `nsc` makes them, signed by the account or operator."""
    issuer = account.public_key.decode()
    payload = {"jti": name, "iat": 1_700_000_000, "iss": issuer, "name": name, "sub": subject}
    body = payload | {"nats": {"type": kind, "version": 2, **claims}}
    parts = [json.dumps(each).encode() for each in ({"typ": "JWT", "alg": "ed25519-nkey"}, body)]
    text = b".".join(base64.urlsafe_b64encode(each).rstrip(b"=") for each in parts)
    return b".".join((text, base64.urlsafe_b64encode(account.sign(text)).rstrip(b"="))).decode()


def key_pair(prefix):
    seed = nkeys.encode_seed(os.urandom(32), prefix)
    return nkeys.from_seed(bytearray(seed)), bytes(seed).decode()


async def test_a_credentials_file_has_the_jwt_and_the_seed(tmp_path):
    operator, _ = key_pair(nkeys.PREFIX_BYTE_OPERATOR)
    account, _ = key_pair(nkeys.PREFIX_BYTE_ACCOUNT)
    system, _ = key_pair(nkeys.PREFIX_BYTE_ACCOUNT)
    user, seed = key_pair(nkeys.PREFIX_BYTE_USER)
    account_id, user_id = account.public_key.decode(), user.public_key.decode()
    operator_jwt = signed_jwt(operator, operator.public_key.decode(), "operator", "operator", {})
    limits = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1, "subs": -1, "data": -1}
    limits |= {"payload": -1, "conn": -1, "leaf": -1, "imports": -1, "exports": -1}
    account_jwt = signed_jwt(operator, account_id, "account", "account", {"limits": limits})
    user_jwt = signed_jwt(account, user_id, "user", "user", {"subs": -1, "data": -1, "payload": -1})
    (tmp_path / "user.creds").write_text(
        f"-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n",
        encoding="utf-8",
    )
    system_id = system.public_key.decode()
    system_jwt = signed_jwt(
        operator, system_id, "system", "account", {"limits": limits | {"mem_storage": 0, "disk_storage": 0}}
    )
    preload = f"resolver_preload: {{ {account_id}: {account_jwt}, {system_id}: {system_jwt} }}"
    settings = f"operator: {operator_jwt}\nsystem_account: {system_id}\nresolver: MEMORY\n{preload}"
    with NatsServer(tmp_path / "nats", settings) as server:
        relay = relay_to(server, credentials_file=str(tmp_path / "user.creds"))
        record(tmp_path / "journal")
        assert counted(await deliver(tmp_path / "journal", relay)) == (10, 0, 0)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
async def test_tls_needs_the_certificates_of_the_authority_and_of_the_client(tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    options = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=test"]
    options += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(["openssl", "req", *options], check=True, capture_output=True)  # noqa: ASYNC221  # as a fixture
    settings = f'tls {{ cert_file: "{certificate}", key_file: "{key}", ca_file: "{certificate}", verify: true }}'
    files = {"tls_ca_file": str(certificate), "tls_certificate_file": str(certificate), "tls_key_file": str(key)}
    with NatsServer(tmp_path / "nats", settings) as server:
        with pytest.raises(ParkedError, match="is not trusted") as caught:
            await relay_to(server).open()
        assert "tls_ca_file" in caught.value.fix
        with pytest.raises(ParkedError, match="the TLS files cannot be used"):
            await relay_to(server, **files | {"tls_ca_file": str(tmp_path / "missing")}).open()
        relay = relay_to(server, **files)
        await relay.open()
        await relay.close()


async def test_each_role_needs_only_the_permissions_of_the_documentation(tmp_path, monkeypatch):
    with NatsServer(tmp_path / "nats", ROLES) as server:
        admin = await nats.connect(server.url, user="admin", password="a")
        await admin.jetstream().add_stream(**STREAM)
        consumer = {"filter_subject": "evsys.>", "ack_policy": "explicit", "max_ack_pending": 1}
        await admin.jetstream().add_consumer("EVSYS", durable_name="mirror", **consumer)
        await admin.close()
        record(tmp_path / "journal")
        monkeypatch.setenv("NATS_PASSWORD", "r")
        relay = relay_to(server, user="relay", inbox_prefix="_INBOX_relay")
        assert counted(await deliver(tmp_path / "journal", relay)) == (10, 0, 0)
        monkeypatch.setenv("NATS_PASSWORD", "m")
        mirror = mirror_of(server, tmp_path / "mirror", consumer="mirror", user="mirror", inbox_prefix="_INBOX_mirror")
        await mirror.run(once=True)
        assert mirror.journal.events == 10


async def test_a_missing_permission_parks_at_once_with_the_subject(tmp_path, monkeypatch):
    with NatsServer(tmp_path / "nats", ROLES) as server:
        monkeypatch.setenv("NATS_PASSWORD", "a")
        admin = relay_to(server, user="admin")
        await admin.open()
        await admin.close()
        monkeypatch.setenv("NATS_PASSWORD", "g")
        relay = NatsRelay(servers=[server.url], timeout_seconds=60, user="guest")
        await relay.open()
        batch = [relay_record(1)]
        with pytest.raises(ParkedError) as caught:  # far earlier than after its 60 s
            await relay.write(batch)
        await relay.close()
        assert "does not permit this user to publish to evsys.0.r0-" in caught.value.what.lower()
        assert "allow the user to publish to evsys.0.r0-" in caught.value.fix.lower()


async def test_a_mirror_that_may_not_receive_messages_ends_at_once_with_the_subject(tmp_path, monkeypatch):
    with NatsServer(tmp_path / "nats", ROLES) as server:
        monkeypatch.setenv("NATS_PASSWORD", "x")
        with pytest.raises(ParkedError, match=r"subscribe to _inbox_other\."):
            await mirror_of(server, tmp_path / "mirror", user="reader", inbox_prefix="_INBOX_other").run()


def relay_record(sequence):
    from evsys_bus.sink import RawRecord

    return RawRecord("r0-000001-20260131T120000-5f3a91c2", sequence, b"event")


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"discard": "old"}, "nats stream edit EVSYS --discard new"),
        ({"retention": "limits"}, "create it with --retention work"),
        ({"subjects": ["evsys.*", "other.>"]}, "set stream and subject_prefix to those of one stream"),
        ({"max_msg_size": 1500}, "set max_payload, max_msg_size and max_bytes to 2048 or more"),
    ],
)
async def test_a_stream_whose_settings_would_lose_events_is_refused(server, settings, fix):
    await add_stream(server, **settings)
    relay = relay_to(server)
    with pytest.raises(ParkedError) as caught:
        await relay.open()
    await relay.close()
    assert fix in caught.value.fix


async def test_a_missing_stream_is_created_only_if_that_is_allowed(server):
    relay = relay_to(server, create=False)
    with pytest.raises(ParkedError, match="the stream EVSYS at .* does not exist") as caught:
        await relay.open()
    assert caught.value.fix.startswith("nats stream add EVSYS --subjects 'evsys.>' --retention work --discard new")
    await relay.close()
    relay = relay_to(server, max_bytes=1 << 20)
    await relay.open()
    await relay.close()


async def test_the_relays_of_two_jobs_share_a_stream_and_each_has_its_mirror(server, tmp_path):
    for job in ("a", "b"):
        record(tmp_path / job, 10)
        await deliver(tmp_path / job, relay_to(server, subject_prefix=f"evsys.team.{job}"))
    for job in ("a", "b"):
        config = ConnectionConfig(servers=(server.url,))
        mirror = Mirror(config, tmp_path / f"mirror-{job}", stream="EVSYS", subject=f"evsys.team.{job}.>")
        await mirror.run(once=True)
        assert JournalReader(tmp_path / f"mirror-{job}").streams() == JournalReader(tmp_path / job).streams()


async def test_a_server_that_is_not_there_is_retried(server, tmp_path):
    server.kill()
    with pytest.raises(RetryLaterError, match="cannot be reached"):
        await relay_to(server).open()
    with pytest.raises(RetryLaterError, match="cannot be reached"):
        await mirror_of(server, tmp_path / "mirror").run(once=True)


@pytest.mark.parametrize("is_answered", [True, False])
def test_a_broker_that_is_away_keeps_no_program_from_ending_and_the_events_stay_pending(tmp_path, is_answered):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"nats://127.0.0.1:{silent.getsockname()[1]}"
        if is_answered:
            silent.close()  # nobody listens: the connection is refused
        bus = EventBus([NatsRelay(servers=[url])], journal=tmp_path / "journal", couriers="thread", drain_timeout=2)
        with bus:
            bus.publish(Eval(None, 1, "val", {"accuracy": 0.5}))
            began = time.monotonic()
    assert time.monotonic() - began < 8
    [delivery] = bus.receipt.deliveries
    assert (delivery.pending, delivery.delivered) == (1, 0)


async def test_another_mirror_of_the_same_subject_is_refused(server, tmp_path):
    await add_stream(server)
    await mirror_of(server, tmp_path / "first").run(once=True)
    with pytest.raises(ParkedError) as caught:
        await mirror_of(server, tmp_path / "second").run(once=True)
    assert "has another mirror for evsys.>" in caught.value.what
    assert "--consumer NAME" in caught.value.fix


async def test_a_consumer_with_several_pending_messages_is_refused(server, tmp_path):
    await add_stream(server)
    client = await nats.connect(server.url)
    await client.jetstream().add_consumer("EVSYS", durable_name="mine", ack_policy="explicit", filter_subject="evsys.>")
    await client.close()
    with pytest.raises(ParkedError, match="allows 1000 pending messages"):
        await mirror_of(server, tmp_path / "mirror", consumer="mine").run(once=True)


async def test_two_mirrors_do_not_write_one_directory(server, tmp_path):
    await add_stream(server)
    first = mirror_of(server, tmp_path / "mirror")
    first.journal.open()
    with pytest.raises(JournalOpenError, match="another mirror writes"):
        await mirror_of(server, tmp_path / "mirror").run(once=True)
    first.journal.close()


def test_a_password_in_the_url_is_refused_and_not_shown():
    with pytest.raises(WrongParamError) as caught:
        NatsRelay(servers=["nats://me:s3cret-word@broker:4222"])
    assert "NATS_PASSWORD" in str(caught.value)
    assert "s3cret-word" not in str(caught.value)
