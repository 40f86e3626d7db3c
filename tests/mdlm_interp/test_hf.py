"""The transformers classes, and the folder that `export_hf` writes for them."""

# Axes: batch, pos, d_vocab, d_model

import ast
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from mdlm_interp import HookedMDLM, MDLMConfig
from mdlm_interp.errors import CheckpointError, OutputExistsError
from mdlm_interp.hf import export, export_hf, register
from mdlm_interp.tokenizers import END_OF_TEXT, Tokenizer, load_tokenizer

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForMaskedLM
from transformers.modeling_outputs import MaskedLMOutput

from mdlm_interp.hf.configuration_mdlm import MDLMConfig as HFConfig
from mdlm_interp.hf.modeling_mdlm import MDLM

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
GOLDEN_NAMES = ("mdlm_tiny_a", "mdlm_tiny_b")
INV_FREQ = "backbone.rotary_emb.inv_freq"
PARIS = "The capital of France is [MASK]."
EXPORTED = {"README.md", "config.json", "configuration_mdlm.py", "model.safetensors", "modeling_mdlm.py"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}

BLOCKER = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mdlm_interp":
            raise ModuleNotFoundError("No module named 'mdlm_interp' (blocked)")

sys.meta_path.insert(0, Blocker())
"""
"""Hides the package, which may be installed in the environment that runs the tests."""


def golden(name: str) -> tuple[dict[str, Tensor], HFConfig]:
    fields = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["config"]
    return load_file(GOLDEN / f"{name}.safetensors"), HFConfig(**fields)


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}


def golden_model(name: str, dtype: torch.dtype) -> tuple[MDLM, dict[str, Tensor]]:
    tensors, config = golden(name)
    model = MDLM(config).eval()
    model.load_state_dict(weights(tensors))
    return model.to(dtype), tensors


def hooked(name: str) -> HookedMDLM:
    tensors, config = golden(name)
    model = HookedMDLM(MDLMConfig.from_mapping(config.to_dict(), source=name)).eval()
    model.load_state_dict(weights(tensors))
    return model


def tiny_tokenizer(vocab_size: int) -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [
        "The capital of France is Paris. The capital of Italy is Rome. Water is wet, and fire is hot."
    ] * 4
    backend.train_from_iterator(text, trainer)
    return Tokenizer(backend)


def random_model(vocab_size: int, time_conditioning: bool = False) -> HookedMDLM:
    config = MDLMConfig(
        vocab_size=vocab_size,
        model_length=32,
        hidden_dim=32,
        cond_dim=16,
        n_blocks=2,
        n_heads=2,
        time_conditioning=time_conditioning,
    )
    model = HookedMDLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # also what starts at zero
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


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


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_float64_logits_and_hidden_states_are_upstreams_within_1e_10(name):
    model, tensors = golden_model(name, torch.float64)
    with torch.no_grad():
        logits, hidden = model(tensors["in.input_ids"], tensors["in.timesteps"], output_hidden_states=True)
        # The same instance on a shorter input: a cached rotary table would be stale now.
        short = model(tensors["in.short_input_ids"], tensors["in.timesteps"])
    expected = [tensors["act64.embed"]]
    expected += [tensors[f"act64.resid_post.{i}"] for i in range(model.config.n_blocks)]
    assert len(hidden) == len(expected)
    pairs = [
        (logits, tensors["out.logits_fp64"]),
        (short, tensors["out.short_logits_fp64"]),
        *zip(hidden, expected, strict=True),
    ]
    worst = [(ours - theirs).abs().max().item() for ours, theirs in pairs]
    assert max(worst) <= 1e-10, worst


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_float32_logits_are_the_hooked_models_bit_for_bit(name):
    model, tensors = golden_model(name, torch.float32)
    reference = hooked(name)
    with torch.no_grad():
        logits, hidden = model(tensors["in.input_ids"], tensors["in.timesteps"], output_hidden_states=True)
        expected, cache = reference.run_with_cache(
            tensors["in.input_ids"], "blocks.*.hook_resid_post", timesteps=tensors["in.timesteps"]
        )
    assert torch.equal(logits, expected)
    for i, state in enumerate(hidden[1:]):
        assert torch.equal(state, cache[f"blocks.{i}.hook_resid_post"])
    # Five times upstream's own float32 error on these inputs.
    assert (logits - tensors["out.logits_fp64"]).abs().max() <= 5e-5


def test_return_types_for_every_choice_of_hidden_states_and_dict():
    model, tensors = golden_model("mdlm_tiny_a", torch.float32)
    ids = tensors["in.short_input_ids"]
    with torch.no_grad():
        bare = model(ids, output_hidden_states=False, return_dict=False)
        pair = model(ids, output_hidden_states=True, return_dict=False)
        plain = model(ids, output_hidden_states=False, return_dict=True)
        full = model(ids, output_hidden_states=True, return_dict=True)
    assert type(bare) is Tensor
    assert type(pair) is tuple
    assert len(pair) == 2
    assert type(pair[1]) is list
    assert [tuple(state.shape) for state in pair[1]] == [(*ids.shape, model.config.hidden_dim)] * 4
    assert isinstance(plain, MaskedLMOutput)
    assert isinstance(full, MaskedLMOutput)
    assert plain.hidden_states is None
    assert plain.loss is None
    assert full.loss is None
    assert full.hidden_states is not None
    assert len(full.hidden_states) == 4
    for logits in (pair[0], plain["logits"], full["logits"]):
        assert torch.equal(logits, bare)


def test_return_types_default_to_the_config():
    _, config = golden("mdlm_tiny_a")
    assert config.return_dict is False
    ids = torch.zeros(1, 3, dtype=torch.int64)
    assert type(MDLM(config)(ids)) is Tensor
    fields = config.to_dict()
    config = HFConfig(**{**fields, "return_dict": True, "output_hidden_states": True})
    output = MDLM(config)(ids)
    assert isinstance(output, MaskedLMOutput)
    assert output.hidden_states is not None


def test_timesteps_are_sigma_one_a_sequence_and_needed_only_by_a_conditioned_model():
    model, tensors = golden_model("mdlm_tiny_b", torch.float32)
    ids, sigma = tensors["in.input_ids"], tensors["in.timesteps"]
    with torch.no_grad():
        assert torch.equal(model(ids, sigma[:, None]), model(ids, sigma))
        with pytest.raises(ValueError, match=r"pass timesteps, that is sigma \(total noise\), not t"):
            model(ids)
        with pytest.raises(
            ValueError, match=r"timesteps must have shape \[3\], one sigma a sequence, got \[1\]"
        ):
            model(ids, sigma[:1])
        free, tensors = golden_model("mdlm_tiny_a", torch.float32)
        ids = tensors["in.input_ids"]
        assert torch.equal(free(ids, tensors["in.timesteps"]), free(ids))


def test_register_makes_the_auto_classes_load_and_build_without_remote_code(tmp_path):
    export_hf(hooked("mdlm_tiny_a"), tmp_path / "model")
    register()
    register()
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert type(config) is HFConfig
    assert type(AutoModelForMaskedLM.from_config(config)) is MDLM
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    assert type(model) is MDLM
    assert not model.training
    tensors, _ = golden("mdlm_tiny_a")
    state = model.state_dict()
    assert list(state) == list(hooked("mdlm_tiny_a").state_dict())
    for name, tensor in weights(tensors).items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("return_dict", [False, True])
def test_a_model_saved_by_transformers_is_read_back_bit_for_bit(tmp_path, return_dict):
    register()
    model, tensors = golden_model("mdlm_tiny_b", torch.float32)
    model.config.return_dict = return_dict
    model.save_pretrained(tmp_path / "saved")
    read = HookedMDLM.from_pretrained(tmp_path / "saved")
    expected = weights(tensors)
    assert read.state_dict().keys() == expected.keys()
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    for field in ("vocab_size", "model_length", "cond_dim", "dropout", "time_conditioning", "return_dict"):
        assert getattr(read.config, field) == getattr(model.config, field), field
    # It carries its code, so it also loads where this package is missing.
    for name in export.CODE:
        source = ROOT / "mdlm_interp" / "hf" / name
        assert (tmp_path / "saved" / name).read_text(encoding="utf-8") == source.read_text(encoding="utf-8")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert stored["auto_map"] == export.AUTO_MAP


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_the_rotary_frequencies_in_float32(tmp_path, dtype):
    register()
    reference = hooked("mdlm_tiny_b")
    exact = reference.state_dict()[INV_FREQ]
    assert not torch.equal(exact.to(dtype).float(), exact)
    export_hf(reference, tmp_path / "model")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", dtype=dtype)
    loaded.save_pretrained(tmp_path / "again")
    stored = load_file(tmp_path / "again" / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if name != INV_FREQ} == {dtype}
    cast = golden_model("mdlm_tiny_b", dtype)[0]
    for found in (loaded.state_dict()[INV_FREQ], stored[INV_FREQ], cast.state_dict()[INV_FREQ]):
        assert torch.equal(found, exact)
    assert torch.equal(cast.float().state_dict()[INV_FREQ], exact)
    tensors, _ = golden("mdlm_tiny_b")
    with torch.no_grad():
        logits = loaded(tensors["in.input_ids"], tensors["in.timesteps"])
    assert logits.dtype == dtype
    # Rounding of half precision; positions from a half precision table would be off by whole units.
    assert (logits - tensors["out.logits_fp64"]).abs().max() <= 0.25


def test_float64_load_computes_the_rotary_table_in_float64(tmp_path):
    register()
    export_hf(hooked("mdlm_tiny_b"), tmp_path / "model")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    tensors, _ = golden("mdlm_tiny_b")
    with torch.no_grad():
        logits = model(tensors["in.input_ids"], tensors["in.timesteps"])
    assert (logits - tensors["out.logits_fp64"]).abs().max() <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_without_rotary_frequencies_gets_them_computed(tmp_path, dtype):
    register()
    reference = hooked("mdlm_tiny_a")
    export_hf(reference, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    state = load_file(path)
    expected = state.pop(INV_FREQ)
    path.unlink()
    save_file(state, path, metadata={"format": "pt"})
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", dtype=dtype).state_dict()
    assert loaded[INV_FREQ].dtype == torch.float32
    # The power function may round differently on another machine than on the one that wrote the file.
    assert torch.allclose(loaded[INV_FREQ], expected, rtol=3e-7, atol=0)
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor.to(dtype)), name


def test_fresh_weights_follow_upstreams_initialisation():
    config = HFConfig(vocab_size=211, hidden_dim=64, cond_dim=32, n_blocks=2, n_heads=2)
    model = MDLM(config).eval()
    assert not model(torch.arange(7)[None]).any()
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or "output_layer.linear" in name:
            assert not parameter.any(), name
        elif ".norm" in name:
            assert bool((parameter == 1).all()), name
        else:
            owner = model.get_parameter(name.replace("bias", "weight"))
            bound = owner.shape[-1] ** -0.5
            assert parameter.abs().max() <= bound, name
            if (
                parameter.numel() >= 1000
            ):  # uniform, not the normal with std 0.02 that transformers defaults to
                assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name


def test_cond_dim_defaults_to_the_published_128():
    assert HFConfig().cond_dim == 128
    assert {name: getattr(HFConfig(), name) for name in vars(MDLMConfig())} == vars(MDLMConfig())


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
    with pytest.raises(OutputExistsError, match=f"{re.escape(name)} exists; export to another directory"):
        export_hf(random_model(300), tmp_path, tiny_tokenizer(300))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text(encoding="utf-8") == "precious"


def test_an_export_that_fails_leaves_no_files(tmp_path, monkeypatch):
    def full_disk(path: Path, content: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(export, "_write_json", full_disk)
    with pytest.raises(OSError, match="no space left"):
        export_hf(random_model(300), tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []


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


OLDER_LINE = (
    "torch==2.13.0",
    "transformers==4.57.6",
    "huggingface_hub==0.36.2",
    "tokenizers==0.22.2",
    "safetensors==0.8.0",
    "numpy==2.4.6",
    "pyyaml==6.0.3",
    "tqdm==4.70.1",
    "pytest==9.2.0",
    "pytest-timeout==2.4.0",
    "jaxtyping==0.3.11",
    "beartype==0.23.1",
)
"""The other transformers line; configs/constraints.txt pins the one that the rest of the suite runs on."""

NO_NETWORK = re.compile(
    "Temporary failure in name resolution|Name or service not known|nodename nor servname|getaddrinfo failed|"
    "Network is unreachable|No route to host|Connection refused|ConnectTimeout|Read timed out|ProxyError"
)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # pip may have to fetch torch
def test_this_file_passes_on_transformers_4(tmp_path):
    venv.create(tmp_path / "venv", with_pip=True, symlinks=os.name != "nt")
    python = str(tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    install = [python, "-m", "pip", "install", "--quiet", "--retries", "1", *OLDER_LINE]
    installed = subprocess.run(install, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if installed.returncode and (reason := NO_NETWORK.search(installed.stderr)):
        pytest.skip(f"pip reaches no package index ({reason.group()}), so transformers 4 cannot be installed")
    assert installed.returncode == 0, installed.stderr
    # The shared conftest needs packages that these tests do not.
    command = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--noconftest",
        "-m",
        "not slow",
        __file__,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout
