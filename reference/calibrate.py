"""Oracle of spectral_kernels/calibrate.py: float64 NumPy, from the definitions, no formula shared.

Positions count from 0; a frame is F positions; R(p) turns the pair (i, i + n), n = len(inv_freq),
by p * inv_freq[i].
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]


def rotation(position: int, inv_freq: ArrayLike, dim: int) -> F64:
    """The matrix R(position) [D, D]: R x is a row of keys or queries turned."""
    inv_freq = np.asarray(inv_freq, np.float64)
    out = np.eye(dim)
    for i, frequency in enumerate(inv_freq):
        j, angle = i + len(inv_freq), position * frequency
        out[i, i], out[i, j] = np.cos(angle), -np.sin(angle)
        out[j, i], out[j, j] = np.sin(angle), np.cos(angle)
    return out


def turned_back(x: ArrayLike, inv_freq: ArrayLike, frame: int) -> F64:
    """R(-t0) x_p of each row p of x [..., T, D], t0 the start of its frame."""
    x = np.asarray(x, np.float64)
    out = np.empty_like(x)
    for p in range(x.shape[-2]):
        out[..., p, :] = x[..., p, :] @ rotation(-(p // frame) * frame, inv_freq, x.shape[-1]).T
    return out


def query_positions(tokens: int, count: int, group: int) -> list[list[int]]:
    """Where the `count` queries of each of a KV head's `group` heads are: evenly over the second
    half, heads in turns.
    """
    first, rows = tokens // 2, count * group
    at = [first + r * (tokens - 1 - first) // max(1, rows - 1) for r in range(rows)]
    return [at[h::group] for h in range(group)]


def error_costs(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    inv_freq: ArrayLike,
    at: Sequence[Sequence[int]],
    *,
    scale: float,
    sinks: int,
    window: int,
    frame: int,
) -> tuple[F64, F64]:
    """What errors of the older tokens i = sinks .. m - window cost the outputs o of the queries m
    in at[h] of each head; q [H, T, D], k and v [G, T, D]; at [H].

    Returns the sum over m, i of scale^2 p_i^2 |v_i - o|^2 y y^T, y = R(-t0) q_m with t0 the start
    of i's frame [G, D, D]; the sums of p_i^2 and of |o|^2 [2, G].
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    kv_heads, tokens, dim = k.shape
    turns = [rotation(-start, inv_freq, dim) for start in range(0, tokens, frame)]
    metric, sums = np.zeros((kv_heads, dim, dim)), np.zeros((2, kv_heads))
    for h in range(len(q)):
        g = h * kv_heads // len(q)
        for m in at[h]:
            scores = scale * (k[g, : m + 1] @ q[h, m])
            p = np.exp(scores - scores.max())
            p /= p.sum()
            o = p @ v[g, : m + 1]
            for i in range(sinks, m - window + 1):
                y = turns[i // frame] @ q[h, m]
                metric[g] += scale**2 * p[i] ** 2 * np.sum((v[g, i] - o) ** 2) * np.outer(y, y)
                sums[0, g] += p[i] ** 2
            sums[1, g] += o @ o
    return metric, sums


def root(metric: ArrayLike) -> F64:
    """The symmetric square root of a positive semi-definite matrix."""
    left, sizes, _ = np.linalg.svd(np.asarray(metric, np.float64), hermitian=True)
    return (left * np.sqrt(sizes)) @ left.T


def least_losses(x: ArrayLike, metric: ArrayLike) -> F64:
    """By rank R = 0 .. D: the least sum of (x - x') M (x - x')^T over rows x [T, D] that any rank-R
    x' reaches.
    """
    sizes = np.linalg.svd(np.asarray(x, np.float64) @ root(metric), compute_uv=False) ** 2
    return np.array([sizes[r:].sum() for r in range(len(sizes) + 1)])


def loss(
    x: ArrayLike, basis: ArrayLike, metric: ArrayLike, encoder: ArrayLike | None = None
) -> float:
    """The same for x' = C basis [R, D], with C = x encoder, or the best C: least squares."""
    x, basis = np.asarray(x, np.float64), np.asarray(basis, np.float64)
    half = root(metric)
    if encoder is None:
        c = np.linalg.lstsq((basis @ half).T, (x @ half).T, rcond=None)[0].T
    else:
        c = x @ np.asarray(encoder, np.float64)
    return float((((x - c @ basis) @ half) ** 2).sum())


def quantised(values: ArrayLike, step: float, bits: int) -> F64:
    """The nearest of the 2**bits values step * (n - (2**bits - 1)/2), one value at a time."""
    grid = step * (np.arange(2**bits) - (2**bits - 1) / 2)
    return np.array([grid[np.argmin(np.abs(grid - value))] for value in np.ravel(values)]).reshape(
        np.shape(values)
    )


def least_quantiser_error(values: ArrayLike, bits: int, steps: int = 400) -> float:
    """Least mean squared error over many steps, up to the one that clips nothing."""
    values = np.asarray(values, np.float64)
    widest = 2 * np.abs(values).max() / 2**bits
    tried = widest * np.linspace(0.1, 1.0, steps)
    return min(float(np.mean((quantised(values, step, bits) - values) ** 2)) for step in tried)


def best_shares(
    total: float, sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]
) -> float:
    """The least sum of losses of one choice an item whose bytes are at most `total`: all
    combinations.
    """
    best = np.inf
    for choice in itertools.product(*(range(len(size)) for size in sizes)):
        if sum(size[i] for size, i in zip(sizes, choice, strict=True)) <= total:
            best = min(best, sum(lost[i] for lost, i in zip(losses, choice, strict=True)))
    return float(best)


def stored(
    x: ArrayLike,
    basis: ArrayLike,
    scale: ArrayLike,
    encoder: ArrayLike,
    bits: Sequence[int],
    mean: ArrayLike | None = None,
) -> F64:
    """What is read back of rows x [T, D] of one head: basis [R, D], scale [R], encoder [D, R], mean
    [D].
    """
    x, basis, scale, encoder = (np.asarray(a, np.float64) for a in (x, basis, scale, encoder))
    mean = np.zeros(x.shape[1]) if mean is None else np.asarray(mean, np.float64)
    out = np.tile(mean, (len(x), 1))
    for r, b in enumerate(bits):
        out += np.outer(quantised((x - mean) @ encoder[:, r], 1.0, b), scale[r] * basis[r])
    return out
