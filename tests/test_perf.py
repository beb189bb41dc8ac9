"""What of the measurements can be tested without a card: inputs, references, percentiles,
tables, refusals."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from torch.nn.attention import SDPBackend

from perf import _cases, _timing, tables
from perf import attention as job
from perf import compress as compress_job
from perf import kernels as kernel_bench
from perf._cases import Shape, check_state, make_steps
from spectral_kernels import compress
from spectral_kernels.calibrate import PRESETS
from spectral_kernels.layout import PAGE_SIZE
from tests.cases import DEVICE, kernels

CPU, PERF = torch.device("cpu"), tables.ROOT / "perf"
on_cpu = pytest.mark.skipif(
    DEVICE.type == "cuda", reason="with twins on the CPU; perf itself runs on the card"
)


class FloatCard(_timing.Card):
    dtype = torch.float32


def small_step(preset: str, dim: int = 64, batch: int = 2, queries: int = 1) -> _cases.Step:
    torch.manual_seed(3)
    return make_steps(Shape(batch, 4, 2, dim, 580, queries), preset, FloatCard(CPU), 2)[1]


@pytest.mark.parametrize("queries", [1, 3])
def test_a_step_passes_and_wrong_ones_do_not(queries):
    """Without the exact tokens, with the wrong base of logarithms, of other heads, with sinks that
    are not exact or keys of another frame."""
    step = small_step("balanced", dim=128, queries=queries)
    state = step.step()
    assert check_state(step, state) < 1e-4
    assert check_state(step, step.attend(("pages",)), ("pages",)) < 1e-4
    assert check_state(step, step.attend(("exact",)), ("exact",)) < 1e-4
    o, lse = state
    assert 0 < check_state(step, (o.half(), None)) < 1e-3
    wrong = [step.attend(("pages",)), (o, lse * 1.4427), (o.roll(1, 1), lse), (o * 1.01, lse)]
    step.sinks = 0
    wrong.append(step.attend(("pages",)))
    step.sinks, step.seq_lens[1] = 4, 512
    wrong.append(step.attend())
    step.seq_lens[1] = 580
    for other in wrong:
        with pytest.raises(AssertionError, match="an error of"):
            check_state(step, other)
    with pytest.raises(AssertionError, match="not finite"):
        check_state(step, (o, lse * torch.inf))


def test_scores_have_the_stated_spread():
    step = small_step("quality", dim=128)
    keys = compress.decode_torch(
        step.k_pages, step.codec, step.block_table, step.seq_lens, side="k"
    )
    scores = torch.einsum("bgd,bgtd->bgt", step.q[:, ::2], keys[:, :, :512]) * 128**-0.5
    # The mean key of half their spread is alike for all tokens of a frame.
    assert 0.7 * _cases.SCORE_STD < scores.std(-1).square().mean().sqrt() < 1.4 * _cases.SCORE_STD


@pytest.mark.parametrize("preset", _cases.LOSSY)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_layouts_are_of_the_preset(preset, dim):
    """A plan's mix: several kernels, all within the preset's bytes and near them."""
    chosen = _cases.layouts(preset, dim)
    assert len({str(x) for x in chosen}) == len(chosen) and (dim == 64 or len(chosen) == 3)
    for layout in chosen:
        assert 0.75 < layout.token_bytes * PRESETS[preset].ratio / (4 * dim) <= 1
    freqs = torch.arange(dim // 2)
    codec = _cases.random_model_codec(preset, layers=5, kv_heads=2, freqs=freqs)
    assert [layer.layout for layer in codec.layers] == [chosen[i % len(chosen)] for i in range(5)]
    assert len({layer.k_basis.data_ptr() for layer in codec.layers}) == 5


def test_what_is_encoded_comes_back():
    """The random codec is one: values within the spread of its bases come back as far as the steps
    go."""
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


def test_bytes_are_those_of_a_step():
    """By hand: two rows of 640 and 128 tokens in a table with room for more."""
    shape = Shape(2, 4, 2, 64, 640, capacity=1024, lengths=(640, 128))
    [step] = make_steps(shape, "balanced", CARD, 1)
    layout, exact = step.codec.layout, PRESETS["balanced"].sinks + PRESETS["balanced"].window
    pages = 2 * (768 - 2 * exact) * layout.token_bytes + 4 * (10 + 2)
    bases = 2 * ((layout.k.rank + layout.v.rank) * (64 + 4 * 64 + 4) + 4 * layout.k.rank + 4 * 64)
    slots, new = 2 * 2 * 2 * exact * 64 * 2, 2 * (4 + 2 * 2) * 64 * 2
    assert step.nbytes == pages + bases + slots + new


def test_copies_of_a_case_share_nothing_that_is_read():
    shape = Shape(1, 2, 1, 64, 192)
    steps = make_steps(shape, "small", CARD, 2)
    for name in ("k_pages", "v_pages", "k_exact", "block_table"):
        a, b = (getattr(step, name) for step in steps)
        assert a.shape == b.shape and a.data_ptr() != b.data_ptr()
    assert not torch.equal(steps[0].k_pages, steps[1].k_pages)
    [wide] = make_steps(dataclasses.replace(shape, capacity=6400), "small", CARD, 1)
    assert wide.block_table.shape == (1, 6400 // PAGE_SIZE)
    assert len(make_steps(shape, "small", CARD)) == CARD.copies(wide.nbytes) > 2


def test_perf_is_small():
    lines = {path: len(path.read_text().splitlines()) for path in PERF.rglob("*.py")}
    assert sum(lines[path] for path in PERF.glob("*.py")) <= 3500, lines
    assert sum(lines.values()) <= 3632, lines  # with the embedded model's language


# perf._timing


class FakeDevice:
    """A clock that only replays move, by 120 microseconds and `drift` more each, and the events and
    graphs that go with it."""

    def __init__(self, drift: float) -> None:
        self.now, self.replays, self.drift = 0.0, 0, drift

    def replay(self) -> None:
        self.now += 120.0 + self.drift * self.replays
        self.replays += 1

    def event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(at=0.0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: (end.at - event.at) / 1e3
        return event


@pytest.mark.parametrize("drift", [0, 1])
def test_a_call_takes_its_share_of_a_replay(monkeypatch, drift):
    device, captured = FakeDevice(drift), []
    monkeypatch.setattr(_timing, "capture", lambda calls: captured.extend(calls) or device)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    calls = [lambda: 0, lambda: 1, lambda: 2]
    times = _timing.device_times(calls, seconds=0.01)
    assert captured == calls * 3  # at least eight, all of them as often
    # Three alone, 20 ms of warm-up, 10 ms of samples of half a millisecond.
    assert device.replays == 3 + 167 + 4 * 21
    # Of samples 0 to 20, numbers 4, 10 and 16: of replays 170 + 4 j to 173 + 4 j.
    wanted = [(120 + drift * (171.5 + 4 * j)) / 9 for j in (4, 10, 16)]
    assert list(times) == pytest.approx(wanted)


def test_rows_go_to_their_file_and_to_out(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    row = _timing.write_row({"ms": 1.234567, "B": 123456}, tmp_path / "a.jsonl", tmp_path / "b")
    _timing.write_row({"ms": 2}, None)
    for name in ("a.jsonl", "b"):
        assert _timing.read_rows(tmp_path / name) == [row] == [{"ms": 1.235, "B": 123456}]
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
    for module in (job, compress_job):
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


@on_cpu
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("rotate", 2),
        ("turn_back", 2),
        ("decode v", 1),
        ("merge_states", 4),
        ("merge_many_states", 2),
    ],
)
def test_bytes_of_kernels_are_what_they_read_and_write(name, read, monkeypatch):
    """The first arguments and the results; of the codec nothing, which is small."""
    monkeypatch.setattr(kernel_bench, "tokens_of", lambda *args: 2048)
    kernel = kernel_bench.KERNELS[name](CARD)
    got, given = kernel.calls[0](), kernel.calls[0].args[:read]
    got = got if isinstance(got, tuple) else (got,)
    assert kernel.nbytes == sum(x.nbytes for x in (*given, *got))


@pytest.mark.parametrize("wrong", [None, "codes: ", "exact slots", "nothing was stored"])
def test_what_is_stored_is_checked_to_the_code(wrong):
    """One code in 200 off by one, a slot that is off, nothing stored."""
    step = small_step("balanced")
    twin = functools.partial(step.append, twin=True)

    def run():
        if wrong != "nothing was stored":
            twin()
        if wrong == "codes: ":
            step.k_pages.view(-1)[::200].bitwise_xor_(1)
        if wrong == "exact slots":
            step.v_exact[0, 0, 5] += 0.01

    with pytest.raises(AssertionError, match=wrong) if wrong else nullcontext():
        kernel_bench.check_stored(step, run, twin)


@on_cpu
def test_storing_is_timed(monkeypatch, tmp_path):
    """Both sides of what is encoded and decoded count."""
    monkeypatch.setattr(_timing.Card, "current", classmethod(lambda cls: CARD))
    made_up = _timing.Times(10.0, 20.0, 30.0)
    monkeypatch.setattr(
        kernel_bench, "device_times", lambda calls: [call() for call in calls] and made_up
    )
    path = tmp_path / "rows.jsonl"
    assert compress_job.main(["--tokens", "1024", "--json", str(path)]) == 0
    [row] = tables.read_rows(path)
    assert set(row) <= set(compress_job.__doc__.split()) and row["T"] == 1024
    assert [row[f"{name}_us"] for name in ("encode", "append", "decode")] == [40, 20, 40]
    kernels = [kernel_bench.encode(CARD, side, 1024) for side in "kv"]
    share = sum(kernel.nbytes for kernel in kernels) / 40e-6 / CARD.read_bandwidth
    assert row["encode_share"] == pytest.approx(share, rel=1e-3)


@on_cpu
def test_a_benchmark_says_the_time_of_the_device(monkeypatch):
    """In its name, as the table of pytest-benchmark has the host's alone."""
    from perf import test_benchmarks

    made_up = _timing.Times(10.0, 20.0, 30.0)
    monkeypatch.setattr(kernel_bench, "device_times", lambda calls: made_up)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    ran = []
    benchmark = SimpleNamespace(extra_info={}, pedantic=lambda call, **options: ran.append(call()))
    test_benchmarks.test_kernel(benchmark, CARD, "append")
    share = benchmark.extra_info["bytes"] / 20e-6 / CARD.read_bandwidth
    assert benchmark.name == f"append: 20 us, {share:.0%}" and ran == [None]


