"""Compress keys and values: second moments, weighted bases, and encoding into the bands of a page.

What a low rank and few bits lose must be lost where it counts, so the basis is fitted under a metric M [D, D]: for keys the
second moment of the queries as the chunks see them (errors of scores), for values the sum over the group's heads of
W_o^T W_o (errors of outputs). With X the rows (phase-aligned keys, or values) and G = X^T X

    M^(1/2) G M^(1/2) = V S^2 V^T        basis = V^T M^(-1/2)  [R, D]      encoder = M^(1/2) V  [D, R]

so X ~ (X encoder) basis has the least M-weighted error of its rank, from D x D eigenproblems alone (float64).
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

import torch
import triton
import triton.language as tl

from . import _launch
from ._checks import FLOATS, check_in, check_tensor
from ._launch import dot_f32, dot_int8_f32
from .attention import _at, _field, _offset_of, blocks
from .pages import Bands, Pages, pack_rows, unpack_rows, v_pages_from_rows, v_rows
from .rope import Rope, rotate

# Share of the mean eigenvalue added to a metric: directions that no query used must still be encoded, if coarsely.
METRIC_FLOOR = 1e-3


@triton.jit(do_not_specialize=["T", "splits"])
def _gram_kernel(
    x_ptr,
    out_ptr,
    T,
    splits,
    G,
    stride_x_b,
    stride_x_g,
    stride_x_t,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """One [BLOCK_D, BLOCK_D] tile of the second moment of one split of the tokens of one row and head."""
    tiles = tl.cdiv(D, BLOCK_D)
    i = (tl.program_id(0) // tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    j = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    bg = tl.program_id(2).to(tl.int64)
    x_ptr += (bg // G) * stride_x_b + (bg % G) * stride_x_g
    each = tl.cdiv(tl.cdiv(T, BLOCK_T), splits) * BLOCK_T
    acc = tl.zeros([BLOCK_D, BLOCK_D], dtype=tl.float32)
    for start in range(split * each, tl.minimum(split * each + each, T), BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        a = tl.load(x_ptr + t[None, :] * stride_x_t + i[:, None], mask=(t < T)[None, :] & (i < D)[:, None], other=0.0)
        b = tl.load(x_ptr + t[:, None] * stride_x_t + j[None, :], mask=(t < T)[:, None] & (j < D)[None, :], other=0.0)
        acc += dot_f32(a.to(tl.float32), b.to(tl.float32), MATRIX)
    out = ((bg * splits + split) * D + i[:, None]) * D + j[None, :]
    tl.store(out_ptr + out, acc, mask=(i < D)[:, None] & (j < D)[None, :])


def gram(x: torch.Tensor) -> torch.Tensor:
    """Second moment over tokens, X^T X.

    Args:
        x: [B, G, T, D] fp16, bf16 or fp32; last dimension of stride 1, others any.
    Returns:
        float32 [B, G, D, D], contiguous: sums over T in float32 per split of the tokens, splits summed in float64.
    Raises:
        TypeError, ValueError: x is not as above; nothing was launched.
    """
    check_tensor("x", x, shape=(None,) * 4, dtype=FLOATS, unit_stride=True)
    if not _launch.runs_kernel(x):
        return gram_torch(x)
    batch, heads, tokens, dim = x.shape
    if batch * heads == 0 or tokens == 0:
        return x.new_zeros((batch, heads, dim, dim), dtype=torch.float32)
    matrix = _launch.has_matrix_units(x.device)
    block_t, block_d = (32, 64) if matrix else (16, 16)
    splits = min(triton.cdiv(tokens, 1024), 64)
    parts = torch.empty((batch, heads, splits, dim, dim), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _gram_kernel[(triton.cdiv(dim, block_d) ** 2, splits, batch * heads)](
            x,
            parts,
            tokens,
            splits,
            heads,
            *x.stride()[:3],
            D=dim,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            MATRIX=matrix,
            num_warps=4,
        )
    return parts.sum(dim=2, dtype=torch.float64).float()


def gram_torch(x: torch.Tensor) -> torch.Tensor:
    """`gram` in plain PyTorch."""
    return x.float().mT @ x.float()


def query_metric(q: torch.Tensor, rope: Rope, *, chunk: int, kv_heads: int) -> torch.Tensor:
    """Mean second moment of queries as the chunks see them: of R(m - t0) q_m over all chunk starts t0 <= m.

    With z the queries turned to their absolute positions, as complex pairs, a chunk's turn by -t0 multiplies z_f conj(z_g)
    by exp(-i t0 (f - g)) and z_f z_g by exp(-i t0 (f + g)); summed over the chunks a query sees, that is one [D/2, D/2]
    factor for all queries of a chunk, so the queries are read once.

    Args:
        q: [B, H, T, D] before RoPE, of positions 0 .. T-1, fp16, bf16 or fp32; D even.
        rope: frequencies and attention scaling (scaling**2 on the rotary dimensions, as scores have it).
        chunk: chunk length C.      kv_heads: G; H is a multiple of it.
    Returns:
        float32 [B, G, D, D], symmetric, positive semi-definite up to rounding.
    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_tensor("q", q, shape=(None,) * 4, dtype=FLOATS)
    batch, heads, tokens, dim = q.shape
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q: expected a multiple of kv_heads = {kv_heads} heads, got {heads}")
    if tokens == 0 or dim % 2:
        raise ValueError(f"q: expected at least one token and an even D, got shape {list(q.shape)}")
    pairs = rope.turns.shape[0]
    positions = torch.arange(tokens, device=q.device).expand(batch, -1)
    turned = rotate(q if q.stride(-1) == 1 else q.contiguous(), positions, rope).float()
    turned = torch.cat((turned[..., : 2 * pairs] * rope.scaling**2, turned[..., 2 * pairs :]), dim=-1)
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
    x = turned.unflatten(1, (kv_heads, -1)).unflatten(3, (chunks, chunk)).transpose(2, 3).flatten(3, 4)
    z = torch.complex(x[..., :half], x[..., half:])  # [B, G, chunks, H/G * C, D/2]
    theta = torch.cat((rope.turns, rope.turns.new_zeros(rest)))  # wraps modulo one turn
    starts = torch.arange(chunks, device=q.device)[:, None, None] * chunk

    def factors(delta: torch.Tensor) -> torch.Tensor:
        angle = ((starts * delta) >> 32).float() * (torch.pi / 2**31)
        return torch.polar(torch.ones_like(angle), -angle).cumsum(0)  # [chunks, D/2, D/2]

    conj = ((z.mT @ z.conj()) * factors(theta[:, None] - theta[None, :])).sum(2)
    plain = ((z.mT @ z) * factors(theta[:, None] + theta[None, :])).sum(2)
    top = torch.cat(((conj.real + plain.real), (plain.imag - conj.imag)), dim=-1)
    bottom = torch.cat(((conj.imag + plain.imag), (conj.real - plain.real)), dim=-1)
    seen = sum(min(chunk, tokens - c * chunk) * (c + 1) for c in range(chunks)) * (heads // kv_heads)
    moment = torch.cat((top, bottom), dim=-2) / (2 * seen)
    moment = (moment + moment.mT) / 2
    back = torch.argsort(order)
    return moment[..., back[:, None], back[None, :]].contiguous()


def error_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: Rope,
    v_metric: torch.Tensor | None = None,
    *,
    chunk: int,
    sinks: int,
    window: int,
    queries: int = 16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What errors of cold keys and values cost in a layer's output, relative to the output's mean square.

    To first order and with errors that are independent from token to token, softmax weights p and scores s,

        E |do|^2 = sum_i p_i^2 (E ds_i^2 |v_i - o|^2 + E |dv_i|^2)          |x|^2 = x^T W_o^T W_o x

    averaged over `queries` queries of the second half of the tokens.

    Args:
        q: [B, H, T, D] before RoPE; k, v: [B, G, T, D] phase-aligned keys, values; of positions 0 .. T-1; floating point.
        rope: frequencies.      v_metric: float32 [G, D, D], sum over a group's heads of W_o^T W_o, or None.
        chunk: chunk length C.      sinks, window: first tokens and newest ones that are exact, and have no errors.
    Returns:
        (w_k, w_v), float32 [B, G]: the layer's relative error is the sum over g of w_k[g] times the mean squared error of
        keys in the metric of `query_metric` plus w_v[g] times that of values in `v_metric`.
    """
    batch, heads, tokens, dim = q.shape
    groups = k.shape[1]
    at = torch.linspace(tokens // 2, tokens - 1, min(queries, tokens), device=q.device).long()
    positions = torch.arange(tokens, device=q.device)
    turned = rotate(q[:, :, at].contiguous(), at.expand(batch, -1), rope).float()
    keys = rotate(k, (positions - positions % chunk).expand(batch, -1), rope)
    turning = rope.rotary_dim
    turned = torch.cat((turned[..., :turning] * rope.scaling**2, turned[..., turning:]), dim=-1) * dim**-0.5
    scores = turned.unflatten(1, (groups, -1)).flatten(2, 3) @ keys.float().mT  # [B, G, H/G * S, T]
    age = at.repeat(heads // groups)[:, None] - positions
    p = scores.masked_fill(age < 0, float("-inf")).softmax(-1)
    values = v.float()
    o = p @ values
    weighted = values if v_metric is None else values @ v_metric
    square = (weighted * values).sum(-1)[:, :, None]  # [B, G, 1, T]: of the values
    power = ((o if v_metric is None else o @ v_metric) * o).sum(-1, keepdim=True)
    p2 = p.square().masked_fill((positions < sinks) | (age < window), 0.0)
    w_k = (p2 * (square - 2 * o @ weighted.mT + power)).sum(-1).mean(-1) / dim
    w_v = p2.sum(-1).mean(-1)
    total = power.mean((-2, -1)).sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return w_k / total, w_v / total


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
        float32 [..., R, D], contiguous: V^T M^(-1/2), orthonormal in the metric M (with METRIC_FLOOR of its mean eigenvalue
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
    moment = (moment + moment.mT) / 2
    if metric is None:
        basis = torch.linalg.eigh(moment).eigenvectors.mT.flip(-2)[..., :rank, :]
    else:
        check_tensor("metric", metric, dtype=(torch.float32, torch.float64), device=moment.device)
        values, vectors = torch.linalg.eigh(_floored(metric))
        root = (vectors * values.sqrt()[..., None, :]) @ vectors.mT
        inverse = (vectors / values.sqrt()[..., None, :]) @ vectors.mT
        weighted = root @ moment @ root
        directions = torch.linalg.eigh((weighted + weighted.mT) / 2).eigenvectors.mT.flip(-2)
        basis = directions[..., :rank, :] @ inverse
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
    # pinv of the small symmetric [R, R] matrix: a row of zeros (a component of no variance) must not spoil the others.
    encoder = weighted.mT @ torch.linalg.pinv(rows @ weighted.mT, rtol=1e-12, hermitian=True)
    return (encoder / (127 * scale.double()[..., None, :])).float()


def fit_steps(coefficients: torch.Tensor, bands: Bands) -> torch.Tensor:
    """The quantiser step of each component with the least squared error over a sample.

    Args:
        coefficients: float32 [..., T, R], T at least 1.
    Returns:
        float32 [..., R], positive. 16-bit components share the power of two that brings the largest
        magnitude of all below 2**12.
    """
    check_tensor("coefficients", coefficients, dtype=torch.float32)
    largest = coefficients.abs().amax(-2)
    if bands.is_float:  # floats have exponents of their own: one step, so that no later row finds a component too small
        largest = largest.amax(-1, keepdim=True).expand_as(largest)
    # A component without variance in the sample still gets a step that later rows can use.
    largest = torch.maximum(largest, 1e-6 * largest.amax(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    if bands.is_float:
        return torch.exp2((torch.ceil(torch.log2(largest)) - 12).clamp_min(-126))
    levels = torch.tensor([2.0**b for b in bands.bits], device=coefficients.device)
    widest = largest / (levels / 2)  # no value clipped
    best, least = widest, torch.full_like(widest, float("inf"))
    for share in torch.linspace(1.0, 0.2, 25).tolist():
        step = widest * share
        code = (torch.floor(coefficients / step[..., None, :]) + 0.5).clamp(
            (0.5 - levels / 2)[None, :], (levels / 2 - 0.5)[None, :]
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
        steps: of the quantiser, float32 [B, G, D] for each number of bits.
        errors: mean squared error of a component in units of the metric, float32 [B, G, D] for each number of bits and 0.
    """

    mean: torch.Tensor | None
    basis: torch.Tensor
    scale: torch.Tensor
    encoder: torch.Tensor
    steps: dict[int, torch.Tensor]
    errors: dict[int, torch.Tensor]

    def _bands(self, bands: Bands) -> list[tuple[int, slice]]:
        """Bits and own components of each band."""
        taken = 0 if self.mean is None else 1
        return [(bits, slice(max(0, start - taken), start - taken + rank)) for _, _, bits, start, rank in bands.planes()]

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
        x = (x - mean).to(x.dtype)
    basis, scale = quantise_basis(fit_basis(gram(x), metric, rank=dim))
    encoder = fit_encoder(basis, scale, metric)
    coefficients = x[:, :, :: max(1, x.shape[2] // sample)].float() @ encoder
    rows = basis.float() * scale[..., None]
    weight = ((rows if metric is None else rows @ metric) * rows).sum(-1)  # [B, G, D]: of a squared error of a component
    steps, errors = {}, {0: coefficients.square().mean(-2) * weight}
    for bits in precisions:
        bands = Bands(((dim, bits),))
        steps[bits] = fit_steps(coefficients, bands)
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


@triton.jit(do_not_specialize=["stride_ids_b"])
def _encode_kernel(
    x_ptr,
    encoder_ptr,
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
    BLOCKS: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """BLOCK_T tokens of one chunk of one row and head: project, quantise, pack."""
    TILES: tl.constexpr = C // BLOCK_T
    chunk = tl.program_id(0) // TILES
    token = (tl.program_id(0) % TILES) * BLOCK_T + tl.arange(0, BLOCK_T)
    g = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    page = tl.load(page_ids_ptr + b * stride_ids_b + chunk).to(tl.int64)
    x_row = x_ptr + b * stride_x_b + g * stride_x_g + (chunk.to(tl.int64) * C + token)[:, None] * stride_x_t
    encoder_ptr += (b * G + g) * D * R
    if page >= 0:
        page = page * G + g
        for n in tl.static_range(len(BLOCKS)):
            lane = tl.arange(0, _at(BLOCKS, n, 2))
            used = lane < _at(BLOCKS, n, 1)
            byte = tl.zeros([BLOCK_T, _at(BLOCKS, n, 2)], dtype=tl.int32)
            for f in tl.static_range(1 if IS_FLOAT else 8 // _at(BLOCKS, n, 3)):
                r = _at(BLOCKS, n, 4) + f * _at(BLOCKS, n, 5) + lane
                c = tl.zeros([BLOCK_T, _at(BLOCKS, n, 2)], dtype=tl.float32)
                for start in range(0, D, BLOCK_K):
                    k = start + tl.arange(0, BLOCK_K)
                    x = tl.load(x_row + k[None, :], mask=(k < D)[None, :], other=0.0).to(tl.float32)
                    e = tl.load(encoder_ptr + k[:, None] * R + r[None, :], mask=(k < D)[:, None] & used[None, :], other=0.0)
                    c += dot_f32(x, e, MATRIX)
                if IS_FLOAT:
                    at = (page * C + token)[:, None] * R + r[None, :]
                    if not TOKEN_MAJOR:
                        at = (page * R + r)[None, :] * C + token[:, None]
                    tl.store(
                        pages_ptr.to(tl.pointer_type(tl.float16)) + at,
                        tl.clamp(c, -65504.0, 65504.0).to(tl.float16),
                        mask=used[None, :],
                    )
                else:
                    code = tl.floor(c + (1 << (_at(BLOCKS, n, 3) - 1)))
                    code = tl.minimum(tl.maximum(code, 0.0), (1 << _at(BLOCKS, n, 3)) - 1.0).to(tl.int32)
                    byte |= code << (_at(BLOCKS, n, 3) * f)
            if not IS_FLOAT:
                if _at(BLOCKS, n, 3) == 8:
                    byte ^= 128
                at = (page * C + token)[:, None] * BYTES + (_at(BLOCKS, n, 0) + lane)[None, :]
                if not TOKEN_MAJOR:
                    at = (page * BYTES + _at(BLOCKS, n, 0) + lane)[None, :] * C + token[:, None]
                tl.store(pages_ptr + at, byte.to(tl.uint8), mask=used[None, :])


def _check_encode(x, encoder, bands, pages, page_ids, side):
    check_in("side", side, ("k", "v"))
    check_tensor("x", x, shape=(None,) * 4, dtype=FLOATS, unit_stride=True)
    batch, heads, tokens, dim = x.shape
    check_tensor("encoder", encoder, shape=(batch, heads, dim, bands.rank), dtype=torch.float32, device=x.device)
    check_tensor("pages", pages, shape=(None, heads, None, None), dtype=torch.uint8, device=x.device)
    chunk = pages.shape[2 if side == "k" else 3]
    if pages.shape[3 if side == "k" else 2] != bands.bytes or not pages.is_contiguous():
        raise ValueError(f"pages: expected contiguous pages of {bands.bytes} bytes a token, got {list(pages.shape)}")
    if tokens % chunk:
        raise ValueError(f"x: expected a multiple of C = {chunk} tokens, got {tokens}")
    check_tensor("page_ids", page_ids, shape=(batch, tokens // chunk), dtype=torch.int32, device=x.device)
    return chunk


def encode(
    x: torch.Tensor, encoder: torch.Tensor, bands: Bands, pages: torch.Tensor, page_ids: torch.Tensor, *, side: str
) -> None:
    """Project rows on a basis, quantise and pack them into pages.

    Args:
        x: [B, G, T, D] phase-aligned keys or values, fp16, bf16 or fp32; T a multiple of C; last dimension of stride 1.
        encoder: float32 [B, G, D, R]: x @ encoder is in units of the quantiser's steps (`fit_side`).
        bands: of the side.
        pages: uint8 k_pages [P, G, C, bytes] or v_pages [P, G, bytes, C], contiguous; written in place.
        page_ids: int32 [B, T/C], page of each chunk, no page twice; negative: the chunk is left out.
        side: "k" (token-major pages) or "v" (token-contiguous pages).
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    Float32 arithmetic (three-product tf32 dots); codes as in pages.py.
    """
    chunk = _check_encode(x, encoder, bands, pages, page_ids, side)
    if not _launch.runs_kernel(x):
        return encode_torch(x, encoder, bands, pages, page_ids, side=side)
    batch, heads, tokens, dim = x.shape
    if x.numel() == 0:
        return None
    matrix = _launch.has_matrix_units(x.device)
    block_t = 32 if matrix else 16
    with torch.cuda.device_of(x):
        _encode_kernel[(tokens // block_t, heads, batch)](
            x,
            encoder.contiguous(),
            page_ids,
            pages,
            heads,
            *x.stride()[:3],
            page_ids.stride(0),
            C=chunk,
            D=dim,
            R=bands.rank,
            BYTES=bands.bytes,
            BLOCKS=blocks(bands, 16, 64 if matrix else 16),
            TOKEN_MAJOR=side == "k",
            IS_FLOAT=bands.is_float,
            BLOCK_T=block_t,
            BLOCK_K=16,
            MATRIX=matrix,
            num_warps=4,
        )
    return None


def encode_torch(
    x: torch.Tensor, encoder: torch.Tensor, bands: Bands, pages: torch.Tensor, page_ids: torch.Tensor, *, side: str
) -> None:
    """`encode` in plain PyTorch."""
    chunk = _check_encode(x, encoder, bands, pages, page_ids, side)
    rows = pack_rows(x.float() @ encoder, bands)  # [B, G, T, bytes]
    rows = rows.unflatten(2, (-1, chunk)).transpose(1, 2)  # [B, chunks, G, C, bytes]
    keep = page_ids >= 0
    chosen = rows[keep]
    pages[page_ids[keep].long()] = chosen if side == "k" else v_pages_from_rows(chosen, bands)


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
    R8: tl.constexpr,
    R4: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MATRIX: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """BLOCK_T tokens, BLOCK_D dimensions of one chunk of one row and head: unpack and multiply by the basis."""
    TILES: tl.constexpr = C // BLOCK_T
    blocks_d = tl.cdiv(D, BLOCK_D)
    tile = tl.program_id(0) // blocks_d
    chunk = tile // TILES
    token = (tile % TILES) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = (tl.program_id(0) % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    g = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + b)
    live = chunk * C + token < length
    x = tl.zeros([BLOCK_D, BLOCK_T], dtype=tl.float32)
    if chunk * C < length:
        page = tl.load(page_table_ptr + b * stride_pages_b + chunk).to(tl.int64) * G + g
        basis_row = (tl.load(segment_table_ptr + b * stride_segments_b + chunk).to(tl.int64) * G + g) * R
        for n in tl.static_range(len(BLOCKS)):
            lane = tl.arange(0, _at(BLOCKS, n, 2))
            used = lane < _at(BLOCKS, n, 1)
            if not IS_FLOAT:
                at = (page * C + token)[None, :] * BYTES + (_at(BLOCKS, n, 0) + lane)[:, None]
                if not TOKEN_MAJOR:
                    at = (page * BYTES + _at(BLOCKS, n, 0) + lane)[:, None] * C + token[None, :]
                byte = tl.load(pages_ptr + at, mask=used[:, None], other=0)
            for f in tl.static_range(1 if IS_FLOAT else 8 // _at(BLOCKS, n, 3)):
                r = _at(BLOCKS, n, 4) + f * _at(BLOCKS, n, 5) + lane
                if IS_FLOAT:
                    at = (page * C + token)[None, :] * R + r[:, None]
                    if not TOKEN_MAJOR:
                        at = (page * R + r)[:, None] * C + token[None, :]
                    half_ptr = pages_ptr.to(tl.pointer_type(tl.float16))
                    c = tl.load(half_ptr + at, mask=used[:, None] & live[None, :], other=0.0).to(tl.float32)
                else:
                    c = _field(byte, _at(BLOCKS, n, 3), f, False).to(tl.float32)
                    c += _offset_of(r, R8, R4, IS_FLOAT)[:, None]
                basis = tl.load(
                    basis_ptr + (basis_row + r)[None, :] * D + d[:, None],
                    mask=used[None, :] & (d < D)[:, None],
                    other=0,
                )
                c *= tl.load(scale_ptr + basis_row + r, mask=used, other=0.0)[:, None]
                x += dot_int8_f32(basis, c, MATRIX, NATIVE)
    out = ((b * G + g) * max_chunks + chunk) * C + token
    x = tl.where(live[None, :], x, 0.0)
    tl.store(out_ptr + out[None, :] * D + d[:, None], x, mask=(d < D)[:, None])


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
    ranks = {bits: rank for rank, bits in bands.bands}
    block_t, block_d = (32, 64) if matrix else (16, 16)
    with torch.cuda.device_of(data):
        _decode_kernel[(chunks * chunk // block_t * triton.cdiv(dim, block_d), heads, batch)](
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
            R8=ranks.get(8, 0),
            R4=ranks.get(4, 0),
            BYTES=bands.bytes,
            BLOCKS=blocks(bands, 16, 32 if matrix else 16),
            TOKEN_MAJOR=side == "k",
            IS_FLOAT=bands.is_float,
            BLOCK_T=block_t,
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
    segments = torch.where(live[:, ::chunk], pages.segment_table, 0).long()
    rows = pages.k_pages if k else v_rows(pages.v_pages, layout.v)
    values = unpack_rows(rows[table], layout.k if k else layout.v)  # [B, chunks, G, C, R]
    values = values.masked_fill(~live.unflatten(1, (-1, chunk))[:, :, None, :, None], 0.0)
    basis = (pages.k_basis if k else pages.v_basis)[segments].float()
    # A missing chunk reads segment 0, which may hold NaN.
    scale = (pages.k_scale if k else pages.v_scale)[segments].masked_fill(~live[:, ::chunk, None, None], 0.0)
    return ((values * scale[:, :, :, None]) @ basis).transpose(1, 2).flatten(2, 3).contiguous()
