"""Every public function turns wrong arguments down before it writes anything, and says which: the
argument's name, what was expected, what came.

A `Call` is a call that works. Of its tensors each is then given wrong in every way that applies (no
tensor, other dtype, other rank, other size, another device, a last dimension of stride 2), one at a
time; bounds and what arguments must have in common are listed by hand. Wrong tensors on another
device are on "meta": no GPU is needed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import spectral_kernels as sk
from spectral_kernels.cache import PageTable
from spectral_kernels.layout import Bands, PageLayout
from tests.cases import DEVICE, PageSpec, int32, make_pages, pages_of, poisoned
from tests.test_cache import make_cache
from tests.test_codec import random_codec

WAYS = ("no tensor", "dtype", "rank", "size", "device", "stride")
# What a wrong argument no longer fits may be named in its place.
OTHER_NAMES = {
    "q": "q|codec|codec.freqs|seq_ids",
    "k": "k|codec|codec.freqs",
    "x": "x|codec|codec.freqs|positions",
    "pages": "pages|codec.freqs|x",
    "k_pages": "k_pages|k",
    "v_pages": "v_pages|v",
    "o": "o|lse|out",
    "o_a": "o_a|lse_a|o_b",
    "k_exact": "k_exact|v_exact|q",
}


@dataclass
class Call:
    """A call that works, its arguments by name, and the ways in which each tensor may be wrong."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    ways: dict[str, tuple[str, ...]]

    def wrong(self, **changes: Any) -> Callable[[], Any]:
        return lambda: self.function(**{**self.arguments, **changes})


def broken(x: torch.Tensor, way: str) -> Any:
    """A tensor that is wrong in one way."""
    if way == "no tensor":
        return x.tolist()
    if way == "dtype":
        return x.to(torch.float64 if x.dtype != torch.float64 else torch.int16)
    if way == "rank":
        return x[None]
    if way == "size":
        return torch.cat((x, x[..., :1]), dim=-1)
    if way == "device":
        return x.to("meta")
    return torch.stack((x, x), dim=-1)[..., 0]


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for part in value for x in tensors_in(part)] if isinstance(value, tuple) else []


