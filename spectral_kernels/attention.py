"""Attention over spectral pages, and over a row's exact tokens beside them: a state (o, lse).

With a frame's projected query u and bias (rope.py), the integers x of a page's keys and y of its
values (layout.py), and what they are off by, z and z',

    score_t = scale * (bias + sum_r (x_tr + z_r) u_r)
    o       = sum_r v_scale_r v_basis_r (sum_t w_t (y_tr + z'_r))

no key or value is rebuilt: R_K + R_V multiply-adds a token and query head, whatever D is. All sums
are integer dots. A turned query, a projected query u (once a frame) and the weights (once a page
or two) are split as 256 hi + lo = round(32512 x / largest), hi and lo int8; products accumulate
exactly in int32, where 256 hi + lo is formed. Errors: half a unit, 2**-16 of the largest. Fields of
a byte are masked, not shifted, so a field that starts at bit b holds 2**b times its code; u has
2**-b in it.

Two launches: `_attend_spectral_kernel` (a share of a row's pages a program, for whose frames it
projects the queries first; and the exact tokens, window.py) and `_finish_spectral_kernel` (joins
the splits and the exact tokens, and applies the V basis), which from sm_90 starts while the first
ends. The rows of a program are the queries of a KV head: its query heads, and those of several
queries a sequence. Pages hold operand fragments, so what a thread loads goes to the matrix units as
it is. A warp of a program works on a page or two by itself (from sm_80; attention_sm75.py before):
a block of 16 components is as high as one dot, so that all warps would compute the same one.

The grid is fixed by shapes, capacity and the card. Lengths are read on the device, where the pages
of all rows are shared out among the programs: a row has as many splits as its part of all pages is
worth, and a long row beside short ones is no last straggler. Splits are joined in a fixed order:
the same inputs give the same bits. (A row's last bits depend on its neighbours' lengths, by how
often it is split.)

Source: Dao et al., FlashAttention (2022), section 3; Flash-Decoding (split keys).
Oracle: reference/attention.py.   Test: tests/test_attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from . import _bits, _launch, _math
from ._checks import FLOATS, check_ids, check_least, check_output, check_tensor
from ._math import FULL, LITTLE, ROUND_TO_LOW_BITS, TINY
from .attention_sm75 import launch_old_cards, operand_words
from .codec import Codec, check_codec
from .compress import check_pages, check_table
from .layout import PAGE_SIZE, PageLayout, unpack_pages
from .merge import merge_states_torch
from .rope import check_queries, codec_rows, project_queries
from .window import (
    LOG2_E,
    attend_window_torch,
    check_window,
    softmax_scale,
    window_split,
    window_tile,
)  # fmt: skip

# Pages hold operand fragments (layout.py): these views move no data between threads. The first
# dimension are the W P pages that W warps work on: w, w + W, .. are those of warp w.


@triton.jit
def _load_rows(ptr, N: tl.constexpr, ONCE: tl.constexpr):
    """N numbers, at most ONCE at once, at pointers [W]: [W, N], each row by threads of one warp."""
    at = ptr[:, None] + tl.arange(0, min(ONCE, N))[None, :]
    x = tl.load(at)
    if N > ONCE:  # loaded at once, two warps would share them
        x = tl.reshape(tl.permute(tl.join(x, tl.load(at + ONCE)), [0, 2, 1]), [ptr.shape[0], N])
    return x


@triton.jit
def _columns(ptr, GROUPS: tl.constexpr, IS_K: tl.constexpr):
    """Bytes of each group of pages at pointers [N]: of K [N, tokens, 16 columns], of V [N, 16
    columns, tokens] with the tokens in the order of `_by_eights`."""
    N: tl.constexpr = ptr.shape[0]
    columns = ()
    for n in tl.static_range(len(GROUPS)):
        x = _load_rows(ptr + _bits.group_offset(GROUPS, n), 512 * _bits.subtiles_of(GROUPS, n), 512)
        if IS_K:
            x = tl.reshape(x, [N, x.shape[1] // 512, 8, 4, 4, 4])
            x = tl.reshape(tl.permute(x, [0, 1, 4, 2, 3, 5]), [N, x.shape[1] * 32, 16])
        else:
            x = tl.reshape(x, [N, x.shape[1] // 512, 8, 4, 2, 8])
            x = tl.reshape(tl.permute(x, [0, 4, 2, 1, 3, 5]), [N, 16, x.shape[1] * 32])
        columns = columns + (x,)
    return columns


@triton.jit
def _by_eights(w):
    """[W, T, H] by token in the order of V: token 8 j + g of a page at 8 g + j. A thread's weights
    stay together."""
    W: tl.constexpr = w.shape[0]
    T: tl.constexpr = w.shape[1]
    H: tl.constexpr = w.shape[2]
    w = tl.permute(tl.reshape(w, [W, T // 64, 8, 8, H]), [0, 1, 3, 2, 4])
    return tl.reshape(w, [W, T, H])


@triton.jit
def _block(x, GROUPS: tl.constexpr, i: tl.constexpr, IS_K: tl.constexpr, NATIVE: tl.constexpr):
    """Block i of 64 tokens from the bytes of its group, int8 [W, 64, 16] of K, [W, 16, 64] of V."""
    y = _bits.masked_bytes(x, _bits.field_mask(GROUPS, i), 0, NATIVE)
    if _bits.is_half_group(GROUPS, _bits.place_of(GROUPS, i)[0]):
        y = tl.join(y, _bits.masked_bytes(x, _bits.field_mask(GROUPS, i), 4, NATIVE))
        if IS_K:
            y = tl.reshape(tl.permute(y, [0, 3, 1, 2]), [x.shape[0], 64, 16])
        else:
            y = tl.reshape(tl.permute(y, [0, 1, 3, 2]), [x.shape[0], 16, 64])
    return y


# Thread t of four holds columns 4t .. 4t + 3 of both blocks of an operand. Up to Triton 3.7 it
# wants them as 8 columns in a row, since 3.8 as two runs of 4 that are 16 apart: the order that
# leaves them where they are. Products are the same.
_EIGHT_IN_A_ROW = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8))


@triton.jit
def _side_by_side(x, y):
    """Two blocks [W, 64, 16] as [W, 64, 32] in the order of `_EIGHT_IN_A_ROW`; `_project_frames`
    stores u so."""
    W: tl.constexpr = x.shape[0]
    if _EIGHT_IN_A_ROW:
        both = tl.join(tl.reshape(x, [W, 64, 4, 4]), tl.reshape(y, [W, 64, 4, 4]))
        both = tl.permute(both, [0, 1, 2, 4, 3])
    else:
        both = tl.permute(tl.join(x, y), [0, 1, 3, 2])
    return tl.reshape(both, [W, 64, 32])


@triton.jit
def _by_thread(x, M: tl.constexpr, R: tl.constexpr):
    """[M, R] whose columns 8 j + 2 t + e of every 32 lie in thread t of four, and are components 16
    (j div 2) + 4 t + 2 (j mod 2) + e, in the order of `_side_by_side`."""
    x = tl.reshape(x, [M, R // 32, 2, 2, 4, 2])
    if _EIGHT_IN_A_ROW:
        x = tl.permute(x, [0, 1, 4, 2, 3, 5])
    else:
        x = tl.permute(x, [0, 1, 2, 4, 3, 5])
    return tl.reshape(x, [M, R])


@triton.jit
def _split_int16(x, NATIVE: tl.constexpr):
    """x in [-32512, 32512], rounded to nearest, as 256 hi + lo: (hi, lo) int8 and the rounded x,
    float32."""
    shifted = x + ROUND_TO_LOW_BITS
    value = shifted - ROUND_TO_LOW_BITS
    # The low 16 bits are the integer + 128: hi is its high byte.
    bits = shifted.to(tl.int32, bitcast=True)
    if NATIVE:
        hi, lo = tl.inline_asm_elementwise(
            _math.HIGH_AND_LOW,
            "=r,=r,r,r,r,r",
            [bits],
            (tl.int8, tl.int8),
            True,
            4,
        )
    else:
        hi = (bits >> 8).to(tl.int8)
        lo = (bits ^ 128).to(tl.int8)
    return hi, lo, value


@triton.jit
def _load_for_projection(
    q_ptr,  # the sequence's and KV head's first query
    row,  # [ROWS], query * HG + head
    live,
    codec,  # K's basis int8 [.., R, D], its scale [.., R], the mean [.., D]; freqs
    codec_row,  # and KV head
    stride_q_h,
    stride_q_q,
    HG: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """What `_project_frames` computes with, as it lies in memory: (queries and their partners of a
    turn [1, ROWS, BLOCK_D], turns a position [BLOCK_D], basis [BLOCK_D, BLOCK_R], its scale
    [BLOCK_R], the mean [BLOCK_D])."""
    basis_ptr, scale_ptr, mean_ptr, freqs_ptr = codec
    R: tl.constexpr = _bits.rank_of(GROUPS)
    d = tl.arange(0, max(16, triton.next_power_of_2(D)))
    partner = tl.where(d < PAIRS, d + PAIRS, tl.where(d < 2 * PAIRS, d - PAIRS, d))
    if PAIRS % 8 == 0:
        partner = tl.max_contiguous(tl.multiple_of(partner, 8), 8)
    freqs = tl.load(freqs_ptr + tl.minimum(d, partner), mask=d < 2 * PAIRS, other=0)
    at = q_ptr + (row % HG).to(tl.int64) * stride_q_h + (row // HG).to(tl.int64) * stride_q_q
    mask = live[None, :, None] & (d < D)[None, None, :]
    q = tl.load(at[None, :, None] + d[None, None, :], mask=mask, other=0.0)
    other = tl.load(at[None, :, None] + partner[None, None, :], mask=mask, other=0.0)
    r = _component(max(32, triton.next_power_of_2(R)))
    scale = tl.load(scale_ptr + codec_row * R + r, mask=r < R, other=0.0)
    mean = tl.load(mean_ptr + codec_row * D + d, mask=d < D, other=0.0)
    tl.debug_barrier()  # all of these are on their way before anything waits for the basis
    at = basis_ptr + codec_row * (R * D) + r[None, :] * D + d[:, None]
    basis = tl.load(at, mask=(d < D)[:, None] & (r < R)[None, :], other=0)
    return q, other, freqs, basis, scale, mean


@triton.jit
def _component(BLOCK_R: tl.constexpr):
    """The component of a product's column, [BLOCK_R]: see `_by_thread`."""
    column = tl.arange(0, BLOCK_R)
    return column // 16 * 16 + column // 2 % 4 * 4 + column // 8 % 2 * 2 + column % 2


