"""spectral_kernels/cache.py against dense attention in float64 over what every row was given.

The model of a cache keeps, for every token, its key and value as given and as its codes stand for
(encoded by itself, in a pool of one page a token), and which of the two the cache must use: the
given one for sinks and window, unless it left the ring and came back by a rollback. What a codec
loses is quality and no part of the tolerance. Slots of no token hold NaN, pages of no row ones, a
row of the codec that no sequence uses NaN. `play` takes a cache through steps in any order
(tests/fuzz.py draws them).
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from spectral_kernels import (
    Bands,
    Codec,
    ModelCodec,
    PageLayout,
    SpectralCache,
    decode,
    encode,
    freqs_from_inv_freq,
)
from spectral_kernels.cache import PageTable
from tests import budgets
from tests.cases import DEVICE, DTYPES, int32

DIM, HEADS, KV_HEADS, FRAME = 64, 4, 2, 128
SINKS, WINDOW, DRAFTS = 3, 8, 2
RING = WINDOW + DRAFTS
MAX_TOKENS, BATCH = 320, 2
BANDS = (
    ("16x8+16x4+32x2", "48x4+16x2"),
    ("32x4", "32x4+32x2"),
)  # a layer each: other kernels, half groups


@functools.cache
def make_codec(seed: int = 0, rows: int = 1, unused: int = 0) -> ModelCodec:
    """Random orthogonal bases; codes reach far enough that few saturate. The last `unused` rows
    hold NaN."""
    rng = np.random.default_rng(seed)
    layers = []
    for k, v in BANDS:
        layout = PageLayout(Bands.parse(k), Bands.parse(v), DIM, FRAME)
        sides = []
        for bands in (layout.k, layout.v):
            frames = np.linalg.qr(rng.standard_normal((rows, KV_HEADS, DIM, DIM)))[0][
                :, :, : bands.rank
            ]
            largest = np.abs(frames).max(-1)
            step = np.array([6.0 / 2**bits for bits in bands.bits])
            basis = np.round(frames / largest[..., None] * 127).astype(np.int8)
            sides.append((basis, largest / 127 * step, np.moveaxis(frames, -1, -2) / step))
        mean = rng.standard_normal((rows, KV_HEADS, DIM)) * 0.5
        offset = np.einsum("mgd,mgdr->mgr", mean, sides[0][2])
        (kb, ks, ke), (vb, vs, ve) = sides
        arrays = (kb, *(x.astype("f4") for x in (ks, ke, mean, offset)))
        arrays = (*arrays, vb, *(x.astype("f4") for x in (vs, ve)))
        for x in arrays:
            if x.dtype != np.int8 and unused:
                x[-unused:] = np.nan
        tensors = [torch.tensor(np.ascontiguousarray(x), device=DEVICE) for x in arrays]
        freqs = freqs_from_inv_freq(
            torch.tensor(1e4 ** (-np.arange(0, DIM, 2) / DIM)), device=DEVICE
        )
        layers.append(Codec(layout, freqs, *tensors))
    return ModelCodec(tuple(layers), sinks=SINKS, window=WINDOW)


CODEC = make_codec()


def make_cache(codec: ModelCodec = CODEC, **changes) -> SpectralCache:
    options = {"max_seqs": BATCH, "max_tokens": MAX_TOKENS, "query_heads": HEADS, "drafts": DRAFTS}
    return SpectralCache(codec, **{**options, "dtype": torch.float32, "device": DEVICE, **changes})


@dataclass
class Row:
    """What a row was given: [layer][side] lists of tokens [G, D], float64; its ring's state."""

    given: list = field(default_factory=lambda: [([], []) for _ in BANDS])
    coded: list = field(default_factory=lambda: [([], []) for _ in BANDS])
    lossy: set = field(default_factory=set)  # positions of the window that came back from pages
    held: dict = field(
        default_factory=dict
    )  # slot of the ring -> the position whose exact token it holds

    @property
    def length(self) -> int:
        return len(self.given[0][0])

    def add(self, count: int) -> None:
        """Positions length - count .. length - 1 were stored, the newest RING in the ring."""
        for p in range(max(self.length - count, self.length - RING, SINKS), self.length):
            self.held[(p - SINKS) % RING] = p
        self.lossy -= set(range(self.length - count, self.length))

    def cut(self, count: int) -> None:
        for tokens in (*self.given, *self.coded):
            for side in tokens:
                del side[len(side) - count :]
        self.held = {slot: p for slot, p in self.held.items() if p < self.length}
        for p in range(max(self.length - WINDOW, SINKS), self.length):
            if self.held.get((p - SINKS) % RING) != p:
                self.lossy.add(p)
                self.held[(p - SINKS) % RING] = p

    @property
    def empty_slots(self) -> list[int]:
        """Slots of no token."""
        ring = [SINKS + slot for slot in range(RING) if slot not in self.held]
        return [*range(min(self.length, SINKS), SINKS), *ring]

    def tokens(self, layer: int, side: int, dtype: torch.dtype, stored: bool = False) -> np.ndarray:
        """[G, T, D] as attention must see them; stored: all of them in the cache's dtype."""
        n, found = self.length, []
        for p in range(n):
            exact = p < SINKS or p >= n - WINDOW
            given = exact and p not in self.lossy
            x = (self.given if given else self.coded)[layer][side][p]
            if not given and (exact or stored) and dtype != torch.float32:
                x = torch.from_numpy(x).float().to(dtype).double().numpy()
            found.append(x)
        return np.stack(found, 1)