@functools.cache
def calls() -> dict[str, Call]:
    rng = np.random.default_rng(0)
    t = pages_of(make_pages(rng, PageSpec("16x8", "32x4", 64, 2, (70, 9), codecs=1)))
    i32 = functools.partial(torch.zeros, dtype=torch.int32, device=DEVICE)
    zeros = functools.partial(torch.zeros, device=DEVICE)
    q, x = zeros(2, 4, 3, 64), zeros(2, 2, 3, 64)
    k_exact, v_exact = poisoned(2, 2, 12, 64), poisoned(2, 2, 12, 64)
    table = {"block_table": t.block_table, "seq_lens": t.seq_lens}
    ids = {"codec_ids": i32(2), "seq_ids": i32(2)}
    freqs = t.codec.freqs
    every, loose = WAYS, ("no tensor", "dtype", "rank", "device")
    workspace = zeros(1 << 18, dtype=torch.uint8)
    state = {"o": poisoned(2, 3, 64), "lse": poisoned(2, 3)}
    of_two = {
        "o_a": poisoned(2, 64), "lse_a": poisoned(2), "o_b": poisoned(2, 64), "lse_b": poisoned(2),
    }  # fmt: skip
    known = [
        Call(
            "attend_spectral", sk.attend_spectral,
            {
                "q": q, "k_pages": t.k_pages, "v_pages": t.v_pages, "codec": t.codec, **table,
                "sinks": 4, "window": 8, "exact": (k_exact, v_exact), **ids,
                "out": poisoned(2, 4, 3, 64), "lse": poisoned(2, 4, 3), "workspace": workspace,
            },
            {
                "q": (*every[:2], "rank", "size", "device", "stride"), "k_pages": every,
                "v_pages": every, "block_table": (*loose, "stride"), "seq_lens": every,
                "codec_ids": every, "seq_ids": every, "out": every, "lse": every,
            },
        ),
        Call(
            "attend_window", sk.attend_window,
            {
                "q": q, "k_exact": k_exact, "v_exact": v_exact, "seq_lens": t.seq_lens, "sinks": 4,
                "window": 8, "seq_ids": i32(2), "out": poisoned(2, 4, 3, 64),
                "lse": poisoned(2, 4, 3),
            },
            dict.fromkeys(("q", "k_exact", "v_exact", "seq_lens", "seq_ids", "out", "lse"), every),
        ),
        Call(
            "append", sk.append,
            {
                "k": x, "v": zeros(2, 2, 3, 64), "codec": t.codec, "k_pages": t.k_pages,
                "v_pages": t.v_pages, "k_exact": k_exact, "v_exact": v_exact, **table, "sinks": 4,
                **ids,
            },
            {
                **dict.fromkeys(("k", "v", "k_pages", "v_pages", "k_exact", "v_exact"), every),
                "block_table": (*loose, "stride"), "seq_lens": every, "codec_ids": every,
                "seq_ids": every,
            },
        ),
        Call(
            "encode", sk.encode,
            {
                "x": x, "codec": t.codec, "pages": t.k_pages, **table, "side": "k",
                "first": i32(2), "exact": k_exact, "sinks": 4, **ids,
            },
            {
                "x": every, "pages": every, "block_table": (*loose, "stride"), "seq_lens": every,
                "first": every, "exact": every, "codec_ids": every, "seq_ids": every,
            },
        ),
        Call(
            "decode", sk.decode,
            {
                "pages": t.k_pages, "codec": t.codec, **table, "side": "k", "first_page": i32(2),
                "codec_ids": i32(2),
            },
            {
                "pages": every, "block_table": (*loose, "stride"), "seq_lens": every,
                "first_page": every, "codec_ids": every,
            },
        ),
        Call(
            "rotate", sk.rotate,
            {"x": x, "positions": i32(2, 3), "freqs": freqs, "out": zeros(2, 2, 3, 64)},
            {
                "x": (*loose, "stride"), "positions": every[:-1], "freqs": every, "out": every,
            },
        ),
        Call(
            "turn_back", sk.turn_back,
            {
                "x": x, "positions": i32(2, 3), "freqs": freqs, "frame": 64,
                "out": zeros(2, 2, 3, 64),
            },
            {
                "x": (*loose, "stride"), "positions": every[:-1], "freqs": every, "out": every,
            },
        ),
        Call(
            "freqs_from_inv_freq", sk.freqs_from_inv_freq, {"inv_freq": torch.ones(8)},
            {"inv_freq": ("no tensor", "rank")},
        ),
        Call(
            "project_queries", sk.project_queries,
            {"q": q, "codec": t.codec, "max_frames": 2, "codec_ids": i32(2)},
            {"q": every, "codec_ids": every},
        ),
        Call(
            "merge_states", sk.merge_states,
            {**of_two, "out": poisoned(2, 64), "lse": poisoned(2)},
            dict.fromkeys((*of_two, "out"), every),
        ),
        Call(
            "merge_many_states", sk.merge_many_states,
            {**state, "out": poisoned(2, 64), "out_lse": poisoned(2)},
            dict.fromkeys(("o", "lse", "out"), every),
        ),
        Call(
            "pack_pages", sk.pack_pages,
            {"values": zeros(2, 64, 16), "bands": Bands.parse("16x8"), "side": "k"},
            {"values": ("no tensor", "size")},
        ),
        Call(
            "unpack_pages", sk.unpack_pages,
            {"pages": t.k_pages, "bands": Bands.parse("16x8"), "side": "k"},
            {"pages": ("no tensor", "dtype", "size")},
        ),
        Call(
            "attend_workspace", sk.attend_workspace,
            {"codec": t.codec, "batch": 2, "query_heads": 4, "queries": 1, "max_pages": 3},
            {},
        ),
        Call("Bands", Bands, {"bands": ((16, 8),)}, {}),
        Call(
            "PageLayout", PageLayout,
            {"k": Bands.parse("16x8"), "v": Bands.parse("32x4"), "head_dim": 64, "frame": 128}, {},
        ),
    ]  # fmt: skip
    codec = random_codec()
    fields = {f.name: getattr(codec, f.name) for f in dataclasses.fields(codec)}
    names = [name for name in fields if name != "layout"]
    known.append(Call("Codec", sk.Codec, fields, dict.fromkeys(names, every)))
    known.append(Call("ModelCodec", sk.ModelCodec, {"layers": (), "sinks": 0, "window": 1}, {}))
    return {call.name: call for call in known}


