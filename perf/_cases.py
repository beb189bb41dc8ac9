"""A layer's decode step on random data, built on the device, and what it must give, in float64 on
the device.

Weights of perf's models are random, and so are pages here: a calibration would mean nothing.
`random_codec` has random orthogonal bases in the bands of a preset; codes are uniform, steps fall
as in a spectrum.

The reference follows the definition, as reference/attention.py does (keys and values rebuilt, keys
turned forward to their frames, softmax), for one row and KV head at a time: at 128K tokens NumPy
would take minutes. Its budget is that of tests/budgets.py, whose constants it takes.
tests/test_perf.py holds both against the oracle and its budget.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spectral_kernels import attention, compress, window
from spectral_kernels.calibrate import PRESETS, menus, quantise_basis
from spectral_kernels.codec import Codec, ModelCodec
from spectral_kernels.layout import PAGE_SIZE, Bands, PageLayout, unpack_pages
from spectral_kernels.rope import freqs_from_inv_freq
from tests import budgets

BOTH = ("exact", "pages")
SCORE_STD = 2.0  # of real models: 1 to 3
THETA = 5e5
LOSSY = tuple(PRESETS)


def layouts(preset: str, dim: int, count: int = 3) -> list[PageLayout]:
    """Different layouts as a plan of the preset mixes them, none above its bytes: of pairs of bands
    from calibrate's menus, those of the most bytes, with few bytes for keys and with many."""
    budget = 4 * dim / PRESETS[preset].ratio
    menu = menus(dim)
    pairs = [(k, v) for k in menu["k"] for v in menu["v"] if k.bytes + v.bytes <= budget]
    most = max(k.bytes + v.bytes for k, v in pairs)
    pairs = sorted(
        (p for p in pairs if p[0].bytes + p[1].bytes >= 0.9 * most),
        key=lambda p: (p[0].bytes, p[1].bytes),
    )
    chosen = [pairs[round(i * (len(pairs) - 1) / max(1, count - 1))] for i in range(count)]
    return [PageLayout(k, v, dim) for k, v in dict.fromkeys(chosen)]


def random_codec(
    layout: PageLayout,
    kv_heads: int,
    freqs: torch.Tensor,
    *,
    key_std: float = SCORE_STD,
    value_std: float = 1.0,
) -> Codec:
    """Random orthogonal bases. Uniform codes rebuild keys and values of these standard deviations a
    dimension; the encoder is the bases' transpose in steps, so that what it encodes comes back as
    far as the rank goes.
    """
    dim, device = layout.head_dim, freqs.device
    sides: list[list[torch.Tensor]] = []
    for bands, std in ((layout.k, key_std), (layout.v, value_std)):
        frames = torch.linalg.qr(
            torch.randn(kv_heads, dim, dim, dtype=torch.float64, device=device)
        )[0]
        directions = frames[:, : bands.rank].contiguous()
        rows, lengths = quantise_basis(directions)
        # Codes are uniform: 2**bits values a step apart.
        spread = torch.tensor([((4.0**bits - 1) / 12) ** 0.5 for bits in bands.bits], device=device)
        fall = torch.exp(-3 * torch.arange(bands.rank, device=device) / bands.rank)
        step = fall * std * (dim / fall.square().sum()) ** 0.5 / spread
        encoder = (directions.float() / step[:, None]).mT.contiguous()
        sides.append([x[None] for x in (rows, lengths * step, encoder)])
    mean = torch.randn(1, kv_heads, dim, device=device) * key_std / 2
    k, v = sides
    offset = (mean[..., None, :] @ k[2])[..., 0, :].contiguous()
    return Codec(layout, freqs, k[0], k[1], k[2], mean, offset, v[0], v[1], v[2])


def copy_of(codec: Codec) -> Codec:
    """Of memory of its own."""
    names = (field.name for field in dataclasses.fields(codec) if field.name != "layout")
    return Codec(codec.layout, **{name: getattr(codec, name).clone() for name in names})