def test_benchmarks_run_every_public_kernel():
    import spectral_kernels as sk

    launchers = {name for name in sk.__all__ if name.islower()}
    no_kernel = {
        "attend_workspace",
        "freqs_from_inv_freq",
        "pack_pages",
        "project_queries",
        "unpack_pages",
    }
    assert launchers - no_kernel == {name.split()[0] for name in kernel_bench.KERNELS}


# perf.attention

SHAPE = Shape(2, 4, 2, 64, 512)
MATH = job.Peer("math", functools.partial(job.sdpa, SDPBackend.MATH, True))


def eight_bits(shape: Shape, kv: torch.Tensor):
    """Attention as an fp8 kernel has it: weights, in units of the largest, are 8-bit floats too."""
    k, v = kv.transpose(2, 3).double()

    def attend(q, scale=None):
        grouped = q.double().unflatten(1, (shape.kv_heads, -1))
        scores = grouped @ k.mT * shape.dim**-0.5
        weight = (scores - scores.amax(-1, keepdim=True)).exp()
        o = weight.float().to(job.FP8).double() @ v / weight.sum(-1, keepdim=True)
        return o.flatten(1, 2).bfloat16()

    return attend


@pytest.mark.parametrize("kind", ["heads first", "paged", "fp8", "fp8 queries"])
def test_peers_are_checked(kind):
    """On the right result, that of other inputs and of other keys, and a token that is not written.
    Pages are read as attention over each row's tokens in order."""
    torch.manual_seed(1)
    options = {"paged": kind != "heads first", "fp8": "fp8" in kind}

    def plain(shape, kv):
        kv = kv.transpose(2, 3) if options["paged"] else kv
        return job.sdpa(SDPBackend.MATH, False, shape, kv.bfloat16())

    def late(shape, kv):  # what the cache holds when it is called
        return lambda q, scale=None: plain(shape, kv)(q, scale)

    peer = job.Peer("x", late, **options)
    if kind == "fp8 queries":
        peer = job.Peer(
            "x", lambda s, kv: lambda q: eight_bits(s, kv)(q), fp8_queries=True, **options
        )
    size = (2, 2, 2, 512, 64)
    first, second = (
        job.PeerStep(
            peer, SHAPE, torch.randn(size).bfloat16(), torch.randn(2, 4, 64).bfloat16(),
            torch.randn(2, 2, 2, 64).bfloat16(),
        )
        for _ in range(2)
    )  # fmt: skip
    right = first()
    first.check(right)
    for wrong in (second(), right.roll(1, 1), right * 1.2):
        with pytest.raises(AssertionError, match="wrong result: a relative error"):
            first.check(wrong)
    first.new = first.new + 1
    with pytest.raises(AssertionError, match="newest token"):
        first.check(right)