def tensor_rows() -> Iterator[tuple[str, str, str]]:
    for call in calls().values():
        for argument, ways in call.ways.items():
            for way in ways:
                yield call.name, argument, way


def refused(call: Callable[[], Any], error: type[Exception], names: str) -> None:
    """The call raises the error, which names one of the arguments, what was expected and what
    came."""
    with pytest.raises(error) as found:
        call()
    assert re.match(rf"({names})\b.*expected .*got ", str(found.value), re.S), str(found.value)


@pytest.fixture
def untouched() -> Iterator[None]:
    """Nothing that any call was given has changed."""

    def bits() -> list[torch.Tensor]:
        given = [x for c in calls().values() for a in c.arguments.values() for x in tensors_in(a)]
        return [x.clone().contiguous().view(torch.uint8) for x in given if not x.is_meta]

    before = bits()
    yield
    assert all(torch.equal(a, b) for a, b in zip(before, bits(), strict=True))


def test_every_public_name_is_here():
    assert set(sk.__all__) == {*calls(), "PAGE_SIZE", "SpectralCache"}


@pytest.mark.parametrize("name", sorted(calls()))
def test_the_call_works(name):
    """So that what is refused below is refused for the one thing that is wrong."""
    calls()[name].wrong()()
    calls.cache_clear()  # it has written to its outputs


@pytest.mark.parametrize(("name", "argument", "way"), list(tensor_rows()))
def test_a_wrong_tensor(name, argument, way, untouched):
    call = calls()[name]
    value = broken(call.arguments[argument], way)
    error = TypeError if way in ("no tensor", "dtype") else ValueError
    # A codec's tensors are compared with its first ones: either may be what is named.
    names = r"\w+" if name == "Codec" else OTHER_NAMES.get(argument, argument)
    refused(call.wrong(**{argument: value}), error, names)


def given(name: str, argument: str) -> Any:
    return calls()[name].arguments[argument]


