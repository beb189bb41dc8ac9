"""Time a decode step over spectral pages against dense attention, in one run on one card.

    python -m perf.attention --quick                    four shapes, a minute
    python -m perf.attention --json                     all shapes; rows go to perf/results/attention.jsonl

A step is what a layer runs for a new token: `attend_spectral(.., exact=..)` over the newest 128 tokens and 4 sinks, exact,
and the cold pages of the others, with the projected queries and the merge of all states. A peer reads all tokens in 16 bits
(or fp8). Queries, keys and values are bf16, before sm_80 fp16. First every kernel variant is compiled and checked on small
shapes; each row and each peer is checked again before it is timed: ours against float64 within a derived budget
(perf/_cases.py), a peer against float64 within the rounding of its 16-bit weights and output. Times: perf/_timing.py. Those
of a step's kernels alone are the profiler's. `read_share` is of `_attend_spectral_kernel` alone, with all that it does: the
page bytes that it must read over its time, as a share of the bandwidth of a read-only pass in the same run.

Row: gpu commit B H G D T layout chunk align p20_us p50_us p80_us best_peer best_peer_us speedup best_fp8 best_fp8_us gbs
kernel_us (from sm_80 on all but the merge) project_us exact_us (both before sm_80) merge_us kernel_gbs read_share read_gbs
budget_share peers {name: microseconds, or why there is no figure} torch triton date.
The same arguments draw the same shapes; tables and plot: python -m perf.tables.   Test: tests/test_perf.py.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from perf import tables
from perf._cases import LAYOUTS, SCORE_STD, Decode, Shape, check_state, make_decodes, preset_layout
from perf._timing import ROOT, Call, Card, NoCard, Times, device_times, kernel_times, versions
from tests import budgets

BATCHES, TOKENS = (1, 4, 16, 64), (2048, 8192, 32768, 131072)
HEADS, DIMS = ("32/8", "64/8", "12/2", "32/32"), (128, 64)
# What README promises; measured first, and all of --quick.
TARGETS = tuple(Shape(b, 32, 8, 128, t) for b, t in ((16, 65536), (1, 131072), (1, 32768), (1, 8192)))
SMALL_SHAPES = ((1, 2048), (1, 32768), (16, 8192))  # B, T checked first: they compile all that the others launch
PAGE = 64  # tokens of a FlashInfer page
STEP_KERNELS = {  # what a step launches (one of these names), by the columns of a row
    "project_us": ("_project_operand_kernel",),
    "kernel_us": ("_attend_spectral_kernel", "_attend_operands_kernel"),
    "exact_us": ("_attend_exact_kernel",),
    "merge_us": ("_finish_spectral_kernel",),
}


@dataclass
class Dense:
    """Dense inputs of a shape, one or several copies: q [B, H, D], k and v [B, G, T, D] each."""

    shape: Shape
    q: list[torch.Tensor]
    k: list[torch.Tensor]
    v: list[torch.Tensor]

    @classmethod
    def random(cls, shape: Shape, *, copies: int, dtype: torch.dtype, device: torch.device) -> Dense:
        def normal(*size: int, std: float = 1.0) -> list[torch.Tensor]:
            return [torch.empty(size, dtype=dtype, device=device).normal_(std=std) for _ in range(copies)]

        kv = (shape.batch, shape.kv_heads, shape.tokens, shape.dim)
        return cls(shape, normal(shape.batch, shape.heads, shape.dim), normal(*kv, std=SCORE_STD), normal(*kv))


@dataclass(frozen=True)
class Peer:
    """Another implementation. `calls` gives one call a copy, each returning [B, H, D]; `paged`: it reads the same memory as
    pages [B * T / PAGE, G, PAGE, D]; `fp8`: as 8-bit floats."""

    name: str
    calls: Callable[[Dense], list[Call]]
    paged: bool = False
    fp8: bool = False

    def check(self, dense: Dense, out: torch.Tensor) -> None:
        """Raise AssertionError unless the last row's last head is attention: the weights and the output are rounded once to
        16 bits each, and scores are float32 sums of D products."""
        shape, dtype = dense.shape, dense.q[0].dtype
        k, v = dense.k[0], dense.v[0]
        if self.paged:
            k, v = (x.view(shape.batch, -1, shape.kv_heads, PAGE, shape.dim).transpose(1, 2).flatten(2, 3) for x in (k, v))
        k, v = k[-1, -1], v[-1, -1]
        if self.fp8:
            k, v = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
        q, k, v = dense.q[0][-1, -1].double(), k.double(), v.double()
        scale = shape.dim**-0.5
        weight = torch.softmax(scale * (k @ q), dim=0)
        want, size = weight @ v, weight @ v.abs()
        # A score may be off by D + 4 roundings of its terms: each weight by as much, relatively.
        score = (weight * (scale * (k.abs() @ q.abs()))) @ v.abs() * (shape.dim + 4) * 2 * budgets.ACC
        adds = (shape.tokens // 64 + 64) * budgets.ACC * size
        allowed = budgets.U[dtype] * (2 * size + want.abs()) + 2 * score + adds
        worst = float(((out[-1, -1].double() - want).abs() / allowed).max())
        if not worst <= 1:
            raise AssertionError(f"wrong result: an error of {worst:.3g} times what rounding explains")


def sdpa(backend: SDPBackend, folded: bool, dense: Dense) -> list[Call]:
    """PyTorch's attention by one backend; folded: the heads of a group are queries of one head."""
    groups = dense.shape.kv_heads

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            if folded:
                return scaled_dot_product_attention(q.unflatten(1, (groups, -1)), k, v).flatten(1, 2)
            return scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=q.shape[1] != groups)[:, :, 0]

    return [partial(call, *qkv) for qkv in zip(dense.q, dense.k, dense.v, strict=True)]


