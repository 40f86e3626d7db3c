"""Small masked encoders with tokenizers of their kinds, and conversations that they can learn."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
)

Kind = Literal["bert", "modernbert"]
KINDS: tuple[Kind, ...] = ("bert", "modernbert")

LONGEST = 48
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

ANIMALS = ("fox", "bird", "dog", "cat", "owl", "hare", "deer", "bear")
PLACES = {
    "fox": "under the hill",
    "bird": "in the tall tree",
    "dog": "near our house",
    "cat": "on the warm stone",
    "owl": "in the old barn",
    "hare": "behind the wall",
    "deer": "deep in the forest",
    "bear": "beside the river",
}
COLOURS = ("red", "old", "small", "quiet", "young", "grey")


def question(colour: str, animal: str) -> str:
    return f"Where does the {colour} {animal} sleep?"


def answer(colour: str, animal: str) -> str:
    return f"The {colour} {animal} sleeps {PLACES[animal]}."


def pairs() -> list[tuple[str, str]]:
    """Question and answer of every colour and animal: the place follows from the animal."""
    return [(question(colour, animal), answer(colour, animal)) for animal in ANIMALS for colour in COLOURS]


def write_chats(path: Path) -> Path:
    """Half of the pairs as prompt and answer, half as messages."""
    lines = []
    for n, (asked, said) in enumerate(pairs()):
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        lines.append(json.dumps({"prompt": asked, "answer": said} if n % 2 else {"messages": turns}))
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@cache
def make_tokenizer(kind: Kind) -> Any:
    """WordPiece as BERT has it, or byte-level BPE whose mask swallows white space, as ModernBERT has it."""
    texts = [f"User: {asked}\nAssistant:\n{said}" for asked, said in pairs()]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]") if kind == "bert" else models.BPE())
    if kind == "bert":
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=220, special_tokens=SPECIALS, show_progress=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=380,
            special_tokens=[*SPECIALS[:-1], AddedToken("[MASK]", lstrip=True)],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token=AddedToken("[MASK]", lstrip=True) if kind == "modernbert" else "[MASK]",
        model_max_length=LONGEST,
    )


def make_model(kind: Kind, vocab_size: int, *, dropout: float = 0.0) -> torch.nn.Module:
    """Two layers of 64 with random weights."""
    torch.manual_seed(7)
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": LONGEST,
        "pad_token_id": 0,
    }
    if kind == "bert":
        shape |= {"intermediate_size": 128, "hidden_dropout_prob": dropout}
        bert: torch.nn.Module = BertForMaskedLM(BertConfig(**shape, attention_probs_dropout_prob=dropout))
        return bert.eval()
    shape |= {
        "intermediate_size": 96,
        "local_attention": 16,
        "global_attn_every_n_layers": 1,
        "initializer_range": 0.1,  # at this width 0.02 leaves the blocks silent for hundreds of steps
        "initializer_cutoff_factor": 3.0,
        "mlp_dropout": dropout,
        "embedding_dropout": dropout,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    modernbert: torch.nn.Module = ModernBertForMaskedLM(ModernBertConfig(**shape))
    return modernbert.eval()


def write_encoder(directory: Path, kind: Kind, *, dropout: float = 0.0) -> Path:
    """A masked LM's directory, as save_pretrained makes it; its logits have three ids that the tokenizer lacks."""
    tokenizer = make_tokenizer(kind)
    model: Any = make_model(kind, len(tokenizer) + 3, dropout=dropout)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
