"""Tables and plots from the rows of perf/results. `python -m perf.tables` prints perf/RESULTS.md;
with `--write` it writes that page, README's tables of figures and perf/plots/*.svg.

Rows are appended by the measurements; of rows about the same thing the last one counts. A plot
carries what it shows as JSON in its metadata, which tests compare with the rows.
Test: tests/test_perf.py.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from perf._cases import LAYER, LOSSY
from perf._timing import RESULTS, ROOT, Row, read_rows

KEYS = {
    "attention": ("gpu", "H", "G", "D", "path", "case", "B", "T", "preset"),
    "compress": ("gpu", "T"),
    "end_to_end": ("gpu", "gpus", "shape", "B", "what", "preset", "T"),
    "quality": ("model", "context", "task", "text", "scheme"),
    "serve": ("gpu", "gpus", "vllm", "B", "T", "backend", "kv_dtype"),
}
PRESETS = ("exact", *LOSSY)
PLOTTED = (*LAYER, None)  # H, G, D, case of the layers in plots
OURS, HEADLINE = "balanced", 6  # preset and rows of the headline table
ORDER = ("static", "graph", "bare", "ours", "long", "prefill", "dense", *PRESETS)
LOSSES = ("fp8", "kivi-2", "quality", "balanced", "small")  # schemes of the table of losses
MARKED = re.compile(r"(<!-- (headline|losses) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
SHARED = "\n\\* dense keys and values of all layers do not fit the card: layers share them.\n"
NO_ROW = "No row yet: `python -m perf.{} --json`, then `perf.tables --write`.\n"
Rows = Iterable[Row]
Plot = dict[str, dict[str, list[list[float]]]]  # panel: line: points


def rank(value: Any) -> tuple:
    """What a value of a key is sorted by: None first, known words in their order."""
    word = value.split()[0] if isinstance(value, str) and value else value
    known = ORDER.index(word) if word in ORDER else -1
    return (value is not None, f"{known:03} {value}" if isinstance(value, str) else value)


def latest(rows: Rows, key: Sequence[str]) -> list[Row]:
    """The last row of each key, in order of the keys."""
    found = {tuple(row.get(name) for name in key): row for row in rows}
    return [found[k] for k in sorted(found, key=lambda k: [rank(x) for x in k])]


def grouped(rows: Rows, names: Sequence[str]) -> dict[tuple, list[Row]]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return found


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Tables of at most ten rows; a column without a value is left out."""
    lines = list(lines)
    kept = [i for i in range(len(header)) if any(line[i] != "-" for line in lines)]
    parts = []
    for start in range(0, len(lines), 10):
        shown = (header, ["---"] * len(header), *lines[start : start + 10])
        parts.append("".join(f"| {' | '.join(cells[i] for i in kept)} |\n" for cells in shown))
    return "\n".join(parts)


def cell(value: Any, form: str = "") -> str:
    return "-" if value is None else format(value, form)


def columns(rows: Rows, spec: str) -> str:
    """A line a row: the named fields, each in the format after its colon."""
    fields = [word.partition(":")[::2] for word in spec.split()]
    lines = [[cell(row.get(name), form) for name, form in fields] for row in rows]
    return markdown([name for name, _ in fields], lines)


def sections(rows: Rows, names: Sequence[str], title: str, spec: str) -> str:
    """A titled table of each group of rows with the same values of `names`."""
    parts = grouped(rows, names).items()
    return "".join(f"\n### {title.format(*x)}\n\n{columns(own, spec)}" for x, own in parts)


def attention_table(rows: Rows) -> str:
    """A table a kind of layer; of_plain: a multiple of the time of the run's row without a case."""
    spec = "B T:, case preset p50_us:.4g of_plain:.2f read_share:.0%"
    spec += "".join(f" best_{x} best_{x}_us:.4g against_{x}:.2f" for x in ("peer", "fp8"))
    rows = latest(rows, KEYS["attention"])
    alike = ("commit", *(name for name in KEYS["attention"] if name != "case"))
    plain = {tuple(map(row.get, alike)): row["p50_us"] for row in rows if not row.get("case")}
    for row in rows:
        us = plain.get(tuple(map(row.get, alike))) if row.get("case") else None
        row["of_plain"] = us and row["p50_us"] / us
        for peer in ("peer", "fp8"):
            us = row.get(f"best_{peer}_us")
            row[f"against_{peer}"] = us and us / row["p50_us"]
    title = "{}, {}/{} heads, D = {}, {} path"
    return sections(rows, ("gpu", "H", "G", "D", "path"), title, spec)


