"""Time whole models, a token at a time: transformers as users run it, dense attention at its best,
and the spectral cache.

    python -m perf.end_to_end 1x8192 1x32768 1x131072 --compile --json
    python -m perf.end_to_end 8x32768 --what graph fp8 ours bare --presets balanced quality

Weights, bases of codecs, and the T tokens in caches are random. Measured (--what):

    static    `model.generate`, StaticCache, decode compiled by generate itself (40 s and more)
    graph     the one-token forward as one CUDA graph over static keys and values, attention by the
              fastest peer of perf.attention at this shape ("backend"); where the memory of all
              layers does not fit, layers share it ("shared")
    fp8       the same with keys, values and queries of 8 bits ("graph" of preset "fp8")
    ours      `model.generate` after `enable(model, preset)`, a row a preset
    bare      the graph of the same step, replayed: without the host work of generate
    prefill   seconds up to the first new token after a prompt (up to 32K tokens, all rows
              together), with DynamicCache and with each preset in turns
    long      2,000 tokens after a prompt

With --compile layers of graph, fp8, ours and bare are fused by torch.compile: "graph compiled" and
so on. What is compiled is compiled ahead, in processes side by side (not with several GPUs).
Several GPUs (tensor parallel, `tp_plan="auto"`) are a process each:

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m perf.end_to_end 1x32768

Rows are the first one's, and so are bytes. ms, p99_ms: of steps; those of generate as the streamer
sees them, of graphs by events. Rows are checked first: a graph against PyTorch's attention over the
same cache; ours: a layer's attention against its twin; every step must run.

Row: gpu commit torch triton transformers date shape B T what preset ms p99_ms tokens_per_s
cache_bytes peak_bytes prefill_s prefill_ratio steps backend shared weight_bytes read_gbs
(and of long: p999_ms max_ms compiled; gpus: of several).
Table: intercept and slope, break-even, ceiling: python -m perf.tables.   Test: tests/test_perf.py.
"""

import argparse
import contextlib
import gc
import io
import os
import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from multiprocessing import get_context
from typing import Any

import torch
import transformers
import triton
from torch._inductor import config as inductor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache

from perf import _cases
from perf._timing import Clock, Row, begin, capture, fail, parser_of, record, say
from perf.attention import IN_MODELS, PeerStep, best, parse_shape, time_peers
from perf.tables import end_to_end_table
from spectral_kernels.hf import CACHE, compiled_layers, enable