def test_a_peer_that_fails_is_reported(monkeypatch):
    made_up = _timing.Times(1.0, 2.0, 3.0)
    monkeypatch.setattr(job, "device_times", lambda calls: [call() for call in calls] and made_up)

    def broken(shape, kv):
        raise RuntimeError("no such kernel\nmore")

    def wrong(shape, kv):
        return lambda q: torch.zeros(2, 4, 64)

    found = job.time_peers(
        SHAPE, [job.Peer("broken", broken), job.Peer("wrong", wrong), MATH], CARD
    )
    assert found["broken"] == "RuntimeError: no such kernel"
    assert "wrong result" in found["wrong"] and found["math"] == 2.0


def test_best_peers():
    peers = {"cudnn": 5.0, "flash": 4.0, "flashinfer fp8": 3.0, "fa3 fp8": "ImportError: no"}
    assert job.best(peers, False) == ("flash", 4.0)
    assert job.best(peers, True) == ("flashinfer fp8", 3.0)
    assert job.best({"flash": "ImportError: no"}, False) == (None, None)


def run_job(monkeypatch, *arguments: str) -> int:
    """perf.attention with a stand-in for the card; "device times" are made up, everything else
    runs."""
    monkeypatch.setattr(_timing.Card, "current", classmethod(lambda cls: CARD))
    made_up = _timing.Times(10.0, 20.0, 30.0)
    monkeypatch.setattr(job, "device_times", lambda calls: [call() for call in calls] and made_up)
    monkeypatch.setattr(job, "PEERS", (MATH,))
    return job.main(list(arguments))


