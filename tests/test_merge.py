"""spectral_kernels/merge.py against reference/merge.py."""

import itertools
import math

import numpy as np
import pytest
import torch

from reference import attention as attention_oracle
from reference import merge as oracle
from spectral_kernels import merge
from tests import budgets
from tests.cases import DEVICE, DTYPES, IMPLEMENTATIONS, operation, poisoned, to_numpy

INF = float("inf")


def random_states(rng, shape, dim, empty=0.2, spread=5.0):
    """o [*shape, D], lse [*shape]; a share of the sets is empty, with o = 0."""
    lse = (rng.standard_normal(shape) * spread).astype(np.float32)
    lse = np.where(rng.random(shape) < empty, -np.inf, lse).astype(np.float32)
    o = np.where(np.isfinite(lse)[..., None], rng.standard_normal((*shape, dim)), 0.0).astype(
        np.float32
    )
    return torch.from_numpy(o), torch.from_numpy(lse)


def check_many(rng, implementation, shape, dim, n, dtype, *, empty=0.2, spread=5.0, poison=True):
    o, lse = random_states(rng, (*shape, n), dim, empty, spread)
    o = o.to(dtype)
    expected = oracle.merge(to_numpy(o), to_numpy(lse))
    if poison:
        o[lse == -INF] = float("nan")  # what an empty split never wrote
    run = operation(merge, "merge_many_states", implementation, dtype)
    outputs = {"out": poisoned(*shape, dim, dtype=dtype), "out_lse": poisoned(*shape)}
    got_o, got_lse = run(o.to(DEVICE), lse.to(DEVICE), **outputs)
    clean = np.where(np.isfinite(to_numpy(lse))[..., None], to_numpy(o), 0.0)
    o_budget, lse_budget = budgets.merge(clean, to_numpy(lse), expected, dtype)
    budgets.check(got_o, expected[0], o_budget, "o")
    budgets.check(got_lse, expected[1], lse_budget, "lse")
    assert got_o.dtype == dtype and got_lse.dtype == torch.float32


def check_two(rng, implementation, shape, dim, dtype, *, empty=0.2, spread=5.0):
    o, lse = random_states(rng, (*shape, 2), dim, empty, spread)
    o = o.to(dtype)
    parts = [
        (o[..., i, :].contiguous().to(DEVICE), lse[..., i].contiguous().to(DEVICE))
        for i in range(2)
    ]
    run = operation(merge, "merge_states", implementation, dtype)
    got_o, got_lse = run(
        *parts[0], *parts[1], out=poisoned(*shape, dim, dtype=dtype), lse=poisoned(*shape)
    )
    expected = oracle.merge(to_numpy(o), to_numpy(lse))
    o_budget, lse_budget = budgets.merge(to_numpy(o), to_numpy(lse), expected, dtype)
    budgets.check(got_o, expected[0], o_budget, "o")
    budgets.check(got_lse, expected[1], lse_budget, "lse")


