"""A minimal KV cache over spectral pages: plain tensors and the operations of this package; no transformers.

Tokens of a row enter hot: exact, phase-aligned, in a ring of slots. A full chunk that has left the window is encoded into a
page (cold). Some tokens stay exact for good (pinned: attention sinks and landmarks); their bits in `Pages.skip` are set.
A row's first compression fits its segment (the bases of K and V) on all tokens it has; later chunks are encoded in it.
When these lose more than tokens did at the fit (`Preset.max_residual`), the segment ends with its block of alignment: newer
tokens stay exact until there are enough to fit a new one on, with the metrics of the old one.
Layers choose their bands from the preset's together, within the bytes that all share. Until all have fitted their first
segments, pages are in bands that are richer than the layer's share of what is known; then, and for the most part shortly
before, they are narrowed to its own.

    position     0 .. cold                     cold .. length
    cold         pages, chunk by chunk         -
    exact        pinned slots, outliers        hot slot  pinned_slots + position % hot_slots

Layers take turns: during decoding each compresses its chunks up to a chunk of tokens later than it could, by its place
among the layers, so that no step has the work of all. (That keeps half a chunk more exact, on average; a prompt is
compressed as far as it can be.)

Lengths are known to the host (every call says how many tokens come), so nothing here waits for the device, but the choice
of a layer's bands, once in a sequence, and the look at the residuals, once in a block of alignment.
Test: tests/test_cache.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch

from ._checks import FLOATS, check_in, check_tensor
from .attention import attend_exact, attend_spectral
from .compress import (
    Side,
    Spectrum,
    decode,
    encode,
    error_weights,
    fit_encoder,
    fit_spectra,
    gram,
    metric_sizes,
    query_metric,
    requantise,
    shared_metrics,
    squared_errors,
)
from .merge import merge_states
from .pages import BLOCK, CHUNKS, HEAD_DIMS, Bands, PageLayout, Pages, allocate_pages
from .rope import Rope, phase_align, rotate


@dataclass(frozen=True)
class Preset:
    """How a cache stores its tokens.

    Args:
        k, v: bands of cold keys and values by head dimension D, or None: every token stays exact. With a `ratio`, several
            to choose from: each layer gets its own when all have been compressed first, where the bytes count most.
        ratio: how many times smaller than 16-bit keys and values the coefficients of cold tokens are at least, all layers
            together.
        chunk: chunk length C (tokens of a page), 64, 128 or 256.
        align: positions of a block of phase alignment, a multiple of `chunk`; 0: `chunk`. Longer ones are faster.
        window: newest tokens that are always exact, at least 1 (up to C - 1 more are).
        sinks: first tokens that stay exact.
        min_fit: tokens older than the window that a row must have before its bases are fitted: fewer would fit noise. They
            are exact until then. A new segment asks for as many after the old one.
        max_residual: a new segment begins when a block of tokens loses more than this many times what tokens lost when the
            segment was fitted, if its bases add at most BASES_SHARE to what its tokens take; inf: never.
        outliers: share of cold tokens that stay exact, for each KV head those that lose most in their pages.
    """

    k: dict[int, str] | dict[int, tuple[str, ...]] | None = None
    v: dict[int, str] | dict[int, tuple[str, ...]] | None = None
    ratio: float | None = None
    chunk: int = 64
    align: int = 512
    window: int = 64
    sinks: int = 4
    min_fit: int = 512
    max_residual: float = 1.25
    outliers: float = 0.0

    def __post_init__(self) -> None:
        check_in("chunk", self.chunk, CHUNKS)
        if (self.k is None) != (self.v is None):
            raise ValueError("v: expected bands for both k and v, or for neither")
        if self.align == 0:
            object.__setattr__(self, "align", self.chunk)
        if self.align < self.chunk or self.align % self.chunk:
            raise ValueError(f"align: expected a multiple of chunk = {self.chunk}, got {self.align}")
        # The newest token is always exact: it is what the next query is of.
        for name, least in (("window", 1), ("sinks", 0), ("min_fit", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not self.max_residual >= 0:
            raise ValueError(f"max_residual: expected a number of at least 0, got {self.max_residual}")
        if not 0 <= self.outliers <= 0.5:
            raise ValueError(f"outliers: expected a share within 0 .. 0.5, got {self.outliers}")
        if self.ratio is not None and not self.ratio > 0:
            raise ValueError(f"ratio: expected a positive number, got {self.ratio}")

    def layouts(self, head_dim: int) -> list[PageLayout]:
        """The page layouts that a layer of a head dimension may get, smallest first; none if every token stays exact."""
        check_in("head_dim", head_dim, HEAD_DIMS)
        if self.k is None or self.v is None:
            return []
        sides = []
        for name, side in (("k", self.k), ("v", self.v)):
            if head_dim not in side:
                raise ValueError(f"{name}: expected bands for head_dim {head_dim}, got them for {sorted(side)}")
            texts = side[head_dim]
            sides.append([Bands.parse(text) for text in ((texts,) if isinstance(texts, str) else texts)])
        found = [PageLayout(k, v, head_dim, self.chunk, self.align) for k in sides[0] for v in sides[1]]
        found.sort(key=lambda layout: layout.token_bytes)
        if len(found) > 1 and self.ratio is None:
            raise ValueError("ratio: expected a number to choose bands by, got None")
        if len(found) > 1 and any(bands.is_float for bands in (*sides[0], *sides[1])):
            raise ValueError("k, v: expected no 16-bit bands among several to choose from")
        if self.ratio is not None and found[0].token_bytes > 4 * head_dim / self.ratio:
            most = 4 * head_dim / found[0].token_bytes
            raise ValueError(f"ratio: expected at most {most:.2f} with the smallest of these bands, got {self.ratio}")
        return found

    def layout(self, head_dim: int) -> PageLayout | None:
        """What a layer gets on average: of the largest layouts within the ratio the evenest. None: all tokens are exact."""
        fitting = [x for x in self.layouts(head_dim) if self.ratio is None or x.token_bytes * self.ratio <= 4 * head_dim]
        return max(fitting, key=lambda x: (x.token_bytes, -abs(x.k.bytes - x.v.bytes)), default=None)


def _menus(head_dim: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Bands of K and of V to choose from: few, as each pair that occurs is a kernel of its own.

    The components after the best ones get 2 bits or none: with its mean taken out K has few that matter, V has more.
    Some layers' keys need 8 bits for the best components.
    """
    q = max(16, head_dim // 64 * 16)  # about a quarter of the components
    rest = head_dim - 2 * q
    k = f"{q}x4 {q}x4+{q}x2 {q}x4+{2 * q}x2 16x8+16x4+{q}x2 {2 * q}x4+{rest}x2 16x8+{2 * q - 16}x4+{rest}x2"
    v = f"{q}x2 {2 * q}x2 {3 * q}x2 {head_dim}x2 {q}x4+{2 * q}x2 {q}x4+{head_dim - q}x2 {2 * q}x4+{rest}x2 {head_dim}x4"
    return _undominated(k), _undominated(v)


@cache
def _within(a: Bands, b: Bands) -> bool:
    """Whether b has as many bits for every component as a."""
    return a.rank <= b.rank and all(x <= y for x, y in zip(a.bits, b.bits, strict=False))


def _undominated(text: str) -> tuple[str, ...]:
    """Of some bands, those to which no other gives every component as many bits for as few bytes."""
    menu = {part: Bands.parse(part) for part in text.split()}

    def better(a: Bands, b: Bands) -> bool:
        return a is not b and a.bytes <= b.bytes and _within(b, a)

    return tuple(part for part, bands in menu.items() if not any(better(other, bands) for other in menu.values()))


_BANDS = {dim: _menus(dim) for dim in HEAD_DIMS}
_K, _V = ({dim: menus[side] for dim, menus in _BANDS.items()} for side in (0, 1))

PRESETS: dict[str, Preset] = {
    "exact": Preset(),
    # Short windows and more bits for older tokens lose less than the reverse at the same bytes (README, Quality).
    "quality": Preset(k=_K, v=_V, ratio=5.28, window=32),
    "balanced": Preset(k=_K, v=_V, ratio=8.0, window=16),
    "small": Preset(k=_K, v=_V, ratio=12.1, window=16),
}


def share_bytes(total: float, sizes: Sequence[int], losses: Sequence[Sequence[float]]) -> list[int]:
    """The layout of each layer for which the sum of all losses is least, as far as whole layouts let it be.

    Args:
        total: bytes that a cold token of all layers may take; at least what it takes in the smallest layouts.
        sizes: bytes of a layer's cold token in each layout.
        losses: of each layer in each layout: relative errors of outputs, which layers can be compared by.
    Returns:
        For each layer the index of its layout, on the lower convex hull of its losses over bytes: the steps on these that
        save most a byte are taken, as long as they fit.
    """
    hulls = [_hull(tuple(sizes), tuple(own)) for own in losses]
    steps = sorted(
        ((_saved(a, b, sizes, own), layer, b) for layer, own in enumerate(losses) for a, b in pairwise(hulls[layer])),
        key=lambda step: -step[0],
    )
    chosen = [hull[0] for hull in hulls]
    left = total - sum(sizes[i] for i in chosen)
    full = set()  # layers whose next step did not fit
    for _, layer, layout in steps:
        more = sizes[layout] - sizes[chosen[layer]]
        if layer not in full and more <= left:
            chosen[layer], left = layout, left - more
        else:
            full.add(layer)
    return chosen


@lru_cache(maxsize=256)  # the same for every layer but those that have changed, each time that layers share bytes
def _hull(sizes: tuple[int, ...], losses: tuple[float, ...]) -> tuple[int, ...]:
    """Layouts on the lower convex hull of loss over bytes, smallest first."""
    hull: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (sizes[i], losses[i])):
        if hull and (losses[i] >= losses[hull[-1]] or sizes[i] == sizes[hull[-1]]):
            continue
        while len(hull) > 1 and _saved(hull[-2], hull[-1], sizes, losses) <= _saved(hull[-1], i, sizes, losses):
            hull.pop()
        hull.append(i)
    return tuple(hull)


