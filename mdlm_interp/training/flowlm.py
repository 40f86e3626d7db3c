"""FlowLM: a masked encoder learns to give back the tokens of a text whose one-hots were noised.

Nothing is masked: every token may have become another one, so that a decoder can start from random tokens and write
any position again (`mdlm_interp.decoding.Rewrite`). `flowlm_noise` has the corruption, `flowlm_loss` the loss.

1. Each row draws a flip probability, from which its noise level t follows (or t itself, as published).
2. The encoder reads the soft tokens' mean embeddings, softmax(w / temperature) W_E.
3. The loss is the symmetric KL divergence at each token, weighed by the row's view scale.

Source:
    github.com/tom-pollak/dllm at 43ea9ff, train_flowlm.py; mixing and loss after Duo, Sahoo et al. 2025.
"""

# Axes: row, pos, vocab

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdlm_interp.errors import ConfigError
from mdlm_interp.randomness import uniforms
from mdlm_interp.shapes import Float, Float32, Float64, Int64
from mdlm_interp.training.dllm_data import ChatExamples, ChatRecipe, ChatRunConfig, Example, unigram_chances
from mdlm_interp.training.dllm_encoder import Encoder
from mdlm_interp.training.dllm_masks import pad
from mdlm_interp.training.flowlm_loss import symmetric_kl
from mdlm_interp.training.flowlm_noise import (
    TEMPERATURE_FLOOR,
    Mixing,
    flip_probability,
    gaussian_noise,
    level_for_flip,
    soft_tokens,
    temperature_at,
    view_scale,
)
from mdlm_interp.training.recipes import Batch, LogEntry, Network

VALIDATION_SEED = 1
VALIDATION_ROWS = 8
"""Rows in a pass of the validation; what it measures does not depend on it."""


@dataclass(frozen=True, kw_only=True)
class TrainFlowLMConfig(ChatRunConfig):
    """Fine-tune a masked encoder to restore noised one-hots, for decoding that starts from random tokens."""

    recipe: Literal["flowlm"] = "flowlm"
    """Which recipe this is a config of."""
    flip: tuple[float, float] = (0.59, 0.99)
    """Each row's probability that noise makes a token another one, uniform between these; by default what the
    published levels come to at 50,000 tokens."""
    level: tuple[float, float] | None = None
    """Each row's noise level t, uniform between these, in place of flip: published are 0.03,0.15, and 0.25,0.5 for
    the linear mixing."""
    mixing: Mixing = "variance_preserving"
    """One-hots and noise: (1 - t) and sqrt(1 - (1 - t)^2), or as in the blog (1 - t) and t."""
    temperature: float = 1.0e-3
    """Of the softmax that makes soft tokens, at the start; 1 in the blog."""
    anneal_steps: int | None = 500_000
    """Steps in which the temperature falls to zero; it stays if none, as in the blog."""
    divergence: Literal["corrected", "published"] = "corrected"
    """The symmetric KL divergence, or the published form whose second term is not one."""
    weighting: Literal["relative", "published", "none"] = "relative"
    """Weight of a row's loss: V times t / (V (1 - t) + t), of order t; that without V, as published; or 1."""
    noised: Literal["text", "answers"] = "text"
    """Noise and learn everything but padding, as published, or the answers only, the rest being clean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("flip", "level"):
            low, high = getattr(self, name) or (0.5, 0.5)
            if not 0.0 < low <= high < 1.0:
                raise ConfigError(f"{name} must be two numbers in (0, 1), the lower first; got {low}, {high}")
        if not (isfinite(self.temperature) and self.temperature > 0.0):
            raise ConfigError(f"temperature must be positive and finite, got {self.temperature}")
        if self.anneal_steps is not None and self.anneal_steps < 1:
            raise ConfigError(
                f"anneal_steps must be at least 1, got {self.anneal_steps}; none keeps the temperature"
            )


class SoftEncoder(nn.Module):
    """An encoder that reads soft tokens."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, soft: Float32[Tensor, "row pos vocab"], attention_mask: Int64[Tensor, "row pos"]
    ) -> Float[Tensor, "row pos vocab"]:
        """Logits given a mean of the embeddings at each position."""
        encoder: Any = self.encoder
        table = encoder.get_input_embeddings().weight
        logits: Tensor = encoder(inputs_embeds=soft @ table, attention_mask=attention_mask).logits
        return logits


