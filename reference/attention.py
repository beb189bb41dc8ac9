"""Oracle of spectral_kernels/attention.py: every key and value rebuilt, query and key turned to their absolute
positions.

    score_t = scale * (S R(m) q) . (S R(p_t) k_t)      w = softmax of the scores of the tokens seen      o = sum_t w_t
    v_t

with S the attention scaling on the rotary dimensions. All in float64. A set without tokens is o = 0, lse = -inf.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .pages import PageArrays, rebuild
from .rope import rotate, scale_rotary

F64 = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass
class State:
    """The state, and what tolerances are derived from.

    o: [B, H, Q, D].  lse: [B, H, Q], natural log.  scores: [B, H, Q, T], scaled, -inf where the token is not seen.
    values: [B, G, T, D], zero where a row has no such token.
    """

    o: F64
    lse: F64
    scores: F64
    values: F64

    @property
    def weights(self) -> F64:
        """softmax [B, H, Q, T]; zero in empty sets."""
        lse = np.where(np.isfinite(self.lse), self.lse, 0.0)
        return np.exp(self.scores - lse[..., None])

    @property
    def magnitude(self) -> F64:
        """sum_t w_t |v_t|, [B, H, Q, D]."""
        weights, size = self.weights, np.abs(self.values)
        group = weights.shape[1] // size.shape[1]
        return np.stack([weights[:, h] @ size[:, h // group] for h in range(weights.shape[1])], axis=1)


def softmax_state(scores: F64, values: F64) -> State:
    """The state of scores [B, H, Q, T] (-inf: not seen) over values [B, G, T, D]."""
    batch, heads, queries, _ = scores.shape
    group = heads // values.shape[1]
    o = np.zeros((batch, heads, queries, values.shape[-1]))
    lse = np.full((batch, heads, queries), -np.inf)
    for b, h, m in np.ndindex(batch, heads, queries):
        row = scores[b, h, m]
        if not np.isfinite(row).any():
            continue
        top = row.max()
        weights = np.exp(row - top)
        o[b, h, m] = weights @ values[b, h // group] / weights.sum()
        lse[b, h, m] = top + np.log(weights.sum())
    return State(o, lse, scores, values)


def dense(
    q: ArrayLike,
    positions: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    key_positions: ArrayLike,
    inv_freq: ArrayLike,
    *,
    scaling: float = 1.0,
    scale: float | None = None,
    causal: bool = True,
    seen: Mask | None = None,
    rotated_by: NDArray[np.int64] | None = None,
) -> State:
    """Attention of q [B, H, Q, D] at positions [B, Q] over k, v [B, G, T, D] at key_positions [B, G, T].

    A token is seen iff `seen` [B, G, T] holds, 0 <= key_position and, if `causal`, key_position <= position. k is
    before RoPE, or carries the rotations `rotated_by` [B, G, T] already (phase-aligned keys: their offset in the
    chunk).
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    positions, key_positions = np.asarray(positions, np.int64), np.asarray(key_positions, np.int64)
    batch, heads, queries, dim = q.shape
    group = heads // k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    usable = key_positions >= 0
    if seen is not None:
        usable &= seen
    k, v = (np.where(usable[..., None], x, 0.0) for x in (k, v))  # what is never seen may hold anything
    rest = key_positions if rotated_by is None else key_positions - rotated_by
    keys = scale_rotary(rotate(k, rest, inv_freq), inv_freq, scaling)
    turned = scale_rotary(rotate(q, positions[:, None], inv_freq), inv_freq, scaling)
    scores = np.full((batch, heads, queries, k.shape[2]), -np.inf)
    for b, h in np.ndindex(batch, heads):
        g = h // group
        visible = np.repeat(usable[b, g][None], queries, axis=0)
        if causal:
            visible &= key_positions[b, g][None, :] <= positions[b][:, None]
        scores[b, h] = np.where(visible, scale * (turned[b, h] @ keys[b, g].T), -np.inf)
    return softmax_state(scores, v)


def exact(
    q: ArrayLike,
    positions: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    key_positions: ArrayLike,
    inv_freq: ArrayLike,
    *,
    chunk: int,
    scaling: float = 1.0,
    scale: float | None = None,
) -> State:
    """Over phase-aligned keys k [B, G, N, D] (turned by key_position % chunk), key_positions [B, N] or [B, G, N]."""
    at = np.asarray(key_positions, np.int64)
    if at.ndim == 2:
        at = np.repeat(at[:, None], np.shape(k)[1], axis=1)
    return dense(q, positions, k, v, at, inv_freq, scaling=scaling, scale=scale, rotated_by=at % chunk)


def spectral(
    q: ArrayLike,
    positions: ArrayLike,
    pages: PageArrays,
    inv_freq: ArrayLike,
    *,
    scaling: float = 1.0,
    scale: float | None = None,
) -> State:
    """Over the cold pages: tokens below a row's length whose skip bit is clear, no causal mask among them."""
    batch, groups = len(pages.lengths), pages.k_pages.shape[1]
    tokens = max((int(n) for n in pages.lengths), default=0)
    keys, values = (np.zeros((batch, groups, tokens, pages.head_dim)) for _ in range(2))
    seen = np.zeros((batch, groups, tokens), bool)
    for b in range(batch):
        length = int(pages.lengths[b])
        keys[b, :, :length], values[b, :, :length], seen[b, :, :length] = rebuild(pages, b)
    at = np.broadcast_to(np.arange(tokens), seen.shape)
    return dense(
        q,
        positions,
        keys,
        values,
        at,
        inv_freq,
        scaling=scaling,
        scale=scale,
        causal=False,
        seen=seen,
        rotated_by=at % pages.align,
    )
