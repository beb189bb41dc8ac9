"""Compress keys and values: second moments, weighted bases, and encoding into the bands of a page.

What a low rank and few bits lose must be lost where it counts, so the basis is fitted under a metric M [D, D]: for keys the
second moment of the queries as the chunks see them (errors of scores), for values the sum over the group's heads of
W_o^T W_o (errors of outputs). With X the rows (phase-aligned keys, or values), G = X^T X and M = L L^T

    L^T G L = V S^2 V^T        basis = V^T L^(-1)  [R, D]      encoder = L V  [D, R]

so X ~ (X encoder) basis has the least M-weighted error of its rank, from D x D eigenproblems alone (eigen.py).
Basis rows are then held in int8 with a float32 scale each. The encoder is recomputed for the basis as it is held,

    encoder = M B^T (B M B^T)^(-1)       (the inverse of B when R = D)

so rounding a basis of full rank loses nothing. A component's quantiser is uniform, with the step of least squared error.
Keys first lose their mean row, which biases make large: it becomes a component of its own, with one code for all tokens,
and kernels need not know (`Spectrum`). What each component loses at each precision, and what errors cost after the softmax
(`error_weights`), say which bands a layer needs.

Source: Eckart and Young (1936) in the M-norm; design of phase-aligned keys: rope.py.
Oracle: reference/compress.py.   Test: tests/test_compress.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import triton
import triton.language as tl

from . import _launch
from ._checks import FLOATS, check_in, check_tensor
from ._launch import cos_sin_of_phase, dot_f32, dot_int8_f32, phase_of
from .attention import _block, _fields, _first_block, _group_offset, _half, _mask, _masked, _offset, _subtiles, _weight
from .eigen import (
    _weighted_eigenvectors,
    eigenvectors_torch,
    factorise_f64,
    has_kernels,
    product_f64,
    sizes_f64,
    solve_f64,
)
from .pages import CHUNKS, Bands, Pages, pack_pages, unpack_pages
from .rope import Rope, rotate, rotate_torch

# Share of the mean eigenvalue added to a metric: directions that no query used must still be encoded, if coarsely.
METRIC_FLOOR = 1e-3


# Matrix units add up in float32 but cut the sum off instead of rounding it: a bias that grows with the terms. So no run of
# tokens longer than this is added up by them (64 steps of 16: at most 64 * 2**-23 = 8e-6, a quarter of that on average).
GRAM_RUN = 1024
# Programs a multiprocessor that share the sums over tokens: registers leave room for one (two, of 128 registers, spill and
# take a third longer on an H200). At T = 32,768, D = 128 their parts are 6 % of the bytes of keys and values.
GRAM_PROGRAMS = 1


@triton.jit(do_not_specialize=["T", "splits"])
def _gram_kernel(
    x_ptr,
    mean_ptr,  # float32 [B, G, D], or None
    out_ptr,
    T,
    splits,
    G,
    stride_x_b,
    stride_x_g,
    stride_x_t,
    D: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MATRIX: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One [BLOCK_D, BLOCK_D] tile of the second moment of one split of the tokens of one row and head.

    EXACT: x is 16 bits wide, and its products are exact in float32: they go to the matrix units as they are.
    """
    tiles = tl.cdiv(D, BLOCK_D)
    i = (tl.program_id(0) // tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    j = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    bg = tl.program_id(2).to(tl.int64)
    x_ptr += (bg // G) * stride_x_b + (bg % G) * stride_x_g
    each = tl.cdiv(tl.cdiv(T, RUN), splits) * RUN
    end = tl.minimum(split * each + each, T)
    out_ptr += ((bg * splits + split) * D + i[:, None]) * D + j[None, :]
    mask = (i < D)[:, None] & (j < D)[None, :]
    if mean_ptr is not None:
        mean_i = tl.load(mean_ptr + bg * D + i, mask=i < D, other=0.0)
        mean_j = tl.load(mean_ptr + bg * D + j, mask=j < D, other=0.0)
    acc = tl.zeros([BLOCK_D, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_D, BLOCK_D], dtype=tl.float32)
    for start in range(split * each, end, BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        b = tl.load(x_ptr + t[:, None] * stride_x_t + j[None, :], mask=(t < T)[:, None] & (j < D)[None, :], other=0.0)
        if mean_ptr is not None:
            b = tl.where((t < T)[:, None], b.to(tl.float32) - mean_j[None, :], 0.0).to(b.dtype)
        if BLOCK_D >= D:
            a = tl.trans(b)
        else:
            a = tl.load(x_ptr + t[None, :] * stride_x_t + i[:, None], mask=(t < T)[None, :] & (i < D)[:, None], other=0.0)
            if mean_ptr is not None:
                a = tl.where((t < T)[None, :], a.to(tl.float32) - mean_i[:, None], 0.0).to(a.dtype)
        if EXACT:
            acc = tl.dot(a, b, acc)
        else:
            acc += dot_f32(a.to(tl.float32), b.to(tl.float32), MATRIX)
        if (start + BLOCK_T) % RUN == 0:
            total += acc
            acc = tl.zeros([BLOCK_D, BLOCK_D], dtype=tl.float32)
    tl.store(out_ptr, total + acc, mask=mask)


@triton.jit(do_not_specialize=["splits"])
def _gram_sum_kernel(parts_ptr, out_ptr, splits, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """The sum of all parts [splits, SIZE] of one row and head, BLOCK entries of it, in float64."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bg = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        mask = (split < splits)[:, None] & (at < SIZE)[None, :]
        parts = tl.load(parts_ptr + (bg * splits + split)[:, None] * SIZE + at[None, :], mask=mask, other=0.0)
        total += tl.sum(parts.to(tl.float64), 0)
    tl.store(out_ptr + bg * SIZE + at, total.to(tl.float32), mask=at < SIZE)


def gram(x: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
    """Second moment over tokens, X^T X.

    Args:
        x: [B, G, T, D] fp16, bf16 or fp32; last dimension of stride 1, others any.
        mean: float32 [B, G, D] to subtract from every token before, or None. Differences are rounded to the dtype of x.
    Returns:
        float32 [B, G, D, D], contiguous: float32 sums over GRAM_RUN tokens, added in float32, then in float64.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    check_tensor("x", x, shape=(None,) * 4, dtype=FLOATS, unit_stride=True)
    batch, heads, tokens, dim = x.shape
    if mean is not None:
        check_tensor("mean", mean, shape=(batch, heads, dim), dtype=torch.float32, device=x.device)
    if not _launch.runs_kernel(x):
        return gram_torch(x, mean)
    if batch * heads == 0 or tokens == 0:
        return x.new_zeros((batch, heads, dim, dim), dtype=torch.float32)
    matrix = _launch.has_matrix_units(x.device)
    exact = matrix and _launch.is_native(x) and x.dtype != torch.float32
    block_t, block_d = (64, min(128, _launch.next_power_of_2(dim))) if exact else (32, 64) if matrix else (16, 16)
    tiles = _launch.cdiv(dim, block_d) ** 2
    programs = GRAM_PROGRAMS * _launch.multiprocessors(x.device)
    splits = min(_launch.cdiv(tokens, GRAM_RUN), max(1, programs // (batch * heads * tiles)))
    parts = torch.empty((batch, heads, splits, dim, dim), dtype=torch.float32, device=x.device)
    out = torch.empty((batch, heads, dim, dim), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _gram_kernel[(tiles, splits, batch * heads)](
            x,
            None if mean is None else mean.contiguous(),
            parts,
            tokens,
            splits,
            heads,
            *x.stride()[:3],
            D=dim,
            RUN=GRAM_RUN,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            MATRIX=matrix,
            EXACT=exact,
            num_warps=8 if block_d == 128 else 4,
            num_stages=5 if _launch.has_large_shared_memory(x.device) else 4,
        )
        _gram_sum_kernel[(_launch.cdiv(dim * dim, 256), batch * heads)](
            parts, out, splits, SIZE=dim * dim, BLOCK=256, BLOCK_SPLITS=16, num_warps=4
        )
    return out


def gram_torch(x: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
    """`gram` in plain PyTorch."""
    x = x.float() if mean is None else (x - mean[:, :, None]).to(x.dtype).float()
    return x.mT @ x


@triton.jit(do_not_specialize=["T", "chunks", "each"])
def _query_metric_kernel(
    q_ptr,
    turns_ptr,
    factors_ptr,  # float32 [4, chunks, HALF, HALF]
    weights_ptr,  # float32 [B, H]: what queries are multiplied by, or None
    out_ptr,  # float32 [B, G, splits, 4, HALF, HALF]
    T,
    chunks,
    each,
    G,
    HG,
    stride_q_b,
    stride_q_h,
    stride_q_t,
    CHUNK: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
    MATRIX: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One [BLOCK, BLOCK] tile of the sums of `query_metric` over `each` chunks, all query heads of one row and KV head.

    EXACT: q is 16 bits wide; once turned and rounded, its products are exact in float32.
    """
    tiles = tl.cdiv(HALF, BLOCK)
    i = (tl.program_id(0) // tiles) * BLOCK + tl.arange(0, BLOCK)
    j = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(1)
    bg = tl.program_id(2).to(tl.int64)
    q_ptr += (bg // G) * stride_q_b + (bg % G) * HG * stride_q_h
    out_ptr += ((bg * tl.num_programs(1) + split) * 4 * HALF + i[:, None]) * HALF + j[None, :]
    mask = (i < HALF)[:, None] & (j < HALF)[None, :]
    turns_i = tl.load(turns_ptr + i, mask=i < PAIRS, other=0)
    turns_j = tl.load(turns_ptr + j, mask=j < PAIRS, other=0)
    real1 = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    imaginary1 = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    real2 = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    imaginary2 = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for chunk in range(split * each, tl.minimum((split + 1) * each, chunks)):
        xx = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
        xy = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
        yx = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
        yy = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
        for start in range(0, tl.minimum(CHUNK, T - chunk * CHUNK), BLOCK_T):
            offset = start + tl.arange(0, BLOCK_T)
            t = chunk * CHUNK + offset
            cos_j, sin_j = cos_sin_of_phase(phase_of(offset[:, None], turns_j[None, :]), EXACT)  # [BLOCK_T, BLOCK]
            if BLOCK < HALF:
                cos_i, sin_i = cos_sin_of_phase(phase_of(offset[:, None], turns_i[None, :]), EXACT)
            row_ptr = q_ptr + t[:, None].to(tl.int64) * stride_q_t
            for h in range(HG):
                weight = 1.0
                if weights_ptr is not None:
                    weight = tl.load(weights_ptr + bg * HG + h)
                xj, yj = _turned_pairs(row_ptr, j, t < T, cos_j, sin_j, weight, HALF, PAIRS, EXACT)
                xi, yi = xj, yj
                if BLOCK < HALF:
                    xi, yi = _turned_pairs(row_ptr, i, t < T, cos_i, sin_i, weight, HALF, PAIRS, EXACT)
                if EXACT:
                    xx = tl.dot(tl.trans(xi), xj, xx)
                    xy = tl.dot(tl.trans(xi), yj, xy)
                    yx = tl.dot(tl.trans(yi), xj, yx)
                    yy = tl.dot(tl.trans(yi), yj, yy)
                else:
                    xx += dot_f32(tl.trans(xi), xj, MATRIX)
                    xy += dot_f32(tl.trans(xi), yj, MATRIX)
                    yx += dot_f32(tl.trans(yi), xj, MATRIX)
                    yy += dot_f32(tl.trans(yi), yj, MATRIX)
                row_ptr += stride_q_h
        factor_ptr = factors_ptr + (chunk * HALF + i[:, None]).to(tl.int64) * HALF + j[None, :]
        step = chunks.to(tl.int64) * HALF * HALF
        real, imaginary = xx + yy, yx - xy  # z_i conj(z_j)
        cos = tl.load(factor_ptr, mask=mask, other=0.0)
        sin = tl.load(factor_ptr + step, mask=mask, other=0.0)
        real1 += real * cos - imaginary * sin
        imaginary1 += real * sin + imaginary * cos
        real, imaginary = xx - yy, yx + xy  # z_i z_j
        cos = tl.load(factor_ptr + 2 * step, mask=mask, other=0.0)
        sin = tl.load(factor_ptr + 3 * step, mask=mask, other=0.0)
        real2 += real * cos - imaginary * sin
        imaginary2 += real * sin + imaginary * cos
    tl.store(out_ptr, real1, mask=mask)
    tl.store(out_ptr + HALF * HALF, imaginary1, mask=mask)
    tl.store(out_ptr + 2 * HALF * HALF, real2, mask=mask)
    tl.store(out_ptr + 3 * HALF * HALF, imaginary2, mask=mask)


@triton.jit
def _turned_pairs(row_ptr, i, live, cos, sin, weight, HALF: tl.constexpr, PAIRS: tl.constexpr, EXACT: tl.constexpr):
    """Real and imaginary parts [BLOCK_T, BLOCK] of pairs i of some queries, turned and multiplied by a weight: 16 bits wide
    if EXACT, or float32.

    Dimensions that do not turn are paired as if their frequency were 0.
    """
    first = tl.where(i < PAIRS, i, PAIRS + i)
    second = tl.where(i < PAIRS, PAIRS + i, HALF + i)
    mask = live[:, None] & (i < HALF)[None, :]
    x = tl.load(row_ptr + first[None, :], mask=mask, other=0.0)
    y = tl.load(row_ptr + second[None, :], mask=mask, other=0.0)
    TYPE: tl.constexpr = x.dtype if EXACT else tl.float32
    x, y = x.to(tl.float32), y.to(tl.float32)
    return ((x * cos - y * sin) * weight).to(TYPE), ((x * sin + y * cos) * weight).to(TYPE)


def query_metric(
    q: torch.Tensor, rope: Rope, *, chunk: int, kv_heads: int, weights: torch.Tensor | None = None, stride: int = 1
) -> torch.Tensor:
    """Mean second moment of queries as the chunks see them: of R(m - t0) q_m over all chunk starts t0 <= m.

    With z the queries turned by their offset in their own chunk, as complex pairs, a turn by a multiple n C of the chunk
    length multiplies z_f conj(z_g) by exp(i n C (f - g)) and z_f z_g by exp(i n C (f + g)); summed over the chunks that a
    query sees, that is one [D/2, D/2] factor for all queries of a chunk, so the queries are read once.

    Args:
        q: [B, H, T, D] before RoPE, of positions 0 .. T-1, fp16, bf16 or fp32; last dimension of stride 1; D even.
        rope: frequencies and attention scaling (scaling**2 on the rotary dimensions, as scores have it).
        chunk: chunk length C.      kv_heads: G; H is a multiple of it.
        weights: float32 [B, H], not negative: how much the queries of each head count, or None: all the same.
        stride: only the queries of positions 0, stride, 2 stride .. count; 1 or a divisor of C / 64.
    Returns:
        float32 [B, G, D, D], symmetric, positive semi-definite up to the rounding of turned queries to the dtype of q.
    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_tensor("q", q, shape=(None,) * 4, dtype=FLOATS, unit_stride=True)
    batch, heads, tokens, dim = q.shape
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q: expected a multiple of kv_heads = {kv_heads} heads, got {heads}")
    if tokens == 0 or dim % 2:
        raise ValueError(f"q: expected at least one token and an even D, got shape {list(q.shape)}")
    if weights is not None:
        check_tensor("weights", weights, shape=(batch, heads), dtype=torch.float32, device=q.device)
    if stride != 1 and (stride not in range(1, chunk + 1) or chunk % (64 * stride)):
        raise ValueError(f"stride: expected 1 or a divisor of chunk / 64 = {chunk / 64:g}, got {stride}")
    stride = int(stride)
    if not _launch.runs_kernel(q):
        return query_metric_torch(q, rope, chunk=chunk, kv_heads=kv_heads, weights=weights, stride=stride)
    q, rope, chunk = _every(stride, q, rope, chunk)
    tokens = q.shape[2]
    _launch.check_bf16("q", q)
    half, chunks = dim // 2, _launch.cdiv(tokens, chunk)
    matrix = _launch.has_matrix_units(q.device)
    exact = matrix and _launch.is_native(q) and q.dtype != torch.float32
    # Of more than 64 pairs a tile has two sets of them, and of large ones registers would not hold both.
    block = 64 if exact and 32 < half <= 64 else 32 if matrix else 16
    tiles = _launch.cdiv(half, block) ** 2
    wanted = max(1, GRAM_PROGRAMS * _launch.multiprocessors(q.device) // (batch * kv_heads * tiles))
    each = _launch.cdiv(chunks, wanted)
    splits = _launch.cdiv(chunks, each)
    parts = torch.empty((batch, kv_heads, splits, 4, half, half), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _query_metric_kernel[(tiles, splits, batch * kv_heads)](
            q,
            rope.turns,
            _chunk_factors(rope, chunk, chunks, half),
            None if weights is None else weights.sqrt().contiguous(),
            parts,
            tokens,
            chunks,
            each,
            kv_heads,
            heads // kv_heads,
            *q.stride()[:3],
            CHUNK=chunk,
            HALF=half,
            PAIRS=rope.turns.shape[0],
            BLOCK_T=64 if block == 64 and _launch.has_large_shared_memory(q.device) else min(32, block),
            BLOCK=block,
            MATRIX=matrix,
            EXACT=exact,
            num_warps=8 if block == 64 else 4,
            # Triton 3.6 fails where it would pipeline these loops with sums in tensor memory.
            num_stages=1 if _launch.has_tensor_memory(q.device) else 3,
        )
        out = torch.empty((batch, kv_heads, dim, dim), dtype=torch.float32, device=q.device)
        _metric_of_parts_kernel[(_launch.cdiv(half, 16) ** 2, batch * kv_heads)](
            parts,
            out,
            splits,
            1 / (2 * _seen(tokens, chunk) * (heads // kv_heads)),
            rope.scaling**2,
            HALF=half,
            PAIRS=rope.turns.shape[0],
            num_warps=4,
        )
    return out


def _seen(tokens: int, chunk: int) -> int:
    """How many pairs there are of a query and of a chunk that it sees."""
    return sum(min(chunk, tokens - start) * (start // chunk + 1) for start in range(0, tokens, chunk))


@triton.jit
def _pair_sums(parts_ptr, i, j, splits, HALF: tl.constexpr):
    """Entries i, j of the sums over all parts [splits, 4, HALF, HALF]: real and imaginary parts, twice."""
    at = (i * HALF + j)[None]
    a = tl.zeros([16, 16], dtype=tl.float32)
    b = tl.zeros([16, 16], dtype=tl.float32)
    c = tl.zeros([16, 16], dtype=tl.float32)
    d = tl.zeros([16, 16], dtype=tl.float32)
    for start in range(0, splits, 4):  # several at a time: what few programs wait for is memory
        split = start + tl.arange(0, 4)[:, None, None]
        mask = (split < splits) & ((i < HALF) & (j < HALF))[None]
        own_ptr = parts_ptr + split * (4 * HALF * HALF) + at
        a += tl.sum(tl.load(own_ptr, mask=mask, other=0.0), 0)
        b += tl.sum(tl.load(own_ptr + HALF * HALF, mask=mask, other=0.0), 0)
        c += tl.sum(tl.load(own_ptr + 2 * HALF * HALF, mask=mask, other=0.0), 0)
        d += tl.sum(tl.load(own_ptr + 3 * HALF * HALF, mask=mask, other=0.0), 0)
    return a, b, c, d


@triton.jit(do_not_specialize=["splits"])
def _metric_of_parts_kernel(
    parts_ptr,  # float32 [B, G, splits, 4, HALF, HALF], as `_query_metric_kernel` writes them
    out_ptr,  # float32 [B, G, 2 HALF, 2 HALF]
    splits,
    share,
    scaling,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """`_metric_of_pairs`: what 16 pairs have in common with 16 others, four entries each."""
    tiles: tl.constexpr = (HALF + 15) // 16
    bg = tl.program_id(1).to(tl.int64)
    i = (tl.program_id(0) // tiles * 16 + tl.arange(0, 16))[:, None]
    j = (tl.program_id(0) % tiles * 16 + tl.arange(0, 16))[None, :]
    parts_ptr += bg * splits * 4 * HALF * HALF
    out_ptr += bg * 4 * HALF * HALF
    a, b, c, d = _pair_sums(parts_ptr, i, j, splits, HALF)
    at, bt, ct, dt = _pair_sums(parts_ptr, j, i, splits, HALF)  # of the same entries with i and j exchanged
    share *= 0.5 * tl.where(i < PAIRS, scaling, 1.0) * tl.where(j < PAIRS, scaling, 1.0)
    first_i, second_i = tl.where(i < PAIRS, i, PAIRS + i), tl.where(i < PAIRS, PAIRS + i, HALF + i)
    first_j, second_j = tl.where(j < PAIRS, j, PAIRS + j), tl.where(j < PAIRS, PAIRS + j, HALF + j)
    mask = (i < HALF) & (j < HALF)
    tl.store(out_ptr + first_i * (2 * HALF) + first_j, ((a + c) + (at + ct)) * share, mask=mask)
    tl.store(out_ptr + second_i * (2 * HALF) + second_j, ((a - c) + (at - ct)) * share, mask=mask)
    tl.store(out_ptr + first_i * (2 * HALF) + second_j, ((d - b) + (bt + dt)) * share, mask=mask)
    tl.store(out_ptr + second_i * (2 * HALF) + first_j, ((b + d) + (dt - bt)) * share, mask=mask)


def _every(stride: int, q: torch.Tensor, rope: Rope, chunk: int) -> tuple[torch.Tensor, Rope, int]:
    """The queries of positions 0, stride, .. with positions counted in units of stride."""
    return (q[:, :, ::stride], Rope(rope.turns * stride, rope.scaling), chunk // stride) if stride > 1 else (q, rope, chunk)


@triton.jit(do_not_specialize=["chunks"])
def _chunk_factors_kernel(
    turns_ptr, out_ptr, chunks, CHUNK: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK entries of `_chunk_factors`, one chunk after another."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i, j = at // HALF, at % HALF
    turns_i = tl.load(turns_ptr + i, mask=i < PAIRS, other=0)
    turns_j = tl.load(turns_ptr + j, mask=j < PAIRS, other=0)
    mask = at < HALF * HALF
    for n in tl.static_range(2):
        turns = turns_i - turns_j if n == 0 else turns_i + turns_j  # wraps modulo one turn
        total_cos = tl.zeros([BLOCK], dtype=tl.float32)
        total_sin = tl.zeros([BLOCK], dtype=tl.float32)
        for chunk in range(0, chunks):
            cos, sin = cos_sin_of_phase(phase_of(tl.full([BLOCK], 1, tl.int32) * (chunk * CHUNK), turns), False)
            total_cos += cos
            total_sin += sin
            row = (2 * n * chunks + chunk).to(tl.int64) * HALF * HALF + at
            tl.store(out_ptr + row, total_cos, mask=mask)
            tl.store(out_ptr + row + chunks.to(tl.int64) * HALF * HALF, total_sin, mask=mask)


def _chunk_factors(rope: Rope, chunk: int, chunks: int, half: int) -> torch.Tensor:
    """Sums over a chunk and all before it of exp(i n C (f - g)), then of exp(i n C (f + g)), real and imaginary parts:
    float32 [4, chunks, D/2, D/2]."""
    out = torch.empty((4, chunks, half, half), dtype=torch.float32, device=rope.turns.device)
    with torch.cuda.device_of(out):
        _chunk_factors_kernel[(_launch.cdiv(half * half, 128),)](
            rope.turns, out, chunks, CHUNK=chunk, HALF=half, PAIRS=rope.turns.shape[0], BLOCK=128, num_warps=4
        )
    return out


def _chunk_factors_torch(rope: Rope, chunk: int, chunks: int, half: int) -> torch.Tensor:
    """`_chunk_factors` in plain PyTorch."""
    theta = torch.nn.functional.pad(rope.turns, (0, half - rope.turns.shape[0]))  # wraps modulo one turn
    steps = torch.arange(0, chunks * chunk, chunk, device=theta.device)[:, None, None]
    both = torch.stack((theta[:, None] - theta[None, :], theta[:, None] + theta[None, :]))[:, None]
    angle = ((steps * both) >> 32).float() * (torch.pi / 2**31)
    return torch.stack((angle.cos(), angle.sin()), dim=1).cumsum(2).flatten(0, 1)


def _metric_of_pairs(sums: torch.Tensor, rope: Rope, chunk: int, tokens: int, group: int) -> torch.Tensor:
    """The metric from sums of z_f conj(z_g) and of z_f z_g, real and imaginary parts, [B, G, 4, D/2, D/2]."""
    half, pairs = sums.shape[-1], rope.turns.shape[0]
    real, imaginary, plain_real, plain_imaginary = sums.unbind(2)
    top = torch.cat((real + plain_real, plain_imaginary - imaginary), dim=-1)
    bottom = torch.cat((imaginary + plain_imaginary, real - plain_real), dim=-1)
    moment = torch.cat((top, bottom), dim=-2) / (2 * _seen(tokens, chunk) * group)
    moment = (moment + moment.mT) / 2
    if pairs < half:  # pairs in the order of dimensions
        at = torch.arange(2 * half, device=sums.device)
        places = (at[:pairs], half + at[:pairs], at[pairs:half], half + at[pairs:half])
        back = torch.cat(places)
        moment = moment[..., back[:, None], back[None, :]]
    if rope.scaling != 1:
        moment[..., : 2 * pairs, :] *= rope.scaling**2
        moment[..., :, : 2 * pairs] *= rope.scaling**2
    return moment.float().contiguous()


def query_metric_torch(
    q: torch.Tensor, rope: Rope, *, chunk: int, kv_heads: int, weights: torch.Tensor | None = None, stride: int = 1
) -> torch.Tensor:
    """`query_metric` in plain PyTorch."""
    q, rope, chunk = _every(stride, q, rope, chunk)
    batch, heads, tokens, dim = q.shape
    group, half, pairs, chunks = heads // kv_heads, dim // 2, rope.turns.shape[0], -(-tokens // chunk)
    factors = _chunk_factors_torch(rope, chunk, chunks, half)
    positions = torch.arange(tokens, device=q.device).expand(batch, -1)
    roots = (q.new_ones((batch, heads), dtype=torch.float32) if weights is None else weights.sqrt()).split(group, dim=1)
    sums = []
    # A KV head at a time: what is held in float32 is its queries alone.
    for own, root in zip(q.split(group, dim=1), roots, strict=True):
        turned = torch.nn.functional.pad(
            rotate_torch(own, positions, rope, chunk=chunk), (0, 0, 0, -tokens % chunk)
        ).float()
        turned *= root[..., None, None]
        x, y, rest = turned[..., :pairs], turned[..., pairs : 2 * pairs], turned[..., 2 * pairs :].chunk(2, dim=-1)
        x, y = (torch.cat(z, dim=-1) for z in ((x, rest[0]), (y, rest[1])))
        x, y = (z.unflatten(2, (chunks, chunk)).transpose(1, 2).flatten(2, 3) for z in (x, y))  # [B, chunks, H/G * C, D/2]
        xx, xy, yx, yy = x.mT @ x, x.mT @ y, y.mT @ x, y.mT @ y
        parts = []
        for real, imaginary, (cos, sin) in ((xx + yy, yx - xy, factors[:2]), (xx - yy, yx + xy, factors[2:])):
            parts += [(real * cos - imaginary * sin).sum(1), (real * sin + imaginary * cos).sum(1)]
        sums.append(torch.stack(parts, dim=1))
    return _metric_of_pairs(torch.stack(sums, dim=1).double(), rope, chunk, tokens, group)


@triton.jit(do_not_specialize=["T", "each"])
def _squares_kernel(
    v_ptr,
    metric_ptr,  # float32 [G, D, D], or None
    out_ptr,  # float32 [B, G, T]
    T,
    each,
    G,
    stride_v_b,
    stride_v_g,
    stride_v_t,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """|v|^2 of `each` tokens of one row and head in the head's metric."""
    TYPE: tl.constexpr = v_ptr.dtype.element_ty if NATIVE else tl.float32
    g = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    v_ptr += b * stride_v_b + g * stride_v_g
    if metric_ptr is not None:
        at = (g * D + d[:, None]) * D + d[None, :]
        metric = tl.load(metric_ptr + at, mask=(d < D)[:, None] & (d < D)[None, :], other=0.0).to(TYPE)
    begin = tl.program_id(0) * each
    for start in range(begin, tl.minimum(begin + each, T), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        v_row = v_ptr + t[:, None].to(tl.int64) * stride_v_t
        v = tl.load(v_row + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0).to(TYPE)
        weighted = v.to(tl.float32)
        if metric_ptr is not None:
            weighted = tl.dot(v, metric, input_precision="tf32x3")
        tl.store(out_ptr + (b * G + g) * T + t, tl.sum(weighted * v.to(tl.float32), 1), mask=t < T)


def _query_positions(tokens: int, rows: int) -> list[int]:
    """Where the queries are that `error_weights` looks at: evenly spread over the second half of the tokens."""
    half = tokens // 2
    return [half + (tokens - 1 - half) * row // max(1, rows - 1) for row in range(rows)]


@triton.jit
def _query_position(row, T, rows):
    """`_query_positions`, one or more of them, by numbers of 32 bits."""
    steps = tl.maximum(rows - 1, 1)
    span = T - 1 - T // 2
    return T // 2 + span // steps * row + span % steps * row // steps


@triton.jit(do_not_specialize=["T", "S", "each", "sinks", "window"])
def _error_weights_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    squares_ptr,  # float32 [B, G, T]
    turns_ptr,
    turned_ptr,  # [B, G, splits, ROWS, D], of the type of k: where a program holds its turned queries
    o_ptr,  # float32 [B, G, 2, ROWS, splits, D]
    lse_ptr,  # float32 [B, G, 2, ROWS, splits], base 2
    size_ptr,  # float32 [B, G, ROWS, splits]
    T,
    S,
    each,
    G,
    HG,
    sinks,
    window,
    scale,
    scaling,
    stride_q_b,
    stride_q_h,
    stride_q_t,
    stride_k_b,
    stride_k_g,
    stride_k_t,
    stride_v_b,
    stride_v_g,
    stride_v_t,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """BLOCK_M of the S * HG queries of one row and KV head, by position, over `each` chunks of keys: the state of
    attention, that of attention with squared weights to tokens that are not exact, the mean of |v|^2 under the latter."""
    rows = tl.num_programs(0) * BLOCK_M
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < S * HG
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    bg = tl.program_id(2).to(tl.int64)
    TYPE: tl.constexpr = k_ptr.dtype.element_ty if NATIVE else tl.float32
    d = tl.arange(0, BLOCK_D)
    position = tl.where(live, _query_position(row, T, S * HG), T - 1)
    newest = tl.minimum(position - window, T - 1)  # token that is not exact
    first = _query_position(tl.program_id(0) * BLOCK_M, T, S * HG) - window
    last = _query_position(tl.minimum(tl.program_id(0) * BLOCK_M + BLOCK_M, S * HG) - 1, T, S * HG)
    q_ptr += (bg // G) * stride_q_b + (bg % G) * HG * stride_q_h
    q_row = q_ptr + (row % HG)[:, None].to(tl.int64) * stride_q_h + position[:, None].to(tl.int64) * stride_q_t
    squares_ptr += bg * T
    turned_row = turned_ptr + ((bg * splits + split) * rows + row[:, None]) * D
    k_ptr += (bg // G) * stride_k_b + (bg % G) * stride_k_g
    v_ptr += (bg // G) * stride_v_b + (bg % G) * stride_v_g
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    sum1 = tl.zeros([BLOCK_M], dtype=tl.float32)
    sum2 = tl.zeros([BLOCK_M], dtype=tl.float32)
    squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    values1 = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    values2 = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for chunk in range(split * each, tl.minimum((split + 1) * each, last // CHUNK + 1)):
        begin = chunk * CHUNK
        end = begin + CHUNK
        distance = tl.maximum(position - begin, 0)  # of queries before the chunk nothing counts
        # Few pairs at a time, by way of memory: registers hold the sums.
        for start in tl.static_range(0, HALF, 16):
            pair = start + tl.arange(0, 16)
            turns = tl.load(turns_ptr + pair, mask=pair < PAIRS, other=0)
            cos, sin = cos_sin_of_phase(phase_of(distance[:, None], turns[None, :]), NATIVE)
            factor = tl.where(pair < PAIRS, scale * scaling, scale)
            x, y = _turned_pairs(q_row, pair, live, cos, sin, factor[None, :], HALF, PAIRS, False)
            own = live[:, None] & (pair < HALF)[None, :]
            tl.store(turned_row + tl.where(pair < PAIRS, pair, PAIRS + pair)[None, :], x, mask=own)
            tl.store(turned_row + tl.where(pair < PAIRS, PAIRS + pair, HALF + pair)[None, :], y, mask=own)
        tl.debug_barrier()
        q = tl.load(turned_row + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0).to(TYPE)
        tl.debug_barrier()  # before the next chunk's are stored
        # Most chunks are seen whole by all queries, and no token of them is exact.
        masked = (begin < sinks) | (end > first + 1)
        for start in range(begin, tl.minimum(end, T), BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            mask = (t < T)[:, None] & (d < D)[None, :]
            k = tl.load(k_ptr + t[:, None].to(tl.int64) * stride_k_t + d[None, :], mask=mask, other=0.0).to(TYPE)
            v = tl.load(v_ptr + t[:, None].to(tl.int64) * stride_v_t + d[None, :], mask=mask, other=0.0).to(TYPE)
            square = tl.load(squares_ptr + t, mask=t < T, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="tf32x3")
            if masked:
                score = tl.where(t[None, :] <= position[:, None], score, float("-inf"))
            larger = tl.maximum(top, tl.max(score, 1))
            base = tl.where(larger == float("-inf"), 0.0, larger)
            shrink = tl.exp2(top - base)
            top = larger
            e = tl.exp2(score - base[:, None])
            e2 = e * e
            if masked:
                e2 = tl.where(tl.where(t >= sinks, t, T)[None, :] <= newest[:, None], e2, 0.0)
            sum1 = sum1 * shrink + tl.sum(e, 1)
            sum2 = sum2 * shrink * shrink + tl.sum(e2, 1)
            squares = squares * shrink * shrink + tl.sum(e2 * square[None, :], 1)
            values1 = tl.dot(e.to(TYPE), v, values1 * shrink[:, None], input_precision="tf32x3")
            values2 = tl.dot(e2.to(TYPE), v, values2 * (shrink * shrink)[:, None], input_precision="tf32x3")
    # Of empty states the log-sum-exp is -inf, and nothing else is written; sums of squares too small to divide by are such.
    some = sum2 >= 1.1754943508222875e-38
    out = (bg * 2 * rows + row) * splits + split
    tl.store(size_ptr + (bg * rows + row) * splits + split, squares / sum2, mask=some)
    tl.store(lse_ptr + out, top + tl.log2(sum1))
    tl.store(lse_ptr + out + rows * splits, 2 * top + tl.log2(tl.where(some, sum2, 0.0)))
    own = (sum1 > 0)[:, None] & (d < D)[None, :]
    tl.store(o_ptr + out[:, None] * D + d[None, :], values1 * (1.0 / sum1)[:, None], mask=own)
    own = some[:, None] & (d < D)[None, :]
    tl.store(o_ptr + (out + rows * splits)[:, None] * D + d[None, :], values2 * (1.0 / sum2)[:, None], mask=own)


@triton.jit(do_not_specialize=["S", "splits", "rows"])
def _join_weights_kernel(
    o_ptr,  # as `_error_weights_kernel` writes them, as are the next two
    lse_ptr,
    size_ptr,
    metric_ptr,  # float32 [G, D, D], or None
    out_ptr,  # float32 [3, B, H, blocks]: parts of the sums of w_k, w_v and |o|^2
    S,
    splits,
    rows,
    H,
    HG,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Join the states of BLOCK_S queries of one row and query head, and sum up what errors cost them."""
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    bg = b * (H // HG) + head // HG
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    row = s * HG + head % HG
    live = s < S
    d = tl.arange(0, BLOCK_D)
    first = (bg * 2 * rows + row) * splits
    second = first + rows * splits
    top1 = tl.full([BLOCK_S], float("-inf"), dtype=tl.float32)
    top2 = tl.full([BLOCK_S], float("-inf"), dtype=tl.float32)
    for split in range(0, splits):
        top1 = tl.maximum(top1, tl.load(lse_ptr + first + split, mask=live, other=0.0))
        top2 = tl.maximum(top2, tl.load(lse_ptr + second + split, mask=live, other=0.0))
    base2 = tl.where(top2 == float("-inf"), 0.0, top2)  # where all that a query sees is exact
    total1 = tl.zeros([BLOCK_S], dtype=tl.float32)
    total2 = tl.zeros([BLOCK_S], dtype=tl.float32)
    size = tl.zeros([BLOCK_S], dtype=tl.float32)
    o1 = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    o2 = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for split in range(0, splits):
        w1 = tl.exp2(tl.load(lse_ptr + first + split, mask=live, other=0.0) - top1)
        w2 = tl.exp2(tl.load(lse_ptr + second + split, mask=live, other=0.0) - base2)
        total1 += w1
        total2 += w2
        size += w2 * tl.load(size_ptr + (bg * rows + row) * splits + split, mask=live & (w2 > 0), other=0.0)
        mask = live[:, None] & (d < D)[None, :]
        own = o_ptr + d[None, :]
        o1 += w1[:, None] * tl.load(own + (first + split)[:, None] * D, mask=mask & (w1 > 0)[:, None], other=0.0)
        o2 += w2[:, None] * tl.load(own + (second + split)[:, None] * D, mask=mask & (w2 > 0)[:, None], other=0.0)
    o1 = o1 / total1[:, None]
    two = 1.0 / tl.where(total2 > 0, total2, 1.0)
    weighted = o1
    if metric_ptr is not None:
        at = ((head // HG) * D + d[:, None]) * D + d[None, :]
        metric = tl.load(metric_ptr + at, mask=(d < D)[:, None] & (d < D)[None, :], other=0.0)
        weighted = dot_f32(o1, metric, True)
    power = tl.sum(weighted * o1, 1)
    crossed = tl.sum(weighted * o2, 1) * two
    # Sum of squares of weights.
    p2 = tl.where(total2 > 0, tl.exp2(top2 - 2 * top1) * total2 / (total1 * total1), 0.0)
    w_k = p2 * (size * two - 2 * crossed + power)
    out_ptr += (b * H + head) * tl.num_programs(0) + tl.program_id(0)
    step = tl.num_programs(2) * H * tl.num_programs(0)
    tl.store(out_ptr, tl.sum(tl.where(live, w_k, 0.0), 0))
    tl.store(out_ptr + step, tl.sum(tl.where(live, p2, 0.0), 0))
    tl.store(out_ptr + 2 * step, tl.sum(tl.where(live, power, 0.0), 0))


def shared_metrics(metrics: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """One metric for the query heads of each KV head: the mean of theirs, each scaled to the same trace.

    Args:
        metrics: float32 [H, D, D], positive semi-definite.      kv_heads: G; H is a multiple of it.
    Returns:
        float32 [G, D, D], of trace D.
    """
    by_group = metrics.unflatten(0, (kv_heads, -1))
    mean = by_group.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(metrics.dtype).tiny)
    return torch.einsum("gh,ghde->gde", 1 / (mean * mean.shape[1]), by_group)


def metric_sizes(metrics: torch.Tensor, shared: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """How many times longer values are, in squares, in each query head's metric than in their KV head's.

    Args:
        metrics: float32 [H, D, D].      shared: float32 [G, D, D].
        moments: of the values (`gram`), float32 [B, G, D, D].
    Returns:
        float32 [B, H].
    """
    squares = torch.einsum("ghde,bgde->bgh", metrics.unflatten(0, (shared.shape[0], -1)), moments)
    own = torch.einsum("gde,bgde->bg", shared, moments).clamp_min(torch.finfo(squares.dtype).tiny)
    return (squares / own[..., None]).flatten(1)


def error_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: Rope,
    v_metrics: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    chunk: int,
    sinks: int,
    window: int,
    queries: int = 32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What errors of cold keys and values cost in each query head's outputs, relative to the mean square of all outputs.

    To first order and with errors that are independent from token to token, softmax weights p and scores s,

        E |do|^2 = sum_i p_i^2 (E ds_i^2 |v_i - o|^2 + E |dv_i|^2)          |x|^2 = f_h x^T M_g x

    averaged over `queries` queries of each head, of the second half of the tokens; the heads of a KV head take turns, so
    that few queries meet many positions. Heads that look at few old tokens count, those that look at many (errors cancel)
    or at exact ones do not. W_o^T W_o of a KV head's query heads differ little but in size: one metric M_g for all of them
    costs a quarter of the work or less, and weights that differ by a fifth choose much the same bases and layouts.

    Args:
        q: [B, H, T, D] before RoPE; k, v: [B, G, T, D] phase-aligned keys, values; of positions 0 .. T-1; floating point;
            last dimensions of stride 1.
        rope: frequencies.
        v_metrics: (M float32 [G, D, D], f float32 [B, H]), see `shared_metrics` and `metric_sizes`; or None: the
            identity, and 1.
        chunk: chunk length C.      sinks, window: first tokens and newest ones that are exact, and have no errors.
    Returns:
        (w_k, w_v), float32 [B, H]: the layer's relative error is the sum over h of w_k[h] times the mean squared error of
        keys in the metric of head h's queries (`query_metric`) plus w_v[h] times that of values in W_o^T W_o of head h. Of
        16-bit tensors, softmax weights and turned queries count to 16 bits.
    Raises:
        TypeError, ValueError: a tensor or `queries` is not as above; nothing was launched.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, shape=(None,) * 4, dtype=FLOATS, device=q.device, unit_stride=True)
    batch, heads, tokens, dim = q.shape
    groups = k.shape[1]
    if not 1 <= queries <= 32768 // max(1, heads // groups):  # `_query_position` squares it in 32 bits
        raise ValueError(f"queries: expected 1 .. 32,768 of the heads of a KV head together, got {queries} of each")
    kernel = _launch.runs_kernel(k) and _launch.has_matrix_units(k.device)
    wide = k.dtype == torch.float32 and dim > 64 and not _launch.has_large_shared_memory(k.device)  # would not fit there
    if not kernel or k.dtype != v.dtype or dim > 128 or dim % 2 or wide:
        return error_weights_torch(q, k, v, rope, v_metrics, chunk=chunk, sinks=sinks, window=window, queries=queries)
    group, count = heads // groups, min(queries, tokens)
    metric, factors = (None, None) if v_metrics is None else v_metrics
    squares = torch.empty((batch, groups, tokens), dtype=torch.float32, device=k.device)
    # Smaller tiles where a program may use less shared memory: there, registers hold operands too.
    large = _launch.has_large_shared_memory(k.device) and k.dtype != torch.float32
    block, programs = 64 if large else 32, 2 * _launch.multiprocessors(k.device)
    tiles = _launch.cdiv(group * count, block)
    # Chunks that some query of a tile sees. All programs are to run at once, those of later tiles being more.
    positions = _query_positions(tokens, group * count)
    seen = [positions[min((tile + 1) * block, len(positions)) - 1] // chunk + 1 for tile in range(tiles)]
    each = _launch.cdiv(sum(seen) * batch * groups, programs)
    while batch * groups * sum(_launch.cdiv(n, each) for n in seen) > programs and each < seen[-1]:
        each += 1
    splits, rows = _launch.cdiv(_launch.cdiv(tokens, chunk), each), tiles * block
    empty = partial(torch.empty, dtype=torch.float32, device=k.device)
    o, lse = empty((batch, groups, 2, rows, splits, dim)), empty((batch, groups, 2, rows, splits))
    size = empty((batch, groups, rows, splits))
    turned = k.new_empty((batch, groups, splits, rows, dim))
    sums = empty((3, batch, heads, _launch.cdiv(count, 16)))
    # Tokens of a program that works out squares.
    share = _launch.cdiv(tokens, 64 * max(1, programs // (batch * groups))) * 64
    wide_dim = _launch.next_power_of_2(dim)
    native = _launch.is_native(k)
    with torch.cuda.device_of(k):
        _squares_kernel[(_launch.cdiv(tokens, share), groups, batch)](
            v,
            metric,
            squares,
            tokens,
            share,
            groups,
            *v.stride()[:3],
            D=dim,
            BLOCK_T=64,
            BLOCK_D=wide_dim,
            NATIVE=native,
            num_warps=8 if not large and dim > 64 else 4,
            num_stages=3 if large else 2,
        )
        _error_weights_kernel[(tiles, splits, batch * groups)](
            q,
            k,
            v,
            squares,
            rope.turns,
            turned,
            o,
            lse,
            size,
            tokens,
            count,
            each,
            groups,
            group,
            sinks,
            window,
            dim**-0.5 * math.log2(math.e),
            rope.scaling**2,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            CHUNK=chunk,
            D=dim,
            HALF=dim // 2,
            PAIRS=rope.turns.shape[0],
            BLOCK_M=block,
            BLOCK_T=32,
            BLOCK_D=wide_dim,
            NATIVE=native,
            # Four warps take a tile of 64 rows to the matrix units; eight would do it twice.
            num_warps=4 if large or dim <= 64 else 8,
            num_stages=3 if large else 2,
        )
        _join_weights_kernel[(sums.shape[-1], heads, batch)](
            o, lse, size, metric, sums, count, splits, rows, heads, group, D=dim, BLOCK_S=16, BLOCK_D=wide_dim, num_warps=8
        )
    return _shares_of_all(sums.sum(-1), factors, dim)


def _shares_of_all(sums: torch.Tensor, factors: torch.Tensor | None, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`error_weights` from sums over queries of p^2 |v - o|^2, of p^2 and of |o|^2, [3, B, H], in a KV head's metric."""
    w_k, w_v, power = sums.unbind()
    if factors is not None:
        w_k, power = w_k * factors, power * factors
    total = power.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return w_k / (dim * total), w_v / total


def error_weights_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: Rope,
    v_metrics: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    chunk: int,
    sinks: int,
    window: int,
    queries: int = 32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`error_weights` in plain PyTorch."""
    groups = k.shape[1]
    size = q.shape[1] // groups
    metrics, factors = (None, None) if v_metrics is None else v_metrics
    found = []
    for g, own in enumerate(q.split(size, dim=1)):  # what is held in float32 is one KV head's keys and values
        metric = None if metrics is None else metrics[g]
        found.append(_group_weights(own, k[:, g], v[:, g], rope, metric, chunk, sinks, window, queries))
    return _shares_of_all(torch.cat(found, dim=2), factors, q.shape[-1])


def _group_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: Rope,
    metric: torch.Tensor | None,
    chunk: int,
    sinks: int,
    window: int,
    queries: int,
) -> torch.Tensor:
    """Sums over the queries of one KV head of p^2 |v - o|^2, of p^2 and of |o|^2, float32 [3, B, H/G].

    q: [B, H/G, T, D]; k, v: [B, T, D]; metric: [D, D].
    """
    batch, heads, tokens, dim = q.shape
    count = min(queries, tokens)
    at = torch.tensor(_query_positions(tokens, heads * count)).to(q.device, non_blocking=True)
    head = torch.arange(len(at), device=q.device) % heads
    positions = torch.arange(tokens, device=q.device)
    turned = rotate(q[:, head, at][:, None], at.expand(batch, -1), rope)[:, 0].float()  # [B, H/G * S, D]
    keys = rotate(k[:, None], (positions - positions % chunk).expand(batch, -1), rope)[:, 0].float()
    turning = rope.rotary_dim
    turned = torch.cat((turned[..., :turning] * rope.scaling**2, turned[..., turning:]), dim=-1) * dim**-0.5
    values = v.float()
    square = ((values if metric is None else values @ metric) * values).sum(-1)[:, None]  # [B, 1, T]
    found = []
    for some, own in zip(at.split(64), turned.split(64, dim=1), strict=True):  # few at a time: scores are [B, 64, T]
        age = some[:, None] - positions
        p = (own @ keys.mT).masked_fill(age < 0, float("-inf")).softmax(-1)
        o = p @ values
        weighted = o if metric is None else o @ metric
        power = (weighted * o).sum(-1, keepdim=True)
        off = square - 2 * (weighted @ values.mT) + power
        p2 = p.square().masked_fill((positions < sinks) | (age < window), 0.0)
        found.append(torch.stack([x.sum(-1) for x in (p2 * off, p2, power)]))
    return torch.cat(found, dim=-1).unflatten(-1, (count, heads)).sum(2)


def _floored(metric: torch.Tensor) -> torch.Tensor:
    """A metric in float64, symmetric, with METRIC_FLOOR of its mean eigenvalue added (identity if it is all zero)."""
    metric = metric.double()
    metric = (metric + metric.mT) / 2
    mean = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(metric.shape[-1], dtype=torch.float64, device=metric.device)
    return torch.where(mean > 0, metric / mean.clamp_min(torch.finfo(torch.float64).tiny), 0.0) + METRIC_FLOOR * eye


def fit_basis(moment: torch.Tensor, metric: torch.Tensor | None = None, *, rank: int) -> torch.Tensor:
    """The basis of least M-weighted error of a rank, best component first.

    Args:
        moment: float32 or float64 [..., D, D], X^T X.
        metric: like `moment`, broadcastable, or None for the identity.
        rank: R, 1 .. D.
    Returns:
        float32 [..., R, D], contiguous: V^T L^(-1), orthonormal in the metric M (with METRIC_FLOOR of its mean eigenvalue
        added, scaled to a mean eigenvalue of 1). The largest entry of each row is positive. Float64 arithmetic.
    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_tensor("moment", moment, dtype=(torch.float32, torch.float64))
    dim = moment.shape[-1]
    if moment.dim() < 2 or moment.shape[-2] != dim:
        raise ValueError(f"moment: expected shape [..., D, D], got {list(moment.shape)}")
    if not 1 <= rank <= dim:
        raise ValueError(f"rank: expected 1 .. {dim}, got {rank}")
    if metric is not None:
        shape = (*metric.shape[:-2], dim, dim)
        check_tensor("metric", metric, shape=shape, dtype=(torch.float32, torch.float64), device=moment.device)
        moment = moment.expand(*torch.broadcast_shapes(moment.shape[:-2], metric.shape[:-2]), dim, dim)
    if not has_kernels(moment, dim):
        return fit_basis_torch(moment, metric, rank=rank)
    return _weighted_eigenvectors(moment, metric, floor=METRIC_FLOOR, rank=rank, signed=True, dtype=torch.float32)


def fit_basis_torch(moment: torch.Tensor, metric: torch.Tensor | None = None, *, rank: int) -> torch.Tensor:
    """`fit_basis` in plain PyTorch."""
    moment = moment.double()
    if metric is None:
        basis = eigenvectors_torch(moment)[..., :rank, :]
    else:
        root = torch.linalg.cholesky_ex(_floored(metric)).L
        basis = eigenvectors_torch(root.mT @ moment @ root)[..., :rank, :]
        basis = torch.linalg.solve_triangular(root.expand(*basis.shape[:-2], -1, -1), basis, upper=False, left=False)
    largest = basis.gather(-1, basis.abs().argmax(-1, keepdim=True))
    return (basis * torch.where(largest < 0, -1.0, 1.0)).float().contiguous()


@triton.jit
def _integers(x, scale):
    """Basis rows over their scales, rounded to even as PyTorch does, float32."""
    x = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)) + 12582912.0 - 12582912.0
    return tl.minimum(tl.maximum(x, -127.0), 127.0)


@triton.jit(do_not_specialize=["R"])
def _quantise_components_kernel(
    basis_ptr,  # float32 [R, D] a matrix
    metric_ptr,  # float32 [D, D] a matrix, or None
    rows_ptr,  # int8 [R, D] a matrix
    scale_ptr,  # float32 [R] a matrix, as is the next
    weight_ptr,
    R,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """BLOCK_R rows of one basis in int8, and the squared lengths of what these stand for."""
    n = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    own = n * R + r
    basis_ptr += own[:, None] * D
    largest = tl.zeros([BLOCK_R], dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)[None, :]
        largest = tl.maximum(largest, tl.max(tl.abs(tl.load(basis_ptr + d, mask=(r < R)[:, None] & (d < D), other=0.0)), 1))
    scale = tl.div_rn(largest, tl.full([BLOCK_R], 127.0, tl.float32))
    scale = tl.where(scale > 0, scale, 1.0)
    tl.store(scale_ptr + own, scale, mask=r < R)
    weight = tl.zeros([BLOCK_R], dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        e = first + tl.arange(0, BLOCK_D)[None, :]
        mask = (r < R)[:, None] & (e < D)
        row = _integers(tl.load(basis_ptr + e, mask=mask, other=0.0), scale)
        tl.store(rows_ptr + own[:, None] * D + e, row.to(tl.int8), mask=mask)
        weighted = row
        if metric_ptr is not None:
            weighted = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                all_of = tl.load(basis_ptr + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
                metric = tl.load(metric_ptr + (n * D + d[:, None]) * D + e, mask=(d < D)[:, None] & (e < D), other=0.0)
                weighted += dot_f32(_integers(all_of, scale), metric, MATRIX)
        weight += tl.sum(weighted * row, 1)
    tl.store(weight_ptr + own, weight * scale * scale, mask=r < R)


def quantise_basis(basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Basis rows in int8 with a scale each: basis ~ scale[..., None] * rows.

    Args:
        basis: float32 [..., R, D].
    Returns:
        (rows int8 [..., R, D] in -127 .. 127, scale float32 [..., R]: the largest magnitude of the row / 127; 1 for zeros).
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    return quantise_components(basis)[:2]


def quantise_components(
    basis: torch.Tensor, metric: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantise_basis`, and what a squared error of each component costs.

    Args:
        basis: float32 [..., R, D].      metric: float32 [..., D, D], of as many matrices, or None for the identity.
    Returns:
        (rows, scale, squared lengths float32 [..., R] in the metric of what the rows stand for). Float32 arithmetic.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    check_tensor("basis", basis, dtype=torch.float32)
    if basis.dim() < 2 or basis.shape[-1] == 0:
        raise ValueError(f"basis: expected shape [..., R, D] with D at least 1, got {list(basis.shape)}")
    rank, dim = basis.shape[-2:]
    if metric is not None:
        shape = (*basis.shape[:-2], dim, dim)
        check_tensor("metric", metric, shape=shape, dtype=torch.float32, device=basis.device)
    if not _launch.runs_kernel(basis):
        return quantise_components_torch(basis, metric)
    rows = torch.empty(basis.shape, dtype=torch.int8, device=basis.device)
    scale, weight = torch.empty((2, *basis.shape[:-1]), dtype=torch.float32, device=basis.device)
    if rows.numel() == 0:
        return rows, scale, weight
    matrix = _launch.has_matrix_units(basis.device)
    block = min(64, max(16, _launch.next_power_of_2(dim))) if matrix else 16
    with torch.cuda.device_of(basis):
        _quantise_components_kernel[(_launch.cdiv(rank, 16), scale.numel() // rank)](
            basis.contiguous(),
            None if metric is None else metric.contiguous(),
            rows,
            scale,
            weight,
            rank,
            D=dim,
            BLOCK_R=16,
            BLOCK_D=block,
            MATRIX=matrix,
            num_warps=4,
        )
    return rows, scale, weight


def quantise_components_torch(
    basis: torch.Tensor, metric: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantise_components` in plain PyTorch."""
    scale = basis.abs().amax(-1) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    rows = (basis / scale[..., None]).round().clamp(-127, 127)
    vectors = rows * scale[..., None]
    weight = ((vectors if metric is None else vectors @ metric) * vectors).sum(-1)
    return rows.to(torch.int8), scale, weight


@triton.jit
def _inner_kernel(
    basis_ptr,  # B, int8 [D, D] a program
    rows_ptr,  # float64 [D, D] a program, scratch
    x_ptr,  # float64 [D, D] a program, as is the next
    inner_ptr,
    D: tl.constexpr,
    N: tl.constexpr,
):
    """B^T of one basis, and L L^T = B B^T (two kernels for an encoder: see eigen.py)."""
    BLOCK: tl.constexpr = min(N, 32)
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, N)
    basis_ptr += n * D * D
    rows_ptr += n * D * D
    x_ptr += n * D * D
    inner_ptr += n * D * D
    # By way of memory: Triton 3.6 fails where it would multiply what it has just made of integers.
    for first in range(0, N, BLOCK):
        j = first + tl.arange(0, BLOCK)
        mask = (i < D)[:, None] & (j < D)[None, :]
        row = tl.load(basis_ptr + i[:, None] * D + j[None, :], mask=mask, other=0).to(tl.float64)
        tl.store(rows_ptr + i[:, None] * D + j[None, :], row, mask=mask)
        tl.store(x_ptr + j[None, :] * D + i[:, None], row, mask=mask)
    tl.debug_barrier()
    for first in range(0, N, BLOCK):
        j = first + tl.arange(0, BLOCK)
        inner = product_f64(rows_ptr, D, 1, x_ptr, D, 1, first, D, N)
        # Room for the rounding of rows that are nearly dependent, and any length for a row of zeros (a component of no
        # variance): it spoils no other.
        more = tl.where(inner > 0, inner * tl.full([N, BLOCK], 1 + 1e-13, dtype=tl.float64), 1.0)
        inner = tl.where(i[:, None] == j[None, :], more, inner)
        tl.store(inner_ptr + i[:, None] * D + j[None, :], inner, mask=(i < D)[:, None] & (j < D)[None, :])
    tl.debug_barrier()
    factorise_f64(inner_ptr, 0.0, D, N)


@triton.jit
def _encoder_kernel(
    x_ptr,  # float64 [D, D] a program: B^T, used up
    inner_ptr,  # L
    scale_ptr,  # float32 [D] a program
    out_ptr,  # float32 [D, D] a program
    D: tl.constexpr,
    N: tl.constexpr,
):
    """B^T (L L^T)^-1, over scales: the inverse of one basis."""
    BLOCK: tl.constexpr = min(N, 32)
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, N)
    x_ptr += n * D * D
    inner_ptr += n * D * D
    solve_f64(x_ptr, inner_ptr, D, D, N, True)
    solve_f64(x_ptr, inner_ptr, D, D, N, False)
    for first in range(0, N, BLOCK):
        j = first + tl.arange(0, BLOCK)
        mask = (i < D)[:, None] & (j < D)[None, :]
        x = tl.load(x_ptr + i[:, None] * D + j[None, :], mask=mask, other=0.0)
        inverse = 1.0 / tl.load(scale_ptr + n * D + j, mask=j < D, other=1.0).to(tl.float64)
        tl.store(out_ptr + n * D * D + i[:, None] * D + j[None, :], (x * inverse[None, :]).to(tl.float32), mask=mask)


def fit_encoder(basis: torch.Tensor, scale: torch.Tensor, metric: torch.Tensor | None = None) -> torch.Tensor:
    """The encoder of a basis as it is held: coefficients x @ encoder have the least M-weighted error.

    Args:
        basis: int8 [..., R, D].     scale: float32 [..., R]: component r is the vector scale[r] * basis[r].
        metric: float32 or float64 [..., D, D], or None for plain least squares. Without effect when R = D.
    Returns:
        float32 [..., D, R]. Float64 arithmetic.
    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_tensor("basis", basis, dtype=torch.int8)
    check_tensor("scale", scale, shape=basis.shape[:-1], dtype=torch.float32, device=basis.device)
    rank, dim = basis.shape[-2:]
    if metric is not None:
        shape = (*metric.shape[:-2], dim, dim)
        check_tensor("metric", metric, shape=shape, dtype=(torch.float32, torch.float64), device=basis.device)
    # Not other ranks, which follow from layouts: each would be compiled when decoding first comes to it.
    if rank != dim or not has_kernels(basis, dim):
        return fit_encoder_torch(basis, scale, metric)
    if metric is not None:
        basis = basis.expand(*torch.broadcast_shapes(basis.shape[:-2], metric.shape[:-2]), dim, dim)
    out = torch.empty(basis.shape, dtype=torch.float32, device=basis.device)
    if out.numel() == 0:
        return out
    rows, x, inner = torch.empty((3, *out.shape), dtype=torch.float64, device=basis.device)
    grid, same = (basis.shape[:-2].numel(),), {"D": dim, **sizes_f64(dim, basis.device)}
    scale = scale.expand(basis.shape[:-1]).contiguous()
    with torch.cuda.device_of(basis):
        _inner_kernel[grid](basis.contiguous(), rows, x, inner, **same)
        _encoder_kernel[grid](x, inner, scale, out, **same)
    return out


def fit_encoder_torch(basis: torch.Tensor, scale: torch.Tensor, metric: torch.Tensor | None = None) -> torch.Tensor:
    """`fit_encoder` in plain PyTorch."""
    if metric is not None and basis.shape[-2] == basis.shape[-1]:
        basis, metric = basis.expand(*torch.broadcast_shapes(basis.shape[:-2], metric.shape[:-2]), -1, -1), None
    rows = basis.double() / 127
    weighted = rows if metric is None else rows @ _floored(metric)
    inner = rows @ weighted.mT
    # Rows as long as one another, and any length for a row of zeros (a component of no variance): it spoils no other.
    length = inner.diagonal(dim1=-2, dim2=-1).sqrt()
    length = torch.where(length > 0, length, 1.0)
    inner = inner / (length[..., :, None] * length[..., None, :])
    inner.diagonal(dim1=-2, dim2=-1).fill_(1 + 1e-13)  # room for the rounding of rows that are nearly dependent
    root = torch.linalg.cholesky_ex(inner).L
    # Not cholesky_solve, which goes through a batch one matrix at a time on a GPU.
    solved = torch.linalg.solve_triangular(root, weighted / length[..., None], upper=False)
    solved = torch.linalg.solve_triangular(root.mT, solved, upper=True)
    return (solved / (127 * scale.double() * length)[..., None]).mT.float().contiguous()


@triton.jit(do_not_specialize=["N", "stride_x_n"])
def _project_rows_kernel(
    x_ptr,
    mean_ptr,  # float32 [B, G, D], or None
    encoder_ptr,  # float32 [B, G, D, R]
    out_ptr,  # float32 [B, G, N, R]
    largest_ptr,  # float32 [B, G, tiles, R], of the rows of a tile, as is the next
    squares_ptr,
    N,
    G,
    stride_x_b,
    stride_x_g,
    stride_x_n,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MATRIX: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """BLOCK_N rows of one row and head times BLOCK_R columns of its encoder, as [BLOCK_R, BLOCK_N]: float32 is the left
    operand of `dot_f32`."""
    blocks = tl.cdiv(R, BLOCK_R)
    tile = tl.program_id(0) // blocks
    r = (tl.program_id(0) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    bg = tl.program_id(1).to(tl.int64)
    x_ptr += (bg // G) * stride_x_b + (bg % G) * stride_x_g
    encoder_ptr += bg * D * R
    c = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    for start in tl.static_range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        live = (k < D)[:, None] & (n < N)[None, :]
        x = tl.load(x_ptr + n[None, :].to(tl.int64) * stride_x_n + k[:, None], mask=live, other=0.0)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + bg * D + k, mask=k < D, other=0.0)
            x = tl.where(live, x.to(tl.float32) - mean[:, None], 0.0).to(x.dtype)
        e = tl.load(encoder_ptr + k[None, :] * R + r[:, None], mask=(r < R)[:, None] & (k < D)[None, :], other=0.0)
        c += dot_f32(e, x, MATRIX, NATIVE)
    tl.store(out_ptr + (bg * N + n[None, :]) * R + r[:, None], c, mask=(r < R)[:, None] & (n < N)[None, :])
    own = (bg * tl.cdiv(N, BLOCK_N) + tile) * R + r
    tl.store(largest_ptr + own, tl.max(tl.abs(c), 1), mask=r < R)
    tl.store(squares_ptr + own, tl.sum(c * c, 1), mask=r < R)


def project_rows(
    x: torch.Tensor, encoder: torch.Tensor, mean: torch.Tensor | None = None, *, every: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Coefficients (x - mean) @ encoder of some rows: what quantiser steps are fitted on.

    Args:
        x: [B, G, T, D] fp16, bf16 or fp32, T at least 1; last dimension of stride 1.
        encoder: float32 [B, G, D, R].
        mean: float32 [B, G, D] to subtract before, or None. Differences are rounded to the dtype of x.
        every: of rows 0, every, 2 every ..
    Returns:
        (coefficients [B, G, N, R], their largest magnitudes [B, G, R], their sums of squares [B, G, R]), float32.
        Float32 arithmetic.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    check_tensor("x", x, shape=(None,) * 4, dtype=FLOATS, unit_stride=True)
    batch, heads, tokens, dim = x.shape
    check_tensor("encoder", encoder, shape=(batch, heads, dim, None), dtype=torch.float32, device=x.device)
    if mean is not None:
        check_tensor("mean", mean, shape=(batch, heads, dim), dtype=torch.float32, device=x.device)
    if every < 1 or tokens == 0:
        raise ValueError(f"every: expected at least 1, of at least one row, got {every} of {tokens}")
    if not _launch.runs_kernel(x):
        return project_rows_torch(x, encoder, mean, every=every)
    _launch.check_bf16("x", x)
    count, rank = _launch.cdiv(tokens, every), encoder.shape[-1]
    empty = partial(torch.empty, dtype=torch.float32, device=x.device)
    out = empty((batch, heads, count, rank))
    if out.numel() == 0:
        return out, empty((batch, heads, rank)), empty((batch, heads, rank))
    matrix = _launch.has_matrix_units(x.device)
    # Registers hold 64 columns where operands lie in shared memory.
    block_n, most = (64, 64 if _launch.has_large_shared_memory(x.device) else 32) if matrix else (16, 16)
    block_r = min(most, _launch.next_power_of_2(rank))
    tiles = _launch.cdiv(count, block_n)
    largest, squares = empty((2, batch, heads, tiles, rank))
    with torch.cuda.device_of(x):
        _project_rows_kernel[(tiles * _launch.cdiv(rank, block_r), batch * heads)](
            x,
            None if mean is None else mean.contiguous(),
            encoder.contiguous(),
            out,
            largest,
            squares,
            count,
            heads,
            x.stride(0),
            x.stride(1),
            every * x.stride(2),
            D=dim,
            R=rank,
            BLOCK_N=block_n,
            BLOCK_R=block_r,
            BLOCK_K=64 if matrix and x.dtype != torch.float32 else 32 if matrix else 8,
            MATRIX=matrix,
            NATIVE=_launch.is_native(x),
            num_warps=4,
        )
    return out, largest.amax(2), squares.sum(2)


def project_rows_torch(
    x: torch.Tensor, encoder: torch.Tensor, mean: torch.Tensor | None = None, *, every: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`project_rows` in plain PyTorch."""
    rows = x[:, :, ::every]
    out = (rows if mean is None else (rows - mean[:, :, None]).to(rows.dtype)).float() @ encoder
    norm = torch.linalg.vector_norm
    return out, norm(out, ord=float("inf"), dim=-2), norm(out, dim=-2).square()


# A mean is that of so many tokens to twice as many, evenly spread. (Not of far fewer: what it lacks takes a component.)
MEAN_TOKENS = 4096
# Steps that are tried, a power of two: from the widest, which clips nothing, to a fifth of it, each as large a share of
# the one before.
STEP_SHARES, LEAST_SHARE = 16, 0.2


@triton.jit
def _off_squared(c, inverse, most):
    """The squared error of coefficients, in units of their steps; most: the highest code."""
    # A code is round(u most), where u = c / (step most) + 1 / 2 within 0 .. 1: there a multiplication clamps for nothing,
    # and adding 1.5 * 2**23 rounds. `tl.floor` and minima have a fraction of its rate.
    place = c * inverse + 0.5 * most
    code = tl.minimum(tl.maximum(c * (inverse / most) + 0.5, 0.0), 1.0) * most + 12582912.0 - 12582912.0
    return (code - place) * (code - place)


@triton.jit(do_not_specialize=["T"])
def _fit_steps_kernel(
    coefficients_ptr,
    widest_ptr,  # [P, N, R]
    top_ptr,  # [P, R]
    step_ptr,
    error_ptr,
    T,
    R: tl.constexpr,
    SHARES: tl.constexpr,
    FALL: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The steps of 16 components of one row and head in one choice: squared errors of all shares, 2**(FALL * j) of the
    widest step, in one pass. Of components that the choice does not have the step is 1 and the error 0."""
    r = tl.program_id(0) * 16 + tl.arange(0, 16)
    n = tl.program_id(1).to(tl.int64)
    choice = tl.program_id(2)
    used = r < R
    own = (choice * tl.num_programs(1) + n) * R + r
    half = tl.load(top_ptr + choice * R + r, mask=used, other=0.0) * 0.5
    if tl.max(half, 0) > 0.0:  # bands are of 16 components
        widest = tl.load(widest_ptr + own, mask=used, other=1.0)
        share = tl.exp2(tl.arange(0, SHARES).to(tl.float32) * FALL)
        step = share[:, None] * widest[None, :]  # [SHARES, 16]
        inverse = (1.0 / step)[:, None, :]
        most = 2.0 * half[None, None, :] - 1.0
        errors = tl.zeros([SHARES, BLOCK_T, 16], dtype=tl.float32)
        t = tl.arange(0, BLOCK_T)
        row_ptr = coefficients_ptr + (n * T + t)[:, None] * R + r[None, :]
        c = tl.load(row_ptr, mask=(t < T)[:, None] & used[None, :], other=0.0)
        full = T // BLOCK_T * BLOCK_T
        for start in range(0, full, BLOCK_T):  # the next are on their way while these are worked on
            row_ptr += BLOCK_T * R
            following = tl.load(row_ptr, mask=(start + BLOCK_T + t < T)[:, None] & used[None, :], other=0.0)
            errors += _off_squared(c[None, :, :], inverse, most)
            c = following
        if full < T:
            errors += tl.where((full + t < T)[None, :, None], _off_squared(c[None, :, :], inverse, most), 0.0)
        error = tl.sum(errors, 1) * step * step
        best = tl.argmin(error, 0, tie_break_left=True)
        tl.store(step_ptr + own, tl.exp2(best.to(tl.float32) * FALL) * widest, mask=used)
        tl.store(error_ptr + own, tl.min(error, 0), mask=used)
    else:
        tl.store(step_ptr + own, tl.full([16], 1.0, tl.float32), mask=used)
        tl.store(error_ptr + own, tl.zeros([16], tl.float32), mask=used)


def _largest(coefficients: torch.Tensor, largest: torch.Tensor | None = None) -> torch.Tensor:
    """Largest magnitude of each component; one without variance in the sample still gets a step that later rows can use."""
    if largest is None:
        largest = torch.linalg.vector_norm(coefficients, ord=float("inf"), dim=-2)
    # No smaller than what leaves a fifth of the step of 8 bits, and so its inverse, a normal number.
    return torch.maximum(largest, 1e-6 * largest.amax(-1, keepdim=True)).clamp_min(1e-35)


@cache
def _tops(choices: tuple[Bands, ...], count: int, device: torch.device) -> torch.Tensor:
    """2**bits of each component in each of some bands, 0 beyond their rank, float32 [P, count]."""
    rows = [[2.0**bits for bits in bands.bits] for bands in choices]
    return torch.tensor([row + [0.0] * (count - len(row)) for row in rows], device=device)


def fit_quantisers(
    coefficients: torch.Tensor, choices: Sequence[Bands], largest: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The quantiser step of each component with the least squared error over a sample, for each of some bands.

    Args:
        coefficients: float32 [..., T, R], T at least 1.      choices: P bands of rank R or less, without 16-bit ones.
        largest: their largest magnitudes, float32 [..., R], where these are known.
    Returns:
        (steps, sums of squared errors), float32 [P, ..., R]; steps are positive. Beyond a choice's rank 1 and 0.
    """
    check_tensor("coefficients", coefficients, dtype=torch.float32)
    if not _launch.runs_kernel(coefficients):
        return fit_quantisers_torch(coefficients, choices, largest)
    return _best_steps(coefficients, _widest_steps(coefficients, choices, largest), choices, STEP_SHARES)


def fit_quantisers_torch(
    coefficients: torch.Tensor, choices: Sequence[Bands], largest: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fit_quantisers` in plain PyTorch."""
    widest = _widest_steps(coefficients, choices, largest)
    best, least = widest, torch.full_like(widest, float("inf"))
    for share in range(STEP_SHARES):
        step = LEAST_SHARE ** (share / (STEP_SHARES - 1)) * widest
        error = quantiser_errors_torch(coefficients, step, choices)
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    return best, least


def quantiser_errors(coefficients: torch.Tensor, steps: torch.Tensor, choices: Sequence[Bands]) -> torch.Tensor:
    """The squared errors of quantisers with given steps over a sample, for each of some bands.

    Args:
        coefficients: float32 [..., T, R], T at least 1.      choices: P bands of rank R or less, without 16-bit ones.
        steps: float32 [P, ..., R], positive, for the components of each.
    Returns:
        Sums of squared errors, float32 [P, ..., R], 0 beyond a choice's rank.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    check_tensor("coefficients", coefficients, dtype=torch.float32)
    shape = (len(choices), *coefficients.shape[:-2], coefficients.shape[-1])
    check_tensor("steps", steps, shape=shape, dtype=torch.float32, device=coefficients.device)
    if not _launch.runs_kernel(coefficients):
        return quantiser_errors_torch(coefficients, steps, choices)
    return _best_steps(coefficients, steps, choices, 1)[1]


def quantiser_errors_torch(coefficients: torch.Tensor, steps: torch.Tensor, choices: Sequence[Bands]) -> torch.Tensor:
    """`quantiser_errors` in plain PyTorch."""
    errors = []
    for step, bands in zip(steps[..., None, :], choices, strict=True):
        own = coefficients[..., : bands.rank]
        top = _tops((bands,), bands.rank, coefficients.device)[0]
        # In place: samples of all heads in float32 are most of what a fit holds besides K and V.
        code = torch.floor(own / step[..., : bands.rank]).add_(0.5).clamp_(0.5 - top / 2, top / 2 - 0.5)
        lost = code.mul_(step[..., : bands.rank]).sub_(own).square_().sum(-2)
        errors.append(torch.nn.functional.pad(lost, (0, coefficients.shape[-1] - bands.rank)))
    return torch.stack(errors)


def _widest_steps(
    coefficients: torch.Tensor, choices: Sequence[Bands], largest: torch.Tensor | None = None
) -> torch.Tensor:
    """The least step of each component that clips nothing, for each of some bands, float32 [P, ..., R]; 1 beyond them."""
    largest = _largest(coefficients, largest)
    tops = _tops(tuple(choices), largest.shape[-1], coefficients.device)
    tops = tops.view(len(choices), *[1] * (largest.dim() - 1), tops.shape[-1])
    return torch.where(tops > 0, largest * 2 / tops, 1.0)


def _best_steps(
    coefficients: torch.Tensor, widest: torch.Tensor, choices: Sequence[Bands], shares: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `_fit_steps_kernel`: the best of so many steps down from `widest` [P, ..., R], and its squared error."""
    widest = widest.contiguous()
    steps, errors = torch.empty_like(widest), torch.empty_like(widest)
    if widest.numel() == 0:
        return steps, errors
    tokens, rank = coefficients.shape[-2:]
    with torch.cuda.device_of(coefficients):
        _fit_steps_kernel[(_launch.cdiv(rank, 16), widest[0].numel() // rank, len(choices))](
            coefficients.contiguous(),
            widest,
            _tops(tuple(choices), rank, coefficients.device),
            steps,
            errors,
            tokens,
            R=rank,
            SHARES=shares,
            FALL=math.log2(LEAST_SHARE) / (STEP_SHARES - 1),
            BLOCK_T=64 if shares > 1 else 128,
            num_warps=4 if shares > 1 else 8,
        )
    return steps, errors


def fit_steps(coefficients: torch.Tensor, bands: Bands) -> torch.Tensor:
    """The quantiser step of each component with the least squared error over a sample.

    Args:
        coefficients: float32 [..., T, R], T at least 1.
    Returns:
        float32 [..., R], positive. 16-bit components share the power of two that brings the largest
        magnitude of all below 2**12.
    """
    if not bands.is_float:
        return fit_quantisers(coefficients, [bands])[0][0]
    # Floats have exponents of their own: one step, so that no later row finds a component too small.
    largest = _largest(coefficients)
    largest = largest.amax(-1, keepdim=True).expand_as(largest)
    return torch.exp2((torch.ceil(torch.log2(largest)) - 12).clamp_min(-126))


def _parts(bands: Bands) -> list[tuple[int, slice]]:
    """Bits and components of each band."""
    parts, start = [], 0
    for rank, bits in bands.bands:
        parts.append((bits, slice(start, start + rank)))
        start += rank
    return parts


@cache
def _held(choices: tuple[Bands, ...], precisions: tuple[int, ...], count: int, device: torch.device) -> torch.Tensor:
    """1 where one of `count` components has a precision in each of some bands, else 0: float32 [P, precisions, count]."""
    held = torch.zeros((len(choices), len(precisions), count))
    for own, bands in zip(held, choices, strict=True):
        own[precisions.index(0)] = 1
        for bits, part in _parts(bands):
            own[:, part] = 0
            own[precisions.index(bits), part] = 1
    return held.to(device)


@dataclass(frozen=True)
class Spectrum:
    """The components of one side, best first, and what each loses at each precision: what a layout is chosen by.

    N = D components, or D + 1: then the first one is the mean, which is to be subtracted before `encode`, and for which all
    tokens hold the highest code.

    Args:
        basis: int8 [B, G, N, D], scale: float32 [B, G, N]: component n is the vector scale[n] * basis[n].
        encoder: float32 [B, G, D, D]: coefficients (x - mean) @ encoder of the components but the mean.
        steps: of the quantiser, float32 [B, G, n] for each number of bits, of the first n components, which may have as
            many; a multiple of that for the next higher number, so that codes of fewer bits are functions of those of more.
        precisions: numbers of bits.      errors: mean squared error of a component at each precision in units of the
            metric, float32 [precisions, B, G, N]; the first precision is 0. Of no meaning where there are no steps.
    """

    basis: torch.Tensor
    scale: torch.Tensor
    encoder: torch.Tensor
    steps: dict[int, torch.Tensor]
    precisions: tuple[int, ...]
    errors: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.basis, self.scale, self.encoder, self.errors, *self.steps.values()))

    @property
    def is_centred(self) -> bool:
        """Whether the first component is the mean."""
        return self.basis.shape[-2] > self.basis.shape[-1]

    @property
    def mean(self) -> torch.Tensor | None:
        """What to subtract before `encode`, float32 [B, G, 1, D]."""
        return self.basis[..., :1, :].float() * self.scale[..., :1, None] if self.is_centred else None

    def with_mean(self, row: torch.Tensor, scale: torch.Tensor) -> Spectrum:
        """These components after a mean: int8 [B, G, 1, D] with a scale float32 [B, G, 1]."""
        pad = torch.nn.functional.pad
        return replace(
            self,
            basis=torch.cat((row, self.basis), dim=-2),
            scale=torch.cat((scale, self.scale), dim=-1),
            # The highest code of so many bits, (2**bits - 1) / 2, stands for 1.
            steps={bits: pad(step, (1, 0), value=2 / (2**bits - 1)) for bits, step in self.steps.items()},
            errors=pad(self.errors, (1, 0)),
        )

    def without_encoder(self) -> Spectrum:
        """What pages are narrowed by, in memory of its own: a fit's tensors are parts of larger ones."""
        return replace(
            self,
            basis=self.basis.clone(),
            scale=self.scale.clone(),
            encoder=self.encoder[..., :0].clone(),
            steps={bits: step.clone() for bits, step in self.steps.items()},
        )

    def _check_bands(self, bands: Bands) -> None:
        for bits, own in _parts(bands):
            if bits not in self.steps or own.stop > self.steps[bits].shape[-1]:
                fitted = {bits: step.shape[-1] for bits, step in self.steps.items()}
                raise ValueError(f"bands: expected components that steps were fitted for, {fitted} by bits, got {bands}")

    def distortions(self, choices: Sequence[Bands]) -> torch.Tensor:
        """Mean squared error of a row in each of some bands, in units of the metric: float32 [P, B, G]."""
        for bands in choices:
            self._check_bands(bands)
        held = _held(tuple(choices), self.precisions, self.errors.shape[-1], self.errors.device)
        return (self.errors * held[:, :, None, None]).sum((1, -1))

    def steps_of(self, bands: Bands) -> torch.Tensor:
        """Steps float32 [B, G, R] of the components in these bands."""
        self._check_bands(bands)
        return torch.cat([self.steps[bits][..., own] for bits, own in _parts(bands)], dim=-1)

    def scale_of(self, bands: Bands) -> torch.Tensor:
        """The scale float32 [B, G, R] of pages in these bands: of basis rows, times steps."""
        return self.scale[..., : bands.rank] * self.steps_of(bands)

    def encoder_of(self, bands: Bands) -> torch.Tensor:
        """The encoder float32 [B, G, D, R] of pages in these bands."""
        steps, first = self.steps_of(bands), int(self.is_centred)
        encoder = self.encoder[..., : bands.rank - first] / steps[..., None, first:]
        return torch.nn.functional.pad(encoder, (first, 0)).contiguous()

    def side(self, bands: Bands) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(basis int8 [B, G, R, D], scale float32 [B, G, R], encoder float32 [B, G, D, R]): see `fit_side`."""
        return self.basis[..., : bands.rank, :].contiguous(), self.scale_of(bands), self.encoder_of(bands)


@dataclass(frozen=True)
class Side:
    """Rows of one side (K or V), and how their components are wanted.

    Args:
        x: [B, G, T, D] phase-aligned keys or values, fp16, bf16 or fp32, T at least 1.
        metric: [B, G, D, D] or [G, D, D] float32, or None.
        choices: bands that the components may be put in, of rank D or less: steps are fitted for what these need. None: 8,
            4 and 2 bits for all.
        centre: subtract the mean row (as int8 holds it). Keys have one: what a bias of the key projection adds.
        moment: `gram` of x, float32 [B, G, D, D], where it is known; not if centred.
    """

    x: torch.Tensor
    metric: torch.Tensor | None = None
    choices: Sequence[Bands] | None = None
    centre: bool = False
    moment: torch.Tensor | None = None

    def by_bits(self) -> dict[int, Bands]:
        """The components that may have so many bits, as bands of those alone; more bits first, and for no more of them."""
        if self.choices is None:
            return {bits: Bands(((self.x.shape[-1], bits),)) for bits in (8, 4, 2)}
        parts = [part for bands in self.choices for part in _parts(bands)]
        found, most = {}, 0
        for bits in sorted({bits for bits, _ in parts}, reverse=True):
            most = max(most, *(own.stop for b, own in parts if b == bits))
            found[bits] = Bands(((most, bits),))
        return found


def fit_spectra(sides: Sequence[Side], *, sample: int = 2048) -> list[Spectrum]:
    """Components of sides of the same B, G and D from their rows; their eigenproblems are solved together.

    Args:
        sample: about how many rows, evenly spread, the quantiser steps are fitted on.
    """
    dim = sides[0].x.shape[-1]
    # The mean of a part will do: second moments are about that, whatever it is.
    some = [side.x[:, :, :: max(1, side.x.shape[2] // MEAN_TOKENS)] if side.centre else None for side in sides]
    means = [None if x is None else quantise_basis(x.mean(2, keepdim=True, dtype=torch.float32)) for x in some]
    rows = [None if mean is None else mean[0].float() * mean[1][..., None] for mean in means]
    known = [
        gram(s.x, None if m is None else m[:, :, 0]) if s.moment is None else s.moment
        for s, m in zip(sides, rows, strict=True)
    ]
    moment = torch.stack(known)
    metric = None
    if any(side.metric is not None for side in sides):
        eye = torch.eye(dim, device=moment.device)
        metrics = [eye if side.metric is None else side.metric for side in sides]
        metric = torch.stack([x.expand(moment.shape[1:]) for x in metrics])
    bases, scales, weights = quantise_components(fit_basis(moment, metric, rank=dim), metric)
    encoders = fit_encoder(bases, scales)
    found = []
    for i, (side, mean) in enumerate(zip(sides, means, strict=True)):
        spectrum = _quantised(side, rows[i], bases[i], scales[i], encoders[i], weights[i], sample)
        found.append(spectrum if mean is None else spectrum.with_mean(*mean))
    return found


def _quantised(
    side: Side,
    mean: torch.Tensor | None,
    basis: torch.Tensor,
    scale: torch.Tensor,
    encoder: torch.Tensor,
    weight: torch.Tensor,
    count: int,
) -> Spectrum:
    """A side's spectrum but its mean, from components without a quantiser; steps are fitted on about `count` rows."""
    row = None if mean is None else mean[:, :, 0]
    coefficients, largest, squares = project_rows(side.x, encoder, row, every=max(1, side.x.shape[2] // count))
    tokens = coefficients.shape[-2]
    errors = {0: squares * (weight / tokens)}
    choices = side.by_bits()
    steps = {bits: fit_steps(coefficients, bands) for bits, bands in choices.items() if bands.is_float}
    coarse = [bits for bits, bands in choices.items() if not bands.is_float]
    if coarse:
        fitted, lost = fit_quantisers(coefficients, [choices[bits] for bits in coarse], largest)
        errors[coarse[0]] = lost[0] * (weight / tokens)
        finer = None
        for bits, wanted in zip(coarse, fitted, strict=True):
            if finer is not None:  # where components may have more bits
                own = finer[..., : choices[bits].rank]
                part = wanted[..., : own.shape[-1]]
                part.copy_(own * (part / own).round().clamp_min(1))
            steps[bits] = finer = wanted[..., : choices[bits].rank]
    if len(coarse) > 1:
        lost = quantiser_errors(coefficients, fitted[1:], [choices[bits] for bits in coarse[1:]]) * (weight / tokens)
        errors |= dict(zip(coarse[1:], lost, strict=True))
    return Spectrum(basis, scale, encoder, steps, tuple(errors), torch.stack(list(errors.values())))


def fit_side(
    x: torch.Tensor, bands: Bands, metric: torch.Tensor | None = None, *, sample: int = 2048
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Basis, scale and encoder of one side (K or V) from its rows, without a mean.

    Args:
        x, metric, sample: as `Side` and `fit_spectra` have them.      bands: of the side.
    Returns:
        (basis int8 [B, G, R, D], scale float32 [B, G, R] with the steps, encoder float32 [B, G, D, R]): x @ encoder is in
        units of steps, as `encode` wants it.
    """
    return fit_spectra([Side(x, metric, [bands])], sample=sample)[0].side(bands)


@triton.jit
def _byte_of(token, column, IS_K: tl.constexpr):
    """Byte of a sub-tile (pages.py) for tokens below 32 and columns below 16."""
    if IS_K:
        byte = token % 8 * 64 + column // 4 * 16 + token // 8 * 4 + column % 4
    else:
        byte = column % 8 * 64 + token % 4 * 16 + column // 8 * 8 + token // 4
    return byte


@triton.jit
def _token_of(token, sub, IS_K: tl.constexpr):
    """Token within its tile of the `token`-th of sub-tile `sub`, as `_byte_of` counts them."""
    if IS_K:
        place = sub * 32 + token
    else:
        place = token // 4 * 8 + sub * 4 + token % 4
    return place


@triton.jit
def _stored(c, GROUPS: tl.constexpr, i: tl.constexpr):
    """The bits of coefficients of block i, in units of their steps, where they lie in a byte, int32."""
    LOW: tl.constexpr = _block(GROUPS, i)[2]
    BITS: tl.constexpr = _block(GROUPS, i)[3]
    code = tl.floor(c + (1 << (BITS - 1)))
    code = tl.minimum(tl.maximum(code, 0.0), (1 << BITS) - 1.0).to(tl.int32) << LOW
    if LOW + BITS == 8:
        code ^= 128
    return code


@triton.jit(do_not_specialize=["stride_ids_b"])
def _encode_kernel(
    x_ptr,
    encoder_ptr,
    offset_ptr,  # [B, G, R] or None
    page_ids_ptr,
    pages_ptr,
    G,
    stride_x_b,
    stride_x_g,
    stride_x_t,
    stride_ids_b,
    C: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
    IS_K: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """A tile of 64 tokens of one chunk of one row and head: project, quantise, pack."""
    TILES: tl.constexpr = C // 64
    chunk = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    g = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    page = tl.load(page_ids_ptr + b * stride_ids_b + chunk).to(tl.int64)
    x_ptr += b * stride_x_b + g * stride_x_g + (chunk.to(tl.int64) * C + tile * 64) * stride_x_t
    encoder_ptr += (b * G + g) * D * R
    if offset_ptr is not None:
        offset_ptr += (b * G + g) * R
    t = tl.arange(0, 32)
    column = tl.arange(0, 16)
    if page >= 0:
        page_ptr = pages_ptr + (page * G + g) * (C * BYTES)
        if IS_FLOAT:
            for n in tl.static_range(R // 16):
                for i in tl.static_range(2):
                    c = _coefficients(
                        x_ptr, encoder_ptr, offset_ptr, n * 16, stride_x_t, _token_of(t, i, IS_K), D, R, BLOCK_K, MATRIX
                    )
                    token = tile * 64 + _token_of(t, i, IS_K)
                    r = n * 16 + column
                    at = token[:, None] * R + r[None, :]
                    if not IS_K:
                        at = r[None, :] * C + token[:, None]
                    tl.store(page_ptr.to(tl.pointer_type(tl.float16)) + at, tl.clamp(c, -65504.0, 65504.0).to(tl.float16))
        else:
            for n in tl.static_range(len(GROUPS)):
                tile_ptr = page_ptr + _group_offset(GROUPS, n) * C + tile * (512 * _subtiles(GROUPS, n))
                both = tl.zeros([32, 16], dtype=tl.int32)
                for i in tl.static_range(2):
                    byte = tl.zeros([32, 16], dtype=tl.int32)
                    for f in tl.static_range(_fields(GROUPS, n)):
                        c = _coefficients(
                            x_ptr,
                            encoder_ptr,
                            offset_ptr,
                            (_first_block(GROUPS, n) + f) * 16,
                            stride_x_t,
                            _token_of(t, i, IS_K),
                            D,
                            R,
                            BLOCK_K,
                            MATRIX,
                        )
                        byte |= _stored(c, GROUPS, _first_block(GROUPS, n) + f)
                    at = _byte_of(t[:, None], column[None, :], IS_K)
                    if _half(GROUPS, n):
                        both |= byte << (4 * i)
                    else:
                        tl.store(tile_ptr + i * 512 + at, byte.to(tl.uint8))
                if _half(GROUPS, n):
                    tl.store(tile_ptr + _byte_of(t[:, None], column[None, :], IS_K), both.to(tl.uint8))


@triton.jit
def _coefficients(
    x_ptr,
    encoder_ptr,
    offset_ptr,
    first,
    stride_x_t,
    token,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """32 tokens of a tile times 16 columns of the encoder from `first` on, less their offsets, float32 [32, 16]."""
    column = first + tl.arange(0, 16)
    c = tl.zeros([32, 16], dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + token[:, None] * stride_x_t + k[None, :], mask=(k < D)[None, :], other=0.0).to(tl.float32)
        e = tl.load(encoder_ptr + k[:, None] * R + column[None, :], mask=(k < D)[:, None], other=0.0)
        c += dot_f32(x, e, MATRIX)
    if offset_ptr is not None:
        c -= tl.load(offset_ptr + column)[None, :]
    return c


@triton.constexpr_function
def _bits_of(groups, n):
    """Bits that the fields of group n use."""
    return sum(groups[n][1])


@triton.jit(do_not_specialize=["tiles", "each", "stride_ids_b"])
def _encode_matrix_kernel(
    x_ptr,
    encoder_ptr,
    offset_ptr,  # [B, G, R] or None
    page_ids_ptr,
    pages_ptr,
    tiles,
    each,
    G,
    stride_x_b,
    stride_x_g,
    stride_x_t,
    stride_ids_b,
    C: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    R8: tl.constexpr,
    R4: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
    IS_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """`each` tiles of 64 tokens of one row and head: project, quantise, pack.

    x is 16 bits wide. The encoder is held as two parts of that type, its columns scaled by powers of two to the top of
    fp16's range. A thread holds the same column of all blocks of 16, so that packing them into bytes moves nothing.
    """
    g = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    bits = tl.where(r < R8, 8, tl.where(r < R8 + R4, 4, 2))
    d = tl.arange(0, BLOCK_D)
    e = tl.load(
        encoder_ptr + ((b * G + g) * D + d[:, None]) * R + r[None, :],
        mask=(d < D)[:, None] & (r < R)[None, :],
        other=0.0,
    )
    # Powers of two from exponents: `up` brings a column's largest magnitude to 2**14 or more, `down` undoes that.
    exponent = tl.minimum(tl.maximum(tl.max(tl.abs(e), 0).to(tl.int32, bitcast=True) >> 23, 32), 250)
    up = ((127 + 127 + 14 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    e *= up[None, :]
    TYPE: tl.constexpr = x_ptr.dtype.element_ty if NATIVE else tl.float32
    high = e.to(TYPE)
    low = (e - high.to(tl.float32)).to(TYPE)
    # Blocks fill bytes in order, and none straddles two: the bits before a block say where in its byte it goes.
    block = r // 16
    before = (
        8 * tl.minimum(block, R8 // 16)
        + 4 * tl.minimum(tl.maximum(block - R8 // 16, 0), R4 // 16)
        + 2 * tl.maximum(block - (R8 + R4) // 16, 0)
    )
    low_bit = before % 8
    most = (1 << bits).to(tl.float32) - 1.0
    shift = most * 0.5  # codes are floor(c + 2**(bits - 1)); the half more of a floor is left to rounding
    if offset_ptr is not None:
        shift -= tl.load(offset_ptr + (b * G + g) * R + r, mask=r < R, other=0.0)
    block = tl.arange(0, BLOCK_R // 16)
    byte_at = tl.arange(0, 512)
    t = tl.arange(0, 64)
    x_ptr += b * stride_x_b + g * stride_x_g
    for tile in range(tl.program_id(0) * each, tl.minimum((tl.program_id(0) + 1) * each, tiles)):
        page = tl.load(page_ids_ptr + b * stride_ids_b + tile // (C // 64)).to(tl.int64)
        token = (tile * 64 + t).to(tl.int64)
        x = tl.load(x_ptr + token[:, None] * stride_x_t + d[None, :], mask=(d < D)[None, :], other=0.0).to(TYPE)
        c = tl.dot(x, low, input_precision="ieee")
        c = tl.dot(x, high, c, input_precision="ieee") * down[None, :]
        # Adding 2**23 leaves a number below 256, rounded, in the lowest bits. Conversions have an eighth of that rate.
        code = tl.minimum(tl.maximum(c + shift[None, :], 0.0), most[None, :]) + 8388608.0
        code = (code.to(tl.int32, bitcast=True) & 255) << low_bit[None, :]
        code = tl.reshape(code, [64, BLOCK_R // 16, 16])
        page_ptr = pages_ptr + (page * G + g) * (C * BYTES) + byte_at
        for n in tl.static_range(len(GROUPS)):
            own = (block >= _first_block(GROUPS, n)) & (block < _first_block(GROUPS, n) + _fields(GROUPS, n))
            byte = tl.sum(tl.where(own[None, :, None], code, 0), 1)  # [64, 16]
            if _bits_of(GROUPS, n) == 8:
                byte ^= 128
            byte = byte.to(tl.uint8)
            if IS_K:  # token 32 i + 8 r + g, column 4 t + b -> byte 64 g + 16 t + 4 r + b, i
                byte = tl.permute(tl.reshape(byte, [2, 4, 8, 4, 4]), [2, 3, 1, 4, 0])
            else:  # token 8 b + 4 i + t, column 8 h + g -> byte 64 g + 16 t + 8 h + b, i
                byte = tl.permute(tl.reshape(byte, [8, 2, 4, 2, 8]), [4, 2, 3, 0, 1])
            first, second = tl.split(tl.reshape(byte, [512, 2]))
            out = page_ptr + _group_offset(GROUPS, n) * C + (tile % (C // 64)) * (512 * _subtiles(GROUPS, n))
            live = ((byte_at >= 0) & (page >= 0)) != 0  # (the interpreter wants a comparison)
            if _half(GROUPS, n):
                tl.store(out, first | (second << 4), mask=live)
            else:
                tl.store(out, first, mask=live)
                tl.store(out + 512, second, mask=live)


def _check_encode(x, encoder, bands, pages, page_ids, side, offset):
    check_in("side", side, ("k", "v"))
    check_tensor("x", x, shape=(None,) * 4, dtype=FLOATS, unit_stride=True)
    batch, heads, tokens, dim = x.shape
    check_tensor("encoder", encoder, shape=(batch, heads, dim, bands.rank), dtype=torch.float32, device=x.device)
    if offset is not None:
        check_tensor("offset", offset, shape=(batch, heads, bands.rank), dtype=torch.float32, device=x.device)
    check_tensor("pages", pages, shape=(None, heads, None), dtype=torch.uint8, device=x.device)
    chunk, rest = divmod(pages.shape[2], bands.bytes)
    if rest or chunk not in CHUNKS or not pages.is_contiguous():
        raise ValueError(f"pages: expected contiguous pages of {bands.bytes} bytes a token, got {list(pages.shape)}")
    if tokens % chunk:
        raise ValueError(f"x: expected a multiple of C = {chunk} tokens, got {tokens}")
    check_tensor("page_ids", page_ids, shape=(batch, tokens // chunk), dtype=torch.int32, device=x.device)
    return chunk


def encode(
    x: torch.Tensor,
    encoder: torch.Tensor,
    bands: Bands,
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    *,
    side: str,
    offset: torch.Tensor | None = None,
) -> None:
    """Project rows on a basis, quantise and pack them into pages.

    Args:
        x: [B, G, T, D] phase-aligned keys or values, fp16, bf16 or fp32; T a multiple of C; last dimension of stride 1.
        encoder: float32 [B, G, D, R]: x @ encoder is in units of the quantiser's steps (`fit_side`).
        bands: of the side.
        pages: uint8 k_pages or v_pages [P, G, C * bytes], contiguous; written in place.
        page_ids: int32 [B, T/C], page of each chunk, no page twice; negative: the chunk is left out.
        side: "k" or "v": the order of the bytes.
        offset: float32 [B, G, R] to subtract from the coefficients (what a mean row has of them), or None.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    Float32 arithmetic; of bf16 rows the encoder counts to 16 bits (two bf16 parts), of fp16 rows to 22: a code at the
    boundary of two may be either. Codes as in pages.py.
    """
    chunk = _check_encode(x, encoder, bands, pages, page_ids, side, offset)
    if not _launch.runs_kernel(x):
        return encode_torch(x, encoder, bands, pages, page_ids, side=side, offset=offset)
    batch, heads, tokens, dim = x.shape
    if x.numel() == 0:
        return None
    matrix = _launch.has_matrix_units(x.device)
    encoder = encoder.contiguous()
    offset = None if offset is None else offset.contiguous()
    # The encoder of D = 256 would not fit in the shared memory of every card.
    if matrix and x.dtype != torch.float32 and dim <= 128 and not bands.is_float:
        _encode_16(x, encoder, offset, bands, pages, page_ids, chunk, side)
        return None
    with torch.cuda.device_of(x):
        _encode_kernel[(tokens // 64, heads, batch)](
            x,
            encoder,
            offset,
            page_ids,
            pages,
            heads,
            *x.stride()[:3],
            page_ids.stride(0),
            C=chunk,
            D=dim,
            R=bands.rank,
            BYTES=bands.bytes,
            GROUPS=bands.groups,
            IS_K=side == "k",
            IS_FLOAT=bands.is_float,
            BLOCK_K=32 if matrix else 8,
            MATRIX=matrix,
            num_warps=4,
        )
    return None


def _encode_16(
    x: torch.Tensor,
    encoder: torch.Tensor,
    offset: torch.Tensor | None,
    bands: Bands,
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    chunk: int,
    side: str,
) -> None:
    """Launch `_encode_matrix_kernel`; arguments as checked by `encode`."""
    batch, heads, tokens, dim = x.shape
    ranks = {bits: rank for rank, bits in bands.bands}
    tiles = tokens // 64
    # Two blocks a multiprocessor: more would only read the encoder more often.
    blocks = 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    each = _launch.cdiv(tiles * heads * batch, blocks)
    large = _launch.has_large_shared_memory(x.device)
    with torch.cuda.device_of(x):
        _encode_matrix_kernel[(_launch.cdiv(tiles, each), heads, batch)](
            x,
            encoder,
            offset,
            page_ids,
            pages,
            tiles,
            each,
            heads,
            *x.stride()[:3],
            page_ids.stride(0),
            C=chunk,
            D=dim,
            R=bands.rank,
            R8=ranks.get(8, 0),
            R4=ranks.get(4, 0),
            BYTES=bands.bytes,
            GROUPS=bands.groups,
            IS_K=side == "k",
            BLOCK_D=_launch.next_power_of_2(dim),
            BLOCK_R=_launch.next_power_of_2(bands.rank),
            NATIVE=_launch.is_native(x),
            # A third stage takes 113 KB at D = 128, and a fifth off an H200's time. Elsewhere four warps spill in the loop.
            num_warps=4 if large else 8,
            num_stages=3 if large else 2,
        )


def encode_torch(
    x: torch.Tensor,
    encoder: torch.Tensor,
    bands: Bands,
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    *,
    side: str,
    offset: torch.Tensor | None = None,
) -> None:
    """`encode` in plain PyTorch."""
    chunk = _check_encode(x, encoder, bands, pages, page_ids, side, offset)
    values = x.float() @ encoder
    values = (
        (values if offset is None else values - offset[:, :, None]).unflatten(2, (-1, chunk)).transpose(1, 2)
    )  # [B, chunks, G, C, R]
    keep = page_ids >= 0
    pages[page_ids[keep].long()] = pack_pages(values[keep], bands, side=side)


@triton.jit(do_not_specialize=["max_chunks", "stride_pages_b", "stride_segments_b"])
def _decode_kernel(
    pages_ptr,
    basis_ptr,
    scale_ptr,
    page_table_ptr,
    segment_table_ptr,
    lengths_ptr,
    out_ptr,
    max_chunks,
    G,
    stride_pages_b,
    stride_segments_b,
    C: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    ALIGN: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
    IS_K: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MATRIX: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """32 tokens (a sub-tile), BLOCK_D dimensions of one chunk of one row and head: unpack and multiply by the basis."""
    blocks_d = tl.cdiv(D, BLOCK_D)
    tile = tl.program_id(0) // blocks_d
    chunk = tile // (C // 32)
    sub = tile % (C // 32)
    t = tl.arange(0, 32)
    token = sub // 2 * 64 + _token_of(t, sub % 2, IS_K)
    column = tl.arange(0, 16)
    d = (tl.program_id(0) % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    g = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + b)
    live = chunk * C + token < length
    x = tl.zeros([BLOCK_D, 32], dtype=tl.float32)
    if chunk * C < length:
        page_ptr = pages_ptr + (tl.load(page_table_ptr + b * stride_pages_b + chunk).to(tl.int64) * G + g) * (C * BYTES)
        basis_row = (tl.load(segment_table_ptr + b * stride_segments_b + chunk * C // ALIGN).to(tl.int64) * G + g) * R
        if IS_FLOAT:
            for n in tl.static_range(R // 16):
                r = n * 16 + column
                at = token[None, :] * R + r[:, None]
                if not IS_K:
                    at = r[:, None] * C + token[None, :]
                c = tl.load(page_ptr.to(tl.pointer_type(tl.float16)) + at, mask=live[None, :], other=0.0).to(tl.float32)
                x += _rebuilt(c, basis_ptr, scale_ptr, basis_row, r, d, D, MATRIX, NATIVE)
        else:
            at = _byte_of(t[None, :], column[:, None], IS_K)
            for n in tl.static_range(len(GROUPS)):
                group_ptr = page_ptr + _group_offset(GROUPS, n) * C
                if _half(GROUPS, n):
                    byte = tl.load(group_ptr + sub // 2 * 512 + at) >> (sub % 2 * 4).to(tl.uint8)
                else:
                    byte = tl.load(group_ptr + sub * 512 + at)
                for f in tl.static_range(_fields(GROUPS, n)):
                    r = (_first_block(GROUPS, n) + f) * 16 + column
                    c = _masked(byte, _mask(GROUPS, _first_block(GROUPS, n) + f), 0, False).to(tl.float32)
                    c = (c + _offset(GROUPS, _first_block(GROUPS, n) + f)) * _weight(GROUPS, _first_block(GROUPS, n) + f)
                    x += _rebuilt(c, basis_ptr, scale_ptr, basis_row, r, d, D, MATRIX, NATIVE)
    out = ((b * G + g) * max_chunks + chunk) * C + token
    x = tl.where(live[None, :], x, 0.0)
    tl.store(out_ptr + out[None, :] * D + d[:, None], x, mask=(d < D)[:, None])


@triton.jit
def _rebuilt(c, basis_ptr, scale_ptr, basis_row, r, d, D: tl.constexpr, MATRIX: tl.constexpr, NATIVE: tl.constexpr):
    """What 16 components c [16, 32] of rows r add to dimensions d, float32."""
    basis = tl.load(basis_ptr + (basis_row + r)[None, :] * D + d[:, None], mask=(d < D)[:, None], other=0)
    return dot_int8_f32(basis, c * tl.load(scale_ptr + basis_row + r)[:, None], MATRIX, NATIVE)


def decode(pages: Pages, *, side: str) -> torch.Tensor:
    """Rebuild keys (phase-aligned) or values from their pages.

    Args:
        pages: cold pages with their tables and lengths.      side: "k" or "v".
    Returns:
        float32 [B, G, max_chunks * C, D], contiguous, by position; zeros from a row's length on. Skip bits are not looked
        at. Float32 arithmetic.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    if not isinstance(pages, Pages):
        raise TypeError(f"pages: expected Pages, got {type(pages).__name__}")
    check_in("side", side, ("k", "v"))
    data = pages.k_pages if side == "k" else pages.v_pages
    if not _launch.runs_kernel(data):
        return decode_torch(pages, side=side)
    bands = pages.layout.k if side == "k" else pages.layout.v
    batch, chunks = pages.page_table.shape
    chunk, dim, heads = pages.layout.chunk, pages.layout.head_dim, pages.kv_heads
    out = torch.empty((batch, heads, chunks * chunk, dim), dtype=torch.float32, device=data.device)
    if out.numel() == 0:
        return out
    matrix = _launch.has_matrix_units(data.device)
    block_d = 64 if matrix else 16
    with torch.cuda.device_of(data):
        _decode_kernel[(chunks * chunk // 32 * _launch.cdiv(dim, block_d), heads, batch)](
            data,
            pages.k_basis if side == "k" else pages.v_basis,
            pages.k_scale if side == "k" else pages.v_scale,
            pages.page_table,
            pages.segment_table,
            pages.lengths,
            out,
            chunks,
            heads,
            pages.page_table.stride(0),
            pages.segment_table.stride(0),
            C=chunk,
            D=dim,
            R=bands.rank,
            ALIGN=pages.layout.align,
            BYTES=bands.bytes,
            GROUPS=bands.groups,
            IS_K=side == "k",
            IS_FLOAT=bands.is_float,
            BLOCK_D=block_d,
            MATRIX=matrix,
            NATIVE=_launch.is_native(data),
            num_warps=4,
        )
    return out


def decode_torch(pages: Pages, *, side: str) -> torch.Tensor:
    """`decode` in plain PyTorch."""
    layout, chunk = pages.layout, pages.layout.chunk
    k = side == "k"
    index = torch.arange(pages.max_chunks * chunk, device=pages.lengths.device)
    live = index < pages.lengths[:, None]  # [B, T]
    table = torch.where(live[:, ::chunk], pages.page_table, 0).long()
    segments = torch.where(live[:, ::chunk], pages.segment_table_by_chunk(), 0).long()
    data = pages.k_pages if k else pages.v_pages
    values = unpack_pages(data[table], layout.k if k else layout.v, side=side)  # [B, chunks, G, C, R]
    values = values.masked_fill(~live.unflatten(1, (-1, chunk))[:, :, None, :, None], 0.0)
    basis = (pages.k_basis if k else pages.v_basis)[segments].float()
    # A missing chunk reads segment 0, which may hold NaN.
    scale = (pages.k_scale if k else pages.v_scale)[segments].masked_fill(~live[:, ::chunk, None, None], 0.0)
    return ((values * scale[:, :, :, None]) @ basis).transpose(1, 2).flatten(2, 3).contiguous()


@triton.jit
def _difference(a_ptr, b_ptr, mask):
    """float32 less a number of any type."""
    return tl.load(a_ptr, mask=mask, other=0.0) - tl.load(b_ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def _squared_errors_kernel(
    rebuilt_ptr,  # float32 [B, G, T, D]
    x_ptr,
    weighing_ptr,  # float32 [B, G, D, D], or None
    out_ptr,  # float32 [B, G, T]
    T,
    G,
    stride_x_b,
    stride_x_g,
    stride_x_t,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_ROOT: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """BLOCK_T tokens of one row and head."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    bg = tl.program_id(1).to(tl.int64)
    x_row = x_ptr + (bg // G) * stride_x_b + (bg % G) * stride_x_g + t[:, None].to(tl.int64) * stride_x_t
    rebuilt_row = rebuilt_ptr + (bg * T + t[:, None]) * D
    total = tl.zeros([BLOCK_T], dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        e = first + tl.arange(0, BLOCK_D)[None, :]
        own = _difference(rebuilt_row + e, x_row + e, (t < T)[:, None] & (e < D))
        weighted = own
        if weighing_ptr is not None:
            weighted = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                off = _difference(rebuilt_row + d[None, :], x_row + d[None, :], (t < T)[:, None] & (d < D)[None, :])
                weighing = tl.load(weighing_ptr + (bg * D + d[:, None]) * D + e, mask=(d < D)[:, None] & (e < D), other=0.0)
                weighted += dot_f32(off, weighing, MATRIX)
        total += tl.sum(weighted * (weighted if IS_ROOT else own), 1)
    tl.store(out_ptr + bg * T + t, total, mask=t < T)


def squared_errors(
    rebuilt: torch.Tensor, x: torch.Tensor, *, metric: torch.Tensor | None = None, root: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared lengths of what rows lost, in a metric M or, if its root is given, in R R^T.

    Args:
        rebuilt: float32 [B, G, T, D] (`decode`).      x: [B, G, T, D] fp16, bf16 or fp32, last dimension of stride 1.
        metric: float32 [B, G, D, D], or None.      root: float32 [B, G, D, D], or None. With neither: the identity.
    Returns:
        float32 [B, G, T]. Float32 arithmetic.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    check_tensor("rebuilt", rebuilt, shape=(None,) * 4, dtype=torch.float32)
    check_tensor("x", x, shape=rebuilt.shape, dtype=FLOATS, device=rebuilt.device, unit_stride=True)
    batch, heads, tokens, dim = x.shape
    if metric is not None and root is not None:
        raise ValueError("root: expected None where there is a metric")
    for name, own in (("metric", metric), ("root", root)):
        if own is not None:
            check_tensor(name, own, shape=(batch, heads, dim, dim), dtype=torch.float32, device=x.device)
    if not _launch.runs_kernel(x):
        return squared_errors_torch(rebuilt, x, metric=metric, root=root)
    _launch.check_bf16("x", x)
    out = torch.empty((batch, heads, tokens), dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    weighing = metric if root is None else root
    matrix = _launch.has_matrix_units(x.device)
    block = min(64, max(16, _launch.next_power_of_2(dim))) if matrix else 16
    with torch.cuda.device_of(x):
        _squared_errors_kernel[(_launch.cdiv(tokens, 16), batch * heads)](
            rebuilt.contiguous(),
            x,
            None if weighing is None else weighing.contiguous(),
            out,
            tokens,
            heads,
            *x.stride()[:3],
            D=dim,
            BLOCK_T=16,
            BLOCK_D=block,
            IS_ROOT=root is not None,
            MATRIX=matrix,
            num_warps=4,
        )
    return out


def squared_errors_torch(
    rebuilt: torch.Tensor, x: torch.Tensor, *, metric: torch.Tensor | None = None, root: torch.Tensor | None = None
) -> torch.Tensor:
    """`squared_errors` in plain PyTorch."""
    off = rebuilt - x.float()
    if root is not None:
        return (off @ root).square().sum(-1)
    return ((off if metric is None else off @ metric) * off).sum(-1)


@triton.jit
def _coefficients_of(ptr, tile, GROUPS: tl.constexpr, i: tl.constexpr, SUB: tl.constexpr, C: tl.constexpr):
    """Block i of sub-tile SUB of a tile, as its bytes lie, in units of its steps, float32 [512]; ptr: the page."""
    GROUP: tl.constexpr = _block(GROUPS, i)[0]
    HALF: tl.constexpr = _half(GROUPS, GROUP)
    ptr += _group_offset(GROUPS, GROUP) * C + tile * (512 * _subtiles(GROUPS, GROUP)) + (0 if HALF else 512 * SUB)
    bits = _masked(tl.load(ptr + tl.arange(0, 512)), _mask(GROUPS, i), 4 * SUB if HALF else 0, False)
    return (bits.to(tl.float32) + _offset(GROUPS, i)) * _weight(GROUPS, i)


@triton.jit(do_not_specialize=["stride_ids_b"])
def _requantise_kernel(
    source_ptr,
    out_ptr,
    ratio_ptr,
    page_ids_ptr,
    G,
    stride_ids_b,
    C: tl.constexpr,
    R: tl.constexpr,
    SOURCE_BYTES: tl.constexpr,
    SOURCE_GROUPS: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
    IS_K: tl.constexpr,
):
    """A tile of 64 tokens of one page and head. A byte's place in its sub-tile is the same in all groups (pages.py)."""
    TILES: tl.constexpr = C // 64
    tile = tl.program_id(0) % TILES
    g = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    page = tl.load(page_ids_ptr + b * stride_ids_b + tl.program_id(0) // TILES).to(tl.int64)
    at = tl.arange(0, 512)
    column = at // 16 % 4 * 4 + at % 4 if IS_K else at // 8 % 2 * 8 + at // 64
    ratio_ptr += (b * G + g) * R + column
    if page >= 0:
        source_ptr += (page * G + g) * (C * SOURCE_BYTES)
        out_ptr += (page * G + g) * (C * BYTES)
        for n in tl.static_range(len(GROUPS)):
            tile_ptr = out_ptr + _group_offset(GROUPS, n) * C + tile * (512 * _subtiles(GROUPS, n)) + at
            both = tl.zeros([512], dtype=tl.int32)
            for sub in tl.static_range(2):
                byte = tl.zeros([512], dtype=tl.int32)
                for f in tl.static_range(_fields(GROUPS, n)):
                    c = _coefficients_of(source_ptr, tile, SOURCE_GROUPS, _first_block(GROUPS, n) + f, sub, C)
                    c *= tl.load(ratio_ptr + (_first_block(GROUPS, n) + f) * 16)
                    byte |= _stored(c, GROUPS, _first_block(GROUPS, n) + f)
                if _half(GROUPS, n):
                    both |= byte << (4 * sub)
                else:
                    tl.store(tile_ptr + sub * 512, byte.to(tl.uint8))
            if _half(GROUPS, n):
                tl.store(tile_ptr, both.to(tl.uint8))


def _check_requantise(source, source_bands, pages, bands, ratio, page_ids, side):
    check_in("side", side, ("k", "v"))
    check_tensor("source", source, shape=(None, None, None), dtype=torch.uint8)
    count, heads, size = source.shape
    check_tensor("pages", pages, shape=(count, heads, None), dtype=torch.uint8, device=source.device)
    check_tensor("page_ids", page_ids, shape=(None, None), dtype=torch.int32, device=source.device, unit_stride=True)
    batch = page_ids.shape[0]
    check_tensor("ratio", ratio, shape=(batch, heads, bands.rank), dtype=torch.float32, device=source.device)
    if source_bands.is_float or bands.is_float or bands.rank > source_bands.rank:
        raise ValueError(f"bands: expected integers, a rank of at most that of {source_bands}, got {bands}")
    chunk = size // source_bands.bytes
    for name, x, own in (("source", source, source_bands), ("pages", pages, bands)):
        if chunk not in CHUNKS or x.shape[2] != chunk * own.bytes or not x.is_contiguous():
            raise ValueError(f"{name}: expected contiguous pages of {own.bytes} bytes a token, got {list(x.shape)}")
    return chunk


def requantise(
    source: torch.Tensor,
    source_bands: Bands,
    pages: torch.Tensor,
    bands: Bands,
    ratio: torch.Tensor,
    page_ids: torch.Tensor,
    *,
    side: str,
) -> None:
    """Write pages anew in other bands: the coefficients that pages hold, in other steps, rounded as `encode` does.

    Where a step is a whole number of old ones (`Spectrum`), that gives the codes of the tokens themselves.

    Args:
        source: uint8 [P, G, C * bytes], k_pages or v_pages in `source_bands`, contiguous.
        pages: uint8 [P, G, C * bytes], likewise in `bands`, of no higher rank; written in place.
        ratio: float32 [B, G, R], old step over new step of each component of `bands`.
        page_ids: int32 [B, N], pages of N chunks of each row, no page twice; negative: left out.
        side: "k" or "v".
    Raises:
        TypeError, ValueError: an argument is not as above, or a side is 16 bits wide; nothing was launched.
    """
    chunk = _check_requantise(source, source_bands, pages, bands, ratio, page_ids, side)
    if not _launch.runs_kernel(source):
        return requantise_torch(source, source_bands, pages, bands, ratio, page_ids, side=side)
    if page_ids.numel() == 0:
        return None
    with torch.cuda.device_of(source):
        _requantise_kernel[(page_ids.shape[1] * chunk // 64, source.shape[1], len(page_ids))](
            source,
            pages,
            ratio.contiguous(),
            page_ids,
            source.shape[1],
            page_ids.stride(0),
            C=chunk,
            R=bands.rank,
            SOURCE_BYTES=source_bands.bytes,
            SOURCE_GROUPS=source_bands.groups,
            BYTES=bands.bytes,
            GROUPS=bands.groups,
            IS_K=side == "k",
            num_warps=4,
        )
    return None


def requantise_torch(
    source: torch.Tensor,
    source_bands: Bands,
    pages: torch.Tensor,
    bands: Bands,
    ratio: torch.Tensor,
    page_ids: torch.Tensor,
    *,
    side: str,
) -> None:
    """`requantise` in plain PyTorch."""
    _check_requantise(source, source_bands, pages, bands, ratio, page_ids, side)
    keep = page_ids >= 0
    ids = page_ids[keep].long()
    values = unpack_pages(source[ids], source_bands, side=side)[..., : bands.rank]
    own = ratio[:, None].expand(-1, page_ids.shape[1], -1, -1)[keep]
    pages[ids] = pack_pages(values * own[:, :, None], bands, side=side)
