"""Encode keys and values into pages, and back.

A token at position p of a row goes to page block_table[row, p // 64] as soon as it is known,
whatever else holds it: a page is a function of its tokens, their positions and the codec, as in an
fp8 cache. Per token and head

    kappa  = R(-t0) k_rot, rounded to the dtype of k
    code_r = clamp(floor(kappa . e_r - offset_r + 2**(b-1)), 0, 2**b - 1)

with e_r column r of the encoder and b the bits of component r (codec.py, layout.py); values
likewise, not turned, without offset.

`encode` takes a prompt, a page a program; `append` the few tokens of a decode step, both sides in
one launch. Both also copy the tokens that are to be attended exactly to their slots (window.py).

Source: Eckart and Young (1936): the best rank in the metric of the queries; calibrate.py fits it.
Oracle: reference/compress.py.   Test: tests/test_compress.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _bits, _launch
from ._checks import FLOATS, check_ids, check_in, check_lens, check_tensor
from ._math import cos_sin, dot_f32, dot_int8_f32, row_of
from .codec import Codec, check_codec
from .layout import PAGE_SIZE, pack_pages, unpack_pages
from .rope import codec_rows, turn_back, turn_back_torch
from .window import check_exact, slot_of, slots_torch


@triton.jit
def byte_in_page(token, column, IS_K: tl.constexpr):
    """Byte of a full group (layout.py) for tokens below 64 and columns below 16; of a half group
    the same modulo 512, in the low bits for the first sub-tile."""
    if IS_K:
        byte = (
            token // 32 * 512 + token % 8 * 64 + column // 4 * 16 + token // 8 % 4 * 4 + column % 4
        )
    else:
        byte = (
            token // 4 % 2 * 512 + column % 8 * 64 + token % 4 * 16 + column // 8 * 8 + token // 8
        )
    return byte


@triton.jit
def _field(c, zero, low):
    """The codes of coefficients from bit `low` of a byte or word on, int32; `zero`: the code of 0,
    half their number. A top field's sign bit is not flipped."""
    code = tl.floor(c + zero)
    return tl.minimum(tl.maximum(code, 0.0), 2 * zero - 1).to(tl.int32) << low


@triton.jit
def _coefficients(byte, GROUPS: tl.constexpr, i: tl.constexpr):
    """Block i of bytes, in units of its steps, float32."""
    c = _bits.masked_bytes(byte, _bits.field_mask(GROUPS, i), 0, False).to(tl.float32)
    return (c + _bits.field_zero(GROUPS, i)) * _bits.field_weight(GROUPS, i)


@triton.jit
def _paired(row_ptr, d, freqs_ptr, live, PAIRS: tl.constexpr):
    """Of dimensions d (last axis) of the tokens at row_ptr: x, the dimensions that they turn with,
    frequencies, and signs of a turn backwards.

    row_ptr broadcasts with d; live likewise."""
    sign = tl.where(d < PAIRS, 1.0, tl.where(d < 2 * PAIRS, -1.0, 0.0))
    partner = tl.where(d < PAIRS, d + PAIRS, tl.where(d < 2 * PAIRS, d - PAIRS, d))
    freqs = tl.load(freqs_ptr + tl.minimum(d, partner), mask=d < 2 * PAIRS, other=0)
    x = tl.load(row_ptr + d, mask=live, other=0.0)
    return x, tl.load(row_ptr + partner, mask=live, other=0.0), freqs, sign


@triton.jit
def _turned_back(x, other, freqs, sign, start):
    """What `_paired` returns, turned back by `start` positions, in x's dtype."""
    cos, sin = cos_sin(start, freqs)
    return (x.to(tl.float32) * cos + other.to(tl.float32) * (sign * sin)).to(x.dtype)


@triton.jit
def _new_tokens(
    row_ptr, low, start, freqs_ptr, new,
    D: tl.constexpr, PAIRS: tl.constexpr, BLOCK_K: tl.constexpr, IS_K: tl.constexpr,
):  # fmt: skip
    """Dimensions from `low` on of the tokens at row_ptr [64] that are new, [BLOCK_K, 64]; keys are
    turned back."""
    d = low + tl.arange(0, BLOCK_K)
    live = new[None, :] & (d < D)[:, None]
    if IS_K:
        x = _turned_back(*_paired(row_ptr[None, :], d[:, None], freqs_ptr, live, PAIRS), start)
    else:
        x = tl.load(row_ptr[None, :] + d[:, None], mask=live, other=0.0)
    return x


