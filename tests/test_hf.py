"""The Hugging Face adapter against the dense model: same tokens, same logits, nothing left behind.

Logits are compared with a float64 copy of the dense model whose RoPE angles are float64 too (transformers multiplies
float32 positions and frequencies). The budget is twice the largest error that the dense model makes there in its own dtype:
both sum the same terms, in another order. `test_budget_rejects` shows what it does not let through.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import cases

transformers = pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache  # noqa: E402

from spectral_kernels import _launch, hf  # noqa: E402
from spectral_kernels.cache import Preset  # noqa: E402
from spectral_kernels.hf import ModelCache, enable, v_metrics  # noqa: E402

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}
# Every component in fp16, and chunks compressed as soon as 128 tokens have left the window: the cold path, nearly lossless.
LOSSLESS = Preset(k={64: "64x16"}, v={64: "64x16"}, chunk=64, window=32, min_fit=128)
# Few bytes, early: that tests reach pages with prompts of a few hundred tokens.
LOSSY = Preset(k={64: "16x8+16x4+32x2"}, v={64: "16x4+48x2"}, chunk=64, window=32, min_fit=128)
VOCAB = 512


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> Iterator[None]:
    """Models this small only wait for their threads: on two busy cores the module takes 30 s with one, 200 s with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(architecture: str = "llama", rope: str = "default", **changes: Any) -> Any:
    """A random model of two layers, four query and two KV heads of 64 dimensions, always the same."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,  # large enough that no two logits are nearly equal
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "sdpa",
    }
    if architecture == "mistral":
        settings["sliding_window"] = None
    if rope != "default":
        parameters = {"rope_type": rope, **ROPES.get(rope, {"factor": 4.0})}
        if VERSION >= (5, 0):
            settings["rope_parameters"] = {"rope_theta": 10000.0, **parameters}
        else:
            settings["rope_scaling"] = parameters
    settings.update(changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings))
    return model.eval().to(cases.DEVICE)


def prompt(tokens: int, *, rows: int = 1, padding: tuple[int, ...] = (), seed: int = 0) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [rows, tokens]; `padding` is the left padding of the rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        ids[row, :count], mask[row, :count] = 0, 0
    return {"input_ids": ids.to(cases.DEVICE), "attention_mask": mask.to(cases.DEVICE)}


def generate(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    torch.manual_seed(1)
    return model.generate(**inputs, **{"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, **options})


def float64_twin(model: Any) -> Any:
    """The dense model in float64, angles included."""
    twin = copy.deepcopy(model).double()
    inv_freq = model.model.rotary_emb.inv_freq.double()

    def exact(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> tuple[torch.Tensor, torch.Tensor]:
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        angle = positions[..., None].double() * torch.cat((inv_freq, inv_freq))
        return angle.cos() * module.attention_scaling, angle.sin() * module.attention_scaling

    twin.model.rotary_emb.register_forward_hook(exact, with_kwargs=True)
    return twin


class Oracle:
    """Logits of a token sequence by the float64 dense model, and the budget: twice the float32 dense model's error."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor], *, dtype: torch.dtype = torch.float32) -> None:
        mask = inputs["attention_mask"]
        self.valid = mask.bool()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            self.logits = float64_twin(model)(**inputs, position_ids=positions, use_cache=False).logits
            dense = copy.deepcopy(model).to(dtype)(**inputs, position_ids=positions, use_cache=False).logits
        self.budget = 2 * self.error(dense)

    def error(self, logits: torch.Tensor, columns: slice = slice(None)) -> float:
        valid = self.valid[:, columns]
        assert logits.shape == self.logits[:, columns].shape
        return float((logits - self.logits[:, columns])[valid].abs().max())


