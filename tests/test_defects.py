"""The defects of the predecessor (a Python prototype), each by name, those that concern operations.

Every test runs the operation against the oracle and then puts the defect back as a mutant, which the same budget must
turn down. The defects of its cache object (a generation that saw the one before) are tests of the cache.
"""

import math

import numpy as np
import pytest
import torch

from reference import attention as oracle
from reference import compress as compress_oracle
from reference import rope as rope_oracle
from spectral_kernels import attention, compress, rope
from spectral_kernels.pages import Bands, PageLayout, Pages, allocate_pages
from tests import budgets
from tests.cases import (
    ATTENTION_IMPLEMENTATIONS,
    DEVICE,
    F64,
    IMPLEMENTATIONS,
    PageSpec,
    inverse_frequencies,
    make_exact_tokens,
    make_pages,
    make_queries,
    operation,
    pages_of,
    rope_of,
    to_numpy,
)
from tests.test_attention import check_exact
from tests.test_rope import project_oracle

DISTANCES = 8192


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_negative_distance_reads_the_tables_end(rng, implementation):
    """Defect 2: cosine and sine were looked up at key - query; cos[-1200] is silently cos[len - 1200].

    A query 1,200 tokens after a chunk, projected on its basis: the mutant looks the distance up as the prototype did.
    """
    inv_freq, chunk = inverse_frequencies(64), 64
    arrays = make_pages(rng, PageSpec("16x8+16x4", "16x8", 64, chunk, 1, (1,)))
    queries = make_queries(rng, shape=(1, 2, 1, 64), at=np.array([[1200]]))
    expected = project_oracle(queries.q, queries.at, arrays, inv_freq)
    budget = budgets.project_queries(queries.q, expected, arrays, inv_freq, 1.0)
    run = operation(rope, "project_queries", implementation)
    got = run(queries.tensor, queries.positions, pages_of(arrays), rope_of(inv_freq))
    budgets.check(got, expected, budget)
    for table_length in (2048, 4096):
        lookup = np.arange(table_length)[0 - 1200]  # Python's negative index
        mutant = project_oracle(queries.q, np.array([[lookup]]), arrays, inv_freq)
        budgets.check_rejects(mutant, expected, budget, f"the end of a table of {table_length}")
    minus = project_oracle(queries.q, -queries.at, arrays, inv_freq)
    budgets.check_rejects(minus, expected, budget, "key - query")


def is_interpreted(implementation: str) -> bool:
    """There a program takes milliseconds: tests step over distances by a prime, so all offsets in a chunk occur."""
    return implementation != "torch" and DEVICE.type == "cpu"


