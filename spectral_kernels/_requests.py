"""Which slot a request of an engine has, and whose sinks are kept. Host only, for vllm.py.

Test: tests/test_vllm.py (with vLLM), tests/test_requests.py.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .layout import PAGE_SIZE


class SinkPool:
    """Which first pages' exact sinks are kept, and in which entry.

    An entry belongs to what was computed into a page from token 0 on. Whoever computes these tokens
    anew takes a new entry or has the old one forgotten: none is ever found for other tokens than
    the page holds. The one unused for longest gives way; running requests have their own copy.

    Args:
        entries: of the pool, 0 .. entries - 1.
    """

    def __init__(self, entries: int) -> None:
        self._entries: OrderedDict[int, int] = OrderedDict()  # of pages; last: used last
        self._free = list(range(entries))

    def find(self, page: int) -> int:
        """The entry of a sequence that starts on this page, -1: none."""
        if page in self._entries:
            self._entries.move_to_end(page)
        return self._entries.get(page, -1)

    def write(self, page: int) -> int:
        """The entry for the sinks that are about to be computed into this page."""
        self.forget(page)
        if not self._free:
            self._free.append(self._entries.popitem(last=False)[1])
        self._entries[page] = self._free.pop()
        return self._entries[page]

    def forget(self, page: int) -> None:
        """This page is about to get other tokens."""
        if page in self._entries:
            self._free.append(self._entries.pop(page))


@dataclass
class Rows:
    """Requests of a step: arrays [n] of tokens before it, and with the new ones; whether the prompt
    is still being computed; by row, where they are known, the numbers of its pages."""

    past: np.ndarray
    length: np.ndarray
    filling: np.ndarray
    pages: dict[int, np.ndarray]

    def of(self, i: int, start: int, stop: int) -> tuple[int, ...]:
        """Pages of row i for positions start .. stop - 1."""
        return tuple(self.pages[i][max(start, 0) // PAGE_SIZE : -(-stop // PAGE_SIZE)].tolist())

    @cached_property
    def late(self) -> list[int]:
        """Rows that start on tokens that others compute in this very step (vLLM finds a page again
        as soon as it is scheduled), in an order in which these come first."""
        begun = {p: i for i in self.pages for p in self.of(i, self.past[i], self.length[i])}
        found = (
            i for i in self.pages if any(begun.get(p, i) != i for p in self.of(i, 0, self.past[i]))
        )
        return sorted(found, key=lambda i: self.past[i])


class IndexedSlots:
    """Slots where vLLM numbers its requests (model runner V2): the number is the slot.

    A number goes from one request to another unseen. One that starts is filling its prompt, so only
    such rows are in doubt. It goes on if it was filling in the step before, up to where it starts
    now, into the pages that it has now (no step came between that could write to them).
    """

    def __init__(self, slots: int, window: int, exact: bool = False) -> None:
        self.scratch, self.window, self.step = slots, window, 0
        self.exact = exact  # pages hold nothing to start on: what is computed already goes on
        self._seen: dict[int, tuple[Any, ...]] = {}  # slot: step, length, pages of the window

    def needed(self, length: np.ndarray, filling: np.ndarray) -> np.ndarray:
        """Rows whose pages are to be known: those that fill their prompts, and where there are any,
        those that end a page: one of these may start on it."""
        return np.flatnonzero((filling | (length % PAGE_SIZE == 0)) & filling.any())

    def place(self, rows: Rows, index: np.ndarray | None) -> tuple[np.ndarray, list[int]]:
        """Slots [n], scratch where vLLM numbers none (dummy rows); and the rows that start now."""
        slots = np.full(len(rows.past), self.scratch) if index is None else index
        self.step, started = self.step + 1, []
        for i in np.flatnonzero(rows.filling).tolist():
            (before, now), slot = (rows.past[i], rows.length[i]), int(slots[i])
            expected = self.step - 1, before, rows.of(i, before - self.window, before)
            known = self._seen.get(slot) == expected and i not in rows.late
            if not before or not (self.exact or known):
                started.append(i)
            self._seen[slot] = self.step, now, rows.of(i, now - self.window, now)
        return slots, started


class PagedSlots:
    """Slots where vLLM does not number its requests (model runner V1): known by all their pages."""

    def __init__(self, slots: int) -> None:
        self._used, self.step = np.zeros(slots, np.int64), 0
        self._owner: dict[tuple[int, tuple[int, ...]], int] = {}  # length, pages: slot

    def needed(self, length: np.ndarray, filling: np.ndarray) -> np.ndarray:
        """As `IndexedSlots.needed`: all."""
        return np.arange(len(length))

    def place(self, rows: Rows, index: None = None) -> tuple[np.ndarray, list[int]]:
        """As `IndexedSlots.place`."""
        slots, self.step = np.zeros(len(rows.past), np.int64), self.step + 1
        spans = list(zip(rows.past.tolist(), rows.length.tolist(), strict=True))
        started, begun = [], set()
        for i, (past, length) in enumerate(spans):
            slot = self._owner.pop((past, rows.of(i, 0, past)), -1)
            if slot < 0 or i in rows.late:
                started.append(i)
            else:
                slots[i], self._used[slot] = slot, self.step
            begun |= set(rows.of(i, past + PAGE_SIZE - 1, length))  # whoever had them has them not
        self._owner = {k: s for k, s in self._owner.items() if begun.isdisjoint(k[1])}
        for i in started:
            held = np.isin(np.arange(len(self._used)), list(self._owner.values()))
            slots[i] = np.lexsort((self._used, held, self._used == self.step))[0]
            self._used[slots[i]] = self.step
            self._owner = {k: s for k, s in self._owner.items() if s != slots[i]}
        for i, (_, length) in enumerate(spans):
            self._owner[length, rows.of(i, 0, length)] = int(slots[i])
        return slots, started
