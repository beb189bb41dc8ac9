"""Time what compresses the cache after prefill, beside the prefill itself, and measure its memory.

    python -m perf.compress [--tokens 32768] [--layers 32] [--json]

One row of G = 8 KV heads, D = 128, bf16, in chunks of 128; a falling spectrum in a random frame. Per layer: `phase_align`,
`gram` and `encode` for K and V (device times, cold L2, see perf/_timing.py), the eigen part (`fit_basis`,
`quantise_components`, `fit_encoder`; for one layer, and for all layers at once), `fit_steps`; and all of it called one
after another. `gram` and `encode` are checked against float64 before they are timed. `read_share`: bytes that gram and
encode must move over their time, as a share of the bandwidth of a read-only pass. The prefill is one decoder layer in the
shape of Llama-3-8B with random weights, as many one after another as there are layers: `prefill_share` is what the cache
(preset balanced, queries given) adds to that, as the adapter has it: a layer is compressed beside its attention, the rest
of it and the next one; `.._at_once`: not deferred. `peak_ratio`: what K and V of one layer after another, and
`SpectralCache.append`, take at most of memory, over (dense K and V of one layer + the compressed cache of all), with the
same preset; each layer is finished before the next and its K's memory is used. `.._adapter`: K is copied, and a layer
finished when its numbers have come, as the adapter has it. `narrow_ms`: to write the pages of a layer anew for other bands,
which is done `narrowed_per_layer` times. `step_ratio`: median decode step of all layers' caches (append and attend, host
time included, nothing else of a model) in which a layer compresses a chunk, over that in which none does; `.._p99_ratio`,
`.._max_ratio`: of all steps, over their median. `multiprocessor_us`: what the compression of a layer takes of the whole
card: each kernel's time (by the profiler) times the share of the multiprocessors that its programs can fill. Beside a model
that fills the card, the prefill gets longer by about that. `launches`: of kernels and copies. Both null where the profiler
sees no kernels.

Row: gpu commit T ms_per_layer ms_per_1k_tokens eigen_ms_per_layer read_share prefill_ms_per_layer prefill_share
prefill_share_at_once peak_ratio peak_ratio_adapter narrow_ms narrowed_per_layer step_ms step_ratio step_p99_ratio
step_max_ratio svd_ratio lowrank_ratio gram_error (T = 131,072) multiprocessor_us launches torch triton.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

import spectral_kernels as sk
from perf._timing import ROOT, Call, Card, NoCard, device_times, versions
from spectral_kernels import eigen
from spectral_kernels.cache import LayerCache
from spectral_kernels.compress import Side, error_weights, fit_spectra, quantise_components
from spectral_kernels.pages import pack_pages, unpack_pages

HEADS, KV_HEADS, DIM, CHUNK = 32, 8, 128, 128
HIDDEN, FFN = 4096, 14336
LAYOUT = sk.PageLayout(sk.Bands.parse("16x8+16x4+96x2"), sk.Bands.parse("32x4+96x2"), DIM, CHUNK)
RANKS = (16, 64, 96)
Store = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def rows_of(heads: int, tokens: int, card: Card, decay: float = 4.0) -> torch.Tensor:
    """[1, heads, T, D] with a falling spectrum in a frame of each head's own."""
    frame = torch.linalg.qr(torch.randn(heads, DIM, DIM, device=card.device))[0]
    sizes = torch.exp(-decay * torch.arange(DIM, device=card.device) / DIM)
    out = torch.empty(1, heads, tokens, DIM, dtype=card.dtype, device=card.device)
    for head in range(heads):
        out[0, head] = (torch.randn(tokens, DIM, device=card.device) * sizes @ frame[head]).to(card.dtype)
    return out