@on_cpu
def test_rows_say_what_was_measured(monkeypatch, tmp_path, capsys):
    rows_file, small = tmp_path / "rows.jsonl", ":4/2:d64"
    shapes = [f"1x512{small}", f"1x512{small}:old", f"2x640{small}:q4:pool1024"]
    shapes += [f"1x1024+2x512{small}", f"4x512{small}"]
    options = ("--presets", "balanced", "small", "--json", str(rows_file))
    make = job.make_steps

    def out_of_memory(shape, *args, **kwargs):
        if shape.batch == 4:
            raise torch.OutOfMemoryError
        return make(shape, *args, **kwargs)

    monkeypatch.setattr(job, "make_steps", out_of_memory)
    peers, time_peers = [], job.time_peers

    def watched(shape, *args):
        peers.append((shape.batch, shape.tokens))
        return time_peers(shape, *args)

    monkeypatch.setattr(job, "time_peers", watched)
    assert run_job(monkeypatch, *shapes, *options) == 0
    shown = capsys.readouterr()
    assert "B=4 H=4/2 D=64 T=512 small: skipped" in shown.out  # does not fit
    assert (4, 512) not in peers  # nothing to compare them with
    rows = tables.read_rows(rows_file)
    cells = [(1, 512, None, "matrix"), (1, 512, None, "scalar")]
    cells += [(2, 640, "q4 pool1024", "matrix"), (3, 1024, "1x1024+2x512", "matrix")]
    wanted = [(*cell, preset) for cell in cells for preset in ("balanced", "small")]
    assert [tuple(r.get(x) for x in ("B", "T", "case", "path", "preset")) for r in rows] == wanted
    for row in rows:
        assert set(row) <= set(job.__doc__.split()) and [row[x] for x in "HGD"] == [4, 2, 64]
        assert (row["p20_us"], row["p50_us"], row["p80_us"]) == (10, 20, 30)
        assert row["best_peer"] == (None if "case" in row else "math") and row["best_fp8"] is None
        assert row["best_peer_us"] == (None if "case" in row else 20) and row["error"] < 1e-4
    [step] = make(Shape(1, 4, 2, 64, 512), "balanced", CARD, 1)
    assert rows[0]["read_share"] == pytest.approx(step.nbytes / 20e3, rel=1e-3)  # of 1 GB/s
    assert "best_peer math  best_peer_us 20.0" in shown.out