@torch.no_grad()
def feed(model: Any, inputs: dict[str, torch.Tensor], lengths: list[int], past: Any = None) -> tuple[torch.Tensor, Any]:
    """Logits of a token sequence given in pieces of these lengths, through one cache."""
    out, start = [], 0
    for length in lengths:
        end = start + length
        mask = inputs["attention_mask"][:, :end]
        result = model(inputs["input_ids"][:, start:end], attention_mask=mask, past_key_values=past, use_cache=True)
        out.append(result.logits)
        past, start = result.past_key_values, end
    return torch.cat(out, dim=1), past


# ---- the same tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [(), (9, 0, 3)], ids=["no_padding", "left_padding"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exact_preset_generates_the_dense_tokens(architecture: str, padding: tuple[int, ...]) -> None:
    model, inputs = tiny(architecture), prompt(20, rows=3, padding=padding)
    dense = generate(model, inputs)
    with enable(model, "exact"):
        assert torch.equal(generate(model, inputs), dense)


@pytest.mark.parametrize("rope", list(ROPES))
def test_every_rope_type_generates_the_dense_tokens(rope: str) -> None:
    model, inputs = tiny("llama", rope), prompt(150, rows=2, padding=(30, 0))
    dense = generate(model, inputs)
    with enable(model, "exact"):
        assert torch.equal(generate(model, inputs), dense)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_short_prompts_do_not_mix_rotated_with_unrotated_keys(tokens: int) -> None:
    """The predecessor's fallback did: gibberish for every short prompt."""
    model, inputs = tiny(), prompt(tokens)
    dense = generate(model, inputs)
    for preset in ("exact", "small"):  # nothing is compressed yet
        with enable(model, preset):
            assert torch.equal(generate(model, inputs), dense)


def test_prompts_given_as_embeddings() -> None:
    model, inputs = tiny(), prompt(20, rows=2, padding=(6, 0))
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach(), **inputs}
    del embedded["input_ids"]
    dense = generate(model, embedded)
    with enable(model, "exact"):
        assert torch.equal(generate(model, embedded), dense)


WAYS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beam_search": {"num_beams": 3},
    "several_samples": {"do_sample": True, "num_return_sequences": 3},
    "no_cache": {"use_cache": False},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    "prefill_in_chunks": {"prefill_chunk_size": 16},
    "dict_output": {"return_dict_in_generate": True},
}


@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_to_generate_gives_the_dense_tokens(way: str) -> None:
    model = tiny()
    # One row where several are not supported; transformers 4 miscounts positions of padded rows prefilled in chunks.
    single = way in ("prompt_lookup", "prefill_in_chunks")
    inputs = prompt(40) if single else prompt(40, rows=2, padding=(11, 0))
    dense = generate(model, inputs, **WAYS[way])
    with enable(model, "exact"):
        ours = generate(model, inputs, **WAYS[way])
    if way == "dict_output":
        assert isinstance(ours.past_key_values, ModelCache)
        dense, ours = dense.sequences, ours.sequences
    assert torch.equal(ours, dense)


def test_assisted_generation_gives_the_dense_tokens() -> None:
    model, assistant, inputs = tiny(), tiny("llama", num_hidden_layers=1), prompt(40)
    options = {
        "assistant_model": assistant,
        "min_new_tokens": None,
    }  # transformers 4 refuses a minimum beside an assistant
    dense = generate(model, inputs, **options)
    with enable(model, "exact"), enable(assistant, "exact"):
        assert torch.equal(generate(model, inputs, **options), dense)


# ---- the same logits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", list(ROPES))
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_prefill_and_decode_logits_equal_the_dense_model(architecture: str, rope: str) -> None:
    model, inputs = tiny(architecture, rope), prompt(120, rows=3, padding=(40, 0, 7))
    oracle = Oracle(model, inputs)
    with enable(model, "exact"):
        logits, cache = feed(model, inputs, [100] + [1] * 20)
    assert cache.spectral.lengths == [80, 120, 113]
    assert oracle.error(logits) <= oracle.budget


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_logits_equal_the_dense_model(dtype: torch.dtype) -> None:
    """The dense model also rounds cosine and sine to its dtype, and its budget with them."""
    model, inputs = tiny("qwen3").to(dtype), prompt(120, rows=3, padding=(40, 0, 7))
    # oneDNN's bf16 products are illegal instructions on some virtual CPUs.
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        oracle = Oracle(model, inputs, dtype=dtype)
        with enable(model, "exact"):
            logits, cache = feed(model, inputs, [100] + [1] * 20)
    assert cache.spectral.dtype == logits.dtype == dtype
    assert oracle.error(logits) <= oracle.budget