def eight_bit_codec(
    layers: int, kv_heads: int, dim: int, freqs: torch.Tensor, largest: float
) -> ModelCodec:
    """Every dimension of K and V in 255 steps from -largest to largest: nearly lossless."""
    bands, step = Bands.parse(f"{dim}x8"), largest / 127
    eye = torch.eye(dim, dtype=torch.float32).expand(1, kv_heads, -1, -1)

    def codec() -> Codec:
        x = {"k_mean": torch.zeros(1, kv_heads, dim), "k_offset": torch.zeros(1, kv_heads, dim)}
        for side in ("k", "v"):
            x[f"{side}_basis"] = (127 * eye).to(torch.int8).contiguous()
            x[f"{side}_scale"] = torch.full((1, kv_heads, dim), step / 127)
            x[f"{side}_encoder"] = (eye / step).contiguous()
        return Codec(PageLayout(bands, bands, dim), freqs=freqs.clone(), **x)

    codecs = tuple(codec() for _ in range(layers))
    return ModelCodec(codecs, sinks=4, window=16, preset="8 bits")


def random_model_codec(
    preset: str,
    *,
    layers: int,
    kv_heads: int,
    dim: int,
    freqs: torch.Tensor,
    value_std: float = 1.0,
    first: int = 0,
) -> ModelCodec:
    """A codec of so many layers, of memory of their own, whose layouts take turns from number
    `first` on."""
    known = [random_codec(x, kv_heads, freqs, value_std=value_std) for x in layouts(preset, dim)]

    codecs = tuple(copy_of(known[(first + i) % len(known)]) for i in range(layers))
    return ModelCodec(codecs, PRESETS[preset].sinks, PRESETS[preset].window, preset, notes="random")


