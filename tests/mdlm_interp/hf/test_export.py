"""The folder that `export_hf` writes: what is in it, and that it is written whole or not at all."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mdlm_interp import HookedMDLM
from mdlm_interp.errors import CheckpointError, OutputExistsError, WriteError
from mdlm_interp.hf import export, export_hf, register
from mdlm_interp.tokenizers import load_tokenizer
from tests.mdlm_interp.hf.samples import EXPORTED, PARIS, ROOT, TOKENIZER_FILES, random_model, tiny_tokenizer


def test_export_writes_the_published_config_fields_the_saved_weights_and_the_code(tmp_path):
    model = random_model(300)
    export_hf(model, tmp_path / "bare")
    assert {path.name for path in (tmp_path / "bare").iterdir()} == EXPORTED
    export_hf(model, str(tmp_path / "full"), tiny_tokenizer(300))
    assert {path.name for path in (tmp_path / "full").iterdir()} == EXPORTED | TOKENIZER_FILES
    stored = json.loads((tmp_path / "bare" / "config.json").read_text(encoding="utf-8"))
    assert stored == {**model.config.to_mapping(), "auto_map": export.AUTO_MAP}
    assert stored["architectures"] == ["MDLM"]
    assert stored["auto_map"] == {
        "AutoConfig": "configuration_mdlm.MDLMConfig",
        "AutoModelForMaskedLM": "modeling_mdlm.MDLM",
    }
    model.save_pretrained(tmp_path / "ours")
    for name in ("bare", "full"):
        written = (tmp_path / name / "model.safetensors").read_bytes()
        assert written == (tmp_path / "ours" / "model.safetensors").read_bytes()
        for file in export.CODE:
            assert (tmp_path / name / file).read_bytes() == (ROOT / "mdlm_interp" / "hf" / file).read_bytes()


def test_exported_folder_is_read_back_with_its_tokenizer_by_this_package(tmp_path):
    model, tokenizer = random_model(300), tiny_tokenizer(300)
    export_hf(model, tmp_path, tokenizer)
    read, again = HookedMDLM.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    for text in (PARIS, "Fire is [MASK] and  [MASK]", "no mask: <|endoftext|>"):
        assert again.encode_with_masks(text) == tokenizer.encode_with_masks(text)
        assert again.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("name", sorted(EXPORTED | TOKENIZER_FILES))
def test_export_never_overwrites_and_then_writes_nothing(tmp_path, name):
    (tmp_path / name).write_text("precious", encoding="utf-8")
    with pytest.raises(
        OutputExistsError, match=f"{re.escape(str(tmp_path))} exists and is not empty; choose"
    ):
        export_hf(random_model(300), tmp_path, tiny_tokenizer(300))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("existing", [False, True])
def test_an_export_that_fails_leaves_no_files(tmp_path, monkeypatch, existing):
    def full_disk(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if existing:
        (tmp_path / "model").mkdir()
    monkeypatch.setattr(export, "_write_json", full_disk)
    with pytest.raises(
        WriteError, match=r"model cannot be written: No space left on device; free some space"
    ):
        export_hf(random_model(300), tmp_path / "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["model"] * existing


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from mdlm_interp.__main__ import main
import torch, safetensors.torch
size = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
sys.exit(main())
"""
"""The command line where no file may grow beyond a size: a full disk without root."""


@pytest.mark.parametrize("size", [100, 5_000, 60_000], ids=["config", "code", "weights"])
def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tmp_path, size):
    """The first file over the limit is config.json, then a code file; the tokenizer's, or the weights."""
    random_model(300).save_pretrained(tmp_path / "model")
    tiny_tokenizer(300).save(tmp_path / "model")
    arguments = [str(size), "export-hf", str(tmp_path / "out"), "--model", str(tmp_path / "model")]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"mdlm-interp export-hf: error: {tmp_path}/out")
    assert " cannot be written: File too large; " in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_written_is_as_readable_as_any_file(tmp_path):
    """Exact: the file mode that the umask leaves; safetensors itself makes files private to their owner."""
    before = os.umask(0o027)
    try:
        export_hf(random_model(300), tmp_path / "exported", tiny_tokenizer(300))
        random_model(300).save_pretrained(tmp_path / "saved")
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 9
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o640}
    assert stat.S_IMODE((tmp_path / "exported").stat().st_mode) == 0o750


def test_an_export_that_was_killed_does_not_count_and_can_be_repeated(tmp_path):
    """Behavioural: a process that dies, here when the code is to be written, cleans nothing up."""
    script = (
        "import os, sys\n"
        "from mdlm_interp.hf import export\n"
        "from tests.mdlm_interp.hf.samples import random_model\n"
        "export.model_card = lambda *arguments: os._exit(9)\n"
        "export.export_hf(random_model(300), sys.argv[1])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "model")]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == 9
    assert not (tmp_path / "model").exists()
    assert list(tmp_path.rglob("*.safetensors")) != []
    export_hf(random_model(300), tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    assert {path.name for path in (tmp_path / "model").iterdir()} == EXPORTED


def test_export_refuses_a_tokenizer_of_another_size(tmp_path):
    with pytest.raises(CheckpointError, match=r"the tokenizer has 300 ids, \[MASK\] included, the model 310"):
        export_hf(random_model(310), tmp_path / "model", tiny_tokenizer(300))
    assert not (tmp_path / "model").exists()


def test_export_needs_no_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError):
        register()
    export_hf(random_model(300), tmp_path / "model", tiny_tokenizer(300))


@pytest.mark.parametrize("name", export.CODE)
def test_exported_code_imports_only_torch_transformers_and_its_sibling(name):
    tree = ast.parse((ROOT / "mdlm_interp" / "hf" / name).read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or "").partition(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
    assert found - set(sys.stdlib_module_names) <= {"torch", "transformers", ".configuration_mdlm"}