class Model:
    """A cache and its dense float64 double."""

    def __init__(
        self, codec: ModelCodec = CODEC, seed: int = 0, batch: int = BATCH,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.cache = make_cache(codec, max_seqs=batch, dtype=dtype)
        self.codec, self.dtype = codec, dtype
        self.rng = np.random.default_rng(seed)
        self.rows = [Row() for _ in range(batch)]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static: list[torch.Tensor] = []  # k, v, q of every layer, and its output
        self.poison()

    @property
    def lengths(self) -> list[int]:
        return [row.length for row in self.rows]

    def random(self, *shape: int) -> torch.Tensor:
        x = torch.from_numpy(self.rng.standard_normal(shape).astype(np.float32))
        return x.to(DEVICE, self.dtype)

    def poison(self) -> None:
        """NaN in slots of no token, ones in pages of no row."""
        pages = self.cache.pages
        used = {page for row in pages.rows for page in row}
        free = [page for page in range(len(pages.references)) if page not in used]
        slots = [(b, slot) for b, row in enumerate(self.rows) for slot in row.empty_slots]
        if free:
            at = torch.tensor(free, device=DEVICE)
            for pool in (*self.cache.k_pages, *self.cache.v_pages):
                pool[at] = 255
        if slots:
            rows, at = torch.tensor(slots, device=DEVICE).unbind(1)
            for exact in (*self.cache.k_exact, *self.cache.v_exact):
                exact[rows, :, at] = torch.nan

    def store(self, counts: list[int], prompt: bool) -> None:
        """New tokens of every row, `counts` of them; a prompt is padded on the left."""
        tokens = max(counts)
        self.cache.reserve(counts)
        self.cache.advance(torch.tensor(counts, dtype=torch.int32, device=DEVICE))
        first = torch.tensor([tokens - n for n in counts], dtype=torch.int32, device=DEVICE)
        new = []
        for layer in range(len(BANDS)):
            x = self.random(2, len(self.rows), KV_HEADS, tokens, DIM)
            for b, n in enumerate(counts):  # what padding holds is never used
                x[:, b, :, : tokens - n] = torch.nan
            if prompt:
                self.cache.prefill(layer, *x, first)
            else:
                self.cache.append(layer, *x)
            new.append(x)
        self.keep(new, counts)

    def keep(self, new: list[torch.Tensor], counts: list[int]) -> None:
        """The newest counts[b] of new tokens [2, B, G, T, D] of every layer were stored."""
        owner = np.repeat(np.arange(len(counts)), counts)
        at = np.concatenate([n + np.arange(m) for n, m in zip(self.lengths, counts, strict=True)])
        for layer, x in enumerate(new):
            for side, data in enumerate(x):
                stored = [data[b, :, data.shape[2] - n :] for b, n in enumerate(counts)]
                tokens = torch.cat(stored, 1).transpose(0, 1)  # [N, G, D]
                given = tokens.double().cpu().numpy()
                coded = self.coded(layer, "kv"[side], tokens, at, owner)
                for b, row in enumerate(self.rows):
                    row.given[layer][side].extend(given[owner == b])
                    row.coded[layer][side].extend(coded[owner == b])
        for row, n in zip(self.rows, counts, strict=True):
            row.add(n)

    def coded(
        self, layer: int, side: str, x: torch.Tensor, at: np.ndarray, owner: np.ndarray
    ) -> np.ndarray:
        """What the codes of tokens x [N, G, D] at positions `at` of rows `owner` stand for, each
        encoded alone, in a page of its own."""
        codec, n = self.codec.layers[layer], len(x)
        shape = (n, KV_HEADS, 64 * codec.layout.side(side).bytes)
        pages = torch.zeros(shape, dtype=torch.uint8, device=DEVICE)
        page, lens, rows = (int32(numbers) for numbers in (at // 64, at + 1, owner))
        table = torch.arange(n, dtype=torch.int32, device=DEVICE)[:, None]
        table = table.repeat(1, int(at.max()) // 64 + 1)
        options = {"side": side, "codec_ids": self.cache.codec_ids[rows]}
        encode(x[:, :, None].contiguous(), codec, pages, table, lens, **options)
        found = decode(pages, codec, table[:, :1], lens, first_page=page, **options)
        return found[torch.arange(n), :, torch.from_numpy(at % 64)].double().cpu().numpy()

    def replay(self) -> None:
        """A token of every row and their queries, every layer: as an engine's step, on CUDA from
        the second call on by replaying one CUDA graph."""
        batch, cache = len(self.rows), self.cache

        def step() -> None:
            cache.advance(1)
            for layer, (k, v, q, out) in enumerate(self.static):
                cache.append(layer, k, v)
                cache.attend(layer, q, out=out, after_append=True)

        new = [self.random(2, batch, KV_HEADS, 1, DIM) for _ in BANDS]
        queries = [self.random(batch, HEADS, 1, DIM) for _ in BANDS]
        cache.reserve(1)
        first = not self.static
        if first:
            self.static = [
                (*x.clone(), q.clone(), torch.empty_like(q))
                for x, q in zip(new, queries, strict=True)
            ]
        for (k, v, query, out), x, q in zip(self.static, new, queries, strict=True):
            for target, source in ((k, x[0]), (v, x[1]), (query, q)):
                target.copy_(source)
            out.fill_(torch.nan)
        if DEVICE.type == "cuda" and not first and self.graph is None:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                step()
        if self.graph is None:  # compiles, or there is no GPU
            step()
        else:
            self.graph.replay()
        self.keep(new, [1] * batch)
        for layer, (_, _, q, out) in enumerate(self.static):
            self.compare(layer, q, out)

    def check(self, queries: int = 1) -> None:
        """Attention of the newest tokens' queries, every layer, against float64."""
        assert self.cache.lengths == self.lengths == self.cache.seq_lens.tolist()
        pages = self.cache.pages
        used = {page for row in pages.rows for page in row}
        assert len(used) + pages.free == len(pages.references)
        for layer in range(len(BANDS)):
            q = self.random(len(self.rows), HEADS, queries, DIM)
            self.compare(layer, q, self.cache.attend(layer, q))

    def compare(self, layer: int, q: torch.Tensor, got: torch.Tensor) -> None:
        """Outputs [B, H, Q, D] of the newest tokens' queries with the float64 double's."""
        queries = q.shape[2]
        q, got = (x.double().cpu().numpy() for x in (q, got))
        for b, row in enumerate(self.rows):
            if not row.length:
                assert not got[b].any()
                continue
            k, v = (row.tokens(layer, side, self.dtype) for side in (0, 1))
            for h, i in np.ndindex(HEADS, queries):
                visible = row.length - queries + i + 1
                if visible < 1:
                    continue
                s = k[h // 2, :visible] @ q[b, h, i] * DIM**-0.5
                w = np.exp(s - s.max())
                w /= w.sum()
                # Integer parts count to 2**-16 of the largest pair, component and weight: scores
                # are off by about that of |q| |k| (both sides, sqrt(R) components), outputs by
                # twice the error of scores, and they round to the cache's dtype.
                norms = np.linalg.norm(k[h // 2, :visible], axis=1).max() * np.linalg.norm(
                    q[b, h, i]
                )
                score = 2**-15 * norms * DIM**-0.5 * np.sqrt(DIM)
                expected = w @ v[h // 2, :visible]
                budget = (2 * score + 2**-15) * np.abs(v[h // 2, :visible]).max()
                budget = budget + budgets.rounding(np.abs(expected) + budget, self.dtype)
                error = np.abs(got[b, h, i] - expected)
                assert (error <= budget).all(), (
                    f"layer {layer} row {b} head {h} query {i}: {error.max()} > {budget.max()}"
                )

    def check_past(self) -> None:
        """`past` of all tokens: those that are exact to the bit, others as two float32 sums of the
        same R products may differ (and round)."""
        tokens = max(self.lengths)
        for layer in range(len(BANDS)):
            for side, x in enumerate(self.cache.past(layer, 0, tokens)):
                x = x.double().cpu().numpy()
                for b, row in enumerate(self.rows):
                    assert not x[b, :, : tokens - row.length].any()
                    if not row.length:
                        continue
                    want = row.tokens(layer, side, self.dtype, stored=True)
                    error = np.abs(x[b, :, tokens - row.length :] - want)
                    sums = 2 * (DIM + 8) * budgets.ACC * np.sqrt(DIM) * np.abs(want).max()
                    assert (error <= sums + 2 * budgets.rounding(want, self.dtype)).all()
                    exact = [p for p in range(row.length) if self.is_given(row, p)]
                    assert not error[:, exact].any()

    def is_given(self, row: Row, p: int) -> bool:
        return p not in row.lossy and (p < SINKS or p >= row.length - WINDOW)

    def rollback(self, counts: list[int]) -> None:
        self.cache.rollback(counts)
        for row, n in zip(self.rows, counts, strict=True):
            row.cut(n)

    def reorder(self, index: list[int]) -> None:
        self.cache.reorder(index)
        self.rows = [copy.deepcopy(self.rows[i]) for i in index]

    def reset(self) -> None:
        self.cache.reset()
        self.rows = [Row() for _ in self.rows]


def play(draw, steps: int = 12) -> None:
    """A cache through steps in any order, checked after each of them; rows cross page, frame and
    window borders apart. draw: of tests/fuzz.py."""
    batch, dtype = draw.shape("rows", 1, 2, 3), draw.shape("dtype", *DTYPES)
    codecs = draw.shape("codecs", 1, 3)
    model = Model(make_codec(codecs, codecs, codecs // 3), draw.int("seed", 0, 2**31), batch, dtype)
    cache = model.cache

    def choose_codecs() -> None:
        if codecs > 1:  # row 2 holds NaN
            cache.codec_ids.copy_(torch.tensor([draw.int("row", 0, 1) for _ in range(batch)]))

    choose_codecs()
    for i in range(steps):
        room = MAX_TOKENS - max(model.lengths)
        able = ["rollback", "rollback drafts", "fork", "hold", "free", "past", "reset"]
        able += ["decode", "decode", "replay", "replay", "compiled"] if room >= 3 else []
        able += ["prefill", "prefill", "chunks"] if room >= 140 else []
        what = draw.of(f"step {i}", *able)
        if what == "decode":
            queries = draw.int(f"{i} queries", 1, 3)
            model.store([queries] * batch, prompt=False)
            model.check(queries)
        elif what == "replay":
            model.replay()
        elif what == "compiled":  # moves only the lengths on the device
            cache.hold([n + 1 for n in model.lengths])
            cache.advance(1)
            new = [model.random(2, batch, KV_HEADS, 1, DIM) for _ in BANDS]
            for layer, x in enumerate(new):
                cache.append(layer, *x)
            cache.read_lengths()
            model.keep(new, [1] * batch)
        elif what == "prefill":
            counts = [draw.int(f"{i} tokens {b}", 0, 140) for b in range(batch)]
            if max(counts):
                model.store(counts, prompt=True)
        elif what == "chunks":
            for part in range(3):
                model.store([draw.int(f"{i} chunk {part}", 1, 46)] * batch, prompt=True)
        elif what in ("rollback", "rollback drafts"):
            most = [min(n, DRAFTS) if what.endswith("drafts") else n for n in model.lengths]
            model.rollback([draw.int(f"{i} count {b}", 0, n) for b, n in enumerate(most)])
        elif what == "free":
            row = draw.int(f"{i} row", 0, batch - 1)
            model.rollback([n * (b == row) for b, n in enumerate(model.lengths)])
        elif what == "fork":
            index = [draw.int(f"{i} row {b}", 0, batch - 1) for b in range(batch)]
            model.reorder(index)
        elif what == "hold":
            cache.hold(
                [draw.int(f"{i} tokens {b}", n, MAX_TOKENS) for b, n in enumerate(model.lengths)]
            )
        elif what == "past" and max(model.lengths):
            model.check_past()
        elif what == "reset":
            model.reset()
            choose_codecs()
        model.poison()
        model.check()


@pytest.mark.parametrize(
    "counts", [(1, 1), (SINKS, 1), (WINDOW + SINKS, 63), (64, 65), (130, 0), (300, 129)]
)
def test_a_prompt_and_steps_after_it(counts):
    model = Model(seed=sum(counts))
    model.store(list(counts), prompt=True)
    model.check()
    for _ in range(6):
        model.store([1] * BATCH, prompt=False)
        model.check()


def test_a_prompt_in_chunks_stores_what_it_stores_at_once():
    whole, chunks = Model(seed=1), Model(seed=1)
    x = whole.rng.standard_normal((2, len(BANDS), BATCH, KV_HEADS, 150, DIM))
    x = torch.tensor(x, dtype=torch.float32, device=DEVICE)
    for model, ends in ((whole, (150,)), (chunks, (37, 64, 129, 150))):
        start = 0
        for end in ends:
            model.cache.reserve(end - start)
            model.cache.advance(end - start)
            for layer in range(len(BANDS)):
                model.cache.prefill(layer, *x[:, layer, :, :, start:end])
            start = end
    tables = [model.cache.block_table[:, :3].long() for model in (whole, chunks)]
    for name in ("k_pages", "v_pages", "k_exact", "v_exact"):
        for a, b in zip(getattr(whole.cache, name), getattr(chunks.cache, name), strict=True):
            if "pages" in name:  # other numbers, the same bytes
                a, b = a[tables[0]], b[tables[1]]
            assert torch.equal(a, b), name


def test_past_is_what_attention_sees():
    model = Model(seed=2)
    model.store([200, 77], prompt=True)
    tokens = 210  # columns: a prompt of 10 tokens came after 200
    model.cache.reserve(10)
    model.cache.advance(10)
    for layer in range(len(BANDS)):
        for side, x in enumerate(model.cache.past(layer, 10, 200)):
            assert x.shape == (BATCH, KV_HEADS, tokens - 10, DIM)
            for b, row in enumerate(model.rows):
                want = row.tokens(layer, side, torch.float32)
                assert not x[b, :, : 200 - row.length].any()
                assert (
                    np.abs(x[b, :, 200 - row.length :].double().cpu().numpy() - want).max() < 2e-5
                )


def test_rollback_of_drafts_keeps_the_window_exact():
    model = Model(seed=3)
    model.store([100, 100], prompt=True)
    for _ in range(4):
        model.store([DRAFTS] * BATCH, prompt=False)
        model.rollback([DRAFTS] * BATCH)
        assert not any(row.lossy for row in model.rows)
        model.check()
    model.rollback([DRAFTS + 1, 0])
    assert model.rows[0].lossy and not model.rows[1].lossy
    model.check()


def test_a_row_of_another_codec_row():
    """codec_ids: row 1 of the batch is stored and read by row 1 of the codec."""
    codec = make_codec(seed=5, rows=2)

    def row_of(layer: Codec, m: int) -> Codec:
        tensors = (getattr(layer, name)[m : m + 1].contiguous() for name in NAMES)
        return Codec(layer.layout, layer.freqs, *tensors)

    single = [
        ModelCodec(tuple(row_of(layer, m) for layer in codec.layers), SINKS, WINDOW)
        for m in range(2)
    ]
    both = make_cache(codec)
    both.codec_ids.copy_(torch.tensor([0, 1]))
    alone = [make_cache(single[m]) for m in range(2)]
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, BATCH, KV_HEADS, 90, DIM, generator=random).to(DEVICE)
    q = torch.randn(BATCH, HEADS, 1, DIM, generator=random).to(DEVICE)
    outs = []
    for cache in (both, *alone):
        cache.reserve(90)
        cache.advance(90)
        cache.prefill(0, *x)
        outs.append(cache.attend(0, q))
    for m in range(2):
        assert torch.equal(outs[0][m], outs[1 + m][m])
        assert not torch.allclose(outs[1][m], outs[2][m])


NAMES = ("k_basis", "k_scale", "k_encoder", "k_mean", "k_offset", "v_basis", "v_scale", "v_encoder")


def test_nbytes_counts_every_tensor():
    cache = make_cache()
    tensors = [x for x in vars(cache).values() if isinstance(x, torch.Tensor)]
    for value in vars(cache).values():
        if isinstance(value, list):
            tensors += [x for x in value if isinstance(x, torch.Tensor)]
    assert cache.nbytes == sum(x.nbytes for x in tensors) + CODEC.nbytes


def test_addresses_stay():
    """What a captured graph reads and writes, whatever happens between its replays."""
    model = Model(seed=4)

    def addresses() -> list[int]:
        cache = model.cache
        lists = (cache.k_pages, cache.v_pages, cache.k_exact, cache.v_exact)
        tables = cache.block_table, cache.seq_lens, cache.codec_ids, cache.workspace
        return [x.data_ptr() for x in (*(x for some in lists for x in some), *tables)]

    before = addresses()
    model.store([70, 3], prompt=True)
    model.reorder([1, 1])
    model.rollback([2, 3])
    model.cache.hold(320)
    model.reset()
    model.store([70, 3], prompt=True)
    assert before == addresses()


def test_reset_frees_every_page():
    model = Model(seed=9)
    model.store([200, 10], prompt=True)
    model.reorder([0, 0])
    model.reset()
    allocator = model.cache.pages
    assert allocator.free == len(allocator.references) and not any(allocator.references)
    model.store([70, 80], prompt=True)
    model.check()


def test_pages_held_ahead_are_not_shared():
    """Neither by a fork nor where it goes on."""
    model = Model(seed=10)
    model.store([128, 10], prompt=True)
    model.cache.hold([320, 10])
    model.reorder([0, 0])
    model.store([70, 70], prompt=True)
    model.check()


def test_forked_rows_share_full_pages():
    model = Model(seed=6)
    model.store([200, 10], prompt=True)
    free = model.cache.pages.free
    model.reorder([0, 0])
    # Row 1 gave its page back and took one copy, of the last page of row 0; three pages are shared.
    assert model.cache.pages.free == free
    assert sorted(model.cache.pages.references, reverse=True)[:5] == [2, 2, 2, 1, 1]
    for _ in range(3):
        model.store([1, 1], prompt=False)
        model.check()


def test_a_fork_that_is_rolled_back_writes_to_no_page_of_the_other():
    """Into a full page that both had, and with pages reserved ahead."""
    model = Model(seed=7)
    model.store([200, 10], prompt=True)
    model.cache.hold([320, 10])
    model.reorder([0, 0])
    model.rollback([0, 150])
    for _ in range(2):
        model.store([3, 3], prompt=False)
        model.check()
    model.rollback([160, 10])  # both into their first page, which only row 0 has still shared
    model.store([3, 3], prompt=False)
    model.check()


def test_a_full_pool_can_fork():
    """Copies of partial pages need no spare page: the rows that part had one page between them."""
    model = Model(seed=8)
    model.store([140, 140], prompt=True)
    model.store([140, 140], prompt=True)
    model.store([30, 30], prompt=True)
    assert model.cache.pages.free == 0
    model.reorder([1, 1])
    model.check()
    model.store([3, 3], prompt=False)
    model.check()


def test_page_allocator():
    pages = PageTable(1, 3)
    a = pages.allocate(2)
    pages.share(a[:1])
    pages.release(a)
    assert pages.free == 2
    pages.release(a[:1])
    assert pages.free == 3


def test_a_default_device_changes_nothing() -> None:
    """Of the user's script; meta shows what would follow it. Rows of the table have one stride."""
    with torch.device("meta"):
        cache = make_cache(max_tokens=200)
        cache.reserve(70)
        cache.advance(70)
        cache.rollback(3)
    assert cache.pages.table.device.type == "cpu" and cache.block_table.device == cache.device
    assert torch.equal(cache.block_table.cpu(), cache.pages.table)
    assert cache.seq_lens.tolist() == cache.lengths and cache.block_table.stride() == (16, 1)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_step_is_one_graph():
    """10,000 replays give the bits of eager steps; within a step nothing is allocated and nothing
    waits."""
    steps, codec = 10_000, make_codec(seed=7)
    caches = [make_cache(codec, max_tokens=200 + steps, dtype=torch.bfloat16) for _ in range(2)]
    x = torch.randn(2, BATCH, KV_HEADS, 150, DIM, device=DEVICE, dtype=torch.bfloat16)
    inputs = torch.randn(64, 2, BATCH, KV_HEADS, 1, DIM, device=DEVICE, dtype=torch.bfloat16)
    q = torch.randn(64, BATCH, HEADS, 1, DIM, device=DEVICE, dtype=torch.bfloat16)
    for cache in caches:
        cache.reserve(150)
        cache.advance(150)
        for layer in range(len(BANDS)):
            cache.prefill(layer, *x)
    new, query = torch.empty_like(inputs[0]), torch.empty_like(q[0])
    outs = [[torch.empty_like(q[0]) for _ in BANDS] for _ in caches]

    def step(cache, out):
        cache.advance(1)
        for layer in range(len(BANDS)):
            cache.append(layer, *new)
            cache.attend(layer, query, out=out[layer], after_append=True)

    eager, replayed = caches
    graph = torch.cuda.CUDAGraph()
    for i in range(steps):
        new.copy_(inputs[i % 64])
        query.copy_(q[i % 64])
        for cache in caches:
            cache.reserve(1)
        step(eager, outs[0])
        if i == 0:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                step(replayed, outs[1])
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        graph.replay()
        torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        if i % 97 == 0 or i == steps - 1:
            assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True)), i
    for name in ("k_pages", "v_pages", "k_exact", "v_exact"):
        for a, b in zip(getattr(eager, name), getattr(replayed, name), strict=True):
            assert torch.equal(a, b), name
