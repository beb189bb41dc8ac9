"""generate() in full: everything that a caller may ask of it gives the dense model's tokens with
preset exact, and one generation leaves nothing to the next. `tests/test_hf.py` has the parts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import LogitsProcessorList, StoppingCriteriaList  # noqa: E402

from spectral_kernels.codec import ModelCodec  # noqa: E402
from spectral_kernels.hf import CACHE, DRAFTS, enable  # noqa: E402
from tests import cases  # noqa: E402
from tests.test_hf import (  # noqa: E402
    VOCAB,
    codec,
    generate,
    prompt,
    single_thread,
    state,
    tiny,
)

__all__ = ["codec", "single_thread"]
# Borders: nothing to code, sinks 4, window 16, page 64, step 32, room and frame 512.
BORDERS = (1, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 500, 511, 512, 513, 1023, 1025)


def penalise(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor that depends on the tokens so far."""
    return scores.scatter(1, ids, scores.gather(1, ids) - 5.0)


OPTIONS: dict[str, dict[str, Any]] = {
    "top_k": {"do_sample": True, "top_k": 7, "temperature": 0.9},
    "top_p": {"do_sample": True, "top_p": 0.8, "temperature": 1.2},
    "min_p": {"do_sample": True, "min_p": 0.05},
    "beam_sampling": {"do_sample": True, "num_beams": 3},
    "beams_returned": {"num_beams": 4, "num_return_sequences": 3, "early_stopping": True},
    "long_beams": {"num_beams": 2, "max_new_tokens": 70, "min_new_tokens": 70},
    "processor": {"logits_processor": LogitsProcessorList([penalise])},
    "repetition": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "criteria": {
        "stopping_criteria": StoppingCriteriaList([lambda ids, scores: ids[:, -1] % 5 == 0]),
        "min_new_tokens": None,
    },
    "many_pages": {"max_new_tokens": 140, "min_new_tokens": 140},
    "logits_returned": {"return_dict_in_generate": True, "output_logits": True},
    "hidden_states": {"return_dict_in_generate": True, "output_hidden_states": True},
    "one_token": {"max_new_tokens": 1, "min_new_tokens": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", list(OPTIONS))
def test_options_of_generate(name: str) -> None:
    model, inputs = tiny(), prompt(60, rows=2, padding=(13, 0))
    dense = generate(model, inputs, **OPTIONS[name])
    with enable(model, "exact"):
        ours = generate(model, inputs, **OPTIONS[name])
    if isinstance(dense, dict):
        for kept in ("logits", "hidden_states"):
            assert len(dense.get(kept) or ()) == len(ours.get(kept) or ())
        dense, ours = dense.sequences, ours.sequences
    assert torch.equal(ours, dense)


def compile_forward(module: Any) -> None:
    module.forward = torch.compile(module.forward, backend="eager")


COMPILED: dict[str, tuple[Callable[[Any], Any], bool]] = {  # and whether before enable()
    "model": (lambda model: model.compile(backend="eager"), True),
    "forward": (compile_forward, False),
    "decoder": (lambda model: compile_forward(model.model), True),
    "layers": (lambda model: [x.compile(backend="eager") for x in model.model.layers], False),
}


@pytest.mark.parametrize("name", list(COMPILED))
def test_what_a_caller_has_compiled(name: str, codec: ModelCodec) -> None:
    """torch.compile of the whole or of parts: prompts break its graphs, steps are in them."""
    compile, before = COMPILED[name]
    model, first, more = tiny(), prompt(40, rows=2, padding=(7, 0)), prompt(50, rows=2, seed=3)
    longer = {key: torch.cat((first[key], more[key]), dim=1) for key in first}

    def chat(handle: Any) -> list[torch.Tensor]:
        cache, options = handle.new_cache(), {"max_new_tokens": 6, "min_new_tokens": 6}
        said = [generate(model, first, **options, **{CACHE: cache})]
        assert cache.get_seq_length() == 45 and cache.spectral.lengths == [38, 45]
        assert cache.spectral.seq_lens.tolist() == [38, 45]
        cache.crop(-5)  # and a prompt on a filled cache
        said.append(generate(model, longer, **options, **{CACHE: cache}))
        return said

    with enable(model, codec=codec, graph=False) as handle:
        expected = chat(handle)
    torch._dynamo.reset()
    if before:
        compile(model)
    with enable(model, codec=codec, graph=False) as handle:
        if not before:
            compile(model)
        assert all(map(torch.equal, chat(handle), expected))


@pytest.mark.parametrize("tokens", BORDERS)
def test_prompts_around_every_border(tokens: int, codec: ModelCodec) -> None:
    model, inputs = tiny(), prompt(tokens, rows=2, padding=(tokens // 3, 0))
    new = 20 if tokens < 100 else 6
    options = {"max_new_tokens": new, "min_new_tokens": new}
    dense = generate(model, inputs, **options)
    alone = {name: x[:1, tokens // 3 :] for name, x in inputs.items()}
    with enable(model, "exact"):
        assert torch.equal(generate(model, inputs, **options), dense)
    with enable(model, codec=codec):
        out = generate(model, inputs, **options, return_dict_in_generate=True)
        row = generate(model, alone, **options)
    wanted = [tokens - tokens // 3 + new - 1, tokens + new - 1]  # the last token is not fed back
    assert out[CACHE].spectral.lengths == out[CACHE].spectral.seq_lens.tolist() == wanted
    assert torch.equal(out.sequences[:1, tokens:], row[:, tokens - tokens // 3 :])


def test_rows_that_finish_early() -> None:
    """They are fed padding from then on, which no other row sees."""
    model, inputs = tiny(), prompt(50, rows=3, padding=(9, 0, 21))
    long = {"max_new_tokens": 40, "min_new_tokens": None}
    free = generate(model, inputs, **long, eos_token_id=VOCAB + 1)
    stop = int(free[1, 55])  # the token that ends row 1 first
    dense = generate(model, inputs, **long, eos_token_id=stop)
    assert (dense[1, 56:] == 0).all() and dense.shape[1] > 60
    with enable(model, "exact"):
        assert torch.equal(generate(model, inputs, **long, eos_token_id=stop), dense)


class Words(transformers.generation.streamers.BaseStreamer):
    """Collects what it is given, or fails on the way."""

    def __init__(self, fails_after: int = 10**9) -> None:
        self.tokens: list[int] = []
        self.ended, self.fails_after = False, fails_after

    def put(self, value: torch.Tensor) -> None:
        if len(self.tokens) > self.fails_after:
            raise KeyError("streamer")
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamers() -> None:
    model, inputs, words = tiny(), prompt(40), Words()
    with enable(model, "exact"):
        ours = generate(model, inputs, streamer=words)
    assert words.ended and words.tokens == ours[0].tolist()
    assert torch.equal(ours, generate(model, inputs))


def test_text_of_a_streamer_that_another_thread_reads() -> None:
    model, inputs = tiny(), prompt(40)

    class Tokens:
        def decode(self, ids: Any, **options: Any) -> str:
            return "".join(f"{int(i)} " for i in torch.as_tensor(ids).flatten())

    streamer = transformers.TextIteratorStreamer(Tokens(), skip_prompt=True, timeout=60)
    with enable(model, "exact"):
        thread = threading.Thread(
            target=generate, args=(model, inputs), kwargs={"streamer": streamer}
        )
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert [int(word) for word in text.split()] == generate(model, inputs)[0, 40:].tolist()


class Fails:
    """A forward, or a logits processor, that divides by zero at the sixth call."""

    def __init__(self, original: Any) -> None:
        self.original, self.left = original, 5

    def __call__(self, *args: Any) -> Any:
        self.left -= 1
        return self.original(*args) * (self.left // self.left)


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_an_exception_in_the_middle(preset: str, codec: ModelCodec) -> None:
    """From a streamer, a processor, or the model: the next call works, and disable gives back."""
    model, inputs = tiny(), prompt(40)
    model.generation_config.disable_compile = True  # transformers leaves traces of its own
    before, norm = state(model), model.model.norm
    with enable(model, preset, codec=codec, graph=False) as handle:
        expected = generate(model, inputs)
        with pytest.raises(KeyError, match="streamer"):
            generate(model, inputs, streamer=Words(45))
        assert torch.equal(generate(model, inputs), expected)
        processors = LogitsProcessorList([Fails(lambda ids, scores: scores)])
        with pytest.raises(ZeroDivisionError):
            generate(model, inputs, logits_processor=processors)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(norm, "forward", Fails(norm.forward))
            generate(model, inputs)
        assert torch.equal(generate(model, inputs), expected)
        kept = handle.new_cache()
        with pytest.raises(KeyError):
            generate(model, inputs, streamer=Words(45), **{CACHE: kept})
        kept.reset()
        assert torch.equal(generate(model, inputs, **{CACHE: kept}), expected)
    vars(norm).pop("forward", None)  # monkeypatch leaves what it found
    assert state(model) == before


@pytest.mark.parametrize("way", ["assistant", "lookup"])
def test_drafts_over_borders(way: str, codec: ModelCodec) -> None:
    """Drafts are taken back over pages. (A lossy cache has one window a step: drafts change it.)"""
    model, inputs = tiny(), prompt(50)
    inputs["input_ids"] = inputs["input_ids"][:, :25].repeat(1, 2)
    options: dict[str, Any] = {
        "max_new_tokens": 60,
        "min_new_tokens": None,
        "eos_token_id": VOCAB + 1,
    }
    drafts = {"prompt_lookup_num_tokens": DRAFTS - 2}
    if way == "assistant":
        drafts = {"assistant_model": tiny(num_hidden_layers=1)}
    dense = generate(model, inputs, **options, **drafts)
    assert torch.equal(dense, generate(model, inputs, **options))
    with enable(model, "exact") as handle:
        assert torch.equal(generate(model, inputs, **options, **drafts), dense)
        kept = handle.new_cache()
        assert torch.equal(generate(model, inputs, **options, **drafts, **{CACHE: kept}), dense)
        assert kept.spectral.lengths == [kept.columns] == [109]
    with enable(model, codec=codec) as handle:
        kept = handle.new_cache()
        assert generate(model, inputs, **options, **drafts, **{CACHE: kept}).shape == dense.shape
        assert kept.spectral.lengths == kept.spectral.seq_lens.tolist() == [109]


@pytest.mark.skipif(cases.DEVICE.type != "cuda", reason="no GPU")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_compiled_forward_is_captured_without(mode: Any, codec: ModelCodec) -> None:
    """A capture takes no graphs of torch.compile's."""
    model, inputs = tiny(), prompt(40, rows=2, padding=(7, 0))
    with enable(model, codec=codec):
        expected = generate(model, inputs)
    plain = model.forward
    model.forward = torch.compile(model.forward, mode=mode)
    with enable(model, codec=codec) as handle:
        for _ in range(2):
            assert torch.equal(generate(model, inputs), expected)
        assert handle._pool[2].graph is not None
    assert model.forward is not plain  # as the caller left it


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_a_model_that_drafts_with_its_first_layers(preset: str, codec: ModelCodec) -> None:
    """Its drafts' cache has fewer layers: no idle one of the whole model, nor one later."""
    model, inputs = tiny(), prompt(40)
    options: dict[str, Any] = {"assistant_early_exit": 1, "min_new_tokens": None}
    dense = generate(model, inputs, **options)

    class Pool(dict):
        """As soon as a cache is taken, another thread's is idle."""

        def pop(self, rows: int, default: Any) -> Any:
            found = super().pop(rows, default)
            self[rows] = idle
            return found

    with enable(model, preset, codec=codec) as handle:
        plain, idle = generate(model, inputs), handle.new_cache(1, 512)
        handle._pool = Pool()
        for _ in range(2):
            drafted = generate(model, inputs, **options)
            assert drafted.shape == dense.shape
            assert preset == "balanced" or torch.equal(drafted, dense)
            assert torch.equal(generate(model, inputs), plain)
        assert handle.config.num_hidden_layers == 2


def test_room_for_no_more_than_a_model_reads() -> None:
    """A limit beyond all memory is fine for a dense cache, which grows; ours grows too."""
    model, inputs = tiny(max_position_embeddings=128), prompt(40)
    free = {"max_new_tokens": 10**30, "min_new_tokens": None}
    stop = int(generate(model, inputs)[0, 45])
    for more in (free, {**free, "max_new_tokens": None, "max_length": 10**30}):
        dense = generate(model, inputs, **more, eos_token_id=stop)
        with enable(model, "exact") as handle:
            assert torch.equal(generate(model, inputs, **more, eos_token_id=stop), dense)
            assert handle._pool[1].capacity == 512
            kept = handle.new_cache()
            generate(model, inputs, **more, eos_token_id=stop, **{CACHE: kept})
            assert kept.capacity == 1024
    inputs, longer = prompt(500), {"max_new_tokens": 20, "min_new_tokens": 20}
    dense = generate(model, inputs, **longer)
    with enable(model, "exact"):
        out = generate(model, inputs, **longer, return_dict_in_generate=True)
    assert out[CACHE].spectral.lengths == out[CACHE].spectral.seq_lens.tolist() == [519]
    assert torch.equal(out.sequences, dense)


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_fifty_generations_are_fifty_fresh_ones(preset: str, codec: ModelCodec) -> None:
    model, generator = tiny(), torch.Generator().manual_seed(7)
    asked = []
    for seed in range(50):
        rows, tokens = (int(torch.randint(1, n, (1,), generator=generator)) for n in (4, 90))
        padding = tuple(int(x) for x in torch.randint(0, tokens, (rows - 1,), generator=generator))
        asked.append(prompt(tokens, rows=rows, padding=(*padding, 0), seed=seed))
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    with enable(model, preset, codec=codec, check=False) as handle:
        in_a_row = [generate(model, inputs, **options) for inputs in asked]
        assert 1 <= len(handle._pool) <= 2
    for inputs, tokens in zip(asked, in_a_row, strict=True):
        with enable(model, preset, codec=codec, check=False):
            assert torch.equal(generate(model, inputs, **options), tokens)


@pytest.mark.skipif(cases.DEVICE.type == "cuda", reason="captures in ten threads: on one stream")
@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_ten_threads_of_chat_do_not_mix(preset: str, codec: ModelCodec) -> None:
    model = tiny()

    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}

    def chat(handle: Any, seed: int) -> torch.Tensor:
        cache, ids = handle.new_cache(), prompt(20 + seed, seed=seed)["input_ids"]
        for turn in range(2):
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            said = model.generate(**inputs, **options, **{CACHE: cache})
            more = prompt(5 + 40 * (seed % 2), seed=100 * turn + seed)["input_ids"]
            ids = torch.cat((said, more), dim=1)
        return said

    def single(seed: int) -> torch.Tensor:  # on a cache of the pool
        return model.generate(**prompt(30, rows=1 + seed % 3, seed=seed), **options)

    with enable(model, preset, codec=codec) as handle, ThreadPoolExecutor(10) as pool:
        alone = [chat(handle, seed) for seed in range(10)] + list(map(single, range(10)))
        together = [*pool.map(chat, [handle] * 10, range(10)), *pool.map(single, range(10))]
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(cases.DEVICE.type != "cuda", reason="no GPU")
def test_threads_on_streams_of_their_own(codec: ModelCodec) -> None:
    """Graphs share the memory of a pool: replays on several streams take turns."""
    model = tiny(num_hidden_layers=8).half()
    whole = ModelCodec(codec.layers * 4, codec.sinks, codec.window).to(cases.DEVICE)
    options = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False}

    def chat(handle: Any, cache: Any, seed: int) -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            inputs = prompt(20 + seed, seed=seed)
            return model.generate(**inputs, **options, **{CACHE: cache})

    with enable(model, codec=whole) as handle, ThreadPoolExecutor(4) as pool:
        caches = [handle.new_cache(1, 512) for _ in range(4)]
        alone = [chat(handle, cache, seed) for seed, cache in enumerate(caches)]
        graphs = [cache.graph for cache in caches]
        for cache in caches:
            cache.reset()
        torch.cuda.synchronize()  # it ran on this stream
        together = list(pool.map(chat, [handle] * 4, caches, range(4)))
        assert all(graphs) and graphs == [cache.graph for cache in caches]
    assert all(map(torch.equal, alone, together))


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rope_that_changes_while_tokens_come(rope: str, codec: ModelCodec) -> None:
    """Keys stay as they were turned, as in the dense cache: at the switch and after it."""
    changes: dict[str, Any] = {"max_position_embeddings": 64} if rope == "dynamic" else {}
    model, inputs = tiny("llama", rope, **changes), prompt(55, rows=2, padding=(5, 0))
    options = {"max_new_tokens": 30, "min_new_tokens": 30}
    dense = generate(model, inputs, **options)
    before = tiny("llama")
    assert not torch.equal(generate(before, inputs, **options), dense)
    with enable(model, "exact"):
        assert torch.equal(generate(model, inputs, **options), dense)
    anonymous = ModelCodec(codec.layers, codec.sinks, codec.window)
    with enable(model, codec=anonymous):
        assert generate(model, inputs, **options).shape == dense.shape
