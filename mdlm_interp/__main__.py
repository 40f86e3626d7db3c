"""The command line: a table of commands, resolved when called.

Exit codes: 0 done; 2 the user's mistake, told in one line; 130 interrupted, by Ctrl-C or SIGTERM; 141 the
reader of our output went away; anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import errno
import io
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from mdlm_interp import __version__
from mdlm_interp.errors import ConfigError, MdlmError, nearest

PROG = "mdlm-interp"

# Command: (package.module:function, what it does). Each function takes the arguments after its name and
# returns an exit code. Strings, so that imports point down and --help loads none of them.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("transcoder.demo:main", "everything below on the bundled model, minutes on 2 cores"),
    "info": ("mdlm_interp.commands:info", "what a model is: its shape, size and hook points"),
    "fill": ("mdlm_interp.commands:fill", "fill the masks of a text"),
    "sample": ("mdlm_interp.decoding.commands:main", "generate text by denoising"),
    "ppl": ("mdlm_interp.commands:ppl", "bound the perplexity of a text"),
    "train-lm": ("mdlm_interp.training.command:main", "train a masked diffusion language model"),
    "train-tokenizer": ("mdlm_interp.training.tokenizer:main", "train a byte-level BPE tokenizer"),
    "export-hf": ("mdlm_interp.commands:export_hf", "write a model that transformers loads"),
    "oracle fingerprint": ("oracle.commands:fingerprint", "hash every intermediate of an exact forward pass"),
    "oracle record": ("oracle.commands:record", "write what an exact pass gives here, for others to verify"),
    "oracle verify": (
        "oracle.commands:verify",
        "recompute golden files on this machine: match, or what differs",
    ),
    "oracle sample": ("oracle.commands:sample", "generate text that is the same on every machine"),
    "capture run": ("capture.commands:run", "record activations over text into a Zarr store"),
    "capture info": ("capture.commands:info", "what a store holds"),
    "capture verify": ("capture.commands:verify", "check every byte of a store and recompute some of it"),
    "capture export": ("capture.export_command:export", "write a store as HDF5 or safetensors"),
    "clt train": ("transcoder.commands:train", "train a cross-layer transcoder on a store"),
    "clt eval": ("transcoder.commands:evaluate", "measure a transcoder: fvu, l0, loss recovered"),
    "clt export": (
        "transcoder.interchange.commands:export",
        "write a transcoder for circuit-tracer, SAELens or crosslayer-coding",
    ),
    "clt import": ("transcoder.interchange.commands:import_", "read a transcoder of these tools"),
    "explore": (
        "transcoder.dashboard.commands:explore",
        "write a directory of HTML pages: features, attribution graph, trajectory",
    ),
    "explore trajectory": (
        "mdlm_interp.viewer.commands:explore",
        "show how a text was decoded: an HTML page, or in the terminal",
    ),
    "explore graph": (
        "transcoder.attribution.command:main",
        "which features and tokens a prediction comes from",
    ),
    "explore analytics": (
        "transcoder.trajectories.command:main",
        "what happens to predictions, attention and features along a trajectory",
    ),
}

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
USER_PATHS = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
"""OSErrors that a path given by the user causes; they count only with the file's name in them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    wait_politely()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = arguments[:1] == ["--debug"]
    if debug:
        del arguments[0]
    name = _name(arguments)
    prog = f"{PROG} {name}" if name in COMMANDS else PROG
    try:
        with _sigterm_as_interrupt(), _anything_printable():
            code = _dispatch(name, arguments)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 141
    except (MdlmError, OSError) as error:
        message = _user_message(error)
        if message is None:
            raise
        if debug:
            traceback.print_exc()
        line = re.sub(r"\s*\n\s*", " ", message.strip())
        print(f"{prog}: error: {line}", file=sys.stderr)
        return 2


def wait_politely() -> None:
    """Let OpenMP threads sleep soon after they have nothing to do; call before torch is imported.

    They spin by default. When another program wants the same cores, a small model's many short operations
    then wait for each other and take four times as long. The user's own settings are kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _name(arguments: Sequence[str]) -> str:
    """The command that the arguments begin with, of one word or two; or what was given in its place."""
    two = " ".join(arguments[:2])
    if arguments and arguments[0] in _groups() and (two in COMMANDS or arguments[0] not in COMMANDS):
        return two
    return " ".join(arguments[:1])


def _dispatch(name: str, arguments: list[str]) -> int:
    """Call the command's function, or answer in its stead."""
    if name in COMMANDS:
        module, _, attribute = COMMANDS[name][0].partition(":")
        function: Callable[[list[str]], int] = getattr(import_module(module), attribute)
        try:
            return function(arguments[len(name.split()) :])
        except SystemExit as stop:
            if stop.code:
                raise
            return 0  # its --help
    group, _, last = name.rpartition(" ")
    if last in ("--help", "-h"):
        print(_help(group))
        return 0
    if name == "--version":
        print(f"{PROG} {__version__}")
        return 0
    raise ConfigError(_unknown(name))


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, so that it saves its state."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not the main thread: signals are its caller's business
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _anything_printable() -> Iterator[None]:
    """Write what the terminal's encoding lacks as escapes: a model may predict any character."""
    output = sys.stdout
    if not isinstance(output, io.TextIOWrapper):
        yield
        return
    before = output.errors
    output.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        output.reconfigure(errors=before)


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output; if so, keep the interpreter from telling so at exit."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file
        return False
    state = select.poll()
    state.register(output, 0)  # errors and hang-ups are always reported
    if not state.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _user_message(error: MdlmError | OSError) -> str | None:
    """The line for a mistake of the user's; None for a bug."""
    if isinstance(error, MdlmError):
        return str(error)
    named = f"{error.filename}: " if error.filename is not None else ""
    if error.errno in DISK_FULL or (named and error.errno in USER_PATHS):
        return f"{named}{error.strerror}"
    return None


def _unknown(name: str) -> str:
    if not name:
        return f"no command given; {PROG} --help lists them"
    if name in _groups():
        return f"{name} needs a command{nearest('', _members(name))}"
    if name.startswith("-"):
        return f"unknown option {name}{nearest(name, ['--help', '--version', '--debug'])}"
    group, _, _ = name.partition(" ")
    choices = _members(group) if group in _groups() else [*COMMANDS, *_groups()]
    return f"unknown command {name!r}{nearest(name, choices)}"


def _groups() -> list[str]:
    """First words of the commands that have two, in order."""
    return list(dict.fromkeys(name.split()[0] for name in COMMANDS if " " in name))


def _members(group: str) -> list[str]:
    return [name for name in COMMANDS if name.startswith(f"{group} ")]


def _help(group: str) -> str:
    names = _members(group) if group else list(COMMANDS)
    width = max(map(len, names))
    return "\n".join(
        [
            f"usage: {PROG} {group or '[--debug] COMMAND'}{' COMMAND' if group else ''} [ARGUMENT ...]",
            "",
            *(f"  {name:{width}}  {COMMANDS[name][1]}" for name in names),
            "",
            f"{PROG} COMMAND --help shows a command's arguments.",
            f"{PROG} COMMAND configs/NAME.yaml --key.sub VALUE reads a file and overrides it.",
            "--debug before the command shows the traceback of an error; --version shows the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