def once_ms(call: Call) -> float:
    """Milliseconds of a call by device events, host time included where the host is what it waits for."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def eager_ms(call: Call, repeats: int = 10) -> float:
    """Median of `once_ms`, after a call that compiles."""
    call()
    return statistics.median(once_ms(call) for _ in range(repeats))


def gram_error(x: torch.Tensor) -> float:
    """Largest error of `gram` relative to |x|^T |x|, against float64."""
    worst = 0.0
    got = sk.gram(x)
    for head in range(x.shape[1]):
        own = x[0, head].double()
        off = (got[0, head].double() - own.mT @ own).abs() / (own.abs().mT @ own.abs())
        worst = max(worst, off.max().item())
    return worst


def check_encode(x: torch.Tensor, encoder: torch.Tensor, bands: sk.Bands, pages: torch.Tensor, side: str) -> None:
    """Codes lie within what the kernel's arithmetic may make of the coefficients (tests/budgets.py), on head 0."""
    own, e = x[0, 0].double(), encoder[0, 0].double()
    parts = 2.0**-16 if x.dtype == torch.bfloat16 else 0.0
    slack = (2.0**-20 + parts + (DIM + 2) * 2.0**-24) * (own.abs() @ e.abs())
    exact = (own @ e).unflatten(0, (-1, CHUNK))
    low, high = (
        unpack_pages(pack_pages(exact + sign * slack.unflatten(0, (-1, CHUNK)), bands, side=side), bands, side=side)
        for sign in (-1, 1)
    )
    got = unpack_pages(pages[:, 0], bands, side=side)
    if not ((low <= got) & (got <= high)).all():
        raise AssertionError(f"encode {side}: a code lies outside of what its arithmetic allows")


class Layer:
    """Keys (phase-aligned), values, metrics and what compressing them needs."""

    def __init__(self, tokens: int, card: Card) -> None:
        self.k, self.v = rows_of(KV_HEADS, tokens, card), rows_of(KV_HEADS, tokens, card, decay=2.0)
        metrics = rows_of(2 * KV_HEADS, 512, card)[0].double()
        self.k_metric, self.v_metric = (metrics.mT @ metrics).float().unflatten(0, (2, KV_HEADS)).unbind(0)
        self.chunks = tokens // CHUNK
        shape = (self.chunks, KV_HEADS)
        empty = partial(torch.empty, dtype=torch.uint8, device=card.device)
        self.k_pages, self.v_pages = empty(*shape, CHUNK * LAYOUT.k.bytes), empty(*shape, CHUNK * LAYOUT.v.bytes)
        self.ids = torch.arange(self.chunks, dtype=torch.int32, device=card.device)[None]

    def sides(self) -> list[tuple[str, torch.Tensor, sk.Bands, torch.Tensor, torch.Tensor]]:
        return [
            ("k", self.k, LAYOUT.k, self.k_metric, self.k_pages),
            ("v", self.v, LAYOUT.v, self.v_metric, self.v_pages),
        ]

    def compress(self) -> None:
        """All that a layer takes once its keys are aligned and the metric of its queries is known."""
        sides = [Side(x, metric, [bands]) for _, x, bands, metric, _ in self.sides()]
        for (side, x, bands, _, pages), spectrum in zip(self.sides(), fit_spectra(sides), strict=True):
            sk.encode(x, spectrum.side(bands)[2], bands, pages, self.ids, side=side)


def eigen_part(moment: torch.Tensor, metric: torch.Tensor) -> None:
    sk.fit_encoder(*quantise_components(sk.fit_basis(moment, metric, rank=DIM), metric)[:2])


def weighted_moments(layer: Layer) -> torch.Tensor:
    """Float64 [2 G, D, D]: the eigenproblems of a layer."""
    found = []
    for _, x, _, metric, _ in layer.sides():
        root = torch.linalg.cholesky(metric.double())
        found.append(root.mT @ sk.gram(x)[0].double() @ root)
    return torch.cat(found)


def worst_loss(w: torch.Tensor, rows: torch.Tensor, best: torch.Tensor) -> float:
    """How much more of the trace the first r rows miss than the best, relative to the latter, over RANKS and matrices."""
    kept, most = ((x @ w * x).sum(-1).cumsum(-1) for x in (rows.double(), best))
    trace = w.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    index = torch.tensor(RANKS, device=w.device) - 1
    return ((most - kept)[..., index] / (trace - most)[..., index]).max().item()