K, Q = torch.zeros(2, 2, 9, 64), torch.zeros(2, 4, 9, 64)
ODD = torch.zeros(4, 2, 1024 + 8, dtype=torch.uint8, device=DEVICE)[..., :1024]
EXACT = torch.zeros(2, 2, 12, 64, device=DEVICE)
ROWS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    # function, what is wrong, error, names
    ("attend_spectral", {"q": torch.zeros(2, 3, 3, 64)}, ValueError, "q"),  # heads not of G
    ("attend_spectral", {"q": torch.zeros(2, 4, 3, 32)}, ValueError, "q"),
    ("attend_spectral", {"q": torch.zeros(3, 4, 3, 64)}, ValueError, "block_table|codec_ids|q"),
    ("attend_spectral", {"q": Q}, ValueError, "q"),  # more queries than the window
    ("attend_spectral", {"codec": None}, TypeError, "codec"),
    ("attend_spectral", {"k_pages": ODD}, ValueError, "k_pages"),  # not a multiple of 16 apart
    ("attend_spectral", {"sinks": -1}, ValueError, "sinks, window|sinks"),
    ("attend_spectral", {"window": -1}, ValueError, "sinks, window|window"),
    ("attend_spectral", {"sinks": 12}, ValueError, "k_exact"),  # no slot is a ring's
    ("attend_spectral", {"window": 9}, ValueError, "window"),
    ("attend_spectral", {"window": 0}, ValueError, "window"),
    ("attend_spectral", {"scale": math.nan}, ValueError, "scale"),
    ("attend_spectral", {"num_splits": 0}, ValueError, "num_splits"),
    ("attend_spectral", {"num_splits": 129}, ValueError, "num_splits"),
    ("attend_spectral", {"num_splits": 2.5}, TypeError, "num_splits"),
    ("attend_spectral", {"sinks": 4.0}, TypeError, "sinks"),
    ("attend_spectral", {"window": "8"}, TypeError, "window"),
    ("attend_spectral", {"exact": (EXACT,)}, ValueError, "exact"),
    ("attend_spectral", {"exact": (EXACT, EXACT[:, :, :5])}, ValueError, "v_exact"),
    ("attend_spectral", {"exact": (EXACT[:, :1],) * 2}, ValueError, "k_exact"),
    ("attend_spectral", {"exact": (EXACT, EXACT.half())}, TypeError, "v_exact"),
    ("attend_spectral", {"exact": (EXACT.double(),) * 2}, TypeError, "k_exact"),
    ("attend_spectral", {"block_table": int32(np.zeros((3, 2)))}, ValueError, "block_table"),
    ("attend_window", {"q": torch.zeros(2, 3, 3, 64)}, ValueError, "q"),
    ("attend_window", {"q": Q, "out": None, "lse": None}, ValueError, "q"),
    ("attend_window", {"k_exact": EXACT[:1], "v_exact": EXACT[:1], "seq_ids": None}, ValueError,
     "k_exact"),
    ("attend_window", {"sinks": -1}, ValueError, "sinks"),
    ("attend_window", {"sinks": 12}, ValueError, "k_exact"),
    ("attend_window", {"window": 0}, ValueError, "window"),
    ("attend_window", {"window": 9}, ValueError, "window"),
    ("attend_window", {"window": 8.0}, TypeError, "window"),
    ("attend_window", {"scale": math.inf}, ValueError, "scale"),
    ("append", {"k": K, "v": K}, ValueError, "k"),  # more tokens than the ring has slots
    ("append", {"v": torch.zeros(2, 2, 2, 64)}, ValueError, "v"),
    ("append", {"k_exact": None}, TypeError, "k_exact"),
    ("append", {"v_exact": EXACT[:, :, :7]}, ValueError, "v_exact"),
    ("append", {"sinks": 10}, ValueError, "k"),  # 3 tokens, 2 slots of a ring
    ("append", {"sinks": -1}, ValueError, "sinks"),
    ("append", {"codec": "codec"}, TypeError, "codec"),
    ("append", {"k_pages": ODD}, ValueError, "k_pages"),
    ("encode", {"x": torch.zeros(2, 1, 3, 64)}, ValueError, "x"),
    ("encode", {"x": torch.zeros(2, 2, 3, 32)}, ValueError, "x"),
    ("encode", {"codec": None}, TypeError, "codec"),
    ("encode", {"pages": ODD}, ValueError, "pages"),
    ("encode", {"side": "q"}, ValueError, "side"),
    ("encode", {"sinks": 12}, ValueError, "exact"),
    ("encode", {"sinks": -1}, ValueError, "sinks"),
    ("encode", {"sinks": 4.0}, TypeError, "sinks"),
    ("decode", {"side": "x"}, ValueError, "side"),
    ("decode", {"codec": "codec"}, TypeError, "codec"),
    ("decode", {"pages": ODD.flatten(0, 1)[:4, None].expand(4, 2, 1024)}, ValueError, "pages"),
    ("rotate", {"freqs": torch.zeros(33, dtype=torch.int64, device=DEVICE)}, ValueError, "freqs"),
    ("turn_back", {"frame": 0}, ValueError, "frame"),
    ("turn_back", {"frame": 64.0}, TypeError, "frame"),
    ("freqs_from_inv_freq", {"inv_freq": torch.tensor([-1.0])}, ValueError, "inv_freq"),
    ("freqs_from_inv_freq", {"inv_freq": torch.tensor([math.inf])}, ValueError, "inv_freq"),
    ("freqs_from_inv_freq", {"inv_freq": torch.tensor([1])}, TypeError, "inv_freq"),
    ("project_queries", {"q": torch.zeros(2, 3, 3, 64)}, ValueError, "q"),
    ("project_queries", {"codec": "codec"}, TypeError, "codec"),
    ("project_queries", {"max_frames": -1}, ValueError, "max_frames"),
    ("merge_states", {"lse": torch.zeros(3)}, ValueError, "lse"),
    ("merge_states", {"lse": torch.zeros(2, dtype=torch.float64)}, TypeError, "lse"),
    ("merge_many_states", {"o": torch.zeros(3, 64), "lse": torch.zeros(3)}, ValueError, "o"),
    ("merge_many_states", {"out_lse": torch.zeros(3)}, ValueError, "out_lse"),
    ("pack_pages", {"values": torch.zeros(2, 63, 16)}, ValueError, "values"),
    ("pack_pages", {"side": "x"}, ValueError, "side"),
    ("unpack_pages", {"side": "K"}, ValueError, "side"),
    ("attend_workspace", {"codec": None}, TypeError, "codec"),
    ("attend_workspace", {"query_heads": 3}, ValueError, "query_heads"),
    ("attend_workspace", {"batch": -1}, ValueError, "batch"),
    ("attend_workspace", {"batch": 2.0}, TypeError, "batch"),
    ("attend_workspace", {"query_heads": -4}, ValueError, "query_heads"),
    ("attend_workspace", {"queries": -1}, ValueError, "queries"),
    ("attend_workspace", {"max_pages": -1}, ValueError, "max_pages"),
    ("attend_workspace", {"slots": -1}, ValueError, "slots"),
    ("Bands", {"bands": ()}, ValueError, "bands"),
    ("Bands", {"bands": ((16, 3),)}, ValueError, "bands"),
    ("Bands", {"bands": ((16, 4), (16, 8))}, ValueError, "bands"),
    ("Bands", {"bands": ((24, 4),)}, ValueError, "bands"),
    ("Bands", {"bands": ((0, 8),)}, ValueError, "bands"),
    ("PageLayout", {"head_dim": 72}, ValueError, "head_dim"),
    ("PageLayout", {"frame": 96}, ValueError, "frame"),
    ("PageLayout", {"frame": 0}, ValueError, "frame"),
    ("PageLayout", {"v": Bands.parse("144x4")}, ValueError, "v"),
    ("PageLayout", {"k": Bands.parse("144x2")}, ValueError, "k"),
    ("Codec", {"k_scale": torch.zeros(2, 2, 32)}, ValueError, "k_scale"),  # of two rows, not one
    ("Codec", {"v_basis": torch.zeros(1, 3, 48, 64, dtype=torch.int8)}, ValueError, "v_basis"),
    ("ModelCodec", {"sinks": -1}, ValueError, "sinks"),
    ("ModelCodec", {"window": 0}, ValueError, "window"),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {' '.join(row[1])}")
