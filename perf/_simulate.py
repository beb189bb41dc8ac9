"""How long a kernel takes on a card, by running its machine code through a model of one of the four schedulers of a
multiprocessor: nothing in it is fitted to a measurement of these kernels.

A scheduler issues one instruction a clock, of the first of its warps that may go on. A warp may when the clocks that ptxas
told it to stall are over, the scoreboards it waits for are free (both are in the instruction, see `_sass`), and the unit
has lanes left: 32 threads take 32 / (lanes / 4) clocks. Results of variable latency come after the latencies of `Card`.
Accesses of 16 bytes a lane in the loop over tiles are the pages: they queue for the scheduler's share of the card's memory
bandwidth and then take its latency. Others in that loop come from L2 (projected queries and tables, which were just written
or share a sector with the last one). Loads outside it take the latency of memory (each copy of the inputs is read once, and
L2 holds others by then) and none of its bandwidth, as their bytes are few.
A load that touches n lines of 128 bytes takes the load/store unit n clocks (`lines`).

What runs: the shortest way from the kernel's entry through the loops of `visits`, as often as it says, to its exit. What is
only run for rows with several segments, and the like, is not on it.

Not in it: misses of the instruction cache and of the TLB, bank conflicts, clocks other than the data sheet's, start and end
of a kernel (`predict.START`).

Sources: data sheets; CUDA programming guide (throughput of instructions, limits a multiprocessor); latencies: Luo et al.,
Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking (2024; A100, H100, and RTX 4090 for Ada
and sm_86), Jia et al., Dissecting the NVidia Turing T4 GPU via Microbenchmarking (2019).   Test: tests/test_compile.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from perf._sass import NO_BARRIER, Instruction

REGISTERS = 65536  # of a multiprocessor, each four bytes
SCHEDULERS = 4
WARP = 32
SPECIAL_LANES = 16  # sine, exp2, reciprocals, conversions; a clock and multiprocessor
L2_BYTES = 64  # a clock and multiprocessor
OTHER_LATENCY = 25  # of shuffles, special functions, conversions, constants and barriers: 20 to 30 in the sources
OPERANDS_READ = 10  # clocks until a load or store has read its address and data
UNITS = {
    "float": ("FADD", "FMUL", "FFMA", "IMAD"),
    "integer": (
        "IADD3", "LOP3", "SHF", "LEA", "PRMT", "SEL", "FSEL", "ISETP", "FSETP", "FMNMX", "IMNMX", "VIMNMX", "MOV", "VIADD",
        "I2FP", "PLOP3",
    ),
    "special": ("MUFU", "I2F", "F2I", "F2F"),
    "access": ("LDG", "LDGSTS", "STG", "LDS", "STS", "LDSM", "STSM", "SHFL", "LDL", "STL"),
    "matrix": ("IMMA", "HMMA"),
}  # fmt: skip
UNIT_OF = {operation: unit for unit, operations in UNITS.items() for operation in operations}


class Card(NamedTuple):
    """A card's figures; lanes, products and limits are those of a multiprocessor, latencies in clocks."""

    capability: int
    multiprocessors: int
    hertz: float
    bytes_per_second: float
    float_lanes: int
    integer_lanes: int
    access_lanes: int  # of the load/store units
    int8_products: int  # multiply-adds of the matrix units a clock
    programs: int
    shared_bytes: int
    shared_latency: int
    l2_latency: int
    memory_latency: int


CARDS = {
    "T4": Card(75, 40, 1.59e9, 320e9, 64, 64, 16, 1024, 16, 64 << 10, 19, 188, 616),
    "A10G": Card(86, 80, 1.71e9, 600e9, 128, 64, 32, 1024, 16, 100 << 10, 30, 273, 542),
    "L4": Card(89, 58, 2.04e9, 300e9, 128, 64, 32, 1024, 24, 100 << 10, 30, 273, 542),
    "A100": Card(80, 108, 1.41e9, 2039e9, 64, 64, 32, 2048, 32, 164 << 10, 29, 262, 466),
    "H100": Card(90, 132, 1.83e9, 3350e9, 128, 64, 32, 4096, 32, 228 << 10, 29, 263, 479),
    "H200": Card(90, 132, 1.83e9, 4800e9, 128, 64, 32, 4096, 32, 228 << 10, 29, 263, 479),
}


@dataclass(frozen=True)
class Launch:
    """A kernel's launch: its code, programs, warps of a program, registers a thread, shared memory a program in bytes."""

    code: list[Instruction]
    programs: int
    warps: int
    registers: int
    shared_bytes: int


class Estimate(NamedTuple):
    seconds: float
    issue: float  # share of the issue slots that are used
    resident: int  # warps of a scheduler at a time


def width(i: Instruction) -> int:
    """Bytes a lane of a load or store."""
    fields = i.name.split(".")
    for size, names in ((16, {"128"}), (8, {"64"}), (2, {"U16", "S16", "16"}), (1, {"U8", "S8"})):
        if names & set(fields):
            return size
    return 4


def products(i: Instruction) -> int:
    """Multiply-adds of a matrix instruction: a field is M, N, K without separators, as 8816 or 16832."""
    shape = i.name.split(".")[1]
    return {"884": 256, "1688": 1024, "8816": 1024, "16816": 2048, "16832": 4096}[shape]