def eigen_table(w: torch.Tensor, layers: int) -> list[str]:
    """Milliseconds a layer of solvers of all layers' eigenproblems at once, and what they lose against float64."""
    many = w.repeat(layers, 1, 1)
    best = eigen.eigenvectors_torch(w)
    lines = []

    def line(name: str, solve: Any) -> None:
        try:
            loss = worst_loss(w, solve(w), best)
            all_ms, one_ms = eager_ms(partial(solve, many), 3) / layers, eager_ms(partial(solve, w), 3)
            lines.append(f"  {name:34}{all_ms:9.3f}{one_ms:9.3f}{loss:12.1e}")
        except Exception as error:  # a solver that a build of PyTorch lacks
            lines.append(f"  {name:34} {type(error).__name__}: {str(error).splitlines()[0][:60]}")

    line("eigenvectors (one-sided Jacobi)", eigen.eigenvectors)
    line("torch.linalg.eigh float64", eigen.eigenvectors_torch)
    line("torch.linalg.eigh float32", lambda x: torch.linalg.eigh(x.float()).eigenvectors.mT.flip(-2))
    root = torch.linalg.cholesky_ex(many).L
    eye = torch.eye(DIM, dtype=w.dtype, device=w.device).expand_as(root)
    for name, call in {
        "cholesky_ex float64": lambda: torch.linalg.cholesky_ex(many),
        "solve_triangular float64": lambda: torch.linalg.solve_triangular(root, eye, upper=False, left=False),
        "cholesky_solve float64": lambda: torch.cholesky_solve(eye, root),
        "matmul float64": lambda: many @ root,
    }.items():
        lines.append(f"  {name:34}{eager_ms(call, 3) / layers:9.3f}")
    rows = root.mT.to(torch.float32, memory_format=torch.contiguous_format)
    for count in (len(rows), len(w)):
        x = rows[:count].clone()

        def rotate(x: torch.Tensor = x) -> None:
            x.copy_(rows[: len(x)])
            eigen._orthogonalise(x)

        lines.append(f"  rotations alone, {count:3} matrices {eager_ms(rotate, 3):16.3f} ms in all")
    return lines


def prefill_layer(tokens: int, card: Card) -> Callable[[Store, Callable[[], None]], torch.Tensor]:
    """One decoder layer in the shape of Llama-3-8B, random weights. It hands queries, keys (before RoPE) and values to a
    function before its attention, and calls another after it, as the adapter does."""

    def weight(out: int, into: int) -> torch.Tensor:
        return torch.randn(out, into, dtype=card.dtype, device=card.device) * into**-0.5

    projections, o = [weight(heads * DIM, HIDDEN) for heads in (HEADS, KV_HEADS, KV_HEADS)], weight(HIDDEN, HIDDEN)
    up, down = weight(2 * FFN, HIDDEN), weight(HIDDEN, FFN)
    x = torch.randn(1, tokens, HIDDEN, dtype=card.dtype, device=card.device)
    angle = torch.arange(tokens, device=card.device)[:, None] * 5e5 ** -(torch.arange(0, DIM, 2, device=card.device) / DIM)
    cos, sin = (f(torch.cat((angle, angle), -1)).to(card.dtype) for f in (torch.cos, torch.sin))

    def turned(y: torch.Tensor) -> torch.Tensor:
        a, b = y.chunk(2, dim=-1)
        return y * cos + torch.cat((-b, a), dim=-1) * sin

    def run(store: Store, start: Callable[[], None]) -> torch.Tensor:
        y = rms_norm(x, (HIDDEN,))
        q, k, v = ((y @ w.mT).unflatten(-1, (-1, DIM)).transpose(1, 2) for w in projections)
        store(q, k, v)
        y = scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True, enable_gqa=True)
        start()
        del q, k, v
        y = x + y.transpose(1, 2).flatten(2) @ o.mT
        a, b = (rms_norm(y, (HIDDEN,)) @ up.mT).chunk(2, dim=-1)
        return y + (silu(a) * b) @ down.mT

    return run


