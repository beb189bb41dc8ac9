"""The plugin in vLLM's CPU build: its real scheduler, block manager and workers, our twins.

    .ci/run installs that build in an environment of its own, .ci/venv-vllm; elsewhere skipped.
    On a GPU: test_recall, with as many ranks as there are cards, and python -m tests.serving.

Models are small and in float32. Preset exact gives the tokens of vLLM's own backend whatever the
scheduler does; what a coded page may lose is bounded by half a step of an 8-bit codec
(`eight_bit_codec`); other relations are between runs of the plugin.
"""

from __future__ import annotations

import functools
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

vllm = pytest.importorskip("vllm")
CUDA = torch.cuda.is_available()

os.environ.update(
    VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR", OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_USE_FLASHINFER_SAMPLER="0", VLLM_WORKER_MULTIPROC_METHOD="spawn",
)  # fmt: skip

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory  # noqa: E402
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402

from perf._cases import random_codec  # noqa: E402
from perf.tiny_model.recall import make_recall_contexts  # noqa: E402
from spectral_kernels import vllm as plugin  # noqa: E402
from spectral_kernels._requests import Rows  # noqa: E402
from spectral_kernels.codec import ModelCodec  # noqa: E402
from spectral_kernels.layout import PAGE_SIZE, Bands, PageLayout  # noqa: E402
from spectral_kernels.rope import freqs_from_inv_freq  # noqa: E402
from tests.serving import eight_bit_codec  # noqa: E402

RECALL = Path(__file__).parents[1] / "perf" / "tiny_model"
LENGTHS = (70, 200, 9, 700, 1, 3, 130)
LARGEST = 8.0  # of keys and values of the small model (tests/test_hf.py)
DENSE = 2 * 2 * 2 * 64 * 4 * PAGE_SIZE  # bytes of a dense block: layers, K and V, heads, dimension
EXACT = {"preset": "exact"}


@pytest.fixture(autouse=True)
def on_a_gpu(request: pytest.FixtureRequest) -> None:
    if CUDA and request.function is not test_recall:
        pytest.skip("on a GPU: python -m tests.serving")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, four query and two KV heads of 64."""
    where = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=512, max_position_embeddings=1024,
        tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The settings with an 8-bit codec of that model."""
    path = tmp_path_factory.mktemp("codec") / "codec.safetensors"
    eight_bit_codec(2, 2, 64, freqs(), LARGEST).save(path)
    return {"codec": str(path)}


def freqs() -> torch.Tensor:
    return freqs_from_inv_freq(10000.0 ** (-torch.arange(0, 64, 2).double() / 64))


@contextmanager
def serving(
    model: Path, spectral: dict[str, str] | None, blocks: int = 0, **options: Any
) -> Iterator:
    """An engine in this process. blocks: bytes of its pool, as dense blocks."""
    settings: dict[str, Any] = {
        "skip_tokenizer_init": True, "dtype": "float32", "block_size": PAGE_SIZE, "seed": 0,
        "max_model_len": 1024, "max_num_seqs": 4, "max_num_batched_tokens": 2048,
        "enforce_eager": True, "kv_cache_memory_bytes": (blocks or 256) * DENSE,
        "attention_backend": "CPU_ATTN" if spectral is None else "SPECTRAL",
        "enable_prefix_caching": spectral != EXACT,
        "additional_config": {"spectral": spectral} if spectral else {}, **options,
    }  # fmt: skip
    engine = LLM(model=str(model), **settings)
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()  # now, not when its last name is gone
        plugin._ENGINES.clear()
        cleanup_dist_env_and_memory()


def prompts(*lengths: int, seed: int = 1) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, 512, (n,), generator=generator).tolist() for n in lengths]
    return [{"prompt_token_ids": x} for x in ids]


def generate(engine: LLM, given: list[dict[str, Any]], new: int = 24) -> list[list[int]]:
    sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
    outs = engine.generate(given, sampling, use_tqdm=False)
    return [list(x.outputs[0].token_ids) for x in outs]


def cached(engine: LLM, given: list[dict[str, Any]]) -> list[int]:
    """Tokens that are found of each prompt."""
    sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
    outs = engine.generate(given, sampling, use_tqdm=False)
    return [x.num_cached_tokens for x in outs]


def blocks_of(engine: LLM) -> int:
    return engine.llm_engine.vllm_config.cache_config.num_gpu_blocks


@pytest.fixture(scope="module")
def dense(model: Path) -> list[list[int]]:
    with serving(model, None) as engine:
        assert blocks_of(engine) == 256
        return generate(engine, prompts(*LENGTHS))


