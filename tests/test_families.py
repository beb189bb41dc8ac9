"""Families of transformers: a fast part of `python -m tests.families`, and what a mixed cache does
in generate(): windows, convolutions and linear attention beside ours."""

from __future__ import annotations

import contextlib
import copy
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from spectral_kernels import calibrate, hf  # noqa: E402
from spectral_kernels._model import layers_of, stays, tensors_of, windows_of  # noqa: E402
from spectral_kernels.codec import ModelCodec  # noqa: E402
from spectral_kernels.hf import (  # noqa: E402
    CACHE,
    SLACK,
    ModelCache,
    SpectralLayer,
    WindowLayer,
    enable,
)
from tests import cases, families  # noqa: E402
from tests.families import VERSION, build, examine, generate, prompt  # noqa: E402
from tests.test_hf import FakeGraph, check_one_graph, single_thread  # noqa: E402, F401

pytestmark = pytest.mark.skipif(cases.DEVICE.type == "cuda", reason="a table of CPU models")
# One of each kind: plain, windows, learned sinks, convolution, linear attention, chunks.
KINDS = {"phi": 2, "gemma3": 4, "gpt_oss": 4, "lfm2": 2, "qwen3_next": 2, "llama4": 2}
MIXED = ("gemma3", "gpt_oss", "lfm2", "qwen3_next")
REFUSED = {
    "gemma2": "plain softmax .*softcapping; it stays dense",
    "gemma3n": "keys of its own in every layer; it stays dense",
    "mistral, windows": "layers with full attention and no more.*; it stays dense",
    "deepseek_v3": r"MLA.*; it stays dense",
    "diffllama": "it does more than softmax; it stays dense|attention function 'spectral' did not"
    "|does not call transformers' attention interface",
    "bloom": "transformers' attention interface; it stays dense",
}


def needs(name: str) -> None:
    """Releases before 5.17 keep states of convolutions and linear attention elsewhere."""
    if name in ("lfm2", "qwen3_next") and VERSION < (5, 17):
        pytest.skip("its state is outside the Cache")


@pytest.mark.parametrize("name", list(KINDS))
def test_a_family_works(name: str) -> None:
    needs(name)
    row = examine(name, ["balanced"])
    assert (row.why, row.ours, row.equal, row.restored) == ("", KINDS[name], True, True)
    assert row.works and "yes" in str(row)
    row.steps = "differ"  # replayed ones, on a GPU
    assert not row.works


def test_a_model_of_pictures_and_text() -> None:
    """It makes masks, in which pictures see all of themselves, before its decoder is called."""
    text = {**families.BASE, **families.WINDOW}
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
    eyes = {**sizes, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    tokens = {"image_token_index": 500, "boi_token_index": 501, "eoi_token_index": 502}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**eyes, "patch_size": 14}, mm_tokens_per_image=4, **tokens,
        tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros
    words = prompt(90, rows=2, padding=(7, 0))
    words["input_ids"] %= 490
    seen = {name: x[1:].clone() for name, x in words.items()}
    seen["input_ids"][0, 20:24] = 500
    seen["token_type_ids"] = (seen["input_ids"] == 500).long()
    seen["pixel_values"] = torch.randn(1, 3, 28, 28)
    dense = [generate(model, inputs) for inputs in (words, seen)]
    unlike = generate(model, {**seen, "pixel_values": torch.randn(1, 3, 28, 28)})
    assert not torch.equal(unlike, dense[1])
    with enable(model, "exact") as handle:
        assert len(handle.links) == 4
        for inputs, tokens in zip((words, seen), dense, strict=True):
            out = generate(model, inputs, return_dict_in_generate=True)
            assert torch.equal(out.sequences, tokens)
            lengths = inputs["attention_mask"].sum(-1) + 11  # the last token is not fed back
            assert out[CACHE].spectral.lengths == lengths.tolist()


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_refusal_says_what_to_do(name: str) -> None:
    row = examine(name)
    if not row.why.startswith("not in transformers"):
        assert row.restored and not row.works
        with pytest.raises((NotImplementedError, ValueError), match=REFUSED[name]):
            enable(build(name), "exact")


@pytest.mark.skipif(VERSION >= (5, 17), reason="its state is in the Cache")
@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_a_state_outside_the_cache_is_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match="a newer one"):
        enable(build(name), "exact")


