"""What the cold part of a decode step takes on cards that are not there, from machine code: `python -m perf.predict`.

    python -m perf.predict [--layout NAME] [--batch B] [--tokens T]     every card, D = 128, 32/8 heads
    python -m perf.predict --measured                                   beside every measured row; 1 if issue 5's is off

The launches of the shape are compiled for a card (no GPU is needed), and each kernel's code runs through a model of the
card's schedulers (perf/_simulate.py has its assumptions and sources). To that come START for each launch, and GAP between
launches of a CUDA graph. Beside it: `bytes`, what reading the pages takes at the card's bandwidth (a lower bound); dense
fp16 attention at its own bound, all of K and V read at that bandwidth; what was measured, where perf/results has a row of
that card, shape and layout (attention.jsonl: perf.attention; old_cards.jsonl: perf.old_cards, both paths).
`(old)`: the path of cards before sm_80 on a newer one.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton

import spectral_kernels as sk
from perf import _sass
from perf._cases import LAYOUTS, WINDOW, Shape, preset_layout
from perf._simulate import CARDS, Card, Estimate, Launch, estimate
from perf.tables import RESULTS, read_rows
from spectral_kernels import _launch, attention
from tests.compile_kernels import Launched, Recorder, stand_in

HEADS, KV_HEADS, DIM = 32, 8, 128
START = 1.0  # microseconds of a kernel before its first instruction and after its last: about those of an empty kernel
GAP = 0.9  # between launches of a graph: a step's time less its kernels', perf.attention's rows of the H200 (0.6 to 1.3)
TRUSTED = 0.3  # the error that issue 5 allows the forced path at B = 4, T = 32K, balanced
# Loads and stores that touch several lines of 128 bytes (_simulate): 8 rows of a basis that are 128 bytes long, 4 heads of
# a query, the records of 4 heads.
LINES = {"_project_operand_kernel": {("LDG", 16): 8, ("LDG", 2): 4, ("STG", 1): 4}}
COLUMNS = {  # kernels by the columns of perf.attention's rows
    "_project_operand_kernel": "project_us",
    "_attend_spectral_kernel": "kernel_us",
    "_attend_operands_kernel": "kernel_us",
    "_finish_spectral_kernel": "merge_us",
}


def tiles(values: dict[str, Any], shape: Shape) -> int:
    """Of a warp of a cold kernel: those of a program take turns (one in attention_sm75.py)."""
    each = math.ceil(math.ceil(shape.cold / values["C"]) / values["splits"])
    return math.ceil(each * (values["C"] // 64) / values.get("W", 1))


def rounds(values: dict[str, Any], shape: Shape) -> int:
    """Of a program of `_attend_spectral_kernel` that projects its queries: M rows at a time, each a block and a head."""
    each = math.ceil(math.ceil(shape.cold / values["C"]) / values["splits"])
    return math.ceil(math.ceil(each * values["C"] / values["ALIGN"]) * values["HG_PAD"] / values["M"])


Trips = Callable[[dict[str, Any], Shape], int]
TRIPS: dict[str, tuple[Trips, ...]] = {  # of the loops with integer matrix instructions, in order; others run once
    "_attend_spectral_kernel": (rounds, tiles),
    "_attend_operands_kernel": (tiles,),
}


def launches(card: Card, cases: Sequence[tuple[Shape, str]], old: bool) -> list[list[Launched]]:
    """What `attend_spectral` would launch on the card in each case (a shape and a layout's name)."""
    found: list[Launched] = []
    recorder = Recorder(card.capability, lambda launched, new: found.append(launched))
    dtype = torch.bfloat16 if stand_in(card.capability, recorder, old) else torch.float16
    _launch.multiprocessors = lambda device: card.multiprocessors
    count, cuda = attention.count_splits, torch.device("cuda")
    attention.count_splits = lambda programs, tiles, device, each, less=0: count(programs, tiles, cuda, each, less)
    out = []
    for shape, name in cases:
        layout = preset_layout(name, shape.dim)
        chunks = -(-shape.cold // layout.chunk)
        pages = sk.allocate_pages(
            layout,
            pages=1,
            segments=1,
            kv_heads=shape.kv_heads,
            batch=shape.batch,
            max_chunks=chunks,
            device=torch.device("cpu"),
        )
        q = torch.zeros(shape.batch, shape.heads, shape.dim, dtype=dtype)
        rope = sk.Rope.from_inv_freq(torch.full((shape.dim // 2,), 0.5))
        sk.attend_spectral(q, torch.zeros(shape.batch, dtype=torch.int32), pages, rope)
        out.append(found[:])
        found.clear()
    attention.count_splits = count
    return out


def simulate(card: Card, launched: Launched, shape: Shape) -> Estimate:
    name, code = launched.row["kernel"], _sass.instructions(launched.kernel.asm["cubin"])
    loops = [loop for loop in _sass.loops(code) if any(i.operation in ("LDG", "LDGSTS", "IMMA") for i in loop)]
    streams: list[int] = []
    visits = [(loop, 1) for loop in loops]
    if name in TRIPS:
        hot = [loop for loop in loops if any(i.operation == "IMMA" for i in loop)]
        visits = [(loop, trips(launched.values, shape)) for loop, trips in zip(hot, TRIPS[name], strict=True)]
        streams = [i.at for i in hot[-1]]
    launch = Launch(code, launched.programs, launched.row["warps"], launched.row["registers"], launched.row["shared_bytes"])
    return estimate(card, launch, visits, streams, LINES.get(name, {}))


class Prediction(NamedTuple):
    """Microseconds: of each kernel by its name, of all launches, of reading the pages."""

    kernels: dict[str, float]
    issue: float  # share of the issue slots that the cold kernel uses
    total: float
    read: float


def predict(card: Card, cases: Sequence[tuple[Shape, str]], old: bool) -> list[Prediction]:
    """For each case. old: by the path of cards before sm_80. Launchers launch nothing for the rest of the process."""
    out = []
    for (shape, name), launched in zip(cases, launches(card, cases, old), strict=True):
        kernels, issue = {}, 0.0
        for launch in launched:
            kernel = launch.row["kernel"]
            found = simulate(card, launch, shape)
            kernels[kernel] = found.seconds * 1e6 + START
            if kernel in TRIPS:
                issue = found.issue
        read = shape.page_bytes(preset_layout(name, shape.dim)) / card.bytes_per_second * 1e6
        out.append(Prediction(kernels, issue, sum(kernels.values()) + GAP * len(kernels), read))
    return out


def card_of(gpu: str) -> str | None:
    """The name in CARDS of a card as PyTorch names it."""
    return next((name for name in CARDS if name in gpu.replace("-", " ").split()), None)


class Comparison(NamedTuple):
    """Microseconds of a row's kernel, or of all its launches ("all")."""

    row: dict[str, Any]
    what: str
    measured: float
    predicted: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured

    @property
    def trusted(self) -> bool:
        return abs(self.ratio - 1) <= TRUSTED


def comparisons(rows: Iterable[dict[str, Any]]) -> list[Comparison]:
    """Measured beside predicted, for rows of perf.old_cards (all of `attend_spectral`, and each kernel) and of
    perf.attention (each kernel; the exact tokens of its step are not in the prediction).

    Rows of cards that are not in CARDS, of pages other than the layout's, and of kernels that are gone are left out.
    """
    chosen: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in rows:
        name, pages = card_of(row["gpu"]), preset_layout(row["layout"], row["D"])
        if name and (row["chunk"], row["align"]) == (pages.chunk, pages.align):
            old = row.get("path") == "sm_75" or CARDS[name].capability < 80
            if not old and (row.get("project_us") or "_prepare_kernel" in row.get("kernels", ())):
                continue  # of a step whose queries were projected by another launch
            chosen.setdefault((name, old), []).append(row)
    out = []
    for (name, old), own in chosen.items():
        # T tokens are cold in rows with a path, but for the newest in the others.
        tokens = [row["T"] + WINDOW if "path" in row else row["T"] for row in own]
        shapes = [Shape(row["B"], row["H"], row["G"], row["D"], t) for row, t in zip(own, tokens, strict=True)]
        cases = list(zip(shapes, [row["layout"] for row in own], strict=True))
        for row, found in zip(own, predict(CARDS[name], cases, old), strict=True):
            if "path" in row:
                seen = row["kernels"]
                out.append(Comparison(row, "all", row["p50_us"], found.total))
            else:
                seen = {kernel: row[COLUMNS[kernel]] for kernel in found.kernels}
            out += [Comparison(row, kernel, seen[kernel], t) for kernel, t in found.kernels.items() if seen.get(kernel)]
    return out


def issue_5(compared: Iterable[Comparison]) -> list[Comparison]:
    """Those that issue 5 sets a limit to (TRUSTED): all of the forced path on an H200, B = 4, T = 32K, balanced."""
    wanted = {"B": 4, "H": 32, "G": 8, "D": 128, "T": 32768, "layout": "balanced", "path": "sm_75"}
    return [c for c in compared if c.what == "all" and "H200" in c.row["gpu"] and wanted.items() <= c.row.items()]


def every_card(batch: int, tokens: int, layout: str) -> None:
    shape = Shape(batch, HEADS, KV_HEADS, DIM, tokens + WINDOW)
    wanted = {"B": batch, "H": HEADS, "G": KV_HEADS, "D": DIM, "T": tokens, "layout": layout}
    rows = [row for row in read_rows(RESULTS / "old_cards.jsonl") if wanted.items() <= row.items()]
    print(
        f"B={batch} H={HEADS}/{KV_HEADS} D={DIM}, {tokens} cold tokens, {layout}; microseconds, triton {triton.__version__}"
    )
    print(f"{'':11} {'bytes':>8} {'predicted':>9} {'measured':>9} {'dense':>8} ratio  issue slots, kernels")
    for name, old in [(name, CARDS[name].capability < 80) for name in CARDS] + [("H200", True)]:
        card = CARDS[name]
        [found] = predict(card, [(shape, layout)], old)
        path = "sm_75" if old else "tl.dot"
        seen = [row["p50_us"] for row in rows if (card_of(row["gpu"]), row["path"]) == (name, path)]
        kernels = "  ".join(f"{kernel} {time:.1f}" for kernel, time in found.kernels.items())
        label = name + (" (old)" if old and card.capability >= 80 else "")
        dense = 4 * batch * KV_HEADS * tokens * DIM / card.bytes_per_second * 1e6
        print(
            f"{label:11} {found.read:8.1f} {found.total:9.1f} {format(seen[-1], '.1f') if seen else '-':>9} "
            f"{dense:8.1f} {dense / found.total:4.2f}x  {found.issue:4.0%}  {kernels}",
            flush=True,
        )


def every_row() -> int:
    """1 if issue 5's limit is broken."""
    compared = comparisons(read_rows(RESULTS / "old_cards.jsonl") + read_rows(RESULTS / "attention.jsonl"))
    if not compared:
        print("no row yet: python -m perf.old_cards --json and python -m perf.attention --json on a CUDA card")
        return 0
    for c in compared:
        where = f"{card_of(c.row['gpu'])} B={c.row['B']} T={c.row['T']} {c.row['layout']} {c.row.get('path', '')} {c.what}"
        print(f"{where:60} measured {c.measured:7.1f}  predicted {c.predicted:7.1f}  {c.ratio:5.2f}")
    ratios = [c.ratio for c in compared]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"predicted / measured: {min(ratios):.2f} to {max(ratios):.2f}, geometric mean {mean:.2f}, {len(ratios)} times")
    return int(any(not c.trusted for c in issue_5(compared)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", default="balanced", choices=LAYOUTS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--measured", action="store_true", help="beside every measured row instead")
    arguments = parser.parse_args()
    if arguments.measured:
        return every_row()
    every_card(arguments.batch, arguments.tokens, arguments.layout)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
