"""The Hugging Face adapter against the dense model: same tokens and logits, nothing left behind.

Logits are compared with a float64 copy of the dense model whose RoPE angles are float64 too
(transformers multiplies float32 positions and frequencies). The budget is twice the largest error
that the dense model makes there in its dtype: both sum the same terms, in another order.
`test_budget_rejects` shows what it does not let through. What a lossy preset loses is no matter of
this module; relations are: a row of a padded batch is the row alone, a second call is the first.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import cases, test_cache

transformers = pytest.importorskip("transformers")

import torch._dynamo.testing  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache  # noqa: E402

from spectral_kernels import _launch, _model, calibrate, hf  # noqa: E402
from spectral_kernels.cache import copy_tokens  # noqa: E402
from spectral_kernels.codec import Codec, ModelCodec  # noqa: E402
from spectral_kernels.hf import CACHE, MAX_STEP, ModelCache, enable  # noqa: E402
from spectral_kernels.layout import Bands, PageLayout  # noqa: E402
from spectral_kernels.rope import freqs_from_inv_freq  # noqa: E402
from tests.families import VERSION, VOCAB, generate, prompt  # noqa: E402

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma")
ORIGINAL = {"factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {**ORIGINAL, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": ORIGINAL,
    "dynamic": {"factor": 4.0},
    "longrope": {**ORIGINAL, "short_factor": [1.0] * 32, "long_factor": [4.0] * 32},
}
on_cuda = pytest.mark.skipif(cases.DEVICE.type != "cuda", reason="no GPU")


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> Iterator[None]:
    """Models this small only wait for their threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(architecture: str = "llama", rope: str = "default", **changes: Any) -> Any:
    """A random model of two layers, four query and two KV heads of 64, always the same."""
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


@pytest.fixture(scope="module")
def codec() -> ModelCodec:
    """A codec of `tiny()`, balanced: 64 bytes of 512 a token and head, 4 sinks; a window of 16,
    whatever the preset's, so that short rows have coded tokens."""
    ids = prompt(600)["input_ids"]
    return replace(calibrate.calibrate(tiny(), ids, "balanced", progress=False), window=16)


def float64_twin(model: Any) -> Any:
    """The dense model in float64, angles included."""
    twin = copy.deepcopy(model).double()
    inv_freq = model.model.rotary_emb.inv_freq.double()

    def exact(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        angle = positions[..., None].double() * torch.cat((inv_freq, inv_freq))
        return angle.cos() * module.attention_scaling, angle.sin() * module.attention_scaling

    twin.model.rotary_emb.register_forward_hook(exact, with_kwargs=True)
    return twin


class Oracle:
    """Logits of a token sequence by the float64 dense model, and the budget: twice the error of the
    dense model in `dtype`."""

    def __init__(
        self, model: Any, inputs: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
    ) -> None:
        mask = inputs["attention_mask"]
        self.valid = mask.bool()
        options = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0), "use_cache": False, **inputs}
        with torch.no_grad():
            self.logits = float64_twin(model)(**options).logits
            dense = copy.deepcopy(model).to(dtype)(**options).logits
        self.budget = 2 * self.error(dense)

    def error(self, logits: torch.Tensor, columns: slice = slice(None)) -> float:
        valid = self.valid[:, columns]
        assert logits.shape == self.logits[:, columns].shape
        return float((logits - self.logits[:, columns])[valid].abs().max())


@torch.no_grad()
def feed(
    model: Any, inputs: dict[str, torch.Tensor], lengths: list[int], cache: Any = None
) -> tuple[torch.Tensor, Any]:
    """Logits of a token sequence given in pieces of these lengths, through one cache."""
    out, start = [], 0
    for length in lengths:
        mask = inputs["attention_mask"][:, : start + length]
        options = {CACHE: cache, "attention_mask": mask, "use_cache": True}
        result = model(inputs["input_ids"][:, start : start + length], **options)
        out.append(result.logits)
        cache, start = result[CACHE], start + length
    return torch.cat(out, dim=1), cache


# ---- the same tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exact_preset_generates_the_dense_tokens(architecture: str, attention: str) -> None:
    model = tiny(architecture, attn_implementation=attention)
    for inputs in (prompt(40), prompt(20, rows=3, padding=(9, 0, 3))):
        dense = generate(model, inputs)
        with enable(model, "exact"):
            assert torch.equal(generate(model, inputs), dense)


@pytest.mark.parametrize("rope", list(ROPES))
def test_every_rope_type_generates_the_dense_tokens(rope: str) -> None:
    """Also those whose frequencies change with the length: keys stay as they came."""
    model, inputs = tiny("llama", rope), prompt(100, rows=2, padding=(30, 0))
    dense = generate(model, inputs)
    with enable(model, "exact"):
        assert torch.equal(generate(model, inputs), dense)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_short_prompts_do_not_mix_rotated_with_unrotated_keys(
    tokens: int, codec: ModelCodec
) -> None:
    """The predecessor's fallback did: gibberish for every short prompt. Nothing is lossy yet."""
    model, inputs = tiny(), prompt(tokens)
    dense = generate(model, inputs)
    for preset in ("exact", "balanced"):
        with enable(model, preset, codec=codec):
            assert torch.equal(generate(model, inputs), dense)


def test_prompts_given_as_embeddings() -> None:
    model, inputs = tiny(), prompt(20, rows=2, padding=(6, 0))
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    embedded = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
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
    # One row where several are not supported; transformers 4 miscounts padded rows in chunks.
    single = way in ("prompt_lookup", "prefill_in_chunks")
    inputs = prompt(40) if single else prompt(40, rows=2, padding=(11, 0))
    dense = generate(model, inputs, **WAYS[way])
    with enable(model, "exact"):
        ours = generate(model, inputs, **WAYS[way])
    if way == "dict_output":
        assert isinstance(ours[CACHE], ModelCache)
        dense, ours = dense.sequences, ours.sequences
    assert torch.equal(ours, dense)


@pytest.mark.skipif(VERSION < (5, 0), reason="transformers 4 miscounts padded rows in chunks")
@pytest.mark.parametrize("chunk", [16, 64, 100])
def test_chunks_that_are_shorter_than_the_padding(chunk: int) -> None:
    """A row's first token may come in a later chunk."""
    model, inputs = tiny(), prompt(200, rows=2, padding=(90, 0))
    dense = generate(model, inputs, prefill_chunk_size=chunk)
    with enable(model, "exact"):
        assert torch.equal(generate(model, inputs, prefill_chunk_size=chunk), dense)


def test_assisted_generation_gives_the_dense_tokens() -> None:
    model, assistant, inputs = tiny(), tiny(num_hidden_layers=1), prompt(40)
    # transformers 4 refuses a minimum beside an assistant
    options = {"assistant_model": assistant, "min_new_tokens": None}
    dense = generate(model, inputs, **options)
    with enable(model, "exact"), enable(assistant, "exact"):
        assert torch.equal(generate(model, inputs, **options), dense)


# ---- the same logits -----------------------------------------------------------------------------


