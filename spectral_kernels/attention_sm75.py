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
from ._math import FULL, ROUND_TO_LOW_BITS, TINY
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
def _load_page(ptr, GROUPS: tl.constexpr):
    """The groups of a page, each as words [sub-tiles, 4, 32]: word i of each lane's 16 bytes."""
    groups = ()
    for n in tl.static_range(len(GROUPS)):
        at = (ptr + _bits.group_offset(GROUPS, n)).to(tl.pointer_type(tl.int32))
        # Four words a thread.
        x = tl.load(at + tl.arange(0, 128 * _bits.subtiles_of(GROUPS, n)))
        x = tl.reshape(x, [_bits.subtiles_of(GROUPS, n), 32, 4])
        groups = groups + (tl.permute(x, [0, 2, 1]),)
    return groups


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
def _four(x):
    """[N, 4] as four [N]."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
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
                at = basis_words + r * (D // 4) + (step * 4 + 4 * t)
                rows = rows + _four(tl.load(at[:, None] + tl.arange(0, 4)[None, :]))
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
def _page_scores(page, u, unit, bias, GROUPS: tl.constexpr, NATIVE: tl.constexpr):
    """Scores [2, 4, 32] of a page's tokens 32 i + 8 j + g at (i, j, lane) with query t; page: by
    `_load_page`; u: each lane's words, [32] a block."""
    hi = tl.zeros([2, 4, 32], dtype=tl.int32)
    lo = tl.zeros([2, 4, 32], dtype=tl.int32)
    for n in tl.static_range(len(GROUPS)):
        for f in tl.static_range(_bits.fields_of(GROUPS, n)):
            x = _block_words(page[n], GROUPS, _bits.first_block(GROUPS, n) + f)
            column = u[_bits.first_block(GROUPS, n) + f][None, None, :]
            hi, lo = _mma(x, column, hi, lo, NATIVE)
    return (hi * 256 + lo).to(tl.float32) * unit[None, None, :] + bias[None, None, :]


@triton.jit
def _weight_operands(w, NATIVE: tl.constexpr):
    """B of weights w in 0 .. FULL, [2, 4, 32] as `_page_scores` lays tokens out: four [1, 32], of
    sub-tile i and word q at 2 i + q.

    Token 32 q + 8 b + 4 i + t is byte b of word q of sub-tile i: a thread has a word's four bytes.
    """
    bits = (w + ROUND_TO_LOW_BITS).to(tl.int32, bitcast=True)  # see `_split`
    b0, b1, b2, b3 = _four(tl.reshape(tl.permute(bits, [0, 2, 1]), [64, 4]))
    if NATIVE:
        hi, lo = tl.inline_asm_elementwise(
            _math.HIGH_AND_LOW, "=r,=r,r,r,r,r", [b0, b1, b2, b3], (tl.int32, tl.int32), True, 1
        )
    else:
        hi = (b0 >> 8 & 255) | (b1 & 65280) | (b2 & 65280) << 8 | (b3 & 65280) << 16
        lo = (b0 & 255 | (b1 & 255) << 8 | (b2 & 255) << 16 | (b3 & 255) << 24) ^ -2139062144
    both = tl.reshape(tl.join(hi, lo), [2, 2, 4, 4, 2])  # [q, i, t, query, part]
    both = tl.reshape(tl.permute(both, [3, 4, 2, 1, 0]), [32, 4])
    w0, w1, w2, w3 = _four(both)
    return w0[None, :], w1[None, :], w2[None, :], w3[None, :]


@triton.jit
def _halves(y):
    """A of a block of V, words [2, 4, 32], by sub-tile i and word q at 2 i + q: four [2, 32] by
    half of the block's components."""
    y = tl.permute(tl.reshape(y, [2, 2, 2, 32]), [1, 3, 0, 2])
    y0, y1, y2, y3 = _four(tl.reshape(y, [64, 4]))
    return (
        tl.reshape(y0, [2, 32]), tl.reshape(y1, [2, 32]), tl.reshape(y2, [2, 32]),
        tl.reshape(y3, [2, 32]),
    )  # fmt: skip


