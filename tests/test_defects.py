"""The defects of the predecessor (a Python prototype), each by name: those that concern operations.

Every test runs the operation against the oracle and then puts the defect back as a mutant, which
the same budget must turn down. Its defects of whole generations (a cache that lived on across
generate() calls, a dense path of its own for short prompts, needles lost once a block was
compressed) are tests of the cache: see the end of this file.
"""

import math

import numpy as np
import pytest
import torch

from reference import attention as oracle
from reference import rope as rope_oracle
from reference.compress import PageArrays
from spectral_kernels import attention, compress, rope, window
from tests import budgets
from tests.cases import (
    ATTENTION_IMPLEMENTATIONS,
    DEVICE,
    F64,
    IMPLEMENTATIONS,
    ExactTokens,
    PageSpec,
    codec_of,
    freqs_of,
    int32,
    inverse_frequencies,
    is_slow,
    make_codec,
    make_exact_tokens,
    make_pages,
    make_queries,
    operation,
    pages_of,
    rounded,
    to_numpy,
)
from tests.test_attention import check_spectral, spectral_oracle
from tests.test_rope import project_oracle
from tests.test_window import check_window, window_oracle_state

DISTANCES = 8192


def scores_at_every_distance(q: F64, k: F64, inv_freq: np.ndarray) -> F64:
    """(R(m) q) . (R(0) k) for m = 0 .. DISTANCES - 1."""
    every = np.repeat(q[None], DISTANCES, 0)
    return rope_oracle.rotate(every, np.arange(DISTANCES), inv_freq) @ k


def wrong_at(mutant: F64, expected: F64, budget: F64) -> float:
    """Share of the distances but 0 at which a mistake is outside its budget."""
    return float((np.abs(mutant - expected) > budget)[1:].mean())


