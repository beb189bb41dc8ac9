"""What each kernel needs of each card, compiled here without one.

    python -m perf.resources [CAPABILITY ...] [--kernel NAME ...] [--few] [--jobs N]

Writes perf/results/resources.jsonl, a row a kernel, capability and case (tests/compile_kernels.py has the cases): warps,
registers a thread, bytes of local memory a thread (spills), loads and stores of it in innermost loops (loop_spills), shared
memory a program, code size. A kernel that is the same in several cases of a head dimension has one row, of the first.
A run replaces the rows that it would write itself (kernels, capabilities, cases, version of triton); others stay.
Test: tests/test_compile.py.
"""

import argparse
import itertools
import json
import multiprocessing
from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import triton

from perf.tables import RESULTS, read_rows
from tests.compile_kernels import DIMS, FIRST, cases, compile_all

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
ORDER = ("triton", "capability", "kernel", "D", "layout", "group")
Row = dict[str, Any]


def compiled(task: tuple[int, int], few: bool, kernels: Sequence[str]) -> tuple[int, list[Row]]:
    """The capability and its rows of one head dimension; in a process of its own: launchers launch nothing afterwards."""
    rows: list[Row] = []
    dim, capability = task
    chosen = [case for case in cases()[: FIRST if few else None] if case.layout.head_dim == dim]
    compile_all(capability, chosen, rows.append, kernels)
    return capability, rows


def replaced(rows: Sequence[Row], new: Sequence[Row], capability: int, few: bool, kernels: Collection[str]) -> list[Row]:
    """`rows`, with `new` instead of those that a run of this capability and this triton writes; sorted."""
    cases_of_ci = {(case.name, case.group) for case in cases()[:FIRST]}

    def old(row: Row) -> bool:
        return (
            (row["triton"], row["capability"]) == (triton.__version__, capability)
            and (not kernels or row["kernel"] in kernels)
            and (not few or (row["layout"], row["group"]) in cases_of_ci)
        )

    return sorted([row for row in rows if not old(row)] + list(new), key=lambda row: [row[name] for name in ORDER])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", nargs="*", type=int, default=CAPABILITIES)
    parser.add_argument("--kernel", nargs="+", default=(), metavar="NAME", help="only these kernels, as _rotate_kernel")
    parser.add_argument("--few", action="store_true", help="only the cases that CI has")
    parser.add_argument("--jobs", type=int, default=1, help="processes: a task is a capability and a head dimension")
    arguments = parser.parse_args()
    path = RESULTS / "resources.jsonl"
    path.parent.mkdir(exist_ok=True)
    compile_one = partial(compiled, few=arguments.few, kernels=arguments.kernel)
    tasks = list(itertools.product(sorted(DIMS, reverse=True), arguments.capability))  # the longest first
    found: dict[int, list[list[Row]]] = defaultdict(list)
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=1) as pool:
        for capability, part in pool.imap_unordered(compile_one, tasks, chunksize=1):
            found[capability].append(part)
            if len(found[capability]) < len(DIMS):
                continue
            new = [row for rows in found[capability] for row in rows]
            rows = replaced(read_rows(path), new, capability, arguments.few, arguments.kernel)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            print(f"sm_{capability}: {len(new)} rows in {path}", flush=True)


if __name__ == "__main__":
    main()
