"""Calibration, once a model: what its keys, values and queries are like, and the codec for them.

With kappa = R(-t0) k (rope.py), over tokens of texts of several kinds, a KV head at a time:

    costs     errors dk of keys i and dv of values change the outputs o of queries q, with softmax
              weights p, to first order by do = sum_i p_i (scale (y . dk_i) (v_i - o) + dv_i),
              y = R(-t0) q, and the model's predictions by a KL of E (g . do)^2 / 2, with g the
              gradient at o of the log-probability of tokens drawn from the predictions. On few
              tokens gradients are left out (|do|^2 in units of sum |o|^2): too few tell too little
    metric    of K: sum of scale^2 p_i^2 (g . (v_i - o))^2 y y^T over queries and the frames of the
              keys they meet; of V: sum of p_i^2 g g^T
    basis     x ~ c B of least M-weighted error: M = L L^T, L^T cov(x) L = V S V^T,
              B = V_R^T L^(-1); int8 rows; of K less its mean, of V as it is
    encoder   E = M B^T (B M B^T)^(-1), B as int8 holds it, in units of the quantisers' steps
    steps     of least squared error on sampled rows, a little wider
    plan      bands of every layer: least sum of costs under one byte budget

    stats = collect(model, token_sequences(tokenizer, 65536))
    codec = fit_codec(stats, plan(stats, "balanced"), "balanced")  # or calibrate(model, tokenizer)

Oracle: reference/calibrate.py.   Test: tests/test_calibrate.py.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._checks import check_in, check_least, check_tensor
from .codec import Codec, ModelCodec, cache_path, fingerprint
from .layout import HEAD_DIMS, Bands, PageLayout
from .rope import freqs_from_inv_freq

FRAME = 512  # positions of a frame
SAMPLE = 2048  # rows a KV head that quantiser steps are fitted on
QUERIES = 256  # that costs of errors are estimated from, a head and sequence: more of a long one
LENGTH = 16384  # tokens of a sequence: by shorter ones' costs long contexts lose what they recall
SHORT = 4096  # of one where few are read in all, or where memory is too small
WINDOW = 128  # newest tokens that the presets keep exact
GPU_TOKENS, CPU_TOKENS = 65536, 8192  # tokens that are read by default
# Tokens from which on gradients are asked for: they vary more than outputs do. Without them long
# contexts' keys are told apart less well, which KL hides: ablated_multikey in perf/RESULTS.md.
LEAST_DRAWN = 49152
METRIC_FLOOR = 0.1  # of the mean eigenvalue, added to metrics: few queries told them
STEP_SHARES, LEAST_SHARE = 32, 0.2  # steps tried: from the widest, which clips nothing, to a fifth
MAX_LAYOUTS = 4  # different ones in a model
MARGIN = {2: 1.25, 4: 1.1}  # of steps, by bits: clipping errors do not cancel as others do
HEADROOM = 1.25  # of 8-bit components over the sample's range: clipping one loses a token's key
NAME = "spectral_calibration"  # of the attention function, while a model is read


@dataclass(frozen=True)
class Preset:
    """How small a cache is.

    Args:
        ratio: how many times smaller than 16-bit keys and values a token's pages are at least, all
            layers together.
        window: newest tokens that are exact, at least 1.      sinks: first tokens that are exact.
    """

    ratio: float
    window: int = WINDOW
    sinks: int = 4

    def __post_init__(self) -> None:
        if not self.ratio > 0:
            raise ValueError(f"ratio: expected a positive number, got {self.ratio}")
        check_least(window=(self.window, 1), sinks=(self.sinks, 0))


PRESETS = {"quality": Preset(5.28), "balanced": Preset(8.0), "small": Preset(12.1)}


def preset_of(preset: str | Preset) -> tuple[str, Preset]:
    """Its name and itself ("custom" for one without a name).

    Raises:
        ValueError, TypeError: no such preset.
    """
    if isinstance(preset, str):
        check_in("preset", preset, tuple(PRESETS))
        return preset, PRESETS[preset]
    if not isinstance(preset, Preset):
        raise TypeError(
            f"preset: expected a Preset or one of {list(PRESETS)}, got {type(preset).__name__}"
        )
    return next((name for name, known in PRESETS.items() if known == preset), "custom"), preset


def menus(head_dim: int) -> dict[str, tuple[Bands, ...]]:
    """Bands of "k" and of "v" to choose from: few, as each pair that occurs is a kernel of its own.

    Components after the best ones get 2 bits or none; some layers' keys need 8 bits for the best.
    Bands to which others give every component as many bits for as few bytes are left out.
    """
    check_in("head_dim", head_dim, HEAD_DIMS)
    d, q = head_dim, max(16, head_dim // 64 * 16)  # q: about a quarter of the components
    r = d - 2 * q
    half, most = f"{2 * q}x4+{r}x2", f"16x8+{2 * q - 16}x4+{r}x2"
    texts = {
        "k": f"{q}x4 {q}x4+{q}x2 {q}x4+{2 * q}x2 16x8+16x4 16x8+16x4+{q}x2 {half} {most}",
        "v": f"{q}x4 {q}x2 {2 * q}x2 {3 * q}x2 {d}x2 {q}x4+{2 * q}x2 {q}x4+{d - q}x2 {half} {d}x4",
    }

    def covers(a: Bands, b: Bands) -> bool:
        return a.rank >= b.rank and all(x >= y for x, y in zip(a.bits, b.bits, strict=False))

    found = {}
    for side, text in texts.items():
        bands = [Bands.parse(part) for part in text.split()]
        pairs = [(a, b) for a in bands for b in bands if a is not b and covers(a, b)]
        worse = [b for a, b in pairs if a.bytes <= b.bytes]
        found[side] = tuple(b for b in bands if b not in worse)
    return found


# What a layer's tokens are like.


@dataclass(frozen=True)
class Side:
    """What is known of one side (K or V) of a layer. Float64 on the CPU unless said otherwise.

    Args:
        moment: [G, D, D], mean of (x - mean)^T (x - mean) over tokens x [D].
        metric: [G, D, D], M: an error e [D] of each token, independent of the others', adds e M e^T
            to the cost.
        mean: [G, D] (zeros: not centred).
        rows: float32 [G, N, D] on the CPU: a sample of tokens x.
        device: where much is computed.
    """

    moment: Tensor
    metric: Tensor
    mean: Tensor
    rows: Tensor
    device: torch.device

    @cached_property
    def basis(self) -> Tensor:
        """All D components, best first: [G, D, D]."""
        return fit_basis(self.moment, self.metric)

    def coefficients(self, encoder: Tensor) -> Tensor:
        """Of the sampled rows, float32 [G, N, R] on `device`; encoder [G, D, R]."""
        rows = self.rows.to(self.device) - self.mean.float().to(self.device)[:, None]
        return rows @ encoder.float().to(self.device)

    @cached_property
    def errors(self) -> dict[int, Tensor]:
        """What components add to the cost, all heads together, [D], by bits (0: none)."""
        weight = ((self.basis @ self.metric) * self.basis).sum(-1)
        c = self.coefficients(torch.linalg.inv(self.basis))
        lost = {bits: fit_steps(c, [bits] * c.shape[-1])[1] for bits in (8, 4, 2)}
        lost[0] = c.square().mean(-2)
        return {bits: (x.double().cpu() * weight).sum(0) for bits, x in lost.items()}

    def loss(self, bands: Bands) -> float:
        """What storing this side in these bands costs."""
        bits = (*bands.bits, *[0] * (self.moment.shape[-1] - bands.rank))
        return sum(float(self.errors[b][r]) for r, b in enumerate(bits))


@dataclass(frozen=True)
class LayerStats:
    """What is known of a layer.

    Args:
        k: of kappa, the keys turned back by their frame's start, without sinks.      v: of the
            values.
        freqs: int64 [pairs], of the model's rotation (CPU).
    """

    k: Side
    v: Side
    freqs: Tensor


@dataclass(frozen=True)
class ModelStats:
    """What `collect` found: of every full-attention layer; on how much text; of which model."""

    layers: tuple[LayerStats, ...]
    tokens: int
    sequences: int
    fingerprint: str


def turned(x: Tensor, positions: Tensor, freqs: Tensor) -> Tensor:
    """R(positions) x in float64: x [..., T, D], positions int64 [T], freqs int64 [pairs]."""
    pairs = freqs.shape[0]
    # The product of integers wraps at full turns.
    angle = (positions[:, None] * freqs).double() * (2 * math.pi / 2**64)  # [T, pairs]
    cos, sin = angle.cos(), angle.sin()
    a, b, rest = x.double().split((pairs, pairs, x.shape[-1] - 2 * pairs), dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), dim=-1)


def error_costs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gradient: Tensor | None,
    freqs: Tensor,
    *,
    scale: float,
    sinks: int,
    window: int,
    queries: int = QUERIES,
    frame: int = FRAME,
) -> tuple[Tensor, Tensor]:
    """What errors of older keys and values cost the model's predictions, to first order.

    By queries of the second half, evenly, the same of all heads (of long ones each eighth). With p
    the softmax weights of a query m, o its output, g its gradient, tokens i older than the window:

    Args:
        q, gradient: [H, T, D]; k, v: [G, T, D]; q and k as the model rotated them; floating point.
            No gradient: all directions count alike, g g^T is the identity.
        freqs: int64 [pairs].      scale: of scores.
        sinks, window: first tokens and newest ones that are exact, and have no errors.
    Returns:
        metrics: of K and V, float64 [2, G, D, D], sums over queries m of
            scale^2 sum_i p_i^2 (g . (v_i - o))^2 y y^T, y = R(-t0) q_m with t0 the start of i's
            frame; of sum_i p_i^2 g g^T.
        power: float64 [], the sum of |o|^2.
    """
    heads, tokens, dim = q.shape
    first = tokens // 2
    count = min(max(queries, tokens // 16), tokens - first)
    steps = torch.arange(count, device=q.device)
    at = first + steps * (tokens - 1 - first) // max(1, count - 1)
    positions = torch.arange(tokens, device=q.device)
    starts = -frame * torch.arange(-(-tokens // frame), device=q.device)
    metrics = q.new_zeros(2, len(k), dim, dim, dtype=torch.float64)
    power = q.new_zeros((), dtype=torch.float64)
    for h in range(heads):
        g = h * len(k) // heads
        keys, values = k[g].float(), v[g].float()
        for part in at.split(256):
            asked, age = q[h, part].float(), part[:, None] - positions
            scores = scale * (asked @ keys.mT)  # [256, T]
            p = scores.masked_fill(age < 0, float("-inf")).softmax(-1)
            o = p @ values
            square = o.square().sum(-1, keepdim=True)
            power += square.sum()
            p = p.masked_fill((positions < sinks) | (age < window), 0.0).square()
            weight = p.sum(-1, keepdim=True)
            if gradient is None:  # |v_i - o|^2
                off = (values.square().sum(-1) - 2 * (o @ values.mT) + square).clamp_min(0)
                metrics[1, g].diagonal().add_(weight.sum())
            else:  # (g . (v_i - o))^2
                grad = gradient[h, part].float()
                off = (grad @ values.mT - (grad * o).sum(-1, keepdim=True)).square()
                metrics[1, g] += (weight * grad).mT @ grad
            cost = torch.nn.functional.pad(scale**2 * p * off, (0, -tokens % frame))
            cost = cost.unflatten(-1, (-1, frame)).sum(-1, keepdim=True)
            y = turned(asked[:, None].expand(-1, len(starts), -1), starts, freqs)
            metrics[0, g] += (y * cost).flatten(0, 1).mT @ y.flatten(0, 1)
    return metrics, power


class _Layer:
    """Sums over the tokens of a layer that have been read; on its device."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, freqs: Tensor, every: int) -> None:
        heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[-1]
        if k.shape[-1] != dim or v.shape[-1] != dim or dim not in HEAD_DIMS:
            raise ValueError(
                f"model: expected keys and values of one head dimension of {HEAD_DIMS}, "
                f"got {k.shape[-1]} and {v.shape[-1]}"
            )
        if v.shape[1] != kv_heads or heads % kv_heads:
            raise ValueError(f"model: expected a multiple of {kv_heads} query heads, got {heads}")
        zeros = partial(torch.zeros, dtype=torch.float64, device=q.device)
        self.freqs, self.every = freqs.to(q.device), every
        self.count = 0
        self.k_sum, self.moments = zeros(kv_heads, dim), zeros(2, kv_heads, dim, dim)
        self.metrics, self.power = zeros(2, kv_heads, dim, dim), zeros(())
        self.rows: list[Tensor] = []

    def add(self, q: Tensor, k: Tensor, v: Tensor, gradient: Any, **options: Any) -> None:
        """A batch: q, k, v [B, heads, T, D], gradient [B, T, H, D] or None (of all batches)."""
        slopes: Any = [None] * len(q) if gradient is None else gradient.transpose(1, 2)
        for row in zip(q, k, v, slopes, strict=True):
            metrics, power = error_costs(*row, self.freqs, **options)
            self.metrics += metrics
            self.power += power if gradient is None else 1.0
            self.add_tokens(row[1], row[2], options["sinks"])

    def add_tokens(self, k: Tensor, v: Tensor, sinks: int) -> None:
        """A sequence's keys and values [G, T, D]."""
        positions = torch.arange(k.shape[1], device=k.device)
        kappa = turned(k, positions % FRAME - positions, self.freqs)[:, sinks:]
        values = v[:, sinks:].double()
        self.count += kappa.shape[1]
        self.k_sum += kappa.sum(1)
        self.moments += torch.stack((kappa.mT @ kappa, values.mT @ values))
        self.rows.append(torch.stack((kappa, values))[:, :, :: self.every].float().cpu())

    def stats(self) -> LayerStats:
        mean, device = (self.k_sum / self.count).cpu(), self.k_sum.device
        k_moment, v_moment = (self.moments / self.count).cpu().unbind()
        k_rows, v_rows = torch.cat(self.rows, dim=2).unbind()
        k_moment = k_moment - mean[:, :, None] * mean[:, None]
        metrics = (self.metrics / self.power.clamp_min(1e-300)).cpu()
        if not metrics.isfinite().all():
            raise ValueError("model: expected finite gradients, got inf or NaN (float16 overflows)")
        floor = METRIC_FLOOR * metrics.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        metrics += floor * torch.eye(mean.shape[-1], dtype=torch.float64)
        k = Side(k_moment, metrics[0], mean, k_rows, device)
        v = Side(v_moment, metrics[1], torch.zeros_like(mean), v_rows, device)
        return LayerStats(k, v, self.freqs.cpu())


