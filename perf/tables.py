"""README's tables from the rows of perf/results: `python -m perf.tables` writes them, `--plot PNG` draws a plot.

A table stands in README between `<!-- table: NAME -->` and `<!-- end of table -->` and comes from perf/results/NAME.jsonl.
Rows are appended by the measurements; of rows about the same thing the last one counts.   Test: tests/test_perf.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from perf._cases import LAYOUTS
from perf._timing import ROOT

RESULTS = ROOT / "perf" / "results"
Row = dict[str, Any]
ATTENTION_KEY = ("gpu", "B", "H", "G", "D", "T", "layout")
MARKED = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def latest(rows: Iterable[Row], key: Sequence[str]) -> list[Row]:
    """The last row of each key, in order of the keys."""
    found = {tuple(row[name] for name in key): row for row in rows}
    return [found[k] for k in sorted(found)]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *lines))


def attention_table(rows: Iterable[Row]) -> str:
    """A line a card and shape: the best dense peer, and for each layout microseconds, speed-up and share of the bandwidth.

    All shapes of 32/8 heads with D = 128; of others those of 32K tokens.
    """
    shapes: dict[tuple, dict[str, Row]] = {}
    for row in latest(rows, ATTENTION_KEY):
        if (row["H"], row["G"], row["D"]) == (32, 8, 128) or row["T"] == 32768:
            shapes.setdefault(tuple(row[name] for name in ATTENTION_KEY[:-1]), {})[row["layout"]] = row
    if not shapes:
        return "No row yet: `python -m perf.attention --json` on a CUDA card, then `python -m perf.tables`.\n"

    def main_first(shape: tuple) -> tuple:
        gpu, batch, heads, groups, dim, tokens = shape
        return gpu, (heads, groups, dim) != (32, 8, 128), heads, groups, dim, batch, tokens

    lines = []
    for shape in sorted(shapes, key=main_first):
        gpu, batch, heads, groups, dim, tokens = shape
        own = shapes[shape]
        peer = next((row for row in own.values() if row["best_peer"] is not None), None)
        cells = [gpu, f"{heads}/{groups}", str(dim), str(batch), f"{tokens:,}"]
        cells.append("-" if peer is None else f"{peer['best_peer_us']:.4g} {peer['best_peer']}")
        for layout in LAYOUTS:
            row = own.get(layout, {})
            if not row:
                cells.append("-")
                continue
            speedup = "" if row["speedup"] is None else f", **{row['speedup']:.2f}x**"
            share = "" if row["read_share"] is None else f", {row['read_share']:.0%}"
            cells.append(f"{row['p50_us']:.4g}{speedup}{share}")
        lines.append(cells)
    commits = sorted({row["commit"] for own in shapes.values() for row in own.values()})
    header = ["card", "H/G", "D", "B", "T", "best dense peer, us", *LAYOUTS]
    return f"{markdown(header, lines)}\nMeasured at {', '.join(commits)}.\n"


TABLES: dict[str, Callable[[Iterable[Row]], str]] = {"attention": attention_table}


def fill(text: str, results: Path = RESULTS) -> str:
    """README's text with every table written from its rows.

    Raises:
        ValueError: a table is asked for that nobody makes.
    """

    def filled(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise ValueError(f"table: expected one of {sorted(TABLES)}, got {name!r}")
        return f"{match[1]}\n{TABLES[name](read_rows(results / f'{name}.jsonl'))}\n{match[4]}"

    return MARKED.sub(filled, text)


def plot_attention(rows: Iterable[Row], path: Path) -> None:
    """Speed-up of a decode step over the best dense peer against T, a panel a batch size: 32/8 heads, D = 128."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [
        row
        for row in latest(rows, ATTENTION_KEY)
        if (row["H"], row["G"], row["D"]) == (32, 8, 128) and row["speedup"] is not None
    ]
    if not shown:
        raise ValueError("rows: expected some of 32/8 heads and D = 128 with a speed-up, got none")
    batches = sorted({row["B"] for row in shown})
    figure, axes = pyplot.subplots(1, len(batches), figsize=(3.2 * len(batches), 3.2), sharey=True, squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        for style, gpu in enumerate(sorted({row["gpu"] for row in shown})):
            for color, layout in enumerate(LAYOUTS):
                points = [(r["T"], r["speedup"]) for r in shown if (r["gpu"], r["B"], r["layout"]) == (gpu, batch, layout)]
                if points:
                    look = {"color": f"C{color}", "linestyle": ("-", "--", ":", "-.")[style % 4], "marker": "o"}
                    axis.plot(*zip(*points, strict=True), label=f"{layout}, {gpu}", **look)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", xlabel="tokens T", title=f"B = {batch}")
        ticks = sorted({row["T"] for row in shown})
        axis.set_xticks(ticks, [f"{t // 1024}K" for t in ticks], minor=False)
        axis.minorticks_off()
    axes[0][0].set_ylabel("speed-up over the best peer")
    # Of all panels: a card may have no row of some.
    lines = dict(pair[::-1] for axis in axes[0] for pair in zip(*axis.get_legend_handles_labels(), strict=True))
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=len(LAYOUTS), fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.tables", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--plot", type=Path, help="also draw the speed-up of attention as PNG (needs matplotlib)")
    args = parser.parse_args(argv)
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text()))
    if args.plot:
        plot_attention(read_rows(RESULTS / "attention.jsonl"), args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