def flashinfer_single(dense: Dense) -> list[Call]:
    from flashinfer import single_decode_with_kv_cache as run

    if dense.shape.batch > 1:
        raise NotImplementedError("one row only")

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return run(q[0], k[0], v[0], kv_layout="HND", use_tensor_cores=True)[None]

    return [partial(call, *qkv) for qkv in zip(dense.q, dense.k, dense.v, strict=True)]


def flashinfer_paged(fp8: bool, dense: Dense) -> list[Call]:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    shape, q = dense.shape, dense.q[0]
    kv_dtype = torch.float8_e4m3fn if fp8 else q.dtype
    pages = shape.tokens // PAGE
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    indices = torch.arange(shape.batch * pages, dtype=torch.int32, device=q.device)
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=q.device) * pages
    last = torch.full((shape.batch,), PAGE, dtype=torch.int32, device=q.device)
    wrapper.plan(
        starts, indices, last, shape.heads, shape.kv_heads, shape.dim, PAGE, q_data_type=q.dtype, kv_data_type=kv_dtype
    )

    def as_pages(x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, shape.kv_heads, PAGE, shape.dim).to(kv_dtype)

    caches = [(as_pages(k), as_pages(v)) for k, v in zip(dense.k, dense.v, strict=True)]
    return [partial(wrapper.run, q, cache) for q, cache in zip(dense.q, caches, strict=True)]


def flex(dense: Dense) -> list[Call]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # compiled for each shape: its best case
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return compiled(q[:, :, None], k, v, enable_gqa=q.shape[1] != k.shape[1])[:, :, 0]

    return [partial(call, *qkv) for qkv in zip(dense.q, dense.k, dense.v, strict=True)]


PEERS = (
    Peer("cudnn", partial(sdpa, SDPBackend.CUDNN_ATTENTION, False)),
    Peer("cudnn folded", partial(sdpa, SDPBackend.CUDNN_ATTENTION, True)),
    Peer("flash", partial(sdpa, SDPBackend.FLASH_ATTENTION, False)),
    Peer("flash folded", partial(sdpa, SDPBackend.FLASH_ATTENTION, True)),
    Peer("efficient folded", partial(sdpa, SDPBackend.EFFICIENT_ATTENTION, True)),
    Peer("flashinfer single", flashinfer_single),
    Peer("flashinfer paged", partial(flashinfer_paged, False), paged=True),
    Peer("flashinfer fp8", partial(flashinfer_paged, True), paged=True, fp8=True),
    Peer("flex", flex),
)