def test_bf16_is_refused_on_old_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is changed: the same model runs on, and as fp16 it is taken."""
    monkeypatch.setattr(_launch, "has_matrix_units", lambda device: False)
    model = tiny().to(torch.bfloat16)
    attention, forwards = model.config._attn_implementation, [dict(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(TypeError, match=r"model: expected fp16 or fp32 on a card before sm_80, got torch\.bfloat16"):
        enable(model)
    assert model.config._attn_implementation == attention
    assert [dict(m._forward_pre_hooks) for m in model.modules()] == forwards
    enable(model.to(torch.float16)).disable()


@pytest.mark.parametrize("lengths", [[30, 50, 1, 39], [1, 119], [60, 60], [2, 2, 116]], ids=str)
def test_several_tokens_on_a_filled_cache(lengths: list[int]) -> None:
    """Chat continuation and chunked prefill: causal among the new tokens, over all old ones."""
    model, inputs = tiny(), prompt(120, rows=2, padding=(0, 1 if min(lengths) == 2 else 0))
    oracle = Oracle(model, inputs)
    with enable(model, "exact"):
        logits, _ = feed(model, inputs, lengths)
    assert oracle.error(logits) <= oracle.budget


@pytest.mark.parametrize("lengths", [[280] + [1] * 20, [100, 150, 50], [64, 1, 235]], ids=["decode", "pieces", "early"])
def test_cold_tokens_in_fp16_cost_less_than_an_fp16_model(lengths: list[int]) -> None:
    """The lossless limit through the model: R = D, 16-bit bands. An fp16 model rounds these tensors and all others."""
    model, inputs = tiny(), prompt(300, rows=2, padding=(20, 0))
    oracle = Oracle(model, inputs, dtype=torch.float16)
    with enable(model, LOSSLESS):
        logits, cache = feed(model, inputs, lengths)
    assert cache.spectral.layers[0].chunks == [3, 4]  # (280 - 32) // 64 and (300 - 32) // 64: the cold path ran
    assert oracle.error(logits) <= oracle.budget / 2


def test_first_forward_has_the_dense_gradients() -> None:
    model, inputs = tiny(), prompt(12)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**inputs).logits.square().mean().backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    dense = gradient()
    with enable(model, "exact"):
        ours = gradient()
    # 12 tokens through 2 layers: rounding of a few hundred float32 operations in a row, relative to the largest entry.
    assert dense.abs().max() > 0
    assert (ours - dense).abs().max() <= 500 * torch.finfo(torch.float32).eps * dense.abs().max()


def _minus_positions(q: torch.Tensor, positions: torch.Tensor, rope: Any, **options: Any) -> torch.Tensor:
    return (
        rotate_true(q, positions, rope, **{**options, "inverse": True})
        if q.shape[1] == 4
        else rotate_true(q, positions, rope, **options)
    )


def _unrotated_keys(x: torch.Tensor, positions: torch.Tensor, rope: Any, **options: Any) -> torch.Tensor:
    return rotate_true(x, positions, rope, **options) if x.shape[1] == 4 else x


def _columns_for_positions_of_queries(x: torch.Tensor, positions: torch.Tensor, rope: Any, **options: Any) -> torch.Tensor:
    return rotate_true(x, positions + 1 if x.shape[1] == 4 else positions, rope, **options)


rotate_true = hf.rotate
MISTAKES: list[Callable[..., torch.Tensor]] = [_minus_positions, _unrotated_keys, _columns_for_positions_of_queries]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_budget_rejects(mistake: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny(), prompt(100)
    oracle = Oracle(model, inputs)
    monkeypatch.setattr(hf, "rotate", mistake)
    with enable(model, "exact"):
        logits, _ = feed(model, inputs, [100])
    assert oracle.error(logits) > 100 * oracle.budget


def test_budget_rejects_a_second_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "_no_rotation", lambda module, args, output: None)  # None: the hook changes nothing
    model, inputs = tiny(), prompt(100)
    oracle = Oracle(model, inputs)
    with enable(model, "exact"):
        logits, _ = feed(model, inputs, [100])
    assert oracle.error(logits) > 100 * oracle.budget


# ---- one generation, one cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["exact", LOSSY], ids=["exact", "lossy"])
def test_a_generation_does_not_leak_into_the_next(preset: Any) -> None:
    """The predecessor's cache lived across generate() calls and its positions went on counting."""
    model, inputs, other = tiny(), prompt(150, rows=2, padding=(20, 0)), prompt(200, rows=3, seed=5)
    with enable(model, preset) as handle:
        first = generate(model, inputs, return_dict_in_generate=True)
        generate(model, other)
        second = generate(model, inputs, return_dict_in_generate=True)
        fresh = generate(model, inputs, past_key_values=handle.new_cache())
    assert torch.equal(first.sequences, second.sequences)
    assert torch.equal(first.sequences, fresh)
    assert first.past_key_values is not second.past_key_values
    assert first.past_key_values.spectral.lengths == second.past_key_values.spectral.lengths == [153, 173]


