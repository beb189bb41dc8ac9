"""What each kernel needs of each card, compiled here without one: `python -m perf.resources [CAPABILITY ...] [--few]`.

Writes perf/results/resources.jsonl, a row a kernel, capability and case (tests/compile_kernels.py has the cases): registers
a thread, bytes of local memory a thread (spills), shared memory a program, code size. Rows of other capabilities and
versions of triton stay.   Test: tests/test_compile.py.
"""

import argparse
import json
from typing import Any

import triton

from perf.tables import RESULTS, read_rows
from tests.compile_kernels import compile_all

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", nargs="*", type=int, default=CAPABILITIES)
    parser.add_argument("--few", action="store_true", help="only the cases that CI compiles")
    arguments = parser.parse_args()
    path = RESULTS / "resources.jsonl"
    for capability in arguments.capability:
        new: list[dict[str, Any]] = []
        compile_all(capability, arguments.few, lambda row, _, new=new: new.append(row))  # type: ignore[misc]
        here = (capability, triton.__version__)
        rows = [row for row in read_rows(path) if (row["capability"], row["triton"]) != here] + new
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"sm_{capability}: {sum(row['capability'] == capability for row in rows)} rows in {path}")


if __name__ == "__main__":
    main()
