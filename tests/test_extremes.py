"""What lies at the ends of ranges: large and equal scores, one-hot attention, denormals,
infinities, rows of no and of one token, positions past a million, offsets past 2**31, degenerate
tokens, long sums; and that results repeat bit for bit and do not depend on a row's neighbours.

Kernels run in the interpreter on a CPU; what would take minutes there runs in the twin, and by
kernels where there is a GPU (`HEAVY`).
"""

import dataclasses

import numpy as np
import pytest
import torch

from reference import compress as compress_oracle
from reference import layout as layout_oracle
from reference import rope as rope_oracle
from spectral_kernels import _launch, attention, compress, merge, rope, window
from tests import budgets
from tests.cases import (
    ATTENTION_IMPLEMENTATIONS,
    DEVICE,
    GARBAGE_INDEX,
    IMPLEMENTATIONS,
    PageSpec,
    PageTensors,
    Queries,
    codec_of,
    int32,
    make_codec,
    make_exact_tokens,
    make_pages,
    make_queries,
    operation,
    pages_of,
    poisoned,
    strided,
    to_numpy,
)
from tests.test_attention import check_spectral, make_step, spectral_oracle
from tests.test_cache import BANDS, HEADS, KV_HEADS, Model
from tests.test_cache import make_codec as make_model_codec
from tests.test_compress import SIDES, check_codes, codes_now, make_tokens
from tests.test_rope import project_oracle
from tests.test_window import check_window

F32 = torch.float32
HEAVY = ("torch",) if DEVICE.type == "cpu" else ATTENTION_IMPLEMENTATIONS
# As STEP_CASES of tests/test_attention.py: small, with rows of several lengths.
STEP = ("16x8+16x4", "32x4", 64, 64, 64, 1, 2, (70, 0, 85, 1), (4, 8, 1), 1, 0, F32, F32)
implementations = pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)


def attend(implementation: str, tensors: PageTensors, q: torch.Tensor, **options):
    run = operation(attention, "attend_spectral", implementation)
    return run(
        q, tensors.k_pages, tensors.v_pages, tensors.codec, tensors.block_table, tensors.seq_lens,
        codec_ids=tensors.codec_ids, **options,
    )  # fmt: skip


# ---- scores --------------------------------------------------------------------------------------


@implementations
@pytest.mark.parametrize("largest", [1e4, -1e4])
def test_scores_of_ten_thousand(rng, implementation, largest):
    """The whole step at a softmax scale that makes the largest score 1e4, or the smallest one."""
    arrays, queries, tokens = make_step(rng, STEP)
    scores = spectral_oracle(queries, arrays, "torch", scale=1.0)[0].scores
    seen = scores[np.isfinite(scores)]
    scale = abs(largest) / np.abs(seen).max() * np.sign(largest)
    check_spectral(implementation, arrays, queries, tokens=tokens, scale=float(scale))
    check_window(implementation, queries, tokens, arrays.seq_lens, scale=float(scale))


@implementations
def test_equal_keys_give_the_mean_of_the_values(rng, implementation):
    """All tokens the same key: weights are alike, in pages and in slots, whatever the query."""
    length = 150
    arrays = make_pages(rng, PageSpec("16x8+16x4", "32x4", 64, 1, (length,), 64, 0))
    bands = arrays.codec.k_bands
    codes = layout_oracle.unpack_codes(arrays.k_pages, bands, "k")
    codes[:] = codes[arrays.block_table[0, 0], 0, 0]
    arrays.k_pages[:] = layout_oracle.pack_codes(codes, bands, "k")
    queries = make_queries(rng, shape=(1, 2, 1, 64), size=3.0)
    o, lse = check_spectral(implementation, arrays, queries)
    values = spectral_oracle(queries, arrays, implementation)[0].values[0, 0]
    # Equal weights split without a remainder: the sums of 150 codes and the basis round.
    allowed = (length + 64) * budgets.ACC * np.abs(values).sum(0) / length * 8
    assert (np.abs(to_numpy(o)[0, :, 0] - values.mean(0)) <= allowed).all()
    tokens = make_exact_tokens(
        rng, lengths=(20,), kv_heads=1, head_dim=64, sinks=4, window=16, permuted=False
    )
    for x in (tokens.k, tokens.tensors[0]):
        x[:] = x[:, :, :1]
    check_window(implementation, queries, tokens, (20,))
    run = operation(window, "attend_window", implementation)
    lens = int32(np.array([20]))
    o, lse = run(queries.tensor, *tokens.tensors, lens, sinks=4, window=16)
    assert np.abs(to_numpy(o)[0, :, 0] - tokens.v[0, 0].mean(0)).max() < 64 * budgets.ACC * 4
    score = queries.q[0, :, 0] @ tokens.k[0, 0, 0] / 8
    np.testing.assert_allclose(to_numpy(lse)[0, :, 0], score + np.log(20), atol=1e-5)


