"""Quality per byte: what a compressed cache costs a model, beside other schemes in the same run.

    python -m perf.quality --needles 10                                                    the embedded model
    python -m perf.quality --gguf model.gguf --text code.py --text prose.txt --context 4000 --needles 10 --json out.jsonl

For each text the model reads the first `context` tokens once, exactly. Each scheme then stores those keys and values, and
the model predicts the rest (256 tokens of the text, then with --needles questions about codes hidden in the context, each
with its answer) by dense attention over what the scheme gives back and the exact keys and values of the rest.
The presets go through the real cache: fit, encode, decode. tests/test_quality.py holds this against attention to pages.

Columns:
    ratio       16-bit dense cache / all bytes of the scheme's: coefficients, bases, scales, masks, tables, exact tokens
    long        the same in the limit of long contexts: what a cold token costs, without window, sinks and bases
    KL          mean over all predicted tokens of KL(exact || scheme), nats
    top-1       share of them whose likeliest token is the exact cache's
    ppl         change of the perplexity of them
    recalled    codes of which every token is the likeliest one (what greedy decoding would write)

With --stream N the presets also get the context as a long generation brings it: N tokens at once, which the bases are
fitted on, then 64 at a time; once with the segments that they begin by themselves, once with the first one to the end.

Yardsticks (scales and zero points in 16 bits). All but the predecessor keep 4 sinks and the last 64 to 127 tokens exact,
which is no fewer than the presets keep.
    kivi-4/3/2  groups of 32: rotated keys per channel over 32 tokens, values per token over 32 channels (arXiv 2402.02750)
    fp8         e4m3 with one scale for a head's keys and one for its values
    predecessor keys before RoPE and values in blocks of 512 tokens: plain SVD of rank 16 and 32, bases in 16 bits,
                coefficients in 8 bits with a 16-bit scale a component; the last, partial block exact; no sinks
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from tqdm import tqdm
from transformers import DynamicCache

from perf._timing import versions
from perf.generate import DTYPES, load
from spectral_kernels import cache as cache_module
from spectral_kernels import compress
from spectral_kernels.cache import PRESETS, LayerCache, Preset, SpectralCache
from spectral_kernels.hf import CACHE, enable, v_metrics
from spectral_kernels.pages import HEAD_DIMS
from spectral_kernels.rope import Rope, rotate

PREDICTED = 256  # tokens of the text after the context
SINKS, WINDOW, GROUP = 4, 64, 32  # of the yardsticks
PLACES = "harbour library museum theatre station market castle hospital airport chapel brewery stadium".split()


class Question(NamedTuple):
    """A hidden fact: the sentence that states it, the text that asks for it, and the answer that should follow."""

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
    """Exact keys (before RoPE), values and queries of a context but its last token: [1, G or H, N - 1, D], one a layer."""

    k: list[torch.Tensor]
    v: list[torch.Tensor]
    q: list[torch.Tensor]
    rope: Rope
    metrics: list[torch.Tensor | None]

    @property
    def tokens(self) -> int:
        return self.k[0].shape[2]

    def rotated(self, k: torch.Tensor) -> torch.Tensor:
        """Keys before RoPE turned to their positions, as transformers caches them."""
        positions = torch.arange(k.shape[2], device=k.device)[None].expand(k.shape[0], -1)
        return self.scaled(rotate(k.contiguous(), positions, self.rope))

    def scaled(self, k: torch.Tensor) -> torch.Tensor:
        """Rotated keys with the attention scaling, which transformers puts on keys and queries."""
        if self.rope.scaling == 1.0:
            return k
        turning = self.rope.rotary_dim
        return torch.cat((k[..., :turning] * self.rope.scaling, k[..., turning:]), dim=-1)


class Stored(NamedTuple):
    """What a scheme gives back: rotated keys and values [1, G, N - 1, D], a pair a layer; all bytes, and a cold token's."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    nbytes: float
    token_bytes: float


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
    top1: float
    perplexity: float  # relative change
    needles: int
    recalled: int