def test_exact_is_vllms_own_backend(model, dense, monkeypatch):
    """All prompts at once; and in chunks of at most 64 tokens, beside decodes. Sequences begin and
    end where GPUs' FlashAttention is told."""
    attend = plugin.dense

    def checked(q, k, v, q_bounds, k_bounds, *args: Any, **options: Any) -> Any:
        for x, (bounds, longest) in ((q, q_bounds), (k, k_bounds)):
            assert (bounds[0], bounds[-1], bounds.diff().max()) == (0, len(x), longest)
        return attend(q, k, v, q_bounds, k_bounds, *args, **options)

    monkeypatch.setattr(plugin, "dense", checked)
    with serving(model, EXACT) as engine:
        assert generate(engine, prompts(*LENGTHS)) == dense
    with serving(model, EXACT, max_num_batched_tokens=64) as engine:
        assert generate(engine, prompts(*LENGTHS)) == dense
        assert generate(engine, prompts(*LENGTHS)) == dense, "no page is found again"


def events(engine: LLM, given: list[dict[str, Any]], new: list[int], per_step: float) -> dict:
    """Requests that come while others run: tokens of each, and the steps of all."""
    core, tokens, steps, waiting = engine.llm_engine, {}, 0, list(enumerate(given))
    due = 0.0
    while waiting or core.has_unfinished_requests():
        due += per_step
        while waiting and due >= 1:
            number, prompt = waiting.pop(0)
            sampling = SamplingParams(
                max_tokens=new[number], temperature=0, ignore_eos=True, detokenize=False
            )
            core.add_request(str(number), prompt, sampling)
            due -= 1
        for out in core.step():
            tokens[int(out.request_id)] = list(out.outputs[0].token_ids)
        steps += 1
    return {"tokens": [tokens[i] for i in range(len(given))], "steps": steps}


