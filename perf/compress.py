"""Time what storing tokens takes: a prompt's encoding, a decode step's append, decoding.

    python -m perf.compress [--tokens 32768] [--json]

Encode and decode of one row of T tokens, append of one token; 8 KV heads, D = 128, preset balanced;
checked first (perf/kernels.py). What it adds to a model's prompt: perf.end_to_end --what prefill.

Row: gpu commit torch triton date read_gbs T encode_us (K and V) append_us decode_us encode_share
(of the read bandwidth).   Test: tests/test_perf.py.
"""

import sys
from collections.abc import Sequence

from perf._timing import Row, begin, parser_of, record
from perf.kernels import append, decode, encode, measured


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("compress", __doc__)
    parser.add_argument("--tokens", type=int, default=32768, help="of the row, a multiple of 64")
    args = parser.parse_args(argv)
    if args.tokens < 512 or args.tokens % 64:
        parser.error("--tokens: expected a multiple of 64 from 512 on")
    card, same = begin(args.commit)
    row: Row = {"T": args.tokens}
    for name, kernels in {
        "encode": [encode(card, side, args.tokens) for side in "kv"],
        "append": [append(card, batch=1)],
        "decode": [decode(card, side, args.tokens) for side in "kv"],
    }.items():
        found = [measured(kernel, card) for kernel in kernels]
        row[f"{name}_us"] = us = sum(x["device_us_p50"] for x in found)
        if name == "encode":
            row["encode_share"] = sum(x["bytes"] for x in found) / us * 1e6 / card.read_bandwidth
    record(row, same, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