def fit_line(rows: dict[int, Row]) -> tuple[float, float] | None:
    """(intercept, slope) of the least squares line of ms against T; None of fewer than two rows."""
    if len(rows) < 2:
        return None
    slope, intercept = statistics.linear_regression([*rows], [x["ms"] for x in rows.values()])
    return intercept, slope


def break_even(dense: tuple[float, float] | None, ours: tuple[float, float] | None) -> str:
    """The length from which on a line lies below another, in words."""
    if dense is None or ours is None:
        return "-"
    gap, gain = ours[0] - dense[0], dense[1] - ours[1]
    if gain <= 0:
        return "none" if gap >= 0 else "below"
    return "any" if gap <= 0 else f"{gap / gain:,.0f}"


def share_of_reads(row: Row) -> float:
    """Bytes of weights and cache at the read bandwidth of the same run, over the time."""
    return (row["weight_bytes"] + row["cache_bytes"]) / row["read_gbs"] / 1e6 / row["ms"]


def end_to_end_table(rows: Rows) -> str:
    """A line a measurement: ms a token at each length, intercept and slope of a line through them,
    break-even length against the dense graph of the same run (compiled where they are), and of the
    longest length the time of its bytes and the share that it is of the whole."""
    rows = latest(rows, KEYS["end_to_end"])
    timed = [{"compiled": row["what"].endswith(" compiled"), **row} for row in rows if "ms" in row]
    text = ""
    for title, own in grouped(timed, ("gpu", "shape", "B", "compiled", "gpus")).items():
        base, lines = "graph compiled" if title[3] else "graph", []
        lengths = sorted({row["T"] for row in own})
        graph = {row["T"]: row for row in own if row["what"] == base and not row["preset"]}
        dense, run = fit_line(graph), {row["commit"] for row in graph.values()}
        for (what, preset), series in grouped(own, ("what", "preset")).items():
            found, cells = {row["T"]: row for row in series}, [f"{what} {preset or ''}".strip()]
            for t in lengths:
                cells.append("-")
                if t in found:
                    cells[-1] = f"{found[t]['ms']:.2f}{'*' if found[t].get('shared') else ''}"
                    same = t in graph and graph[t]["commit"] == found[t]["commit"]
                    if same and found[t] is not graph[t]:
                        cells[-1] += f" ({graph[t]['ms'] / found[t]['ms']:.2f}x)"
            line = fit_line(found)
            cells.append("-" if line is None else f"{line[0]:.2f} + {line[1] * 1024:.4f} a 1K")
            alone = found == graph or not run.issuperset(row["commit"] for row in series)
            cells.append("-" if alone else break_even(dense, line))
            share, last = share_of_reads(found[max(found)]), found[max(found)]["ms"]
            lines.append([*cells, f"{share * last:.2f} ({share:.0%})"])
        header = ["ms a token", *(f"{t / 1024:.4g}K" for t in lengths), "intercept + slope"]
        card = f"{title[4]} x {title[0]}" if title[4] else title[0]
        text += f"\n### {card}, {title[1]}, B = {title[2]}{', compiled' * title[3]}\n\n"
        text += markdown([*header, "break-even T", "ceiling of the longest"], lines)
    text += SHARED * any(row.get("shared") for row in timed)
    prompts = [row for row in rows if row.get("prefill_ratio")]
    if prompts:
        spec = "gpu B T:, preset prefill_s:.3f prefill_ratio:.3f cache_bytes:, peak_bytes:,"
        text += f"\n### Prompts\n\n{columns(prompts, spec)}"
    return text


def newest(name: str, results: Path = RESULTS) -> list[Row]:
    """The rows of perf/results/NAME.jsonl that count."""
    return latest(read_rows(results / f"{name}.jsonl"), KEYS[name])


