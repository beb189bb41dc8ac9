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
from .attention import _fields, _group_offset, _half, _offset_of, _shift, _split_int8
from .merge import merge_many_states
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


@triton.jit
def _pack_bytes(x, shift):
    """The low bytes of int32 x [4, 32] as words [32], byte b from row b; shift = 8 b."""
    return tl.sum((x & 255) << shift, 0)


@triton.jit
def _load_words(ptr, part, SUB: tl.constexpr, HALF: tl.constexpr):
    """Tile `part` (32 SUB tokens) of a group of a page, as words [sub-tiles, 4, 32]: word i of each lane's 16 bytes."""
    SUBTILES: tl.constexpr = SUB // 2 if HALF else SUB
    x = tl.load(ptr + part * (128 * SUBTILES) + tl.arange(0, 128 * SUBTILES))  # four words a thread
    return tl.permute(tl.reshape(x, [SUBTILES, 32, 4]), [0, 2, 1])


@triton.jit
def _field_words(x, HALF: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """A field of each byte of x [n, 4, 32], as words of bytes; a half group's second tokens follow: [2 n, 4, 32]."""
    MASK: tl.constexpr = 0x0F0F0F0F if BITS == 4 else 0x03030303
    if BITS == 8:
        y = x
    else:
        y = (x >> SHIFT) & MASK
    if HALF:
        y = tl.permute(tl.join(y, (x >> (SHIFT + 4)) & MASK), [0, 3, 1, 2])
        y = tl.reshape(y, [2 * x.shape[0], 4, 32])
    return y


@triton.jit(do_not_specialize=["max_chunks", "Q", "stride_positions_b", "stride_segments_b"])
def _project_operand_kernel(
    q_ptr,
    positions_ptr,
    turns_ptr,
    basis_ptr,
    scale_ptr,
    segment_table_ptr,
    lengths_ptr,
    u_ptr,
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
    C: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    R: tl.constexpr,
    R8: tl.constexpr,
    R4: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """The projected queries of one chunk and one block of 4 heads, in log2 units, as operands B of the attention kernel.

    u int32 [B*Q, G, max_chunks, ceil(HG/4), 32, R/16 + 2]: for each lane its word of each block of 16 components, then
    the scale and the bias (sum of u z) of head t as float32.
    """
    HEAD_BLOCKS: tl.constexpr = (HG + 3) // 4
    WORDS: tl.constexpr = R // 16 + 2
    chunk = tl.program_id(0) // HEAD_BLOCKS
    block = tl.program_id(0) % HEAD_BLOCKS
    g = tl.program_id(1).to(tl.int64)
    bq = tl.program_id(2).to(tl.int64)
    b = bq // Q
    if chunk * C < tl.load(lengths_ptr + b):
        lane = tl.arange(0, 32)
        row = lane >> 2
        t = lane & 3
        h = block * 4 + (row >> 1)  # of the column that a lane holds of B
        live = (h < HG)[None, :]
        byte = tl.arange(0, 4)[:, None]
        q_row = q_ptr + b * stride_q_b + (bq % Q) * stride_q_q + (g * HG + h) * stride_q_h
        position = tl.load(positions_ptr + b * stride_positions_b + bq % Q).to(tl.int64)
        distance = position - chunk.to(tl.int64) * C
        segment = tl.load(segment_table_ptr + b * stride_segments_b + chunk).to(tl.int64)

        # The largest magnitude that a turned query can have: one scale for its int8 parts at any distance.
        largest = tl.zeros([32], dtype=tl.float32)
        for start in range(0, D, 16):
            d = start + t[None, :] * 4 + byte  # [4, 32]
            x = tl.load(q_row[None, :] + d, mask=live, other=0.0).to(tl.float32)
            other = tl.where(d < PAIRS, d + PAIRS, d - PAIRS)
            y = tl.load(q_row[None, :] + other, mask=live & (d < 2 * PAIRS), other=0.0).to(tl.float32)
            size = tl.sqrt(x * x + y * y) * tl.where(d < 2 * PAIRS, rotary_scale, 1.0)
            largest = tl.maximum(largest, tl.max(size, 0))
        largest = tl.max(tl.max(tl.reshape(largest, [4, 2, 4]), 2), 1)  # [4] by head
        q_step = tl.where(largest > 0.0, largest * (1.0 / 126.9), 1.0)  # 126.9: sine and cosine may exceed 1 by 2**-20
        inverse = 1.0 / q_step
        inverse = tl.reshape(tl.broadcast_to(inverse[:, None], [4, 8]), [32])
        turned = ()
        for step in tl.static_range(D // 16):
            d = step * 16 + t[None, :] * 4 + byte
            x = tl.load(q_row[None, :] + d, mask=live, other=0.0).to(tl.float32)
            if step * 16 < 2 * PAIRS:
                turns_at = tl.where(d < PAIRS, d, d - PAIRS)
                other = tl.where(d < PAIRS, d + PAIRS, d - PAIRS)
                y = tl.load(q_row[None, :] + other, mask=live & (d < 2 * PAIRS), other=0.0).to(tl.float32)
                turns = tl.load(turns_ptr + turns_at, mask=d < 2 * PAIRS, other=0)  # no turn: cosine 1, sine 0
                cos, sin = cos_sin(distance, turns, NATIVE)
                x = x * cos + tl.where(d < PAIRS, -y, y) * sin
                x *= tl.where(d < 2 * PAIRS, rotary_scale, 1.0)
            hi, lo, _ = _split_int8(x * inverse[None, :], 254.0)
            turned = turned + (_pack_bytes(tl.where((row & 1 == 1)[None, :], lo, hi), byte * 8),)

        # The 16 rows of a block are two operands A: 64 words in one dimension, which leave no choice of lanes.
        component = tl.arange(0, 64) >> 2
        t = tl.arange(0, 64) & 3
        basis_words = (basis_ptr + (segment * G + g) * (R * D)).to(tl.pointer_type(tl.int32))
        scale_row = scale_ptr + (segment * G + g) * R
        q_step = _to_lanes(q_step, 16) * softmax_scale
        u = ()
        most = tl.zeros([64], dtype=tl.float32)
        for n in tl.static_range(R // 16):
            r = n * 16 + component
            hi = tl.zeros([64], dtype=tl.int32)
            lo = tl.zeros([64], dtype=tl.int32)
            for step in tl.static_range(D // 16):
                rows = tl.load(basis_words + r * (D // 4) + (step * 4 + t))
                columns = tl.reshape(tl.broadcast_to(turned[step][None, :], [2, 32]), [64])
                hi, lo = _mma(rows, columns, hi, lo, NATIVE)
            one = (hi.to(tl.float32) + lo.to(tl.float32) * (1.0 / 254.0)) * tl.load(scale_row + r) * q_step
            most = tl.maximum(most, tl.abs(one))
            u = u + (one,)
        scale = tl.max(tl.reshape(most, [16, 4]), 0) * (1.0 / 127.0)
        scale = tl.where(scale > 0.0, scale, 1.0)  # [4]
        inverse = _to_lanes(1.0 / scale, 16)
        bias = tl.zeros([64], dtype=tl.float32)
        record = u_ptr + (((bq * G + g) * max_chunks + chunk) * HEAD_BLOCKS + block) * (32 * WORDS)
        at = record.to(tl.pointer_type(tl.int8)) + (8 * t + component // 4) * (4 * WORDS) + component % 4
        for n in tl.static_range(R // 16):
            hi, lo, value = _split_int8(u[n] * inverse, 254.0)
            bias += value * _offset_of(n * 16 + component, R8, R4, False)
            tl.store(at + n * 4, hi.to(tl.int8))
            tl.store(at + n * 4 + 16 * WORDS, lo.to(tl.int8))
        bias = tl.sum(tl.reshape(bias, [16, 4]), 0) * scale
        tail = record.to(tl.pointer_type(tl.float32)) + lane * WORDS + R // 16
        tl.store(tail, _to_lanes(scale, 8))
        tl.store(tail + 1, _to_lanes(bias, 8))


@triton.jit(do_not_specialize=["max_chunks", "Q", "splits", "stride_pages_b", "stride_segments_b"])
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
    run_ptr,
    o_ptr,
    lse_ptr,
    max_chunks,
    splits,
    Q,
    G,
    stride_pages_b,
    stride_segments_b,
    HG: tl.constexpr,
    C: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    RK: tl.constexpr,
    RV: tl.constexpr,
    V8: tl.constexpr,
    V4: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
    K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    RUN: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One split of the chunks of one row, query and KV head: its state for one block of 4 heads of the group."""
    HEAD_BLOCKS: tl.constexpr = (HG + 3) // 4
    WORDS: tl.constexpr = RK // 16 + 2
    TILES: tl.constexpr = C // TILE
    SUB: tl.constexpr = TILE // 32
    split = tl.program_id(0) // HEAD_BLOCKS
    block = tl.program_id(0) % HEAD_BLOCKS
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
    sub = tl.arange(0, SUB)
    token = 8 * tl.arange(0, 4)[:, None] + row[None, :]  # [4, 32], of a sub-tile
    h = block * 4 + tl.arange(0, 4)
    run_ptr += ((bq * G + g) * HEAD_BLOCKS + block) * splits * (4 * RV) + split * (4 * RV)
    out = (((b * G + g) * HG + h) * Q + bq % Q) * splits + split  # [4], row of the split's state
    m_all = tl.full([4], float("-inf"), dtype=tl.float32)
    l_all = tl.zeros([4], dtype=tl.float32)
    while chunk < end:
        # A run of chunks that share a segment: its V basis is applied once, at its end.
        segment = tl.load(segment_table_ptr + chunk)
        i = tl.arange(0, RUN)
        others = tl.load(segment_table_ptr + chunk + i, mask=chunk + i < end, other=-1) != segment
        run = tl.min(tl.where(others, i, RUN), 0)
        m = tl.full([32], float("-inf"), dtype=tl.float32)  # of head t
        l = tl.zeros([32], dtype=tl.float32)  # of head t and the tokens of row g
        w_sum = tl.zeros([32], dtype=tl.float32)
        acc = ()
        for _ in tl.static_range(RV // 16):
            acc = acc + (tl.zeros([2, 32], dtype=tl.float32),)  # components g and 8 + g of a block, head t
        for tile in range(chunk * TILES, (chunk + run) * TILES):
            j = tile // TILES
            part = tile % TILES  # of the page
            page = tl.load(page_table_ptr + j).to(tl.int64) * G + g
            k_words = (k_ptr + page * (C * K_BYTES)).to(tl.pointer_type(tl.int32))
            v_words = (v_ptr + page * (C * V_BYTES)).to(tl.pointer_type(tl.int32))
            record = u_ptr + (((bq * G + g) * max_chunks + j) * HEAD_BLOCKS + block) * (32 * WORDS) + lane * WORDS
            hi = tl.zeros([SUB, 4, 32], dtype=tl.int32)
            lo = tl.zeros([SUB, 4, 32], dtype=tl.int32)
            for n in tl.static_range(len(K_GROUPS)):
                x = _load_words(k_words + _group_offset(K_GROUPS, n) * (C // 4), part, SUB, _half(K_GROUPS, n))
                for f in tl.static_range(len(_fields(K_GROUPS, n))):
                    y = _field_words(x, _half(K_GROUPS, n), _shift(K_GROUPS, n, f), _fields(K_GROUPS, n)[f])
                    u = tl.load(record + (_first_block(K_GROUPS, n) + f))
                    hi, lo = _mma(y, u[None, None, :], hi, lo, NATIVE)
            u_scale = tl.load((record + RK // 16).to(tl.pointer_type(tl.float32)))
            u_bias = tl.load((record + RK // 16 + 1).to(tl.pointer_type(tl.float32)))
            s = (hi.to(tl.float32) + lo.to(tl.float32) * (1.0 / 254.0)) * u_scale[None, None, :] + u_bias[None, None, :]
            # Tokens kept exact elsewhere, and those past the row's length.
            skipped = tl.load(skip_ptr + page * (C // 32) + part * SUB + sub)
            left = length - (j * C + part * TILE) - 32 * sub
            hidden = ((skipped[:, None, None] >> token[None, :, :]) & 1) != 0
            hidden |= token[None, :, :] >= left[:, None, None]
            s = tl.where(hidden, float("-inf"), s)  # [SUB, 4, 32]
            m_tile = _to_lanes(_max_over_rows(tl.max(tl.max(s, 0), 0)), 8)
            p = tl.exp2(s - tl.where(m_tile == float("-inf"), 0.0, m_tile)[None, None, :])
            m_new = tl.maximum(m, m_tile)
            top = tl.where(m_new == float("-inf"), 0.0, m_new)
            old = tl.exp2(m - top)
            new = tl.exp2(m_tile - top)
            m = m_new
            l = l * old + tl.sum(tl.sum(p, 0), 0) * new
            w_hi, w_lo, w = _split_int8(p * 127.0, 127.0)
            w_sum = w_sum * old + tl.sum(tl.sum(w, 0), 0) * new
            # Weights as B: a lane has one token and head of a word's four; row g = 4 q + b is byte b of word q.
            shift = (8 * (row & 3))[None, None, :]
            w_hi = tl.sum(tl.reshape((w_hi & 255) << shift, [SUB, 4, 2, 4, 4]), 3)  # [SUB, t of B, q, head]
            w_lo = tl.sum(tl.reshape((w_lo & 255) << shift, [SUB, 4, 2, 4, 4]), 3)
            w_both = tl.permute(tl.join(w_hi, w_lo), [0, 2, 3, 4, 1])
            w_both = tl.reshape(w_both, [SUB, 1, 2, 32])
            rescaled = ()
            for n in tl.static_range(len(V_GROUPS)):
                x = _load_words(v_words + _group_offset(V_GROUPS, n) * (C // 4), part, SUB, _half(V_GROUPS, n))
                for f in tl.static_range(len(_fields(V_GROUPS, n))):
                    y = _field_words(x, _half(V_GROUPS, n), _shift(V_GROUPS, n, f), _fields(V_GROUPS, n)[f])
                    y = tl.reshape(y, [SUB, 2, 2, 32])  # (sub-tile, half of the block, q, lane)
                    zero = tl.zeros([SUB, 2, 2, 32], dtype=tl.int32)
                    hi, lo = _mma(y, w_both, zero, zero, NATIVE)
                    hi = tl.sum(tl.sum(hi, 2), 0)  # [2, 32]
                    lo = tl.sum(tl.sum(lo, 2), 0)
                    part_sum = (hi.to(tl.float32) + lo.to(tl.float32) * (1.0 / 127.0)) * new[None, :]
                    rescaled = rescaled + (acc[len(rescaled)] * old[None, :] + part_sum,)
            acc = rescaled
        # The run's output, coefficients times the V basis, joins that of earlier runs in global memory. Coefficients go
        # there first: each thread wants all of them, and has no registers for them beside those of the loop above.
        m_run = _max_over_rows(m)
        m_new = tl.maximum(m_all, m_run)
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
        old = tl.exp2(m_all - top) * l_all
        new = tl.exp2(m_run - top)
        m_all = m_new
        l_all = old + new * _sum_over_rows(l)
        norm = tl.where(l_all > 0.0, 1.0 / l_all, 0.0)
        old *= norm
        new = _to_lanes(new * norm * (1.0 / 127.0), 8)
        run_sum = _to_lanes(_sum_over_rows(w_sum), 8)
        basis_row = (segment.to(tl.int64) * G + g) * RV
        for n in tl.static_range(RV // 16):
            r = n * 16 + tl.arange(0, 2)[:, None] * 8 + row[None, :]
            coefficient = (acc[n] + _offset_of(r, V8, V4, False) * run_sum[None, :]) * new[None, :]
            coefficient *= tl.load(scale_ptr + basis_row + r)
            tl.store(run_ptr + (n * 64 + tl.arange(0, 2)[:, None] * 32 + lane[None, :]), coefficient)
        tl.debug_barrier()
        i8 = tl.arange(0, 8)
        for start in range(0, D, 32):
            d = start + (lane & 31)  # a dimension a lane: sums over components stay in a thread
            mask = (d < D)[:, None] & (h < HG)[None, :]
            products = tl.zeros([8, 32, 4], dtype=tl.float32)
            for first in range(0, RV, 8):
                factor = tl.load(run_ptr + (first + i8)[:, None] * 4 + tl.arange(0, 4)[None, :])
                rows = basis_ptr + (basis_row + first + i8)[:, None] * D
                basis = tl.load(rows + d[None, :], mask=(d < D)[None, :], other=0).to(tl.float32)
                basis, factor = tl.broadcast(basis[:, :, None], factor[:, None, :])
                products = tl.fma(basis, factor, products)
            o = tl.load(o_ptr + out[None, :] * D + d[:, None], mask=mask & (old > 0.0)[None, :], other=0.0)
            tl.store(o_ptr + out[None, :] * D + d[:, None], o * old[None, :] + tl.sum(products, 0), mask=mask)
        tl.debug_barrier()  # the next run's threads read what others wrote
        chunk += run
    tl.store(lse_ptr + out, tl.where(l_all > 0.0, m_all * 0.6931471805599453 + tl.log(l_all), float("-inf")), mask=h < HG)


@triton.constexpr_function
def _first_block(groups, n):
    """First block of 16 components of group n."""
    return groups[n][0] // 16


def attend(
    q: torch.Tensor,
    positions: torch.Tensor,
    pages: Pages,
    rope: Rope,
    scale: float,
    splits: int,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The launches of `attend_spectral` after its checks, for int8 sides.

    q [B, H, Q, D]; positions [B, Q], last stride 1; scale: of the scores in log2 units; splits at most max_chunks;
    out [B, H, (Q,) D] and lse [B, H, (Q,)] float32, contiguous.
    """
    layout, (batch, heads, queries, dim) = pages.layout, q.shape
    kv_heads, chunks, rows = pages.kv_heads, pages.max_chunks, batch * queries
    group = heads // kv_heads
    head_blocks = triton.cdiv(group, 4)
    k_ranks, v_ranks = ({bits: rank for rank, bits in side.bands} for side in (layout.k, layout.v))
    words = layout.k.rank // 16 + 2
    u = torch.empty((rows, kv_heads, chunks, head_blocks, 32, words), dtype=torch.int32, device=q.device)
    o_splits = torch.empty((*lse.shape, splits, dim), dtype=torch.float32, device=q.device)
    lse_splits = torch.empty((*lse.shape, splits), dtype=torch.float32, device=q.device)
    runs = torch.empty((rows, kv_heads, head_blocks, splits, layout.v.rank, 4), dtype=torch.float32, device=q.device)
    native = _launch.is_native(q)
    with torch.cuda.device_of(q):
        _project_operand_kernel[(chunks * head_blocks, kv_heads, rows)](
            q,
            positions,
            rope.turns,
            pages.k_basis,
            pages.k_scale,
            pages.segment_table,
            pages.lengths,
            u,
            chunks,
            queries,
            kv_heads,
            scale,
            rope.scaling**2,
            *q.stride()[:3],
            positions.stride(0),
            pages.segment_table.stride(0),
            HG=group,
            C=layout.chunk,
            D=dim,
            PAIRS=rope.turns.shape[0],
            R=layout.k.rank,
            R8=k_ranks.get(8, 0),
            R4=k_ranks.get(4, 0),
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
            runs,
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
            TILE=min(layout.chunk, 128),
            D=dim,
            RK=layout.k.rank,
            RV=layout.v.rank,
            V8=v_ranks.get(8, 0),
            V4=v_ranks.get(4, 0),
            K_BYTES=layout.k.bytes,
            V_BYTES=layout.v.bytes,
            K_GROUPS=layout.k.groups,
            V_GROUPS=layout.v.groups,
            RUN=64,
            NATIVE=native,
            num_warps=1,
            num_stages=1,
        )
        return merge_many_states(o_splits, lse_splits, out=out, out_lse=lse)
