"""Every public kernel alone: inputs that fit the card, a check, device time, bytes, bandwidth.

    pytest perf --benchmark-only           with pytest-benchmark (perf/test_benchmarks.py)
    python -m perf.compress                those that store tokens

Builders give inputs (larger than the L2 cache, or several copies in turn), the bytes that a kernel
must read and write once, and a check: the twin of plain PyTorch, which tests/ hold to the oracle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from perf import _cases
from perf._cases import LAYER, SCORE_STD, Shape, Step, make_steps
from perf._timing import Call, Card, Row, device_times
from spectral_kernels import compress, merge, rope
from spectral_kernels.layout import unpack_pages

HEADS, KV_HEADS, DIM = LAYER
PRESET = "balanced"  # where a kernel needs bands and does not run once for each preset
CLOSE = 1e-5  # relative, in norm: float32 arithmetic in any order


@dataclass
class Kernel:
    calls: Sequence[Call]  # the same work on one or several copies of the inputs
    nbytes: int  # what a call must read and write
    check: Call  # raises AssertionError where the first call's result is wrong


def tokens_of(card: Card, token_bytes: int) -> int:
    """Tokens (2**n) of 3 to 6 times the L2 cache, at least 64 MiB, at most 1/8 of free memory."""
    size = min(max(6 * card.properties.L2_cache_size, 128 << 20), card.free // 8)
    return 1 << (size // token_bytes).bit_length() - 1


def context_of(card: Card) -> int:
    """Tokens of a step with four rows: 32K, or as many (2**n) as a small card holds easily."""
    return 1 << min(15, (card.free // (64 * 4 * KV_HEADS * DIM)).bit_length() - 1)


def beside_twin(
    module: Any, name: str, inputs: Sequence[tuple], nbytes: int, allowed: float = CLOSE,
    **options: Any,
) -> Kernel:  # fmt: skip
    """An operation called with each of `inputs` and checked against its twin."""
    calls = [partial(getattr(module, name), *x, **options) for x in inputs]

    def check() -> None:
        got, want = calls[0](), getattr(module, f"{name}_torch")(*inputs[0], **options)
        pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
        for one, other in pairs:
            _cases.check_close(one, other, allowed, name)

    return Kernel(calls, nbytes, check)


def turned(card: Card, name: str) -> Kernel:
    x = card.normal(1, KV_HEADS, tokens_of(card, 2 * KV_HEADS * DIM), DIM, std=SCORE_STD)
    positions = torch.arange(x.shape[2], device=card.device)[None].int()
    options = {"frame": 512} if name == "turn_back" else {}
    allowed = max(CLOSE, torch.finfo(x.dtype).eps)  # rounded to the dtype on both sides
    inputs = [(x, positions, _cases.frequencies(DIM, card.device))]
    return beside_twin(rope, name, inputs, 2 * x.nbytes + positions.nbytes, allowed, **options)


def check_stored(step: Step, run: Call, twin: Call) -> None:
    """Raise AssertionError unless both store the same into pages and exact slots, and do; where a
    coefficient lies at the boundary of two codes, either (one in 1,000)."""
    tensors = (step.k_pages, step.v_pages, step.k_exact, step.v_exact)
    before = [x.clone() for x in tensors]
    run()
    got = [x.clone() for x in tensors]
    for x, old in zip(tensors, before, strict=True):
        x.copy_(old)
    twin()
    if all(map(torch.equal, got[:2], before[:2])):
        raise AssertionError("nothing was stored")
    for side, *pages in zip(("k", "v"), got, tensors, strict=False):
        codes = [unpack_pages(x, step.codec.layout.side(side), side=side) for x in pages]
        off = (codes[0] - codes[1]).abs()
        share = float((off > 0).float().mean())
        if float(off.max()) > 1 or share > 1e-3:
            raise AssertionError(f"codes: {share:.2g} of them differ, by up to {float(off.max())}")
    if not all(map(torch.equal, got[2:], tensors[2:])):
        raise AssertionError("exact slots differ")


def encode(card: Card, side: str, tokens: int | None = None) -> Kernel:
    tokens = tokens or tokens_of(card, 2 * KV_HEADS * DIM)
    [step] = make_steps(Shape(1, *LAYER, tokens), PRESET, card, 1)
    x = card.normal(1, KV_HEADS, tokens, DIM, std=SCORE_STD)
    pages, exact = getattr(step, f"{side}_pages"), getattr(step, f"{side}_exact")
    given = (x, step.codec, pages, step.block_table, step.seq_lens)
    options: Any = {"side": side, "exact": exact, "sinks": step.sinks}
    call = partial(compress.encode, *given, **options)
    check = partial(check_stored, step, call, partial(compress.encode_torch, *given, **options))
    return Kernel([call], x.nbytes + pages.nbytes, check)


def append(card: Card, batch: int = 4) -> Kernel:
    steps = make_steps(Shape(batch, *LAYER, 512), PRESET, card, card.copies(1 << 22))
    codec = steps[0].codec
    check = partial(check_stored, steps[0], steps[0].append, partial(steps[0].append, twin=True))
    nbytes = 6 * steps[0].k.nbytes + codec.k_encoder.nbytes + codec.v_encoder.nbytes
    return Kernel([s.append for s in steps], nbytes, check)


def decode(card: Card, side: str, tokens: int | None = None) -> Kernel:
    tokens = tokens or tokens_of(card, 4 * KV_HEADS * DIM)
    [step] = make_steps(Shape(1, *LAYER, tokens), PRESET, card, 1)
    pages = getattr(step, f"{side}_pages")
    given = (pages, step.codec, step.block_table, step.seq_lens)
    nbytes = pages.nbytes + 4 * KV_HEADS * tokens * DIM
    return beside_twin(compress, "decode", [given], nbytes, side=side)


def attend_spectral(card: Card, preset: str) -> Kernel:
    steps = make_steps(Shape(4, *LAYER, context_of(card)), preset, card)

    def check() -> None:
        _cases.check_state(steps[0], steps[0].attend())
        _cases.check_state(steps[0], steps[0].attend(("pages",)), ("pages",))

    return Kernel([s.attend for s in steps], steps[0].nbytes, check)


def attend_window(card: Card) -> Kernel:
    steps = make_steps(Shape(4, *LAYER, 512), PRESET, card, card.copies(1 << 20))
    calls, first = [partial(step.attend, ("exact",)) for step in steps], steps[0]
    nbytes = first.k_exact.nbytes + first.v_exact.nbytes + 2 * first.q.nbytes
    return Kernel(calls, nbytes, lambda: _cases.check_state(first, calls[0](), ("exact",)))


def merge_states(card: Card, count: int) -> Kernel:
    """count 2: `merge_states`; more: `merge_many_states`."""
    rows, name = 64 * HEADS, "merge_states" if count == 2 else "merge_many_states"
    nbytes = 4 * rows * (count + 1) * (DIM + 1)

    def states() -> tuple[torch.Tensor, ...]:
        o = torch.randn(rows, count, DIM, device=card.device)
        lse = torch.randn(rows, count, device=card.device)
        if count > 2:
            return o, lse
        return tuple(x[:, i].contiguous() for i in (0, 1) for x in (o, lse))

    inputs = [states() for _ in range(card.copies(nbytes))]
    return beside_twin(merge, name, inputs, nbytes)


KERNELS: dict[str, Callable[[Card], Kernel]] = {
    **{name: partial(turned, name=name) for name in ("rotate", "turn_back")},
    **{f"encode {side}": partial(encode, side=side) for side in "kv"},
    "append": append,
    **{f"decode {side}": partial(decode, side=side) for side in "kv"},
    **{f"attend_spectral {name}": partial(attend_spectral, preset=name) for name in _cases.LOSSY},
    "attend_window": attend_window,
    "merge_states": partial(merge_states, count=2),
    "merge_many_states": partial(merge_states, count=16),
}


def measured(kernel: Kernel, card: Card) -> Row:
    """Device time, bytes and bandwidth of a kernel, which is checked first."""
    kernel.check()
    times = device_times(kernel.calls)
    row = {"gpu": card.properties.name, "dtype": str(card.dtype)}
    row |= {f"device_us_{name}": x for name, x in times._asdict().items()}
    gbs, reads = kernel.nbytes / 1e3 / times.p50, card.read_bandwidth / 1e9
    return {**row, "bytes": kernel.nbytes, "gbs": gbs, "read_gbs": reads, "share": gbs / reads}
