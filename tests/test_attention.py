"""spectral_kernels/attention.py against reference/attention.py."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from reference import attention as oracle
from reference import compress as compress_oracle
from reference import layout as layout_oracle
from reference import rope as rope_oracle
from reference import window as window_oracle
from reference.compress import PageArrays
from spectral_kernels import _launch, attention, merge, window
from spectral_kernels._math import row_of_program, row_share, row_splits
from spectral_kernels.layout import Bands, PageLayout
from tests import budgets
from tests.cases import (
    ATTENTION_IMPLEMENTATIONS,
    DEVICE,
    DTYPES,
    F64,
    IMPLEMENTATIONS,
    PAGE,
    ExactTokens,
    PageSpec,
    Queries,
    is_slow,
    make_exact_tokens,
    make_pages,
    make_queries,
    operation,
    pages_of,
    poisoned,
    swap_nibbles,
)
from tests.test_rope import project_oracle
from tests.test_window import check_state, window_oracle_state

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def frames_of(arrays: PageArrays) -> int:
    return -(-int(arrays.seq_lens.max(initial=0)) // arrays.codec.frame)


def spectral_oracle(
    queries: Queries,
    arrays: PageArrays,
    implementation: str,
    *,
    sinks: int = 0,
    window: int = 0,
    scale: float | None = None,
) -> tuple[oracle.State, tuple[F64, F64]]:
    """(state, budget) of the pages alone."""
    expected = oracle.spectral(queries.q, arrays, sinks=sinks, window=window, scale=scale)
    u = project_oracle(queries.q, arrays.codec, arrays.rows, frames_of(arrays))
    integer = implementation != "torch"
    return expected, budgets.attend_spectral(
        queries.q, expected, arrays, u, scale=scale, integer=integer
    )


def joint_oracle(
    queries: Queries,
    arrays: PageArrays,
    tokens: ExactTokens,
    implementation: str,
    *,
    scale: float | None = None,
) -> tuple[oracle.State, tuple[F64, F64]]:
    """(state, budget) of the pages and the exact tokens beside them."""
    cut = {"sinks": tokens.sinks, "window": tokens.window}
    cold, allowed = spectral_oracle(queries, arrays, implementation, **cut, scale=scale)
    exact = window_oracle_state(queries, tokens, arrays.seq_lens, scale)
    both = [allowed, budgets.attend_window(queries.q, exact, scale=scale)]
    (o, lse), budget = budgets.joined([cold, exact], both)
    return dataclasses.replace(cold, o=o, lse=lse), budget


def check_spectral(
    implementation: str,
    arrays: PageArrays,
    queries: Queries,
    *,
    tokens: ExactTokens | None = None,
    sinks: int = 0,
    wide: int = 0,
    scale: float | None = None,
    shared: bool = True,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages alone over sinks .. seq_len - wide, or with exact tokens beside them: the whole decode
    step."""
    dtypes = [queries.tensor.dtype]
    if tokens is None:
        expected, budget = spectral_oracle(
            queries, arrays, implementation, sinks=sinks, window=wide, scale=scale
        )
    else:
        sinks, wide = tokens.sinks, tokens.window
        dtypes.append(tokens.tensors[0].dtype)
        settings |= {"exact": tokens.tensors, "seq_ids": tokens.ids}
        expected, budget = joint_oracle(queries, arrays, tokens, implementation, scale=scale)
    tensors = pages_of(arrays, shared=shared)
    run = operation(attention, "attend_spectral", implementation, *dtypes)
    got = run(
        queries.tensor,
        tensors.k_pages,
        tensors.v_pages,
        tensors.codec,
        tensors.block_table,
        tensors.seq_lens,
        sinks=sinks,
        window=wide,
        codec_ids=tensors.codec_ids,
        scale=scale,
        **queries.outputs,
        **settings,
    )
    check_state(got, expected, budget, queries)
    return got


SPECTRAL_CASES = [
    # K, V bands, D, rotary_dim, frame, G, heads a group, lengths, (sinks, window), Q, rows of the
    # codec, dtype, strides
    ("16x8+16x4+32x2", "32x4+32x2", 64, 64, 64, 2, 4, (0, 1, 130), (0, 0), 1, 2, F16, "swapped"),
    ("16x8+48x4", "64x4", 80, 40, 128, 1, 6, (65, 140), (4, 16), 2, 0, F32, "odd"),
    ("96x4", "96x2", 96, 96, 64, 1, 1, (128, 129), (0, 1), 1, 1, F16, "plain"),
    ("16x8+16x4+96x2", "64x4+64x2", 128, 128, 64, 1, 4, (190,), (4, 32), 4, 0, BF16, "plain"),
    ("48x4", "16x8", 128, 128, 512, 1, 8, (66,), (0, 2), 1, 0, F16, "padded"),
    ("16x8+240x2", "256x2", 256, 64, 64, 1, 1, (70, 5), (4, 1), 1, 2, F32, "swapped"),
    ("128x8", "128x8", 64, 64, 64, 1, 2, (66,), (0, 0), 3, 0, F32, "plain"),
]


def skip_slow_scalar(implementation: str, large: bool) -> None:
    """In the interpreter the kernels without matrix units take half a minute for a large case."""
    if large and implementation == "scalar" and is_slow(implementation):
        pytest.skip("slow in the interpreter")


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("case", SPECTRAL_CASES, ids=lambda c: f"{c[0]}-{c[1]}-D{c[2]}-Q{c[9]}")
def test_attend_spectral(rng, implementation, case):
    """Pages alone: empty rows, rows that cross pages and frames, views of a pool, several
    queries."""
    k, v, dim, rotary, frame, groups, group, lengths, exact, count, codecs, dtype, stride = case
    skip_slow_scalar(implementation, dim > 96)
    spec = PageSpec(k, v, dim, groups, lengths, frame, rotary, codecs=codecs)
    arrays = make_pages(rng, spec)
    queries = make_queries(
        rng,
        shape=(len(lengths), groups * group, count, dim),
        dtype=dtype,
        size=2.0,
        stride=stride,
        flat=count == 1,
    )
    check_spectral(
        implementation, arrays, queries, sinks=exact[0], wide=exact[1], shared=codecs != 1
    )


