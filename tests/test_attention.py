"""spectral_kernels/attention.py against reference/attention.py."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from reference import attention as oracle
from reference import pages as pages_oracle
from reference import rope as rope_oracle
from reference.pages import PageArrays
from spectral_kernels import _launch, attention, merge
from tests import budgets
from tests.cases import (
    ATTENTION_IMPLEMENTATIONS,
    DEVICE,
    DTYPES,
    F64,
    ExactTokens,
    PageSpec,
    Queries,
    in_shape_of,
    inverse_frequencies,
    make_exact_tokens,
    make_pages,
    make_queries,
    operation,
    pages_of,
    poisoned,
    query_positions,
    rope_of,
    swap_nibbles,
    to_numpy,
)
from tests.test_rope import project_oracle

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def check_state(
    got: tuple[torch.Tensor, torch.Tensor], expected: oracle.State, budget: tuple[F64, F64], queries: Queries
) -> None:
    for name, value, wanted, allowed in zip(("o", "lse"), got, (expected.o, expected.lse), budget, strict=True):
        assert value.dtype == torch.float32
        budgets.check(value, in_shape_of(wanted, queries), in_shape_of(allowed, queries), name)


def check_spectral(
    implementation: str,
    arrays: PageArrays,
    queries: Queries,
    inv_freq: np.ndarray,
    *,
    scaling: float = 1.0,
    scale: float | None = None,
    **settings: Any,
) -> None:
    expected = oracle.spectral(queries.q, queries.at, arrays, inv_freq, scaling=scaling, scale=scale)
    u = project_oracle(queries.q, queries.at, arrays, inv_freq, scaling)
    budget = budgets.attend_spectral(
        queries.q, expected, arrays, u, inv_freq, scaling=scaling, scale=scale, integer=implementation != "torch"
    )
    run = operation(attention, "attend_spectral", implementation, queries.tensor.dtype)
    outputs = queries.outputs
    rotary = rope_of(inv_freq, scaling)
    got = run(queries.tensor, queries.positions, pages_of(arrays), rotary, scale=scale, **outputs, **settings)
    check_state(got, expected, budget, queries)


def check_exact(
    implementation: str,
    tokens: ExactTokens,
    queries: Queries,
    inv_freq: np.ndarray,
    *,
    chunk: int,
    scaling: float = 1.0,
    scale: float | None = None,
    **settings: Any,
) -> None:
    expected = oracle.exact(
        queries.q, queries.at, tokens.k, tokens.v, tokens.at, inv_freq, chunk=chunk, scaling=scaling, scale=scale
    )
    budget = budgets.attend_exact(queries.q, expected, tokens.k, tokens.usable, inv_freq, scaling=scaling, scale=scale)
    dtypes = queries.tensor.dtype, tokens.k_tensor.dtype
    run = operation(attention, "attend_exact", implementation, *dtypes)
    got = run(
        queries.tensor,
        queries.positions,
        tokens.k_tensor,
        tokens.v_tensor,
        tokens.positions,
        rope_of(inv_freq, scaling),
        chunk=chunk,
        scale=scale,
        **queries.outputs,
        **settings,
    )
    check_state(got, expected, budget, queries)


SPECTRAL_CASES = [
    # K, V bands, D, rotary_dim, C (or C and A), G, heads a group, lengths, segments, skipped, Q, dtype, strides, scaling
    ("16x8+16x4+32x2", "32x4+32x2", 64, 64, (64, 128), 2, 2, (0, 1, 330), 3, 0.2, 1, F16, "swapped", 1.0),
    ("16x8+48x4", "64x4", 80, 40, 64, 1, 7, (65, 140), 2, 0.0, 2, F32, "odd", 1.0),
    ("96x4", "96x2", 96, 96, 128, 1, 1, (128, 129), 1, 0.5, 1, F16, "plain", 1.0),
    ("16x8+16x4+96x2", "64x4+64x2", 128, 128, (64, 256), 1, 6, (390,), 2, 0.1, 1, BF16, "plain", 1.2),
    ("128x16", "128x16", 128, 128, 64, 1, 4, (65,), 1, 0.3, 1, F16, "padded", 1.0),
    ("64x16", "32x8", 64, 32, 256, 2, 2, (300, 5), 2, 0.1, 1, F32, "plain", 0.9),
    ("32x8", "48x16", 64, 64, 64, 1, 8, (190,), 3, 0.0, 1, F16, "plain", 1.0),
    ("16x8+240x2", "256x2", 256, 64, 64, 1, 16, (70,), 1, 0.0, 1, F32, "swapped", 1.0),
]


def spectral_case(rng: np.random.Generator, case: tuple) -> tuple[PageArrays, Queries, np.ndarray, float]:
    k_bands, v_bands, dim, rotary_dim, chunk, groups, group, lengths, segments, skip, count, dtype, stride, scaling = case
    chunk, align = chunk if isinstance(chunk, tuple) else (chunk, 0)
    spec = PageSpec(
        k_bands, v_bands, dim, chunk, groups, lengths, segments=segments, skip=skip, mixed=segments > 2, align=align
    )
    queries = make_queries(
        rng,
        shape=(len(lengths), groups * group, count, dim),
        at=query_positions(rng, lengths, count, far=3000),
        dtype=dtype,
        size=2.0,
        stride=stride,
        flat=count == 1,
    )
    return make_pages(rng, spec), queries, inverse_frequencies(rotary_dim), scaling


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("case", SPECTRAL_CASES, ids=lambda c: f"{c[0]}-{c[1]}-D{c[2]}")
def test_attend_spectral(rng, implementation, case):
    arrays, queries, inv_freq, scaling = spectral_case(rng, case)
    check_spectral(implementation, arrays, queries, inv_freq, scaling=scaling)


@pytest.mark.parametrize("splits", [1, 2, 3, 100])
def test_splits(rng, splits):
    """Runs of chunks of unequal length, some of none; a split that ends inside a segment."""
    arrays = make_pages(rng, PageSpec("32x4", "32x4", 64, 64, 1, (10, 280), segments=2))
    queries = make_queries(rng, shape=(2, 2, 1, 64), at=np.array([[5], [150]]), size=2.0)
    check_spectral("triton", arrays, queries, inverse_frequencies(64), splits=splits)


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3, 30.0, 1e4, 1e6, 1e7, 3e7])
def test_query_magnitudes(rng, implementation, size):
    """From scores that are all alike to a softmax that is one token."""
    arrays = make_pages(rng, PageSpec("16x8+16x4", "32x4", 64, 64, 1, (90,)))
    queries = make_queries(rng, shape=(1, 2, 1, 64), at=np.array([[200]]), size=size)
    check_spectral(implementation, arrays, queries, inverse_frequencies(64))


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_softmax_scale(rng, implementation, scale):
    inv_freq = inverse_frequencies(64)
    arrays = make_pages(rng, PageSpec("16x8+16x4", "32x4", 64, 64, 1, (80,)))
    queries = make_queries(rng, shape=(1, 2, 1, 64), at=np.array([[99]]))
    check_spectral(implementation, arrays, queries, inv_freq, scale=scale)
    tokens = make_exact_tokens(rng, shape=(1, 1, 20, 64), far=100)
    check_exact(implementation, tokens, queries, inv_freq, chunk=64, scale=scale)


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_sets_without_tokens(rng, implementation):
    """Empty sets are (0, -inf) exactly: no cold token, no chunk, all skipped, all slots unused, all keys later."""
    inv_freq = inverse_frequencies(64)
    for spec in (
        PageSpec("16x8", "16x8", 64, 64, 1, (0, 0), spare_chunks=2),
        PageSpec("16x8", "16x8", 64, 64, 1, (0, 0), spare_chunks=0),
        PageSpec("16x8", "64x16", 64, 64, 1, (70, 3), skip=1.0),
    ):
        arrays = make_pages(rng, spec)
        queries = make_queries(rng, shape=(2, 2, 1, 64), at=np.array([[99], [5]]))
        check_spectral(implementation, arrays, queries, inv_freq)
    queries = make_queries(rng, shape=(2, 2, 1, 64), at=np.array([[99], [5]]))
    for tokens in (
        make_exact_tokens(rng, shape=(2, 1, 10, 64), far=50, unused=1.0),
        make_exact_tokens(rng, shape=(2, 1, 0, 64), far=50),
    ):
        check_exact(implementation, tokens, queries, inv_freq, chunk=64)
    later = make_exact_tokens(rng, shape=(2, 1, 10, 64), far=50, unused=0.0)
    later = dataclasses.replace(later, at=later.at + 100, positions=later.positions + 100)
    check_exact(implementation, later, queries, inv_freq, chunk=64)


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_rows_without_tokens_read_no_segment(rng, implementation):
    """A short row beside a longer one: what the unused segment 0 holds, NaN here, must not reach its output."""
    arrays = make_pages(rng, PageSpec("16x8", "32x4", 64, 64, 1, (0, 6, 80)))
    used = int(arrays.segment_table[1, 0])
    for name in ("k_basis", "k_scale", "v_basis", "v_scale"):
        table = getattr(arrays, name)
        table[[used, 1]] = table[[1, used]]
    arrays.segment_table[arrays.segment_table == used] = 1
    assert np.isnan(arrays.v_scale[0]).all()
    queries = make_queries(rng, shape=(3, 2, 1, 64), at=np.array([[0], [3], [40]]))
    check_spectral(implementation, arrays, queries, inverse_frequencies(64))


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_no_queries(rng, implementation):
    arrays = make_pages(rng, PageSpec("16x8", "16x8", 64, 64, 1, (70,)))
    tokens = make_exact_tokens(rng, shape=(1, 1, 5, 64), far=50)
    rotary, none = rope_of(inverse_frequencies(64)), torch.zeros(1, 2, 0, 64, device=DEVICE)
    at = torch.zeros(1, 0, dtype=torch.int64, device=DEVICE)
    o, lse = operation(attention, "attend_spectral", implementation)(none, at, pages_of(arrays), rotary)
    assert tuple(o.shape) == (1, 2, 0, 64) and tuple(lse.shape) == (1, 2, 0)
    o, lse = operation(attention, "attend_exact", implementation)(
        none, at, tokens.k_tensor, tokens.v_tensor, tokens.positions, rotary, chunk=64
    )
    assert tuple(o.shape) == (1, 2, 0, 64) and tuple(lse.shape) == (1, 2, 0)


EXACT_CASES = [
    # D, rotary_dim, C, G, heads a group, slots, Q, query dtype, key dtype, strides, positions a head, scaling
    (64, 64, 64, 2, 2, 37, 1, F16, F16, "swapped", True, 1.0),
    (80, 40, 64, 1, 7, 70, 3, F32, F32, "odd", False, 1.0),
    (96, 96, 128, 2, 1, 33, 2, F16, F32, "padded", True, 1.2),
    (128, 128, 64, 1, 6, 130, 1, BF16, BF16, "plain", False, 1.0),
    (256, 64, 256, 1, 4, 20, 5, F32, F16, "plain", True, 0.9),
    (64, 64, 64, 1, 16, 1, 2, F32, F32, "plain", True, 1.0),
]


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("case", EXACT_CASES, ids=lambda c: f"D{c[0]}-N{c[5]}-Q{c[6]}")
def test_attend_exact(rng, implementation, case):
    dim, rotary_dim, chunk, groups, group, slots, count, q_dtype, k_dtype, stride, per_head, scaling = case
    inv_freq = inverse_frequencies(rotary_dim)
    far = 400
    tokens = make_exact_tokens(rng, shape=(2, groups, slots, dim), far=far, dtype=k_dtype, stride=stride, per_head=per_head)
    # Queries in the middle of the tokens: some keys are later than some queries.
    at = rng.integers(0, far, (2, 1)) + np.arange(count)
    queries = make_queries(
        rng, shape=(2, groups * group, count, dim), at=at, dtype=q_dtype, stride=stride, flat=count == 1, size=2.0
    )
    check_exact(implementation, tokens, queries, inv_freq, chunk=chunk, scaling=scaling)


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_causal_inside_a_window(rng, implementation):
    """Several queries at once: query i of the window sees the keys up to itself, to the token."""
    count, inv_freq = 9, inverse_frequencies(64)
    tokens = make_exact_tokens(rng, shape=(1, 2, count, 64), far=count, unused=0.0)
    at = np.arange(count)[None]
    queries = make_queries(rng, shape=(1, 4, count, 64), at=at)
    check_exact(implementation, tokens, queries, inv_freq, chunk=64)
    o, lse = operation(attention, "attend_exact", implementation)(
        queries.tensor,
        queries.positions,
        tokens.k_tensor,
        tokens.v_tensor,
        tokens.positions,
        rope_of(inv_freq),
        chunk=64,
    )
    for g in range(2):  # the first query sees one key, so its output is that key's value
        own = tokens.v[0, g, int(np.flatnonzero(tokens.at[0, g] == 0)[0])]
        np.testing.assert_allclose(to_numpy(o)[0, 2 * g, 0], own, rtol=1e-5, atol=1e-6)
    assert (np.diff(to_numpy(lse), axis=-1) != 0).all()


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_halves_merged_are_the_whole(rng, implementation):
    """Skip bits cut the cold tokens in two; each half by itself and their merge are right, so nothing is seen twice."""
    inv_freq = inverse_frequencies(64)
    arrays = make_pages(rng, PageSpec("16x8+16x4+32x2", "64x4", 64, 64, 2, (150,), segments=2))
    queries = make_queries(rng, shape=(1, 4, 1, 64), at=np.array([[80]]), size=2.0)
    whole = oracle.spectral(queries.q, queries.at, arrays, inv_freq)
    u = project_oracle(queries.q, queries.at, arrays, inv_freq)
    integer = implementation != "torch"
    o_budget, lse_budget = budgets.attend_spectral(queries.q, whole, arrays, u, inv_freq, integer=integer)
    run = operation(attention, "attend_spectral", implementation)
    word = rng.integers(-(2**31), 2**31, arrays.skip.shape).astype(np.int32)
    states, half_budgets = [], []
    for skip in (word, ~word):
        half = dataclasses.replace(arrays, skip=skip)
        got = run(queries.tensor, queries.positions, pages_of(half), rope_of(inv_freq))
        expected = oracle.spectral(queries.q, queries.at, half, inv_freq)
        budget = budgets.attend_spectral(queries.q, expected, half, u, inv_freq, integer=integer)
        check_state(got, expected, budget, queries)
        states.append(got)
        half_budgets.append(budget[0])
    o, lse = operation(merge, "merge_states", implementation if implementation != "scalar" else "triton")(
        *states[0], *states[1]
    )
    # A half's own errors (its tiles have their own largest weights), then those of merging.
    budgets.check(o, whole.o, o_budget + sum(half_budgets) + 1e-6 * whole.magnitude, "o")
    budgets.check(lse, whole.lse, 2 * lse_budget + 2 * budgets.LOG, "lse")


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_cold_and_hot_merged_are_dense(rng, implementation):
    """Cold tokens by pages, hot ones exact, joined: attention over the whole sequence before RoPE, float64."""
    inv_freq, chunk, cold, hot = inverse_frequencies(64), 64, 128, 21
    arrays = make_pages(rng, PageSpec("64x16", "64x16", 64, chunk, 1, (cold,)))
    keys, values, _ = pages_oracle.rebuild(arrays, 0)
    cold_at = np.arange(cold)
    cold_keys = rope_oracle.rotate(keys, cold_at % chunk, inv_freq, inverse=True)
    tokens = make_exact_tokens(rng, shape=(1, 1, hot, 64), far=hot, unused=0.0)
    at = tokens.at + cold
    tokens = dataclasses.replace(tokens, at=at, positions=torch.from_numpy(at).to(DEVICE, torch.int32))
    hot_keys = rope_oracle.rotate(tokens.k, at % chunk, inv_freq, inverse=True)
    queries = make_queries(rng, shape=(1, 2, 1, 64), at=np.array([[cold + hot - 1]]), size=2.0)
    dense = oracle.dense(
        queries.q,
        queries.at,
        np.concatenate((cold_keys[None], hot_keys), 2),
        np.concatenate((values[None], tokens.v), 2),
        np.concatenate((cold_at[None, None], at), 2),
        inv_freq,
    )
    rotary = rope_of(inv_freq)
    states = [
        operation(attention, "attend_spectral", implementation)(
            queries.tensor, queries.positions, pages_of(arrays), rotary
        ),
        operation(attention, "attend_exact", implementation)(
            queries.tensor, queries.positions, tokens.k_tensor, tokens.v_tensor, tokens.positions, rotary, chunk=chunk
        ),
    ]
    o, lse = merge.merge_states_torch(*states[0], *states[1])
    # Both are float32 sums of exact operands here; the budget of the exact path covers either, plus the merge.
    every_key = np.concatenate((keys[None], tokens.k), 2)
    o_budget, lse_budget = budgets.attend_exact(queries.q, dense, every_key, np.ones(every_key.shape[:3], bool), inv_freq)
    budgets.check(o, dense.o, 2 * o_budget, "o")
    budgets.check(lse, dense.lse, 2 * lse_budget, "lse")


STEP_CASES = [
    # K, V bands, D, rotary_dim, C, A, G, heads a group, lengths, segments, Q, exact slots, query dtype, exact dtype
    ("16x8+16x4+32x2", "32x4+32x2", 64, 64, 64, 128, 2, 4, (0, 1, 330), 2, 1, 37, F16, F16),
    ("16x8+48x4", "64x4", 80, 40, 64, 64, 1, 7, (65, 140), 2, 3, 70, F32, F32),
    ("16x8+16x4+96x2", "64x4+64x2", 128, 128, 64, 256, 1, 4, (390, 700), 2, 1, 132, BF16, BF16),
    ("32x8", "48x16", 64, 64, 64, 64, 1, 8, (190,), 1, 2, 0, F16, F32),
]


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("case", STEP_CASES, ids=lambda c: f"{c[0]}-{c[1]}-D{c[2]}-N{c[11]}")
def test_cold_and_exact_tokens_in_one_call(rng, implementation, case):
    """A decode step: `attend_spectral(.., exact=..)` is the state of both sets of tokens, and leaves none of them out."""
    k, v, dim, rotary_dim, chunk, align, groups, group, lengths, segments, count, slots, q_dtype, dtype = case
    inv_freq = inverse_frequencies(rotary_dim)
    arrays = make_pages(rng, PageSpec(k, v, dim, chunk, groups, lengths, segments=segments, skip=0.1, align=align))
    align = arrays.align or chunk
    at = query_positions(rng, lengths, count, far=200)
    queries = make_queries(
        rng, shape=(len(lengths), groups * group, count, dim), at=at, dtype=q_dtype, flat=count == 1, size=2.0
    )
    tokens = make_exact_tokens(rng, shape=(len(lengths), groups, slots, dim), far=900, dtype=dtype)
    cold = oracle.spectral(queries.q, queries.at, arrays, inv_freq)
    u = project_oracle(queries.q, queries.at, arrays, inv_freq, 1.0)
    exact = oracle.exact(queries.q, queries.at, tokens.k, tokens.v, tokens.at, inv_freq, chunk=align)
    allowed = [
        budgets.attend_spectral(queries.q, cold, arrays, u, inv_freq, integer=implementation != "torch"),
        budgets.attend_exact(queries.q, exact, tokens.k, tokens.usable, inv_freq),
    ]
    expected, budget = budgets.joined([cold, exact], allowed)
    run = operation(attention, "attend_spectral", implementation, q_dtype, dtype)
    both = (tokens.k_tensor, tokens.v_tensor, tokens.positions)
    rotary, pages = rope_of(inv_freq), pages_of(arrays)
    got = run(queries.tensor, queries.positions, pages, rotary, exact=both, **queries.outputs)
    for name, value, wanted, off in zip(("o", "lse"), got, expected, budget, strict=True):
        budgets.check(value, in_shape_of(wanted, queries), in_shape_of(off, queries), name)
    if slots:
        budgets.check_rejects(cold.lse, expected[1], budget[1], "exact tokens left out")
        budgets.check_rejects(exact.lse, expected[1], budget[1], "cold tokens left out")


def test_twin_and_kernel_see_the_same_codes(rng):
    """The split of u and of the weights is all that separates them: on 16-bit sides they agree to float32."""
    arrays, queries, inv_freq, _ = spectral_case(rng, SPECTRAL_CASES[4])
    args = queries.tensor, queries.positions, pages_of(arrays), rope_of(inv_freq)
    twin = operation(attention, "attend_spectral", "torch")(*args)
    kernel = operation(attention, "attend_spectral", "triton")(*args)
    for a, b in zip(twin, kernel, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_outputs_are_written_in_place(rng):
    arrays = make_pages(rng, PageSpec("16x8", "16x8", 64, 64, 1, (70,)))
    tokens = make_exact_tokens(rng, shape=(1, 1, 5, 64), far=50)
    queries = make_queries(rng, shape=(1, 2, 1, 64), at=np.array([[99]]))
    rotary = rope_of(inverse_frequencies(64))
    for implementation in ("triton", "dispatch"):  # the launcher writes to what it is given, whichever path it takes
        for name, args, kwargs in (
            ("attend_spectral", (pages_of(arrays), rotary), {}),
            ("attend_exact", (tokens.k_tensor, tokens.v_tensor, tokens.positions, rotary), {"chunk": 64}),
        ):
            launcher = getattr(attention, name)
            run = launcher if implementation == "dispatch" else operation(attention, name, implementation)
            outputs = queries.outputs
            got = run(queries.tensor, queries.positions, *args, **kwargs, **outputs)
            assert got[0] is outputs["out"] and got[1] is outputs["lse"]
            assert not any(x.isnan().any() for x in got)


def test_same_inputs_give_the_same_bits(rng):
    arrays = make_pages(rng, PageSpec("16x8+16x4", "32x4", 64, 64, 1, (150,), skip=0.1))
    queries = make_queries(rng, shape=(1, 2, 1, 64), at=np.array([[99]]), size=2.0)
    run = operation(attention, "attend_spectral", "triton")
    args = queries.tensor, queries.positions, pages_of(arrays), rope_of(inverse_frequencies(64))
    for a, b in zip(run(*args), run(*args), strict=True):
        assert torch.equal(a, b)


# Budgets have teeth


FULL = 127 * 256


def split_attention(
    arrays: PageArrays,
    expected: oracle.State,
    u: F64,
    *,
    query_low: bool = True,
    weight_low: bool = True,
    scale: float | None = None,
) -> tuple[F64, F64]:
    """Attention in float64 but for the int8 operands (hi + lo), with or without their low parts: batch of one, one
    query."""
    scale = arrays.head_dim**-0.5 if scale is None else scale
    codes, _, seen = pages_oracle.coefficients(arrays, 0)
    heads, tokens = expected.scores.shape[1], seen.shape[1]
    o, lse = np.zeros(expected.o.shape), np.zeros(expected.lse.shape)
    for h in range(heads):
        g = h * seen.shape[0] // heads
        scores = np.full(tokens, -np.inf)
        for start in range(0, tokens, arrays.chunk):
            part, row = slice(start, start + arrays.chunk), u[0, h, 0, start // arrays.align]
            weights = budgets.field_weights(arrays.k_bands)
            unit = np.abs(row / weights).max() / FULL
            split = unit * weights * hi_lo(row / weights / unit, query_low)
            scores[part] = np.where(seen[g, part], scale * (codes[g, part] @ split), -np.inf)
        top = scores.max()
        lse[0, h] = top + math.log(np.exp(scores - top).sum())
        for start in range(0, tokens, budgets.TILE):
            part = slice(start, start + budgets.TILE)
            largest = scores[part].max()
            if largest > -np.inf:
                weights = hi_lo(FULL * np.exp(scores[part] - largest), weight_low) / FULL
                o[0, h, 0] += np.exp(largest - lse[0, h]) * (weights @ expected.values[0, g, part])
    return o, lse


def hi_lo(x: F64, low: bool) -> F64:
    """x rounded to 256 hi + lo, with or without lo."""
    return np.rint(x) if low else 256 * np.floor((np.rint(x) + 128) / 256)


@pytest.mark.parametrize("size", [1.0, 8.0])
def test_integer_split_fits_its_budget_and_halves_of_it_do_not(rng, size):
    # Few tokens: their errors have random signs, so the more of them are added up the further they stay below a budget.
    arrays = make_pages(rng, PageSpec("16x8+16x4+32x2", "32x4+32x2", 64, 64, 1, (20,), skip=0.1))
    queries = make_queries(rng, shape=(1, 8, 1, 64), at=np.array([[500]]), size=size)
    inv_freq = inverse_frequencies(64)
    expected = oracle.spectral(queries.q, queries.at, arrays, inv_freq)
    u = project_oracle(queries.q, queries.at, arrays, inv_freq)
    o_budget, lse_budget = budgets.attend_spectral(queries.q, expected, arrays, u, inv_freq)
    o, lse = split_attention(arrays, expected, u)
    budgets.check(o, expected.o, o_budget, "o")
    budgets.check(lse, expected.lse, lse_budget, "lse")
    o, lse = split_attention(arrays, expected, u, query_low=False)
    budgets.check_rejects(o, expected.o, o_budget, "the query's low part dropped, o")
    budgets.check_rejects(lse, expected.lse, lse_budget, "the query's low part dropped, lse")
    o, _ = split_attention(arrays, expected, u, weight_low=False)
    budgets.check_rejects(o, expected.o, o_budget, "the weights' low part dropped")


def test_spectral_budget_has_teeth(rng):
    inv_freq, dim, scaling = inverse_frequencies(64), 80, 1.1
    spec = PageSpec("16x8+32x4+16x2", "32x4+32x2", dim, 64, 2, (200, 100), segments=3, skip=0.1, spare_chunks=0)
    arrays = make_pages(rng, spec)
    used = np.flatnonzero(np.isfinite(arrays.k_scale[:, 0, 0]))
    arrays.segment_table[0] = used[[0, 1, 2, 0]]
    queries = make_queries(rng, shape=(2, 4, 1, dim), at=np.array([[260], [130]]), size=3.0)
    expected = oracle.spectral(queries.q, queries.at, arrays, inv_freq, scaling=scaling)
    u = project_oracle(queries.q, queries.at, arrays, inv_freq, scaling)
    o_budget, lse_budget = budgets.attend_spectral(queries.q, expected, arrays, u, inv_freq, scaling=scaling)

    def changed(*, q: F64 = queries.q, at: np.ndarray = queries.at, factor: float = scaling, **fields: Any) -> oracle.State:
        scale = fields.pop("scale", None)
        pages = dataclasses.replace(arrays, **fields)
        return oracle.spectral(q, at, pages, inv_freq, scaling=factor, scale=scale)

    swapped = arrays.segment_table.copy()
    swapped[0] = swapped[0, ::-1]
    other_pages = arrays.page_table.copy()
    other_pages[0, :2] = other_pages[0, 1::-1]
    nibbles = arrays.k_pages.copy()
    swap_nibbles(nibbles, 16, arrays.chunk)
    v_nibbles = arrays.v_pages.copy()
    swap_nibbles(v_nibbles, 0, arrays.chunk)
    shifted = changed(k_pages=shift_codes(arrays))
    cosine = cosine_only(queries, arrays, inv_freq, scaling)
    mutants = {
        "query not turned": changed(at=np.zeros_like(queries.at)),
        "minus the distance": changed(at=-queries.at),
        "the next position": changed(at=queries.at + 1),
        "a chunk off": changed(at=queries.at + 64),
        "cosine only": cosine,
        "scaling once": changed(factor=scaling**0.5),
        "no softmax scale": changed(scale=1.0),
        "softmax scale of the rank": changed(scale=64**-0.5),
        "swapped segments": changed(segment_table=swapped),
        "swapped pages": changed(page_table=other_pages),
        "key scales shifted by a component": changed(k_scale=np.roll(arrays.k_scale, 1, -1)),
        "swapped nibbles of K": changed(k_pages=nibbles),
        "skip bits ignored": changed(skip=np.zeros_like(arrays.skip)),
        "one token too few": changed(lengths=arrays.lengths - 1),
        "the last chunk left out": changed(lengths=(arrays.lengths - 1) // 64 * 64),
        "heads of the other group": changed(q=queries.q[:, ::-1]),
        "heads dealt out in turn": changed(q=queries.q[:, [0, 2, 1, 3]]),
        "zero query": changed(q=np.zeros_like(queries.q)),
    }
    for mistake, mutant in mutants.items():
        budgets.check_rejects(mutant.o, expected.o, o_budget, f"{mistake}, o")
        budgets.check_rejects(mutant.lse, expected.lse, lse_budget, f"{mistake}, lse")
    for mistake, wrong in {
        "zeros": np.zeros_like(expected.o),
        "value scales shifted by a component": changed(v_scale=np.roll(arrays.v_scale, 1, -1)).o,
        "swapped nibbles of V": changed(v_pages=v_nibbles).o,
        "not normalised": expected.o * np.exp(expected.lse)[..., None],
        "the mean of the values": changed(q=np.zeros_like(queries.q)).o,
    }.items():
        budgets.check_rejects(wrong, expected.o, o_budget, mistake)
    for mistake, wrong in {
        "zeros": np.zeros_like(expected.lse),
        "log base 2": expected.lse / math.log(2),
        "the largest score": expected.scores.max(-1),
        "4-bit codes one too low": shifted.lse,  # much the same for all tokens of a chunk: outputs hardly change
    }.items():
        budgets.check_rejects(wrong, expected.lse, lse_budget, mistake)


def shift_codes(arrays: PageArrays) -> np.ndarray:
    """K pages whose 4-bit codes are one lower where they can be: what a wrong offset of the code looks like."""
    out = arrays.k_pages.copy()
    group = out[..., 16 * arrays.chunk : 32 * arrays.chunk]
    low, high = group % 16, group // 16
    group[:] = low - (low > 0) + 16 * (high - (high > 0))
    return out


def cosine_only(queries: Queries, arrays: PageArrays, inv_freq: np.ndarray, scaling: float) -> oracle.State:
    """Scores with the cosine half of RoPE at a chunk's distance: the mean of turning by it forwards and backwards."""
    scores, values = [], np.zeros(0)
    for j in range(arrays.segment_table.shape[1]):
        part, start = slice(j * arrays.chunk, (j + 1) * arrays.chunk), j * arrays.chunk
        there_and_back = [
            oracle.spectral(queries.q, start + sign * (queries.at - start), arrays, inv_freq, scaling=scaling)
            for sign in (1, -1)
        ]
        scores.append(sum(state.scores[..., part] for state in there_and_back) / 2)
        values = there_and_back[0].values
    return oracle.softmax_state(np.concatenate(scores, -1), values)


