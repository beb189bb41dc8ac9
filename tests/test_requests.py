"""Slots and kept sinks of an engine's requests, against a model of the engine that knows all.

The model (`Requests`) has pages that are found again by what is in them, as vLLM's prefix cache
does, numbers that go from one request to the next at once, and requests that come, pause, are
preempted and leave at any time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from spectral_kernels._requests import IndexedSlots, PagedSlots, Rows, SinkPool
from spectral_kernels.layout import PAGE_SIZE

PAGES = 6  # a few more than entries


@pytest.mark.parametrize("entries", [1, 2, 5])
def test_no_order_of_events_finds_wrong_sinks(rng, entries):
    """Memory is written where `write` says; what `find` finds is always the page's last writing."""
    for _ in range(100):
        pool, memory, version = SinkPool(entries), [None] * entries, {}
        recent: list[int] = []  # pages by use, of those that must be known
        for number in range(80):
            what, page = rng.choice(["write", "forget", "find"]), int(rng.integers(PAGES))
            if what == "find":
                entry = pool.find(page)
                assert (entry >= 0) == (page in recent)
                if entry >= 0:
                    assert memory[entry] == (page, version[page])
                    recent.append(recent.pop(recent.index(page)))
                continue
            version[page] = number
            recent = [x for x in recent if x != page]
            if what == "write":
                memory[pool.write(page)] = page, number
                recent = [*recent, page][-entries:]
            else:
                pool.forget(page)


@dataclass
class Request:
    """past: tokens computed.      chain: what its pages hold, by page."""

    chain: list[int]
    prompt: int
    past: int = 0
    pages: list[int] = field(default_factory=list)
    index: int = -1
    last: int = -2  # step in which it ran

    def content(self, page: int) -> tuple[int, ...]:
        return tuple(self.chain[: page + 1])