STEP_CASES = [
    # K, V bands, D, rotary, frame, G, heads a group, lengths, (sinks, window, drafts), Q, codec
    # rows, q and exact dtype
    (
        "16x8+16x4+32x2", "32x4+32x2", 64, 64, 64, 2, 4,
        (0, 1, 21, 150), (4, 16, 0), 1, 2, F16, F16,
    ),
    ("16x8+48x4", "64x4", 80, 40, 128, 1, 6, (145, 9), (4, 8, 3), 4, 0, F32, F32),
    ("16x8+16x4+96x2", "64x4+64x2", 128, 128, 64, 1, 4, (170,), (4, 32, 0), 1, 0, BF16, BF16),
    ("32x8", "48x4", 64, 64, 512, 1, 8, (80,), (0, 16, 1), 2, 1, F16, F32),
    ("16x8", "16x8", 256, 64, 64, 1, 1, (131, 2), (2, 3, 0), 3, 0, F32, F16),
    ("16x8", "32x4", 64, 64, 64, 1, 6, (90,), (4, 16, 0), 16, 0, F16, F16),
]  # fmt: skip


def make_step(rng: np.random.Generator, case: tuple) -> tuple[PageArrays, Queries, ExactTokens]:
    k, v, dim, rotary, frame, groups, group, lengths, exact, count, codecs, q_dtype, dtype = case
    spec = PageSpec(k, v, dim, groups, lengths, frame, rotary, codecs=codecs)
    tokens = make_exact_tokens(
        rng,
        lengths=lengths,
        kv_heads=groups,
        head_dim=dim,
        sinks=exact[0],
        window=exact[1],
        drafts=exact[2],
        dtype=dtype,
        permuted=len(lengths) > 1,
    )
    shape = (len(lengths), groups * group, count, dim)
    queries = make_queries(rng, shape=shape, dtype=q_dtype, flat=count == 1, size=2.0)
    return make_pages(rng, spec), queries, tokens


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("case", STEP_CASES, ids=lambda c: f"{c[0]}-{c[1]}-D{c[2]}-Q{c[9]}")
def test_whole_step(rng, implementation, case):
    """`attend_spectral(.., exact=..)` is the state of both sets of tokens: each token once, none
    left out."""
    skip_slow_scalar(implementation, case[2] > 64 or case[9] > 4)
    arrays, queries, tokens = make_step(rng, case)
    check_spectral(implementation, arrays, queries, tokens=tokens)


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_every_border(rng, implementation):
    """A whole step at lengths around the borders of sinks, window, pages and frames, to the
    token."""
    sinks, wide = 4, 8
    edges = (0, sinks, sinks + wide, PAGE, PAGE + wide, 2 * PAGE, 2 * PAGE + wide)
    lengths = sorted({max(0, edge + off) for edge in edges for off in (-1, 0, 1)})
    if is_slow(implementation):
        lengths = [n for n in lengths if n in (3, 5, 12, 13, 63, 64, 72, 73, 129, 137)]
    spec = PageSpec("16x8", "16x8", 64, 1, lengths, 64)
    tokens = make_exact_tokens(
        rng, lengths=lengths, kv_heads=1, head_dim=64, sinks=sinks, window=wide
    )
    queries = make_queries(rng, shape=(len(lengths), 1, 1, 64), size=2.0, flat=True)
    check_spectral(implementation, make_pages(rng, spec), queries, tokens=tokens)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_more_sinks_than_a_turn_has_pages_for(rng, implementation, num_splits):
    """Turns of sinks alone, of sinks and others, of tokens that are all seen, and the last; splits
    of sinks alone."""
    sinks, lengths = 8 * PAGE + 90, (32 * PAGE,)
    arrays = make_pages(rng, PageSpec("16x8", "16x8", 64, 1, lengths, 2 * PAGE))
    tokens = make_exact_tokens(rng, lengths=lengths, kv_heads=1, head_dim=64, sinks=sinks, window=8)
    queries = make_queries(rng, shape=(1, 1, 1, 64), size=2.0)
    check_spectral(implementation, arrays, queries, tokens=tokens, num_splits=num_splits)


@pytest.mark.parametrize("pages", [40, 48])
def test_a_single_row_that_all_programs_share(rng, pages):
    """Without a GPU there are two, one of which a row of 40 pages leaves without any."""
    arrays = make_pages(rng, PageSpec("16x8", "16x8", 64, 1, (pages * PAGE,), spare_pages=8))
    queries = make_queries(rng, shape=(1, 1, 1, 64), size=2.0)
    check_spectral("triton", arrays, queries)


def test_a_short_row_alone_in_a_large_table(rng, monkeypatch):
    """Its exact tokens' programs come before those that a long row would have work for, half of
    them here. 32 queries of a KV head are two programs' each."""
    plan_launch = attention.plan_launch
    monkeypatch.setattr(
        attention, "plan_launch", lambda *args: dataclasses.replace(plan_launch(*args), few=3)
    )
    lengths = (3 * PAGE + 5,)
    arrays = make_pages(rng, PageSpec("16x8", "16x8", 64, 2, lengths, spare_pages=60))
    tokens = make_exact_tokens(rng, lengths=lengths, kv_heads=2, head_dim=64, sinks=4, window=40)
    queries = make_queries(rng, shape=(1, 16, 4, 64), size=2.0)
    check_spectral("triton", arrays, queries, tokens=tokens)


@pytest.mark.parametrize("at_once", [(1, 1), (1, 2), (1, 4)])
@pytest.mark.parametrize("cores", [1, 1 << 20])
def test_join(rng, cores, at_once, monkeypatch):
    """Rows of three splits, one and none are joined in a round or more; three queries of a KV head
    together, or one where programs are few."""
    plan_launch = attention.plan_launch

    def planned(*args):
        return dataclasses.replace(plan_launch(*args), splits=at_once)

    monkeypatch.setattr(attention, "plan_launch", planned)
    monkeypatch.setattr(_launch, "multiprocessors", lambda device: cores)
    lengths = (1100, 200, 0)
    arrays = make_pages(rng, PageSpec("16x8", "16x8", 64, 1, lengths, 128))
    tokens = make_exact_tokens(rng, lengths=lengths, kv_heads=1, head_dim=64, sinks=2, window=40)
    queries = make_queries(rng, shape=(3, 3, 1, 64), size=2.0)
    dirty = torch.full((1 << 22,), 255, dtype=torch.uint8, device=DEVICE)
    check_spectral("triton", arrays, queries, tokens=tokens, num_splits=3, workspace=dirty)
    # Few tokens in the first split: larger scores come later.
    check_spectral("triton", arrays, queries, sinks=450, num_splits=3, workspace=dirty)