def clocks(card: Card, i: Instruction, lines: Mapping[tuple[str, int], int]) -> float:
    """Clocks that a scheduler's share of the instruction's unit is taken."""
    unit = UNIT_OF.get(i.operation)
    if unit is None:
        return 0.0
    if unit == "matrix":
        rate = card.int8_products if i.operation == "IMMA" else card.int8_products / 2
        return products(i) * SCHEDULERS / rate
    if unit == "access":
        size = width(i)
        wide = SCHEDULERS * WARP / card.access_lanes * max(1, size // 4)
        return max(wide, SCHEDULERS * lines.get((i.operation, size), 1))
    lanes = {"float": card.float_lanes, "integer": card.integer_lanes, "special": SPECIAL_LANES}[unit]
    return WARP * SCHEDULERS / lanes


def trace(code: list[Instruction], visits: Sequence[tuple[list[Instruction], int]]) -> list[Instruction]:
    """The instructions that run: see the module. visits: loops in order, and how often each runs."""
    index = {i.at: n for n, i in enumerate(code)}
    last = max(n for n, i in enumerate(code) if i.operation == "EXIT")

    def following(n: int) -> list[int]:
        i = code[n]
        ends = (i.operation == "EXIT" and not i.predicated) or n + 1 == len(code)
        if i.target is None:
            return [] if ends else [n + 1]
        conditional = i.predicated or "," in i.operands
        return ([n + 1] if conditional else []) + [index[i.target]]

    def shortest(start: int, goal: int) -> list[int] | None:
        before: dict[int, int | None] = {start: None}
        queue = [start]
        for n in queue:
            if n == goal:
                break
            for m in following(n):
                if m not in before:
                    before[m] = n
                    queue.append(m)
        if goal not in before:
            return None
        way: list[int] = []
        at: int | None = goal
        while at is not None:
            way.append(at)
            at = before[at]
        return way[::-1]

    out: list[Instruction] = []
    here = 0
    for loop, times in visits:
        first = index[loop[0].at]
        way = shortest(here, first)
        if way is not None:  # else one of a branch not taken
            out += [code[n] for n in way[:-1]] + loop * times
            here = first + len(loop)
    end = shortest(here, last)
    assert end is not None, "no way to the kernel's end"
    return out + [code[n] for n in end]


@dataclass
class _Warp:
    ready: float
    at: int = 0
    boards: list[list[float]] = field(default_factory=lambda: [[] for _ in range(6)])
    copies: float = 0.0  # when its asynchronous copies will be there

    def may_go(self, i: Instruction) -> float:
        """The clock from which the instruction finds its operands."""
        t = self.ready
        for n in range(6):
            if i.wait >> n & 1 and self.boards[n]:
                t = max(t, max(self.boards[n]))
        if i.name == "DEPBAR.LE":  # all but the last so many
            board, count = re.match(r"SB(\d), 0x([0-9a-f]+)", i.operands).groups()  # type: ignore[union-attr]
            left = sorted(self.boards[int(board)])
            if len(left) > int(count, 16):
                t = max(t, left[-1 - int(count, 16)])
        return t

    def hold(self, board: int, now: float, until: float) -> None:
        if board < len(self.boards):
            self.boards[board] = [t for t in self.boards[board] if t > now] + [until]


def estimate(
    card: Card,
    launch: Launch,
    visits: Sequence[tuple[list[Instruction], int]],
    streams: Collection[int] = (),
    lines: Mapping[tuple[str, int], int] = {},
) -> Estimate:
    """The time of a launch.

    streams: addresses of the loop over tiles, where pages are read.
    lines: of 128 bytes that loads or stores of (operation, bytes a lane) touch, where it is not one.
    """
    work = trace(launch.code, visits)
    registers = -(-launch.registers // 8) * 8 * WARP * launch.warps
    fit = min(REGISTERS // registers, card.programs, card.shared_bytes // max(1, launch.shared_bytes))
    resident = max(1, fit * launch.warps // SCHEDULERS)
    waiting = math.ceil(launch.programs * launch.warps / (card.multiprocessors * SCHEDULERS))
    busy = min(card.multiprocessors * SCHEDULERS, launch.programs * launch.warps)
    rate = min(card.bytes_per_second / card.hertz / busy, L2_BYTES)  # bytes a clock
    cost = {i: clocks(card, i, lines) for i in set(work)}
    free = dict.fromkeys(UNITS, 0.0)
    memory = now = 0.0
    warps = [_Warp(0.0) for _ in range(min(waiting, resident))]
    waiting -= len(warps)
    issued = 0
    while warps:
        best, chosen = math.inf, warps[0]
        for warp in warps:
            i = work[warp.at]
            unit = UNIT_OF.get(i.operation)
            t = max(now, warp.may_go(i), free[unit] if unit else 0.0)
            if t < best:
                best, chosen = t, warp
                if t <= now:
                    break
        i, t = work[chosen.at], best
        now, issued = t + 1, issued + 1
        if unit := UNIT_OF.get(i.operation):
            free[unit] = t + cost[i]
        done = t + OTHER_LATENCY
        if i.operation in ("LDG", "LDGSTS"):
            if i.at not in streams:
                done = t + card.memory_latency
            elif width(i) < 16:
                done = t + card.l2_latency
            else:
                memory = max(memory, t) + 16 * WARP / rate
                done = memory + card.memory_latency
            chosen.copies = max(chosen.copies, done)
        elif i.operation == "LDGDEPBAR":
            done = max(t + 1, chosen.copies)
        elif i.operation in ("LDS", "LDSM"):
            done = t + card.shared_latency
        if i.write != NO_BARRIER:
            chosen.hold(i.write, now, done)
        if i.read != NO_BARRIER:
            chosen.hold(i.read, now, t + OPERANDS_READ)
        chosen.ready = t + (OTHER_LATENCY if i.operation == "BAR" else max(1, i.stall))
        chosen.at += 1
        if chosen.at == len(work):
            warps.remove(chosen)
            if waiting:
                warps.append(_Warp(now))
                waiting -= 1
    return Estimate(now / card.hertz, issued / now, min(resident, math.ceil(issued / len(work))))
