"""spectral_kernels/rope.py against reference/rope.py."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from reference import rope as oracle
from reference.compress import CodecArrays
from spectral_kernels import rope
from tests import budgets
from tests.cases import (
    DEVICE,
    DTYPES,
    F64,
    IMPLEMENTATIONS,
    STRIDES,
    PageSpec,
    codec_of,
    freqs_of,
    in_shape_of,
    int32,
    inverse_frequencies,
    make_codec,
    make_queries,
    operation,
    poisoned,
    rounded,
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


@pytest.mark.parametrize("frame", [64, 128, 512])
def test_oracle_turning_back_keeps_scores(rng, frame):
    """q_rot . k_rot = (R(-t0) q_rot) . kappa, whatever turned q and k before: the model's
    frequencies or others."""
    q, k, inv_freq = (
        rng.standard_normal((300, 80)),
        rng.standard_normal((300, 80)),
        inverse_frequencies(64),
    )
    p = rng.integers(0, 3000, 300)
    kappa = oracle.turn_back(k, p, inv_freq, frame)
    turned = oracle.rotate(q, p - p % frame, inv_freq, inverse=True)
    np.testing.assert_allclose((turned * kappa).sum(-1), (q * k).sum(-1), atol=1e-11)
    np.testing.assert_allclose(
        oracle.turn_back(kappa, p, inv_freq, frame, inverse=True), k, atol=1e-11
    )
    rotated = oracle.rotate(
        k, p, inv_freq
    )  # with the model's own frequencies kappa turns by the offset
    aligned = oracle.turn_back(rotated, p, inv_freq, frame)
    np.testing.assert_allclose(aligned, oracle.rotate(k, p % frame, inv_freq), atol=1e-11)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dim", "rotary_dim", "frame", "inverse"),
    [
        (64, 64, None, False),
        (80, 80, 64, False),
        (96, 48, 128, True),
        (128, 128, None, True),
        (256, 64, 512, False),
        (64, 0, 64, False),
    ],
)
def test_rotate_and_turn_back(rng, implementation, dtype, dim, rotary_dim, frame, inverse):
    """frame None: rotate."""
    inv_freq = inverse_frequencies(rotary_dim)
    x = rounded(rng.standard_normal((2, 3, 37, dim)), dtype)
    at = rng.integers(0, 1_000_000, (2, 37))
    for stride in STRIDES:
        int_dtype = torch.int32 if stride == "odd" else torch.int64
        wide = torch.full((2, 37, 2), -1, dtype=int_dtype, device=DEVICE)  # positions of any stride
        wide[..., 0] = torch.from_numpy(at).to(DEVICE, int_dtype)
        check_turn(implementation, strided(x, stride), at, wide[..., 0], inv_freq, frame, inverse)


def check_turn(
    implementation: str,
    x: torch.Tensor,
    at: np.ndarray,
    positions: torch.Tensor,
    inv_freq: np.ndarray,
    frame: int | None,
    inverse: bool,
    stride: str = "plain",
) -> None:
    """rotate (frame None) or turn_back of x [B, N, T, D] at positions [B, T]."""
    options = {} if frame is None else {"frame": frame}
    run = operation(rope, "rotate" if frame is None else "turn_back", implementation, x.dtype)
    out = strided(poisoned(*x.shape, dtype=x.dtype), stride)
    got = run(x, positions, freqs_of(inv_freq), inverse=inverse, out=out, **options)
    own = to_numpy(x)
    if frame is None:
        expected = oracle.rotate(own, at[:, None], inv_freq, inverse=inverse)
    else:
        expected = oracle.turn_back(own, at[:, None], inv_freq, frame, inverse=inverse)
    budgets.check(got, expected, budgets.rotate(own, expected, inv_freq, x.dtype))
    assert got.dtype == x.dtype and got is out


def test_rotate_budget_has_teeth(rng):
    inv_freq, dtype = inverse_frequencies(64), torch.float16
    x, at = to_numpy(rounded(rng.standard_normal((1, 1, 40, 80)), dtype)), np.arange(40)[None] + 3
    expected = oracle.rotate(x, at, inv_freq)
    budget = budgets.rotate(x, expected, inv_freq, dtype)
    swapped = np.concatenate((x[..., 32:64], x[..., :32], x[..., 64:]), -1)
    neighbours = x.reshape(1, 1, 40, 40, 2).swapaxes(-1, -2).reshape(x.shape)
    mutants = {
        "zeros": np.zeros_like(x),
        "not rotated": x,
        "minus the position": oracle.rotate(x, at, inv_freq, inverse=True),
        "the next position": oracle.rotate(x, at + 1, inv_freq),
        "position modulo 32": oracle.rotate(x, at % 32, inv_freq),
        "cosine only": (expected + oracle.rotate(x, at, inv_freq, inverse=True)) / 2,
        "halves swapped": oracle.rotate(swapped, at, inv_freq),
        "neighbouring pairs": oracle.rotate(neighbours, at, inv_freq),
        "dimensions past rotary_dim turned": oracle.rotate(x, at, inverse_frequencies(80)),
        "frequencies one part in a thousand off": oracle.rotate(x, at, inv_freq * 1.001),
    }
    for mistake, mutant in mutants.items():
        budgets.check_rejects(mutant, expected, budget, mistake)


def test_turn_back_budget_has_teeth(rng):
    inv_freq, dtype, frame = inverse_frequencies(64), torch.float16, 64
    x = to_numpy(rounded(rng.standard_normal((1, 1, 40, 80)), dtype))
    at = 64 * rng.integers(1, 50, (1, 40)) + rng.integers(0, 64, (1, 40))
    expected = oracle.turn_back(x, at, inv_freq, frame)
    budget = budgets.rotate(x, expected, inv_freq, dtype)
    forward = oracle.turn_back(x, at, inv_freq, frame, inverse=True)
    mutants = {
        "not turned": x,
        "turned forward": forward,
        "turned twice": oracle.turn_back(expected, at, inv_freq, frame),
        "cosine only": (expected + forward) / 2,
        "turned back by the position": oracle.rotate(x, at, inv_freq, inverse=True),
        "turned back by the offset": oracle.rotate(x, at % frame, inv_freq, inverse=True),
        "the frame before": oracle.turn_back(x, at - frame, inv_freq, frame),
        "the next frame": oracle.turn_back(x, at + frame, inv_freq, frame),
        "frames twice as long": oracle.turn_back(x, at // 128 * 128 + 64, inv_freq, 128),
        "one position early at a frame's border": oracle.rotate(
            x, at // 64 * 64 - 1, inv_freq, inverse=True
        ),
    }
    for mistake, mutant in mutants.items():
        budgets.check_rejects(mutant, expected, budget, mistake)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_frame_borders(rng, implementation):
    """The last token of a frame and the first of the next one, to the token."""
    inv_freq, at = inverse_frequencies(64), np.array([[0, 1, 511, 512, 513, 1023, 1024, 1025]])
    x = rounded(rng.standard_normal((1, 1, 8, 64)), torch.float32).to(DEVICE)
    check_turn(implementation, x, at, torch.from_numpy(at).to(DEVICE), inv_freq, 512, False)
    run = operation(rope, "turn_back", implementation)
    got = run(x, torch.from_numpy(at).to(DEVICE), freqs_of(inv_freq), frame=512)
    assert torch.equal(got[:, :, :3], x[:, :, :3])  # nothing turns in the first frame


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_angles_at_large_positions(implementation):
    """Good to 1e-6 rad at position 1,000,000 and far past it, for fast and slow and awkward
    frequencies."""
    inv_freq = np.array([1.0, 0.86596432, 0.1, 1.0 / 3, 1e-3, 1e-6, 5.0, 0.0], np.float32)
    at = np.array([[0, 1, 2**20 - 1, 999_999, 1_000_000, 2**31 - 1, 2**31, 10**12]])
    x = torch.zeros(1, 1, at.shape[1], 64)
    x[..., :8] = 1.0  # turned by an angle a: (cos a, sin a)
    wide = np.concatenate((inv_freq, np.zeros(24, np.float32)))
    run = operation(rope, "rotate", implementation, torch.float32)
    got = to_numpy(run(x.to(DEVICE), torch.from_numpy(at).to(DEVICE), freqs_of(wide)))[0, 0]
    for t, position in enumerate(at[0]):
        for i, frequency in enumerate(inv_freq):
            turns = int(position) * Fraction(float(frequency)) / TWO_PI
            angle = float((turns - math.floor(turns)) * TWO_PI)
            error = abs(
                complex(got[t, i], got[t, i + 32]) - complex(math.cos(angle), math.sin(angle))
            )
            assert error < budgets.ANGLE, (
                f"position {position}, frequency {frequency}: {error:.2g} rad"
            )


def test_float32_angles_would_fail():
    """What the test above is about: position * frequency in float32 is wrong by more than its
    bound."""
    position, frequency = np.float32(999_999), np.float32(0.86596432)
    exact = int(position) * Fraction(float(frequency))
    assert abs(float(Fraction(float(position * frequency)) - exact)) > 100 * budgets.ANGLE


def test_freqs_are_exact():
    """freqs = round(inv_freq / (2 pi) * 2**64) modulo 2**64, as a signed number; rounded once."""
    values = [1.0, 0.5, 3.0, 6.5, 1e-4, 0.0, float(np.float32(0.1)), 1e9, 5e-324]
    freqs = rope.freqs_from_inv_freq(torch.tensor(values, dtype=torch.float64))
    assert freqs.dtype == torch.int64
    for value, got in zip(values, freqs.tolist(), strict=True):
        exact = Fraction(value) / TWO_PI * 2**64
        wanted = math.floor(exact + Fraction(1, 2)) % 2**64
        assert got % 2**64 == wanted and -(2**63) <= got < 2**63


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_in_place_and_empty(rng, implementation):
    freqs = freqs_of(inverse_frequencies(64))
    x = rounded(rng.standard_normal((1, 2, 5, 64)), torch.float32).to(DEVICE)
    at = torch.arange(5, device=DEVICE)[None] + 62
    for name, options in (("rotate", {}), ("turn_back", {"frame": 64})):
        run = operation(rope, name, implementation)
        separate = run(x, at, freqs, **options)
        same = x.clone()
        assert run(same, at, freqs, out=same, **options) is same
        assert torch.equal(same, separate)
        assert run(x[:, :, :0], at[:, :0], freqs, **options).shape == (1, 2, 0, 64)


PROJECT_CASES = [
    # k_bands, D, rotary_dim, frame, G, heads a group, B, max_frames, Q, rows of the codec
    ("16x8+16x4+32x2", 64, 64, 512, 2, 4, 3, 3, 1, 0),
    ("32x8", 80, 40, 64, 1, 6, 1, 5, 2, 2),
    ("48x4", 96, 96, 128, 2, 1, 2, 2, 4, 2),
    ("16x8+16x4+96x2", 128, 128, 512, 1, 8, 1, 2, 1, 1),
    ("16x8+240x2", 256, 64, 512, 1, 2, 1, 1, 3, 0),
    ("128x8", 64, 64, 64, 1, 2, 1, 2, 1, 0),
]


def project_oracle(
    q: F64, codec: CodecArrays, rows: np.ndarray, max_frames: int
) -> tuple[F64, F64]:
    return oracle.project_queries(
        q,
        codec.k_basis,
        codec.k_scale,
        codec.k_mean,
        rows,
        codec.inv_freq,
        frame=codec.frame,
        max_frames=max_frames,
    )


def check_project(queries, codec: CodecArrays, rows: np.ndarray, max_frames: int) -> None:
    expected = project_oracle(queries.q, codec, rows, max_frames)
    ids = None if len(codec.k_basis) == 1 else int32(rows)
    got = rope.project_queries(queries.tensor, codec_of(codec), max_frames, codec_ids=ids)
    allowed = budgets.project_queries(queries.q, codec, rows)
    for name, value, wanted, budget in zip(("u", "bias"), got, expected, allowed, strict=True):
        assert value.dtype == torch.float32
        budget = np.broadcast_to(budget, wanted.shape)
        budgets.check(value, in_shape_of(wanted, queries), in_shape_of(budget, queries), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PROJECT_CASES, ids=lambda c: f"{c[0]}-D{c[1]}-Q{c[8]}")
def test_project_queries(rng, dtype, case):
    bands, dim, rotary_dim, frame, groups, group, batch, max_frames, queries, codecs = case
    spec = PageSpec(bands, "16x8", dim, groups, (0,) * batch, frame, rotary_dim, codecs=codecs)
    codec, used = make_codec(rng, spec)
    q = make_queries(
        rng,
        shape=(batch, groups * group, queries, dim),
        dtype=dtype,
        stride="odd" if queries > 1 else "swapped",
        flat=queries == 1,
    )
    check_project(q, codec, used[rng.integers(0, len(used), batch)], max_frames)


def test_project_no_frames_or_queries(rng):
    codec = codec_of(make_codec(rng, PageSpec("16x8", "16x8", 64, 1, (0,)))[0])
    for shape, frames in (((1, 2, 64), 0), ((1, 2, 0, 64), 3), ((0, 2, 64), 2)):
        u, bias = rope.project_queries(torch.zeros(shape, device=DEVICE), codec, frames)
        assert tuple(u.shape) == (*shape[:-1], frames, 16) and tuple(bias.shape) == (
            *shape[:-1],
            frames,
        )


def test_project_budget_has_teeth(rng):
    spec = PageSpec("16x8+16x4", "16x8", 80, 2, (0,), 64, 64, codecs=2)
    codec, used = make_codec(rng, spec)
    rows, frames = used[:1], 4
    q = rng.standard_normal((1, 4, 1, 80)) * 2
    expected = project_oracle(q, codec, rows, frames)
    allowed = budgets.project_queries(q, codec, rows)
    shifted, unscaled = (
        project_oracle(q, CodecArrays(**{**vars(codec), "k_scale": scale}), rows, frames)
        for scale in (np.roll(codec.k_scale, 1, -1), np.full_like(codec.k_scale, 1 / 127))
    )
    backward = CodecArrays(**{**vars(codec), "inv_freq": -codec.inv_freq})
    forwards, backwards = expected, project_oracle(q, backward, rows, frames)
    mutants = {
        "zeros": tuple(np.zeros_like(x) for x in expected),
        "turned forward": backwards,
        "cosine only": tuple((a + b) / 2 for a, b in zip(forwards, backwards, strict=True)),
        "turned twice": tuple(x[:, :, :, [0, 2, 3, 1]] for x in expected),
        "the neighbouring frame": tuple(np.roll(x, 1, 3) for x in expected),
        "frames of another length": project_oracle(
            q, CodecArrays(**{**vars(codec), "frame": 128}), rows, frames
        ),
        "a position off": project_oracle(
            oracle.rotate(q, np.array([1]), codec.inv_freq), codec, rows, frames
        ),
        "the neighbouring row of the codec": project_oracle(q, codec, used[1:2], frames),
        "heads of the other group": tuple(x[:, ::-1] for x in expected),
        "heads dealt out in turn": project_oracle(q[:, [0, 2, 1, 3]], codec, rows, frames),
        "fp16 queries": project_oracle(q.astype(np.float16), codec, rows, frames),
    }
    for mistake, mutant in mutants.items():
        for name, wrong, wanted, budget in zip(
            ("u", "bias"), mutant, expected, allowed, strict=True
        ):
            budgets.check_rejects(wrong, wanted, budget, f"{mistake}, {name}")
    for mistake, mutant in {"shifted scales": shifted, "no scales": unscaled}.items():
        budgets.check_rejects(mutant[0], expected[0], allowed[0], mistake)
