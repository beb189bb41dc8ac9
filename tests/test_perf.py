"""What of the measurements can be tested without a card: inputs, references, budgets, percentiles,
tables, refusals."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend

from perf import _cases, _timing, tables
from perf import attention as job
from perf import compress as compress_job
from perf import kernels as kernel_bench
from perf._cases import Shape, check_state, expected, make_steps
from reference import attention as attention_oracle
from reference import rope as rope_oracle
from reference.compress import CodecArrays, PageArrays
from spectral_kernels.calibrate import PRESETS
from spectral_kernels.layout import PAGE_SIZE
from tests import budgets
from tests.cases import DEVICE, kernels, to_numpy

CPU = torch.device("cpu")
on_cpu = pytest.mark.skipif(
    DEVICE.type == "cuda", reason="with twins on the CPU; perf itself runs on the card"
)


def small_step(preset: str, dim: int = 64, batch: int = 2, tokens: int = 580) -> _cases.Step:
    torch.manual_seed(3)
    shape, layout = Shape(batch, 4, 2, dim, tokens), _cases.layouts(preset, dim)[0]
    return make_steps(shape, layout, preset=preset, copies=2, dtype=torch.float32, device=CPU)[1]


def arrays_of(step: _cases.Step) -> PageArrays:
    layout = step.codec.layout
    names = "k_basis k_scale k_encoder k_mean v_basis v_scale v_encoder k_offset".split()
    tensors = {name: getattr(step.codec, name).numpy() for name in names}
    inv_freq = step.inv_freq.numpy()
    codec = CodecArrays(
        layout.k.bands, layout.v.bands, layout.head_dim, layout.frame, inv_freq, **tensors
    )
    rows = np.zeros(len(step.q), np.int32)
    pages = (
        step.k_pages.numpy(),
        step.v_pages.numpy(),
        step.block_table.numpy(),
        step.seq_lens.numpy(),
    )
    return PageArrays(codec, *pages, rows)


@pytest.mark.parametrize("preset", _cases.LOSSY)
def test_reference_and_budget_are_those_of_the_oracle(preset):
    """The float64 reference on the device equals the oracle over pages, over exact tokens and over
    both; its budget of the former two is the oracle's, up to the sums that it counts: of floats
    too, and of exact tokens these alone."""
    step = small_step(preset)
    arrays, q = arrays_of(step), to_numpy(step.q)[:, :, None]
    kept = {"sinks": step.sinks, "window": step.window}
    pages = attention_oracle.spectral(q, arrays, **kept)
    slots = (to_numpy(step.k_exact), to_numpy(step.v_exact), step.seq_lens.numpy())
    exact = attention_oracle.windowed(q, *slots, np.arange(2), **kept)
    codec = arrays.codec
    tensors = (codec.k_basis, codec.k_scale, codec.k_mean, arrays.rows, codec.inv_freq)
    frames = -(-int(step.seq_lens.max()) // codec.frame)
    u = rope_oracle.project_queries(q, *tensors, frame=codec.frame, max_frames=frames)
    for parts, oracle, allowed in (
        (("pages",), pages, budgets.attend_spectral(q, pages, arrays, u)),
        (("exact",), exact, budgets.attend_window(q, exact)),
    ):
        for b, g in ((0, 0), (1, 1)):
            heads = slice(2 * g, 2 * g + 2)
            got = expected(step, b, g, parts)
            np.testing.assert_allclose(got.o.numpy(), oracle.o[b, heads, 0], rtol=0, atol=1e-10)
            np.testing.assert_allclose(got.lse.numpy(), oracle.lse[b, heads, 0], rtol=1e-11)
            for mine, theirs in zip((got.o_budget, got.lse_budget), allowed, strict=True):
                ratio = mine.numpy() / theirs[b, heads, 0]
                assert (0.4 if parts == ("exact",) else 0.9) < ratio.min() and ratio.max() < 1.3
    both = expected(step, 1, 0)
    lse = np.logaddexp(pages.lse, exact.lse)[1, :2, 0]
    share = np.exp(pages.lse[1, :2, 0] - lse)[:, None]
    o = share * pages.o[1, :2, 0] + (1 - share) * exact.o[1, :2, 0]
    np.testing.assert_allclose(both.lse.numpy(), lse, rtol=1e-11)
    np.testing.assert_allclose(both.o.numpy(), o, rtol=0, atol=1e-10)


def test_a_step_passes_and_wrong_ones_do_not():
    """The twins' step lies within the budget; a step without the exact tokens, with the wrong base
    of logarithms, with sinks counted twice or keys of another frame does not."""
    step = small_step("balanced", dim=128)
    state = step.step()
    assert 0 < check_state(step, state) <= 1
    assert 0 < check_state(step, step.attend(("pages",)), ("pages",)) <= 1
    o, lse = state
    assert 0 < check_state(step, (o.half(), None)) <= 1
    wrong = [step.attend(("pages",)), (o, lse * 1.4427), (o.roll(1, 1), lse)]
    step.sinks = 0
    wrong.append(step.attend(("pages",)))
    step.sinks, step.seq_lens[1] = 4, 512
    wrong.append(step.attend())
    step.seq_lens[1] = 580
    for other in wrong:
        with pytest.raises(AssertionError, match="times the budget"):
            check_state(step, other)
    with pytest.raises(AssertionError, match="not finite"):
        check_state(step, (o, lse * torch.inf))


def test_scores_have_the_stated_spread():
    step = small_step("quality", dim=128)
    scores = attention_oracle.spectral(to_numpy(step.q)[:, :, None], arrays_of(step)).scores
    # The mean key of half their spread is alike for all tokens of a frame.
    spread = np.sqrt((scores - scores[..., :512].mean(-1, keepdims=True))[..., :512].var())
    assert 0.7 * _cases.SCORE_STD < spread < 1.4 * _cases.SCORE_STD


@pytest.mark.parametrize("preset", _cases.LOSSY)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_layouts_are_of_the_preset(preset, dim):
    """A plan's mix: several kernels, all within the preset's bytes and near them."""
    chosen = _cases.layouts(preset, dim)
    assert len({str(x) for x in chosen}) == len(chosen) and (dim == 64 or len(chosen) == 3)
    for layout in chosen:
        assert 0.75 < layout.token_bytes * PRESETS[preset].ratio / (4 * dim) <= 1
    freqs = torch.arange(dim // 2)
    codec = _cases.random_model_codec(preset, layers=5, kv_heads=2, dim=dim, freqs=freqs)
    assert [layer.layout for layer in codec.layers] == [chosen[i % len(chosen)] for i in range(5)]
    assert len({layer.k_basis.data_ptr() for layer in codec.layers}) == 5


def test_what_is_encoded_comes_back():
    """The random codec is one: values within the spread of its bases come back as far as the steps
    go."""
    from spectral_kernels import compress

    torch.manual_seed(0)
    step = small_step("quality", dim=128, batch=1)
    x = compress.decode_torch(step.v_pages, step.codec, step.block_table, step.seq_lens, side="v")[
        :, :, :580
    ]
    again = torch.zeros_like(step.v_pages)
    arguments = (step.codec, again, step.block_table, step.seq_lens)
    compress.encode_torch(x, *arguments, side="v")
    back = compress.decode_torch(again, step.codec, step.block_table, step.seq_lens, side="v")[
        :, :, :580
    ]
    assert (back - x).norm() < 0.1 * x.norm()


def test_bytes_are_those_of_the_tensors():
    """What a step must read, against the tensors that hold it."""
    shape, layout = Shape(3, 4, 2, 64, 640), _cases.layouts("balanced", 64)[0]
    step = make_steps(shape, layout, preset="balanced", copies=1, dtype=torch.float16, device=CPU)[
        0
    ]
    assert shape.page_bytes(layout) == sum(
        x.nbytes for x in (step.k_pages, step.v_pages, step.block_table)
    )
    slots = step.k_exact.shape[2]
    codec = step.codec.nbytes - step.codec.freqs.nbytes
    exact = sum(x.nbytes for x in (step.k_exact, step.v_exact, step.q, step.k, step.v))
    skipped = 3 * 2 * slots * layout.token_bytes
    assert shape.step_bytes(layout, slots) == shape.page_bytes(layout) - skipped + codec + exact


def test_copies_of_a_case_share_nothing_that_is_read():
    options = {"preset": "small", "dtype": torch.float16, "device": CPU}
    case = Shape(1, 2, 1, 64, 192), _cases.layouts("small", 64)[0]
    steps = make_steps(*case, copies=2, **options)
    for name in ("k_pages", "v_pages", "k_exact", "block_table"):
        a, b = (getattr(step, name) for step in steps)
        assert a.shape == b.shape and a.data_ptr() != b.data_ptr()
    assert not torch.equal(steps[0].k_pages, steps[1].k_pages)
    [wide] = make_steps(*case, copies=1, capacity=6400, **options)
    assert wide.block_table.shape == (1, 6400 // PAGE_SIZE)


# perf._timing


def test_percentiles():
    assert _timing.Times.of(range(101)) == _timing.Times(20.0, 50.0, 80.0)


class FakeDevice:
    """A clock that only replays move, by 120 microseconds each, and the events and graphs that go
    with it."""

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
    assert (
        device.replays == 3 + 167 + 4 * 21
    )  # three alone, 20 ms of warm-up, 10 ms of samples of half a millisecond


def test_kernel_times_are_of_one_call(monkeypatch):
    """Two calls, five rounds; one kernel runs twice a call, and the host's records are not
    counted."""
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(name: str, us: float, device=cuda) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, device_type=device, time_range=SimpleNamespace(elapsed_us=lambda: us)
        )

    events = [event("attend", 7.0)] * 9 + [event("attend", 90.0)] + [event("merge", 2.0)] * 20
    events.append(event("launch", 5.0, cpu))
    profiler = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(
        torch.profiler, "profile", lambda activities: contextlib.nullcontext(profiler)
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert _timing.kernel_times([lambda: None] * 2, rounds=5) == {"attend": 7.0, "merge": 4.0}


def test_rows_go_to_their_file_and_to_out(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    _timing.write_row(_timing.rounded({"ms": 1.234567, "B": 123456}), tmp_path / "a.jsonl")
    _timing.write_row({"ms": 2}, None)
    assert _timing.read_rows(tmp_path / "a.jsonl") == [{"ms": 1.235, "B": 123456}]
    assert _timing.read_rows(tmp_path / "out" / "rows.jsonl") == [
        {"ms": 1.235, "B": 123456},
        {"ms": 2},
    ]


@on_cpu
def test_the_read_only_pass_reads_everything():
    x = torch.randint(
        -(2**20), 2**20, (4096,), dtype=torch.int32
    )  # NumPy does not wrap its sums, a card does
    with kernels():
        assert torch.equal(_timing.read_sum(x, 1024), x.view(4, -1).sum(1, dtype=torch.int32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a card")
def test_jobs_without_a_card_say_so(capsys):
    with pytest.raises(_timing.NoCard, match="nothing was measured"):
        _timing.Card.current()
    for module in (job, kernel_bench, compress_job):
        with pytest.raises(SystemExit, match="2"):
            module.main([])
        shown = capsys.readouterr()
        assert "nothing was measured" in shown.err and shown.out == ""


# The bodies of the benchmarks, on the CPU: a stand-in for a card with little memory, and twins
# instead of kernels.


class SmallCard(_timing.Card):
    properties = SimpleNamespace(name="none", major=8, L2_cache_size=1 << 16)
    free = 64 << 20
    read_bandwidth = 1e9
    dtype = torch.float16


CARD = SmallCard(CPU)


def damaged(operation):
    """The operation with a result that is 2 % too large, or pages with a bit of some bytes turned
    over."""

    def run(*args, **kwargs):
        got = operation(*args, **kwargs)
        if got is None:
            for x in args:
                if isinstance(x, torch.Tensor) and x.dtype == torch.uint8:
                    x.bitwise_xor_(6)
            return None
        if kwargs.get("out") is not None:
            for x in kwargs["out"] if isinstance(kwargs["out"], tuple) else (kwargs["out"],):
                x.mul_(1.02)
            return kwargs["out"]
        return tuple(x * 1.02 for x in got) if isinstance(got, tuple) else got * 1.02

    return run


@on_cpu
@pytest.mark.parametrize("name", kernel_bench.KERNELS)
def test_benchmarks_check_what_they_time(name, monkeypatch):
    """The check of every body passes on the right result and fails on a slightly wrong one."""
    from spectral_kernels import attention, compress, merge, rope, window

    torch.manual_seed(0)
    monkeypatch.setattr(kernel_bench, "tokens_of", lambda *args: 2048)
    monkeypatch.setattr(kernel_bench, "context_of", lambda *args: 1024)
    kernel = kernel_bench.KERNELS[name](CARD)
    kernel.check()
    assert kernel.nbytes > 0 and kernel.calls
    operation = name.split()[0]
    modules = (rope, compress, attention, window, merge)
    [module] = [
        m for m in modules if getattr(vars(m).get(operation), "__module__", None) == m.__name__
    ]
    monkeypatch.setattr(module, operation, damaged(getattr(module, operation)))
    with pytest.raises(AssertionError):
        kernel_bench.KERNELS[name](CARD).check()


def test_benchmarks_run_every_public_kernel():
    import spectral_kernels as sk

    launchers = {name for name in sk.__all__ if name.islower()}
    no_kernel = {
        "attend_workspace",
        "freqs_from_inv_freq",
        "lse_from_log2",
        "lse_to_log2",
        "pack_pages",
        "project_queries",
        "unpack_pages",
    }
    assert launchers - no_kernel == {name.split()[0] for name in kernel_bench.KERNELS}


# perf.attention

SHAPE = Shape(2, 4, 2, 64, 512)


@pytest.mark.parametrize("folded", [False, True])
def test_peers_are_checked(folded):
    torch.manual_seed(1)
    dense = job.Dense.random(SHAPE, copies=2, dtype=torch.bfloat16, device=CPU)
    peer = job.sdpa_peer("math", SDPBackend.MATH, folded)
    calls = peer.calls(dense)
    assert len(calls) == 2
    right = calls[0]()
    peer.check(dense, right)
    assert torch.equal(dense.kv[0][:, :, :, -1], dense.new[0])  # the newest token was written
    for wrong in (calls[1](), right * 1.05):  # other inputs
        with pytest.raises(AssertionError, match="wrong result"):
            peer.check(dense, wrong)


def test_peers_that_read_pages_or_fp8_are_checked():
    """The same memory read as pages: attention over each row's pages in order."""
    torch.manual_seed(1)
    dense = job.Dense.random(SHAPE, copies=1, dtype=torch.bfloat16, device=CPU)
    pages = [x.view(2, -1, 2, job.PAGE, 64).transpose(1, 2).flatten(2, 3) for x in dense.kv[0]]
    eight = [x.to(torch.float8_e4m3fn).bfloat16() for x in pages]
    for (k, v), fp8 in ((pages, False), (eight, True)):
        out = job.sdpa(SDPBackend.MATH, False, dense.q[0], k, v)
        job.Peer("x", lambda _: [], paged=True, fp8=fp8).check(dense, out)
        with pytest.raises(AssertionError, match="wrong result"):
            job.Peer("x", lambda _: [], paged=True, fp8=not fp8).check(dense, out)


