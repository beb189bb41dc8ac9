"""Eigenvectors of many small symmetric matrices at once: one-sided Jacobi, a matrix a thread block.

With W + e I = L L^T (Cholesky, float64; rows and columns sorted by falling diagonal, which Jacobi likes) the rows of L^T
are made orthogonal by plane rotations of pairs, D/2 at once, D-1 such steps a sweep. Then L^T = Q S V^T, the rows are
S V^T, and W = V (S^2 - e) V^T: nothing else is accumulated. A rotation makes rows a and b with a.b = c orthogonal:

    d = b.b - a.a        t = 2c sign(d) / (|d| + sqrt(d^2 + 4c^2))        a' = (a - t b) / sqrt(1 + t^2)
                                                                        b' = (b + t a) / sqrt(1 + t^2)

All pairs meet once a sweep, with few rows on the move. A thread block holds the rows as two halves, row i of a against row
i of b. b goes through all its orders i xor s, one bit of i at a time (Gray code), so that every a meets every b; then a and
b trade halves, and the same happens within each half, and so on. The bits that turn most often are those along which a
thread holds several rows: such a turn moves nothing. The next ones are those along which a warp does; rows of other warps
go by way of memory. Angles are what most of a step would go to, if all threads of a warp worked out the same ones: eight
share a row.

Working on L^T in place of W halves the digits that a falling spectrum needs: float32 is enough, and four steps in float64
make the vectors orthonormal beyond it.

What comes before and after the rotations is float64, in one program a matrix too (`_roots_kernel`, `_basis_kernel`): dozens
of calls to batched libraries take many times the multiprocessors' time, beside a model that needs them. Matrices lie in
memory, which the cache of a multiprocessor holds, and pass through registers 16 or 32 columns at a time.

No kernel takes much longer than 0.1 ms: a model's large kernels have one program a multiprocessor and share the
work out beforehand, so one that starts beside a program of these ends as much later as that takes, and the few
multiprocessors that these need are no comfort. Between two launches such a kernel gets all it waits for.

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
# lift the rounding of the matrix above zero, the first. (Whitened keys of a model's first layer span ten decades.)
RIDGES = (2.0**-40, 2.0**-28, 2.0**-17)
# Rows are orthogonal when no |a.p| / (|a| |p|) of a sweep was larger: convergence is quadratic, so the sweep left 1e-8.
# (Where eigenvalues are equal, as the ridge's are, it is slower: with 2e-3 a matrix of rank 1 fails tests/test_eigen.py.)
SMALL = 1e-4
SWEEPS = 16  # at most; 8 to 10 are usual, and the launches of others find nothing to do


@triton.jit
def _flipped(x, BIT: tl.constexpr):
    """x [M, C], float32, with row i taken from row i xor 2**BIT: moves nothing if a thread holds both."""
    bits = x.to(tl.int32, bitcast=True)
    pairs = tl.reshape(bits, [x.shape[0] // (2 << BIT), 2, 1 << BIT, x.shape[1]])
    # The sum of two integers less one of them is the other. (So is xor_sum, which the interpreter takes minutes for.)
    return tl.reshape(tl.sum(pairs, 1, keep_dims=True) - pairs, x.shape).to(tl.float32, bitcast=True)


@triton.constexpr_function
def _bit(i, log, lane_bits, warp_bits):
    """The bit of a row's number that is the i-th by how seldom rows trade along it: of warps, of lanes, of registers."""
    lane_bits = min(lane_bits, log)
    warp_bits = min(warp_bits, log - lane_bits)
    return lane_bits + i if i < warp_bits else i - warp_bits if i < warp_bits + lane_bits else i


