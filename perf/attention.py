"""Time a layer's decode step over spectral pages against dense attention, in one run on one card.

    python -m perf.attention --json         the shapes of SHAPES; rows: perf/results/attention.jsonl
    python -m perf.attention 8x32768 1x32768:16/2:d256 --presets balanced

A shape is BxT, or several joined by + (rows of different lengths), and after colons: query heads /
KV heads (default 32/8), dD (head dimension, default 128), qQ (queries a row, default 1), poolT
(room of the block table), old (the path of cards before sm_80).

A step is what a layer runs for new tokens: `append` and `attend_spectral`. A peer writes the token
to its cache (one copy) and reads all T tokens; its plan of a batch is made beforehand, and fp8
queries come as such. Peers run where all rows are alike: PyTorch's backends, FA3 of an installed
vLLM (as that calls it), FlashInfer; a row says why one has no time. Queries, keys and values are
bf16, before sm_80 fp16. Steps and peers are checked first: ours against its twin (perf/_cases.py;
error: relative), a peer against float64 within the rounding of its weights and output.
`read_share`: the bytes that a step must read over its time, as a share of the bandwidth of a
read-only pass in the same run. Bands of a preset: `_cases.layouts`, the middle one.

Row: gpu commit torch triton date B H G D T case (the shape's other words) preset layout path
("matrix" or "scalar") p20_us p50_us p80_us best_peer best_peer_us best_fp8 best_fp8_us read_share
read_gbs error peers {name: microseconds, or why not}.
Tables and plots: python -m perf.tables (against_peer, against_fp8: best_peer_us, best_fp8_us over
p50_us; of_plain: a case's time over that of the same B and T without one).
Test: tests/test_perf.py.
"""

import argparse
import functools
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from perf._cases import LAYER, LOSSY, SCORE_STD, Shape, Step, check_close, check_state, make_steps
from perf._timing import Card, Row, begin, device_times, fail, parser_of, reason, record, rounded
from spectral_kernels import _launch

TABLE = ("1x2048", "1x8192", "1x32768", "1x131072", "8x32768", "16x65536", "64x8192")
SHAPES = (
    *TABLE,
    *("1x32768:16/2:d256", "8x32768:16/2:d256", "1x32768:12/2:d64", "8x32768:12/2:d64"),
    *("8x32768:d96", "8x32768:64/8", "8x32768:24/4", "8x32768:32/32", "256x2048", "1x1048576"),
    *("1x32768:q4", "8x32768:q4", "8x32768:q16", "4x32768:old"),
    *("1x8192:pool131072", "64x4096", "1x131072+63x2048"),
)
PAGE = 64  # tokens of a page of peers
FP8 = torch.float8_e4m3fn


def parse_shape(text: str) -> Shape:
    first, *words = text.split(":")
    parts = [[int(x) for x in part.split("x")] for part in first.split("+")]
    rows = [tokens for batch, tokens in parts for _ in range(batch)]
    found: dict[str, Any] = {"lengths": tuple(rows) if len(parts) > 1 else ()}
    heads, kv_heads, dim = LAYER
    for word in words:
        if "/" in word:
            heads, kv_heads = map(int, word.split("/"))
        elif word.startswith("d"):
            dim = int(word[1:])
        elif word == "old":
            found["older_cards"] = True
        else:
            name = "capacity" if word.startswith("pool") else "queries"
            found[name] = int(word.removeprefix("pool").removeprefix("q"))
    if heads % kv_heads or any(n < 128 or n % PAGE for n in rows):
        raise ValueError(f"{text}: expected H a multiple of G, T one of {PAGE} from 128 on")
    return Shape(len(rows), heads, kv_heads, dim, max(rows), **found)


@dataclass(frozen=True)
class Peer:
    """Another implementation: bind(shape, kv) gives attend(q [B, H, D], scale) -> [B, H, D]."""

    name: str
    bind: Callable[[Shape, torch.Tensor], Callable[..., torch.Tensor]]
    paged: bool = False  # kv [2, B, T, G, D] in pages of PAGE tokens; else [2, B, G, T, D]
    fp8: bool = False  # keys and values are 8-bit floats
    fp8_queries: bool = False  # queries and weights too


