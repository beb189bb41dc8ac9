"""RoPE by frames: keys and queries, as the model rotated them, turned back by their frame's start.

With R(p) the rotation by p positions and t0 = F * floor(p / F) the start of the frame of F
positions in which a key at p lies,

    kappa = R(-t0) [R(p) k] = R(p - t0) k
    [R(m) q] . [R(p) k] = (R(-t0) [R(m) q]) . kappa

Turning both sides back is an orthogonal change of coordinates, exact whatever rotation the model
applied. With the model's frequencies kappa turns by an offset below F only, so that the keys of one
frame resemble those of another, and one basis B and mean fit all of them:

    score = (mean + c B) . R(-t0) q_rot = bias + c . u        u = B R(-t0) q_rot

R turns pairs (i, i + pairs) of the first 2 * pairs dimensions (the half-split form of Llama);
others stay. Angles: a frequency is held as an integer count of 2**-64 turns, so that position *
frequency modulo one turn is exact in int64 for any position; what is left is the float32 rounding
of an angle within half a turn and of its cosine and sine.

Source: Su et al., RoFormer (2021), section 3.2.2.
Oracle: reference/rope.py.   Test: tests/test_rope.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import _launch
from ._checks import FLOATS, check_ids, check_least, check_tensor
from ._math import cos_sin
from .codec import Codec, check_codec

INTS = (torch.int32, torch.int64)


def freqs_from_inv_freq(
    inv_freq: torch.Tensor, device: torch.device | str | None = None
) -> torch.Tensor:
    """Frequencies as integer counts of 2**-64 turns a position.

    Args:
        inv_freq: float32 or float64 [pairs], radians a position, not negative (any device: it is
            read).
        device: of the result; default that of inv_freq.
    Returns:
        int64 [pairs]: round(inv_freq / (2 pi) * 2**64) modulo 2**64.
    Raises:
        TypeError, ValueError: inv_freq is not as above.
    """
    check_tensor("inv_freq", inv_freq, shape=(None,), dtype=(torch.float32, torch.float64))
    # float.as_integer_ratio and 2 pi to 256 bits: no rounding before the last one.
    two_pi = 0xC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22  # 2 pi * 2**253
    freqs = []
    for value in inv_freq.double().cpu().tolist():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"inv_freq: expected finite numbers that are not negative, got {value}"
            )
        num, den = value.as_integer_ratio()
        quotient = (((num << 318) // (den * two_pi)) + 1) >> 1  # round(value / (2 pi) * 2**64)
        quotient &= 2**64 - 1
        freqs.append(quotient - 2**64 if quotient >= 2**63 else quotient)
    return torch.tensor(freqs, dtype=torch.int64, device=device or inv_freq.device)


@triton.jit(do_not_specialize=["T", "stride_positions_b"])
def _rotate_kernel(
    x_ptr, positions_ptr, freqs_ptr, out_ptr, T, stride_x_b, stride_x_n, stride_x_t,
    stride_positions_b, stride_out_b, stride_out_n, stride_out_t, D: tl.constexpr,
    PAIRS: tl.constexpr, INVERSE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of one row and head, turned by their positions."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    live = t < T
    x_ptr += b * stride_x_b + n * stride_x_n + t[:, None] * stride_x_t
    out_ptr += b * stride_out_b + n * stride_out_n + t[:, None] * stride_out_t
    position = tl.load(positions_ptr + b * stride_positions_b + t, mask=live, other=0).to(tl.int64)
    if PAIRS > 0:
        i = tl.arange(0, BLOCK_PAIRS)
        mask = live[:, None] & (i < PAIRS)[None, :]
        freqs = tl.load(freqs_ptr + i, mask=i < PAIRS, other=0)
        cos, sin = cos_sin(position[:, None], freqs[None, :])  # [BLOCK_T, BLOCK_PAIRS]
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


def rotate(
    x: torch.Tensor,
    positions: torch.Tensor,
    freqs: torch.Tensor,
    *,
    inverse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turn keys or queries by their positions: R(p) x.

    Args:
        x: [B, N, T, D] fp16, bf16 or fp32; last dimension of stride 1, others any.
        positions: int32 or int64 [B, T], not negative.
        freqs: int64 [pairs], 2 * pairs <= D (`freqs_from_inv_freq`).
        inverse: turn backwards (undoes the same call without it).
        out: where to write, shape and dtype of x; may be x itself.
    Returns:
        [B, N, T, D] in the dtype of x (new and contiguous unless `out` is given). Float32
        arithmetic, one rounding.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    check_tensor("x", x, shape=(None,) * 4, dtype=FLOATS, unit_stride=True)
    (batch, heads, tokens, dim), device = x.shape, x.device
    check_tensor("positions", positions, shape=(batch, tokens), dtype=INTS, device=device)
    check_tensor("freqs", freqs, shape=(None,), dtype=torch.int64, device=device, unit_stride=True)
    pairs = freqs.shape[0]
    if 2 * pairs > dim:
        raise ValueError(f"freqs: expected at most D / 2 = {dim // 2} pairs, got {pairs}")
    if out is not None:
        check_tensor("out", out, shape=x.shape, dtype=x.dtype, device=device, unit_stride=True)
    if not _launch.runs_kernel(x):
        return rotate_torch(x, positions, freqs, inverse=inverse, out=out)
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if x.numel() == 0:
        return out
    positions, block_t = positions if positions.stride(-1) == 1 else positions.contiguous(), 16
    with torch.cuda.device_of(x):
        _rotate_kernel[(_launch.cdiv(tokens, block_t), heads, batch)](
            x, positions, freqs, out, tokens, *x.stride()[:3], positions.stride(0),
            *out.stride()[:3], D=dim, PAIRS=pairs, INVERSE=inverse, BLOCK_T=block_t,
            BLOCK_PAIRS=_launch.next_power_of_2(pairs),
            BLOCK_REST=_launch.next_power_of_2(dim - 2 * pairs),
        )  # fmt: skip
    return out


def rotate_torch(x, positions, freqs, *, inverse=False, out=None):
    """`rotate` in plain PyTorch: the CPU path and the baseline."""
    phase = (positions.long()[..., None] * freqs) >> 32  # wraps; arithmetic shift
    angle = phase.float()[:, None] * ((-1 if inverse else 1) * 2 * math.pi / 2**32)
    cos, sin, pairs = angle.cos(), angle.sin(), freqs.shape[0]  # [B, 1, T, pairs]
    x1, x2, rest = x.float().split((pairs, pairs, x.shape[-1] - 2 * pairs), dim=-1)
    result = torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos, rest), dim=-1)
    return result.to(x.dtype) if out is None else out.copy_(result)


def turn_back(
    x: torch.Tensor,
    positions: torch.Tensor,
    freqs: torch.Tensor,
    *,
    frame: int,
    inverse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turn rotated keys back by the starts of their frames: R(-t0) x, t0 = p - p % frame.

    Args:
        frame: F, positions of a frame.
        inverse: turn forward again: a stored key as the model rotated it.
        x, positions, freqs, out: as in `rotate`.
    Returns, raises: as `rotate`.
    """
    check_tensor("positions", positions, dtype=INTS)
    check_least(frame=(frame, 1))
    return rotate(x, positions - positions % frame, freqs, inverse=not inverse, out=out)