def reason(error: BaseException) -> str:
    """The first line of an error, short enough for a row."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:120]


def time_peers(shape: Shape, peers: Sequence[Peer], card: Card) -> dict[str, float | str]:
    """Microseconds of each peer, or why there is no figure."""
    copies = card.copies(shape.dense_bytes)
    dense = Dense.random(shape, copies=copies, dtype=card.dtype, device=card.device)
    found: dict[str, float | str] = {}
    for peer in peers:
        try:
            calls = peer.calls(dense)
            peer.check(dense, calls[0]())
            found[peer.name] = device_times(calls).p50
        except Exception as error:  # whatever a peer's library raises: it is reported, and the others go on
            found[peer.name] = reason(error)
        calls = []
    return found


def best(peers: dict[str, float | str], fp8: bool) -> tuple[str | None, float | None]:
    """Name and microseconds of the fastest peer that ran, among those with fp8 keys and values or among the others."""
    eight = {peer.name for peer in PEERS if peer.fp8}
    times = {name: t for name, t in peers.items() if not isinstance(t, str) and (name in eight) == fp8}
    name = min(times, key=times.__getitem__, default=None)
    return name, None if name is None else times[name]


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def row_of(
    shape: Shape,
    layout: str,
    times: Times,
    kernels: dict[str, float],
    budget_share: float,
    peers: dict[str, float | str],
    read_bandwidth: float,
) -> dict[str, Any]:
    """What the measurements say, rounded to what they are good for. kernels: microseconds by the kernel's name."""
    pages = preset_layout(layout, shape.dim)
    dense, fp8 = best(peers, False), best(peers, True)
    alone = {column: next((kernels[n] for n in names if n in kernels), None) for column, names in STEP_KERNELS.items()}
    kernel_gbs = ratio(shape.page_bytes(pages) / 1e3, alone["kernel_us"])
    numbers = {
        "p20_us": times.p20,
        "p50_us": times.p50,
        "p80_us": times.p80,
        "best_peer_us": dense[1],
        "speedup": ratio(dense[1], times.p50),
        "best_fp8_us": fp8[1],
        "gbs": shape.step_bytes(pages) / 1e3 / times.p50,
        **alone,
        "kernel_gbs": kernel_gbs,
        "read_share": ratio(kernel_gbs, read_bandwidth / 1e9),
        "read_gbs": read_bandwidth / 1e9,
        "budget_share": budget_share,
    }
    where = {"B": shape.batch, "H": shape.heads, "G": shape.kv_heads, "D": shape.dim, "T": shape.tokens, "layout": layout}
    rounded = {name: None if x is None else float(f"{x:.4g}") for name, x in numbers.items()}
    names = {"best_peer": dense[0], "best_fp8": fp8[0]}
    return {
        **where,
        "chunk": pages.chunk,
        "align": pages.align,
        **rounded,
        **names,
        "peers": {n: t if isinstance(t, str) else float(f"{t:.4g}") for n, t in peers.items()},
    }


def check(decode: Decode) -> float:
    """The step's largest error in units of its budget; AssertionError where it is above 1 or a second run differs."""
    state, again = decode.step(), decode.step()
    if not all(torch.equal(a, b) for a, b in zip(state, again, strict=True)):
        raise AssertionError("the same inputs gave different bits")
    return check_state(decode, state)


def steps_of(shape: Shape, layout: str, card: Card) -> list[Decode]:
    """As many random decode steps as keep their inputs out of the L2 cache."""
    pages = preset_layout(layout, shape.dim)
    copies = card.copies(shape.step_bytes(pages))
    return make_decodes(shape, pages, copies=copies, dtype=card.dtype, device=card.device)


def measure(shape: Shape, layout: str, card: Card) -> tuple[Times, float]:
    """Of a decode step, and its error as `check` has it."""
    decodes = steps_of(shape, layout, card)
    budget_share = check(decodes[0])
    return device_times([decode.step for decode in decodes]), budget_share


def split_heads(heads: str) -> tuple[int, int]:
    query_heads, kv_heads = heads.split("/")
    return int(query_heads), int(kv_heads)


def shapes_of(args: argparse.Namespace) -> Iterator[Shape]:
    """The shapes asked for: what README promises, what its table shows besides, the others."""

    def asked(shape: Shape) -> bool:
        heads = f"{shape.heads}/{shape.kv_heads}"
        return (
            shape.batch in (args.batch or (shape.batch,))
            and shape.tokens in (args.tokens or (shape.tokens,))
            and heads in (args.heads or (heads,))
            and shape.dim in (args.dims or (shape.dim,))
        )

    seen = [shape for shape in TARGETS if asked(shape)]
    yield from seen
    if args.quick:
        return
    grid = itertools.product(args.heads or HEADS, args.dims or DIMS, args.tokens or TOKENS, args.batch or BATCHES)
    shapes = [Shape(batch, *split_heads(heads), dim, tokens) for heads, dim, tokens, batch in grid]
    shapes.sort(key=lambda s: ((s.heads, s.kv_heads, s.dim) != (32, 8, 128), s.tokens != 32768))
    yield from (shape for shape in shapes if shape not in seen)