def prefill_times(tokens: int, layers: int, card: Card, rounds: int = 6) -> tuple[float, float, float]:
    """Milliseconds a layer of the prefill without a cache; how many times that it takes with one that defers as the adapter
    has it, and with one that does not. Medians of rounds, each of two with and two without, in mirrored order: a card at
    its limit of power drifts by more than a cache adds."""
    run = prefill_layer(tokens, card)
    cache = new_cache(card, layers, "balanced", metrics_of(layers, card))

    def store(layer: int, defer: bool | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        if defer is not None:
            cache.append(layer, k, v, queries=q, defer=defer)

    def all_layers(defer: bool | None) -> None:
        cache.reset()
        for layer in range(layers):
            run(partial(store, layer, defer), partial(cache.start, layer) if defer else lambda: None)
        cache.finish()

    def measured(defer: bool, rounds: int) -> tuple[float, float]:
        all_layers(defer)  # compiles, or grows the allocator's pools
        found = []
        for n in range(rounds):
            order = (None, defer, defer, None) if n % 2 == 0 else (defer, None, None, defer)
            times = [(mode, once_ms(partial(all_layers, mode))) for mode in order]
            without, both = (sum(ms for mode, ms in times if mode is own) for own in (None, defer))
            found.append((without / 2, both / without))
        plain, ratio = (statistics.median(x) for x in zip(*found, strict=True))
        return plain, ratio

    all_layers(True)  # once more: the first round of a process is the slowest still
    plain, deferred = measured(True, rounds)
    return plain / layers, deferred, measured(False, 2)[1]


def metrics_of(layers: int, card: Card) -> list[torch.Tensor]:
    rows = rows_of(HEADS, 512, card)[0].float()
    return [rows.mT @ rows] * layers


def new_cache(
    card: Card, layers: int, preset: str | sk.Preset, v_metrics: Sequence[torch.Tensor] | None = None
) -> sk.SpectralCache:
    inv_freq = 5e5 ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    rope = sk.Rope.from_inv_freq(inv_freq, device=card.device)
    return sk.SpectralCache(
        layers=layers,
        batch=1,
        query_heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        rope=rope,
        preset=preset,
        dtype=card.dtype,
        device=card.device,
        v_metrics=v_metrics,
    )


def peak_ratio(tokens: int, layers: int, card: Card, adapter: bool) -> tuple[float, int]:
    """The ratio, of layers that lose more or less; and how many times pages were written anew. adapter: as that has it."""
    q = rows_of(HEADS, tokens, card)
    cache = new_cache(card, layers, "balanced", metrics_of(layers, card))
    torch.cuda.synchronize()
    gc.collect()  # what earlier measurements left
    torch.cuda.empty_cache()
    before, peak, dense = torch.cuda.memory_allocated(), 0, 0
    narrowed, narrow = [], LayerCache.narrow

    def noted(layer: LayerCache, layout: sk.PageLayout) -> None:
        narrowed.append(layout != layer.layout)
        narrow(layer, layout)

    with mock.patch.object(LayerCache, "narrow", noted):
        for layer in range(layers):
            k, v = (rows_of(KV_HEADS, tokens, card, decay=decay) for decay in (2.0 + layer % 5, 1.0 + layer % 3))
            dense = k.nbytes + v.nbytes
            torch.cuda.reset_peak_memory_stats()
            cache.append(layer, k, v, queries=q, defer=True, overwrite=not adapter)
            cache.start(layer)
            if not adapter:
                cache.finish(layer)
            peak = max(peak, torch.cuda.max_memory_allocated())
            del k, v
        cache.finish()
    return (peak - before) / (dense + cache.nbytes), sum(narrowed)


def narrow_ms(tokens: int, card: Card) -> float:
    """Milliseconds that one layer's pages take to be written anew."""
    cache = new_cache(card, 2, "balanced")
    cache.append(0, *(rows_of(KV_HEADS, tokens, card) for _ in range(2)))
    layer = cache.layers[0]
    return eager_ms(lambda: copy.copy(layer).narrow(layer.layouts[0]))


def step_times(card: Card, layers: int, tokens: int = 8192, steps: int = 384) -> tuple[list[float], list[float]]:
    """Milliseconds of decode steps of all layers' caches: of those that compress nothing, and of those in which a layer
    does. New tokens are like the prompt's."""
    cache = new_cache(card, layers, "balanced")
    warm = 2 * cache.preset.chunk  # kernels are compiled by then, and rings have their size
    k, v = (rows_of(KV_HEADS, tokens + warm + steps, card) for _ in range(2))
    for layer in range(layers):
        cache.append(layer, k[:, :, :tokens], v[:, :, :tokens])
    q = rows_of(HEADS, 1, card)
    plain: list[float] = []
    compressing: list[float] = []
    for step in range(warm + steps):
        own = slice(tokens + step, tokens + step + 1)
        chunks = [layer.chunks[0] for layer in cache.layers]
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for layer in range(layers):
            cache.append(layer, k[:, :, own], v[:, :, own])
            cache.attend(layer, q)
        torch.cuda.synchronize()
        if step >= warm:
            same = chunks == [layer.chunks[0] for layer in cache.layers]
            (plain if same else compressing).append((time.perf_counter() - begin) * 1e3)
    return plain, compressing


class Kernel(NamedTuple):
    """A kernel's launches a layer, its time and its share of the card, in microseconds a layer."""

    launches: float
    us: float
    multiprocessor_us: float


def kernels_of(trace: Iterable[dict[str, Any]], multiprocessors: int, layers: int) -> dict[str, Kernel]:
    """Of a profiler's trace (Chrome's format) of so many layers, by name; copies and fills count as one program."""
    found: dict[str, Kernel] = {}
    for event in trace:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        us, programs = event["dur"] / layers, math.prod(event["args"].get("grid", (1,)))
        was = found.get(event["name"], Kernel(0, 0, 0))
        own = Kernel(1 / layers, us, us * min(1, programs / multiprocessors))
        found[event["name"]] = Kernel(*(a + b for a, b in zip(was, own, strict=True)))
    return found


def kernels_of_a_layer(tokens: int, card: Card) -> dict[str, Kernel]:
    """What the compression of a layer launches, as the adapter has it, alone on the card; the mean of four layers of eight.

    Empty where the profiler sees no kernels (CUPTI may be refused).
    """
    from torch.profiler import ProfilerActivity, profile

    cache = new_cache(card, 8, "balanced", metrics_of(8, card))
    k, v, q = rows_of(KV_HEADS, tokens, card), rows_of(KV_HEADS, tokens, card, decay=2.0), rows_of(HEADS, tokens, card)

    def compress(layers: range) -> None:
        for layer in layers:
            cache.append(layer, k, v, queries=q, defer=True)
            cache.start(layer)
            cache.finish(layer)
        torch.cuda.synchronize()

    compress(range(2))  # compiles
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        compress(range(2, 6))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())["traceEvents"]
    return kernels_of(trace, card.properties.multi_processor_count, 4)


