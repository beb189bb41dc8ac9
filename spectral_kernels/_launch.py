"""Where a call runs, and the few jit helpers that every kernel shares."""

import torch
import triton
import triton.language as tl

# Tests set this with TRITON_INTERPRET=1 to run kernels on CPU tensors in Triton's interpreter; else CPU means the twin.
KERNELS_ON_CPU = False


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. (Triton's own is for kernels; called by the host it takes ten times as long.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def runs_kernel(x: torch.Tensor) -> bool:
    """Whether a launcher starts its Triton kernel for this tensor (else it calls its plain-PyTorch twin)."""
    return x.is_cuda or (KERNELS_ON_CPU and x.device.type == "cpu")


def is_native(x: torch.Tensor) -> bool:
    """Whether kernels on this tensor may use inline assembly and bf16: on a GPU, not in the interpreter."""
    return x.is_cuda


def has_matrix_units(device: torch.device) -> bool:
    """Whether Triton reaches matrix units there: from sm_80 (its sm_75 `tl.dot` unrolls into scalar code)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def has_large_shared_memory(device: torch.device) -> bool:
    """Whether a program may use 227 KB of shared memory (sm_90, 100), not 163 (80), 99 (86, 89, 120) or 64 (75)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


# Whether launches overlap where they can; perf times each kernel by itself without.
OVERLAP = True


def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel may start before the one ahead of it has ended (programmatic dependent launch): from sm_90."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def has_tensor_memory(device: torch.device) -> bool:
    """Whether matrix units keep their sums in a memory of their own (sm_100)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10


def check_bf16(name: str, x: torch.Tensor) -> None:
    """Cards before sm_80 have no bf16 arithmetic: convert such inputs to fp16 or fp32.

    Raises:
        TypeError: x is bf16 on such a card.
    """
    if x.dtype == torch.bfloat16 and not has_matrix_units(x.device):
        raise TypeError(f"{name}: expected fp16 or fp32 on a card before sm_80, got {x.dtype}")


def multiprocessors(device: torch.device) -> int:
    """How many there are; 1 where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _bf16_parts(x):
    """Three bf16 numbers whose sum is float32 x, largest first."""
    first = x.to(tl.bfloat16)
    rest = x - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    return first, second, (rest - second.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def dot_f32(a, b, MATRIX: tl.constexpr, NATIVE: tl.constexpr = False):
    """float32 a [.., M, K] @ b [.., K, N] in float32 accuracy, or multiply and sum.

    b float32: three tf32 products (a + a_lo)(b + b_lo). 16-bit floats are exact in tf32: two products; bf16 where it has
    arithmetic (NATIVE): a is the sum of three bf16 parts.
    """
    if MATRIX and NATIVE and b.dtype == tl.bfloat16:
        a1, a2, a3 = _bf16_parts(a)
        out = tl.dot(a3, b)
        out = tl.dot(a2, b, out)
        out = tl.dot(a1, b, out)
    elif MATRIX and b.dtype != tl.float32:
        top = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # what tf32 keeps of a
        b = b.to(tl.float32)
        out = tl.dot(a - top, b, input_precision="tf32")
        out = tl.dot(top, b, out, input_precision="tf32")
    elif MATRIX:
        out = tl.dot(a, b, input_precision="tf32x3")
    else:
        b = b.to(tl.float32)
        # fma, as Triton rewrites a sum of products of this shape to a tf32 dot.
        if len(a.shape) == 3:
            a3, b3 = tl.broadcast(a[:, :, :, None], b[:, None, :, :])
        else:
            a3, b3 = tl.broadcast(a[:, :, None], b[None, :, :])
        out = tl.sum(tl.fma(a3, b3, tl.zeros(a3.shape, dtype=tl.float32)), len(a.shape) - 1)
    return out


@triton.jit
def dot_int8_f32(a, b, MATRIX: tl.constexpr, NATIVE: tl.constexpr):
    """int8 a [M, K] @ float32 b [K, N] in float32 accuracy: int8 is exact in bf16, and b is the sum of three bf16 parts.

    Half the registers of `dot_f32`. Not NATIVE: the interpreter's bf16 arithmetic is wrong.
    """
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
def cos_sin(distance, turns, FAST: tl.constexpr = False):
    """Cosine and sine of distance * turns * 2**-64 full turns, float32; distance and turns broadcast, int64.

    The product wraps modulo one turn exactly. Its top two bits, rounded, are quarter turns; the rest is an angle of at most
    pi/4, where Taylor's polynomials are good to 3e-8. (libdevice's sine has a slow path for large angles, in local memory.)
    FAST: the special-function unit, good to 2**-20; not in the interpreter.
    """
    return cos_sin_of_phase(((distance * turns) >> 32).to(tl.int32), FAST)


@triton.jit
def phase_of(position, turns):
    """position * turns * 2**-64 full turns, as int32 counts of 2**-32 turns; position int32, not negative."""
    low = tl.umulhi(position.to(tl.uint32), (turns & 0xFFFFFFFF).to(tl.uint32)).to(tl.int32, bitcast=True)
    return position * (turns >> 32).to(tl.int32) + low


@triton.jit
def cos_sin_of_phase(phase, FAST: tl.constexpr):
    """`cos_sin` of int32 counts of 2**-32 turns."""
    if FAST:
        angle = phase.to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2**32
        c = tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        s = tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
    else:
        quarter = ((phase >> 29) + 1) >> 1  # -2 .. 2
        x = (phase - (quarter << 30)).to(tl.float32) * 1.4629180792671596e-09
        y = x * x
        sin = x + x * y * (-1.6666667e-1 + y * (8.3333333e-3 + y * (-1.9841270e-4 + y * 2.7557319e-6)))
        cos = 1.0 + y * (-0.5 + y * (4.1666667e-2 + y * (-1.3888889e-3 + y * 2.4801587e-5)))
        odd = (quarter & 1) != 0
        half = (quarter & 2) != 0
        c = tl.where(odd, -sin, cos)
        s = tl.where(odd, cos, sin)
        c = tl.where(half, -c, c)
        s = tl.where(half, -s, s)
    return c, s