@pytest.mark.parametrize(
    ("implementation", "num_splits"),
    [("triton", 1), ("triton", 2), ("triton", 3), ("triton", 100), ("scalar", 1)],
)
def test_splits(rng, implementation, num_splits):
    """Shares of unequal length, some of none; one that ends inside a frame."""
    lengths = (10, 600)  # warps and programs meet larger scores in later pages
    arrays = make_pages(rng, PageSpec("32x4", "32x4", 64, 1, lengths, 128))
    queries = make_queries(rng, shape=(2, 2, 1, 64), size=2.0)
    tokens = make_exact_tokens(rng, lengths=lengths, kv_heads=1, head_dim=64, sinks=2, window=40)
    check_spectral(implementation, arrays, queries, num_splits=num_splits)
    check_spectral(implementation, arrays, queries, tokens=tokens, num_splits=num_splits)


@pytest.mark.parametrize(("implementation", "turn"), [("triton", 8), ("scalar", 1)])
def test_a_split_without_pages(rng, implementation, turn):
    """Five turns for four splits, two each: the last one has none, and what it never wrote is not
    used."""
    arrays = make_pages(rng, PageSpec("16x8", "16x8", 64, 1, (5 * turn * PAGE,), 128))
    queries = make_queries(rng, shape=(1, 2, 1, 64), size=2.0)
    dirty = torch.full((1 << 22,), 255, dtype=torch.uint8, device=DEVICE)
    check_spectral(implementation, arrays, queries, num_splits=4, workspace=dirty)


