"""RoPE at a distance: keys turned by their small offset inside a chunk, queries by the distance to the chunk's start.

Positions are cut into blocks of C. A key at p = t0 + d (t0 a multiple of C, 0 <= d < C) is stored as kappa = R(d) k, so

    (R(m) q) . (R(p) k) = (R(m - t0) q) . kappa          and with kappa ~ sum_r c_r b_r:   = sum_r c_r (b_r . R(m - t0) q)

and a query is turned once a block, by a distance that is never negative, and projected on the basis b.
R turns pairs (i, i + rotary_dim/2) of the first rotary_dim dimensions (the half-split form of Llama); others do not turn.

Angles: a frequency is held as an integer count of 2**-64 turns, so position * frequency modulo one turn is exact in int64
for any position; what is left is the float32 rounding of an angle within half a turn (below 3e-7 rad) and of cos and sin.

Source: Su et al., RoFormer (2021), section 3.2.2.   Oracle: reference/rope.py.   Test: tests/test_rope.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _launch
from ._checks import FLOATS, check_output, check_tensor
from ._launch import cos_sin, dot_int8_f32
from .pages import Pages

INTS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Rope:
    """Frequencies of a rotary embedding.

    Args:
        turns: int64 [rotary_dim / 2], contiguous: round(inv_freq / (2 pi) * 2**64) modulo 2**64.
        scaling: attention scaling s (yarn, longrope): cosine and sine of q and of k are multiplied by s. Keys are stored
            without it and queries get s * s on the rotary dimensions.
    """

    turns: torch.Tensor
    scaling: float = 1.0

    def __post_init__(self) -> None:
        check_tensor("turns", self.turns, shape=(None,), dtype=torch.int64, unit_stride=True)
        if not (math.isfinite(self.scaling) and self.scaling > 0):
            raise ValueError(f"scaling: expected a positive finite number, got {self.scaling}")

    @classmethod
    def from_inv_freq(cls, inv_freq: torch.Tensor, scaling: float = 1.0, device: torch.device | None = None) -> Rope:
        """From inverse frequencies in radians a position, float32 or float64 [rotary_dim / 2] (any device: it is read)."""
        check_tensor("inv_freq", inv_freq, shape=(None,), dtype=(torch.float32, torch.float64))
        # float.as_integer_ratio and 1/(2 pi) to 200 bits: no rounding before the last one.
        two_pi = 0xC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22  # floor(2 pi * 2**253)
        turns = []
        for value in inv_freq.double().cpu().tolist():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"inv_freq: expected finite numbers that are not negative, got {value}")
            num, den = value.as_integer_ratio()
            quotient = (((num << 318) // (den * two_pi)) + 1) >> 1  # round(value / (2 pi) * 2**64)
            quotient &= 2**64 - 1
            turns.append(quotient - 2**64 if quotient >= 2**63 else quotient)
        return cls(torch.tensor(turns, dtype=torch.int64, device=device or inv_freq.device), float(scaling))

    @property
    def rotary_dim(self) -> int:
        return 2 * self.turns.shape[0]

    def to(self, device: torch.device) -> Rope:
        return Rope(self.turns.to(device), self.scaling)


def _check_rope(rope: Rope, head_dim: int, device: torch.device) -> None:
    if not isinstance(rope, Rope):
        raise TypeError(f"rope: expected a Rope, got {type(rope).__name__}")
    check_tensor("rope.turns", rope.turns, device=device)
    if rope.rotary_dim > head_dim:
        raise ValueError(f"rope: expected a rotary_dim of at most D = {head_dim}, got {rope.rotary_dim}")


@triton.jit(do_not_specialize=["T", "stride_positions_b"])
def _rotate_kernel(
    x_ptr,
    positions_ptr,
    turns_ptr,
    out_ptr,
    T,
    stride_x_b,
    stride_x_n,
    stride_x_t,
    stride_positions_b,
    stride_out_b,
    stride_out_n,
    stride_out_t,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    live = t < T
    x_ptr += b * stride_x_b + n * stride_x_n + t[:, None] * stride_x_t
    out_ptr += b * stride_out_b + n * stride_out_n + t[:, None] * stride_out_t
    position = tl.load(positions_ptr + b * stride_positions_b + t, mask=live, other=0).to(tl.int64)
    if CHUNK > 0:
        position = position % CHUNK
    if PAIRS > 0:
        i = tl.arange(0, BLOCK_PAIRS)
        mask = live[:, None] & (i < PAIRS)[None, :]
        turns = tl.load(turns_ptr + i, mask=i < PAIRS, other=0)
        cos, sin = cos_sin(position[:, None], turns[None, :])  # [BLOCK_T, BLOCK_PAIRS]
        if INVERSE:
            sin = -sin
        x1 = tl.load(x_ptr + i[None, :], mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + PAIRS + i[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + i[None, :], x1 * cos - x2 * sin, mask=mask)
        tl.store(out_ptr + PAIRS + i[None, :], x1 * sin + x2 * cos, mask=mask)
    if 2 * PAIRS < D:
        i = 2 * PAIRS + tl.arange(0, BLOCK_REST)
        mask = live[:, None] & (i < D)[None, :]
        tl.store(out_ptr + i[None, :], tl.load(x_ptr + i[None, :], mask=mask, other=0.0), mask=mask)


def _check_rotate(x, positions, rope, chunk, out):
    check_tensor("x", x, shape=(None,) * 4, dtype=FLOATS, unit_stride=True)
    check_tensor("positions", positions, shape=(x.shape[0], x.shape[2]), dtype=INTS, device=x.device)
    _check_rope(rope, x.shape[-1], x.device)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    if out is not None:
        check_tensor("out", out, shape=x.shape, dtype=x.dtype, device=x.device, unit_stride=True)


def rotate(
    x: torch.Tensor,
    positions: torch.Tensor,
    rope: Rope,
    *,
    chunk: int | None = None,
    inverse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turn keys or queries by their position, or by their offset in a chunk (phase alignment).

    Args:
        x: [B, N, T, D] fp16, bf16 or fp32; last dimension of stride 1, others any.
        positions: int32 or int64 [B, T], not negative.
        rope: frequencies; its scaling is not applied.
        chunk: None turns by the position, C by the position modulo C.
        inverse: turn backwards (undoes the same call without it).
        out: where to write, shape and dtype of x; may be x itself.
    Returns:
        [B, N, T, D] in the dtype of x (new and contiguous unless `out` is given). Float32 arithmetic, one rounding.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    _check_rotate(x, positions, rope, chunk, out)
    if not _launch.runs_kernel(x):
        return rotate_torch(x, positions, rope, chunk=chunk, inverse=inverse, out=out)
    batch, heads, tokens, dim = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if x.numel() == 0:
        return out
    positions = positions if positions.stride(-1) == 1 else positions.contiguous()
    pairs = rope.turns.shape[0]
    block_t = 16
    with torch.cuda.device_of(x):
        _rotate_kernel[(_launch.cdiv(tokens, block_t), heads, batch)](
            x,
            positions,
            rope.turns,
            out,
            tokens,
            *x.stride()[:3],
            positions.stride(0),
            *out.stride()[:3],
            D=dim,
            PAIRS=pairs,
            CHUNK=chunk or 0,
            INVERSE=inverse,
            BLOCK_T=block_t,
            BLOCK_PAIRS=_launch.next_power_of_2(pairs),
            BLOCK_REST=_launch.next_power_of_2(dim - 2 * pairs),
        )
    return out


def rotate_torch(
    x: torch.Tensor,
    positions: torch.Tensor,
    rope: Rope,
    *,
    chunk: int | None = None,
    inverse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rotate` in plain PyTorch: the CPU path and the baseline."""
    _check_rotate(x, positions, rope, chunk, out)
    positions = positions.long()
    cos, sin = _cos_sin_torch(positions % chunk if chunk else positions, rope)  # [B, T, pairs]
    if inverse:
        sin = -sin
    result = _turn_torch(x.float(), cos[:, None], sin[:, None]).to(x.dtype)
    return result if out is None else out.copy_(result)