def test_negative_distance_reads_the_tables_end(rng):
    """Defect 2: cosine and sine were looked up at key - query; cos[-1200] is silently cos[len -
    1200].

    No distance occurs here: a query is turned back by starts of frames, which are counted, not
    looked up. Frame 2 of 512 by the definition, and what the table's end would give.
    """
    codec, used = make_codec(rng, PageSpec("16x8+16x4", "16x8", 64, 1, (0,)))
    q = make_queries(rng, shape=(1, 2, 1, 64))
    expected = project_oracle(q.q, codec, used, 3)[0][:, :, :, 2]
    budget = budgets.project_queries(q.q, codec, used)[0][:, :, :, 0]
    got = rope.project_queries(q.tensor, codec_of(codec), 3)[0][:, :, :, 2]
    budgets.check(got, expected, budget)
    vectors = codec.vectors("k")[0]
    for length in (2048, 4096):
        lookup = np.arange(length)[-1024]  # Python's negative index, of R(-2 * 512) q
        turned = rope_oracle.rotate(q.q, np.array([lookup]), codec.inv_freq)
        mutant = np.einsum("bhqd,grd->bhqr", turned, vectors)
        budgets.check_rejects(mutant, expected, budget, f"the end of a table of {length}")
    forward = rope_oracle.rotate(q.q, np.array([1024]), codec.inv_freq)
    mutant = np.einsum("bhqd,grd->bhqr", forward, vectors)
    budgets.check_rejects(mutant, expected, budget, "the other sign")


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_query_rotated_twice(rng, implementation, theta):
    """Defect 4: an already rotated query was turned by minus the distance, which is right only
    where n = m / 2.

    The exact score of one key, at every distance 0 .. 8191, through `attend_window` as the model
    hands q and k over: the lse over a single token is its score. (In the interpreter at every 61st
    distance.)
    """
    dim, inv_freq = 64, inverse_frequencies(64, theta)
    q, k = rng.standard_normal((2, dim)).astype(np.float32).astype(np.float64) * 2
    expected = scores_at_every_distance(q, k, inv_freq)
    rotated = rope_oracle.rotate(np.repeat(q[None], DISTANCES, 0), np.arange(DISTANCES), inv_freq)
    size = np.abs(rotated) @ np.abs(k)
    # The query's rounding to float32, then the product.
    budget = (2 * budgets.ACC + 2 * budgets.PRODUCT + (4 + dim) * budgets.ACC) * size
    budget = budget + budgets.EXP + budgets.LOG + 4 * budgets.ACC * np.abs(expected)
    step = 61 if is_slow(implementation) else 1
    batch = len(expected[::step])
    queries = torch.from_numpy(np.float32(rotated[::step])[:, None]).to(DEVICE)  # [B, 1, D]
    key = torch.from_numpy(np.float32(k)[None, None, None]).to(DEVICE)
    lens = torch.ones(batch, dtype=torch.int32, device=DEVICE)
    run = operation(window, "attend_window", implementation)
    ids = torch.zeros(batch, dtype=torch.int32, device=DEVICE)
    _, lse = run(queries, key, key, lens, sinks=0, window=1, seq_ids=ids, scale=1.0)
    budgets.check(to_numpy(lse).reshape(-1), expected[::step], budget[::step], "scores")
    back = rope_oracle.rotate(rotated, -np.arange(DISTANCES), inv_freq) @ k  # theirs: key - query
    twice = rope_oracle.rotate(rotated, np.arange(DISTANCES), inv_freq) @ k
    for mistake, mutant in {
        "turned back": back,
        "turned twice": twice,
        "never turned": np.full(DISTANCES, q @ k),
    }.items():
        assert wrong_at(mutant, expected, budget) > 0.99, f"'{mistake}' passes"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rotation_at_every_distance(rng, implementation):
    """The same score from `rotate` alone (in the interpreter at every seventh distance)."""
    dim, inv_freq = 64, inverse_frequencies(64)
    q, k = rng.standard_normal((2, dim)).astype(np.float32).astype(np.float64)
    step = 7 if is_slow(implementation) else 1
    expected = scores_at_every_distance(q, k, inv_freq)[::step]
    size = float(rope_oracle.pair_magnitude(q, inv_freq) @ np.abs(k))
    at = torch.arange(0, DISTANCES, step, device=DEVICE)[None]
    every = torch.from_numpy(np.tile(np.float32(q), (1, 1, at.shape[1], 1))).to(DEVICE)
    turned = operation(rope, "rotate", implementation)(every, at, freqs_of(inv_freq))
    budget = np.full(at.shape[1], (budgets.ANGLE + 4 * budgets.ACC) * size)
    budgets.check(to_numpy(turned)[0, 0] @ k, expected, budget)
    twice = rope_oracle.rotate(to_numpy(turned), at.cpu().numpy(), inv_freq)[0, 0] @ k
    assert wrong_at(twice, expected, budget) > 0.99


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_stored_score_at_every_distance(rng, implementation):
    """The same for stored keys: a query at m and a key at p, each turned back by the start of the
    key's frame, have the score of their distance m - p; a query turned back twice has not."""
    dim, inv_freq, frame = 64, inverse_frequencies(64), 512
    q, k = rng.standard_normal((2, dim)).astype(np.float32).astype(np.float64)
    step = 61 if is_slow(implementation) else 1
    m = np.arange(0, DISTANCES, step)
    p = rng.integers(0, m + 1)
    rotated_q = np.float32(rope_oracle.rotate(np.repeat(q[None], len(m), 0), m, inv_freq))
    rotated_k = np.float32(rope_oracle.rotate(np.repeat(k[None], len(m), 0), p, inv_freq))
    expected = scores_at_every_distance(q, k, inv_freq)[m - p]
    run = operation(rope, "turn_back", implementation)
    at = torch.from_numpy(p).to(DEVICE)[None]
    turned = [
        to_numpy(
            run(torch.from_numpy(x[None, None]).to(DEVICE), at, freqs_of(inv_freq), frame=frame)
        )
        for x in (rotated_q, rotated_k)
    ]
    size = np.hypot(rotated_q[:, :32], rotated_q[:, 32:]) * np.hypot(
        rotated_k[:, :32], rotated_k[:, 32:]
    )
    # Both rounded to float32 as the model had them and turned once; sums and pairs (a factor of 2)
    # on top.
    budget = 2 * size.astype(np.float64).sum(-1) * (2 * budgets.ANGLE + 10 * budgets.ACC)
    budgets.check((turned[0] * turned[1]).sum(-1)[0, 0], expected, budget)
    again = rope_oracle.turn_back(turned[0], p, inv_freq, frame)
    later = p >= frame
    wrong = np.abs((again * turned[1]).sum(-1)[0, 0] - expected) > budget
    assert wrong[later].mean() > 0.99
    behind = rope_oracle.turn_back(turned[0], p + frame, inv_freq, frame, inverse=True)
    assert (np.abs((behind * turned[1]).sum(-1)[0, 0] - expected) > budget).mean() > 0.99