_TAPS: dict[int, Callable[..., None]] = {}  # by id of a module of a model that is being read


def _attention(module: Any, q: Any, k: Any, v: Any, *args: Any, original: str, **kwargs: Any):
    """transformers' attention function while a model is read: attends, hands q, k, v, o over."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if original != "eager" or attend is None:
        attend = ALL_ATTENTION_FUNCTIONS["sdpa" if original == "eager" else original]
    found = attend(module, q, k, v, *args, **kwargs)
    take = _TAPS.get(id(module))  # None: another model, of the same config object
    if take is not None:
        take(module, q, k, v, found[0], kwargs.get("scaling"))
    return found


def _configs(model: Any) -> list[Any]:
    """All config objects of a model's modules and in these, outer ones first."""
    found: dict[int, Any] = {}

    def visit(config: Any) -> None:
        if config is None or id(config) in found or not hasattr(config, "_attn_implementation"):
            return
        found[id(config)] = config
        for key in getattr(config, "sub_configs", None) or ():
            visit(getattr(config, key, None))

    for module in model.modules():
        visit(getattr(module, "config", None))
    return list(found.values())


@contextmanager
def _tapped(model: Any, take: Callable[..., None]) -> Iterator[None]:
    """Inside, attention layers hand q, k, v [B, heads, T, D], outputs [B, T, H, D] and the scale
    over to `take`. Afterwards the model is as it was."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    before = [(config, config._attn_implementation) for config in _configs(model)]
    training = [module for module in model.modules() if module.training]
    modules = [id(module) for module in model.modules()]
    try:
        _TAPS.update(dict.fromkeys(modules, take))
        model.eval()
        for config, original in before:
            original = original or "eager"
            name = f"{NAME}_{original}"
            AttentionInterface.register(name, partial(_attention, original=original))
            if original in ALL_MASK_ATTENTION_FUNCTIONS:
                AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
            config._attn_implementation = name  # of configs inside too, whose turn comes later
        yield
    finally:
        for config, original in before:
            config._attn_implementation = original
        for module in training:
            module.training = True
        for module in modules:
            _TAPS.pop(module, None)


def layer_freqs(model: Any, module: Any, head_dim: int) -> Tensor:
    """The frequencies that a layer's q and k were turned with, int64 [pairs], on the CPU.

    Looked for in buffers named *inv_freq: of the attention module, of the layer's type, of the
    decoder. Where there are none, those of RoPE with a base of 10,000: any are exact, the model's
    own make keys compressible.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    owners = [owner for owner in (module, decoder, model) if owner is not None]
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    kind = kinds[index] if kinds and index is not None else "full_attention"
    for owner in owners:
        buffers = [(name.split(".")[-1], x) for name, x in owner.named_buffers()]
        named = [x for name, x in buffers if name == f"{kind}_inv_freq"]
        plain = [x for name, x in buffers if name == "inv_freq"]
        for x in named + plain:
            if x.dim() == 1 and 2 * x.shape[0] <= head_dim and not x.is_meta:
                return freqs_from_inv_freq(x.detach().float(), device="cpu")
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return freqs_from_inv_freq(1e4**-exponent)


