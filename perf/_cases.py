"""A decode step on random data, built on the device, and what it must give, in float64 on the device.

The reference follows the definition, as reference/attention.py does (keys and values rebuilt, query and keys turned to
their absolute positions, softmax), for one row and KV head at a time: at 128K tokens NumPy would take minutes. Its budget
is that of tests/budgets.py, whose constants it takes. tests/test_perf.py holds both against the oracle and its budget.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

import spectral_kernels as sk
from tests import budgets

WINDOW, SINKS = 128, 4
LAYOUTS = ("quality", "balanced", "small", "32x8")
CHUNK, ALIGN = 128, 512  # of 32x8
BOTH = ("exact", "cold")
SCORE_STD = 2.0  # of real models: 1 to 3
THETA = 1e6


def preset_layout(name: str, dim: int) -> sk.PageLayout:
    """The page layout of a preset at a head dimension; "32x8": 32 components of 8 bits for keys and for values."""
    if name == "32x8":
        return sk.PageLayout(sk.Bands.parse(name), sk.Bands.parse(name), dim, CHUNK, ALIGN)
    layout = sk.PRESETS[name].layout(dim)
    if layout is None:
        raise ValueError(f"name: expected a preset with cold pages, got {name!r}")
    return layout


@dataclass(frozen=True)
class Shape:
    """One query a row over T tokens: B rows, H query heads, G KV heads, head dimension D."""

    batch: int
    heads: int
    kv_heads: int
    dim: int
    tokens: int

    def __str__(self) -> str:
        return f"B={self.batch} H={self.heads}/{self.kv_heads} D={self.dim} T={self.tokens}"

    @property
    def cold(self) -> int:
        return self.tokens - WINDOW

    @property
    def dense_bytes(self) -> int:
        """Of K and V in 16 bits."""
        return 4 * self.batch * self.kv_heads * self.tokens * self.dim

    def page_bytes(self, layout: sk.PageLayout) -> int:
        """Of live coefficients, skip bits and table entries: what the cold kernel must read."""
        chunks = -(-self.cold // layout.chunk)
        page = self.kv_heads * (self.cold * layout.token_bytes + chunks * layout.chunk // 8)
        return self.batch * (page + 4 * chunks + 4 * -(-self.cold // layout.align))

    def step_bytes(self, layout: sk.PageLayout) -> int:
        """Of all that a decode step must read: pages, bases, exact tokens, queries."""
        bases = self.kv_heads * (layout.k.rank + layout.v.rank) * (self.dim + 4)
        exact = (WINDOW + SINKS) * (4 * self.kv_heads * self.dim + 4)
        return self.page_bytes(layout) + self.batch * (bases + exact + 2 * self.heads * self.dim)


@dataclass
class Decode:
    """The inputs of one decode step: cold pages without the sinks, the sinks and the newest tokens exact.

    q [B, H, D] and positions int32 [B]; k, v [B, G, N, D] and key_positions int32 [B, N]; inv_freq float64 [D/2].
    """

    shape: Shape
    q: torch.Tensor
    positions: torch.Tensor
    pages: sk.Pages
    k: torch.Tensor
    v: torch.Tensor
    key_positions: torch.Tensor
    rope: sk.Rope
    inv_freq: torch.Tensor

    @property
    def exact(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.k, self.v, self.key_positions

    def attend_cold(self) -> tuple[torch.Tensor, torch.Tensor]:
        return sk.attend_spectral(self.q, self.positions, self.pages, self.rope)

    def attend_exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        return sk.attend_exact(self.q, self.positions, *self.exact, self.rope, chunk=self.pages.layout.align)

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer runs for a new token (LayerCache.attend)."""
        return sk.attend_spectral(self.q, self.positions, self.pages, self.rope, exact=self.exact)


