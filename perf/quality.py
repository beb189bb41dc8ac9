"""Quality per byte: what a compressed cache costs a model, beside other schemes in the same run.

    python -m perf.quality --needles 10                                 the embedded model
    python -m perf.quality --gguf model.gguf --text code.py prose.txt --needles 10 --codecs FOLDER

For each text the model reads the first `context` tokens once, exactly. Each scheme then stores
those keys and values, and the model predicts the rest (256 tokens of the text, then with --needles
questions about codes hidden in the context, each with its answer) by dense attention over what the
scheme gives back and the exact keys and values of the rest. The presets go through the product:
`enable`, a prompt, and what its cache gives back (`SpectralCache.past`), with the model's codec: of
--codecs (files codec-PRESET.safetensors, as `python -m spectral_kernels.calibrate --out FOLDER`
writes several presets), or what `enable` finds or calibrates; judge no text that it knows.

Columns:
    ratio       16-bit dense cache / all bytes of the scheme's for a sequence: coefficients, scales,
                tables, exact tokens. A model's codec is not a sequence's.
    long        the same in the limit of long contexts: without window and sinks
    KL          mean over all predicted tokens of KL(exact || scheme), nats; median, 99th percentile
    top-1       share of them whose likeliest token is the exact cache's
    ppl         change of the perplexity of them
    recalled    codes of which every token is the likeliest one (what greedy decoding would write)

Yardsticks (scales and zero points in 16 bits). All keep 4 sinks and the last 64 to 127 tokens
exact, which is no fewer than the presets keep.
    kivi-4/3/2  groups of 32: keys as rotated per channel over 32 tokens, values per token over 32
                channels (arXiv 2402.02750)
    fp8         e4m3 with one scale for a head's keys and one for its values

perf/results/quality.jsonl holds, as a baseline, rows of the first version of this library (commits
6c2963d to a77a074), whose layouts and bases were those of a sequence.
Test: tests/test_quality.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import DynamicCache

from perf._timing import versions
from perf.generate import DTYPES, TINY_MODEL, load
from spectral_kernels.hf import CACHE, PRESETS, enable

PREDICTED = 256  # tokens of the text after the context
SINKS, WINDOW, GROUP = 4, 64, 32  # of the yardsticks
PLACES = (
    "harbour library museum theatre station market castle hospital airport chapel brewery stadium"
).split()


class Question(NamedTuple):
    """A hidden fact: the sentence that states it, the text that asks for it, and the answer that
    should follow."""

    fact: str
    asked: str
    answer: str


@dataclass(frozen=True)
class Case:
    """A context and what is predicted after it.

    Attributes:
        ids: int64 [1, N + P], the context's and the predicted tokens.      context: N.
        answers: for each question the places of its answer among the P predicted tokens.
    """

    name: str
    ids: torch.Tensor
    context: int
    answers: list[range]


@dataclass(frozen=True)
class Prefix:
    """The context but its last token: ids int64 [1, N - 1], and exact keys, as rotated, and values
    [1, G, N - 1, D] of each layer."""

    ids: torch.Tensor
    k: list[torch.Tensor]
    v: list[torch.Tensor]

    @property
    def tokens(self) -> int:
        return self.k[0].shape[2]

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in a dense 16-bit cache, all layers."""
        return sum(4 * k.shape[1] * k.shape[3] for k in self.k)


