"""Models that Unsloth loaded: its gate with stand-ins, and Unsloth itself where it is installed.

Unsloth runs in a process of its own, as it changes transformers' classes for good; without a GPU,
with the names of torch.cuda that its import asks for.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers.models.llama import modeling_llama  # noqa: E402

from spectral_kernels.codec import ModelCodec  # noqa: E402
from spectral_kernels.hf import CACHE, ModelCache, enable  # noqa: E402
from tests.test_hf import codec, generate, prompt, single_thread, state, tiny  # noqa: E402

__all__ = ["codec", "single_thread"]
ROOT = Path(__file__).resolve().parents[1]
FAST: list[str] = []  # what fast paths of the stand-in ran


def fast_class(cls: type[torch.nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a class of transformers a fast forward as Unsloth does, which no cache of ours sees."""
    original = cls.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "_unsloth_fast_path", False):
            FAST.append(cls.__name__)
            kwargs = {**kwargs, CACHE: None, "use_cache": False}
        return original(self, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", forward)


class FastRotary(modeling_llama.LlamaRotaryEmbedding):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        FAST.append("rotary")
        return super().forward(*args, **kwargs)


def gated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny model as Unsloth 2026.10.9 leaves one."""
    FAST.clear()
    model = tiny("llama")
    record = ({"LlamaRotaryEmbedding": modeling_llama.LlamaRotaryEmbedding}, {})
    monkeypatch.setattr(modeling_llama, "_unsloth_pre_patch_originals", record, raising=False)
    for cls in (modeling_llama.LlamaAttention, modeling_llama.LlamaModel):
        fast_class(cls, monkeypatch)
    model.model.rotary_emb = FastRotary(config=model.config).to(model.device)
    for module in model.modules():
        module._unsloth_fast_path = True
    model._old_generate = model.generate

    def unsloth_fast_generate(*args: Any, **kwargs: Any) -> Any:
        FAST.append("generate")
        return model._old_generate(*args, **kwargs)

    model.generate = unsloth_fast_generate
    return model


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_the_gate_is_closed_for_the_time_of_a_call(
    preset: str, codec: ModelCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, inputs = tiny("llama"), prompt(60, rows=2, padding=(9, 0))
    anonymous = ModelCodec(codec.layers, codec.sinks, codec.window)
    with enable(plain, preset, codec=anonymous):
        expected = generate(plain, inputs)
    model = gated(monkeypatch)
    before = state(model)
    with enable(model, preset, codec=anonymous) as handle:
        assert FAST == []
        out = generate(model, inputs, return_dict_in_generate=True)
        assert isinstance(out[CACHE], ModelCache) and torch.equal(out.sequences, expected)
        with torch.no_grad():
            model(**inputs, **{CACHE: handle.new_cache()})
        assert FAST == [] and all(module._unsloth_fast_path for module in model.modules())
        with torch.no_grad():  # as in training
            model(**inputs, use_cache=False)
        assert {"rotary", "LlamaModel", "LlamaAttention"} <= set(FAST)
    assert state(model) == before and isinstance(model.model.rotary_emb, FastRotary)


def test_a_fast_path_that_stays_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the gate, and where a part of a model is fast again: no wrong tokens in silence."""
    model = gated(monkeypatch)
    with enable(model, "exact") as handle, torch.no_grad():
        attention = model.model.layers[1].self_attn
        monkeypatch.setattr(attention, "forward", lambda *_, **__: (torch.zeros(1, 60, 256), None))
        with pytest.raises(RuntimeError, match="something replaces this model's attention"):
            model(**prompt(60), **{CACHE: handle.new_cache()})
    monkeypatch.undo()
    old = tiny("llama")
    monkeypatch.setattr(modeling_llama.LlamaModel.forward, "__module__", "unsloth.models.llama")
    with pytest.raises(NotImplementedError, match=r"Unsloth 2026\.10\.9 or newer"):
        enable(old, "exact")


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="no Unsloth")
def test_unsloth_itself(tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "perf" / "tiny_model")
    tiny("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_unsloth", str(tmp_path)], cwd=ROOT, text=True,
        capture_output=True, timeout=300,
        env={**os.environ, "UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_COMPILE_DISABLE": "1",
             "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "compiled"), "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("restored\n"), done.stderr[-3000:]


def spoof() -> None:
    """What Unsloth asks of torch.cuda while it is imported."""

    class Device(nullcontext[None]):
        idx = 0

        def __init__(self, index: Any = 0) -> None:
            super().__init__()

    card = SimpleNamespace(
        name="none", total_memory=8 << 30, major=8, minor=0, multi_processor_count=8
    )
    cuda: Any = torch.cuda
    cuda.device, cuda.device_count, cuda.current_device = Device, lambda: 1, lambda: 0
    cuda.get_device_capability, cuda.get_device_properties = lambda *_: (8, 0), lambda *_: card
    cuda.get_device_name = lambda *_: card.name
    cuda.mem_get_info = cuda.memory.mem_get_info = lambda *_: (8 << 30, 8 << 30)
    torch._C._cuda_getCurrentRawStream = lambda _: 0  # type: ignore[attr-defined]


def main(folder: str) -> None:
    """In a process: a model, with LoRA and without, gives the tokens of a plain one."""
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain.eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        spoof()
    import unsloth.models.llama

    if device == "cpu":
        unsloth.models.llama.get_current_device = lambda: "cpu"
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        folder, max_seq_length=1024, load_in_4bit=False, dtype=torch.float32, device_map=device,
        use_gradient_checkpointing=False,
    )  # fmt: skip
    unsloth.FastLanguageModel.for_inference(model)
    inputs = {key: x.to(device) for key, x in prompt(60, rows=2, padding=(9, 0)).items()}
    expected, before = generate(plain.to(device), inputs), state(model)
    with enable(model, "exact"):
        out = generate(model, inputs, return_dict_in_generate=True)
    assert isinstance(out[CACHE], ModelCache) and torch.equal(out.sequences, expected)
    assert state(model) == before
    lora = unsloth.FastLanguageModel.get_peft_model(
        model, r=4, target_modules=["q_proj", "v_proj"], use_gradient_checkpointing=False
    )
    unsloth.FastLanguageModel.for_inference(lora)
    for name, module in lora.named_modules():
        if hasattr(module, "lora_B"):
            weight = module.lora_B["default"].weight
            torch.nn.init.normal_(weight, std=0.05)
            more = module.scaling["default"] * (weight @ module.lora_A["default"].weight)
            plain.get_submodule(name.removeprefix("base_model.model.")).weight.data += more
    with enable(lora.get_base_model(), "exact"):
        out = generate(lora, inputs, return_dict_in_generate=True)
    assert isinstance(out[CACHE], ModelCache) and not torch.equal(out.sequences, expected)
    assert torch.equal(out.sequences, generate(plain, inputs))
    print("restored")


if __name__ == "__main__":
    main(*sys.argv[1:])
