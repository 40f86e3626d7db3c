"""What reading a file raises, turned into one line that names the place, the rule and the remedy.

The libraries underneath speak many dialects: gzip and lzma raise EOFError for a file that is cut off,
pyarrow an OSError without an error number, the system an OSError with one.
"""

from __future__ import annotations

import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mdlm_interp.errors import DataError, nearest

COPY_AGAIN = "copy or download it again"


@contextmanager
def explained(place: str | Path) -> Iterator[None]:
    """Turns what a damaged or unreadable file raises into a DataError that starts with the place."""
    try:
        yield
    except EOFError:
        raise cut_off(place) from None
    except (lzma.LZMAError, zlib.error, tarfile.TarError, UnicodeDecodeError) as error:
        raise damaged(place, error) from None
    except FileNotFoundError:
        raise missing(Path(place)) from None
    except PermissionError as error:
        raise DataError(f"{place} cannot be read: {error.strerror}; change its permissions") from None
    except OSError as error:
        if error.errno is None:
            raise damaged(place, error) from None
        raise DataError(f"{place} cannot be read: {error.strerror or error}; is its disk healthy?") from None


def cut_off(place: str | Path) -> DataError:
    """What to say of content that ends too early."""
    return DataError(f"{place} is cut off before its end mark; {COPY_AGAIN}")


def damaged(place: str | Path, error: Exception) -> DataError:
    """What to say of content that a library refuses."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if "runcated" in reason:
        return cut_off(place)
    return DataError(f"{place} is damaged ({reason}); {COPY_AGAIN}")


def missing(path: Path) -> DataError:
    """What to say of a path that leads to nothing."""
    if path.is_symlink():
        return DataError(
            f"{path} is a link to {os.readlink(path)}, which does not exist; name the file itself"
        )
    return DataError(f"{path} does not exist{nearest(path.name, siblings(path))}")


def siblings(path: Path) -> list[str]:
    """Names in the directory of a path; none where that cannot be listed."""
    try:
        return sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return []


def holds_no_text(path: Path) -> DataError:
    """What to say of a file without a document."""
    return DataError(f"{path} holds no text; remove it from the list or check how it was written")