@triton.jit
def _traded(x, memory_ptr, BIT: tl.constexpr, MEMORY: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """x [M, C], parts of P rows, zero past column D, with row i taken from row i xor 2**BIT. MEMORY: by way of [P, D]."""
    if MEMORY:
        part = tl.arange(0, x.shape[0])
        column = (part // P)[:, None] * x.shape[1] + tl.arange(0, x.shape[1])[None, :]
        row = part % P
        mask = (row >= 0)[:, None] & (column < D)
        tl.debug_barrier()  # what was there has been read
        tl.store(memory_ptr + row[:, None] * D + column, x, mask=mask)
        tl.debug_barrier()
        out = tl.load(memory_ptr + (row ^ (1 << BIT))[:, None] * D + column, mask=mask, other=0.0)
    else:
        out = _flipped(x, BIT)
    return out


@triton.jit
def _products(a, b, P: tl.constexpr):
    """a.b of rows [P], of which a and b [M, C] hold parts."""
    return tl.sum(tl.sum(tl.reshape(a * b, [a.shape[0] // P, P, a.shape[1]]), 0), 1)


@triton.jit
def _of_parts(x, M: tl.constexpr):
    """Numbers of rows [P] as those of their parts, [M, 1]."""
    parts: tl.constexpr = M // x.shape[0]
    return tl.reshape(tl.broadcast_to(x[None, :], [parts, x.shape[0]]), [M])[:, None]


@triton.jit
def _orthogonalise_kernel(
    x_ptr,
    done_ptr,  # int32 a program, 0 at first
    D: tl.constexpr,
    P: tl.constexpr,
    LOG: tl.constexpr,
    C: tl.constexpr,
    LANE_BITS: tl.constexpr,
    WARP_BITS: tl.constexpr,
    SMALL: tl.constexpr,
):
    """Rotate all pairs of the 2 P rows of one matrix [2 P, D], in place, unless they are orthogonal; their order changes.
    P = 2**LOG.

    A row lies as parts of C columns, so that few threads share it, and each works out few angles: part n of row i is row
    n P + i of [M, C]. LANE_BITS, WARP_BITS: of i, the lowest bits and the next ones, by which rows are spread over the
    threads of a warp and over warps.
    """
    M: tl.constexpr = 2 * P * P // C
    part = tl.arange(0, M)
    pair = part % P
    column = (part // P)[:, None] * C + tl.arange(0, C)[None, :]
    x_ptr += tl.program_id(0).to(tl.int64) * (2 * P * D)
    at = pair[:, None] * D + column
    mask = (pair >= 0)[:, None] & (column < D)
    done_ptr += tl.program_id(0)
    if tl.load(done_ptr) == 0:
        a = tl.load(x_ptr + at, mask=mask, other=0.0)
        b = tl.load(x_ptr + P * D + at, mask=mask, other=0.0)
        rest = tl.zeros([P], dtype=tl.int32)  # pairs that were not orthogonal
        size_a = _products(a, a, P)  # kept up to date by a'.a' = a.a - t c within a sweep
        size_b = _products(b, b, P)
        for step in range(1, 2 * P):
            dot = _products(a, b, P)
            # In units that let no square underflow: the ridge is at least 2**-40 of the trace.
            square = (dot * 1e12) * (dot * 1e12)
            both = (size_a * 1e12) * (size_b * 1e12)
            rest |= (square > both * (SMALL * SMALL)).to(tl.int32)
            difference = size_b - size_a
            twice = 2.0 * dot
            root = tl.sqrt(difference * difference + twice * twice)
            t = tl.where(difference < 0, -twice, twice) / tl.maximum(tl.abs(difference) + root, tl.abs(twice))
            t = tl.where(square > both * 1e-14, t, 0.0)  # what rounding leaves is not turned
            cos = tl.rsqrt(1.0 + t * t)
            sin = t * cos
            size_a = tl.maximum(size_a - t * dot, 0.0)
            size_b = tl.maximum(size_b + t * dot, 0.0)
            cos, sin = _of_parts(cos, M), _of_parts(sin, M)
            a, b = a * cos - b * sin, b * cos + a * sin
            left = 2 * P - step
            for i in tl.static_range(LOG):
                if left == P >> i:
                    high = ((pair >> _bit(i, LOG, LANE_BITS, WARP_BITS)) & 1) != 0
                    trade = tl.where(high[:, None], a, b)
                    trade = _traded(trade, x_ptr, _bit(i, LOG, LANE_BITS, WARP_BITS), i < WARP_BITS, D, P)
                    a, b = tl.where(high[:, None], trade, a), tl.where(high[:, None], b, trade)
                    size_a = _products(a, a, P)
                    size_b = _products(b, b, P)
                if ((left & (left - 1)) != 0) & ((step & ((2 << i) - 1)) == (1 << i)):
                    b = _traded(b, x_ptr, _bit(LOG - 1 - i, LOG, LANE_BITS, WARP_BITS), LOG - 1 - i < WARP_BITS, D, P)
                    size_b = _products(b, b, P)
        tl.debug_barrier()
        tl.store(done_ptr, 1 - tl.max(rest, 0))
        tl.store(x_ptr + at, a, mask=mask)
        tl.store(x_ptr + P * D + at, b, mask=mask)


@triton.jit
def product_f64(
    a_ptr,
    stride_ai,
    stride_ak,
    b_ptr,
    stride_bk,
    stride_bj,
    first,
    D: tl.constexpr,
    N: tl.constexpr,
):
    """Columns from `first` on of the product of two D x D matrices in memory, a of any type and b float64, in float64:
    [N, min(N, 32)], zero past D."""
    BLOCK: tl.constexpr = min(N, 32)
    i = tl.arange(0, N)
    j = first + tl.arange(0, BLOCK)
    out = tl.zeros([N, BLOCK], dtype=tl.float64)
    for start in range(0, D, BLOCK):
        k = start + tl.arange(0, BLOCK)
        a_at = i[:, None] * stride_ai + k[None, :] * stride_ak
        a = tl.load(a_ptr + a_at, mask=(i < D)[:, None] & (k < D)[None, :], other=0.0).to(tl.float64)
        b_at = k[:, None] * stride_bk + j[None, :] * stride_bj
        b = tl.load(b_ptr + b_at, mask=(k < D)[:, None] & (j < D)[None, :], other=0.0)
        out = tl.dot(a, b, out, out_dtype=tl.float64)
    return out


@triton.jit
def _store_product_f64(out_ptr, a_ptr, stride_ai, stride_ak, b_ptr, stride_bk, stride_bj, D: tl.constexpr, N: tl.constexpr):
    """`product_f64` to memory (not theirs)."""
    BLOCK: tl.constexpr = min(N, 32)
    i = tl.arange(0, N)
    for first in range(0, N, BLOCK):
        j = first + tl.arange(0, BLOCK)
        x = product_f64(a_ptr, stride_ai, stride_ak, b_ptr, stride_bk, stride_bj, first, D, N)
        tl.store(out_ptr + i[:, None] * D + j[None, :], x, mask=(i < D)[:, None] & (j < D)[None, :])
    tl.debug_barrier()


@triton.jit
def _store_floored_f64(metric_ptr, out_ptr, FLOOR: tl.constexpr, D: tl.constexpr, N: tl.constexpr):
    """A metric [D, D] as `compress._floored` has it, to float64 memory."""
    BLOCK: tl.constexpr = min(N, 32)
    i = tl.arange(0, N)
    mean = tl.sum(tl.load(metric_ptr + i * (D + 1), mask=i < D, other=0.0).to(tl.float64), 0) / D
    factor = tl.where(mean > 0, 0.5 / tl.where(mean > 0, mean, 1.0), 0.0)
    for first in range(0, N, BLOCK):
        j = first + tl.arange(0, BLOCK)
        mask = (i < D)[:, None] & (j < D)[None, :]
        m = tl.load(metric_ptr + i[:, None] * D + j[None, :], mask=mask, other=0.0).to(tl.float64)
        m += tl.load(metric_ptr + j[None, :] * D + i[:, None], mask=mask, other=0.0).to(tl.float64)
        floor = tl.where(i[:, None] == j[None, :], tl.full([N, BLOCK], FLOOR, dtype=tl.float64), 0.0)
        tl.store(out_ptr + i[:, None] * D + j[None, :], m * factor + floor, mask=mask)
    tl.debug_barrier()


@triton.jit
def factorise_f64(a_ptr, ridge, D: tl.constexpr, N: tl.constexpr):
    """L of L L^T = a + ridge I in place of a, float64 [D, D] in memory, symmetric; zeros are left above the diagonal.
    Returns whether there is one, as an integer; else what is stored is of no use.

    16 columns at a time: less the part that the columns before them explain, then one by one.
    """
    i = tl.arange(0, N)
    k = tl.arange(0, 16)
    good = 1
    for first in range(0, D, 16):
        j = first + k
        mask = (i < D)[:, None] & (j < D)[None, :]
        part = tl.load(a_ptr + i[:, None] * D + j[None, :], mask=mask, other=0.0)
        part = tl.where(i[:, None] == j[None, :], part + ridge, part)
        for before in range(0, first, 16):
            left = tl.load(
                a_ptr + i[:, None] * D + (before + k)[None, :], mask=(i < D)[:, None] & (k >= 0)[None, :], other=0.0
            )
            right = tl.load(
                a_ptr + j[None, :] * D + (before + k)[:, None], mask=(j < D)[None, :] & (k >= 0)[:, None], other=0.0
            )
            part = tl.dot(-left, right, part, out_dtype=tl.float64)
        for c in range(0, 16):
            column = tl.sum(tl.where(k[None, :] == c, part, 0.0), 1)
            row = tl.sum(tl.where(i[:, None] == first + c, part, 0.0), 0)
            pivot = tl.sum(tl.where(k == c, row, 0.0), 0)
            pivot = tl.where(first + c < D, pivot, 1.0)
            good &= (pivot > 0).to(tl.int32)
            inverse = tl.rsqrt(pivot)
            column = tl.where(i >= first + c, column * inverse, 0.0)
            row = tl.where(k > c, row * inverse, 0.0)
            part = tl.where(k[None, :] == c, column[:, None], part - column[:, None] * row[None, :])
        tl.store(a_ptr + i[:, None] * D + j[None, :], part, mask=mask)
        tl.debug_barrier()
    return good


@triton.jit
def solve_f64(x_ptr, lower_ptr, M: tl.constexpr, D: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """x L^-1, or x L^-T if TRANSPOSED, in place of x, float64 [M, D] in memory; L: lower triangle, float64 [D, D]."""
    i = tl.arange(0, N)
    k = tl.arange(0, 16)
    panels: tl.constexpr = (D + 15) // 16
    for n in range(0, panels):
        first = 16 * (n if TRANSPOSED else panels - 1 - n)
        j = first + k
        mask = (i < M)[:, None] & (j < D)[None, :]
        part = tl.load(x_ptr + i[:, None] * D + j[None, :], mask=mask, other=0.0)
        for m in range(0, n):
            q = 16 * (m if TRANSPOSED else panels - 1 - m) + k
            left = tl.load(x_ptr + i[:, None] * D + q[None, :], mask=(i < M)[:, None] & (q < D)[None, :], other=0.0)
            at = j[None, :] * D + q[:, None] if TRANSPOSED else q[:, None] * D + j[None, :]
            right = tl.load(lower_ptr + at, mask=(j < D)[None, :] & (q < D)[:, None], other=0.0)
            part = tl.dot(-left, right, part, out_dtype=tl.float64)
        for step in tl.static_range(16):  # so that what the next ones load is on its way
            c = step if TRANSPOSED else 15 - step
            own = tl.minimum(first + c, D - 1)  # of columns past D, which are zero, anything
            inverse = 1.0 / tl.load(lower_ptr + own * (D + 1))
            column = tl.sum(tl.where(k[None, :] == c, part, 0.0), 1) * inverse
            at = j * D + own if TRANSPOSED else own * D + j
            row = tl.load(lower_ptr + at, mask=(k > c if TRANSPOSED else k < c) & (j < D), other=0.0)
            part = tl.where(k[None, :] == c, column[:, None], part - column[:, None] * row[None, :])
        tl.store(x_ptr + i[:, None] * D + j[None, :], part, mask=mask)
        tl.debug_barrier()


@triton.jit
def _places(x, N: tl.constexpr):
    """The place [N] of each number in falling order; NaN last, so that places are always a permutation."""
    i = tl.arange(0, N)
    x = tl.where(x == x, x, float("-inf"))
    first = (x[None, :] > x[:, None]) | ((x[None, :] == x[:, None]) & (i[None, :] < i[:, None]))
    return tl.sum(first.to(tl.int32), 1)


@triton.jit
def _weigh_kernel(
    moment_ptr,  # [D, D] a program
    metric_ptr,  # [D, D] a program
    lower_ptr,  # float64 [D, D] a program
    w_ptr,  # float64 [D, D] a program
    product_ptr,  # float64 [D, D] a program, scratch
    FLOOR: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
):
    """Of one moment G and metric L L^T: L, and L^T G L."""
    n = tl.program_id(0).to(tl.int64)
    lower_ptr += n * D * D
    product_ptr += n * D * D
    _store_floored_f64(metric_ptr + n * D * D, lower_ptr, FLOOR, D, N)
    factorise_f64(lower_ptr, 0.0, D, N)
    _store_product_f64(product_ptr, moment_ptr + n * D * D, D, 1, lower_ptr, D, 1, D, N)
    _store_product_f64(w_ptr + n * D * D, lower_ptr, 1, D, product_ptr, D, 1, D, N)


@triton.jit
def _roots_kernel(
    w_ptr,  # [D, D] a program
    root_ptr,  # float64 [D, D] a program, scratch
    order_ptr,  # int32 [D] a program
    rows_ptr,  # float32 [N, D] a program
    D: tl.constexpr,
    N: tl.constexpr,
    RIDGES: tl.constexpr,
):
    """Of one matrix W: rows X with X^T X = W + e I, its trace 1, its rows and columns in `order`."""
    BLOCK: tl.constexpr = min(N, 32)
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, N)
    w_ptr += n * D * D
    root_ptr += n * D * D
    order_ptr += n * D
    diagonal = tl.load(w_ptr + i * (D + 1), mask=i < D, other=0.0).to(tl.float64)
    trace = tl.sum(diagonal, 0)
    tl.store(order_ptr + _places(tl.where(i < D, diagonal, float("-inf")), N), i, mask=i < D)
    tl.debug_barrier()
    factor = tl.where(trace > 0, 0.5 / tl.where(trace > 0, trace, 1.0), 0.0)
    order = tl.load(order_ptr + i, mask=i < D, other=0)
    good = 0
    for attempt in tl.static_range(len(RIDGES)):
        if good == 0:
            for first in range(0, N, BLOCK):
                j = first + tl.arange(0, BLOCK)
                mask = (i < D)[:, None] & (j < D)[None, :]
                other = tl.load(order_ptr + j, mask=j < D, other=0)
                w = tl.load(w_ptr + order[:, None] * D + other[None, :], mask=mask, other=0.0).to(tl.float64)
                w += tl.load(w_ptr + other[None, :] * D + order[:, None], mask=mask, other=0.0).to(tl.float64)
                # The identity for a matrix of zeros.
                w = tl.where(trace > 0, w * factor, tl.where(i[:, None] == j[None, :], 1.0, 0.0))
                tl.store(root_ptr + i[:, None] * D + j[None, :], w, mask=mask)
            tl.debug_barrier()
            good = factorise_f64(root_ptr, RIDGES[attempt], D, N)
    for first in range(0, N, BLOCK):
        j = first + tl.arange(0, BLOCK)
        mask = (i < D)[:, None] & (j < D)[None, :]
        root = tl.load(root_ptr + i[:, None] * D + j[None, :], mask=mask, other=0.0)
        root = tl.where(good != 0, root, 0.0)
        tl.store(
            rows_ptr + n * N * D + j[None, :] * D + i[:, None],
            root.to(tl.float32),
            mask=(i < D)[:, None] & (j >= 0)[None, :],
        )


@triton.jit
def _orthonormal_kernel(
    rows_ptr,  # float32 [N, D] a program: what `_orthogonalise_kernel` made of `_roots_kernel`'s
    order_ptr,
    v_ptr,  # float64 [D, D] a program
    overlap_ptr,  # float64 [D, D] a program, scratch
    D: tl.constexpr,
    N: tl.constexpr,
):
    """V^T: eigenvectors of W by falling eigenvalue, as rows, orthonormal."""
    BLOCK: tl.constexpr = min(N, 32)
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, N)
    v_ptr += n * D * D
    overlap_ptr += n * D * D
    rows_ptr += n * N * D
    size = tl.zeros([N], dtype=tl.float64)
    for first in range(0, N, BLOCK):
        j = first + tl.arange(0, BLOCK)
        x = tl.load(rows_ptr + i[:, None] * D + j[None, :], mask=(i >= 0)[:, None] & (j < D)[None, :], other=0.0)
        size += tl.sum(x.to(tl.float64) * x.to(tl.float64), 1)
    place = _places(size, N)  # the rows of zeros last: others are as long as the ridge
    inverse = 1.0 / tl.sqrt(size)
    for first in range(0, N, BLOCK):
        j = first + tl.arange(0, BLOCK)
        x = tl.load(rows_ptr + i[:, None] * D + j[None, :], mask=(i >= 0)[:, None] & (j < D)[None, :], other=0.0)
        order = tl.load(order_ptr + n * D + j, mask=j < D, other=0)
        mask = (place < D)[:, None] & (j < D)[None, :]
        tl.store(v_ptr + place[:, None] * D + order[None, :], x.to(tl.float64) * inverse[:, None], mask=mask)
    tl.debug_barrier()
    # To first order, as Gram and Schmidt would: from each row its parts along the larger ones. A symmetric step would turn
    # the larger row as far as the smaller one, of which a rotation of rows that differ in size knows far less.
    # A step leaves about the squares of the overlaps: of a matrix of rank D/4, D = 96, three left 1.1e-11 on an H100.
    for _ in range(4):
        for first in range(0, N, BLOCK):
            j = first + tl.arange(0, BLOCK)
            x = product_f64(v_ptr, D, 1, v_ptr, 1, D, first, D, N)
            x = tl.where(i[:, None] == j[None, :], (x - 1.0) * 0.5, tl.where(i[:, None] > j[None, :], x, 0.0))
            tl.store(overlap_ptr + i[:, None] * D + j[None, :], x, mask=(i < D)[:, None] & (j < D)[None, :])
        tl.debug_barrier()
        for first in range(0, N, BLOCK):
            j = first + tl.arange(0, BLOCK)
            mask = (i < D)[:, None] & (j < D)[None, :]
            x = product_f64(overlap_ptr, D, 1, v_ptr, D, 1, first, D, N)
            x = tl.load(v_ptr + i[:, None] * D + j[None, :], mask=mask, other=0.0) - x
            tl.debug_barrier()  # these columns have been read
            tl.store(v_ptr + i[:, None] * D + j[None, :], x, mask=mask)
        tl.debug_barrier()


@triton.jit
def _basis_kernel(
    v_ptr,  # float64 [D, D] a program: V^T, used up
    lower_ptr,  # L, float64 [D, D] a program, or None
    out_ptr,  # [R, D] a program
    R: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """The first R rows of V^T L^-1. SIGNED: the entry of each row that is largest is positive."""
    BLOCK: tl.constexpr = min(N, 32)
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, N)
    v_ptr += n * D * D
    if lower_ptr is not None:
        solve_f64(v_ptr, lower_ptr + n * D * D, R, D, N, False)
    largest = tl.zeros([N], dtype=tl.float64)
    least = tl.zeros([N], dtype=tl.float64)
    if SIGNED:
        for first in range(0, N, BLOCK):
            j = first + tl.arange(0, BLOCK)
            x = tl.load(v_ptr + i[:, None] * D + j[None, :], mask=(i < R)[:, None] & (j < D)[None, :], other=0.0)
            largest = tl.maximum(largest, tl.max(x, 1))
            least = tl.minimum(least, tl.min(x, 1))
    for first in range(0, N, BLOCK):
        j = first + tl.arange(0, BLOCK)
        mask = (i < R)[:, None] & (j < D)[None, :]
        x = tl.load(v_ptr + i[:, None] * D + j[None, :], mask=mask, other=0.0)
        x = tl.where((largest < -least)[:, None], -x, x)
        tl.store(out_ptr + n * R * D + i[:, None] * D + j[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


def sizes_f64(dim: int, device: torch.device) -> dict[str, int]:
    """How a program holds D x D matrices: N rows, of which those past D are zero; its warps and stages."""
    warps = 8 if dim > 64 else 4
    if dim > 32 and _launch.has_tensor_memory(device):
        warps = 16  # Triton 3.6 would have 4 or 8 warps multiply float64 in tensor memory, and fails
    return {"N": max(16, _launch.next_power_of_2(dim)), "num_warps": warps, "num_stages": 1}


def _orthogonalise(rows: torch.Tensor) -> None:
    """Rotate the rows of each matrix, float32 [count, N, D] (see `sizes_f64`), contiguous, in place, in any order."""
    count, pairs, dim = rows.shape[0], rows.shape[1] // 2, rows.shape[2]
    options = {"num_warps": 4}
    if dim > 64:
        # Of few matrices each has a multiprocessor of its own, of many two share one.
        few = count <= _launch.multiprocessors(rows.device)
        options = {"num_warps": 8} if few else {"num_warps": 8, "maxnreg": 128}
    part = min(32, rows.shape[1])  # of a row, which threads of four columns share
    done = torch.zeros(count, dtype=torch.int32, device=rows.device)
    with torch.cuda.device_of(rows):
        for _ in range(SWEEPS):
            _orthogonalise_kernel[(count,)](
                rows,
                done,
                D=dim,
                P=pairs,
                LOG=pairs.bit_length() - 1,
                C=part,
                LANE_BITS=(128 // part).bit_length() - 1,
                WARP_BITS=options["num_warps"].bit_length() - 1,
                SMALL=SMALL,
                **options,
            )


def has_kernels(x: torch.Tensor, dim: int) -> bool:
    """Whether D x D matrices are worked on by kernels where x is: on CUDA cards from sm_80 on with D up to 128."""
    return dim <= 128 and _launch.runs_kernel(x) and _launch.has_matrix_units(x.device)


def _weighted_eigenvectors(
    moment: torch.Tensor, metric: torch.Tensor | None, *, floor: float, rank: int, signed: bool, dtype: torch.dtype
) -> torch.Tensor:
    """By kernels: V^T L^-1, the first R rows, where V are eigenvectors of L^T G L by falling eigenvalue.

    Args:
        moment: G, symmetric, [..., D, D].      metric: like it, broadcastable, or None: L is the identity.
        floor: L L^T is the metric, symmetric, scaled to a mean eigenvalue of 1, with this added to its diagonal.
        signed: make the largest entry of each row positive.
    Returns:
        `dtype` [..., R, D], contiguous.
    """
    dim, count = moment.shape[-1], moment.shape[:-2].numel()
    out = torch.empty((*moment.shape[:-2], rank, dim), dtype=dtype, device=moment.device)
    if out.numel() == 0:
        return out
    same = {"D": dim, **sizes_f64(dim, moment.device)}
    w = moment.contiguous()
    first, second, lower = torch.empty((3, count, dim, dim), dtype=torch.float64, device=moment.device)
    rows = torch.empty((count, same["N"], dim), dtype=torch.float32, device=moment.device)
    order = torch.empty((count, dim), dtype=torch.int32, device=moment.device)
    grid = (count,)
    with torch.cuda.device_of(moment):
        if metric is not None:
            _weigh_kernel[grid](w, metric.expand(moment.shape).contiguous(), lower, first, second, FLOOR=floor, **same)
            w = first
        _roots_kernel[grid](w, second, order, rows, RIDGES=RIDGES, **same)
        _orthogonalise(rows)
        _orthonormal_kernel[grid](rows, order, first, second, **same)
        _basis_kernel[grid](first, None if metric is None else lower, out, R=rank, SIGNED=signed, **same)
    return out


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
    if not has_kernels(matrices, dim):
        return eigenvectors_torch(matrices)
    return _weighted_eigenvectors(matrices, None, floor=0.0, rank=dim, signed=False, dtype=torch.float64)


def eigenvectors_torch(matrices: torch.Tensor) -> torch.Tensor:
    """`eigenvectors` in plain PyTorch."""
    return torch.linalg.eigh((matrices + matrices.mT) / 2).eigenvectors.mT.flip(-2)
