"""Every kernel compiles for every supported card, on a machine that has none, and stays within what
the card has."""

import json
import os
import subprocess
import sys

import pytest

from tests.compile_kernels import CAPABILITIES, loop_spills, loops, parse

# Shared memory a block may use, bytes (CUDA programming guide, table of compute capabilities).
SHARED_LIMIT = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
OLD_CARDS = {
    "_attend_operands_kernel",
    "_project_operand_kernel",
}  # instead of the first of NEW_CARDS
NEW_CARDS, JOIN = {"_attend_spectral_kernel"}, {"_finish_spectral_kernel"}
THOROUGH = {75, 90}  # CI has time for more cases of these; the others differ little from them


def compiled(*arguments: str) -> tuple[set[str], list[dict]]:
    """Names of all kernels, and rows; in a process that compiles: without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.compile_kernels", "--list", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    names, *rows = map(json.loads, result.stdout.splitlines())
    return set(names), rows


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile(capability: int) -> None:
    """All of them, within the card's registers and shared memory, and without spills in loops."""
    names, rows = compiled(str(capability), "--cases", "3" if capability in THOROUGH else "1")
    wanted = names - (NEW_CARDS if capability < 80 else OLD_CARDS)
    assert wanted == {row["kernel"] for row in rows}
    assert names >= OLD_CARDS | NEW_CARDS
    for row in rows:
        assert row["capability"] == capability
        assert 0 < row["registers"] <= 255, row
        assert row["shared_bytes"] <= SHARED_LIMIT[capability] * 1024, row
        assert row["loop_spills"] == 0, row


@pytest.mark.parametrize("bands", ["64x4+128x2 256x2", "16x8+112x4+128x2 64x2"])
def test_wide_pages_fit_small_shared_memory(bands: str) -> None:
    """The widest V and the widest K that a plan has, on a card with 99 KB: the projection holds the
    basis and the queries of its frames, the join the states of several splits and queries."""
    _, rows = compiled("86", "--layout", *bands.split(), "256", "8")
    assert {row["kernel"] for row in rows} == NEW_CARDS | JOIN
    assert all(row["shared_bytes"] <= SHARED_LIMIT[86] * 1024 for row in rows), rows
    assert not any(row["loop_spills"] for row in rows), rows


@pytest.mark.parametrize(("dim", "group", "wanted"), [(128, 4, 2), (128, 8, 4), (256, 4, 4)])
def test_pages_are_asked_of_l2(dim: int, group: int, wanted: int) -> None:
    """K's and V's of the first turn; of the next turns, too, where L2 holds those of all programs:
    these are fewer where each serves more queries, or has more warps."""
    _, rows = compiled("100", "--layout", "32x4+64x2", "32x4+64x2", str(dim), str(group))
    rows = [row for row in rows if row["kernel"] not in JOIN]
    assert rows and all(row["l2_requests"] == wanted for row in rows), rows


LOOP = """
        /*0000*/                   STL [R1], R2 ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   LDL R6, [R1+0x8] ;
        /*0028*/              @P2  BRA.U.ANY 0x20 ;
        /*0030*/              @P0  BRA 0x10 ;
        /*0040*/              @P1  BRA 0x60 ;
        /*0050*/                   STL [R1], R2 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70 ;
"""


def test_spills_in_loops_are_seen() -> None:
    """Not those before and after the loop; a warp's threads that take turns, and the jump to itself
    after the kernel's end, are no loops of it."""
    code = parse(LOOP)
    assert [i.name for i in code[:3]] == ["STL", "LDG.E.128", "LDL"]
    assert (code[4].predicated, code[4].target, code[8].target) == (True, 16, 112)
    assert [[i.at for i in loop] for loop in loops(code)] == [[16, 32, 40, 48]]
    assert loop_spills(code) == 1