@pytest.fixture(scope="module")
def mixed() -> dict[str, tuple[Any, ModelCodec]]:
    """Models and their codecs, made when asked for."""
    return {}


def made(mixed: dict[str, tuple[Any, ModelCodec]], name: str) -> tuple[Any, ModelCodec]:
    needs(name)
    if name not in mixed:
        model = build(name)
        ids = prompt(600, rows=2, padding=(11, 0))["input_ids"][1:]
        made = calibrate.calibrate(model, ids, "balanced", progress=False)
        mixed[name] = model, replace(made, window=16)
    return mixed[name]


WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 32},
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("name", MIXED)
def test_ways_to_generate_on_a_mixed_cache(name: str, way: str, mixed: Any) -> None:
    model, _ = made(mixed, name)
    inputs = prompt(90, rows=2, padding=(11, 0))
    if way == "chunks":  # transformers 4 miscounts padded rows
        inputs = {key: x[1:] for key, x in inputs.items()}
    found = []
    for on in (False, True):
        torch.manual_seed(3)
        with enable(model, "exact") if on else warnings.catch_warnings():
            found.append(generate(model, inputs, **WAYS[way]))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", MIXED)
def test_prompt_lookup_on_a_mixed_cache(name: str, mixed: Any) -> None:
    """Drafts are taken back from all layers, or transformers says that they cannot be."""
    model, _ = made(mixed, name)
    inputs = {key: x[1:] for key, x in prompt(90, rows=2, padding=(11, 0)).items()}
    inputs["input_ids"] = torch.cat([inputs["input_ids"][:, :30]] * 3, dim=1)
    found: list[Any] = []
    for on in (False, True):
        with enable(model, "exact") if on else warnings.catch_warnings():
            try:
                found.append(generate(model, inputs, prompt_lookup_num_tokens=5).tolist())
            except (ValueError, RuntimeError) as error:
                found.append(type(error))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", MIXED)
def test_chat_crop_copy_and_reset_of_a_mixed_cache(name: str, mixed: Any) -> None:
    model, codec = made(mixed, name)
    inputs = {key: x[1:] for key, x in prompt(150, rows=2, padding=(11, 0)).items()}
    ids = inputs["input_ids"]
    with enable(model, codec=codec) as handle, torch.no_grad():
        cache = handle.new_cache()
        for _ in range(2):
            model(ids[:, :100], **{CACHE: cache})
            twin = copy.deepcopy(cache)
            parts = [model(ids[:, 100:110], **{CACHE: x}).logits for x in (cache, twin)]
            assert torch.equal(*parts)
            assert twin.get_seq_length() == cache.get_seq_length() == cache.columns == 110
            cache.reset()
        whole = handle.new_cache()
        a = generate(model, {key: x[:, :100] for key, x in inputs.items()}, **{CACHE: whole})
        more = {"input_ids": torch.cat((a, ids[:, :40]), dim=1)}
        more["attention_mask"] = torch.ones_like(more["input_ids"])
        b = generate(model, more, **{CACHE: whole})
        assert whole.columns == b.shape[1] - 1
    with enable(model, "exact") as handle:
        kept = handle.new_cache()
        a = generate(model, {key: x[:, :100] for key, x in inputs.items()}, **{CACHE: kept})
        more["input_ids"] = torch.cat((a, ids[:, :40]), dim=1)
        b = generate(model, more, **{CACHE: kept})
    dense = transformers.DynamicCache(config=model.config)
    c = generate(model, {key: x[:, :100] for key, x in inputs.items()}, **{CACHE: dense})
    assert torch.equal(a, c)
    assert torch.equal(generate(model, more, **{CACHE: dense}), b)


def test_a_mixed_cache_counts_all_its_bytes(mixed: Any) -> None:
    model, codec = made(mixed, "gemma3")
    with enable(model, codec=codec) as handle, torch.no_grad():
        cache = handle.new_cache(max_tokens=512)
        model(prompt(100, rows=2)["input_ids"], **{CACHE: cache})
    ours = [type(layer) for layer in cache.layers]
    assert ours == [WindowLayer, SpectralLayer] * 2
    # Rings of 64 and SLACK tokens: 2 layers, K and V, 2 rows, 2 heads, 64 dimensions, float32.
    assert cache.nbytes == cache.spectral.nbytes + 2 * 2 * 2 * 2 * (64 + SLACK) * 64 * 4
    full = layers_of(model)
    assert [layer.index for layer in full] == [1, 3] and cache.is_compileable
    assert [(x.index, x.window) for x in windows_of(model, full)] == [(0, 64), (2, 64)]