def total_of(kernels: Iterable[Kernel]) -> Kernel:
    return Kernel(*map(sum, zip(Kernel(0, 0, 0), *kernels, strict=True)))


def kernel_table(kernels: dict[str, Kernel], lines: int = 16) -> list[str]:
    """Those that take most of the card, the rest together, and all."""
    ranked = sorted(kernels.items(), key=lambda item: -item[1].multiprocessor_us)
    rest = [own for _, own in ranked[lines:]]
    shown = [*ranked[:lines], (f"{len(rest)} others", total_of(rest)), ("all", total_of(kernels.values()))]
    return ["kernels of a layer: launches, us, us of the whole card"] + [
        f"  {name[:50]:52}{own.launches:7.1f}{own.us:10.1f}{own.multiprocessor_us:10.1f}" for name, own in shown
    ]


def against_svd(layer: Layer) -> tuple[list[str], float, float]:
    """Lines, and how many times longer SVDs of the whitened keys take than gram and eigen part of K; with their losses."""
    rank = 64
    root = torch.linalg.cholesky(layer.k_metric)
    white = layer.k[0].float() @ root
    w = white.double().mT @ white.double()
    best = eigen.eigenvectors_torch(w)
    total = w.diagonal(dim1=-2, dim2=-1).sum(-1)
    least = total - (best[:, :rank] @ w * best[:, :rank]).sum((-2, -1))

    def excess(rows: torch.Tensor) -> float:
        rows = rows.double()
        return ((total - (rows @ w * rows).sum((-2, -1))) / least - 1).max().item()

    def ours() -> torch.Tensor:
        return sk.fit_basis(sk.gram(layer.k)[0], layer.k_metric, rank=rank)

    # Rows that are orthonormal in the metric, back to orthonormal ones.
    own = torch.linalg.qr((ours() @ root).double().mT)[0].mT
    svd = partial(torch.linalg.svd, white, full_matrices=False)
    low = partial(torch.svd_lowrank, white, q=rank, niter=2)
    names = ("gram + fit_basis", "torch.linalg.svd", "torch.svd_lowrank")
    losses = [excess(own), excess(svd()[2][:, :rank]), excess(low()[2].mT)]
    times = [eager_ms(ours, 5), eager_ms(svd, 1), eager_ms(low, 3)]
    lines = [
        f"  {n:34}{t:9.2f} ms  loss over the least - 1: {loss:.1e}" for n, t, loss in zip(names, times, losses, strict=True)
    ]
    return lines, times[1] / times[0], times[2] / times[0]