@on_cpu
def test_rows_of_a_card_without_matrix_units(monkeypatch, tmp_path):
    """They say the path that ran, and are plotted as others are."""
    monkeypatch.setattr(job._launch, "has_matrix_units", lambda device: False)
    monkeypatch.setattr(tables, "PLOTTED", (4, 2, 64, None))
    (tmp_path / "attention.jsonl").touch()
    options = ("--json", str(tmp_path / "attention.jsonl"))
    assert run_job(monkeypatch, "1x256:4/2:d64", "1x512:4/2:d64", *options) == 0
    assert [x["path"] for x in tables.read_rows(tmp_path / "attention.jsonl")] == ["scalar"] * 2
    (lines,) = tables.against_length(tables.speed, tmp_path).values()
    assert [tokens for tokens, _ in lines["balanced"]] == [256, 512]


@on_cpu
@pytest.mark.parametrize("wrong", ["off", "other bits the second time", "a check that accepts all"])
def test_a_wrong_step_is_no_row(monkeypatch, tmp_path, capsys, wrong):
    step, factors = _cases.Step.step, iter((1.01,) * 2 if wrong == "off" else (1.0, 1 + 2**-20))
    if wrong != "a check that accepts all":

        def other(self):
            factor = next(factors)
            return tuple(x * factor for x in step(self))

        monkeypatch.setattr(_cases.Step, "step", other)
    else:
        monkeypatch.setattr(job, "check_state", lambda *args: 0.5)
    rows_file = tmp_path / "rows.jsonl"
    assert run_job(monkeypatch, "1x512:4/2:d64", "--json", str(rows_file)) == 1
    assert "AssertionError" in capsys.readouterr().out and tables.read_rows(rows_file) == []


def test_shapes():
    shapes = [job.parse_shape(text) for text in job.SHAPES]
    assert len(set(shapes)) == len(shapes) and shapes[0] == Shape(1, 32, 8, 128, 2048)
    shape = job.parse_shape("8x1024:16/2:d256:q4:pool2048:old")
    assert shape == Shape(8, 16, 2, 256, 1024, 4, 2048, older_cards=True)
    assert shape.case == "q4 pool2048" and not shapes[0].case
    mixed = job.parse_shape("1x1024+2x512")
    assert mixed.case == "1x1024+2x512"
    assert mixed.rows == (1024, 512, 512) and mixed.batch == 3 and mixed.tokens == 1024
    assert mixed.dense_bytes == 4 * 8 * 128 * 2048