class FlowLMRecipe(ChatRecipe):
    """See the module; the constructor takes what `read` returns."""

    QUANTITY: ClassVar[str] = "nats per token: training, weighed symmetric KL;\nheld out, cross-entropy"

    config: TrainFlowLMConfig

    def __init__(
        self, config: TrainFlowLMConfig, encoder: Encoder, examples: ChatExamples, template: str
    ) -> None:
        super().__init__(config, encoder, examples, template)
        self._levels(np.array([0.0, 1.0]))  # refuses flip probabilities that this vocabulary cannot have

    def build(self) -> nn.Module:
        """See `Recipe.build`: the encoder as loaded."""
        return SoftEncoder(copy.deepcopy(self.encoder.model)).train()

    def batch(self, step: int) -> Batch:
        """See `Recipe.batch`: ids, attention_mask, noised, level, and number, from which the row's noise follows."""
        rows = self.rows(step)
        examples = [self.examples.train[example] for _, _, example in rows]
        return self._window(examples, [number for number, _, _ in rows], self.config.seed)

    def weight(self, batch: Batch) -> float:
        """See `Recipe.weight`: noised tokens."""
        return float(batch["noised"].sum())

    def loss_sum(self, network: Network, batch: Batch, step: int) -> Tensor:
        """See `Recipe.loss_sum`: the weighed symmetric KL divergence of the noised tokens, in nats."""
        temperature = temperature_at(step, self.config.temperature, self.config.anneal_steps)
        soft = self.soften(batch, self.config.seed, temperature)
        logits = network(soft, batch["attention_mask"])
        found = symmetric_kl(logits, batch["ids"], as_published=self.config.divergence == "published")
        return (self.row_weights(batch["level"]).float()[:, None] * found * batch["noised"]).sum()

    def soften(self, batch: Batch, seed: int, temperature: float) -> Float32[Tensor, "row pos vocab"]:
        """What the encoder reads: soft tokens where noised, one-hots elsewhere."""
        ids, vocab_size = batch["ids"], self.encoder.vocab_size
        soft = F.one_hot(ids, vocab_size).float()
        for row, number in enumerate(batch["number"].tolist()):
            length = int(batch["attention_mask"][row].sum())
            noise = gaussian_noise(seed, "flowlm:noise", number, 1, length, vocab_size)
            changed = soft_tokens(
                ids[row : row + 1, :length],
                noise,
                batch["level"][row : row + 1],
                self.config.mixing,
                temperature,
            )
            noised = batch["noised"][row, :length, None]
            soft[row, :length] = torch.where(noised, changed[0], soft[row, :length])
        return soft

    def row_weights(self, level: Float64[Tensor, " row"]) -> Float64[Tensor, " row"]:
        """Weight of each row's loss."""
        if self.config.weighting == "none":
            return torch.ones_like(level)
        published = view_scale(level, self.encoder.vocab_size)
        return published if self.config.weighting == "published" else published * self.encoder.vocab_size

    def tokens(self, batch: Batch) -> int:
        """See `Recipe.tokens`."""
        return int(batch["attention_mask"].sum())

    def validate(self, module: nn.Module) -> Iterable[LogEntry]:
        """See `Recipe.validate`: cross-entropy at noised tokens of held-out text, and accuracy where flipped."""
        figures = self._measure(module, list(self.validation_examples()))
        yield {
            "form": self.config.noised,
            "held_out_nats": figures["nats"],
            "symmetric_kl_nats": figures["symmetric_kl_nats"],
            "accuracy_flipped": figures["accuracy_flipped"],
        }

    def evaluate(self, module: nn.Module) -> dict[str, Any]:
        """See `Recipe.evaluate`: as `validate`, over all held-out conversations, beside a count of tokens."""
        counted = np.concatenate([self._noised_ids(example) for example in self.examples.train])
        held_out = np.concatenate([self._noised_ids(example) for example in self.examples.held_out])
        chances = unigram_chances(counted, self.encoder.vocab_size)
        return {
            **self._measure(module, self.examples.held_out),
            "unigram_nats": float(-np.log(chances[held_out]).mean()),
            "unigram_accuracy": float((held_out == chances.argmax()).mean()),
            "estimator": "means over noised tokens at the final temperature, noise drawn once; no bound",
        }

    def table(self, report: dict[str, Any]) -> str:
        """See `Recipe.table`."""
        flipped = report["accuracy_flipped"]
        lines = [
            f"held-out {self.config.noised}, {report['tokens']:,} noised tokens, {report['flipped']:.1%} flipped "
            f"({report['flipped_expected']:.1%} expected)",
            f"{'':14} {'nats/token':>10} {'accuracy':>10}",
            f"{'unigram':14} {report['unigram_nats']:10.4f} {report['unigram_accuracy']:10.4f}",
            f"{'model':14} {report['nats']:10.4f} {report['accuracy']:10.4f}",
            "  where flipped: accuracy " + ("of no token" if flipped is None else f"{flipped:.4f}"),
        ]
        return "\n".join([*lines, ""])

    def save(self, module: nn.Module, directory: Any) -> None:
        """See `Recipe.save`."""
        assert isinstance(module, SoftEncoder)
        super().save(module.encoder, directory)

    def _noised_ids(self, example: Example) -> np.ndarray[Any, np.dtype[np.int64]]:
        return example.ids if self.config.noised == "text" else example.ids[example.is_answer]

    def _levels(self, uniform: np.ndarray[Any, np.dtype[np.float64]]) -> Float64[Tensor, " row"]:
        """Noise levels for uniform numbers in [0, 1]."""
        low, high = self.config.flip if self.config.level is None else self.config.level
        drawn = low + (high - low) * torch.from_numpy(uniform)
        if self.config.level is not None:
            return drawn
        return level_for_flip(drawn, self.encoder.vocab_size, self.config.mixing)

    def _window(self, examples: Sequence[Example], numbers: Sequence[int], seed: int) -> dict[str, Tensor]:
        attended = pad([np.ones_like(example.ids) for example in examples], 0)
        answers = pad([example.is_answer.astype(np.int64) for example in examples], 0)
        drawn = np.concatenate([uniforms(seed, "flowlm:level", number, 1) for number in numbers])
        return {
            "ids": pad([example.ids for example in examples], self.encoder.pad_id),
            "attention_mask": attended,
            "noised": (attended if self.config.noised == "text" else answers).bool(),
            "level": self._levels(drawn),
            "number": torch.tensor(list(numbers)),
        }

    @torch.no_grad()
    def _measure(self, module: nn.Module, examples: Sequence[Example]) -> dict[str, Any]:
        """Means over the noised tokens; the noise is the same every time."""
        config = self.config
        temperature = config.temperature if config.anneal_steps is None else TEMPERATURE_FLOOR
        found: list[Tensor] = []
        for first in range(0, len(examples), VALIDATION_ROWS):
            some = examples[first : first + VALIDATION_ROWS]
            batch = self._window(some, range(first, first + len(some)), VALIDATION_SEED)
            soft = self.soften(batch, VALIDATION_SEED, temperature)
            logits, ids, noised = module(soft, batch["attention_mask"]), batch["ids"], batch["noised"]
            chance = flip_probability(batch["level"], self.encoder.vocab_size, config.mixing)
            columns = [
                F.cross_entropy(logits.transpose(1, 2).float(), ids, reduction="none"),
                symmetric_kl(logits, ids),
                logits.argmax(-1) == ids,
                soft.argmax(-1) != ids,
                chance[:, None].expand(ids.shape),
            ]
            found.append(torch.stack([column[noised].double() for column in columns]))
        nats, divergence, right, flipped, chance = torch.cat(found, 1)
        return {
            "nats": float(nats.mean()),
            "symmetric_kl_nats": float(divergence.mean()),
            "accuracy": float(right.mean()),
            "accuracy_flipped": float(right[flipped == 1].mean()) if bool(flipped.any()) else None,
            "flipped": float(flipped.mean()),
            "flipped_expected": float(chance.mean()),
            "tokens": int(nats.numel()),
        }
