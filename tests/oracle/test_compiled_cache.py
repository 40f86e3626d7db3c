"""Loops that numba keeps on disk are compiled again when a source that went into them changes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROBE = """
import sys
import numpy as np
from oracle import fused_check, kernels, product_kernels
if "renew" in sys.argv:
    fused_check.renew()
scale = np.empty(1, np.float32)
zeros = np.zeros((1, 4), np.float32)
kernels.layer_norm(zeros, zeros[0], scale, False, np.empty(4), 0, 1, zeros.copy())
print(product_kernels.compiled_from() == kernels.SOURCES, float(scale[0]))
"""


def test_the_compiled_loops_say_what_they_were_compiled_from():
    pytest.importorskip("numba", reason="the compiled loops need numba")
    from oracle import fused_check, kernels

    fused_check.renew()
    for module in fused_check.MODULES:
        assert module.compiled_from() == kernels.SOURCES
    kept = fused_check.kept_in()
    assert kept is None or Path(kept).is_dir()


@pytest.mark.slow
def test_a_changed_constant_reaches_loops_that_were_kept(tmp_path):
    """Exact: LayerNorm's scale of a row of zeros is 1 / sqrt(EPS), before and after EPS changes."""
    pytest.importorskip("numba", reason="the compiled loops need numba")
    for package in ("oracle", "mdlm_interp"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))

    def probe(*arguments: str) -> list[str]:
        result = subprocess.run(
            [sys.executable, "-c", PROBE, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.split()

    before = probe("renew")
    assert before[0] == "True"
    recipes = tmp_path / "oracle" / "recipes.py"
    text = recipes.read_text("utf-8")
    recipes.write_text(text.replace("0x1.4f8b588e368f1p-17", "0x1.4f8b588e368f1p-15"), "utf-8")
    # The control: numba alone does not notice.
    assert probe() == ["False", before[1]]
    assert probe("renew") == ["True", str(float(before[1]) / 2)]
    assert probe() == ["True", str(float(before[1]) / 2)]