def test_a_lossy_cache_is_smaller_and_finite() -> None:
    model, inputs = tiny(), prompt(600, rows=2, padding=(100, 0))
    dense = generate(model, inputs, return_dict_in_generate=True)
    with enable(model, LOSSY):
        ours = generate(model, inputs, return_dict_in_generate=True, output_logits=True)
    cache = ours.past_key_values
    dense_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.past_key_values.layers)
    assert all(torch.isfinite(step).all() for step in ours.logits)
    assert cache.columns == cache.get_seq_length() == 623  # the last token is not fed back
    assert cache.spectral.lengths == [523, 623]
    assert 0 < cache.nbytes < dense_bytes / 2  # float32, of which a token and head take 32 + 24 bytes for 512


def test_padding_rows_are_finite_and_change_nothing() -> None:
    model, inputs = tiny(), prompt(30, rows=2, padding=(12, 0))
    with enable(model, "exact"), torch.no_grad():
        result = model(**inputs, output_hidden_states=True)
        alone = model(inputs["input_ids"][:1, 12:])
    assert all(torch.isfinite(h).all() for h in result.hidden_states)
    assert torch.isfinite(result.logits).all()
    error = (result.logits[0, 12:] - alone.logits[0]).abs().max()
    assert error <= Oracle(model, inputs).budget


def test_a_chat_goes_on_in_one_cache() -> None:
    model, first = tiny(), prompt(40)
    with enable(model, "exact") as handle:
        cache = handle.new_cache()
        said = generate(model, first, past_key_values=cache)
        turn = torch.cat((said, prompt(90, seed=3)["input_ids"]), dim=1)
        inputs = {"input_ids": turn, "attention_mask": torch.ones_like(turn)}
        ours = generate(model, inputs, past_key_values=cache)
    assert torch.equal(ours, generate(model, inputs))
    assert cache.columns == ours.shape[1] - 1


def test_a_copied_cache_shares_its_prompt_and_nothing_else() -> None:
    model, inputs = tiny(), prompt(120)
    with enable(model, LOSSY) as handle, torch.no_grad():
        _, cache = feed(model, inputs, [100], past=handle.new_cache())
        twin = copy.deepcopy(cache)
        tail = inputs["input_ids"][:, 100:]
        a, b = model(tail, past_key_values=cache).logits, model(tail, past_key_values=twin).logits
    assert torch.equal(a, b)
    assert twin.spectral is not cache.spectral