def turn_back_torch(x, positions, freqs, *, frame, inverse=False, out=None):
    """`turn_back` in plain PyTorch."""
    return rotate_torch(x, positions - positions % frame, freqs, inverse=not inverse, out=out)


def codec_rows(codec: Codec, codec_ids: torch.Tensor | None, batch: int) -> torch.Tensor:
    """The codec's row of each sequence, int64 [B]: `codec_ids`, or 0."""
    if codec_ids is None:
        return torch.zeros(batch, dtype=torch.int64, device=codec.freqs.device)
    return codec_ids.long()


def check_queries(q: torch.Tensor, heads: int, head_dim: int, device: torch.device) -> None:
    """q [B, H, (Q,) D] for G = heads."""
    check_tensor("q", q, dtype=FLOATS, device=device, unit_stride=True)
    if q.dim() not in (3, 4) or q.shape[-1] != head_dim:
        raise ValueError(
            f"q: expected shape [B, H, {head_dim}] or [B, H, Q, {head_dim}], got {list(q.shape)}"
        )
    if q.shape[1] % heads:
        raise ValueError(f"q: expected a multiple of G = {heads} heads, got {q.shape[1]}")


def project_queries(
    q: torch.Tensor,
    codec: Codec,
    max_frames: int,
    *,
    codec_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries turned back by the start of every frame, multiplied by the key basis and by the mean
    key; PyTorch on any device. (Kernels of attention project for the frames that they read.)

    Args:
        q: [B, H, D] or [B, H, Q, D] as the model rotated them, fp16, bf16 or fp32; last dimension
            of stride 1.
        codec: of the layer; H a multiple of its G.
        max_frames: frames 0 .. max_frames - 1 are projected.
        codec_ids: int32 [B], row of the codec of each sequence, or None: 0.
    Returns:
        u float32 [B, H, (Q,) max_frames, R_K]: k_scale_r k_basis_r . R(-j F) q, and bias float32
        [B, H, (Q,) max_frames]: k_mean . R(-j F) q. A token's score (before the softmax scale) is
        bias + sum_r (n_r + z_r) u_r of its frame. Float32 arithmetic.
    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    device = check_codec(codec)
    check_queries(q, codec.kv_heads, codec.layout.head_dim, device)
    check_ids(q.shape[0], device, codec_ids=codec_ids)
    check_least(max_frames=(max_frames, 0))
    q4 = q if q.dim() == 4 else q[:, :, None]
    starts = torch.arange(max_frames, device=q.device) * codec.layout.frame
    heads = (codec.kv_heads, q.shape[1] // codec.kv_heads, q4.shape[2])
    turned = q4.float().flatten(1, 2)[:, :, None].expand(-1, -1, max_frames, -1)
    turned = rotate_torch(turned, starts.expand(len(q), -1), codec.freqs, inverse=True)
    turned = turned.unflatten(1, heads)  # [B, G, H/G, Q, max_frames, D]
    rows = codec_rows(codec, codec_ids, q.shape[0])
    basis = codec.k_basis[rows].float() * codec.k_scale[rows][..., None]  # [B, G, R, D]
    u = torch.einsum("bghqcd,bgrd->bghqcr", turned, basis).flatten(1, 2)
    bias = torch.einsum("bghqcd,bgd->bghqc", turned, codec.k_mean[rows]).flatten(1, 2)
    return (u, bias) if q.dim() == 4 else (u[:, :, 0], bias[:, :, 0])
