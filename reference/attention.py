"""Oracle of spectral_kernels/attention.py and window.py: every key and value as the model had it, a
softmax over them.

    score_t = scale * q . k_t    w = softmax of the scores of the tokens seen    o = sum_t w_t v_t

with q and k as the model rotated them: exact tokens from their slots, others rebuilt from pages at
their absolute position. All in float64. A set without tokens is o = 0, lse = -inf.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .compress import PageArrays, rebuild
from .window import exact_tokens, paged_tokens, slot_of, visible

F64 = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass
class State:
    """The state, and what tolerances are derived from.

    o: [B, H, Q, D].  lse: [B, H, Q], natural log.  scores: [B, H, Q, T], scaled, -inf where the
    token is not seen. keys, values: [B, G, T, D], zero where a row has no such token.
    """

    o: F64
    lse: F64
    scores: F64
    keys: F64
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
        return np.stack(
            [weights[:, h] @ size[:, h // group] for h in range(weights.shape[1])], axis=1
        )


def softmax_state(scores: F64, values: F64, keys: F64 | None = None) -> State:
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
    return State(o, lse, scores, np.zeros_like(values) if keys is None else keys, values)


def dense(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, seen: Mask, *, scale: float | None = None
) -> State:
    """Attention of q [B, H, Q, D] over k, v [B, G, T, D], all as rotated; seen [B, Q, T] says which
    tokens a query sees.

    What no query sees may hold anything.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    used = np.any(seen, axis=1).reshape(len(seen), 1, k.shape[2], 1)
    k, v = (np.where(used, x, 0.0) for x in (k, v))
    scores = np.full((*q.shape[:3], k.shape[2]), -np.inf)
    for b, h in np.ndindex(q.shape[0], q.shape[1]):
        scores[b, h] = np.where(seen[b], scale * (q[b, h] @ k[b, h // group].T), -np.inf)
    return softmax_state(scores, v, k)


def spectral(
    q: ArrayLike, pages: PageArrays, *, sinks: int = 0, window: int = 0, scale: float | None = None
) -> State:
    """Over the pages alone: tokens sinks <= p < seq_len - window, by every query."""
    q = np.asarray(q, np.float64)
    batch, groups = len(pages.seq_lens), pages.k_pages.shape[1]
    tokens = max((int(n) for n in pages.seq_lens), default=0)
    keys, values = np.zeros((2, batch, groups, tokens, pages.codec.head_dim))
    seen = np.zeros((batch, q.shape[2], tokens), bool)
    for b in range(batch):
        length = int(pages.seq_lens[b])
        keys[b, :, :length], values[b, :, :length] = (
            rebuild(pages, b, side) for side in ("k", "v")
        )
        seen[b, :, paged_tokens(length, sinks, window)] = True
    return dense(q, keys, values, seen, scale=scale)


def windowed(
    q: ArrayLike,
    k_exact: ArrayLike,
    v_exact: ArrayLike,
    seq_lens: ArrayLike,
    seq_ids: ArrayLike,
    *,
    sinks: int,
    window: int,
    scale: float | None = None,
) -> State:
    """Over the exact tokens alone, from their slots in k_exact, v_exact [max_seqs, G, S, D]:
    causal, query i of Q at position seq_len - Q + i."""
    q, k_exact, v_exact = (np.asarray(x, np.float64) for x in (q, k_exact, v_exact))
    seq_lens, seq_ids = np.asarray(seq_lens), np.asarray(seq_ids)
    batch, ring = q.shape[0], k_exact.shape[2] - sinks
    tokens = max((int(n) for n in seq_lens), default=0)
    keys, values = np.zeros((2, batch, k_exact.shape[1], tokens, q.shape[-1]))
    seen = np.zeros((batch, q.shape[2], tokens), bool)
    for b in range(batch):
        length = int(seq_lens[b])
        may = visible(length, q.shape[2])
        for p in exact_tokens(length, sinks, window):
            slot = slot_of(p, sinks, ring)
            keys[b, :, p], values[b, :, p] = (
                k_exact[seq_ids[b], :, slot],
                v_exact[seq_ids[b], :, slot],
            )
            seen[b, :, p] = may[:, p]
    return dense(q, keys, values, seen, scale=scale)
