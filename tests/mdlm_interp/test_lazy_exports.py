"""Names that a package loads when first used: found, listed, and the same for Python and for type checkers."""

from __future__ import annotations

import ast
import sys
import types
from pathlib import Path

import pytest

import mdlm_interp
from mdlm_interp.lazy_exports import lazily

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(monkeypatch):
    """A package with one name of its own, and two lazy ones of the standard library."""
    module = types.ModuleType("probe_package")
    module.__dict__["own"] = 1
    module.__getattr__, module.__dir__ = lazily(  # type: ignore[method-assign]
        "probe_package", {"Fraction": "fractions", "gone": "fractions"}
    )
    monkeypatch.setitem(sys.modules, "probe_package", module)
    return module


def test_a_lazy_name_is_its_homes_own(package):
    from fractions import Fraction

    assert package.Fraction is Fraction


def test_lazy_and_own_names_are_listed_in_order(package):
    assert {"Fraction", "own", "__name__"} <= set(dir(package))
    assert dir(package) == sorted(dir(package))


def test_other_names_are_attribute_errors_that_name_the_package(package):
    with pytest.raises(AttributeError, match=r"^module 'probe_package' has no attribute 'fraction'$"):
        _ = package.fraction
    with pytest.raises(AttributeError, match="module 'fractions' has no attribute 'gone'"):
        _ = package.gone


def lazy_and_checked(source: str) -> tuple[dict[str, str], dict[str, str]]:
    """Module of each name: as `lazily` is told, and as the imports under TYPE_CHECKING say.

    The call must stand in the `else`: a type checker that sees `__getattr__` lets every misspelt name pass.
    """
    (branch,) = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    assert ast.unparse(branch.test) == "TYPE_CHECKING"
    checked: dict[str, str] = {}
    for line in branch.body:
        assert isinstance(line, ast.ImportFrom)
        checked |= {alias.name: str(line.module) for alias in line.names}
    (call,) = branch.orelse
    assert isinstance(call, ast.Assign)
    assert isinstance(call.value, ast.Call)
    return ast.literal_eval(call.value.args[1]), checked


PACKAGES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted(ROOT.glob("*/__init__.py"))
    if "lazily(" in path.read_text("utf-8")
]


@pytest.mark.parametrize("path", PACKAGES)
def test_type_checkers_see_the_same_names_from_the_same_modules(path):
    lazy, checked = lazy_and_checked((ROOT / path).read_text("utf-8"))
    assert lazy == checked
    assert lazy


def test_this_package_is_among_those_and_the_check_can_fail():
    assert "mdlm_interp/__init__.py" in PACKAGES
    lazy, checked = lazy_and_checked(
        "if TYPE_CHECKING:\n    from a.b import C\n"
        "else:\n    __getattr__, __dir__ = lazily(__name__, {'C': 'a.c'})"
    )
    assert (lazy, checked) == ({"C": "a.c"}, {"C": "a.b"})


def test_all_lists_the_lazy_names_and_the_version():
    lazy, _ = lazy_and_checked((ROOT / "mdlm_interp" / "__init__.py").read_text("utf-8"))
    assert set(mdlm_interp.__all__) == {*lazy, "__version__"}
