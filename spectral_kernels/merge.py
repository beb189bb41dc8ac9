"""Merge attention states computed over disjoint sets of keys.

A state is (o, lse): the normalised output of attention over a set of keys and the natural-log
log-sum-exp of its scaled scores; the empty set is (0, -inf). For sets i with states (o_i, lse_i)

    lse = log sum_i exp(lse_i)          o = sum_i exp(lse_i - lse) o_i

which is associative and commutative up to rounding, with the empty state as its neutral element.

Source: Milakov and Gimelshein, Online normalizer calculation for softmax (2018); FlashInfer's
attention states.
Oracle: reference/merge.py.   Test: tests/test_merge.py.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._checks import FLOATS, check_output, check_tensor


@triton.jit
def _merge_states_kernel(
    o_a_ptr, lse_a_ptr, o_b_ptr, lse_b_ptr, o_ptr, lse_ptr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    lse_a = tl.load(lse_a_ptr + row)
    lse_b = tl.load(lse_b_ptr + row)
    top = tl.maximum(lse_a, lse_b)
    # Both empty: exp(-inf - 0) = 0, not exp(-inf + inf) = NaN.
    top = tl.where(top == float("-inf"), 0.0, top)
    w_a = tl.exp(lse_a - top)
    w_b = tl.exp(lse_b - top)
    total = w_a + w_b
    o_a = tl.load(o_a_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    o_b = tl.load(o_b_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    o = tl.where(total == 0.0, 0.0, (w_a * o_a + w_b * o_b) / total)
    tl.store(o_ptr + row * D + d, o, mask=d < D)
    tl.store(lse_ptr + row, top + tl.log(total))  # log(0) = -inf: an empty state


def _check_state(
    names: tuple[str, str], o: torch.Tensor, lse: torch.Tensor, shape: torch.Size | None = None
) -> None:
    check_tensor(names[0], o, shape=shape, dtype=FLOATS, contiguous=True)
    if o.dim() < 2:
        raise ValueError(f"{names[0]}: expected shape [..., D], got {list(o.shape)}")
    check_tensor(
        names[1], lse, shape=o.shape[:-1], dtype=torch.float32, device=o.device, contiguous=True
    )


def merge_states(
    o_a: torch.Tensor,
    lse_a: torch.Tensor,
    o_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join two states over disjoint sets of keys.

    Args:
        o_a, o_b: [..., D] normalised outputs, fp16, bf16 or fp32, contiguous, of one shape (dtypes
            may differ).
        lse_a, lse_b: float32 [...], natural log, contiguous; -inf marks an empty set (its o must be
            finite, such as 0).
        out, lse: where to write, contiguous; `out` of any float dtype. May be the inputs
            themselves.
    Returns:
        (out [..., D], in the dtype of o_a unless `out` is given, lse float32 [...]). Float32
        arithmetic.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    _check_state(("o_a", "lse_a"), o_a, lse_a)
    check_tensor("o_b", o_b, device=o_a.device)
    _check_state(("o_b", "lse_b"), o_b, lse_b, o_a.shape)
    out = check_output("out", torch.empty_like(o_a) if out is None else out, o_a, o_a.shape, FLOATS)
    lse = check_output("lse", lse, o_a, o_a.shape[:-1])
    if not _launch.runs_kernel(o_a):
        o, total = merge_states_torch(o_a, lse_a, o_b, lse_b)
        return out.copy_(o), lse.copy_(total)
    if lse.numel():
        dim = o_a.shape[-1]
        with torch.cuda.device_of(o_a):
            _merge_states_kernel[(lse.numel(),)](
                o_a, lse_a, o_b, lse_b, out, lse, D=dim, BLOCK_D=_launch.next_power_of_2(dim),
                num_warps=1,
            )  # fmt: skip
    return out, lse


def merge_states_torch(
    o_a: torch.Tensor, lse_a: torch.Tensor, o_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`merge_states` in plain PyTorch (without `out` and `lse`)."""
    o = torch.stack((o_a.float(), o_b.float()), dim=-2)
    o, lse = merge_many_states_torch(o, torch.stack((lse_a, lse_b), dim=-1))
    return o.to(o_a.dtype), lse


@triton.jit(do_not_specialize=["N"])
def _merge_many_states_kernel(
    o_ptr, lse_in_ptr, out_ptr, lse_ptr, N, D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    top = tl.full([], float("-inf"), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        lse = tl.load(lse_in_ptr + row * N + n, mask=n < N, other=float("-inf"))
        top = tl.maximum(top, tl.max(lse, 0))
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.full([], 0.0, dtype=tl.float32)
    o = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        lse = tl.load(lse_in_ptr + row * N + n, mask=n < N, other=float("-inf"))
        w = tl.exp(lse - top)  # [BLOCK_N]
        total += tl.sum(w, 0)
        # A weight of zero must not multiply what an empty split never wrote.
        mask = (w > 0.0)[:, None] & (d < D)[None, :]
        x = tl.load(o_ptr + (row * N + n)[:, None] * D + d[None, :], mask=mask, other=0.0)
        o += tl.sum(w[:, None] * x.to(tl.float32), 0)
    o = tl.where(total == 0.0, 0.0, o / total)
    tl.store(out_ptr + row * D + d, o, mask=d < D)
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + row, top + tl.log(total))


def merge_many_states(
    o: torch.Tensor,
    lse: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join N states over disjoint sets of keys.

    Args:
        o: [..., N, D] normalised outputs, fp16, bf16 or fp32, contiguous; rows whose lse is -inf
            are not read.
        lse: float32 [..., N], natural log, contiguous.
        out, out_lse: where to write ([..., D] of any float dtype; float32 [...]), contiguous.
    Returns:
        (out [..., D] in the dtype of o unless `out` is given, out_lse float32 [...]); N = 0 gives
        the empty state. Float32 arithmetic, in the order of N: the same bits for the same inputs.
    Raises:
        TypeError, ValueError: an argument is not as above; nothing was launched.
    """
    _check_state(("o", "lse"), o, lse)
    if o.dim() < 3:
        raise ValueError(f"o: expected shape [..., N, D], got {list(o.shape)}")
    shape = (*o.shape[:-2], o.shape[-1])
    out = check_output("out", o.new_empty(shape) if out is None else out, o, shape, FLOATS)
    out_lse = check_output("out_lse", out_lse, o, shape[:-1])
    if not _launch.runs_kernel(o):
        merged, total = merge_many_states_torch(o, lse)
        return out.copy_(merged), out_lse.copy_(total)
    if out_lse.numel():
        dim, n = o.shape[-1], o.shape[-2]
        block_d = min(64, _launch.next_power_of_2(dim))
        with torch.cuda.device_of(o):
            _merge_many_states_kernel[(out_lse.numel(), _launch.cdiv(dim, block_d))](
                o, lse, out, out_lse, n, D=dim, BLOCK_N=32, BLOCK_D=block_d, num_warps=4
            )
    return out, out_lse


def merge_many_states_torch(
    o: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`merge_many_states` in plain PyTorch (without `out` and `out_lse`)."""
    if lse.shape[-1] == 0:
        return o.new_zeros(*o.shape[:-2], o.shape[-1]), lse.new_full(lse.shape[:-1], float("-inf"))
    total = torch.logsumexp(lse, dim=-1)
    weights = torch.where(lse == float("-inf"), 0.0, (lse - total[..., None]).exp())[..., None]
    values = torch.where(weights > 0, o.float(), 0.0)
    return (weights * values).sum(dim=-2).to(o.dtype), total
