"""spectral_kernels/compress.py against reference/compress.py."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from reference import compress as oracle
from reference import pages as pages_oracle
from spectral_kernels import _launch, compress
from spectral_kernels.pages import Bands
from spectral_kernels.rope import phase_align
from tests import budgets
from tests.cases import (
    DEVICE,
    DTYPES,
    F64,
    IMPLEMENTATIONS,
    PageSpec,
    inverse_frequencies,
    kernels,
    make_pages,
    operation,
    pages_of,
    rope_of,
    strided,
    swap_nibbles,
    to_numpy,
)

SIDES = ("k", "v")


def spectrum(rng: np.random.Generator, shape: tuple[int, ...], dim: int, decay: float = 6.0) -> F64:
    """Rows [*shape, D] with a falling spectrum in a random frame: what keys and values look like."""
    frame = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    return rng.standard_normal((*shape, dim)) * np.exp(-decay * np.arange(dim) / dim) @ frame


def random_metric(rng: np.random.Generator, dim: int) -> F64:
    y = spectrum(rng, (4 * dim,), dim, decay=2.0)
    return y.T @ y / len(y)


def held_metric(metric: F64) -> F64:
    """The metric a fit is documented to use: mean eigenvalue 1, and METRIC_FLOOR more on the diagonal."""
    return metric / np.trace(metric) * len(metric) + compress.METRIC_FLOOR * np.eye(len(metric))


def tensor(x: F64, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(DEVICE, dtype)


# gram and query_metric


def check_gram(implementation: str, x: torch.Tensor) -> None:
    got = operation(compress, "gram", implementation, x.dtype)(x)
    budgets.check(got, oracle.gram(to_numpy(x)), budgets.gram(to_numpy(x)))
    assert got.dtype == torch.float32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "stride"),
    [((1, 2, 70, 64), "swapped"), ((2, 1, 33, 80), "odd"), ((1, 1, 1, 128), "plain"), ((1, 2, 0, 64), "plain")],
)
def test_gram(rng, implementation, dtype, shape, stride):
    check_gram(implementation, strided(torch.from_numpy(rng.standard_normal(shape)).to(dtype), stride))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 80])
def test_gram_of_centred_rows(rng, implementation, dtype, dim):
    """The mean is a hundred times the rest; the last tile of tokens is not full."""
    x = torch.from_numpy(rng.standard_normal((2, 2, 70, dim)) + 100 * rng.standard_normal((2, 2, 1, dim))).to(DEVICE, dtype)
    mean = x.mean(2, dtype=torch.float32)
    got = operation(compress, "gram", implementation, dtype)(x, mean)
    centred = to_numpy((x - mean[:, :, None]).to(dtype))
    budgets.check(got, oracle.gram(centred), budgets.gram(centred))


def test_gram_of_several_splits(rng, monkeypatch):
    """More tokens than one program adds up."""
    monkeypatch.setattr(compress, "GRAM_PROGRAMS", 3)
    check_gram("triton", torch.from_numpy(rng.standard_normal((1, 1, 2100, 64))).to(DEVICE, torch.float32))


def test_gram_of_several_runs_a_split(rng, monkeypatch):
    monkeypatch.setattr(compress, "GRAM_RUN", 64)
    monkeypatch.setattr(compress, "GRAM_PROGRAMS", 3)
    check_gram("triton", torch.from_numpy(rng.standard_normal((1, 1, 700, 64))).to(DEVICE, torch.float16))


def test_gram_budget_has_teeth(rng):
    x = to_numpy(torch.from_numpy(rng.standard_normal((1, 2, 60, 64)) + 0.1).half())
    expected, budget = oracle.gram(x), budgets.gram(x)
    for mistake, mutant in {
        "zeros": np.zeros_like(expected),
        "the last token left out": oracle.gram(x[:, :, :-1]),
        "centred": oracle.gram(x - x.mean(2, keepdims=True)),
        "the mean": expected / x.shape[2],
        "other heads": expected[:, ::-1],
        "half precision": np.float16(expected),
        "tf32 operands": oracle.gram(np.float16(np.float32(x) * 1.0003)),
    }.items():
        budgets.check_rejects(mutant, expected, budget, mistake)


def check_query_metric(
    implementation: str,
    q: torch.Tensor,
    inv_freq: np.ndarray,
    scaling: float,
    *,
    chunk: int,
    kv_heads: int,
    stride: int = 1,
) -> tuple[F64, F64]:
    """Within its budget; returns the oracle's metric and the budget."""
    own, options = to_numpy(q), {"chunk": chunk, "kv_heads": kv_heads, "stride": stride}
    expected = oracle.query_metric(own, inv_freq, scaling, **options)
    budget = budgets.query_metric(own[:, :, ::stride], inv_freq, scaling, q.dtype, chunk // stride, kv_heads)
    call = operation(compress, "query_metric", implementation)
    budgets.check(call(q, rope_of(inv_freq, scaling), **options), expected, budget)
    return expected, budget


@pytest.mark.parametrize(("programs", "splits"), [(3, 3), (100, 6)])
def test_query_metric_of_several_parts(rng, monkeypatch, programs, splits):
    """Programs of two chunks each, and more parts than are added up at once."""
    monkeypatch.setattr(_launch, "multiprocessors", lambda device: programs)
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(compress, "_query_metric_kernel", Noted(compress._query_metric_kernel, grids))
    q = torch.from_numpy(rng.standard_normal((1, 2, 6 * 64 - 5, 64))).to(DEVICE, torch.float32)
    check_query_metric("triton", q, inverse_frequencies(64), 1.0, chunk=64, kv_heads=1)
    assert [grid[1] for grid in grids] == [splits]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dim", "rotary_dim", "scaling", "tokens"), [(64, 64, 1.0, 70), (80, 40, 1.2, 97), (64, 32, 1.0, 1)]
)
def test_query_metric(rng, implementation, dtype, dim, rotary_dim, scaling, tokens):
    inv_freq, chunk = inverse_frequencies(rotary_dim), 64
    q = torch.from_numpy(rng.standard_normal((2, 4, tokens, dim))).to(DEVICE, dtype)
    expected, budget = check_query_metric(implementation, q, inv_freq, scaling, chunk=chunk, kv_heads=2)
    if dtype != torch.float32:
        return  # the budget's teeth, where it is sharpest
    weights = rng.uniform(0.0, 2.0, (2, 4)).astype(np.float32)
    weighted = oracle.query_metric(to_numpy(q), inv_freq, scaling, chunk=chunk, kv_heads=2, weights=weights)
    call = operation(compress, "query_metric", implementation)
    got = call(q, rope_of(inv_freq, scaling), chunk=chunk, kv_heads=2, weights=torch.from_numpy(weights).to(DEVICE))
    budgets.check(got, weighted, 2 * budget)  # no head counts more than twice
    wrong = {
        "zeros": np.zeros_like(expected),
        "weights": weighted,
        "scaling once": oracle.query_metric(to_numpy(q), inv_freq, scaling**0.5, chunk=chunk, kv_heads=2),
        "not turned": oracle.query_metric(to_numpy(q), inv_freq * 0, scaling, chunk=chunk, kv_heads=2),
        "one chunk": oracle.query_metric(to_numpy(q), inv_freq, scaling, chunk=4096, kv_heads=2),
        "the other heads": expected[:, ::-1],
    }
    if tokens == 1:  # one query in one chunk is not turned at all
        del wrong["not turned"], wrong["one chunk"]
    if scaling == 1:
        del wrong["scaling once"]
    for mistake, mutant in wrong.items():
        budgets.check_rejects(mutant, expected, budget, mistake)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [2, 4])
