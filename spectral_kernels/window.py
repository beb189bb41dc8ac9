"""The exact tokens of a row, in fixed slots: its first ones (sinks) and its newest ones (window).

    k_exact, v_exact [max_seqs, G, sinks + ring, D]
    slot(p) = p  if p < sinks  else  sinks + (p - sinks) % ring

A slot's position follows from the row's length alone: the newest position that has the slot. A key
at p is attended exactly if p < sinks or p >= seq_len - window (window <= ring); keys and queries
are as the model rotated them, so that a score is a plain dot product. Query i of Q is at position
seq_len - Q + i and sees the keys at or before it.

Source: Xiao et al., Efficient streaming language models with attention sinks (2023).
Oracle: reference/window.py.   Test: tests/test_window.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import _launch
from ._checks import FLOATS, check_ids, check_least, check_lens, check_output, check_tensor
from ._math import LN_2, dot_f32, row_of
from .merge import merge_many_states
from .rope import check_queries

LOG2_E = math.log2(math.e)
MAX_SPLITS = 128  # programs that share the slots of a row


@triton.jit
def slot_of(position, SINKS: tl.constexpr, RING: tl.constexpr):
    """The slot of a position that is not negative."""
    return tl.where(position < SINKS, position, SINKS + (position - SINKS) % tl.maximum(RING, 1))


def slots_torch(positions: torch.Tensor, sinks: int, ring: int) -> torch.Tensor:
    """The slots of positions, int64."""
    return torch.where(
        positions < sinks, positions, sinks + (positions - sinks) % max(ring, 1)
    ).long()


def positions_torch(seq_lens: torch.Tensor, slots: int, sinks: int) -> torch.Tensor:
    """The newest position that has each slot, int64 [B, slots]; negative: none has."""
    ring, slot = slots - sinks, torch.arange(slots, device=seq_lens.device)
    seq_lens = seq_lens.long()[:, None]
    last = seq_lens - sinks - 1  # counted from the first token of the ring
    newest = sinks + last - (last - (slot - sinks)) % max(ring, 1)
    newest = torch.where(newest >= sinks, newest, -1)
    return torch.where(slot < sinks, torch.where(slot < seq_lens, slot, -1), newest)


def check_exact(
    name: str, exact: torch.Tensor, x: torch.Tensor, sinks: int, seq_ids: torch.Tensor | None,
    *, heads: int, dtype: torch.dtype | tuple[torch.dtype, ...],
) -> int:  # fmt: skip
    """The ring's slots of k_exact or v_exact [max_seqs, G, sinks + ring, D] for x [B, .., D]."""
    check_least(sinks=(sinks, 0))
    check_ids(x.shape[0], x.device, seq_ids=seq_ids)
    shape = (None, heads, None, x.shape[-1])
    check_tensor(name, exact, shape=shape, dtype=dtype, device=x.device, unit_stride=True)
    _launch.check_bf16(name, exact)
    if seq_ids is None and exact.shape[0] < x.shape[0]:
        raise ValueError(f"{name}: expected at least {x.shape[0]} rows, got {exact.shape[0]}")
    if exact.shape[2] <= sinks:
        raise ValueError(f"{name}: expected more than {sinks} slots, got {exact.shape[2]}")
    return exact.shape[2] - sinks


