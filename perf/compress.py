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

from perf._timing import Card, Row, begin, common_arguments, say, write_row
from perf.kernels import KERNELS, measured


def measure(tokens: int, card: Card) -> Row:
    """What a row says."""
    found: Row = {"T": tokens}
    moved = 0
    for name, build in KERNELS.items():
        stem = name.split()[0]
        if stem in ("encode", "append", "decode", "gram"):
            kernel = partial(build, **({"batch": 1} if stem == "append" else {"tokens": tokens}))(
                card
            )
            kernel.check()
            row = measured(kernel, card)
            say(f"{name:10} {row['device_us_p50']:9.1f} us {row['share']:5.0%}  {kernel.shape}")
            found[f"{stem}_us"] = found.get(f"{stem}_us", 0.0) + row["device_us_p50"]
            moved += row["bytes"] * (stem == "encode")
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
    write_row({**same, **measure(args.tokens, card)}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