# ---- what generate asks of a cache -----------------------------------------------------------------------------------


def test_crop_by_count_and_by_length() -> None:
    model, inputs = tiny(), prompt(60, rows=2, padding=(5, 0))
    oracle = Oracle(model, inputs)
    with enable(model, "exact") as handle, torch.no_grad():
        _, cache = feed(model, inputs, [60], past=handle.new_cache())
        cache.crop(-10)
        assert (cache.columns, cache.spectral.lengths) == (50, [45, 50])
        cache.crop(40)
        assert (cache.columns, cache.spectral.lengths) == (40, [35, 40])
        cache.crop(80)
        assert cache.columns == 40
        mask = inputs["attention_mask"]
        logits = model(inputs["input_ids"][:, 40:], attention_mask=mask, past_key_values=cache).logits
        assert oracle.error(logits, slice(40, None)) <= oracle.budget
        with pytest.raises(ValueError, match="tokens_to_remove"):
            cache.crop(3)
        cache.crop(0)
        assert cache.columns == (60 if VERSION >= (5, 17) else 0)
        cache.crop(-60)
        assert cache.columns == cache.nbytes == 0


def test_reorder_repeat_and_select_rows() -> None:
    model, inputs = tiny(), prompt(50, rows=3, padding=(9, 0, 4))
    oracle = Oracle(model, inputs)
    rows = torch.tensor([2, 0, 2, 1], device=cases.DEVICE)
    with enable(model, LOSSLESS) as handle, torch.no_grad():
        _, cache = feed(model, inputs, [40], past=handle.new_cache())
        cache.reorder_cache(rows)
        assert (cache.padding, cache.spectral.lengths) == ([4, 9, 4, 0], [36, 31, 36, 40])
        ids, mask = inputs["input_ids"][rows, 40:], inputs["attention_mask"][rows]
        logits = model(ids, attention_mask=mask, past_key_values=cache).logits
        assert (logits - oracle.logits[rows, 40:]).abs().max() <= oracle.budget
        cache.batch_select_indices(torch.tensor([1, 3]))
        assert cache.padding == [9, 0]
        cache.batch_repeat_interleave(2)
        assert cache.padding == [9, 9, 0, 0]


def test_sizes_that_transformers_asks_for() -> None:
    model, inputs = tiny(), prompt(10)
    with enable(model, "exact") as handle:
        cache = handle.new_cache()
        assert (cache.get_seq_length(), cache.nbytes, cache.is_initialized) == (0, 0, False)
        feed(model, inputs, [10], past=cache)
        assert (cache.get_seq_length(), cache.is_initialized, cache.is_compileable, len(cache)) == (10, True, False, 2)
        assert cache.get_mask_sizes(3, 0) == cache.get_mask_sizes(torch.arange(10, 13), 0) == (3, 10)
        assert cache.get_max_length() == cache.get_max_cache_shape() == -1
        cache.reset()
        assert (cache.get_seq_length(), cache.nbytes) == (0, 0)


# ---- on and off ------------------------------------------------------------------------------------------------------


