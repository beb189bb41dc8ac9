"""Cases for tests: random inputs, the same as the oracle wants them, and poison in everything an
operation must not read or must overwrite.

A case holds its inputs twice: as the tensors an operation gets and as the float64 (or byte) arrays
of the oracle, rounded alike. What no operation may use is filled with NaN, or with bytes of ones:
unused pages and rows of the codec, the tail of a row's last page, slots that hold no token, table
entries past a row's length, gaps between the rows of strided tensors, fresh outputs.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reference import layout as layout_oracle
from reference import window as window_oracle
from reference.compress import CodecArrays, PageArrays
from spectral_kernels import _launch
from spectral_kernels.codec import Codec
from spectral_kernels.layout import Bands, PageLayout
from spectral_kernels.rope import freqs_from_inv_freq

F64 = NDArray[np.float64]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PAGE = 64
GARBAGE_INDEX = 2**31 - 1
GARBAGE_BYTE = 0xFF

# "triton" runs the kernel (in Triton's interpreter where there is no GPU), "scalar" the kernel
# without matrix units.
IMPLEMENTATIONS = ("torch", "triton")
ATTENTION_IMPLEMENTATIONS = ("torch", "triton", "scalar")


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """Inside, launchers start their kernels for CPU tensors too."""
    before = _launch.KERNELS_ON_CPU
    _launch.KERNELS_ON_CPU = True
    try:
        yield
    finally:
        _launch.KERNELS_ON_CPU = before


def operation(
    module: ModuleType, name: str, implementation: str, *dtypes: torch.dtype
) -> Callable[..., Any]:
    """The named launcher or its twin. bf16 arithmetic is wrong in Triton's interpreter: there it
    means the twin."""
    if implementation == "torch" or (DEVICE.type == "cpu" and torch.bfloat16 in dtypes):
        return without_launch_settings(getattr(module, f"{name}_torch"))
    launcher = getattr(module, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        if implementation == "scalar":
            kwargs["matrix_units"] = False
        with kernels():
            return launcher(*args, **kwargs)

    return run


def without_launch_settings(twin: Callable[..., Any]) -> Callable[..., Any]:
    """A twin need not take what a launcher writes to or is set by: drop what it does not know."""
    known = inspect.signature(twin).parameters
    optional = {"out", "lse", "out_lse", "num_splits", "matrix_units", "workspace"}

    def run(*args: Any, **kwargs: Any) -> Any:
        return twin(*args, **{k: v for k, v in kwargs.items() if k in known or k not in optional})

    return run


def is_slow(implementation: str) -> bool:
    """Whether a program costs a millisecond, not a microsecond: a kernel in the interpreter."""
    return implementation != "torch" and DEVICE.type == "cpu"


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An output that nobody has written yet."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def to_numpy(x: torch.Tensor) -> F64:
    return x.detach().double().cpu().numpy()


def rounded(x: NDArray, dtype: torch.dtype) -> torch.Tensor:
    """On the host, in `dtype`."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(dtype)


def int32(x: NDArray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, np.int32)).to(DEVICE)


def strided(x: torch.Tensor, pattern: str) -> torch.Tensor:
    """x on the device with its values and shape, but laid out by `pattern`; the gaps hold NaN.

    plain: contiguous. swapped: dimensions 1 and 2 exchanged in memory (as after q.view(B, T, H,
    D).transpose(1, 2)). padded: rows 16 elements apart from each other, and odd: rows one element
    apart (no alignment).
    """
    x = x.to(DEVICE)
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=DEVICE)
    if pattern == "plain":
        return x.contiguous()
    if pattern == "swapped":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    gap = 16 if pattern == "padded" else 1
    wide = torch.full(
        (*x.shape[:-1], x.shape[-1] + gap), float("nan"), dtype=x.dtype, device=DEVICE
    )
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


STRIDES = ("plain", "swapped", "padded", "odd")


def inverse_frequencies(rotary_dim: int, theta: float = 1e4) -> NDArray[np.float32]:
    """float32 [rotary_dim / 2], as models have them."""
    return (theta ** -(np.arange(0, rotary_dim, 2) / max(rotary_dim, 1))).astype(np.float32)


def freqs_of(inv_freq: NDArray) -> torch.Tensor:
    return freqs_from_inv_freq(torch.from_numpy(np.asarray(inv_freq)), device=DEVICE)


@dataclass
class Queries:
    """q [B, H, Q, D] (float64, rounded to dtype), and the tensor of the same."""

    q: F64
    tensor: torch.Tensor

    @property
    def outputs(self) -> dict[str, torch.Tensor]:
        shape = tuple(self.tensor.shape)
        return {"out": poisoned(*shape), "lse": poisoned(*shape[:-1])}


def make_queries(
    rng: np.random.Generator,
    *,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
    stride: str = "plain",
    flat: bool = False,
) -> Queries:
    """Random queries of [B, H, Q, D]; `flat` gives [B, H, D] tensors (Q must be 1)."""
    q = rounded(rng.standard_normal(shape) * size, dtype)
    tensor = strided(q, stride)
    return Queries(to_numpy(q), tensor[:, :, 0] if flat else tensor)