def test_exact_budget_has_teeth(rng):
    inv_freq, chunk, scaling = inverse_frequencies(64), 64, 1.1
    tokens = make_exact_tokens(rng, shape=(2, 2, 40, 80), far=300, dtype=torch.float16)
    queries = make_queries(rng, shape=(2, 4, 2, 80), at=np.array([[150, 151], [298, 299]]), size=3.0)
    q, at = queries.q, queries.at

    def state(*, q: F64 = q, at: np.ndarray = at, tokens: ExactTokens = tokens, factor: float = scaling, **kw: Any) -> Any:
        return oracle.exact(q, at, tokens.k, tokens.v, tokens.at, inv_freq, **{"chunk": chunk, "scaling": factor, **kw})

    expected = state()
    o_budget, lse_budget = budgets.attend_exact(q, expected, tokens.k, tokens.usable, inv_freq, scaling=scaling)
    later = np.where(tokens.at >= 0, tokens.at + 1, tokens.at)
    two_chunks = np.where(tokens.at >= 0, tokens.at % 128, -1)
    filled = np.where(tokens.usable[..., None], tokens.k, 0.0), np.where(tokens.usable[..., None], tokens.v, 0.0)
    all_at = np.abs(tokens.at)
    offset = np.where(tokens.usable, tokens.at % chunk, 0)
    fields = dataclasses.asdict(tokens)
    tokens_filled = ExactTokens(**{**fields, "k": filled[0], "v": filled[1], "at": all_at})
    unmasked = oracle.dense(q, at, *filled, tokens.at, inv_freq, scaling=scaling, causal=False, rotated_by=offset)
    strict = oracle.dense(q, at - 1, *filled, tokens.at, inv_freq, scaling=scaling, rotated_by=offset)
    mutants = {
        "query not turned": oracle.dense(
            q, np.zeros_like(at), *filled, tokens.at, inv_freq, scaling=scaling, causal=False, rotated_by=offset
        ),
        "keys turned as if before RoPE": oracle.dense(q, at, *filled, tokens.at, inv_freq, scaling=scaling),
        "keys left phase-aligned": oracle.dense(q, at, *filled, tokens.at, inv_freq, scaling=scaling, rotated_by=tokens.at),
        "another chunk length": state(chunk=128),
        "keys one position late": state(tokens=dataclasses.replace(tokens, at=later)),
        "positions modulo two chunks": state(tokens=dataclasses.replace(tokens, at=two_chunks)),
        "no causal mask": unmasked,
        "the query one position early": strict,
        "unused slots seen": state(tokens=tokens_filled),
        "scaling once": state(factor=scaling**0.5),
        "no softmax scale": state(scale=1.0),
        "heads dealt out in turn": state(q=q[:, [0, 2, 1, 3]]),
        "queries exchanged": state(q=q[:, :, ::-1]),
    }
    for mistake, mutant in mutants.items():
        budgets.check_rejects(mutant.o, expected.o, o_budget, f"{mistake}, o")
        budgets.check_rejects(mutant.lse, expected.lse, lse_budget, f"{mistake}, lse")
    half = oracle.softmax_state(np.float16(expected.scores).astype(np.float64), expected.values)
    budgets.check_rejects(half.o, expected.o, o_budget, "fp16 scores, o")
    budgets.check_rejects(half.lse, expected.lse, lse_budget, "fp16 scores, lse")
    budgets.check_rejects(np.zeros_like(expected.o), expected.o, o_budget, "zeros")
    budgets.check_rejects(expected.lse / math.log(2), expected.lse, lse_budget, "log base 2")
    budgets.check_rejects(np.float16(expected.o), expected.o, o_budget, "fp16 output")


