"""The byte layout of cold (spectral) pages: the one place that knows bytes.

A chunk of C tokens is a page: for K and for V the coefficients of its tokens, quantised, in the order in which the matrix
units of a GPU want them (operand fragments of mma.m16n8k32 on int8): a lane's 16-byte load is an operand as it is.

    side      bands ((rank, bits), ...): bits 16, 8, 4 or 2, not increasing; ranks multiples of 16; R = sum of ranks
    value     component r of a token stands for  step_r * (n - (2**bits - 1) / 2)  with the code n in 0 .. 2**bits - 1;
              steps are folded into `k_scale` / `v_scale`, so that attention uses the integers as they are.
    group     the components, in blocks of 16 of one width, fill the fields of groups of 16 byte columns, low bits of a byte
              first: (8), (4, 4), (4, 2, 2) or (2, 2, 2, 2) bits. Column c of a field is component c of its block. The last
              group may have bits to spare; if it uses 4 or less it is a half group, whose bytes hold two tokens.
              A field that ends at bit 7 holds n - 2**(bits - 1) in two's complement, others n: so a mask alone, without a
              shift, leaves an int8 that is linear in n.
    page      group after group. A group is C/64 tiles of 64 tokens, a tile two sub-tiles i = 0, 1 of 32 tokens (a half
              group: one sub-tile, whose bytes hold the tokens of i = 0 in bits 0-3 and those of i = 1 in bits 4-7).
    sub-tile  512 bytes. With g in 0..7 and t in 0..3 at byte 64 g + 16 t:
                K  byte 4 r + b (r, b in 0..3): token 32 i + 8 r + g of the tile, column 4 t + b
                V  byte 8 h + b (h in 0..1, b in 0..7): token 8 b + 4 i + t of the tile, column 8 h + g

    k_pages [P, G, C * bytes_K]  v_pages [P, G, C * bytes_V]
    skip    [P, G, C/32] int32   bit d % 32 of word d // 32 set: token d is kept exact elsewhere and has no cold score

A 16-bit band is the only band of its side: little-endian fp16 numbers in units of step_r, [C, R] for K and [R, C] for V.

Oracle: reference/pages.py. Test: tests/test_pages.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from ._checks import check_in, check_tensor

CHUNKS = (64, 128, 256)
BLOCK = 16  # components of a block, columns of a group
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
    def groups(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Groups of byte columns as (first component, bits of each field); none for a 16-bit side. See the module."""
        groups: list[tuple[int, tuple[int, ...]]] = []
        for i, bits in enumerate(() if self.is_float else self.bits[::BLOCK]):
            if groups and sum(groups[-1][1]) + bits <= 8:
                groups[-1] = (groups[-1][0], (*groups[-1][1], bits))
            else:
                groups.append((i * BLOCK, (bits,)))
        return tuple(groups)

    @cached_property
    def bytes(self) -> int:
        """Bytes of one token: 2 a component of a 16-bit side, else 16 a group and 8 a half group."""
        return 2 * self.rank if self.is_float else sum(8 if is_half(fields) else 16 for _, fields in self.groups)

    @property
    def is_float(self) -> bool:
        """Whether the side is one 16-bit band."""
        return self.bands[0][1] == 16

    @cached_property
    def bits(self) -> tuple[int, ...]:
        """Bits of each component, [R]."""
        return tuple(bits for rank, bits in self.bands for _ in range(rank))


def is_half(fields: tuple[int, ...]) -> bool:
    """Whether a group of these fields holds two tokens a byte."""
    return sum(fields) <= 4


