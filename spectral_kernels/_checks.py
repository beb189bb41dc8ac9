"""Argument checks that read host metadata only (shapes, dtypes, devices), so that no launch ever
waits for the device."""

from collections.abc import Sequence
from typing import Any

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_tensor(
    name: str,
    value: Any,
    *,
    shape: Sequence[int | None] | None = None,
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
    unit_stride: bool = False,
    contiguous: bool = False,
) -> None:
    """Raise TypeError or ValueError naming the argument, what was expected and what came.

    `shape` may hold None for any size. `unit_stride` asks for a last dimension that is contiguous
    in memory."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if dtype is not None:
        allowed = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
        if value.dtype not in allowed:
            raise TypeError(
                f"{name}: expected dtype {' or '.join(map(str, allowed))}, got {value.dtype}"
            )
    if shape is not None and (
        value.dim() != len(shape)
        or any(e is not None and e != s for e, s in zip(shape, value.shape, strict=True))
    ):
        wanted = "[" + ", ".join("any" if e is None else str(e) for e in shape) + "]"
        raise ValueError(f"{name}: expected shape {wanted}, got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
    last = value.shape[-1] if value.dim() and value.numel() else 0
    if unit_stride and last > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected a last dimension of stride 1, got strides {list(value.stride())}"
        )
    if contiguous and not value.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor, got strides {list(value.stride())}"
        )


def check_output(
    name: str,
    value: torch.Tensor | None,
    like: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype | Sequence[torch.dtype] = torch.float32,
) -> torch.Tensor:
    """The caller's output, checked, or a new float32 one of `shape` on the device of `like`."""
    if value is None:
        return torch.empty(tuple(shape), dtype=torch.float32, device=like.device)
    check_tensor(name, value, shape=shape, dtype=dtype, device=like.device, contiguous=True)
    return value


def check_lens(seq_lens: torch.Tensor, batch: int, device: torch.device) -> None:
    """int32 [batch]."""
    i32 = torch.int32
    check_tensor("seq_lens", seq_lens, shape=(batch,), dtype=i32, device=device, contiguous=True)


def check_ids(batch: int, device: torch.device, **ids: torch.Tensor | None) -> None:
    """name=ids of every row: int32 [batch], or None."""
    for name, x in ids.items():
        if x is not None:
            check_tensor(name, x, shape=(batch,), dtype=torch.int32, device=device, contiguous=True)


def check_least(**values: tuple[int, int]) -> None:
    """name=(value, least): integers, none below its least one."""
    for name, (value, least) in values.items():
        if not hasattr(value, "__index__"):
            raise TypeError(f"{name}: expected an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_counts(**counts: int | None) -> None:
    """name=count: None, or an integer of at least 1."""
    for name, count in counts.items():
        if count is not None and not (isinstance(count, int) and count > 0):
            raise ValueError(f"{name}: expected an integer of at least 1, got {count!r}")


def check_in(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {list(allowed)}, got {value!r}")
