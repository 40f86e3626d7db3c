"""Why an object store did not do as it was asked, in one line with the remedy."""

from __future__ import annotations

import re

from obstore.exceptions import BaseError

_KEYS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY ('aws configure export-credentials --format env' prints "
    "those of a profile), or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_REASONS: tuple[tuple[str, str], ...] = (
    (r"NoSuchBucket", "there is no bucket {bucket}; make it first, or correct the URL"),
    (
        r"169\.254\.1[67]\d\.\d+|latest/(api/token|meta-data)|metadata\.google|Account must be specified",
        "no credentials were found; {keys}",
    ),
    (
        r"InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken",
        "the credentials are wrong ({code}); {keys}",
    ),
    (r"ExpiredToken", "the credentials have expired; {keys}"),
    (r"RequestTimeTooSkewed", "the clock of this machine is wrong; set it"),
    (
        r"AuthorizationHeaderMalformed|PermanentRedirect|IllegalLocationConstraint|redirect without LOCATION",
        "the bucket is in another region{region}; set AWS_REGION",
    ),
    (
        r"AccessDenied|PermissionDenied|UnauthenticatedError|403 Forbidden|401 Unauthorized",
        "access is denied{message}; are these the right credentials, and may they list, read and write there?",
    ),
    (
        r"NotImplemented",
        "the service does not know a request{message}; it must have conditional writes (If-None-Match, If-Match)",
    ),
    (
        r"ETag Header missing|list response",
        "what answers is no object store; correct the URL or the endpoint",
    ),
    (
        r"kind: ConnectionRefused",
        "nothing answers at {address} (connection refused); is the service running?",
    ),
    (r"dns error", "there is no host {address}; correct the endpoint, or check the network"),
    (
        r"kind: TimedOut|TimeoutError|kind: Timeout",
        "{address} did not answer in time; check the endpoint and the network",
    ),
    (
        r"InvalidContentType|CertificateError|invalid peer certificate",
        "{address} has no TLS that can be trusted; is its URL http:// rather than https://?",
    ),
    (r"SlowDown|503 Service|429 Too Many", "the service is overloaded{message}; run this again later"),
)
"""What is found in the text of an error, most telling first, and what it means."""


def reason(error: Exception, url: str, endpoint: str | None) -> str:
    """What went wrong and what to do about it.

    Args:
        url: Of the store.
        endpoint: As the user gave it.
    """
    text = f"{type(error).__name__}: {error}"
    status = _first(r"status code: (\d{3}[\w' ]*)", text)
    code, message, region = (
        _first(rf"<{tag}>([^<]*)</{tag}>", text) for tag in ("Code", "Message", "Region")
    )
    region = region or _first(r"expecting '([\w-]+)'", text)
    told = f"{code}: {message}" if code and message else code or message
    known = {
        "bucket": repr(url.split("/")[2]),
        "address": _first(r"(https?://[^/\s]+)", text) or endpoint or url,
        "code": code,
        "keys": _KEYS.get(url.partition(":")[0], "see the service's manual"),
        "region": f", {region}" if region else "",
        "message": f" ({told})" if told else "",
    }
    for pattern, meaning in _REASONS:
        if re.search(pattern, text):
            return meaning.format(**known)
    if status:
        return f"{known['address']} answered {status.strip()}{known['message']}; is it the right service?"
    return _plain(error)


def _plain(error: Exception) -> str:
    """The first line of an error that nobody foresaw, without what varies."""
    line = str(error).partition("\n")[0].strip()
    return re.sub(r" in [\d.]+ ?[µmn]?s\b,?", "", line) if isinstance(error, BaseError) else line


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""
