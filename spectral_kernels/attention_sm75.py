"""Attention over pages on cards before sm_80 (T4): what attention.py does, without `tl.dot`.

Triton has no matrix units on sm_75, but the card has them: mma.sync.m8n8k16 on int8, which `_mma`
writes as inline assembly. A page holds its operands as they are (layout.py): with lane = 4 g + t of
a warp

    A  [8, 16]: a lane holds row g, columns 4t .. 4t+3, an int32 word
                of tokens x components (K), components x tokens (V)
    B  [16, 8]: a lane holds column g (hi or lo of one of 4 queries), rows 4t .. 4t+3
    C  [8, 8]:  a lane holds row g, columns 2t and 2t+1: so hi and lo of query t in one lane

Formulas, splits into hi and lo and error bounds are those of attention.py. Queries are projected
for every frame of a row, once for all splits (`_project_operand_kernel`); then pages are attended
(`_attend_operands_kernel`: a split, a warp and 4 queries of a KV head a program), and the exact
tokens (window.py). Tensors of operands are [..., 32], their last index the lane: indices are
computed by shifts and masks, in which Triton sees no contiguous run of lanes that it would load by
one thread (tests/test_compile.py looks at the layouts it chose).

Source: PTX ISA, matrix fragments for mma.m8n8k16.
Oracle: reference/attention.py.   Test: tests/test_attention.py ("scalar").
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import _bits, _launch, _math
from ._math import FULL, LOG2_FULL, ROUND_TO_LOW_BITS, TINY
from .window import _launch_window


@triton.jit
def _mma(a, b, c0, c1, NATIVE: tl.constexpr):
    """C + A B for operands [..., 32] of int32 words (see the module): the two columns of C that a
    lane holds, int32."""
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
    mask = _bits.field_mask(groups, i)
    return mask - 2**32 if mask >= 2**31 else mask


@triton.jit
def _split(x):
    """x in [-32512, 32512], rounded to nearest, as 256 hi + lo: low bytes of (hi, lo), int32, and
    the rounded x."""
    shifted = x + ROUND_TO_LOW_BITS
    bits = shifted.to(tl.int32, bitcast=True)  # low 16 bits: the integer + 128; hi: their high byte
    return (bits >> 8) & 255, (bits & 255) ^ 128, shifted - ROUND_TO_LOW_BITS


@triton.jit
def _load_words(ptr, GROUPS: tl.constexpr, n: tl.constexpr):
    """Group n of a page, as words [sub-tiles, 4, 32]: word i of each lane's 16 bytes."""
    SUBTILES: tl.constexpr = _bits.subtiles_of(GROUPS, n)
    words = (ptr + _bits.group_offset(GROUPS, n)).to(tl.pointer_type(tl.int32))
    x = tl.load(words + tl.arange(0, 128 * SUBTILES))  # four words a thread
    return tl.permute(tl.reshape(x, [SUBTILES, 32, 4]), [0, 2, 1])


@triton.jit
def _block_words(x, GROUPS: tl.constexpr, i: tl.constexpr):
    """Block i of 64 tokens from the words of its group, [2, 4, 32]; its bits where they lie."""
    MASK: tl.constexpr = _word_mask(GROUPS, i)
    y = x & MASK
    if _bits.is_half_group(GROUPS, _bits.place_of(GROUPS, i)[0]):
        y = tl.reshape(tl.permute(tl.join(y, (x >> 4) & MASK), [0, 3, 1, 2]), [2, 4, 32])
    return y


