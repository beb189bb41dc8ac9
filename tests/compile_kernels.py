"""Compile every kernel for cards that are not there: `python -m tests.compile_kernels CAPABILITY
... [--cases N] [--all]` (75 80 86 89 90 100 120; N cases of CI, or with --all every head dimension,
preset and group size).

Launchers run on CPU tensors with `JITFunction.run` replaced: what they would launch is specialised
as a launch specialises it and compiled for the capability instead, and one JSON line a kernel and
case says what it needs. Runs in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import spectral_kernels as sk
from perf._cases import layouts, random_codec
from spectral_kernels import _launch

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
Row = dict[str, Any]


def all_kernels() -> set[str]:
    """Names of the kernels of the package: jit functions called *_kernel."""
    found = set()
    for info in pkgutil.iter_modules(sk.__path__):
        if info.name not in ("hf", "vllm"):  # they need what they adapt to, and hold no kernel
            module = importlib.import_module(f"spectral_kernels.{info.name}")
            found |= {
                n
                for n, x in vars(module).items()
                if isinstance(x, JITFunction) and n.endswith("_kernel")
            }
    return found


# Machine code


class Instruction(NamedTuple):
    at: int
    name: str  # with modifiers, as LDG.E.128
    operands: str
    predicated: bool

    @property
    def operation(self) -> str:
        """The name without modifiers."""
        return self.name.split(".")[0]

    @property
    def target(self) -> int | None:
        """The address that a branch goes to. A predicated call is a jump out of a loop; from others
        one comes back. BRA.U.ANY: a warp's threads take turns with an operand that all must share,
        which is no loop of the kernel."""
        jumps = self.operation == "BRA" and self.name != "BRA.U.ANY"
        jumps |= self.operation == "CALL" and self.predicated
        match = re.search(r"0x([0-9a-f]+)", self.operands) if jumps else None
        return int(match[1], 16) if match else None


def dump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of local memory a thread (spills)."""
    text = dump(cubin, "-res-usage")
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert match is not None, text
    return int(match[1]), int(match[2])


def parse(sass: str) -> list[Instruction]:
    """The instructions of `cuobjdump -sass`, in order."""
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);"
    return [
        Instruction(int(at, 16), name, rest.strip(), bool(p))
        for at, p, name, rest in re.findall(pattern, sass)
    ]


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The innermost loops: what lies between a branch and an earlier address it goes to, with no
    other loop inside.

    A branch over the kernel's end is none: it comes back from code that was put there.
    """
    ends = [i.at for i in code if i.operation == "EXIT" and not i.predicated]
    spans = [(i.target, i.at) for i in code if i.target is not None and i.target < i.at]
    spans = [(first, last) for first, last in spans if not any(first < end < last for end in ends)]
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[i for i in code if first <= i.at <= last] for first, last in inner]


def loop_spills(code: Sequence[Instruction]) -> int:
    """Loads and stores of local memory in innermost loops."""
    return sum(i.operation in ("LDL", "STL") for loop in loops(code) for i in loop)


def check_operand_lanes(ttgir: str) -> None:
    """The operands of inline mma.sync must lie where attention_sm75.py says: the last index of a
    tensor is the lane."""
    known = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.M))
    for shape, name in re.findall(
        r'elementwise_inline_asm "mma\.sync.*?-> tensor<(\w+), (#\w+)>', ttgir
    ):
        rank, layout = shape.count("x"), known[name]
        if "blocked" in layout:
            spread, each = (
                list(map(int, re.search(rf"{key} = \[([\d, ]+)\]", layout)[1].split(",")))  # type: ignore[index]
                for key in ("threadsPerWarp", "sizePerThread")
            )
            good = spread == [1] * (rank - 1) + [32] and each[-1] == 1
        else:
            lanes = re.search(r"lane = (\[\[.*?\]\])", layout)
            good = lanes is not None and json.loads(lanes[1]) == [
                [0] * (rank - 1) + [2**bit] for bit in range(5)
            ]
        assert good, f"operands of mma.sync, {shape}: lanes lie otherwise in {layout}"


# Launches


class Case(NamedTuple):
    preset: str
    layout: sk.PageLayout
    group: int  # query heads a KV head


class Recorder:
    """Stands in for JITFunction.run: compiles for the target, launches nothing, reports a new
    kernel's row."""

    def __init__(self, capability: int, report: Callable[[Row], None], only: str = "") -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.backend = make_backend(self.target)
        self.report, self.only = report, only
        self.case: Row = {}
        self.seen: set[str] = set()
        # A plain function, so that it binds to the kernel when it stands in for the method.
        self.run_of = lambda function, *args, **kwargs: self.run(function, *args, **kwargs)

    def run(
        self, function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any
    ) -> None:
        if not function.__name__.endswith(self.only):
            return
        kwargs.setdefault("debug", False)
        binder = create_function_from_signature(function.signature, function.params, self.backend)
        bound, specialization, options = binder(*args, **kwargs)
        key = repr((function.__name__, specialization, options))
        if key in self.seen:
            return
        self.seen.add(key)
        packed = function._pack_args(self.backend, kwargs, bound, specialization, options)
        options, signature, constants, attributes = packed
        source = ASTSource(function, signature, constants, attributes)
        kernel = triton.compile(source, target=self.target, options=options.__dict__)
        check_operand_lanes(kernel.asm["ttgir"])
        cubin = kernel.asm["cubin"]
        registers, local = resources(cubin)
        row = {
            "kernel": function.__name__,
            "capability": self.target.arch,
            **self.case,
            "warps": kernel.metadata.num_warps,
            "registers": registers,
            "spills": local,
            "loop_spills": loop_spills(parse(dump(cubin, "-sass"))) if local else 0,
            "shared_bytes": kernel.metadata.shared,
            "l2_requests": kernel.asm["ptx"].count("prefetch.L2"),
        }
        self.report(row)