def test_oracle_is_the_softmax_over_the_union(rng):
    scores, values = rng.standard_normal((1, 2, 1, 90)) * 3, rng.standard_normal((1, 1, 90, 16))
    whole = attention_oracle.softmax_state(scores, values)
    cuts = [0, 1, 40, 40, 90]  # one of the sets is empty
    parts = [
        attention_oracle.softmax_state(scores[..., a:b], values[:, :, a:b])
        for a, b in itertools.pairwise(cuts)
    ]
    o, lse = oracle.merge(np.stack([p.o for p in parts], -2), np.stack([p.lse for p in parts], -1))
    np.testing.assert_allclose(o, whole.o, rtol=1e-12)
    np.testing.assert_allclose(lse, whole.lse, rtol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 3), 64), ((1, 5, 2), 80), ((3,), 256), ((0, 4), 64), ((2, 2), 1)]
)
def test_merge_states(rng, implementation, dtype, shape, dim):
    check_two(rng, implementation, shape, dim, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "dim", "n"),
    [((2, 3), 64, 5), ((1, 2, 2), 96, 1), ((3,), 256, 33), ((2, 2), 80, 70), ((2,), 64, 0)],
)
def test_merge_many_states(rng, implementation, dtype, shape, dim, n):
    check_many(rng, implementation, shape, dim, n, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spread", [100.0, 1e4])
def test_large_scores(rng, implementation, spread):
    """exp of the lse itself would overflow; only differences may be taken."""
    check_two(rng, implementation, (4, 4), 64, torch.float32, spread=spread)
    check_many(rng, implementation, (4, 4), 64, 6, torch.float32, spread=spread)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_huge_scores(rng, implementation):
    """The set that is 1e30 ahead is the result, exactly."""
    o = torch.from_numpy(rng.standard_normal((2, 3, 64)).astype(np.float32)).to(DEVICE)
    lse = torch.tensor([[1e30, 2e30, -3e38], [-1e30, -2e30, -3e30]], device=DEVICE)
    got_o, got_lse = operation(merge, "merge_many_states", implementation)(o, lse)
    torch.testing.assert_close(got_o, torch.stack((o[0, 1], o[1, 0])), rtol=0, atol=0)
    torch.testing.assert_close(got_lse, torch.stack((lse[0, 1], lse[1, 0])), rtol=0, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_states(implementation):
    """Empty with empty is empty; empty is the neutral element, exactly."""
    run = operation(merge, "merge_states", implementation)
    empty = torch.zeros(1, 64, device=DEVICE), torch.full((1,), -INF, device=DEVICE)
    state = torch.linspace(-3, 3, 64, device=DEVICE)[None], torch.full((1,), 1.5, device=DEVICE)
    for first, second, wanted in (
        (empty, empty, empty),
        (empty, state, state),
        (state, empty, state),
    ):
        o, lse = run(*first, *second, out=poisoned(1, 64), lse=poisoned(1))
        torch.testing.assert_close(o, wanted[0], rtol=0, atol=0)
        torch.testing.assert_close(lse, wanted[1], rtol=0, atol=0)


def test_outputs_may_be_the_inputs(rng):
    o, lse = random_states(rng, (2, 3, 2), 64)
    for implementation in IMPLEMENTATIONS:
        a, b = (
            (o[..., i, :].contiguous().to(DEVICE), lse[..., i].contiguous().to(DEVICE))
            for i in range(2)
        )
        run = operation(merge, "merge_states", implementation)
        wanted = run(*a, *b)
        launcher = merge.merge_states if implementation == "torch" else run
        got = launcher(*a, *b, out=a[0], lse=a[1])
        assert got[0] is a[0] and got[1] is a[1]
        for x, y in zip(got, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)


def test_budget_has_teeth(rng):
    o, lse = random_states(rng, (6, 3), 32, empty=0.0, spread=1.0)
    o, lse = to_numpy(o), to_numpy(lse)
    expected = oracle.merge(o, lse)
    o_budget, lse_budget = budgets.merge(o, lse, expected, torch.float16)
    share = np.exp(lse)
    base2 = oracle.merge(o, lse * math.log(2))
    for mistake, mutant in {
        "zeros": np.zeros_like(expected[0]),
        "the mean": o.mean(-2),
        "not normalised": (share[..., None] * o).sum(-2),
        "weights exchanged": oracle.merge(o, lse[:, ::-1])[0],
        "base 2 weights": base2[0],
        "the first set only": o[:, 0],
        "a set left out": oracle.merge(o[:, :2], lse[:, :2])[0],
    }.items():
        budgets.check_rejects(mutant, expected[0], o_budget, mistake)
    for mistake, mutant in {
        "zeros": np.zeros_like(expected[1]),
        "log base 2": expected[1] / math.log(2),
        "base 2 input": base2[1],
        "the largest": lse.max(-1),
        "the sum": lse.sum(-1),
        "a set left out": oracle.merge(o[:, :2], lse[:, :2])[1],
        "half precision": expected[1].astype(np.float16),
    }.items():
        budgets.check_rejects(mutant, expected[1], lse_budget, mistake)
