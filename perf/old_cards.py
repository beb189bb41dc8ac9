"""The path of cards before sm_80 on the card at hand: `python -m perf.old_cards [--quick]`.

Checks it against the oracle first (one row and KV head of the first shape, the budgets of tests/budgets.py), then times
`attend_spectral(..., matrix_units=False)`, all its kernels, beside the path of this card and dense SDPA over 16-bit keys
and values of the same shape in the same run. CUDA graphs over copies of the inputs that exceed any L2; device time.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

import spectral_kernels as sk

COLD = 256 * 2**20  # bytes that a cycle over copies of the inputs reads at least: several times any L2
HEADS, KV_HEADS, DIM = 32, 8, 128
LAYOUT = "balanced"


@triton.jit
def _read_kernel(x_ptr, out_ptr, PER_PROGRAM: tl.constexpr, BLOCK: tl.constexpr):
    base = tl.program_id(0).to(tl.int64) * PER_PROGRAM
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, PER_PROGRAM, BLOCK):
        total += tl.load(x_ptr + base + start + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


def read_bandwidth() -> float:
    """Bytes a second of a pass that reads 2 GiB once."""
    words, per_program = 2**29, 2**15
    x = torch.zeros(words, dtype=torch.int32, device="cuda")
    out = torch.empty(words // per_program, dtype=torch.int32, device="cuda")

    def read(_: int) -> None:
        _read_kernel[(words // per_program,)](x, out, PER_PROGRAM=per_program, BLOCK=4096, num_warps=8)

    return 4 * words / (measure(read, 1)[1] * 1e-6)


def measure(call: Callable[[int], object], copies: int) -> tuple[float, float, float]:
    """p20, p50, p80 of the microseconds of call(i) for i in range(copies), in CUDA graphs of at least 8 calls."""
    calls = max(copies, 8)
    for i in range(min(copies, 3)):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % copies)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    p20, p50, p80 = np.quantile(times[2:], (0.2, 0.5, 0.8))
    return float(p20), float(p50), float(p80)


def random_pages(layout: sk.PageLayout, batch: int, tokens: int, device: torch.device) -> sk.Pages:
    """Full pages of random bytes; scores have a standard deviation of about 2 for queries of unit variance."""
    chunks = tokens // layout.chunk
    pages = sk.allocate_pages(
        layout,
        pages=batch * chunks,
        segments=batch,
        kv_heads=KV_HEADS,
        batch=batch,
        max_chunks=chunks,
        device=device,
    )
    for x in (pages.k_pages, pages.v_pages):
        x.random_(0, 256)
    for x in (pages.k_basis, pages.v_basis):
        x.random_(-127, 128)
    length = 127 / math.sqrt(3) * math.sqrt(DIM)  # of a basis row
    for scale, bands in ((pages.k_scale, layout.k), (pages.v_scale, layout.v)):
        codes = torch.tensor([2.0**bits / math.sqrt(12) for bits in bands.bits])  # of uniform codes
        scale[:] = (2 * math.sqrt(DIM) / (length * math.sqrt(bands.rank)) / codes).to(device)
    pages.page_table[:] = torch.randperm(batch * chunks).int().reshape(batch, chunks)
    pages.segment_table[:] = torch.arange(batch, dtype=torch.int32)[:, None]
    pages.lengths[:] = tokens
    return pages


def check(q: torch.Tensor, positions: torch.Tensor, pages: sk.Pages, inv_freq: torch.Tensor, rope: sk.Rope) -> float:
    """The largest error of row 0 and KV head 0 in units of its budget."""
    from reference import attention as oracle
    from reference.pages import PageArrays
    from tests import budgets
    from tests.test_rope import project_oracle

    layout, group = pages.layout, HEADS // KV_HEADS
    own = pages.page_table[0].long()
    names = ("k_pages", "v_pages", "skip")
    data = {name: getattr(pages, name)[own][:, :1].cpu().numpy() for name in names}
    bases = {name: getattr(pages, name)[:1, :1].cpu().numpy() for name in ("k_basis", "k_scale", "v_basis", "v_scale")}
    chunks = len(own)
    table = np.arange(chunks, dtype=np.int32)[None]
    arrays = PageArrays(
        layout.k.bands,
        layout.v.bands,
        DIM,
        layout.chunk,
        layout.align,
        **data,
        **bases,
        page_table=table,
        segment_table=np.zeros((1, pages.max_blocks), np.int32),
        lengths=pages.lengths[:1].cpu().numpy(),
    )
    q_row, at = q[:1, :group, None].double().cpu().numpy(), positions[:1, None].cpu().numpy()
    frequencies = inv_freq.numpy()
    expected = oracle.spectral(q_row, at, arrays, frequencies)
    u = project_oracle(q_row, at, arrays, frequencies, 1.0)
    budget = budgets.attend_spectral(q_row, expected, arrays, u, frequencies)
    got = sk.attend_spectral(q, positions, pages, rope, matrix_units=False)
    mixed = budgets.outside(got[0][:1, :group, None].roll(1, 1), expected.o, budget[0])
    assert mixed > 2, f"the budget accepts heads that are exchanged ({mixed:.3g})"
    return max(
        budgets.outside(value[:1, :group, None], wanted, allowed)
        for value, wanted, allowed in zip(got, (expected.o, expected.lse), budget, strict=True)
    )


def dense(batch: int, tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """Median microseconds of SDPA by backend; absent where a backend refuses the shape."""
    q = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=dtype)
    copies = max(1, math.ceil(COLD / (batch * KV_HEADS * tokens * DIM * 4)))
    kv = [torch.randn(2, batch, KV_HEADS, tokens, DIM, device="cuda", dtype=dtype) for _ in range(copies)]
    out = {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):

        def attend(i: int) -> object:
            return torch.nn.functional.scaled_dot_product_attention(q, kv[i][0], kv[i][1], enable_gqa=True)

        with sdpa_kernel(backend):
            try:
                out[name] = measure(attend, copies)[1]
            except RuntimeError as error:
                print(f"{name} refuses B={batch} T={tokens}: {str(error).splitlines()[0]}")
    return out


def kernel_times(call: Callable[[int], object]) -> str:
    """Device microseconds of each kernel of a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            call(0)
        torch.cuda.synchronize()
    rows = [(e.key, e.self_device_time_total / e.count) for e in profile.key_averages() if e.self_device_time_total]
    return ", ".join(f"{name.strip('_')} {time:.1f}" for name, time in sorted(rows, key=lambda row: -row[1]))


