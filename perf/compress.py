"""Time what storing tokens takes: a prompt's encoding beside the prefill itself, a decode step's
append, decoding, moments.

    python -m perf.compress [--tokens 32768] [--layers 4] [--json]

Encode, decode and gram of one row of T tokens, append of one token a row; 8 KV heads, D = 128,
preset balanced; device times with a cold L2, each checked first (perf/kernels.py). The prefill is a
model of a few layers in the shape of Llama-3-8B with random weights, in turns with and without the
cache (perf/end_to_end.py, --what prefill: whole models).

Row: gpu commit torch triton T layers encode_us (K and V) append_us decode_us gram_us encode_share
(of the read bandwidth) prefill_s prefill_ratio.   Test: tests/test_perf.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from perf import kernels
from perf._timing import Card, Row, begin, common_arguments, rounded, write_row


def measure(tokens: int, layers: int, card: Card) -> Row:
    builders: dict[str, Callable[[Card], kernels.Kernel]] = {
        "encode k": partial(kernels.encode, side="k", tokens=tokens),
        "encode v": partial(kernels.encode, side="v", tokens=tokens),
        "append": partial(kernels.append, batch=1),
        "decode k": partial(kernels.decode, side="k", tokens=tokens),
        "decode v": partial(kernels.decode, side="v", tokens=tokens),
        "gram": partial(kernels.gram, tokens=tokens),
    }
    rows, failed = kernels.table(builders, card)
    if failed:
        raise AssertionError(f"{failed} of {len(builders)} kernels failed")
    found: Row = {"T": tokens, "layers": layers}
    for name in ("encode", "append", "decode", "gram"):
        found[f"{name}_us"] = sum(
            row["device_us_p50"] for row in rows if row["kernel"].split()[0] == name
        )
    moved = sum(row["bytes"] for row in rows if row["kernel"].startswith("encode"))
    found["encode_share"] = moved / found["encode_us"] * 1e6 / card.read_bandwidth
    return found | prefill(tokens, layers, card)


@torch.no_grad()
def prefill(tokens: int, layers: int, card: Card) -> Row:
    """Seconds of the prompt with the cache, and how many times those without; needs
    transformers."""
    from perf import end_to_end

    model = end_to_end.make_model("8b", card.device, card.dtype, layers)
    cell = end_to_end.Cell(model, 1, tokens, 8, card)
    _, ours = end_to_end.prefill(cell, ["balanced"], rounds=5)
    return {name: ours[name] for name in ("prefill_s", "prefill_ratio")}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.compress", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tokens", type=int, default=32768, help="of the row, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model (default 4)")
    common_arguments(parser, "compress.jsonl")
    args = parser.parse_args(argv)
    if args.tokens < 512 or args.tokens % 64 or args.layers < 1:
        parser.error("--tokens: expected a multiple of 64 from 512 on; --layers: at least 1")
    card, same = begin(args.commit)
    row = rounded({**same, **measure(args.tokens, args.layers, card)})
    print(f"prefill {row['prefill_s']:.3f} s, {row['prefill_ratio']:.3f} of that without the cache")
    write_row(row, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
