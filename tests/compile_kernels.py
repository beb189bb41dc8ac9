"""Compile every kernel for cards that are not there: `python -m tests.compile_kernels CAPABILITY ...` (75 80 86 89 90 100
120; --few: the layouts that CI has time for). `python -m perf.resources` keeps the rows.

Launchers run on CPU tensors with `JITFunction.run` replaced: what they would launch is compiled for the capability instead,
and one JSON line a kernel and case says what it needs. Runs in a process of its own, without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import spectral_kernels as sk
from spectral_kernels import _launch
from spectral_kernels.eigen import eigenvectors

TYPES = {
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of local memory a thread (spills)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert match is not None, text
    return int(match[1]), int(match[2])


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


class Recorder:
    """Stands in for JITFunction.run: compiles for the target, launches nothing."""

    def __init__(self, capability: int, report: Callable[[dict[str, Any], Any], None]) -> None:
        """report: called with the row and the compiled kernel."""
        self.capability = capability
        self.report = report
        self.case: dict[str, Any] = {}
        self.seen: set[str] = set()
        # A plain function, so that it binds to the kernel when it stands in for the method.
        self.run_of = lambda function, *args, **kwargs: self.run(function, *args, **kwargs)

    def run(self, function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
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
        if key in self.seen:
            return
        self.seen.add(key)
        source = ASTSource(function, signature, constexprs=constants, attrs=attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        check_operand_lanes(kernel.asm["ttgir"])
        registers, local = resources(kernel.asm["cubin"])
        row = {
            "kernel": function.__name__,
            "capability": self.capability,
            "triton": triton.__version__,
            **self.case,
            "registers": registers,
            "spills": local,
            "shared_bytes": kernel.metadata.shared,
            "code_bytes": len(kernel.asm["cubin"]),
        }
        self.report(row, kernel)


def cases(few: bool) -> Iterator[tuple[str, sk.PageLayout, int]]:
    """Name, page layout and query heads a KV head: all presets, or the few that CI has time for."""
    for preset in ("quality", "balanced", "small"):
        for dim in (64, 128, 256):
            layout = sk.PRESETS[preset].layout(dim)
            assert layout is not None
            for group in (1, 4, 6, 8):
                if not few or (preset, dim, group) in {("small", 64, 6), ("balanced", 128, 4), ("quality", 256, 1)}:
                    yield f"{preset} {layout.k} {layout.v}", layout, group
    lossless = sk.PageLayout(sk.Bands.parse("64x16"), sk.Bands.parse("64x16"), 64, 64)
    yield f"lossless {lossless.k} {lossless.v}", lossless, 1


def launch_all(layout: sk.PageLayout, group: int, dtype: torch.dtype, matrix: bool) -> None:
    """Call every launcher once on small CPU tensors."""
    batch, kv_heads, dim, chunk = 2, 2, layout.head_dim, layout.chunk
    pages = sk.allocate_pages(
        layout, pages=4, segments=2, kv_heads=kv_heads, batch=batch, max_chunks=2, device=torch.device("cpu")
    )
    rope = sk.Rope.from_inv_freq(torch.full((dim // 2,), 0.5))
    q = torch.zeros(batch, group * kv_heads, 1, dim, dtype=dtype)
    positions = torch.full((batch, 1), 2 * chunk, dtype=torch.int32)
    x = torch.zeros(batch, kv_heads, 2 * chunk, dim, dtype=dtype)
    key_positions = torch.arange(2 * chunk, dtype=torch.int32).repeat(batch, 1)
    exact = (x, x, key_positions)
    sk.attend_spectral(q, positions, pages, rope, exact=exact, matrix_units=matrix)
    sk.attend_exact(q, positions, *exact, rope, chunk=chunk, matrix_units=matrix)
    sk.project_queries(q, positions, pages, rope)
    sk.rotate(x, key_positions, rope)
    sk.phase_align(x, key_positions, rope, chunk=chunk)
    sk.gram(x)
    eigenvectors(torch.eye(dim, dtype=torch.float64))
    for side, bands, data in (("k", layout.k, pages.k_pages), ("v", layout.v, pages.v_pages)):
        encoder = torch.zeros(batch, kv_heads, dim, bands.rank)
        sk.encode(x, encoder, bands, data, pages.page_table, side=side)
        sk.decode(pages, side=side)
    o, lse = torch.zeros(2, 3, dim), torch.zeros(2, 3)
    sk.merge_states(o, lse, o, lse)
    sk.merge_many_states(o, lse)


def compile_all(
    capability: int, few: bool, report: Callable[[dict[str, Any], Any], None], only: str = "", old: bool = False
) -> None:
    """Compile what the launchers would launch on a card of this capability; `only`: layouts whose name begins so; `old`: by
    the path of cards before sm_80.

    For the rest of the process launchers launch nothing.
    """
    matrix = capability >= 80 and not old
    _launch.KERNELS_ON_CPU = True
    _launch.is_native = lambda x: True
    _launch.has_matrix_units = lambda device: matrix
    recorder = Recorder(capability, report)
    JITFunction.run = recorder.run_of
    for name, layout, group in cases(few):
        if name.startswith(only):
            recorder.case = {
                "layout": name,
                "D": layout.head_dim,
                "group": group,
                "token_bytes": layout.token_bytes,
                "align": layout.align,
            }
            launch_all(layout, group, torch.bfloat16 if matrix else torch.float16, matrix)


def main() -> None:
    for capability in (int(arg) for arg in sys.argv[1:] if arg.isdigit()):
        compile_all(capability, "--few" in sys.argv, lambda row, _: print(json.dumps(row), flush=True))


if __name__ == "__main__":
    main()