@pytest.mark.parametrize("kind", ["exact", "coded"])
def test_fifty_that_come_and_go(kind, model, coded, monkeypatch):
    """Requests of random lengths that come while others run get the tokens that they get alone:
    exact ones in chunks and preempted, coded ones with their prompts whole (what is attended
    exactly depends on where a prompt is cut)."""
    rng = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 180, (50,), generator=rng).tolist()
    new = torch.randint(1, 40, (50,), generator=rng).tolist()
    given, preempted, preempt = prompts(*lengths), [], Scheduler._preempt_request

    def watched(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", watched)
    exact = kind == "exact"
    tight = {"kv_cache_memory_bytes": 14 * 4096, "max_num_batched_tokens": 100} if exact else {}
    with serving(
        model, EXACT if exact else coded, max_num_seqs=8, max_model_len=256, **tight
    ) as engine:
        got = events(engine, given, new, per_step=0.25)
    assert got["steps"] >= 200
    assert bool(preempted) == exact
    with serving(model, None if exact else coded, max_num_seqs=1) as engine:
        alone = [generate(engine, [x], n)[0] for x, n in zip(given, new, strict=True)]
    assert got["tokens"] == alone


def test_admits_by_page_bytes(model, tmp_path):
    """Layers of different bands have pages of different bytes, in one group."""
    codec = mixed_codec(tmp_path / "codec.safetensors")
    layers = ModelCodec.load(codec["codec"]).layers
    page = sum(2 * PAGE_SIZE * x.layout.token_bytes for x in layers)
    assert DENSE / page > 12
    with serving(model, codec) as engine:
        assert blocks_of(engine) == 256 * DENSE // page
        found = [impl.layer.kv_cache for impl in plugin._ENGINES[0].layers]
        assert [x.shape[-1] for x in found] == [x.layout.token_bytes for x in layers]
        generate(engine, prompts(70, 200))


def mixed_codec(path: Path) -> dict[str, str]:
    """The settings with a codec of two layers of different bands."""
    layers = tuple(
        random_codec(PageLayout(Bands.parse(k), Bands.parse(v), 64), 2, freqs())
        for k, v in (("16x8+16x4+32x2", "64x4"), ("16x4", "32x2"))
    )
    ModelCodec(layers, sinks=4, window=16).save(path)
    return {"codec": str(path)}


def exact_tokens(length: int) -> list[torch.Tensor]:
    """Sinks and window of the last request of so many tokens: k and v of each layer, [G, S, D]."""
    slots = plugin._ENGINES[0].placing
    (slot,) = (s for key, s in slots._owner.items() if key[0] == length)
    return exact_of(slot)


def exact_of(slot: int) -> list[torch.Tensor]:
    return [x[slot].clone() for i in plugin._ENGINES[0].layers for x in (i.k_exact, i.v_exact)]


def first_of(prompt: dict[str, Any], count: int) -> dict[str, Any]:
    return {"prompt_token_ids": prompt["prompt_token_ids"][:count]}


@pytest.mark.parametrize(
    ("kept", "window"), [(True, 16), (False, 16), (True, 100)], ids=["kept", "lost", "wide"]
)
def test_a_prefix_hit(kept, window, model, tmp_path, monkeypatch):
    """What a hit finds in pages instead of the requests' exact tokens: of the window within half a
    step (keys are turned: an error in each of a pair), the sinks not at all while they are kept.
    The prompt's newest tokens are computed anew, so that the window ends as after a miss: in the
    first layer with the same bits (others have attended to coded pages)."""
    (whole,), step, path = prompts(300), LARGEST / 127, tmp_path / "codec.safetensors"
    cut = (300 - window) // PAGE_SIZE * PAGE_SIZE
    replace(eight_bit_codec(2, 2, 64, freqs(), LARGEST), window=window).save(path)
    rebuilt, start = [], plugin.Engine.start

    def watched(self: Any, rows: Rows, started: list[int], slots: Any, table: Any) -> Any:
        found = start(self, rows, started, slots, table)
        rebuilt.extend((int(rows.past[i]), exact_of(slots[i])) for i in started if rows.past[i])
        return found

    monkeypatch.setattr(plugin.Engine, "start", watched)
    with serving(model, {"codec": str(path)}) as engine:
        core = plugin._ENGINES[0]
        generate(engine, [first_of(whole, cut + 1)], 1)
        before = exact_tokens(cut + 1)
        if not kept:
            for page in list(core.pool._entries):
                core.pool.forget(page)
        hit, last = generate(engine, [whole]), exact_tokens(323)
        ((past, after),) = rebuilt
        assert (past, core.lost) == (cut, not kept)
        generate(engine, [whole], 1)
        assert [x for x, _ in rebuilt] == [cut, cut], "not further, though more is known"
        newest = exact_tokens(300)
        engine.reset_prefix_cache()
        assert generate(engine, [whole], 1)[0] == hit[0][:1]
        miss = exact_tokens(300)
        engine.reset_prefix_cache()
        assert generate(engine, [whole]) == hit
        alone = exact_tokens(323)
    held = torch.arange(cut + 1 - window, cut)
    ring = (held - 4) % window + 4
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        bound = (2**0.5 if number % 2 == 0 else 1.0) * step / 2 + 1e-5
        error = (old - new)[:, ring].abs().amax((0, 2))
        assert (error > 0).all() and (error <= bound).all()
        sinks = (old - new)[:, :4].abs().max()
        assert sinks == 0 if kept else 0 < sinks <= bound
    for got, expected in ((newest, miss), (last, alone)):
        for one, other in zip(got[:2], expected[:2], strict=True):  # k and v of the first layer
            assert torch.equal(one[:, 4:], other[:, 4:])


def test_how_far_a_hit_goes(model, coded):
    """Prompts that are all known: 16 tokens or more, the codec's window, are computed anew."""
    given = prompts(9, 63, 79, 80, 143, 144, 208)
    with serving(model, coded) as engine:
        found_again(engine, given, PAGE_SIZE)
        assert cached(engine, given) == [0, 0, 0, 64, 64, 128, 192]


@pytest.mark.parametrize("budget", [2048, 500])
def test_a_prefix_of_the_same_step(budget, model, coded):
    """vLLM finds pages again that are computed in the same step, and what starts on these: all get
    the tokens that they get one after another."""
    (whole,) = (x["prompt_token_ids"] for x in prompts(500))
    given = [{"prompt_token_ids": whole[:n]} for n in (200, 193, 180, 460, 400)]
    with serving(model, coded) as engine:
        alone = [generate(engine, [x])[0] for x in given]
    with serving(model, coded, max_num_seqs=5, max_num_batched_tokens=budget) as engine:
        assert generate(engine, given) == alone
        assert plugin._ENGINES[0].lost == 0


def test_a_prefix_of_one_token_of_the_same_step(model, coded, monkeypatch):
    """A request that starts on 64 tokens with its 65th, for which alone there is room in the step
    that computes the 64th as a token that another has generated. (Not a graph's step:
    `test_model_runner_v2`.)"""
    with serving(model, coded) as engine:
        (prompt,) = prompts(60)
        (new,) = generate(engine, [prompt])
        start = {"prompt_token_ids": [*prompt["prompt_token_ids"], *new[:4], *range(7, 23)]}
        (expected,) = generate(engine, [start])
    seen, place = [], plugin.PagedSlots.place

    def watched(self: Any, rows: Any, index: Any) -> Any:
        seen.append((rows.late, (rows.length - rows.past).tolist()))
        return place(self, rows, index)

    monkeypatch.setattr(plugin.PagedSlots, "place", watched)
    sampling = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, detokenize=False)
    with serving(model, coded) as engine:
        core, tokens = engine.llm_engine, {}
        core.add_request("first", prompt, sampling)
        while core.has_unfinished_requests():
            if len(seen) == 4:  # the next step computes token 63, counted from 0
                core.add_request("second", start, sampling)
                core.engine_core.engine_core.scheduler.max_num_scheduled_tokens = 2
            tokens |= {x.request_id: list(x.outputs[0].token_ids) for x in core.step()}
    assert seen[4] == ([1], [1, 1])
    assert tokens == {"first": new, "second": expected}