def test_a_wrong_argument(row, untouched):
    name, changes, error, names = row
    on = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in changes.items()}
    if name in ("freqs_from_inv_freq", "pack_pages"):
        on = changes
    refused(calls()[name].wrong(**on), error, names)


def test_a_workspace_that_will_not_do(untouched):
    """Where kernels run: the twin needs none."""
    from tests.cases import kernels

    call = calls()["attend_spectral"]
    with kernels():
        for workspace, error in (
            (given("attend_spectral", "workspace")[:16], ValueError),
            (given("attend_spectral", "workspace")[1:], ValueError),  # no float begins there
            (torch.zeros(1 << 18, device=DEVICE), TypeError),
        ):
            refused(call.wrong(workspace=workspace), error, "workspace")


# ---- the cache -----------------------------------------------------------------------------------

BATCH, HEADS = 2, 2


def new(tokens: int = 3, **changes: Any) -> torch.Tensor:
    shape = {"batch": BATCH, "heads": HEADS, "tokens": tokens, "dim": 64, **changes}
    return torch.zeros(*shape.values(), device=DEVICE)


CACHE_ROWS: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    # method, arguments, error, names
    ("reserve", (320,), ValueError, "new"),
    ("reserve", ([1],), ValueError, "new"),
    ("reserve", (-1,), ValueError, "new"),
    ("hold", ([321, 1],), ValueError, "tokens"),
    ("hold", ([1],), ValueError, "tokens"),
    ("hold", (-1,), ValueError, "tokens"),
    ("advance", (int32(np.zeros(3)),), ValueError, "new"),
    ("advance", (torch.zeros(BATCH, device=DEVICE),), TypeError, "new"),
    ("advance", (int32(np.zeros(BATCH)).to("meta"),), ValueError, "new"),
    ("advance", (-1,), ValueError, "new"),
    ("append", (0, new(), new(2)), ValueError, "v"),
    ("append", (0, new(), new().half()), TypeError, "v"),
    ("append", (0, new().half(), new().half()), TypeError, "k_exact"),
    ("append", (0, new(11), new(11)), ValueError, "k"),
    ("append", (0, new(batch=3), new(batch=3)), ValueError, "block_table"),
    ("append", (0, new(heads=1), new(heads=1)), ValueError, "k"),
    ("append", (0, new().to("meta"), new().to("meta")), ValueError, "codec.freqs|k"),
    ("attend", (0, new(heads=3)), ValueError, "q"),
    ("attend", (0, new(dim=32)), ValueError, "q"),
    ("attend", (0, new(9)), ValueError, "q"),
    ("attend", (0, new(batch=3)), ValueError, "block_table"),
    ("attend", (0, new().double()), TypeError, "q"),
    ("prefill", (0, new(), new().half()), TypeError, "v"),
    ("prefill", (0, new(), new(2)), ValueError, "v"),
    ("prefill", (0, new().half(), new().half()), TypeError, "k"),
    ("prefill", (0, new(heads=1), new(heads=1)), ValueError, "k"),
    ("prefill", (0, new(), new(), int32(np.zeros(3))), ValueError, "first"),
    ("rollback", (11,), ValueError, "count"),
    ("rollback", ([1],), ValueError, "count"),
    ("rollback", (-1,), ValueError, "count"),
    ("reorder", ([0],), ValueError, "index"),
    ("reorder", ([0, 2],), ValueError, "index"),
    ("reorder", ([0, -1],), ValueError, "index"),
]


