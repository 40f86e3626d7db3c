"""A service for the session, a bucket of its own for each test, and one capture that tests only read."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from capture import ActivationStore, CaptureConfig, run_capture
from tests.capture.remote.service import Gateway, gateway, make_bucket, s3_service
from tests.capture.remote.stores import small

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


@pytest.fixture(scope="session")
def local(
    model_directory: Path, texts: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    """The capture into a directory; only to be read."""
    return run_capture(small(model_directory, texts, tmp_path_factory.mktemp("local") / "run.zarr"))


@pytest.fixture(scope="session")
def remote(
    model_directory: Path, texts: tuple[Path, ...], service: str, local: ActivationStore
) -> ActivationStore:
    """The same in an object store; only to be read."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AWS_ACCESS_KEY_ID", "test")
        patched.setenv("AWS_SECRET_ACCESS_KEY", "test")
        make_bucket(service, "captured")
        return run_capture(small(model_directory, texts, "s3://captured/run.zarr", endpoint=service))


@pytest.fixture
def wanted(model_directory: Path, texts: tuple[Path, ...], url: str, through: Gateway) -> CaptureConfig:
    """The same to an empty place behind a gateway."""
    return small(model_directory, texts, url, endpoint=through.endpoint)
