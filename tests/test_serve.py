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
    long, short = serve.prompt(3, 200, 512), serve.prompt(3, 50, 512)
    assert long["prompt_token_ids"][:50] == short["prompt_token_ids"]
    assert serve.prompt(0, 50, 512) != serve.prompt(1, 50, 512)


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
        row={}, time=lambda *_: {"B": 1, "T": 512}, lengths_that_fit=lambda _: [300, 900]
    )
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


class Engine:
    """A step a second; in step n the first n prompts have tokens."""

    most = 1000  # steps until one has all its tokens

    def __init__(self) -> None:
        self.prompts: dict[str, list[int]] = {}
        self.aborted: list[str] = []
        self.steps = 0

    def add_request(self, name: str, prompt: dict[str, list[int]], sampling: Any) -> None:
        assert sampling >= serve.MANY + len(self.prompts), "none ends while others are timed"
        assert name not in self.prompts
        self.prompts[name] = prompt["prompt_token_ids"]

    def step(self) -> list[SimpleNamespace]:
        self.steps += 1
        live = [x for x in self.prompts if x not in self.aborted][: self.steps]
        tokens = SimpleNamespace(token_ids=[1] * self.steps)
        ended = self.steps >= self.most
        return [SimpleNamespace(request_id=x, outputs=[tokens], finished=ended) for x in live]

    def abort_request(self, names: list[str]) -> None:
        self.aborted, self.steps = [*self.aborted, *names], 0


def test_steps_are_timed_once_all_prompts_decode(monkeypatch):
    engine = Engine()
    monkeypatch.setattr(serve.time, "perf_counter", lambda: float(engine.steps))
    served = object.__new__(serve.Served)
    served.llm, served.asked, served.vocabulary = SimpleNamespace(llm_engine=engine), 0, 512
    served.sampling, served.kv_tokens = (lambda max_tokens: max_tokens), 4000
    row = served.time([40, 60, 80], 64)
    assert row == {"B": 3, "T": 60, "ttft_ms": 3e3, "tpot_ms": 1e3, "throughput": 3}
    assert served.time([50], 64)["ttft_ms"] == 1e3
    assert [len(x) for x in engine.prompts.values()] == [40, 60, 80, 50]
    assert {*engine.aborted} == {*engine.prompts}, "none is left over"
    assert len({tuple(x[:8]) for x in engine.prompts.values()}) == 4, "a prefix would be found"
    monkeypatch.setattr(serve, "PATIENCE", 0.5)
    with pytest.raises(TimeoutError, match="1 of 2 prompts"):
        served.time([50, 50], 64)
    monkeypatch.undo()
    monkeypatch.setattr(Engine, "most", 20)
    with pytest.raises(RuntimeError, match="2 prompts: some ended"):
        served.time([50, 50], 64)
    args = argparse.Namespace(lengths=[300, 900], seqs=40, chunk=64)
    lengths = served.lengths_that_fit(args)
    assert lengths == [300, 900, 300, 900]
    needed = sum(lengths) + (sum(lengths) // 64 + serve.MANY) * len(lengths)
    assert needed <= served.kv_tokens
    assert served.lengths_that_fit(argparse.Namespace(lengths=[300], seqs=2, chunk=64)) == [300] * 2


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
