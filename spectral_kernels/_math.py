"""Arithmetic that kernels share: float32 products on matrix units, sines of exact phases, a split's
share of a row, its log-sum-exp."""

import math

import triton
import triton.language as tl

FULL = tl.constexpr(32512.0)  # 127 * 256: the largest number that is split in two int8
TINY = tl.constexpr(1e-34)  # FULL over less overflows
LOG2_FULL = tl.constexpr(math.log2(127 * 256))
LN_2 = tl.constexpr(math.log(2))
RADIANS = tl.constexpr(2 * math.pi / 2**32)  # of 2**-32 turns
# 1.5 * 2**23 + 128: adding it to a number within +-32512 leaves the rounded integer + 128 in a
# float's low bits.
ROUND_TO_LOW_BITS = tl.constexpr(12583040.0)
# PTX: of four such floats, the high bytes of the integers, and the low bytes.
HIGH_AND_LOW = tl.constexpr("""{ .reg .b32 a, b;
    prmt.b32 a, $2, $3, 0x5140;
    prmt.b32 b, $4, $5, 0x5140;
    prmt.b32 $0, a, b, 0x7632;
    prmt.b32 a, a, b, 0x5410;
    xor.b32 $1, a, 0x80808080; }""")
LITTLE = tl.constexpr(24)  # pages: a program's start and end take as long


