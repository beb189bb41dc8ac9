"""What fits: the bytes of a model's cache by context length, from its configuration alone.

    python -m spectral_kernels --model PATH_OR_ID [--gpu-memory 16GB] [--batch 1]
    python -m spectral_kernels --model PATH_OR_ID --calibrate [arguments of calibrate.py]

Nothing is loaded but the configuration. Columns: 16-bit keys and values, fp8, and each preset, with
its exact tokens, and the windows of layers that are not ours. Not counted: activations of a prompt,
states of linear attention and convolutions.
Test: tests/test_main.py.
"""

from __future__ import annotations

import argparse
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

CONTEXTS = [2**n for n in range(12, 21)]  # 4K .. 1M tokens a row


def parse_bytes(text: str) -> int:
    """Bytes of "16GB" (10**9), "16GiB" (2**30), "16G" or a plain number."""
    found = re.fullmatch(r"(\d*\.?\d+)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a size like 16GB, got {text!r}")
    number, unit, binary = found.groups()
    power = " KMGT".index(unit.upper() or " ")
    return int(float(number) * (1024 if binary else 1000) ** power)


def show_bytes(count: float) -> str:
    """Three significant digits: "1.53 GB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def cache_sizes(config: Any) -> Mapping[str, Callable[[int], float]]:
    """By kind of cache: bytes of a row of so many tokens, by the text config of a model.

    Raises:
        ValueError, NotImplementedError: the adapter does not serve such a model.
    """
    from ._checks import check_in
    from ._model import full_layers, kv_shape, own_layers
    from .calibrate import PRESETS
    from .hf import DRAFTS
    from .layout import HEAD_DIMS

    full, (heads, dim) = len(full_layers(config)), kv_shape(config)
    check_in("head_dim", dim, HEAD_DIMS)
    layers, token = own_layers(config), 2 * heads * dim  # numbers a token and layer
    windows = [w for w in (getattr(layer, "sliding_window", None) for layer in layers) if w]

    def size(coded: float, beside: int, exact: int, tokens: int) -> float:
        """coded, beside: bytes a number of ours and in windows; exact: tokens in 16 bits."""
        kept = sum(min(window, tokens) for window in windows)
        return token * (full * (coded * tokens + 2 * exact) + beside * kept)

    dense = {"dense": partial(size, 2, 2, 0), "fp8": partial(size, 1, 1, 0)}
    exact = {name: x.sinks + x.window + DRAFTS for name, x in PRESETS.items()}
    return dense | {n: partial(size, 2 / x.ratio, 2, exact[n]) for n, x in PRESETS.items()}


def weight_bytes(config: Any) -> int:
    """Of a model of this config, in its dtype (bf16 if it names none); made without memory."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(config, "dtype", None) or torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(x.numel() for x in {id(x): x for x in model.parameters()}.values()) * dtype.itemsize


def fits(size: Callable[[int], float], room: float) -> int:
    """The most tokens of a row whose cache fits, a multiple of 64."""
    return 64 * bisect_right(range(1, 2**24 + 1), room, key=lambda n: size(64 * n))


def report(config: Any, memory: int | None, batch: int) -> None:
    """Print the table."""
    text = config.get_text_config(decoder=True)
    sizes = cache_sizes(text)
    longest = getattr(text, "max_position_embeddings", None) or CONTEXTS[-1]
    contexts = [tokens for tokens in CONTEXTS if tokens <= longest] or [longest]
    print(f"cache of {batch} row{'s' * (batch > 1)}; the model's context is {longest:,} tokens")
    print(f"{'tokens':>10}" + "".join(f" {name:>10}" for name in sizes))
    for tokens in contexts:
        cells = (show_bytes(batch * size(tokens)) for size in sizes.values())
        print(f"{tokens:>10,}" + "".join(f" {cell:>10}" for cell in cells))
    if memory is None:
        print("with --gpu-memory: how many tokens fit")
        return
    weights = weight_bytes(config)
    quantised = " unquantised" if getattr(config, "quantization_config", None) else ""
    held = f"{show_bytes(weights)} of{quantised} weights"
    print(f"{show_bytes(memory)} less {held} hold, tokens a row:")
    counts = [fits(size, (memory - weights) / batch) for size in sizes.values()]
    print(f"{'':>10}", *(f"{count:>10,}" for count in counts))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spectral_kernels")
    add = parser.add_argument
    add("--model", required=True, help="path or id of a model")
    add("--gpu-memory", type=parse_bytes, metavar="16GB", help="default: that of the GPU here")
    add("--batch", type=int, default=1, help="rows (default 1)")
    add("--calibrate", action="store_true", help="make the codecs of all presets, and keep them")
    args, more = parser.parse_known_args(argv)
    memory = args.gpu_memory
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    try:
        if args.calibrate:
            from . import calibrate

            presets = [] if "--preset" in more else ["--preset", *calibrate.PRESETS]
            return calibrate.main(["--model", args.model, *presets, *more])
        if more:
            raise ValueError(f"expected no other arguments, got {' '.join(more)}")
        if args.batch < 1:
            raise ValueError(f"--batch: expected at least 1, got {args.batch}")
        from transformers import AutoConfig

        report(AutoConfig.from_pretrained(args.model), memory, args.batch)
    except (OSError, ImportError, ValueError, NotImplementedError) as error:
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
