"""circuit-tracer: a cross-layer transcoder as two files per layer, or a per-layer one as one file per layer.

    config.yaml                model_name, model_kind, feature_input_hook, feature_output_hook, scan
    W_enc_{i}.safetensors      W_enc_{i} [feature d], b_enc_{i} [feature], b_dec_{i} [d] of target i,
                               threshold_{i} [feature] with JumpReLU
    W_dec_{i}.safetensors      W_dec_{i} [feature, layers - i, d]; index t - i writes to layer t
    layer_{i}.safetensors      per layer: W_enc, b_enc, W_dec [feature d], b_dec, activation_function.threshold,
                               W_skip [out in]

    h = x W_enc^T + b_enc, active where h > threshold, or above 0 where there are no thresholds.

Later versions read W_skip_{i} [in out] from W_enc_{i}.safetensors; it is read here, but not written.

Source:
    decoderesearch/circuit-tracer: transcoder/cross_layer_transcoder.py, transcoder/single_layer_transcoder.py,
    utils/hf_utils.py, versions 0.4.1 and 0.5.0.
"""

# Axes: layer, feature, d_model

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mdlm_interp.atomic_files import replacing
from mdlm_interp.errors import CheckpointError
from transcoder.checkpoint import write_tensors
from transcoder.interchange.exchanged import About, Hooks, Reading, strict_thresholds
from transcoder.interchange.form import Form, single
from transcoder.interchange.hook_points import from_block, in_block
from transcoder.interchange.limits import per_layer
from transcoder.interchange.stacked import no_layers, stacked_form
from transcoder.interchange.stored import StoredTensors, numbered, require

CONFIG = "config.yaml"
CROSS_LAYER, PER_LAYER = "cross_layer_transcoder", "transcoder_set"
THRESHOLD = "activation_function.threshold"


def write(form: Form, directory: Path, about: About) -> None:
    """Write the files into an existing directory."""
    config, kind = form.config, PER_LAYER if per_layer(form.config) else CROSS_LAYER
    settings: dict[str, Any] = {
        "model_name": about.model_name,
        "model_kind": kind,
        "feature_input_hook": in_block(config.input_hook),
        "feature_output_hook": in_block(config.output_hook),
        # Its local viewer serves a transcoder's features from here, and wants an absolute path.
        "scan": str(about.place.absolute()),
    }
    files = [f"layer_{layer}.safetensors" for layer in range(config.n_layers)]
    if kind == PER_LAYER:
        settings["transcoders"] = [str(about.place.absolute() / name) for name in files]
        settings["activation"] = config.activation
        if config.activation == "topk":
            settings["k"] = config.k
    thresholds = strict_thresholds(form)
    for layer in range(config.n_layers):
        threshold = None if thresholds is None else thresholds[layer]
        if kind == PER_LAYER:
            write_tensors(directory / files[layer], _one_layer(form, layer, threshold))
            continue
        encoder = {
            f"W_enc_{layer}": single(form.weights.W_enc[layer], f"W_enc_{layer}"),
            f"b_enc_{layer}": single(form.weights.b_enc[layer], f"b_enc_{layer}"),
            f"b_dec_{layer}": single(form.weights.b_dec[layer], f"b_dec_{layer}"),
        }
        if threshold is not None:
            encoder[f"threshold_{layer}"] = threshold
        write_tensors(directory / f"W_enc_{layer}.safetensors", encoder)
        decoder = {f"W_dec_{layer}": _to_all_later(form, layer)}
        write_tensors(directory / f"W_dec_{layer}.safetensors", decoder)
    with replacing(directory / CONFIG) as partial:
        partial.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def _one_layer(form: Form, layer: int, threshold: Tensor | None) -> dict[str, Tensor]:
    weights = form.weights
    tensors = {
        "W_enc": single(weights.W_enc[layer], "W_enc"),
        "b_enc": single(weights.b_enc[layer], "b_enc"),
        "W_dec": single(weights.W_dec[layer][:, 0], "W_dec"),
        "b_dec": single(weights.b_dec[layer], "b_dec"),
    }
    if threshold is not None:
        tensors[THRESHOLD] = threshold
    if weights.W_skip is not None:
        tensors["W_skip"] = single(weights.W_skip[layer], "W_skip")
    return tensors


def _to_all_later(form: Form, layer: int) -> Tensor:
    """A source's decoders with zeros for the layers beyond its reach."""
    weight, config = form.weights.W_dec[layer], form.config
    full = torch.zeros(config.n_features, config.n_layers - layer, config.d_model)
    full[:, : weight.shape[1]] = single(weight, f"W_dec_{layer}")
    return full


