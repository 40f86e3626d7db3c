"""What each format cannot hold: refused if the other tool would compute something else, told if it is only lost.

What the other tools do was read in their code: circuit-tracer 0.4.1 and 0.5.0, SAELens 6.54.12, and
crosslayer-coding of July 2025 (decode-clt 0.0.1).
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from mdlm_interp.errors import DataError
from transcoder.config import TranscoderConfig

Format: TypeAlias = Literal["circuit-tracer", "saelens", "crosslayer-coding"]

_CALIBRATE = (
    "export with jumprelu and a store, which calibrates thresholds on held-out rows, or train with "
    "activation batchtopk, which is saved as a jumprelu"
)


def per_layer(config: TranscoderConfig) -> bool:
    """Whether features write to their own layer only, by the config's own words."""
    return config.connectivity != "clt" and config.reach == 1


def notes(config: TranscoderConfig, target: Format) -> list[str]:
    """What gets lost or has to be watched, one sentence each.

    Raises:
        DataError: If the other tool would compute something else; with the remedy.
    """
    if config.activation == "batchtopk":
        raise DataError(
            f"a batchtopk's features depend on the other rows of a batch, which no format holds; {_CALIBRATE}"
        )
    of_target = {"circuit-tracer": _circuit_tracer, "saelens": _saelens, "crosslayer-coding": _crosslayer}
    found = of_target[target](config)
    if config.activation == "jumprelu":
        found.append(
            f"the pseudo-gradient ({config.ste}, width {config.ste_width:g}) is not stored; it matters only for "
            f"further training"
        )
    return found


def _circuit_tracer(config: TranscoderConfig) -> list[str]:
    found = [
        "circuit-tracer's attribution sets features and errors at position 0 to zero, and explains the logits "
        "of the last position: made for causal models, so use its weights and graph viewer, not its attribution, "
        "with a masked diffusion model"
    ]
    if per_layer(config):
        if config.activation == "topk":
            found.append(
                f"k = {config.k} is read from config.yaml by circuit-tracer after April 2026 (pull request 94); "
                f"older ones and the package of that name on PyPI apply a plain ReLU, with many more active "
                f"features. Where fewer than k are positive, it keeps negative ones that are zero here"
            )
        return found
    found.insert(0, "load_clt's default is bfloat16: pass dtype=torch.float32")
    if config.activation == "topk":
        raise DataError(f"circuit-tracer's CLT files have no place for topk's k = {config.k}; {_CALIBRATE}")
    if config.skip:
        raise DataError(
            "circuit-tracer's CLT files have no place for a skip up to version 0.5.0, which drops it without a "
            "word; export to crosslayer-coding, or train without a skip"
        )
    return found + _zeros(config)


def _saelens(config: TranscoderConfig) -> list[str]:
    if config.reach > 1:
        raise DataError(
            f"SAELens holds one transcoder per layer, and these features write to {config.reach} layers; export "
            f"to circuit-tracer or crosslayer-coding, or train with connectivity plt"
        )
    if config.activation == "topk":
        raise DataError(f"SAELens has no transcoder with topk (k = {config.k}); {_CALIBRATE}")
    return []


def _crosslayer(config: TranscoderConfig) -> list[str]:
    if config.activation == "topk":
        raise DataError(
            f"crosslayer-coding's topk ranks features by how far they are from their mean over the batch, another "
            f"function than the {config.k} largest of a row; {_CALIBRATE}"
        )
    found = _zeros(config)
    if config.activation == "jumprelu" and config.ste != "crosslayer-coding":
        found.append("crosslayer-coding counts a pre-activation equal to its threshold as active")
    return found


def _zeros(config: TranscoderConfig) -> list[str]:
    stored, used = (sum(range(1, config.n_layers + 1)), sum(_targets(config)))
    if stored == used:
        return []
    return [
        f"the format has a decoder to every later layer: of {stored}, {stored - used} are stored as zeros, "
        f"and training there would not keep them zero"
    ]


def _targets(config: TranscoderConfig) -> list[int]:
    return [len(config.targets(source)) for source in range(config.n_layers)]
