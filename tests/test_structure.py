"""One stem finds everything: a kernel has a launcher, a twin, an oracle, a test module; its docstring names them."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import spectral_kernels

ROOT = Path(__file__).resolve().parents[1]
# Keywords of launchers that a twin need not have: where to write, and how to launch.
LAUNCH_ONLY = {"out", "lse", "out_lse", "splits", "matrix_units", "workspace", "merged"}
# hf.py is the only file that may import transformers; it holds no kernels.
STEMS = sorted(m.name for m in pkgutil.iter_modules(spectral_kernels.__path__) if m.name != "hf")


def module_of(stem: str) -> ModuleType:
    return importlib.import_module(f"spectral_kernels.{stem}")


def functions_of(stem: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(Path(module_of(stem).__file__).read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def launched_by(node: ast.FunctionDef, functions: dict[str, ast.FunctionDef]) -> set[str]:
    """Kernels a function starts (`_x_kernel[grid](...)`), by itself or through private functions of its module."""
    found = set()
    for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
        target = call.func
        if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name) and target.value.id.endswith("_kernel"):
            found.add(target.value.id)
        elif isinstance(target, ast.Name) and target.id.startswith("_") and target.id in functions:
            found |= launched_by(functions[target.id], functions)
    return found


def operations() -> list[tuple[str, str]]:
    """(stem, launcher) of every public function that starts a kernel."""
    found = []
    for stem in STEMS:
        functions = functions_of(stem)
        found += [
            (stem, name)
            for name, node in functions.items()
            if not name.startswith("_") and not name.endswith("_torch") and launched_by(node, functions)
        ]
    return found


def kernels_of(stem: str) -> set[str]:
    """Jit functions that are launched, not called from another one."""
    functions = functions_of(stem).items()
    return {
        name
        for name, node in functions
        if name.endswith("_kernel")
        and any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
    }


def test_the_operations_are_found():
    """The walk itself: without this, a walk that finds nothing would pass everything below."""
    names = {name for _, name in operations()}
    assert {"rotate", "project_queries", "gram", "encode", "decode"} <= names
    assert {"attend_spectral", "attend_exact", "merge_states", "merge_many_states"} <= names


@pytest.mark.parametrize(("stem", "name"), operations())
def test_an_operation_has_a_twin(stem, name):
    module = module_of(stem)
    twin = getattr(module, f"{name}_torch", None)
    assert callable(twin), f"{stem}.{name} has no twin {name}_torch"
    launcher_takes, twin_takes = (list(inspect.signature(f).parameters) for f in (getattr(module, name), twin))
    wanted = [p for p in launcher_takes if p not in LAUNCH_ONLY]
    assert [p for p in twin_takes if p not in LAUNCH_ONLY] == wanted


@pytest.mark.parametrize(("stem", "name"), operations())
def test_an_operation_has_an_oracle_and_a_test(stem, name):
    assert (ROOT / "reference" / f"{stem}.py").exists(), f"reference/{stem}.py"
    test = ROOT / "tests" / f"test_{stem}.py"
    assert test.exists(), f"tests/test_{stem}.py"
    assert f'"{name}"' in test.read_text(), f"{test.name} never runs {name}"
    fuzz = (ROOT / "tests" / "test_fuzz.py").read_text()
    assert name in fuzz, f"test_fuzz.py never runs {name}"


@pytest.mark.parametrize("stem", sorted({stem for stem, _ in operations()}))
def test_a_module_names_its_oracle_and_test(stem):
    text = module_of(stem).__doc__ or ""
    for path in (f"reference/{stem}.py", f"tests/test_{stem}.py"):
        assert path in text, f"the docstring of {stem}.py does not name {path}"


@pytest.mark.parametrize("stem", STEMS)
def test_every_kernel_is_launched(stem):
    functions = functions_of(stem)
    launched = set().union(*(launched_by(node, functions) for node in functions.values()))
    assert kernels_of(stem) == launched, f"launched {sorted(launched)}, defined {sorted(kernels_of(stem))}"


@pytest.mark.parametrize("name", spectral_kernels.__all__)
def test_public_names_are_documented(name):
    thing = getattr(spectral_kernels, name)
    assert inspect.getdoc(thing), f"{name} has no docstring"
    if inspect.isfunction(thing):
        hints = inspect.signature(thing)
        missing = [p for p, v in hints.parameters.items() if v.annotation is inspect.Parameter.empty]
        assert not missing and hints.return_annotation is not inspect.Signature.empty, (
            f"{name}: no type of {missing or 'result'}"
        )


def test_oracles_share_nothing_with_the_package():
    """reference/ imports neither the package nor the libraries it computes with."""
    for path in (ROOT / "reference").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module or "")
            for name in names:
                assert name.split(".")[0] not in ("spectral_kernels", "torch", "triton"), f"{path.name} imports {name}"


def test_data_flows_one_way():
    """rope and pages know nobody above them; nothing but hf imports transformers."""
    above = {
        "_checks": set(STEMS) | {"hf"},
        "_launch": set(STEMS) - {"_checks"} | {"hf"},
        "pages": {"rope", "compress", "attention", "merge", "cache", "hf"},
        "merge": {"rope", "compress", "attention", "cache", "hf"},
        "eigen": {"pages", "rope", "compress", "attention", "merge", "cache", "hf"},
        "rope": {"compress", "attention", "cache", "hf"},
        "attention": {"cache", "hf"},
        "compress": {"cache", "hf"},
        "cache": {"hf"},
    }
    for stem in STEMS:
        for node in ast.walk(ast.parse(Path(module_of(stem).__file__).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                taken = {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
                assert not taken & above.get(stem, set()), f"{stem} imports {taken & above[stem]}"
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not any(n.split(".")[0] == "transformers" for n in names), f"{stem} imports transformers"


def test_import_needs_neither_gpu_nor_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None; import spectral_kernels, torch;"
        "assert not torch.cuda.is_initialized(); print(len(spectral_kernels.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and int(done.stdout) == len(spectral_kernels.__all__), done.stderr
