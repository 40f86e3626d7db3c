"""How this program was called, so that the commands it suggests can be pasted."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

NAME = "mdlm-interp"


def invocation() -> str:
    """`mdlm-interp` where the shell finds it by that name, else the path that it was called by."""
    called = Path(sys.argv[0])
    if called.name != NAME:
        return NAME if shutil.which(NAME) else f"{shlex.quote(sys.executable)} -m mdlm_interp"
    found = shutil.which(NAME)
    if found is not None and called.exists() and Path(found).samefile(called):
        return NAME
    return shlex.quote(sys.argv[0])
