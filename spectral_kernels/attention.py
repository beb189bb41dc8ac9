"""Attention over spectral (cold) pages and over exact phase-aligned tokens; both return the state (o, lse).

Cold.   With the projected query u of each block of alignment (rope.py) and the integers x of a page (pages.py; z offsets)

    score_t = scale * sum_r (x_tr + z_r) u_r          o = sum_r v_scale_r v_basis_r (sum_t w_t (y_tr + z_r))

no key or value is rebuilt: R_K + R_V multiply-adds a token and query head, whatever D is. All sums are integer dots. A
turned query, a projected query u (once a block) and the weights (once a tile of 64 tokens) are split as
256 hi + lo = round(32512 x / largest), hi and lo int8; products accumulate exactly in int32, where 256 hi + lo is formed.
Errors: half a unit, 2**-16 of the largest. Fields of a byte are masked, not shifted, so a field that starts at bit b holds
2**b times its code; u has 2**-b in it. A 16-bit side uses three-product tf32 dots instead.

Two launches: `_attend_spectral_kernel` (a split of the pages each, for whose blocks it projects the queries first; and the
exact tokens of a decode step) and `_finish_spectral_kernel` (joins the splits and the exact tokens, and applies the V basis
once a segment), which from sm_90 starts while the first ends. Pages hold operand fragments, so what a thread loads goes to
the matrix units as it is. The warps of a program of the first work on a tile of tokens each (from sm_80; attention_sm75.py
before): a block of 16 components is as high as one dot, so that they would all compute the same one.

Exact.  Keys are phase-aligned and unquantised, and stay so: for each block of alignment that has keys in a tile (a few)
the queries are turned by their distance to its start, in float32. 16-bit keys and values are operands as they are: the
other side is split in parts that are exact products with them (`_launch.dot_f32`).

Keys are split over programs (grid from capacity, lengths read on the device); the splits' states are joined in a fixed
order: the same inputs and settings give the same bits.

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
from ._launch import cos_sin_of_phase, dot_f32, dot_int8_f32
from .merge import merge_many_states, merge_states_torch
from .pages import HEAD_DIMS, PageLayout, Pages, unpack_pages
from .rope import Rope, _cos_sin_torch, _turn_torch, check_queries, project_queries_torch, projected_query

LOG2_E = math.log2(math.e)
_LOG2_FULL = tl.constexpr(math.log2(127 * 256))
_MAGIC = tl.constexpr(12583040.0)  # 1.5 * 2**23 + 128: adding it leaves the rounded integer + 128 in a float's low bits
_FULL = tl.constexpr(32512.0)  # 127 * 256: the largest number that is split in two int8


# Where block i of 16 components lies, as pages.py has it, for compile-time loops.


@triton.constexpr_function
def _block(groups, i):
    """(group, field, its lowest bit, its bits, whether it is a byte's top field) of block i; None past the last one."""
    for n in range(len(groups)):
        fields = groups[n][1]
        if i < len(fields):
            low = sum(fields[:i])
            return n, i, low, fields[i], low + fields[i] == 8
        i -= len(fields)
    return None


@triton.constexpr_function
def _power_of_2(n):
    """Of a tile of n: at least 16, as dots want it."""
    return max(16, triton.next_power_of_2(n))


@triton.constexpr_function
def _least(a, b):
    return min(a, b)


@triton.constexpr_function
def _fields(groups, n):
    """How many fields group n has."""
    return len(groups[n][1])


@triton.constexpr_function
def _first_block(groups, n):
    return groups[n][0] // 16


@triton.constexpr_function
def _half(groups, n):
    """Whether group n holds two tokens a byte (pages.is_half)."""
    return sum(groups[n][1]) <= 4


@triton.constexpr_function
def _subtiles(groups, n):
    """Sub-tiles of 512 bytes in a tile of group n."""
    return 1 if _half(groups, n) else 2


@triton.constexpr_function
def _group_offset(groups, n):
    """Bytes a token of the groups before n: all are full."""
    return 16 * n


@triton.constexpr_function
def _mask(groups, i):
    """The bits of block i in a byte, four times."""
    block = _block(groups, i)
    return (((1 << block[3]) - 1) << block[2]) * 0x01010101


@triton.constexpr_function
def _weight(groups, i):
    """What a stored integer is multiplied by to count codes: fields are masked, not shifted (0 past the last block)."""
    block = _block(groups, i)
    return 0.0 if block is None else 2.0 ** -block[2]


@triton.constexpr_function
def _offset(groups, i):
    """What is added to the stored integer of block i, as masked, to get the coefficient over `_weight`: a byte's top field
    is two's complement (+1/2), others are codes (-(2**bits - 1)/2)."""
    block = _block(groups, i)
    if block is None:
        return 0.0
    return (0.5 if block[4] else 0.5 - 2.0 ** (block[3] - 1)) * 2.0 ** block[2]


@triton.jit
def _masked(x, MASK: tl.constexpr, SHIFT: tl.constexpr, NATIVE: tl.constexpr):
    """Some bits of every byte, where they are or from SHIFT on, as int8; four bytes an instruction where inline assembly is
    to be had."""
    if MASK & 0xFF == 0xFF:
        y = x.to(tl.int8, bitcast=True)
    elif NATIVE:
        if SHIFT == 0:
            y = tl.inline_asm_elementwise(f"and.b32 $0, $1, {MASK};", "=r,r", [x], tl.int8, True, 4)
        else:
            y = tl.inline_asm_elementwise(
                f"{{ .reg .b32 t; shr.b32 t, $1, {SHIFT}; and.b32 $0, t, {MASK}; }}", "=r,r", [x], tl.int8, True, 4
            )
    else:
        y = ((x >> SHIFT) & (MASK & 0xFF)).to(tl.int8, bitcast=True)
    return y


# Pages hold operand fragments (pages.py): these views move no data between the threads of a warp. The first dimension are
# the W tiles that the warps of a program work on, a warp each.


@triton.jit
def _k_columns(ptr, SUBTILES: tl.constexpr):
    """Bytes [W, 32 SUBTILES tokens, 16 columns] of tiles of a K group at pointers [W]."""
    W: tl.constexpr = ptr.shape[0]
    x = tl.load(ptr[:, None] + tl.arange(0, 512 * SUBTILES)[None, :])
    x = tl.permute(tl.reshape(x, [W, SUBTILES, 8, 4, 4, 4]), [0, 1, 4, 2, 3, 5])
    return tl.reshape(x, [W, 32 * SUBTILES, 16])


@triton.jit
def _v_columns(ptr, SUBTILES: tl.constexpr):
    """Bytes [W, 16 columns, 32 SUBTILES tokens] of tiles of a V group; the tokens in the order of `_by_eights`."""
    W: tl.constexpr = ptr.shape[0]
    x = tl.load(ptr[:, None] + tl.arange(0, 512 * SUBTILES)[None, :])
    x = tl.permute(tl.reshape(x, [W, SUBTILES, 8, 4, 2, 8]), [0, 4, 2, 1, 3, 5])
    return tl.reshape(x, [W, 16, 32 * SUBTILES])


@triton.jit
def _by_eights(w):
    """[W, 64, H] by token in the order of V: token 8 j + g at 8 g + j. A thread's weights stay together."""
    W: tl.constexpr = w.shape[0]
    H: tl.constexpr = w.shape[2]
    return tl.reshape(tl.permute(tl.reshape(w, [W, 8, 8, H]), [0, 2, 1, 3]), [W, 64, H])


@triton.jit
def _k_block(x, GROUPS: tl.constexpr, i: tl.constexpr, NATIVE: tl.constexpr):
    """Block i of 64 tokens from the bytes of its group, int8 [W, 64, 16]."""
    y = _masked(x, _mask(GROUPS, i), 0, NATIVE)
    if _half(GROUPS, _block(GROUPS, i)[0]):
        y = tl.permute(tl.join(y, _masked(x, _mask(GROUPS, i), 4, NATIVE)), [0, 3, 1, 2])
        y = tl.reshape(y, [x.shape[0], 64, 16])
    return y


@triton.jit
def _v_block(x, GROUPS: tl.constexpr, i: tl.constexpr, NATIVE: tl.constexpr):
    """Block i of 64 tokens from the bytes of its group, int8 [W, 16, 64]."""
    y = _masked(x, _mask(GROUPS, i), 0, NATIVE)
    if _half(GROUPS, _block(GROUPS, i)[0]):
        y = tl.permute(tl.join(y, _masked(x, _mask(GROUPS, i), 4, NATIVE)), [0, 1, 3, 2])
        y = tl.reshape(y, [x.shape[0], 16, 64])
    return y


# Thread t of four holds columns 4t .. 4t + 3 of both blocks of an operand. Up to Triton 3.7 it wants them as 8 columns in a
# row, since 3.8 as two runs of 4 that are 16 apart: the order that leaves them where they are. Products are the same.
_EIGHT_IN_A_ROW = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8))


