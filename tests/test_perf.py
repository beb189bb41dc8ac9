"""What of the measurements can be tested without a card: inputs, references, budgets, percentiles, tables, refusals."""

from __future__ import annotations

import contextlib
import itertools
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend

from perf import _cases, _timing, old_cards, predict, tables
from perf import attention as job
from perf import compress as compress_job
from perf import kernels as kernel_bench
from perf._cases import Shape, check_state, expected, make_decodes
from reference import attention as attention_oracle
from reference import rope as rope_oracle
from reference.pages import PageArrays
from spectral_kernels import attention, attention_sm75
from tests import budgets
from tests.cases import DEVICE, kernels, to_numpy
from tests.test_structure import operations

CPU = torch.device("cpu")


def small_decode(layout: str, dim: int = 64, batch: int = 2) -> _cases.Decode:
    torch.manual_seed(3)
    shape = Shape(batch, 4, 2, dim, 128 + 5 * 64)
    return make_decodes(shape, _cases.preset_layout(layout, dim), copies=2, dtype=torch.float32, device=CPU)[1]


def arrays_of(decode: _cases.Decode) -> PageArrays:
    pages = decode.pages
    names = "k_pages v_pages skip k_basis k_scale v_basis v_scale page_table segment_table lengths".split()
    bands = (pages.layout.k.bands, pages.layout.v.bands)
    sizes = (pages.layout.head_dim, pages.layout.chunk, pages.layout.align)
    return PageArrays(*bands, *sizes, *(getattr(pages, n).numpy() for n in names))


@pytest.mark.parametrize("layout", _cases.LAYOUTS)
def test_reference_and_budget_are_those_of_the_oracle(layout):
    """The float64 reference on the device equals the oracle; its budget is the oracle's."""
    decode = small_decode(layout)
    arrays, inv_freq = arrays_of(decode), decode.inv_freq.numpy()
    q, positions = to_numpy(decode.q)[:, :, None], decode.positions.numpy()[:, None]
    oracle = attention_oracle.spectral(q, positions, arrays, inv_freq)
    names = (arrays.k_basis, arrays.k_scale, arrays.segment_table, arrays.lengths)
    u = rope_oracle.project_queries(q, positions, *names, inv_freq, 1.0, arrays.align)
    o_budget, lse_budget = budgets.attend_spectral(q, oracle, arrays, u, inv_freq)
    exact = attention_oracle.exact(
        q, positions, to_numpy(decode.k), to_numpy(decode.v), decode.key_positions.numpy(), inv_freq, chunk=arrays.align
    )
    for b, g in ((0, 0), (1, 1)):
        own = slice(2 * g, 2 * g + 2)
        got = expected(decode, b, g, ("cold",))
        np.testing.assert_allclose(got.o.numpy(), oracle.o[b, own, 0], rtol=0, atol=1e-11)
        np.testing.assert_allclose(got.lse.numpy(), oracle.lse[b, own, 0], rtol=1e-12)
        np.testing.assert_allclose(got.o_budget.numpy(), o_budget[b, own, 0], rtol=1e-6)
        np.testing.assert_allclose(got.lse_budget.numpy(), lse_budget[b, own, 0], rtol=1e-6)
        both = expected(decode, b, g)
        lse = np.logaddexp(oracle.lse, exact.lse)
        share = np.exp(oracle.lse - lse)[..., None]
        o = share * oracle.o + (1 - share) * exact.o
        np.testing.assert_allclose(both.lse.numpy(), lse[b, own, 0], rtol=1e-12)
        np.testing.assert_allclose(both.o.numpy(), o[b, own, 0], rtol=0, atol=1e-11)


