"""Who may import whom (DESIGN.md section 5), read from the source."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "coherent_ddrm"
LEAVES = ("schedule", "operators", "masks", "images", "losses", "structure_losses", "adversarial", "rng")


def imported(path: Path) -> set[str]:
    """Our modules that a file imports at any depth, as their first name under the package."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module == "coherent_ddrm":
                names.update(f"coherent_ddrm.{alias.name}" for alias in node.names)
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("coherent_ddrm.")} | (
        {"train"} if any(name == "train" or name.startswith("train.") for name in names) else set()
    )


def files(module: str) -> list[Path]:
    folder = PACKAGE / module
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{module}.py"]


@pytest.mark.parametrize("module", LEAVES)
def test_leaves_import_no_sibling(module):
    for path in files(module):
        assert imported(path) <= {module}, f"{path} imports {imported(path)}"


def test_samplers_import_only_the_mathematics():
    for path in files("samplers"):
        assert imported(path) <= {"samplers", "schedule", "denoiser", "operators", "rng"}, path


def test_networks_know_no_data_and_no_command_line():
    for path in files("models"):
        assert not imported(path) & {"data", "training", "config", "pipeline", "cli", "images"}, path


def test_files_that_are_no_code_are_installed_too():
    """A wheel holds what pyproject.toml names, not what lies in the folder."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    installed = {f for name, globs in named.items() for g in globs for f in (ROOT / name.replace(".", "/")).glob(g)}
    others = {f for f in PACKAGE.rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")}
    assert others and others <= installed


def test_nothing_imports_train():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "data_prep").glob("*.py")]:
        assert "train" not in imported(path), path


def test_the_package_and_its_help_do_not_load_torch():
    code = "import sys; import coherent_ddrm.cli, coherent_ddrm.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