def scores_at_every_distance(q: F64, k: F64, inv_freq: np.ndarray) -> F64:
    """(R(m) q) . (R(0) k) for m = 0 .. DISTANCES - 1."""
    every = np.repeat(q[None], DISTANCES, 0)
    return rope_oracle.rotate(every, np.arange(DISTANCES), inv_freq) @ k


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_query_rotated_twice(rng, implementation, theta):
    """Defect 4: an already rotated query was turned by minus the distance, which is right only where n = m / 2.

    The exact score of one key before RoPE, at every distance 0 .. 8191: the lse over a single token is its score.
    """
    dim, chunk, inv_freq = 64, 64, inverse_frequencies(64, theta)
    q, k = rng.standard_normal((2, dim)).astype(np.float32).astype(np.float64) * 2
    expected = scores_at_every_distance(q, k, inv_freq)
    size = float(rope_oracle.pair_magnitude(q, inv_freq) @ rope_oracle.pair_magnitude(k, inv_freq))
    budget = (2 * budgets.ANGLE + 2 * budgets.PRODUCT + (14 + dim) * budgets.ACC) * size
    budget = np.full(DISTANCES, budget) + budgets.EXP + budgets.LOG + 4 * budgets.ACC * np.abs(expected)
    step = 61 if is_interpreted(implementation) else 1
    distances = np.arange(0, DISTANCES, step)
    queries = torch.from_numpy(np.tile(np.float32(q), (1, 1, len(distances), 1))).to(DEVICE)
    key = torch.from_numpy(k[None, None, None].astype(np.float32)).to(DEVICE)
    slots = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    positions = torch.from_numpy(distances[None]).to(DEVICE)
    run = operation(attention, "attend_exact", implementation)
    _, lse = run(queries, positions, key, key, slots, rope_of(inv_freq), chunk=chunk, scale=1.0)
    budgets.check(to_numpy(lse).reshape(-1), expected[::step], budget[::step], "scores")

    rotated = rope_oracle.rotate(np.repeat(q[None], DISTANCES, 0), np.arange(DISTANCES), inv_freq)
    twice_back = rope_oracle.rotate(rotated, -np.arange(DISTANCES), inv_freq) @ k  # theirs: key position - query position
    twice = rope_oracle.rotate(rotated, np.arange(DISTANCES), inv_freq) @ k
    for mistake, mutant in {
        "turned back": twice_back,
        "turned twice": twice,
        "never turned": np.full(DISTANCES, q @ k),
    }.items():
        outside = np.abs(mutant - expected) > budget
        assert outside[1:].mean() > 0.99, f"'{mistake}' passes at {1 - outside[1:].mean():.1%} of the distances"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rotation_at_every_distance(rng, implementation):
    """The same score from the rotation alone (in the interpreter at every seventh distance)."""
    dim, inv_freq = 64, inverse_frequencies(64)
    q, k = rng.standard_normal((2, dim)).astype(np.float32).astype(np.float64)
    step = 7 if is_interpreted(implementation) else 1
    expected = scores_at_every_distance(q, k, inv_freq)[::step]
    size = float(rope_oracle.pair_magnitude(q, inv_freq) @ np.abs(k))
    at = torch.arange(0, DISTANCES, step, device=DEVICE)[None]
    every = torch.from_numpy(np.tile(np.float32(q), (1, 1, at.shape[1], 1))).to(DEVICE)
    turned = operation(rope, "rotate", implementation)(every, at, rope_of(inv_freq))
    budget = np.full(at.shape[1], (budgets.ANGLE + 4 * budgets.ACC) * size)
    budgets.check(to_numpy(turned)[0, 0] @ k, expected, budget)
    twice = rope_oracle.rotate(to_numpy(turned), at.cpu().numpy(), inv_freq)[0, 0] @ k
    assert (np.abs(twice - expected) > budget)[1:].mean() > 0.99


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_projected_score_at_every_distance(rng, implementation):
    """The same for cold keys: the projection on the chunk that holds the key, at every distance 0 .. 8191."""
    dim, inv_freq = 64, inverse_frequencies(64)
    arrays = make_pages(rng, PageSpec("16x8", "16x8", dim, 64, 1, (1,), spare_chunks=0))
    step = 61 if is_interpreted(implementation) else 1
    at = np.arange(0, DISTANCES, step)[None]
    q = np.broadcast_to(rng.standard_normal(dim).astype(np.float32), (1, 1, at.shape[1], dim))
    run = operation(rope, "project_queries", implementation)
    u = run(torch.from_numpy(q.copy()).to(DEVICE), torch.from_numpy(at).to(DEVICE), pages_of(arrays), rope_of(inv_freq))
    expected = project_oracle(q, at, arrays, inv_freq)
    budget = budgets.project_queries(q, expected, arrays, inv_freq, 1.0)
    budgets.check(u, expected, budget)
    turned = rope_oracle.rotate(q, at, inv_freq)
    twice_back = project_oracle(turned, -at, arrays, inv_freq)
    assert (np.abs(twice_back - expected) > budget)[:, :, 1:].mean() > 0.99


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_short_prompt_multiplies_rotated_query_with_unrotated_keys(rng, implementation):
    """Defect 3: prompts shorter than a block took a path that rotated the query and not the keys."""
    tokens_count, inv_freq = 20, inverse_frequencies(64)
    tokens = make_exact_tokens(rng, shape=(1, 2, tokens_count, 64), far=tokens_count, unused=0.0)
    queries = make_queries(rng, shape=(1, 4, 1, 64), at=np.array([[tokens_count]]), size=2.0)
    check_exact(implementation, tokens, queries, inv_freq, chunk=64)
    before_rope = rope_oracle.rotate(tokens.k, tokens.at, inv_freq, inverse=True)
    expected = oracle.dense(queries.q, queries.at, before_rope, tokens.v, tokens.at, inv_freq)
    o_budget, lse_budget = budgets.attend_exact(queries.q, expected, tokens.k, tokens.usable, inv_freq)
    turned = rope_oracle.rotate(queries.q, queries.at[:, None], inv_freq)
    mutant = oracle.dense(turned, queries.at, before_rope, tokens.v, tokens.at, inv_freq * 0)
    budgets.check_rejects(mutant.o, expected.o, o_budget, "keys not rotated, o")
    budgets.check_rejects(mutant.lse, expected.lse, lse_budget, "keys not rotated, lse")


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_cosine_only_rope_on_hot_keys(rng, implementation):
    """Defect 5: hot keys were multiplied by the cosine and the sine half was left out."""
    inv_freq = inverse_frequencies(64)
    tokens = make_exact_tokens(rng, shape=(1, 1, 30, 64), far=500, unused=0.0)
    queries = make_queries(rng, shape=(1, 2, 1, 64), at=np.array([[499]]), size=2.0)
    check_exact(implementation, tokens, queries, inv_freq, chunk=64)
    expected = oracle.exact(queries.q, queries.at, tokens.k, tokens.v, tokens.at, inv_freq, chunk=64)
    o_budget, lse_budget = budgets.attend_exact(queries.q, expected, tokens.k, tokens.usable, inv_freq)
    before_rope = rope_oracle.rotate(tokens.k, tokens.at, inv_freq, inverse=True)
    forwards, backwards = (rope_oracle.rotate(before_rope, sign * tokens.at, inv_freq) for sign in (1, -1))
    cosine = (forwards + backwards) / 2
    mutant = oracle.dense(queries.q, queries.at, cosine, tokens.v, tokens.at, inv_freq, rotated_by=tokens.at)
    budgets.check_rejects(mutant.o, expected.o, o_budget, "cosine only, o")
    budgets.check_rejects(mutant.lse, expected.lse, lse_budget, "cosine only, lse")


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_half_precision_softmax_overflows(rng, implementation, dtype):
    """Defect 5: exp and scores in fp16 overflow; scores here go to a hundred thousand, past fp16's largest number."""
    inv_freq = inverse_frequencies(64)
    tokens = make_exact_tokens(rng, shape=(1, 1, 40, 64), far=100, dtype=dtype, size=100.0)
    queries = make_queries(rng, shape=(1, 2, 1, 64), at=np.array([[99]]), dtype=dtype, size=600.0)
    expected = oracle.exact(queries.q, queries.at, tokens.k, tokens.v, tokens.at, inv_freq, chunk=64)
    seen = np.isfinite(expected.scores)
    assert np.abs(expected.scores[seen]).max() > np.finfo(np.float16).max
    check_exact(implementation, tokens, queries, inv_freq, chunk=64)
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.exp(np.float16(np.where(seen, expected.scores, -np.inf)))
        mutant = (weights @ np.float16(expected.values)) / weights.sum(-1, keepdims=True)
    assert not np.isfinite(mutant).all()
    o_budget, _ = budgets.attend_exact(queries.q, expected, tokens.k, tokens.usable, inv_freq)
    budgets.check_rejects(mutant, expected.o, o_budget, "softmax in fp16")


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_gqa_heads_are_not_repeated(rng, implementation):
    """Defect 5: keys and values were repeated for the query heads before storing.

    Storage has G heads and query head h reads head h // (H / G): every head holds another value, which its queries
    return.
    """
    groups, group, inv_freq = 3, 4, inverse_frequencies(64)
    tokens = make_exact_tokens(rng, shape=(1, groups, 5, 64), far=9, unused=0.0)
    tokens.v_tensor[:] = torch.arange(groups, device=DEVICE, dtype=torch.float32)[None, :, None, None]
    queries = make_queries(rng, shape=(1, groups * group, 1, 64), at=np.array([[9]]))
    rotary = rope_of(inv_freq)
    o, _ = operation(attention, "attend_exact", implementation)(
        queries.tensor, queries.positions, tokens.k_tensor, tokens.v_tensor, tokens.positions, rotary, chunk=64
    )
    wanted = np.repeat(np.arange(groups), group)  # torch.repeat would give 0, 1, 2, 0, 1, 2, ..
    np.testing.assert_allclose(to_numpy(o)[0, :, 0].min(-1), wanted, rtol=1e-6)
    np.testing.assert_allclose(to_numpy(o)[0, :, 0].max(-1), wanted, rtol=1e-6)
    repeated = tokens.k_tensor.repeat_interleave(group, 1)[:, :5]
    with pytest.raises(ValueError, match="heads"):  # 12 query heads over 5 stored ones
        attention.attend_exact(
            queries.tensor,
            queries.positions,
            repeated,
            repeated,
            tokens.positions[:, :1].expand(-1, 5, -1),
            rotary,
            chunk=64,
        )
    layout = PageLayout(Bands.parse("16x8"), Bands.parse("16x8"), 64, 64)
    sizes = [
        allocate_pages(layout, pages=4, segments=1, kv_heads=heads, batch=1, max_chunks=4, device=DEVICE).nbytes
        for heads in (groups, groups * group)
    ]
    assert sizes[0] < 1.05 * sizes[1] / group


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_one_position_a_row_is_accepted(rng, implementation):
    """Defect 5: 1-D position ids crashed. [B] goes with [B, H, D], and gives what [B, 1] gives with [B, H, 1, D]."""
    arrays = make_pages(rng, PageSpec("16x8", "32x4", 64, 64, 1, (70, 3)))
    tokens = make_exact_tokens(rng, shape=(2, 1, 5, 64), far=50)
    rotary = rope_of(inverse_frequencies(64))
    for name, args, kwargs in (
        ("attend_spectral", (pages_of(arrays), rotary), {}),
        ("attend_exact", (tokens.k_tensor, tokens.v_tensor, tokens.positions, rotary), {"chunk": 64}),
    ):
        run = operation(attention, name, implementation)
        q, at = (
            torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE),
            torch.tensor([80, 40], device=DEVICE),
        )
        for positions in (at, at.int()):
            flat, row = run(q, positions, *args, **kwargs), run(q[:, :, None], positions[:, None], *args, **kwargs)
            for x, y in zip(flat, row, strict=True):
                torch.testing.assert_close(x, y[:, :, 0], rtol=0, atol=0)
        with pytest.raises(ValueError, match="positions"):
            run(q[:, :, None], at, *args, **kwargs)


