"""Device times of short calls with a cold L2, the bandwidth that the card can read at, and rows of
results: what every table shares.

A call is timed as a decode step runs it: captured in a CUDA graph, its inputs in memory and not in
the L2 cache. The same work on several copies of the inputs, together larger than the cache, is one
graph; the time of a call is the time of a replay over the number of calls, by events on the device.
Host time is not in it.   Test: tests/test_perf.py.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
LEAST_CALLS = 8  # of a graph that is timed
RESULTS = ROOT / "perf" / "results"
Row = dict[str, Any]
Call = Callable[[], Any]


def usual_dtype(device: torch.device) -> torch.dtype:
    """Of models: bf16 on a GPU from sm_80 on, fp16 on older ones, float32 on a CPU."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


@dataclass(frozen=True)
class Card:
    """The CUDA device that is measured."""

    device: torch.device

    @classmethod
    def current(cls) -> "Card":
        """Exits with 2 on a machine without one."""
        if not torch.cuda.is_available():
            print("no CUDA card: nothing was measured", file=sys.stderr)
            raise SystemExit(2)
        return cls(torch.device("cuda", torch.cuda.current_device()))

    @cached_property
    def properties(self) -> Any:
        return torch.cuda.get_device_properties(self.device)

    @property
    def dtype(self) -> torch.dtype:
        return usual_dtype(self.device)

    @property
    def free(self) -> int:
        """Bytes that can be allocated now, those that PyTorch keeps among them."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def normal(self, *size: int, std: float = 1.0) -> torch.Tensor:
        """Normally distributed numbers, in the card's dtype."""
        return torch.empty(size, dtype=self.dtype, device=self.device).normal_(std=std)

    def copies(self, nbytes: int) -> int:
        """How many copies of `nbytes` of inputs keep those of a call's next turn out of the L2."""
        return max(1, min(256, -(-3 * self.properties.L2_cache_size // max(nbytes, 1))))

    @cached_property
    def read_bandwidth(self) -> float:
        """Bytes a second of a read-only pass over up to 4 GiB: the best median of several tiles."""
        size = min(4 << 30, self.free // 4) >> 20 << 20
        x = torch.randint(-(2**31), 2**31, (size // 4,), dtype=torch.int32, device=self.device)
        tiles = ((2048, 4), (4096, 4), (8192, 8), (16384, 16))
        return max(size / device_times([partial(read_sum, x, *tile)]).p50 * 1e6 for tile in tiles)


@triton.jit
def _read_sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + tl.program_id(0), tl.sum(tl.load(x_ptr + i), 0))


def read_sum(x: torch.Tensor, block: int = 4096, warps: int = 4) -> torch.Tensor:
    """Sums modulo 2**32 of `block` numbers each: int32 [N], a multiple of it, -> [N / block]."""
    out = torch.empty(x.numel() // block, dtype=torch.int32, device=x.device)
    _read_sum_kernel[(out.numel(),)](x, out, BLOCK=block, num_warps=warps)
    return out


class Times(NamedTuple):
    """Microseconds of a call: percentiles over replays."""

    p20: float
    p50: float
    p80: float


class Clock:
    """A streamer that notes when the prompt and then tokens come; with a label, a progress bar."""

    def __init__(self, label: str | None = None, tokens: int | None = None) -> None:
        self.times: list[float] = []
        self.bar = tqdm(total=tokens, desc=label, unit="tok", disable=label is None)

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())  # `value` is on the CPU: the device has finished it
        self.bar.update(len(self.times) > 1)

    def end(self) -> None:
        self.bar.close()

    @property
    def prefill_s(self) -> float:
        return self.times[1] - self.times[0]

    @property
    def steps_ms(self) -> list[float]:
        return [(b - a) * 1e3 for a, b in pairwise(self.times[1:])]


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph of all calls in turn, each run once before, to compile and to allocate."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def device_times(calls: Sequence[Call], *, seconds: float = 0.1) -> Times:
    """Times of one of `calls`, which do the same work on different inputs (see `Card.copies`). A
    sample: as many replays of a graph of all as fill half a millisecond; 5 to 100 in `seconds`. Of
    few calls the graph has all several times: what a replay takes besides is not a call's."""
    calls = [*calls] * -(-LEAST_CALLS // len(calls))
    graph = capture(calls)

    def sample(replays: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / replays  # microseconds a replay

    once = min(sample(1) for _ in range(3))
    replays = max(1, round(500 / max(once, 1.0)))
    sample(max(1, round(2e4 / max(once, 1.0))))  # 20 ms: clocks rise
    count = min(100, max(5, round(seconds * 1e6 / (once * replays))))
    samples = [sample(replays) / len(calls) for _ in range(count)]
    return Times(*statistics.quantiles(samples, n=10, method="inclusive")[1::3])


def versions(commit: str | None = None) -> Row:
    """What ran: commit (git's unless given; with "+" where files differ), torch, triton."""
    if not commit:
        describe = "git describe --always --exclude='*' --dirty=+"
        done = subprocess.run(describe, shell=True, cwd=ROOT, capture_output=True, text=True)
        commit = done.stdout.strip() or "unknown"
    return {"commit": commit, "torch": torch.__version__, "triton": triton.__version__}


def parser_of(job: str, doc: str | None) -> argparse.ArgumentParser:
    """Of perf.JOB, with --json and --commit; its help is the module's text."""
    parser = argparse.ArgumentParser(prog=f"python -m perf.{job}", description=doc)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    path = RESULTS / f"{job}.jsonl"
    text = f"append rows (default file: {path})"
    parser.add_argument("--json", type=Path, nargs="?", const=path, help=text)
    parser.add_argument("--commit", help="what rows say is measured; default: git's word")
    return parser


START = time.perf_counter()


def say(text: str) -> None:
    """Print a line with the seconds since the start: of a run that is stuck one sees where."""
    print(f"[{time.perf_counter() - START:5.1f} s] {text}", flush=True)


def begin(commit: str | None = None, reads: bool = True) -> tuple[Card, Row]:
    """The card (exit 2 without one) and what a run's rows share; reads: with the bandwidth."""
    card = Card.current()
    torch.manual_seed(0)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds")
    same = {"gpu": card.properties.name, **versions(commit), "date": date}
    if reads:
        same["read_gbs"] = round(card.read_bandwidth / 1e9)
    say("  ".join(f"{name} {x}" for name, x in {**same, "dtype": card.dtype}.items()))
    return card, same


def reason(error: BaseException) -> str:
    """The first line of an error, short enough for a row."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:120]


def fail(what: str, error: BaseException) -> int:
    """Say what is missing from a run, which goes on: 1, or 0 where it does not fit the card."""
    fits = not isinstance(error, torch.OutOfMemoryError)
    say(f"{what}: {f'FAILED, {reason(error)}' if fits else 'skipped, it does not fit the card'}")
    return int(fits)


def rounded(row: Row) -> Row:
    """Its floats with four digits, which is what they are good for."""
    return {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in row.items()}


def write_row(row: Row, *paths: Path | None) -> Row:
    """Append a row, rounded, to files, and to $OUT/rows.jsonl where that is set; return it."""
    row, out = rounded(row), os.environ.get("OUT")
    for target in filter(None, (*paths, Path(out) / "rows.jsonl" if out else None)):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return row


def record(own: Row, same: Row, path: Path | None) -> Row:
    """Write and return a row of what a run's rows share and of its own, which is said."""
    row = write_row({**same, **own}, path)
    say("  ".join(f"{name} {row[name]}" for name, x in own.items() if x is not None))
    return row


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.strip()]