@pytest.mark.parametrize("rope", ["default", "llama3", "yarn"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_prefill_and_decode_logits_equal_the_dense_model(architecture: str, rope: str) -> None:
    model, inputs = tiny(architecture, rope), prompt(120, rows=3, padding=(40, 0, 7))
    oracle = Oracle(model, inputs)
    with enable(model, "exact"):
        logits, cache = feed(model, inputs, [110] + [1] * 10)
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
            logits, cache = feed(model, inputs, [110] + [1] * 10)
    assert cache.spectral.dtype == logits.dtype == dtype
    assert oracle.error(logits) <= oracle.budget


def test_a_softmax_scale_of_the_models_own() -> None:
    """As Granite's or Gemma's: not one over the root of the head dimension."""
    model, inputs = tiny(), prompt(60)
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.05
    oracle = Oracle(model, inputs)
    with enable(model, "exact"):
        logits, _ = feed(model, inputs, [50, 1, 9])
    assert oracle.error(logits) <= oracle.budget


PIECES = [[30, 50, 1, 39], [1, 119], [60, 60], [2, 2, 116], [100, MAX_STEP - 12]]


@pytest.mark.parametrize("lengths", PIECES, ids=str)
def test_several_tokens_on_a_filled_cache(lengths: list[int]) -> None:
    """Chat and chunked prefill: causal among the new tokens, over all old ones, whether they are a
    step or a prompt."""
    model = tiny()
    inputs = prompt(sum(lengths), rows=2, padding=(0, 1 if min(lengths) == 2 else 0))
    oracle = Oracle(model, inputs)
    with enable(model, "exact"):
        logits, _ = feed(model, inputs, lengths)
    assert oracle.error(logits) <= oracle.budget


def test_a_cache_grows_and_keeps_its_tokens(codec: ModelCodec) -> None:
    """Forwards without generate() do not say how far they will go."""
    model, inputs = tiny(), prompt(600, rows=2, padding=(20, 0))
    oracle = Oracle(model, inputs)
    with enable(model, "exact") as handle:
        logits, cache = feed(model, inputs, [500, 90, 10], handle.new_cache(max_tokens=510))
        assert cache.capacity == 1024
        assert oracle.error(logits) <= oracle.budget
    with enable(model, codec=codec) as handle:
        small, large = (handle.new_cache(max_tokens=n) for n in (505, 1024))
        a, _ = feed(model, inputs, [500, 9, 1, 1], small)
        b, _ = feed(model, inputs, [500, 9, 1, 1], large)
    assert torch.equal(a, b) and small.capacity > 505


def test_a_copy_with_more_room_is_the_cache() -> None:
    """Other page numbers, a row that was rolled back beyond its ring: what comes after agrees."""
    model = test_cache.Model(seed=12)
    model.store([150, 70], prompt=True)
    model.reorder([1, 0])
    model.store([3, 3], prompt=False)
    model.rollback([30, 0])
    larger = test_cache.make_cache(max_tokens=640)
    assert model.cache.pages.rows[0] != [0, 1]
    copy_tokens(model.cache, larger)
    model.cache = larger
    model.check()
    model.store([200, 90], prompt=True)
    model.rollback([1, 1])
    model.check()


def test_positions_given_to_the_prompt_alone() -> None:
    """Steps without position_ids go on where a padded prompt with them ended."""
    model, inputs = tiny(), prompt(60, rows=2, padding=(9, 0))
    oracle, mask = Oracle(model, inputs), inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with enable(model, "exact") as handle, torch.no_grad():
        cache, out = handle.new_cache(), []
        for part, options in (
            (slice(50), {"position_ids": positions[:, :50]}),
            (slice(50, 55), {}),
            (slice(55, 60), {}),
        ):
            options |= {CACHE: cache, "attention_mask": mask[:, : part.stop], "use_cache": True}
            out.append(model(inputs["input_ids"][:, part], **options).logits)
    assert oracle.error(torch.cat(out, dim=1)) <= oracle.budget


def test_first_forward_has_the_dense_gradients() -> None:
    model, inputs = tiny(), prompt(12)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**inputs).logits.square().mean().backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    dense = gradient()
    with enable(model, "exact"):
        assert torch.equal(gradient(), dense)


Mistake = Callable[[torch.Tensor], torch.Tensor]
MISTAKES: dict[str, Mistake] = {
    "zeros": torch.zeros_like,
    "heads in another order": lambda x: x.flip(1),
    "rotated twice": lambda x: torch.cat((-x[..., 32:], x[..., :32]), dim=-1),
    "one token older": lambda x: x.roll(1, dims=2),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_budget_rejects(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that a step stores wrongly."""
    model, inputs = tiny(), prompt(100)
    oracle, append = Oracle(model, inputs), hf.append
    wrong = MISTAKES[mistake]
    monkeypatch.setattr(hf, "append", lambda k, *args, **kw: append(wrong(k), *args, **kw))
    with enable(model, "exact", check=False):
        logits, _ = feed(model, inputs, [80, 10, 10])
    assert oracle.error(logits) > 100 * oracle.budget


@pytest.mark.parametrize("mistake", [x for x in MISTAKES if x != "one token older"])
def test_enable_sees_it(mistake: str, monkeypatch: pytest.MonkeyPatch, codec: ModelCodec) -> None:
    """The check of six tokens, whose step has one, for any preset; nothing was changed then."""
    model, append, wrong = tiny(), hf.append, MISTAKES[mistake]
    before = state(model)
    monkeypatch.setattr(hf, "append", lambda k, *args, **kw: append(wrong(k), *args, **kw))
    for preset in ("exact", "balanced"):
        with pytest.raises(NotImplementedError, match=r"layer 0: its attention .* differ by"):
            enable(model, preset, codec=codec)
        assert state(model) == before
    enable(model, "exact", check=False).disable()
    enable(model.train(), "exact").disable()  # dropout: nothing to compare


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_enable_checks_within_rounding(dtype: torch.dtype) -> None:
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        enable(tiny("qwen3").to(dtype), "exact").disable()


# ---- one generation, one cache -------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_a_generation_does_not_leak_into_the_next(preset: str, codec: ModelCodec) -> None:
    """The predecessor's cache lived across generate() calls and its positions went on counting."""
    model, inputs, other = (
        tiny(),
        prompt(150, rows=2, padding=(20, 0)),
        prompt(90, rows=2, seed=5),
    )
    with enable(model, preset, codec=codec) as handle:
        first = generate(model, inputs, return_dict_in_generate=True)
        generate(model, other)
        pooled = list(handle._pool.values())
        second = generate(model, inputs)
        generate(model, prompt(30, rows=3))
        third = generate(model, inputs, return_dict_in_generate=True)
        fresh = generate(model, inputs, **{CACHE: handle.new_cache()})
    assert len(pooled) == 1 and third[CACHE] is pooled[0]  # the memory is used again
    for tokens in (second, third.sequences, fresh):
        assert torch.equal(tokens, first.sequences)
    assert first[CACHE] is not third[CACHE]  # which the caller has
    assert first[CACHE].spectral.lengths == third[CACHE].spectral.lengths == [141, 161]


def test_memory_goes_with_its_last_user(codec: ModelCodec) -> None:
    """At once, not at the next collection of cycles, of which a GPU's memory knows nothing."""
    model, inputs = tiny(), prompt(40)

    def pages(cache: ModelCache) -> weakref.ref:
        return weakref.ref(cache.spectral.k_pages[0])

    with enable(model, codec=codec) as handle:
        out = generate(model, inputs, return_dict_in_generate=True)
        twin = copy.deepcopy(out[CACHE])
        gc.collect()
        gc.disable()
        try:
            dropped = [pages(out[CACHE])]
            del out
            assert dropped[0]() is None and twin.layers[0].cache is twin
            generate(model, inputs)
            dropped.append(pages(handle._pool[1]))
            generate(model, prompt(600))  # which it is too small for
            dropped.append(pages(handle._pool[1]))
            for rows in (2, 3):  # two are kept
                generate(model, prompt(6, rows=rows))
            dropped.append(pages(handle._pool[3]))
            handle.disable()
            assert [x() for x in dropped] == [None] * 4
        finally:
            gc.enable()


def test_a_row_of_a_padded_batch_is_the_row_alone(codec: ModelCodec) -> None:
    """Pages depend on tokens and their positions in the row alone; padding is stored nowhere."""
    padding = (0, 77)
    model, inputs = tiny(), prompt(600, rows=2, padding=padding)
    options = {"return_dict_in_generate": True, "output_logits": True}
    with enable(model, codec=codec):
        batch = generate(model, inputs, **options)
        for i, skipped in enumerate(padding):
            alone = {name: x[i : i + 1, skipped:] for name, x in inputs.items()}
            row = generate(model, alone, **options)
            assert torch.equal(batch.sequences[i, 600:], row.sequences[0, 600 - skipped :])
            for a, b in zip(batch.logits, row.logits, strict=True):
                torch.testing.assert_close(a[i], b[0], rtol=0, atol=2e-3 * float(b.abs().max()))


def test_a_lossy_cache_is_smaller_and_finite(codec: ModelCodec) -> None:
    model, inputs = tiny(), prompt(1000, rows=2, padding=(100, 0))
    dense = generate(model, inputs, return_dict_in_generate=True)
    with enable(model, codec=codec):
        ours = generate(model, inputs, return_dict_in_generate=True, output_logits=True)
    cache = ours[CACHE]
    layers = dense[CACHE].layers
    dense_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert all(torch.isfinite(step).all() for step in ours.logits)
    assert cache.columns == cache.get_seq_length() == 1011  # the last token is not fed back
    assert cache.spectral.lengths == cache.spectral.seq_lens.tolist() == [911, 1011]
    assert 0 < cache.nbytes < dense_bytes / 4  # float32; the codec and exact tokens count


def test_padding_rows_are_finite_and_change_nothing() -> None:
    model, inputs = tiny(), prompt(30, rows=2, padding=(12, 0))
    with enable(model, "exact"), torch.no_grad():
        result = model(**inputs, output_hidden_states=True)
        alone = model(inputs["input_ids"][:1, 12:])
    assert all(torch.isfinite(h).all() for h in result.hidden_states)
    assert torch.isfinite(result.logits).all()
    error = (result.logits[0, 12:] - alone.logits[0]).abs().max()
    assert error <= Oracle(model, inputs).budget


@pytest.mark.parametrize("turn", [5, 90], ids=["step", "prompt"])
def test_a_chat_goes_on_in_one_cache(turn: int) -> None:
    model, first = tiny(), prompt(40)
    with enable(model, "exact") as handle:
        cache = handle.new_cache()
        said = generate(model, first, **{CACHE: cache})
        ids = torch.cat((said, prompt(turn, seed=3)["input_ids"]), dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ours = generate(model, inputs, **{CACHE: cache})
        assert cache.columns == ours.shape[1] - 1
    assert torch.equal(ours, generate(model, inputs))


def eight_bits() -> ModelCodec:
    """Every dimension of K and V of `tiny()` in 255 steps from -8 to 8: 1 % of the keys' spread."""
    bands, step = Bands.parse("64x8"), 8 / 127
    eye = torch.eye(64).expand(1, 2, -1, -1)
    tensors = {"k_mean": torch.zeros(1, 2, 64), "k_offset": torch.zeros(1, 2, 64)}
    for side in ("k", "v"):
        tensors[f"{side}_basis"] = (127 * eye).to(torch.int8).contiguous()
        tensors[f"{side}_scale"] = torch.full((1, 2, 64), step / 127)
        tensors[f"{side}_encoder"] = (eye / step).contiguous()
    freqs = freqs_from_inv_freq(10000.0 ** (-torch.arange(0, 64, 2).double() / 64))
    codec = Codec(PageLayout(bands, bands, 64), freqs=freqs, **tensors)
    return ModelCodec((codec, codec), sinks=4, window=16)


@pytest.mark.parametrize(
    "lengths", [[520, 10, 1], [440, 90, 1], [16, 514, 1], [529, 1, 1]], ids=str
)
def test_old_tokens_come_from_pages_in_steps_and_prompts(lengths: list[int]) -> None:
    """A codec that is nearly lossless: rows that cross a frame, of different padding."""
    model, inputs = tiny(), prompt(531, rows=2, padding=(7, 0))
    oracle = Oracle(model, inputs)
    with enable(model, codec=eight_bits()):
        logits, cache = feed(model, inputs, lengths)
    late = slice(lengths[0], None)
    assert oracle.error(logits[:, : lengths[0]], slice(lengths[0])) <= oracle.budget
    error = (logits - oracle.logits)[:, late].square().mean().sqrt() / oracle.logits.std()
    assert 1e-4 < error < 0.1  # of logits that have nothing to do with these: 1.4
    assert cache.spectral.lengths == [524, 531]


def test_a_copied_cache_shares_its_prompt_and_nothing_else(codec: ModelCodec) -> None:
    model, inputs = tiny(), prompt(120)
    with enable(model, codec=codec) as handle, torch.no_grad():
        _, cache = feed(model, inputs, [100], handle.new_cache())
        twin = copy.deepcopy(cache)
        assert twin.spectral.codec is cache.spectral.codec and twin.owner() is handle
        options = [{CACHE: x} for x in (cache, twin)]
        a, b = (model(inputs["input_ids"][:, 100:110], **x).logits for x in options)
        cache.crop(-100)
        c = model(inputs["input_ids"][:, 110:], **options[1]).logits
    assert torch.equal(a, b) and torch.isfinite(c).all()
    assert (twin.columns, twin.spectral.lengths) == (120, [120])


# ---- what generate asks of a cache ---------------------------------------------------------------


def test_crop_by_count_and_by_length() -> None:
    model, inputs = tiny(), prompt(60, rows=2, padding=(5, 0))
    oracle = Oracle(model, inputs)
    with enable(model, "exact") as handle, torch.no_grad():
        _, cache = feed(model, inputs, [60], handle.new_cache())
        cache.crop(-10)
        assert (cache.columns, cache.spectral.lengths) == (50, [45, 50])
        cache.crop(40)
        assert (cache.columns, cache.spectral.lengths) == (40, [35, 40])
        cache.crop(80)
        assert cache.columns == 40
        options = {"attention_mask": inputs["attention_mask"], CACHE: cache}
        logits = model(inputs["input_ids"][:, 40:], **options).logits
        assert oracle.error(logits, slice(40, None)) <= oracle.budget
        with pytest.raises(ValueError, match="tokens_to_remove"):
            cache.crop(3)
        cache.crop(0)
        assert cache.columns == (60 if VERSION >= (5, 17) else 0)
        cache.crop(-60)
        assert cache.columns == cache.get_seq_length() == 0


@pytest.mark.parametrize("tokens", [40, 64])
def test_reordered_rows_go_on_as_themselves(tokens: int) -> None:
    model, inputs = tiny(), prompt(tokens + 10, rows=3, padding=(9, 0, 4))
    oracle = Oracle(model, inputs)
    rows = torch.tensor([2, 0, 2], device=cases.DEVICE)
    with enable(model, "exact") as handle, torch.no_grad():
        _, cache = feed(model, inputs, [tokens], handle.new_cache(max_tokens=1024))
        cache.reorder_cache(rows)
        assert cache.padding == [4, 9, 4] == cache.first.tolist()
        assert cache.spectral.lengths == [tokens - 4, tokens - 9, tokens - 4]
        options = {"attention_mask": inputs["attention_mask"][rows], CACHE: cache}
        logits = model(inputs["input_ids"][rows, tokens:], **options).logits
        assert (logits - oracle.logits[rows, tokens:]).abs().max() <= oracle.budget
        with pytest.raises(NotImplementedError, match="3 rows"):
            cache.reorder_cache(rows[:2])


def test_sizes_that_transformers_asks_for(codec: ModelCodec) -> None:
    model, inputs = tiny(), prompt(40)
    with enable(model, codec=codec) as handle:
        cache = handle.new_cache()
        assert (cache.get_seq_length(), cache.nbytes, len(cache)) == (0, 0, 2)
        feed(model, inputs, [40], cache)
        assert (cache.get_seq_length(), cache.is_compileable) == (40, not handle.graph)
        assert cache.get_mask_sizes(cache.limit, 0) == (0, 0)  # a step
        new = cache.limit + 1  # a prompt
        for asked in (new, torch.arange(new)):
            assert cache.get_mask_sizes(asked, 0) == (40 + new, 0)
        assert cache.layers[0].get_max_length() == cache.layers[0].get_max_cache_shape() == -1
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.nbytes > 0


# ---- operators, compilation, graphs --------------------------------------------------------------


def test_the_step_is_an_operator_that_opcheck_accepts(codec: ModelCodec) -> None:
    model, inputs = tiny(), prompt(80, rows=2, padding=(11, 0))
    with enable(model, codec=codec) as handle:
        _, cache = feed(model, inputs, [80], handle.new_cache())
        x = cache.spectral
        q, k, v = (torch.randn(2, heads, 1, 64, device=cases.DEVICE) for heads in (4, 2, 2))
        arguments = (
            q, k, v, x.k_pages[0], x.v_pages[0], x.k_exact[0], x.v_exact[0], x.block_table,
            x.seq_lens, cache.codecs[0], x.codec.sinks, x.codec.window, 0.125, None,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.spectral_kernels.step.default, arguments)


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_steps_compile_as_one_graph_once(preset: str, codec: ModelCodec) -> None:
    model, inputs = tiny(), prompt(70, rows=2, padding=(11, 0))
    with enable(model, preset, codec=codec, graph=False) as handle, torch.no_grad():
        expected = generate(model, inputs)[:, 70:]
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        step = torch.compile(model, fullgraph=True, backend=counter)
        cache = handle.new_cache(max_tokens=512)
        for _ in range(2):  # the same cache, reset
            cache.reset()
            logits = model(**inputs, **{CACHE: cache}).logits
            positions = inputs["attention_mask"].sum(-1, keepdim=True)
            tokens = [logits[:, -1:].argmax(-1)]
            for i in range(11):
                options = {"position_ids": positions + i, CACHE: cache}
                if VERSION < (5, 0):
                    options["cache_position"] = torch.tensor([70 + i], device=cases.DEVICE)
                tokens.append(step(input_ids=tokens[-1], **options).logits[:, -1:].argmax(-1))
            assert torch.equal(torch.cat(tokens, 1), expected)
            assert (counter.frame_count, cache.get_seq_length()) == (1, 81)
        cache.crop(-11)  # by lengths that compiled steps moved
        assert cache.spectral.lengths == [59, 70]


def check_one_graph(model: Any, codec: Any, generate: Callable[..., Any], times: int) -> None:
    """generate(model, **options) compiles its steps, once, as on CUDA with graph=False."""
    config = transformers.CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    with enable(model, codec=codec, graph=False):
        expected = generate(model, disable_compile=True)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for _ in range(times):
            assert torch.equal(generate(model, compile_config=config), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_generate_compiles_its_steps_where_it_does(codec: ModelCodec) -> None:
    model, inputs = tiny(), prompt(70, rows=2, padding=(11, 0))
    check_one_graph(model, codec, functools.partial(generate, inputs=inputs), times=2)


def test_a_prompt_is_not_compiled() -> None:
    model, inputs = tiny(), prompt(20)
    with enable(model, "exact", graph=False) as handle, torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with pytest.raises(Exception, match=r"outside torch\.compile"):
            compiled(**inputs, **{CACHE: handle.new_cache()})


class FakeGraph(hf._StepGraph):
    """Stands in for a captured graph where there is no GPU: the forward as it was captured."""

    def __init__(self, forward: Callable[..., Any], cache: ModelCache, *_: Any) -> None:
        states = (x for layer in cache.others for x in _model.tensors_of(layer))
        moved = [cache.spectral.seq_lens, *states]
        before = [x.clone() for x in moved]
        self.forward, self.handle = forward, cache.owner()
        for _ in range(3):
            self.output = forward(torch.zeros(cache.batch, 1).long(), before[0][:, None].long())
            torch._foreach_copy_(moved, before)

    def replay(self, cache: ModelCache, ids: torch.Tensor, positions: torch.Tensor) -> Any:
        self.handle._local.capturing = True
        try:
            self.output = self.forward(ids.clone(), positions.long().expand(len(ids), 1))
        finally:
            self.handle._local.capturing = False
        return type(self.output)(logits=self.output.logits.clone(), **{CACHE: cache})


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_a_cache_takes_the_dtype_of_its_tokens(preset: str, codec: ModelCodec) -> None:
    """Autocast, and a model that is converted while enabled; the pool's cache had another."""
    model, inputs, kind = tiny(), prompt(60, rows=2, padding=(9, 0)), cases.DEVICE.type
    if kind == "cpu":  # oneDNN's bf16 products are illegal instructions on some virtual CPUs
        torch.backends.mkldnn.enabled, before = False, torch.backends.mkldnn.enabled
    dense, ours, anonymous = [], [], ModelCodec(codec.layers, codec.sinks, codec.window)
    try:
        for found, context in (
            (dense, contextlib.nullcontext()), (ours, enable(model, preset, codec=anonymous)),
        ):  # fmt: skip
            with context:
                for dtype in (None, torch.bfloat16, None):
                    with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
                        found.append(generate(model, inputs))
                model.double().to(torch.float16)
                found.append(generate(model, inputs))
                model.float()
    finally:
        if kind == "cpu":
            torch.backends.mkldnn.enabled = before
    assert torch.equal(ours[0], ours[2])
    if preset == "exact":
        assert all(map(torch.equal, ours, dense))


def test_states_made_in_inference_mode_serve_outside_it() -> None:
    model, inputs = tiny(), prompt(40, rows=2, padding=(9, 0))
    dense = generate(model, inputs, num_beams=2)
    with enable(model, "exact") as handle:
        with torch.inference_mode():
            cache = copy.deepcopy(feed(model, inputs, [40], handle.new_cache())[1])
            assert torch.equal(generate(model, inputs, num_beams=2), dense)
        assert torch.equal(generate(model, inputs, num_beams=2), dense)
        tensors = (cache.first, *cache.spectral.k_pages, cache.spectral.seq_lens)
        assert not any(x.is_inference() for x in tensors)


@pytest.mark.skipif(
    cases.DEVICE.type == "cuda", reason="its graph is none; others replay real ones"
)
@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_what_surrounds_a_replay(
    preset: str, codec: ModelCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths, positions, crops, growth and refusals, with a graph that is none."""
    model, inputs = tiny(), prompt(520, rows=2, padding=(11, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with enable(model, preset, codec=codec, graph=False) as handle:
        expected = generate(model, inputs)
        pieces = [500, *[1] * 20]
        eager, _ = feed(model, inputs, pieces, handle.new_cache(2, 510))
    monkeypatch.setattr(hf, "_StepGraph", FakeGraph)
    with enable(model, preset, codec=codec, graph=False) as handle, torch.no_grad():
        handle.graph = True
        for _ in range(2):
            assert torch.equal(generate(model, inputs), expected)
        assert isinstance(handle._pool[2].graph, FakeGraph)
        logits, cache = feed(model, inputs, pieces, handle.new_cache(2, 510))
        torch.testing.assert_close(logits, eager)
        assert cache.spectral.lengths == cache.spectral.seq_lens.tolist() == [509, 520]
        assert cache.capacity == 1024  # it grew between replays
        graph = cache.graph
        cache.crop(-hf.DRAFTS)  # leaves the window as it was
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for i in range(520 - hf.DRAFTS, 520):
            options = {"attention_mask": mask[:, : i + 1], "logits_to_keep": 1, CACHE: cache}
            again = model(ids[:, i : i + 1], **options).logits
            assert cache.columns == i + 1
        torch.testing.assert_close(again[:, 0], eager[:, -1])
        assert cache.graph is graph and copy.deepcopy(cache).graph is None
        hidden = model(ids[:, :1], **{CACHE: cache}, output_hidden_states=True).hidden_states
        assert len(hidden) == 3  # asks for more than a replay gives
        with monkeypatch.context() as patch:
            patch.setattr(FakeGraph, "replay", lambda *args: 1 / 0)
            twin, odd = copy.deepcopy(cache), copy.deepcopy(cache)
            twin.graph = odd.graph = graph
            with pytest.raises((ValueError, RuntimeError)):  # the model's own: it is not replayed
                model(ids[:, :1], position_ids=ids[:, :1, None], **{CACHE: odd})
            with pytest.raises(ZeroDivisionError):
                model(ids[:, :1], **{CACHE: twin})
        with pytest.raises(ValueError, match="half-way"):
            model(ids[:, :1], **{CACHE: twin})

        def fails(*args: Any) -> None:
            raise RuntimeError("not while capturing")

        monkeypatch.setattr(FakeGraph, "__init__", fails)
        cache.graph = None
        with pytest.warns(UserWarning, match="cannot be captured .* not while capturing"):
            model(ids[:, :1], **{CACHE: cache})
        assert not handle.graph and cache.spectral.lengths == [511, 522]


@pytest.mark.skipif(cases.DEVICE.type == "cuda", reason="its graph is none")
def test_a_capture_is_no_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's prompt waits for it, and is not taken for what is captured."""
    model, inputs, began, done = tiny(), prompt(40), threading.Event(), threading.Event()
    expected = generate(model, inputs)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    class Slow(FakeGraph):
        def __init__(self, *args: Any) -> None:
            began.set()
            done.wait(0.3)
            super().__init__(*args)

    monkeypatch.setattr(hf, "_StepGraph", Slow)
    with enable(model, "exact") as handle, ThreadPoolExecutor(1) as pool:
        handle.graph = True
        first = pool.submit(generate, model, inputs)
        assert began.wait(60)
        assert torch.equal(generate(model, inputs), expected)
        done.set()
        assert torch.equal(first.result(), expected)


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_layers_compile_for_a_step(
    preset: str, codec: ModelCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a capture with compile=True runs gives the eager step, in pieces that layers share, and
    leaves no trace."""
    model, inputs = tiny(), prompt(200, rows=2, padding=(11, 0))
    decoder, step = model.get_decoder(), torch.full((2, 1), 7, device=cases.DEVICE)
    backend = torch._dynamo.testing.CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    with enable(model, preset, codec=codec, graph=False) as handle, torch.no_grad():
        name = decoder.config._attn_implementation
        caches = [handle.new_cache() for _ in range(2)]
        for cache in caches:
            model(**inputs, **{CACHE: cache})
        expected = model(step, **{CACHE: caches[0]}).logits
        with hf.compiled_layers(decoder, caches[1]):
            assert decoder.config._attn_implementation != name
            logits = model(step, **{CACHE: caches[1]}).logits
        torch.testing.assert_close(logits, expected)
        assert torch.equal(caches[0].spectral.seq_lens, caches[1].spectral.seq_lens)
        assert backend.frame_count > len(decoder.layers)  # at least two pieces a layer ran compiled
        assert decoder.config._attn_implementation == name
        traces = [vars(x) for x in (*decoder.layers, *caches[1].layers)]
        assert not any(key in found for found in traces for key in ("forward", "update"))


@on_cuda
def test_a_compiled_step_is_captured(codec: ModelCodec) -> None:
    """Its logits are those of the plain capture up to rounding; tokens go on from them."""
    model, inputs = tiny(), prompt(200, rows=2)
    pieces = [180] + [1] * 20
    with enable(model, codec=codec) as handle:
        plain, _ = feed(model, inputs, pieces, handle.new_cache(2, 1024))
    with enable(model, codec=codec, compile=True) as handle:
        fused, cache = feed(model, inputs, pieces, handle.new_cache(2, 1024))
        assert cache.graph is not None
    torch.testing.assert_close(fused, plain, atol=1e-3, rtol=1e-3)


def half(codec: ModelCodec) -> tuple[Any, ModelCodec]:
    """The model in fp16, which rounds its weights, and so its fingerprint."""
    anonymous = ModelCodec(codec.layers, codec.sinks, codec.window)
    return tiny().half(), anonymous.to(cases.DEVICE)


@on_cuda
@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_replayed_steps_are_eager_steps_to_the_bit(preset: str, codec: ModelCodec) -> None:
    (model, codec), inputs = half(codec), prompt(200, rows=2, padding=(11, 0))
    pieces = [120] + [1] * 80
    with enable(model, preset, codec=codec, graph=False) as handle:
        eager, _ = feed(model, inputs, pieces, handle.new_cache(2, 1024))
    with enable(model, preset, codec=codec) as handle:
        cache = handle.new_cache(2, 1024)
        replayed, _ = feed(model, inputs, pieces, cache)
        graph = cache.graph
        assert graph is not None
        assert torch.equal(replayed, eager)
        cache.reset()
        again, _ = feed(model, inputs, pieces, cache)
        assert cache.graph is graph  # captured once a cache
        assert torch.equal(again, eager)


@on_cuda
def test_a_replayed_step_neither_waits_nor_allocates(codec: ModelCodec) -> None:
    (model, codec), inputs = half(codec), prompt(200)
    with enable(model, codec=codec) as handle, torch.no_grad():
        _, cache = feed(model, inputs, [100, 1, 1], handle.new_cache(1, 1024))
        ids = inputs["input_ids"][:, :1]
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(100):  # over a page's border
                logits = model(ids, **{CACHE: cache}).logits
        finally:
            torch.cuda.set_sync_debug_mode("default")
        after = torch.cuda.memory_stats()
    assert torch.isfinite(logits).all()
    for name in ("num_device_alloc", "num_alloc_retries", "reserved_bytes.all.current"):
        assert after.get(name, 0) == before.get(name, 0), name


@on_cuda
def test_ten_thousand_replays_are_eager_steps_to_the_bit(codec: ModelCodec) -> None:
    """One layer, so that eager steps take seconds; over 156 pages and 19 frames."""
    steps, first = 10_000, prompt(100, rows=2, padding=(11, 0))
    model = tiny(num_hidden_layers=1, max_position_embeddings=16384).half()
    one = ModelCodec(codec.layers[:1], codec.sinks, codec.window).to(cases.DEVICE)
    found = []
    for graph in (False, True):
        with enable(model, codec=one, graph=graph) as handle, torch.inference_mode():
            logits, cache = feed(model, first, [100], handle.new_cache(2, 100 + steps))
            seen = torch.zeros(steps, 2, dtype=torch.int64, device=cases.DEVICE)
            for i in range(steps):
                seen[i] = logits[:, -1].argmax(-1)
                logits = model(seen[i][:, None], **{CACHE: cache}).logits
            assert (cache.graph is not None) == graph
            spectral = cache.spectral
            kept = (*spectral.k_pages, *spectral.v_pages, *spectral.k_exact, *spectral.v_exact)
            found.append((seen, logits, spectral.seq_lens, *kept))
    assert found[0][2].tolist() == [100 - 11 + steps, 100 + steps]
    assert len(found[0][0].unique()) > 4  # it does not repeat one token
    assert all(map(torch.equal, *found))


@on_cuda
def test_a_step_is_captured_anew_for_another_autocast(codec: ModelCodec) -> None:
    """No graph reads the copies of weights that autocast makes and frees."""
    model, inputs, seen = tiny(), prompt(100, rows=2, padding=(11, 0)), []
    options = {"return_dict_in_generate": True, "output_logits": True, "disable_compile": True}
    for graph in (False, True):
        with enable(model, codec=codec, graph=graph) as handle:
            for dtype in (torch.bfloat16, torch.float16, torch.bfloat16, None):
                on = contextlib.nullcontext()
                if dtype is not None:
                    on = torch.autocast("cuda", dtype=dtype)
                with on:
                    generate(model, inputs, disable_compile=True)  # captures
                    seen.append(torch.stack(generate(model, inputs, **options).logits))
                    torch.full((1 << 22,), torch.nan, device=cases.DEVICE)  # where copies were
            assert handle.graph == graph
    for eager, replayed in zip(seen[:4], seen[4:], strict=True):
        assert torch.equal(eager, replayed)
    assert not torch.equal(seen[0], seen[3])


@on_cuda
def test_the_first_prompt_compiles_for_all(codec: ModelCodec) -> None:
    """Prompts and steps of other lengths after it compile no kernel of ours."""
    import triton

    (model, codec), compiled = half(codec), []
    knobs = triton.knobs.runtime
    with enable(model, codec=codec) as handle, pytest.MonkeyPatch.context() as patch:
        generate(model, prompt(200))
        hook = lambda **kernel: compiled.append(kernel["fn"].name)  # noqa: E731
        patch.setattr(knobs, "jit_post_compile_hook", hook)
        for tokens in (1, 16, 63, 100, 333, 511, 640, 1000):
            generate(model, prompt(tokens))
            generate(model, prompt(tokens), **{CACHE: handle.new_cache()})
        assert compiled == []
        handle.disable()
        with enable(model, "exact"):  # other kernels: the hook sees them
            generate(model, prompt(200))
        assert compiled


@on_cuda
@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_peak_memory_is_what_nbytes_claims(preset: str) -> None:
    """Over the peak of the same prompt without a cache, which is weights and activations."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
    model = tiny(**sizes, **heads, max_position_embeddings=32768).half()
    made = calibrate.calibrate(model, prompt(600)["input_ids"], "balanced", progress=False)
    inputs, options = prompt(16000, rows=2), {"max_new_tokens": 20, "min_new_tokens": 20}

    def peak() -> float:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    with enable(model, preset, codec=made):
        generate(model, prompt(20, rows=2))  # a workspace of cuBLAS on the stream of captures
        with torch.no_grad():
            model(**inputs, use_cache=False, logits_to_keep=1)  # and on this one
            idle = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            model(**inputs, use_cache=False, logits_to_keep=1)
        dense = peak()
        torch.cuda.reset_peak_memory_stats()
        out = generate(model, inputs, **options, return_dict_in_generate=True)
        assert 0.95 < (peak() - dense) / out[CACHE].nbytes < 1.05
    del out
    assert torch.cuda.memory_allocated() <= idle  # all is free


@on_cuda
def test_generate_reuses_the_graph_of_its_pooled_cache(codec: ModelCodec) -> None:
    model, codec = half(codec)
    with enable(model, codec=codec) as handle:
        first = generate(model, prompt(200))
        graph = handle._pool[1].graph
        assert graph is not None
        generate(model, prompt(90, seed=3))
        assert torch.equal(generate(model, prompt(200)), first)
        assert handle._pool[1].graph is graph
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0))
        flipped = generate(model, prompt(200))
        assert handle._pool[1].graph is not graph  # it would read the old weights
    assert not torch.equal(flipped, first)


@on_cuda
def test_a_model_that_cannot_be_captured_runs_without(codec: ModelCodec) -> None:
    (model, codec), inputs = half(codec), prompt(100)
    random = {"do_sample": True, "disable_compile": True}
    with enable(model, codec=codec, graph=False):
        expected = generate(model, inputs)

    def waits(module: Any, args: Any, output: torch.Tensor) -> None:
        float(output.sum())

    with model.model.norm.register_forward_hook(waits), enable(model, codec=codec) as handle:
        with pytest.warns(UserWarning, match="cannot be captured"):
            assert torch.equal(generate(model, inputs), expected)
        assert not handle.graph
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(generate(model, inputs), expected)
            sampled = generate(model, inputs, **random)  # random numbers come as before
    with enable(model, codec=codec, graph=False):
        assert torch.equal(generate(model, inputs, **random), sampled)


# ---- on and off ----------------------------------------------------------------------------------


def state(model: Any) -> tuple[Any, ...]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    hooks = [
        (name, *(len(getattr(module, kind)) for kind in kinds))
        for name, module in model.named_modules()
    ]
    attributes = [(name, sorted(vars(module))) for name, module in model.named_modules()]
    config = (model.config._attn_implementation, model.config.to_dict())
    generation = copy.deepcopy(getattr(model, "generation_config", None))
    return hooks, attributes, config, generation


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_disable_restores_the_model(implementation: str) -> None:
    model, inputs = tiny(attn_implementation=implementation), prompt(20)
    before, dense = state(model), model(**inputs).logits
    handle = enable(model, "exact")
    assert state(model) != before
    handle.disable()
    assert state(model) == before
    handle.disable()
    assert state(model) == before
    assert torch.equal(model(**inputs).logits, dense)
    with pytest.raises(KeyError), enable(model, "exact"):
        raise KeyError
    assert state(model) == before
    with enable(model, "exact"), enable(tiny(), "exact"):  # again, and two models at a time
        generate(model, inputs)
    assert state(model) == before


def test_a_forward_that_somebody_patched_comes_back() -> None:
    """accelerate's hooks, for one."""
    model, calls = tiny(), []
    original = model.model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    model.model.forward = counted
    with enable(model, "exact", graph=False, check=False):
        generate(model, prompt(5), max_new_tokens=2, min_new_tokens=2)
    assert model.model.forward is counted and len(calls) == 2


def test_a_model_that_shares_the_config_object_stays_dense() -> None:
    model, inputs = tiny(), prompt(20, rows=2, padding=(5, 0))
    other = type(model)(model.config).eval().to(cases.DEVICE)
    dense = generate(other, inputs)
    with enable(model, "exact"):
        out = generate(other, inputs, return_dict_in_generate=True)
    assert torch.equal(out.sequences, dense)
    assert type(out[CACHE]) is DynamicCache


@pytest.mark.parametrize("name", sorted({"past_key_values", CACHE}))
def test_the_decoder_takes_a_cache_by_every_name_and_by_place(name: str) -> None:
    """Since transformers 5.24 its name is `cache`; it renames the old keyword itself, but later."""
    model, ids = tiny(), prompt(6)["input_ids"]
    with enable(model, "exact") as handle, torch.no_grad():
        cache = handle.new_cache()
        assert model.model(ids[:, :2], **{name: cache})[CACHE] is cache
        assert model.model(ids[:, 2:4], None, None, cache)[CACHE] is cache
        # The new name wins, as it does in transformers.
        assert model.model(ids[:, 4:], **{"past_key_values": None, CACHE: cache})[CACHE] is cache
    assert cache.columns == 6


# ---- the codec -----------------------------------------------------------------------------------


def test_a_codec_is_found_or_made_once_and_kept(
    codec: ModelCodec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, made = tiny(), []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def calibrated(model: Any, tokenizer: Any, preset: str) -> ModelCodec:
        made.append((tokenizer, preset))
        return codec

    monkeypatch.setattr(calibrate, "calibrate", calibrated)
    for _ in range(2):
        with enable(model, tokenizer="words") as handle:
            assert handle.preset == handle.codec.preset == "balanced"
    assert made == [("words", "balanced")]
    assert "calibrating" in capsys.readouterr().err
    (path,) = tmp_path.rglob("*.safetensors")
    assert path == calibrate.cache_path(calibrate.fingerprint(model), "balanced")
    with enable(model, "small", codec=path) as handle:
        assert handle.preset == "balanced"  # the codec's
    monkeypatch.setattr(ModelCodec, "save", lambda *args: (_ for _ in ()).throw(OSError("full")))
    path.unlink()
    with pytest.warns(UserWarning, match="not kept: full"), enable(model):
        pass


def test_a_codec_of_another_model_is_refused(codec: ModelCodec, tmp_path: Path) -> None:
    others = {
        "this model's": tiny(vocab_size=VOCAB - 2),
        "expected 1 layers of .*, got 2 layers of ": tiny(num_hidden_layers=1),
        r"expected 2 layers of \(KV heads, D\) \[\(4, 64\)\], got .* \[\(2, 64\)\]": tiny(
            num_key_value_heads=4
        ),
        r"\(2, 128\)\], got 2 layers of": tiny(head_dim=128),
    }
    anonymous = ModelCodec(codec.layers, codec.sinks, codec.window)
    for message, model in others.items():
        before = state(model)
        with pytest.raises(ValueError, match=message):
            enable(model, codec=codec if message == "this model's" else anonymous)
        assert state(model) == before
    with pytest.raises(OSError):
        enable(tiny(), codec=tmp_path / "nowhere.safetensors")
    enable(tiny(), codec=anonymous).disable()


# ---- refused before anything changes -------------------------------------------------------------


def test_bf16_is_refused_on_old_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is changed; as fp16 the model is taken."""
    monkeypatch.setattr(_launch, "has_matrix_units", lambda device: False)
    model = tiny().to(torch.bfloat16)
    before = state(model)
    with pytest.raises(TypeError, match=r"model: expected fp16 or fp32 on a card before sm_80"):
        enable(model, "exact")
    assert state(model) == before
    enable(model.to(torch.float16), "exact").disable()


REFUSED_MODELS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "not_a_model": (lambda: torch.nn.Linear(2, 2), TypeError, "model: expected a transformers"),
    "no_head": (lambda: tiny().model, NotImplementedError, "ForCausalLM"),
    "sliding": (
        lambda: tiny("mistral", sliding_window=64), NotImplementedError, "stays dense"
    ),
    "capped_scores": (
        lambda: tiny("gemma2", layer_types=["full_attention"] * 2, attn_implementation="eager"),
        NotImplementedError, "softmax",
    ),
    "float64": (lambda: tiny().double(), ValueError, "dtype"),
    "head_dim": (lambda: tiny(head_dim=32), ValueError, "head_dim"),
    "flex": (lambda: tiny(attn_implementation="flex_attention"), ValueError, "flex_attention"),
    "attentions": (
        lambda: tiny(attn_implementation="eager", output_attentions=True), ValueError,
        "output_attentions",
    ),
    "meta": (lambda: tiny().to("meta"), NotImplementedError, "device meta"),
}  # fmt: skip


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
        ({"preset": "exact", "max_tokens": 0}, ValueError, "max_tokens"),
        ({"sinks": 4}, TypeError, "sinks"),
    ],
)
def test_enable_refuses_an_argument(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
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
        with pytest.raises(RuntimeError, match=r"disable\(\) before a copy"):
            copy.deepcopy(model)  # its forward would be the original's
        assert state(model) == before


def _static(model: Any) -> dict[str, Any]:
    return {CACHE: StaticCache(config=model.config, max_cache_len=32)}


REFUSED_CALLS: dict[str, tuple[Callable[[Any], dict[str, Any]], type[Exception], str]] = {
    "output_attentions": (lambda model: {"output_attentions": True}, ValueError, "no weights"),
    "dynamic_cache": (lambda model: {CACHE: DynamicCache()}, TypeError, "DynamicCache"),
    "static_cache": (_static, TypeError, "StaticCache"),
    "right_padding": (
        lambda model: {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}, ValueError,
        "right padding",
    ),
    "holes": (
        lambda model: {"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1]])}, ValueError, "holes"
    ),
    "only_padding": (
        lambda model: {"attention_mask": torch.zeros(1, 6)}, ValueError, "a token in every row"
    ),
    "short_mask": (
        lambda model: {"attention_mask": torch.ones(1, 5)}, ValueError, r"shape \[1, 6\]"
    ),
    "4d_mask": (
        lambda model: {"attention_mask": torch.ones(1, 1, 6, 6).bool()}, ValueError, "2-D"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED_CALLS))
def test_forward_refuses(case: str) -> None:
    make, error, message = REFUSED_CALLS[case]
    model, inputs = tiny(), prompt(6)
    arguments = {
        name: x.to(cases.DEVICE) if isinstance(x, torch.Tensor) else x
        for name, x in make(model).items()
    }
    with enable(model, "exact"), torch.no_grad():
        expected = model(inputs["input_ids"]).logits
        with pytest.raises(error, match=message):
            model(inputs["input_ids"], **arguments)
        assert torch.equal(model(inputs["input_ids"]).logits, expected)


@pytest.mark.parametrize("name", ["batch", "max_tokens"])
def test_a_cache_of_no_rows_or_no_room_is_refused(name: str) -> None:
    with enable(tiny(), "exact") as handle:
        for count in (0, -3, 2.5, "2"):
            with pytest.raises(ValueError, match=f"{name}: expected an integer of at least 1"):
                handle.new_cache(**{name: count})


def test_forward_refuses_on_a_filled_cache_and_leaves_it() -> None:
    model, inputs = tiny(), prompt(20, rows=2, padding=(3, 0))
    ids, mask = inputs["input_ids"][:, 15:], inputs["attention_mask"]
    with enable(model, "exact") as handle, torch.no_grad():
        _, cache = feed(model, inputs, [15], handle.new_cache())
        for arguments, message in (
            ({"attention_mask": torch.ones_like(mask)}, "padding"),
            ({"attention_mask": mask[:, 15:]}, "shape"),
            ({"input_ids": ids[:1]}, "2 rows"),
            ({"input_ids": ids[:, :0]}, "no new token"),
        ):
            with pytest.raises(ValueError, match=message):
                model(**{"input_ids": ids, CACHE: cache, **arguments})
        with torch.enable_grad(), pytest.raises(ValueError, match="no gradient"):
            model(ids, **{CACHE: cache})
        assert (cache.columns, cache.spectral.lengths, cache.padding) == (15, [12, 15], [3, 0])
        assert cache.spectral.seq_lens.tolist() == [12, 15]
        model(ids, attention_mask=mask, **{CACHE: cache})
        assert cache.spectral.lengths == cache.spectral.seq_lens.tolist() == [17, 20]


def test_training_uses_no_cache() -> None:
    model, inputs = tiny(), prompt(6)
    with enable(model, "exact"):
        model.train()
        with pytest.raises(ValueError, match="evaluation mode or use_cache=False"):
            model(**inputs)
        model(**inputs, use_cache=False).logits.sum().backward()
        model.eval()
        model(**inputs)


def test_another_kind_of_cache_is_refused_by_generate() -> None:
    model, inputs = tiny(), prompt(6)
    asked: dict[str, Any] = {"cache_implementation": "static"}
    if VERSION < (5, 0):
        asked |= {"return_legacy_cache": True}
    with enable(model, "exact"):
        for name, value in asked.items():
            with pytest.raises(ValueError, match=f"{name}: expected .* while enabled, got"):
                generate(model, inputs, return_dict_in_generate=True, **{name: value})


@pytest.mark.parametrize("new", [1, 5])
def test_generate_refuses_another_mask_of_what_a_cache_holds(new: int) -> None:
    """Also where one token is new, whose step would not read it."""
    model, inputs = tiny(), prompt(20, rows=2, padding=(3, 0))
    with enable(model, "exact") as handle, torch.no_grad():
        _, cache = feed(model, inputs, [20 - new], handle.new_cache())
        for at, message in (
            ((1, 2), "holes"),
            ((0, slice(3, 5)), r"padding \[3, 0\], got \[5, 0\]"),
        ):
            mask = inputs["attention_mask"].clone()
            mask[at] = 0
            with pytest.raises(ValueError, match=f"attention_mask: .*{message}"):
                generate(model, {**inputs, "attention_mask": mask}, **{CACHE: cache})
        assert cache.columns == 20 - new
        ours = generate(model, inputs, **{CACHE: cache})
    assert torch.equal(ours, generate(model, inputs))


def test_a_cache_keeps_its_rows() -> None:
    """Where transformers' own would take or repeat some of them: refused, and nothing done."""
    model, inputs = tiny(), prompt(20, rows=3)
    with enable(model, "exact") as handle, torch.no_grad():
        _, cache = feed(model, inputs, [20], handle.new_cache())
        for call, rows in (
            (lambda: cache.batch_select_indices(torch.tensor([2, 0])), 2),
            (lambda: cache.batch_repeat_interleave(2), 6),
        ):
            with pytest.raises(NotImplementedError, match=f"{CACHE}: expected 3 rows, got {rows}"):
                call()
        assert cache.spectral.lengths == [20] * 3
        cache.batch_select_indices(torch.tensor([2, 0, 1]))
        cache.batch_repeat_interleave(1)
        ours = model(inputs["input_ids"][[2, 0, 1], :1], **{CACHE: cache}).logits
        cache = handle.new_cache()
        model(inputs["input_ids"][[2, 0, 1]], **{CACHE: cache})
        again = model(inputs["input_ids"][[2, 0, 1], :1], **{CACHE: cache}).logits
        assert torch.allclose(ours, again, atol=1e-5)


@pytest.mark.parametrize("what", ["cache", "handle", "model"])
def test_what_cannot_be_pickled_says_so(what: str) -> None:
    """By its name, not by that of what is somewhere inside; nor is a shallow copy a cache's."""
    model = tiny()
    with enable(model, "exact") as handle, torch.no_grad():
        _, cache = feed(model, prompt(20), [20], handle.new_cache())
        given = {"cache": cache, "handle": handle, "model": model}[what]
        name = {"cache": rf"{CACHE}: copy\.deepcopy"}.get(what, r"model: disable\(\) before a copy")
        for copied in (pickle.dumps, copy.copy) if what == "cache" else (pickle.dumps,):
            with pytest.raises(RuntimeError, match=name):
                copied(given)


def test_an_attention_that_did_not_run_is_an_error() -> None:
    """Every silent failure of such adapters: something else attends, over too few tokens."""
    model, inputs = tiny(), prompt(6)
    with enable(model, "exact") as handle, torch.no_grad():
        name = model.config._attn_implementation
        model.config._attn_implementation = "sdpa"
        with pytest.raises(RuntimeError, match=r"layer 0: its cache took tokens"):
            model(**inputs)
        model.config._attn_implementation = name
        attention = model.model.layers[1].self_attn
        forward = attention.forward

        def uncached(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **{**kwargs, CACHE: None})

        attention.forward = uncached
        with pytest.raises(RuntimeError, match=r"layer 1: its cache took no tokens"):
            model(**inputs)
        del attention.forward
        assert torch.isfinite(model(**inputs).logits).all()
        with pytest.raises(RuntimeError, match="while enabled"):
            handle.new_cache().update(torch.zeros(1, 2, 1, 64), torch.zeros(1, 2, 1, 64), 0)


def test_a_cache_works_in_its_enabled_model_only() -> None:
    model, other, inputs = tiny(), tiny(), prompt(6)
    handle = enable(model, "exact")
    cache = feed(model, inputs, [6], handle.new_cache())[1]
    options = {CACHE: cache}
    with torch.no_grad():
        with enable(other, "exact"), pytest.raises(ValueError, match="of this model"):
            other(inputs["input_ids"], **options)
        handle.disable()
        with pytest.raises(RuntimeError, match="while enabled"):
            model(inputs["input_ids"], **options)
        with enable(model, "exact"), pytest.raises(ValueError, match="this enable"):
            model(inputs["input_ids"], **options)


def test_a_forward_that_fails_half_way_is_not_built_upon(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny(), prompt(6)
    with enable(model, "exact") as handle, torch.no_grad():
        cache = handle.new_cache()
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[1], "forward", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(**inputs, **{CACHE: cache})
            with pytest.raises(ZeroDivisionError):
                generate(model, inputs)
        with pytest.raises(ValueError, match="half-way"):
            model(**inputs, **{CACHE: cache})
        cache.reset()
        assert torch.equal(model(**inputs, **{CACHE: cache}).logits, model(**inputs).logits)
        generate(model, inputs)  # through the pooled cache that had failed