@implementations
@pytest.mark.parametrize("where", ["page", "sink", "window"])
def test_one_hot_attention(rng, implementation, where):
    """One key is 1e4 ahead of all others: its value is the output, wherever it lies."""
    sinks, wide, length = 2, 8, 140
    at = {"page": 70, "sink": 1, "window": 135}[where]
    arrays = make_pages(rng, PageSpec("128x8", "128x8", 64, 1, (length,), 64, 0), size=0.1)
    tokens = make_exact_tokens(
        rng, lengths=(length,), kv_heads=1, head_dim=64, sinks=sinks, window=wide, size=0.1,
        permuted=False,
    )  # fmt: skip
    queries = make_queries(rng, shape=(1, 2, 1, 64))
    keys = spectral_oracle(queries, arrays, "torch", sinks=sinks, window=wide)[0].keys[0, 0]
    if where == "page":  # the query that the page's own key answers most
        rest = np.concatenate((keys[sinks : length - wide], tokens.k[0, 0]))
        mine = keys[at]
        q = mine - rest.mean(0)
        gap = (mine @ q) - np.sort(rest @ q)[-2]
    else:
        slot = at if where == "sink" else sinks + (at - sinks) % wide
        q = tokens.k[0, 0, slot] * 1.0
        gap = q @ q - max(np.sort(tokens.k[0, 0] @ q)[-2], (keys @ q).max())
    if gap <= 0:
        pytest.fail("the case has no such key")
    q = np.float32(np.tile(q * 1e4 * 8 / gap, (1, 2, 1, 1)))
    queries = Queries(q.astype(np.float64), torch.from_numpy(q).to(DEVICE))
    o, _ = check_spectral(implementation, arrays, queries, tokens=tokens)
    if where == "page":
        value = spectral_oracle(queries, arrays, "torch")[0].values[0, 0, at]
    else:
        value = tokens.v[0, 0, slot]
    assert np.abs(to_numpy(o)[0, :, 0] - value).max() <= 2**-12 * np.abs(value).max()


# ---- numbers at the ends -------------------------------------------------------------------------


@implementations
@pytest.mark.parametrize("size", [1e-38, 1e-45])
def test_denormals(rng, implementation, size):
    """Queries, keys and values, steps and means below the smallest normal number: finite results,
    off by no more than that number where a device takes them for zero."""
    smallest = 2.0**-126
    arrays, queries, tokens = make_step(rng, STEP)
    tensors = pages_of(arrays)
    plain = {"sinks": 4, "window": 8, "seq_ids": tokens.ids, "exact": tokens.tensors}
    whole = attend(implementation, tensors, 0 * queries.tensor, **plain)
    got = attend(implementation, tensors, queries.tensor * size, **plain)
    for a, b in zip(got, whole, strict=True):  # scores of 1e-37: all alike
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    small = tuple(x * size for x in tokens.tensors)
    o, lse = operation(window, "attend_window", implementation)(
        queries.tensor, *small, tensors.seq_lens, sinks=4, window=8, seq_ids=tokens.ids
    )
    assert torch.isfinite(o).all() and o.abs().max() <= 4 * size + smallest
    live = arrays.seq_lens > 0
    counts = np.minimum(arrays.seq_lens, 12)[live]
    np.testing.assert_allclose(to_numpy(lse)[live], np.log([counts] * 2).T, atol=1e-6)
    for name in ("k_scale", "k_mean", "v_scale"):
        getattr(arrays.codec, name)[:] *= np.float32(size)
    o, lse = attend(implementation, pages_of(arrays), queries.tensor)
    assert torch.isfinite(o).all()
    wanted = np.log([arrays.seq_lens[live]] * 2).T
    np.testing.assert_allclose(to_numpy(lse)[live], wanted, atol=1e-5)


