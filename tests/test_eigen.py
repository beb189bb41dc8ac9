"""spectral_kernels/eigen.py against reference/eigen.py."""

import numpy as np
import pytest
import torch

from reference import eigen as oracle
from spectral_kernels import eigen
from tests.cases import DEVICE, F64, IMPLEMENTATIONS, operation, to_numpy

DIM = 128 if DEVICE.type == "cuda" else 16  # the interpreter takes a millisecond a step


def matrices(rng: np.random.Generator, dim: int) -> dict[str, F64]:
    """What moments look like, and what could go wrong."""
    frame = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    falling = (frame * np.exp(-12 * np.arange(dim) / dim)) @ frame.T
    few = rng.standard_normal((dim // 4, dim))
    one = rng.standard_normal((1, dim))
    many = rng.standard_normal((64 * dim, dim))
    return {
        "falling spectrum": falling,
        "rank D/4": few.T @ few,
        "rank 1, float32": np.float32(one.T @ one).astype(np.float64),
        "no direction": many.T @ many,
        "identity": np.eye(dim),
        "zeros": np.zeros((dim, dim)),
        "diagonal, rising": np.diag(np.arange(dim) + 1.0),
        "tiny": falling * 1e-30,
        "huge": falling * 1e30,
    }


def slack(matrix: F64) -> F64:
    """Of `oracle.lost`: each kept row is off by at most the float32 rounding of D rotations a sweep, 16 sweeps, of rows of
    L^T whose squares are the eigenvalues; an error in a row counts in squares, times the largest eigenvalue."""
    dim = len(matrix)
    row = np.sqrt(dim * eigen.SWEEPS) * 2.0**-24 + eigen.SMALL**2
    return np.arange(1, dim + 1) * (row**2 + 1e-13) * np.trace(matrix) * dim


def check_eigenvectors(implementation: str, matrices: F64) -> None:
    """matrices [..., D, D]: orthonormal rows that miss no more of the trace than the true ones, however many are kept."""
    got = operation(eigen, "eigenvectors", implementation)(torch.from_numpy(matrices).to(DEVICE))
    assert got.shape == matrices.shape and got.dtype == torch.float64
    rows = to_numpy(got)
    for index in np.ndindex(*matrices.shape[:-2]):
        matrix = matrices[index]
        np.testing.assert_allclose(rows[index] @ rows[index].T, np.eye(len(matrix)), atol=1e-11, err_msg=str(index))
        least = np.trace(matrix) - np.cumsum(oracle.eigenvalues(matrix))
        assert (oracle.lost(matrix, rows[index]) <= least + slack(matrix) + 1e-300).all(), index


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dim", [DIM, 3 * DIM // 4, DIM // 2])  # three quarters: rows of padding move among the others
def test_eigenvectors(rng, implementation, dim):
    check_eigenvectors(implementation, np.stack(list(matrices(rng, dim).values()))[None])


def test_one_broken_matrix_among_others(rng):
    """What is not a number stays where it is. (LAPACK, and so the twin, raises.)"""
    good = matrices(rng, DIM)["falling spectrum"]
    broken = good.copy()
    broken[1, 2] = broken[2, 1] = broken[3, 3] = np.nan
    run = operation(eigen, "eigenvectors", "triton")
    together = to_numpy(run(torch.from_numpy(np.stack([good, broken, good])).to(DEVICE)))
    for got in together[[0, 2]]:
        np.testing.assert_array_equal(got, to_numpy(run(torch.from_numpy(good).to(DEVICE))))


def test_the_slack_has_teeth(rng):
    matrix = matrices(rng, DIM)["falling spectrum"]
    values, vectors = np.linalg.eigh(matrix)
    best = vectors.T[::-1]
    least = np.trace(matrix) - np.cumsum(values[::-1])
    turned = best.copy()  # two rows across the cut, turned by a thousandth
    cos, sin = np.cos(1e-3), np.sin(1e-3)
    turned[[3, 7]] = np.array([[cos, sin], [-sin, cos]]) @ best[[3, 7]]
    for name, rows in {
        "rising": best[::-1],
        "random": np.linalg.qr(rng.standard_normal((DIM, DIM)))[0],
        "two rows swapped": best[[1, 0, *range(2, DIM)]],
        "rows turned": turned,
    }.items():
        assert (oracle.lost(matrix, rows) > least + 2 * slack(matrix)).any(), name


def test_arguments_are_named():
    for matrix, error in ((torch.zeros(4, 4), TypeError), (torch.zeros(4, 5, dtype=torch.float64), ValueError)):
        with pytest.raises(error, match="matrices"):
            eigen.eigenvectors(matrix)