class PeerStep:
    """A peer's layer step over kv, memory of [2, B, G, T, D] (an fp8 peer has a copy of it); q
    [B, H, D] and new [2, B, G, D], key and value of the newest token: what a call takes."""

    def __init__(self, peer: Peer, shape: Shape, kv: torch.Tensor, q: Any = None, new: Any = None):
        self.peer, self.shape, self.new = peer, shape, new
        size = [2, shape.batch, shape.kv_heads, shape.tokens, shape.dim]
        if peer.paged:
            size[2:4] = size[3], size[2]
        kv = kv.view(size).to(FP8) if peer.fp8 else kv.view(size)
        self.kv = kv.transpose(2, 3) if peer.paged else kv  # [2, B, G, T, D]
        self.attend = peer.bind(shape, kv)
        self.q = q.to(FP8) if peer.fp8_queries and q is not None else q

    def write(self, new: torch.Tensor) -> None:
        self.kv[:, :, :, -1].copy_(new)

    def __call__(self) -> torch.Tensor:
        self.write(self.new)
        return self.attend(self.q)

    def check(self, out: torch.Tensor) -> None:
        """AssertionError unless the newest token is in the cache, and the last row's last head is
        attention: weights and output rounded once, in norm by less than the eps of their dtype."""
        if not torch.equal(self.kv[:, :, :, -1].float(), self.new.to(self.kv.dtype).float()):
            raise AssertionError("wrong result: the newest token is not in the cache")
        q, k, v = (x.double() for x in (self.q[-1, -1], *self.kv[:, -1, -1]))
        want = torch.softmax(self.shape.dim**-0.5 * (k @ q), dim=0) @ v
        allowed = torch.finfo(FP8 if self.peer.fp8_queries else out.dtype).eps
        check_close(out[-1, -1], want, allowed, "wrong result")


def sdpa(backend: SDPBackend, folded: bool, shape: Shape, kv: torch.Tensor) -> Callable[..., Any]:
    """PyTorch's attention by one backend; folded: the heads of a group are queries of one head."""
    k, v = kv

    def attend(q: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        q4 = q.unflatten(1, (shape.kv_heads, -1)) if folded else q[:, :, None]
        gqa = q4.shape[1] != k.shape[1]
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q4, k, v, scale=scale, enable_gqa=gqa)
        return out.flatten(1, 2)

    return attend


@functools.cache
def vllm_flash_attention() -> Any:
    """The package vllm.vllm_flash_attn alone: importing vLLM changes how torch.compile works."""
    found = importlib.util.find_spec("vllm")
    if found is None:
        raise ImportError("vLLM is not installed")
    package = types.ModuleType("vllm")
    package.__path__ = list(found.submodule_search_locations or ())
    sys.modules.setdefault("vllm", package)
    return importlib.import_module("vllm.vllm_flash_attn")