class FixedGraph(FakeGraph):
    """Sees that states stay where they are."""

    def __init__(self, forward: Any, cache: ModelCache, *_: Any) -> None:
        super().__init__(forward, cache)
        self.kept = [x for y in cache.layers for x in tensors_of(y)]

    def replay(self, cache: ModelCache, ids: torch.Tensor, positions: torch.Tensor) -> Any:
        out = super().replay(cache, ids, positions)
        now = [x for layer in cache.layers for x in tensors_of(layer)]
        assert [x.data_ptr() for x in now] == [x.data_ptr() for x in self.kept]
        return out


@pytest.mark.parametrize("name", MIXED)
def test_states_at_fixed_addresses_are_replayed(
    name: str, mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captures run the step three times and must leave no trace; states stay where they are."""
    model, codec = made(mixed, name)
    inputs = prompt(90, rows=2, padding=(11, 0))
    options = {"return_dict_in_generate": True, "output_logits": True}
    with enable(model, codec=codec):
        expected = torch.stack(generate(model, inputs, **options).logits)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(hf, "_StepGraph", FixedGraph)
    with enable(model, codec=codec) as handle:
        handle.graph = True
        for _ in range(2):
            logits = torch.stack(generate(model, inputs, **options).logits)
            assert torch.equal(logits, expected)
        generate(model, inputs)
        assert isinstance(handle._pool[2].graph, FixedGraph)
        cache = handle._pool[2]
        assert cache.static
        if not cache.others:
            return
        cache.activate_past_recording()
        assert not cache.static  # states grow then: no graph
        cache.reset()
        assert cache.static and cache.graph is None  # fresh ones, at other addresses


# Prompts and steps at and over: an empty ring, the window of 64, the ring of 128, room of 512.
WINDOWS = (1, 63, 65, 127, 129, 505)


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
@pytest.mark.parametrize("tokens", WINDOWS)
def test_tokens_over_the_borders_of_a_window(name: str, tokens: int, mixed: Any) -> None:
    """Alone and in a row with padding, in chunks, and with drafts of up to the longest step."""
    model, _ = made(mixed, name)
    inputs = prompt(tokens, rows=2, padding=(tokens // 3, 0))
    new = {"max_new_tokens": 70, "min_new_tokens": 70}
    alone = {key: x[1:] for key, x in inputs.items()}
    ways: list[tuple[Any, dict[str, Any]]] = [(inputs, {})]
    if VERSION >= (5, 0) or tokens > 1:  # transformers 4 wants more than one token for chunks
        ways.append((alone, {"prefill_chunk_size": 48}))
    if VERSION >= (5, 17):
        ways.append((alone, {"prompt_lookup_num_tokens": hf.MAX_STEP - 1}))
    for given, options in ways:
        dense = generate(model, given, **new)
        with enable(model, "exact"):
            assert torch.equal(generate(model, given, **new, **options), dense)


def test_a_ring_that_grows_and_is_cropped(mixed: Any) -> None:
    """The window is longer than the first room; 64 tokens can be taken back, no more."""
    model = build("gemma3", sliding_window=600)
    ids = prompt(900, rows=2)["input_ids"][1:]
    dense = model(ids, use_cache=False).logits
    with enable(model, "exact") as handle, torch.no_grad():
        cache, seen = handle.new_cache(1, 512), []
        for part in ids.split([500, 20, 1, 3, 298, 78], dim=1):
            seen.append(model(part, **{CACHE: cache}).logits)
        assert cache.layers[0].keys.shape[2] == 600 + SLACK and cache.capacity == 1024
        torch.testing.assert_close(torch.cat(seen, dim=1), dense, rtol=1e-4, atol=1e-4)
        with pytest.raises(RuntimeError, match="64 tokens to crop"):
            cache.crop(-66)
        assert cache.columns == 900
        for back in (40, 25):  # together as many as there are
            cache.crop(-back)
        again = model(ids[:, 835:], **{CACHE: cache}).logits
        torch.testing.assert_close(again, dense[:, 835:], rtol=1e-4, atol=1e-4)
        with pytest.raises(RuntimeError, match="64 tokens to crop"):
            cache.crop(-66)


def test_rings_that_do_not_grow_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All or none: a shorter prompt after it still finds the tokens before."""
    model, pad, calls = build("gemma3", sliding_window=600), torch.nn.functional.pad, []
    ids = prompt(500, rows=2)["input_ids"][1:]

    def full(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:  # keys and values of one layer have grown
            raise torch.OutOfMemoryError
        return pad(*args)

    with enable(model, "exact") as handle, torch.no_grad():
        cache = handle.new_cache(1, 512)
        model(ids[:, :400], **{CACHE: cache})
        monkeypatch.setattr(torch.nn.functional, "pad", full)
        with pytest.raises(torch.OutOfMemoryError):
            model(torch.cat((ids[:, 400:], ids[:, 400:]), dim=1), **{CACHE: cache})
        assert len(calls) == 3 and (cache.columns, cache.capacity) == (400, 512)
        again = model(ids[:, 400:], **{CACHE: cache}).logits
        again = torch.cat((again, model(ids[:, :1], **{CACHE: cache}).logits), dim=1)
    dense = model(torch.cat((ids, ids[:, :1]), dim=1), use_cache=False).logits[:, 400:]
    torch.testing.assert_close(again, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_steps_with_windows_compile_as_one_graph(name: str, mixed: Any) -> None:
    if name == "gpt_oss" and VERSION < (5, 0):
        pytest.skip("its experts are a loop over what the device says")
    model, codec = made(mixed, name)
    check_one_graph(
        model, codec, partial(generate, inputs=prompt(90, rows=2, padding=(11, 0))), times=1
    )


def test_the_operator_of_a_window_is_what_it_says() -> None:
    x = torch.randn(2, 6, 3, 64)
    lengths, scores = torch.tensor([5, 90], dtype=torch.int32), torch.randn(4)
    rings = torch.zeros(2, 2, 40, 64), torch.zeros(2, 2, 40, 64)
    arguments = (x[:, :4], x[:, 4:], x[:, 4:] + 1, *rings, lengths, 16, 0.125, scores)
    torch.library.opcheck(torch.ops.spectral_kernels.window_step.default, arguments)


def test_states_made_in_inference_mode_are_written_outside_it() -> None:
    needs("lfm2")
    model, inputs = build("lfm2"), prompt(40, rows=2, padding=(11, 0))
    dense = generate(model, inputs)
    with enable(model, "exact"):
        with torch.inference_mode():
            assert torch.equal(generate(model, inputs), dense)
        assert torch.equal(generate(model, inputs), dense)


def test_a_ring_moves_with_its_rows(mixed: Any) -> None:
    """After a reorder both rows go on as the second: with its tokens, in windows too."""
    model, ids = build("gemma3"), prompt(100, rows=2)["input_ids"]
    dense = model(ids[1:], use_cache=False).logits[:, -1]
    with enable(model, "exact") as handle, torch.no_grad():
        cache = handle.new_cache(2, 512)
        model(ids[:, :99], **{CACHE: cache})
        cache.reorder_cache(torch.tensor([1, 1]))
        for row in model(ids[1:, 99:].expand(2, 1), **{CACHE: cache}).logits[:, -1]:
            torch.testing.assert_close(row[None], dense, rtol=1e-4, atol=1e-4)


def test_a_cuda_graph_wants_state_that_stays(mixed: Any) -> None:
    for name, moving in (("gemma3", ""), ("llama4", "DynamicSlidingWindowLayer")):
        model = build(name)
        full = layers_of(model)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert stays(model.config, full + windows_of(model, full)) == (not moving)
        texts = [str(warning.message) for warning in said]
        assert texts == [f"spectral_kernels: no CUDA graph with {moving}: eager steps"] * bool(
            moving
        )


def test_learned_sinks_take_their_share(mixed: Any) -> None:
    """Steps of gpt-oss without them differ, and `enable` sees it."""
    model, _ = made(mixed, "gpt_oss")
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.sinks, 2.0)
    step = torch.ops.spectral_kernels.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.ops.spectral_kernels, "step", lambda *args: step(*args[:-1], None), raising=False
        )
        with pytest.raises(NotImplementedError, match="layer 1: its attention and the cache's"):
            enable(model, "exact")
    enable(model, "exact").disable()


def test_the_table_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(families.FAMILIES) >= 60
    assert families.main(["gemma2", "llama"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "1 work, 1 refused, 0 fail"
    assert lines[-2].split()[:6] == ["llama", "2", "of", "2", "yes", "3"]
