"""Compile what perf.serve's engine needs into Triton's cache: a process for each part of the work
and each layout, side by side, where an engine compiles one after another.

    python -m perf._serve_kernels SPEC.json NUMBER

SPEC: codec (a file), heads, ranks that share them, width (columns of vLLM's block table), seqs
(requests at most).
Kernels are compiled for which strides and addresses are multiples of 16: these are as vLLM's pages,
block table and projections have them. What does not match is compiled by the engine, later.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from perf.serve import PARTS
from spectral_kernels.attention import attend_spectral
from spectral_kernels.codec import ModelCodec
from spectral_kernels.compress import append, decode, encode
from spectral_kernels.layout import PAGE_SIZE
from spectral_kernels.merge import merge_states

BATCHES = (1, 2, 9, 33, 1025)  # decodes of 1, of 2 to 8, ..; part 4: a short chunk; 5: a prompt


def main(spec: dict[str, Any], number: int) -> None:
    model = ModelCodec.load(spec["codec"])
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where it only shows that it runs
    codec = list({x.layout: x for x in model.layers}.values())[number // PARTS]
    codec = codec.of_heads(0, codec.kv_heads // spec["ranks"]).to(device)
    part, heads, groups = number % PARTS, spec["heads"] // spec["ranks"], codec.kv_heads
    dim = codec.layout.head_dim
    u8: Any = {"dtype": torch.uint8, "device": device}
    i32: Any = {"dtype": torch.int32, "device": device}
    bf16: Any = {"dtype": torch.bfloat16, "device": device}
    at = PAGE_SIZE * codec.layout.k.bytes
    cache = torch.zeros((9, groups, PAGE_SIZE * codec.layout.token_bytes), **u8)
    pages = cache[..., :at], cache[..., at:]
    shape = (spec["seqs"] + 1, groups, model.sinks + model.window, dim)
    exact = torch.zeros(shape, **bf16), torch.zeros(shape, **bf16)

    def rows(count: int) -> tuple[torch.Tensor, ...]:
        """Block table, lengths, slots."""
        table = torch.zeros((count, spec["width"]), **i32)[:, : spec["width"] - 1]
        return table, torch.full((count,), 65, **i32), torch.arange(count, **i32)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int) -> None:
        table, lens, ids = rows(count)
        append(k, v, codec, *pages, *exact, table, lens, sinks=model.sinks, seq_ids=ids)
        attend_spectral(
            q, *pages, codec, table, lens, sinks=model.sinks, window=model.window, exact=exact,
            seq_ids=ids, scale=dim**-0.5, out=torch.empty(q.shape, **bf16), after_append=True,
        )  # fmt: skip

    def new(count: int) -> tuple[torch.Tensor, ...]:
        """q, k, v [N, .., D], views of one projection."""
        projected = torch.zeros((count, (heads + 2 * groups) * dim), **bf16)
        parts = projected.split([heads * dim, groups * dim, groups * dim], 1)
        q, k, v = (x.unflatten(1, (-1, dim)) for x in parts)
        return q.contiguous(), k.contiguous(), v  # RoPE has written q and k

    if part < 4:
        for count in range(*BATCHES[part : part + 2]):
            if count <= spec["seqs"]:
                q, k, v = new(count)
                step(q, k[:, :, None], v[:, :, None], count)
    elif part == 4:
        from spectral_kernels.vllm import QUERIES  # slow: it imports vLLM

        q, k, v = (x.transpose(0, 1)[None] for x in new(QUERIES))
        step(q, k, v, 1)
    else:
        _, *kv = new(65)
        table, lens, ids = rows(1)
        for side, x, data, kept in zip("kv", kv, pages, exact, strict=True):
            encode(
                x.transpose(0, 1)[None], codec, data, table, lens, side=side, exact=kept,
                sinks=model.sinks, seq_ids=ids,
            )  # fmt: skip
            old = decode(data, codec, table[:, :2].clone(), lens, side=side, first_page=0 * lens)
        o, lse = old[0].to(torch.bfloat16), torch.zeros(old.shape[1:3], device=device)
        merge_states(o, lse, o, lse)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]))