class Requests:
    """vLLM's block manager and the numbers of its runner, as far as a slot's owner depends on them.

    Args:
        slots: requests that may run.
    """

    def __init__(self, slots: int) -> None:
        self.free_numbers = list(range(slots))
        self.free_pages = list(range(1, 40))  # the one free for longest is taken first
        self.content: dict[int, tuple[int, ...]] = {}
        self.running: list[Request] = []

    def start(self, request: Request) -> None:
        request.pages, request.past = [], 0
        while (request.past + PAGE_SIZE) < request.prompt:
            wanted = request.content(len(request.pages))
            page = next((p for p, held in self.content.items() if held == wanted), None)
            if page is None:
                break
            if page in self.free_pages:
                self.free_pages.remove(page)
            request.pages.append(page)
            request.past += PAGE_SIZE
        request.index, request.last = self.free_numbers.pop(), -2
        self.running.append(request)

    def run(self, request: Request, new: int) -> bool:
        """The request's next tokens get their pages; False: there are none."""
        missing = -(-(request.past + new) // PAGE_SIZE) - len(request.pages)
        if missing > len(self.free_pages):
            return False
        for _ in range(missing):
            page = self.free_pages.pop(0)
            self.content.pop(page, None)
            request.pages.append(page)
        for number in range(request.past // PAGE_SIZE, (request.past + new) // PAGE_SIZE):
            self.content.setdefault(request.pages[number], request.content(number))
        return True  # full pages are found again from now on, before they are computed

    def stop(self, request: Request) -> None:
        self.running.remove(request)
        self.free_numbers.append(request.index)
        used = {page for other in self.running for page in other.pages}
        self.free_pages += [p for p in reversed(request.pages) if p not in used]


def computed(memory: dict[int, tuple[int, ...]], request: Request) -> bool:
    """Are the full pages that it goes on from as they should be?"""
    pages = range(request.past // PAGE_SIZE)
    return all(memory[request.pages[at]] == request.content(at) for at in pages)


def simulate(placing: Any, window: int, rng: np.random.Generator, steps: int, slots: int) -> int:
    """Returns how many rows were counted as new without being new."""
    engine, held, again = Requests(slots), {}, 0
    memory: dict[int, tuple[int, ...]] = {}  # pages as they are on the device
    for step in range(steps):
        for request in list(engine.running):
            if rng.random() < 0.1 or request.past > 400:
                engine.stop(request)
                if rng.random() < 0.3 and request.past:  # preempted, and back in the same step
                    request.prompt = request.past + 1
                    engine.start(request)
        rows, coming = [], int(rng.choice([0, 0, 1, 3]))
        for number in range(len(engine.running) + coming):
            if number >= len(engine.running):  # those that come see what was scheduled before
                if not engine.free_numbers:
                    break
                chain = [int(x) for x in rng.integers(0, 9, 8)]
                if engine.running and rng.random() < 0.5:  # as another, on from some page
                    chain = [*rng.choice(engine.running).chain[: rng.integers(1, 4)], *chain][:8]
                prompt = int(rng.choice([3, 62, 64, 65, 128, 129, 190, 200, 300]))
                engine.start(Request(chain, prompt))
            request = engine.running[number]
            if rng.random() < 0.1:  # no budget left
                continue
            left = request.prompt - request.past
            new = min(left, int(rng.choice([1, 5, 64, 100]))) if left > 0 else 1
            if engine.run(request, new):
                rows.append((request, new))
        rows.sort(key=lambda x: (x[1] != 1, x[1]))
        if not rows:
            continue
        past = np.array([r.past for r, _ in rows])
        length = past + np.array([new for _, new in rows])
        filling = np.array([r.past < r.prompt for r, _ in rows])
        needed = placing.needed(length, filling).tolist()
        pages = {i: np.array(rows[i][0].pages + [0] * 4) for i in needed}
        paged = isinstance(placing, PagedSlots)
        index = None if paged else np.array([r.index for r, _ in rows])
        given = Rows(past, length, filling, pages)
        got, started = placing.place(given, index)
        assert len(set(got.tolist())) == len(rows), "a slot for each"
        for i, (request, _) in enumerate(rows):
            if i not in started:
                assert request.past, "a request that has computed nothing is new"
                chain, end = held[int(got[i])]
                assert end == request.past
                first = max(end - window, 0) // PAGE_SIZE
                last = -(-end // PAGE_SIZE)
                assert chain[:last][first:] == request.chain[first:last]
                assert chain[:last] == request.chain[:last], "the sinks are its own, too"
            again += i in started and request.last == step - 1 and request.past > 0
            request.last = step
        for i in set(started) - set(given.late):  # whose slots are filled before the step
            assert computed(memory, rows[i][0])
        for i in sorted(set(range(len(rows))) - set(given.late)) + given.late:
            request, new = rows[i]
            assert computed(memory, request), "computed before it is read"
            for at in range(request.past // PAGE_SIZE, -(-(request.past + new) // PAGE_SIZE)):
                full = PAGE_SIZE * (at + 1) <= request.past + new
                memory[request.pages[at]] = request.content(at) if full else ()
            held[int(got[i])] = request.chain, request.past + new
            request.past += new
    return again


@pytest.mark.parametrize("window", [16, 300])
@pytest.mark.parametrize("kind", ["indexed", "paged"])
def test_who_goes_on_finds_its_own_tokens(kind, window):
    """Whatever comes and goes: a row that is not counted as new has a slot with its own exact
    tokens, and one that ran in the step before is not counted as new (of two that are known by the
    same pages, one may be)."""
    for seed in range(60):
        slots = 6
        placing = IndexedSlots(slots, window) if kind == "indexed" else PagedSlots(slots)
        again = simulate(placing, window, np.random.default_rng(seed), 120, slots)
        assert again == 0 or kind == "paged"


def test_dummy_rows_get_the_scratch_slot():
    """vLLM captures graphs with rows of no requests."""
    rows = Rows(np.array([0, 5]), np.array([1, 6]), np.array([False, False]), {})
    slots, started = IndexedSlots(4, 16).place(rows, None)
    assert slots.tolist() == [4, 4]
    assert started == []


def rows_of(*spans: tuple[int, int, list[int]], filling: bool = True) -> Rows:
    """Rows (past, length, pages)."""
    past, length = (np.array([span[i] for span in spans]) for i in (0, 1))
    pages = {i: np.array([*span[2], 0]) for i, span in enumerate(spans)}
    return Rows(past, length, np.full(len(spans), filling), pages)


@pytest.mark.parametrize(("pages", "between", "new"), [
    ([7, 8], 0, False),  # goes on, or another that finds the very same pages
    ([7, 9], 0, True),  # another that found other pages behind the same first one
    ([7, 8], 1, True),  # who knows who has written to the page in between
])  # fmt: skip
def test_a_number_that_goes_to_another_request(pages, between, new):
    slots, number = IndexedSlots(4, 16), np.array([2])
    assert slots.place(rows_of((0, 128, [7, 8])), number)[1] == [0]
    for _ in range(between):
        slots.place(rows_of((0, 64, [5])), np.array([3]))
    assert slots.place(rows_of((128, 130, [*pages, 11])), number)[1] == [0] * new


@pytest.mark.parametrize("kind", ["indexed", "paged"])
def test_late_rows(kind):
    """Pages 7 to 9 held a request that has ended; now one writes them anew, another starts behind
    it with that request's number, and writes the page that a third starts on."""
    slots = IndexedSlots(4, 16) if kind == "indexed" else PagedSlots(4)
    slots.place(rows_of((0, 128, [7, 8])), np.array([2]))
    rows = rows_of((192, 193, [7, 8, 9, 5]), (128, 200, [7, 8, 9, 6]), (0, 128, [7, 8]))
    assert rows.late == [1, 0]
    assert slots.place(rows, np.array([1, 2, 3]))[1] == [0, 1, 2]


def test_a_page_that_was_written_anew():
    """Pages 7 and 8 held one request's tokens, then 8 another's: who finds both is a third."""
    slots = PagedSlots(4)
    first = slots.place(rows_of((0, 128, [7, 8])))[0]
    other, started = slots.place(rows_of((64, 128, [7, 8])))
    assert started == [0]
    assert other != first
    assert slots.place(rows_of((128, 129, [7, 8, 9])))[1] == []
    assert slots.place(rows_of((128, 129, [7, 8, 10])))[1] == [0]


def test_a_page_that_another_wrote_past_its_end():
    """Page 9 held the end of one request of 192 tokens, then tokens of a longer one, which another
    finds: it is not the first."""
    slots = PagedSlots(4)
    slots.place(rows_of((0, 192, [7, 8, 9])))
    assert slots.place(rows_of((128, 200, [7, 8, 9, 10])))[1] == [0]
    assert slots.place(rows_of((192, 193, [7, 8, 9, 11])))[1] == [0]


def test_an_exact_prompt_goes_on():
    """Its pages cannot be started on: tokens that are computed are its own, whatever ran between;
    only one without any starts."""
    slots, number = IndexedSlots(4, 1024, exact=True), np.array([2])
    assert slots.place(rows_of((0, 64, [7])), number)[1] == [0]
    slots.place(rows_of((0, 64, [5])), np.array([3]))
    assert slots.place(rows_of((64, 128, [7, 8])), number)[1] == []
    assert slots.place(rows_of((0, 64, [9])), number)[1] == [0]