@pytest.mark.parametrize("wrong", ["1x512:6/4", "1x100", "512", "1x512:z3", "1x512:d"])
def test_shapes_are_refused(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        job.parse([wrong])
    assert wrong in capsys.readouterr().err


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
    paged = functools.partial(job.sdpa, SDPBackend.MATH, False)
    eight = job.Peer(
        "eight", lambda shape, kv: paged(shape, kv.transpose(2, 3).float()), paged=True, fp8=True
    )
    monkeypatch.setattr(job, "PEERS", (MATH, eight))
    monkeypatch.setattr(end_to_end, "IN_MODELS", (MATH, eight))
    monkeypatch.setattr(
        end_to_end, "time_peers", lambda shape, peers, card: {peer.name: 1.0 for peer in peers}
    )
    monkeypatch.setattr(end_to_end, "capture", Replays)
    monkeypatch.setattr(
        end_to_end,
        "replayed",
        lambda graph, steps: end_to_end.percentiles([graph.replay() or 1.0 for _ in range(steps)]),
    )
    for name in ("reset_peak_memory_stats", "max_memory_allocated", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1 << 20)
    return end_to_end


TINY = ("2x256", "--shape", "tiny", "--steps", "8")


@on_cpu
def test_whole_models_are_timed(whole, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    what = ("--what", "static", "graph", "fp8", "ours", "prefill")
    assert whole.main([*TINY, *what, "--presets", "balanced", "small", "--json", str(path)]) == 0
    rows = tables.read_rows(path)
    asked = [("static", None), ("graph", None), ("graph", "fp8"), ("ours", "balanced")]
    asked += [("ours", "small"), *(("prefill", p) for p in (None, "balanced", "small"))]
    assert [(r["what"], r["preset"]) for r in rows] == asked
    dense = 2 * 2 * 2 * 2 * 256 * 64 * 2  # layers, sides, rows, heads, tokens, D, 16 bits
    static = dense * (256 + 8 + 8 + 2) // 256  # with room for the steps
    assert [row["cache_bytes"] for row in rows[:3]] == [static, dense, dense // 2]
    assert [row.get("backend") for row in rows[:3]] == [None, "math", "eight"]
    for row in rows:
        assert set(row) <= set(whole.__doc__.replace(",", "").split())
        assert (row["B"], row["T"]) == (2, 256)
        timed = row["what"] != "prefill"
        assert row["ms"] > 0 and row["steps"] == 8 if timed else row["prefill_s"] > 0
    assert rows[4]["tokens_per_s"] == pytest.approx(2e3 / rows[4]["ms"], rel=1e-3)
    shown = capsys.readouterr().out
    assert "| ours balanced |" in shown and "| graph fp8 |" in shown
    assert "balanced: layers checked" in shown  # of a run that is stuck one sees where


@on_cpu
def test_a_long_generation_is_timed(whole, monkeypatch, tmp_path):
    monkeypatch.setattr(whole, "LONG_STEPS", 12)
    path = tmp_path / "rows.jsonl"
    assert whole.main([*TINY, "--what", "long", "--json", str(path)]) == 0
    [row] = tables.read_rows(path)
    assert row["steps"] == 11 and row["compiled"] == 0
    assert 0 < row["ms"] <= row["p99_ms"] <= row["p999_ms"] <= row["max_ms"]


@on_cpu
def test_prompts_are_compared_with_dense_ones_of_the_same_turn(whole, monkeypatch, tmp_path):
    """A card that slows down slows both: of rounds that take 2 and 3, 4 and 6, 8 and 12 seconds the
    ratio is 1.5; seconds are the medians."""
    calls = []

    def generate(cell, ids, new, cache=None):
        calls.append(cache)
        pace = 2 ** (len([x for x in calls if (x is None) == (cache is None)]) // 2 + 1)
        return SimpleNamespace(prefill_s=pace * (0.5 if cache is None else 0.75))

    monkeypatch.setattr(whole, "generate", generate)
    path = tmp_path / "rows.jsonl"
    assert whole.main([*TINY, "--what", "prefill", "--json", str(path)]) == 0
    found = [(row["prefill_s"], row["prefill_ratio"]) for row in tables.read_rows(path)]
    assert found == [(4.0, 1.0), (6.0, 1.5)] and len(calls) == 12


@on_cpu
def test_the_second_of_two_gpus_is_silent(whole, monkeypatch, tmp_path, capsys):
    """Its rows would be the first one's again."""
    monkeypatch.setattr(whole, "RANK", 1)
    monkeypatch.delenv("OUT", raising=False)
    path = tmp_path / "rows.jsonl"
    assert whole.main([*TINY, "--what", "static", "--json", str(path)]) == 0
    assert tables.read_rows(path) == [] and capsys.readouterr().out == ""


def test_kernels_are_compiled_ahead():
    """A process for each batch size and layout, of one layer at the shortest length."""
    pytest.importorskip("transformers")
    from perf import end_to_end

    given = ["1x32768", "8x256", "1x8192", "--compile", "--what", "graph", "static", "bare"]
    runs = [*end_to_end.ahead(end_to_end.parse([*given, "--json"]))]
    assert [args.layout for args in runs] == [0, 1, 2] * 2
    assert [args.cells for args in runs] == [[(1, 8192)]] * 3 + [[(8, 256)]] * 3
    for args in runs:
        assert args.compile == (args.layout == 0) and args.json is None
        assert args.what == (["graph", "bare"] if args.compile else ["bare"])


@on_cpu
def test_a_layer_compiled_ahead_leaves_no_rows(whole, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    args = whole.parse([*TINY, "--what", "ours"])
    args.layout = 1
    assert whole.alone(args) == "" and capsys.readouterr().out == ""
    monkeypatch.setattr(_cases, "check_state", lambda *args: 1 / 0)
    assert "ZeroDivisionError" in whole.alone(args) and not list(tmp_path.iterdir())


@on_cpu
def test_a_wrong_model_is_no_row(whole, monkeypatch, tmp_path, capsys):
    """Attention that is off, in ours and in the dense graph."""
    from spectral_kernels.cache import SpectralCache

    attend, bind = SpectralCache.attend, MATH.bind
    # In place, as the layer writes to `out`.
    monkeypatch.setattr(
        SpectralCache, "attend", lambda *args, **kwargs: attend(*args, **kwargs).mul_(1.02)
    )

    def rolled(shape, kv):
        attend = bind(shape, kv)
        return lambda *args: attend(*args).roll(1, 1)

    monkeypatch.setattr(whole, "IN_MODELS", (job.Peer("math", rolled),))
    path = tmp_path / "rows.jsonl"
    assert whole.main([*TINY, "--what", "graph", "ours", "--json", str(path)]) == 1
    shown = capsys.readouterr()
    assert (
        "an error of" in shown.out
        and "logits: a relative error" in shown.out
        and tables.read_rows(path) == []
    )


def test_steps_are_counted_and_their_percentiles():
    pytest.importorskip("transformers")
    from perf import end_to_end

    found = end_to_end.percentiles([*range(200)])
    assert found == {"ms": 99.5, "p99_ms": 198}

    def generate(ids, streamer, max_new_tokens, **options):
        for _ in range(max_new_tokens):  # the prompt and one token too few
            streamer.put(ids)
        streamer.end()

    cell = SimpleNamespace(model=SimpleNamespace(generate=generate))
    with pytest.raises(AssertionError, match="4 of 5 tokens came"):
        end_to_end.generate(cell, torch.ones(1, 3), 5)


def test_end_to_end_refuses(capsys):
    pytest.importorskip("transformers")
    from perf import end_to_end

    for wrong in (["1x100"], ["8192"], ["--steps", "2"], ["--what", "vllm"]):
        with pytest.raises(SystemExit):
            end_to_end.parse(wrong)
        assert wrong[0] in capsys.readouterr().err


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
    rows = [attention_row(p50_us=77.0), attention_row()]
    rows.append(attention_row(T=8192, case="q4", best_fp8="fi fp8", best_fp8_us=30.0))
    text = tables.attention_table(rows)
    assert "### a card, 32/8 heads, D = 128, matrix path" in text and "77" not in text
    same = ["balanced", "10", "80%", "cudnn", "42", "4.20"]
    assert cells_of(text, "16 | 65,536") == ["16", "65,536", "-", *same, "-", "-", "-"]
    assert cells_of(text, "16 | 8,192") == ["16", "8,192", "q4", *same, "fi fp8", "30", "3.00"]
    rows.append(attention_row(T=8192, p50_us=4.0))
    plain, four = (x for x in tables.attention_table(rows).splitlines() if "| 8,192 |" in x)
    assert "| 10 | 2.50 | 80% |" in four and "| 4 | - | 80% |" in plain
    rows[-1]["commit"] = "of another run"
    assert "2.50" not in tables.attention_table(rows)


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
    later = [end_row(1024 * n, "static", 9.0, commit="of another run") for n in (8, 32)]
    want = ["9.00", "9.00", "9.00 + 0.0000 a 1K", "-", "4.00 (44%)"]
    assert cells_of(tables.end_to_end_table([*rows, *later]), "static")[1:] == want
    assert "layers share them" in text
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
    """Means over texts, the newest row of each; tasks apart."""
    rows = [quality_row("small", 12.0, 0.5), quality_row("small", 12.0, 0.1)]
    rows += [quality_row("small", 10.0, 0.3, text="b", recalled=5), quality_row("fp8", 2.0, 0.01)]
    tasks = [{**quality_row(name, 8.0, 0), "task": "records"} for name in ("dense", "balanced")]
    for row, score in zip(tasks, (0.9, 0.8), strict=True):
        row |= {"score": score, "flips": [3, 1], "dense_score": 0.9, "change": [-0.13, -0.05]}
        del row["kl"], row["kl_median"]
    tasks += [row | {"task": "humaneval"} for row in tasks]
    stream = {"model": "m", "text": "a", "context": 4000, "task": "generate", "scheme": "exact"}
    stream |= {"generated": 2000, "teacher_forced_kl": 0.1, "free_running_kl": 0.2}
    less = quality_row("no mean key", 8.0, 0) | {"task": "ablation", "ablated_kl": 0.3}
    del less["kl"]
    asked = tasks[1] | {"task": "ablated_records", "scheme": "no sinks"}
    text = tables.quality_table([*rows, asked, *tasks, stream, less])
    assert cells_of(text, "fp8")[:4] == ["fp8", "2.00", "2.00", "0.01000"]
    assert cells_of(text, "small")[1:4] == ["11.00", "11.00", "0.17321"]
    assert cells_of(text, "small")[-2:] == ["+1.00%", "7.0"] and "kl over 2 text(s)" in text
    assert "| scheme | humaneval | records |" in text
    assert cells_of(text, "dense") == ["dense", "0.90", "0.90"]
    assert cells_of(text, "balanced") == ["balanced", "0.80 [3, 1]", "0.80 -10.0 ± 4.0"]
    assert "| scheme | ablated_records |" in text and text.index("no sinks") > text.index("dense")
    assert cells_of(text, "no sinks") == ["no sinks", "0.80 -10.0 ± 4.0"]
    assert cells_of(text, "exact") == ["exact", "2000", "0.10000", "0.20000"]
    assert cells_of(text, "no mean key")[:4] == ["no mean key", "8.00", "8.00", "0.30000"]


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
    # fp8 of another run is no peer, and an engine that has fp8 beside goes first.
    served[2]["commit"] = "of another run"
    write_rows(tmp_path, serve=served)
    got = cells_of(tables.headline(tmp_path), "a card | vLLM 1.2.3")
    assert got[2:] == ["1", "8,192", "6.00", "3.00", "2.00x", "8.00x"]
    fp8 = [*whole, end_row(8192, "graph", 7.0, "fp8")]
    write_rows(tmp_path, end_to_end=fp8)
    assert "vLLM" not in tables.headline(tmp_path) and "| 7.00 |" in tables.headline(tmp_path)
    for n in range(3, 12):
        whole += [end_row(8192 * n, "graph", 8.0), end_row(8192 * n, "bare", 4.0, "balanced")]
    write_rows(tmp_path, end_to_end=whole)
    lines = tables.headline(tmp_path).splitlines()[2:]
    assert len(lines) == tables.HEADLINE and "90,112" in lines[-1]


def test_the_losses(tmp_path):
    """Of the model and context with the most texts; schemes in their order, means over texts."""
    rows = [quality_row("small", 12.0, 0.4, top1=0.5), quality_row("fp8", 2.0, 0.1)]
    rows.append(quality_row("small", 12.0, 0.1, top1=0.8, text="b"))
    rows += [quality_row("small", 11.0, 9.0, context=9000), quality_row("other", 3.0, 0.5)]
    write_rows(tmp_path, quality=rows)
    text = tables.losses(tmp_path)
    assert cells_of(text, "m, 4,000") == ["m, 4,000 tokens, mean of 2 texts", "fp8", "small"]
    assert cells_of(text, "times smaller") == ["times smaller", "2.00x", "12.00x"]
    assert cells_of(text, "likeliest")[1:] == ["90.0%", "65.0%"]
    assert cells_of(text, "KL")[1:] == ["0.1000", "0.2000"]


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
        "| cudnn | 42 | 4.20 |",
        "| fp8 | 2.00 |",
        "| graph | 8.00 |",
    ):
        assert want in page, want


def plotted(path: Path) -> tables.Plot:
    """What an SVG of `tables.draw` shows."""
    found = ElementTree.parse(path).find(".//{http://purl.org/dc/elements/1.1/}description")
    return json.loads((found is not None and found.text) or "{}")


def test_pages_and_plots_are_of_the_newest_rows():
    """What `python -m perf.tables --write` writes, and nothing else, is in the checkout."""
    readme, hint = (tables.ROOT / "README.md").read_text(), "run python -m perf.tables --write"
    assert [name for _, name, _ in tables.MARKED.findall(readme)] == ["headline", "losses"]
    assert tables.fill(readme) == readme, hint
    page = tables.results_page()
    assert (tables.ROOT / "perf" / "RESULTS.md").read_text() == page, hint
    for text, most in ((page, 10), (readme.split("end of headline")[0], tables.HEADLINE)):
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            assert table.count("\n") <= most + 2, table
    plots = tables.ROOT / "perf" / "plots"
    want = {name: make(tables.RESULTS) for name, (make, _, _) in tables.PLOTS.items()}
    assert {path.stem: plotted(path) for path in plots.iterdir()} == {
        name: plot for name, plot in want.items() if plot
    }, hint


def test_columns_are_explained():
    """At the top of the module that measures them, as the page says."""
    pytest.importorskip("transformers")
    from perf import _tasks

    page = tables.results_page()
    for name, (_, title) in tables.SECTIONS.items():
        section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
        heads = " | ".join(re.findall(r"^\| (.*) \|\n\| ---", section, re.MULTILINE)).split(" | ")
        columns = {x for x in heads if x.isidentifier()}
        text = importlib.import_module(f"perf.{name}").__doc__
        words = {*re.findall(r"\w+", text), *_tasks.TASKS}
        assert columns and columns <= words, (name, columns - words)


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
    speed, reads, pareto = (plotted(plots / f"{n}.svg") for n in ("speed", "reads", "pareto"))
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
