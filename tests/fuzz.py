"""Every operation on random shapes, layouts, strides, dtypes and scales, and the cache on random
histories, against their oracles.

    python -m tests.fuzz --minutes 5 --seed 1                on a GPU or without; see --help
    pytest tests/test_fuzz.py                                60 cases, small ones in the interpreter
    pytest tests/test_fuzz.py --fuzz-case encode:3:17        one case: the line a failure prints

A case name:shape:number is a function of these three alone. What decides which kernels are compiled
(bands, D, frame, heads, dtypes, strides, what is given at all) is drawn from (name, shape), and all
else (lengths, tables, tensors and their sizes) from all three: so the command goes through many
numbers of few shapes, which costs little compilation, and pytest through a number of each.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import tests.conftest  # noqa: F401  first: the interpreter, where there is no GPU

# isort: split

import numpy as np
import torch

from tests.cases import (
    DEVICE,
    DTYPES,
    IMPLEMENTATIONS,
    STRIDES,
    ExactTokens,
    PageSpec,
    Queries,
    inverse_frequencies,
    is_slow,
    make_codec,
    make_exact_tokens,
    make_pages,
    make_queries,
    rounded,
    strided,
)
from tests.test_attention import check_spectral
from tests.test_cache import play
from tests.test_compress import check_append, check_decode, check_encode
from tests.test_merge import check_many, check_two
from tests.test_rope import check_project, check_turn
from tests.test_window import check_window


@dataclass(frozen=True)
class Layout:
    k_bands: str
    v_bands: str
    head_dim: int
    rotary_dim: int
    frame: int
    groups: tuple[int, ...]
    """Query heads a KV head."""


LAYOUTS = (
    Layout("16x8+16x4+32x2", "32x4+32x2", 64, 64, 64, (1, 4)),
    Layout("48x4", "64x4", 64, 32, 512, (2, 8)),
    Layout("128x8", "128x8", 64, 64, 64, (1, 6)),
    Layout("16x8+64x4", "80x8", 80, 80, 128, (8, 1)),
    Layout("80x2", "16x8+64x2", 80, 40, 64, (6, 2)),
    Layout("16x8+48x4", "96x4", 96, 96, 64, (6, 4)),
    Layout("96x8", "96x2", 96, 48, 128, (8, 1)),
    Layout("16x8+16x4+96x2", "64x4+64x2", 128, 128, 512, (4, 8)),
    Layout("32x8", "128x4", 128, 64, 64, (4, 6)),
    Layout("16x8+48x4+64x2", "16x8", 128, 0, 64, (4, 2)),
    Layout("16x8+240x2", "256x2", 256, 64, 64, (1, 4)),
    Layout("64x8+64x4", "32x8", 256, 256, 128, (2, 8)),
)
THETAS = (1e2, 1e4, 1e6)
SIZES = (0.0, 1e-3, 1.0, 4.0, 30.0, 1e4)


@dataclass
class Draw:
    """Named draws of one case, which a failure prints."""

    name: str
    shape_number: int
    number: int
    drawn: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seed = [zlib.crc32(self.name.encode()), self.shape_number]
        self.shapes = np.random.default_rng(seed)
        self.rng = np.random.default_rng([*seed, self.number])

    def shape(self, name: str, *options):
        """One of the options, by (name, shape): what decides which kernels are compiled."""
        self.drawn[name] = options[self.shapes.integers(len(options))]
        return self.drawn[name]

    def of(self, name: str, *options):
        """One of the options, by the case."""
        self.drawn[name] = options[self.rng.integers(len(options))]
        return self.drawn[name]

    def int(self, name: str, low: int, high: int) -> int:
        self.drawn[name] = int(self.rng.integers(low, high + 1))
        return self.drawn[name]

    def lengths(self, batch: int, most: int, edges: Sequence[int]) -> tuple[int, ...]:
        """Tokens of each row: at an edge or a token beside it, or anything."""
        near = [n + off for n in edges for off in (-1, 0, 1) if 0 <= n + off <= most]
        ends = self.rng.choice(near, batch), self.rng.integers(0, most + 1, batch)
        found = tuple(int(n) for n in np.where(self.rng.random(batch) < 0.6, *ends))
        self.drawn["lengths"] = found
        return found


def draw_implementation(draw: Draw) -> str:
    """The twin or the kernel; on a GPU the kernel."""
    drawn = draw.shape("implementation", *IMPLEMENTATIONS)
    return drawn if DEVICE.type == "cpu" else "triton"


def draw_paths(draw: Draw) -> tuple[str, ...]:
    """The twin or one kernel; on a GPU both kernels, that of cards before sm_80 too, on one
    case."""
    drawn = draw.shape("paths", ("torch",), ("triton",), ("triton",), ("scalar",))
    return drawn if DEVICE.type == "cpu" else ("triton", "scalar")


def draw_spec(
    draw: Draw, layout: Layout, slow: bool, edges: Sequence[int] = (), longest: int = 1500
) -> PageSpec:
    batch = draw.int("batch", 1, 2 if slow else 4)
    most = 140 if slow else draw.of("longest", 140, 140, 140, 300, 700, longest)
    every = (0, 32, 64, layout.frame, layout.frame + 64, *edges)
    return PageSpec(
        layout.k_bands,
        layout.v_bands,
        layout.head_dim,
        draw.shape("kv_heads", *((1,) if slow else (1, 2, 3))),
        draw.lengths(batch, most, every),
        layout.frame,
        layout.rotary_dim,
        draw.of("theta", *THETAS),
        codecs=draw.shape("codecs", 0, 1, 2),
        spare_pages=draw.int("spare pages", 0, 2),
    )


def draw_queries(draw: Draw, layout: Layout, spec: PageSpec, count: int) -> Queries:
    heads = spec.kv_heads * draw.shape("group", *layout.groups)
    return make_queries(
        draw.rng,
        shape=(len(spec.lengths), heads, count, layout.head_dim),
        dtype=draw.shape("query dtype", *DTYPES),
        size=draw.of("query size", *SIZES),
        stride=draw.shape("query strides", *STRIDES),
        flat=count == 1 and draw.shape("flat", True, False),
    )


def draw_exact(draw: Draw, spec: PageSpec, count: int, sinks: int, window: int) -> ExactTokens:
    return make_exact_tokens(
        draw.rng,
        lengths=spec.lengths,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        sinks=sinks,
        window=window,
        drafts=draw.shape("drafts", 0, 0, 3),
        dtype=draw.shape("exact dtype", *DTYPES),
        stride=draw.shape("exact strides", *STRIDES),
        permuted=draw.shape("permuted", True, False),
        size=draw.of("key size", 1.0, 1.0, 1e-3, 50.0),
    )


def draw_window(draw: Draw, count: int) -> tuple[int, int]:
    sinks = draw.shape("sinks", 0, 4, 1, 600)
    return sinks, draw.shape("window", *(n for n in (1, 5, 16, 40) if n >= count))


def fuzz_rotate(draw: Draw) -> None:
    implementation, dtype = draw_implementation(draw), draw.shape("dtype", *DTYPES)
    dim = draw.shape("dim", 64, 80, 96, 128, 256)
    inv_freq = inverse_frequencies(
        draw.shape("rotary_dim", dim, dim // 2, 0), draw.of("theta", *THETAS)
    )
    shape = (draw.int("batch", 1, 2), draw.int("heads", 1, 3), draw.int("tokens", 0, 40), dim)
    at = draw.rng.integers(0, draw.of("far", 10, 10_000, 2**31 - 1), (shape[0], shape[2]))
    x = rounded(draw.rng.standard_normal(shape) * draw.of("size", 1e-6, 1.0, 1e3), dtype)
    positions = torch.from_numpy(at).to(DEVICE, draw.shape("positions", torch.int32, torch.int64))
    check_turn(
        implementation,
        strided(x, draw.shape("strides", *STRIDES)),
        at,
        positions,
        inv_freq,
        draw.shape("frame", None, 64, 128, 512),  # None: rotate, else turn_back
        draw.shape("inverse", False, True),
        draw.shape("out strides", *STRIDES),
    )


def fuzz_project_queries(draw: Draw) -> None:
    layout = draw.shape("layout", *LAYOUTS)
    spec = draw_spec(draw, layout, False)
    codec, used = make_codec(draw.rng, spec)
    queries = draw_queries(draw, layout, spec, draw.shape("queries", 1, 1, 2, 4))
    rows = used[draw.rng.integers(0, len(used), len(spec.lengths))]
    check_project(queries, codec, rows, draw.int("frames", 0, 4))


def fuzz_encode(draw: Draw) -> None:
    layout, implementation = draw.shape("layout", *LAYOUTS), draw_implementation(draw)
    spec = draw_spec(draw, layout, is_slow(implementation))
    news = [draw.of(f"new {b}", n, min(n, 1), n // 2, 0) for b, n in enumerate(spec.lengths)]
    sinks, ring = draw.shape("sinks and ring", (0, 0), (4, 16), (0, 3), (2, 70))
    check_encode(
        implementation,
        draw.rng,
        spec,
        news,
        draw.shape("dtype", *DTYPES),
        draw.shape("side", "k", "v"),
        stride=draw.shape("strides", *STRIDES),
        sinks=sinks,
        ring=ring,
        shared=draw.shape("shared pool", True, False),
    )


def fuzz_append(draw: Draw) -> None:
    layout, implementation = draw.shape("layout", *LAYOUTS), draw_implementation(draw)
    spec = draw_spec(draw, layout, is_slow(implementation))
    queries = draw.shape("queries", 1, 1, 2, 4)
    check_append(
        implementation,
        draw.rng,
        spec,
        queries,
        draw.shape("dtype", *DTYPES),
        stride=draw.shape("strides", *STRIDES),
        sinks=draw.shape("sinks", 0, 4),
        ring=queries + draw.shape("spare", 0, 1, 16),
    )


def fuzz_decode(draw: Draw) -> None:
    layout, implementation = draw.shape("layout", *LAYOUTS), draw_implementation(draw)
    spec, size = draw_spec(draw, layout, is_slow(implementation)), draw.of("size", 1e-3, 1.0, 1e3)
    arrays = make_pages(draw.rng, spec, size=size)
    check_decode(implementation, arrays, draw.shape("side", "k", "v"))


def fuzz_attend_window(draw: Draw) -> None:
    layout, paths = draw.shape("layout", *LAYOUTS), draw_paths(draw)
    count = draw.shape("queries", 1, 1, 2, 4)
    sinks, window = draw_window(draw, count)
    spec = draw_spec(draw, layout, is_slow(paths[0]), (sinks, window, sinks + window))
    tokens = draw_exact(draw, spec, count, sinks, window)
    queries = draw_queries(draw, layout, spec, count)
    scale = draw.of("scale", None, None, 1.0, 0.02)
    for path in paths:
        check_window(path, queries, tokens, spec.lengths, scale=scale)


def fuzz_attend_spectral(draw: Draw) -> None:
    layout, paths = draw.shape("layout", *LAYOUTS), draw_paths(draw)
    slow = is_slow(paths[0])
    if slow and layout.head_dim > 96:
        paths = ("triton",)  # without matrix units a large case takes half a minute
    count = draw.shape("queries", 1, 1, 2, 4, *([] if slow else [16]))
    sinks, window = draw_window(draw, count)
    # Splits of several turns of 512 tokens, and borders of turns.
    ends = (sinks, window, sinks + window, 64 + window, 512 + window, 1024 + window, 4096 + window)
    spec = draw_spec(draw, layout, slow, ends, longest=6000)
    arrays = make_pages(draw.rng, spec, size=draw.of("size", 1.0, 1.0, 1e-3, 50.0))
    queries = draw_queries(draw, layout, spec, count)
    scale, splits = draw.of("scale", None, None, 1.0, 0.02), draw.of("splits", None, 1, 3)
    shared = draw.shape("shared pool", True, False)
    how = draw.shape("how", "step", "step", "cut pages", "pages")
    options: dict = {}
    if how == "step":
        options["tokens"] = draw_exact(draw, spec, count, sinks, window)
    elif how == "cut pages":
        options |= {"sinks": sinks, "wide": window}
    for path in paths:
        check_spectral(
            path, arrays, queries, scale=scale, shared=shared, num_splits=splits, **options
        )


def fuzz_merge(draw: Draw) -> None:
    """merge_states and merge_many_states."""
    implementation, dtype = draw_implementation(draw), draw.shape("dtype", *DTYPES)
    dim = draw.shape("dim", 64, 80, 96, 128, 256)
    shape = (draw.int("batch", 1, 4), draw.int("heads", 1, 8 if is_slow(implementation) else 32))
    options = {
        "empty": draw.of("empty", 0.0, 0.3, 1.0),
        "spread": draw.of("spread", 0.0, 3.0, 300.0),
    }
    if draw.shape("operation", "merge_states", "merge_many_states") == "merge_states":
        check_two(draw.rng, implementation, shape, dim, dtype, **options)
    else:
        many = draw.int("states", 0, 70)
        check_many(draw.rng, implementation, shape, dim, many, dtype, **options)


def fuzz_history(draw: Draw) -> None:
    """A cache of rows of different lengths through a dozen steps, in any order."""
    play(draw)


# Each with its share of the cases: a history for ten cases of an operation.
FUZZERS: dict[str, tuple[Callable[[Draw], None], float]] = {
    "rotate": (fuzz_rotate, 0.07),
    "project_queries": (fuzz_project_queries, 0.07),
    "encode": (fuzz_encode, 0.13),
    "append": (fuzz_append, 0.13),
    "decode": (fuzz_decode, 0.06),
    "attend_window": (fuzz_attend_window, 0.13),
    "attend_spectral": (fuzz_attend_spectral, 0.27),
    "merge": (fuzz_merge, 0.05),
    "history": (fuzz_history, 0.09),
}


def run_case(name: str, shape: int, number: int) -> None:
    """Raise what the case raises, with the line that runs it again in front."""
    draw = Draw(name, shape, number)
    try:
        FUZZERS[name][0](draw)
    except Exception as error:
        line = f"pytest tests/test_fuzz.py --fuzz-case {name}:{shape}:{number}"
        error.args = (f"{line}\n{error}\ndrawn: {draw.drawn}",)
        raise


# ---- many cases ----------------------------------------------------------------------------------

CHUNK = 100  # cases of a shape in a round, all operations together

Chunk = tuple[str, int, range]  # name, shape, numbers


def chunks(seed: int, shapes: int, total: int) -> Iterator[Chunk]:
    """`total` cases (0: no end), in rounds over all operations and shapes; other seeds have other
    shapes."""
    left, start = total or math.inf, 0
    while True:
        for shape in range(seed * shapes, seed * shapes + shapes):
            for name, (_, share) in FUZZERS.items():
                count = round(CHUNK * share)
                numbers = range(start * count, start * count + int(min(count, left)))
                left -= len(numbers)
                yield name, shape, numbers
                if left <= 0:
                    return
        start += 1


def run_chunk(chunk: Chunk, deadline: float) -> tuple[str, int, list[str], float]:
    """(name, cases that ran, the failures' texts, seconds) of a chunk, until the deadline."""
    torch.set_num_threads(1)
    (name, shape, numbers), failures, ran, begin = chunk, [], 0, time.time()
    for number in numbers:
        if time.time() > deadline:
            break
        ran += 1
        try:
            run_case(name, shape, number)
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(at.filename).name}:{at.lineno}"
            failures.append(f"{error}\n  {type(error).__name__} at {where}")
            if "CUDA error" in str(error):  # no case after it can run here
                print(failures[-1], flush=True)
                os._exit(1)
    return name, ran, failures, time.time() - begin


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="at most (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="other numbers: other shapes")
    parser.add_argument(
        "--cases", type=int, default=0,
        help="end after so many, and fail if there were fewer (default: never)",
    )  # fmt: skip
    parser.add_argument("--shapes", type=int, default=24, help="of an operation (default 24)")
    cores = os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=cores, help=f"processes (default {cores})")
    options = parser.parse_args()
    begin = time.time()
    deadline = begin + 60 * options.minutes
    cases, seconds, failures = Counter(), Counter(), []
    work, running = chunks(options.seed, options.shapes, options.cases), set()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        while True:
            while len(running) < 2 * options.jobs and time.time() < deadline:
                chunk = next(work, None)
                if chunk is None:
                    break
                running.add(pool.submit(run_chunk, chunk, deadline))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                if future.exception() is not None:  # a process died
                    raise SystemExit(f"{sum(cases.values())} cases, then: {future.exception()}")
                name, ran, failed, took = future.result()
                cases[name] += ran
                seconds[name] += took
                failures += failed
                for text in failed if len(failures) <= 20 else ():
                    print(text, flush=True)
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU, interpreter"
    print(f"{device}, seed {options.seed}, {options.shapes} shapes, {options.jobs} processes")
    print(f"{'operation':18} {'cases':>7} {'ms a case':>10}")
    for name in FUZZERS:
        print(f"{name:18} {cases[name]:7} {1000 * seconds[name] / max(cases[name], 1):10.1f}")
    total, histories = sum(cases.values()), cases["history"]
    print(
        f"{total - histories} kernel cases and {histories} histories in "
        f"{time.time() - begin:.0f} s: {len(failures)} failed"
    )
    if total < options.cases:
        print(f"expected {options.cases} in all, got {total}")
    return 1 if failures or total < options.cases else 0


if __name__ == "__main__":
    sys.exit(main())
