"""The README.md of an export: what it reads and writes, how to load it, and the certificate."""

from __future__ import annotations

from transcoder.interchange.adaln import Fold
from transcoder.interchange.certificate import Certificate
from transcoder.interchange.form import Form
from transcoder.interchange.limits import Format, per_layer

_LOAD: dict[str, str] = {
    "cross_layer": """import torch
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt

clt = load_clt(PATH, "{input}", "{output}", dtype=torch.float32)""",
    "per_layer": """import torch
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

paths = {{layer: f"{{PATH}}/layer_{{layer}}.safetensors" for layer in range({n_layers})}}
clt = load_transcoder_set(paths, PATH, "{input}", "{output}", dtype=torch.float32)""",
    "saelens": """from sae_lens import SAE

layers = [SAE.load_from_disk(f"{{PATH}}/layer_{{layer}}") for layer in range({n_layers})]""",
    "crosslayer-coding": """from clt.config import CLTConfig
from clt.models.clt import CrossLayerTranscoder
from safetensors.torch import load_file

clt = CrossLayerTranscoder(CLTConfig.from_json(f"{{PATH}}/cfg.json"), process_group=None)
clt.load_state_dict(load_file(f"{{PATH}}/model.safetensors"))""",
}

_FOLDS: dict[Fold, str] = {
    "none": "Its hook points are inside the model's adaLN: what the MLP reads, and what is added to the residual.",
    "input": "The constant adaLN shift and scale are folded in: it reads the plain norm.",
    "output": "The constant adaLN gate is folded in: it writes the MLP's output before the gate.",
    "both": "The constant adaLN is folded in: it reads the plain norm, and writes the MLP's output before the gate.",
}


def readme(form: Form, to: Format, fold: Fold, certificate: Certificate, notes: list[str]) -> str:
    """The text."""
    config = form.config
    reads, writes = config.input_hook, config.output_hook
    kind: str = to
    if to == "circuit-tracer":
        kind = "per_layer" if per_layer(config) else "cross_layer"
        reads, writes = (hook.partition("}.")[2] for hook in (reads, writes))
    code = _LOAD[kind].format(input=reads, output=writes, n_layers=config.n_layers)
    return "\n".join(
        [
            f"# A transcoder for {to}",
            "",
            f"{config.n_layers} layers of {config.n_features} features ({config.connectivity}, {config.activation}"
            f"{', with a skip' if config.skip else ''}), width {config.d_model}, float32, written by mdlm-interp.",
            "",
            f"It reads `{config.input_hook}` and writes `{config.output_hook}`, both as the model has them: "
            f"normalisation is folded into the weights. {_FOLDS[fold]}",
            "",
            "```python",
            code,
            "```",
            "",
            "## Certificate",
            "",
            "The files were read back and compared with the original in float64. The bound is derived from the one",
            "rounding of each weight to float32.",
            "",
            *(f"- {line}" for line in certificate.lines()),
            "",
            "A pass in float32 adds the rounding of its own sums.",
            "",
            *(["## To know", "", *(f"- {note}" for note in notes), ""] if notes else []),
        ]
    )
