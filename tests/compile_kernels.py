"""Compile every kernel for cards that are not there: `python -m tests.compile_kernels CAPABILITY ... [--first N]` (75 80 86
89 90 100 120; the cases in the order of `cases`). `python -m perf.resources` keeps the rows.

Launchers run on CPU tensors with `JITFunction.run` replaced: what they would launch is compiled for the capability instead,
and one JSON line a kernel and case says what it needs. Runs in a process of its own, without TRITON_INTERPRET.
"""

import argparse
import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import spectral_kernels as sk
from perf._sass import instructions, loop_spills, resources
from spectral_kernels import _launch
from spectral_kernels.compress import (
    error_weights,
    project_rows,
    quantise_components,
    quantiser_errors,
    requantise,
    squared_errors,
)

TYPES = {
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
DIMS = (64, 128, 256)
FIRST, FEW = 4, 2  # cases that CI compiles for a card


def check_operand_lanes(ttgir: str) -> None:
    """The operands of inline mma.sync must lie where attention_sm75.py says: the last index of a tensor is the lane."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.M))
    for shape, name in re.findall(r'elementwise_inline_asm "mma\.sync.*?-> tensor<(\w+), (#\w+)>', ttgir):
        rank, layout = shape.count("x"), layouts[name]
        if "blocked" in layout:
            spread, each = (
                list(map(int, re.search(rf"{key} = \[([\d, ]+)\]", layout)[1].split(",")))  # type: ignore[index]
                for key in ("threadsPerWarp", "sizePerThread")
            )
            good = spread == [1] * (rank - 1) + [32] and each[-1] == 1
        else:
            lanes = re.search(r"lane = (\[\[.*?\]\])", layout)
            good = lanes is not None and json.loads(lanes[1]) == [[0] * (rank - 1) + [2**bit] for bit in range(5)]
        assert good, f"operands of mma.sync, {shape}: lanes lie otherwise in {layout}"


class Case(NamedTuple):
    name: str  # preset and bands
    layout: sk.PageLayout
    group: int  # query heads a KV head


class Launched(NamedTuple):
    """A launch that was compiled and not run: programs, the values of its parameters by name, its row, the kernel."""

    programs: int
    values: dict[str, Any]
    row: dict[str, Any]
    kernel: Any


class Recorder:
    """Stands in for JITFunction.run: compiles for the target, launches nothing."""

    def __init__(self, capability: int, report: Callable[[Launched, bool], None], kernels: Collection[str] = ()) -> None:
        """report: called with each launch and whether its kernel is a new one. kernels: names of those to compile, all if
        there are none."""
        self.capability = capability
        self.report = report
        self.kernels = kernels
        self.case: dict[str, Any] = {}
        self.compiled: dict[str, tuple[dict[str, Any], Any]] = {}
        # A plain function, so that it binds to the kernel when it stands in for the method.
        self.run_of = lambda function, *args, **kwargs: self.run(function, *args, **kwargs)

    def run(self, function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if self.kernels and function.__name__ not in self.kernels:
            return
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        bound = dict(zip(function.arg_names, args, strict=False), **kwargs)
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(function.params):
            value = bound[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int) and value == 1 and not parameter.do_not_specialize:
                signature[parameter.name], constants[parameter.name] = "constexpr", 1
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(index,)] = [["tt.divisibility", 16]]  # as a launch specialises it
        key = repr((function.__name__, sorted(signature.items()), sorted(constants.items()), options))
        if new := key not in self.compiled:
            self.compiled[key] = self.compile(function, ASTSource(function, signature, constants, attributes), options)
        programs = math.prod(grid(bound) if callable(grid) else grid)
        self.report(Launched(programs, bound, *self.compiled[key]), new)

    def compile(self, function: JITFunction, source: ASTSource, options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """The row and the compiled kernel."""
        kernel = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        check_operand_lanes(kernel.asm["ttgir"])
        registers, local = resources(kernel.asm["cubin"])
        row = {
            "kernel": function.__name__,
            "capability": self.capability,
            "triton": triton.__version__,
            **self.case,
            "warps": kernel.metadata.num_warps,
            "registers": registers,
            "spills": local,
            "loop_spills": loop_spills(instructions(kernel.asm["cubin"])) if local else 0,
            "shared_bytes": kernel.metadata.shared,
            "code_bytes": len(kernel.asm["cubin"]),
        }
        return row, kernel


def cases() -> list[Case]:
    """All presets, head dimensions and groups. Those of CI come first (FIRST of them, or FEW): a kernel that is the same in
    several cases has the row of the first, whichever are compiled."""
    bands = sk.Bands.parse("64x16")
    lossless = sk.PageLayout(bands, bands, 64, 64)
    first = [("balanced", 128, 4), ("quality", 256, 1), ("small", 64, 6)]
    every = itertools.product(("quality", "balanced", "small"), DIMS, (1, 4, 6, 8))
    found = []
    for preset, dim, group in [*first, *(case for case in every if case not in first)]:
        layout = sk.PRESETS[preset].layout(dim)
        assert layout is not None
        found.append(Case(f"{preset} {layout.k} {layout.v}", layout, group))
    found.insert(1, Case(f"lossless {lossless.k} {lossless.v}", lossless, 1))
    return found


def launch_all(layout: sk.PageLayout, group: int, dtype: torch.dtype, matrix: bool) -> None:
    """Call every launcher once on small CPU tensors."""
    batch, kv_heads, dim, chunk = 2, 2, layout.head_dim, layout.chunk
    pages = sk.allocate_pages(
        layout, pages=4, segments=2, kv_heads=kv_heads, batch=batch, max_chunks=33, device=torch.device("cpu")
    )
    rope = sk.Rope.from_inv_freq(torch.full((dim // 2,), 0.5))
    q = torch.zeros(batch, group * kv_heads, 1, dim, dtype=dtype)
    positions = torch.full((batch, 1), 2 * chunk, dtype=torch.int32)
    x = torch.zeros(batch, kv_heads, 2 * chunk, dim, dtype=dtype)
    key_positions = torch.arange(2 * chunk, dtype=torch.int32).repeat(batch, 1)
    exact = (x, x, key_positions)
    for splits in (2, 33):  # few and many are joined by other kernels
        sk.attend_spectral(q, positions, pages, rope, exact=exact, splits=splits, matrix_units=matrix)
    sk.attend_exact(q, positions, *exact, rope, chunk=chunk, matrix_units=matrix)
    # Numbers of queries that are specialised in other ways than one is.
    two = q.expand(-1, -1, 2, -1).contiguous(), positions.repeat(1, 2)
    sk.attend_spectral(*two, pages, rope, exact=exact, matrix_units=matrix)
    sk.attend_exact(*two, *exact, rope, chunk=chunk, matrix_units=matrix)
    sk.project_queries(q, positions, pages, rope)
    sk.rotate(x, key_positions, rope)
    sk.phase_align(x, key_positions, rope, chunk=chunk)
    sk.gram(x)
    queries = x.repeat_interleave(group, dim=1)
    for weights in (None, torch.ones(batch, group * kv_heads)):
        sk.query_metric(queries, rope, chunk=layout.align, kv_heads=kv_heads, weights=weights)
    for v_metrics in (None, (torch.eye(dim).repeat(kv_heads, 1, 1), torch.ones(batch, group * kv_heads))):
        error_weights(queries, x, x, rope, v_metrics, chunk=layout.align, sinks=4, window=16)
    for mean in (None, torch.zeros(batch, kv_heads, dim)):
        project_rows(x, torch.zeros(batch, kv_heads, dim, dim), mean, every=2)
    zeros = torch.zeros(batch, kv_heads, dim, dim)
    for weighing in ({}, {"metric": zeros}, {"root": zeros}):
        squared_errors(x.float(), x, **weighing)
    for metric in (None, zeros):
        quantise_components(zeros, metric)
    eye = torch.eye(dim)
    for metric in (None, eye) if dim == 64 else (eye,):
        sk.fit_basis(eye, metric, rank=dim)
        sk.fit_encoder(eye.to(torch.int8), torch.ones(dim), metric)
    for side, bands, data in (("k", layout.k, pages.k_pages), ("v", layout.v, pages.v_pages)):
        encoder = torch.zeros(batch, kv_heads, dim, bands.rank)
        sk.fit_steps(torch.zeros(kv_heads, 64, bands.rank), bands)
        if not bands.is_float:
            quantiser_errors(torch.zeros(kv_heads, 64, bands.rank), torch.ones(1, kv_heads, bands.rank), [bands])
        sk.encode(x, encoder, bands, data, pages.page_table[:, :2].contiguous(), side=side)
        sk.decode(pages, side=side)
        if not bands.is_float:
            coarse = sk.Bands(((bands.rank, 2),))
            written = torch.zeros(4, kv_heads, chunk * coarse.bytes, dtype=torch.uint8)
            ratio, ids = torch.ones(batch, kv_heads, bands.rank), pages.page_table[:, :2].contiguous()
            requantise(data, bands, written, coarse, ratio, ids, side=side)
    o, lse = torch.zeros(2, 3, dim), torch.zeros(2, 3)
    sk.merge_states(o, lse, o, lse)
    sk.merge_many_states(o, lse)


def stand_in(capability: int, recorder: Recorder, old: bool = False) -> bool:
    """Make launchers compile, by the recorder, what they would launch on a card of this capability (`old`: by the path of
    cards before sm_80), for the rest of the process. Whether that path has matrix units."""
    matrix = capability >= 80 and not old
    _launch.KERNELS_ON_CPU = True
    _launch.is_native = lambda x: True
    _launch.has_matrix_units = lambda device: matrix
    _launch.has_large_shared_memory = lambda device: capability in (90, 100)
    _launch.overlaps_launches = lambda device: capability >= 90
    _launch.has_tensor_memory = lambda device: capability == 100
    JITFunction.run = recorder.run_of
    return matrix


def compile_all(
    capability: int, chosen: Iterable[Case], report: Callable[[dict[str, Any]], None], kernels: Collection[str] = ()
) -> None:
    """Compile what the launchers would launch on a card of this capability in these cases, `report` each kernel's row once.
    `kernels`: only those of these names, all if there are none."""
    recorder = Recorder(capability, lambda launched, new: report(launched.row) if new else None, kernels)
    matrix = stand_in(capability, recorder)
    for name, layout, group in chosen:
        recorder.case = {"layout": name, "D": layout.head_dim, "group": group}
        launch_all(layout, group, torch.bfloat16 if matrix else torch.float16, matrix)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", nargs="+", type=int)
    parser.add_argument("--first", type=int, metavar="N", help="only the first N cases")
    arguments = parser.parse_args()
    for capability in arguments.capability:
        compile_all(capability, cases()[: arguments.first], lambda row: print(json.dumps(row), flush=True))


if __name__ == "__main__":
    main()