def mean(rows: Rows, name: str) -> float | None:
    """Of the rows that have the field: of a KL the geometric one, as texts differ much."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if values and "kl" in name.split("_"):
        return statistics.geometric_mean(max(x, 1e-12) for x in values)
    return statistics.fmean(values) if values else None


def means(rows: Rows, needed: str) -> Iterator[Row]:
    """A row a model, context and scheme: means over the texts of rows with the field `needed`."""
    own = [row for row in rows if needed in row]
    for (model, context), panel in grouped(own, ("model", "context")).items():
        head = {"model": model, "context": context, "texts": len({row["text"] for row in panel})}
        for (scheme,), alike in grouped(panel, ("scheme",)).items():
            names = {name for row in alike for name, x in row.items() if isinstance(x, int | float)}
            yield {name: mean(alike, name) for name in names} | head | {"scheme": scheme}


def quality_table(rows: Rows) -> str:
    """Means over texts of each scheme (tokens predicted, generated, less of a codec); tasks."""
    text, rows = "", latest(rows, KEYS["quality"])
    predicted = "scheme ratio:.2f ratio_long:.2f kl:.5f kl_median:.5f kl_p999:.3f top1:.3f"
    predicted += " perplexity:+.2% recalled:.1f exact_recalled:.1f"
    generated = "scheme generated:.0f teacher_forced_kl:.5f free_running_kl:.5f"
    generated += " free_running_kl_last:.5f"
    ablated = "scheme ratio:.2f ratio_long:.2f ablated_kl:.5f top1:.3f recalled:.1f"
    fields = {"kl": predicted, "free_running_kl": generated, "ablated_kl": ablated}
    for needed, spec in fields.items():
        order = ("model", "context", "ratio")
        found = sorted(means(rows, needed), key=lambda x: [x.get(name) or 0 for name in order])
        title = "{}, {:,} tokens, " + needed + " over {} text(s)"
        text += sections(found, ("model", "context", "texts"), title, spec)
    tasks = [row | {"ablated": "ablated" in row["task"]} for row in rows if "score" in row]
    names = ("model", "context", "ablated", "scheme")
    alike = grouped(tasks, names).values()
    solved = [own[0] | {row["task"]: task_cell(row) for row in own} for own in alike]
    solved.sort(key=lambda x: [x[n] for n in ("ablated", "model", "context", "ratio", "scheme")])
    spec = " ".join(["scheme", *sorted({row["task"] for row in tasks})])
    title = "{}, {:,} tokens: tasks solved, points ± 95 % or [lost, won] to dense on these prompts"
    return text + sections(solved, names[:3], title, spec)


def task_cell(row: Row) -> str:
    """The score; its change with half the interval, or programs that only dense or this solves."""
    change, (low, high) = row["score"] - row["dense_score"], row["change"]
    text = f"{100 * change:+.1f} ± {50 * (high - low):.1f}"
    text = str(row["flips"]) if row["task"] == "humaneval" else text
    return f"{row['score']:.2f} {text}" if row["scheme"] != "dense" else f"{row['score']:.2f}"


SERVE = "gpu gpus vllm B T:, backend kv_dtype ttft_ms:.0f tpot_ms:.2f kv_tokens:, throughput:.4g"
COMPRESS = "gpu T:, encode_us:.4g append_us:.3g decode_us:.4g encode_share:.0%"
SECTIONS: dict[str, tuple[Callable[[Rows], str], str]] = {
    "end_to_end": (end_to_end_table, "Whole models in transformers, a token at a time"),
    "serve": (partial(columns, spec=SERVE), "Whole models in vLLM"),
    "attention": (attention_table, "One layer's append and attention"),
    "compress": (partial(columns, spec=COMPRESS), "What storing tokens takes"),
    "quality": (quality_table, "Loss per byte"),
}


def results_page(results: Path = RESULTS) -> str:
    """perf/RESULTS.md."""
    text = "# Results\n\nWritten by `python -m perf.tables --write` from the newest rows of "
    text += "perf/results; columns are explained at the top of each `perf/NAME.py`.\n"
    for name, (make, _, y) in PLOTS.items():
        text += f"\n![{y}](plots/{name}.svg)\n" if make(results) else ""
    for name, (table, title) in SECTIONS.items():
        rows = newest(name, results)
        commits = ", ".join(sorted({row["commit"] for row in rows}))
        measured = f"{table(rows).lstrip()}\n`perf.{name}`, measured at {commits}.\n"
        text += f"\n## {title}\n\n{measured if rows else NO_ROW.format(name)}"
    return text


def steps(results: Path) -> Iterator[Row]:
    """Decode steps of whole models and of layers alike: gpu, engine, B, T, kind ("bf16", "fp8" or a
    preset), ms, and of whole models the bytes of the cache, up to a factor of the engine."""
    for row in newest("end_to_end", results):
        what, _, compiled = row["what"].partition(" ")
        if what in ("graph", "bare") and not row.get("gpus"):
            name = f"transformers, {compiled}" if compiled else "transformers"
            kind = row["preset"] or "bf16"
            yield row | {"engine": name, "kind": kind, "size": row["cache_bytes"]}
    for row in newest("serve", results):
        if row["gpus"] == 1:
            kind = row["kv_dtype"].replace("bfloat16", "bf16")  # or fp8, or a preset
            name, size = f"vLLM {row['vllm']}", 1 / row["kv_tokens"]
            yield row | {"engine": name, "kind": kind, "ms": row["tpot_ms"], "size": size}
    for row in newest("attention", results):
        if tuple(map(row.get, ("H", "G", "D", "case"))) == PLOTTED:
            times = {"bf16": "best_peer_us", "fp8": "best_fp8_us", row["preset"]: "p50_us"}
            for kind, name in times.items():
                if row.get(name):
                    yield row | {"engine": "one layer", "kind": kind, "ms": row[name] / 1e3}


def compared(results: Path) -> dict[tuple, dict[str, Row]]:
    """(gpu, engine, B, T) that dense bf16 has -> the fastest step of each kind, of one commit."""
    found: dict[tuple, dict[str, Row]] = {}
    for cell, rows in grouped(steps(results), ("gpu", "engine", "B", "T")).items():
        own = {row["kind"]: row for row in sorted(rows, key=lambda x: x["ms"], reverse=True)}
        if "bf16" in own:  # peers of another run prove nothing
            commit = own["bf16"]["commit"]
            found[cell] = {kind: row for kind, row in own.items() if row["commit"] == commit}
    return found


def headline(results: Path = RESULTS) -> str:
    """README's table: a line a cell of whole models; vLLM's before those of compiled layers, unless
    these alone have fp8 beside."""
    cells: dict[tuple, list[str]] = {}
    # A later engine's line takes an earlier one's place.
    found = sorted(compared(results).items(), key=lambda x: "fp8" in x[1])
    for (gpu, engine, batch, tokens), own in found:
        if OURS in own and "size" in own[OURS]:
            dense, ours, star = own["bf16"], own[OURS], "*" if own["bf16"].get("shared") else ""
            line = [gpu, engine, str(batch), f"{tokens:,}", f"{dense['ms']:.2f}{star}"]
            line += [cell(own.get("fp8", {}).get("ms"), ".2f"), f"{ours['ms']:.2f}"]
            line += [f"{dense[name] / ours[name]:.2f}x" for name in ("ms", "size")]
            cells[gpu, batch, tokens] = line
    if not cells:
        return NO_ROW.format("end_to_end")
    # Of more cells than fit, those of the most tokens.
    chosen = sorted(sorted(cells, key=lambda x: x[1] * x[2])[-HEADLINE:])
    header = ["card", "engine", "B", "T", "dense bf16", "dense fp8", f"ours, {OURS}"]
    text = markdown([*header, "faster", "smaller cache"], [cells[x] for x in chosen])
    return text + SHARED * any("*" in cells[x][4] for x in chosen)


def losses(results: Path = RESULTS) -> str:
    """README's table of what a scheme loses: of the model and context with the most texts."""
    panels = grouped(means(newest("quality", results), "kl"), ("model", "context")).values()
    if not panels:
        return NO_ROW.format("quality")
    panel = max(panels, key=lambda rows: rows[0]["texts"])
    top, found = panel[0], {row["scheme"]: row for row in panel}
    schemes = [name for name in LOSSES if name in found]
    forms = {"times smaller": ("ratio", "{:.2f}x"), "likeliest token as dense": ("top1", "{:.1%}")}
    forms["perplexity"] = "perplexity", "{:+.2%}"
    forms["KL, nats (geometric mean)"] = "kl", "{:.4f}"
    header = f"{top['model']}, {top['context']:,} tokens, mean of {top['texts']} texts"
    lines = [[x, *(f.format(found[s][n]) for s in schemes)] for x, (n, f) in forms.items()]
    return markdown([header, *schemes], lines)


