"""Buckets of the tests' S3 server, through botocore: what stores have left there is read without those stores."""

import functools
from typing import Any
from uuid import uuid4

from support.s3_server import S3Server


@functools.cache
def connect(endpoint: str) -> Any:
    """Return a client with all permissions, which does not read the environment's keys."""
    import botocore.config  # here, as tests that need no server are also collected where it is missing
    import botocore.session

    return botocore.session.get_session().create_client(
        "s3",
        endpoint_url=endpoint,
        region_name=S3Server.region,
        aws_access_key_id=S3Server.key,
        aws_secret_access_key=S3Server.secret,
        config=botocore.config.Config(s3={"addressing_style": "path"}),
    )


def create_bucket(server: S3Server) -> str:
    """Create a bucket on the server; returns its name."""
    name = f"bucket-{uuid4().hex}"
    connect(server.endpoint).create_bucket(Bucket=name)
    return name


def unfinished_uploads(where: str) -> list[dict[str, Any]]:
    """Return the multipart uploads that were started and not completed; ``where`` is that of a store."""
    name, endpoint = parse_where(where)
    return connect(endpoint).list_multipart_uploads(Bucket=name).get("Uploads", [])


def abort_upload(where: str, key: str, upload_id: str) -> None:
    """Remove an unfinished upload, as the server may do."""
    name, endpoint = parse_where(where)
    connect(endpoint).abort_multipart_upload(Bucket=name, Key=key, UploadId=upload_id)


def put_object(where: str, key: str, data: bytes) -> None:
    """Store an object as another program would: without a digest in its metadata."""
    name, endpoint = parse_where(where)
    connect(endpoint).put_object(Bucket=name, Key=key, Body=data)


def parse_where(where: str) -> tuple[str, str]:
    """Return the bucket and the endpoint of a store's ``where``: ``s3://bucket at http://...``."""
    url, _, endpoint = where.partition(" at ")
    return url.removeprefix("s3://"), endpoint
