"""Answers of a fine-tuned encoder: a transformers masked LM as the denoiser that the samplers take.

    chatbot = Chatbot.from_pretrained("runs/dllm/model")
    print(chatbot.answer([Message("user", "Who lives in the river?")], length=16).text)

The template says where the answer goes; masks stand there and a sampler fills them. By default that is greedy
decoding: in each step the most probable token of all at the position where it stands. With a schedule
`Rewrite(threshold=1.0)` the answer starts from random tokens instead, as an encoder trained by the flowlm recipe wants
it. (A lower threshold, as published, passes over random tokens for which the encoder is sure of others.)

Source:
    github.com/tom-pollak/dllm at 43ea9ff, DLLM.ipynb (iter_mask_decode). There the mask may win the argmax and then
    that position is decoded again; here control tokens are never drawn.
"""

# Axes: batch, pos, vocab

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mdlm_interp.decoding import Draw, Fixed, Record, Sampler, Seen, Trajectory, sample
from mdlm_interp.errors import DataError
from mdlm_interp.shapes import Float, Int64
from mdlm_interp.training.chat import Message, encode_prompt
from mdlm_interp.training.dllm_encoder import Encoder, load_encoder, template_of

GREEDY = Sampler(schedule=Fixed(per_step=1), order="confidence", draw=Draw(temperature=0.0))
"""One token a step, where the model is most sure, the most probable one."""


class EncoderDenoiser:
    """`(input_ids, sigma) -> logits` of a masked LM, without padding; sigma is not used, as it has no time.

    `config.vocab_size`, `config.mask_id` and `device` are what samplers ask of a model.
    """

    def __init__(self, model: nn.Module, mask_id: int) -> None:
        self.model = model.eval()
        config: Any = model.config
        self.config = SimpleNamespace(vocab_size=int(config.vocab_size), mask_id=mask_id)
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def __call__(
        self, input_ids: Int64[Tensor, "batch pos"], sigma: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits of every position; as float32."""
        logits: Tensor = self.model(input_ids=input_ids).logits
        return logits.float()


@dataclass(frozen=True)
class Answer:
    """What was decoded."""

    text: str
    """The answer's tokens as text, without control tokens."""
    ids: tuple[int, ...]
    """The answer's tokens."""
    start: int
    """Position of the answer's first token in the conversation."""
    trajectory: Trajectory
    """Every state of the conversation on the way."""


class Chatbot:
    """A fine-tuned encoder with its tokenizer and chat template."""

    def __init__(self, encoder: Encoder, template: str | None = None) -> None:
        self.encoder = encoder
        self.template = template_of(encoder) if template is None else template
        self.denoiser = EncoderDenoiser(encoder.model, encoder.mask_id)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Chatbot:
        """The model that a dllm or flowlm run saved, or any masked LM of transformers in a local directory.

        Raises:
            CheckpointError: If the directory does not hold one.
        """
        return cls(load_encoder(Path(directory)))

    def answer(
        self,
        messages: Sequence[Message],
        length: int,
        sampler: Sampler = GREEDY,
        *,
        seed: int = 0,
        record: Record | None = None,
        watch: Callable[[Seen], None] | None = None,
    ) -> Answer:
        """The next message of the assistant, exactly `length` tokens long: the model has no other way to end it.

        Args:
            messages: The conversation up to and with the question.
            sampler: Control tokens are suppressed beside what its draw suppresses.
            watch: Called after each step, as by `sample`.
        Raises:
            DataError: If the conversation with its answer is longer than the encoder takes.
        """
        prompt = encode_prompt(self.encoder.tokenizer, messages, length, template=self.template)
        if len(prompt.ids) > self.encoder.longest:
            raise DataError(
                f"the conversation and {length} tokens of answer make {len(prompt.ids)} tokens, the encoder takes "
                f"{self.encoder.longest}; ask for less"
            )
        suppress = tuple(
            sorted({*sampler.draw.suppress, *self.encoder.control_ids()} - {self.encoder.mask_id})
        )
        trajectory = sample(
            self.denoiser,
            torch.tensor([prompt.ids]),
            replace(sampler, draw=replace(sampler.draw, suppress=suppress)),
            seed=seed,
            record=record,
            watch=watch,
        )
        start = prompt.is_answer.index(True)
        ids = tuple(trajectory.final[0, start : start + length].tolist())
        text: str = self.encoder.tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(text, ids, start, trajectory)