def read(directory: Path, hooks: Hooks) -> Reading:
    """Read either kind.

    Raises:
        CheckpointError: If a file is missing or damaged, or says something that has no place here.
    """
    path = directory / CONFIG
    settings = _settings(path)
    kind = require(settings, "model_kind", str, path)
    if kind not in (CROSS_LAYER, PER_LAYER):
        raise CheckpointError(f"model_kind in {path} is {kind!r}, known: {CROSS_LAYER!r}, {PER_LAYER!r}")
    named = {
        "input_hook": hooks.input or from_block(require(settings, "feature_input_hook", str, path)),
        "output_hook": hooks.output or from_block(require(settings, "feature_output_hook", str, path)),
    }
    if kind == CROSS_LAYER:
        return Reading(_read_cross_layer(directory, named).trimmed())
    return _read_per_layer(directory, settings, named)


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {CONFIG}; is it a transcoder for circuit-tracer?"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be read ({reason})") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} must hold settings by name, got {type(settings).__name__}")
    return settings


def _read_cross_layer(directory: Path, hooks: dict[str, str]) -> Form:
    n_layers = numbered(directory, "W_enc_")
    first = StoredTensors(directory / "W_enc_0.safetensors")
    n_features, d_model = first.take("W_enc_0", (None, None)).shape
    has_threshold, has_skip = "threshold_0" in first, "W_skip_0" in first
    parts = no_layers()
    W_dec = []
    for layer in range(n_layers):
        encoder = StoredTensors(directory / f"W_enc_{layer}.safetensors")
        parts["W_enc"].append(encoder.take(f"W_enc_{layer}", (n_features, d_model)))
        parts["b_enc"].append(encoder.take(f"b_enc_{layer}", (n_features,)))
        parts["b_dec"].append(encoder.take(f"b_dec_{layer}", (d_model,)))
        if has_threshold:
            parts["threshold"].append(encoder.take(f"threshold_{layer}", (n_features,)))
        if has_skip:
            # x @ W_skip there, x @ W_skip.T here.
            parts["W_skip"].append(encoder.take(f"W_skip_{layer}", (d_model, d_model)).T)
        encoder.finish()
        decoder = StoredTensors(directory / f"W_dec_{layer}.safetensors")
        W_dec.append(decoder.take(f"W_dec_{layer}", (n_features, n_layers - layer, d_model)))
        decoder.finish()
    return stacked_form(parts, W_dec, directory / "W_enc_0.safetensors", connectivity="clt", **hooks)


def _read_per_layer(directory: Path, settings: dict[str, Any], hooks: dict[str, str]) -> Reading:
    files = _layer_files(directory, settings)
    parts = no_layers()
    W_dec = []
    first = StoredTensors(files[0])
    n_features, d_model = first.take("W_enc", (None, None)).shape
    for file in files:
        stored = StoredTensors(file)
        parts["W_enc"].append(stored.take("W_enc", (n_features, d_model)))
        parts["b_enc"].append(stored.take("b_enc", (n_features,)))
        parts["b_dec"].append(stored.take("b_dec", (d_model,)))
        W_dec.append(stored.take("W_dec", (n_features, d_model))[:, None])
        if THRESHOLD in first:
            parts["threshold"].append(stored.take(THRESHOLD, (n_features,)))
        if "W_skip" in first:
            parts["W_skip"].append(stored.take("W_skip", (d_model, d_model)))
        stored.finish()
    form = stacked_form(parts, W_dec, files[0], connectivity="plt", **hooks)
    if settings.get("activation") != "topk":
        return Reading(form)
    if THRESHOLD in first:
        raise CheckpointError(f"{directory / CONFIG} says topk, but {files[0]} has thresholds; which is it?")
    k = require(settings, "k", int, directory / CONFIG)
    if not 1 <= k <= n_features:
        raise CheckpointError(f"k in {directory / CONFIG} must be from 1 to {n_features}, got {k}")
    topk = replace(form.config, activation="topk", k=k)
    note = f"circuit-tracer's topk keeps negative values among its {k} largest, which are zero here"
    return Reading(Form(topk, form.weights), [note])


def _layer_files(directory: Path, settings: dict[str, Any]) -> list[Path]:
    listed = settings.get("transcoders")
    if listed is None:
        return [directory / f"layer_{layer}.safetensors" for layer in range(numbered(directory, "layer_"))]
    path = directory / CONFIG
    if not isinstance(listed, list) or not listed or not all(isinstance(name, str) for name in listed):
        raise CheckpointError(f"transcoders in {path} must be a list of files, got {listed!r}")
    remote = [name for name in listed if "://" in name]
    if remote:
        raise CheckpointError(
            f"{path} names {remote[0]!r}; download the files and list their paths in {CONFIG} instead"
        )
    return [_located(directory, name) for name in listed]


def _located(directory: Path, name: str) -> Path:
    """A listed file; a directory that was moved has it beside its config, and not where the absolute path says."""
    beside = directory / Path(name).name
    return beside if Path(name).is_absolute() and beside.is_file() else directory / name
