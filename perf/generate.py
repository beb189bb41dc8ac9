"""Generate text through the spectral cache, alone or beside the dense model.

    python -m perf.generate --compare        the embedded model recalls a fact from a long text
    python -m perf.generate --model Qwen/Qwen2.5-0.5B --prompt-file notes.txt --preset quality

Prints the text and, with --compare, the dense model's: how many tokens are the same, the bytes of
both caches, prompt and new tokens a second. On a GPU each first runs unmeasured for two tokens: no
kernel is compiled and no graph captured on the clock. The embedded model ships its codecs; another
model is calibrated once, or --codec names the file.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import quantization_config

from perf._timing import Clock, usual_dtype
from perf.tiny_model.recall import make_recall_prompts
from spectral_kernels.hf import CACHE, PRESETS, ModelCache, enable

TINY_MODEL = Path(__file__).parent / "tiny_model"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Run:
    tokens: list[int]  # new ones
    text: str
    cache_bytes: int  # of all keys and values at the end; of a ModelCache all that is allocated
    prompt_rate: float  # prompt tokens a second, up to the first new token
    rate: float  # new tokens a second, the first not counted; NaN if there was no second one


def load(
    model: str | None = None, *, gguf: str | None = None, device: Any = None, dtype: Any = None
) -> tuple[Any, Any]:
    """(a causal language model, its tokenizer): path or id, by default the embedded one; or path of
    a GGUF file, whose weights are dequantised. By default on a GPU if there is one, in its usual
    dtype. OSError, ImportError: there is no such file, or no package gguf."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source, options = model or str(TINY_MODEL), dict[str, Any]()
    if gguf is not None:
        path = Path(gguf).expanduser()
        path.stat()  # or transformers would ask the hub for a file that is not there
        source, options = str(path.parent), {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if gguf is not None and hasattr(quantization_config, "GgufConfig"):
        # Newer releases keep the weights quantised unless told otherwise.
        options["quantization_config"] = quantization_config.GgufConfig(dequantize=True)
    options["dtype"] = DTYPES[dtype] if dtype else usual_dtype(device)
    network: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    return network.to(device).eval(), tokenizer


def generate(
    model: Any, tokenizer: Any, input_ids: torch.Tensor, *, label: str, max_new_tokens: int,
    cache: ModelCache | None = None,
) -> Run:  # fmt: skip
    """Continue one prompt [1, T] greedily; cache: an empty one, default what generate makes."""
    watch = Clock(label, max_new_tokens)
    out = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=max_new_tokens,
        do_sample=False, return_dict_in_generate=True, streamer=watch,
        **({} if cache is None else {CACHE: cache}),
    )  # fmt: skip
    tokens, held = out.sequences[0, input_ids.shape[1] :].tolist(), out[CACHE]
    if isinstance(held, ModelCache):
        nbytes = held.nbytes
    else:
        nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in held.layers)
    steps = watch.steps_ms
    rate = 1e3 * len(steps) / sum(steps) if steps else float("nan")
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Run(tokens, text, nbytes, input_ids.shape[1] / watch.prefill_s, rate)


def report(runs: dict[str, Run]) -> str:
    """What the main job prints after the texts: a column a run, the dense one first."""
    rows = {
        "": runs,
        "cache, MB": [f"{run.cache_bytes / 1e6:.3f}" for run in runs.values()],
        "prompt tokens/s": [f"{run.prompt_rate:.1f}" for run in runs.values()],
        "new tokens/s": [f"{run.rate:.1f}" for run in runs.values()],
    }
    text = "".join(f"{x:<16}" + "".join(f"{y:>12}" for y in ys) + "\n" for x, ys in rows.items())
    if len(runs) == 1:
        return text
    dense, ours = runs.values()
    same = [a == b for a, b in zip_longest(dense.tokens, ours.tokens)]
    where = "no difference"
    if False in same:
        where = f"first difference at new token {same.index(False) + 1}"
    text += f"same tokens     {sum(same)} of {len(same)} ({sum(same) / len(same):.1%}), {where}\n"
    return f"{text}dense cache is  {dense.cache_bytes / ours.cache_bytes:.2f} times as large"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m perf.generate", description=__doc__.split("\n")[0])
    add, source = parser.add_argument, parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="path or id of a causal language model (default: embedded)")
    source.add_argument("--gguf", help="GGUF file of such a model")
    add("--codec", type=Path, help="the model's (default: the known one, else it is calibrated)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", help="default of the embedded model: 3,000 tokens and a question")
    text.add_argument("--prompt-file", type=Path, help="file with the prompt, UTF-8")
    add("--preset", choices=list(PRESETS), default="balanced")
    add("--max-new-tokens", type=int, default=32)
    add("--compare", action="store_true", help="run the dense model beside it")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--dtype", choices=list(DTYPES), help="default: float32 on a CPU, 16 bits on a GPU")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        parser.error("--max-new-tokens must be at least 1")
    expected, codec, embedded = None, args.codec, args.model is None and args.gguf is None
    try:
        prompt = args.prompt_file.read_text(encoding="utf-8") if args.prompt_file else args.prompt
        if prompt is None and not embedded:
            parser.error("with --model or --gguf, --prompt or --prompt-file is needed")
        if prompt is None:
            ((prompt, expected),) = make_recall_prompts(1, distance=(2000, 3000), seed=0)
        model, tokenizer = load(args.model, gguf=args.gguf, device=args.device, dtype=args.dtype)
        input_ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        if input_ids.shape[1] == 0:
            parser.error("the prompt is empty")
        if codec is None and embedded:
            codec = TINY_MODEL / f"codec-{args.preset}.safetensors"
        handle = enable(model, args.preset, codec=codec, tokenizer=tokenizer)
    except (OSError, ImportError, TypeError, ValueError, NotImplementedError) as error:
        parser.error(str(error))  # an unknown file or id, a missing package, an unfit model

    def run(label: str, cache: ModelCache | None = None) -> Run:
        given: Any = (model, tokenizer, input_ids)
        if model.device.type == "cuda":  # compiles kernels, and captures the step of this cache
            generate(*given, label=f"{label}, warm-up", max_new_tokens=2, cache=cache)
            if cache is not None:
                cache.reset()
        return generate(*given, label=label, max_new_tokens=args.max_new_tokens, cache=cache)

    with handle:
        spectral = run(args.preset, handle.new_cache(1, input_ids.shape[1] + args.max_new_tokens))
    runs = ({"dense": run("dense")} if args.compare else {}) | {args.preset: spectral}
    print(f"\nprompt ({input_ids.shape[1]} tokens): ...{tokenizer.decode(input_ids[0, -40:])}")
    for label, found in reversed(runs.items()):
        print(f"\n{label}: {found.text}")
    if expected is not None:
        print(f"\nexpected first: {expected}")
    print(f"\n{report(runs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
