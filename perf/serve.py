"""Serve through vLLM: time to the first token, time a token, tokens admitted, and output tokens a
second with the pool full, a backend after another.

    python -m perf.serve --cells 1x8192 1x32768 8x32768 1x131072
                         --backends FLASH_ATTN FLASH_ATTN:fp8 SPECTRAL:balanced --json

An engine with random weights of a shape (or --model with --codec) runs in a process for each
backend, one after another, or with --kv-gb side by side, timed in the order of --backends (tokens
admitted, and the full pool, are those of the fewest GiB); one that fails leaves the others alone.
NAME:fp8 is a kv_cache_dtype, SPECTRAL:PRESET a preset, with a codec of random bases in its bands.
Cell BxT: B distinct prompts of T tokens; full: prompts of --lengths in turns, as many as fit.
ttft_ms: until all have their first token, nothing cached. tpot_ms: of a step from then on, of
MANY; throughput: output tokens a second of all together.

Row: gpu gpus commit vllm backend kv_dtype B T ttft_ms tpot_ms kv_tokens throughput.
Test: tests/test_serve.py; of the tokens: tests/serving.py.
"""

import argparse
import importlib.metadata
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import torch

from perf._cases import LOSSY, SHAPES, frequencies, llama, random_model_codec
from perf._timing import ROOT, Row, parser_of, read_rows, say, versions, write_row
from perf.tables import SERVE, columns

MANY = 128  # steps that are timed
PATIENCE = 200.0  # seconds until all prompts have their first token, at most
GROUP = "vllm.general_plugins"


def cell(text: str) -> tuple[int, int]:
    batch, tokens = text.lower().split("x")
    return int(batch), int(tokens)


def make_config(shape: str) -> Any:
    return llama(shape, initializer_range=0.06, architectures=["LlamaForCausalLM"])


def make_codec(shape: str, preset: str, path: Path) -> None:
    torch.manual_seed(0)
    _, _, layers, _, kv_heads, dim, _ = SHAPES[shape]
    freqs = frequencies(dim)
    random_model_codec(preset, layers=layers, kv_heads=kv_heads, freqs=freqs).save(path)


def prompt(number: int, tokens: int, vocabulary: int) -> dict[str, Any]:
    """A longer one starts as a shorter one of its number."""
    generator = torch.Generator().manual_seed(1000 + number)
    ids = torch.randint(10, vocabulary - 300, (tokens,), generator=generator)
    return {"prompt_token_ids": ids.tolist()}