def _attend(
    q: torch.Tensor, positions: torch.Tensor, copies: list[sk.Pages], rope: sk.Rope, matrix: bool, copy: int
) -> object:
    return sk.attend_spectral(q, positions, copies[copy], rope, matrix_units=matrix)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing is measured")
        return 2
    shapes = [(4, 32768), (1, 32768), (16, 32768), (1, 65536), (16, 65536)][: 1 if arguments.quick else None]
    device = torch.device("cuda")
    old = torch.cuda.get_device_capability() < (8, 0)
    dtype = torch.float16 if old else torch.bfloat16
    inv_freq = 1e6 ** -(torch.arange(0, DIM, 2) / DIM)
    rope = sk.Rope.from_inv_freq(inv_freq, device=device)
    preset = sk.PRESETS[LAYOUT].layout(DIM)
    assert preset is not None
    ceiling = read_bandwidth()
    rows, notes = [], []
    for batch, tokens in shapes:
        peers = dense(batch, tokens, dtype)
        best = min(peers.values())
        q = torch.randn(batch, HEADS, DIM, device="cuda", dtype=dtype)
        positions = torch.full((batch,), tokens + 100, dtype=torch.int64, device="cuda")
        for chunk, align in dict.fromkeys([(preset.chunk, preset.align), (128, 128), (128, 512)]):
            layout = dataclasses.replace(preset, chunk=chunk, align=align)
            name = f"C={chunk} A={align}"
            size = batch * tokens * KV_HEADS * layout.token_bytes
            copies = [random_pages(layout, batch, tokens, device) for _ in range(max(1, math.ceil(COLD / size)))]
            if (batch, tokens) == shapes[0]:
                worst = check(q, positions, copies[0], inv_freq, rope)
                notes.append(f"{name}: {worst:.3g} of the budget")
                assert worst <= 1, notes[-1]
            for matrix in (False,) if old else (False, True):
                attend = functools.partial(_attend, q, positions, copies, rope, matrix)
                p20, p50, p80 = measure(attend, len(copies))
                share = size / (p50 * 1e-6) / ceiling
                ratios = "  ".join(f"{peer} {time:7.1f} us {time / p50:5.2f}x" for peer, time in peers.items())
                path = "tl.dot" if matrix else "sm_75"
                rows.append(
                    f"B={batch:<2} T={tokens} {name:11} {path:6} {p20:7.1f} {p50:7.1f} {p80:7.1f} us  "
                    f"{share:4.0%} of reads  best dense {best / p50:4.2f}x  {ratios}"
                )
                if (batch, tokens) == shapes[0]:
                    notes.append(f"{name} {path}: {kernel_times(attend)}")
    print(f"{torch.cuda.get_device_name()}; {LAYOUT} {preset.k} / {preset.v}, {preset.token_bytes} B a token and KV head")
    print(f"reads: {ceiling / 1e12:.2f} TB/s; torch {torch.__version__}, triton {triton.__version__}")
    print("\n".join(notes + rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
