"""An S3 service on this machine (moto's server), and a gateway before it that counts and can misbehave."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

START_S = 60
ERROR = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>'


@contextmanager
def s3_service(log: Path) -> Iterator[str]:
    """Its endpoint; what it prints goes to a file."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with log.open("wb") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as process:
        try:
            yield _address(log, process)
        finally:
            process.kill()


def _address(log: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text())
        if found:
            return found[1]
        time.sleep(0.05)
    raise RuntimeError(f"moto's server did not start:\n{log.read_text()}")


def make_bucket(endpoint: str, name: str) -> None:
    """A bucket, as nobody in particular: the service checks no credentials."""
    with urlopen(Request(f"{endpoint}/{name}", method="PUT")):
        pass


@dataclass(frozen=True)
class Exchange:
    """A request that passed the gateway."""

    method: str
    path: str
    """With its query."""
    status: int
    size: int
    """Bytes of the answer's body."""


@dataclass
class Answer:
    """What the gateway says instead of the service."""

    status: int
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)


DROPPED = Answer(0)
"""The request reaches the service; its answer does not reach the client."""

Fault = Callable[[str, str], Answer | None]
"""From method and path to what goes wrong; None lets the request pass."""


class Gateway:
    """Forwards to a service."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.exchanges: list[Exchange] = []
        self.fault: Fault = lambda method, path: None

    def sent(self, part: str = "") -> int:
        """Bytes of the answers to GETs whose path has this in it."""
        return sum(done.size for done in self.exchanges if done.method == "GET" and part in done.path)

    def count(self, method: str) -> int:
        return sum(done.method == method for done in self.exchanges)


@contextmanager
def gateway(endpoint: str) -> Iterator[Gateway]:
    """A gateway that lives in this process."""
    made = Gateway()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body of an answer in two small packets would each wait for the other side.
        wbufsize = -1
        disable_nagle_algorithm = True

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = made.fault(self.command, self.path)
            if answer is not None and answer is not DROPPED:
                self.answer(answer.status, answer.headers, answer.body.encode())
                return
            upstream = HTTPConnection(endpoint.removeprefix("http://"), timeout=60)
            try:
                upstream.request(self.command, self.path, body, dict(self.headers.items()))
                found = upstream.getresponse()
                data = found.read()
            finally:
                upstream.close()
            if answer is DROPPED:
                self.close_connection = True
                return
            made.exchanges.append(Exchange(self.command, self.path, found.status, len(data)))
            hop = ("content-length", "connection", "date", "server", "transfer-encoding")
            kept = {name: value for name, value in found.getheaders() if name.lower() not in hop}
            length = found.getheader("Content-Length") if self.command == "HEAD" else None
            self.answer(found.status, kept, data, length)

        def answer(
            self, status: int, headers: dict[str, str], body: bytes, length: str | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
            self.wfile.flush()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward  # noqa: N815 (the base class's names)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    made.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
