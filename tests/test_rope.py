"""spectral_kernels/rope.py against reference/rope.py."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from reference import rope as oracle
from spectral_kernels import rope
from tests import budgets
from tests.cases import (
    DEVICE,
    DTYPES,
    IMPLEMENTATIONS,
    STRIDES,
    PageSpec,
    in_shape_of,
    inverse_frequencies,
    make_pages,
    make_queries,
    operation,
    pages_of,
    poisoned,
    query_positions,
    rope_of,
    strided,
    to_numpy,
)

# 2 pi to 60 digits: the angle of any position can be had exactly, with no formula of the package.
TWO_PI = Fraction("6.283185307179586476925286766559005768394338798750211641949889")


def test_oracle_rotations_compose(rng):
    x, inv_freq = rng.standard_normal((2, 5, 64)), inverse_frequencies(64)
    a, b = rng.integers(0, 5000, (2, 5)), rng.integers(0, 5000, (2, 5))
    both = oracle.rotate(oracle.rotate(x, a, inv_freq), b, inv_freq)
    np.testing.assert_allclose(both, oracle.rotate(x, a + b, inv_freq), atol=1e-11)
    np.testing.assert_allclose(oracle.rotate(both, a + b, inv_freq, inverse=True), x, atol=1e-11)
    np.testing.assert_allclose(np.linalg.norm(both, axis=-1), np.linalg.norm(x, axis=-1))


def test_oracle_phase_alignment_keeps_scores(rng):
    """(R(m) q) . (R(p) k) = (R(m - t0) q) . (R(p - t0) k) for every chunk length."""
    q, k, inv_freq = rng.standard_normal((1, 1, 80)), rng.standard_normal((1, 300, 80)), inverse_frequencies(64)
    p, m = np.arange(300)[None], np.array([[777]])
    dense = oracle.rotate(q, m, inv_freq) @ oracle.rotate(k, p, inv_freq).mT
    for chunk in (32, 64, 128, 256):
        aligned = oracle.rotate(k, p, inv_freq, chunk=chunk)
        start = p - p % chunk
        shifted = np.stack([oracle.rotate(q[0], m[0] - s, inv_freq)[0] for s in start[0]])
        np.testing.assert_allclose((shifted * aligned[0]).sum(-1), dense[0, 0], atol=1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dim", "rotary_dim", "chunk", "inverse"),
    [(64, 64, None, False), (80, 80, 64, False), (96, 48, 128, True), (128, 128, None, True), (256, 64, 32, False)],
)
def test_rotate(rng, implementation, dtype, dim, rotary_dim, chunk, inverse):
    inv_freq = inverse_frequencies(rotary_dim)
    x = torch.from_numpy(rng.standard_normal((2, 3, 37, dim))).to(dtype)
    at = rng.integers(0, 1_000_000, (2, 37))
    run = operation(rope, "rotate", implementation, dtype)
    for stride in STRIDES:
        out = poisoned(*x.shape, dtype=dtype)
        positions = torch.from_numpy(at).to(DEVICE, torch.int32 if stride == "odd" else torch.int64)
        got = run(strided(x, stride), positions, rope_of(inv_freq), chunk=chunk, inverse=inverse, out=out)
        expected = oracle.rotate(to_numpy(x), at[:, None], inv_freq, chunk=chunk, inverse=inverse)
        budgets.check(got, expected, budgets.rotate(to_numpy(x), expected, inv_freq, dtype), stride)
        assert got.dtype == dtype


def test_rotate_budget_has_teeth(rng):
    inv_freq, dtype = inverse_frequencies(64), torch.float16
    x, at = to_numpy(torch.from_numpy(rng.standard_normal((1, 1, 40, 80))).to(dtype)), np.arange(40)[None] + 3
    expected = oracle.rotate(x, at, inv_freq)
    budget = budgets.rotate(x, expected, inv_freq, dtype)
    swapped = np.concatenate((x[..., 32:64], x[..., :32], x[..., 64:]), -1)
    mutants = {
        "zeros": np.zeros_like(x),
        "not rotated": x,
        "minus the position": oracle.rotate(x, at, inv_freq, inverse=True),
        "the next position": oracle.rotate(x, at + 1, inv_freq),
        "position modulo 32": oracle.rotate(x, at, inv_freq, chunk=32),
        "cosine only": (expected + oracle.rotate(x, at, inv_freq, inverse=True)) / 2,
        "halves swapped": oracle.rotate(swapped, at, inv_freq),
        "neighbouring pairs": oracle.rotate(x.reshape(1, 1, 40, 40, 2).swapaxes(-1, -2).reshape(x.shape), at, inv_freq),
        "dimensions past rotary_dim turned": oracle.rotate(x, at, inverse_frequencies(80)),
        "frequencies one part in a thousand off": oracle.rotate(x, at, inv_freq * 1.001),
    }
    for mistake, mutant in mutants.items():
        budgets.check_rejects(mutant, expected, budget, mistake)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_angles_at_large_positions(implementation):
    """Good to 1e-6 rad at position 1,000,000 and far past it, for fast and slow and awkward frequencies."""
    inv_freq = np.array([1.0, 0.86596432, 0.1, 1.0 / 3, 1e-3, 1e-6, 5.0, 0.0], np.float32)
    at = np.array([[0, 1, 2**20 - 1, 999_999, 1_000_000, 2**31 - 1, 2**31, 10**12]])
    x = torch.zeros(1, 1, at.shape[1], 64)
    x[..., :8] = 1.0  # turned by an angle a: (cos a, sin a)
    wide = np.concatenate((inv_freq, np.zeros(24, np.float32)))
    run = operation(rope, "rotate", implementation, torch.float32)
    got = to_numpy(run(x.to(DEVICE), torch.from_numpy(at).to(DEVICE), rope_of(wide)))[0, 0]
    for t, position in enumerate(at[0]):
        for i, frequency in enumerate(inv_freq):
            turns = int(position) * Fraction(float(frequency)) / TWO_PI
            angle = float((turns - math.floor(turns)) * TWO_PI)
            error = abs(complex(got[t, i], got[t, i + 32]) - complex(math.cos(angle), math.sin(angle)))
            assert error < budgets.ANGLE, f"position {position}, frequency {frequency}: {error:.2g} rad"


def test_float32_angles_would_fail():
    """What the test above is about: position * frequency in float32 is wrong by more than its bound."""
    position, frequency = np.float32(999_999), np.float32(0.86596432)
    exact = int(position) * Fraction(float(frequency))
    assert abs(float(Fraction(float(position * frequency)) - exact)) > 100 * budgets.ANGLE


def test_rope_from_inv_freq_is_exact():
    """turns = round(inv_freq / (2 pi) * 2**64) modulo 2**64, as a signed number."""
    values = [1.0, 0.5, 3.0, 6.5, 1e-4, 0.0, float(np.float32(0.1))]
    turns = rope.Rope.from_inv_freq(torch.tensor(values, dtype=torch.float64)).turns
    for value, got in zip(values, turns.tolist(), strict=True):
        exact = Fraction(value) / TWO_PI * 2**64
        wanted = math.floor(exact + Fraction(1, 2)) % 2**64
        assert got % 2**64 == wanted and -(2**63) <= got < 2**63


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_phase_align_is_rotation_by_the_offset(rng, implementation):
    inv_freq, dtype = inverse_frequencies(64, 1e6), torch.float16
    k = torch.from_numpy(rng.standard_normal((2, 2, 70, 64))).to(dtype)
    at = rng.integers(0, 10_000, (2, 70))
    run = operation(rope, "phase_align", implementation, dtype)
    out = poisoned(*k.shape, dtype=dtype)
    got = run(k.to(DEVICE), torch.from_numpy(at).to(DEVICE), rope_of(inv_freq), chunk=64, out=out)
    expected = oracle.rotate(to_numpy(k), (at % 64)[:, None], inv_freq)
    budgets.check(got, expected, budgets.rotate(to_numpy(k), expected, inv_freq, dtype))


def test_rotate_in_place_and_empty(rng):
    rotary = rope_of(inverse_frequencies(64))
    x = torch.from_numpy(rng.standard_normal((1, 2, 5, 64))).to(DEVICE, torch.float32)
    at = torch.arange(5, device=DEVICE)[None]
    for implementation in IMPLEMENTATIONS:
        run = operation(rope, "rotate", implementation)
        separate = run(x, at, rotary)
        same = x.clone()
        in_place = rope.rotate_torch if implementation == "torch" else run
        written = in_place(same, at, rotary, out=same)
        assert written is same
        torch.testing.assert_close(same, separate, rtol=0, atol=0)
        assert run(x[:, :, :0], at[:, :0], rotary).shape == (1, 2, 0, 64)


PROJECT_CASES = [
    # k_bands, D, rotary_dim, C, G, heads a group, lengths, segments, Q, scaling
    ("16x8+16x4+32x2", 64, 64, 64, 2, 2, (0, 1, 130), 3, 1, 1.0),
    ("32x8", 80, 40, 64, 1, 3, (140,), 2, 2, 1.3),
    ("48x4", 96, 96, 128, 2, 1, (129, 256), 1, 1, 1.0),
    ("128x16", 128, 128, 64, 1, 6, (65,), 1, 1, 0.8),
    ("16x8+240x2", 256, 64, 64, 1, 2, (64,), 1, 3, 1.0),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PROJECT_CASES, ids=lambda c: f"{c[0]}-D{c[1]}")
def test_project_queries(rng, implementation, dtype, case):
    bands, dim, rotary_dim, chunk, groups, group, lengths, segments, queries, scaling = case
    inv_freq = inverse_frequencies(rotary_dim)
    spec = PageSpec(bands, "16x8", dim, chunk, groups, lengths, segments=segments, mixed=True)
    arrays = make_pages(rng, spec)
    at = query_positions(rng, lengths, queries, far=5000)
    q = make_queries(
        rng,
        shape=(len(lengths), groups * group, queries, dim),
        at=at,
        dtype=dtype,
        stride="odd" if queries > 1 else "swapped",
        flat=queries == 1,
    )
    expected = project_oracle(q.q, at, arrays, inv_freq, scaling)
    run = operation(rope, "project_queries", implementation, dtype)
    out = poisoned(*in_shape_of(expected, q).shape)
    got = run(q.tensor, q.positions, pages_of(arrays), rope_of(inv_freq, scaling), out=out)
    budget = budgets.project_queries(q.q, expected, arrays, inv_freq, scaling)
    budgets.check(got, in_shape_of(expected, q), in_shape_of(budget, q))
    assert got.dtype == torch.float32


def project_oracle(q, at, arrays, inv_freq, scaling=1.0):
    return oracle.project_queries(
        q, at, arrays.k_basis, arrays.k_scale, arrays.segment_table, arrays.lengths, inv_freq, scaling, arrays.align
    )


def test_project_budget_has_teeth(rng):
    inv_freq, chunk, lengths, scaling = inverse_frequencies(64), 64, (200,), 1.2
    arrays = make_pages(rng, PageSpec("16x8+16x4", "16x8", 80, chunk, 2, lengths, segments=4, spare_chunks=0))
    arrays.segment_table[0] = rng.permutation(np.flatnonzero(np.isfinite(arrays.k_scale[:, 0, 0])))
    at = np.array([[417]])
    q = rng.standard_normal((1, 4, 1, 80))
    expected = project_oracle(q, at, arrays, inv_freq, scaling)
    budget = budgets.project_queries(q, expected, arrays, inv_freq, scaling)

    def with_positions(positions):
        return project_oracle(q, positions, arrays, inv_freq, scaling)

    turned_back = np.stack([expected[:, :, :, j] for j in (1, 2, 3, 0)], axis=3)
    other_segments = arrays.segment_table[:, ::-1]
    mutants = {
        "zeros": np.zeros_like(expected),
        "the next position": with_positions(at + 1),
        "a chunk off": with_positions(at + chunk),
        "the chunks' order": turned_back,
        "scaling once": project_oracle(q, at, arrays, inv_freq, scaling**0.5),
        "no scaling": project_oracle(q, at, arrays, inv_freq, 1.0),
        "key minus query": oracle.project_queries(
            q,
            2 * chunk * np.array([[3]]) - at,
            arrays.k_basis,
            arrays.k_scale,
            arrays.segment_table,
            arrays.lengths,
            inv_freq,
            scaling,
            chunk,
        ),
        "swapped segments": oracle.project_queries(
            q, at, arrays.k_basis, arrays.k_scale, other_segments, arrays.lengths, inv_freq, scaling, chunk
        ),
        "no scale of the basis": oracle.project_queries(
            q,
            at,
            arrays.k_basis,
            np.full_like(arrays.k_scale, 1 / 127),
            arrays.segment_table,
            arrays.lengths,
            inv_freq,
            scaling,
            chunk,
        ),
        "heads of the other group": expected[:, ::-1],
        "fp16 operands": project_oracle(q.astype(np.float16), at, arrays, inv_freq, scaling),
    }
    for mistake, mutant in mutants.items():
        budgets.check_rejects(mutant, expected, budget, mistake)


def test_arguments_are_named():
    rotary = rope_of(inverse_frequencies(64))
    x, at = torch.zeros(1, 1, 3, 64, device=DEVICE), torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="positions"):
        rope.rotate(x, at[:, :2], rotary)
    with pytest.raises(TypeError, match="x"):
        rope.rotate(x.double(), at, rotary)
    with pytest.raises(ValueError, match="chunk"):
        rope.rotate(x, at, rotary, chunk=0)
    with pytest.raises(ValueError, match="rope"):
        rope.rotate(torch.zeros(1, 1, 3, 32, device=DEVICE), at, rotary)
    with pytest.raises(ValueError, match="inv_freq"):
        rope.Rope.from_inv_freq(torch.tensor([-1.0]))
    with pytest.raises(ValueError, match="scaling"):
        rope.Rope(rotary.turns, 0.0)
