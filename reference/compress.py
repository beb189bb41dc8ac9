"""Oracle of spectral_kernels/compress.py: second moments by sums, the basis by the SVD of the whitened tokens.

The basis of X [T, D] under a metric M [D, D] is the rank-R factorisation X ~ C B that loses least in
|| (X - C B) M^(1/2) ||_F. With  X M^(1/2) = U S V^T :  B = V_R^T M^(-1/2)  and the loss is the sum of the other S^2.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .pages import U8, Bands, code_of, pack_pages, unpack_pages
from .rope import rotate, scale_rotary

F64 = NDArray[np.float64]


def gram(x: ArrayLike) -> F64:
    """sum_t x_t x_t^T: x [B, G, T, D] -> [B, G, D, D]."""
    x = np.asarray(x, np.float64)
    batch, groups, tokens, dim = x.shape
    total = np.zeros((batch, groups, dim, dim))
    for b, g, t in np.ndindex(batch, groups, tokens):
        total[b, g] += np.outer(x[b, g, t], x[b, g, t])
    return total


def query_metric(
    q: ArrayLike,
    inv_freq: ArrayLike,
    scaling: float,
    *,
    chunk: int,
    kv_heads: int,
    weights: ArrayLike | None = None,
    stride: int = 1,
) -> F64:
    """Mean of w_h y y^T over all y = S R(m - t0) q_m: tokens m of q [B, H, T, D] that are multiples of stride, heads h of a
    group, chunk starts t0 <= m; weights w [B, H], or None for ones."""
    q = np.asarray(q, np.float64)
    batch, heads, tokens, dim = q.shape
    group = heads // kv_heads
    weight = np.ones((batch, heads)) if weights is None else np.asarray(weights, np.float64)
    total = np.zeros((batch, kv_heads, dim, dim))
    count = 0
    for start in range(0, tokens, chunk):
        later = np.arange(-(-start // stride) * stride, tokens, stride)
        turned = scale_rotary(rotate(q[:, :, later], later - start, inv_freq), inv_freq, scaling**2)
        count += group * len(later)
        for b, h in np.ndindex(batch, heads):
            for y in turned[b, h]:
                total[b, h // group] += weight[b, h] * np.outer(y, y)
    return total / count


def error_weights(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    inv_freq: ArrayLike,
    scaling: float,
    v_metrics: ArrayLike | None,
    at: Sequence[Sequence[int]],
    *,
    sinks: int,
    window: int,
) -> tuple[F64, F64]:
    """(w_k, w_v) [B, H]: sums over queries m in at[h] of p_i^2 |v_i - o|^2 / D, and of p_i^2, over tokens i of sinks ..
    m - window, as shares of the sum of |o|^2 over the queries and all heads. q [B, H, T, D], k and v [B, G, T, D], before
    RoPE; v_metrics [H, D, D], or [B, H, D, D], say what |.|^2 is."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (batch, heads, tokens, dim), groups = q.shape, k.shape[1]
    metric = np.broadcast_to(np.eye(dim) if v_metrics is None else v_metrics, (batch, heads, dim, dim)).astype(np.float64)
    positions = np.arange(tokens)
    turned, keys = (rotate(x, positions, inv_freq) for x in (q, k))
    turned = scale_rotary(turned, inv_freq, scaling**2)
    w_k, w_v, power = (np.zeros((batch, heads)) for _ in range(3))
    for b, h in np.ndindex(batch, heads):
        g = h // (heads // groups)
        for m in at[h]:
            scores = keys[b, g, : m + 1] @ turned[b, h, m] / np.sqrt(dim)
            p = np.exp(scores - scores.max())
            p /= p.sum()
            o = p @ v[b, g, : m + 1]
            power[b, h] += o @ metric[b, h] @ o
            for i in range(sinks, m - window + 1):
                off = v[b, g, i] - o
                w_k[b, h] += p[i] ** 2 * (off @ metric[b, h] @ off) / dim
                w_v[b, h] += p[i] ** 2
    total = power.sum(1, keepdims=True)
    return w_k / total, w_v / total


def symmetric_root(metric: ArrayLike) -> tuple[F64, F64]:
    """M^(1/2) and M^(-1/2) of a positive definite matrix, by its SVD."""
    left, sizes, _ = np.linalg.svd(np.asarray(metric, np.float64))
    return (left * np.sqrt(sizes)) @ left.T, (left / np.sqrt(sizes)) @ left.T


def fit_basis(x: ArrayLike, metric: ArrayLike | None, rank: int) -> tuple[F64, F64]:
    """Tokens x [T, D], metric [D, D] or None for the identity -> basis [R, D], all singular values of X M^(1/2)."""
    x = np.asarray(x, np.float64)
    root, inverse = symmetric_root(np.eye(x.shape[1]) if metric is None else metric)
    _, singular, right = np.linalg.svd(x @ root, full_matrices=True)
    return right[:rank] @ inverse, singular


def fit_encoder(basis: ArrayLike, metric: ArrayLike | None) -> F64:
    """E [D, R] whose coefficients X E of the basis [R, D] lose least under the metric: a least-squares problem a
    column."""
    basis = np.asarray(basis, np.float64)
    root, _ = symmetric_root(np.eye(basis.shape[1]) if metric is None else metric)
    return np.linalg.lstsq((basis @ root).T, root, rcond=None)[0].T  # rows of X = rows of the identity


def loss(x: ArrayLike, basis: ArrayLike, metric: ArrayLike | None) -> float:
    """|| (X - C B) M^(1/2) ||_F^2 with the best coefficients C."""
    x, basis = np.asarray(x, np.float64), np.asarray(basis, np.float64)
    root, _ = symmetric_root(np.eye(x.shape[1]) if metric is None else metric)
    rest = (x - x @ fit_encoder(basis, metric) @ basis) @ root
    return float(np.sum(rest**2))


def quantise_basis(basis: ArrayLike) -> tuple[NDArray[np.int64], F64]:
    """Rows [.., R, D] as scale * integer in -127 .. 127, scale = the largest magnitude of the row / 127 (1 for
    zeros)."""
    basis = np.asarray(basis, np.float64)
    scale = np.abs(basis).max(-1) / 127
    scale[scale == 0] = 1.0
    codes = np.zeros(basis.shape, np.int64)
    for index in np.ndindex(*scale.shape):
        codes[index] = np.rint(basis[index] / scale[index])
    return codes, scale


def quantise(units: ArrayLike, bands: Bands) -> F64:
    """Coefficients in units of their steps [..., R] as the values they are stored as: n - (2**bits - 1)/2, or fp16."""
    units = np.asarray(units, np.float64)
    out = np.empty(units.shape)
    for r, bits in enumerate([bits for rank, bits in bands for _ in range(rank)]):
        if bits == 16:
            out[..., r] = units[..., r].astype(np.float16)
        else:
            out[..., r] = code_of(units[..., r], bits) - (2**bits - 1) / 2
    return out


def requantise(pages: ArrayLike, source: Bands, bands: Bands, ratio: ArrayLike, side: str) -> U8:
    """Pages [..., C * bytes] in other bands; ratio [..., R]: the old step of each component over its new one."""
    ratio = np.asarray(ratio, np.float64)
    return pack_pages(unpack_pages(pages, source, side)[..., : ratio.shape[-1]] * ratio[..., None, :], bands, side)
