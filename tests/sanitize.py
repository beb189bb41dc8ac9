"""compute-sanitizer over every kernel and branch: `python -m tests.sanitize [--tools NAME ...]`, on
a machine with a GPU, in a few minutes.

Each of memcheck, racecheck, initcheck and synccheck watches the cases below, which are those of the
tests, with their checks against the oracles. Inputs are small and PyTorch's caching allocator is
off, so that the end of a tensor is the end of an allocation. Every process ends with a kernel that
has a defect of the tool's kind: a tool that does not report it saw nothing, and the run fails. It
fails too where the tool is missing, a kernel of the package was not launched, a case fails, or
anything else was found.

A split without pages leaves its part of the workspace unwritten, and rows that pad a tile theirs;
the kernels load these and choose them away (attention.py). So the workspace is filled beforehand,
but for the cases that are `TIGHT`: there every byte that is read must have been written, and
initcheck sees whether it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from spectral_kernels import attention, compress, window
from tests import cases
from tests.cases import DEVICE, DTYPES, PageSpec, int32, make_pages, make_queries, pages_of
from tests.compile_kernels import all_kernels
from tests.test_attention import SPECTRAL_CASES, STEP_CASES, check_spectral, make_step
from tests.test_compress import (
    APPEND_CASES,
    ENCODE_CASES,
    check_append,
    check_decode,
    check_encode,
)
from tests.test_merge import check_many, check_two
from tests.test_rope import check_turn
from tests.test_window import WINDOW_CASES, check_window

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PLACES = (
    "/usr/local/cuda/bin",
    "/usr/local/cuda/compute-sanitizer",
    "/opt/nvidia/compute-sanitizer",
)
LOGS = Path(tempfile.gettempdir()) / "spectral_sanitize"
PATHS = ("triton", "scalar")  # with matrix units, and those of cards before sm_80


# ---- a defect for every tool ---------------------------------------------------------------------


@triton.jit
def _planted_kernel(
    x_ptr, out_ptr, MEMORY: tl.constexpr, RACE: tl.constexpr, SYNC: tl.constexpr
):  # fmt: skip
    """Copies x [128] and does what a sanitizer must see: writes past the end of out (MEMORY), reads
    a word of shared memory that another warp writes, without a barrier (RACE), or calls a barrier
    of the other lanes of its warp (SYNC). Reading an x that nobody wrote is up to the caller."""
    lane = tl.arange(0, 128)
    x = tl.load(x_ptr + lane)
    if RACE:
        x = tl.inline_asm_elementwise(
            """{ .shared .align 4 .b32 planted[128]; .reg .b32 t, at, other;
            mov.u32 t, %tid.x; mov.u32 at, planted; add.u32 other, t, 32; and.b32 other, other, 127;
            mad.lo.u32 other, other, 4, at; mad.lo.u32 at, t, 4, at;
            st.volatile.shared.b32 [at], $1; ld.volatile.shared.b32 $0, [other]; }""",
            "=r,r", [x], tl.int32, False, 1,
        )  # fmt: skip
    if SYNC:
        x = tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .b32 lane; mov.u32 lane, %laneid;
            setp.eq.u32 p, lane, 0; @p bar.warp.sync 0xfffffffe; mov.b32 $0, $1; }""",
            "=r,r", [x], tl.int32, False, 1,
        )  # fmt: skip
    tl.store(out_ptr + lane, x)
    if MEMORY:
        tl.store(out_ptr + 128 + lane, x)


def plant(tool: str) -> None:
    """Launch the tool's defect. memcheck's ends the process's use of the GPU."""
    values = torch.arange(128, dtype=torch.int32)
    x = torch.empty(128, dtype=torch.int32, device=DEVICE) if tool == "initcheck" else values.cuda()
    out = torch.empty(128, dtype=torch.int32, device=DEVICE)
    kinds = {"MEMORY": tool == "memcheck", "RACE": tool == "racecheck", "SYNC": tool == "synccheck"}
    _planted_kernel[(1,)](x, out, **kinds, num_warps=4)
    torch.cuda.synchronize()


