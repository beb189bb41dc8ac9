"""Time what storing tokens takes: a prompt's encoding, a decode step's append, decoding, moments.

    python -m perf.compress [--tokens 32768] [--json]

Encode, decode and gram of one row of T tokens, append of one token; 8 KV heads, D = 128, preset
balanced; device times with a cold L2, each checked first (perf/kernels.py). What it adds to a whole
model's prompt: perf.end_to_end --what prefill.

Row: gpu commit torch triton date read_gbs T encode_us (K and V) append_us decode_us gram_us
encode_share (of the read bandwidth).   Test: tests/test_perf.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from perf import kernels
from perf._timing import Card, Row, begin, common_arguments, rounded, write_row


def measure(tokens: int, card: Card) -> Row:
    chosen = {
        name: partial(build, **({"batch": 1} if name == "append" else {"tokens": tokens}))
        for name, build in kernels.KERNELS.items()
        if name.split()[0] in ("encode", "append", "decode", "gram")
    }
    rows, failed = kernels.table(chosen, card)
    if failed:
        raise AssertionError(f"{failed} of {len(chosen)} kernels failed")
    found: Row = {"T": tokens}
    for row in rows:
        name = f"{row['kernel'].split()[0]}_us"
        found[name] = found.get(name, 0.0) + row["device_us_p50"]
    moved = sum(row["bytes"] for row in rows if row["kernel"].startswith("encode"))
    return found | {"encode_share": moved / found["encode_us"] * 1e6 / card.read_bandwidth}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.compress", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tokens", type=int, default=32768, help="of the row, a multiple of 64")
    common_arguments(parser, "compress.jsonl")
    args = parser.parse_args(argv)
    if args.tokens < 512 or args.tokens % 64:
        parser.error("--tokens: expected a multiple of 64 from 512 on")
    card, same = begin(args.commit)
    write_row(rounded({**same, **measure(args.tokens, card)}), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
