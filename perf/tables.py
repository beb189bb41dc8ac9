"""Tables and plots from the rows of perf/results: `python -m perf.tables [FILE ...]` prints every
table; `--readme` writes those that README has a place for; `--plot FOLDER` draws plots.

A table stands in README between `<!-- table: NAME -->` and `<!-- end of table -->` and comes from
perf/results/NAME.jsonl. Rows are appended by the measurements; of rows about the same thing the
last one counts.   Test: tests/test_perf.py.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from perf._timing import RESULTS, ROOT, Row, read_rows

ATTENTION_KEY = ("gpu", "B", "H", "G", "D", "T", "path", "preset")
END_KEY = ("gpu", "shape", "B", "T", "what", "preset")
QUALITY_KEY = ("model", "scheme", "context", "text", "task")
LENGTHS = (4096, 32768, 131072)  # at which bytes of a cache are compared
PRESETS = ("exact", "quality", "balanced", "small")
MARKED = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
NO_ROWS = "No row yet: `python -m perf.{} --json` on a CUDA card, then `perf.tables --readme`.\n"


def latest(rows: Iterable[Row], key: Sequence[str]) -> list[Row]:
    """The last row of each key, in order of the keys."""
    found = {tuple(row.get(name) for name in key): row for row in rows}
    return [found[k] for k in sorted(found, key=lambda k: [(x is not None, x) for x in k])]


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "".join(
        f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *lines)
    )


def of_commits(rows: Iterable[Row]) -> str:
    return f"\nMeasured at {', '.join(sorted({row['commit'] for row in rows}))}.\n"


def attention_table(rows: Iterable[Row]) -> str:
    """A line a card, shape and path: the best dense peer; of each preset microseconds, speed-up,
    share of the bandwidth."""
    rows = latest(rows, ATTENTION_KEY)
    if not rows:
        return NO_ROWS.format("attention")
    shapes: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        shapes.setdefault(tuple(row[name] for name in ATTENTION_KEY[:-1]), {})[row["preset"]] = row
    lines = []
    for (gpu, batch, heads, groups, dim, tokens, path), found in shapes.items():
        peer = next((row for row in found.values() if row["best_peer"]), None)
        cells = [gpu, f"{heads}/{groups}", str(dim), str(batch), f"{tokens:,}", path]
        cells.append("-" if peer is None else f"{peer['best_peer_us']:.4g} {peer['best_peer']}")
        for preset in PRESETS[1:]:
            if preset not in found:
                cells.append("-")
                continue
            row = found[preset]
            speedup = "" if row["speedup"] is None else f", **{row['speedup']:.2f}x**"
            cells.append(f"{row['p50_us']:.4g}{speedup}, {row['read_share']:.0%}")
        lines.append(cells)
    header = ["card", "H/G", "D", "B", "T", "path", "best dense peer, us", *PRESETS[1:]]
    return markdown(header, lines) + of_commits(rows)


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """(intercept, slope) of the least squares line; None of fewer than two points."""
    if len({x for x, _ in points}) < 2:
        return None
    slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
    return intercept, slope


def break_even(dense: tuple[float, float] | None, ours: tuple[float, float] | None) -> str:
    """The length from which on a line lies below another, in words."""
    if dense is None or ours is None:
        return "-"
    gap, gain = ours[0] - dense[0], dense[1] - ours[1]
    if gain <= 0:
        return "none" if gap >= 0 else "below"
    return "any" if gap <= 0 else f"{gap / gain:,.0f}"


def end_to_end_table(rows: Iterable[Row]) -> str:
    """A line a batch size and measurement: ms a token at each length, intercept and slope of a line
    through them, break-even length against the dense graph (compiled where they are), and of the
    longest length the share of the ceiling: bytes of weights and cache at the read bandwidth of the
    same run over the time."""
    rows = latest(rows, END_KEY)
    if not rows:
        return NO_ROWS.format("end_to_end")
    timed = [row for row in rows if "ms" in row]
    lengths = sorted({row["T"] for row in timed})
    lines = []
    for gpu, shape, batch in dict.fromkeys((row["gpu"], row["shape"], row["B"]) for row in timed):
        own = [row for row in timed if (row["gpu"], row["shape"], row["B"]) == (gpu, shape, batch)]

        def points(what: str, preset: str | None, own: list[Row] = own) -> dict[int, Row]:
            return {row["T"]: row for row in own if (row["what"], row["preset"]) == (what, preset)}

        for what, preset in dict.fromkeys((row["what"], row["preset"]) for row in own):
            found = points(what, preset)
            base = "graph compiled" if what.endswith(" compiled") else "graph"
            graph = points(base, None)
            dense = fit_line([(t, row["ms"]) for t, row in graph.items()])
            name = what if preset is None else f"{what} {preset}"
            cells = [gpu, shape, str(batch), name]
            for length in lengths:
                row = found.get(length)
                if row is None:
                    cells.append("-")
                    continue
                ratio = (
                    f" ({graph[length]['ms'] / row['ms']:.2f}x)"
                    if length in graph and what != base
                    else ""
                )
                cells.append(f"{row['ms']:.2f}{'*' if row.get('shared') else ''}{ratio}")
            line = fit_line([(t, row["ms"]) for t, row in found.items()])
            cells.append("-" if line is None else f"{line[0]:.2f} + {line[1] * 1024:.4f} a 1K")
            cells.append("-" if what == base else break_even(dense, line))
            last = found[max(found)]
            ceiling = (last["weight_bytes"] + last["cache_bytes"]) / last["read_gbs"] / 1e6
            cells.append(f"{ceiling:.2f} ({ceiling / last['ms']:.0%})")
            lines.append(cells)
    text = ""
    if lines:
        header = ["card", "model", "B", "ms a token", *(f"{t / 1024:.4g}K" for t in lengths)]
        text = markdown(
            [*header, "intercept + slope", "break-even T", "ceiling of the longest"], lines
        )
    if any(row.get("shared") for row in timed):
        text += "\n\\* keys and values of all layers do not fit: layers share memory.\n"
    prompts = [row for row in rows if row.get("prefill_ratio")]
    if prompts:
        table = (
            [
                *(str(row[name]) for name in ("gpu", "B", "T")),
                row["preset"] or "dense",
                *(f"{row[name]:.3f}" for name in ("prefill_s", "prefill_ratio")),
                *(f"{row[name] / 1e9:.2f}" for name in ("cache_bytes", "peak_bytes")),
            ]
            for row in prompts
        )
        text += "\n" + markdown(
            ["card", "B", "T", "prompt", "s", "of dense", "cache GB", "peak GB"], table
        )
    return text + of_commits(rows)


def mean_kl(rows: Iterable[Row]) -> float:
    """Geometric, over texts."""
    return math.exp(statistics.fmean(math.log(max(row["kl"], 1e-12)) for row in rows))


def quality_table(rows: Iterable[Row]) -> str:
    """A line a model and scheme: ratio to a dense 16-bit cache with everything counted, KL over
    texts, needles, generated tokens, tasks."""
    rows = latest([row for row in rows if "token_bytes" in row], QUALITY_KEY)
    if not rows:
        return NO_ROWS.format("quality")
    texts = [row for row in rows if "kl" in row]
    contexts = sorted({row["context"] for row in texts})
    tasks = list(dict.fromkeys(row["task"] for row in rows if "score" in row))
    lines = []
    for model, scheme in dict.fromkeys((row["model"], row["scheme"]) for row in rows):
        own = [row for row in rows if (row["model"], row["scheme"]) == (model, scheme)]
        sized = next((row for row in own if "fixed_bytes" in row), None)
        if sized is None:
            continue  # only generated tokens: exact
        dense = sized["token_bytes"] * sized["ratio_long"]
        cells = [model, scheme]
        cells += [
            f"{t * dense / (t * sized['token_bytes'] + sized['fixed_bytes']):.2f}" for t in LENGTHS
        ]
        for context in contexts:
            found = [row for row in own if "kl" in row and row["context"] == context]
            recalled = sum(row["recalled"] for row in found), sum(row["needles"] for row in found)
            cells.append(f"{mean_kl(found):.4f}, {recalled[0]}/{recalled[1]}" if found else "-")
        found = [row for row in own if "free_running_kl" in row]
        kinds = ("teacher_forced_kl", "free_running_kl")
        means = [statistics.fmean(row[kind] for row in found) for kind in kinds if found]
        cells.append(", ".join(f"{x:.4f}" for x in means) or "-")
        for task in tasks:
            found = [row for row in own if row.get("task") == task and "score" in row]
            flips = [sum(pair) for pair in zip(*(row["flips"] for row in found), strict=True)]
            score = statistics.fmean(row["score"] for row in found) if found else 0
            cells.append(f"{100 * score:.1f} ({flips[0]}/{flips[1]})" if found else "-")
        lines.append(cells)
    lines.sort(key=lambda cells: (cells[0], float(cells[2])))  # most bytes first
    header = ["model", "scheme", *(f"ratio at {t // 1024}K" for t in LENGTHS)]
    header += [f"KL at {n:,} tokens, codes" for n in contexts] + ["generated: forced, free"]
    return markdown([*header, *tasks], lines) + of_commits(rows)


TABLES: dict[str, Callable[[Iterable[Row]], str]] = {
    "attention": attention_table,
    "end_to_end": end_to_end_table,
    "quality": quality_table,
}


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


def plot(
    rows: Iterable[Row],
    path: Path,
    key: Sequence[str],
    y: str,
    label: str,
    select: Callable[[Row], str | None],
) -> None:
    """y against T, a panel a batch size, a line what `select` names (None: not shown), as PNG.

    Raises:
        ValueError: no row is shown.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in latest(rows, key) if row.get(y) is not None and select(row)]
    if not shown:
        raise ValueError(f"rows: expected some with {y!r}, got none")
    batches = sorted({row["B"] for row in shown})
    names = sorted(name for name in {select(row) for row in shown} if name)
    figure, axes = pyplot.subplots(
        1, len(batches), figsize=(3.2 * len(batches), 3.2), squeeze=False
    )
    for axis, batch in zip(axes[0], batches, strict=True):
        for color, name in enumerate(names):
            points = sorted(
                (row["T"], row[y]) for row in shown if row["B"] == batch and select(row) == name
            )
            if points:
                axis.plot(*zip(*points, strict=True), label=name, color=f"C{color}", marker="o")
        axis.set(xscale="log", xlabel="tokens T", title=f"B = {batch}")
        ticks = sorted({row["T"] for row in shown if row["B"] == batch})
        axis.set_xticks(ticks, [f"{t // 1024}K" for t in ticks], minor=False)
        axis.minorticks_off()
    axes[0][0].set_ylabel(label)
    lines = dict(
        pair[::-1]
        for axis in axes[0]
        for pair in zip(*axis.get_legend_handles_labels(), strict=True)
    )
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=4, fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_quality(rows: Iterable[Row], path: Path) -> None:
    """Loss against bytes, a panel a context's length: KL over texts, geometric mean, as PNG.

    Raises:
        ValueError: no row is shown.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in latest(rows, QUALITY_KEY) if "kl" in row and "token_bytes" in row]
    if not shown:
        raise ValueError("rows: expected some with 'kl' and 'token_bytes', got none")
    panels = sorted({(row["model"], row["context"]) for row in shown})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, (model, context) in zip(axes[0], panels, strict=True):
        own = [row for row in shown if (row["model"], row["context"]) == (model, context)]
        for scheme in dict.fromkeys(row["scheme"] for row in own):
            found = [row for row in own if row["scheme"] == scheme]
            x, y = 100 / statistics.fmean(row["ratio"] for row in found), mean_kl(found)
            color = "C0" if scheme in PRESETS else "C7"
            axis.plot(x, y, "o" if scheme in PRESETS else "x", color=color)
            axis.annotate(
                scheme, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8, color=color
            )
        axis.set(yscale="log", xlabel="bytes, % of a 16-bit cache", ylabel="KL, nats")
        axis.set_title(f"{model}, {context:,} tokens", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_all(results: Path, folder: Path) -> None:
    """Speed-up of a layer's step, and ms a token of whole models, against T; loss against bytes."""
    attention, whole, quality = (
        read_rows(results / f"{name}.jsonl") for name in ("attention", "end_to_end", "quality")
    )

    def layer(row: Row) -> str | None:
        return (
            row["preset"]
            if (row["H"], row["G"], row["D"], row["path"]) == (32, 8, 128, "matrix")
            else None
        )

    def model(row: Row) -> str | None:
        return (
            " ".join(filter(None, (row["what"], row["preset"])))
            if row["what"] in ("graph", "static", "ours")
            else None
        )

    if attention:
        plot(
            attention,
            folder / "attention.png",
            ATTENTION_KEY,
            "speedup",
            "speed-up over the best dense step",
            layer,
        )
    if whole:
        plot(whole, folder / "end_to_end.png", END_KEY, "ms", "ms a token", model)
    if any("token_bytes" in row for row in quality):
        plot_quality(quality, folder / "quality.png")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m perf.tables", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "files", type=Path, nargs="*", help="rows of end_to_end to print, instead of perf/results"
    )
    parser.add_argument("--readme", action="store_true", help="write README's tables")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw plots (needs matplotlib)")
    args = parser.parse_args(argv)
    readme = ROOT / "README.md"
    if args.files:
        print(
            end_to_end_table(
                [row for path in args.files for row in read_rows(path) if "what" in row]
            )
        )
    elif args.readme:
        readme.write_text(fill(readme.read_text()))
    else:
        for name, table in TABLES.items():
            print(f"{name}\n\n{table(read_rows(RESULTS / f'{name}.jsonl'))}")
    if args.plot:
        plot_all(RESULTS, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
