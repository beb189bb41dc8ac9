"""Oracle of spectral_kernels/window.py: which tokens of a row are attended exactly, and which slot
holds which token.

A row has S = sinks + ring slots: the first `sinks` tokens keep theirs, later ones take the ring's
in turn.
"""

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def slot_of(position: int, sinks: int, ring: int) -> int:
    """The slot of a token."""
    if position < sinks:
        return position
    return sinks + (position - sinks) % ring


def is_exact(position: int, seq_len: int, sinks: int, window: int) -> bool:
    """Whether a token of a row of seq_len tokens is attended exactly: among the first or the
    newest."""
    return position < sinks or position >= seq_len - window


def holders(seq_len: int, sinks: int, ring: int) -> list[int]:
    """Of each slot, the newest token written to it after all seq_len tokens were, one after
    another; -1: none."""
    slots = [-1] * (sinks + ring)
    for position in range(seq_len):
        if position < sinks or ring:
            slots[slot_of(position, sinks, ring)] = position
    return slots


def exact_tokens(seq_len: int, sinks: int, window: int) -> list[int]:
    """The positions that are attended exactly, rising."""
    return [p for p in range(seq_len) if is_exact(p, seq_len, sinks, window)]


def paged_tokens(seq_len: int, sinks: int, window: int) -> list[int]:
    """The positions that are attended by their pages, rising."""
    return [p for p in range(seq_len) if not is_exact(p, seq_len, sinks, window)]


def visible(seq_len: int, queries: int) -> Mask:
    """[Q, seq_len]: whether query i, at position seq_len - Q + i, may see a token: not a later
    one."""
    at = seq_len - queries + np.arange(queries)
    return np.arange(seq_len)[None, :] <= at[:, None]