def in_shape_of(oracle: F64, queries: Queries) -> F64:
    """The oracle's [B, H, Q, ...] without Q where the queries are [B, H, D]."""
    return oracle[:, :, 0] if queries.tensor.dim() == 3 else oracle


@dataclass(frozen=True)
class PageSpec:
    """What decides the shape of random pages; lengths are the tokens of each row."""

    k_bands: str
    v_bands: str
    head_dim: int
    kv_heads: int
    lengths: Sequence[int]
    frame: int = 512
    rotary_dim: int = -1
    """-1: head_dim."""
    theta: float = 1e4
    codecs: int = 0
    """Rows of the codec in use beside an unused one, named by codec_ids; 0: one row, without
    codec_ids."""
    spare_pages: int = 1
    """Entries of the table past the longest row."""

    @property
    def layout(self) -> PageLayout:
        bands = Bands.parse(self.k_bands), Bands.parse(self.v_bands)
        return PageLayout(*bands, self.head_dim, self.frame)


def make_codec(
    rng: np.random.Generator, spec: PageSpec, size: float = 1.0
) -> tuple[CodecArrays, NDArray[np.int32]]:
    """Random bases, steps, means and encoders, and the rows in use; others hold NaN.

    Steps fall as in a spectrum; components add up to about `size` a dimension, whatever the bits.
    Encoders have nothing to do with bases here: tests of attention do not read them, tests of codes
    want codes over the whole range.
    """
    layout, groups, dim = spec.layout, spec.kv_heads, spec.head_dim
    total = spec.codecs + 1
    used = np.arange(min(1, spec.codecs), total)  # row 0 meets who forgets codec_ids
    tensors: dict[str, NDArray] = {}
    for side, bands in (("k", layout.k), ("v", layout.v)):
        rank = bands.rank
        bits = np.array(bands.bits)
        basis = np.full((total, groups, rank, dim), -128, np.int8)
        scale = np.full((total, groups, rank), np.nan, np.float32)
        encoder = np.full((total, groups, dim, rank), np.nan, np.float32)
        basis[used] = rng.integers(-127, 128, (len(used), groups, rank, dim))
        fall = np.exp(-2 * np.arange(rank) / rank) * rng.uniform(
            0.5, 1.5, (len(used), groups, rank)
        )
        scale[used] = size * 2 * fall / (127 * 2.0 ** (bits - 1) * np.sqrt(rank))
        # Coefficients of unit tokens reach a standard deviation of a quarter of their range.
        columns = rng.standard_normal((len(used), groups, dim, rank)) / np.sqrt(dim)
        encoder[used] = columns * 2.0**bits / 4
        tensors |= {f"{side}_basis": basis, f"{side}_scale": scale, f"{side}_encoder": encoder}
    mean = np.full((total, groups, dim), np.nan, np.float32)
    mean[used] = 0.5 * size * rng.standard_normal((len(used), groups, dim))
    offset = np.einsum("mgd,mgdr->mgr", mean.astype(np.float64), tensors["k_encoder"])
    inv_freq = inverse_frequencies(dim if spec.rotary_dim < 0 else spec.rotary_dim, spec.theta)
    codec = CodecArrays(
        layout.k.bands,
        layout.v.bands,
        dim,
        spec.frame,
        inv_freq,
        k_mean=mean,
        k_offset=offset.astype(np.float32),
        **tensors,
    )
    return codec, used.astype(np.int32)


def random_codes(
    rng: np.random.Generator, shape: tuple[int, ...], bands: layout_oracle.Bands
) -> NDArray[np.int64]:
    """Codes n [*shape, R]; a tenth of them at an end of the range."""
    top = 2 ** np.array(layout_oracle.bits_of(bands), np.int64)
    codes = rng.integers(0, top, (*shape, len(top)))
    ends = rng.integers(0, 2, codes.shape) * (top - 1)
    return np.where(rng.random(codes.shape) < 0.1, ends, codes)


