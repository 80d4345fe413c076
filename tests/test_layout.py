"""The layout: imports go one way, and the source root `kernels/` hurts nobody."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("qat_kernels", "qat", "data", "recipes")
FOLDERS = {"qat_kernels": "kernels/qat_kernels", "qat": "qat", "data": "data", "recipes": "recipes"}


def imported(path):
    """Top-level names of the packages that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", ORDER)
def test_imports_go_one_way(package):
    above = set(ORDER[ORDER.index(package) + 1 :])
    files = list((ROOT / FOLDERS[package]).rglob("*.py"))
    assert files
    wrong = {(str(path), name) for path in files for name in imported(path) if name in above}
    assert wrong == set()


def test_kernels_is_a_source_root_and_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    roots = {"qat": ROOT / "qat", "qat_kernels": ROOT / "kernels/qat_kernels"}
    found = {
        ".".join((name, *init.parent.relative_to(root).parts))
        for name, root in roots.items()
        for init in root.rglob("__init__.py")
    }
    assert set(listed["packages"]) == found


def test_transformers_imports_from_the_repository_root():
    # with a package called `kernels` in the way, this fails
    code = "from transformers import AutoModelForCausalLM; print(AutoModelForCausalLM.__name__)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "AutoModelForCausalLM\n", done.stderr


def test_kernels_have_a_test_of_the_same_stem():
    package = ROOT / "kernels/qat_kernels"
    modules = [p.stem for p in package.glob("*.py")] + [
        p.parent.name for p in package.glob("*/*.py")
    ]
    kernels = set(modules) - {"__init__"}
    tests = {p.stem.removeprefix("test_") for p in (ROOT / "tests/kernels").glob("test_*.py")}
    assert kernels == tests


def test_listing_the_recipes_needs_no_torch():
    code = "import sys, train; train.run([]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "qat_int4" in done.stdout


def test_entry_point_stays_short():
    assert len((ROOT / "train.py").read_text("utf-8").splitlines()) < 60