# ---- cases ---------------------------------------------------------------------------------------

Case = tuple[str, Callable[[np.random.Generator], None]]


def filled() -> torch.Tensor:
    """A workspace for any case, of bytes that are NaN as floats."""
    return torch.full((1 << 24,), 255, dtype=torch.uint8, device=DEVICE)


def spectral(case: tuple, path: str) -> Callable[[np.random.Generator], None]:
    k, v, dim, rotary, frame, groups, group, lengths, exact, count, codecs, dtype, stride = case

    def run(rng: np.random.Generator) -> None:
        spec = PageSpec(k, v, dim, groups, lengths, frame, rotary, codecs=codecs)
        shape = (len(lengths), groups * group, count, dim)
        queries = make_queries(rng, shape=shape, dtype=dtype, stride=stride, flat=count == 1)
        check_spectral(
            path, make_pages(rng, spec), queries, sinks=exact[0], wide=exact[1],
            shared=codecs != 1, workspace=filled(),
        )  # fmt: skip

    return run


def step(case: tuple, path: str, **settings: Any) -> Callable[[np.random.Generator], None]:
    def run(rng: np.random.Generator) -> None:
        arrays, queries, tokens = make_step(rng, case)
        workspace = {} if case in TIGHT else {"workspace": filled()}
        check_spectral(path, arrays, queries, tokens=tokens, **workspace, **settings)

    return run


# As STEP_CASES: heads a group times queries fill a tile, every split has pages.
TIGHT = [
    ("16x8+16x4+32x2", "32x4+32x2", 64, 64, 128, 2, 4, (410, 393), (4, 16, 0), 1, 2,
     torch.float16, torch.float16),
    ("16x8+48x4+64x2", "64x4+64x2", 128, 128, 512, 1, 8, (700,), (4, 32, 2), 1, 0,
     torch.bfloat16, torch.bfloat16),
    ("16x8+240x2", "256x2", 256, 64, 64, 1, 4, (600,), (2, 16, 0), 2, 0,
     torch.float32, torch.float32),
]  # fmt: skip


