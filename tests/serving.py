"""Tokens of a small model through vLLM's engines, against those of its own backend.

    python -m tests.serving              against FLASH_ATTN, or on a CPU CPU_ATTN
    python -m tests.serving --tp 2       on two cards, against one

Preset exact, and a codec of 8 bits that loses next to nothing; prompts that begin alike, more at
once than the pool has pages for, so that some are preempted. Engines run as perf.serve has them;
its other options are taken too.   Test: tests/test_serve.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any

import torch

from perf import _cases, serve
from perf._timing import Row
from spectral_kernels.codec import ModelCodec
from spectral_kernels.layout import Bands, PageLayout

PROMPTS = (60, 190, 9, 700, 1, 1530, 890, 560)  # tokens of each
BLOCKS = 44  # of the pool: too few for all of them at once


def eight_bit_codec(
    layers: int, kv_heads: int, dim: int, freqs: torch.Tensor, largest: float
) -> ModelCodec:
    """Every dimension of K and V in 255 steps from -largest to largest: nearly lossless."""
    bands, mean = Bands.parse(f"{dim}x8"), torch.zeros(1, kv_heads, dim)
    eye = torch.eye(dim, dtype=torch.float64).expand(kv_heads, -1, -1)
    side = eye, torch.full((dim,), largest / 127)
    codec = _cases.codec_of(PageLayout(bands, bands, dim), freqs, mean, side, side)
    codecs = tuple(deepcopy(codec) for _ in range(layers))
    return ModelCodec(codecs, sinks=4, window=16, preset="8 bits")


def make_model(folder: Path) -> list[str]:
    """A model with random weights (vLLM's give dull tokens) and its codec: perf.serve's options."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = serve.make_config("check")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    dim, codec = config.head_dim, folder.with_suffix(".safetensors")
    sizes = (config.num_hidden_layers, config.num_key_value_heads, dim, _cases.frequencies(dim))
    eight_bit_codec(*sizes, largest=12.0).save(codec)
    return ["--model", str(folder), "--codec", str(codec)]


def tokens_of(served: serve.Served) -> Row:
    """Tokens of a few prompts at once, twice: the second time some of their pages are known, and of
    three the first time, from the step that computes them; by how many nats each is likelier than
    the next; requests that were preempted."""
    given = [serve.prompt(i, n, served.vocabulary) for i, n in enumerate(PROMPTS)]
    for prompt in given[5:]:
        prompt["prompt_token_ids"][:500] = given[3]["prompt_token_ids"][:500]
    sampling = served.sampling(max_tokens=32, logprobs=2)
    runs = [served.llm.generate(given, sampling, use_tqdm=False) for _ in range(2)]
    completions = [[x.outputs[0] for x in run] for run in runs]

    def lead(likely: Any) -> float:
        best, second = sorted((x.logprob for x in likely.values()), reverse=True)[:2]
        return best - second

    preempted = {x.name: x for x in served.llm.get_metrics()}["vllm:num_preemptions"]
    return {
        "preempted": int(preempted.value),
        "tokens": [[list(x.token_ids) for x in run] for run in completions],
        "leads": [[lead(y) for y in x.logprobs or []] for x in completions[0]],
    }


def run_one(args: argparse.Namespace, backend: str, folder: Path) -> None:
    if backend == args.backends[0]:
        args.tp = 1  # what others are compared with
    more = {"num_gpu_blocks_override": BLOCKS, "disable_log_stats": False}
    served = serve.Served(args, backend, folder, **more)
    row = {**served.row, **tokens_of(served)}
    serve.file_of(folder, backend, ".jsonl").write_text(json.dumps(row) + "\n")


def report(rows: list[Row]) -> int:
    """By backend and run: how many tokens are the reference's up to the first that differs, of each
    prompt, and the largest lead of a token that was missed. Arithmetic in 16 bits decides leads
    below four units of logits between 8 and 16. A check without preemption fails."""
    worst = 0.0
    for row in rows:
        for turn, got in enumerate(row["tokens"]):
            pairs = zip(got, rows[0]["tokens"][0], strict=True)
            same = [sum(takewhile(bool, map(eq, x, y))) for x, y in pairs]
            leads = zip(rows[0]["leads"], same, strict=True)
            lost = max((x[i] for x, i in leads if i < len(x)), default=0.0)
            worst = max(worst, lost * (row["kv_dtype"] != "8 bits"))
            name = f"{row['backend']} {row['kv_dtype']}"
            print(f"{name:24} run {turn}: same tokens {same}, largest lead missed {lost:.3f}")
        print(f"{row['preempted']} preempted")
    ran = len(rows) == 3 and all(row["preempted"] for row in rows)
    return 0 if ran and worst < 4 * 2**-4 else 1


def main(argv: Sequence[str] | None = None) -> int:
    reference = "FLASH_ATTN" if torch.cuda.is_available() else "CPU_ATTN"
    fixed = ["--cells", f"{len(PROMPTS)}x2048", "--no-full", "--seqs", str(len(PROMPTS))]
    fixed += ["--chunk", "256", "--utilization", "0.1", "--kv-gb", "1", "--backends", reference]
    fixed += ["SPECTRAL:exact", "SPECTRAL:8 bits", *(sys.argv[1:] if argv is None else argv)]
    args = serve.parse(fixed)
    if args.one:
        run_one(args, args.one[0], Path(args.one[1]))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        fixed += make_model(Path(temporary) / "model")
        return report(serve.run_all(args, fixed, Path(temporary), module="tests.serving"))


if __name__ == "__main__":
    raise SystemExit(main())
