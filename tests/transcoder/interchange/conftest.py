"""Readers of the three formats, written from their description alone, and transcoders to write.

They share nothing with the package: files in, feature activations and reconstruction out, in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from transcoder.config import TranscoderConfig
from transcoder.model import CrossLayerTranscoder
from transcoder.normalisation import Normalisation

Outputs = tuple[Tensor, Tensor]
Peer = Callable[[Path, Tensor], Outputs]


def doubles(path: Path) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in load_file(path).items()}


def circuit_tracer(directory: Path, x: Tensor) -> Outputs:
    """Strict thresholds; W_dec source-major, index t - s; per layer, a skip as x W_skip^T."""
    settings = yaml.safe_load((directory / "config.yaml").read_text())
    n_layers = len(x)
    acts = torch.zeros(0)
    if settings["model_kind"] == "transcoder_set":
        of_layers, outputs = [], []
        for layer in range(n_layers):
            file = doubles(directory / f"layer_{layer}.safetensors")
            h = x[layer] @ file["W_enc"].T + file["b_enc"]
            if settings.get("activation") == "topk":
                kept = torch.zeros_like(h).scatter_(1, h.topk(settings["k"], dim=1).indices, 1.0)
                a = h * kept
            elif "activation_function.threshold" in file:
                a = h * (h > file["activation_function.threshold"])
            else:
                a = h.clamp(min=0)
            y = a @ file["W_dec"] + file["b_dec"]
            outputs.append(y + x[layer] @ file["W_skip"].T if "W_skip" in file else y)
            of_layers.append(a)
        return torch.stack(of_layers), torch.stack(outputs)
    encoders = [doubles(directory / f"W_enc_{layer}.safetensors") for layer in range(n_layers)]
    found = []
    for layer, file in enumerate(encoders):
        h = x[layer] @ file[f"W_enc_{layer}"].T + file[f"b_enc_{layer}"]
        jump = "threshold_0" in encoders[0]
        found.append(h * (h > file[f"threshold_{layer}"]) if jump else h.clamp(min=0))
    acts = torch.stack(found)
    y = (
        torch.stack([file[f"b_dec_{layer}"] for layer, file in enumerate(encoders)])[:, None]
        .expand_as(x)
        .clone()
    )
    for source in range(n_layers):
        weight = doubles(directory / f"W_dec_{source}.safetensors")[f"W_dec_{source}"]
        for target in range(source, n_layers):
            y[target] += acts[source] @ weight[:, target - source]
    return acts, y


def saelens(directory: Path, x: Tensor) -> Outputs:
    """W_enc [d_in d_sae]; ReLU first, then the strict threshold; a skip as x W_skip^T."""
    acts, outputs = [], []
    for layer in range(len(x)):
        settings = json.loads((directory / f"layer_{layer}" / "cfg.json").read_text())
        file = doubles(directory / f"layer_{layer}" / "sae_weights.safetensors")
        h = x[layer] @ file["W_enc"] + file["b_enc"]
        a = h.relu()
        if settings["architecture"].startswith("jumprelu"):
            a = a * (h > file["threshold"])
        y = a @ file["W_dec"] + file["b_dec"]
        if "skip" in settings["architecture"]:
            y = y + x[layer] @ file["W_skip"].T
        acts.append(a)
        outputs.append(y)
    return torch.stack(acts), torch.stack(outputs)


def crosslayer_coding(directory: Path, x: Tensor) -> Outputs:
    """A bias for each pair, all of them added; thresholds by logarithm and inclusive; a skip for each pair."""
    settings = json.loads((directory / "cfg.json").read_text())
    file = doubles(directory / "model.safetensors")
    acts = []
    for layer in range(len(x)):
        name = f"encoder_module.encoders.{layer}"
        h = torch.nn.functional.linear(x[layer], file[f"{name}.weight"], file[f"{name}.bias_param"])
        if settings["activation_fn"] == "jumprelu":
            acts.append((h >= file["theta_manager.log_threshold"][layer].exp()) * h)
        else:
            acts.append(h.relu())
    outputs = []
    for target in range(len(x)):
        total = torch.zeros_like(x[0])
        for source in range(target + 1):
            name = f"decoder_module.decoders.{source}->{target}"
            total += torch.nn.functional.linear(
                acts[source], file[f"{name}.weight"], file[f"{name}.bias_param"]
            )
            if settings["skip_connection"]:
                total += x[source] @ file[f"decoder_module.skip_weights.{source}->{target}"].T
        outputs.append(total)
    return torch.stack(acts), torch.stack(outputs)


@pytest.fixture(scope="session")
def peers() -> dict[str, Peer]:
    """How each of the other tools computes, by format."""
    return {"circuit-tracer": circuit_tracer, "saelens": saelens, "crosslayer-coding": crosslayer_coding}


def drawn(config: TranscoderConfig, seed: int) -> CrossLayerTranscoder:
    """A transcoder all of whose values are drawn, its normalisation and thresholds too."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (config.n_layers, config.d_model)
    norms = [Normalisation(3.0 * normal(*shape), normal(config.n_layers).exp()) for _ in range(2)]
    clt = CrossLayerTranscoder(config, *norms, seed=seed)
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter.copy_(0.5 * normal(*parameter.shape))
        if clt.log_threshold is not None:
            clt.log_threshold.copy_(normal(*clt.log_threshold.shape) - 1.0)
    return clt.requires_grad_(False)


@pytest.fixture(scope="session")
def draw() -> Callable[[TranscoderConfig, int], CrossLayerTranscoder]:
    return drawn


@pytest.fixture(scope="session")
def inputs() -> Callable[[CrossLayerTranscoder, int], Tensor]:
    """Float32 rows as the transcoder's inputs are spread."""

    def of(clt: CrossLayerTranscoder, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + seed)
        unit = torch.randn(clt.config.n_layers, 9, clt.config.d_model, generator=generator)
        return unit / clt.in_scale[:, None, None] + clt.in_mean[:, None]

    return of


@pytest.fixture(scope="session")
def native() -> Callable[[CrossLayerTranscoder, Tensor], Outputs]:
    """What the transcoder itself gives, normalisation and all, in float64."""

    def of(clt: CrossLayerTranscoder, x: Tensor) -> Outputs:
        exact = CrossLayerTranscoder(clt.config)
        exact.load_state_dict(clt.state_dict())
        exact = exact.double().requires_grad_(False)
        return exact.encode(x.double()), exact(x.double())

    return of
