"""Eigenvectors of many small symmetric matrices at once: one-sided Jacobi, a matrix a thread block.

With W + e I = L L^T (Cholesky, float64; rows and columns sorted by falling diagonal, which Jacobi likes) the rows of L^T
are made orthogonal by plane rotations of pairs, D/2 at once, D-1 such steps a sweep. Then L^T = Q S V^T, the rows are
S V^T, and W = V (S^2 - e) V^T: nothing else is accumulated. A rotation makes rows a and b with a.b = c orthogonal:

    d = b.b - a.a        t = 2c sign(d) / (|d| + sqrt(d^2 + 4c^2))        a' = (a - t b) / sqrt(1 + t^2)
                                                                        b' = (b + t a) / sqrt(1 + t^2)

All pairs meet once a sweep, with few rows on the move. A thread block holds the rows as two halves, row i of a against row
i of b. b goes through all its orders i xor s, one bit of i at a time (Gray code), so that every a meets every b; then a and
b trade halves, and the same happens within each half, and so on. The bits that turn most often are those along which a
thread holds several rows: such a turn moves nothing, and warps seldom wait for one another.

Working on L^T in place of W halves the digits that a falling spectrum needs: float32 is enough, and three steps in float64
make the vectors orthonormal beyond it.

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
# (Where eigenvalues are equal, as the ridge's are, it is slower: with 2e-3 a matrix of rank 1 fails tests/test_eigen.py.)
SMALL = 1e-4
SWEEPS = 16  # at most; 8 to 10 are usual


@triton.jit
def _flipped(x, BIT: tl.constexpr):
    """x [P, N] or [P], float32, with row i taken from row i xor 2**BIT. In registers where that bit of a row is."""
    bits = x.to(tl.int32, bitcast=True)
    P: tl.constexpr = x.shape[0]
    if len(x.shape) == 2:
        pairs = tl.reshape(bits, [P // (2 << BIT), 2, 1 << BIT, x.shape[1]])
    else:
        pairs = tl.reshape(bits, [P // (2 << BIT), 2, 1 << BIT])
    # The sum of two integers less one of them is the other. (So is xor_sum, which the interpreter takes minutes for.)
    return tl.reshape(tl.sum(pairs, 1, keep_dims=True) - pairs, x.shape).to(tl.float32, bitcast=True)


@triton.jit
def _orthogonalise_kernel(
    x_ptr,
    D: tl.constexpr,
    P: tl.constexpr,
    LOG: tl.constexpr,
    SMALL: tl.constexpr,
    SWEEPS: tl.constexpr,
):
    """Rotate the 2 P rows of one matrix [2 P, D], in place, until they are orthogonal; their order changes. P = 2**LOG."""
    pair = tl.arange(0, P)
    column = tl.arange(0, 2 * P)
    x_ptr += tl.program_id(0).to(tl.int64) * (2 * P * D) + pair[:, None] * D + column[None, :]
    mask = ((pair >= 0)[:, None] & (column < D)[None, :]) != 0
    a = tl.load(x_ptr, mask=mask, other=0.0)
    b = tl.load(x_ptr + P * D, mask=mask, other=0.0)
    sweep = 0
    worst = 1.0
    while (sweep < SWEEPS) & (worst > SMALL):
        largest = tl.zeros([P], dtype=tl.float32)
        size_a = tl.sum(a * a, 1)  # kept up to date by a'.a' = a.a - t c within a sweep
        size_b = tl.sum(b * b, 1)
        for step in range(1, 2 * P):
            dot = tl.sum(a * b, 1)
            # Zero for rows of zeros. No product of sizes underflows: the ridge is at least 2**-40 of the trace.
            ratio = tl.abs(dot) * tl.rsqrt(tl.maximum(size_a * size_b, 1e-37))
            largest = tl.maximum(largest, ratio)
            difference = size_b - size_a
            twice = 2.0 * dot
            root = tl.sqrt(difference * difference + twice * twice)
            t = tl.where(difference < 0, -twice, twice) / tl.maximum(tl.abs(difference) + root, tl.abs(twice))
            t = tl.where(ratio > 1e-7, t, 0.0)  # what rounding leaves is not turned
            cos = tl.rsqrt(1.0 + t * t)
            sin = t * cos
            a, b = a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]
            size_a = tl.maximum(size_a - t * dot, 0.0)
            size_b = tl.maximum(size_b + t * dot, 0.0)
            left = 2 * P - step
            for i in tl.static_range(LOG):
                if left == P >> i:
                    high = ((pair >> i) & 1) != 0
                    moving = _flipped(tl.where(high[:, None], a, b), i)
                    a = tl.where(high[:, None], moving, a)
                    b = tl.where(high[:, None], b, moving)
                    size = _flipped(tl.where(high, size_a, size_b), i)
                    size_a = tl.where(high, size, size_a)
                    size_b = tl.where(high, size_b, size)
                if ((left & (left - 1)) != 0) & ((step & ((2 << i) - 1)) == (1 << i)):
                    b = _flipped(b, LOG - 1 - i)
                    size_b = _flipped(size_b, LOG - 1 - i)
        worst = tl.max(largest, 0)
        sweep += 1
    tl.store(x_ptr, a, mask=mask)
    tl.store(x_ptr + P * D, b, mask=mask)


def _padded_rows(dim: int) -> int:
    """Rows of a matrix as the kernel has them: those past D are zero, and may end up anywhere."""
    return max(16, _launch.next_power_of_2(dim))


def _orthogonalise(rows: torch.Tensor) -> None:
    """Rotate the rows of each matrix, float32 [N, _padded_rows(D), D], contiguous, D up to 128, in place, in any order."""
    dim = rows.shape[-1]
    pairs = _padded_rows(dim) // 2
    options: dict[str, int] = {"num_warps": 4}
    if dim > 64:
        # Of few matrices each has a multiprocessor of its own, of many two share one (H200, D = 128: 16 matrices take
        # 2.0 ms and 2.4 ms, 512 take 8.0 ms and 6.2 ms).
        few = len(rows) <= _launch.multiprocessors(rows.device)
        options = {"num_warps": 16} if few else {"num_warps": 8, "maxnreg": 128}
    with torch.cuda.device_of(rows):
        _orthogonalise_kernel[(rows.shape[0],)](
            rows, D=dim, P=pairs, LOG=pairs.bit_length() - 1, SMALL=SMALL, SWEEPS=SWEEPS, **options
        )


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
    # All ridges at once: a factorisation takes as long for a few matrices more.
    lower, info = torch.linalg.cholesky_ex(torch.stack([w + ridge * eye for ridge in RIDGES]))
    root = torch.zeros_like(w)
    for some, failed in zip(lower, info, strict=True):
        root = torch.where((failed == 0)[:, None, None], some, root)
    rows = torch.nn.functional.pad(root.mT.float(), (0, 0, 0, _padded_rows(dim) - dim)).contiguous()
    _orthogonalise(rows)
    v = rows.double()
    size, falling = v.norm(dim=-1).sort(dim=-1, descending=True)  # the rows of zeros last: others are as long as the ridge
    v = v.gather(1, falling[:, :dim, None].expand(-1, -1, dim)) / size[:, :dim, None]
    # To first order, as Gram and Schmidt would: from each row its parts along the larger ones. A symmetric step would turn
    # the larger row as far as the smaller one, of which a rotation of rows that differ in size knows far less.
    for _ in range(3):  # overlaps of 1e-3, then their squares
        overlap = (v @ v.mT).tril()
        overlap.diagonal(dim1=-2, dim2=-1).sub_(1).mul_(0.5)
        v = torch.baddbmm(v, overlap, v, alpha=-1)
    return torch.empty_like(v).scatter_(2, order[:, None, :].expand_as(v), v).view(matrices.shape)


def eigenvectors_torch(matrices: torch.Tensor) -> torch.Tensor:
    """`eigenvectors` in plain PyTorch."""
    return torch.linalg.eigh((matrices + matrices.mT) / 2).eigenvectors.mT.flip(-2)
