"""Machine code of a compiled kernel: its resources, its instructions with their control fields, and its loops.

Source of the control fields (from Volta on, bits 105 to 121 of an instruction's 128): Jia et al., Dissecting the NVIDIA
Volta GPU Architecture via Microbenchmarking (2018), section 2.   Test: tests/test_compile.py.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NO_BARRIER = 7
LOCAL = ("LDL", "STL")


class Instruction(NamedTuple):
    """stall: clocks until the warp's next instruction at the earliest; write, read: the scoreboard that is released when
    its result is there, or its operands are read (NO_BARRIER: none); wait: a bit for each scoreboard it waits for."""

    at: int
    name: str  # with modifiers, as LDG.E.128
    operands: str
    predicated: bool
    stall: int
    write: int
    read: int
    wait: int

    @property
    def operation(self) -> str:
        """The name without modifiers."""
        return self.name.split(".")[0]

    @property
    def target(self) -> int | None:
        """The address that a branch goes to. A predicated call is a jump out of a loop; from others one comes back."""
        jumps = self.operation == "BRA" or (self.operation == "CALL" and self.predicated)
        match = re.search(r"0x([0-9a-f]+)", self.operands) if jumps else None
        return int(match[1], 16) if match else None


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of local memory a thread (spills)."""
    text = _dump(cubin, "-res-usage")
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert match is not None, text
    return int(match[1]), int(match[2])


def parse(sass: str) -> list[Instruction]:
    """The instructions of `cuobjdump -sass`, in order."""
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);\s+/\* 0x\w+ \*/\s+/\* 0x(\w+) \*/"
    code = []
    for at, predicate, name, operands, high in re.findall(pattern, sass):
        bits = int(high, 16) >> 41
        fields = bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63
        code.append(Instruction(int(at, 16), name, operands.strip(), bool(predicate), *fields))
    return code


def instructions(cubin: bytes) -> list[Instruction]:
    code = parse(_dump(cubin, "-sass"))
    assert code, "no instructions"
    return code


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops: what lies between a branch and an earlier address it goes to, with no other loop inside.

    A branch over the kernel's end is none: it comes back from code that was put there.
    """
    ends = [i.at for i in code if i.operation == "EXIT" and not i.predicated]
    spans = [(i.target, i.at) for i in code if i.target is not None and i.target < i.at]
    spans = [(first, last) for first, last in spans if not any(first < end < last for end in ends)]
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[i for i in code if first <= i.at <= last] for first, last in inner]


def loop_spills(code: list[Instruction]) -> int:
    """Loads and stores of local memory in innermost loops."""
    return sum(i.operation in LOCAL for loop in loops(code) for i in loop)