@triton.jit
def _copy_exact(
    row_ptr, exact_ptr, position, kept, stride_slot,
    D: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """The tokens at row_ptr [64] that are `kept`, to their slots."""
    d = tl.arange(0, triton.next_power_of_2(D))
    live = kept[:, None] & (d < D)[None, :]
    x = tl.load(row_ptr[:, None] + d[None, :], mask=live, other=0.0)  # [64, D]
    slot = slot_of(position, SINKS, RING).to(tl.int64)
    tl.store(exact_ptr + slot[:, None] * stride_slot + d[None, :], x, mask=live)


@triton.jit(do_not_specialize=["T", "max_pages", "stride_table_b"])
def _encode_kernel(
    x_ptr,
    codec,  # encoder; of K offset and freqs, else None
    pages_ptr,
    exact_ptr,  # [max_seqs, G, S, D], or None
    tables,  # block_table, seq_lens, and or None: first, codec_ids, seq_ids
    T,
    G,
    max_pages,
    strides_x,  # (b, g, t)
    strides_pages,  # (page, g)
    strides_exact,  # (row, g, slot)
    stride_table_b,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    FRAME: tl.constexpr,
    GROUPS: tl.constexpr,
    IS_K: tl.constexpr,
    SINKS: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MATRIX: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """The new tokens of one page of one row and head: turn, project, quantise, pack; copy exact
    tokens."""
    encoder_ptr, offset_ptr, freqs_ptr = codec
    block_table_ptr, seq_lens_ptr, first_ptr, codec_ids_ptr, seq_ids_ptr = tables
    R: tl.constexpr = _bits.rank_of(GROUPS)
    g = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + b)
    skipped = 0
    if first_ptr is not None:
        skipped = tl.load(first_ptr + b)
    past = seq_len - (T - skipped)
    page_index = past // 64 + tl.program_id(0)
    token = tl.arange(0, 64)
    position = page_index * 64 + token
    new = (position >= past) & (position < seq_len)  # [64]
    if (page_index * 64 < seq_len) & (page_index < max_pages):
        x_ptr += b * strides_x[0] + g * strides_x[1]
        row_ptr = x_ptr + (position - past + skipped).to(tl.int64) * strides_x[2]  # [64]
        if exact_ptr is not None:
            if (page_index * 64 < SINKS) | (page_index * 64 + 64 > seq_len - RING):
                row = row_of(seq_ids_ptr, b, b)
                exact_ptr += row * strides_exact[0] + g * strides_exact[1]
                kept = new & ((position < SINKS) | (position >= seq_len - RING))
                _copy_exact(row_ptr, exact_ptr, position, kept, strides_exact[2], D, SINKS, RING)
        codec_row = row_of(codec_ids_ptr, b, 0) * G + g
        encoder_ptr += codec_row * (D * R)
        start = (page_index // (FRAME // 64) * FRAME).to(tl.int64)
        page = tl.load(block_table_ptr + b * stride_table_b + page_index).to(tl.int64)
        pages_ptr += page * strides_pages[0] + g * strides_pages[1]
        column = tl.arange(0, 16)
        if BLOCK_K >= D:
            whole = _new_tokens(row_ptr, 0, start, freqs_ptr, new, D, PAIRS, BLOCK_K, IS_K)
        for n in tl.static_range(len(GROUPS)):
            byte = tl.zeros([16, 64], dtype=tl.int32)
            for f in tl.static_range(_bits.fields_of(GROUPS, n)):
                r = (_bits.first_block(GROUPS, n) + f) * 16 + column
                c = tl.zeros([16, 64], dtype=tl.float32)
                for low in range(0, D, BLOCK_K):
                    d = low + tl.arange(0, BLOCK_K)
                    e_ptr = encoder_ptr + d[None, :] * R + r[:, None]
                    e = tl.load(e_ptr, mask=(d < D)[None, :], other=0.0)  # [16, BLOCK_K]
                    if BLOCK_K >= D:
                        x = whole  # [BLOCK_K, 64]
                    else:
                        x = _new_tokens(
                            row_ptr, low, start, freqs_ptr, new, D, PAIRS, BLOCK_K, IS_K
                        )
                    c += dot_f32(e, x, MATRIX, NATIVE)
                if offset_ptr is not None:
                    c -= tl.load(offset_ptr + codec_row * R + r)[:, None]
                byte |= _field(c, _bits.codes_of(GROUPS, n, f)[0], _bits.codes_of(GROUPS, n, f)[1])
            if _bits.bits_of(GROUPS, n) == 8:
                byte ^= 128
            group_ptr = pages_ptr + _bits.group_offset(GROUPS, n)
            at = byte_in_page(token[None, :], column[:, None], IS_K)
            if _bits.is_half_group(GROUPS, n):
                _store_two_a_byte(group_ptr, at, byte, new, IS_K)
            else:
                tl.store(group_ptr + at, byte.to(tl.uint8), mask=new[None, :])


@triton.jit
def _by_subtile(x, IS_K: tl.constexpr):
    """[16, 64] by token as two [16, 32]: the tokens of sub-tile 0 and those of sub-tile 1, bytes in
    one order."""
    if IS_K:
        x = tl.permute(tl.reshape(x, [16, 2, 32]), [0, 2, 1])
    else:
        x = tl.permute(tl.reshape(x, [16, 8, 2, 4]), [0, 1, 3, 2])
    return tl.split(tl.reshape(x, [16, 32, 2]))


@triton.jit
def _store_two_a_byte(group_ptr, at, byte, new, IS_K: tl.constexpr):
    """The bytes [16, 64] of a half group: sub-tile 0 in the low bits, 1 in the high ones. Tokens
    that are not new keep theirs."""
    byte_low, byte_high = _by_subtile(byte, IS_K)  # [16, 32]
    new = tl.broadcast_to(new[None, :], [16, 64]).to(tl.int32)
    new_low, new_high = _by_subtile(new, IS_K)
    at_low, _ = _by_subtile(at, IS_K)
    old = tl.load(group_ptr + at_low, mask=(new_low & new_high) == 0, other=0).to(tl.int32)
    both = tl.where(new_low != 0, byte_low, old & 15)
    both |= tl.where(new_high != 0, byte_high, old >> 4) << 4
    tl.store(group_ptr + at_low, both.to(tl.uint8), mask=(new_low | new_high) != 0)


def _check_tokens(name: str, x: torch.Tensor, codec: Codec) -> None:
    """[B, G, T, D] of the codec's heads and dimension, on its device."""
    device, shape = check_codec(codec), (None, codec.kv_heads, None, codec.layout.head_dim)
    check_tensor(name, x, shape=shape, dtype=FLOATS, device=device, unit_stride=True)


def check_pages(name: str, pages: torch.Tensor, codec: Codec, side: str) -> None:
    """uint8 [num_pages, G, 64 * bytes] of one side: strides of pages and heads are multiples of
    16."""
    device = check_codec(codec)
    shape = (None, codec.kv_heads, PAGE_SIZE * codec.layout.side(side).bytes)
    check_tensor(name, pages, shape=shape, dtype=torch.uint8, device=device, unit_stride=True)
    strides, offset = pages.stride()[:2], pages.storage_offset()
    if any(n % 16 for n in (*strides, offset)):
        raise ValueError(
            f"{name}: expected strides and an offset that are multiples of 16, "
            f"got {strides}, {offset}"
        )


def check_table(
    block_table: torch.Tensor, seq_lens: torch.Tensor, batch: int | None, device: torch.device
) -> None:
    """int32 [B, max_pages] and int32 [B]."""
    shape, i32 = (batch, None), torch.int32
    check_tensor(
        "block_table", block_table, shape=shape, dtype=i32, device=device, unit_stride=True
    )
    check_lens(seq_lens, block_table.shape[0], device)


def encode(
    x: torch.Tensor,
    codec: Codec,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    side: str,
    first: torch.Tensor | None = None,
    exact: torch.Tensor | None = None,
    sinks: int = 0,
    codec_ids: torch.Tensor | None = None,
    seq_ids: torch.Tensor | None = None,
) -> None:
    """Store the keys or values of a prompt: encode them into pages, copy those that stay exact.

    The tokens x[b, :, first[b]:] of row b are its newest: at positions seq_lens[b] - n ..
    seq_lens[b] - 1 with n = T - first[b]. Other tokens of a page keep their codes.

    Args:
        x: [B, G, T, D] keys as the model rotated them, or values; fp16, bf16 or fp32; last
            dimension of stride 1.
        codec: of the layer.
        pages: uint8 k_pages or v_pages [num_pages, G, 64 * bytes], written in place; strides of
            pages and heads any multiples of 16.
        block_table: int32 [B, max_pages], page of positions 64 j .. 64 j + 63 of a row; no page
            twice.
        seq_lens: int32 [B], tokens of a row with the new ones.
        side: "k" or "v".
        first: int32 [B], left padding of x, or None: none.
        exact: k_exact or v_exact [max_seqs, G, sinks + ring, D] in x's dtype, or None: no exact
            copies.
        sinks: first tokens of a row that stay exact.
        codec_ids, seq_ids: int32 [B], row of the codec, and of `exact`, of a sequence; None: 0, and
            its index.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    Float32 arithmetic: a coefficient at the boundary of two codes may be either.
    """
    check_in("side", side, ("k", "v"))
    _check_tokens("x", x, codec)
    check_pages("pages", pages, codec, side)
    (batch, heads, tokens, dim), device, ring = x.shape, x.device, 0
    check_table(block_table, seq_lens, batch, device)
    check_ids(batch, device, first=first, codec_ids=codec_ids)
    if exact is not None:
        ring = check_exact("exact", exact, x, sinks, seq_ids, heads=heads, dtype=x.dtype)
    if not _launch.runs_kernel(x):
        return encode_torch(
            x, codec, pages, block_table, seq_lens, side=side, first=first, exact=exact,
            sinks=sinks, codec_ids=codec_ids, seq_ids=seq_ids,
        )  # fmt: skip
    if x.numel() == 0:
        return None
    matrix, k = _launch.has_matrix_units(x.device), side == "k"
    tables = (block_table, seq_lens, first, codec_ids, seq_ids)
    tensors = (codec.k_encoder, codec.k_offset, codec.freqs) if k else (codec.v_encoder, None, None)
    with torch.cuda.device_of(x):
        # Tokens that start inside a page reach into one page more.
        _encode_kernel[(_launch.cdiv(tokens, PAGE_SIZE) + 1, heads, batch)](
            x, tensors, pages, exact, tables, tokens, heads, block_table.shape[1], x.stride()[:3],
            pages.stride()[:2], (0, 0, 0) if exact is None else exact.stride()[:3],
            block_table.stride(0), D=dim,
            PAIRS=codec.freqs.shape[0], FRAME=codec.layout.frame,
            GROUPS=codec.layout.side(side).groups, IS_K=k, SINKS=sinks, RING=ring,
            BLOCK_K=(128 if dim <= 128 else 64) if matrix else 4, MATRIX=matrix,
            NATIVE=_launch.is_native(x), num_warps=4, num_stages=1,
        )  # fmt: skip
    return None


def encode_torch(
    x, codec, pages, block_table, seq_lens, *, side, first=None, exact=None, sinks=0,
    codec_ids=None, seq_ids=None,
):  # fmt: skip
    """`encode` in plain PyTorch."""
    batch, _, tokens, _ = x.shape
    if x.numel() == 0:
        return
    skipped = torch.zeros_like(seq_lens) if first is None else first
    column = torch.arange(tokens, device=x.device)
    position = seq_lens[:, None] - tokens + column  # [B, T]; of the padding: not used
    row, t = torch.nonzero(column >= skipped[:, None], as_tuple=True)  # [N] tokens
    at = position[row, t].long()
    chosen = x[row, :, t]  # [N, G, D]
    if exact is not None:
        ring = exact.shape[2] - sinks
        keep = (at < sinks) | (at >= seq_lens[row] - ring)
        target = row[keep] if seq_ids is None else seq_ids.long()[row[keep]]
        exact[target, :, slots_torch(at[keep], sinks, ring)] = chosen[keep]
    rows = codec_rows(codec, codec_ids, batch)[row]
    if side == "k":
        frame = codec.layout.frame
        turned = turn_back_torch(chosen[:, :, None], at[:, None], codec.freqs, frame=frame)
        values = torch.einsum("ngd,ngdr->ngr", turned[:, :, 0].float(), codec.k_encoder[rows])
        values -= codec.k_offset[rows]
    else:
        values = torch.einsum("ngd,ngdr->ngr", chosen.float(), codec.v_encoder[rows])
    bands = codec.layout.side(side)
    touched, index = torch.unique(block_table[row, at // PAGE_SIZE].long(), return_inverse=True)
    old = unpack_pages(pages[touched], bands, side=side)  # [pages, G, 64, R]
    old[index, :, at % PAGE_SIZE] = values
    pages[touched] = pack_pages(old, bands, side=side)


@triton.jit
def _append_group(
    side,  # x, pages, exact slots; encoder; of K offset and freqs, else None
    strides,  # of x (b, g, q), pages (page, g), exact slots (row, g, slot)
    tables,  # block_table, seq_lens, and or None: codec_ids, seq_ids
    b,  # [N], rows of tokens
    ahead,  # [N], tokens of the row that are newer, and this one
    Q, G, max_pages, stride_table_b, D: tl.constexpr, PAIRS: tl.constexpr, FRAME: tl.constexpr,
    GROUPS: tl.constexpr, n: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """One group of one side of N tokens: project, quantise and pack them into their pages; with
    the first group they are copied to their slots."""
    x_ptr, pages_ptr, exact_ptr, encoder_ptr, offset_ptr, freqs_ptr = side
    block_table_ptr, seq_lens_ptr, codec_ids_ptr, seq_ids_ptr = tables
    IS_K: tl.constexpr = offset_ptr is not None
    R: tl.constexpr = _bits.rank_of(GROUPS)
    FIELDS: tl.constexpr = _bits.fields_of(GROUPS, n)
    BLOCKS: tl.constexpr = triton.next_power_of_2(FIELDS)
    g = tl.program_id(1).to(tl.int64)
    codec_row = row_of(codec_ids_ptr, tl.program_id(0) // Q, 0) * G + g  # with ids N is 1
    local = tl.arange(0, 16 * BLOCKS)
    r = _bits.first_block(GROUPS, n) * 16 + local
    real = local < 16 * FIELDS
    d = tl.arange(0, triton.next_power_of_2(D))
    # A layout that N does not change: sums over D have one order, a token's codes the same bits.
    e_ptr = encoder_ptr + codec_row * (D * R) + d[:, None, None] * R + r[None, :, None]
    mask = (d < D)[:, None, None] & real[None, :, None]
    encoder = tl.load(e_ptr, mask=mask, other=0.0)  # [D, R, 1]
    row_ptr = x_ptr + b * strides[0] + g * strides[1] + (Q - ahead).to(tl.int64) * strides[2]  # [N]
    mask = (d < D)[:, None]
    if IS_K:
        x, other, freqs, sign = _paired(row_ptr[None, :], d[:, None], freqs_ptr, mask, PAIRS)
        offset = tl.load(offset_ptr + codec_row * R + r, mask=real, other=0.0)
    else:
        x = tl.load(row_ptr[None, :] + d[:, None], mask=mask, other=0.0)  # [D, N]
    position = tl.load(seq_lens_ptr + b) - ahead
    tl.debug_barrier()  # no load is put off until registers are free: all of them are on their way
    live = (position >= 0) & (position // 64 < max_pages)
    position = tl.maximum(position, 0)
    page_ptr = block_table_ptr + b * stride_table_b + position // 64
    page = tl.load(page_ptr, mask=live, other=0).to(tl.int64)
    if IS_K:
        start = (position // FRAME * FRAME).to(tl.int64)
        turned = _turned_back(x, other, freqs, sign, start[None, :])
    else:
        turned = x
    c = tl.sum(turned.to(tl.float32)[:, None, :] * encoder, 0)  # [R, N]
    if IS_K:
        c -= offset[:, None]
    zero = tl.full(local.shape, 0.5, dtype=tl.float32)  # all codes of a block too many are 0
    low = local % 4 * 8  # four columns in a word: a quarter of the shuffles to add up blocks
    for f in tl.static_range(FIELDS):
        zero = tl.where(local // 16 == f, _bits.codes_of(GROUPS, n, f)[0], zero)
        low += tl.where(local // 16 == f, _bits.codes_of(GROUPS, n, f)[1], 0)
    field = tl.reshape(_field(c, zero[:, None], low[:, None]), [BLOCKS, 4, 4, b.shape[0]])
    word = tl.sum(tl.sum(field, 2), 0)  # [4, N]
    byte = (word[:, None, :] >> (tl.arange(0, 4) * 8)[None, :, None]) & 255
    byte = tl.reshape(byte, [16, b.shape[0]])
    if _bits.bits_of(GROUPS, n) == 8:
        byte ^= 128
    at = byte_in_page((position % 64)[None, :], tl.arange(0, 16)[:, None], IS_K)  # [16, N]
    stored = at < tl.where(live, 1024, 0)[None, :]
    group_ptr = pages_ptr + (page * strides[3] + g * strides[4])[None, :]
    group_ptr += _bits.group_offset(GROUPS, n)
    if _bits.is_half_group(GROUPS, n):
        # Another new token may have the other half of the byte: these four bits change alone.
        low = at % 4 * 8 + at // 512 * 4
        word_ptr = (group_ptr + at % 512 // 4 * 4).to(tl.pointer_type(tl.int32))
        tl.atomic_and(word_ptr, ~(15 << low), mask=stored, sem="relaxed")
        tl.atomic_or(word_ptr, byte << low, mask=stored, sem="relaxed")
    else:
        tl.store(group_ptr + at, byte.to(tl.uint8), mask=stored)
    if n == 0:
        slot = slot_of(position, SINKS, RING).to(tl.int64) * strides[7]
        slot_ptr = exact_ptr + row_of(seq_ids_ptr, b, b) * strides[5] + g * strides[6] + slot
        tl.store(slot_ptr[None, :] + d[:, None], x, mask=mask & live[None, :])


@triton.jit(do_not_specialize=["B", "max_pages", "stride_table_b"])
def _append_kernel(
    k, strides_k, v, strides_v, tables, B, Q, G, max_pages, stride_table_b,
    D: tl.constexpr, PAIRS: tl.constexpr, FRAME: tl.constexpr, K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr, TOKENS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One group of K's or V's components of TOKENS new tokens of one head; k, v and their strides
    are the sides of `_append_group`."""
    if OVERLAP:  # the attention kernel may start: what it reads of this one's work it waits for
        tl.extra.cuda.gdc_launch_dependents()
    # The last one again where there are not as many.
    token = tl.minimum(tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), B * Q - 1)
    b, ahead = (token // Q).to(tl.int64), Q - token % Q
    for n in tl.static_range(len(K_GROUPS)):
        if tl.program_id(2) == n:
            _append_group(
                k, strides_k, tables, b, ahead, Q, G, max_pages, stride_table_b,
                D, PAIRS, FRAME, K_GROUPS, n, SINKS, RING,
            )  # fmt: skip
    for n in tl.static_range(len(V_GROUPS)):
        if tl.program_id(2) == len(K_GROUPS) + n:
            _append_group(
                v, strides_v, tables, b, ahead, Q, G, max_pages, stride_table_b,
                D, PAIRS, FRAME, V_GROUPS, n, SINKS, RING,
            )  # fmt: skip


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    codec: Codec,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_exact: torch.Tensor,
    v_exact: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sinks: int,
    codec_ids: torch.Tensor | None = None,
    seq_ids: torch.Tensor | None = None,
) -> None:
    """Store the newest tokens of a decode step, K and V in one launch: into their exact slots and
    their pages.

    Args:
        k, v: [B, G, Q, D] as the model rotated them; of positions seq_lens - Q .. seq_lens - 1; Q
            at most the ring's slots; last dimension of stride 1.
        k_exact, v_exact: [max_seqs, G, sinks + ring, D] in the dtype of k.
        codec, k_pages, v_pages, block_table, seq_lens, sinks, codec_ids, seq_ids: as in `encode`. A
            row whose length is below Q (a padded row of length 0) has its tokens at negative
            positions left out.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    _check_tokens("k", k, codec)
    (batch, heads, queries, dim), device = k.shape, k.device
    check_tensor("v", v, shape=k.shape, dtype=k.dtype, device=device, unit_stride=True)
    check_pages("k_pages", k_pages, codec, "k")
    check_pages("v_pages", v_pages, codec, "v")
    check_table(block_table, seq_lens, batch, device)
    check_ids(batch, device, codec_ids=codec_ids)
    for name, x in (("k_exact", k_exact), ("v_exact", v_exact)):
        ring = check_exact(name, x, k, sinks, seq_ids, heads=heads, dtype=k.dtype)
    check_tensor("v_exact", v_exact, shape=(None, heads, k_exact.shape[2], dim))
    if queries > ring:
        raise ValueError(f"k: expected at most {ring} tokens, the slots of the ring, got {queries}")
    if not _launch.runs_kernel(k):
        return append_torch(
            k, v, codec, k_pages, v_pages, k_exact, v_exact, block_table, seq_lens,
            sinks=sinks, codec_ids=codec_ids, seq_ids=seq_ids,
        )  # fmt: skip
    if k.numel() == 0:
        return None
    with torch.cuda.device_of(k):
        groups = codec.layout.k.groups, codec.layout.v.groups
        parts = sum(map(len, groups))
        # Two tokens share a program's encoder where a multiprocessor has more than four programs.
        many = batch * queries * heads * parts > 4 * _launch.multiprocessors(k.device)
        tokens = 2 if many and codec_ids is None else 1
        sides = (
            (k, k_pages, k_exact, codec.k_encoder, codec.k_offset, codec.freqs),
            (v, v_pages, v_exact, codec.v_encoder, None, None),
        )
        strides = [
            (*x.stride()[:3], *pages.stride()[:2], *exact.stride()[:3])
            for x, pages, exact, *_ in sides
        ]
        _append_kernel[(_launch.cdiv(batch * queries, tokens), heads, parts)](
            sides[0], strides[0], sides[1], strides[1],
            (block_table, seq_lens, codec_ids, seq_ids), batch, queries, heads,
            block_table.shape[1], block_table.stride(0), D=dim, PAIRS=codec.freqs.shape[0],
            FRAME=codec.layout.frame, K_GROUPS=groups[0], V_GROUPS=groups[1], SINKS=sinks,
            RING=ring, TOKENS=tokens, OVERLAP=_launch.overlaps_launches(k.device),
            num_warps=_launch.next_power_of_2(dim) // 32,
        )  # fmt: skip
    return None


def append_torch(
    k, v, codec, k_pages, v_pages, k_exact, v_exact, block_table, seq_lens, *, sinks,
    codec_ids=None, seq_ids=None,
):  # fmt: skip
    """`append` in plain PyTorch: `encode_torch` of both sides."""
    first = (k.shape[2] - seq_lens).clamp_min(0).to(torch.int32)
    for side, x, pages, exact in (("k", k, k_pages, k_exact), ("v", v, v_pages, v_exact)):
        encode_torch(
            x, codec, pages, block_table, seq_lens,
            side=side, first=first, exact=exact, sinks=sinks, codec_ids=codec_ids, seq_ids=seq_ids,
        )  # fmt: skip


@triton.jit(do_not_specialize=["max_pages", "stride_table_b"])
def _decode_kernel(
    pages_ptr,
    codec,  # basis, scale; of K mean, else None
    tables,  # block_table, seq_lens, codec_ids or None
    out_ptr,
    max_pages,
    G,
    strides_pages,  # (page, g)
    stride_table_b,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    IS_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MATRIX: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """BLOCK_D dimensions of the tokens of one page of one row and head: unpack and multiply by the
    basis."""
    basis_ptr, scale_ptr, mean_ptr = codec
    block_table_ptr, seq_lens_ptr, codec_ids_ptr = tables
    R: tl.constexpr = _bits.rank_of(GROUPS)
    blocks_d = tl.cdiv(D, BLOCK_D)
    page_index = tl.program_id(0) // blocks_d
    d = (tl.program_id(0) % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    g = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + b)
    token = tl.arange(0, 64)
    live = page_index * 64 + token < seq_len
    x = tl.zeros([BLOCK_D, 64], dtype=tl.float32)
    if page_index * 64 < seq_len:
        row = row_of(codec_ids_ptr, b, 0) * G + g
        page = tl.load(block_table_ptr + b * stride_table_b + page_index).to(tl.int64)
        pages_ptr += page * strides_pages[0] + g * strides_pages[1]
        column = tl.arange(0, 16)
        at = byte_in_page(token[None, :], column[:, None], IS_K)  # [16, 64]
        if mean_ptr is not None:
            x += tl.load(mean_ptr + row * D + d, mask=d < D, other=0.0)[:, None]
        for n in tl.static_range(len(GROUPS)):
            group_ptr = pages_ptr + _bits.group_offset(GROUPS, n)
            if _bits.is_half_group(GROUPS, n):
                byte = tl.load(group_ptr + at % 512) >> (at // 512 * 4).to(tl.uint8)
            else:
                byte = tl.load(group_ptr + at)
            for f in tl.static_range(_bits.fields_of(GROUPS, n)):
                c = _coefficients(byte, GROUPS, _bits.first_block(GROUPS, n) + f)
                r = row * R + (_bits.first_block(GROUPS, n) + f) * 16 + column
                c *= tl.load(scale_ptr + r)[:, None]
                basis_ptrs = basis_ptr + r[None, :] * D + d[:, None]
                basis = tl.load(basis_ptrs, mask=(d < D)[:, None], other=0)  # [BLOCK_D, 16]
                x += dot_int8_f32(basis, c, MATRIX, NATIVE)
    out = ((b * G + g) * max_pages + page_index) * 64 + token
    x = tl.where(live[None, :], x, 0.0)
    tl.store(out_ptr + out[None, :] * D + d[:, None], x, mask=(d < D)[:, None])


def decode(
    pages: torch.Tensor,
    codec: Codec,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    side: str,
    first_page: torch.Tensor | None = None,
    codec_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rebuild keys (as the model rotated them) or values from their pages.

    Args:
        pages, codec, block_table, seq_lens, side, codec_ids: as in `encode`.
        first_page: int32 [B], which page of its row column 0 of block_table is; None: 0.
    Returns:
        float32 [B, G, max_pages * 64, D], contiguous, by position from 64 * first_page on; zeros
        from a row's length on. Float32 arithmetic.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    check_in("side", side, ("k", "v"))
    check_pages("pages", pages, codec, side)
    check_table(block_table, seq_lens, None, pages.device)
    check_ids(len(seq_lens), pages.device, first_page=first_page, codec_ids=codec_ids)
    if not _launch.runs_kernel(pages):
        return decode_torch(
            pages, codec, block_table, seq_lens, side=side, first_page=first_page,
            codec_ids=codec_ids,
        )  # fmt: skip
    (batch, max_pages), heads = block_table.shape, codec.kv_heads
    dim, k = codec.layout.head_dim, side == "k"
    shape = (batch, heads, max_pages * PAGE_SIZE, dim)
    out = torch.empty(shape, dtype=torch.float32, device=pages.device)
    if out.numel() == 0:
        return out
    position = torch.arange(shape[2], device=pages.device).expand(batch, -1)
    if first_page is not None:
        position = position + PAGE_SIZE * first_page[:, None]
        seq_lens = seq_lens - PAGE_SIZE * first_page
    matrix = _launch.has_matrix_units(pages.device)
    block_d = 64 if matrix else 16
    tensors = (codec.v_basis, codec.v_scale, None)
    if k:
        tensors = (codec.k_basis, codec.k_scale, codec.k_mean)
    with torch.cuda.device_of(pages):
        _decode_kernel[(max_pages * _launch.cdiv(dim, block_d), heads, batch)](
            pages, tensors, (block_table, seq_lens, codec_ids), out, max_pages, heads,
            pages.stride()[:2], block_table.stride(0), D=dim,
            GROUPS=codec.layout.side(side).groups, IS_K=k, BLOCK_D=block_d, MATRIX=matrix,
            NATIVE=_launch.is_native(pages), num_warps=4,
        )  # fmt: skip
    if k:
        turn_back(out, position, codec.freqs, frame=codec.layout.frame, inverse=True, out=out)
    return out


def decode_torch(
    pages, codec, block_table, seq_lens, *, side, first_page=None, codec_ids=None
):  # fmt: skip
    """`decode` in plain PyTorch."""
    batch, max_pages = block_table.shape
    position = torch.arange(max_pages * PAGE_SIZE, device=pages.device).expand(batch, -1)
    if first_page is not None:
        position = position + PAGE_SIZE * first_page[:, None]
    live = position < seq_lens[:, None]  # [B, T]
    table = torch.where(live[:, ::PAGE_SIZE], block_table, 0).long()
    values = unpack_pages(pages[table], codec.layout.side(side), side=side)  # [B, pages, G, 64, R]
    rows = codec_rows(codec, codec_ids, batch)
    k = side == "k"
    basis = (codec.k_basis if k else codec.v_basis)[rows].float()  # [B, G, R, D]
    scale = (codec.k_scale if k else codec.v_scale)[rows]
    x = (values * scale[:, None, :, None]) @ basis[:, None]
    x = x.transpose(1, 2).flatten(2, 3)  # [B, G, T, D]
    if k:
        x = turn_back_torch(
            x + codec.k_mean[rows][:, :, None], position, codec.freqs,
            frame=codec.layout.frame, inverse=True,
        )  # fmt: skip
    return x.masked_fill(~live[:, None, :, None], 0.0).contiguous()