class Stored(NamedTuple):
    """What a scheme gives back: keys as rotated and values [1, G, N - 1, D], a pair a layer; all
    bytes, and a token's."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    nbytes: float
    token_bytes: float


Scheme = Callable[[Prefix], Stored]


@dataclass(frozen=True)
class Row:
    """One scheme on one text."""

    model: str
    text: str
    context: int
    scheme: str
    ratio: float
    ratio_long: float
    kl: float
    kl_median: float
    kl_p99: float
    top1: float
    perplexity: float  # relative change
    needles: int
    recalled: int


# ---- cases ---------------------------------------------------------------------------------------


def needle_questions(count: int, seed: int) -> list[Question]:
    """Random access codes of places, six digits each."""
    generator = torch.Generator().manual_seed(seed)
    questions = []
    for i in range(count):
        place = PLACES[i % len(PLACES)] + (
            f" number {i // len(PLACES) + 1}" if i >= len(PLACES) else ""
        )
        code = "".join(str(d) for d in torch.randint(10, (6,), generator=generator).tolist())
        what = f"secret access code of the {place}"
        asked = f"Question: What is the {what}?\nAnswer: The {what} is"
        questions.append(Question(f"The {what} is {code}.", asked, f" {code}"))
    return questions


def tokens_of(tokenizer: Any, text: str, *, first: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=first).input_ids


def text_case(
    name: str, text: str, tokenizer: Any, *, context: int, needles: int, seed: int
) -> Case:
    """A text's first tokens with facts hidden at even distances, its next tokens, then questions
    and answers.

    Raises:
        ValueError: the text is too short.
    """
    questions = needle_questions(needles, seed)
    facts = [tokens_of(tokenizer, f"\n{q.fact}\n") for q in questions]
    plain = tokens_of(tokenizer, text, first=True)
    own = context - sum(map(len, facts))  # tokens of the text in the context
    if own < 1 or len(plain) < own + PREDICTED:
        raise ValueError(
            f"{name}: expected at least {max(own, 1) + PREDICTED} tokens, got {len(plain)}"
        )
    ids: list[int] = []
    taken = 0
    for i, fact in enumerate(facts):
        # The first tokens and the last ones are exact in most schemes: no fact lies there.
        end = SINKS + round((i + 0.5) / needles * (own - SINKS - 2 * WINDOW))
        while end > taken and "\n" not in tokenizer.decode(plain[end - 1]) and end > taken + 1:
            end -= 1  # back to the end of a line
        ids += plain[taken:end] + fact
        taken = end
    ids += plain[taken : own + PREDICTED]
    return _with_questions(name, ids, context, questions, tokenizer, before="\n\n")


def embedded_case(tokenizer: Any, *, context: int, needles: int, seed: int) -> Case:
    """A document of the embedded model's own language, whose facts are the needles."""
    from .tiny_model.recall import make_recall_contexts

    need = context + PREDICTED
    (document,) = make_recall_contexts(1, needles, distance=(PREDICTED + WINDOW, need), seed=seed)
    ids = tokens_of(tokenizer, document.text, first=True)[:need]
    questions = [Question("", q.text, f" {q.answer} .") for q in document.questions]
    kept = tokenizer.decode(ids[:context])
    questions = [q for q in questions if f"{q.asked.split()[-1]}{q.answer}" in kept]
    return _with_questions("built-in", ids, context, questions, tokenizer, before=" ")


def _with_questions(
    name: str,
    ids: list[int],
    context: int,
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    before: str,
) -> Case:
    answers = []
    for question in questions:
        ids = ids + tokens_of(tokenizer, before + question.asked)
        answer = tokens_of(tokenizer, question.answer)
        answers.append(range(len(ids) - context, len(ids) - context + len(answer)))
        ids = ids + answer
    return Case(name, torch.tensor([ids]), context, answers)


# ---- the model -----------------------------------------------------------------------------------


@torch.no_grad()
def read_prefix(model: Any, case: Case) -> Prefix:
    """The context but its last token, which is the first to predict from; read once, by the model
    as it is."""
    ids = case.ids[:, : case.context - 1].to(model.device)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, logits_to_keep=1, use_cache=True, **{CACHE: cache})
    return Prefix(
        ids, *([getattr(layer, name) for layer in cache.layers] for name in ("keys", "values"))
    )


