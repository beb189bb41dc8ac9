"""Compress keys and values: second moments, weighted bases, and encoding into the bands of a page.

What a low rank and few bits lose must be lost where it counts, so the basis is fitted under a metric M [D, D]: for keys the
second moment of the queries as the chunks see them (errors of scores), for values the sum over the group's heads of
W_o^T W_o (errors of outputs). With X the rows (phase-aligned keys, or values), G = X^T X and M = L L^T

    L^T G L = V S^2 V^T        basis = V^T L^(-1)  [R, D]      encoder = L V  [D, R]

so X ~ (X encoder) basis has the least M-weighted error of its rank, from D x D eigenproblems alone (eigen.py).
Basis rows are then held in int8 with a float32 scale each. The encoder is recomputed for the basis as it is held,

    encoder = M B^T (B M B^T)^(-1)       (the inverse of B when R = D)

so rounding a basis of full rank loses nothing. A component's quantiser is uniform, with the step of least squared error.
Keys first lose their mean row, which biases make large: it becomes a component of its own, with one code for all tokens,
and kernels need not know (`Spectrum`). What each component loses at each precision, and what errors cost after the softmax
(`error_weights`), say which bands a layer needs.

Source: Eckart and Young (1936) in the M-norm; design of phase-aligned keys: rope.py.
Oracle: reference/compress.py.   Test: tests/test_compress.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from . import _launch
from ._checks import FLOATS, check_in, check_tensor
from ._launch import dot_f32, dot_int8_f32
from .attention import _block, _fields, _first_block, _group_offset, _half, _mask, _masked, _offset, _subtiles, _weight
from .eigen import eigenvectors
from .pages import CHUNKS, Bands, Pages, pack_pages, unpack_pages
from .rope import Rope, rotate

# Share of the mean eigenvalue added to a metric: directions that no query used must still be encoded, if coarsely.
METRIC_FLOOR = 1e-3


# Matrix units add up in float32 but cut the sum off instead of rounding it: a bias that grows with the terms. So no run of
# tokens longer than this is added up by them (64 steps of 16: at most 64 * 2**-23 = 8e-6, a quarter of that on average).
GRAM_RUN = 1024
# Programs a multiprocessor that share the sums over tokens: registers leave room for one (two, of 128 registers, spill and
# take a third longer on an H200). At T = 32,768, D = 128 their parts are 6 % of the bytes of keys and values.
GRAM_PROGRAMS = 1


@triton.jit(do_not_specialize=["T", "splits"])
def _gram_kernel(
    x_ptr,
    mean_ptr,  # float32 [B, G, D], or None
    out_ptr,
    T,
    splits,
    G,
    stride_x_b,
    stride_x_g,
    stride_x_t,
    D: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MATRIX: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One [BLOCK_D, BLOCK_D] tile of the second moment of one split of the tokens of one row and head.

    EXACT: x is 16 bits wide, and its products are exact in float32: they go to the matrix units as they are.
    """
    tiles = tl.cdiv(D, BLOCK_D)
    i = (tl.program_id(0) // tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    j = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    bg = tl.program_id(2).to(tl.int64)
    x_ptr += (bg // G) * stride_x_b + (bg % G) * stride_x_g
    each = tl.cdiv(tl.cdiv(T, RUN), splits) * RUN
    end = tl.minimum(split * each + each, T)
    out_ptr += ((bg * splits + split) * D + i[:, None]) * D + j[None, :]
    mask = (i < D)[:, None] & (j < D)[None, :]
    if mean_ptr is not None:
        mean_i = tl.load(mean_ptr + bg * D + i, mask=i < D, other=0.0)
        mean_j = tl.load(mean_ptr + bg * D + j, mask=j < D, other=0.0)
    for run in range(split * each, tl.maximum(end, split * each + 1), RUN):  # a split of no tokens stores zeros
        acc = tl.zeros([BLOCK_D, BLOCK_D], dtype=tl.float32)
        for start in range(run, tl.minimum(run + RUN, end), BLOCK_T):
            t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
            b = tl.load(x_ptr + t[:, None] * stride_x_t + j[None, :], mask=(t < T)[:, None] & (j < D)[None, :], other=0.0)
            if mean_ptr is not None:
                b = tl.where((t < T)[:, None], b.to(tl.float32) - mean_j[None, :], 0.0).to(b.dtype)
            if BLOCK_D >= D:
                a = tl.trans(b)
            else:
                a = tl.load(
                    x_ptr + t[None, :] * stride_x_t + i[:, None], mask=(t < T)[None, :] & (i < D)[:, None], other=0.0
                )
                if mean_ptr is not None:
                    a = tl.where((t < T)[None, :], a.to(tl.float32) - mean_i[:, None], 0.0).to(a.dtype)
            if EXACT:
                acc = tl.dot(a, b, acc)
            else:
                acc += dot_f32(a.to(tl.float32), b.to(tl.float32), MATRIX)
        if run > split * each:  # sums of runs are added in memory: registers hold no second tile
            acc += tl.load(out_ptr, mask=mask, other=0.0)
        tl.store(out_ptr, acc, mask=mask)
        tl.debug_barrier()  # the load may lay the tile out over the threads in another way


@triton.jit(do_not_specialize=["splits"])
def _gram_sum_kernel(parts_ptr, out_ptr, splits, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """The sum of all parts [splits, SIZE] of one row and head, BLOCK entries of it, in float64."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bg = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        mask = (split < splits)[:, None] & (at < SIZE)[None, :]
        parts = tl.load(parts_ptr + (bg * splits + split)[:, None] * SIZE + at[None, :], mask=mask, other=0.0)
        total += tl.sum(parts.to(tl.float64), 0)
    tl.store(out_ptr + bg * SIZE + at, total.to(tl.float32), mask=at < SIZE)


def gram(x: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
    """Second moment over tokens, X^T X.

    Args:
        x: [B, G, T, D] fp16, bf16 or fp32; last dimension of stride 1, others any.
        mean: float32 [B, G, D] to subtract from every token before, or None. Differences are rounded to the dtype of x.
    Returns:
        float32 [B, G, D, D], contiguous: float32 sums over GRAM_RUN tokens, added in float32, then in float64.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    check_tensor("x", x, shape=(None,) * 4, dtype=FLOATS, unit_stride=True)
    batch, heads, tokens, dim = x.shape
    if mean is not None:
        check_tensor("mean", mean, shape=(batch, heads, dim), dtype=torch.float32, device=x.device)
    if not _launch.runs_kernel(x):
        return gram_torch(x, mean)
    if batch * heads == 0 or tokens == 0:
        return x.new_zeros((batch, heads, dim, dim), dtype=torch.float32)
    matrix = _launch.has_matrix_units(x.device)
    exact = matrix and _launch.is_native(x) and x.dtype != torch.float32
    block_t, block_d = (64, min(128, triton.next_power_of_2(dim))) if exact else (32, 64) if matrix else (16, 16)
    tiles = triton.cdiv(dim, block_d) ** 2
    programs = GRAM_PROGRAMS * _launch.multiprocessors(x.device)
    splits = min(triton.cdiv(tokens, GRAM_RUN), max(1, programs // (batch * heads * tiles)))
    parts = torch.empty((batch, heads, splits, dim, dim), dtype=torch.float32, device=x.device)
    out = torch.empty((batch, heads, dim, dim), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _gram_kernel[(tiles, splits, batch * heads)](
            x,
            None if mean is None else mean.contiguous(),
            parts,
            tokens,
            splits,
            heads,
            *x.stride()[:3],
            D=dim,
            RUN=GRAM_RUN,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            MATRIX=matrix,
            EXACT=exact,
            num_warps=8 if block_d == 128 else 4,
            num_stages=4,
        )
        _gram_sum_kernel[(triton.cdiv(dim * dim, 512), batch * heads)](
            parts, out, splits, SIZE=dim * dim, BLOCK=512, BLOCK_SPLITS=8, num_warps=4
        )
    return out


def gram_torch(x: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
    """`gram` in plain PyTorch."""
    x = x.float() if mean is None else (x - mean[:, :, None]).to(x.dtype).float()
    return x.mT @ x


def query_metric(
    q: torch.Tensor, rope: Rope, *, chunk: int, kv_heads: int, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean second moment of queries as the chunks see them: of R(m - t0) q_m over all chunk starts t0 <= m.

    With z the queries turned to their absolute positions, as complex pairs, a chunk's turn by -t0 multiplies z_f conj(z_g)
    by exp(-i t0 (f - g)) and z_f z_g by exp(-i t0 (f + g)); summed over the chunks a query sees, that is one [D/2, D/2]
    factor for all queries of a chunk, so the queries are read once.

    Args:
        q: [B, H, T, D] before RoPE, of positions 0 .. T-1, fp16, bf16 or fp32; D even.
        rope: frequencies and attention scaling (scaling**2 on the rotary dimensions, as scores have it).
        chunk: chunk length C.      kv_heads: G; H is a multiple of it.
        weights: float32 [B, H], not negative: how much the queries of each head count, or None: all the same.
    Returns:
        float32 [B, G, D, D], symmetric, positive semi-definite up to rounding.
    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_tensor("q", q, shape=(None,) * 4, dtype=FLOATS)
    _, heads, tokens, dim = q.shape
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q: expected a multiple of kv_heads = {kv_heads} heads, got {heads}")
    if tokens == 0 or dim % 2:
        raise ValueError(f"q: expected at least one token and an even D, got shape {list(q.shape)}")
    size = heads // kv_heads
    shares: Sequence[torch.Tensor | None] = [None] * kv_heads
    if weights is not None:
        check_tensor("weights", weights, shape=(q.shape[0], heads), dtype=torch.float32, device=q.device)
        shares = weights.split(size, dim=1)
    # A KV head at a time: what is held in float32 is its queries alone.
    groups = zip(q.split(size, dim=1), shares, strict=True)
    return torch.cat([_group_metric(own, rope, chunk, share) for own, share in groups], dim=1)


def _group_metric(q: torch.Tensor, rope: Rope, chunk: int, weights: torch.Tensor | None) -> torch.Tensor:
    """`query_metric` of the query heads of one KV head: float32 [B, 1, D, D]."""
    batch, heads, tokens, dim = q.shape
    pairs = rope.turns.shape[0]
    positions = torch.arange(tokens, device=q.device).expand(batch, -1)
    turned = rotate(q if q.stride(-1) == 1 else q.contiguous(), positions, rope).float()
    turned = torch.cat((turned[..., : 2 * pairs] * rope.scaling**2, turned[..., 2 * pairs :]), dim=-1)
    if weights is not None:
        turned = turned * weights.sqrt()[..., None, None]
    rest = (dim - 2 * pairs) // 2  # dimensions that do not turn, paired as if their frequency were 0
    order = torch.cat(
        [
            torch.arange(start, start + size, device=q.device)
            for start, size in ((0, pairs), (2 * pairs, rest), (pairs, pairs), (2 * pairs + rest, rest))
        ]
    )
    half = dim // 2
    turned = torch.nn.functional.pad(turned[..., order], (0, 0, 0, -tokens % chunk))
    chunks = turned.shape[2] // chunk
    x = turned[:, None].unflatten(3, (chunks, chunk)).transpose(2, 3).flatten(3, 4)
    z = torch.complex(x[..., :half], x[..., half:])  # [B, 1, chunks, H/G * C, D/2]
    theta = torch.cat((rope.turns, rope.turns.new_zeros(rest)))  # wraps modulo one turn
    starts = torch.arange(chunks, device=q.device)[:, None, None] * chunk

    def factors(delta: torch.Tensor) -> torch.Tensor:
        angle = ((starts * delta) >> 32).float() * (torch.pi / 2**31)
        return torch.polar(torch.ones_like(angle), -angle).cumsum(0)  # [chunks, D/2, D/2]

    conj = ((z.mT @ z.conj()) * factors(theta[:, None] - theta[None, :])).sum(2)
    plain = ((z.mT @ z) * factors(theta[:, None] + theta[None, :])).sum(2)
    top = torch.cat(((conj.real + plain.real), (plain.imag - conj.imag)), dim=-1)
    bottom = torch.cat(((conj.imag + plain.imag), (conj.real - plain.real)), dim=-1)
    seen = sum(min(chunk, tokens - c * chunk) * (c + 1) for c in range(chunks)) * heads
    moment = torch.cat((top, bottom), dim=-2) / (2 * seen)
    moment = (moment + moment.mT) / 2
    back = torch.argsort(order)
    return moment[..., back[:, None], back[None, :]].contiguous()


def error_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: Rope,
    v_metrics: torch.Tensor | None = None,
    *,
    chunk: int,
    sinks: int,
    window: int,
    queries: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What errors of cold keys and values cost in each query head's outputs, relative to the mean square of all outputs.

    To first order and with errors that are independent from token to token, softmax weights p and scores s,

        E |do|^2 = sum_i p_i^2 (E ds_i^2 |v_i - o|^2 + E |dv_i|^2)          |x|^2 = x^T W_o^T W_o x

    averaged over `queries` queries of the second half of the tokens. Heads that look at few old tokens count, those that
    look at many (errors cancel) or at exact ones do not.

    Args:
        q: [B, H, T, D] before RoPE; k, v: [B, G, T, D] phase-aligned keys, values; of positions 0 .. T-1; floating point.
        rope: frequencies.      v_metrics: float32 [H, D, D], W_o^T W_o of each query head, or None.
        chunk: chunk length C.      sinks, window: first tokens and newest ones that are exact, and have no errors.
    Returns:
        (w_k, w_v), float32 [B, H]: the layer's relative error is the sum over h of w_k[h] times the mean squared error of
        keys in the metric of head h's queries (`query_metric`) plus w_v[h] times that of values in `v_metrics[h]`.
    """
    groups = k.shape[1]
    size = q.shape[1] // groups
    found = []
    for g, own in enumerate(q.split(size, dim=1)):  # what is held in float32 is one KV head's keys and values
        metrics = None if v_metrics is None else v_metrics[g * size : (g + 1) * size]
        found.append(_group_weights(own, k[:, g], v[:, g], rope, metrics, chunk, sinks, window, queries))
    w_k, w_v, power = (torch.cat(x, dim=1) for x in zip(*found, strict=True))
    total = power.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return w_k / total, w_v / total


def _group_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: Rope,
    v_metrics: torch.Tensor | None,
    chunk: int,
    sinks: int,
    window: int,
    queries: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`error_weights` of one KV head before they are divided by all outputs' squares, and these, float32 [B, H/G].

    q: [B, H/G, T, D]; k, v: [B, T, D]; v_metrics: [H/G, D, D].
    """
    batch, heads, tokens, dim = q.shape
    at = torch.linspace(tokens // 2, tokens - 1, min(queries, tokens), device=q.device).long()
    positions = torch.arange(tokens, device=q.device)
    turned = rotate(q[:, :, at].contiguous(), at.expand(batch, -1), rope).float()
    keys = rotate(k[:, None], (positions - positions % chunk).expand(batch, -1), rope)[:, 0].float()
    turning = rope.rotary_dim
    turned = torch.cat((turned[..., :turning] * rope.scaling**2, turned[..., turning:]), dim=-1) * dim**-0.5
    values = v.float()
    if v_metrics is None:
        square = values.square().sum(-1)[:, None, None]  # [B, H/G, 1, T]: of the values
    else:
        square = torch.stack([((values @ metric) * values).sum(-1) for metric in v_metrics], dim=1)[:, :, None]
    w_k, w_v, total = (q.new_zeros((batch, heads), dtype=torch.float32) for _ in range(3))
    for some, own in zip(at.split(16), turned.split(16, dim=2), strict=True):  # few at a time: scores are [.., S, T]
        age = some[:, None] - positions
        scores = (own.flatten(1, 2) @ keys.mT).unflatten(1, (heads, -1))
        p = scores.masked_fill(age < 0, float("-inf")).softmax(-1)
        o = (p.flatten(1, 2) @ values).unflatten(1, (heads, -1))
        weighted = o if v_metrics is None else o @ v_metrics
        power = (weighted * o).sum(-1, keepdim=True)
        off = square - 2 * (weighted.flatten(1, 2) @ values.mT).unflatten(1, (heads, -1)) + power
        p2 = p.square().masked_fill((positions < sinks) | (age < window), 0.0)
        w_k += (p2 * off).sum((-2, -1)) / dim
        w_v += p2.sum((-2, -1))
        total += power.sum((-2, -1))
    return w_k, w_v, total


def _floored(metric: torch.Tensor) -> torch.Tensor:
    """A metric in float64, symmetric, with METRIC_FLOOR of its mean eigenvalue added (identity if it is all zero)."""
    metric = metric.double()
    metric = (metric + metric.mT) / 2
    mean = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(metric.shape[-1], dtype=torch.float64, device=metric.device)
    return torch.where(mean > 0, metric / mean.clamp_min(torch.finfo(torch.float64).tiny), 0.0) + METRIC_FLOOR * eye


def fit_basis(moment: torch.Tensor, metric: torch.Tensor | None = None, *, rank: int) -> torch.Tensor:
    """The basis of least M-weighted error of a rank, best component first.

    Args:
        moment: float32 or float64 [..., D, D], X^T X.
        metric: like `moment`, broadcastable, or None for the identity.
        rank: R, 1 .. D.
    Returns:
        float32 [..., R, D], contiguous: V^T L^(-1), orthonormal in the metric M (with METRIC_FLOOR of its mean eigenvalue
        added, scaled to a mean eigenvalue of 1). The largest entry of each row is positive. Float64 arithmetic.
    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_tensor("moment", moment, dtype=(torch.float32, torch.float64))
    dim = moment.shape[-1]
    if moment.dim() < 2 or moment.shape[-2] != dim:
        raise ValueError(f"moment: expected shape [..., D, D], got {list(moment.shape)}")
    if not 1 <= rank <= dim:
        raise ValueError(f"rank: expected 1 .. {dim}, got {rank}")
    moment = moment.double()
    if metric is None:
        basis = eigenvectors(moment)[..., :rank, :]
    else:
        check_tensor("metric", metric, dtype=(torch.float32, torch.float64), device=moment.device)
        root = torch.linalg.cholesky_ex(_floored(metric)).L
        basis = eigenvectors(root.mT @ moment @ root)[..., :rank, :]
        basis = torch.linalg.solve_triangular(root.expand(*basis.shape[:-2], -1, -1), basis, upper=False, left=False)
    largest = basis.gather(-1, basis.abs().argmax(-1, keepdim=True))
    return (basis * torch.where(largest < 0, -1.0, 1.0)).float().contiguous()


def quantise_basis(basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Basis rows in int8 with a scale each: basis ~ scale[..., None] * rows.

    Args:
        basis: float32 [..., R, D].
    Returns:
        (rows int8 [..., R, D] in -127 .. 127, scale float32 [..., R]: the largest magnitude of the row / 127; 1 for zeros).
    """
    check_tensor("basis", basis, dtype=torch.float32)
    scale = basis.abs().amax(-1) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (basis / scale[..., None]).round().clamp(-127, 127).to(torch.int8), scale


def fit_encoder(basis: torch.Tensor, scale: torch.Tensor, metric: torch.Tensor | None = None) -> torch.Tensor:
    """The encoder of a basis as it is held: coefficients x @ encoder have the least M-weighted error.

    Args:
        basis: int8 [..., R, D].     scale: float32 [..., R]: component r is the vector scale[r] * basis[r].
        metric: float32 or float64 [..., D, D], or None for plain least squares. Without effect when R = D.
    Returns:
        float32 [..., D, R]. Float64 arithmetic.
    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_tensor("basis", basis, dtype=torch.int8)
    check_tensor("scale", scale, shape=basis.shape[:-1], dtype=torch.float32, device=basis.device)
    rows = basis.double() / 127
    weighted = rows if metric is None else rows @ _floored(metric)
    inner = rows @ weighted.mT
    # Rows as long as one another, and any length for a row of zeros (a component of no variance): it spoils no other.
    length = inner.diagonal(dim1=-2, dim2=-1).sqrt()
    length = torch.where(length > 0, length, 1.0)
    inner = inner / (length[..., :, None] * length[..., None, :])
    inner.diagonal(dim1=-2, dim2=-1).fill_(1 + 1e-13)  # room for the rounding of rows that are nearly dependent
    root = torch.linalg.cholesky_ex(inner).L
    # Not cholesky_solve, which goes through a batch one matrix at a time on a GPU.
    solved = torch.linalg.solve_triangular(root, weighted / length[..., None], upper=False)
    solved = torch.linalg.solve_triangular(root.mT, solved, upper=True)
    return (solved / (127 * scale.double() * length)[..., None]).mT.float().contiguous()


# Steps that are tried: shares 1 - j/30 of the widest one (which clips nothing), down to 0.2 of it.
STEP_SHARES = 25


@triton.jit(do_not_specialize=["T"])
def _fit_steps_kernel(
    coefficients_ptr,
    widest_ptr,
    top_ptr,
    step_ptr,
    T,
    R: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_SHARES: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The steps of 16 components of one row and head: squared errors of all shares in one pass."""
    r = tl.program_id(0) * 16 + tl.arange(0, 16)
    n = tl.program_id(1).to(tl.int64)
    used = r < R
    widest = tl.load(widest_ptr + n * R + r, mask=used, other=1.0)
    half = tl.load(top_ptr + r, mask=used, other=2.0) * 0.5
    share = 1.0 - tl.arange(0, BLOCK_SHARES).to(tl.float32) / 30.0
    share = tl.where(tl.arange(0, BLOCK_SHARES) < SHARES, share, 1.0)
    step = (share[:, None] * widest[None, :])[:, None, :]  # [BLOCK_SHARES, 1, 16]
    inverse = 1.0 / step
    half = half[None, None, :]
    errors = tl.zeros([BLOCK_SHARES, BLOCK_T, 16], dtype=tl.float32)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        at = (n * T + t)[:, None] * R + r[None, :]
        c = tl.load(coefficients_ptr + at, mask=(t < T)[:, None] & used[None, :], other=0.0)[None, :, :]
        # floor(c / step), where adding 1.5 * 2**23 rounds: `tl.floor` has an eighth of that rate.
        code = tl.minimum(tl.maximum(c * inverse - 0.5, -half), half - 1.0) + 12582912.0
        off = tl.where((t < T)[None, :, None], (code - 12582912.0 + 0.5) * step - c, 0.0)
        errors += off * off
    error = tl.sum(errors, 1)
    best = tl.argmin(error, 0, tie_break_left=True)
    best = tl.where(best < SHARES, best, 0)
    tl.store(step_ptr + n * R + r, (1.0 - best.to(tl.float32) / 30.0) * widest, mask=used)


def _widest_steps(coefficients: torch.Tensor, bands: Bands) -> torch.Tensor:
    """Steps that clip no value of the sample; of a 16-bit side, its steps."""
    largest = torch.linalg.vector_norm(coefficients, ord=float("inf"), dim=-2)
    if bands.is_float:  # floats have exponents of their own: one step, so that no later row finds a component too small
        largest = largest.amax(-1, keepdim=True).expand_as(largest)
    # A component without variance in the sample still gets a step that later rows can use.
    largest = torch.maximum(largest, 1e-6 * largest.amax(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    if bands.is_float:
        return torch.exp2((torch.ceil(torch.log2(largest)) - 12).clamp_min(-126))
    return largest / (_tops(bands, coefficients.device) / 2)


@cache
def _tops(bands: Bands, device: torch.device) -> torch.Tensor:
    """2**bits of each component, float32 [R]."""
    return torch.tensor([2.0**bits for bits in bands.bits], device=device)


def fit_steps(coefficients: torch.Tensor, bands: Bands) -> torch.Tensor:
    """The quantiser step of each component with the least squared error over a sample.

    Args:
        coefficients: float32 [..., T, R], T at least 1.
    Returns:
        float32 [..., R], positive. 16-bit components share the power of two that brings the largest
        magnitude of all below 2**12.
    """
    check_tensor("coefficients", coefficients, dtype=torch.float32)
    if not _launch.runs_kernel(coefficients) or bands.is_float:
        return fit_steps_torch(coefficients, bands)
    widest = _widest_steps(coefficients, bands)
    if widest.numel() == 0:
        return widest
    steps = torch.empty_like(widest)
    tokens, rank = coefficients.shape[-2:]
    with torch.cuda.device_of(coefficients):
        _fit_steps_kernel[(triton.cdiv(rank, 16), widest.numel() // rank)](
            coefficients.contiguous(),
            widest,
            _tops(bands, coefficients.device),
            steps,
            tokens,
            R=rank,
            SHARES=STEP_SHARES,
            BLOCK_SHARES=triton.next_power_of_2(STEP_SHARES),
            BLOCK_T=32,
            num_warps=8,
        )
    return steps


def fit_steps_torch(coefficients: torch.Tensor, bands: Bands) -> torch.Tensor:
    """`fit_steps` in plain PyTorch."""
    widest = _widest_steps(coefficients, bands)
    if bands.is_float:
        return widest
    top = _tops(bands, coefficients.device)
    best, least = widest, torch.full_like(widest, float("inf"))
    for share in range(STEP_SHARES):
        step = (1 - share / 30) * widest
        code = (torch.floor(coefficients / step[..., None, :]) + 0.5).clamp(
            (0.5 - top / 2)[None, :], (top / 2 - 0.5)[None, :]
        )
        error = (code * step[..., None, :] - coefficients).square().sum(-2)
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    return best


@dataclass(frozen=True)
class Spectrum:
    """The components of one side, best first, and what each loses at each precision: what a layout is chosen by.

    Args:
        mean: float32 [B, G, 1, D] to subtract before `encode`, or None. With a mean, component 0 of the side stands for it
            (all tokens hold its highest code) and the components here are those from 1 on.
        basis: int8 [B, G, D, D], scale: float32 [B, G, D]: component r is the vector scale[r] * basis[r].
        encoder: float32 [B, G, D, D]: coefficients (x - mean) @ encoder.
        steps: of the quantiser, float32 [B, G, D] for each number of bits; a multiple of that for the next higher number,
            so that codes of fewer bits are functions of those of more.
        errors: mean squared error of a component in units of the metric, float32 [B, G, D] for each number of bits and 0.
    """

    mean: torch.Tensor | None
    basis: torch.Tensor
    scale: torch.Tensor
    encoder: torch.Tensor
    steps: dict[int, torch.Tensor]
    errors: dict[int, torch.Tensor]

    @property
    def nbytes(self) -> int:
        held = (self.basis, self.scale, self.encoder, *self.steps.values(), *self.errors.values())
        return sum(t.nbytes for t in held) + (0 if self.mean is None else self.mean.nbytes)

    def _bands(self, bands: Bands) -> list[tuple[int, slice]]:
        """Bits and own components of each band."""
        parts, start = [], 0 if self.mean is None else -1
        for rank, bits in bands.bands:
            parts.append((bits, slice(max(0, start), start + rank)))
            start += rank
        return parts

    def distortion(self, bands: Bands) -> torch.Tensor:
        """Mean squared error of a row in these bands, in units of the metric: float32 [B, G]."""
        parts = self._bands(bands)
        lost = self.errors[0][..., parts[-1][1].stop :].sum(-1)
        return lost + sum(self.errors[bits][..., own].sum(-1) for bits, own in parts)

    def side(self, bands: Bands) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(basis int8 [B, G, R, D], scale float32 [B, G, R], encoder float32 [B, G, D, R]): see `fit_side`."""
        parts = self._bands(bands)
        rank = parts[-1][1].stop
        steps = torch.cat([self.steps[bits][..., own] for bits, own in parts], dim=-1)
        basis, scale = self.basis[..., :rank, :], self.scale[..., :rank] * steps
        encoder = self.encoder[..., :rank] / steps[..., None, :]
        if self.mean is not None:
            mean, unit = quantise_basis(self.mean)
            basis = torch.cat((mean, basis), dim=-2)
            scale = torch.cat((unit * (2 / (2 ** bands.bits[0] - 1)), scale), dim=-1)
            encoder = torch.nn.functional.pad(encoder, (1, 0))
        return basis.contiguous(), scale, encoder.contiguous()


def fit_spectrum(
    x: torch.Tensor,
    metric: torch.Tensor | None = None,
    *,
    precisions: Sequence[int] = (8, 4, 2),
    centre: bool = False,
    sample: int = 2048,
) -> Spectrum:
    """Components of one side (K or V) from its rows.

    Args:
        x: [B, G, T, D] phase-aligned keys or values, fp16, bf16 or fp32, T at least 1.
        metric: [B, G, D, D] or [G, D, D] float32, or None.
        precisions: numbers of bits that quantiser steps are fitted for.
        centre: subtract the mean row (as int8 holds it). Keys have one: what a bias of the key projection adds.
        sample: about how many rows, evenly spread, the quantiser steps are fitted on.
    """
    dim, mean = x.shape[-1], None
    if centre:
        held, unit = quantise_basis(x.mean(dim=2, keepdim=True, dtype=torch.float32))
        mean = held.float() * unit[..., None]
    basis, scale = quantise_basis(fit_basis(gram(x, None if mean is None else mean[:, :, 0]), metric, rank=dim))
    encoder = fit_encoder(basis, scale, metric)
    rows = x[:, :, :: max(1, x.shape[2] // sample)]
    coefficients = (rows if mean is None else (rows - mean).to(x.dtype)).float() @ encoder
    rows = basis.float() * scale[..., None]
    weight = ((rows if metric is None else rows @ metric) * rows).sum(-1)  # [B, G, D]: of a squared error of a component
    steps, errors = {}, {0: coefficients.square().mean(-2) * weight}
    finer = None
    for bits in sorted(precisions, reverse=True):
        bands = Bands(((dim, bits),))
        steps[bits] = fit_steps(coefficients, bands)
        if finer is not None:
            steps[bits] = finer * (steps[bits] / finer).round().clamp_min(1)
        finer = None if bands.is_float else steps[bits]
        if not bands.is_float:
            units = coefficients / steps[bits][..., None, :]
            codes = (torch.floor(units) + 0.5).clamp(0.5 - 2 ** (bits - 1), 2 ** (bits - 1) - 0.5)
            errors[bits] = (codes - units).square().mean(-2) * steps[bits].square() * weight
    return Spectrum(mean, basis, scale, encoder, steps, errors)


def fit_side(
    x: torch.Tensor, bands: Bands, metric: torch.Tensor | None = None, *, sample: int = 2048
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Basis, scale and encoder of one side (K or V) from its rows, without a mean.

    Args:
        x, metric, sample: as `fit_spectrum` has them.      bands: of the side.
    Returns:
        (basis int8 [B, G, R, D], scale float32 [B, G, R] with the steps, encoder float32 [B, G, D, R]): x @ encoder is in
        units of steps, as `encode` wants it.
    """
    return fit_spectrum(x, metric, precisions=sorted(set(bands.bits)), sample=sample).side(bands)


@triton.jit
def _byte_of(token, column, IS_K: tl.constexpr):
    """Byte of a sub-tile (pages.py) for tokens below 32 and columns below 16."""
    if IS_K:
        byte = token % 8 * 64 + column // 4 * 16 + token // 8 * 4 + column % 4
    else:
        byte = column % 8 * 64 + token % 4 * 16 + column // 8 * 8 + token // 4
    return byte


@triton.jit
def _token_of(token, sub, IS_K: tl.constexpr):
    """Token within its tile of the `token`-th of sub-tile `sub`, as `_byte_of` counts them."""
    if IS_K:
        place = sub * 32 + token
    else:
        place = token // 4 * 8 + sub * 4 + token % 4
    return place


@triton.jit
def _stored(c, GROUPS: tl.constexpr, i: tl.constexpr):
    """The bits of coefficients of block i, in units of their steps, where they lie in a byte, int32."""
    LOW: tl.constexpr = _block(GROUPS, i)[2]
    BITS: tl.constexpr = _block(GROUPS, i)[3]
    code = tl.floor(c + (1 << (BITS - 1)))
    code = tl.minimum(tl.maximum(code, 0.0), (1 << BITS) - 1.0).to(tl.int32) << LOW
    if LOW + BITS == 8:
        code ^= 128
    return code


@triton.jit(do_not_specialize=["stride_ids_b"])
def _encode_kernel(
    x_ptr,
    encoder_ptr,
    offset_ptr,  # [B, G, R] or None
    page_ids_ptr,
    pages_ptr,
    G,
    stride_x_b,
    stride_x_g,
    stride_x_t,
    stride_ids_b,
    C: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
    IS_K: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """A tile of 64 tokens of one chunk of one row and head: project, quantise, pack."""
    TILES: tl.constexpr = C // 64
    chunk = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    g = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    page = tl.load(page_ids_ptr + b * stride_ids_b + chunk).to(tl.int64)
    x_ptr += b * stride_x_b + g * stride_x_g + (chunk.to(tl.int64) * C + tile * 64) * stride_x_t
    encoder_ptr += (b * G + g) * D * R
    if offset_ptr is not None:
        offset_ptr += (b * G + g) * R
    t = tl.arange(0, 32)
    column = tl.arange(0, 16)
    if page >= 0:
        page_ptr = pages_ptr + (page * G + g) * (C * BYTES)
        if IS_FLOAT:
            for n in tl.static_range(R // 16):
                for i in tl.static_range(2):
                    c = _coefficients(
                        x_ptr, encoder_ptr, offset_ptr, n * 16, stride_x_t, _token_of(t, i, IS_K), D, R, BLOCK_K, MATRIX
                    )
                    token = tile * 64 + _token_of(t, i, IS_K)
                    r = n * 16 + column
                    at = token[:, None] * R + r[None, :]
                    if not IS_K:
                        at = r[None, :] * C + token[:, None]
                    tl.store(page_ptr.to(tl.pointer_type(tl.float16)) + at, tl.clamp(c, -65504.0, 65504.0).to(tl.float16))
        else:
            for n in tl.static_range(len(GROUPS)):
                tile_ptr = page_ptr + _group_offset(GROUPS, n) * C + tile * (512 * _subtiles(GROUPS, n))
                both = tl.zeros([32, 16], dtype=tl.int32)
                for i in tl.static_range(2):
                    byte = tl.zeros([32, 16], dtype=tl.int32)
                    for f in tl.static_range(_fields(GROUPS, n)):
                        c = _coefficients(
                            x_ptr,
                            encoder_ptr,
                            offset_ptr,
                            (_first_block(GROUPS, n) + f) * 16,
                            stride_x_t,
                            _token_of(t, i, IS_K),
                            D,
                            R,
                            BLOCK_K,
                            MATRIX,
                        )
                        byte |= _stored(c, GROUPS, _first_block(GROUPS, n) + f)
                    at = _byte_of(t[:, None], column[None, :], IS_K)
                    if _half(GROUPS, n):
                        both |= byte << (4 * i)
                    else:
                        tl.store(tile_ptr + i * 512 + at, byte.to(tl.uint8))
                if _half(GROUPS, n):
                    tl.store(tile_ptr + _byte_of(t[:, None], column[None, :], IS_K), both.to(tl.uint8))


@triton.jit
def _coefficients(
    x_ptr,
    encoder_ptr,
    offset_ptr,
    first,
    stride_x_t,
    token,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """32 tokens of a tile times 16 columns of the encoder from `first` on, less their offsets, float32 [32, 16]."""
    column = first + tl.arange(0, 16)
    c = tl.zeros([32, 16], dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + token[:, None] * stride_x_t + k[None, :], mask=(k < D)[None, :], other=0.0).to(tl.float32)
        e = tl.load(encoder_ptr + k[:, None] * R + column[None, :], mask=(k < D)[:, None], other=0.0)
        c += dot_f32(x, e, MATRIX)
    if offset_ptr is not None:
        c -= tl.load(offset_ptr + column)[None, :]
    return c


@triton.constexpr_function
def _bits_of(groups, n):
    """Bits that the fields of group n use."""
    return sum(groups[n][1])


@triton.jit(do_not_specialize=["tiles", "each", "stride_ids_b"])
def _encode_matrix_kernel(
    x_ptr,
    encoder_ptr,
    offset_ptr,  # [B, G, R] or None
    page_ids_ptr,
    pages_ptr,
    tiles,
    each,
    G,
    stride_x_b,
    stride_x_g,
    stride_x_t,
    stride_ids_b,
    C: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    R8: tl.constexpr,
    R4: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
    IS_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """`each` tiles of 64 tokens of one row and head: project, quantise, pack.

    x is 16 bits wide. The encoder is held as two parts of that type, its columns scaled by powers of two to the top of
    fp16's range. A thread holds the same column of all blocks of 16, so that packing them into bytes moves nothing.
    """
    g = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    bits = tl.where(r < R8, 8, tl.where(r < R8 + R4, 4, 2))
    d = tl.arange(0, BLOCK_D)
    e = tl.load(
        encoder_ptr + ((b * G + g) * D + d[:, None]) * R + r[None, :],
        mask=(d < D)[:, None] & (r < R)[None, :],
        other=0.0,
    )
    # Powers of two from exponents: `up` brings a column's largest magnitude to 2**14 or more, `down` undoes that.
    exponent = tl.minimum(tl.maximum(tl.max(tl.abs(e), 0).to(tl.int32, bitcast=True) >> 23, 32), 250)
    up = ((127 + 127 + 14 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    e *= up[None, :]
    TYPE: tl.constexpr = x_ptr.dtype.element_ty if NATIVE else tl.float32
    high = e.to(TYPE)
    low = (e - high.to(tl.float32)).to(TYPE)
    # Blocks fill bytes in order, and none straddles two: the bits before a block say where in its byte it goes.
    block = r // 16
    before = (
        8 * tl.minimum(block, R8 // 16)
        + 4 * tl.minimum(tl.maximum(block - R8 // 16, 0), R4 // 16)
        + 2 * tl.maximum(block - (R8 + R4) // 16, 0)
    )
    low_bit = before % 8
    most = (1 << bits).to(tl.float32) - 1.0
    shift = most * 0.5  # codes are floor(c + 2**(bits - 1)); the half more of a floor is left to rounding
    if offset_ptr is not None:
        shift -= tl.load(offset_ptr + (b * G + g) * R + r, mask=r < R, other=0.0)
    block = tl.arange(0, BLOCK_R // 16)
    byte_at = tl.arange(0, 512)
    t = tl.arange(0, 64)
    x_ptr += b * stride_x_b + g * stride_x_g
    for tile in range(tl.program_id(0) * each, tl.minimum((tl.program_id(0) + 1) * each, tiles)):
        page = tl.load(page_ids_ptr + b * stride_ids_b + tile // (C // 64)).to(tl.int64)
        token = (tile * 64 + t).to(tl.int64)
        x = tl.load(x_ptr + token[:, None] * stride_x_t + d[None, :], mask=(d < D)[None, :], other=0.0).to(TYPE)
        c = tl.dot(x, low, input_precision="ieee")
        c = tl.dot(x, high, c, input_precision="ieee") * down[None, :]
        # Adding 2**23 leaves a number below 256, rounded, in the lowest bits. Conversions have an eighth of that rate.
        code = tl.minimum(tl.maximum(c + shift[None, :], 0.0), most[None, :]) + 8388608.0
        code = (code.to(tl.int32, bitcast=True) & 255) << low_bit[None, :]
        code = tl.reshape(code, [64, BLOCK_R // 16, 16])
        page_ptr = pages_ptr + (page * G + g) * (C * BYTES) + byte_at
        for n in tl.static_range(len(GROUPS)):
            own = (block >= _first_block(GROUPS, n)) & (block < _first_block(GROUPS, n) + _fields(GROUPS, n))
            byte = tl.sum(tl.where(own[None, :, None], code, 0), 1)  # [64, 16]
            if _bits_of(GROUPS, n) == 8:
                byte ^= 128
            byte = byte.to(tl.uint8)
            if IS_K:  # token 32 i + 8 r + g, column 4 t + b -> byte 64 g + 16 t + 4 r + b, i
                byte = tl.permute(tl.reshape(byte, [2, 4, 8, 4, 4]), [2, 3, 1, 4, 0])
            else:  # token 8 b + 4 i + t, column 8 h + g -> byte 64 g + 16 t + 8 h + b, i
                byte = tl.permute(tl.reshape(byte, [8, 2, 4, 2, 8]), [4, 2, 3, 0, 1])
            first, second = tl.split(tl.reshape(byte, [512, 2]))
            out = page_ptr + _group_offset(GROUPS, n) * C + (tile % (C // 64)) * (512 * _subtiles(GROUPS, n))
            live = ((byte_at >= 0) & (page >= 0)) != 0  # (the interpreter wants a comparison)
            if _half(GROUPS, n):
                tl.store(out, first | (second << 4), mask=live)
            else:
                tl.store(out, first, mask=live)
                tl.store(out + 512, second, mask=live)


def _check_encode(x, encoder, bands, pages, page_ids, side, offset):
    check_in("side", side, ("k", "v"))
    check_tensor("x", x, shape=(None,) * 4, dtype=FLOATS, unit_stride=True)
    batch, heads, tokens, dim = x.shape
    check_tensor("encoder", encoder, shape=(batch, heads, dim, bands.rank), dtype=torch.float32, device=x.device)
    if offset is not None:
        check_tensor("offset", offset, shape=(batch, heads, bands.rank), dtype=torch.float32, device=x.device)
    check_tensor("pages", pages, shape=(None, heads, None), dtype=torch.uint8, device=x.device)
    chunk, rest = divmod(pages.shape[2], bands.bytes)
    if rest or chunk not in CHUNKS or not pages.is_contiguous():
        raise ValueError(f"pages: expected contiguous pages of {bands.bytes} bytes a token, got {list(pages.shape)}")
    if tokens % chunk:
        raise ValueError(f"x: expected a multiple of C = {chunk} tokens, got {tokens}")
    check_tensor("page_ids", page_ids, shape=(batch, tokens // chunk), dtype=torch.int32, device=x.device)
    return chunk


def encode(
    x: torch.Tensor,
    encoder: torch.Tensor,
    bands: Bands,
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    *,
    side: str,
    offset: torch.Tensor | None = None,
) -> None:
    """Project rows on a basis, quantise and pack them into pages.

    Args:
        x: [B, G, T, D] phase-aligned keys or values, fp16, bf16 or fp32; T a multiple of C; last dimension of stride 1.
        encoder: float32 [B, G, D, R]: x @ encoder is in units of the quantiser's steps (`fit_side`).
        bands: of the side.
        pages: uint8 k_pages or v_pages [P, G, C * bytes], contiguous; written in place.
        page_ids: int32 [B, T/C], page of each chunk, no page twice; negative: the chunk is left out.
        side: "k" or "v": the order of the bytes.
        offset: float32 [B, G, R] to subtract from the coefficients (what a mean row has of them), or None.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    Float32 arithmetic; of bf16 rows the encoder counts to 16 bits (two bf16 parts), of fp16 rows to 22: a code at the
    boundary of two may be either. Codes as in pages.py.
    """
    chunk = _check_encode(x, encoder, bands, pages, page_ids, side, offset)
    if not _launch.runs_kernel(x):
        return encode_torch(x, encoder, bands, pages, page_ids, side=side, offset=offset)
    batch, heads, tokens, dim = x.shape
    if x.numel() == 0:
        return None
    matrix = _launch.has_matrix_units(x.device)
    encoder = encoder.contiguous()
    offset = None if offset is None else offset.contiguous()
    # The encoder of D = 256 would not fit in the shared memory of every card.
    if matrix and x.dtype != torch.float32 and dim <= 128 and not bands.is_float:
        _encode_16(x, encoder, offset, bands, pages, page_ids, chunk, side)
        return None
    with torch.cuda.device_of(x):
        _encode_kernel[(tokens // 64, heads, batch)](
            x,
            encoder,
            offset,
            page_ids,
            pages,
            heads,
            *x.stride()[:3],
            page_ids.stride(0),
            C=chunk,
            D=dim,
            R=bands.rank,
            BYTES=bands.bytes,
            GROUPS=bands.groups,
            IS_K=side == "k",
            IS_FLOAT=bands.is_float,
            BLOCK_K=32 if matrix else 8,
            MATRIX=matrix,
            num_warps=4,
        )
    return None


def _encode_16(
    x: torch.Tensor,
    encoder: torch.Tensor,
    offset: torch.Tensor | None,
    bands: Bands,
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    chunk: int,
    side: str,
) -> None:
    """Launch `_encode_matrix_kernel`; arguments as checked by `encode`."""
    batch, heads, tokens, dim = x.shape
    ranks = {bits: rank for rank, bits in bands.bands}
    tiles = tokens // 64
    # Two blocks a multiprocessor: more would only read the encoder more often.
    blocks = 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    each = triton.cdiv(tiles * heads * batch, blocks)
    large = _launch.has_large_shared_memory(x.device)
    with torch.cuda.device_of(x):
        _encode_matrix_kernel[(triton.cdiv(tiles, each), heads, batch)](
            x,
            encoder,
            offset,
            page_ids,
            pages,
            tiles,
            each,
            heads,
            *x.stride()[:3],
            page_ids.stride(0),
            C=chunk,
            D=dim,
            R=bands.rank,
            R8=ranks.get(8, 0),
            R4=ranks.get(4, 0),
            BYTES=bands.bytes,
            GROUPS=bands.groups,
            IS_K=side == "k",
            BLOCK_D=triton.next_power_of_2(dim),
            BLOCK_R=triton.next_power_of_2(bands.rank),
            NATIVE=_launch.is_native(x),
            # A third stage takes 106 KB at D = 128 (triton 3.6); elsewhere four warps spill in the loop.
            num_warps=4 if large else 8,
            num_stages=3 if large else 2,
        )


def encode_torch(
    x: torch.Tensor,
    encoder: torch.Tensor,
    bands: Bands,
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    *,
    side: str,
    offset: torch.Tensor | None = None,
) -> None:
    """`encode` in plain PyTorch."""
    chunk = _check_encode(x, encoder, bands, pages, page_ids, side, offset)
    values = x.float() @ encoder
    values = (
        (values if offset is None else values - offset[:, :, None]).unflatten(2, (-1, chunk)).transpose(1, 2)
    )  # [B, chunks, G, C, R]
    keep = page_ids >= 0
    pages[page_ids[keep].long()] = pack_pages(values[keep], bands, side=side)


@triton.jit(do_not_specialize=["max_chunks", "stride_pages_b", "stride_segments_b"])
def _decode_kernel(
    pages_ptr,
    basis_ptr,
    scale_ptr,
    page_table_ptr,
    segment_table_ptr,
    lengths_ptr,
    out_ptr,
    max_chunks,
    G,
    stride_pages_b,
    stride_segments_b,
    C: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    ALIGN: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
    IS_K: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MATRIX: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """32 tokens (a sub-tile), BLOCK_D dimensions of one chunk of one row and head: unpack and multiply by the basis."""
    blocks_d = tl.cdiv(D, BLOCK_D)
    tile = tl.program_id(0) // blocks_d
    chunk = tile // (C // 32)
    sub = tile % (C // 32)
    t = tl.arange(0, 32)
    token = sub // 2 * 64 + _token_of(t, sub % 2, IS_K)
    column = tl.arange(0, 16)
    d = (tl.program_id(0) % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    g = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + b)
    live = chunk * C + token < length
    x = tl.zeros([BLOCK_D, 32], dtype=tl.float32)
    if chunk * C < length:
        page_ptr = pages_ptr + (tl.load(page_table_ptr + b * stride_pages_b + chunk).to(tl.int64) * G + g) * (C * BYTES)
        basis_row = (tl.load(segment_table_ptr + b * stride_segments_b + chunk * C // ALIGN).to(tl.int64) * G + g) * R
        if IS_FLOAT:
            for n in tl.static_range(R // 16):
                r = n * 16 + column
                at = token[None, :] * R + r[:, None]
                if not IS_K:
                    at = r[:, None] * C + token[None, :]
                c = tl.load(page_ptr.to(tl.pointer_type(tl.float16)) + at, mask=live[None, :], other=0.0).to(tl.float32)
                x += _rebuilt(c, basis_ptr, scale_ptr, basis_row, r, d, D, MATRIX, NATIVE)
        else:
            at = _byte_of(t[None, :], column[:, None], IS_K)
            for n in tl.static_range(len(GROUPS)):
                group_ptr = page_ptr + _group_offset(GROUPS, n) * C
                if _half(GROUPS, n):
                    byte = tl.load(group_ptr + sub // 2 * 512 + at) >> (sub % 2 * 4).to(tl.uint8)
                else:
                    byte = tl.load(group_ptr + sub * 512 + at)
                for f in tl.static_range(_fields(GROUPS, n)):
                    r = (_first_block(GROUPS, n) + f) * 16 + column
                    c = _masked(byte, _mask(GROUPS, _first_block(GROUPS, n) + f), 0, False).to(tl.float32)
                    c = (c + _offset(GROUPS, _first_block(GROUPS, n) + f)) * _weight(GROUPS, _first_block(GROUPS, n) + f)
                    x += _rebuilt(c, basis_ptr, scale_ptr, basis_row, r, d, D, MATRIX, NATIVE)
    out = ((b * G + g) * max_chunks + chunk) * C + token
    x = tl.where(live[None, :], x, 0.0)
    tl.store(out_ptr + out[None, :] * D + d[:, None], x, mask=(d < D)[:, None])


@triton.jit
def _rebuilt(c, basis_ptr, scale_ptr, basis_row, r, d, D: tl.constexpr, MATRIX: tl.constexpr, NATIVE: tl.constexpr):
    """What 16 components c [16, 32] of rows r add to dimensions d, float32."""
    basis = tl.load(basis_ptr + (basis_row + r)[None, :] * D + d[:, None], mask=(d < D)[:, None], other=0)
    return dot_int8_f32(basis, c * tl.load(scale_ptr + basis_row + r)[:, None], MATRIX, NATIVE)


def decode(pages: Pages, *, side: str) -> torch.Tensor:
    """Rebuild keys (phase-aligned) or values from their pages: for tests and for the fallback path.

    Args:
        pages: cold pages with their tables and lengths.      side: "k" or "v".
    Returns:
        float32 [B, G, max_chunks * C, D], contiguous, by position; zeros from a row's length on. Skip bits are not looked
        at. Float32 arithmetic.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    if not isinstance(pages, Pages):
        raise TypeError(f"pages: expected Pages, got {type(pages).__name__}")
    check_in("side", side, ("k", "v"))
    data = pages.k_pages if side == "k" else pages.v_pages
    if not _launch.runs_kernel(data):
        return decode_torch(pages, side=side)
    bands = pages.layout.k if side == "k" else pages.layout.v
    batch, chunks = pages.page_table.shape
    chunk, dim, heads = pages.layout.chunk, pages.layout.head_dim, pages.kv_heads
    out = torch.empty((batch, heads, chunks * chunk, dim), dtype=torch.float32, device=data.device)
    if out.numel() == 0:
        return out
    matrix = _launch.has_matrix_units(data.device)
    block_d = 64 if matrix else 16
    with torch.cuda.device_of(data):
        _decode_kernel[(chunks * chunk // 32 * triton.cdiv(dim, block_d), heads, batch)](
            data,
            pages.k_basis if side == "k" else pages.v_basis,
            pages.k_scale if side == "k" else pages.v_scale,
            pages.page_table,
            pages.segment_table,
            pages.lengths,
            out,
            chunks,
            heads,
            pages.page_table.stride(0),
            pages.segment_table.stride(0),
            C=chunk,
            D=dim,
            R=bands.rank,
            ALIGN=pages.layout.align,
            BYTES=bands.bytes,
            GROUPS=bands.groups,
            IS_K=side == "k",
            IS_FLOAT=bands.is_float,
            BLOCK_D=block_d,
            MATRIX=matrix,
            NATIVE=_launch.is_native(data),
            num_warps=4,
        )
    return out


def decode_torch(pages: Pages, *, side: str) -> torch.Tensor:
    """`decode` in plain PyTorch."""
    layout, chunk = pages.layout, pages.layout.chunk
    k = side == "k"
    index = torch.arange(pages.max_chunks * chunk, device=pages.lengths.device)
    live = index < pages.lengths[:, None]  # [B, T]
    table = torch.where(live[:, ::chunk], pages.page_table, 0).long()
    segments = torch.where(live[:, ::chunk], pages.segment_table_by_chunk(), 0).long()
    data = pages.k_pages if k else pages.v_pages
    values = unpack_pages(data[table], layout.k if k else layout.v, side=side)  # [B, chunks, G, C, R]
    values = values.masked_fill(~live.unflatten(1, (-1, chunk))[:, :, None, :, None], 0.0)
    basis = (pages.k_basis if k else pages.v_basis)[segments].float()
    # A missing chunk reads segment 0, which may hold NaN.
    scale = (pages.k_scale if k else pages.v_scale)[segments].masked_fill(~live[:, ::chunk, None, None], 0.0)
    return ((values * scale[:, :, :, None]) @ basis).transpose(1, 2).flatten(2, 3).contiguous()
