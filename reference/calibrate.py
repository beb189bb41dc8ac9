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


def query_positions(tokens: int, count: int) -> list[int]:
    """Where `count` queries of every head are: evenly over the second half."""
    first = tokens // 2
    return [first + r * (tokens - 1 - first) // max(1, count - 1) for r in range(count)]


def error_costs(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    gradient: ArrayLike | None,
    inv_freq: ArrayLike,
    at: Sequence[int],
    *,
    scale: float,
    sinks: int,
    window: int,
    frame: int,
) -> tuple[F64, float]:
    """What errors of the older tokens i = sinks .. m - window cost where the outputs o of the
    queries m in `at` of each head have the gradients g; q, gradient [H, T, D], k, v [G, T, D].
    Without: the sum over gradients along each of the D directions.

    Returns the sums over m, i of scale^2 p_i^2 (g . (v_i - o))^2 y y^T, y = R(-t0) q_m with t0 the
    start of i's frame, and of p_i^2 g g^T [2, G, D, D]; of |o|^2 over m.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    slopes = None if gradient is None else np.asarray(gradient, np.float64)
    kv_heads, tokens, dim = k.shape
    turns = [rotation(-start, inv_freq, dim) for start in range(0, tokens, frame)]
    metrics, power = np.zeros((2, kv_heads, dim, dim)), 0.0
    for h in range(len(q)):
        head = h * kv_heads // len(q)
        for m in at:
            scores = scale * (k[head, : m + 1] @ q[h, m])
            p = np.exp(scores - scores.max())
            p /= p.sum()
            o = p @ v[head, : m + 1]
            power += float(o @ o)
            for i in range(sinks, m - window + 1):
                y = turns[i // frame] @ q[h, m]
                for g in np.eye(dim) if slopes is None else slopes[h, m, None]:
                    along = scale * p[i] * (g @ (v[head, i] - o))
                    metrics[0, head] += along**2 * np.outer(y, y)
                    metrics[1, head] += p[i] ** 2 * np.outer(g, g)
    return metrics, power


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
