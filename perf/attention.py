"""Time a layer's decode step over spectral pages against dense attention, in one run on one card.

    python -m perf.attention --quick          four shapes, a minute
    python -m perf.attention --json           all shapes; rows go to perf/results/attention.jsonl
    python -m perf.attention --older-cards    beside it the path of cards before sm_80

A step is what a layer runs for a new token of T: `append` (the token goes to its page and its exact
slot) and `attend_spectral` over pages and exact tokens. A peer writes the token to its 16-bit cache
(one copy) and reads all T tokens of it (or of fp8 copies). Queries, keys and values are bf16,
before sm_80 fp16. Each step and each peer is checked before it is timed: ours against float64
within a derived budget (perf/_cases.py), a peer against float64 within the rounding of its weights
and output. Times: perf/_timing.py. `read_share`: the bytes that a step must read over its time, as
a share of the bandwidth of a read-only pass in the same run. Bands of a preset: `_cases.layouts`,
the middle one.

Row: gpu commit torch triton date B H G D T preset layout path ("matrix" or "scalar") p20_us p50_us
p80_us best_peer best_peer_us speedup best_fp8 best_fp8_us read_share read_gbs budget_share peers
{name: microseconds, or why not} kernels {name: microseconds}.
Tables and plots: python -m perf.tables.   Test: tests/test_perf.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from perf._cases import LOSSY, SCORE_STD, Shape, Step, check_state, layouts, make_steps
from perf._timing import (
    Call,
    Card,
    Row,
    begin,
    common_arguments,
    device_times,
    kernel_times,
    reason,
    rounded,
    write_row,
)
from spectral_kernels.calibrate import PRESETS
from tests import budgets

BATCHES, TOKENS = (1, 4, 16, 64), (2048, 8192, 32768, 131072)
HEADS, DIMS = ("32/8", "64/8", "12/2", "32/32"), (128, 64)
TARGETS = tuple(
    Shape(b, 32, 8, 128, t) for b, t in ((16, 65536), (1, 131072), (1, 32768), (1, 8192))
)
PAGE = 64  # tokens of a FlashInfer page


@dataclass
class Dense:
    """Dense inputs of a shape, one or several copies: q [B, H, D]; kv [2, B, G, T, D], keys and
    values; new [2, B, G, D], those of the newest token."""

    shape: Shape
    q: list[torch.Tensor]
    kv: list[torch.Tensor]
    new: list[torch.Tensor]

    @classmethod
    def random(
        cls, shape: Shape, *, copies: int, dtype: torch.dtype, device: torch.device
    ) -> Dense:
        def normal(*size: int) -> list[torch.Tensor]:
            return [torch.empty(size, dtype=dtype, device=device).normal_() for _ in range(copies)]

        head = (2, shape.batch, shape.kv_heads)
        kv = normal(*head, shape.tokens, shape.dim)
        for x in kv:
            x[0] *= SCORE_STD
        return cls(shape, normal(shape.batch, shape.heads, shape.dim), kv, normal(*head, shape.dim))

    def calls(self, attend: Callable[..., torch.Tensor]) -> list[Call]:
        """A call a copy: write the newest token, then attend(q, k, v)."""

        def call(q: torch.Tensor, kv: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            kv[:, :, :, -1].copy_(new)
            return attend(q, kv[0], kv[1])

        return [partial(call, *x) for x in zip(self.q, self.kv, self.new, strict=True)]


@dataclass(frozen=True)
class Peer:
    """Another implementation. `calls` gives one call a copy, each returning [B, H, D]; `paged`: it
    reads the same memory as pages [B * T / PAGE, G, PAGE, D]; `fp8`: as 8-bit floats."""

    name: str
    calls: Callable[[Dense], list[Call]]
    paged: bool = False
    fp8: bool = False

    def check(self, dense: Dense, out: torch.Tensor) -> None:
        """Raise AssertionError unless the last row's last head is attention: the weights and the
        output are rounded once to 16 bits each, and scores are float32 sums of D products."""
        shape, dtype = dense.shape, dense.q[0].dtype
        k, v = dense.kv[0]
        if self.paged:
            k, v = (
                x.view(shape.batch, -1, shape.kv_heads, PAGE, shape.dim)
                .transpose(1, 2)
                .flatten(2, 3)
                for x in (k, v)
            )
        k, v = k[-1, -1], v[-1, -1]
        if self.fp8:
            k, v = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
        q, k, v = dense.q[0][-1, -1].double(), k.double(), v.double()
        scale = shape.dim**-0.5
        weight = torch.softmax(scale * (k @ q), dim=0)
        want, size = weight @ v, weight @ v.abs()
        # A score may be off by D + 4 roundings of its terms: each weight by as much, relatively.
        score = (
            (weight * (scale * (k.abs() @ q.abs()))) @ v.abs() * (shape.dim + 4) * 2 * budgets.ACC
        )
        adds = (shape.tokens // 64 + 64) * budgets.ACC * size
        allowed = budgets.U[dtype] * (2 * size + want.abs()) + 2 * score + adds
        worst = float(((out[-1, -1].double() - want).abs() / allowed).max())
        if not worst <= 1:
            raise AssertionError(
                f"wrong result: an error of {worst:.3g} times what rounding explains"
            )


def sdpa(
    backend: SDPBackend,
    folded: bool,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """PyTorch's attention by one backend: q [B, H, D] over k, v [B, G, T, D]; folded: the heads of
    a group are queries of one head."""
    with sdpa_kernel(backend):
        if folded:
            return scaled_dot_product_attention(
                q.unflatten(1, (k.shape[1], -1)), k, v, scale=scale
            ).flatten(1, 2)
        gqa = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q[:, :, None], k, v, scale=scale, enable_gqa=gqa)[
            :, :, 0
        ]


def flashinfer_single(dense: Dense) -> list[Call]:
    from flashinfer import single_decode_with_kv_cache as run

    if dense.shape.batch > 1:
        raise NotImplementedError("one row only")
    return dense.calls(
        lambda q, k, v: run(q[0], k[0], v[0], kv_layout="HND", use_tensor_cores=True)[None]
    )


def flashinfer_paged(fp8: bool, dense: Dense) -> list[Call]:
    """Its fp8 copies are not written to; the newest token goes to the 16-bit memory, which takes as
    long."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    shape, q = dense.shape, dense.q[0]
    kv_dtype = torch.float8_e4m3fn if fp8 else q.dtype
    pages = shape.tokens // PAGE
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    indices = torch.arange(shape.batch * pages, dtype=torch.int32, device=q.device)
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=q.device) * pages
    last = torch.full((shape.batch,), PAGE, dtype=torch.int32, device=q.device)
    heads = (shape.heads, shape.kv_heads, shape.dim, PAGE)
    wrapper.plan(starts, indices, last, *heads, q_data_type=q.dtype, kv_data_type=kv_dtype)
    for kv, new in zip(dense.kv, dense.new, strict=True):
        kv[:, :, :, -1].copy_(new)  # as the calls do: fp8 copies hold the same
    copies: dict[int, tuple[torch.Tensor, ...]] = {}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cache = copies.get(k.data_ptr())
        if cache is None:
            cache = tuple(x.view(-1, shape.kv_heads, PAGE, shape.dim).to(kv_dtype) for x in (k, v))
            copies[k.data_ptr()] = cache
        return wrapper.run(q, cache)

    return dense.calls(attend)


