"""perf.serve without vLLM: what it asks for, and what it says of what it gets."""

from __future__ import annotations

import argparse
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perf import serve
from spectral_kernels.codec import ModelCodec
from tests import serving

ARGS = argparse.Namespace(cells=[(1, 512), (8, 256)], lengths=[300, 900], full=True, seqs=40)


def test_what_an_engine_is_asked_for():
    assert serve.sizes(ARGS) == [1, 2, 4, 8, 16, 32, 40]
    assert serve.longest(ARGS) >= 900 + serve.MANY
    assert serve.cell("8x32768") == (8, 32768)
    (long,), (short,) = serve.prompts(1, 200, 512, first=3), serve.prompts(1, 50, 512, first=3)
    assert long["prompt_token_ids"][:50] == short["prompt_token_ids"]
    assert serve.prompts(2, 50, 512)[0] != serve.prompts(2, 50, 512)[1]


def test_model_and_codec_are_of_one_shape(tmp_path: Path):
    pytest.importorskip("transformers")
    given = serve.parse(serving.make_model(tmp_path / "model"))
    config = json.loads((given.model / "config.json").read_text())
    serve.make_codec("check", "balanced", tmp_path / "balanced.safetensors")
    for path in (given.codec, tmp_path / "balanced.safetensors"):
        codec = ModelCodec.load(path)
        assert len(codec.layers) == config["num_hidden_layers"]
        assert {x.kv_heads for x in codec.layers} == {config["num_key_value_heads"]}
        assert {x.layout.head_dim for x in codec.layers} == {config["head_dim"]}


def test_engines_side_by_side_are_timed_in_turn(tmp_path: Path, monkeypatch):
    """The second once the first has ended, which is not timed before both are up."""
    served = argparse.Namespace(
        row={}, vocabulary=512, seconds=lambda *_: None, time=lambda *_: {"B": 1, "T": 512},
        llm=argparse.Namespace(reset_prefix_cache=lambda: None),
    )  # fmt: skip
    monkeypatch.setattr(serve, "Served", lambda *_: served)
    backends = ["FLASH_ATTN:fp8", "SPECTRAL:balanced"]
    given = vars(ARGS) | {"backends": backends, "kv_gb": [2, 1], "full": False, "chunk": 64}
    args = argparse.Namespace(**given, json=None)

    def start(backend: str) -> threading.Thread:
        thread = threading.Thread(target=serve.run_one, args=(args, backend, tmp_path))
        thread.start()
        thread.join(0.5)
        return thread

    second = start(backends[1])
    assert second.is_alive()
    first = start(backends[0])
    first.join(2)
    assert not first.is_alive(), "both are up"
    second.join(0.5)
    assert second.is_alive(), "the first has not ended"
    (tmp_path / "FLASH_ATTN-fp8.ended").touch()
    second.join(2)
    assert not second.is_alive()
    assert len((tmp_path / "SPECTRAL-balanced.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(("lead", "code"), [(0.01, 0), (1.0, 1)])
def test_check_tells_a_tie_from_a_defect(lead, code, capsys):
    """A token that was nearly a tie may be missed, one that led may not."""
    tokens = [[[5, 6, 7]], [[5, 6, 7]]]
    rows: list[dict[str, Any]] = [
        {
            "backend": name,
            "kv_dtype": kind,
            "tokens": tokens,
            "leads": [[2.0, lead, 2.0]],
            "preempted": 2,
        }
        for name, kind in (
            ("FLASH_ATTN", "bfloat16"),
            ("SPECTRAL", "exact"),
            ("SPECTRAL", "8 bits"),
        )
    ]
    assert serving.report(rows) == 0
    assert serving.report([*rows[:2], {**rows[2], "preempted": 0}]) == 1
    rows[1] = {**rows[1], "tokens": [[[5, 9, 9]], [[5, 6, 7]]]}
    assert serving.report(rows) == code
    assert serving.report(rows[:2]) == 1, "a backend is missing"
    assert "same tokens [1]" in capsys.readouterr().out


def test_nobody_waits_for_a_backend_without_a_codec(tmp_path, monkeypatch):
    """Engines side by side wait for signs of each other, also of one that never started."""

    def fails(*_):
        raise OSError("no room")

    monkeypatch.setattr(serve, "make_codec", fails)
    args = SimpleNamespace(backends=["SPECTRAL:balanced"], codec=None, shape="check")
    with pytest.raises(OSError, match="no room"):
        serve.run_backend(args, [], tmp_path, {}, "SPECTRAL:balanced")
    signs = {path.name for path in tmp_path.iterdir()}
    assert {"SPECTRAL-balanced.up", "SPECTRAL-balanced.ended"} <= signs