def make_decodes(
    shape: Shape, layout: sk.PageLayout, *, copies: int, dtype: torch.dtype, device: torch.device
) -> list[Decode]:
    """Random decode steps of one shape. Scores have a spread of SCORE_STD, components fall as in a spectrum."""
    batch, groups, dim, chunk = shape.batch, shape.kv_heads, shape.dim, layout.chunk
    chunks = -(-shape.cold // chunk)
    own = batch * chunks  # pages of a copy
    pool = sk.allocate_pages(
        layout,
        pages=copies * own,
        segments=batch,
        kv_heads=groups,
        batch=batch,
        max_chunks=chunks,
        device=device,
    )
    pool.k_pages.random_(0, 256)
    pool.v_pages.random_(0, 256)
    pool.lengths.fill_(shape.cold)
    pool.segment_table.copy_(torch.arange(batch, device=device)[:, None].expand(-1, pool.max_blocks))
    for bands, basis, scale, std in (
        (layout.k, pool.k_basis, pool.k_scale, SCORE_STD),
        (layout.v, pool.v_basis, pool.v_scale, 1.0),
    ):
        directions = torch.linalg.qr(torch.randn(groups, dim, dim, device=device))[0][:, : bands.rank].contiguous()
        rows, lengths = sk.quantise_basis(directions)
        # Codes are uniform: 2**bits values a step apart.
        spread = torch.tensor([((4.0**bits - 1) / 12) ** 0.5 for bits in bands.bits], device=device)
        fall = torch.exp(-3 * torch.arange(bands.rank, device=device) / bands.rank)
        fall *= std * (dim / fall.square().sum()) ** 0.5  # keys and values of length std * sqrt(D)
        basis.copy_(rows)
        scale.copy_(lengths * fall / spread)
    inv_freq = THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    rope = sk.Rope.from_inv_freq(inv_freq, device=device)
    exact = torch.cat((torch.arange(SINKS), torch.arange(shape.cold, shape.tokens))).to(device, torch.int32)
    decodes = []
    for copy in range(copies):
        part = slice(copy * own, (copy + 1) * own)
        table = torch.randperm(own, dtype=torch.int32, device=device).view(batch, chunks)
        skip = pool.skip[part]
        skip[table[:, 0].long(), :, 0] = (1 << SINKS) - 1
        pages = dataclasses.replace(
            pool, k_pages=pool.k_pages[part], v_pages=pool.v_pages[part], skip=skip, page_table=table
        )
        kv_shape = (batch, groups, len(exact), dim)
        decodes.append(
            Decode(
                shape,
                torch.randn(batch, shape.heads, dim, dtype=dtype, device=device),
                torch.full((batch,), shape.tokens - 1, dtype=torch.int32, device=device),
                pages,
                torch.randn(kv_shape, dtype=dtype, device=device) * SCORE_STD,
                torch.randn(kv_shape, dtype=dtype, device=device),
                exact.repeat(batch, 1),
                rope,
                inv_freq.to(device),
            )
        )
    return decodes


@dataclass
class Expected:
    """The state of one row and the heads of one KV head, and its budget: o [H/G, D], lse [H/G], float64."""

    o: torch.Tensor
    lse: torch.Tensor
    o_budget: torch.Tensor
    lse_budget: torch.Tensor


def _turn(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """x [..., D] turned by positions [...], float64."""
    angle = positions.double()[..., None] * inv_freq
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * angle.cos() - x2 * angle.sin(), x1 * angle.sin() + x2 * angle.cos()), dim=-1)


def _pair_length(x: torch.Tensor) -> torch.Tensor:
    """Each component's pair's length, [..., D]: what turning can make of it at most."""
    length = torch.hypot(*x.chunk(2, dim=-1))
    return torch.cat((length, length), dim=-1)


