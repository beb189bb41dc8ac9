"""Every public kernel alone: inputs that fit the card, a check against the oracle, device time, bytes and bandwidth.

    python -m perf.kernels                              a table; needs torch, triton and numpy
    pytest perf --benchmark-only                        the same under pytest-benchmark (perf/test_benchmarks.py)

Inputs are larger than the L2 cache, or several copies of them are used in turn. Bytes are those that a kernel must read and
write once. Checks: the oracle of reference/ with the budgets of tests/budgets.py, on a part of the result that NumPy can
do; attention: perf/_cases.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

import spectral_kernels as sk
from perf._cases import ALIGN, LAYOUTS, Shape, check_state, make_decodes, preset_layout
from perf._timing import Call, Card, NoCard, device_times
from reference import compress as compress_oracle
from reference import merge as merge_oracle
from reference import pages as pages_oracle
from reference import rope as rope_oracle
from spectral_kernels.compress import LEAST_SHARE, STEP_SHARES
from tests import budgets

HEADS, KV_HEADS, DIM = 32, 8, 128
LAYOUT = "balanced"  # where a kernel needs bands and does not run once for each layout


@dataclass
class Kernel:
    """A kernel with its inputs.

    Attributes:
        calls: the same work on one or several copies of the inputs.
        nbytes: what a call must read and write.
        check: raises AssertionError where the result of the first call is wrong.
        shape: of the inputs, in words.
    """

    calls: Sequence[Call]
    nbytes: int
    check: Callable[[], None]
    shape: str


def tokens_of(card: Card, token_bytes: int) -> int:
    """Tokens (a power of two) that take 3 to 6 times the L2 cache, at least 64 MiB, at most an eighth of free memory."""
    size = min(max(6 * card.properties.L2_cache_size, 128 << 20), card.free // 8)
    return 1 << (size // token_bytes).bit_length() - 1


def context_of(card: Card) -> int:
    """Tokens of a decode step with four rows: 32K, or as many (a power of two) as a card of less than 8 GB holds easily."""
    return 1 << min(15, (card.free // (64 * 4 * KV_HEADS * DIM)).bit_length() - 1)


def numpy_of(x: torch.Tensor) -> np.ndarray:
    return x.double().cpu().numpy()


def rope_on(card: Card) -> tuple[sk.Rope, np.ndarray]:
    inv_freq = 1e6 ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    return sk.Rope.from_inv_freq(inv_freq, device=card.device), inv_freq.numpy()


def rotate(card: Card, chunk: int | None) -> Kernel:
    tokens = tokens_of(card, 2 * KV_HEADS * DIM)
    x = torch.randn(1, KV_HEADS, tokens, DIM, dtype=card.dtype, device=card.device)
    out, positions = torch.empty_like(x), torch.arange(tokens, dtype=torch.int32, device=card.device)[None]
    rope, inv_freq = rope_on(card)

    def call() -> torch.Tensor:
        if chunk is None:
            return sk.rotate(x, positions, rope, out=out)
        return sk.phase_align(x, positions, rope, chunk=chunk, out=out)

    def check() -> None:
        got, data = call()[0, -1, -256:], numpy_of(x[0, -1, -256:])
        want = rope_oracle.rotate(data, np.arange(tokens - 256, tokens), inv_freq, chunk=chunk)
        budgets.check(got, want, budgets.rotate(data, want, inv_freq, card.dtype))

    return Kernel([call], 2 * x.nbytes + positions.nbytes, check, f"G={KV_HEADS} T={tokens} D={DIM}")


def project_queries(card: Card) -> Kernel:
    shape, layout = Shape(4, HEADS, KV_HEADS, DIM, context_of(card)), preset_layout(LAYOUT, DIM)
    decode = make_decodes(shape, layout, copies=1, dtype=card.dtype, device=card.device)[0]
    pages, rank = decode.pages, layout.k.rank
    size = 4 * shape.batch * HEADS * pages.max_blocks * rank
    outs = [torch.empty(shape.batch, HEADS, pages.max_blocks, rank, device=card.device) for _ in range(card.copies(size))]
    calls = [partial(sk.project_queries, decode.q, decode.positions, pages, decode.rope, out=out) for out in outs]

    def check() -> None:
        blocks = min(2, pages.max_blocks)
        part, start = part_of(pages, blocks)  # of row 0 and KV head 0; the query as far from them
        group = HEADS // KV_HEADS
        q = numpy_of(decode.q[:1, :group, None])
        position = decode.positions[:1, None].cpu().numpy() - start
        inv_freq = decode.inv_freq.cpu().numpy()
        names = (part.k_basis, part.k_scale, part.segment_table, part.lengths)
        want = rope_oracle.project_queries(q, position, *names, inv_freq, 1.0, layout.align)
        got = calls[0]()[:1, :group, None, -blocks:]
        budgets.check(got, want, budgets.project_queries(q, want, part, inv_freq, 1.0))

    nbytes = size + decode.q.nbytes + pages.k_basis.nbytes + pages.k_scale.nbytes
    return Kernel(calls, nbytes, check, str(shape))


def part_of(pages: sk.Pages, blocks: int) -> tuple[pages_oracle.PageArrays, int]:
    """The last blocks of alignment of row 0 and KV head 0, as the oracle takes them, and their first position."""
    layout = pages.layout
    start = (pages.max_blocks - blocks) * layout.align
    table = pages.page_table[0, start // layout.chunk :].long()
    data = [getattr(pages, name)[table, :1] for name in ("k_pages", "v_pages", "skip")]
    segment = int(pages.segment_table[0, 0])
    bases = [getattr(pages, name)[segment : segment + 1, :1] for name in ("k_basis", "k_scale", "v_basis", "v_scale")]
    length = np.array([int(pages.lengths[0]) - start], np.int32)
    tables = (np.arange(len(table), dtype=np.int32)[None], np.zeros((1, blocks), np.int32), length)
    sizes = (layout.k.bands, layout.v.bands, layout.head_dim, layout.chunk, layout.align)
    return pages_oracle.PageArrays(*sizes, *(x.cpu().numpy() for x in data + bases), *tables), start  # type: ignore[call-arg]


def gram(card: Card) -> Kernel:
    tokens = tokens_of(card, 2 * KV_HEADS * DIM)
    x = torch.randn(1, KV_HEADS, tokens, DIM, dtype=card.dtype, device=card.device)

    def check() -> None:
        data = numpy_of(x[:, -1:])
        budgets.check(sk.gram(x)[:, -1:], data.mT @ data, budgets.gram(data))

    return Kernel([partial(sk.gram, x)], x.nbytes + 4 * KV_HEADS * DIM**2, check, f"G={KV_HEADS} T={tokens} D={DIM}")


def query_metric(card: Card) -> Kernel:
    tokens, group = tokens_of(card, 2 * HEADS * DIM), HEADS // KV_HEADS
    q = torch.randn(1, HEADS, tokens, DIM, dtype=card.dtype, device=card.device)
    rope, inv_freq = rope_on(card)
    chunk = 4 * ALIGN  # few starts for the oracle
    call = partial(sk.query_metric, q, rope, chunk=chunk, kv_heads=KV_HEADS)

    def check() -> None:
        """The last KV head: all its queries from each chunk's start on, turned by the oracle (no scaling)."""
        own, seen = numpy_of(q[0, -group:]), np.arange(tokens) // chunk + 1
        want = np.zeros((DIM, DIM))
        for start in range(0, tokens, chunk):
            turned = rope_oracle.rotate(own[:, start:], np.arange(tokens - start), inv_freq).reshape(-1, DIM)
            want += turned.T @ turned
        budget = budgets.query_metric(own[None], inv_freq, 1.0, card.dtype, chunk, 1)[0, 0]
        budgets.check(call()[0, -1], want / (seen.sum() * group), budget)

    nbytes = q.nbytes + 4 * KV_HEADS * DIM**2
    return Kernel([call], nbytes, check, f"H={HEADS} G={KV_HEADS} T={tokens} D={DIM}")