@pytest.mark.parametrize(
    ("lengths", "cuts", "chunk"), [((208, 150), (192, 128), 2048), ((300,), (128,), 128)],
    ids=["few new tokens", "many"],
)  # fmt: skip
def test_a_hit_is_a_miss_but_for_the_windows_coding(
    lengths, cuts, chunk, model, coded, monkeypatch
):
    """A prompt cut where the hit is, whose window is coded there, too: the same tokens."""
    monkeypatch.setattr(plugin, "CHUNK", 64)
    given = prompts(*lengths)
    start = [first_of(x, n + 1) for x, n in zip(given, cuts, strict=True)]
    with serving(model, coded, max_num_batched_tokens=chunk) as engine:
        generate(engine, start, 1)
        hit = [generate(engine, [x])[0] for x in given]
    place = plugin.PagedSlots.place

    def coding(self: Any, rows: Any, index: Any) -> Any:
        slots, started = place(self, rows, index)
        again = [i for i in range(len(rows.past)) if rows.filling[i] and rows.past[i] in cuts]
        return slots, sorted({*started, *again})

    monkeypatch.setattr(plugin.PagedSlots, "place", coding)
    miss = []
    for prompt, cut in zip(given, cuts, strict=True):
        with serving(model, coded, max_num_batched_tokens=cut) as engine:
            miss += generate(engine, [prompt])
            assert plugin._ENGINES[0].lost == 0
    assert hit == miss


def test_sinks_of_two_steps_are_not_kept(model, coded):
    """Nor what the pool holds for their page from before: a hit has them from the page."""
    given, step = prompts(200), LARGEST / 127
    with serving(model, coded, max_num_seqs=1, max_num_batched_tokens=2) as engine:
        core = plugin._ENGINES[0]
        for page in range(1, 1 + core.entries):  # the prompt takes the first free pages
            core.pool.write(page)
        generate(engine, given, 1)
        before = exact_tokens(200)
        generate(engine, given, 1)
        assert core.lost == 1
        for number, (old, new) in enumerate(zip(before, exact_tokens(200), strict=True)):
            bound = (2**0.5 if number % 2 == 0 else 1.0) * step / 2 + 1e-5
            assert 0 < (old - new)[:, :4].abs().max() <= bound


def test_long_chunks_on_a_past(model, dense, coded, monkeypatch):
    """More than CHUNK tokens attend to a past that is rebuilt in pieces, all of it exact in preset
    exact; else the first and the newest tokens of it, whatever their pages hold."""
    chunks = {"max_num_batched_tokens": 256}
    with monkeypatch.context() as patch, serving(model, EXACT, **chunks) as engine:
        patch.setattr(plugin, "PIECE", 3 * PAGE_SIZE)
        assert generate(engine, prompts(*LENGTHS)) == dense
    given, decode, seen = prompts(700), plugin.decode, []

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        x, (past,) = decode(*args, **options), args[3].tolist()
        x[:, :, :4], x[:, :, past - 16 :] = torch.nan, torch.nan
        seen.append(past)
        return x

    with serving(model, coded, **chunks) as engine:
        expected = generate(engine, given)
    monkeypatch.setattr(plugin, "decode", poisoned)
    with serving(model, coded, **chunks) as engine:
        assert generate(engine, given) == expected
    assert {256, 512} <= set(seen)


def test_two_ranks(model, tmp_path):
    """Each has one of two KV heads, whose codecs differ."""
    codec = eight_bit_codec(2, 2, 64, freqs(), LARGEST)
    for layer in codec.layers:
        for side in ("k", "v"):
            getattr(layer, f"{side}_scale")[:, 1] *= 1.25
            getattr(layer, f"{side}_encoder")[:, 1] /= 1.25
    path = tmp_path / "codec.safetensors"
    codec.save(path)
    given = prompts(*LENGTHS)
    with serving(model, {"codec": str(path)}) as engine:
        one, blocks = generate(engine, given, 8), blocks_of(engine)
    with serving(model, {"codec": str(path)}, tensor_parallel_size=2) as engine:
        assert blocks_of(engine) == 2 * blocks
        assert generate(engine, given, 8) == one


