"""What the cold part of a decode step takes on cards that are not there, from machine code: `python -m perf.predict`.

    python -m perf.predict [--layout NAME] [--batch B] [--tokens T]     every card, D = 128, 32/8 heads
    python -m perf.predict --measured                                   beside every measured row of perf/results

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
from perf._cases import LAYOUTS, Shape, preset_layout
from perf._simulate import CARDS, Card, Estimate, Launch, estimate
from perf.tables import RESULTS, read_rows
from spectral_kernels import _launch, attention
from tests.compile_kernels import Launched, Recorder, stand_in

HEADS, KV_HEADS, DIM = 32, 8, 128
START = 1e-6  # seconds of a kernel before its first instruction and after its last: an empty kernel's on recent cards
GAP = 0.9e-6  # between launches of a graph: a step's time less its kernels', perf.attention's rows of the H200 (0.7 to 1.1)
TRUSTED = 0.3  # the error that issue 5 allows the forced path at B = 4, T = 32K, balanced
# Loads and stores that touch several lines of 128 bytes (_simulate): 8 rows of a basis that are 128 bytes long, 4 heads of a
# query, the records of 4 heads.
LINES = {"_project_operand_kernel": {("LDG", 4): 8, ("LDG", 2): 4, ("STG", 1): 4}}
COLUMNS = {  # kernels by the columns of perf.attention's rows
    "_project_kernel": "project_us",
    "_project_operand_kernel": "project_us",
    "_attend_spectral_kernel": "kernel_us",
    "_attend_operands_kernel": "kernel_us",
    "_finish_spectral_kernel": "merge_us",
}


def tiles(values: dict[str, Any], shape: Shape) -> int:
    """Of a program of a cold kernel."""
    each = -(-(-(-shape.cold // values["C"])) // values["splits"])
    return each * (values["C"] // 64)


def rounds(values: dict[str, Any], shape: Shape) -> int:
    """Of a program of `_project_kernel`: M rows at a time, each a block and a head."""
    return max(1, values["each"] * values["HG_PAD"] // values["M"])


TRIPS: dict[str, Callable[[dict[str, Any], Shape], int]] = {  # of the loop with matrix instructions; others run once
    "_attend_spectral_kernel": tiles,
    "_attend_operands_kernel": tiles,
    "_project_kernel": rounds,
}


def launches(card: Card, cases: Sequence[tuple[Shape, str]], old: bool) -> list[list[Launched]]:
    """What `attend_spectral` would launch on the card in each case (a shape and a layout's name)."""
    found: list[Launched] = []
    recorder = Recorder(card.capability, lambda launched, new: found.append(launched))
    dtype = torch.bfloat16 if stand_in(card.capability, recorder, old) else torch.float16
    _launch.multiprocessors = lambda device: card.multiprocessors
    splits = attention.count_splits
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
        count = min(chunks, splits(shape.batch * shape.kv_heads, chunks, torch.device("cuda")))
        sk.attend_spectral(q, torch.zeros(shape.batch, dtype=torch.int32), pages, rope, splits=count)
        out.append(found[:])
        found.clear()
    return out


def simulate(card: Card, launched: Launched, shape: Shape) -> Estimate:
    name, code = launched.row["kernel"], _sass.instructions(launched.kernel.asm["cubin"])
    loops = [loop for loop in _sass.loops(code) if any(i.operation in ("LDG", "LDGSTS", "IMMA") for i in loop)]
    streams: list[int] = []
    visits = [(loop, 1) for loop in loops]
    if name in TRIPS:
        hot = min((loop for loop in loops if any(i.operation == "IMMA" for i in loop)), key=len)
        visits = [(hot, TRIPS[name](launched.values, shape))]
        if TRIPS[name] is tiles:
            streams = [i.at for i in hot]
    launch = Launch(
        code, launched.programs, launched.row["warps"], launched.row["registers"], launched.row["shared_bytes"]
    )
    return estimate(card, launch, visits, streams, LINES.get(name, {}))


class Prediction(NamedTuple):
    """Seconds: of each kernel by its name, of all launches, of the pages' bytes, of dense fp16 attention at its bound."""

    kernels: dict[str, float]
    issue: float  # share of the issue slots that the cold kernel uses
    total: float
    bytes: float
    dense: float


def predict(card: Card, cases: Sequence[tuple[Shape, str]], old: bool) -> list[Prediction]:
    """For each case. old: by the path of cards before sm_80. Launchers launch nothing for the rest of the process."""
    out = []
    for (shape, name), launched in zip(cases, launches(card, cases, old), strict=True):
        kernels, issue = {}, 0.0
        for launch in launched:
            kernel = launch.row["kernel"]
            found = simulate(card, launch, shape)
            kernels[kernel] = found.seconds + START
            if TRIPS.get(kernel) is tiles:
                issue = found.issue
        total = sum(kernels.values()) + GAP * len(kernels)
        read = shape.page_bytes(preset_layout(name, shape.dim)) / card.bytes_per_second
        out.append(Prediction(kernels, issue, total, read, shape.dense_bytes / card.bytes_per_second))
    return out


def card_of(gpu: str) -> str | None:
    """The name in CARDS of a card as PyTorch names it."""
    return next((name for name in CARDS if name in gpu.replace("-", " ").split()), None)


def shape_of(row: dict[str, Any]) -> Shape:
    return Shape(row["B"], row["H"], row["G"], row["D"], row["T"])


def comparisons(rows: Iterable[dict[str, Any]], path: str | None = None) -> list[tuple[str, float, float]]:
    """What a row measured beside what is predicted, as (label, measured, predicted) in microseconds.

    rows: of perf.old_cards (path "sm_75" or "tl.dot": the whole of `attend_spectral`), or without `path` of perf.attention
    (each kernel alone, as its step has another launch). Rows of unknown cards, and of pages other than the layout's, are
    left out.
    """
    chosen: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name, pages = card_of(row["gpu"]), preset_layout(row["layout"], row["D"])
        if name and row.get("path") == path and (row["chunk"], row["align"]) == (pages.chunk, pages.align):
            chosen.setdefault(name, []).append(row)
    out = []
    for name, own in chosen.items():
        cases = [(shape_of(row), row["layout"]) for row in own]
        old = path == "sm_75" or CARDS[name].capability < 80
        for row, found in zip(own, predict(CARDS[name], cases, old), strict=True):
            label = f"{name} B={row['B']} T={row['T']} {row['layout']}"
            if path:
                out.append((f"{label} {path}", row["p50_us"], found.total * 1e6))
                seen = row["kernels"]
            else:
                seen = {kernel: row[COLUMNS[kernel]] for kernel in found.kernels}
            out += [(f"{label} {k}", seen[k], t * 1e6) for k, t in found.kernels.items() if seen.get(k)]
    return out


def untrusted(compared: Iterable[tuple[str, float, float]]) -> list[str]:
    """The labels of those whose prediction is off by more than TRUSTED."""
    return [label for label, measured, predicted in compared if not abs(predicted / measured - 1) <= TRUSTED]


def every_card(shape: Shape, layout: str) -> None:
    rows = read_rows(RESULTS / "old_cards.jsonl")
    print(f"{shape}, {layout}; microseconds, triton {triton.__version__}")
    print(f"{'':11} {'bytes':>8} {'predicted':>9} {'measured':>9} {'dense':>8} ratio  issue slots, kernels")
    paths = [(name, CARDS[name].capability < 80) for name in CARDS] + [("H200", True)]
    for name, old in paths:
        [found] = predict(CARDS[name], [(shape, layout)], old)
        seen = [
            row["p50_us"]
            for row in rows
            if (card_of(row["gpu"]), shape_of(row), row["layout"]) == (name, shape, layout)
            and row["path"] == ("sm_75" if old else "tl.dot")
        ]
        kernels = "  ".join(f"{kernel} {time * 1e6:.1f}" for kernel, time in found.kernels.items())
        label = name + (" (old)" if old and CARDS[name].capability >= 80 else "")
        print(
            f"{label:11} {found.bytes * 1e6:8.1f} {found.total * 1e6:9.1f} {format(seen[-1], '.1f') if seen else '-':>9} "
            f"{found.dense * 1e6:8.1f} {found.dense / found.total:4.2f}x  {found.issue:4.0%}  {kernels}",
            flush=True,
        )


def every_row() -> int:
    rows = read_rows(RESULTS / "old_cards.jsonl")
    compared = [*comparisons(rows, "sm_75"), *comparisons(rows, "tl.dot")]
    compared += comparisons(read_rows(RESULTS / "attention.jsonl"))
    if not compared:
        print("no row yet: python -m perf.old_cards --json and python -m perf.attention --json on a CUDA card")
    for label, measured, predicted in compared:
        print(f"{label:60} measured {measured:7.1f}  predicted {predicted:7.1f}  {predicted / measured:5.2f}")
    if compared:
        ratios = [predicted / measured for _, measured, predicted in compared]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"predicted / measured: {min(ratios):.2f} to {max(ratios):.2f}, geometric mean {mean:.2f}, {len(ratios)} times")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", default="balanced", choices=LAYOUTS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--measured", action="store_true", help="beside every measured row instead")
    arguments = parser.parse_args()
    if arguments.measured:
        return every_row()
    every_card(Shape(arguments.batch, HEADS, KV_HEADS, DIM, arguments.tokens), arguments.layout)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
