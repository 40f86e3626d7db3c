"""crosslayer-coding: its config and its state dict.

    cfg.json              num_features, num_layers, d_model, activation_fn, normalization_method, decoder_tying, ...
    model.safetensors     encoder_module.encoders.{l}.weight [feature d], .bias_param [feature]
                          decoder_module.decoders.{s}->{t}.weight [d feature], .bias_param [d], for all s <= t
                          decoder_module.skip_weights.{s}->{t} [out in], with skip_connection
                          theta_manager.log_threshold [layer feature], with jumprelu

    tied decoders: decoder_module.decoders.{i}, of source i (per_source) or target i (per_target), and
    skip_weights.{t}; feature_scale.{t} [feature] multiplies what is active before it is decoded to t.

    Active where h >= exp(log_threshold). There is a bias for each pair; only their sum over s is identified, so all
    of it is written to t->t and the sum is read. Rows of its stores may be normalised: cfg.json says how and
    norm_stats.json, which is not part of its checkpoint, holds the statistics.

Source:
    curt-tigges/crosslayer-coding, July 2025, as decode-clt 0.0.1: models/encoder.py, decoder.py, theta.py, parallel.py,
    config/clt_config.py, training/data/manifest_activation_store.py.
"""

# Axes: layer, feature, d_model

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdlm_interp.errors import CheckpointError
from mdlm_interp.shapes import Float64
from transcoder.checkpoint import read_json, write_json, write_tensors
from transcoder.config import TranscoderConfig
from transcoder.config_checks import LAYER_FIELD
from transcoder.folded import FoldedWeights
from transcoder.interchange.crosslayer_statistics import CONFIG, denormalised
from transcoder.interchange.exchanged import About, Hooks, Reading
from transcoder.interchange.form import LOG_TINY, Form, single
from transcoder.interchange.stored import StoredTensors, require

WEIGHTS = "model.safetensors"
LATEST = "clt_checkpoint_latest.safetensors"

OFF = {"enable_feature_offset": False}
"""Settings that have to be off: an offset on active features only is no linear decoder."""


def write(form: Form, directory: Path, about: About) -> None:
    """Write both files into an existing directory."""
    config, weights = form.config, form.weights
    zero = torch.zeros(config.d_model)
    tensors: dict[str, Tensor] = {}
    for layer in range(config.n_layers):
        encoder = f"encoder_module.encoders.{layer}"
        tensors[f"{encoder}.weight"] = single(weights.W_enc[layer], f"{encoder}.weight")
        tensors[f"{encoder}.bias_param"] = single(weights.b_enc[layer], f"{encoder}.bias_param")
    for source in range(config.n_layers):
        for target in range(source, config.n_layers):
            name, later = f"decoder_module.decoders.{source}->{target}", target - source
            if later < weights.W_dec[source].shape[1]:
                tensors[f"{name}.weight"] = single(weights.W_dec[source][:, later].T, f"{name}.weight")
            else:
                tensors[f"{name}.weight"] = torch.zeros(config.d_model, config.n_features)
            bias = single(weights.b_dec[target], f"{name}.bias_param") if later == 0 else zero.clone()
            tensors[f"{name}.bias_param"] = bias
            if weights.W_skip is not None:
                skip = (
                    single(weights.W_skip[target], "W_skip") if later == 0 else zero.repeat(config.d_model, 1)
                )
                tensors[f"decoder_module.skip_weights.{source}->{target}"] = skip
    if weights.threshold is not None:
        logs = weights.threshold.clamp(min=LOG_TINY).log()
        tensors["theta_manager.log_threshold"] = single(logs, "log_threshold")
    write_tensors(directory / WEIGHTS, tensors)
    write_json(directory / CONFIG, _settings(form, about))


def _settings(form: Form, about: About) -> dict[str, Any]:
    """Only what its config has had since July 2025: it does not start with a name that it does not know."""
    config = form.config
    settings: dict[str, Any] = {
        "num_features": config.n_features,
        "num_layers": config.n_layers,
        "d_model": config.d_model,
        "model_name": about.model_name,
        "normalization_method": "none",
        "activation_fn": config.activation,
        "clt_dtype": "float32",
        "expected_input_dtype": "float32",
        "tl_input_template": config.input_hook.replace(LAYER_FIELD, "{}"),
        "tl_output_template": config.output_hook.replace(LAYER_FIELD, "{}"),
        "decoder_tying": "none",
        "skip_connection": config.skip,
    }
    if form.weights.threshold is not None:
        # The log_threshold of the weights counts; this is what the tensor starts from.
        settings["jumprelu_threshold"] = float(form.weights.threshold.median())
    return settings


def read(path: Path, hooks: Hooks) -> Reading:
    """Read a directory, or one of the checkpoints in it.

    Raises:
        CheckpointError: If a file is missing or damaged, or says something that has no place here.
    """
    directory = path.parent if path.suffix == ".safetensors" else path
    settings = read_json(directory / CONFIG)
    config, tying = _config(directory / CONFIG, settings)
    stored = StoredTensors(path if path.suffix == ".safetensors" else _weights_file(directory))
    weights = FoldedWeights(
        W_enc=torch.stack([_encoder(stored, config, layer, "weight") for layer in range(config.n_layers)]),
        b_enc=torch.stack(
            [_encoder(stored, config, layer, "bias_param") for layer in range(config.n_layers)]
        ),
        W_dec=_decoders(stored, config, tying),
        b_dec=_biases(stored, config, tying),
        threshold=_thresholds(stored, config),
        W_skip=_skip(stored, config, tying),
    )
    stored.finish()
    weights, notes = denormalised(weights, directory, str(settings.get("normalization_method", "none")))
    for side, named in (("input", hooks.input), ("output", hooks.output)):
        if not settings.get(f"tl_{side}_template") and named is None:
            taken = getattr(config, f"{side}_hook")
            notes.append(f"{CONFIG} has no tl_{side}_template; taken is {taken}, or name it with {side}_hook")
    return Reading(hooks.over(Form(config, weights).trimmed()), notes)


