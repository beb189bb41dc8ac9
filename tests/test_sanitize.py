"""tests/sanitize.py reads what compute-sanitizer says, and does not take silence for a pass."""

import json
import re

import pytest

from tests.sanitize import every_case, read_log, verdict

OURS = {"_append_kernel", "_encode_kernel"}
REPORT = {"cases": 2, "failed": [], "launches": dict.fromkeys(OURS, 3), "variants": []}
PLANTED = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at _planted_kernel+0x90 in sanitize.py:71
=========     by thread (0,0,0) in block (0,0,0)
=========     Access to 0x7f is out of bounds
"""
FOUND = """========= Uninitialized __global__ memory read of size 1 bytes
=========     at _append_kernel+0x3f0 in compress.py:580
=========     by thread (3,0,0) in block (0,0,0)
"""
TORCH = """========= Error: Race reported between Write access at at::native::sum<int>(int)+0x10
=========     and Read access at void at::native::sum<int>(int)+0x20 [4 hazards]
"""
SUMMARY = "========= ERROR SUMMARY: 32 errors\n========= RACECHECK SUMMARY: 0 hazards displayed\n"


def log_of(*parts: str, **changes) -> tuple:
    text = f"REPORT {json.dumps(REPORT | changes)}\n" + "".join(parts) + SUMMARY
    return read_log(text, OURS)


def test_a_clean_log_is_clean():
    log = log_of(PLANTED)
    assert log.planted and not log.findings and not log.elsewhere
    assert verdict([log], OURS) == []


@pytest.mark.parametrize(
    ("log", "why"),
    [
        (log_of(), "saw no kernel"),
        (log_of(PLANTED, FOUND), "found: Uninitialized .* at _append_kernel"),
        (log_of(PLANTED, "========= Internal Sanitizer Error: no memory\n"), "found: Internal"),
        (log_of(PLANTED, "========= Error: Device not supported\n"), "found: Error"),
        (log_of(PLANTED, launches={"_append_kernel": 1}), "never launched: .*_encode_kernel"),
        (log_of(PLANTED, failed=["append 3: AssertionError"]), "case failed: append 3"),
        (read_log(PLANTED, OURS), "ended before its report"),
    ],
)
def test_what_is_wrong_is_said(log, why):
    found = verdict([log_of(PLANTED), log] if "never" not in why else [log], OURS)
    assert len(found) == 1 and re.match(rf".*{why}", found[0]), found


def test_other_kernels_are_told_apart():
    log = log_of(PLANTED, TORCH)
    assert len(log.elsewhere) == 1 and verdict([log], OURS) == []


def test_cases_have_names_of_their_own():
    names = [name for name, _ in every_case()]
    assert len(names) == len(set(names)) > 60