@triton.jit
def _project_frames(
    loaded,  # by _load_for_projection
    live,  # [ROWS]
    u_ptr,
    u_row,  # u_row + frame is the frame's row of u
    first,
    end,
    softmax_scale,
    FRAME: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUPS: tl.constexpr,
    M: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """The projected queries of frames first .. end - 1, in log2 units, M rows (a frame and a query)
    at a time. u: a frame's int8 [ceil(R/32), 2 ROWS, 32] (query, hi or lo; 32 components in the
    order of `_side_by_side`, by their weight), as lanes take them: of 16 columns, 8 components of
    n and of n + 8 side by side; then float32 [ROWS, 2]: their unit, and the bias: the mean's score
    and the sum of u times zeros."""
    R: tl.constexpr = _bits.rank_of(GROUPS)
    STEPS: tl.constexpr = (R + 31) // 32
    FRAMES: tl.constexpr = M // ROWS  # at a time
    E: tl.constexpr = min(2, ROWS // 4)  # eights of columns side by side
    q, other, freqs, basis, scale, mean = loaded
    BLOCK_D: tl.constexpr = basis.shape[0]
    BLOCK_R: tl.constexpr = basis.shape[1]
    d = tl.arange(0, BLOCK_D)
    sign = tl.where(d < PAIRS, 1.0, tl.where(d < 2 * PAIRS, -1.0, 0.0))  # of a turn backwards
    q, other = q.to(tl.float32), other.to(tl.float32) * sign[None, None, :]
    # In units in which a row's longest pair is FULL: one unit at any angle.
    largest = tl.sqrt(tl.max(q * q + other * other, 2))  # [1, ROWS]
    full = tl.where(largest > 0.0, FULL / largest, 0.0)[:, :, None]
    q, other = q * full, other * full
    local = tl.arange(0, M) // ROWS
    row = tl.arange(0, M) % ROWS
    # Good to 2**-32 turns a frame.
    ahead = tl.arange(0, FRAMES)[:, None] * ((FRAME * freqs) >> 32).to(tl.int32)[None, :]
    column = tl.arange(0, BLOCK_R)
    weight, zero = _bits.weights_and_zeros(_component(BLOCK_R), GROUPS)
    zero = _by_thread(zero[None, :], 1, BLOCK_R)
    scale = scale * softmax_scale * weight
    mean *= softmax_scale
    for start in range(first, end, FRAMES):
        phase = ((freqs * FRAME * start) >> 32).to(tl.int32)  # exact modulo a turn
        cos, sin = _math.cos_sin_of_phase(phase[None, None, :] + ahead[:, None, :], NATIVE)
        turned = q * cos + other * sin  # [FRAMES, ROWS, BLOCK_D]
        bias = tl.sum(turned * mean[None, None, :], 2)  # [FRAMES, ROWS], in units of 1 / full
        hi, lo, _ = _split_int16(tl.reshape(turned, [M, BLOCK_D]), NATIVE)
        dots = tl.dot(hi, basis, out_dtype=tl.int32) * 256 + tl.dot(lo, basis, out_dtype=tl.int32)
        u = dots.to(tl.float32) * scale[None, :]  # [M, R], in units of 1 / full
        top = tl.max(tl.abs(u), 1)
        u = _by_thread(u * tl.where(top > TINY, FULL / top, 0.0)[:, None], M, BLOCK_R)
        hi, lo, value = _split_int16(u, NATIVE)
        full_unit = largest * (1.0 / FULL)  # [1, ROWS]
        unit = tl.reshape(tl.reshape(top * (1.0 / FULL), [FRAMES, ROWS]) * full_unit, [M])
        bias = tl.reshape(bias * full_unit, [M]) + tl.sum(value * zero, 1) * unit
        stored = tl.reshape(tl.broadcast_to(live[None, :], [FRAMES, ROWS]), [M]) & (
            start + local < end
        )
        at = u_ptr + (u_row + (start + local)) * (ROWS * (64 * STEPS + 8))
        affine_at = (at + (64 * STEPS * ROWS + row * 8)).to(tl.pointer_type(tl.float32))
        affine_at = affine_at[:, None] + tl.arange(0, 2)[None, :]
        tl.store(affine_at, tl.join(unit, bias), mask=stored[:, None])
        u_at = (at + (row // 8 * 512 + row // 4 % E * 8 + row % 4 * (64 * E)))[:, None]
        nth = column // 32 * (64 * ROWS) + column % 32 // 8 * (8 * E) + column % 8
        u_at += tl.max_contiguous(tl.multiple_of(nth, 8), 8)[None, :]
        stored = stored[:, None] & (column < STEPS * 32)[None, :]
        u_at = u_at[:, :, None] + (tl.arange(0, 2) * (32 * E))[None, None, :]
        tl.store(u_at, tl.join(hi, lo), mask=stored[:, :, None])


@triton.jit
def _prefetch(
    ptr, stride_page, table_ptr, page, end, W: tl.constexpr, P: tl.constexpr, GROUPS: tl.constexpr
):
    """Ask L2 for one side of W P pages from `page` on, the last before `end` for those after it:
    threads of a warp that want the same ask once. From sm_90, which wants addresses that are
    multiples of 16: the one before will do."""
    nth = tl.arange(0, 32 * W) // 32 * P + tl.arange(0, 32 * W) % P
    number = tl.load(table_ptr + tl.minimum(page + nth, end - 1)).to(tl.int64)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r",
        [(ptr.to(tl.int64) + number * stride_page) & -16, _bits.page_bytes(GROUPS)],
        tl.int32, False, 1,
    )  # fmt: skip


@triton.jit
def _page_scores(page_ptr, u_ptr, ROWS: tl.constexpr, GROUPS: tl.constexpr, NATIVE: tl.constexpr):
    """Scores of the T tokens that each of W warps works on, in log2 units, float32 [W, T, ROWS], of
    pages at page_ptr [W T / 64]; u_ptr [W]: u of their frames."""
    W: tl.constexpr = u_ptr.shape[0]
    T: tl.constexpr = 64 * page_ptr.shape[0] // W
    R: tl.constexpr = _bits.rank_of(GROUPS)
    STEPS: tl.constexpr = (R + 31) // 32
    N: tl.constexpr = 2 * ROWS
    columns, blocks = _columns(page_ptr, GROUPS, True), ()
    for i in tl.static_range(R // 16):
        blocks = blocks + (_block(columns[_bits.place_of(GROUPS, i)[0]], GROUPS, i, True, NATIVE),)
    if R % 32:
        blocks = blocks + (tl.zeros([page_ptr.shape[0], 64, 16], dtype=tl.int8),)
    dots = tl.zeros([W, T, N], dtype=tl.int32)
    for step in tl.static_range(STEPS):
        u = _load_rows(u_ptr + step * (32 * N), 32 * N, 512)
        u = tl.reshape(u, [W, max(1, N // 16), 8, 4, min(2, N // 8), 8])
        u = tl.reshape(tl.permute(u, [0, 3, 5, 1, 4, 2]), [W, 32, N])
        x = tl.reshape(_side_by_side(blocks[2 * step], blocks[2 * step + 1]), [T // 64, W, 64, 32])
        x = tl.reshape(tl.permute(x, [1, 0, 2, 3]), [W, T, 32])
        dots += tl.dot(x, u, out_dtype=tl.int32)
    hi, lo = tl.split(tl.reshape(dots, [W, T, ROWS, 2]))
    affine = (u_ptr + STEPS * (32 * N)).to(tl.pointer_type(tl.float32))
    unit, bias = tl.split(tl.reshape(_load_rows(affine, 2 * ROWS, 16), [W, ROWS, 2]))
    return (hi * 256 + lo).to(tl.float32) * unit[:, None, :] + bias[:, None, :]


@triton.jit
def _add_weighted(acc, old, y, w_both):
    """acc [W, 16, ROWS] times old [W, ROWS], and y [W T / 64, 16, 64] times the weights' int8 parts
    [W, T, 2 ROWS]."""
    W: tl.constexpr = acc.shape[0]
    ROWS: tl.constexpr = acc.shape[2]
    T: tl.constexpr = w_both.shape[1]
    y = tl.permute(tl.reshape(y, [T // 64, W, 16, 64]), [1, 2, 0, 3])
    y = tl.reshape(y, [W, 16, T])
    dots = tl.dot(y, w_both, out_dtype=tl.int32)
    hi, lo = tl.split(tl.reshape(dots, [W, 16, ROWS, 2]))
    return acc * old[:, None, :] + (hi * 256 + lo).to(tl.float32)


@triton.jit
def _in_steps(acc, GROUPS: tl.constexpr, i: tl.constexpr):
    """Block i of sums of weighted integers as coefficients in steps; acc's last block is the sum of
    the weights."""
    R: tl.constexpr = _bits.rank_of(GROUPS)
    return (acc[i] + _bits.field_zero(GROUPS, i) * acc[R // 16]) * _bits.field_weight(GROUPS, i)


@triton.jit
def _join(unit, l, other_unit, other_l):
    """Units and sums of weights of two states as of one."""
    m = tl.maximum(unit, other_unit)
    low = tl.where(m == float("-inf"), 0.0, m)
    return m, l * tl.exp2(unit - low) + other_l * tl.exp2(other_unit - low)


@triton.jit
def _at_threads(W: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr):
    """Where 16 components of a tile of W warps lie in [W, ROWS, R]: [4, 8, W, 2, ROWS / 4], as the
    threads hold them: a warp's four by eight lanes, and the numbers of a lane."""
    row = tl.arange(0, 4)[:, None] + 4 * tl.arange(0, ROWS // 4)[None, :]
    component = tl.max_contiguous(tl.arange(0, 8), 1)[:, None] + 8 * tl.arange(0, 2)[None, :]
    at = (tl.arange(0, W) * (ROWS * R))[None, None, :, None, None]
    return at + row[:, None, None, None, :] * R + component[None, :, None, :, None]


@triton.jit
def _store_split(
    acc, unit_warp, l_warp, warps_ptr, c_ptr, lse_ptr, out, live, GROUPS: tl.constexpr,
):  # fmt: skip
    """The warps' states together: lse, and the output in steps of the V basis. acc, its last block
    the sum of weights, counts these in units of 1 / FULL.

    warps [W, ROWS, R] float32: what each warp adds to the output."""
    R: tl.constexpr = _bits.rank_of(GROUPS)
    W: tl.constexpr = unit_warp.shape[0]
    ROWS: tl.constexpr = unit_warp.shape[1]
    m, l = tl.reduce((unit_warp, l_warp), 0, _join)
    l *= FULL
    tl.store(lse_ptr + out, _math.natural_lse(m, l), mask=live)
    share = tl.exp2(unit_warp - tl.where(m == float("-inf"), 0.0, m)[None, :])
    share *= tl.where(l == 0.0, 0.0, 1.0 / l)[None, :]
    # By way of memory, as no thread waits for another until all have stored.
    at = warps_ptr + _at_threads(W, ROWS, R)
    for i in tl.static_range(R // 16):
        x = _in_steps(acc, GROUPS, i) * share[:, None, :]
        x = tl.permute(tl.reshape(x, [W, 2, 8, ROWS // 4, 4]), [4, 2, 0, 1, 3])
        tl.store(at + i * 16, x)
    tl.debug_barrier()  # a thread reads what others wrote
    row = tl.arange(0, ROWS)
    r = tl.arange(0, triton.next_power_of_2(R))
    at = warps_ptr + row[:, None] * R + r[None, :]
    x = tl.load(at, mask=(r < R)[None, :])
    for n in tl.static_range(1, W):
        x += tl.load(at + n * (ROWS * R), mask=(r < R)[None, :])
    mask = live[:, None] & (r < R)[None, :]
    tl.store(c_ptr + out[:, None] * R + r[None, :], x, mask=mask)


@triton.jit
def _pages_split(
    q_ptr,  # the sequence's and KV head's first query
    codec, codec_row,  # of `_load_for_projection`
    k_ptr,  # pages of the KV head
    v_ptr,
    table_ptr,  # the sequence's row
    u_ptr, c_ptr, lse_ptr, warps_ptr, seq_len,
    row,  # [ROWS], query * HG + head
    Q,
    state,  # of c and lse, the first head's
    split, splits, u_row, softmax_scale, stride_q_h, stride_q_q, stride_k_page, stride_v_page,
    HG: tl.constexpr, SHAPE: tl.constexpr, K_GROUPS: tl.constexpr, V_GROUPS: tl.constexpr,
    EXACT: tl.constexpr, TILE: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    """One split of the pages of one sequence and KV head: its state over ROWS queries. The queries
    are projected for the frames of the split first; then W warps work on P pages each at once, and
    join their states at the end.

    c [.., RV] float32: the output in steps of the V basis, lse [..]. u: see `_project_frames`.
    Constants: see `_attend_spectral_kernel`.
    """
    PAGES: tl.constexpr = SHAPE[2] // 64  # of a frame
    ROWS: tl.constexpr = TILE[0]
    W: tl.constexpr = TILE[2]
    P: tl.constexpr = TILE[3]
    NATIVE: tl.constexpr = PATH[2]
    AHEAD: tl.constexpr = PATH[0] and (W > 4 or ROWS > 4)  # where L2 holds all programs' next turn
    EARLY: tl.constexpr = ROWS > 8 and P == 2  # registers hold V from the scores on
    UNIT: tl.constexpr = ROWS * ((_bits.rank_of(K_GROUPS) + 31) // 32 * 64 + 8)  # bytes of a frame
    page, end, stop = _math.row_share(seq_len, split, splits, EXACT[0], EXACT[1], W * P)
    u_row -= page // PAGES
    live = row < Q * HG
    out = (state + row % HG) * Q + row // HG
    if page < end:
        loaded = _load_for_projection(
            q_ptr, row, live, codec, codec_row, stride_q_h, stride_q_q, HG, SHAPE[0], SHAPE[1],
            K_GROUPS,
        )  # fmt: skip
        if PATH[0]:
            _prefetch(k_ptr, stride_k_page, table_ptr, page, end, W, P, K_GROUPS)
            _prefetch(v_ptr, stride_v_page, table_ptr, page, end, W, P, V_GROUPS)
        _project_frames(
            loaded, live, u_ptr, u_row, page // PAGES, tl.cdiv(end, PAGES), softmax_scale,
            SHAPE[2], ROWS, SHAPE[1], K_GROUPS, TILE[1], NATIVE,
        )  # fmt: skip
        tl.debug_barrier()  # a thread reads what others wrote
        nth = tl.arange(0, W * P) % W * P + tl.arange(0, W * P) // W  # pages in the warps' order
        m_warp = tl.full([W, ROWS], float("-inf"), dtype=tl.float32)
        unit_warp = m_warp
        l_lane = tl.zeros([W, 8, ROWS], dtype=tl.float32)
        ones = tl.full([W * P, 16, 64], 1, dtype=tl.int8)
        acc = ()
        for _ in tl.static_range(_bits.rank_of(V_GROUPS) // 16 + 1):
            acc = acc + (tl.zeros([W, 16, ROWS], dtype=tl.float32),)
        for start in range(page, end, W * P):
            # [W P]; for pages after the last, whose tokens are not seen, the last is read again.
            number = tl.load(table_ptr + tl.minimum(start + nth, end - 1)).to(tl.int64)
            j = start + tl.arange(0, W) * P  # [W], the first page of a warp
            s = _page_scores(
                k_ptr + number * stride_k_page,
                u_ptr + (u_row + tl.minimum(j, end - 1) // PAGES) * UNIT, ROWS, K_GROUPS, NATIVE,
            )  # fmt: skip
            if EARLY:
                v = _columns(v_ptr + number * stride_v_page, V_GROUPS, False)
            if AHEAD:  # no load is moved past it
                _prefetch(k_ptr, stride_k_page, table_ptr, start + W * P, end, W, P, K_GROUPS)
            if (start * 64 < EXACT[0]) | (start + W * P >= end):  # elsewhere all are seen
                # Counted from the sinks, by eights: a lane has one token of each.
                position = (j * 64 - EXACT[0])[:, None] + tl.arange(0, 8)[None, :]
                position = position[:, None, :] + tl.arange(0, 8 * P)[None, :, None] * 8
                seen = position.to(tl.uint32) < (stop - EXACT[0]).to(tl.uint32)  # negative: large
                s = tl.where(tl.reshape(seen, [W, 64 * P, 1]), s, float("-inf"))
            # Weights in units of 1 / FULL of the P pages' largest, or of 2**-32 of the largest so
            # far. The difference first: scores may be 1e7, and the largest weight must be FULL
            # exactly enough to fit its int8 parts.
            m_page = tl.max(s, 1)
            m_warp = tl.maximum(m_warp, m_page)
            unit = tl.maximum(m_page, m_warp - 32.0)
            low = tl.where(unit == float("-inf"), 0.0, unit)
            p = tl.exp2(s - low[:, None, :])
            old = tl.exp2(unit_warp - low)
            unit_warp = unit
            # Tokens of a lane: across lanes once, at the end.
            l_lane = l_lane * old[:, None, :] + tl.sum(tl.reshape(p, [W, 8 * P, 8, ROWS]), 1)
            w_hi, w_lo, _rounded = _split_int16(p * FULL, NATIVE)
            w_both = tl.reshape(tl.join(_by_eights(w_hi), _by_eights(w_lo)), [W, 64 * P, 2 * ROWS])
            if not EARLY:
                v = _columns(v_ptr + number * stride_v_page, V_GROUPS, False)
            rescaled = ()
            for i in tl.static_range(_bits.rank_of(V_GROUPS) // 16):
                y = _block(v[_bits.place_of(V_GROUPS, i)[0]], V_GROUPS, i, False, NATIVE)
                rescaled = rescaled + (_add_weighted(acc[i], old, y, w_both),)
            acc = rescaled + (_add_weighted(acc[len(rescaled)], old, ones, w_both),)
            if AHEAD:
                _prefetch(v_ptr, stride_v_page, table_ptr, start + W * P, end, W, P, V_GROUPS)
        l_warp = tl.sum(l_lane, 1)
        _store_split(acc, unit_warp, l_warp, warps_ptr, c_ptr, lse_ptr, out, live, V_GROUPS)
    else:
        tl.store(lse_ptr + out, tl.full([ROWS], float("-inf"), dtype=tl.float32), mask=live)


@triton.jit(do_not_specialize=["u_frames", "B", "programs"])
def _attend_spectral_kernel(
    q_ptr,
    codec,  # k_basis, k_scale, k_mean, freqs
    k_pages_ptr,
    v_pages_ptr,
    k_exact_ptr,
    v_exact_ptr,
    tables,  # block_table, seq_lens, codec_ids, seq_ids
    states,  # u, c, lse, exact o, exact lse, warps
    u_frames,
    B,
    programs,  # of `row_splits`
    Q,
    softmax_scale,
    strides_q,  # (b, h, q)
    strides_pages,  # (page and g of K, page and g of V, row of the block table)
    strides_exact,  # (row, g, slot of K, row, g, slot of V)
    HG: tl.constexpr,
    SHAPE: tl.constexpr,  # (D, PAIRS, FRAME)
    K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    EXACT: tl.constexpr,  # (SINKS, WINDOW, RING, SPLITS, BLOCK_M, BLOCK_N); RING 0: pages alone
    TILE: tl.constexpr,  # (ROWS, M, W, P, FEW, BLOCK_B)
    PATH: tl.constexpr,  # (OVERLAP, AFTER_APPEND, NATIVE)
):
    """The splits of all rows' pages (`_pages_split`), then their exact tokens (`window_split`):
    they wait for what is appended, take little, and fill the card while the last splits end."""
    ROWS: tl.constexpr = TILE[0]
    TURN: tl.constexpr = TILE[2] * TILE[3]
    BLOCK_B: tl.constexpr = TILE[5]
    block_table_ptr, seq_lens_ptr, codec_ids_ptr, seq_ids_ptr = tables
    u_ptr, c_ptr, lse_ptr, exact_o_ptr, exact_lse_ptr, warps_ptr = states
    if PATH[0]:  # `_finish_spectral_kernel` may start once all programs of this one have
        tl.extra.cuda.gdc_launch_dependents()
    g, G = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    exact_programs = 0
    if EXACT[2] > 0:
        exact_programs = B * tl.cdiv(Q * HG, EXACT[4]) * EXACT[3]
    exact_first = tl.num_programs(1) - exact_programs
    blocks = tl.cdiv(Q * HG, ROWS)
    program = tl.program_id(1) // blocks
    if BLOCK_B == 1:
        few = tl.cdiv(programs * TILE[4], 6)
        if (program >= few) & (few * blocks < exact_first):
            # A long row alone has work for this one; a short one's exact tokens come here.
            splits_of = _math.row_splits(seq_lens_ptr, B, programs, EXACT, TURN, TILE[4], BLOCK_B)
            exact_first = tl.minimum(exact_first, tl.maximum(tl.sum(splits_of, 0), few) * blocks)
    exact_program = tl.program_id(1) - exact_first
    if exact_program < 0:
        block = tl.program_id(1) % blocks
        splits_of = _math.row_splits(seq_lens_ptr, B, programs, EXACT, TURN, TILE[4], BLOCK_B)
        b, split, splits = _math.row_of_program(splits_of, program, B, BLOCK_B)
        if split < splits:
            row = block * ROWS + tl.arange(0, ROWS)
            nth = (program.to(tl.int64) * blocks + block) * G + g
            warps_ptr += nth * (TILE[2] * ROWS * _bits.rank_of(V_GROUPS))
            _pages_split(
                q_ptr + b * strides_q[0] + g * HG * strides_q[1], codec,
                _math.row_of(codec_ids_ptr, b, 0) * G + g,
                k_pages_ptr + g * strides_pages[1], v_pages_ptr + g * strides_pages[3],
                block_table_ptr + b * strides_pages[4], u_ptr, c_ptr, lse_ptr,
                warps_ptr, tl.load(seq_lens_ptr + b), row, Q, (program * G + g) * HG, split, splits,
                nth * u_frames, softmax_scale, strides_q[1], strides_q[2], strides_pages[0],
                strides_pages[2], HG, SHAPE, K_GROUPS, V_GROUPS, EXACT, TILE, PATH,
            )  # fmt: skip
    elif EXACT[2] > 0:
        if exact_program < exact_programs:
            split = exact_program % EXACT[3]
            block = exact_program // EXACT[3] % tl.cdiv(Q * HG, EXACT[4])
            b = (exact_program // EXACT[3] // tl.cdiv(Q * HG, EXACT[4])).to(tl.int64)
            exact_row = _math.row_of(seq_ids_ptr, b, b)
            if PATH[1]:  # the newest tokens are written by the launch before
                tl.extra.cuda.gdc_wait()
            window_split(
                q_ptr, k_exact_ptr, v_exact_ptr, exact_o_ptr, exact_lse_ptr,
                tl.load(seq_lens_ptr + b), exact_row, split, block, b, g, Q, G, softmax_scale,
                strides_q, strides_exact, HG, SHAPE[0], EXACT, True, PATH[2],
            )  # fmt: skip


@triton.jit(do_not_specialize=["B", "programs"])
def _finish_spectral_kernel(
    c_ptr, lse_ptr, exact_ptr, exact_lse_ptr, basis_ptr, scale_ptr, seq_lens_ptr, codec_ids_ptr,
    out_ptr, out_lse_ptr, B, programs, Q, HG: tl.constexpr, D: tl.constexpr, RV: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TURN: tl.constexpr, FEW: tl.constexpr, BLOCK_B: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    """Join the states of the splits of BLOCK_H queries of a KV head with those of their exact
    tokens, in a fixed order, BLOCK_D dimensions a program; the V basis is applied once.

    EXACT: (SINKS, WINDOW, SPLITS). BLOCK_N: splits at a time, the first of these for a row that has
    no more. PATH: (OVERLAP, NATIVE)."""
    BLOCK_R: tl.constexpr = max(16, triton.next_power_of_2(RV))
    blocks = tl.cdiv(Q * HG, BLOCK_H)
    g, G = tl.program_id(1), tl.num_programs(1)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    h = tl.program_id(0) % blocks * BLOCK_H  # query * HG + head
    if BLOCK_H > 1:  # the last one again where there are not as many; else a dimension less
        h = tl.minimum(h + tl.arange(0, BLOCK_H), Q * HG - 1)
    query = (g * HG + h % HG) * Q + h // HG
    row = b * (G * HG * Q) + query  # [BLOCK_H]
    codec_row = _math.row_of(codec_ids_ptr, b, 0) * G + g.to(tl.int64)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    # A thread gets 4 bytes of many rows, not 16 of a few: sums over rows need fewer others.
    basis_at = basis_ptr + (codec_row * RV + r)[:, None] * D + tl.max_contiguous(d, 4)[None, :]
    inside = (r < RV)[:, None] & (d < D)[None, :]
    scale = tl.load(scale_ptr + codec_row * RV + r, mask=r < RV, other=0.0)
    if BLOCK_D <= 32:
        basis = tl.load(basis_at, mask=inside, other=0)  # [BLOCK_R, BLOCK_D]
    splits_of = _math.row_splits(seq_lens_ptr, B, programs, EXACT, TURN, FEW, BLOCK_B)
    rows = tl.arange(0, BLOCK_B)
    first = tl.sum(tl.where(rows < b, splits_of, 0), 0)
    end = first + tl.sum(tl.where(rows == b, splits_of, 0), 0)
    if PATH[0]:  # until here nothing was read that the launch before writes
        tl.extra.cuda.gdc_wait()
    # All is asked for at once: what an empty split never wrote, NaN perhaps, is chosen away later.
    BLOCK_E: tl.constexpr = max(1, triton.next_power_of_2(EXACT[2]))
    e = tl.reshape(tl.arange(0, BLOCK_E), [BLOCK_E] if BLOCK_H == 1 else [BLOCK_E, 1])
    at = row * EXACT[2] + e
    exact_lse = tl.load(exact_lse_ptr + at, mask=e < EXACT[2], other=float("-inf"))
    mask = tl.expand_dims(e < EXACT[2], -1) & (d < D)
    y = tl.load(exact_ptr + tl.expand_dims(at, -1) * D + d, mask=mask, other=0.0)
    total = (query * 0).to(tl.float32)
    m = total + float("-inf")
    c = tl.expand_dims(total, -1) + tl.zeros([BLOCK_R], dtype=tl.float32)
    for i in tl.static_range(len(BLOCK_N)):
        stop = tl.where((end - first <= BLOCK_N[i]) | (i + 1 == len(BLOCK_N)), end, first)
        for start in tl.range(first, stop, BLOCK_N[i], num_stages=1):
            n = tl.arange(0, BLOCK_N[i])
            n = start + tl.reshape(n, [BLOCK_N[i]] if BLOCK_H == 1 else [BLOCK_N[i], 1])
            x_at = n.to(tl.int64) * (G * HG * Q) + query  # [BLOCK_N, BLOCK_H]
            lse = tl.load(lse_ptr + x_at, mask=n < end, other=float("-inf"))
            # As rows of a matrix, of which a warp gets all splits of a query.
            live = start + tl.arange(0, BLOCK_N[i] * BLOCK_H) // BLOCK_H < end
            x_at = c_ptr + tl.reshape(x_at, [BLOCK_N[i] * BLOCK_H, 1]) * RV + r
            x = tl.load(x_at, mask=live[:, None] & (r < RV), other=0.0)
            if BLOCK_H > 1:
                x = tl.reshape(x, [BLOCK_N[i], BLOCK_H, BLOCK_R])
            top = tl.maximum(m, tl.max(lse, 0))
            low = tl.where(top == float("-inf"), 0.0, top)
            old = tl.exp(m - low)
            share = tl.exp(lse - low)
            m, total = top, total * old + tl.sum(share, 0)
            share = tl.expand_dims(share, -1)
            c = c * tl.expand_dims(old, -1) + tl.sum(tl.where(share > 0.0, share * x, 0.0), 0)
        first = stop
    top = tl.maximum(m, tl.max(exact_lse, 0))
    low = tl.where(top == float("-inf"), 0.0, top)
    old = tl.exp(m - low)
    w = tl.exp(exact_lse - low)
    m, total = top, total * old + tl.sum(w, 0)
    if BLOCK_D > 32:  # it took no registers until now; many programs hide what this waits
        basis = tl.load(basis_at, mask=inside, other=0)
    c = c * scale * tl.expand_dims(old, -1)
    y = tl.where(tl.expand_dims(w, -1) > 0.0, tl.expand_dims(w, -1) * y, 0.0)
    if BLOCK_H == 1:
        o = tl.sum(c[:, None] * basis.to(tl.float32), 0) + tl.sum(y, 0)
    else:
        o = tl.sum(y, 0)
        o += tl.trans(_math.dot_int8_f32(tl.trans(basis), tl.trans(c), True, PATH[1]))
    if tl.program_id(2) == 0:
        low = tl.where(m == float("-inf"), 0.0, m)
        tl.store(out_lse_ptr + row, low + tl.log(total))  # log(0) = -inf: an empty state
    total = tl.expand_dims(total, -1)
    o = tl.where(total == 0.0, 0.0, o / total)
    tl.store(out_ptr + tl.expand_dims(row, -1) * D + d, o, mask=d < D)


WARPS = 4  # of a program of `_attend_spectral_kernel`; twice as many where sums take registers
MAX_SPLITS = 128  # of a row, where rows are of one length
MAX_ROWS = 16  # queries of a KV head that a program serves


@dataclass(frozen=True)
class Plan:
    """How a call is launched: a pure function of shapes and the card, see `plan_launch`."""

    rows: int  # queries of a KV head a program serves, padded
    blocks: int  # programs for the queries of a KV head
    m: int  # rows of a projection at once
    warps: int  # of a program
    pages: int  # that a warp works on at once
    programs: int  # that share out all rows' pages, a KV head and block of queries
    few: int  # sixths of them that run where all would take fewer pages than LITTLE
    block_b: int  # rows whose lengths are read at once
    states: int  # splits of all rows' pages, at most
    splits: tuple[int, int]  # of a row that are joined at once: where these are few, or more
    frames: int  # that queries are projected for: of a split at most, or of a row
    window: tuple[int, int, int]  # window.window_tile, no SPLITS without exact tokens
    sizes: list[int]  # bytes of u, c, lse, exact o, exact lse, warps, in a workspace
    matrix: bool
    options: dict[str, int | None]  # num_warps, num_stages, maxnreg


def plan_launch(
    layout: PageLayout,
    batch: int,
    kv_heads: int,
    group: int,
    queries: int,
    max_pages: int,
    slots: int,
    device: torch.device,
    num_splits: int | None = None,
    matrix_units: bool | None = None,
) -> Plan:
    """The launch of `attend_spectral` for a capacity of max_pages a row: no length decides it.

    As many programs as are resident, or some rounds of them; where these would take fewer pages
    than LITTLE, fewer, as a program's start and end then cost as much as its pages, and more with
    others beside it: at most three a multiprocessor, two of 16 queries, about one of a single row
    of fewer. A row that gets n programs, rounded down, has less than twice the pages of one of all.
    """
    matrix = _launch.has_matrix_units(device) if matrix_units is None else matrix_units
    rows = min(MAX_ROWS, _launch.next_power_of_2(group * queries))
    large = layout.head_dim > 128 or layout.k.rank > 128 or layout.v.rank > 128
    if matrix:
        rows = max(4, rows)  # hi and lo of 4 queries are the 8 columns of a dot
        # Eight pages at once, if registers hold their scores beside the sums: two a warp, or, where
        # sums take registers, more warps.
        warps = 2 * WARPS if rows <= 8 and large else WARPS
        twice = rows * layout.v.rank <= 1536 and layout.frame % (2 * PAGE_SIZE) == 0
        pages = 2 if twice and not large else 1
        # Programs a multiprocessor: as many as their registers allow without spills.
        resident = 2 * WARPS // warps if large else {4: 4, 8: 3}.get(rows, 2)
        # A large basis leaves four warps no registers for more rows, but where two programs run.
        wide = max(layout.k.rank, layout.head_dim) > 64
        m = 64 if rows == MAX_ROWS and not large else 16 if wide and warps == WARPS else 32
        most_registers = 65536 // (32 * warps * resident) // 8 * 8 if resident > 2 else None
    else:  # attention_sm75.py: a warp and 4 queries a program
        rows, warps, pages, m, resident = 4, 1, 1, 4, 16
        # Else the compiler aims at fewer on cards that hold more, and loads late.
        most_registers = None if large else 128
    options = {"num_stages": 1, "num_warps": warps, "maxnreg": most_registers}
    blocks = _launch.cdiv(group * queries, rows)
    turn, cores = warps * pages, _launch.multiprocessors(device)
    turns = _launch.cdiv(max_pages, turn)
    programs = one_round = 2 * batch
    if device.type == "cuda":
        programs = one_round = max(1, resident * cores // (kv_heads * blocks))
        # Rows of one length share programs evenly: as many rounds of them as leave few idle.
        rows_of = max(1, batch)
        rounds = (n for n in (1, 2, 3) if n * programs // rows_of * rows_of >= 0.85 * n * programs)
        programs *= next(rounds, 1)
    programs = num_splits * batch if num_splits else programs
    few = 6
    if matrix and num_splits is None and resident > 1:
        few = 2 if batch == 1 and rows <= 8 and not large else 4 if large or resident == 4 else 6
    least = max(1, programs * few // 6)
    # Kernels are compiled for few batches: for those that an engine captures, powers of two.
    rounded = _launch.next_power_of_2(batch)
    block_b = 1 if batch == 1 else 32 if batch <= 32 else max(256, rounded)
    most = programs if rounded * turns * turn >= LITTLE.value * programs else least
    states = min(most + batch - 1, batch * turns)
    # Of a row: where it is short or rows are of one length, and at most, or in some rounds.
    many = _launch.cdiv(min(most + rounded - 1, rounded * turns), rounded)
    many = min(MAX_SPLITS, max(16, _launch.next_power_of_2(many)))
    short = _launch.next_power_of_2((least if batch == 1 else one_round) // rounded)
    splits = min(many, short), many
    share = _launch.cdiv(min(batch * turns, _launch.cdiv(LITTLE.value * programs, turn)), least)
    share = min(turns, 2 * max(share, _launch.cdiv(batch * turns, programs))) * turn
    window = (0, 16, 16)
    if slots:
        room = max(1, 4 * cores // (rounded * kv_heads))
        window = window_tile(group, queries, slots, matrix, room)
    if matrix:
        frames = _launch.cdiv(share * PAGE_SIZE, layout.frame) + 1
        served = states * blocks * kv_heads * rows
        projected = served * frames * (_launch.cdiv(layout.k.rank, 32) * 64 + 8)
        joined = served * warps * layout.v.rank * 4
    else:
        frames = _launch.cdiv(max_pages * PAGE_SIZE, layout.frame)
        projected = batch * blocks * kv_heads * frames * operand_words(layout.k.rank) * 4
        joined = 0
    cold = states * kv_heads * group * queries  # states of pages, and of exact tokens
    exact = window[0] * batch * kv_heads * group * queries
    parts = [projected, cold * layout.v.rank * 4, cold * 4, exact * layout.head_dim * 4, exact * 4]
    sizes = [_launch.cdiv(size, 16) * 16 for size in (*parts, joined)]
    numbers = (rows, blocks, m, warps, pages, programs, few, block_b, states, splits, frames)
    return Plan(*numbers, window, sizes, matrix, options)


def attend_workspace(
    codec: Codec,
    *,
    batch: int,
    query_heads: int,
    queries: int,
    max_pages: int,
    slots: int = 0,
    device: torch.device | None = None,
) -> int:
    """Bytes of the workspace of `attend_spectral` for these shapes, launched by default.

    Args:
        batch, query_heads, queries: B, H, Q.      max_pages: columns of the block table.
        slots: of k_exact (sinks + ring), 0 for pages alone.      device: default the codec's.
    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    on, heads = check_codec(codec), codec.kv_heads
    check_least(batch=(batch, 0), queries=(queries, 0), max_pages=(max_pages, 0), slots=(slots, 0))
    check_least(query_heads=(query_heads, 0))
    if query_heads % heads:
        raise ValueError(f"query_heads: expected a multiple of {heads}, got {query_heads}")
    if not batch * query_heads * queries:
        return 0
    shape = (batch, heads, query_heads // heads, queries, max_pages, slots)
    return sum(plan_launch(codec.layout, *shape, device or on).sizes)


def _check_attend(
    q, k_pages, v_pages, codec, block_table, seq_lens, sinks, window, exact, seq_ids, codec_ids,
) -> int:  # fmt: skip
    """Slots of the exact tokens."""
    check_pages("k_pages", k_pages, codec, "k")
    check_pages("v_pages", v_pages, codec, "v")
    check_tensor("v_pages", v_pages, shape=(k_pages.shape[0], None, None))
    device, heads = k_pages.device, codec.kv_heads
    check_queries(q, heads, codec.layout.head_dim, device)
    _launch.check_bf16("q", q)
    check_table(block_table, seq_lens, q.shape[0], device)
    check_ids(q.shape[0], device, codec_ids=codec_ids, seq_ids=seq_ids)
    check_least(sinks=(sinks, 0), window=(window, 0))
    if exact is None:
        return 0
    if len(exact) != 2:
        raise ValueError(f"exact: expected (k_exact, v_exact), got {len(exact)} things")
    return sinks + check_window(q, exact[0], exact[1], heads, sinks, window, seq_ids)


def attend_spectral(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    codec: Codec,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sinks: int = 0,
    window: int = 0,
    exact: tuple[torch.Tensor, torch.Tensor] | None = None,
    seq_ids: torch.Tensor | None = None,
    codec_ids: torch.Tensor | None = None,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    num_splits: int | None = None,
    matrix_units: bool | None = None,
    after_append: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the newest queries over the pages of positions sinks <= p < seq_len - window
    and, with `exact`, over the exact tokens beside them: a whole decode step.

    Args:
        q: [B, H, D] or [B, H, Q, D] as the model rotated them, fp16, bf16 or fp32; last dimension
            of stride 1; H a multiple of G. Positions in pages are before every query: with exact
            tokens Q is at most window.
        k_pages, v_pages: uint8 [num_pages, G, 64 * bytes]; strides of pages and heads any multiples
            of 16.
        codec: of the layer.
        block_table: int32 [B, max_pages], page of positions 64 j .. 64 j + 63; entries past a row's
            length are not read.
        seq_lens: int32 [B], tokens of a row with those of the queries, at most 64 max_pages; read
            on the device: lengths may change between replays of a CUDA graph.
        sinks, window: first and newest tokens that are not attended in pages.
        exact: (k_exact, v_exact) as `attend_window` takes them.
        seq_ids, codec_ids: int32 [B], row of `exact` and of the codec of a sequence; None: its
            index, and 0.
        scale: factor of the scores, default D**-0.5.
        out, lse: [B, H, (Q,) D] fp16, bf16 or fp32 and float32 [B, H, (Q,)], contiguous, written in
            place.
        workspace: uint8 [n], n at least `attend_workspace`, contiguous, its storage offset a
            multiple of 16; None: allocated. Nothing is kept in it. More with num_splits or
            matrix_units: the error says how much.
        num_splits: programs that share a row's pages where all rows are as long, at most
            MAX_SPLITS; default by batch and card.
        matrix_units: use `tl.dot`; default: from capability 8.0. False is the path of older cards
            (attention_sm75.py) and runs on any card from sm_75 on.
        after_append: the launch before this one, on this stream, is `append` of these tokens: with
            `exact`, overlap with it.
    Returns:
        (o, lse), float32 (o in the dtype of `out`): normalised output and natural-log log-sum-exp
        of the scaled scores; (0, -inf) without keys. Arithmetic: see the module. The same bits for
        the same inputs.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    slots = _check_attend(
        q, k_pages, v_pages, codec, block_table, seq_lens, sinks, window, exact, seq_ids, codec_ids
    )
    scale = softmax_scale(scale, q.shape[-1])
    out = check_output("out", out, q, q.shape, FLOATS)
    lse = check_output("lse", lse, q, q.shape[:-1])
    splits = 1 if num_splits is None else num_splits
    check_least(num_splits=(splits, 1))
    if splits > MAX_SPLITS:
        raise ValueError(f"num_splits: expected at most {MAX_SPLITS}, got {splits}")
    if not _launch.runs_kernel(q):
        found = attend_spectral_torch(
            q, k_pages, v_pages, codec, block_table, seq_lens, sinks=sinks, window=window,
            exact=exact, seq_ids=seq_ids, codec_ids=codec_ids, scale=scale,
        )  # fmt: skip
        return out.copy_(found[0]), lse.copy_(found[1])
    if q.numel() == 0:
        return out, lse
    q4 = q if q.dim() == 4 else q[:, :, None]
    batch, heads, queries, _ = q4.shape
    shape = (batch, codec.kv_heads, heads // codec.kv_heads, queries, block_table.shape[1], slots)
    plan = plan_launch(codec.layout, *shape, q.device, num_splits, matrix_units)
    states = _parts(workspace, plan.sizes, q.device)
    tables, kept = (block_table, seq_lens, codec_ids, seq_ids), (sinks, window, slots - sinks)
    launch = partial(_launch_pages, after_append=after_append) if plan.matrix else launch_old_cards
    with torch.cuda.device_of(q):
        launch(q4, k_pages, v_pages, codec, exact, tables, states, kept, scale * LOG2_E, plan)
        _launch_finish(states[1:5], codec, tables, out, lse, q4.shape, kept, plan)
    return out, lse


def _parts(workspace: torch.Tensor | None, sizes: list[int], device: torch.device) -> tuple:
    """u uint8, and float32: c, lse, exact o, exact lse, warps, in the workspace or new memory."""
    if workspace is None:
        workspace = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    u8 = torch.uint8
    check_tensor("workspace", workspace, shape=(None,), dtype=u8, device=device, unit_stride=True)
    if workspace.shape[0] < sum(sizes):
        raise ValueError(
            f"workspace: expected at least {sum(sizes)} bytes, got {workspace.shape[0]}"
        )
    if (offset := workspace.storage_offset()) % 16:
        raise ValueError(f"workspace: expected an offset of a multiple of 16, got {offset}")
    u, *others = workspace[: sum(sizes)].split(sizes)
    return u, *(x.view(torch.float32) for x in others)


def _launch_pages(
    q, k_pages, v_pages, codec, exact, tables, states, kept, scale, plan, after_append
) -> None:  # fmt: skip
    """`_attend_spectral_kernel`; kept: (sinks, window, ring); scale: of scores in log2 units."""
    (batch, heads, queries, dim), layout = q.shape, codec.layout
    splits, block_m, _ = plan.window
    group = heads // codec.kv_heads
    overlap = _launch.overlaps_launches(q.device)
    exact_programs = batch * _launch.cdiv(group * queries, block_m) * splits
    grid = (codec.kv_heads, exact_programs + plan.states * plan.blocks)
    if exact is None:
        exact, kept = (q, q), (*kept[:2], 0)  # not read
        after_append = False  # programs of pages do not wait for it
    _attend_spectral_kernel[grid](
        q, (codec.k_basis, codec.k_scale, codec.k_mean, codec.freqs),
        k_pages, v_pages, *exact, tables, (states[0].view(torch.int8), *states[1:]),
        plan.frames, batch, plan.programs, queries, scale,
        q.stride()[:3],
        (*k_pages.stride()[:2], *v_pages.stride()[:2], tables[0].stride(0)),
        (*exact[0].stride()[:3], *exact[1].stride()[:3]),
        HG=group,
        SHAPE=(dim, codec.freqs.shape[0], layout.frame),
        K_GROUPS=layout.k.groups,
        V_GROUPS=layout.v.groups,
        EXACT=(*kept, *plan.window),
        TILE=(plan.rows, plan.m, plan.warps, plan.pages, plan.few, plan.block_b),
        PATH=(overlap, overlap and after_append, _launch.is_native(q)),
        launch_pdl=overlap and after_append,
        **plan.options,
    )  # fmt: skip


def _launch_finish(states, codec, tables, out, lse, shape, kept, plan) -> None:
    """`_finish_spectral_kernel` for queries of `shape` [B, H, Q, D]."""
    (batch, heads, queries, dim), rank, (few, many) = shape, codec.layout.v.rank, plan.splits
    group, cores = heads // codec.kv_heads, _launch.multiprocessors(out.device)
    rows = _launch.next_power_of_2(batch) * codec.kv_heads  # kernels are compiled for few batches
    # The queries of a KV head together (a single row has few programs, of many splits), then all
    # dimensions, as far as that keeps the card busy.
    most_h, most_d = (8, 128) if rank <= 128 else (4, 64)
    most_h = max(1, min(16 * most_h // many, group * queries)) if plan.matrix and batch > 1 else 1
    most_d = min(most_d, _launch.next_power_of_2(dim))
    tiles = (
        (h, d) for h in (8, 4, 2, 1) for d in (128, 64, 32)
        if h < 2 * most_h and d <= most_d and (h > 1 or d == most_d)
        and rows * _launch.cdiv(group * queries, h) * _launch.cdiv(dim, d) >= cores
    )  # fmt: skip
    block_h, block_d = next(tiles, (1, 32))
    held = (many + block_d) * rank  # numbers in registers: of few, one warp, which waits for none
    warps = min(16, max(1 + (held > 2048), _launch.next_power_of_2(_launch.cdiv(held, 5120))))
    overlap = plan.matrix and _launch.overlaps_launches(out.device)
    blocks = batch * _launch.cdiv(group * queries, block_h)
    _finish_spectral_kernel[(blocks, codec.kv_heads, _launch.cdiv(dim, block_d))](
        *states, codec.v_basis, codec.v_scale, *tables[1:3], out, lse, batch, plan.programs,
        queries, HG=group, D=dim, RV=rank, EXACT=(*kept[:2], plan.window[0]),
        BLOCK_H=block_h, BLOCK_N=(few, many) if few < many else (many,), BLOCK_D=block_d,
        TURN=plan.warps * plan.pages, FEW=plan.few, BLOCK_B=plan.block_b,
        PATH=(overlap, _launch.is_native(out)), launch_pdl=overlap,
        num_warps=warps if block_h == 1 else 4,
    )  # fmt: skip


def attend_spectral_torch(
    q, k_pages, v_pages, codec, block_table, seq_lens, *, sinks=0, window=0, exact=None,
    seq_ids=None, codec_ids=None, scale=None,
):  # fmt: skip
    """`attend_spectral` in plain PyTorch, float32: coefficients times projected queries, without
    int8 splitting."""
    scale = softmax_scale(scale, q.shape[-1])
    if exact is not None:
        cold = attend_spectral_torch(
            q, k_pages, v_pages, codec, block_table, seq_lens, sinks=sinks, window=window,
            codec_ids=codec_ids, scale=scale,
        )  # fmt: skip
        hot = attend_window_torch(
            q, exact[0], exact[1], seq_lens, sinks=sinks, window=window, seq_ids=seq_ids,
            scale=scale,
        )  # fmt: skip
        return merge_states_torch(*hot, *cold)
    layout, batch = codec.layout, q.shape[0]
    stop = (seq_lens - window).clamp_min(0)
    pages = min(block_table.shape[1], -(-int(stop.max()) // PAGE_SIZE)) if batch else 0
    if pages == 0 or q.numel() == 0:
        empty = q.new_full(q.shape[:-1], float("-inf"), dtype=torch.float32)
        return q.new_zeros(q.shape, dtype=torch.float32), empty
    position = torch.arange(pages * PAGE_SIZE, device=q.device)
    seen = (position >= sinks) & (position < stop[:, None])  # [B, T]
    live = position[::PAGE_SIZE] < stop[:, None]
    table = torch.where(live, block_table[:, :pages], 0).long()
    k = unpack_pages(k_pages[table], layout.k, side="k")  # [B, pages, G, 64, R_K]
    v = unpack_pages(v_pages[table], layout.v, side="v")
    q4 = q if q.dim() == 4 else q[:, :, None]
    frames = -(-pages * PAGE_SIZE // layout.frame)
    frame = torch.arange(pages, device=q.device) * PAGE_SIZE // layout.frame
    u, bias = project_queries(q4, codec, frames, codec_ids=codec_ids)
    u = u[..., frame, :].unflatten(1, (codec.kv_heads, -1))  # [B, G, H/G, Q, pages, R_K]
    bias = bias[..., frame].unflatten(1, (codec.kv_heads, -1))
    scores = torch.einsum("bghqcr,bcgtr->bghqct", u, k) + bias[..., None]
    scores = (scores * scale).flatten(-2).masked_fill(~seen[:, None, None, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)  # [B, G, H/G, Q]
    weights = (scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None]).exp()
    coefficients = torch.einsum("bghqct,bcgtr->bghqr", weights.unflatten(-1, (pages, -1)), v)
    rows = codec_rows(codec, codec_ids, batch)
    basis = codec.v_basis[rows].float() * codec.v_scale[rows][..., None]  # [B, G, R_V, D]
    o = torch.einsum("bghqr,bgrd->bghqd", coefficients, basis)
    return o.flatten(1, 2).reshape(q.shape), lse.flatten(1, 2).reshape(q.shape[:-1])
