"""Where a call runs, and the few jit helpers that every kernel shares."""

import torch
import triton
import triton.language as tl

# Tests set this with TRITON_INTERPRET=1 to run kernels on CPU tensors in Triton's interpreter; else CPU means the twin.
KERNELS_ON_CPU = False


def runs_kernel(x: torch.Tensor) -> bool:
    """Whether a launcher starts its Triton kernel for this tensor (else it calls its plain-PyTorch twin)."""
    return x.is_cuda or (KERNELS_ON_CPU and x.device.type == "cpu")


def has_matrix_units(device: torch.device) -> bool:
    """Whether Triton reaches matrix units there: from sm_80 (its sm_75 `tl.dot` unrolls into scalar code). Cached by torch."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@triton.jit
def dot_f32(a, b, MATRIX: tl.constexpr):
    """a [M, K] @ b [K, N] in float32 accuracy: three tf32 products (a + a_lo)(b + b_lo), or multiply and sum."""
    if MATRIX:
        out = tl.dot(a, b, input_precision="tf32x3")
    else:
        out = tl.sum(a[:, :, None] * b[None, :, :], 1)
    return out


@triton.jit
def cos_sin(distance, turns):
    """Cosine and sine of distance * turns * 2**-64 full turns, float32; distance and turns broadcast, int64.

    The product wraps modulo one turn exactly; its upper 32 bits, read as signed, are the angle in (-1/2, 1/2] turn.
    """
    phase = ((distance * turns) >> 32).to(tl.int32)
    angle = phase.to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2**32
    return tl.cos(angle), tl.sin(angle)