def needed_bytes(shape: Shape, layouts: Sequence[str], card: Card) -> int:
    """Memory that a shape takes: K and V, an fp8 copy of them while that peer runs, and room for a reference; or pages."""
    dense = shape.dense_bytes * card.copies(shape.dense_bytes) * 3 // 2
    steps = [shape.step_bytes(preset_layout(name, shape.dim)) for name in layouts]
    reference = 64 * shape.tokens * shape.dim
    return max([dense, *(n * card.copies(n) for n in steps)]) + reference + (2 << 30)


Variant = tuple[str, int, str]  # H/G, D, layout


def variants_of(shapes: Sequence[Shape], layouts: Sequence[str]) -> list[Variant]:
    """What decides which kernels are compiled, in the shapes' order."""
    return list(dict.fromkeys((f"{s.heads}/{s.kv_heads}", s.dim, layout) for s in shapes for layout in layouts))


def check_small(card: Card, variant: Variant) -> float:
    """`check` of a variant's steps at SMALL_SHAPES."""
    heads, dim, layout = variant
    worst = 0.0
    for batch, tokens in SMALL_SHAPES:
        shape = Shape(batch, *split_heads(heads), dim, tokens)
        decodes = make_decodes(shape, preset_layout(layout, dim), copies=1, dtype=card.dtype, device=card.device)
        worst = max(worst, check(decodes[0]))
    return worst


def failing(card: Card, variants: Sequence[Variant]) -> int:
    """How many variants are wrong or broken; says which, and how near the others come to their budgets."""
    failed, worst = 0, 0.0
    for variant in variants:
        try:
            worst = max(worst, check_small(card, variant))
        except Exception as error:  # the other variants are measured all the same
            print(f"{variant}: FAILED, {reason(error)}", file=sys.stderr, flush=True)
            failed += 1
    right = len(variants) - failed
    print(
        f"checked on small shapes: {right} of {len(variants)} variants right, errors up to {worst:.2g} budgets", flush=True
    )
    return failed


