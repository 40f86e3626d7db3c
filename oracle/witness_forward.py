"""The forward pass, and its fingerprint of oracle/SPEC.md, made of the operations in `witness`.

Weights are NumPy arrays under a published checkpoint's names, so a torch model is handed over as
`{name: tensor.numpy() for name, tensor in model.state_dict().items()}`.

Source:
    oracle/SPEC.md, sections 4 and 5.
"""

# Axes: batch, pos, d (hidden_dim), c (cond_dim), half (d_head / 2), vocab

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mdlm_interp.config import MDLMConfig
from mdlm_interp.errors import CheckpointError, DataError, HookError, nearest
from mdlm_interp.shapes import Float32, Int64
from oracle import witness as ops
from oracle.witness_blocks import F32

I64: TypeAlias = NDArray[np.int64]
Edits: TypeAlias = "Mapping[str, Callable[[F32], F32]]"
"""Hook name to a function that returns what replaces the value there."""

TIME_FEATURES = 256

SIX = ("shift_attn", "scale_attn", "gate_attn", "shift_mlp", "scale_mlp", "gate_mlp")


class _Pass:
    """One forward pass: the weights, the edits, and the values so far by hook name."""

    def __init__(self, weights: Mapping[str, F32], config: MDLMConfig, edits: Edits) -> None:
        self.weights, self.config, self.edits = weights, config, edits
        self.activations: dict[str, F32] = {}

    def weight(self, name: str) -> F32:
        full = f"backbone.{name}"
        if full not in self.weights:
            raise CheckpointError(f"the weights lack {full!r}{nearest(full, self.weights)}")
        return self.weights[full]

    def linear(self, name: str, x: F32) -> F32:
        return ops.linear(x, self.weight(f"{name}.weight"), self.weights.get(f"backbone.{name}.bias"))

    def at(self, name: str, value: F32) -> F32:
        """What is left of a value when it has passed the hook point; kept under its name."""
        if name in self.edits:
            left = self.edits[name](value.copy())
            if left.shape != value.shape or left.dtype != np.float32:
                raise HookError(
                    f"the edit of {name} returned {left.dtype} {left.shape}, expected float32 {value.shape}"
                )
            value = left
        self.activations[name] = value
        return value

    def layer_norm(self, hook: str, x: F32, weight: str) -> F32:
        _, computed = ops.layer_norm(x, self.weight(weight))
        scale = self.at(f"{hook}.hook_scale", computed)
        # With the computed scale this is the same output: the binary32 scale is what normalises.
        normalized, _ = ops.layer_norm(x, self.weight(weight), scale)
        return self.at(f"{hook}.hook_normalized", normalized)

    def conditioning(self, sigma: Float32[F32, " batch"]) -> Float32[F32, "batch c"]:
        hidden = ops.silu(self.linear("sigma_map.mlp.0", ops.time_features(sigma, TIME_FEATURES)))
        return self.at("hook_cond", ops.silu(self.linear("sigma_map.mlp.2", hidden)))

    def block(
        self, i: int, x: Float32[F32, "batch pos d"], c: Float32[F32, "batch c"], tables: tuple[F32, F32]
    ) -> Float32[F32, "batch pos d"]:
        here = f"blocks.{i}."
        parts = np.split(self.linear(here + "adaLN_modulation", c)[:, None], 6, axis=-1)
        six = {name: self.at(f"{here}adaln.hook_{name}", part) for name, part in zip(SIX, parts, strict=True)}
        x = self.at(here + "hook_resid_pre", x)

        n = self.layer_norm(here + "ln1", x, here + "norm1.weight")
        h = self.at(here + "attn.hook_in", ops.modulate(n, six["shift_attn"], six["scale_attn"]))
        h = self.at(here + "attn.hook_out", self.attention(here, h, tables))
        h = self.at(here + "hook_attn_out", ops.mul(six["gate_attn"], h))
        x = self.at(here + "hook_resid_mid", ops.add(x, h))

        n = self.layer_norm(here + "ln2", x, here + "norm2.weight")
        h = self.at(here + "mlp.hook_in", ops.modulate(n, six["shift_mlp"], six["scale_mlp"]))
        h = self.at(here + "mlp.hook_pre", self.linear(here + "mlp.0", h))
        h = self.at(here + "mlp.hook_post", ops.gelu_tanh(h))
        h = self.at(here + "mlp.hook_out", self.linear(here + "mlp.2", h))
        h = self.at(here + "hook_mlp_out", ops.mul(six["gate_mlp"], h))
        return self.at(here + "hook_resid_post", ops.add(x, h))

    def attention(
        self, here: str, h: Float32[F32, "batch pos d"], tables: tuple[F32, F32]
    ) -> Float32[F32, "batch pos d"]:
        qkv = self.linear(here + "attn_qkv", h)
        qkv = qkv.reshape(*h.shape[:2], 3, self.config.n_heads, self.config.d_head)
        q = self.at(here + "attn.hook_q", qkv[:, :, 0])
        k = self.at(here + "attn.hook_k", qkv[:, :, 1])
        v = self.at(here + "attn.hook_v", qkv[:, :, 2])
        q = self.at(here + "attn.hook_rot_q", ops.rotate(q, *tables))
        k = self.at(here + "attn.hook_rot_k", ops.rotate(k, *tables))
        s = self.at(here + "attn.hook_attn_scores", ops.attention_scores(q, k))
        p = self.at(here + "attn.hook_pattern", ops.softmax(s))
        z = self.at(here + "attn.hook_z", ops.mix(p, v))
        return self.linear(here + "attn_out", z.reshape(h.shape))

    def head(
        self, x: Float32[F32, "batch pos d"], c: Float32[F32, "batch c"]
    ) -> Float32[F32, "batch pos vocab"]:
        shift, scale = np.split(self.linear("output_layer.adaLN_modulation", c)[:, None], 2, axis=-1)
        shift, scale = self.at("adaln_final.hook_shift", shift), self.at("adaln_final.hook_scale", scale)
        n = self.layer_norm("ln_final", x, "output_layer.norm_final.weight")
        h = self.at("hook_final_in", ops.modulate(n, shift, scale))
        return self.at("hook_logits", self.linear("output_layer.linear", h))


