"""The connection to an object store: what a URL and an endpoint may say, and how long a request may take."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from obstore.store import S3Store, from_url

from mdlm_interp.errors import ConfigError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

SCHEMES = ("s3", "gs", "az")
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")

PATIENCE_S = 60.0
"""Seconds for which a request is tried again when the service does not answer or is overloaded."""
REQUEST_S = 60.0
"""Seconds that one request may take; a part must pass in them."""
BACKOFF_S = 5.0
"""Longest pause between two tries."""
FIRST_S = 5.0
"""Seconds that the very first request may take, and a second try: a wrong address should say so soon."""


def connection(url: str, endpoint: str | None) -> Callable[..., Any]:
    """Makes the obstore of a URL, for the first request or for all others.

    Raises:
        ConfigError: If the URL or the endpoint cannot be right.
    """
    parts = urlsplit(url)
    scheme, bucket, prefix = parts.scheme, parts.netloc, parts.path.strip("/")
    if scheme not in SCHEMES:
        raise ConfigError(f"{url} is of an unknown kind; give a directory, or an s3://, gs:// or az:// URL")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", bucket):
        raise ConfigError(f"{url} names no bucket; give {scheme}://BUCKET/PREFIX")
    # A question mark or a hash would end the path unnoticed, and an empty or dotted part has no one meaning.
    if parts.query or parts.fragment or re.search(r"[?#%\\\x00-\x1f]|(^|/)(|\.|\.\.)(/|$)", prefix or "x"):
        raise ConfigError(
            f"{url} has a prefix with an empty part, '.', '..', or one of ? # % \\; choose a plainer one"
        )
    options: dict[str, Any] = {}
    if scheme == "s3":
        chosen = endpoint or next(filter(None, map(os.environ.get, ENDPOINT_VARIABLES)), None)
        if chosen is not None:
            _check_endpoint(chosen)
            chosen = chosen.rstrip("/")
            # Otherwise a variable for S3 alone would win over the option.
            options = {"endpoint": chosen, "aws_endpoint_url_s3": chosen}
    elif endpoint is not None:
        raise ConfigError(f"endpoint {endpoint} is for s3:// URLs, got {url}")

    def connect(*, first: bool) -> Any:
        request_s, patience_s = (FIRST_S, FIRST_S) if first else (REQUEST_S, PATIENCE_S)
        client: ClientConfig = {
            "allow_http": str(options.get("endpoint", "")).startswith("http://"),
            "connect_timeout": timedelta(seconds=FIRST_S),
            "timeout": timedelta(seconds=request_s),
        }
        retry: RetryConfig = {
            "max_retries": 1 if first else 1000,
            "backoff": {"max_backoff": timedelta(seconds=BACKOFF_S)},
            "retry_timeout": timedelta(seconds=patience_s),
        }
        if scheme == "s3":
            return S3Store(
                bucket, prefix=prefix or None, client_options=client, retry_config=retry, **options
            )
        return from_url(f"{scheme}://{bucket}/{prefix}", client_options=client, retry_config=retry)

    return connect


def _check_endpoint(endpoint: str) -> None:
    if not re.fullmatch(r"https?://[A-Za-z0-9._-]+(:\d{1,5})?(/[\w./-]*)?", endpoint):
        raise ConfigError(f"endpoint must be a URL such as https://minio.example.org:9000, got {endpoint!r}")
