"""A model in parts: layers on several devices, weights offloaded, heads split over processes,
adapters of PEFT. As far as a machine without GPUs has them; two GPUs are used where there are."""

from __future__ import annotations

import copy
import functools
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM  # noqa: E402

from spectral_kernels import _model, calibrate  # noqa: E402
from spectral_kernels.codec import ModelCodec  # noqa: E402
from spectral_kernels.hf import CACHE, enable  # noqa: E402
from tests import cases  # noqa: E402
from tests.test_hf import (  # noqa: E402
    VERSION,
    codec,
    feed,
    generate,
    prompt,
    single_thread,
    state,
    tiny,
)  # fmt: skip

__all__ = ["codec", "single_thread"]
on_cpu = pytest.mark.skipif(cases.DEVICE.type == "cuda", reason="processes and devices of a CPU")


# ---- several devices -----------------------------------------------------------------------------


@on_cpu
@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_a_state_for_each_device(
    preset: str, codec: ModelCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of two devices that are the same memory: whatever one state knows, the other does."""
    model, inputs = tiny(), prompt(600, rows=2, padding=(20, 0))
    with enable(model, preset, codec=codec) as handle:
        expected, one = feed(model, inputs, [500, 20, 1, 1, 78], handle.new_cache(2, 510))
        tokens = generate(model, inputs, num_beams=2)
    devices = iter([torch.device("cpu:0"), torch.device("cpu")])
    with monkeypatch.context() as patch:
        patch.setattr(_model, "_device_of", lambda module: next(devices))
        handle = enable(model, preset, codec=codec)
    with handle:
        assert handle.members == [[0], [1]]
        assert not handle.new_cache().is_compileable  # generate() asks before the prompt
        logits, cache = feed(model, inputs, [500, 20, 1, 1, 78], handle.new_cache(2, 510))
        assert torch.equal(logits, expected)
        assert [len(part.k_pages) for part in cache.parts] == [1, 1] and cache.capacity == 1024
        assert cache.nbytes > one.nbytes
        for cropped in (copy.deepcopy(cache), cache):
            cropped.crop(-10)
            for part in cropped.parts:
                assert part.lengths == part.seq_lens.tolist() == [570, 590]
        assert torch.equal(generate(model, inputs, num_beams=2), tokens)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(codec: ModelCodec) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs = tiny(), prompt(300, rows=2, padding=(20, 0))
    expected = dict.fromkeys(("exact", "balanced"))
    for preset in expected:
        with enable(model, preset, codec=codec):
            expected[preset] = generate(model, inputs)
    places = {"model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    parts = {"model.embed_tokens": 0, "model.rotary_emb": 0, **places}
    split = accelerate.dispatch_model(model, parts)
    for preset, tokens in expected.items():
        with pytest.warns(UserWarning, match="no CUDA graph with 2 devices"):
            handle = enable(split, preset, codec=codec)
        with handle:
            out = generate(split, inputs, return_dict_in_generate=True)
        assert [part.device.index for part in out[CACHE].parts] == [0, 1]
        assert torch.equal(out.sequences, tokens)


@on_cpu
def test_weights_that_accelerate_keeps_on_disk(codec: ModelCodec, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs = tiny(), prompt(100, rows=2, padding=(20, 0))
    with enable(model, codec=codec):
        expected = generate(model, inputs)
    anonymous = ModelCodec(codec.layers, codec.sinks, codec.window)  # weights are read on use
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu")
    parts = {**places, "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    model = accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=tmp_path)
    assert model.model.layers[1].self_attn.k_proj.weight.is_meta
    with enable(model, codec=anonymous):
        assert torch.equal(generate(model, inputs), expected)


# ---- PEFT ----------------------------------------------------------------------------------------


def test_lora(codec: ModelCodec) -> None:
    """Adapters lie in the model: it is enabled, and generates through PEFT's wrapper or itself."""
    peft = pytest.importorskip("peft")
    model, inputs = tiny(), prompt(60, rows=2, padding=(9, 0))
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(2)
    base = generate(model, inputs)
    wrapped = peft.get_peft_model(model, config).eval()
    dense = generate(wrapped, inputs)
    before = state(wrapped.get_base_model())
    with pytest.raises(TypeError, match=r"got PeftModelForCausalLM; pass its get_base_model\(\)"):
        enable(wrapped, "exact")
    with enable(wrapped.get_base_model(), "exact") as handle:
        out = generate(wrapped, inputs, return_dict_in_generate=True)
        assert out[CACHE].owner() is handle
        assert torch.equal(out.sequences, dense)
        weights = _model.weights_of(wrapped)
        with wrapped.disable_adapter():
            assert torch.equal(generate(wrapped, inputs), base)
            assert _model.weights_of(wrapped) != weights  # so that no captured step is replayed
        assert _model.weights_of(wrapped) == weights
        assert torch.equal(generate(wrapped.get_base_model(), inputs), dense)
        wrapped.train()
        wrapped(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        assert any(x.grad is not None for n, x in wrapped.named_parameters() if "lora" in n)
        wrapped.eval()
    assert state(wrapped.get_base_model()) == before
    assert torch.equal(generate(wrapped, inputs), dense)


# ---- tensor parallelism --------------------------------------------------------------------------


def worker(folder: str, path: str) -> None:
    """What each of two processes does; rank 0 prints."""
    torch.set_num_threads(1)
    on_gpus = cases.DEVICE.type == "cuda"
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpus else "gloo")
    model = AutoModelForCausalLM.from_pretrained(
        folder, tp_plan="auto", attn_implementation="sdpa"
    ).eval()
    inputs = {key: x.to(model.device) for key, x in prompt(100, rows=2, padding=(20, 0)).items()}
    rank, dense = torch.distributed.get_rank(), generate(model, inputs)
    say = functools.partial(print, f"rank {rank}:", file=sys.stderr, flush=True)
    say("dense")
    with enable(model, "exact"):
        out = generate(model, inputs, return_dict_in_generate=True)
    assert out[CACHE].spectral.k_exact[0].shape[1] == 1  # of two KV heads
    assert torch.equal(out.sequences, dense)
    say("exact, replayed:", out[CACHE].graph is not None)
    with enable(model, codec=path) as handle:  # whose fingerprint is the whole model's
        assert handle.links[0].layer.shard == (rank, 2)
        coded = generate(model, inputs)
    say("balanced")
    os.environ["XDG_CACHE_HOME"] = folder  # where no codec is
    with pytest.raises(ValueError, match="made before the model was sharded"):
        enable(model, "small")
    if rank == 0:
        print("tokens", dense.tolist(), coded.tolist(), flush=True)
    del out  # with the graph that it holds: NCCL waits for its graphs to be gone
    gc.collect()
    say("done")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="a GPU for each of two ranks")