def fill(text: str, results: Path = RESULTS) -> str:
    """A page's text with the tables between their marks."""
    make = {"headline": headline, "losses": losses}
    return MARKED.sub(lambda match: f"{match[1]}{make[match[2]](results)}\n{match[3]}", text)


def against_length(value: Callable[[Row, Row], float | None], results: Path) -> Plot:
    """value(row, dense bf16 row of the same cell) against T: a panel an engine and batch size with
    two lengths or more, a line a kind. Of more than four panels those with fp8 come first."""
    panels: Plot = {}
    for (gpu, engine, batch, tokens), own in compared(results).items():
        lines = panels.setdefault(f"{gpu}, {engine}, B = {batch}", {})
        for kind in sorted(own, key=rank):
            y = value(own[kind], own["bf16"])
            if y is not None:
                name = f"dense {kind}" if kind in ("bf16", "fp8") else kind
                lines.setdefault(name, []).append([tokens, float(f"{y:.4g}")])
    shown = {name: x for name, x in panels.items() if max(map(len, x.values()), default=0) > 1}
    return dict(sorted(shown.items(), key=lambda x: "dense fp8" not in x[1])[:4])


def speed(row: Row, dense: Row) -> float:
    return dense["ms"] / row["ms"]


def reads(row: Row, _: Row) -> float | None:
    if "weight_bytes" in row:
        return share_of_reads(row)
    return row.get("read_share") if row["kind"] in PRESETS else None