@implementations
@pytest.mark.parametrize(
    ("where", "what"),
    [("query", np.inf), ("query", np.nan), ("key", -np.inf), ("key", np.nan), ("value", np.inf)],
)
def test_infinities_stay_in_their_row(rng, implementation, where, what):
    """A query or key whose scores are not finite makes its heads' outputs NaN, a value its
    dimension not finite; all else has the bits it had."""
    arrays, queries, tokens = make_step(rng, STEP)
    tensors = pages_of(arrays)

    def run(q: torch.Tensor, *exact: torch.Tensor):
        return attend(
            implementation, tensors, q, sinks=4, window=8, exact=exact, seq_ids=tokens.ids
        )

    clean = run(queries.tensor, *tokens.tensors)
    q, k, v = queries.tensor.clone(), *(x.clone() for x in tokens.tensors)
    slot = int(tokens.seq_ids[2]), 0, 1  # a sink
    if where == "query":
        q[2, 0, 7] = what
    elif where == "key":
        k[slot] = what  # all of it, so that its score is NaN
    else:
        v[(*slot, 3)] = what
    o, lse = run(q, k, v)
    others = [0, 1, 3]
    assert torch.equal(o[others], clean[0][others]) and torch.equal(lse[others], clean[1][others])
    if where == "query":
        pages = attend(implementation, tensors, q, sinks=4, window=8)
        assert pages[0][2, 0].isnan().all() and pages[1][2, 0].isnan()
        assert o[2, 0].isnan().all() and lse[2, 0].isnan().all()
        assert torch.equal(o[2, 1], clean[0][2, 1])
    elif where == "key":
        assert o[2].isnan().all() and lse[2].isnan().all()
    else:
        assert not torch.isfinite(o[2, ..., 3]).any() and torch.equal(lse[2], clean[1][2])
        rest = [d for d in range(64) if d != 3]
        torch.testing.assert_close(o[2][..., rest], clean[0][2][..., rest], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_merged_states_keep_nan(implementation):
    """A state that is NaN is not taken for an empty one."""
    o, lse = torch.ones(3, 2, 64, device=DEVICE), torch.zeros(3, 2, device=DEVICE)
    lse[0, 0], lse[1, 1] = torch.nan, -torch.inf
    parts = [(o[:, i].contiguous(), lse[:, i].contiguous()) for i in (0, 1)]
    for got in (
        operation(merge, "merge_many_states", implementation)(o, lse),
        operation(merge, "merge_states", implementation)(*parts[0], *parts[1]),
    ):
        assert got[0][0].isnan().all() and got[1][0].isnan()
        assert (got[0][1:] == 1).all() and torch.isfinite(got[1][1:]).all()


@implementations
def test_rows_of_no_and_of_one_token(rng, implementation):
    """(0, -inf), and the token's value and score: in a window, a sink's slot, a page."""
    lengths = (0, 1, 0, 1)
    arrays = make_pages(rng, PageSpec("16x8", "16x8", 64, 1, lengths))
    queries = make_queries(rng, shape=(4, 2, 1, 64), size=3.0)
    for sinks, wide in ((0, 4), (2, 1)):
        tokens = make_exact_tokens(
            rng, lengths=lengths, kv_heads=1, head_dim=64, sinks=sinks, window=wide
        )
        o, lse = check_spectral(implementation, arrays, queries, tokens=tokens)
        assert not o[[0, 2]].any() and lse[[0, 2]].isneginf().all()
        for b in (1, 3):
            value = tokens.v[tokens.seq_ids[b], 0, 0]
            assert np.abs(to_numpy(o)[b] - value).max() <= 2**-20 * np.abs(value).max()
    o, lse = check_spectral(implementation, arrays, queries)
    assert not o[[0, 2]].any() and torch.isfinite(lse[[1, 3]]).all()


# ---- far positions, large offsets ----------------------------------------------------------------

FAR = 1_000_000


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_at_a_million(rng, implementation):
    """Appended and encoded at positions past 1,000,000, in the last of 15,626 pages of its row: the
    codes are those of the exact angles, the slot is the position's."""
    tokens, pages = 3, (FAR + 2) // 64 + 1
    arrays = make_pages(rng, PageSpec("16x8+16x4", "48x4", 64, 1, (tokens,), 512))
    page = arrays.block_table[0, 0]
    arrays = dataclasses.replace(
        arrays,
        block_table=np.full((1, pages), GARBAGE_INDEX, np.int32),
        seq_lens=np.array([FAR + tokens], np.int32),
    )
    arrays.block_table[0, -1] = page  # FAR is the first position of its page
    x = [make_tokens(rng, arrays, [tokens], F32) for _ in SIDES]
    for name in ("append", "encode"):
        tensors = pages_of(arrays)
        before = [codes_now(arrays, tensors, side) for side in SIDES]
        exact = [poisoned(1, 1, 12, 64) for _ in SIDES]
        run = operation(compress, name, implementation)
        table = tensors.block_table, tensors.seq_lens
        if name == "append":
            run(
                x[0][1], x[1][1], tensors.codec, tensors.k_pages, tensors.v_pages, *exact, *table,
                sinks=4,
            )  # fmt: skip
        else:
            for i, side in enumerate(SIDES):
                run(
                    x[i][1], tensors.codec, tensors.pages(side), *table, side=side, exact=exact[i],
                    sinks=4,
                )  # fmt: skip
        for i, side in enumerate(SIDES):
            check_codes(arrays, tensors, x[i][0], [tokens], side, F32, before[i])
            slots = [4 + (FAR + n - 4) % 8 for n in range(tokens)]
            np.testing.assert_array_equal(to_numpy(exact[i])[0, 0, slots], x[i][0][0, 0])


def test_queries_projected_for_the_frame_at_a_million(rng):
    """u and bias of frames that begin at 2**20 and 2**21: int64 angles."""
    codec, used = make_codec(rng, PageSpec("16x8", "16x8", 64, 1, (0,), 2**20))
    queries = make_queries(rng, shape=(1, 2, 1, 64))
    got = rope.project_queries(queries.tensor, codec_of(codec), 3)
    expected = project_oracle(queries.q, codec, used, 3)
    allowed = budgets.project_queries(queries.q, codec, used)
    # The oracle's angle is a float64 product: off by 2**21 * 2**-53 turns at most.
    for value, wanted, budget in zip(got, expected, allowed, strict=True):
        budgets.check(value, wanted, np.broadcast_to(budget, wanted.shape))


@pytest.mark.parametrize("implementation", HEAVY)
def test_attention_at_a_million(rng, implementation):
    """A row of 1,000,100 tokens whose pages before the last two are sinks: a query there scores the
    keys as one turned back by a million positions scores them in a row that begins there."""
    start, length, frame = 1953 * 512, 100, 512
    arrays = make_pages(rng, PageSpec("16x8+16x4", "32x4", 64, 1, (length,), frame))
    queries = make_queries(rng, shape=(1, 2, 1, 64), size=2.0)
    inv_freq = arrays.codec.inv_freq
    turned = rope_oracle.rotate(queries.q, np.array([-start]), inv_freq)
    near = Queries(turned, torch.from_numpy(np.float32(turned)).to(DEVICE))
    expected, (o_budget, lse_budget) = spectral_oracle(near, arrays, implementation)
    far = dataclasses.replace(
        arrays,
        block_table=np.concatenate(
            (np.zeros((1, start // 64), np.int32), arrays.block_table), axis=1
        ),
        seq_lens=np.array([start + length], np.int32),
    )
    o, lse = attend(implementation, pages_of(far), queries.tensor, sinks=start)
    # The score's own rounding of the turned query to float32 is in neither: twice the budget.
    budgets.check(o, expected.o, 2 * o_budget, "o")
    budgets.check(lse, expected.lse, 2 * lse_budget, "lse")


@pytest.mark.parametrize("implementation", ["triton", "scalar"])
def test_offsets_past_two_to_the_31(rng, implementation):
    """Pages and slots 2**30 bytes and elements apart: the bits of those that lie close."""
    arrays, queries, tokens = make_step(
        rng, ("16x8", "48x4", 64, 64, 64, 1, 2, (70, 9), (2, 8, 0), 1, 0, F32, F32)
    )
    tensors = pages_of(arrays, shared=False)
    gap = 2**30

    def apart(x: torch.Tensor) -> torch.Tensor:
        """The same with its first dimension's elements `gap` apart; only what is used exists."""
        room = torch.empty((len(x) - 1) * gap + x[0].numel(), dtype=x.dtype, device=x.device)
        wide = room.as_strided(x.shape, (gap, *x.stride()[1:]))
        return wide.copy_(x)

    far = dataclasses.replace(
        tensors, k_pages=apart(tensors.k_pages), v_pages=apart(tensors.v_pages)
    )
    exact = [apart(x) for x in tokens.tensors]
    assert len(far.k_pages) > 2 and len(exact[0]) > 2
    options = {"sinks": 2, "window": 8, "seq_ids": tokens.ids}
    near_state = attend(implementation, tensors, queries.tensor, exact=tokens.tensors, **options)
    far_state = attend(implementation, far, queries.tensor, exact=tuple(exact), **options)
    assert all(torch.equal(a, b) for a, b in zip(near_state, far_state, strict=True))
    if implementation == "scalar":
        return
    x = make_queries(rng, shape=(2, 1, 1, 64)).tensor
    for t, slots in ((tensors, tokens.tensors), (far, exact)):
        operation(compress, "append", implementation)(
            x, x, t.codec, t.k_pages, t.v_pages, *slots, t.block_table, t.seq_lens,
            sinks=2, seq_ids=tokens.ids,
        )  # fmt: skip
        operation(compress, "encode", implementation)(
            x, t.codec, t.k_pages, t.block_table, t.seq_lens, side="k", exact=slots[0], sinks=2,
            seq_ids=tokens.ids,
        )  # fmt: skip
    for a, b in zip((*tokens.tensors, tensors.k_pages, tensors.v_pages),
                    (*exact, far.k_pages, far.v_pages), strict=True):  # fmt: skip
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    a, b = (
        operation(compress, "decode", implementation)(
            t.k_pages, t.codec, t.block_table, t.seq_lens, side="k"
        )
        for t in (tensors, far)
    )
    assert torch.equal(a, b)


# ---- degenerate tokens, long sums ----------------------------------------------------------------


class Flat(Model):
    """A cache whose tokens all lie in one direction, or are all zero."""

    size = 1.0

    def random(self, *shape: int) -> torch.Tensor:
        x = super().random(*shape)
        if shape[0] == 2:  # keys and values, not queries
            x = self.size * x[..., :1] * torch.linspace(-1, 1, shape[-1], device=DEVICE)
        return x


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_prompts_of_one_direction(size):
    model = Flat(seed=11)
    model.size = size
    model.store([150, 70], prompt=True)
    model.check()
    for _ in range(2):
        model.store([2, 2], prompt=False)
        model.check(2)
    model.check_past()


@implementations
def test_constant_values(rng, implementation):
    """All values alike: that value is the output, whatever the weights; the budget of weights and
    scores is zero then, only sums may round."""
    arrays = make_pages(rng, PageSpec("16x8+16x4", "32x4+16x2", 64, 1, (140,), 64))
    bands = arrays.codec.v_bands
    codes = layout_oracle.unpack_codes(arrays.v_pages, bands, "v")
    codes[:] = codes[arrays.block_table[0, 0], 0, 0]
    arrays.v_pages[:] = layout_oracle.pack_codes(codes, bands, "v")
    for size in (0.0, 3.0, 100.0):
        queries = make_queries(rng, shape=(1, 2, 1, 64), size=size)
        check_spectral(implementation, arrays, queries)


@pytest.mark.parametrize("implementation", HEAVY)
def test_long_sums(rng, implementation):
    """128K tokens whose values share a mean that is 50 times their spread: weights and values are
    added up 2,048 pages long, and what may be lost is what adding them one by one may lose."""
    few, pages = 32, 2048  # pages of the pool, and of the row, which repeats them
    arrays = make_pages(rng, PageSpec("16x8", "16x8", 64, 1, (64 * few,), 512, 0))
    near = rng.integers(250, 254, (len(arrays.v_pages), 1, 64, 16))
    arrays.v_pages[:] = layout_oracle.pack_codes(near, arrays.codec.v_bands, "v")
    arrays.codec.v_basis[:] = np.abs(arrays.codec.v_basis)  # no sum of components cancels
    arrays = dataclasses.replace(
        arrays,
        block_table=np.tile(arrays.block_table[:, :few], (1, pages // few)),
        seq_lens=np.array([64 * pages], np.int32),
    )
    queries = make_queries(rng, shape=(1, 1, 1, 64), size=0.5)
    expected, (o_budget, lse_budget) = spectral_oracle(queries, arrays, implementation)
    o, lse = attend(implementation, pages_of(arrays), queries.tensor)
    budgets.check(o, expected.o, o_budget, "o")
    budgets.check(lse, expected.lse, lse_budget, "lse")
    mean = np.abs(expected.o)
    assert (expected.values.std(2) < mean[:, :, 0] / 50).all()
    assert (o_budget < mean / 200).all()  # a sum in half precision loses more
    half = np.float16(expected.weights @ np.float16(expected.values)[:, :1] / 3)
    budgets.check_rejects(3 * np.float64(half), expected.o, o_budget, "half precision sums")


# ---- the same bits -------------------------------------------------------------------------------


def test_a_cache_repeats_bit_for_bit():
    """The same inputs, the same capacity: the same pages, slots and outputs."""
    found = []
    for _ in range(2):
        model = Model(make_model_codec(3, 3, 1), seed=5)
        model.store([140, 70], prompt=True)
        for _ in range(2):
            model.replay()
        model.reorder([1, 1])
        model.rollback([3, 40])
        model.replay()
        cache = model.cache
        q = model.random(len(model.rows), HEADS, 1, 64)
        outs = [cache.attend(layer, q) for layer in range(len(BANDS))]
        found.append([*cache.k_pages, *cache.v_pages, *cache.k_exact, *cache.v_exact, *outs])
    assert found[0][0].shape[1] == KV_HEADS
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@implementations
def test_a_row_does_not_see_its_neighbours(rng, implementation):
    """Attention: the same bits whatever tokens and queries the other rows of the batch hold. (Other
    lengths or rows may change how a row's pages are shared out among programs, and so how sums
    round: what they give is within the budget, as every test of the oracle shows.)"""
    arrays, queries, tokens = make_step(rng, STEP)
    others, _, other_tokens = make_step(np.random.default_rng(1), STEP)
    tensors, q = pages_of(arrays), queries.tensor
    options = {"sinks": 4, "window": 8, "seq_ids": tokens.ids}
    before = attend(implementation, tensors, q, exact=tokens.tensors, **options)
    mine = 2
    kept = arrays.block_table[mine, : -(-int(arrays.seq_lens[mine]) // 64)]
    for side in SIDES:
        changed = np.array(others.pages(side))
        changed[kept] = arrays.pages(side)[kept]
        tensors.pages(side).copy_(torch.from_numpy(changed))
    exact = [x.nan_to_num(3.0) * -2 for x in other_tokens.tensors]
    for x, y in zip(exact, tokens.tensors, strict=True):
        x[tokens.seq_ids[mine]] = y[tokens.seq_ids[mine]]
    q = torch.where(torch.arange(4, device=DEVICE)[:, None, None] == mine, q, 5 - 3 * q)
    after = attend(implementation, tensors, q, exact=tuple(exact), **options)
    assert all(torch.equal(a[mine], b[mine]) for a, b in zip(before, after, strict=True))
    assert not torch.equal(before[0][0], after[0][0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["encode", "append"])
def test_a_page_is_a_function_of_its_tokens(rng, implementation, name):
    """Stored alone or in any batch, at once with others or not: the same bytes and slots."""
    lengths, news = (130, 64, 9), [3, 3, 3]
    arrays = make_pages(rng, PageSpec("16x8+16x4", "48x4", 64, 1, lengths, 64), blank=True)
    x = [strided(make_tokens(rng, arrays, news, F32)[1], "plain") for _ in SIDES]
    run = operation(compress, name, implementation)

    def stored(rows: list[int]) -> tuple[torch.Tensor, ...]:
        tensors = pages_of(arrays, shared=False)
        exact = [torch.zeros(3, 1, 8, 64, device=DEVICE) for _ in SIDES]
        table, lens = tensors.block_table[rows], tensors.seq_lens[rows]
        ids, new = int32(np.array(rows)), [t[rows] for t in x]
        if name == "append":
            pages = tensors.k_pages, tensors.v_pages
            run(*new, tensors.codec, *pages, *exact, table, lens, sinks=2, seq_ids=ids)
        else:
            for i, side in enumerate(SIDES):
                run(
                    new[i], tensors.codec, tensors.pages(side), table, lens, side=side,
                    exact=exact[i], sinks=2, seq_ids=ids,
                )  # fmt: skip
        return tensors.k_pages, tensors.v_pages, *exact

    whole = stored([0, 1, 2])
    for row in range(3):
        alone = stored([row])
        pages = arrays.block_table[row, : -(-lengths[row] // 64)]
        for i in (0, 1):
            assert torch.equal(whole[i][pages], alone[i][pages])
            assert torch.equal(whole[2 + i][row], alone[2 + i][row])


def test_codes_at_a_boundary_are_the_same_in_any_batch(rng, monkeypatch):
    """Offsets are the coefficients of every other row's tokens, so that how their sums round
    decides their codes: those of tokens that share a program are those of tokens that do not."""
    batch, tokens = 9, 3
    arrays = make_pages(rng, PageSpec("64x4", "48x4", 64, 1, (3,) * batch, 64), blank=True)
    x = rng.standard_normal((1, 1, 1, 64)).astype(np.float32)
    exact_c = compress_oracle.coefficients(x[0], np.zeros(1), arrays.codec, 0, "k")
    arrays.codec.k_offset[:] += exact_c[0]
    new = rng.standard_normal((batch, 1, tokens, 64)).astype(np.float32)
    new[::2] = x
    new = torch.from_numpy(new).to(DEVICE)
    run, found = operation(compress, "append", "triton"), []
    for multiprocessors in (10**6, 1):
        monkeypatch.setattr(_launch, "multiprocessors", lambda device, n=multiprocessors: n)
        tensors = pages_of(arrays)
        exact = [torch.zeros(batch, 1, 8, 64, device=DEVICE) for _ in SIDES]
        run(
            new, new, tensors.codec, tensors.k_pages, tensors.v_pages, *exact, tensors.block_table,
            tensors.seq_lens, sinks=2,
        )  # fmt: skip
        found.append((tensors.pool, *exact))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    codes = layout_oracle.codes_by_position(
        tensors.k_pages.cpu().numpy(), arrays.block_table[0], tokens, arrays.codec.bands("k"), "k"
    )
    assert np.isin(codes, (7, 8)).all()