def forward(
    weights: Mapping[str, F32],
    config: MDLMConfig,
    input_ids: Int64[I64, "batch pos"],
    sigma: Float32[F32, " batch"] | None = None,
    edits: Edits | None = None,
) -> tuple[Float32[F32, "batch pos vocab"], dict[str, F32]]:
    """Logits, and the value at every hook point in execution order.

    Args:
        weights: By state dict name, `backbone.` included.
        sigma: One noise level a sequence; read only if the model is time-conditioned.
        edits: What replaces the value at a hook point.
    Raises:
        DataError: If ids or sigma do not fit, or a number is not finite or becomes too large.
        CheckpointError: If a weight is missing.
        HookError: If an edit names no hook point or returns another shape or type.
    """
    if input_ids.size == 0 or input_ids.min() < 0 or input_ids.max() >= config.vocab_size:
        raise DataError(f"token ids must be in [0, {config.vocab_size}) and there must be one")
    if not config.time_conditioning:
        sigma = np.zeros(len(input_ids), dtype=np.float32)
    elif sigma is None or sigma.shape != input_ids.shape[:1]:
        raise DataError(f"this model is time-conditioned: pass {len(input_ids)} sigmas, one a sequence")
    run = _Pass(weights, config, edits or {})
    x = run.at("hook_embed", run.weight("vocab_embed.embedding")[input_ids])
    c = run.conditioning(sigma)
    tables = ops.rotary_tables(run.weight("rotary_emb.inv_freq"), input_ids.shape[1])
    for i in range(config.n_blocks):
        x = run.block(i, x, c, tables)
    logits = run.head(x, c)
    unknown = [name for name in run.edits if name not in run.activations]
    if unknown:
        raise HookError(f"no hook point is named {unknown[0]!r}{nearest(unknown[0], run.activations)}")
    return logits, run.activations


# Fingerprint (section 5)


def digest(name: str, tensor: F32) -> str:
    """Hex SHA-256 of a tensor under a name."""
    if tensor.dtype != np.float32:
        raise DataError(f"{name} must be float32 to have a digest, got {tensor.dtype}")
    sizes = ",".join(str(size) for size in tensor.shape)
    header = f"{name}\nfloat32\n{sizes}\n".encode("ascii")
    return hashlib.sha256(header + tensor.astype("<f4").tobytes(order="C")).hexdigest()


def fingerprint(activations: Mapping[str, F32], logits: F32) -> str:
    """Hex SHA-256 of a forward pass: all its hook points in execution order, and the logits returned."""
    lines = [f"{name} {digest(name, tensor)}\n" for name, tensor in activations.items()]
    text = "".join(["mdlm-interp exact 1\n", *lines, f"logits {digest('logits', logits)}\n"])
    return hashlib.sha256(text.encode("ascii")).hexdigest()