@dataclass(frozen=True)
class Shape:
    """B rows of T tokens, of which the newest Q are a step's; H query heads, G KV heads, head
    dimension D. lengths: of the rows, where they differ (T: of the longest). capacity: tokens of a
    row that the block table has entries for, at least T."""

    batch: int
    heads: int
    kv_heads: int
    dim: int
    tokens: int
    queries: int = 1
    capacity: int = 0
    lengths: tuple[int, ...] = ()

    def __str__(self) -> str:
        text = f"B={self.batch} H={self.heads}/{self.kv_heads} D={self.dim} T={self.tokens}"
        text += f" Q={self.queries}" if self.queries > 1 else ""
        return text + (f" of {self.capacity}" if self.capacity else "") + (" mixed" * self.mixed)

    @property
    def mixed(self) -> bool:
        return bool(self.lengths)

    @property
    def rows(self) -> tuple[int, ...]:
        """Tokens of each."""
        return self.lengths or (self.tokens,) * self.batch

    @property
    def dense_bytes(self) -> int:
        """Of K and V in 16 bits."""
        return 4 * self.kv_heads * sum(self.rows) * self.dim

    def page_bytes(self, layout: PageLayout, exact: int = 0) -> int:
        """Of the coefficients of all but `exact` tokens a row, and table entries."""
        token = self.kv_heads * layout.token_bytes
        return sum((n - exact) * token + 4 * -(-n // PAGE_SIZE) for n in self.rows)

    def step_bytes(self, layout: PageLayout, exact: int) -> int:
        """Of all that a step must read: pages, bases and encoders once a batch, exact tokens,
        queries."""
        ranks = layout.k.rank + layout.v.rank
        codec = self.kv_heads * (ranks * (5 * self.dim + 4) + 4 * self.dim + 4 * layout.k.rank)
        small = 4 * self.kv_heads * self.dim * exact
        small += 2 * self.dim * self.queries * (self.heads + 2 * self.kv_heads)
        return self.page_bytes(layout, exact) + codec + self.batch * small


@dataclass
class Step:
    """The inputs of one layer's decode step, and its state.

    q [B, H, (Q,) D]; k, v [B, G, Q, D] of the newest tokens; the rest as attend_spectral takes it.
    inv_freq: float64 [pairs], what codec.freqs was made of, for the reference.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    codec: Codec
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    k_exact: torch.Tensor
    v_exact: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    sinks: int
    window: int
    inv_freq: torch.Tensor
    scale: float | None = None
    matrix_units: bool | None = None
    workspace: torch.Tensor | None = None

    def append(self) -> None:
        compress.append(
            self.k, self.v, self.codec, self.k_pages, self.v_pages, self.k_exact, self.v_exact,
            self.block_table, self.seq_lens, sinks=self.sinks,
        )  # fmt: skip

    def attend(
        self, parts: Sequence[str] = BOTH, *, after_append: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(o, lse) over the pages, the exact tokens or, as a decode step has it, both."""
        options: Any = {"sinks": self.sinks, "window": self.window, "scale": self.scale}
        exact = self.k_exact, self.v_exact
        if "pages" not in parts:
            return window.attend_window(self.q, *exact, self.seq_lens, **options)
        return attention.attend_spectral(
            self.q, self.k_pages, self.v_pages, self.codec, self.block_table, self.seq_lens,
            exact=exact if "exact" in parts else None, workspace=self.workspace,
            matrix_units=self.matrix_units, after_append=after_append, **options,
        )  # fmt: skip

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer runs for a new token."""
        self.append()
        return self.attend(after_append=True)


def make_steps(
    shape: Shape,
    layout: PageLayout,
    *,
    preset: str,
    copies: int,
    dtype: torch.dtype,
    device: torch.device,
    older_cards: bool = False,
) -> list[Step]:
    """Random steps of one shape, of no memory in common."""
    batch, groups, dim, new = shape.batch, shape.kv_heads, shape.dim, shape.queries
    sinks, recent = PRESETS[preset].sinks, PRESETS[preset].window
    inv_freq = THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    freqs = freqs_from_inv_freq(inv_freq, device=device)
    used = [-(-n // PAGE_SIZE) for n in shape.rows]
    entries = max(*used, -(-shape.capacity // PAGE_SIZE))
    i32: Any = {"dtype": torch.int32, "device": device}
    codec = random_codec(layout, groups, freqs)

    def normal(*size: int, std: float = 1.0) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(std=std)

    def pages(bands: Bands) -> torch.Tensor:
        size = (sum(used), groups, PAGE_SIZE * bands.bytes)
        return torch.randint(0, 256, size, dtype=torch.uint8, device=device)

    steps = []
    for _ in range(copies):
        table = torch.zeros(batch, entries, **i32)
        for row, own in zip(table, torch.randperm(sum(used), **i32).split(used), strict=True):
            row[: len(own)] = own
        q = normal(batch, shape.heads, new, dim)
        slots = (batch, groups, sinks + recent, dim)
        step = Step(
            q if new > 1 else q[:, :, 0],
            normal(batch, groups, new, dim, std=SCORE_STD),
            normal(batch, groups, new, dim),
            copy_of(codec),
            pages(layout.k),
            pages(layout.v),
            normal(*slots, std=SCORE_STD),
            normal(*slots),
            table,
            torch.tensor(shape.rows, **i32),
            sinks,
            recent,
            inv_freq.to(device),
            matrix_units=False if older_cards else None,
        )
        steps.append(step)
    return steps


@dataclass
class Expected:
    """The state of one row and the heads of one KV head, and its budget: o [H/G, D], lse [H/G],
    float64."""

    o: torch.Tensor
    lse: torch.Tensor
    o_budget: torch.Tensor
    lse_budget: torch.Tensor


def _turn(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """x [..., D] turned by positions [...], float64."""
    pairs = len(inv_freq)
    angle = positions.double()[..., None] * inv_freq
    x1, x2, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat(
        (x1 * angle.cos() - x2 * angle.sin(), x1 * angle.sin() + x2 * angle.cos(), rest), dim=-1
    )


def _size(x: torch.Tensor, pairs: int) -> torch.Tensor:
    """The length of each component's pair, [..., D]: what turning can make of it at most."""
    length = torch.hypot(x[..., :pairs], x[..., pairs : 2 * pairs])
    return torch.cat((length, length, x[..., 2 * pairs :].abs()), dim=-1)


def _side(
    step: Step, b: int, g: int, side: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of row b and KV head g: codes in units of steps [T, R], the sizes of their terms as stored
    [T, R], vectors [R, D], and the lowest bit's weight of each field [R]; float64."""
    bands: Bands = step.codec.layout.side(side)
    length = int(step.seq_lens[b])
    table = step.block_table[b, : -(-length // PAGE_SIZE)].long()
    data = step.k_pages if side == "k" else step.v_pages
    codes = unpack_pages(data[table, g], bands, side=side).flatten(0, 1)[:length].double()
    fields = [
        (2.0 ** sum(f[:i]), sum(f[: i + 1]) == 8, f[i])
        for _, f in bands.groups
        for i in range(len(f))
    ]
    low = torch.tensor(
        [low for low, _, _ in fields for _ in range(16)], dtype=torch.float64, device=codes.device
    )
    zeros = [0.5 if top else 0.5 - 2.0 ** (bits - 1) for _, top, bits in fields for _ in range(16)]
    offset = torch.tensor(zeros, dtype=torch.float64, device=codes.device)
    scale, basis = (
        getattr(step.codec, f"{side}_{name}")[0, g].double() for name in ("scale", "basis")
    )
    return codes, (codes - offset).abs() + offset.abs(), scale[:, None] * basis, low


def expected(step: Step, b: int, g: int, parts: Sequence[str] = BOTH, query: int = 0) -> Expected:
    """The state over the tokens of the pages, the exact ones, or both, of row b and KV head g, for
    one of the step's queries.

    A key's score may be off by what tests/budgets.py allows for its kind, and so may the output; a
    state made of both is also allowed what joining two states may lose, as an error of each key's
    weight.
    """
    queries = step.q if step.q.dim() == 4 else step.q[:, :, None]
    _, heads, count, dim = queries.shape
    group, acc, pairs = heads // step.codec.kv_heads, budgets.ACC, len(step.inv_freq)
    length, ring = int(step.seq_lens[b]), step.k_exact.shape[2] - step.sinks
    scale = dim**-0.5 if step.scale is None else step.scale
    q = queries[b, g * group : (g + 1) * group, query].double()
    at = torch.arange(length, device=q.device)
    is_exact = (at < step.sinks) | (at >= length - step.window)
    scores, errors, values = [], [], []
    if "exact" in parts:
        p = at[is_exact & (at <= length - count + query)]  # not the tokens after the query
        slots = torch.where(p < step.sinks, p, step.sinks + (p - step.sinks) % ring)
        k, v = (x[b, g, slots].double() for x in (step.k_exact, step.v_exact))
        scores.append(scale * q @ k.T)
        errors.append(scale * (2 * budgets.PRODUCT + (dim + 4) * acc) * q.abs() @ k.abs().T)
        values.append(v)
    if "pages" in parts:
        codes, terms, vectors, low = _side(step, b, g, "k")
        v_codes, v_terms, v_vectors, _ = _side(step, b, g, "v")
        mean, frame, size = (
            step.codec.k_mean[0, g].double(),
            step.codec.layout.frame,
            _size(q, pairs),
        )
        starts = at[::frame]
        back = _turn(
            q[:, None].expand(-1, len(starts), -1), -starts, step.inv_freq
        )  # [H/G, frames, D]
        u = (back @ vectors.T).abs()  # [H/G, frames, R]

        def by_token(x: torch.Tensor) -> torch.Tensor:
            return x.repeat_interleave(frame, 1)[:, :length]

        # Keys as the model had them: turned forward to their frames.
        keys = _turn(codes @ vectors + mean, at - at % frame, step.inv_freq)
        score = scale * q @ keys.T
        relative, split = budgets.projection(dim, turns=2), budgets.SPLIT
        error = relative * (size @ vectors.abs().T) @ codes.abs().T
        bias = (
            budgets.projection(dim) * (size @ mean.abs())[:, None] + 4 * acc * (back @ mean).abs()
        )
        error += by_token(bias) + split * size.amax(-1)[:, None] * (
            codes.abs() @ vectors.abs().sum(-1)
        )
        error += split * by_token((u / low).amax(-1)) * (codes.abs() @ low)
        padded = torch.nn.functional.pad(terms, (0, 0, 0, len(starts) * frame - length)).unflatten(
            0, (-1, frame)
        )
        # A path of floats has the rounding of products and rank-long sums instead of the split.
        floats = (
            8 * acc
            if step.matrix_units is not False
            else 8 * acc + budgets.PRODUCT + codes.shape[1] * acc
        )
        error += floats * torch.einsum("hcr,ctr->hct", u, padded).flatten(1)[:, :length]
        scores.append(score.masked_fill(is_exact, float("-inf")))
        errors.append(scale * error)
        values.append((v_codes @ v_vectors).masked_fill(is_exact[:, None], 0.0))
        v_terms = v_terms.masked_fill(is_exact[:, None], 0.0)
    score, error, value = torch.cat(scores, 1), torch.cat(errors, 1), torch.cat(values)
    lse = torch.logsumexp(score, dim=1)  # [H/G]
    weight = (score - lse[:, None]).exp()
    o, magnitude = weight @ value, weight @ value.abs()

    o_error, exact = torch.zeros_like(o), 0
    if "exact" in parts:
        exact = scores[0].shape[1]
        adds = (min(exact, budgets.TILE) + exact // 32 + 8) * acc
        o_error += (budgets.PRODUCT + adds) * weight[:, :exact] @ value[:exact].abs()
    if "pages" in parts:
        adds = (
            length // budgets.TILE + v_codes.shape[1] + 12 + budgets.TILE
        ) * acc + budgets.PRODUCT
        o_error += adds * (weight[:, exact:] @ v_terms) @ v_vectors.abs()
        tiles = -(-length // budgets.TILE)
        pad = tiles * budgets.TILE - length
        top = (
            torch.nn.functional.pad(weight[:, exact:], (0, pad)).unflatten(1, (tiles, -1)).amax(-1)
        )
        total = (
            torch.nn.functional.pad(value[exact:].abs(), (0, 0, 0, pad))
            .unflatten(0, (tiles, -1))
            .sum(1)
        )
        o_error += budgets.SPLIT * (1 + 1e-3) * top @ total

    adds = (min(score.shape[1], 2 * budgets.TILE) + 8) * acc
    seen = torch.where(score.isfinite(), score, 0.0)
    error = error + budgets.EXP + 4 * acc * (seen.abs() + lse.abs()[:, None])
    if (
        len(parts) == 2
    ):  # joined: the log-sum-exps of the parts are rounded, and so are their weights
        part_lse = torch.stack([torch.logsumexp(part, dim=1) for part in scores])
        gap, part_size = (part_lse - lse).abs().amax(0), part_lse.abs().amax(0)
        joined = (
            budgets.EXP + budgets.LOG + adds + acc * (8 + 3 * gap + 3 * part_size + 2 * lse.abs())
        )
        error += joined[:, None]
    grown = weight * torch.expm1(error)
    drift = torch.log1p(grown.sum(-1))
    spread = torch.stack(
        [(w[:, None] * (value - x).abs()).sum(0) for w, x in zip(grown, o, strict=True)]
    )
    o_budget = spread * drift.exp()[:, None] + o_error + adds * (magnitude + o.abs())
    o_budget += 2 * acc * lse.abs()[:, None] * magnitude
    return Expected(o, lse, o_budget, drift + budgets.LOG + adds + 3 * acc * lse.abs())


def check_state(
    step: Step, state: tuple[torch.Tensor, torch.Tensor | None], parts: Sequence[str] = BOTH
) -> float:
    """The largest error of a state (o [B, H, (Q,) D], lse [B, H, (Q)] or None) in units of its
    budget, over the heads of two rows and KV heads (the first of the first row, the last of the
    last) and the first and last query. A 16-bit o may be rounded once.

    Raises:
        AssertionError: an error is larger than its budget, or a number of the whole state is not
        finite.
    """
    o, lse = state
    if not all(x.isfinite().all() for x in state if x is not None):
        raise AssertionError("the state holds numbers that are not finite")
    if step.q.dim() == 3:
        o, lse = o[:, :, None], None if lse is None else lse[:, :, None]
    group, ratios = step.q.shape[1] // step.codec.kv_heads, []
    corners = {(0, 0), (len(o) - 1, step.codec.kv_heads - 1)}
    for (b, g), i in itertools.product(sorted(corners), sorted({0, o.shape[2] - 1})):
        want, heads = expected(step, b, g, parts, i), slice(g * group, (g + 1) * group)
        allowed = want.o_budget + budgets.U[o.dtype] * want.o.abs()
        ratios.append(((o[b, heads, i].double() - want.o).abs() / allowed).max())
        if lse is not None:
            ratios.append(((lse[b, heads, i].double() - want.lse).abs() / want.lse_budget).max())
    worst = float(torch.stack(ratios).max())  # NaN if one is
    if not worst <= 1:
        raise AssertionError(f"an error of {worst:.3g} times the budget")
    return worst