def fa3(shape: Shape, kv: torch.Tensor) -> Callable[..., Any]:
    """FlashAttention 3, as vLLM's backend calls it within a CUDA graph."""
    flash = vllm_flash_attention()
    batch, tokens, heads, splits = shape.batch, shape.tokens, shape.kv_heads, 32
    i32: Any = {"dtype": torch.int32, "device": kv.device}
    k, v = kv.view(2, -1, PAGE, heads, shape.dim)
    starts, lens = torch.arange(batch + 1, **i32), torch.full((batch,), tokens, **i32)
    table = torch.arange(len(k), **i32).view(batch, -1)
    plan = flash.get_scheduler_metadata(
        batch, 1, tokens, shape.heads, heads, shape.dim, lens, qkv_dtype=kv.dtype,
        cu_seqlens_q=starts, page_size=PAGE, causal=True, num_splits=splits,
    )  # fmt: skip
    ones = torch.ones(batch, heads, device=kv.device) if kv.dtype == FP8 else None

    def attend(q: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        return flash.flash_attn_varlen_func(
            q.to(kv.dtype), k, v, 1, starts, tokens, seqused_k=lens, softmax_scale=scale,
            causal=True, block_table=table, scheduler_metadata=plan, q_descale=ones,
            k_descale=ones, v_descale=ones, num_splits=splits, fa_version=3,
        )  # fmt: skip

    return attend


def flashinfer(shape: Shape, kv: torch.Tensor) -> Callable[..., Any]:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    i32: Any = {"dtype": torch.int32, "device": kv.device}
    k, v = kv.view(2, -1, PAGE, shape.kv_heads, shape.dim)
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=kv.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    starts = torch.arange(shape.batch + 1, **i32) * (shape.tokens // PAGE)
    last = torch.full((shape.batch,), PAGE, **i32)
    heads = (shape.heads, shape.kv_heads, shape.dim, PAGE)
    kinds: Any = {"q_data_type": torch.bfloat16, "kv_data_type": kv.dtype}
    wrapper.plan(starts, torch.arange(len(k), **i32), last, *heads, **kinds)
    return lambda q: wrapper.run(q, (k, v))


BACKENDS = {
    **{"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION},
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
IN_MODELS = (  # what perf.end_to_end puts into a model
    *(Peer(name, functools.partial(sdpa, x, False)) for name, x in BACKENDS.items()),
    *(Peer(f"{name} folded", functools.partial(sdpa, x, True)) for name, x in BACKENDS.items()),
    Peer("fa3", fa3, paged=True),
    Peer("fa3 fp8", fa3, paged=True, fp8=True, fp8_queries=True),
)
PEERS = (
    *IN_MODELS,
    Peer("flashinfer", flashinfer, paged=True),
    Peer("flashinfer fp8", flashinfer, paged=True, fp8=True),
)


def time_peers(shape: Shape, peers: Sequence[Peer], card: Card) -> dict[str, float | str]:
    """Microseconds of each peer, or why there is no figure."""

    def memory() -> tuple[torch.Tensor, ...]:
        head = (2, shape.batch, shape.kv_heads)
        kv = card.normal(*head, shape.tokens, shape.dim)
        kv[0] *= SCORE_STD
        q = card.normal(shape.batch, shape.heads, shape.dim)
        return kv, q, card.normal(*head, shape.dim)

    found: dict[str, float | str] = {}
    copies: list[tuple[torch.Tensor, ...]] = []
    for peer in peers:
        try:
            copies = copies or [memory() for _ in range(card.copies(shape.dense_bytes))]
            calls = [PeerStep(peer, shape, *copy) for copy in copies]
            calls[0].check(calls[0]())
            found[peer.name] = device_times(calls).p50
        except Exception as error:  # whatever its library raises: it is reported, the others go on
            found[peer.name] = reason(error)
        calls = []
    return found


def best(peers: dict[str, float | str], fp8: bool) -> tuple[str | None, float | None]:
    """Name and microseconds of the fastest peer that ran, of fp8 keys and values or of others."""
    eight = {peer.name for peer in PEERS if peer.fp8}
    own = ((t, x) for x, t in peers.items() if not isinstance(t, str) and (x in eight) == fp8)
    time, name = min(own, default=(None, None))
    return name, time


def check(step: Step) -> float:
    """The step's error; AssertionError where it is too large, where a second run differs, or where
    the same state with heads exchanged would pass too."""
    state, again = step.step(), step.step()
    if not all(torch.equal(a, b) for a, b in zip(state, again, strict=True)):
        raise AssertionError("the same inputs gave different bits")
    error = check_state(step, state)
    try:
        check_state(step, (state[0].roll(1, 1), state[1]))
    except AssertionError:
        return error
    raise AssertionError("the check accepts heads that are exchanged")


def measure(shape: Shape, preset: str, card: Card) -> Row:
    """A row without what all rows of a run share, and without peers."""
    steps = make_steps(shape, preset, card)
    error, times = check(steps[0]), device_times([step.step for step in steps])
    layout = steps[0].codec.layout
    matrix = not shape.older_cards and _launch.has_matrix_units(card.device)
    return {
        **{"B": shape.batch, "H": shape.heads, "G": shape.kv_heads, "D": shape.dim},
        **{"T": shape.tokens, **({"case": shape.case} if shape.case else {}), "preset": preset},
        "layout": f"{layout.k} {layout.v}",
        "path": "matrix" if matrix else "scalar",
        **{f"{name}_us": x for name, x in times._asdict().items()},
        "read_share": steps[0].nbytes / times.p50 * 1e6 / card.read_bandwidth,
        "error": error,
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("attention", __doc__)
    shapes: Any = {"type": parse_shape, "default": [parse_shape(text) for text in SHAPES]}
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help="see above", **shapes)
    text = "default balanced, and of the first shapes quality too"
    parser.add_argument("--presets", nargs="*", choices=LOSSY, help=text)
    names = [peer.name for peer in PEERS]
    parser.add_argument("--peers", nargs="*", choices=names, default=names, help="default all")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    card, same = begin(args.commit)
    table, failed = [parse_shape(text) for text in TABLE], 0
    for shape in args.shapes:
        rows, several = [], ("balanced", "quality") if shape in table else ("balanced",)
        for preset in several if args.presets is None else args.presets:
            try:
                rows.append(measure(shape, preset, card))
            except Exception as error:
                failed += fail(f"{shape} {preset}", error)
        chosen = [peer for peer in PEERS if peer.name in args.peers and not shape.case]
        peers = time_peers(shape, chosen, card) if rows else {}
        (peer, peer_us), (fp8, fp8_us) = best(peers, False), best(peers, True)
        beside: Row = {"best_peer": peer, "best_peer_us": peer_us, "best_fp8": fp8}
        beside |= {"best_fp8_us": fp8_us, "peers": rounded(peers)}
        for row in rows:
            record(row | beside, same, args.json)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
