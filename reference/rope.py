"""Oracle of spectral_kernels/rope.py: one explicit 2 x 2 rotation a pair of dimensions, angles in float64.

A pair i is the dimensions (i, i + n), n = len(inv_freq); dimensions from 2n on do not turn.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]


def rotate(
    x: ArrayLike, positions: ArrayLike, inv_freq: ArrayLike, *, chunk: int | None = None, inverse: bool = False
) -> F64:
    """x [..., T, D] turned by positions [..., T] (which broadcast), modulo `chunk` if given, backwards if `inverse`."""
    x = np.asarray(x, np.float64)
    frequencies = np.asarray(inv_freq, np.float64)
    turn_by = np.asarray(positions).astype(np.int64)
    if chunk is not None:
        turn_by = turn_by % chunk
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


def scale_rotary(x: ArrayLike, inv_freq: ArrayLike, scaling: float) -> F64:
    """The attention scaling that cosine and sine carry: the rotary dimensions of x [..., D] times `scaling`."""
    x = np.array(x, np.float64)
    x[..., : 2 * len(np.asarray(inv_freq))] *= scaling
    return x


def pair_magnitude(x: ArrayLike, inv_freq: ArrayLike) -> F64:
    """|x| [..., D] with each rotary dimension replaced by the length of its pair: no rotation makes a component
    larger."""
    out = np.abs(np.asarray(x, np.float64))
    n = len(np.asarray(inv_freq))
    length = np.hypot(out[..., :n], out[..., n : 2 * n])
    out[..., :n] = length
    out[..., n : 2 * n] = length
    return out


def project_queries(
    q: ArrayLike,
    positions: ArrayLike,
    k_basis: ArrayLike,
    k_scale: ArrayLike,
    segment_table: ArrayLike,
    lengths: ArrayLike,
    inv_freq: ArrayLike,
    scaling: float,
    chunk: int,
) -> F64:
    """q [B, H, Q, D], positions [B, Q], k_basis [S, G, R, D], k_scale [S, G, R] -> u [B, H, Q, max_chunks, R].

    By definition u[.., j, r] is the RoPE product of the query at its absolute position and of the vector
    k_scale[r] * k_basis[r], taken as a key at the absolute position j * C: both are rotated, both carry the scaling.
    """
    q = np.asarray(q, np.float64)
    positions, segments = np.asarray(positions), np.asarray(segment_table)
    vectors = np.asarray(k_basis, np.float64) * np.asarray(k_scale, np.float64)[..., None]
    batch, heads, queries, _ = q.shape
    groups, rank = vectors.shape[1:3]
    u = np.zeros((batch, heads, queries, segments.shape[1], rank))
    for b in range(batch):
        rotated = scale_rotary(rotate(q[b], positions[b], inv_freq), inv_freq, scaling)  # [H, Q, D]
        for j in range(segments.shape[1]):
            start = j * chunk
            if start >= int(np.asarray(lengths)[b]):
                continue
            keys = vectors[segments[b, j]]  # [G, R, D]
            keys = scale_rotary(rotate(keys, np.full(rank, start), inv_freq), inv_freq, scaling)
            for h in range(heads):
                u[b, h, :, j] = rotated[h] @ keys[h // (heads // groups)].T
    return u
