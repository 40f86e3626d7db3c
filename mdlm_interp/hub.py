"""Files of a Hugging Face repository, with one clear line when there is no way to get them.

1. One request asks whether the hub answers. It is not repeated: the requests by which huggingface_hub
   lists a repository's files are, for half a minute and with a warning each time, also when there is no
   network at all.
2. If it answers, the files are downloaded; if not, they are looked up in the hub's local cache.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mdlm_interp.errors import CheckpointError


def fetch(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The local directory with a repository's files whose names match one of the patterns.

    Args:
        revision: Commit, branch or tag; the default branch if none.
    Raises:
        CheckpointError: If the files are neither on a hub that answers nor in the local cache.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # A file that is not cached is an OSError, and so is what requests raises where no answer comes; httpx,
    # which later versions of the hub use, has a base class of its own.
    failures: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
    problem: Exception | None = None
    try:
        HfApi().model_info(repository, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HFValidationError as error:
        raise CheckpointError(f"{repository!r} is no model directory and no repository id: {error}") from None
    except failures as error:
        problem = error
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(patterns),
                local_files_only=problem is not None,
            )
        )
    except failures as error:
        if problem is None:
            raise CheckpointError(f"{repository!r} could not be downloaded: {_first_line(error)}") from error
        raise CheckpointError(
            f"{repository!r} is neither a local directory nor reachable on the hub "
            f"({_reason(problem, repository, revision)}), and not in the hub's local cache; "
            f"pass a directory or 'bundled', or fetch it once on a connected machine"
        ) from None


def _reason(error: Exception, repository: str, revision: str | None) -> str:
    from huggingface_hub.errors import (
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, RepositoryNotFoundError):
        return "it has no such repository that you may read"
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no revision {revision!r} there"
    if isinstance(error, HfHubHTTPError):
        return _first_line(error)
    # The HTTP library wraps the system's own words in an account of what it tried.
    causes = re.findall(r"\[Errno -?\d+\] [\w ]+", str(error))
    return f"no connection: {causes[-1] if causes else type(error).__name__}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
