"""Eigenvectors of many small symmetric matrices at once: one-sided Jacobi, a matrix a thread block.

With W + e I = L L^T (Cholesky, float64; rows and columns sorted by falling diagonal, which Jacobi likes) the rows of L^T
are made orthogonal by plane rotations of pairs (i, i xor s), s = 1 .. D-1: the D/2 pairs of a step at once, D-1 steps a
sweep. Then L^T = Q S V^T, the rows are S V^T, and W = V (S^2 - e) V^T: nothing else is accumulated. A rotation makes rows
a and p with a.p = c orthogonal:

    z = (p.p - a.a) / 2c        t = sign(z) / (|z| + sqrt(1 + z^2))        a' = (a - t p) / sqrt(1 + t^2)

and the partner's z is -z. Working on L^T in place of W halves the digits that a falling spectrum needs: float32 is enough,
and two Newton-Schulz steps in float64 make the vectors orthonormal beyond it.

Source: Hestenes (1958); Veselic and Hari, A note on a one-sided Jacobi algorithm (1989).
Oracle: reference/eigen.py.   Test: tests/test_eigen.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch
from ._checks import check_tensor

# e, in units of the trace. It moves no eigenvector, but float32 rotations do not see what is far below it: of those that
# lift the rounding of the matrix above zero, the smallest. (Whitened keys of a model's first layer span ten decades.)
RIDGES = (2.0**-17, 2.0**-28, 2.0**-40)
# Rows are orthogonal when no |a.p| / (|a| |p|) of a sweep was larger: convergence is quadratic, so the sweep left 1e-8.
SMALL = 1e-4
SWEEPS = 16  # at most; 8 to 10 are usual


@triton.jit
def _orthogonalise_kernel(
    x_ptr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE_ROW: tl.constexpr,
    STRIDE_COLUMN: tl.constexpr,
    SMALL: tl.constexpr,
    SWEEPS: tl.constexpr,
):
    """Rotate the D rows of one matrix, in place, until they are orthogonal."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK)
    x_ptr += tl.program_id(0).to(tl.int64) * D * D + row[:, None] * STRIDE_ROW + column[None, :] * STRIDE_COLUMN
    mask = (row < D)[:, None] & (column < D)[None, :]
    a = tl.load(x_ptr, mask=mask, other=0.0)
    sweep = 0
    worst = 1.0
    while (sweep < SWEEPS) & (worst > SMALL):
        largest = tl.zeros([BLOCK], dtype=tl.float32)
        own = tl.sum(a * a, 1)  # kept up to date by a'.a' = a.a - t c within a sweep
        for step in range(1, BLOCK):
            partner = row ^ step
            p = tl.gather(a, tl.broadcast_to(partner[:, None], [BLOCK, BLOCK]), 0)
            other = tl.gather(own, partner, 0)
            dot = tl.sum(a * p, 1)
            size = tl.sqrt(own) * tl.sqrt(other)
            turn = tl.abs(dot) > 1e-7 * size  # not for rows of zeros, and not for what rounding leaves
            largest = tl.maximum(largest, tl.where(turn, tl.abs(dot) / tl.where(turn, size, 1.0), 0.0))
            z = (other - own) / tl.where(turn, 2.0 * dot, 1.0)
            sign = tl.where((z > 0) | ((z == 0) & (row < partner)), 1.0, -1.0)
            t = tl.where(turn, sign / (tl.abs(z) + tl.sqrt(1.0 + z * z)), 0.0)
            a = (a - t[:, None] * p) * (1.0 / tl.sqrt(1.0 + t * t))[:, None]
            own = tl.maximum(own - t * dot, 0.0)
        worst = tl.max(largest, 0)
        sweep += 1
    tl.store(x_ptr, a, mask=mask)


def eigenvectors(matrices: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of symmetric positive semi-definite matrices, as rows, by falling eigenvalue.

    Args:
        matrices: float64 [..., D, D]; rounding may leave eigenvalues a little below zero (2**-17 of the trace).
    Returns:
        float64 [..., D, D], orthonormal to 1e-12. Signs are arbitrary. Of eigenvalues closer than 1e-6 of the largest the
        vectors may be mixed (they lose nothing in a low-rank approximation): rotations are in float32 on CUDA cards from
        sm_80 on with D up to 128; else this is `torch.linalg.eigh`. Nothing waits for the device.
    Raises:
        TypeError, ValueError: matrices is not as above.
    """
    check_tensor("matrices", matrices, dtype=torch.float64)
    dim = matrices.shape[-1]
    if matrices.dim() < 2 or matrices.shape[-2] != dim:
        raise ValueError(f"matrices: expected shape [..., D, D], got {list(matrices.shape)}")
    if dim > 128 or not _launch.runs_kernel(matrices) or not _launch.has_matrix_units(matrices.device):
        return eigenvectors_torch(matrices)
    if matrices.numel() == 0:
        return matrices.clone()
    w = (matrices + matrices.mT).reshape(-1, dim, dim)
    diagonal = w.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(dim=-1, descending=True)
    w = w.gather(1, order[:, :, None].expand_as(w)).gather(2, order[:, None, :].expand_as(w))
    trace = diagonal.sum(-1)[:, None, None]
    eye = torch.eye(dim, dtype=w.dtype, device=w.device)
    w = torch.where(trace > 0, w / trace.clamp_min(torch.finfo(w.dtype).tiny), eye)
    root = torch.zeros_like(w)
    for ridge in RIDGES:
        lower, info = torch.linalg.cholesky_ex(w + ridge * eye)
        root = torch.where((info == 0)[:, None, None], lower, root)
    rows = root.mT.to(torch.float32, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(rows):
        _orthogonalise_kernel[(rows.shape[0],)](
            rows,
            D=dim,
            BLOCK=max(16, triton.next_power_of_2(dim)),
            STRIDE_ROW=dim,
            STRIDE_COLUMN=1,
            SMALL=SMALL,
            SWEEPS=SWEEPS,
            num_warps=16 if dim > 64 else 4,
        )
    v = rows.double()
    size = v.norm(dim=-1)
    v = v / size[..., None]
    v = v.gather(1, size.argsort(dim=-1, descending=True)[:, :, None].expand_as(v))
    for _ in range(2):  # rows orthogonal to 1e-5, then 1e-10, then float64
        v = 1.5 * v - 0.5 * (v @ v.mT) @ v
    return torch.empty_like(v).scatter_(2, order[:, None, :].expand_as(v), v).view(matrices.shape)


def eigenvectors_torch(matrices: torch.Tensor) -> torch.Tensor:
    """`eigenvectors` in plain PyTorch."""
    return torch.linalg.eigh((matrices + matrices.mT) / 2).eigenvectors.mT.flip(-2)
