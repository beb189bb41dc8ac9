"""Oracle of spectral_kernels/rope.py: one explicit 2 x 2 rotation a pair of dimensions, angles in
float64.

A pair i is the dimensions (i, i + n), n = len(inv_freq); dimensions from 2n on do not turn.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]


def rotate(
    x: ArrayLike, positions: ArrayLike, inv_freq: ArrayLike, *, inverse: bool = False
) -> F64:
    """x [..., T, D] turned by positions [..., T] (which broadcast), backwards if `inverse`."""
    x = np.asarray(x, np.float64)
    frequencies = np.asarray(inv_freq, np.float64)
    turn_by = np.asarray(positions).astype(np.int64)
    if inverse:
        turn_by = -turn_by
    out = x.copy()
    for i, frequency in enumerate(frequencies):
        angle = turn_by.astype(np.float64) * frequency
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        first, second = x[..., i], x[..., i + len(frequencies)]
        out[..., i] = rotation[0, 0] * first + rotation[0, 1] * second
        out[..., i + len(frequencies)] = rotation[1, 0] * first + rotation[1, 1] * second
    return out


def frame_start(positions: ArrayLike, frame: int) -> NDArray[np.int64]:
    """The first position of the frame that holds a position."""
    return np.asarray(positions).astype(np.int64) // frame * frame


def turn_back(
    x: ArrayLike, positions: ArrayLike, inv_freq: ArrayLike, frame: int, *, inverse: bool = False
) -> F64:
    """x [..., T, D] turned back by the starts of the frames of positions [..., T]; forward again if
    `inverse`."""
    return rotate(x, frame_start(positions, frame), inv_freq, inverse=not inverse)


def pair_magnitude(x: ArrayLike, inv_freq: ArrayLike) -> F64:
    """|x| [..., D] with each dimension that turns replaced by the length of its pair: no rotation
    makes one larger."""
    out = np.abs(np.asarray(x, np.float64))
    n = len(np.asarray(inv_freq))
    length = np.hypot(out[..., :n], out[..., n : 2 * n])
    out[..., :n] = length
    out[..., n : 2 * n] = length
    return out


def project_queries(
    q: ArrayLike,
    k_basis: ArrayLike,
    k_scale: ArrayLike,
    k_mean: ArrayLike,
    rows: ArrayLike,
    inv_freq: ArrayLike,
    *,
    frame: int,
    max_frames: int,
) -> tuple[F64, F64]:
    """(u [B, H, Q, max_frames, R], bias [B, H, Q, max_frames]) of q [B, H, Q, D] as the model
    rotated it.

    k_basis [M, G, R, D], k_scale [M, G, R], k_mean [M, G, D], rows [B] of M. By definition u[.., j,
    r] is the product of the query and of the vector k_scale_r k_basis_r, taken as a stored key of
    frame j: turned forward to the frame.
    """
    q = np.asarray(q, np.float64)
    vectors = np.asarray(k_basis, np.float64) * np.asarray(k_scale, np.float64)[..., None]
    means, rows = np.asarray(k_mean, np.float64), np.asarray(rows)
    batch, heads, queries, _ = q.shape
    groups, rank = vectors.shape[1:3]
    u = np.zeros((batch, heads, queries, max_frames, rank))
    bias = np.zeros((batch, heads, queries, max_frames))
    for b in range(batch):
        for j in range(max_frames):
            start = j * frame
            keys = rotate(vectors[rows[b]], np.full(rank, start), inv_freq)  # [G, R, D]
            mean = rotate(means[rows[b]], np.full(groups, start), inv_freq)  # [G, D]
            for h in range(heads):
                g = h // (heads // groups)
                u[b, h, :, j] = q[b, h] @ keys[g].T
                bias[b, h, :, j] = q[b, h] @ mean[g]
    return u, bias