def pareto(results: Path) -> Plot:
    """KL (over texts) against the ratio of bytes, a panel a model and context."""
    panels: Plot = {}
    for row in means(newest("quality", results), "kl"):
        if row["scheme"] != "exact":
            panel = panels.setdefault(f"{row['model']}, {row['context']:,} tokens", {})
            panel[row["scheme"]] = [[float(f"{row[name]:.4g}") for name in ("ratio", "kl")]]
    return dict(list(panels.items())[-4:])


PLOTS: dict[str, tuple[Callable[[Path], Plot], str, str]] = {
    "speed": (partial(against_length, speed), "tokens T", "times as fast as dense bf16"),
    "reads": (partial(against_length, reads), "tokens T", "share of the read bandwidth"),
    "pareto": (pareto, "times smaller than 16 bits", "KL to the exact cache, nats"),
}


def draw(plot: Plot, x: str, y: str, path: Path) -> None:
    """An SVG: lines with a legend, or (one point a line) named points."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"svg.hashsalt": "", "svg.fonttype": "none", "font.size": 9})
    columns, rows = min(2, len(plot)), -(-len(plot) // 2)
    figure = Figure(figsize=(4.4 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(plot) :]:
        axis.remove()
    names = list(dict.fromkeys(name for lines in plot.values() for name in lines))
    for axis, (title, lines) in zip(axes.flat, plot.items(), strict=False):
        points = all(len(line) == 1 for line in lines.values())
        for name, line in lines.items():
            ours = name in PRESETS
            if points:
                edge, fill = ("tab:blue", "tab:blue") if ours else ("gray", "none")
                axis.scatter(*line[0], facecolor=fill, edgecolor=edge)
                axis.annotate(name, line[0], xytext=(5, 3), textcoords="offset points", fontsize=8)
            else:
                style = {"marker": "o" if ours else "s", "ls": "-" if ours else "--", "ms": 4}
                color = f"C{names.index(name)}"  # in all panels alike
                axis.plot(*zip(*line, strict=True), **style, label=name, color=color)
        axis.set(title=title, xlabel=x, ylabel=y, xscale="log")
        ticks = sorted({t for line in lines.values() for t, _ in line})
        if points:
            axis.set(yscale="log", xlim=(ticks[0] / 1.1, ticks[-1] * 1.5))
            ticks = [t for t in (1, 2, 3, 4, 6, 8, 12, 16) if ticks[0] / 1.1 <= t]
        else:
            axis.legend(fontsize="small")
            axis.set_ylim(bottom=0)
        axis.set_xticks(ticks, [f"{t}x" if points else f"{t // 1024}K" for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Description": json.dumps(plot)})


def write(root: Path = ROOT) -> None:
    """All that is generated, in a checkout."""
    results, readme = root / "perf" / "results", root / "README.md"
    readme.write_text(fill(readme.read_text(), results))
    (root / "perf" / "RESULTS.md").write_text(results_page(results))
    for name, (make, x, y) in PLOTS.items():
        path, plot = root / "perf" / "plots" / f"{name}.svg", make(results)
        if plot:
            draw(plot, x, y, path)
        else:
            path.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.tables", description=__doc__)
    parser.add_argument("--write", action="store_true", help="pages and plots (needs matplotlib)")
    if parser.parse_args(argv).write:
        write()
    else:
        print(results_page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