def test_a_peer_that_fails_is_reported(monkeypatch):
    made_up = _timing.Times(1.0, 2.0, 3.0)
    monkeypatch.setattr(job, "device_times", lambda calls: [call() for call in calls] and made_up)

    def broken(dense):
        raise RuntimeError("no such kernel\nmore")

    def wrong(dense):
        return [lambda: torch.zeros(2, 4, 64)] * 2

    peers = [
        job.Peer("broken", broken),
        job.Peer("wrong", wrong),
        job.sdpa_peer("math", SDPBackend.MATH, True),
    ]
    found = job.time_peers(SHAPE, peers, CARD)
    assert (
        found["broken"] == "RuntimeError: no such kernel"
        and "wrong result" in found["wrong"]
        and found["math"] == 2.0
    )


def test_best_peers():
    peers = {
        "cudnn": 5.0,
        "flash": 4.0,
        "flashinfer fp8": 3.0,
        "flashinfer paged": "ImportError: no",
    }
    assert job.best(peers, False) == ("flash", 4.0) and job.best(peers, True) == (
        "flashinfer fp8",
        3.0,
    )
    assert job.best({"flash": "ImportError: no"}, False) == (None, None)


SMALL = (
    "--batch",
    "1",
    "4",
    "--tokens",
    "512",
    "--heads",
    "4/2",
    "--dims",
    "64",
    "--presets",
    "balanced",
    "small",
)


