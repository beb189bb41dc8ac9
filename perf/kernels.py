"""Every public kernel alone: inputs that fit the card, a check, device time, bytes, bandwidth.

    python -m perf.kernels [NAME ...]      a table; needs torch, triton and numpy
    pytest perf --benchmark-only           the same with pytest-benchmark (perf/test_benchmarks.py)

One builder a stem of the package gives inputs, bytes and check; perf.compress takes its builders
from here. Inputs are larger than the L2 cache, or several copies are used in turn. Bytes are those
that a kernel must read and write once. Checks: the twin of plain PyTorch on the same inputs (tests/
hold twins to the oracle), attention: perf/_cases.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from perf._cases import LOSSY, SCORE_STD, Shape, Step, check_state, layouts, make_steps
from perf._timing import Call, Card, Row, begin, device_times, reason
from spectral_kernels import compress, merge, rope
from spectral_kernels.calibrate import PRESETS
from spectral_kernels.layout import unpack_pages

HEADS, KV_HEADS, DIM = 32, 8, 128
PRESET = "balanced"  # where a kernel needs bands and does not run once for each preset
CLOSE = 1e-5  # relative, in norm: float32 arithmetic in any order


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
    """Tokens (a power of two) that take 3 to 6 times the L2 cache, at least 64 MiB, at most an
    eighth of free memory."""
    size = min(max(6 * card.properties.L2_cache_size, 128 << 20), card.free // 8)
    return 1 << (size // token_bytes).bit_length() - 1


def context_of(card: Card) -> int:
    """Tokens of a decode step with four rows: 32K, or as many (a power of two) as a small card
    holds easily."""
    return 1 << min(15, (card.free // (64 * 4 * KV_HEADS * DIM)).bit_length() - 1)


def check_close(got: torch.Tensor, want: torch.Tensor, allowed: float = CLOSE) -> None:
    """Relative error in norm."""
    off = float((got.double() - want.double()).norm() / want.double().norm())
    if not off <= allowed:
        raise AssertionError(f"a relative error of {off:.3g}, expected at most {allowed:.3g}")


def rounding(dtype: torch.dtype) -> float:
    """Relative error in norm that one rounding to dtype explains, of both sides."""
    return CLOSE if dtype == torch.float32 else torch.finfo(dtype).eps


def steps_of(
    card: Card, shape: Shape, preset: str = PRESET, copies: int | None = None
) -> list[Step]:
    plan = layouts(preset, shape.dim)
    layout, exact = plan[len(plan) // 2], PRESETS[preset].sinks + PRESETS[preset].window
    copies = card.copies(shape.step_bytes(layout, exact)) if copies is None else copies
    return make_steps(
        shape, layout, preset=preset, copies=copies, dtype=card.dtype, device=card.device
    )


def rows_of(card: Card, tokens: int, heads: int = KV_HEADS) -> torch.Tensor:
    """[1, heads, T, D]."""
    return torch.empty(1, heads, tokens, DIM, dtype=card.dtype, device=card.device).normal_(
        std=SCORE_STD
    )


# rope.py


def turned(card: Card, name: str) -> Kernel:
    x = rows_of(card, tokens_of(card, 2 * KV_HEADS * DIM))
    out, positions = (
        torch.empty_like(x),
        torch.arange(x.shape[2], dtype=torch.int32, device=card.device)[None],
    )
    freqs = rope.freqs_from_inv_freq(
        1e6 ** -(torch.arange(0, DIM, 2).double() / DIM), device=card.device
    )
    options = {"frame": 512} if name == "turn_back" else {}

    def call() -> torch.Tensor:
        return getattr(rope, name)(x, positions, freqs, out=out, **options)

    def check() -> None:
        part = slice(-256, None)
        want = getattr(rope, f"{name}_torch")(x[:, :, part], positions[:, part], freqs, **options)
        check_close(call()[:, :, part], want, rounding(x.dtype))

    return Kernel(
        [call], 2 * x.nbytes + positions.nbytes, check, f"G={KV_HEADS} T={x.shape[2]} D={DIM}"
    )


# compress.py


def gram(card: Card, tokens: int | None = None) -> Kernel:
    x = rows_of(card, tokens or tokens_of(card, 2 * KV_HEADS * DIM))

    def check() -> None:
        check_close(compress.gram(x)[:, -1], x[:, -1].double().mT @ x[:, -1].double())

    shape = f"G={KV_HEADS} T={x.shape[2]} D={DIM}"
    return Kernel([partial(compress.gram, x)], x.nbytes + 4 * KV_HEADS * DIM**2, check, shape)


def check_codes(got: torch.Tensor, want: torch.Tensor, step: Step, side: str) -> None:
    """Pages hold the codes of the twin; where a coefficient lies at the boundary of two codes,
    either (one in 1,000)."""
    bands = step.codec.layout.side(side)
    off = (unpack_pages(got, bands, side=side) - unpack_pages(want, bands, side=side)).abs()
    share = float((off > 0).float().mean())
    if float(off.max()) > 1 or share > 1e-3:
        raise AssertionError(f"codes: {share:.2g} of them differ, by up to {float(off.max())}")


def encode(card: Card, side: str, tokens: int | None = None) -> Kernel:
    tokens = tokens or tokens_of(card, 2 * KV_HEADS * DIM)
    [step] = steps_of(card, Shape(1, HEADS, KV_HEADS, DIM, tokens), copies=1)
    x, pages = rows_of(card, tokens), step.k_pages if side == "k" else step.v_pages
    exact = step.k_exact if side == "k" else step.v_exact
    options: Any = {"side": side, "exact": exact, "sinks": step.sinks}
    call = partial(
        compress.encode, x, step.codec, pages, step.block_table, step.seq_lens, **options
    )

    def check() -> None:
        call()
        got, kept = pages.clone(), exact.clone()
        pages.random_(0, 256)
        compress.encode_torch(x, step.codec, pages, step.block_table, step.seq_lens, **options)
        check_codes(got, pages, step, side)
        check_close(kept, exact, 0.0)

    bands = step.codec.layout.side(side)
    return Kernel(
        [call], x.nbytes + pages.nbytes, check, f"G={KV_HEADS} T={tokens} D={DIM} {bands}"
    )


def append(card: Card, batch: int = 4) -> Kernel:
    steps = steps_of(card, Shape(batch, HEADS, KV_HEADS, DIM, 512), copies=card.copies(1 << 22))

    def check() -> None:
        step = steps[0]
        tensors = (step.k_pages, step.v_pages, step.k_exact, step.v_exact)
        before = [x.clone() for x in tensors]
        step.append()
        got = [x.clone() for x in tensors]
        for x, old in zip(tensors, before, strict=True):
            x.copy_(old)
        compress.append_torch(
            step.k, step.v, step.codec, *tensors, step.block_table, step.seq_lens, sinks=step.sinks
        )
        if not any((x != old).any() for x, old in zip(tensors[:2], before[:2], strict=True)):
            raise AssertionError("nothing was stored")
        check_codes(got[0], tensors[0], step, "k")
        check_codes(got[1], tensors[1], step, "v")
        for a, b in zip(got[2:], tensors[2:], strict=True):
            check_close(a, b, 0.0)

    codec = steps[0].codec
    nbytes = 3 * steps[0].k.nbytes * 2 + codec.k_encoder.nbytes + codec.v_encoder.nbytes
    return Kernel([step.append for step in steps], nbytes, check, f"B={batch} G={KV_HEADS} D={DIM}")


def decode(card: Card, side: str, tokens: int | None = None) -> Kernel:
    tokens = tokens or tokens_of(card, 4 * KV_HEADS * DIM)
    [step] = steps_of(card, Shape(1, HEADS, KV_HEADS, DIM, tokens), copies=1)
    pages = step.k_pages if side == "k" else step.v_pages
    arguments = (pages, step.codec, step.block_table, step.seq_lens)
    call = partial(compress.decode, *arguments, side=side)

    def check() -> None:
        check_close(call()[:, :, -256:], compress.decode_torch(*arguments, side=side)[:, :, -256:])

    out = 4 * KV_HEADS * tokens * DIM
    return Kernel(
        [call],
        pages.nbytes + out,
        check,
        f"G={KV_HEADS} T={tokens} D={DIM} {step.codec.layout.side(side)}",
    )


# attention.py, window.py


def attend_spectral(card: Card, preset: str) -> Kernel:
    shape = Shape(4, HEADS, KV_HEADS, DIM, context_of(card))
    steps = steps_of(card, shape, preset)

    def check() -> None:
        check_state(steps[0], steps[0].attend())
        check_state(steps[0], steps[0].attend(("pages",)), ("pages",))

    layout, exact = steps[0].codec.layout, steps[0].k_exact.shape[2]
    return Kernel(
        [s.attend for s in steps],
        shape.step_bytes(layout, exact),
        check,
        f"{shape} {layout.token_bytes} bytes",
    )


def attend_window(card: Card) -> Kernel:
    steps = steps_of(card, Shape(4, HEADS, KV_HEADS, DIM, 512), copies=card.copies(1 << 20))

    def check() -> None:
        check_state(steps[0], steps[0].attend(("exact",)), ("exact",))

    first = steps[0]
    nbytes = first.k_exact.nbytes + first.v_exact.nbytes + 2 * first.q.nbytes
    calls = [partial(step.attend, ("exact",)) for step in steps]
    return Kernel(calls, nbytes, check, f"B=4 H=32/8 D={DIM} {first.k_exact.shape[2]} tokens")


# merge.py


def merge_states(card: Card, count: int) -> Kernel:
    """count 2: `merge_states`; more: `merge_many_states`."""
    rows, name = 64 * HEADS, "merge_states" if count == 2 else "merge_many_states"
    nbytes = 4 * rows * (count + 1) * (DIM + 1)

    def states() -> tuple[torch.Tensor, ...]:
        o, lse = (
            torch.randn(rows, count, DIM, device=card.device),
            torch.randn(rows, count, device=card.device),
        )
        if count > 2:
            return o, lse
        return tuple(x[:, i].contiguous() for i in (0, 1) for x in (o, lse))

    inputs = [states() for _ in range(card.copies(nbytes))]

    def check() -> None:
        o, lse = inputs[0] if count > 2 else (torch.stack(inputs[0][i::2], 1) for i in (0, 1))
        total = torch.logsumexp(lse.double(), 1)
        want = ((lse.double() - total[:, None]).exp()[..., None] * o.double()).sum(1), total
        for got, wanted in zip(calls[0](), want, strict=True):
            check_close(got, wanted)

    calls = [partial(getattr(merge, name), *x) for x in inputs]
    return Kernel(calls, nbytes, check, f"{rows} x {count} states of {DIM}")


KERNELS: dict[str, Callable[[Card], Kernel]] = {
    "rotate": partial(turned, name="rotate"),
    "turn_back": partial(turned, name="turn_back"),
    "gram": gram,
    **{f"encode {side}": partial(encode, side=side) for side in ("k", "v")},
    "append": append,
    **{f"decode {side}": partial(decode, side=side) for side in ("k", "v")},
    **{f"attend_spectral {name}": partial(attend_spectral, preset=name) for name in LOSSY},
    "attend_window": attend_window,
    "merge_states": partial(merge_states, count=2),
    "merge_many_states": partial(merge_states, count=16),
}


def measured(kernel: Kernel, card: Card) -> Row:
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


def table(builders: dict[str, Callable[[Card], Kernel]], card: Card) -> tuple[list[Row], int]:
    """Check, time and print; the rows (with names), and how many failed."""
    rows, failed = [], 0
    for name, build in builders.items():
        try:
            kernel = build(card)
            kernel.check()
            rows.append({"kernel": name, **measured(kernel, card)})
        except Exception as error:  # the others go on; the exit code tells
            print(f"{name:24} FAILED: {reason(error)}", flush=True)
            failed += 1
            continue
        row = rows[-1]
        text = f"{row['device_us_p50']:9.1f} us {row['gbs']:7.0f} GB/s {row['share']:5.0%}"
        print(f"{name:24} {text}  {kernel.shape}", flush=True)
    return rows, failed


def main(argv: Sequence[str] | None = None) -> int:
    known = sorted({name.split()[0] for name in KERNELS})
    parser = argparse.ArgumentParser(prog="python -m perf.kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    names = parser.parse_args(argv).names or known
    if set(names) - set(known):
        parser.error(f"NAME: expected some of {known}, got {names}")
    card, _ = begin()
    chosen = {name: build for name, build in KERNELS.items() if name.split()[0] in names}
    return 1 if table(chosen, card)[1] else 0


if __name__ == "__main__":
    sys.exit(main())