@pytest.mark.parametrize("row", CACHE_ROWS, ids=lambda row: row[0])
def test_a_cache_refuses_and_is_as_before(row):
    method, arguments, error, names = row
    cache = make_cache()
    cache.reserve([10, 20])
    cache.advance(int32(np.array([10, 20])))
    tensors = [*cache.k_pages, *cache.v_pages, *cache.k_exact, *cache.v_exact]
    tensors += [cache.block_table, cache.seq_lens, cache.codec_ids]
    before = [x.clone() for x in tensors], list(cache.pages.rows), list(cache.lengths)
    refused(lambda: getattr(cache, method)(*arguments), error, names)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before[0], strict=True))
    assert (cache.pages.rows, cache.lengths) == before[1:]


@pytest.mark.parametrize(
    ("changes", "error", "name"),
    [
        ({"max_seqs": 0}, ValueError, "max_seqs"),
        ({"max_tokens": 0}, ValueError, "max_tokens"),
        ({"drafts": -1}, ValueError, "drafts"),
        ({"query_heads": 3}, ValueError, "query_heads"),
        ({"dtype": torch.float64}, TypeError, "dtype"),
        ({"device": "meta"}, ValueError, "codec.freqs"),
    ],
)
def test_a_cache_that_cannot_be(changes, error, name):
    refused(lambda: make_cache(**changes), error, name)


@pytest.mark.parametrize(
    ("method", "argument", "error"),
    [
        ("allocate", 3, RuntimeError),
        ("allocate", -1, ValueError),
        ("share", [0, 2], ValueError),  # 0 and 1 are in use, once each
        ("share", [0, -1], ValueError),
        ("release", [0, 2], ValueError),
        ("release", [0, 0], ValueError),
        ("release", [1, -3], ValueError),
    ],
)
def test_an_allocator_refuses_and_is_as_before(method, argument, error):
    pages = PageTable(1, 4)
    used = pages.allocate(2)
    before = list(pages.references), pages.free
    assert used == [0, 1]
    refused(lambda: getattr(pages, method)(argument), error, "pages|count")
    assert (pages.references, pages.free) == before
