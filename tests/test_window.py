"""spectral_kernels/window.py against reference/attention.py and reference/window.py."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from reference import attention as oracle
from reference import rope as rope_oracle
from reference import window as window_oracle
from spectral_kernels import window
from tests import budgets
from tests.cases import (
    ATTENTION_IMPLEMENTATIONS,
    DEVICE,
    DTYPES,
    F64,
    ExactTokens,
    Queries,
    in_shape_of,
    int32,
    make_exact_tokens,
    make_queries,
    operation,
    to_numpy,
)

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def check_state(
    got: tuple[torch.Tensor, torch.Tensor],
    expected: oracle.State,
    budget: tuple[F64, F64],
    queries: Queries,
) -> None:
    wanted = (expected.o, expected.lse)
    for name, value, exact, allowed in zip(("o", "lse"), got, wanted, budget, strict=True):
        assert value.dtype == torch.float32
        budgets.check(value, in_shape_of(exact, queries), in_shape_of(allowed, queries), name)


def window_oracle_state(
    queries: Queries, tokens: ExactTokens, lengths: Any, scale: float | None = None
) -> oracle.State:
    return oracle.windowed(
        queries.q,
        tokens.k,
        tokens.v,
        lengths,
        tokens.seq_ids,
        sinks=tokens.sinks,
        window=tokens.window,
        scale=scale,
    )


def check_window(
    implementation: str,
    queries: Queries,
    tokens: ExactTokens,
    lengths: Any,
    *,
    scale: float | None = None,
) -> None:
    expected = window_oracle_state(queries, tokens, lengths, scale)
    budget = budgets.attend_window(queries.q, expected, scale=scale)
    dtypes = queries.tensor.dtype, tokens.tensors[0].dtype
    run = operation(window, "attend_window", implementation, *dtypes)
    got = run(
        queries.tensor,
        *tokens.tensors,
        int32(np.array(lengths)),
        sinks=tokens.sinks,
        window=tokens.window,
        seq_ids=tokens.ids,
        scale=scale,
        **queries.outputs,
    )
    check_state(got, expected, budget, queries)


def test_oracle_slots_by_hand():
    """2 sinks, a ring of 3: tokens 0 1 | 2 3 4, 5 6 7, ..."""
    assert [window_oracle.slot_of(p, 2, 3) for p in range(9)] == [0, 1, 2, 3, 4, 2, 3, 4, 2]
    assert window_oracle.holders(7, 2, 3) == [0, 1, 5, 6, 4]
    assert window_oracle.holders(3, 2, 3) == [0, 1, 2, -1, -1]
    assert window_oracle.exact_tokens(7, 2, 3) == [0, 1, 4, 5, 6]
    assert window_oracle.paged_tokens(7, 2, 3) == [2, 3]
    assert window_oracle.exact_tokens(3, 4, 2) == [0, 1, 2]
    assert window_oracle.visible(3, 2).tolist() == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize(("sinks", "ring"), [(0, 1), (4, 1), (0, 7), (3, 8)])
def test_oracle_exact_tokens_are_in_their_slots(sinks, ring):
    """Whatever the length, each token that is exact is the newest of its slot."""
    for length in range(40):
        held = window_oracle.holders(length, sinks, ring)
        for p in window_oracle.exact_tokens(length, sinks, ring):
            assert held[window_oracle.slot_of(p, sinks, ring)] == p


@pytest.mark.parametrize(("sinks", "ring"), [(0, 1), (4, 1), (0, 7), (3, 8)])
def test_slots_and_positions(sinks, ring):
    lengths = torch.arange(41, dtype=torch.int32)
    at = torch.arange(100)
    wanted = [window_oracle.slot_of(p, sinks, ring) for p in range(100)]
    assert window.slots_torch(at, sinks, ring).tolist() == wanted
    got = window.positions_torch(lengths, sinks + ring, sinks)
    for length, row in enumerate(got.tolist()):
        assert [max(p, -1) for p in row] == window_oracle.holders(length, sinks, ring)


WINDOW_CASES = [
    # D, G, heads a group, lengths, (sinks, window, drafts), Q, query dtype, key dtype, strides
    (64, 2, 4, (0, 1, 3, 37, 1000), (4, 16, 0), 1, F16, F16, "swapped"),
    (80, 1, 6, (5, 2, 50), (4, 8, 3), 4, F32, F32, "odd"),
    (96, 2, 1, (21,), (0, 16, 1), 2, F16, F32, "padded"),
    (128, 1, 8, (300, 36), (4, 32, 0), 1, BF16, BF16, "plain"),
    (256, 1, 4, (9, 70), (2, 5, 2), 3, F32, F16, "plain"),
    (64, 1, 6, (40, 4, 1), (4, 1, 0), 1, F32, F32, "plain"),
    (64, 1, 2, (200,), (4, 120, 4), 4, F16, F16, "plain"),
]


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("case", WINDOW_CASES, ids=lambda c: f"D{c[0]}-S{sum(c[4])}-Q{c[5]}")
def test_attend_window(rng, implementation, case):
    """Rows that are empty, shorter than the sinks, than the window, than Q; rings that went round;
    slots of drafts."""
    dim, groups, group, lengths, (sinks, wide, drafts), count, q_dtype, k_dtype, stride = case
    tokens = make_exact_tokens(
        rng,
        lengths=lengths,
        kv_heads=groups,
        head_dim=dim,
        sinks=sinks,
        window=wide,
        drafts=drafts,
        dtype=k_dtype,
        stride=stride,
        permuted=len(lengths) > 1,
    )
    queries = make_queries(
        rng,
        shape=(len(lengths), groups * group, count, dim),
        dtype=q_dtype,
        size=2.0,
        stride=stride,
        flat=count == 1,
    )
    check_window(implementation, queries, tokens, lengths)


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_every_length(rng, implementation):
    """Lengths from nothing to twice round the ring, to the token."""
    lengths = tuple(range(18))
    tokens = make_exact_tokens(
        rng, lengths=lengths, kv_heads=1, head_dim=64, sinks=3, window=4, drafts=2
    )
    queries = make_queries(rng, shape=(len(lengths), 1, 2, 64), size=2.0)
    check_window(implementation, queries, tokens, lengths)


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [0.0, 1e-30, 30.0, 1e4, 1e6])
def test_query_magnitudes(rng, implementation, size):
    """From scores that are all alike to a softmax that is one token."""
    tokens = make_exact_tokens(rng, lengths=(90,), kv_heads=1, head_dim=64, sinks=4, window=16)
    check_window(implementation, make_queries(rng, shape=(1, 2, 1, 64), size=size), tokens, (90,))


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_softmax_scale(rng, implementation, scale):
    tokens = make_exact_tokens(rng, lengths=(30,), kv_heads=1, head_dim=64, sinks=4, window=16)
    queries = make_queries(rng, shape=(1, 2, 1, 64))
    check_window(implementation, queries, tokens, (30,), scale=scale)


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_no_queries(rng, implementation):
    tokens = make_exact_tokens(rng, lengths=(9,), kv_heads=1, head_dim=64, sinks=2, window=4)
    run = operation(window, "attend_window", implementation)
    none = torch.zeros(1, 2, 0, 64, device=DEVICE)
    o, lse = run(none, *tokens.tensors, int32(np.array([9])), sinks=2, window=4, seq_ids=tokens.ids)
    assert tuple(o.shape) == (1, 2, 0, 64) and tuple(lse.shape) == (1, 2, 0)


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_causal_inside_a_window(rng, implementation):
    """A row of Q tokens: its first query sees one key, so its output is that key's value."""
    tokens = make_exact_tokens(
        rng, lengths=(9,), kv_heads=2, head_dim=64, sinks=2, window=9, permuted=False
    )
    queries = make_queries(rng, shape=(1, 4, 9, 64))
    check_window(implementation, queries, tokens, (9,))
    run = operation(window, "attend_window", implementation)
    o, lse = run(queries.tensor, *tokens.tensors, int32(np.array([9])), sinks=2, window=9)
    for g in range(2):
        np.testing.assert_allclose(
            to_numpy(o)[0, 2 * g, 0], tokens.v[0, g, 0], rtol=1e-5, atol=1e-6
        )
    assert (np.diff(to_numpy(lse), axis=-1) != 0).all()