def state(model: Any) -> tuple[Any, ...]:
    hooks = [
        (name, *(len(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")))
        for name, module in model.named_modules()
    ]
    forwards = [(name, "forward" in vars(module), sorted(vars(module))) for name, module in model.named_modules()]
    return (
        hooks,
        forwards,
        model.config._attn_implementation,
        model.config.to_dict(),
        copy.deepcopy(getattr(model, "generation_config", None)),
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_disable_restores_the_model(implementation: str) -> None:
    model, inputs = tiny(attn_implementation=implementation), prompt(20)
    before, dense = state(model), model(**inputs).logits
    handle = enable(model, "exact")
    assert handle.enabled
    assert state(model) != before
    handle.disable()
    assert not handle.enabled
    assert state(model) == before
    handle.disable()
    assert state(model) == before
    assert torch.equal(model(**inputs).logits, dense)
    with pytest.raises(KeyError), enable(model, "exact"):
        raise KeyError
    assert state(model) == before
    with enable(model, "small"), enable(tiny(), "exact"):  # one model may be enabled again, and two at a time
        generate(model, inputs)
    assert state(model) == before


def test_a_model_that_shares_the_config_object_stays_dense() -> None:
    model, inputs = tiny(), prompt(20, rows=2, padding=(5, 0))
    other = type(model)(model.config).eval().to(cases.DEVICE)
    dense = generate(other, inputs)
    with enable(model, "small"):
        out = generate(other, inputs, return_dict_in_generate=True)
    assert torch.equal(out.sequences, dense)
    assert type(out.past_key_values) is DynamicCache


@pytest.mark.parametrize("name", sorted({"past_key_values", hf.CACHE}))
def test_the_decoder_takes_a_cache_by_every_name_and_by_place(name: str) -> None:
    """Since transformers 5.24 its name is `cache`; the old keyword is renamed only after hooks have seen it."""
    model, ids = tiny(), prompt(6)["input_ids"]
    with enable(model, "exact") as handle, torch.no_grad():
        cache = handle.new_cache()
        assert model.model(ids[:, :2], **{name: cache})[hf.CACHE] is cache
        assert model.model(ids[:, 2:4], None, None, cache)[hf.CACHE] is cache
        # The new name wins, as it does in transformers.
        assert model.model(ids[:, 4:], **{"past_key_values": None, hf.CACHE: cache})[hf.CACHE] is cache
    assert cache.columns == 6


# ---- refused before anything changes ---------------------------------------------------------------------------------


REFUSED_MODELS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "not_a_model": (lambda: torch.nn.Linear(2, 2), TypeError, "model: expected a transformers"),
    "other_type": (lambda: tiny("phi3", partial_rotary_factor=1.0, sliding_window=None), NotImplementedError, "phi3"),
    "no_head": (lambda: tiny().model, NotImplementedError, "ForCausalLM"),
    "dynamic_rope": (lambda: tiny("llama", "dynamic"), NotImplementedError, "dynamic"),
    "longrope": (
        lambda: tiny(
            "llama",
            "longrope",
            **{
                "rope_parameters" if VERSION >= (5, 0) else "rope_scaling": {
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "short_factor": [1.0] * 32,
                    "long_factor": [4.0] * 32,
                    "original_max_position_embeddings": 256,
                }
            },
        ),
        NotImplementedError,
        "longrope",
    ),
    "sliding_mistral": (lambda: tiny("mistral", sliding_window=64), NotImplementedError, "sliding window of 64"),
    "sliding_qwen": (
        lambda: tiny("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1),
        NotImplementedError,
        "sliding window of 64",
    ),
    "float64": (lambda: tiny().double(), ValueError, "dtype"),
    "head_dim": (lambda: tiny(head_dim=32), ValueError, "head_dim"),
    "flex": (lambda: tiny(attn_implementation="flex_attention"), ValueError, "flex_attention"),
    "attentions": (lambda: tiny(attn_implementation="eager", output_attentions=True), ValueError, "output_attentions"),
    "meta": (lambda: tiny().to("meta"), NotImplementedError, "one device"),
}


@pytest.mark.parametrize("case", list(REFUSED_MODELS))
def test_enable_refuses_a_model(case: str) -> None:
    make, error, message = REFUSED_MODELS[case]
    model = make()
    before = state(model) if hasattr(model, "config") else None
    with pytest.raises(error, match=message):
        enable(model, "exact")
    assert before is None or state(model) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"preset": "fast"}, ValueError, "preset"),
        ({"preset": Preset(k={128: "128x4"}, v={128: "128x4"})}, ValueError, "head_dim 64"),
        ({"landmarks": [-1]}, ValueError, "landmarks"),
        ({"sinks": 4}, TypeError, "sinks"),
    ],
)
def test_enable_refuses_an_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = tiny()
    before = state(model)
    with pytest.raises(error, match=message):
        enable(model, **arguments)
    assert state(model) == before


