"""The wheel: what is in it, and that a user's type checker sees its types."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import spectral_kernels

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("spectral_kernels", "reference", "tests", "perf")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, as `python -m build` does it."""
    release = importlib.metadata.version("setuptools").split(".")[0]
    if int(release) < 77:
        pytest.skip(f"expected setuptools 77 or newer, got {release}")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        for path in (*(ROOT / folder).glob("*.py"), *(ROOT / folder).glob("*.typed")):
            target = source / folder / path.name
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [path] = (source / "dist").glob("*.whl")
    return path


def test_the_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    about = f"spectral_kernels-{spectral_kernels.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"spectral_kernels", about}
    sources = {f"spectral_kernels/{path.name}" for path in (ROOT / "spectral_kernels").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert "spectral_kernels/py.typed" in names and f"{about}/licenses/LICENSE" in names


def test_the_wheel_needs_torch_and_triton_alone(wheel):
    names = zipfile.ZipFile(wheel)
    [path] = [name for name in names.namelist() if name.endswith("METADATA")]
    needed = re.findall(
        r"^Requires-Dist: ([\w-]+)([^\n]*)", names.read(path).decode(), re.MULTILINE
    )
    assert {name for name, rest in needed if "extra ==" not in rest} == {"torch", "triton"}
    extras = {match for _, rest in needed for match in re.findall(r"extra == ['\"](\w+)", rest)}
    assert extras >= {"hf", "vllm", "perf", "dev"}


@pytest.mark.parametrize(
    ("extra", "pattern"), [("hf", "spectral_kernels/hf.py"), ("perf", "perf/*.py")]
)
def test_an_extra_brings_what_its_modules_import(wheel, extra, pattern):
    """Itself or by another extra that it names. What a function alone imports may be missing."""
    names = zipfile.ZipFile(wheel)
    [path] = [name for name in names.namelist() if name.endswith("METADATA")]
    needed = names.read(path).decode()
    brought, asked = {"torch", "triton"}, {extra}
    while asked:
        lines = re.findall(rf"Requires-Dist: (.*); extra == ['\"]{asked.pop()}['\"]", needed)
        brought |= {re.match(r"[\w-]+", line)[0] for line in lines}
        asked |= {x for line in lines for x in re.findall(r"\[(.*)\]", line)}
    imported = set()
    for node in (x for path in ROOT.glob(pattern) for x in ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module)
    others = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert "transformers" in others and others <= brought | {"perf", "spectral_kernels"}


def test_entry_points_lead_to_functions(wheel):
    """Without importing their modules, which may need vLLM."""
    names = zipfile.ZipFile(wheel)
    found = [name for name in names.namelist() if name.endswith("entry_points.txt")]
    text = names.read(found[0]).decode() if found else ""
    for module, function in re.findall(r"^\w+ = ([\w.]+):(\w+)$", text, re.MULTILINE):
        source = names.read(f"{module.replace('.', '/')}.py").decode()
        functions = {x.name for x in ast.parse(source).body if isinstance(x, ast.FunctionDef)}
        assert function in functions, f"{module}:{function}"
    assert text.count(":") == len(re.findall(r"^\w+ = [\w.]+:\w+$", text, re.MULTILINE))


USER = """
from spectral_kernels import Bands, PageLayout, SpectralCache

layout = PageLayout(k=Bands.parse("16x8+16x4"), v=Bands.parse("32x2"), head_dim=128)
size: int = layout.token_bytes


def rows(cache: SpectralCache) -> int:
    cache.reserve([1] * cache.max_seqs)
    return cache.max_seqs
"""


def test_a_users_program_is_checked_against_our_types(wheel, tmp_path):
    """The wheel in an environment of its own: `py.typed` makes mypy read it."""
    pytest.importorskip("mypy")
    venv.create(tmp_path / "env", with_pip=False)
    [site] = (tmp_path / "env").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)

    def mypy(text: str) -> str:
        (tmp_path / "user.py").write_text(text)
        python = tmp_path / "env" / "bin" / "python"
        command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python)]
        command += ["--config-file=", "--no-incremental", "user.py"]
        clean = {
            name: x for name, x in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")
        }
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        return done.stdout

    assert mypy(USER) == "Success: no issues found in 1 source file\n"
    assert '"parse" of "Bands" has incompatible type "int"' in mypy(
        USER.replace('parse("32x2")', "parse(32)")
    )
    assert 'has no attribute "max_rows"' in mypy(
        USER.replace("cache.max_seqs\n", "cache.max_rows\n")
    )
    (site / "spectral_kernels" / "py.typed").unlink()
    assert "missing library stubs or py.typed marker" in mypy(USER)
