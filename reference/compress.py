"""Oracle of spectral_kernels/compress.py: second moments by sums, the basis by the SVD of the whitened tokens.

The basis of X [T, D] under a metric M [D, D] is the rank-R factorisation X ~ (X E) B that loses least in
|| (X - X E B) M^(1/2) ||_F. With  X M^(1/2) = U S V^T :   E = M^(1/2) V_R,   B = V_R^T M^(-1/2).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .pages import Bands, code_of

F64 = NDArray[np.float64]


def gram(x: ArrayLike, lengths: ArrayLike | None = None) -> F64:
    """sum_t x_t x_t^T over the first lengths[b] tokens: x [B, G, T, D] -> [B, G, D, D]."""
    x = np.asarray(x, np.float64)
    batch, groups, tokens, dim = x.shape
    total = np.zeros((batch, groups, dim, dim))
    for b in range(batch):
        for t in range(tokens if lengths is None else int(np.asarray(lengths)[b])):
            for g in range(groups):
                total[b, g] += np.outer(x[b, g, t], x[b, g, t])
    return total


def symmetric_root(metric: ArrayLike) -> tuple[F64, F64]:
    """M^(1/2) and M^(-1/2) of a positive definite matrix, by its SVD."""
    left, sizes, _ = np.linalg.svd(np.asarray(metric, np.float64))
    return (left * np.sqrt(sizes)) @ left.T, (left / np.sqrt(sizes)) @ left.T


def fit_basis(x: ArrayLike, metric: ArrayLike | None, rank: int) -> tuple[F64, F64, F64]:
    """Tokens x [T, D], metric [D, D] -> encoder [D, R], basis [R, D] and all singular values of X M^(1/2)."""
    x = np.asarray(x, np.float64)
    root, inverse = symmetric_root(np.eye(x.shape[1]) if metric is None else metric)
    _, singular, right = np.linalg.svd(x @ root, full_matrices=True)
    return root @ right[:rank].T, right[:rank] @ inverse, singular


def loss(x: ArrayLike, encoder: ArrayLike, basis: ArrayLike, metric: ArrayLike | None) -> float:
    """|| (X - X E B) M^(1/2) ||_F^2: what the basis is chosen to make small."""
    x, encoder, basis = (np.asarray(a, np.float64) for a in (x, encoder, basis))
    rest = x - x @ encoder @ basis
    return float(np.sum((rest @ symmetric_root(np.eye(x.shape[1]) if metric is None else metric)[0]) ** 2))


def quantise_basis(basis: ArrayLike) -> tuple[NDArray[np.int64], F64]:
    """Rows [.., R, D] as scale * integer in -127 .. 127, scale = the largest magnitude of the row / 127."""
    basis = np.asarray(basis, np.float64)
    scale = np.abs(basis).max(-1) / 127
    codes = np.zeros(basis.shape, np.int64)
    for index in np.ndindex(*scale.shape):
        if scale[index] > 0:
            codes[index] = np.rint(basis[index] / scale[index])
    return codes, scale


def quantise(coefficients: ArrayLike, steps: ArrayLike, bands: Bands) -> F64:
    """Coefficients [..., R] as the values they are stored as: step * (n - (2**bits - 1)/2), or step * fp16."""
    coefficients, steps = np.asarray(coefficients, np.float64), np.asarray(steps, np.float64)
    out = np.empty(np.broadcast_shapes(coefficients.shape, steps.shape))
    bits_of = [bits for rank, bits in bands for _ in range(rank)]
    for r, bits in enumerate(bits_of):
        units = coefficients[..., r] / steps[..., r]
        if bits == 16:
            stored = units.astype(np.float16).astype(np.float64)
        else:
            stored = code_of(units, bits) - (2**bits - 1) / 2
        out[..., r] = stored * steps[..., r]
    return out
