"""What commands print: commands that can be pasted, and counted things."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

NAME = "mdlm-interp"


def command_line(*words: str | Path) -> str:
    """This program with these words as its arguments, as a shell reads them."""
    return f"{invocation()} {shlex.join(map(str, words))}"


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with what it counts: `1 row`, `1,024 rows`.

    Args:
        many: The plural; none adds an s.
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def invocation() -> str:
    """`mdlm-interp` where the shell finds it by that name, else the path that it was called by."""
    called = Path(sys.argv[0])
    if called.name != NAME:
        return NAME if shutil.which(NAME) else f"{shlex.quote(sys.executable)} -m mdlm_interp"
    found = shutil.which(NAME)
    if found is not None and called.exists() and Path(found).samefile(called):
        return NAME
    return shlex.quote(sys.argv[0])
