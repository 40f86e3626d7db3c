"""What keeps a store out of reach is told in one line, in seconds."""

import socket
import sys
import time
from collections.abc import Iterator

import pytest
import zarr
from obstore.exceptions import GenericError

from capture import open_store
from capture.places import place_of
from capture.remote import ObjectStore
from capture.remote_errors import reason
from mdlm_interp.__main__ import main
from mdlm_interp.errors import ConfigError, StoreError, WriteError
from tests.capture.remote.service import ERROR, Answer

SOON_S = 12.0
"""Two tries of five seconds each, and what a busy machine adds."""


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """No test of this file may take as long as retries with patience would."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < SOON_S


def refusal(url: str, endpoint: str | None = None) -> str:
    with pytest.raises((StoreError, ConfigError)) as caught:
        place_of(url, endpoint)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_bucket_that_is_not_there(service):
    assert refusal("s3://no-such-bucket/run", service) == (
        "s3://no-such-bucket/run cannot be reached: there is no bucket 'no-such-bucket'; make it first, or correct "
        "the URL"
    )


def test_a_place_where_no_store_is(url, service):
    with pytest.raises(StoreError, match=rf"^{url} has no manifest.json: it is no activation store$"):
        open_store(url, endpoint=service)


def test_a_service_that_does_not_run(url):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert refusal(url, endpoint) == (
            f"{url} cannot be reached: nothing answers at {endpoint} (connection refused); is the service running?"
        )


def test_a_service_that_never_answers(url, monkeypatch):
    monkeypatch.setattr("capture.remote_connection.FIRST_S", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert refusal(url, endpoint) == (
            f"{url} cannot be reached: {endpoint} did not answer in time; check the endpoint and the network"
        )


def test_a_host_that_is_not_there(url):
    assert "there is no host http://storage.invalid; correct the endpoint" in refusal(
        url, "http://storage.invalid"
    )


def test_an_endpoint_without_tls(url, service):
    endpoint = service.replace("http:", "https:")
    assert "has no TLS that can be trusted; is its URL http:// rather than https://?" in refusal(
        url, endpoint
    )


def test_no_credentials(url, service, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    assert "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in refusal(
        url, service
    )


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("gs://bucket/run", "set GOOGLE_APPLICATION_CREDENTIALS"),
        ("az://container/run", "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"),
    ],
)
def test_no_credentials_elsewhere(url, remedy):
    text = "metadata.google.internal did not answer" if url.startswith("gs") else "Account must be specified"
    assert reason(GenericError(text), url, None) == f"no credentials were found; {remedy}"


REGION = "The authorization header is malformed; the region 'us-east-1' is wrong; expecting 'eu-west-1'"


@pytest.mark.parametrize(
    ("status", "code", "message", "more", "told"),
    [
        (403, "AccessDenied", "Access Denied", "", "access is denied (AccessDenied: Access Denied); are these the"),
        (403, "InvalidAccessKeyId", "No such key", "", "the credentials are wrong (InvalidAccessKeyId); set AWS_ACC"),
        (403, "SignatureDoesNotMatch", "No", "", "the credentials are wrong (SignatureDoesNotMatch); set AWS_AC"),
        (400, "ExpiredToken", "The token has expired", "", "the credentials have expired; set AWS_ACCESS_KEY_ID"),
        (403, "RequestTimeTooSkewed", "Too large", "", "the clock of this machine is wrong; set it"),
        (400, "AuthorizationHeaderMalformed", REGION, "<Region>eu-west-1</Region>", "another region, eu-west-1; set"),
        (400, "AuthorizationHeaderMalformed", REGION, "", "the bucket is in another region, eu-west-1; set AWS_REGION"),
        (301, "PermanentRedirect", "Use another endpoint", "", "the bucket is in another region; set AWS_REGION"),
        (503, "SlowDown", "Reduce your rate", "", "the service is overloaded (SlowDown: Reduce your rate); run"),
        (418, "Teapot", "Short and stout", "", "answered 418 I'm a teapot (Teapot: Short and stout); is it the"),
    ],
)  # fmt: skip
def test_what_the_service_refuses(url, through, status, code, message, more, told):
    body = ERROR.format(code=code, message=message, more=more)
    through.fault = lambda method, path: Answer(status, body, {"Content-Type": "application/xml"})
    assert told in refusal(url, through.endpoint)


def test_a_web_server_that_is_no_object_store(url, through):
    through.fault = lambda method, path: Answer(
        404, "<html>no such page</html>", {"Content-Type": "text/html"}
    )
    assert f"{through.endpoint} answered 404 Not Found; is it the right service?" in refusal(
        url, through.endpoint
    )


def test_a_web_server_that_answers_everything_kindly(url, through):
    through.fault = lambda method, path: Answer(200, "<html>welcome</html>", {"Content-Type": "text/html"})
    with pytest.raises(StoreError, match=r"has no manifest\.json: it is no activation store"):
        open_store(url, endpoint=through.endpoint)
    with pytest.raises(WriteError) as caught, place_of(url, through.endpoint).lock("rank-0"):
        pass
    told = "what answers is no object store; correct the URL or the endpoint"
    assert str(caught.value) == f"{url} cannot be written: {told}"


def test_writing_that_is_denied_where_reading_is_not(url, through):
    denied = Answer(403, ERROR.format(code="AccessDenied", message="Access Denied", more=""))
    place = place_of(url, through.endpoint)
    through.fault = lambda method, path: denied if method in ("PUT", "POST") else None
    told = f"{url} cannot be written: access is denied (AccessDenied: Access Denied); are these the right"
    for write in (
        lambda: place.replace("manifest.json", b""),
        lambda: place.publish([place.draft("acts/x/c.0")]),
        lambda: zarr.create_group(place.zarr_store()),
        lambda: place.remove("manifest.json"),
        lambda: place.lock("rank-0").__enter__(),
    ):
        with pytest.raises(WriteError) as caught:
            write()
        assert str(caught.value).startswith(told)


def test_a_service_without_conditional_writes(url, through, monkeypatch):
    monkeypatch.setattr("capture.remote_connection.PATIENCE_S", 0.5)
    unknown = Answer(501, ERROR.format(code="NotImplemented", message="If-None-Match", more=""))
    place = ObjectStore(url, endpoint=through.endpoint)
    through.fault = lambda method, path: unknown if method == "PUT" else None
    rule = r"NotImplemented: If-None-Match\); it must have conditional writes"
    with pytest.raises(WriteError, match=rule), place.lock("rank-0"):
        pass


@pytest.mark.parametrize(
    ("url", "endpoint", "message"),
    [
        ("far://bucket/run", None, "far://bucket/run is of an unknown kind; give a directory, or an s3://, gs://"),
        ("memory://bucket/run", None, "memory://bucket/run is of an unknown kind"),
        ("s3://", None, "s3:// names no bucket; give s3://BUCKET/PREFIX"),
        ("s3:///run", None, "s3:///run names no bucket"),
        ("s3://a b/run", None, "s3://a b/run names no bucket"),
        ("s3://bucket/a//b", None, "has a prefix with an empty part, '.', '..', or one of ? # % \\; choose a plainer"),
        ("s3://bucket/a/../b", None, "has a prefix with an empty part"),
        ("s3://bucket/run?x=1", None, "has a prefix with an empty part"),
        ("s3://bucket/run#1", None, "has a prefix with an empty part"),
        ("s3://bucket/run%20", None, "has a prefix with an empty part"),
        ("s3://bucket/run", "localhost:9000", "endpoint must be a URL such as https://minio.example.org:9000, got"),
        ("s3://bucket/run", "http://bad host", "endpoint must be a URL"),
        ("s3://bucket/run", "http://host:port", "endpoint must be a URL"),
        ("gs://bucket/run", "http://localhost:1", "endpoint http://localhost:1 is for s3:// URLs, got gs://bucket/run"),
        ("run.zarr", "http://localhost:1", "endpoint http://localhost:1 has no effect on the directory run.zarr; is"),
    ],
)  # fmt: skip
def test_urls_that_cannot_be_right(url, endpoint, message):
    assert message in refusal(url, endpoint)


def test_the_extra_that_is_not_installed(monkeypatch):
    monkeypatch.delitem(sys.modules, "capture.remote")
    monkeypatch.setitem(sys.modules, "obstore", None)
    assert refusal("s3://bucket/run") == (
        "s3://bucket/run needs obstore, which is not installed: pip install 'mdlm-interp[remote]'"
    )


@pytest.mark.parametrize("command", ["info", "verify", "export"])
def test_the_commands_take_an_endpoint_and_exit_with_two(command, service, capsys):
    more = ["--to", "hdf5", "--out", "x.h5"] if command == "export" else []
    assert main(["capture", command, "s3://no-such-bucket/run", "--endpoint", service, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"mdlm-interp capture {command}: error: s3://no-such-bucket/run cannot be reached: the"
    )
    assert error.count("\n") == 1


def test_a_capture_finds_out_before_it_loads_the_model(service, capsys):
    arguments = [
        "text.txt",
        "--model",
        "no/such/model",
        "--out",
        "s3://no-such-bucket/run",
        "--endpoint",
        service,
    ]
    assert main(["capture", "run", *arguments]) == 2
    assert "there is no bucket 'no-such-bucket'" in capsys.readouterr().err
