"""What each kernel needs of each card, compiled here without one.

    python -m perf.resources [CAPABILITY ...] [--kernel NAME ...] [--few] [--jobs N]

Writes perf/results/resources.jsonl, a row a kernel, capability and case (tests/compile_kernels.py has the cases): warps,
registers a thread, bytes of local memory a thread (spills), loads and stores of it in innermost loops (loop_spills), shared
memory a program, code size. A run replaces the rows of the kernels, capabilities and version of triton that it compiled;
others stay. All of it takes minutes a capability and core; --jobs.   Test: tests/test_compile.py.
"""

import argparse
import json
import multiprocessing
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import triton

from perf.tables import RESULTS, read_rows
from tests.compile_kernels import cases, compile_all

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)


def compiled(task: tuple[int, str], few: bool, kernels: Sequence[str]) -> tuple[int, list[dict[str, Any]]]:
    """The capability and the rows of one layout; in a process of its own, as launchers launch nothing afterwards."""
    rows: list[dict[str, Any]] = []
    capability, layout = task
    compile_all(capability, few, rows.append, kernels, (layout,))
    return capability, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", nargs="*", type=int, default=CAPABILITIES)
    parser.add_argument("--kernel", nargs="+", default=(), metavar="NAME", help="only these kernels, as _rotate_kernel")
    parser.add_argument("--few", action="store_true", help="only the cases that CI compiles")
    parser.add_argument("--jobs", type=int, default=1, help="layouts at a time")
    arguments = parser.parse_args()
    path = RESULTS / "resources.jsonl"
    path.parent.mkdir(exist_ok=True)
    compile_one = partial(compiled, few=arguments.few, kernels=arguments.kernel)
    layouts = list(dict.fromkeys(name for name, _, _ in cases(arguments.few)))
    tasks = [(capability, layout) for capability in arguments.capability for layout in layouts]
    found: dict[int, list[list[dict[str, Any]]]] = defaultdict(list)
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=1) as pool:
        for capability, part in pool.imap(compile_one, tasks, chunksize=1):
            found[capability].append(part)
            if len(found[capability]) < len(layouts):
                continue
            new = [row for rows in found[capability] for row in rows]
            done = {(row["kernel"], capability, triton.__version__) for row in new}
            rows = [row for row in read_rows(path) if (row["kernel"], row["capability"], row["triton"]) not in done] + new
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            print(f"sm_{capability}: {len(new)} rows in {path}", flush=True)


if __name__ == "__main__":
    main()