# ---- cases ----------------------------------------------------------------------------------------------------------


def needle_questions(count: int, seed: int) -> list[Question]:
    """Random access codes of places, six digits each."""
    generator = torch.Generator().manual_seed(seed)
    questions = []
    for i in range(count):
        place = PLACES[i % len(PLACES)] + (f" number {i // len(PLACES) + 1}" if i >= len(PLACES) else "")
        code = "".join(str(d) for d in torch.randint(10, (6,), generator=generator).tolist())
        what = f"secret access code of the {place}"
        asked = f"Question: What is the {what}?\nAnswer: The {what} is"
        questions.append(Question(f"The {what} is {code}.", asked, f" {code}"))
    return questions


def tokens_of(tokenizer: Any, text: str, *, first: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=first).input_ids


def text_case(name: str, text: str, tokenizer: Any, *, context: int, needles: int, seed: int) -> Case:
    """A text's first tokens with facts hidden at even distances, its next tokens, then questions and answers.

    Raises:
        ValueError: the text is too short.
    """
    questions = needle_questions(needles, seed)
    facts = [tokens_of(tokenizer, f"\n{q.fact}\n") for q in questions]
    plain = tokens_of(tokenizer, text, first=True)
    own = context - sum(map(len, facts))  # tokens of the text in the context
    if own < 1 or len(plain) < own + PREDICTED:
        raise ValueError(f"{name}: expected at least {max(own, 1) + PREDICTED} tokens, got {len(plain)}")
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
    name: str, ids: list[int], context: int, questions: Sequence[Question], tokenizer: Any, *, before: str
) -> Case:
    answers = []
    for question in questions:
        ids = ids + tokens_of(tokenizer, before + question.asked)
        answer = tokens_of(tokenizer, question.answer)
        answers.append(range(len(ids) - context, len(ids) - context + len(answer)))
        ids = ids + answer
    return Case(name, torch.tensor([ids]), context, answers)


# ---- the model ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def read_prefix(model: Any, case: Case) -> Prefix:
    """Keys, values and queries of the context but its last token, which is the first to predict from."""
    bands = dict.fromkeys(HEAD_DIMS, "16x8")
    collect = Preset(k=bands, v=bands, min_fit=case.ids.shape[1])  # never compresses, but keeps the queries
    with enable(model, collect) as handle:
        cache = handle.new_cache()
        model(input_ids=case.ids[:, : case.context - 1].to(model.device), logits_to_keep=1, **{CACHE: cache})
        spectral, rope = cache.spectral, handle.rope.to(model.device)
    assert spectral is not None
    k, v, q = [], [], []
    for layer in spectral.layers:
        keys, values, _ = layer.get_kv(rope="pre")
        assert layer.queries is not None
        k.append(keys)
        v.append(values)
        q.append(torch.cat(layer.queries, dim=2))
        layer.reset()  # one layer at a time is held twice
    return Prefix(k, v, q, rope, v_metrics(model))


