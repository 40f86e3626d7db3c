"""SAELens: a folder per layer, each one of its transcoders.

    layer_{i}/cfg.json                  architecture, d_in, d_sae, d_out, dtype, ..., metadata with the hook points
    layer_{i}/sae_weights.safetensors   W_enc [d_in d_sae], b_enc, W_dec [d_sae d_out], b_dec,
                                        threshold [d_sae], W_skip [d_out d_in]

    architecture transcoder: relu(x W_enc + b_enc) W_dec + b_dec; jumprelu_transcoder: active where the
    pre-activation is > threshold; skip_transcoder and jumprelu_skip_transcoder: + x W_skip^T.

Source:
    SAELens 6.54.12: saes/transcoder.py, saes/sae.py (save_model, load_from_disk), loading/pretrained_sae_loaders.py.
"""

# Axes: layer, feature, d_model

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mdlm_interp.errors import CheckpointError, nearest
from transcoder.checkpoint import read_json, write_json, write_tensors
from transcoder.config import hook_names
from transcoder.interchange.exchanged import About, Hooks, Reading, strict_thresholds
from transcoder.interchange.form import Form, single
from transcoder.interchange.hook_points import template_of
from transcoder.interchange.stacked import no_layers, stacked_form
from transcoder.interchange.stored import StoredTensors, require

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.54.12"
"""Of the format: without one from 6.0 on, SAELens reads the settings as those of its older form."""

ARCHITECTURES = {
    (False, False): "transcoder",
    (False, True): "skip_transcoder",
    (True, False): "jumprelu_transcoder",
    (True, True): "jumprelu_skip_transcoder",
}
"""By (has thresholds, has a skip)."""

PLAIN = {"apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none"}
"""Settings that have to be off: what they do is not in a transcoder here."""


def write(form: Form, directory: Path, about: About) -> None:
    """Write the folders into an existing directory."""
    config, weights = form.config, form.weights
    thresholds = strict_thresholds(form)
    names = zip(
        hook_names(config.input_hook, config.n_layers),
        hook_names(config.output_hook, config.n_layers),
        strict=True,
    )
    for layer, (reads, writes) in enumerate(names):
        tensors = {
            "W_enc": single(weights.W_enc[layer].T, "W_enc"),
            "b_enc": single(weights.b_enc[layer], "b_enc"),
            "W_dec": single(weights.W_dec[layer][:, 0], "W_dec"),
            "b_dec": single(weights.b_dec[layer], "b_dec"),
        }
        if thresholds is not None:
            tensors["threshold"] = thresholds[layer]
        if weights.W_skip is not None:
            tensors["W_skip"] = single(weights.W_skip[layer], "W_skip")
        folder = directory / f"layer_{layer}"
        write_tensors(folder / WEIGHTS, tensors)
        write_json(
            folder / CONFIG,
            {
                "architecture": ARCHITECTURES[thresholds is not None, weights.W_skip is not None],
                "d_in": config.d_model,
                "d_sae": config.n_features,
                "d_out": config.d_model,
                "dtype": "float32",
                "device": "cpu",
                **PLAIN,
                "metadata": {
                    "sae_lens_version": VERSION,
                    "sae_lens_training_version": None,
                    "model_name": about.model_name,
                    "hook_name": reads,
                    "hook_name_out": writes,
                    "prepend_bos": False,
                },
            },
        )


