"""Where a call runs, and what its device has."""

import torch

# Tests set this with TRITON_INTERPRET=1 to run kernels on CPU tensors in Triton's interpreter; else
# CPU means the twin.
KERNELS_ON_CPU = False


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. (Triton's own is for kernels; called by the host it takes ten times as
    long.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def runs_kernel(x: torch.Tensor) -> bool:
    """Whether a launcher starts its Triton kernel for this tensor (else it calls its plain-PyTorch
    twin)."""
    return x.is_cuda or (KERNELS_ON_CPU and x.device.type == "cpu")


def is_native(x: torch.Tensor) -> bool:
    """Whether kernels on this tensor may use inline assembly and bf16: on a GPU, not in the
    interpreter."""
    return x.is_cuda


def has_matrix_units(device: torch.device) -> bool:
    """Whether Triton reaches matrix units there: from sm_80 (its sm_75 `tl.dot` unrolls into scalar
    code)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel may start before the one ahead of it has ended (programmatic dependent
    launch): from sm_90."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def check_bf16(name: str, x: torch.Tensor) -> None:
    """Cards before sm_80 have no bf16 arithmetic: convert such inputs to fp16 or fp32.

    Raises:
        TypeError: x is bf16 on such a card.
    """
    if x.dtype == torch.bfloat16 and not has_matrix_units(x.device):
        raise TypeError(f"{name}: expected fp16 or fp32 on a card before sm_80, got {x.dtype}")


def multiprocessors(device: torch.device) -> int:
    """How many there are; 1 where there is no GPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
