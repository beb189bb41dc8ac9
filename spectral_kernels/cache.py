"""A KV cache of static shapes on one device: pages, exact tokens, one block table, one length a
row.

    p < sinks, p >= seq_len - window: attended exactly (window.py)      other tokens: from pages
    every token is encoded into its page when it comes (compress.py), wherever it is attended

A step of a model, new tokens of every row: `reserve` on the host (pages, the block table),
`advance` once, then for every layer `append` and `attend`, or `prefill` for a prompt. From
`advance` on nothing allocates device memory, reads the device or depends on a host value: the step
is one CUDA graph. `seq_lens` on the device is the length; `lengths` mirrors it for the allocator.
Test: tests/test_cache.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from ._checks import FLOATS, check_least, check_tensor
from .attention import attend_spectral, attend_workspace
from .codec import ModelCodec
from .compress import append, decode, encode
from .layout import PAGE_SIZE
from .window import positions_torch, slots_torch


class PageTable:
    """The pages of every row, on the host, and how many rows use each page of the pool.

    Args:
        rows, max_pages: B; the pool has B * max_pages pages.
    Attributes:
        table: int32 [B, max_pages], on the host, what the block table is a copy of.
        rows: the pages of a row, in order.      references: rows that use a page.
    """

    def __init__(self, rows: int, max_pages: int) -> None:
        self.table = torch.zeros((rows, max_pages), dtype=torch.int32, device="cpu")
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self.references = [0] * (rows * max_pages)
        self._free = list(range(rows * max_pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that no row uses."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one reference each.

        Raises:
            RuntimeError: there are not as many; nothing was allocated.
        """
        check_least(count=(count, 0))
        if count > len(self._free):
            raise RuntimeError(f"pages: expected {count} free ones, got {len(self._free)}")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self.references[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One reference more to every page. ValueError: one is not in use; nothing was changed."""
        self._check(pages, 0)
        for page in pages:
            self.references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One reference less; a page without references is free. ValueError: as `share`."""
        self._check(pages, 1)
        for page in pages:
            self.references[page] -= 1
            if self.references[page] == 0:
                self._free.append(page)

    def _check(self, pages: Sequence[int], taken: int) -> None:
        for page, times in Counter(pages).items():
            if page < 0 or self.references[page] < max(1, taken * times):
                raise ValueError(f"pages: expected pages in use, got {page}")

    def grow(self, lengths: Sequence[int]) -> bool:
        """Pages for rows of so many tokens; whether the table changed. RuntimeError: none left."""
        rows = zip(lengths, self.rows, strict=True)
        missing = [-(-length // PAGE_SIZE) - len(row) for length, row in rows]
        pages = self.allocate(sum(max(count, 0) for count in missing))
        for row, count in enumerate(missing):
            if count > 0:
                self._set(row, self.rows[row] + [pages.pop() for _ in range(count)])
        return any(count > 0 for count in missing)

    def shrink(self, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Give back the pages past rows of so many tokens. Returns: as `reorder`."""
        for length, row in zip(lengths, self.rows, strict=True):
            keep = -(-length // PAGE_SIZE)
            self.release(row[keep:])
            del row[keep:]
        return self._part(lengths)

    def reorder(self, index: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Row i takes the pages of the old row index[i], of lengths[i] tokens now.

        Returns:
            (page, its copy) of partial last pages, which rows that share a past do not share.
        """
        old, shared = self.rows, []
        for i, length in zip(index, lengths, strict=True):
            shared.append(old[i][: -(-length // PAGE_SIZE)])
            self.share(shared[-1])
        for pages in old:
            self.release(pages)
        for row, pages in enumerate(shared):
            self._set(row, pages)
        return self._part(lengths)

    def _part(self, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """A page of its own for every row whose next token goes to a page that another row has."""
        copies = []
        for row, (length, pages) in enumerate(zip(lengths, self.rows, strict=True)):
            if length % PAGE_SIZE and self.references[pages[-1]] > 1:
                # There is one: rows that share a page need one page less than the pool has.
                (fresh,) = self.allocate(1)
                copies.append((pages[-1], fresh))
                self.release(pages[-1:])
                self._set(row, [*pages[:-1], fresh])
        return copies

    def _set(self, row: int, pages: list[int]) -> None:
        self.rows[row] = pages
        self.table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32, device="cpu")


class SpectralCache:
    """Keys and values of a batch of sequences, all layers.

    Args:
        codec: of the model, on `device`.
        max_seqs: B, rows.      max_tokens: capacity of a row.      query_heads: H.
        dtype: of keys and values, fp16, bf16 or fp32.      device: where everything lies.
        drafts: tokens that may be rolled back with the window as exact as before.
    Attributes:
        k_pages, v_pages: a layer each, uint8 [num_pages, G, 64 * bytes].
        k_exact, v_exact: a layer each, [B, G, sinks + window + drafts, D].
        block_table: int32 [B, max_pages].      seq_lens, codec_ids: int32 [B].
        lengths: tokens of every row with those reserved, on the host.
    All tensors are allocated here and keep their addresses.
    """

    def __init__(
        self, codec: ModelCodec, *, max_seqs: int, max_tokens: int, query_heads: int,
        dtype: torch.dtype, device: torch.device | str, drafts: int = 0,
    ) -> None:  # fmt: skip
        check_least(max_seqs=(max_seqs, 1), max_tokens=(max_tokens, 1), drafts=(drafts, 0))
        if dtype not in FLOATS:
            raise TypeError(f"dtype: expected one of {FLOATS}, got {dtype}")
        self.codec, self.max_tokens, self.dtype = codec, max_tokens, dtype
        self.query_heads, self.device = query_heads, torch.empty(0, device=device).device
        max_pages = -(-max_tokens // PAGE_SIZE)
        slots = codec.sinks + codec.window + drafts
        self.drafts, self.pages = drafts, PageTable(max_seqs, max_pages)
        self.k_pages: list[torch.Tensor] = []
        self.v_pages: list[torch.Tensor] = []
        self.k_exact: list[torch.Tensor] = []
        self.v_exact: list[torch.Tensor] = []
        for layer in codec.layers:
            layout, heads = layer.layout, layer.kv_heads
            check_tensor("codec.freqs", layer.freqs, device=self.device)
            for pages, bands in ((self.k_pages, layout.k), (self.v_pages, layout.v)):
                shape = (max_seqs * max_pages, heads, PAGE_SIZE * bands.bytes)
                pages.append(torch.zeros(shape, dtype=torch.uint8, device=self.device))
            for exact in (self.k_exact, self.v_exact):
                sizes = (max_seqs, heads, slots, layout.head_dim)
                exact.append(torch.zeros(sizes, dtype=dtype, device=self.device))
        # Rows of whole 64 bytes: Triton compiles anew for a stride that is no multiple of 16.
        table = torch.zeros((max_seqs, -(-max_pages // 16) * 16), dtype=torch.int32, device=device)
        self.block_table = table[:, :max_pages]
        self.seq_lens = torch.zeros(max_seqs, dtype=torch.int32, device=self.device)
        self.codec_ids = torch.zeros(max_seqs, dtype=torch.int32, device=self.device)
        self.lengths = [0] * max_seqs
        self._oldest = [0] * max_seqs  # position from which on a row's ring holds all its tokens
        self._many_codecs = any(layer.k_basis.shape[0] > 1 for layer in codec.layers)
        step: dict[str, Any] = {"batch": max_seqs, "query_heads": query_heads, "queries": 1}
        step |= {"max_pages": max_pages, "slots": slots, "device": self.device}
        needed = (attend_workspace(layer, **step) for layer in codec.layers)
        size = max(needed, default=0)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=self.device)

    @property
    def max_seqs(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, the codec among them."""
        lists = (self.k_pages, self.v_pages, self.k_exact, self.v_exact)
        tables = (self.block_table, self.seq_lens, self.codec_ids, self.workspace)
        return self.codec.nbytes + sum(x.nbytes for some in (*lists, tables) for x in some)

    def _sides(self, layer: int) -> tuple[tuple[str, torch.Tensor, torch.Tensor], ...]:
        """(side, pages, exact tokens) of K and of V."""
        k = ("k", self.k_pages[layer], self.k_exact[layer])
        return k, ("v", self.v_pages[layer], self.v_exact[layer])

    def _ids(self) -> torch.Tensor | None:
        return self.codec_ids if self._many_codecs else None

    def _rows(self, name: str, value: int | Sequence[int]) -> list[int]:
        rows = [value] * self.max_seqs if isinstance(value, int) else list(value)
        if len(rows) != self.max_seqs or any(n < 0 for n in rows):
            raise ValueError(
                f"{name}: expected a number of at least 0 for {self.max_seqs} rows, got {value}"
            )
        return rows

    def reserve(self, new: int | Sequence[int]) -> None:
        """Pages for the next `new` tokens of every row (a number, or one a row). Host only, and a
        copy of the block table when a row gets a page.

        Raises:
            ValueError: a row would pass max_tokens.      RuntimeError: the pool has no page left.
                Nothing was changed.
        """
        counts = self._rows("new", new)
        ends = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self._hold("new", ends)
        self._set_lengths(ends)

    def hold(self, tokens: int | Sequence[int]) -> None:
        """Pages for rows of `tokens` tokens in all, ahead of time: no later `reserve` up to there
        needs one.

        Raises: as `reserve`.
        """
        self._hold("tokens", self._rows("tokens", tokens))

    def _hold(self, name: str, ends: list[int]) -> None:
        if max(ends) > self.max_tokens:
            raise ValueError(
                f"{name}: expected at most {self.max_tokens} tokens a row, got {max(ends)}"
            )
        if self.pages.grow(ends):
            self._send_table()

    def read_lengths(self) -> None:
        """Take `lengths` from the device, after steps that moved only `seq_lens` (a compiled
        model's)."""
        self._set_lengths(self.seq_lens.tolist())

    def _set_lengths(self, lengths: list[int]) -> None:
        ring = self.codec.window + self.drafts
        self.lengths = lengths
        self._oldest = [max(at, end - ring) for at, end in zip(self._oldest, lengths, strict=True)]

    def _send_table(self) -> None:
        # Pageable memory: the driver takes its copy before this returns, and no step waits.
        self.block_table.copy_(self.pages.table, non_blocking=True)

    def advance(self, new: int | torch.Tensor) -> None:
        """The lengths on the device grow by `new`, a number or int32 [B]; `reserve` came before."""
        if isinstance(new, int):
            check_least(new=(new, 0))
        else:
            check_tensor("new", new, shape=(self.max_seqs,), dtype=torch.int32, device=self.device)
        self.seq_lens += new

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store the newest tokens k, v [B, G, Q, D] of a decode step (`compress.append`), after
        `advance`."""
        append(
            k, v, self.codec.layers[layer], self.k_pages[layer], self.v_pages[layer],
            self.k_exact[layer], self.v_exact[layer], self.block_table, self.seq_lens,
            sinks=self.codec.sinks, codec_ids=self._ids(),
        )  # fmt: skip

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        *,
        scale: float | None = None,
        out: torch.Tensor | None = None,
        after_append: bool = False,
    ) -> torch.Tensor:
        """Attention of the newest queries q [B, H, Q, D], Q at most the window, over all tokens of
        their rows.

        Args:
            out: where to write, contiguous, default new.
            after_append: the launch before is this layer's `append`.
        Returns:
            [B, H, Q, D] in the dtype of q.
        """
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        attend_spectral(
            q, self.k_pages[layer], self.v_pages[layer], self.codec.layers[layer],
            self.block_table, self.seq_lens, sinks=self.codec.sinks, window=self.codec.window,
            exact=(self.k_exact[layer], self.v_exact[layer]), codec_ids=self._ids(), scale=scale,
            out=out, workspace=self.workspace if q.shape[2] == 1 else None,
            after_append=after_append,
        )  # fmt: skip
        return out

    def prefill(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor | None = None
    ) -> None:
        """Store a prompt k, v [B, G, T, D], after `advance`; first int32 [B]: left padding
        (`compress.encode`)."""
        shape = (self.max_seqs, self.codec.layers[layer].kv_heads, k.shape[2], k.shape[3])
        for name, x in (("k", k), ("v", v)):  # both before either is stored
            check_tensor(name, x, shape=shape, dtype=self.dtype, device=self.device)
        for (side, pages, exact), x in zip(self._sides(layer), (k, v), strict=True):
            encode(
                x, self.codec.layers[layer], pages, self.block_table, self.seq_lens,
                side=side, first=first, exact=exact, sinks=self.codec.sinks, codec_ids=self._ids(),
            )  # fmt: skip

    def past(self, layer: int, new: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the tokens before the newest `new`, rebuilt; exact tokens are exact.

        Args:
            new: tokens by which the rows have advanced and which this layer has not stored yet.
            tokens: columns of the result, at least the longest row's tokens.
        Returns:
            (k, v) [B, G, tokens, D] in the cache's dtype, K as the model rotated it, aligned to the
            right: zeros before a row's first token.
        """
        codec, seq_lens = self.codec.layers[layer], self.seq_lens - new
        table = self.block_table[:, : -(-tokens // PAGE_SIZE)]
        slots = self.k_exact[layer].shape[2]
        exact_at = positions_torch(seq_lens, slots, self.codec.sinks)  # [B, S]
        exact_at = torch.where(self._is_exact(exact_at, seq_lens), exact_at, tokens)
        column = torch.arange(-tokens, 0, device=self.device) + seq_lens[:, None]  # [B, tokens]
        found = []
        for side, pages, exact in self._sides(layer):
            x = decode(pages, codec, table, seq_lens, side=side, codec_ids=self._ids())
            # One token more, where slots that are not attended go.
            x = torch.nn.functional.pad(x[:, :, :tokens].to(self.dtype), (0, 0, 0, 1))
            index = exact_at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
            x.scatter_(2, index, exact)
            index = column.clamp_min(0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
            found.append(x.gather(2, index).masked_fill(column[:, None, :, None] < 0, 0.0))
        return found[0], found[1]

    def _is_exact(self, positions: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
        """Which positions [B, S] of slots are attended exactly."""
        newest = positions >= seq_lens[:, None] - self.codec.window
        return (positions >= 0) & ((positions < self.codec.sinks) | newest)

    def rollback(self, count: int | Sequence[int]) -> None:
        """Forget the newest tokens of every row (a number, or one a row).

        As long as the row stays within `drafts` of its longest, the window is as exact as before.
        Beyond, tokens that come back into it are rebuilt from their pages: exact as far as the
        codec is.

        Raises:
            ValueError: a row has fewer tokens; nothing was changed.
        """
        counts = self._rows("count", count)
        if any(n > length for n, length in zip(counts, self.lengths, strict=True)):
            raise ValueError(f"count: expected at most {self.lengths} tokens, got {counts}")
        self.lengths = [length - n for length, n in zip(self.lengths, counts, strict=True)]
        self.seq_lens -= torch.tensor(counts, dtype=torch.int32, device=self.device)
        self._copy_pages(self.pages.shrink(self.lengths))
        self._refill_window()

    def _refill_window(self) -> None:
        """Rebuild from pages what the ring no longer holds of the window."""
        lost = []  # (row, position)
        for row, length in enumerate(self.lengths):
            start = max(length - self.codec.window, 0)
            stale = range(max(start, self.codec.sinks), min(self._oldest[row], length))
            lost += [(row, p) for p in stale]
            self._oldest[row] = min(self._oldest[row], start)
        if not lost:
            return
        rows, at = torch.tensor(lost, device=self.device).unbind(1)
        slot = slots_torch(at, self.codec.sinks, self.codec.window + self.drafts)
        table = self.block_table[:, : -(-max(self.lengths) // PAGE_SIZE)]
        for layer, codec in enumerate(self.codec.layers):
            for side, pages, exact in self._sides(layer):
                x = decode(pages, codec, table, self.seq_lens, side=side, codec_ids=self._ids())
                exact[rows, :, slot] = x[rows, :, at].to(self.dtype)

    def reorder(self, index: Sequence[int]) -> None:
        """Row i becomes the old row index[i] (beams). Full pages are shared, the last one of a row
        is copied.

        Raises:
            ValueError: not one old row for every row; nothing was changed.
        """
        index = list(index)
        if len(index) != self.max_seqs or any(not 0 <= i < self.max_seqs for i in index):
            raise ValueError(
                f"index: expected {self.max_seqs} rows of 0 .. {self.max_seqs - 1}, got {index}"
            )
        lengths = [self.lengths[i] for i in index]
        copies = self.pages.reorder(index, lengths)
        self.lengths, self._oldest = lengths, [self._oldest[i] for i in index]
        rows = torch.tensor(index, device=self.device)
        for exact in (*self.k_exact, *self.v_exact):
            exact.copy_(exact[rows])
        self.seq_lens.copy_(self.seq_lens[rows])
        self.codec_ids.copy_(self.codec_ids[rows])
        self._copy_pages(copies)
        self._send_table()

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        """Copy pages (from, to) of all layers, of which the block table says so."""
        if copies:
            source, target = torch.tensor(copies, device=self.device).unbind(1)
            for pool in (*self.k_pages, *self.v_pages):
                pool[target] = pool[source]
            self._send_table()

    def reset(self) -> None:
        """Forget everything; addresses stay."""
        self.lengths, self._oldest = [0] * self.max_seqs, [0] * self.max_seqs
        self.pages.shrink(self.lengths)
        self.seq_lens.zero_()
        self.codec_ids.zero_()


def copy_tokens(old: SpectralCache, new: SpectralCache) -> None:
    """The tokens of one cache to another, empty one of the same codec and rows, with more room."""
    new.reserve(old.lengths)
    new.advance(old.seq_lens)
    new.codec_ids.copy_(old.codec_ids)
    new._oldest = list(old._oldest)
    pools = [(*x.k_pages, *x.v_pages) for x in (old, new)]
    for row, length in enumerate(old.lengths):
        pages = slice(-(-length // PAGE_SIZE))
        at, to = old.block_table[row, pages].long(), new.block_table[row, pages].long()
        for source, target in zip(*pools, strict=True):
            target[to] = source[at]
    slots = [(*x.k_exact, *x.v_exact) for x in (old, new)]
    for source, target in zip(*slots, strict=True):  # as many, or a ring that has not turned
        target[:, :, : source.shape[2]] = source