def expected(decode: Decode, b: int, g: int, parts: tuple[str, ...] = BOTH) -> Expected:
    """The state over the cold tokens, the exact ones, or both, of row b and KV head g.

    Each key's score may be off by what tests/budgets.py allows for its kind, each kind's output likewise; a state made of
    both is also allowed what joining two states may lose, as an error of each key's weight.
    """
    pages, shape, f64 = decode.pages, decode.shape, torch.float64
    chunk, align = pages.layout.chunk, pages.layout.align
    dim, group, acc = shape.dim, shape.heads // shape.kv_heads, budgets.ACC
    q = decode.q[b, g * group : (g + 1) * group].double()
    turned = _turn(q, decode.positions[b].expand(group), decode.inv_freq)
    size = _pair_length(q)
    softmax_scale = dim**-0.5
    scores, errors, values = [], [], []
    if "exact" in parts:
        k, at = decode.k[b, g].double(), decode.key_positions[b]
        scores.append(softmax_scale * turned @ _turn(k, at - at % align, decode.inv_freq).T)
        relative = 2 * budgets.ANGLE + 2 * budgets.PRODUCT + (6 + 4 + dim) * acc
        errors.append(softmax_scale * relative * size @ _pair_length(k).T)
        values.append(decode.v[b, g].double())
    if "cold" in parts:
        length = int(pages.lengths[b])
        table = pages.page_table[b, : -(-length // chunk)].long()
        segment = int(pages.segment_table[b, 0])  # one segment a row

        def side(name: str, bands: sk.Bands, scale: torch.Tensor, basis: torch.Tensor):
            data = pages.k_pages if name == "k" else pages.v_pages
            codes = sk.unpack_pages(data[table, g], bands, side=name).flatten(0, 1)[:length].double()  # [T, R]
            offset = torch.as_tensor(budgets.stored_offsets(bands.bands), dtype=f64, device=codes.device)
            vectors = scale[segment, g].double()[:, None] * basis[segment, g].double()  # [R, D]
            return codes, (codes - offset).abs() + offset.abs(), vectors

        bits = torch.arange(32, device=q.device)
        seen = (((pages.skip[table, g][..., None] >> bits) & 1) == 0).flatten()[:length]
        k_codes, k_terms, k_vectors = side("k", pages.layout.k, pages.k_scale, pages.k_basis)
        v_codes, v_terms, v_vectors = side("v", pages.layout.v, pages.v_scale, pages.v_basis)
        at = torch.arange(length, device=q.device)
        cold = softmax_scale * turned @ _turn(k_codes @ k_vectors, at - at % align, decode.inv_freq).T
        scores.append(cold.masked_fill(~seen, float("-inf")))
        starts = torch.arange(0, length, align, device=q.device)
        distance = decode.positions[b] - starts  # [blocks]
        u = (
            _turn(q[:, None].expand(-1, len(starts), -1), distance, decode.inv_freq) @ k_vectors.T
        ).abs()  # [H/G, blocks, R]
        error = budgets.projection(dim, turns=2) * (size @ k_vectors.abs().T) @ k_codes.abs().T
        error += budgets.SPLIT * size.amax(-1)[:, None] * (k_codes.abs() @ k_vectors.abs().sum(-1))
        low = torch.as_tensor(budgets.field_weights(pages.layout.k.bands), dtype=f64, device=q.device)
        largest = (u / low).amax(-1).repeat_interleave(align, 1)[:, :length]
        error += budgets.SPLIT * largest * (k_codes.abs() @ low)
        padded = torch.nn.functional.pad(k_terms, (0, 0, 0, len(starts) * align - length)).unflatten(0, (-1, align))
        error += 8 * acc * torch.einsum("hcr,ctr->hct", u, padded).flatten(1)[:, :length]
        errors.append(softmax_scale * error)
        values.append((v_codes @ v_vectors).masked_fill(~seen[:, None], 0.0))
        v_terms = v_terms.masked_fill(~seen[:, None], 0.0)
    score, error, value = torch.cat(scores, 1), torch.cat(errors, 1), torch.cat(values)
    lse = torch.logsumexp(score, dim=1)  # [H/G]
    weight = (score - lse[:, None]).exp()
    o = weight @ value
    magnitude = weight @ value.abs()

    o_error = torch.zeros_like(o)
    exact = decode.k.shape[2] if "exact" in parts else 0
    if exact:
        relative = budgets.PRODUCT + (min(exact, budgets.TILE) + exact // 32 + 8) * acc
        o_error += relative * weight[:, :exact] @ value[:exact].abs()
    if "cold" in parts:
        adds = (shape.cold // min(chunk, budgets.TILE) + pages.layout.v.rank + 12) * acc + budgets.PRODUCT
        o_error += adds * (weight[:, exact:] @ v_terms) @ v_vectors.abs()
        tiles = -(-shape.cold // budgets.TILE)
        pad = tiles * budgets.TILE - shape.cold
        top = torch.nn.functional.pad(weight[:, exact:], (0, pad)).unflatten(1, (tiles, -1)).amax(-1)
        total = torch.nn.functional.pad(value[exact:].abs(), (0, 0, 0, pad)).unflatten(0, (tiles, -1)).sum(1)
        o_error += budgets.SPLIT * (1 + 1e-3) * top @ total

    adds = (min(score.shape[1], 2 * budgets.TILE) + 8) * acc
    seen_score = torch.where(score.isfinite(), score, 0.0)
    error = error + budgets.EXP + 4 * acc * (seen_score.abs() + lse.abs()[:, None])
    if len(parts) == 2:  # joined: the parts' log-sum-exps are rounded, and so are its weights
        part_lse = torch.stack([torch.logsumexp(part, dim=1) for part in scores])
        gap, part_size = (part_lse - lse).abs().amax(0), part_lse.abs().amax(0)
        joined = budgets.EXP + budgets.LOG + adds + acc * (8 + 3 * gap + 3 * part_size + 2 * lse.abs())
        error += joined[:, None]
    grown = weight * torch.expm1(error)
    drift = torch.log1p(grown.sum(-1))
    o_budget = torch.stack([(w[:, None] * (value - mean).abs()).sum(0) for w, mean in zip(grown, o, strict=True)])
    o_budget = (
        o_budget * drift.exp()[:, None] + o_error + adds * (magnitude + o.abs()) + 2 * acc * lse.abs()[:, None] * magnitude
    )
    return Expected(o, lse, o_budget, drift + budgets.LOG + adds + 3 * acc * lse.abs())


def check_state(decode: Decode, state: tuple[torch.Tensor, torch.Tensor], parts: tuple[str, ...] = BOTH) -> float:
    """The largest error of a state (o [B, H, D], lse [B, H]) in units of its budget, over the heads of two rows and KV
    heads (the first of the first row, the last of the last).

    Raises:
        AssertionError: an error is larger than its budget, or a number of the whole state is not finite.
    """
    o, lse = state
    if not (o.isfinite().all() and lse.isfinite().all()):
        raise AssertionError("the state holds numbers that are not finite")
    shape, ratios = decode.shape, []
    group = shape.heads // shape.kv_heads
    for b, g in sorted({(0, 0), (shape.batch - 1, shape.kv_heads - 1)}):
        want = expected(decode, b, g, parts)
        own = slice(g * group, (g + 1) * group)
        ratios.append(((o[b, own].double() - want.o).abs() / want.o_budget).max())
        ratios.append(((lse[b, own].double() - want.lse).abs() / want.lse_budget).max())
    worst = float(torch.stack(ratios).max())  # NaN if one is
    if not worst <= 1:
        raise AssertionError(f"an error of {worst:.3g} times the budget")
    return worst
