"""An exported folder in a process that has neither this package nor the network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mdlm_interp import MDLMConfig
from mdlm_interp.hf import export, export_hf
from tests.mdlm_interp.hf.samples import GOLDEN, PARIS, random_model, tiny_tokenizer

BLOCKER = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mdlm_interp":
            raise ModuleNotFoundError("No module named 'mdlm_interp' (blocked)")

sys.meta_path.insert(0, Blocker())
"""
"""Hides the package, which may be installed in the environment that runs the tests."""


def run_isolated(script: str, tmp_path: Path, *arguments: str) -> str:
    """Output of a script in a fresh process that has neither this package nor the network."""
    path = tmp_path / "script.py"
    path.write_text(BLOCKER + script, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_MODULES_CACHE": str(tmp_path / "code"),
    }
    done = subprocess.run(
        [sys.executable, "-I", str(path), *arguments],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD_ELSEWHERE = """
import json
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

try:
    import mdlm_interp
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("mdlm_interp can be imported: this process shows nothing")

folder, inputs, outputs, report, text = sys.argv[1:]
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    save_file({"logits": model(load_file(inputs)["input_ids"])}, outputs)
encoded = tokenizer(text)
with open(report, "w", encoding="utf-8") as file:  # standard output has transformers' question about the code
    json.dump({
        "training": model.training,
        "dtype": str(model.dtype),
        "encoded": dict(encoded),
        "decoded": tokenizer.decode(tokenizer("Water is wet.").input_ids),
        "special": [tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id],
        "max_length": tokenizer.model_max_length,
    }, file)
"""


def test_exported_folder_loads_where_this_package_is_missing_and_gives_the_same_logits_within_1e_6(tmp_path):
    tokenizer, model = tiny_tokenizer(300), random_model(300)
    export_hf(model, tmp_path / "folder", tokenizer)
    input_ids = torch.randint(0, 300, (2, 21), generator=torch.Generator().manual_seed(2))
    save_file({"input_ids": input_ids}, tmp_path / "in.safetensors")
    paths = [str(tmp_path / name) for name in ("folder", "in.safetensors", "out.safetensors", "seen.json")]
    run_isolated(LOAD_ELSEWHERE, tmp_path, *paths, PARIS)
    seen = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    with torch.no_grad():
        expected = model(input_ids)
    assert expected.abs().max() > 0.5
    # Not asserted bitwise: another process may place the weights differently in memory, which a matrix
    # product may answer with another order of additions. In one process the two are equal bit for bit.
    worst = (load_file(paths[2])["logits"] - expected).abs().max().item()
    assert worst <= 1e-6, worst
    assert seen == {
        "training": False,
        "dtype": "torch.float32",
        "encoded": {"input_ids": tokenizer.encode_with_masks(PARIS)},
        "decoded": "Water is wet.",
        "special": [tokenizer.mask_id, tokenizer.eos_id, tokenizer.eos_id],
        "max_length": 32,
    }


RUN_EXAMPLES = """
import os

for folder in sys.argv[1:]:
    os.chdir(folder)
    with open("../example.py", encoding="utf-8") as file:
        exec(compile(file.read(), folder, "exec"), {})
"""


def example(folder: Path) -> str:
    blocks = re.findall(
        r"^```python\n(.*?)^```", (folder / "README.md").read_text(encoding="utf-8"), re.M | re.S
    )
    assert len(blocks) == 1
    return str(blocks[0])


def test_model_card_example_runs_as_it_stands_and_fills_the_mask(tmp_path):
    tokenizer = tiny_tokenizer(300)
    exports = {
        "tokenizer": (random_model(300), tokenizer),
        "ids": (random_model(300), None),
        "conditioned": (random_model(300, time_conditioning=True), tokenizer),
    }
    for name, (model, carried) in exports.items():
        export_hf(model, tmp_path / name / "model", carried)
        (tmp_path / name / "example.py").write_text(example(tmp_path / name / "model"), encoding="utf-8")
    folders = [str(tmp_path / name / "model") for name in exports]
    printed = run_isolated(RUN_EXAMPLES, tmp_path, *folders).splitlines()
    for line, (model, carried) in zip(printed, exports.values(), strict=True):
        ids = torch.tensor([tokenizer.encode_with_masks(PARIS) if carried else [0, 299, 0]])
        is_masked = ids == 299
        assert is_masked.sum() == 1
        sigma = -(~is_masked).float().mean(-1).log()
        with torch.no_grad():
            logits = model(ids, sigma)
        ids[is_masked] = logits[is_masked][:, :299].argmax(-1)
        assert line == (tokenizer.decode(ids[0].tolist()) if carried else str(ids[0].tolist()))


def test_model_card_of_gpt2_size_uses_gpt2s_ids_of_the_prompt():
    card = export.model_card(MDLMConfig(), has_tokenizer=False)
    assert f'[[464, 3139, 286, 4881, 318, mask_id, 13]])  # "{PARIS}"' in card
    case = json.loads((GOLDEN / "mdlm_owt_top10.json").read_text(encoding="utf-8"))["cases"][0]
    assert case["tokens"] == [464, 3139, 286, 4881, 318, 50257, 13]
    assert "$" not in card