@triton.jit
def _weighted(y, w, NATIVE: tl.constexpr):
    """Sums over 64 tokens, float32 [N, 32], of A y, four [N, 32], and `_weight_operands`."""
    hi = tl.zeros(y[0].shape, dtype=tl.int32)
    lo = tl.zeros(y[0].shape, dtype=tl.int32)
    for i in tl.static_range(4):
        hi, lo = _mma(y[i], w[i], hi, lo, NATIVE)
    return (hi * 256 + lo).to(tl.float32)


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
    `_attend_spectral_kernel`. A page of K is asked for while the page before is worked on."""
    R: tl.constexpr = _bits.rank_of(K_GROUPS)
    RV: tl.constexpr = _bits.rank_of(V_GROUPS)
    PAGES: tl.constexpr = FRAME // 64  # of a frame
    blocks = tl.cdiv(Q * HG, 4)
    program = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    g = tl.program_id(1).to(tl.int64)
    splits_of = _math.row_splits(seq_lens_ptr, B, programs, (SINKS, WINDOW), 1, 6, BLOCK_B)
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
        unit = m  # of weights
        l = tl.zeros([32], dtype=tl.float32)  # of query t and the tokens of row g
        ones = tl.full([1, 32], 0x01010101, dtype=tl.int32)
        ones = ones, ones, ones, ones
        w_sum = tl.zeros([1, 32], dtype=tl.float32)  # of query t
        acc = ()  # components g and 8 + g of a block, query t
        for _ in tl.static_range(RV // 16):
            acc = acc + (tl.zeros([2, 32], dtype=tl.float32),)
        number = tl.load(block_table_ptr + page).to(tl.int64)
        k_page = _load_page(k_ptr + number * strides_pages[0], K_GROUPS)
        for frame in range(page // PAGES, tl.cdiv(end, PAGES)):
            record = ((b * G + g) * max_frames + frame) * blocks + block
            record_ptr = u_ptr + (record * 32 + lane) * (R // 16 + 2)
            u = ()
            for n in tl.static_range(R // 16):
                u = u + (tl.load(record_ptr + n),)
            u_unit = tl.load((record_ptr + R // 16).to(tl.pointer_type(tl.float32)))
            u_bias = tl.load((record_ptr + R // 16 + 1).to(tl.pointer_type(tl.float32)))
            first = tl.maximum(page, frame * PAGES)
            for j in range(first, tl.minimum(end, frame * PAGES + PAGES)):
                v_page = _load_page(v_ptr + number * strides_pages[2], V_GROUPS)
                number = tl.load(block_table_ptr + tl.minimum(j + 1, end - 1)).to(tl.int64)
                tl.debug_barrier()  # these loads are on their way before the scores
                s = _page_scores(k_page, u, u_unit, u_bias, K_GROUPS, NATIVE)
                k_page = _load_page(k_ptr + number * strides_pages[0], K_GROUPS)
                tl.debug_barrier()  # and this one before the weights
                position = j * 64 + token
                s = tl.where((position >= SINKS) & (position < stop), s, float("-inf"))
                # Weights in units of 1 / FULL of the page's largest, or of 2**-32 of the largest
                # so far.
                m_page = tl.max(tl.max(s, 0), 0)
                m_page = _to_lanes(tl.max(tl.reshape(m_page, [8, 4]), 0), 8)
                m = tl.maximum(m, m_page)
                new = tl.maximum(m_page, m - 32.0)
                low = tl.where(new == float("-inf"), 0.0, new)
                p = tl.exp2(s - low[None, None, :])
                old = tl.exp2(unit - low)
                unit = new
                l = l * old + tl.sum(tl.sum(p, 0), 0)
                w = _weight_operands(p * FULL, NATIVE)
                w_sum = w_sum * old[None, :] + _weighted(ones, w, NATIVE)
                rescaled = ()
                for n in tl.static_range(len(V_GROUPS)):
                    for f in tl.static_range(_bits.fields_of(V_GROUPS, n)):
                        y = _block_words(v_page[n], V_GROUPS, _bits.first_block(V_GROUPS, n) + f)
                        dots = _weighted(_halves(y), w, NATIVE)
                        rescaled = rescaled + (acc[len(rescaled)] * old[None, :] + dots,)
                acc = rescaled
        # In steps of V's basis; acc counts weights in units of 1 / FULL.
        l = FULL * tl.sum(tl.reshape(l, [8, 4]), 0)
        unit = tl.max(tl.reshape(unit, [8, 4]), 0)
        tl.store(lse_ptr + out, _math.natural_lse(unit, l), mask=live)
        norm = _to_lanes(tl.where(l == 0.0, 0.0, 1.0 / l), 8)
        stored = (block * 4 + (lane & 3) < Q * HG)[None, :]
        r = tl.arange(0, 2)[:, None] * 8 + (lane >> 2)[None, :]
        c_at = c_ptr + _to_lanes(out, 8)[None, :] * RV + r
        for n in tl.static_range(RV // 16):
            c = (acc[n] + _bits.field_zero(V_GROUPS, n) * w_sum) * _bits.field_weight(V_GROUPS, n)
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
    u, c, lse, exact_o, exact_lse, _ = states
    u = u.view(torch.int32)
    group = heads // kv_heads
    blocks = _launch.cdiv(group * queries, 4)
    shared: dict[str, Any] = {
        "HG": group,
        "FRAME": layout.frame,
        "WINDOW": window,
        "NATIVE": _launch.is_native(q),
    }
    _project_operand_kernel[(plan.frames * blocks, kv_heads, batch)](
        q, codec.freqs, codec.k_basis, codec.k_scale, codec.k_mean, seq_lens, codec_ids, u,
        plan.frames, queries, kv_heads, scale, q.stride()[:3], D=dim,
        PAIRS=codec.freqs.shape[0], GROUPS=layout.k.groups, num_warps=1, num_stages=1, **shared,
    )  # fmt: skip
    _attend_operands_kernel[(plan.states * blocks, kv_heads)](
        k_pages, v_pages, u, block_table, seq_lens, c, lse, plan.frames, batch, plan.programs,
        queries, kv_heads, (*k_pages.stride()[:2], *v_pages.stride()[:2], block_table.stride(0)),
        K_GROUPS=layout.k.groups, V_GROUPS=layout.v.groups, SINKS=sinks, BLOCK_B=plan.block_b,
        **shared, **plan.options,
    )  # fmt: skip
    if exact is not None:
        _launch_window(
            q, exact[0], exact[1], seq_lens, seq_ids, exact_o, exact_lse, kept, plan.window, scale,
            False,
        )  # fmt: skip