@triton.jit
def _side_by_side(x, y):
    """Two blocks [W, 64, 16] as [W, 64, 32] in the order of `_EIGHT_IN_A_ROW`; `_project_blocks` stores u so."""
    W: tl.constexpr = x.shape[0]
    if _EIGHT_IN_A_ROW:
        both = tl.join(tl.reshape(x, [W, 64, 4, 4]), tl.reshape(y, [W, 64, 4, 4]))
        both = tl.permute(both, [0, 1, 2, 4, 3])
    else:
        both = tl.permute(tl.join(x, y), [0, 1, 3, 2])
    return tl.reshape(both, [W, 64, 32])


@triton.jit
def _by_thread(x, M: tl.constexpr, R: tl.constexpr):
    """[M, R] whose columns 8 j + 2 t + e of every 32 lie in thread t of four, and are components 16 (j div 2) + 4 t +
    2 (j mod 2) + e, in the order of `_side_by_side`."""
    x = tl.reshape(x, [M, R // 32, 2, 2, 4, 2])
    if _EIGHT_IN_A_ROW:
        x = tl.permute(x, [0, 1, 4, 2, 3, 5])
    else:
        x = tl.permute(x, [0, 1, 2, 4, 3, 5])
    return tl.reshape(x, [M, R])


@triton.jit
def _u_operand(ptr, N: tl.constexpr):
    """The projected queries of two blocks, int8 [W, 32, N], in the order of `_side_by_side`, at pointers [W]."""
    x = tl.reshape(tl.load(ptr[:, None] + tl.arange(0, 32 * N)[None, :]), [ptr.shape[0], N, 32])
    return tl.permute(x, [0, 2, 1])


@triton.jit
def _dot_int8(a, b, MATRIX: tl.constexpr):
    """a [.., M, K] @ b [.., K, N], int8 to int32, exact."""
    if MATRIX:
        out = tl.dot(a, b, out_dtype=tl.int32)
    elif len(a.shape) == 3:
        out = tl.sum(a.to(tl.int32)[:, :, :, None] * b.to(tl.int32)[:, None, :, :], 2)
    else:
        out = tl.sum(a.to(tl.int32)[:, :, None] * b.to(tl.int32)[None, :, :], 1)
    return out


@triton.jit
def _split_int16(x, NATIVE: tl.constexpr):
    """x in [-32512, 32512], rounded to nearest, as 256 hi + lo: (hi, lo) int8 and the rounded x, float32."""
    shifted = x + _MAGIC
    value = shifted - _MAGIC
    bits = shifted.to(tl.int32, bitcast=True)  # the low 16 bits are the integer + 128: hi is its high byte
    if NATIVE:
        hi, lo = tl.inline_asm_elementwise(
            """{ .reg .b32 a, b;
            prmt.b32 a, $2, $3, 0x5140;
            prmt.b32 b, $4, $5, 0x5140;
            prmt.b32 $0, a, b, 0x7632;
            prmt.b32 a, a, b, 0x5410;
            xor.b32 $1, a, 0x80808080; }""",
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
def _pairs(turns_ptr, d, PAIRS: tl.constexpr):
    """What dimensions d turn with: (the partner, the sign of its part or 0 from 2 PAIRS on, turns a position)."""
    sign = tl.where(d < PAIRS, -1.0, tl.where(d < 2 * PAIRS, 1.0, 0.0))
    partner = tl.where(d < PAIRS, d + PAIRS, tl.where(d < 2 * PAIRS, d - PAIRS, d))
    if PAIRS % 8 == 0:
        partner = tl.max_contiguous(tl.multiple_of(partner, 8), 8)
    return partner, sign, tl.load(turns_ptr + tl.minimum(d, partner), mask=d < 2 * PAIRS, other=0)


@triton.jit
def _exact_split(
    q_ptr,
    positions_ptr,
    k_ptr,
    v_ptr,
    key_positions_ptr,
    turns_ptr,
    o_ptr,
    lse_ptr,
    split,
    each,
    block_m,
    g,
    b,
    N,
    splits,
    Q,
    G,
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
    HG: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MATRIX: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One split of the exact keys of row b and KV head g, for BLOCK_M rows, each a query and a head of the group."""
    BLOCK_D: tl.constexpr = _power_of_2(D)
    NONE: tl.constexpr = 2147483647
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < Q * HG
    query = (row // HG).to(tl.int64)
    head = g * HG + row % HG
    position = tl.load(positions_ptr + b * stride_positions_b + query, mask=live, other=-1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    partner, sign, turns = _pairs(turns_ptr, d, PAIRS)
    if ONE_QUERY:  # all rows are one query's
        phase = (tl.load(positions_ptr + b * stride_positions_b).to(tl.int64) * turns)[None, :]
    else:
        phase = position[:, None] * turns[None, :]
    phase = (phase >> 32).to(tl.int32)  # exact modulo a turn at any position
    q_row = q_ptr + b * stride_q_b + head * stride_q_h + query * stride_q_q
    q_mask = live[:, None] & (d < D)[None, :]
    q = tl.load(q_row[:, None] + d[None, :], mask=q_mask, other=0.0).to(tl.float32)
    q *= (tl.where(sign == 0.0, 1.0, rotary_scale) * softmax_scale)[None, :]
    q_partner = tl.load(q_row[:, None] + partner[None, :], mask=q_mask, other=0.0).to(tl.float32)
    q_partner *= (sign * rotary_scale * softmax_scale)[None, :]

    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    k_ptr += b * stride_k_b + g * stride_k_g
    v_ptr += b * stride_v_b + g * stride_v_g
    key_positions_ptr += b * stride_key_positions_b + g * stride_key_positions_g
    for start in tl.range(split * each, tl.minimum(split * each + each, N), BLOCK_N, num_stages=1):
        # All that a tile needs is asked for before any of it is used: a program has few tiles, and their time is latency.
        n = start + tl.arange(0, BLOCK_N)
        inside = n < N
        key_position = tl.load(key_positions_ptr + n, mask=inside, other=-1)
        mask = inside[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + n.to(tl.int64)[:, None] * stride_k_n + d[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + n.to(tl.int64)[:, None] * stride_v_n + d[None, :], mask=mask, other=0.0)
        used = key_position >= 0
        block = key_position // C
        # Keys stay as they are stored: queries are turned by their distance to the start of a block, once for each block
        # that has keys in the tile. Those are few: neighbours in a cache are neighbours in the text.
        k = tl.trans(k)
        s = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        left = used
        first = tl.min(tl.where(left, block, NONE), 0)
        while first < NONE:
            back = ((first.to(tl.int64) * C * turns) >> 32).to(tl.int32)
            cos, sin = cos_sin_of_phase(phase - back[None, :], NATIVE)  # [BLOCK_M or 1, BLOCK_D]
            s = tl.where((block == first)[None, :], dot_f32(q * cos + q_partner * sin, k, MATRIX, NATIVE), s)
            left = left & (block != first)
            first = tl.min(tl.where(left, block, NONE), 0)
        seen = used[None, :] & (key_position[None, :] <= position[:, None])
        s = tl.where(seen, s, float("-inf"))  # [BLOCK_M, BLOCK_N]
        m_new = tl.maximum(m, tl.max(s, 1))
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
        old = tl.exp2(m - top)
        p = tl.exp2(s - top[:, None])
        l = l * old + tl.sum(p, 1)
        # An unused slot may hold NaN; its score is -inf whatever its key.
        o = o * old[:, None] + dot_f32(p, tl.where(used[:, None], v, 0.0), MATRIX, NATIVE)
        m = m_new
    o *= tl.where(l > 0.0, 1.0 / l, 0.0)[:, None]
    out = ((b * (G * HG) + head) * Q + query) * splits + split
    tl.store(lse_ptr + out, tl.where(l > 0.0, m * 0.6931471805599453 + tl.log(l), float("-inf")), mask=live)
    tl.store(o_ptr + out[:, None] * D + d[None, :], o, mask=live[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["N", "each", "splits", "stride_key_positions_b", "stride_key_positions_g"])
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
    each,
    splits,
    Q,
    G,
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
    HG: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MATRIX: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One split of the keys of one row and KV head, for BLOCK_M rows: `_exact_split`."""
    blocks_m = tl.cdiv(Q * HG, BLOCK_M)
    _exact_split(
        q_ptr, positions_ptr, k_ptr, v_ptr, key_positions_ptr, turns_ptr, o_ptr, lse_ptr,
        tl.program_id(0), each, tl.program_id(1) % blocks_m, (tl.program_id(1) // blocks_m).to(tl.int64),
        tl.program_id(2).to(tl.int64), N, splits, Q, G, softmax_scale, rotary_scale,
        stride_q_b, stride_q_h, stride_q_q, stride_positions_b, stride_k_b, stride_k_g, stride_k_n,
        stride_v_b, stride_v_g, stride_v_n, stride_key_positions_b, stride_key_positions_g,
        HG, ONE_QUERY, C, D, PAIRS, BLOCK_M, BLOCK_N, MATRIX, NATIVE,
    )  # fmt: skip


@triton.jit
def _load_queries(
    q_ptr,
    turns_ptr,
    g,
    rotary_scale,
    stride_q_h,
    HG: tl.constexpr,
    HG_PAD: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """(queries of a group and their partners of `_pairs` [1, HG_PAD, BLOCK_D], in units in which the longest pair is _FULL:
    one unit at any distance; the longest pairs [1, HG_PAD]; turns a position [BLOCK_D])."""
    d = tl.arange(0, _power_of_2(D))
    i = tl.arange(0, HG_PAD)
    partner, sign, turns = _pairs(turns_ptr, d, PAIRS)
    row = q_ptr + (g * HG + i) * stride_q_h
    mask = (i < HG)[None, :, None] & (d < D)[None, None, :]
    q = tl.load(row[None, :, None] + d[None, None, :], mask=mask, other=0.0).to(tl.float32)
    q *= tl.where(sign == 0.0, 1.0, rotary_scale)[None, None, :]
    q_partner = tl.load(row[None, :, None] + partner[None, None, :], mask=mask, other=0.0).to(tl.float32)
    q_partner *= (sign * rotary_scale)[None, None, :]
    largest = tl.sqrt(tl.max(q * q + q_partner * q_partner, 2))
    full = tl.where(largest > 0.0, _FULL / largest, 0.0)[:, :, None]
    return q * full, q_partner * full, largest, turns


@triton.jit
def _project_blocks(
    q_ptr,
    queries,
    position,
    turns_ptr,
    basis_ptr,
    scale_ptr,
    segment_table_ptr,
    u_ptr,
    affine_ptr,
    segment,
    first,
    blocks,
    u_row,
    g,
    G,
    softmax_scale,
    rotary_scale,
    stride_q_h,
    HG: tl.constexpr,
    HG_PAD: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    M: tl.constexpr,
    MATRIX: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """The projected queries of blocks first .. blocks - 1 and one KV head in rows u_row + block, in log2 units; `queries`
    from `_load_queries` (a 16-bit side loads its own), `segment` of the first block:

    u [rows, ceil(R/32), 2 HG_PAD, 32] int8 (head, hi or lo; 32 components in the order of `_side_by_side`, by `_weight`),
    with affine [rows, HG_PAD, 2] float32: their unit, and the sum of u times `_offset`. A 16-bit side: u [rows, HG_PAD, R]
    float32.
    M rows at a time, each a block and a head of the group.
    """
    STEPS: tl.constexpr = (R + 31) // 32
    ROWS: tl.constexpr = M // HG_PAD  # blocks at a time
    BLOCK_D: tl.constexpr = _power_of_2(D)
    BLOCK_R: tl.constexpr = max(32, _power_of_2(R))
    h = tl.arange(0, M) % HG_PAD
    local = tl.arange(0, M) // HG_PAD
    row_out = (u_row + local) * HG_PAD + h
    if not IS_FLOAT:
        q, q_partner, largest, turns = queries
        d = tl.arange(0, BLOCK_D)
        back = tl.arange(0, ROWS)[:, None] * ((ALIGN * turns) >> 32).to(tl.int32)[None, :]  # good to 2**-32 turns a block
        column = tl.arange(0, BLOCK_R)
        # The component of a product's column: see `_by_thread`.
        r = column // 16 * 16 + column // 2 % 4 * 4 + column // 8 % 2 * 2 + column % 2
        weight, offset = _units(r, GROUPS, 0, R // 16)
        offset = _by_thread(offset[None, :], 1, BLOCK_R)
    # A segment seldom ends among these blocks: project them on the first one's basis, and those of each other on its.
    start = first
    while start < blocks:
        row = (segment.to(tl.int64) * G + g) * R
        if IS_FLOAT:
            live = (h < HG) & (start + local < blocks)
            live = live & (tl.load(segment_table_ptr + start + local, mask=live, other=-1) == segment)
            out = row_out + start * HG_PAD
            i = tl.arange(0, BLOCK_R)
            u = projected_query(
                q_ptr, turns_ptr, basis_ptr + row * D, position - (start + local) * ALIGN, (g * HG + h) * stride_q_h, live,
                rotary_scale, D, PAIRS, R, BLOCK_R, 16, M, MATRIX, NATIVE,
            )  # fmt: skip
            u *= (tl.load(scale_ptr + row + i, mask=i < R, other=0.0) * softmax_scale)[:, None]
            u_float_ptr = u_ptr.to(tl.pointer_type(tl.float32))
            tl.store(u_float_ptr + out[None, :] * R + i[:, None], u, mask=live[None, :] & (i < R)[:, None])
            same = tl.load(segment_table_ptr + start + local, mask=start + local < blocks, other=-1) == segment
            start += tl.min(tl.where(same, ROWS, local), 0)
        else:
            at = basis_ptr + row * D + r[None, :] * D + d[:, None]
            basis = tl.load(at, mask=(d < D)[:, None] & (r < R)[None, :], other=0)
            scale = tl.load(scale_ptr + row + r, mask=r < R, other=0.0) * softmax_scale * weight
            more = start < blocks
            while more:
                here = tl.load(segment_table_ptr + start + local, mask=start + local < blocks, other=-1) == segment
                live = (h < HG) & here
                phase = ((position - start.to(tl.int64) * ALIGN) * turns >> 32).to(tl.int32)  # exact modulo a turn
                cos, sin = cos_sin_of_phase(phase[None, None, :] - back[:, None, :], NATIVE)
                turned = q * cos + q_partner * sin  # [ROWS, HG_PAD, BLOCK_D]
                hi, lo, _ = _split_int16(tl.reshape(turned, [M, BLOCK_D]), NATIVE)
                u = _dot_int8(hi, basis, MATRIX) * 256 + _dot_int8(lo, basis, MATRIX)
                u = u.to(tl.float32) * scale[None, :]  # in units of 1 / full
                top = tl.max(tl.abs(u), 1)
                u = _by_thread(u * tl.where(top > 0.0, _FULL / top, 0.0)[:, None], M, BLOCK_R)
                hi, lo, value = _split_int16(u, NATIVE)
                unit = tl.reshape(tl.reshape(top * (1.0 / _FULL), [ROWS, HG_PAD]) * (largest * (1.0 / _FULL)), [M])
                out = row_out + start * HG_PAD
                affine = tl.join(unit, tl.sum(value * offset, 1) * unit)
                tl.store(affine_ptr + out[:, None] * 2 + tl.arange(0, 2)[None, :], affine, mask=live[:, None])
                u_at = u_ptr + (out // HG_PAD * (STEPS * HG_PAD) + out % HG_PAD)[:, None] * 64
                u_at += (column // 32 * (64 * HG_PAD) + column % 32)[None, :]
                stored = live[:, None] & (column < STEPS * 32)[None, :]
                u_at = u_at[:, :, None] + (tl.arange(0, 2) * 32)[None, None, :]
                tl.store(u_at, tl.join(hi, lo), mask=stored[:, :, None])
                done = tl.min(tl.where(here, ROWS, local), 0)
                start += done
                more = (done == ROWS) & (start < blocks)
        segment = tl.load(segment_table_ptr + start, mask=start < blocks, other=0)


@triton.jit
def _lse(m, l):
    """Natural-log log-sum-exp of scores in log2 units whose largest is m; l: the sum of weights, in units of 1 / _FULL."""
    return tl.where(l > 0.0, (m - _LOG2_FULL) * 0.6931471805599453 + tl.log(l), float("-inf"))


@triton.jit
def _join(m_all, l_all, m, l):
    """The (largest score, sum of weights) of two sets of keys together, and the share of each in the joint output."""
    m_new = tl.maximum(m_all, m)
    top = tl.where(m_new == float("-inf"), 0.0, m_new)
    old = tl.exp2(m_all - top) * l_all
    new = tl.exp2(m - top) * l
    l_new = old + new
    norm = tl.where(l_new > 0.0, 1.0 / l_new, 0.0)
    return m_new, l_new, old * norm, new * norm


@triton.jit
def _sum_of_warps(parts):
    """Sums over W of one, two or four [W, 16, N], one below the other [16, 32 or 64, N]: one pass through shared memory."""
    N: tl.constexpr = parts[0].shape[2]
    if len(parts) == 1:
        x = tl.sum(parts[0], 0)
    elif len(parts) == 2:
        x = tl.reshape(tl.permute(tl.sum(tl.join(parts[0], parts[1]), 0), [2, 0, 1]), [32, N])
    else:
        x = tl.sum(tl.join(tl.join(parts[0], parts[1]), tl.join(parts[2], parts[3])), 0)
        x = tl.reshape(tl.permute(x, [3, 2, 0, 1]), [64, N])  # of [16, N, 2, 2] with part 1 at (1, 0) and 2 at (0, 1)
    return x


@triton.jit
def _units(r, GROUPS: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr):
    """(`_weight`, `_offset`) of components r, which lie in blocks FIRST .. END - 1."""
    weight = tl.full(r.shape, 0.0, dtype=tl.float32)
    offset = tl.zeros(r.shape, dtype=tl.float32)
    for n in tl.static_range(FIRST, END):
        weight = tl.where(r // 16 == n, _weight(GROUPS, n), weight)
        offset = tl.where(r // 16 == n, _offset(GROUPS, n), offset)
    return weight, offset


@triton.jit
def _prefetch(at, size, live):
    """Ask L2 for `size` bytes, a multiple of 16, from each of the addresses that are live; an element a thread. From sm_90,
    which wants addresses that are multiples of 16: the one before will do."""
    tl.inline_asm_elementwise(
        """{ .reg .pred p;
        setp.ne.b32 p, $3, 0;
        @p cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.b32 $0, 0; }""",
        "=r,l,r,r",
        [at & -16, size, live.to(tl.int32)],
        tl.int32,
        False,
        1,
    )


@triton.jit
def _cold_split(
    q_ptr,
    positions_ptr,
    turns_ptr,
    k_basis_ptr,
    k_scale_ptr,
    k_ptr,
    v_ptr,
    skip_ptr,
    u_ptr,
    affine_ptr,
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
    split,
    g,
    bq,
    u_blocks,
    splits,
    Q,
    G,
    softmax_scale,
    rotary_scale,
    stride_q_b,
    stride_q_h,
    stride_q_q,
    stride_positions_b,
    stride_pages_b,
    stride_segments_b,
    HG: tl.constexpr,
    HG_PAD: tl.constexpr,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
    RK: tl.constexpr,
    RV: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
    K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    K_FLOAT: tl.constexpr,
    V_FLOAT: tl.constexpr,
    M: tl.constexpr,
    RUN: tl.constexpr,
    BULK: tl.constexpr,
    W: tl.constexpr,
    MATRIX: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One split of the pages of one row, query and KV head: its state over all heads of the group. The queries are
    projected for the blocks of the split first; then W warps work on a tile of 64 tokens each, and join their states once a
    run of chunks that share a segment.

    u, affine: scratch, u_blocks rows a split of its own (`_project_blocks`).
    c [B, H, Q, splits, RV] float32: the output in coefficients of the V basis of the split's last segment, `segment`
    [B*Q, G, splits], with lse [B, H, Q, splits]. What lies before that segment (seldom anything) goes to o [.., D], o_lse.
    """
    TILES: tl.constexpr = C // 64
    PAGES: tl.constexpr = ALIGN // C
    N: tl.constexpr = 2 * HG_PAD
    STEPS: tl.constexpr = (RK + 31) // 32
    b = bq // Q
    # Nothing waits for another load that need not: queries, then tables, then the basis and the first pages.
    length = tl.load(lengths_ptr + b)
    position = tl.load(positions_ptr + b * stride_positions_b + bq % Q).to(tl.int64)
    q_ptr += b * stride_q_b + (bq % Q) * stride_q_q
    queries = ()
    if not K_FLOAT:
        queries = _load_queries(q_ptr, turns_ptr, g, rotary_scale, stride_q_h, HG, HG_PAD, D, PAIRS)
    chunks = tl.cdiv(length, C)
    TURN: tl.constexpr = max(1, W // TILES)  # chunks that the warps take at a time
    each = tl.cdiv(tl.cdiv(chunks, TURN), splits) * TURN
    chunk = split * each
    end = tl.minimum(chunk + each, chunks)
    page_table_ptr += b * stride_pages_b
    segment_table_ptr += b * stride_segments_b
    first = chunk // PAGES
    u_row = ((bq * G + g) * splits + split) * u_blocks - first
    any_chunk = chunk < end
    segment = tl.load(segment_table_ptr + first, mask=any_chunk, other=0)
    # A quarter of the threads each: first pages of K, of V, the K basis, V scales.
    thread = tl.arange(0, 32 * W)
    what = thread // (8 * W)
    nth = thread % (8 * W)
    early = nth < tl.minimum(end - chunk, TURN)
    early_page = tl.load(page_table_ptr + chunk + nth, mask=early, other=0).to(tl.int64) * G + g
    if any_chunk:
        if BULK:
            bases = segment.to(tl.int64) * G + g
            k_at, v_at = k_ptr.to(tl.int64) + early_page * (C * K_BYTES), v_ptr.to(tl.int64) + early_page * (C * V_BYTES)
            basis_at, scale_at = k_basis_ptr.to(tl.int64) + bases * (RK * D), scale_ptr.to(tl.int64) + bases * (4 * RV)
            at = tl.where(what == 0, k_at, tl.where(what == 1, v_at, tl.where(what == 2, basis_at, scale_at)))
            size = tl.where(what < 2, tl.where(what == 0, C * K_BYTES, C * V_BYTES), tl.where(what == 2, RK * D, 4 * RV))
            _prefetch(at, size, tl.where(what < 2, early, nth == 0))
        _project_blocks(
            q_ptr, queries, position, turns_ptr, k_basis_ptr, k_scale_ptr, segment_table_ptr, u_ptr, affine_ptr, segment,
            first, tl.cdiv(end, PAGES), u_row, g, G, softmax_scale, rotary_scale, stride_q_h,
            HG, HG_PAD, ALIGN, D, PAIRS, RK, K_GROUPS, K_FLOAT, M, MATRIX, NATIVE,
        )  # fmt: skip
        tl.debug_barrier()  # a thread reads what others wrote

    t = tl.arange(0, 64)
    h = tl.arange(0, HG_PAD)
    i16 = tl.arange(0, 16)
    warp = tl.arange(0, W)
    out = (((b * G + g) * HG + h) * Q + bq % Q) * splits + split  # [HG_PAD], row of the split's state
    m_all = tl.full([HG_PAD], float("-inf"), dtype=tl.float32)
    l_all = tl.zeros([HG_PAD], dtype=tl.float32)
    if chunk >= end:
        tl.store(lse_ptr + out, tl.full([HG_PAD], float("-inf"), dtype=tl.float32), mask=h < HG)
    while chunk < end:
        # A run of blocks that share a segment.
        block = chunk // PAGES
        segment = tl.load(segment_table_ptr + block)
        i = tl.arange(0, RUN)
        others = tl.load(segment_table_ptr + block + i, mask=(block + i) * PAGES < end, other=-1) != segment
        stop = tl.minimum((block + tl.min(tl.where(others, i, RUN), 0)) * PAGES, end)
        m_warp = tl.full([W, HG_PAD], float("-inf"), dtype=tl.float32)
        l_warp = tl.zeros([W, HG_PAD], dtype=tl.float32)
        w_warp = tl.zeros([W, HG_PAD], dtype=tl.float32)
        acc = ()
        for _ in tl.static_range(RV // 16):
            acc = acc + (tl.zeros([W, 16, HG_PAD], dtype=tl.float32),)
        for start in range(chunk * TILES, stop * TILES, W):
            # [W]; a warp without a tile repeats the last one and sees none of its tokens.
            tile = tl.minimum(start + warp, stop * TILES - 1)
            j = tile // TILES
            part = tile % TILES  # of the page
            u_at = u_row + j // PAGES
            page = tl.load(page_table_ptr + j).to(tl.int64) * G + g
            if K_FLOAT:
                s = tl.zeros([W, 64, HG_PAD], dtype=tl.float32)
                k_half_ptr = (k_ptr + page * (C * K_BYTES)).to(tl.pointer_type(tl.float16))
                u_float_ptr = u_ptr.to(tl.pointer_type(tl.float32)) + u_at * (HG_PAD * RK)
                token = (part[:, None] * 64 + t[None, :])[:, :, None]
                for r in tl.static_range(0, RK, 16):
                    k = tl.load(k_half_ptr[:, None, None] + token * RK + (r + i16)[None, None, :])
                    u_rows = u_float_ptr[:, None, None] + h[None, None, :] * RK
                    u = tl.load(u_rows + (r + i16)[None, :, None], mask=(h < HG)[None, None, :], other=0.0)
                    s += dot_f32(k.to(tl.float32), u, MATRIX)
            else:
                blocks = ()
                for n in tl.static_range(len(K_GROUPS)):
                    k_group_ptr = k_ptr + page * (C * K_BYTES) + _group_offset(K_GROUPS, n) * C
                    x = _k_columns(k_group_ptr + part * (512 * _subtiles(K_GROUPS, n)), _subtiles(K_GROUPS, n))
                    for f in tl.static_range(_fields(K_GROUPS, n)):
                        blocks = blocks + (_k_block(x, K_GROUPS, _first_block(K_GROUPS, n) + f, NATIVE),)
                if RK % 32:
                    blocks = blocks + (tl.zeros([W, 64, 16], dtype=tl.int8),)
                dots = tl.zeros([W, 64, N], dtype=tl.int32)
                for step in tl.static_range(STEPS):
                    u = _u_operand(u_ptr + (u_at * STEPS + step) * (32 * N), N)
                    dots += _dot_int8(_side_by_side(blocks[2 * step], blocks[2 * step + 1]), u, MATRIX)
                hi, lo = tl.split(tl.reshape(dots, [W, 64, HG_PAD, 2]))
                affine = tl.load(affine_ptr + u_at[:, None] * (2 * HG_PAD) + tl.arange(0, 2 * HG_PAD)[None, :])
                unit, bias = tl.split(tl.reshape(affine, [W, HG_PAD, 2]))
                s = (hi * 256 + lo).to(tl.float32) * unit[:, None, :] + bias[:, None, :]
            # Bit t: token t of the tile is kept exact elsewhere or lies past the row's length.
            hidden = tl.load((skip_ptr + page * (C // 32)).to(tl.pointer_type(tl.int64)) + part)
            left = tl.where(start + warp < stop * TILES, length - (j * C + part * 64), 0)
            past = tl.full([W], -1, dtype=tl.int64) << tl.minimum(tl.maximum(left, 0), 63).to(tl.int64)
            hidden |= tl.where(left < 64, past, 0)
            i8 = tl.arange(0, 8)  # token 8 j + g: one long shift by g, then short ones
            seen = (((hidden[:, None] >> i8[None, :])[:, None, :] >> (8 * i8)[None, :, None]) & 1) == 0
            seen = tl.reshape(seen, [W, 64])
            s = tl.where(seen[:, :, None], s, float("-inf"))  # [W, 64, HG_PAD]
            m_tile = tl.max(s, 1)
            # Weights in units of 1 / _FULL of the tile's largest. The difference first: scores may be 1e7, and the largest
            # weight must be _FULL exactly enough to fit its int8 parts.
            p = tl.exp2((s - tl.where(m_tile == float("-inf"), 0.0, m_tile)[:, None, :]) + _LOG2_FULL)
            m_new = tl.maximum(m_warp, m_tile)
            top = tl.where(m_new == float("-inf"), 0.0, m_new)
            old = tl.exp2(m_warp - top)
            new = tl.exp2(m_tile - top)
            l_warp = l_warp * old + tl.sum(p, 1) * new
            m_warp = m_new
            rescaled = ()
            if V_FLOAT:
                v_half_ptr = (v_ptr + page * (C * V_BYTES)).to(tl.pointer_type(tl.float16))
                token = (part[:, None] * 64 + t[None, :])[:, None, :]
                for n in tl.static_range(RV // 16):
                    v = tl.load(
                        v_half_ptr[:, None, None] + (n * 16 + i16)[None, :, None] * C + token,
                        mask=seen[:, None, :],  # weights are 0 there; what is stored may be NaN
                        other=0.0,
                    )
                    part_sum = dot_f32(v.to(tl.float32), p, MATRIX) * new[:, None, :]
                    rescaled = rescaled + (acc[n] * old[:, None, :] + part_sum,)
            else:
                w_hi, w_lo, w = _split_int16(p, NATIVE)
                w_warp = w_warp * old + tl.sum(w, 1) * new
                w_both = tl.reshape(tl.join(_by_eights(w_hi), _by_eights(w_lo)), [W, 64, N])
                for n in tl.static_range(len(V_GROUPS)):
                    v_group_ptr = v_ptr + page * (C * V_BYTES) + _group_offset(V_GROUPS, n) * C
                    x = _v_columns(v_group_ptr + part * (512 * _subtiles(V_GROUPS, n)), _subtiles(V_GROUPS, n))
                    for f in tl.static_range(_fields(V_GROUPS, n)):
                        y = _v_block(x, V_GROUPS, _first_block(V_GROUPS, n) + f, NATIVE)
                        hi, lo = tl.split(tl.reshape(_dot_int8(y, w_both, MATRIX), [W, 16, HG_PAD, 2]))
                        part_sum = (hi * 256 + lo).to(tl.float32) * new[:, None, :]
                        rescaled = rescaled + (acc[len(rescaled)] * old[:, None, :] + part_sum,)
            acc = rescaled
        # The warps' states together.
        m = tl.max(m_warp, 0)
        own = tl.exp2(m_warp - tl.where(m == float("-inf"), 0.0, m)[None, :])
        l, w_sum = tl.split(tl.sum(tl.join(l_warp * own, w_warp * own), 0))
        # In V's basis; l and acc both count weights in units of 1 / _FULL. Up to 64 components at a time.
        BLOCKS: tl.constexpr = _least(4, triton.next_power_of_2(RV // 16))
        norm = tl.where(l > 0.0, 1.0 / l, 0.0)
        basis_row = (segment.to(tl.int64) * G + g) * RV
        scaled = ()
        for n in tl.static_range(0, RV // 16, BLOCKS):
            parts = ()
            for f in tl.static_range(BLOCKS):
                parts = parts + (acc[_least(n + f, RV // 16 - 1)] * own[:, None, :],)
            coefficient = _sum_of_warps(parts)
            r = n * 16 + tl.arange(0, 16 * BLOCKS)
            scale = tl.load(scale_ptr + basis_row + r, mask=r < RV, other=0.0)
            if not V_FLOAT:
                weight, offset = _units(r, V_GROUPS, n, _least(n + BLOCKS, RV // 16))
                coefficient += offset[:, None] * w_sum[None, :]
                scale *= weight
            scaled = scaled + (coefficient * scale[:, None] * norm[None, :],)
        if stop == end:
            tl.store(lse_ptr + out, _lse(m, l), mask=h < HG)
            tl.store(segment_ptr + (bq * G + g) * splits + split, segment)
            for n in tl.static_range(len(scaled)):
                r = n * (16 * BLOCKS) + tl.arange(0, 16 * BLOCKS)
                tl.store(c_ptr + out[None, :] * RV + r[:, None], scaled[n], mask=(r < RV)[:, None] & (h < HG)[None, :])
        else:
            # Join earlier runs' in global memory, a few dimensions at a time: registers are what the loop above lives on.
            m_all, l_all, old, new = _join(m_all, l_all, m, l)
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                mask = (d < D)[:, None] & (h < HG)[None, :]
                o = tl.load(o_ptr + out[None, :] * D + d[:, None], mask=mask & (old > 0.0)[None, :], other=0.0)
                o *= old[None, :]
                for n in tl.static_range(len(scaled)):
                    r = n * (16 * BLOCKS) + tl.arange(0, 16 * BLOCKS)
                    rows = basis_ptr + (basis_row + r)[None, :] * D
                    basis = tl.load(rows + d[:, None], mask=(d < D)[:, None] & (r < RV)[None, :], other=0)
                    o += dot_int8_f32(basis, scaled[n] * new[None, :], MATRIX, NATIVE)
                tl.store(o_ptr + out[None, :] * D + d[:, None], o, mask=mask)
            tl.debug_barrier()  # the next run's threads read what others wrote
        chunk = stop
    tl.store(o_lse_ptr + out, _lse(m_all, l_all), mask=h < HG)


@triton.jit(
    do_not_specialize=[
        "u_blocks", "splits", "N", "exact_each", "exact_splits", "stride_positions_b", "stride_pages_b",
        "stride_segments_b", "stride_key_positions_b", "stride_key_positions_g",
    ]
)  # fmt: skip
def _attend_spectral_kernel(
    q_ptr,
    positions_ptr,
    turns_ptr,
    k_basis_ptr,
    k_scale_ptr,
    k_pages_ptr,
    v_pages_ptr,
    skip_ptr,
    u_ptr,
    affine_ptr,
    v_basis_ptr,
    v_scale_ptr,
    page_table_ptr,
    segment_table_ptr,
    lengths_ptr,
    c_ptr,
    lse_ptr,
    segment_ptr,
    o_ptr,
    o_lse_ptr,
    k_ptr,
    v_ptr,
    key_positions_ptr,
    exact_ptr,
    exact_lse_ptr,
    u_blocks,
    splits,
    N,
    exact_each,
    exact_splits,
    Q,
    G,
    softmax_scale,
    rotary_scale,
    stride_q_b,
    stride_q_h,
    stride_q_q,
    stride_positions_b,
    stride_pages_b,
    stride_segments_b,
    stride_k_b,
    stride_k_g,
    stride_k_n,
    stride_v_b,
    stride_v_g,
    stride_v_n,
    stride_key_positions_b,
    stride_key_positions_g,
    HG: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    HG_PAD: tl.constexpr,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
    RK: tl.constexpr,
    RV: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
    K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    K_FLOAT: tl.constexpr,
    V_FLOAT: tl.constexpr,
    EXACT: tl.constexpr,
    M: tl.constexpr,
    RUN: tl.constexpr,
    W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
    MATRIX: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """The exact tokens (`_exact_split`; those of a row's first query are all its queries'), which start first, and the
    splits of the pages (`_cold_split`), in one launch."""
    if OVERLAP:  # `_finish_spectral_kernel` may start once all programs of this one have
        tl.extra.cuda.gdc_launch_dependents()
    g = tl.program_id(0).to(tl.int64)
    bq = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2) - (tl.num_programs(2) - splits)
    if split >= 0:
        _cold_split(
            q_ptr, positions_ptr, turns_ptr, k_basis_ptr, k_scale_ptr, k_pages_ptr, v_pages_ptr, skip_ptr,
            u_ptr, affine_ptr, v_basis_ptr, v_scale_ptr, page_table_ptr, segment_table_ptr, lengths_ptr,
            c_ptr, lse_ptr, segment_ptr, o_ptr, o_lse_ptr, split, g, bq, u_blocks, splits, Q, G,
            softmax_scale, rotary_scale, stride_q_b, stride_q_h, stride_q_q, stride_positions_b,
            stride_pages_b, stride_segments_b,
            HG, HG_PAD, C, ALIGN, D, BLOCK_D, PAIRS, RK, RV, K_BYTES, V_BYTES, K_GROUPS, V_GROUPS, K_FLOAT, V_FLOAT,
            M, RUN, OVERLAP, W, MATRIX, NATIVE,
        )  # fmt: skip
    elif EXACT:  # without exact tokens their arguments are stand-ins of other types
        if bq % Q == 0:
            program = tl.program_id(2)
            _exact_split(
                q_ptr, positions_ptr, k_ptr, v_ptr, key_positions_ptr, turns_ptr, exact_ptr, exact_lse_ptr,
                program % exact_splits, exact_each, program // exact_splits, g, bq // Q, N, exact_splits, Q, G,
                softmax_scale, rotary_scale,
                stride_q_b, stride_q_h, stride_q_q, stride_positions_b, stride_k_b, stride_k_g, stride_k_n,
                stride_v_b, stride_v_g, stride_v_n, stride_key_positions_b, stride_key_positions_g,
                HG, ONE_QUERY, ALIGN, D, PAIRS, BLOCK_M, BLOCK_N, MATRIX, NATIVE,
            )  # fmt: skip


@triton.jit
def _largest_each(a, b, c, d, a_other, b_other, c_other, d_other):
    """For `tl.reduce`: four maxima in one pass."""
    return tl.maximum(a, a_other), tl.maximum(b, b_other), tl.maximum(c, c_other), tl.maximum(d, d_other)


@triton.jit(do_not_specialize=["splits", "exact_splits", "stride_segments_b"])
def _finish_spectral_kernel(
    c_ptr,
    lse_ptr,
    segment_ptr,
    o_ptr,
    o_lse_ptr,
    exact_ptr,
    exact_lse_ptr,
    basis_ptr,
    segment_table_ptr,
    lengths_ptr,
    out_ptr,
    out_lse_ptr,
    splits,
    exact_splits,
    Q,
    G,
    stride_segments_b,
    HG: tl.constexpr,
    D: tl.constexpr,
    RV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Join the states of the splits (at most BLOCK_N, see `_attend_spectral_kernel`) of one row, query and head with those
    of its exact tokens, in a fixed order, BLOCK_D dimensions a program; the V basis is applied once a segment."""
    BLOCK_R: tl.constexpr = _power_of_2(RV)
    NONE: tl.constexpr = 2147483647
    head = tl.program_id(1)
    bq = tl.program_id(2).to(tl.int64)
    row = (bq // Q * (G * HG) + head) * Q + bq % Q
    g = head // HG
    segment_ptr += (bq * G + g) * splits
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    n = tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
    # Most often the first block's segment is the only one.
    any_cold = tl.load(lengths_ptr + bq // Q) > 0
    loaded = tl.load(segment_table_ptr + bq // Q * stride_segments_b, mask=any_cold, other=0)
    # A thread gets 4 bytes each of many rows, not 16 of a few: sums over rows need fewer other threads.
    at = (g * RV + r)[:, None] * D + tl.max_contiguous(d, 4)[None, :]
    inside = (r < RV)[:, None] & (d < D)[None, :]
    basis = tl.load(basis_ptr + loaded.to(tl.int64) * (G * RV * D) + at, mask=inside, other=0)
    if OVERLAP:  # until here nothing was read that the launch before writes
        tl.extra.cuda.gdc_wait()
    # All that is read is asked for at once: what an empty split never wrote, NaN perhaps, is then chosen away.
    lse = tl.load(lse_ptr + row * splits + n, mask=n < splits, other=float("-inf"))
    segment = tl.load(segment_ptr + n, mask=n < splits, other=-1)
    o_lse = tl.load(o_lse_ptr + row * splits + n, mask=n < splits, other=float("-inf"))
    exact_lse = tl.load(exact_lse_ptr + row * exact_splits + e, mask=e < exact_splits, other=float("-inf"))
    exact_ptr += (row * exact_splits + e)[:, None] * D + d[None, :]
    y = tl.load(exact_ptr, mask=(e < exact_splits)[:, None] & (d < D)[None, :], other=0.0)
    c_ptr += (row * splits + n)[:, None] * RV + r[None, :]
    x = tl.load(c_ptr, mask=(n < splits)[:, None] & (r < RV)[None, :], other=0.0)
    # Of an empty split no segment was written.
    live = lse > float("-inf")
    low = tl.where(live, segment, NONE)
    largest, earlier, last, own = tl.reduce((lse, o_lse, tl.where(live, segment, -1), -low), 0, _largest_each)
    own = -own
    top = tl.maximum(tl.maximum(largest, earlier), tl.max(exact_lse, 0))
    top = tl.where(top == float("-inf"), 0.0, top)
    w = tl.exp(exact_lse - top)
    total = tl.sum(w, 0)
    o = tl.sum(tl.where((w > 0.0)[:, None], w[:, None] * y, 0.0), 0)
    w = tl.exp(lse - top)
    total += tl.sum(w, 0)
    while own < NONE:
        c = tl.sum(tl.where((live & (segment == own))[:, None], w[:, None] * x, 0.0), 0)
        if own != loaded:
            basis = tl.load(basis_ptr + own.to(tl.int64) * (G * RV * D) + at, mask=inside, other=0)
        loaded = own
        o += tl.sum(c[:, None] * basis.to(tl.float32), 0)
        if own == last:
            own = NONE
        else:
            own = tl.min(tl.where(live & (segment > own), segment, NONE), 0)
    if earlier > float("-inf"):  # splits that a segment ended in: seldom any
        for i in range(splits):
            lse_i = tl.load(o_lse_ptr + row * splits + i)
            if lse_i > float("-inf"):
                w_i = tl.exp(lse_i - top)
                total += w_i
                o += w_i * tl.load(o_ptr + (row * splits + i) * D + d, mask=d < D, other=0.0)
    o = tl.where(total > 0.0, o / total, 0.0)
    tl.store(out_ptr + row * D + d, o, mask=d < D)
    if tl.program_id(0) == 0:
        tl.store(out_lse_ptr + row, top + tl.log(total))  # log(0) = -inf: an empty state


WARPS = 4  # of a program of `_attend_spectral_kernel`
RESIDENT = 3  # such programs a multiprocessor: what its registers hold
EXACT_RESIDENT = 4  # programs of exact tokens a multiprocessor, at most
MAX_SPLITS = 128  # of a row: what `_finish_spectral_kernel` joins at once


def _launch_settings(layout: PageLayout, group: int, matrix: bool, large_shared: bool) -> dict:
    """Tile sizes, warps, stages and registers of `_attend_spectral_kernel` by shape, path and shared memory: a pure
    function."""
    pad = _launch.next_power_of_2(group)
    if not matrix:
        return {"HG_PAD": pad, "M": pad, "BLOCK_D": 16, "W": 1, "num_warps": WARPS, "num_stages": 1}
    pad = max(4, pad)  # hi and lo of 4 heads are the 8 columns of a dot
    large, floats = layout.head_dim > 128, layout.k.is_float or layout.v.is_float
    warps = 2 * WARPS if large else WARPS  # a large basis, in registers of all of them
    # Rows of a projection: of more a large basis leaves no registers, and a short context has no more blocks a split.
    m = max(16 if layout.k.rank > 64 or floats else 32, pad)
    settings = {"HG_PAD": pad, "M": m, "BLOCK_D": 32, "W": warps, "num_warps": warps}
    if floats:
        settings["num_stages"] = 2
    elif large:
        settings["num_stages"] = 2 if large_shared else 1  # pages of 8 tiles of D = 256: 96 KB
    else:
        settings |= {"num_stages": 3, "maxnreg": 168}  # RESIDENT programs a multiprocessor
    return settings


def count_splits(programs: int, tiles: int, device: torch.device, each: int, less: int = 0) -> int:
    """Splits of the keys: enough programs for about `each` a multiprocessor, less some; none with less than one tile."""
    if device.type != "cuda":
        return max(1, min(tiles, 2))
    return max(1, min(tiles, (each * _launch.multiprocessors(device) - less) // max(programs, 1), MAX_SPLITS))


def _count_both_splits(
    programs: int, tiles: int, exact_programs: int, exact_tiles: int, device: torch.device, warps: int
) -> tuple[int, int]:
    """Splits of a row's cold tokens (tiles of 64) and of its exact ones, whose programs start first: for `programs` and
    `exact_programs` a split, of so many warps.

    Of long rows as many programs as are resident, with few exact ones beside them. Where a warp would take less than six
    tiles, a program's start and end cost as much: then two thirds. Of those that take eight tiles or more the exact tokens'
    programs, two a row, still end first; beside shorter ones they take others' place, and go as fast as can be. More
    programs than are resident would end last of all.
    """
    exact = count_splits(exact_programs, exact_tiles, device, each=EXACT_RESIDENT) if exact_tiles else 0
    if warps == 1:  # attention_sm75.py
        return count_splits(programs, tiles, device, each=12), exact
    turns, each = _launch.cdiv(tiles, warps), RESIDENT * WARPS // warps
    resident = each * _launch.multiprocessors(device)
    most = count_splits(programs, turns, device, each=each)
    if turns >= 6 * most:
        most = _launch.cdiv(turns, _launch.cdiv(turns, most))  # none without a tile
        left = (resident - most * programs) // exact_programs
        if exact and left <= 0 and most >= 8 and each > 1:  # one of many makes room
            most, left = most - 1, (resident - (most - 1) * programs) // exact_programs
        return most, min(left, exact) if left > 0 else exact
    fewer = max(1, each - 1)
    most = count_splits(programs, turns, device, fewer)
    longest = _launch.cdiv(turns, most)
    if longest >= 8:
        return _launch.cdiv(turns, longest), min(exact, 2)
    beside = exact * exact_programs
    if 3 * beside <= 2 * resident // each:
        most = count_splits(programs, turns, device, fewer, less=beside)
    elif beside + programs <= resident:
        most = min(most, (resident - beside) // programs)
    return most, exact


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
    exact: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    splits: int | None = None,
    matrix_units: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries over cold pages: every token below a row's length whose skip bit is clear; with `exact`, over
    exact tokens too: a whole decode step.

    Args:
        q: [B, H, D] or [B, H, Q, D] before RoPE, fp16, bf16 or fp32; last dimension of stride 1; H a multiple of G.
        positions: int32 or int64 [B] or [B, Q], positions of the queries. No causal mask over cold tokens: each must lie at
            or before every query, as in a cache whose newest tokens are hot.
        pages: cold pages, tables and lengths (read on the device: lengths may change between replays of a CUDA graph).
        rope: frequencies and attention scaling.
        scale: factor of the scores, default D**-0.5.
        exact: (k, v, key_positions) as `attend_exact` takes them, keys aligned in the pages' blocks (`layout.align`).
        out, lse: [B, H, (Q,) D] fp16, bf16 or fp32 and float32 [B, H, (Q,)], contiguous, written in place.
        splits: into how many runs of chunks a row is cut, at most MAX_SPLITS; default by the number of programs and the
            device.
        matrix_units: use `tl.dot`; default: from capability 8.0. False is the path of older cards (int8 sides:
            attention_sm75.py, others: multiply and sum) and runs on any card from sm_75 on.
    Returns:
        (o, lse), float32 (o in the dtype of `out`): normalised output and natural-log log-sum-exp of the scaled scores,
        over the cold and exact tokens; (0, -inf) without keys. Arithmetic: see the module. Deterministic for given
        inputs and settings.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    if not isinstance(pages, Pages):
        raise TypeError(f"pages: expected Pages, got {type(pages).__name__}")
    layout = pages.layout
    batch = pages.page_table.shape[0]
    scale = _check_attention(q, positions, pages.kv_heads, layout.head_dim, batch, rope, scale)
    check_tensor("pages.k_pages", pages.k_pages, device=q.device)
    if exact is not None:
        if len(exact) != 3:
            raise ValueError(f"exact: expected (k, v, key_positions), got {len(exact)} things")
        _check_exact(q, positions, *exact, rope, layout.align, scale)
        check_tensor("exact: k", exact[0], shape=(batch, pages.kv_heads, None, layout.head_dim))
    out = check_output("out", out, q, q.shape, FLOATS)
    lse = check_output("lse", lse, q, q.shape[:-1])
    if splits is not None and not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"splits: expected 1 .. {MAX_SPLITS}, got {splits}")
    if not _launch.runs_kernel(q):
        o, total = attend_spectral_torch(q, positions, pages, rope, scale=scale, exact=exact)
        return out.copy_(o), lse.copy_(total)
    if q.numel() == 0:
        return out, lse
    if pages.max_chunks == 0:
        if exact is None:
            return out.zero_(), lse.fill_(float("-inf"))
        chunk = layout.align
        o, _ = attend_exact(q, positions, *exact, rope, chunk=chunk, scale=scale, lse=lse, matrix_units=matrix_units)
        return out.copy_(o), lse
    q4, positions = (q, positions) if q.dim() == 4 else (q[:, :, None], positions[:, None])
    positions = positions if positions.stride(-1) == 1 else positions.contiguous()
    _, heads, queries, dim = q4.shape
    kv_heads, group, rows, chunks = pages.kv_heads, heads // pages.kv_heads, batch * queries, pages.max_chunks
    matrix = _launch.has_matrix_units(q.device) if matrix_units is None else matrix_units
    native = _launch.is_native(q)
    settings = _launch_settings(layout, group, matrix, _launch.has_large_shared_memory(q.device))
    old = not (matrix or layout.k.is_float or layout.v.is_float)
    overlap = not old and _launch.overlaps_launches(q.device)
    tile, exact_rows, exact_tiles = _exact_grid(group, queries, exact[0].shape[2] if exact else 0, matrix)
    cold_splits, exact_splits = _count_both_splits(
        rows * kv_heads,
        chunks * layout.chunk // 64,
        exact_rows * kv_heads * batch,
        exact_tiles,
        q.device,
        1 if old else settings["num_warps"],
    )
    splits = min(splits or cold_splits, chunks)
    exact_each, exact_o, exact_lse = _exact_states(q4, exact_splits, exact_tiles, tile)
    pad, k_rank = settings["HG_PAD"], layout.k.rank
    c = torch.empty((*q.shape[:-1], splits, layout.v.rank), dtype=torch.float32, device=q.device)
    o = torch.empty((*q.shape[:-1], splits, dim), dtype=torch.float32, device=q.device)  # seldom written or read
    split_lse, o_lse = torch.empty((2, *q.shape[:-1], splits), dtype=torch.float32, device=q.device)
    segments = torch.empty((rows, kv_heads, splits), dtype=torch.int32, device=q.device)
    factors = scale * LOG2_E, rope.scaling**2
    with torch.cuda.device_of(q):
        if old:
            from . import attention_sm75  # it takes helpers from here

            if exact is not None and exact_splits:
                _launch_exact(q4, positions, exact, rope, layout.align, factors, exact_o, exact_lse, exact_each, matrix)
            states = c, split_lse, segments, o, o_lse
            attention_sm75._attend_old_cards(q4, positions, pages, rope, *factors, states)
        else:
            turn = max(1, settings["W"] * 64 // layout.chunk)  # chunks that the warps take at a time
            each = _launch.cdiv(_launch.cdiv(chunks, turn), splits) * turn
            u_blocks = _launch.cdiv(each * layout.chunk, layout.align) + 1
            shape = (rows, kv_heads, splits, u_blocks)
            u_shape = (pad, 4 * k_rank) if layout.k.is_float else (_launch.cdiv(k_rank, 32), 2 * pad, 32)
            u = torch.empty((*shape, *u_shape), dtype=torch.int8, device=q.device)
            affine = torch.empty((*shape, pad, 2), dtype=torch.float32, device=q.device)
            k, v, key_positions = exact or (u, u, u)
            _attend_spectral_kernel[(kv_heads, rows, exact_rows * exact_splits + splits)](
                q4,
                positions,
                rope.turns,
                pages.k_basis,
                pages.k_scale,
                pages.k_pages,
                pages.v_pages,
                pages.skip,
                u,
                affine,
                pages.v_basis,
                pages.v_scale,
                pages.page_table,
                pages.segment_table,
                pages.lengths,
                c,
                split_lse,
                segments,
                o,
                o_lse,
                k,
                v,
                key_positions,
                exact_o,
                exact_lse,
                u_blocks,
                splits,
                key_positions.shape[-1],
                exact_each,
                exact_splits,
                queries,
                kv_heads,
                *factors,
                *q4.stride()[:3],
                positions.stride(0),
                pages.page_table.stride(0),
                pages.segment_table.stride(0),
                *k.stride()[:3],
                *v.stride()[:3],
                *_key_strides(key_positions),
                HG=group,
                ONE_QUERY=queries == 1,
                C=layout.chunk,
                ALIGN=layout.align,
                D=dim,
                PAIRS=rope.turns.shape[0],
                RK=k_rank,
                RV=layout.v.rank,
                K_BYTES=layout.k.bytes,
                V_BYTES=layout.v.bytes,
                K_GROUPS=layout.k.groups,
                V_GROUPS=layout.v.groups,
                K_FLOAT=layout.k.is_float,
                V_FLOAT=layout.v.is_float,
                EXACT=exact_splits > 0,
                RUN=64,
                OVERLAP=overlap,
                MATRIX=matrix,
                NATIVE=native,
                **tile,
                **settings,
            )
        block_n = max(16, _launch.next_power_of_2(splits))
        # All dimensions at once, or as many programs as keep the card busy.
        block_d = 32
        if rows * heads >= _launch.multiprocessors(q.device):
            block_d = min(_launch.next_power_of_2(dim), 128 if layout.v.rank <= 128 else 64)
        held = (block_n + block_d) * layout.v.rank  # numbers in registers
        _finish_spectral_kernel[(_launch.cdiv(dim, block_d), heads, rows)](
            c,
            split_lse,
            segments,
            o,
            o_lse,
            exact_o,
            exact_lse,
            pages.v_basis,
            pages.segment_table,
            pages.lengths,
            out,
            lse,
            splits,
            exact_splits,
            queries,
            kv_heads,
            pages.segment_table.stride(0),
            HG=group,
            D=dim,
            RV=layout.v.rank,
            BLOCK_N=block_n,
            BLOCK_E=_launch.next_power_of_2(exact_splits),
            BLOCK_D=block_d,
            OVERLAP=overlap,
            launch_pdl=overlap and _launch.OVERLAP,
            num_warps=min(16, max(2, _launch.next_power_of_2(_launch.cdiv(held, 5120)))),
        )
    return out, lse


def attend_spectral_torch(
    q: torch.Tensor,
    positions: torch.Tensor,
    pages: Pages,
    rope: Rope,
    *,
    scale: float | None = None,
    exact: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_spectral` in plain PyTorch, float32: coefficients times projected queries, without int8 splitting."""
    if exact is not None:
        cold = attend_spectral_torch(q, positions, pages, rope, scale=scale)
        return merge_states_torch(
            *attend_exact_torch(q, positions, *exact, rope, chunk=pages.layout.align, scale=scale), *cold
        )
    layout, batch = pages.layout, pages.page_table.shape[0]
    scale = _check_attention(q, positions, pages.kv_heads, layout.head_dim, batch, rope, scale)
    q4, pos = (q, positions) if q.dim() == 4 else (q[:, :, None], positions[:, None])
    chunks = min(pages.max_chunks, -(-int(pages.lengths.max()) // layout.chunk)) if batch else 0
    if chunks == 0 or q.numel() == 0:
        return q.new_zeros(q.shape, dtype=torch.float32), q.new_full(q.shape[:-1], float("-inf"), dtype=torch.float32)
    index = torch.arange(chunks * layout.chunk, device=q.device)
    live = index < pages.lengths[:, None]  # [B, T]
    table = torch.where(live[:, :: layout.chunk], pages.page_table[:, :chunks], 0).long()
    segments = torch.where(live[:, :: layout.chunk], pages.segment_table_by_chunk()[:, :chunks], 0).long()
    bits = torch.arange(32, device=q.device)
    skipped = ((pages.skip[table][..., None] >> bits) & 1).flatten(3).bool()  # [B, chunks, G, C]
    seen = live.unflatten(1, (chunks, -1))[:, :, None] & ~skipped

    # A 16-bit page may hold NaN where nothing was written or is seen.
    k = unpack_pages(pages.k_pages[table], layout.k, side="k").masked_fill(~seen[..., None], 0.0)  # [B, chunks, G, C, R]
    v = unpack_pages(pages.v_pages[table], layout.v, side="v").masked_fill(~seen[..., None], 0.0)
    u = project_queries_torch(q4, pos, pages, rope).repeat_interleave(layout.align // layout.chunk, -2)
    u = u[..., :chunks, :].unflatten(1, (pages.kv_heads, -1))
    scores = torch.einsum("bghqcr,bcgtr->bghqct", u, k) * scale
    scores = scores.masked_fill(~seen.transpose(1, 2)[:, :, None, None], float("-inf")).flatten(-2)
    lse = torch.logsumexp(scores, dim=-1)  # [B, G, H/G, Q]
    weights = (scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None]).exp().unflatten(-1, (chunks, -1))
    # A row shorter than the longest reads segment 0 for its missing chunks, which may hold NaN.
    v_scale = pages.v_scale[segments].masked_fill(~live[:, :: layout.chunk, None, None], 0.0)
    coefficients = torch.einsum("bghqct,bcgtr->bcghqr", weights, v) * v_scale[:, :, :, None, None]
    o = torch.einsum("bcghqr,bcgrd->bghqd", coefficients, pages.v_basis[segments].float())
    return o.flatten(1, 2).reshape(q.shape), lse.flatten(1, 2).reshape(q.shape[:-1])


def _check_exact(q, positions, k, v, key_positions, rope, chunk, scale):
    check_tensor("k", k, shape=(None,) * 4, dtype=FLOATS, unit_stride=True)
    batch, kv_heads, tokens, dim = k.shape
    check_in("k: head dimension", dim, HEAD_DIMS)
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    scale = _check_attention(q, positions, kv_heads, dim, batch, rope, scale)
    check_tensor("k", k, device=q.device)
    _launch.check_bf16("k", k)
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

    A query at position m sees the keys at positions 0 .. m. Fastest when slots that are neighbours lie in few blocks of
    alignment: queries are turned once for each block that a tile of 32 slots (16 on cards before sm_80) has keys of.

    Args:
        q: [B, H, D] or [B, H, Q, D] before RoPE, fp16, bf16 or fp32; last dimension of stride 1; H a multiple of G.
        positions: int32 or int64 [B] or [B, Q], positions of the queries.
        k: [B, G, N, D] phase-aligned keys (`phase_align` with this chunk); last dimension of stride 1, others any.
        v: [B, G, N, D] values, likewise.
        key_positions: int32 [B, N] or [B, G, N], position of each slot; negative: an unused slot (it may hold NaN).
        rope, scale, out, lse, splits, matrix_units: as in `attend_spectral`.
        chunk: positions of a block of phase alignment.
    Returns:
        (o, lse), float32, as `attend_spectral`. Float32 arithmetic (products of two or three 16-bit or tf32 parts).
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
    if q.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    q4, positions = (q, positions) if q.dim() == 4 else (q[:, :, None], positions[:, None])
    positions = positions if positions.stride(-1) == 1 else positions.contiguous()
    matrix = _launch.has_matrix_units(q.device) if matrix_units is None else matrix_units
    exact, factors = (k, v, key_positions), (scale * LOG2_E, rope.scaling**2)
    with torch.cuda.device_of(q):
        tile, programs, tiles = _exact_grid(q4.shape[1] // k.shape[1], q4.shape[2], k.shape[2], matrix)
        programs *= k.shape[1] * k.shape[0]
        splits = min(splits or count_splits(programs, tiles, q.device, each=EXACT_RESIDENT), tiles)
        each, o_splits, lse_splits = _exact_states(q4, splits, tiles, tile)
        if splits == 1:
            o_splits, lse_splits = out, lse
        _launch_exact(q4, positions, exact, rope, chunk, factors, o_splits, lse_splits, each, matrix)
    if splits == 1:
        return out, lse
    return merge_many_states(
        o_splits.view(*lse.shape, splits, -1), lse_splits.view(*lse.shape, splits), out=out, out_lse=lse
    )


def _exact_grid(group: int, queries: int, tokens: int, matrix: bool) -> tuple[dict[str, int], int, int]:
    """(rows and keys of a tile, programs a row, KV head and split, tiles of the keys) of exact attention."""
    tile = {"BLOCK_M": 16, "BLOCK_N": 32}
    if not matrix:
        tile = {"BLOCK_M": min(4, _launch.next_power_of_2(group * queries)), "BLOCK_N": 16}
    return tile, _launch.cdiv(group * queries, tile["BLOCK_M"]), _launch.cdiv(tokens, tile["BLOCK_N"])


def _exact_states(q: torch.Tensor, splits: int, tiles: int, tile: dict[str, int]) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(tokens of a split of the exact tokens, room for the splits' states: o [B, H, Q, splits, D], lse)."""
    batch, heads, queries, dim = q.shape
    o = torch.empty((batch, heads, queries, splits, dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((batch, heads, queries, splits), dtype=torch.float32, device=q.device)
    return _launch.cdiv(tiles, max(splits, 1)) * tile["BLOCK_N"], o, lse


def _key_strides(key_positions: torch.Tensor) -> tuple[int, int]:
    """Strides of rows and KV heads; positions [B, N] are all heads'."""
    return key_positions.stride(0), key_positions.stride(1) if key_positions.dim() == 3 else 0


def _launch_exact(
    q: torch.Tensor,
    positions: torch.Tensor,
    exact: tuple[torch.Tensor, ...],
    rope: Rope,
    chunk: int,
    factors: tuple[float, float],
    o: torch.Tensor,
    lse: torch.Tensor,
    each: int,
    matrix: bool,
) -> None:
    """`_attend_exact_kernel` by itself: q [B, H, Q, D], positions [B, Q] of last stride 1; states as `_exact_states`."""
    k, v, key_positions = exact
    batch, kv_heads, tokens, dim = k.shape
    _, heads, queries, _ = q.shape
    group = heads // kv_heads
    tile, programs, _ = _exact_grid(group, queries, tokens, matrix)
    splits = lse.numel() // (batch * heads * queries)
    _attend_exact_kernel[(splits, kv_heads * programs, batch)](
        q,
        positions,
        k,
        v,
        key_positions,
        rope.turns,
        o,
        lse,
        tokens,
        each,
        splits,
        queries,
        kv_heads,
        *factors,
        *q.stride()[:3],
        positions.stride(0),
        *k.stride()[:3],
        *v.stride()[:3],
        *_key_strides(key_positions),
        HG=group,
        ONE_QUERY=queries == 1,
        C=chunk,
        D=dim,
        PAIRS=rope.turns.shape[0],
        MATRIX=matrix,
        NATIVE=_launch.is_native(q),
        num_warps=4,
        num_stages=1,
        **tile,
    )


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