def _cos_sin_torch(positions: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, float32 [..., pairs], of int64 positions [...]."""
    phase = (positions[..., None] * rope.turns) >> 32  # wraps; arithmetic shift: -2**31 .. 2**31 - 1
    angle = phase.to(torch.float32) * (2 * math.pi / 2**32)
    return angle.cos(), angle.sin()


def _turn_torch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    pairs = cos.shape[-1]
    x1, x2, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos, rest), dim=-1)


def phase_align(
    k: torch.Tensor, positions: torch.Tensor, rope: Rope, *, chunk: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Phase-aligned keys R(position % chunk) k: `rotate` with a chunk. Shapes, dtypes and errors as there."""
    return rotate(k, positions, rope, chunk=chunk, out=out)


def phase_align_torch(
    k: torch.Tensor, positions: torch.Tensor, rope: Rope, *, chunk: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`phase_align` in plain PyTorch."""
    return rotate_torch(k, positions, rope, chunk=chunk, out=out)


@triton.jit
def projected_query(
    q_ptr,
    turns_ptr,
    basis_ptr,  # [R, D] of the segment and head
    distance,  # [M] int64, of each column
    offset,  # [M] int64, elements from q_ptr to each column's query
    live,  # [M]
    rotary_scale,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    M: tl.constexpr,
    MATRIX: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """basis . S R(distance) q for M columns (each a query head and a chunk), float32 [BLOCK_R, M], without k_scale."""
    r = tl.arange(0, BLOCK_R)
    row = basis_ptr + r[:, None] * D
    in_rank = (r < R)[:, None]
    u = tl.zeros([BLOCK_R, M], dtype=tl.float32)
    for start in range(0, PAIRS, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        in_pairs = i < PAIRS
        mask = in_pairs[:, None] & live[None, :]
        turns = tl.load(turns_ptr + i, mask=in_pairs, other=0)
        cos, sin = cos_sin(distance[None, :], turns[:, None])  # [BLOCK_K, M]
        q1 = tl.load(q_ptr + offset[None, :] + i[:, None], mask=mask, other=0.0).to(tl.float32) * rotary_scale
        q2 = tl.load(q_ptr + offset[None, :] + PAIRS + i[:, None], mask=mask, other=0.0).to(tl.float32) * rotary_scale
        basis_mask = in_rank & in_pairs[None, :]
        b1 = tl.load(row + i[None, :], mask=basis_mask, other=0)
        u += dot_int8_f32(b1, q1 * cos - q2 * sin, MATRIX, NATIVE)
        b2 = tl.load(row + PAIRS + i[None, :], mask=basis_mask, other=0)
        u += dot_int8_f32(b2, q1 * sin + q2 * cos, MATRIX, NATIVE)
    for start in range(2 * PAIRS, D, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        q = tl.load(q_ptr + offset[None, :] + i[:, None], mask=(i < D)[:, None] & live[None, :], other=0.0)
        b = tl.load(row + i[None, :], mask=in_rank & (i < D)[None, :], other=0)
        u += dot_int8_f32(b, q.to(tl.float32), MATRIX, NATIVE)
    return u


@triton.jit(do_not_specialize=["max_blocks", "Q", "stride_positions_b", "stride_segments_b"])
def _project_queries_kernel(
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
    HG,
    rotary_scale,
    stride_q_b,
    stride_q_h,
    stride_q_q,
    stride_positions_b,
    stride_segments_b,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    M: tl.constexpr,
    MATRIX: tl.constexpr,
    NATIVE: tl.constexpr,
):
    block = tl.program_id(0)
    g = tl.program_id(1)
    b = (tl.program_id(2) // Q).to(tl.int64)
    query = (tl.program_id(2) % Q).to(tl.int64)
    length = tl.load(lengths_ptr + b)
    h = tl.arange(0, M)
    r = tl.arange(0, BLOCK_R)
    head = (g * HG + h).to(tl.int64)
    u_row = ((b * (G * HG) + head) * Q + query) * max_blocks + block
    mask = (r < R)[:, None] & (h < HG)[None, :]
    u = tl.zeros([BLOCK_R, M], dtype=tl.float32)
    if block * ALIGN < length:
        segment = tl.load(segment_table_ptr + b * stride_segments_b + block).to(tl.int64)
        position = tl.load(positions_ptr + b * stride_positions_b + query).to(tl.int64)
        distance = tl.zeros([M], dtype=tl.int64) + (position - block * ALIGN)
        u = projected_query(
            q_ptr + b * stride_q_b + query * stride_q_q,
            turns_ptr,
            basis_ptr + (segment * G + g) * R * D,
            distance,
            head * stride_q_h,
            h < HG,
            rotary_scale,
            D,
            PAIRS,
            R,
            BLOCK_R,
            BLOCK_K,
            M,
            MATRIX,
            NATIVE,
        )
        u *= tl.load(scale_ptr + (segment * G + g) * R + r, mask=r < R, other=0.0)[:, None]
    tl.store(u_ptr + u_row[None, :] * R + r[:, None], u, mask=mask)


def check_queries(q: torch.Tensor, positions: torch.Tensor, kv_heads: int, head_dim: int, batch: int, rope: Rope) -> None:
    """What every function of queries [B, H, D] or [B, H, Q, D] and positions [B] or [B, Q] asks for."""
    check_tensor("q", q, dtype=FLOATS, unit_stride=True)
    _launch.check_bf16("q", q)
    if q.dim() not in (3, 4) or q.shape[0] != batch or q.shape[-1] != head_dim:
        raise ValueError(f"q: expected shape [{batch}, H, {head_dim}] or [{batch}, H, Q, {head_dim}], got {list(q.shape)}")
    if q.shape[1] == 0 or q.shape[1] % kv_heads:
        raise ValueError(f"q: expected a multiple of G = {kv_heads} heads, got {q.shape[1]}")
    shape = (batch,) if q.dim() == 3 else (batch, q.shape[2])
    check_tensor("positions", positions, shape=shape, dtype=INTS, device=q.device)
    _check_rope(rope, head_dim, q.device)


def _check_project(q, positions, pages, rope):
    if not isinstance(pages, Pages):
        raise TypeError(f"pages: expected Pages, got {type(pages).__name__}")
    check_queries(q, positions, pages.kv_heads, pages.layout.head_dim, pages.page_table.shape[0], rope)
    check_tensor("pages.k_basis", pages.k_basis, device=q.device)


def project_queries(
    q: torch.Tensor, positions: torch.Tensor, pages: Pages, rope: Rope, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Project queries, turned by their distance to each block, on the block's key basis.

    Args:
        q: [B, H, D] or [B, H, Q, D] before RoPE, fp16, bf16 or fp32; last dimension of stride 1.
        positions: int32 or int64 [B] or [B, Q], positions of the queries, at or after every cold token.
        pages: cold pages (key basis, segment table and lengths are read).
        rope: frequencies and attention scaling.
        out: float32, contiguous, shape of the result.
    Returns:
        float32 u [B, H, max_blocks, R_K] or [B, H, Q, max_blocks, R_K] with
        u[.., j, r] = k_scale[r] k_basis[r] . S R(m - j A) q, A = pages.layout.align and S = scaling**2 on the rotary
        dimensions; zero past a row's length. The score of a token is sum_r (n_r - (2**bits - 1)/2) u_r (times the softmax
        scale).
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    _check_project(q, positions, pages, rope)
    shape = (*q.shape[:-1], pages.max_blocks, pages.layout.k.rank)
    out = check_output("out", out, q, shape)
    if not _launch.runs_kernel(q):
        return out.copy_(project_queries_torch(q, positions, pages, rope))
    if out.numel() == 0:
        return out
    q4, positions = (q, positions) if q.dim() == 4 else (q[:, :, None], positions[:, None])
    positions = positions if positions.stride(-1) == 1 else positions.contiguous()
    batch, heads, queries, dim = q4.shape
    group = heads // pages.kv_heads
    matrix, block_r = _launch.has_matrix_units(q.device), _launch.next_power_of_2(pages.layout.k.rank)
    m = max(16 if matrix else 1, _launch.next_power_of_2(group))
    # Without matrix units a thread holds block_r * block_k * m / 128 products: 64 leave registers for the rest.
    block_k = 16 if matrix else min(16, max(1, 64 * 128 // (block_r * m)))
    with torch.cuda.device_of(q):
        _project_queries_kernel[(pages.max_blocks, pages.kv_heads, batch * queries)](
            q4,
            positions,
            rope.turns,
            pages.k_basis,
            pages.k_scale,
            pages.segment_table,
            pages.lengths,
            out,
            pages.max_blocks,
            queries,
            pages.kv_heads,
            group,
            rope.scaling**2,
            *q4.stride()[:3],
            positions.stride(0),
            pages.segment_table.stride(0),
            ALIGN=pages.layout.align,
            D=dim,
            PAIRS=rope.turns.shape[0],
            R=pages.layout.k.rank,
            BLOCK_R=block_r,
            BLOCK_K=block_k,
            M=m,
            MATRIX=matrix,
            NATIVE=_launch.is_native(q),
        )
    return out


def project_queries_torch(q: torch.Tensor, positions: torch.Tensor, pages: Pages, rope: Rope) -> torch.Tensor:
    """`project_queries` in plain PyTorch."""
    _check_project(q, positions, pages, rope)
    q4, pos = (q, positions) if q.dim() == 4 else (q[:, :, None], positions[:, None])
    starts = torch.arange(pages.max_blocks, device=q.device) * pages.layout.align
    live = starts < pages.lengths[:, None]  # [B, blocks]
    distance = torch.where(live[:, None], pos.long()[..., None] - starts, 0)  # [B, Q, blocks]
    cos, sin = _cos_sin_torch(distance, rope)
    scaled = q4.float()
    scaled = torch.cat((scaled[..., : rope.rotary_dim] * rope.scaling**2, scaled[..., rope.rotary_dim :]), dim=-1)
    turned = _turn_torch(scaled[..., None, :].expand(*q4.shape[:-1], len(starts), -1), cos[:, None], sin[:, None])
    segment = torch.where(live, pages.segment_table, 0).long()
    basis = pages.k_basis[segment].float() * pages.k_scale[segment][..., None]  # [B, blocks, G, R, D]
    grouped = turned.unflatten(1, (pages.kv_heads, -1))  # [B, G, H/G, Q, blocks, D]
    u = torch.einsum("bghqcd,bcgrd->bghqcr", grouped, basis).flatten(1, 2)
    u = u.masked_fill(~live[:, None, None, :, None], 0.0)
    return u if q.dim() == 4 else u[:, :, 0]