def cases(everything: bool = False) -> list[Case]:
    """Those of CI come first: the usual one, an odd group, the largest head dimension."""
    ci = (("balanced", 128, 4), ("small", 64, 6), ("quality", 256, 1))
    if not everything:
        return [Case(preset, layouts(preset, dim)[0], group) for preset, dim, group in ci]
    rest = itertools.product(("quality", "balanced", "small"), (64, 80, 96, 128, 256), (1, 4, 6, 8))
    chosen = [*ci, *(case for case in rest if case not in ci)]
    return [
        Case(preset, layout, group)
        for preset, dim, group in chosen
        for layout in layouts(preset, dim)
    ]


def launch_all(
    layout: sk.PageLayout, group: int, dtype: torch.dtype, matrix: bool, thorough: bool
) -> None:
    """Call every launcher on small CPU tensors. thorough: with several queries, and pages alone,
    too."""
    batch, heads, dim, max_pages, sinks, window = 2, 2, layout.head_dim, 260, 4, 16
    codec = random_codec(layout, heads, torch.arange(dim // 2))
    table = torch.zeros(batch, max_pages, dtype=torch.int32)
    seq_lens = torch.full((batch,), 700, dtype=torch.int32)
    pages = [
        torch.zeros(4, heads, sk.PAGE_SIZE * x.bytes, dtype=torch.uint8)
        for x in (layout.k, layout.v)
    ]
    k_exact, v_exact = (torch.zeros(batch, heads, sinks + window, dim, dtype=dtype) for _ in "kv")
    x = torch.zeros(batch, heads, 128, dim, dtype=dtype)
    positions = torch.zeros(batch, 128, dtype=torch.int32)
    kept = {"sinks": sinks, "window": window}
    for queries in (1, 4) if thorough else (1,):  # a decode step, drafts
        new = x[:, :, :queries]
        q = torch.zeros(batch, group * heads, queries, dim, dtype=dtype)
        for ids in (None, torch.zeros_like(seq_lens)):  # some tokens a program, and one
            sk.append(
                new, new, codec, *pages, k_exact, v_exact, table, seq_lens, sinks=sinks,
                codec_ids=ids,
            )  # fmt: skip
        exact = {"exact": (k_exact, v_exact), "after_append": True}
        for num_splits in (2, 33):  # few and many are joined by other kernels
            for more in (exact, {}) if thorough else (exact,):
                sk.attend_spectral(
                    q, *pages, codec, table, seq_lens, num_splits=num_splits, matrix_units=matrix,
                    **kept, **more,
                )  # fmt: skip
        sk.attend_window(q, k_exact, v_exact, seq_lens, **kept)
    sk.rotate(x, positions, codec.freqs)
    sk.turn_back(x, positions, codec.freqs, frame=512)
    for side, data, exact in zip("kv", pages, (k_exact, v_exact), strict=True):
        sk.encode(x, codec, data, table, seq_lens, side=side, exact=exact, sinks=sinks)
        sk.decode(data, codec, table, seq_lens, side=side)
    o, lse = torch.zeros(2, 3, dim), torch.zeros(2, 3)
    sk.merge_states(o, lse, o, lse)
    sk.merge_many_states(o, lse)


def compile_all(
    capability: int, chosen: Sequence[Case], report: Callable[[Row], None], only: str = ""
) -> None:
    """Compile what the launchers would launch on a card of this capability in these cases, and
    report every kernel's row once. Launchers launch nothing afterwards."""
    recorder, matrix = Recorder(capability, report, only), capability >= 80
    _launch.KERNELS_ON_CPU = True
    _launch.is_native = lambda x: True
    _launch.has_matrix_units = lambda device: matrix
    _launch.overlaps_launches = lambda device: capability >= 90
    JITFunction.run = recorder.run_of
    for index, (preset, layout, group) in enumerate(chosen):
        recorder.case = {
            "preset": preset,
            "k": str(layout.k),
            "v": str(layout.v),
            "D": layout.head_dim,
            "group": group,
        }
        launch_all(
            layout,
            group,
            torch.bfloat16 if matrix else torch.float16,
            matrix,
            capability == 90 and index == 0,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("capability", nargs="*", type=int, default=CAPABILITIES)
    parser.add_argument(
        "--all", action="store_true", help="every head dimension, preset and group size"
    )
    parser.add_argument("--cases", type=int, metavar="N", help="only the first N")
    parser.add_argument(
        "--layout",
        nargs=4,
        metavar=("K", "V", "D", "GROUP"),
        help="one case of these bands, attention over its pages and the join alone",
    )
    parser.add_argument(
        "--list", action="store_true", help="print the names of all kernels as the first line"
    )
    arguments = parser.parse_args()
    if arguments.list:
        print(json.dumps(sorted(all_kernels())))
    chosen, only = cases(arguments.all)[: arguments.cases], ""
    if arguments.layout:
        k, v, dim, group = arguments.layout
        layout = sk.PageLayout(sk.Bands.parse(k), sk.Bands.parse(v), int(dim))
        chosen, only = [Case("-", layout, int(group))], "_spectral_kernel"
    for capability in arguments.capability:
        compile_all(
            capability,
            chosen,
            lambda row: print(json.dumps(row), flush=True),
            only,
        )


if __name__ == "__main__":
    main()