def test_exact_reference_and_budget_are_those_of_the_oracle():
    decode = small_decode("32x8")
    inv_freq, align = decode.inv_freq.numpy(), decode.pages.layout.align
    q, k, at = to_numpy(decode.q)[:, :, None], to_numpy(decode.k), decode.key_positions.numpy()
    oracle = attention_oracle.exact(q, decode.positions.numpy()[:, None], k, to_numpy(decode.v), at, inv_freq, chunk=align)
    o_budget, lse_budget = budgets.attend_exact(q, oracle, k, np.ones(k.shape[:3], bool), inv_freq)
    got = expected(decode, 1, 0, ("exact",))
    np.testing.assert_allclose(got.o.numpy(), oracle.o[1, :2, 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(got.o_budget.numpy(), o_budget[1, :2, 0], rtol=1e-6)
    np.testing.assert_allclose(got.lse_budget.numpy(), lse_budget[1, :2, 0], rtol=1e-6)


def test_a_step_passes_and_wrong_ones_do_not():
    """The twins' step lies within the budget; a step without the sinks' skip bits, without the exact tokens, or with the
    wrong base of logarithms does not."""
    decode = small_decode("balanced", dim=128)
    assert 0 < check_state(decode, decode.step()) <= 1
    assert 0 < check_state(decode, decode.attend_cold(), ("cold",)) <= 1
    o, lse = decode.step()
    with pytest.raises(AssertionError, match="times the budget"):
        check_state(decode, decode.attend_cold())
    with pytest.raises(AssertionError, match="times the budget"):
        check_state(decode, (o, lse * 1.4427))
    with pytest.raises(AssertionError, match="not finite"):
        check_state(decode, (o, lse * torch.inf))
    decode = small_decode("32x8", dim=128)  # fields of 2 bits have wider budgets
    decode.pages.skip.zero_()
    sinks_twice = decode.step()
    decode.pages.skip[decode.pages.page_table[:, 0].long(), :, 0] = 15
    with pytest.raises(AssertionError, match="times the budget"):
        check_state(decode, sinks_twice)


def test_scores_have_the_stated_spread():
    decode = small_decode("quality", dim=128)
    reference = attention_oracle.spectral(
        to_numpy(decode.q)[:, :, None], decode.positions.numpy()[:, None], arrays_of(decode), decode.inv_freq.numpy()
    )
    scores = reference.scores[np.isfinite(reference.scores)]
    assert 0.7 * _cases.SCORE_STD < scores.std() < 1.4 * _cases.SCORE_STD
    assert np.isfinite(reference.scores[:, :, :, :4]).sum() == 0  # the sinks are exact, not cold


def test_bytes_are_those_of_the_tensors():
    """What a step must read, against the tensors that hold it (the page pool has a page for every chunk, no more)."""
    shape, layout = Shape(3, 4, 2, 64, 128 + 3 * 128), _cases.preset_layout("balanced", 64)
    decode = make_decodes(shape, layout, copies=1, dtype=torch.float16, device=CPU)[0]
    pages = decode.pages
    read = (pages.k_pages, pages.v_pages, pages.skip, pages.page_table, pages.segment_table)
    assert shape.page_bytes(layout) == sum(x.nbytes for x in read)
    bases = (pages.k_basis, pages.k_scale, pages.v_basis, pages.v_scale)
    exact = (decode.k, decode.v, decode.key_positions, decode.q)
    assert shape.step_bytes(layout) == sum(x.nbytes for x in read + bases + exact)


def test_copies_of_a_case_share_nothing_that_is_read():
    shape = Shape(1, 2, 1, 64, 128 + 64)
    first, second = make_decodes(shape, _cases.preset_layout("small", 64), copies=2, dtype=torch.float16, device=CPU)
    for name in ("k_pages", "v_pages", "skip"):
        a, b = getattr(first.pages, name), getattr(second.pages, name)
        assert a.shape == b.shape and a.data_ptr() + a.nbytes <= b.data_ptr()
    assert not torch.equal(first.pages.k_pages, second.pages.k_pages)
    assert check_state(second, second.step()) <= 1


def test_percentiles():
    assert _timing.Times.of(range(101)) == _timing.Times(20.0, 50.0, 80.0)


class FakeDevice:
    """A clock that only replays move, by 120 microseconds each, and the events and graphs that go with it."""

    def __init__(self) -> None:
        self.now, self.replays = 0.0, 0

    def replay(self) -> None:
        self.now += 120.0
        self.replays += 1

    def event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(at=0.0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: (end.at - event.at) / 1e3
        return event


def test_a_call_takes_its_share_of_a_replay(monkeypatch):
    device = FakeDevice()
    monkeypatch.setattr(_timing, "capture", lambda calls: device)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    times = _timing.device_times([lambda: None] * 3, seconds=0.01)
    assert (times.p20, times.p50, times.p80) == pytest.approx((40.0, 40.0, 40.0))
    assert device.replays == 3 + 167 + 4 * 21  # three alone, 20 ms of warm-up, 10 ms of samples of half a millisecond


def test_kernel_times_are_of_one_call(monkeypatch):
    """Two calls, five rounds; one kernel runs twice a call, and the host's records are not counted."""
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(name: str, us: float, device=cuda) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(elapsed_us=lambda: us))

    events = [event("attend", 7.0)] * 9 + [event("attend", 90.0)] + [event("merge", 2.0)] * 20 + [event("launch", 5.0, cpu)]
    profiler = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: contextlib.nullcontext(profiler))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert _timing.kernel_times([lambda: None] * 2, rounds=5) == {"attend": 7.0, "merge": 4.0}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernel itself, in the interpreter")
def test_the_read_only_pass_reads_everything():
    x = torch.randint(-(2**20), 2**20, (4096,), dtype=torch.int32)  # NumPy does not wrap its sums, a card does
    with kernels():
        assert torch.equal(_timing.read_sum(x, 1024), x.view(4, -1).sum(1, dtype=torch.int32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a card")
def test_without_a_card_nothing_is_measured():
    with pytest.raises(_timing.NoCard, match="nothing was measured"):
        _timing.Card.current()


# The bodies of the benchmarks, on the CPU: a stand-in for a card with little memory, and twins instead of kernels.


class SmallCard(_timing.Card):
    properties = SimpleNamespace(name="none", major=8, L2_cache_size=1 << 16)
    free = 128 << 20
    read_bandwidth = 1e9


CARD = SmallCard(CPU)


def damaged(operation):
    """The operation with a result that is 2 % too large, or pages with a bit of each byte turned over."""

    def run(*args, **kwargs):
        got = operation(*args, **kwargs)
        if got is None:
            args[3].bitwise_xor_(4)
            return None
        if kwargs.get("out") is not None:
            kwargs["out"].mul_(1.02)
        return tuple(x * 1.02 for x in got) if isinstance(got, tuple) else got * 1.02

    return run


@pytest.mark.skipif(DEVICE.type == "cuda", reason="perf.kernels itself runs there")
@pytest.mark.parametrize("name", kernel_bench.KERNELS)
def test_benchmarks_check_what_they_time(name, monkeypatch):
    """Each body's check passes on the right result and fails on a slightly wrong one."""
    torch.manual_seed(0)
    kernel = kernel_bench.KERNELS[name](CARD)
    kernel.check()
    assert kernel.nbytes > 0 and kernel.calls
    operation = name.split()[0]
    monkeypatch.setattr(kernel_bench.sk, operation, damaged(getattr(kernel_bench.sk, operation)))
    with pytest.raises(AssertionError):
        kernel_bench.KERNELS[name](CARD).check()


def test_benchmarks_run_every_public_kernel():
    """Of the package; perf.compress times those inside it (eigenvectors)."""
    public = {name for _, name in operations()} & set(kernel_bench.sk.__all__)
    assert len(public) >= 10 and public <= {name.split()[0] for name in kernel_bench.KERNELS}


# perf.compress


def test_a_prefill_is_timed_through_the_cache(monkeypatch):
    """With the model's shapes scaled down: the cache takes what it is handed, deferred or not, and compresses it."""
    for name, value in {"HEADS": 4, "KV_HEADS": 2, "DIM": 64, "HIDDEN": 256, "FFN": 64}.items():
        monkeypatch.setattr(compress_job, name, value)
    caches = []

    # Without a cache, deferred, deferred, without; the other way round; at once, in two such rounds.
    times = iter((2.0, 3.0, 4.0, 2.0, 7.0, 4.0, 4.0, 9.0, 4.0, 9.0, 9.0, 4.0, 9.0, 4.0, 4.0, 9.0))

    def timed(call):
        call()
        return next(times, 1.0)

    def new_cache(*args):
        caches.append(real(*args))
        return caches[-1]

    real = compress_job.new_cache
    monkeypatch.setattr(compress_job, "once_ms", timed)
    monkeypatch.setattr(compress_job, "new_cache", new_cache)
    card = CARD if DEVICE.type == "cpu" else _timing.Card(DEVICE)
    assert compress_job.prefill_times(640, 2, card, rounds=2) == (1.5, 1.875, 2.25)
    assert [layer.cold for layer in caches[0].layers] == [[576], [576]]
    assert all(layer.losses is None for layer in caches[0].layers)
    assert compress_job.narrow_ms(640, card) == 1.0
    for name in ("synchronize", "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1 << 20)
    dense = 2 * 2 * 640 * 64 * 2
    for adapter in (False, True):
        ratio, narrowed = compress_job.peak_ratio(640, 4, card, adapter)
        assert ratio == 0 and narrowed >= 0
        assert dense < dense + caches[-1].nbytes < 5 * dense


def test_kernels_of_a_layer_are_counted(monkeypatch):
    """Of four layers: the time of a kernel of few programs counts by the multiprocessors that it is on."""

    def export(path: str) -> None:
        def event(name: str, us: float, grid: list[int] | None = None, cat: str = "kernel") -> dict:
            return {"name": name, "dur": us, "cat": cat, "args": {"grid": grid} if grid else {}}

        rotations = [event("rotations", 1000.0, [16, 1, 1])] * 4
        trace = [*rotations, *[event("gram", 30.0, [2, 16, 8])] * 8, event("copy", 4.0, cat="gpu_memcpy")]
        Path(path).write_text(json.dumps({"traceEvents": [*trace, event("launch", 9.0, cat="cuda_runtime")]}))

    class Multiprocessors(SmallCard):
        properties = SimpleNamespace(major=8, multi_processor_count=64)

    for name, value in {"HEADS": 4, "KV_HEADS": 2, "DIM": 64}.items():
        monkeypatch.setattr(compress_job, name, value)
    profiler = SimpleNamespace(export_chrome_trace=export)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: contextlib.nullcontext(profiler))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    kernels = compress_job.kernels_of_a_layer(640, Multiprocessors(CPU))
    assert kernels == {"rotations": (1.0, 1000.0, 250.0), "gram": (2.0, 60.0, 60.0), "copy": (0.25, 1.0, 1 / 64)}
    assert compress_job.total_of(kernels.values()) == (3.25, 1061.0, 310 + 1 / 64)
    lines = compress_job.kernel_table(kernels, lines=1)
    assert [line.split()[0] for line in lines[1:]] == ["rotations", "2", "all"]
    assert lines[2].split()[2:] == ["2.2", "61.0", "60.0"]
    assert compress_job.total_of([]) == (0, 0, 0)


# perf.attention


SHAPE = Shape(2, 4, 2, 64, 512)


@pytest.mark.parametrize("folded", [False, True])
def test_peers_are_checked(folded):
    torch.manual_seed(1)
    dense = job.Dense.random(SHAPE, copies=2, dtype=torch.bfloat16, device=CPU)
    peer = job.Peer("math", partial(job.sdpa, SDPBackend.MATH, folded))
    calls = peer.calls(dense)
    assert len(calls) == 2
    peer.check(dense, calls[0]())
    with pytest.raises(AssertionError, match="wrong result"):
        peer.check(dense, calls[1]())  # other inputs
    with pytest.raises(AssertionError, match="wrong result"):
        peer.check(dense, calls[0]() * 1.05)


def test_peers_that_read_pages_or_fp8_are_checked():
    """The same memory read as pages: attention over each row's pages in order."""
    torch.manual_seed(1)
    dense = job.Dense.random(SHAPE, copies=1, dtype=torch.bfloat16, device=CPU)
    pages = [x.view(2, -1, 2, job.PAGE, 64).transpose(1, 2).flatten(2, 3) for x in (dense.k[0], dense.v[0])]
    assert torch.equal(pages[0][1, 0, job.PAGE], dense.k[0].view(-1, 2, job.PAGE, 64)[512 // job.PAGE + 1, 0, 0])
    eight = [x.to(torch.float8_e4m3fn).bfloat16() for x in pages]
    for (k, v), fp8 in ((pages, False), (eight, True)):
        out = job.sdpa(SDPBackend.MATH, False, job.Dense(SHAPE, dense.q, [k], [v]))[0]()
        job.Peer("x", lambda _: [], paged=True, fp8=fp8).check(dense, out)
        with pytest.raises(AssertionError, match="wrong result"):
            job.Peer("x", lambda _: [], paged=True, fp8=not fp8).check(dense, out)


def test_a_peer_that_fails_is_reported(monkeypatch):
    monkeypatch.setattr(job, "device_times", lambda calls: [call() for call in calls] and _timing.Times(1.0, 2.0, 3.0))

    def broken(dense):
        raise RuntimeError("no such kernel\nmore")

    def wrong(dense):
        return [lambda: torch.zeros(2, 4, 64)] * 2

    peers = [
        job.Peer("broken", broken),
        job.Peer("wrong", wrong),
        job.Peer("math", partial(job.sdpa, SDPBackend.MATH, True)),
    ]
    found = job.time_peers(SHAPE, peers, CARD)
    assert found["broken"] == "RuntimeError: no such kernel" and "wrong result" in found["wrong"] and found["math"] == 2.0


def test_best_peers():
    peers = {"cudnn": 5.0, "flash": 4.0, "flashinfer fp8": 3.0, "flex": "ImportError: no"}
    assert job.best(peers, False) == ("flash", 4.0) and job.best(peers, True) == ("flashinfer fp8", 3.0)
    assert job.best({"flex": "ImportError: no"}, False) == (None, None)


def run_job(monkeypatch, *arguments: str) -> int:
    """perf.attention with a stand-in for the card; "device times" are made up, everything else runs."""
    monkeypatch.setattr(job.Card, "current", classmethod(lambda cls: CARD))
    monkeypatch.setattr(job, "device_times", lambda calls: [call() for call in calls] and _timing.Times(10.0, 20.0, 30.0))
    kernels = {"_attend_spectral_kernel": 16.0, "_finish_spectral_kernel": 3.0}
    monkeypatch.setattr(job, "kernel_times", lambda calls: kernels)
    monkeypatch.setattr(job, "compile_in_parallel", lambda variants: None)
    monkeypatch.setattr(job, "SMALL_SHAPES", ((2, 512),))
    monkeypatch.setattr(job, "PEERS", (job.Peer("math", partial(job.sdpa, SDPBackend.MATH, True)),))
    monkeypatch.setattr(job, "needed_bytes", lambda shape, layouts, card: shape.batch << 27)
    return job.main(arguments)


SMALL = ("--batch", "1", "4", "--tokens", "512", "--heads", "4/2", "--dims", "64", "--layouts", "balanced", "32x8")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="with twins on the CPU")
def test_rows_say_what_was_measured(monkeypatch, tmp_path, capsys):
    rows_file = tmp_path / "rows.jsonl"
    assert run_job(monkeypatch, *SMALL, "--json", str(rows_file)) == 0
    shown = capsys.readouterr()
    assert "B=4 H=4/2 D=64 T=512: skipped" in shown.err  # does not fit
    rows = tables.read_rows(rows_file)
    assert [(r["B"], r["H"], r["G"], r["D"], r["T"], r["layout"]) for r in rows] == [
        (1, 4, 2, 64, 512, "balanced"),
        (1, 4, 2, 64, 512, "32x8"),
    ]
    wanted = "gpu commit B H G D T layout p50_us best_peer best_peer_us speedup read_share".split()
    for row in rows:
        assert set(wanted) <= set(row)
        assert row["p20_us"] == 10 and row["p50_us"] == 20 and row["p80_us"] == 30
        assert row["best_peer"] == "math" and row["speedup"] == 1 and row["best_fp8"] is None
        assert 0 < row["budget_share"] <= 1
        assert (row["kernel_us"], row["project_us"], row["exact_us"], row["merge_us"]) == (16, None, None, 3)  # seen or not
    # 384 cold tokens of 2 KV heads at 64 bytes, 16 bytes of skip bits a chunk and head, 4 of tables a chunk and a block.
    read = 2 * (384 * 64 + 3 * 16) + 4 * 3 + 4 * 2
    assert rows[1]["kernel_gbs"] == pytest.approx(read / 16e3, rel=1e-3)
    assert rows[1]["read_share"] == pytest.approx(read / 16e3, rel=1e-3)  # of 1 GB/s
    assert "2 of 2 variants right" in shown.out.splitlines()[1] and shown.out.count("\n") == 5


@pytest.mark.skipif(DEVICE.type == "cuda", reason="with twins on the CPU")
def test_a_wrong_step_is_no_row(monkeypatch, tmp_path, capsys):
    step = _cases.Decode.step
    monkeypatch.setattr(_cases.Decode, "step", lambda self: tuple(x * 1.01 for x in step(self)))
    rows_file = tmp_path / "rows.jsonl"
    assert run_job(monkeypatch, *SMALL, "--json", str(rows_file)) == 1
    shown = capsys.readouterr()
    assert "0 of 2 variants right" in shown.out and "times the budget" in shown.err and tables.read_rows(rows_file) == []


@pytest.mark.skipif(DEVICE.type == "cuda", reason="with twins on the CPU")
def test_no_shape_begins_that_may_end_too_late(monkeypatch, tmp_path, capsys):
    """A shape is made to take 40 s: of two, one fits in 60 s."""
    now = [0.0]
    monkeypatch.setattr(job.time, "monotonic", lambda: now[0])
    time_peers = job.time_peers
    monkeypatch.setattr(job, "time_peers", lambda *args: now.__setitem__(0, now[0] + 40.0) or time_peers(*args))
    asked = ("--batch", "1", "--tokens", "512", "1024", "--heads", "4/2", "--dims", "64", "--layouts", "32x8")
    rows_file = tmp_path / "rows.jsonl"
    assert run_job(monkeypatch, *asked, "--seconds", "60", "--json", str(rows_file)) == 0
    assert "--seconds: 1 shapes not measured, from B=1 H=4/2 D=64 T=1024 on" in capsys.readouterr().err
    assert [row["T"] for row in tables.read_rows(rows_file)] == [512]


def test_the_kernels_of_a_step_are_the_library_s():
    for name in itertools.chain(*job.STEP_KERNELS.values()):
        assert hasattr(attention, name) or hasattr(attention_sm75, name), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a card")
@pytest.mark.parametrize("module", [job, kernel_bench, old_cards])
def test_jobs_without_a_card_say_so(module, capsys):
    assert (module.main() if module is kernel_bench else module.main([])) == 2
    shown = capsys.readouterr()
    assert "nothing was measured" in shown.err and shown.out == ""


def test_shapes():
    quick = list(job.shapes_of(job.parse(["--quick"])))
    assert quick == list(job.TARGETS)
    everything = list(job.shapes_of(job.parse([])))
    assert everything[:4] == quick and len(set(everything)) == len(everything) == 4 * 4 * 4 * 2 + 1
    shown = [(s.heads, s.kv_heads, s.dim) == (32, 8, 128) or s.tokens == 32768 for s in everything]
    assert all(shown[: sum(shown)])  # what README's table shows comes before the others
    asked = list(job.shapes_of(job.parse(["--batch", "1", "--heads", "32/8", "--dims", "128"])))
    assert {(s.batch, s.heads, s.kv_heads, s.dim) for s in asked} == {(1, 32, 8, 128)}


@pytest.mark.parametrize("wrong", [["--heads", "6/4"], ["--tokens", "100"], ["--plot", "x.png"], ["--layouts", "exact"]])
def test_arguments_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as error:
        job.parse(wrong)
    assert error.value.code == 2 and wrong[0].split("/")[0] in capsys.readouterr().err


# perf.old_cards and perf.predict


def run_old_cards(monkeypatch, *arguments: str) -> int:
    """perf.old_cards with a stand-in for the card, as `run_job`."""
    monkeypatch.setattr(old_cards.Card, "current", classmethod(lambda cls: CARD))
    times = iter([_timing.Times(10.0, 20.0, 30.0), _timing.Times(9.0, 16.0, 20.0)] * 2)
    monkeypatch.setattr(old_cards, "device_times", lambda calls: [call() for call in calls] and next(times))
    monkeypatch.setattr(old_cards, "kernel_times", lambda calls: {"_attend_operands_kernel": 12.5})
    monkeypatch.setattr(job, "device_times", lambda calls: [call() for call in calls] and _timing.Times(30.0, 40.0, 50.0))
    monkeypatch.setattr(old_cards, "PEERS", (job.Peer("math", partial(job.sdpa, SDPBackend.MATH, True)),))
    monkeypatch.setattr(old_cards, "SHAPES", ((1, 512), (2, 512)))
    return old_cards.main(["--heads", "4/2", "--dim", "64", *arguments])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="with twins on the CPU")
def test_rows_of_both_paths(monkeypatch, tmp_path, capsys):
    rows_file = tmp_path / "rows.jsonl"
    assert run_old_cards(monkeypatch, "--json", str(rows_file)) == 0
    rows = tables.read_rows(rows_file)
    assert [(row["B"], row["path"], row["p50_us"]) for row in rows] == [
        (1, "sm_75", 20),
        (1, "tl.dot", 16),
        (2, "sm_75", 20),
        (2, "tl.dot", 16),
    ]
    names = "gpu commit torch triton date B H G D T layout chunk align path p20_us p50_us p80_us kernels best_peer"
    names += " best_peer_us speedup read_share read_gbs budget_share peers"
    assert set(rows[0]) == set(names.split()) and all(name in old_cards.__doc__ for name in names.split())
    assert rows[0]["T"] == 512 and rows[0]["speedup"] == 2 and 0 < rows[0]["budget_share"] <= 1
    assert "2.00x of 40.0 math" in capsys.readouterr().out


@pytest.mark.skipif(DEVICE.type == "cuda", reason="with twins on the CPU")
@pytest.mark.parametrize("wrong", ["a result that is off", "a budget that accepts all"])
def test_old_cards_checks_first(monkeypatch, wrong):
    if wrong == "a result that is off":
        attend = old_cards.attend
        monkeypatch.setattr(old_cards, "attend", lambda *args: tuple(x * 1.02 for x in attend(*args)))
    else:
        monkeypatch.setattr(old_cards, "check_state", lambda *args: 0.5)
    with pytest.raises(AssertionError, match="budget"):
        run_old_cards(monkeypatch)


def predicted(monkeypatch, factor: float) -> list[predict.Comparison]:
    """Comparisons of made-up rows of both commands, all predicted to take `factor` times 20 us."""
    forced = {"gpu": "NVIDIA H200", "B": 4, "H": 32, "G": 8, "D": 128, "T": 32768, "layout": "balanced", "chunk": 64}
    forced |= {"align": 512, "path": "sm_75", "p50_us": 20.0, "kernels": {"_attend_operands_kernel": 20.0}}
    others = [forced | {"path": "tl.dot"}, forced | {"gpu": "a card"}, forced | {"chunk": 128}]
    step = {name: x for name, x in made_up_row(gpu="Tesla T4", kernel_us=20.0).items() if name != "path"}

    def stand_in(card, cases, old):
        return [predict.Prediction({"_attend_operands_kernel": 20 * factor}, 0.5, 20 * factor, 1.0) for _ in cases]

    monkeypatch.setattr(predict, "predict", stand_in)
    return predict.comparisons([forced, *others, step])


def test_predictions_are_set_beside_rows(monkeypatch):
    """Of known cards and the layout's own pages; a row of perf.attention has kernels alone."""
    compared = predicted(monkeypatch, 1.2)
    assert [(c.row["gpu"], c.row.get("path"), c.what) for c in compared] == [
        ("NVIDIA H200", "sm_75", "all"),
        ("NVIDIA H200", "sm_75", "_attend_operands_kernel"),
        ("NVIDIA H200", "tl.dot", "all"),
        ("NVIDIA H200", "tl.dot", "_attend_operands_kernel"),
        ("Tesla T4", None, "_attend_operands_kernel"),
    ]
    assert all(c.ratio == pytest.approx(1.2) for c in compared)


@pytest.mark.parametrize(("factor", "trusted"), [(0.69, False), (0.71, True), (1.29, True), (1.31, False)])
def test_issue_5_s_limit(monkeypatch, factor, trusted):
    [one] = predict.issue_5(predicted(monkeypatch, factor))
    assert one.row["path"] == "sm_75" and one.what == "all" and one.trusted == trusted


def test_predicted_kernels_are_the_library_s():
    assert set(predict.COLUMNS) >= set(predict.TRIPS) | set(predict.LINES)
    for name, column in predict.COLUMNS.items():
        assert name in job.STEP_KERNELS[column]
    assert predict.card_of("NVIDIA A100-SXM4-80GB") == "A100" and predict.card_of("NVIDIA L40S") is None


# perf.tables


def made_up_row(**changes) -> dict:
    times = _timing.Times(9.0, 10.0, 11.0)
    shape = Shape(16, 32, 8, 128, 65536)
    row = job.row_of(
        shape, "balanced", times, {"_attend_spectral_kernel": 8.0}, 0.5, {"cudnn": 42.0, "flex": "ImportError"}, 4.5e12
    )
    return {"gpu": "a card", "commit": "abc1234", **row, **changes}


def test_the_attention_table():
    rows = [made_up_row(p50_us=77.0), made_up_row(), made_up_row(layout="small", read_share=None, speedup=3.5)]
    text = tables.attention_table(rows)
    line = next(line for line in text.splitlines() if line.startswith("| a card"))
    assert [cell.strip() for cell in line.split("|")[1:-1]][:6] == ["a card", "32/8", "128", "16", "65,536", "42 cudnn"]
    assert "10, **4.20x**" in line and "10, **3.50x** |" in line and "77" not in text and "abc1234" in text


def test_readme_is_what_the_command_writes():
    readme = (tables.ROOT / "README.md").read_text()
    assert len(tables.MARKED.findall(readme)) == readme.count("<!-- table:") >= 1
    assert tables.fill(readme) == readme, "run python -m perf.tables"


def test_tables_are_filled(tmp_path):
    text = "a\n<!-- table: attention -->\nold\n<!-- end of table -->\nb\n"
    assert "No row yet" in tables.fill(text, tmp_path) and "old" not in tables.fill(text, tmp_path)
    (tmp_path / "attention.jsonl").write_text(json.dumps(made_up_row()) + "\n")
    filled = tables.fill(text, tmp_path)
    assert "**4.20x**" in filled and tables.fill(filled, tmp_path) == filled
    with pytest.raises(ValueError, match="table: expected"):
        tables.fill(text.replace("attention", "nobody"), tmp_path)


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [made_up_row(T=t, B=b, speedup=s) for t, b, s in ((8192, 1, 1.2), (32768, 1, 2.0), (8192, 16, 3.0))]
    tables.plot_attention(rows, tmp_path / "plots" / "speed.png")
    assert (tmp_path / "plots" / "speed.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="rows"):
        tables.plot_attention([], tmp_path / "none.png")