def fit_steps(card: Card) -> Kernel:
    tokens, bands = 2048, preset_layout(LAYOUT, DIM).k
    nbytes = 4 * KV_HEADS * bands.rank * (tokens + 1)
    shape = (KV_HEADS, tokens, bands.rank)
    samples = [torch.randn(shape, device=card.device) for _ in range(card.copies(nbytes))]

    def check() -> None:
        """The step is one of those tried, and its squared error, in float64, is as good as the least of theirs."""
        c, step = numpy_of(samples[0][-1]), numpy_of(sk.fit_steps(samples[0], bands)[-1])
        widest = np.abs(c).max(0) * 2.0 ** (1 - np.array(bands.bits))
        tried = np.geomspace(1, LEAST_SHARE, STEP_SHARES)[:, None] * widest  # [shares, R]
        budgets.check(np.abs(tried / step - 1).min(0), np.zeros(bands.rank), np.full(bands.rank, 8 * budgets.ACC))

        def error(step: np.ndarray) -> np.ndarray:
            return np.square(compress_oracle.quantise(c / step, bands.bands) * step - c).sum(0)

        least = np.min([error(step) for step in tried], axis=0)
        # T squares are added; of a coefficient and its code times the step a few roundings are left in each difference.
        slack = (tokens + 8) * budgets.ACC * least + 16 * budgets.ACC * (step * np.abs(c).sum(0))
        budgets.check(np.maximum(error(step) - least, 0.0), np.zeros(bands.rank), slack)

    calls = [partial(sk.fit_steps, sample, bands) for sample in samples]
    return Kernel(calls, nbytes, check, f"G={KV_HEADS} T={tokens} {bands}")