def test_enable_twice_is_refused() -> None:
    model = tiny()
    with enable(model, "exact"):
        before = state(model)
        with pytest.raises(ValueError, match="already enabled"):
            enable(model, "exact")
        assert state(model) == before


def _filled(model: Any) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(1, 2, 5, 64), torch.zeros(1, 2, 5, 64), layer)
    return cache


REFUSED_CALLS: dict[str, tuple[Callable[[Any], dict[str, Any]], type[Exception], str]] = {
    "output_attentions": (lambda model: {"output_attentions": True}, ValueError, "output_attentions"),
    "filled_cache": (lambda model: {"past_key_values": _filled(model)}, ValueError, "already rotated"),
    "static_cache": (
        lambda model: {"past_key_values": StaticCache(config=model.config, max_cache_len=32)},
        TypeError,
        "StaticCache",
    ),
    "right_padding": (
        lambda model: {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])},
        ValueError,
        "right padding",
    ),
    "holes": (lambda model: {"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1]])}, ValueError, "holes"),
    "only_padding": (lambda model: {"attention_mask": torch.zeros(1, 6)}, ValueError, "a token in every row"),
    "short_mask": (lambda model: {"attention_mask": torch.ones(1, 5)}, ValueError, r"shape \[1, 6\]"),
    "4d_mask": (lambda model: {"attention_mask": torch.ones(1, 1, 6, 6).bool()}, ValueError, "2-D"),
    "packed": (lambda model: {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, ValueError, "count up by one"),
    "1d_positions": (lambda model: {"position_ids": torch.arange(6)}, ValueError, r"position_ids: expected shape"),
}


@pytest.mark.parametrize("case", list(REFUSED_CALLS))
def test_forward_refuses(case: str) -> None:
    make, error, message = REFUSED_CALLS[case]
    model, inputs = tiny(), prompt(6)
    arguments = {key: x.to(cases.DEVICE) if isinstance(x, torch.Tensor) else x for key, x in make(model).items()}
    with enable(model, "exact"), torch.no_grad():
        expected = model(inputs["input_ids"]).logits
        with pytest.raises(error, match=message):
            model(inputs["input_ids"], **arguments)
        assert torch.equal(model(inputs["input_ids"]).logits, expected)


def test_forward_refuses_on_a_filled_cache_and_leaves_it() -> None:
    model, inputs = tiny(), prompt(20, rows=2, padding=(3, 0))
    ids, mask = inputs["input_ids"][:, 15:], inputs["attention_mask"]
    with enable(model, LOSSLESS) as handle, torch.no_grad():
        head = {name: x[:, :15] for name, x in inputs.items()}
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = model(**head, position_ids=positions[:, :15], past_key_values=handle.new_cache()).past_key_values
        for arguments, message in (
            ({"attention_mask": torch.ones_like(mask)}, "left padding"),
            ({"attention_mask": mask[:, 15:]}, "shape"),
            ({"position_ids": positions[:, 15:] + 1}, "go on from"),
            ({"input_ids": ids[:1]}, "2 rows|1 rows"),
        ):
            with pytest.raises(ValueError, match=message):
                model(**{"input_ids": ids, "past_key_values": cache, **arguments})
        with torch.enable_grad(), pytest.raises(ValueError, match="no gradient"):
            model(ids, past_key_values=cache)
        assert (cache.columns, cache.spectral.lengths, cache.padding) == (15, [12, 15], [3, 0])
        model(ids, attention_mask=mask, position_ids=positions[:, 15:], past_key_values=cache)
        assert cache.spectral.lengths == [17, 20]


def test_training_mode_is_refused() -> None:
    model, inputs = tiny(), prompt(6)
    with enable(model, "exact"):
        model.train()
        with pytest.raises(ValueError, match=r"model\.eval"):
            model(**inputs)
        model.eval()
        model(**inputs)


def test_another_attention_while_enabled_is_refused() -> None:
    """SDPA would take the unrotated queries and keys for rotated ones."""
    model, inputs = tiny(), prompt(6)
    with enable(model, "exact"):
        model.config._attn_implementation = "sdpa"
        with pytest.raises(ValueError, match="attn_implementation 'spectral'"):
            model(**inputs)


def test_a_cache_works_in_its_own_enabled_model_only() -> None:
    model, other, inputs = tiny(), tiny(), prompt(6)
    handle = enable(model, "exact")
    cache = feed(model, inputs, [6], past=handle.new_cache())[1]
    with enable(other, "exact"), pytest.raises(ValueError, match="of this model"), torch.no_grad():
        other(inputs["input_ids"], past_key_values=cache)
    handle.disable()
    with pytest.raises(RuntimeError, match="while enabled"), torch.no_grad():
        model(inputs["input_ids"], past_key_values=cache)
    with enable(model, "exact"), pytest.raises(ValueError, match="this enable"), torch.no_grad():
        model(inputs["input_ids"], past_key_values=cache)


def test_a_forward_that_fails_half_way_is_not_built_upon(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny(), prompt(6)
    with enable(model, "exact") as handle, torch.no_grad():
        cache = handle.new_cache()
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[1], "forward", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(**inputs, past_key_values=cache)
        with pytest.raises(ValueError, match="half-way"):
            model(**inputs, past_key_values=cache)
        cache.reset()
        assert torch.equal(model(**inputs, past_key_values=cache).logits, model(**inputs).logits)


# ---- the metric of V -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_v_metric_is_the_output_projection_of_a_head(architecture: str) -> None:
    model = tiny(architecture)
    metrics = v_metrics(model)
    assert len(metrics) == 2
    for layer, metric in zip(model.model.layers, metrics, strict=True):
        assert metric is not None
        assert (metric.dtype, metric.shape) == (torch.float32, (4, 64, 64))
        weight = layer.self_attn.o_proj.weight.detach().double()
        for head in range(4):
            own = weight[:, 64 * head : 64 * head + 64]
            # A float32 sum of 256 products, in any order.
            assert ((metric[head].double() - own.T @ own).abs() <= 257 * 2**-24 * (own.abs().T @ own.abs())).all()


def test_v_metric_skips_weights_that_are_not_plain_matrices() -> None:
    model = tiny()
    model.model.layers[1].self_attn.o_proj.weight = torch.nn.Parameter(
        torch.zeros(32768, 1, dtype=torch.uint8), requires_grad=False
    )
    first, second = v_metrics(model)
    assert first is not None
    assert second is None


# ---- a real model, where one has been fetched ------------------------------------------------------------------------

GGUF = Path(os.environ.get("SPECTRAL_TEST_GGUF", "~/.cache/spectral-test-model/qwen2.5-coder-0.5b.gguf")).expanduser()


@pytest.fixture(scope="module")
def coder() -> tuple[Any, torch.Tensor]:
    """Qwen2.5-Coder-0.5B and 2,000 tokens of Python source."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")  # transformers 5 asks for it to read GGUF files
    if not GGUF.exists():
        pytest.skip(f"{GGUF} is absent")
    from perf.generate import load

    model, tokenizer = load(gguf=str(GGUF), device=str(cases.DEVICE), dtype="float32")
    text = Path(argparse.__file__).read_text()
    return model, tokenizer(text, return_tensors="pt").input_ids[:, :2000].to(cases.DEVICE)


def test_coder_generates_the_dense_tokens(coder: tuple[Any, torch.Tensor]) -> None:
    model, ids = coder
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    dense = generate(model, inputs, max_new_tokens=64, min_new_tokens=64)
    with enable(model, "exact"):
        assert torch.equal(generate(model, inputs, max_new_tokens=64, min_new_tokens=64), dense)
