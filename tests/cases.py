"""Random inputs for the operations, and poison for everything an operation must not read or must overwrite.

A case holds its inputs twice: as the tensors an operation gets and as the float64 (or byte) arrays of the oracle,
rounded alike. What no operation may use is filled with NaN, or with bytes that read as NaN in fp16: unused pages and
segments, the tail of a row's last page, table entries past a row's length, gaps between the rows of strided tensors,
fresh outputs.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reference import pages as pages_oracle
from reference.pages import PageArrays
from spectral_kernels import _launch
from spectral_kernels.pages import Bands, PageLayout, Pages
from spectral_kernels.rope import Rope

F64 = NDArray[np.float64]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GARBAGE_INDEX = 2**31 - 1
GARBAGE_BYTE = 0xFF

# "triton" runs the kernel (in Triton's interpreter where there is no GPU), "scalar" the kernel without matrix units.
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


def operation(module: ModuleType, name: str, implementation: str, *dtypes: torch.dtype) -> Callable[..., Any]:
    """The named launcher or its twin. bf16 arithmetic is wrong in Triton's interpreter: there it means the twin."""
    if implementation == "torch" or (DEVICE.type == "cpu" and torch.bfloat16 in dtypes):
        return without_outputs(getattr(module, f"{name}_torch"))
    launcher = getattr(module, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        if implementation == "scalar":
            kwargs["matrix_units"] = False
        with kernels():
            return launcher(*args, **kwargs)

    return run


def without_outputs(twin: Callable[..., Any]) -> Callable[..., Any]:
    """Twins return new tensors: what a test passes for a launcher to write to or to be set by is dropped."""

    def run(*args: Any, **kwargs: Any) -> Any:
        for name in ("out", "lse", "out_lse", "splits", "matrix_units"):
            kwargs.pop(name, None)
        return twin(*args, **kwargs)

    return run


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An output that nobody has written yet."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def to_numpy(x: torch.Tensor) -> F64:
    return x.detach().double().cpu().numpy()


def strided(x: torch.Tensor, pattern: str) -> torch.Tensor:
    """x on the device with its values and shape, but laid out by `pattern`; the gaps hold NaN.

    plain: contiguous. swapped: dimensions 1 and 2 exchanged in memory (as after q.view(B, T, H, D).transpose(1, 2)).
    padded: rows 16 elements apart from each other, and odd: rows one element apart (no alignment).
    """
    x = x.to(DEVICE)
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=DEVICE)  # what NumPy gives for empty arrays has strides of 0
    if pattern == "plain":
        return x.contiguous()
    if pattern == "swapped":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    gap = 16 if pattern == "padded" else 1
    wide = torch.full((*x.shape[:-1], x.shape[-1] + gap), float("nan"), dtype=x.dtype, device=DEVICE)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


STRIDES = ("plain", "swapped", "padded", "odd")


def inverse_frequencies(rotary_dim: int, theta: float = 1e4) -> NDArray[np.float32]:
    return (theta ** -(np.arange(0, rotary_dim, 2) / max(rotary_dim, 1))).astype(np.float32)


def rope_of(inv_freq: NDArray[np.float32], scaling: float = 1.0) -> Rope:
    return Rope.from_inv_freq(torch.from_numpy(inv_freq), scaling, device=DEVICE)


@dataclass
class Queries:
    """q [B, H, Q, D] (float64, rounded to dtype), positions [B, Q], and the tensors of the same."""

    q: F64
    at: NDArray[np.int64]
    tensor: torch.Tensor
    positions: torch.Tensor

    @property
    def outputs(self) -> dict[str, torch.Tensor]:
        shape = tuple(self.tensor.shape)
        return {"out": poisoned(*shape), "lse": poisoned(*shape[:-1])}


def make_queries(
    rng: np.random.Generator,
    *,
    shape: tuple[int, int, int, int],
    at: NDArray[np.int64],
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
    stride: str = "plain",
    flat: bool = False,
    position_dtype: torch.dtype = torch.int64,
) -> Queries:
    """Random queries of [B, H, Q, D] at positions `at` [B, Q]; `flat` gives [B, H, D] tensors (Q must be 1)."""
    q = torch.from_numpy(rng.standard_normal(shape) * size).to(dtype)
    tensor = strided(q, stride)
    tensor = tensor[:, :, 0] if flat else tensor
    # A slice of a wider table: positions need not be contiguous.
    wide = torch.full((*at.shape, 2), -1, dtype=position_dtype, device=DEVICE)
    wide[..., 0] = torch.from_numpy(at).to(DEVICE, position_dtype)
    positions = wide[..., 0]
    return Queries(to_numpy(q), at, tensor, positions[:, 0] if flat else positions)


