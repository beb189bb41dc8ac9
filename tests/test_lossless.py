"""The lossless limit: two 8-bit components a direction, b and b / 256, at full rank, are dense
attention in 16 bits.

The test makes codec and codes itself (layout.pack_pages), so that nothing is lost but half a step
of 1/256 of an 8-bit step: less than the model's dtype loses. Path: turn_back, pack_pages,
attend_spectral, against attention over queries and keys before RoPE in float64. On random tensors,
and on real ones where shared/data lies beside the repository.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from reference import attention as oracle
from reference import rope as rope_oracle
from reference.compress import CodecArrays, PageArrays
from spectral_kernels import attention, rope
from spectral_kernels.layout import Bands, pack_pages
from tests import budgets
from tests.cases import (
    ATTENTION_IMPLEMENTATIONS,
    DEVICE,
    DTYPES,
    F64,
    PAGE,
    freqs_of,
    inverse_frequencies,
    is_slow,
    operation,
    pages_of,
    rounded,
    to_numpy,
)
from tests.test_rope import project_oracle

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = DATA / "qwen2.5-coder-1.5b-kv.safetensors"


@dataclass
class Case:
    """q [1, H, Q, D] and k, v [1, G, T, D] before RoPE, float64, and the tensors as the model
    rotated them."""

    q: F64
    k: F64
    v: F64
    inv_freq: np.ndarray
    dtype: torch.dtype
    at: np.ndarray

    def rotated(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the model hands over: q and k rotated, then rounded."""
        q = rope_oracle.rotate(self.q, self.at, self.inv_freq)
        k = rope_oracle.rotate(self.k, np.arange(self.k.shape[2]), self.inv_freq)
        return tuple(rounded(x, self.dtype) for x in (q, k, self.v))

    def dense(self, q: F64, k: F64, v: F64) -> oracle.State:
        """Attention of rotated q and k, in float64."""
        return oracle.dense(q, k, v, np.ones((1, q.shape[2], k.shape[2]), bool))

    @property
    def exact(self) -> oracle.State:
        q = rope_oracle.rotate(self.q, self.at, self.inv_freq)
        k = rope_oracle.rotate(self.k, np.arange(self.k.shape[2]), self.inv_freq)
        return self.dense(q, k, self.v)


def random_case(rng, dtype: torch.dtype, dim: int, rotary_dim: int, tokens: int) -> Case:
    shapes = ((4, 1, 2.0), (2, tokens, 1.5), (2, tokens, 1.0))
    q, k, v = (
        to_numpy(rounded(rng.standard_normal((1, heads, count, dim)) * size, dtype))
        for heads, count, size in shapes
    )
    return Case(q, k, v, inverse_frequencies(rotary_dim), dtype, np.array([tokens + 11]))