@contextmanager
def _differentiable(model: Any) -> Iterator[list[Tensor]]:
    """Inside, outputs have gradients with respect to the embeddings, which the list holds, and a
    layer runs again on the way back instead of keeping what it computed."""
    from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

    from ._model import decoder_of, wrapped_layers

    embedded: list[Tensor] = []

    def begin(module: Any, args: Any, out: Tensor) -> Tensor:
        embedded[:] = [out.detach().requires_grad_()]
        return embedded[0].clone()  # a leaf must not be changed in place

    again = partial(partial, checkpoint, use_reentrant=False, preserve_rng_state=False)
    wrapped = wrapped_layers(decoder_of(model), again)
    whole = set_checkpoint_early_stop(False)  # to the end, where accelerate's hooks wait
    hook = model.get_input_embeddings().register_forward_hook(begin)
    with hook, torch.inference_mode(False), torch.enable_grad(), whole, wrapped:
        yield embedded


def drawn_gradient(logits: Tensor, generator: torch.Generator) -> Tensor:
    """At logits [..., V], of -log p of a token drawn from each row: p, less 1 at the drawn."""
    found = torch.empty_like(logits)
    parts = (x.flatten(0, -2).split(256) for x in (found, logits.detach()))
    for out, part in zip(*parts, strict=True):
        p = part.float().softmax(-1)
        drawn = torch.multinomial(p, 1, generator=generator)
        out.copy_(p.scatter_add(-1, drawn, -torch.ones_like(p[:, :1])))
    return found