@pytest.mark.skipif(VERSION < (5, 17), reason="shards by DTensor since")
def test_each_rank_has_its_own_heads(codec: ModelCodec, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, inputs = tiny(), prompt(100, rows=2, padding=(20, 0))
    model.save_pretrained(tmp_path / "model")
    codec.save(tmp_path / "codec.safetensors")
    with enable(model, codec=codec):
        expected = generate(model, inputs)
    root = Path(__file__).resolve().parents[1]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    places = [str(tmp_path / "model"), str(tmp_path / "codec.safetensors")]
    path = f"{root}:{os.environ.get('PYTHONPATH', '')}"
    try:
        done = subprocess.run(
            [sys.executable, *launch, "-m", "tests.test_parallel", *places],
            cwd=root, capture_output=True, text=True, timeout=120,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"two ranks did not end: {str(error.stderr)[-3000:]}")
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("tokens"))
    assert line == f"tokens {generate(model, inputs).tolist()} {expected.tolist()}"


def test_heads_are_cut_out_of_a_codec(codec: ModelCodec) -> None:
    whole, cpu = codec.layers[0], torch.device("cpu")
    parts = [_model.Layer(0, (), 1, 2, 64, cpu, (rank, 2)).codec(whole) for rank in range(2)]
    for name in ("k_basis", "k_mean", "v_encoder"):
        joined = torch.cat([getattr(part, name) for part in parts], dim=1)
        assert torch.equal(joined, getattr(whole, name))
    assert parts[0].kv_heads == 1 and torch.equal(parts[0].freqs, whole.freqs)
    assert calibrate.fingerprint(tiny()) == codec.fingerprint


if __name__ == "__main__":
    worker(*sys.argv[1:])