def test_splits_of_the_slots(rng, monkeypatch):
    """Many programs a row and one: the same state; the last one has slots left over."""
    tokens = make_exact_tokens(rng, lengths=(150,), kv_heads=1, head_dim=64, sinks=4, window=100)
    queries = make_queries(rng, shape=(1, 2, 1, 64), size=2.0)
    for multiprocessors in (1, 2, 1000):
        monkeypatch.setattr(
            window._launch, "multiprocessors", lambda device, found=multiprocessors: found
        )
        check_window("triton", queries, tokens, (150,))


def test_outputs_are_written_in_place(rng):
    tokens = make_exact_tokens(rng, lengths=(9,), kv_heads=1, head_dim=64, sinks=2, window=4)
    queries = make_queries(rng, shape=(1, 2, 1, 64))
    for run in (operation(window, "attend_window", "triton"), window.attend_window):
        outputs = queries.outputs
        got = run(
            queries.tensor,
            *tokens.tensors,
            int32(np.array([9])),
            sinks=2,
            window=4,
            seq_ids=tokens.ids,
            **outputs,
        )
        assert got[0] is outputs["out"] and got[1] is outputs["lse"]
        assert not any(x.isnan().any() for x in got)


def test_same_inputs_give_the_same_bits(rng):
    tokens = make_exact_tokens(rng, lengths=(90,), kv_heads=1, head_dim=64, sinks=4, window=64)
    queries = make_queries(rng, shape=(1, 2, 1, 64), size=2.0)
    run = operation(window, "attend_window", "triton")
    args = queries.tensor, *tokens.tensors, int32(np.array([90]))
    first, second = (run(*args, sinks=4, window=64, seq_ids=tokens.ids) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_budget_has_teeth(rng):
    """In fp16, with a ring wider than the window that went round, of rows in another order."""
    lengths, sinks, wide, drafts = (50, 31), 4, 16, 5
    tokens = make_exact_tokens(
        rng,
        lengths=lengths,
        kv_heads=2,
        head_dim=80,
        sinks=sinks,
        window=wide,
        drafts=drafts,
        dtype=F16,
    )
    queries = make_queries(rng, shape=(2, 4, 2, 80), size=3.0)
    q = queries.q
    filled = {name: np.nan_to_num(getattr(tokens, name)) for name in ("k", "v")}

    def state(q: F64 = q, lengths: Any = lengths, ids: Any = tokens.seq_ids, **changed: Any) -> Any:
        options = {"sinks": sinks, "window": wide, **changed}
        k, v = (options.pop(name, filled[name]) for name in ("k", "v"))
        return oracle.windowed(q, k, v, lengths, ids, **options)

    expected = state()
    o_budget, lse_budget = budgets.attend_window(q, expected)
    later = np.array(lengths) + 1
    every = np.ones((2, 2, 50), bool)
    every[1, :, 31:] = False
    keys, values = expected.keys, expected.values
    exact = np.stack(
        [[p in window_oracle.exact_tokens(n, sinks, wide) for p in range(50)] for n in lengths]
    )
    seen = np.repeat(exact[:, None], 2, 1)
    strict = seen & np.stack(
        [np.pad(window_oracle.visible(n, 2), ((0, 0), (0, 50 - n))) for n in lengths]
    )
    strict[:, 0, [48, 29]] = False
    inv_freq = (1e4 ** -(np.arange(0, 80, 2) / 80)).astype(np.float32)

    at = np.array([[n - 2, n - 1] for n in lengths])
    rotated_again = rope_oracle.rotate(q, at[:, None], inv_freq)
    mutants = {
        "no causal mask": oracle.dense(q, keys, values, seen),
        "a query does not see itself": oracle.dense(q, keys, values, strict),
        "sinks left out": state(
            sinks=0, k=np.roll(filled["k"], -4, 2), v=np.roll(filled["v"], -4, 2)
        ),
        "one sink too few": oracle.dense(q, keys, values, seen & (np.arange(50) != sinks - 1)),
        "a window one token wide": state(window=wide + 1),
        "a window one token short": state(window=wide - 1),
        "slots that are drafts'": state(window=wide + drafts),
        "the ring one slot late": state(
            k=np.concatenate((filled["k"][:, :, :4], np.roll(filled["k"][:, :, 4:], 1, 2)), 2)
        ),
        "lengths without the new tokens": state(lengths=np.array(lengths) - 2),
        "one token ahead": state(lengths=later),
        "rows by index": state(ids=np.arange(2) if tokens.seq_ids[0] else np.arange(2)[::-1]),
        "queries rotated again": state(q=rotated_again),
        "no softmax scale": state(scale=1.0),
        "heads of the other group": state(q=q[:, ::-1]),
        "heads dealt out in turn": state(q=q[:, [0, 2, 1, 3]]),
        "queries exchanged": state(q=q[:, :, ::-1]),
        "fp16 scores": oracle.softmax_state(
            np.float16(expected.scores).astype(np.float64), expected.values
        ),
    }
    for mistake, mutant in mutants.items():
        budgets.check_rejects(mutant.o, expected.o, o_budget, f"{mistake}, o")
        budgets.check_rejects(mutant.lse, expected.lse, lse_budget, f"{mistake}, lse")
    budgets.check_rejects(np.zeros_like(expected.o), expected.o, o_budget, "zeros")
    budgets.check_rejects(expected.lse / math.log(2), expected.lse, lse_budget, "log base 2")
    budgets.check_rejects(expected.scores.max(-1), expected.lse, lse_budget, "the largest score")
    budgets.check_rejects(np.float16(expected.o), expected.o, o_budget, "fp16 output")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dispatch_on_cpu_is_the_twin(rng, dtype):
    """Without kernels() a launcher gives its twin's bits for CPU tensors."""
    if DEVICE.type != "cpu":
        pytest.skip("there is a GPU: launchers run kernels")
    tokens = make_exact_tokens(
        rng, lengths=(9,), kv_heads=1, head_dim=64, sinks=2, window=4, dtype=dtype, permuted=False
    )
    q = make_queries(rng, shape=(1, 2, 1, 64), dtype=dtype).tensor
    args, options = (q, *tokens.tensors, int32(np.array([9]))), {"sinks": 2, "window": 4}
    launched = window.attend_window(*args, **options)
    twin = window.attend_window_torch(*args, **options)
    assert all(torch.equal(a, b) for a, b in zip(launched, twin, strict=True))
