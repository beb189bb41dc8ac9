"""Oracle of spectral_kernels/pages.py: where each component's bits lie, looked up one token and component at a time.

bands is ((rank, bits), ...). Components are taken in blocks of 16 of one width. Blocks share the bytes of a group of 16
columns, from the low bits up, as long as they fit in 8 bits. The value of a component, in units of its step, is
n - (2**bits - 1)/2 for its code n; a byte whose fields fill all 8 bits is stored with its highest bit flipped.
A 16-bit side is fp16, [C, R] for K, [R, C] for V.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Bands = Sequence[tuple[int, int]]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]


@dataclass
class PageArrays:
    """The tensors of spectral_kernels.pages.Pages as NumPy arrays, and the numbers of its layout."""

    k_bands: Bands
    v_bands: Bands
    head_dim: int
    chunk: int
    align: int
    k_pages: U8
    v_pages: U8
    skip: NDArray[np.int32]
    k_basis: NDArray[np.int8]
    k_scale: NDArray[np.float32]
    v_basis: NDArray[np.int8]
    v_scale: NDArray[np.float32]
    page_table: NDArray[np.int32]
    segment_table: NDArray[np.int32]
    lengths: NDArray[np.int32]


def groups_of(bands: Bands) -> list[list[int]]:
    """The bits of the blocks in each group."""
    blocks = [bits for rank, bits in bands for _ in range(rank // 16)]
    groups: list[list[int]] = []
    for bits in blocks:
        if not groups or sum(groups[-1]) + bits > 8:
            groups.append([])
        groups[-1].append(bits)
    return groups


def row_bytes(bands: Bands) -> int:
    """Bytes a token: two tokens share the bytes of a group that uses 4 bits or less."""
    if bands[0][1] == 16:
        return 2 * bands[0][0]
    return sum(16 if sum(group) > 4 else 8 for group in groups_of(bands))


def byte_in_subtile(token: int, column: int, side: str) -> tuple[int, int]:
    """Sub-tile and byte, of 512, of a column of one of 64 tokens."""
    if side == "k":
        sub, rest = divmod(token, 32)
        return sub, 64 * (rest % 8) + 16 * (column // 4) + 4 * (rest // 8) + column % 4
    return token // 4 % 2, 64 * (column % 8) + 16 * (token % 4) + 8 * (column // 8) + token // 8


@cache
def _places(
    bands: tuple[tuple[int, int], ...], chunk: int, side: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """For token d and component r of a page: byte [C, R] (16 bits: the lower one), lowest bit [C, R], and bits [R]."""
    rank = sum(r for r, _ in bands)
    byte, low = np.zeros((2, chunk, rank), np.int64)
    bits = np.array([b for r, b in bands for _ in range(r)], np.int64)
    if bands[0][1] == 16:
        for d in range(chunk):
            for r in range(rank):
                byte[d, r] = 2 * (d * rank + r if side == "k" else r * chunk + d)
        return byte, low, bits
    start = first = 0
    for group in groups_of(bands):
        half = sum(group) <= 4
        used = 0
        for width in group:
            for d in range(chunk):
                for column in range(16):
                    tile, (sub, at) = d // 64, byte_in_subtile(d % 64, column, side)
                    byte[d, first + column] = start + (tile * 512 if half else tile * 1024 + sub * 512) + at
                    low[d, first + column] = used + (4 * sub if half else 0)
            first += 16
            used += width
        start += chunk * (8 if half else 16)
    return byte, low, bits


def code_of(value: ArrayLike, bits: int) -> NDArray[np.int64]:
    """n = clamp(floor(value + 2**(bits - 1)), 0, 2**bits - 1) of coefficients in units of their steps."""
    # math.floor before the integer addition: no rounding of the sum, whatever the magnitude of the value.
    floored = np.floor(np.clip(np.asarray(value, np.float64), -(2.0**20), 2.0**20)).astype(np.int64)
    return np.clip(floored + 2 ** (bits - 1), 0, 2**bits - 1)


def places(bands: Bands, chunk: int, side: str) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """For token d and component r of a page: byte [C, R] (16 bits: the lower one), lowest bit [C, R], and bits [R]."""
    return _places(tuple((int(rank), int(bits)) for rank, bits in bands), chunk, side)


def pack_pages(values: ArrayLike, bands: Bands, side: str) -> U8:
    """Coefficients in units of their steps [..., C, R] to pages [..., C * bytes]."""
    values = np.asarray(values)
    codes = np.empty(values.shape, np.int64)
    for r, bits in enumerate(b for rank, b in bands for _ in range(rank)):
        if bits == 16:
            codes[..., r] = values[..., r].astype(np.float16).view(np.uint16)
        else:
            codes[..., r] = code_of(values[..., r], bits)
    return pack_codes(codes, bands, side)


def pack_codes(codes: NDArray[np.int64], bands: Bands, side: str) -> U8:
    """Codes n [..., C, R] (for 16 bits: the bit pattern of the fp16) to pages [..., C * bytes]."""
    chunk = codes.shape[-2]
    pages = np.zeros((*codes.shape[:-2], chunk * row_bytes(bands)), np.uint8)
    byte, low, bits = places(bands, chunk, side)
    for r, width in enumerate(bits):
        n = codes[..., r]
        if width == 16:
            pages[..., byte[:, r]] = n % 256
            pages[..., byte[:, r] + 1] = n // 256
            continue
        for d in range(chunk):  # two tokens may share a byte
            pages[..., byte[d, r]] += (n[..., d] * 2 ** low[d, r]).astype(np.uint8)
    return pages ^ flipped(bands, chunk)


def flipped(bands: Bands, chunk: int) -> U8:
    """The bits of a page that are stored flipped, [C * bytes]: the highest of bytes whose fields fill all 8 bits."""
    if bands[0][1] == 16:
        return np.zeros(chunk * row_bytes(bands), np.uint8)
    parts = [np.full(chunk * (16 if sum(g) > 4 else 8), 128 if sum(g) == 8 else 0, np.uint8) for g in groups_of(bands)]
    return np.concatenate(parts)


def unpack_pages(pages: ArrayLike, bands: Bands, side: str) -> F64:
    """Pages [..., C * bytes] to coefficients in units of their steps [..., C, R]."""
    pages = np.asarray(pages)
    chunk = pages.shape[-1] // row_bytes(bands)
    pages = (pages ^ flipped(bands, chunk)).astype(np.int64)
    byte, low, bits = places(bands, chunk, side)
    values = np.empty((*pages.shape[:-1], chunk, len(bits)))
    for r, width in enumerate(bits):
        n = pages[..., byte[:, r]]
        if width == 16:
            pattern = (n + 256 * pages[..., byte[:, r] + 1]).astype(np.uint16)
            values[..., r] = pattern.view(np.float16)
        else:
            values[..., r] = n // 2 ** low[:, r] % 2**width - (2**width - 1) / 2
    return values


def coefficients(pages: PageArrays, b: int) -> tuple[F64, F64, NDArray[np.bool_]]:
    """Of row b: K coefficients [G, T, R_K], V coefficients [G, T, R_V] in units of their steps, and seen [G, T]."""
    length, groups, chunk = int(pages.lengths[b]), pages.k_pages.shape[1], pages.chunk
    chunks = -(-length // chunk)
    table = pages.page_table[b, :chunks]
    k = unpack_pages(pages.k_pages[table], pages.k_bands, "k")  # [chunks, G, C, R_K]
    v = unpack_pages(pages.v_pages[table], pages.v_bands, "v")
    words = pages.skip[table].astype(np.int64) % 2**32  # [chunks, G, C/32], as unsigned
    skipped = np.stack([words[..., d // 32] // 2 ** (d % 32) % 2 for d in range(chunk)], axis=-1)  # [chunks, G, C]

    def by_token(x: NDArray) -> NDArray:
        return np.swapaxes(x, 0, 1).reshape(groups, chunks * chunk, *x.shape[3:])[:, :length]

    return by_token(k), by_token(v), by_token(skipped) == 0


def rebuild(pages: PageArrays, b: int) -> tuple[F64, F64, NDArray[np.bool_]]:
    """Of row b: phase-aligned keys [G, T, D], values [G, T, D], and seen [G, T] (length and skip bits)."""
    k_codes, v_codes, seen = coefficients(pages, b)
    keys = np.zeros((*seen.shape, pages.head_dim))
    values = np.zeros((*seen.shape, pages.head_dim))
    for start in range(0, seen.shape[1], pages.chunk):
        part = slice(start, start + pages.chunk)
        segment = pages.segment_table[b, start // pages.align]
        k_vectors = pages.k_scale[segment].astype(np.float64)[..., None] * pages.k_basis[segment].astype(np.float64)
        v_vectors = pages.v_scale[segment].astype(np.float64)[..., None] * pages.v_basis[segment].astype(np.float64)
        for g in range(seen.shape[0]):
            keys[g, part] = k_codes[g, part] @ k_vectors[g]
            values[g, part] = v_codes[g, part] @ v_vectors[g]
    return keys, values, seen