def make_pages(
    rng: np.random.Generator, spec: PageSpec, size: float = 1.0, *, blank: bool = False
) -> PageArrays:
    """Random codes in the byte layout, pages in random order, poison elsewhere. blank: no row's
    codes are stored yet."""
    codec, used = make_codec(rng, spec, size)
    layout, groups, batch = spec.layout, spec.kv_heads, len(spec.lengths)
    counts = [-(-length // PAGE) for length in spec.lengths]
    max_pages = max(counts, default=0) + spec.spare_pages
    order = rng.permutation(sum(counts) + 2)
    table = np.full((batch, max_pages), GARBAGE_INDEX, np.int32)
    starts = np.cumsum([0, *counts])
    live = []  # tokens of each page
    for b, length in enumerate(spec.lengths):
        table[b, : counts[b]] = order[starts[b] : starts[b + 1]]
        live += [0 if blank else min(PAGE, length - PAGE * j) for j in range(counts[b])]
    pages = {}
    for side in ("k", "v"):
        bands = layout.side(side)
        pages[side] = np.full((len(order), groups, PAGE * bands.bytes), GARBAGE_BYTE, np.uint8)
        codes = random_codes(rng, (len(live), groups, PAGE), bands.bands)
        for page, count in enumerate(live):
            codes[page, :, count:] = 2 ** np.array(bands.bits) - 1
        pages[side][order[: len(live)]] = layout_oracle.pack_codes(codes, bands.bands, side)
    rows = used[rng.integers(0, len(used), batch)].astype(np.int32)
    lengths = np.array(spec.lengths, np.int32)
    return PageArrays(codec, pages["k"], pages["v"], table, lengths, rows)


def codec_of(arrays: CodecArrays) -> Codec:
    """The tensors of the same codec."""
    bands = Bands(tuple(arrays.k_bands)), Bands(tuple(arrays.v_bands))
    layout = PageLayout(*bands, arrays.head_dim, arrays.frame)
    names = ("basis", "scale", "encoder")
    fields = [f"{side}_{name}" for side in ("k", "v") for name in names] + ["k_mean", "k_offset"]
    tensors = {name: torch.from_numpy(getattr(arrays, name)).to(DEVICE) for name in fields}
    return Codec(layout, freqs=freqs_of(arrays.inv_freq), **tensors)


def codec_ids_of(arrays: PageArrays) -> torch.Tensor | None:
    """None where the codec has one row."""
    return None if arrays.codec.k_basis.shape[0] == 1 else int32(arrays.rows)


@dataclass
class PageTensors:
    """The tensors of PageArrays: K and V pages are views of one pool, as an engine holds them;
    tables are slices."""

    pool: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    codec: Codec
    codec_ids: torch.Tensor | None

    def pages(self, side: str) -> torch.Tensor:
        return self.k_pages if side == "k" else self.v_pages


def pages_of(arrays: PageArrays, *, shared: bool = True) -> PageTensors:
    """shared: pages lie in a pool [P, G, K bytes + V bytes] with gaps of poison; else K and V
    apart, contiguous."""
    sides = [torch.from_numpy(x) for x in (arrays.k_pages, arrays.v_pages)]
    (count, groups, k_bytes), v_bytes = sides[0].shape, sides[1].shape[-1]
    gap = 16 if shared else 0
    start = k_bytes + gap
    shape = (count, groups, start + v_bytes + 2 * gap)
    pool = torch.full(shape, GARBAGE_BYTE, dtype=torch.uint8, device=DEVICE)
    views = [pool[..., :k_bytes], pool[..., start : start + v_bytes]]
    if not shared:
        views = [torch.empty_like(x, device=DEVICE) for x in sides]
    for view, x in zip(views, sides, strict=True):
        view.copy_(x)
    batch, width = arrays.block_table.shape
    table = torch.full((batch, width + 3), GARBAGE_INDEX, dtype=torch.int32, device=DEVICE)
    table[:, :width] = int32(arrays.block_table)
    return PageTensors(
        pool,
        *views,
        table[:, :width],
        int32(arrays.seq_lens),
        codec_of(arrays.codec),
        codec_ids_of(arrays),
    )


def swap_nibbles(pages: NDArray[np.uint8], byte: int) -> None:
    """Exchange the nibbles of the group of byte columns that starts at a byte of a token, in
    place."""
    group = pages[..., byte * PAGE : (byte + 16) * PAGE]
    group[:] = group % 16 * 16 + group // 16


@dataclass
class ExactTokens:
    """Exact slots [max_seqs, G, S, D] of the rows of a batch, as the oracle and the operation get
    them."""

    k: F64
    v: F64
    seq_ids: NDArray[np.int64]
    sinks: int
    window: int
    tensors: tuple[torch.Tensor, torch.Tensor]
    ids: torch.Tensor | None

    @property
    def ring(self) -> int:
        return self.k.shape[2] - self.sinks


def make_exact_tokens(
    rng: np.random.Generator,
    *,
    lengths: Sequence[int],
    kv_heads: int,
    head_dim: int,
    sinks: int,
    window: int,
    drafts: int = 0,
    dtype: torch.dtype = torch.float32,
    stride: str = "plain",
    permuted: bool = True,
    size: float = 1.0,
) -> ExactTokens:
    """Random tokens in the slots that hold one, NaN in others and in rows of no sequence; the ring
    has window + drafts slots. permuted: rows in another order than sequences, named by seq_ids."""
    batch, slots = len(lengths), sinks + window + drafts
    rows = batch + 1 if permuted else batch
    ids = rng.permutation(rows)[:batch] if permuted else np.arange(batch)
    k, v = np.full((2, rows, kv_heads, slots, head_dim), np.nan)
    for b, length in enumerate(lengths):
        for slot, holder in enumerate(window_oracle.holders(length, sinks, window + drafts)):
            if holder >= 0:
                k[ids[b], :, slot] = size * rng.standard_normal((kv_heads, head_dim))
                v[ids[b], :, slot] = rng.standard_normal((kv_heads, head_dim))
    k16, v16 = rounded(k, dtype), rounded(v, dtype)
    tensors = strided(k16, stride), strided(v16, stride)
    names = int32(ids) if permuted else None
    return ExactTokens(to_numpy(k16), to_numpy(v16), ids, sinks, window, tensors, names)