def lossless_pages(
    k: torch.Tensor, v: torch.Tensor, inv_freq: np.ndarray, frame: int
) -> PageArrays:
    """Codec and pages of k, v [1, G, T, D], k as rotated: coarse components are the dimensions in 8
    bits, fine ones what is left of a step in 8 more."""
    _, groups, tokens, dim = k.shape
    at = torch.arange(tokens, device=k.device)[None]
    aligned = rope.turn_back(k, at, freqs_of(inv_freq), frame=frame)
    bands, pages = Bands(((2 * dim, 8),)), -(-tokens // PAGE)
    mean = to_numpy(aligned).mean(2)[0].astype(np.float32)  # [G, D]
    fields: dict[str, np.ndarray] = {"k_mean": mean[None]}
    packed = []
    for side, x in (("k", to_numpy(aligned)[0] - mean[:, None]), ("v", to_numpy(v)[0])):
        step = np.abs(x).max(1) / 127.5  # [G, D]
        coarse = np.clip(np.floor(x / step[:, None]) + 0.5, -127.5, 127.5)
        fine = (x / step[:, None] - coarse) * 256
        values = np.zeros((groups, pages * PAGE, 2 * dim))
        values[:, :tokens] = np.concatenate((coarse, fine), -1)
        by_page = values.reshape(groups, pages, PAGE, -1).swapaxes(0, 1)
        packed.append(pack_pages(torch.from_numpy(by_page.copy()), bands, side=side).numpy())
        basis = np.concatenate((np.eye(dim), np.eye(dim)))  # b and b / 256, a hundred times
        fields[f"{side}_basis"] = np.tile(100 * basis, (1, groups, 1, 1)).astype(np.int8)
        scale = np.concatenate((step, step / 256), -1) / 100
        fields[f"{side}_scale"] = scale[None].astype(np.float32)
        fields[f"{side}_encoder"] = np.full((1, groups, dim, 2 * dim), np.nan, np.float32)
    fields["k_offset"] = np.full((1, groups, 2 * dim), np.nan, np.float32)
    codec = CodecArrays(bands.bands, bands.bands, dim, frame, inv_freq, **fields)
    table = np.arange(pages, dtype=np.int32)[None]
    return PageArrays(codec, *packed, table, np.array([tokens], np.int32), np.zeros(1, np.int32))


def rounding_budget(case: Case, expected: oracle.State, pages: PageArrays) -> tuple[F64, F64]:
    """(of o, of lse) when query and key are rounded to the dtype as the model rotated them, the key
    once more where it is turned back, and keys and values are off by half a fine step; values came
    in the dtype."""
    unit, dim = budgets.U[case.dtype], case.q.shape[-1]
    keys = rope_oracle.pair_magnitude(case.k, case.inv_freq)
    size = rope_oracle.pair_magnitude(case.q, case.inv_freq)
    group = size.shape[1] // keys.shape[1]
    steps = {
        side: pages.codec.vectors(side)[0][:, dim:].sum(-1) / 2 for side in ("k", "v")
    }  # [G, D]
    off = rope_oracle.pair_magnitude(steps["k"], case.inv_freq)[None, :, None]
    error = (3 * unit + 2 * budgets.ANGLE + 8 * budgets.ACC) * keys + 1.01 * off
    score = np.stack([size[:, h] @ error[:, h // group].mT for h in range(size.shape[1])], axis=1)
    o_error = (
        np.repeat(steps["v"], group, axis=0)[None, :, None] * 1.01
        + 8 * budgets.ACC * expected.magnitude
    )
    return budgets.state(expected, score * dim**-0.5, o_error)


def error_over_dense(o: F64, case: Case) -> float:
    """Root mean square errors, ours over that of dense attention in the dtype: rotated queries and
    keys, weights and output rounded to it, sums exact."""

    def to_dtype(x: F64) -> F64:
        return to_numpy(rounded(x, case.dtype))

    q, k, v = (to_numpy(x) for x in case.rotated())
    weights, group = to_dtype(case.dense(q, k, v).weights), q.shape[1] // k.shape[1]
    dense = to_dtype(
        np.stack([weights[:, h] @ v[:, h // group] for h in range(q.shape[1])], axis=1)
    )
    exact = case.exact.o
    return float(np.sqrt(np.mean((o - exact) ** 2) / np.mean((dense - exact) ** 2)))


def check_lossless(implementation: str, case: Case, frame: int) -> None:
    q, k, v = (x.to(DEVICE) for x in case.rotated())
    pages = lossless_pages(k, v, case.inv_freq, frame)
    tensors = pages_of(pages)
    run = operation(attention, "attend_spectral", implementation, case.dtype)
    o, lse = run(
        q, tensors.k_pages, tensors.v_pages, tensors.codec, tensors.block_table, tensors.seq_lens
    )
    # Of the codes: the kernel's budget. Of codes for keys and values: what rounding may do.
    own = to_numpy(q)
    coded, exact = oracle.spectral(own, pages), case.exact
    frames = -(-k.shape[2] // frame)
    u = project_oracle(own, pages.codec, pages.rows, frames)
    kernel = budgets.attend_spectral(own, coded, pages, u, integer=implementation != "torch")
    budgets.check(o, coded.o, kernel[0], "o of these codes")
    budgets.check(lse, coded.lse, kernel[1], "lse of these codes")
    rounding = rounding_budget(case, exact, pages)
    budgets.check(o, exact.o, kernel[0] + rounding[0], "o")
    budgets.check(lse, exact.lse, kernel[1] + rounding[1], "lse")
    if case.dtype != torch.float32:  # 16 bits of codes are coarser than a float32 model
        times = error_over_dense(to_numpy(o), case)
        assert times <= 2, f"{times:.3g} times the error of dense attention in {case.dtype}"


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dim", "rotary_dim", "frame", "tokens"),
    [(64, 64, 64, 150), (80, 40, 128, 140), (128, 128, 64, 128)],
)
def test_random_tensors(rng, implementation, dtype, dim, rotary_dim, frame, tokens):
    if is_slow(implementation):
        if implementation == "scalar" and dim > 64:
            pytest.skip("minutes in the interpreter")
        tokens = 70 if frame == 64 else 130
    check_lossless(implementation, random_case(rng, dtype, dim, rotary_dim, tokens), frame)


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("layer", [0, 9, 27])
def test_real_tensors(implementation, layer):
    """Keys with a sink token and with large outlying dimensions: 1,500 tokens, or 100 in the
    interpreter."""
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(REAL, "pt") as file:
        q, k, v = (file.get_tensor(f"layer{layer}.{name}")[None] for name in "qkv")
        inv_freq = file.get_tensor("inv_freq").numpy()
    if is_slow(implementation) and (implementation == "scalar" or layer):
        pytest.skip("minutes in the interpreter")
    tokens = 100 if is_slow(implementation) else 1500
    exact = [to_numpy(x) for x in (q[:, :, -2:], k[:, :, :tokens], v[:, :, :tokens])]
    at = q.shape[2] - 2 + np.arange(2)
    check_lossless(implementation, Case(*exact, inv_freq, q.dtype, at), 512)


def test_twice_the_rounding_has_teeth(rng):
    """8 bits instead of 16, keys rounded to bf16, a position or a frame off are no lossless
    limit."""
    case = random_case(rng, torch.float16, 64, 64, 150)
    q, k, v = (to_numpy(x) for x in case.rotated())
    pages = lossless_pages(*(x.to(DEVICE) for x in case.rotated()[1:]), case.inv_freq, 64)
    good = oracle.spectral(q, pages)
    assert error_over_dense(good.o, case) <= 2
    rounding = rounding_budget(case, case.exact, pages)
    budgets.check(good.o, case.exact.o, rounding[0], "the oracle's o")
    budgets.check(good.lse, case.exact.lse, rounding[1], "the oracle's lse")

    def without_fine(side: str) -> oracle.State:
        scale = getattr(pages.codec, f"{side}_scale").copy()
        scale[..., 64:] = 0
        codec = CodecArrays(**{**vars(pages.codec), f"{side}_scale": scale})
        return oracle.spectral(q, PageArrays(**{**vars(pages), "codec": codec}))

    coarse = {side: without_fine(side).o for side in ("k", "v")}
    bf16 = {name: to_numpy(rounded(x, torch.bfloat16)) for name, x in (("k", k), ("v", v))}
    later = rope_oracle.rotate(q, np.array([1]), case.inv_freq)
    half = CodecArrays(**{**vars(pages.codec), "frame": 128})
    for mistake, o in (
        ("8-bit keys", coarse["k"]),
        ("8-bit values", coarse["v"]),
        ("bf16 keys", case.dense(q, bf16["k"], v).o),
        ("bf16 values", case.dense(q, k, bf16["v"]).o),
        ("the next position", case.dense(later, k, v).o),
        (
            "frames of another length",
            oracle.spectral(q, PageArrays(**{**vars(pages), "codec": half})).o,
        ),
        ("zeros", np.zeros_like(good.o)),
    ):
        times = error_over_dense(o, case)
        assert times > 3, f"'{mistake}' is within {times:.3g} times the error of dense attention"
