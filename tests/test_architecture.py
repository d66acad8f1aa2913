"""The layout's promises: who imports whom, and the two package names that collide with others."""

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["kernels", "model", "decoding", "profiling", "tests"]  # each may import those before it, and itself


def imported_packages(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", ORDER[:-1])
def test_imports_point_one_way(package):
    """No package imports one that comes after it in kernels <- model <- decoding <- profiling."""
    later = set(ORDER[ORDER.index(package) + 1 :])
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not imported_packages(path) & later, f"{path.relative_to(ROOT)} imports upwards"


@pytest.mark.parametrize("package", ["decoding", "kernels/reference"])
def test_no_triton_in_decoding_or_in_the_specification(package):
    for path in (ROOT / package).rglob("*.py"):
        assert "triton" not in imported_packages(path), path


def test_kernels_package_imports_nothing():
    """transformers probes for a package named ``kernels``: a stray import of ours must pull in nothing heavy."""
    code = "import sys, kernels; assert not {'torch', 'triton'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert imported_packages(ROOT / "kernels" / "__init__.py") == set()


def test_transformers_imports_beside_our_kernels_package():
    code = (
        "import kernels; from transformers import GPT2LMHeadModel, GPT2Config; GPT2LMHeadModel(GPT2Config(n_layer=0))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_hugging_face_kernels_is_not_a_dependency():
    """A distribution named ``kernels`` would own our import name; ours has another name and no version of theirs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    assert project["name"] != "kernels"
    assert not any(requirement.startswith("kernels") for requirement in wanted)
    import kernels

    major, minor = (int(part) for part in kernels.__version__.split(".")[:2])
    assert (major, minor) != (0, 18)


def test_a_foreign_kernels_distribution_is_reported(tmp_path):
    """Where a distribution named ``kernels`` is installed beside us, one clear line says to uninstall it."""
    info = tmp_path / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    run = subprocess.run(
        [sys.executable, "-c", "import decoding"],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert "pip uninstall kernels" in last and "0.18.2" in last


def test_profiling_is_a_namespace_package():
    """From Python 3.15 the standard library has a package of that name: ours must never win over it."""
    assert not (ROOT / "profiling" / "__init__.py").exists()
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert requires == ">=3.11,<3.15"


def test_no_file_outgrows_a_reader():
    """A file beyond 350 lines is a design question."""
    for package in ORDER[:-1]:
        for path in (ROOT / package).rglob("*.py"):
            length = len(path.read_text(encoding="utf-8").splitlines())
            assert length <= 350, f"{path.relative_to(ROOT)} has {length} lines"


def test_the_installed_distribution_is_ours():
    """The environment that runs the tests has this project installed, not a namesake."""
    assert importlib.metadata.metadata("staged-speculative-decoding")["Requires-Python"] in (
        "<3.15,>=3.11",
        ">=3.11,<3.15",
    )
