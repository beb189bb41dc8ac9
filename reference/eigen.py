"""Oracle of spectral_kernels/eigen.py: eigenvalues by LAPACK, and how far rows are from eigenvectors."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]


def eigenvalues(matrix: ArrayLike) -> F64:
    """Of a symmetric matrix [D, D], falling."""
    return np.linalg.eigvalsh(np.asarray(matrix, np.float64))[::-1]


def lost(matrix: ArrayLike, rows: ArrayLike) -> F64:
    """What the first r of the orthonormal rows [D, D] miss of the trace, r = 1 .. D: the other eigenvalues, at least."""
    matrix, rows = np.asarray(matrix, np.float64), np.asarray(rows, np.float64)
    kept = np.array([row @ matrix @ row for row in rows])
    return np.trace(matrix) - np.cumsum(kept)
