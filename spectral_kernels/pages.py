"""The byte layout of cold (spectral) pages: the one place that knows bytes.

A chunk of C tokens is a page. A token's row in a page is its K (or V) coefficients, quantised, band after band.

    side        bands ((rank, bits), ...): bits 16, 8, 4 or 2, not increasing; ranks multiples of 16; R = sum of ranks
    value       component r of a token stands for  step_r * (n - (2**bits - 1) / 2)  with the code n in 0 .. 2**bits - 1;
                steps are folded into `k_scale` / `v_scale`, so that attention uses the integers as they are.
                A 16-bit band is the only band of its side; its value is step_r * (an fp16 number).
    8-bit band  rank r takes r bytes; byte i is component i as two's complement of n - 128 (n ^ 0x80)
    4-bit band  rank r takes r/2 bytes; byte j holds component j in bits 0-3 and component j + r/2 in bits 4-7
    2-bit band  rank r takes r/4 bytes; byte j holds components j, j + r/4, j + 2r/4, j + 3r/4 in bits 0-1, 2-3, 4-5, 6-7
    16-bit band component i is the little-endian fp16 at bytes 2i and 2i + 1

so a plane (one field of all bytes of a band) is a contiguous run of components, and a mask and a shift unpack it.

    k_pages [P, G, C, bytes_K]   a token's row is contiguous
    v_pages [P, G, bytes_V, C]   byte j of token d is at [j, d]: what the product with the weights contracts (tokens) is
                                 contiguous. A 16-bit side viewed as fp16 is [P, G, R, C].
    skip    [P, G, C/32] int32   bit d % 32 of word d // 32 set: token d is kept exact elsewhere and has no cold score

Oracle: reference/pages.py. Test: tests/test_pages.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from ._checks import check_in, check_tensor

CHUNKS = (32, 64, 128, 256)
HEAD_DIMS = (64, 80, 96, 128, 256)


@dataclass(frozen=True)
class Bands:
    """The bands of one side, best component first: ((rank, bits), ...). See the module for the rules."""

    bands: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.bands:
            raise ValueError("bands: expected at least one (rank, bits), got none")
        previous = 16
        for rank, bits in self.bands:
            check_in("bands: bits", bits, (16, 8, 4, 2))
            if bits > previous:
                raise ValueError(f"bands: expected bits that do not increase, got {self}")
            if rank <= 0 or rank % 16:
                raise ValueError(f"bands: expected ranks that are positive multiples of 16, got {self}")
            previous = bits
        if self.bands[0][1] == 16 and len(self.bands) > 1:
            raise ValueError(f"bands: expected a 16-bit band to be the only one of its side, got {self}")
        if len({bits for _, bits in self.bands}) != len(self.bands):
            raise ValueError(f"bands: expected each number of bits once, got {self}")

    @classmethod
    def parse(cls, text: str) -> Bands:
        """From text such as "16x8+16x4+96x2" (rank x bits)."""
        try:
            pairs = tuple((int(r), int(b)) for r, b in (part.split("x") for part in text.split("+")))
        except ValueError:
            raise ValueError(f'bands: expected text such as "16x8+48x4", got {text!r}') from None
        return cls(pairs)

    def __str__(self) -> str:
        return "+".join(f"{rank}x{bits}" for rank, bits in self.bands)

    @cached_property
    def rank(self) -> int:
        return sum(rank for rank, _ in self.bands)

    @cached_property
    def bytes(self) -> int:
        """Bytes of one token."""
        return sum(rank * bits // 8 for rank, bits in self.bands)

    @property
    def is_float(self) -> bool:
        """Whether the side is one 16-bit band."""
        return self.bands[0][1] == 16

    @cached_property
    def bits(self) -> tuple[int, ...]:
        """Bits of each component, [R]."""
        return tuple(bits for rank, bits in self.bands for _ in range(rank))

    def planes(self) -> Iterable[tuple[int, int, int, int, int]]:
        """Each band as (first byte, bytes, bits, first component, components): what kernels and packers walk over."""
        byte = component = 0
        for rank, bits in self.bands:
            size = rank * bits // 8
            yield byte, size, bits, component, rank
            byte, component = byte + size, component + rank


@dataclass(frozen=True)
class PageLayout:
    """Bands of K and of V, the head dimension D and the chunk length C: all that decides the bytes of a page."""

    k: Bands
    v: Bands
    head_dim: int
    chunk: int

    def __post_init__(self) -> None:
        check_in("head_dim", self.head_dim, HEAD_DIMS)
        check_in("chunk", self.chunk, CHUNKS)
        for name, side in (("k", self.k), ("v", self.v)):
            if side.rank > self.head_dim:
                raise ValueError(f"{name}: expected a rank of at most head_dim = {self.head_dim}, got {side.rank}")

    @property
    def token_bytes(self) -> int:
        """Bytes of coefficients a token and KV head."""
        return self.k.bytes + self.v.bytes


@dataclass(frozen=True)
class Pages:
    """Cold pages of a batch and the tables that find them. Holds tensors and copies none.

    Args:
        layout: bytes of a page.
        k_pages: uint8 [P, G, C, bytes_K], contiguous.      v_pages: uint8 [P, G, bytes_V, C], contiguous.
        skip: int32 [P, G, C/32], contiguous.
        k_basis: int8 [S, G, R_K, D], k_scale: float32 [S, G, R_K]: component r of segment s stands for the vector
            k_scale[s, g, r] * k_basis[s, g, r]; the scale holds the quantiser's step. Contiguous. v_*: likewise.
        page_table: int32 [B, max_chunks] page of chunk j of row b.  segment_table: int32 [B, max_chunks] its segment.
        lengths: int32 [B] cold tokens a row; chunk j holds positions j*C .. j*C + C-1, the last one may be partial.
            Entries of the tables past a row's length are never read.
    Raises:
        TypeError, ValueError: a tensor's dtype, shape, device or strides are not as above.
    """

    layout: PageLayout
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    skip: torch.Tensor
    k_basis: torch.Tensor
    k_scale: torch.Tensor
    v_basis: torch.Tensor
    v_scale: torch.Tensor
    page_table: torch.Tensor
    segment_table: torch.Tensor
    lengths: torch.Tensor

    def __post_init__(self) -> None:
        lay, u8, i32, f32 = self.layout, torch.uint8, torch.int32, torch.float32
        check_tensor("k_pages", self.k_pages, shape=(None, None, lay.chunk, lay.k.bytes), dtype=u8)
        device, (pages, heads) = self.k_pages.device, self.k_pages.shape[:2]
        check_tensor("v_pages", self.v_pages, shape=(pages, heads, lay.v.bytes, lay.chunk), dtype=u8, device=device)
        check_tensor("skip", self.skip, shape=(pages, heads, lay.chunk // 32), dtype=i32, device=device)
        check_tensor("k_basis", self.k_basis, shape=(None, heads, lay.k.rank, lay.head_dim), dtype=torch.int8)
        segments = self.k_basis.shape[0]
        check_tensor("k_basis", self.k_basis, device=device)
        check_tensor("k_scale", self.k_scale, shape=(segments, heads, lay.k.rank), dtype=f32, device=device)
        shape = (segments, heads, lay.v.rank, lay.head_dim)
        check_tensor("v_basis", self.v_basis, shape=shape, dtype=torch.int8, device=device)
        check_tensor("v_scale", self.v_scale, shape=(segments, heads, lay.v.rank), dtype=f32, device=device)
        check_tensor("page_table", self.page_table, shape=(None, None), dtype=i32, device=device, unit_stride=True)
        table = tuple(self.page_table.shape)
        check_tensor("segment_table", self.segment_table, shape=table, dtype=i32, device=device, unit_stride=True)
        check_tensor("lengths", self.lengths, shape=(table[0],), dtype=i32, device=device, unit_stride=True)
        for name in ("k_pages", "v_pages", "skip", "k_basis", "k_scale", "v_basis", "v_scale"):
            if not getattr(self, name).is_contiguous():
                raise ValueError(f"{name}: expected a contiguous tensor, got strides {getattr(self, name).stride()}")

    @property
    def kv_heads(self) -> int:
        return self.k_pages.shape[1]

    @property
    def max_chunks(self) -> int:
        return self.page_table.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        tensors = (self.k_pages, self.v_pages, self.skip, self.k_basis, self.k_scale, self.v_basis, self.v_scale)
        return sum(t.nbytes for t in (*tensors, self.page_table, self.segment_table, self.lengths))


def allocate_pages(
    layout: PageLayout, *, pages: int, segments: int, kv_heads: int, batch: int, max_chunks: int, device: torch.device
) -> Pages:
    """An empty pool: zero lengths, pages and bases uninitialised, tables zero, nothing skipped."""

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    u8, i8, f32, dim, chunk = torch.uint8, torch.int8, torch.float32, layout.head_dim, layout.chunk
    return Pages(
        layout=layout,
        k_pages=empty(pages, kv_heads, chunk, layout.k.bytes, dtype=u8),
        v_pages=empty(pages, kv_heads, layout.v.bytes, chunk, dtype=u8),
        skip=zeros(pages, kv_heads, chunk // 32),
        k_basis=empty(segments, kv_heads, layout.k.rank, dim, dtype=i8),
        k_scale=empty(segments, kv_heads, layout.k.rank, dtype=f32),
        v_basis=empty(segments, kv_heads, layout.v.rank, dim, dtype=i8),
        v_scale=empty(segments, kv_heads, layout.v.rank, dtype=f32),
        page_table=zeros(batch, max_chunks),
        segment_table=zeros(batch, max_chunks),
        lengths=zeros(batch),
    )


def pack_rows(values: torch.Tensor, bands: Bands) -> torch.Tensor:
    """Coefficients in units of their steps, float [..., R], to token rows, uint8 [..., bytes]: rounds and packs.

    A code is clamp(floor(value + 2**(bits-1)), 0, 2**bits - 1), so values past the range saturate;
    16 bits round to fp16 and saturate at +-65504.
    """
    check_tensor("values", values)
    if values.shape[-1] != bands.rank:
        raise ValueError(f"values: expected last dimension {bands.rank}, got {values.shape[-1]}")
    rows = []
    for _, size, bits, first, rank in bands.planes():
        x = values[..., first : first + rank].float()
        if bits == 16:
            rows.append(x.clamp(-65504, 65504).half().contiguous().view(torch.uint8))
            continue
        code = torch.floor(x + 2 ** (bits - 1)).clamp(0, 2**bits - 1).to(torch.uint8)
        if bits == 8:
            rows.append(code ^ 0x80)
            continue
        fields = code.unflatten(-1, (8 // bits, size))
        row = fields[..., 0, :]
        for f in range(1, 8 // bits):
            row = row | (fields[..., f, :] << (bits * f))
        rows.append(row)
    return torch.cat(rows, dim=-1)


def unpack_rows(rows: torch.Tensor, bands: Bands) -> torch.Tensor:
    """Token rows, uint8 [..., bytes], to coefficients in units of their steps, float32 [..., R]."""
    check_tensor("rows", rows, dtype=torch.uint8)
    if rows.shape[-1] != bands.bytes:
        raise ValueError(f"rows: expected last dimension {bands.bytes}, got {rows.shape[-1]}")
    values = []
    for byte, size, bits, _, _ in bands.planes():
        x = rows[..., byte : byte + size]
        if bits == 16:
            values.append(x.contiguous().view(torch.float16).float())
        elif bits == 8:
            values.append((x ^ 0x80).float() - 127.5)
        else:
            fields = [(x >> (bits * f)) & (2**bits - 1) for f in range(8 // bits)]
            values.append(torch.cat(fields, dim=-1).float() - (2**bits - 1) / 2)
    return torch.cat(values, dim=-1)


def v_rows(v_pages: torch.Tensor, bands: Bands) -> torch.Tensor:
    """V pages [P, G, bytes_V, C] as token rows, uint8 [P, G, C, bytes_V] (a copy or a view)."""
    if bands.is_float:
        return v_pages.view(torch.float16).unflatten(2, (bands.rank, 2)).flatten(3).mT.contiguous().view(torch.uint8)
    return v_pages.mT


def v_pages_from_rows(rows: torch.Tensor, bands: Bands) -> torch.Tensor:
    """Token rows, uint8 [P, G, C, bytes_V], as V pages [P, G, bytes_V, C] (contiguous)."""
    if bands.is_float:
        pages = rows.contiguous().view(torch.float16).mT.contiguous().view(torch.uint8)  # [P, G, R, 2C]
        return pages.unflatten(-1, (2, rows.shape[-2])).flatten(-3, -2)
    return rows.mT.contiguous()