def compile_in_parallel(variants: Sequence[Variant]) -> None:
    """One process a variant (a compiler holds Python's lock), as many at a time as there are cores to spare.

    Kernels land in Triton's cache on disk.
    """
    workers = (os.cpu_count() or 1) - 2
    if workers < 2:
        return  # Colab: it would be no faster
    waiting = [
        [sys.executable, "-m", "perf.attention", "--warm-up", "--heads", heads, "--dims", str(dim), "--layouts", layout]
        for heads, dim, layout in variants
    ]
    running: list[subprocess.Popen] = []
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(subprocess.Popen(waiting.pop(0), cwd=ROOT, stderr=subprocess.DEVNULL))
        running = [process for process in running if process.poll() is None]
        time.sleep(0.05)
    # A variant that fails here fails again where it is checked next, which says so.


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a run as text, a line each."""
    lines = [
        f"{'shape':28} {'layout':9} {'p20':>8} {'p50 us':>8} {'p80':>8} {'GB/s':>6} {'project':>7} {'cold':>7} "
        f"{'exact':>6} {'merge':>6} {'read':>6} {'budget':>7} {'speedup':>7}  best peer (best fp8)"
    ]
    for row in rows:

        def cell(name: str, width: int, row: dict[str, Any] = row) -> str:
            return f"{'-' if row[name] is None else format(row[name], '.4g'):>{width}}"

        shape = Shape(*(row[x] for x in "BHGDT"))
        fp8 = "" if row["best_fp8"] is None else f" ({row['best_fp8_us']:.4g} {row['best_fp8']})"
        peer = "none" if row["best_peer"] is None else f"{row['best_peer_us']:.4g} {row['best_peer']}"
        lines.append(
            f"{shape!s:28} {row['layout']:9} {cell('p20_us', 8)} {cell('p50_us', 8)} {cell('p80_us', 8)} {cell('gbs', 6)} "
            f"{cell('project_us', 7)} {cell('kernel_us', 7)} {cell('exact_us', 6)} {cell('merge_us', 6)} "
            f"{cell('read_share', 6)} {cell('budget_share', 7)} {cell('speedup', 7)}  {peer}{fp8}"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.attention", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", help=f"batch sizes B (default {BATCHES})")
    parser.add_argument("--tokens", type=int, nargs="+", help=f"tokens T (default {TOKENS})")
    parser.add_argument("--heads", nargs="+", help=f"query heads/KV heads (default {HEADS})")
    parser.add_argument("--dims", type=int, nargs="+", help=f"head dimensions D (default {DIMS})")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS, help="presets and 32x8 (default all)")
    names = tuple(peer.name for peer in PEERS)
    parser.add_argument("--peers", nargs="+", choices=names, help="default all; with --quick all but flex")
    parser.add_argument("--quick", action="store_true", help="README's four shapes only")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no shape that may end later")
    results = tables.RESULTS / "attention.jsonl"
    parser.add_argument("--json", type=Path, nargs="?", const=results, help=f"append rows (default file: {results})")
    parser.add_argument("--plot", type=Path, help="after measuring, draw speed-up against T from the rows of --json as PNG")
    parser.add_argument("--commit", help="what rows say is measured; default: git's word")
    parser.add_argument("--warm-up", action="store_true", help="compile and check on small shapes only")
    args = parser.parse_args(argv)
    if args.plot and not args.json:
        parser.error("--plot: expected --json beside it, whose rows it draws")
    for heads in args.heads or ():
        parts = heads.split("/")
        if len(parts) != 2 or not all(p.isdigit() and int(p) for p in parts) or int(parts[0]) % int(parts[1]):
            parser.error(f"--heads: expected H/G with H a multiple of G, got {heads!r}")
    for tokens in args.tokens or ():
        if tokens <= 0 or tokens % PAGE or tokens < 512:
            parser.error(f"--tokens: expected multiples of {PAGE} from 512 on, got {tokens}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    begin = time.monotonic()
    try:
        card = Card.current()
    except NoCard as error:
        print(f"perf.attention: {error}", file=sys.stderr)
        return 2
    shapes = list(shapes_of(args))
    variants = variants_of(shapes, args.layouts)
    if args.warm_up:
        return 1 if failing(card, variants) else 0
    wanted = args.peers or [peer.name for peer in PEERS if not (args.quick and peer.name == "flex")]
    compile_in_parallel(variants)
    same = {
        "gpu": card.name,
        **versions(args.commit),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
    }
    print(
        f"{card.name}, commit {same['commit']}, {card.dtype}, read-only pass {card.read_bandwidth / 1e9:.0f} GB/s",
        flush=True,
    )
    failed = failing(card, variants)
    measured, longest = [], 0.0
    for index, shape in enumerate(shapes):
        started = time.monotonic()
        if started - begin + longest > args.seconds:
            print(f"--seconds: {len(shapes) - index} shapes not measured, from {shape} on", file=sys.stderr)
            break
        need, free = needed_bytes(shape, args.layouts, card), card.free
        if need > free:
            print(f"{shape}: skipped, needs {need / 1e9:.0f} GB of {free / 1e9:.0f} GB free", file=sys.stderr)
            continue
        peers: dict[str, float | str] = {peer.name: "not asked for" for peer in PEERS}
        peers |= time_peers(shape, [peer for peer in PEERS if peer.name in wanted], card)
        shown = "; ".join(f"{name} {t if isinstance(t, str) else format(t, '.4g')}" for name, t in peers.items())
        print(f"[{index + 1}/{len(shapes)}] {shape}: {shown}", file=sys.stderr, flush=True)
        for layout in args.layouts:
            try:
                measured.append((shape, layout, peers, *measure(shape, layout, card)))
            except Exception as error:  # one wrong or broken row does not cost the others; the exit code tells
                print(f"{shape} {layout}: FAILED, {reason(error)}", file=sys.stderr, flush=True)
                failed += 1
        longest = max(longest, time.monotonic() - started)
    rows = []
    for shape, layout, peers, times, budget_share in measured:  # profiled last: see `kernel_times`
        try:
            kernels = kernel_times([decode.step for decode in steps_of(shape, layout, card)])
        except Exception as error:  # as above
            print(f"{shape} {layout}: FAILED, {reason(error)}", file=sys.stderr, flush=True)
            failed += 1
            continue
        rows.append({**same, **row_of(shape, layout, times, kernels, budget_share, peers, card.read_bandwidth)})
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            with args.json.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))
    if args.plot:
        tables.plot_attention(tables.read_rows(args.json), args.plot)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
