"""The lossless limit: R = D in 16-bit bands with the identity as basis is dense attention, but for one rounding of
keys.

Whole path: phase_align, encode, attend_spectral, against attention over the keys before RoPE in float64. On random
tensors, and on real ones where shared/data lies beside the repository.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from reference import attention as oracle
from reference import rope as rope_oracle
from spectral_kernels import attention, compress, rope
from spectral_kernels.pages import Bands as PageBands
from spectral_kernels.pages import PageLayout, allocate_pages
from tests import budgets
from tests.cases import DEVICE, DTYPES, F64, IMPLEMENTATIONS, inverse_frequencies, operation, rope_of, to_numpy

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "qwen2.5-coder-1.5b-kv.safetensors"


def attend_losslessly(
    implementation: str, q: torch.Tensor, at: F64, k: torch.Tensor, v: torch.Tensor, inv_freq: np.ndarray, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, Q, D] over all of k, v [B, G, T, D] (before RoPE, positions 0 .. T-1) by 16-bit pages of full rank."""
    batch, heads, tokens, dim = k.shape
    bands, rotary, dtype = PageBands.parse(f"{dim}x16"), rope_of(inv_freq), k.dtype
    chunks = -(-tokens // chunk)
    pages = allocate_pages(
        PageLayout(bands, bands, dim, chunk),
        pages=batch * chunks,
        segments=1,
        kv_heads=heads,
        batch=batch,
        max_chunks=chunks,
        device=DEVICE,
    )
    pages.k_basis[:] = pages.v_basis[:] = torch.eye(dim, dtype=torch.int8, device=DEVICE)
    pages.k_scale[:] = pages.v_scale[:] = 1.0
    pages.page_table[:] = torch.arange(batch * chunks, dtype=torch.int32, device=DEVICE).reshape(batch, chunks)
    pages.lengths[:] = tokens
    positions = torch.arange(tokens, device=DEVICE).expand(batch, tokens)
    aligned = operation(rope, "phase_align", implementation, dtype)(k, positions, rotary, chunk=chunk)
    identity = torch.eye(dim, device=DEVICE).expand(batch, heads, dim, dim).contiguous()
    run = operation(compress, "encode", implementation, dtype)
    for x, side in ((aligned, "k"), (v, "v")):
        whole = torch.nn.functional.pad(x, (0, 0, 0, chunks * chunk - tokens), value=float("nan"))
        run(whole, identity, bands, pages.k_pages if side == "k" else pages.v_pages, pages.page_table, side=side)
    run = operation(attention, "attend_spectral", implementation, q.dtype)
    return run(q, torch.from_numpy(at).to(DEVICE), pages, rotary)


def rounding_budget(q: F64, expected: oracle.State, k: F64, inv_freq: np.ndarray, dtype: torch.dtype) -> tuple[F64, F64]:
    """(of o, of lse) when each phase-aligned key is rounded once to `dtype` and once to fp16, and each value to
    fp16."""
    unit = budgets.U[dtype] * (dtype != torch.float32) + budgets.U[torch.float16]
    if dtype == torch.float16:
        unit = budgets.U[torch.float16]  # the second rounding changes nothing
    keys, size = rope_oracle.pair_magnitude(k, inv_freq), rope_oracle.pair_magnitude(q, inv_freq)
    group = q.shape[1] // k.shape[1]
    score = np.stack([size[:, h] @ keys[:, h // group].mT for h in range(q.shape[1])], axis=1) * q.shape[-1] ** -0.5
    value = 0.0 if dtype == torch.float16 else budgets.U[torch.float16]
    dim = q.shape[-1]
    floats = 2 * budgets.ANGLE + 2 * budgets.PRODUCT + (10 + dim) * budgets.ACC
    added = budgets.PRODUCT + (budgets.TILE + expected.scores.shape[-1] // 32 + dim + 12) * budgets.ACC
    return budgets.state(expected, score * (unit + floats), (value + added) * expected.magnitude)


def dense_in_dtype(q: F64, at: np.ndarray, k: F64, v: F64, inv_freq: np.ndarray, dtype: torch.dtype) -> F64:
    """What a model does without us: rotated queries and keys, weights and output rounded to its dtype, sums exact."""

    def rounded(x: F64) -> F64:
        return to_numpy(torch.from_numpy(x).to(dtype))

    tokens = np.broadcast_to(np.arange(k.shape[2]), k.shape[:3])
    turned_q = rounded(rope_oracle.rotate(q, at[:, None], inv_freq))
    turned_k = rounded(rope_oracle.rotate(k, tokens, inv_freq))
    state = oracle.dense(turned_q, np.full_like(at, 2**40), turned_k, v, tokens * 0, inv_freq * 0)
    weights, group = rounded(state.weights), q.shape[1] // k.shape[1]
    return rounded(np.stack([weights[:, h] @ v[:, h // group] for h in range(q.shape[1])], axis=1))


def check_lossless(
    implementation: str,
    q: torch.Tensor,
    at: np.ndarray,
    k: torch.Tensor,
    v: torch.Tensor,
    inv_freq: np.ndarray,
    chunk: int,
) -> None:
    dtype, tokens = k.dtype, k.shape[2]
    key_positions = np.broadcast_to(np.arange(tokens), k.shape[:3])
    exact = [to_numpy(x) for x in (q, k, v)]
    expected = oracle.dense(exact[0], at, exact[1], exact[2], key_positions, inv_freq)
    o, lse = attend_losslessly(implementation, q, at, k, v, inv_freq, chunk)
    o_budget, lse_budget = rounding_budget(exact[0], expected, exact[1], inv_freq, dtype)
    budgets.check(o, expected.o, o_budget, "o, one rounding of keys")
    budgets.check(lse, expected.lse, lse_budget, "lse, one rounding of keys")
    if dtype != torch.float32:  # 16-bit pages are coarser than a float32 model
        times = error_over_dense(to_numpy(o), expected, exact[0], at, exact[1], exact[2], inv_freq, dtype)
        assert times <= 2, f"{times:.3g} times the error of dense attention in {dtype}"


def error_over_dense(
    o: F64, expected: oracle.State, q: F64, at: np.ndarray, k: F64, v: F64, inv_freq: np.ndarray, dtype: torch.dtype
) -> float:
    """Root mean square errors, ours over that of dense attention in `dtype`."""
    dense = dense_in_dtype(q, at, k, v, inv_freq, dtype)
    return float(np.sqrt(np.mean((o - expected.o) ** 2) / np.mean((dense - expected.o) ** 2)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dim", "rotary_dim", "chunk", "tokens"), [(64, 64, 64, 150), (80, 40, 64, 140), (128, 128, 128, 128)]
)
def test_random_tensors(rng, implementation, dtype, dim, rotary_dim, chunk, tokens):
    q, k, v = (
        torch.from_numpy(rng.standard_normal((1, heads, count, dim)) * size).to(DEVICE, dtype)
        for heads, count, size in ((4, 1, 2.0), (2, tokens, 1.5), (2, tokens, 1.0))
    )
    check_lossless(implementation, q, np.array([[tokens + 11]]), k, v, inverse_frequencies(rotary_dim), chunk)


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layer", [0, 9, 27])
def test_real_tensors(implementation, layer):
    """Keys with a sink token and with large outlying dimensions: 4,096 tokens, or 192 in the interpreter."""
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(REAL, "pt") as file:
        q, k, v = (file.get_tensor(f"layer{layer}.{name}")[None].to(DEVICE) for name in "qkv")
        inv_freq = file.get_tensor("inv_freq").numpy()
    tokens = 192 if implementation == "triton" and DEVICE.type == "cpu" else k.shape[2]
    q, at = q[:, :, -2:], np.array([[4094, 4095]])
    k, v = k[:, :, :tokens].clone(), v[:, :, :tokens].clone()
    if tokens == 4096:  # the last key lies after the first of the two queries, and cold tokens have no causal mask
        k, v = k[:, :, :4095], v[:, :, :4095]
    check_lossless(implementation, q, at, k, v, inv_freq, 64)


def test_twice_the_rounding_has_teeth(rng):
    """8 bits instead of 16, keys rounded to bf16, or a position off by one are no lossless limit."""
    tokens, inv_freq, dtype = 150, inverse_frequencies(64), torch.float16
    shapes = ((4, 1), (2, tokens), (2, tokens))
    q, k, v = (to_numpy(torch.from_numpy(rng.standard_normal((1, *shape, 64))).to(dtype)) for shape in shapes)
    at, key_positions = np.array([[tokens]]), np.broadcast_to(np.arange(tokens), (1, 2, tokens))
    expected = oracle.dense(q, at, k, v, key_positions, inv_freq)
    coarse = np.abs(k).max() / 127
    for mistake, keys, values, query_at in (
        ("8-bit keys", np.rint(k / coarse) * coarse, v, at),
        ("bf16 keys", to_numpy(torch.from_numpy(k).bfloat16()), v, at),
        ("bf16 values", k, to_numpy(torch.from_numpy(v).bfloat16()), at),
        ("the next position", k, v, at + 1),
        ("zeros", k, v * 0, at),
    ):
        wrong = oracle.dense(q, query_at, keys, values, key_positions, inv_freq)
        times = error_over_dense(wrong.o, expected, q, at, k, v, inv_freq, dtype)
        assert times > 3, f"'{mistake}' is within {times:.3g} times the error of dense attention"
    o_budget, lse_budget = rounding_budget(q, expected, k, inv_freq, dtype)
    late = oracle.dense(q, at + 1, k, v, key_positions, inv_freq)
    budgets.check_rejects(late.o, expected.o, o_budget, "the next position, o")
    budgets.check_rejects(late.lse, expected.lse, lse_budget, "the next position, lse")