def fit_encoder(card: Card) -> Kernel:
    """Of random rows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-127, 128, (2 * KV_HEADS, DIM, DIM), generator=generator, dtype=torch.int8).to(card.device)
    scale = torch.rand((2 * KV_HEADS, DIM), generator=generator).to(card.device) + 0.5
    call = partial(sk.fit_encoder, rows, scale)

    def check() -> None:
        """With R = D the encoder is the basis' inverse, good to the rounding of its entries."""
        for i, got in enumerate(numpy_of(call())):
            basis = numpy_of(rows[i]) * numpy_of(scale[i])[:, None]
            budgets.check(got @ basis, np.eye(DIM), 4 * budgets.ACC * (np.abs(got) @ np.abs(basis)))

    nbytes = rows.nbytes + scale.nbytes + call().nbytes
    return Kernel([call], nbytes, check, f"{2 * KV_HEADS} matrices R=D={DIM}")


def encode(card: Card, side: str) -> Kernel:
    layout = preset_layout(LAYOUT, DIM)
    bands, tokens = (layout.k if side == "k" else layout.v), tokens_of(card, 2 * KV_HEADS * DIM)
    chunks = tokens // layout.chunk
    x = torch.randn(1, KV_HEADS, tokens, DIM, dtype=card.dtype, device=card.device)
    levels = torch.tensor([2.0**bits / 4 for bits in bands.bits], device=card.device)
    encoder = torch.randn(1, KV_HEADS, DIM, bands.rank, device=card.device) / DIM**0.5 * levels
    pages = torch.zeros(chunks, KV_HEADS, layout.chunk * bands.bytes, dtype=torch.uint8, device=card.device)
    ids = torch.randperm(chunks, dtype=torch.int32, device=card.device)[None]
    call = partial(sk.encode, x, encoder, bands, pages, ids, side=side)

    def check() -> None:
        call()
        data, page = numpy_of(x[0, -1, -layout.chunk :]), pages[int(ids[0, -1]), -1].cpu().numpy()
        own = numpy_of(encoder[0, -1])
        exact, slack = data @ own, budgets.coefficients(data, own, card.dtype)
        low, high = (compress_oracle.quantise(exact + sign * slack, bands.bands) for sign in (-1, 1))
        stored = pages_oracle.unpack_pages(page, bands.bands, side)
        assert ((low <= stored) & (stored <= high)).all(), "a code lies outside of what float32 makes of its coefficient"

    nbytes = x.nbytes + encoder.nbytes + pages.nbytes + ids.nbytes
    return Kernel([call], nbytes, check, f"G={KV_HEADS} T={tokens} D={DIM} {bands}")


def decode(card: Card, side: str) -> Kernel:
    layout = preset_layout(LAYOUT, DIM)
    bands, tokens = (layout.k if side == "k" else layout.v), tokens_of(card, 4 * KV_HEADS * DIM)
    shape = Shape(1, HEADS, KV_HEADS, DIM, tokens)
    pages = make_decodes(shape, layout, copies=1, dtype=card.dtype, device=card.device)[0].pages
    call = partial(sk.decode, pages, side=side)

    def check() -> None:
        part, start = part_of(pages, min(2, pages.max_blocks))
        keys, values, _ = pages_oracle.rebuild(part, 0)
        codes = pages_oracle.coefficients(part, 0)[0 if side == "k" else 1][0]
        basis, scale = (part.k_basis, part.k_scale) if side == "k" else (part.v_basis, part.v_scale)
        want = (keys if side == "k" else values)[0]
        got = call()[0, 0, start : start + len(want)]
        budgets.check(got, want, budgets.decode(codes, bands.bands, basis[0, 0], scale[0, 0]))

    data = pages.k_pages if side == "k" else pages.v_pages
    out = 4 * KV_HEADS * pages.max_chunks * layout.chunk * DIM
    return Kernel([call], data.nbytes + out, check, f"G={KV_HEADS} T={tokens} D={DIM} {bands}")


def attend_spectral(card: Card, name: str) -> Kernel:
    shape, layout = Shape(4, HEADS, KV_HEADS, DIM, context_of(card)), preset_layout(name, DIM)
    copies = card.copies(shape.page_bytes(layout))
    decodes = make_decodes(shape, layout, copies=copies, dtype=card.dtype, device=card.device)

    def check() -> None:
        check_state(decodes[0], decodes[0].attend_cold(), ("cold",))

    return Kernel([d.attend_cold for d in decodes], shape.page_bytes(layout), check, f"{shape} {layout.token_bytes} bytes")