class Served:
    """An engine of one backend; more: of its options."""

    def __init__(self, args: argparse.Namespace, backend: str, folder: Path, **more: Any) -> None:
        import vllm

        name, _, kind = backend.partition(":")
        spectral = name == "SPECTRAL"
        more["kv_cache_dtype"] = "auto" if spectral or not kind else kind
        share = 1.0  # of its pages that are counted
        if spectral:
            given = {"preset": kind} if kind == "exact" else {"codec": args.codec}
            more["additional_config"] = {"spectral": given}
        if args.kv_gb:  # of engines side by side none can measure the memory
            size = args.kv_gb[args.backends.index(backend)]
            more["kv_cache_memory_bytes"], share = int(size * 2**30), min(args.kv_gb) / size
        self.llm = vllm.LLM(
            model=str(args.model or folder / "model"), skip_tokenizer_init=True, dtype=args.dtype,
            load_format="auto" if args.model else "dummy", block_size=64,
            attention_backend=name, gpu_memory_utilization=args.utilization, seed=0,
            max_model_len=longest(args), max_num_seqs=args.seqs, max_num_batched_tokens=args.chunk,
            tensor_parallel_size=args.tp, enable_prefix_caching=kind != "exact",
            enforce_eager=not torch.cuda.is_available(),
            compilation_config={"cudagraph_capture_sizes": sizes(args)}, **more,
        )  # fmt: skip
        greedy = {"temperature": 0, "ignore_eos": True, "detokenize": False}
        self.sampling = partial(vllm.SamplingParams, **greedy)
        config = self.llm.llm_engine.vllm_config
        self.vocabulary = config.model_config.get_vocab_size()
        blocks = int(config.cache_config.num_gpu_blocks * share)
        self.kv_tokens = blocks * config.cache_config.block_size
        self.asked = 0  # prompts so far
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        self.row: Row = {
            "gpu": card, "gpus": args.tp, "commit": versions(args.commit)["commit"],
            "vllm": vllm.__version__, "backend": name, "kv_dtype": kind or args.dtype,
            "kv_tokens": self.kv_tokens,
        }  # fmt: skip

    def lengths_that_fit(self, args: argparse.Namespace) -> list[int]:
        """Of as many prompts as the pool takes, all decoding."""
        lengths: list[int] = []
        for tokens in islice(cycle(args.lengths), args.seqs):
            more = [*lengths, tokens]
            # What those that are in first generate while the others' prompts run.
            spare = (sum(more) // args.chunk + MANY + 128) * len(more)
            if sum(more) + spare > self.kv_tokens:
                break
            lengths = more
        return lengths

    def time(self, lengths: list[int], chunk: int) -> Row:
        """What a row says of prompts of these lengths, which share no page with earlier ones;
        chunk: tokens of prompts that a step takes at most."""
        first, self.asked = self.asked, self.asked + len(lengths)
        given = {str(i): prompt(i, n, self.vocabulary) for i, n in enumerate(lengths, first)}
        sampling = self.sampling(max_tokens=sum(lengths) // chunk + MANY + 512)
        engine, started, made, begin = self.llm.llm_engine, set[str](), 0, time.perf_counter()

        def stepped() -> list[Any]:
            """Of those that have tokens. A step of an engine with no request left never ends."""
            outs = engine.step()
            if any(x.finished for x in outs):
                raise RuntimeError(f"{len(given)} prompts: some ended before others had begun")
            return outs

        for name, ids in given.items():
            engine.add_request(name, ids, sampling)
        while len(started) < len(given):
            started |= {x.request_id for x in stepped() if x.outputs[0].token_ids}
            if time.perf_counter() - begin > PATIENCE:
                raise TimeoutError(f"{len(started)} of {len(given)} prompts in {PATIENCE} s")
        wait, begin = time.perf_counter() - begin, time.perf_counter()
        while made < len(given) * MANY:
            made += len(stepped())
        step = 1e3 * (time.perf_counter() - begin) * len(given) / made
        engine.abort_request([*started])
        row = {"B": len(given), "T": round(statistics.mean(lengths)), "ttft_ms": 1e3 * wait}
        return {**row, "tpot_ms": step, "throughput": 1e3 * len(given) / step}


def sizes(args: argparse.Namespace) -> list[int]:
    """Batches of the graphs: powers of two, those of the cells, and of the full pool."""
    cells = {batch for batch, _ in args.cells} | ({args.seqs} if args.full else set())
    return sorted(cells | {1 << i for i in range(max(cells).bit_length())})


def longest_prompt(args: argparse.Namespace) -> int:
    return max([t for _, t in args.cells] + args.lengths * args.full)


def longest(args: argparse.Namespace) -> int:
    """max_model_len."""
    return longest_prompt(args) + MANY + 576


def file_of(folder: Path, backend: str, ending: str) -> Path:
    return folder / (re.sub(r"\W+", "-", backend) + ending)


def run_one(args: argparse.Namespace, backend: str, folder: Path) -> None:
    results = file_of(folder, backend, ".jsonl")
    served = Served(args, backend, folder)
    say(f"PHASE {backend}: engine started")
    warm = min(args.chunk + 1024, longest_prompt(args))
    for lengths in ([warm], [warm], [300, 300]):
        served.time(lengths, args.chunk)
        say(f"PHASE {backend}: warm {lengths}")
    results.with_suffix(".up").touch()
    earlier = args.backends[: args.backends.index(backend)]
    signs = [file_of(folder, x, ".up") for x in args.backends]
    signs += [file_of(folder, x, ".ended") for x in earlier]
    while args.kv_gb and not all(x.exists() for x in signs):
        time.sleep(0.2)  # no engine starts or ends while another is timed
    for lengths in [[tokens] * batch for batch, tokens in args.cells] + [[]] * args.full:
        row = served.time(lengths or served.lengths_that_fit(args), args.chunk)
        write_row({**served.row, **row}, args.json, results)
        say(f"PHASE {backend}: {row['B']}x{row['T']}")


def environment(folder: Path) -> dict[str, str]:
    """For the engines' processes: the plugin is found where this package is not installed, too."""
    path = [str(ROOT)]
    if not any("spectral_kernels" in x.value for x in importlib.metadata.entry_points(group=GROUP)):
        about = folder / "spectral_kernels-0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Name: spectral-kernels\nVersion: 0\n")
        entry = f"[{GROUP}]\nspectral = spectral_kernels.vllm:register\n"
        (about / "entry_points.txt").write_text(entry)
        path.append(str(folder))
    path += filter(None, [os.environ.get("PYTHONPATH")])
    settings = {
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # or every engine start on Hopper wants FlashInfer
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # CUDA may be in use before an engine starts
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or it wants a NUMA node for each rank
        # Else by model: what one engine has compiled, the next one finds.
        "TRITON_CACHE_DIR": str(Path.home() / ".triton" / "cache"),
    }  # fmt: skip
    return {**settings, **os.environ, "PYTHONPATH": os.pathsep.join(path)}


def run_backend(
    args: argparse.Namespace, argv: Sequence[str], folder: Path, env: dict[str, str], backend: str,
    module: str = "perf.serve",
) -> list[Row]:  # fmt: skip
    """Rows of one engine, in a process that runs the module with --one."""
    kind, results = backend.partition(":")[2], file_of(folder, backend, ".jsonl")
    extra = ["--one", backend, str(folder)]
    log = file_of(Path(os.environ.get("OUT", folder)), backend, ".log")
    try:
        if kind in LOSSY and not args.codec:
            make_codec(args.shape, kind, codec := results.with_suffix(".safetensors"))
            extra += ["--codec", str(codec)]
        with log.open("w") as file:
            command = [sys.executable, "-m", module, *argv, *extra]
            done = subprocess.run(command, env=env, cwd=ROOT, stdout=file, stderr=file)
    finally:
        for sign in (".up", ".ended"):  # others do not wait for one that failed
            results.with_suffix(sign).touch()
    lines = log.read_text().splitlines()
    print(*(x for x in lines if "PHASE" in x), sep="\n")
    rows = read_rows(results)
    say(f"{backend}: {len(rows)} rows, exit {done.returncode}")
    if done.returncode:  # the cause is often not in the last lines
        causes = [x for x in lines[:-25] if "Error" in x]
        print(*causes[-10:], *lines[-25:], sep="\n", flush=True)
    return rows


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = parser_of("serve", __doc__)
    add = parser.add_argument
    add("--cells", type=cell, nargs="+", default=[(1, 8192), (1, 32768), (8, 32768), (1, 131072)])
    add("--backends", nargs="+", default=["FLASH_ATTN", "FLASH_ATTN:fp8", "SPECTRAL:balanced"])
    add("--shape", choices=list(SHAPES), default="8b")
    add("--model", type=Path, help="a folder with weights, instead of --shape; needs --codec")
    add("--codec", help="the model's codec file (default: random bases in the preset's bands)")
    add("--dtype", default="bfloat16")
    add("--tp", type=int, default=1, help="tensor parallel ranks")
    add("--utilization", type=float, default=0.45, help="share of the card's memory")
    add("--kv-gb", type=float, nargs="+", help="GiB of pages a rank, of engines side by side")
    add("--seqs", type=int, default=160, help="max_num_seqs")
    add("--chunk", type=int, default=16384, help="max_num_batched_tokens")
    add("--full", action=argparse.BooleanOptionalAction, default=True, help="the full pool, too")
    add("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    add("--one", nargs=2, help=argparse.SUPPRESS)  # a backend, in a process: it, and the folder
    args = parser.parse_args(argv)
    if args.kv_gb:
        args.kv_gb = (args.kv_gb * len(args.backends))[: len(args.backends)]
    return args


def run_all(args: argparse.Namespace, argv: Sequence[str], folder: Path, **more: str) -> list[Row]:
    """Of all backends, one after another or side by side."""
    run = partial(run_backend, args, argv, folder, environment(folder), **more)
    with ThreadPoolExecutor(len(args.backends) if args.kv_gb else 1) as pool:
        return [*chain.from_iterable(pool.map(run, args.backends))]


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    if args.one:
        run_one(args, args.one[0], Path(args.one[1]))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_config(args.shape).save_pretrained(folder / "model")
        rows = run_all(args, argv, folder)
    print(columns(rows, SERVE))
    return 0 if len(rows) == len(args.backends) * (len(args.cells) + args.full) else 1


if __name__ == "__main__":
    raise SystemExit(main())
