"""One stem finds everything: a kernel has a launcher, a twin, an oracle, a test module; its
docstring names them. What imports what, and how large things may be."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import spectral_kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(spectral_kernels.__path__[0])
SOURCES = sorted(PACKAGE.glob("*.py"))
# Keywords of launchers that a twin need not have: where to write, and how to launch.
LAUNCH_ONLY = {"out", "lse", "out_lse", "workspace", "num_splits", "matrix_units", "after_append"}
# What needs transformers; it holds no kernels.
ADAPTERS = {"hf", "vllm", "_model", "_requests", "__main__"}
STEMS = sorted(m.name for m in pkgutil.iter_modules([str(PACKAGE)]) if m.name not in ADAPTERS)
# A module may import those of lower numbers, never one of its number or above; a name that is
# missing is a failure.
LAYERS = {
    "_checks": 0,
    "_launch": 0,
    "_math": 0,
    "_bits": 0,
    "_requests": 2,
    "layout": 1,
    "codec": 2,
    "merge": 2,
    "rope": 3,
    "window": 4,
    "compress": 5,
    "attention_sm75": 6,
    "attention": 7,
    "cache": 8,
    "_model": 8,
    "calibrate": 9,
    "hf": 10,
    "vllm": 10,
    "__main__": 11,
}
MAX_CLASS, MAX_FUNCTION, MAX_PARAMETERS, MAX_COLUMNS = 300, 100, 35, 100
MAX_KERNELS, MAX_ADAPTERS = 5330, 2505  # lines of all that is no adapter, and of the adapters


def module_of(stem: str) -> ModuleType:
    return importlib.import_module(f"spectral_kernels.{stem}")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions_of(stem: str) -> dict[str, ast.FunctionDef]:
    body = tree_of(PACKAGE / f"{stem}.py").body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def decorated(node: ast.FunctionDef, name: str) -> bool:
    return any(ast.unparse(d).startswith(name) for d in node.decorator_list)


def imported_from(stem: str) -> dict[str, str]:
    """name -> stem of what a module takes from others of the package."""
    found = {}
    for node in ast.walk(tree_of(PACKAGE / f"{stem}.py")):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            found |= {alias.asname or alias.name: node.module for alias in node.names}
    return found


def launched_by(stem: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> set[str]:
    """Kernels that a function starts (`_x_kernel[grid](...)`), by itself or through functions that
    are no operation of their own: private ones of its module, and what it takes from private and
    launch modules."""
    functions = functions_of(stem)
    if name not in functions or (stem, name) in seen:
        return set()
    found, others = set(), imported_from(stem)
    for call in (n for n in ast.walk(functions[name]) if isinstance(n, ast.Call)):
        target = call.func
        if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
            found |= {target.value.id} if target.value.id.endswith("_kernel") else set()
        elif isinstance(target, ast.Name) and not target.id.endswith("_torch"):
            inside = seen | {(stem, name)}
            if target.id.startswith("_"):
                found |= launched_by(stem, target.id, inside)
            elif others.get(target.id) == "attention_sm75":
                found |= launched_by("attention_sm75", target.id, inside)
    return found


def operations() -> list[tuple[str, str]]:
    """(stem, launcher) of every function of a public module that starts a kernel."""
    return [
        (stem, name)
        for stem in STEMS
        if not stem.startswith("_") and stem != "attention_sm75"  # a path of attention's operations
        for name in functions_of(stem)
        if not name.startswith("_") and not name.endswith("_torch") and launched_by(stem, name)
    ]


OPERATIONS = operations()


def test_the_operations_are_found():
    """The walk itself: without this, a walk that finds nothing would pass everything below."""
    assert {name for _, name in OPERATIONS} >= {
        "rotate",
        "encode",
        "append",
        "decode",
        "attend_window",
        "attend_spectral",
        "merge_states",
        "merge_many_states",
    }


@pytest.mark.parametrize(("stem", "name"), OPERATIONS)
def test_an_operation_has_a_twin(stem, name):
    """With the same parameters and defaults, but for those that say where to write and how to
    launch."""
    module = module_of(stem)
    twin = getattr(module, f"{name}_torch", None)
    assert callable(twin), f"{stem}.{name} has no twin {name}_torch"
    launcher_takes, twin_takes = (
        [
            (p.name, p.kind, p.default)
            for p in inspect.signature(f).parameters.values()
            if p.name not in LAUNCH_ONLY
        ]
        for f in (getattr(module, name), twin)
    )
    assert twin_takes == launcher_takes


@pytest.mark.parametrize(("stem", "name"), OPERATIONS)
def test_an_operation_has_an_oracle_a_test_and_a_fuzzer(stem, name):
    assert (ROOT / "reference" / f"{stem}.py").exists(), f"reference/{stem}.py"
    test = ROOT / "tests" / f"test_{stem}.py"
    assert test.exists(), f"tests/test_{stem}.py"
    assert f'"{name}"' in test.read_text(), f"{test.name} never runs {name}"
    helpers = {"rotate": "check_turn"}
    fuzz = (ROOT / "tests" / "fuzz.py").read_text()
    assert name in fuzz or helpers.get(name, "-") in fuzz, f"fuzz.py never runs {name}"


@pytest.mark.parametrize("stem", sorted({stem for stem, _ in OPERATIONS}))
def test_a_module_names_its_oracle_and_test(stem):
    text = module_of(stem).__doc__ or ""
    for path in (f"reference/{stem}.py", f"tests/test_{stem}.py"):
        assert path in text, f"the docstring of {stem}.py does not name {path}"


@pytest.mark.parametrize("stem", STEMS)
def test_a_module_names_files_that_exist(stem):
    text = module_of(stem).__doc__ or ""
    for word in text.replace("(", " ").replace(")", " ").replace(",", " ").split():
        path = word.rstrip(".:;")
        if path.startswith(("reference/", "tests/", "perf/")) and path.endswith(".py"):
            assert (ROOT / path).exists(), f"the docstring of {stem}.py names {path}"


@pytest.mark.parametrize("stem", STEMS)
def test_every_kernel_is_launched(stem):
    """No jit function named as a kernel without a launch in its module, and the other way round."""
    functions = functions_of(stem)
    kernels = {
        name
        for name, node in functions.items()
        if name.endswith("_kernel") and decorated(node, "triton.jit")
    }
    launched = set()
    for node in ast.walk(tree_of(PACKAGE / f"{stem}.py")):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            value = node.func.value
            launched |= {value.id} if isinstance(value, ast.Name) else set()
    launched = {name for name in launched if name.endswith("_kernel")}
    assert kernels == launched, f"launched {sorted(launched)}, defined {sorted(kernels)}"


def test_every_function_is_used():
    """No private function of the package is dead."""
    texts = {path.stem: path.read_text() for path in SOURCES}
    whole = "\n".join(texts.values())
    for stem in texts:
        for name in functions_of(stem) if stem != "__init__" else ():
            if name.startswith("_") and not name.startswith("__"):
                uses = re.findall(rf"\b{name}\b", whole)
                assert len(uses) > 1, f"{stem}.{name} is never used"


@pytest.mark.parametrize("name", spectral_kernels.__all__)
def test_public_names_are_documented(name):
    thing = getattr(spectral_kernels, name)
    if not callable(thing):
        return
    assert inspect.getdoc(thing), f"{name} has no docstring"
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        missing = [
            p for p, v in signature.parameters.items() if v.annotation is inspect.Parameter.empty
        ]
        assert not missing, f"{name}: no type of {missing}"
        assert signature.return_annotation is not inspect.Signature.empty, (
            f"{name}: no type of result"
        )


@pytest.mark.parametrize(("stem", "name"), OPERATIONS)
def test_docstrings_say_what_comes_in_and_out(stem, name):
    text = inspect.getdoc(getattr(module_of(stem), name)) or ""
    for section in ("Args:", "Raises"):
        assert section.lower() in text.lower(), f"{stem}.{name}: no section {section}"
    for parameter in inspect.signature(getattr(module_of(stem), name)).parameters:
        assert parameter in text, f"{stem}.{name}: {parameter} is not described"


# imports


def test_oracles_share_nothing_with_the_package():
    """reference/ imports neither the package nor the libraries it computes with."""
    for path in (ROOT / "reference").glob("*.py"):
        for node in ast.walk(tree_of(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module or "")
            for name in names:
                taken = name.split(".")[0]
                assert taken not in ("spectral_kernels", "torch", "triton"), f"{path.name}: {name}"


def package_imports(stem: str, *, at_import: bool = False) -> set[str]:
    """Stems that a module imports; at_import: by importing it, not from inside a function."""
    tree = tree_of(PACKAGE / f"{stem}.py")
    skipped = set()
    if at_import:
        for node in ast.walk(tree):
            lazy = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if lazy or typing:
                skipped |= set(ast.walk(node))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node not in skipped:
            found |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
    return found


@pytest.mark.parametrize("stem", sorted(path.stem for path in SOURCES if path.stem != "__init__"))
def test_imports_go_one_way(stem):
    """Down the layers alone: so there is no circle."""
    assert stem in LAYERS, f"{stem}.py: give it a layer"
    for taken in package_imports(stem):
        if taken == "calibrate" and stem in ADAPTERS:
            continue
        assert LAYERS[taken] < LAYERS[stem], f"{stem} imports {taken}"


def test_attention_takes_the_old_cards_path_without_a_circle():
    """attention_sm75 lies below attention, which dispatches to it."""
    assert "attention" not in package_imports("attention_sm75")


def test_the_run_time_path_does_not_import_calibrate():
    """Not when it is imported: nothing but a function that calibrates may."""
    for path in SOURCES:
        if path.stem != "calibrate":
            assert "calibrate" not in package_imports(path.stem, at_import=True), path.name
    code = "import spectral_kernels, sys; assert 'spectral_kernels.calibrate' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_needs_neither_gpu_nor_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None; import spectral_kernels, torch;"
        "assert not torch.cuda.is_initialized(); print(len(spectral_kernels.__all__))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and int(done.stdout) == len(spectral_kernels.__all__), done.stderr


@pytest.mark.parametrize("stem", STEMS)
def test_nothing_but_adapters_imports_transformers(stem):
    """calibrate may, inside a function: it runs a model."""
    for node in ast.walk(tree_of(PACKAGE / f"{stem}.py")):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module or "")
        wanted = any(name.split(".")[0] in ("transformers", "vllm") for name in names)
        assert not wanted or (stem == "calibrate" and node.col_offset), f"{stem}: {names}"


# sizes


def lines_of(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_sizes(path):
    """No class, function, list of parameters or line that nobody takes in at a glance."""
    wrong = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ClassDef) and lines_of(node) > MAX_CLASS:
            wrong.append(f"class {node.name}: {lines_of(node)} lines")
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if lines_of(node) > MAX_FUNCTION:
                wrong.append(f"{node.name}: {lines_of(node)} lines")
            arguments = node.args
            count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
            if count > MAX_PARAMETERS and node.name.endswith("_kernel"):
                wrong.append(f"{node.name}: {count} parameters")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if len(line) > MAX_COLUMNS:
            wrong.append(f"line {number}: {len(line)} columns")
    assert not wrong, f"{path.name}: " + "; ".join(wrong)


def test_the_package_is_small():
    lines = {path.stem: len(path.read_text().splitlines()) for path in SOURCES}
    adapters = sum(lines[stem] for stem in ADAPTERS)
    assert adapters <= MAX_ADAPTERS, f"{adapters} lines: {lines}"
    assert sum(lines.values()) - adapters <= MAX_KERNELS, f"{lines}"


def test_sizes_have_teeth(tmp_path):
    """The walk above finds what is too large."""
    too_long = "def f():\n" + "    x = 1\n" * 100
    many = f"def g_kernel({', '.join(f'a{i}' for i in range(36))}): pass\n"
    wide, big = "y = '" + "x" * 100 + "'\n", "class C:\n" + "    x = 1\n" * 300
    for text in (too_long, many, wide, big):
        path = tmp_path / "module.py"
        path.write_text(text)
        with pytest.raises(AssertionError):
            test_sizes(path)
    path.write_text("def f():\n" + "    x = 1\n" * 99)
    test_sizes(path)