def make_short_prompt(rng, tokens: int, groups: int, **options) -> tuple[ExactTokens, tuple[int]]:
    """A row that lies in the window whole."""
    exact = make_exact_tokens(
        rng, lengths=(tokens,), kv_heads=groups, head_dim=64, sinks=4, window=32, **options
    )
    return exact, (tokens,)


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_short_prompt_multiplies_rotated_query_with_unrotated_keys(rng, implementation):
    """Defect 3: prompts shorter than a block took a path that rotated the query and not the
    keys."""
    tokens, lengths = make_short_prompt(rng, 20, 2)
    queries = make_queries(rng, shape=(1, 4, 1, 64), size=2.0)
    check_window(implementation, queries, tokens, lengths)
    expected = window_oracle_state(queries, tokens, lengths)
    o_budget, lse_budget = budgets.attend_window(queries.q, expected)
    inv_freq = inverse_frequencies(64)
    before_rope = rope_oracle.rotate(expected.keys, np.arange(20), inv_freq, inverse=True)
    seen = np.ones((1, 1, 20), bool)
    mutant = oracle.dense(queries.q, before_rope, expected.values, seen)
    budgets.check_rejects(mutant.o, expected.o, o_budget, "keys not rotated, o")
    budgets.check_rejects(mutant.lse, expected.lse, lse_budget, "keys not rotated, lse")


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_cosine_only_rope(rng, implementation):
    """Defect 5: keys were multiplied by the cosine and the sine half was left out. Here: of pages,
    by frames."""
    arrays = make_pages(rng, PageSpec("16x8", "32x4", 64, 1, (190,), 64))
    queries = make_queries(rng, shape=(1, 2, 1, 64), size=2.0)
    check_spectral(implementation, arrays, queries)
    expected, (o_budget, lse_budget) = spectral_oracle(queries, arrays, implementation)
    backward = PageArrays(**vars(arrays))
    backward.codec = type(arrays.codec)(
        **{**vars(arrays.codec), "inv_freq": -arrays.codec.inv_freq}
    )
    back = oracle.spectral(queries.q, backward)
    mutant = oracle.softmax_state((expected.scores + back.scores) / 2, expected.values)
    budgets.check_rejects(mutant.o, expected.o, o_budget, "cosine only, o")
    budgets.check_rejects(mutant.lse, expected.lse, lse_budget, "cosine only, lse")


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_half_precision_softmax_overflows(rng, implementation, dtype):
    """Defect 5: exp and scores in fp16 overflow; scores here go to a hundred thousand, past fp16's
    largest number."""
    tokens, lengths = make_short_prompt(rng, 30, 1, dtype=dtype, size=100.0)
    queries = make_queries(rng, shape=(1, 2, 1, 64), dtype=dtype, size=600.0)
    expected = window_oracle_state(queries, tokens, lengths)
    assert np.abs(expected.scores).max() > np.finfo(np.float16).max
    check_window(implementation, queries, tokens, lengths)
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.exp(np.float16(expected.scores))
        mutant = (weights @ np.float16(expected.values)) / weights.sum(-1, keepdims=True)
    assert not np.isfinite(mutant).all()
    o_budget, _ = budgets.attend_window(queries.q, expected)
    budgets.check_rejects(mutant, expected.o, o_budget, "softmax in fp16")


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_gqa_heads_are_not_repeated(rng, implementation):
    """Defect 5: keys and values were repeated for the query heads before storing.

    Storage has G heads and query head h reads head h // (H / G): every head holds another value,
    which its queries return.
    """
    groups, group = 3, 4
    tokens, lengths = make_short_prompt(rng, 9, groups, permuted=False)
    tokens.tensors[1][:] = torch.arange(groups, device=DEVICE, dtype=torch.float32)[
        None, :, None, None
    ]
    q = make_queries(rng, shape=(1, groups * group, 1, 64)).tensor
    lens, options = int32(np.array(lengths)), {"sinks": 4, "window": 32}
    wanted = np.repeat(np.arange(groups), group)  # torch.repeat would give 0, 1, 2, 0, 1, 2, ..
    o, _ = operation(window, "attend_window", implementation)(q, *tokens.tensors, lens, **options)
    np.testing.assert_allclose(to_numpy(o)[0, :, 0].min(-1), wanted, rtol=1e-6)
    np.testing.assert_allclose(to_numpy(o)[0, :, 0].max(-1), wanted, rtol=1e-6)
    repeated = tokens.tensors[0].repeat(1, 2, 1, 1)[:, :5]
    with pytest.raises(ValueError, match="heads"):  # 12 query heads over 5 stored ones
        window.attend_window(q, repeated, repeated, lens, **options)
    tensors = pages_of(make_pages(rng, PageSpec("16x8", "16x8", 64, groups, (70,))))
    x = torch.zeros(1, groups * group, 3, 64, device=DEVICE)
    # Keys of the query heads in pages of G heads.
    with pytest.raises(ValueError, match=r"x: expected shape \[any, 3"):
        compress.encode(
            x, tensors.codec, tensors.k_pages, tensors.block_table, tensors.seq_lens, side="k"
        )


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_one_query_a_row_is_accepted(rng, implementation):
    """Defect 5: 1-D position ids crashed. [B, H, D] gives what [B, H, 1, D] gives."""
    lengths = (70, 3)
    tensors = pages_of(make_pages(rng, PageSpec("16x8", "32x4", 64, 1, lengths)))
    tokens = make_exact_tokens(rng, lengths=lengths, kv_heads=1, head_dim=64, sinks=2, window=8)
    q = make_queries(rng, shape=(2, 2, 1, 64)).tensor
    pages = (
        tensors.k_pages, tensors.v_pages, tensors.codec, tensors.block_table, tensors.seq_lens,
    )  # fmt: skip
    for module, name, args, options in (
        (attention, "attend_spectral", pages, {"exact": tokens.tensors}),
        (window, "attend_window", (*tokens.tensors, tensors.seq_lens), {}),
    ):
        options |= {"sinks": 2, "window": 8, "seq_ids": tokens.ids}
        run = operation(module, name, implementation)
        flat, row = run(q[:, :, 0], *args, **options), run(q, *args, **options)
        for x, y in zip(flat, row, strict=True):
            torch.testing.assert_close(x, y[:, :, 0], rtol=0, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_needle_is_lost(implementation):
    """Defect 5: every needle was lost once one block had been compressed.

    Exactly one planted key answers each query: the query asks for what that key holds in the weak
    three quarters of the spectrum. Through pages it must be found wherever it lies. Put back: the
    prototype's basis of rank 16, in 8 bits, which holds the strong quarter alone.
    """
    rng = np.random.default_rng(7)
    slow = is_slow(implementation)
    dim, tokens, frame, inv_freq = 64, 130 if slow else 256, 64, inverse_frequencies(64, 1e6)
    spread = np.tile(np.exp(-2.5 * np.arange(32) / 32), 2)  # by pairs: rotations keep this spectrum
    contents = rng.standard_normal((tokens, dim))
    k, v = contents * spread, rng.standard_normal((tokens, dim))
    needles = [63, 100] if slow else [0, 63, 64, 100, 191, 255]
    weak = np.tile(np.arange(32) >= 8, 2)
    wanted = np.where(
        weak, contents[needles] / spread, 0.0
    )  # wanted . k = sum of squares for the needle alone
    wanted *= 20 * dim**0.5 / np.sum(wanted * k[needles], axis=-1, keepdims=True)  # a score of 20
    at = np.arange(tokens)
    k_rot = rope_oracle.rotate(k, at, inv_freq)
    q_rot = rope_oracle.rotate(wanted, np.array(needles), inv_freq)[
        None, None
    ]  # as if it stood there
    exact = oracle.dense(
        q_rot, k_rot[None, None], v[None, None], np.ones((1, len(needles), tokens), bool)
    )
    assert (exact.weights.argmax(-1)[0, 0] == needles).all() and (exact.weights.max(-1) > 0.9).all()

    def found(k_bands: str) -> list[bool]:
        """Codes of full range for the components by their spread, best pairs first."""
        arrays = make_pages(
            rng, PageSpec(k_bands, "64x4", dim, 1, (tokens,), frame, theta=1e6), blank=True
        )
        codec = arrays.codec
        order = np.argsort(-spread, kind="stable")
        for side, sizes, columns in (("k", spread, order), ("v", np.ones(dim), np.arange(dim))):
            bands = codec.bands(side)
            bits = np.array([b for rank, b in bands for _ in range(rank)])
            chosen = columns[: len(bits)]
            step = 6 * sizes[chosen] / 2.0**bits
            pick = np.eye(dim)[chosen]
            getattr(codec, f"{side}_basis")[0, 0] = 100 * pick
            getattr(codec, f"{side}_scale")[0, 0] = step / 100
            getattr(codec, f"{side}_encoder")[0, 0] = pick.T / step
        codec.k_mean[:], codec.k_offset[:] = 0, 0
        tensors = pages_of(arrays)
        for x, side in ((k_rot, "k"), (v, "v")):
            operation(compress, "encode", implementation)(
                rounded(x[None, None], torch.float32).to(DEVICE), tensors.codec,
                tensors.pages(side), tensors.block_table, tensors.seq_lens, side=side,
            )  # fmt: skip
        o, _ = operation(attention, "attend_spectral", implementation)(
            rounded(q_rot, torch.float32).to(DEVICE), tensors.k_pages, tensors.v_pages,
            tensors.codec, tensors.block_table, tensors.seq_lens,
        )  # fmt: skip
        distance = np.linalg.norm(to_numpy(o)[0, 0][:, None] - v[None], axis=-1)  # [Q, T]
        return [bool(row.argmin() == n) for row, n in zip(distance, needles, strict=True)]

    assert all(found("16x8+48x4"))
    assert not any(found("16x8"))


def test_natural_logarithm_is_what_lse_means(rng):
    """Not a defect of the prototype but of many kernels: one key of score s has lse s, not s *
    log2(e)."""
    tokens, lengths = make_short_prompt(rng, 1, 1, permuted=False)
    queries = make_queries(rng, shape=(1, 1, 1, 64), size=3.0)
    score = float(queries.q[0, 0, 0] @ tokens.k[0, 0, 0]) / 8
    for implementation in ATTENTION_IMPLEMENTATIONS:
        run = operation(window, "attend_window", implementation)
        _, lse = run(queries.tensor, *tokens.tensors, int32(np.array(lengths)), sinks=4, window=32)
        assert math.isclose(float(lse), score, rel_tol=1e-4, abs_tol=1e-5)


# FOR LATER, with cache.py and hf.py (tests/test_cache.py, test_generate.py, test_hf.py):
#   Defect 1, stale cache: a second generate() with the same cache object, or the same model, gives
#     the tokens of the first; after reset() no length, page or slot of the sequence before is left.
#   Defect 3, fallback path: prompts of 1 .. sinks + window + 1 tokens take the path of long ones,
#     and the tokens of a generation do not change where a row leaves the window.
