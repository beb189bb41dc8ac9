"""Generate text through the spectral cache, alone or beside the dense model.

    python -m perf.generate --compare        the embedded model recalls a fact from a long text
    python -m perf.generate --model Qwen/Qwen2.5-0.5B --prompt-file notes.txt --preset quality

Prints the text and, with --compare, the dense model's: how many tokens are the same, the bytes of
both caches, prompt and new tokens a second. The spectral prompt time includes the encoding. On a
GPU each model first runs unmeasured for two tokens, so that no kernel is compiled and no graph
captured on the clock. The embedded model ships its codecs; another model is calibrated once, or
--codec names the file.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from spectral_kernels.hf import CACHE, PRESETS, ModelCache, enable

TINY_MODEL = Path(__file__).parent / "tiny_model"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Run:
    """One generation.

    Attributes:
        tokens, text: the new tokens, and their text.
        cache_bytes: of all keys and values at the end; of a ModelCache all that is allocated.
        prompt_tokens, prompt_seconds: the prompt, up to the first new token.
        seconds: of the new tokens after the first.
    """

    tokens: list[int]
    text: str
    cache_bytes: int
    prompt_tokens: int
    prompt_seconds: float
    seconds: float

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prompt_seconds

    @property
    def rate(self) -> float:
        """New tokens a second, the first not counted; NaN if there was no second one."""
        return (len(self.tokens) - 1) / self.seconds if self.seconds > 0 else float("nan")


class _Watch(BaseStreamer):
    """The clock of one generation of one row, and its progress bars: generate calls `put` for the
    prompt and every token."""

    def __init__(self, model: Any, label: str, prompt_tokens: int, max_new_tokens: int) -> None:
        self.times: list[float] = []
        self.label, self.prompt_tokens, self.max_new_tokens = label, prompt_tokens, max_new_tokens
        self.bar = tqdm(total=prompt_tokens, desc=f"{label}: prompt", unit="tok")
        layers = model.get_decoder().layers
        self.layers, self.layers_done = len(layers), 0
        self.hooks = [layer.register_forward_hook(self._layer_done) for layer in layers]

    def _layer_done(self, *_: Any) -> None:
        """The whole prompt goes through layer after layer: each moves the bar by its share."""
        if len(self.times) == 1:
            self.layers_done += 1
            self.bar.update(self.prompt_tokens * self.layers_done // self.layers - self.bar.n)

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())  # `value` is on the CPU: the device has finished it
        if len(self.times) == 2:
            self.bar.close()
            self.bar = tqdm(total=self.max_new_tokens, desc=f"{self.label}: new", unit="tok")
        if len(self.times) > 1:
            self.bar.update(1)

    def end(self) -> None:
        pass

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.bar.close()


def load(
    model: str | None = None,
    *,
    gguf: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        model: path or id; by default the embedded model, perf/tiny_model.
        gguf: path of a GGUF file instead; its weights are dequantised (needs the package gguf).
        device: by default a GPU if there is one.
        dtype: "float32", "float16" or "bfloat16"; by default float32 on a CPU, bfloat16 on a GPU
            that has it, else float16.
    Returns:
        (model in evaluation mode, tokenizer)
    Raises:
        FileNotFoundError, ImportError: there is no such GGUF file, or no package gguf.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        half = (
            "bfloat16"
            if device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 0)
            else "float16"
        )
        dtype = half if device.startswith("cuda") else "float32"
    options: dict[str, Any] = {}
    source = model or str(TINY_MODEL)
    if gguf is not None:
        path = Path(gguf).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"gguf: no such file: {path}")
        try:
            import gguf as _  # noqa: F401
        except ImportError:
            raise ImportError(
                "gguf: reading GGUF files needs the package gguf: pip install gguf"
            ) from None
        source, options = str(path.parent), {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if gguf is not None:
        try:  # newer releases keep the weights quantised unless told otherwise
            from transformers.utils.quantization_config import GgufConfig

            options["quantization_config"] = GgufConfig(dequantize=True)
        except ImportError:
            pass
    network: Any = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype], **options)
    return network.to(device).eval(), tokenizer


def cache_bytes(cache: Any) -> int:
    """Bytes of all of a ModelCache, or of the keys and values in a DynamicCache."""
    if isinstance(cache, ModelCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def generate(
    model: Any,
    tokenizer: Any,
    input_ids: torch.Tensor,
    *,
    label: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    cache: ModelCache | None = None,
) -> Run:
    """Continue one prompt, watched.

    Args:
        input_ids: int64 [1, T], on the model's device.
        label: of the progress bars.
        temperature: 0 takes the likeliest token each time.
        cache: an empty one to fill; default what generate makes.
    """
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    torch.manual_seed(seed)
    watch = _Watch(model, label, input_ids.shape[1], max_new_tokens)
    try:
        out = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            streamer=watch,
            **({} if cache is None else {CACHE: cache}),
            **sampling,
        )
    finally:
        watch.close()
    tokens = out.sequences[0, input_ids.shape[1] :].tolist()
    start, first, *_, last = (*watch.times, watch.times[-1])
    return Run(
        tokens,
        tokenizer.decode(tokens, skip_special_tokens=True),
        cache_bytes(out[CACHE]),
        input_ids.shape[1],
        first - start,
        last - first,
    )


def agreement(a: Sequence[int], b: Sequence[int]) -> tuple[int, int, int | None]:
    """(tokens that are the same at the same place, places, first place that differs or None)."""
    places = max(len(a), len(b))
    same = [i < min(len(a), len(b)) and a[i] == b[i] for i in range(places)]
    return sum(same), places, same.index(False) if False in same else None


def report(spectral: Run, dense: Run | None, *, preset: str) -> str:
    """What the main job prints after the texts."""
    runs = {preset: spectral} if dense is None else {"dense": dense, preset: spectral}
    rows = [
        ("", list(runs)),
        ("cache, MB", [f"{run.cache_bytes / 1e6:.3f}" for run in runs.values()]),
        ("prompt tokens/s", [f"{run.prompt_rate:.1f}" for run in runs.values()]),
        ("new tokens/s", [f"{run.rate:.1f}" for run in runs.values()]),
    ]
    lines = [f"{name:<16}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows]
    if dense is not None:
        same, places, first = agreement(dense.tokens, spectral.tokens)
        where = "no difference" if first is None else f"first difference at new token {first + 1}"
        lines.append(f"same tokens     {same} of {places} ({100 * same / places:.1f} %), {where}")
        lines.append(
            f"dense cache is  {dense.cache_bytes / spectral.cache_bytes:.2f} times as large"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m perf.generate", description=__doc__.split("\n")[0]
    )
    add, source = parser.add_argument, parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="path or id of a causal language model (default: embedded)")
    source.add_argument("--gguf", help="GGUF file of such a model")
    add("--codec", type=Path, help="the model's (default: the known one, else it is calibrated)")
    text = parser.add_mutually_exclusive_group()
    default = "default, for the embedded model: a text of 3,000 tokens and a question about it"
    text.add_argument("--prompt", help=default)
    text.add_argument("--prompt-file", type=Path, help="file with the prompt, UTF-8")
    add("--prompt-tokens", type=int, help="keep only the first so many tokens of the prompt")
    add("--preset", choices=list(PRESETS), default="balanced")
    add("--max-new-tokens", type=int, default=32)
    add("--compare", action="store_true", help="run the dense model beside it")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    default = "default: float32 on a CPU, bfloat16 or float16 on a GPU"
    add("--dtype", choices=list(DTYPES), help=default)
    add("--temperature", type=float, default=0.0, help="of sampling (default 0: greedy)")
    add("--seed", type=int, default=0, help="of the default prompt and of sampling")
    args = parser.parse_args(argv)
    tokens = 1 if args.prompt_tokens is None else args.prompt_tokens
    if min(args.max_new_tokens, tokens) < 1 or args.temperature < 0:
        parser.error(
            "--max-new-tokens and --prompt-tokens must be at least 1, --temperature at least 0"
        )

    expected = None
    if args.prompt is not None:
        prompt = args.prompt
    elif args.prompt_file is not None:
        try:
            prompt = args.prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--prompt-file: {error}")
    elif args.model is None and args.gguf is None:
        from .tiny_model.recall import make_recall_prompts

        ((prompt, expected),) = make_recall_prompts(1, distance=(2000, 3000), seed=args.seed)
    else:
        parser.error("with --model or --gguf, --prompt or --prompt-file is needed")

    try:
        model, tokenizer = load(args.model, gguf=args.gguf, device=args.device, dtype=args.dtype)
    except (OSError, ImportError, ValueError) as error:  # an unknown id, a missing package
        parser.error(str(error))
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids[:, : args.prompt_tokens]
    input_ids = input_ids.to(model.device)
    if input_ids.shape[1] == 0:
        parser.error("the prompt is empty")
    settings: dict[str, Any] = {"temperature": args.temperature, "seed": args.seed}
    codec = args.codec
    if codec is None and args.model is None and args.gguf is None:
        codec = TINY_MODEL / f"codec-{args.preset}.safetensors"

    def run(label: str, cache: ModelCache | None = None) -> Run:
        options = {"cache": cache, **settings}
        if model.device.type == "cuda":  # compiles kernels, and captures the step of this cache
            generate(
                model, tokenizer, input_ids, label=f"{label}, warm-up", max_new_tokens=2, **options
            )
            if cache is not None:
                cache.reset()
        return generate(
            model, tokenizer, input_ids, label=label, max_new_tokens=args.max_new_tokens, **options
        )

    try:
        handle = enable(model, args.preset, codec=codec, tokenizer=tokenizer)
    except (OSError, TypeError, ValueError, NotImplementedError) as error:
        parser.error(str(error))
    with handle:
        spectral = run(args.preset, handle.new_cache(1, input_ids.shape[1] + args.max_new_tokens))
    dense = run("dense") if args.compare else None

    print(f"\nprompt ({input_ids.shape[1]} tokens): ...{tokenizer.decode(input_ids[0, -40:])}")
    print(f"\n{args.preset}: {spectral.text}")
    if dense is not None:
        print(f"\ndense: {dense.text}")
    if expected is not None:
        print(f"\nexpected first: {expected}")
    print(f"\n{report(spectral, dense, preset=args.preset)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