@triton.jit
def _programs_kernel(
    seq_lens_ptr, out_ptr, B, programs, SINKS: tl.constexpr, WINDOW: tl.constexpr,
    TURN: tl.constexpr, FEW: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """(row, first page, end) of every program, or (-1, 0, 0)."""
    program = tl.program_id(0)
    splits_of = row_splits(seq_lens_ptr, B, programs, (SINKS, WINDOW), TURN, FEW, BLOCK_B)
    b, split, splits = row_of_program(splits_of, program, B, BLOCK_B)
    tl.store(out_ptr + program * 3, -1)
    if split < splits:
        page, end, _ = row_share(tl.load(seq_lens_ptr + b), split, splits, SINKS, WINDOW, TURN)
        tl.store(out_ptr + program * 3, b)
        tl.store(out_ptr + program * 3 + 1, page)
        tl.store(out_ptr + program * 3 + 2, end)


@pytest.mark.parametrize(
    ("turn", "frame", "kv_heads", "num_splits"),
    [(8, 512, 8, None), (8, 512, 64, None), (8, 512, 8, 3), (4, 576, 8, None), (1, 512, 16, None)],
)
@pytest.mark.parametrize(
    "seq_lens",
    [
        [0], [1], [1000], [70_000], [64 * 700 + 1] * 4, [0, 0, 0], [131_072] + [2048] * 63,
        [5, 0, 300, 20_000, 0, 64], [64] * 40, [131_072] * 3 + [0] * 10,
    ],
)  # fmt: skip
def test_programs_share_all_pages(seq_lens, num_splits, kv_heads, frame, turn, monkeypatch):
    """Every page of every row has one program; the plan has room for them and for the frames of
    the longest share, which may start inside one; a long row beside short ones is shared as rows
    of its length are."""
    monkeypatch.setattr(_launch, "multiprocessors", lambda device: 132)
    sinks, window, batch = 4, 64, len(seq_lens)
    capacity = 2048 if turn != 4 else max(seq_lens) // PAGE + 1  # no room to spare
    layout = PageLayout(Bands.parse("16x8"), Bands.parse("16x8"), 64, frame)
    device = torch.device("cuda:0")  # named only
    plan = attention.plan_launch(
        layout, batch, kv_heads, 4, 1, capacity, 0, device, num_splits, turn > 1
    )
    assert plan.warps * plan.pages == turn
    out = torch.zeros(plan.states, 3, dtype=torch.int32, device=DEVICE)
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
    _programs_kernel[(plan.states,)](
        lens, out, batch, plan.programs, sinks, window, turn, FEW=plan.few, BLOCK_B=plan.block_b
    )  # fmt: skip
    pages = [-(-max(n - window, 0) // PAGE) if n - window > sinks else 0 for n in seq_lens]
    covered: list[list[int]] = [[] for _ in seq_lens]
    shares = [0]
    for row, page, end in out.tolist():
        if row >= 0 and page < end:
            covered[row] += range(page, end)
            shares.append(end - page)
            if turn > 1:  # elsewhere a whole row is projected at once
                assert (end - 1) * PAGE // frame - page * PAGE // frame < plan.frames
    assert covered == [list(range(n)) for n in pages]
    turns, programs = sum(-(-n // turn) for n in pages), max(1, plan.programs * plan.few // 6)
    assert max(shares) <= turn * 2 * -(-turns // programs)


def test_programs_have_memory_of_their_own(rng, monkeypatch):
    """The projected queries of a program and the parts of its warps lie where no other one writes.
    (In the interpreter, where programs run one after another, results do not show it.)"""
    states, plans, parts, plan_launch = [], [], attention._parts, attention.plan_launch

    def dirty(workspace, sizes, device):
        workspace = torch.full((sum(sizes),), 255, dtype=torch.uint8, device=device)  # NaN
        states[:] = parts(workspace, sizes, device)
        return tuple(states)

    def planned(*args):
        plans[:] = [plan_launch(*args)]
        return plans[0]

    monkeypatch.setattr(attention, "_parts", dirty)
    monkeypatch.setattr(attention, "plan_launch", planned)
    lengths, frame, rank = (2600, 200), 128, 16
    arrays = make_pages(rng, PageSpec("16x8", "16x8", 64, 2, lengths, frame))
    queries = make_queries(rng, shape=(2, 16, 4, 64), size=2.0)  # 32 a KV head
    check_spectral("triton", arrays, queries, num_splits=3)
    (plan,), lens = plans, torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    assert plan.blocks > 1
    shares = torch.zeros(plan.states, 3, dtype=torch.int32, device=DEVICE)
    _programs_kernel[(plan.states,)](
        lens, shares, 2, plan.programs, 0, 0, plan.warps * plan.pages, FEW=plan.few,
        BLOCK_B=plan.block_b,
    )  # fmt: skip
    shares = [(page, end) for _, page, end in shares.tolist() if page < end]
    frames = sum(-(-end * PAGE // frame) - page * PAGE // frame for page, end in shares)
    affine = states[0].view(torch.float32).view(-1, plan.rows * (-(-rank // 32) * 16 + 2))
    written = [int((~x.isnan()).sum()) for x in (affine[:, -2 * plan.rows :], states[5])]
    assert len(shares) > 2
    programs = len(shares) * plan.blocks * 2
    assert written == [frames * 2 * 32 * 2, programs * plan.warps * plan.rows * rank]


@pytest.mark.parametrize(
    ("dim", "kv_heads", "group", "batch", "queries", "most"),
    [(128, 8, 4, 8, 1, 3), (128, 8, 8, 8, 1, 3), (64, 2, 6, 8, 1, 3), (128, 8, 4, 8, 4, 2)]
    + [(128, 8, 4, 1, 1, 1.5), (64, 2, 6, 1, 1, 1), (128, 8, 4, 1, 4, 2), (256, 2, 8, 8, 1, 1)],
)
def test_programs_of_few_pages(dim, kv_heads, group, batch, queries, most, monkeypatch):
    """On a multiprocessor of the card at most three run, two of 16 queries, about one of a single
    row of fewer, and hardly fewer: each of them takes more pages."""
    monkeypatch.setattr(_launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(_launch, "has_matrix_units", lambda device: True)
    layout = PageLayout(Bands.parse("32x4+64x2"), Bands.parse("32x4+64x2"), dim)
    shape = (batch, kv_heads, group, queries, 32, 132)
    plan = attention.plan_launch(layout, *shape, torch.device("cuda:0"))
    running = plan.programs * plan.few // 6 * kv_heads * plan.blocks / 132
    assert 0.8 * most < running <= most


@pytest.mark.parametrize(
    ("dim", "v", "group", "queries", "frame", "wanted"),
    [(128, "128x2", 4, 1, 512, 8), (128, "128x2", 4, 2, 512, 8), (256, "16x8", 8, 1, 512, 8)]
    + [(128, "32x4+64x2", 4, 4, 512, 8), (128, "128x2", 4, 4, 512, 4), (256, "16x8", 8, 4, 512, 4)]
    + [(128, "32x4+64x2", 4, 4, 64, 4)],
)
def test_pages_at_once(dim, v, group, queries, frame, wanted, monkeypatch):
    """Eight, but of 16 queries only where registers hold two pages' scores beside the sums of V's
    components, and never two pages of a warp with queries of two frames."""
    monkeypatch.setattr(_launch, "multiprocessors", lambda device: 132)
    layout = PageLayout(Bands.parse("32x4"), Bands.parse(v), dim, frame)
    plan = attention.plan_launch(
        layout, 8, 8, group, queries, 512, 132, torch.device("cuda:0"), None, True
    )
    assert plan.warps * plan.pages == wanted


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("max_pages", [40, 300, 2080])
@pytest.mark.parametrize(
    "dim, kv_heads, group", [(128, 8, 4), (128, 4, 4), (64, 2, 6), (256, 2, 8)]
)
def test_a_power_of_two_compiles_for_smaller_batches(
    dim, kv_heads, group, max_pages, queries, monkeypatch
):
    """An engine captures steps of 1, 2, 4, 8 rows and so on before it serves: what is launched for
    another batch is compiled then, too."""
    card = {"multiprocessors": 132, "has_matrix_units": True}
    for name, value in card.items():
        monkeypatch.setattr(_launch, name, lambda device, value=value: value)
    launched: list[dict] = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **constants: launched.append(constants)

    monkeypatch.setattr(attention, "_finish_spectral_kernel", Recorder())
    layout = PageLayout(Bands.parse("16x8"), Bands.parse("16x8"), dim)
    codec = SimpleNamespace(layout=layout, kv_heads=kv_heads, v_basis=None, v_scale=None)

    def compiled(batch: int) -> tuple[Any, ...]:
        plan = attention.plan_launch(
            layout, batch, kv_heads, group, queries, max_pages, 132, torch.device("cuda:0")
        )
        shape, out = (batch, kv_heads * group, queries, dim), torch.empty(0)
        attention._launch_finish(
            (), codec, (None, None, None), out, out, shape, (4, 128, 128), plan
        )
        return plan.window, plan.rows, plan.m, plan.few, plan.block_b, plan.options, launched.pop()

    for batch in range(1, 257):
        assert compiled(batch) == compiled(1 << (batch - 1).bit_length()), batch


@pytest.mark.parametrize("rank", [16, 32, 96, 128, 192, 256])
@pytest.mark.parametrize("kv_heads, queries", [(1, 1), (1, 4), (2, 1), (8, 4)])
def test_registers_hold_what_is_joined_at_once(rank, kv_heads, queries, monkeypatch):
    """Of several queries: at most 128 numbers a thread. Of one: at most 64 by a warp alone, which
    has nothing to wait for; of more numbers, by two warps or more."""
    monkeypatch.setattr(_launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(_launch, "has_matrix_units", lambda device: True)
    launched: list[dict] = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **constants: launched.append(constants)

    monkeypatch.setattr(attention, "_finish_spectral_kernel", Recorder())
    layout = PageLayout(Bands.parse("16x8"), Bands.parse(f"{rank}x2"), 256)
    codec = SimpleNamespace(layout=layout, kv_heads=kv_heads, v_basis=None, v_scale=None)
    for batch in range(1, 65):
        plan = attention.plan_launch(
            layout, batch, kv_heads, 16, queries, 512, 132, torch.device("cuda:0")
        )
        shape, out = (batch, kv_heads * 16, queries, 256), torch.empty(0)
        attention._launch_finish(
            (), codec, (None, None, None), out, out, shape, (4, 128, 128), plan
        )
        one = launched.pop()
        numbers = one["BLOCK_N"][-1] * one["BLOCK_H"] * triton.next_power_of_2(rank)
        if one["BLOCK_H"] > 1:
            assert numbers <= 128 * 32 * one["num_warps"], batch
        else:
            numbers = (one["BLOCK_N"][-1] + one["BLOCK_D"]) * rank
            assert (one["num_warps"] == 1) == (numbers <= 64 * 32), batch


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_a_long_row_beside_short_ones(rng, implementation):
    spec = PageSpec("16x8", "32x4", 64, 1, (5, 64 * 45 + 3, 0, 70, 1), 64)
    queries = make_queries(rng, shape=(5, 2, 1, 64), size=2.0)
    check_spectral(implementation, make_pages(rng, spec), queries)


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_capacity_beyond_a_row(rng, implementation):
    """A table for many more pages than any row has: no entry past a row's length is read."""
    spec = PageSpec("16x8", "32x4", 64, 1, (70, 1), 64, spare_pages=30)
    queries = make_queries(rng, shape=(2, 2, 1, 64), size=2.0)
    check_spectral(implementation, make_pages(rng, spec), queries)


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3, 30.0, 1e4, 1e6, 1e7, 3e7])
def test_query_magnitudes(rng, implementation, size):
    """From scores that are all alike to a softmax that is one token."""
    arrays = make_pages(rng, PageSpec("16x8+16x4", "32x4", 64, 1, (90,), 64))
    check_spectral(implementation, arrays, make_queries(rng, shape=(1, 2, 1, 64), size=size))


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_pages_far_below_one_another(rng, implementation):
    """Largest scores of the pages of a warp that are farther apart than float32's exponents."""
    arrays = make_pages(rng, PageSpec("16x8+16x4", "32x4", 64, 1, (14 * PAGE,), 64))
    queries = make_queries(rng, shape=(1, 2, 1, 64), size=1e4)
    check_spectral(implementation, arrays, queries, num_splits=1)


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_softmax_scale(rng, implementation, scale):
    arrays = make_pages(rng, PageSpec("16x8+16x4", "32x4", 64, 1, (80,), 64))
    queries = make_queries(rng, shape=(1, 2, 1, 64))
    tokens = make_exact_tokens(rng, lengths=(80,), kv_heads=1, head_dim=64, sinks=4, window=8)
    check_spectral(implementation, arrays, queries, scale=scale)
    check_spectral(implementation, arrays, queries, tokens=tokens, scale=scale)


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_sets_without_tokens(rng, implementation):
    """Empty sets are (0, -inf) exactly: empty rows, a table of no page, all tokens in sinks or
    window."""
    for lengths, spare, sinks, wide in (
        ((0, 0), 2, 0, 0),
        ((0, 0), 0, 0, 0),
        ((70, 3), 1, 70, 0),
        ((70, 3), 1, 0, 70),
        ((70, 3), 1, 40, 40),
        ((70, 3), 1, 4, 66),
    ):
        arrays = make_pages(rng, PageSpec("16x8", "16x8", 64, 1, lengths, spare_pages=spare))
        queries = make_queries(rng, shape=(2, 2, 1, 64))
        o, lse = check_spectral(implementation, arrays, queries, sinks=sinks, wide=wide)
        assert not o.any() and lse.isneginf().all()
    lengths = (0, 0)
    arrays = make_pages(rng, PageSpec("16x8", "16x8", 64, 1, lengths))
    tokens = make_exact_tokens(rng, lengths=lengths, kv_heads=1, head_dim=64, sinks=4, window=8)
    for count in (1, 3):
        queries = make_queries(rng, shape=(2, 2, count, 64))
        o, lse = check_spectral(implementation, arrays, queries, tokens=tokens)
        assert not o.any() and lse.isneginf().all()


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_empty_rows_read_no_codec(rng, implementation):
    """Empty and short rows beside a longer one: what the unused row 0 of the codec holds, NaN,
    reaches no output."""
    arrays = make_pages(rng, PageSpec("16x8", "32x4", 64, 1, (0, 6, 80), codecs=1))
    used = int(arrays.rows[0])
    for name in ("k_basis", "k_scale", "k_mean", "v_basis", "v_scale"):
        table = getattr(arrays.codec, name)
        table[[used, 1]] = table[[1, used]]
    arrays.rows[:] = 1
    assert np.isnan(arrays.codec.v_scale[0]).all()
    queries = make_queries(rng, shape=(3, 2, 1, 64))
    check_spectral(implementation, arrays, queries)


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_no_queries(rng, implementation):
    tensors = pages_of(make_pages(rng, PageSpec("16x8", "16x8", 64, 1, (70,))))
    run = operation(attention, "attend_spectral", implementation)
    o, lse = run(
        torch.zeros(1, 2, 0, 64, device=DEVICE),
        tensors.k_pages,
        tensors.v_pages,
        tensors.codec,
        tensors.block_table,
        tensors.seq_lens,
    )
    assert tuple(o.shape) == (1, 2, 0, 64) and tuple(lse.shape) == (1, 2, 0)


SMALL_STEP = ("16x8+16x4", "32x4", 64, 64, 128, 1, 2, (145, 9), (4, 8, 3), 2, 0, F32, F32)


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_parts_merged_are_the_whole(rng, implementation):
    """Exact tokens alone and pages alone, merged, are the whole step: nothing is seen twice or by
    none. So are two runs of pages, with sinks and window cut elsewhere."""
    arrays, queries, tokens = make_step(rng, SMALL_STEP)
    tensors = pages_of(arrays)
    args = tensors.k_pages, tensors.v_pages, tensors.codec, tensors.block_table, tensors.seq_lens
    options = {"sinks": tokens.sinks, "window": tokens.window}
    run = operation(attention, "attend_spectral", implementation)
    alone = operation(window, "attend_window", implementation)
    pages = run(queries.tensor, *args, codec_ids=tensors.codec_ids, **options)
    exact = alone(queries.tensor, *tokens.tensors, tensors.seq_lens, seq_ids=tokens.ids, **options)
    expected = joint_oracle(queries, arrays, tokens, implementation)
    check_state(merge.merge_states_torch(*exact, *pages), *expected, queries)
    cuts = [{"sinks": 0, "window": 100}, {"sinks": 45, "window": 0}]  # 45 of 145 tokens, and 100
    one = dataclasses.replace(
        arrays, **{x: getattr(arrays, x)[:1] for x in ("block_table", "seq_lens", "rows")}
    )
    first = Queries(queries.q[:1], queries.tensor[:1])
    parts = [run(first.tensor, *args[:3], args[3][:1], args[4][:1], **cut) for cut in cuts]
    oracles = [spectral_oracle(first, one, implementation, **cut) for cut in cuts]
    _, budget = budgets.joined(*map(list, zip(*oracles, strict=True)))
    whole, _ = spectral_oracle(first, one, implementation)
    check_state(merge.merge_states_torch(*parts[0], *parts[1]), whole, budget, first)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pages_and_exact_tokens_are_dense(rng, implementation):
    """The whole step against plain attention over decoded keys and values with the exact ones put
    in: nothing else."""
    arrays, queries, tokens = make_step(rng, STEP_CASES[0])
    lengths = [int(n) for n in arrays.seq_lens]
    keys, values = np.zeros((2, len(lengths), 2, max(lengths), 64))
    for b, length in enumerate(lengths):
        for x, side, slots in ((keys, "k", tokens.k), (values, "v", tokens.v)):
            x[b, :, :length] = compress_oracle.rebuild(arrays, b, side)
            for p in window_oracle.exact_tokens(length, tokens.sinks, tokens.window):
                slot = window_oracle.slot_of(p, tokens.sinks, tokens.ring)
                x[b, :, p] = slots[tokens.seq_ids[b], :, slot]
    seen = np.arange(max(lengths)) < np.array(lengths)[:, None, None]
    dense = oracle.dense(queries.q, keys, values, seen)
    joint, _ = joint_oracle(queries, arrays, tokens, implementation)
    np.testing.assert_allclose(joint.o, dense.o, rtol=1e-12, atol=1e-12)  # both in float64
    np.testing.assert_allclose(joint.lse, dense.lse, rtol=1e-12)
    check_spectral(implementation, arrays, queries, tokens=tokens)  # within the budget of these


def test_outputs_are_written_in_place(rng):
    arrays, queries, tokens = make_step(rng, STEP_CASES[0])
    tensors = pages_of(arrays)
    for run in (operation(attention, "attend_spectral", "triton"), attention.attend_spectral):
        outputs = queries.outputs
        got = run(
            queries.tensor, tensors.k_pages, tensors.v_pages, tensors.codec, tensors.block_table,
            tensors.seq_lens, sinks=4, window=16, exact=tokens.tensors, seq_ids=tokens.ids,
            codec_ids=tensors.codec_ids, **outputs,
        )  # fmt: skip
        assert got[0] is outputs["out"] and got[1] is outputs["lse"]
        assert not any(x.isnan().any() for x in got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_in_the_models_dtype(rng, dtype):
    """`out` in fp16 or bf16 is the float32 output, rounded once."""
    if dtype == BF16 and DEVICE.type == "cpu":
        pytest.skip("bf16 is wrong in Triton's interpreter")
    arrays, queries, tokens = make_step(rng, STEP_CASES[4])
    tensors = pages_of(arrays)
    run = operation(attention, "attend_spectral", "triton")

    def attend(out: torch.Tensor) -> torch.Tensor:
        return run(
            queries.tensor, tensors.k_pages, tensors.v_pages, tensors.codec, tensors.block_table,
            tensors.seq_lens, sinks=2, window=3, exact=tokens.tensors, seq_ids=tokens.ids, out=out,
        )[0]  # fmt: skip

    shape = tuple(queries.tensor.shape)
    whole = attend(poisoned(*shape))
    assert torch.equal(attend(poisoned(*shape, dtype=dtype)), whole.to(dtype))


def test_workspace(rng):
    """A caller's workspace, filled with NaN, gives the same bits; what it needs is told before."""
    arrays, queries, tokens = make_step(rng, STEP_CASES[1])
    tensors = pages_of(arrays)
    args = (
        queries.tensor, tensors.k_pages, tensors.v_pages, tensors.codec, tensors.block_table,
        tensors.seq_lens,
    )  # fmt: skip
    options = {"sinks": 4, "window": 8, "exact": tokens.tensors, "seq_ids": tokens.ids}
    run = operation(attention, "attend_spectral", "triton")
    wanted = run(*args, num_splits=2, **options)
    dirty = torch.full((1 << 22,), 255, dtype=torch.uint8, device=DEVICE)
    got = run(*args, num_splits=2, workspace=dirty, **options)
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


@pytest.mark.parametrize("on", ["cpu", "cuda:0"])
@pytest.mark.parametrize("none", ["batch", "query_heads", "queries"])
def test_the_workspace_of_no_queries(rng, none, on, monkeypatch):
    """Such a call launches nothing."""
    monkeypatch.setattr(_launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(_launch, "has_matrix_units", lambda device: True)
    codec = pages_of(make_pages(rng, PageSpec("16x8", "16x8", 64, 1, (9,)))).codec
    sizes = {"batch": 2, "query_heads": 4, "queries": 1, "max_pages": 3, "slots": 8, none: 0}
    assert attention.attend_workspace(codec, **sizes, device=torch.device(on)) == 0


@pytest.mark.parametrize("exact", [True, False])
def test_pages_alone_do_not_overlap_with_an_append(rng, exact, monkeypatch):
    """What the launch before writes is waited for by the programs of exact tokens: without them
    the launch does not begin early, as pages hold the new tokens too."""
    launched: list[dict] = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **constants: launched.append(constants)

    monkeypatch.setattr(attention, "_attend_spectral_kernel", Recorder())
    monkeypatch.setattr(attention, "_finish_spectral_kernel", Recorder())
    monkeypatch.setattr(_launch, "overlaps_launches", lambda device: True)
    arrays, queries, tokens = make_step(rng, SMALL_STEP)
    tensors = pages_of(arrays)
    operation(attention, "attend_spectral", "triton")(
        queries.tensor, tensors.k_pages, tensors.v_pages, tensors.codec, tensors.block_table,
        tensors.seq_lens, sinks=4, window=8, exact=tokens.tensors if exact else None,
        seq_ids=tokens.ids, after_append=True,
    )  # fmt: skip
    overlap, waits, _ = launched[0]["PATH"]
    assert overlap and waits == launched[0]["launch_pdl"] == exact


def test_same_inputs_give_the_same_bits(rng):
    arrays, queries, tokens = make_step(rng, STEP_CASES[0])
    first, second = (check_spectral("triton", arrays, queries, tokens=tokens) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_page_does_not_matter_where_it_lies(rng, implementation):
    """The same tokens in other pages, beside other sequences, of a pool of other strides: the same
    bits."""
    spec = PageSpec("16x8+16x4", "32x4", 64, 2, (100,), 64)
    arrays = make_pages(rng, spec)
    queries = make_queries(rng, shape=(1, 2, 1, 64), size=2.0)
    order = rng.permutation(len(arrays.k_pages))
    moved = dataclasses.replace(
        arrays,
        k_pages=arrays.k_pages[order],
        v_pages=arrays.v_pages[order],
        block_table=np.append(np.argsort(order)[arrays.block_table[:, :2]], [[7]], 1).astype(
            np.int32
        ),
    )
    one = check_spectral(implementation, arrays, queries)
    other = check_spectral(implementation, moved, queries, shared=False)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Budgets have teeth


FULL = 127 * 256


def split_attention(
    arrays: PageArrays,
    expected: oracle.State,
    u: tuple[F64, F64],
    *,
    query_low: bool = True,
    weight_low: bool = True,
) -> tuple[F64, F64]:
    """Attention in float64 but for the int8 operands (hi + lo), with or without their low parts:
    batch of one, one query."""
    codec = arrays.codec
    scale, codes = codec.head_dim**-0.5, compress_oracle.stored(arrays, 0, "k")
    heads, tokens = expected.scores.shape[1], codes.shape[1]
    o, lse = np.zeros(expected.o.shape), np.zeros(expected.lse.shape)
    low = budgets.field_weights(codec.k_bands)
    for h in range(heads):
        g = h * codes.shape[0] // heads
        scores = np.zeros(tokens)
        for start in range(0, tokens, codec.frame):
            part, j = slice(start, start + codec.frame), start // codec.frame
            row = u[0][0, h, 0, j]
            unit = np.abs(row / low).max() / FULL
            split = unit * low * hi_lo(row / low / unit, query_low)
            scores[part] = scale * (u[1][0, h, 0, j] + codes[g, part] @ split)
        top = scores.max()
        lse[0, h] = top + math.log(np.exp(scores - top).sum())
        for start in range(0, tokens, budgets.PAIR):
            part = slice(start, start + budgets.PAIR)
            largest = scores[part].max()
            weights = hi_lo(FULL * np.exp(scores[part] - largest), weight_low) / FULL
            o[0, h, 0] += np.exp(largest - lse[0, h]) * (weights @ expected.values[0, g, part])
    return o, lse


def hi_lo(x: F64, low: bool) -> F64:
    """x rounded to 256 hi + lo, with or without lo."""
    return np.rint(x) if low else 256 * np.floor((np.rint(x) + 128) / 256)


@pytest.mark.parametrize("size", [1.0, 8.0])
def test_integer_split_fits_its_budget_and_halves_of_it_do_not(rng, size):
    # Few tokens: their errors have random signs, so more of them stay further below a budget.
    arrays = make_pages(rng, PageSpec("16x8+16x4+32x2", "32x4+32x2", 64, 1, (20,), 64))
    queries = make_queries(rng, shape=(1, 32, 1, 64), size=size)
    expected, (o_budget, lse_budget) = spectral_oracle(queries, arrays, "triton")
    u = project_oracle(queries.q, arrays.codec, arrays.rows, 1)
    o, lse = split_attention(arrays, expected, u)
    budgets.check(o, expected.o, o_budget, "o")
    budgets.check(lse, expected.lse, lse_budget, "lse")
    o, lse = split_attention(arrays, expected, u, query_low=False)
    budgets.check_rejects(o, expected.o, o_budget, "the query's low part dropped, o")
    budgets.check_rejects(lse, expected.lse, lse_budget, "the query's low part dropped, lse")
    o, _ = split_attention(arrays, expected, u, weight_low=False)
    budgets.check_rejects(o, expected.o, o_budget, "the weights' low part dropped")


def test_spectral_budget_has_teeth(rng):
    dim, frame = 80, 64
    spec = PageSpec(
        "16x8+32x4+16x2", "32x4+32x2", dim, 2, (140, 100), frame, 64, codecs=2, spare_pages=0
    )
    arrays = make_pages(rng, spec)
    arrays.rows[:] = arrays.rows[0]
    usable = np.flatnonzero(np.isfinite(arrays.codec.k_scale[:, 0, 0]))
    queries = make_queries(rng, shape=(2, 4, 1, dim), size=3.0)
    cut = {"sinks": 4, "window": 16}
    expected, (o_budget, lse_budget) = spectral_oracle(queries, arrays, "triton", **cut)

    def changed(*, q: F64 = queries.q, codec: dict | None = None, **fields: Any) -> oracle.State:
        options = {name: fields.pop(name, cut.get(name)) for name in ("sinks", "window", "scale")}
        new = dataclasses.replace(arrays.codec, **(codec or {}))
        pages = dataclasses.replace(arrays, codec=new, **fields)
        return oracle.spectral(q, pages, **options)

    other_pages = arrays.block_table.copy()
    other_pages[:, :2] = other_pages[:, 1::-1]
    nibbles, v_nibbles = arrays.k_pages.copy(), arrays.v_pages.copy()
    swap_nibbles(nibbles, 16)
    swap_nibbles(v_nibbles, 0)
    k_scale, v_scale = arrays.codec.k_scale, arrays.codec.v_scale
    inv_freq, at = arrays.codec.inv_freq, np.array([[[139]], [[99]]])
    backward = changed(codec={"inv_freq": -inv_freq})
    wrong_v = v_scale[..., ::-1].copy()
    mutants = {
        "queries rotated twice": changed(q=rope_oracle.rotate(queries.q, at, inv_freq)),
        "queries turned back to 0": changed(q=rope_oracle.rotate(queries.q, -at, inv_freq)),
        "a position off": changed(q=rope_oracle.rotate(queries.q, np.array([1]), inv_freq)),
        "frames turned the other way": backward,
        "cosine only": oracle.softmax_state(
            (expected.scores + backward.scores) / 2, expected.values
        ),
        "no frames": changed(codec={"inv_freq": 0 * inv_freq}),
        "the neighbouring frame": changed(codec={"frame": 128}),
        "no mean": changed(codec={"k_mean": 0 * arrays.codec.k_mean}),
        "the mean twice": changed(codec={"k_mean": 2 * arrays.codec.k_mean}),
        "the neighbouring row of the codec": changed(
            rows=np.full(2, usable[usable != arrays.rows[0]][0], np.int32)
        ),
        "no softmax scale": changed(scale=1.0),
        "softmax scale of the rank": changed(scale=64**-0.5),
        "swapped pages": changed(block_table=other_pages),
        "key scales shifted by a component": changed(codec={"k_scale": np.roll(k_scale, 1, -1)}),
        "swapped nibbles of K": changed(k_pages=nibbles),
        "sinks seen too": changed(sinks=0),
        "the window seen too": changed(window=0),
        "one token too many": changed(window=15),
        "one token too few": changed(window=17),
        "the last page left out": changed(window=64),
        "heads of the other group": changed(q=queries.q[:, ::-1]),
        "heads dealt out in turn": changed(q=queries.q[:, [0, 2, 1, 3]]),
        "zero query": changed(q=np.zeros_like(queries.q)),
    }
    for mistake, mutant in mutants.items():
        budgets.check_rejects(mutant.o, expected.o, o_budget, f"{mistake}, o")
        budgets.check_rejects(mutant.lse, expected.lse, lse_budget, f"{mistake}, lse")
    for mistake, wrong in {
        "zeros": np.zeros_like(expected.o),
        "value scales shifted by a component": changed(
            codec={"v_scale": np.roll(v_scale, 1, -1)}
        ).o,
        "value scales in the other order": changed(codec={"v_scale": wrong_v}).o,
        "swapped nibbles of V": changed(v_pages=v_nibbles).o,
        "one sink too few": changed(sinks=3).o,
        "not normalised": expected.o * np.exp(expected.lse)[..., None],
        "the mean of the values": changed(q=np.zeros_like(queries.q)).o,
    }.items():
        budgets.check_rejects(wrong, expected.o, o_budget, mistake)
    for mistake, wrong in {
        "zeros": np.zeros_like(expected.lse),
        "log base 2": expected.lse / math.log(2),
        "the largest score": expected.scores.max(-1),
        # Much the same for all tokens of a frame: outputs hardly change.
        "4-bit codes one too low": changed(k_pages=shift_codes(arrays)).lse,
    }.items():
        budgets.check_rejects(wrong, expected.lse, lse_budget, mistake)


def shift_codes(arrays: PageArrays) -> np.ndarray:
    """K pages whose 4-bit codes are one lower where they can be: what a wrong offset of the code
    looks like."""
    bands = arrays.codec.k_bands
    codes = layout_oracle.unpack_codes(arrays.k_pages, bands, "k")
    four = np.array(layout_oracle.bits_of(bands)) == 4
    return layout_oracle.pack_codes(np.where(four, np.maximum(codes - 1, 0), codes), bands, "k")


def test_step_budget_has_teeth(rng):
    """The border between pages and exact tokens, by a token to either side, and sinks attended
    twice."""
    arrays, queries, tokens = make_step(rng, STEP_CASES[1])
    cold, allowed = spectral_oracle(queries, arrays, "triton", sinks=4, window=8)
    exact = window_oracle_state(queries, tokens, arrays.seq_lens)
    (o, lse), (o_budget, lse_budget) = budgets.joined(
        [cold, exact], [allowed, budgets.attend_window(queries.q, exact)]
    )

    def step(sinks: int, window: int) -> tuple[F64, F64]:
        pages = oracle.spectral(queries.q, arrays, sinks=sinks, window=window)
        none = budgets.joined([pages, exact], [allowed, allowed])
        return none[0]

    mutants = {
        "exact tokens left out": (cold.o, cold.lse),
        "pages left out": (exact.o, exact.lse),
        "sinks twice": step(0, 8),
        "a token twice": step(4, 7),
        "a token left out": step(4, 9),
        "window twice": step(4, 0),
    }
    live = np.isfinite(lse)
    for mistake, (wrong_o, wrong_lse) in mutants.items():
        wrong_o, wrong_lse = (np.where(np.isfinite(x), x, 0.0) for x in (wrong_o, wrong_lse))
        budgets.check_rejects(wrong_o[live], o[live], o_budget[live], f"{mistake}, o")
        budgets.check_rejects(wrong_lse[live], lse[live], lse_budget[live], f"{mistake}, lse")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dispatch_on_cpu_is_the_twin(rng, dtype):
    """Without kernels() a launcher gives its twin's bits for CPU tensors."""
    if DEVICE.type != "cpu":
        pytest.skip("there is a GPU: launchers run kernels")
    tensors = pages_of(make_pages(rng, PageSpec("16x8", "16x8", 64, 2, (70,))))
    q = make_queries(rng, shape=(1, 4, 1, 64), dtype=dtype).tensor
    args = q, tensors.k_pages, tensors.v_pages, tensors.codec, tensors.block_table, tensors.seq_lens
    launched, twin = attention.attend_spectral(*args), attention.attend_spectral_torch(*args)
    assert all(torch.equal(a, b) for a, b in zip(launched, twin, strict=True))


def test_bf16_is_refused_before_sm_80(rng, monkeypatch):
    arrays, queries, tokens = make_step(rng, STEP_CASES[2])
    tensors = pages_of(arrays)
    monkeypatch.setattr(_launch, "has_matrix_units", lambda device: False)
    with pytest.raises(TypeError, match="q: expected fp16 or fp32"):
        attention.attend_spectral(
            queries.tensor, tensors.k_pages, tensors.v_pages, tensors.codec, tensors.block_table,
            tensors.seq_lens,
        )  # fmt: skip
    with pytest.raises(TypeError, match=": expected fp16 or fp32"):
        window.attend_window(
            queries.tensor.half(), *tokens.tensors, tensors.seq_lens, sinks=4, window=32
        )