def attend_exact(card: Card) -> Kernel:
    shape, layout = Shape(4, HEADS, KV_HEADS, DIM, 512), preset_layout("32x8", DIM)
    nbytes = shape.step_bytes(layout) - shape.page_bytes(layout)
    decodes = make_decodes(shape, layout, copies=card.copies(nbytes), dtype=card.dtype, device=card.device)

    def check() -> None:
        check_state(decodes[0], decodes[0].attend_exact(), ("exact",))

    exact = decodes[0]
    nbytes = sum(x.nbytes for x in (exact.k, exact.v, exact.q, exact.key_positions)) + 4 * exact.q.numel()
    return Kernel([d.attend_exact for d in decodes], nbytes, check, f"B=4 H=32/8 D={DIM} N={exact.k.shape[2]}")


def merge_states(card: Card) -> Kernel:
    rows = 64 * HEADS
    nbytes = 3 * 4 * rows * (DIM + 1)

    def state() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(rows, DIM, device=card.device), torch.randn(rows, device=card.device)

    states = [(*state(), *state()) for _ in range(card.copies(nbytes))]

    def check() -> None:
        o, lse = (np.stack([numpy_of(x[:64]) for x in states[0][i::2]], 1) for i in (0, 1))
        check_merged(sk.merge_states(*states[0]), o, lse)

    return Kernel([partial(sk.merge_states, *s) for s in states], nbytes, check, f"{rows} states of {DIM}")


def merge_many_states(card: Card) -> Kernel:
    rows, count = 64 * HEADS, 16
    nbytes = 4 * rows * (count + 1) * (DIM + 1)
    states = [
        (torch.randn(rows, count, DIM, device=card.device), torch.randn(rows, count, device=card.device))
        for _ in range(card.copies(nbytes))
    ]

    def check() -> None:
        o, lse = (numpy_of(x[:64]) for x in states[0])
        check_merged(sk.merge_many_states(*states[0]), o, lse)

    calls = [partial(sk.merge_many_states, *s) for s in states]
    return Kernel(calls, nbytes, check, f"{rows} x {count} states of {DIM}")


def check_merged(got: tuple[torch.Tensor, torch.Tensor], o: np.ndarray, lse: np.ndarray) -> None:
    """The first rows of a merged state against the oracle's: o [N, n, D], lse [N, n]."""
    want = merge_oracle.merge(o, lse)
    for actual, expected, budget in zip(got, want, budgets.merge(o, lse, want, torch.float32), strict=True):
        budgets.check(actual[: len(o)], expected, budget)


KERNELS: dict[str, Callable[[Card], Kernel]] = {
    "rotate": partial(rotate, chunk=None),
    "phase_align": partial(rotate, chunk=ALIGN),
    "project_queries": project_queries,
    "gram": gram,
    "query_metric": query_metric,
    "fit_steps": fit_steps,
    "fit_encoder": fit_encoder,
    **{f"encode {side}": partial(encode, side=side) for side in ("k", "v")},
    **{f"decode {side}": partial(decode, side=side) for side in ("k", "v")},
    **{f"attend_spectral {name}": partial(attend_spectral, name=name) for name in LAYOUTS},
    "attend_exact": attend_exact,
    "merge_states": merge_states,
    "merge_many_states": merge_many_states,
}


def measured(kernel: Kernel, card: Card) -> dict[str, float | str]:
    """Device time, bytes and bandwidth of a kernel that has been checked."""
    times = device_times(kernel.calls)
    gbs = kernel.nbytes / 1e3 / times.p50
    return {
        "gpu": card.name,
        "dtype": str(card.dtype),
        "shape": kernel.shape,
        "device_us_p20": times.p20,
        "device_us_p50": times.p50,
        "device_us_p80": times.p80,
        "bytes": kernel.nbytes,
        "gbs": gbs,
        "read_bandwidth_gbs": card.read_bandwidth / 1e9,
        "share": gbs * 1e9 / card.read_bandwidth,
    }


def main() -> int:
    try:
        card = Card.current()
    except NoCard as error:
        print(f"perf.kernels: {error}", file=sys.stderr)
        return 2
    print(f"{card.name}, {card.dtype}, read-only pass {card.read_bandwidth / 1e9:.0f} GB/s")
    failed = 0
    for name, build in KERNELS.items():
        try:
            kernel = build(card)
            kernel.check()
            row = measured(kernel, card)
        except Exception as error:  # one broken kernel does not hide the others; the exit code tells
            print(f"{name:24} FAILED: {type(error).__name__}: {str(error)[:200]}", flush=True)
            failed += 1
            continue
        print(
            f"{name:24} {row['device_us_p50']:9.1f} us {row['gbs']:7.0f} GB/s {row['share']:5.0%}  {kernel.shape}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
