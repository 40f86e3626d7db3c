"""`mdlm-interp demo`: from filling a mask to the feature behind it, in minutes on a laptop.

1. Fill masks in three sentences.
2. Capture what each MLP reads and writes over the packaged text.
3. Train a small cross-layer transcoder on it.
4. Put the transcoder in place of the MLPs and measure what that costs.
5. Find the feature that matters most to one filled word, and ablate it.
6. Save the report and the plots.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from itertools import count
from pathlib import Path

import torch

from capture import CaptureConfig, open_store, run_capture
from mdlm_interp.config_args import parse_args
from mdlm_interp.diffusion import LogLinearSchedule
from mdlm_interp.errors import OutputExistsError
from mdlm_interp.filling import encode_prompt, fill_masks
from mdlm_interp.model import HookedMDLM
from mdlm_interp.tokenizers import Tokenizer, load_tokenizer
from transcoder import demo_report
from transcoder.config import METRICS, CLTRunConfig, TrainConfig
from transcoder.config_checks import require_at_least_one, require_k_features
from transcoder.effects import PredictionEffects, feature_effects
from transcoder.evaluation import Evaluation, evaluate
from transcoder.model import CrossLayerTranscoder
from transcoder.replacement import ReplacementModel
from transcoder.report import layer_table, origin, summary, write_report
from transcoder.run import train
from transcoder.training_log import fvu_text, read_log

SENTENCES = (
    "Tom had a small [MASK] and he loved to play with it in the garden.",
    "It was a cold day, so the children stayed in the [MASK] and read a book.",
    "The city said on Monday that the new [MASK] would be open to the public next [MASK].",
)
EXAMINED = 1
"""Which of the sentences step 5 looks into, at its first mask."""

DEFAULT_OUT = "mdlm-demo"
STEPS = 6


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Everything once on a small model: fill, capture, train, replace, ablate, plot."""

    out: Path | None = None
    """Directory for everything made; none takes mdlm-demo, or mdlm-demo-2 and so on if that is there."""
    model: str = "bundled"
    """Model directory, hub id, or "bundled" for the small model in this package."""
    max_sequences: int | None = None
    """Sequences of the packaged text to capture; none takes all."""
    n_features: int = 512
    """Features of each layer of the transcoder."""
    k: int = 16
    """Features that may be active at once, per layer and token."""
    train_steps: int = 400
    """Steps of the transcoder's training."""
    n_ablations: int = 24
    """Features to ablate one by one in step 5."""

    def __post_init__(self) -> None:
        require_at_least_one(self, ("max_sequences", "train_steps", "n_ablations"))
        require_k_features(self)


@dataclass(frozen=True)
class Workspace:
    """The model, its tokenizer, and where things go."""

    config: DemoConfig
    out: Path
    model: HookedMDLM
    tokenizer: Tokenizer

    @property
    def store(self) -> Path:
        """The captured activations."""
        return self.out / "activations.zarr"

    @property
    def clt(self) -> Path:
        """The trained transcoder."""
        return self.out / "clt"


