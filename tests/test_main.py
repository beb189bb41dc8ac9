"""The command line: what fits, by the configuration alone; errors in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache

from spectral_kernels import __main__ as command
from spectral_kernels import calibrate
from spectral_kernels.hf import CACHE, enable
from tests.families import build
from tests.test_hf import codec, feed, prompt, single_thread, tiny

__all__ = ["codec", "single_thread"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration without weights."""
    where = tmp_path_factory.mktemp("model")
    tiny().config.save_pretrained(where)
    return where


def table(out: str) -> dict[str, list[str]]:
    """Cells of the rows of numbers, by their first words."""
    rows = [line.split() for line in out.splitlines()]
    return {row[0]: row[1:] for row in rows if row}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GB", 16 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("24 g", 24 * 10**9),
        ("512MiB", 2**29),
        ("7", 7),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert command.parse_bytes(text) == size


def test_bytes_are_those_of_caches(codec: Any) -> None:
    """Dense to the byte; a preset's pages and exact tokens, in 16 bits, at most as said."""
    for model in (tiny(), build("gemma3").to(tiny().device)):
        model, ids = model.to(torch.bfloat16), prompt(200)["input_ids"]
        sizes, dense = command.cache_sizes(model.config), DynamicCache(config=model.config)
        with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
            model(ids, **{CACHE: dense})
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers)
        # transformers keeps one token less of a window than it says
        windows = sum(2 * 2 * 64 * 2 for layer in dense.layers if layer.is_sliding)
        assert sizes["dense"](200) == 2 * sizes["fp8"](200) == kept + windows
    model, codec = tiny(), replace(codec, window=calibrate.WINDOW)
    with enable(model, codec=codec):
        _, cache = feed(model, prompt(640), [640])
    part = cache.spectral
    used = 10 * sum(x[0].nbytes for x in (*part.k_pages, *part.v_pages))
    exact = sum(x.nbytes for x in (*part.k_exact, *part.v_exact)) / 2  # float32 here
    said = command.cache_sizes(model.config)
    assert said["small"](640) < used + exact <= said["balanced"](640)


def test_what_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(folder), "--gpu-memory", "100MB", "--batch", "2"]
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    weights = sum(x.numel() for x in tiny().parameters()) * 2  # it names no dtype: bf16
    counts = [int(cell.replace(",", "")) for cell in out.splitlines()[-1].split()]
    sizes = command.cache_sizes(tiny().config)
    assert f"less {command.show_bytes(weights)} of weights" in out
    for count, size in zip(counts, sizes.values(), strict=True):
        assert count % 64 == 0
        assert 2 * size(count) <= 100_000_000 - weights < 2 * size(count + 64)
    assert table(out)["tokens"] == ["dense", "fp8", *calibrate.PRESETS]
    # 2 rows, 2 layers, K and V, 2 heads, 64 dimensions, 2 bytes
    assert table(out)["1,024"][:2] == ["2.1", "MB"]


def test_nothing_is_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["config.json"]
    assert command.main(["--model", str(folder)]) == 0
    assert "1,024" in capsys.readouterr().out


def test_calibrate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(calibrate, "main", lambda argv: given.append(argv) or 0)
    assert command.main(["--model", str(folder), "--calibrate", "--tokens", "600"]) == 0
    assert command.main(["--model", str(folder), "--calibrate", "--preset", "small"]) == 0
    model = ["--model", str(folder)]
    assert given == [
        [*model, "--preset", *calibrate.PRESETS, "--tokens", "600"],
        [*model, "--preset", "small"],
    ]


WRONG: dict[str, tuple[list[str], str]] = {
    "batch": (["--batch", "0"], "--batch: expected at least 1, got 0"),
    "unknown": (["--fast"], "expected no other arguments, got --fast"),
    "nowhere": (["--model", "/nowhere/at/all"], "nowhere"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_errors_in_one_line(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = WRONG[case]
    assert command.main(["--model", str(folder), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("mistral, windows", {}, "it stays dense"),
        ("gemma2", {}, "it stays dense"),
        ("llama", {"head_dim": 72}, "head_dim: expected one of [64, 80, 96, 128, 256], got 72"),
        ("llama", {"is_encoder_decoder": True}, "decoder-only"),
    ],
)
def test_a_model_that_enable_refuses(
    family: str, changes: dict[str, Any], said: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """By its configuration: nothing is said to fit."""
    config = build(family).config
    config.update(changes)
    config.save_pretrained(tmp_path)
    assert command.main(["--model", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and len(err.splitlines()) == 1


def test_a_size_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--model", str(tmp_path), "--gpu-memory", "much"])
    assert "expected a size like 16GB" in capsys.readouterr().err