def _saved(a: int, b: int, sizes: Sequence[int], losses: Sequence[float]) -> float:
    """What a byte saves between two layouts, a the smaller."""
    return (losses[a] - losses[b]) / (sizes[b] - sizes[a])


class _Budget:
    """The bytes that a cache's layers share.

    A layer that fits its first segment says what it would lose in each layout. Until all have said so, it stores its tokens
    in bands richer than its share of what is known so far, and the richer the less is known; with the last one each gets
    its own. Pages are written anew (`LayerCache.narrow`) then, and before that with EARLY of the layers left, and where it
    saves most, if all take too much.
    """

    def __init__(self, total: float) -> None:
        self.total = total
        self.layers: list[LayerCache] = []

    def layout_of(self, layer: LayerCache, losses: list[float]) -> PageLayout:
        """The layout for the first pages of a layer, from its losses. Other layers may get theirs.

        One after another, so that no two have their pages twice: if one fails, those before it have theirs, and the next
        call goes on.
        """
        layer.losses = losses
        known = [each for each in self.layers if each.losses is not None]
        layouts = layer.layouts
        sizes = tuple(layout.token_bytes for layout in layouts)
        left = [each.losses_left() for each in known]
        share = len(known) / len(self.layers)
        # The first layer may have half as much again as one has on average.
        total = max(self.total * share * (1.5 - share / 2), len(known) * sizes[0])
        own = {}
        for each, chosen, lost in zip(known, share_bytes(total, sizes, left), left, strict=True):
            hull = _hull(sizes, lost)
            own[each] = (
                layouts[chosen] if share == 1 else _widest(tuple(layouts[i] for i in hull[: hull.index(chosen) + 1]))
            )
        more = {each: each.layout.token_bytes - own[each].token_bytes for each in known if each.layout is not None}
        over = sum(x.token_bytes for x in own.values()) + sum(more.values()) - SLACK * self.total
        for each in sorted(more, key=lambda each: -more[each]):
            if share >= 1 - EARLY or over > 0:
                each.narrow(own[each])
                over -= more[each]
        return own[layer]

    def settle(self) -> None:
        """Forget what layouts were chosen by, once every layer has its own."""
        if all(layer.losses is not None and layer.layout is not None for layer in self.layers):
            for layer in self.layers:
                layer.losses, layer.open_fits = None, []


@lru_cache(maxsize=256)
def _widest(layouts: tuple[PageLayout, ...]) -> PageLayout:
    """The smallest layout that has as many bits for every component as each of these."""

    def widest(sides: list[Bands]) -> Bands:
        blocks = range(0, max(side.rank for side in sides), BLOCK)
        bits = [max(side.bits[r] for side in sides if r < side.rank) for r in blocks]
        return Bands(tuple((BLOCK * bits.count(b), b) for b in dict.fromkeys(bits)))

    return replace(layouts[0], k=widest([x.k for x in layouts]), v=widest([x.v for x in layouts]))


# Share of the mean weight of a KV head's query heads that is added to the weight of each.
HEAD_FLOOR = 1 / 8
# How much more than their budget the layers' pages may take before all layers have fitted.
SLACK = 1.02
# With at most this share of the layers left to fit, the others' pages get the bands that would be theirs: most stay so, and
# little is left to do after the last layer, when a prompt's first token waits for it.
EARLY = 1 / 16
# A new segment's bases are at most this share of the coefficients of the segment before it.
BASES_SHARE = 1 / 8
# Of more queries a row than this, only some count in the metric of K.
METRIC_QUERIES = 4096
# So many of a new segment's newest tokens say what tokens lose in it; a multiple of the chunk lengths.
RESIDUAL_TOKENS = 256


def _stride(tokens: int, align: int) -> int:
    """The least power of two that leaves at most METRIC_QUERIES of so many queries, or the largest that `query_metric`
    takes."""
    stride = 1
    while tokens > METRIC_QUERIES * stride and align % (128 * stride) == 0:
        stride *= 2
    return stride


class _Fit(NamedTuple):
    """What later chunks of a segment need besides its bases.

    Components of K past its rank (int8 [G, N, D] with a scale each, float32 [G, N]), which with those before are a basis of
    the whole space, orthonormal in the metric of the fit; the quantiser steps of the components before, float32; how much
    the errors of V in each query head's output count, float32 [H], 1 on average; what keys and values lost at the fit,
    float32 [2, G].
    """

    rest: torch.Tensor
    rest_scale: torch.Tensor
    steps: torch.Tensor
    shares: torch.Tensor
    lost: torch.Tensor


class _OpenFit(NamedTuple):
    """A fit of rows whose layer may still change its layout: their segments, the spectra of K and V, and what keys and
    values lose by these: in the layer's layout, float32 [2, m, G], and in each of its layouts [2, P, m, G] (None where
    there is but one)."""

    segments: list[int]
    k: Spectrum
    v: Spectrum
    predicted: torch.Tensor | None
    by_layout: torch.Tensor | None


