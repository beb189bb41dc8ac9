"""Every page of the repository is true: its Python blocks run as printed, its commands exist with
their options, its links lead somewhere, its tree is the tree, its tables are complete."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import spectral_kernels

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path for folder in (".", "spectral_kernels", "reference", "tests", "perf")
    for path in (ROOT / folder).glob("*.md")
)  # fmt: skip
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAX_README = 150
# Commands of installed tools, by the extra that installs them.
TOOLS = {"vllm": "vllm", "ruff": "dev", "mypy": "dev"}


def blocks(language: str) -> list[Any]:
    """(page, text) of every fenced block in a language."""
    found = []
    for page in PAGES:
        fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
        own = [text for name, text in fenced if name == language]
        name = page.relative_to(ROOT)
        found += [pytest.param(text, id=f"{name}:{i}") for i, text in enumerate(own)]
    return found


def commands() -> list[Any]:
    """Every command of a shell block, without its comment."""
    found = []
    for block in blocks("bash"):
        text = block.values[0].replace("\\\n", " ")
        for line in text.splitlines():
            parts = re.split(r"\s&&\s", line)
            found += [pytest.param(part, id=f"{block.id} {part[:40]}") for part in parts if part]
    return found


def test_pages_are_found():
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert names >= {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "perf/RESULTS.md"}
    assert names >= {"spectral_kernels/README.md", "reference/README.md"}
    assert len(blocks("python")) >= 4 and len(commands()) >= 10
    for page in PAGES:  # no block of a language that nothing below looks at
        languages = re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)
        assert set(languages) <= {"", "python", "bash", "text"}, page
        assert languages[::2].count("") == 0 or not languages, f"{page}: a block without a language"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What blocks take as given: a model with its codecs in the user's cache, and inputs."""
    pytest.importorskip("transformers")
    from perf.generate import TINY_MODEL, load
    from spectral_kernels import calibrate

    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    model, tokenizer = load()
    for preset in calibrate.PRESETS:
        path = calibrate.cache_path(calibrate.fingerprint(model), preset)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((TINY_MODEL / f"codec-{preset}.safetensors").read_bytes())
    ids = torch.arange(3, 103, device=model.device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    yield {"model": model, "tokenizer": tokenizer, "inputs": inputs}
    patch.undo()


@pytest.mark.parametrize("text", blocks("python"))
def test_a_python_block_runs(text, names, monkeypatch):
    monkeypatch.chdir(ROOT)
    if "vllm" in text and importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM")
    torch.manual_seed(0)
    namespace = dict(names)
    exec(compile(text, "block", "exec"), namespace)
    for name, value in namespace.items():  # whatever it made has numbers in it
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "lse":
            assert value.isfinite().all(), name


@functools.cache
def help_of(module: str) -> str:
    """What `python -m module --help` prints; in this process, where torch is imported already."""
    if module == "pytest":
        command = [sys.executable, "-m", module, "--help"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    before, out = sys.argv, io.StringIO()
    sys.argv = [module, "--help"]
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__")
    finally:
        sys.argv = before
    assert not ended.value.code, f"{module} --help: {ended.value.code}"
    return out.getvalue()


def check_module(module: str, arguments: list[str]) -> None:
    """The module can be run, and knows the options; files that are named exist."""
    assert importlib.util.find_spec(module) is not None, f"no module {module}"
    if module == "venv":
        return
    known = set(re.findall(r"--?[\w-]+", help_of(module)))
    for option in (x.split("=")[0] for x in arguments if x.startswith("-")):
        assert option in known, f"{module} has no option {option}"
    for path in (x for x in arguments if "/" in x and x.split("/")[0] in ("tests", "perf")):
        assert (ROOT / path).exists(), path


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("text", commands())
def test_a_command_exists(text):
    """Not run here (they install, measure, or are the tests): the program, its options, the
    extras."""
    words = shlex.split(text, comments=True)
    words = words[next(i for i, word in enumerate(words) if "=" not in word) :]  # VARIABLE=value
    program = Path(words[0]).name
    if program.startswith("python"):
        assert words[1] == "-m", text
        check_module(words[2], words[3:])
    elif program in ("!git", "cd"):  # of a notebook
        assert len(words) == 2 or (words[1] == "clone" and len(words) == 4), text
    elif program == "pip":
        assert words[1] == "install"
        for word in words[2:]:
            extras = re.fullmatch(r"\.\[([\w,]+)\]", word)
            for extra in extras[1].split(",") if extras else ():
                assert extra in PROJECT["optional-dependencies"], extra
            assert extras or word == "-e" or "==" in word, text
    elif "/" in words[0]:
        assert (ROOT / words[0]).is_file(), words[0]
    else:
        assert TOOLS.get(program) in PROJECT["optional-dependencies"], f"{program}: from where?"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Files and headings of this repository; addresses elsewhere are not asked."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}"
    for path in re.findall(
        r"`((?:spectral_kernels|reference|tests|perf|\.ci)/[\w./]+)`", page.read_text()
    ):
        if not re.search(r"[A-Z]{3}", Path(path).stem) or (ROOT / path).exists():  # STEM, NAME
            assert (ROOT / path.rstrip("/")).exists(), f"{page.name}: {path}"


def test_the_tree_is_the_tree():
    text = (ROOT / "README.md").read_text()
    tree = next(b for b in re.findall(r"```text\n(.*?)```", text, re.DOTALL) if "tests/" in b)
    folders = {}
    for line in tree.splitlines():
        folder, *rest = line.split()
        folders[folder.rstrip("/")] = rest
    there = {path.parent.name for path in ROOT.glob("*/*.py")} - {"build"}
    assert set(folders) == there
    for folder in ("spectral_kernels", "perf"):
        public = {
            path.name for path in (ROOT / folder).glob("*.py")
            if not path.name.startswith(("_", "test_", "conftest"))
        }  # fmt: skip
        listed = {name for name in folders[folder] if name.endswith(".py")}
        assert listed == public, f"{folder}: {sorted(listed ^ public)}"
        for name in set(folders[folder]) - listed:
            assert (ROOT / folder / name).is_dir(), name


def test_the_map_has_every_public_name():
    text = (ROOT / "spectral_kernels" / "README.md").read_text()
    missing = [name for name in spectral_kernels.__all__ if not re.search(rf"`{name}\b", text)]
    assert not missing


def test_the_readme_is_short_and_has_no_history():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= MAX_README
    assert not re.search(r"\b(?=\w*\d)(?=\w*[a-f])[0-9a-f]{7,40}\b", text), "a commit hash"


def test_the_readme_states_the_presets_and_requirements():
    """Its figures that are no measurements are those of the code."""
    from spectral_kernels.calibrate import PRESETS

    text = (ROOT / "README.md").read_text()
    for name, preset in PRESETS.items():
        exact = preset.sinks + preset.window
        sizes = (1 / (1 / preset.ratio + exact / tokens) for tokens in (4096, 32768, 131072))
        cells = [f"{preset.ratio:g}", *(f"{size:.2f}" for size in sizes)]
        assert f"| `{name}` | {' | '.join(cells)} |" in text
        assert f"first {preset.sinks} tokens and the newest {preset.window} stay exact" in text
    ratios = [preset.ratio for preset in PRESETS.values()]
    assert f"{min(ratios):g} to {max(ratios):g}" in text
    needed = " ".join([PROJECT["requires-python"], *PROJECT["dependencies"]])
    needed += " ".join(PROJECT["optional-dependencies"]["hf"])
    for name in ("Python", "torch", "triton", "transformers"):
        least = re.search(rf"{name} (\d+\.\d+)", text)[1]
        wanted = least if name == "Python" else f"{name.lower()}>={least}"
        assert wanted in needed, f"{name} {least}"


@pytest.mark.parametrize(
    "page", ["README.md", "CHANGELOG.md", "spectral_kernels/hf.py", "spectral_kernels/vllm.py"]
)
def test_releases_are_those_that_the_extras_take(page):
    """The first and the last one."""
    extras = PROJECT["optional-dependencies"]["hf"] + PROJECT["optional-dependencies"]["vllm"]
    text = " ".join((ROOT / page).read_text().split())
    found = re.findall(r"(transformers|vLLM) (\d+\.\d+) (?:to|and|or) (\d+)\.(\d+)", text)
    assert found
    for name, first, major, minor in found:
        assert f"{name.lower()}>={first},<{major}.{int(minor) + 1}" in extras, (name, first)


def test_the_readme_words_say_what_the_rows_say():
    """Figures in its sentences; those of its tables are written by perf.tables."""
    from perf import _cases, tables
    from spectral_kernels.calibrate import PRESETS

    text, preset = " ".join((ROOT / "README.md").read_text().split()), PRESETS["balanced"]
    plugin = (ROOT / "spectral_kernels" / "vllm.py").read_text()
    kept = (1 + int(re.search(r"^KEPT = (\d+)", plugin, re.MULTILINE)[1])) * preset.sinks
    _, _, layers, _, kv_heads, dim, _ = _cases.SHAPES["8b"]
    size = (preset.window + kept) * 4 * layers * kv_heads * dim / 1e6
    wanted = [f"requests, {size:.0f} MB each for an 8B model"]
    asked, lost = [row for row in tables.newest("quality") if "score" in row], {}
    for cell in (("multikey", 8192), ("multiquery", 4096), ("multiquery", 8192)):
        rows = [row for row in asked if (row["task"], row["context"]) == cell]
        right = {row["scheme"]: 100 * row["score"] for row in rows}
        less = (f"{right['dense'] - right[name]:.0f}" for name in ("quality", "balanced"))
        lost[cell] = (f"{right['dense']:.0f}", *less)
    right, *less = lost["multikey", 8192]
    count = f"{right} right ones `quality` loses {less[0]}, `balanced` {less[1]}"
    wanted.append(f"asked for one of 24 keys in 8,192 tokens, of {count}; four at once, of ")
    for context in (4096, 8192):
        right, *less = lost["multiquery", context]
        wanted.append(f"of {right} in {context:,} tokens {less[0]} and {less[1]}")
    head = re.search(r"\| (\S+), ([\d,]+) tokens, mean of (\d+) texts", text)
    of_cpu = {
        row["text"] for row in tables.newest("quality")
        if (row["model"], f"{row['context']:,}") == head.groups()[:2]
        and row["scheme"] in PRESETS and "kl" in row and row["torch"].endswith("+cpu")
    }  # fmt: skip
    wanted += [f"but for {len(of_cpu)} of the {head[3]} texts: of a CPU"] if of_cpu else []
    steps = [x for x in tables.newest("end_to_end") if x["B"] == 1 and not x.get("gpus")]
    even = []
    for kind in (" compiled", ""):
        lines = []
        for name in ((f"graph{kind}", None), (f"ours{kind}", "balanced")):
            own = {row["T"]: row for row in steps if (row["what"], row["preset"]) == name}
            lines.append(tables.fit_line(own))
        even.append(float(tables.break_even(*lines).replace(",", "")) / 1e3)
    wanted.append(f"{even[0]:.0f} thousand with `compile=True`, {even[1]:.0f} without")
    for sentence in wanted:
        assert sentence in text
