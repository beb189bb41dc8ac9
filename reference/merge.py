"""Oracle of spectral_kernels/merge.py: the softmax over the union of disjoint sets of keys.

A set enters as one key that has score lse and value o: that is what a state means, so merging is
attending over the states.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]


def merge(o: ArrayLike, lse: ArrayLike) -> tuple[F64, F64]:
    """o [..., N, D], lse [..., N] -> o [..., D], lse [...]. All sets empty: (0, -inf). N = 0
    likewise."""
    o, lse = np.asarray(o, np.float64), np.asarray(lse, np.float64)
    out, total = np.zeros((*o.shape[:-2], o.shape[-1])), np.full(o.shape[:-2], -np.inf)
    for index in np.ndindex(*o.shape[:-2]):
        live = [n for n in range(o.shape[-2]) if lse[index][n] > -np.inf]
        if not live:
            continue
        top = max(lse[index][n] for n in live)
        mass = [math.exp(lse[index][n] - top) for n in live]
        total[index] = top + math.log(math.fsum(mass))
        for share, n in zip(mass, live, strict=True):
            out[index] += share / math.fsum(mass) * o[index][n]
    return out, total