def overlapped(rng: np.random.Generator) -> None:
    """append and attend_spectral that starts before it has ended: the bits of one after the
    other."""
    arrays, queries, tokens = make_step(rng, STEP_CASES[2])
    found = []
    for after_append in (False, True):
        tensors = pages_of(arrays)
        state = tensors.k_pages, tensors.v_pages
        table, lens = tensors.block_table, tensors.seq_lens
        exact = [x.nan_to_num(0.0) for x in tokens.tensors]
        new = queries.tensor[:, :1, None]
        compress.append(new, new, tensors.codec, *state, *exact, table, lens, sinks=tokens.sinks)
        found.append(
            attention.attend_spectral(
                queries.tensor, *state, tensors.codec, table, lens, sinks=tokens.sinks,
                window=tokens.window, exact=tuple(exact), workspace=filled(),
                after_append=after_append,
            )
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def window_in_splits(rng: np.random.Generator) -> None:
    """Slots in several programs, joined by merge_many_states."""
    tokens = cases.make_exact_tokens(
        rng, lengths=(150,), kv_heads=1, head_dim=64, sinks=4, window=100
    )
    check_window("triton", make_queries(rng, shape=(1, 2, 1, 64)), tokens, (150,))
    q, lens = make_queries(rng, shape=(1, 2, 1, 64)).tensor, int32(np.array([150]))
    window.attend_window(q, *tokens.tensors, lens, sinks=4, window=100, seq_ids=tokens.ids)


def turn(
    dtype: torch.dtype, stride: str, dim: int, rotary: int, frame: int | None
) -> Callable[[np.random.Generator], None]:
    def run(rng: np.random.Generator) -> None:
        at = rng.integers(0, 10_000, (2, 19))
        x = cases.strided(cases.rounded(rng.standard_normal((2, 2, 19, dim)), dtype), stride)
        inv_freq = cases.inverse_frequencies(rotary)
        check_turn("triton", x, at, torch.from_numpy(at).to(DEVICE), inv_freq, frame, False)

    return run


def every_case() -> list[Case]:
    found: list[Case] = []
    for path in PATHS:
        for i, case in enumerate(SPECTRAL_CASES):
            found.append((f"pages {i} {path}", spectral(case, path)))
        for i, case in enumerate([*STEP_CASES, *TIGHT]):
            found.append((f"step {i} {path}", step(case, path, num_splits=1 + i % 2)))
        for i, case in enumerate(WINDOW_CASES):
            found.append((f"window {i} {path}", exact_tokens(case, path)))
    found += [("overlap", overlapped), ("window in splits", window_in_splits)]
    for i, case in enumerate(ENCODE_CASES):
        for side in ("k", "v"):
            found.append((f"encode {i} {side}", encoded(case, side)))
    for i, case in enumerate(APPEND_CASES):
        found.append((f"append {i}", appended(case)))
    for k, v, dim, groups, codecs in (
        ("16x8+16x4+32x2", "32x4+32x2", 64, 2, 2),
        ("48x4", "16x8+64x4", 80, 1, 0),
        ("16x8+16x4+96x2", "64x4+64x2", 128, 1, 1),
        ("16x8+240x2", "256x2", 256, 1, 0),
    ):
        spec = PageSpec(k, v, dim, groups, (0, 3, 130), 64, codecs=codecs)
        for side in ("k", "v"):
            found.append((f"decode D{dim} {side}", decoded(spec, side)))
    for dtype in DTYPES:
        for sizes in (("swapped", 64, 64, None), ("odd", 80, 40, 128), ("plain", 256, 0, None)):
            found.append((f"turn D{sizes[1]} {dtype}", turn(dtype, *sizes)))
        found.append((f"merge {dtype}", merged(dtype)))
    return found


def exact_tokens(case: tuple, path: str) -> Callable[[np.random.Generator], None]:
    dim, groups, group, lengths, (sinks, wide, drafts), count, q_dtype, k_dtype, stride = case

    def run(rng: np.random.Generator) -> None:
        tokens = cases.make_exact_tokens(
            rng, lengths=lengths, kv_heads=groups, head_dim=dim, sinks=sinks, window=wide,
            drafts=drafts, dtype=k_dtype, stride=stride, permuted=len(lengths) > 1,
        )  # fmt: skip
        shape = (len(lengths), groups * group, count, dim)
        queries = make_queries(rng, shape=shape, dtype=q_dtype, stride=stride, flat=count == 1)
        check_window(path, queries, tokens, lengths)

    return run


def encoded(case: tuple, side: str) -> Callable[[np.random.Generator], None]:
    k, v, dim, rotary, frame, groups, lengths, news, codecs, dtype, stride, (sinks, ring) = case
    spec = PageSpec(k, v, dim, groups, lengths, frame, rotary, codecs=codecs)
    return lambda rng: check_encode(
        "triton", rng, spec, list(news), dtype, side, stride=stride, sinks=sinks, ring=ring,
        shared=codecs != 1,
    )  # fmt: skip


def appended(case: tuple) -> Callable[[np.random.Generator], None]:
    k, v, dim, rotary, frame, groups, lengths, queries, codecs, dtype, stride, (sinks, ring) = case
    spec = PageSpec(k, v, dim, groups, lengths, frame, rotary, codecs=codecs)
    return lambda rng: check_append(
        "triton", rng, spec, queries, dtype, stride=stride, sinks=sinks, ring=ring
    )


def decoded(spec: PageSpec, side: str) -> Callable[[np.random.Generator], None]:
    return lambda rng: check_decode("triton", make_pages(rng, spec), side)


def merged(dtype: torch.dtype) -> Callable[[np.random.Generator], None]:
    def run(rng: np.random.Generator) -> None:
        for dim in (64, 80):
            check_two(rng, "triton", (2, 3), dim, dtype, empty=0.3, spread=3.0)
            check_many(rng, "triton", (2, 3), dim, 40, dtype, empty=0.3, spread=3.0)

    return run


# ---- one process ---------------------------------------------------------------------------------


def watch(launches: Counter, variants: set[tuple[str, str]]) -> None:
    """Count launches by kernel from now on, and compiled variants."""
    original = JITFunction.run

    def run(function: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel = original(function, *args, **kwargs)
        launches[function.__name__] += 1
        variants.add((function.__name__, getattr(kernel, "hash", "")))
        return kernel

    JITFunction.run = run


def run_cases(part: int, parts: int, tool: str) -> int:
    """Run every parts-th case; report as one JSON line; then the defect of `tool` ("" for none)."""
    launches: Counter = Counter()
    variants: set[tuple[str, str]] = set()
    watch(launches, variants)
    failed, ran = [], 0
    for number, (name, run) in enumerate(every_case()):
        if number % parts == part:
            ran += 1
            try:
                run(np.random.default_rng([number, 7]))
                if DEVICE.type == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:
                failed.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    report = {
        "cases": ran, "failed": failed, "launches": dict(launches), "variants": sorted(variants),
    }  # fmt: skip
    print(f"REPORT {json.dumps(report)}", flush=True)
    if tool:
        with contextlib.suppress(RuntimeError):  # memcheck stops the kernel
            plant(tool)
        sys.stdout.flush()
        os._exit(0)  # nothing of PyTorch's end is of interest, and its context may be gone
    return 1 if failed else 0


# ---- what a tool said ----------------------------------------------------------------------------


class Log(NamedTuple):
    """What one process under a tool left."""

    findings: list[str]  # in kernels of the package, or errors of the tool itself
    elsewhere: list[str]  # in kernels of others, PyTorch's for one
    planted: bool
    report: dict[str, Any] | None


def read_log(text: str, ours: set[str]) -> Log:
    """Split the tool's output in messages, by kernel; ours: names of the package's.

    A message is a line "========= words" with the "=========     at kernel+0x10 in .." lines after
    it. One that names no kernel counts as well if it is an error of the tool's own.
    """
    messages: list[list[str]] = []
    report = None
    for line in text.splitlines():
        if line.startswith("REPORT "):
            report = json.loads(line[len("REPORT ") :])
        mark = re.match(r"=========\s(\s*)(.*)", line)
        if not mark:
            continue
        if mark[1] and messages:
            messages[-1].append(mark[2])
        elif mark[2]:
            messages.append([mark[2]])
    findings, elsewhere, planted = [], [], False
    for message in messages:
        whole = " ".join(message)
        if re.search(r"\b_planted_kernel\b", whole):
            planted = True
        elif any(re.search(rf"\b{name}\b", whole) for name in ours):
            findings.append(whole[:400])
        elif "+0x" in whole:
            elsewhere.append(whole[:400])
        elif re.match(r"(?i)internal|error(?! summary)|.*failed|.*unsupported", whole):
            findings.append(whole[:400])
    return Log(findings, elsewhere, planted, report)


def verdict(logs: list[Log], wanted: set[str]) -> list[str]:
    """Why a tool's run does not count as clean; empty: it does."""
    wrong, seen = [], set()
    for log in logs:
        if log.report is None:
            wrong.append("a process ended before its report")
            continue
        wrong += [f"case failed: {x}" for x in log.report["failed"]]
        seen |= set(log.report["launches"])
        if not log.planted:
            wrong.append("the tool did not report the planted defect: it saw no kernel")
    missing = sorted(wanted - seen)
    if missing:
        wrong.append(f"never launched: {missing}")
    return wrong + sorted({f"found: {x}" for log in logs for x in log.findings})


# ---- all of it -----------------------------------------------------------------------------------


def sanitizer() -> str | None:
    """Path of compute-sanitizer, if there is one."""
    return shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ["PATH"], *PLACES)))