@pytest.mark.parametrize("ranks", [1, 2])
def test_recall(ranks, tmp_path):
    """The embedded model answers with preset balanced what it answers through the adapter."""
    if ranks > (torch.cuda.device_count() if CUDA else 1):
        pytest.skip("on the CPU: test_two_ranks; on GPUs: one a rank")
    from tests.test_recall import recalled

    contexts = make_recall_contexts(1, 25, distance=(2000, 4000), seed=11)
    model = LlamaForCausalLM.from_pretrained(RECALL, dtype=torch.float32).eval()
    adapter, _ = recalled(model.to("cuda" if CUDA else "cpu"), contexts, "balanced")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(RECALL / name, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(RECALL)
    ids = tokenizer(contexts[0].text).input_ids
    given = [
        {"prompt_token_ids": ids + tokenizer(q.text, add_special_tokens=False).input_ids}
        for q in contexts[0].questions
    ]
    codec = {"codec": str(RECALL / "codec-balanced.safetensors"), "preset": "balanced"}
    more: dict[str, Any] = {"max_model_len": 6144, "max_num_batched_tokens": 6144}
    if CUDA:
        more |= {"dtype": "bfloat16", "enforce_eager": False, "gpu_memory_utilization": 0.1}
    with serving(tmp_path, codec, tensor_parallel_size=ranks, **more) as engine:
        generate(engine, given[:1], 1)
        tokens = generate(engine, given, 1)
    answers = [tokenizer.decode(x) for x in tokens]
    right = sum(a == q.answer for a, q in zip(answers, contexts[0].questions, strict=True))
    assert right >= adapter
    assert adapter >= 0.85 * len(given)


def test_sliding_layers_beside(tmp_path, coded, monkeypatch):
    """Layers with a sliding window stay with vLLM's own backend, in groups of their own, whose
    pages are found again with ours; ours get the model's scale, which is not D**-0.5."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=512, max_position_embeddings=1024,
        sliding_window=64, initializer_range=0.1,
        layer_types=["sliding_attention", "full_attention"] * 2, tie_word_embeddings=False,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    given, kinds = prompts(*LENGTHS), {"backend_per_kind": {"full_attention": "SPECTRAL"}}
    with serving(tmp_path, None) as engine:
        expected = generate(engine, given)
    attend, scales = plugin.attend_spectral, set()

    def watched(*args: Any, scale: float | None = None, **options: Any) -> Any:
        scales.add(scale)
        return attend(*args, scale=scale, **options)

    monkeypatch.setattr(plugin, "attend_spectral", watched)
    with serving(tmp_path, EXACT, attention_backend=None, attention_config=kinds) as engine:
        assert len(plugin._ENGINES[0].layers) == 2
        assert generate(engine, given) == expected
    assert scales == {config.query_pre_attn_scalar**-0.5}
    with serving(tmp_path, coded, attention_backend=None, attention_config=kinds) as engine:
        alone = found_again(engine, given, 4 * PAGE_SIZE)  # as many of ours as a window's page
        for _ in range(3):  # blocks go from one kind of layers to another
            engine.reset_prefix_cache()
            assert generate(engine, given, 8) == alone
    with pytest.raises(ValueError, match="sliding window"), serving(tmp_path, EXACT):
        pass


def test_pages_beside_others(model, tmp_path, monkeypatch):
    """As they lie beside windows, those of a block in a row, or beside states, all as wide as the
    widest: the same tokens. (vLLM's own backend for CPUs takes no blocks in rows.)"""
    codec, original, given = mixed_codec(tmp_path / "codec"), plugin._backend, prompts(200, 70)
    widths = [x.layout.token_bytes for x in ModelCodec.load(codec["codec"]).layers]
    with serving(model, codec) as engine:
        expected = generate(engine, given)
    for packed, width in ((True, lambda n: n), (False, lambda n: max(widths))):
        beside = functools.partial(
            lambda n, _, window, packed, width: original(width(n), packed, window),
            packed=packed,
            width=width,
        )
        monkeypatch.setattr(plugin, "_backend", beside)
        with serving(model, codec) as engine:
            found = [impl.layer.kv_cache for impl in plugin._ENGINES[0].layers]
            assert [x.shape[-1] for x in found] == [width(n) for n in widths]
            block = 2 * PAGE_SIZE * (sum(widths) if packed else max(widths))
            assert [x.stride(0) for x in found] == [block, block]
            assert generate(engine, given) == expected


@pytest.mark.parametrize(
    ("full", "windows", "heads", "dim", "least"), [(10, 52, 16, 128, 3.9), (8, 40, 8, 256, 3.9)],
    ids=["Gemma 3 27B", "Gemma 3 12B"],
)  # fmt: skip
def test_windows_beside_leave_pages_small(full, windows, heads, dim, least):
    """Requests of 128K tokens that vLLM's planning admits, of those with its own pages: pages of
    layers in turn of three sizes, windows in the model's dtype."""
    from vllm.v1.core import kv_cache_utils as planning
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    shape: dict[str, Any] = {"num_kv_heads": heads, "head_size": dim, "dtype": torch.bfloat16}
    widths = [dim // 2 + 8 * (i % 3 - 1) for i in range(full)]

    def admitted(customize: Any, backends: list[Any]) -> float:
        (layout, *_) = get_supported_kv_cache_layouts(backends)
        config = MagicMock(speculative_config=None, kv_transfer_config=None)
        config.scheduler_config.disable_hybrid_kv_cache_manager = False
        config.attention_config.hisparse_config = None
        config.cache_config.num_gpu_blocks_override = None
        config.cache_config.get_resolved_kv_cache_layout = lambda: layout
        specs = {
            f"ours.{i}": customize(FullAttentionSpec(block_size=64, **shape), i)
            for i in range(full)
        }
        specs |= {
            f"window.{i}": SlidingWindowSpec(block_size=64, sliding_window=1024, **shape)
            for i in range(windows)
        }
        groups = planning.get_kv_cache_groups(config, specs)
        plan = planning.get_kv_cache_config_from_groups(config, groups, 40 * 2**30)
        ours = [x for x in groups if x.layer_names[0].startswith("ours")]
        assert len(ours) == 1
        assert ours[0].kv_cache_spec.block_size == 64
        return plan.num_blocks / (2048 + (len(groups) - 1) * (1024 // 64 + 1))

    dense = admitted(lambda spec, _: spec, [CPUAttentionBackend])
    backends = [plugin._backend(n, True) for n in sorted(set(widths))]
    got = admitted(lambda spec, i: plugin._backend(widths[i], True).customize_spec(spec), backends)
    assert got > least * dense


def found_again(engine: LLM, given: list[dict[str, Any]], block: int) -> list[list[int]]:
    """Prompts one by one, and once more: all blocks before a window of 16 are found, and give the
    same tokens."""
    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, detokenize=False)
    runs = [[engine.generate(x, sampling, use_tqdm=False)[0] for x in given] for _ in range(2)]
    miss, hit = ([list(x.outputs[0].token_ids) for x in run] for run in runs)
    for prompt, out in zip(given, runs[1], strict=True):
        known = max(len(prompt["prompt_token_ids"]) - 16, 0) // block * block
        assert out.num_cached_tokens == known
    assert hit == miss
    return miss


def test_new_blocks_are_zeroed_whole(monkeypatch):
    """Three blocks of four of our pages each: the last one's, and no other."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner as Runner

    monkeypatch.setattr(Runner, "_zero_block_ids", None)
    plugin._zero_whole_blocks.__wrapped__()
    caches = {"ours": torch.ones(12, 2), "window": torch.ones(3, 8), "state": (torch.ones(3),)}
    layers = {name: SimpleNamespace(kv_cache=x) for name, x in caches.items()}
    runner = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers),
        kv_cache_config=SimpleNamespace(num_blocks=3),
    )
    Runner._zero_block_ids(runner, [2])
    assert caches["ours"].sum(1).tolist() == [2.0] * 8 + [0.0] * 4
    assert caches["window"].sum(1).tolist() == [8.0, 8.0, 0.0]
    assert caches["state"][0].all()


def test_state_layers_beside(tmp_path, coded):
    """LFM2: convolutions' states lie in the same pool, in groups of their own. Where a state is
    larger than a page of 64 tokens, vLLM makes blocks of several. (One request at a time: vLLM's
    convolutions on CPUs give other tokens in a batch, and with states that are kept.)"""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        hidden_size=256, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=1024, initializer_range=0.1, conv_L_cache=4,
        tie_word_embeddings=False,
        layer_types=["conv", "full_attention", "conv", "full_attention", "conv"],
        block_auto_adjust_ff_dim=False, block_ff_dim=128,
        block_dim=256, conv_dim=256, block_multiple_of=64, block_ffn_dim_multiplier=1.0,
    )  # fmt: skip
    Lfm2ForCausalLM(config).save_pretrained(tmp_path)
    given, alone = prompts(70, 200, 9), {"max_num_seqs": 1}
    with serving(tmp_path, None, enable_prefix_caching=False, **alone) as engine:
        expected = generate(engine, given)
    with serving(tmp_path, EXACT, **alone) as engine:
        assert engine.llm_engine.vllm_config.cache_config.block_size == 2 * PAGE_SIZE
        assert len(plugin._ENGINES[0].layers) == 2
        assert generate(engine, given) == expected
    # vLLM keeps a state where our hit ends once another prompt has missed it: the third finds it.
    start, ends = first_of(given[1], 128)["prompt_token_ids"], prompts(72, 72, seed=9)
    alike = [{"prompt_token_ids": start + x["prompt_token_ids"]} for x in ends] + given[1:2]
    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, detokenize=False)
    hits = []
    for codec in (None, coded):
        with serving(tmp_path, codec, **alone) as engine:
            outs = [engine.generate(x, sampling, use_tqdm=False)[0] for x in alike]
            assert [x.num_cached_tokens for x in outs] == [0, 0, 128]
            assert codec is None or plugin._ENGINES[0].lost == 0
            hits.append(outs[-1].outputs[0].token_ids)
    assert hits[0] == hits[1]
    with serving(tmp_path, mixed_codec(tmp_path / "mixed"), **alone) as engine:
        generate(engine, given)
        found = [impl.layer.kv_cache for impl in plugin._ENGINES[0].layers]
        assert len({x.shape[-1] for x in found}) == 1


def test_model_runner_v2(monkeypatch):
    """It runs on GPUs only; here how it gathers a step's rows, 0 a request that decodes, 1 one that
    starts behind 64 tokens: with one new token each it would replay a graph of decodes."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Runner

    engine = SimpleNamespace(batch=None)
    monkeypatch.setattr(plugin, "_ENGINES", [engine])
    original = Runner.gather_batch_req_state
    monkeypatch.setattr(Runner, "gather_batch_req_state", original)
    plugin._watch_runner.__wrapped__()
    states = SimpleNamespace(
        req_id_to_index={"0": 3, "1": 1}, num_computed_prefill_tokens=np.array([0, 64, 0, 60]),
        prefill_len=SimpleNamespace(np=np.array([0, 65, 0, 60])),
    )  # fmt: skip
    runner = SimpleNamespace(
        req_states=states, decode_query_len=1, use_pp=False, pcp_manager=None,
        adaptive_verification=None,
    )  # fmt: skip

    def gathered(gather: Any, new: dict[str, int], dummy: bool = False) -> int | None:
        step = SimpleNamespace(
            num_scheduled_tokens=new, total_num_scheduled_tokens=sum(new.values()),
            scheduled_spec_decode_tokens={},
        )  # fmt: skip
        return gather(runner, step, dummy)[1]

    watched = Runner.gather_batch_req_state
    assert gathered(original, {"0": 1, "1": 1}) == 1, "no graph would be replayed"
    assert gathered(watched, {"0": 1, "1": 1}) is None
    assert engine.batch.idx_mapping_np.tolist() == [3, 1]
    assert engine.batch.is_prefilling_np.tolist() == [False, True]
    assert gathered(watched, {"0": 1}) == 1
    assert engine.batch.idx_mapping_np.tolist() == [3]
    assert gathered(watched, {"0": 1}, dummy=True) == 1
    assert engine.batch is None


def test_layers_in_more_than_one_group(tmp_path):
    """Three full layers and a sliding one: vLLM makes groups of one, with tables of their own."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=512, max_position_embeddings=1024,
        sliding_window=64, layer_types=kinds,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    plugin.register()  # a configuration is read before vLLM loads its plugins
    options = {"attention_config": {"backend_per_kind": {"full_attention": "SPECTRAL"}}}
    with (
        serving(tmp_path, EXACT, attention_backend=None, **options) as engine,
        pytest.raises(NotImplementedError, match="layers in one group"),
    ):
        generate(engine, prompts(70))


def test_layers_that_attend_otherwise(tmp_path):
    """vLLM wraps the backend for Llama 4's chunks, and for prompts that attend both ways."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        hidden_size=256, intermediate_size=128, intermediate_size_mlp=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=512,
        max_position_embeddings=1024, attention_chunk_size=64, moe_layers=[],
        interleave_moe_layer_step=0, num_local_experts=0,
        no_rope_layers=[1, 1, 1, 0],
        layer_types=["chunked_attention"] * 3 + ["full_attention"],
    )  # fmt: skip
    Llama4ForCausalLM(config).save_pretrained(tmp_path)
    text = r"layers\.0\..* is not full causal attention"
    with (
        pytest.raises(NotImplementedError, match=text),
        serving(tmp_path, EXACT, load_format="dummy"),
    ):
        pass


def test_what_vllm_keeps_when_it_sleeps(model, coded):
    """Level 2 keeps buffers alone: our codecs and slots are buffers of their layers."""
    with serving(model, coded) as engine:
        (first, *_) = layers = plugin._ENGINES[0].layers
        generate(engine, prompts(9), 1)
        expected = [x.clone() for i in layers for x in i.layer.buffers()]
        codec, ids = first.codec.k_encoder, plugin._ENGINES[0].seq_ids
        before, slots = codec.clone(), ids.clone()
        for impl in layers:
            for x in impl.layer.buffers():
                x.zero_()
        assert not codec.any()
        for x, kept in zip((x for i in layers for x in i.layer.buffers()), expected, strict=True):
            x.copy_(kept)
        assert torch.equal(codec, before)
        assert torch.equal(ids, slots)


def settings(**changes: Any) -> SimpleNamespace:
    """What `Engine` reads first of vLLM's configuration."""
    config = SimpleNamespace(
        speculative_config=None, use_v2_model_runner=False, additional_config={},
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False
        ),
        cache_config=SimpleNamespace(
            cache_dtype="auto", enable_prefix_caching=True, prefix_match_unit=None
        ),
        model_config=SimpleNamespace(
            model="NAME", max_model_len=64, get_total_num_kv_heads=lambda: 2,
            get_head_size=lambda: 64, get_total_num_hidden_layers=lambda: 2,
        ),
    )  # fmt: skip
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_refuses(coded, monkeypatch):
    for name in ("SPECTRAL_CODEC", "SPECTRAL_PRESET"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(NotImplementedError, match="speculative decoding"):
        plugin._check_config(settings(speculative_config=object()))
    with pytest.raises(NotImplementedError, match="fp8"):
        cache = SimpleNamespace(cache_dtype="fp8", prefix_match_unit=None)
        plugin._check_config(settings(cache_config=cache))
    with pytest.raises(NotImplementedError, match="prefix_match_unit"):
        cache = SimpleNamespace(cache_dtype="auto", prefix_match_unit=64)
        plugin._check_config(settings(cache_config=cache))
    with pytest.raises(ValueError, match="expected --no-enable-prefix-caching"):
        plugin._load_codec(settings(additional_config={"spectral": EXACT}))
    command = "python -m spectral_kernels.calibrate --model NAME --preset balanced"
    with pytest.raises(ValueError, match=command):
        plugin._load_codec(settings())
    with pytest.raises(ValueError, match="expected codec and preset"):
        plugin._load_codec(settings(additional_config={"spectral": {"window": 3}}))
    with pytest.raises(ValueError, match="expected the codec's, 8 bits, got small"):
        given = {"spectral": {**coded, "preset": "small"}}
        plugin._load_codec(settings(additional_config=given))
    monkeypatch.setenv("SPECTRAL_CODEC", coded["codec"])
    assert plugin._load_codec(settings()).preset == "8 bits"
    other = SimpleNamespace(
        model="NAME", get_total_num_kv_heads=lambda: 4, get_head_size=lambda: 64
    )
    with pytest.raises(ValueError, match="expected 4 KV heads of 64"):
        plugin._load_codec(settings(model_config=other))


GB = 10**9


def alone_or_beside(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Another rank of the tensor-parallel group, which has as little as is set here. Stages of a
    pipeline are not asked: one without a layer of ours would never answer."""
    others: dict[str, int] = {}

    def reduce(x: torch.Tensor, op: Any, group: str) -> None:
        assert op == torch.distributed.ReduceOp.MIN
        x.clamp_(max=others.get(group, 10**9))

    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    found = SimpleNamespace(cpu_group="TP")
    monkeypatch.setattr(plugin.distributed, "get_tp_group", lambda: found)
    monkeypatch.setattr(plugin.distributed, "get_pp_group", pytest.fail)
    return others


@pytest.mark.parametrize(
    ("card", "weights", "requests", "window"),
    [
        (150, 16, 1024, 128),
        (85, 16, 1024, 64),
        (85, 16, 256, 128),
        (25, 16, 256, 16),
        (25, 16, 16, 128),
    ],
)
def test_newest_tokens_fit_beside_pages(card, weights, requests, window, monkeypatch):
    """An 8B model in 16 bits, codec's window 128: exact tokens take at most a fifth of what weights
    leave, the newest of each request fewer if need be."""
    platform = SimpleNamespace(get_device_total_memory=lambda: card * GB)
    monkeypatch.setattr(plugin, "current_platform", platform)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: weights * GB)
    others = alone_or_beside(monkeypatch)
    layers = [SimpleNamespace(num_kv_heads=8, head_size=128)] * 32
    memory = SimpleNamespace(gpu_memory_utilization=0.92, kv_cache_memory_bytes=None)
    engine = SimpleNamespace(
        codec=SimpleNamespace(preset="balanced", window=128), window=128, sinks=4, slots=requests,
        layers=layers,
        config=SimpleNamespace(
            cache_config=memory, model_config=SimpleNamespace(dtype=torch.bfloat16)
        ),
    )  # fmt: skip
    plugin.Engine._fit(engine)
    assert engine.window == window
    left, token = 0.92 * card * GB - weights * GB, 2 * 2 * 32 * 8 * 128
    assert (requests + 1) * (4 + window + 16) * token <= left / 5
    engine.window, engine.slots = 128, int(left / 5 / (36 * token))
    with pytest.raises(
        ValueError, match=f"at most {engine.slots - 1}, got {engine.slots}: 4.72 MB"
    ):
        plugin.Engine._fit(engine)
    engine.slots -= 1
    plugin.Engine._fit(engine)
    assert engine.window == 16
    engine.window, engine.slots, others["TP"] = 128, 16, 17 * (20 + 50)  # tokens that fit there
    plugin.Engine._fit(engine)
    assert engine.window == 48


def test_a_window_that_does_not_fit(model, tmp_path, monkeypatch):
    """The tokens and the hits of a codec whose window is as long as what fits."""
    windows = {}
    for window in (48, 128):
        path = tmp_path / f"{window}"
        replace(eight_bit_codec(2, 2, 64, freqs(), LARGEST), window=window).save(path)
        if window == 128:  # 5 slots of 4 + 50 + 16 tokens of 2048 bytes
            memory = 0.92 * plugin.current_platform.get_device_total_memory()
            monkeypatch.setattr(plugin, "SHARE", 5 * 70 * 2048 / memory)
        with serving(model, {"codec": str(path)}, max_num_batched_tokens=256) as engine:
            windows[window] = generate(engine, prompts(*LENGTHS))
            assert [x.k_exact.shape[2] for x in plugin._ENGINES[0].layers] == [52, 52]
            assert cached(engine, prompts(*LENGTHS)) == [0, 128, 0, 640, 0, 0, 64]
    assert windows[48] == windows[128]
    monkeypatch.setattr(plugin, "SHARE", 1e-6)
    for given, least in (({"codec": str(path)}, 36), (EXACT, 1024)):
        each = f"max_num_seqs: expected at most 0, got 4: {least * 2048 / 1e6:.2f} MB each"
        text = f"{each}, in 0% of what gpu_memory_utilization leaves beside weights"
        with pytest.raises(ValueError, match=text), serving(model, given):
            pass


def test_registers_once_and_travels():
    plugin.register()
    plugin.register()
    member = AttentionBackendEnum["SPECTRAL"]
    assert pickle.loads(pickle.dumps(member)) is member
    assert member.get_class() is plugin.SpectralBackend