def collect(
    model: Any,
    sequences: Iterable[Tensor],
    *,
    sinks: int = 4,
    window: int = WINDOW,
    progress: bool = False,
) -> ModelStats:
    """Read sequences of tokens; note what full-attention layers' keys, values, queries are like,
    and what their errors cost the model's predictions.

    Args:
        model: a transformers causal language model that calls the attention interface
            (`AttentionInterface`); layers may be on several devices. Its attention function, mode
            and configuration are as before afterwards, also after an exception.
        sequences: integer [T] or [B, T], token ids without padding, of more than sinks + window
            tokens.
        sinks, window: first and newest tokens that a cache keeps exact.
        progress: a bar.
    Raises:
        TypeError, ValueError: sequences are not as above; no layer with full attention was met;
            head dimensions that no page layout holds; gradients that are not finite.
    Of LEAST_DRAWN tokens or more, gradients are asked for. If none come back (weights in a format
    that has none or made under torch.inference_mode; no memory for SHORT) all layers do without.
    Memory: one sequence's q, k, v, outputs' gradients and inputs of all layers; logits of half of
    it, twice (of all of it, where the model has no logits_to_keep): beside Llama 8B's weights 19 GB
    of 16,384 tokens in 16 bits. D x D sums in float64 a KV head on each layer's device.
    """
    from inspect import signature

    from tqdm.auto import tqdm

    from ._model import decoder_of, full_layers

    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    sequences = [x[None] if isinstance(x, Tensor) and x.dim() == 1 else x for x in sequences]
    if not sequences:
        raise ValueError("sequences: expected at least one, got none")
    for x in sequences:
        check_tensor("sequences", x, shape=(None, None), dtype=(torch.int32, torch.int64))
        if x.shape[1] <= (least := sinks + window):
            raise ValueError(f"sequences: expected more than {least} tokens, got {x.shape[1]}")
    total = sum(x.numel() for x in sequences)
    layers: dict[int, _Layer] = {}  # by id of the attention module
    full = full_layers(decoder_of(model).config)
    drawn = total >= LEAST_DRAWN and not any(x.is_inference() for x in model.parameters())
    reads: list[Any] | None = None  # calls that wait for gradients; None: layers run again
    gradients: dict[int, Tensor] = {}  # at the outputs of reads

    def take(module: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: Any) -> None:
        if reads is None or getattr(module, "layer_idx", None) not in full:
            return
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"model: expected {q.shape[2]} keys, got {k.shape[2]}")
        if id(module) not in layers:
            freqs = layer_freqs(model, module, q.shape[-1])
            layers[id(module)] = _Layer(q, k, v, freqs, max(1, total // SAMPLE) | 1)
        options: Any = {"scale": scale or q.shape[-1] ** -0.5, "sinks": sinks, "window": window}
        add: Any = partial(layers[id(module)].add, q.detach(), k.detach(), v.detach(), **options)
        if not drawn:
            return add(None)
        if out.requires_grad:
            out.register_hook(partial(gradients.__setitem__, len(reads)))
        reads.append(add)

    takes_keep = "logits_to_keep" in signature(model.forward).parameters
    differentiable: Any = _differentiable(model) if drawn else torch.no_grad()
    bar = tqdm(total=total, desc="calibrating", unit="tok", unit_scale=True, disable=not progress)
    with _tapped(model, take), differentiable as embedded, bar:
        for n, x in enumerate(sequences):
            reads, later = [], x.shape[1] - x.shape[1] // 2  # those that costs are asked from
            keep = {"logits_to_keep": later if drawn else 1} if takes_keep else {}
            logits = model(input_ids=x.to(model.device, copy=True), use_cache=False, **keep).logits
            known, reads = reads, None
            if drawn and logits.requires_grad:
                logits, seeded = logits[:, -later:], torch.Generator(logits.device).manual_seed(n)
                try:
                    logits.backward(drawn_gradient(logits, seeded), inputs=embedded)
                except RuntimeError as error:  # of a product without a derivative, or of memory
                    if n or (x.shape[1] > SHORT and isinstance(error, torch.OutOfMemoryError)):
                        raise
                    warnings.warn(f"calibrating without gradients: {error}", stacklevel=2)
            drawn = drawn and len(gradients) == len(known)
            for i in range(len(known)):
                known.pop(0)(gradients[i] if drawn else None)
            del logits
            gradients.clear()
            bar.update(x.numel())
    if not layers:
        raise ValueError("model: expected full attention through AttentionInterface, got none")
    found = tuple(layer.stats() for layer in layers.values())
    return ModelStats(found, total, sum(len(x) for x in sequences), fingerprint(model))


# Fitting a codec.


def _unit(metric: Tensor) -> Tensor:
    """A metric [..., D, D] scaled to mean eigenvalue 1; the identity for zeros."""
    metric = (metric + metric.mT) / 2
    mean = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(metric.shape[-1], dtype=metric.dtype)
    return torch.where(mean > 0, metric / mean.clamp_min(1e-300), eye)


def fit_basis(moment: Tensor, metric: Tensor) -> Tensor:
    """The basis whose first R rows have the least M-weighted error of all of rank R, for every R.

    Args:
        moment: float64 [..., D, D], second moment of rows x.      metric: likewise.
    Returns:
        float64 [..., D, D], best component first: V^T L^(-1), orthonormal in the metric
        (`_unit`); the largest entry of each row is positive.
    """
    root = torch.linalg.cholesky(_unit(metric))
    vectors = torch.linalg.eigh(root.mT @ moment @ root).eigenvectors.mT.flip(-2)
    basis = torch.linalg.solve_triangular(root, vectors, upper=False, left=False)
    largest = basis.gather(-1, basis.abs().argmax(-1, keepdim=True))
    return (basis * largest.sign()).contiguous()


def quantise_basis(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., R, D] as int8, -127 .. 127, and scales float32 [..., R]: basis ~ scale * rows."""
    scale = (basis.abs().amax(-1) / 127).float()
    scale = torch.where(scale > 0, scale, 1.0)
    return (basis / scale.double()[..., None]).round().clamp(-127, 127).to(torch.int8), scale


def fit_encoder(rows: Tensor, scale: Tensor, metric: Tensor) -> Tensor:
    """The encoder of a basis as int8 holds it: coefficients x @ encoder of least M-weighted error.

    Args:
        rows: int8 [..., R, D], R at most D.      scale: float32 [..., R].
        metric: float64 [..., D, D].
    Returns:
        float64 [..., D, R].
    """
    basis = rows.double()
    weighted = basis @ _unit(metric)
    inner = basis @ weighted.mT
    length = inner.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).sqrt()
    inner = inner / (length[..., :, None] * length[..., None, :])
    solved = torch.linalg.solve(inner, weighted / length[..., None])
    return (solved / (length * scale.double())[..., None]).mT


def fit_steps(coefficients: Tensor, bits: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The quantiser step of each component with the least squared error over a sample.

    8-bit components, which hold most of a key's length, are not clipped: their steps leave HEADROOM
    for what the sample does not have.

    Args:
        coefficients: float32 [..., N, R].      bits: of each component.
    Returns:
        (steps, mean squared errors), float32 [..., R]; steps are positive.
    """
    top = torch.tensor([2.0**b for b in bits], device=coefficients.device)
    largest = coefficients.abs().amax(-2)
    # A component without variance in the sample gets a step that later rows can use.
    least = (1e-6 * largest.amax(-1, keepdim=True)).clamp_min(1e-30)
    widest = torch.maximum(largest, least) * 2 / top
    best, least = widest, torch.full_like(widest, float("inf"))
    for share in range(STEP_SHARES):
        factor = LEAST_SHARE ** (share / (STEP_SHARES - 1))
        step = torch.where(top < 256, factor, HEADROOM) * widest
        code = coefficients / step[..., None, :]
        code = torch.minimum(torch.maximum(code.floor_().add_(0.5), 0.5 - top / 2), top / 2 - 0.5)
        error = code.mul_(step[..., None, :]).sub_(coefficients).square_().mean(-2)
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    return best, least


def fit_side(side: Side, bands: Bands) -> tuple[Tensor, Tensor, Tensor]:
    """Basis int8 [G, R, D], scale [G, R] and encoder [G, D, R] (float32, with steps) in bands."""
    if bands.rank > (dim := side.moment.shape[-1]):
        raise ValueError(f"bands: expected a rank of at most D = {dim}, got {bands}")
    rows, scale = quantise_basis(side.basis[:, : bands.rank])
    encoder = fit_encoder(rows, scale, side.metric)
    steps = fit_steps(side.coefficients(encoder), bands.bits)[0].cpu()
    steps = steps * torch.tensor([MARGIN.get(bits, 1.0) for bits in bands.bits])
    return rows, scale * steps, (encoder / steps.double()[:, None]).float().contiguous()


def fit_codec(
    stats: ModelStats, layouts: Sequence[PageLayout], preset: str | Preset = "balanced"
) -> ModelCodec:
    """The codec of a model in given layouts, on the CPU, of one row (M = 1).

    Args:
        stats: of `collect`.      layouts: of each of its layers (`plan`), of rank D or less.
        preset: what says the window and the sinks.
    Raises:
        ValueError, TypeError: not as above.
    """
    name, preset = preset_of(preset)
    if len(layouts) != len(stats.layers):
        raise ValueError(f"layouts: expected {len(stats.layers)}, one a layer, got {len(layouts)}")
    codecs = []
    for layer, layout in zip(stats.layers, layouts, strict=True):
        if layout.head_dim != layer.k.moment.shape[-1] or layout.frame != FRAME:
            raise ValueError(
                f"layouts: expected head_dim {layer.k.moment.shape[-1]} and frame {FRAME}, "
                f"got {layout.head_dim} and {layout.frame}"
            )
        k, v = fit_side(layer.k, layout.k), fit_side(layer.v, layout.v)
        mean = layer.k.mean.float()
        offset = (mean[:, None] @ k[2])[:, 0]
        codecs.append(Codec(layout, layer.freqs, *(x[None] for x in (*k, mean, offset, *v))))
    notes = f"calibrated on {stats.tokens} tokens of {stats.sequences} sequences"
    return ModelCodec(tuple(codecs), preset.sinks, preset.window, name, stats.fingerprint, notes)


def plan(stats: ModelStats, preset: str | Preset = "balanced") -> list[PageLayout]:
    """The layout of each layer: least sum of costs within the bytes the ratio leaves all.

    At most MAX_LAYOUTS different ones, each a set of kernels to compile: from more, that which
    costs least is given up in turns.

    Raises:
        ValueError, TypeError: no such preset, or a ratio that the smallest bands do not reach.
    """
    _, preset = preset_of(preset)
    heads = [layer.k.moment.shape[0] for layer in stats.layers]
    losses: list[dict[PageLayout, float]] = []  # of each layer, of each layout
    for layer in stats.layers:
        dim = layer.k.moment.shape[1]
        k, v = (
            {bands: getattr(layer, side).loss(bands) for bands in menus(dim)[side]} for side in "kv"
        )
        losses.append({PageLayout(a, b, dim, FRAME): k[a] + v[b] for a in k for b in v})
    full = sum(4 * layer.k.mean.numel() for layer in stats.layers)

    def chosen(allowed: Iterable[PageLayout]) -> tuple[float, list[PageLayout]]:
        """Their loss, and a layout for each layer; infinite, if these are too few."""
        kept = [[x for x in allowed if x in known] for known in losses]
        sizes = [[n * x.token_bytes for x in own] for n, own in zip(heads, kept, strict=True)]
        if not all(sizes) or sum(map(min, sizes)) * preset.ratio > full:
            return math.inf, []
        lost = [[known[x] for x in own] for known, own in zip(losses, kept, strict=True)]
        index = share_bytes(full / preset.ratio, sizes, lost)
        picked = [own[i] for own, i in zip(kept, index, strict=True)]
        return sum(known[x] for known, x in zip(losses, picked, strict=True)), picked

    layouts = chosen({x: None for known in losses for x in known})[1]
    if not layouts:
        least = sum(n * min(x.token_bytes for x in y) for n, y in zip(heads, losses, strict=True))
        raise ValueError(
            f"ratio: expected at most {full / least:.2f} with these bands, got {preset.ratio}"
        )
    while len(used := dict.fromkeys(layouts)) > MAX_LAYOUTS:
        fewer = min((chosen([y for y in used if y != x]) for x in used), key=lambda x: x[0])[1]
        if not fewer:
            break
        layouts = fewer
    return layouts


def share_bytes(
    total: float, sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]
) -> list[int]:
    """The choice of each item for which the sum of losses is least (a knapsack, byte by byte).

    Args:
        total: bytes of all; at least those of the smallest choices.
        sizes, losses: of each item, of each of its choices; sizes are positive.
    Returns:
        For each item the index of its choice.
    """
    unit = math.gcd(*(size for own in sizes for size in own))
    room = int(total // unit)
    least = torch.zeros(room + 1, dtype=torch.float64)  # loss of the items so far, by their units
    picks = []
    for own, lost in zip(sizes, losses, strict=True):
        tries = torch.full((len(own), room + 1), math.inf, dtype=torch.float64)
        for row, size, loss in zip(tries, own, lost, strict=True):
            row[size // unit :] = least[: max(0, room + 1 - size // unit)] + loss
        least, pick = tries.min(0)
        picks.append(pick)
    chosen = []
    for own, pick in zip(reversed(sizes), reversed(picks), strict=True):
        chosen.append(int(pick[room]))
        room -= own[chosen[-1]] // unit
    return chosen[::-1]


def _text_files() -> list[list[Path]]:
    """Files by kind, as far as this machine has them; their order depends on paths alone."""
    import sysconfig

    library, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    share = Path("/usr/share")
    places: list[tuple[Sequence[Path], tuple[str, ...]]] = [
        ([library], (".py",)),
        ([packages], ("METADATA", "README.md", "README.rst", "README")),
        ([share / "perl", share / "perl5", share / "doc"], (".pod", ".md", ".txt")),
        ([packages], ("LICENSE", "LICENSE.txt", "LICENSE.md", "COPYING", "NOTICE")),
        ([Path("/usr/include"), Path(sysconfig.get_path("include"))], (".h",)),
        ([packages], (".js", ".html", ".css", ".ts")),
        ([library / "test" / "cjkencodings"], ("-utf8.txt", "utf_8.txt", "utf8.txt")),
        ([share / "locale", share / "vim", packages], (".mo", ".po")),
        ([packages], (".pyx", ".cpp", ".cu", ".cc", ".hpp")),
    ]
    kinds = []
    for roots, ends in places:
        found = (
            Path(folder) / name
            for root in roots
            for folder, folders, names in os.walk(root)
            if folders.sort() is None  # walk them in order
            for name in sorted(names)
            if name.endswith(ends)
        )
        there = islice(filter(Path.is_file, found), 2000)  # links may lead nowhere
        files = [path for path in there if path.stat().st_size > 500]
        random.Random(0).shuffle(files)
        kinds.append(files)
    return kinds


def _piece(path: Path, characters: int) -> str:
    """A piece of a file, from a third of it on; of a catalogue, the translations (second half)."""
    data = path.read_bytes()[: 1 << 20]
    if path.suffix == ".mo":
        data = data[len(data) // 2 :].replace(b"\0", b"\n")
    text = data.decode("utf-8", "ignore")
    start = max(0, len(text) - characters) // 3
    start = text.find("\n", start) + 1 if start else 0
    return text[start : start + characters]


def default_texts(characters: int = 2000, *, exclude: Sequence[str] = ()) -> Iterator[str]:
    """Pieces of text that lie about on this machine, one of each kind in turns; the same each time.

    Python's library and manual, notes and licences of packages, documentation, C headers, web
    pages, translations into other languages, C++. Nothing is downloaded.

    Args:
        characters: of a piece, at most.      exclude: parts of paths that are not to be read.
    """
    import pydoc_data.topics

    def pieces(files: Sequence[Path]) -> Iterator[str]:
        for path in files:
            if not any(part in str(path) for part in exclude):
                try:
                    yield _piece(path, characters)
                except OSError:
                    continue

    manual = "\n\n".join(pydoc_data.topics.topics.values())
    kinds = [pieces(files) for files in _text_files()]
    kinds.insert(1, (manual[i : i + characters] for i in range(0, len(manual), 7 * characters)))
    for turn in zip_longest(*kinds, fillvalue=""):
        yield from (piece for piece in turn if len(piece) > characters // 4)


def token_sequences(
    tokenizer: Any, tokens: int, *, length: int = LENGTH, texts: Iterable[str] | None = None
) -> list[Tensor]:
    """Sequences of tokens to calibrate on, int64 [T] on the CPU, joined from pieces of text.

    Args:
        tokenizer: of transformers, called with a text.
        tokens: of all sequences together; fewer if the texts end.      length: of a sequence, at
            most.
        texts: default `default_texts()`.
    Raises:
        ValueError: the texts have fewer than 512 tokens.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    first = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
    count = max(1, round(tokens / length))
    length = min(length, max(1, tokens // count))
    ids: list[int] = []
    for text in default_texts() if texts is None else texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= count * length:
            break
    if len(ids) < min(512, tokens):
        raise ValueError(f"texts: expected at least {min(512, tokens)} tokens, got {len(ids)}")
    own = length - len(first)
    parts = [ids[i : i + own] for i in range(0, min(len(ids), count * own), own)]
    return [torch.tensor(first + part) for part in parts if len(part) >= min(own, 256)]


def calibrate(
    model: Any, source: Any = None, preset: str | Preset = "balanced", **options: Any
) -> ModelCodec:
    """The codec of a model: `collect`, `plan`, `fit_codec`.

    Args:
        model: see `collect`.
        source: its tokenizer, or sequences of token ids; None: that of model.name_or_path.
        preset: a name of PRESETS, or a Preset.
        texts: to calibrate on; default `default_texts()`.
        tokens: to read; default 65,536 on a GPU, 8,192 on a CPU. Breadth matters more than length.
        progress: a bar, and words on the time it took, on stderr; default True.
    """
    _, preset = preset_of(preset)
    stats = read(model, source, sinks=preset.sinks, window=preset.window, **options)
    return fit_codec(stats, plan(stats, preset), preset)


def read(
    model: Any,
    source: Any = None,
    *,
    texts: Iterable[str] | None = None,
    tokens: int | None = None,
    progress: bool = True,
    **exact: int,
) -> ModelStats:
    """`collect` over texts, for presets of one window; arguments and defaults as of `calibrate`;
    exact: sinks and window. Where memory is too small, sequences of more than SHORT are halved."""
    on_cpu = torch.device(model.device).type == "cpu"
    tokens = (CPU_TOKENS if on_cpu else GPU_TOKENS) if tokens is None else tokens
    check_least(tokens=(tokens, 512))
    if isinstance(source, str) or (source is None and not model.name_or_path):
        raise ValueError(f"tokenizer: expected one, or sequences of token ids, got {source!r}")
    if source is None:
        from transformers import AutoTokenizer

        source = AutoTokenizer.from_pretrained(model.name_or_path)
    if callable(source):
        longest = getattr(model.config, "max_position_embeddings", None) or LENGTH
        length = min(longest, LENGTH if tokens >= LEAST_DRAWN else SHORT)
        source = token_sequences(source, tokens, length=length, texts=texts)
    start, source = time.monotonic(), [*source]
    while True:
        try:
            stats = collect(model, source, progress=progress, **exact)
            break
        except torch.OutOfMemoryError:
            if (longest := max(x.shape[-1] for x in source)) <= SHORT:
                raise
        warnings.warn(f"sequences of {longest} tokens take too much memory: halved", stacklevel=2)
        source = [y for x in source for y in x.chunk(1 + (x.shape[-1] > SHORT), -1)]
    if progress and on_cpu and stats.tokens < GPU_TOKENS:
        took, passes = time.monotonic() - start, 3 if stats.tokens < LEAST_DRAWN else 1
        print(
            f"calibrated on {stats.tokens} tokens in {took:.0f} s; {GPU_TOKENS} would take about "
            f"{took / 60 * passes * GPU_TOKENS / stats.tokens:.0f} min and lose less",
            file=sys.stderr,
        )
    return stats


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text: expected UTF-8, got {path}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command: writes a codec file for each preset."""
    parser = argparse.ArgumentParser(prog="python -m spectral_kernels.calibrate")
    add = parser.add_argument
    add("--model", required=True, help="path or id of a model")
    add("--gguf", help="GGUF file in --model")
    add("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 (default: what lies about)")
    add("--tokens", type=int, help=f"default {GPU_TOKENS}, on a CPU {CPU_TOKENS}")
    add("--preset", nargs="+", choices=list(PRESETS), default=["balanced"])
    add("--out", type=Path, help="file, or folder (of several presets); default: the user's cache")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    args = parser.parse_args(argv)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"dtype": torch.float32 if device == "cpu" else "auto"}
    gguf = {"gguf_file": args.gguf} if args.gguf else {}
    if gguf:
        from transformers.utils import quantization_config

        if hasattr(quantization_config, "GgufConfig"):  # else weights are dequantised anyhow
            options["quantization_config"] = quantization_config.GgufConfig(dequantize=True)
    folder = args.out and (len(args.preset) > 1 or args.out.is_dir())
    try:
        texts = list(map(_text_of, args.text)) if args.text else None
        if folder:
            args.out.mkdir(parents=True, exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(args.model, **gguf)
        model = AutoModelForCausalLM.from_pretrained(args.model, **gguf, **options).to(device)
        stats = read(model, tokenizer, texts=texts, tokens=args.tokens)
        for preset in args.preset:
            codec = fit_codec(stats, plan(stats, preset), preset)
            path = args.out or cache_path(stats.fingerprint, preset)
            path = path / f"codec-{preset}.safetensors" if folder else path
            codec.save(path)
            print(f"{path}: {path.stat().st_size:,} bytes, {codec.token_bytes} bytes a token")
    except (OSError, ImportError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
