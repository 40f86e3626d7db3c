"""The commands `mdlm-interp clt train` and `mdlm-interp clt eval`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mdlm_interp.config_args import parse_args
from mdlm_interp.program import command_line, counted
from transcoder.config import METRICS, CLTRunConfig
from transcoder.config_checks import require_apart, require_at_least_one


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measure a transcoder on a store's held-out sequences and inside its model."""

    clt: Path
    """Directory of the transcoder."""
    store: Path
    """Activation store of the same model; sequences whose text it was trained on are left out."""
    out: Path | None = None
    """Directory for the report; none takes the directory eval inside the transcoder's."""
    model: str = "bundled"
    """Model directory, hub id, or "bundled": the model that the store was captured from."""
    device: str = "cpu"
    """Where to run, as torch names it."""
    max_sequences: int | None = 64
    """Sequences to use of those held out, each time in its share and as many texts as that allows; none uses all."""
    batch_size: int = 8
    """Sequences per forward pass; it changes results by rounding only."""
    oracle_sequences: int | None = 2
    """Sequences on which error terms are added back, natively and in exact arithmetic; none skips that."""
    seed: int = 0
    """Key of which sequences are used where there are more than max_sequences."""

    def __post_init__(self) -> None:
        require_at_least_one(self, ("max_sequences", "batch_size", "oracle_sequences"))
        require_apart(self.out, self.store)


def train(argv: Sequence[str]) -> int:
    """Train a transcoder and say what came out."""
    config = parse_args(
        CLTRunConfig, argv, prog="mdlm-interp clt train", positional=("store",), config_file=True
    )
    from transcoder.run import train as run
    from transcoder.training_log import fvu_text, read_log
    from transcoder.training_state import latest_training_state

    try:
        clt = run(config, progress=True)
    except KeyboardInterrupt:
        saved = latest_training_state(config.out)
        if saved is not None and _is_first():
            print(f"the state is saved in {saved}; the same command continues from there")
        raise
    if not _is_first():
        return 0
    print(f"{config.out}: {clt.extra_repr()}")
    for last in read_log(config.out / METRICS)[-1:]:
        print(
            f"after {counted(last['step'], 'step')} on {counted(last['rows'], 'row')}: FVU {fvu_text(last)}, "
            f"L0 {last['l0']:.1f} per layer, {counted(last['dead'], 'dead feature')}"
        )
    if config.store is not None:
        following = command_line("clt", "eval", config.out, config.store, "--model", _model_of(config.store))
        print(f"next: {following}")
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """Evaluate a transcoder and write a report."""
    config = parse_args(
        EvalConfig, argv, prog="mdlm-interp clt eval", positional=("clt", "store"), config_file=True
    )
    from capture import open_store
    from mdlm_interp.devices import usable_device
    from mdlm_interp.model import HookedMDLM
    from transcoder.checkpoint import load_clt
    from transcoder.evaluation import evaluate as run
    from transcoder.report import layer_table, origin, refuse_existing, summary, write_report
    from transcoder.training_log import read_log

    out = config.out or config.clt / "eval"
    refuse_existing(out)
    device = usable_device(config.device)
    store = open_store(config.store)
    clt = load_clt(config.clt, config.model, device=device)
    log = read_log(config.clt / METRICS)
    model = HookedMDLM.from_pretrained(config.model, device=device)
    evaluation = run(
        model,
        clt,
        store,
        max_sequences=config.max_sequences,
        batch_size=config.batch_size,
        oracle_sequences=config.oracle_sequences,
        seed=config.seed,
        progress=True,
    )
    about = {
        "transcoder": str(config.clt),
        "shape": clt.extra_repr(),
        "model": config.model,
        "store": str(config.store),
        **origin(clt, store),
    }
    print("\n".join([*layer_table(evaluation), *summary(evaluation)]), flush=True)
    files = write_report(evaluation, out, about=about, training_log=log)
    print("wrote " + ", ".join(str(file) for file in files))
    return 0


def _is_first() -> bool:
    """Whether this process speaks for all that torchrun started; alone it does."""
    return os.environ.get("RANK", "0") == "0"


def _model_of(store: Path) -> str:
    from capture import open_store

    return str(open_store(store).config.get("model", "bundled"))