def in_shape_of(oracle: F64, queries: Queries) -> F64:
    """The oracle's [B, H, Q, ...] without Q where the queries are [B, H, D]."""
    return oracle[:, :, 0] if queries.tensor.dim() == 3 else oracle


@dataclass(frozen=True)
class PageSpec:
    """What decides the shape of random pages; lengths are the cold tokens of each row."""

    k_bands: str
    v_bands: str
    head_dim: int
    chunk: int
    kv_heads: int
    lengths: Sequence[int]
    segments: int = 1
    skip: float = 0.0
    """Share of tokens whose skip bit is set."""
    spare_chunks: int = 1
    """Chunks of the tables past the longest row."""
    mixed: bool = False
    """Segments in random order instead of runs."""
    align: int = 0
    """Positions of a block of phase alignment; 0: a chunk."""

    @property
    def layout(self) -> PageLayout:
        return PageLayout(Bands.parse(self.k_bands), Bands.parse(self.v_bands), self.head_dim, self.chunk, self.align)


def make_pages(rng: np.random.Generator, spec: PageSpec, size: float = 1.0) -> PageArrays:
    """Random codes and bases in the byte layout, pages in random order, poison elsewhere."""
    layout, groups, chunk = spec.layout, spec.kv_heads, spec.chunk
    batch = len(spec.lengths)
    chunks = [-(-length // chunk) for length in spec.lengths]
    max_chunks = max(chunks, default=0) + spec.spare_chunks
    pages, segments = sum(chunks) + 2, spec.segments + 1
    order = rng.permutation(pages)
    page_table = np.full((batch, max_chunks), GARBAGE_INDEX, np.int32)
    segment_table = np.full((batch, -(-max_chunks * chunk // layout.align)), GARBAGE_INDEX, np.int32)
    used_segments = rng.permutation(segments)[: spec.segments]
    k_pages = np.full((pages, groups, chunk * layout.k.bytes), GARBAGE_BYTE, np.uint8)
    v_pages = np.full((pages, groups, chunk * layout.v.bytes), GARBAGE_BYTE, np.uint8)
    skip = rng.integers(-(2**31), 2**31, (pages, groups, chunk // 32)).astype(np.int32)
    taken = 0
    for b, length in enumerate(spec.lengths):
        own = rng.integers(0, spec.segments, -(-length // layout.align))
        own = used_segments[own if spec.mixed else np.sort(own)]
        segment_table[b, : len(own)] = own
        for j in range(chunks[b]):
            page = order[taken]
            taken += 1
            live = min(chunk, length - j * chunk)
            page_table[b, j] = page
            for side, bands, target in (("k", layout.k.bands, k_pages), ("v", layout.v.bands, v_pages)):
                codes = np.stack([np.full((groups, chunk), garbage_code(bits)) for r, bits in bands for _ in range(r)], -1)
                codes[:, :live] = random_codes(rng, (groups, live), bands)
                target[page] = pages_oracle.pack_codes(codes, bands, side)
            bits = rng.random((groups, chunk)) < spec.skip
            bits[:, live:] = rng.random((groups, chunk - live)) < 0.5  # past the length a bit says nothing
            words = (bits.reshape(groups, -1, 32) * 2 ** np.arange(32, dtype=np.int64)).sum(-1)
            skip[page] = words.astype(np.uint32).view(np.int32)
    basis, scale = {}, {}
    for side, bands in (("k", layout.k.bands), ("v", layout.v.bands)):
        rank = sum(r for r, _ in bands)
        basis[side] = np.full((segments, groups, rank, spec.head_dim), -128, np.int8)
        scale[side] = np.full((segments, groups, rank), np.nan, np.float32)
        basis[side][used_segments] = rng.integers(-127, 128, (spec.segments, groups, rank, spec.head_dim))
        # Steps fall as in a spectrum. The components add up to about `size` a dimension, whatever the bits.
        largest = np.concatenate([np.full(r, 1.0 if bits == 16 else 2.0 ** (bits - 1)) for r, bits in bands])
        fall = np.exp(-2 * np.arange(rank) / rank) * rng.uniform(0.5, 1.5, (spec.segments, groups, rank))
        scale[side][used_segments] = size * 2 * fall / (127 * largest * np.sqrt(rank))
    return PageArrays(
        layout.k.bands,
        layout.v.bands,
        spec.head_dim,
        chunk,
        layout.align,
        k_pages,
        v_pages,
        skip,
        basis["k"],
        scale["k"],
        basis["v"],
        scale["v"],
        page_table,
        segment_table,
        np.array(spec.lengths, np.int32),
    )


def garbage_code(bits: int) -> int:
    """A code whose bits are all set: NaN for 16 bits."""
    return 2**bits - 1


def random_codes(rng: np.random.Generator, shape: tuple[int, ...], bands: pages_oracle.Bands) -> NDArray[np.int64]:
    """Codes n [..., R] as `pages_oracle.pack_codes` takes them; a tenth of them at an end of the range."""
    parts = []
    for rank, bits in bands:
        if bits == 16:
            parts.append(rng.standard_normal((*shape, rank)).astype(np.float16).view(np.uint16).astype(np.int64))
            continue
        codes = rng.integers(0, 2**bits, (*shape, rank))
        ends = rng.integers(0, 2, codes.shape) * (2**bits - 1)
        parts.append(np.where(rng.random(codes.shape) < 0.1, ends, codes))
    return np.concatenate(parts, axis=-1)


def pages_of(arrays: PageArrays) -> Pages:
    """The tensors of the same pages; the tables are slices of wider ones."""

    def table(x: NDArray[np.int32]) -> torch.Tensor:
        wide = torch.full((x.shape[0], x.shape[1] + 3), GARBAGE_INDEX, dtype=torch.int32, device=DEVICE)
        wide[:, : x.shape[1]] = torch.from_numpy(x).to(DEVICE)
        return wide[:, : x.shape[1]]

    layout = PageLayout(
        Bands(tuple(arrays.k_bands)), Bands(tuple(arrays.v_bands)), arrays.head_dim, arrays.chunk, arrays.align
    )
    names = ("k_pages", "v_pages", "skip", "k_basis", "k_scale", "v_basis", "v_scale")
    tensors = {name: torch.from_numpy(getattr(arrays, name)).to(DEVICE) for name in names}
    return Pages(
        layout,
        **tensors,
        page_table=table(arrays.page_table),
        segment_table=table(arrays.segment_table),
        lengths=torch.from_numpy(arrays.lengths).to(DEVICE),
    )


def swap_nibbles(pages: NDArray[np.uint8], byte: int, chunk: int) -> None:
    """Exchange the nibbles of the group of byte columns that starts at a byte of a token, in place."""
    group = pages[..., byte * chunk : (byte + 16) * chunk]
    group[:] = group % 16 * 16 + group // 16


def query_positions(rng: np.random.Generator, lengths: Sequence[int], queries: int, far: int = 100) -> NDArray[np.int64]:
    """[B, Q] consecutive positions, the first of a row at or after all its cold tokens, up to `far` later."""
    first = np.array([length + rng.integers(0, far + 1) for length in lengths], np.int64)
    return first[:, None] + np.arange(queries)


@dataclass
class ExactTokens:
    """Phase-aligned keys and values [B, G, N, D] with positions [B, G, N], as the oracle and the operation get them."""

    k: F64
    v: F64
    at: NDArray[np.int64]
    k_tensor: torch.Tensor
    v_tensor: torch.Tensor
    positions: torch.Tensor

    @property
    def usable(self) -> NDArray[np.bool_]:
        return self.at >= 0


def make_exact_tokens(
    rng: np.random.Generator,
    *,
    shape: tuple[int, int, int, int],
    far: int,
    dtype: torch.dtype = torch.float32,
    stride: str = "plain",
    per_head: bool = True,
    unused: float = 0.2,
    size: float = 1.0,
) -> ExactTokens:
    """Random tokens at random different positions below `far`, in any order; a share of the slots is unused and NaN."""
    batch, groups, slots, _ = shape
    at = np.stack([[rng.permutation(max(far, slots))[:slots] for _ in range(groups)] for _ in range(batch)]).reshape(
        batch, groups, slots
    )
    at = np.where(rng.random(at.shape) < unused, -1 - at % 7, at).astype(np.int64)
    if not per_head:
        at = np.repeat(at[:, :1], groups, axis=1)
    k, v = (torch.from_numpy(rng.standard_normal(shape) * s).to(dtype) for s in (size, 1.0))
    for x in (k, v):
        x[torch.from_numpy(at < 0)] = float("nan")
    positions = torch.from_numpy(at if per_head else at[:, 0]).to(DEVICE, torch.int32)
    return ExactTokens(to_numpy(k), to_numpy(v), at, strided(k, stride), strided(v, stride), positions)