def test_arguments_are_named(rng):
    arrays = make_pages(rng, PageSpec("16x8", "16x8", 64, 64, 2, (70,)))
    held, rotary = pages_of(arrays), rope_of(inverse_frequencies(64))
    q, at = torch.zeros(1, 4, 64, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    k, slots = torch.zeros(1, 2, 5, 64, device=DEVICE), torch.zeros(1, 5, dtype=torch.int32, device=DEVICE)
    for args, kwargs, error, name in [
        ((q[:, :3], at, held, rotary), {}, ValueError, "q"),
        ((q.double(), at, held, rotary), {}, TypeError, "q"),
        ((q, at[None], held, rotary), {}, ValueError, "positions"),
        ((q, at.float(), held, rotary), {}, TypeError, "positions"),
        ((q, at, arrays, rotary), {}, TypeError, "pages"),
        ((q, at, held, None), {}, TypeError, "rope"),
        ((q, at, held, rotary), {"scale": math.nan}, ValueError, "scale"),
        ((q, at, held, rotary), {"out": poisoned(1, 4, 32)}, ValueError, "out"),
        ((q, at, held, rotary), {"lse": poisoned(1, 4, dtype=torch.float16)}, TypeError, "lse"),
        ((q, at, held, rotary), {"splits": 0}, ValueError, "splits"),
        ((q, at, held, rotary), {"splits": attention.MAX_SPLITS + 1}, ValueError, "splits"),
        ((q, at, held, rotary), {"exact": (q, q)}, ValueError, "exact"),
        ((q, at, held, rotary), {"exact": (k, k[:, :, :4], slots)}, ValueError, "v"),
        ((q, at, held, rotary), {"exact": (k[:, :1], k[:, :1], slots)}, ValueError, "k"),
        ((q, at, held, rotary), {"exact": (k, k, slots.long())}, TypeError, "key_positions"),
    ]:
        with pytest.raises(error, match=name):
            attention.attend_spectral(*args, **kwargs)
    for args, kwargs, error, name in [
        ((q, at, k, k[:, :, :4], slots, rotary), {"chunk": 64}, ValueError, "v"),
        ((q, at, k, k, slots[:, :4], rotary), {"chunk": 64}, ValueError, "key_positions"),
        ((q, at, k, k, slots.long(), rotary), {"chunk": 64}, TypeError, "key_positions"),
        ((q, at, k, k, slots, rotary), {"chunk": 0}, ValueError, "chunk"),
        ((q, at, k.mT.contiguous().mT, k, slots, rotary), {"chunk": 64}, ValueError, "k"),
    ]:
        with pytest.raises(error, match=name):
            attention.attend_exact(*args, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dispatch_on_cpu_is_the_twin(rng, dtype):
    """Without kernels() a launcher gives its twin's bits for CPU tensors."""
    if DEVICE.type != "cpu":
        pytest.skip("there is a GPU: launchers run kernels")
    arrays = make_pages(rng, PageSpec("16x8", "16x8", 64, 64, 2, (70,)))
    queries = make_queries(rng, shape=(1, 4, 1, 64), at=np.array([[99]]), dtype=dtype)
    args = queries.tensor, queries.positions, pages_of(arrays), rope_of(inverse_frequencies(64))
    for a, b in zip(attention.attend_spectral(*args), attention.attend_spectral_torch(*args), strict=True):
        assert torch.equal(a, b)


def test_bf16_is_refused_before_sm_80(rng, monkeypatch):
    arrays = make_pages(rng, PageSpec("16x8", "16x8", 64, 64, 1, (70,)))
    queries = make_queries(rng, shape=(1, 2, 1, 64), at=np.array([[99]]), dtype=BF16)
    tokens = make_exact_tokens(rng, shape=(1, 1, 20, 64), far=100, dtype=BF16)
    rotary = rope_of(inverse_frequencies(64))
    monkeypatch.setattr(_launch, "has_matrix_units", lambda device: False)
    with pytest.raises(TypeError, match="q: expected fp16 or fp32"):
        attention.attend_spectral(queries.tensor, queries.positions, pages_of(arrays), rotary)
    with pytest.raises(TypeError, match=": expected fp16 or fp32"):
        attention.attend_exact(
            queries.tensor.half(), queries.positions, tokens.k_tensor, tokens.v_tensor, tokens.positions, rotary, chunk=64
        )


@pytest.mark.parametrize(
    "rows, tiles, warps, expected",
    [
        (1, 2048, 4, (47, 2)),  # long: all programs resident at once, few exact ones beside them
        (16, 1024, 4, (3, 4)),  # no room beside them: the exact ones first
        (4, 512, 4, (11, 1)),  # one of many gives room
        (1, 1024, 4, (32, 2)),  # two programs a multiprocessor, and exact ones that end early beside them
        (1, 128, 4, (26, 7)),  # short: two programs a multiprocessor, the exact ones among them
        (4, 128, 4, (5, 7)),  # of many exact ones: as many in all as are resident
        (16, 32, 4, (2, 4)),  # more than those alone
        (1, 2048, 8, (16, 7)),  # D = 256: one program of 8 warps a multiprocessor
        (4, 512, 1, (49, 7)),  # cards before sm_80
    ],
)
def test_splits_by_shape(monkeypatch, rows, tiles, warps, expected):
    """Of 8 KV heads and seven tiles of exact keys, on a card of 132 multiprocessors; without them, and of one tile."""
    monkeypatch.setattr(_launch, "multiprocessors", lambda device: 132)
    count = attention._count_both_splits
    device = torch.device("cuda")
    assert count(8 * rows, tiles, 8 * rows, 7, device, warps) == expected
    assert count(8 * rows, tiles, 8 * rows, 0, device, warps)[1] == 0
    assert count(8 * rows, 1, 8 * rows, 1, device, warps) == (1, 1)
