"""Every operation on random shapes, layouts, strides, dtypes and scales, against its oracle.

    pytest tests/test_fuzz.py                            60 cases, small ones in the interpreter
    pytest tests/test_fuzz.py --fuzz-cases 2000 -n 16    on a GPU (most of the time is compilation)
    pytest tests/test_fuzz.py --fuzz-case encode:17      one case: the line that a failure prints

A case is a function of its name and number alone. What decides which kernel is compiled (bands, D,
frame, heads a group) is drawn from short lists; the rest is free.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from tests.cases import (
    ATTENTION_IMPLEMENTATIONS,
    DEVICE,
    DTYPES,
    IMPLEMENTATIONS,
    STRIDES,
    ExactTokens,
    PageSpec,
    Queries,
    inverse_frequencies,
    is_slow,
    make_codec,
    make_exact_tokens,
    make_pages,
    make_queries,
    rounded,
    strided,
)
from tests.test_attention import check_spectral
from tests.test_compress import check_append, check_decode, check_encode, check_gram
from tests.test_merge import check_many, check_two
from tests.test_rope import check_project, check_turn
from tests.test_window import check_window

PART = 5  # cases a test, so that workers can share them


@dataclass(frozen=True)
class Layout:
    k_bands: str
    v_bands: str
    head_dim: int
    rotary_dim: int
    frame: int
    groups: tuple[int, ...]
    """Query heads a KV head."""


LAYOUTS = (
    Layout("16x8+16x4+32x2", "32x4+32x2", 64, 64, 64, (1, 4)),
    Layout("48x4", "64x4", 64, 32, 512, (2, 8)),
    Layout("128x8", "128x8", 64, 64, 64, (1, 6)),
    Layout("16x8+64x4", "80x8", 80, 80, 128, (8, 1)),
    Layout("80x2", "16x8+64x2", 80, 40, 64, (6, 2)),
    Layout("16x8+48x4", "96x4", 96, 96, 64, (6, 4)),
    Layout("96x8", "96x2", 96, 48, 128, (8, 1)),
    Layout("16x8+16x4+96x2", "64x4+64x2", 128, 128, 512, (4, 8)),
    Layout("32x8", "128x4", 128, 64, 64, (4, 6)),
    Layout("16x8+48x4+64x2", "16x8", 128, 0, 64, (4, 2)),
    Layout("16x8+240x2", "256x2", 256, 64, 64, (1, 4)),
    Layout("64x8+64x4", "32x8", 256, 256, 128, (2, 8)),
)
THETAS = (1e2, 1e4, 1e6)
SIZES = (0.0, 1e-3, 1.0, 4.0, 30.0, 1e4)


@dataclass
class Draw:
    """Named draws, which a failure prints."""

    rng: np.random.Generator
    drawn: dict[str, object] = field(default_factory=dict)

    def of(self, name: str, *options):
        self.drawn[name] = options[self.rng.integers(len(options))]
        return self.drawn[name]

    def int(self, name: str, low: int, high: int) -> int:
        self.drawn[name] = int(self.rng.integers(low, high + 1))
        return self.drawn[name]

    def lengths(self, batch: int, most: int, edges: Sequence[int]) -> tuple[int, ...]:
        """Tokens of each row: at an edge or a token beside it, or anything."""
        near = [n + off for n in edges for off in (-1, 0, 1) if 0 <= n + off <= most]
        ends = self.rng.choice(near, batch), self.rng.integers(0, most + 1, batch)
        found = tuple(int(n) for n in np.where(self.rng.random(batch) < 0.6, *ends))
        self.drawn["lengths"] = found
        return found


def draw_paths(draw: Draw) -> tuple[str, ...]:
    """The twin, or the kernels: these by both paths, that of cards before sm_80 too, on the same
    case (in the interpreter by one of them)."""
    if DEVICE.type == "cpu":
        return draw.of("paths", ("torch",), ("triton",), ("triton",), ("scalar",))
    kernels = tuple(name for name in ATTENTION_IMPLEMENTATIONS if name != "torch")
    return draw.of("paths", ("torch",), kernels, kernels)


def draw_spec(draw: Draw, layout: Layout, slow: bool, edges: Sequence[int] = ()) -> PageSpec:
    batch = draw.int("batch", 1, 2 if slow else 4)
    most = 140 if slow else draw.of("longest", 140, 700, 3000)
    every = (0, 32, 64, layout.frame, layout.frame + 64, *edges)
    return PageSpec(
        layout.k_bands,
        layout.v_bands,
        layout.head_dim,
        draw.int("kv_heads", 1, 1 if slow else 3),
        draw.lengths(batch, most, every),
        layout.frame,
        layout.rotary_dim,
        draw.of("theta", *THETAS),
        codecs=draw.of("codecs", 0, 1, 2),
        spare_pages=draw.int("spare pages", 0, 2),
    )


def draw_queries(draw: Draw, layout: Layout, spec: PageSpec, count: int) -> Queries:
    heads = spec.kv_heads * draw.of("group", *layout.groups)
    return make_queries(
        draw.rng,
        shape=(len(spec.lengths), heads, count, layout.head_dim),
        dtype=draw.of("query dtype", *DTYPES),
        size=draw.of("query size", *SIZES),
        stride=draw.of("query strides", *STRIDES),
        flat=count == 1 and draw.of("flat", True, False),
    )


def draw_exact(draw: Draw, spec: PageSpec, count: int, sinks: int, window: int) -> ExactTokens:
    return make_exact_tokens(
        draw.rng,
        lengths=spec.lengths,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        sinks=sinks,
        window=window,
        drafts=draw.of("drafts", 0, 0, 3),
        dtype=draw.of("exact dtype", *DTYPES),
        stride=draw.of("exact strides", *STRIDES),
        permuted=draw.of("permuted", True, False),
        size=draw.of("key size", 1.0, 1.0, 1e-3, 50.0),
    )


def draw_window(draw: Draw, count: int) -> tuple[int, int]:
    sinks = draw.of("sinks", 0, 4, 1)
    return sinks, draw.of("window", *(n for n in (1, 5, 16, 40) if n >= count))


def fuzz_rotate(draw: Draw) -> None:
    implementation, dtype = draw.of("implementation", *IMPLEMENTATIONS), draw.of("dtype", *DTYPES)
    dim = draw.of("dim", 64, 80, 96, 128, 256)
    inv_freq = inverse_frequencies(
        draw.of("rotary_dim", dim, dim // 2, 0), draw.of("theta", *THETAS)
    )
    shape = (draw.int("batch", 1, 2), draw.int("heads", 1, 3), draw.int("tokens", 0, 40), dim)
    at = draw.rng.integers(0, draw.of("far", 10, 10_000, 2**31 - 1), (shape[0], shape[2]))
    x = rounded(draw.rng.standard_normal(shape) * draw.of("size", 1e-6, 1.0, 1e3), dtype)
    positions = torch.from_numpy(at).to(DEVICE, draw.of("positions", torch.int32, torch.int64))
    check_turn(
        implementation,
        strided(x, draw.of("strides", *STRIDES)),
        at,
        positions,
        inv_freq,
        draw.of("frame", None, 64, 128, 512),  # None: rotate, else turn_back
        draw.of("inverse", False, True),
        draw.of("out strides", *STRIDES),
    )


def fuzz_project_queries(draw: Draw) -> None:
    layout, implementation = (
        draw.of("layout", *LAYOUTS),
        draw.of("implementation", *IMPLEMENTATIONS),
    )
    spec = draw_spec(draw, layout, is_slow(implementation))
    codec, used = make_codec(draw.rng, spec)
    queries = draw_queries(draw, layout, spec, draw.of("queries", 1, 1, 2, 4))
    rows = used[draw.rng.integers(0, len(used), len(spec.lengths))]
    check_project(implementation, queries, codec, rows, draw.int("frames", 0, 4))


def fuzz_gram(draw: Draw) -> None:
    implementation, dtype = draw.of("implementation", *IMPLEMENTATIONS), draw.of("dtype", *DTYPES)
    shape = (
        draw.int("batch", 1, 2),
        draw.int("heads", 1, 2),
        draw.int("tokens", 0, 80),
        draw.of("dim", 64, 80, 96, 128, 256),
    )
    x = rounded(draw.rng.standard_normal(shape) * draw.of("size", 1e-3, 1.0, 1e2), dtype)
    check_gram(implementation, strided(x, draw.of("strides", *STRIDES)))


def fuzz_encode(draw: Draw) -> None:
    layout, implementation = (
        draw.of("layout", *LAYOUTS),
        draw.of("implementation", *IMPLEMENTATIONS),
    )
    spec = draw_spec(draw, layout, is_slow(implementation))
    news = [draw.of(f"new {b}", n, min(n, 1), n // 2, 0) for b, n in enumerate(spec.lengths)]
    sinks, ring = draw.of("sinks and ring", (0, 0), (4, 16), (0, 3), (2, 70))
    check_encode(
        implementation,
        draw.rng,
        spec,
        news,
        draw.of("dtype", *DTYPES),
        draw.of("side", "k", "v"),
        stride=draw.of("strides", *STRIDES),
        sinks=sinks,
        ring=ring,
        shared=draw.of("shared pool", True, False),
    )


def fuzz_append(draw: Draw) -> None:
    layout, implementation = (
        draw.of("layout", *LAYOUTS),
        draw.of("implementation", *IMPLEMENTATIONS),
    )
    spec = draw_spec(draw, layout, is_slow(implementation))
    queries = draw.of("queries", 1, 1, 2, 4)
    check_append(
        implementation,
        draw.rng,
        spec,
        queries,
        draw.of("dtype", *DTYPES),
        stride=draw.of("strides", *STRIDES),
        sinks=draw.of("sinks", 0, 4),
        ring=queries + draw.of("spare", 0, 1, 16),
    )


def fuzz_decode(draw: Draw) -> None:
    layout, implementation = (
        draw.of("layout", *LAYOUTS),
        draw.of("implementation", *IMPLEMENTATIONS),
    )
    spec, size = draw_spec(draw, layout, is_slow(implementation)), draw.of("size", 1e-3, 1.0, 1e3)
    arrays = make_pages(draw.rng, spec, size=size)
    check_decode(implementation, arrays, draw.of("side", "k", "v"))


def fuzz_attend_window(draw: Draw) -> None:
    layout, paths = draw.of("layout", *LAYOUTS), draw_paths(draw)
    count = draw.of("queries", 1, 1, 2, 4)
    sinks, window = draw_window(draw, count)
    spec = draw_spec(draw, layout, is_slow(paths[0]), (sinks, window, sinks + window))
    tokens = draw_exact(draw, spec, count, sinks, window)
    queries = draw_queries(draw, layout, spec, count)
    scale = draw.of("scale", None, None, 1.0, 0.02)
    for path in paths:
        check_window(path, queries, tokens, spec.lengths, scale=scale)


def fuzz_attend_spectral(draw: Draw) -> None:
    layout, paths = draw.of("layout", *LAYOUTS), draw_paths(draw)
    slow = is_slow(paths[0])
    if slow and layout.head_dim > 96:
        paths = ("triton",)  # without matrix units a large case takes half a minute
    count = draw.of("queries", 1, 1, 2, 4)
    sinks, window = draw_window(draw, count)
    spec = draw_spec(draw, layout, slow, (sinks, window, sinks + window, 64 + window))
    arrays = make_pages(draw.rng, spec, size=draw.of("size", 1.0, 1.0, 1e-3, 50.0))
    queries = draw_queries(draw, layout, spec, count)
    scale, splits = draw.of("scale", None, None, 1.0, 0.02), draw.of("splits", None, 1, 3)
    shared = draw.of("shared pool", True, False)
    how = draw.of("how", "step", "step", "cut pages", "pages")
    options: dict = {}
    if how == "step":
        options["tokens"] = draw_exact(draw, spec, count, sinks, window)
    elif how == "cut pages":
        options |= {"sinks": sinks, "wide": window}
    for path in paths:
        check_spectral(
            path, arrays, queries, scale=scale, shared=shared, num_splits=splits, **options
        )


def fuzz_merge(draw: Draw) -> None:
    """merge_states and merge_many_states."""
    implementation, dtype = draw.of("implementation", *IMPLEMENTATIONS), draw.of("dtype", *DTYPES)
    dim = draw.of("dim", 64, 80, 96, 128, 256)
    shape = (draw.int("batch", 1, 4), draw.int("heads", 1, 8 if is_slow(implementation) else 32))
    options = {
        "empty": draw.of("empty", 0.0, 0.3, 1.0),
        "spread": draw.of("spread", 0.0, 3.0, 300.0),
    }
    if draw.of("operation", "merge_states", "merge_many_states") == "merge_states":
        check_two(draw.rng, implementation, shape, dim, dtype, **options)
    else:
        many = draw.int("states", 0, 70)
        check_many(draw.rng, implementation, shape, dim, many, dtype, **options)


# Each with its share of the cases.
FUZZERS: dict[str, tuple[Callable[[Draw], None], float]] = {
    "rotate": (fuzz_rotate, 0.08),
    "project_queries": (fuzz_project_queries, 0.08),
    "gram": (fuzz_gram, 0.04),
    "encode": (fuzz_encode, 0.12),
    "append": (fuzz_append, 0.12),
    "decode": (fuzz_decode, 0.06),
    "attend_window": (fuzz_attend_window, 0.14),
    "attend_spectral": (fuzz_attend_spectral, 0.3),
    "merge": (fuzz_merge, 0.06),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "numbers" not in metafunc.fixturenames:
        return
    wanted, parts = metafunc.config.getoption("--fuzz-case"), []
    if wanted:
        name, number = wanted.rsplit(":", 1)
        parts = [(name, [int(number)])]
    else:
        total = metafunc.config.getoption("--fuzz-cases")
        for name, (_, share) in FUZZERS.items():
            numbers = list(range(math.ceil(total * share)))
            parts += [(name, numbers[i : i + PART]) for i in range(0, len(numbers), PART)]
    ids = [f"{name}-{numbers[0]}" for name, numbers in parts]
    metafunc.parametrize(("name", "numbers"), parts, ids=ids)


def test_fuzz(name: str, numbers: list[int]) -> None:
    for number in numbers:
        draw = Draw(np.random.default_rng([zlib.crc32(name.encode()), number]))
        try:
            FUZZERS[name][0](draw)
        except Exception as error:
            line = f"pytest tests/test_fuzz.py --fuzz-case {name}:{number}"
            error.args = (f"{line}\n{error}\ndrawn: {draw.drawn}",)
            raise


def test_the_shares_add_up() -> None:
    assert math.isclose(sum(share for _, share in FUZZERS.values()), 1.0)


def test_a_failure_prints_its_line(monkeypatch) -> None:
    def fail(draw: Draw) -> None:
        assert draw.int("n", 3, 3) == 4, "three is not four"

    monkeypatch.setitem(FUZZERS, "merge", (fail, 1.0))
    with pytest.raises(AssertionError, match=r"(?s)--fuzz-case merge:7\n.*not four.*'n': 3"):
        test_fuzz("merge", [7])


def test_layouts_cover_what_is_supported() -> None:
    """Every head dimension, number of heads a group that the library promises, several frames,
    every kind of band."""
    assert {layout.head_dim for layout in LAYOUTS} == {64, 80, 96, 128, 256}
    assert {layout.frame for layout in LAYOUTS} == {64, 128, 512}
    assert {group for layout in LAYOUTS for group in layout.groups} == {1, 2, 4, 6, 8}
    for side in ("k_bands", "v_bands"):
        texts = "+".join(getattr(layout, side) for layout in LAYOUTS).split("+")
        assert {text.split("x")[1] for text in texts} == {"8", "4", "2"}
