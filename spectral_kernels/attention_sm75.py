"""The cold path of cards before sm_80 (T4): `attend_spectral` of attention.py on int8 pages, without `tl.dot`.

Triton has no matrix units on sm_75, but the card has them: mma.sync.m8n8k16 on int8, which `_mma` writes as inline
assembly. A page holds its operands as they are (pages.py): with lane = 4 g + t of a warp

    A  [8, 16]: a lane holds row g, columns 4t .. 4t+3, an int32 word      tokens x components (K), components x tokens (V)
    B  [16, 8]: a lane holds column g, rows 4t .. 4t+3                     columns (head, hi or lo) of 4 query heads
    C  [8, 8]:  a lane holds row g, columns 2t and 2t+1                    so hi and lo of head t in one lane

Formulas, splits into hi and lo and error bounds are those of attention.py. A program is one warp and one block of 4 query
heads of a group. Tensors of operands are [..., 32], their last index the lane: indices are computed by shifts and masks,
in which Triton sees no contiguous run of lanes that it would load by one thread (tests/test_compile.py looks at the
layouts it chose).

Source: PTX ISA, matrix fragments for mma.m8n8k16.
Oracle: reference/attention.py.   Test: tests/test_attention.py ("scalar").
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch
from ._launch import cos_sin
from .attention import (
    _FULL,
    _LOG2_FULL,
    _MAGIC,
    _block,
    _fields,
    _first_block,
    _group_offset,
    _half,
    _join,
    _lse,
    _offset,
    _weight,
)
from .pages import Pages
from .rope import Rope


@triton.jit
def _mma(a, b, c0, c1, NATIVE: tl.constexpr):
    """C + A B for operands [..., 32] of int32 words (see the module): the two columns of C that a lane holds, int32."""
    if NATIVE:
        a, b = tl.broadcast(a, b)
        c0, c1 = tl.inline_asm_elementwise(
            "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {$0, $1}, {$2}, {$3}, {$4, $5};",
            "=r,=r,r,r,r,r",
            [a, b, c0, c1],
            (tl.int32, tl.int32),
            True,
            1,
        )
    else:
        a, b = tl.broadcast(a, b)
        rows = tl.reshape(a, [a.numel // 32, 8, 1, 4])
        columns = tl.reshape(b, [a.numel // 32, 1, 8, 4])
        c = tl.zeros([a.numel // 32, 8, 8], dtype=tl.int32)
        for byte in tl.static_range(4):
            c += tl.sum(((rows << (24 - 8 * byte)) >> 24) * ((columns << (24 - 8 * byte)) >> 24), 3)
        even, odd = tl.split(tl.reshape(c, [a.numel // 32, 8, 4, 2]))
        c0 += tl.reshape(even, a.shape)
        c1 += tl.reshape(odd, a.shape)
    return c0, c1


@triton.jit
def _max_over_rows(x):
    """[32] by lane: the largest x of the lanes with the same t, [4]."""
    return tl.max(tl.reshape(x, [8, 4]), 0)


@triton.jit
def _sum_over_rows(x):
    """[32] by lane: the sum of x over the lanes with the same t, [4]."""
    return tl.sum(tl.reshape(x, [8, 4]), 0)


@triton.jit
def _to_lanes(x, ROWS: tl.constexpr):
    """[4] by t to [4 ROWS] by row and t."""
    return tl.reshape(tl.broadcast_to(x[None, :], [ROWS, 4]), [4 * ROWS])


@triton.constexpr_function
def _word_mask(groups, i):
    """The bits of block i in a byte, in each byte of an int32."""
    _, _, low, bits, top = _block(groups, i)
    mask = (((1 << bits) - 1) << low) * 0x01010101
    return mask - 2**32 if top else mask


@triton.jit
def _split(x):
    """x in [-32512, 32512], rounded to nearest, as 256 hi + lo: low bytes of (hi, lo), int32, and the rounded x."""
    shifted = x + _MAGIC
    bits = shifted.to(tl.int32, bitcast=True)  # the low 16 bits are the integer + 128: hi is its high byte
    return (bits >> 8) & 255, (bits & 255) ^ 128, shifted - _MAGIC


@triton.jit
def _load_words(ptr, part, HALF: tl.constexpr):
    """Tile `part` (64 tokens) of a group of a page, as words [sub-tiles, 4, 32]: word i of each lane's 16 bytes."""
    SUBTILES: tl.constexpr = 1 if HALF else 2
    x = tl.load(ptr + part * (128 * SUBTILES) + tl.arange(0, 128 * SUBTILES))  # four words a thread
    return tl.permute(tl.reshape(x, [SUBTILES, 32, 4]), [0, 2, 1])


