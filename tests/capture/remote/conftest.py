"""A service for the session, and a bucket of its own for each test."""

import itertools
import os
from collections.abc import Iterator

import pytest

from tests.capture.remote.service import Gateway, gateway, make_bucket, s3_service

NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of an S3 service."""
    with s3_service(tmp_path_factory.mktemp("service") / "log.txt") as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that the service takes, and nothing else of this machine's."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def url(service: str) -> str:
    """Of an empty place in a bucket that is there."""
    bucket = f"bucket-{next(NUMBERS)}"
    make_bucket(service, bucket)
    return f"s3://{bucket}/some/where.zarr"


@pytest.fixture
def through(service: str) -> Iterator[Gateway]:
    """The same service behind a gateway."""
    with gateway(service) as made:
        yield made
