"""A model folder that transformers loads with `trust_remote_code=True`, this package not needed.

The folder gets its name when all of it is on disk: there is no half export.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from mdlm_interp.atomic_files import replacing_directory
from mdlm_interp.checkpoints import CONFIG, save_model
from mdlm_interp.errors import CheckpointError
from mdlm_interp.tokenizers import END_OF_TEXT, MASK, Tokenizer

if TYPE_CHECKING:
    from mdlm_interp.config import MDLMConfig
    from mdlm_interp.model import HookedMDLM

CODE = ("configuration_mdlm.py", "modeling_mdlm.py")
AUTO_MAP = {"AutoConfig": "configuration_mdlm.MDLMConfig", "AutoModelForMaskedLM": "modeling_mdlm.MDLM"}
PUBLISHED_VOCAB_SIZE = 50_258
PROMPT = "The capital of France is [MASK]."
PROMPT_IDS = "464, 3139, 286, 4881, 318, mask_id, 13"
"""The prompt in GPT-2's ids."""


def export_hf(model: HookedMDLM, directory: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a folder for `AutoModelForMaskedLM.from_pretrained(directory, trust_remote_code=True)`.

    It holds config.json, model.safetensors (float32, upstream's names), the two files of model code, a
    model card and, given a tokenizer, the files for `AutoTokenizer.from_pretrained(directory)`.

    Args:
        tokenizer: The one the model was trained with. In the export "[MASK]" in a text is the mask token
            and takes the blanks before it, because a word's own token starts with its leading space.
    Raises:
        OutputExistsError: If the directory exists and is not empty; nothing is written then.
        CheckpointError: If the tokenizer's vocabulary is not the model's.
        WriteError: If the disk is full, read-only or failing.
    """
    config = model.config
    if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} ids, [MASK] included, the model {config.vocab_size}; "
            f"was it trained with another tokenizer?"
        )
    with replacing_directory(directory) as partial:
        save_model(model, partial)
        _write_json(partial / CONFIG, {**config.to_mapping(), "auto_map": AUTO_MAP})
        for file in CODE:
            source = resources.files("mdlm_interp.hf").joinpath(file).read_text(encoding="utf-8")
            (partial / file).write_text(source, encoding="utf-8")
        (partial / "README.md").write_text(model_card(config, tokenizer is not None), encoding="utf-8")
        if tokenizer is not None:
            _write_tokenizer(tokenizer, config, partial)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(tokenizer: Tokenizer, config: MDLMConfig, directory: Path) -> None:
    tokenizer.save(directory)
    definition = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    for token in definition["added_tokens"]:
        if token["content"] == MASK:
            # Without this, the space in "is [MASK]" becomes a token of its own, which no training text has.
            token["lstrip"] = True
    _write_json(directory / "tokenizer.json", definition)
    settings = {
        # The generic class: GPT-2's own would look for vocab.json and merges.txt.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "mask_token": MASK,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": config.model_length,
        "clean_up_tokenization_spaces": False,
        # The model takes no attention mask and no token types: `model(**tokenizer(text))` must not pass any.
        "model_input_names": ["input_ids"],
    }
    _write_json(directory / "tokenizer_config.json", settings)


def model_card(config: MDLMConfig, has_tokenizer: bool) -> str:
    """The README.md of an exported folder, with an example that runs as it stands."""
    gpt2 = config.vocab_size == PUBLISHED_VOCAB_SIZE
    if has_tokenizer:
        parts = {
            "imports": "from transformers import AutoModelForMaskedLM, AutoTokenizer",
            "setup": "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n"
            "mask_id = tokenizer.mask_token_id",
            "prompt": f'tokenizer("{PROMPT}", return_tensors="pt").input_ids',
            "answer": "tokenizer.decode(input_ids[0])",
            "remark": "`[MASK]` in a text is the mask token; it takes the space before it.",
        }
    else:
        parts = {
            "imports": "from transformers import AutoModelForMaskedLM",
            "setup": "mask_id = model.config.vocab_size - 1",
            "prompt": f'torch.tensor([[{PROMPT_IDS}]])  # "{PROMPT}"'
            if gpt2
            else "torch.tensor([[0, mask_id, 0]])",
            "answer": "input_ids[0].tolist()",
            "remark": "This folder has no tokenizer: ids come from the one that the model was trained with"
            + (", for this vocabulary size GPT-2's." if gpt2 else "."),
        }
    if config.time_conditioning:
        parts["given"] = "input_ids, sigma"
        parts["noise"] = "sigma = -(input_ids != mask_id).float().mean(-1).log()  # -ln(share not masked)\n"
        parts["sigma"] = "`timesteps` is needed: one sigma (total noise, not t) a sequence."
    else:
        parts["given"], parts["noise"] = "input_ids", ""
        parts["sigma"] = "`timesteps` may be left out: this model does not read the noise level."
    return CARD.substitute(parts, mask_id=config.mask_id, **asdict(config))


CARD = Template("""\
---
library_name: transformers
tags:
- masked-diffusion
- mdlm
---

# Masked diffusion language model

Blocks $n_blocks, width $hidden_dim, heads $n_heads. There are $vocab_size token ids; the last, $mask_id, is
`[MASK]`. Context $model_length tokens. Attention is bidirectional; padding is not supported.

The model code in this folder is plain PyTorch: no flash-attn, the dtype of the weights throughout, and
the parameter names of [kuleshov-group/mdlm-owt](https://huggingface.co/kuleshov-group/mdlm-owt).

## Filling in a mask

Run this inside the folder, or let `folder` name it.

```python
import torch
$imports

folder = "."
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
$setup

input_ids = $prompt
${noise}with torch.no_grad():
    logits = model($given, return_dict=True).logits
logits[..., mask_id] = -torch.inf  # the mask is never an answer, but has a logit like any other token

is_masked = input_ids == mask_id
input_ids[is_masked] = logits[is_masked].argmax(-1)
print($answer)
```

$remark

## What `model(...)` takes and returns

`model(input_ids, timesteps=None, output_hidden_states=None, return_dict=None)`: $sigma

The result is the raw logits `[batch, position, vocabulary]`. With `output_hidden_states=True` it is a tuple
of the logits and a list: the embedding, then the output of each block. With `return_dict=True` it is a
`MaskedLMOutput`. No loss is computed.

## Source

Sahoo et al. 2024, *Simple and Effective Masked Diffusion Language Models*, arXiv:2406.07524; architecture and
parameter names from <https://github.com/kuleshov-group/mdlm> (Apache-2.0). Exported by mdlm-interp.
""")
