"""The commands `mdlm-interp clt export` and `mdlm-interp clt import`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mdlm_interp.atomic_files import refuse_existing, replacing_directory
from mdlm_interp.config_args import parse_args
from mdlm_interp.errors import ConfigError
from mdlm_interp.program import command_line, counted
from transcoder.config_checks import LAYER_FIELD, require_apart, require_in
from transcoder.interchange.adaln import Fold
from transcoder.interchange.limits import Format

CERTIFIED_ROWS = 256
"""Of a store, that a certificate is measured on."""

CALIBRATED_ROWS = 4096
"""Of a store, that thresholds are calibrated on."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a transcoder for circuit-tracer, SAELens or crosslayer-coding, with a certificate that it is the same."""

    clt: Path
    """Directory of the transcoder."""
    to: Format
    """The other tool; SAELens holds transcoders with connectivity plt only."""
    out: Path
    """The directory to make; nothing may be there."""
    model: str | None = None
    """Model directory, hub id, or "bundled", checked to be the transcoder's; needed to fold."""
    fold: Fold = "none"
    """Take the constant adaLN out: input reads the plain norm, output writes the MLP's output before the gate."""
    store: Path | None = None
    """Activation store of the same model, whose held-out rows the certificate, and jumprelu, are taken on."""
    jumprelu: bool = False
    """Replace topk by the nearest jumprelu, with thresholds calibrated on the store: no longer the same function."""
    model_name: str | None = None
    """What the other tool calls the model; none takes model, or mdlm."""

    def __post_init__(self) -> None:
        require_apart(self.out, self.store)
        if self.fold != "none" and self.model is None:
            raise ConfigError(f"fold {self.fold} needs the model whose adaLN is folded in; add --model")
        if self.jumprelu and self.store is None:
            raise ConfigError("jumprelu needs held-out rows to calibrate thresholds on; add --store")


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Read a transcoder of circuit-tracer, SAELens or crosslayer-coding."""

    files: Path
    """Its directory, or with crosslayer-coding one of the checkpoints in it."""
    out: Path
    """Directory for the transcoder; nothing may be there."""
    format: Format | None = None
    """The tool that it comes from; none recognises it by its files."""
    input_hook: str | None = None
    """Hook point that a layer's encoder reads, {layer} standing for the block's number; none takes the files'."""
    output_hook: str | None = None
    """Hook point whose activation the decoders reconstruct, likewise."""

    def __post_init__(self) -> None:
        for name in ("input_hook", "output_hook"):
            hook = getattr(self, name)
            rule = f"a hook point with {LAYER_FIELD} for the block's number"
            require_in(self, name, rule, hook is None or LAYER_FIELD in hook)


def export(argv: Sequence[str]) -> int:
    """Export a transcoder; say what is lost, and how closely it agrees."""
    config = parse_args(ExportConfig, argv, prog="mdlm-interp clt export", positional=("clt",))
    refuse_existing(config.out)
    from capture import open_store
    from transcoder.checkpoint import load_clt
    from transcoder.identity import check_store
    from transcoder.interchange.exporting import export_clt
    from transcoder.interchange.thresholds import as_jumprelu, held_out_rows

    clt, rows = load_clt(config.clt, config.model), None
    if config.store is not None:
        store = open_store(config.store)
        check_store(clt, store)
        rows = held_out_rows(clt, store, CALIBRATED_ROWS if config.jumprelu else CERTIFIED_ROWS)
    if config.jumprelu and rows is not None:
        before = clt.config
        replaced = as_jumprelu(clt, rows)
        clt = replaced.clt
        print(
            f"warning: {before.activation} with k = {before.k} became a jumprelu, another function: on "
            f"{counted(rows.shape[1], 'held-out row')} it keeps {replaced.kept:.1%} of the active features, and "
            f"{replaced.extra:.1%} of its own are others"
        )
    done = export_clt(
        clt,
        config.out,
        config.to,
        model=config.model,
        fold=config.fold,
        model_name=config.model_name or config.model or "mdlm",
        rows=None if rows is None else rows[:, :: max(1, rows.shape[1] // CERTIFIED_ROWS)],
        rows_of="of the store's held-out text",
    )
    print(f"{config.out}: {clt.extra_repr()}, for {config.to}")
    print(f"reads {done.form.config.input_hook}, writes {done.form.config.output_hook}")
    print("\n".join(done.certificate.lines()))
    for note in done.notes:
        print(f"note: {note}")
    print(f"next: {config.out / 'README.md'} shows how to load it")
    return 0


def import_(argv: Sequence[str]) -> int:
    """Import a transcoder; say what it is, and how closely it agrees."""
    config = parse_args(ImportConfig, argv, prog="mdlm-interp clt import", positional=("files",))
    refuse_existing(config.out)
    from transcoder.checkpoint import save_clt
    from transcoder.interchange.importing import import_clt

    found = import_clt(
        config.files, config.format, input_hook=config.input_hook, output_hook=config.output_hook
    )
    with replacing_directory(config.out) as partial:
        save_clt(found.clt, partial)
    shape = found.clt.config
    print(f"{config.out}: {found.clt.extra_repr()}, from {found.format}")
    print(f"reads {shape.input_hook}, writes {shape.output_hook}")
    print("against the files read, in float64:")
    print("\n".join(found.certificate.lines()))
    for note in found.notes:
        print(f"note: {note}")
    print(f"next: {command_line('clt', 'eval', config.out, 'STORE')}")
    return 0