def options_of(tool: str, name: str) -> list[str]:
    """Options that this version knows: room behind every allocation, so that none begins where
    another ends; no reports of API calls, which PyTorch tries and handles."""
    known = subprocess.run([tool, "--help"], capture_output=True, text=True).stdout
    padding = ["--padding", "512"] if name == "memcheck" and "--padding" in known else []
    quiet = ["--report-api-errors", "no"] if "--report-api-errors" in known else []
    return ["--tool", name, *padding, *quiet]


def start(command: list[str], log: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    with log.open("w") as out:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def finish(process: subprocess.Popen, deadline: float) -> int | None:
    """Its exit code; None: it was stopped at the deadline, with what it started."""
    try:
        return process.wait(max(1.0, deadline - time.time()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--parts", type=int, default=3, help="processes a tool (default 3)")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it (default 8)")
    parser.add_argument("--logs", type=Path, default=LOGS, help="folder for the logs")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--plant", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if DEVICE.type != "cuda":
        print("GPU: expected one, got none")
        return 1
    if options.part is not None:
        return run_cases(options.part, options.parts, options.plant)
    tool = sanitizer()
    if tool is None:
        print(f"compute-sanitizer: expected on PATH or in {', '.join(PLACES)}, got none")
        return 1
    options.logs.mkdir(parents=True, exist_ok=True)
    begin, deadline = time.time(), time.time() + 60 * options.minutes
    python = [sys.executable, "-m", "tests.sanitize"]
    # Compile first, in many processes and unwatched; the tools find the kernels in Triton's cache.
    parts = min(12, os.cpu_count() or 1)
    compiling = [
        start([*python, "--parts", str(parts), "--part", str(i)], options.logs / f"compile{i}.log")
        for i in range(parts)
    ]
    codes = [finish(process, deadline) for process in compiling]
    for i, code in enumerate(codes):
        if code != 0:
            text = (options.logs / f"compile{i}.log").read_text(errors="replace")
            print(f"without a tool, part {i} of {parts}: exit code {code}: {text[-600:]}")
    print(f"compiled in {time.time() - begin:.0f} s")
    running = {}
    for name in options.tools:
        watched = [tool, *options_of(tool, name), *python]
        for i in range(options.parts):
            log = options.logs / f"{name}{i}.log"
            part = ["--parts", str(options.parts), "--part", str(i), "--plant", name]
            running[name, i] = start([*watched, *part], log), log
    wanted, rows, wrong = all_kernels(), [], {}
    for name in options.tools:
        logs = []
        for i in range(options.parts):
            process, path = running[name, i]
            finish(process, deadline)
            logs.append(read_log(path.read_text(errors="replace"), wanted))
        seconds = time.time() - begin
        wrong[name] = verdict(logs, wanted)
        reports = [log.report for log in logs if log.report]
        launches: Counter = Counter()
        for report in reports:
            launches.update({k: n for k, n in report["launches"].items() if k in wanted})
        variants = {tuple(x) for report in reports for x in report["variants"] if x[0] in wanted}
        rows.append(
            f"{name:10} {sum(r['cases'] for r in reports):6} {len(launches):4} of {len(wanted)}"
            f" {len(variants):9} {sum(launches.values()):9}"
            f" {sum(len(log.findings) for log in logs):9}"
            f" {sum(len(log.elsewhere) for log in logs):10}"
            f" {sum(log.planted for log in logs):4} of {options.parts} {seconds:8.0f}"
        )
    for name, why in wrong.items():
        for line in why[:12]:
            print(f"{name}: {line}")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print("tool        cases  kernels  variants launches  findings  elsewhere  planted  seconds")
    print("\n".join(rows))
    clean = not any(wrong.values()) and all(code == 0 for code in codes)
    print("clean" if clean else "NOT clean")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
