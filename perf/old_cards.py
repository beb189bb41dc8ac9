"""The path of cards before sm_80 on the card at hand: `python -m perf.old_cards [--quick]`.

Checks it against the oracle first (one row and KV head of the first shape, the budgets of tests/budgets.py), then times
`attend_spectral(..., matrix_units=False)`, all its kernels, beside the path of this card and dense SDPA over 16-bit keys
and values of the same shape in the same run. CUDA graphs over copies of the inputs that exceed any L2; device time.
"""

import argparse
import dataclasses
import functools
import math

import numpy as np
import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

import spectral_kernels as sk
from perf._timing import Card, NoCard, device_times, kernel_times
from spectral_kernels import _launch

COLD = 256 * 2**20  # bytes that a cycle over copies of the inputs reads at least: several times any L2
HEADS, KV_HEADS, DIM = 32, 8, 128
LAYOUT = "balanced"


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
                out[name] = device_times([functools.partial(attend, i) for i in range(copies)]).p50
            except RuntimeError as error:
                print(f"{name} refuses B={batch} T={tokens}: {str(error).splitlines()[0]}")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    arguments = parser.parse_args()
    try:
        card = Card.current()
    except NoCard as error:
        print(error)
        return 2
    shapes = [(4, 32768), (1, 32768), (16, 32768), (1, 65536), (16, 65536)][: 1 if arguments.quick else None]
    device, dtype = card.device, card.dtype
    old = not _launch.has_matrix_units(device)
    inv_freq = 1e6 ** -(torch.arange(0, DIM, 2) / DIM)
    rope = sk.Rope.from_inv_freq(inv_freq, device=device)
    preset = sk.PRESETS[LAYOUT].layout(DIM)
    assert preset is not None
    ceiling = card.read_bandwidth
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
                calls = [
                    functools.partial(sk.attend_spectral, q, positions, pages, rope, matrix_units=matrix)
                    for pages in copies
                ]
                times = device_times(calls)
                p50 = times.p50
                share = size / (p50 * 1e-6) / ceiling
                ratios = "  ".join(f"{peer} {time:7.1f} us {time / p50:5.2f}x" for peer, time in peers.items())
                path = "tl.dot" if matrix else "sm_75"
                rows.append(
                    f"B={batch:<2} T={tokens} {name:11} {path:6} {times.p20:7.1f} {p50:7.1f} {times.p80:7.1f} us  "
                    f"{share:4.0%} of reads  best dense {best / p50:4.2f}x  {ratios}"
                )
                if (batch, tokens) == shapes[0]:
                    parts = sorted(kernel_times(calls).items(), key=lambda part: -part[1])
                    notes.append(f"{name} {path}: " + ", ".join(f"{kernel} {time:.1f}" for kernel, time in parts))
    print(f"{card.name}; {LAYOUT} {preset.k} / {preset.v}, {preset.token_bytes} B a token and KV head")
    print(f"reads: {ceiling / 1e12:.2f} TB/s; torch {torch.__version__}, triton {triton.__version__}")
    print("\n".join(notes + rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
