"""The byte layout of a page: the one place that knows bytes.

A page holds the quantised coefficients of 64 consecutive tokens of a sequence and KV head, K and V
apart, as operand fragments of the matrix units (mma.m16n8k32 on int8): a lane's 16-byte load is an
operand as it is. reference/README.md says which bit is whose.

    side      bands ((rank, bits), ...): bits 8, 4 or 2, decreasing; ranks multiples of 16
    value     component r stands for step_r * (n - (2**bits - 1) / 2) with the code n; the codec's
              scales hold the steps, so that attention uses the integers as they are
    group     blocks of 16 components of one width, in the fields of 16 byte columns, low bits
              first; a last group that uses 4 bits or less is a half group: two tokens a byte
    sub-tile  512 bytes: 32 tokens of a group, all 64 of a half group

    k_pages [num_pages, G, 64 * bytes_K]  v_pages [num_pages, G, 64 * bytes_V]  uint8

Oracle: reference/layout.py. Test: tests/test_layout.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from ._checks import check_in, check_tensor

PAGE_SIZE = 64  # tokens of a page
BLOCK = 16  # components of a block, columns of a group
HEAD_DIMS = (64, 80, 96, 128, 256)


@dataclass(frozen=True)
class Bands:
    """The bands of one side, best component first: ((rank, bits), ...). See the module for the
    rules."""

    bands: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.bands:
            raise ValueError("bands: expected at least one (rank, bits), got none")
        previous = 16
        for rank, bits in self.bands:
            check_in("bands: bits", bits, (8, 4, 2))
            if bits >= previous:
                raise ValueError(f"bands: expected bits that decrease, got {self}")
            if rank <= 0 or rank % BLOCK:
                raise ValueError(
                    f"bands: expected ranks that are positive multiples of 16, got {self}"
                )
            previous = bits

    @classmethod
    def parse(cls, text: str) -> Bands:
        """From text such as "16x8+16x4+96x2" (rank x bits)."""
        try:
            pairs = tuple(
                (int(r), int(b)) for r, b in (part.split("x") for part in text.split("+"))
            )
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
        """Groups of byte columns as (first component, bits of each field). See the module."""
        groups: list[tuple[int, tuple[int, ...]]] = []
        for i, bits in enumerate(self.bits[::BLOCK]):
            if groups and sum(groups[-1][1]) + bits <= 8:
                groups[-1] = (groups[-1][0], (*groups[-1][1], bits))
            else:
                groups.append((i * BLOCK, (bits,)))
        return tuple(groups)

    @cached_property
    def bytes(self) -> int:
        """Bytes of one token: 16 a group and 8 a half group."""
        return sum(8 if is_half(fields) else 16 for _, fields in self.groups)

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
        k, v: bands.      head_dim: D.
        frame: F, a multiple of 64: keys and queries are turned back by the start of their frame of
            F positions.
    """

    k: Bands
    v: Bands
    head_dim: int
    frame: int = 512

    def __post_init__(self) -> None:
        check_in("head_dim", self.head_dim, HEAD_DIMS)
        if self.frame < PAGE_SIZE or self.frame % PAGE_SIZE:
            raise ValueError(f"frame: expected a multiple of {PAGE_SIZE}, got {self.frame}")
        for name, side in (("k", self.k), ("v", self.v)):
            # Two components a direction (b and b/256) are the lossless limit.
            if side.rank > 2 * self.head_dim:
                raise ValueError(
                    f"{name}: expected a rank of at most 2 D = {2 * self.head_dim}, got {side.rank}"
                )

    @property
    def token_bytes(self) -> int:
        """Bytes of coefficients a token and KV head."""
        return self.k.bytes + self.v.bytes

    def side(self, side: str) -> Bands:
        """The bands of "k" or "v"."""
        check_in("side", side, ("k", "v"))
        return self.k if side == "k" else self.v


def _to_subtiles(columns: torch.Tensor, side: str) -> torch.Tensor:
    """Bytes [..., 64, 16] by token and column as [..., 2, 512] by sub-tile."""
    if side == "k":
        x = columns.unflatten(-1, (4, 4)).unflatten(-3, (2, 4, 8))  # [..., i, r, g, t, b]
        return x.movedim(-4, -2).flatten(-4)
    x = columns.unflatten(-1, (2, 8)).unflatten(-3, (8, 2, 4))  # [..., b, i, t, h, g]
    return x.movedim(-5, -1).movedim(-2, -4).flatten(-4)


def _from_subtiles(data: torch.Tensor, side: str) -> torch.Tensor:
    """Undoes `_to_subtiles`."""
    if side == "k":
        x = data.unflatten(-1, (8, 4, 4, 4))  # [..., i, g, t, r, b]
        return x.movedim(-2, -4).flatten(-2).flatten(-4, -2)
    x = data.unflatten(-1, (8, 4, 2, 8))  # [..., i, g, t, h, b]
    return x.movedim(-4, -2).movedim(-1, -5).flatten(-2).flatten(-4, -2)


def pack_pages(values: torch.Tensor, bands: Bands, *, side: str) -> torch.Tensor:
    """Coefficients in units of their steps, float [..., 64, R], to pages, uint8 [..., 64 * bytes]:
    rounds and packs.

    A code is clamp(floor(value + 2**(bits-1)), 0, 2**bits - 1), so values past the range saturate.
    side: "k" or "v"."""
    check_tensor("values", values)
    check_in("side", side, ("k", "v"))
    if values.dim() < 2 or tuple(values.shape[-2:]) != (PAGE_SIZE, bands.rank):
        raise ValueError(
            f"values: expected shape [..., {PAGE_SIZE}, {bands.rank}], got {list(values.shape)}"
        )
    top = torch.tensor([2.0**bits for bits in bands.bits], device=values.device)
    codes = torch.minimum(torch.floor(values.float() + top / 2).clamp_min(0), top - 1).to(
        torch.uint8
    )
    parts = []
    for first, fields in bands.groups:
        columns, shift = torch.zeros_like(codes[..., :BLOCK]), 0
        for f, bits in enumerate(fields):
            columns |= codes[..., first + f * BLOCK : first + (f + 1) * BLOCK] << shift
            shift += bits
        if shift == 8:
            columns ^= 0x80
        tiles = _to_subtiles(columns, side)
        parts.append(
            tiles[..., 0, :] | (tiles[..., 1, :] << 4) if is_half(fields) else tiles.flatten(-2)
        )
    return torch.cat(parts, dim=-1)


def unpack_pages(pages: torch.Tensor, bands: Bands, *, side: str) -> torch.Tensor:
    """Pages, uint8 [..., 64 * bytes], to coefficients in units of their steps, float32 [..., 64,
    R]. side: "k" or "v"."""
    check_tensor("pages", pages, dtype=torch.uint8)
    check_in("side", side, ("k", "v"))
    if pages.shape[-1] != PAGE_SIZE * bands.bytes:
        raise ValueError(
            f"pages: expected a last dimension of {PAGE_SIZE * bands.bytes}, got {pages.shape[-1]}"
        )
    values, start = [], 0
    for _, fields in bands.groups:
        size = PAGE_SIZE * (8 if is_half(fields) else 16)
        tiles = pages[..., start : start + size].unflatten(-1, (-1, 512))
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