@dataclass(frozen=True)
class PageLayout:
    """What decides the bytes of a page and what they stand for.

    Args:
        k, v: bands.      head_dim: D.      chunk: C, tokens of a page: 64, 128 or 256.
        align: A, a multiple of C: keys are phase-aligned in blocks of A positions (a query is turned once a block), which
            also share a segment. 0: C.
    """

    k: Bands
    v: Bands
    head_dim: int
    chunk: int
    align: int = 0

    def __post_init__(self) -> None:
        check_in("head_dim", self.head_dim, HEAD_DIMS)
        check_in("chunk", self.chunk, CHUNKS)
        if self.align == 0:
            object.__setattr__(self, "align", self.chunk)
        if self.align < self.chunk or self.align % self.chunk:
            raise ValueError(f"align: expected a multiple of chunk = {self.chunk}, got {self.align}")
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
        k_pages: uint8 [P, G, C * bytes_K], contiguous.      v_pages: uint8 [P, G, C * bytes_V], contiguous.
        skip: int32 [P, G, C/32], contiguous.
        k_basis: int8 [S, G, R_K, D], k_scale: float32 [S, G, R_K]: component r of segment s stands for the vector
            k_scale[s, g, r] * k_basis[s, g, r]; the scale holds the quantiser's step. Contiguous. v_*: likewise.
        page_table: int32 [B, max_chunks] page of chunk j of row b (positions j*C .. j*C + C-1).
        segment_table: int32 [B, ceil(max_chunks * C / A)] segment of each block of A positions.
        lengths: int32 [B] cold tokens a row; the last page may be partial.
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
        check_tensor("k_pages", self.k_pages, shape=(None, None, lay.chunk * lay.k.bytes), dtype=u8)
        device, (pages, heads) = self.k_pages.device, self.k_pages.shape[:2]
        check_tensor("v_pages", self.v_pages, shape=(pages, heads, lay.chunk * lay.v.bytes), dtype=u8, device=device)
        check_tensor("skip", self.skip, shape=(pages, heads, lay.chunk // 32), dtype=i32, device=device)
        check_tensor("k_basis", self.k_basis, shape=(None, heads, lay.k.rank, lay.head_dim), dtype=torch.int8)
        segments = self.k_basis.shape[0]
        check_tensor("k_basis", self.k_basis, device=device)
        check_tensor("k_scale", self.k_scale, shape=(segments, heads, lay.k.rank), dtype=f32, device=device)
        shape = (segments, heads, lay.v.rank, lay.head_dim)
        check_tensor("v_basis", self.v_basis, shape=shape, dtype=torch.int8, device=device)
        check_tensor("v_scale", self.v_scale, shape=(segments, heads, lay.v.rank), dtype=f32, device=device)
        check_tensor("page_table", self.page_table, shape=(None, None), dtype=i32, device=device, unit_stride=True)
        batch = self.page_table.shape[0]
        blocks = (batch, self.max_blocks)
        check_tensor("segment_table", self.segment_table, shape=blocks, dtype=i32, device=device, unit_stride=True)
        check_tensor("lengths", self.lengths, shape=(batch,), dtype=i32, device=device, unit_stride=True)
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
    def max_blocks(self) -> int:
        return -(-self.max_chunks * self.layout.chunk // self.layout.align)

    def segment_table_by_chunk(self) -> torch.Tensor:
        """Segment of each chunk, int32 [B, max_chunks]."""
        repeats = self.layout.align // self.layout.chunk
        return self.segment_table.repeat_interleave(repeats, 1)[:, : self.max_chunks]

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
        k_pages=empty(pages, kv_heads, chunk * layout.k.bytes, dtype=u8),
        v_pages=empty(pages, kv_heads, chunk * layout.v.bytes, dtype=u8),
        skip=zeros(pages, kv_heads, chunk // 32),
        k_basis=empty(segments, kv_heads, layout.k.rank, dim, dtype=i8),
        k_scale=empty(segments, kv_heads, layout.k.rank, dtype=f32),
        v_basis=empty(segments, kv_heads, layout.v.rank, dim, dtype=i8),
        v_scale=empty(segments, kv_heads, layout.v.rank, dtype=f32),
        page_table=zeros(batch, max_chunks),
        segment_table=zeros(batch, -(-max_chunks * chunk // layout.align)),
        lengths=zeros(batch),
    )


def _to_subtiles(columns: torch.Tensor, side: str) -> torch.Tensor:
    """Bytes [..., C, 16] by token and column as [..., C/64, 2, 512] by tile and sub-tile."""
    if side == "k":
        x = columns.unflatten(-1, (4, 4)).unflatten(-3, (-1, 2, 4, 8))  # [..., tile, i, r, g, t, b]
        return x.movedim(-4, -2).flatten(-4)
    x = columns.unflatten(-1, (2, 8)).unflatten(-3, (-1, 8, 2, 4))  # [..., tile, b, i, t, h, g]
    return x.movedim(-5, -1).movedim(-2, -4).flatten(-4)


def _from_subtiles(data: torch.Tensor, side: str) -> torch.Tensor:
    """Undoes `_to_subtiles`."""
    if side == "k":
        x = data.unflatten(-1, (8, 4, 4, 4))  # [..., tile, i, g, t, r, b]
        return x.movedim(-2, -4).flatten(-2).flatten(-5, -2)
    x = data.unflatten(-1, (8, 4, 2, 8))  # [..., tile, i, g, t, h, b]
    return x.movedim(-4, -2).movedim(-1, -5).flatten(-2).flatten(-5, -2)


def _check_side(side: str) -> None:
    check_in("side", side, ("k", "v"))


def pack_pages(values: torch.Tensor, bands: Bands, *, side: str) -> torch.Tensor:
    """Coefficients in units of their steps, float [..., C, R], to pages, uint8 [..., C * bytes]: rounds and packs.

    A code is clamp(floor(value + 2**(bits-1)), 0, 2**bits - 1), so values past the range saturate;
    16 bits round to fp16 and saturate at +-65504. side: "k" or "v".
    """
    check_tensor("values", values)
    _check_side(side)
    if values.dim() < 2 or values.shape[-1] != bands.rank:
        raise ValueError(f"values: expected shape [..., C, {bands.rank}], got {list(values.shape)}")
    check_in("values: C", values.shape[-2], CHUNKS)
    if bands.is_float:
        half = values.float().clamp(-65504, 65504).half()
        return (half if side == "k" else half.mT).contiguous().view(torch.uint8).flatten(-2)
    top = torch.tensor([2.0**bits for bits in bands.bits], device=values.device)
    codes = torch.minimum(torch.floor(values.float() + top / 2).clamp_min(0), top - 1).to(torch.uint8)
    parts = []
    for first, fields in bands.groups:
        columns, shift = torch.zeros_like(codes[..., :BLOCK]), 0
        for f, bits in enumerate(fields):
            columns |= codes[..., first + f * BLOCK : first + (f + 1) * BLOCK] << shift
            shift += bits
        if shift == 8:
            columns ^= 0x80
        tiles = _to_subtiles(columns, side)
        parts.append((tiles[..., 0, :] | (tiles[..., 1, :] << 4)).flatten(-2) if is_half(fields) else tiles.flatten(-3))
    return torch.cat(parts, dim=-1)


def unpack_pages(pages: torch.Tensor, bands: Bands, *, side: str) -> torch.Tensor:
    """Pages, uint8 [..., C * bytes], to coefficients in units of their steps, float32 [..., C, R]. side: "k" or "v"."""
    check_tensor("pages", pages, dtype=torch.uint8)
    _check_side(side)
    chunk, rest = divmod(pages.shape[-1], bands.bytes)
    if rest or chunk not in CHUNKS:
        expected = [chunk * bands.bytes for chunk in CHUNKS]
        raise ValueError(f"pages: expected a last dimension of {expected}, got {pages.shape[-1]}")
    if bands.is_float:
        half = pages.contiguous().view(torch.float16)
        return half.unflatten(-1, (chunk, -1)).float() if side == "k" else half.unflatten(-1, (-1, chunk)).mT.float()
    values, start = [], 0
    for _, fields in bands.groups:
        size = chunk * (8 if is_half(fields) else 16)
        tiles = pages[..., start : start + size].unflatten(-1, (chunk // 64, -1, 512))
        if is_half(fields):
            tiles = torch.cat((tiles & 0x0F, tiles >> 4), dim=-2)
        columns = _from_subtiles(tiles, side)
        if sum(fields) == 8:
            columns = columns ^ 0x80
        start, shift = start + size, 0
        for bits in fields:
            values.append(((columns >> shift) & (2**bits - 1)).float() - (2**bits - 1) / 2)
            shift += bits
    return torch.cat(values, dim=-1)
