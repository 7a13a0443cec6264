"""`find_features`: what a server with the S3 API and the permissions of a key allow, found by a few small requests.

Servers differ in what they do with a header that they do not know: refuse the request, or ignore it. So a feature
counts only if a request that must fail because of it does fail, and with the right code.

    writes of the probe                                 features
    --------------------------------------------------  ------------------------------------------------------------
    with the digest of something else                   a digest error: `checks_digests`
    under an unused key, then under the same, each      412 for the second: `create_conditions`
    with ``If-None-Match: *``
    with an ``If-Match`` that does not                  412: `replace_conditions`
    it is read, and a missing object is asked for       403 for the latter: `hides_missing`
    removed                                             `may_delete`
"""

import hashlib
from secrets import token_hex
from typing import Any, Final

from evsys_adapters.checkpoints.s3_connection import (
    DENIED,
    DIGEST_ERRORS,
    S3Connection,
    S3Features,
    S3ResponseError,
)
from evsys_adapters.checkpoints.s3_upload import base64_of
from evsys_bus.diagnostics import log
from evsys_bus.errors import DeliveryError, ParkedError, RetryLaterError

_DATA: Final = b"evsys-bus was here"
_OTHER_DIGEST: Final = base64_of(hashlib.sha256(b"something else").hexdigest())
_NO_TAG: Final = '"00000000000000000000000000000000"'
_FAILED_CONDITION: Final = 412
_NOT_FOUND: Final = 404


async def find_features(connection: S3Connection, prefix: str) -> S3Features:
    """Find out what the server can do, by writing, reading and removing a few bytes below the prefix.

    Sets ``connection.features``, since bodies have to be signed from the first accepted one on.

    Raises:
        DeliveryError: The key may not write or read, or there is no such bucket.
    """
    key = f"{prefix}.evsys-bus-probe-{token_hex(4)}"
    keys = [key]
    checks_digests = await _checks_digests(connection, f"{key}-digest")
    if checks_digests is None:
        keys.append(f"{key}-digest")
    if connection.features.checks_digests != bool(checks_digests):
        connection.features = S3Features(checks_digests=bool(checks_digests))
        await connection.close()  # whether bodies are signed is a setting of the client
    create_conditions = await _create_conditions(connection, key)
    replace_conditions = create_conditions and await _is_refused(connection, key, IfMatch=_NO_TAG)
    hides_missing = await _hides_missing(connection, key)
    features = S3Features(
        checks_digests=bool(checks_digests),
        create_conditions=create_conditions,
        replace_conditions=replace_conditions,
        may_delete=await _may_delete(connection, keys),
        hides_missing=hides_missing,
    )
    connection.features = features
    return features


def log_limits(where: str, features: S3Features) -> None:
    """Log what is weaker here than with all features; nothing if none is missing."""
    limits = {
        "no digests": (not features.checks_digests, "bodies are signed instead, and sizes are compared"),
        "no If-None-Match": (
            not features.create_conditions,
            "keys are looked up before they are written; two uploaders at the same moment are not detected",
        ),
        "no If-Match": (
            features.create_conditions and not features.replace_conditions,
            "latest.json is checked again after it was written",
        ),
        "no permission to delete": (
            not features.may_delete,
            "a small object of this test stays, and nothing can be pruned there",
        ),
    }
    found = {name: effect for name, (applies, effect) in limits.items() if applies}
    if found:
        effects = "; ".join(f"{name}: {effect}" for name, effect in found.items())
        log().warning("checkpoint.store_limits", where=where, limits=list(found), effects=effects)


async def _checks_digests(connection: S3Connection, key: str) -> bool | None:
    """Return whether the server compares digests: False if it refuses them, None if it ignores them."""
    for attempt in range(2):
        try:
            await connection.call(
                "put_object", expect=tuple(DIGEST_ERRORS), Key=key, Body=_DATA, ChecksumSHA256=_OTHER_DIGEST
            )
        except S3ResponseError as error:
            return error.error_code in DIGEST_ERRORS
        except (RetryLaterError, ParkedError):  # for any write, or only for one with a digest?
            await connection.call("put_object", Key=key, Body=_DATA)
            if attempt:
                break
        else:
            break
    return None


async def _create_conditions(connection: S3Connection, key: str) -> bool:
    """Write the object, and return whether ``If-None-Match`` is honoured."""
    try:
        await _put(connection, key, IfNoneMatch="*")
    except S3ResponseError:
        await _put(connection, key)
        return False
    try:
        return await _is_refused(connection, key, IfNoneMatch="*")
    except RetryLaterError:  # some servers take one write of a key per second; the condition itself was accepted
        return True


async def _is_refused(connection: S3Connection, key: str, **condition: Any) -> bool:
    """Write again on a condition that does not hold; returns whether the server refuses."""
    try:
        await _put(connection, key, **condition)
    except S3ResponseError as error:
        return error.status in {_FAILED_CONDITION, _NOT_FOUND}
    return False


async def _put(connection: S3Connection, key: str, **condition: Any) -> None:
    checksum: dict[str, Any] = {}
    if connection.features.checks_digests:
        checksum["ChecksumSHA256"] = base64_of(hashlib.sha256(_DATA).hexdigest())
    await connection.call("put_object", Key=key, Body=_DATA, **checksum, **condition)


async def _hides_missing(connection: S3Connection, key: str) -> bool:
    """Return whether the key may read objects, and is denied those that do not exist."""
    try:
        await connection.call("head_object", Key=key)
        await connection.call("head_object", expect=DENIED, Key=f"{key}-missing")
    except S3ResponseError as error:
        return error.error_code in DENIED
    return False


async def _may_delete(connection: S3Connection, keys: list[str]) -> bool:
    """Remove what the probe wrote; returns whether that was possible."""
    try:
        for key in keys:
            await connection.call("delete_object", expect=DENIED, Key=key)
    except RetryLaterError:  # not worth to wait for
        return True
    except DeliveryError:
        return False
    return True