def main(argv: Sequence[str]) -> int:
    """Run the demo."""
    config = parse_args(DemoConfig, argv, prog="mdlm-interp demo")
    start = time.perf_counter()
    model = HookedMDLM.from_pretrained(config.model)
    tokenizer = load_tokenizer(config.model)
    work = Workspace(config, make_directory(config.out), model, tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    blocks, width = model.config.n_blocks, model.config.hidden_dim
    print(f"model {config.model}: {parameters / 1e6:.1f} M parameters, {blocks} blocks of width {width}")
    print(f"everything goes to {work.out}")
    evaluation, effects, files = _run(work)
    seconds = time.perf_counter() - start
    print("\n".join(["", *demo_report.overview(evaluation, effects, tokenizer, files[0], seconds)]))
    print("\n".join(["", "try next:", *demo_report.next_commands(work.out, config.model, SENTENCES[0])]))
    return 0


def make_directory(out: Path | None) -> Path:
    """A new directory: the one asked for, or the first free name.

    Raises:
        OutputExistsError: If the one asked for holds something.
    """
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise OutputExistsError(f"{out} exists and is not empty; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        return out
    for number in count(1):
        candidate = Path(DEFAULT_OUT if number == 1 else f"{DEFAULT_OUT}-{number}")
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("count() does not end")


def _run(work: Workspace) -> tuple[Evaluation, PredictionEffects, list[Path]]:
    """The six steps."""
    with _step(1, "fill masks in three sentences"):
        for sentence in SENTENCES:
            print("\n".join(demo_report.filled(sentence, fill_masks(work.model, work.tokenizer, sentence))))
    with _step(2, "capture what every MLP reads and writes"):
        _capture(work)
    with _step(3, "train a cross-layer transcoder on it"):
        clt = _train(work)
    with _step(4, "put it in place of the MLPs"):
        evaluation = evaluate(work.model, clt, open_store(work.store), progress=True)
        print("\n".join([*layer_table(evaluation), *summary(evaluation)]))
    with _step(5, "find the feature that matters most to one word, and ablate it"):
        effects = _examine(work, clt)
    with _step(6, "save the report and plots"):
        about = {"transcoder": str(work.clt), "model": work.config.model, "store": str(work.store)}
        about |= origin(clt, open_store(work.store))
        log = read_log(work.clt / METRICS)
        files = write_report(evaluation, work.out / "report", about=about, training_log=log)
        files += demo_report.save_effects(effects, work.tokenizer, work.out / "report")
        print("\n".join(str(file) for file in files))
    return evaluation, effects, files


@contextmanager
def _step(number: int, title: str) -> Iterator[None]:
    print(f"\n[{number}/{STEPS}] {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"({time.perf_counter() - start:.1f} s)", flush=True)


def _capture(work: Workspace) -> None:
    text = Path(str(resources.files("mdlm_interp.assets") / "demo.txt"))
    config = CaptureConfig(
        model=work.config.model, files=(text,), out=str(work.store), max_sequences=work.config.max_sequences
    )
    store = run_capture(config, progress=True)
    masked = float(store.coords(slice(None))["is_masked"].double().mean())
    print(
        f"{len(store):,} tokens of {text.name}, {masked:.0%} of them masked, x {len(store.hooks)} hook "
        f"points: {store.bytes_on_disk / 1e6:.0f} MB in {work.store}"
    )


def _train(work: Workspace) -> CrossLayerTranscoder:
    settings = TrainConfig(steps=work.config.train_steps, dead_after_tokens=25_000)
    run = CLTRunConfig(
        store=work.store,
        out=work.clt,
        n_features=work.config.n_features,
        k=work.config.k,
        held_out_fraction=0.2,  # of a small text, so that there is more than a handful to measure on
        train=settings,
    )
    clt = train(run, progress=True)
    last = read_log(work.clt / METRICS)[-1]
    print(
        f"{clt.config.n_layers} layers of {clt.config.n_features} features, {clt.config.k} active at a time: "
        f"{fvu_text(last, explained=True)} of the training batches' variance explained"
    )
    return clt


def _examine(work: Workspace, clt: CrossLayerTranscoder) -> PredictionEffects:
    """Effects of features on the likeliest word at the first mask of the examined sentence."""
    sentence = SENTENCES[EXAMINED]
    ids = encode_prompt(work.model, work.tokenizer, sentence)
    is_masked = ids == work.model.config.mask_id
    position = int(is_masked[0].nonzero()[0])
    # The time that the share of masks suggests, as fill_masks has it.
    sigma = LogLinearSchedule().sigma(is_masked.double().mean(1)).float()
    with torch.no_grad():
        logits = work.model(ids, sigma)[0, position]
    token = int(logits[: work.model.config.mask_id].argmax())
    effects = feature_effects(
        ReplacementModel(work.model, clt),
        ids,
        position,
        token,
        sigma,
        n_ablations=work.config.n_ablations,
        progress=True,
    )
    print("\n".join(demo_report.effects(sentence, ids[0].tolist(), effects, work.tokenizer)))
    return effects