@triton.jit
def window_split(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    seq_len,
    row,  # of k_exact
    split,
    block_m,
    b,
    g,
    Q,
    G,
    softmax_scale,
    strides_q,  # (b, h, q)
    strides_exact,  # (row, g, slot of K, row, g, slot of V)
    HG: tl.constexpr,
    D: tl.constexpr,
    EXACT: tl.constexpr,  # (SINKS, WINDOW, RING, SPLITS, BLOCK_M, BLOCK_N)
    MATRIX: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One split of the slots of row b and KV head g, for BLOCK_M rows, each a query and a head of
    the group.

    o [B, H, Q, SPLITS, D], lse [B, H, Q, SPLITS]."""
    SINKS: tl.constexpr = EXACT[0]
    RING: tl.constexpr = EXACT[2]
    SPLITS: tl.constexpr = EXACT[3]
    BLOCK_M: tl.constexpr = EXACT[4]
    BLOCK_N: tl.constexpr = EXACT[5]
    BLOCK_D: tl.constexpr = max(16, triton.next_power_of_2(D))
    SLOTS: tl.constexpr = SINKS + RING
    SHARE: tl.constexpr = (SLOTS + SPLITS * BLOCK_N - 1) // (SPLITS * BLOCK_N) * BLOCK_N
    k_ptr += row * strides_exact[0] + g * strides_exact[1]
    v_ptr += row * strides_exact[3] + g * strides_exact[4]
    m_row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    live = m_row < Q * HG
    query = m_row // HG
    head = g * HG + m_row % HG
    at = seq_len - Q + query  # [BLOCK_M] positions of the queries
    d = tl.arange(0, BLOCK_D)
    q_row = q_ptr + b * strides_q[0] + head * strides_q[1] + query.to(tl.int64) * strides_q[2]
    q = tl.load(q_row[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
    q = q.to(tl.float32) * softmax_scale  # [BLOCK_M, BLOCK_D], in log2 units

    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start in tl.range(
        split * SHARE, tl.minimum(split * SHARE + SHARE, SLOTS), BLOCK_N, num_stages=1
    ):
        slot = start + tl.arange(0, BLOCK_N)
        last = seq_len - SINKS - 1  # counted from the first token of the ring
        newest = SINKS + last - (last - (slot - SINKS) + RING) % RING
        used = (slot < SLOTS) & (newest >= SINKS) & (newest >= seq_len - EXACT[1])
        used = tl.where(slot < SINKS, slot < seq_len, used)
        position = tl.where(slot < SINKS, slot, newest)  # [BLOCK_N]
        mask = used[:, None] & (d < D)[None, :]
        at_slot = slot.to(tl.int64)[:, None]
        k = tl.load(k_ptr + at_slot * strides_exact[2] + d[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + at_slot * strides_exact[5] + d[None, :], mask=mask, other=0.0)
        s = dot_f32(q, tl.trans(k), MATRIX, NATIVE)  # [BLOCK_M, BLOCK_N]
        s = tl.where(used[None, :] & (position[None, :] <= at[:, None]), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
        old = tl.exp2(m - top)
        p = tl.exp2(s - top[:, None])
        l = l * old + tl.sum(p, 1)
        o = o * old[:, None] + dot_f32(p, v, MATRIX, NATIVE)  # [BLOCK_M, BLOCK_D]
        m = m_new
    o *= tl.where(l == 0.0, 0.0, 1.0 / l)[:, None]
    out = ((b * (G * HG) + head) * Q + query) * SPLITS + split
    lse = tl.where(l == 0.0, float("-inf"), m * LN_2 + tl.log(l))
    tl.store(lse_ptr + out, lse, mask=live)
    tl.store(o_ptr + out[:, None] * D + d[None, :], o, mask=live[:, None] & (d < D)[None, :])


@triton.jit
def _attend_window_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    seq_lens_ptr,
    seq_ids_ptr,
    o_ptr,
    lse_ptr,
    Q,
    G,
    softmax_scale,
    strides_q,  # (b, h, q)
    strides_exact,  # (row, g, slot of K, row, g, slot of V)
    HG: tl.constexpr,
    D: tl.constexpr,
    EXACT: tl.constexpr,
    MATRIX: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One split of the slots of one row and KV head: `window_split`."""
    blocks_m = tl.cdiv(Q * HG, EXACT[4])
    g = (tl.program_id(1) // blocks_m).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    row = row_of(seq_ids_ptr, b, b)
    window_split(
        q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, tl.load(seq_lens_ptr + b), row, tl.program_id(0),
        tl.program_id(1) % blocks_m, b, g, Q, G, softmax_scale, strides_q, strides_exact,
        HG, D, EXACT, MATRIX, NATIVE,
    )  # fmt: skip


def window_tile(
    group: int, queries: int, slots: int, matrix: bool, room: int
) -> tuple[int, int, int]:  # fmt: skip
    """SPLITS of the slots, at most as many as there is room for programs beside one another, none
    without a tile; BLOCK_M rows (a query and a head) and BLOCK_N slots of a tile."""
    block_m, block_n = 16, (32 if slots <= 32 else 64)
    if not matrix:
        block_m, block_n = min(4, _launch.next_power_of_2(group * queries)), 16
    tiles = _launch.cdiv(slots, block_n)
    # The kernel's share of a split is a whole number of tiles: no split lies past the slots.
    share = _launch.cdiv(tiles, max(1, min(tiles, room, MAX_SPLITS)))
    return _launch.cdiv(tiles, share), block_m, block_n


def softmax_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the scores, checked; default D**-0.5."""
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    return head_dim**-0.5 if scale is None else float(scale)


def check_window(q, k_exact, v_exact, heads, sinks, window, seq_ids) -> int:
    """The ring's slots; queries and slots fit each other."""
    _launch.check_bf16("q", q)
    ring = check_exact("k_exact", k_exact, q, sinks, seq_ids, heads=heads, dtype=FLOATS)
    check_tensor("v_exact", v_exact, shape=k_exact.shape)
    check_exact("v_exact", v_exact, q, sinks, seq_ids, heads=heads, dtype=k_exact.dtype)
    queries = q.shape[2] if q.dim() == 4 else 1
    check_least(window=(window, 1))
    if window > ring:
        raise ValueError(f"window: expected 1 .. {ring}, the ring's slots, got {window}")
    if queries > window:
        raise ValueError(f"q: expected at most window = {window} queries a row, got {queries}")
    return ring


def _launch_window(
    q, k_exact, v_exact, seq_lens, seq_ids, o, lse, kept, tile, scale, matrix
) -> None:  # fmt: skip
    """The states of the splits of `tile` (`window_tile`): o float32 [B, H, Q, SPLITS, D] and lse
    [B, H, Q, SPLITS] are written. q [B, H, Q, D]; kept: (sinks, window, ring); scale: of scores in
    log2 units."""
    (batch, heads, queries, dim), kv_heads = q.shape, k_exact.shape[1]
    group = heads // kv_heads
    _attend_window_kernel[(tile[0], kv_heads * _launch.cdiv(group * queries, tile[1]), batch)](
        q, k_exact, v_exact, seq_lens, seq_ids, o, lse, queries, kv_heads, scale, q.stride()[:3],
        (*k_exact.stride()[:3], *v_exact.stride()[:3]), HG=group, D=dim, EXACT=(*kept, *tile),
        MATRIX=matrix, NATIVE=_launch.is_native(q), num_warps=4, num_stages=1,
    )  # fmt: skip


def put(ring: torch.Tensor, x: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """Store x [B, G, Q, D], the newest tokens, in their slots of a ring [B, G, slots, D]."""
    slots = ring.shape[2]
    x = x[:, :, -slots:]
    at = (seq_lens[:, None] + torch.arange(-x.shape[2], 0, device=x.device)) % slots
    ring.scatter_(2, at.long()[:, None, :, None].expand_as(x), x)


def attend_window(
    q: torch.Tensor,
    k_exact: torch.Tensor,
    v_exact: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sinks: int,
    window: int,
    seq_ids: torch.Tensor | None = None,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    matrix_units: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of the newest queries over the exact tokens: sinks and window.

    Args:
        q: [B, H, D] or [B, H, Q, D] as the model rotated them, fp16, bf16 or fp32; Q at most
            window; last dimension of stride 1; H a multiple of G.
        k_exact, v_exact: [max_seqs, G, sinks + ring, D] of one float dtype and shape; last
            dimension of stride 1. Slots without a token may hold NaN.
        seq_lens: int32 [B], tokens of a row with those of the queries.
        sinks, window: first and newest tokens that are exact; window at most ring.
        seq_ids: int32 [B], row of k_exact of a sequence, or None: its index.
        scale: factor of the scores, default D**-0.5.
        out, lse: float32 [B, H, (Q,) D] and [B, H, (Q,)], contiguous, written in place.
        matrix_units: use `tl.dot`; default: from capability 8.0.
    Returns:
        (o, lse), float32: normalised output and natural-log log-sum-exp; (0, -inf) without keys.
        Float32 arithmetic.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    check_tensor("k_exact", k_exact, shape=(None,) * 4)
    check_queries(q, k_exact.shape[1], k_exact.shape[3], k_exact.device)
    ring = check_window(q, k_exact, v_exact, k_exact.shape[1], sinks, window, seq_ids)
    check_lens(seq_lens, q.shape[0], q.device)
    scale = softmax_scale(scale, q.shape[-1])
    out = check_output("out", out, q, q.shape)
    lse = check_output("lse", lse, q, q.shape[:-1])
    if not _launch.runs_kernel(q):
        found = attend_window_torch(
            q, k_exact, v_exact, seq_lens, sinks=sinks, window=window, seq_ids=seq_ids, scale=scale
        )
        return out.copy_(found[0]), lse.copy_(found[1])
    if q.numel() == 0:
        return out, lse
    q4 = q if q.dim() == 4 else q[:, :, None]
    batch, heads, queries, dim = q4.shape
    kv_heads, kept = k_exact.shape[1], (sinks, window, ring)
    matrix = _launch.has_matrix_units(q.device) if matrix_units is None else matrix_units
    room = 4 * _launch.multiprocessors(q.device) // (batch * kv_heads)
    tile = window_tile(heads // kv_heads, queries, sinks + ring, matrix, max(room, 1))
    states = out, lse
    if tile[0] > 1:
        states = out.new_empty((*lse.shape, tile[0], dim)), lse.new_empty((*lse.shape, tile[0]))
    tables = (seq_lens, seq_ids)
    with torch.cuda.device_of(q):
        _launch_window(q4, k_exact, v_exact, *tables, *states, kept, tile, scale * LOG2_E, matrix)
    return (out, lse) if tile[0] == 1 else merge_many_states(*states, out=out, out_lse=lse)


def attend_window_torch(
    q, k_exact, v_exact, seq_lens, *, sinks, window, seq_ids=None, scale=None
):  # fmt: skip
    """`attend_window` in plain PyTorch, float32."""
    scale = softmax_scale(scale, q.shape[-1])
    q4 = q if q.dim() == 4 else q[:, :, None]
    batch, _, queries, _ = q4.shape
    rows = slice(batch) if seq_ids is None else seq_ids.long()
    position = positions_torch(seq_lens, k_exact.shape[2], sinks)  # [B, S]
    slot = torch.arange(k_exact.shape[2], device=q.device)
    used = (position >= 0) & ((slot < sinks) | (position >= seq_lens[:, None] - window))
    k, v = (x[rows].float().masked_fill(~used[:, None, :, None], 0.0) for x in (k_exact, v_exact))
    at = seq_lens[:, None] - queries + torch.arange(queries, device=q.device)  # [B, Q]
    seen = used[:, None] & (position[:, None] <= at[..., None])  # [B, Q, S]
    grouped = q4.float().unflatten(1, (k.shape[1], -1))  # [B, G, H/G, Q, D]
    scores = torch.einsum("bghqd,bgnd->bghqn", grouped, k) * scale
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = (scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None]).exp()
    o = torch.einsum("bghqn,bgnd->bghqd", weights, v)
    return o.flatten(1, 2).reshape(q.shape), lse.flatten(1, 2).reshape(q.shape[:-1])
