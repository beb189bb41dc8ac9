"""Oracle of spectral_kernels/layout.py: where each component's bits lie, looked up one token and
component at a time.

bands is ((rank, bits), ...). README.md, beside this file, has the layout.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Bands = Sequence[tuple[int, int]]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

PAGE = 64  # tokens of a page


def bits_of(bands: Bands) -> list[int]:
    """Bits of each component, [R]."""
    return [bits for rank, bits in bands for _ in range(rank)]


def groups_of(bands: Bands) -> list[list[int]]:
    """The bits of the blocks in each group."""
    groups: list[list[int]] = []
    for bits in bits_of(bands)[::16]:
        if not groups or sum(groups[-1]) + bits > 8:
            groups.append([])
        groups[-1].append(bits)
    return groups


def token_bytes(bands: Bands) -> int:
    """Bytes a token: two tokens share the bytes of a group that uses 4 bits or less."""
    return sum(16 if sum(group) > 4 else 8 for group in groups_of(bands))


def byte_in_subtile(token: int, column: int, side: str) -> tuple[int, int]:
    """Sub-tile and byte, of 512, of a column of one of 64 tokens."""
    if side == "k":
        sub, rest = divmod(token, 32)
        return sub, 64 * (rest % 8) + 16 * (column // 4) + 4 * (rest // 8) + column % 4
    return token // 4 % 2, 64 * (column % 8) + 16 * (token % 4) + 8 * (column // 8) + token // 8


@cache
def _places(bands: tuple[tuple[int, int], ...], side: str) -> tuple[I64, I64]:
    """Of token d and component r of a page: its byte, and its lowest bit there, [64, R]."""
    byte, low = np.zeros((2, PAGE, len(bits_of(bands))), np.int64)
    start = first = 0
    for group in groups_of(bands):
        half = sum(group) <= 4
        used = 0
        for width in group:
            for d in range(PAGE):
                for column in range(16):
                    sub, at = byte_in_subtile(d, column, side)
                    byte[d, first + column] = start + (at if half else sub * 512 + at)
                    low[d, first + column] = used + (4 * sub if half else 0)
            first += 16
            used += width
        start += PAGE * (8 if half else 16)
    return byte, low


def places(bands: Bands, side: str) -> tuple[I64, I64]:
    """Of token d and component r of a page: its byte, and its lowest bit there, [64, R]."""
    return _places(tuple((int(rank), int(bits)) for rank, bits in bands), side)


def flipped(bands: Bands) -> U8:
    """The bits of a page that are stored flipped, [64 * bytes]: the highest of bytes whose fields
    fill all 8 bits."""
    parts = [
        np.full(PAGE * (16 if sum(g) > 4 else 8), 128 if sum(g) == 8 else 0, np.uint8)
        for g in groups_of(bands)
    ]
    return np.concatenate(parts)


def code_of(value: ArrayLike, bits: int | I64) -> I64:
    """n = clamp(floor(value + 2**(bits - 1)), 0, 2**bits - 1) of coefficients in units of their
    steps."""
    # Floor before the integer addition: no rounding of the sum, whatever the magnitude of the
    # value.
    floored = np.floor(np.clip(np.asarray(value, np.float64), -(2.0**20), 2.0**20)).astype(np.int64)
    return np.clip(floored + 2 ** (bits - 1), 0, 2**bits - 1)


def codes_of(values: ArrayLike, bands: Bands) -> I64:
    """Codes n of coefficients in units of their steps [..., R]."""
    return code_of(values, np.array(bits_of(bands)))


def values_of(codes: I64, bands: Bands) -> F64:
    """What codes [..., R] stand for, in units of their steps: n - (2**bits - 1)/2."""
    return codes - (2.0 ** np.array(bits_of(bands)) - 1) / 2


def pack_codes(codes: I64, bands: Bands, side: str) -> U8:
    """Codes n [..., 64, R] to pages [..., 64 * bytes]."""
    pages = np.zeros((*codes.shape[:-2], PAGE * token_bytes(bands)), np.uint8)
    byte, low = places(bands, side)
    fields = (codes * 2**low).astype(np.uint8)
    for r in range(codes.shape[-1]):
        for bit in set(low[:, r]):  # two tokens may share a byte, at other bits of it
            at = low[:, r] == bit
            pages[..., byte[at, r]] += fields[..., at, r]
    return pages ^ flipped(bands)


def unpack_codes(pages: ArrayLike, bands: Bands, side: str) -> I64:
    """Pages [..., 64 * bytes] to codes n [..., 64, R]."""
    pages = (np.asarray(pages) ^ flipped(bands)).astype(np.int64)
    byte, low = places(bands, side)
    codes = np.empty((*pages.shape[:-1], PAGE, byte.shape[1]), np.int64)
    for r, bits in enumerate(bits_of(bands)):
        codes[..., r] = pages[..., byte[:, r]] // 2 ** low[:, r] % 2**bits
    return codes


def pack_pages(values: ArrayLike, bands: Bands, side: str) -> U8:
    """Coefficients in units of their steps [..., 64, R] to pages [..., 64 * bytes]."""
    return pack_codes(codes_of(values, bands), bands, side)


def unpack_pages(pages: ArrayLike, bands: Bands, side: str) -> F64:
    """Pages [..., 64 * bytes] to coefficients in units of their steps [..., 64, R]."""
    return values_of(unpack_codes(pages, bands, side), bands)


def codes_by_position(pages: U8, table: ArrayLike, length: int, bands: Bands, side: str) -> I64:
    """Codes [G, T, R] of the T = length tokens of a row whose pages of [P, G, 64 * bytes] `table`
    lists."""
    used = np.asarray(table)[: -(-length // PAGE)].astype(np.int64)
    codes = np.swapaxes(unpack_codes(pages[used], bands, side), 0, 1)  # [G, pages, 64, R]
    return codes.reshape(codes.shape[0], -1, codes.shape[-1])[:, :length]