@torch.no_grad()
def predict(model: Any, case: Case, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Log-probabilities of all tokens at the predicted places, float32 [P, V], with a context cached as given."""
    cache = DynamicCache()
    for i, (k, v) in enumerate(layers):
        cache.update(k.to(model.dtype), v.to(model.dtype), i)
    ids = case.ids[:, case.context - 1 : -1].to(model.device)
    mask = torch.ones((1, case.ids.shape[1] - 1), dtype=torch.long, device=model.device)
    logits = model(input_ids=ids, attention_mask=mask, **{CACHE: cache}).logits[0]
    return logits.float().log_softmax(-1)


def compare(case: Case, exact: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """KL, top-1 agreement, change of the perplexity, and recalled answers, from log-probabilities [P, V]."""
    target = case.ids[0, case.context :].to(exact.device)
    kl = (exact.exp() * (exact - other)).sum(-1).mean().item()
    best = other.argmax(-1)
    nll, nll_exact = (-x.gather(1, target[:, None]).mean().item() for x in (other, exact))
    right = (best == target).tolist()
    return {
        "kl": kl,
        "top1": (best == exact.argmax(-1)).float().mean().item(),
        "perplexity": math.exp(nll - nll_exact) - 1,
        "recalled": sum(all(right[i] for i in places) for places in case.answers),
    }


# ---- schemes --------------------------------------------------------------------------------------------------------


def store_spectral(
    prefix: Prefix,
    preset: str | Preset,
    dtype: torch.dtype | None = None,
    *,
    queries: bool = True,
    first: int | None = None,
    rope: str = "rotated",
) -> Stored:
    """Through the real cache, layer by layer as a prefill does.

    Args:
        dtype: of the exact tokens; by default 16 bits.      queries: whether the cache sees them.
        first: append so many tokens at first, which the bases are fitted on, then the others, 64 at a time.
        rope: of the keys that the cache gives back, "rotated" or "pre" (and are turned here).
    """
    if dtype is None:
        dtype = prefix.k[0].dtype if prefix.k[0].dtype != torch.float32 else torch.float16
    cache = SpectralCache(
        layers=len(prefix.k),
        batch=1,
        query_heads=prefix.q[0].shape[1],
        kv_heads=prefix.k[0].shape[1],
        head_dim=prefix.k[0].shape[-1],
        rope=prefix.rope,
        preset=preset,
        dtype=dtype,
        device=prefix.k[0].device,
        v_metrics=prefix.metrics,
    )
    for part in (slice(0, first), *(slice(t, t + 64) for t in range(first or prefix.tokens, prefix.tokens, 64))):
        for i, (k, v, q) in enumerate(zip(prefix.k, prefix.v, prefix.q, strict=True)):
            cache.append(i, k[:, :, part], v[:, :, part], queries=q[:, :, part] if queries else None)
    layers = []
    for i in range(len(prefix.k)):
        k, v, _ = cache.get_kv(i, rope=rope)
        layers.append((prefix.scaled(k.float()) if rope == "rotated" else prefix.rotated(k.float()), v))
    return Stored(layers, cache.nbytes, cache.token_bytes)


def _without_mean(sides: Sequence[compress.Side]) -> list[compress.Spectrum]:
    spectra = compress.fit_spectra([replace(side, centre=False) for side in sides])
    found = []
    for side, spectrum in zip(sides, spectra, strict=True):
        row, scale = torch.zeros_like(spectrum.basis[..., :1, :]), torch.ones_like(spectrum.scale[..., :1])
        found.append(spectrum.with_mean(row, scale) if side.centre else spectrum)
    return found


def _unclipped(coefficients: torch.Tensor, choices: Sequence[Any], _: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    found = []
    for bands in choices:
        own = coefficients[..., : bands.rank]
        largest = own.abs().amax(-2).clamp_min(torch.finfo(torch.float32).tiny)
        half = torch.tensor([2.0 ** (b - 1) for b in bands.bits], device=largest.device)
        units = own * (half / largest)[..., None, :]
        off = (units.floor() + 0.5).clamp(0.5 - half, half - 0.5) - units
        rest = (0, coefficients.shape[-1] - bands.rank)
        lost = off.square().sum(-2) * (largest / half).square()
        found.append((torch.nn.functional.pad(largest / half, rest, value=1.0), torch.nn.functional.pad(lost, rest)))
    steps, errors = (torch.stack(x) for x in zip(*found, strict=True))
    return steps, errors


def streamed(preset: str, first: int) -> dict[str, Callable[[Prefix], Stored]]:
    """A preset that meets `first` tokens at once and then 64 at a time: with new segments and without."""
    one = replace(PRESETS[preset], max_residual=math.inf)
    return {
        f"{preset}, streamed": partial(store_spectral, preset=preset, first=first),
        f"{preset}, streamed, one segment": partial(store_spectral, preset=one, first=first),
    }


def store_aligned(prefix: Prefix, preset: Preset, align: int) -> Stored:
    """What blocks of alignment shorter than a page would do, which pages cannot have: the cache's codec on such keys."""

    def with_align(function: Callable[..., Any]) -> Callable[..., Any]:
        changed = {"chunk": align, "stride": 1}
        return lambda *args, **kwargs: function(*args, **{name: changed.get(name, x) for name, x in kwargs.items()})

    with ExitStack() as patches:
        for name in ("phase_align", "query_metric", "error_weights", "rotate"):
            patches.enter_context(mock.patch.object(cache_module, name, with_align(getattr(cache_module, name))))
        return store_spectral(prefix, preset, rope="pre")


def _of_last_queries(q: torch.Tensor, rope: Rope, **options: Any) -> torch.Tensor:
    """`query_metric` of the newest 512 queries alone."""
    q = q.clone()
    q[:, :, :-512] = 0.0  # they add nothing
    return compress.query_metric(q, rope, **options)


def ablations(preset: Preset, head_dim: int) -> dict[str, Callable[[Prefix], Stored]]:
    """A preset with one thing changed a row."""
    rows: dict[str, Callable[[Prefix], Stored]] = {}

    def patched(prefix: Prefix, owner: Any, name: str, new: Any) -> Stored:
        with mock.patch.object(owner, name, new):
            return store_spectral(prefix, preset)

    rows["no sinks"] = partial(store_spectral, preset=replace(preset, sinks=0))
    rows["no metric of K"] = lambda p: patched(p, cache_module, "query_metric", lambda *args, **kwargs: None)
    rows["K's metric of 512 queries"] = lambda p: patched(p, cache_module, "query_metric", _of_last_queries)
    rows["query heads count alike"] = lambda p: patched(p, LayerCache, "_shares", lambda _, w: torch.ones_like(w))
    rows["no metric of V"] = lambda p: store_spectral(replace(p, metrics=[None] * len(p.k)), preset)
    rows["no queries"] = partial(store_spectral, preset=preset, queries=False)
    rows["K not centred"] = lambda p: patched(p, cache_module, "fit_spectra", _without_mean)
    rows["steps unclipped"] = lambda p: patched(p, compress, "fit_quantisers", _unclipped)
    layout = preset.layout(head_dim)
    if layout is not None:
        one = replace(preset, k={head_dim: str(layout.k)}, v={head_dim: str(layout.v)}, ratio=None)
        rows[f"all {layout.k}, {layout.v}"] = lambda p: store_spectral(p, one)
    rows["1 % outliers exact"] = partial(store_spectral, preset=replace(preset, outliers=0.01))
    if preset.ratio is not None:
        # As many bytes: a cold token is allowed what is left of them.
        exact, cold = 0.01 * (4 * head_dim + 4), 4 * head_dim / preset.ratio
        fewer = replace(preset, outliers=0.01, ratio=4 * head_dim / (cold - exact))
        rows["1 %, at equal bytes"] = partial(store_spectral, preset=fewer)
    for chunk in (64, 128, 256):
        if chunk != preset.chunk:
            rows[f"chunk {chunk}"] = partial(store_spectral, preset=replace(preset, chunk=chunk))
    for align in (1, 32):
        rows[f"align {align} (simulated)"] = partial(store_aligned, preset=preset, align=align)
    for align in (64, 128, 256, 512, 1024):
        if align != preset.align:
            rows[f"align {align}"] = partial(store_spectral, preset=replace(preset, align=align))
    for window in (16, 32, 64):
        if window != preset.window:
            rows[f"window {window}"] = partial(store_spectral, preset=replace(preset, window=window))

    def on_a_quarter(prefix: Prefix, **changes: Any) -> Stored:
        return store_spectral(prefix, replace(preset, **changes), first=prefix.tokens // 4)

    rows["fitted on a quarter"] = on_a_quarter
    for bound in (1.0, 1.5, math.inf):
        rows[f"quarter, max_residual {bound}"] = partial(on_a_quarter, max_residual=bound)
    return rows


def _exact_tokens(prefix: Prefix) -> int:
    """Tokens that the yardsticks keep exact: sinks, the window and what does not fill 64 tokens."""
    return SINKS + prefix.tokens - _cold_tokens(prefix)


def _cold_tokens(prefix: Prefix) -> int:
    return max(0, (prefix.tokens - WINDOW) // WINDOW * WINDOW)


def _token_bytes(prefix: Prefix) -> int:
    """Bytes of a token in a dense 16-bit cache, all layers."""
    _, heads, _, dim = prefix.k[0].shape
    return len(prefix.k) * heads * dim * 2 * 2


def _with_exact(prefix: Prefix, code: Callable[[torch.Tensor, bool], torch.Tensor], bits: float) -> Stored:
    """A scheme that codes rotated keys and values of cold tokens, [1, G, T, D] float32, with `bits` a number."""
    cold = _cold_tokens(prefix)

    def coded(x: torch.Tensor, is_key: bool) -> torch.Tensor:
        x = x.float()
        return torch.cat((x[:, :, :SINKS], code(x[:, :, :cold], is_key)[:, :, SINKS:], x[:, :, cold:]), dim=2)

    layers = [(coded(prefix.rotated(k), True), coded(v, False)) for k, v in zip(prefix.k, prefix.v, strict=True)]
    token = _token_bytes(prefix)
    return Stored(layers, cold * token * bits / 16 + _exact_tokens(prefix) * token, token * bits / 16)


def in_groups(x: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """Groups of 32 along `dim`, rounded to 2**bits even levels from the least to the greatest of each group."""
    groups = x.unflatten(dim, (-1, GROUP))
    least, most = groups.amin(dim, keepdim=True), groups.amax(dim, keepdim=True)
    step = ((most - least) / (2**bits - 1)).half().float().clamp_min(1e-7)
    least = least.half().float()
    return (((groups - least) / step).round().clamp(0, 2**bits - 1) * step + least).flatten(dim - 1, dim)


def store_groups(prefix: Prefix, bits: int) -> Stored:
    def code(x: torch.Tensor, is_key: bool) -> torch.Tensor:
        return in_groups(x, -2, bits) if is_key else in_groups(x, -1, bits)

    return _with_exact(prefix, code, bits + 2 * 16 / GROUP)


def store_fp8(prefix: Prefix) -> Stored:
    def code(x: torch.Tensor, is_key: bool) -> torch.Tensor:
        scale = x.abs().amax((-2, -1), keepdim=True).clamp_min(1e-20) / torch.finfo(torch.float8_e4m3fn).max
        return (x / scale).to(torch.float8_e4m3fn).float() * scale

    return _with_exact(prefix, code, 8)


def store_predecessor(prefix: Prefix, ranks: tuple[int, int] = (16, 32), block: int = 512) -> Stored:
    cold = prefix.tokens // block * block
    _, heads, _, dim = prefix.k[0].shape

    def code(x: torch.Tensor, rank: int) -> torch.Tensor:
        blocks = x[:, :, :cold].float().unflatten(2, (-1, block))
        basis = torch.linalg.svd(blocks, full_matrices=False).Vh[..., :rank, :].half().float()
        c = blocks @ basis.mT
        scale = (c.abs().amax(-2, keepdim=True) / 127).half().float().clamp_min(1e-7)
        coded = ((c / scale).round().clamp(-127, 127) * scale) @ basis
        return torch.cat((coded.flatten(2, 3), x[:, :, cold:].float()), dim=2)

    layers = [(prefix.rotated(code(k, ranks[0])), code(v, ranks[1])) for k, v in zip(prefix.k, prefix.v, strict=True)]
    a_token = len(prefix.k) * heads * sum(rank * (1 + (2 * dim + 2) / block) for rank in ranks)
    return Stored(layers, cold * a_token + (prefix.tokens - cold) * _token_bytes(prefix), a_token)


YARDSTICKS: dict[str, Callable[[Prefix], Stored]] = {
    "fp8": store_fp8,
    "kivi-4": lambda prefix: store_groups(prefix, 4),
    "kivi-3": lambda prefix: store_groups(prefix, 3),
    "kivi-2": lambda prefix: store_groups(prefix, 2),
    "predecessor": store_predecessor,
}


def read_tensors(path: Path) -> Prefix:
    """Real keys, values and last queries of some layers from a safetensors file, without a model.

    layerN.k, layerN.v: [G, T, D] before RoPE; layerN.q: [H, Q, D] of the last Q positions; inv_freq [D/2]. The queries of
    earlier positions are taken to be like the known ones, which repeat.
    """
    from safetensors.torch import load_file

    held = load_file(path)
    layers = sorted(int(name[5:-2]) for name in held if name.endswith(".k"))
    k, v, q = ([held[f"layer{n}.{side}"].float()[None] for n in layers] for side in "kvq")
    tokens = k[0].shape[2]
    q = [x.repeat(1, 1, tokens // x.shape[2] + 1, 1)[:, :, -tokens:] for x in q]
    return Prefix(k, v, q, Rope.from_inv_freq(held["inv_freq"]), [None] * len(layers))


def attention_errors(prefix: Prefix, stored: Stored, layer: int, *, queries: int = 128) -> tuple[float, float]:
    """What a scheme changes in one layer for the newest `queries` queries.

    Returns:
        (root mean square of the change of scores, weighted by the exact softmax, each query's mean taken out as softmax
        does; relative error of outputs: norm of all changes over norm of all outputs).
    """
    heads, groups = prefix.q[layer].shape[1], prefix.k[layer].shape[1]
    positions = torch.arange(prefix.tokens, device=prefix.q[layer].device)[None]
    q = prefix.scaled(rotate(prefix.q[layer].contiguous(), positions, prefix.rope).float())[:, :, -queries:]
    mask = positions <= positions[0, -queries:, None]

    def attend(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        k, v = (x.float().repeat_interleave(heads // groups, dim=1) for x in (k, v))
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        p = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return scores, p, p @ v

    scores, p, o = attend(prefix.rotated(prefix.k[layer]), prefix.v[layer])
    scores_stored, _, o_stored = attend(*stored.layers[layer])
    change = scores_stored - scores
    change = change - (p * change).sum(-1, keepdim=True)
    return (p * change.square()).sum(-1).mean().sqrt().item(), ((o_stored - o).norm() / o.norm()).item()


def measure(
    model: Any, case: Case, schemes: dict[str, Callable[[Prefix], Stored]], *, model_name: str, bar: Any = None
) -> Iterator[Row]:
    """All schemes on one case, as they come; the context is read once."""
    prefix = read_prefix(model, case)
    exact = predict(model, case, [(prefix.rotated(k), v) for k, v in zip(prefix.k, prefix.v, strict=True)])
    if bar is not None:
        bar.update(1)
    dense = _token_bytes(prefix)
    for name, store in schemes.items():
        stored = store(prefix)
        result = compare(case, exact, predict(model, case, stored.layers))
        recalled = int(result.pop("recalled"))
        ratios = (prefix.tokens * dense / stored.nbytes, dense / stored.token_bytes)
        yield Row(
            model_name, case.name, case.context, name, *ratios, **result, needles=len(case.answers), recalled=recalled
        )
        if bar is not None:
            bar.update(1)


# ---- output ---------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    lines = []
    for text in dict.fromkeys(row.text for row in rows):
        own = [row for row in rows if row.text == text]
        lines.append(f"\n{own[0].model}, {text}, {own[0].context} tokens of context")
        lines.append(f"{'scheme':<34}{'ratio':>7}{'long':>7}{'KL':>10}{'top-1':>8}{'ppl':>9}{'recalled':>10}")
        for row in own:
            recalled = f"{row.recalled}/{row.needles}" if row.needles else "-"
            lines.append(
                f"{row.scheme:<34}{row.ratio:>7.2f}{row.ratio_long:>7.2f}{row.kl:>10.5f}{row.top1:>8.3f}"
                f"{100 * row.perplexity:>+8.2f}%{recalled:>10}"
            )
    return "\n".join(lines)


def frontier(rows: Sequence[Row], path: Path) -> None:
    """Ratio against KL and against recall, one panel row a text, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    texts = list(dict.fromkeys(row.text for row in rows))
    figure, axes = plt.subplots(len(texts), 2, figsize=(11, 4 * len(texts)), squeeze=False, layout="constrained")
    for (left, right), text in zip(axes, texts, strict=True):
        for row in (row for row in rows if row.text == text):
            ours = row.scheme not in YARDSTICKS
            for panel, y in ((left, max(row.kl, 1e-7)), (right, row.recalled)):
                panel.plot(row.ratio, y, "o" if ours else "x", color="tab:blue" if ours else "tab:gray")
                panel.annotate(row.scheme, (row.ratio, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
        left.set(title=f"{text}: lower and further right is better", xlabel="ratio", ylabel="KL, nats", yscale="log")
        right.set(title="needles recalled", xlabel="ratio", ylim=(-0.5, max(r.needles for r in rows) + 0.8))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="path or id of a Llama, Mistral, Qwen2 or Qwen3 (default: the embedded model)")
    parser.add_argument("--gguf", help="GGUF file of such a model; a name alone is looked for in the folder --model")
    parser.add_argument("--text", type=Path, nargs="+", action="extend", default=[], metavar="FILE", help="UTF-8 texts")
    parser.add_argument("--context", type=int, default=4000, help="tokens read before prediction starts (default 4000)")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS), metavar="PRESET")
    parser.add_argument("--ablation", choices=list(PRESETS)[1:], help="also this preset with one thing changed a row")
    parser.add_argument("--stream", type=int, metavar="N", help="also the presets fitted on N tokens, the rest bit by bit")
    parser.add_argument("--yardsticks", choices=list(YARDSTICKS), nargs="*", default=list(YARDSTICKS), metavar="NAME")
    parser.add_argument("--needles", type=int, default=0, metavar="N", help="hide N access codes and ask for them")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write one JSON row a line, one a scheme and text")
    parser.add_argument("--png", type=Path, help="of the frontier plot (default: OUT with .png, or quality.png)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float32 on a CPU, bfloat16 or float16 on a GPU")
    parser.add_argument("--seed", type=int, default=0, help="of the codes, and of the embedded model's text")
    args = parser.parse_args(argv)
    if args.gguf and args.model:
        args.gguf = str(Path(args.model) / args.gguf)  # an absolute path stays as it is
    embedded = args.model is None and args.gguf is None
    if args.context < 1 or args.needles < 0 or (args.stream or 1) < 1:
        parser.error("--context and --stream must be at least 1, --needles at least 0")
    if embedded == bool(args.text):
        parser.error("--text goes with --model or --gguf; the embedded model knows only texts of its own")
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
    schemes: dict[str, Callable[[Prefix], Stored]] = {p: partial(store_spectral, preset=p) for p in args.presets}
    for p in args.presets:
        if args.stream and p != "exact":
            schemes |= streamed(p, args.stream)
    schemes |= {name: YARDSTICKS[name] for name in args.yardsticks}
    if args.ablation:
        schemes |= ablations(PRESETS[args.ablation], model.get_decoder().layers[0].self_attn.head_dim)
    ran = versions()  # now: the tree may change while this runs
    rows: list[Row] = []
    with (
        tqdm(total=len(cases) * (len(schemes) + 1), desc="quality", unit="scheme") as bar,
        args.json.open("w") if args.json else nullcontext() as out,
    ):
        for row in chain.from_iterable(measure(model, case, schemes, model_name=name, bar=bar) for case in cases):
            rows.append(row)
            if out is not None:  # at once: a run may take long
                out.write(json.dumps({**vars(row), **ran}) + "\n")
                out.flush()
    print(table(rows))
    png = args.png or (args.json.with_suffix(".png") if args.json else Path("quality.png"))
    frontier(rows, png)
    print(f"\nfrontier: {png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