def _config(path: Path, settings: dict[str, Any]) -> tuple[TranscoderConfig, str]:
    activation = require(settings, "activation_fn", str, path)
    if activation not in ("relu", "jumprelu"):
        raise CheckpointError(
            f"activation_fn in {path} is {activation!r}, which there depends on the whole batch; convert it to "
            f"jumprelu in crosslayer-coding (convert_to_jumprelu_inplace) first"
        )
    for name, wanted in OFF.items():
        if settings.get(name, wanted) != wanted:
            raise CheckpointError(f"{name} in {path} is {settings[name]!r}, which no transcoder here has")
    tying = settings.get("decoder_tying", "none")
    if tying not in ("none", "per_source", "per_target"):
        raise CheckpointError(f"decoder_tying in {path} is {tying!r}, known: none, per_source, per_target")
    sizes = {name: require(settings, name, int, path) for name in ("num_layers", "d_model", "num_features")}
    if min(sizes.values()) < 1:
        raise CheckpointError(f"sizes in {path} must be at least 1, got {sizes}")
    hooks: dict[str, Any] = {
        f"{side}_hook": str(settings[f"tl_{side}_template"]).replace("{}", LAYER_FIELD)
        for side in ("input", "output")
        if settings.get(f"tl_{side}_template")
    }
    if any(LAYER_FIELD not in hook for hook in hooks.values()):
        raise CheckpointError(
            f"hook points in {path} must have {{}} for the layer, got {', '.join(hooks.values())}"
        )
    config = TranscoderConfig(
        n_layers=sizes["num_layers"],
        d_model=sizes["d_model"],
        n_features=sizes["num_features"],
        activation=activation,
        ste="crosslayer-coding",
        skip=settings.get("skip_connection", False) is True,
        **hooks,
    )
    return config, tying


def _weights_file(directory: Path) -> Path:
    for name in (WEIGHTS, LATEST):
        if (directory / name).is_file():
            return directory / name
    steps = sorted(directory.glob("clt_checkpoint_*.safetensors"))
    if len(steps) == 1:
        return steps[0]
    if steps:
        raise CheckpointError(f"{directory} has {len(steps)} checkpoints; name one, such as {steps[-1]}")
    pickled = next(iter(sorted(directory.glob("*.pt"))), None)
    remedy = (
        f"{pickled.name} may run code when it is opened; save it as safetensors first"
        if pickled is not None
        else "is it a checkpoint of crosslayer-coding?"
    )
    raise CheckpointError(f"{directory} has no {WEIGHTS} or {LATEST}; {remedy}")


def _encoder(stored: StoredTensors, config: TranscoderConfig, layer: int, part: str) -> Tensor:
    shape = (config.n_features, config.d_model)[: 2 if part == "weight" else 1]
    return stored.take(f"encoder_module.encoders.{layer}.{part}", shape)


def _decoders(stored: StoredTensors, config: TranscoderConfig, tying: str) -> list[Tensor]:
    shape = (config.d_model, config.n_features)
    found = []
    for source in range(config.n_layers):
        parts = []
        for target in range(source, config.n_layers):
            weight = stored.take(f"decoder_module.decoders.{_decoder(source, target, tying)}.weight", shape).T
            scale = f"decoder_module.feature_scale.{target}"
            if scale in stored:
                weight = weight * stored.take(scale, (config.n_features,))[:, None]
            parts.append(weight)
        found.append(torch.stack(parts, 1))
    return found


def _biases(stored: StoredTensors, config: TranscoderConfig, tying: str) -> Float64[Tensor, "layer d_model"]:
    """The sum that a target gets: of all its sources, or its one decoder's."""
    sums = []
    for target in range(config.n_layers):
        sources = [target] if tying == "per_target" else range(target + 1)
        names = (
            f"decoder_module.decoders.{_decoder(source, target, tying)}.bias_param" for source in sources
        )
        sums.append(torch.stack([stored.take(name, (config.d_model,)) for name in names]).sum(0))
    return torch.stack(sums)


def _decoder(source: int, target: int, tying: str) -> str:
    return {"none": f"{source}->{target}", "per_source": str(source), "per_target": str(target)}[tying]


def _thresholds(stored: StoredTensors, config: TranscoderConfig) -> Float64[Tensor, "layer feature"] | None:
    if config.activation == "relu":
        return None
    return stored.take("theta_manager.log_threshold", (config.n_layers, config.n_features)).exp()


def _skip(
    stored: StoredTensors, config: TranscoderConfig, tying: str
) -> Float64[Tensor, "layer d_model d_model"] | None:
    if not config.skip:
        return None
    square, found = (config.d_model, config.d_model), []
    for target in range(config.n_layers):
        own = str(target) if tying != "none" else f"{target}->{target}"
        found.append(stored.take(f"decoder_module.skip_weights.{own}", square))
        for source in range(target if tying == "none" else 0):
            name = f"decoder_module.skip_weights.{source}->{target}"
            if bool(stored.take(name, square).any()):
                raise CheckpointError(
                    f"{name} in {stored.path} maps layer {source}'s input to layer {target}; here a skip stays in "
                    f"its layer, so it cannot be imported"
                )
    return torch.stack(found)
