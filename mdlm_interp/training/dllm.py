"""The recipe that makes a masked encoder a diffusion language model for chats; `dllm_masks` has the objective.

Batches are padded to their longest row and padding is masked out of attention. The published form pads to max_length
and drops the attention mask, so that padding is attended to; `padding: attended` does the same.

Source:
    github.com/tom-pollak/dllm at 43ea9ff, train_dllm.py.
"""

# Axes: row, pos, vocab

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from math import isfinite
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mdlm_interp.errors import DataError
from mdlm_interp.training.dllm_data import ChatExamples, ChatRecipe, ChatRunConfig, Example, unigram_chances
from mdlm_interp.training.dllm_encoder import Encoder
from mdlm_interp.training.dllm_masks import (
    IGNORED,
    Masked,
    MaskingConfig,
    accuracy_by_share,
    mask_answers,
    masked_loss_sum,
    pad,
)
from mdlm_interp.training.recipes import Batch, LogEntry, Network

VALIDATION_SEED = 1
VALIDATION_ROWS = 32
"""Rows in a pass of the validation; what it measures does not depend on it."""


@dataclass(frozen=True, kw_only=True)
class TrainDLLMConfig(ChatRunConfig):
    """Fine-tune a masked encoder into a diffusion language model: masks in the answers only."""

    recipe: Literal["dllm"] = "dllm"
    """Which recipe this is a config of."""
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    """How answers are corrupted."""
    padding: Literal["ignored", "attended"] = "ignored"
    """Leave padding out of attention; or pad to max_length and attend to it, as published."""


class DLLMRecipe(ChatRecipe):
    """See the module; the constructor takes what `read` returns."""

    config: TrainDLLMConfig

    def __init__(
        self, config: TrainDLLMConfig, encoder: Encoder, examples: ChatExamples, template: str
    ) -> None:
        super().__init__(config, encoder, examples, template)
        forward: Any = encoder.model.forward
        if config.padding == "ignored" and "attention_mask" not in signature(forward).parameters:
            raise DataError(
                f"{type(encoder.model).__name__} takes no attention_mask, so padding cannot be ignored; "
                f"set padding to attended"
            )

    def build(self) -> nn.Module:
        """See `Recipe.build`: the encoder as loaded."""
        return copy.deepcopy(self.encoder.model).train()

    def batch(self, step: int) -> Batch:
        """See `Recipe.batch`: input_ids and labels, and unless padding is attended to attention_mask."""
        rows = [(self.examples.train[example], epoch, example) for _, epoch, example in self.rows(step)]
        return self._padded([self._masked(*row, self.config.seed) for row in rows])

    def weight(self, batch: Batch) -> float:
        """See `Recipe.weight`: tokens that are predicted."""
        return float((batch["labels"] != IGNORED).sum())

    def loss_sum(self, network: Network, batch: Batch, step: int) -> Tensor:
        """See `Recipe.loss_sum`: cross-entropy of the predicted tokens, in nats."""
        return masked_loss_sum(_logits(network, batch), batch["labels"])

    def tokens(self, batch: Batch) -> int:
        """See `Recipe.tokens`; with padding where that is attended to."""
        return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()

    def validate(self, module: nn.Module) -> Iterable[LogEntry]:
        """See `Recipe.validate`: nats and accuracy at the masks of held-out answers."""
        figures = self._measure(module, list(self.validation_examples()))
        yield {"form": "answers", "held_out_nats": figures["nats"], "accuracy": figures["accuracy"]}

    def evaluate(self, module: nn.Module) -> dict[str, Any]:
        """See `Recipe.evaluate`: as `validate`, over all held-out conversations, beside a count of answer tokens."""
        figures = self._measure(module, self.examples.held_out)
        answers = np.concatenate([example.ids[example.is_answer] for example in self.examples.train])
        chances = unigram_chances(answers, self.encoder.vocab_size)
        labels = figures.pop("labels")
        return {
            **figures,
            "unigram_nats": float(-np.log(chances[labels]).mean()),
            "unigram_accuracy": float((labels == chances.argmax()).mean()),
            "estimator": "mean cross-entropy and accuracy at the chosen answer tokens, masks drawn once; no bound",
        }

    def table(self, report: dict[str, Any]) -> str:
        """See `Recipe.table`."""
        lines = [
            f"held-out answers, {report['tokens']:,} predicted tokens",
            f"{'':14} {'nats/token':>10} {'accuracy':>10}",
            f"{'unigram':14} {report['unigram_nats']:10.4f} {report['unigram_accuracy']:10.4f}",
            f"{'model':14} {report['nats']:10.4f} {report['accuracy']:10.4f}",
            *(
                f"  up to {entry['at_most']:4.0%} of the answer masked: accuracy {entry['accuracy']:.4f}"
                for entry in report["accuracy_by_share"]
                if entry["accuracy"] is not None
            ),
        ]
        return "\n".join([*lines, ""])

    def _masked(self, example: Example, epoch: int, number: int, seed: int) -> tuple[Masked, Example]:
        masked = mask_answers(
            example.ids,
            example.is_answer,
            self.config.masking,
            mask_id=self.encoder.mask_id,
            random_ids=self.encoder.text_ids(),
            seed=seed,
            epoch=epoch,
            example=number,
        )
        return masked, example

    def _padded(self, rows: Sequence[tuple[Masked, Example]]) -> dict[str, Tensor]:
        length = self.config.max_length if self.config.padding == "attended" else None
        batch = {
            "input_ids": pad([masked.ids for masked, _ in rows], self.encoder.pad_id, length),
            "labels": pad([masked.labels for masked, _ in rows], IGNORED, length),
        }
        if self.config.padding == "ignored":
            batch["attention_mask"] = pad([np.ones_like(masked.ids) for masked, _ in rows], 0, length)
        return batch

    @torch.no_grad()
    def _measure(self, module: nn.Module, examples: Sequence[Example]) -> dict[str, Any]:
        """Nats and accuracy at masks that are the same every time; `labels` are the tokens they are over."""
        nats, best, truth, marks = 0.0, [], [], []
        for first in range(0, len(examples), VALIDATION_ROWS):
            numbered = enumerate(examples[first : first + VALIDATION_ROWS], start=first)
            rows = [self._masked(example, 0, number, VALIDATION_SEED) for number, example in numbered]
            batch = self._padded(rows)
            logits = _logits(module, batch)
            nats += float(masked_loss_sum(logits, batch["labels"]))
            for row, (masked, example) in enumerate(rows):
                best.append(logits[row, : len(masked.ids)].argmax(-1).numpy())
                truth.append(masked.labels)
                marks.append(example.is_answer.astype(np.int64))
        predicted, labels, answers = pad(best, IGNORED), pad(truth, IGNORED), pad(marks, 0).bool()
        wanted = labels != IGNORED
        return {
            "nats": nats / int(wanted.sum()),
            "accuracy": float((predicted == labels)[wanted].double().mean()),
            "accuracy_by_share": [
                {
                    "at_most": share.at_most,
                    "tokens": share.n_tokens,
                    "accuracy": share.accuracy if isfinite(share.accuracy) else None,
                }
                for share in accuracy_by_share(predicted, labels, answers)
            ],
            "tokens": int(wanted.sum()),
            "labels": labels[wanted].numpy(),
        }


def _logits(network: Network, batch: Batch) -> Tensor:
    logits: Tensor = network(**{name: batch[name] for name in batch if name != "labels"}).logits
    return logits
