"""The main job: what it prints, measures and refuses. With tiny random models, mostly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from perf import generate as job
from spectral_kernels import calibrate
from tests.test_hf import VOCAB, prompt, single_thread, tiny  # noqa: F401

WORDS = VOCAB - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer of the words w0, w1, ..., and ? for others."""
    where = tmp_path_factory.mktemp("model")
    tiny().cpu().save_pretrained(where)
    words = Tokenizer(
        models.WordLevel({f"w{i}": i for i in range(WORDS)} | {"?": WORDS}, unk_token="?")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codec") / "small.safetensors"
    ids = prompt(400)["input_ids"].cpu()
    calibrate.calibrate(tiny().cpu(), ids, "small", progress=False).save(path)
    return path


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text(" ".join(f"w{(7 * i * i + 3) % WORDS}" for i in range(900)))
    return path


def run(*arguments: Any) -> int:
    return job.main([*map(str, arguments), "--dtype", "float32", "--device", "cpu"])


def cells(line: str) -> list[float]:
    return [float(cell) for cell in line[16:].split()]


def test_exact_beside_dense(
    folder: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", folder, "--prompt-file", prompt_file, "--preset", "exact", "--compare")
    assert run(*arguments, "--max-new-tokens", 12) == 0
    out = capsys.readouterr().out
    texts = {
        line.split(": ")[0]: line.split(": ")[1]
        for line in out.splitlines()
        if line.startswith(("exact: ", "dense: "))
    }
    assert texts["exact"] == texts["dense"] and len(texts["exact"].split()) == 12
    assert "same tokens     12 of 12 (100.0%), no difference" in out
    table = {line[:16].strip(): line for line in out.splitlines()}
    dense, exact = cells(table["cache, MB"])
    # 2 layers, K and V, 2 heads, 64 dimensions, float32, 911 tokens; "exact" has room for 1,024.
    assert dense == pytest.approx(2 * 2 * 2 * 64 * 4 * 911 / 1e6, abs=5e-4)
    assert dense <= exact <= 1.3 * dense
    assert all(
        rate > 0 for name in ("prompt tokens/s", "new tokens/s") for rate in cells(table[name])
    )


def test_lossy_cache_is_reported_smaller(
    folder: Path, codec: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", folder, "--codec", codec, "--prompt-file", prompt_file, "--compare")
    assert run(*arguments, "--preset", "small", "--max-new-tokens", 3) == 0
    out = capsys.readouterr().out
    ratio = next(
        float(line.split()[3]) for line in out.splitlines() if line.startswith("dense cache is")
    )
    assert ratio > 2
    assert "prompt (900 tokens)" in out


def test_alone_prints_no_dense_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", folder, "--preset", "exact", "--prompt", "w1 w2 w3 w4")
    assert run(*arguments, "--max-new-tokens", 1) == 0
    out = capsys.readouterr().out
    assert "prompt (4 tokens): ...w1 w2 w3 w4\n" in out
    assert "dense" not in out and "same tokens" not in out


def test_rates(folder: Path) -> None:
    model, tokenizer = job.load(str(folder), device="cpu", dtype="float32")
    ids = torch.tensor([[5, 6, 7]])
    result = job.generate(model, tokenizer, ids, label="x", max_new_tokens=4)
    assert len(result.tokens) == 4 and result.prompt_rate > 0 and result.rate > 0
    one = job.generate(model, tokenizer, ids, label="x", max_new_tokens=1)
    assert math.isnan(one.rate)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ([1, 2, 3], [1, 2, 3], "3 of 3 (100.0%), no difference"),
        ([1, 2, 3], [1, 9, 3], "2 of 3 (66.7%), first difference at new token 2"),
        ([1, 2, 3], [1, 2], "2 of 3 (66.7%), first difference at new token 3"),
        ([4], [1, 2], "0 of 2 (0.0%), first difference at new token 1"),
    ],
)
def test_agreement(a: list[int], b: list[int], words: str) -> None:
    runs = {"dense": job.Run(a, "", 10, 1.0, 1.0), "small": job.Run(b, "", 4, 1.0, 1.0)}
    assert f"same tokens     {words}\n" in job.report(runs)
    assert job.report(runs).endswith("dense cache is  2.50 times as large")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "FOLDER"), "--prompt or --prompt-file is needed"),
        (("--model", "FOLDER", "--prompt", ""), "prompt is empty"),
        (("--model", "FOLDER", "--prompt", "w1", "--preset", "fast"), "--preset"),
        (("--model", "FOLDER", "--prompt", "w1", "--max-new-tokens", "0"), "at least 1"),
        (("--model", "FOLDER", "--prompt-file", "/nowhere/at/all"), "/nowhere/at/all"),
        (("--model", "FOLDER", "--prompt", "w1", "--codec", "/nowhere/at/all"), "nowhere"),
        (("--model", "/nowhere/at/all", "--prompt", "w1"), "nowhere"),
        (("--gguf", "/nowhere/at/all.gguf", "--prompt", "w1"), "No such file"),
        (("--gguf", "a", "--model", "b", "--prompt", "w1"), "not allowed with"),
    ],
)
def test_wrong_arguments_are_named(
    folder: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*(str(folder) if argument == "FOLDER" else argument for argument in arguments))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_default_run_recalls_the_hidden_fact(
    preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the codec that the embedded model ships."""
    assert run("--preset", preset, "--max-new-tokens", 2) == 0
    out = capsys.readouterr().out
    lines = dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
    assert lines[preset].split()[0] == lines["expected first"]
