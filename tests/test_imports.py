"""Imports: they point down, stay light and keep their promises; and what is packaged is what is there."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

ROOT = Path(__file__).parents[1]
ORDER = ["mdlm_interp", "oracle", "capture", "transcoder"]
"""From the lowest package up: each may import itself and what stands before it."""

SOURCES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def upward_imports(source: str, package: str) -> list[str]:
    """The imports, anywhere in a source, of packages above its own."""
    above = ORDER[ORDER.index(package) + 1 :]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        else:
            continue
        found += [f"line {node.lineno}: {name}" for name in names if name.partition(".")[0] in above]
    return found


def test_all_four_packages_are_searched():
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(ORDER)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path):
    assert upward_imports(path.read_text("utf-8"), path.relative_to(ROOT).parts[0]) == []


def test_an_upward_import_is_found_wherever_it_hides():
    source = (
        "import os, capture.run\n"
        "def f():\n"
        "    from transcoder.model import CrossLayerTranscoder\n"
        "if TYPE_CHECKING:\n"
        "    import oracle as o\n"
        "import mdlm_interp, captured\n"
    )
    assert sorted(upward_imports(source, "mdlm_interp")) == [
        "line 1: capture.run",
        "line 3: transcoder.model",
        "line 5: oracle",
    ]
    assert upward_imports(source, "capture") == ["line 3: transcoder.model"]
    assert upward_imports(source, "transcoder") == []


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_every_module_imports_and_every_public_name_resolves(path):
    module = import_module(module_name(path))
    missing = [name for name in getattr(module, "__all__", []) if not hasattr(module, name)]
    assert missing == []


@pytest.mark.parametrize("package", ORDER)
def test_the_front_door_lists_its_names_once_and_dir_shows_them(package):
    module = import_module(package)
    assert len(set(module.__all__)) == len(module.__all__) > 0
    assert set(module.__all__) <= set(dir(module))


def test_an_unknown_name_of_a_lazy_package_is_an_attribute_error():
    module = import_module("mdlm_interp")
    with pytest.raises(AttributeError, match="module 'mdlm_interp' has no attribute 'HookedMDML'"):
        _ = module.HookedMDML


def test_shapes_are_checked_while_the_suite_runs(tmp_path, monkeypatch):
    (tmp_path / "probe_shapes.py").write_text(
        "from __future__ import annotations\n"
        "from torch import Tensor\n"
        "from mdlm_interp.shapes import Float32\n"
        'def same(x: Float32[Tensor, "a b"], y: Float32[Tensor, "a b"]) -> None: ...\n'
    )
    monkeypatch.setattr(import_module("mdlm_interp"), "__path__", [str(tmp_path)])
    probe = import_module("mdlm_interp.probe_shapes")
    probe.same(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(TypeCheckError, match="y"):
        probe.same(torch.zeros(2, 3), torch.ones(3, 2))
    with pytest.raises(TypeCheckError, match="x"):
        probe.same(torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3))


# What importing needs


def top_level_names_outside(allowed: list[str]) -> list[str]:
    """Installed modules that belong neither to the allowed distributions nor to what those require."""
    known: set[str] = set()
    pending = [*allowed]
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in known:
            continue
        known.add(name)
        try:
            needed = [line for line in requires(name) or [] if "extra ==" not in line]
        except PackageNotFoundError:  # needed on another platform only
            continue
        pending += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in needed]
    homes = packages_distributions()
    outside = [
        module
        for module, distributions in homes.items()
        if not known & {re.sub(r"[-_.]+", "-", d).lower() for d in distributions}
    ]
    return sorted(set(outside) - set(ORDER))


def run_without(modules: list[str], statements: str) -> subprocess.CompletedProcess[str]:
    """Run statements in a fresh interpreter in which the modules cannot be imported."""
    blocker = (
        "import json, sys\n"
        "class Blocker:\n"
        "    names = set(json.loads(sys.argv[1]))\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in self.names:\n"
        "            raise ModuleNotFoundError(f'{name} is blocked', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    return subprocess.run(
        [sys.executable, "-c", blocker + statements, json.dumps(modules)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


LIGHT = ["torch", "numpy", "safetensors"]


def test_the_model_and_the_oracle_need_torch_numpy_and_safetensors_only():
    statements = (
        "import mdlm_interp, oracle\n"
        "from mdlm_interp import HookedMDLM, MDLMConfig, NativeArithmetic, ActivationCache\n"
        "for name in oracle.__all__:\n"
        "    getattr(oracle, name)\n"
        "config = MDLMConfig(vocab_size=11, hidden_dim=8, cond_dim=4, n_blocks=1, n_heads=2)\n"
        "HookedMDLM(config)\n"
        "from mdlm_interp.shapes import Float\n"
        "assert Float[int, 'batch pos'] is int\n"
    )
    result = run_without(top_level_names_outside(LIGHT), statements)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["yaml", "zarr", "tokenizers", "transformers", "jaxtyping", "tqdm"])
def test_the_check_of_light_imports_can_fail(module):
    result = run_without(top_level_names_outside(LIGHT), f"import {module}")
    assert result.returncode == 1
    assert f"{module} is blocked" in result.stderr


# What is packaged


def test_every_package_with_code_is_in_pyproject_and_carries_its_data():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    with_code = {module_name(path) for path in SOURCES if path.name == "__init__.py"}
    assert with_code == set(settings["packages"])
    packaged = {
        file
        for package, patterns in settings["package-data"].items()
        for name in (settings["packages"] if package == "*" else [package])
        for pattern in patterns
        for file in (ROOT / name.replace(".", "/")).glob(pattern)
    }
    assert {ROOT / package / "py.typed" for package in ORDER} <= packaged
    present = {
        file
        for package in ORDER
        for file in (ROOT / package).rglob("*")
        if file.is_file() and file.suffix != ".py" and "__pycache__" not in file.parts
    }
    assert present == packaged