def run_job(monkeypatch, *arguments: str) -> int:
    """perf.attention with a stand-in for the card; "device times" are made up, everything else
    runs."""
    monkeypatch.setattr(_timing.Card, "current", classmethod(lambda cls: CARD))
    made_up = _timing.Times(10.0, 20.0, 30.0)
    monkeypatch.setattr(job, "device_times", lambda calls: [call() for call in calls] and made_up)
    monkeypatch.setattr(job, "kernel_times", lambda calls: {"_attend_spectral_kernel": 16.0})
    monkeypatch.setattr(job, "PEERS", (job.sdpa_peer("math", SDPBackend.MATH, True),))
    monkeypatch.setattr(job, "needed_bytes", lambda shape, card: shape.batch << 26)
    return job.main([*SMALL, "--peers", "math", *arguments])


@on_cpu
def test_rows_say_what_was_measured(monkeypatch, tmp_path, capsys):
    rows_file = tmp_path / "rows.jsonl"
    assert run_job(monkeypatch, "--json", str(rows_file), "--older-cards", "--profile") == 0
    shown = capsys.readouterr()
    assert "B=4 H=4/2 D=64 T=512: skipped" in shown.err  # does not fit
    rows = tables.read_rows(rows_file)
    wanted = list(itertools.product(["balanced", "small"], ["matrix", "scalar"]))
    assert [(r["preset"], r["path"]) for r in rows] == wanted
    for row in rows:
        assert [row[x] for x in "BHGDT"] == [1, 4, 2, 64, 512] and set(row) <= set(
            job.__doc__.split()
        ) | {"layout"}
        assert (row["p20_us"], row["p50_us"], row["p80_us"]) == (10, 20, 30)
        assert row["best_peer"] == "math" and row["speedup"] == 1 and row["best_fp8"] is None
        assert 0 < row["budget_share"] <= 1 and row["kernels"] == {"_attend_spectral_kernel": 16.0}
        layout = _cases.layouts(row["preset"], 64)
        nbytes = Shape(1, 4, 2, 64, 512).step_bytes(layout[len(layout) // 2], 20)
        assert row["read_share"] == pytest.approx(nbytes / 20e3, rel=1e-3)  # of 1 GB/s
    assert "1.00x of 20 math" in shown.out


@on_cpu
@pytest.mark.parametrize("wrong", ["a result that is off", "a budget that accepts all"])
def test_a_wrong_step_is_no_row(monkeypatch, tmp_path, capsys, wrong):
    if wrong == "a result that is off":
        step = _cases.Step.step
        monkeypatch.setattr(_cases.Step, "step", lambda self: tuple(x * 1.01 for x in step(self)))
    else:
        monkeypatch.setattr(job, "check_state", lambda *args: 0.5)
    rows_file = tmp_path / "rows.jsonl"
    assert run_job(monkeypatch, "--json", str(rows_file)) == 1
    assert "budget" in capsys.readouterr().err and tables.read_rows(rows_file) == []


def test_shapes():
    quick = list(job.shapes_of(job.parse(["--quick"])))
    assert quick == list(job.TARGETS)
    everything = list(job.shapes_of(job.parse([])))
    assert everything[:4] == quick and len(set(everything)) == len(everything) == 4 * 4 * 4 * 2 + 1
    asked = list(job.shapes_of(job.parse(["--batch", "1", "--heads", "32/8", "--dims", "128"])))
    assert {(s.batch, s.heads, s.kv_heads, s.dim) for s in asked} == {(1, 32, 8, 128)}


@pytest.mark.parametrize("wrong", [["--heads", "6/4"], ["--tokens", "100"], ["--presets", "exact"]])
def test_arguments_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as error:
        job.parse(wrong)
    assert error.value.code == 2 and wrong[0] in capsys.readouterr().err


# perf.end_to_end


class Replays:
    """Stands in for a CUDA graph."""

    def __init__(self, calls) -> None:
        self.calls = calls

    def replay(self) -> None:
        for call in self.calls:
            call()


@pytest.fixture
def whole(monkeypatch):
    """perf.end_to_end with a stand-in for the card; times are the CPU's, everything else runs."""
    pytest.importorskip("transformers")
    from perf import end_to_end

    monkeypatch.setattr(SmallCard, "dtype", torch.float32)
    monkeypatch.setattr(_timing.Card, "current", classmethod(lambda cls: CARD))
    monkeypatch.setattr(end_to_end, "SDPA", {"math": (SDPBackend.MATH, True)})
    monkeypatch.setattr(end_to_end, "time_peers", lambda *args: {"math": 1.0})
    monkeypatch.setattr(end_to_end, "capture", Replays)
    monkeypatch.setattr(
        end_to_end, "replayed", lambda graph, steps: [graph.replay() or 1.0 for _ in range(steps)]
    )
    for name in ("reset_peak_memory_stats", "max_memory_allocated", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1 << 20)
    return end_to_end


TINY = ("--shape", "tiny", "--tokens", "256", "--batch", "2", "--steps", "8")


@on_cpu
def test_whole_models_are_timed(whole, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    what = ("--what", "eager", "graph", "ours", "prefill", "--presets", "exact", "balanced")
    assert whole.main([*TINY, *what, "--json", str(path)]) == 0
    rows = tables.read_rows(path)
    asked = [("eager", None), ("graph", None), ("ours", "exact"), ("ours", "balanced")]
    assert [(r["what"], r["preset"]) for r in rows[:4]] == asked
    assert [(r["what"], r["preset"]) for r in rows[4:]] == [
        ("prefill", p) for p in (None, "exact", "balanced")
    ]
    dense = 2 * 2 * 2 * 2 * 256 * 64 * 2  # layers, sides, rows, heads, tokens, D, 16 bits
    assert (
        rows[0]["cache_bytes"] == rows[1]["cache_bytes"] == dense and rows[1]["backend"] == "math"
    )
    for row in rows:
        assert set(row) <= set(whole.__doc__.replace(",", "").split()) and (row["B"], row["T"]) == (
            2,
            256,
        )
        assert (
            row["ms"] > 0 and row["steps"] == 8
            if row["what"] != "prefill"
            else row["prefill_s"] > 0
        )
    assert rows[3]["tokens_per_s"] == pytest.approx(2e3 / rows[3]["ms"], rel=1e-3)
    assert "| ours balanced |" in capsys.readouterr().out


@on_cpu
def test_a_wrong_model_is_no_row(whole, monkeypatch, tmp_path, capsys):
    """Attention that is off, in ours and in the dense graph."""
    from spectral_kernels.cache import SpectralCache

    attend, sdpa = SpectralCache.attend, whole.sdpa
    # In place, as the layer writes to `out`.
    monkeypatch.setattr(
        SpectralCache, "attend", lambda *args, **kwargs: attend(*args, **kwargs).mul_(1.02)
    )
    monkeypatch.setattr(whole, "sdpa", lambda *args: sdpa(*args).roll(1, 1))
    path = tmp_path / "rows.jsonl"
    assert whole.main([*TINY, "--what", "graph", "ours", "--json", str(path)]) == 1
    shown = capsys.readouterr()
    assert (
        "times the budget" in shown.err
        and "logits: a relative error" in shown.err
        and tables.read_rows(path) == []
    )


def test_end_to_end_refuses(capsys):
    pytest.importorskip("transformers")
    from perf import end_to_end

    for wrong in (["--tokens", "100"], ["--steps", "2"], ["--what", "vllm"]):
        with pytest.raises(SystemExit):
            end_to_end.parse(wrong)
        assert wrong[0] in capsys.readouterr().err
    assert end_to_end.parse(["--long"]).tokens == [8192]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a card")
def test_end_to_end_without_a_card_says_so(capsys):
    pytest.importorskip("transformers")
    from perf import end_to_end

    with pytest.raises(SystemExit, match="2"):
        end_to_end.main([])
    assert "nothing was measured" in capsys.readouterr().err


# perf.tables


def attention_row(**changes) -> dict:
    row = {
        "gpu": "a card",
        "commit": "abc1234",
        "B": 16,
        "H": 32,
        "G": 8,
        "D": 128,
        "T": 65536,
        "path": "matrix",
    }
    row |= {
        "preset": "balanced",
        "p50_us": 10.0,
        "best_peer": "cudnn",
        "best_peer_us": 42.0,
        "speedup": 4.2,
    }
    return {**row, "read_share": 0.8, **changes}


def end_row(tokens: int, what: str, ms: float, preset: str | None = None, **changes) -> dict:
    row = {
        "gpu": "a card",
        "commit": "abc1234",
        "shape": "8b",
        "B": 1,
        "T": tokens,
        "what": what,
        "preset": preset,
    }
    return {**row, "ms": ms, "weight_bytes": 15e9, "cache_bytes": 1e9, "read_gbs": 4000, **changes}


def quality_row(scheme: str, ratio: float, kl: float, **changes) -> dict:
    row = {"model": "m", "text": "a", "context": 4000, "scheme": scheme, "ratio": ratio}
    row |= {"ratio_long": ratio, "kl": kl, "kl_median": kl / 2, "top1": 0.9, "perplexity": 0.01}
    return {**row, "needles": 10, "recalled": 9, "commit": "abc1234", **changes}


def serve_row(backend: str, kv_dtype: str, ms: float, **changes) -> dict:
    row = {"gpu": "a card", "gpus": 1, "vllm": "1.2.3", "B": 1, "T": 8192, "backend": backend}
    row |= {"kv_dtype": kv_dtype, "ttft_ms": 300.0, "tpot_ms": ms, "kv_tokens": 1000}
    return {**row, "throughput": 1e3 / ms, "commit": "abc1234", **changes}


def write_rows(folder, **files) -> None:
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def cells_of(text: str, start: str) -> list[str]:
    [line] = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_attention_table():
    rows = [attention_row(p50_us=77.0), attention_row(), attention_row(preset="small", speedup=3.5)]
    rows.append(attention_row(preset="small", T=8192, best_fp8="fi fp8", best_fp8_us=30.0))
    text = tables.attention_table(rows)
    assert "### a card, 32/8 heads, D = 128, matrix path" in text and "77" not in text
    small, both = "10, **3.50x**, 80%", "10, **4.20x**, 80%"
    assert cells_of(text, "16 | 65,536") == ["16", "65,536", "42 cudnn", "-", both, small]
    assert cells_of(text, "16 | 8,192") == ["16", "8,192", "42 cudnn", "30 fi fp8", "-", both]


def test_tables_have_at_most_ten_rows():
    text = tables.attention_table(attention_row(T=1024 * n) for n in range(1, 24))
    sizes = [part.strip().count("\n") - 1 for part in text.split("\n\n")[1:]]
    assert sizes == [10, 10, 3] and "23,552" in text


def test_the_end_to_end_table():
    """4 + 0.5 a 1K against 5 + 0.25 a 1K: even at 4K. What is compiled is compared with what is."""
    rows = [end_row(1024 * n, "graph", 4 + 0.5 * n) for n in (8, 32)]
    rows += [end_row(1024 * n, "bare", 5 + 0.25 * n, "balanced") for n in (8, 32)]
    rows += [end_row(8192, "graph compiled", 4.0), end_row(8192, "bare compiled", 5.0, "balanced")]
    prompt = {"prefill_s": 0.5, "prefill_ratio": 1.004, "peak_bytes": 2e9}
    rows.append({**end_row(8192, "prefill", 0, "balanced"), **prompt})
    del rows[-1]["ms"]
    text = tables.end_to_end_table([*rows, end_row(8192, "ours", 9.0, "small", shared="two")])
    plain, compiled = text.split("### a card, 8b, B = 1, compiled")
    want = ["8.00", "20.00", "4.00 + 0.5000 a 1K", "-", "4.00 (20%)"]
    assert cells_of(plain, "graph")[1:] == want
    want = ["7.00 (1.14x)", "13.00 (1.54x)", "5.00 + 0.2500 a 1K", "4,096", "4.00 (31%)"]
    assert cells_of(plain, "bare balanced")[1:] == want
    want = ["9.00* (0.89x)", "-", "-", "-", "4.00 (44%)"]
    assert cells_of(plain, "ours small")[1:] == want
    assert cells_of(compiled, "bare compiled balanced")[1] == "5.00 (0.80x)"
    assert "layers share memory" in text
    assert cells_of(text, "a card | 1 | 8,192")[3:6] == ["balanced", "0.500", "1.004"]


@pytest.mark.parametrize(
    ("dense", "ours", "words"),
    [
        ((4, 1), (5, 2), "none"),
        ((4, 1), (3, 0.5), "any"),
        ((4, 1), (5, 0.5), "2"),
        (None, (1, 1), "-"),
    ],
)
def test_break_even(dense, ours, words):
    assert tables.break_even(dense, ours) == words


def test_the_quality_table():
    """Means over texts, the newest row of each; tasks apart; nothing of an earlier perf.quality."""
    rows = [quality_row("small", 12.0, 0.5), quality_row("small", 12.0, 0.1)]
    rows += [quality_row("small", 10.0, 0.3, text="b", recalled=5), quality_row("fp8", 2.0, 0.01)]
    tasks = [{**quality_row(name, 8.0, 0), "task": "records"} for name in ("dense", "balanced")]
    for row, score in zip(tasks, (0.9, 0.8), strict=True):
        row |= {"score": score, "flips": [3, 1]}
        del row["kl"], row["kl_median"]
    stream = {"model": "m", "text": "a", "context": 4000, "task": "generate", "scheme": "exact"}
    stream |= {"generated": 2000, "teacher_forced_kl": 0.1, "free_running_kl": 0.2}
    text = tables.quality_table([*rows, *tasks, stream])
    assert cells_of(text, "fp8")[:4] == ["fp8", "2.00", "2.00", "0.01000"]
    assert cells_of(text, "small")[1:4] == ["11.00", "11.00", "0.17321"]
    assert cells_of(text, "small")[-2:] == ["+1.00%", "7.0"] and "kl over 2 text(s)" in text
    assert cells_of(text, "balanced") == ["balanced", "0.80 [3, 1]"]
    assert cells_of(text, "exact") == ["exact", "2000", "0.10000", "0.20000"]


def test_the_headline(tmp_path):
    """vLLM's cell where it has both sides, else what is compiled, else transformers'; the rows of
    the most tokens."""
    whole = [end_row(8192, "graph", 8.0), end_row(8192, "bare", 4.0, "balanced")]
    whole += [end_row(16384, "graph", 9.0), end_row(16384, "bare", 3.0, "balanced")]
    whole += [end_row(16384, "graph compiled", 6.0)]
    whole.append(end_row(16384, "bare compiled", 4.0, "balanced", cache_bytes=2.5e8))
    served = [serve_row("FLASH_ATTN", "bfloat16", 6.0), serve_row("TRITON_ATTN", "bfloat16", 9.0)]
    served += [serve_row("FLASH_ATTN", "fp8", 5.0), serve_row("FLASH_ATTN", "fp8", 1.0, gpus=2)]
    write_rows(tmp_path, end_to_end=whole)
    text = tables.headline(tmp_path)
    assert cells_of(text, "a card | transformers |")[3:] == [
        "8,192",
        "8.00",
        "4.00",
        "2.00x",
        "1.00x",
    ]
    compiled = cells_of(text, "a card | transformers, compiled")
    assert compiled[2:] == ["1", "16,384", "6.00", "4.00", "1.50x", "4.00x"]
    served.append(serve_row("SPECTRAL", "balanced", 3.0, kv_tokens=8000))
    write_rows(tmp_path, serve=served)
    got = cells_of(tables.headline(tmp_path), "a card | vLLM 1.2.3")
    assert got[2:] == ["1", "8,192", "6.00", "5.00", "3.00", "2.00x", "8.00x"]
    for n in range(3, 12):
        whole += [end_row(8192 * n, "graph", 8.0), end_row(8192 * n, "bare", 4.0, "balanced")]
    write_rows(tmp_path, end_to_end=whole)
    lines = tables.headline(tmp_path).splitlines()[2:]
    assert len(lines) == tables.HEADLINE and "90,112" in lines[-1]


def test_pages_are_filled(tmp_path):
    text = "a\n<!-- headline -->\nold\n<!-- end of headline -->\nb\n"
    filled = tables.fill(text, tmp_path)
    assert "No row yet" in filled and "old" not in filled and filled.endswith("headline -->\nb\n")
    assert tables.fill(filled, tmp_path) == filled
    page = tables.results_page(tmp_path)
    assert page.count("No row yet") == len(tables.SECTIONS) and "perf.serve --json" in page
    compress = {"gpu": "a card", "T": 32768, "encode_us": 12.34, "commit": "abc1234"}
    write_rows(tmp_path, serve=[serve_row("X", "fp8", 2.5)], compress=[compress])
    write_rows(tmp_path, attention=[attention_row()], quality=[quality_row("fp8", 2.0, 0.1)])
    write_rows(tmp_path, end_to_end=[end_row(8192, "graph", 8.0)])
    page = tables.results_page(tmp_path)
    assert "No row yet" not in page and page.count("measured at abc1234") == len(tables.SECTIONS)
    for want in (
        "| 12.34 |",
        "| 2.50 | 1,000 |",
        "**4.20x**",
        "| fp8 | 2.00 |",
        "| graph | 8.00 |",
    ):
        assert want in page, want


def test_pages_and_plots_are_of_the_newest_rows():
    """What `python -m perf.tables --write` writes, and nothing else, is in the checkout."""
    readme, hint = (tables.ROOT / "README.md").read_text(), "run python -m perf.tables --write"
    assert len(tables.MARKED.findall(readme)) == 1
    assert tables.fill(readme) == readme, hint
    page = tables.results_page()
    assert (tables.ROOT / "perf" / "RESULTS.md").read_text() == page, hint
    for text, most in ((page, 10), (readme.split("end of headline")[0], tables.HEADLINE)):
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            assert table.count("\n") <= most + 2, table
    plots = tables.ROOT / "perf" / "plots"
    want = {name: make(tables.RESULTS) for name, (make, _, _) in tables.PLOTS.items()}
    assert {path.stem: tables.plotted(path) for path in plots.iterdir()} == {
        name: plot for name, plot in want.items() if plot
    }, hint


def test_the_plots(tmp_path):
    """Two lengths or more make a panel, fp8 first; what a file shows can be read from it."""
    pytest.importorskip("matplotlib")
    results, plots = tmp_path / "perf" / "results", tmp_path / "perf" / "plots"
    results.mkdir(parents=True)
    (tmp_path / "README.md").write_text("nothing to fill\n")
    layers = [attention_row(T=t, B=b, p50_us=20.0) for t, b in ((8192, 1), (32768, 1), (8192, 16))]
    layers[1] |= {"best_fp8": "x", "best_fp8_us": 30.0}
    ends = [end_row(t, "graph", 5.0) for t in (8192, 16384)]
    ends += [end_row(t, "bare", 2.5, "small") for t in (8192, 16384)]
    texts = [quality_row("small", 12.0, 0.2), quality_row("small", 12.0, 0.4, text="b")]
    texts += [quality_row("kivi", 4.0, 0.1), quality_row("exact", 1.0, 0.0)]
    write_rows(results, attention=layers, end_to_end=ends, quality=texts)
    tables.write(tmp_path)
    speed, reads, pareto = (
        tables.plotted(plots / f"{n}.svg") for n in ("speed", "reads", "pareto")
    )
    layer, whole = "a card, one layer, B = 1", "a card, transformers, B = 1"
    assert list(speed) == [layer, whole] and next(iter(speed[layer])) == "dense bf16"
    assert speed[layer]["balanced"] == [[8192, 2.1], [32768, 2.1]]
    assert speed[layer]["dense fp8"] == [[32768, 1.4]]
    assert speed[whole]["small"] == [[8192, 2.0], [16384, 2.0]]
    assert reads[layer] == {"balanced": [[8192, 0.8], [32768, 0.8]]}
    assert reads[whole]["dense bf16"][0] == [8192, 0.8]
    assert pareto == {"m, 4,000 tokens": {"kivi": [[4.0, 0.1]], "small": [[12.0, 0.2828]]}}
    assert "kivi" in (plots / "pareto.svg").read_text().split("</metadata>")[1]
    (results / "quality.jsonl").unlink()
    tables.write(tmp_path)
    assert not (plots / "pareto.svg").exists()