def sdpa_peer(name: str, backend: SDPBackend, folded: bool = False) -> Peer:
    return Peer(name, lambda dense: dense.calls(partial(sdpa, backend, folded)))


SDPA = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION, False),
    "cudnn folded": (SDPBackend.CUDNN_ATTENTION, True),
    "flash": (SDPBackend.FLASH_ATTENTION, False),
    "flash folded": (SDPBackend.FLASH_ATTENTION, True),
    "efficient folded": (SDPBackend.EFFICIENT_ATTENTION, True),
}
PEERS = (
    *(sdpa_peer(name, *options) for name, options in SDPA.items()),
    Peer("flashinfer single", flashinfer_single),
    Peer("flashinfer paged", partial(flashinfer_paged, False), paged=True),
    Peer("flashinfer fp8", partial(flashinfer_paged, True), paged=True, fp8=True),
)


def time_peers(shape: Shape, peers: Sequence[Peer], card: Card) -> dict[str, float | str]:
    """Microseconds of each peer, or why there is no figure."""
    dense = Dense.random(
        shape, copies=card.copies(shape.dense_bytes), dtype=card.dtype, device=card.device
    )
    found: dict[str, float | str] = {}
    for peer in peers:
        try:
            calls = peer.calls(dense)
            peer.check(dense, calls[0]())
            found[peer.name] = device_times(calls).p50
        except (
            Exception
        ) as error:  # whatever a peer's library raises: it is reported, and the others go on
            found[peer.name] = reason(error)
        calls = []
    return found


