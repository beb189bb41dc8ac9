"""The path of cards before sm_80 on the card at hand, beside its own path and dense attention, in one run.

    python -m perf.old_cards [--quick] [--json]         five shapes (--quick: B = 4, T = 32K); rows: perf/results

Every shape is checked before it is timed: `attend_spectral` over T cold tokens against float64 within its budget
(perf/_cases.py), and the same output with heads exchanged must not pass. Peers (perf/attention.py) read T 16-bit tokens.
Times are those of perf/_timing.py: CUDA graphs, inputs not in the L2 cache; kernels alone by the profiler.

Row: gpu commit torch triton date B H G D T layout chunk align path ("sm_75" or "tl.dot") p20_us p50_us p80_us
kernels {name: microseconds} best_peer best_peer_us speedup read_share read_gbs budget_share peers.
`python -m perf.predict --measured` sets its prediction beside them.   Test: tests/test_perf.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import spectral_kernels as sk
from perf._cases import LAYOUTS, WINDOW, Decode, Shape, check_state, make_decodes, preset_layout
from perf._timing import Card, NoCard, device_times, kernel_times, versions
from perf.attention import PEERS, best, ratio, split_heads, time_peers
from perf.tables import RESULTS
from spectral_kernels import _launch

SHAPES = ((4, 32768), (1, 32768), (16, 32768), (1, 65536), (16, 65536))  # B, T; the first is issue 5's


def attend(decode: Decode, matrix: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return sk.attend_spectral(decode.q, decode.positions, decode.pages, decode.rope, matrix_units=matrix)


def check(decode: Decode, matrix: bool) -> float:
    """The largest error in units of its budget; AssertionError where it is above 1, or where exchanged heads pass too."""
    o, lse = attend(decode, matrix)
    share = check_state(decode, (o, lse), ("cold",))
    try:
        check_state(decode, (o.roll(1, 1), lse), ("cold",))
    except AssertionError:
        return share
    raise AssertionError("the budget accepts heads that are exchanged")


def measure(shape: Shape, layout: str, card: Card) -> list[dict[str, Any]]:
    """A row a path. shape: of the dense peers; as many tokens are cold, exact ones are not attended to."""
    peers = time_peers(shape, [peer for peer in PEERS if not peer.fp8 and peer.name != "flex"], card)
    peer, peer_us = best(peers, False)
    pages = preset_layout(layout, shape.dim)
    own = Shape(shape.batch, shape.heads, shape.kv_heads, shape.dim, shape.tokens + WINDOW)
    nbytes = own.page_bytes(pages)
    decodes = make_decodes(own, pages, copies=card.copies(nbytes), dtype=card.dtype, device=card.device)
    timed = []
    for path, matrix in (("sm_75", False), ("tl.dot", True)):
        if matrix and not _launch.has_matrix_units(card.device):
            continue
        share = check(decodes[0], matrix)
        calls = [partial(attend, decode, matrix) for decode in decodes]
        timed.append((path, share, calls, device_times(calls)))
    rows = []
    for path, share, calls, times in timed:
        kernels = kernel_times(calls)
        numbers = {
            "p20_us": times.p20,
            "p50_us": times.p50,
            "p80_us": times.p80,
            "best_peer_us": peer_us,
            "speedup": ratio(peer_us, times.p50),
            "read_share": nbytes / times.p50 * 1e6 / card.read_bandwidth,
            "read_gbs": card.read_bandwidth / 1e9,
            "budget_share": share,
        }
        where = {"B": shape.batch, "H": shape.heads, "G": shape.kv_heads, "D": shape.dim, "T": shape.tokens}
        rows.append(
            {
                **where,
                "layout": layout,
                "chunk": pages.chunk,
                "align": pages.align,
                "path": path,
                **{name: None if x is None else float(f"{x:.4g}") for name, x in numbers.items()},
                "kernels": {name: float(f"{time:.4g}") for name, time in kernels.items()},
                "best_peer": peer,
                "peers": {name: t if isinstance(t, str) else float(f"{t:.4g}") for name, t in peers.items()},
            }
        )
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    peer = "no peer" if row["best_peer"] is None else f"{row['speedup']:4.2f}x of {row['best_peer_us']} {row['best_peer']}"
    kernels = ", ".join(f"{name} {time}" for name, time in sorted(row["kernels"].items(), key=lambda part: -part[1]))
    return (
        f"B={row['B']:<2} T={row['T']} {row['path']:6} {row['p20_us']:7.1f} {row['p50_us']:7.1f} {row['p80_us']:7.1f} us  "
        f"{row['read_share']:4.0%} of reads  {peer}  {row['budget_share']:.2g} of the budget  ({kernels})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--heads", default="32/8", help="query heads/KV heads (default 32/8)")
    parser.add_argument("--dim", type=int, default=128, help="head dimension D")
    parser.add_argument("--layout", choices=LAYOUTS, default="balanced")
    results = RESULTS / "old_cards.jsonl"
    parser.add_argument("--json", type=Path, nargs="?", const=results, help=f"append rows (default file: {results})")
    parser.add_argument("--commit", help="what rows say is measured; default: git's word")
    args = parser.parse_args(argv)
    try:
        card = Card.current()
    except NoCard as error:
        print(f"perf.old_cards: {error}", file=sys.stderr)
        return 2
    same = {
        "gpu": card.name,
        **versions(args.commit),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
    }
    pages = preset_layout(args.layout, args.dim)
    print(f"{card.name}, commit {same['commit']}, {card.dtype}; {args.layout} {pages.k} / {pages.v}, {pages.token_bytes} B")
    print(f"reads: {card.read_bandwidth / 1e12:.2f} TB/s; torch {same['torch']}, triton {same['triton']}", flush=True)
    for batch, tokens in SHAPES[: 1 if args.quick else None]:
        for row in measure(Shape(batch, *split_heads(args.heads), args.dim, tokens), args.layout, card):
            print(line(row), flush=True)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                with args.json.open("a") as file:
                    file.write(json.dumps({**same, **row}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