@triton.jit
def _bf16_parts(x):
    """Three bf16 numbers whose sum is float32 x, largest first."""
    first = x.to(tl.bfloat16)
    rest = x - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    return first, second, (rest - second.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def dot_f32(a, b, MATRIX: tl.constexpr, NATIVE: tl.constexpr = False):
    """float32 a [M, K] @ b [K, N] in float32 accuracy, or multiply and sum.

    b float32: three tf32 products (a + a_lo)(b + b_lo). 16-bit floats are exact in tf32: two
    products; bf16 where it has arithmetic (NATIVE): a is the sum of three bf16 parts.
    """
    if MATRIX and NATIVE and b.dtype == tl.bfloat16:
        a1, a2, a3 = _bf16_parts(a)
        out = tl.dot(a3, b)
        out = tl.dot(a2, b, out)
        out = tl.dot(a1, b, out)
    elif MATRIX and b.dtype != tl.float32:
        kept = a.to(tl.int32, bitcast=True) & -8192  # what tf32 keeps of a
        top = kept.to(tl.float32, bitcast=True)
        b = b.to(tl.float32)
        out = tl.dot(a - top, b, input_precision="tf32")
        out = tl.dot(top, b, out, input_precision="tf32")
    elif MATRIX:
        out = tl.dot(a, b, input_precision="tf32x3")
    else:
        b = b.to(tl.float32)
        # fma, as Triton rewrites a sum of products of this shape to a tf32 dot.
        a3, b3 = tl.broadcast(a[:, :, None], b[None, :, :])
        out = tl.sum(tl.fma(a3, b3, tl.zeros(a3.shape, dtype=tl.float32)), 1)
    return out


@triton.jit
def dot_int8_f32(a, b, MATRIX: tl.constexpr, NATIVE: tl.constexpr):
    """int8 a [M, K] @ float32 b [K, N] in float32 accuracy: int8 is exact in bf16, b the sum of
    three bf16 parts. Half the registers of `dot_f32`. Not NATIVE: the interpreter's bf16 arithmetic
    is wrong."""
    if MATRIX and NATIVE:
        a16 = a.to(tl.bfloat16)
        b1, b2, b3 = _bf16_parts(b)
        out = tl.dot(a16, b3)
        out = tl.dot(a16, b2, out)
        out = tl.dot(a16, b1, out)
    else:
        out = dot_f32(a.to(tl.float32), b, MATRIX)
    return out


@triton.jit
def cos_sin(distance, freqs, FAST: tl.constexpr = False):
    """Cosine and sine of distance * freqs * 2**-64 turns, float32; distance and freqs broadcast,
    int64.

    The product wraps modulo one turn exactly. Its top two bits, rounded, are quarter turns; the
    rest is an angle of at most pi/4, where Taylor's polynomials are good to 3e-8. (libdevice's sine
    has a slow path for large angles, in local memory.) FAST: the special-function unit, good to
    2**-20; not in the interpreter."""
    return cos_sin_of_phase(((distance * freqs) >> 32).to(tl.int32), FAST)


@triton.jit
def cos_sin_of_phase(phase, FAST: tl.constexpr):
    """`cos_sin` of int32 counts of 2**-32 turns."""
    if FAST:
        angle = phase.to(tl.float32) * RADIANS
        c = tl.inline_asm_elementwise(
            "cos.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1
        )
        s = tl.inline_asm_elementwise(
            "sin.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1
        )
    else:
        quarter = ((phase >> 29) + 1) >> 1  # -2 .. 2
        x = (phase - (quarter << 30)).to(tl.float32) * RADIANS
        y = x * x
        sin = x + x * y * (
            -1.6666667e-1 + y * (8.3333333e-3 + y * (-1.9841270e-4 + y * 2.7557319e-6))
        )
        cos = 1.0 + y * (-0.5 + y * (4.1666667e-2 + y * (-1.3888889e-3 + y * 2.4801587e-5)))
        odd = (quarter & 1) != 0
        half = (quarter & 2) != 0
        c = tl.where(odd, -sin, cos)
        s = tl.where(odd, cos, sin)
        c = tl.where(half, -c, c)
        s = tl.where(half, -s, s)
    return c, s


@triton.jit
def row_of(ids_ptr, b, default):
    """ids[b], int64; `default` where there are no ids."""
    row = default
    if ids_ptr is not None:
        row = tl.load(ids_ptr + b).to(tl.int64)
    return row


@triton.jit
def _pages_of(seq_len, SINKS: tl.constexpr, WINDOW: tl.constexpr):
    """(pages of a row that are attended, the end of the positions that they are attended for)."""
    stop = tl.maximum(seq_len - WINDOW, 0)
    return tl.where(stop > SINKS, tl.cdiv(stop, 64), 0), stop


@triton.jit
def row_splits(
    seq_lens_ptr,
    B,
    programs,
    EXACT: tl.constexpr,  # (SINKS, WINDOW, ..)
    TURN: tl.constexpr,
    FEW: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Splits of every row's pages, [BLOCK_B]: the programs, of six only FEW where these take fewer
    pages than LITTLE, shared out by turns of TURN pages. A row with pages has one at least, so that
    all are below programs + B."""
    b = tl.arange(0, BLOCK_B)
    seq_lens = tl.load(seq_lens_ptr + b, mask=b < B, other=0)
    pages, _ = _pages_of(seq_lens, EXACT[0], EXACT[1])
    turns = tl.cdiv(pages, TURN)
    total = tl.sum(turns, 0)
    little = total * TURN < LITTLE * programs
    programs = tl.where(little, tl.maximum(programs * FEW // 6, 1), programs)
    splits = turns * programs // tl.maximum(total, 1)
    return tl.minimum(tl.maximum(splits, 1), turns)


@triton.jit
def row_of_program(splits, program, B, BLOCK_B: tl.constexpr):
    """(row int64, split of it, its splits) of a program of all rows' (`row_splits`), which stand
    one after another; where there are not as many, the last row and no splits."""
    b = tl.arange(0, BLOCK_B)
    row = tl.sum((tl.cumsum(splits, 0) <= program).to(tl.int32), 0)
    split = program - tl.sum(tl.where(b < row, splits, 0), 0)
    splits = tl.sum(tl.where(b == row, splits, 0), 0)
    return tl.minimum(row, B - 1).to(tl.int64), split, splits


@triton.jit
def row_share(
    seq_len, split, splits, SINKS: tl.constexpr, WINDOW: tl.constexpr, TURN: tl.constexpr
):
    """(first page of a split, its end, the end of the positions that pages are attended for): whole
    turns of TURN pages, shared out evenly."""
    pages, stop = _pages_of(seq_len, SINKS, WINDOW)
    share = tl.cdiv(tl.cdiv(pages, TURN), splits) * TURN
    return split * share, tl.minimum(split * share + share, pages), stop


@triton.jit
def natural_lse(m, l):
    """Natural-log log-sum-exp of scores in log2 units whose largest is m; l: the sum of weights in
    units of 1 / FULL. NaN stays NaN."""
    return tl.where(l == 0.0, float("-inf"), (m - LOG2_FULL) * LN_2 + tl.log(l))