def read(directory: Path, hooks: Hooks) -> Reading:
    """Read the folders of all layers.

    Raises:
        CheckpointError: If one is missing or damaged, or says something that has no place here.
    """
    folders = _folders(directory)
    settings = [read_json(folder / CONFIG) for folder in folders]
    shape = tuple(require(settings[0], name, int, folders[0] / CONFIG) for name in ("d_in", "d_sae", "d_out"))
    for folder, of_layer in zip(folders, settings, strict=True):
        _check(folder / CONFIG, of_layer, shape, settings[0])
    has_threshold, has_skip = _kind(folders[0] / CONFIG, settings[0])
    d_model, n_features, _ = shape
    parts = no_layers()
    W_dec = []
    for folder in folders:
        stored = StoredTensors(folder / WEIGHTS)
        parts["W_enc"].append(stored.take("W_enc", (d_model, n_features)).T)
        parts["b_enc"].append(stored.take("b_enc", (n_features,)))
        parts["b_dec"].append(stored.take("b_dec", (d_model,)))
        W_dec.append(stored.take("W_dec", (n_features, d_model))[:, None])
        if has_threshold:
            parts["threshold"].append(stored.take("threshold", (n_features,)))
        if has_skip:
            parts["W_skip"].append(stored.take("W_skip", (d_model, d_model)))
        stored.finish()
    form = stacked_form(
        parts,
        W_dec,
        directory,
        connectivity="plt",
        input_hook=hooks.input or _template(folders, settings, "hook_name"),
        output_hook=hooks.output or _template(folders, settings, "hook_name_out"),
    )
    return Reading(form)


def _folders(directory: Path) -> list[Path]:
    """The layers' folders, in the order of the numbers in their hook points, or names without these."""
    if (directory / CONFIG).is_file():
        raise CheckpointError(
            f"{directory} is one layer of SAELens; give the directory that holds the folders of all layers"
        )
    found = [path.parent for path in directory.glob(f"*/{CONFIG}")]
    if not found:
        raise CheckpointError(f"{directory} has no folders with {CONFIG}; is it a transcoder from SAELens?")
    numbers = {folder: _number(folder) for folder in found}
    ordered = sorted(found, key=lambda folder: numbers[folder])
    if [numbers[folder] for folder in ordered] != list(range(len(found))):
        listed = ", ".join(f"{folder.name} (layer {numbers[folder]})" for folder in ordered)
        raise CheckpointError(f"{directory} must have one folder for each layer from 0, got {listed}")
    return ordered


def _number(folder: Path) -> int:
    settings = read_json(folder / CONFIG)
    metadata = settings.get("metadata")
    hook = metadata.get("hook_name") if isinstance(metadata, dict) else None
    match = (
        re.search(r"(?:^|\.)(\d+)\.", hook) if isinstance(hook, str) else re.search(r"(\d+)$", folder.name)
    )
    if match is None:
        raise CheckpointError(
            f"{folder / CONFIG} does not say which layer it is of: its metadata has hook_name {hook!r}; "
            f"name one such as blocks.0.mlp.hook_in"
        )
    return int(match[1])


def _kind(path: Path, settings: dict[str, Any]) -> tuple[bool, bool]:
    architecture = settings.get("architecture")
    for kind, name in ARCHITECTURES.items():
        if name == architecture:
            return kind
    raise CheckpointError(
        f"architecture in {path} is {architecture!r}, which is no transcoder"
        f"{nearest(str(architecture), ARCHITECTURES.values())}"
    )


def _check(path: Path, settings: dict[str, Any], shape: tuple[int, ...], first: dict[str, Any]) -> None:
    found = tuple(require(settings, name, int, path) for name in ("d_in", "d_sae", "d_out"))
    if found != shape or settings.get("architecture") != first.get("architecture"):
        raise CheckpointError(
            f"{path} is {settings.get('architecture')} of d_in, d_sae, d_out {found}, layer 0 is "
            f"{first.get('architecture')} of {shape}; all layers must be alike to be one transcoder"
        )
    if shape[0] != shape[2]:
        raise CheckpointError(f"{path} maps width {shape[0]} to {shape[2]}; here both must be d_model")
    for name, wanted in PLAIN.items():
        if settings.get(name, wanted) != wanted:
            raise CheckpointError(
                f"{name} in {path} is {settings[name]!r}, and only {wanted!r} can be imported; fold it into the "
                f"weights in SAELens first"
            )


def _template(folders: list[Path], settings: list[dict[str, Any]], name: str) -> str:
    metadata = [of_layer.get("metadata") for of_layer in settings]
    hooks = [str(found.get(name) if isinstance(found, dict) else None) for found in metadata]
    return template_of(hooks, f"{name} in {folders[0].parent}")