WHAT = ("static", "graph", "fp8", "ours", "bare", "prefill", "long")
STEPS = ("graph", "fp8", "ours", "bare")  # whose layers --compile compiles
WARM = 8  # steps of a generate that are not counted
LONG_STEPS = 2000
PROMPTS = 1 << 15  # the most tokens of prompts of all rows together
GPUS, RANK = (int(os.environ.get(name, n)) for name, n in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def make_model(shape: str, device: torch.device, dtype: torch.dtype, layers: Any = None) -> Any:
    """A Llama with random weights, made on the device without the usual initialisation."""
    config = _cases.llama(shape, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device("meta"):
        auto = transformers.AutoModelForCausalLM
        model = auto.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if GPUS > 1:
        parallel = transformers.distributed.DistributedConfig(tp_plan="auto", tp_size=GPUS)
        parallel, _, mesh = model.prepare_distribute_model(parallel)
        model = model.maybe_distribute_model(model, parallel, mesh)
    model = model.to_empty(device=device).eval()
    for x in map(local, model.parameters()):
        x.requires_grad_(False)
        x.fill_(1.0) if x.dim() == 1 else x.normal_(std=x.shape[1] ** -0.5)
    rotary = model.model.rotary_emb  # to_empty left its frequencies empty
    model.model.rotary_emb = type(rotary)(config).to(device)
    model.generation_config.eos_token_id = None
    return model


def local(x: torch.Tensor) -> torch.Tensor:
    """This GPU's share of a weight."""
    return getattr(x, "_local_tensor", x)


@dataclass
class Cell:
    """A model at one batch size and length, and what all its rows share."""

    model: Any
    batch: int
    tokens: int
    steps: int
    card: Any  # a _timing.Card
    compile: bool = False  # layers compiled before a step is captured
    layout: int = 0  # of the first layer, a number of _cases.layouts

    @property
    def layer(self) -> _cases.Shape:
        config = self.model.config
        heads = config.num_attention_heads // GPUS, config.num_key_value_heads // GPUS
        return _cases.Shape(self.batch, *heads, config.head_dim, self.tokens)

    @property
    def dense_bytes(self) -> int:
        return self.model.config.num_hidden_layers * self.layer.dense_bytes

    def random_kv(self) -> torch.Tensor:
        """k and v [2, B, G, T, D] of a layer, with the spread that the model's own have."""
        return self.card.normal(2, self.batch, self.layer.kv_heads, self.tokens, self.layer.dim)

    def ids(self, tokens: int) -> torch.Tensor:
        size, device = (self.batch, tokens), self.model.device
        return torch.randint(self.model.config.vocab_size, size, device=device)

    def enabled(self, preset: str, compile: bool = False) -> Any:
        """enable() without its own check, which compiles for one row: rows are checked here."""
        config = self.model.config
        codec = _cases.random_model_codec(
            preset, layers=config.num_hidden_layers, kv_heads=config.num_key_value_heads,
            freqs=_cases.frequencies(config.head_dim, self.model.device), first=self.layout,
        )  # fmt: skip
        return enable(self.model, preset, codec=codec, compile=compile, check=False)


def generate(cell: Cell, ids: Any, new: int, cache: Any = None) -> Clock:
    clock, given = Clock(), {} if cache is None else {CACHE: cache}
    cell.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
        do_sample=False, pad_token_id=0, streamer=clock, **given,
    )  # fmt: skip
    if len(clock.times) != new + 1:
        raise AssertionError(f"generate: {len(clock.times) - 1} of {new} tokens came")
    return clock


def percentiles(steps: Sequence[float]) -> Row:
    return {"ms": statistics.median(steps), "p99_ms": sorted(steps)[len(steps) * 99 // 100]}


def timed_generate(cell: Cell, cache: Any) -> Row:
    """Decode steps over a cache that holds T tokens."""
    ids = cell.ids(cache.get_seq_length() + 1)
    return percentiles(generate(cell, ids, WARM + cell.steps + 1, cache).steps_ms[WARM:])


def static_cache(cell: Cell) -> Row:
    """`generate` over StaticCache with T random tokens in all layers."""
    config, room = cell.model.config, cell.tokens + WARM + cell.steps + 2
    cache = StaticCache(config=config, max_cache_len=room)
    for layer in range(config.num_hidden_layers):
        cache.update(*cell.random_kv(), layer)
    return {"cache_bytes": cell.dense_bytes * room // cell.tokens, **timed_generate(cell, cache)}


def replayed(graph: Any, steps: int) -> Row:
    """Of the milliseconds of replays, by events on the device."""
    for _ in range(WARM):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return percentiles([a.elapsed_time(b) for a, b in pairwise(marks)])


def dense_graph(cell: Cell, fp8: bool = False) -> Row:
    """Each layer's attention writes the new token to a peer's memory of T tokens and reads it."""
    model, shape, layers = cell.model, cell.layer, cell.model.config.num_hidden_layers
    known = {peer.name: peer for peer in IN_MODELS if peer.fp8 == fp8}
    peers = time_peers(shape, [*known.values()], cell.card)
    backend, _ = best(peers, fp8)
    if backend is None:
        raise RuntimeError(f"no backend ran: {peers}")
    say(f"attention by {backend}")
    # Room for the same in 16 bits, which the reference and an fp8 copy take.
    size = shape.dense_bytes // (2 if fp8 else 1)
    held = min(layers, int(0.85 * cell.card.free - 2 * shape.dense_bytes) // size)
    if held < 1:
        raise torch.OutOfMemoryError("not even one layer's keys and values fit")
    steps = [PeerStep(known[backend], shape, cell.random_kv()) for _ in range(held)]
    ids = cell.ids(1)
    given = {"input_ids": ids, "position_ids": torch.full_like(ids, cell.tokens - 1)}
    # Without a mask transformers would look for several texts in a row.
    given["attention_mask"] = torch.ones_like(ids, dtype=torch.bool)

    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, plain: bool = False, **more: Any):
        own = steps[module.layer_idx % held]
        own.write(torch.stack((k[:, :, 0], v[:, :, 0])))
        if not plain:  # else PyTorch's over the same cache, to compare with
            return own.attend(q[:, :, 0], more["scaling"])[:, None], None
        k, v = own.kv.to(q.dtype)
        out = scaled_dot_product_attention(q, k, v, scale=more["scaling"], enable_gqa=True)
        return out.transpose(1, 2), None

    def step(**more: Any) -> torch.Tensor:
        return model(**given, **more, use_cache=False).logits

    before = model.config._attn_implementation
    try:
        AttentionInterface.register("perf_dense", attention)
        AttentionMaskInterface.register("perf_dense", lambda *args, **kwargs: None)
        model.config._attn_implementation = "perf_dense"
        want = step(plain=True)
        logits, nothing = step(), transformers.Cache(layers=[])
        with compiled_layers(model.model, nothing) if cell.compile else contextlib.nullcontext():
            graph = capture([step])
        say("step captured")
        row = replayed(graph, cell.steps)
    finally:
        model.config._attn_implementation = before
        steps.clear()  # torch.compile and transformers' list of functions hold on to it
    # Rounding of attention grows through the layers; a wrong key or scale does not stay below this.
    # With weights of 8 bits attention is off by up to 2**-3 by itself (PeerStep.check).
    _cases.check_close(logits, want, 0.1 + fp8 * 2**-3, "logits")
    shared = f"{layers} layers share the memory of {held}" if held < layers else None
    row |= {"what": "graph", "preset": "fp8" if fp8 else None, "backend": backend, "shared": shared}
    return {"cache_bytes": layers * size, **row}


def filled_cache(cell: Cell, handle: Any, room: int) -> Any:
    """A ModelCache of T random tokens, with room for more: a short prompt, then random bytes."""
    cache = handle.new_cache(cell.batch, room)
    start = min(8, cell.tokens - 1)
    cell.model(input_ids=cell.ids(start), use_cache=True, logits_to_keep=1, **{CACHE: cache})
    spectral = cache.spectral
    spectral.reserve(cell.tokens - start)
    spectral.advance(cell.tokens - start)
    cache.columns = cell.tokens
    for x in (*spectral.k_exact, *spectral.v_exact):
        x.normal_()
    for x in (*spectral.k_pages, *spectral.v_pages):
        x.random_(0, 256)
    return cache


def check_layers(cell: Cell, cache: Any) -> None:
    """Attention of the first and the last layer to the cache as it is."""
    spectral, shape = cache.spectral, (cell.batch, cell.layer.heads, 1, cell.layer.dim)
    for layer in {0, len(spectral.codec.layers) - 1}:
        q = torch.randn(shape, device=cell.model.device).to(cell.model.dtype)
        out = torch.empty_like(q)
        spectral.attend(layer, q, out=out, after_append=True)  # as the step's kernel
        step = _cases.Step(
            q[:, :, 0], q, q, spectral.codec.layers[layer], spectral.k_pages[layer],
            spectral.v_pages[layer], spectral.k_exact[layer], spectral.v_exact[layer],
            spectral.block_table, spectral.seq_lens, spectral.codec.sinks, spectral.codec.window,
        )  # fmt: skip
        _cases.check_state(step, (out[:, :, 0], None))


def ours(cell: Cell, preset: str, wanted: Sequence[str]) -> Iterator[Row]:
    """Rows "bare" and "ours", as wanted, of one cache."""
    new = 2 * (WARM + cell.steps) + 4
    with cell.enabled(preset, cell.compile) as handle:
        cache = filled_cache(cell, handle, cell.tokens + new)
        say(f"{preset}: cache of {cache.nbytes / 1e9:.2f} GB filled")
        check_layers(cell, cache)
        say(f"{preset}: layers checked")
        if "bare" in wanted:
            # The step that the model's forward captured, and its replays: pages for them are there,
            # lengths go on.
            logits = cell.model(input_ids=cell.ids(1), **{CACHE: cache}).logits
            if cache.graph is None or not logits.isfinite().all():
                raise AssertionError("the step was not captured, or its logits are not finite")
            say(f"{preset}: step captured")
            cache.spectral.reserve(WARM + cell.steps)
            row = replayed(cache.graph.graph, cell.steps)
            cache.columns += WARM + cell.steps
            device, host = cache.spectral.seq_lens.tolist(), cache.spectral.lengths
            if device != host or host[0] != cache.columns:
                raise AssertionError(f"steps: the device counts {device}, the host {host}")
            check_layers(cell, cache)
            yield {"what": "bare", "cache_bytes": cache.nbytes, **row}
        if "ours" in wanted:
            row = timed_generate(cell, cache)
            check_layers(cell, cache)
            yield {"what": "ours", "cache_bytes": cache.nbytes, **row}


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def prefill(cell: Cell, presets: Sequence[str], rounds: int = 3) -> Iterator[Row]:
    """Seconds of a prompt, dense and with each preset: medians of rounds in turns, as a card at its
    limit of power drifts; of a round the second prompt of two (the first allocates, compiles)."""
    ids = cell.ids(cell.tokens)
    found: dict[str | None, list[Row]] = {name: [] for name in (None, *presets)}
    for turn in range(rounds):
        for name in found if turn % 2 else reversed(found):
            free_memory()
            with contextlib.nullcontext() if name is None else cell.enabled(name) as handle:
                cache = None if handle is None else handle.new_cache(cell.batch, cell.tokens + 64)
                for _ in range(2):
                    if cache is not None:
                        cache.reset()
                    clock = generate(cell, ids, 2, cache)
                size = cell.dense_bytes if cache is None else cache.nbytes
            row = {"preset": name, "cache_bytes": size, "prefill_s": clock.prefill_s}
            found[name].append({**row, "peak_bytes": torch.cuda.max_memory_allocated()})
    for runs in found.values():
        seconds, dense = ([run["prefill_s"] for run in x] for x in (runs, found[None]))
        ratio = statistics.median(a / b for a, b in zip(seconds, dense, strict=True))
        yield {**runs[-1], "prefill_s": statistics.median(seconds), "prefill_ratio": ratio}


def long_generation(cell: Cell, preset: str) -> Row:
    """LONG_STEPS tokens: how even steps are, and how many kernels Triton compiles or loads for them
    after a short generation in the same cache."""
    compiled: list[Any] = []
    with cell.enabled(preset) as handle:
        cache = handle.new_cache(cell.batch, cell.tokens + LONG_STEPS)
        generate(cell, cell.ids(cell.tokens), 4, cache)
        cache.reset()
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.jit_post_compile_hook = lambda **kernel: compiled.append(kernel)
            clock = generate(cell, cell.ids(cell.tokens), LONG_STEPS, cache)
    steps = sorted(clock.steps_ms)
    row = {"p999_ms": steps[len(steps) * 999 // 1000], "max_ms": steps[-1], "steps": len(steps)}
    row |= {"compiled": len(compiled), "prefill_s": clock.prefill_s, "cache_bytes": cache.nbytes}
    return {**percentiles(steps), **row}


def jobs_of(args: argparse.Namespace, cell: Cell) -> Iterator[tuple[str, str | None, Any]]:
    """(what, preset, a function that gives a row or rows)."""
    for what in args.what:
        if what == "static":
            yield what, None, partial(static_cache, cell)
        elif what in ("graph", "fp8"):
            yield what, None, partial(dense_graph, cell, what == "fp8")
    for preset in args.presets if {"ours", "bare"} & {*args.what} else ():
        yield "bare, ours", preset, partial(ours, cell, preset, args.what)
    if "prefill" in args.what and cell.batch * cell.tokens <= PROMPTS:
        yield "prefill", None, partial(prefill, cell, args.presets)
    for preset in args.presets if "long" in args.what else ():
        yield "long", preset, partial(long_generation, cell, preset)


def ahead(args: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """Runs of one layer, of each batch size and layout, which leave in caches what they compile."""
    shortest = dict(sorted(args.cells, reverse=True))  # tokens of each batch size
    dim = _cases.llama(args.shape).head_dim
    count = max(len(_cases.layouts(preset, dim)) for preset in args.presets)
    for cell, layout in product(sorted(shortest.items()), range(count)):
        # What torch.compile makes is the same for all layouts, and dense steps have none.
        known = ("ours", "bare", "prefill") if layout else (*STEPS, "prefill")
        what = [x for x in args.what if x in known]
        own = {"what": what, "cells": [cell], "layout": layout, "json": None}
        own["compile"] = args.compile and not layout
        if what:
            yield argparse.Namespace(**{**vars(args), **own})


def alone(args: argparse.Namespace) -> str:
    """`run` without rows and lines but those that say what failed."""
    os.environ.pop("OUT", None)
    args.json = None
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run(args)
    return "\n".join(x for x in said.getvalue().splitlines() if "FAILED" in x)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("end_to_end", __doc__)
    add = parser.add_argument
    cells = [parse_shape(text) for text in ("1x8192", "1x32768", "1x131072")]
    add("cells", nargs="*", type=parse_shape, default=cells, metavar="CELL", help="rows x tokens")
    add("--shape", choices=list(_cases.SHAPES), default="8b")
    add("--presets", nargs="+", choices=_cases.LOSSY, default=["balanced"])
    add("--what", nargs="+", choices=WHAT, default=["graph", "bare", "ours"])
    add("--compile", action="store_true", help="layers of graph, fp8, ours and bare compiled")
    add("--steps", type=int, default=64, help="decode steps that are counted (default 64)")
    args = parser.parse_args(argv)
    args.cells = [(x.batch, x.tokens) for x in args.cells]
    args.layout = None  # of `ahead`: the number of the first layer's, and there is but one layer
    if args.steps < 8:
        parser.error(f"--steps: expected at least 8, got {args.steps}")
    return args


@torch.no_grad()
def run(args: argparse.Namespace) -> tuple[list[Row], int]:
    """The rows, and how many measurements failed."""
    whole = args.layout is None
    card, same = begin(args.commit, reads=whole)
    warnings.filterwarnings("ignore", module="transformers")
    jobs = [*ahead(args)] if whole and GPUS == 1 and card.device.type == "cuda" else []
    if not whole:
        inductor.compile_threads = 1  # there are processes enough
    with ProcessPoolExecutor(max(1, len(jobs)), get_context("spawn")) as pool:
        compiling = [pool.submit(alone, job) for job in jobs]
        model = make_model(args.shape, card.device, card.dtype, None if whole else 1)
        say(f"model made; {len(jobs)} processes compile")
        for future in compiling:
            if wrong := future.exception() or future.result():
                say(f"a process that compiles failed: {wrong}")
    say("compiled")
    embedding = local(model.get_input_embeddings().weight)
    weights = sum(local(p).nbytes for p in model.parameters()) - embedding.nbytes
    same |= {"transformers": transformers.__version__, "shape": args.shape, "weight_bytes": weights}
    same |= {"gpus": GPUS} if GPUS > 1 else {}
    rows, failed = list[Row](), 0
    for batch, tokens in args.cells:
        cell = Cell(model, batch, tokens, args.steps, card, args.compile, args.layout or 0)
        for what, preset, measure in jobs_of(args, cell):
            say(f"{batch}x{tokens} {what} {preset or ''}")
            free_memory()
            try:
                found = measure()
                for row in [found] if isinstance(found, dict) else found:
                    peak = {"peak_bytes": torch.cuda.max_memory_allocated()}
                    row = {"B": batch, "T": tokens, "what": what, "preset": preset, **peak, **row}
                    if "ms" in row:
                        row = {"tokens_per_s": batch * 1e3 / row["ms"], "steps": args.steps, **row}
                    if args.compile and what in (*STEPS, "bare, ours"):
                        row["what"] += " compiled"
                    rows.append(record(row, same, args.json))
            except Exception as error:
                failed += fail(f"{batch}x{tokens} {what} {preset or ''}", error)
    return rows, failed


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if GPUS > 1:
        torch.cuda.set_device(RANK)
    if RANK:  # the first one speaks
        failed = len(alone(args))
    else:
        rows, failed = run(args)
        print(end_to_end_table(rows))
    if GPUS > 1:
        free_memory()  # graphs, for which the end of NCCL would wait
        torch.distributed.destroy_process_group()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