def best(peers: dict[str, float | str], fp8: bool) -> tuple[str | None, float | None]:
    """Name and microseconds of the fastest peer that ran, among those with fp8 keys and values or
    among the others."""
    eight = {peer.name for peer in PEERS if peer.fp8}
    times = {
        name: t for name, t in peers.items() if not isinstance(t, str) and (name in eight) == fp8
    }
    name = min(times, key=times.__getitem__, default=None)
    return name, None if name is None else times[name]


def check(step: Step) -> float:
    """The step's largest error in units of its budget; AssertionError where it is above 1, where a
    second run differs, or where the same state with heads exchanged would pass too."""
    state, again = step.step(), step.step()
    if not all(torch.equal(a, b) for a, b in zip(state, again, strict=True)):
        raise AssertionError("the same inputs gave different bits")
    share = check_state(step, state)
    try:
        check_state(step, (state[0].roll(1, 1), state[1]))
    except AssertionError:
        return share
    raise AssertionError("the budget accepts heads that are exchanged")


def measure(
    shape: Shape, preset: str, card: Card, older_cards: bool, peers: dict[str, float | str]
) -> Row:
    """A row of one path, without what all rows of a run share."""
    plan = layouts(preset, shape.dim)
    layout, exact = plan[len(plan) // 2], PRESETS[preset].sinks + PRESETS[preset].window
    nbytes = shape.step_bytes(layout, exact)
    options: Any = {"dtype": card.dtype, "device": card.device, "older_cards": older_cards}
    steps = make_steps(shape, layout, preset=preset, copies=card.copies(nbytes), **options)
    share = check(steps[0])
    calls = [step.step for step in steps]
    times = device_times(calls)
    (peer, peer_us), (fp8, fp8_us) = best(peers, False), best(peers, True)
    return {
        **{
            "B": shape.batch,
            "H": shape.heads,
            "G": shape.kv_heads,
            "D": shape.dim,
            "T": shape.tokens,
        },
        "preset": preset,
        "layout": f"{layout.k} {layout.v}",
        "path": "scalar" if older_cards else "matrix",
        **{"p20_us": times.p20, "p50_us": times.p50, "p80_us": times.p80},
        **{"best_peer": peer, "best_peer_us": peer_us, "speedup": peer_us and peer_us / times.p50},
        **{"best_fp8": fp8, "best_fp8_us": fp8_us},
        "read_share": nbytes / times.p50 * 1e6 / card.read_bandwidth,
        "budget_share": share,
        "peers": {n: t if isinstance(t, str) else float(f"{t:.4g}") for n, t in peers.items()},
    }


def profile(row: Row, card: Card) -> dict[str, float]:
    """Microseconds of each kernel of a row's step alone, by the profiler."""
    shape = Shape(*(row[x] for x in "BHGDT"))
    plan = layouts(row["preset"], shape.dim)
    options = {"dtype": card.dtype, "device": card.device, "older_cards": row["path"] == "scalar"}
    steps = make_steps(shape, plan[len(plan) // 2], preset=row["preset"], copies=4, **options)
    return {
        name: float(f"{us:.4g}") for name, us in kernel_times([step.step for step in steps]).items()
    }


def split_heads(heads: str) -> tuple[int, int]:
    query_heads, kv_heads = heads.split("/")
    return int(query_heads), int(kv_heads)


def shapes_of(args: argparse.Namespace) -> Iterator[Shape]:
    """The shapes asked for: TARGETS first, then the others."""

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
    grid = product(
        args.heads or HEADS, args.dims or DIMS, args.tokens or TOKENS, args.batch or BATCHES
    )
    shapes = [Shape(batch, *split_heads(heads), dim, tokens) for heads, dim, tokens, batch in grid]
    shapes.sort(key=lambda s: ((s.heads, s.kv_heads, s.dim) != (32, 8, 128), s.tokens != 32768))
    yield from (shape for shape in shapes if shape not in seen)


def needed_bytes(shape: Shape, card: Card) -> int:
    """Memory that a shape takes: K and V, an fp8 copy of them while that peer runs, and room for a
    reference."""
    return (
        shape.dense_bytes * card.copies(shape.dense_bytes) * 3 // 2
        + 64 * shape.tokens * shape.dim
        + (2 << 30)
    )


def line(row: Row) -> str:
    """A row as text."""
    shape = Shape(*(row[x] for x in "BHGDT"))
    text = f"{shape!s:28} {row['preset']:9} {row['path']:6} "
    text += " ".join(f"{row[name]:8.4g}" for name in ("p20_us", "p50_us", "p80_us"))
    text += f" us {row['read_share']:4.0%} of reads  {row['budget_share']:.2g} of the budget  "
    if row["best_peer"] is not None:
        text += f"{row['speedup']:.2f}x of {row['best_peer_us']:.4g} {row['best_peer']}"
    if row["best_fp8"] is not None:
        text += f", {row['best_fp8_us'] / row['p50_us']:.2f}x of {row['best_fp8']}"
    return text


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m perf.attention", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--batch", type=int, nargs="+", help=f"batch sizes B (default {BATCHES})")
    parser.add_argument("--tokens", type=int, nargs="+", help=f"tokens T (default {TOKENS})")
    parser.add_argument("--heads", nargs="+", help=f"query heads/KV heads (default {HEADS})")
    parser.add_argument("--dims", type=int, nargs="+", help=f"head dimensions D (default {DIMS})")
    parser.add_argument("--presets", nargs="+", choices=LOSSY, default=LOSSY)
    names = tuple(peer.name for peer in PEERS)
    parser.add_argument("--peers", nargs="*", choices=names, default=names, help="default all")
    parser.add_argument("--quick", action="store_true", help="four shapes only")
    parser.add_argument(
        "--older-cards", action="store_true", help="also the path of cards before sm_80"
    )
    parser.add_argument(
        "--profile", action="store_true", help="also each kernel alone, by the profiler"
    )
    common_arguments(parser, "attention.jsonl")
    args = parser.parse_args(argv)
    for heads in args.heads or ():
        parts = [int(part) if part.isdigit() else 0 for part in heads.split("/")]
        if len(parts) != 2 or min(parts) < 1 or parts[0] % parts[1]:
            parser.error(f"--heads: expected H/G with H a multiple of G, got {heads!r}")
    for tokens in args.tokens or ():
        if tokens < 512 or tokens % PAGE:
            parser.error(f"--tokens: expected multiples of {PAGE} from 512 on, got {tokens}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    card, same = begin(args.commit)
    failed, rows = 0, []
    for shape in shapes_of(args):
        need, free = needed_bytes(shape, card) / 1e9, card.free / 1e9
        if need > free:
            print(f"{shape}: skipped, needs {need:.0f} GB of {free:.0f} GB free", file=sys.stderr)
            continue
        peers = time_peers(shape, [peer for peer in PEERS if peer.name in args.peers], card)
        for preset, older in product(args.presets, (False, True) if args.older_cards else (False,)):
            try:
                rows.append({**same, **rounded(measure(shape, preset, card, older, peers))})
            except Exception as error:  # the other rows go on; the exit code tells
                print(f"{shape} {preset}: FAILED, {reason(error)}", file=sys.stderr, flush=True)
                failed += 1
                continue
            print(line(rows[-1]), flush=True)
            if not args.profile:
                write_row(rows[-1], args.json)
    if args.profile:  # last: once the profiler has run every launch takes longer
        for row in rows:
            row["kernels"] = profile(row, card)
            print(Shape(*(row[x] for x in "BHGDT")), row["preset"], row["path"], row["kernels"])
            write_row(row, args.json)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