class _Numbers:
    """A few numbers on their way to the host: reading them waits for what the device was given before, and no more."""

    def __init__(self, x: torch.Tensor) -> None:
        self.host, self.event = x.to("cpu", non_blocking=True), None
        if x.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(x.device))

    def are_here(self) -> bool:
        return self.event is None or self.event.query()

    def read(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()


class _Fitting(NamedTuple):
    """Components for a new segment of some rows, the shares of the query heads in the metrics [m, H], and the metric of V
    [m, G, D, D] or None for the identity; what keys and values lose in each layout, float32 [2, P, m, G], if there are
    several; the layer's relative loss in each, if wanted."""

    k: Spectrum
    v: Spectrum
    shares: torch.Tensor
    v_metric: torch.Tensor | None
    by_layout: torch.Tensor | None
    losses: _Numbers | None


class _Job(NamedTuple):
    """Chunks of rows alike that are to be encoded, from chunk `first` on: k, v [m, G, n C, D]."""

    members: list[int]
    first: int
    k: torch.Tensor
    v: torch.Tensor
    fitting: _Fitting | None


class _Call(NamedTuple):
    """A checked call of `append`: phase-aligned k and v in the cache's dtype, lengths and cold chunks afterwards, and the
    jobs of its prompts."""

    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    pad: list[int]
    after: list[int]
    targets: list[int]
    jobs: list[_Job]


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where deferred calls are worked on: many small launches, which go first wherever there is room."""
    return torch.cuda.Stream(device, priority=-1)


def _beside(device: torch.device) -> AbstractContextManager[Any]:
    """On a GPU, what is done in this context runs beside the current stream's work."""
    return torch.cuda.stream(_side_stream(device)) if device.type == "cuda" else nullcontext()


def _uploaded(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of a few numbers on a device: they are read before this returns, and it waits for nothing else.

    (`torch.tensor(.., device=..)` waits for all that the device has been given to do.)
    """
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def _distortions(k: Spectrum, v: Spectrum, layouts: Sequence[PageLayout]) -> torch.Tensor:
    """What keys and values lose in each of some layouts, in units of their metrics, positive: float32 [2, P, m, G]."""
    lost = torch.stack([k.distortions([x.k for x in layouts]), v.distortions([x.v for x in layouts])])
    return lost.clamp_min(torch.finfo(torch.float32).tiny)


def _entries(x: torch.Tensor, index: list[int]) -> torch.Tensor:
    """The entries of these numbers, in rising order; a view if they follow one another."""
    if index[-1] - index[0] == len(index) - 1:
        return x[index[0] : index[-1] + 1]
    return x[_uploaded(index, torch.int64, x.device)]


def _enlarged(x: torch.Tensor, size: int) -> torch.Tensor:
    """The tensor with room for `size` entries in all."""
    out = x.new_empty((size, *x.shape[1:]))
    out[: len(x)] = x
    return out


class LayerCache:
    """Keys and values of one layer. See `SpectralCache`, which makes one a layer and whose methods these are."""

    def __init__(
        self,
        *,
        batch: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        rope: Rope,
        preset: Preset,
        pinned: Sequence[Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
        v_metrics: torch.Tensor | None,
        budget: _Budget,
        late: int,
    ) -> None:
        # How many tokens later than it could this layer compresses during decoding.
        self.late = late
        self.query_heads, self.kv_heads, self.head_dim = query_heads, kv_heads, head_dim
        self.rope, self.preset, self.layouts = rope, preset, preset.layouts(head_dim)
        self.budget = budget
        self.dtype, self.device, self.v_metrics = dtype, device, v_metrics
        self.pinned = [list(row) for row in pinned]
        self.pinned_slots = max(map(len, self.pinned), default=0) if self.layouts else 0
        self.lengths: list[int] = [0] * batch  # tokens a row
        self.reset()

    def reset(self) -> None:
        batch = len(self.lengths)
        self.lengths = [0] * batch
        self.chunks = [0] * batch  # cold chunks a row
        self.pending: tuple[_Call, dict[str, Any]] | None = None  # a deferred call, and the state before it
        self.page_rows: list[list[int]] = [[] for _ in range(batch)]
        self.segment_rows: list[list[int]] = [[] for _ in range(batch)]
        self.segment: list[int | None] = [None] * batch  # segment that a row's next chunks are encoded in
        self.ends: list[int | None] = [None] * batch  # number of chunks after which it ends, when that is known
        self.encoders: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.fits: dict[int, _Fit] = {}  # of the segments that rows are encoded in
        # What tokens since the last look lost, relative to the fit: sums on the device, and how many tokens.
        self.worn = torch.zeros(batch, dtype=torch.float32, device=self.device)
        self.measured = [0] * batch
        self.layout: PageLayout | None = None  # from the first fit on; a richer one until all layers have fitted
        self.losses: list[float] | None = None  # in each layout, while the layer waits for the others
        self.left: tuple[list[float], PageLayout | None, tuple[float, ...]] | None = None  # `losses_left`, and of what
        self.open_fits: list[_OpenFit] = []
        self.pages: Pages | None = None
        self.queries: list[torch.Tensor] | None = []  # queries so far, until every row has its segment; None: not wanted
        self.query_padding = [0] * batch
        self.hot_slots = 0
        self.k = torch.empty((batch, self.kv_heads, self.pinned_slots, self.head_dim), dtype=self.dtype, device=self.device)
        self.v = torch.empty_like(self.k)
        self.key_positions = torch.full((batch, self.pinned_slots), -1, dtype=torch.int32, device=self.device)
        # Outliers, each KV head's own: k, v [B, G, N, D] and positions int32 [B, G, N], -1 unused; slots used, by row.
        shape = (batch, self.kv_heads, 0, self.head_dim)
        self.outlier_k, self.outlier_v = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        self.outlier_positions = torch.empty(shape[:3], dtype=torch.int32, device=self.device)
        self.outliers = [0] * batch
        self.length = torch.zeros(batch, dtype=torch.int32, device=self.device)  # self.lengths on the device

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def cold(self) -> list[int]:
        """Cold tokens a row."""
        return [n * self.preset.chunk for n in self.chunks]

    @property
    def token_bytes(self) -> float:
        """Bytes that one more old token costs in the long run: its coefficients, skip bits and share of the tables."""
        if self.layout is None:
            return self.kv_heads * self.head_dim * 2 * self.dtype.itemsize
        outlier = self.preset.outliers * (2 * self.head_dim * self.dtype.itemsize + 4)
        return self.kv_heads * (self.layout.token_bytes + 1 / 8 + outlier) + 2 * 4 / self.preset.chunk

    @property
    def nbytes(self) -> int:
        exact = (self.k, self.v, self.key_positions, self.length, self.worn)
        outliers = (self.outlier_k, self.outlier_v, self.outlier_positions)
        encoders = [t for held in (*self.encoders.values(), *self.fits.values()) for t in held]
        total = sum(t.nbytes for t in (*exact, *outliers, *encoders, *(self.queries or ())))
        for fit in self.open_fits:
            total += fit.k.nbytes + fit.v.nbytes
            total += sum(x.nbytes for x in (fit.predicted, fit.by_layout) if x is not None)
        return total + (self.pages.nbytes if self.pages is not None else 0)

    # ---- append -----------------------------------------------------------------------------------------------------

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        queries: torch.Tensor | None = None,
        padding: Sequence[int] | None = None,
        defer: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.finish()
        pad = self._check_append(k, v, queries, padding)
        tokens = k.shape[2]
        if min(pad) == tokens:
            return  # no tokens, or nothing but padding
        after = [n + tokens - p for n, p in zip(self.lengths, pad, strict=True)]
        targets = [self._chunks_wanted(row, n - self._late(tokens)) for row, n in enumerate(after)]
        saved = self._host_state() if targets != self.chunks else {**self.__dict__}
        try:
            if self.queries is not None:
                self._note_queries(queries, pad)
            positions = self.length[:, None]
            if tokens > 1 or any(pad):
                offset = _uploaded(pad, torch.int32, self.device)[:, None] if any(pad) else 0
                positions = positions - offset + torch.arange(tokens, dtype=torch.int32, device=self.device)
            # Negative on padding.
            turned_by = positions.clamp_min(0) if any(pad) else positions
            own = k.to(self.dtype)
            out = own if overwrite or own is not k else None
            aligned = phase_align(own, turned_by, self.rope, chunk=self.preset.align, out=out)
            call = _Call(aligned, v.to(self.dtype), positions, pad, after, targets, [])
            straight = [r for r, t in enumerate(targets) if t and not self.lengths[r]]
            if defer and len(straight) == self.batch:
                if self.device.type == "cuda":
                    _side_stream(self.device).wait_stream(torch.cuda.current_stream(self.device))
                self.pending = call, saved
            else:
                call.jobs.extend(self._jobs(targets, call, straight))
                self._store(call)
        except BaseException:
            # What was written meanwhile lies in free pages, in free slots and past the lengths, where nothing looks.
            self.__dict__.update(saved)
            raise

    def start(self) -> None:
        if self.pending is None or self.pending[0].jobs:
            return
        call, saved = self.pending
        try:
            with _beside(self.device):
                call.jobs.extend(self._jobs(call.targets, call, list(range(self.batch))))
        except BaseException:
            self.__dict__.update(saved)
            raise

    def is_ready(self) -> bool:
        """Whether `finish` would launch what is left at once, without waiting for numbers from the device."""
        if self.pending is None:
            return True
        fittings = [job.fitting for job in self.pending[0].jobs]
        return bool(fittings) and all(x is None or x.losses is None or x.losses.are_here() for x in fittings)

    def finish(self) -> None:
        if self.pending is None:
            return
        self.start()
        (call, saved), self.pending = self.pending, None
        try:
            # Nothing that it uses was made or let go by the current stream since `append`.
            with _beside(self.device):
                self._store(call)
        except BaseException:
            self.__dict__.update(saved)
            raise
        finally:
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).wait_stream(_side_stream(self.device))

    def _host_state(self) -> dict[str, Any]:
        """Attributes with copies of all lists and tables that compression edits in place."""
        copies: dict[str, Any] = {
            "key_positions": self.key_positions.clone(),
            "outlier_positions": self.outlier_positions.clone(),
            "chunks": list(self.chunks),
            "segment": list(self.segment),
            "ends": list(self.ends),
            "measured": list(self.measured),
            "outliers": list(self.outliers),
            "page_rows": [list(row) for row in self.page_rows],
            "segment_rows": [list(row) for row in self.segment_rows],
            "encoders": dict(self.encoders),
            "fits": dict(self.fits),
            "open_fits": list(self.open_fits),
        }
        if self.pages is not None:
            tables = {name: getattr(self.pages, name).clone() for name in ("page_table", "segment_table", "lengths")}
            copies["pages"] = replace(self.pages, **tables)
        return {**self.__dict__, **copies}

    def _store(self, call: _Call) -> None:
        chunk, targets, after = self.preset.chunk, call.targets, call.after
        # Tokens of a row that was empty go straight to pages; others through the ring.
        straight = [t * chunk if n == 0 else 0 for t, n in zip(targets, self.lengths, strict=True)]
        first_hot = [max(s, c) for s, c in zip(straight, self.cold, strict=True)]
        hot = max(n - f for n, f in zip(after, first_hot, strict=True))
        if hot > self.hot_slots:
            growing = not self.layouts or any(s is None for s in self.segment) or any(self.ends)
            least = self.preset.window + chunk
            least += self.late if hot > least else 0
            self._resize_ring(max(hot + (hot // 8 if growing else 0), least))
        if any(straight):
            self._compress(targets, call.jobs)
        tokens = call.k.shape[2]
        starts = [max(f - n, 0) + p for f, n, p in zip(first_hot, self.lengths, call.pad, strict=True)]
        self._store_hot(call.k, call.v, call.positions, [range(start, tokens) for start in starts])
        before, self.lengths = self.lengths, after
        self.length = _uploaded(after, torch.int32, self.device) if any(call.pad) else self.length + tokens
        compressed = False
        while rows := [r for r, t in enumerate(targets) if t != self.chunks[r]]:
            # Up to the end of a segment, then what comes after it.
            ends = [e if e is not None and e > c else t for e, c, t in zip(self.ends, self.chunks, targets, strict=True)]
            stops = [min(e, t) for e, t in zip(ends, targets, strict=True)]
            self._compress(stops, self._jobs(stops, None, rows))
            compressed = True
        self._look_at_residuals(before, self._late(tokens))
        if compressed:
            least = max(self.preset.window + chunk, *(n - c for n, c in zip(self.lengths, self.cold, strict=True)))
            if self.hot_slots > 2 * least:  # the tokens that waited for the first fit have left
                self._resize_ring(least)
        if self.losses is not None:
            self.budget.settle()

    def _check_append(self, k, v, queries, padding) -> list[int]:
        shape = (self.batch, self.kv_heads, None, self.head_dim)
        check_tensor("k", k, shape=shape, dtype=FLOATS, device=self.device, unit_stride=True)
        check_tensor("v", v, shape=k.shape, dtype=FLOATS, device=self.device, unit_stride=True)
        tokens = k.shape[2]
        if queries is not None:
            shape = (self.batch, self.query_heads, tokens, self.head_dim)
            check_tensor("queries", queries, shape=shape, dtype=FLOATS, device=self.device)
        if padding is None:
            return [0] * self.batch
        pad = [int(p) for p in padding]
        if len(pad) != self.batch or any(not 0 <= p <= tokens for p in pad):
            raise ValueError(f"padding: expected {self.batch} numbers in 0 .. {tokens}, got {pad}")
        if any(pad) and any(self.lengths):
            raise ValueError(f"padding: expected none on a cache that holds tokens, got {pad}")
        return pad

    def _late(self, tokens: int) -> int:
        """How many tokens later than it could the layer compresses in a call of so many: decoding alone takes turns."""
        return self.late if tokens < self.preset.chunk else 0

    def _chunks_wanted(self, row: int, length: int) -> int:
        """Cold chunks that a row should have for a length: never fewer than it has."""
        if not self.layouts:
            return 0
        old, chunk = length - self.preset.window, self.preset.chunk
        start = 0 if self.segment[row] is None else self.ends[row]  # of the next segment
        wanted = max(self.chunks[row], old // chunk)
        if start is None or old - start * chunk >= max(self.preset.min_fit, chunk):
            return wanted
        return min(wanted, start)

    def most_queries(self) -> int:
        """Most tokens that may come at once so that all of them are exact afterwards, as `attend` wants the newest."""
        chunk, window = self.preset.chunk, self.preset.window
        ends = [(n // chunk + 1) * chunk for n in self.lengths]  # the window may not pass the chunk that is open now
        for row, (segment, end) in enumerate(zip(self.segment, self.ends, strict=True)):
            start = 0 if segment is None else end
            if start is not None and self.lengths[row] >= start * chunk:
                ends[row] = max(ends[row], start * chunk + self.preset.min_fit)
        return min(end + window - 1 - n for end, n in zip(ends, self.lengths, strict=True))

    def _note_queries(self, queries: torch.Tensor | None, pad: list[int]) -> None:
        """Keep queries for the metric of K until every row has fitted its segment; one call without ends that."""
        if queries is None or not self.layouts or all(s is not None for s in self.segment):
            self.queries = None
        elif self.queries is not None:
            if not self.queries:
                self.query_padding = pad
            queries = queries if queries.stride(-1) == 1 else queries.contiguous()
            self.queries = [*self.queries, queries.to(self.dtype)]

    def _resize_ring(self, slots: int) -> None:
        """A ring of another size, at least the hot tokens of any row; they move to their new slots."""
        pinned = self.pinned_slots
        shape = (self.batch, self.kv_heads, pinned + slots, self.head_dim)
        k, v = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        key_positions = torch.full((self.batch, pinned + slots), -1, dtype=torch.int32, device=self.device)
        k[:, :, :pinned], v[:, :, :pinned] = self.k[:, :, :pinned], self.v[:, :, :pinned]
        key_positions[:, :pinned] = self.key_positions[:, :pinned]
        for row, (cold, length) in enumerate(zip(self.cold, self.lengths, strict=True)):
            position = torch.arange(cold, length, device=self.device)
            if len(position):
                old, new = pinned + position % self.hot_slots, pinned + position % slots
                k[row, :, new], v[row, :, new] = self.k[row, :, old], self.v[row, :, old]
                key_positions[row, new] = position.int()
        self.k, self.v, self.key_positions, self.hot_slots = k, v, key_positions, slots

    def _store_hot(self, aligned: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, keep: list[range]) -> None:
        """Write the tokens that each row keeps to their slots."""
        if len(set(keep)) == 1:
            own = slice(keep[0].start, keep[0].stop)
            slots = self.pinned_slots + positions[:, own].long() % self.hot_slots
            index = slots[:, None, :, None].expand(-1, self.kv_heads, -1, self.head_dim)
            self.k.scatter_(2, index, aligned[:, :, own])
            self.v.scatter_(2, index, v[:, :, own])
            self.key_positions.scatter_(1, slots, positions[:, own])
            return
        # Not by a mask: the host would wait for its sum.
        at = [(row, token) for row, tokens in enumerate(keep) for token in tokens]
        row, token = _uploaded(at, torch.int64, self.device).unbind(1)
        slot = self.pinned_slots + positions[row, token].long() % self.hot_slots
        self.k[row, :, slot], self.v[row, :, slot] = aligned[row, :, token], v[row, :, token]
        self.key_positions[row, slot] = positions[row, token]

    # ---- compression ------------------------------------------------------------------------------------------------

    def _jobs(self, targets: list[int], call: _Call | None, rows: list[int]) -> list[_Job]:
        """What is to be done about chunks chunks[row] .. targets[row] - 1 of `rows`, from a call or from the ring, with the
        components of new segments. Changes nothing. Rows alike (same padding, length and chunks) go together."""
        chunk = self.preset.chunk
        lengths = call.after if call else self.lengths
        groups: dict[tuple[int, int, int, int], list[int]] = {}
        for row in rows:
            new = self.segment[row] is None or self.ends[row] == self.chunks[row]
            alike = (call.pad[row] if call else 0, self.chunks[row], targets[row], lengths[row] if new else -1)
            groups.setdefault(alike, []).append(row)
        jobs: list[_Job] = []
        for (start, first, last, length), members in groups.items():
            if call:
                k, v = (self._rows(x, members)[:, :, start:] for x in (call.k, call.v))
            else:
                position = torch.arange(first * chunk, max(last * chunk, length), device=self.device)
                slot = self.pinned_slots + position % self.hot_slots
                k, v = (self._rows(x, members).index_select(2, slot) for x in (self.k, self.v))
            # The first ones choose the layout.
            choose = self.layout is None and not any(job.fitting for job in jobs)
            fitting = self._fitting(members, k, v, choose=choose) if length >= 0 else None
            span = (last - first) * chunk
            jobs.append(_Job(members, first, k[:, :, :span], v[:, :, :span], fitting))
        return jobs

    def _compress(self, targets: list[int], jobs: list[_Job]) -> None:
        """Fit new segments and encode chunks, up to targets[row]. Pages are written before any table names them."""
        chunk = self.preset.chunk
        known: dict[int, torch.Tensor] = {}
        rows = [row for job in jobs for row in job.members]
        for job in jobs:
            if self.layout is None and job.fitting is not None:
                losses = job.fitting.losses
                self.layout = self.layouts[0] if losses is None else self.budget.layout_of(self, losses.read())
        self._reserve(rows, targets)
        assert self.pages is not None and self.layout is not None
        free = self._free_pages()
        pins = []
        for members, first, k_rows, v_rows, fitting in jobs:
            if fitting is not None:
                self._fit(members, fitting)
                known |= {
                    s: own
                    for row, own in zip(members, fitting.k.encoder, strict=True)
                    if (s := self.segment[row]) is not None
                }
            ids = [[free.pop() for _ in range(k_rows.shape[2] // chunk)] for _ in members]
            page_ids = _uploaded(ids, torch.int32, self.device)
            encoders = [self._encoder(self.segment[r], known) for r in members]
            k_encoder, v_encoder = (torch.stack(side) for side in zip(*encoders, strict=True))
            segments = [segment for r in members if (segment := self.segment[r]) is not None]
            offset = self._mean_offset(self.pages, segments, k_encoder)
            encode(k_rows, k_encoder, self.layout.k, self.pages.k_pages, page_ids, side="k", offset=offset)
            encode(v_rows, v_encoder, self.layout.v, self.pages.v_pages, page_ids, side="v")
            lost = self._note_residuals(members, page_ids, k_rows, v_rows, known, fitting)
            pins.append((members, ids, page_ids, first, k_rows, v_rows, lost))
        for members, ids, page_ids, first, k_rows, v_rows, lost in pins:
            self._pin(members, page_ids, first, k_rows, v_rows)
            if lost is not None:
                self._keep_outliers(members, ids, first, k_rows, v_rows, lost)
            for row, new_pages in zip(members, ids, strict=True):
                segment = self.segment[row]
                assert segment is not None
                self.page_rows[row] += new_pages
                self.segment_rows[row] += [segment] * len(new_pages)
                self.chunks[row] += len(new_pages)
        self._write_tables()

    def _rows(self, x: torch.Tensor, members: list[int]) -> torch.Tensor:
        """These rows, in rising order, of a tensor of all rows."""
        return x if len(members) == self.batch else x.index_select(0, _uploaded(members, torch.int64, self.device))

    def _encoder(self, segment: int | None, known: dict[int, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoders of a segment's bases, [G, D, R_K] and [G, D, R_V]; worked out again after a segment's first use.

        known: see `_coordinates`.
        """
        assert segment is not None and self.pages is not None
        if segment in self.encoders:
            return self.encoders.pop(segment)
        p = self.pages
        metric = self._v_metric([segment])
        v_encoder = fit_encoder(p.v_basis[segment], p.v_scale[segment], metric if metric is None else metric[0])
        if segment not in self.fits:  # a crop went back to a segment that had ended
            return fit_encoder(p.k_basis[segment], p.k_scale[segment]), v_encoder
        steps = self.fits[segment].steps
        k_encoder = self._coordinates(segment, known)[..., : steps.shape[-1]] / steps[:, None]
        return torch.nn.functional.pad(k_encoder, (p.layout.k.rank - steps.shape[-1], 0)), v_encoder

    def _v_metric(self, segments: list[int]) -> torch.Tensor | None:
        """The metric of V that segments were fitted with, float32 [m, G, D, D], or None for the identity."""
        if self.v_metrics is None:
            return None
        even = torch.ones(self.query_heads, dtype=torch.float32, device=self.device)  # of one that had ended
        shares = torch.stack([self.fits[s].shares if s in self.fits else even for s in segments])
        return self._shared_v_metric(shares)

    def _shared_v_metric(self, shares: torch.Tensor) -> torch.Tensor | None:
        """Of query heads whose errors count so much, [m, H]."""
        if self.v_metrics is None:
            return None
        by_group = self.v_metrics.unflatten(0, (self.kv_heads, -1))
        return torch.einsum("mgh,ghde->mgde", shares.unflatten(1, (self.kv_heads, -1)), by_group)

    def _coordinates(self, segment: int, known: dict[int, torch.Tensor]) -> torch.Tensor:
        """float32 [G, D, D]: x @ this is as long as the keys x are in the metric that a segment was fitted with.

        known: those of segments already asked for in this compression, by segment; what is new is put there.
        """
        assert self.pages is not None
        if segment in known:
            return known[segment]
        p, fit = self.pages, self.fits[segment]
        first = p.layout.k.rank - fit.steps.shape[-1]  # not the mean
        basis = torch.cat((p.k_basis[segment, :, first:], fit.rest), dim=1)
        scale = torch.cat((p.k_scale[segment, :, first:] / fit.steps, fit.rest_scale), dim=1)
        known[segment] = fit_encoder(basis, scale)
        return known[segment]

    def _note_residuals(
        self,
        members: list[int],
        page_ids: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        known: dict[int, torch.Tensor],
        fitting: _Fitting | None,
    ) -> torch.Tensor | None:
        """Compare chunks that were just encoded with their pages; fitting: of their segments, if these are new.

        What the newest tokens of a new segment lost is what later ones are held against. Returns what each token lost,
        [m, G, T], if there are outliers to choose.
        """
        new = fitting is not None
        segments = [segment for row in members if (segment := self.segment[row]) is not None]
        if (self.preset.max_residual == math.inf and not self.preset.outliers) or not self.fits.keys() >= set(segments):
            return None
        chunk = self.preset.chunk
        # A new segment's tokens may be many: a part of them will do, and none of the first chunk, which has the sinks.
        chunks = page_ids.shape[1]
        part = min(RESIDUAL_TOKENS // chunk, max(1, chunks - 1))
        some = part if new and not self.preset.outliers else chunks
        v_metric = self._v_metric(segments) if fitting is None else fitting.v_metric
        k, v = (x[:, :, -some * chunk :] for x in (k, v))
        lost = self._lost(segments, page_ids[:, chunks - some :], k, v, known, v_metric)
        if new:
            sample = lost[..., -part * chunk :].mean(-1)  # [2, m, G]
            for i, segment in enumerate(segments):
                self.fits[segment] = self.fits[segment]._replace(lost=sample[:, i].clone())
        at_fit = torch.stack([self.fits[segment].lost for segment in segments], dim=1)
        lost = (lost / at_fit.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).mean(0)
        if not new:
            rows = _uploaded(members, torch.int64, self.device)
            self.worn = self.worn.index_add(0, rows, lost.mean(1).sum(-1))
            for row in members:
                self.measured[row] += lost.shape[-1]
        return lost if self.preset.outliers else None

    def _lost(
        self,
        segments: list[int],
        page_ids: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        known: dict[int, torch.Tensor],
        v_metric: torch.Tensor | None,
    ) -> torch.Tensor:
        """Squared errors in their metrics of the keys and of the values that pages hold, float32 [2, m, G, T]."""
        assert self.pages is not None
        pages = self._pages_alone(self.pages, segments, page_ids)
        root = torch.stack([self._coordinates(segment, known) for segment in segments])
        k_lost = squared_errors(decode(pages, side="k"), k, root=root)
        return torch.stack((k_lost, squared_errors(decode(pages, side="v"), v, metric=v_metric)))

    def _look_at_residuals(self, before: list[int], late: int) -> None:
        """End the segments of rows that began a block of alignment and lose too much. Waits for the device.

        As late as they compress: no sooner, so that layers take turns, and no later, as a segment ends where a block does
        that no cold token lies past.
        """
        align, chunk = self.preset.align, self.preset.chunk
        blocks = [[(n - late) // align for n in lengths] for lengths in (self.lengths, before)]
        crossed = [now > old for now, old in zip(*blocks, strict=True)]
        rows = [r for r, at in enumerate(crossed) if at and self.measured[r] and self.ends[r] is None]
        if not rows:
            return
        sums = self.worn.tolist()
        self.worn = self.worn.index_fill(0, _uploaded(rows, torch.int64, self.device), 0.0)
        self.measured, self.ends = list(self.measured), list(self.ends)
        for row in rows:
            worn, self.measured[row] = sums[row] / self.measured[row], 0
            if worn > self.preset.max_residual and self._is_worth_bases(row):
                end = max(self.lengths[row] // align * align, -(-self.cold[row] // align) * align)
                self.ends[row] = end // chunk

    def _is_worth_bases(self, row: int) -> bool:
        assert self.layout is not None
        own = sum(segment == self.segment[row] for segment in self.segment_rows[row]) * self.preset.chunk
        bases = (self.layout.k.rank + self.layout.v.rank) * (self.head_dim + 4)
        return bases <= BASES_SHARE * own * self.layout.token_bytes

    def _mean_offset(self, pages: Pages, segments: list[int], encoder: torch.Tensor) -> torch.Tensor | None:
        """What coefficients lose by centring, [B, G, R]; component 0 stands for the mean: it gets its highest code."""
        if pages.layout.k.is_float:
            return None
        at = _uploaded(segments, torch.int64, self.device)
        half = (2 ** pages.layout.k.bits[0] - 1) / 2
        mean = pages.k_basis[at, :, 0].float() * (half * pages.k_scale[at, :, 0])[..., None]
        offset = (mean[:, :, None] @ encoder)[:, :, 0]
        offset[..., 0] = -1e9
        return offset

    def _fitting(self, members: list[int], k: torch.Tensor, v: torch.Tensor, *, choose: bool) -> _Fitting:
        """Components of K and V of these rows from all their tokens (as many in each); with losses to `choose` by."""
        metric = weights = v_moment = None
        shares = torch.ones((len(members), self.query_heads), dtype=torch.float32, device=self.device)
        old = [segment for row in members if (segment := self.segment[row]) is not None]
        if old and self.fits.keys() >= set(old):
            coordinates = torch.stack([self._coordinates(segment, {}) for segment in old])
            metric = coordinates @ coordinates.mT
            shares = torch.stack([self.fits[segment].shares for segment in old])
        elif self.queries:
            q = self.queries[0] if len(self.queries) == 1 else torch.cat(self.queries, dim=2)
            q = self._rows(q, members)[:, :, self.query_padding[members[0]] :]
            options = {"chunk": self.preset.align, "sinks": self.preset.sinks, "window": self.preset.window}
            v_moment, v_metrics = gram(v), None
            if self.v_metrics is not None:
                shared = shared_metrics(self.v_metrics, self.kv_heads)
                v_metrics = shared, metric_sizes(self.v_metrics, shared, v_moment)
            weights = error_weights(q, k, v, self.rope, v_metrics, **options)
            k_shares, shares = (self._shares(w) for w in weights)
            align = self.preset.align
            stride = _stride(q.shape[2], align)
            metric = query_metric(q, self.rope, chunk=align, kv_heads=self.kv_heads, weights=k_shares, stride=stride)
        k_bands, v_bands = ([getattr(layout, side) for layout in self.layouts] for side in ("k", "v"))
        k_side = Side(k, metric, k_bands, centre=not k_bands[0].is_float)
        v_metric = self._shared_v_metric(shares)
        k_spectrum, v_spectrum = fit_spectra([k_side, Side(v, v_metric, v_bands, moment=v_moment)])
        by_layout = losses = None
        if len(self.layouts) > 1 and (self.layout is None or self.losses is not None):  # may be narrowed
            by_layout = _distortions(k_spectrum, v_spectrum, self.layouts)
            losses = _Numbers(self._losses((k_spectrum, v_spectrum), by_layout, weights)) if choose else None
        return _Fitting(k_spectrum, v_spectrum, shares, v_metric, by_layout, losses)

    def _shares(self, weights: torch.Tensor) -> torch.Tensor:
        """How much each query head counts in its KV head's metric, [m, H], 1 on average: few queries say so, none is 0."""
        own = weights.unflatten(1, (self.kv_heads, -1))
        own = own + HEAD_FLOOR * own.mean(-1, keepdim=True).clamp_min(torch.finfo(own.dtype).tiny)
        return (own / own.mean(-1, keepdim=True)).flatten(1)

    def _losses(
        self,
        spectra: Sequence[Spectrum],
        by_layout: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """What the layer would lose in each of its layouts, float32, on the device."""
        losses = []
        for i, (side, lost_by) in enumerate(zip(spectra, by_layout, strict=True)):
            if weights is None:  # a relative error of keys counts as much as one of values
                lost = side.errors[0].sum(-1)  # of a side of which nothing is stored
                weight = 1 / (lost * lost.shape[1]).clamp_min(torch.finfo(lost.dtype).tiny)
            else:  # the metrics of K, and of V without metrics, are of one query head on average, that of V is their sum
                own = weights[i].unflatten(1, (self.kv_heads, -1))
                weight = own.mean(-1) if i == 1 and self.v_metrics is not None else own.sum(-1)
            losses.append((weight * lost_by).sum(-1).mean(-1))
        return losses[0] + losses[1]

    def losses_left(self) -> tuple[float, ...]:
        """What the layer would lose in each of its layouts; inf in those that its pages, if there are any, cannot get."""
        own, losses = self.layout, self.losses
        assert losses is not None
        if self.left is None or self.left[0] is not losses or self.left[1] is not own:
            fits = [own is None or (_within(x.k, own.k) and _within(x.v, own.v)) for x in self.layouts]
            self.left = losses, own, tuple(loss if fit else math.inf for loss, fit in zip(losses, fits, strict=True))
        return self.left[2]

    def narrow(self, layout: PageLayout) -> None:
        """Write the pages anew in another layout: no component has more bits there.

        A step is a multiple of the steps of higher precisions (`Spectrum`), so this gives the codes that the tokens
        themselves would have got.
        """
        old = self.pages
        assert old is not None
        if layout == self.layout:
            return
        made: dict[str, Any] = {"layout": layout}
        for side, bands in (("k", layout.k), ("v", layout.v)):
            pages, basis, scale = (getattr(old, f"{side}_{name}") for name in ("pages", "basis", "scale"))
            made[f"{side}_pages"] = pages.new_empty((*pages.shape[:2], self.preset.chunk * bands.bytes))
            made[f"{side}_basis"] = basis[:, :, : bands.rank].contiguous()
            made[f"{side}_scale"] = scale.new_empty((*scale.shape[:2], bands.rank))
        new = replace(old, **made)
        held: dict[int, dict[int, None]] = {}  # pages by segment; rows may share them
        for row_pages, segments in zip(self.page_rows, self.segment_rows, strict=True):
            start = 0
            for segment, run in groupby(segments):
                stop = start + len(list(run))
                held.setdefault(segment, {}).update(dict.fromkeys(row_pages[start:stop]))
                start = stop
        fits, open_fits = dict(self.fits), []
        for fit in self.open_fits:
            self._write_scales(new, fit)
            k_steps = fit.k.steps_of(layout.k)
            assert fit.by_layout is not None and fit.predicted is not None
            known = layout in self.layouts
            by = fit.by_layout[:, self.layouts.index(layout)] if known else _distortions(fit.k, fit.v, [layout])[:, 0]
            more = by / fit.predicted  # [2, m, G]
            open_fits.append(fit._replace(predicted=by.clone()))  # its own memory, as `nbytes` counts it
            alike: dict[int, list[int]] = {}  # those of as many pages
            for i, segment in enumerate(fit.segments):
                alike.setdefault(len(held.get(segment, ())), []).append(segment)
                if segment in fits:
                    was = self.fits[segment]
                    fits[segment] = self._fit_of(fit, i, k_steps, was.shares, was.lost * more[:, i])
            alike.pop(0, None)
            for segments in alike.values():
                ids = _uploaded([list(held[s]) for s in segments], torch.int32, self.device)
                for side, bands in (("k", layout.k), ("v", layout.v)):
                    was_in, now_in = (_entries(getattr(x, f"{side}_scale"), segments) for x in (old, new))
                    ratio = was_in[..., : bands.rank] / now_in
                    source, pages = (getattr(x, f"{side}_pages") for x in (old, new))
                    requantise(source, getattr(old.layout, side), pages, bands, ratio, ids, side=side)
        self.layout, self.pages, self.fits, self.open_fits = layout, new, fits, open_fits

    def _pages_alone(self, pages: Pages, segments: list[int], page_ids: torch.Tensor) -> Pages:
        """Pages [m, n] as rows of their own, each of one segment."""
        tokens = page_ids.shape[1] * self.preset.chunk
        table = _uploaded(segments, torch.int32, self.device)
        return replace(
            pages,
            page_table=page_ids.contiguous(),
            segment_table=table[:, None].repeat(1, -(-tokens // self.preset.align)),
            lengths=torch.full_like(table, tokens),
        )

    def _write_bases(self, pages: Pages, fit: _OpenFit) -> None:
        """Bases of segments into pages."""
        for i, segment in enumerate(fit.segments):
            pages.k_basis[segment] = fit.k.basis[i, :, : pages.layout.k.rank]
            pages.v_basis[segment] = fit.v.basis[i, :, : pages.layout.v.rank]
        self._write_scales(pages, fit)

    def _write_scales(self, pages: Pages, fit: _OpenFit) -> None:
        """Scales of segments into pages, whose layout they have the steps of."""
        k_scale, v_scale = fit.k.scale_of(pages.layout.k), fit.v.scale_of(pages.layout.v)
        for i, segment in enumerate(fit.segments):
            pages.k_scale[segment], pages.v_scale[segment] = k_scale[i], v_scale[i]

    def _fit_of(self, fit: _OpenFit, i: int, k_steps: torch.Tensor, shares: torch.Tensor, lost: torch.Tensor) -> _Fit:
        """What the i-th segment of a fit needs later on; k_steps: of K in its pages, float32 [m, G, R]."""
        first, rank = int(fit.k.is_centred), k_steps.shape[-1]  # not the mean
        steps = k_steps[i, :, first:].clone()
        return _Fit(fit.k.basis[i, :, rank:].clone(), fit.k.scale[i, :, rank:].clone(), steps, shares, lost)

    def _fit(self, members: list[int], fitting: _Fitting) -> None:
        """A new segment for each of these rows."""
        assert self.layout is not None and self.pages is not None
        used = self._used_segments()
        ids = [s for s in range(self.pages.k_basis.shape[0]) if s not in used][: len(members)]
        # No encoders: pages are written anew from their codes.
        k, v = fitting.k.without_encoder(), fitting.v.without_encoder()
        predicted = None if fitting.by_layout is None else _distortions(k, v, [self.layout])[:, 0]
        fit = _OpenFit(ids, k, v, predicted, fitting.by_layout)
        self._write_bases(self.pages, fit)
        k_encoder, v_encoder = fitting.k.encoder_of(self.layout.k), fitting.v.encoder_of(self.layout.v)
        k_steps = fit.k.steps_of(self.layout.k)
        lost = torch.zeros((2, self.kv_heads), dtype=torch.float32, device=self.device)  # until it is measured
        for i, (row, segment) in enumerate(zip(members, ids, strict=True)):
            self.encoders[segment] = (k_encoder[i], v_encoder[i])
            self.fits[segment] = self._fit_of(fit, i, k_steps, fitting.shares[i].clone(), lost)
            self.segment[row], self.ends[row] = segment, None
        self.fits = {s: fit for s, fit in self.fits.items() if s in self.segment}
        if self.losses is not None:
            self.open_fits.append(fit)
        if all(s is not None for s in self.segment):
            self.queries = None

    def _pin(self, members: list[int], page_ids: torch.Tensor, first: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Copy sinks and landmarks of the new chunks to their slots, and have the cold kernel skip them."""
        assert self.pages is not None
        chunk, chunks = self.preset.chunk, page_ids.shape[1]
        where: list[tuple[int, int, int, int]] = []  # row, slot, member, token
        for i, row in enumerate(members):
            for slot, position in enumerate(self.pinned[row]):
                token = position - first * chunk
                if 0 <= token < chunks * chunk:
                    where.append((row, slot, i, token))
        skip = self.pages.skip.index_fill_(0, page_ids.flatten().long(), 0)
        if where:
            words = torch.zeros((len(members), chunks, chunk // 32), dtype=torch.int64)
            for _, _, i, token in where:
                words[i, token // chunk, token % chunk // 32] |= 1 << (token % 32)
            words = torch.where(words >= 2**31, words - 2**32, words)
            held = _uploaded(words.tolist(), torch.int32, self.device)
            skip[page_ids.long()] = held[:, :, None].expand(-1, -1, self.kv_heads, -1)
            rows, slots, own, tokens = _uploaded(where, torch.int64, self.device).unbind(1)
            self.k[rows, :, slots], self.v[rows, :, slots] = k[own, :, tokens], v[own, :, tokens]
            self.key_positions[rows, slots] = (tokens + first * chunk).int()

    def _keep_outliers(
        self, members: list[int], ids: list[list[int]], first: int, k: torch.Tensor, v: torch.Tensor, lost: torch.Tensor
    ) -> None:
        """Copy the new tokens that lose most, [m, G, T], to slots of their KV heads, and have the cold kernel skip them."""
        assert self.pages is not None
        chunk, tokens, start = self.preset.chunk, lost.shape[-1], first * self.preset.chunk
        for i, row in enumerate(members):
            used = self.outliers[row]
            count = min(int(self.preset.outliers * (start + tokens)) - used, tokens)
            if count <= 0:
                continue
            more = used + count - self.outlier_positions.shape[2]
            if more > 0:
                pad = torch.nn.functional.pad
                self.outlier_k, self.outlier_v = pad(self.outlier_k, (0, 0, 0, more)), pad(self.outlier_v, (0, 0, 0, more))
                self.outlier_positions = pad(self.outlier_positions, (0, more), value=-1)
            own = lost[i]
            pinned = [p - start for p in self.pinned[row] if 0 <= p - start < tokens]
            if pinned:
                own = own.index_fill(1, _uploaded(pinned, torch.int64, self.device), -1.0)
            at = own.topk(count, dim=-1).indices  # [G, count]
            slots = slice(used, used + count)
            index = at[..., None].expand(-1, -1, self.head_dim)
            self.outlier_k[row, :, slots], self.outlier_v[row, :, slots] = k[i].gather(1, index), v[i].gather(1, index)
            self.outlier_positions[row, :, slots] = (at + start).int()
            bits = torch.zeros((self.kv_heads, tokens), dtype=torch.int64, device=self.device).scatter_(1, at, 1)
            bits = (bits.unflatten(1, (-1, chunk // 32, 32)) << torch.arange(32, device=self.device)).sum(-1)
            pages = _uploaded(ids[i], torch.int64, self.device)
            self.pages.skip[pages] |= torch.where(bits >= 2**31, bits - 2**32, bits).int().transpose(0, 1)
            self.outliers[row] = used + count

    def _used_segments(self) -> set[int]:
        return {s for row in self.segment_rows for s in row} | {s for s in self.segment if s is not None}

    def _free_pages(self) -> list[int]:
        assert self.pages is not None
        used = {page for row in self.page_rows for page in row}
        return [p for p in range(self.pages.k_pages.shape[0] - 1, -1, -1) if p not in used]

    def _reserve(self, rows: list[int], targets: list[int]) -> None:
        """Room for the chunks and segments that `rows` are about to get."""
        assert self.layout is not None
        used = len({page for row in self.page_rows for page in row})
        need = used + sum(targets[r] - self.chunks[r] for r in rows)
        new = sum(self.segment[r] is None or self.ends[r] == self.chunks[r] for r in rows)
        segments = len(self._used_segments()) + new
        table = max(targets)
        if self.pages is None:
            self.pages = self._allocate(need, segments, table)
            return
        old = self.pages
        grown: dict[str, Any] = {}
        if need > old.k_pages.shape[0]:
            # Few spare pages: copying all of them now and then costs less than a step's attention reads.
            for name in ("k_pages", "v_pages", "skip"):
                grown[name] = _enlarged(getattr(old, name), need + max(4, need // 32))
        if segments > old.k_basis.shape[0]:
            for name in ("k_basis", "k_scale", "v_basis", "v_scale"):
                grown[name] = _enlarged(getattr(old, name), segments)
        if table > old.max_chunks:
            tables = self._allocate(0, 0, table + max(8, table // 8))
            grown |= {"page_table": tables.page_table, "segment_table": tables.segment_table}
        if grown:
            self.pages = replace(old, **grown)
            self._write_tables()

    def _allocate(self, pages: int, segments: int, max_chunks: int) -> Pages:
        assert self.layout is not None
        return allocate_pages(
            self.layout,
            pages=pages,
            segments=segments,
            kv_heads=self.kv_heads,
            batch=self.batch,
            max_chunks=max_chunks,
            device=self.device,
        )

    def _write_tables(self) -> None:
        """The host's tables and cold lengths to the device."""
        if self.pages is None:
            return
        # A row's segment never changes inside a block of alignment.
        by_block = [row[:: self.preset.align // self.preset.chunk] for row in self.segment_rows]
        for rows, table in ((self.page_rows, self.pages.page_table), (by_block, self.pages.segment_table)):
            width = table.shape[1]
            padded = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32)
            table.copy_(padded.view(-1, width), non_blocking=True)
        self.pages.lengths.copy_(torch.tensor(self.cold, dtype=torch.int32), non_blocking=True)
        if self.hot_slots:
            hot = self.key_positions[:, self.pinned_slots :]
            hot.masked_fill_(hot < self.pages.lengths[:, None], -1)

    # ---- reading ----------------------------------------------------------------------------------------------------

    def attend(self, q: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
        shape = (self.batch, self.query_heads, None, self.head_dim)
        check_tensor("q", q, shape=shape, dtype=FLOATS, device=self.device, unit_stride=True)
        queries = q.shape[2]
        if queries > min(n - c for n, c in zip(self.lengths, self.cold, strict=True)):
            raise ValueError(
                f"q: expected at most as many queries as each row has newest exact tokens, got {queries} "
                f"for lengths {self.lengths} of which {self.cold} are cold"
            )
        positions = (self.length - queries)[:, None]
        if queries > 1:
            positions = positions + torch.arange(queries, dtype=torch.int32, device=self.device)
        exact = (self.k, self.v, self.key_positions)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if self.pages is None or not any(self.chunks):
            return out.copy_(attend_exact(q, positions, *exact, self.rope, chunk=self.preset.align, scale=scale)[0])
        if not any(self.outliers):
            return attend_spectral(q, positions, self.pages, self.rope, scale=scale, exact=exact, out=out)[0]
        state = attend_spectral(q, positions, self.pages, self.rope, scale=scale, exact=exact)
        kept = (self.outlier_k, self.outlier_v, self.outlier_positions)
        more = attend_exact(q, positions, *kept, self.rope, chunk=self.preset.align, scale=scale)
        return merge_states(*state, *more, out=out)[0]

    def get_kv(self, *, rope: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        check_in("rope", rope, ("pre", "rotated"))
        total = max(self.lengths, default=0)
        k = torch.zeros((self.batch, self.kv_heads, total, self.head_dim), dtype=torch.float32, device=self.device)
        v = torch.zeros_like(k)
        if self.pages is not None and any(self.chunks):
            cold = max(self.cold)
            k[:, :, :cold] = decode(self.pages, side="k")[:, :, :cold]
            v[:, :, :cold] = decode(self.pages, side="v")[:, :, :cold]
        if any(self.outliers):
            row, head, slot = (self.outlier_positions >= 0).nonzero(as_tuple=True)
            position = self.outlier_positions[row, head, slot].long()
            k[row, head, position] = self.outlier_k[row, head, slot].float()
            v[row, head, position] = self.outlier_v[row, head, slot].float()
        if self.hot_slots:
            row, slot = ((self.key_positions >= 0) & (self.key_positions < self.length[:, None])).nonzero(as_tuple=True)
            position = self.key_positions[row, slot].long()
            k[row, :, position], v[row, :, position] = self.k[row, :, slot].float(), self.v[row, :, slot].float()
        positions = torch.arange(total, device=self.device).expand(self.batch, -1)
        if rope == "pre":
            k = rotate(k, positions, self.rope, chunk=self.preset.align, inverse=True)
        else:
            k = rotate(k, positions - positions % self.preset.align, self.rope)
        valid = positions < self.length[:, None]
        return k.to(self.dtype), v.to(self.dtype), valid

    # ---- editing ----------------------------------------------------------------------------------------------------

    def crop(self, lengths: list[int]) -> None:
        if len(lengths) != self.batch or any(not 0 <= n <= old for n, old in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"length: expected {self.batch} numbers within 0 .. {self.lengths}, got {lengths}")
        if not any(lengths):
            return self.reset()
        chunk = self.preset.chunk
        rows = [r for r, n in enumerate(lengths) if n < self.cold[r]]
        if rows:
            # The chunk that is cut comes back, rebuilt, into the ring: cold tokens end at a chunk.
            k, v, _ = self.get_kv(rope="pre")
        self._drop_queries(lengths)
        for r in rows:
            self.chunks[r] = lengths[r] // chunk
            del self.page_rows[r][self.chunks[r] :], self.segment_rows[r][self.chunks[r] :]
            # What comes next goes on in the segment of what is left, or gets bases of its own.
            self.segment[r] = self.segment_rows[r][-1] if self.chunks[r] else None
            if not self.chunks[r]:
                self.ends[r], self.outliers[r] = None, 0
        self.lengths = list(lengths)
        self.length.copy_(torch.tensor(lengths, dtype=torch.int32))
        self.key_positions.masked_fill_(self.key_positions >= self.length[:, None], -1)
        for r in rows:
            pinned = self.key_positions[r, : self.pinned_slots]
            pinned.masked_fill_(pinned >= self.cold[r], -1)
            outliers = self.outlier_positions[r]
            outliers.masked_fill_(outliers >= self.cold[r], -1)
        self._write_tables()
        if rows:
            start = torch.tensor(self.cold, dtype=torch.int32, device=self.device)
            position = start[:, None] + torch.arange(chunk, dtype=torch.int32, device=self.device)
            index = position.clamp_max(k.shape[2] - 1).long()[:, None, :, None].expand(-1, self.kv_heads, -1, self.head_dim)
            k, v = k.gather(2, index), v.gather(2, index)
            aligned = phase_align(k, position, self.rope, chunk=self.preset.align)
            kept = [range(n - c if r in rows else 0) for r, (n, c) in enumerate(zip(lengths, self.cold, strict=True))]
            self._store_hot(aligned, v, position, kept)

    def _drop_queries(self, lengths: list[int]) -> None:
        if not self.queries or lengths == self.lengths:
            return
        if any(self.query_padding) or len(set(lengths)) > 1:
            self.queries = None  # ragged: fit without a metric rather than with another row's queries
        else:
            self.queries = [torch.cat(self.queries, dim=2)[:, :, : lengths[0]]] if lengths[0] else []

    def reorder(self, index: list[int]) -> None:
        device_index = torch.tensor(index, dtype=torch.long, device=self.device)
        self.lengths = [self.lengths[i] for i in index]
        self.chunks = [self.chunks[i] for i in index]
        self.page_rows = [list(self.page_rows[i]) for i in index]
        self.segment_rows = [list(self.segment_rows[i]) for i in index]
        self.segment = [self.segment[i] for i in index]
        self.ends = [self.ends[i] for i in index]
        self.measured = [self.measured[i] for i in index]
        self.outliers = [self.outliers[i] for i in index]
        self.outlier_k, self.outlier_v = self.outlier_k[device_index], self.outlier_v[device_index]
        self.outlier_positions, self.worn = self.outlier_positions[device_index], self.worn[device_index]
        self.pinned = [self.pinned[i] for i in index] if self.pinned else []
        self.query_padding = [self.query_padding[i] for i in index]
        if self.queries:
            self.queries = [q[device_index] for q in self.queries]
        self.k, self.v = self.k[device_index], self.v[device_index]
        self.key_positions, self.length = self.key_positions[device_index], self.length[device_index]
        if self.pages is not None:
            widths = (self.pages.max_chunks, self.pages.max_blocks)
            tables = [torch.empty((len(index), width), dtype=torch.int32, device=self.device) for width in widths]
            lengths = torch.empty(len(index), dtype=torch.int32, device=self.device)
            self.pages = replace(self.pages, page_table=tables[0], segment_table=tables[1], lengths=lengths)
            self._write_tables()


class SpectralCache:
    """Keys and values of a model's layers: newest tokens, sinks and landmarks exact, older ones in spectral pages.

    Args:
        layers, batch, query_heads, kv_heads, head_dim: L, B, H, G, D.
        rope: frequencies, on `device`.
        preset: a name in PRESETS or a Preset.
        dtype: of the exact tokens: fp16, bf16 or fp32.      device: of all tensors.
        landmarks: positions that stay exact: the same for all rows, or a sequence of them a row.
        v_metrics: a layer float32 [H, D, D], W_o^T W_o of each query head, or None: plain least squares.
    Raises:
        TypeError, ValueError: an argument is not as above. A call that raises leaves the cache as it was, except that
            layers that had got their bands keep them.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        rope: Rope,
        preset: str | Preset = "balanced",
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
        landmarks: Sequence[Any] = (),
        v_metrics: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        if isinstance(preset, str):
            check_in("preset", preset, list(PRESETS))
            preset = PRESETS[preset]
        check_in("dtype", dtype, FLOATS)
        check_in("head_dim", head_dim, HEAD_DIMS)
        for name, value in (("layers", layers), ("batch", batch), ("kv_heads", kv_heads)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if query_heads < 1 or query_heads % kv_heads:
            raise ValueError(f"query_heads: expected a positive multiple of kv_heads = {kv_heads}, got {query_heads}")
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        check_tensor("rope.turns", rope.turns, device=device)
        if rope.rotary_dim > head_dim:
            raise ValueError(f"rope: expected a rotary_dim of at most D = {head_dim}, got {rope.rotary_dim}")
        if v_metrics is None:
            v_metrics = [None] * layers
        if len(v_metrics) != layers:
            raise ValueError(f"v_metrics: expected one a layer, {layers}, got {len(v_metrics)}")
        for i, metric in enumerate(v_metrics):
            if metric is not None:
                shape = (query_heads, head_dim, head_dim)
                check_tensor(f"v_metrics[{i}]", metric, shape=shape, dtype=torch.float32, device=device)
        named = list(landmarks)
        per_row = [list(map(int, row)) for row in named] if named and not isinstance(named[0], int) else [named] * batch
        if len(per_row) != batch or any(p < 0 for row in per_row for p in row):
            raise ValueError(f"landmarks: expected positions that are not negative, for {batch} rows, got {named}")
        pinned = [sorted({*range(preset.sinks), *row}) for row in per_row]
        self.rope, self.preset, self.dtype, self.device = rope, preset, dtype, device
        budget = _Budget(layers * 4 * head_dim / preset.ratio if preset.ratio else math.inf)
        self.layers = [
            LayerCache(
                batch=batch,
                query_heads=query_heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                rope=rope,
                preset=preset,
                pinned=pinned,
                dtype=dtype,
                device=device,
                v_metrics=v_metrics[i],
                budget=budget,
                # No step has two layers' chunks to encode, or few, where each layer has one in `chunk` steps.
                late=i * preset.chunk // layers,
            )
            for i in range(layers)
        ]
        budget.layers = self.layers
        self._budget = budget

    def __del__(self) -> None:
        # Layers and their budget know each other: device memory must not wait until the garbage collector sees that.
        if hasattr(self, "_budget"):
            self._budget.layers = []

    def start(self, layer: int) -> None:
        """Launch the first part of what `append` has deferred, up to the numbers that `finish` waits for.

        To be called when the device has something else to do, as the prompt's attention. Calls that were deferred before
        are finished if their numbers have come.
        """
        own = self._layer(layer, finished=False)
        self._finish_others(own)
        own.start()

    def finish(self, layer: int | None = None) -> None:
        """Finish what `append` has deferred, of a layer or of all. Every other call does that first,
        but for deferred ones of other layers."""
        for own in self.layers if layer is None else [self._layer(layer, finished=False)]:
            own.finish()

    def _finish_others(self, but: LayerCache) -> None:
        """Finish the deferred calls of other layers, in turn; not the last one while it would wait for the device."""
        others = [own for own in self.layers if own.pending is not None and own is not but]
        for own in others:
            if own is not others[-1] or own.is_ready():
                own.finish()

    def __getstate__(self) -> dict[str, Any]:
        self.finish()
        return self.__dict__

    def _layer(self, layer: int, finished: bool = True) -> LayerCache:
        if finished:
            self.finish()
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"layer: expected 0 .. {len(self.layers) - 1}, got {layer}")
        return self.layers[layer]

    @property
    def batch(self) -> int:
        return self.layers[0].batch

    @property
    def lengths(self) -> list[int]:
        """Tokens a row (of the first layer: within a forward pass later layers lag behind)."""
        self.finish()
        return list(self.layers[0].lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds (not of what belongs to the model: frequencies, metrics of V)."""
        self.finish()
        return sum(layer.nbytes for layer in self.layers)

    @property
    def token_bytes(self) -> float:
        """Bytes that one more cold token of one row costs in the long run, all layers."""
        self.finish()
        return sum(layer.token_bytes for layer in self.layers)

    def append(
        self,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        queries: torch.Tensor | None = None,
        padding: Sequence[int] | None = None,
        defer: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Add tokens to a layer, at positions lengths .. lengths + T - 1; chunks that leave the window are compressed.

        Args:
            k, v: [B, G, T, D] keys before RoPE, and values; fp16, bf16 or fp32, on the cache's device; copied.
            queries: [B, H, T, D] before RoPE, of the same tokens: the metric of K. Kept until the bases are fitted.
            padding: how many of each row's first tokens are left padding and not stored; only into an empty cache.
            defer: if the layer is empty and every row compresses something, leave all but the alignment of k to `start` and
                `finish` or to the next call. It is done on a stream of its own, beside what the device was given in between
                (attention to the prompt, the next layer), which hides the many launches and the wait for numbers from the
                device. k, v and queries are held, and v and queries may not change, until then: of one layer besides this
                one, as a rule.
            overwrite: k's own memory may be used for the phase-aligned keys, and not change until the call is finished.
        Raises:
            TypeError, ValueError: an argument is not as above; the cache is as it was.
        """
        own = self._layer(layer, finished=not defer)
        if defer:
            self._finish_others(own)
        own.append(k, v, queries=queries, padding=padding, defer=defer, overwrite=overwrite)

    def attend(self, layer: int, q: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
        """Causal attention of the newest tokens over all of a layer's tokens.

        Args:
            q: [B, H, Q, D] before RoPE, of the Q newest tokens (already appended), which must still be hot.
            scale: factor of the scores, default D**-0.5.
        Returns:
            [B, H, Q, D] in the dtype of q, contiguous.
        Raises:
            TypeError, ValueError: an argument is not as above.
        """
        return self._layer(layer).attend(q, scale=scale)

    def get_kv(self, layer: int, *, rope: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rebuild a layer's keys and values (for tests and fallbacks; decoding never does).

        Args:
            rope: "pre" for keys before RoPE, "rotated" for keys turned to their positions (without attention scaling).
        Returns:
            (k, v [B, G, T, D] in the cache's dtype by position, valid bool [B, T]), T the longest row; zeros where invalid.
        """
        return self._layer(layer).get_kv(rope=rope)

    def reset(self) -> None:
        """Forget everything: the next append starts at position 0."""
        for layer in self.layers:
            layer.reset()

    def crop(self, lengths: int | Sequence[int]) -> None:
        """Keep the first `lengths` tokens of every row (one number, or one a row; none above the row's length)."""
        self.finish()
        wanted = [lengths] * self.batch if isinstance(lengths, int) else [int(n) for n in lengths]
        for layer in self.layers:
            if len(wanted) != layer.batch or any(not 0 <= n <= old for n, old in zip(wanted, layer.lengths, strict=True)):
                raise ValueError(f"lengths: expected {layer.batch} numbers within 0 .. {layer.lengths}, got {wanted}")
        for layer in self.layers:
            layer.crop(wanted)

    def reorder(self, index: torch.Tensor | Sequence[int]) -> None:
        """Row i becomes a copy of row index[i] (beam search; may repeat, drop, or change the number of rows).

        Pages are shared by copies, not copied.
        """
        self.finish()
        rows = [int(i) for i in (index.tolist() if isinstance(index, torch.Tensor) else index)]
        if not rows or any(not 0 <= i < self.batch for i in rows):
            raise ValueError(f"index: expected row numbers in 0 .. {self.batch - 1}, got {rows}")
        for layer in self.layers:
            layer.reorder(rows)
