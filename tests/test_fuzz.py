"""Every operation on random shapes, layouts, strides, dtypes and scales, against its oracle.

    pytest tests/test_fuzz.py                            CI: 60 cases, small ones where kernels run in the interpreter
    pytest tests/test_fuzz.py --fuzz-cases 2000 -n 16    on a GPU (-n: pytest-xdist; most of the time is compilation)

The same number of cases draws the same cases: seeds are fixed, and cases run in parts so that workers can share them.
What decides which kernel is compiled (bands, D, C, heads a group) is drawn from short lists; the rest is free.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from reference import rope as rope_oracle
from spectral_kernels import compress, rope
from spectral_kernels.pages import Bands
from tests import budgets
from tests.cases import (
    ATTENTION_IMPLEMENTATIONS,
    DEVICE,
    DTYPES,
    IMPLEMENTATIONS,
    STRIDES,
    PageSpec,
    Queries,
    in_shape_of,
    inverse_frequencies,
    make_exact_tokens,
    make_pages,
    make_queries,
    operation,
    pages_of,
    poisoned,
    query_positions,
    rope_of,
    strided,
    to_numpy,
)
from tests.test_attention import check_exact, check_spectral
from tests.test_compress import (
    check_encode,
    check_error_weights,
    check_fit_encoder,
    check_fit_quantisers,
    check_gram,
    check_project_rows,
    check_quantise_components,
    check_query_metric,
    check_requantise,
    check_squared_errors,
    decode_oracle,
    tensor,
)
from tests.test_eigen import check_eigenvectors
from tests.test_merge import check_many, check_two
from tests.test_rope import project_oracle

PART = 25  # cases a part
ON_GPU = DEVICE.type == "cuda"


@dataclass(frozen=True)
class Layout:
    k_bands: str
    v_bands: str
    head_dim: int
    rotary_dim: int
    chunk: int
    groups: tuple[int, ...]
    """Query heads a KV head."""


LAYOUTS = (
    Layout("16x8+16x4+32x2", "32x4+32x2", 64, 64, 64, (1, 7)),
    Layout("48x4", "64x4", 64, 32, 64, (2, 16)),
    Layout("64x16", "32x8", 64, 64, 256, (4, 6)),
    Layout("16x8+64x4", "80x16", 80, 80, 64, (8, 1)),
    Layout("80x2", "16x8+64x2", 80, 40, 128, (6, 2)),
    Layout("16x8+48x4", "96x4", 96, 96, 64, (7, 4)),
    Layout("96x16", "96x16", 96, 48, 128, (16, 1)),
    Layout("16x8+16x4+96x2", "64x4+64x2", 128, 128, 64, (8, 6)),
    Layout("32x8", "128x4", 128, 64, 128, (4, 7)),
    Layout("128x16", "128x16", 128, 128, 64, (2, 8)),
    Layout("112x4", "128x2", 128, 128, 256, (1, 6)),
    Layout("16x8+48x4+64x2", "16x8", 128, 0, 64, (4, 2)),
    Layout("16x8+240x2", "256x2", 256, 64, 64, (1, 4)),
    Layout("64x8+64x4", "32x16", 256, 256, 64, (2, 8)),
)
THETAS = (1e2, 1e4, 1e6)
SIZES = (0.0, 1e-3, 1.0, 4.0, 30.0, 1e4)


@dataclass
class Draw:
    """Named draws: a failing example prints them."""

    data: st.DataObject

    def of(self, name: str, *options: object) -> object:
        return self.data.draw(st.sampled_from(options), label=name)

    def int(self, name: str, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high), label=name)

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.data.draw(st.integers(0, 2**32 - 1), label="seed"))

    def lengths(self, batch: int, chunk: int, most: int) -> tuple[int, ...]:
        """Tokens of each row: on and around the edges of chunks, or anything."""
        edges = [n for n in (0, 1, 31, 32, 33, chunk - 1, chunk, chunk + 1, 2 * chunk, 3 * chunk - 5) if n <= most]
        one = st.one_of(st.sampled_from(edges), st.integers(0, most))
        return tuple(self.data.draw(st.lists(one, min_size=batch, max_size=batch), label="lengths"))


def is_slow(implementation: str) -> bool:
    """Whether a program costs a millisecond, not a microsecond."""
    return implementation != "torch" and not ON_GPU


def draw_paths(draw: Draw) -> tuple[str, ...]:
    """The twin, or the kernels: these by both paths, that of cards before sm_80 too, on the same case."""
    kernels = tuple(name for name in ATTENTION_IMPLEMENTATIONS if name != "torch")
    return draw.of("paths", ("torch",), kernels, kernels)


def draw_queries(
    draw: Draw, layout: Layout, implementation: str, rng: np.random.Generator, lengths: tuple[int, ...], heads: int
) -> Queries:
    count = draw.of("queries", 1, 2) if is_slow(implementation) else draw.of("queries", 1, 1, 2, 5)
    dtype = draw.of("dtype", *DTYPES)
    stride = draw.of("strides", *STRIDES)
    return make_queries(
        rng,
        shape=(len(lengths), heads, count, layout.head_dim),
        at=query_positions(rng, lengths, count, far=draw.of("far", 0, 100, 100_000, 1_000_000)),
        dtype=dtype,
        size=draw.of("size", *SIZES),
        stride=stride,
        flat=count == 1 and draw.of("flat", True, False),
        position_dtype=draw.of("positions", torch.int32, torch.int64),
    )


def draw_spec(draw: Draw, layout: Layout, implementation: str) -> PageSpec:
    slow = is_slow(implementation)
    most = layout.chunk + 40 if slow else (5 * layout.chunk + 20 if layout.chunk < 256 else 700)
    batch = draw.int("batch", 1, 2 if slow else 4)
    return PageSpec(
        layout.k_bands,
        layout.v_bands,
        layout.head_dim,
        layout.chunk,
        draw.int("kv_heads", 1, 2 if slow else 4),
        draw.lengths(batch, layout.chunk, most),
        segments=draw.int("segments", 1, 4),
        skip=draw.of("skip", 0.0, 0.1, 0.5, 0.95),
        spare_chunks=draw.int("spare_chunks", 0, 2),
        mixed=draw.of("mixed", True, False),
        align=layout.chunk * draw.of("align", 1, 4),
    )


def draw_rope(draw: Draw, layout: Layout) -> tuple[np.ndarray, float]:
    return inverse_frequencies(layout.rotary_dim, draw.of("theta", *THETAS)), draw.of("scaling", 1.0, 0.7, 1.35)


def fuzz_rotate(draw: Draw) -> None:
    layout, implementation, dtype = (
        draw.of("layout", *LAYOUTS),
        draw.of("implementation", *IMPLEMENTATIONS),
        draw.of("dtype", *DTYPES),
    )
    rng = draw.rng()
    inv_freq = inverse_frequencies(layout.rotary_dim, draw.of("theta", *THETAS))
    shape = (draw.int("batch", 1, 3), draw.int("heads", 1, 3), draw.int("tokens", 0, 70), layout.head_dim)
    chunk = draw.of("chunk", None, layout.chunk)
    inverse = draw.of("inverse", False, True)
    name = "phase_align" if chunk is not None and not inverse else "rotate"
    at = rng.integers(0, draw.of("far", 10, 10_000, 2**31 - 1), (shape[0], shape[2]))
    x = torch.from_numpy(rng.standard_normal(shape) * draw.of("size", 1e-6, 1.0, 1e3)).to(dtype)
    out = strided(poisoned(*shape, dtype=dtype), draw.of("out strides", *STRIDES))
    kwargs = {"chunk": chunk} if name == "phase_align" else {"chunk": chunk, "inverse": inverse}
    got = operation(rope, name, implementation, dtype)(
        strided(x, draw.of("strides", *STRIDES)),
        torch.from_numpy(at).to(DEVICE, draw.of("positions", torch.int32, torch.int64)),
        rope_of(inv_freq),
        out=out,
        **kwargs,
    )
    expected = rope_oracle.rotate(to_numpy(x), at[:, None], inv_freq, chunk=chunk, inverse=inverse)
    budgets.check(got, expected, budgets.rotate(to_numpy(x), expected, inv_freq, dtype))


def fuzz_project_queries(draw: Draw) -> None:
    layout, implementation = draw.of("layout", *LAYOUTS), draw.of("implementation", *IMPLEMENTATIONS)
    rng, spec = draw.rng(), draw_spec(draw, layout, implementation)
    inv_freq, scaling = draw_rope(draw, layout)
    arrays = make_pages(rng, spec)
    queries = draw_queries(
        draw, layout, implementation, rng, spec.lengths, spec.kv_heads * draw.of("group", *layout.groups)
    )
    expected = project_oracle(queries.q, queries.at, arrays, inv_freq, scaling)
    run = operation(rope, "project_queries", implementation, queries.tensor.dtype)
    out = poisoned(*in_shape_of(expected, queries).shape)
    got = run(queries.tensor, queries.positions, pages_of(arrays), rope_of(inv_freq, scaling), out=out)
    budget = budgets.project_queries(queries.q, expected, arrays, inv_freq, scaling)
    budgets.check(got, in_shape_of(expected, queries), in_shape_of(budget, queries))


def fuzz_attend_spectral(draw: Draw) -> None:
    layout, paths = draw.of("layout", *LAYOUTS), draw_paths(draw)
    rng, spec = draw.rng(), draw_spec(draw, layout, paths[0])
    inv_freq, scaling = draw_rope(draw, layout)
    arrays = make_pages(rng, spec, size=draw.of("key and value size", 1.0, 1.0, 1e-3, 50.0))
    queries = draw_queries(draw, layout, paths[0], rng, spec.lengths, spec.kv_heads * draw.of("group", *layout.groups))
    scale = draw.of("scale", None, None, 1.0, 0.02)
    splits = draw.of("splits", 1, 3)
    for path in paths:
        check_spectral(path, arrays, queries, inv_freq, scaling=scaling, scale=scale, splits=splits)


def fuzz_attend_exact(draw: Draw) -> None:
    layout, paths = draw.of("layout", *LAYOUTS), draw_paths(draw)
    rng, slow = draw.rng(), is_slow(paths[0])
    inv_freq, scaling = draw_rope(draw, layout)
    batch, heads, group = (
        draw.int("batch", 1, 2 if slow else 4),
        draw.int("kv_heads", 1, 2),
        draw.of("group", *layout.groups),
    )
    slots = draw.int("slots", 0, 40 if slow else 300)
    far = draw.of("far", 10, 400, 1_000_000)
    tokens = make_exact_tokens(
        rng,
        shape=(batch, heads, slots, layout.head_dim),
        far=far,
        dtype=draw.of("key dtype", *DTYPES),
        stride=draw.of("key strides", *STRIDES),
        per_head=draw.of("per head", True, False),
        unused=draw.of("unused", 0.0, 0.2, 1.0),
    )
    # Queries among the keys: some see none of them, some see all.
    first = np.array([draw.int("position", 0, far + 5) for _ in range(batch)])
    queries = draw_queries(draw, layout, paths[0], rng, tuple(first), heads * group)
    scale = draw.of("scale", None, None, 1.0, 0.02)
    splits = draw.of("splits", 1, 3)
    for path in paths:
        settings = {"scaling": scaling, "scale": scale, "splits": splits}
        check_exact(path, tokens, queries, inv_freq, chunk=layout.chunk, **settings)


def fuzz_merge(draw: Draw) -> None:
    implementation, dtype, rng = draw.of("implementation", *IMPLEMENTATIONS), draw.of("dtype", *DTYPES), draw.rng()
    dim = draw.of("dim", 64, 80, 96, 128, 256)
    shape = (draw.int("batch", 1, 4), draw.int("heads", 1, 8 if is_slow(implementation) else 32))
    kwargs = {"empty": draw.of("empty", 0.0, 0.3, 1.0), "spread": draw.of("spread", 0.0, 3.0, 300.0)}
    if draw.of("operation", "merge_states", "merge_many_states") == "merge_states":
        check_two(rng, implementation, shape, dim, dtype, **kwargs)
    else:
        check_many(rng, implementation, shape, dim, draw.int("states", 0, 70), dtype, **kwargs)


def fuzz_encode(draw: Draw) -> None:
    layout, implementation, dtype = (
        draw.of("layout", *LAYOUTS),
        draw.of("implementation", *IMPLEMENTATIONS),
        draw.of("dtype", *DTYPES),
    )
    rng, side = draw.rng(), draw.of("side", "k", "v")
    bands = Bands.parse(layout.k_bands if side == "k" else layout.v_bands)
    slow = is_slow(implementation)
    shape = (
        draw.int("batch", 1, 2),
        draw.int("heads", 1, 2),
        layout.chunk * draw.int("chunks", 0, 1 if slow else 3),
        layout.head_dim,
    )
    x = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
    levels = np.concatenate([np.full(rank, 8.0 if bits == 16 else 2.0**bits / 4) for rank, bits in bands.bands])
    encoder = rng.standard_normal((*shape[:2], shape[3], bands.rank)) / math.sqrt(shape[3]) * levels
    encoder = torch.from_numpy(encoder).to(DEVICE, torch.float32)
    check_encode(implementation, strided(x, draw.of("strides", *STRIDES)), encoder, bands, layout.chunk, side, rng)


def fuzz_decode(draw: Draw) -> None:
    layout, implementation = draw.of("layout", *LAYOUTS), draw.of("implementation", *IMPLEMENTATIONS)
    rng, side = draw.rng(), draw.of("side", "k", "v")
    arrays = make_pages(rng, draw_spec(draw, layout, implementation), size=draw.of("size", 1e-3, 1.0, 1e3))
    expected, budget = decode_oracle(arrays, side)
    budgets.check(operation(compress, "decode", implementation)(pages_of(arrays), side=side), expected, budget)


def fuzz_requantise(draw: Draw) -> None:
    implementation, rng, side = draw.of("implementation", *IMPLEMENTATIONS), draw.rng(), draw.of("side", "k", "v")
    bits = [b for b in (8, 4, 2) if draw.of(f"{b} bits", False, True)] or [4]
    source = Bands(tuple((16 * draw.int(f"blocks of {b}", 1, 3), b) for b in bits))
    wanted = [b for b in (8, 4, 2) if draw.of(f"to {b} bits", False, True)] or [2]
    sizes = rng.multinomial(draw.int("blocks kept", 1, source.rank // 16), [1 / len(wanted)] * len(wanted))
    bands = Bands(tuple((16 * int(n), b) for n, b in zip(sizes, wanted, strict=True) if n))
    check_requantise(implementation, source, bands, draw.of("chunk", 64, 128, 256), side, rng, draw.int("chunks", 0, 2))


def fuzz_fit_quantisers(draw: Draw) -> None:
    implementation, rng = draw.of("implementation", *IMPLEMENTATIONS), draw.rng()
    c = rng.standard_normal((draw.int("tokens", 300, 500), 16)) * np.exp(
        draw.of("spread", 0.0, 3.0) * rng.standard_normal(16)
    )
    check_fit_quantisers(implementation, c, draw.of("bits", 8, 4, 2))  # and quantiser_errors


def fuzz_project_rows(draw: Draw) -> None:
    implementation, dtype, rng = draw.of("implementation", *IMPLEMENTATIONS), draw.of("dtype", *DTYPES), draw.rng()
    batch, heads, dim = draw.int("B", 1, 2), draw.int("G", 1, 2), draw.of("D", 64, 80, 128)
    x = rng.standard_normal((batch, heads, draw.int("tokens", 1, 200), dim))
    encoder = tensor(rng.standard_normal((batch, heads, dim, draw.of("R", 16, 48, dim))))
    mean = tensor(rng.standard_normal((batch, heads, dim))) if draw.of("centred", False, True) else None
    own = strided(torch.from_numpy(x).to(dtype), draw.of("strides", *STRIDES))
    check_project_rows(implementation, own, encoder, mean, draw.int("every", 1, 9))


def fuzz_quantise_components(draw: Draw) -> None:
    implementation, rng, dim = draw.of("implementation", *IMPLEMENTATIONS), draw.rng(), draw.int("D", 1, 130)
    basis = rng.standard_normal((draw.int("bases", 0, 3), draw.int("R", 1, dim), dim))
    basis *= np.exp(rng.uniform(-9, 9, (*basis.shape[:-1], 1)))
    metric = rng.standard_normal((len(basis), 2 * dim, dim))
    metric = draw.of("metric", None, np.float64(np.float32(metric.mT @ metric)))
    check_quantise_components(implementation, np.float64(np.float32(basis)), metric)


def fuzz_squared_errors(draw: Draw) -> None:
    implementation, dtype, rng = draw.of("implementation", *IMPLEMENTATIONS), draw.of("dtype", *DTYPES), draw.rng()
    batch, heads, dim = draw.int("B", 1, 2), draw.int("G", 1, 2), draw.of("D", 16, 64, 80, 128)
    x = torch.from_numpy(rng.standard_normal((batch, heads, draw.int("tokens", 1, 100), dim))).to(DEVICE, dtype)
    root = rng.standard_normal((batch, heads, dim, dim))
    name = draw.of("weighing", "metric", "root", "neither")
    weighing = {"metric": root.mT @ root, "root": root, "neither": None}[name]
    rebuilt = x.float() + tensor(draw.of("size", 1e-3, 1.0) * rng.standard_normal(x.shape))
    check_squared_errors(implementation, rebuilt, strided(x, draw.of("strides", *STRIDES)), weighing, name)


def fuzz_gram(draw: Draw) -> None:
    implementation, dtype, rng = draw.of("implementation", *IMPLEMENTATIONS), draw.of("dtype", *DTYPES), draw.rng()
    shape = (
        draw.int("batch", 1, 2),
        draw.int("heads", 1, 2),
        draw.int("tokens", 0, 80),
        draw.of("dim", 64, 80, 96, 128, 256),
    )
    x = torch.from_numpy(rng.standard_normal(shape) * draw.of("size", 1e-3, 1.0, 1e2)).to(dtype)
    check_gram(implementation, strided(x, draw.of("strides", *STRIDES)))


def draw_queries_of(draw: Draw, heads: int) -> tuple[torch.Tensor, np.ndarray, float]:
    """Queries [B, heads * G, T, D] of a prompt, and what turns them."""
    dim = draw.of("dim", 64, 80, 96, 128)
    inv_freq = inverse_frequencies(draw.of("rotary_dim", dim, dim // 2), draw.of("theta", 1e4, 1e6))
    shape = (draw.int("batch", 1, 2), heads, draw.int("tokens", 1, 90), dim)
    q = draw.rng().standard_normal(shape) * draw.of("size", 1e-2, 1.0, 3.0)
    return torch.from_numpy(q).to(DEVICE, draw.of("dtype", *DTYPES)), inv_freq, draw.of("scaling", 1.0, 1.2)


def fuzz_query_metric(draw: Draw) -> None:
    implementation, groups, group = draw.of("implementation", *IMPLEMENTATIONS), draw.int("G", 1, 2), draw.int("H/G", 1, 3)
    q, inv_freq, scaling = draw_queries_of(draw, groups * group)
    stride = draw.of("stride", 1, 2)
    chunk = draw.of("chunk", 64, 128) * stride
    check_query_metric(implementation, q, inv_freq, scaling, chunk=chunk, kv_heads=groups, stride=stride)


def fuzz_error_weights(draw: Draw) -> None:
    implementation, groups, group = draw.of("implementation", *IMPLEMENTATIONS), draw.int("G", 1, 2), draw.int("H/G", 1, 3)
    q, inv_freq, scaling = draw_queries_of(draw, groups * group)
    rng = draw.rng()
    shape = (q.shape[0], groups, *q.shape[2:])
    k, v = (torch.from_numpy(rng.standard_normal(shape)).to(DEVICE, q.dtype) for _ in range(2))
    root = rng.standard_normal((groups * group, q.shape[-1], q.shape[-1]))
    metric = draw.of("metric", None, root.mT @ root * draw.of("weight", 1e-6, 1.0))
    options = {name: draw.int(name, 0, 20) for name in ("sinks", "window")}
    check_error_weights(
        implementation, (q, k, v), inv_freq, scaling, metric, queries=draw.of("queries", 1, 12, 40), **options
    )


def fuzz_eigenvectors(draw: Draw) -> None:
    implementation, rng = draw.of("implementation", *IMPLEMENTATIONS), draw.rng()
    dim = draw.int("dim", 1, 16 if is_slow(implementation) else 130)
    x = rng.standard_normal((draw.int("matrices", 0, 3), draw.int("rank", 0, 2 * dim), dim))
    x *= np.exp(-draw.of("decay", 0.0, 3.0, 12.0) * np.arange(dim) / dim)
    check_eigenvectors(implementation, np.float64(np.float32(x.mT @ x * draw.of("size", 1e-12, 1.0, 1e12))))


def fuzz_fit_encoder(draw: Draw) -> None:
    implementation, rng = draw.of("implementation", *IMPLEMENTATIONS), draw.rng()
    dim = draw.int("dim", 1, 20 if is_slow(implementation) else 130)
    rank = draw.int("rank", 1, dim) if implementation == "torch" else dim  # the kernel's
    rows = rng.integers(-127, 128, (rank, dim))
    metric = rng.standard_normal((draw.int("queries", 1, 2 * dim), dim)) * draw.of("size", 1e-6, 1.0, 1e6)
    scale = np.exp(rng.uniform(-6, 6, len(rows)))
    check_fit_encoder(
        implementation, rows, scale.astype(np.float32).astype(np.float64), draw.of("metric", None, metric.T @ metric)
    )


# Each with its share of the cases.
FUZZERS: dict[str, tuple[Callable[[Draw], None], float]] = {
    "rotate": (fuzz_rotate, 0.08),
    "project_queries": (fuzz_project_queries, 0.1),
    "attend_spectral": (fuzz_attend_spectral, 0.3),
    "attend_exact": (fuzz_attend_exact, 0.16),
    "merge": (fuzz_merge, 0.06),
    "encode": (fuzz_encode, 0.04),
    "decode": (fuzz_decode, 0.05),
    "requantise": (fuzz_requantise, 0.02),
    "gram": (fuzz_gram, 0.04),
    "query_metric": (fuzz_query_metric, 0.02),
    "error_weights": (fuzz_error_weights, 0.02),
    "eigenvectors": (fuzz_eigenvectors, 0.025),
    "fit_encoder": (fuzz_fit_encoder, 0.02),
    "fit_quantisers": (fuzz_fit_quantisers, 0.025),
    "project_rows": (fuzz_project_rows, 0.02),
    "squared_errors": (fuzz_squared_errors, 0.01),
    "quantise_components": (fuzz_quantise_components, 0.01),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "part" not in metafunc.fixturenames:
        return
    total, parts = metafunc.config.getoption("--fuzz-cases"), []
    for name, (_, share) in FUZZERS.items():
        cases = math.ceil(total * share)
        parts += [(name, part, min(PART, cases - part * PART)) for part in range(math.ceil(cases / PART))]
    metafunc.parametrize(("name", "part", "cases"), parts, ids=[f"{name}-{part}x{cases}" for name, part, cases in parts])


def test_fuzz(name: str, part: int, cases: int) -> None:
    fuzzer, done = FUZZERS[name][0], []

    @hypothesis.seed(zlib.crc32(f"{name} {part}".encode()))
    @hypothesis.settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )
    @hypothesis.given(st.data())
    def run(data: st.DataObject) -> None:
        fuzzer(Draw(data))
        done.append(1)

    run()
    assert len(done) >= cases


def test_the_shares_add_up() -> None:
    assert math.isclose(sum(share for _, share in FUZZERS.values()), 1.0)


def test_layouts_cover_what_is_supported() -> None:
    """Every head dimension, chunk length, number of heads a group that the library promises, and every kind of band."""
    assert {layout.head_dim for layout in LAYOUTS} == {64, 80, 96, 128, 256}
    assert {layout.chunk for layout in LAYOUTS} == {64, 128, 256}
    assert {group for layout in LAYOUTS for group in layout.groups} == {1, 2, 4, 6, 7, 8, 16}
    for side in ("k_bands", "v_bands"):
        bits = {b for layout in LAYOUTS for _, b in Bands.parse(getattr(layout, side)).bands}
        assert bits == {16, 8, 4, 2}