def test_query_metric_of_some_queries(rng, implementation, dtype, stride):
    inv_freq, q = inverse_frequencies(64), torch.from_numpy(rng.standard_normal((2, 2, 300, 64))).to(DEVICE, dtype)
    options = {"chunk": 256, "kv_heads": 1}
    expected, budget = check_query_metric(implementation, q, inv_freq, 1.2, stride=stride, **options)
    if dtype == torch.float32:
        budgets.check_rejects(oracle.query_metric(to_numpy(q), inv_freq, 1.2, **options), expected, budget, "all queries")


def check_error_weights(
    implementation: str,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    inv_freq: np.ndarray,
    scaling: float,
    metric: F64 | None,
    *,
    queries: int,
    sinks: int,
    window: int,
    chunk: int = 64,
) -> tuple[tuple[F64, F64], tuple[F64, F64], tuple[Any, ...]]:
    """Within budget; returns what the oracle says, the budgets, and the oracle's arguments.

    Scores are sums of products of which both operands are rounded to the dtype, and keys were once before; a softmax weight
    is off by its score's error, relatively, and by that of the sum; its square by twice as much. Of w_k, |v - o|^2 is what
    is left of sums of squares, none larger than that of four times the largest value.
    """
    q, k, v = qkv
    tokens, dim = q.shape[2:]
    group = q.shape[1] // k.shape[1]
    rows = group * min(queries, tokens)
    spread = tokens // 2 + np.arange(rows) * (tokens - 1 - tokens // 2) // max(1, rows - 1)
    at = [spread[h % group :: group] for h in range(q.shape[1])]
    held = metrics = None
    if metric is not None:
        shared = compress.shared_metrics(tensor(metric), k.shape[1])
        held = shared, tensor(np.exp(np.linspace(-1, 1, q.shape[0] * q.shape[1])).reshape(q.shape[:2]))
        metrics = to_numpy(held[1])[..., None, None] * to_numpy(shared).repeat(q.shape[1] // k.shape[1], axis=0)
    arguments = (*map(to_numpy, qkv), inv_freq, scaling, metrics, at)
    expected = oracle.error_weights(*arguments, sinks=sinks, window=window)
    rope = rope_of(inv_freq, scaling)
    q, v = strided(q, "padded"), strided(v, "swapped")
    aligned = phase_align(k, torch.arange(tokens, device=k.device).expand(k.shape[0], -1), rope, chunk=chunk)
    call = operation(compress, "error_weights", implementation)
    got = call(q, aligned, v, rope, held, chunk=chunk, sinks=sinks, window=window, queries=queries)
    size = np.prod([np.linalg.norm(to_numpy(x), axis=-1).max() for x in (q, k)]) * dim**-0.5 * scaling**2
    units = max(budgets.U[q.dtype], budgets.PRODUCT)
    slack = 4 * size * (3 * units + 8 * budgets.ANGLE) + 8 * units + 2.0**-16
    own = to_numpy(v)
    # [B, H, T, D]: a KV head's values as each of its query heads sees them.
    own = own.repeat(q.shape[1] // own.shape[1], axis=1)
    weighted = own if metrics is None else own @ metrics
    largest = (weighted * own).sum(-1).max(-1)
    allowed = slack * (expected[0] + 4 * expected[1] * largest / dim), slack * expected[1]
    for name, ours, exact, budget in zip(("w_k", "w_v"), got, expected, allowed, strict=True):
        budgets.check(ours, exact, budget + 1e-30, name)
    return expected, allowed, arguments


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("dim", "rotary_dim", "scaling", "tokens", "weighted", "dtype"),
    [
        (*shape, dtype)
        for shape in ((64, 64, 1.0, 150, True), (80, 40, 1.2, 97, False), (128, 128, 1.0, 70, True), (64, 64, 1.0, 1, True))
        for dtype in DTYPES
        # The interpreter takes half a minute for a case of 16 bits.
        if DEVICE.type == "cuda" or dtype == torch.float32 or shape[3] > 70
    ],
    ids=str,
)
def test_error_weights(rng, implementation, dtype, dim, rotary_dim, scaling, tokens, weighted):
    q, k, v = (torch.from_numpy(rng.standard_normal((2, n, tokens, dim))).to(DEVICE, dtype) for n in (4, 2, 2))
    v[:, :, :, 0] += 3
    metric = np.stack([random_metric(rng, dim) * 1e-3 for _ in range(4)]) if weighted else None
    inv_freq = inverse_frequencies(rotary_dim)
    expected, allowed, arguments = check_error_weights(
        implementation, (q, k, v), inv_freq, scaling, metric, queries=20, sinks=2, window=16
    )
    if dtype != torch.float32 or tokens == 1:
        return  # the budget's teeth, where it is sharpest
    w_k, w_v = expected
    wrong = {"zeros": (0 * w_k, 0 * w_v), "other heads": (w_k[:, ::-1], w_v[:, ::-1]), "halved": (w_k / 2, w_v / 2)}
    wrong["no sinks"] = oracle.error_weights(*arguments, sinks=0, window=16)
    wrong["no window"] = oracle.error_weights(*arguments, sinks=2, window=0)
    for mistake, mutants in wrong.items():
        for mutant, exact, budget in zip(mutants, expected, allowed, strict=True):
            budgets.check_rejects(mutant, exact, budget, mistake)


class Noted:
    """A kernel whose launches note their grids."""

    def __init__(self, kernel: Any, grids: list[tuple[int, ...]]) -> None:
        self.kernel, self.grids = kernel, grids

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("multiprocessors", "splits"), [(1, 1), (64, 5)])
def test_error_weights_in_splits(rng, monkeypatch, dtype, multiprocessors, splits):
    """A program that turns its queries for one chunk after another, and one for each chunk; some are seen by no query of a
    tile, some by all."""
    monkeypatch.setattr(_launch, "multiprocessors", lambda device: multiprocessors)
    grids: list[tuple[int, ...]] = []
    for name in ("_squares_kernel", "_error_weights_kernel"):
        monkeypatch.setattr(compress, name, Noted(getattr(compress, name), grids))
    q, k, v = (torch.from_numpy(rng.standard_normal((1, n, 600, 64))).to(DEVICE, dtype) for n in (6, 2, 2))
    check_error_weights("triton", (q, k, v), inverse_frequencies(64), 1.0, None, queries=20, sinks=2, window=16, chunk=128)
    squares, weights = grids
    assert weights[1] == splits and (squares[0] > 1) == (splits > 1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gap", [60, 66, 70, 74, 90])
def test_error_weights_far_below_a_sink(rng, implementation, gap):
    """Weights of 2**-gap, whose squares float32 barely holds, or does not."""
    q, k = torch.zeros(1, 2, 40, 64), torch.from_numpy(0.1 * rng.standard_normal((1, 1, 40, 64))).float()
    q[..., 40], k[..., 40] = 8.0, 0.0  # a dimension that does not turn
    k[:, :, 0, 40] = gap * np.log(2.0)
    qkv = q.to(DEVICE), k.to(DEVICE), torch.from_numpy(rng.standard_normal((1, 1, 40, 64))).to(DEVICE, torch.float32)
    check_error_weights(implementation, qkv, inverse_frequencies(32), 1.0, None, queries=20, sinks=1, window=4)


def test_error_weights_names_arguments():
    q, k = (torch.zeros(1, heads, 8, 64, device=DEVICE) for heads in (4, 2))
    rope, options = rope_of(inverse_frequencies(64), 1.0), {"chunk": 64, "sinks": 0, "window": 1}
    compress.error_weights(q, k, k, rope, **options)
    for call, error, name in [
        (lambda: compress.error_weights(q.mT, k, k, rope, **options), ValueError, "q"),
        (lambda: compress.error_weights(q, k.double(), k, rope, **options), TypeError, "k"),
        (lambda: compress.error_weights(q, k, k[0], rope, **options), ValueError, "v"),
        (lambda: compress.error_weights(q, k, k, rope, queries=0, **options), ValueError, "queries"),
        (lambda: compress.error_weights(q, k, k, rope, queries=20000, **options), ValueError, "queries"),
    ]:
        with pytest.raises(error, match=name):
            call()


@pytest.mark.parametrize("group", [1, 3])
def test_shared_metrics(rng, group):
    """Metrics of a KV head that differ in size alone are kept as they are; of others each keeps what values are in it."""
    first, second = (random_metric(rng, 64) for _ in range(2))
    rows = tensor(rng.standard_normal((3, 2, 100, 64)) + 2)
    moments = rows.mT @ rows
    alike = np.concatenate([np.stack([first * size for size in range(1, group + 1)]), np.stack([second] * group)])
    mixed = np.stack([random_metric(rng, 64) * 10.0**size for size in range(2 * group)])
    for metrics in (alike, mixed):
        shared = compress.shared_metrics(tensor(metrics), 2)
        sizes = to_numpy(compress.metric_sizes(tensor(metrics), shared, moments))
        assert shared.shape == (2, 64, 64) and sizes.shape == (3, 2 * group)
        np.testing.assert_allclose(np.trace(to_numpy(shared), axis1=1, axis2=2), 64, rtol=1e-5)
        kept = sizes[..., None, None] * to_numpy(shared).repeat(group, axis=0)
        if metrics is alike:
            np.testing.assert_allclose(kept, np.stack([metrics] * 3), rtol=1e-4, atol=1e-5 * np.abs(metrics).max())
        by_head = to_numpy(moments).repeat(group, axis=1)
        np.testing.assert_allclose((kept * by_head).sum((2, 3)), (metrics * by_head).sum((2, 3)), rtol=1e-4)
    nothing = compress.shared_metrics(torch.zeros(2, 16, 16), 2)
    assert (nothing == 0).all() and (compress.metric_sizes(nothing, nothing, nothing[None]) == 0).all()


def test_steps_are_multiples(rng):
    """Codes of fewer bits are functions of those of more: quantising what those stand for gives the same codes."""
    x = tensor(spectrum(rng, (1, 2, 500), 64))
    [found] = compress.fit_spectra([compress.Side(x, centre=True)])
    y = (x - found.mean) @ found.encoder
    for fine, coarse in ((8, 4), (4, 2)):
        a, b = (found.steps[bits][:, :, None, 1:] for bits in (fine, coarse))  # not the mean's
        assert torch.equal((b / a).round() * a, b)
        rebuilt = ((y / a).floor() + 0.5).clamp(0.5 - 2 ** (fine - 1), 2 ** (fine - 1) - 0.5) * a
        top = 2 ** (coarse - 1)
        codes, again = (((z / b).floor()).clamp(-top, top - 1) for z in (y, rebuilt))
        assert (codes != again).float().mean() < 1e-4


# bases


def loss_budget(x: F64, metric: F64 | None, singular: F64, rank: int, units: float = 2.0**-24) -> float:
    """How much more than the least a basis may lose: rounding it leaks, relative to its length, `units` of everything
    that the kept components hold into what is lost, in squares, times the condition of the metric."""
    least = float(np.sum(singular[rank:] ** 2))
    condition = 1.0 if metric is None else np.linalg.cond(metric)
    return least * 1e-6 + 4 * x.shape[1] * units**2 * condition * float(np.sum(singular**2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dim", "rank"), [(64, 16), (64, 48), (64, 64), (40, 24)])
@pytest.mark.parametrize("weighted", [False, True])
def test_fit_basis_loses_least(rng, implementation, dim, rank, weighted):
    x = spectrum(rng, (300,), dim)
    metric = random_metric(rng, dim) if weighted else None
    held = held_metric(metric) if weighted else None
    best, singular = oracle.fit_basis(x, held, rank)
    moment = tensor(x.T @ x, torch.float64)
    run = operation(compress, "fit_basis", implementation)
    got = run(moment, None if metric is None else tensor(metric, torch.float64), rank=rank)
    assert got.dtype == torch.float32 and tuple(got.shape) == (rank, dim)
    basis = to_numpy(got)
    least = float(np.sum(singular[rank:] ** 2))
    budget = loss_budget(x, held, singular, rank)
    np.testing.assert_allclose(oracle.loss(x, best, held), least, atol=1e-9 * np.sum(singular**2))
    assert oracle.loss(x, basis, held) <= least + budget
    for prefix in (1, 5, rank):  # best component first
        assert oracle.loss(x, basis[:prefix], held) <= np.sum(singular[prefix:] ** 2) + loss_budget(
            x, held, singular, prefix
        )
    inside = basis @ (np.eye(dim) if held is None else held) @ basis.T
    size = np.abs(basis) @ np.abs(np.eye(dim) if held is None else held) @ np.abs(basis.T)
    budgets.check(inside, np.eye(rank), 4 * budgets.ACC * size + 1e-9, "orthonormal in the metric")
    assert (np.take_along_axis(basis, np.abs(basis).argmax(-1)[:, None], -1) > 0).all()
    if rank < dim:
        wrong = {
            "the least components": oracle.fit_basis(x, held, dim)[0][-rank:],
            "random": rng.standard_normal((rank, dim)),
            "one component too few": best[:-1],
            "of half the tokens": oracle.fit_basis(x[:150], held, rank)[0],
        }
        if weighted:
            wrong["no metric"] = oracle.fit_basis(x, None, rank)[0]
            wrong["the metric's inverse"] = oracle.fit_basis(x, np.linalg.inv(held), rank)[0]
        for mistake, mutant in wrong.items():
            assert oracle.loss(x, mutant, held) > least + 2 * budget, mistake


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fit_basis_of_batches_and_broken_metrics(rng, implementation):
    """Leading dimensions are independent; a metric of low rank, or of zeros, still gives a basis of full rank."""
    fit_basis = operation(compress, "fit_basis", implementation)
    x = np.stack([spectrum(rng, (90,), 32) for _ in range(4)]).reshape(2, 2, 90, 32)
    moments = x.mT @ x
    metrics = np.stack([random_metric(rng, 32) for _ in range(2)])
    together = to_numpy(fit_basis(tensor(moments), tensor(metrics), rank=16))
    for b, g in np.ndindex(2, 2):
        held = held_metric(metrics[g])
        _, singular = oracle.fit_basis(x[b, g], held, 16)
        # The moments came in float32, each entry rounded.
        extra = 32 * 2.0**-24 * np.linalg.cond(held) * np.sum(singular**2)
        assert oracle.loss(x[b, g], together[b, g], held) <= np.sum(singular[16:] ** 2) + extra
    thin = metrics[0] * 0
    thin[:3, :3] = np.eye(3)
    for metric in (thin, metrics[0] * 0):
        basis = to_numpy(fit_basis(tensor(moments[0, 0]), tensor(metric), rank=32))
        assert np.isfinite(basis).all() and np.linalg.matrix_rank(basis, tol=1e-6) == 32


DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "qwen2.5-coder-1.5b-kv.safetensors"


@pytest.mark.skipif(not DATA.exists(), reason=f"no {DATA}")
@pytest.mark.parametrize("layer", [0, 1, 5, 9, 14, 18, 22, 27] if DEVICE.type == "cuda" else [0])
@pytest.mark.parametrize("side", SIDES)
def test_bases_of_a_model_are_as_good_as_float64(side, layer):
    """Within a thousandth of the least weighted error of each rank, from float32 moments (layer 0 spans ten decades)."""
    with safe_open(DATA, "pt") as data:
        x, q = (data.get_tensor(f"layer{layer}.{name}").double().numpy() for name in (side, "q"))
    heads = len(x) if DEVICE.type == "cuda" else 1  # the interpreter takes seconds for one
    for head in range(heads):
        rows, queries = x[head], q[6 * head : 6 * head + 6].reshape(-1, 128)
        moment = rows.T @ rows
        metric = queries.T @ queries if side == "k" else None
        held = np.eye(128) if metric is None else held_metric(metric)
        with kernels():
            got = compress.fit_basis(tensor(moment), None if metric is None else tensor(metric), rank=128)
        root = np.linalg.cholesky(held)
        weighted = root.T @ moment @ root
        falling = np.linalg.eigvalsh(weighted)[::-1]
        for rank in (16, 32, 64, 96, 112):
            kept = np.linalg.qr((to_numpy(got)[:rank] @ root).T)[0]
            lost = np.trace(weighted) - np.trace(kept.T @ weighted @ kept)
            assert lost <= 1.001 * falling[rank:].sum(), (head, rank)


def check_quantise_components(implementation: str, basis: F64, metric: F64 | None) -> None:
    """basis [N, R, D], metric [N, D, D], float32 numbers. Squared lengths are those of the components as they are held."""
    run = operation(compress, "quantise_components", implementation)
    codes, scale, weights = run(tensor(basis), None if metric is None else tensor(metric))
    expected_codes, expected_scale = oracle.quantise_basis(basis)
    assert codes.dtype == torch.int8 and scale.dtype == weights.dtype == torch.float32
    budgets.check(scale, expected_scale, 2 * budgets.ACC * expected_scale, "scale")
    # A float32 quotient may fall on the other side of a tie.
    nearest = np.abs(to_numpy(codes) - basis / expected_scale[..., None])
    assert nearest.max(initial=0) <= 0.5 + 1e-4
    assert (to_numpy(codes) != expected_codes).sum() <= 1e-3 * codes.numel()
    np.testing.assert_array_equal(np.abs(to_numpy(codes)).max(-1), np.where(np.abs(basis).max(-1) > 0, 127, 0))
    vectors = to_numpy(codes) * to_numpy(scale)[..., None]
    held = np.eye(basis.shape[-1]) if metric is None else metric
    exact = ((vectors @ held) * vectors).sum(-1)
    depth = budgets.PRODUCT + (2 * basis.shape[-1] + 8) * budgets.ACC
    budget = depth * ((np.abs(vectors) @ np.abs(held)) * np.abs(vectors)).sum(-1)
    budgets.check(weights, exact, budget, "squared lengths")
    if basis.size:
        budgets.check_rejects(2 * exact, exact, budget, "twice as much")
        budgets.check_rejects(exact / to_numpy(scale), exact, budget, "scales, not their squares")
    if basis.size and metric is not None:
        budgets.check_rejects((vectors**2).sum(-1), exact, budget, "no metric")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rank", "dim"), [(16, 64), (40, 40), (1, 128), (128, 128)])
def test_quantise_components(rng, implementation, rank, dim, weighted):
    basis = rng.standard_normal((3, rank, dim)) * np.exp(rng.standard_normal((3, rank, 1)) * 5)
    basis[0, rank // 2] = 0.0
    metric = np.stack([random_metric(rng, dim) for _ in range(3)]) if weighted else None
    check_quantise_components(
        implementation, np.float64(np.float32(basis)), None if metric is None else np.float64(np.float32(metric))
    )


def test_quantise_basis(rng):
    basis = tensor(rng.standard_normal((2, 3, 16, 64)))
    rows, scale, _ = compress.quantise_components(basis)
    assert all(map(torch.equal, compress.quantise_basis(basis), (rows, scale)))


def expected_encoder(rows: F64, scale: F64, held: F64 | None) -> tuple[F64, F64]:
    """[D, R] for rows [R, D], integers, and scale [R], float32, under a metric as it is held; and its budget."""
    expected = oracle.fit_encoder(rows * scale[:, None], held)
    # The diagonal of R x R equations has 1e-13 more of itself, and they are solved in float64.
    condition = np.linalg.cond(rows) ** 2 * (1.0 if held is None else np.linalg.cond(held))
    slack = (1e-13 + 4 * rows.shape[1] * 2.0**-53) * condition * np.abs(expected).max()
    return expected, budgets.rounding(expected, torch.float32) + slack


def check_encoder(got: torch.Tensor, rows: F64, scale: F64, held: F64 | None) -> None:
    expected, budget = expected_encoder(rows, scale, held)
    assert got.dtype == torch.float32 and got.shape == expected.shape
    budgets.check(got, expected, budget, "encoder")


def check_fit_encoder(implementation: str, rows: F64, scale: F64, metric: F64 | None) -> F64:
    """rows [R, D], integers within -127 .. 127; scale [R], float32. The encoder."""
    run = operation(compress, "fit_encoder", implementation)
    weights = None if metric is None else tensor(metric, torch.float64)
    got = run(tensor(rows, torch.int8), tensor(scale), weights)
    check_encoder(got, rows, scale, None if metric is None else held_metric(metric))
    return to_numpy(got)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dim", "rank"), [(64, 16), (64, 64), (40, 40)])
@pytest.mark.parametrize("weighted", [False, True])
def test_fit_encoder(rng, implementation, dim, rank, weighted):
    """The coefficients of least error for the basis as it is held; with R = D its inverse."""
    metric = random_metric(rng, dim) if weighted else None
    held = held_metric(metric) if weighted else None
    rows, scale = oracle.quantise_basis(oracle.fit_basis(spectrum(rng, (200,), dim), held, rank)[0])
    scale = scale.astype(np.float32).astype(np.float64)
    got, basis = check_fit_encoder(implementation, rows, scale, metric), rows * scale[:, None]
    np.testing.assert_allclose(basis @ got, np.eye(rank), atol=1e-4)
    if rank == dim:
        np.testing.assert_allclose(got @ basis, np.eye(dim), atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fit_encoder_of_batches(rng, implementation):
    """Leading dimensions are independent; those of the metric, or of the basis, may be fewer."""
    rows, scale = oracle.quantise_basis(rng.standard_normal((2, 2, 16, 16)))
    scale = scale.astype(np.float32).astype(np.float64)
    metrics = np.stack([random_metric(rng, 16) for _ in range(2)])
    run = operation(compress, "fit_encoder", implementation)
    got = run(tensor(rows, torch.int8), tensor(scale), tensor(metrics, torch.float64))
    for b, g in np.ndindex(2, 2):
        check_encoder(got[b, g], rows[b, g], scale[b, g], held_metric(metrics[g]))
    got = run(tensor(rows[0, 0], torch.int8), tensor(scale[0, 0]), tensor(metrics, torch.float64))
    for g in range(2):
        check_encoder(got[g], rows[0, 0], scale[0, 0], held_metric(metrics[g]))
    assert run(tensor(rows[:0], torch.int8), tensor(scale[:0])).shape == (0, 2, 16, 16)


def test_the_budget_of_an_encoder_has_teeth(rng):
    rows, scale = oracle.quantise_basis(rng.standard_normal((16, 32)))
    held = held_metric(random_metric(rng, 32))
    best, budget = expected_encoder(rows, scale, held)
    for mistake, mutant in {
        "no metric": oracle.fit_encoder(rows * scale[:, None], None),
        "no scale": oracle.fit_encoder(rows, held),
        "its columns swapped": best[:, ::-1],
        "half precision": np.float16(best),
    }.items():
        budgets.check_rejects(mutant, best, budget, mistake)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dim", "weighted"), [(16, False), (16, True), (64, False)])
def test_fit_encoder_with_a_component_of_zeros(rng, implementation, dim, weighted):
    """As many components as dimensions: the metric is without effect here too."""
    rows, scale = oracle.quantise_basis(rng.standard_normal((16, dim)))
    rows[5] = 0
    run = operation(compress, "fit_encoder", implementation)
    metric = tensor(random_metric(rng, dim), torch.float64) if weighted else None
    got = to_numpy(run(tensor(rows, torch.int8), tensor(scale), metric))
    others = np.delete(np.arange(16), 5)
    expected = oracle.fit_encoder(rows[others] * scale[others, None], None)
    np.testing.assert_allclose(got[:, others], expected, atol=1e-4 * np.abs(expected).max())
    assert np.isfinite(got).all()


def check_project_rows(
    implementation: str, x: torch.Tensor, encoder: torch.Tensor, mean: torch.Tensor | None, every: int
) -> None:
    """Of some rows, the products, and of each column the largest and the sum of squares."""

    def rows(x: torch.Tensor) -> F64:
        own = x[:, :, ::every]
        return to_numpy(own if mean is None else (own - mean[:, :, None]).to(x.dtype))

    run = operation(compress, "project_rows", implementation, x.dtype)
    got, largest, squares = map(to_numpy, run(x, encoder, mean, every=every))
    e = to_numpy(encoder)
    exact, slack = rows(x) @ e, budgets.coefficients(rows(x), e)
    assert got.shape == exact.shape
    budgets.check(got, exact, slack, "coefficients")
    np.testing.assert_array_equal(largest, np.abs(got).max(2))
    sums = (got**2).sum(2)
    budgets.check(squares, sums, (got.shape[2] + 4) * budgets.ACC * sums, "squares")
    budgets.check_rejects(0 * exact, exact, slack, "zeros")
    budgets.check_rejects(rows(x) @ np.float16(e), exact, slack, "an fp16 encoder")
    if x.shape[2] > 1:
        budgets.check_rejects(rows(x.roll(1, 2)) @ e, exact, slack, "other rows")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    ("dim", "rank", "tokens", "every", "dtype", "stride"),
    [
        (64, 64, 150, 2, torch.float16, "swapped"),
        (80, 48, 70, 1, torch.bfloat16, "odd"),
        (128, 128, 67, 3, torch.float32, "padded"),
        (64, 16, 5, 9, torch.float16, "plain"),
    ],
)
def test_project_rows(rng, implementation, centred, dim, rank, tokens, every, dtype, stride):
    x = strided(torch.from_numpy(rng.standard_normal((2, 2, tokens, dim)) + 3 * centred).to(dtype), stride)
    encoder = tensor(rng.standard_normal((2, 2, dim, rank)) * np.exp(rng.standard_normal(rank)))
    mean = tensor(3 + 0.1 * rng.standard_normal((2, 2, dim))) if centred else None
    check_project_rows(implementation, x, encoder, mean, every)


def check_squared_errors(
    implementation: str, rebuilt: torch.Tensor, x: torch.Tensor, weighing: F64 | None, name: str
) -> None:
    """weighing: [B, G, D, D], a `metric` or its `root` by name, or None."""
    run = operation(compress, "squared_errors", implementation, x.dtype)
    got = run(rebuilt, x, **({} if weighing is None else {name: tensor(weighing)}))

    def lost(rebuilt: F64, weighing: F64 | None, name: str) -> tuple[F64, F64]:
        off = rebuilt - to_numpy(x)
        w = np.eye(x.shape[3]) if weighing is None else np.float64(np.float32(weighing))
        weighted, size = off @ w, np.abs(off) @ np.abs(w)
        own, own_size = (weighted, size) if name == "root" else (off, np.abs(off))
        # Two factors, each a product or a difference, and their sum.
        depth = 2 * budgets.PRODUCT + (3 * x.shape[3] + 16) * budgets.ACC
        return (weighted * own).sum(-1), depth * (size * own_size).sum(-1)

    exact, budget = lost(to_numpy(rebuilt), weighing, name)
    budgets.check(got, exact, budget + budgets.SMALLEST[torch.float32], "squared errors")
    budgets.check_rejects(0 * exact, exact, budget, "zeros")
    budgets.check_rejects(lost(0 * to_numpy(rebuilt), weighing, name)[0], exact, budget, "of the rows themselves")
    if weighing is not None:
        budgets.check_rejects(lost(to_numpy(rebuilt), None, name)[0], exact, budget, "no metric")
        if name == "root":
            budgets.check_rejects(lost(to_numpy(rebuilt), weighing.mT, name)[0], exact, budget, "a root transposed")
        other = "root" if name == "metric" else "metric"
        budgets.check_rejects(lost(to_numpy(rebuilt), weighing, other)[0], exact, budget, f"a {name} taken for a {other}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["metric", "root", "neither"])
@pytest.mark.parametrize(
    ("dim", "tokens", "dtype", "stride"),
    [(64, 70, torch.float16, "swapped"), (80, 16, torch.bfloat16, "odd"), (128, 5, torch.float32, "padded")],
)
def test_squared_errors(rng, implementation, name, dim, tokens, dtype, stride):
    x = strided(torch.from_numpy(rng.standard_normal((2, 2, tokens, dim))).to(dtype), stride)
    rebuilt = x.float() + tensor(0.3 * rng.standard_normal(x.shape))
    weighing = np.stack([random_metric(rng, dim) for _ in range(4)]).reshape(2, 2, dim, dim)
    if name == "root":
        weighing = np.linalg.cholesky(weighing)
    check_squared_errors(implementation, rebuilt, x, None if name == "neither" else weighing, name)


def test_squared_errors_names_arguments():
    x, rebuilt = (torch.zeros(1, 2, 8, 64, dtype=dtype, device=DEVICE) for dtype in (torch.float16, torch.float32))
    eye = torch.eye(64, device=DEVICE).expand(1, 2, 64, 64)
    assert (compress.squared_errors(rebuilt, x, metric=eye) == 0).all()
    for call, error, name in [
        (lambda: compress.squared_errors(x, x), TypeError, "rebuilt"),
        (lambda: compress.squared_errors(rebuilt, x[..., :32]), ValueError, "x"),
        (lambda: compress.squared_errors(rebuilt, x, metric=eye[0]), ValueError, "metric"),
        (lambda: compress.squared_errors(rebuilt, x, root=eye.double()), TypeError, "root"),
        (lambda: compress.squared_errors(rebuilt, x, metric=eye, root=eye), ValueError, "root"),
    ]:
        with pytest.raises(error, match=name):
            call()


def test_project_rows_names_arguments():
    x, encoder = torch.zeros(1, 2, 5, 64, device=DEVICE), torch.zeros(1, 2, 64, 16, device=DEVICE)
    for arguments, every, message in (
        ((x, encoder), 0, "every: expected at least 1"),
        ((x[:, :, :0], encoder), 1, "of at least one row, got 1 of 0"),
        ((x, encoder[:, :1]), 1, "encoder"),
        ((x, encoder, x[:, :, 0, :8]), 1, "mean"),
        ((x.mT, encoder), 1, "x"),
    ):
        with pytest.raises(ValueError, match=message):
            compress.project_rows(*arguments, every=every)
    nothing = compress.project_rows(x, encoder[..., :0].contiguous(), every=2)
    assert [tuple(found.shape) for found in nothing] == [(1, 2, 3, 0), (1, 2, 0), (1, 2, 0)]


def check_fit_quantisers(implementation: str, c: F64, bits: int) -> None:
    """c [T, 16]. The least squared error of the steps that are tried, a tenth of themselves apart; on average over
    components near the least of a uniform quantiser, found here by a scan fifty times as fine.
    """
    bands = Bands(((16, bits),))
    # Two choices at once: the first is of other bits.
    choices = [Bands(((16, 8 if bits == 4 else 4),)), bands]
    found = operation(compress, "fit_quantisers", implementation)(tensor(np.stack([c, 3 * c])), choices)
    (_, both), (others, errors) = map(to_numpy, found)
    steps = both[0]
    assert (both > 0).all()
    # A multiple of the coefficients gets that multiple of the step, but where rounding decides between neighbours.
    np.testing.assert_allclose(both[1], 3 * steps, rtol=1 / 6)

    def error(step: F64) -> F64:
        return ((oracle.quantise(c / step, bands.bands) * step - c) ** 2).sum(0)

    # A component that is next to nothing beside the largest gets a step all the same.
    largest = np.abs(c).max(0)
    widest = np.maximum(largest, 1e-6 * largest.max()) / 2 ** (bits - 1)
    best = np.min([error(widest * share) for share in np.linspace(0.2, 1, 750)], axis=0)
    # The error it reports is that of its step, up to float32 sums of T squares and of what rounds in each difference.
    slack = (len(c) + 8) * budgets.ACC * error(steps) + 16 * budgets.ACC * (steps * np.abs(c).sum(0))
    budgets.check(errors[0], error(steps), slack, "error")
    again = operation(compress, "quantiser_errors", implementation)(tensor(np.stack([c, 3 * c])), found[0], choices)
    reported = np.stack((others, errors))
    budgets.check(again, reported, (len(c) + 8) * budgets.ACC * reported, "error of given steps")
    given = tensor(np.stack((steps, 0.7 * steps))[None])
    own = to_numpy(operation(compress, "quantiser_errors", implementation)(tensor(np.stack([c, c])), given, [bands])[0])
    for size, got in zip((1.0, 0.7), own, strict=True):
        exact = error(np.float64(np.float32(size * steps)))
        slack = (len(c) + 8) * budgets.ACC * exact + 16 * budgets.ACC * (steps * np.abs(c).sum(0))
        budgets.check(got, exact, slack, f"error of {size} steps")
    # As good as the best step that is tried, of which the finest grid's are not much better.
    shares = np.geomspace(1, compress.LEAST_SHARE, compress.STEP_SHARES)
    least = np.min([error(share * widest) for share in shares], axis=0)
    budgets.check(np.maximum(error(steps) - least, 0.0), np.zeros(16), slack, "least error")
    assert np.mean(error(steps) / best) <= 1.05


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("kind", ["normal", "uniform", "outliers"])
def test_fit_steps(rng, implementation, bits, kind):
    c = {
        "normal": lambda: rng.standard_normal((400, 16)),
        "uniform": lambda: rng.uniform(-1, 1, (400, 16)),
        "outliers": lambda: rng.standard_normal((400, 16)) * np.where(rng.random((400, 16)) < 0.01, 20, 1),
    }[kind]() * np.exp(3 * rng.standard_normal(16))
    check_fit_quantisers(implementation, c, bits)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [1, 63, 130])
def test_fit_quantisers_of_some_components(rng, implementation, tokens):
    """Choices of lower rank get what they would get by themselves, and 1 and 0 for the rest."""
    c = tensor(rng.standard_normal((2, 3, tokens, 48)))
    choices = [Bands.parse(text) for text in ("16x8", "16x8+16x4", "48x2")]
    fit = operation(compress, "fit_quantisers", implementation)
    steps, errors = fit(c, choices)
    again = operation(compress, "quantiser_errors", implementation)(c, steps, choices)
    for n, bands in enumerate(choices):
        own_steps, own_errors = fit(c[..., : bands.rank].contiguous(), [bands])
        for got, own, rest in ((steps, own_steps, 1.0), (errors, own_errors, 0.0), (again, own_errors, 0.0)):
            np.testing.assert_allclose(to_numpy(got[n, ..., : bands.rank]), to_numpy(own[0]), rtol=(tokens + 8) * 2.0**-24)
            assert (got[n, ..., bands.rank :] == rest).all()


def test_steps_of_what_layouts_need(rng):
    """Steps are fitted for the components that some layout gives so many bits, and nothing else is answered."""
    choices = [Bands.parse(text) for text in ("32x8", "16x4+32x2", "16x8+16x2")]
    side = compress.Side(tensor(spectrum(rng, (1, 1, 300), 64)), choices=choices)
    assert [str(bands) for bands in side.by_bits().values()] == ["32x8", "32x4", "48x2"]  # no fewer with fewer bits
    [found] = compress.fit_spectra([side])
    assert {bits: step.shape[-1] for bits, step in found.steps.items()} == {8: 32, 4: 32, 2: 48}
    for fine, coarse in ((8, 4), (4, 2)):
        a, b = found.steps[fine], found.steps[coarse][..., : found.steps[fine].shape[-1]]
        assert torch.equal((b / a).round() * a, b)
    assert found.distortions(choices).shape == (3, 1, 1)
    every = compress.fit_spectra([replace(side, choices=None)])[0]
    alone = Bands.parse("32x8")
    np.testing.assert_allclose(to_numpy(found.distortions([alone])), to_numpy(every.distortions([alone])), rtol=1e-5)
    for text in ("48x8", "48x4", "64x2", "16x16"):
        for call in (found.steps_of, lambda bands: found.distortions([bands])):
            with pytest.raises(ValueError, match="bands: expected components that steps were fitted for"):
                call(Bands.parse(text))


def test_fit_steps_of_floats_and_zeros(rng):
    c = rng.standard_normal((50, 16)) * np.exp(8 * rng.standard_normal(16))
    steps = to_numpy(compress.fit_steps(tensor(c), Bands.parse("16x16")))
    assert (np.log2(steps) % 1 == 0).all() and (np.abs(c).max(0) / steps < 2.0**12 * 1.001).all()
    for text in ("16x16", "16x8", "16x2"):
        zeros = to_numpy(compress.fit_steps(torch.zeros(3, 16, device=DEVICE), Bands.parse(text)))
        assert np.isfinite(zeros).all() and (zeros > 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_quantisers_of_zeros_lose_nothing(implementation):
    run = operation(compress, "fit_quantisers", implementation)
    steps, lost = map(to_numpy, run(torch.zeros(3, 16, device=DEVICE), [Bands.parse("16x8"), Bands.parse("16x2")]))
    assert np.isfinite(steps).all() and (steps > 0).all() and (np.abs(lost) < 1e-60).all()


# encode and decode


def check_encode(
    implementation: str,
    x: torch.Tensor,
    encoder: torch.Tensor,
    bands: Bands,
    chunk: int,
    side: str,
    rng: np.random.Generator,
    offset: F64 | None = None,
) -> None:
    """Codes within what float32 may make of the coefficients; pages that were not asked for keep their bytes."""
    batch, heads, tokens, _ = x.shape
    chunks = tokens // chunk
    pool = batch * chunks + 3
    ids = rng.permutation(pool)[: batch * chunks].reshape(batch, chunks).astype(np.int32)
    ids[rng.random(ids.shape) < 0.2] = -1
    before = rng.integers(0, 256, (pool, heads, chunk * bands.bytes)).astype(np.uint8)
    pages = torch.from_numpy(before.copy()).to(DEVICE)
    wide = torch.full((batch, chunks + 2), 2**31 - 1, dtype=torch.int32, device=DEVICE)
    wide[:, :chunks] = torch.from_numpy(ids).to(DEVICE)
    kwargs = {} if offset is None else {"offset": tensor(offset)}
    got = operation(compress, "encode", implementation, x.dtype)(
        x, encoder, bands, pages, wide[:, :chunks], side=side, **kwargs
    )
    assert got is None
    after = pages.cpu().numpy()
    exact = to_numpy(x) @ to_numpy(encoder)  # [B, G, T, R], in units of steps
    slack = budgets.coefficients(to_numpy(x), to_numpy(encoder), x.dtype)
    if offset is not None:  # rounded to float32, and so is the difference
        exact = exact - offset[:, :, None]
        slack = slack + 3 * budgets.ACC * np.abs(offset[:, :, None])
    low, high = (oracle.quantise(exact + sign * slack, bands.bands) for sign in (-1, 1))
    for b, j in np.ndindex(batch, chunks):
        if ids[b, j] < 0:
            continue
        stored = pages_oracle.unpack_pages(after[ids[b, j]], bands.bands, side)  # [G, C, R]
        part = slice(j * chunk, (j + 1) * chunk)
        assert (low[b, :, part] <= stored).all() and (stored <= high[b, :, part]).all()
    if not bands.is_float and tokens:
        # The interval has teeth: it is a single code but for a small share of the coefficients.
        assert (low != high).mean() < 0.05
    untouched = np.setdiff1d(np.arange(pool), ids)
    np.testing.assert_array_equal(after[untouched], before[untouched])


ENCODE_CASES = [
    # bands, D, C, B, G, chunks, dtype, strides
    ("16x8+16x4+32x2", 64, 64, 2, 2, 2, torch.float16, "swapped"),
    ("48x4", 80, 64, 1, 1, 2, torch.float32, "odd"),
    ("16x8+16x4+16x2", 80, 128, 1, 1, 1, torch.float16, "odd"),
    ("32x4+16x2", 96, 64, 1, 2, 3, torch.float16, "plain"),
    ("96x16", 96, 64, 1, 2, 1, torch.float32, "plain"),
    ("32x8+96x2", 128, 128, 1, 1, 1, torch.bfloat16, "padded"),
    ("16x8+240x2", 256, 64, 1, 1, 1, torch.float16, "plain"),
    ("16x8", 64, 64, 1, 2, 0, torch.float32, "plain"),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", ENCODE_CASES, ids=lambda c: f"{c[0]}-D{c[1]}")
def test_encode(rng, implementation, side, case):
    text, dim, chunk, batch, heads, chunks, dtype, stride = case
    bands = Bands.parse(text)
    x = strided(torch.from_numpy(rng.standard_normal((batch, heads, chunks * chunk, dim))).to(dtype), stride)
    levels = np.concatenate([np.full(rank, 8.0 if bits == 16 else 2.0**bits / 4) for rank, bits in bands.bands])
    encoder = tensor(rng.standard_normal((batch, heads, dim, bands.rank)) / dim**0.5 * levels)
    check_encode(implementation, x, encoder, bands, chunk, side, rng)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("text", "dtype"), [("16x8+32x4", torch.float16), ("48x2", torch.float32), ("48x16", torch.float16)]
)
def test_encode_with_an_offset(rng, implementation, side, text, dtype):
    """Rows with a mean: the codes are those of what is left when it is subtracted."""
    bands = Bands.parse(text)
    x = torch.from_numpy(rng.standard_normal((2, 2, 64, 64)) + 3 * rng.standard_normal(64)).to(DEVICE, dtype)
    levels = np.concatenate([np.full(rank, 8.0 if bits == 16 else 2.0**bits / 4) for rank, bits in bands.bands])
    encoder = tensor(rng.standard_normal((2, 2, 64, bands.rank)) / 8 * levels)
    offset = (to_numpy(x).mean(2, keepdims=True) @ to_numpy(encoder))[:, :, 0]
    check_encode(implementation, x, encoder, bands, 64, side, rng, offset)


def decode_oracle(arrays: pages_oracle.PageArrays, side: str) -> tuple[F64, F64]:
    """[B, G, max_chunks * C, D] by position, and its budget."""
    bands = arrays.k_bands if side == "k" else arrays.v_bands
    basis, scale = (arrays.k_basis, arrays.k_scale) if side == "k" else (arrays.v_basis, arrays.v_scale)
    batch, chunks = arrays.page_table.shape
    groups = basis.shape[1]
    out = np.zeros((batch, groups, chunks * arrays.chunk, arrays.head_dim))
    budget = np.zeros(out.shape)
    for b in range(batch):
        keys, values, _ = pages_oracle.rebuild(arrays, b)
        codes = pages_oracle.coefficients(arrays, b)[0 if side == "k" else 1]
        length = int(arrays.lengths[b])
        out[b, :, :length] = keys if side == "k" else values
        for start in range(0, length, arrays.chunk):
            segment = arrays.segment_table[b, start // arrays.align]
            for g in range(groups):
                part = slice(start, min(start + arrays.chunk, length))
                budget[b, g, part] = budgets.decode(codes[g, part], bands, basis[segment, g], scale[segment, g])
    return out, budget


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "spec",
    [
        PageSpec("16x8+16x4+32x2", "32x4+32x2", 64, 64, 2, (0, 1, 140), segments=3, skip=0.5, mixed=True),
        PageSpec("48x4", "80x16", 80, 64, 1, (65,)),
        PageSpec("128x16", "32x8+96x2", 128, 64, 1, (64, 3)),
        PageSpec("16x8+240x2", "256x2", 256, 64, 1, (65,)),
        PageSpec("16x8", "16x8", 64, 64, 1, (0,), spare_chunks=0),
    ],
    ids=lambda s: f"{s.k_bands}-{s.v_bands}",
)
def test_decode(rng, implementation, side, spec):
    """Every token below a row's length, skipped or not; exact zeros from there on, whatever the pages hold."""
    arrays = make_pages(rng, spec)
    expected, budget = decode_oracle(arrays, side)
    got = operation(compress, "decode", implementation)(pages_of(arrays), side=side)
    budgets.check(got, expected, budget)
    assert got.dtype == torch.float32


def test_decode_budget_has_teeth(rng):
    spec = PageSpec("16x8+32x4+16x2", "32x4+32x2", 64, 64, 2, (140,), segments=3, spare_chunks=0)
    arrays = make_pages(rng, spec)
    arrays.segment_table[0] = np.flatnonzero(np.isfinite(arrays.k_scale[:, 0, 0]))
    expected, budget = decode_oracle(arrays, "k")

    def changed(**fields: np.ndarray) -> F64:
        return decode_oracle(pages_oracle.PageArrays(**{**vars(arrays), **fields}), "k")[0]

    high = arrays.k_pages.copy()
    swap_nibbles(high, 16, arrays.chunk)
    for mistake, mutant in {
        "zeros": np.zeros_like(expected),
        "swapped segments": changed(segment_table=arrays.segment_table[:, ::-1]),
        "swapped pages": changed(page_table=arrays.page_table[:, ::-1]),
        "swapped nibbles": changed(k_pages=high),
        "signs of 8 bits": changed(k_pages=arrays.k_pages ^ np.uint8(0x80)),
        "scales shifted by a component": changed(k_scale=np.roll(arrays.k_scale, 1, -1)),
        "fp16 sums": np.float16(expected),
    }.items():
        budgets.check_rejects(mutant, expected, budget, mistake)


# pages in other bands


def check_requantise(implementation, source: Bands, bands: Bands, chunk: int, side: str, rng, chunks: int = 2) -> None:
    """Exactly the oracle's bytes: a coefficient is half a step off whole numbers, so over a whole number n it is at least
    1 / 2n from the boundary of two codes, more than rounding. Pages that are not named stay."""
    batch, heads, pool = 2, 2, 2 * chunks + 3
    old, new = (
        torch.from_numpy(rng.integers(0, 256, (pool, heads, chunk * x.bytes), dtype=np.uint8)).to(DEVICE)
        for x in (source, bands)
    )
    before = new.cpu().numpy()
    ids = rng.permutation(pool)[: batch * chunks].reshape(batch, chunks).astype(np.int32)
    if chunks:
        ids[-1, 0] = -1
    ratio = (1 / rng.integers(1, 100, (batch, heads, bands.rank))).astype(np.float32)
    run = operation(compress, "requantise", implementation)
    run(old, source, new, bands, tensor(ratio), torch.from_numpy(ids).to(DEVICE), side=side)
    want = before.copy()
    for b, j in np.ndindex(batch, chunks):
        if ids[b, j] >= 0:
            want[ids[b, j]] = oracle.requantise(old[ids[b, j]].cpu().numpy(), source.bands, bands.bands, ratio[b], side)
    np.testing.assert_array_equal(new.cpu().numpy(), want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("source", "text", "chunk"),
    [
        ("16x8+16x4+32x2", "16x8+16x4+32x2", 64),
        ("16x8+16x4+96x2", "32x4+16x2", 128),
        ("128x4", "16x2", 64),
        ("48x4", "48x2", 64),
        ("64x8", "16x8+32x4", 256),
    ],
)
def test_requantise(rng, implementation, side, source, text, chunk):
    check_requantise(implementation, Bands.parse(source), Bands.parse(text), chunk, side, rng)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_requantise_no_pages(rng, implementation):
    check_requantise(implementation, Bands.parse("16x8"), Bands.parse("16x4"), 64, "k", rng, chunks=0)


# the whole side


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("weighted", [False, True])
def test_fit_side_then_encode_then_decode(rng, implementation, side, weighted):
    """More bytes lose less; 16 bits of full rank lose what rounding coefficients to fp16 loses."""
    dim, chunk, tokens, heads = 64, 64, 128, 1
    x = spectrum(rng, (1, heads, tokens), dim)
    metric = np.stack([random_metric(rng, dim) for _ in range(heads)]) if weighted else None
    errors = []
    run_encode, run_decode = (operation(compress, name, implementation) for name in ("encode", "decode"))
    texts = ("16x2", "64x2", "16x8+48x2", "16x8+48x4", "64x8", "64x16")
    for text in texts if implementation == "torch" else texts[2::3]:
        bands = Bands.parse(text)
        basis, scale, encoder = compress.fit_side(tensor(x), bands, None if metric is None else tensor(metric))
        assert basis.dtype == torch.int8 and scale.dtype == encoder.dtype == torch.float32
        arrays = make_pages(rng, PageSpec(text, text, dim, chunk, heads, (tokens,), spare_chunks=0))
        held = pages_of(arrays)
        segment = int(arrays.segment_table[0, 0])
        target = held.k_pages if side == "k" else held.v_pages
        (held.k_basis if side == "k" else held.v_basis)[segment] = basis[0]
        (held.k_scale if side == "k" else held.v_scale)[segment] = scale[0]
        run_encode(tensor(x), encoder, bands, target, held.page_table, side=side)
        rebuilt = to_numpy(run_decode(held, side=side))
        difference = rebuilt - x
        root = [np.eye(dim) if metric is None else oracle.symmetric_root(held_metric(metric[g]))[0] for g in range(heads)]
        errors.append(sum(np.sum((difference[0, g] @ root[g]) ** 2) for g in range(heads)) / np.sum(x**2))
        if bands.is_float:
            units = to_numpy(tensor(x) @ encoder)
            vectors = np.abs(to_numpy(scale)[..., None] * to_numpy(basis))
            # fp16 rounding and float32 error of each coefficient, through the basis; the inverse was rounded to
            # float32.
            slack = budgets.rounding(units, torch.float16) + 2 * budgets.coefficients(x, to_numpy(encoder), torch.float32)
            budgets.check(rebuilt, x, slack @ vectors + 1e-6 * np.abs(x).max())
    assert all(more < 0.9 * less for less, more in itertools.pairwise(errors))


def test_arguments_are_named(rng):
    x = torch.zeros(1, 2, 64, 64, device=DEVICE)
    bands = Bands.parse("16x8")
    pages = torch.zeros(4, 2, 64 * 16, dtype=torch.uint8, device=DEVICE)
    ids = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
    encoder = torch.zeros(1, 2, 64, 16, device=DEVICE)
    coarse, ratio = torch.zeros(4, 2, 64 * 8, dtype=torch.uint8, device=DEVICE), torch.ones(1, 2, 16, device=DEVICE)
    good: dict[str, Any] = {"source": pages, "source_bands": bands, "pages": coarse, "bands": Bands.parse("16x4")}
    good |= {"ratio": ratio, "page_ids": ids, "side": "k"}

    def narrow(**changes: Any) -> None:
        compress.requantise(**{**good, **changes})

    narrow()
    for call, error, name in [
        (lambda: compress.gram(x[0]), ValueError, "x"),
        (lambda: compress.fit_basis(x[..., :32], rank=4), ValueError, "moment"),
        (lambda: compress.fit_basis(x, rank=65), ValueError, "rank"),
        (lambda: compress.fit_basis(x, x[..., :1, :1], rank=4), ValueError, "metric"),
        (lambda: compress.fit_encoder(x.to(torch.int8), x[..., 0].float(), x[..., :1, :1]), ValueError, "metric"),
        (lambda: compress.quantise_basis(x.half()), TypeError, "basis"),
        (lambda: compress.quantise_basis(x[0, 0, 0]), ValueError, "basis"),
        (lambda: compress.quantise_basis(x[..., :0]), ValueError, "basis"),
        (lambda: compress.quantise_components(x, x[..., :1, :1]), ValueError, "metric"),
        (lambda: compress.encode(x, encoder[..., :8], bands, pages, ids, side="k"), ValueError, "encoder"),
        (lambda: compress.encode(x, encoder, bands, pages, ids, side="q"), ValueError, "side"),
        (lambda: compress.encode(x[:, :, :40], encoder, bands, pages, ids, side="k"), ValueError, "x"),
        (lambda: compress.encode(x, encoder, bands, pages[..., :8], ids, side="k"), ValueError, "pages"),
        (lambda: compress.encode(x, encoder, bands, pages, ids.long(), side="k"), TypeError, "page_ids"),
        (lambda: compress.decode(x, side="k"), TypeError, "pages"),
        (lambda: narrow(side="q"), ValueError, "side"),
        (lambda: narrow(source=pages[..., :8]), ValueError, "source"),
        (lambda: narrow(pages=coarse[:3]), ValueError, "pages"),
        (lambda: narrow(pages=coarse[:, :1]), ValueError, "pages"),
        (lambda: narrow(pages=coarse[..., 8:]), ValueError, "pages"),
        (lambda: narrow(bands=Bands.parse("32x4")), ValueError, "ratio"),
        (lambda: narrow(source_bands=Bands.parse("16x16")), ValueError, "bands"),
        (lambda: narrow(ratio=ratio.double()), TypeError, "ratio"),
        (lambda: narrow(page_ids=ids.long()), TypeError, "page_ids"),
    ]:
        with pytest.raises(error, match=name):
            call()
