"""A lower bound of the time of the cold kernels from their machine code: `python -m perf.predict [--layout NAME]`.

The kernel is compiled for the card (no GPU is needed), the instructions of its loop over tiles are counted by the unit that
executes them, and the time of a token and KV head is the largest of

    bytes / memory bandwidth        instructions / issue slots        instructions of a unit / its lanes

with the public figures of CARDS, for D = 128 and 4 query heads a KV head. Latency, the join of the splits and (but for the
issue slots of the path of cards before sm_80, `project`) the projection of the queries are not counted: a measured time is
longer. Dense: 512 bytes a token at the same bandwidth. `(old)`: that path on a newer card.
"""

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from typing import Any, NamedTuple

from perf.tables import RESULTS, read_rows
from tests.compile_kernels import CUOBJDUMP, compile_all

DENSE_BYTES = 512
TILE = 64  # tokens of a turn of the loop
KERNELS = ("_attend_operands_kernel", "_attend_spectral_kernel", "_project_operand_kernel")


class Card(NamedTuple):
    """NVIDIA's data sheets and the throughput table of the CUDA programming guide."""

    capability: int
    multiprocessors: int
    hertz: float
    bytes_per_second: float
    float_lanes: int  # float32 a clock and multiprocessor
    integer_lanes: int
    int8_products: int  # multiply-adds of the matrix units a clock and multiprocessor


CARDS = {
    "T4": Card(75, 40, 1.59e9, 320e9, 64, 64, 1024),
    "A10G": Card(86, 80, 1.71e9, 600e9, 128, 64, 1024),
    "L4": Card(89, 58, 2.04e9, 300e9, 128, 64, 1024),
    "A100": Card(80, 108, 1.41e9, 2039e9, 64, 64, 2048),
    "H100": Card(90, 132, 1.83e9, 3350e9, 128, 64, 4096),
    "H200": Card(90, 132, 1.83e9, 4800e9, 128, 64, 4096),
}
SPECIAL_LANES, MEMORY_LANES = 16, 32  # sine, exp2, conversions; loads, stores and shuffles
UNITS = {
    "float": ("FADD", "FMUL", "FFMA", "IMAD"),
    "integer": ("IADD3", "LOP3", "SHF", "LEA", "PRMT", "SEL", "FSEL", "ISETP", "FSETP", "FMNMX", "MOV", "VIADD"),
    "special": ("MUFU", "I2F", "I2FP", "F2I"),
    "memory": ("LDG", "STG", "LDS", "STS", "LDSM", "STSM", "SHFL", "LDL", "STL"),
}


def instructions(cubin: bytes) -> list[tuple[int, str, str]]:
    """(address, name, operands) of each instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run([CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);"
    return [(int(at, 16), name, rest) for at, name, rest in re.findall(pattern, sass)]


def hot_loop(code: list[tuple[int, str, str]]) -> Counter[str]:
    """Instructions by name, with IMMA by shape, of the innermost loop that uses the matrix units."""
    loops = []
    for at, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            inside = [n for a, n, _ in code if int(target[1], 16) <= a <= at]
            if any(n.startswith("IMMA") for n in inside):
                loops.append(inside)
    assert loops, "no loop with matrix instructions"
    return Counter(".".join(n.split(".")[:2]) if n.startswith("IMMA") else n.split(".")[0] for n in min(loops, key=len))


def products(name: str) -> int:
    """Multiply-adds of an IMMA: its first field is M, N, K without separators, as 8816 or 16832."""
    shape = name.split(".")[1]
    return {"8816": 8 * 8 * 16, "16816": 16 * 8 * 16, "16832": 16 * 8 * 32}[shape]


def bounds(card: Card, loop: Counter[str], token_bytes: int) -> dict[str, float]:
    """Seconds a token and KV head that each limit takes by itself."""
    clocks = {"issue": sum(loop.values()) / 4}
    lanes = {"float": card.float_lanes, "integer": card.integer_lanes, "special": SPECIAL_LANES, "memory": MEMORY_LANES}
    for unit, names in UNITS.items():
        clocks[unit] = 32 * sum(loop[name] for name in names) / lanes[unit]
    clocks["matrix"] = sum(n * products(name) for name, n in loop.items() if name.startswith("IMMA")) / card.int8_products
    # "memory" are the instructions; "bytes" what they move.
    seconds = {unit: n / TILE / card.multiprocessors / card.hertz for unit, n in clocks.items()}
    return {"bytes": token_bytes / card.bytes_per_second, **seconds}


def measured(gpu: str, layout: str) -> float | None:
    """Seconds a token and KV head of the cold kernel in the largest measured case, if there is one."""
    found = [
        row
        for row in read_rows(RESULTS / "attention.jsonl")
        if gpu in row["gpu"] and row["layout"] == layout and (row["H"], row["G"], row["D"]) == (32, 8, 128)
    ]
    if not found or not (best := max(found, key=lambda row: row["B"] * row["T"]))["kernel_us"]:
        return None
    return best["kernel_us"] * 1e-6 / (best["B"] * best["G"] * best["T"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", default="balanced", help="a preset (default: balanced)")
    arguments = parser.parse_args()
    found: dict[str, tuple[list[tuple[int, str, str]], dict[str, Any]]] = {}

    def keep(row: dict[str, Any], kernel: Any) -> None:
        if row["kernel"] in KERNELS and (row["D"], row["group"]) == (128, 4):
            found[row["kernel"]] = instructions(kernel.asm["cubin"]), row

    print(f"picoseconds a token and KV head, {arguments.layout}")
    loops: dict[str, Counter[str]] = {}
    compiled = (0, False)
    for name, old in sorted(
        [(name, False) for name in CARDS] + [("H200", True)], key=lambda c: (CARDS[c[0]].capability, c)
    ):
        card = CARDS[name]
        old = old or card.capability < 80
        if (card.capability, old) != compiled:
            found.clear()
            compiled = (card.capability, old)
            compile_all(card.capability, True, keep, only=arguments.layout, old=old)
        code, row = found["_attend_operands_kernel" if old else "_attend_spectral_kernel"]
        loop = hot_loop(code)
        loops[f"sm_{card.capability}{' (old)' if old else ''}"] = loop
        each = bounds(card, loop, row["token_bytes"])
        limit = max(each, key=lambda unit: each[unit])
        total = each[limit]
        if old:
            slots = len(found["_project_operand_kernel"][0]) / row["align"] / 4
            each["project"] = slots / card.multiprocessors / card.hertz
            total += each["project"]
        dense = DENSE_BYTES / card.bytes_per_second
        seen = None if old and card.capability >= 80 else measured(name, arguments.layout)
        print(
            f"{name + (' (old)' if old else ''):11} {total * 1e12:6.1f} ({limit}), dense {dense * 1e12:6.1f}: "
            f"{dense / total:4.2f}x  measured {'-' if seen is None else format(seen * 1e12, '.1f'):>6}   "
            + "  ".join(f"{unit} {time * 1e12:.1f}" for unit, time in each.items())
        )
    for name, loop in loops.items():
        print(f"{name}: {sum(loop.values())} instructions a tile of {TILE} tokens: {dict(loop.most_common(9))}")


if __name__ == "__main__":
    main()