def test_decomposition_in_half_precision(rng):
    """Defect 5: the SVD ran in half precision. A basis of moments rounded to fp16 loses what the budget does not
    allow."""
    dim, rank = 64, 48
    frame = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    x = rng.standard_normal((500, dim)) * np.exp(-8 * np.arange(dim) / dim) @ frame
    _, singular = compress_oracle.fit_basis(x, None, rank)
    least = float(np.sum(singular[rank:] ** 2))
    # gram() adds in float32: its error leaks at most that share, relative to all that there is, into the lost part.
    moment = compress.gram(torch.from_numpy(x[None, None]).to(DEVICE, torch.float32))
    basis = to_numpy(compress.fit_basis(moment, rank=rank))[0, 0]
    budget = least * 1e-2 + budgets.PRODUCT * float(np.sum(singular**2)) * 1e-3
    assert compress_oracle.loss(x, basis, None) <= least + budget
    half = np.float16(x.T @ x).astype(np.float64)
    mutant = np.linalg.eigh(half)[1].T[::-1][:rank]
    assert compress_oracle.loss(x, mutant, None) > least + 2 * budget


def compress_tokens(
    implementation: str, k: torch.Tensor, v: torch.Tensor, k_bands: str, v_bands: str, rotary: rope.Rope
) -> Pages:
    """Pages of all of k (before RoPE), v [1, 1, T, D]: the whole path from keys to bytes."""
    tokens, dim, chunk = k.shape[2], k.shape[3], 64
    layout = PageLayout(Bands.parse(k_bands), Bands.parse(v_bands), dim, chunk)
    chunks = tokens // chunk
    pages = allocate_pages(layout, pages=chunks, segments=1, kv_heads=1, batch=1, max_chunks=chunks, device=DEVICE)
    pages.page_table[:] = torch.arange(chunks, dtype=torch.int32, device=DEVICE)
    pages.lengths[:] = tokens
    at = torch.arange(tokens, device=DEVICE)[None]
    aligned = operation(rope, "phase_align", implementation)(k, at, rotary, chunk=chunk)
    for x, bands, side in ((aligned, layout.k, "k"), (v, layout.v, "v")):
        basis, scale, encoder = compress.fit_side(x, bands)
        (pages.k_basis if side == "k" else pages.v_basis)[:] = basis
        (pages.k_scale if side == "k" else pages.v_scale)[:] = scale
        target = pages.k_pages if side == "k" else pages.v_pages
        operation(compress, "encode", implementation)(x, encoder, bands, target, pages.page_table, side=side)
    return pages


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_needle_is_lost(implementation):
    """Defect 5: every needle was lost once one block had been compressed.

    Exactly one planted key answers each query: the query asks for what that key holds in the weak three quarters of the
    spectrum. Through compressed pages it must be found wherever it lies. Put back: the prototype's basis of rank 16,
    in 8 bits, which holds the strong quarter alone.
    """
    rng = np.random.default_rng(7)
    dim, tokens, inv_freq = 64, 256, inverse_frequencies(64, 1e6)
    rotary = rope_of(inv_freq)
    spread = np.tile(np.exp(-2.5 * np.arange(dim // 2) / (dim // 2)), 2)  # by pairs: rotations keep this spectrum
    contents = rng.standard_normal((tokens, dim))
    k, v = contents * spread, rng.standard_normal((tokens, dim))
    needles = [63, 100] if is_interpreted(implementation) else [0, 63, 64, 100, 191, 255]
    weak = np.tile(np.arange(dim // 2) >= dim // 8, 2)
    wanted = np.where(weak, contents[needles] / spread, 0.0)  # wanted . k = sum of squares for the needle alone
    wanted *= 20 * dim**0.5 / np.sum(wanted * k[needles], axis=-1, keepdims=True)  # a score of 20
    at = np.full(len(needles), tokens + 5)
    q = rope_oracle.rotate(wanted, np.array(needles) - at, inv_freq)[None, None]  # seen from `at`, as if it stood there
    every = np.arange(tokens)[None, None]
    exact = oracle.dense(q, at[None], k[None, None], v[None, None], every, inv_freq)
    assert (exact.weights.argmax(-1)[0, 0] == needles).all() and (exact.weights.max(-1) > 0.9).all()
    tensors = [torch.from_numpy(x[None, None].astype(np.float32)).to(DEVICE) for x in (k, v)]

    def found(k_bands: str) -> list[bool]:
        pages = compress_tokens(implementation, *tensors, k_bands, "64x4", rotary)
        o, _ = operation(attention, "attend_spectral", implementation)(
            torch.from_numpy(q.astype(np.float32)).to(DEVICE), torch.from_numpy(at[None]).to(DEVICE), pages, rotary
        )
        distance = np.linalg.norm(to_numpy(o)[0, 0][:, None] - v[None], axis=-1)  # [Q, T]
        return [bool(row.argmin() == needle) for row, needle in zip(distance, needles, strict=True)]

    assert all(found("16x8+48x4"))
    assert not any(found("16x8"))


def test_natural_logarithm_is_what_lse_means(rng):
    """Not a defect of the prototype but of many kernels: one key of score s has lse s, not s * log2(e)."""
    tokens = make_exact_tokens(rng, shape=(1, 1, 1, 64), far=1, unused=0.0)
    queries = make_queries(rng, shape=(1, 1, 1, 64), at=np.array([[0]]), size=3.0)
    score = float(queries.q[0, 0, 0] @ tokens.k[0, 0, 0]) / 8
    for implementation in ATTENTION_IMPLEMENTATIONS:
        _, lse = operation(attention, "attend_exact", implementation)(
            queries.tensor, queries.positions, tokens.k_tensor, tokens.v_tensor, tokens.positions,
            rope_of(inverse_frequencies(64)), chunk=64,
        )  # fmt: skip
        assert math.isclose(float(lse), score, rel_tol=1e-4, abs_tol=1e-5)
