"""Attention over spectral (cold) pages and over exact phase-aligned tokens; both return the state (o, lse).

Cold.   With the projected query u of each chunk (rope.py) and the integers x of a page (pages.py; z their offsets)

    score_t = scale * sum_r (x_tr + z_r) u_r          o = sum_r v_scale_r v_basis_r (sum_t w_t (y_tr + z_r))

no key or value is rebuilt: R_K + R_V multiply-adds a token and query head, whatever D is. All sums are integer dots. The
turned query is split as  s (hi + lo/254)  with one s a head, u again once per chunk and head, the softmax weights once per
tile as  (hi + lo/127)/127  of the tile's largest weight, hi and lo int8; products accumulate exactly in int32 and are
rescaled in float32. Errors: at most s/508 an entry of the turned query and a component of u, at most 2**-15 of the tile's
largest weight in a weight. A 16-bit side uses three-product tf32 dots instead.

A program is one warp (from sm_80): the planes of a page are narrower than four warps' share of a dot, and all four would
compute the same.

Exact.  Keys are phase-aligned and unquantised; a tile of keys is turned on to its absolute position in float32.

Keys are split over programs (grid from capacity, lengths read on the device); the splits' states are joined by
`merge_many_states`, in a fixed order: the same inputs and settings give the same bits.

Source: Dao et al., FlashAttention (2022), section 3; Flash-Decoding (split keys).
Oracle: reference/attention.py.   Test: tests/test_attention.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import _launch
from ._checks import FLOATS, check_in, check_output, check_tensor
from ._launch import cos_sin, dot_f32, dot_int8_f32
from .merge import merge_many_states
from .pages import CHUNKS, HEAD_DIMS, Pages, unpack_pages
from .rope import Rope, _cos_sin_torch, _turn_torch, check_queries, project_queries_torch, projected_query

LOG2_E = math.log2(math.e)
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves the rounded integer in a float's low bits


@triton.constexpr_function
def _first(groups, n):
    """First component of group n."""
    return groups[n][0]


@triton.constexpr_function
def _fields(groups, n):
    """Bits of each field of group n."""
    return groups[n][1]


@triton.constexpr_function
def _shift(groups, n, f):
    """Lowest bit of field f of group n."""
    return sum(groups[n][1][:f])


@triton.constexpr_function
def _half(groups, n):
    """Whether group n holds two tokens a byte (pages.is_half)."""
    return sum(groups[n][1]) <= 4


@triton.constexpr_function
def _subtiles(groups, n):
    """Sub-tiles of 512 bytes in a tile of group n."""
    return 1 if sum(groups[n][1]) <= 4 else 2


@triton.constexpr_function
def _group_offset(groups, n):
    """Bytes a token of the groups before n: all are full."""
    return 16 * n


@triton.jit
def _field(x, SHIFT: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """BITS bits from SHIFT of every byte as int8; four bytes an instruction where inline assembly is to be had."""
    if BITS == 8:
        y = x.to(tl.int8, bitcast=True)
    elif NATIVE:
        if BITS == 4:
            if SHIFT == 0:
                y = tl.inline_asm_elementwise("and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", [x], tl.int8, True, 4)
            else:
                y = tl.inline_asm_elementwise(
                    "{ .reg .b32 t; shr.b32 t, $1, 4; and.b32 $0, t, 0x0F0F0F0F; }", "=r,r", [x], tl.int8, True, 4
                )
        else:
            if SHIFT == 0:
                y = tl.inline_asm_elementwise("and.b32 $0, $1, 0x03030303;", "=r,r", [x], tl.int8, True, 4)
            elif SHIFT == 2:
                y = tl.inline_asm_elementwise(
                    "{ .reg .b32 t; shr.b32 t, $1, 2; and.b32 $0, t, 0x03030303; }", "=r,r", [x], tl.int8, True, 4
                )
            elif SHIFT == 4:
                y = tl.inline_asm_elementwise(
                    "{ .reg .b32 t; shr.b32 t, $1, 4; and.b32 $0, t, 0x03030303; }", "=r,r", [x], tl.int8, True, 4
                )
            else:
                y = tl.inline_asm_elementwise(
                    "{ .reg .b32 t; shr.b32 t, $1, 6; and.b32 $0, t, 0x03030303; }", "=r,r", [x], tl.int8, True, 4
                )
    else:
        y = ((x >> SHIFT) & ((1 << BITS) - 1)).to(tl.int8)
    return y


# Pages hold operand fragments (pages.py): these views move no data between the threads of a warp.


@triton.jit
def _k_columns(ptr, SUBTILES: tl.constexpr):
    """Bytes [32 SUBTILES tokens, 16 columns] of a tile of a K group."""
    x = tl.load(ptr + tl.arange(0, 512 * SUBTILES))
    x = tl.permute(tl.reshape(x, [SUBTILES, 8, 4, 4, 4]), [0, 3, 1, 2, 4])
    return tl.reshape(x, [32 * SUBTILES, 16])


@triton.jit
def _v_columns(ptr, SUBTILES: tl.constexpr):
    """Bytes [16 columns, 32 SUBTILES tokens] of a tile of a V group."""
    x = tl.load(ptr + tl.arange(0, 512 * SUBTILES))
    x = tl.permute(tl.reshape(x, [SUBTILES, 8, 4, 2, 8]), [3, 1, 0, 2, 4])
    return tl.reshape(x, [16, 32 * SUBTILES])


@triton.jit
def _k_block(x, HALF: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """One block of components of 64 tokens, int8 [64, 16]."""
    y = _field(x, SHIFT, BITS, NATIVE)
    if HALF:
        y = tl.reshape(tl.permute(tl.join(y, _field(x, SHIFT + 4, BITS, NATIVE)), [2, 0, 1]), [64, 16])
    return y


@triton.jit
def _v_block(x, HALF: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """One block of components of 64 tokens, int8 [16, 64]."""
    y = _field(x, SHIFT, BITS, NATIVE)
    if HALF:
        y = tl.reshape(tl.permute(tl.join(y, _field(x, SHIFT + 4, BITS, NATIVE)), [0, 2, 1]), [16, 64])
    return y


@triton.jit
def _side_by_side(x, y):
    """Two blocks [64, 16] as [64, 32]: columns 8t + b of x for b < 4, of y for b >= 4. `_split_query_kernel` stores u so"""
    x = tl.join(tl.reshape(x, [64, 4, 4]), tl.reshape(y, [64, 4, 4]))
    return tl.reshape(tl.permute(x, [0, 1, 3, 2]), [64, 32])


@triton.jit
def _u_operand(ptr, N: tl.constexpr):
    """The projected queries of two blocks, int8 [32, N], in the order of `_side_by_side`."""
    x = tl.reshape(tl.load(ptr + tl.arange(0, 32 * N)), [N, 32])
    return tl.permute(x, [1, 0])


@triton.jit
def _dot_int8(a, b, MATRIX: tl.constexpr):
    """a [M, K] @ b [K, N], int8 to int32, exact."""
    if MATRIX:
        out = tl.dot(a, b, out_dtype=tl.int32)
    else:
        out = tl.sum(a.to(tl.int32)[:, :, None] * b.to(tl.int32)[None, :, :], 1)
    return out


@triton.jit
def _split_int8(x, FINER: tl.constexpr):
    """x in [-127, 127] as hi + lo/FINER, by rounding to nearest: int32 whose low bytes are hi and lo, and that value."""
    shifted = x + _MAGIC
    hi = shifted - _MAGIC
    finer = (x - hi) * FINER + _MAGIC
    value = hi + (finer - _MAGIC) * (1.0 / FINER)
    return shifted.to(tl.int32, bitcast=True), finer.to(tl.int32, bitcast=True), value


@triton.jit
def _offset_of(r, R8: tl.constexpr, R4: tl.constexpr, IS_FLOAT: tl.constexpr):
    """What is added to a stored integer: +1/2 (8 bits), -15/2 (4), -3/2 (2), by component."""
    if IS_FLOAT:
        z = tl.zeros(r.shape, dtype=tl.float32)
    else:
        z = tl.where(r < R8, 0.5, tl.where(r < R8 + R4, -7.5, -1.5))
    return z


@triton.jit(do_not_specialize=["max_chunks", "Q", "stride_segments_b"])
def _split_query_kernel(
    q_ptr,
    positions_ptr,
    turns_ptr,
    basis_ptr,
    scale_ptr,
    segment_table_ptr,
    lengths_ptr,
    u_ptr,
    u_scale_ptr,
    u_bias_ptr,
    max_chunks,
    Q,
    G,
    softmax_scale,
    rotary_scale,
    stride_q_b,
    stride_q_h,
    stride_q_q,
    stride_positions_b,
    stride_segments_b,
    HG: tl.constexpr,
    HG_PAD: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    R: tl.constexpr,
    STEPS: tl.constexpr,
    R8: tl.constexpr,
    R4: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    MATRIX: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """The projected queries of CHUNKS chunks and one KV head, as the attention kernel reads them, in log2 units.

    u [B*Q, G, max_chunks, ceil(R/32), 2 HG_PAD, 32] int8: columns (head, hi or lo), 32 components in the order of
    `_side_by_side`; with scale and bias (sum of u z) [B*Q, G, max_chunks, HG].
    A 16-bit side: u [B*Q, G, max_chunks, HG, R] float32.
    """
    M: tl.constexpr = CHUNKS * HG_PAD
    first = tl.program_id(0) * CHUNKS
    g = tl.program_id(1).to(tl.int64)
    bq = tl.program_id(2).to(tl.int64)
    b = bq // Q
    length = tl.load(lengths_ptr + b)
    if first * C < length:
        column = tl.arange(0, M)
        chunk = first + column // HG_PAD
        h = column % HG_PAD
        live = (h < HG) & (chunk * C < length)
        position = tl.load(positions_ptr + b * stride_positions_b + bq % Q).to(tl.int64)
        distance = position - chunk.to(tl.int64) * C
        q_ptr += b * stride_q_b + (bq % Q) * stride_q_q
        offset = (g * HG + h) * stride_q_h
        segments = tl.load(segment_table_ptr + b * stride_segments_b + chunk, mask=live, other=0)
        at = tl.arange(0, BLOCK_R)
        r = at
        if not IS_FLOAT:
            r = at // 32 * 32 + at % 8 // 4 * 16 + at % 32 // 8 * 4 + at % 4
            # The largest magnitude that a turned query can have: one scale for its int8 parts at any distance.
            largest = tl.zeros([M], dtype=tl.float32)
            for start in range(0, PAIRS, BLOCK_K):
                i = start + tl.arange(0, BLOCK_K)
                mask = (i < PAIRS)[:, None] & live[None, :]
                q1 = tl.load(q_ptr + offset[None, :] + i[:, None], mask=mask, other=0.0).to(tl.float32) * rotary_scale
                q2 = tl.load(q_ptr + offset[None, :] + PAIRS + i[:, None], mask=mask, other=0.0).to(tl.float32)
                q2 *= rotary_scale
                largest = tl.maximum(largest, tl.max(tl.sqrt(q1 * q1 + q2 * q2), 0))
            for start in range(2 * PAIRS, D, BLOCK_K):
                i = start + tl.arange(0, BLOCK_K)
                mask = (i < D)[:, None] & live[None, :]
                q1 = tl.load(q_ptr + offset[None, :] + i[:, None], mask=mask, other=0.0).to(tl.float32)
                largest = tl.maximum(largest, tl.max(tl.abs(q1), 0))
            q_step = tl.where(largest > 0.0, largest * (1.0 / 126.9), 1.0)  # 126.9: sine and cosine may exceed 1 by 2**-20
        # A segment seldom ends inside a block: project on the first one, and again on each other that occurs.
        u = tl.zeros([BLOCK_R, M], dtype=tl.float32)
        low = tl.min(tl.where(live, segments, 2147483647), 0)
        high = tl.max(tl.where(live, segments, -1), 0)
        while low <= high:
            mine = live & (segments == low)
            basis = basis_ptr + (low.to(tl.int64) * G + g) * R * D
            if IS_FLOAT:
                one = projected_query(
                    q_ptr, turns_ptr, basis, distance, offset, mine, rotary_scale,
                    D, PAIRS, R, BLOCK_R, BLOCK_K, M, MATRIX, NATIVE,
                )  # fmt: skip
            else:
                hi = tl.zeros([BLOCK_R, M], dtype=tl.int32)
                lo = tl.zeros([BLOCK_R, M], dtype=tl.int32)
                inverse = (1.0 / q_step)[None, :]
                for start in range(0, PAIRS, BLOCK_K):
                    i = start + tl.arange(0, BLOCK_K)
                    in_pairs = i < PAIRS
                    mask = in_pairs[:, None] & mine[None, :]
                    q1 = tl.load(q_ptr + offset[None, :] + i[:, None], mask=mask, other=0.0).to(tl.float32)
                    q2 = tl.load(q_ptr + offset[None, :] + PAIRS + i[:, None], mask=mask, other=0.0).to(tl.float32)
                    q1 *= rotary_scale * inverse
                    q2 *= rotary_scale * inverse
                    turns = tl.load(turns_ptr + i, mask=in_pairs, other=0)
                    cos, sin = cos_sin(distance[None, :], turns[:, None], NATIVE)  # [BLOCK_K, M]
                    basis_mask = (r < R)[:, None] & in_pairs[None, :]
                    b1 = tl.load(basis + r[:, None] * D + i[None, :], mask=basis_mask, other=0)
                    b2 = tl.load(basis + r[:, None] * D + PAIRS + i[None, :], mask=basis_mask, other=0)
                    a_hi, a_lo, _ = _split_int8(q1 * cos - q2 * sin, 254.0)
                    hi += _dot_int8(b1, a_hi.to(tl.int8), MATRIX)
                    lo += _dot_int8(b1, a_lo.to(tl.int8), MATRIX)
                    a_hi, a_lo, _ = _split_int8(q1 * sin + q2 * cos, 254.0)
                    hi += _dot_int8(b2, a_hi.to(tl.int8), MATRIX)
                    lo += _dot_int8(b2, a_lo.to(tl.int8), MATRIX)
                for start in range(2 * PAIRS, D, BLOCK_K):
                    i = start + tl.arange(0, BLOCK_K)
                    mask = (i < D)[:, None] & mine[None, :]
                    q1 = tl.load(q_ptr + offset[None, :] + i[:, None], mask=mask, other=0.0).to(tl.float32)
                    b1 = tl.load(basis + r[:, None] * D + i[None, :], mask=(r < R)[:, None] & (i < D)[None, :], other=0)
                    a_hi, a_lo, _ = _split_int8(q1 * inverse, 254.0)
                    hi += _dot_int8(b1, a_hi.to(tl.int8), MATRIX)
                    lo += _dot_int8(b1, a_lo.to(tl.int8), MATRIX)
                one = (hi.to(tl.float32) + lo.to(tl.float32) * (1.0 / 254.0)) * q_step[None, :]
            scale = tl.load(scale_ptr + (low.to(tl.int64) * G + g) * R + r, mask=r < R, other=0.0) * softmax_scale
            u = tl.where(mine[None, :], one * scale[:, None], u)
            low = tl.min(tl.where(live & (segments > low), segments, 2147483647), 0)
        row = (bq * G + g) * max_chunks + chunk
        out = row * HG + h
        if IS_FLOAT:
            tl.store(u_ptr + out[None, :] * R + r[:, None], u, mask=live[None, :] & (r < R)[:, None])
        else:
            step = tl.max(tl.abs(u), 0) * (1.0 / 127.0)
            step = tl.where(step > 0.0, step, 1.0)
            u_hi, u_lo, value = _split_int8(u / step[None, :], 254.0)
            # Columns of heads that pad the operand are written too: zeros, as their queries were read.
            inside = (chunk * C < length) & (h < HG_PAD)
            mask = inside[None, :] & (at < STEPS * 32)[:, None]
            u_at = (row[None, :] * STEPS + (at // 32)[:, None]) * (64 * HG_PAD) + (h * 64)[None, :] + (at % 32)[:, None]
            tl.store(u_ptr + u_at, u_hi.to(tl.int8), mask=mask)
            tl.store(u_ptr + u_at + 32, u_lo.to(tl.int8), mask=mask)
            bias = tl.sum(value * _offset_of(r, R8, R4, IS_FLOAT)[:, None], 0) * step
            tl.store(u_scale_ptr + out, step, mask=live)
            tl.store(u_bias_ptr + out, bias, mask=live)


@triton.jit(do_not_specialize=["max_chunks", "Q", "splits", "stride_pages_b", "stride_segments_b"])
def _attend_spectral_kernel(
    k_ptr,
    v_ptr,
    skip_ptr,
    u_ptr,
    u_scale_ptr,
    u_bias_ptr,
    basis_ptr,
    scale_ptr,
    page_table_ptr,
    segment_table_ptr,
    lengths_ptr,
    o_ptr,
    lse_ptr,
    max_chunks,
    splits,
    Q,
    G,
    stride_pages_b,
    stride_segments_b,
    HG: tl.constexpr,
    HG_PAD: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RK: tl.constexpr,
    RV: tl.constexpr,
    V8: tl.constexpr,
    V4: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
    K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    K_FLOAT: tl.constexpr,
    V_FLOAT: tl.constexpr,
    RUN: tl.constexpr,
    MATRIX: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One split of the chunks of one row, query and KV head: its state over all heads of the group."""
    TILES: tl.constexpr = C // 64
    N: tl.constexpr = 2 * HG_PAD
    STEPS: tl.constexpr = (RK + 31) // 32
    split = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    bq = tl.program_id(2).to(tl.int64)
    b = bq // Q
    length = tl.load(lengths_ptr + b)
    chunks = tl.cdiv(length, C)
    each = tl.cdiv(chunks, splits)
    chunk = split * each
    end = tl.minimum(chunk + each, chunks)
    page_table_ptr += b * stride_pages_b
    segment_table_ptr += b * stride_segments_b
    u_row = (bq * G + g) * max_chunks

    t = tl.arange(0, 64)
    h = tl.arange(0, HG_PAD)
    i16 = tl.arange(0, 16)
    out = (((b * G + g) * HG + h) * Q + bq % Q) * splits + split  # [HG_PAD], row of the split's state
    m_all = tl.full([HG_PAD], float("-inf"), dtype=tl.float32)
    l_all = tl.zeros([HG_PAD], dtype=tl.float32)
    while chunk < end:
        # A run of chunks that share a segment: its V basis is applied once, at its end.
        segment = tl.load(segment_table_ptr + chunk)
        i = tl.arange(0, RUN)
        others = tl.load(segment_table_ptr + chunk + i, mask=chunk + i < end, other=-1) != segment
        run = tl.min(tl.where(others, i, RUN), 0)
        m = tl.full([HG_PAD], float("-inf"), dtype=tl.float32)
        l = tl.zeros([HG_PAD], dtype=tl.float32)
        w_sum = tl.zeros([HG_PAD], dtype=tl.float32)
        acc = ()
        for _ in tl.static_range(RV // 16):
            acc = acc + (tl.zeros([16, HG_PAD], dtype=tl.float32),)
        for tile in range(chunk * TILES, (chunk + run) * TILES):
            j = tile // TILES
            part = tile % TILES  # of the page
            page = tl.load(page_table_ptr + j).to(tl.int64) * G + g
            if K_FLOAT:
                s = tl.zeros([64, HG_PAD], dtype=tl.float32)
                k_half_ptr = (k_ptr + page * (C * K_BYTES)).to(tl.pointer_type(tl.float16))
                u_float_ptr = u_ptr.to(tl.pointer_type(tl.float32)) + (u_row + j) * (HG * RK)
                for start in tl.static_range(0, RK, 16):
                    k = tl.load(k_half_ptr + (part * 64 + t)[:, None] * RK + (start + i16)[None, :])
                    u = tl.load(u_float_ptr + h[None, :] * RK + (start + i16)[:, None], mask=(h < HG)[None, :], other=0.0)
                    s += dot_f32(k.to(tl.float32), u, MATRIX)
            else:
                blocks = ()
                for n in tl.static_range(len(K_GROUPS)):
                    k_group_ptr = k_ptr + page * (C * K_BYTES) + _group_offset(K_GROUPS, n) * C
                    x = _k_columns(k_group_ptr + part * (512 * _subtiles(K_GROUPS, n)), _subtiles(K_GROUPS, n))
                    for f in tl.static_range(len(_fields(K_GROUPS, n))):
                        blocks = blocks + (
                            _k_block(x, _half(K_GROUPS, n), _shift(K_GROUPS, n, f), _fields(K_GROUPS, n)[f], NATIVE),
                        )
                if RK % 32:
                    blocks = blocks + (tl.zeros([64, 16], dtype=tl.int8),)
                dots = tl.zeros([64, N], dtype=tl.int32)
                for step in tl.static_range(STEPS):
                    u = _u_operand(u_ptr + ((u_row + j) * STEPS + step) * (32 * N), N)
                    dots += _dot_int8(_side_by_side(blocks[2 * step], blocks[2 * step + 1]), u, MATRIX)
                hi, lo = tl.split(tl.reshape(dots, [64, HG_PAD, 2]))
                u_scale = tl.load(u_scale_ptr + (u_row + j) * HG + h, mask=h < HG, other=0.0)
                u_bias = tl.load(u_bias_ptr + (u_row + j) * HG + h, mask=h < HG, other=0.0)
                s = (hi.to(tl.float32) + lo.to(tl.float32) * (1.0 / 254.0)) * u_scale[None, :] + u_bias[None, :]
            # Tokens kept exact elsewhere, and those past the row's length: seldom any, and one branch for all threads.
            hidden = tl.load((skip_ptr + page * (C // 32)).to(tl.pointer_type(tl.int64)) + part)
            left = length - (j * C + part * 64)
            if left < 64:
                hidden |= tl.full([], -1, dtype=tl.int64) << tl.maximum(left, 0).to(tl.int64)
            if hidden != 0:
                s = tl.where((((hidden >> t) & 1) == 0)[:, None], s, float("-inf"))  # [64, HG_PAD]
            m_tile = tl.max(s, 0)
            p = tl.exp2(s - tl.where(m_tile == float("-inf"), 0.0, m_tile)[None, :])
            m_new = tl.maximum(m, m_tile)
            top = tl.where(m_new == float("-inf"), 0.0, m_new)
            old = tl.exp2(m - top)
            new = tl.exp2(m_tile - top)
            l = l * old + tl.sum(p, 0) * new
            m = m_new
            rescaled = ()
            if V_FLOAT:
                v_half_ptr = (v_ptr + page * (C * V_BYTES)).to(tl.pointer_type(tl.float16))
                for n in tl.static_range(RV // 16):
                    v = tl.load(
                        v_half_ptr + (n * 16 + i16)[:, None] * C + (part * 64 + t)[None, :],
                        mask=(((hidden >> t) & 1) == 0)[None, :],  # weights are 0 there; what is stored may be NaN
                        other=0.0,
                    )
                    rescaled = rescaled + (acc[n] * old[None, :] + dot_f32(v.to(tl.float32), p, MATRIX) * new[None, :],)
            else:
                w_hi, w_lo, w = _split_int8(p * 127.0, 127.0)
                w_sum = w_sum * old + tl.sum(w, 0) * new
                # hi and lo as neighbouring columns of one operand; cast last (triton 3.6 fails on the other order).
                w_both = tl.reshape(tl.join(w_hi, w_lo), [64, N]).to(tl.int8)
                for n in tl.static_range(len(V_GROUPS)):
                    v_group_ptr = v_ptr + page * (C * V_BYTES) + _group_offset(V_GROUPS, n) * C
                    x = _v_columns(v_group_ptr + part * (512 * _subtiles(V_GROUPS, n)), _subtiles(V_GROUPS, n))
                    for f in tl.static_range(len(_fields(V_GROUPS, n))):
                        y = _v_block(x, _half(V_GROUPS, n), _shift(V_GROUPS, n, f), _fields(V_GROUPS, n)[f], NATIVE)
                        hi, lo = tl.split(tl.reshape(_dot_int8(y, w_both, MATRIX).to(tl.float32), [16, HG_PAD, 2]))
                        part_sum = (hi + lo * (1.0 / 127.0)) * new[None, :]
                        rescaled = rescaled + (acc[len(rescaled)] * old[None, :] + part_sum,)
            acc = rescaled
        # The run's output, coefficients times the V basis, joins that of earlier runs in global memory, a few dimensions
        # at a time: held in registers it would cost the loop above half its warps.
        m_new = tl.maximum(m_all, m)
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
        old = tl.exp2(m_all - top) * l_all
        new = tl.exp2(m - top)
        m_all = m_new
        l_all = old + new * l
        norm = tl.where(l_all > 0.0, 1.0 / l_all, 0.0)
        old *= norm
        new *= norm if V_FLOAT else norm * (1.0 / 127.0)
        basis_row = (segment.to(tl.int64) * G + g) * RV
        scaled = ()
        for n in tl.static_range(RV // 16):
            r = n * 16 + i16
            coefficient = acc[n] + _offset_of(r, V8, V4, V_FLOAT)[:, None] * w_sum[None, :]
            scaled = scaled + (coefficient * tl.load(scale_ptr + basis_row + r)[:, None] * new[None, :],)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            mask = (d < D)[:, None] & (h < HG)[None, :]
            o = tl.load(o_ptr + out[None, :] * D + d[:, None], mask=mask & (old > 0.0)[None, :], other=0.0)
            o *= old[None, :]
            for n in tl.static_range(RV // 16):
                rows = basis_ptr + (basis_row + n * 16 + i16)[None, :] * D
                basis = tl.load(rows + d[:, None], mask=(d < D)[:, None], other=0)
                o += dot_int8_f32(basis, scaled[n], MATRIX, NATIVE)
            tl.store(o_ptr + out[None, :] * D + d[:, None], o, mask=mask)
        tl.debug_barrier()  # the next run's threads read what others wrote
        chunk += run
    tl.store(lse_ptr + out, tl.where(l_all > 0.0, m_all * 0.6931471805599453 + tl.log(l_all), float("-inf")), mask=h < HG)


def _launch_settings(group: int, matrix: bool) -> dict:
    """Tile sizes and warps of `_attend_spectral_kernel` by shape and path: a pure function."""
    if matrix:  # 4: hi and lo of 4 heads are the 8 columns of a dot
        return {"HG_PAD": max(4, triton.next_power_of_2(group)), "BLOCK_D": 32, "num_warps": 1, "num_stages": 3}
    return {"HG_PAD": triton.next_power_of_2(group), "BLOCK_D": 16, "num_warps": 4, "num_stages": 1}


def count_splits(programs: int, tiles: int, device: torch.device) -> int:
    """Splits of the keys: enough programs for about eight a multiprocessor, none with less than one chunk."""
    if device.type != "cuda":
        return max(1, min(tiles, 2))
    wanted = 8 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(tiles, wanted // max(programs, 1), 64))


def _check_attention(q, positions, kv_heads, head_dim, batch, rope, scale):
    check_queries(q, positions, kv_heads, head_dim, batch, rope)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    return head_dim**-0.5 if scale is None else float(scale)


def attend_spectral(
    q: torch.Tensor,
    positions: torch.Tensor,
    pages: Pages,
    rope: Rope,
    *,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    splits: int | None = None,
    matrix_units: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries over cold pages: every token below a row's length whose skip bit is clear.

    Args:
        q: [B, H, D] or [B, H, Q, D] before RoPE, fp16, bf16 or fp32; last dimension of stride 1; H a multiple of G.
        positions: int32 or int64 [B] or [B, Q], positions of the queries. No causal mask: every cold token must lie at or
            before every query, as in a cache whose newest tokens are hot.
        pages: cold pages, tables and lengths (read on the device: lengths may change between replays of a CUDA graph).
        rope: frequencies and attention scaling.
        scale: factor of the scores, default D**-0.5.
        out, lse: float32 [B, H, (Q,) D] and [B, H, (Q,)], contiguous, written in place.
        splits: into how many runs of chunks a row is cut; default by the number of programs and the device.
        matrix_units: use `tl.dot`; default: from capability 8.0. False is the path of older cards and runs anywhere.
    Returns:
        (o, lse), float32: normalised output and natural-log log-sum-exp of the scaled scores; (0, -inf) without keys.
        Arithmetic: see the module. Deterministic for given inputs and settings.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    if not isinstance(pages, Pages):
        raise TypeError(f"pages: expected Pages, got {type(pages).__name__}")
    layout = pages.layout
    batch = pages.page_table.shape[0]
    scale = _check_attention(q, positions, pages.kv_heads, layout.head_dim, batch, rope, scale)
    check_tensor("pages.k_pages", pages.k_pages, device=q.device)
    out = check_output("out", out, q, q.shape)
    lse = check_output("lse", lse, q, q.shape[:-1])
    if splits is not None and splits < 1:
        raise ValueError(f"splits: expected at least 1, got {splits}")
    if not _launch.runs_kernel(q):
        o, total = attend_spectral_torch(q, positions, pages, rope, scale=scale)
        return out.copy_(o), lse.copy_(total)
    if q.numel() == 0 or pages.max_chunks == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    q4, positions = (q, positions) if q.dim() == 4 else (q[:, :, None], positions[:, None])
    positions = positions if positions.stride(-1) == 1 else positions.contiguous()
    _, heads, queries, dim = q4.shape
    kv_heads, group, rows, chunks = pages.kv_heads, heads // pages.kv_heads, batch * queries, pages.max_chunks
    matrix = _launch.has_matrix_units(q.device) if matrix_units is None else matrix_units
    settings = _launch_settings(group, matrix)
    splits = min(splits or count_splits(rows * kv_heads, chunks, q.device), chunks)
    if not matrix and not (layout.k.is_float or layout.v.is_float):
        from . import attention_sm75  # it takes helpers from here

        return attention_sm75.attend(q4, positions, pages, rope, scale * LOG2_E, splits, out, lse)
    ranks = {bits: rank for rank, bits in layout.k.bands}
    v_ranks = {bits: rank for rank, bits in layout.v.bands}
    u_shape = (rows, kv_heads, chunks, group, layout.k.rank)
    steps = triton.cdiv(layout.k.rank, 32)
    if layout.k.is_float:
        u = torch.empty(u_shape, dtype=torch.float32, device=q.device)
    else:
        u = torch.empty((*u_shape[:3], steps, 2 * settings["HG_PAD"], 32), dtype=torch.int8, device=q.device)
    u_scale, u_bias = torch.empty((2, *u_shape[:4]), dtype=torch.float32, device=q.device)
    o_splits = torch.empty((*q.shape[:-1], splits, dim), dtype=torch.float32, device=q.device)
    lse_splits = torch.empty((*q.shape[:-1], splits), dtype=torch.float32, device=q.device)
    chunk_block = max(1, 32 // settings["HG_PAD"]) if matrix else 1
    pairs = rope.turns.shape[0]
    with torch.cuda.device_of(q):
        _split_query_kernel[(triton.cdiv(chunks, chunk_block), kv_heads, rows)](
            q4,
            positions,
            rope.turns,
            pages.k_basis,
            pages.k_scale,
            pages.segment_table,
            pages.lengths,
            u,
            u_scale,
            u_bias,
            chunks,
            queries,
            kv_heads,
            scale * LOG2_E,
            rope.scaling**2,
            *q4.stride()[:3],
            positions.stride(0),
            pages.segment_table.stride(0),
            HG=group,
            HG_PAD=settings["HG_PAD"],
            C=layout.chunk,
            D=dim,
            PAIRS=pairs,
            R=layout.k.rank,
            STEPS=steps,
            R8=ranks.get(8, 0),
            R4=ranks.get(4, 0),
            IS_FLOAT=layout.k.is_float,
            BLOCK_R=triton.next_power_of_2(32 * steps),
            BLOCK_K=min(max(triton.next_power_of_2(pairs), 32), 64) if matrix else 8,
            CHUNKS=chunk_block,
            MATRIX=matrix,
            NATIVE=_launch.is_native(q),
            num_warps=2 if layout.k.rank <= 128 else 4,
            num_stages=2 if layout.k.rank <= 128 else 1,
        )
        _attend_spectral_kernel[(splits, kv_heads, rows)](
            pages.k_pages,
            pages.v_pages,
            pages.skip,
            u,
            u_scale,
            u_bias,
            pages.v_basis,
            pages.v_scale,
            pages.page_table,
            pages.segment_table,
            pages.lengths,
            o_splits,
            lse_splits,
            chunks,
            splits,
            queries,
            kv_heads,
            pages.page_table.stride(0),
            pages.segment_table.stride(0),
            HG=group,
            C=layout.chunk,
            D=dim,
            RK=layout.k.rank,
            RV=layout.v.rank,
            V8=v_ranks.get(8, 0),
            V4=v_ranks.get(4, 0),
            K_BYTES=layout.k.bytes,
            V_BYTES=layout.v.bytes,
            K_GROUPS=layout.k.groups,
            V_GROUPS=layout.v.groups,
            K_FLOAT=layout.k.is_float,
            V_FLOAT=layout.v.is_float,
            RUN=64,
            MATRIX=matrix,
            NATIVE=_launch.is_native(q),
            **settings,
        )
        return merge_many_states(o_splits, lse_splits, out=out, out_lse=lse)


def attend_spectral_torch(
    q: torch.Tensor, positions: torch.Tensor, pages: Pages, rope: Rope, *, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_spectral` in plain PyTorch, float32: coefficients times projected queries, without int8 splitting."""
    layout, batch = pages.layout, pages.page_table.shape[0]
    scale = _check_attention(q, positions, pages.kv_heads, layout.head_dim, batch, rope, scale)
    q4, pos = (q, positions) if q.dim() == 4 else (q[:, :, None], positions[:, None])
    chunks = min(pages.max_chunks, -(-int(pages.lengths.max()) // layout.chunk)) if batch else 0
    if chunks == 0 or q.numel() == 0:
        return q.new_zeros(q.shape, dtype=torch.float32), q.new_full(q.shape[:-1], float("-inf"), dtype=torch.float32)
    index = torch.arange(chunks * layout.chunk, device=q.device)
    live = index < pages.lengths[:, None]  # [B, T]
    table = torch.where(live[:, :: layout.chunk], pages.page_table[:, :chunks], 0).long()
    segments = torch.where(live[:, :: layout.chunk], pages.segment_table[:, :chunks], 0).long()
    bits = torch.arange(32, device=q.device)
    skipped = ((pages.skip[table][..., None] >> bits) & 1).flatten(3).bool()  # [B, chunks, G, C]
    seen = live.unflatten(1, (chunks, -1))[:, :, None] & ~skipped

    # A 16-bit page may hold NaN where nothing was written or is seen.
    k = unpack_pages(pages.k_pages[table], layout.k, side="k").masked_fill(~seen[..., None], 0.0)  # [B, chunks, G, C, R]
    v = unpack_pages(pages.v_pages[table], layout.v, side="v").masked_fill(~seen[..., None], 0.0)
    u = project_queries_torch(q4, pos, pages, rope)[..., :chunks, :].unflatten(1, (pages.kv_heads, -1))
    scores = torch.einsum("bghqcr,bcgtr->bghqct", u, k) * scale
    scores = scores.masked_fill(~seen.transpose(1, 2)[:, :, None, None], float("-inf")).flatten(-2)
    lse = torch.logsumexp(scores, dim=-1)  # [B, G, H/G, Q]
    weights = (scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None]).exp().unflatten(-1, (chunks, -1))
    # A row shorter than the longest reads segment 0 for its missing chunks, which may hold NaN.
    v_scale = pages.v_scale[segments].masked_fill(~live[:, :: layout.chunk, None, None], 0.0)
    coefficients = torch.einsum("bghqct,bcgtr->bcghqr", weights, v) * v_scale[:, :, :, None, None]
    o = torch.einsum("bcghqr,bcgrd->bghqd", coefficients, pages.v_basis[segments].float())
    return o.flatten(1, 2).reshape(q.shape), lse.flatten(1, 2).reshape(q.shape[:-1])


@triton.jit(do_not_specialize=["N", "Q", "splits", "stride_key_positions_b", "stride_key_positions_g"])
def _attend_exact_kernel(
    q_ptr,
    positions_ptr,
    k_ptr,
    v_ptr,
    key_positions_ptr,
    turns_ptr,
    o_ptr,
    lse_ptr,
    N,
    splits,
    Q,
    G,
    HG,
    softmax_scale,
    rotary_scale,
    stride_q_b,
    stride_q_h,
    stride_q_q,
    stride_positions_b,
    stride_k_b,
    stride_k_g,
    stride_k_n,
    stride_v_b,
    stride_v_g,
    stride_v_n,
    stride_key_positions_b,
    stride_key_positions_g,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """One split of the keys of one row and KV head, for BLOCK_M rows, each a query and a head of the group."""
    split = tl.program_id(0)
    blocks_m = tl.cdiv(Q * HG, BLOCK_M)
    g = (tl.program_id(1) // blocks_m).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(1) % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < Q * HG
    query = (row // HG).to(tl.int64)
    head = g * HG + row % HG
    position = tl.load(positions_ptr + b * stride_positions_b + query, mask=live, other=-1).to(tl.int64)

    # The query turned to its absolute position; angles are exact modulo a turn at any position.
    i = tl.arange(0, BLOCK_PAIRS)
    turns = tl.load(turns_ptr + i, mask=i < PAIRS, other=0)
    q_row = q_ptr + b * stride_q_b + head * stride_q_h + query * stride_q_q
    mask = live[:, None] & (i < PAIRS)[None, :]
    q1 = tl.load(q_row[:, None] + i[None, :], mask=mask, other=0.0).to(tl.float32) * rotary_scale
    q2 = tl.load(q_row[:, None] + PAIRS + i[None, :], mask=mask, other=0.0).to(tl.float32) * rotary_scale
    cos, sin = cos_sin(position[:, None], turns[None, :])
    qa = (q1 * cos - q2 * sin) * softmax_scale  # [BLOCK_M, BLOCK_PAIRS]
    qb = (q1 * sin + q2 * cos) * softmax_scale
    rest = 2 * PAIRS + tl.arange(0, BLOCK_REST)
    if 2 * PAIRS < D:
        mask = live[:, None] & (rest < D)[None, :]
        qc = tl.load(q_row[:, None] + rest[None, :], mask=mask, other=0.0).to(tl.float32) * softmax_scale

    d = tl.arange(0, BLOCK_D)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    each = tl.cdiv(tl.cdiv(N, BLOCK_N), splits) * BLOCK_N
    k_ptr += b * stride_k_b + g * stride_k_g
    v_ptr += b * stride_v_b + g * stride_v_g
    key_positions_ptr += b * stride_key_positions_b + g * stride_key_positions_g
    for start in range(split * each, tl.minimum(split * each + each, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key_position = tl.load(key_positions_ptr + n, mask=n < N, other=-1).to(tl.int64)
        used = key_position >= 0  # an unused slot may hold NaN
        n = n.to(tl.int64)
        pair_mask = (i < PAIRS)[:, None] & used[None, :]
        k1 = tl.load(k_ptr + n[None, :] * stride_k_n + i[:, None], mask=pair_mask, other=0.0).to(tl.float32)
        k2 = tl.load(k_ptr + n[None, :] * stride_k_n + PAIRS + i[:, None], mask=pair_mask, other=0.0).to(tl.float32)
        k_cos, k_sin = cos_sin((key_position - key_position % C)[None, :], turns[:, None])
        s = dot_f32(qa, k1 * k_cos - k2 * k_sin, MATRIX)
        s += dot_f32(qb, k1 * k_sin + k2 * k_cos, MATRIX)
        if 2 * PAIRS < D:
            rest_mask = (rest < D)[:, None] & used[None, :]
            kc = tl.load(k_ptr + n[None, :] * stride_k_n + rest[:, None], mask=rest_mask, other=0.0).to(tl.float32)
            s += dot_f32(qc, kc, MATRIX)
        seen = used[None, :] & (key_position[None, :] <= position[:, None])
        s = tl.where(seen, s, float("-inf"))  # [BLOCK_M, BLOCK_N]
        m_new = tl.maximum(m, tl.max(s, 1))
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
        old = tl.exp2(m - top)
        p = tl.exp2(s - top[:, None])
        l = l * old + tl.sum(p, 1)
        v_mask = used[:, None] & (d < D)[None, :]
        v = tl.load(v_ptr + n[:, None] * stride_v_n + d[None, :], mask=v_mask, other=0.0).to(tl.float32)
        o = o * old[:, None] + dot_f32(p, v, MATRIX)
        m = m_new
    o *= tl.where(l > 0.0, 1.0 / l, 0.0)[:, None]
    out = ((b * (G * HG) + head) * Q + query) * splits + split
    tl.store(lse_ptr + out, tl.where(l > 0.0, m * 0.6931471805599453 + tl.log(l), float("-inf")), mask=live)
    tl.store(o_ptr + out[:, None] * D + d[None, :], o, mask=live[:, None] & (d < D)[None, :])


def _check_exact(q, positions, k, v, key_positions, rope, chunk, scale):
    check_tensor("k", k, shape=(None,) * 4, dtype=FLOATS, unit_stride=True)
    batch, kv_heads, tokens, dim = k.shape
    check_in("k: head dimension", dim, HEAD_DIMS)
    check_in("chunk", chunk, CHUNKS)
    scale = _check_attention(q, positions, kv_heads, dim, batch, rope, scale)
    check_tensor("k", k, device=q.device)
    check_tensor("v", v, shape=k.shape, dtype=FLOATS, device=q.device, unit_stride=True)
    check_tensor("key_positions", key_positions, dtype=torch.int32, device=q.device, unit_stride=True)
    if tuple(key_positions.shape) not in ((batch, tokens), (batch, kv_heads, tokens)):
        raise ValueError(
            f"key_positions: expected shape [{batch}, {tokens}] or [{batch}, {kv_heads}, {tokens}], "
            f"got {list(key_positions.shape)}"
        )
    return scale


def attend_exact(
    q: torch.Tensor,
    positions: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_positions: torch.Tensor,
    rope: Rope,
    *,
    chunk: int,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    splits: int | None = None,
    matrix_units: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of queries over exact tokens: hot window, sinks and landmarks, in any order.

    A query at position m sees the keys at positions 0 .. m.

    Args:
        q: [B, H, D] or [B, H, Q, D] before RoPE, fp16, bf16 or fp32; last dimension of stride 1; H a multiple of G.
        positions: int32 or int64 [B] or [B, Q], positions of the queries.
        k: [B, G, N, D] phase-aligned keys (`phase_align` with this chunk); last dimension of stride 1, others any.
        v: [B, G, N, D] values, likewise.
        key_positions: int32 [B, N] or [B, G, N], position of each slot; negative: an unused slot (it may hold NaN).
        rope, scale, out, lse, splits, matrix_units: as in `attend_spectral`.
        chunk: the chunk length of the phase alignment.
    Returns:
        (o, lse), float32, as `attend_spectral`. Float32 arithmetic (three-product tf32 dots).
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    scale = _check_exact(q, positions, k, v, key_positions, rope, chunk, scale)
    out = check_output("out", out, q, q.shape)
    lse = check_output("lse", lse, q, q.shape[:-1])
    if splits is not None and splits < 1:
        raise ValueError(f"splits: expected at least 1, got {splits}")
    if not _launch.runs_kernel(q):
        o, total = attend_exact_torch(q, positions, k, v, key_positions, rope, chunk=chunk, scale=scale)
        return out.copy_(o), lse.copy_(total)
    batch, kv_heads, tokens, dim = k.shape
    if q.numel() == 0 or tokens == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    q4, positions = (q, positions) if q.dim() == 4 else (q[:, :, None], positions[:, None])
    positions = positions if positions.stride(-1) == 1 else positions.contiguous()
    _, heads, queries, _ = q4.shape
    group, pairs = heads // kv_heads, rope.turns.shape[0]
    matrix = _launch.has_matrix_units(q.device) if matrix_units is None else matrix_units
    block_m = 16 if matrix else min(4, triton.next_power_of_2(group * queries))
    block_n = 32 if matrix else 16
    tiles = triton.cdiv(tokens, block_n)
    blocks_m = triton.cdiv(group * queries, block_m)
    splits = min(splits or count_splits(batch * kv_heads * blocks_m, tiles, q.device), tiles)
    key_strides = (key_positions.stride(0), key_positions.stride(1) if key_positions.dim() == 3 else 0)
    o_splits = torch.empty((*q.shape[:-1], splits, dim), dtype=torch.float32, device=q.device)
    lse_splits = torch.empty((*q.shape[:-1], splits), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _attend_exact_kernel[(splits, kv_heads * blocks_m, batch)](
            q4,
            positions,
            k,
            v,
            key_positions,
            rope.turns,
            o_splits,
            lse_splits,
            tokens,
            splits,
            queries,
            kv_heads,
            group,
            scale * LOG2_E,
            rope.scaling**2,
            *q4.stride()[:3],
            positions.stride(0),
            *k.stride()[:3],
            *v.stride()[:3],
            *key_strides,
            C=chunk,
            D=dim,
            BLOCK_D=triton.next_power_of_2(dim),
            PAIRS=pairs,
            BLOCK_PAIRS=max(16, triton.next_power_of_2(pairs)),
            BLOCK_REST=max(16, triton.next_power_of_2(dim - 2 * pairs)),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            MATRIX=matrix,
            num_warps=4,
        )
        return merge_many_states(o_splits, lse_splits, out=out, out_lse=lse)


def attend_exact_torch(
    q: torch.Tensor,
    positions: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_positions: torch.Tensor,
    rope: Rope,
    *,
    chunk: int,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_exact` in plain PyTorch, float32."""
    scale = _check_exact(q, positions, k, v, key_positions, rope, chunk, scale)
    q4, pos = (q, positions) if q.dim() == 4 else (q[:, :, None], positions[:, None])
    kv_heads = k.shape[1]
    if key_positions.dim() == 2:
        key_positions = key_positions[:, None].expand(-1, kv_heads, -1)
    used = key_positions >= 0
    starts = torch.where(used, key_positions - key_positions % chunk, 0).long()
    keys = _turn_torch(k.float().masked_fill(~used[..., None], 0.0), *_cos_sin_torch(starts, rope))
    values = v.float().masked_fill(~used[..., None], 0.0)
    scaled = q4.float()
    scaled = torch.cat((scaled[..., : rope.rotary_dim] * rope.scaling**2, scaled[..., rope.rotary_dim :]), dim=-1)
    cos, sin = _cos_sin_torch(pos.long(), rope)  # [B, Q, pairs]
    turned = _turn_torch(scaled, cos[:, None], sin[:, None]).unflatten(1, (kv_heads, -1))
    scores = torch.einsum("bghqd,bgnd->bghqn", turned, keys) * scale
    seen = used[:, :, None] & (key_positions[:, :, None] <= pos[:, None, :, None])  # [B, G, Q, N]
    scores = scores.masked_fill(~seen[:, :, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1) if k.shape[2] else scores.new_full(scores.shape[:-1], float("-inf"))
    weights = (scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None]).exp()
    o = torch.einsum("bghqn,bgnd->bghqd", weights, values)
    return o.flatten(1, 2).reshape(q.shape), lse.flatten(1, 2).reshape(q.shape[:-1])