@triton.constexpr_function
def _columns(D, step):
    """The dimensions of step `step` of 16: (first, distance of those of two t). Four steps share 64
    dimensions, of which t has 16 in a row, so that a thread loads the words of four steps at once;
    what is left of D goes by 16."""
    return (step // 4 * 64 + step % 4 * 4, 16) if step < D // 64 * 4 else (step * 16, 4)


@triton.jit
def _four_words(ptr):
    """The four words from each of ptr [64] on, 16 bytes aligned: four [64]."""
    x = tl.load(ptr[:, None] + tl.arange(0, 4)[None, :])
    even, odd = tl.split(tl.reshape(x, [64, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _load_columns(
    q_ptr,  # the sequence's and KV head's first query
    row,  # [32], query * HG + head of the column of B that a lane holds
    live,
    stride_q_h,
    stride_q_q,
    freqs_ptr,
    mean_ptr,  # float32 [D]
    start,  # of the frame
    HG: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """4 queries turned back by `start`: (words of B [32] of each step of 16 dimensions, in units in
    which a query's longest pair is FULL: one unit at any angle; the longest pairs [4]; the mean's
    scores [4])."""
    lane = tl.arange(0, 32)
    t = (lane & 3)[None, :]
    byte = tl.arange(0, 4)[:, None]
    live = live[None, :]
    q_row = q_ptr + (row % HG).to(tl.int64) * stride_q_h + (row // HG).to(tl.int64) * stride_q_q
    largest = tl.zeros([32], dtype=tl.float32)
    for first in range(0, D, 16):
        d = first + t * 4 + byte  # [4, 32]
        x = tl.load(q_row[None, :] + d, mask=live, other=0.0).to(tl.float32)
        other = tl.where(d < PAIRS, d + PAIRS, d - PAIRS)
        y = tl.load(q_row[None, :] + other, mask=live & (d < 2 * PAIRS), other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.sqrt(x * x + y * y), 0))
    largest = tl.max(tl.max(tl.reshape(largest, [4, 2, 4]), 2), 1)  # [4] by query
    full = tl.where(largest > 0.0, FULL / largest, 0.0)
    full = tl.reshape(tl.broadcast_to(full[:, None], [4, 8]), [32])
    words = ()
    score = tl.zeros([32], dtype=tl.float32)
    for step in tl.static_range(D // 16):
        d = _columns(D, step)[0] + t * _columns(D, step)[1] + byte
        x = tl.load(q_row[None, :] + d, mask=live, other=0.0).to(tl.float32)
        if _columns(D, step)[0] < 2 * PAIRS:
            paired = d < 2 * PAIRS
            other = tl.where(d < PAIRS, d + PAIRS, d - PAIRS)
            y = tl.load(q_row[None, :] + other, mask=live & paired, other=0.0).to(tl.float32)
            # No turn: cosine 1, sine 0.
            freqs = tl.load(freqs_ptr + tl.where(d < PAIRS, d, d - PAIRS), mask=paired, other=0)
            cos, sin = _math.cos_sin(start, freqs, NATIVE)
            x = x * cos + tl.where(d < PAIRS, y, -y) * sin
        score += tl.sum(x * tl.load(mean_ptr + d), 0)
        hi, lo, _ = _split(x * full[None, :])
        word = tl.where((lane & 4 != 0)[None, :], lo, hi) << (byte * 8)
        words = words + (tl.sum(word, 0),)
    # Both columns of a query hold its score.
    score = tl.max(tl.sum(tl.reshape(score, [4, 2, 4]), 2), 1)
    return words, largest, score


@triton.jit(do_not_specialize=["max_frames", "Q"])
def _project_operand_kernel(
    q_ptr,
    freqs_ptr,
    basis_ptr,
    scale_ptr,
    mean_ptr,
    seq_lens_ptr,
    codec_ids_ptr,
    u_ptr,
    max_frames,
    Q,
    G,
    softmax_scale,
    strides_q,  # (b, h, q)
    HG: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    FRAME: tl.constexpr,
    GROUPS: tl.constexpr,
    WINDOW: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """The projected queries of one frame and block of 4 queries, in log2 units, as operands B.

    u int32 [B, G, max_frames, blocks, 32, R/16 + 2]: for each lane its word of each block of 16
    components (by `field_weight`), then as float32 the unit and the bias of query t: the mean's
    score and the sum of u times `field_zero`.
    """
    R: tl.constexpr = _bits.rank_of(GROUPS)
    WORDS: tl.constexpr = R // 16 + 2
    blocks = tl.cdiv(Q * HG, 4)
    frame = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    g = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    if frame * FRAME < tl.load(seq_lens_ptr + b) - WINDOW:
        codec_row = _math.row_of(codec_ids_ptr, b, 0) * G + g
        lane = tl.arange(0, 32)
        row = block * 4 + (lane >> 3)
        turned, largest, score = _load_columns(
            q_ptr + b * strides_q[0] + g * HG * strides_q[1], row, row < Q * HG, strides_q[1],
            strides_q[2], freqs_ptr, mean_ptr + codec_row * D, frame.to(tl.int64) * FRAME,
            HG, D, PAIRS, NATIVE,
        )  # fmt: skip
        # The 16 rows of a block are two operands A: 64 words in one dimension, which leave no
        # choice of lanes.
        component = tl.arange(0, 64) >> 2
        t = tl.arange(0, 64) & 3
        basis_words = (basis_ptr + codec_row * (R * D)).to(tl.pointer_type(tl.int32))
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
            scale = tl.load(scale_ptr + codec_row * R + r) * softmax_scale
            one = (hi * 256 + lo).to(tl.float32) * (scale * _bits.field_weight(GROUPS, n))
            most = tl.maximum(most, tl.abs(one))
            u = u + (one,)
        top = tl.max(tl.reshape(most, [16, 4]), 0)  # [4], in units of 1 / full
        full = _to_lanes(tl.where(top > TINY, FULL / top, 0.0), 16)
        unit = top * (1.0 / FULL) * (largest * (1.0 / FULL))
        bias = tl.zeros([64], dtype=tl.float32)
        record = ((b * G + g) * max_frames + frame) * blocks + block
        record_ptr = u_ptr + record * (32 * WORDS)
        at = record_ptr.to(tl.pointer_type(tl.int8))
        at += (8 * t + component // 4) * (4 * WORDS) + component % 4
        for n in tl.static_range(R // 16):
            hi, lo, value = _split(u[n] * full)
            bias += value * _bits.field_zero(GROUPS, n)
            tl.store(at + n * 4, hi.to(tl.int8))
            tl.store(at + n * 4 + 16 * WORDS, lo.to(tl.int8))
        bias = tl.sum(tl.reshape(bias, [16, 4]), 0) * unit + score * softmax_scale
        tail = record_ptr.to(tl.pointer_type(tl.float32)) + lane * WORDS + R // 16
        tl.store(tail, _to_lanes(unit, 8))
        tl.store(tail + 1, _to_lanes(bias, 8))


@triton.jit
def _page_scores(k_ptr, record_ptr, GROUPS: tl.constexpr, NATIVE: tl.constexpr):
    """Scores [2, 4, 32] of a page's tokens 32 i + 8 j + g at (i, j, lane) with query t;
    record_ptr [32]: each lane's words of u."""
    R: tl.constexpr = _bits.rank_of(GROUPS)
    hi = tl.zeros([2, 4, 32], dtype=tl.int32)
    lo = tl.zeros([2, 4, 32], dtype=tl.int32)
    for n in tl.static_range(len(GROUPS)):
        x = _load_words(k_ptr, GROUPS, n)
        for f in tl.static_range(_bits.fields_of(GROUPS, n)):
            u = tl.load(record_ptr + (_bits.first_block(GROUPS, n) + f))
            y = _block_words(x, GROUPS, _bits.first_block(GROUPS, n) + f)
            hi, lo = _mma(y, u[None, None, :], hi, lo, NATIVE)
    unit = tl.load((record_ptr + R // 16).to(tl.pointer_type(tl.float32)))
    bias = tl.load((record_ptr + R // 16 + 1).to(tl.pointer_type(tl.float32)))
    return (hi * 256 + lo).to(tl.float32) * unit[None, None, :] + bias[None, None, :]


@triton.jit
def _weight_operand(w_hi, w_lo):
    """B of weights [2, 4, 32] as `_page_scores` lays them out: [2, 1, 2, 32] by sub-tile and q.

    Token 32 q + 8 b + 4 i + t is byte b of word q of sub-tile i: a thread has a word's four bytes.
    """
    byte = (8 * tl.arange(0, 4))[None, :, None]
    w_hi = tl.reshape(tl.sum(w_hi << byte, 1), [2, 2, 4, 4])  # [q, i, t, query]
    w_lo = tl.reshape(tl.sum(w_lo << byte, 1), [2, 2, 4, 4])
    return tl.reshape(tl.permute(tl.join(w_hi, w_lo), [1, 0, 3, 4, 2]), [2, 1, 2, 32])


@triton.jit(do_not_specialize=["max_frames", "B", "programs", "Q"])
def _attend_operands_kernel(
    k_ptr, v_ptr, u_ptr, block_table_ptr, seq_lens_ptr, c_ptr, lse_ptr, max_frames,
    B,
    programs,  # of `row_splits`
    Q,
    G,
    strides_pages,  # (page and g of K, page and g of V, row of the block table)
    HG: tl.constexpr, FRAME: tl.constexpr, K_GROUPS: tl.constexpr, V_GROUPS: tl.constexpr,
    SINKS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_B: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One split of the pages of one sequence and KV head, for 4 queries: the states of
    `_attend_spectral_kernel`."""
    WORDS: tl.constexpr = _bits.rank_of(K_GROUPS) // 16 + 2
    RV: tl.constexpr = _bits.rank_of(V_GROUPS)
    blocks = tl.cdiv(Q * HG, 4)
    program = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    g = tl.program_id(1).to(tl.int64)
    splits_of = _math.row_splits(seq_lens_ptr, B, programs, SINKS, WINDOW, 1, 6, BLOCK_B)
    b, split, splits = _math.row_of_program(splits_of, program, B, BLOCK_B)
    if split >= splits:
        return
    page, end, stop = _math.row_share(tl.load(seq_lens_ptr + b), split, splits, SINKS, WINDOW, 1)
    lane = tl.arange(0, 32)
    query = block * 4 + tl.arange(0, 4)
    live = query < Q * HG
    # [4], rows of the split's states
    out = ((program.to(tl.int64) * G + g) * HG + query % HG) * Q + query // HG
    if page < end:
        k_ptr += g * strides_pages[1]
        v_ptr += g * strides_pages[3]
        block_table_ptr += b * strides_pages[4]
        token = 32 * tl.arange(0, 2)[:, None, None] + 8 * tl.arange(0, 4)[None, :, None]
        token += (lane >> 2)[None, None, :]  # [2, 4, 32]
        m = tl.full([32], float("-inf"), dtype=tl.float32)  # of query t
        l = tl.zeros([32], dtype=tl.float32)  # of query t and the tokens of row g
        w_sum = tl.zeros([32], dtype=tl.float32)
        acc = ()  # components g and 8 + g of a block, query t
        for _ in tl.static_range(RV // 16):
            acc = acc + (tl.zeros([2, 32], dtype=tl.float32),)
        for j in range(page, end):
            number = tl.load(block_table_ptr + j).to(tl.int64)
            record = ((b * G + g) * max_frames + j // (FRAME // 64)) * blocks + block
            record_ptr = u_ptr + record * (32 * WORDS) + lane * WORDS
            s = _page_scores(k_ptr + number * strides_pages[0], record_ptr, K_GROUPS, NATIVE)
            position = j * 64 + token
            s = tl.where((position >= SINKS) & (position < stop), s, float("-inf"))
            m_page = _to_lanes(_max_over_rows(tl.max(tl.max(s, 0), 0)), 8)
            # Weights in units of 1 / FULL of the page's largest.
            base = tl.where(m_page == float("-inf"), 0.0, m_page)
            p = tl.exp2((s - base[None, None, :]) + LOG2_FULL)
            m_new = tl.maximum(m, m_page)
            top = tl.where(m_new == float("-inf"), 0.0, m_new)
            old = tl.exp2(m - top)
            new = tl.exp2(m_page - top)
            m = m_new
            l = l * old + tl.sum(tl.sum(p, 0), 0) * new
            w_hi, w_lo, w = _split(p)
            w_sum = w_sum * old + tl.sum(tl.sum(w, 0), 0) * new
            w_both = _weight_operand(w_hi, w_lo)
            rescaled = ()
            for n in tl.static_range(len(V_GROUPS)):
                x = _load_words(v_ptr + number * strides_pages[2], V_GROUPS, n)
                for f in tl.static_range(_bits.fields_of(V_GROUPS, n)):
                    y = _block_words(x, V_GROUPS, _bits.first_block(V_GROUPS, n) + f)
                    y = tl.reshape(y, [2, 2, 2, 32])  # (sub-tile, half of the block, q, lane)
                    zero = tl.zeros([2, 2, 2, 32], dtype=tl.int32)
                    hi, lo = _mma(y, w_both, zero, zero, NATIVE)
                    dots = tl.sum(tl.sum(hi * 256 + lo, 2), 0).to(tl.float32)  # [2, 32]
                    dots = acc[len(rescaled)] * old[None, :] + dots * new[None, :]
                    rescaled = rescaled + (dots,)
            acc = rescaled
        # In steps of V's basis; l and acc both count weights in units of 1 / FULL.
        l_all = _sum_over_rows(l)
        tl.store(lse_ptr + out, _math.natural_lse(_max_over_rows(m), l_all), mask=live)
        norm = _to_lanes(tl.where(l_all == 0.0, 0.0, 1.0 / l_all), 8)
        w_all = _to_lanes(_sum_over_rows(w_sum), 8)
        stored = (block * 4 + (lane & 3) < Q * HG)[None, :]
        r = tl.arange(0, 2)[:, None] * 8 + (lane >> 2)[None, :]
        c_at = c_ptr + _to_lanes(out, 8)[None, :] * RV + r
        for n in tl.static_range(RV // 16):
            c = (acc[n] + _bits.field_zero(V_GROUPS, n) * w_all[None, :]) * _bits.field_weight(
                V_GROUPS, n
            )
            tl.store(c_at + n * 16, c * norm[None, :], mask=stored)
    else:
        tl.store(lse_ptr + out, tl.full([4], float("-inf"), dtype=tl.float32), mask=live)


def operand_words(rank: int) -> int:
    """Words of `_project_operand_kernel`'s u for a frame and 4 queries; rank: R_K."""
    return 32 * (rank // 16 + 2)


def launch_old_cards(
    q, k_pages, v_pages, codec, exact, tables, states, kept, scale, plan
) -> None:  # fmt: skip
    """What `_attend_spectral_kernel` does in `attend_spectral`; arguments as `_launch_pages`."""
    (batch, heads, queries, dim), layout, kv_heads = q.shape, codec.layout, codec.kv_heads
    (block_table, seq_lens, codec_ids, seq_ids), (sinks, window, _) = tables, kept
    u, _, c, lse, exact_o, exact_lse, _ = states
    u = u.view(torch.int32)
    group = heads // kv_heads
    blocks = _launch.cdiv(group * queries, 4)
    shared: dict[str, Any] = {
        "HG": group,
        "FRAME": layout.frame,
        "WINDOW": window,
        "NATIVE": _launch.is_native(q),
        "num_warps": 1,
        "num_stages": 1,
    }
    _project_operand_kernel[(plan.frames * blocks, kv_heads, batch)](
        q, codec.freqs, codec.k_basis, codec.k_scale, codec.k_mean, seq_lens, codec_ids, u,
        plan.frames, queries, kv_heads, scale, q.stride()[:3], D=dim,
        PAIRS=codec.freqs.shape[0], GROUPS=layout.k.groups, **shared,
    )  # fmt: skip
    _attend_operands_kernel[(plan.states * blocks, kv_heads)](
        k_pages, v_pages, u, block_table, seq_lens, c, lse, plan.frames, batch, plan.programs,
        queries, kv_heads, (*k_pages.stride()[:2], *v_pages.stride()[:2], block_table.stride(0)),
        K_GROUPS=layout.k.groups, V_GROUPS=layout.v.groups, SINKS=sinks, BLOCK_B=plan.block_b,
        **shared,
    )  # fmt: skip
    if exact is not None:
        _launch_window(
            q,
            exact[0],
            exact[1],
            seq_lens,
            seq_ids,
            exact_o,
            exact_lse,
            kept,
            plan.window,
            scale,
            False,
        )