@torch.no_grad()
def predict(
    model: Any, case: Case, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Log-probabilities of all tokens at the predicted places, float32 [P, V], with a context
    cached as given."""
    cache = DynamicCache(config=model.config)
    for i, (k, v) in enumerate(layers):
        cache.update(k.to(model.dtype), v.to(model.dtype), i)
    ids = case.ids[:, case.context - 1 : -1].to(model.device)
    mask = torch.ones((1, case.ids.shape[1] - 1), dtype=torch.long, device=model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=True, **{CACHE: cache}).logits[0]
    return logits.float().log_softmax(-1)


def compare(case: Case, exact: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """KL, top-1 agreement, change of the perplexity, and recalled answers, from log-probabilities
    [P, V]."""
    target = case.ids[0, case.context :].to(exact.device)
    kl = (exact.exp() * (exact - other)).sum(-1)
    best = other.argmax(-1)
    nll, nll_exact = (-x.gather(1, target[:, None]).mean().item() for x in (other, exact))
    right = (best == target).tolist()
    return {
        "kl": kl.mean().item(),
        "kl_median": kl.median().item(),
        "kl_p99": kl.quantile(0.99).item(),
        "top1": (best == exact.argmax(-1)).float().mean().item(),
        "perplexity": math.exp(nll - nll_exact) - 1,
        "recalled": sum(all(right[i] for i in places) for places in case.answers),
    }


# ---- schemes -------------------------------------------------------------------------------------


@torch.no_grad()
def store_spectral(prefix: Prefix, model: Any, preset: str, codecs: Path | None = None) -> Stored:
    """Through the product: the prompt as `generate` stores it, and what a prompt after it would
    attend to."""
    known = None if codecs is None or preset == "exact" else codecs / f"codec-{preset}.safetensors"
    with enable(model, preset, codec=known) as handle:
        cache = handle.new_cache(1, prefix.tokens)
        model(input_ids=prefix.ids, logits_to_keep=1, use_cache=True, **{CACHE: cache})
        spectral = cache.spectral
        assert spectral is not None
        layers = [spectral.past(i, 0, prefix.tokens) for i in range(len(prefix.k))]
        if preset == "exact":
            return Stored(layers, prefix.tokens * prefix.token_bytes, prefix.token_bytes)
        codec = spectral.codec
        # Rows of the table, 4 bytes a page of 64 tokens; exact tokens count in 16 bits.
        token = codec.token_bytes + 4 / 64
        kept = min(prefix.tokens, codec.sinks + codec.window)
        return Stored(layers, prefix.tokens * token + kept * prefix.token_bytes, token)


def _cold_tokens(prefix: Prefix) -> int:
    return max(0, (prefix.tokens - WINDOW) // WINDOW * WINDOW)


def _with_exact(
    prefix: Prefix, code: Callable[[torch.Tensor, bool], torch.Tensor], bits: float
) -> Stored:
    """A scheme that codes keys as rotated and values of old tokens, [1, G, T, D] float32, with
    `bits` a number."""
    cold = _cold_tokens(prefix)

    def coded(x: torch.Tensor, is_key: bool) -> torch.Tensor:
        x = x.float()
        return torch.cat(
            (x[:, :, :SINKS], code(x[:, :, :cold], is_key)[:, :, SINKS:], x[:, :, cold:]), dim=2
        )

    layers = [(coded(k, True), coded(v, False)) for k, v in zip(prefix.k, prefix.v, strict=True)]
    token, exact = prefix.token_bytes, SINKS + prefix.tokens - cold
    return Stored(layers, cold * token * bits / 16 + exact * token, token * bits / 16)


def in_groups(x: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """Groups of 32 along `dim`, rounded to 2**bits even levels from the least to the greatest of
    each group."""
    groups = x.unflatten(dim, (-1, GROUP))
    least, most = groups.amin(dim, keepdim=True), groups.amax(dim, keepdim=True)
    step = ((most - least) / (2**bits - 1)).half().float().clamp_min(1e-7)
    least = least.half().float()
    return (((groups - least) / step).round().clamp(0, 2**bits - 1) * step + least).flatten(
        dim - 1, dim
    )


def store_groups(prefix: Prefix, bits: int) -> Stored:
    def code(x: torch.Tensor, is_key: bool) -> torch.Tensor:
        return in_groups(x, -2, bits) if is_key else in_groups(x, -1, bits)

    return _with_exact(prefix, code, bits + 2 * 16 / GROUP)


def store_fp8(prefix: Prefix) -> Stored:
    def code(x: torch.Tensor, is_key: bool) -> torch.Tensor:
        scale = (
            x.abs().amax((-2, -1), keepdim=True).clamp_min(1e-20)
            / torch.finfo(torch.float8_e4m3fn).max
        )
        return (x / scale).to(torch.float8_e4m3fn).float() * scale

    return _with_exact(prefix, code, 8)


YARDSTICKS: dict[str, Scheme] = {
    "fp8": store_fp8,
    **{f"kivi-{bits}": partial(store_groups, bits=bits) for bits in (4, 3, 2)},
}


def measure(
    model: Any, case: Case, schemes: dict[str, Scheme], *, model_name: str, bar: Any = None
) -> Iterator[Row]:
    """All schemes on one case, as they come; the context is read once."""
    prefix = read_prefix(model, case)
    exact = predict(model, case, list(zip(prefix.k, prefix.v, strict=True)))
    if bar is not None:
        bar.update(1)
    for name, store in schemes.items():
        stored = store(prefix)
        result = compare(case, exact, predict(model, case, stored.layers))
        recalled = int(result.pop("recalled"))
        ratios = (
            prefix.tokens * prefix.token_bytes / stored.nbytes,
            prefix.token_bytes / stored.token_bytes,
        )
        yield Row(
            model_name,
            case.name,
            case.context,
            name,
            *ratios,
            **result,
            needles=len(case.answers),
            recalled=recalled,
        )
        if bar is not None:
            bar.update(1)


# ---- output --------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    lines = []
    for text in dict.fromkeys(row.text for row in rows):
        own = [row for row in rows if row.text == text]
        lines.append(f"\n{own[0].model}, {text}, {own[0].context} tokens of context")
        heads = {"ratio": 7, "long": 7, "KL": 10, "median": 10, "99 %": 9, "top-1": 8, "ppl": 9}
        text = "".join(f"{name:>{width}}" for name, width in heads.items())
        lines.append(f"{'scheme':<12}{text}  recalled")
        for row in own:
            recalled = f"{row.recalled}/{row.needles}" if row.needles else "-"
            text = f"{row.ratio:>7.2f}{row.ratio_long:>7.2f}{row.kl:>10.5f}{row.kl_median:>10.5f}"
            text += f"{row.kl_p99:>9.3f}{row.top1:>8.3f}{100 * row.perplexity:>+8.2f}%"
            lines.append(f"{row.scheme:<12}{text}{recalled:>10}")
    return "\n".join(lines)


def frontier(rows: Sequence[Row], path: Path) -> None:
    """Ratio against KL and against recall, one panel row a text, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    texts = list(dict.fromkeys(row.text for row in rows))
    figure, axes = plt.subplots(
        len(texts), 2, figsize=(11, 4 * len(texts)), squeeze=False, layout="constrained"
    )
    for (left, right), text in zip(axes, texts, strict=True):
        for row in (row for row in rows if row.text == text):
            ours = row.scheme not in YARDSTICKS
            for panel, y in ((left, max(row.kl, 1e-7)), (right, row.recalled)):
                panel.plot(
                    row.ratio, y, "o" if ours else "x", color="tab:blue" if ours else "tab:gray"
                )
                panel.annotate(
                    row.scheme,
                    (row.ratio, y),
                    textcoords="offset points",
                    xytext=(4, 4),
                    fontsize=8,
                )
        left.set(
            title=f"{text}: lower and further right is better",
            xlabel="ratio",
            ylabel="KL, nats",
            yscale="log",
        )
        right.set(
            title="needles recalled",
            xlabel="ratio",
            ylim=(-0.5, max(r.needles for r in rows) + 0.8),
        )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m perf.quality", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", help="path or id of a model (default: the embedded model)")
    parser.add_argument(
        "--gguf", help="GGUF file of such a model; a name alone is looked for in the folder --model"
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="UTF-8 texts",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=4000,
        help="tokens read before prediction starts (default 4000)",
    )
    parser.add_argument(
        "--presets", nargs="*", choices=list(PRESETS), default=list(PRESETS), metavar="PRESET"
    )
    parser.add_argument(
        "--codecs", type=Path, metavar="FOLDER", help="with codec-PRESET.safetensors of the model"
    )
    parser.add_argument(
        "--yardsticks",
        choices=list(YARDSTICKS),
        nargs="*",
        default=list(YARDSTICKS),
        metavar="NAME",
    )
    parser.add_argument(
        "--needles", type=int, default=0, metavar="N", help="hide N access codes and ask for them"
    )
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help="write one JSON row a line, one a scheme and text"
    )
    parser.add_argument("--png", type=Path, help="draw the frontier")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="default: float32 on a CPU, bfloat16 or float16 on a GPU",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the codes, and of the embedded model's text"
    )
    args = parser.parse_args(argv)
    if args.gguf and args.model:
        args.gguf = str(Path(args.model) / args.gguf)  # an absolute path stays as it is
    embedded = args.model is None and args.gguf is None
    if args.context < 1 or args.needles < 0:
        parser.error("--context must be at least 1, --needles at least 0")
    if embedded == bool(args.text):
        parser.error(
            "--text goes with --model or --gguf; the embedded model knows only texts of its own"
        )
    try:
        model, tokenizer = load(args.model, gguf=args.gguf, device=args.device, dtype=args.dtype)
        options = {"context": args.context, "needles": args.needles, "seed": args.seed}
        if embedded:
            cases = [embedded_case(tokenizer, **options)]
        else:
            texts = [(path.name, path.read_text(encoding="utf-8")) for path in args.text]
            cases = [text_case(name, text, tokenizer, **options) for name, text in texts]
    except (OSError, ImportError, ValueError) as error:
        parser.error(str(error))
    name = Path(args.gguf).stem if args.gguf else args.model or "embedded"
    codecs = args.codecs or (TINY_MODEL if embedded else None)
    schemes: dict[str, Scheme] = {
        preset: partial(store_spectral, model=model, preset=preset, codecs=codecs)
        for preset in args.presets
    }
    schemes |= {name: YARDSTICKS[name] for name in args.yardsticks}
    ran = versions()  # now: the tree may change while this runs
    rows: list[Row] = []
    with (
        tqdm(total=len(cases) * (len(schemes) + 1), desc="quality", unit="scheme") as bar,
        args.json.open("w") if args.json else nullcontext() as out,
    ):
        for row in chain.from_iterable(
            measure(model, case, schemes, model_name=name, bar=bar) for case in cases
        ):
            rows.append(row)
            if out is not None:  # at once: a run may take long
                out.write(json.dumps({**vars(row), **ran}) + "\n")
                out.flush()
    print(table(rows))
    if args.png:
        frontier(rows, args.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
