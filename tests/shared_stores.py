"""An S3 server for tests, and what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.tracked import Server, started

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
"""What the S3 server is shown; it takes any."""
BUCKET = "actfocus"


def bucket(server: Server) -> Any:
    """The client of an S3 server, on which the bucket is made if it is not there."""
    import boto3

    names = {"aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"]}
    client = boto3.client("s3", endpoint_url=server.uri, region_name=KEYS["AWS_DEFAULT_REGION"], **names)
    client.create_bucket(Bucket=BUCKET)
    return client


def objects(server: Server, prefix: str) -> dict[str, int]:
    """Sizes of what an S3 server holds below a prefix, by what comes after that."""
    pages = bucket(server).get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return {found["Key"].removeprefix(prefix): found["Size"] for page in pages for found in page.get("Contents", [])}


@contextmanager
def s3_server(folder: Path) -> Iterator[Server]:
    """A server of moto's with the bucket. It keeps all in memory: killed and started again, it has forgotten everything."""
    pytest.importorskip("moto", reason="moto is not installed (the extra dev)")
    module = ["moto.server", "-H", "127.0.0.1", "-p", "{port}"]
    with started(Server(folder / "s3.log", "/moto-api/", module, {})) as server:
        bucket(server)
        yield server