@triton.jit
def _block_words(x, GROUPS: tl.constexpr, i: tl.constexpr):
    """Block i of 64 tokens from the words of its group, [2, 4, 32]; its bits where they lie in a byte."""
    MASK: tl.constexpr = _word_mask(GROUPS, i)
    y = x & MASK
    if _half(GROUPS, _block(GROUPS, i)[0]):
        y = tl.reshape(tl.permute(tl.join(y, (x >> 4) & MASK), [0, 3, 1, 2]), [2, 4, 32])
    return y


@triton.constexpr_function
def _columns(D, step):
    """The dimensions of step `step` of 16: (first, distance of those of two t). Four steps share 64 dimensions, of which t
    has 16 in a row, so that a thread loads the words of four steps at once; what is left of D goes by 16."""
    return (step // 4 * 64 + step % 4 * 4, 16) if step < D // 64 * 4 else (step * 16, 4)


@triton.jit
def _four_words(ptr):
    """The four words from each of ptr [64] on, 16 bytes aligned: four [64]."""
    x = tl.load(ptr[:, None] + tl.arange(0, 4)[None, :])
    even, odd = tl.split(tl.reshape(x, [64, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit(do_not_specialize=["max_blocks", "Q", "stride_positions_b", "stride_segments_b"])
def _project_operand_kernel(
    q_ptr,
    positions_ptr,
    turns_ptr,
    basis_ptr,
    scale_ptr,
    segment_table_ptr,
    lengths_ptr,
    u_ptr,
    max_blocks,
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
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """The projected queries of one block of positions and 4 heads, in log2 units, as operands B of the attention kernel.

    u int32 [B*Q, G, max_blocks, ceil(HG/4), 32, R/16 + 2]: for each lane its word of each block of 16 components (by
    `_weight`), then the unit and the bias (sum of u times `_offset`) of head t as float32.
    """
    HEAD_BLOCKS: tl.constexpr = (HG + 3) // 4
    WORDS: tl.constexpr = R // 16 + 2
    block = tl.program_id(0) // HEAD_BLOCKS
    heads = tl.program_id(0) % HEAD_BLOCKS
    g = tl.program_id(1).to(tl.int64)
    bq = tl.program_id(2).to(tl.int64)
    b = bq // Q
    if block * ALIGN < tl.load(lengths_ptr + b):
        lane = tl.arange(0, 32)
        row = lane >> 2
        t = lane & 3
        h = heads * 4 + (row >> 1)  # of the column that a lane holds of B
        live = (h < HG)[None, :]
        byte = tl.arange(0, 4)[:, None]
        q_row = q_ptr + b * stride_q_b + (bq % Q) * stride_q_q + (g * HG + h) * stride_q_h
        position = tl.load(positions_ptr + b * stride_positions_b + bq % Q).to(tl.int64)
        distance = position - block.to(tl.int64) * ALIGN
        segment = tl.load(segment_table_ptr + b * stride_segments_b + block).to(tl.int64)

        # In units in which the longest pair is _FULL: one unit at any distance.
        largest = tl.zeros([32], dtype=tl.float32)
        for start in range(0, D, 16):
            d = start + t[None, :] * 4 + byte  # [4, 32]
            x = tl.load(q_row[None, :] + d, mask=live, other=0.0).to(tl.float32)
            other = tl.where(d < PAIRS, d + PAIRS, d - PAIRS)
            y = tl.load(q_row[None, :] + other, mask=live & (d < 2 * PAIRS), other=0.0).to(tl.float32)
            size = tl.sqrt(x * x + y * y) * tl.where(d < 2 * PAIRS, rotary_scale, 1.0)
            largest = tl.maximum(largest, tl.max(size, 0))
        largest = tl.max(tl.max(tl.reshape(largest, [4, 2, 4]), 2), 1)  # [4] by head
        full = tl.where(largest > 0.0, _FULL / largest, 0.0)
        full = tl.reshape(tl.broadcast_to(full[:, None], [4, 8]), [32])
        turned = ()
        for step in tl.static_range(D // 16):
            d = _columns(D, step)[0] + t[None, :] * _columns(D, step)[1] + byte
            x = tl.load(q_row[None, :] + d, mask=live, other=0.0).to(tl.float32)
            if _columns(D, step)[0] < 2 * PAIRS:
                turns_at = tl.where(d < PAIRS, d, d - PAIRS)
                other = tl.where(d < PAIRS, d + PAIRS, d - PAIRS)
                y = tl.load(q_row[None, :] + other, mask=live & (d < 2 * PAIRS), other=0.0).to(tl.float32)
                turns = tl.load(turns_ptr + turns_at, mask=d < 2 * PAIRS, other=0)  # no turn: cosine 1, sine 0
                cos, sin = cos_sin(distance, turns, NATIVE)
                x = x * cos + tl.where(d < PAIRS, -y, y) * sin
                x *= tl.where(d < 2 * PAIRS, rotary_scale, 1.0)
            hi, lo, _ = _split(x * full[None, :])
            turned = turned + (tl.sum(tl.where((row & 1 == 1)[None, :], lo, hi) << (byte * 8), 0),)

        # The 16 rows of a block are two operands A: 64 words in one dimension, which leave no choice of lanes.
        component = tl.arange(0, 64) >> 2
        t = tl.arange(0, 64) & 3
        basis_words = (basis_ptr + (segment * G + g) * (R * D)).to(tl.pointer_type(tl.int32))
        scale_row = scale_ptr + (segment * G + g) * R
        u = ()
        most = tl.zeros([64], dtype=tl.float32)
        for n in tl.static_range(R // 16):
            r = n * 16 + component
            hi = tl.zeros([64], dtype=tl.int32)
            lo = tl.zeros([64], dtype=tl.int32)
            rows = ()
            for step in tl.static_range(0, D // 64 * 4, 4):
                rows = rows + _four_words(basis_words + r * (D // 4) + (step * 4 + 4 * t))
            for step in tl.static_range(D // 64 * 4, D // 16):
                rows = rows + (tl.load(basis_words + r * (D // 4) + (step * 4 + t)),)
            for step in tl.static_range(D // 16):
                columns = tl.reshape(tl.broadcast_to(turned[step][None, :], [2, 32]), [64])
                hi, lo = _mma(rows[step], columns, hi, lo, NATIVE)
            one = (hi * 256 + lo).to(tl.float32) * (tl.load(scale_row + r) * (softmax_scale * _weight(GROUPS, n)))
            most = tl.maximum(most, tl.abs(one))
            u = u + (one,)
        top = tl.max(tl.reshape(most, [16, 4]), 0)  # [4], in units of 1 / full
        full = _to_lanes(tl.where(top > 0.0, _FULL / top, 0.0), 16)
        unit = top * (1.0 / _FULL) * (largest * (1.0 / _FULL))
        bias = tl.zeros([64], dtype=tl.float32)
        record = u_ptr + (((bq * G + g) * max_blocks + block) * HEAD_BLOCKS + heads) * (32 * WORDS)
        at = record.to(tl.pointer_type(tl.int8)) + (8 * t + component // 4) * (4 * WORDS) + component % 4
        for n in tl.static_range(R // 16):
            hi, lo, value = _split(u[n] * full)
            bias += value * _offset(GROUPS, n)
            tl.store(at + n * 4, hi.to(tl.int8))
            tl.store(at + n * 4 + 16 * WORDS, lo.to(tl.int8))
        bias = tl.sum(tl.reshape(bias, [16, 4]), 0) * unit
        tail = record.to(tl.pointer_type(tl.float32)) + lane * WORDS + R // 16
        tl.store(tail, _to_lanes(unit, 8))
        tl.store(tail + 1, _to_lanes(bias, 8))


@triton.jit(do_not_specialize=["max_blocks", "Q", "splits", "stride_pages_b", "stride_segments_b"])
def _attend_operands_kernel(
    k_ptr,
    v_ptr,
    skip_ptr,
    u_ptr,
    basis_ptr,
    scale_ptr,
    page_table_ptr,
    segment_table_ptr,
    lengths_ptr,
    c_ptr,
    lse_ptr,
    segment_ptr,
    o_ptr,
    o_lse_ptr,
    max_blocks,
    splits,
    Q,
    G,
    stride_pages_b,
    stride_segments_b,
    HG: tl.constexpr,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    RK: tl.constexpr,
    RV: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
    K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    RUN: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One split of the pages of one row, query and KV head, for 4 heads: the states of `_attend_spectral_kernel`."""
    HEAD_BLOCKS: tl.constexpr = (HG + 3) // 4
    WORDS: tl.constexpr = RK // 16 + 2
    TILES: tl.constexpr = C // 64
    PAGES: tl.constexpr = ALIGN // C
    split = tl.program_id(0) // HEAD_BLOCKS
    heads = tl.program_id(0) % HEAD_BLOCKS
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

    lane = tl.arange(0, 32)
    row = lane >> 2
    sub = tl.arange(0, 2)
    token = 8 * tl.arange(0, 4)[:, None] + row[None, :]  # [4, 32], of a sub-tile
    h = heads * 4 + tl.arange(0, 4)
    out = (((b * G + g) * HG + h) * Q + bq % Q) * splits + split  # [4], row of the split's state
    m_all = tl.full([4], float("-inf"), dtype=tl.float32)
    l_all = tl.zeros([4], dtype=tl.float32)
    c_row = _to_lanes(out, 8) * RV + row  # component g of head t
    live = heads * 4 + (lane & 3) < HG
    if chunk >= end:
        tl.store(lse_ptr + out, tl.full([4], float("-inf"), dtype=tl.float32), mask=h < HG)
    while chunk < end:
        # A run of blocks that share a segment.
        block = chunk // PAGES
        segment = tl.load(segment_table_ptr + block)
        i = tl.arange(0, RUN)
        others = tl.load(segment_table_ptr + block + i, mask=(block + i) * PAGES < end, other=-1) != segment
        stop = tl.minimum((block + tl.min(tl.where(others, i, RUN), 0)) * PAGES, end)
        m = tl.full([32], float("-inf"), dtype=tl.float32)  # of head t
        l = tl.zeros([32], dtype=tl.float32)  # of head t and the tokens of row g
        w_sum = tl.zeros([32], dtype=tl.float32)
        acc = ()
        for _ in tl.static_range(RV // 16):
            acc = acc + (tl.zeros([2, 32], dtype=tl.float32),)  # components g and 8 + g of a block, head t
        for tile in range(chunk * TILES, stop * TILES):
            j = tile // TILES
            part = tile % TILES  # of the page
            page = tl.load(page_table_ptr + j).to(tl.int64) * G + g
            k_words = (k_ptr + page * (C * K_BYTES)).to(tl.pointer_type(tl.int32))
            v_words = (v_ptr + page * (C * V_BYTES)).to(tl.pointer_type(tl.int32))
            record = u_ptr + (((bq * G + g) * max_blocks + j // PAGES) * HEAD_BLOCKS + heads) * (32 * WORDS) + lane * WORDS
            hi = tl.zeros([2, 4, 32], dtype=tl.int32)
            lo = tl.zeros([2, 4, 32], dtype=tl.int32)
            for n in tl.static_range(len(K_GROUPS)):
                x = _load_words(k_words + _group_offset(K_GROUPS, n) * (C // 4), part, _half(K_GROUPS, n))
                for f in tl.static_range(_fields(K_GROUPS, n)):
                    u = tl.load(record + (_first_block(K_GROUPS, n) + f))
                    y = _block_words(x, K_GROUPS, _first_block(K_GROUPS, n) + f)
                    hi, lo = _mma(y, u[None, None, :], hi, lo, NATIVE)
            unit = tl.load((record + RK // 16).to(tl.pointer_type(tl.float32)))
            bias = tl.load((record + RK // 16 + 1).to(tl.pointer_type(tl.float32)))
            s = (hi * 256 + lo).to(tl.float32) * unit[None, None, :] + bias[None, None, :]
            # Tokens kept exact elsewhere, and those past the row's length.
            skipped = tl.load(skip_ptr + page * (C // 32) + part * 2 + sub)
            left = length - (j * C + part * 64) - 32 * sub
            hidden = ((skipped[:, None, None] >> token[None, :, :]) & 1) != 0
            hidden |= token[None, :, :] >= left[:, None, None]
            s = tl.where(hidden, float("-inf"), s)  # [2, 4, 32]
            m_tile = _to_lanes(_max_over_rows(tl.max(tl.max(s, 0), 0)), 8)
            # Weights in units of 1 / _FULL of the tile's largest.
            p = tl.exp2((s - tl.where(m_tile == float("-inf"), 0.0, m_tile)[None, None, :]) + _LOG2_FULL)
            m_new = tl.maximum(m, m_tile)
            top = tl.where(m_new == float("-inf"), 0.0, m_new)
            old = tl.exp2(m - top)
            new = tl.exp2(m_tile - top)
            m = m_new
            l = l * old + tl.sum(tl.sum(p, 0), 0) * new
            w_hi, w_lo, w = _split(p)
            w_sum = w_sum * old + tl.sum(tl.sum(w, 0), 0) * new
            # Token 32 q + 8 b + 4 i + t is byte b of word q of sub-tile i: a thread has the four bytes of a word.
            byte = (8 * tl.arange(0, 4))[None, :, None]
            w_hi = tl.reshape(tl.sum(w_hi << byte, 1), [2, 2, 4, 4])  # [q, i, t, head]
            w_lo = tl.reshape(tl.sum(w_lo << byte, 1), [2, 2, 4, 4])
            w_both = tl.permute(tl.join(w_hi, w_lo), [1, 0, 3, 4, 2])
            w_both = tl.reshape(w_both, [2, 1, 2, 32])
            rescaled = ()
            for n in tl.static_range(len(V_GROUPS)):
                x = _load_words(v_words + _group_offset(V_GROUPS, n) * (C // 4), part, _half(V_GROUPS, n))
                for f in tl.static_range(_fields(V_GROUPS, n)):
                    y = _block_words(x, V_GROUPS, _first_block(V_GROUPS, n) + f)
                    y = tl.reshape(y, [2, 2, 2, 32])  # (sub-tile, half of the block, q, lane)
                    zero = tl.zeros([2, 2, 2, 32], dtype=tl.int32)
                    hi, lo = _mma(y, w_both, zero, zero, NATIVE)
                    dots = tl.sum(tl.sum(hi * 256 + lo, 2), 0)  # [2, 32]
                    rescaled = rescaled + (acc[len(rescaled)] * old[None, :] + dots.to(tl.float32) * new[None, :],)
            acc = rescaled
        # In V's basis; l and acc both count weights in units of 1 / _FULL.
        l_run = _sum_over_rows(l)
        norm = _to_lanes(tl.where(l_run > 0.0, 1.0 / l_run, 0.0), 8)
        w_run = _to_lanes(_sum_over_rows(w_sum), 8)
        m_run = _max_over_rows(m)
        basis_row = (segment.to(tl.int64) * G + g) * RV
        for n in tl.static_range(RV // 16):
            r = n * 16 + tl.arange(0, 2)[:, None] * 8
            scale = tl.load(scale_ptr + basis_row + (r + row[None, :])) * (norm * _weight(V_GROUPS, n))[None, :]
            coefficient = (acc[n] + _offset(V_GROUPS, n) * w_run[None, :]) * scale
            tl.store(c_ptr + (c_row[None, :] + r), coefficient, mask=live[None, :])
        if stop == end:
            tl.store(lse_ptr + out, _lse(m_run, l_run), mask=h < HG)
            tl.store(segment_ptr + (bq * G + g) * splits + split, segment)
        else:
            # The run's output, coefficients times the V basis, joins that of earlier runs in global memory.
            m_all, l_all, old, new = _join(m_all, l_all, m_run, l_run)
            i8 = tl.arange(0, 8)
            tl.debug_barrier()  # each thread reads coefficients that others wrote
            for start in range(0, D, 32):
                d = start + (lane & 31)  # a dimension a lane: sums over components stay in a thread
                mask = (d < D)[:, None] & (h < HG)[None, :]
                products = tl.zeros([8, 32, 4], dtype=tl.float32)
                for first in range(0, RV, 8):
                    at = c_ptr + out[None, :] * RV + (first + i8)[:, None]
                    factor = tl.load(at, mask=(h < HG)[None, :], other=0.0)
                    rows = basis_ptr + (basis_row + first + i8)[:, None] * D
                    basis = tl.load(rows + d[None, :], mask=(d < D)[None, :], other=0).to(tl.float32)
                    basis, factor = tl.broadcast(basis[:, :, None], factor[:, None, :])
                    products = tl.fma(basis, factor, products)
                o = tl.load(o_ptr + out[None, :] * D + d[:, None], mask=mask & (old > 0.0)[None, :], other=0.0)
                o = o * old[None, :] + tl.sum(products, 0) * new[None, :]
                tl.store(o_ptr + out[None, :] * D + d[:, None], o, mask=mask)
            tl.debug_barrier()  # the next run's threads read what others wrote
        chunk = stop
    tl.store(o_lse_ptr + out, _lse(m_all, l_all), mask=h < HG)


def _attend_old_cards(
    q: torch.Tensor,
    positions: torch.Tensor,
    pages: Pages,
    rope: Rope,
    softmax_scale: float,
    rotary_scale: float,
    states: tuple[torch.Tensor, ...],
) -> None:
    """What `_project_kernel` and `_attend_spectral_kernel` do in `attend_spectral`, for int8 sides.

    q [B, H, Q, D]; positions [B, Q], last stride 1; softmax_scale: of the scores in log2 units; states: c, its lse,
    segments, o and o_lse of the splits, which are written.
    """
    layout, (batch, heads, queries, dim) = pages.layout, q.shape
    kv_heads, blocks, rows = pages.kv_heads, pages.max_blocks, batch * queries
    group, splits = heads // kv_heads, states[0].shape[-2]
    head_blocks = _launch.cdiv(group, 4)
    words = layout.k.rank // 16 + 2
    u = torch.empty((rows, kv_heads, blocks, head_blocks, 32, words), dtype=torch.int32, device=q.device)
    native = _launch.is_native(q)
    _project_operand_kernel[(blocks * head_blocks, kv_heads, rows)](
        q,
        positions,
        rope.turns,
        pages.k_basis,
        pages.k_scale,
        pages.segment_table,
        pages.lengths,
        u,
        blocks,
        queries,
        kv_heads,
        softmax_scale,
        rotary_scale,
        *q.stride()[:3],
        positions.stride(0),
        pages.segment_table.stride(0),
        HG=group,
        ALIGN=layout.align,
        D=dim,
        PAIRS=rope.turns.shape[0],
        R=layout.k.rank,
        GROUPS=layout.k.groups,
        NATIVE=native,
        num_warps=1,
        num_stages=1,
    )
    _attend_operands_kernel[(splits * head_blocks, kv_heads, rows)](
        pages.k_pages,
        pages.v_pages,
        pages.skip,
        u,
        pages.v_basis,
        pages.v_scale,
        pages.page_table,
        pages.segment_table,
        pages.lengths,
        *states,
        blocks,
        splits,
        queries,
        kv_heads,
        pages.page_table.stride(0),
        pages.segment_table.stride(0),
        HG=group,
        C=layout.chunk,
        ALIGN=layout.align,
        D=dim,
        RK=layout.k.rank,
        RV=layout.v.rank,
        K_BYTES=layout.k.bytes,
        V_BYTES=layout.v.bytes,
        K_GROUPS=layout.k.groups,
        V_GROUPS=layout.v.groups,
        RUN=64,
        NATIVE=native,
        num_warps=1,
        num_stages=1,
    )
