"""Oracle of spectral_kernels/pages.py: where each component's bits lie, looked up one component at a time.

bands is ((rank, bits), ...). A row (one token) is its bands side by side; inside a band of rank r
    16 bits: fp16, little-endian, components in order
    8 bits:  component i is byte i, holding n - 128 in two's complement
    4 bits:  component i is byte i mod (r/2), bits 0-3 for i < r/2 and bits 4-7 for the others
    2 bits:  component i is byte i mod (r/4), bits 2f and 2f + 1 with f = i div (r/4)
and a component's value, in units of its step, is n - (2**bits - 1)/2 (16 bits: the number itself).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Bands = Sequence[tuple[int, int]]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]


@dataclass
class PageArrays:
    """The tensors of spectral_kernels.pages.Pages as NumPy arrays, and the four numbers of its layout."""

    k_bands: Bands
    v_bands: Bands
    head_dim: int
    chunk: int
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


def row_bytes(bands: Bands) -> int:
    return sum(rank * bits for rank, bits in bands) // 8


def component_bits(bands: Bands) -> list[tuple[int, int, int]]:
    """For each component of a row: (byte of the row, lowest bit in that byte, number of bits)."""
    where = []
    first_byte = 0
    for rank, bits in bands:
        for i in range(rank):
            if bits == 16:
                where.append((first_byte + 2 * i, 0, 16))
            elif bits == 8:
                where.append((first_byte + i, 0, 8))
            elif bits == 4:
                where.append((first_byte + i, 0, 4) if i < rank // 2 else (first_byte + i - rank // 2, 4, 4))
            elif bits == 2:
                field = i // (rank // 4)
                where.append((first_byte + i - field * (rank // 4), 2 * field, 2))
            else:
                raise ValueError(f"bits: expected 16, 8, 4 or 2, got {bits}")
        first_byte += rank * bits // 8
    return where


def code_of(value: ArrayLike, bits: int) -> NDArray[np.int64]:
    """n = clamp(floor(value + 2**(bits - 1)), 0, 2**bits - 1) of coefficients in units of their steps."""
    # math.floor before the integer addition: no rounding of the sum, whatever the magnitude of the value.
    floored = np.floor(np.clip(np.asarray(value, np.float64), -(2.0**20), 2.0**20)).astype(np.int64)
    return np.clip(floored + 2 ** (bits - 1), 0, 2**bits - 1)


def pack_rows(values: ArrayLike, bands: Bands) -> U8:
    """Coefficients in units of their steps [..., R] to rows of bytes [..., bytes]."""
    values = np.asarray(values)
    codes = np.empty(values.shape, np.int64)
    for r, (_, _, bits) in enumerate(component_bits(bands)):
        if bits == 16:
            codes[..., r] = values[..., r].astype(np.float16).view(np.uint16)
        else:
            codes[..., r] = code_of(values[..., r], bits)
    return pack_codes(codes, bands)


def pack_codes(codes: NDArray[np.int64], bands: Bands) -> U8:
    """Codes n [..., R] (for 16 bits: the bit pattern of the fp16) to rows of bytes [..., bytes]."""
    rows = np.zeros((*codes.shape[:-1], row_bytes(bands)), np.uint8)
    for r, (byte, low, bits) in enumerate(component_bits(bands)):
        n = codes[..., r]
        if bits == 16:
            rows[..., byte] = n % 256
            rows[..., byte + 1] = n // 256
        elif bits == 8:
            rows[..., byte] = (n - 128) % 256
        else:
            rows[..., byte] += (n * 2**low).astype(np.uint8)
    return rows


def unpack_rows(rows: ArrayLike, bands: Bands) -> F64:
    """Rows of bytes [..., bytes] to coefficients in units of their steps [..., R]."""
    rows = np.asarray(rows).astype(np.int64)
    where = component_bits(bands)
    values = np.empty((*rows.shape[:-1], len(where)))
    for r, (byte, low, bits) in enumerate(where):
        if bits == 16:
            pattern = (rows[..., byte] + 256 * rows[..., byte + 1]).astype(np.uint16)
            values[..., r] = pattern.view(np.float16)
        elif bits == 8:
            signed = np.where(rows[..., byte] < 128, rows[..., byte], rows[..., byte] - 256)
            values[..., r] = signed + 128 - 127.5
        else:
            values[..., r] = rows[..., byte] // 2**low % 2**bits - (2**bits - 1) / 2
    return values


def v_page(rows: U8, bands: Bands) -> U8:
    """Token rows [..., C, bytes] as they lie in v_pages [..., bytes, C]: byte j of token d at [j, d].

    A 16-bit side viewed as fp16 is [..., R, C]: the two bytes of component r of token d are neighbours.
    """
    chunk, size = rows.shape[-2:]
    page = np.empty((*rows.shape[:-2], size, chunk), np.uint8)
    if bands[0][1] == 16:
        flat = page.reshape(*rows.shape[:-2], size * chunk)
        for r in range(size // 2):
            for half in range(2):
                flat[..., 2 * r * chunk + half : 2 * (r + 1) * chunk : 2] = rows[..., 2 * r + half]
    else:
        for j in range(size):
            page[..., j, :] = rows[..., j]
    return page


def v_rows(page: U8, bands: Bands) -> U8:
    """The inverse of `v_page`."""
    size, chunk = page.shape[-2:]
    rows = np.empty((*page.shape[:-2], chunk, size), np.uint8)
    if bands[0][1] == 16:
        flat = np.ascontiguousarray(page).reshape(*page.shape[:-2], size * chunk)
        for r in range(size // 2):
            for half in range(2):
                rows[..., 2 * r + half] = flat[..., 2 * r * chunk + half : 2 * (r + 1) * chunk : 2]
    else:
        for j in range(size):
            rows[..., j] = page[..., j, :]
    return rows


def coefficients(pages: PageArrays, b: int) -> tuple[F64, F64, NDArray[np.bool_]]:
    """Of row b: K coefficients [G, T, R_K], V coefficients [G, T, R_V] in units of their steps, and seen [G, T]."""
    length, groups, chunk = int(pages.lengths[b]), pages.k_pages.shape[1], pages.chunk
    chunks = -(-length // chunk)
    table = pages.page_table[b, :chunks]
    k = unpack_rows(pages.k_pages[table], pages.k_bands)  # [chunks, G, C, R_K]
    v = unpack_rows(v_rows(pages.v_pages[table], pages.v_bands), pages.v_bands)
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
        segment = pages.segment_table[b, start // pages.chunk]
        k_vectors = pages.k_scale[segment].astype(np.float64)[..., None] * pages.k_basis[segment].astype(np.float64)
        v_vectors = pages.v_scale[segment].astype(np.float64)[..., None] * pages.v_basis[segment].astype(np.float64)
        for g in range(seen.shape[0]):
            keys[g, part] = k_codes[g, part] @ k_vectors[g]
            values[g, part] = v_codes[g, part] @ v_vectors[g]
    return keys, values, seen