def parts_of_a_layer(layer: Layer, rope: sk.Rope) -> list[str]:
    """Lines: what the cache does for a layer's prompt besides `encode`, each by itself, by eager calls."""
    q = torch.randn(1, HEADS, *layer.k.shape[2:], device=layer.k.device).to(layer.k.dtype)
    sides = [Side(layer.k, layer.k_metric, centre=True), Side(layer.v, layer.v_metric)]
    weighing = layer.v_metric, torch.ones(1, HEADS, device=q.device)
    calls = {
        "query_metric": lambda: sk.query_metric(q, rope, chunk=512, kv_heads=KV_HEADS),
        "error_weights": lambda: error_weights(q, layer.k, layer.v, rope, weighing, chunk=512, sinks=4, window=16),
        "fit_spectra": lambda: fit_spectra(sides),
    }
    return [f"  {name:34}{eager_ms(call, 5):9.3f} ms" for name, call in calls.items()]


def say(*lines: str) -> None:
    print("\n".join(lines), flush=True)


def measure(tokens: int, layers: int, card: Card) -> dict[str, Any]:
    layer = Layer(tokens, card)
    bandwidth = card.read_bandwidth
    long = rows_of(1, 131072, card)
    error = gram_error(long)
    if error > 1e-5:
        raise AssertionError(f"gram: relative error {error:.2e} at T = 131,072, expected at most 1e-5")
    del long
    positions = torch.arange(tokens, dtype=torch.int32, device=card.device)[None]
    rope = sk.Rope.from_inv_freq(5e5 ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM), device=card.device)
    aligned = torch.empty_like(layer.k)
    count = card.copies(layer.k.nbytes)  # so that no call finds its rows in the L2 cache
    align = partial(sk.phase_align, positions=positions, rope=rope, chunk=CHUNK, out=aligned)
    calls: list[tuple[str, int, list[Call]]] = [
        ("phase_align K", 2 * layer.k.nbytes, [partial(align, layer.k.clone()) for _ in range(count)])
    ]
    for side, x, bands, metric, pages in layer.sides():
        encoder = sk.fit_side(x, bands, metric)[2]
        sk.encode(x, encoder, bands, pages, layer.ids, side=side)
        check_encode(x, encoder, bands, pages, side)
        copies = [x.clone() for _ in range(count)]
        write = partial(sk.encode, encoder=encoder, bands=bands, pages=pages, side=side)
        name = side.upper()
        calls += [
            (f"gram {name}", x.nbytes, [partial(sk.gram, rows) for rows in copies]),
            (f"encode {name}", x.nbytes + pages.nbytes, [partial(write, rows, page_ids=layer.ids) for rows in copies]),
            (f"encode {name}, one chunk", 0, [partial(write, x[:, :, :CHUNK], page_ids=layer.ids[:, :1])]),
        ]
    moved, taken = 0, 0.0
    for name, nbytes, same_work in calls:
        times = device_times(same_work)
        share = f"  {nbytes / times.p50 * 1e6 / bandwidth:5.0%} of reads" if nbytes else ""
        say(f"  {name:34}{times.p50:9.1f} us  {times.p20:.1f} .. {times.p80:.1f}{share}")
        if nbytes and "align" not in name:
            moved, taken = moved + nbytes, taken + times.p50
    del calls, same_work, copies
    moment = torch.stack([sk.gram(x)[0] for _, x, _, _, _ in layer.sides()])
    metric = torch.stack([layer.k_metric, layer.v_metric])
    one_ms = eager_ms(partial(eigen_part, moment, metric))
    many = [x.expand(layers, -1, -1, -1, -1).contiguous() for x in (moment, metric)]
    eigen_ms = eager_ms(partial(eigen_part, *many), 3) / layers
    for bands in (LAYOUT.k, LAYOUT.v):
        sample = layer.k[:, :, :: tokens // 2048].float()
        say(f"  fit_steps {bands!s:24}{eager_ms(partial(sk.fit_steps, sample, bands)) * 1e3:9.1f} us")
    say(*parts_of_a_layer(layer, rope))
    say(f"  eigen part, one layer {one_ms:21.3f} ms", f"  eigen part, {layers} layers at once {eigen_ms:12.3f} ms a layer")
    eager = eager_ms(layer.compress)
    batched = taken / 1e3 + eigen_ms
    say(f"  a layer by itself, all calls {eager:14.3f} ms", f"  kernels + batched eigen part {batched:14.3f} ms a layer")
    say("solvers of eigenproblems: ms a layer of all at once, ms of one layer, loss")
    say(*eigen_table(weighted_moments(layer), layers))
    svd_lines, svd, low = against_svd(layer)
    say(*svd_lines)
    del layer, aligned
    prefill, deferred, at_once = prefill_times(tokens, layers, card)
    say(f"  prefill of a layer {prefill:24.3f} ms; with a cache {deferred:.3f} times that, not deferred {at_once:.3f}")
    (peak, narrowed), (adapter, _) = (peak_ratio(tokens, layers, card, adapter) for adapter in (False, True))
    say(f"  peak ratio of {layers} layers {peak:19.3f}, as the adapter has it {adapter:.3f}")
    narrowing = narrow_ms(tokens, card)
    say(f"  to write a layer's pages anew {narrowing:16.3f} ms; {narrowed} times in all")
    plain, compressing = step_times(card, layers)
    steps = sorted(plain + compressing)
    median, p99 = statistics.median(steps), steps[len(steps) * 99 // 100]
    calm, spike = statistics.median(plain), statistics.median(compressing)
    say(
        f"  {len(steps)} decode steps of {layers} layers: median {median:.3f} ms, p99 {p99:.3f}, longest {steps[-1]:.3f};",
        f"  {len(plain)} that do not compress {calm:.3f}, {len(compressing)} that do {spike:.3f} (medians)",
    )
    kernels = kernels_of_a_layer(tokens, card)  # last: after the profiler every launch takes longer
    every = total_of(kernels.values())
    say(*kernel_table(kernels))
    row = {
        "T": tokens,
        "ms_per_layer": eager,
        "ms_per_1k_tokens": eager * 1024 / tokens,
        "batched_ms_per_layer": batched,
        "eigen_ms_per_layer": eigen_ms,
        "read_share": moved / taken * 1e6 / bandwidth,
        "prefill_ms_per_layer": prefill,
        "prefill_share": deferred - 1,
        "prefill_share_at_once": at_once - 1,
        "peak_ratio": peak,
        "peak_ratio_adapter": adapter,
        "narrow_ms": narrowing,
        "narrowed_per_layer": narrowed / layers,
        "step_ms": median,
        "step_ratio": spike / calm,
        "step_p99_ratio": p99 / median,
        "step_max_ratio": steps[-1] / median,
        "svd_ratio": svd,
        "lowrank_ratio": low,
        "gram_error": error,
        "multiprocessor_us": every.multiprocessor_us if kernels else None,
        "launches": every.launches if kernels else None,
    }
    return row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.compress", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of the row, a multiple of 2,048 (default 32,768)")
    parser.add_argument("--layers", type=int, default=32, help="layers whose eigenproblems are solved at once (default 32)")
    parser.add_argument("--commit", help="what the rows say was measured, where git cannot tell")
    default = ROOT / "perf" / "results" / "compress.jsonl"
    parser.add_argument(
        "--json", type=Path, nargs="?", const=default, help=f"append the row to a file (default {default.name})"
    )
    args = parser.parse_args(argv)
    if args.tokens < 2048 or args.tokens % 2048 or args.layers < 1:
        parser.error("--tokens: expected a multiple of 2,048; --layers: at least 1")
    try:
        card = Card.current()
    except NoCard as error:
        print(f"perf.compress: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    same = {"gpu": card.name, **versions(args.commit)}
    say(f"{card.name}, commit {same['commit']}, reads {card.read_bandwidth / 1e9:.0f} GB/s, T = {args.tokens}")
    row = {**same, **measure(args.tokens, args.layers, card)}
    print(json.dumps({name: round(x, 4) if isinstance(x, float) and x > 1e-3 else x for name, x in row.items()}))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        with args.json.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
